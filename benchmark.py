"""Measure how fast this code is on this machine, as ratios to a plain DINO implementation and to the machine's limits.

    python benchmark.py                                                  # all tables: ten minutes on two cores
    python benchmark.py crops step --data_path imagenet/train
    python benchmark.py scaling --processes 1 2 4 --threads 4 --arch vit_small --batch_size_per_gpu 16

Prints tables and writes only temporary files. Everything runs on the CPU. The baseline is the algorithm in its simplest
form: `Plain*` and `plain_*` in this file. The rows of a table are measured in turn, round by round, each in its own
process, so that other load on the machine affects all of them. A ratio such as `/ plain` is the median over the rounds,
followed by the lowest and the highest; above 1 is faster than plain.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

import dino_backbones
import dino_cli
import dino_crops
import dino_data
import dino_features
import dino_images
import dino_run
import eval_video_segmentation
import main_dino
import utils
from dino_cli import at_least, between
from utils import UserError
from vision_transformer import DINOHead

# ---- flags ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("Benchmark", add_help=False)
    # fmt: off
    parser.add_argument("what", nargs="*", metavar="TABLE", help=f"Any of {', '.join(TABLES)}. Default: all.")
    parser.add_argument("--data_path", default="sample", metavar="DIR", help="""Folder of JPEG files, also in
        subfolders, for `crops`, `epoch` and `scaling`. `sample` uses photographs that are installed already.""")
    parser.add_argument("--arch", default=None, metavar="NAME",
        help="Network. Default: vit_small for `step` and `epoch`, vit_tiny for `scaling`.")
    parser.add_argument("--patch_size", default=16, type=at_least(1), metavar="PIXELS", help="Side of a ViT's patches.")
    parser.add_argument("--batch_size_per_gpu", default=[4, 16], type=at_least(1), nargs="+", metavar="B",
        help="Images per step. `step` measures each, `scaling` uses the first, `epoch` the last.")
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


# ---- measuring in turn ----

# A fork server that has only imported this file: new processes would need seconds to import torch.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class Row(NamedTuple):
    """One row of a table: `prepare(*args)` returns a function of no arguments, the work to measure.

    A call processes `units` (images, frames, ...). `limit` names the row with the upper bound, if there is one.
    """

    units: float
    limit: str | None
    prepare: Callable
    args: tuple = ()


class Worker:
    """A process of its own that prepares some work and does it whenever `run` is called."""

    def __init__(self, prepare, *args):
        context = multiprocessing.get_context(METHOD)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, prepare, args), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self):
        """The next answer of the process. Raises UserError if it has failed."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise UserError("a measured process has died. Is there enough memory?") from None
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def run(self, warm_up=0):
        """(seconds, MB of peak memory so far, above what the preparation needed); after `warm_up` untimed calls."""
        self.pipe.send(warm_up)
        return self.receive()

    def end(self):
        self.process.kill()
        self.process.join()


def serve(pipe, prepare, args):
    """The body of a Worker's process: answer each number of warm-up calls with (seconds, MB), or a text on failure."""
    try:
        work = prepare(*args)
        before = peak_mb()
        pipe.send(None)
        while True:
            for _ in range(pipe.recv()):
                work()
            began = time.perf_counter()
            work()
            pipe.send((time.perf_counter() - began, peak_mb() - before))
    except EOFError:
        pass  # the benchmark has ended
    except UserError as e:
        pipe.send(str(e))
    except Exception as e:
        pipe.send(f"a measured process has failed: {type(e).__name__}: {' '.join(str(e).split())}")


def peak_mb():
    """Peak memory of this process. getrusage would start a child at its parent's peak."""
    with contextlib.suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return utils.peak_memory_mb()


def take_turns(works, rounds, warm_up=1, again=0):
    """Measure {name: (prepare, *args)} in turn: ({name: seconds of each round}, {name: peak MB}).

    `warm_up` untimed calls precede the first round, `again` untimed calls each later one.
    """
    seconds, peaks, workers = {name: [] for name in works}, {}, {}
    try:
        for name, work in works.items():
            workers[name] = Worker(*work)
        for worker in workers.values():
            worker.receive()
        for number in range(rounds):
            for name, worker in workers.items():
                took, peaks[name] = worker.run(again if number else warm_up)
                seconds[name].append(took)
    finally:
        for worker in workers.values():
            worker.end()
    return seconds, peaks


