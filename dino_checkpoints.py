"""Checkpoint files: write them whole, read them safely, compare settings, restore.

Keys as in the authors' release: student, teacher, optimizer, epoch (the next one), args, dino_loss, fp16_scaler;
and ours for a resume within an epoch: images_done, meters, health. Besides tensors only plain types.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import shutil
import zipfile
from _codecs import encode
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import dino_layouts
import utils
from utils import UserError

# ---- writing ----


def lock_output_dir(folder, patience=10.0):
    """Lock an output folder against other runs. Returns a context manager that unlocks it.

    The lock ends with the process, however that ends. Raises UserError on all ranks if another run holds it for more
    than `patience` seconds: a run that was just killed may need a moment.
    """
    path = os.path.join(folder, ".lock")
    try:
        file, free = utils.lock_file(path, patience) if utils.is_main_process() else (contextlib.nullcontext(), True)
    except OSError as e:
        file, free = None, f"can't write {path}: {e.strerror}. Delete it, or use another --output_dir"
    free = utils.gather_objects(free)[0]
    if isinstance(free, str):
        raise UserError(free)
    if not free:
        raise UserError(
            f"another run is writing to --output_dir {folder}. End it (a killed launcher can leave its processes "
            f"running), or use another folder. If there is no such run, delete {path}"
        )
    return file


def save(path, state, keep_previous=False):
    """Write a checkpoint whole or not at all; with `keep_previous` the old file stays as *.prev.pth. Raises OSError."""

    def write(file):
        torch.save(state, file)
        if keep_previous and os.path.exists(path):
            keep_as(Path(path).resolve(), Path(previous_checkpoint(path)))

    try:
        utils.write_whole(path, write)
    except RuntimeError as e:  # torch.save wraps what the system says
        raise e.__context__ if isinstance(e.__context__, OSError) else OSError(" ".join(str(e).split())[:200]) from e


def keep_as(path, previous):
    """Let `previous` name the file at `path` too."""
    link = previous.with_name(previous.name + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links
        shutil.copyfile(path, link)
    os.replace(link, previous)


def previous_checkpoint(path):
    """checkpoint.pth -> checkpoint.prev.pth"""
    path = Path(path)
    return str(path.with_name(f"{path.stem}.prev{path.suffix}"))


def to_host(state):
    """A state dict with its tensors in main memory, so that torch.load reads the file on machines without a GPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: to_host(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(to_host, state))
    return state


def run_state(parts, args, progress):
    """The content of a checkpoint: the state of each of `parts` (main_dino.Parts), `args`, and the dict `progress`.

    As in the authors' files, keys of the student start with `module.`, and the keys of a teacher with batch norms, too.
    """
    state = {name: to_host(part.state_dict()) for name, part in parts._asdict().items()}
    for name, prefixed in (("student", True), ("teacher", utils.has_batchnorms(parts.teacher))):
        prefix = "module." if prefixed else ""
        state[name] = {prefix + key.removeprefix("module."): value for key, value in state[name].items()}
    if not parts.fp16_scaler.is_enabled():
        del state["fp16_scaler"]
    return {**state, **progress, "args": utils.plain_args(args)}


# ---- reading ----


# In public checkpoints besides tensors: arguments, and float64 by its names in old and new numpy. None of it runs code.
PUBLIC = [argparse.Namespace, np.dtype, type(np.dtype(np.float64)), encode]
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _scalar = functools.partial(np.float64(0).__reduce__()[0])
    _scalar.__module__, _scalar.__name__, _scalar.__qualname__ = _module, "scalar", "scalar"  # torch reads one of these
    PUBLIC.append(_scalar)


def _allow_public_types():
    """Before each load, because timm withdraws Namespace after its own; only once each, as torch 2.4 has a list."""
    torch.serialization.add_safe_globals([t for t in PUBLIC if t not in torch.serialization.get_safe_globals()])


