"""Exports: each kind opened by the software it is for, against the network in torch; nothing wrong is put in place."""

import json
import math
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
import dino_cli
import dino_crops
import dino_data
import export
import hubconf
import utils
import vision_transformer as vits

SMALL = ["--arch", "vit_nano", "--patch_size", "16"]


def arguments(*flags):
    return arguments_of(export, *SMALL, *flags)


def run(*flags):
    export.main(arguments(*flags))


def end(monkeypatch, capsys, *flags):
    return ending(monkeypatch, capsys, export, *SMALL, *flags)


def network(name="teacher", side=48, patch_size=16):
    """A vit_nano for crops of 48 pixels in which attention, positions and biases matter."""
    model = fill(vits.vit_nano(patch_size=patch_size, img_size=[side]), name).eval().requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv.weight.mul_(3)
    model.pos_embed.mul_(20)
    return model


def features(model, images):
    with torch.no_grad():
        return model(images)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A training checkpoint as --pretrained_weights: student, teacher, their heads."""
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
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def said_usage(capsys):
    """What the run printed behind "to use it:"."""
    return re.search(r"^to use it: (.*)$", capsys.readouterr().out, re.M)[1]


# ---- flags ----


def test_flags_are_those_of_an_evaluation_and_three_more():
    args = vars(arguments("--to", "onnx", "--output", "a.onnx"))
    assert set(args) == set(vars(dino_cli.model_flags().parse_args([]))) | {"to", "output", "image_size"}
    assert (args["checkpoint_key"], args["device"], args["image_size"]) == ("teacher", "cpu", None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "a.pth"], "--to"),
        (["--to", "onnx"], "--output"),
        (["--to", "caffe", "--output", "a.pth"], "caffe"),
        (["--to", "onnx", "--output", "a.pth"], r"a\.pth must end in \.onnx"),
        (["--to", "backbone", "--output", "a.pt"], r"must end in \.pth or \.safetensors"),
        (["--to", "timm", "--output", "a"], r"must end in \.pth or \.safetensors"),
        (["--to", "hf", "--output", "a.safetensors"], r"a\.safetensors names a file.*folder"),
        (["--to", "hf", "--output", "a", "--arch", "resnet18"], "resnet18.*backbone or onnx"),
        (["--to", "onnx", "--output", "a.onnx", "--image_size", "50"], "50 must be a multiple.*--patch_size 16"),
        (["--to", "onnx", "--output", "a.onnx", "--image_size", "48", "8"], "48 8 must be a multiple.*--patch_size 16"),
        (["--to", "onnx", "--output", "a.onnx", "--image_size", "0"], "--image_size 0 must be at least 1"),
        (["--to", "onnx", "--output", "a.onnx", "--image_size", "1", "2", "3"], "1 2 3: give height and width"),
        (["--to", "backbone", "--output", "a.pth", "--image_size", "48"], "any size. Leave the flag out"),
        (["--to", "backbone", "--output", "a.pth", "--patch_size", "0"], "--patch_size 0 must be at least 1"),
        (["--to", "backbone", "--output", "a.pth", "--arch", "vit_smal"], "unknown --arch vit_smal.*vit_small"),
    ],
)
def test_contradictions_are_named_in_one_line(monkeypatch, capsys, flags, words):
    code, line = end(monkeypatch, capsys, *flags)
    assert code == 2
    assert re.search(words, line), line
    assert len(line.splitlines()) == 1


# ---- plain weights ----


@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
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
    vits.__dict__["vit_nano"](patch_size=16, num_classes=0, img_size=[48]).load_state_dict(state, strict=True)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_plain_weights_share_no_memory_even_where_the_network_does():
    model = nn.Module()
    model.a = model.b = nn.Parameter(torch.ones(2, 3))
    model.part = nn.Parameter(torch.ones(50, 4).T[:2])
    state = export.plain_state(model)
    assert len({tensor.data_ptr() for tensor in state.values()}) == 3
    for tensor_ in state.values():
        assert tensor_.is_contiguous()
        assert not tensor_.requires_grad
        assert tensor_.untyped_storage().nbytes() == tensor_.nbytes


def test_the_published_network_is_exported_without_a_checkpoint_and_the_hub_loads_it_strictly(tmp_path, monkeypatch):
    published = vits.vit_small(patch_size=16)
    asked = []
    monkeypatch.setattr(hubconf, "_download", lambda url: asked.append(url) or published.state_dict())
    run("--arch", "vit_small", "--to", "backbone", "--output", tmp_path / "out.pth")
    assert asked == [hubconf.BASE_URL + hubconf.PUBLISHED["dino_vits16"]["backbone"]]
    monkeypatch.setattr(hubconf, "_download", lambda url: torch.load(tmp_path / "out.pth", weights_only=True))
    loaded = hubconf.dino_vits16().eval()
    assert torch.equal(features(loaded, torch.ones(1, 3, 32, 32)), features(published.eval(), torch.ones(1, 3, 32, 32)))


def test_a_network_that_nobody_published_is_not_exported_untrained(tmp_path, monkeypatch, capsys):
    code, line = end(monkeypatch, capsys, "--to", "backbone", "--output", tmp_path / "a.pth")
    assert code == 2
    assert "vit_nano. Give a checkpoint as --pretrained_weights" in line
    assert not list(tmp_path.iterdir())


def test_the_printed_line_opens_plain_weights(tmp_path, nano, capsys, monkeypatch):
    run("--to", "backbone", "--output", tmp_path / "out.pth", *nano)
    monkeypatch.chdir(tmp_path)
    names = {"utils": utils, "torch": torch}
    exec(said_usage(capsys), names)
    assert all(torch.equal(value, network().state_dict()[key]) for key, value in names["model"].state_dict().items())


# ---- ONNX ----


def open_onnx(path):
    return pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def wide(tmp_path_factory, checkpoint):
    """The file of an export for images of 32 × 80 pixels."""
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("onnx") / "wide.onnx"
    run("--to", "onnx", "--image_size", 32, 80, "--output", path, "--pretrained_weights", checkpoint)
    return path


@pytest.mark.xdist_group("onnx")
@pytest.mark.parametrize("number", [1, 2, 5])
def test_onnxruntime_gives_the_features_of_any_number_of_oblong_images(wide, number):
    images = tensor("onnx", (number, 3, 32, 80))
    (got,) = open_onnx(wide).run(["features"], {"images": images.numpy()})
    assert_near(got, features(network(), images), 1e-5)


@pytest.mark.xdist_group("onnx")
def test_onnx_file_stands_alone_and_says_what_its_images_are(wide):
    assert [file.name for file in wide.parent.iterdir()] == ["wide.onnx"]
    session = open_onnx(wide)
    ((image,), (feature,)) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape[1:], image.type) == ("images", [3, 32, 80], "tensor(float)")
    assert isinstance(image.shape[0], str)
    assert (feature.name, feature.type) == ("features", "tensor(float)")
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(said["std"]) == [0.229, 0.224, 0.225]
    assert json.loads(said["image_size"]) == [32, 80]
    assert said["arch"] == "vit_nano"


def test_older_torch_with_its_traced_exporter_writes_a_file_as_good(tmp_path, nano, monkeypatch):
    """Before 2.9 tracing was the default; it can't express the interpolation, which is why positions are constants."""
    pytest.importorskip("onnx")
    current = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: current(*args, **options, dynamo=False))
    run("--to", "onnx", "--image_size", 80, 32, "--output", tmp_path / "old.onnx", *nano)
    images = tensor("onnx", (4, 3, 80, 32))
    (got,) = open_onnx(tmp_path / "old.onnx").run(["features"], {"images": images.numpy()})
    assert_near(got, features(network(), images), 1e-5)


