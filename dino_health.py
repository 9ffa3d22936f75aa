"""What a run says of itself: numbers behind the loss, warnings that say what to do, curves, and where it ran.

The loss alone tells little: it can stand still while features get better, and fall while they collapse. Split into the
teacher's entropy and the divergence of the student from it (section 5.3 of the paper) it answers.
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
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import dino_backbones
import utils
from utils import UserError

# ---- numbers ----


NUMBERS = ("top_prototype", "center_norm", "feature_std", "grad_norm", "grad_norm_max")


@torch.no_grad()
def step_numbers(features, dino_loss, gradient_norms):
    """Numbers about the step just made, {name: number}.

    `features` [2·B, D] are the teacher's of the global crops, `gradient_norms` has a norm for each parameter. What is
    not finite is left out: under fp16 gradients overflow until the scaler has found its scale.
    """
    found = {
        "top_prototype": dino_loss.top_prototype,
        "center_norm": dino_loss.center.norm(),
        "feature_std": F.normalize(features.float(), dim=-1).std(dim=0, correction=0).mean(),
        "grad_norm": gradient_norms.median(),
        "grad_norm_max": gradient_norms.max(),
    }
    numbers = torch.stack([value.float() for value in found.values()]).tolist()  # one transfer
    return {name: number for name, number in zip(found, numbers, strict=True) if math.isfinite(number)}


def norm_of_weights(network):
    return torch.stack(torch._foreach_norm([p.detach() for p in network.parameters()])).double().sum().item()


# ---- warnings ----

PATIENCE = 3  # times in a row that a condition has to be seen on the log


def conditions(numbers):
    """{name: what is wrong and what to do} of what a step's numbers show; those of COLLAPSE mean a collapse."""
    ln_k, dim, found = numbers["ln_k"], numbers["feature_dim"], {}
    if numbers["entropy"] > 0.99 * ln_k and numbers["warm"]:
        found["uniform"] = (
            f"the teacher's entropy is {numbers['entropy']:.3f}, all but ln K = {ln_k:.3f}: every prototype is as "
            "likely as any other (uniform collapse). Lower --warmup_teacher_temp and --teacher_temp"
        )
    if numbers["entropy"] < 0.05 * ln_k and numbers["top_prototype"] > 0.25:  # sharp and balanced is no collapse
        found["dominant"] = (
            f"the teacher's entropy is {numbers['entropy']:.4f}, near 0, and one prototype has "
            f"{100 * numbers['top_prototype']:.0f} % of the images: it looks like collapse onto one. Is the center "
            "being moved? Raise --teacher_temp a little, or lower --lr"
        )
    if numbers["kl"] < 0.002 * ln_k:
        found["agreement"] = (
            f"the student differs from the teacher by a KL divergence of {numbers['kl']:.5f}, near 0: there is nothing "
            "left to learn from it (collapse). Lower --teacher_temp, and --lr; look at the augmentation"
        )
    if numbers["feature_std"] < 0.1 / math.sqrt(dim) and numbers["images"] > 2:  # views of one image are alike
        found["features"] = (
            f"the features of different images are nearly the same (standard deviation {numbers['feature_std']:.5f}, "
            f"where 1/√d is {1 / math.sqrt(dim):.4f}). Lower --lr, or start again with --norm_last_layer true"
        )
    return found


COLLAPSE = ("uniform", "dominant", "agreement", "features")

# Settings that are allowed, and seldom meant: {name: what is wrong and what to do} of the arguments, the images a step
# and the images an epoch.


def unwise_teacher(args, batch, images):
    found, temperature = {}, max(args.teacher_temp, args.warmup_teacher_temp)
    if temperature > 0.07:
        found["temperature"] = (
            f"a teacher temperature of {temperature} is more than 0.07, up to which training is known to be "
            "stable. Lower --teacher_temp and --warmup_teacher_temp"
        )
    if args.warmup_teacher_temp_epochs and args.teacher_temp < args.warmup_teacher_temp:
        found["falling temperature"] = (
            f"the teacher's temperature falls, from --warmup_teacher_temp {args.warmup_teacher_temp} to --teacher_temp "
            f"{args.teacher_temp}. The warm-up is there to start lower, where training is steadier: exchange the two"
        )
    horizon = batch / max(1 - args.momentum_teacher, 1e-9)  # images that the teacher averages over
    if horizon < min(64_000, args.epochs * images / 1000):
        found["momentum"] = (
            f"--momentum_teacher {args.momentum_teacher} is low for {batch} images a step: the teacher averages "
            f"over only {horizon:.0f} images of the run's {args.epochs * images}. Small batches need it closer to 1, "
            "such as 0.9995 for 256"
        )
    elif args.momentum_teacher < 0.9:
        found["momentum"] = (
            f"--momentum_teacher {args.momentum_teacher} makes the teacher all but a copy of the student, which is "
            "known to learn nothing. Take 0.99 or more"
        )
    if args.momentum_teacher == 1:
        found["still teacher"] = (
            "--momentum_teacher 1 leaves the teacher as it is at the start, at random unless there is --init_from. "
            "Take less, 0.996 to 0.9995"
        )
    if batch < 8:
        found["batch"] = (
            f"{batch} images a step are so few that the center, a mean over the last ten steps or so, is mostly noise. "
            "Raise --batch_size_per_gpu, or --grad_accum_steps, to 8 or more"
        )
    if args.out_dim > 10 * images:
        found["prototypes"] = (
            f"--out_dim {args.out_dim} is more than ten prototypes for each of {images} images: most of them will "
            "never be used, and each costs time. A few thousand images are served by 1024 to 4096"
        )
    return found


