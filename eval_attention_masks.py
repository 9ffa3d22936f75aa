"""Attention as segmentation: how well the heads of a ViT's last block cover objects (Figure 4, appendix D).

    python eval_attention_masks.py --data_path VOCdevkit/VOC2012 --compare timm random     # published ViT-S/16
    python eval_attention_masks.py --pretrained_weights runs/vits16 --data_path VOCdevkit/VOC2012
    python eval_attention_masks.py --pretrained_weights runs/vits16 --data_path photos --mask_path masks

A head's mask is the smallest set of patches that holds a share of its attention. Each object is compared with the mask
of every head, and the best head counts. Prints the Jaccard index in percent of the network, and of the weights in
--compare: the mean over objects, and over the means of the images. Nothing is trained.

Published, VOC12 val, ViT-S/16 (S/8): DINO 45.9 (44.7), supervised 27.3 (23.7), random 22.0 (21.8). The paper names two
shares for these: 60 % in Figure 4, 80 % in appendix D. Both are measured by default.
"""

import argparse
import copy
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_data
import dino_features
import dino_files
import dino_images
import utils
from dino_cli import at_least, between
from utils import UserError, bool_flag

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("Attention masks", add_help=False, parents=[dino_cli.model_flags()])
    # fmt: off
    parser.add_argument("--data_path", default=".", metavar="DIR", help="""VOCdevkit/VOC2012, whose list
        ImageSets/Segmentation/<split>.txt is evaluated. With --mask_path: a folder of images.""")
    parser.add_argument("--mask_path", default="", metavar="DIR", help="""Folder of masks with the names of the images
        in --data_path: indexed or gray, 0 for the background and another value per object.""")
    parser.add_argument("--binary", default=False, type=bool_flag, metavar="BOOL",
        help="Masks of --mask_path have one object, the values from 128 on, instead of one per value.")
    parser.add_argument("--split", default="val", metavar="NAME", help="List of VOC to evaluate: val (1,449 images).")
    parser.add_argument("--compare", default=["random"], nargs="*", metavar="WEIGHTS", help="""Weights to measure beside
        --pretrained_weights, for the same network: a file, such as a supervised DeiT; `timm` for timm's supervised
        weights; `random`.""")
    parser.add_argument("--threshold", default=[0.6, 0.8], nargs="+", type=between(1e-6, 1, float), metavar="SHARE",
        help="Share of a head's attention that its mask holds.")
    parser.add_argument("--image_size", default=[480, 480], nargs="+", type=at_least(1), metavar="PIXELS",
        help="Images are resized to this height and width (one number: both), whatever their aspect ratio.")
    parser.add_argument("--num_workers", default=dino_cli.default_workers(), type=at_least(0), metavar="N",
        help="Processes that load images. Default: the cores of this process, at most 10.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for flags that do not fit together."""
    dino_backbones.check_vit(args.arch, "CLS token that attends to patches")
    if len(args.image_size) > 2:
        size = " ".join(map(str, args.image_size))
        raise UserError(f"--image_size {size} has more than two numbers. Set height and width, or one side")
    args.image_size = [args.image_size[0], args.image_size[-1]]
    for side in args.image_size:
        dino_cli.check_whole_patches("image_size", side, args.patch_size)
    if args.binary and not args.mask_path:
        raise UserError("--binary true is for the masks of --mask_path. Set it, or remove --binary")
    for source in args.compare:
        if source not in ("random", "timm") and not os.path.exists(source):
            raise UserError(f"--compare {source} does not exist. Use a run or a file of weights, timm or random")


# ---- data ----


def find_pairs(args):
    """[(image file, mask file), ...]. Raises UserError for missing files."""
    if not args.mask_path:
        return voc_pairs(args.data_path, args.split)
    if not os.path.isdir(args.mask_path):
        raise UserError(f"--mask_path {args.mask_path} is not a folder")
    images = dino_files.find_images(args.data_path, data_format="flat").names()
    masks = {path.with_suffix("").relative_to(args.mask_path): path for path in Path(args.mask_path).rglob("*.png")}
    names = {Path(image): Path(image).relative_to(args.data_path).with_suffix("") for image in images}
    pairs = [(image, masks[name]) for image, name in names.items() if name in masks]
    if not pairs:
        raise UserError(
            f"no image of --data_path {args.data_path} has a mask in --mask_path {args.mask_path}: {images[0]} needs "
            f"{Path(args.mask_path, names[Path(images[0])])}.png"
        )
    if len(pairs) < len(images):
        utils.log(f"note: {len(images) - len(pairs)} of {len(images)} images have no mask and are left out")
    return pairs


def voc_pairs(root, split):
    """`find_pairs` for the folder of PASCAL VOC, such as VOCdevkit/VOC2012, and its segmentation of objects."""
    listed = Path(root, "ImageSets", "Segmentation", f"{split}.txt")
    try:
        names = listed.read_text().split()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or e
        remedy = "Name the folder of VOC2012 with --data_path, or use --mask_path for images of your own"
        raise UserError(f"can't read {listed}: {reason}. {remedy}") from e
    pairs = [(Path(root, "JPEGImages", f"{n}.jpg"), Path(root, "SegmentationObject", f"{n}.png")) for n in names]
    missing = [str(path) for pair in pairs for path in pair if not path.is_file()]
    if missing:
        raise UserError(f"{listed} names files that do not exist: {utils.summarize(missing)}. Complete the data")
    if not pairs:
        raise UserError(f"{listed} is empty. Name another list with --split")
    return pairs


class MaskedImages(Dataset):
    """Pairs of files as (normalized image [3, height, width], labels [H, W] int64 of the mask's own size)."""

    def __init__(self, pairs, args, inputs):
        self.pairs, self.args, self.inputs = pairs, args, inputs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        image, mask = self.pairs[i]
        photograph, labels = dino_images.load_image(image), dino_images.read_labels(mask)
        if labels.shape != (photograph.height, photograph.width):
            sizes = (
                f"{labels.shape[1]} x {labels.shape[0]} pixels, and {image} {photograph.width} x {photograph.height}"
            )
            raise UserError(
                f"{mask} has {sizes}. Give each image a mask of its size (EXIF orientations are not applied)"
            )
        pixels = dino_features.prepare(photograph, self.args.image_size, self.args.patch_size)
        if self.args.binary:
            labels = labels >= 128
        elif self.args.mask_path and labels.max() == dino_images.VOID == labels[labels > 0].min():
            raise UserError(f"{mask} has the values 0 and 255 only. Use --binary true, or number the objects 1, 2, ...")
        return self.inputs.normalize(pixels), torch.from_numpy(labels.astype(np.int64))


# ---- scores ----


def jaccard_of_objects(masks, labels):
    """Jaccard index of each object with its best mask, [objects]: |mask and object| / |mask or object|.

    `masks` [heads, h, w] are bool, over patches, and are enlarged to the size of `labels` [H, W]: 0 is the background,
    VOID pixels count for nothing, and every other value is an object.
    """
    masks = F.interpolate(masks[None].float(), size=labels.shape, mode="nearest")[0].bool()
    known, scores = labels != dino_images.VOID, []
    for label in labels[known & (labels > 0)].unique():
        of_object = labels == label
        shared = (masks & of_object).sum(dim=(1, 2))
        either = ((masks & known) | of_object).sum(dim=(1, 2))
        scores.append((shared / either).max())
    return torch.stack(scores) if scores else torch.empty(0)


def score_network(model, loader, thresholds, device, name):
    """{threshold: [the objects' Jaccard indices [objects] of an image, ...]}. Raises UserError."""
    scores = {threshold: [] for threshold in thresholds}
    for images, labels in utils.MetricLogger().log_every(loader, 50, f"{name}:"):
        attention = dino_features.cls_attention(model, images.to(device))[0].float()  # [heads, h, w]
        if not attention.isfinite().all():
            raise UserError(f"the attention of {name} is not finite: the weights are damaged, or training diverged")
        for threshold in thresholds:
            masks = dino_features.largest_mass(attention, threshold)
            scores[threshold].append(jaccard_of_objects(masks.cpu(), labels[0]))
    return scores


def describe(scores):
    """A table of {network: what `score_network` returns}: a line per threshold, with means over objects and images."""
    rows = [["Jaccard (%)", *scores]]
    for threshold in next(iter(scores.values())):
        rows.append([f"{100 * threshold:g} % of the mass"])
        for found in scores.values():
            images = [of_image for of_image in found[threshold] if len(of_image)]
            objects, per_image = torch.cat(images).mean(), torch.stack([of_image.mean() for of_image in images]).mean()
            rows[-1].append(f"{100 * objects:.1f} (over images {100 * per_image:.1f})")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ---- the evaluation ----


def networks(args, device, inputs):
    """Yield (name, network on the device) for --pretrained_weights and each of --compare."""
    size = args.image_size[0]
    yield args.pretrained_weights or "published", dino_backbones.frozen_backbone(args, device, size, inputs=inputs)[0]
    for source in dict.fromkeys(args.compare):
        other = copy.copy(args)
        other.pretrained_weights = dino_checkpoints.find_weights(source, "--compare")
        utils.fix_random_seeds(0)
        if source != "timm":
            yield source, dino_backbones.frozen_backbone(other, device, size, inputs=inputs)[0]
        else:
            model, _ = dino_backbones.build_backbone(args.arch, args.patch_size)
            state, where = dino_backbones.timm_weights(args.arch, args.patch_size)
            dino_backbones.resize_model_grid(model, state)
            dino_backbones.load_backbone_state(model, state, where, args.arch)
            yield source, dino_backbones.prepare_for_evaluation(model, device)


def main(args):
    """Print the scores of all networks. Raises UserError."""
    trained = dino_checkpoints.follow_run(args, follow_size=False)
    if trained and "image_size" not in getattr(args, "given", vars(args)):
        args.image_size = [max(side // args.patch_size, 1) * args.patch_size for side in args.image_size]
    check_args(args)
    pairs = find_pairs(args)
    device = utils.pick_device(args.device)
    utils.fix_random_seeds(0)  # an untrained network has the same weights in every run
    inputs = dino_checkpoints.photograph_inputs(args.pretrained_weights)
    loader = dino_data.eval_loader(MaskedImages(pairs, args, inputs), 1, args.num_workers, device)
    scores = {}
    for name, model in networks(args, device, inputs):
        scores[name] = score_network(model, loader, list(dict.fromkeys(args.threshold)), device, name)
    numbers = [len(of_image) for of_image in scores[name][args.threshold[0]]]
    if not sum(numbers):
        raise UserError(f"the masks have no objects, only 0 and {dino_images.VOID}. Number the objects 1, 2, ...")
    print(f"{sum(numbers)} objects in {sum(map(bool, numbers))} images of {len(pairs)}, the best head for each object")
    print(describe(scores))


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
