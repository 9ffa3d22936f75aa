"""Weights as other software names them: prefixes of wrappers, Hugging Face's and mmpretrain's ViTs, foreign layers."""

import json
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

import utils
import vision_transformer as vits
from utils import UserError

# ---- names of tensors ----

# Our names of a ViT's layers, and theirs. Names in transformers' files are stable; those in its classes are not.
HUGGING_FACE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "blocks": "encoder.layer",
    "norm1": "layernorm_before",
    "attn.query": "attention.attention.query",  # we have one matrix for all three
    "attn.key": "attention.attention.key",
    "attn.value": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
MMPRETRAIN = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed.proj": "patch_embed.projection",
    "norm": "ln1",
    "blocks": "layers",
    "norm1": "ln1",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "norm2": "ln2",
    "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1",
}
QKV = ("attn.query", "attn.key", "attn.value")


def their_names(key, layout):
    """The names [1 or 3] under which a layout has a ViT's tensor `key`; none if that is not a ViT's."""
    block, layer, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", key).groups(default="")
    parts = QKV if layer == "attn.qkv" and layer not in layout else (layer,)
    front = f"{layout['blocks']}.{block}." if block else ""
    return [f"{front}{layout[part]}{kind}" for part in parts if part in layout]


def hf_state(state):
    """A ViT's state dict with transformers' names. The qkv matrix is split into query, key and value."""
    names = {key: their_names(key, HUGGING_FACE) for key in state}
    parts = {key: state[key].chunk(len(names[key])) for key in state}
    return {name: rows.clone() for key in state for name, rows in zip(names[key], parts[key], strict=True)}


# torch.compile, FSDP and activation checkpointing add these anywhere in a name, DDP puts `module.` in front.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")


def unwrapped(key):
    """A tensor's name without what wrappers of modules add to it."""
    return WRAPPERS.sub("", key).removeprefix("module.")


def our_names(state, wanted, source, checkpoint_key="teacher"):
    """A state dict with the names of a network, whose own state dict is `wanted`; other tensors keep their names.

    A prefix such as Lightning's `model.` is removed if it precedes a complete network; tensors without it are then left
    out. Of several such networks, the one with `checkpoint_key` in its prefix is used. The ViTs of Hugging Face and
    mmpretrain are renamed. Raises UserError if several networks are left.
    """
    needed = [key for key in wanted if not key.endswith("num_batches_tracked")]
    for layout in (None, *(layout for layout in (HUGGING_FACE, MMPRETRAIN) if "blocks.0.attn.qkv.weight" in wanted)):
        names = {key: their_names(key, layout) if layout else [key] for key in needed}
        prefixes = complete_prefixes(state, [name for parts in names.values() for name in parts])
        if len(prefixes) > 1:
            prefixes = [prefix for prefix in prefixes if checkpoint_key in prefix] or prefixes
        if len(prefixes) > 1:
            found = ", ".join(prefix.removesuffix(".") or "the file itself" for prefix in prefixes)
            raise UserError(
                f"{source} has several such networks: {found}. Save the one to use in its own file, or name it with "
                "--checkpoint_key in an evaluation"
            )
        if prefixes and all(names.values()):  # else the layout lacks some of our layers
            state = {
                key.removeprefix(prefixes[0]): value for key, value in state.items() if key.startswith(prefixes[0])
            }
            return renamed(state, names) if layout else state
    return state


