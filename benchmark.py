"""How fast this is on this machine: against DINO written out plainly, against others, and against the machine's limits.

    python benchmark.py                              # every table: some ten minutes on two cores
    python benchmark.py crops step --data_path imagenet/train
    python benchmark.py scaling --processes 1 2 4 --threads 4 --arch vit_small --batch_size_per_gpu 16

All that one table compares does its work in turn, each in a process of its own, so that whatever else the machine does
falls on all of them. A ratio, such as `/ plain`, says how many times as fast it is: the median of the ratios of
neighbors, behind it the lowest and the highest. The baseline is the algorithm in its plainest form, and stands below.
Everything runs on the CPU; nothing is written but temporary files.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
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
from PIL import EpsImagePlugin, Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

import dino_backbones
import dino_cli
import dino_crops
import dino_data
import dino_images
import eval_knn
import eval_video_segmentation
import main_dino
import utils
from dino_cli import at_least, between
from utils import UserError
from vision_transformer import DINOHead

EpsImagePlugin.gs_binary = False  # the plain loader opens what Pillow does; no photograph is to start a program

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("Benchmark", add_help=False)
    # fmt: off
    parser.add_argument("what", nargs="*", metavar="TABLE",
        help=f"What to measure, of {', '.join(TABLES)}; without one, all of it.")
    parser.add_argument("--data_path", default="sample", metavar="DIR", help="""Folder of photographs (JPEG, also in
        sub-folders) for `crops`, `epoch` and `scaling`; `sample` takes some that are installed already.""")
    parser.add_argument("--arch", default=None, metavar="NAME",
        help="Network; without one, vit_small for `step` and `epoch`, vit_tiny for `scaling` and `growth`.")
    parser.add_argument("--patch_size", default=16, type=at_least(1), metavar="PIXELS", help="Side of a ViT's patches.")
    parser.add_argument("--batch_size_per_gpu", default=[4, 16], type=at_least(1), nargs="+", metavar="B",
        help="Images a step. `step` is measured for each, `scaling` takes the first, `epoch` the last.")
    parser.add_argument("--rounds", default=2, type=between(1, 99), metavar="N",
        help="How often everything is run, in turn; what takes long, half as often.")
    parser.add_argument("--processes", default=[1, 2], type=at_least(1), nargs="+", metavar="N",
        help="For `scaling`: numbers of processes; the first is what the others are held against.")
    parser.add_argument("--threads", default=1, type=at_least(1), metavar="N",
        help="For `scaling`: threads of each process.")
    # fmt: on
    return parser


def check_args(args):
    for name in args.what:
        if name not in TABLES:
            near = utils.did_you_mean(name, TABLES) or "."
            raise UserError(f"there is no table {name!r}{near} All there are: {', '.join(TABLES)}")
    if args.arch is not None:
        dino_backbones.check_arch(args.arch)


# ---- taking turns ----


class Piece(NamedTuple):
    """A piece of work that is measured: `prepare(*args)` gives a function of no arguments, and that does it.

    It does `units` of what a table counts, and its `limit`, another piece's name, shows what is possible at all.
    """

    units: float
    limit: str | None
    prepare: Callable
    args: tuple = ()


class Contender:
    """A process with memory, threads and settings of its own that does its work each time it is asked to."""

    def __init__(self, prepare, *args):
        forks = multiprocessing.get_context(METHOD)
        self.pipe, theirs = forks.Pipe()
        self.process = forks.Process(target=contend, args=(theirs, prepare, args), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self):
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise UserError("a process that was to be measured has died. Is there enough memory?") from None
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def run(self, warm_up=0):
        """(seconds of a piece of work, MB of memory at the peak so far above what there was before the first).

        Some that do not count come before.
        """
        self.pipe.send(warm_up)
        return self.receive()

    def end(self):
        self.process.kill()
        self.process.join()


def contend(pipe, prepare, args):
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
        pipe.send(f"what was to be measured failed: {type(e).__name__}: {' '.join(str(e).split())}")


def peak_mb():
    """Highest main memory of this process; what the system keeps for its children begins with their parent's."""
    with contextlib.suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return utils.peak_memory_mb()


