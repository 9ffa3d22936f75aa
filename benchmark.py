"""How fast training is on this machine, in ratios of runs made in turn, so that other load falls on both.

    python benchmark.py scaling                     # two processes on the CPU against one, a thread each
    python benchmark.py scaling --processes 1 2 4 8 --threads 4 --arch vit_small --batch_size_per_gpu 16

`scaling` trains with main_dino.py on the sample data set, with 1 process and with more, and prints images a second and
the efficiency: images a second over those of one process, over the number of processes. Crops are made in the training
processes, so nothing is hidden by loaders.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile

import dino_data
import utils
from utils import UserError

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("Benchmark", add_help=False)
    # fmt: off
    parser.add_argument("what", choices=["scaling"], help="What to measure.")
    parser.add_argument("--processes", default=[1, 2], type=int, nargs="+", metavar="N",
        help="Numbers of processes; the first is what the others are held against.")
    parser.add_argument("--rounds", default=3, type=int, metavar="N", help="How often each is run, in turn.")
    parser.add_argument("--threads", default=1, type=int, metavar="N", help="Threads of each process.")
    parser.add_argument("--arch", default="vit_tiny", metavar="NAME", help="Network, as for main_dino.py.")
    parser.add_argument("--patch_size", default=16, type=int, metavar="PIXELS", help="Side of a ViT's patches.")
    parser.add_argument("--batch_size_per_gpu", default=8, type=int, metavar="B", help="Images a step in each process.")
    parser.add_argument("--steps", default=12, type=int, metavar="N", help="Steps of a run.")
    # fmt: on
    return parser


def check_args(args):
    utils.check_limits(args, dict.fromkeys(("processes", "rounds", "threads", "batch_size_per_gpu"), (1, math.inf)))
    utils.check_limits(args, {"steps": (2, 20), "patch_size": (1, math.inf)})  # 20: the window of the time on the log
    utils.check_arch(args.arch)


# ---- scaling ----


def images_a_second(processes, images, args):
    """Of a run of main_dino.py on `images`, without its first step, which also warms up. Raises UserError."""
    with tempfile.TemporaryDirectory() as output:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        flags = {
            **{"arch": args.arch, "patch_size": args.patch_size, "batch_size_per_gpu": args.batch_size_per_gpu},
            **{"data_path": images, "output_dir": output, "epochs": 1, "warmup_epochs": 0, "out_dim": 4096},
            **{"num_workers": 0, "device": "cpu", "use_fp16": False, "saveckp_freq": 0},
        }
        words = [sys.executable, *(launcher if processes > 1 else []), "main_dino.py"]
        words += [word for name, value in flags.items() for word in (f"--{name}", value)]
        done = subprocess.run(
            [str(word) for word in words],
            cwd=os.path.dirname(os.path.abspath(__file__)),
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
            capture_output=True,
            text=True,
        )
        # Of each line of progress the mean seconds a step over the last 20, and how far the run was.
        times = re.findall(r"\]  \[ *(\d+)/\d+\].* time: ([\d.]+)", done.stdout)
        if done.returncode or len(times) < 2:
            lines = done.stderr.strip().splitlines() or ["it says nothing of its progress"]
            reason = next((line for line in lines if line.startswith("error")), lines[-1]).removeprefix("error: ")
            raise UserError(f"a run with {processes} processes failed: {reason}")
        first, (last, mean) = float(times[0][1]), times[-1]
        seconds = float(mean) * (int(last) + 1) - first
        return processes * args.batch_size_per_gpu * int(last) / seconds


def write_images(root, number):
    """A folder of so many crops of the sample data set."""
    folder = os.path.join(root, "images", "all")
    os.makedirs(folder)
    train = dino_data.image_folder(dino_data.find_data("sample", "train"))
    for i in range(number):
        os.symlink(train.samples[i % len(train)][0], os.path.join(folder, f"{i:06}.png"))
    return os.path.dirname(folder)


def scaling(args):
    found = {number: [] for number in dict.fromkeys(args.processes)}
    with tempfile.TemporaryDirectory() as root:
        folders = {}
        for number in found:
            images = args.steps * number * args.batch_size_per_gpu
            folders[number] = write_images(os.path.join(root, str(number)), images)
        for _ in range(args.rounds):
            for number in found:
                found[number].append(images_a_second(number, folders[number], args))
    base = args.processes[0]
    print("processes  images/s  ratio  efficiency")
    for number, rates in found.items():
        ratio = statistics.median(rate / alone for rate, alone in zip(rates, found[base], strict=True))
        print(f"{number:9}  {statistics.median(rates):8.2f}  {ratio:5.2f}  {ratio * base / number:10.2f}")


def main(args):
    check_args(args)
    scaling(args)


if __name__ == "__main__":
    utils.run(main, get_args_parser(), __doc__)