def compare(title, unit, rows, rounds, warm_up=1, again=0, memory=False):
    """Measure {name: Row} and print a table, with ratios to each row whose name starts with `plain`."""
    print(f"\n{title}", flush=True)
    seconds, peaks = take_turns({name: (row.prepare, *row.args) for name, row in rows.items()}, rounds, warm_up, again)
    speeds = {name: [row.units / s for s in seconds[name]] for name, row in rows.items()}
    bases = [name for name in rows if name.startswith("plain")]
    limits = any(row.limit for row in rows.values())
    table = [["", f"{unit}/s", "seconds", *(f"/ {base}" for base in bases)]]
    table[0] += ["of the limit"] * limits + (["peak MB", *(f"MB / {base}" for base in bases)] if memory else [])
    for name, row in rows.items():
        cells = [name, statistics.median(speeds[name]), statistics.median(seconds[name])]
        cells += [ratio(speeds[name], speeds[base]) for base in bases]
        if limits:
            share = statistics.median(a / b for a, b in zip(speeds[name], speeds[row.limit], strict=True))
            cells.append(f"{100 * share:.0f} %")
        if memory and name != row.limit:
            cells += [peaks[name], *(peaks[name] / max(peaks[base], 1) for base in bases)]
        table.append(cells + [""] * (len(table[0]) - len(cells)))
    print_rows(table)


def ratio(values, others):
    """Median of the round-by-round ratios, then the lowest and the highest if they differ, as text."""
    ratios = [a / b for a, b in zip(values, others, strict=True)]
    low, middle, high = (f(ratios) for f in (min, statistics.median, max))
    return f"{middle:.2f}" + (f" ({low:.2f}-{high:.2f})" if f"{low:.2f}" != f"{high:.2f}" else "")


def print_rows(rows):
    """Print rows of cells in columns; the first cell is a name. Numbers get three digits."""
    text = [[c if isinstance(c, str) else f"{c:.3g}" if abs(c) < 100 else f"{c:.0f}" for c in row] for row in rows]
    first, *widths = (max(map(len, column)) for column in zip(*text, strict=True))
    for name, *cells in text:
        print("  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))]).rstrip())
    sys.stdout.flush()


def installed(module, what):
    """Whether a module is installed. If not, print which row is left out."""
    found = importlib.util.find_spec(module) is not None
    if not found:
        print(f"\n(without {what}: {module} is not installed)")
    return found


def run_python(*words, threads=None):
    """Run `python <words>` in the folder of this file. Raises UserError if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=os.path.dirname(os.path.abspath(__file__)),
        env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if line.startswith("error")), lines[-1])
        raise UserError(f"a measured run has failed: {reason.removeprefix('error: ')}")


OUTPUT = "<output>"  # stands for a new folder


def whole_runs(*words):
    """The work of running `python <words>` from start to exit; OUTPUT in the words becomes a new folder."""

    def work():
        with tempfile.TemporaryDirectory() as folder:
            run_python(*(folder if word == OUTPUT else word for word in words))

    return work


def flags_of(**settings):
    """main_dino.py's flags as a list of words."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def half(rounds):
    return max(rounds // 2, 1)


# ---- the baseline ----

OUT_DIM = 65536
CROP_SIZES = [224] * 2 + [96] * 8


class PlainAugmentation:
    """PIL image -> 2 global and 8 local crops, normalized floats, with torchvision's transforms on PIL images."""

    def __init__(self):
        blur = dino_crops.GaussianBlur
        first, second = self.view(224, (0.4, 1.0), blur(1.0)), self.view(224, (0.4, 1.0), blur(0.1), True)
        self.views = [first, second] + [self.view(96, (0.05, 0.4), blur(0.5))] * 8

    @staticmethod
    def view(size, scale, blur, solarize=False):
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                transforms.RandomGrayscale(0.2),
                blur,
                *[dino_crops.Solarization(0.2)] * solarize,
                transforms.ToTensor(),
                transforms.Normalize(utils.IMAGENET_MEAN, utils.IMAGENET_STD),
            ]
        )

    def __call__(self, image):
        image = image.convert("RGB")
        return [view(image) for view in self.views]


