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
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import defaultdict, deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml
from tqdm import tqdm

import vision_transformer as vits

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


def between(low, high, number=int):
    """argparse type of an int (or float) from `low` to `high`; --help shows its `range`."""

    def parse(text):
        value = number(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} must be {parse.range}")
        return value

    parse.__name__ = number.__name__  # for argparse's message on what is no number
    parse.range = f"between {low} and {high}" if math.isfinite(high) else f"at least {low}"
    return parse


def at_least(low, number=int):
    """argparse type of an int (or float) of at least `low`."""
    return between(low, math.inf, number)


share = between(0, 1, float)
positive = at_least(math.ulp(0.0), float)
positive.range = "above 0"


def cache_dir():
    """Where what is built or downloaded once is kept: $DINO_CACHE, else dino/ in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("DINO_CACHE") or os.path.join(user_cache, "dino")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with one line instead of a page of usage."""

    source = ""  # where the arguments being parsed stand, if not on the command line

    def error(self, message):
        if message.startswith("unrecognized arguments: ") and message.endswith(".tar"):
            message = "several shards are named. Put their pattern in quotes: 'shards/{0000..0999}.tar'"
        self.exit(2, f"error: {self.source}{message} (--help lists the flags)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults and ranges after the help texts; the description as it is."""

    def _get_help_string(self, action):
        text, range_ = super()._get_help_string(action), getattr(action.type, "range", None)
        return text.replace("%(default)s)", f"%(default)s, {range_})") if range_ else text


def parse_args(parser, argv=None):
    """Parse the command line. A recipe named by --config is read as if its flags came first.

    So argparse itself checks the recipe's values, and the command line wins.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    path = getattr(args, "config", None)
    if path is not None:
        flags = recipe_flags(parser, read_recipe(path, known=set(vars(args)) - {"config", "print_config"}))
        parser.source = f"in {path}: "
        parser.parse_args(flags)
        parser.source = ""
        args = parser.parse_args(flags + argv)
    return args


def read_recipe(path, known):
    """The settings in the YAML file `path`: {key: text or list of texts}. No other types can be made.

    Raises UserError if it can't be read, if a key is not in `known`, or if a value is missing or nested.
    """
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.load(file, Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise UserError(f"can't read the recipe --config {path}: {' '.join(str(e).split())[:300]}") from e
    if not isinstance(recipe, dict):
        raise UserError(f"the recipe {path} has no `flag: value` lines")
    for key, value in recipe.items():
        if key not in known:
            raise UserError(f"in {path}: unknown key {key!r}{did_you_mean(str(key), known)}")
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise UserError(f"in {path}: {key} is nested. Give a value, or a list in [ ]")
        if value == "":
            raise UserError(f"in {path}: {key} has no value. Give one, or remove the line")
    return recipe


def print_config(args):
    """Print the settings as a recipe for --config. What is not set, or empty, stays a comment."""
    for name, value in vars(args).items():
        if name not in ("config", "print_config"):
            text = yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]
            print(f"# {name}: not set" if value in (None, [], "") else f"{name}: {text}")


def recipe_flags(parser, recipe):
    """What one would write on the command line for a recipe's settings."""
    flags = []
    for key, value in recipe.items():
        is_switch = parser._option_string_actions[f"--{key}"].nargs == 0
        if is_switch and str(value).lower() in ("true", "false"):
            flags += [f"--{key}"] * (str(value).lower() == "true")
        else:
            flags += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return flags


def did_you_mean(name, known):
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


# fmt: off
def model_flags(arch="vit_small", patch_size=16):
    """The flags by which every evaluation names its network, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--arch", default=arch, metavar="NAME",
        help="Network; main_dino.py --list_archs shows them all.")
    parser.add_argument("--patch_size", default=patch_size, type=at_least(1), metavar="PIXELS",
        help="Side of a ViT's patches.")
    parser.add_argument("--pretrained_weights", default="", metavar="FILE", help="""Checkpoint or state dict. Without
        one, the published weights for --arch and --patch_size; `random` leaves the network untrained.""")
    parser.add_argument("--checkpoint_key", default="teacher", metavar="KEY",
        help="Which network of a training checkpoint: teacher or student. The teacher is the better one.")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
        help="auto takes a GPU if there is one.")
    return parser


def labelled_flags():
    """The flags by which evaluations on labelled images name them, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data_path", default="sample", metavar="PATH", help="""Folder with train and val in it, each a
        folder with one for each class or a list of paths and labels (train.csv); torchvision:NAME, such as
        torchvision:CIFAR10; or `sample`, a small set made from photographs that are installed already.""")
    parser.add_argument("--exif", default=False, type=bool_flag, metavar="BOOL",
        help="Turn photographs as their cameras noted; as it was in training.")
    return parser


def process_flags():
    """The flags of every evaluation that may run in several processes, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--num_workers", default=10, type=at_least(0), metavar="N", help="Processes that load images.")
    parser.add_argument("--dist_url", default="env://", metavar="URL", help="Where several processes meet.")
    parser.add_argument("--local_rank", "--local-rank", default=0, type=int, metavar="N",
        help="Accepted because launchers pass it; not used.")
    return parser
# fmt: on


def terminate(number, _):
    sys.exit(128 + number)


# How gloo and nccl say it.
PEER_LOST = re.compile(
    "closed by peer|reset by peer|broken pipe|remote process exited|connection was likely closed", re.IGNORECASE
)


def run(main, flags, description):
    """What every script does under `__main__`: parse, run `main(args)`, turn a UserError into one line and a code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII only is no reason to stop
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # so that what is half-written is cleared away
    parser = OneLineParser(description=description, parents=[flags], formatter_class=HelpFormatter)
    try:
        try:
            args = parse_args(parser)
            if getattr(args, "print_config", False):
                print_config(args)
                return
            main(args)
        finally:
            Bar.close_all()  # so that what is said of an error has a line of its own
    except UserError as e:
        message = str(e)
        if re.match(r"Caught \w+ in DataLoader worker", message):  # inside a traceback, as its last line
            message = re.sub(r"^[\w.]+: ", "", message.strip().splitlines()[-1])
        rank = f" (rank {get_rank()})" if get_world_size() > 1 else ""
        message = " ".join(message.splitlines())  # names of files may be of several
        print(f"error{rank}: {message}", file=sys.stderr, flush=True)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except (RuntimeError, OSError, EOFError) as e:
        rank = f" (rank {get_rank()})" if get_world_size() > 1 else ""
        lost, what = False, next((text for signs, text in SHORTAGES if re.search(signs, str(e))), None)
        if what is None and "resource_sharer" in "".join(traceback.format_tb(e.__traceback__)):
            what = LOST_LOADER.format(f"{type(e).__name__}: {e}" if str(e) else type(e).__name__)
        elif get_world_size() > 1 and PEER_LOST.search(str(e)):
            lost = True
            what = "the connection to another process is lost. What ended it stands on its own screen, or above"
        if what is None:
            raise
        print(f"error{rank}: {what}", file=sys.stderr, flush=True)
        sys.exit(1 if lost else 2)
    if dist.is_initialized():
        dist.destroy_process_group()


# What the system says when there is too little of something, and what to do.
SHORTAGES = (
    (
        r"shared memory|Bus error|/torch_\d+",
        "/dev/shm, through which loaders hand over their images, is too small. Enlarge it (docker run --shm-size 8g), "
        "or lower --num_workers or --batch_size_per_gpu",
    ),
    (
        r"Too many open files|received \d+ items of ancdata",
        "too many open files. Raise `ulimit -n`, or lower --num_workers",
    ),
    (
        r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)|Pin memory thread exited unexpectedly",
        "a loader's process was ended from outside. Most likely the machine ran out of memory: lower --num_workers",
    ),
    (
        r"out of memory|[Cc]an(no|')t allocate memory|not enough memory",
        "not enough memory. Lower --batch_size_per_gpu (and, in training, raise --grad_accum_steps by as much); see "
        "docs/troubleshooting.md",
    ),
)
# Batches come through Python's resource_sharer. If a loader's process dies on the way, errors of many kinds follow.
LOST_LOADER = (
    "a loader's process could not hand over a batch ({}). Most likely the machine ran out of memory, and it was ended: "
    "lower --num_workers; or it ran out of open files: raise `ulimit -n`"
)


def check_output_dir(path, flag="--output_dir", files=()):
    """Make the folder `path` and make sure that `files` can be written there, or raise UserError naming the flag."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        reason = "a file is in its way" if isinstance(e, FileExistsError | NotADirectoryError) else e.strerror
        raise UserError(f"can't write to {flag} {path}: {reason}. Name a folder that you may write to") from e
    for name in files:
        place = Path(path) / name
        if place.is_dir():
            raise UserError(f"{flag} {path} has a folder named {name}, where a file is to be written. Move it away")


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
        args.rank, args.world_size, args.gpu = find_place(args.dist_url)
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


def find_place(dist_url):
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


def agree(loss, *wishes):
    """What one process finds, all do: a HostCopy of [whether any loss is not finite, the largest of each wish].

    `loss` is a scalar on the device, `wishes` are numbers on the host. One small all-reduce, and nobody waits.
    """
    flags = torch.stack([(~loss.detach().isfinite()).float(), *(loss.new_full((), float(wish)) for wish in wishes)])
    if get_world_size() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return HostCopy(flags)


class StopRequest:
    """Notes SIGTERM, SIGINT, SIGUSR1 and SIGUSR2, so that a run can finish its step and save before it ends.

    As a context manager; `signal` is the number of the first that came, 0 before. A second SIGINT interrupts at once;
    not within a second, because launchers pass on a Ctrl-C that the processes have had from the terminal already.
    """

    def __enter__(self):
        self.signal, self.noted, self.interrupted, self.before = 0, set(), None, {}
        self.children = set(multiprocessing.active_children())
        if threading.current_thread() is threading.main_thread():  # Python's signals are the main thread's
            for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
                number = getattr(signal, name, None)  # Windows has the first two
                if number is not None:
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, error=None, *_):
        # A script's processes end together from here on, and launchers send SIGTERM to all behind the first that ends:
        # it must not change the exit code, by which a job's script knows whether to come back.
        agreed = error is None or issubclass(error, UserError)
        ending = agreed and self.before.get(signal.SIGTERM) is terminate
        for number, handler in self.before.items():
            if ending and number != signal.SIGINT:
                handler = signal.SIG_IGN
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.kill_loaders()

    def kill_loaders(self):
        """End the processes of loaders. Python would at its end, by the SIGTERM that they ignore, and wait for ever."""
        deaf = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if deaf else None  # torch's would raise an error
        for child in set(multiprocessing.active_children()) - self.children:
            child.kill()
            child.join()
        if deaf:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)

    def note(self, number, _):
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted is not None and now - self.interrupted > 1:
                raise KeyboardInterrupt
            self.interrupted = self.interrupted or now
        self.signal = self.signal or number
        self.noted.add(number)

    def leave(self, number):
        """End as signal `number` asks: by what handled it before us, as under submitit, or with code 128 + number.

        What handled others that have come here is called, too: Slurm may send SIGTERM first and SIGUSR2 behind it.
        """
        for each in sorted({number, *self.noted}):
            handler = self.before.get(each)
            if callable(handler) and handler not in (signal.default_int_handler, terminate):
                self.__exit__()
                handler(each, None)
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(128 + number)


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

    def go_on_from(self, everyones):
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


