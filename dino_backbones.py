"""A network by its name, and weights into it."""

import argparse
import inspect
import math
import os
import re
from itertools import pairwise

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import dino_checkpoints
import dino_cpu
import dino_layouts
import utils
import vision_transformer as vits
from utils import UserError

# ---- names ----

ALIASES = dino_checkpoints.ARCH_ALIASES


def vit_names():
    """Our ViTs, each with one convolution per patch or (`vit_tiny_conv`) with a stem of convolutions."""
    names = [name for name in vars(vits) if name.startswith("vit_")]
    return names + [f"{name}_conv" for name in names]


def vit_factory(arch):
    """The function that builds one of our ViTs, by either of its names; None for any other network."""
    name = ALIASES.get(arch, arch)
    if name not in vit_names():
        return None
    return conv_vit(name) if name.endswith("_conv") else vars(vits)[name]


def conv_vit(name):
    """A function that builds one of our ViTs with a ConvStem; `name` is the ViT's name and `_conv`."""

    def build(patch_size=16, in_chans=3, **kwargs):
        model = vars(vits)[name.removesuffix("_conv")](patch_size=patch_size, in_chans=in_chans, **kwargs)
        model.patch_embed.proj = ConvStem(patch_size, in_chans, model.embed_dim)
        return model

    return build


def convnet_names():
    """torchvision's classification networks, and ResNets for small images (hubconf.resnet8, hubconf.resnet18_cifar)."""
    from torchvision import models

    names = models.list_models(module=models)
    return ["resnet8", *names, *(f"{n}_cifar" for n in names if n.startswith(("resnet", "resnext", "wide_resnet")))]


def import_timm(arch):
    try:
        import timm
    except ImportError as e:
        raise UserError(f"--arch {arch} comes from timm, which is not installed: pip install timm") from e
    return timm


def timm_name(arch):
    """timm's name of the network `arch` (`timm:<name>`, or an XCiT), or None if it is not one of timm's.

    Public XCiT names end in the patch size, timm's in the image size. Both are known.
    """
    if arch.startswith("xcit_"):
        return arch if re.search(r"_p\d+_\d+", arch) else f"{arch}_224"
    return arch.removeprefix("timm:") if arch.startswith("timm:") else None


def list_archs():
    """Every name that `build_backbone` knows: ours, XCiTs, torchvision's, timm's."""
    timm = import_timm("timm:<name>")
    xcits = [name.removesuffix("_224") for name in timm.list_models("xcit_*_224")]
    return [*vit_names(), *xcits, *convnet_names(), *(f"timm:{name}" for name in timm.list_models())]


class ListArchs(argparse.Action):
    """Like --help: print and exit. An action, because timm takes seconds to import."""

    def __call__(self, parser, *_):
        print("\n".join(list_archs()))
        parser.exit()


def check_arch(arch):
    """Raise UserError, with similar names, if there is no such network."""
    if vit_factory(arch):
        return
    if timm_name(arch):
        known, prefix = import_timm(arch).list_models(), "timm:" * arch.startswith("timm:")
        if timm_name(arch).split(".")[0] in known:  # the name of weights can follow after a dot
            return
        near = utils.did_you_mean(arch, [prefix + name for name in known])
    else:
        known = [*vit_names(), *convnet_names()]
        if arch in known:
            return
        near = utils.did_you_mean(arch, known)
    raise UserError(f"unknown --arch {arch}{near or '; try vit_small or resnet50'} (main_dino.py --list_archs)")


def check_vit(arch, needs):
    """Raise UserError if `arch` is not one of our ViTs; `needs` names what other networks lack."""
    check_arch(arch)
    if not vit_factory(arch):
        raise UserError(f"--arch {arch} has no {needs}. Use a ViT, such as vit_small")


# ---- networks ----


def build_backbone(arch, patch_size=16, img_size=224, drop_path_rate=0.0, in_chans=3):
    """(network [B, in_chans, H, W] -> [B, width], its width) for a name of `list_archs`.

    One of our ViTs (deit_tiny and deit_small are aliases), an XCiT, a torchvision classification network without its
    last layer, or `timm:<name>`. `patch_size` and `img_size` (of the positional grid) are for our ViTs only,
    `drop_path_rate` for networks that have it. Raises UserError for an unknown name, and for a network that does not
    take images of `img_size` or has no pooled features.
    """
    vit = vit_factory(arch)
    if vit:
        sizes = {"patch_size": patch_size, "img_size": [img_size], "in_chans": in_chans}
        model = vit(**sizes, drop_path_rate=drop_path_rate, num_classes=0)
        return model, model.embed_dim
    check_arch(arch)
    build = build_timm if timm_name(arch) else build_convnet
    model = build(arch, drop_path_rate=drop_path_rate, in_chans=in_chans)
    return model, features_width(model, img_size, arch, in_chans)


