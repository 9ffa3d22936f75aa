"""Copy detection on Copydays with frozen features (section 4.2.1 of the paper).

    python eval_copy_detection.py --data_path copydays                                  # published ViT-B/8, 320 pixels
    python eval_copy_detection.py --data_path copydays --whitening_path yfcc/20k --distractors_path yfcc/10k
    python eval_copy_detection.py --pretrained_weights runs/vits16 --data_path copydays

--data_path holds the images in original/, and in any of strong/, jpegqual/<quality>/ and crops/<share>/. Each image of
these blocks is a query; the database is all originals and distractors. Prints the mean average precision per block.
Published: 0.858 on strong, with whitening and distractors.
"""

import argparse
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import transforms

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_crops
import dino_data
import dino_features
import dino_files
import utils
from dino_cli import at_least
from utils import UserError, bool_flag

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parents = [dino_cli.model_flags("vit_base", 8), dino_cli.process_flags()]
    parser = argparse.ArgumentParser("Copy detection", add_help=False, parents=parents)
    # fmt: off
    parser.add_argument("--data_path", default=".", metavar="DIR", help="Folder with the Copydays blocks.")
    parser.add_argument("--whitening_path", default="", metavar="DIR", help="""Learn a whitening of
        the features from the images in this folder: about 20,000 images that are not in the database.""")
    parser.add_argument("--distractors_path", default="", metavar="DIR",
        help="Add the images in this folder to the database. None of them is an original.")
    parser.add_argument("--imsize", default=320, type=at_least(1), metavar="PIXELS",
        help="Images are resized to a square of this size, ignoring the aspect ratio.")
    parser.add_argument("--batch_size_per_gpu", default=16, type=at_least(1), metavar="B",
        help="Images per forward pass.")
    parser.add_argument("--use_cuda", default=True, type=bool_flag, metavar="BOOL",
        help="Keep the features on the GPU, if there is one. false: in main memory.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError if --arch is not a ViT, or if --imsize does not fit its patches."""
    dino_backbones.check_vit(args.arch, "CLS and patch tokens")
    dino_cli.check_whole_patches("imsize", args.imsize, args.patch_size)


# ---- data ----

BLOCKS = (
    "original",
    "strong",
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{share}" for share in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
)


def find_blocks(data_path):
    """{block: image files} of the blocks that exist. Raises UserError without original/, or without another block."""
    found = [block for block in BLOCKS if os.path.isdir(os.path.join(data_path, block))]
    if "original" not in found or len(found) == 1:
        raise UserError(
            f"--data_path {data_path} must hold original/ and at least one of strong/, jpegqual/<n> and crops/<n>"
        )
    return {block: dino_data.image_files(os.path.join(data_path, block), "--data_path") for block in found}


PREFIX = 4  # characters of a name in Copydays that original and strong copies share


def positives(block, files, originals):
    """Per file of a block, the indices of its originals: same name without extension, or in `strong`, same prefix.

    In `strong`, names decide if all copies have the name of an original; otherwise the first 4 characters, if these
    tell the originals apart. In another block where no name matches, files and originals are paired in sorted order,
    if there is one file per original. Logs how pairs were made. Raises UserError for images without an original.
    """
    found, how = same_stem(files, originals, None), "by name"
    if block == "strong" and not all(found):
        check_prefixes(originals)
        found, how = same_stem(files, originals, PREFIX), f"by the first {PREFIX} characters of the names"
    if block != "strong" and not any(found) and len(files) == len(originals):
        found, how = [[i] for i in range(len(files))], "in sorted order: no names match"
    unmatched = [str(file) for file, indices in zip(files, found, strict=True) if not indices]
    if unmatched:
        raise UserError(
            f"{len(unmatched)} of the {len(files)} images in {block}/ have no original: {utils.summarize(unmatched)}. "
            f"Give copies the names of their originals; in strong/, the same first {PREFIX} characters are enough"
        )
    if block != "original":
        utils.log(f"pairs of {block}/ and original/: {how}")
    return found


def same_stem(files, originals, length):
    """Per file, the indices of the originals whose names without extension have the same first `length` characters."""
    return [[i for i, original in enumerate(originals) if original.stem[:length] == f.stem[:length]] for f in files]


def check_prefixes(originals):
    """Raise UserError if the prefixes of names do not tell the originals apart: any copy would match most of them.

    Two originals may share one, as the published protocol allows.
    """
    prefixes = {original.stem[:PREFIX] for original in originals}
    if len(originals) > 1 and 2 * len(prefixes) <= len(originals):
        raise UserError(
            f"the first {PREFIX} characters of names in original/ do not tell {len(originals)} images apart: they are "
            f"{utils.summarize(sorted(prefixes))}. Give copies in strong/ the whole names of their originals"
        )


# ---- features ----


class CopyFeatures(nn.Module):
    """CLS token and pooled patch tokens of a ViT: images [B, 3, H, W] -> [B, 2·D].

    The patch tokens, after the final norm, are pooled by GeM: the generalized mean with exponent 4, negative values
    clamped to about 0.
    """

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        (tokens,) = self.vit.get_intermediate_layers(images, n=1)  # [B, 1 + N, D]
        tokens = tokens.float()  # fourth powers would leave the range of fp16
        pooled = tokens[:, 1:].clamp(min=1e-6).pow(4).mean(dim=1).pow(0.25)
        return torch.cat((tokens[:, 0], pooled), dim=1)


def extract(model, paths, args, device, inputs=utils.RGB, amp_dtype=None):
    """Features [N, 2·D] of the images at `paths`, in order; None on ranks other than 0. Raises UserError for NaN."""
    square = transforms.Resize((args.imsize, args.imsize), interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([square, *dino_crops.last_transforms(inputs)])
    images = dino_data.EvalImages(dino_files.ImageFiles(paths), transform)
    loader = dino_data.eval_loader(images, args.batch_size_per_gpu, args.num_workers, device)
    features = dino_features.extract_features(model, loader, args.use_cuda, amp_dtype=amp_dtype)
    if features is not None:
        dino_features.check_finite_features(features)
    return features


def learn_whitening(features):
    """PCA of features [N, D] that subtracts their mean. Raises UserError if all features are the same.

    The axes are the eigenvectors of the second moment about 0, not about the mean. The published result was measured
    this way.
    """
    x = features.cpu().double().numpy()  # not every GPU has float64
    pca = dino_features.PCA(dim=x.shape[1])
    pca.mean = x.mean(axis=0)
    if np.square(x - pca.mean).mean() <= 1e-10 * np.square(x).mean():
        raise UserError("all images in --whitening_path have the same features. Use about 20,000 different images")
    if len(x) <= x.shape[1]:
        print(f"warning: only {len(x)} images in --whitening_path for {x.shape[1]} dimensions. Use about 20,000")
    pca.train_pca(x.T @ x / len(x))
    return pca


# ---- the evaluation ----


def average_precisions(queries, database, positives):
    """AP of each query [Q, D] over the 20 nearest images in the database [N, D]. `positives` are lists of indices."""
    nearest = (queries @ database.T).topk(min(20, len(database)), dim=1).indices.cpu().numpy()
    return [
        dino_features.compute_ap(np.flatnonzero(np.isin(row, correct)), len(correct))
        for row, correct in zip(nearest, positives, strict=True)
    ]


@torch.no_grad()
def main(args):
    """Run the evaluation. Raises UserError for a mistake in the arguments or the data."""
    dino_checkpoints.follow_run(args)
    if "imsize" not in getattr(args, "given", vars(args)):  # there are patches that 320 is no multiple of
        args.imsize = max(args.imsize // args.patch_size, 1) * args.patch_size
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
    inputs = dino_checkpoints.photograph_inputs(args.pretrained_weights)
    amp_dtype = dino_features.pick_dtype(device, args.amp_dtype)
    vit, _ = dino_backbones.frozen_backbone(args, device, args.imsize, inputs=inputs, amp_dtype=amp_dtype)
    model = CopyFeatures(vit)

    # ---- features ----
    how = (args, device, inputs, amp_dtype)
    features = {name: extract(model, paths, *how) for name, paths in {**blocks, **others}.items()}
    if not utils.is_main_process():
        return
    if args.whitening_path:
        pca = learn_whitening(features.pop("whitening_path"))
        features = {name: pca.apply(rows) for name, rows in features.items()}
    features = {name: F.normalize(rows, dim=1) for name, rows in features.items()}

    # ---- search ----
    distractors = features.pop("distractors_path", features["original"][:0])
    database = torch.cat((features["original"], distractors))
    print(f"database: {len(database)} images, including {len(distractors)} distractors")
    for block, queries in features.items():
        mean_ap = np.mean(average_precisions(queries, database, truth[block]))
        print(f"eval on {block} mAP={mean_ap:.3f} ({len(queries)} queries)")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
