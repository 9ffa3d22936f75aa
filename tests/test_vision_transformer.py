"""vision_transformer.py: numbers, initial weights, and everything that other projects do to the model."""

import copy
import json
import math
import shutil
import types
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, assert_near, fill, run_script, shared, tensor
from torch.utils.flop_counter import FlopCounterMode

import vision_transformer as vits
from vision_transformer import DINOHead, DropPath, VisionTransformer

PATCH, DEPTH, HEADS, DIM = 8, 2, 4, 32


def tiny_vit(**changes):
    """Depth 2, 32-d, 4 heads, a grid of 4 x 4; no bias is zero and no map uniform, so that every term counts."""
    settings = {"img_size": [32], "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
    model = VisionTransformer(
        **{**settings, "qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6), **changes}
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


def pictures(height=32, width=32, number=2):
    return tensor(f"pictures{height}x{width}", (number, 3, height, width))


def record_outputs(module):
    """A list that collects what the module returns, call by call."""
    outputs = []
    module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    return outputs


def float64(value):
    return value.detach().double().numpy()


# ---- reference numbers ----

REFERENCE_SIZES = [
    *(("vit_tiny", 16, size) for size in ("224x224", "96x96", "160x96", "224x320")),
    *(("vit_small", 8, size) for size in ("96x96", "64x128")),
]


@pytest.mark.parametrize(("arch", "patch_size", "size"), REFERENCE_SIZES)
def test_vit_gives_the_reference_tokens_and_attention(arch, patch_size, size):
    reference = np.load(shared("goldens/vit.npz"))
    model = fill(vits.__dict__[arch](patch_size=patch_size, num_classes=0), f"open/{arch}{patch_size}").eval()
    images, name = tensor(f"x{size}", (2, 3, *map(int, size.split("x")))), f"{arch}_p{patch_size}_{size}"
    with torch.no_grad():
        assert_near(model(images), reference[f"{name}_cls"], 2e-5, "CLS")
        assert_near(model.get_last_selfattention(images)[:, :, 0], reference[f"{name}_attn_cls"], 5e-5, "attention")
        layers = torch.stack(model.get_intermediate_layers(images, 4))
    assert_near(layers[:, :, 0], reference[f"{name}_inter_cls"], 2e-5, "CLS of the last blocks")
    assert_near(layers[:, :, 1:].mean(2), reference[f"{name}_inter_mean"], 2e-5, "patches of the last blocks")


@pytest.mark.parametrize(("arch", "patch_size"), [("vit_tiny", 16), ("vit_small", 8)])
def test_vit_has_the_reference_keys(arch, patch_size):
    keys = np.load(shared("goldens/vit.npz"))[f"{arch}_p{patch_size}_keys"]
    assert sorted(vits.__dict__[arch](patch_size=patch_size, num_classes=0).state_dict()) == list(keys)


@pytest.mark.parametrize("settings", ["{}", '{"nlayers": 1}', '{"norm_last_layer": false}'])
def test_head_gives_the_reference_logits_keys_and_trainable_parameters(settings):
    reference = np.load(shared("goldens/head.npz"))
    head = fill(DINOHead(96, 300, **json.loads(settings)), "open/head").eval()
    assert_near(head(tensor("head_x", (6, 96))), reference[f"head_{settings}"], 2e-5)
    keys = sorted(f"{key}:{tuple(value.shape)}" for key, value in head.state_dict().items())
    assert keys == sorted(reference[f"head_{settings}_keys"])
    trainable = sorted(name for name, p in head.named_parameters() if p.requires_grad)
    assert trainable == sorted(reference[f"head_{settings}_trainable"])


# ---- one block ----


def slow_layer_norm(norm, rows):
    centered = rows - rows.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + norm.eps) * float64(norm.weight) + float64(
        norm.bias
    )


def slow_linear(linear, rows):
    return rows @ float64(linear.weight).T + float64(linear.bias)


def slow_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def slow_attention(attention, rows, heads):
    """Tokens [N, D] of one sample -> new tokens and the map [heads, N, N], query by query in float64."""
    number, dim = rows.shape
    width = dim // heads
    qkv = slow_linear(attention.qkv, rows)
    maps, mixed = np.zeros((heads, number, number)), np.zeros((number, dim))
    for h in range(heads):
        q, k, v = (qkv[:, part * dim + h * width : part * dim + (h + 1) * width] for part in range(3))
        for i in range(number):
            weights = np.array([math.exp(q[i] @ k[j] / math.sqrt(width)) for j in range(number)])
            maps[h, i] = weights / weights.sum()
            mixed[i, h * width : (h + 1) * width] = maps[h, i] @ v
    return slow_linear(attention.proj, mixed), maps


def slow_block(block, rows, heads):
    rows = rows + slow_attention(block.attn, slow_layer_norm(block.norm1, rows), heads)[0]
    hidden = slow_gelu(slow_linear(block.mlp.fc1, slow_layer_norm(block.norm2, rows)))
    return rows + slow_linear(block.mlp.fc2, hidden)


def test_attention_returns_tokens_and_map_of_a_step_by_step_computation():
    attention, x = tiny_vit().blocks[0].attn, tensor("tokens", (2, 5, DIM))
    tokens, maps = attention(x)
    slow = [slow_attention(attention, float64(rows), HEADS) for rows in x]
    assert_near(tokens, [t for t, _ in slow], 1e-5, "tokens")
    assert_near(maps, [m for _, m in slow], 1e-5, "map")


def test_whole_network_equals_a_step_by_step_computation_in_float64():
    model, images = tiny_vit(), pictures(number=1)
    rows = []
    kernel, image = float64(model.patch_embed.proj.weight), float64(images[0])
    for top in range(0, 32, PATCH):
        for left in range(0, 32, PATCH):
            patch = image[:, top : top + PATCH, left : left + PATCH]
            rows.append((kernel * patch).sum((1, 2, 3)) + float64(model.patch_embed.proj.bias))
    rows = np.concatenate((float64(model.cls_token)[0], rows)) + float64(model.pos_embed)[0]
    for block in model.blocks:
        rows = slow_block(block, rows, HEADS)
    assert_near(model(images)[0], slow_layer_norm(model.norm, rows)[0], 2e-5)


def test_qk_scale_replaces_the_root_of_the_head_width():
    plain, scaled = tiny_vit(), tiny_vit(qk_scale=0.5)
    with torch.no_grad():  # queries that are smaller by the ratio of the scales undo the change
        scaled.blocks[0].attn.qkv.weight[:DIM] *= (DIM / HEADS) ** -0.5 / 0.5
        scaled.blocks[0].attn.qkv.bias[:DIM] *= (DIM / HEADS) ** -0.5 / 0.5
    x = tensor("tokens", (2, 5, DIM))
    assert_near(scaled.blocks[0].attn(x)[0], plain.blocks[0].attn(x)[0], 1e-5)


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"embed_dim 32 .* 5 heads"):
        tiny_vit(num_heads=5)


def test_dropout_rates_reach_their_layers():
    model = tiny_vit(drop_rate=0.1, attn_drop_rate=0.2)
    for block in model.blocks:
        assert (block.attn.attn_drop.p, block.attn.proj_drop.p, block.mlp.drop.p) == (0.2, 0.1, 0.1)
    assert model.pos_drop.p == 0.1


# ---- drop path ----


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    dropped = DropPath(0.3).train()(torch.ones(20_000, 1))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_drop_path_drops_whole_samples():
    torch.manual_seed(0)
    x = tensor("branches", (64, 3, 5))
    assert torch.equal(DropPath(0.5).eval()(x), x)
    for before, after in zip(x, DropPath(0.5).train()(x), strict=True):
        assert torch.equal(after, 2 * before) or not after.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_divides_by_the_exact_share_that_is_kept(dtype):
    """1 / 0.97 rounded to bf16 would be off by 0.3 % in every kept branch."""
    x = tensor("branches", (64, 3, 5)).to(dtype)
    dropped = DropPath(0.03).train()(x)
    kept = dropped.flatten(1).any(dim=1)
    assert torch.equal(dropped[kept], x[kept].div(0.97))


def test_drop_path_rates_rise_linearly_over_depth():
    blocks = VisionTransformer(patch_size=32, embed_dim=8, depth=5, num_heads=1, drop_path_rate=0.2).blocks
    assert isinstance(blocks[0].drop_path, nn.Identity)
    assert [b.drop_path.drop_prob for b in blocks[1:]] == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_both_branches_of_a_block_go_through_drop_path():
    block, x = tiny_vit().blocks[0], tensor("tokens", (2, 5, DIM))
    calls = record_outputs(block.drop_path)
    attended, _ = block.attn(block.norm1(x))
    output = block(x)
    assert len(calls) == 2
    assert torch.equal(calls[0], attended)
    assert torch.equal(x + calls[0] + calls[1], output)


# ---- initial weights ----


@pytest.fixture(scope="module")
def fresh():
    return VisionTransformer(
        patch_size=8, img_size=[96], embed_dim=192, depth=2, num_heads=3, num_classes=50, qkv_bias=True
    )


def test_linear_weights_and_tokens_start_normal_with_standard_deviation_002(fresh):
    linears = [module for module in fresh.modules() if isinstance(module, nn.Linear)]
    weights = [module.weight for module in linears]
    assert not any(module.bias.any() for module in linears)
    assert len(weights) == 4 * 2 + 1
    for weight in [*weights, fresh.pos_embed]:
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(weight.mean().item()) < 1e-3
    assert fresh.cls_token.std().item() == pytest.approx(0.02, rel=0.25)  # of 192 numbers
    # The distribution is cut at 2, not at 2 standard deviations.
    assert max(weight.abs().max().item() for weight in weights) > 0.06


def test_patch_convolution_starts_as_torch_starts_it(fresh):
    bound = (3 * 8 * 8) ** -0.5  # uniform between -bound and bound
    for values, accuracy in ((fresh.patch_embed.proj.weight, 0.02), (fresh.patch_embed.proj.bias, 0.2)):
        assert values.abs().max().item() <= bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=accuracy)


