"""dino_backbones.py: networks by name, and weights into them."""

import argparse
import math
import sys

import pytest
import torch
import torch.nn as nn
from conftest import arguments_of, same_state, tensor, tiny_vit

import dino_backbones
import dino_health
import dino_layouts
import hubconf
import main_dino
import utils
from utils import UserError
from vision_transformer import DINOHead

# ---- backbones ----


@pytest.mark.parametrize(("arch", "width"), [("mobilenet_v3_small", 1024), ("densenet121", 1024)])
def test_convnets_are_built_without_their_classifier(arch, width):
    model, features = dino_backbones.build_backbone(arch)
    assert features == width
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, width)
    assert not dino_backbones.is_vit(model)


@pytest.mark.parametrize(("arch", "width"), [("resnet18_cifar", 512), ("resnet50_cifar", 2048)])
def test_resnets_for_small_images_keep_detail_and_torchvisions_keys(arch, width):
    model, features = dino_backbones.build_backbone(arch, img_size=32)
    maps = {}
    model.layer1.register_forward_hook(lambda module, images, out: maps.update(first=out.shape))
    model.layer4.register_forward_hook(lambda module, images, out: maps.update(last=out.shape))
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, features)
    assert (maps["first"], maps["last"]) == ((2, width // 8, 32, 32), (2, width, 4, 4))
    plain = dino_backbones.build_backbone(arch.removesuffix("_cifar"), img_size=32)[0].state_dict()
    assert model.state_dict().keys() == plain.keys()
    changed = [key for key, tensor in model.state_dict().items() if tensor.shape != plain[key].shape]
    assert changed == ["conv1.weight"]
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    # He et al.: the variance is 2 / fan-out.
    assert model.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)


def test_the_resnet_for_cpus_has_eight_layers_and_torchvisions_keys():
    model, width = dino_backbones.build_backbone("resnet8", img_size=32)
    weights = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    assert (len(weights) + 1, width) == (8, 192)  # with a classifier
    assert sum(p.numel() for p in model.parameters()) == 689_904
    assert model.state_dict().keys() < dino_backbones.build_backbone("resnet18")[0].state_dict().keys()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model.layer1(model.maxpool(model.conv1(images))).shape == (2, 48, 16, 16)  # stride 2, no pooling
        assert model.eval()(images).shape == (2, 192)
    for conv in (model.conv1, model.layer3[0].conv1):  # He et al.
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (len(conv.weight) * 9)), rel=0.1)


def test_a_convolutional_stem_sees_more_of_the_image_than_its_patch():
    model, width = dino_backbones.build_backbone("vit_nano_conv", patch_size=4, img_size=24)
    plain = dino_backbones.build_backbone("vit_nano", patch_size=4, img_size=24)[0]
    others = [key for key in plain.state_dict() if not key.startswith("patch_embed")]
    assert [key for key in model.state_dict() if not key.startswith("patch_embed")] == others
    images = torch.randn(2, 3, 24, 32, requires_grad=True)
    patches = model.eval().patch_embed(images)
    assert patches.shape == (2, 6 * 8, width)
    assert model(images).shape == (2, width)
    for network, rows, columns in ((model, range(4, 13), range(8, 17)), (plain, range(8, 12), range(12, 16))):
        patch = network.patch_embed(images)[0, 2 * 8 + 3]  # third row, fourth column
        (seen,) = torch.autograd.grad(patch.square().sum(), images)
        seen = seen.abs().sum(dim=1).nonzero()  # [pixels, (image, row, column)]
        assert seen[:, 0].unique().tolist() == [0]
        assert set(seen[:, 1].tolist()) == set(rows)
        assert set(seen[:, 2].tolist()) == set(columns)


def test_a_convolutional_stem_halves_the_image_to_the_size_of_its_patches():
    stem = dino_backbones.ConvStem(patch_size=16, in_chans=1, width=64)
    shapes = [tuple(conv.weight.shape) for conv in stem if isinstance(conv, nn.Conv2d)]
    assert shapes == [(4, 1, 3, 3), (8, 4, 3, 3), (16, 8, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (64, 64, 1, 1)]
    assert stem(torch.randn(2, 1, 64, 32)).shape == (2, 64, 4, 2)
    assert dino_backbones.ConvStem(patch_size=1, in_chans=3, width=8)(torch.zeros(1, 3, 5, 7)).shape == (1, 8, 5, 7)
    wide = dino_backbones.ConvStem(patch_size=4, in_chans=3, width=256)
    for conv in (wide[3], wide[6]):  # He et al.: the variance is 2 / fan-out
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (len(conv.weight) * 9)), rel=0.05)
    for patch_size in (6, 256):
        with pytest.raises(UserError, match=f"--patch_size {patch_size} does not fit a ViT with a stem"):
            dino_backbones.ConvStem(patch_size=patch_size, in_chans=3, width=128)