def load_checkpoint(path, verify=False):
    """Everything in a checkpoint file, on the CPU. Only tensors, plain types and Namespaces are unpickled.

    `verify` compares it with the checksums that torch.save writes and torch.load ignores. Raises UserError if the file
    is missing, damaged, or contains anything else.
    """
    _allow_public_types()
    if str(path).endswith(".onnx"):
        raise UserError(f"{path} is an ONNX graph, not weights. Use the checkpoint that it was exported from")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if verify and zipfile.is_zipfile(path):
            check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as e:
        raise UserError(f"{path} needs safetensors to be read: pip install safetensors") from e
    except FileNotFoundError as e:
        raise UserError(f"there is no file or folder {path}") from e
    except Exception as e:  # torch raises a dozen types, depending on where the damage is
        reason = " ".join(str(e).split())
        # torch has one message for unknown types and another for modules such as os that it blocks.
        unsafe = re.search(r"unsupported global:? (?:GLOBAL )?(\S+)", reason, re.IGNORECASE)
        if unsafe:
            what = unsafe[1]
            raise UserError(f"{path} contains a {what}, which could run code when loaded. It was not loaded") from e
        # Without torch's advice to load it with weights_only=False, which would run code.
        reason = re.sub(r"^.*WeightsUnpickler error: | Check the documentation of torch\.load.*$", "", reason)
        what = reason[:200] or type(e).__name__
        raise UserError(f"{path} can't be read as a checkpoint; is it complete? ({what})") from e


def load_args(path):
    """The arguments in a checkpoint file as a dict, {} if it has none. The tensors of a large file are not read."""
    _allow_public_types()
    try:
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # an old layout, or damaged: load_checkpoint names the problem
        file = load_checkpoint(path)
    return utils.plain_args(file.get("args")) if isinstance(file, dict) else {}


def check_archive(path):
    """Raise BadZipFile if the content does not match the checksums that torch.save wrote."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def load_newest(path):
    """(checkpoint, its path) from `path` or, with a warning, from *.prev.pth if that is missing or damaged.

    (None, None) if there is neither. Raises UserError if none of them can be read.
    """
    found = [file for file in (path, previous_checkpoint(path)) if os.path.isfile(file)]
    for i, file in enumerate(found):
        try:
            checkpoint = load_checkpoint(file, verify=True)
        except UserError as e:
            if i == len(found) - 1:
                raise
            utils.log(f"warning: {e}. Using the previous one, {found[i + 1]}")
            continue
        if file != path and len(found) == 1:
            utils.log(f"warning: there is no {path}. Using the previous one, {file}; delete it to start a new run")
        return checkpoint, file
    return None, None


def is_network_state(value):
    return isinstance(value, dict) and any(key.endswith((".weight", ".bias")) for key in value if isinstance(key, str))


def networks_in(file):
    """Keys of the networks in what a file contained."""
    return [key for key, value in file.items() if is_network_state(value)] if isinstance(file, dict) else []


def pick_state_dict(state, checkpoint_key, source):
    """(tensors of one network in what a file contained, without prefixes of wrappers; where they came from).

    Where Lightning and mmpretrain write a single network, `checkpoint_key` may be a part of its tensors' names.
    """
    if not isinstance(state, dict):
        raise UserError(f"{source} contains a {type(state).__name__}, not a state dict")
    networks = networks_in(state)
    if checkpoint_key not in networks and networks in (["state_dict"], ["model"], ["state_dict", "ema"]):
        checkpoint_key = networks[-1]  # an average is what its script has evaluated
    if checkpoint_key in networks:
        state, source = state[checkpoint_key], f"{source} [{checkpoint_key}]"
    elif networks or any(isinstance(value, dict) for value in state.values()):
        there = f"it has {', '.join(networks)} (--checkpoint_key)" if networks else "it has none"
        raise UserError(f"{source} has no network {checkpoint_key!r}; {there}")
    return {dino_layouts.unwrapped(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}, source


def backbone_state(state):
    """The backbone's tensors of a network: those with the prefix `backbone.`, or all if none has it."""
    inner = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return inner or dict(state)


# ---- what a run says about its network ----