def test_head_starts_like_the_backbone_and_its_last_layer_like_a_torch_linear():
    head = DINOHead(192, 1000, hidden_dim=256, bottleneck_dim=64)
    for linear in (head.mlp[0], head.mlp[2], head.mlp[4]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert not linear.bias.any()
    direction = head.last_layer.weight_v
    assert direction.abs().max().item() <= 64**-0.5
    assert direction.std().item() == pytest.approx(64**-0.5 / math.sqrt(3), rel=0.02)
    assert (head.last_layer.weight_g == 1).all()


# ---- positional encoding ----


def interpolated(model, rows, columns, extra=0.1):
    """The encoding for rows x columns patches, as the published weights were trained."""
    side = round(math.sqrt(model.pos_embed.shape[1] - 1))
    grid = model.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = [(rows + extra) / side, (columns + extra) / side]
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False)
    assert grid.shape[2:] == (rows, columns)
    return torch.cat((model.pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)), dim=1)


# 16 x 64 has the number of patches of the learned grid; 37 x 61 is no multiple of the patch.
@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 24), (16, 64), (37, 61)])
def test_positional_encoding_is_interpolated_with_the_tenth_at_other_sizes(height, width):
    model, images = tiny_vit(), pictures(height, width)
    rows, columns = height // PATCH, width // PATCH
    patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    tokens = torch.cat((model.cls_token.expand(2, 1, DIM), patches), dim=1)
    assert_near(model.prepare_tokens(images), tokens + interpolated(model, rows, columns), 1e-6)
    assert_near(model.interpolate_pos_encoding(tokens, height, width), interpolated(model, rows, columns), 1e-6)


