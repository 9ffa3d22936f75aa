"""Linear classification of frozen features (section 4.1 of the paper).

    python eval_linear.py --pretrained_weights runs/vits16 --data_path imagenet --output_dir runs/linear
    python eval_linear.py --evaluate --data_path imagenet                          # published ViT-S/16 and head: 77.0 %
    python eval_linear.py --evaluate --arch vit_base --n_last_blocks 1 --avgpool_patchtokens true --data_path imagenet

--data_path holds train/<class>/* and val/<class>/*. Trains one linear layer on random crops and flips. Prints its
accuracy on the validation images. Writes log.txt, one JSON object per epoch, and checkpoint.pth.tar to --output_dir.
Run the same command again to resume; the result is bit-identical to an uninterrupted run.
"""

import argparse
import functools
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision import transforms

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_crops
import dino_data
import dino_features
import dino_images
import utils
from dino_classifiers import build_loader, check_finite, check_settings, resume, validate
from dino_cli import at_least, between, positive
from utils import UserError, bool_flag

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parents = [dino_cli.model_flags(), dino_cli.labeled_flags(), dino_cli.process_flags()]
    parser = argparse.ArgumentParser("Linear evaluation", add_help=False, parents=parents)
    # fmt: off
    parser.add_argument("--n_last_blocks", default=4, type=at_least(1), metavar="N", help="""Concatenate the CLS
        tokens of the last N blocks of a ViT: 4 for ViT-S and smaller, 1 for ViT-B. Ignored for other networks, which
        give their pooled output.""")
    parser.add_argument("--avgpool_patchtokens", default=False, type=bool_flag, metavar="BOOL",
        help="Also use the mean patch token of a ViT's last block: false for ViT-S, true for ViT-B.")
    parser.add_argument("--image_size", default=224, type=at_least(1), metavar="PIXELS",
        help="""Input size of the network. Validation images are resized to 8/7 of this size, then center-cropped.
        Default for a run: its global crops.""")
    parser.add_argument("--epochs", default=100, type=at_least(1), metavar="E", help="Passes over the training images.")
    parser.add_argument("--lr", default=0.001, type=positive, metavar="LR", help="""Initial learning rate for a
        global batch of 256, scaled linearly with the batch. It follows a cosine to 0, one value per epoch. For your
        own networks, try several values.""")
    parser.add_argument("--batch_size_per_gpu", default=128, type=at_least(1), metavar="B",
        help="Images per process and step. The last batch of an epoch may be smaller.")
    parser.add_argument("--val_freq", default=1, type=at_least(1), metavar="E",
        help="Validate every E epochs, and after the last.")
    parser.add_argument("--num_labels", default=None, type=at_least(1), metavar="C", help="""Outputs of the linear
        layer. Default: the number of class folders, or 1000 for a published head.""")
    parser.add_argument("--evaluate", action="store_true", help="Evaluate a linear layer instead of training one.")
    parser.add_argument("--linear_weights", default="", metavar="FILE", help="""Linear layer for --evaluate: a
        checkpoint.pth.tar of this script, or a file in the published format. Default: the published layer for --arch
        and --patch_size.""")
    parser.add_argument("--output_dir", default=".", metavar="DIR", help="Folder for log.txt and checkpoint.pth.tar.")
    parser.add_argument("--seed", default=0, type=between(0, 2**63 - 1), metavar="N",
        help="Seed of the initial weights, the image order and the crops.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for flags that contradict each other, and for an unknown --arch."""
    if args.linear_weights and not args.evaluate:
        raise UserError("--linear_weights needs --evaluate. Training resumes from --output_dir instead")
    if dino_backbones.vit_factory(args.arch):
        dino_cli.check_whole_patches("image_size", args.image_size, args.patch_size)
    dino_backbones.check_arch(args.arch)


# ---- data ----


def load_data(args):
    """(train, val, train labels [N], val labels [M], class names). Labels are indices into the class names.

    `train[epoch, index]` -> (random crop, index, None); `val[index]` -> (image, index). Images are uint8, or normalized
    floats if the network was not trained on RGB images. --evaluate does not need train/: without it, train and its
    labels are None and the classes are the folders of val/. Raises UserError.
    """
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights)
    transform = dino_crops.eval_transform(args.image_size, inputs)
    if args.evaluate and dino_data.find_part(args.data_path, "train") is None:
        how = {"in_chans": inputs.in_chans, "columns": args.list_columns}
        val = dino_data.labeled_part(args.data_path, "val", args.exif, **how)
        return None, dino_data.EvalImages(val, transform, inputs=inputs), None, val.targets, val.classes
    sets = dino_data.labeled_images(args.data_path, transform, args.exif, inputs=inputs, columns=args.list_columns)
    train, val, train_labels, val_labels = sets
    # MultiCropDataset, because random crops depend on the epoch as well as on the index.
    crop, flip = transforms.RandomResizedCrop(args.image_size), transforms.RandomHorizontalFlip()
    decode, finish = functools.partial(dino_images.decode, inputs=inputs), dino_crops.last_transforms(inputs)
    augment = transforms.Compose([decode, crop, flip, *finish])
    crops = dino_data.MultiCropDataset(train.images, augment, args.seed, strict=True)
    return crops, val, train_labels, val_labels, train.images.classes


