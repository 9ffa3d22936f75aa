"""Checkpoint files: write them whole, read them safely, compare settings, restore."""

import argparse
import contextlib
import math
import os
import re
import threading
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import dino_backbones
import utils
from utils import UserError

# ---- writing ----


def lock_output_dir(folder, patience=10.0):
    """Keep other runs out of an output folder until what this returns, a context manager, is closed.

    The lock ends with the process, however that ends. Raises UserError, on all ranks, if another run holds it for
    longer than `patience` seconds: one that was just killed may still be dying.
    """
    path = os.path.join(folder, ".lock")
    try:
        file, free = utils.lock_file(path, patience) if utils.is_main_process() else (contextlib.nullcontext(), True)
    except OSError as e:
        file, free = None, f"can't write {path}: {e.strerror}. Delete it, or name another --output_dir"
    free = utils.gather_objects(free)[0]
    if isinstance(free, str):
        raise UserError(free)
    if not free:
        raise UserError(
            f"another run is writing to --output_dir {folder}. End it (a killed launcher leaves its processes behind), "
            f"or name another folder. If there is none, delete {path}"
        )
    return file


def to_host(state):
    """A copy of nested dicts, lists and tuples with the tensors in them copied to main memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: to_host(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(to_host, state))
    return state


class CheckpointWriter:
    """Writes checkpoints to `path` on rank 0, in the background; the one before stays beside it as *.prev.pth.

    As a context manager, which waits for the last one. `failures` holds, by its path, what could not be written, and
    why: the run goes on, and what was there before is as it was.
    """

    def __init__(self, path, keep_previous=True):
        self.path, self.previous = path, previous_checkpoint(path)
        self.keep_previous = keep_previous  # False if what is at `path` is damaged
        self.thread, self.failures = None, {}

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not KeyboardInterrupt:  # that ends at once, and leaves what was there before
            self.wait()

    def save(self, state, *copies):
        """Take a copy of the state and write it, also to the files `copies`, while the caller goes on."""
        self.wait()
        if utils.is_main_process():
            self.thread = threading.Thread(target=self._write, args=(to_host(state), copies), daemon=True)
            self.thread.start()

    def wait(self):
        if self.thread:
            self.thread.join()
            self.thread = None

    def _write(self, state, copies):
        for path in (*copies, self.path):  # in this order: a run killed in between comes back to make the copies
            keep_previous = path == self.path and self.keep_previous
            try:
                utils.write_whole(path, lambda file: torch.save(state, file), self.previous if keep_previous else None)
            except Exception as e:
                cause = e if isinstance(e, OSError) else e.__context__ or e  # torch.save wraps what the system says
                reason = " ".join(str(getattr(cause, "strerror", None) or e).split())[:200]
                self.failures[path] = what = f"{path} could not be written ({reason})"
                utils.say(f"warning: {what}; an earlier one, if any, is as it was. The run goes on")
            else:
                self.failures.pop(path, None)
                self.keep_previous = self.keep_previous or path == self.path


def previous_checkpoint(path):
    """checkpoint.pth -> checkpoint.prev.pth"""
    path = Path(path)
    return str(path.with_name(f"{path.stem}.prev{path.suffix}"))


def run_state(student, teacher, optimizer, dino_loss, fp16_scaler, args, doctor, epoch, step=0, meters=(), sittings=()):
    """What a checkpoint holds: the public release's keys and prefixes, and plain types only beside the tensors.

    `epoch` is the one to go on with, `step` how many of its steps are done, `meters` what they have added up,
    `sittings` who has done them: (processes, images a step in each, steps, lanes of shards) for each start. `doctor` is
    health.py's.
    """

    def with_prefix(module):
        return {f"module.{key.removeprefix('module.')}": value for key, value in module.state_dict().items()}

    state = {
        "student": with_prefix(student),
        "teacher": with_prefix(teacher) if utils.has_batchnorms(teacher) else teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "step": step,
        "meters": list(meters),
        "sittings": list(sittings),
        "args": utils.plain_args(args),
        "dino_loss": dino_loss.state_dict(),
        "health": doctor.state_dict(),
    }
    if fp16_scaler.is_enabled():
        state["fp16_scaler"] = fp16_scaler.state_dict()
    return state


# ---- reading ----


def _allow_public_checkpoints():
    """Let weights_only loading accept what the public checkpoints hold besides tensors, and nothing more.

    That is the arguments as a Namespace, and learning rates as numpy float64 scalars, by the names of old numpy and
    new. None of them runs code when unpickled.
    """
    from _codecs import encode

    scalar = np.float64(0).__reduce__()[0]
    allowed = [argparse.Namespace, np.dtype, type(np.dtype(np.float64)), encode, scalar]
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5):  # where a name may stand beside the object
        allowed += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    torch.serialization.add_safe_globals(allowed)


def load_checkpoint(path, verify=False):
    """Everything in a checkpoint file, on the CPU. Unpickles tensors, plain types and Namespaces only.

    `verify` holds it against its checksums, which torch writes, unless told not to, but never looks at. Raises
    UserError if the file is missing, torn, or holds anything else.
    """
    _allow_public_checkpoints()
    if str(path).endswith(".onnx"):
        raise UserError(f"{path} is a graph for other software, not weights. Give the checkpoint that it was made of")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if verify and zipfile.is_zipfile(path):
            check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as e:
        raise UserError(f"{path} is read by safetensors, which is not installed: pip install safetensors") from e
    except FileNotFoundError as e:
        raise UserError(f"there is no file {path}") from e
    except Exception as e:  # torch raises a dozen types here, by where the damage is
        reason = " ".join(str(e).split())
        # torch has one message for what it does not know and another for modules such as os that it blocks.
        unsafe = re.search(r"unsupported global:? (?:GLOBAL )?(\S+)", reason, re.IGNORECASE)
        if unsafe:
            what = unsafe[1]
            raise UserError(f"{path} holds a {what}, which could run code when loaded, and was not loaded") from e
        # torch advises to load it in full, code and all
        reason = re.sub(r"^.*WeightsUnpickler error: | Check the documentation of torch\.load.*$", "", reason)
        what = reason[:200] or type(e).__name__
        raise UserError(f"{path} can't be read as a checkpoint; is it complete? ({what})") from e


def load_args(path):
    """The arguments in a checkpoint file, {} if it has none; of a large file of torch's little else is read."""
    _allow_public_checkpoints()
    try:
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # of an old layout, or damaged: that says what it is
        file = load_checkpoint(path)
    return utils.plain_args(file.get("args")) if isinstance(file, dict) else {}


