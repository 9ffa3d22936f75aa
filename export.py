"""Export a trained backbone: plain weights, ONNX, timm, Hugging Face transformers.

    python export.py --to backbone --pretrained_weights runs/vits16 --output dino_vits16.pth
    python export.py --to onnx --pretrained_weights runs/vits16 --output dino_vits16.onnx
    python export.py --to timm --pretrained_weights runs/vits16 --output dino_vits16.safetensors
    python export.py --to hf --pretrained_weights runs/vits16 --output dino_vits16

Writes one file (hf: a folder) and prints how to use it. Each export is opened with the software that it is for. It is
kept only if that software reproduces the network's features on random images to 1e-4 of the largest feature.

An exported ViT accepts one image size, --image_size, because its positions are computed here; only `backbone` leaves
the size open. timm and transformers can interpolate positions themselves (dynamic_img_size, interpolate_pos_encoding),
but differently from the training code, so the features differ slightly.
"""

import argparse
import copy
import importlib.util
import json
import math
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_layouts
import utils
from dino_cli import at_least
from utils import UserError

# ---- flags ----

TENSOR_FILES = (".pth", ".safetensors")
ENDINGS = {"backbone": TENSOR_FILES, "onnx": (".onnx",), "timm": TENSOR_FILES, "hf": ()}  # of --output
LIBRARIES = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "timm": ["timm"], "hf": ["transformers", "safetensors"]}


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("Export", add_help=False, parents=[dino_cli.model_flags()])
    # fmt: off
    parser.add_argument("--to", required=True, choices=list(ENDINGS), help="""backbone: weights in the layout of the
        published files. onnx: a graph for ONNX Runtime and others. timm: weights for timm.create_model. hf: a folder
        for transformers.ViTModel.from_pretrained.""")
    parser.add_argument("--output", required=True, metavar="PATH", help="""What to write. backbone, timm: a .pth or
        .safetensors file; onnx: a .onnx file; an existing file is replaced. hf: a new folder.""")
    parser.add_argument("--image_size", default=None, nargs="+", type=at_least(1), metavar="PIXELS",
        help="""Image size of the exported network: height and width, or one number for a square. For a ViT, a multiple
        of its patch size. Default: the crop size in training, or 224 if the weights do not say it.""")
    # fmt: on
    parser.set_defaults(device="cpu")  # the export is opened on the CPU, too; a GPU would save no time
    return parser


def check_args(args):
    """Raise UserError for flags that contradict each other. Makes --image_size, if given, [height, width]."""
    dino_backbones.check_arch(args.arch)
    vit, ending, endings = dino_backbones.vit_factory(args.arch), Path(args.output).suffix, ENDINGS[args.to]
    if args.to == "hf" and not vit:
        raise UserError(f"--to hf supports the vit_ networks, not --arch {args.arch}. Use --to backbone or onnx")
    if args.to in ("timm", "hf") and vit and args.arch.endswith("_conv"):
        raise UserError(f"--to {args.to} has no ViT with the stem of --arch {args.arch}. Use --to backbone or onnx")
    if endings and ending not in endings:
        raise UserError(f"--output {args.output} must end in {' or '.join(endings)} for --to {args.to}")
    if args.to == "hf" and ending in (*TENSOR_FILES, ".onnx"):
        raise UserError(f"--output {args.output} names a file, but --to hf writes a folder. Leave out {ending}")
    if args.image_size is None:
        return
    size = " ".join(map(str, args.image_size))
    if len(args.image_size) > 2:
        raise UserError(f"--image_size {size}: give height and width, or one number for a square")
    args.image_size = [args.image_size[0], args.image_size[-1]]
    if vit and args.to == "backbone":
        raise UserError(f"--image_size {size}: the plain weights of a ViT work for any image size. Remove the flag")
    if vit:
        dino_cli.check_whole_patches("image_size", args.image_size, args.patch_size)