def lock_output_dir(folder, patience=10.0):
    """Keep other runs out of an output folder until what this returns, a context manager, is closed.

    The lock ends with the process, however that ends. Raises UserError, on all ranks, if another run holds it for
    longer than `patience` seconds: one that was just killed may still be dying.
    """
    path = os.path.join(folder, ".lock")
    try:
        file, free = lock_file(path, patience) if is_main_process() else (contextlib.nullcontext(), True)
    except OSError as e:
        file, free = None, f"can't write {path}: {e.strerror}. Delete it, or name another --output_dir"
    free = gather_objects(free)[0]
    if isinstance(free, str):
        raise UserError(free)
    if not free:
        raise UserError(
            f"another run is writing to --output_dir {folder}. End it (a killed launcher leaves its processes behind), "
            f"or name another folder. If there is none, delete {path}"
        )
    return file


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
        if is_main_process():
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
                write_whole(path, lambda file: torch.save(state, file), self.previous if keep_previous else None)
            except Exception as e:
                cause = e if isinstance(e, OSError) else e.__context__ or e  # torch.save wraps what the system says
                reason = " ".join(str(getattr(cause, "strerror", None) or e).split())[:200]
                self.failures[path] = what = f"{path} could not be written ({reason})"
                say(f"warning: {what}; an earlier one, if any, is as it was. The run goes on")
            else:
                self.failures.pop(path, None)
                self.keep_previous = self.keep_previous or path == self.path