def test_gradients_reach_the_positions_through_the_interpolation():
    model = tiny_vit()
    model(pictures(48, 24)).sum().backward()
    assert (model.pos_embed.grad.abs().sum(-1) > 0).all()


# ---- what the network returns ----


def test_forward_is_the_cls_token_of_the_last_intermediate_layer():
    model, images = tiny_vit(), pictures(40, 24)
    assert torch.equal(model(images), model.get_intermediate_layers(images)[0][:, 0])


def test_a_list_selects_blocks_by_their_numbers():
    model, images = vits.vit_nano(patch_size=8, img_size=[32]).eval(), tensor("images", (2, 3, 32, 32))
    first, second, third, last = model.get_intermediate_layers(images, n=4)
    for numbers, want in (
        ([0], [first]),
        ([1, 3], [second, last]),
        ((2, 0), [third, first]),
        (range(2), [first, second]),
    ):
        found = model.get_intermediate_layers(images, n=numbers)
        assert len(found) == len(want)
        assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
    with pytest.raises(KeyError):
        model.get_intermediate_layers(images, n=[4])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 40)])
def test_a_trace_at_any_size_computes_the_same(size):
    model = vits.vit_nano(patch_size=8, img_size=[32]).eval()
    traced = torch.jit.trace(model, torch.zeros(1, 3, *size))
    images = tensor("images", (2, 3, *size))
    assert torch.equal(traced(images), model(images))


