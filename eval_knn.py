"""Weighted k-nearest-neighbor classification with frozen features (section 4.1 of the paper).

    python eval_knn.py --data_path imagenet                             # published ViT-S/16: 74.5 % top-1
    python eval_knn.py --pretrained_weights runs/vits16 --data_path imagenet
    python eval_knn.py --load_features features                         # reuse the files of --dump_features

--data_path holds train/<class>/* and val/<class>/*, or train.csv and val.csv; of class folders alone, every tenth image
is held out. Each validation image is classified by the k training images with the most similar features. Prints top-1
and top-5 accuracy in percent for each k.
"""

import argparse

import torch

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_crops
import dino_data
import dino_features
import utils
from dino_cli import at_least, positive
from dino_features import extract_features, knn_accuracies, knn_classifier, labeled_features  # noqa: F401 - public
from utils import UserError, bool_flag

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parents = [dino_cli.model_flags(), dino_cli.feature_flags()]
    parser = argparse.ArgumentParser("k-NN evaluation", add_help=False, parents=parents)
    # fmt: off
    parser.add_argument("--nb_knn", default=[10, 20, 100, 200], nargs="+", type=at_least(1), metavar="K",
        help="Number of neighbors, one or more values. 20 is a good default; use fewer if the classes are small.")
    parser.add_argument("--temperature", default=0.07, type=positive, metavar="T",
        help="Each neighbor votes with weight exp(similarity / T). A lower T favors the nearest neighbors.")
    parser.add_argument("--baselines", default=False, type=bool_flag, metavar="BOOL", help="""Also print a table that
        compares the weights with chance, raw pixels and the same network untrained.""")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for flags that contradict each other."""
    if args.load_features is not None and (args.dump_features is not None or args.baselines):
        raise UserError("--load_features runs no network. Remove --dump_features and --baselines")
    if dino_backbones.vit_factory(args.arch):
        dino_cli.check_whole_patches("image_size", args.image_size, args.patch_size)


# ---- features ----


def build_model(args, device, weights, in_chans=3, amp_dtype=None):
    """(frozen network with these weights, its name in the table)."""
    model, _ = dino_backbones.build_backbone(args.arch, args.patch_size, args.image_size, in_chans=in_chans)
    matched, _ = dino_backbones.load_weights(model, weights, args.checkpoint_key, args.arch, args.patch_size)
    name = f"trained {args.checkpoint_key}" if matched else "untrained network"
    return dino_backbones.prepare_for_evaluation(model, device, amp_dtype), name


# ---- the evaluation ----


def main(args):
    """Run the evaluation. Raises UserError for a mistake in the arguments or the data."""
    dino_checkpoints.follow_run(args)
    check_args(args)
    if args.dump_features is not None:
        dino_cli.check_output_dir(args.dump_features, "--dump_features", dino_features.FEATURE_FILES)
    device = utils.init_distributed_mode(args)
    if args.load_features is not None:
        features = dino_features.load_features(args.load_features, device if args.use_cuda else "cpu")
        print_accuracies(features, args)
        return
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights)
    transform = dino_crops.eval_transform(args.image_size, inputs)
    sets = dino_data.find_labeled(args.data_path, transform, args.exif, "--data_path", inputs, args.list_columns)
    utils.log(f"{len(sets[0])} training and {len(sets[1])} validation images in {len(sets[0].images.classes)} classes")
    utils.fix_random_seeds(0)  # an untrained network has the same weights in every run
    amp_dtype = dino_features.pick_dtype(device, args.amp_dtype)
    model, name = build_model(args, device, args.pretrained_weights, inputs.in_chans, amp_dtype)
    rows = {name: model}
    if args.baselines:
        untrained, _ = build_model(args, device, "random", inputs.in_chans, amp_dtype)
        rows = {"raw pixels": dino_features.raw_pixels(device), "untrained network": untrained, **rows}
    how = (args.batch_size_per_gpu, args.num_workers, device, args.use_cuda)
    features = {
        row: labeled_features(network, sets, *how, amp_dtype=amp_dtype, name=f"Features ({row})")
        for row, network in rows.items()
    }
    if not utils.is_main_process():
        return
    if args.dump_features is not None:
        dino_features.dump_features(features[name], args.dump_features)
        utils.log(f"features saved to {args.dump_features}")
    print_accuracies(features[name], args)
    if args.baselines:
        print_table(features, args)


def print_accuracies(features, args):
    """Print one line per k on rank 0. `features` are the four tensors of `labeled_features`."""
    if not utils.is_main_process():
        return
    if len(torch.cat((features[1], features[3])).unique()) < 2:
        print("note: there is only one class, so every answer is right. Name images of several classes")
    if max(args.nb_knn) > len(features[0]):
        print(f"note: only {len(features[0])} training images; a larger k uses all of them")
    for k, (top1, top5) in knn_accuracies(*features, args.nb_knn, args.temperature).items():
        print(f"{k}-NN classifier result: Top1: {top1:.2f}, Top5: {top5:.2f}")


def print_table(features, args):
    """Print top-1 accuracies: one row per feature extractor, below chance, and one column per k."""
    test_labels = next(iter(features.values()))[3]
    chance = 100.0 * torch.bincount(test_labels).max().item() / len(test_labels)  # always the most frequent class
    print("\nk-NN top-1 (%)      " + "".join(f"{f'k={k}':>8}" for k in args.nb_knn))
    print(f"{'chance':20}" + f"{chance:8.1f}" * len(args.nb_knn))
    for name, tensors in features.items():
        accuracies = knn_accuracies(*tensors, args.nb_knn, args.temperature)
        print(f"{name:20}" + "".join(f"{accuracies[k][0]:8.1f}" for k in args.nb_knn))


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