def take_turns(contenders, rounds, warm_up=1, again=0):
    """Seconds of each round and MB at the peak, each by name, of {name: (prepare, *args)}.

    `warm_up` pieces of work come before the first that counts, `again` before each later one.
    """
    seconds, peaks, running = {name: [] for name in contenders}, {}, {}
    try:
        for name, contender in contenders.items():
            running[name] = Contender(*contender)
        for contender in running.values():
            contender.receive()
        for number in range(rounds):
            for name, contender in running.items():
                took, peaks[name] = contender.run(again if number else warm_up)
                seconds[name].append(took)
    finally:
        for contender in running.values():
            contender.end()
    return seconds, peaks


def compare(title, unit, pieces, rounds, warm_up=1, again=0, memory=False):
    """Run {name: Piece} in turn and print a table; what is called plain is what the others are held against."""
    print(f"\n{title}", flush=True)
    contenders = {name: (piece.prepare, *piece.args) for name, piece in pieces.items()}
    seconds, peaks = take_turns(contenders, rounds, warm_up, again)
    speeds = {name: [piece.units / s for s in seconds[name]] for name, piece in pieces.items()}
    bases = [name for name in pieces if name.startswith(BASE)]
    limits = any(piece.limit for piece in pieces.values())
    rows = [["", f"{unit}/s", "seconds", *(f"/ {base}" for base in bases)]]
    rows[0] += ["of the limit"] * limits + (["peak MB", *(f"MB / {base}" for base in bases)] if memory else [])
    for name, piece in pieces.items():
        row = [name, statistics.median(speeds[name]), statistics.median(seconds[name])]
        row += [ratio(speeds[name], speeds[base]) for base in bases]
        if limits:
            share = statistics.median(a / b for a, b in zip(speeds[name], speeds[piece.limit], strict=True))
            row.append(f"{100 * share:.0f} %")
        if memory:
            of_bases = [peaks[name], *(peaks[name] / max(peaks[base], 1) for base in bases)]
            row += [""] * len(of_bases) if name == piece.limit else of_bases
        rows.append(row)
    print_rows(rows)


def ratio(values, others):
    """The median of the ratios of neighbors and, if they differ, the lowest and the highest, as text."""
    ratios = [a / b for a, b in zip(values, others, strict=True)]
    low, middle, high = (f(ratios) for f in (min, statistics.median, max))
    return f"{middle:.2f}" + (f" ({low:.2f}-{high:.2f})" if f"{low:.2f}" != f"{high:.2f}" else "")