def test_the_health_checks_know_all_networks_with_patches():
    assert set(dino_health.VITS) == set(dino_backbones.vit_names())


def test_a_convolutional_stem_sees_whole_patches_only():
    model = dino_backbones.build_backbone("vit_nano_conv", patch_size=8, img_size=32)[0].eval()
    images = torch.randn(2, 3, 37, 30)
    with torch.no_grad():
        assert torch.equal(model(images), model(images[:, :, :32, :24]))


@pytest.mark.parametrize(("arch", "other"), [("vit_nano", "vit_nano_conv"), ("vit_nano_conv", "vit_nano")])
def test_weights_of_another_stem_are_an_error(save, arch, other):
    weights = save(dino_backbones.build_backbone(other, 4, 24)[0].state_dict())
    with pytest.raises(UserError, match="_conv has another patch embedding"):
        dino_backbones.load_weights(dino_backbones.build_backbone(arch, 4, 24)[0], weights, arch=arch)


def test_weights_of_a_stem_for_other_patches_are_an_error(save):
    weights = save(dino_backbones.build_backbone("vit_nano_conv", 4, 24)[0].state_dict())
    with pytest.raises(UserError, match=r"lacks .*Check --arch, --patch_size and --checkpoint_key"):
        dino_backbones.load_weights(dino_backbones.build_backbone("vit_nano_conv", 8, 24)[0], weights, arch="x")


@pytest.mark.parametrize(
    ("arch", "width"),
    [
        ("swin_t", 768),  # head
        ("maxvit_t", 512),  # in a Sequential, without a bias
        ("xcit_nano_12_p16", 128),
        ("timm:convnext_atto", 320),  # has its pooling in `head`
        ("timm:mambaout_femto", 1152),  # and more than that
    ],
)
def test_each_kind_of_backbone_returns_features_of_its_width(arch, width):
    model, features = dino_backbones.build_backbone(arch, img_size=224)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        alone = model.eval()(images)
        wrapped = utils.MultiCropWrapper(model, nn.Identity()).eval()([images])
    assert features == width
    assert alone.shape == (2, width)
    assert torch.equal(alone, wrapped)
    assert not torch.allclose(alone[0], alone[1])


@pytest.mark.parametrize("arch", ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"])
def test_transformers_of_timm_take_crops_of_two_sizes(arch):
    model, width = dino_backbones.build_backbone(arch, img_size=64)
    wrapped = utils.MultiCropWrapper(model, nn.Identity()).eval()
    with torch.no_grad():
        assert wrapped([torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 32, 32)]).shape == (2, width)


def test_drop_path_reaches_networks_of_timm_that_have_it():
    rates = [
        module.drop_prob
        for rate in (0.0, 0.3)
        for module in dino_backbones.build_backbone("timm:vit_tiny_patch16_224", drop_path_rate=rate)[0].modules()
        if type(module).__name__ == "DropPath"
    ]
    assert max(rates) == pytest.approx(0.3)
    assert dino_backbones.build_backbone("timm:mixnet_s", img_size=64, drop_path_rate=0.3)[1] == 1536


@pytest.mark.parametrize(
    ("arch", "size", "says"),
    [
        ("vit_smal", 96, "unknown --arch vit_smal; did you mean vit_small"),
        ("qwertz", 96, "vit_small or resnet50"),
        ("vgg11_cifar", 32, "unknown --arch vgg11_cifar"),
        ("vit_tinyconv", 32, "unknown --arch vit_tinyconv; did you mean vit_tiny_conv"),
        ("timm:convit_tiny", 96, "--arch timm:convit_tiny does not take images of 96 pixels"),
        ("timm:sam2_hiera_tiny_", 96, "unknown --arch timm:sam2_hiera_tiny_; did you mean timm:sam2_hiera_tiny"),
        ("vit_b_16", 96, "--arch vit_b_16 does not take images of 96 pixels"),
    ],
)
def test_networks_that_can_not_be_used_are_errors(arch, size, says):
    with pytest.raises(UserError) as raised:
        dino_backbones.build_backbone(arch, img_size=size)
    assert says in str(raised.value)


