"""What any DINO code shares: errors, seeds, processes, meters, schedules, optimizers, multi-crop, normalization.

All public names of the authors' utils are here. Some live in another file, where `__getattr__` finds them, so that
importing utils imports none of our files.
"""

import argparse
import atexit
import contextlib
import datetime
import difflib
import errno
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.init import trunc_normal_  # noqa: F401 - public
from tqdm import tqdm

# Public names that live in another file.
ELSEWHERE = {
    "dino_backbones": ("load_pretrained_weights", "load_pretrained_linear_weights"),
    "dino_checkpoints": ("restart_from_checkpoint",),
    "dino_cli": ("reduce_dict", "setup_for_distributed"),
    "dino_crops": ("GaussianBlur", "Solarization"),
    "dino_features": ("PCA", "accuracy", "compute_ap", "compute_map", "load_run", "multi_scale"),
    "dino_health": ("get_sha",),
}


def __getattr__(name):
    for module, names in ELSEWHERE.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'utils' has no attribute {name!r}")


# ---- errors and words ----


class UserError(ValueError):
    """What the user can fix: printed as one line without a traceback. The process exits with `exit_code`."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(BaseException):
    """Work that a signal has ended on all ranks; `signal` is its number. No `except Exception` may swallow it."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = number


def bool_flag(text):
    """argparse type of an on/off flag: on, true, 1 or off, false, 0, in any case."""
    value = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be {bool_flag.range}")
    return value


def did_you_mean(name, known):
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def printable(name):
    """A name as it is, or as Python writes it if it has unprintable characters: on one line in any case."""
    return name if name.isprintable() else repr(name)


def summarize(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def plain_args(args):
    """The arguments of a run (Namespace or dict) as a dict of plain types."""
    if not isinstance(args, dict):
        args = vars(args) if isinstance(args, argparse.Namespace) else {}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in args.items()}


# ---- randomness ----

# What a seed is for, as the second argument of derive_seed, so that no two uses share a stream.
ORDER, SAMPLE, STEP, REPLACEMENT = range(4)


def derive_seed(*parts):
    """A 63-bit seed that depends on all of the non-negative integers `parts` and on their order."""
    words = repr(tuple(map(int, parts))).encode()  # SeedSequence would not tell (1, 2) from (1, 2, 0)
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1


def fix_random_seeds(seed=0, cpu_only=False):
    """Seed torch (on all devices, which takes half a millisecond, or only on the CPU), numpy and Python."""
    (torch.default_generator if cpu_only else torch).manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_step(seed, step):
    """Seed drop path, the randomness of a step, as a function of (seed, step, rank) alone."""
    fix_random_seeds(seed := derive_seed(seed, STEP, step, get_rank()), cpu_only=uses_gpu())
    if uses_gpu():
        torch.cuda.manual_seed(seed)


# ---- devices ----


def pick_device(name, local_rank=0):
    """torch.device for --device auto|cuda|mps|cpu; auto is the first of cuda, mps and cpu that is available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = " and ".join(kind for kind in available if available[kind])
        raise UserError(f"--device {name} is not available: this machine has {there}. Use --device auto")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}. "
            "Start one process per GPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    return device


# ---- processes ----


def init_distributed_mode(args):
    """Find this process's rank, pick its device, and join the other processes if there are any.

    Sets args.rank, args.world_size and args.gpu (rank on this machine); returns the torch.device. torchrun and
    torch.distributed.launch set RANK, WORLD_SIZE and LOCAL_RANK, a Slurm step SLURM_*. A single process makes no
    process group and opens no port.
    """
    try:
        args.rank, args.world_size, args.gpu = rank_from_environment(args.dist_url)
        device = pick_device(getattr(args, "device", "auto"), args.gpu)
        if args.world_size > 1:
            if device.type == "mps":
                raise UserError("several processes need cuda or cpu: use --device cpu, or start one process")
            join_processes(args, device)
            check_same_args(args)
    except (ValueError, KeyError, RuntimeError, OSError, subprocess.CalledProcessError) as e:
        if isinstance(e, UserError):
            raise
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(
            f"can't join the other processes: {reason}. Start with torchrun, or set --dist_url tcp://host:port"
        ) from e
    return device


def rank_from_environment(dist_url):
    """(rank, number of processes, rank on this machine) as the launcher has set them."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun only: a plain python in an sbatch script is alone
        if dist_url == "env://":
            name_slurm_master()
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def join_processes(args, device):
    gpu, main_thread = device.type == "cuda", threading.current_thread() is threading.main_thread()
    if main_thread:  # Python handlers do not run while torch waits for the others
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        dist.init_process_group(
            backend="nccl" if gpu else "gloo",
            init_method=args.dist_url,
            world_size=args.world_size,
            rank=args.rank,
            device_id=device if gpu else None,
        )
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
    atexit.register(time.sleep, 0.1)  # for the same reason as in leave_processes, after an error