def print_rows(rows):
    """Rows of cells, the first of which are names; numbers get the three digits that count."""
    text = [[c if isinstance(c, str) else f"{c:.3g}" if abs(c) < 100 else f"{c:.0f}" for c in row] for row in rows]
    first, *widths = (max(map(len, column)) for column in zip(*text, strict=True))
    for name, *cells in text:
        print("  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))]).rstrip())
    sys.stdout.flush()


def installed(module, what):
    """Whether it is; if not, say so: a table then has a row less."""
    found = importlib.util.find_spec(module) is not None
    if not found:
        print(f"\n(without {what}: {module} is not installed)")
    return found


def run_python(*words, threads=None):
    """What a process of Python prints, started beside this file. Raises UserError if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=os.path.dirname(os.path.abspath(__file__)),
        env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        reason = next((line for line in lines if line.startswith("error")), lines[-1])
        raise UserError(f"a run to be measured failed: {reason.removeprefix('error: ')}")
    return done.stdout


def whole_runs(*words):
    """A process of Python from its start to its end, with a new folder wherever OUTPUT stands among its words."""

    def work():
        with tempfile.TemporaryDirectory() as folder:
            run_python(*(folder if word == OUTPUT else word for word in words))

    return work


# Where there is one, of a server that has imported this file and done nothing: new processes take seconds for that.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
BASE, OUTPUT, OUT_DIM, EPOCHS = "plain", "<output>", 65536, 100
CROP_SIZES = [224] * 2 + [96] * 8

# ---- the baseline: the algorithm in its plainest form ----


class PlainAugmentation:
    """PIL image -> two global and eight local crops as normalized floats, by torchvision's transforms on PIL images."""

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
        return [view(image) for view in self.views]


def plain_loss(student_logits, teacher_logits, center):
    """Mean cross-entropy over all pairs of two different views; lists of logits [B, K], a view an item."""
    terms = []
    for i, taught in enumerate(teacher_logits):
        target = F.softmax((taught - center) / 0.04, dim=-1)
        for j, seen in enumerate(student_logits):
            if i != j:
                terms.append((-target * F.log_softmax(seen / 0.1, dim=-1)).sum(dim=-1).mean())
    return sum(terms) / len(terms)


class PlainTraining:
    """Student, teacher and a step that trains them, with attention written out and a loop for whatever can be one."""

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
        """One step on normalized crops; returns the loss."""
        with torch.autocast("cpu", dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            taught, seen = self.teacher(crops[:2]), self.student(crops)
            loss = plain_loss(seen.chunk(len(crops)), taught.chunk(2), self.center)
        self.center = 0.9 * self.center + 0.1 * taught.float().mean(dim=0, keepdim=True)
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
    """An epoch of plain steps on plain crops, that two processes make, and a checkpoint at its end."""
    dataset = datasets.ImageFolder(folder, PlainAugmentation())
    training = PlainTraining(arch, int(patch_size))
    for crops, _ in DataLoader(dataset, int(batch_size), shuffle=True, num_workers=2, drop_last=True):
        print(training.step(crops))
    parts = {name: getattr(training, name).state_dict() for name in ("student", "teacher", "optimizer")}
    torch.save(parts, os.path.join(output_dir, "checkpoint.pth"))


def plain_knn(train_features, train_labels, test_features, test_labels, ks, T):
    """{k: top-1 in per cent}: for each k a search of its own, a hundredth of the images at a time."""
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
    """Labels [N, C] of a frame's features [N, D] from those of n others, [n, N, D] and [n, N, C], by whole matrices.

    `mask` [N, N], [source, target], is 1 where labels may come from and 0 elsewhere.
    """
    affinity = (sources @ target.T).div(0.1).exp() * mask  # [n, N, N]
    affinity = affinity.flatten(0, 1)
    affinity = affinity * (affinity >= affinity.topk(topk, dim=0).values[-1])
    return (affinity / affinity.sum(dim=0)).T @ labels.flatten(0, 1)


# ---- limits of the machine ----

SIDE = 4096  # of the matrices
PRODUCT = 2 * SIDE**3  # operations


def matrix_product(dtype, side=SIDE):
    utils.multiply_by_onednn()  # where that is faster
    a, b, c = (torch.randn(side, side).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)


def memory_copy(gigabytes=0.5):
    source = torch.ones(int(gigabytes * 1e9 / 4))
    return functools.partial(torch.empty_like(source).copy_, source)


def precisions():
    """{name: (dtype of mixed precision or None, dtype of matrix products)} that this CPU has in hardware."""
    fp32, bf16 = (None, torch.float32), (torch.bfloat16, torch.bfloat16)
    return {"fp32": fp32, "bf16": bf16} if utils.cpu_computes_bf16() else {"fp32": fp32}


def limits(args, side=SIDE, gigabytes=0.5):
    """Matrix products, which the networks are made of, and memory, which optimizer and teacher wait for."""
    print("\nlimits of this machine", flush=True)
    contenders = {
        f"GFLOP/s, {name} matrix products": (matrix_product, d, side) for name, (_, d) in precisions().items()
    }
    contenders["GB/s copied (read, and written)"] = memory_copy, gigabytes
    seconds, _ = take_turns(contenders, args.rounds)
    rows = []
    for name, times in seconds.items():
        amount = 2 * side**3 / 1e9 if "FLOP" in name else gigabytes
        rows.append([name, amount / statistics.median(times)])
    print_rows(rows)


# ---- crops ----


def photographs(data_path, folder, side=500):
    """Paths of the JPEG files below `data_path`; for `sample`, of installed photographs, made into some in `folder`."""
    if data_path != "sample":
        paths = [str(p) for p in sorted(Path(data_path).rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
        if not paths:
            raise UserError(f"--data_path {data_path} has no JPEG files in it. Name one that has, or `sample`")
        return paths
    paths = []
    for source in dino_data.find_photographs():
        paths.append(os.path.join(folder, f"{Path(source).stem}.jpg"))
        image = dino_images.load_image(source)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)  # as large as ImageNet's
        image.save(paths[-1], "JPEG", quality=90)
    return paths


def image_folder(root, paths, number):
    """A new folder of class folders below `root`, with so many links to the files, over and over again."""
    folder = tempfile.mkdtemp(dir=root)
    os.mkdir(os.path.join(folder, "all"))
    for i in range(number):
        os.symlink(os.path.abspath(paths[i % len(paths)]), os.path.join(folder, "all", f"{i:06}.jpg"))
    return folder


def one_by_one(kind, paths):
    """Make the crops of each file, from its bytes, with one thread."""
    torch.set_num_threads(1)
    utils.fix_random_seeds(0)
    augment, files = AUGMENTATIONS[kind](), [Path(path).read_bytes() for path in paths]

    def work():
        for file in files:
            augment(Image.open(io.BytesIO(file)))

    return work


def our_augmentation(kind):
    return main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8, as_uint8=True, augmentation=kind)


def torchvision_v2():
    """torchvision's newer transforms, on uint8 tensors."""
    from torchvision.transforms import v2

    def view(size, scale, *effects):
        cut = v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        return v2.Compose([cut, v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2), *effects])

    def blur(p):
        return v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=p)

    first, second = view(224, (0.4, 1.0), blur(1.0)), view(224, (0.4, 1.0), blur(0.1), v2.RandomSolarize(128, 0.2))
    views = [first, second, *[view(96, (0.05, 0.4), blur(0.5))] * 8]
    return lambda image: [view(v2.functional.pil_to_tensor(image.convert("RGB"))) for view in views]