def test_a_network_without_pooled_features_is_an_error():
    with pytest.raises(UserError, match="--arch some_net does not return one vector per image"):
        dino_backbones.features_width(nn.Conv2d(3, 4, 3), 16, "some_net")


def test_without_timm_its_networks_are_a_user_error_and_the_others_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for arch in ("xcit_small_12_p16", "timm:resnet18"):
        with pytest.raises(UserError, match="pip install timm"):
            dino_backbones.build_backbone(arch)
    assert dino_backbones.build_backbone("vit_nano")[1] == 128


def test_the_width_is_found_without_a_trace_in_the_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert dino_backbones.features_width(model, 8, "some_net") == 4
    assert torch.equal(torch.rand(1), drawn)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_network_without_a_classifier_is_a_user_error():
    with pytest.raises(UserError, match="some_net does not end in a classifier"):
        dino_backbones.take_off_classifier(nn.Sequential(nn.Linear(3, 3)), "some_net")


@pytest.mark.parametrize(("name", "nested"), [("fc", False), ("classifier", True), ("head", False), ("heads", True)])
def test_the_last_linear_is_removed_under_each_of_its_names(name, nested):
    model, last = nn.Module(), nn.Linear(6, 4)
    setattr(model, name, nn.Sequential(nn.Linear(3, 6), last) if nested else last)
    assert dino_backbones.take_off_classifier(model, "some_net") is model
    layer = getattr(model, name)
    assert isinstance(layer[1] if nested else layer, nn.Identity)
    assert not nested or isinstance(layer[0], nn.Linear)


@pytest.mark.parametrize(
    ("kernel", "padding", "step"), [(1, 0, 1), (3, 1, 1), (5, 2, 1), (7, 3, 1), (3, 2, 2), (4, 1, 1)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_weights_that_see_only_padding_are_found(kernel, padding, step, stride):
    """On positive images, these are the ones whose gradient is 0."""
    for size in [(side, 9) for side in range(1, 8)] + [(9, side) for side in range(1, 8)]:
        if kernel == 4 and min(size) == 1:  # smaller than the kernel
            continue
        conv = nn.Conv2d(1, 1, kernel, stride, padding, step).double()
        out = conv(torch.ones(1, 1, *size, dtype=torch.float64))
        out.sum().backward()
        found = dino_backbones.sees_only_padding(conv, torch.ones(1, 1, *size), out)
        assert found == bool((conv.weight.grad == 0).any()), size


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (["--arch", "resnet18", "--local_crops_size", 32], None),
        (["--arch", "resnet18", "--local_crops_size", 64], torch.bfloat16),
        (["--arch", "resnet18", "--local_crops_size", 32, "--local_crops_number", 0], torch.bfloat16),
        (["--arch", "resnet18", "--local_crops_number", 0, "--global_crops_size", 32], None),
        (["--arch", "resnet18", "--local_crops_size", 32, "--amp_dtype", "fp16"], torch.float16),
        (["--arch", "resnet18", "--local_crops_size", 32, "--use_fp16", "false"], None),
        (["--arch", "vit_nano", "--local_crops_size", 16], torch.bfloat16),
        (["--arch", "vit_nano_conv", "--local_crops_size", 32], torch.bfloat16),
        (["--arch", "vit_nano_conv", "--local_crops_size", 16], None),
    ],
)
def test_convolutions_are_trained_in_float32_on_a_cpu_if_their_maps_shrink_to_a_pixel(capsys, flags, dtype):
    args = arguments_of(main_dino, "--amp_dtype", "bf16", "--global_crops_size", 96, *flags)
    assert dino_backbones.training_dtype(args, torch.device("cpu")) is dtype
    said = capsys.readouterr().out
    if dtype or not args.use_fp16:
        assert said == ""
    else:
        size = min(args.global_crops_size, args.local_crops_size)
        assert said.startswith(f"note: --arch {args.arch} is trained in float32: for crops of {size} pixels, ")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "amp_dtype", "fused"),
    [("cpu", None, True), ("cpu", torch.bfloat16, False), ("cuda", torch.bfloat16, True), ("cuda", None, True)],
)
def test_fused_attention_is_on_except_in_half_precision_on_a_cpu(device, amp_dtype, fused):
    model = tiny_vit(depth=2)
    dino_backbones.use_fused_attention(model, torch.device(device), amp_dtype)
    assert [block.attn.fused for block in model.blocks] == [fused, fused]


