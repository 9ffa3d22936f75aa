"""Copy detection on Copydays with frozen features (section 4.2.1 of the paper).

    python eval_copy_detection.py --data_path copydays                               # the published ViT-B/8, 320 pixels
    python eval_copy_detection.py --data_path copydays --whitening_path yfcc/20k --distractors_path yfcc/10k
    python eval_copy_detection.py --arch vit_small --patch_size 16 --pretrained_weights FILE --data_path copydays

--data_path holds the blocks original/, strong/, jpegqual/<quality>/ and crops/<share>/ (those that are there count),
each with its images. Every image of a block looks for its originals among all originals and distractors; the mean
average precision of each block is printed. Published: 0.858 on strong, with whitening and distractors.
"""

import argparse
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import transforms

import dino_backbones
import dino_cli
import dino_data
import dino_features
import dino_images
import utils
from dino_cli import at_least
from utils import UserError, bool_flag

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parents = [dino_cli.model_flags("vit_base", 8), dino_cli.process_flags()]
    parser = argparse.ArgumentParser("Copy detection", add_help=False, parents=parents)
    # fmt: off
    parser.add_argument("--data_path", default=".", metavar="DIR", help="Folder of the Copydays blocks.")
    parser.add_argument("--whitening_path", default="", metavar="DIR", help="""Folder of other images, on which a
        whitening of the features is learned: twenty thousand or so, not those that are searched.""")
    parser.add_argument("--distractors_path", default="", metavar="DIR",
        help="Folder of images that are nobody's original, to search among as well.")
    parser.add_argument("--imsize", default=320, type=at_least(1), metavar="PIXELS",
        help="Images are resized to a square of this side, whatever their shape.")
    parser.add_argument("--batch_size_per_gpu", default=16, type=at_least(1), metavar="B",
        help="Images per forward pass.")
    parser.add_argument("--use_cuda", default=True, type=bool_flag, metavar="BOOL",
        help="Keep features on the GPU, if there is one. false: in main memory.")
    # fmt: on
    return parser


def check_args(args):
    dino_backbones.check_arch(args.arch)
    if not dino_backbones.vit_factory(args.arch):
        raise UserError(
            f"--arch {args.arch} has no CLS and patch tokens. Take one of {', '.join(dino_backbones.vit_names())}"
        )
    if args.imsize < args.patch_size:
        raise UserError(f"--imsize {args.imsize} is smaller than one patch (--patch_size {args.patch_size})")


# ---- data ----

BLOCKS = (
    "original",
    "strong",
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{share}" for share in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
)


def find_blocks(data_path):
    """{block: its files} of the blocks that are there. Raises UserError without originals, or with nothing else."""
    found = [block for block in BLOCKS if os.path.isdir(os.path.join(data_path, block))]
    if "original" not in found or len(found) == 1:
        raise UserError(f"--data_path {data_path} must hold original/ and, beside it, strong/, jpegqual/ or crops/")
    return {block: dino_data.image_files(os.path.join(data_path, block), "--data_path") for block in found}


def positives(block, files, originals):
    """For each file of a block, the numbers of its originals: those of its name, in `strong` of its first 4 characters.

    If no name in another block is an original's, but there are as many, then they are in the same order. Raises
    UserError for images without an original.
    """
    length = 4 if block == "strong" else None
    found = [[i for i, original in enumerate(originals) if original.name[:length] == f.name[:length]] for f in files]
    lone = [str(file) for file, right in zip(files, found, strict=True) if not right]
    if not lone:
        return found
    if block != "strong" and len(lone) == len(files) == len(originals):
        return [[i] for i in range(len(files))]
    raise UserError(
        f"{len(lone)} of the {len(files)} images in {block}/ have no original: {utils.summarize(lone)}. Give copies the "
        "names of their originals; in strong/ the first four characters count"
    )


# ---- features ----


class CopyFeatures(nn.Module):
    """A ViT's features for copy detection: images [B, 3, H, W] -> CLS beside the pooled patch tokens, [B, 2·D].

    The patch tokens behind the final norm are pooled by GeM, the generalised mean with exponent 4 of what is positive.
    """

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        (tokens,) = self.vit.get_intermediate_layers(images, n=1)  # [B, 1 + N, D]
        pooled = tokens[:, 1:].clamp(min=1e-6).pow(4).mean(dim=1).pow(0.25)
        return torch.cat((tokens[:, 0], pooled), dim=1)


def extract(model, paths, args, device):
    """Features [N, 2·D] of images, in their order; None but on rank 0. Raises UserError if they are not finite."""
    square = transforms.Resize((args.imsize, args.imsize), interpolation=transforms.InterpolationMode.BICUBIC)
    shown = transforms.Compose([square, transforms.PILToTensor()])
    images = dino_data.EvalImages(dino_images.ImageFiles(paths), shown)
    loader = dino_data.eval_loader(images, args.batch_size_per_gpu, args.num_workers, device)
    features = dino_features.extract_features(model, loader, args.use_cuda)
    if features is not None:
        dino_features.check_finite_features(features)
    return features


def learn_whitening(features):
    """The PCA learned from features [N, D], which takes their mean off. Raises UserError if they are all the same.

    Its axes are those of the mean square, about 0 and not about the mean: the published figure was measured so.
    """
    x = features.cpu().double().numpy()  # not every GPU has float64
    pca = dino_features.PCA(dim=x.shape[1])
    pca.mean = x.mean(axis=0)
    if np.square(x - pca.mean).mean() <= 1e-10 * np.square(x).mean():
        raise UserError("--whitening_path needs images that differ, twenty thousand or so: these are all alike")
    if len(x) <= x.shape[1]:
        print(f"warning: {len(x)} images in --whitening_path are few for features {x.shape[1]} wide. Give more")
    pca.train_pca(x.T @ x / len(x))
    return pca


# ---- the evaluation ----


def average_precisions(queries, database, positives):
    """AP of each query [Q, D] over its 20 nearest in the database [N, D]; `positives` are the right ones' numbers."""
    nearest = (queries @ database.T).topk(min(20, len(database)), dim=1).indices.cpu().numpy()
    return [
        dino_features.compute_ap(np.flatnonzero(np.isin(row, right)), len(right))
        for row, right in zip(nearest, positives, strict=True)
    ]


@torch.no_grad()
def main(args):
    check_args(args)
    device = utils.init_distributed_mode(args)

    # ---- data, network ----
    blocks = find_blocks(args.data_path)
    truth = {block: positives(block, files, blocks["original"]) for block, files in blocks.items()}
    others = {
        flag: dino_data.image_files(getattr(args, flag), f"--{flag}")
        for flag in ("whitening_path", "distractors_path")
        if getattr(args, flag)
    }
    model = CopyFeatures(dino_backbones.frozen_backbone(args, device, args.imsize)[0])

    # ---- features ----
    features = {name: extract(model, paths, args, device) for name, paths in {**blocks, **others}.items()}
    if not utils.is_main_process():
        return
    if args.whitening_path:
        pca = learn_whitening(features.pop("whitening_path"))
        features = {name: pca.apply(rows) for name, rows in features.items()}
    features = {name: F.normalize(rows, dim=1) for name, rows in features.items()}

    # ---- search ----
    distractors = features.pop("distractors_path", features["original"][:0])
    database = torch.cat((features["original"], distractors))
    print(f"{len(database)} images to search among, {len(distractors)} of them distractors")
    for block, queries in features.items():
        found = average_precisions(queries, database, truth[block])
        print(f"eval on {block} mAP={np.mean(found):.3f} ({len(queries)} queries)")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
