"""Command lines: types of flags, recipes, shared flags, and errors as one line."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

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

    parse.__name__ = number.__name__  # for argparse's message about a value that is no number
    parse.range = f"between {low} and {high}" if math.isfinite(high) else f"at least {low}"
    return parse


def at_least(low, number=int):
    """argparse type of an int (or float) of at least `low`."""
    return between(low, math.inf, number)


share = between(0, 1, float)
positive = at_least(math.ulp(0.0), float)
positive.range = "above 0"
bool_flag.range = "true or false"


def default_workers():
    """Default of --num_workers: the cores of this process, at most 10."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(10, cores)


# ---- parsing ----


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line instead of a page of usage."""

    source = ""  # the recipe, while its settings are parsed

    def error(self, message):
        if message.startswith("unrecognized arguments: ") and message.endswith(".tar"):
            message = "--data_path takes one pattern. Quote it: 'shards/{0000..0999}.tar'"
        elif message.startswith("unrecognized arguments: "):
            for word in [word for word in message.split()[2:] if word.startswith("-")][:1]:
                flag = "--" + word.partition("=")[0].lstrip("-").replace("-", "_")  # as in -arch and --patch-size
                message += utils.did_you_mean(flag, self._option_string_actions)
        self.exit(2, f"error: {self.source}{message} (--help lists the flags)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults and ranges after the help texts; the description as it is."""

    def _get_help_string(self, action):
        text, range_ = super()._get_help_string(action), getattr(action.type, "range", None)
        if action.default is None:  # the text says what the default is
            text = text.replace(" (default: %(default)s)", "")
            return f"{text} ({range_})" if range_ else text
        return text.replace("%(default)s)", f"%(default)s, {range_})") if range_ else text


class Flags(argparse.Namespace):
    """Parsed flags. `given` has the names of those that the command line or a recipe set; it is not one of vars()."""

    __slots__ = ("given",)


def parse_args(parser, argv=None):
    """Parse the command line into Flags. A recipe named by --config is read as if its flags came first.

    So argparse itself checks the recipe's values, and the command line overrides them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv, Flags())
    if getattr(args, "config", None) is not None:
        path = find_recipe(args.config)
        flags = recipe_flags(parser, read_recipe(path, known=set(vars(args)) - {"config", "print_config"}))
        parser.source = f"in {path}: "
        parser.parse_args(flags)
        parser.source = ""
        argv = flags + argv
        args = parser.parse_args(argv, Flags())
    args.given = given_flags(parser, argv, vars(args))
    return args


def given_flags(parser, argv, names):
    """The subset of `names` that `argv` sets, also to their defaults."""
    unset = object()  # argparse sets no default where there is a value already
    values = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset))))
    return {name for name, value in values.items() if value is not unset}


def check_whole_patches(flag, size, patch_size):
    """Raise UserError, with the nearest multiples, if `size` (or one of several sizes) is not one of the patch size."""
    sizes = [size] if isinstance(size, int) else size
    if not any(side % patch_size for side in sizes):
        return
    below = [side // patch_size * patch_size for side in sizes]
    above = [-(-side // patch_size) * patch_size for side in sizes]
    given, *near = (" ".join(map(str, sides)) for sides in (sizes, below, above) if all(sides))
    raise UserError(f"--{flag} {given} is not a multiple of --patch_size {patch_size}. Use {' or '.join(near)}")


def find_recipe(name):
    """The path of a recipe. `name` is a file, or one in recipes/ without its suffix: demo. Raises UserError."""
    if os.path.isfile(name) or os.path.basename(name) != name or Path(name).suffix:
        return name
    known = recipes()
    if name not in known:
        longer = [other for other in sorted(known) if len(name) > 2 and name in other]
        near = f"; did you mean {', '.join(longer)}?" if longer else utils.did_you_mean(name, known)
        near = near or f". There are {', '.join(sorted(known))}"
        raise UserError(f"--config {name} is neither a file nor the name of a recipe{near}")
    return known[name]


def recipes():
    """{name: path} of the recipes in recipes/."""
    return {path.stem: str(path) for path in Path(__file__).resolve().parent.glob("recipes/*.yaml")}


def read_recipe(path, known):
    """The settings in the YAML file `path`: {key: text or list of texts}. No other types can be made.

    Raises UserError if it can't be read, if a key is not in `known`, or if a value is missing or nested.
    """
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.load(file, Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())[:300]
        ours = isinstance(e, FileNotFoundError) and Path(path).parent.name in ("", "recipes")
        near = utils.did_you_mean(Path(path).stem, recipes()) if ours else ""
        raise UserError(f"can't read the recipe --config {path}: {reason}{near}") from e
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


def recipe_flags(parser, recipe):
    """The command line that a recipe's settings stand for."""
    flags = []
    for key, value in recipe.items():
        is_switch = parser._option_string_actions[f"--{key}"].nargs == 0
        if is_switch and str(value).lower() in ("true", "false"):
            flags += [f"--{key}"] * (str(value).lower() == "true")
        else:
            flags += [f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"]
    return flags


def print_config(args):
    """Print the settings as a recipe for --config. Settings without a value are comments."""
    for name, value in vars(args).items():
        if name not in ("config", "print_config"):
            text = yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]
            print(f"# {name}: not set" if value in (None, [], "") else f"{name}: {text}")