def test_batch_norms_are_found_wherever_they_are():
    assert utils.has_batchnorms(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3))))
    assert utils.has_batchnorms(DINOHead(4, 3, use_bn=True))
    assert not utils.has_batchnorms(tiny_vit())


# ---- weights ----


def prefixed(state, prefix="module."):
    return {prefix + key: value for key, value in state.items()}


def training_checkpoint(backbone, **more):
    wrapped = utils.MultiCropWrapper(backbone, DINOHead(16, 5, hidden_dim=8, bottleneck_dim=4))
    return {
        "student": prefixed({key: value + 1 for key, value in wrapped.state_dict().items()}),
        "teacher": wrapped.state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "args": {"arch": "vit_tiny"},
        "dino_loss": {"center": torch.zeros(1, 5)},
        **more,
    }


@pytest.fixture
def save(tmp_path):
    """save(state) -> path of a file that holds it."""

    def save(state):
        torch.save(state, tmp_path / "weights.pth")
        return str(tmp_path / "weights.pth")

    return save


def test_an_xcit_trained_with_its_authors_code_is_loaded(save):
    torch.manual_seed(0)
    target, _ = dino_backbones.build_backbone("xcit_nano_12_p16", img_size=32)
    state = {key: torch.randn_like(value) for key, value in target.state_dict().items() if value.is_floating_point()}
    published = {key.replace("pos_embed.", "pos_embeder."): value for key, value in state.items()}
    for block in (0, 1):
        for kind in ("weight", "bias"):
            three = [published.pop(f"cls_attn_blocks.{block}.attn.{part}.{kind}") for part in "qkv"]
            published[f"cls_attn_blocks.{block}.attn.qkv.{kind}"] = torch.cat(three)
    dino_backbones.load_weights(
        target, save({"student": prefixed({f"backbone.{k}": v for k, v in published.items()})}), "student"
    )
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in state.items())


def test_a_backbones_own_head_is_not_the_projection_head(save):
    """ConvNeXt of timm keeps its last norm in a `head`, as the wrapper keeps the projection head."""
    source, target = (dino_backbones.build_backbone("timm:convnext_atto", img_size=64)[0] for _ in range(2))
    wrapped = utils.MultiCropWrapper(source, DINOHead(320, 5, hidden_dim=8, bottleneck_dim=4))
    nn.init.constant_(source.head.norm.weight, 3.0)
    assert "backbone.head.norm.weight" in wrapped.state_dict()
    dino_backbones.load_weights(target, save({"teacher": wrapped.state_dict()}))
    assert same_state(target, source)


# ---- initial weights ----


def test_initial_weights_come_from_the_teacher_or_the_only_network(save):
    checkpoint = training_checkpoint(tiny_vit())
    state, source = dino_backbones.initial_weights(save(checkpoint), "vit_tiny", 16)
    assert source.endswith("[teacher]")
    assert torch.equal(state["head.last_layer.weight_v"], checkpoint["teacher"]["head.last_layer.weight_v"])
    state, source = dino_backbones.initial_weights(
        save({"model": tiny_vit(2).state_dict(), "epoch": 7}), "vit_tiny", 16
    )
    assert source.endswith("[model]")
    assert torch.equal(state["cls_token"], tiny_vit(2).cls_token)
    plain = tiny_vit(3).state_dict()
    assert dino_backbones.initial_weights(save(plain), "vit_tiny", 16)[0].keys() == plain.keys()


@pytest.mark.parametrize(
    ("arch", "patch_size", "name"),
    [
        ("deit_tiny", 16, "vit_tiny_patch16_224"),
        ("xcit_nano_12_p8", 16, "xcit_nano_12_p8_224"),
        ("timm:convnext_atto.d2_in1k", 16, "convnext_atto.d2_in1k"),
        ("resnet18", 16, "resnet18"),
    ],
)
def test_timms_weights_are_asked_for_by_timms_name_and_fit(monkeypatch, arch, patch_size, name):
    import timm

    def create(asked, pretrained, **kwargs):
        assert (asked, pretrained) == (name, True)
        return real(asked, pretrained=False, **kwargs)  # instead of a download

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    state, source = dino_backbones.initial_weights("timm", arch, patch_size)
    monkeypatch.undo()
    assert source == f"{arch if arch.startswith(('timm', 'xcit')) else 'timm:' + name} [pretrained]"
    model, _ = dino_backbones.build_backbone(arch, patch_size)
    matched, number = dino_backbones.load_backbone_state(model, state, source, arch)
    assert matched == number
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_without_a_connection_timms_weights_are_a_user_error(monkeypatch):
    import timm

    def create(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match="can't download timm's weights of timm:vit_tiny_patch16_224: no route"):
        dino_backbones.initial_weights("timm", "vit_tiny", 16)


