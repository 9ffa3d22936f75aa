"""Linear layers that are trained together on the same frozen features: their settings, results and files.

A layer has one value of each flag in `Setting`. eval_linear.py trains one layer per combination of the values that it
is given.
"""

import argparse
import itertools
import math
import os
from typing import NamedTuple

import torch

import utils
from dino_classifiers import in_words, open_checkpoint, rank, resume
from utils import UserError

# ---- settings ----


class OneOrMore(argparse.Action):
    """Stores one value as itself, and several as a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class Setting(NamedTuple):
    """What distinguishes the linear layers of a sweep: one value per flag."""

    lr: float
    n_last_blocks: int
    avgpool_patchtokens: bool

    def __str__(self):
        return " ".join(f"--{flag} {in_words(value)}" for flag, value in self._asdict().items())


def sweep_of(args):
    """The Setting of each linear layer: all combinations of the flags' values."""
    return [Setting(*values) for values in itertools.product(*(values_of(args, flag) for flag in Setting._fields))]


def values_of(args, flag):
    """The values of a flag with OneOrMore, as a list."""
    value = getattr(args, flag)
    return value if isinstance(value, list) else [value]


# ---- comparing settings ----

# Settings that determine the features, and settings that determine a whole run. `weights` is not a flag but a digest
# of the network's tensors: their file may be moved, but not changed.
FEATURE_SETTINGS = ("arch", "patch_size", "n_last_blocks", "avgpool_patchtokens", "weights")
SETTINGS = ("epochs", "lr", "global_batch", "image_size", "seed", "num_labels", "num_images", "classes", "amp_dtype")
SETTINGS += FEATURE_SETTINGS


# ---- training ----


