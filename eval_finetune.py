"""Fine-tuning of a whole network for classification (tables 6 and 11 of the paper).

    python eval_finetune.py --config finetune_cifar10 --data_path torchvision:CIFAR10 --output_dir runs/c10
    python eval_finetune.py --pretrained_weights runs/vits16 --data_path imagenet --output_dir runs/finetuned
    python eval_finetune.py --evaluate --pretrained_weights runs/finetuned --data_path imagenet

The first command starts from the published ViT-S/16; the paper reports 99.0 % for it. --data_path holds train/<class>/*
and val/<class>/*. A linear layer on the features and the network below it are trained together, with DeiT's
augmentation (arXiv 2012.12877), as in the paper. Prints top-1 accuracy on the validation images. Writes log.txt, one
JSON object per epoch, checkpoint.pth and checkpoint_best.pth, the most accurate one, to --output_dir.
Run the same command again to resume; the result is bit-identical to an uninterrupted run.
"""

import argparse
import copy
import fnmatch
import functools
import itertools
import os
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import transforms

import dino_backbones
import dino_checkpoints
import dino_classifiers
import dino_cli
import dino_cpu
import dino_crops
import dino_data
import dino_features
import dino_files
import dino_images
import utils
from dino_cli import at_least, between, positive, share
from utils import UserError, bool_flag

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`. Defaults are DeiT's, but for --epochs and --min_lr."""
    parents = [dino_cli.model_flags(), dino_cli.labeled_flags(), dino_cli.loader_flags()]
    parser = argparse.ArgumentParser("Fine-tuning", add_help=False, parents=parents)
    # fmt: off
    dino_cli.add_config_flags(parser)
    parser.add_argument("--output_dir", default=".", metavar="DIR", help="""Folder for log.txt, checkpoint.pth and
        checkpoint_best.pth.""")
    parser.add_argument("--evaluate", action="store_true", help="""Only evaluate --pretrained_weights, a network that
        this script has fine-tuned.""")
    parser.add_argument("--image_size", default=224, type=at_least(1), metavar="PIXELS",
        help="""Input size of the network. Validation images are resized to 8/7 of this size, then center-cropped.
        Default for a run: its global crops.""")
    parser.add_argument("--val_freq", default=1, type=at_least(1), metavar="E",
        help="Validate every E epochs, and after the last.")
    parser.add_argument("--seed", default=0, type=between(0, 2**63 - 1), metavar="N", help="""Seed of the new layer, the
        image order, the augmentation, mixup and drop path. Results do not depend on --num_workers.""")

    optim = parser.add_argument_group("optimization")
    optim.add_argument("--epochs", default=100, type=at_least(1), metavar="E",
        help="Length of the run. An epoch has the same number of images whatever --repeats is.")
    optim.add_argument("--warmup_epochs", default=5, type=at_least(0), metavar="E", help="Linear warm-up of lr.")
    optim.add_argument("--batch_size_per_gpu", default=64, type=at_least(1), metavar="B",
        help="Images per process and pass.")
    optim.add_argument("--grad_accum_steps", default=1, type=at_least(1), metavar="N",
        help="Passes per step: a batch N times as large, in the memory of one pass.")
    optim.add_argument("--lr", default=0.00025, type=positive, metavar="LR", help="""Peak learning rate of AdamW for 256
        images per step; scaled linearly with the batch. Lower it for small data sets: the first thing to tune.""")
    optim.add_argument("--min_lr", default=1e-6, type=at_least(0, float), metavar="LR", help="Final lr, not scaled.")
    optim.add_argument("--layer_decay", default=1.0, type=between(1e-6, 1, float), metavar="D", help="""The lr of a
        layer is D times the lr of the layer above it. Below 1, early layers keep more of what they have learned; 0.65
        to 0.75 is common. 1: one lr for all, as in DeiT.""")
    optim.add_argument("--weight_decay", default=0.05, type=at_least(0, float), metavar="WD",
        help="Not for biases, norms, positions and CLS.")
    optim.add_argument("--drop_path_rate", default=0.1, type=between(0, 0.999, float), metavar="P",
        help="Stochastic depth, rising linearly to this value over the blocks.")
    optim.add_argument("--ema_decay", default=0.0, type=between(0, 0.999999, float), metavar="M", help="""Validate and
        keep a moving average of the weights, with this momentum per step, such as 0.9999. 0: the weights
        themselves.""")
    optim.add_argument("--use_fp16", default=True, type=bool_flag, metavar="BOOL",
        help="Mixed precision. false trains in float32.")
    optim.add_argument("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "tf32"], help="""auto: bf16 where
        it is fast, else fp16 on CUDA and float32 elsewhere. tf32 is for GPUs: twice as fast as float32.""")

    images = parser.add_argument_group("augmentation")
    images.add_argument("--crop_scale", default=[0.08, 1.0], type=between(1e-6, 1, float), nargs=2,
        metavar=("MIN", "MAX"), help="Area of a random crop relative to the image.")
    images.add_argument("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="""RandAugment or AutoAugment, by
        timm's name of the policy. none: only crops and flips.""")
    images.add_argument("--repeats", default=3, type=at_least(1), metavar="N", help="""Repeated augmentation: each image
        N times in a row, so that an epoch has 1/N of the images. 1 suits small data sets on one GPU.""")
    images.add_argument("--reprob", default=0.25, type=share, metavar="P", help="Probability of random erasing.")
    images.add_argument("--mixup", default=0.8, type=at_least(0, float), metavar="A",
        help="Alpha of mixup. 0: no mixup.")
    images.add_argument("--cutmix", default=1.0, type=at_least(0, float), metavar="A", help="""Alpha of CutMix. 0: no
        CutMix. With both, each batch uses one of them at random.""")
    images.add_argument("--smoothing", default=0.1, type=between(0, 0.999, float), metavar="S", help="Label smoothing.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for flags that contradict each other, for an unknown --arch, and without timm."""
    dino_backbones.check_arch(args.arch)
    if dino_backbones.vit_factory(args.arch):
        dino_cli.check_whole_patches("image_size", args.image_size, args.patch_size)
    if args.warmup_epochs > args.epochs:
        raise UserError(
            f"--warmup_epochs {args.warmup_epochs} is longer than the run (--epochs {args.epochs}). Lower "
            "--warmup_epochs or train longer"
        )
    if args.evaluate and args.pretrained_weights in ("", "random"):
        raise UserError("--evaluate needs a network that this script has fine-tuned. Name it with --pretrained_weights")
    low, high = args.crop_scale
    if low > high:
        raise UserError(f"--crop_scale {low} {high}: put the smaller number first")
    if args.batch_size_per_gpu % 2 and (args.mixup or args.cutmix):
        raise UserError(
            f"--batch_size_per_gpu {args.batch_size_per_gpu} is odd, and mixup pairs images. Use an even number, or "
            "--mixup 0 --cutmix 0"
        )
    build_augmentation(args, utils.RGB)


# ---- data ----


def build_augmentation(args, inputs):
    """PIL image or uint8 [H, W, 3] -> augmented crop, uint8 [3, size, size]. Raises UserError for an unknown --aa."""
    try:
        from timm.data import create_transform
    except ImportError as e:
        raise UserError("eval_finetune.py needs timm, for RandAugment and mixup: pip install timm") from e
    policy = None if args.aa in ("", "none") else args.aa
    how = {"scale": tuple(args.crop_scale), "interpolation": "bicubic", "color_jitter": None, "mean": inputs.mean}
    try:  # use_prefetcher leaves the crops as uint8; erasing follows on the device
        augment = create_transform(args.image_size, is_training=True, use_prefetcher=True, auto_augment=policy, **how)
    except (AssertionError, ValueError, KeyError) as e:
        raise UserError(f"--aa {args.aa} is not a policy of timm. Use rand-m9-mstd0.5-inc1, original or none") from e
    for step in augment.transforms:
        for op in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if op.name.startswith("Posterize"):  # it keeps 0 bits in some draws, which Pillow 13 refuses
                op.level_fn = functools.partial(at_least_one_bit, op.level_fn)
    return transforms.Compose([functools.partial(dino_images.decode, inputs=inputs), augment])


def at_least_one_bit(level_fn, *args):
    return (max(level_fn(*args)[0], 1),)


def load_data(args, inputs):
    """(train, val, train labels [N], val labels [M]). Labels are indices into `train.images.classes`.

    `train[epoch, index, copy]` -> (random crop, index, None); `val[index]` -> (image, index). Raises UserError.
    """
    transform = dino_crops.eval_transform(args.image_size, inputs)
    how = {"inputs": inputs, "columns": args.list_columns}
    train, val, *labels = dino_data.labeled_images(args.data_path, transform, args.exif, **how)
    if len(train.images.classes) < 2:
        raise UserError(f"--data_path {args.data_path} has only one class. Name images of several classes")
    decoded = dino_files.keep_small_decoded(train.images)
    augment = build_augmentation(args, inputs)
    return dino_data.MultiCropDataset(train.images, augment, args.seed, True, decoded), val, *labels


class RepeatedSampler(dino_data.EpochSampler):
    """Repeated augmentation (arXiv 1901.09335): (epoch, index, copy), with `repeats` copies of an image in a row.

    Several processes get different copies. As in DeiT, an epoch has the same number of images as without repeats. Each
    copy is augmented differently: the crops are a function of (seed, epoch, index, copy).
    """

    def __init__(self, images, batch_size, seed=0, rank=0, world_size=1, repeats=3):
        super().__init__(images, batch_size, seed, rank, world_size)
        self.repeats = repeats

    def __iter__(self):
        order = self.images.order(self.seed, self.epoch)
        copies = ((self.epoch, index, copy) for index in order for copy in range(self.repeats))
        return itertools.islice(copies, self.first + self.rank, self.first + self.left, self.world_size)


class BatchAugmentation:
    """Random erasing, then mixup or CutMix, with timm: (uint8 [B, 3, H, W], labels [B]) -> (floats, targets).

    Targets are smoothed distributions [B, C] with mixup or CutMix, else the labels. Seed Python and numpy before.
    """

    def __init__(self, args, num_classes, inputs, device):
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        self.inputs = inputs
        self.erase = RandomErasing(args.reprob, mode="pixel", device=device) if args.reprob else nn.Identity()
        # prob and switch_prob as in DeiT: every batch is mixed, half of them by CutMix.
        alphas = {"mixup_alpha": args.mixup, "cutmix_alpha": args.cutmix, "prob": 1.0, "switch_prob": 0.5}
        mixes = args.mixup or args.cutmix
        self.mix = Mixup(**alphas, label_smoothing=args.smoothing, num_classes=num_classes) if mixes else None

    def __call__(self, images, labels):
        images = self.erase(self.inputs.normalize(images))
        return self.mix(images, labels) if self.mix else (images, labels)


# ---- network ----


class Classifier(nn.Module):
    """A backbone and a new linear layer: images [B, 3, H, W] -> logits [B, num_classes].

    The new layer starts near zero (issue 31 of the authors' repository: 0.001 times the usual values). So the first
    steps do not change the backbone by gradients of a random layer.
    """

    def __init__(self, backbone, width, num_classes):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.head.weight.data.mul_(0.001)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(utils.features_of(self.backbone, x))


def build_model(args, num_classes, inputs, device, amp_dtype=None):
    """The Classifier on the device, with the backbone's weights loaded. Raises UserError if they do not fit."""
    if device.type == "cpu":
        dino_cpu.tune_cpu()
    how = {"drop_path_rate": args.drop_path_rate, "in_chans": inputs.in_chans}
    backbone, width = dino_backbones.build_backbone(args.arch, args.patch_size, args.image_size, **how)
    dino_backbones.load_weights(backbone, args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size)
    dino_backbones.use_fastest_kernels(backbone, device, amp_dtype)
    return Classifier(backbone, width, num_classes).to(device)


def load_head(head, args):
    """Load the linear layer of --pretrained_weights, for --evaluate. Raises UserError if there is none that fits."""
    path = args.pretrained_weights
    file = dino_checkpoints.load_checkpoint(path)
    state, _ = dino_checkpoints.pick_state_dict(file, args.checkpoint_key, path)
    weight, bias = state.get("head.weight"), state.get("head.bias")
    if weight is None or bias is None:
        raise UserError(f"--pretrained_weights {path} has no classifier. --evaluate needs a checkpoint of this script")
    if weight.shape != head.weight.shape or bias.shape != head.bias.shape:
        here = f"has {head.out_features} classes; the network has {len(bias)}"
        raise UserError(f"--data_path {args.data_path} {here}. Use images of the same classes")
    dino_classifiers.check_settings(path, file, args, ["classes"])
    head.load_state_dict({"weight": weight, "bias": bias})


# ---- layer-wise learning rates ----


def parameter_groups(model, args):
    """Groups {params, lr_scale, weight_decay} for AdamW: one per layer, with and without weight decay.

    The lr of the layer `number` of the backbone (see dino_backbones.layer_numbers) is scaled by
    layer_decay^(highest number + 1 - number), the new layer's by 1. Not decayed are biases, other 1-d parameters, and
    parameters that the network names (DeiT: positions and CLS). Raises UserError for a network without such numbers.
    """
    numbers = dino_backbones.layer_numbers(model.backbone)
    if not numbers and args.layer_decay != 1:
        raise UserError(
            f"--arch {args.arch} has no order of layers for --layer_decay {args.layer_decay}. Use --layer_decay 1, "
            "a ViT, or timm:<name>"
        )
    top = max(numbers.values(), default=-1) + 1
    names = getattr(model.backbone, "no_weight_decay", lambda: ("pos_embed", "cls_token"))()
    groups = {}
    for name, parameter in model.named_parameters():
        inner = name.removeprefix("backbone.")
        plain = parameter.ndim <= 1 or any(fnmatch.fnmatch(inner, pattern) for pattern in names)
        scale = args.layer_decay ** (top - numbers.get(inner, top))
        decay = 0.0 if plain else args.weight_decay
        group = groups.setdefault((scale, plain), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


# ---- training ----


class Parts(NamedTuple):
    """What a step uses and changes: `model` may be wrapped by DDP; `ema` is None without --ema_decay."""

    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    fp16_scaler: torch.amp.GradScaler
    augment: BatchAugmentation
    amp_dtype: torch.dtype | None


def train_one_epoch(parts, data_loader, labels, schedule, epoch, args):
    """Train for one epoch; returns {loss, lr}, means over the passes of all processes.

    `labels` [N] are on the device; `schedule` has one lr per step of the run. Raises UserError (exit code 3) if the
    loss is not finite, before the optimizer step.
    """
    model, passes, name = parts.model.train(), args.grad_accum_steps, f"[{epoch}/{args.epochs}]"
    metrics, first = utils.MetricLogger(), epoch * len(data_loader)
    for number, (images, indices, _) in enumerate(metrics.log_every(data_loader, 20, f"Epoch: {name}"), first):
        step, part = divmod(number, passes)
        if part == 0:
            parts.optimizer.zero_grad(set_to_none=True)
            for group in parts.optimizer.param_groups:
                group["lr"] = float(schedule[step]) * group["lr_scale"]
        images = images.to(labels.device, non_blocking=True)
        targets = labels[indices.to(labels.device, non_blocking=True)]  # [B]
        utils.seed_step(args.seed, number)  # erasing, mixup and drop path: a function of seed, pass and rank
        images, targets = parts.augment(images, targets)  # with mixup, targets are [B, C]
        model.require_backward_grad_sync = part == passes - 1  # DDP: one all-reduce per step
        logits = dino_features.features_in(model, images, parts.amp_dtype)  # [B, C], float32
        # Targets of mixup are smoothed already.
        loss = F.cross_entropy(logits, targets, label_smoothing=0.0 if parts.augment.mix else args.smoothing)
        loss_on_host = utils.HostCopy(loss)  # copied while the backward pass runs
        parts.fp16_scaler.scale(loss / passes).backward()
        dino_classifiers.check_finite([loss_on_host.read()], f"in epoch {name}")
        if part == passes - 1:
            parts.fp16_scaler.step(parts.optimizer)
            parts.fp16_scaler.update()
            if parts.ema is not None:
                update_average(parts.ema, model, args.ema_decay)
        metrics.update(loss=loss.detach(), lr=float(schedule[step]))
    metrics.synchronize_between_processes()
    means = {name: meter.global_avg for name, meter in metrics.meters.items()}
    dino_classifiers.check_finite([means["loss"]], f"in epoch {name}")
    return means


@torch.no_grad()
def update_average(ema, model, momentum):
    """Parameters of `ema` <- momentum * ema + (1 - momentum) * model. Buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - momentum)
    for mine, theirs in zip(ema.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


# ---- the run ----

# Settings that determine a whole run. `weights` is not a flag but a digest of the backbone's tensors at the start:
# their file may be moved, but not changed.
SETTINGS = ("epochs", "warmup_epochs", "lr", "min_lr", "layer_decay", "weight_decay", "drop_path_rate", "ema_decay")
SETTINGS += ("crop_scale", "aa", "repeats", "reprob", "mixup", "cutmix", "smoothing", "image_size", "seed", "precision")
SETTINGS += ("arch", "patch_size", "weights", "classes", "num_labels", "num_images", "global_batch", "world_size")


def main(args):
    """Fine-tune a network, resume its fine-tuning, or --evaluate one. Raises UserError."""
    dino_checkpoints.follow_run(args)
    check_args(args)
    if not args.evaluate:
        dino_cli.check_output_dir(args.output_dir, files=("checkpoint.pth", "checkpoint_best.pth", "log.txt"))
    device = utils.init_distributed_mode(args)
    inputs = dino_checkpoints.photograph_inputs(args.pretrained_weights)
    if not inputs.photographs:
        trained = f"--pretrained_weights {args.pretrained_weights} was trained with --value_range"
        raise UserError(f"{trained}. Fine-tuning is for 8-bit RGB photographs only; use eval_linear.py")
    args.in_chans, args.mean, args.std = inputs.in_chans, list(inputs.mean), list(inputs.std)  # for later evaluations
    amp_dtype = training_dtype(args, device)
    args.precision = str(amp_dtype or torch.float32)
    utils.fix_random_seeds(args.seed)

    train, val, train_labels, val_labels = load_data(args, inputs)
    args.num_images, args.num_labels = len(train), len(train.images.classes)
    args.classes = dino_classifiers.digest_of_classes(train.images.classes)
    # Each image on exactly one process. dino_data.eval_loader would repeat images to give all ranks the same number.
    val_loader = dino_classifiers.build_loader(val, range(args.rank, len(val), args.world_size), args, device)
    model = build_model(args, args.num_labels, inputs, device, amp_dtype)

    def test(network):
        network.eval()

        def classify(images):
            return [dino_features.features_in(network, inputs.normalize(images), amp_dtype)]

        return dino_classifiers.validate(classify, val_loader, val_labels.to(device))[0]

    if args.evaluate:
        load_head(model.head, args)
        test(model)
        return
    args.weights = dino_features.digest_of_weights(model.backbone)
    augment = BatchAugmentation(args, args.num_labels, inputs, device)
    fine_tune(model, augment, (train, train_labels.to(device)), test, args, amp_dtype)


def training_dtype(args, device):
    """dtype of mixed precision, or None for float32. Raises UserError for a precision that the device lacks."""
    one_crop = {"global_crops_size": args.image_size, "local_crops_size": args.image_size, "local_crops_number": 0}
    return dino_backbones.training_dtype(argparse.Namespace(**vars(args), **one_crop), device)


def fine_tune(model, augment, train_set, test, args, amp_dtype=None):
    """Train for the remaining epochs. Writes a log line and checkpoints after each. Raises UserError.

    `train_set` is (images, labels [N] on the device); `test(network)` returns its loss and accuracies.
    """
    (train, labels), device = train_set, train_set[1].device
    images_per_step = args.batch_size_per_gpu * args.grad_accum_steps  # of this process
    args.global_batch = images_per_step * args.world_size
    sampler = RepeatedSampler(train.images, images_per_step, args.seed, args.rank, args.world_size, args.repeats)
    if not len(sampler):
        raise UserError(
            f"the {len(train)} training images are fewer than one step of {args.global_batch}. Lower "
            "--batch_size_per_gpu or --grad_accum_steps, or start fewer processes"
        )
    loader = dino_classifiers.build_loader(train, sampler, args, device, dino_data.collate)
    steps = len(loader) // args.grad_accum_steps
    peak_lr = args.lr * args.global_batch / 256  # linear scaling rule
    if peak_lr < args.min_lr:
        raise UserError(f"--lr {args.lr} is {peak_lr:.2g} for {args.global_batch} images, below --min_lr {args.min_lr}")
    schedule = utils.cosine_scheduler(peak_lr, args.min_lr, args.epochs, steps, args.warmup_epochs)

    optimizer = utils.build_optimizer("adamw", parameter_groups(model, args), device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    ema = copy.deepcopy(model).requires_grad_(False) if args.ema_decay else None
    states = {"state_dict": model, "optimizer": optimizer, "fp16_scaler": scaler, **({"ema": ema} if ema else {})}
    progress, path = {"epoch": 0, "best_acc": 0.0}, os.path.join(args.output_dir, "checkpoint.pth")
    dino_classifiers.open_checkpoint(path, states, args, SETTINGS)
    dino_classifiers.resume(path, progress, states, args)

    shared = dino_backbones.data_parallel(model, device) if args.world_size > 1 else model
    parts, tested = Parts(shared, ema, optimizer, scaler, augment, amp_dtype), ema or model
    for epoch in range(progress["epoch"], args.epochs):
        sampler.set_epoch(epoch)
        means = train_one_epoch(parts, loader, labels, schedule, epoch, args)
        stats = {**{f"train_{name}": mean for name, mean in means.items()}, "epoch": epoch}
        progress["epoch"] = epoch + 1
        if epoch % args.val_freq == 0 or epoch == args.epochs - 1:
            found = test(tested)
            stats |= {f"test_{name}": value for name, value in found.items()}
            if found["acc1"] >= progress["best_acc"]:
                progress["best_acc"] = found["acc1"]
                best = {**progress, "state_dict": tested.state_dict(), "args": vars(args)}
                utils.save_on_master(best, os.path.join(args.output_dir, "checkpoint_best.pth"))
            utils.log(f"Max accuracy so far: {progress['best_acc']:.2f}%")
        if utils.is_main_process():
            utils.write_log_line(args.output_dir, stats)
        kept = {name: holder.state_dict() for name, holder in states.items()}
        utils.save_on_master({**progress, **kept, "args": vars(args)}, path)
    utils.log(f"The network is fine-tuned. Best top-1 test accuracy: {progress['best_acc']:.1f}")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
