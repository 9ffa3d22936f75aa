"""Image retrieval on revisited Oxford and Paris with frozen features (section 4.2.1 of the paper).

    python eval_image_retrieval.py --imsize 512 --multiscale true --data_path revisitop --dataset roxford5k
    python eval_image_retrieval.py --pretrained_weights runs/vits16 --data_path revisitop --dataset rparis6k

--data_path holds <dataset>/gnd_<dataset>.pkl, the revisited ground truth, and <dataset>/jpg/*.jpg. Prints mAP and mP@k
in percent for the Medium, Hard and Easy protocols. By default, uses the published ViT-S/16 trained on landmarks: mAP
51.5 (Medium) and 24.3 (Hard) on Oxford, 75.3 and 51.6 on Paris.
"""

import argparse
import codecs
import math
import os
import pickle

import numpy as np
import torch.nn.functional as F
from PIL import Image
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
    parents = [dino_cli.model_flags(), dino_cli.process_flags()]
    parser = argparse.ArgumentParser("Image retrieval", add_help=False, parents=parents)
    # fmt: off
    parser.add_argument("--data_path", default=".", metavar="DIR", help="Parent folder of the data set.")
    parser.add_argument("--dataset", default="roxford5k", metavar="NAME",
        help="roxford5k, rparis6k, or another data set with the same layout: gnd_<NAME>.pkl and jpg/*.jpg.")
    parser.add_argument("--imsize", default=224, type=at_least(1), metavar="PIXELS",
        help="Longest side of an image; larger images are scaled down. The published results use 512.")
    parser.add_argument("--multiscale", default=False, type=bool_flag, metavar="BOOL",
        help="Average the features at scales 1, 0.71 and 0.5. Improves mAP by some points, at 1.75 times the cost.")
    parser.add_argument("--use_cuda", default=True, type=bool_flag, metavar="BOOL",
        help="Keep the features on the GPU, if there is one. false: in main memory.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for an unknown --arch."""
    dino_backbones.check_arch(args.arch)


# ---- data ----


# The functions that a pickle of NumPy scalars and arrays calls, under the module names of NumPy 1 and 2, and the ones
# that a pickle of bytes calls in protocols 0 to 2. No other function may be called.
PICKLED_AS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    ("__builtin__", "bytes"): bytes,
    **{(f"numpy.{core}.multiarray", "scalar"): np.float64(0).__reduce__()[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): np.empty(1).__reduce_ex__(5)[0] for core in ("core", "_core")},
}


class GroundTruthUnpickler(pickle.Unpickler):
    """Reads plain containers, numbers, strings and NumPy arrays. Anything else is a UserError, and is not run."""

    def find_class(self, module, name):
        if (module, name) not in PICKLED_AS:
            raise UserError(f"it holds a {module}.{name}, which could run code when loaded")
        return PICKLED_AS[module, name]


class OxfordParisDataset(dino_data.EvalImages):
    """Images of one `split` ("database" or "query"), and the ground truth in `cfg`.

    `cfg` has `imlist`, `qimlist` and `gnd`: per query, the indices of its easy, hard and junk images in the database.
    Query images are not cropped to the bounding box. Raises UserError if a file is missing or damaged, or if an image
    is smaller than `least_side` pixels.
    """

    def __init__(self, dir_main, dataset, split, transform=None, imsize=None, least_side=1):
        root = os.path.join(dir_main, dataset)
        self.cfg = load_ground_truth(os.path.join(root, f"gnd_{dataset}.pkl"))
        self.imsize, self.least_side = imsize, least_side
        names = self.cfg["qimlist" if split == "query" else "imlist"]
        paths = [os.path.join(root, "jpg", f"{name}.jpg") for name in names]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            number = f"{len(missing)} of the {len(paths)} {split} images"
            raise UserError(f"{number} are missing: {utils.summarize(missing)}. Check --data_path")
        super().__init__(dino_files.ImageFiles(paths), transform or transforms.PILToTensor())

    def load(self, i):
        image = super().load(i)
        if self.imsize is not None:
            image.thumbnail((self.imsize, self.imsize), Image.Resampling.LANCZOS)
        if min(image.size) < self.least_side:
            width, height = image.size
            size = f"{self.images.name(i)} has {width} × {height} pixels"
            raise UserError(f"{size}, at least {self.least_side} are needed. Raise --imsize, or remove the image")
        return image


