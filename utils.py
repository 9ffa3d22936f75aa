"""What the scripts share: errors and arguments, randomness, devices and processes, meters and logs, schedules and
optimisers, checkpoints, backbones and weights, multi-crop and features. One of each.
"""

import argparse
import contextlib
import ctypes
import datetime
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import random
import shutil
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ---- errors and arguments ----


class UserError(ValueError):
    """What the user can put right: printed as one line, without a traceback, and the process ends with `exit_code`."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


def bool_flag(text):
    """argparse type of an on/off flag: on, true, 1 or off, false, 0, in any case."""
    value = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither on/true/1 nor off/false/0")
    return value


def cache_dir():
    """Where what is built or downloaded once is kept: $DINO_CACHE, else dino/ in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("DINO_CACHE") or os.path.join(user_cache, "dino")


def did_you_mean(name, known):
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


# fmt: on


def terminate(number, _):
    sys.exit(128 + number)


# ---- randomness ----


def derive_seed(*parts):
    """A 63-bit seed that depends on all of the non-negative integers `parts` and on their order."""
    words = repr(tuple(map(int, parts))).encode()  # SeedSequence(parts) would take (1, 2) and (1, 2, 0) for the same
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1


def fix_random_seeds(seed=0, cpu_only=False):
    """Seed torch (on all devices, or the CPU alone), numpy and Python alike.

    For all devices it takes half a millisecond where none of them is in use: torch notes who asked, with a traceback
    for each kind of device. That is much for an image.
    """
    (torch.default_generator if cpu_only else torch).manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


# What a seed is for, as the second part of derive_seed, so that no two uses share a stream.
ORDER, SAMPLE, STEP, REPLACEMENT = range(4)


# ---- devices and processes ----


def init_distributed_mode(args):
    """Find out which process of how many this is, pick its device, and join the others if there are any.

    Sets args.rank, args.world_size and args.gpu (rank on this machine); returns the torch.device. torchrun and
    torch.distributed.launch say it by RANK, WORLD_SIZE and LOCAL_RANK, a Slurm step by SLURM_*. A single process makes
    no process group and opens no port.
    """
    try:
        args.rank, args.world_size, args.gpu = rank_from_environment(args.dist_url)
        device = pick_device(args.device, args.gpu)
        if args.world_size > 1:
            if device.type == "mps":
                raise UserError("several processes work on cuda and cpu only: give --device cpu, or start one process")
            join_processes(args, device)
    except (ValueError, KeyError, RuntimeError, OSError, subprocess.CalledProcessError) as e:
        if isinstance(e, UserError):
            raise
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(
            f"can't join the other processes: {reason}. Start with torchrun, or set --dist_url tcp://host:port"
        ) from e
    return device


def rank_from_environment(dist_url):
    """(rank, number of processes, rank on this machine) as the launcher says."""
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
    if main_thread:  # while torch waits for the others, a handler of Python's would not be called
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


def name_slurm_master():
    """Point env:// at the first node of this Slurm step, with a port that follows from the job's number."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    os.environ.setdefault("MASTER_ADDR", shown.stdout.split()[0])
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


def pick_device(name, local_rank=0):
    """torch.device for --device auto|cuda|mps|cpu; auto takes the first of cuda, mps and cpu that is there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = " and ".join(kind for kind in available if available[kind])
        raise UserError(f"--device {name} is not available here. Use --device auto; this machine has {there}")
    if name == "cpu":
        keep_freed_memory()
        multiply_by_onednn()
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