def test_a_convnet_becomes_onnx_at_224_pixels(tmp_path):
    pytest.importorskip("onnxscript")
    model, _ = dino_backbones.build_backbone("resnet18")
    fill(model, "resnet").eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    run(
        "--arch",
        "resnet18",
        "--to",
        "onnx",
        "--output",
        tmp_path / "a.onnx",
        "--pretrained_weights",
        tmp_path / "resnet.pth",
    )
    images = tensor("onnx", (2, 3, 224, 224))
    (got,) = open_onnx(tmp_path / "a.onnx").run(None, {"images": images.numpy()})
    assert_near(got, features(model, images), 1e-5)


def test_more_than_one_onnx_file_can_hold_is_refused_at_once(tmp_path):
    pytest.importorskip("onnxruntime")
    giant = nn.Linear(2**15, 2**14, device="meta")
    with pytest.raises(utils.UserError, match="2 GB"):
        export.export_onnx(giant, tmp_path / "a.onnx", (32, 32), arguments("--to", "onnx", "--output", "a.onnx"))


# ---- timm ----


@pytest.mark.parametrize(
    ("arch", "patch_size", "name"),
    [
        ("vit_small", 16, "vit_small_patch16_224.dino"),
        ("deit_small", 8, "vit_small_patch8_224.dino"),
        ("vit_base", 16, "vit_base_patch16_224.dino"),
        ("vit_base", 8, "vit_base_patch8_224.dino"),
        ("vit_base", 32, "vit_base_patch32_224"),
        ("vit_tiny", 16, "vit_tiny_patch16_224"),
        ("vit_tiny", 8, "vit_tiny_patch16_224"),
        ("vit_nano", 14, "vit_tiny_patch16_224"),
    ],
)
def test_timm_has_a_network_for_each_vit(arch, patch_size, name):
    timm = pytest.importorskip("timm")
    args = arguments("--arch", arch, "--patch_size", patch_size, "--to", "timm", "--output", "a.pth")
    with torch.device("meta"):
        model, _ = dino_backbones.build_backbone(arch, patch_size)
        got, keywords = export.timm_network(model, (224, 224), args)
        theirs = timm.create_model(got, **keywords)
    assert got == name
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, theirs)]
    assert shapes[0] == shapes[1]
    assert theirs.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads


@pytest.mark.parametrize("size", [(48, 48), (32, 80), (224, 224)])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_the_printed_line_makes_timm_give_the_same_features(tmp_path, nano, capsys, monkeypatch, offline, size, ending):
    timm = pytest.importorskip("timm")
    sizes = ["--image_size", *size] if size != (48, 48) else []  # of the positions
    run("--to", "timm", "--output", tmp_path / f"out{ending}", *sizes, *nano)
    monkeypatch.chdir(tmp_path)
    theirs = eval(said_usage(capsys), {"timm": timm}).eval()
    images = tensor("timm", (2, 3, *size))
    assert_near(features(theirs, images), features(network(), images), 1e-5)


def test_timms_own_converter_takes_plain_weights_and_interpolates_to_another_grid(tmp_path, nano):
    timm = pytest.importorskip("timm")
    run("--to", "backbone", "--output", tmp_path / "out.pth", *nano)
    shape = {"embed_dim": 128, "depth": 4, "num_heads": 4, "num_classes": 0}
    convert = timm.models.vision_transformer.checkpoint_filter_fn
    same, larger = (timm.create_model("vit_tiny_patch16_224", img_size=side, **shape).eval() for side in (48, 96))
    timm.models.load_checkpoint(same, str(tmp_path / "out.pth"), filter_fn=convert)
    images = tensor("timm", (2, 3, 48, 48))
    assert_near(features(same, images), features(network(), images), 1e-5)
    timm.models.load_checkpoint(larger, str(tmp_path / "out.pth"), filter_fn=convert)
    assert torch.equal(larger.blocks[3].attn.qkv.weight, network().blocks[3].attn.qkv.weight)
    assert_near(larger.pos_embed[:, 0], network().pos_embed[:, 0], 1e-6)