def unwise_optimisation(args, batch, images):
    found, peak_lr = {}, args.lr * batch / 256
    if args.lr == 0:
        found["lr"] = "with --lr 0 nothing is learnt but what the end of the schedule, --min_lr, brings"
    elif args.min_lr > peak_lr:
        found["lr"] = (
            f"the learning rate rises to the end of the run: --min_lr {args.min_lr} is more than the highest, --lr "
            f"{args.lr} × {batch} / 256 = {peak_lr:.2g}. Lower --min_lr"
        )
    if args.optimizer == "adamw" and args.lr > 0.005:
        found["high lr"] = (
            f"--lr {args.lr} is more than ten times the usual 0.0005 of adamw, which is for 256 images a step and "
            "scaled by the batch already. Lower it"
        )
    if args.weight_decay_end < args.weight_decay:
        found["weight decay"] = (
            f"the weight decay falls, from --weight_decay {args.weight_decay} to --weight_decay_end "
            f"{args.weight_decay_end}. It is meant to rise, 0.04 to 0.4, or to stay: give both the same value"
        )
    if args.warmup_epochs > args.epochs / 2:
        found["warm-up"] = (
            f"--warmup_epochs {args.warmup_epochs} take more than half of --epochs {args.epochs}: hardly any are left "
            "at a full learning rate. A tenth of the run is enough"
        )
    if args.freeze_last_layer >= args.epochs:
        found["frozen layer"] = (
            f"--freeze_last_layer {args.freeze_last_layer} keeps the head's last layer at its random start for all of "
            f"--epochs {args.epochs}. Lower it"
        )
    if not args.use_fp16 and args.amp_dtype != "auto":
        found["precision"] = f"--amp_dtype {args.amp_dtype} has no effect with --use_fp16 false. Leave one of them out"
    if args.use_fp16 and args.amp_dtype == "fp16" and args.patch_size <= 8 and dino_backbones.vit_factory(args.arch):
        found["precision"] = (
            f"fp16 is known to be unstable with patches of {args.patch_size}. Take --amp_dtype bf16, or --use_fp16 "
            "false"
        )
    return found


def unwise_crops(args, batch, images):
    found, size = {}, args.global_crops_size
    (global_min, _), (_, local_max) = args.global_crops_scale, args.local_crops_scale
    if not args.local_crops_number and global_min > 0.25:
        found["global scale"] = (
            f"without local crops the two global ones, of at least {global_min} of the image, are too alike to learn "
            "much from. Take --global_crops_scale 0.14 1"
        )
    if args.local_crops_number and local_max > 2 * global_min:
        found["local scale"] = (
            f"local crops cover up to {local_max} of an image, global ones from {global_min} on: the small ones are "
            "often the larger part. Let --local_crops_scale end where --global_crops_scale begins"
        )
    if args.local_crops_number and args.local_crops_size > size:
        found["local size"] = (
            f"--local_crops_size {args.local_crops_size} is larger than --global_crops_size {size}: each step costs "
            "more than with global crops alone. About 0.43 of it is usual"
        )
    if dino_backbones.vit_factory(args.arch) and size < 2 * args.patch_size:
        found["patches"] = (
            f"--global_crops_size {size} is a single patch of --patch_size {args.patch_size}: there is nothing for "
            "attention to attend to. Take larger crops or smaller patches"
        )
    if size <= 64 and args.blur_radius[1] > 1:
        found["blur"] = (
            f"a blur of up to {args.blur_radius[1]} pixels (--blur_radius) wipes out all texture of crops of {size}. "
            "Take --blur_radius 0.1 0.5"
        )
    return found


