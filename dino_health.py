"""What a run says of itself: numbers beside the loss, warnings that say what to change, curves, where it ran.

The loss alone says little: it can stand still while features improve, and fall while they collapse. Split into the
teacher's entropy and the KL divergence of the student from it (section 5.3 of the paper), it tells which.
"""

import copy
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F

import utils
from utils import UserError

# ---- numbers ----

NUMBERS = ("top_prototype", "center_norm", "feature_std", "grad_norm", "grad_norm_max")


@torch.no_grad()
def step_numbers(features, dino_loss, gradient_norms):
    """Numbers about the step just made, on the device: {name: scalar}.

    `features` [2 * B, D] are the teacher's features of the global crops, `gradient_norms` has one norm per parameter.
    """
    return {
        "top_prototype": dino_loss.top_prototype,
        "center_norm": dino_loss.center.norm(),
        "feature_std": F.normalize(features.float(), dim=-1).std(dim=0, correction=0).mean(),
        "grad_norm": gradient_norms.median(),
        "grad_norm_max": gradient_norms.max(),
    }


def norms_of_weights(network):
    """L2 norm of each parameter [n], on the device."""
    return torch.stack(torch._foreach_norm([p.detach() for p in network.parameters()]))


# ---- warnings ----

# The networks that --patch_size is for, as in dino_backbones.vit_names.
VITS = tuple(f"vit_{size}{stem}" for size in ("nano", "tiny", "small", "base") for stem in ("", "_conv"))

PATIENCE = 3  # log lines in a row that must show a condition before it is a warning
COLLAPSE = ("uniform", "dominant", "agreement", "features")


def conditions(numbers):
    """{name: problem and remedy} for the numbers of one step. The names in COLLAPSE mean a collapse."""
    ln_k, dim, found = numbers["ln_k"], numbers["feature_dim"], {}
    if numbers["entropy"] > 0.99 * ln_k and numbers["warm"]:
        found["uniform"] = (
            f"the teacher's entropy is {numbers['entropy']:.3f}, nearly ln K = {ln_k:.3f}: all prototypes are equally "
            "likely (uniform collapse). Lower --warmup_teacher_temp and --teacher_temp"
        )
    if numbers["entropy"] < 0.05 * ln_k and numbers["top_prototype"] > 0.25:  # sharp but balanced is not a collapse
        found["dominant"] = (
            f"the teacher's entropy is {numbers['entropy']:.4f}, near 0, and one prototype has "
            f"{100 * numbers['top_prototype']:.0f} % of the images (collapse onto one). Raise --teacher_temp a little, "
            "lower --lr, or use --centering sinkhorn"
        )
    if numbers["kl"] < 0.002 * ln_k:
        found["agreement"] = (
            f"the KL divergence of the student from the teacher is {numbers['kl']:.5f}, near 0: nothing is left to "
            "learn (collapse). Lower --teacher_temp and --lr, and check the augmentation"
        )
    if numbers["feature_std"] < 0.1 / math.sqrt(dim) and numbers["images"] > 2:  # views of one image are alike
        found["features"] = (
            f"features of different images are nearly the same (standard deviation {numbers['feature_std']:.5f}, "
            f"where 1/sqrt(D) is {1 / math.sqrt(dim):.4f}). Lower --lr. "
            "If --norm_last_layer is false, start again with true"
        )
    return found


ENOUGH = 945  # steps of the demo, which is about as short as a run that learns can be