def plain_loss(student_logits, teacher_logits, center):
    """Mean cross-entropy over all pairs of two different views; lists of logits [B, K], one per view."""
    terms = []
    for i, teacher in enumerate(teacher_logits):
        target = F.softmax((teacher - center) / 0.04, dim=-1)
        for j, student in enumerate(student_logits):
            if i != j:
                terms.append((-target * F.log_softmax(student / 0.1, dim=-1)).sum(dim=-1).mean())
    return sum(terms) / len(terms)


class PlainTraining:
    """Student, teacher and optimizer without fused kernels: explicit attention, loops over parameters."""

    def __init__(self, arch, patch_size, amp_dtype=None, out_dim=OUT_DIM, drop_path_rate=0.1):
        utils.fix_random_seeds(0)
        self.student, self.teacher = (self.network(arch, patch_size, out_dim, rate) for rate in (drop_path_rate, 0.0))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        groups = utils.get_params_groups(self.student)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, weight_decay=0.04, foreach=False, fused=False)
        self.center, self.amp_dtype = torch.zeros(1, out_dim), amp_dtype

    @staticmethod
    def network(arch, patch_size, out_dim=OUT_DIM, drop_path_rate=0.0):
        backbone, width = dino_backbones.build_backbone(arch, patch_size, drop_path_rate=drop_path_rate)
        return utils.MultiCropWrapper(backbone, DINOHead(width, out_dim))

    def step(self, crops):
        """One step on normalized crops. Returns the loss."""
        with torch.autocast("cpu", dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            teacher, student = self.teacher(crops[:2]), self.student(crops)
            loss = plain_loss(student.chunk(len(crops)), teacher.chunk(2), self.center)
        self.center = 0.9 * self.center + 0.1 * teacher.float().mean(dim=0, keepdim=True)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = 3.0 / (parameter.grad.norm(2) + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(0.996).add_(0.004 * new)
        return loss.item()


def plain_epoch(folder, output_dir, arch, patch_size, batch_size):
    """One epoch of plain steps on plain crops from two loader processes, and a checkpoint."""
    dataset = datasets.ImageFolder(folder, PlainAugmentation())
    training = PlainTraining(arch, int(patch_size))
    for crops, _ in DataLoader(dataset, int(batch_size), shuffle=True, num_workers=2, drop_last=True):
        print(training.step(crops))
    parts = {name: getattr(training, name).state_dict() for name in ("student", "teacher", "optimizer")}
    torch.save(parts, os.path.join(output_dir, "checkpoint.pth"))


def plain_knn(train_features, train_labels, test_features, test_labels, ks, T):
    """{k: top-1 accuracy in percent}, with one search per k, over 100 chunks of the test features."""
    found, classes = {}, int(train_labels.max()) + 1
    for k in ks:
        right = 0
        for chunk, target in zip(test_features.chunk(100), test_labels.chunk(100), strict=True):
            similarity, nearest = (chunk @ train_features.T).topk(k)
            one_hot = torch.zeros(*nearest.shape, classes).scatter_(2, train_labels[nearest][..., None], 1)  # [n, k, C]
            votes = (one_hot * (similarity / T).exp()[..., None]).sum(dim=1)
            right += (votes.argmax(dim=1) == target).sum().item()
        found[k] = 100.0 * right / len(test_labels)
    return found


def plain_propagation(target, sources, labels, mask, topk):
    """Labels [N, C] for the features [N, D] of a frame, from n frames [n, N, D] and [n, N, C], with whole matrices.

    `mask` [N, N] (source, target) is 1 where labels may come from, else 0.
    """
    affinity = (sources @ target.T).div(0.1).exp() * mask  # [n, N, N]
    affinity = affinity.flatten(0, 1)
    affinity = affinity * (affinity >= affinity.topk(topk, dim=0).values[-1])
    return (affinity / affinity.sum(dim=0)).T @ labels.flatten(0, 1)


# ---- limits ----

SIDE = 4096  # of the matrices
PRODUCT = 2 * SIDE**3  # operations


def matrix_product(dtype, side=SIDE):
    dino_backbones.multiply_by_onednn()  # where that is faster
    a, b, c = (torch.randn(side, side).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)


def memory_copy(gigabytes=0.5):
    source = torch.ones(int(gigabytes * 1e9 / 4))
    return functools.partial(torch.empty_like(source).copy_, source)


def precisions():
    """{name: (dtype of mixed precision or None, dtype of matrix products)} that this CPU has in hardware."""
    fp32, bf16 = (None, torch.float32), (torch.bfloat16, torch.bfloat16)
    return {"fp32": fp32, "bf16": bf16} if dino_backbones.cpu_computes_bf16() else {"fp32": fp32}


def limits(args, side=SIDE, gigabytes=0.5):
    """Matrix products, which bound the networks, and memory copies, which bound optimizer and teacher update."""
    print("\nlimits of this machine", flush=True)
    works = {f"GFLOP/s, {name} matrix products": (matrix_product, d, side) for name, (_, d) in precisions().items()}
    works["GB/s copied (read and written)"] = memory_copy, gigabytes
    seconds, _ = take_turns(works, args.rounds)
    amounts = {name: 2 * side**3 / 1e9 if "FLOP" in name else gigabytes for name in works}
    print_rows([[name, amounts[name] / statistics.median(times)] for name, times in seconds.items()])


# ---- crops ----


def photographs(data_path, folder, side=500):
    """Paths of the JPEG files in `data_path`; for `sample`, of installed photographs, saved as JPEG in `folder`."""
    if data_path != "sample":
        paths = [str(p) for p in sorted(Path(data_path).rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
        if not paths:
            raise UserError(f"--data_path {data_path} has no JPEG files. Name a folder that has, or `sample`")
        return paths
    paths = []
    for source in dino_data.find_photographs():
        paths.append(os.path.join(folder, f"{Path(source).stem}.jpg"))
        image = dino_images.load_image(source)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)  # as large as ImageNet's
        image.save(paths[-1], "JPEG", quality=90)
    return paths


def image_folder(root, paths, number):
    """A new folder in `root` with one class folder that has `number` links to the files, repeated as needed."""
    folder = tempfile.mkdtemp(dir=root)
    os.mkdir(os.path.join(folder, "all"))
    for i in range(number):
        os.symlink(os.path.abspath(paths[i % len(paths)]), os.path.join(folder, "all", f"{i:06}.jpg"))
    return folder


def augment_files(kind, paths):
    """The work of making the crops of each file from its bytes, on one thread."""
    torch.set_num_threads(1)
    utils.fix_random_seeds(0)
    augment, files = AUGMENTATIONS[kind](), [Path(path).read_bytes() for path in paths]

    def work():
        for file in files:
            augment(Image.open(io.BytesIO(file), formats=["JPEG"]))

    return work


def our_augmentation(kind):
    return main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8, as_uint8=True, augmentation=kind)


def torchvision_v2():
    """torchvision's v2 transforms, on uint8 tensors."""
    from torchvision.transforms import v2

    def view(size, scale, *effects):
        crop = v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        return v2.Compose([crop, v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2), *effects])

    def blur(p):
        return v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=p)

    first, second = view(224, (0.4, 1.0), blur(1.0)), view(224, (0.4, 1.0), blur(0.1), v2.RandomSolarize(128, 0.2))
    views = [first, second, *[view(96, (0.05, 0.4), blur(0.5))] * 8]
    return lambda image: [view(v2.functional.pil_to_tensor(image.convert("RGB"))) for view in views]