# ---- shared flags ----


# fmt: off
def add_config_flags(parser):
    """Add --config and --print_config to a parser, or to a group of it."""
    parser.add_argument("--config", metavar="FILE", help="""A recipe: a YAML file of `flag: value` lines, or the name of
        one in recipes/, such as demo. Flags on the command line override it.""")
    parser.add_argument("--print_config", action="store_true", default=argparse.SUPPRESS,
        help="Print the final settings as a recipe for --config, and exit.")


def model_flags(arch="vit_small", patch_size=16):
    """The flags that name the network of an evaluation, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--pretrained_weights", default="", metavar="PATH", help="""Folder of a run, or a checkpoint or
        state dict. A run says its network, so --arch and --patch_size are not needed. Default: the published weights
        for --arch and --patch_size. `random` evaluates an untrained network.""")
    parser.add_argument("--arch", default=arch, metavar="NAME",
        help="Network; main_dino.py --list_archs lists them. Default for a run: its own.")
    parser.add_argument("--patch_size", default=patch_size, type=at_least(1), metavar="PIXELS",
        help="Side of a ViT's patches. Default for a run: its own.")
    parser.add_argument("--checkpoint_key", default="teacher", metavar="KEY",
        help="Which network of a training checkpoint to use: teacher (better) or student.")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
        help="auto uses a GPU if there is one.")
    return parser


def exif_flag():
    """--exif, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--exif", default=False, type=bool_flag, metavar="BOOL",
        help="Rotate photographs by their EXIF orientation. Default for a run: as in its training.")
    return parser


def labeled_flags():
    """The flags that name labeled images, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False, parents=[exif_flag()])
    parser.add_argument("--data_path", default="sample", metavar="PATH", help="""Folder with train and val: class
        folders, or lists of paths and labels (train.csv), or tar shards. Or torchvision:NAME, such as
        torchvision:CIFAR10. Or `sample`, a small set made from photographs that are installed with the
        requirements.""")
    parser.add_argument("--list_columns", default=None, nargs="+", metavar="NAME", help="""Of lists with a header: the
        columns with paths and labels. Default: recognized by their names.""")
    return parser


def loader_flags():
    """The flags of evaluations in one or several processes, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--num_workers", default=default_workers(), type=at_least(0), metavar="N",
        help="Processes that load images. Default: the cores of this process, at most 10.")
    parser.add_argument("--dist_url", default="env://", metavar="URL", help="Rendezvous of several processes.")
    parser.add_argument("--local_rank", "--local-rank", default=0, type=int, metavar="N",
        help="Passed by some launchers; ignored.")
    return parser


def process_flags():
    """`loader_flags` and the precision of evaluations that extract features: a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False, parents=[loader_flags()])
    parser.add_argument("--amp_dtype", default="float32", choices=["float32", "bf16", "fp16", "tf32"], help="""What the
        network computes in. float32 gives the published numbers. bf16 and fp16 are faster on GPUs and round features
        to 2 or 3 digits; tf32 (NVIDIA GPUs) is in between. Features are stored in float32.""")
    return parser


def feature_flags():
    """The flags of evaluations that keep the features of all images, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False, parents=[labeled_flags(), process_flags()])
    parser.add_argument("--image_size", default=224, type=at_least(1), metavar="PIXELS", help="""Input size of the
        network. Images are resized to 8/7 of this size, then center-cropped. Default for a run: its global crops.""")
    parser.add_argument("--batch_size_per_gpu", default=128, type=at_least(1), metavar="B",
        help="Images per forward pass.")
    parser.add_argument("--use_cuda", default=True, type=bool_flag, metavar="BOOL",
        help="Keep the features on the GPU, if there is one. false: in main memory, which is slower but larger.")
    parser.add_argument("--dump_features", default=None, metavar="DIR",
        help="Write features and labels to this folder: {train,test}feat.pth and {train,test}labels.pth.")
    parser.add_argument("--load_features", default=None, metavar="DIR",
        help="Read features and labels written by --dump_features instead of running a network.")
    return parser
# fmt: on


# ---- running a script ----


created = []  # folders, which are removed if they are still empty when a script ends with an error


def check_output_dir(path, flag="--output_dir", files=()):
    """Create the folder `path`, and make sure that `files` can be written there, or raise UserError naming the flag."""
    try:
        if not os.path.isdir(path):
            Path(path).mkdir(parents=True, exist_ok=True)
            created.append(path)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        reason = "a file is in its way" if isinstance(e, FileExistsError | NotADirectoryError) else e.strerror
        raise UserError(f"can't write to {flag} {path}: {reason}. Use a folder that you can write to") from e
    for name in files:
        if (Path(path) / name).is_dir():
            raise UserError(f"{flag} {path} has a folder named {name}, where a file is to be written. Move it away")