class Training:
    """The training of `heads`: their optimizers, schedulers and results, and the files that keep them.

    `results` has one dict per linear layer: best_acc, the best accuracy after any epoch; loss, acc1 and acc5 of the
    last validation; or `diverged`, if a loss was not finite. Such a layer is out, as it would be alone.
    """

    def __init__(self, heads, args):
        self.heads, self.args = heads, args
        self.path = os.path.join(args.output_dir, "checkpoint.pth.tar")
        self.epoch, self.results = 0, [{"best_acc": 0.0} for _ in heads.settings]
        self.optimizers, self.schedulers = [], []
        for setting, classifier in zip(heads.settings, heads.classifiers, strict=True):
            rate = setting.lr * args.global_batch / 256
            self.optimizers.append(torch.optim.SGD(classifier.parameters(), rate, momentum=0.9))
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizers[-1], args.epochs, eta_min=0)
            self.schedulers.append(scheduler)

    @property
    def is_sweep(self):
        return len(self.results) > 1

    def best(self):
        """Number of the layer with the best last validation; before the first one, of the first that is finite."""
        finite = [i for i, result in enumerate(self.results) if "diverged" not in result]
        return max(finite, key=lambda i: rank(self.results[i]))

    def parts(self, i):
        """What a checkpoint has of layer i, by the keys in the file."""
        holders = self.heads.classifiers[i], self.optimizers[i], self.schedulers[i]
        return dict(zip(("state_dict", "optimizer", "scheduler"), holders, strict=True))

    def all_parts(self):
        """`parts` of all layers. In a sweep, their keys end with the number of the layer."""
        end = "_{}" if self.is_sweep else ""
        each = enumerate(map(self.parts, range(len(self.results))))
        return {name + end.format(i): holder for i, parts in each for name, holder in parts.items()}

    def resume(self):
        """Restore everything from the checkpoint, if there is one. Raises UserError if it is not one of this run."""
        states, progress = self.all_parts(), {"epoch": 0, "best_acc": 0.0}
        file = open_checkpoint(self.path, self.parts(0), self.args, SETTINGS)
        if self.is_sweep:
            progress["results"] = self.results
            known = file is None or are_results(file.get("results"), len(self.results))
            if not known or (file and not states.keys() <= file.keys()):
                raise UserError(f"{self.path} is not a checkpoint of this sweep. Move it, or use another --output_dir")
        resume(self.path, progress, states, self.args)
        self.epoch = progress["epoch"]
        self.results = progress.get("results", [{"best_acc": progress["best_acc"]}])

    def end_epoch(self, means, tested):
        """Log an epoch and save. `means` are from `train_one_epoch`, `tested` from `validate`, or None."""
        for i, result in enumerate(self.results):
            losses = [stats[i]["loss"] for stats in (means, tested) if stats]
            if "diverged" in result or not all(map(math.isfinite, losses)):
                self.results[i] = {"diverged": True}
            elif tested:
                result |= {**tested[i], "best_acc": max(result["best_acc"], tested[i]["acc1"])}
        if all("diverged" in result for result in self.results):
            raise UserError(f"no loss is finite after epoch {self.epoch}. Lower --lr", exit_code=3)
        best = self.best()
        if tested:
            setting = f" of {len(self.results)} settings with {self.heads.settings[best]}" if self.is_sweep else ""
            utils.log(f"Max accuracy so far{setting}: {self.results[best]['best_acc']:.2f}%")
        if utils.is_main_process():
            for i, setting in enumerate(self.heads.settings):
                stats = {f"train_{name}": mean for name, mean in means[i].items()}
                stats |= {"epoch": self.epoch, **(setting._asdict() if self.is_sweep else {})}
                if "diverged" in self.results[i]:
                    stats |= {"train_loss": None, "diverged": True}
                elif tested:
                    stats |= {f"test_{name}": value for name, value in tested[i].items()}
                utils.write_log_line(self.args.output_dir, stats)
        self.epoch += 1
        self.save(best)

    def save(self, best):
        """Write the checkpoint: the best layer under the same keys as one that was trained alone, then all of them."""

        def saved(holders):
            return {name: holder.state_dict() for name, holder in holders.items()}

        layer = saved(self.parts(best))
        layer["state_dict"] = {f"module.{name}": tensor for name, tensor in layer["state_dict"].items()}
        file = {"epoch": self.epoch, "best_acc": self.results[best]["best_acc"], **layer, "args": vars(self.args)}
        if self.is_sweep:
            flags = {flag: getattr(self.args, flag) for flag in Setting._fields}
            file["args"] = {**file["args"], **self.heads.settings[best]._asdict()}
            file |= {"sweep": flags, "results": self.results, **saved(self.all_parts())}
        utils.save_on_master(file, self.path)

    def print_result(self):
        """Log the accuracy. Of a sweep, log a table of all settings, and the accuracy of the layer that is kept."""
        best = self.best()
        if not self.is_sweep:
            utils.log(f"The linear classifier is trained. Top-1 test accuracy: {self.results[0]['best_acc']:.1f}")
            return
        settings = self.heads.settings
        utils.log(f"\n{'top-1':>10}{'top-5':>8}{'loss':>9}{'max top-1':>11}  setting")
        for i, (setting, result) in enumerate(zip(settings, self.results, strict=True)):
            numbers = f"{'diverged':>10}{'':28}"
            if "acc1" in result:
                numbers = "{acc1:10.2f}{acc5:8.2f} {loss:8.4g}{best_acc:11.2f}".format(**result)
            utils.log(f"{numbers}  {setting}{'  (best)' * (i == best)}")
        rates = sorted({setting.lr for setting in settings})
        if len(rates) > 1 and settings[best].lr in (rates[0], rates[-1]):
            which, try_ = ("smallest", "lower") if settings[best].lr == rates[0] else ("largest", "higher")
            utils.log(f"note: the best --lr {settings[best].lr} is the {which} of the sweep. Try {try_} ones too")
        utils.log(f"The linear classifiers are trained. Top-1 test accuracy: {self.results[best]['best_acc']:.1f}")


def are_results(found, number):
    """Whether a file's `results` are of this number of layers."""
    keys = ({"best_acc"}, {"best_acc", "loss", "acc1", "acc5"}, {"diverged"})
    each = found if isinstance(found, list) else [None]
    numbers = all(isinstance(result, dict) and set(result) in keys for result in each)
    return numbers and len(each) == number and all(type(n) in (int, float, bool) for r in each for n in r.values())