def test_intermediate_layers_are_the_last_blocks_outputs_in_order_each_normalized():
    model, images = tiny_vit(depth=3), pictures()
    outputs = [record_outputs(block) for block in model.blocks]
    layers = model.get_intermediate_layers(images, n=2)
    assert len(layers) == 2
    for layer, output in zip(layers, outputs[1:], strict=True):
        assert torch.equal(layer, model.norm(output[0]))


def test_last_selfattention_is_the_map_that_the_last_block_uses_in_a_forward():
    model, images = tiny_vit(depth=3), pictures(40, 24)
    maps = record_outputs(model.blocks[-1].attn.attn_drop)
    model(images)
    got = model.get_last_selfattention(images)
    assert got.shape == (2, HEADS, 16, 16)
    assert torch.equal(got, maps[0])


def test_classifier_exists_only_when_classes_are_asked_for():
    assert isinstance(tiny_vit().head, nn.Identity)
    model = tiny_vit(num_classes=3)
    assert {key for key in model.state_dict() if key.startswith("head")} == {"head.weight", "head.bias"}
    assert model(pictures()).shape == (2, DIM)


# ---- fused attention ----


def test_last_selfattention_of_a_fused_network_is_the_same_map():
    images = pictures(40, 24)
    want = tiny_vit().get_last_selfattention(images)
    assert_near(tiny_vit(fused_attention=True).get_last_selfattention(images), want, 1e-5)


def test_fused_attention_can_be_switched_on_and_off_again():
    model, images = tiny_vit(), pictures()
    maps = record_outputs(model.blocks[0].attn.attn_drop)
    model.set_fused_attention(True)
    model(images)
    assert not maps
    model.set_fused_attention(False)
    model(images)
    assert len(maps) == 1


def test_fused_attention_drops_in_training_only():
    model = tiny_vit(attn_drop_rate=0.5, fused_attention=True)
    images = pictures()
    assert_near(model(images), tiny_vit()(images), 1e-5)
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(model(images), model(images))


# ---- what other projects do to the model ----


@pytest.mark.parametrize(
    ("arch", "width", "heads", "depth"),
    [("vit_nano", 128, 4, 4), ("vit_tiny", 192, 3, 12), ("vit_small", 384, 6, 12), ("vit_base", 768, 12, 12)],
)
def test_factories_are_plain_functions_of_the_module(arch, width, heads, depth):
    assert isinstance(vits.__dict__[arch], types.FunctionType)
    with torch.device("meta"):
        model = vits.__dict__[arch](patch_size=8, num_classes=0)
    assert (model.embed_dim, model.num_features, len(model.blocks)) == (width, width, depth)
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {block.attn.scale for block in model.blocks} == {64**-0.5 if arch != "vit_nano" else 32**-0.5}
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    assert model.blocks[0].mlp.fc1.weight.shape == (4 * width, width)
    assert model.pos_embed.shape == (1, 1 + 28 * 28, width)


def test_factories_take_the_patch_size_first_and_pass_the_rest_on():
    model = vits.vit_nano(32, img_size=[96], drop_path_rate=0.3, num_classes=7, in_chans=1)
    assert model.patch_embed.proj.weight.shape == (128, 1, 32, 32)
    assert model.pos_embed.shape == (1, 10, 128)
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.3)
    assert model.head.out_features == 7


def test_unknown_keywords_are_accepted():
    tiny_vit(representation_size=None, hybrid_backbone=None)