def keep_freed_memory():
    """Let glibc keep large blocks that are freed, as torch itself does on GPUs.

    By default they go back to the system, and each step has all its activations mapped and zeroed again, page by page:
    about a third of a step's time. The price is that the process stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # other C libraries have none
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def multiply_by_onednn():
    """Have float32 matrices multiplied by oneDNN on AMD's CPUs with AVX-512: exactly as well, and twice as fast as by
    MKL, torch's own choice, which uses AVX2 there.

    torch leaves them to oneDNN only if it may round them to bf16. That it does only on CPUs with AMX, which are left
    alone; and should a product come out rounded nevertheless, all is as before. A setting of the whole process: with it
    torch.get_float32_matmul_precision() refuses to answer.
    """
    flags, settings = cpu_flags(), getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(settings, "fp32_precision") or "AuthenticAMD" not in flags or "avx512f" not in flags:
        return
    if any(flag.startswith("amx") for flag in flags):
        return
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    ramp = torch.linspace(1, 2, 2**16).view(256, 256)  # numbers that bf16 does not have
    exact = ramp.double() @ ramp.double()
    if not torch.allclose((ramp @ ramp).double(), exact, rtol=1e-5, atol=0):
        settings.fp32_precision = before


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return get_rank() == 0


def log(*words):
    """`say`, on rank 0 only."""
    if is_main_process():
        say(*words)


def ignore_signals(_):
    """For a loader's processes, which get the signals of their group too: they end when the training process does."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def pick_amp_dtype(device, use_fp16, amp_dtype):
    """dtype of mixed precision, or None for float32 throughout.

    "auto" is bf16 where the hardware computes in it, else fp16 on CUDA; a CPU without bf16 instructions, and mps,
    stay in float32.
    """
    if not use_fp16:
        return None
    if amp_dtype != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp_dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_computes_bf16() else None


def cpu_computes_bf16():
    """Whether this CPU multiplies bf16 in hardware. Without, bf16 is correct but slower than float32."""
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"})


def cpu_flags():
    """The words of /proc/cpuinfo: vendor and instruction sets among them; none where there is no such file."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


# ---- meters and logs ----


class SmoothedValue:
    """A series of scalars: median and mean of the last `window_size`, and the mean of all.

    Tensors are taken in without being read: reading waits for the device, and happens when a statistic is asked for.
    Of an empty window they are NaN, as in an epoch that goes on from a checkpoint until its next good step.
    """

    def __init__(self, window_size=20, fmt="{median:.6f} ({global_avg:.6f})"):
        self.window = deque(maxlen=window_size)
        self.unread = []
        self.total, self.count = 0.0, 0
        self.fmt = fmt

    def update(self, value, n=1):
        if isinstance(value, torch.Tensor):
            self.unread.append((value.detach(), n))
        elif self.unread:  # behind tensors that are still to be read, so that the order stays
            self.unread.append((value, n))
        else:
            self._count(value, n)

    def _count(self, value, n):
        self.window.append(value)
        self.total += value * n
        self.count += n

    def read(self):
        """Fetch what still lies on the device, in one transfer."""
        if self.unread:
            tensors = [v.float().reshape(()) for v, _ in self.unread if isinstance(v, torch.Tensor)]
            fetched = iter(torch.stack(tensors).tolist())
            for value, n in self.unread:
                self._count(next(fetched) if isinstance(value, torch.Tensor) else value, n)
            self.unread.clear()
        return self

    def totals(self):
        """(total, count), what a checkpoint in the middle of an epoch has to keep."""
        self.read()
        return self.total, self.count

    def synchronize_between_processes(self):
        """Add up total and count over all processes; the window stays each process's own."""
        self.read()
        if get_world_size() > 1:
            both = torch.tensor([self.count, self.total], dtype=torch.float64, device=collective_device())
            dist.all_reduce(both)
            self.count, self.total = int(both[0]), float(both[1])

    @property
    def median(self):
        return statistics.median(self.read().window or [math.nan])

    @property
    def avg(self):
        return statistics.fmean(self.read().window or [math.nan])

    @property
    def global_avg(self):
        return self.read().total / max(self.count, 1)

    @property
    def max(self):
        return max(self.read().window or [math.nan])

    @property
    def value(self):
        return (self.read().window or [math.nan])[-1]

    def __str__(self):
        named = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in named})