def test_positions_are_resampled_to_the_grid_of_the_network():
    model = tiny_vit()  # a grid of its own
    side = math.isqrt(model.pos_embed.shape[1] - 1)
    larger = 2 * side
    ramp = torch.arange(larger).float()[None, :, None].expand(larger, larger, 16).reshape(1, -1, 16)
    state = {"pos_embed": torch.cat((torch.full((1, 1, 16), 7.0), ramp), dim=1)}
    dino_layouts.resize_state_grid(model, state)
    assert state["pos_embed"].shape == model.pos_embed.shape
    assert (state["pos_embed"][:, 0] == 7).all()
    rows = state["pos_embed"][0, 1:].view(side, side, 16)
    assert torch.allclose(rows[0], rows[-1])  # what runs along the columns still does
    assert (rows[0, 1:] > rows[0, :-1]).all()
    assert rows.mean().item() == pytest.approx((larger - 1) / 2, abs=1e-4)


def test_a_teacher_and_a_student_are_loaded_without_prefix_and_head(save, capsys):
    source, target = tiny_vit(0), tiny_vit(1)
    path = save(training_checkpoint(source))
    number = len(target.state_dict())
    assert dino_backbones.load_weights(target, path) == (number, number)
    assert same_state(target, source)
    assert capsys.readouterr().out == f"loaded {number} of {number} tensors from {path} [teacher]\n"
    dino_backbones.load_weights(target, path, "student")
    assert same_state(target, {key: value + 1 for key, value in source.state_dict().items()})


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
def test_a_plain_state_dict_is_loaded_under_any_wrapper(save, prefix):
    source, target = tiny_vit(0), tiny_vit(1)
    dino_backbones.load_weights(target, save(prefixed(source.state_dict(), prefix)))
    assert same_state(target, source)


def test_a_convnets_weights_are_loaded_with_the_buffers_of_its_batch_norms(save):
    def net():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    source, target = net(), net()
    source(torch.rand(2, 3, 4, 4))
    dino_backbones.load_weights(target, save({"teacher": prefixed(source.state_dict(), "module.backbone.")}))
    assert same_state(target, source)
    assert target[1].num_batches_tracked == 1


