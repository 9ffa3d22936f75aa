"""Exports: each kind is opened by its software and compared with the network; a wrong one is not kept."""

import json
import math
import os
import re
import socket
import sys

import numpy as np
import pytest
import torch
from conftest import arguments_of, assert_near, ending, fill, run_script, tensor
from PIL import Image
from torch import nn

import dino_backbones
import dino_crops
import dino_layouts
import dino_sample
import export
import hubconf
import utils
import vision_transformer as vits

SMALL = ["--arch", "vit_nano", "--patch_size", "16"]


def run(*flags):
    export.main(arguments_of(export, *SMALL, *flags))


def end(monkeypatch, capsys, *flags):
    return ending(monkeypatch, capsys, export, *SMALL, *flags)


def network(name="teacher"):
    """A vit_nano for crops of 48 pixels in which attention, positions and biases matter."""
    model = fill(vits.vit_nano(patch_size=16, img_size=[48]), name).eval().requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv.weight.mul_(3)
    model.pos_embed.mul_(20)
    return model


def features(model, images):
    with torch.no_grad():
        return model(images)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A training checkpoint: student and teacher with their heads."""
    state = {"epoch": 3}
    for name, prefix in (("student", "module."), ("teacher", "")):
        state[name] = {f"{prefix}backbone.{key}": value for key, value in network(name).state_dict().items()}
        state[name][f"{prefix}head.mlp.0.weight"] = torch.ones(2, 2)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def nano(checkpoint):
    return ["--pretrained_weights", checkpoint]


@pytest.fixture
def offline(monkeypatch):
    """Any connection fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("a network connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def transformers(offline, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def printed_usage(capsys):
    return re.search(r"^to use it: (.*)$", capsys.readouterr().out, re.M)[1]


# ---- flags ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--to", "onnx", "--output", "a.pth"], r"a\.pth must end in \.onnx"),
        (["--to", "backbone", "--output", "a.pt"], r"must end in \.pth or \.safetensors"),
        (["--to", "hf", "--output", "a.safetensors"], r"a\.safetensors names a file.*folder"),
        (["--to", "hf", "--output", "a", "--arch", "resnet18"], "resnet18.*backbone or onnx"),
        (["--to", "hf", "--output", "a", "--arch", "vit_nano_conv"], "hf has no ViT with the stem.*backbone or onnx"),
        (["--to", "timm", "--output", "a.pth", "--arch", "vit_nano_conv"], "timm has no ViT with the stem"),
        (["--to", "onnx", "--output", "a.onnx", "--image_size", "48", "8"], "48 8 is not a multiple.*--patch_size 16"),
        (["--to", "backbone", "--output", "a.pth", "--image_size", "48"], "any image size. Remove the flag"),
        (["--to", "backbone", "--output", "a.pth", "--pretrained_weights", ""], "no published weights of.* vit_nano"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(monkeypatch, capsys, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    code, line = end(monkeypatch, capsys, *flags)
    assert code == 2
    assert re.search(words, line), line
    assert not list(tmp_path.iterdir())


# ---- plain weights ----


@pytest.mark.parametrize(("name", "ending"), [("student", ".pth"), ("teacher", ".safetensors")])
def test_plain_weights_are_the_checkpoints_tensors_in_the_published_layout(tmp_path, nano, name, ending):
    path = tmp_path / f"new/out{ending}"
    run("--to", "backbone", "--output", path, "--checkpoint_key", name, *nano)
    if ending == ".pth":
        state = torch.load(path, weights_only=True)
    else:
        state = pytest.importorskip("safetensors.torch").load_file(path)
    want = network(name).state_dict()
    assert state.keys() == want.keys()
    assert all(torch.equal(state[key], want[key]) for key in want)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_plain_weights_share_no_memory_even_if_the_network_does():
    model = nn.Module()
    model.a = model.b = nn.Parameter(torch.ones(2, 3))
    model.part = nn.Parameter(torch.ones(50, 4).T[:2])
    tensors = export.plain_state(model).values()
    assert len({tensor.data_ptr() for tensor in tensors}) == 3
    for each in tensors:
        assert each.is_contiguous()
        assert each.untyped_storage().nbytes() == each.nbytes


def test_published_weights_are_exported_without_a_checkpoint_and_the_hub_loads_the_export(tmp_path, monkeypatch):
    published = vits.vit_small(patch_size=16)
    urls = []
    monkeypatch.setattr(hubconf, "_download", lambda url: urls.append(url) or published.state_dict())
    run("--arch", "vit_small", "--to", "backbone", "--output", tmp_path / "out.pth")
    assert urls == [hubconf.BASE_URL + hubconf.PUBLISHED["dino_vits16"]["backbone"]]
    monkeypatch.setattr(hubconf, "_download", lambda url: torch.load(tmp_path / "out.pth", weights_only=True))
    loaded, images = hubconf.dino_vits16().eval(), torch.ones(1, 3, 32, 32)
    assert torch.equal(features(loaded, images), features(published.eval(), images))


def test_the_printed_line_opens_plain_weights(tmp_path, nano, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir('a "folder"')
    run("--to", "backbone", "--output", 'a "folder"/out.pth', *nano)
    names = {"dino_backbones": dino_backbones, "torch": torch}
    exec(printed_usage(capsys), names)
    assert not names["model"].training
    assert all(torch.equal(value, network().state_dict()[key]) for key, value in names["model"].state_dict().items())


# ---- ONNX ----


def onnx_features(path, images):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["features"], {"images": images.numpy()})[0]


@pytest.fixture(scope="module")
def wide(tmp_path_factory, checkpoint):
    """An ONNX export for images of 32 x 80 pixels."""
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("onnx") / "wide.onnx"
    run("--to", "onnx", "--image_size", 32, 80, "--output", path, "--pretrained_weights", checkpoint)
    return path


@pytest.mark.xdist_group("onnx")
@pytest.mark.parametrize("number", [1, 5])
def test_onnxruntime_gives_the_features_for_any_batch_size(wide, number):
    images = tensor("onnx", (number, 3, 32, 80))
    assert_near(onnx_features(wide, images), features(network(), images), 1e-5)


@pytest.mark.xdist_group("onnx")
def test_an_onnx_file_needs_no_second_file_and_describes_its_images(wide):
    onnx = pytest.importorskip("onnx")
    assert [file.name for file in wide.parent.iterdir()] == ["wide.onnx"]
    model = onnx.load(wide, load_external_data=False)
    assert len(model.graph.initializer) > 20
    assert {tensor.data_location for tensor in model.graph.initializer} == {onnx.TensorProto.DEFAULT}
    metadata = {each.key: each.value for each in model.metadata_props}
    assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(metadata["std"]) == [0.229, 0.224, 0.225]
    assert (json.loads(metadata["image_size"]), metadata["arch"]) == ([32, 80], "vit_nano")


def test_the_traced_exporter_of_torch_before_2_9_works_too(tmp_path, nano, monkeypatch):
    """It can't express the interpolation of positions, so they have to be constants."""
    pytest.importorskip("onnx")
    current = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: current(*args, **options, dynamo=False))
    run("--to", "onnx", "--image_size", 80, 32, "--output", tmp_path / "old.onnx", *nano)
    images = tensor("onnx", (4, 3, 80, 32))
    assert_near(onnx_features(tmp_path / "old.onnx", images), features(network(), images), 1e-5)


def test_more_than_2_gb_of_weights_do_not_fit_into_an_onnx_file(tmp_path):
    pytest.importorskip("onnxruntime")
    args = arguments_of(export, *SMALL, "--to", "onnx", "--output", "a.onnx")
    with pytest.raises(utils.UserError, match="2 GB"):
        export.export_onnx(nn.Linear(2**15, 2**14, device="meta"), tmp_path / "a.onnx", (32, 32), args)


# ---- timm ----


@pytest.mark.parametrize(
    ("arch", "patch_size", "name"),
    [
        ("vit_small", 16, "vit_small_patch16_224.dino"),
        ("deit_small", 8, "vit_small_patch8_224.dino"),
        ("vit_base", 8, "vit_base_patch8_224.dino"),
        ("vit_tiny", 8, "vit_tiny_patch16_224"),
        ("vit_nano", 14, "vit_tiny_patch16_224"),
    ],
)
def test_timm_has_a_network_for_each_vit(arch, patch_size, name):
    timm = pytest.importorskip("timm")
    flags = ["--arch", arch, "--patch_size", patch_size, "--to", "timm", "--output", "a.pth"]
    with torch.device("meta"):
        model, _ = dino_backbones.build_backbone(arch, patch_size)
        got, keywords = export.timm_network(model, (224, 224), arguments_of(export, *flags))
    theirs = timm.create_model(got, **keywords)
    assert got == name
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, theirs)]
    assert shapes[0] == shapes[1]
    assert theirs.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads


