"""What a run says about its network: scripts need no flags but --pretrained_weights."""

import argparse
import shutil

import numpy as np
import pytest
import referee
import torch
from conftest import SMALL_RUN, arguments_of, same_state, tiny_vit
from PIL import Image

import dino_checkpoints
import dino_features
import eval_copy_detection
import eval_finetune
import eval_image_retrieval
import eval_knn
import eval_linear
import eval_logistic
import eval_video_segmentation
import export
import main_dino
import utils
import video_generation
import visualize_attention
from utils import UserError

pytestmark = pytest.mark.usefixtures("small_networks")

NETWORK = ["--arch", "vit_nano", "--patch_size", 8]
EXIF = ["--exif", "true"]
LABELED = [*NETWORK, *EXIF, "--image_size", 32]
MEAN, STD = (0.4, 0.5, 0.55), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Small data for retrieval, copy detection and video segmentation."""
    root = tmp_path_factory.mktemp("photographs")
    referee.write_evaluation_data(root)
    return root


@pytest.fixture(scope="module")
def rotated(tiny_root, tmp_path_factory):
    """The tiny data set as JPEGs that their EXIF orientation rotates."""
    root = tmp_path_factory.mktemp("rotated")
    exif = Image.Exif()
    exif[0x0112] = 6
    for source in (path for part in ("train", "val") for path in (tiny_root / part).rglob("*.png")):
        target = root / source.relative_to(tiny_root).with_suffix(".jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(source).convert("RGB").save(target, exif=exif)
    return root


@pytest.fixture(scope="module")
def run_dir(rotated, small_networks, tmp_path_factory):
    """The folder of a small run, whose flags are not the defaults. Large weights: images have different features."""
    folder = tmp_path_factory.mktemp("run")
    flags = [*NETWORK, "--epochs", 1, "--warmup_epochs", 0, "--exif", "true", "--mean", *MEAN, "--std", *STD]
    main_dino.train_dino(
        arguments_of(main_dino, *SMALL_RUN, *flags, "--data_path", rotated / "train", "--output_dir", folder)
    )
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    for key, value in checkpoint["teacher"].items():
        checkpoint["teacher"][key] = 4 * value if value.ndim > 1 else value
    torch.save(checkpoint, folder / "checkpoint.pth")
    return folder


@pytest.fixture(autouse=True)
def small_frames(monkeypatch):
    """Videos are segmented at 96 x 128 pixels: at 480p, one takes seconds."""
    monkeypatch.setattr(eval_video_segmentation, "scaled_size", lambda *_: (96, 128))


def words(line):
    """Whether a printed line is a result, not a message about the flags or a progress line."""
    return not line.startswith(("as in training", "note:", "loaded", "Features", "Test:", "Epoch:", "features saved"))


@pytest.fixture
def results(capsys, tmp_path):
    """results(script, *flags) -> (what the script printed, {name: content} of the files that it wrote).

    OUT in the flags is its output folder.
    """

    def run(script, *flags):
        out = tmp_path / "out"
        out.mkdir()
        capsys.readouterr()
        flags = [str(flag).replace("OUT", str(out)) for flag in flags]
        script.main(arguments_of(script, "--device", "cpu", *flags))
        printed = [line for line in capsys.readouterr().out.splitlines() if words(line)]
        printed = [line for line in printed if "frames/s" not in line and "img/s" not in line and str(out) not in line]
        files = {}
        for path in sorted(out.rglob("*")):
            if path.suffix in (".pth", ".tar"):
                content = torch.load(path, weights_only=True)
                content = content.get("state_dict", content) if isinstance(content, dict) else {"": content}
                files |= {f"{path.name}/{name}": tensor.numpy() for name, tensor in content.items()}
            elif path.suffix in (".png", ".jpg"):
                files[str(path.relative_to(out))] = np.asarray(Image.open(path))
        shutil.rmtree(out)
        return printed, files

    return run


# script, the flags that every call has, the flags that the run makes superfluous
SCRIPTS = [
    (eval_knn, ["--data_path", "ROTATED", "--nb_knn", 1, 5, "--num_workers", 0, "--dump_features", "OUT"], LABELED),
    (eval_linear, ["--data_path", "ROTATED", "--epochs", 1, "--num_workers", 0, "--output_dir", "OUT",
                   "--n_last_blocks", 1], LABELED),
    (eval_logistic, ["--data_path", "ROTATED", "--num_workers", 0, "--dump_features", "OUT"], LABELED),
    (eval_image_retrieval, ["--data_path", "DATA", "--imsize", 64, "--num_workers", 0], NETWORK),
    (eval_copy_detection, ["--data_path", "DATA/copydays", "--imsize", 64, "--num_workers", 0], NETWORK),
    (eval_video_segmentation, ["--data_path", "DATA/davis", "--output_dir", "OUT"], NETWORK),
    (visualize_attention, ["--image_path", "PHOTO", "--image_size", 64, 48, "--output_dir", "OUT"], [*NETWORK, *EXIF]),
    (video_generation, ["--input_path", "DATA/davis/JPEGImages/480p/clip", "--output_path", "OUT"], NETWORK),
    (export, ["--to", "backbone", "--output", "OUT/weights.pth"], NETWORK),
    (eval_finetune, ["--data_path", "ROTATED", "--epochs", 1, "--warmup_epochs", 0, "--num_workers", 0,
                     "--batch_size_per_gpu", 4, "--use_fp16", "false", "--output_dir", "OUT"], LABELED),
]  # fmt: skip
NORMALIZING = (eval_knn, eval_linear, eval_logistic, eval_image_retrieval, eval_copy_detection)
NORMALIZING += (visualize_attention, video_generation)


def name_of(value):
    return getattr(value, "__name__", "")


@pytest.fixture
def places(photographs, rotated):
    def replace(flags):
        photo = next((rotated / "val" / "coffee").iterdir())
        known = {"DATA": photographs, "ROTATED": rotated, "PHOTO": photo}
        for name, path in known.items():
            flags = [str(flag).replace(name, str(path)) for flag in flags]
        return flags

    return replace


@pytest.mark.parametrize(("script", "flags", "full"), SCRIPTS, ids=name_of)
def test_a_run_alone_gives_the_results_of_all_its_flags(results, places, run_dir, script, flags, full):
    flags = places(flags)
    printed, files = results(script, *flags, "--pretrained_weights", run_dir)
    printed_in_full, files_in_full = results(script, *flags, *full, "--pretrained_weights", run_dir / "checkpoint.pth")
    assert printed or files
    assert printed == printed_in_full
    assert list(files) == list(files_in_full)
    for name, content in files.items():
        np.testing.assert_array_equal(content, files_in_full[name], err_msg=name)


def normalized_by_itself(state):
    """A ViT's tensors with the normalization by MEAN and STD in the first layer, so that it needs none before it."""
    state, name = dict(state), "backbone.patch_embed.proj"
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    weight = state[f"{name}.weight"] / std
    state[f"{name}.bias"] = state[f"{name}.bias"] - (weight * mean).sum(dim=(1, 2, 3))
    state[f"{name}.weight"] = weight
    return state


