"""Command lines: recipes, types of flags, shared flags, and errors as one line."""

import argparse
import math
import re
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch.distributed as dist
import yaml

import utils
from utils import UserError, bool_flag

# ---- types of flags ----


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


# ---- parsing ----


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
            raise UserError(f"in {path}: unknown key {key!r}{utils.did_you_mean(str(key), known)}")
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


# ---- shared flags ----


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


# ---- running a script ----


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
        signal.signal(signal.SIGTERM, utils.terminate)  # so that what is half-written is cleared away
    parser = OneLineParser(description=description, parents=[flags], formatter_class=HelpFormatter)
    try:
        try:
            args = parse_args(parser)
            if getattr(args, "print_config", False):
                print_config(args)
                return
            main(args)
        finally:
            utils.Bar.close_all()  # so that what is said of an error has a line of its own
    except UserError as e:
        message = str(e)
        if re.match(r"Caught \w+ in DataLoader worker", message):  # inside a traceback, as its last line
            message = re.sub(r"^[\w.]+: ", "", message.strip().splitlines()[-1])
        rank = f" (rank {utils.get_rank()})" if utils.get_world_size() > 1 else ""
        message = " ".join(message.splitlines())  # names of files may be of several
        print(f"error{rank}: {message}", file=sys.stderr, flush=True)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except (RuntimeError, OSError, EOFError) as e:
        rank = f" (rank {utils.get_rank()})" if utils.get_world_size() > 1 else ""
        lost, what = False, next((text for signs, text in SHORTAGES if re.search(signs, str(e))), None)
        if what is None and "resource_sharer" in "".join(traceback.format_tb(e.__traceback__)):
            what = LOST_LOADER.format(f"{type(e).__name__}: {e}" if str(e) else type(e).__name__)
        elif utils.get_world_size() > 1 and PEER_LOST.search(str(e)):
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