def complete_prefixes(state, names):
    """Prefixes, "" or ending in a dot, in front of all `names` in a state dict; only "" if that is one."""
    first = names[0] if names else ""
    prefixes = [key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")]
    found = [prefix for prefix in prefixes if all(prefix + name in state for name in names)]
    return [""] if "" in found else found


def renamed(state, names):
    """A state dict with our names of the tensors `names` {ours: [theirs]}, of which some are in several parts."""
    taken = {name for parts in names.values() for name in parts}
    ours = {}
    for key, parts in names.items():
        rows = [state[name] for name in parts]
        fit = len(rows) > 1 and all(part.ndim and part.shape == rows[0].shape for part in rows)
        ours[key] = torch.cat(rows) if fit else rows[0]  # what does not fit is an error of its shape
    return {**ours, **{key: value for key, value in state.items() if key not in taken}}


# ---- layers and positions that a network does not have ----

KINDS = {
    "LayerScale": r"\.ls[12]\.gamma$|\.gamma_?[12](\.weight)?$|\.layer_scale\d?\.",
    "register tokens": r"(^|\.)(reg|register|storage)_tokens?$",
    "SwiGLU": r"\.mlp\.(w12|w[1-3]|weights_in|fc1_[gx]|gate_proj)\.",
}
# Heads, parts for training alone, and buffers that are computed again: no feature depends on them.
HARMLESS = re.compile(
    r"(\w*head\w*|fc|\w*classifier\w*|pooler|aux\w*|AuxLogits|prototypes|(decoder|projector|predictor|loss)\w*)(\..*)?"
    r"|(.*\.)?(mask_token|masked_embed|num_batches_tracked|relative_position_index|relative_coords_table|attn_mask)"
)


def check_layers(state, wanted, source, arch=None):
    """Raise UserError if tensors in `state` belong to layers that the network with the tensors `wanted` lacks.

    Its features would be wrong without them. Heads and parts for training alone are a warning.
    """
    unused = [key for key in state if key not in wanted]
    foreign = [key for key in unused if not HARMLESS.fullmatch(key)]
    kinds = {kind: [key for key in foreign if re.search(pattern, key)] for kind, pattern in KINDS.items()}
    kinds = {kind: keys for kind, keys in kinds.items() if keys}
    shared = [key for key in wanted if key in state and key != "pos_embed"]
    same_width = all(state[key].shape == wanted[key].shape for key in shared)  # else that is the simpler reason
    if kinds or (foreign and shared and same_width):
        what = f" ({', '.join(kinds)})" if kinds else ""
        named = [key for keys in kinds.values() for key in keys] or foreign
        hint = (
            "timm may have the network: use --arch timm:<name> with a file of timm's weights, or export the features "
            "from there"
        )
        if all(key.startswith("patch_embed.") for key in named):
            hint = "A ViT whose name ends in _conv has another patch embedding"
        raise UserError(
            f"{source} has layers{what} that {arch or 'the model'} does not have, so its features would be wrong: "
            f"{utils.summarize(named)}. Check --arch. {hint}"
        )
    unused = [key for key in unused if not key.startswith(("head.", "fc."))]
    if unused and shared:
        utils.log(f"warning: {source} has tensors that the model does not have: {utils.summarize(unused)}")


def matching_keys(state, wanted, source, arch=None):
    """Keys of the state dict `wanted` that `state` has, too. Raises UserError if tensors lack or have other shapes.

    `source` and `arch` are where `state` came from and the network that it is for.
    """
    matched = [key for key in wanted if key in state]
    if not matched:
        raise UserError(
            f"none of the {len(wanted)} tensors of {arch or 'the model'} is in {source} (it has "
            f"{utils.summarize(list(state)) or 'none'}). Check --arch, --patch_size and --checkpoint_key"
        )
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"{source} has only {len(matched)} of the {len(wanted)} tensors of {arch or 'the model'}; it lacks "
            f"{utils.summarize(missing)}. Check --arch, --patch_size and --checkpoint_key"
        )
    for key in matched:
        if state[key].shape != wanted[key].shape:
            theirs, ours = list(state[key].shape), list(wanted[key].shape)
            alike = len(theirs) == len(ours) == 4 and theirs[:1] + theirs[2:] == ours[:1] + ours[2:]
            hint = (
                "Use the training checkpoint, which says how many channels" if alike else "Check --arch, --patch_size"
            )
            raise UserError(f"{key} is {theirs} in {source} but {ours} in {arch or 'the model'}. {hint}")
    return matched