def find_weights(path, flag="--pretrained_weights"):
    """The file that a flag names: of a run's folder its checkpoint.pth, else the previous one, else backbone.pth.

    Of a folder that transformers' save_pretrained wrote, the weights. Anything but a folder is returned as it is.
    Raises UserError for a folder without any of them.
    """
    if not path or not os.path.isdir(path):
        return path
    names = ("checkpoint.pth", previous_checkpoint("checkpoint.pth"), BACKBONE, *dino_layouts.HF_FILES)
    files = [os.path.join(path, name) for name in names]
    found = [file for file in files if os.path.isfile(file)]
    if not found:
        raise UserError(
            f"{flag} {path} is a folder without a checkpoint.pth. Name the --output_dir of a run, or a file"
        )
    return found[0]


# The types of what other scripts follow, under the names of their flags.
FOLLOWED = {"arch": str, "patch_size": int, "image_size": int, "exif": bool}


def network_settings(args):
    """The FOLLOWED settings in the arguments of a run (a dict); `image_size` is the side of its global crops.

    Settings of another type are left out: checkpoints of other projects have arguments, too.
    """
    args = {**args, "image_size": args.get("global_crops_size", args.get("image_size"))}
    found = {name: args[name] for name, kind in FOLLOWED.items() if type(args.get(name)) is kind}
    return {name: value for name, value in found.items() if isinstance(value, str | bool) or 0 < value < 2**13}


def settings_of(args):
    """`network_settings`, and the fields of the run's utils.Inputs. Raises UserError if these do not fit together."""
    return {**network_settings(args), **utils.inputs_of(args)._asdict()}


def trained_args(path):
    """The arguments (a dict) with which the network in a file was trained; {} if there is nothing that says.

    A training checkpoint contains them. For plain weights, they are in a JSON file of the same name (see
    `write_backbone`), for transformers' in its config.json. Raises UserError if a file can't be read.
    """
    if not path or path == "random":
        return {}
    args = {} if str(path).endswith(".safetensors") else load_args(path)
    if args:
        return args
    args = dino_layouts.read_settings(Path(path).with_suffix(".json"), path)
    return args if "arch" in args else dino_layouts.hf_settings(Path(path))  # else the file is something else


def trained_settings(path):
    """`settings_of` the training of the network in a file; {} if there is nothing that says. Raises UserError."""
    args = trained_args(path)
    return settings_of(args) if args else {}


def trained_inputs(path):
    """The utils.Inputs of the network in a file; RGB for files that don't say, as the published ones."""
    return utils.inputs_of(trained_settings(path))


def photograph_inputs(path):
    """`trained_inputs` for scripts whose data are photographs. Raises UserError for other than 3 channels."""
    inputs = trained_inputs(path)
    if inputs.in_chans != 3:
        raise UserError(
            f"--pretrained_weights {path} was trained on other inputs ({inputs.describe()}). This script needs RGB "
            "photographs. eval_knn.py, eval_linear.py and eval_logistic.py do not"
        )
    return inputs


def follow_run(args, follow_size=True):
    """Let --pretrained_weights say what its network is, in the flags `args` (see dino_cli.model_flags).

    A run's folder becomes the file in it. Flags that were not given become the run's: --arch, --patch_size, --exif
    and, with `follow_size`, --image_size. Flags that were given stay, with a note if they differ. In a Namespace
    without `given` (see dino_cli.Flags), all are given. Returns the `trained_settings`. Raises UserError if the file
    can't be read.
    """
    args.pretrained_weights = find_weights(args.pretrained_weights)
    trained, given = trained_settings(args.pretrained_weights), getattr(args, "given", vars(args))
    names = [name for name in FOLLOWED if name in trained and name in args and (follow_size or name != "image_size")]
    differ = [name for name in names if as_word(getattr(args, name)) != as_word(trained[name])]
    followed = [name for name in differ if name not in given]
    for name in followed:
        setattr(args, name, trained[name])
    if utils.rank_from_environment("")[0] == 0:  # the processes have not met yet
        if followed:
            utils.say("as in training:", *(f"--{name} {as_word(trained[name])}" for name in followed))
        for name in [name for name in differ if name in given]:
            value, theirs = as_word(getattr(args, name)), as_word(trained[name])
            utils.say(f"note: --{name} {value} differs from the run's {theirs}")
    return trained