def load_ground_truth(path):
    """The ground truth in gnd_<dataset>.pkl: {imlist, qimlist, gnd: [{easy, hard, junk}]}. Raises UserError."""
    try:
        with open(path, "rb") as file:
            cfg = GroundTruthUnpickler(file, encoding="latin1").load()
    except OSError as e:
        raise UserError(f"can't read the ground truth {path}: {e.strerror}. Check --data_path and --dataset") from e
    except Exception as e:  # damaged pickles raise almost any exception
        raise UserError(f"the ground truth {path} was not loaded: {e}") from e
    try:
        lists = [[str(name) for name in cfg[key]] for key in ("imlist", "qimlist")]
        gnd = [{key: [int(i) for i in query[key]] for key in ("easy", "hard", "junk")} for query in cfg["gnd"]]
        numbers = [i for query in gnd for key in query.values() for i in key]
        if len(gnd) != len(lists[1]) or not all(lists) or not all(0 <= i < len(lists[0]) for i in numbers):
            raise ValueError("its lists are empty, or do not match")
        if not any(query["easy"] or query["hard"] for query in gnd):
            raise ValueError("no query has an easy or hard image")
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as e:
        raise UserError(f"{path} must hold imlist, qimlist and gnd (easy, hard, junk): {e}") from e
    # An image listed twice lowers the average precision, but it is no reason to stop.
    twice = [i for i, query in enumerate(gnd) if len(set().union(*query.values())) < sum(map(len, query.values()))]
    if twice:
        utils.log(f"warning: {path} lists an image twice for queries {utils.summarize(list(map(str, twice)))}")
    return {"imlist": lists[0], "qimlist": lists[1], "gnd": gnd}


# ---- mean average precision ----

# Lists of images that count as positives, and lists that are ignored, per protocol (arXiv 1803.11285, section 3).
PROTOCOLS = {
    "Medium": (("easy", "hard"), ("junk",)),
    "Hard": (("hard",), ("junk", "easy")),
    "Easy": (("easy",), ("junk", "hard")),
}


def protocol_truth(gnd, protocol):
    """Ground truth of a protocol in the format of `compute_map`: [{"ok": indices, "junk": indices}], one per query."""
    ok, junk = PROTOCOLS[protocol]
    return [
        {"ok": [i for key in ok for i in query[key]], "junk": [i for key in junk for i in query[key]]} for query in gnd
    ]


# ---- the evaluation ----


def main(args):
    """Run the evaluation. Raises UserError for a mistake in the arguments or the data."""
    dino_checkpoints.follow_run(args)
    check_args(args)
    device = utils.init_distributed_mode(args)

    # ---- data, network ----
    patch = args.patch_size if dino_backbones.vit_factory(args.arch) else 1
    least_side = 2 * patch if args.multiscale else patch  # one patch, also at half the size
    inputs = dino_checkpoints.photograph_inputs(args.pretrained_weights)
    transform = transforms.Compose(dino_crops.last_transforms(inputs))
    splits = [
        OxfordParisDataset(args.data_path, args.dataset, split, transform, args.imsize, least_side)
        for split in ("database", "query")
    ]
    utils.log(f"{len(splits[0])} images in the database, {len(splits[1])} queries")
    amp_dtype = dino_features.pick_dtype(device, args.amp_dtype)
    model, _ = dino_backbones.frozen_backbone(args, device, args.imsize, "landmarks", inputs, amp_dtype)

    # ---- features: batches of one image, because sizes differ ----
    loaders = [dino_data.eval_loader(split, 1, args.num_workers, device) for split in splits]
    try:
        how = {"use_cuda": args.use_cuda, "multiscale": args.multiscale, "amp_dtype": amp_dtype}
        features = [dino_features.extract_features(model, loader, **how) for loader in loaders]
    except (RuntimeError, AssertionError) as e:  # some networks need a certain shape; ours do not
        if dino_backbones.vit_factory(args.arch):
            raise
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--arch {args.arch} does not support images of any shape: {reason}. Use another") from e
    if not utils.is_main_process():
        return
    dino_features.check_finite_features(*features)

    # ---- ranking ----
    database, queries = (F.normalize(part, dim=1) for part in features)  # [N, D], [Q, D]
    ranks = (database @ queries.T).argsort(dim=0, descending=True).cpu().numpy()  # [N, Q]
    print_results(ranks, splits[0].cfg["gnd"], args.dataset)


def print_results(ranks, gnd, dataset, kappas=(1, 5, 10)):
    """Print mAP and mP@k per protocol. `ranks` [N, Q] are indices into the database, best first, per query."""
    for protocol in PROTOCOLS:
        mean_ap, _, precisions, _ = dino_features.compute_map(ranks, protocol_truth(gnd, protocol), kappas)
        if math.isnan(mean_ap):
            print(f">> {dataset} {protocol}: no query has a positive")
            continue
        at = ", ".join(f"mP@{k} {100 * precision:.2f}" for k, precision in zip(kappas, precisions, strict=True))
        print(f">> {dataset} {protocol}: mAP {100 * mean_ap:.2f}, {at}")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