@pytest.mark.parametrize("arch", ["resnet18", "xcit_nano_12_p16", "timm:resnet10t"])
def test_networks_that_timm_shares_go_there_and_into_plain_files(tmp_path, capsys, monkeypatch, arch):
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
    monkeypatch.chdir(tmp_path)
    theirs = eval(said_usage(capsys), {"timm": timm}).eval()
    images = tensor("timm", (1, 3, 224, 224))
    assert_near(features(theirs, images), features(model, images), 1e-5)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("squeezenet1_1", "no network by the name of --arch squeezenet1_1"),
        ("efficientnet_b0", "timm's efficientnet_b0 does"),
    ],
)
def test_a_network_that_timm_has_not_is_named(tmp_path, monkeypatch, capsys, arch, words):
    pytest.importorskip("timm")
    flags = ["--arch", arch, "--pretrained_weights", "random"]
    code, line = end(monkeypatch, capsys, "--to", "timm", "--output", tmp_path / "a.pth", *flags)
    assert code == 2
    assert words in line
    assert not list(tmp_path.iterdir())


# ---- Hugging Face ----


@pytest.fixture
def transformers(offline, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path, nano, transformers):
    run("--to", "hf", "--output", tmp_path / "vit.nano", *nano)
    return tmp_path / "vit.nano"


def test_transformers_gives_the_same_tokens_from_the_folder(folder, transformers):
    theirs = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)
    images = tensor("hf", (2, 3, 48, 48))
    got = features(theirs, images).last_hidden_state
    (want,) = network().get_intermediate_layers(images)
    assert_near(got, want, 1e-5)


def test_the_folders_config_describes_the_network(folder, transformers):
    config = transformers.AutoConfig.from_pretrained(folder)
    got = [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size]
    assert got == [128, 4, 4, 512]
    assert (config.image_size, config.patch_size, config.layer_norm_eps) == (48, 16, 1e-6)
    assert (config.hidden_act, config.qkv_bias, config.architectures) == ("gelu", True, ["ViTModel"])


def test_the_folders_tensors_have_the_names_of_those_on_the_hub(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        assert file.metadata() == {"format": "pt"}  # without which transformers 4 refuses the file
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
    photograph = Image.open(dino_data.find_photographs()[0]).convert("RGB").resize((100, 70))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    got = torch.as_tensor(np.asarray(processor(photograph, return_tensors="np")["pixel_values"]))
    want = utils.normalize(dino_crops.eval_transform(48)(photograph)[None])
    assert_near(got, want, 0.02)


def test_transformers_takes_oblong_images(tmp_path, nano, transformers):
    run("--to", "hf", "--image_size", 32, 80, "--output", tmp_path / "wide", *nano)
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "wide", add_pooling_layer=False)
    images = tensor("hf", (2, 3, 32, 80))
    assert_near(features(theirs, images).last_hidden_state[:, 0], features(network(), images), 1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "wide")
    white = processor(Image.new("RGB", (200, 200), "white"), return_tensors="np")["pixel_values"]
    want = (1 - torch.tensor(utils.IMAGENET_MEAN)) / torch.tensor(utils.IMAGENET_STD)
    assert_near(np.asarray(white), want[None, :, None, None].expand(1, 3, 32, 80), 1e-3)  # no black border


def test_tensors_that_transformers_would_only_warn_of_are_an_error(tmp_path, nano, transformers, monkeypatch, capsys):
    renamed = export.hf_state
    monkeypatch.setattr(export, "hf_state", lambda state: {**renamed(state), "odd.weight": torch.ones(1)})
    code, line = end(monkeypatch, capsys, "--to", "hf", "--output", tmp_path / "out", *nano)
    assert code == 4
    assert "odd.weight" in line
    assert not list(tmp_path.iterdir())


# ---- positions ----


def test_positions_of_the_native_size_stay_and_the_network_is_left_alone():
    model = network()
    before = model.pos_embed.clone()
    fixed = export.with_fixed_size(model, (48, 48))
    assert torch.equal(fixed.pos_embed, before)
    fixed.pos_embed.zero_()
    assert torch.equal(model.pos_embed, before)
    images = tensor("positions", (1, 3, 32, 32))
    assert torch.equal(features(model, images), features(network(), images))