def as_word(value):
    """A setting as on the command line, and by one name."""
    return str(value).lower() if isinstance(value, bool) else ARCH_ALIASES.get(str(value), str(value))


BACKBONE = "backbone.pth"


def write_backbone(folder, backbone, args):
    """Write a trained backbone to backbone.pth and its settings to backbone.json. Returns the path. Raises OSError.

    The weights are a plain state dict of the network alone. `args` are the run's.
    """
    path, args = os.path.join(folder, BACKBONE), utils.plain_args(args)
    more = {name: args[name] for name in ("epochs", "images") if name in args}
    text = json.dumps({**settings_of(args), **more, "network": "teacher"}, indent=1).encode()
    save(path, {name: tensor.contiguous() for name, tensor in to_host(backbone.state_dict()).items()})
    utils.write_whole(Path(path).with_suffix(".json"), lambda file: file.write(text))
    return path


# ---- comparing settings ----

# The authors' other names of two networks.
ARCH_ALIASES = {"deit_tiny": "vit_tiny", "deit_small": "vit_small"}

# fmt: off
# These decide which tensors a run has. A checkpoint with other values can't be resumed from.
SHAPING_ARGS = ("arch", "patch_size", "in_chans", "out_dim", "norm_last_layer", "use_bn_in_head", "optimizer",
                "global_crops_size", "head_layers", "head_hidden_dim", "head_bottleneck_dim")
FREE_ARGS = (  # these do not change the result
    # where things are
    "config", "init_from", "data_path", "data_format", "output_dir", "dist_url",
    # how the run is watched, saved and stopped
    "max_bad_images", "strict_images", "max_bad_steps", "stop_on_collapse", "tensorboard", "wandb", "knn_every",
    "knn_data", "knn_student", "saveckp_freq", "saveckp_iters", "save_every_minutes", "saveckp_epochs",
    "allow_changed_args",
    # which hardware does it; images_per_step, which follows from these, is compared
    "device", "num_workers", "local_rank", "rank", "gpu", "world_size", "batch_size_per_gpu", "grad_accum_steps",
    "grad_checkpointing", "compile", "compute_stats",  # the mean and std that this measures are compared
)
# fmt: on
# Behavior of runs that are older than these arguments, and of the authors' runs.
ADDED_ARGS = {"color_jitter": [0.4, 0.4, 0.2, 0.1], "color_jitter_p": 0.8, "gray_p": 0.2, "solarize_p": 0.2}
ADDED_ARGS |= {"blur_p": [1.0, 0.1, 0.5], "blur_radius": [0.1, 2.0], "momentum_teacher_end": 1.0, "teacher": "ema"}
ADDED_ARGS |= {"centering": "mean", "center_momentum": 0.9, "student_temp": 0.1}
ADDED_ARGS |= {"head_layers": 3, "head_hidden_dim": 2048, "head_bottleneck_dim": 256}
IN_WORDS = {"images_per_step": "images per step", "images": "training images"}
IN_WORDS |= {"image_names": "names of the training images"}


def global_batch(args):
    """Images per step over all processes, from the arguments of a run as a dict; None if they don't say."""
    numbers = args.get("batch_size_per_gpu"), args.get("world_size", 1), args.get("grad_accum_steps", 1)
    return math.prod(numbers) if all(type(n) is int and 0 < n < 2**31 for n in numbers) else None


def comparable(args):
    """The arguments of a run as a dict, in one form for files of any age."""
    args = utils.plain_args(args)
    if args:
        args = ADDED_ARGS | args
        args["arch"] = ARCH_ALIASES.get(str(args.get("arch")), args.get("arch"))
        args["images_per_step"] = global_batch(args)
    if args and args.get("mean") is None:
        args |= {"in_chans": args.get("in_chans", 3), "mean": [*utils.IMAGENET_MEAN], "std": [*utils.IMAGENET_STD]}
    return args


