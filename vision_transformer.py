"""Vision transformers and the DINO projection head (arXiv 2104.14294, sections 3.1-3.2 and appendix C).

    import vision_transformer as vits
    model = vits.vit_small(patch_size=16)          # [B, 3, H, W] -> [B, 384]
    model.get_last_selfattention(images)           # [B, 6, N+1, N+1]

Needs only torch, so that this file can be copied into, or imported beside, any other project.
"""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- one block ----


def drop_path(x, drop_prob=0.0, training=False):
    """In training, zero each sample of x [B, ...] with probability `drop_prob` and divide the rest by 1 - drop_prob."""
    if not training or not drop_prob:
        return x
    keep = 1.0 - drop_prob
    mask = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep)  # [B, 1, 1]
    return (x * mask).div_(keep)  # mask / keep would be rounded in half precision, and the expectation with it


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): `drop_path` of a residual branch."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return drop_path(x, self.drop_prob, self.training)

    def extra_repr(self):
        return f"drop_prob={self.drop_prob:.3f}"


class Mlp(nn.Module):
    """Linear, GELU, Linear, with dropout after each linear. [..., in_features] -> [..., out_features]."""

    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Multi-head self-attention. `forward` returns the new tokens [B, N, D] and the attention map.

    By default the map [B, heads, N, N] is explicit: it passes through `attn_drop`, where hooks can see it and gradients
    flow through it. With `fused = True`, torch's scaled_dot_product_attention computes the same tokens without the map,
    and None is returned for it.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} can't be split into {num_heads} heads of equal width")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.fused = False
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def split_heads(self, x, cls_only=False):
        """Queries, keys and values of tokens x [B, N, D], each [B, heads, N, D / heads].

        With `cls_only`, only the query of the CLS token: [B, heads, 1, D / heads].
        """
        if not cls_only:
            return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        parts = (x.shape[-1], 2 * x.shape[-1])
        q_weight, kv_weight = self.qkv.weight.split(parts)
        q_bias, kv_bias = (None, None) if self.qkv.bias is None else self.qkv.bias.split(parts)
        queries = F.linear(x[:, :1], q_weight, q_bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        keys_values = F.linear(x, kv_weight, kv_bias).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return queries, *keys_values.unbind(0)

    def attention_map(self, queries, keys):
        """Softmax of the scaled products over the keys: [B, heads, N, N], rows sum to 1 (before dropout)."""
        scores = (queries * self.scale) @ keys.transpose(-2, -1)
        return self.attn_drop(scores.softmax(dim=-1))

    def forward(self, x, cls_only=False):
        queries, keys, values = self.split_heads(x, cls_only)
        if self.fused:
            attn = None
            dropout = self.attn_drop.p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=self.scale)
        else:
            attn = self.attention_map(queries, keys)
            mixed = attn @ values
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, heads, N, d] -> [B, N, D]
        return self.proj_drop(self.proj(mixed)), attn


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each on a residual branch that may be dropped."""

    def __init__(
        self,
        dim,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, hidden_features=int(mlp_ratio * dim), act_layer=act_layer, drop=drop)

    def forward(self, x, return_attention=False, cls_only=False):
        normed = self.norm1(x)
        branch, attn = self.attn(normed, cls_only) if cls_only else self.attn(normed)
        if return_attention:
            if attn is None:  # fused
                queries, keys, _ = self.attn.split_heads(normed)
                attn = self.attn.attention_map(queries, keys)
            return attn
        # Not in place: users keep the output of every block.
        x = (x[:, :1] if cls_only else x) + self.drop_path(branch)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Project each square patch of an image: [B, C, H, W] -> [B, (H / patch) * (W / patch), D]."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768):
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


# ---- the backbone ----


class VisionTransformer(nn.Module):
    """ViT with a CLS token and learned positions (sizes: table 1 of the paper).

    forward: images [B, C, H, W] -> the normalized CLS token [B, D]. Any image size of at least one patch works: the
    positional encoding, learned on a grid of (img_size / patch_size)^2 patches, is interpolated.

    `fused_attention=True` computes attention without the maps: faster in most settings, the same numbers to rounding,
    but hooks on `attn_drop` are not called.
    """

    def __init__(
        self,
        img_size=[224],  # noqa: B006 - never written to; a list because the public signature has one
        patch_size=16,
        in_chans=3,
        num_classes=0,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
        fused_attention=False,
        **kwargs,
    ):
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        image_side = img_size if isinstance(img_size, int) else img_size[0]
        self.patch_embed = PatchEmbed(image_side, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(p=drop_rate)
        block = partial(Block, embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate)
        rates = (drop_path_rate * i / max(depth - 1, 1) for i in range(depth))  # deeper blocks are dropped more often
        self.blocks = nn.ModuleList(block(rate, norm_layer=norm_layer) for rate in rates)
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)
        self.set_fused_attention(fused_attention)
        self.grad_checkpointing = self.cls_only = False

    def set_cls_only(self, cls_only):
        """Whether the last block computes only CLS, which is all that `forward` returns: the same features for 1/15
        less compute. Hooks in that block then see one token.
        """
        self.cls_only = cls_only

    def set_grad_checkpointing(self, enable=True):
        """In training, keep only the input of each block and recompute the block in the backward pass (named as in
        timm): about a third more compute for a fraction of the memory.
        """
        self.grad_checkpointing = enable

    def set_fused_attention(self, fused):
        """Switch every block between explicit attention maps and torch's fused kernels."""
        for block in self.blocks:
            block.attn.fused = fused

    def interpolate_pos_encoding(self, x, w, h):
        """The positional encoding [1, N+1, D] for tokens x [B, N+1, D] of w x h pixels, bicubic (section 3.2).

        `w` is the size of dimension 2 of the batch and `h` of dimension 3: the order in which public code calls and
        replaces this method.
        """
        if x.shape[1] == self.pos_embed.shape[1] and w == h:
            return self.pos_embed

        # Two products instead of one F.interpolate, whose backward pass on GPUs adds in another order in each run; in
        # float64, which neither autocast nor TF32 rounds.
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        grid = self.pos_embed[0, 1:].unflatten(0, (side, side))  # [side, side, D]
        grid = grid.float() if grid.device.type == "mps" else grid.double()  # MPS has no float64
        for pixels in (w, h):
            weights = _bicubic_weights(side, int(pixels) // self.patch_embed.patch_size, grid)  # int: traced
            grid = (weights @ grid.flatten(1)).unflatten(1, grid.shape[1:]).transpose(0, 1)
        return torch.cat((self.pos_embed[:, :1], grid.flatten(0, 1)[None].to(self.pos_embed.dtype)), dim=1)

    def prepare_tokens(self, x):
        """Images [B, C, H, W] -> CLS and patch tokens with their positions [B, N+1, D]."""
        size = x.shape[2:]
        tokens = self.patch_embed(x)
        tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        return self.pos_drop(tokens + self.interpolate_pos_encoding(tokens, *size))

    def forward(self, x):
        x = self.prepare_tokens(x)
        for block in self.blocks:
            if self.cls_only and block is self.blocks[-1]:
                block = partial(block, cls_only=True)
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
        return self.norm(x)[:, 0]

    def get_last_selfattention(self, x):
        """Attention map of the last block, [B, heads, N+1, N+1]; row and column 0 belong to CLS (figure 1)."""
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, return_attention=True)

    def get_intermediate_layers(self, x, n=1):
        """Tokens [B, N+1, D] after each of the last n blocks, or of the blocks numbered in a list n; a list, normed."""
        x, depth = self.prepare_tokens(x), len(self.blocks)
        numbers = range(max(depth - n, 0), depth) if isinstance(n, int) else n  # from 0
        kept = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in numbers:
                kept[i] = self.norm(x)
        return [kept[i] for i in numbers]