def suspicious_settings(args, steps):
    """{name: problem and remedy} for settings that are allowed and have cost people a run.

    `steps` is their number per epoch.
    """
    found, images = {}, steps * args.images_per_step
    if not args.init_from and args.epochs * steps < ENOUGH / 4:
        found["short"] = (
            f"{args.epochs * steps} steps in all are too few to learn from random weights (the demo has {ENOUGH}). "
            f"Use --epochs {math.ceil(ENOUGH / max(steps, 1))}"
        )
    temperature = max(args.teacher_temp, args.warmup_teacher_temp)
    if temperature > 0.07:
        found["temperature"] = (
            f"a teacher temperature of {temperature} is above 0.07, where training is known to be unstable. Lower "
            "--teacher_temp and --warmup_teacher_temp"
        )
    horizon = args.images_per_step / max(1 - args.momentum_teacher, 1e-9)  # images that the teacher averages over
    if args.momentum_teacher == 1:
        found["momentum"] = "--momentum_teacher 1 freezes the teacher at its initial weights. Use 0.996 to 0.9995"
    elif args.teacher == "ema" and (horizon < min(64_000, args.epochs * images / 1000) or args.momentum_teacher < 0.9):
        found["momentum"] = (
            f"--momentum_teacher {args.momentum_teacher} is low for {args.images_per_step} images per step: the "
            f"teacher averages over only {horizon:.0f} of the run's {args.epochs * images} images. Use 0.9995 for 256 "
            "images per step, and more for fewer"
        )
    if (
        args.global_crops_size <= 64
        and args.blur_radius[1] > 1
        and any(args.blur_p[: 3 if args.local_crops_number else 2])
    ):
        found["blur"] = (
            f"blur of up to {args.blur_radius[1]} pixels removes all texture from crops of {args.global_crops_size}. "
            "Use --blur_radius 0.1 0.5"
        )
    if args.out_dim > 10 * args.images:
        found["prototypes"] = (
            f"--out_dim {args.out_dim} is more than ten prototypes per image ({args.images} images): most will never "
            f"be used, and each costs time. Use at most {10 * args.images}"
        )
    if args.use_fp16 and args.amp_dtype == "fp16" and args.patch_size <= 8 and args.arch in VITS:
        found["precision"] = (
            f"fp16 is known to be unstable with --patch_size {args.patch_size}. Use --amp_dtype bf16, or --use_fp16 "
            "false"
        )
    if not args.local_crops_number and args.global_crops_scale[0] > 0.25:
        found["global scale"] = (
            f"without local crops, two global crops of at least {args.global_crops_scale[0]} of the image are too "
            "alike to learn much from. Use --global_crops_scale 0.14 1"
        )
    return found


