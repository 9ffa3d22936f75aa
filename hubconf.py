"""torch.hub entry points: DINO backbones with the weights that the paper's authors published.

    import torch
    model = torch.hub.load("path/to/this/checkout", "dino_vits16", source="local")    # images [B, 3, H, W] -> [B, 384]

Each `dino_` entry point takes (pretrained=True, **kwargs). The weights are downloaded once and cached by torch.hub;
pretrained=False needs no network connection. kwargs are passed to the model's constructor. Of resnet8 and
resnet18_cifar no weights are published: load the backbone.pth of a run.

This file imports torch, torchvision and vision_transformer only, and timm if an XCiT is asked for: torch.hub.load must
not import a module called `utils` in place of a user's own. Users may have a vision_transformer, too, so ours is loaded
under another name.
"""

import importlib.util
import os
import sys

import torch
from torch import nn
from torchvision import models

dependencies = ["torch", "torchvision"]


# Helpers start with an underscore: torch.hub.list shows all other functions as entry points.
def _load_beside(name):
    """The module in the file `name`.py beside this one, whatever other module has that name.

    It is registered as hubconf_<name>, or found if this project has imported it as `name`.
    """
    path = os.path.join(os.path.dirname(os.path.realpath(__file__)), f"{name}.py")
    for known in (name, f"hubconf_{name}"):
        module = sys.modules.get(known)
        if module and os.path.realpath(getattr(module, "__file__", None) or "") == path:
            return module
    spec = importlib.util.spec_from_file_location(f"hubconf_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vits = _load_beside("vision_transformer")

# ---- published files ----

BASE_URL = "https://dl.fbaipublicfiles.com/dino/"


def _files(arch, patch_size, stem, **special):
    folder = f"{stem}_pretrain"
    return {
        "arch": arch,
        "patch_size": patch_size,
        "backbone": f"{folder}/{stem}_pretrain.pth",
        "linear": f"{folder}/{stem}_linearweights.pth",
        "full_checkpoint": f"{folder}/{stem}_pretrain_full_checkpoint.pth",
        **{purpose: f"{stem}_pretrain/{stem}_pretrain.pth" for purpose, stem in special.items()},
    }


# Entry point -> its network, and the published files as paths relative to BASE_URL. `attention` and `landmarks` are
# backbones trained for one purpose: visualizing attention, and image retrieval.
PUBLISHED = {
    "dino_vits16": _files("vit_small", 16, "dino_deitsmall16", landmarks="dino_vitsmall16_googlelandmark"),
    "dino_vits8": _files("vit_small", 8, "dino_deitsmall8", attention="dino_deitsmall8_300ep"),
    "dino_vitb16": _files("vit_base", 16, "dino_vitbase16"),
    "dino_vitb8": _files("vit_base", 8, "dino_vitbase8"),
    "dino_resnet50": _files("resnet50", None, "dino_resnet50"),
    "dino_xcit_small_12_p16": _files("xcit_small_12_p16", None, "dino_xcit_small_12_p16"),
    "dino_xcit_small_12_p8": _files("xcit_small_12_p8", None, "dino_xcit_small_12_p8"),
    "dino_xcit_medium_24_p16": _files("xcit_medium_24_p16", None, "dino_xcit_medium_24_p16"),
    "dino_xcit_medium_24_p8": _files("xcit_medium_24_p8", None, "dino_xcit_medium_24_p8"),
}


def _download(url):
    """State dict at `url`, on the CPU, downloaded once and cached by torch.hub.

    weights_only=True, so no code in the file can run. Raises OSError without a connection, and if the cached file can't
    be read; the message then names the file to delete.
    """
    try:
        how = {"map_location": "cpu", "weights_only": True, "progress": sys.stderr.isatty()}  # no bar in log files
        return torch.hub.load_state_dict_from_url(url, **how)
    except Exception as e:  # torch raises many types for a damaged file
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        if not os.path.exists(path):  # the download failed
            raise
        raise OSError(f"{path} can't be read ({type(e).__name__}). Delete it and try again") from e


def _with_weights(model, name, pretrained):
    """The model, with the published weights of entry point `name` if `pretrained`. All tensors must match."""
    if pretrained:
        state = _download(BASE_URL + PUBLISHED[name]["backbone"])
        model.load_state_dict(_xcit_for_timm(state) if "xcit" in name else state, strict=True)
    return model


def _xcit(name, pretrained, **kwargs):
    try:
        import timm
    except ImportError as e:
        raise ImportError(f"{name} needs timm: pip install timm") from e
    model = timm.create_model(f"{PUBLISHED[name]['arch']}_224", num_classes=0, **kwargs)
    return _with_weights(model, name, pretrained)


def _xcit_for_timm(state):
    """Convert an XCiT's state dict from the layout of the published files to timm's. timm's own layout is unchanged.

    timm has another name for the positional encoding, and splits the qkv matrix of class attention into q, k and v.
    """
    renamed = {}
    for key, value in state.items():
        key = key.replace("pos_embeder.", "pos_embed.")
        if key.startswith("cls_attn_blocks.") and ".attn.qkv." in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace(".qkv.", f".{part}.")] = rows
        else:
            renamed[key] = value
    return renamed