def test_attention_dropout_hook_sees_the_softmax_with_gradients_in_eval_mode():
    model, maps = tiny_vit(), []
    for block in model.blocks:
        maps.append(record_outputs(block.attn.attn_drop))
    output = model(pictures())
    assert [len(seen) for seen in maps] == [1, 1]
    for (seen,) in maps:
        assert seen.shape == (2, HEADS, 17, 17)
        assert_near(seen.sum(-1), torch.ones(2, HEADS, 17), 1e-6)
    gradients = torch.autograd.grad(output.square().sum(), [seen for (seen,) in maps])
    assert all(g.abs().max() > 1e-6 for g in gradients)


def test_qkv_hook_can_be_reshaped_into_queries_keys_and_values():
    model, images = tiny_vit(), pictures()
    attention = model.blocks[-1].attn
    seen = record_outputs(attention.qkv)
    want = model.get_last_selfattention(images)
    q, k, _ = seen[0].reshape(2, 17, 3, attention.num_heads, DIM // attention.num_heads).permute(2, 0, 3, 1, 4)
    assert_near((q @ k.transpose(-2, -1) * attention.scale).softmax(-1), want, 1e-5)


def test_block_hooks_see_tokens_that_nothing_overwrites_later():
    model, kept = tiny_vit(depth=4), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: kept.append((output, output.clone())))
    with torch.no_grad():
        model(pictures())
    assert len(kept) == 4
    for output, copied in kept:
        assert torch.equal(output, copied)


def test_a_replaced_interpolation_with_a_smaller_stride_gives_denser_tokens():
    model, asked = tiny_vit(), []

    def dense(self, x, w, h):
        asked.append((w, h))
        rows, columns = 1 + (w - PATCH) // 4, 1 + (h - PATCH) // 4
        assert x.shape == (2, 1 + rows * columns, DIM)
        return interpolated(self, rows, columns)

    model.patch_embed.proj.stride = (4, 4)
    model.interpolate_pos_encoding = types.MethodType(dense, model)
    images = pictures(48, 32)
    assert model.get_last_selfattention(images).shape == (2, HEADS, 78, 78)
    assert asked == [(48, 32)]
    patches = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=4)
    want = patches.flatten(2).transpose(1, 2) + interpolated(model, 11, 7)[:, 1:]
    assert_near(model.prepare_tokens(images)[:, 1:], want, 1e-6)


def test_patch_embedding_tells_its_sizes_as_integers():
    embed = VisionTransformer(img_size=[96], patch_size=16, embed_dim=8, depth=1, num_heads=1).patch_embed
    assert (embed.patch_size, embed.img_size, embed.num_patches) == (16, 96, 36)
    assert all(type(n) is int for n in (embed.patch_size, embed.img_size, embed.num_patches))
    assert VisionTransformer(img_size=96, embed_dim=8, depth=1, num_heads=1).patch_embed.num_patches == 36


def test_positional_dropout_can_be_replaced():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    model, images = tiny_vit(), pictures()
    want = 2 * model.prepare_tokens(images)
    model.pos_drop = Double()
    assert torch.equal(model.prepare_tokens(images), want)