class HealthMonitor:
    """Checks a run's numbers on rank 0 and warns once per condition, also across restarts.

    `warnings` has those that are not in the log yet; `collapse` describes a collapse, if there is one. `steps` is per
    epoch, `state` the result of `state_dict`.
    """

    # The attributes that a checkpoint keeps. Values of other types are left out.
    REMEMBERED: ClassVar = {
        "seen": lambda value: type(value) is list and all(type(name) is str for name in value),
        "warnings": lambda value: type(value) is list and all(type(what) is str for what in value),
        "streaks": lambda value: type(value) is dict and all(type(number) is int for number in value.values()),
        "norms": lambda value: type(value) is list and [type(norm) for norm in value] == [float, float],
        "best_knn": lambda value: type(value) is float and value <= 100,
        "best_epoch": lambda value: type(value) is int,
        "baselines": lambda value: type(value) is dict,
    }

    def __init__(self, args, steps, curves=None, state=None):
        self.args, self.steps, self.curves, self.collapse = args, steps, curves, ""
        self.seen, self.warnings, self.streaks, self.norms, self.baselines = [], [], {}, None, {}
        self.forget_best()
        for name, fits in self.REMEMBERED.items() if isinstance(state, dict) else ():
            if fits(state.get(name)):
                setattr(self, name, state[name])
        self.baselines = {k: v for k, v in self.baselines.items() if k in BASELINES and isinstance(v, float)}

    def state_dict(self):
        """What a checkpoint has to keep, so that a resumed run warns exactly as if it had not been stopped."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.REMEMBERED}

    def forget_best(self):
        self.best_knn, self.best_epoch = -1.0, None

    def warn(self, name, what):
        if name not in self.seen and utils.is_main_process():
            self.seen.append(name)
            self.warnings.append(what)
            utils.log(f"warning: {what}")

    def check_settings(self):
        """Before the first step."""
        for name, what in suspicious_settings(self.args, self.steps).items():
            self.warn(name, what)

    def check_step(self, step, numbers, student_norms, teacher_norms):
        """After step `step` of the run, with its numbers as `step_numbers` and the log have them.

        The norms are lists, one per parameter as `norms_of_weights` gives them.
        """
        warm = max(self.args.warmup_epochs, self.args.warmup_teacher_temp_epochs, self.args.freeze_last_layer)
        numbers = {**numbers, "ln_k": math.log(self.args.out_dim), "warm": step >= warm * self.steps}
        found = conditions(numbers)
        norms = [math.fsum(teacher_norms), math.fsum(student_norms)]
        late = step > 0.9 * self.args.epochs * self.steps  # where the momentum is nearly 1
        late |= self.args.teacher == "previous_epoch"
        if self.norms and norms[0] == self.norms[0] and norms[1] != self.norms[1] and not late:
            found["still"] = "the student changes but the teacher does not. Lower --momentum_teacher (0.996 to 0.9995)"
        self.norms = norms
        self.streaks = {name: self.streaks.get(name, 0) + 1 for name in found}
        for name, what in found.items():
            if self.streaks[name] >= PATIENCE:
                self.warn(name, what)
                if name in COLLAPSE:
                    self.collapse = what

    def check_epoch(self, stats):
        """After an epoch, with its line of the log. Returns whether its k-NN accuracy is the best so far."""
        waiting = stats.get("train_data_wait", 0.0)
        epoch_seconds = self.steps * self.args.images_per_step / stats.get("train_images_per_s", math.inf)
        if waiting > 0.25 and waiting * epoch_seconds > 30:
            self.warn(
                "loader",
                "the data loader is too slow: more than a quarter of the time is spent waiting for images. Try "
                "--augmentation fast, or more --num_workers",
            )
        if "knn_top1" in stats:
            self.curves.add((stats["epoch"] + 1) * self.steps - 1, {"knn_top1": stats["knn_top1"]})
            if stats["knn_top1"] > self.best_knn:
                self.best_knn, self.best_epoch = stats["knn_top1"], stats["epoch"]
                utils.log("best k-NN accuracy so far: goes to checkpoint_best.pth")
            if stats["epoch"] + 1 == self.args.epochs and self.best_knn <= stats.get("knn_start", -1):
                self.warn(
                    "no gain",
                    f"the features are no better than before training: top-1 {describe_knn(stats, self.args)}. Start a "
                    "longer run in another --output_dir, and see docs/troubleshooting.md (k-NN accuracy falls)",
                )
        return self.best_epoch == stats["epoch"]


# ---- first and last words ----

BASELINES = ("knn_start", "knn_raw_pixels")


def describe_knn(stats, args):
    """A k-NN accuracy and its baselines, from a line of the log: `53.12 % (untrained 24.03, raw pixels 22.00)`."""
    known = describe_baselines(stats, args)
    return f"{stats['knn_top1']:.2f} %" + (f" ({known})" if known else "")


def describe_baselines(stats, args):
    words = ("start weights" if args.init_from else "untrained", "raw pixels")
    return ", ".join(f"{word} {stats[name]:.2f}" for word, name in zip(words, BASELINES, strict=True) if name in stats)


def changed_settings(args, parser):
    """{flag: value} for the settings that differ from the defaults."""
    defaults = utils.plain_args(parser.parse_args([]))
    return {k: v for k, v in utils.plain_args(args).items() if k in defaults and v != defaults[k]}


WAITING = "OMP_WAIT_POLICY"


def describe_start(args, parser, device, amp_dtype, steps_per_epoch):
    """What runs where, and with which settings."""
    float32 = "tf32" if args.use_fp16 and args.amp_dtype == "tf32" else "fp32"
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(amp_dtype, float32)
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ") if device.type == "cuda" else device.type.upper()
    patch = f"/{args.patch_size}" if args.arch in VITS else ""
    settings = {k: v for k, v in changed_settings(args, parser).items() if k not in ("config", "output_dir")}
    words = [f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in settings.items()]
    changed = textwrap.fill(", ".join(words) or "none", 118, break_long_words=False, break_on_hyphens=False)
    lines = [
        f"{args.arch}{patch} on {args.world_size} x {name} in {precision}: {args.images:,} images, {steps_per_epoch:,} "
        f"steps per epoch, {args.epochs} epochs",
        "settings that differ from the defaults (all are in run.json):",
        textwrap.indent(changed, "  "),
        "a line per 10 steps: loss = entropy of the teacher + KL divergence of the student from it",
    ]
    unused = args.images - steps_per_epoch * args.images_per_step
    if unused > 0.05 * args.images:
        lines.append(f"note: {unused:,} images per epoch do not fill a step of {args.images_per_step} and are not used")
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if device.type == "cpu" and torch.get_num_threads() > 1 and load > 0.75 * cores and not os.environ.get(WAITING):
        lines.append(
            f"note: this machine is busy (load average {load:.1f} on {cores} cores). If other programs use it, torch's "
            f"threads keep waiting for each other: start with {WAITING}=PASSIVE in the environment"
        )
    return "\n".join(lines)


def describe_end(args, stats, path, seconds):
    """What a run has come to, and the next commands, ready to paste. `stats` is the last line of its log."""
    result = [f"loss {stats['train_loss']:.4f}"] if "train_loss" in stats else []
    if "knn_top1" in stats:
        result.append(f"k-NN top-1 {describe_knn(stats, args)}")
    labeled = args.knn_data or (args.data_path if args.data_path == "sample" else None)
    folder = shlex.quote(args.output_dir)
    command = f"eval_knn.py --pretrained_weights {folder} --data_path {shlex.quote(labeled or '')}"
    if not labeled:
        data = shlex.quote(args.data_path)
        command = f"embed.py --pretrained_weights {folder} --data_path {data} --output vectors.npz"
    return (
        f"finished{': ' * bool(result)}{', '.join(result)}. This run took {seconds:.0f} s; weights are in {path}\n"
        f"next: python {command}\n"
        f"      python report.py {folder}"
    )


# ---- where it ran ----


def describe_environment(args, parser):
    """What one wants to know about a run a year later: a dict of plain types."""
    used = torch.cuda.is_initialized()  # else asking for names would use GPU memory
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if used else []
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "changed": changed_settings(args, parser),
        "args": utils.plain_args(args),
        "processes": args.world_size,
        "machine": {
            "host": platform.node(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "gpus": gpus,
            "memory_gb": memory_gb(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **library_versions()},
        "git": git_state(),
    }


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def memory_gb():
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def library_versions():
    import importlib.metadata

    found = {}
    for name in ("torchvision", "timm", "pillow", "opencv-python-headless"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state():
    """The commit of this code and the number of files changed since; None if it is not a checkout."""
    try:
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": git("rev-parse", "HEAD"), "changed_files": len(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def get_sha():
    """The commit of this code, as the authors' utils prints it."""
    state = git_state()
    if state is None:
        return "sha: N/A, status: clean, branch: N/A"
    status = "has uncommitted changes" if state["changed_files"] else "clean"
    return f"sha: {state['commit']}, status: {status}, branch: {git('rev-parse', '--abbrev-ref', 'HEAD')}"


