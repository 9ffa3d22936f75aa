"""dino_layouts.py: weights as other software writes them are read, or refused with what differs."""

import json

import pytest
import torch
from conftest import SMALL_RUN, arguments_of, same_state, tensor, tiny_vit
from PIL import Image

import dino_backbones
import dino_checkpoints
import dino_layouts
import export
import main_dino
import utils
import vision_transformer as vits
from utils import UserError


@pytest.fixture
def save(tmp_path):
    def write(state):
        torch.save(state, tmp_path / "w.pth")
        return tmp_path / "w.pth"

    return write


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def assert_read(path, source, key="teacher"):
    target = tiny_vit(1)
    number = len(target.state_dict())
    assert dino_backbones.load_weights(target, path, key, "vit_tiny") == (number, number)
    assert same_state(target, source)


# ---- prefixes ----


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "model.", "teacher.", "model.student_backbone.vit."],
)
def test_a_prefix_in_front_of_a_whole_network_is_removed(save, prefix):
    source = tiny_vit(0)
    assert_read(save(prefixed(source.state_dict(), prefix)), source)


def test_wrappers_of_single_blocks_are_removed(save):
    source = tiny_vit(0)
    wrapped = {key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): v for key, v in source.state_dict().items()}
    assert list(wrapped) != list(source.state_dict())
    assert_read(save(wrapped), source)


def test_a_lightning_checkpoint_has_the_network_that_the_key_names(save, capsys):
    student, teacher = tiny_vit(2), tiny_vit(3)
    parts = {"student_backbone.": student.state_dict(), "teacher_backbone.": teacher.state_dict()}
    parts["student_head."] = {"layers.0.weight": torch.ones(2, 2)}
    state = {key: value for prefix, part in parts.items() for key, value in prefixed(part, prefix).items()}
    path = save({"state_dict": state, "epoch": 3, "optimizer_states": []})
    assert_read(path, teacher)
    assert "[state_dict]" in capsys.readouterr().out
    assert_read(path, student, "student")
    torch.save(state, path)
    assert_read(path, student, "student")
    with pytest.raises(UserError, match=r"several such networks: one, two\. Save the one.* --checkpoint_key"):
        assert_read(save(prefixed(student.state_dict(), "one.") | prefixed(student.state_dict(), "two.")), student)


def test_a_convnet_is_found_behind_a_prefix(save):
    source, target = (dino_backbones.build_backbone("resnet18", img_size=32)[0] for _ in range(2))
    state = prefixed(source.state_dict(), "encoder.") | {"encoder.fc.weight": torch.ones(2, 2), "queue": torch.ones(3)}
    dino_backbones.load_weights(target, save(state))
    assert same_state(target, source)


# ---- Hugging Face and mmpretrain ----


def mmpretrain_names(state):
    """Ours renamed as in mmpretrain's published files, step by step."""
    changes = [
        ("blocks.", "layers."),
        ("norm1.", "ln1."),
        ("norm2.", "ln2."),
        ("patch_embed.proj.", "patch_embed.projection."),
    ]
    changes += [("mlp.fc1.", "ffn.layers.0.0."), ("mlp.fc2.", "ffn.layers.1.")]
    renamed = {}
    for key, value in state.items():
        for ours, theirs in changes:
            key = key.replace(ours, theirs)
        renamed["backbone." + ("ln1." + key.removeprefix("norm.") if key.startswith("norm.") else key)] = value
    return renamed