def leave_processes(group=None):
    """Destroy a process group, by default that of all processes, if there is one."""
    if dist.is_initialized():
        time.sleep(0.1)  # threads of gloo may need the GIL to free a tensor: torch 2.4 waits for them, but keeps it
        dist.destroy_process_group(group)


def name_slurm_master():
    """Point env:// at the first node of this Slurm step, with a port that follows from the job ID."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    os.environ.setdefault("MASTER_ADDR", names.stdout.split()[0])
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


def is_dist_avail_and_initialized():
    return dist.is_available() and dist.is_initialized()


def get_rank():
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def get_world_size():
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def is_main_process():
    return get_rank() == 0


def collective_device():
    """Where tensors must be to travel between processes: nccl moves CUDA tensors only."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather_objects(value):
    """The value of every process, in the order of ranks."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_same_everywhere(value, what, remedy="--output_dir must be one folder for all"):
    """Raise UserError on every rank if the ranks do not agree on a value."""
    values = gather_objects(value)
    if len(set(values)) > 1:
        raise UserError(f"{what} differs between processes: {', '.join(map(str, values))}. {remedy}")


# Settings that may differ between processes: places, and what the machine decides.
OF_A_PROCESS = {"rank", "gpu", "local_rank", "num_workers", "dist_url", "config", "data_path", "knn_data", "init_from"}


def check_same_args(args):
    """Raise UserError on every rank if the processes were started with different flags: they would hang, or diverge."""
    everyones = gather_objects({k: repr(v) for k, v in plain_args(args).items() if k not in OF_A_PROCESS})
    for name in sorted(set().union(*everyones)):
        if len(values := {str(each.get(name)) for each in everyones}) > 1:
            raise UserError(f"--{name} differs between processes: {', '.join(sorted(values))}. Use the same for all")


def terminate(number, _):
    sys.exit(128 + number)


def ignore_signals(_):
    """For loader processes, which receive the signals of their group too: they end when the training process does."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# What asks a run to save and end. Windows has the first two.
STOP_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOP_SIGNALS = [getattr(signal, name) for name in STOP_NAMES if hasattr(signal, name)]


def is_nohup(number):
    """Whether a signal is SIGHUP, and ignored, as under nohup."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


class HostCopy:
    """Asynchronous copy of a small tensor to the CPU. Create it before `backward()`, and call `read()` after."""

    def __init__(self, tensor):
        self.values, self.arrived = tensor.detach(), None
        if tensor.device.type == "cuda":
            self.values = torch.empty_like(self.values, device="cpu", pin_memory=True)
            self.values.copy_(tensor.detach(), non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self):
        """The number, or list of numbers."""
        if self.arrived:
            self.arrived.synchronize()
        return self.values.tolist()


# ---- printing and meters ----

tqdm.monitor_interval = 0  # no thread: loaders are forked from this process


def say(*words):
    """Print a line at once, above the progress bar on a terminal, where warnings are yellow (see NO_COLOR).

    If the output is lost (a closed pipe, a full disk), this and all later lines are dropped: no run ends because of it.
    """
    text = " ".join(map(str, words))
    try:
        if text.startswith("warning") and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            text = f"\x1b[33m{text}\x1b[0m"
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        mute()


def mute():
    """Drop all that is printed from now on."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not every stream has a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log(*words):
    """`say`, on rank 0 only."""
    if is_main_process():
        say(*words)