def git(*words):
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def write_environment(args, parser):
    """run.json beside the log, on rank 0."""
    if utils.is_main_process():
        text = json.dumps(describe_environment(args, parser), indent=1, default=str)
        try:
            utils.write_whole(os.path.join(args.output_dir, "run.json"), lambda file: file.write(text.encode()))
        except OSError as e:
            utils.log(f"warning: run.json could not be written ({e.strerror})")


# ---- curves ----


def check_curves(args):
    """Raise UserError if curves are requested that can't be drawn here."""
    if args.tensorboard == "on":
        summary_writer(required=True)
    if args.wandb:
        log_in_to_wandb(args.wandb)


def summary_writer(required=False):
    """TensorBoard's SummaryWriter, or None if it is not installed or does not work."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as e:  # an incompatible protobuf or TensorFlow raises other types
        if required:
            raise UserError("--tensorboard on needs TensorBoard: pip install tensorboard") from e
        return None
    return SummaryWriter


def import_wandb(project):
    try:
        import wandb
    except Exception as e:  # an old client raises other types than ImportError where numpy or protobuf is new
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--wandb {project} needs its client: pip install --upgrade wandb ({reason})") from e
    return wandb


def log_in_to_wandb(project):
    """Check in the first process that curves can be sent: the client itself would wait for minutes, or skip them.

    On a terminal it may ask for a key. Raises UserError.
    """
    wandb = import_wandb(project)
    if (
        utils.rank_from_environment("")[0] > 0 or os.environ.get("WANDB_MODE", "online") != "online"
    ):  # offline, disabled
        return
    try:
        wandb.login(verify=True)
    except Exception as e:  # its types differ from version to version
        reason = " ".join(str(e).split())[:200].rstrip(".") or type(e).__name__
        raise UserError(
            f"--wandb {project} can't log in: {reason}. Run `wandb login` where there is a network, or set "
            "WANDB_MODE=offline: the curves are then kept in --output_dir for `wandb sync`"
        ) from e


class Curves:
    """Sends numbers to TensorBoard and Weights & Biases, on rank 0. If that fails, the run continues without them."""

    def __init__(self, args):
        self.send, self.end = [], []
        self.try_to(self.open_tensorboard, args)
        self.try_to(self.open_wandb, args)

    def open_tensorboard(self, args):
        writer = summary_writer() if args.tensorboard != "off" and utils.is_main_process() else None
        if writer:
            board = writer(os.path.join(args.output_dir, "tensorboard"))
            self.send.append(lambda step, numbers: [board.add_scalar(k, v, step) for k, v in numbers.items()])
            self.end.append(board.close)

    def open_wandb(self, args):
        if args.wandb and utils.is_main_process():
            folder = os.path.abspath(args.output_dir)
            # The same folder is the same run, also when it resumes.
            same = {"id": hashlib.blake2b(folder.encode(), digest_size=8).hexdigest(), "resume": "allow"}
            about = {"project": args.wandb, "name": os.path.basename(folder), "config": utils.plain_args(args)}
            run = import_wandb(args.wandb).init(dir=folder, **about, **same)
            self.send.append(lambda step, numbers: run.log(numbers, step=step))
            self.end.append(run.finish)

    def add(self, step, numbers):
        for send in self.send:
            self.try_to(send, step, numbers)

    def close(self):
        for end in self.end:
            self.try_to(end)

    def try_to(self, act, *args):
        try:
            act(*args)
        except Exception as e:  # a full disk or no network must not end a run
            utils.log(f"warning: no more curves: {' '.join(str(e).split())[:200] or type(e).__name__}")
            self.send = []