def previous_checkpoint(path):
    """checkpoint.pth -> checkpoint.prev.pth"""
    path = Path(path)
    return str(path.with_name(f"{path.stem}.prev{path.suffix}"))


def save_on_master(state, path):
    """torch.save on rank 0, whole or not at all."""
    if is_main_process():
        write_whole(path, lambda file: torch.save(state, file))


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
    return plain_args(file.get("args")) if isinstance(file, dict) else {}


def check_archive(path):
    """Raise BadZipFile if the checksums that torch.save wrote, and torch.load ignores, don't match."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


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


def global_batch(args):
    """Images a step over all processes, of the arguments of a run as a dict; None if they don't say, or nonsense."""
    numbers = args.get("batch_size_per_gpu"), args.get("world_size", 1), args.get("grad_accum_steps", 1)
    return math.prod(numbers) if all(type(n) is int and 0 < n < 2**31 for n in numbers) else None


def check_resumable(path, checkpoint, args):
    """Raise UserError if a file is no training checkpoint, or one of a run whose arguments make other tensors.

    Arguments that would change the result need --allow_changed_args, and are named.
    """
    epoch = checkpoint.get("epoch") if isinstance(checkpoint, dict) else None
    networks = isinstance(epoch, int) and all(is_network_state(checkpoint.get(key)) for key in ("student", "teacher"))
    if not networks or epoch < 0:
        raise UserError(f"{path} is no training checkpoint, and would be overwritten. Move it, or name another folder")
    before, now = plain_args(checkpoint.get("args")), plain_args(args)
    if vit_factory(before.get("arch")) is vit_factory(args.arch) is not None:
        before["arch"] = args.arch  # deit_small is another name of vit_small
    batches = (global_batch(before), global_batch(now))
    if None not in batches:
        before["images a step"], now["images a step"] = batches
    for values in (before, now):
        if values and values.get("mean") is None:
            values |= {"in_chans": values.get("in_chans", 3), "mean": [*IMAGENET_MEAN], "std": [*IMAGENET_STD]}
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
        log(
            "note: going on with "
            + ", ".join(f"{w} (was {before[name]})" for w, name in zip(wanted, changed, strict=True))
        )