def _bicubic_weights(side, wanted, like):
    """The matrix [wanted, side] that resizes `side` numbers to `wanted`, bicubic; dtype and device are as in `like`."""
    one_hot = torch.eye(side, dtype=like.dtype, device=like.device)[None, :, :, None]  # [1, side, side, 1]
    # The published weights were trained with this 0.1, which keeps floor(side * scale) from rounding down.
    return F.interpolate(one_hot, scale_factor=((wanted + 0.1) / side, 1.0), mode="bicubic")[0, :, :, 0].T


def _init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _vit(patch_size, embed_dim, depth, num_heads, kwargs):
    paper = {"mlp_ratio": 4, "qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    size = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return VisionTransformer(**{**paper, **size, **kwargs})


def vit_nano(patch_size=16, **kwargs):
    """0.8 M parameters. Not in the paper: small enough to train on a CPU in minutes."""
    return _vit(patch_size, 128, 4, 4, kwargs)


def vit_tiny(patch_size=16, **kwargs):
    """ViT-Ti: 5.5 M parameters."""
    return _vit(patch_size, 192, 12, 3, kwargs)


def vit_small(patch_size=16, **kwargs):
    """ViT-S: 21.7 M parameters, the paper's main model."""
    return _vit(patch_size, 384, 12, 6, kwargs)


def vit_base(patch_size=16, **kwargs):
    """ViT-B: 85.8 M parameters."""
    return _vit(patch_size, 768, 12, 12, kwargs)


# ---- the projection head ----


class WeightNormLinear(nn.Module):
    """Linear without bias with weight = weight_g * weight_v / |weight_v|, row by row (arXiv 1602.07868).

    The same parameters and numbers as torch's weight_norm wrapper, without its forward hook: it can be deep-copied,
    traced and pickled.
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # what nn.Linear does

    @property
    def weight(self):
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x):
        return F.linear(x, self.weight)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}"


class DINOHead(nn.Module):
    """Projection head: MLP to a bottleneck, L2 normalization, weight-normalized linear to K = `out_dim` logits.

    [B, in_dim] -> [B, out_dim]. With `norm_last_layer` the gain of the last layer stays 1 and gets no gradient: a
    little less accuracy, more stable training.
    """

    def __init__(
        self, in_dim, out_dim, use_bn=False, norm_last_layer=True, nlayers=3, hidden_dim=2048, bottleneck_dim=256
    ):
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (max(nlayers, 1) - 1)
        layers = []
        for width_in, width_out in pairwise(widths):
            layers.append(nn.Linear(width_in, width_out))
            if use_bn:
                layers.append(nn.BatchNorm1d(width_out))
            layers.append(nn.GELU())
        to_bottleneck = nn.Linear(widths[-1], bottleneck_dim)
        # A head of one layer has no Sequential: its keys are mlp.weight and mlp.bias.
        self.mlp = nn.Sequential(*layers, to_bottleneck) if layers else to_bottleneck
        self.apply(_init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        if norm_last_layer:
            self.last_layer.weight_g.requires_grad = False

    def forward(self, x):
        x = self.mlp(x)
        tiny = 1e-6 if x.dtype == torch.float16 else 1e-12  # 1e-12 is 0 in half precision
        return self.last_layer(F.normalize(x, dim=-1, eps=tiny))