def lightly_transform():
    from lightly.transforms.dino_transform import DINOTransform

    augment = DINOTransform(n_local_views=8)
    return lambda image: augment(image.convert("RGB"))


def plain_transform():
    augment = PlainAugmentation()
    return lambda image: augment(image.convert("RGB"))


AUGMENTATIONS = {
    "plain": plain_transform,
    "this, --augmentation pil": functools.partial(our_augmentation, "pil"),
    "this, --augmentation fast": functools.partial(our_augmentation, "fast"),
    "torchvision v2, uint8": torchvision_v2,
    "lightly": lightly_transform,
    "decoding alone": lambda: lambda image: image.convert("RGB"),
}


def crops(args, number=50):
    """From the bytes of JPEG files to crops, and what of them goes from a loader to the trainer."""
    paths = args.photographs[:: max(len(args.photographs) // number, 1)][:number]
    needed = {"this, --augmentation fast": ("cv2", "--augmentation fast"), "lightly": ("lightly", "lightly")}
    kinds = [kind for kind in AUGMENTATIONS if kind not in needed or installed(*needed[kind])]
    pieces = {kind: Piece(len(paths), "decoding alone", one_by_one, (kind, paths)) for kind in kinds}
    compare("crops: JPEG files to 2 crops of 224 and 8 of 96 pixels, on one core", "images", pieces, args.rounds)
    image = dino_images.load_image(paths[0])
    sizes = [sum(c.nbytes for c in AUGMENTATIONS[kind]()(image)) for kind in ("plain", "this, --augmentation pil")]
    print("\nbytes of an image's crops")
    print_rows([["", "bytes", "/ plain"], ["plain", str(sizes[0]), 1.0], ["this", str(sizes[1]), sizes[1] / sizes[0]]])


# ---- a training step ----


def some_crops(batch_size, local_crops=8):
    """Crops as a loader gives them, uint8 [B, 3, h, w]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch_size, 3, size, size) for size in CROP_SIZES[: 2 + local_crops]]
    return [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]


def plain_step(arch, patch_size, batch_size, amp_dtype):
    """A step on crops that are normalized already: a plain loader does that."""
    training = PlainTraining(arch, patch_size, amp_dtype)
    return functools.partial(training.step, [utils.normalize(crop) for crop in some_crops(batch_size)])


class OurTraining:
    """What main_dino.py sets up and does, on crops that are there already, in epochs of one step."""

    def __init__(self, arch, patch_size, batch_size, amp_dtype, out_dim=OUT_DIM, local_crops=8, drop_path_rate=0.1):
        flags = {"arch": arch, "patch_size": patch_size, "batch_size_per_gpu": batch_size, "out_dim": out_dim}
        flags |= {"local_crops_number": local_crops, "freeze_last_layer": 0, "drop_path_rate": drop_path_rate}
        words = [f"--{name}={value}" for name, value in flags.items()]
        self.args = dino_cli.OneLineParser(parents=[main_dino.get_args_parser()]).parse_args(words)
        device = utils.pick_device("cpu")
        utils.fix_random_seeds(0)
        self.student, self.teacher = main_dino.build_student_and_teacher(self.args, device, amp_dtype)
        self.loss = main_dino.DINOLoss(out_dim, 2 + local_crops, 0.04, 0.04, 0, EPOCHS)
        self.optimizer = utils.build_optimizer("adamw", utils.get_params_groups(self.student), device)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        constant = {"lr": 1e-5, "weight_decay": 0.04, "momentum": 0.996}
        self.schedules = {name: [value] * EPOCHS for name, value in constant.items()}
        self.batch = some_crops(batch_size, local_crops), torch.arange(batch_size)
        self.amp_dtype, self.epochs = amp_dtype, itertools.count()

    def step(self):
        with contextlib.redirect_stdout(io.StringIO()):
            return main_dino.train_one_epoch(
                self.student, self.teacher, self.loss, [self.batch], self.optimizer, self.schedules,
                next(self.epochs), self.scaler, self.args, self.amp_dtype,
            )  # fmt: skip


def our_step(*args):
    return OurTraining(*args).step


def lightly_step(arch, patch_size, batch_size, amp_dtype):
    """lightly's loss, head and update of the teacher around timm's network, as in its example."""
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
            warnings.simplefilter("ignore")  # torch calls the head's weight norm old
            networks.append(nn.Sequential(backbone, DINOProjectionHead(backbone.num_features, 2048, 256, OUT_DIM)))
    student, teacher = networks
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    criterion, optimizer = DINOLoss(OUT_DIM), torch.optim.AdamW(student.parameters(), lr=1e-5)
    crops = [utils.normalize(crop) for crop in some_crops(batch_size)]

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


def useful_flop(arch, patch_size, batch_size, out_dim=OUT_DIM):
    """Operations of a step's matrix products and convolutions, counted on tensors without data.

    Of a ViT's last block CLS's alone, since nothing comes of the others: the plain step does them none the less.
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


def half(rounds):
    return max(rounds // 2, 1)


def step(args):
    """Whole training steps, their memory, and what they reach of the rate of plain matrix products."""
    arch, smallest = args.arch or "vit_small", min(args.batch_size_per_gpu)
    for batch_size in args.batch_size_per_gpu:
        shape, pieces = (arch, args.patch_size, batch_size), {}
        flop = useful_flop(*shape)
        for name, (amp_dtype, dtype) in precisions().items():
            limit = f"{name} matrix products"
            pieces[f"plain {name}"] = Piece(batch_size, limit, plain_step, (*shape, amp_dtype))
            pieces[f"this {name}"] = Piece(batch_size, limit, our_step, (*shape, amp_dtype))
            if batch_size == smallest and has_lightly(*shape[:2]):
                pieces[f"lightly {name}"] = Piece(batch_size, limit, lightly_step, (*shape, amp_dtype))
            pieces[limit] = Piece(PRODUCT / flop * batch_size, limit, matrix_product, (dtype,))
        title = f"step: {arch}/{args.patch_size}, {batch_size} images, K = {OUT_DIM}, {flop / 1e9:.0f} GFLOP"
        rounds = args.rounds if batch_size == smallest else half(args.rounds)
        # Memory takes three steps to settle, and a step after a wait is slower than those of a run, which never waits.
        compare(title, "images", pieces, rounds, warm_up=3, again=1, memory=True)


def has_lightly(arch, patch_size):
    if not installed("lightly", "lightly"):
        return False
    import timm

    return timm.is_model(f"{arch}_patch{patch_size}_224")


def epoch(args, number=100):
    """main_dino.py as it is started, and a process that does the same plainly: from their start to their end."""
    arch, batch_size = args.arch or "vit_small", args.batch_size_per_gpu[-1]
    with tempfile.TemporaryDirectory() as root:
        images = image_folder(root, args.photographs, number)
        plain = ("-c", "import sys, benchmark; benchmark.plain_epoch(*sys.argv[1:])", images, OUTPUT, arch)
        kind = "fast" if installed("cv2", "--augmentation fast") else "pil"
        flags = {"augmentation": kind, "data_path": images, "output_dir": OUTPUT, "epochs": 1, "warmup_epochs": 0}
        flags |= {"num_workers": 2, "device": "cpu"}
        flags |= {"arch": arch, "patch_size": args.patch_size, "batch_size_per_gpu": batch_size}
        ours = [word for name, value in flags.items() for word in (f"--{name}", value)]
        used = number // batch_size * batch_size
        pieces = {
            "plain": Piece(used, None, whole_runs, (*plain, args.patch_size, batch_size)),
            f"this, --augmentation {kind}": Piece(used, None, whole_runs, ("main_dino.py", *ours)),
        }
        title = f"epoch: {arch}/{args.patch_size}, {number} images in batches of {batch_size}, from start to exit"
        compare(title, "images", pieces, half(args.rounds), warm_up=0)


# ---- evaluations ----


def solve(work, task, *shape):
    """`work` on what `task(*shape)` gives; ours with the settings that its script makes."""
    if work.__module__ != __name__:
        utils.pick_device("cpu")
    return functools.partial(work, *task(*shape))


def knn_task(train, test, width, classes, ks):
    """Features around a point of their own for each class, and labels, as both classifiers take them."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(classes, width, generator=generator)
    task = []
    for number in (train, test):
        labels = torch.randint(classes, (number,), generator=generator)
        features = points[labels] + 3 * torch.randn(number, width, generator=generator)
        task += [F.normalize(features, dim=1), labels]
    return *task, ks, 0.07


def knn(args, train=50_000, test=10_000, width=384, classes=1000, ks=(10, 20, 100, 200)):
    shape, limit = (knn_task, train, test, width, classes, list(ks)), "matrix products"
    pieces = {
        "plain": Piece(test, limit, solve, (plain_knn, *shape)),
        "this": Piece(test, limit, solve, (eval_knn.knn_accuracies, *shape)),
        limit: Piece(PRODUCT / (2 * train * width), limit, matrix_product, (torch.float32,)),
    }
    title = f"knn: {test} images among {train}, {width} features, {classes} classes, k = {', '.join(map(str, ks))}"
    compare(title, "images", pieces, half(args.rounds), warm_up=0, memory=True)


def propagation_task(h, w, width, frames, window, topk):
    """Features of a frame and of others, those's labels, window, top k: as our function takes them."""
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(frames + 1, h, w, width, generator=generator), dim=-1)
    return features[0], features[1:], torch.rand(frames, h, w, 4, generator=generator), window, topk


def plain_propagation_task(h, w, width, frames, window, topk):
    """The same as whole matrices, the window as a mask."""
    *tensors, window, topk = propagation_task(h, w, width, frames, window, topk)
    mask = eval_video_segmentation.restrict_neighborhood(h, w, window).float()
    return *(tensor.flatten(-3, -2) for tensor in tensors), mask, topk


def propagation(args, h=60, w=107, width=384, frames=8, window=12, topk=5):
    """Behind the features; the limit is the product of each patch with what lies in its window and nothing else."""
    near = eval_video_segmentation.restrict_neighborhood(h, w, window).sum().item()
    shape, limit, ours = (h, w, width, frames, window, topk), "matrix products", eval_video_segmentation.propagate
    pieces = {
        "plain": Piece(1, limit, solve, (plain_propagation, plain_propagation_task, *shape)),
        "this": Piece(1, limit, solve, (ours, propagation_task, *shape)),
        limit: Piece(PRODUCT / (2 * near * frames * width), limit, matrix_product, (torch.float32,)),
    }
    title = f"propagation: {h} x {w} patches, {width} features, {frames} frames before, window {window}, top {topk}"
    compare(title, "frames", pieces, half(args.rounds), memory=True)


# ---- scaling ----


def images_a_second(processes, images, arch, batch_size, args):
    """Of a run of main_dino.py on `images`, without its first step, which also warms up. Raises UserError."""
    with tempfile.TemporaryDirectory() as output:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        flags = {
            **{"arch": arch, "patch_size": args.patch_size, "batch_size_per_gpu": batch_size},
            **{"data_path": images, "output_dir": output, "epochs": 1, "warmup_epochs": 0, "out_dim": 4096},
            **{"num_workers": 0, "device": "cpu", "use_fp16": False, "saveckp_freq": 0},
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        said = run_python(*launcher[: 5 * (processes > 1)], "main_dino.py", *words, threads=args.threads)
        # Of each line of progress the mean seconds a step over the last 20, and how far the run was.
        times = re.findall(r"\]  \[ *(\d+)/\d+\].* time: ([\d.]+)", said)
        if len(times) < 2:
            raise UserError(f"a run with {processes} processes says nothing of its progress")
        first, (last, mean) = float(times[0][1]), times[-1]
        return processes * batch_size * int(last) / (float(mean) * (int(last) + 1) - first)


def scaling(args, steps=8):
    """Training with more processes: crops are made in the training processes, so nothing is hidden by loaders."""
    batch_size, rates = args.batch_size_per_gpu[0], {number: [] for number in dict.fromkeys(args.processes)}
    arch = args.arch or "vit_tiny"
    print(f"\nscaling: {arch}, {batch_size} images and {args.threads} threads a process", flush=True)
    with tempfile.TemporaryDirectory() as root:
        folders = {n: image_folder(root, args.photographs, steps * n * batch_size) for n in rates}
        for _ in range(args.rounds):
            for number in rates:
                rates[number].append(images_a_second(number, folders[number], arch, batch_size, args))
    base = args.processes[0]
    rows = [["processes", "images/s", f"/ {base}", "efficiency"]]
    for number, found in rates.items():
        gain = statistics.median(a / b for a, b in zip(found, rates[base], strict=True))
        row = [statistics.median(found), ratio(found, rates[base]), f"{100 * gain * base / number:.0f} %"]
        rows.append([str(number), *row])
    print_rows(rows)


# ---- growth ----

# What is varied, its lowest, middle and highest value. All others are at their middle ones.
SWEEPS = {"images": (2, 4, 6), "crops": (4, 7, 10), "K": (8192, 36864, 65536)}


def growth(args, files=1_280_000):
    """What a step takes against what there is more of; 1 is a straight line. And the index of as many images."""
    arch = args.arch or "vit_tiny"
    print(f"\ngrowth: steps of {arch}/{args.patch_size}; the middle against the mean of the ends", flush=True)
    middles = {name: values[1] for name, values in SWEEPS.items()}
    settings = {(n, value): tuple({**middles, n: value}.values()) for n, values in SWEEPS.items() for value in values}
    contenders = {}
    for images, crops, out_dim in settings.values():  # all middles are one
        contenders[images, crops, out_dim] = (our_step, arch, args.patch_size, images, None, out_dim, crops - 2)
    seconds, peaks = take_turns(contenders, args.rounds)
    rows = [["", "", "seconds", "middle", "peak MB", "middle"]]
    for name, values in SWEEPS.items():
        low, middle, high = (seconds[settings[name, value]] for value in values)
        memory = [peaks[settings[name, value]] for value in values]
        rows.append([
            name, " ".join(map(str, values)), " ".join(f"{statistics.median(s):.3g}" for s in (low, middle, high)),
            ratio(middle, [(a + b) / 2 for a, b in zip(low, high, strict=True)]),
            " ".join(f"{mb:.0f}" for mb in memory), f"{2 * memory[1] / (memory[0] + memory[2]):.2f}",
        ])  # fmt: skip
    print_rows(rows)
    print(f"\nindex of {files} images in 1000 folders (links to empty files, made for this)", flush=True)
    with tempfile.TemporaryDirectory() as root:
        empty_files(root, files)
        seconds, peaks = take_turns({"index": (index_of, root)}, 1, warm_up=0)
    print_rows([["seconds", seconds["index"][0]], ["MB", peaks["index"]]])


def empty_files(root, number, folders=1000):
    for folder in range(folders):
        path = os.path.join(root, f"n{folder:08}")
        os.mkdir(path)
        first, *others = (os.path.join(path, f"n{folder:08}_{i}.JPEG") for i in range(folder, number, folders))
        open(first, "w").close()
        for name in others:
            try:
                os.link(first, name)  # four times as fast as a file of its own, and as good for a list of names
            except OSError:  # there are file systems with few links, and with none
                open(name, "w").close()


def index_of(root):
    kept = []
    return lambda: kept.append(dino_data.MultiCropDataset(dino_data.find_images(root), None, 0))


# ---- startup ----


def startup(args):
    imported = {"plain: import torch, torchvision": ("-c", "import torch, torchvision")}
    ours = {"import main_dino": ("-c", "import main_dino"), "main_dino.py --help": ("main_dino.py", "--help")}
    pieces = {name: Piece(1, None, whole_runs, words) for name, words in (imported | ours).items()}
    compare("startup", "starts", pieces, args.rounds, warm_up=0)


TABLES = {
    **{"limits": limits, "crops": crops, "step": step, "epoch": epoch, "knn": knn, "propagation": propagation},
    **{"scaling": scaling, "growth": growth, "startup": startup},
}


def main(args):
    check_args(args)
    beside = os.path.dirname(os.path.abspath(__file__))  # the server is told nothing of where modules lie
    os.environ["PYTHONPATH"] = os.pathsep.join([beside, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        args.photographs = photographs(args.data_path, folder)
        for name in args.what or TABLES:
            TABLES[name](args)


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