def plain_args(args):
    """The arguments of a run, in whatever form, as a dict of plain types."""
    if not isinstance(args, dict):
        args = vars(args) if isinstance(args, argparse.Namespace) else {}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in args.items()}


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
            log(f"warning: {e}. Going on from the one before, {found[i + 1]}")
            continue
        if file != path and len(found) == 1:
            log(f"warning: there is no {path}. Going on from the one before, {file}; delete that too to begin anew")
        return checkpoint, file
    return None, None


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
    log(f"resuming from {path}")
    for name, target in objects.items():
        if target is None:
            continue
        if name not in checkpoint:
            log(f"warning: {path} has no {name!r}; it starts afresh")
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


# ---- backbones ----


def vit_names():
    return [name for name in vars(vits) if name.startswith("vit_")]


def vit_factory(arch):
    """The function that builds one of our ViTs, under either of its names; None for any other network."""
    name = {"deit_tiny": "vit_tiny", "deit_small": "vit_small"}.get(arch, arch)
    return vars(vits)[name] if name in vit_names() else None


def convnet_names():
    from torchvision import models

    return models.list_models(module=models)


def import_timm(arch):
    try:
        import timm
    except ImportError as e:
        raise UserError(f"--arch {arch} comes from timm, which is not installed: pip install timm") from e
    return timm


def timm_name(arch):
    """What timm calls the network `arch`, or None if it is not one of timm's: `timm:<name>`, or an XCiT.

    The public names of the XCiTs end in the patch size; timm's, which are known too, in the image size they are for.
    """
    if arch.startswith("xcit_"):
        return arch if re.search(r"_p\d+_\d+", arch) else f"{arch}_224"
    return arch.removeprefix("timm:") if arch.startswith("timm:") else None


def list_archs():
    """Every name that `build_backbone` knows, in the order ours, XCiT, torchvision, timm."""
    timm = import_timm("timm:<name>")
    xcits = [name.removesuffix("_224") for name in timm.list_models("xcit_*_224")]
    return [*vit_names(), *xcits, *convnet_names(), *(f"timm:{name}" for name in timm.list_models())]


def build_backbone(arch, patch_size=16, img_size=224, drop_path_rate=0.0, in_chans=3):
    """A network [B, in_chans, H, W] -> [B, width] by its name (`list_archs` has them), and its width.

    One of our ViTs (deit_tiny and deit_small are other names of two of them), an XCiT, a torchvision classification
    network without its last layer, or `timm:<name>`. `patch_size` and `img_size` (of the positional grid) apply to our
    ViTs only, `drop_path_rate` to networks that have one. Raises UserError for an unknown name, and for a network that
    does not take images of `img_size` or gives no pooled features.
    """
    vit = vit_factory(arch)
    if vit:
        sizes = {"patch_size": patch_size, "img_size": [img_size], "in_chans": in_chans}
        model = vit(**sizes, drop_path_rate=drop_path_rate, num_classes=0)
        return model, model.embed_dim
    check_arch(arch)
    build = build_timm if timm_name(arch) else build_convnet
    model = build(arch, drop_path_rate=drop_path_rate, in_chans=in_chans)
    return model, features_width(model, img_size, arch, in_chans)


def build_convnet(arch, drop_path_rate=0.0, in_chans=3):
    """torchvision's network without its classifier; none of them has an argument for the rate of drop path."""
    from torchvision import models

    # Auxiliary classifiers take no part: their parameters would never get a gradient.
    no_extras = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    model = take_off_classifier(models.get_model(arch, weights=None, **no_extras), arch)
    if in_chans != 3:
        take_channels(model, in_chans)
    return model