def test_the_vit_of_mmpretrain_is_read(save):
    source = tiny_vit(0)
    state = mmpretrain_names(source.state_dict())
    assert {"backbone.layers.0.ffn.layers.0.0.weight", "backbone.ln1.bias", "backbone.cls_token"} <= set(state)
    assert_read(save({"meta": {}, "state_dict": {**state, "head.layers.head.weight": torch.ones(2)}}), source)


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_the_vit_of_transformers_is_read(tmp_path, prefix):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    config = transformers.ViTConfig(**size, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    theirs = (transformers.ViTForImageClassification if prefix else transformers.ViTModel)(config).eval()
    theirs.save_pretrained(tmp_path)
    model, trained = dino_backbones.trained_backbone(str(tmp_path))
    images = tensor("theirs", (2, 3, 32, 32))
    with torch.no_grad():
        want = (theirs.vit if prefix else theirs)(images).last_hidden_state[:, 0]
        torch.testing.assert_close(model(images), want, atol=1e-5, rtol=1e-5)
    assert (trained["arch"], trained["patch_size"], trained["image_size"]) == ("vit_nano", 8, 32)


def test_a_vit_with_another_stem_can_not_start_from_their_weights(exported):
    model, _ = dino_backbones.build_backbone("vit_nano_conv", 16, 32)
    with pytest.raises(UserError, match=r"tensors of vit_nano_conv is in .*Check --arch"):
        dino_backbones.load_weights(model, str(exported[1] / "square" / "model.safetensors"), arch="vit_nano_conv")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(a network, the folder that `export.py --to hf` wrote of it, with mean and std of its own)."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(4)
    model = vits.vit_nano(patch_size=16, img_size=[32]).eval()
    args = {"arch": "vit_nano", "patch_size": 16, "image_size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    torch.save({"teacher": model.state_dict(), "args": args}, folder / "c.pth")
    flags = ["--to", "hf", "--pretrained_weights", folder / "c.pth", "--output"]
    export.main(arguments_of(export, *flags, folder / "square"))
    export.main(arguments_of(export, *flags, folder / "oblong", "--image_size", 16, 64))
    return model, folder


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_what_export_writes_for_transformers_is_read_with_its_settings(exported, name):
    model, folder = exported
    read, transform = utils.load_run(str(folder / "square" / name))
    assert same_state(read, model)
    gray = transform(Image.new("RGB", (40, 40), (128, 128, 128)))[:, 0, 0]
    want = (128 / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(gray, want)


def test_training_starts_from_what_transformers_reads(exported, tmp_path):
    model, folder = exported
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    torch.save(dino_layouts.hf_state(model.state_dict()), tmp_path / "pytorch_model.bin")
    for weights in (folder / "square", tmp_path):
        args = arguments_of(main_dino, *SMALL_RUN, "--init_from", weights, "--data_path", ".")
        student, _ = main_dino.build_student_and_teacher(args, torch.device("cpu"), None)
        assert same_state(student.backbone, model)


def test_positions_on_an_oblong_grid_are_not_read_as_a_square(exported):
    _, folder = exported
    size = vits.vit_nano(patch_size=16, img_size=[32]).pos_embed.shape  # 2 x 2 patches: the same number as 1 x 4
    assert (
        dino_checkpoints.load_checkpoint(folder / "oblong" / "model.safetensors")[
            "embeddings.position_embeddings"
        ].shape
        == size
    )
    for read in (utils.load_run, lambda path: dino_backbones.initial_weights(path, "vit_nano", 16)):
        with pytest.raises(UserError, match=r"is for images of 16 x 64 pixels\. Only squares can be read"):
            read(str(folder / "oblong"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_attention_heads": 8}, "has 8 attention heads, vit_nano has 4"),
        ({"hidden_act": "quick_gelu"}, "has the activation quick_gelu"),
    ],
)
def test_a_vit_that_computes_something_else_is_refused(exported, tmp_path, change, says):
    config = json.loads((exported[1] / "square" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").write_bytes((exported[1] / "square" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=says):
        utils.load_run(str(tmp_path))


# ---- layers that a network does not have ----


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (("blocks.0.ls1.gamma", "blocks.0.ls2.gamma"), "(LayerScale) .*blocks.0.ls1.gamma, blocks.0.ls2.gamma"),
        (("blocks.0.gamma_1",), "(LayerScale)"),
        (("register_tokens",), "(register tokens)"),
        (("reg_token",), "(register tokens)"),
        (("blocks.0.mlp.w12.weight",), "(SwiGLU)"),
        (("blocks.0.attn.q_norm.weight",), " that vit_tiny .*blocks.0.attn.q_norm.weight"),
        (("dist_token", "head_dist.weight"), " that vit_tiny .*: dist_token. "),
    ],
)
def test_layers_that_would_change_the_features_are_refused_with_a_way_out(save, extra, what):
    state = tiny_vit(0).state_dict() | {name: torch.ones(16) for name in extra}
    target = tiny_vit(1)
    pattern = "w.pth has layers ?" + what.replace("(", r"\(").replace(")", r"\)") + ".*--arch timm:<name>"
    with pytest.raises(UserError, match=pattern):
        dino_backbones.load_weights(target, save(state), arch="vit_tiny")
    assert same_state(target, tiny_vit(1))


def test_foreign_layers_are_named_even_where_no_tensor_has_our_name(save):
    state = {"embeddings.cls_token": torch.ones(1), "encoder.layer.0.layer_scale1.lambda1": torch.ones(16)}
    with pytest.raises(
        UserError, match=r"layers \(LayerScale\) that vit_tiny .*: encoder\.layer\.0\.layer_scale1\.lambda1\. "
    ):
        dino_backbones.load_weights(tiny_vit(), save(state), arch="vit_tiny")


def test_a_deeper_network_of_the_same_width_is_refused(save):
    with pytest.raises(UserError, match=r"has layers that vit_tiny does not have.*blocks\.1\..*Check --arch"):
        dino_backbones.load_weights(tiny_vit(1), save(tiny_vit(0, depth=2).state_dict()), arch="vit_tiny")


def test_heads_and_what_only_training_uses_are_left_out(save):
    source = tiny_vit(0)
    names = [
        "head.weight",
        "head_dist.bias",
        "classifier.1.weight",
        "mask_token",
        "masked_embed",
        "decoder_pos_embed",
        "pooler.dense.bias",
        "fc.weight",
    ]
    names += ["bn.num_batches_tracked", "decoder.0.weight", "projection_head.mlp.0.weight", "aux_head.weight"]
    assert_read(save(source.state_dict() | {name: torch.ones(2) for name in names}), source)


def test_a_training_run_does_not_start_from_other_layers(save):
    nano = vits.vit_nano(patch_size=16, img_size=[32]).state_dict()
    args = arguments_of(main_dino, *SMALL_RUN, "--init_from", save({**nano, "register_tokens": torch.ones(1, 4, 128)}))
    with pytest.raises(UserError, match=r"\(register tokens\)"):
        main_dino.build_student_and_teacher(args, torch.device("cpu"), None)