def differ(one, other):
    """Whether two settings differ. A damaged file can have tensors there, which can't be compared."""
    return isinstance(one, torch.Tensor) or one != other


def check_resumable(path, checkpoint, args):
    """Raise UserError if a file is not a checkpoint that a run with `args` can resume from.

    Settings that shape tensors must be the same; others that change the result need --allow_changed_args, and are
    logged.
    """
    epoch = checkpoint.get("epoch") if isinstance(checkpoint, dict) else None
    networks = isinstance(epoch, int) and all(is_network_state(checkpoint.get(key)) for key in ("student", "teacher"))
    networks = networks and isinstance(checkpoint.get("args"), dict | argparse.Namespace | None)
    if not networks or epoch < 0:
        raise UserError(f"{path} is not a training checkpoint and would be overwritten. Move it, or use another folder")
    before, now = comparable(checkpoint.get("args")), comparable(args)
    changed = [name for name in now if name not in FREE_ARGS and differ(before.get(name, now[name]), now[name])]
    changed = [name for name in changed if before[name] is not None or name != "images_per_step"]
    if "images" in changed:  # then their names differ, too
        changed = [name for name in changed if name != "image_names"]
    shaping = [name for name in changed if name in SHAPING_ARGS]
    then, wanted = (
        [f"{IN_WORDS.get(name, '--' + name)} {str(values[name])[:200]}" for name in shaping or changed]
        for values in (before, now)
    )
    if shaping:
        raise UserError(
            f"{path} was made with {' '.join(then)}, this run has {' '.join(wanted)}. Use the same settings, or "
            "another --output_dir"
        )
    if changed and not getattr(args, "allow_changed_args", True):
        raise UserError(
            f"{path} was made with {', '.join(then)}; this run has {', '.join(wanted)}, which would change the result. "
            "Use the same settings or another --output_dir, or add --allow_changed_args true"
        )
    if changed:
        pairs = (f"{new} (was {str(before[name])[:200]})" for new, name in zip(wanted, changed, strict=True))
        utils.log(f"note: resuming with {', '.join(pairs)}")


# ---- resuming ----


