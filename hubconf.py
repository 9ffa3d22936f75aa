"""Published DINO backbones for torch.hub.

    import torch
    model = torch.hub.load("<folder of this checkout>", "dino_vits16", source="local")      # [B, 3, H, W] -> [B, 384]

Each entry point takes (pretrained=True, **kwargs); kwargs go to the network's constructor. `pretrained=False` needs no
network connection. Imports torch, torchvision and vision_transformer only.
"""

import torch
from torch import nn
from torchvision import models

import vision_transformer as vits

dependencies = ["torch", "torchvision"]

# ---- published files ----

BASE_URL = "https://dl.fbaipublicfiles.com/dino/"


def _files(arch, patch_size, stem, folder=None):
    folder = folder or f"{stem}_pretrain"
    return {
        "arch": arch,
        "patch_size": patch_size,
        "backbone": f"{folder}/{stem}_pretrain.pth",
        "linear": f"{folder}/{stem}_linearweights.pth",
        "full_checkpoint": f"{folder}/{stem}_pretrain_full_checkpoint.pth",
    }


# Paths below BASE_URL of what the paper's authors published, by entry point.
PUBLISHED = {
    "dino_vits16": _files("vit_small", 16, "dino_deitsmall16"),
    "dino_vits8": _files("vit_small", 8, "dino_deitsmall8"),
    "dino_vitb16": _files("vit_base", 16, "dino_vitbase16"),
    "dino_vitb8": _files("vit_base", 8, "dino_vitbase8"),
    "dino_resnet50": _files("resnet50", None, "dino_resnet50"),
}


# With an underscore, so that torch.hub.list shows the entry points alone.
def _download(url):
    """The state dict at `url`, on the CPU, by torch.hub's cache. Plain tensors only: nothing in the file can run."""
    return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)


def _with_weights(model, name, pretrained):
    if pretrained:
        model.load_state_dict(_download(BASE_URL + PUBLISHED[name]["backbone"]), strict=True)
    return model


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
    """ResNet-50 without its classifier, [B, 2048]: 67.5 % k-NN, 75.3 % linear on ImageNet."""
    model = models.resnet50(weights=None, **kwargs)
    model.fc = nn.Identity()
    return _with_weights(model, "dino_resnet50", pretrained)