def take_channels(model, in_chans):
    """Put a new first convolution into a network, for so many channels: normal weights as spread as the old ones."""
    name, old = first_convolution(model)
    shape = (old.kernel_size, old.stride, old.padding, old.dilation)
    new = nn.Conv2d(in_chans, old.out_channels, *shape, bias=old.bias is not None)
    nn.init.normal_(new.weight, std=old.weight.std().item())
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def first_convolution(model):
    """(name, module) of the convolution that sees the image; (None, None) if there is none."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return next(found, (None, None))


def build_timm(arch, drop_path_rate=0.0, pretrained=False, in_chans=3):
    """timm's network for `arch` without its classifier; images of any size where timm provides for that.

    Raises UserError if it can't be had for so many channels.
    """
    channels = {} if in_chans == 3 else {"in_chans": in_chans}
    # What a network has no argument for is left out, one by one: timm says which.
    wishes = {"dynamic_img_size": True, "strict_img_size": False, "drop_path_rate": drop_path_rate}
    while True:
        try:
            options = {"pretrained": pretrained, "num_classes": 0, **channels, **wishes}
            return import_timm(arch).create_model(timm_name(arch), **options)
        except TypeError as e:
            if channels and "in_chans" in str(e):
                raise UserError(f"--arch {arch} takes images of 3 channels only, not --in_chans {in_chans}") from e
            unknown = [name for name in wishes if name in str(e)]
            if not unknown:
                raise
            del wishes[unknown[0]]


def check_arch(arch):
    """Raise UserError, with the nearest names, if there is no such network."""
    if vit_factory(arch):
        return
    if timm_name(arch):
        known, prefix = import_timm(arch).list_models(), "timm:" * arch.startswith("timm:")
        if timm_name(arch).split(".")[0] in known:  # a dot and the name of some weights may follow
            return
        near = did_you_mean(arch, [prefix + name for name in known])
    else:
        known = [*vit_names(), *convnet_names()]
        if arch in known:
            return
        near = did_you_mean(arch, known)
    raise UserError(f"unknown --arch {arch}{near or '; vit_small and resnet50 are two'} (main_dino.py --list_archs)")


def take_off_classifier(model, arch):
    """A torchvision network with its last layer, linear or a convolution, replaced by Identity."""
    for name in ("fc", "classifier", "head", "heads"):
        layer, parent = getattr(model, name, None), model
        if isinstance(layer, nn.Sequential):  # the classifier stands at its end, or has only a pooling behind it
            parent, layers = layer, [(n, sub) for n, sub in layer.named_children() if isinstance(sub, CLASSIFIERS)]
            name, layer = layers[-1] if layers else (name, None)
        if isinstance(layer, CLASSIFIERS):
            setattr(parent, name, nn.Identity())
            return model
    raise UserError(f"--arch {arch} does not end in a classifier that could be taken off; choose another")


CLASSIFIERS = (nn.Linear, nn.Conv2d)


def features_width(model, img_size, arch, in_chans=3):
    """Width of a network's features, found by running it on an empty image.

    Raises UserError if it can't digest images of img_size × img_size, or gives anything but one vector an image.
    """
    training = model.training
    weight = next(model.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            features = first_output(model.eval(), torch.zeros(2, in_chans, img_size, img_size, device=weight.device))
    except (RuntimeError, ValueError, AssertionError) as e:
        problem = " ".join(str(e).split())[:200] or type(e).__name__
        raise UserError(f"--arch {arch} does not take images of {img_size} pixels: {problem}") from e
    finally:
        model.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise UserError(f"--arch {arch} gives no pooled features, one vector an image; choose another")
    return features.shape[1]


def is_vit(model):
    return isinstance(model, vits.VisionTransformer)


def use_fused_attention(model, device, amp_dtype=None):
    """Turn on torch's fused attention on a ViT that we build, where it was measured to be faster.

    In bf16 on the CPU it is slower than written-out attention, forward and backward; everywhere else it is faster.
    """
    if is_vit(model):
        model.set_fused_attention(device.type != "cpu" or amp_dtype is None)


def checkpoint_activations(backbone, arch):
    """Let a backbone compute activations again in the backward pass. Raises UserError if it can't, or not exactly."""
    try:
        if has_batchnorms(backbone):  # would count each batch twice
            raise AssertionError
        backbone.set_grad_checkpointing()
    except (AttributeError, AssertionError) as e:
        raise UserError(
            f"--grad_checkpointing is for ViTs, and for timm's networks without batch norms that know it, not for "
            f"--arch {arch}"
        ) from e


def compile_in_place(model):
    """torch.compile for a model that keeps its state-dict keys, with a graph for each crop size.

    Random numbers stay torch's own, so that drop path drops what it drops otherwise. Raises UserError if there is no
    C++ compiler.
    """
    import torch._inductor.config

    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    if not any(name and shutil.which(name) for name in compilers):
        raise UserError("--compile needs a C++ compiler, such as g++. Install one, or leave --compile out")
    torch._inductor.config.fallback_random = True
    model.compile(dynamic=False)


def has_batchnorms(model):
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


# ---- weights ----