@pytest.mark.parametrize(("size", "ending"), [((48, 48), ".pth"), ((32, 80), ".safetensors")])
def test_the_printed_line_makes_timm_give_the_same_features(tmp_path, nano, capsys, offline, size, ending):
    timm = pytest.importorskip("timm")
    sizes = ["--image_size", *size] if size != (48, 48) else []  # 48 is the size of the positions
    run("--to", "timm", "--output", tmp_path / f"out{ending}", *sizes, *nano)
    theirs = eval(printed_usage(capsys), {"timm": timm}).eval()
    images = tensor("timm", (2, 3, *size))
    assert_near(features(theirs, images), features(network(), images), 1e-5)


@pytest.mark.parametrize("arch", ["xcit_nano_12_p16", "timm:resnet10t"])
def test_other_networks_are_exported_to_timm_and_to_plain_files(tmp_path, capsys, arch):
    timm = pytest.importorskip("timm")
    model, _ = dino_backbones.build_backbone(arch)
    fill(model, "shared").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    flags = ["--arch", arch, "--pretrained_weights", tmp_path / "weights.pth"]
    run("--to", "backbone", "--output", tmp_path / "plain.pth", "--image_size", 64, *flags)
    plain = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    capsys.readouterr()
    run("--to", "timm", "--output", tmp_path / "timm.pth", *flags)
    theirs = eval(printed_usage(capsys), {"timm": timm}).eval()
    images = tensor("timm", (1, 3, 224, 224))
    assert_near(features(theirs, images), features(model, images), 1e-5)