# ---- entry points ----


def dino_vits16(pretrained=True, **kwargs):
    """ViT-S/16: 74.5 % k-NN, 77.0 % linear on ImageNet."""
    return _with_weights(vits.vit_small(patch_size=16, **kwargs), "dino_vits16", pretrained)


def dino_vits8(pretrained=True, **kwargs):
    """ViT-S/8: 78.3 % k-NN, 79.7 % linear on ImageNet."""
    return _with_weights(vits.vit_small(patch_size=8, **kwargs), "dino_vits8", pretrained)


def dino_vitb16(pretrained=True, **kwargs):
    """ViT-B/16: 76.1 % k-NN, 78.2 % linear on ImageNet."""
    return _with_weights(vits.vit_base(patch_size=16, **kwargs), "dino_vitb16", pretrained)


def dino_vitb8(pretrained=True, **kwargs):
    """ViT-B/8: 77.4 % k-NN, 80.1 % linear on ImageNet."""
    return _with_weights(vits.vit_base(patch_size=8, **kwargs), "dino_vitb8", pretrained)


def dino_resnet50(pretrained=True, **kwargs):
    """ResNet-50 without the classifier, [B, 2048]: 67.5 % k-NN, 75.3 % linear on ImageNet."""
    model = models.resnet50(weights=None, **kwargs)
    model.fc = nn.Identity()
    return _with_weights(model, "dino_resnet50", pretrained)


def dino_xcit_small_12_p16(pretrained=True, **kwargs):
    """XCiT-S12/16, [B, 384]: 76.0 % k-NN, 77.8 % linear on ImageNet. The XCiTs need timm."""
    return _xcit("dino_xcit_small_12_p16", pretrained, **kwargs)


def dino_xcit_small_12_p8(pretrained=True, **kwargs):
    """XCiT-S12/8, [B, 384]: 77.1 % k-NN, 79.2 % linear on ImageNet."""
    return _xcit("dino_xcit_small_12_p8", pretrained, **kwargs)


def dino_xcit_medium_24_p16(pretrained=True, **kwargs):
    """XCiT-M24/16, [B, 512]: 76.4 % k-NN, 78.8 % linear on ImageNet."""
    return _xcit("dino_xcit_medium_24_p16", pretrained, **kwargs)


def dino_xcit_medium_24_p8(pretrained=True, **kwargs):
    """XCiT-M24/8, [B, 512]: 77.9 % k-NN, 80.3 % linear on ImageNet."""
    return _xcit("dino_xcit_medium_24_p8", pretrained, **kwargs)


# ---- ResNets for images of 32 x 32 pixels ----


def _small_resnet(arch):
    """`resnet8`, or a ResNet of torchvision followed by `_cifar`: a 3 x 3 stem and no pooling keep their detail."""
    width, stride, new = 64, 1, []
    if arch == "resnet8":
        width, stride = 48, 2
        model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        model.inplanes, model.bn1 = width, nn.BatchNorm2d(width)
        model.layer1 = model._make_layer(models.resnet.BasicBlock, width, 1)
        model.layer2 = model._make_layer(models.resnet.BasicBlock, 2 * width, 1, stride=2)
        model.layer3 = model._make_layer(models.resnet.BasicBlock, 4 * width, 1, stride=2)
        model.layer4 = nn.Identity()
        new = [*model.layer1.modules(), *model.layer2.modules(), *model.layer3.modules()]
    else:
        model = models.get_model(arch.removesuffix("_cifar"), weights=None)
    model.conv1, model.maxpool, model.fc = (
        nn.Conv2d(3, width, 3, stride, padding=1, bias=False),
        nn.Identity(),
        nn.Identity(),
    )
    for conv in (m for m in (model.conv1, *new) if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
    return model


def resnet8():
    """Ours, for CPUs, [B, 192]: 0.7 M parameters, a stem of stride 2, and one block in each of three stages."""
    return _small_resnet("resnet8")


def resnet18_cifar():
    """ResNet-18 for small images, [B, 512]: torchvision's but for the stem, with its keys."""
    return _small_resnet("resnet18_cifar")