def check_libraries(args):
    """Raise UserError, with the pip command, if a library is missing."""
    needed = [*LIBRARIES.get(args.to, ()), *(["safetensors"] if args.output.endswith(".safetensors") else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to {args.to} needs libraries that are not installed: pip install {' '.join(missing)}")


def check_output(args):
    """The path to write. Creates its parent folder. Raises UserError if it can't or must not be written."""
    output = Path(os.path.realpath(args.output))  # the target of a link is replaced, not the link
    dino_cli.check_output_dir(output.parent, "the folder of --output")
    if args.to == "hf" and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {args.output} exists already. Name a new folder, or remove it")
    if args.to != "hf" and output.is_dir():
        raise UserError(f"--output {args.output} is a folder. Name a file")
    if args.pretrained_weights and str(output) == os.path.realpath(args.pretrained_weights):
        raise UserError(f"--output {args.output} would replace --pretrained_weights. Name another file")
    return output


# ---- the network and its tensors ----


def trained_backbone(args, in_chans=3):
    """The network to export, on the CPU, in eval mode, with explicit attention. Raises UserError."""
    utils.fix_random_seeds(0)
    side = args.image_size[0] if args.image_size and not dino_backbones.vit_factory(args.arch) else 224
    model, _ = dino_backbones.build_backbone(args.arch, args.patch_size, side, in_chans=in_chans)
    matched, _ = dino_backbones.load_weights(
        model, args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size
    )
    if not matched and args.pretrained_weights != "random":
        raise UserError(f"there are no published weights of --arch {args.arch}. Give a file with --pretrained_weights")
    return model.eval().requires_grad_(False)


def native_size(model):
    """(height, width) of the images that a network was trained on: for a ViT from its positions, else 224."""
    if not dino_backbones.is_vit(model):
        return 224, 224
    return (math.isqrt(model.pos_embed.shape[1] - 1) * model.patch_embed.patch_size,) * 2


def with_fixed_size(model, size):
    """A copy of a network for one image size. A ViT's positions [1, 1 + patches, D] become constants of that size.

    The traced ONNX exporter can't express the interpolation, and timm and transformers do it differently.
    """
    model = copy.deepcopy(model)
    if dino_backbones.is_vit(model):
        rows, columns = (side // model.patch_embed.patch_size for side in size)
        tokens = torch.empty(1, 1 + rows * columns, 0)  # only their number matters
        model.pos_embed = nn.Parameter(model.interpolate_pos_encoding(tokens, *size).detach(), requires_grad=False)
        model.interpolate_pos_encoding = lambda tokens, height, width: model.pos_embed
    return model


def plain_state(model):
    """A state dict of contiguous tensors that share no memory with each other or with the model."""
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}


def write_tensors(state, path):
    """Write a state dict as .pth or .safetensors."""
    if path.suffix == ".pth":
        utils.write_whole(path, lambda file: torch.save(state, file))
    else:
        from safetensors.torch import save

        data = save(state, metadata={"format": "pt"})  # transformers 4 refuses files without it
        utils.write_whole(path, lambda file: file.write(data))


def read_tensors(path, output):
    """(state dict in a file that `write_tensors` wrote, the Python expression that reads it from `output`)."""
    if path.suffix == ".pth":
        return dino_checkpoints.load_checkpoint(path), f"torch.load({output!r})"
    from safetensors.torch import load_file

    return load_file(path), f"safetensors.torch.load_file({output!r})"


# ---- kinds of export ----
# Each function writes `path` and opens it again. It returns the opened network, a function [B, C, H, W] -> [B, width];
# the software that opened it; and how to use the file.


def export_backbone(model, path, size, args, inputs=utils.RGB):
    write_tensors(plain_state(model), path)
    channels = {} if inputs.in_chans == 3 else {"in_chans": inputs.in_chans}
    opened, _ = dino_backbones.build_backbone(args.arch, args.patch_size, size[0], **channels)
    state, expression = read_tensors(path, args.output)
    opened.load_state_dict(state, strict=True)
    words = "".join(f", {key}={value}" for key, value in {"img_size": size[0], **channels}.items())
    network = f'dino_backbones.build_backbone("{args.arch}", {args.patch_size}{words})[0]'
    return opened.eval(), f"torch {torch.__version__}", f"model = {network}.eval(); model.load_state_dict({expression})"


def export_onnx(model, path, size, args, inputs=utils.RGB):
    import onnx
    import onnxruntime

    if sum(tensor.nbytes for tensor in model.state_dict().values()) > 2**31 - 2**24:
        raise UserError(f"the weights of --arch {args.arch} exceed the 2 GB of an ONNX file. Use --to backbone")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's versions warn of each other's exporters
        file = os.path.join(folder, "graph.onnx")
        options = {"input_names": ["images"], "output_names": ["features"], "verbose": False}
        options["dynamic_axes"] = {name: {0: "batch"} for name in ("images", "features")}
        torch.onnx.export(with_fixed_size(model, size), (torch.zeros(2, inputs.in_chans, *size),), file, **options)
        graph = onnx.load(file)  # includes the weights, which newer versions of torch write to a second file
    facts = {"mean": inputs.mean, "std": inputs.std, "image_size": size}
    facts = {name: json.dumps(value) for name, value in facts.items()}
    onnx.helper.set_model_props(graph, {"arch": args.arch, **facts})
    utils.write_whole(path, lambda file: file.write(graph.SerializeToString()))
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def opened(images):
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    shape = f"float32 [any number, {inputs.in_chans}, {size[0]}, {size[1]}]"
    version = f"onnxruntime {onnxruntime.__version__}"
    return opened, version, f'session.run(["features"], {{"images": images}}) with images {shape}'


def export_timm(model, path, size, args, inputs=utils.RGB):
    import timm

    name, keywords = timm_network(model, size, args)
    keywords |= {} if inputs.in_chans == 3 else {"in_chans": inputs.in_chans}
    write_tensors(plain_state(with_fixed_size(model, size)), path)
    try:
        opened = timm.create_model(name, checkpoint_path=str(path), **keywords)
    except RuntimeError as e:  # from load_state_dict
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"timm's {name} has other tensors than --arch {args.arch}: {reason}") from e
    words = "".join(f", {key}={value}" for key, value in {"checkpoint_path": repr(args.output), **keywords}.items())
    return opened.eval(), f"timm {timm.__version__}", f'timm.create_model("{name}"{words})'


def timm_network(model, size, args):
    """(timm's name of a network, keywords for `timm.create_model`). Raises UserError if timm does not have it."""
    import timm

    vit = dino_backbones.vit_factory(args.arch)
    if not vit:
        name = dino_backbones.timm_name(args.arch) or args.arch
        if not timm.is_model(name):
            raise UserError(f"timm has no network named --arch {args.arch}. Use --to backbone or onnx")
        return name, {"num_classes": 0}
    keywords = {"num_classes": 0} if size == (224, 224) else {"num_classes": 0, "img_size": size}
    name = f"{vit.__name__}_patch{args.patch_size}_224"
    if timm.list_pretrained(f"{name}.dino"):
        return f"{name}.dino", keywords
    if timm.is_model(name):
        return name, keywords
    shape = {"embed_dim": model.embed_dim, "depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads}
    return "vit_tiny_patch16_224", {**keywords, "patch_size": args.patch_size, **shape}


def export_hf(model, path, size, args, inputs=utils.RGB):
    import transformers

    path.mkdir()
    attention, mlp = model.blocks[0].attn, model.blocks[0].mlp
    image = {"image_size": size[0] if size[0] == size[1] else list(size), "patch_size": args.patch_size}
    image["num_channels"] = inputs.in_chans
    depth = {"num_hidden_layers": len(model.blocks), "num_attention_heads": attention.num_heads}
    width = {"hidden_size": model.embed_dim, "intermediate_size": mlp.fc1.out_features}
    same = {"qkv_bias": True, "layer_norm_eps": model.norm.eps, "architectures": ["ViTModel"]}
    transformers.ViTConfig(**image, **depth, **width, **same).save_pretrained(path)
    if inputs.in_chans == 3:  # transformers has image processors for RGB only
        write_hf_processor(path, size, inputs)
    write_tensors(dino_layouts.hf_state(plain_state(with_fixed_size(model, size))), path / "model.safetensors")
    options = {"add_pooling_layer": False, "local_files_only": True}
    opened, found = transformers.ViTModel.from_pretrained(path, output_loading_info=True, **options)
    if any(found.values()):  # transformers only warns of missing and unexpected tensors
        raise RuntimeError(f"not all tensors match: {found}")
    usage = f"transformers.ViTModel.from_pretrained({args.output!r}, add_pooling_layer=False); last_hidden_state[:, 0]"
    return lambda images: opened(images).last_hidden_state[:, 0], f"transformers {transformers.__version__}", usage


def write_hf_processor(path, size, inputs):
    """Write preprocessor_config.json: resize, center crop and normalization as in the evaluations."""
    import transformers

    # BitImageProcessor crops the center; ViTImageProcessor would distort the whole image to a square.
    sides = {"size": {"shortest_edge": max(size) * 8 // 7}, "crop_size": {"height": size[0], "width": size[1]}}
    statistics = {"image_mean": list(inputs.mean), "image_std": list(inputs.std)}
    transformers.BitImageProcessor(**sides, **statistics, resample=3).save_pretrained(path)  # 3: bicubic


EXPORTS = {"backbone": export_backbone, "onnx": export_onnx, "timm": export_timm, "hf": export_hf}

# ---- verification ----

TOLERANCE = 1e-4  # another order of operations in float32 stays below 1e-5


@torch.no_grad()
def reference(model, size, args, in_chans=3):
    """(random images [3, in_chans, H, W], the network's features [3, width]), on the CPU. Raises UserError."""
    device = utils.pick_device(args.device)
    images = torch.randn(3, in_chans, *size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 would lose three digits
            features = utils.features_of(model.to(device), images.to(device)).cpu()
    except (RuntimeError, ValueError, AssertionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--arch {args.arch} does not accept images of {size[0]} x {size[1]} pixels: {reason}") from e
    model.cpu()
    if not features.isfinite().all():
        raise UserError("the features are NaN or infinite: the network has diverged, or its weights are damaged")
    return images, features


@torch.no_grad()
def largest_deviation(opened, images, features):
    """Largest error of the opened network's features, relative to the largest feature; for all images and for one.

    Infinite if the shapes differ or there is a NaN.
    """
    deviations = []
    for number in (len(images), 1):
        got, want = utils.features_of(opened, images[:number]), features[:number]
        fits = got.shape == want.shape and got.isfinite().all()
        deviations.append(((got - want).abs().max() / want.abs().max()).item() if fits else math.inf)
    return max(deviations)


def write_and_check(model, path, size, args, inputs=utils.RGB):
    """Export to `path`. Returns (software that opened it, how to use it, largest deviation).

    Raises UserError: exit code 2 for what the user can fix, 4 for an export that does not reproduce the network.
    """
    images, features = reference(model, size, args, inputs.in_chans)
    try:
        opened, software, usage = EXPORTS[args.to](model, path, size, args, inputs)
        deviation = largest_deviation(opened, images, features)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"can't write --output {args.output}: {e.strerror or e}. Nothing was written") from e
    except Exception as e:  # exporters raise almost any type for a network that they can't express
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        raise UserError(f"--to {args.to} failed for --arch {args.arch}, nothing was written: {reason}", 4) from e
    if not deviation <= TOLERANCE:  # NaN fails, too
        raise UserError(
            f"the features of {software} differ from the network's by {deviation:.1e} of the largest one, more than "
            f"{TOLERANCE:.0e}: nothing was written. Try another version",
            exit_code=4,
        )
    return software, usage, deviation


# ---- the export ----


def main(args):
    """Export as `args` say (see get_args_parser). The output appears whole or not at all. Raises UserError."""
    trained = dino_checkpoints.follow_run(args, follow_size=False)
    if not dino_backbones.vit_factory(args.arch):  # a ViT's positions know their size
        args.image_size = args.image_size or ([trained["image_size"]] if "image_size" in trained else None)
    check_args(args)
    check_libraries(args)
    output = check_output(args)
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights)
    model = trained_backbone(args, inputs.in_chans)
    size = tuple(args.image_size or native_size(model))
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        path = Path(folder, output.name)
        software, usage, deviation = write_and_check(model, path, size, args, inputs)
        if output.is_dir():
            output.rmdir()  # it is empty: check_output refuses all others
        os.replace(path, output)
    files = list(output.iterdir()) if output.is_dir() else [output]
    print(f"{args.output}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    where = f"3 random images of {size[0]} × {size[1]} pixels"
    print(f"checked on {where}: {software} gives the features to {deviation:.1e} of the largest")
    print(f"to use it: {usage}")
    pixels = "pixels / 255" if inputs.in_chans == 3 else f"{inputs.in_chans} channels of values from 0 to 1"
    if inputs.value_range:
        pixels += f", which are {inputs.value_range[0]} and {inputs.value_range[1]} in the files"
    print(f"images are {pixels}, less the mean {inputs.mean}, over the std {inputs.std}")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