def restart_from_checkpoint(path, run_variables=None, args=None, **objects):
    """Load each object's state from the checkpoint at `path`, if there is one, and update the dict `run_variables`.

    `objects` are modules, optimizers or scalers (None is skipped) by their keys in the file; a `module.` prefix of a
    module's keys does not matter. `args` are this run's, to compare. A damaged file is replaced by *.prev.pth. Returns
    the path of the loaded file, or None. Raises UserError if it does not fit.
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
            utils.log(f"warning: {path} has no {name!r}; it starts anew")
            continue
        try:
            load_state(target, checkpoint[name])
        except (RuntimeError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as e:
            problem = " ".join(str(e).split())[:300]
            raise UserError(
                f"{path} does not fit this run: {name}: {problem}. Use the settings of that run, or another "
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
    if isinstance(target, torch.amp.GradScaler):
        check_numbers(target.state_dict(), state, "")
    if isinstance(target, torch.optim.Optimizer):
        # The authors' files lack options that torch has added since; which kernels to use is this run's own choice.
        groups = []
        for ours, theirs in zip(target.param_groups, state["param_groups"], strict=True):
            kernels = {key: ours[key] for key in ("fused", "foreach", "capturable", "differentiable") if key in ours}
            check_numbers(
                {key: ours[key] for key in ours if key in theirs and key not in kernels}, theirs, "a group's "
            )
            groups.append({**ours, **theirs, **kernels})
        check_moments(target, state["state"], groups)
        state = {**state, "param_groups": groups}
    target.load_state_dict(state)
    if isinstance(target, torch.optim.Optimizer):  # fused kernels read memory in the order of the parameter
        for parameter, kept in target.state.items():
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    kept[name] = torch.empty_like(parameter).copy_(value)


def check_numbers(ours, theirs, whose):
    """Raise ValueError if a setting in `ours` has another kind in `theirs`. Switches must be the same."""
    for name, value in ours.items():
        pairs = [(value, theirs[name])]
        if isinstance(value, tuple) and isinstance(theirs[name], tuple | list):  # betas
            pairs = zip(value, theirs[name], strict=True)
        for mine, other in pairs if name != "params" else ():
            number = type(mine) in (int, float) and isinstance(other, int | float) and not isinstance(other, bool)
            if not (math.isfinite(other) if number else type(mine) is type(other) and mine == other):
                raise ValueError(f"{whose}{name} is {str(theirs[name])[:100]}, here it is {value}")


# The required entries of each parameter in the state of an optimizer.
MOMENTS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, utils.LARS: {"mu"}}


def check_moments(optimizer, state, groups):
    """Raise ValueError if moments have other shapes than their parameters: fused kernels would read other memory."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        kept, shape = state.get(number, {}), list(parameter.shape)
        missing = MOMENTS.get(type(optimizer), set()) - set(kept)
        if kept and missing:
            raise ValueError(f"parameter {number} of shape {shape} has no {', '.join(sorted(missing))}")
        for name, value in kept.items():
            if name == "step":
                fits = math.isfinite(value) and value >= 0  # of a tensor, one number
            else:
                fits = value is None or (value.is_floating_point() and value.shape == parameter.shape)
            if not fits:
                found = list(value.shape) if isinstance(value, torch.Tensor) else value
                raise ValueError(f"{name} of parameter {number} is {found}, the parameter is {shape}")


def position(progress, args, path):
    """(epoch, images of it that are done) of a checkpoint's `progress`. Raises UserError if it can't be true.

    Files of older versions count steps instead of images.
    """
    before = global_batch(utils.plain_args(progress["args"])) or global_batch(vars(args))
    images_done = progress["images_done"]
    if images_done is None and is_count(progress["step"]):
        images_done = progress["step"] * before
    valid = is_count(progress["epoch"]) and is_count(images_done) and isinstance(progress["meters"], list | tuple)
    if not (valid and all(map(are_totals, progress["meters"]))):
        raise UserError(
            f"{path} has an impossible position in its epoch: it is damaged, or made by something else. Remove it, or "
            "use another --output_dir"
        )
    return progress["epoch"], images_done


def is_count(value):
    return type(value) is int and 0 <= value < 2**53


def are_totals(totals):
    """Whether a value is {name: (total, count)}, as utils.MetricLogger.totals returns it."""

    def is_total(pair):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and type(pair[1]) in (int, float)):
            return False
        if not 0 <= pair[1] < 2**53:  # a fraction if the number of processes has changed
            return False
        return type(pair[0]) is float or (type(pair[0]) is int and abs(pair[0]) < 2**53)

    return (
        isinstance(totals, dict)
        and all(isinstance(name, str) for name in totals)
        and all(map(is_total, totals.values()))
    )


# ---- log.txt ----


def drop_log_lines(output_dir, first_epoch, ours):
    """Remove the lines of `first_epoch` and later from log.txt, which a restart writes again, and a torn last line.

    Only lines {key: value} for which `ours` is true: log.txt may have lines of other scripts.
    """
    path = Path(output_dir) / "log.txt"
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for i, line in enumerate(lines) if not is_outdated(line, first_epoch, ours, i == len(lines) - 1)]
    if kept and not kept[-1].endswith(b"\n"):
        kept[-1] += b"\n"
    if kept != lines:
        utils.write_whole(path, lambda file: file.write(b"".join(kept)))


def is_outdated(line, first_epoch, ours, last):
    try:
        logged = json.loads(line)
    except ValueError:
        return last and line.startswith(b"{")
    epoch = logged.get("epoch") if isinstance(logged, dict) and ours(logged) else None
    return isinstance(epoch, int) and epoch >= first_epoch
