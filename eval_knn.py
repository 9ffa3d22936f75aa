"""Weighted k-nearest-neighbour classification with frozen features (section 4.1 of the paper).

    python eval_knn.py --arch vit_small --patch_size 16 --data_path imagenet       # the published ViT-S/16: 74.5 %
    python eval_knn.py --pretrained_weights runs/vits16/checkpoint.pth --checkpoint_key teacher --data_path imagenet
    python eval_knn.py --load_features features                                    # what --dump_features features left

--data_path holds train/<class>/* and val/<class>/*. Prints top-1 and top-5 accuracy in per cent for each k.
"""

import argparse
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

import dino_data
import utils
from utils import UserError, bool_flag, extract_features

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("k-NN evaluation", add_help=False)
    # fmt: off
    parser.add_argument("--data_path", default="sample", metavar="DIR", help="""Folder with train/ and val/, in each a
        sub-folder per class; `sample` is a small set made from photographs that are installed already.""")
    parser.add_argument("--nb_knn", default=[10, 20, 100, 200], nargs="+", type=int, metavar="K",
        help="Numbers of neighbours. Around 20 works best as a rule; fewer if the classes are small.")
    parser.add_argument("--temperature", default=0.07, type=float, metavar="T",
        help="A neighbour votes with weight exp(similarity / T): the lower, the more the nearest ones count.")
    parser.add_argument("--arch", default="vit_small", metavar="NAME", help="Network, named as for main_dino.py.")
    parser.add_argument("--patch_size", default=16, type=int, metavar="PIXELS", help="Side of a ViT's patches.")
    parser.add_argument("--pretrained_weights", default="", metavar="FILE", help="""Checkpoint or state dict. Without
        one, the published weights for --arch and --patch_size; `random` leaves the network untrained.""")
    parser.add_argument("--checkpoint_key", default="teacher", metavar="KEY",
        help="Which network of a training checkpoint: teacher or student. The teacher is the better one.")
    parser.add_argument("--image_size", default=224, type=int, metavar="PIXELS", help="""Side of the images that the
        network sees: the centre of the image after resizing to 8/7 of it. Best as it was in training.""")
    parser.add_argument("--baselines", default=False, type=bool_flag, metavar="BOOL", help="""Print one table that sets
        the weights against chance, raw pixels and the same network untrained.""")
    parser.add_argument("--batch_size_per_gpu", default=128, type=int, metavar="B", help="Images per forward pass.")
    parser.add_argument("--use_cuda", default=True, type=bool_flag, metavar="BOOL",
        help="Keep features on the GPU, if there is one. false: in main memory, slower, where more of them fit.")
    parser.add_argument("--dump_features", default=None, metavar="DIR",
        help="Write features and labels there: trainfeat.pth, testfeat.pth, trainlabels.pth, testlabels.pth.")
    parser.add_argument("--load_features", default=None, metavar="DIR",
        help="Classify with features that --dump_features wrote, without any network.")
    parser.add_argument("--num_workers", default=10, type=int, metavar="N", help="Processes that load images.")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
        help="auto takes a GPU if there is one.")
    parser.add_argument("--dist_url", default="env://", metavar="URL", help="Where several processes meet.")
    parser.add_argument("--local_rank", "--local-rank", default=0, type=int, metavar="N",
        help="Accepted because launchers pass it; not used.")
    # fmt: on
    return parser


def check_args(args):
    for k in args.nb_knn:
        if k < 1:
            raise UserError(f"--nb_knn {k} must be at least 1")
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature} must be above 0")
    for flag in ("patch_size", "image_size", "batch_size_per_gpu"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} must be at least 1")
    if args.image_size < args.patch_size and utils.vit_factory(args.arch):
        raise UserError(f"--image_size {args.image_size} is smaller than one patch (--patch_size {args.patch_size})")


# ---- features ----


def build_model(args, device, weights):
    model, _ = utils.build_backbone(args.arch, args.patch_size, args.image_size)
    utils.load_weights(model, weights, args.checkpoint_key, args.arch, args.patch_size)
    utils.use_fused_attention(model, device)
    return model.to(device).eval()