@pytest.mark.parametrize(("script", "flags", "_"), [case for case in SCRIPTS if case[0] in NORMALIZING], ids=name_of)
def test_mean_and_std_are_the_runs(results, places, run_dir, tmp_path, script, flags, _):
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    checkpoint["teacher"] = normalized_by_itself(checkpoint["teacher"])
    checkpoint["args"] |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    torch.save(checkpoint, tmp_path / "other.pth")
    flags = [*places(flags), "--lr", 1e-6] if script is eval_linear else places(flags)
    printed, files = results(script, *flags, "--pretrained_weights", run_dir)
    printed_by_other, files_by_other = results(script, *flags, "--pretrained_weights", tmp_path / "other.pth")
    if not files:
        assert printed == printed_by_other
    for name, content in files.items():
        if content.dtype == np.uint8:  # colors of maps to rounding, labels of pixels but for ties
            assert (np.abs(content.astype(int) - files_by_other[name]) > 2).mean() < 0.01, name
        else:
            np.testing.assert_allclose(content, files_by_other[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_video_frames_are_normalized_by_the_runs_mean_and_std(places, run_dir, tmp_path, monkeypatch):
    seen, real = [], eval_video_segmentation.patch_features
    monkeypatch.setattr(eval_video_segmentation, "patch_features", lambda *args: seen.append(args[1]) or real(*args))
    flags = ["--data_path", *places(["DATA/davis"]), "--output_dir", tmp_path, "--pretrained_weights", run_dir]
    eval_video_segmentation.main(arguments_of(eval_video_segmentation, "--device", "cpu", *flags))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    levels = 255 * (seen[0] * std + mean)
    torch.testing.assert_close(levels, levels.round().clamp(0, 255), atol=1e-3, rtol=0)


# ---- precision ----


@pytest.mark.parametrize(("script", "flags", "_"), SCRIPTS[:4], ids=name_of)
def test_features_are_computed_in_the_precision_that_is_given(results, places, run_dir, monkeypatch, script, flags, _):
    seen, real = [], dino_features.features_in

    def features_in(model, images, amp_dtype=None):
        features = real(model, images, amp_dtype)
        seen.append((amp_dtype, features.dtype))
        return features

    monkeypatch.setattr(dino_features, "features_in", features_in)
    for words, dtype in (([], None), (["--amp_dtype", "bf16"], torch.bfloat16)):
        seen.clear()
        results(script, *places(flags), "--pretrained_weights", run_dir, *words)
        assert set(seen) == {(dtype, torch.float32)}


def test_features_in_bf16_are_close_to_float32(results, places, run_dir):
    flags = [*places(SCRIPTS[0][1]), "--pretrained_weights", run_dir]
    (_, exact), (_, rounded) = results(eval_knn, *flags), results(eval_knn, *flags, "--amp_dtype", "bf16")
    exact, rounded = (found["testfeat.pth/"] for found in (exact, rounded))
    assert rounded.dtype == np.float32
    assert 0 < np.linalg.norm(rounded - exact) < 2e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("script", [script.__name__ for script, *_ in SCRIPTS[:4]])
def test_tf32_without_a_gpu_is_one_line(refusal, places, run_dir, tmp_path, script):
    flags = {each.__name__: flags for each, flags, _ in SCRIPTS}[script]
    flags = [flag.replace("OUT", str(tmp_path)) for flag in places(flags)]
    line = refusal(script, *flags, "--pretrained_weights", run_dir, "--amp_dtype", "tf32", "--device", "cpu")
    assert line.endswith("--amp_dtype tf32 is a precision of NVIDIA GPUs, not of cpu. Use another")


# ---- flags ----


def follow(*flags, script=eval_knn):
    args = arguments_of(script, *flags)
    dino_checkpoints.follow_run(args)
    return args


def test_a_flag_that_is_given_stays_and_says_that_it_differs(run_dir, capsys):
    args = follow("--pretrained_weights", run_dir, "--image_size", 224, "--exif", "false", "--patch_size", 8)
    assert (args.arch, args.patch_size, args.image_size, args.exif) == ("vit_nano", 8, 224, False)
    assert capsys.readouterr().out.splitlines() == [
        "as in training: --arch vit_nano",
        "note: --image_size 224 differs from the run's 32",
        "note: --exif false differs from the run's true",
    ]


def test_all_flags_of_a_caller_in_python_are_given(run_dir, capsys):
    args = eval_knn.get_args_parser().parse_args(["--pretrained_weights", str(run_dir)])
    dino_checkpoints.follow_run(args)
    assert (args.arch, args.patch_size, args.image_size, args.exif) == ("vit_small", 16, 224, False)
    assert args.pretrained_weights == str(run_dir / "checkpoint.pth")
    assert "note: --arch vit_small differs from the run's vit_nano" in capsys.readouterr().out


def test_the_other_name_of_a_network_does_not_differ(tmp_path, capsys):
    torch.save({"teacher": {}, "args": {"arch": "deit_small", "patch_size": 16}}, tmp_path / "c.pth")
    follow("--pretrained_weights", tmp_path / "c.pth", "--arch", "vit_small")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("weights", ["", "random", "PLAIN"])
def test_without_a_run_the_defaults_are_the_public_ones(tmp_path, capsys, weights):
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "plain.pth")
    args = follow("--pretrained_weights", weights.replace("PLAIN", str(tmp_path / "plain.pth")))
    assert (args.arch, args.patch_size, args.image_size, args.exif) == ("vit_small", 16, 224, False)
    assert capsys.readouterr().out == ""


def test_arguments_of_other_projects_that_make_no_sense_here_are_ignored(tmp_path):
    args = argparse.Namespace(arch=None, patch_size="16", global_crops_size=-3, exif=1, lr=0.1)
    torch.save({"model": {}, "args": args}, tmp_path / "c.pth")
    args = follow("--pretrained_weights", tmp_path / "c.pth")
    assert (args.arch, args.patch_size, args.image_size, args.exif) == ("vit_small", 16, 224, False)


@pytest.fixture
def seen(monkeypatch):
    """seen(script, *flags) -> the arguments that a script checks."""

    def run(script, *flags):
        found = {}

        def stop(args):
            found.update(vars(args))
            raise UserError("enough")

        monkeypatch.setattr(script, "check_args", stop)
        with pytest.raises(UserError, match="enough"):
            script.main(arguments_of(script, *flags))
        return found

    return run


def test_default_sizes_become_whole_patches_of_the_run(seen, tmp_path):
    """320 and 480 are no multiples of 14."""
    torch.save({"teacher": {}, "args": {"arch": "vit_nano", "patch_size": 14}}, tmp_path / "c.pth")
    weights = ["--pretrained_weights", tmp_path / "c.pth"]
    assert seen(eval_copy_detection, *weights)["imsize"] == 308
    assert seen(eval_copy_detection, *weights, "--imsize", 320)["imsize"] == 320
    assert seen(visualize_attention, *weights)["image_size"] == [476, 476]
    assert seen(visualize_attention, *weights, "--image_size", 480)["image_size"] == [480]
    assert seen(visualize_attention, "--patch_size", 14)["image_size"] == [480, 480]  # there is no run


def test_a_convnet_is_exported_for_the_crops_of_its_training(seen, tmp_path):
    flags = ["--to", "onnx", "--output", tmp_path / "x.onnx", "--pretrained_weights", tmp_path / "c.pth"]
    for arch, size in (("resnet18", [96]), ("vit_nano", None)):  # a ViT's positions know it
        args = {"arch": arch, "patch_size": 16, "global_crops_size": 96}
        torch.save({"teacher": {}, "args": args}, tmp_path / "c.pth")
        found = seen(export, *flags)
        assert (found["arch"], found["image_size"]) == (arch, size)
    assert seen(export, *flags, "--image_size", 64)["image_size"] == [64]


def test_arguments_of_other_projects_do_not_keep_weights_from_loading(tmp_path):
    source, target = tiny_vit(0), tiny_vit(1)
    torch.save({"teacher": source.state_dict(), "args": {"in_chans": 1, "mean": "imagenet"}}, tmp_path / "c.pth")
    utils.load_pretrained_weights(target, tmp_path / "c.pth", "teacher", "vit_tiny", 8)
    assert same_state(target, source)


@pytest.mark.parametrize("script", ["eval_knn", "eval_linear", "eval_logistic"])
@pytest.mark.parametrize(
    ("size", "remedy"), [(36, "--image_size 36 is not a multiple of --patch_size 8. Use 32 or 40"), (7, "Use 8")]
)
def test_an_image_size_of_no_whole_patches_is_refused(refusal, run_dir, script, size, remedy):
    line = refusal(script, "--pretrained_weights", run_dir, "--image_size", size)
    assert line.endswith(remedy)


def test_convnets_take_images_of_any_size():
    eval_knn.check_args(arguments_of(eval_knn, "--arch", "resnet18", "--image_size", 37))


# ---- folders ----


def test_the_previous_checkpoint_stands_in_for_a_missing_one(run_dir, tmp_path):
    shutil.copy(run_dir / "checkpoint.pth", tmp_path / "checkpoint.prev.pth")
    assert follow("--pretrained_weights", tmp_path).pretrained_weights == str(tmp_path / "checkpoint.prev.pth")
    shutil.copy(run_dir / "checkpoint.pth", tmp_path)
    assert follow("--pretrained_weights", tmp_path).pretrained_weights == str(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize(
    "script", ["eval_knn", "visualize_attention", "eval_copy_detection", "eval_video_segmentation"]
)
def test_a_folder_without_a_checkpoint_is_one_clear_line(refusal, tmp_path, script):
    line = refusal(script, "--pretrained_weights", tmp_path)
    assert line == (
        f"error: --pretrained_weights {tmp_path} is a folder without a checkpoint.pth. Name the --output_dir of a run, "
        "or a file"
    )
