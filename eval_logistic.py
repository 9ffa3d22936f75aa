"""Logistic regression on frozen features (appendix A and tables 10 and 12 of the paper).

    python eval_logistic.py --data_path imagenet                            # published ViT-S/16: 75.7 % top-1
    python eval_logistic.py --data_path imagenet --train_list 1percent.txt  # with 13 images per class: 64.5 %
    python eval_logistic.py --data_path VOCdevkit/VOC2007                   # several labels per image: 89.2 mAP
    python eval_logistic.py --load_features features                        # the files of --dump_features

--data_path holds train/<class>/* and val/<class>/*, or other layouts of eval_knn.py, or is a folder of VOC. Images are
resized and center-cropped, without augmentation. Prints top-1 and top-5 accuracy in percent; for VOC the mean average
precision.

The classifier W [classes, D] has no intercept. It minimizes

    mean over the n training images of -log softmax(W x)[label]  +  lambda / 2 * |W|^2,    lambda = 0.1 / n.

The authors give lambda, no intercept, and at most 100 iterations (issue #121), without the formula. This one is that of
cyanure, the library that the paper names; scikit-learn's C would be 1 / 0.1. Features x are the CLS token of the last
block, or pooled features of a convnet, scaled to length 1 as for k-NN; the sources do not say whether the authors scale
them. With several labels per image, each has a binary regression of the same form, on the images that count for it.
"""