class ConvStem(nn.Sequential):
    """Convolutions from images [B, in_chans, H, W] to patches [B, width, H // patch_size, W // patch_size].

    They are 3 x 3, with batch norm and ReLU. The first keeps the size of the image; each other one halves it and has
    twice the channels. The last one is 1 x 1. But for the first, the stem is that of arXiv 2106.14881. Raises UserError
    if `patch_size` is not a power of 2, or larger than `width`.
    """

    def __init__(self, patch_size, in_chans, width):
        halvings = patch_size.bit_length() - 1
        if patch_size != 2**halvings or patch_size > width:
            raise UserError(f"--patch_size {patch_size} does not fit a ViT with a stem of convolutions. Use 4, 8 or 16")
        widths = [in_chans, *(width >> i for i in range(halvings, -1, -1))]
        layers = []
        for i, (before, after) in enumerate(pairwise(widths)):
            conv = nn.Conv2d(before, after, 3, stride=2 if i else 1, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as in the ResNets
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(width, width, 1))
        self.patch_size = patch_size

    def forward(self, x):
        rows, columns = (side // self.patch_size * self.patch_size for side in x.shape[-2:])
        return super().forward(x[..., :rows, :columns])  # whole patches only, as one convolution per patch sees them


def build_convnet(arch, drop_path_rate=0.0, in_chans=3):
    """A network of `convnet_names` without its classifier. None of them has an argument for the drop path rate."""
    from torchvision import models

    import hubconf

    # Auxiliary classifiers are not used: their parameters would never get a gradient.
    no_extras = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    if arch in models.list_models(module=models):
        model = take_off_classifier(models.get_model(arch, weights=None, **no_extras), arch)
    else:
        model = hubconf._small_resnet(arch)
    if in_chans != 3:
        replace_first_conv(model, in_chans)
    return model


def replace_first_conv(model, in_chans):
    """Replace the first convolution of a network by one for `in_chans` channels: random weights, same std."""
    name, old = dino_layouts.first_convolution(model)
    shape = (old.kernel_size, old.stride, old.padding, old.dilation)
    new = nn.Conv2d(in_chans, old.out_channels, *shape, bias=old.bias is not None)
    nn.init.normal_(new.weight, std=old.weight.std().item())
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def build_timm(arch, drop_path_rate=0.0, pretrained=False, in_chans=3):
    """timm's network for `arch` without its classifier, for images of any size where timm supports that.

    Raises UserError if it does not support `in_chans` channels.
    """
    channels = {} if in_chans == 3 else {"in_chans": in_chans}
    # Not every network has all of these arguments. timm's error names one at a time.
    wishes = {"dynamic_img_size": True, "strict_img_size": False, "drop_path_rate": drop_path_rate}
    while True:
        try:
            options = {"pretrained": pretrained, "num_classes": 0, **channels, **wishes}
            return import_timm(arch).create_model(timm_name(arch), **options)
        except TypeError as e:
            if channels and "in_chans" in str(e):
                raise UserError(f"--arch {arch} takes images of 3 channels only, not --in_chans {in_chans}") from e
            unknown = [name for name in wishes if name in str(e)]
            if not unknown:
                raise
            del wishes[unknown[0]]


def take_off_classifier(model, arch):
    """A torchvision network with its last layer (linear or convolution) replaced by Identity."""
    for name in ("fc", "classifier", "head", "heads"):
        layer, parent = getattr(model, name, None), model
        if isinstance(layer, nn.Sequential):  # the classifier is its last layer, or the last before a pooling
            parent, layers = layer, [(n, sub) for n, sub in layer.named_children() if isinstance(sub, CLASSIFIERS)]
            name, layer = layers[-1] if layers else (name, None)
        if isinstance(layer, CLASSIFIERS):
            setattr(parent, name, nn.Identity())
            return model
    raise UserError(f"--arch {arch} does not end in a classifier that can be removed. Use another network")


CLASSIFIERS = (nn.Linear, nn.Conv2d)


def features_width(model, img_size, arch, in_chans=3):
    """Width of a network's features, found by running it on an empty image.

    Raises UserError if it does not take images of img_size x img_size, or does not return one vector per image.
    """
    training = model.training
    weight = next(model.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            images = torch.zeros(2, in_chans, img_size, img_size, device=weight.device)
            features = utils.features_of(model.eval(), images)
    except (RuntimeError, ValueError, AssertionError) as e:
        problem = " ".join(str(e).split())[:200] or type(e).__name__
        raise UserError(f"--arch {arch} does not take images of {img_size} pixels: {problem}") from e
    finally:
        model.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise UserError(f"--arch {arch} does not return one vector per image. Use another network")
    return features.shape[1]


def is_vit(model):
    return isinstance(model, vits.VisionTransformer)


def layer_numbers(backbone):
    """{parameter name: number of its layer}, from 0 at the input, for lr that differ between layers.

    A ViT's patch embedding, positions and CLS are layer 0, block i is layer i + 1, and the final norm belongs to the
    last block, as in timm. timm's networks number their own layers. Others have no numbers: {}.
    """
    if is_vit(backbone):
        blocks = {name: re.match(r"blocks\.(\d+)\.", name) for name, _ in backbone.named_parameters()}
        last = len(backbone.blocks)
        return {name: int(at[1]) + 1 if at else last * name.startswith("norm.") for name, at in blocks.items()}
    if hasattr(backbone, "group_matcher"):
        from timm.models import group_parameters

        return group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    return {}


# ---- how a network computes ----


def pick_amp_dtype(device, use_fp16, amp_dtype):
    """dtype of mixed precision, or None for float32. Also sets whether float32 on GPUs may be rounded to TF32.

    "auto" is bf16 where it is fast, else fp16 on CUDA and float32 elsewhere. Raises UserError for "tf32" on
    other devices than GPUs.
    """
    tf32 = use_fp16 and amp_dtype == "tf32"
    if tf32 and device.type != "cuda":
        raise UserError(f"--amp_dtype tf32 is a precision of NVIDIA GPUs, not of {device.type}. Use another")
    if device.type == "cuda":  # torch's default rounds convolutions alone, which mixed precision keeps
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32, use_fp16
    if tf32 or not use_fp16:
        return None
    if amp_dtype != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp_dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and dino_cpu.cpu_computes_bf16() else None


def training_dtype(args, device):
    """`pick_amp_dtype` for a run with these arguments; float32 where torch would not compute all gradients.

    In bf16 on CPUs, torch's convolutions leave the gradient of a weight unwritten if it never sees a pixel: a 3 x 3
    kernel with padding on a map of one pixel, as in convnets for small crops.
    """
    amp_dtype = pick_amp_dtype(device, args.use_fp16, args.amp_dtype)
    if amp_dtype is not torch.bfloat16 or device.type != "cpu":
        return amp_dtype
    if vit_factory(args.arch) and not args.arch.endswith("_conv"):  # one convolution, without padding
        return amp_dtype
    size = min([args.global_crops_size] + [args.local_crops_size] * (args.local_crops_number > 0))
    model, blind = build_backbone(args.arch, args.patch_size, args.global_crops_size, in_chans=args.in_chans)[0], []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, images, out: blind.append(sees_only_padding(conv, *images, out)))
    features_width(model, size, args.arch, args.in_chans)
    if not any(blind):
        return amp_dtype
    utils.log(
        f"note: --arch {args.arch} is trained in float32: for crops of {size} pixels, some of its convolutions "
        "have weights that see only padding, whose gradients torch leaves unwritten in bf16 on CPUs"
    )
    return None


def sees_only_padding(conv, images, out):
    """Whether some weights of a convolution see no pixel of its input `images` [B, C, H, W] for `out` [B, D, h, w]."""
    padding = conv.padding
    if isinstance(padding, str):
        padding = [
            0 if padding == "valid" else d * (k - 1) // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)
        ]
    sides = zip(conv.kernel_size, conv.stride, padding, conv.dilation, images.shape[2:], out.shape[2:], strict=True)
    return any((h - 1) * stride < pad or (k - 1) * step - pad >= height for k, stride, pad, step, height, h in sides)


def prepare_for_training(student, teacher, args, device, amp_dtype):
    """Switch two MultiCropWrappers to what trains fastest. Raises UserError for flags that they can't follow."""
    if device.type == "cpu":
        dino_cpu.tune_cpu()
        warn_of_size(student.backbone, args, amp_dtype)
    if args.local_crops_number:  # global crops were tried when the network was built
        features_width(teacher.backbone, args.local_crops_size, args.arch, args.in_chans)
    for backbone in (student.backbone, teacher.backbone):
        use_fastest_kernels(backbone, device, amp_dtype)
    if args.grad_checkpointing:
        checkpoint_activations(student.backbone, args.arch)


def use_fastest_kernels(backbone, device, amp_dtype):
    """Switch a backbone in place to what trains fastest, with the same features to rounding."""
    use_fused_attention(backbone, device, amp_dtype)
    if is_vit(backbone):
        backbone.set_cls_only(True)
    elif device.type in ("cuda", "cpu"):  # 1.8 times the speed of a ResNet-50 on an H100, 1.15 of resnet8 on CPUs
        for p in (p for p in backbone.parameters() if p.ndim == 4):
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def prepare_for_evaluation(model, device, amp_dtype=None):
    """The network on the device in evaluation mode, without gradients, switched to the fastest kernels there."""
    if device.type == "cpu":
        dino_cpu.tune_cpu()
    use_fused_attention(model, device, amp_dtype)
    return model.to(device).eval().requires_grad_(False)


def warn_of_size(model, args, amp_dtype):
    """Say before the first step that a ViT is too large for a CPU, and what it will need."""
    if not is_vit(model) or len(model.blocks) * model.embed_dim < 12 * 192:  # vit_tiny and larger
        return
    sides = [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number
    tokens = sum((side // args.patch_size) ** 2 + 1 for side in sides)
    bytes_per_value = 34 if amp_dtype else 68  # activations per token, channel and block (arXiv 2205.05198, eq. 2)
    activations = args.batch_size_per_gpu * tokens * model.embed_dim * len(model.blocks) * bytes_per_value
    weights = 5 * 4 * (sum(p.numel() for p in model.parameters()) + 256 * args.out_dim)  # Adam, gradients, teacher
    utils.log(
        f"warning: {args.arch} is large for a CPU: expect about {(activations + weights) / 1e9:.1f} GB of memory and "
        "slow steps. Try --config recipes/demo.yaml, or a smaller --batch_size_per_gpu"
    )


def distribute(student, teacher, device):
    """Wrap the student for several processes, and synchronize batch norms (on GPUs)."""
    if utils.get_world_size() == 1:
        return student, teacher
    if device.type == "cuda":
        teacher = nn.SyncBatchNorm.convert_sync_batchnorm(teacher)
    return data_parallel(student, device), teacher


def data_parallel(model, device):
    """DistributedDataParallel of a model. Its batch norms are synchronized on GPUs, and local to a process on CPUs."""
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif utils.has_batchnorms(model):
        utils.log("note: torch synchronizes batch norms on GPUs only; each process normalizes its own batch")
    # Buffers belong to batch norms, which are synchronized already or local to each process. Newer versions of torch
    # have another name for the option.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    no_broadcast = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **no_broadcast)


def use_fused_attention(model, device, amp_dtype=None):
    """Use torch's fused attention in our ViTs where it was measured to be faster: everywhere but in bf16 on CPUs."""
    if is_vit(model):
        model.set_fused_attention(device.type != "cpu" or amp_dtype is None)


def checkpoint_activations(backbone, arch):
    """Recompute a backbone's activations in the backward pass. Raises UserError if it can't, or not exactly."""
    try:
        if utils.has_batchnorms(backbone) and not is_vit(backbone):  # they would count each batch twice
            raise AssertionError
        backbone.set_grad_checkpointing()
    except (AttributeError, AssertionError) as e:
        raise UserError(
            f"--grad_checkpointing works for ViTs and for timm networks without batch norms that support it, not for "
            f"--arch {arch}. Remove it"
        ) from e


# ---- weights ----


def load_weights(model, pretrained_weights, checkpoint_key="teacher", arch=None, patch_size=None, part="backbone"):
    """Load a backbone's weights from a checkpoint or a plain state dict, and log how many tensors matched.

    `pretrained_weights` is a file; or "" for the weights that the authors published for `arch` and `patch_size`
    (downloaded once; random with a warning if there are none); or "random". `checkpoint_key` picks the network of a
    training checkpoint, `part` the published file for a special purpose (see hubconf.PUBLISHED). The projection head is
    ignored. A ViT gets the positional grid of the file. Returns (tensors matched, tensors of the model). Raises
    UserError if the file can't be read, or lacks a tensor, or has another shape of it.
    """
    if pretrained_weights == "random":
        utils.log("random weights (--pretrained_weights random)")
        return 0, len(model.state_dict())
    if pretrained_weights:
        source, file = pretrained_weights, dino_checkpoints.load_checkpoint(pretrained_weights)
    else:
        source, file = load_published(arch, patch_size, part)
        if file is None:
            what = f"{arch} with patch size {patch_size}" if vit_factory(arch) else arch
            utils.log(f"warning: no weights were published for {what}: using random weights")
            return 0, len(model.state_dict())
    state, source = dino_checkpoints.pick_state_dict(file, checkpoint_key, source)
    state = dino_checkpoints.backbone_state(state)
    state = dino_layouts.our_names(state, model.state_dict(), source, checkpoint_key)
    resize_model_grid(model, state)
    training = dino_checkpoints.network_settings(dino_checkpoints.trained_args(pretrained_weights))
    return load_backbone_state(model, state, source, arch, training.get("image_size"))


def load_pretrained_weights(model, pretrained_weights, checkpoint_key, model_name, patch_size):
    """`load_weights` under the name and with the arguments of the authors' utils."""
    return load_weights(model, pretrained_weights, checkpoint_key, model_name, patch_size)


def load_pretrained_linear_weights(linear_classifier, model_name, patch_size):
    """Load the linear classifier that the authors published for a network, as their utils does. Raises UserError."""
    source, file = load_published(model_name, patch_size, "linear", flag="linear weights")
    if file is None:
        raise UserError(f"no linear classifier was published for {model_name} with patch size {patch_size}")
    dino_checkpoints.load_state(linear_classifier, file["state_dict"])  # with DDP or without
    utils.log(f"loaded the linear classifier {source}")


def load_published(arch, patch_size, part="backbone", flag="--pretrained_weights"):
    """(URL, content) of the file that the authors published for a network; (None, None) if there is none.

    `part` is a name in hubconf.PUBLISHED; the plain backbone is used where there is no file for a special purpose.
    """
    import hubconf

    factory = vit_factory(arch)
    networks = [(factory.__name__ if factory else arch, size) for size in (patch_size, None)]  # convnets have no patch
    found = [files for files in hubconf.PUBLISHED.values() if (files["arch"], files["patch_size"]) in networks]
    if not found:
        return None, None
    url = hubconf.BASE_URL + found[0].get(part, found[0]["backbone"])
    utils.log(f"using the published file {url}")
    try:
        return url, hubconf._download(url)
    except OSError as e:
        otherwise = ", or use `random` for an untrained network" if flag == "--pretrained_weights" else ""
        raise UserError(f"can't download {url}: {e}. Give a file with {flag}{otherwise}") from e


def load_backbone_state(model, state, source, arch=None, trained_size=None):
    """Load all tensors of a backbone from a state dict; see `load_weights` for what it returns, raises and logs."""
    wanted = model.state_dict()
    if "cls_attn_blocks.0.attn.q.weight" in wanted:
        import hubconf

        state = hubconf._xcit_for_timm(state)
    dino_layouts.check_layers(state, wanted, source, arch)
    matched = dino_layouts.matching_keys(state, wanted, source, arch)
    model.load_state_dict({key: state[key] for key in matched}, strict=False)
    trained_at = f", trained at {trained_size} pixels" if trained_size else ""
    utils.log(f"loaded {len(matched)} of {len(wanted)} tensors from {source}{trained_at}")
    return len(matched), len(wanted)


def resize_model_grid(model, state):
    """Give a ViT the positional grid of the weights, from which other image sizes are interpolated."""
    learned = state.get("pos_embed")
    if not is_vit(model) or learned is None or learned.shape == model.pos_embed.shape:
        return
    side = math.isqrt(max(learned.shape[1] - 1, 0))
    if learned.ndim == 3 and learned.shape[2] == model.embed_dim and side * side == learned.shape[1] - 1:
        model.pos_embed = nn.Parameter(model.pos_embed.new_empty(learned.shape), model.pos_embed.requires_grad)
        model.patch_embed.num_patches = side * side
        model.patch_embed.img_size = side * model.patch_embed.patch_size


def frozen_backbone(args, device, image_size=224, part="backbone", inputs=None, amp_dtype=None):
    """(trained network for evaluation on the device, its width), as `args` (dino_cli.model_flags) name it.

    `image_size` is the side of the positional grid of an untrained network. `inputs` are the network's
    (dino_checkpoints.trained_inputs); without them it must be for photographs. Raises UserError.
    """
    inputs = inputs or dino_checkpoints.photograph_inputs(args.pretrained_weights)
    model, width = build_backbone(args.arch, args.patch_size, image_size, in_chans=inputs.in_chans)
    load_weights(model, args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, part)
    return prepare_for_evaluation(model, device, amp_dtype), width


def trained_backbone(source, checkpoint_key="teacher", device="cpu"):
    """(frozen network, what its training says: see dino_checkpoints.settings_of) of a run, a file or a torch.hub name.

    Attention is computed explicitly. Raises UserError if there is no such thing, or if it does not name its network.
    """
    import hubconf

    settings, path = hubconf.PUBLISHED.get(source), ""
    if settings is None:
        if not os.path.exists(source):
            near = utils.did_you_mean(os.fspath(source), hubconf.PUBLISHED)
            raise UserError(f"{source} is neither a run's folder, nor a file, nor a published network{near}")
        path = dino_checkpoints.find_weights(source, "the path")
        settings = dino_checkpoints.trained_settings(path)
    if "arch" not in settings:
        raise UserError(f"{path} does not say its network. Build one, and use utils.load_pretrained_weights")
    arch, patch_size = settings["arch"], settings.get("patch_size")
    size, in_chans = settings.get("image_size", 224), settings.get("in_chans", 3)
    model, _ = build_backbone(arch, patch_size or 16, size, in_chans=in_chans)
    load_weights(model, path, checkpoint_key, arch, patch_size)
    return model.to(utils.pick_device(device)).eval().requires_grad_(False), settings


# ---- weights to start from ----


def start_from_weights(student, args):
    """Load the weights that --init_from names: the backbone's, and the projection head's if they fit."""
    state, source = initial_weights(args.init_from, args.arch, args.patch_size)
    backbone = dino_checkpoints.backbone_state(state)
    backbone = dino_layouts.our_names(backbone, student.backbone.state_dict(), source)
    dino_layouts.resize_state_grid(student.backbone, backbone)
    dino_layouts.fit_first_layer(student.backbone, backbone, source)
    load_backbone_state(student.backbone, backbone, source, args.arch)
    wanted = student.head.state_dict()
    head = {name: state.get(f"head.{name}") for name in wanted}
    if all(tensor is not None and tensor.shape == wanted[name].shape for name, tensor in head.items()):
        student.head.load_state_dict(head)
        utils.log(f"loaded the projection head from there, too ({len(head)} tensors)")
    else:
        utils.log("the projection head starts at random: the file has none that fits")


def initial_weights(init_from, arch, patch_size):
    """(state dict, where it came from) for --init_from. Raises UserError.

    `init_from` is a file (of a training checkpoint, the teacher is used); "published" for the authors' weights; or
    "timm" for timm's pretrained weights of that network, or of our ViT's size.
    """
    if init_from == "timm":
        return timm_weights(arch, patch_size)
    if init_from == "published":
        source, file = load_published(arch, patch_size, flag="--init_from")
        if file is None:
            what = f"no weights were published for --arch {arch} --patch_size {patch_size}"
            raise UserError(f"--init_from published: {what}. Name a file, or use '' for none")
    else:
        source = dino_checkpoints.find_weights(init_from, "--init_from")
        dino_checkpoints.trained_args(source)  # raises for a network that is not as its tensors look
        file = dino_checkpoints.load_checkpoint(source)
    networks = dino_checkpoints.networks_in(file)
    return dino_checkpoints.pick_state_dict(file, networks[0] if len(networks) == 1 else "teacher", source)


def timm_weights(arch, patch_size):
    vit = ALIASES.get(arch, arch) if vit_factory(arch) else None
    name = f"timm:{vit}_patch{patch_size}_224" if vit else arch if timm_name(arch) else f"timm:{arch}"
    try:
        check_arch(name)
    except UserError as e:
        raise UserError(f"timm has no weights of {name.removeprefix('timm:')}. Give a file of weights") from e
    try:
        return build_timm(name, pretrained=True).state_dict(), f"{name} [pretrained]"
    except Exception as e:  # hub clients raise different types without a network
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"can't download timm's weights of {name}: {reason}. Give a file of weights") from e