@pytest.mark.parametrize(
    ("arch", "words"),
    [("squeezenet1_1", "no network named --arch squeezenet1_1"), ("efficientnet_b0", "efficientnet_b0 has other tens")],
)
def test_a_network_that_timm_does_not_have_is_an_error(tmp_path, monkeypatch, capsys, arch, words):
    pytest.importorskip("timm")
    flags = ["--arch", arch, "--pretrained_weights", "random"]
    code, line = end(monkeypatch, capsys, "--to", "timm", "--output", tmp_path / "a.pth", *flags)
    assert (code, words in line) == (2, True)
    assert not list(tmp_path.iterdir())


# ---- Hugging Face ----


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("hf") / "vit.nano"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        run("--to", "hf", "--output", path, "--pretrained_weights", checkpoint)
    return path


def test_transformers_gives_the_same_tokens(folder, transformers):
    theirs = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)
    images = tensor("hf", (2, 3, 48, 48))
    (want,) = network().get_intermediate_layers(images)
    assert_near(features(theirs, images).last_hidden_state, want, 1e-5)


def test_the_tensors_have_the_names_that_files_on_the_hub_have(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        assert file.metadata() == {"format": "pt"}  # transformers 4 refuses files without it
    part = ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
    part += ["attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after"]
    layers = [f"encoder.layer.{i}.{name}" for i in range(4) for name in part]
    layers += ["embeddings.patch_embeddings.projection", "layernorm"]
    want = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert sorted(state) == sorted([*want, "embeddings.cls_token", "embeddings.position_embeddings"])
    qkv = network().blocks[2].attn.qkv
    assert torch.equal(state["encoder.layer.2.attention.attention.key.weight"], qkv.weight[128:256])
    assert torch.equal(state["encoder.layer.2.attention.attention.value.bias"], qkv.bias[256:])


def test_transformers_prepares_a_photograph_as_the_evaluations_do(folder, transformers):
    photograph = Image.open(dino_sample.find_photographs()[0]).convert("RGB").resize((100, 70))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    got = torch.as_tensor(np.asarray(processor(photograph, return_tensors="np")["pixel_values"]))
    want = utils.normalize(dino_crops.eval_transform(48)(photograph)[None])
    assert_near(got, want, 0.02)


def test_transformers_accepts_oblong_images(tmp_path, nano, transformers):
    run("--to", "hf", "--image_size", 32, 80, "--output", tmp_path / "wide", *nano)
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "wide", add_pooling_layer=False)
    images = tensor("hf", (2, 3, 32, 80))
    assert_near(features(theirs, images).last_hidden_state[:, 0], features(network(), images), 1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "wide")
    white = processor(Image.new("RGB", (200, 200), "white"), return_tensors="np")["pixel_values"]
    want = (1 - torch.tensor(utils.IMAGENET_MEAN)) / torch.tensor(utils.IMAGENET_STD)
    assert_near(np.asarray(white), want[None, :, None, None].expand(1, 3, 32, 80), 1e-3)  # no black border