class SmoothedValue:
    """A series of scalars: median and mean of the last `window_size`, and the mean of all.

    Tensors are kept unread until a statistic is asked for: reading waits for the device. Statistics of an empty window
    are NaN.
    """

    def __init__(self, window_size=20, fmt="{median:.6f} ({global_avg:.6f})"):
        self.window = deque(maxlen=window_size)
        self.unread = []
        self.total, self.count = 0.0, 0
        self.fmt = fmt

    def update(self, value, n=1):
        if isinstance(value, torch.Tensor):
            self.unread.append((value.detach(), n))
        elif self.unread:  # after tensors that are still unread, to keep the order
            self.unread.append((value, n))
        else:
            self._count(value, n)

    def _count(self, value, n):
        self.window.append(value)
        self.total += value * n
        self.count += n

    def read(self):
        """Fetch the values that are still on the device."""
        read_together([self])
        return self

    def totals(self):
        """(total, count), which a checkpoint within an epoch has to keep."""
        self.read()
        return self.total, self.count

    def synchronize_between_processes(self):
        """Sum total and count over all processes; the window stays local."""
        self.read()
        if get_world_size() > 1:
            both = torch.tensor([self.count, self.total], dtype=torch.float64, device=collective_device())
            dist.all_reduce(both)
            self.count, self.total = both.tolist()

    @property
    def median(self):
        return statistics.median(self.read().window or [math.nan])

    @property
    def avg(self):
        return statistics.fmean(self.read().window or [math.nan])

    @property
    def global_avg(self):
        return self.read().total / (self.count or 1)

    @property
    def max(self):
        return max(self.read().window or [math.nan])

    @property
    def value(self):
        return (self.read().window or [math.nan])[-1]

    def __str__(self):
        named = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in named})


def read_together(meters, *others):
    """Fetch what SmoothedValues have on the device in one transfer, because each transfer waits for the device.

    The tensors `others` travel with it. Returns each as a flat list.
    """
    unread = [value for meter in meters for value, _ in meter.unread if isinstance(value, torch.Tensor)]
    flat = [value.detach().float().flatten() for value in others] + [value.float().reshape(1) for value in unread]
    numbers = iter(torch.cat([value.to(flat[0].device) for value in flat]).tolist() if flat else ())
    fetched = [list(itertools.islice(numbers, value.numel())) for value in others]
    for meter in meters:
        for value, n in meter.unread:
            meter._count(next(numbers) if isinstance(value, torch.Tensor) else value, n)
        meter.unread.clear()
    return fetched


