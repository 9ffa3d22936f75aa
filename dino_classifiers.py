"""What evaluations that train a classifier share: loaders, accuracies, and resuming after an epoch."""

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


def check_finite(loss, where):
    """Raise UserError with exit code 3 if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} {where}. Lower --lr, or check --pretrained_weights", exit_code=3)


@torch.no_grad()
def validate(extract, classifier, data_loader, labels):
    """{loss, acc1, acc5} on the validation images of all processes: mean loss, top-1 and top-5 accuracy in percent.

    `extract` maps a batch of images to features, `classifier` maps these to logits [B, C]; `labels` [M] are on the
    device. With fewer than 5 classes, acc5 uses all of them. Raises UserError (exit code 3) if the loss is not finite.
    """
    sums = [torch.zeros(4, device=labels.device)]  # loss, correct in top 1, correct in top 5, images
    for images, indices in utils.MetricLogger().log_every(data_loader, 20, "Test:"):
        images = images.to(labels.device, non_blocking=True)
        targets = labels[indices.to(labels.device, non_blocking=True)]  # [B]
        logits = classifier(extract(images))  # [B, C]
        correct = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # [B, 5]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums.append(torch.stack((loss, correct[:, 0].sum(), correct.sum(), loss.new_tensor(len(targets)))))
    totals = torch.stack(sums).cpu().double().sum(dim=0)
    if utils.get_world_size() > 1:
        totals = totals.to(utils.collective_device())
        dist.all_reduce(totals)
    loss, correct1, correct5, number = totals.tolist()
    check_finite(loss, "on the test images")  # NaN logits have an arbitrary rank, and would count as an accuracy
    stats = {"loss": loss / number, "acc1": 100 * correct1 / number, "acc5": 100 * correct5 / number}
    utils.log(f"Accuracy of the network on the {number:.0f} test images: {stats['acc1']:.1f}%")
    utils.log(f"Top-5: {stats['acc5']:.1f}%, loss: {stats['loss']:.4f}")
    return stats


# ---- resuming ----


def check_settings(path, file, args, names):
    """Raise UserError if `file` was written with other settings than `args`. Published files store none, and pass."""
    now = {name: getattr(args, name) for name in names}
    before = {**now, **utils.plain_args(file.get("args"))}
    changed = [name for name in names if before[name] != now[name]]
    if changed:
        was, is_now = (", ".join(f"{name} {values[name]}" for name in changed) for values in (before, now))
        otherwise = "" if args.evaluate else ", or another --output_dir"
        raise UserError(f"{path} was made with {was}; this run has {is_now}. Use the same{otherwise}")


def is_log_line(line):
    """Whether a JSON object in log.txt is of this script. Only main_dino's lines have train_ln_k."""
    return "train_loss" in line and "train_ln_k" not in line


def resume(path, progress, states, args, names):
    """Restore `progress` {epoch, best_acc} and the objects in `states` from the checkpoint at `path`, if it exists.

    Raises UserError if the file is not a checkpoint of this script, or was written with other settings `names`.
    """
    if os.path.isfile(path):
        file = dino_checkpoints.load_checkpoint(path)
        ours = isinstance(file, dict) and {*progress, *states} <= file.keys()
        if not ours or not all(type(file[name]) in (int, float) for name in progress):
            raise UserError(f"{path} is not a checkpoint of this script. Move it, or use another --output_dir")
        check_settings(path, file, args, names)
    dino_checkpoints.restart_from_checkpoint(path, progress, **states)
    utils.check_same_everywhere(progress["epoch"], f"the epoch in {path}")
    if utils.is_main_process():
        dino_checkpoints.drop_log_lines(args.output_dir, progress["epoch"], is_log_line)