def test_fixed_positions_have_a_row_for_each_patch_row_by_row():
    """Positions that grow along the columns: bicubic interpolation keeps the order, row after row."""
    model = network()
    model.pos_embed[:, 1:] = torch.arange(3.0).repeat(3)[None, :, None]
    positions = export.with_fixed_size(model, (32, 80)).pos_embed
    assert positions.shape == (1, 11, 128)
    assert torch.equal(positions[:, 0], model.pos_embed[:, 0])
    rows = positions[0, 1:, 0].view(2, 5)
    assert (rows.diff(dim=1) > 0).all()
    assert torch.allclose(rows[0], rows[1], atol=1e-6)


def test_the_native_size_is_that_of_the_positions():
    assert export.native_size(network(side=96, patch_size=8)) == (96, 96)
    assert export.native_size(nn.Linear(1, 1)) == (224, 224)


# ---- the check ----


def test_deviation_is_the_largest_over_the_largest_feature():
    images, want = torch.zeros(3, 3, 2, 2), torch.tensor([[1.0, -8.0], [2.0, 4.0], [0.0, 1.0]])
    wrong = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, -0.25]])
    assert export.largest_deviation(lambda x: (want + wrong)[: len(x)], images, want) == 0.5 / 8
    assert export.largest_deviation(lambda x: (want - wrong)[: len(x)], images, want) == 0.5 / 8
    assert export.largest_deviation(lambda x: want[: len(x)], images, want) == 0


def test_deviation_sees_what_goes_wrong_with_one_image_alone():
    images, want = torch.zeros(3, 3, 2, 2), torch.ones(3, 2)
    assert export.largest_deviation(lambda x: torch.ones(len(x), 2) * (1 + 3 * (len(x) == 1)), images, want) == 3


def test_other_shapes_and_nan_deviate_infinitely():
    images, want = torch.zeros(3, 3, 2, 2), torch.ones(3, 2)
    assert export.largest_deviation(lambda x: torch.ones(len(x), 1), images, want) == math.inf
    assert export.largest_deviation(lambda x: torch.full((len(x), 2), math.nan), images, want) == math.inf


@pytest.mark.parametrize(("deviation", "code"), [(0.99e-4, None), (1.01e-4, 4), (math.inf, 4), (math.nan, 4)])
def test_up_to_a_ten_thousandth_is_rounding(tmp_path, nano, monkeypatch, capsys, deviation, code):
    monkeypatch.setattr(export, "largest_deviation", lambda *_: deviation)
    flags = ["--to", "backbone", "--output", tmp_path / "a.pth", *nano]
    if code is None:
        run(*flags)
    else:
        assert end(monkeypatch, capsys, *flags)[0] == code
    assert (tmp_path / "a.pth").exists() == (code is None)


@pytest.mark.parametrize(("kind", "name"), [("backbone", "a.pth"), ("timm", "a.safetensors"), ("hf", "a")])
def test_an_export_with_a_wrong_tensor_is_not_put_in_place(tmp_path, nano, monkeypatch, capsys, kind, name):
    plain = export.plain_state

    def slightly_wrong(model):
        state = plain(model)
        state["blocks.1.mlp.fc1.bias"][7] += 0.5
        return state

    monkeypatch.setattr(export, "plain_state", slightly_wrong)
    if kind != "hf":
        (tmp_path / name).write_text("what was there")
    code, line = end(monkeypatch, capsys, "--to", kind, "--output", tmp_path / name, *nano)
    assert code == 4
    assert re.search(
        r"the features of (torch|timm|transformers) \S+ differ.*more than 1e-04: nothing was written", line
    )
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there"] * (kind != "hf")


def test_wrong_positions_in_the_graph_are_noticed(tmp_path, nano, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    fixed = export.with_fixed_size

    def shifted(model, size):
        model = fixed(model, size)
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:].roll(1, dims=1)
        return model

    monkeypatch.setattr(export, "with_fixed_size", shifted)
    code, line = end(monkeypatch, capsys, "--to", "onnx", "--output", tmp_path / "a.onnx", *nano)
    assert code == 4
    assert "onnxruntime" in line
    assert not list(tmp_path.iterdir())