class MetricLogger:
    """Named SmoothedValues (also as attributes: `logger.loss.global_avg`) and the console line of a loop."""

    def __init__(self, delimiter="  "):
        self.meters = defaultdict(SmoothedValue)
        self.delimiter = delimiter
        self.due = True  # whether the line of this item will be printed
        self.seconds = self.waiting = 0.0  # per item; share in which the device waited for items, but for the first

    def __getattr__(self, name):
        if name in self.__dict__.get("meters", ()):
            return self.meters[name]
        raise AttributeError(f"{type(self).__name__} has no attribute and no meter {name!r}")

    def update(self, **values):
        for name, value in values.items():
            self.meters[name].update(value)

    def add_meter(self, name, meter):
        self.meters[name] = meter

    def synchronize_between_processes(self):
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def totals(self):
        """One {name: (total, count)} per process, in the order of ranks. All processes have to call it."""
        return gather_objects({name: meter.totals() for name, meter in self.meters.items()})

    def restore(self, everyones):
        """Continue from what `totals` returned. If the number of processes has changed, rank 0 gets all of it, scaled
        so that all steps count alike."""
        share = 1 if (as_before := len(everyones) == get_world_size()) else get_world_size() / max(len(everyones), 1)
        for rank, totals in enumerate(everyones):
            mine = rank == get_rank() if as_before else is_main_process()
            for name, (total, count) in totals.items():
                meter = self.meters[name]  # on every rank, since meters are summed over ranks
                if mine:
                    meter.total += share * total
                    meter.count += share * count

    def __str__(self):
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def timing(self):
        """The end of the line: seconds per item, the part of it spent waiting for the item, and peak memory in MB."""
        return [f"time: {self.step_time}", f"data: {self.data_time}", f"max mem: {peak_memory_mb():.0f}"]

    def log_every(self, iterable, print_freq, header="", start=0):
        """Yield from `iterable`, print a line on rank 0 every `print_freq` items and at the last, and show a bar.

        The first item has the number `start`.
        """
        self.step_time, self.data_time = SmoothedValue(fmt="{avg:.6f}"), SmoothedValue(fmt="{avg:.6f}")
        number = start + len(iterable)
        began = end = time.monotonic()
        waited, pauses, first_done, done = 0.0, [], None, None
        clock = device_clock if uses_gpu() else time.monotonic
        hidden = None if is_main_process() else True  # None: shown on terminals only
        with tqdm(initial=start, total=number, desc=header, disable=hidden, file=sys.stdout, leave=False) as bar:
            for i, item in enumerate(iterable, start):
                self.data_time.update(time.monotonic() - end)
                if done is not None:  # before the first item, loaders start and fill their queues
                    pauses.append((done, clock()))
                self.due = i % print_freq == 0 or i == number - 1
                yield item
                self.step_time.update(time.monotonic() - end)
                done = clock() if is_main_process() else None
                first_done = done if first_done is None else first_done
                if self.due and is_main_process():  # other ranks' devices need not wait for a line they don't print
                    read_together(self.meters.values())
                    waited += sum(seconds_between(*pause) for pause in pauses)
                    self.waiting = waited / max(seconds_between(first_done, done), 1e-9)
                    pauses.clear()
                    left = int(self.step_time.global_avg * (number - 1 - i))
                    eta = f"eta: {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
                    progress = f"[{i:{len(str(number))}d}/{number}]"
                    meters = [str(self)] * bool(self.meters)
                    say(self.delimiter.join(filter(None, (header, progress, eta, *meters, *self.timing()))))
                bar.update()
                end = time.monotonic()
        total = time.monotonic() - began
        self.seconds = total / (number - start) if number > start else 0.0
        log(f"{header} Total time: {datetime.timedelta(seconds=int(total))} ({self.seconds:.6f} s / it)".lstrip())

    def pace(self, images):
        """Throughput and peak memory of the last loop, with `images` per item."""
        speed = {"images_per_s": images / self.seconds, "data_wait": self.waiting} if self.seconds and images else {}
        return {**speed, "max_mem_mb": peak_memory_mb()}


def device_clock():
    """An event after all work so far: the time when the GPU gets there, not when the host does."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(earlier, later):
    """Seconds between two times of the host, or two events. Waits for the later one."""
    if isinstance(later, (int, float)):
        return later - earlier
    later.synchronize()
    return earlier.elapsed_time(later) / 1e3


def uses_gpu():
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def peak_memory_mb():
    """Peak memory so far: of this process's GPU if it uses one, else of the process."""
    if uses_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---- files ----


def cache_dir():
    """The folder of files that are built or downloaded once: $DINO_CACHE, else dino/ in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("DINO_CACHE") or os.path.join(user_cache, "dino")


def lock_file(path, patience):
    """(the open file, whether it is locked for us alone). True where file systems have no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return contextlib.nullcontext(), True
    file, until = open(path, "ab"), time.monotonic() + patience  # noqa: SIM115 - stays open
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's lock would be shared with forked loaders
        except (BlockingIOError, PermissionError):
            if time.monotonic() > until:
                return file, False
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return file, True
        else:
            return file, True


def write_whole(path, write):
    """Call `write(file)` so that `path` then has all of it or, whatever happens, what it had before.

    If `path` is a link, the file that it points to is written.
    """
    path = Path(path).resolve()
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed run
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_on_master(state, path):
    """torch.save on rank 0, whole or not at all."""
    if is_main_process():
        write_whole(path, lambda file: torch.save(state, file))


def write_log_line(output_dir, stats):
    """Append one JSON object to log.txt. Raises OSError."""
    line = json.dumps(stats).encode() + b"\n"
    with open(Path(output_dir) / "log.txt", "ab", buffering=0) as file:
        size = file.tell()
        if file.write(line) < len(line):  # the disk is full: leave no torn line
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- schedules ----