def load_weights(model, pretrained_weights, checkpoint_key="teacher", arch=None, patch_size=None, part="backbone"):
    """Load a backbone's weights from a checkpoint or a plain state dict, and say how many tensors matched.

    `pretrained_weights` is a file; or "", for the weights that the paper's authors published for `arch` and
    `patch_size` (downloaded once; random, with a warning, where they published none); or "random". `checkpoint_key`
    picks the network in a training checkpoint, `part` those for a special purpose among the published (see
    hubconf.PUBLISHED). The projection head is passed over. A ViT takes on the positional grid of the file. Returns
    (tensors matched, tensors of the model). Raises UserError if one of the model's tensors is not in the file or has
    another shape there, or if the file can't be read.
    """
    if pretrained_weights == "random":
        log("random weights, as asked for")
        return 0, len(model.state_dict())
    if pretrained_weights:
        source, file = pretrained_weights, load_checkpoint(pretrained_weights)
    else:
        source, file = load_published(arch, patch_size, part)
        if file is None:
            what = f"{arch} with patch size {patch_size}" if vit_factory(arch) else arch
            log(f"warning: no weights were published for {what}: going on with random weights")
            return 0, len(model.state_dict())
    state, source = pick_state_dict(file, checkpoint_key, source)
    state = backbone_state(state)
    adopt_positional_grid(model, state)
    return fill_backbone(model, state, source, arch, trained_crop_size(file))


def fill_backbone(model, state, source, arch=None, trained_size=None):
    """Give a backbone all its tensors from a state dict; see `load_weights` for what is returned, raised and said."""
    wanted = model.state_dict()
    if "cls_attn_blocks.0.attn.q.weight" in wanted:
        import hubconf

        state = hubconf._xcit_for_timm(state)
    matched = [key for key in wanted if key in state]
    if not matched:
        raise UserError(
            f"none of the {len(wanted)} tensors of {arch or 'the model'} is in {source} (it has "
            f"{some_of(list(state)) or 'none'}). Check --arch, --patch_size and --checkpoint_key"
        )
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"{source} has only {len(matched)} of the {len(wanted)} tensors of {arch or 'the model'}; it lacks "
            f"{some_of(missing)}. Check --arch and --checkpoint_key"
        )
    for key in matched:
        if state[key].shape != wanted[key].shape:
            theirs, ours = list(state[key].shape), list(wanted[key].shape)
            alike = len(theirs) == len(ours) == 4 and theirs[:1] + theirs[2:] == ours[:1] + ours[2:]
            hint = (
                "Name the training checkpoint, which says how many channels"
                if alike
                else "Check --arch and --patch_size"
            )
            raise UserError(f"{key} is {theirs} in {source} but {ours} in {arch or 'the model'}. {hint}")
    model.load_state_dict({key: state[key] for key in matched}, strict=False)
    trained_at = f", trained at {trained_size} pixels" if trained_size else ""
    log(f"loaded {len(matched)} of {len(wanted)} tensors from {source}{trained_at}")
    unused = [key for key in state if key not in wanted and not key.startswith(("head.", "fc."))]
    if unused:
        log(f"warning: in the file but not in the model: {some_of(unused)}")
    return len(matched), len(wanted)


def trained_crop_size(checkpoint):
    """Side of the global crops of the run that a checkpoint is of, if it says; the best size to evaluate at."""
    args = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    return args.get("global_crops_size") if isinstance(args, dict) else None


def shown(name):
    """A name as it is, or, with odd characters in it, as Python writes it: on one line in any case."""
    return name if name.isprintable() else repr(name)