def run(main, flags, description):
    """What every script does under `__main__`: parse, run `main(args)`, and print a UserError as one line.

    Any other error keeps its traceback. A hint follows where the cause is known.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # terminals that know ASCII only
    if threading.current_thread() is threading.main_thread():
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if not utils.is_nohup(number):
                signal.signal(number, utils.terminate)  # an exception, so that half-written files are removed
    parser = OneLineParser(description=description, parents=[flags], formatter_class=HelpFormatter)
    try:
        args = parse_args(parser)
        if getattr(args, "print_config", False):
            if utils.rank_from_environment("")[0] == 0:
                try:
                    print_config(args)
                    sys.stdout.flush()
                except BrokenPipeError:  # of `| head`
                    utils.mute()
            return
        main(args)
    except UserError as e:
        close_bars()
        message = str(e)
        if re.match(r"Caught \w+ in DataLoader worker", message):  # its traceback, with the message as the last line
            message = re.sub(r"^[\w.]+: ", "", message.strip().splitlines()[-1])
        for folder in created:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        say_error(" ".join(message.splitlines()))  # file names can have several lines
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        close_bars()
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as e:
        close_bars()
        traceback.print_exc()
        hint = find_hint(e)
        if hint:
            print(f"hint: {hint}", file=sys.stderr, flush=True)
        sys.exit(1)
    utils.leave_processes()


def say_error(message):
    """Print an error that several processes may have: once, by the first of them. torchrun repeats it at the end.

    It repeats the report of the process that ended first, so every process writes one.
    """
    line = f"error (rank {utils.get_rank()}): {message}" if dist.is_initialized() else f"error: {message}"
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        with contextlib.suppress(OSError):
            Path(report).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    if is_first_to_say(message):
        print(line, file=sys.stderr, flush=True)
    wait_for_others()  # after printing: torchrun ends all processes when it sees that one has ended


def is_first_to_say(message):
    """Whether no other process has this error. Rank 0 keeps the count."""
    if not dist.is_initialized():
        return True
    digest = hashlib.blake2b(message.encode(errors="replace"), digest_size=8).hexdigest()
    try:
        return dist.distributed_c10d._get_default_store().add(f"error {digest}", 1) == 1
    except RuntimeError:  # rank 0 has ended
        return True


def wait_for_others(patience=2.0):
    """Let rank 0, which keeps the count, wait a moment until the other processes have an error, too."""
    if not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # rank 0 has ended
        store = dist.distributed_c10d._get_default_store()
        ended, until = store.add("ended", 1), time.monotonic() + patience
        while utils.is_main_process() and ended < utils.get_world_size() and time.monotonic() < until:
            time.sleep(0.01)
            ended = store.add("ended", 0)


def reduce_dict(input_dict, average=True):
    """{name: tensor} summed, or averaged, over all processes. For code of the release."""
    if utils.get_world_size() == 1:
        return input_dict
    with torch.no_grad():
        names = sorted(input_dict)  # the same order on every rank
        values = torch.stack([input_dict[name] for name in names])
        dist.all_reduce(values)
        if average:
            values /= utils.get_world_size()
        return dict(zip(names, values, strict=True))


def setup_for_distributed(is_master):
    """Silence print in processes other than the first; print(..., force=True) still prints. For code of the release."""
    import builtins

    builtin_print = builtins.print

    def print_on_master(*words, force=False, **options):
        if is_master or force:
            builtin_print(*words, **options)

    builtins.print = print_on_master


def close_bars():
    """Remove the progress bars of interrupted loops, so that the next output starts a line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


# What torch and the system say when something runs out, and what to do about it.
HINTS = (
    (
        r"shared memory|Bus error|/torch_\d+",
        "/dev/shm, through which loaders pass images, is too small. Enlarge it (docker run --shm-size 8g), or lower "
        "--num_workers or --batch_size_per_gpu",
    ),
    (
        r"Too many open files|received \d+ items of ancdata",
        "too many open files. Raise `ulimit -n`, or lower --num_workers",
    ),
    (
        r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)|Pin memory thread exited|resource_sharer",
        "a loader process was killed. Most likely the machine ran out of memory: lower --num_workers",
    ),
    (
        r"out of memory|[Cc]an(no|')t allocate memory|not enough memory",
        "not enough memory. Lower --batch_size_per_gpu (and raise --grad_accum_steps by the same factor); see "
        "docs/troubleshooting.md",
    ),
    (
        r"(?i)closed by peer|reset by peer|broken pipe|remote process exited|connection was likely closed",
        "the connection to another process is lost. The cause is in that process's output",
    ),
)


def find_hint(error):
    """What to do about a known cause of an error, or None."""
    text = "".join(traceback.format_exception(error))
    return next((hint for signs, hint in HINTS if re.search(signs, text)), None)