# ---- features ----


def build_model(args, device, amp_dtype=None):
    """(frozen network on the device, width of its features). Raises UserError if the flags do not fit the network."""
    if dino_backbones.vit_factory(args.arch):
        with torch.device("meta"):  # no memory, no download: this only reads the depth
            depth = len(dino_backbones.build_backbone(args.arch, args.patch_size)[0].blocks)
        if args.n_last_blocks > depth:
            raise UserError(f"--n_last_blocks {args.n_last_blocks}: {args.arch} has only {depth} blocks. Lower it")
    elif args.avgpool_patchtokens:
        raise UserError(f"--arch {args.arch} has no patch tokens to pool. Remove --avgpool_patchtokens")
    # The network stays in evaluation mode: no dropout, and batch norms keep their statistics.
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights)
    model, width = dino_backbones.frozen_backbone(args, device, args.image_size, inputs=inputs, amp_dtype=amp_dtype)
    return model, width * (args.n_last_blocks + args.avgpool_patchtokens if dino_backbones.is_vit(model) else 1)


@torch.no_grad()
def frozen_features(model, images, n_last_blocks=4, avgpool=False):
    """Features [B, width] of images [B, C, H, W], uint8 or normalized, on the model's device.

    For a ViT: the CLS tokens of the last n blocks, after the final norm, first to last. `avgpool` adds the mean patch
    token of the last block, interleaved with its CLS token: (cls_0, mean_0, cls_1, mean_1, ...). The published ViT-B
    heads were trained on this order. Other networks give their pooled output.
    """
    images = utils.normalize(images)
    if not dino_backbones.is_vit(model):
        return utils.features_of(model, images).flatten(1)
    layers = model.get_intermediate_layers(images, n_last_blocks)  # n of [B, 1 + patches, D]
    parts = [tokens[:, 0] for tokens in layers]
    if avgpool:
        parts[-1] = torch.stack((parts[-1], layers[-1][:, 1:].mean(dim=1)), dim=-1).flatten(1)  # [B, 2·D]
    return torch.cat(parts, dim=-1)


# ---- classifier ----


class LinearClassifier(nn.Module):
    """Linear layer on top of frozen features: [B, ...] with `dim` values per image -> logits [B, num_labels]."""

    def __init__(self, dim, num_labels=1000):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(x.flatten(1))