def some_of(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


load_pretrained_weights = load_weights  # the public name


def frozen_backbone(args, device, image_size=224, part="backbone", inputs=None):
    """The trained network that `args` (see `model_flags`) name, for evaluation on the device; its width.

    `image_size` is the side of the positional grid of a network that stays untrained. `inputs` are the network's, as
    `trained_inputs` has them, of a caller that goes by them; without, only a network for photographs will do. Raises
    UserError.
    """
    if inputs is None:
        inputs = trained_inputs(args.pretrained_weights)
        if inputs != RGB:
            raise UserError(
                f"--pretrained_weights {args.pretrained_weights} takes images of its own kind ({inputs.describe()}); "
                "here they are photographs with ImageNet's mean and std. eval_knn.py and eval_linear.py go by the kind"
            )
    model, width = build_backbone(args.arch, args.patch_size, image_size, in_chans=inputs.in_chans)
    load_weights(model, args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, part)
    use_fused_attention(model, device)
    return model.to(device).eval().requires_grad_(False), width


def load_published(arch, patch_size, part="backbone", flag="--pretrained_weights"):
    """(URL, file) of what the authors published for a network, by the names in hubconf.PUBLISHED; the plain backbone
    stands in for one of a special purpose. (None, None) if there is nothing.
    """
    import hubconf

    factory = vit_factory(arch)
    networks = [(factory.__name__ if factory else arch, size) for size in (patch_size, None)]  # convnets have no patch
    found = [files for files in hubconf.PUBLISHED.values() if (files["arch"], files["patch_size"]) in networks]
    if not found:
        return None, None
    url = hubconf.BASE_URL + found[0].get(part, found[0]["backbone"])
    log(f"no {flag}: taking the published one, {url}")
    try:
        return url, hubconf._download(url)
    except OSError as e:
        otherwise = ", or `random` for an untrained network" if part != "linear" else ""
        raise UserError(f"can't download {url}: {e}. Give a file as {flag}{otherwise}") from e


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


def is_network_state(value):
    return isinstance(value, dict) and any(key.endswith((".weight", ".bias")) for key in value if isinstance(key, str))


def adopt_positional_grid(model, state):
    """Give a ViT the positional grid that the weights were trained on; other image sizes are interpolated from it."""
    learned = state.get("pos_embed")
    if not is_vit(model) or learned is None or learned.shape == model.pos_embed.shape:
        return
    side = math.isqrt(max(learned.shape[1] - 1, 0))
    if learned.ndim == 3 and learned.shape[2] == model.embed_dim and side * side == learned.shape[1] - 1:
        model.pos_embed = nn.Parameter(model.pos_embed.new_empty(learned.shape), model.pos_embed.requires_grad)
        model.patch_embed.num_patches = side * side
        model.patch_embed.img_size = side * model.patch_embed.patch_size


def initial_weights(init_from, arch, patch_size):
    """The tensors that --init_from names, and where they came from: (state dict, source). Raises UserError.

    `init_from` is a file, a training checkpoint's teacher being preferred; "published", for those of the paper's
    authors; or "timm", for timm's pretrained ones of a network by that name, or of our ViT's size.
    """
    if init_from == "timm":
        return timm_weights(arch, patch_size)
    if init_from == "published":
        source, file = load_published(arch, patch_size, flag="--init_from file")
        if file is None:
            raise UserError(f"no weights were published for --arch {arch} --patch_size {patch_size}. Name a file")
    else:
        source, file = init_from, load_checkpoint(init_from)
    networks = [key for key, value in file.items() if is_network_state(value)] if isinstance(file, dict) else []
    return pick_state_dict(file, networks[0] if len(networks) == 1 else "teacher", source)


def fit_first_layer(model, state, source):
    """Make the first convolution in a state dict fit a model for images of another number of channels.

    For grey images the weights of three channels are added up, which is what three equal channels would give; for any
    other number the layer starts afresh.
    """
    name, layer = first_convolution(model)
    learned = state.get(f"{name}.weight")
    if learned is None or learned.ndim != 4 or learned.shape[1] == layer.weight.shape[1]:
        return
    if (learned.shape[1], layer.weight.shape[1]) == (3, 1):
        state[f"{name}.weight"] = learned.sum(dim=1, keepdim=True)
        log(f"{name} is for grey images: its weights for three channels in {source} are added up")
    else:
        channels = f"it is for {learned.shape[1]} channels in {source}, for {layer.weight.shape[1]} here"
        for part, tensor in layer.state_dict().items():
            state[f"{name}.{part}"] = tensor
        log(f"{name} starts afresh: {channels}")


def timm_weights(arch, patch_size):
    factory = vit_factory(arch)
    name = f"timm:{factory.__name__}_patch{patch_size}_224" if factory else arch if timm_name(arch) else f"timm:{arch}"
    try:
        check_arch(name)
    except UserError as e:
        raise UserError(f"timm has no weights of {name.removeprefix('timm:')}. Give a file as --init_from") from e
    try:
        return build_timm(name, pretrained=True).state_dict(), f"{name} [pretrained]"
    except Exception as e:  # what a hub's client raises without a network differs from version to version
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"can't get timm's weights of {name}: {reason}. Give a file as --init_from") from e


