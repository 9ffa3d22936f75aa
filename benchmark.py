"""Measure how fast this code is on this machine, as ratios to a plain DINO implementation and to the machine's limits.

    python benchmark.py                                       # all tables
    python benchmark.py step inference multicrop              # the networks, on a GPU if there is one
    python benchmark.py crops step --data_path imagenet/train --device cpu
    python benchmark.py scaling --processes 1 2 4 --threads 4 --arch vit_small --batch_size_per_gpu 16

Prints tables and writes only temporary files. The baseline is the algorithm in its simplest form: `Plain*` and
`plain_*` in dino_steps.py. The rows of a table are measured alternately, round by round, each in its own process, so
that other load on the machine affects all of them. A ratio such as `/ plain` is the median over the rounds, followed by
the lowest and the highest; above 1 is faster than plain. On GPUs, times are of steps in a row, by the GPU's own clock.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import dino_backbones
import dino_cli
import dino_cpu
import dino_crops
import dino_features
import dino_images
import dino_sample
import dino_steps
import eval_video_segmentation
import utils
from dino_cli import at_least, between
from dino_steps import flags_of
from utils import UserError

# ---- flags ----

BATCH_SIZES = {"cpu": [4, 16], "cuda": [32, 64, 128, 256]}


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("Benchmark", add_help=False)
    # fmt: off
    parser.add_argument("what", nargs="*", metavar="TABLE", help=f"Any of {', '.join(TABLES)}. Default: all.")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"], help="""auto uses a GPU if there
        is one. `crops`, `epoch` and `scaling` always measure the CPU. A CPU is measured in bf16 only if it has fast
        instructions for it.""")
    parser.add_argument("--data_path", default="sample", metavar="DIR", help="""Folder of JPEG files, also in
        subfolders, for `crops`, `epoch` and `scaling`. `sample` uses photographs that are installed already.""")
    parser.add_argument("--arch", default=None, metavar="NAME", help="""Network. Default: vit_small for `step`,
        `multicrop` and `epoch`, vit_tiny for `scaling`, the networks of the paper's table 1 for `inference`.""")
    parser.add_argument("--patch_size", default=16, type=at_least(1), metavar="PIXELS", help="Side of a ViT's patches.")
    parser.add_argument("--batch_size_per_gpu", default=None, type=at_least(1), nargs="+", metavar="B",
        help="""Images per step. `step` measures each, `scaling` uses the first, `epoch` the last; `inference` and
        `multicrop` use the first on CPUs, the last on GPUs. Default: 4 16 on CPUs, 32 64 128 256 on GPUs.""")
    parser.add_argument("--rounds", default=2, type=between(1, 99), metavar="N",
        help="How often to measure each row; half as often for rows that take long.")
    parser.add_argument("--processes", default=[1, 2], type=at_least(1), nargs="+", metavar="N",
        help="Numbers of processes for `scaling`; the others are compared with the first.")
    parser.add_argument("--threads", default=1, type=at_least(1), metavar="N", help="For `scaling`: per process.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for an unknown table or network."""
    for name in args.what:
        if name not in TABLES:
            raise UserError(f"there is no table {name!r}{utils.did_you_mean(name, TABLES)} (all: {', '.join(TABLES)})")
    if args.arch is not None:
        dino_backbones.check_arch(args.arch)


def kind_of(device):
    """cuda or cpu, for a --device. Raises UserError if this machine has none."""
    return "cuda" if utils.pick_device(device).type == "cuda" else "cpu"  # no table measures Apple's GPUs


def half(rounds):
    return max(rounds // 2, 1)


def batch_sizes(args, kind):
    return args.batch_size_per_gpu or BATCH_SIZES[kind]


def one_batch_size(args, kind):
    return batch_sizes(args, kind)[-1 if kind == "cuda" else 0]


def network_flags(args, kind):
    return {"arch": args.arch or "vit_small", "patch_size": args.patch_size, "device": kind}


# ---- one measurement ----


class Measured(NamedTuple):
    """Seconds per step, peak memory in MB, and how often the host waits for the GPU in a step that is not logged."""

    seconds: float
    mb: float
    waits: float | str = ""


class Watch:
    """Notes what a clock shows when each step begins, and when the last one has ended."""

    def __init__(self, clock=time.perf_counter):
        self.clock, self.ticks = clock, []

    def tick(self):
        self.ticks.append(self.clock())

    def median(self, skipped=0):
        """Median difference between two ticks, without the first `skipped` steps."""
        steps = list(itertools.pairwise(self.ticks))[skipped:]
        return statistics.median(utils.seconds_between(*step) for step in steps)


def repeat(call):
    """Work of which a step is one call.

    All work is a function of (number of steps, watch), and ticks before each step and at the end. So a GPU can be
    measured in the middle of a run, and does not wait for the host after each step.
    """

    def work(steps, watch):
        for _ in range(steps):
            watch.tick()
            call()
        watch.tick()

    return work


def measure(work, warm_up=1, steps=1, waits=False):
    """Measured, for the median of `steps` steps that follow `warm_up` others in one run."""
    cuda = utils.uses_gpu()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(utils.device_clock if cuda else time.perf_counter)
    work(warm_up + steps, watch)
    found = Measured(watch.median(warm_up), utils.peak_memory_mb(), host_waits(work)[0] if cuda and waits else "")
    if cuda:
        torch.cuda.empty_cache()  # the other rows of the table need it
    return found


def host_waits(work, steps=6):
    """(how often the host waits for the GPU per step, by torch's count; {file:line: waits in all steps}).

    The first is a median, since the first and the last step of a run are logged.
    """
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        seen.clear()  # of a warning about this mode
        watch = Watch(lambda: sum("synchroniz" in str(warning.message) for warning in seen))
        try:
            work(steps, watch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = (f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message))
    return watch.median(), Counter(places)


# ---- tables ----

# A fork server that has only imported this file: new processes would need seconds to import torch.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
KEPT = {}  # in the process of a row: its work, and its memory before


class Row(NamedTuple):
    """One row of a table: `prepare` returns the work to measure (see `repeat`) and must be picklable.

    A step processes `units` (images, frames, ...). `limit` names the row with the upper bound, if there is one.
    """

    units: float
    limit: str | None
    prepare: Callable


def keep(prepare):
    KEPT["work"] = prepare()
    KEPT["mb"] = 0 if utils.uses_gpu() else utils.peak_memory_mb()


def measure_kept(how):
    """Measured of the work of this process. Memory of the CPU is counted above what the preparation needed."""
    found = measure(KEPT["work"], **how)
    return found._replace(mb=found.mb - KEPT["mb"])


def take_turns(works, rounds, **how):
    """{name: [Measured of each round]} for {name: prepare}, alternately; [] where the GPU has too little memory.

    `how` are arguments of `measure`. Raises UserError for a process that dies.
    """
    found, context = {name: [] for name in works}, multiprocessing.get_context(METHOD)
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in works}

        def result(name, future):
            try:
                return future.result()
            except BrokenProcessPool:
                raise UserError("a measured process has died. Is there enough memory?") from None
            except torch.cuda.OutOfMemoryError:
                pools.pop(name).shutdown()
                found[name].clear()

        for name, future in [(name, pool.submit(keep, works[name])) for name, pool in pools.items()]:
            result(name, future)
        for _ in range(rounds):
            for name, pool in list(pools.items()):
                measured = result(name, pool.submit(measure_kept, how))
                found[name] += [measured] if measured else []
    return found


def compare(title, unit, rows, rounds, memory=None, more=None, base="plain", **how):
    """Measure {name: Row} and print a table, with ratios to each row whose name starts with `base`.

    `memory` is (heading, MB per unit) of a column, `more` has further columns: {heading: function of the speed}.
    """
    print(f"\n{title}", flush=True)
    found = take_turns({name: row.prepare for name, row in rows.items()}, rounds, **how)
    speeds = {name: [rows[name].units / m.seconds for m in found[name]] for name in rows}
    bases, limited = [n for n in rows if n.startswith(base)], any(row.limit for row in rows.values())
    table = [["", f"{unit}/s", "seconds", *(more or ()), *(f"/ {base}" for base in bases)]]
    table[0] += ["of the limit"] * limited + ([memory[0]] if memory else []) + ["host waits"] * how.get("waits", False)
    for name, row in rows.items():
        cells = [name, "out of memory"]
        if found[name]:
            middle, last = statistics.median(speeds[name]), found[name][-1]
            cells = [name, middle, statistics.median(m.seconds for m in found[name])]
            cells += [function(middle) for function in (more or {}).values()]
            cells += [ratio(speeds[name], speeds[base]) for base in bases]
            cells += [ratio(speeds[name], speeds[row.limit], 100, 1, " %")] if row.limit else []
            cells += [last.mb / memory[1], last.waits] if memory and name != row.limit else []
        table.append((cells + [""] * len(table[0]))[: len(table[0])])
    print_rows(table)


def ratio(values, others, scale=1, digits=2, unit=""):
    """Median of the round-by-round ratios, then the lowest and the highest if they differ, as text."""
    ratios = sorted(scale * a / b for a, b in zip(values, others, strict=False))  # the other may have run out of memory
    if not ratios:
        return "-"
    low, middle, high = (f"{x:.{digits}f}" for x in (ratios[0], statistics.median(ratios), ratios[-1]))
    return middle + f" ({low}-{high})" * (low != high) + unit


def print_rows(rows):
    """Print rows of cells in columns; the first cell is a name. Numbers get three digits."""
    text = [[c if isinstance(c, str) else f"{c:.3g}" if abs(c) < 100 else f"{c:.0f}" for c in row] for row in rows]
    first, *widths = (max(map(len, column)) for column in zip(*text, strict=True))
    for name, *cells in text:
        print("  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))]).rstrip())
    sys.stdout.flush()


# ---- images ----


def image_folder(root, data_path, number, side=500, classes=1):
    """A new folder in `root` with class folders that have `number` links to the JPEG files in `data_path`.

    For `sample`, the files are installed photographs of at most `side` pixels, as large as ImageNet's.
    """
    files = [path for path in sorted(Path(data_path).rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    folder = Path(tempfile.mkdtemp(dir=root), "train")
    folders = [folder / f"class{i}" for i in range(classes)]
    for each in folders:
        each.mkdir(parents=True)
    for source in dino_sample.find_photographs() if data_path == "sample" else ():
        files.append(folder.parent / f"{Path(source).stem}.jpg")
        image = dino_images.load_image(source)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(files[-1], "JPEG", quality=90)
    if not files:
        raise UserError(f"--data_path {data_path} has no JPEG files. Name a folder that has, or `sample`")
    for i in range(number):
        os.symlink(os.path.abspath(files[i % len(files)]), folders[i % classes] / f"{i:06}.jpg")
    return str(folder)


def fast_or_pil():
    """The fastest --augmentation that this machine has."""
    with contextlib.suppress(UserError):
        return dino_crops.opencv() and "fast"
    return "pil"


# ---- limits ----

SIDES = {"cpu": 4096, "cuda": 8192}  # of the matrices
PRECISION_FLAGS = {"float32": {"use_fp16": False}, "compiled": {"amp_dtype": "bf16", "compile": True}}
PRECISION_FLAGS |= {name: {"amp_dtype": name} for name in ("tf32", "bf16", "fp16")}


def precisions(kind):
    """What this device computes in hardware."""
    if kind == "cuda":
        return ["float32", "tf32", "bf16", "fp16"]
    return ["float32"] + ["bf16"] * dino_cpu.cpu_computes_bf16()


def pace(kind, warm_up=1):
    """Arguments of `measure`: on GPUs a run that gets steady, on CPUs a single step."""
    return {"warm_up": 5, "steps": 12} if kind == "cuda" else {"warm_up": warm_up}


def matrix_product(kind, precision):
    """The work of a product of two square matrices."""
    device, amp_dtype, *_ = dino_steps.start(dino_steps.training_args(device=kind, **PRECISION_FLAGS[precision]))
    dino_cpu.multiply_by_onednn()  # on CPUs where that is faster
    shape = (SIDES[kind], SIDES[kind])
    a, b, c = (torch.randn(shape, device=device).to(amp_dtype or torch.float32) for _ in range(3))
    return repeat(partial(torch.mm, a, b, out=c))


def memory_copy(kind, gigabytes):
    source = torch.ones(int(gigabytes * 1e9 / 4), device=utils.pick_device(kind))
    return repeat(partial(torch.empty_like(source).copy_, source))


def limits(args, gigabytes=0.5):
    """Matrix products, which bound the networks, and memory copies, which bound optimizer and teacher update."""
    kind, rows = kind_of(args.device), {}
    for name in precisions(kind):
        rows[f"{name} matrix products"] = Row(2e-9 * SIDES[kind] ** 3, None, partial(matrix_product, kind, name))
    rows["memory copied (read and written)"] = Row(gigabytes, None, partial(memory_copy, kind, gigabytes))
    compare("limits of this machine", "GFLOP or GB", rows, args.rounds, **pace(kind))


# ---- crops ----


def augment_images(make, images):
    """The work of making the crops of each image, bytes of a JPEG file or uint8 [H, W, 3], on one thread."""
    torch.set_num_threads(1)
    utils.fix_random_seeds(0)
    augment = dino_steps.open_and(make())
    return repeat(lambda: [augment(image) for image in images])


def crops(args, number=50):
    """From the bytes of JPEG files to crops; at 32 pixels from decoded images, since small ones stay decoded."""
    with tempfile.TemporaryDirectory() as root:
        paths = sorted(Path(image_folder(root, args.data_path, number)).rglob("*.jpg"))
        files = [path.read_bytes() for path in paths]
        small = [np.array(dino_images.load_image(path).resize((32, 32))) for path in paths * 4]
    for sizes, local in (((224, 96), 8), ((32, 16), 0), ((32, 16), 6)):
        images, kind = (files, "JPEG files") if sizes[0] == 224 else (small, "decoded images")
        makers = dino_steps.augmentations(sorted({"pil", fast_or_pil()}, reverse=True), sizes, local)
        makers |= {"decoding alone": partial(operator.methodcaller, "convert", "RGB")} if images is files else {}
        rows = {name: Row(len(images), None, partial(augment_images, make, images)) for name, make in makers.items()}
        title = f"crops: {kind} to 2 crops of {sizes[0]} pixels and {local} of {sizes[1]}, on one core"
        compare(title, "images", rows, args.rounds)


# ---- the networks ----


def steps_of(training, crops):
    """The work of an OurTraining's or a PlainTraining's steps. A plain loader normalizes its crops."""
    plain = isinstance(training, dino_steps.PlainTraining)
    crops = [utils.normalize(crop) for crop in crops] if plain else crops
    crops = [crop.pin_memory() for crop in crops] if training.device.type == "cuda" else crops
    return repeat(partial(training.step, crops)) if plain else partial(training.train, crops)


def training_work(training, batch_size, flags):
    """The work of `training`, one of the two classes, for some of main_dino.py's flags."""
    args = dino_steps.training_args(batch_size_per_gpu=batch_size, **flags)
    return steps_of(training(args), dino_steps.random_crops(args, batch_size))


def step_rows(kind, batch_size, sizes):
    """[(plain or this, precision)]. On GPUs not every precision at every batch size, since that would take long."""
    if kind == "cpu":
        return [(who, precision) for precision in precisions(kind) for who in ("plain", "this")]
    rows = [("plain", "fp16"), ("plain", "bf16"), ("this", "bf16")]
    if batch_size == (64 if 64 in sizes else min(sizes)):
        rows += [("this", "fp16"), ("this", "tf32"), ("this", "float32")]
    return rows + [("this", "compiled")] * (batch_size == max(sizes))


def step(args):
    """Training steps: speed, memory, and speed relative to matrix products of the same number of operations."""
    kind = kind_of(args.device)
    sizes, flags = batch_sizes(args, kind), network_flags(args, kind)
    for batch_size in sizes:
        setting, rows, products = dino_steps.training_args(**flags), {}, {}
        flop = dino_steps.useful_flop(setting, batch_size)
        images = 2 * SIDES[kind] ** 3 / flop * batch_size  # with the operations of one product
        for who, precision in step_rows(kind, batch_size, sizes):
            product = precision if precision in ("float32", "tf32") else "bf16"
            limit = f"{product} matrix products"
            products[limit] = Row(images, limit, partial(matrix_product, kind, product))
            training = dino_steps.PlainTraining if who == "plain" else dino_steps.OurTraining
            work = partial(training_work, training, batch_size, {**flags, **PRECISION_FLAGS[precision]})
            rows[f"{who} {precision}"] = Row(batch_size, limit, work)
        title = f"step: {setting.arch}/{args.patch_size}, {batch_size} images, {flop / 1e9:.0f} GFLOP"
        rounds = args.rounds if batch_size == min(sizes) else half(args.rounds)
        rows |= products
        # On CPUs memory settles after three steps.
        compare(title, "images", rows, rounds, ("MB/image", batch_size), waits=kind == "cuda", **pace(kind, 3))


def multicrop(args):
    """Training with more and more local crops, as in the paper's table 8. Hours are for 100 epochs of ImageNet."""
    kind, rows = kind_of(args.device), {}
    batch_size = one_batch_size(args, kind)
    for number in (0, 2, 6, 10):
        flags = {**network_flags(args, kind), "local_crops_number": number}
        work = partial(training_work, dino_steps.OurTraining, batch_size, flags)
        rows[f"2 x 224 + {number} x 96 pixels"] = Row(batch_size, None, work)
    title = f"multicrop: {flags['arch']}/{args.patch_size}, {batch_size} images, hours for 100 epochs of ImageNet"
    compare(title, "images", rows, half(args.rounds), ("peak GB", 1024), {"hours": imagenet_hours}, **pace(kind, 3))


def imagenet_hours(images_per_s, epochs=100):
    return epochs * 1_281_167 / images_per_s / 3600


def forward_pass(kind, precision, batch_size, arch, patch_size, size=224):
    """The work of computing features as evaluations do, from images that are on the device."""
    device, _, autocast, _ = dino_steps.start(dino_steps.training_args(device=kind, **PRECISION_FLAGS[precision]))
    model = dino_backbones.prepare_for_evaluation(dino_backbones.build_backbone(arch, patch_size, size)[0], device)
    images = torch.randn(batch_size, 3, size, size, device=device)
    return repeat(autocast(partial(model, images)))


NETWORKS = [("vit_small", 16), ("vit_small", 8), ("vit_base", 16), ("vit_base", 8), ("resnet50", 16)]


def inference(args):
    """Forward passes of the networks in the paper's table 1, or of --arch."""
    kind, rows = kind_of(args.device), {}
    batch_size = one_batch_size(args, kind)
    for arch, patch_size in [(args.arch, args.patch_size)] if args.arch else NETWORKS:
        for precision in [name for name in precisions(kind) if name in ("float32", "bf16")]:
            work = partial(forward_pass, kind, precision, batch_size, arch, patch_size)
            name = f"{arch}/{patch_size}" if dino_backbones.vit_factory(arch) else arch
            rows[f"{name} {precision}"] = Row(batch_size, None, work)
    compare(f"inference: {batch_size} images of 224 pixels", "images", rows, half(args.rounds), **pace(kind))


# ---- evaluations ----


def solve(function, task, kind, *shape):
    """The work of calling a function with what `task(kind, *shape)` returns."""
    if kind == "cpu" and not function.__name__.startswith("plain"):
        dino_cpu.tune_cpu()  # as in the evaluations
    return repeat(partial(function, *task(kind, *shape)))


def knn_task(device, train, test, width, classes, ks):
    """Arguments of both classifiers: normalized features around one random point per class, and labels."""
    generator = torch.Generator(device).manual_seed(0)
    like = {"generator": generator, "device": device}
    points, task = torch.randn(classes, width, **like), []
    for number in (train, test):
        labels = torch.randint(classes, (number,), **like)
        task += [F.normalize(points[labels] + 3 * torch.randn(number, width, **like), dim=1), labels]
    return *task, ks, 0.07


def knn(args, train=50_000, test=10_000, width=384, classes=1000, ks=(10, 20, 100, 200)):
    """k-NN classification, given the features."""
    kind, shape = kind_of(args.device), (train, test, width, classes, list(ks))
    functions = {"plain": dino_steps.plain_knn, "this": dino_features.knn_accuracies}
    rows = {who: Row(test, None, partial(solve, f, knn_task, kind, *shape)) for who, f in functions.items()}
    title = f"knn: {test} images among {train}, {width} features, {classes} classes, k = {', '.join(map(str, ks))}"
    compare(title, "images", rows, half(args.rounds), ("peak MB", 1), warm_up=int(kind == "cuda"))


def propagation_task(device, grid, width, frames, window, topk, plain=False):
    """Arguments of both: features of a frame and of earlier frames, their labels, window or (plain) its mask, top k.

    `grid` is (h, w) in patches.
    """
    like = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    features = F.normalize(torch.randn(frames + 1, *grid, width, **like), dim=-1)
    if plain:
        window = eval_video_segmentation.restrict_neighborhood(*grid, window).float().to(device)
    return features[0], features[1:], torch.rand(frames, *grid, 4, **like), window, topk


def propagation(args, h=60, w=107, width=384, frames=8, window=12, topk=5):
    """Label propagation, given the features."""
    kind, shape = kind_of(args.device), ((h, w), width, frames, window, topk)
    ours, plain = eval_video_segmentation.propagate, dino_steps.plain_propagation
    works = {"plain": (plain, partial(propagation_task, plain=True)), "this": (ours, propagation_task)}
    rows = {who: Row(1, None, partial(solve, *both, kind, *shape)) for who, both in works.items()}
    title = f"propagation: {h} x {w} patches, {width} features, {frames} earlier frames, window {window}, top {topk}"
    compare(title, "frames", rows, half(args.rounds), ("peak MB", 1))


# ---- whole runs ----

OUTPUT = "<output>"  # stands for a new folder


def run_python(*words, threads=None):
    """Run `python <words>` in the folder of this file. Returns the last line of its log.txt. Raises UserError."""
    with tempfile.TemporaryDirectory() as output:
        done = subprocess.run(
            [sys.executable, *(output if word == OUTPUT else str(word) for word in words)],
            cwd=os.path.dirname(os.path.abspath(__file__)),
            env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            reason = next((line for line in lines if line.startswith("error")), lines[-1])
            raise UserError(f"a measured run has failed: {reason.removeprefix('error: ')}")
        log = Path(output, "log.txt")
        return json.loads(log.read_text().splitlines()[-1]) if log.exists() else {}


def epoch(args, number=100):
    """One epoch as a whole process, from start to exit: main_dino.py and the baseline."""
    arch, batch_size, kind = args.arch or "vit_small", batch_sizes(args, "cpu")[-1], fast_or_pil()
    with tempfile.TemporaryDirectory() as root:
        images = image_folder(root, args.data_path, number)
        plain = ("-c", "import sys, dino_steps; dino_steps.plain_epoch(*sys.argv[1:])", images, OUTPUT, arch)
        ours = flags_of(data_path=images, output_dir=OUTPUT, augmentation=kind, epochs=1, warmup_epochs=0, arch=arch)
        ours += flags_of(patch_size=args.patch_size, batch_size_per_gpu=batch_size, num_workers=2, device="cpu")
        runs = {"plain": (*plain, args.patch_size, batch_size), f"this, --augmentation {kind}": ("main_dino.py", *ours)}
        used = number // batch_size * batch_size
        rows = {who: Row(used, None, partial(repeat, partial(run_python, *words))) for who, words in runs.items()}
        title = f"epoch: {arch}/{args.patch_size}, {number} images in batches of {batch_size}, from start to exit"
        compare(title, "images", rows, half(args.rounds), warm_up=0)


def second_epoch(threads, *words):
    """The work of a run of main_dino.py. Its time is that of one image in the second epoch: the first one warms up."""

    def work(steps, watch):
        watch.ticks += [0.0, 1 / run_python(*words, threads=threads)["train_images_per_s"]]

    return work


def scaling(args, steps=4):
    """Training with more processes. They load their own images, so no loader process hides any work."""
    batch_size, arch, rows = batch_sizes(args, "cpu")[0], args.arch or "vit_tiny", {}
    fixed = flags_of(arch=arch, patch_size=args.patch_size, out_dim=4096, use_fp16=False, batch_size_per_gpu=batch_size)
    fixed += flags_of(output_dir=OUTPUT, epochs=2, warmup_epochs=0, saveckp_freq=0, num_workers=0, device="cpu")
    with tempfile.TemporaryDirectory() as root:
        for number in args.processes:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", number] * (number > 1)
            images = image_folder(root, args.data_path, steps * number * batch_size)
            words = [*launcher, "main_dino.py", *fixed, *flags_of(data_path=images)]
            rows[f"{number} processes"] = Row(1, None, partial(second_epoch, args.threads, *words))
        title = f"scaling: {arch}, {batch_size} images and {args.threads} threads per process"
        compare(title, "images", rows, args.rounds, base=f"{args.processes[0]} processes", warm_up=0)


TABLES = {f.__name__: f for f in (limits, crops, step, multicrop, inference, epoch, knn, propagation, scaling)}


def main(args):
    """Print the tables that `args` name (see get_args_parser). Raises UserError."""
    check_args(args)
    here = os.path.dirname(os.path.abspath(__file__))  # the fork server does not know sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    for name in args.what or TABLES:
        TABLES[name](args)


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