# ---- verification ----


@pytest.mark.parametrize(
    ("opened", "deviation"),
    [
        (lambda x, want: want, 0),
        (lambda x, want: want + torch.tensor([[0.0, 0.0], [0.5, 0.25], [0.0, 0.0]])[: len(x)], 0.5 / 8),
        (lambda x, want: want - torch.tensor([[0.0, 0.0], [0.5, 0.25], [0.0, 0.0]])[: len(x)], 0.5 / 8),
        (lambda x, want: want * (1 + 3 * (len(x) == 1)), 3),  # wrong for a batch of one
        (lambda x, want: want[:, :1], math.inf),
        (lambda x, want: want * math.nan, math.inf),
    ],
)
def test_the_deviation_is_relative_to_the_largest_feature(opened, deviation):
    images, want = torch.zeros(3, 3, 2, 2), torch.tensor([[1.0, -8.0], [2.0, 4.0], [0.0, 1.0]])
    assert export.largest_deviation(lambda x: opened(x, want[: len(x)]), images, want) == deviation


@pytest.mark.parametrize(
    ("kind", "name", "library"),
    [("backbone", "a.pth", "torch"), ("timm", "a.safetensors", "timm"), ("hf", "a", "transformers")],
)
def test_an_export_with_a_wrong_tensor_is_not_kept(tmp_path, nano, monkeypatch, capsys, kind, name, library):
    pytest.importorskip(library)
    plain = export.plain_state

    def slightly_wrong(model):
        state = plain(model)
        state["blocks.1.mlp.fc1.bias"][7] += 0.5
        return state

    monkeypatch.setattr(export, "plain_state", slightly_wrong)
    if kind != "hf":
        (tmp_path / name).write_text("old content")
    code, line = end(monkeypatch, capsys, "--to", kind, "--output", tmp_path / name, *nano)
    assert code == 4
    assert re.search(rf"the features of {library} \S+ differ.*more than 1e-04: nothing was written", line)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old content"] * (kind != "hf")


def test_an_onnx_graph_with_wrong_positions_is_not_kept(tmp_path, nano, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    fixed = export.with_fixed_size

    def shifted(model, size):
        model = fixed(model, size)
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:].roll(1, dims=1)
        return model

    monkeypatch.setattr(export, "with_fixed_size", shifted)
    code, line = end(monkeypatch, capsys, "--to", "onnx", "--output", tmp_path / "a.onnx", *nano)
    assert (code, "onnxruntime" in line) == (4, True)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_transformers_would_only_warn_of_is_an_error(tmp_path, nano, transformers, monkeypatch, capsys):
    renamed = dino_layouts.hf_state
    monkeypatch.setattr(dino_layouts, "hf_state", lambda state: {**renamed(state), "odd.weight": torch.ones(1)})
    code, line = end(monkeypatch, capsys, "--to", "hf", "--output", tmp_path / "out", *nano)
    assert (code, "odd.weight" in line) == (4, True)
    assert not list(tmp_path.iterdir())


def test_a_diverged_network_is_not_exported(tmp_path, monkeypatch, capsys):
    model = network()
    model.norm.bias[3] = math.nan
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    flags = ["--to", "backbone", "--output", tmp_path / "a.pth", "--pretrained_weights", tmp_path / "nan.pth"]
    code, line = end(monkeypatch, capsys, *flags)
    assert (code, "NaN" in line) == (2, True)
    assert not (tmp_path / "a.pth").exists()