def collective_device():
    """Where tensors must lie to travel between processes: nccl moves CUDA tensors only."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather_objects(value):
    """What every process gives, in the order of ranks."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_same_everywhere(number, what):
    """Raise UserError on every rank if the ranks do not agree on a number."""
    numbers = gather_objects(number)
    if len(set(numbers)) > 1:
        raise UserError(f"{what} differs between processes: {numbers}. --output_dir must be one folder for all")


def on_terminal():
    """Whether standard output is a terminal on which a line can be drawn anew."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def say(*words):
    """print, at once. On a terminal above the bar of progress, and warnings in yellow, unless NO_COLOR is set."""
    text = " ".join(map(str, words))
    if not on_terminal():
        print(text, flush=True)
        return
    if text.startswith("warning") and not os.environ.get("NO_COLOR"):
        text = f"\x1b[33m{text}\x1b[0m"
    with Bar.external_write_mode(sys.stdout):
        print(text, flush=True)


class Bar(tqdm):
    """How far a loop has come, on the last line of rank 0's terminal; where there is none it shows and does nothing.

    The cursor waits at the start of the line: what the terminal itself writes there, as ^C, is erased with the bar.
    """

    monitor_interval = 0  # no thread that draws too: every step does, ten times a second at most

    def __init__(self, header, start, number):
        hidden = not (is_main_process() and on_terminal())
        look = {"leave": False, "dynamic_ncols": True, "mininterval": 0.1, "miniters": 1, "disable": hidden}
        super().__init__(desc=header.rstrip(": "), initial=start, total=number, file=sys.stdout, **look)

    @staticmethod
    def status_printer(file):
        def draw(text):
            file.write(f"\r\x1b[2K{text}\r")
            file.flush()

        return draw

    @classmethod
    def close_all(cls):
        """Erase the bars of loops that something has ended in the middle."""
        for bar in [bar for bar in cls._instances if isinstance(bar, cls)]:
            bar.close()


Bar.set_lock(threading.RLock())  # tqdm's own is also one between processes, but none of ours draws for another


class MetricLogger:
    """Named SmoothedValues and the console line over a loop."""

    def __init__(self, delimiter="  "):
        self.meters = defaultdict(SmoothedValue)
        self.delimiter = delimiter
        self.due = True  # whether this item's line will be printed
        self.images = (
            0  # of an item; where they are known, the line has their number a second, and the share of waiting
        )
        self.seconds = self.waiting = 0.0  # for an item; share of it spent waiting, the first item apart

    def update(self, **values):
        for name, value in values.items():
            self.meters[name].update(value)

    def add_meter(self, name, meter):
        self.meters[name] = meter

    def add_meters(self, *names, **formats):
        """Fix the order on the line; a format is for SmoothedValue."""
        for name in names:
            self.add_meter(name, SmoothedValue())
        for name, fmt in formats.items():
            self.add_meter(name, SmoothedValue(fmt=fmt))

    def synchronize_between_processes(self):
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def totals(self):
        """{name: (total, count)} of every process: a list, in the order of ranks. All processes have to call it."""
        return gather_objects({name: meter.totals() for name, meter in self.meters.items()})

    def restore(self, everyones):
        """Take up what `totals` gave. Rank 0 takes all of it if there were more or fewer processes then."""
        as_many = len(everyones) == get_world_size()
        for rank, totals in enumerate(everyones):
            mine = rank == get_rank() if as_many else is_main_process()
            for name, (total, count) in totals.items():
                meter = self.meters[name]  # every rank has all of them, since they are added up over the ranks
                if mine:
                    meter.total += total
                    meter.count += count

    def __str__(self):
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def log_every(self, iterable, print_freq, header="", start=0, hint="try more --num_workers"):
        """Yield from `iterable`; every `print_freq` items, and at the last, print progress and the meters on rank 0.

        The first item counts as number `start`. `time` is seconds an item, `data` the part of it spent waiting for the
        item, `max mem` MB: of the GPU's memory, or of the process where there is no GPU. Where the wait is more than a
        quarter of the time, the first item's apart, the line ends with `hint`.
        """
        step_time, data_time = SmoothedValue(fmt="{avg:.6f}"), SmoothedValue(fmt="{avg:.6f}")
        number = start + len(iterable)
        began = end = time.time()
        waited = spent = 0.0
        with Bar(header, start, number) as bar:
            for i, item in enumerate(iterable, start):
                data_time.update(time.time() - end)
                self.due = i % print_freq == 0 or i == number - 1
                yield item
                step_time.update(time.time() - end)
                if i > start:  # before the first one, loaders start and fill their queues
                    waited, spent = waited + data_time.value, spent + step_time.value
                # The other ranks' devices need not wait for a line that they don't print.
                if self.due and is_main_process():
                    eta = datetime.timedelta(seconds=int(step_time.global_avg * (number - 1 - i)))
                    progress = f"[{i:{len(str(number))}d}/{number}]"
                    meters = [str(self)] * bool(self.meters)
                    timing = [f"time: {step_time}", f"data: {data_time}", f"max mem: {peak_memory_mb():.0f}"]
                    if self.images:
                        timing.append(f"images/s: {self.images / max(step_time.avg, 1e-9):.1f}")
                        timing.append(f"waiting: {waited / max(spent, 1e-9):.0%}")
                    if spent > 1 and waited > spent / 4:
                        timing.append(f"(data wait {waited / spent:.0%} of the time: {hint})")
                    if "loss" in self.meters:  # read for this line already; between lines nothing is
                        bar.set_postfix_str(f"loss: {self.meters['loss'].value:.4f}", refresh=False)
                    say(self.delimiter.join((header, progress, f"eta: {eta}", *meters, *timing)))
                bar.update()
                end = time.time()
        total = time.time() - began
        items = number - start  # none where a run goes on behind the last step of an epoch
        self.seconds, self.waiting = total / items if items else 0.0, waited / max(spent, 1e-9)
        log(f"{header} Total time: {datetime.timedelta(seconds=int(total))} ({self.seconds:.6f} s / it)")

    def pace(self, images):
        """Throughput and memory of the last loop, of so many images an item."""
        speed = {"images_per_s": images / self.seconds, "data_wait": self.waiting} if self.seconds and images else {}
        return {**speed, "max_mem_mb": peak_memory_mb()}


def peak_memory_mb():
    """Highest memory use so far: of this process's GPU if it uses one, else of the process itself."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class HostCopy:
    """A small tensor on its way to the host. Start it before the backward pass and read it after launching that: then
    the device has a backward pass of work in its queue while the host waits, and never stands still.
    """

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