def check_archive(path):
    """Raise BadZipFile if the checksums that torch.save wrote, and torch.load ignores, don't match."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def load_newest(path):
    """(checkpoint, its path): of `path`, or, with a warning, of the one before if that is missing or damaged.

    (None, None) if there is neither. Raises UserError if what there is can't be read.
    """
    found = [file for file in (path, previous_checkpoint(path)) if os.path.isfile(file)]
    for i, file in enumerate(found):
        try:
            checkpoint = load_checkpoint(file, verify=True)
        except UserError as e:
            if i == len(found) - 1:
                raise
            utils.log(f"warning: {e}. Going on from the one before, {found[i + 1]}")
            continue
        if file != path and len(found) == 1:
            utils.log(
                f"warning: there is no {path}. Going on from the one before, {file}; delete that too to begin anew"
            )
        return checkpoint, file
    return None, None


def is_network_state(value):
    return isinstance(value, dict) and any(key.endswith((".weight", ".bias")) for key in value if isinstance(key, str))


def pick_state_dict(state, checkpoint_key, source):
    """A network's tensors in what a file held, without DDP's `module.` in front, and where they came from."""
    if not isinstance(state, dict):
        raise UserError(f"{source} holds a {type(state).__name__}, not a state dict")
    networks = [key for key, value in state.items() if is_network_state(value)]
    if checkpoint_key in networks:
        state, source = state[checkpoint_key], f"{source} [{checkpoint_key}]"
    elif networks or any(isinstance(value, dict) for value in state.values()):
        could = f"could be one of {', '.join(networks)}" if networks else "can't be any"
        raise UserError(f"{source} has no network {checkpoint_key!r}; --checkpoint_key {could}")
    return {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}, source


def backbone_state(state):
    """The backbone's tensors in a network's: those behind `backbone.`, or all of them if there is no such prefix."""
    inner = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return inner or dict(state)


def trained_crop_size(checkpoint):
    """Side of the global crops of the run that a checkpoint is of, if it says; the best size to evaluate at."""
    args = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    return args.get("global_crops_size") if isinstance(args, dict) else None


def trained_inputs(path):
    """The Inputs of the training checkpoint in a file; RGB where none are said, as in the published files."""
    if not path or path == "random" or str(path).endswith(".safetensors"):
        return utils.RGB
    return utils.inputs_of(load_args(path))


# ---- resuming ----


# Arguments that decide which tensors a run has: with others, a checkpoint can't be gone on from.
SHAPING_ARGS = (
    "arch",
    "patch_size",
    "in_chans",
    "out_dim",
    "norm_last_layer",
    "use_bn_in_head",
    "optimizer",
    "global_crops_size",
)


# Those that change nothing of what is computed, or (the last line) only where: what they amount to, the images a step,
# is looked at instead.
FREE_ARGS = (
    *(
        "config",
        "init_from",
        "data_path",
        "data_format",
        "max_bad_images",
        "strict_images",
        "output_dir",
        "num_workers",
        "dist_url",
        "local_rank",
        "rank",
        "gpu",
    ),
    *("grad_checkpointing", "compile", "stop_on_collapse", "tensorboard", "wandb", "knn_every", "knn_data"),
    "compute_stats",  # what came of it, mean and std, is looked at
    *("saveckp_freq", "saveckp_iters", "save_every_minutes", "max_bad_steps", "allow_changed_args"),
    *("world_size", "batch_size_per_gpu", "grad_accum_steps", "device"),
)


def check_resumable(path, checkpoint, args):
    """Raise UserError if a file is no training checkpoint, or one of a run whose arguments make other tensors.

    Arguments that would change the result need --allow_changed_args, and are named.
    """
    epoch = checkpoint.get("epoch") if isinstance(checkpoint, dict) else None
    networks = isinstance(epoch, int) and all(is_network_state(checkpoint.get(key)) for key in ("student", "teacher"))
    if not networks or epoch < 0:
        raise UserError(f"{path} is no training checkpoint, and would be overwritten. Move it, or name another folder")
    before, now = utils.plain_args(checkpoint.get("args")), utils.plain_args(args)
    if dino_backbones.vit_factory(before.get("arch")) is dino_backbones.vit_factory(args.arch) is not None:
        before["arch"] = args.arch  # deit_small is another name of vit_small
    batches = (utils.global_batch(before), utils.global_batch(now))
    if None not in batches:
        before["images a step"], now["images a step"] = batches
    for values in (before, now):
        if values and values.get("mean") is None:
            values |= {
                "in_chans": values.get("in_chans", 3),
                "mean": [*utils.IMAGENET_MEAN],
                "std": [*utils.IMAGENET_STD],
            }
        for name, said in (("images", "training images"), ("image_names", "names of the training images")):
            if name in values:
                values[said] = values.pop(name)
    changed = [name for name in now if name in before and before[name] != now[name] and name not in FREE_ARGS]
    if "training images" in changed:  # then their names have, too
        changed = [name for name in changed if name != "names of the training images"]
    shaping = [name for name in changed if name in SHAPING_ARGS]
    then, wanted = (
        [f"{'' if ' ' in name else '--'}{name} {values[name]}" for name in shaping or changed]
        for values in (before, now)
    )
    if shaping:
        raise UserError(
            f"{path} was made with {' '.join(then)}, this run has {' '.join(wanted)}. Use the same, or another "
            "--output_dir"
        )
    if changed and not getattr(args, "allow_changed_args", True):
        raise UserError(
            f"{path} was made with {', '.join(then)}; this run has {', '.join(wanted)}, which would change the result. "
            "Use the same, or add --allow_changed_args true to go on with these"
        )
    if changed:
        utils.log(
            "note: going on with "
            + ", ".join(f"{w} (was {before[name]})" for w, name in zip(wanted, changed, strict=True))
        )


def restart_from_checkpoint(path, run_variables=None, args=None, **objects):
    """If there is a checkpoint at `path`, load each object's state from it and update the dict `run_variables`.

    `objects` are modules, optimisers or scalers (None is passed over), by their keys in the file; `module.` in front
    of a module's keys doesn't matter. `args` are this run's, to be held against those in the file. In place of a
    damaged file comes *.prev.pth. Returns the path of what was loaded, or None. Raises UserError if it does not fit.
    """
    checkpoint, path = load_newest(str(path))
    if checkpoint is None:
        return None
    if args is not None:
        check_resumable(path, checkpoint, args)
    utils.log(f"resuming from {path}")
    for name, target in objects.items():
        if target is None:
            continue
        if name not in checkpoint:
            utils.log(f"warning: {path} has no {name!r}; it starts afresh")
            continue
        try:
            load_state(target, checkpoint[name])
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as e:
            problem = " ".join(str(e).split())[:300]
            raise UserError(
                f"{path} does not fit this run: {name}: {problem}. Give the arguments of that run, or another "
                "--output_dir"
            ) from e
    for name in run_variables or {}:
        if name in checkpoint:
            run_variables[name] = checkpoint[name]
    return path


def load_state(target, state):
    if isinstance(target, nn.Module):
        prefix = "module." if any(key.startswith("module.") for key in target.state_dict()) else ""
        state = {prefix + key.removeprefix("module."): value for key, value in state.items()}
    if isinstance(target, torch.optim.Optimizer):
        # Files of the authors' release lack what torch has added since; which kernels to use is this run's own choice.
        groups = []
        for ours, theirs in zip(target.param_groups, state["param_groups"], strict=True):
            kernels = {key: ours[key] for key in ("fused", "foreach") if key in ours}
            groups.append({**ours, **theirs, **kernels})
        state = {**state, "param_groups": groups}
    target.load_state_dict(state)


def check_progress(progress, path, images):
    """Raise UserError if what a checkpoint says of its epoch can't be; `images` is how many there are."""

    def count(value, least=0, most=2**53):
        return type(value) is int and least <= value <= most

    def is_sitting(sitting):
        numbers = isinstance(sitting, list | tuple) and len(sitting) in (3, 4) and all(map(count, sitting))
        processes, batch_size, _, lanes = (*sitting, 1)[:4] if numbers else (0,) * 4
        return count(processes * batch_size * lanes, 1, images)

    def is_total(total):
        return isinstance(total, list | tuple) and len(total) == 2 and is_number(total[0]) and count(total[1])

    def is_number(value):
        return type(value) is float or (type(value) is int and abs(value) < 2**53)

    def are_totals(totals):
        return isinstance(totals, dict) and all(map(is_total, totals.values()))

    if not (
        all(count(progress[name]) for name in ("epoch", "step"))
        and all(isinstance(progress[name], list | tuple) for name in ("meters", "sittings"))
        and all(map(are_totals, progress["meters"]))
        and all(map(is_sitting, progress["sittings"]))
    ):
        raise UserError(
            f"{path} says of its epoch what can't be: it is damaged, or was made by something else. Remove it, or give "
            "another --output_dir"
        )


def steps_done(progress, args, steps):
    """How many of an epoch's `steps` the checkpoint has behind it, also if a step was of another number of images."""
    now, before = utils.global_batch(vars(args)), utils.global_batch(utils.plain_args(progress["args"]))
    return min(math.ceil(progress["step"] * (before or now) / now), steps)  # no image twice