@pytest.mark.parametrize("fused", [False, True])
def test_tokens_can_be_dropped_in_front_of_the_first_block(fused):
    model, images = tiny_vit(fused_attention=fused), pictures()
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: (inputs[0][:, [0, 3, 4, 11]],))
    rows = float64(model.prepare_tokens(images)[0, [0, 3, 4, 11]])
    for block in model.blocks:
        rows = slow_block(block, rows, HEADS)
    assert_near(model(images)[0], slow_layer_norm(model.norm, rows)[0], 2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_low_rank_wrappers_around_qkv_take_effect(fused):
    class LowRank(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.down, self.up = inner, nn.Linear(DIM, 2, bias=False), nn.Linear(2, 3 * DIM, bias=False)

        def forward(self, x):
            return self.inner(x) + self.up(self.down(x))

    torch.manual_seed(0)
    wrapped, merged = tiny_vit(fused_attention=fused), tiny_vit(fused_attention=fused)
    for i in range(DEPTH):
        wrapped.blocks[i].attn.qkv = LowRank(wrapped.blocks[i].attn.qkv)
        extra = wrapped.blocks[i].attn.qkv
        merged.blocks[i].attn.qkv.weight.data += extra.up.weight.data @ extra.down.weight.data
    assert_near(wrapped(pictures()), merged(pictures()), 1e-5)
    assert_near(wrapped.get_last_selfattention(pictures()), merged.get_last_selfattention(pictures()), 1e-5)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_half_precision_works_throughout(size):
    model, images = tiny_vit(), pictures(*size)
    want, want_map = model(images), model.get_last_selfattention(images)
    model.half()
    assert model(images.half()).dtype == torch.float16
    assert_near(model(images.half()).float(), want, 0.02)
    assert_near(model.get_last_selfattention(images.half()).float(), want_map, 0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_positions_are_rounded_once(dtype):
    model = tiny_vit().to(dtype)
    got = model.interpolate_pos_encoding(torch.empty(1, 16, DIM, dtype=dtype), 40, 24)
    assert torch.equal(got, interpolated(model.double(), 5, 3).to(dtype))


def test_state_dict_has_exactly_the_public_keys():
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", *(f"blocks.{i}.{layer}" for i in range(DEPTH) for layer in block), "norm"]
    want = ["cls_token", "pos_embed", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))]
    assert sorted(tiny_vit().state_dict()) == sorted(want)


def test_timm_runs_the_same_weights():
    timm = pytest.importorskip("timm")
    ours = fill(vits.vit_tiny(patch_size=16), "timm").eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        assert_near(ours(pictures(224, 224, 1)), theirs(pictures(224, 224, 1)), 2e-5)


def test_importing_beside_a_foreign_utils_leaves_it_alone(tmp_path):
    (tmp_path / "utils.py").write_text("OWNER = 'somebody else'\n")
    code = f"""
import sys
import weakref
sys.path[0] = {str(ROOT)!r}
import vision_transformer, hubconf
assert "utils" not in sys.modules and "dino_data" not in sys.modules, "ours was imported"
sys.path[0] = {str(tmp_path)!r}
import utils
assert utils.OWNER == "somebody else"
sys.path.append({str(ROOT)!r})
for name in ("vision_transformer", "hubconf"):
    del sys.modules[name]
import vision_transformer, hubconf
assert sys.modules["utils"].OWNER == "somebody else"
"""
    run_script("-c", code)


def test_a_checkout_called_dino_works_as_a_package_and_first_on_the_path(tmp_path):
    (tmp_path / "dino").mkdir()
    for source in ROOT.glob("*.py"):
        shutil.copy(source, tmp_path / "dino")
    (tmp_path / "dino" / "__init__.py").touch()
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r})
sys.path[0] = "./dino"
sys.path.insert(1, "")
import dino.vision_transformer as inside
import vision_transformer, dino_backbones, hubconf
assert os.path.dirname(os.path.abspath(vision_transformer.__file__)) == os.path.abspath("dino")
assert hubconf.vits is vision_transformer and dino_backbones.vits is vision_transformer
assert inside.vit_nano(patch_size=32).embed_dim == vision_transformer.vit_nano(patch_size=32).embed_dim == 128
"""
    run_script("-c", code)


# ---- the projection head ----


def small_head(**changes):
    head = DINOHead(12, 7, **{"hidden_dim": 20, "bottleneck_dim": 6, **changes})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return head.eval()


def slow_last_layer(head, x):
    """L2 normalization and the weight-normalized linear, row by row in float64."""
    gain, direction = float64(head.last_layer.weight_g), float64(head.last_layer.weight_v)
    logits = np.zeros((len(x), len(gain)))
    for b, row in enumerate(x):
        for k in range(len(gain)):
            logits[b, k] = gain[k, 0] * (row @ direction[k]) / np.linalg.norm(row) / np.linalg.norm(direction[k])
    return logits


def test_head_equals_its_formula_in_float64():
    head, x = small_head(), tensor("features", (4, 12))
    hidden = slow_gelu(slow_linear(head.mlp[2], slow_gelu(slow_linear(head.mlp[0], float64(x)))))
    assert_near(head(x), slow_last_layer(head, slow_linear(head.mlp[4], hidden)), 1e-5)


def test_head_of_one_layer_is_a_single_linear_in_front_of_the_last():
    head, x = small_head(nlayers=1), tensor("features", (4, 12))
    assert set(head.state_dict()) == {"mlp.weight", "mlp.bias", "last_layer.weight_g", "last_layer.weight_v"}
    assert_near(head(x), slow_last_layer(head, slow_linear(head.mlp, float64(x))), 1e-5)


def test_head_with_batch_norm_normalizes_between_linear_and_gelu():
    head, x = small_head(use_bn=True, nlayers=2), tensor("features", (4, 12))
    norm = head.mlp[1]
    norm.running_mean.copy_(tensor("mean", (20,)))
    norm.running_var.copy_(1 + tensor("variance", (20,)).abs())
    rows = (slow_linear(head.mlp[0], float64(x)) - float64(norm.running_mean)) / np.sqrt(
        float64(norm.running_var) + norm.eps
    )
    hidden = slow_gelu(rows * float64(norm.weight) + float64(norm.bias))
    assert_near(head(x), slow_last_layer(head, slow_linear(head.mlp[3], hidden)), 1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_gain_of_the_last_layer_starts_at_one_and_is_frozen_on_demand(frozen):
    head = DINOHead(12, 7, norm_last_layer=frozen)
    assert (head.last_layer.weight_g == 1).all()
    head(tensor("features", (4, 12))).square().sum().backward()
    assert (head.last_layer.weight_g.grad is None) == frozen
    assert head.last_layer.weight_v.grad.abs().max() > 0


def test_head_can_be_deep_copied_after_a_backward_pass():
    head, x = small_head(), tensor("features", (4, 12))
    head(x).sum().backward()
    twin = copy.deepcopy(head)
    want = head(x)
    head.last_layer.weight_v.data.neg_()
    assert torch.equal(twin(x), want)


def test_head_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = DINOHead(12, 7, norm_last_layer=False, hidden_dim=20, bottleneck_dim=6)
        head(tensor("features", (4, 12))).sum().backward()
        copy.deepcopy(head).load_state_dict(head.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_head_of_nothing_is_nothing_and_not_nan(dtype):
    head = small_head().to(dtype)
    with torch.no_grad():
        head.mlp[4].weight.zero_()
        head.mlp[4].bias.zero_()
    assert not head(torch.ones(3, 12, dtype=dtype)).any()


# ---- activations computed again ----


def gradients_and_bytes(model, images):
    """Gradients of a loss, and how many bytes the forward pass has kept for the backward one."""
    kept = []
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        loss = model(images).square().sum()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()], sum(kept)


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"drop_path_rate": 0.5}, {"depth": 1, "qk_scale": 0.2}])
def test_fused_attention_and_a_last_block_of_cls_alone_give_the_same_features_and_gradients(options):
    model, images = tiny_vit(**{"depth": 2, **options}).double().train(), pictures(40, 24).double()
    found = []
    for cls_only, fused in ((False, False), (True, False), (False, True), (True, True)):
        model.set_cls_only(cls_only)
        model.set_fused_attention(fused)
        model.set_grad_checkpointing(cls_only)
        torch.manual_seed(3)
        features = model(images)
        features.square().sum().backward()
        found.append([features, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for plain, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-12)


def test_a_last_block_of_cls_alone_saves_the_work_of_the_others_and_leaves_maps_and_layers_as_they_are():
    model, images = tiny_vit(depth=2), pictures()
    layers, map_ = model.get_intermediate_layers(images, n=2), model.get_last_selfattention(images)
    operations = []
    for cls_only in (False, True):
        model.set_cls_only(cls_only)
        with FlopCounterMode(display=False) as counter:
            model(images)
        operations.append(counter.get_total_flops())
    # 16 of 17 tokens of each image: no query (D²), projection (D²) and MLP (8 D²), no scores and mix (2 · 17 · D).
    assert operations[0] - operations[1] == 2 * 2 * 16 * (10 * DIM**2 + 2 * 17 * DIM)
    assert all(torch.equal(a, b) for a, b in zip(layers, model.get_intermediate_layers(images, n=2), strict=True))
    assert torch.equal(map_, model.get_last_selfattention(images))


def test_activations_computed_again_give_the_same_gradients_from_less_memory():
    model = vits.vit_nano(patch_size=8, drop_path_rate=0.5).train()
    images = tensor("checkpointing", (4, 3, 48, 48))
    plain, kept = gradients_and_bytes(model, images)
    model.set_grad_checkpointing()
    again, kept_now = gradients_and_bytes(model, images)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert kept_now < kept / 4
    model.set_grad_checkpointing(False)
    assert gradients_and_bytes(model, images)[1] == kept