def resample_positional_grid(model, state):
    """Interpolate the positions in a ViT's state dict to the grid of `model`; what does not fit is left as it is."""
    learned = state.get("pos_embed")
    if not is_vit(model) or learned is None or learned.ndim != 3 or learned.shape[2] != model.embed_dim:
        return
    side, wanted = (math.isqrt(max(grid.shape[1] - 1, 0)) for grid in (learned, model.pos_embed))
    if side != wanted and side * side == learned.shape[1] - 1:
        grid = learned[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat((learned[:, :1].float(), grid.flatten(2).transpose(1, 2)), dim=1)
        log(f"the positions of {side} × {side} patches are interpolated to {wanted} × {wanted}")


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


def trained_inputs(path):
    """The Inputs of the training checkpoint in a file; RGB where none are said, as in the published files."""
    if not path or path == "random" or str(path).endswith(".safetensors"):
        return RGB
    return inputs_of(load_args(path))


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Levels [..., C, H, W], uint8 or int16, -> float32 with that mean and std by channel; floats are left alone.

    `mean` and `std` are tuples of C numbers, of values from 0 to 1.
    """
    if images.dtype.is_floating_point:
        return images
    mean, std = statistics_on(images.device, mean, std)
    deep = images.dtype == torch.int16  # dino_data.levels
    values = images.float().add_(32768).div_(65535) if deep else images.float().div_(255)
    return values.sub_(mean).div_(std)


@functools.cache  # sending them to a GPU again with every batch would make the host wait for it
def statistics_on(device, mean, std):
    return [torch.tensor(values, device=device)[:, None, None] for values in (mean, std)]


def first_output(model, images):
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
                features.append(first_output(self.backbone, torch.cat(crops[first:i])))
                first = i
        features = torch.cat(features)
        self.features = features.detach()
        return self.head(features)


@torch.no_grad()
def cls_attention(model, images):
    """How much CLS looks at each patch in a ViT's last block: [B, heads, H / patch, W / patch] of images [B, 3, H, W].

    H and W are multiples of the patch size. The mass that CLS gives itself is left out, so a map sums to less than 1.
    """
    rows, columns = (side // model.patch_embed.patch_size for side in images.shape[-2:])
    tokens = model.prepare_tokens(images)
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    last = model.blocks[-1]
    queries, keys, _ = last.attn.split_heads(last.norm1(tokens))
    attention = last.attn.attention_map(queries[:, :, :1], keys)  # [B, heads, 1, 1 + patches]: one row of a large map
    return attention[:, :, 0, 1:].unflatten(-1, (rows, columns))


def largest_mass(attention, threshold):
    """Mask of the fewest patches that hold a share `threshold` of each map's mass: bool like attention [..., h, w]."""
    mass, order = attention.flatten(-2).sort(dim=-1)
    cumulated = mass.cumsum(dim=-1) / mass.sum(dim=-1, keepdim=True)
    kept = cumulated > 1 - threshold
    return torch.zeros_like(kept).scatter(-1, order, kept).view(attention.shape)


def compute_ap(ranks, nres):
    """Average precision by trapezoids of the `nres` positives of a query that were found at these ranks, from 0."""
    before = np.arange(len(ranks))
    ranks = np.asarray(ranks, dtype=np.float64)
    precision_left = np.where(ranks == 0, 1.0, before / np.maximum(ranks, 1))
    precision_right = (before + 1) / (ranks + 1)
    return float((precision_left + precision_right).sum() / (2 * nres))


def multi_scale(images, model):
    """Mean of a model's features [B, D] over the scales 1, 1/√2 and 1/2 of the images, L2-normalised."""
    features = [first_output(model, images)]
    for scale in (2**-0.5, 0.5):
        smaller = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        features.append(first_output(model, smaller))
    return F.normalize(torch.stack(features).mean(0), dim=1)


class Stopped(Exception):
    """Work that a signal has ended on all ranks; `signal` is its number."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = number


@torch.no_grad()
def extract_features(model, data_loader, use_cuda=True, multiscale=False, stop=None):
    """Features of a whole data set, in its order: [N, D] float32 on rank 0, None on the other ranks.

    `data_loader` yields (images, indices into the data set), images as uint8 RGB or normalised floats; in a distributed
    run each rank's loader covers its share, all shares of one length. `use_cuda` leaves the features on the model's
    GPU, if it has one, instead of in main memory. What the ranks found is gathered once, at the end. Now and then all
    look whether `stop`, a StopRequest, has a signal on one of them, and raise Stopped.
    """
    weight = next(model.parameters(), torch.empty(0))
    store = weight.device if use_cuda else torch.device("cpu")
    parts, places = [], []
    for i, (images, indices) in enumerate(MetricLogger().log_every(data_loader, 10, "Features:")):
        if stop and i % 10 == 0 and (number := max(gather_objects(stop.signal))):
            raise Stopped(int(number))
        images = normalize(images.to(weight.device, non_blocking=True))
        features = multi_scale(images, model) if multiscale else first_output(model, images)
        parts.append(features.float().to(store))
        places.append(indices)
    found, places = torch.cat(parts), torch.cat(places)
    if get_world_size() > 1:
        found, places = gather_rows(found, places)
        if found is None:
            return None
    ordered = torch.empty(len(data_loader.dataset), found.shape[1], device=store)
    ordered[places.to(store)] = found.to(store)
    return ordered


def check_finite_features(*features):
    """Raise UserError if features hold NaN or infinite numbers."""
    if not all(part.isfinite().all() for part in features):
        raise UserError(
            "the features hold NaN or infinite numbers: the network has diverged, or its weights are damaged"
        )


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