def raw_pixels():
    """The image itself as the feature, at 16 × 16 pixels: what any network has to beat."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten())


def labelled_features(model, sets, args, device):
    """(train features, train labels, test features, test labels), the features L2-normalised; None but on rank 0."""
    train, val, train_labels, val_labels = sets
    features = []
    for dataset in (train, val):
        loader = dino_data.eval_loader(dataset, args.batch_size_per_gpu, args.num_workers, device)
        features.append(extract_features(model, loader, args.use_cuda))
    if not utils.is_main_process():
        return None
    train_features, val_features = (F.normalize(f, dim=1) for f in features)
    return train_features, train_labels.to(train_features.device), val_features, val_labels.to(val_features.device)


# Names of the dumped files, in the order of `labelled_features`.
FEATURE_FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def dump_features(tensors, folder):
    utils.check_output_dir(folder)
    for tensor, name in zip(tensors, FEATURE_FILES, strict=True):
        utils.save_on_master(tensor.cpu(), os.path.join(folder, name))


def load_features(folder, device):
    tensors = [utils.load_checkpoint(os.path.join(folder, name)) for name in FEATURE_FILES]
    for part, features, labels in (("train", *tensors[:2]), ("test", *tensors[2:])):
        if not (isinstance(features, torch.Tensor) and isinstance(labels, torch.Tensor) and features.ndim == 2):
            raise UserError(f"{folder}/{part}feat.pth and {part}labels.pth must hold tensors, [N, D] and [N]")
        if len(features) != len(labels) or not len(features):
            raise UserError(f"{folder} has {len(features)} {part} features and {len(labels)} labels")
    if tensors[0].shape[1] != tensors[2].shape[1]:
        raise UserError(f"{folder}: train features are {tensors[0].shape[1]} wide, test features {tensors[2].shape[1]}")
    return [tensor.to(device) for tensor in tensors]


# ---- classifier ----

SIMILARITIES_AT_ONCE = 2**25  # test × train similarities held at a time: 128 MB


@torch.no_grad()
def nearest_neighbours(train_features, train_labels, test_features, k):
    """Cosine similarities and labels of each test image's k nearest training images, best first: two [N_test, k]."""
    rows = max(SIMILARITIES_AT_ONCE // len(train_features), 1)
    similarities, labels = [], []
    for chunk in test_features.split(rows):
        similarity, index = (chunk @ train_features.T).topk(k, dim=1)
        similarities.append(similarity)
        labels.append(train_labels[index])
    return torch.cat(similarities), torch.cat(labels)


@torch.no_grad()
def vote(similarities, neighbour_labels, test_labels, T, num_classes):
    """(top-1, top-5) in per cent, where neighbour j votes for its class with weight exp(similarity_j / T).

    With k < 5 neighbours top-5 is top-k. Classes with equal votes rank by their number.
    """
    k = similarities.shape[1]
    rows = max(SIMILARITIES_AT_ONCE // num_classes, 1)
    class_numbers = torch.arange(num_classes, device=test_labels.device)
    top1 = top5 = 0
    for sims, neighbours, target in zip(
        similarities.split(rows), neighbour_labels.split(rows), test_labels.split(rows), strict=True
    ):
        weights = ((sims - sims[:, :1]) / T).exp()  # relative to the nearest: no overflow, the same ranks
        votes = weights.new_zeros(len(sims), num_classes).scatter_add_(1, neighbours, weights)
        target = target[:, None]
        votes_of_target = votes.gather(1, target)
        before = (votes > votes_of_target) | ((votes == votes_of_target) & (class_numbers < target))
        rank = before.sum(dim=1)  # of the right class; 0 is the best
        top1 += (rank < 1).sum().item()
        top5 += (rank < min(5, k)).sum().item()
    return 100.0 * top1 / len(test_labels), 100.0 * top5 / len(test_labels)


def knn_classifier(train_features, train_labels, test_features, test_labels, k, T, num_classes=1000):
    """Weighted k-NN accuracy of L2-normalised features: (top-1, top-5) in per cent.

    Features [N, D], labels [N] of class numbers from 0; more than `num_classes` classes are counted from the labels.
    A k above the number of training images means all of them. Memory is bounded for any number of images.
    """
    return knn_accuracies(train_features, train_labels, test_features, test_labels, [k], T, num_classes)[k]


def knn_accuracies(train_features, train_labels, test_features, test_labels, ks, T, num_classes=1):
    """{k: (top-1, top-5)} as `knn_classifier` gives them for each k of a list, from one search."""
    num_classes = max(num_classes, int(train_labels.max()) + 1, int(test_labels.max()) + 1)
    most = min(max(ks), len(train_features))
    similarities, labels = nearest_neighbours(train_features, train_labels, test_features, most)
    return {k: vote(similarities[:, :k], labels[:, :k], test_labels, T, num_classes) for k in ks}


# ---- the evaluation ----


def main(args):
    check_args(args)
    device = utils.init_distributed_mode(args)
    if args.load_features:
        print_accuracies(load_features(args.load_features, device if args.use_cuda else "cpu"), args)
        return
    sets = dino_data.labelled_folders(dino_data.find_data(args.data_path), dino_data.eval_transform(args.image_size))
    utils.log(f"{len(sets[0])} training and {len(sets[1])} validation images in {len(sets[0].classes)} classes")
    utils.fix_random_seeds(0)  # what is called untrained is the same network each time
    trained = f"trained {args.checkpoint_key}"
    rows = {trained: build_model(args, device, args.pretrained_weights)}
    if args.baselines:
        rows = {"raw pixels": raw_pixels(), "untrained network": build_model(args, device, "random"), **rows}
    features = {name: labelled_features(model, sets, args, device) for name, model in rows.items()}
    if not utils.is_main_process():
        return
    if args.dump_features:
        dump_features(features[trained], args.dump_features)
        utils.log(f"features are in {args.dump_features}")
    print_accuracies(features[trained], args)
    if args.baselines:
        print_table(features, args)


def print_accuracies(features, args):
    if not utils.is_main_process():
        return
    if max(args.nb_knn) > len(features[0]):
        print(f"note: there are only {len(features[0])} training images; a larger k uses all of them")
    for k, (top1, top5) in knn_accuracies(*features, args.nb_knn, args.temperature).items():
        print(f"{k}-NN classifier result: Top1: {top1}, Top5: {top5}")


def print_table(features, args):
    """Top-1 of each row, a column per k, below chance."""
    test_labels = next(iter(features.values()))[3]
    chance = 100.0 * torch.bincount(test_labels).max().item() / len(test_labels)  # always saying the commonest class
    print("\nk-NN top-1 (%)      " + "".join(f"{f'k={k}':>8}" for k in args.nb_knn))
    print(f"{'chance':20}" + f"{chance:8.1f}" * len(args.nb_knn))
    for name, tensors in features.items():
        accuracies = knn_accuracies(*tensors, args.nb_knn, args.temperature)
        print(f"{name:20}" + "".join(f"{accuracies[k][0]:8.1f}" for k in args.nb_knn))


if __name__ == "__main__":
    utils.run(main, get_args_parser(), __doc__)