def test_the_images_compared_are_normal_numbers_and_the_same_each_time():
    model, args = network(), arguments("--to", "backbone", "--output", "a.pth")
    (images, got), (again, _) = (export.reference(model, (48, 64), args) for _ in range(2))
    assert images.shape == (3, 3, 48, 64)
    assert torch.equal(images, again)
    assert abs(images.std() - 1) < 0.05
    assert torch.equal(got, features(model, images))


def test_a_diverged_network_is_not_exported(tmp_path, monkeypatch, capsys):
    model = network()
    model.norm.bias[3] = math.nan
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    flags = ["--to", "backbone", "--output", tmp_path / "a.pth", "--pretrained_weights", tmp_path / "nan.pth"]
    code, line = end(monkeypatch, capsys, *flags)
    assert (code, "NaN" in line) == (2, True)
    assert not (tmp_path / "a.pth").exists()


def test_a_size_that_a_network_does_not_take_is_named(monkeypatch, capsys, tmp_path):
    flags = ["--arch", "alexnet", "--image_size", "224", "16", "--pretrained_weights", "random"]
    pytest.importorskip("onnxscript")
    code, line = end(monkeypatch, capsys, "--to", "onnx", "--output", tmp_path / "a.onnx", *flags)
    assert code == 2
    assert "alexnet does not take images of 224 × 16 pixels" in line