def test_left_over_tensors_are_named(save, capsys):
    source, target = tiny_vit(0), tiny_vit(1)
    assert dino_backbones.load_weights(target, save({**source.state_dict(), "mask_token": torch.zeros(1)})) == (18, 18)
    assert same_state(target, source)
    assert "weights.pth has tensors that the model does not have: mask_token\n" in capsys.readouterr().out


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (lambda state: without(state, "norm.bias"), None, r"has only 17 of the 18 tensors .*it lacks norm\.bias"),
        (lambda _: nn.Linear(2, 2).state_dict(), None, r"none of the 18 tensors of vit_tiny .*it has weight, bias"),
        (
            lambda state: {**state, "blocks.0.mlp.fc2.weight": torch.zeros(16, 48)},
            None,
            r"\[16, 48\] in .* \[16, 64\] in",
        ),
        (lambda state: {**state, "pos_embed": torch.zeros(1, 17, 24)}, None, r"pos_embed is \[1, .* but \[1, 17, 16\]"),
        (lambda state: {**state, "pos_embed": torch.zeros(1, 16, 16)}, None, r"pos_embed is \[1, .* but \[1, 17, 16\]"),
        (lambda _: training_checkpoint(tiny_vit()), "techer", r"no network 'techer'; it has student, teacher \("),
        (lambda _: [1, 2], None, "contains a list, not a state dict"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(save, change, key, message):
    target = tiny_vit(1)
    with pytest.raises(UserError, match=message):
        dino_backbones.load_weights(target, save(change(tiny_vit(0).state_dict())), key or "teacher", arch="vit_tiny")
    assert same_state(target, tiny_vit(1))


def test_the_model_gets_the_positional_grid_of_the_file(save):
    source, target = tiny_vit(0, img_size=[48]), tiny_vit(1, img_size=[32])
    dino_backbones.load_weights(target, save(source.state_dict()))
    assert same_state(target, source)
    assert (target.patch_embed.num_patches, target.patch_embed.img_size) == (36, 48)
    for size in (48, 32, 40):
        images = tensor("images", (2, 3, size, size))
        assert torch.equal(target.eval()(images), source.eval()(images))


def test_random_weights_stay_and_are_logged(capsys):
    target = tiny_vit()
    assert dino_backbones.load_weights(target, "random") == (0, len(target.state_dict()))
    assert same_state(target, tiny_vit())
    assert "random weights (--pretrained_weights random)" in capsys.readouterr().out


@pytest.fixture
def downloads(monkeypatch):
    """A replacement for the network: the URLs asked for; each has the tensors of `state`."""
    asked = []

    def download(url):
        asked.append(url)
        return download.state

    monkeypatch.setattr(hubconf, "_download", download)
    asked_and_state = argparse.Namespace(urls=asked, hold=lambda state: setattr(download, "state", state))
    asked_and_state.hold(None)
    return asked_and_state


@pytest.mark.parametrize("arch", ["vit_small", "deit_small"])
def test_the_published_weights_are_the_default(downloads, capsys, arch):
    source, target = tiny_vit(0), tiny_vit(1)
    downloads.hold(source.state_dict())
    number = len(target.state_dict())
    assert dino_backbones.load_weights(target, "", arch=arch, patch_size=8) == (number, number)
    url = hubconf.BASE_URL + "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
    assert downloads.urls == [url]
    assert same_state(target, source)
    assert f"from {url}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arch", "patch_size", "named"), [("vit_tiny", 16, "vit_tiny with patch size 16"), ("resnet18", 16, "resnet18")]
)
def test_without_published_weights_random_ones_stay_with_a_warning(downloads, capsys, arch, patch_size, named):
    target = tiny_vit()
    assert dino_backbones.load_weights(target, "", arch=arch, patch_size=patch_size) == (0, len(target.state_dict()))
    assert downloads.urls == []
    assert same_state(target, tiny_vit())
    assert f"warning: no weights were published for {named}:" in capsys.readouterr().out


def test_a_download_that_fails_is_a_user_error(monkeypatch):
    def unreachable(url):
        raise OSError("name resolution failed")

    monkeypatch.setattr(hubconf, "_download", unreachable)
    with pytest.raises(UserError, match=r"can't download https.*name resolution failed.*--pretrained_weights"):
        dino_backbones.load_weights(tiny_vit(), "", arch="vit_small", patch_size=16)


def test_the_authors_names_for_loading_weights_work(downloads, save):
    source, target = tiny_vit(0), tiny_vit(1)
    path = save({"teacher": prefixed(source.state_dict(), "backbone.")})
    dino_backbones.load_pretrained_weights(target, path, "teacher", "vit_small", 16)
    assert same_state(target, source)
    with pytest.raises(UserError, match="no linear classifier was published for vit_nano with patch size 8"):
        dino_backbones.load_pretrained_linear_weights(nn.Linear(2, 2), "vit_nano", 8)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_published_linear_classifiers_load_with_and_without_ddp(monkeypatch, wrapper):
    published = {"module.linear.weight": torch.ones(3, 2), "module.linear.bias": torch.ones(3)}
    monkeypatch.setattr(hubconf, "_download", lambda url: {"state_dict": published})
    classifier = nn.ModuleDict({"linear": nn.Linear(2, 3)})
    classifier = nn.ModuleDict({"module": classifier}) if wrapper else classifier
    dino_backbones.load_pretrained_linear_weights(classifier, "vit_small", 16)
    assert all(torch.equal(value, torch.ones_like(value)) for value in classifier.state_dict().values())


@pytest.mark.parametrize(
    ("arch", "becomes"),
    [
        ("deit_small", "vit_small"),
        ("timm:deit_tiny_patch16_224", "timm:deit_tiny_patch16_224"),
        ("resnet18", "resnet18"),
    ],
)
def test_only_the_authors_two_other_names_are_aliases(arch, becomes):
    args = arguments_of(main_dino, "--arch", arch)
    main_dino.check_args(args)
    assert args.arch == becomes


@pytest.mark.parametrize("arch", ["vit_nano", "vit_tiny_conv", "resnet8"])
def test_a_network_that_timm_does_not_have_starts_from_a_file(arch):
    with pytest.raises(UserError, match=f"timm has no weights of {arch}.*Give a file of weights"):
        dino_backbones.initial_weights("timm", arch, 16)