def lightly_transform():
    from lightly.transforms.dino_transform import DINOTransform

    augment = DINOTransform(n_local_views=8)
    return lambda image: augment(image.convert("RGB"))


AUGMENTATIONS = {
    "plain": PlainAugmentation,
    "this, --augmentation pil": functools.partial(our_augmentation, "pil"),
    "this, --augmentation fast": functools.partial(our_augmentation, "fast"),
    "torchvision v2, uint8": torchvision_v2,
    "lightly": lightly_transform,
    "decoding alone": lambda: lambda image: image.convert("RGB"),
}


def crops(args, number=50):
    """From the bytes of JPEG files to crops, and the bytes per image that a loader passes to the trainer."""
    paths = args.photographs[:: max(len(args.photographs) // number, 1)][:number]
    needed = {"this, --augmentation fast": ("cv2", "--augmentation fast"), "lightly": ("lightly", "lightly")}
    kinds = [kind for kind in AUGMENTATIONS if kind not in needed or installed(*needed[kind])]
    rows = {kind: Row(len(paths), "decoding alone", augment_files, (kind, paths)) for kind in kinds}
    compare("crops: JPEG files to 2 crops of 224 and 8 of 96 pixels, on one core", "images", rows, args.rounds)
    image = dino_images.load_image(paths[0])
    sizes = [sum(c.nbytes for c in AUGMENTATIONS[kind]()(image)) for kind in ("plain", "this, --augmentation pil")]
    print("\nbytes per image from loader to trainer")
    print_rows([["", "bytes", "/ plain"], ["plain", str(sizes[0]), 1.0], ["this", str(sizes[1]), sizes[1] / sizes[0]]])


# ---- a training step ----


def random_crops(batch_size, local_crops=8):
    """Crops as a loader returns them: uint8 [B, 3, h, w]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch_size, 3, size, size) for size in CROP_SIZES[: 2 + local_crops]]
    return [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]


def plain_step(arch, patch_size, batch_size, amp_dtype):
    """A plain step. Its crops are normalized already: a plain loader does that."""
    training = PlainTraining(arch, patch_size, amp_dtype)
    return functools.partial(training.step, [utils.normalize(crop) for crop in random_crops(batch_size)])


class OurTraining:
    """main_dino.py's parts and steps on random crops, in epochs of one step."""

    def __init__(self, arch, patch_size, batch_size, amp_dtype, out_dim=OUT_DIM, local_crops=8, drop_path_rate=0.1):
        words = flags_of(arch=arch, patch_size=patch_size, batch_size_per_gpu=batch_size, out_dim=out_dim)
        words += flags_of(local_crops_number=local_crops, drop_path_rate=drop_path_rate, freeze_last_layer=0)
        self.args = dino_cli.OneLineParser(parents=[main_dino.get_args_parser()]).parse_args(words)
        self.args.images_per_step = batch_size
        device, epochs = torch.device("cpu"), self.args.epochs
        utils.fix_random_seeds(0)
        student, teacher = main_dino.build_student_and_teacher(self.args, device, amp_dtype)
        loss = main_dino.DINOLoss(
            out_dim,
            ncrops=2 + local_crops,
            warmup_teacher_temp=0.04,
            teacher_temp=0.04,
            warmup_teacher_temp_epochs=0,
            nepochs=epochs,
        )
        optimizer = utils.build_optimizer("adamw", utils.get_params_groups(student), device)
        self.parts = main_dino.Parts(student, teacher, loss, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        constant = {"lr": 1e-5, "weight_decay": 0.04, "momentum": 0.996}
        self.schedules = {name: [value] * epochs for name, value in constant.items()}
        self.autocast = torch.autocast("cpu", dtype=amp_dtype, enabled=amp_dtype is not None)
        self.loader, self.epochs = (
            [(random_crops(batch_size, local_crops), torch.arange(batch_size))],
            itertools.count(),
        )

    def step(self):
        """One step. Returns the means that main_dino.py logs."""
        run = dino_run.Bare(self.args, len(self.loader))
        with contextlib.redirect_stdout(io.StringIO()):
            return main_dino.train_one_epoch(
                self.parts, self.loader, self.schedules, next(self.epochs), self.args, self.autocast, run
            )


def our_step(*args):
    return OurTraining(*args).step


def lightly_step(arch, patch_size, batch_size, amp_dtype):
    """A step with lightly's loss, head and teacher update and timm's network, as in lightly's example."""
    import timm
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum

    utils.fix_random_seeds(0)
    name = f"{arch}_patch{patch_size}_224"
    networks = []
    for drop_path_rate in (0.1, 0.0):
        backbone = timm.create_model(name, num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path_rate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the head's weight norm
            networks.append(nn.Sequential(backbone, DINOProjectionHead(backbone.num_features, 2048, 256, OUT_DIM)))
    student, teacher = networks
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    criterion, optimizer = DINOLoss(OUT_DIM), torch.optim.AdamW(student.parameters(), lr=1e-5)
    crops = [utils.normalize(crop) for crop in random_crops(batch_size)]

    def work():
        with torch.autocast("cpu", dtype=amp_dtype, enabled=amp_dtype is not None):
            update_momentum(student, teacher, m=0.996)
            taught, seen = [teacher(crop) for crop in crops[:2]], [student(crop) for crop in crops]
        loss = criterion([t.float() for t in taught], [s.float() for s in seen], epoch=0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        loss.item()

    return work


def has_lightly(arch, patch_size):
    """Whether lightly is installed and timm has the network."""
    if not installed("lightly", "lightly"):
        return False
    import timm

    return timm.is_model(f"{arch}_patch{patch_size}_224")


def useful_flop(arch, patch_size, batch_size, out_dim=OUT_DIM):
    """Operations of a step's matrix products and convolutions, counted without computing them.

    In the last block of a ViT only CLS counts, because the loss needs no other token. The plain step computes them all.
    """
    with torch.device("meta"):
        student, teacher = (PlainTraining.network(arch, patch_size, out_dim) for _ in range(2))
        for network in (student, teacher) if dino_backbones.vit_factory(arch) else ():
            network.backbone.set_cls_only(True)
        crops = [torch.empty(batch_size, 3, size, size) for size in CROP_SIZES]
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher(crops[:2])
        student(crops).sum().backward()
    return counter.get_total_flops()


def step(args):
    """Training steps: speed, memory, and speed relative to plain matrix products of the same number of operations."""
    arch, smallest = args.arch or "vit_small", min(args.batch_size_per_gpu)
    for batch_size in args.batch_size_per_gpu:
        shape, rows = (arch, args.patch_size, batch_size), {}
        flop, lightly = useful_flop(*shape), batch_size == smallest and has_lightly(*shape[:2])
        for name, (amp_dtype, dtype) in precisions().items():
            limit = f"{name} matrix products"
            rows[f"plain {name}"] = Row(batch_size, limit, plain_step, (*shape, amp_dtype))
            rows[f"this {name}"] = Row(batch_size, limit, our_step, (*shape, amp_dtype))
            if lightly:
                rows[f"lightly {name}"] = Row(batch_size, limit, lightly_step, (*shape, amp_dtype))
            rows[limit] = Row(PRODUCT / flop * batch_size, limit, matrix_product, (dtype,))
        title = f"step: {arch}/{args.patch_size}, {batch_size} images, K = {OUT_DIM}, {flop / 1e9:.0f} GFLOP"
        rounds = args.rounds if batch_size == smallest else half(args.rounds)
        # Memory settles after three steps. A step after a pause is slower than the steps of a run, so one is untimed.
        compare(title, "images", rows, rounds, warm_up=3, again=1, memory=True)


def epoch(args, number=100):
    """One epoch as a whole process, from start to exit: main_dino.py and the baseline."""
    arch, batch_size = args.arch or "vit_small", args.batch_size_per_gpu[-1]
    with tempfile.TemporaryDirectory() as root:
        images = image_folder(root, args.photographs, number)
        plain = ("-c", "import sys, benchmark; benchmark.plain_epoch(*sys.argv[1:])", images, OUTPUT, arch)
        kind = "fast" if installed("cv2", "--augmentation fast") else "pil"
        ours = flags_of(data_path=images, output_dir=OUTPUT, augmentation=kind, epochs=1, warmup_epochs=0)
        ours += flags_of(arch=arch, patch_size=args.patch_size, batch_size_per_gpu=batch_size)
        ours += flags_of(num_workers=2, device="cpu")
        used = number // batch_size * batch_size
        rows = {
            "plain": Row(used, None, whole_runs, (*plain, args.patch_size, batch_size)),
            f"this, --augmentation {kind}": Row(used, None, whole_runs, ("main_dino.py", *ours)),
        }
        title = f"epoch: {arch}/{args.patch_size}, {number} images in batches of {batch_size}, from start to exit"
        compare(title, "images", rows, half(args.rounds), warm_up=0)


# ---- evaluations ----


def solve(function, task, *shape):
    """The work of calling a function with the arguments that `task(*shape)` returns."""
    if function.__module__ != __name__:
        dino_backbones.tune_cpu()  # as in the evaluations
    return functools.partial(function, *task(*shape))


def knn_task(train, test, width, classes, ks):
    """Arguments of both classifiers: normalized features around one random point per class, and labels."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(classes, width, generator=generator)
    task = []
    for number in (train, test):
        labels = torch.randint(classes, (number,), generator=generator)
        features = points[labels] + 3 * torch.randn(number, width, generator=generator)
        task += [F.normalize(features, dim=1), labels]
    return *task, ks, 0.07


def knn(args, train=50_000, test=10_000, width=384, classes=1000, ks=(10, 20, 100, 200)):
    """k-NN classification, given the features."""
    shape, limit = (knn_task, train, test, width, classes, list(ks)), "matrix products"
    rows = {
        "plain": Row(test, limit, solve, (plain_knn, *shape)),
        "this": Row(test, limit, solve, (dino_features.knn_accuracies, *shape)),
        limit: Row(PRODUCT / (2 * train * width), limit, matrix_product, (torch.float32,)),
    }
    title = f"knn: {test} images among {train}, {width} features, {classes} classes, k = {', '.join(map(str, ks))}"
    compare(title, "images", rows, half(args.rounds), warm_up=0, memory=True)


def propagation_task(h, w, width, frames, window, topk):
    """Arguments of our propagation: features of a frame and of earlier frames, their labels, window, top k."""
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(frames + 1, h, w, width, generator=generator), dim=-1)
    return features[0], features[1:], torch.rand(frames, h, w, 4, generator=generator), window, topk


def plain_propagation_task(h, w, width, frames, window, topk):
    """The same for the plain propagation: patches flattened, the window as a mask."""
    *tensors, window, topk = propagation_task(h, w, width, frames, window, topk)
    mask = eval_video_segmentation.restrict_neighborhood(h, w, window).float()
    return *(tensor.flatten(-3, -2) for tensor in tensors), mask, topk


def propagation(args, h=60, w=107, width=384, frames=8, window=12, topk=5):
    """Label propagation, given the features. The limit is the product of each patch with those in its window."""
    near = eval_video_segmentation.restrict_neighborhood(h, w, window).sum().item()
    shape, limit, ours = (h, w, width, frames, window, topk), "matrix products", eval_video_segmentation.propagate
    rows = {
        "plain": Row(1, limit, solve, (plain_propagation, plain_propagation_task, *shape)),
        "this": Row(1, limit, solve, (ours, propagation_task, *shape)),
        limit: Row(PRODUCT / (2 * near * frames * width), limit, matrix_product, (torch.float32,)),
    }
    title = f"propagation: {h} x {w} patches, {width} features, {frames} earlier frames, window {window}, top {topk}"
    compare(title, "frames", rows, half(args.rounds), memory=True)


# ---- scaling ----


def images_per_second(processes, images, arch, batch_size, args):
    """Speed of main_dino.py in its second epoch: the first one warms up. Raises UserError."""
    with tempfile.TemporaryDirectory() as output:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        words = flags_of(arch=arch, patch_size=args.patch_size, batch_size_per_gpu=batch_size, out_dim=4096)
        words += flags_of(data_path=images, output_dir=output, epochs=2, warmup_epochs=0, saveckp_freq=0)
        words += flags_of(num_workers=0, device="cpu", use_fp16=False)
        run_python(*launcher[: 5 * (processes > 1)], "main_dino.py", *words, threads=args.threads)
        *_, last = Path(output, "log.txt").read_text().splitlines()
        return json.loads(last)["train_images_per_s"]


def scaling(args, steps=4):
    """Training with more processes. They load their own images, so no loader process hides any work."""
    batch_size, rates = args.batch_size_per_gpu[0], {number: [] for number in dict.fromkeys(args.processes)}
    arch = args.arch or "vit_tiny"
    print(f"\nscaling: {arch}, {batch_size} images and {args.threads} threads per process", flush=True)
    with tempfile.TemporaryDirectory() as root:
        folders = {n: image_folder(root, args.photographs, steps * n * batch_size) for n in rates}
        for _ in range(args.rounds):
            for number in rates:
                rates[number].append(images_per_second(number, folders[number], arch, batch_size, args))
    base = args.processes[0]
    rows = [["processes", "images/s", f"/ {base}", "efficiency"]]
    for number, found in rates.items():
        gain = statistics.median(a / b for a, b in zip(found, rates[base], strict=True))
        row = [statistics.median(found), ratio(found, rates[base]), f"{100 * gain * base / number:.0f} %"]
        rows.append([str(number), *row])
    print_rows(rows)


TABLES = {
    **{"limits": limits, "crops": crops, "step": step, "epoch": epoch, "knn": knn, "propagation": propagation},
    "scaling": scaling,
}


def main(args):
    """Print the tables that `args` name (see get_args_parser). Raises UserError."""
    check_args(args)
    here = os.path.dirname(os.path.abspath(__file__))  # the fork server does not know sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        args.photographs = photographs(args.data_path, folder)
        for name in args.what or TABLES:
            TABLES[name](args)


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