import argparse
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_crops
import dino_data
import dino_features
import dino_files
import utils
from dino_cli import at_least, positive
from utils import UserError, bool_flag

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parents = [dino_cli.model_flags(), dino_cli.feature_flags()]
    parser = argparse.ArgumentParser("Logistic regression", add_help=False, parents=parents)
    # fmt: off
    parser.add_argument("--train_list", default=None, metavar="FILE", help="""Train on these images only: a text file
        with a file name per line, such as n01440764_10074.JPEG. SimCLR's lists of 1 %% and 10 %% of ImageNet are such
        files. Default: all images of train.""")
    parser.add_argument("--l2", default=[0.1], nargs="+", type=positive, metavar="L2", help="""Strength of the penalty,
        one or more values: lambda is L2 / n for n training images. A larger value makes smaller weights; try 0.01 to
        100 on your own data.""")
    parser.add_argument("--normalize", default=True, type=bool_flag, metavar="BOOL", help="""Scale each feature vector
        to length 1. Without, L2 has less effect on features that are long, such as a ViT's.""")
    parser.add_argument("--max_iterations", default=100, type=at_least(1), metavar="N",
        help="End after N iterations of L-BFGS in any case, with a warning if this is too early.")
    parser.add_argument("--tolerance", default=1e-4, type=positive, metavar="LOSS",
        help="End when the objective is at most this far above its minimum. The gradient bounds the distance.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for flags that contradict each other."""
    if args.load_features is not None and (args.dump_features is not None or args.train_list is not None):
        raise UserError("--load_features has no images. Remove --dump_features and --train_list")
    if not args.normalize and (args.load_features is not None or args.dump_features is not None):
        raise UserError("files of features have vectors of length 1. Remove --normalize false, or compute them anew")
    if dino_backbones.vit_factory(args.arch):
        dino_cli.check_whole_patches("image_size", args.image_size, args.patch_size)


# ---- data ----


def find_sets(args, inputs):
    """(train, test, labels of train, labels of test, names of the classes). Raises UserError.

    Labels are class indices [N], or [N, C] of 1, -1 and 0 if --data_path is a folder of VOC.
    """
    transform = dino_crops.eval_transform(args.image_size, inputs)
    year = os.path.join(args.data_path, "VOC2007")
    if os.path.isdir(year):
        raise UserError(f"--data_path {args.data_path} has a folder per year. Use --data_path {year}")
    if os.path.isdir(os.path.join(args.data_path, "ImageSets", "Main")):
        classes, *parts = read_voc(args.data_path)
        images = [dino_files.ImageFiles(paths, exif=args.exif) for paths, _ in parts]
        sets = [dino_data.EvalImages(part, transform, inputs=inputs) for part in images]
        sets += [labels for _, labels in parts]
    else:
        sets = dino_data.find_labeled(args.data_path, transform, args.exif, "--data_path", inputs, args.list_columns)
        classes = sets[0].images.classes
    train, test, train_labels, test_labels = sets
    if args.train_list is not None:
        numbers = find_listed(train.images, args.train_list)
        train.images, train_labels = train.images.take(numbers), train_labels[numbers]
    return train, test, train_labels, test_labels, classes


def find_listed(images, path):
    """Sorted indices of the images that a list names by file name, or by the end of their paths. Raises UserError."""
    places = defaultdict(list)
    for i in range(len(images)):
        places[os.path.basename(images.name(i))].append(i)
    numbers, missing, unclear = set(), [], []
    for name in dict.fromkeys(name for name, *_ in dino_files.read_list(path, "--train_list")):
        found = [i for i in places[os.path.basename(name)] if f"/{images.name(i)}".endswith(f"/{name}")]
        numbers.update(found)
        if len(found) != 1:
            (unclear if found else missing).append(name)
    if missing:
        what = f"images that are not in train ({len(missing)}): {utils.summarize(missing)}"
        raise UserError(f"--train_list {path} names {what}. Check --data_path")
    if unclear:
        what = f"images that are in train more than once ({len(unclear)}): {utils.summarize(unclear)}"
        raise UserError(f"--train_list {path} names {what}. Write class/name")
    return sorted(numbers)


def read_voc(root):
    """(names of the classes, (paths, labels [N, C]) of trainval, the same of test) of a folder such as VOC2007.

    Reads ImageSets/Main/<class>_trainval.txt and <class>_test.txt, whose lines are an image and 1 (has the class), -1
    (has not) or 0 (difficult). Raises UserError if a file is missing or has other lines.
    """
    lists = os.path.join(root, "ImageSets", "Main")
    names = sorted(name for name in os.listdir(lists) if name.endswith("_trainval.txt"))
    classes = [name.removesuffix("_trainval.txt") for name in names]
    if not classes:
        raise UserError(f"{lists} has no lists <class>_trainval.txt. Unpack the annotations of VOC there")
    parts = []
    for part in ("trainval", "test"):
        columns = [read_voc_list(os.path.join(lists, f"{name}_{part}.txt")) for name in classes]
        for name, column in zip(classes, columns, strict=True):
            if column.keys() != columns[0].keys():
                what = f"{classes[0]}_{part}.txt and {name}_{part}.txt"
                raise UserError(f"{lists}: {what} list different images. Unpack the annotations of VOC again")
        labels = torch.tensor([[column[image] for column in columns] for image in columns[0]])
        parts.append(([os.path.join(root, "JPEGImages", f"{image}.jpg") for image in columns[0]], labels))
    missing = [path for paths, _ in parts for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{len(missing)} images of {lists} are not there: {utils.summarize(missing)}")
    return classes, *parts


def read_voc_list(path):
    """{image: 1, -1 or 0} of a file such as aeroplane_test.txt. Raises UserError."""
    try:
        rows = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not text"
        raise UserError(f"can't read {path}: {reason}. VOC's test annotations are an archive of their own") from e
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or row[1] not in ("1", "-1", "0"):
            raise UserError(f"{path}: line {number} must be an image and 1, -1 or 0, not {' '.join(row)[:80]!r}")
    if not rows:
        raise UserError(f"{path} is empty. Unpack the annotations of VOC again")
    return {image: int(label) for image, label in rows}


def extract(args, device):
    """(the four tensors of `dino_features.labeled_features`, names of the classes); the tensors on rank 0 only."""
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights)
    *sets, classes = find_sets(args, inputs)
    utils.log(f"{len(sets[0])} training and {len(sets[1])} validation images in {len(classes)} classes")
    utils.fix_random_seeds(0)  # an untrained network has the same weights in every run
    amp_dtype = dino_features.pick_dtype(device, args.amp_dtype)
    model, _ = dino_backbones.frozen_backbone(args, device, args.image_size, inputs=inputs, amp_dtype=amp_dtype)
    how = (args.batch_size_per_gpu, args.num_workers, device, args.use_cuda)
    return dino_features.labeled_features(model, sets, *how, amp_dtype=amp_dtype, unit=args.normalize), classes


# ---- the regression ----

LOGITS_AT_ONCE = 2**24  # in memory at a time: 128 MB


class Objective:
    """Mean logistic loss plus lambda / 2 * |W|^2 over features [n, D] (see the top of the file), in float64.

    Labels [n] from 0 make one problem of all classes. Labels [n, C] of 1, -1 and 0 (not counted) make C binary problems
    with a lambda each, and the objective is their sum.
    """

    def __init__(self, features, labels, l2, num_classes):
        self.features, self.labels, self.num_classes = features, labels, num_classes
        self.counts = torch.as_tensor(len(labels)) if labels.ndim == 1 else (labels != 0).sum(dim=0)  # [] or [C]
        self.counts = self.counts.clamp(min=1).to(features.device, torch.float64)
        self.lambdas = l2 / self.counts
        self.rows = max(LOGITS_AT_ONCE // num_classes, 1)

    def losses(self, logits, labels):
        """The losses of some rows of logits [b, C], each as its share of the mean."""
        if labels.ndim == 1:
            return F.cross_entropy(logits, labels, reduction="sum") / self.counts
        each = F.softplus(-labels * logits) * (labels != 0)
        return (each / self.counts).sum()

    def measure(self, weight):
        """(objective, gradient [C, D], how far above its minimum it can be) at weight [C, D].

        The objective of a problem is lambda-strongly convex. So it is at most |gradient|^2 / (2 lambda) above its
        minimum, which is also the duality gap. The largest of the problems counts.
        """
        weight = weight.detach().requires_grad_()
        total = (self.lambdas / 2 * weight.square().sum(dim=1)).sum()
        total.backward()
        chunks = zip(self.features.split(self.rows), self.labels.split(self.rows), strict=True)
        for features, labels in chunks:
            loss = self.losses(features.double() @ weight.T, labels)
            loss.backward()
            total = total + loss.detach()
        squares = weight.grad.square().sum(dim=1)  # [C]
        gap = squares.sum() / (2 * self.lambdas) if self.labels.ndim == 1 else (squares / (2 * self.lambdas)).max()
        return total.detach(), weight.grad, gap.item()

    def scale(self):
        """Lower triangular S [D, D]: S S^T is about the Hessian at W = 0, in the weights of one class."""
        gram = torch.zeros(2 * self.features.shape[1:], dtype=torch.float64, device=self.features.device)
        for features in self.features.split(self.rows):
            gram += features.double().T @ features.double()
        share = 1 / self.num_classes if self.labels.ndim == 1 else 1 / 4
        gram *= share / len(self.features)
        gram.diagonal().add_(torch.maximum(self.lambdas.mean(), 1e-9 * gram.diagonal().mean()))
        return torch.linalg.cholesky(gram)


STEPS = 5  # iterations after which it is checked how far the minimum is


def fit(features, labels, num_classes, l2=0.1, max_iterations=100, tolerance=1e-4):
    """The weights W [C, D], float64, that minimize the Objective. Warns if they are not within the tolerance.

    L-BFGS runs on V with W = V S^-1, S from `Objective.scale`. The minimum is the same. But features vary much more in
    some directions than in others, and in V the objective curves alike in all of them: tens of iterations instead of
    hundreds.
    """
    objective = Objective(features, labels, l2, num_classes)
    scale = objective.scale()
    start = {"dtype": torch.float64, "device": features.device}
    variable = torch.zeros(num_classes, features.shape[1], **start, requires_grad=True)  # V
    how = {"max_iter": STEPS, "max_eval": 25 * STEPS, "tolerance_grad": 0, "tolerance_change": 0, "history_size": 20}
    optimizer = torch.optim.LBFGS([variable], **how, line_search_fn="strong_wolfe")

    def weight():
        return torch.linalg.solve_triangular(scale, variable.detach(), upper=False, left=False)

    def closure():
        value, gradient, _ = objective.measure(weight())
        variable.grad = torch.linalg.solve_triangular(scale.T, gradient, upper=True, left=False).contiguous()
        return value

    done, gap = 0, float("inf")
    while done < max_iterations and not gap <= tolerance:
        optimizer.param_groups[0]["max_iter"] = min(STEPS, max_iterations - done)
        optimizer.step(closure)
        done += optimizer.param_groups[0]["max_iter"]
        value, _, gap = objective.measure(weight())
        utils.log(f"L-BFGS: [{done}/{max_iterations}]  objective: {value:.6f}, at most {gap:.1e} above its minimum")
    if not gap <= tolerance:
        utils.log(
            f"warning: after {done} iterations the objective may still be {gap:.1e} above its minimum. Raise "
            "--max_iterations, or --l2"
        )
    return weight()


# ---- accuracies ----


@torch.no_grad()
def accuracies(weight, features, labels):
    """(top-1, top-5) in percent of labels [N]. With fewer than 5 classes, top-5 uses all of them."""
    hits = torch.zeros(2, dtype=torch.float64)
    rows = max(LOGITS_AT_ONCE // len(weight), 1)
    for chunk, target in zip(features.split(rows), labels.split(rows), strict=True):
        percent = dino_features.accuracy(chunk.double() @ weight.T, target, (1, min(5, len(weight))))
        hits += torch.stack(percent).cpu() * len(target)
    return tuple((hits / len(labels)).tolist())


def average_precisions(scores, labels):
    """Average precision of a class, from 0 to 1, in the two forms of VOC: (11 points, area under the curve).

    `scores` [N], `labels` [N] of 1, -1 and 0 (not counted). The precision at a recall is the best at this recall or a
    larger one. VOC2007 takes its mean at recalls 0, 0.1, ..., 1; since 2010 it is the area under this curve. NaN if no
    image has the label.
    """
    scores, labels = (np.asarray(values)[np.asarray(labels) != 0] for values in (scores, labels))
    hits = labels[np.argsort(-scores, kind="stable")] > 0
    if not hits.any():
        return np.nan, np.nan
    found = np.cumsum(hits)
    recall = found / found[-1]
    precision = np.maximum.accumulate((found / np.arange(1, len(hits) + 1))[::-1])[::-1]
    points = precision[np.searchsorted(recall, np.arange(11) / 10)]
    return points.mean(), (np.diff(recall, prepend=0) * precision).sum()


# ---- the evaluation ----


def main(args):
    """Run the evaluation. Raises UserError for a mistake in the arguments or the data."""
    dino_checkpoints.follow_run(args)
    check_args(args)
    if args.dump_features is not None:
        dino_cli.check_output_dir(args.dump_features, "--dump_features", dino_features.FEATURE_FILES)
    device = utils.init_distributed_mode(args)
    if args.load_features is not None:
        place = device if args.use_cuda else "cpu"
        tensors, classes = dino_features.load_features(args.load_features, place, multilabel=True), None
    else:
        tensors, classes = extract(args, device)
    if not utils.is_main_process():
        return
    if args.dump_features is not None:
        dino_features.dump_features(tensors, args.dump_features)
        utils.log(f"features saved to {args.dump_features}")
    if tensors[0].device.type == "mps":  # has no float64
        tensors = [tensor.cpu() for tensor in tensors]
    dino_features.check_finite_features(tensors[0], tensors[2])
    for l2 in args.l2:
        if tensors[1].ndim == 1:
            print_accuracies(tensors, l2, args)
        else:
            print_precisions(tensors, classes or range(tensors[1].shape[1]), l2, args)


def print_accuracies(tensors, l2, args):
    """Fit one classifier of all classes and print its accuracies."""
    train, train_labels, test, test_labels = tensors
    classes, labels = torch.cat((train_labels, test_labels)).unique(return_inverse=True)  # renumbered without gaps
    train_labels, test_labels = labels.split((len(train_labels), len(test_labels)))
    if len(train_labels.unique()) < 2:
        raise UserError("there is only one class in the training images. Name images of several classes")
    weight = fit(train, train_labels, len(classes), l2, args.max_iterations, args.tolerance)
    top1, top5 = accuracies(weight, test, test_labels)
    utils.log(f"Logistic regression with --l2 {l2:g}: Top1: {top1:.2f}, Top5: {top5:.2f}")


def print_precisions(tensors, classes, l2, args):
    """Fit one classifier per class and print the average precisions."""
    train, train_labels, test, test_labels = tensors
    weight = fit(train, train_labels, len(classes), l2, args.max_iterations, args.tolerance)
    scores, labels = (test.double() @ weight.T).cpu().numpy(), test_labels.cpu().numpy()
    found = np.array([average_precisions(*columns) for columns in zip(scores.T, labels.T, strict=True)])
    for name, (points, area) in zip(classes, 100 * found, strict=True):
        utils.log(f"{name!s:20} AP: {points:.2f} (11 points), {area:.2f} (area)")
    counted = found[~np.isnan(found[:, 0])]
    if not len(counted):
        raise UserError("no test image has a label. Check --data_path")
    if len(counted) < len(found):
        utils.log(f"note: {len(found) - len(counted)} classes have no test image and do not count")
    points, area = 100 * counted.mean(axis=0)
    utils.log(f"Logistic regression with --l2 {l2:g}: mAP: {points:.2f} (11 points), {area:.2f} (area)")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
