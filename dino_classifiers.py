"""What evaluations that train a classifier share: loaders, accuracies, and resuming after an epoch."""

import hashlib
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

import dino_checkpoints
import utils
from utils import UserError

# ---- loading ----


def build_loader(dataset, sampler, args, device, collate=None):
    """Loader of (images [B, C, size, size], indices [B], ...) in the sampler's order. The last batch may be smaller."""
    how = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0, "collate_fn": collate}
    return DataLoader(dataset, args.batch_size_per_gpu, sampler=sampler, pin_memory=device.type == "cuda", **how)


# ---- loss and accuracy ----


def check_finite(losses, where):
    """Raise UserError with exit code 3 if all losses are NaN or infinite."""
    if not any(map(math.isfinite, losses)):
        raise UserError(f"the loss is {losses[0]} {where}. Lower --lr, or check --pretrained_weights", exit_code=3)


def rank(stats):
    """What classifiers are compared by: the validation accuracy, and at equal accuracy the loss."""
    return stats.get("acc1", -1.0), -stats.get("loss", 0.0)


@torch.no_grad()
def validate(classify, batches, labels):
    """[{loss, acc1, acc5}, ...] per classifier: mean loss, top-1 and top-5 accuracy in percent, over all processes.

    `batches` are (inputs, indices) of this process's images, `labels` [M] of all images are on the device, and
    `classify` maps inputs on the device to a list of logits [B, C]. With fewer than 5 classes, acc5 uses all of them.
    Logs the best classifier. Raises UserError (exit code 3) if no loss is finite.
    """
    sums = []  # [H, 4] per batch: loss, correct in top 1, in top 5, images
    for inputs, indices in utils.MetricLogger().log_every(batches, 20, "Test:"):
        inputs = inputs.to(labels.device, non_blocking=True)
        targets = labels[indices.to(labels.device, non_blocking=True)]  # [B]
        rows = []
        for logits in classify(inputs):
            correct = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # [B, 5]
            loss = F.cross_entropy(logits, targets, reduction="sum")
            rows.append(torch.stack((loss, correct[:, 0].sum(), correct.sum(), loss.new_tensor(len(targets)))))
        sums.append(torch.stack(rows))
    totals = torch.stack(sums).cpu().double().sum(dim=0)  # [H, 4]
    if utils.get_world_size() > 1:
        totals = totals.to(utils.collective_device())
        dist.all_reduce(totals)
    totals = totals.tolist()
    number = totals[0][3]
    # NaN logits have an arbitrary rank, and would count as an accuracy.
    check_finite([loss for loss, *_ in totals], "on the test images")
    tested = [{"loss": a / number, "acc1": 100 * b / number, "acc5": 100 * c / number} for a, b, c, _ in totals]
    best = max((stats for stats in tested if math.isfinite(stats["loss"])), key=rank)
    utils.log(f"Accuracy of the network on the {number:.0f} test images: {best['acc1']:.1f}%")
    utils.log(f"Top-5: {best['acc5']:.1f}%, loss: {best['loss']:.4f}")
    return tested


# ---- resuming ----


def digest_of_classes(names):
    """A few characters that differ if the names of the classes or their order differ."""
    return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()[:12]


def in_words(value):
    """A flag's value, or values, as on the command line."""
    return " ".join(map(dino_checkpoints.as_word, value if isinstance(value, list) else [value]))


def check_settings(path, file, args, names):
    """Raise UserError if `file` was written with other settings than `args`. Published files store none, and pass."""
    now = {name: getattr(args, name) for name in names}
    before = {**now, **utils.plain_args(file.get("args"))}
    changed = [name for name in names if before[name] != now[name]]
    if changed:
        was, is_now = (
            ", ".join(f"{name} {in_words(value) if isinstance(value, list) else value}" for name, value in pairs)
            for pairs in ([(name, values[name]) for name in changed] for values in (before, now))
        )
        otherwise = "" if args.evaluate else ", or another --output_dir"
        raise UserError(f"{path} was made with {was}; this run has {is_now}. Use the same{otherwise}")


def open_checkpoint(path, keys, args, names):
    """The content of the checkpoint at `path`, or None if there is no such file.

    Raises UserError if it lacks one of `keys`, or was written with other settings `names` than `args`.
    """
    if not os.path.isfile(path):
        return None
    file = dino_checkpoints.load_checkpoint(path)
    ours = isinstance(file, dict) and {"epoch", "best_acc", *keys} <= file.keys()
    if not ours or not all(type(file[name]) in (int, float) for name in ("epoch", "best_acc")):
        raise UserError(f"{path} is not a checkpoint of this script. Move it, or use another --output_dir")
    file["args"] = {**utils.plain_args(file.get("args")), **utils.plain_args(file.get("sweep"))}  # all values of flags
    check_settings(path, file, args, names)
    return file


def resume(path, progress, states, args):
    """Restore `progress` (epoch, best_acc, ...) and the objects in `states` from the checkpoint at `path`, if any."""
    dino_checkpoints.restart_from_checkpoint(path, progress, **states)
    utils.check_same_everywhere(progress["epoch"], f"the epoch in {path}")
    if utils.is_main_process():
        dino_checkpoints.drop_log_lines(args.output_dir, progress["epoch"], is_log_line)


def is_log_line(line):
    """Whether a JSON object in log.txt is of such an evaluation. Only main_dino's lines have train_ln_k."""
    return "train_loss" in line and "train_ln_k" not in line