def cosine_scheduler(base_value, final_value, epochs, niter_per_ep, warmup_epochs=0, start_warmup_value=0):
    """One value per iteration: linear from start to base over the warm-up, then half a cosine from base to final.

    Returns a float64 array of epochs * niter_per_ep values. Raises UserError if the warm-up is longer than the run.
    """
    warmup_iters, iters = warmup_epochs * niter_per_ep, epochs * niter_per_ep
    if warmup_iters > iters:
        raise UserError(
            f"warmup_epochs {warmup_epochs} is longer than the run ({epochs} epochs). Shorten it or train longer"
        )
    warmup = np.linspace(start_warmup_value, base_value, warmup_iters)
    progress = np.arange(iters - warmup_iters) / max(iters - warmup_iters, 1)
    decay = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(math.pi * progress))
    return np.concatenate((warmup, decay))


# ---- optimizers and gradients ----


def get_params_groups(model):
    """Two parameter groups: with weight decay, and without (biases and other 1-d parameters).

    As in the release, pos_embed and cls_token (3-d) are decayed.
    """
    decayed, plain = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (plain if param.ndim == 1 or name.endswith(".bias") else decayed).append(param)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(name, params_groups, device):
    """AdamW, SGD or LARS by the name of --optimizer. The schedules set learning rate and decay at each step."""
    if name == "adamw":
        return torch.optim.AdamW(params_groups, fused=device.type in ("cuda", "cpu"))
    if name == "sgd":
        # Not fused: torch's fused SGD fails if a layer gets its first gradient late, as with --freeze_last_layer.
        return torch.optim.SGD(params_groups, lr=0.0, momentum=0.9)
    return LARS(params_groups)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888), as used for large batches of convnets.

    Parameters with ndim != 1 get weight decay and a step scaled by eta * |p| / |g + wd * p|; vectors plain momentum.
    With fp16's gradient scaler the host waits once per step, to learn whether to skip it (with SGD too).
    """

    def __init__(self, params, lr=0, weight_decay=0, momentum=0.9, eta=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group, params):
        for p in params:
            if "mu" not in self.state[p]:
                self.state[p]["mu"] = torch.zeros_like(p)
        directions = [p.grad.clone() for p in params]
        shaped = [i for i, p in enumerate(params) if p.ndim != 1]
        if shaped:
            weights, updates = [params[i] for i in shaped], [directions[i] for i in shaped]
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            weight_norms = torch.stack(torch._foreach_norm(weights))
            update_norms = torch.stack(torch._foreach_norm(updates))
            trust = group["eta"] * weight_norms / update_norms
            trust = torch.where((weight_norms > 0) & (update_norms > 0), trust, 1.0)
            scale_each(updates, trust)
        momenta = [self.state[p]["mu"] for p in params]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, directions)
        torch._foreach_add_(params, momenta, alpha=-group["lr"])


def parameters_of(model):
    """The parameters of a module, or a list of parameters as it is."""
    return list(model.parameters()) if isinstance(model, nn.Module) else model


@torch.no_grad()
def clip_gradients(model, clip):
    """Clip each parameter's gradient to an L2 norm of `clip`, one parameter at a time; 0 leaves them as they are.

    `model` is a module or a list of parameters. Unlike with torch.nn.utils.clip_grad_norm_, a large gradient in one
    layer does not shrink the others. Returns the norms before clipping, one per gradient, on the device (no host sync).
    """
    gradients = [p.grad for p in parameters_of(model) if p.grad is not None]
    if not gradients:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm(gradients))
    if clip:
        scale_each(gradients, (clip / (norms + 1e-6)).clamp(max=1.0))
    return norms


def scale_each(tensors, factors):
    """Multiply each dense tensor, in place, by its own factor; `factors` [n] stay on the device."""
    factors = list(factors.unbind())
    if factors[0].device.type == "cuda":  # a copy as large as all tensors, instead of a kernel launch for each
        sizes = [tensor.numel() for tensor in tensors]
        factors = torch.cat([f.expand(n) for f, n in zip(factors, sizes, strict=True)]).split(sizes)
        # With the strides of the tensors, channels last among them: torch has one kernel for equal strides only.
        factors = [f.as_strided(tensor.shape, tensor.stride()) for f, tensor in zip(factors, tensors, strict=True)]
    torch._foreach_mul_(tensors, factors)


def cancel_gradients_last_layer(epoch, model, freeze_last_layer):
    """While epoch < freeze_last_layer, drop the gradients of the head's last layer, which keeps its initial weights."""
    if epoch < freeze_last_layer:
        for name, param in model.named_parameters():
            if "last_layer" in name:
                param.grad = None


