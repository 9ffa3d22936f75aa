"""backbone.pth and backbone.json: what a run leaves for those who only use its network."""

import errno
import json
import os
import shutil

import pytest
import torch
from conftest import ROOT, SMALL_RUN, arguments_of, assert_same, same_state

import dino_backbones
import dino_checkpoints
import eval_knn
import export
import main_dino
import utils
import vision_transformer as vits
from utils import UserError

pytestmark = pytest.mark.usefixtures("small_networks")

FLAGS = ["--patch_size", 8, "--epochs", 1, "--warmup_epochs", 0, "--exif", "true"]
FLAGS += ["--mean", 0.4, 0.5, 0.55, "--std", 0.2, 0.25, 0.3]


def train(tiny_root, folder):
    flags = [*SMALL_RUN, *FLAGS, "--data_path", tiny_root / "train", "--output_dir", folder]
    main_dino.train_dino(arguments_of(main_dino, *flags))


@pytest.fixture(scope="module")
def run_dir(tiny_root, small_networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(tiny_root, folder)
    return folder


@pytest.fixture
def shipped(run_dir, tmp_path):
    """A folder with the two files alone."""
    for name in ("backbone.pth", "backbone.json"):
        shutil.copy(run_dir / name, tmp_path)
    return tmp_path


# ---- output ----


def test_a_run_ends_with_the_teachers_backbone_as_plain_tensors(run_dir):
    teacher = torch.load(run_dir / "checkpoint.pth", weights_only=True)["teacher"]
    expected = {key.removeprefix("backbone."): value for key, value in teacher.items() if key.startswith("backbone.")}
    state = torch.load(run_dir / "backbone.pth", weights_only=True)
    assert type(state) is dict
    assert_same(state, expected)
    model = vits.vit_nano(patch_size=8, img_size=[32])
    model.load_state_dict(state, strict=True)
    assert os.path.getsize(run_dir / "backbone.pth") < os.path.getsize(run_dir / "checkpoint.pth") / 3


def test_its_settings_are_beside_it(run_dir):
    settings = json.loads((run_dir / "backbone.json").read_text())
    assert settings == {
        "arch": "vit_nano",
        "patch_size": 8,
        "image_size": 32,
        "exif": True,
        "in_chans": 3,
        "mean": [0.4, 0.5, 0.55],
        "std": [0.2, 0.25, 0.3],
        "value_range": None,
        "epochs": 1,
        "images": 40,
        "network": "teacher",
    }


def test_the_file_fits_the_networks_of_torch_hub(tmp_path):
    source = vits.vit_small(patch_size=16)
    path = dino_checkpoints.write_backbone(tmp_path, source, arguments_of(main_dino))
    model = torch.hub.load(str(ROOT), "dino_vits16", source="local", pretrained=False)
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert same_state(model, source)


@pytest.mark.parametrize("arch", ["resnet8", "resnet18_cifar"])
def test_resnets_for_small_images_load_through_the_hub(tmp_path, arch):
    source, _ = dino_backbones.build_backbone(arch, img_size=32)
    path = dino_checkpoints.write_backbone(tmp_path, source, arguments_of(main_dino, "--arch", arch))
    model = torch.hub.load(str(ROOT), arch, source="local")
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), source.eval()(images))
        assert torch.equal(utils.load_run(path)[0](images), source(images))


def test_a_vit_with_a_convolutional_stem_loads_from_its_file(tmp_path):
    source, _ = dino_backbones.build_backbone("vit_nano_conv", patch_size=4, img_size=24)
    flags = ("--arch", "vit_nano_conv", "--patch_size", 4, "--global_crops_size", 24)
    path = dino_checkpoints.write_backbone(tmp_path, source, arguments_of(main_dino, *flags))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(utils.load_run(path)[0](images), source.eval()(images))


def test_convnets_are_written_in_the_usual_memory_format(tmp_path):
    source, _ = dino_backbones.build_backbone("resnet18", img_size=32)
    source.to(memory_format=torch.channels_last)
    path = dino_checkpoints.write_backbone(tmp_path, source, arguments_of(main_dino, "--arch", "resnet18"))
    state = torch.load(path, weights_only=True)
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert same_state(source, state)


def test_a_full_disk_is_a_warning_and_leaves_no_part_of_a_file(tiny_root, tmp_path, monkeypatch, capsys):
    write = utils.write_whole

    def write_whole(path, act):
        def run_full(file):
            file.write(b"part of it")
            raise OSError(errno.ENOSPC, "No space left on device")

        return write(path, run_full if str(path).endswith("backbone.pth") else act)

    monkeypatch.setattr(utils, "write_whole", write_whole)
    train(tiny_root, tmp_path)
    said = capsys.readouterr().out
    assert "warning: backbone.pth could not be written (No space left on device)\n" in said
    assert "finished: loss" in said
    assert (tmp_path / "checkpoint.pth").exists()
    assert not list(tmp_path.glob("backbone*"))


# ---- what reads it ----


@pytest.mark.parametrize("name", ["", "backbone.pth"])
def test_an_evaluation_needs_no_other_file_and_no_flags(run_dir, shipped, tiny_root, tmp_path_factory, name):
    found = []
    for weights in (run_dir, shipped / name):
        out = tmp_path_factory.mktemp("features")
        flags = ["--data_path", tiny_root, "--dump_features", out, "--num_workers", 0, "--device", "cpu"]
        eval_knn.main(arguments_of(eval_knn, "--pretrained_weights", weights, *flags))
        found.append({file: torch.load(out / file, weights_only=True) for file in sorted(os.listdir(out))})
    assert_same(*found)


def test_export_and_load_run_follow_the_settings(shipped, tmp_path, capsys):
    flags = [
        "--pretrained_weights",
        shipped / "backbone.pth",
        "--to",
        "backbone",
        "--output",
        tmp_path / "x.safetensors",
    ]
    export.main(arguments_of(export, *flags))
    assert "less the mean (0.4, 0.5, 0.55), over the std (0.2, 0.25, 0.3)" in capsys.readouterr().out
    shutil.copy(shipped / "backbone.json", tmp_path / "x.json")
    model, _ = utils.load_run(tmp_path / "x.safetensors")
    assert same_state(model, torch.load(shipped / "backbone.pth", weights_only=True))


@pytest.mark.parametrize("name", ["", "backbone.pth"])
def test_a_new_run_can_start_from_it(shipped, capsys, name):
    args = arguments_of(main_dino, *SMALL_RUN, *FLAGS, "--init_from", shipped / name, "--output_dir", shipped / "new")
    student, _ = main_dino.build_student_and_teacher(args, torch.device("cpu"), None)
    assert same_state(student.backbone, torch.load(shipped / "backbone.pth", weights_only=True))
    assert "the projection head starts at random" in capsys.readouterr().out


def test_settings_that_can_not_be_read_are_named(shipped, refusal):
    (shipped / "backbone.json").write_text('{"arch": "vit_')
    line = refusal(eval_knn, "--pretrained_weights", shipped / "backbone.pth")
    assert f"{shipped / 'backbone.json'}, the settings of {shipped / 'backbone.pth'}, can't be read: " in line
    assert line.endswith("Restore or delete it")


@pytest.mark.parametrize("content", ["[1, 2]", '{"epochs": 3}'])
def test_a_json_file_of_something_else_is_no_settings(shipped, content):
    (shipped / "backbone.json").write_text(content)
    assert dino_checkpoints.trained_settings(shipped / "backbone.pth") == {}
    with pytest.raises(UserError, match="does not say its network"):
        utils.load_run(shipped / "backbone.pth")