class HealthMonitor:
    """Looks at a run's numbers, on rank 0, and warns, once for a condition, also of a run that is stopped and goes on.

    `warnings` has what was said and is not in the log yet, `collapse` what is seen of one, if anything. `steps` are
    those of an epoch, `state` what `state_dict` gave.
    """

    REMEMBERED = ("seen", "warnings", "streaks", "norms", "best_knn", "best_epoch", "bad_images")

    def __init__(self, args, steps, curves=None, state=None):
        self.args, self.steps, self.curves, self.collapse = args, steps, curves, ""
        self.seen, self.warnings, self.streaks, self.norms = [], [], {}, None
        self.best_knn, self.best_epoch, self.bad_images = -1.0, None, {}
        for name in self.REMEMBERED if isinstance(state, dict) else ():
            value, default = state.get(name), getattr(self, name)
            if isinstance(value, type(default)) or (default is None and isinstance(value, int | list)):
                setattr(self, name, value)

    def state_dict(self):
        """What a checkpoint has to keep, that the rest of the run says what it would have said without a stop."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.REMEMBERED}

    def warn(self, name, what):
        if name not in self.seen and utils.is_main_process():
            self.seen.append(name)
            self.warnings.append(what)
            utils.log(f"warning: {what}")

    def check_settings(self):
        """What can be said before the first step."""
        batch = utils.global_batch(vars(self.args))
        for look in (unwise_teacher, unwise_optimisation, unwise_crops):
            for name, what in look(self.args, batch, self.steps * batch).items():
                self.warn(name, what)

    def check_step(self, step, numbers, student, teacher):
        """At what step `step` of the run shows: a dict of numbers, as `measure` and the log have them."""
        warm = max(self.args.warmup_epochs, self.args.warmup_teacher_temp_epochs, self.args.freeze_last_layer)
        numbers = {**numbers, "ln_k": math.log(self.args.out_dim), "warm": step >= warm * self.steps}
        found = conditions(numbers)
        norms = [norm_of_weights(teacher), norm_of_weights(student)]
        late = step > 0.9 * self.args.epochs * self.steps  # the momentum is all but 1 there
        if self.norms and norms[0] == self.norms[0] and norms[1] != self.norms[1] and not late:
            found["still"] = (
                "the student changes and the teacher does not. --momentum_teacher must be less than 1, 0.996 to 0.9995"
            )
        self.norms = norms
        self.streaks = {name: self.streaks.get(name, 0) + 1 for name in found}
        for name, what in found.items():
            if self.streaks[name] >= PATIENCE:
                self.warn(name, what)
                if name in COLLAPSE:
                    self.collapse = what

    def check_epoch(self, stats):
        """At what goes into the log."""
        waiting = stats.get("train_data_wait", 0.0)
        epoch_seconds = self.steps * utils.global_batch(vars(self.args)) / stats.get("train_images_per_s", math.inf)
        if waiting > 0.25 and waiting * epoch_seconds > 30:
            self.warn(
                "loader",
                "the loaders don't keep up: more than a quarter of the time goes by with waiting for images. Try "
                "--augmentation fast, or more --num_workers",
            )
        if "knn_top1" in stats:
            self.curves.add((stats["epoch"] + 1) * self.steps - 1, {"knn_top1": stats["knn_top1"]})
            if stats["knn_top1"] > self.best_knn:
                self.best_knn, self.best_epoch = stats["knn_top1"], stats["epoch"]
                utils.log("the best so far: it becomes checkpoint_best.pth")


# ---- where it ran ----


def describe_environment(args, parser):
    """What one wants to know of a run a year later: a dict of plain types."""
    defaults = vars(parser.parse_args([]))
    changed = {k: v for k, v in utils.plain_args(args).items() if k in defaults and v != utils.plain_args(defaults)[k]}
    used = torch.cuda.is_initialized()  # else asking for names would take GPU memory
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if used else []
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "changed": changed,
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
    """The commit of this code, and how many of its files were changed since; None if it is no checkout."""
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*words):
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "changed_files": len(git("status", "--porcelain", "--untracked-files=no").splitlines()),
        }
    except (OSError, subprocess.SubprocessError):
        return None


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
    """Raise UserError if curves are asked for that can't be drawn here."""
    if args.tensorboard == "on":
        summary_writer(required=True)
    if args.wandb:
        log_in_to_wandb(args.wandb)


def summary_writer(required=False):
    """TensorBoard's SummaryWriter, or None if it is not installed or does not work."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as e:  # also what a protobuf or TensorFlow that does not fit raises
        if required:
            raise UserError("--tensorboard on needs TensorBoard: pip install tensorboard") from e
        return None
    return SummaryWriter


def import_wandb(project):
    try:
        import wandb
    except Exception as e:  # an old one raises others than ImportError where numpy or protobuf is new
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--wandb {project} needs its client: pip install --upgrade wandb ({reason})") from e
    return wandb


def log_in_to_wandb(project):
    """Find out, in the first process, whether curves can be sent: the client itself waits for minutes, or goes without.

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
            "WANDB_MODE=offline: the curves then wait in --output_dir for `wandb sync`"
        ) from e


class Curves:
    """Sends numbers to TensorBoard and to Weights & Biases, on rank 0, where they are wanted.

    If that fails, a warning says so once, and the run goes on without.
    """

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
            # The same folder is the same run, also when it goes on.
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
        except Exception as e:  # a full disk, no network: no reason to end a run
            utils.log(f"warning: no curves from here on: {' '.join(str(e).split())[:200] or type(e).__name__}")
            self.send = []