# ---- what an image is ----

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Inputs(NamedTuple):
    """What a network sees: images [in_chans, H, W] from 0 to 1, minus the mean, divided by the std of each channel.

    `value_range` is what counts as 0 and 1 in the files; None: 0 and the largest value of their type.
    """

    in_chans: int = 3
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    value_range: tuple | None = None

    @property
    def photographs(self):
        """Whether images are converted to 8-bit RGB, instead of keeping the bits of their channels."""
        return self.in_chans == 3 and not self.value_range

    def normalize(self, images):
        return normalize(images, self.mean, self.std)

    def describe(self):
        values = f", values from {self.value_range[0]} to {self.value_range[1]}" if self.value_range else ""
        numbers = (" ".join(f"{number:.4g}" for number in numbers[:4]) for numbers in (self.mean, self.std))
        more = " ..." * (self.in_chans > 4)
        return f"channels: {self.in_chans}, mean {next(numbers)}{more}, std {next(numbers)}{more}{values}"


RGB = Inputs()


def inputs_of(args):
    """The Inputs of a run from its arguments (Namespace or dict); RGB where they don't say. Raises UserError."""
    args = plain_args(args)
    given = {name: args[name] for name in Inputs._fields if args.get(name) is not None}
    try:
        numbers = {name: tuple(map(float, given[name])) for name in given if name != "in_chans"}
        inputs = Inputs(given.get("in_chans", 3), **numbers)
        fits = isinstance(inputs.in_chans, int) and inputs.in_chans == len(inputs.mean) == len(inputs.std)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"in_chans, mean and std of a run don't fit together: {given}. Is its checkpoint damaged?")
    return inputs


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Integer images [..., C, H, W] (uint8, or int16 of dino_crops.to_int16) -> normalized float32.

    `mean` and `std` are tuples of C numbers from 0 to 1. Floats are returned unchanged: they are normalized already.
    """
    if images.dtype.is_floating_point:
        return images
    mean, std = statistics_on(images.device, mean, std)
    deep = images.dtype == torch.int16
    values = images.float().add_(32768).div_(65535) if deep else images.float().div_(255)
    return values.sub_(mean).div_(std)


@functools.cache  # sending them to a GPU with each batch would make the host wait for it
def statistics_on(device, mean, std):
    return [torch.tensor(values, device=device)[:, None, None] for values in (mean, std)]


# ---- multi-crop (section 3.1) ----


def has_batchnorms(model):
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def features_of(model, images):
    """The features [B, D] of a model that may return others beside them."""
    output = model(images)
    return output[0] if isinstance(output, tuple) else output


class MultiCropWrapper(nn.Module):
    """A backbone and a projection head over a list of crops.

    forward: list of [B, C, h, w] -> [number of crops * B, out_dim], crop by crop. Consecutive crops of one size go
    through the backbone as one batch. The backbone's own classifiers `fc` and `head` become Identity. `features` keeps
    the last input of the head, without gradients.
    """

    def __init__(self, backbone, head):
        super().__init__()
        if hasattr(backbone, "reset_classifier"):  # timm's; its `head` may also pool and normalize
            backbone.reset_classifier(0)
        else:
            backbone.fc, backbone.head = nn.Identity(), nn.Identity()
        self.backbone, self.head = backbone, head

    def forward(self, crops):
        if isinstance(crops, torch.Tensor):
            crops = [crops]
        features, first = [], 0
        for i in range(1, len(crops) + 1):
            if i == len(crops) or crops[i].shape[-2:] != crops[first].shape[-2:]:
                features.append(features_of(self.backbone, torch.cat(crops[first:i])))
                first = i
        features = torch.cat(features)
        self.features = features.detach()
        return self.head(features)