# ---- files ----


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (OSError(28, "No space left on device"), 2, "can't write --output .*: No space left on device. Nothing"),
        (TypeError("no\nsuch operator"), 4, "--to backbone failed for --arch vit_nano.*TypeError: no such operator"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failed_export_leaves_the_old_file(tmp_path, nano, monkeypatch, capsys, raised, code, words):
    (tmp_path / "a.pth").write_text("old content")

    def fail(model, path, *_):
        path.write_text("half of it")
        raise raised

    monkeypatch.setitem(export.EXPORTS, "backbone", fail)
    got, line = end(monkeypatch, capsys, "--to", "backbone", "--output", tmp_path / "a.pth", *nano)
    assert got == code
    assert re.search(words, line), line
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old content"]


@pytest.mark.parametrize(("kind", "name"), [("backbone", "a.pth"), ("hf", "a")])
def test_the_target_of_a_link_is_written(tmp_path, nano, kind, name):
    for library in export.LIBRARIES.get(kind, ()):
        pytest.importorskip(library)
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / name, tmp_path / "disk" / name
    target.mkdir() if kind == "hf" else target.write_text("old")
    link.symlink_to(target)
    run("--to", kind, "--output", link, *nano)
    assert link.is_symlink()
    written = target / "model.safetensors" if kind == "hf" else target
    assert written.stat().st_size > 100_000
    assert [path.name for path in (tmp_path / "disk").iterdir()] == [name]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--to", "hf", "--output", "{tmp}/full"], "full exists already. Name a new folder"),
        (["--to", "backbone", "--output", "{tmp}/folder.pth"], "folder.pth is a folder"),
        (["--to", "backbone", "--output", "{tmp}/file.d/a.pth"], "can't write to the folder of --output"),
        (["--to", "backbone", "--output", "{tmp}/mine.pth"], "would replace --pretrained_weights"),
        (["--to", "backbone", "--output", "{tmp}/a.pth", "--checkpoint_key", "ema"], "student, teacher"),
    ],
)
def test_nothing_is_written_over_other_files_or_from_wrong_weights(
    tmp_path, checkpoint, monkeypatch, capsys, flags, words
):
    if "hf" in flags:
        pytest.importorskip("transformers")
    (tmp_path / "file.d").write_text("mine")
    (tmp_path / "full" / "mine").mkdir(parents=True)
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "mine.pth").write_bytes(checkpoint.read_bytes())
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    flags = ["--pretrained_weights", tmp_path / "mine.pth", *(flag.format(tmp=tmp_path) for flag in flags)]
    code, line = end(monkeypatch, capsys, *flags)
    assert (code, words in line) == (2, True), line
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("kind", "name", "library"), [("backbone", "a.safetensors", "safetensors"), ("hf", "a", "transformers")]
)
def test_a_missing_library_is_named_with_the_pip_command(tmp_path, nano, monkeypatch, capsys, kind, name, library):
    for other in {"onnx": ("onnx", "onnxruntime"), "hf": ("safetensors",)}.get(kind, ()):
        pytest.importorskip(other)
    monkeypatch.setitem(sys.modules, library, None)
    code, line = end(monkeypatch, capsys, "--to", kind, "--output", tmp_path / name, *nano)
    assert (code, line.endswith(f": pip install {library}")) == (2, True)


def test_the_script_prints_the_size_the_check_and_the_normalization(tmp_path, checkpoint):
    flags = [*SMALL, "--pretrained_weights", checkpoint, "--to", "backbone", "--output", tmp_path / "a.pth"]
    done = run_script("export.py", *flags)
    assert f"{tmp_path}/a.pth: {(tmp_path / 'a.pth').stat().st_size / 1e6:.1f} MB\n" in done.stdout
    words = r"checked on 3 random images of 48 × 48 pixels: torch \S+ gives the features to (\S+) of the largest"
    assert 0 <= float(re.search(words, done.stdout)[1]) < 1e-5
    assert "less the mean (0.485, 0.456, 0.406), over the std (0.229, 0.224, 0.225)" in done.stdout
    assert not done.stderr