def write_log_line(output_dir, stats):
    """Append one JSON object to log.txt, in place of the lines of the same or later epochs that a lost run left.

    Lines that are none of ours stay, except a last one that a killed run left torn.
    """
    path = Path(output_dir) / "log.txt"
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = [line for i, line in enumerate(lines) if not is_outdated(line, stats["epoch"], last=i == len(lines) - 1)]
    content = b"".join(line + b"\n" for line in [*kept, json.dumps(stats).encode()])
    write_whole(path, lambda file: file.write(content))


def is_outdated(line, epoch, last):
    try:
        logged = json.loads(line)
    except ValueError:
        return last and line.startswith(b"{")
    ours = isinstance(logged, dict) and ("train_loss" in logged or "train_ln_k" in logged)  # no step good: no loss
    number = logged.get("epoch") if ours else None
    return isinstance(number, int) and number >= epoch


# ---- schedules ----


def cosine_scheduler(base_value, final_value, epochs, niter_per_ep, warmup_epochs=0, start_warmup_value=0):
    """One value per iteration: linear from start to base over the warm-up, then half a cosine from base to final.

    Returns a float64 array of epochs · niter_per_ep values. Raises UserError if the warm-up is longer than the run.
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


# ---- optimisers and gradients ----


def get_params_groups(model):
    """Two parameter groups for an optimiser: the regularised, then biases and other 1-d parameters without decay."""
    decayed, plain = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (plain if param.ndim == 1 or name.endswith(".bias") else decayed).append(param)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(name, params_groups, device):
    """AdamW, SGD or LARS by the name of --optimizer. Learning rate and decay are set by the schedules at each step."""
    if name == "adamw":
        return torch.optim.AdamW(params_groups, fused=device.type in ("cuda", "cpu"))
    if name == "sgd":
        # Not fused: torch's fused SGD fails where a layer's first gradient comes late, as --freeze_last_layer makes it.
        return torch.optim.SGD(params_groups, lr=0.0, momentum=0.9)
    return LARS(params_groups)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888), as used for large batches of convnets.

    Parameters with ndim != 1 get weight decay and a step scaled by eta · ‖p‖ / ‖g + wd·p‖; vectors get plain momentum.
    With fp16's gradient scaler the host waits once a step, to learn whether to skip it (with SGD too); bf16 has none.
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
            torch._foreach_mul_(updates, list(trust.unbind()))
        momenta = [self.state[p]["mu"] for p in params]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, directions)
        torch._foreach_add_(params, momenta, alpha=-group["lr"])


@torch.no_grad()
def clip_gradients(model, clip):
    """Scale each parameter's gradient to an L2 norm of at most `clip`, one by one; 0 leaves them as they are.

    Not the global-norm clipping of torch.nn.utils: a large gradient in one layer leaves the others alone. Returns the
    norms before clipping, one per parameter with a gradient, as a tensor on the device (no host sync).
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm(gradients))
    if clip:
        factors = (clip / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    return norms


def cancel_gradients_last_layer(epoch, model, freeze_last_layer):
    """While epoch < freeze_last_layer, drop the gradients of the head's last layer, so that it keeps its start."""
    if epoch < freeze_last_layer:
        for name, param in model.named_parameters():
            if "last_layer" in name:
                param.grad = None


# ---- checkpoints ----


def lock_file(path, patience):
    """(the open file, whether nobody else has locked it): of two runs one; all, where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return contextlib.nullcontext(), True
    file, until = open(path, "ab"), time.monotonic() + patience  # noqa: SIM115 - stays open
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in forked loaders
        except (BlockingIOError, PermissionError):
            if time.monotonic() > until:
                return file, False
            time.sleep(0.2)
        except OSError:  # a file system without
            return file, True
        else:
            return file, True


def write_whole(path, write, previous=None):
    """Call `write(file)` such that `path` then holds all of it, or, whatever happens, what it held before.

    That is kept as the file `previous`, if one is named; at no moment there is nothing at `path`. If `path` is a link,
    the file that it points to is written.
    """
    path = Path(path).resolve()
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # a killed run's, or a link
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            keep_as(path, Path(previous))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def keep_as(path, previous):
    """Let `previous` name the file at `path` too."""
    link = previous.with_name(previous.name + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links
        shutil.copyfile(path, link)
    os.replace(link, previous)


def save_on_master(state, path):
    """torch.save on rank 0, whole or not at all."""
    if is_main_process():
        write_whole(path, lambda file: torch.save(state, file))


def global_batch(args):
    """Images a step over all processes, of the arguments of a run as a dict; None if they don't say, or nonsense."""
    numbers = args.get("batch_size_per_gpu"), args.get("world_size", 1), args.get("grad_accum_steps", 1)
    return math.prod(numbers) if all(type(n) is int and 0 < n < 2**31 for n in numbers) else None


def plain_args(args):
    """The arguments of a run, in whatever form, as a dict of plain types."""
    if not isinstance(args, dict):
        args = vars(args) if isinstance(args, argparse.Namespace) else {}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in args.items()}