# ---- files ----


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (OSError(28, "No space left on device"), 2, "can't write --output .*: No space left on device. Nothing"),
        (TypeError("no\nsuch operator"), 4, "--to backbone failed for --arch vit_nano.*TypeError: no such operator"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failure_leaves_what_was_there(tmp_path, nano, monkeypatch, capsys, raised, code, words):
    (tmp_path / "a.pth").write_text("what was there")

    def fail(model, path, *_):
        path.write_text("half of it")
        raise raised

    monkeypatch.setitem(export.EXPORTS, "backbone", fail)
    got, line = end(monkeypatch, capsys, "--to", "backbone", "--output", tmp_path / "a.pth", *nano)
    assert got == code
    assert re.search(words, line), line
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there"]


KINDS = {"backbone": "a.pth", "timm": "a.safetensors", "onnx": "a.onnx", "hf": "a"}  # and what each writes


@pytest.fixture(params=KINDS)
def kind(request):
    """A kind of export whose libraries are here."""
    for library in export.LIBRARIES.get(request.param, ()):
        pytest.importorskip(library)
    return request.param


def test_behind_a_link_of_the_same_name_is_written(tmp_path, nano, kind):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / KINDS[kind], tmp_path / "disk" / KINDS[kind]
    target.mkdir() if kind == "hf" else target.write_text("old")
    link.symlink_to(target)
    run("--to", kind, "--output", link, *nano)
    assert link.is_symlink()
    written = target / "model.safetensors" if kind == "hf" else target
    assert written.stat().st_size > 100_000
    assert [path.name for path in (tmp_path / "disk").iterdir()] == [KINDS[kind]]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_something_of_another_name_is_refused_and_nothing_written(
    tmp_path, nano, monkeypatch, capsys, kind, there
):
    precious = tmp_path / "precious"
    if there:
        precious.mkdir() if kind == "hf" else precious.write_text("mine")
    (tmp_path / KINDS[kind]).symlink_to(precious)
    code, line = end(monkeypatch, capsys, "--to", kind, "--output", tmp_path / KINDS[kind], *nano)
    assert code == 2
    assert f"{KINDS[kind]} is a link to {precious}, a path of another name" in line
    assert (tmp_path / KINDS[kind]).is_symlink()
    assert precious.exists() == there
    assert not there or (list(precious.iterdir()) == [] if kind == "hf" else precious.read_text() == "mine")


def test_a_link_to_itself_is_replaced(tmp_path, nano):
    (tmp_path / "a.pth").symlink_to("a.pth")
    run("--to", "backbone", "--output", tmp_path / "a.pth", *nano)
    assert "cls_token" in torch.load(tmp_path / "a.pth", weights_only=True)


def test_an_empty_folder_is_filled_and_open_to_those_who_may_read_its_parent(tmp_path, nano, transformers):
    (tmp_path / "here").mkdir()
    run("--to", "hf", "--output", tmp_path / "here", *nano)
    names = {file.name for file in (tmp_path / "here").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "here").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("kind", ["file", "full folder"])
def test_a_folder_is_not_written_over_anything(tmp_path, nano, monkeypatch, capsys, kind):
    pytest.importorskip("transformers")
    if kind == "file":
        (tmp_path / "out").write_text("mine")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
    code, line = end(monkeypatch, capsys, "--to", "hf", "--output", tmp_path / "out", *nano)
    assert code == 2
    assert "out is there already. Name a new folder" in line
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["mine"]


def test_a_file_is_not_written_over_a_folder_nor_over_its_own_checkpoint(
    tmp_path, nano, checkpoint, monkeypatch, capsys
):
    (tmp_path / "a.pth").mkdir()
    code, line = end(monkeypatch, capsys, "--to", "backbone", "--output", tmp_path / "a.pth", *nano)
    assert (code, "a.pth is a folder" in line) == (2, True)
    before = checkpoint.read_bytes()
    code, line = end(monkeypatch, capsys, "--to", "backbone", "--output", checkpoint, *nano)
    assert (code, "would replace --pretrained_weights" in line) == (2, True)
    assert checkpoint.read_bytes() == before


def test_an_output_that_cannot_be_written_is_named_before_the_weights_are_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    flags = ["--output", tmp_path / "file" / "a.pth", "--pretrained_weights", "missing.pth"]
    code, line = end(monkeypatch, capsys, "--to", "backbone", *flags)
    assert code == 2
    assert "can't write to the folder of --output" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pretrained_weights", "missing.pth"], "there is no file missing.pth"),
        (["--arch", "vit_tiny"], "vit_tiny"),
        (["--patch_size", "8"], "--patch_size"),
        (["--checkpoint_key", "ema"], "student, teacher"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, nano, monkeypatch, capsys, flags, words):
    code, line = end(monkeypatch, capsys, "--to", "backbone", "--output", tmp_path / "a.pth", *nano, *flags)
    assert code == 2
    assert words in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "name", "library"),
    [
        ("backbone", "a.safetensors", "safetensors"),
        ("timm", "a.pth", "timm"),
        ("onnx", "a.onnx", "onnxruntime"),
        ("onnx", "a.onnx", "onnxscript"),
        ("hf", "a", "transformers"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    tmp_path, nano, monkeypatch, capsys, kind, name, library
):
    for other in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "hf": ("safetensors",)}.get(kind, ()):
        pytest.importorskip(other)
    monkeypatch.setitem(sys.modules, library, None)
    code, line = end(monkeypatch, capsys, "--to", kind, "--output", tmp_path / name, *nano)
    assert code == 2
    assert line.endswith(f"--to {kind} needs what is not installed: pip install {library}")


def test_plain_weights_need_no_library_of_others(tmp_path, nano, monkeypatch):
    for library in ("safetensors", "timm", "onnx", "onnxruntime", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)
    run("--to", "backbone", "--output", tmp_path / "a.pth", *nano)
    assert (tmp_path / "a.pth").exists()


def test_the_script_runs_as_a_process_and_says_what_it_checked(tmp_path, checkpoint):
    flags = [*SMALL, "--pretrained_weights", checkpoint, "--to", "backbone"]
    done = run_script("export.py", *flags, "--output", tmp_path / "a.pth")
    assert f"{tmp_path}/a.pth: {(tmp_path / 'a.pth').stat().st_size / 1e6:.1f} MB\n" in done.stdout
    words = r"checked on 3 random images of 48 × 48 pixels: torch \S+ gives the features to (\S+) of the largest"
    assert 0 <= float(re.search(words, done.stdout)[1]) < 1e-5
    assert "less the mean (0.485, 0.456, 0.406), over the std (0.229, 0.224, 0.225)" in done.stdout
    assert not done.stderr
    refused = run_script("export.py", *flags, "--output", tmp_path / "a.onnx", check=False)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