def load_head(classifier, args):
    """Load the linear layer for --evaluate. Raises UserError if it does not fit the features or the labels."""
    if args.linear_weights:
        source, file = args.linear_weights, dino_checkpoints.load_checkpoint(args.linear_weights)
    else:
        source, file = dino_backbones.load_published(args.arch, args.patch_size, "linear", "--linear_weights")
        if file is None:
            name = f"{args.arch} with --patch_size {args.patch_size}"
            raise UserError(f"no linear head was published for {name}. Set --linear_weights")
    state = file.get("state_dict", file) if isinstance(file, dict) else {}
    tensors = state.items() if isinstance(state, dict) else ()
    head = {str(key).removeprefix("module."): value for key, value in tensors if isinstance(value, torch.Tensor)}
    weight, bias = head.get("linear.weight"), head.get("linear.bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise UserError(f"{source} holds no linear.weight and linear.bias. Use a checkpoint.pth.tar of this script")
    (labels, width), (labels_here, width_here) = weight.shape, classifier.linear.weight.shape
    if (labels, width) != (labels_here, width_here):
        raise UserError(
            f"the head in {source} has {labels} labels and {width} features; this run has {labels_here} labels and "
            f"{width_here} features. Set --num_labels, --n_last_blocks and --avgpool_patchtokens (published heads: 4 "
            "and false for ViT-S, 1 and true for ViT-B)"
        )
    check_settings(source, file, args, FEATURE_SETTINGS)
    classifier.load_state_dict({name: head[name] for name in classifier.state_dict()})


# Settings that determine the features, and settings that determine a whole run. `weights` is not a flag but a digest
# of the network's tensors: their file may be moved, but not changed.
FEATURE_SETTINGS = ("arch", "patch_size", "n_last_blocks", "avgpool_patchtokens", "weights")
SETTINGS = ("epochs", "lr", "global_batch", "image_size", "seed", "num_labels", "num_images", "amp_dtype")
SETTINGS += FEATURE_SETTINGS


# ---- training and validation ----


def train_one_epoch(extract, classifier, data_loader, labels, optimizer, epoch_name):
    """Train for one epoch; returns {loss, lr}, means over the steps of all processes.

    `extract` maps a batch of images to features [B, width] without gradients; `labels` [N] are on the device;
    `epoch_name` is for messages, such as [3/100]. Raises UserError (exit code 3) if the loss is not finite, before the
    optimizer step.
    """
    metrics = utils.MetricLogger()
    for images, indices, *_ in metrics.log_every(data_loader, 20, f"Epoch: {epoch_name}"):
        images = images.to(labels.device, non_blocking=True)
        targets = labels[indices.to(labels.device, non_blocking=True)]  # [B]
        loss = F.cross_entropy(classifier(extract(images)), targets)
        loss_on_host = utils.HostCopy(loss)  # copied while the backward pass runs
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        check_finite(loss_on_host.read(), f"in epoch {epoch_name}")
        optimizer.step()
        metrics.update(loss=loss, lr=optimizer.param_groups[0]["lr"])
    metrics.synchronize_between_processes()
    means = {name: meter.global_avg for name, meter in metrics.meters.items()}
    check_finite(means["loss"], f"in epoch {epoch_name}")
    return means


# ---- the run ----


def main(args):
    """Train a linear classifier, resume its training, or --evaluate one. Raises UserError."""
    dino_checkpoints.follow_run(args)
    check_args(args)
    if not args.evaluate:
        dino_cli.check_output_dir(args.output_dir, files=("checkpoint.pth.tar", "log.txt"))
    device = utils.init_distributed_mode(args)
    utils.fix_random_seeds(args.seed)

    # ---- data ----
    train, val, train_labels, val_labels, classes = load_data(args)
    args.num_labels = args.num_labels or (1000 if args.evaluate and not args.linear_weights else len(classes))
    if len(classes) > args.num_labels:
        number = f"{len(classes)} classes, more than --num_labels {args.num_labels}"
        raise UserError(f"--data_path {args.data_path} has {number}. Raise --num_labels")
    if args.evaluate and len(classes) < args.num_labels:
        utils.log(f"note: the {len(classes)} classes of the data use the first of the head's {args.num_labels} outputs")
    # Each image on exactly one process. dino_data.eval_loader would repeat images to give all ranks the same number.
    val_loader = build_loader(val, range(args.rank, len(val), args.world_size), args, device)
    val_labels = val_labels.to(device)

    # ---- frozen network, classifier ----
    amp_dtype = dino_features.pick_dtype(device, args.amp_dtype)
    model, width = build_model(args, device, amp_dtype)
    args.weights = dino_features.digest_of_weights(model)
    blocks = {"n_last_blocks": args.n_last_blocks, "avgpool": args.avgpool_patchtokens}
    network = functools.partial(frozen_features, model, **blocks)
    extract = functools.partial(dino_features.features_in, network, amp_dtype=amp_dtype)
    classifier = LinearClassifier(width, args.num_labels).to(device)
    if args.evaluate:
        load_head(classifier, args)
        validate(extract, classifier, val_loader, val_labels)
        return
    train_set, val_set = (train, train_labels.to(device)), (val_loader, val_labels)
    train_classifier(extract, classifier, train_set, val_set, args, device)


def train_classifier(extract, classifier, train_set, val_set, args, device):
    """Train for the remaining epochs. Writes a log line and a checkpoint after each. Raises UserError.

    `train_set` is (images, labels [N]), `val_set` is (loader, labels [M]). Labels are on the device.
    """
    (train, train_labels), (val_loader, val_labels) = train_set, val_set
    # A sampler with batch size 1 drops only the remainder of images by processes. The loader makes the batches.
    sampler = dino_data.EpochSampler(train.images, 1, args.seed, args.rank, args.world_size)
    if not len(sampler):
        raise UserError(f"{len(train)} training images are too few for {args.world_size} processes. Start fewer")
    train_loader = build_loader(train, sampler, args, device, dino_data.collate)
    args.num_images, args.global_batch = len(train), args.batch_size_per_gpu * args.world_size
    optimizer = torch.optim.SGD(classifier.parameters(), args.lr * args.global_batch / 256, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, eta_min=0)

    path = os.path.join(args.output_dir, "checkpoint.pth.tar")
    progress = {"epoch": 0, "best_acc": 0.0}
    states = {"state_dict": classifier, "optimizer": optimizer, "scheduler": scheduler}
    resume(path, progress, states, args, SETTINGS)

    shared = classifier
    if args.world_size > 1:
        shared = DistributedDataParallel(classifier, device_ids=[device] if device.type == "cuda" else None)
    for epoch in range(progress["epoch"], args.epochs):
        sampler.set_epoch(epoch)
        means = train_one_epoch(extract, shared, train_loader, train_labels, optimizer, f"[{epoch}/{args.epochs}]")
        scheduler.step()
        stats = {**{f"train_{name}": mean for name, mean in means.items()}, "epoch": epoch}
        if epoch % args.val_freq == 0 or epoch == args.epochs - 1:
            tested = validate(extract, classifier, val_loader, val_labels)
            progress["best_acc"] = max(progress["best_acc"], tested["acc1"])
            utils.log(f"Max accuracy so far: {progress['best_acc']:.2f}%")
            stats |= {f"test_{name}": value for name, value in tested.items()}
        if utils.is_main_process():
            utils.write_log_line(args.output_dir, stats)
        progress["epoch"] = epoch + 1
        saved = {name: holder.state_dict() for name, holder in states.items()}
        saved["state_dict"] = {f"module.{name}": tensor for name, tensor in saved["state_dict"].items()}
        utils.save_on_master({**progress, **saved, "args": vars(args)}, path)
    utils.log(f"The linear classifier is trained. Top-1 test accuracy: {progress['best_acc']:.1f}")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