# ---- backbones ----


def has_batchnorms(model):
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


# ---- weights ----


def printable(name):
    """A name as it is, or, with odd characters in it, as Python writes it: on one line in any case."""
    return name if name.isprintable() else repr(name)


def summarize(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- multi-crop and features ----

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Inputs(NamedTuple):
    """What a network sees: images [in_chans, H, W] of values from 0 to 1, less the mean, over the std, by channel.

    `value_range` is what counts as 0 and as 1 in the files; None: 0 and the largest value of their type.
    """

    in_chans: int = 3
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    value_range: tuple | None = None

    def normalize(self, images):
        return normalize(images, self.mean, self.std)

    def describe(self):
        values = f", values from {self.value_range[0]} to {self.value_range[1]}" if self.value_range else ""
        numbers = (" ".join(f"{number:.4g}" for number in numbers[:4]) for numbers in (self.mean, self.std))
        more = " …" * (self.in_chans > 4)
        return f"channels: {self.in_chans}, mean {next(numbers)}{more}, std {next(numbers)}{more}{values}"


RGB = Inputs()


def inputs_of(args):
    """The Inputs that the arguments of a run say, in whatever form; RGB of what they don't. Raises UserError."""
    args = plain_args(args)
    given = {name: args[name] for name in Inputs._fields if args.get(name) is not None}
    try:
        numbers = {name: tuple(map(float, given[name])) for name in given if name != "in_chans"}
        inputs = Inputs(given.get("in_chans", 3), **numbers)
        fits = isinstance(inputs.in_chans, int) and inputs.in_chans == len(inputs.mean) == len(inputs.std)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"in_chans, mean and std of a run don't fit each other: {given}. Is its checkpoint damaged?")
    return inputs


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Levels [..., C, H, W], uint8 or int16, -> float32 with that mean and std by channel; floats are left alone.

    `mean` and `std` are tuples of C numbers, of values from 0 to 1.
    """
    if images.dtype.is_floating_point:
        return images
    mean, std = statistics_on(images.device, mean, std)
    deep = images.dtype == torch.int16  # dino_crops.to_int16
    values = images.float().add_(32768).div_(65535) if deep else images.float().div_(255)
    return values.sub_(mean).div_(std)


@functools.cache  # sending them to a GPU again with every batch would make the host wait for it
def statistics_on(device, mean, std):
    return [torch.tensor(values, device=device)[:, None, None] for values in (mean, std)]


def features_of(model, images):
    """The features [B, D] of a model that may return others beside them."""
    output = model(images)
    return output[0] if isinstance(output, tuple) else output


class MultiCropWrapper(nn.Module):
    """A backbone and a projection head over a list of crops (section 3.1).

    forward: list of [B, 3, h, w] -> [number of crops · B, out_dim], crop by crop. Consecutive crops of one size go
    through the backbone as one batch. The backbone's own classifiers `fc` and `head` become Identity. What went into
    the head last stays, without gradients, in `features`.
    """

    def __init__(self, backbone, head):
        super().__init__()
        if hasattr(backbone, "reset_classifier"):  # timm's: what is called `head` there may pool and normalise too
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


class Stopped(Exception):
    """Work that a signal has ended on all ranks; `signal` is its number."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = number


def gather_rows(*tensors):
    """The rows of all ranks (each as many) one below the other, on the CPU of rank 0; None for each elsewhere."""
    group = dist.new_group(backend="gloo")  # main memory on every rank, whatever the training runs on
    gathered = []
    for rows in tensors:
        rows = rows.cpu()
        everyone = [torch.empty_like(rows) for _ in range(get_world_size())] if is_main_process() else None
        dist.gather(rows, everyone, group=group)
        gathered.append(torch.cat(everyone) if everyone else None)
    dist.destroy_process_group(group)
    return gathered


# ---- processes ----


def distribute(student, teacher, device):
    """Wrap the student for several processes, and let batch norms see the batches of all of them."""
    if get_world_size() == 1:
        return student, teacher
    if has_batchnorms(student):
        if device.type == "cuda":
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
            teacher = nn.SyncBatchNorm.convert_sync_batchnorm(teacher)
        else:
            log("note: torch synchronises batch norms on GPUs only; each process normalises its own batch")
    # Buffers are the batch norms': synchronised already, or each process's own. The flag has two names, by torch's age.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    no_broadcast = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    device_ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(student, device_ids=device_ids, gradient_as_bucket_view=True, **no_broadcast)
    return wrapped, teacher