def resize_state_grid(model, state):
    """Interpolate the positions in a ViT's state dict to the grid of `model`. What does not fit stays."""
    learned = state.get("pos_embed")
    if learned is None or not isinstance(model, vits.VisionTransformer):
        return
    if learned.ndim != 3 or learned.shape[2] != model.embed_dim:
        return
    side, wanted = (math.isqrt(max(grid.shape[1] - 1, 0)) for grid in (learned, model.pos_embed))
    if side != wanted and side * side == learned.shape[1] - 1:
        grid = learned[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat((learned[:, :1].float(), grid.flatten(2).transpose(1, 2)), dim=1)
        utils.log(f"positions are interpolated from {side} x {side} to {wanted} x {wanted} patches")


# ---- the first layer ----


def first_convolution(model):
    """(name, module) of the convolution that takes the image; (None, None) if there is none."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return next(found, (None, None))


def fit_first_layer(model, state, source):
    """Make the first convolution in a state dict fit a model with another number of channels.

    From 3 to 1, its weights are summed, as if the three channels were equal. For any other number it starts at random.
    """
    name, layer = first_convolution(model)
    learned = state.get(f"{name}.weight")
    if learned is None or learned.ndim != 4 or learned.shape[1] == layer.weight.shape[1]:
        return
    if (learned.shape[1], layer.weight.shape[1]) == (3, 1):
        state[f"{name}.weight"] = learned.sum(dim=1, keepdim=True)
        utils.log(f"{name} has one channel: its weights for three channels in {source} are summed")
    else:
        channels = f"it has {learned.shape[1]} channels in {source}, {layer.weight.shape[1]} here"
        for part, tensor in layer.state_dict().items():
            state[f"{name}.{part}"] = tensor
        utils.log(f"{name} starts at random: {channels}")


# ---- the folders of transformers' save_pretrained ----

HF_FILES = ("model.safetensors", "pytorch_model.bin")


def read_settings(path, weights):
    """The dict in a JSON file beside `weights`; {} if there is no such file. Raises UserError if it can't be read."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}, the settings of {weights}, can't be read: {reason}. Restore or delete it") from e
    return found if isinstance(found, dict) else {}


def hf_settings(source):
    """The arguments of a run (a dict) that correspond to the config.json beside a ViT's weights at the path `source`.

    {} if there is none. Raises UserError if it computes something else than our ViTs, under the same names.
    """
    names = ("config.json", "preprocessor_config.json") if source.name in HF_FILES else ()
    config, processor = (read_settings(source.with_name(name), source) for name in names) if names else ({}, {})
    if config.get("model_type") != "vit":
        return {}
    size, sizes = config.get("image_size", 224), ("hidden_size", "num_hidden_layers", "num_attention_heads")
    if isinstance(size, list):
        if len(size) != 2 or size[0] != size[1]:
            raise UserError(f"{source} is for images of {' x '.join(map(str, size))} pixels. Only squares can be read")
        size = size[0]
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{source} has the activation {config['hidden_act']}, our ViTs have gelu. It can't be read")
    settings = {"patch_size": config.get("patch_size", 16), "image_size": size}
    shape = tuple(config.get(name, default) for name, default in zip(sizes, (768, 12, 12), strict=True))
    for name in (name for name in vars(vits) if name.startswith("vit_")):
        ours = arch_shape(name)
        if shape == ours:
            settings["arch"] = name
        elif shape[:2] == ours[:2]:
            raise UserError(f"{source} has {shape[2]} attention heads, {name} has {ours[2]}. It can't be read")
    statistics = {name: processor.get(f"image_{name}") for name in ("mean", "std")}
    if all(isinstance(values, list) for values in statistics.values()):
        settings |= {"in_chans": config.get("num_channels", 3), **statistics}
    return settings


def arch_shape(name):
    """(width, number of blocks, heads) of one of our ViTs."""
    with torch.device("meta"):
        model = vars(vits)[name]()
    return model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads
