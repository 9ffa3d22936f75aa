"""Check and measure this code on one GPU: numbers, speed, memory. Under six minutes on an H100.

    python tests/gpu/gpu_check.py --out results                              # everything
    python tests/gpu/gpu_check.py --out results --only numerics step         # some sections
    python tests/gpu/gpu_check.py --out results --device cpu --tiny          # small networks on a CPU, to try it

Each section runs in its own process with a time limit and writes each result at once: a section that fails or is
stopped costs no other. Sections that time something run alone; `compile` runs beside the others, and a lock keeps its
measurement apart. Writes gpu_check.json (all numbers) and gpu_check.log (the output of the sections) into --out, and
prints tables at the end. Photographs and checkpoints go to a temporary folder.

The baseline `plain` is DINO in its simplest form, as in the paper's pseudo code: explicit attention, a log-softmax per
pair of views, loops over parameters, a host that reads the loss in each step, floats from the loader.
"""

import argparse
import contextlib
import fcntl
import functools
import gc
import io
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

BEGAN = time.monotonic()

# {section: (seconds it may take, seconds it is not begun with less of)}, in the order in which they run.
SECTIONS = {
    "machine": (40, 10),
    "step": (90, 30),
    "tables": (60, 20),
    "others": (90, 20),
    "files": (90, 30),
    "runs": (110, 40),  # from here on nothing is timed, and `compile` works beside it
    "ranks": (80, 25),
    "numerics": (60, 15),
}
BACKGROUND = "compile"
COMPILE_LIMIT = 260


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkout", default=str(Path(__file__).resolve().parents[2]), help="Folder with main_dino.py in it."
    )
    parser.add_argument("--out", default="gpu_check", help="Folder for results.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="Small networks and few steps: to try this script.")
    parser.add_argument("--only", nargs="+", default=[*SECTIONS, BACKGROUND], choices=[*SECTIONS, BACKGROUND])
    parser.add_argument("--budget", default=345.0, type=float, help="Seconds for all of it.")
    parser.add_argument("--workers", default=os.cpu_count(), type=int, help="Loaders' processes.")
    parser.add_argument("--photos", default="", help="Folder of JPEG files; without one, some are made.")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- findings ----


class Findings:
    """Numbers and checks of a section, written to its JSON file at once."""

    def __init__(self, path):
        self.path, self.numbers, self.checks, self.errors = Path(path), {}, {}, {}

    def put(self, name, value):
        self.numbers[name] = value
        print(f"    {name}: {shown(value)}", flush=True)
        self.write()

    def check(self, name, right, detail=""):
        self.checks[name] = [bool(right), str(detail)]
        print(f"    {'ok  ' if right else 'FAIL'} {name}  {detail}", flush=True)
        self.write()

    @contextlib.contextmanager
    def trying(self, what):
        """A part of a section: an exception is printed and noted, and the next part runs."""
        began = time.perf_counter()
        print(f"  {what}", flush=True)
        try:
            yield
        except Exception as e:
            text = traceback.format_exc()
            print(text, flush=True)
            self.errors[what] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}\n{text[-3000:]}"
            self.write()
        print(f"    ({time.perf_counter() - began:.1f} s)", flush=True)

    def write(self):
        text = json.dumps({"numbers": self.numbers, "checks": self.checks, "errors": self.errors}, indent=1)
        self.path.with_suffix(".tmp").write_text(text)
        self.path.with_suffix(".tmp").replace(self.path)


def shown(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    return str(value)


# ---- sizes ----


class Sizes:
    """What is measured: the paper's ViT-S/16 on 2 crops of 224 and 8 of 96 pixels; or, tiny, next to nothing."""

    def __init__(self, tiny):
        self.tiny = tiny
        self.arch, self.patch, self.large, self.small, self.locals = "vit_small", 16, 224, 96, 8
        self.out_dim, self.batches, self.batch = 65536, (2, 32, 64, 128, 256), 64
        self.steps, self.warm = 12, 5
        if tiny:
            self.arch, self.patch, self.large, self.small, self.locals = "vit_nano", 8, 32, 16, 2
            self.out_dim, self.batches, self.batch, self.steps, self.warm = 256, (2, 4, 8), 4, 3, 1

    def flags(self, **others):
        of_size = {"arch": self.arch, "patch_size": self.patch, "out_dim": self.out_dim}
        of_size |= {"global_crops_size": self.large, "local_crops_size": self.small, "local_crops_number": self.locals}
        return {**of_size, "freeze_last_layer": 0, "tensorboard": "off", **others}

    @property
    def crops(self):
        return [self.large] * 2 + [self.small] * self.locals


def words(flags):
    """Flags of main_dino.py as words of a command line."""
    found = []
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        found += [f"--{name}", *("true" if v is True else "false" if v is False else str(v) for v in values)]
    return found


# ---- the child's tools ----


class Tools:
    """What the sections share. Everything of the checkout is imported here, by its path."""

    def __init__(self, given):
        sys.path.insert(0, os.path.abspath(given.checkout))
        import torch

        import dino_backbones
        import dino_cli
        import main_dino
        import utils

        self.torch, self.main_dino, self.utils = torch, main_dino, utils
        self.backbones, self.cli = dino_backbones, dino_cli
        self.given, self.sizes, self.cuda = given, Sizes(given.tiny), given.device == "cuda"
        self.device = utils.pick_device(given.device)
        self.out = Path(given.scratch)
        self.found = Findings(self.out / f"{given.child}.json")

    def sync(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    @contextlib.contextmanager
    def alone(self):
        """While something is measured, no other section works on the device."""
        with open(self.out / "lock", "w") as file:
            self.sync()
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
                self.sync()
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    def free(self):
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()

    def milliseconds(self, work, repeats=20, warm=3):
        """Median time of a piece of work on the device, each by events of its own."""
        for _ in range(warm):
            work()
        self.sync()
        if not self.cuda:
            return statistics.median(seconds_of(work) for _ in range(3)) * 1e3
        pairs = []
        for _ in range(repeats):
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            pairs.append((begin, end))
        self.sync()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs)

    def args(self, **flags):
        parser = self.cli.OneLineParser(parents=[self.main_dino.get_args_parser()])
        args = parser.parse_args(words(self.sizes.flags(**{"output_dir": self.out, **flags})))
        args.rank, args.world_size, args.gpu, args.images = 0, 1, 0, 10**6
        args.images_per_step = args.batch_size_per_gpu * args.grad_accum_steps
        return args

    def crops_of(self, batch, sizes=None, pinned=True):
        """Crops as a loader gives them: uint8 [B, 3, h, w], pinned."""
        generator = self.torch.Generator().manual_seed(batch)
        shapes = [(batch, 3, side, side) for side in sizes or self.sizes.crops]
        crops = [self.torch.randint(256, shape, generator=generator, dtype=self.torch.uint8) for shape in shapes]
        return [crop.pin_memory() for crop in crops] if self.cuda and pinned else crops

    def peak_mb(self):
        return self.torch.cuda.max_memory_allocated() / 2**20 if self.cuda else float("nan")

    def reset_peak(self):
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Watch:
    """Notes, on the device's clock and on the host's, when a batch is asked for."""

    def __init__(self, tools):
        self.tools, self.events, self.host = tools, [], []

    def tick(self):
        self.host.append(time.perf_counter())
        if self.tools.cuda:
            event = self.tools.torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)

    def seconds(self, warm):
        """Median seconds between two ticks, the first ones apart."""
        self.tools.sync()
        if self.events:
            gaps = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self.events)]
        else:
            gaps = [b - a for a, b in itertools.pairwise(self.host)]
        return statistics.median(gaps[warm:])


class Batches:
    """A loader of N batches that are on the host already."""

    def __init__(self, tools, crops, steps, watch):
        self.crops, self.steps, self.watch = crops, steps, watch
        self.indices = tools.torch.arange(len(crops[0]))

    def __len__(self):
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            self.watch.tick()
            yield self.crops, self.indices, []
        self.watch.tick()


class Ours:
    """What train_dino sets up, and train_one_epoch on crops that are on the host already."""

    def __init__(self, tools, args, amp_dtype, wrap=None):
        self.tools, self.args, torch = tools, args, tools.torch
        main_dino, utils, device = tools.main_dino, tools.utils, tools.device
        utils.fix_random_seeds(0)
        self.student, self.teacher = main_dino.build_student_and_teacher(args, device, amp_dtype)
        if wrap:
            self.student, self.teacher = wrap(self.student, self.teacher)
        self.loss = main_dino.DINOLoss(args.out_dim, 2 + args.local_crops_number, 0.04, 0.04, 0, args.epochs).to(device)
        self.optimizer = utils.build_optimizer(args.optimizer, utils.get_params_groups(self.student), device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
        self.autocast = torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)

    def parts(self):
        return self.tools.main_dino.Parts(self.student, self.teacher, self.loss, self.optimizer, self.scaler)

    def gradients(self, crops):
        """(loss, {name: gradient}) of one step, which is then left out."""
        import dino_run

        class Looking(dino_run.Bare):
            def vote(self, loss):
                self.loss = loss

            def skips(self, step):
                return True

        run = Looking(self.args, 1)
        self.train(crops, 1, run=run)
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        named = self.student.named_parameters()
        grads = {n.removeprefix("module."): p.grad.double().cpu() / scale for n, p in named if p.grad is not None}
        return run.loss, grads

    def train(self, crops, steps, watch=None, lr=1e-5, run=None):
        """A run of steps; returns what train_one_epoch does."""
        schedules = {"lr": [lr] * steps, "weight_decay": [0.04] * steps, "momentum": [0.996] * steps}
        schedules = {name: values * self.args.epochs for name, values in schedules.items()}
        loader = Batches(self.tools, crops, steps, watch or Watch(self.tools))
        with contextlib.redirect_stdout(io.StringIO()):
            return self.tools.main_dino.train_one_epoch(
                self.parts(), loader, schedules, 0, self.args, self.autocast, run
            )

    def speed(self, batch, steps=None, warm=None):
        """{images/s, ms per step, peak MB} at a batch size. At 2 the ms are what the host takes to launch it all."""
        tools, sizes = self.tools, self.tools.sizes
        steps, warm = steps or sizes.steps, sizes.warm if warm is None else warm
        crops, watch = tools.crops_of(batch), Watch(tools)
        tools.free()
        with tools.alone():
            tools.reset_peak()
            self.train(crops, warm + steps, watch)
            seconds = watch.seconds(warm)
        return {"images_s": batch / seconds, "ms": seconds * 1e3, "peak_mb": tools.peak_mb()}


# ---- the baseline ----


class Plain:
    """DINO in its plainest form."""

    def __init__(self, tools, arch, amp_dtype, drop_path_rate=0.1):
        self.tools, self.amp_dtype, torch, sizes = tools, amp_dtype, tools.torch, tools.sizes
        tools.utils.fix_random_seeds(0)
        self.student, self.teacher = (self.network(arch, rate).to(tools.device) for rate in (drop_path_rate, 0.0))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        groups = tools.utils.get_params_groups(self.student)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, weight_decay=0.04)  # as torch itself does it
        self.center = torch.zeros(1, sizes.out_dim, device=tools.device)
        self.scaler = torch.amp.GradScaler(tools.device.type, enabled=amp_dtype is torch.float16)

    def network(self, arch, drop_path_rate):
        from vision_transformer import DINOHead

        sizes, utils = self.tools.sizes, self.tools.utils
        backbone, width = self.tools.backbones.build_backbone(arch, sizes.patch, sizes.large, drop_path_rate)
        return utils.MultiCropWrapper(backbone, DINOHead(width, sizes.out_dim))

    def loss(self, seen, taught):
        F, terms = self.tools.torch.nn.functional, []
        for i, teacher in enumerate(taught.chunk(2)):
            target = F.softmax((teacher - self.center) / 0.04, dim=-1).detach()
            for j, student in enumerate(seen.chunk(2 + self.tools.sizes.locals)):
                if i != j:
                    terms.append((-target * F.log_softmax(student / 0.1, dim=-1)).sum(dim=-1).mean())
        return sum(terms) / len(terms)

    def step(self, crops):
        torch, device = self.tools.torch, self.tools.device
        crops = [crop.to(device, non_blocking=True) for crop in crops]
        with torch.autocast(device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            taught, seen = self.teacher(crops[:2]), self.student(crops)
            loss = self.loss(seen, taught)
        self.center = 0.9 * self.center + 0.1 * taught.detach().float().mean(dim=0, keepdim=True)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the plain loss is {loss.item()}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = 3.0 / (parameter.grad.norm(2) + 1e-6)
                if factor < 1:  # waits for the device, as the release does
                    parameter.grad.mul_(factor)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(0.996).add_(0.004 * new)
        self.tools.sync()
        return loss.item()

    def speed(self, batch, steps=None, warm=None):
        tools, sizes = self.tools, self.tools.sizes
        steps, warm = steps or sizes.steps, sizes.warm if warm is None else warm
        crops = [tools.utils.normalize(crop) for crop in tools.crops_of(batch, pinned=False)]
        crops = [crop.pin_memory() for crop in crops] if tools.cuda else crops
        tools.free()
        watch = Watch(tools)
        with tools.alone():
            tools.reset_peak()
            for _ in range(warm + steps):
                watch.tick()
                self.step(crops)
            watch.tick()
            seconds = watch.seconds(warm)
        return {"images_s": batch / seconds, "ms": seconds * 1e3, "peak_mb": tools.peak_mb()}


def useful_gflop(tools, arch, patch, sides, out_dim):
    """10⁹ operations per image of products and convolutions in a step, the last block's for CLS alone."""
    from torch.utils.flop_counter import FlopCounterMode

    from vision_transformer import DINOHead

    torch, utils = tools.torch, tools.utils

    def network():
        backbone, width = tools.backbones.build_backbone(arch, patch, sides[0])
        if tools.backbones.vit_factory(arch):
            backbone.set_cls_only(True)
        return utils.MultiCropWrapper(backbone, DINOHead(width, out_dim))

    with torch.device("meta"):
        student, teacher = network(), network()
        crops = [torch.empty(2, 3, side, side) for side in sides]
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher(crops[:2])
        student(crops).sum().backward()
    return counter.get_total_flops() / 2e9


# ---- section: the machine and its ceilings ----


def machine(tools):
    torch, found, tiny = tools.torch, tools.found, tools.sizes.tiny
    with found.trying("versions"):
        import torchvision

        found.put("python", sys.version.split()[0])
        found.put("torch", torch.__version__)
        found.put("torchvision", torchvision.__version__)
        found.put("cores", os.cpu_count())
        if tools.cuda:
            about = torch.cuda.get_device_properties(0)
            found.put("gpu", about.name)
            found.put("gpu_gb", about.total_memory / 2**30)
            found.put("cudnn", torch.backends.cudnn.version())
            query = "clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
            asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
            found.put("nvidia_smi", subprocess.run(asked, capture_output=True, text=True).stdout.strip())
    side = 256 if tiny else 8192
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name in dtypes if tools.cuda else ("fp32",):
        with found.trying(f"products of {side}³ in {name}"), tools.alone():
            a, b = (torch.randn(side, side, device=tools.device).to(dtypes[name]) for _ in range(2))
            product, flop = functools.partial(torch.mm, a, b), 2 * side**3
            found.put(f"tflops_{name}", flop / tools.milliseconds(product, 3 if name == "fp32" else 20) / 1e9)
            if name == "fp32" and tools.cuda:
                torch.backends.cuda.matmul.allow_tf32 = True
                found.put("tflops_tf32", flop / tools.milliseconds(product, 10) / 1e9)
                torch.backends.cuda.matmul.allow_tf32 = False
    with found.trying("products as a ViT-S has them, bf16"), tools.alone():
        dtype, rows = (torch.bfloat16, 64 * 394) if tools.cuda else (torch.float32, 64)
        for wide, narrow in ((1152, 384), (384, 384), (1536, 384), (384, 1536)):
            x, w = torch.randn(rows, narrow, device=tools.device), torch.randn(wide, narrow, device=tools.device)
            x, w, bias = x.to(dtype), w.to(dtype), torch.randn(wide, device=tools.device).to(dtype)
            ms = tools.milliseconds(lambda x=x, w=w, bias=bias: torch.nn.functional.linear(x, w, bias))
            found.put(f"tflops_linear_{narrow}_{wide}", 2 * rows * wide * narrow / ms / 1e9)
    with found.trying("memory"), tools.alone():
        source = torch.ones((2**20 if tiny else 2**29), device=tools.device)
        target = torch.empty_like(source)
        found.put("copy_tb_s", 2 * source.nbytes / tools.milliseconds(lambda: target.copy_(source)) / 1e9)
        if tools.cuda:
            host = torch.empty(2**26, dtype=torch.uint8).pin_memory()
            there = torch.empty_like(host, device=tools.device)
            ms = tools.milliseconds(lambda: there.copy_(host, non_blocking=True))
            found.put("to_device_gb_s", host.nbytes / ms / 1e6)
            small = torch.zeros(8, device=tools.device)
            tools.sync()
            began = time.perf_counter()
            for _ in range(1000):
                small.add_(1)
            found.put("launch_us", (time.perf_counter() - began) * 1e3)
            tools.sync()
    with found.trying("operations of a step"):
        sizes = tools.sizes
        found.put("gflop_image", useful_gflop(tools, sizes.arch, sizes.patch, sizes.crops, sizes.out_dim))
        if not tiny:
            found.put("gflop_image_vit_base", useful_gflop(tools, "vit_base", 16, sizes.crops, sizes.out_dim))
            found.put("gflop_image_resnet50", 102.3)  # counted by hand, once: its build runs the network


# ---- section: the numbers ----


def reference(tools, ours, crops):
    """(loss, {name: gradient}) of a step in float64 on the CPU, attention written out, all pairs one by one."""
    plain = Plain.__new__(Plain)
    plain.tools = tools
    networks = []
    for source in (ours.student, ours.teacher):
        network = plain.network(tools.sizes.arch, 0.0)
        network.load_state_dict({k.removeprefix("module."): v.cpu() for k, v in source.state_dict().items()})
        networks.append(network.double())
    student, teacher = networks
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not name.endswith("weight_g"))
    plain.center = ours.loss.center.double().cpu()
    views = [tools.utils.normalize(crop).double() for crop in crops]
    with tools.torch.no_grad():
        taught = teacher(views[:2])
    loss = plain.loss(student(views), taught)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def relative(found, wanted):
    """(error over all tensors together, the worst tensor's, its name)."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    gaps, norms = ({n: tensor.norm().item() for n, tensor in tensors.items()} for tensors in
                   ({n: found[n] - wanted[n] for n in wanted}, wanted))  # fmt: skip
    errors = {name: gaps[name] / max(norms[name], 1e-300) for name in wanted}
    worst = max(errors, key=errors.get)
    return math.hypot(*gaps.values()) / math.hypot(*norms.values()), errors[worst], worst


@contextlib.contextmanager
def small(tools):
    """Small networks and crops, whatever the device."""
    before, tools.sizes = tools.sizes, Sizes(tiny=True)
    tools.sizes.out_dim, tools.sizes.locals = 4096, 4
    try:
        yield
    finally:
        tools.sizes = before


def apart(tools, ours):
    """Let student and teacher differ, and the center be something."""
    torch = tools.torch
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in ours.student.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
        ours.loss.center += 0.1 * torch.randn(ours.loss.center.shape, generator=generator).to(tools.device)


def numerics(tools):
    with small(tools):
        against_float64(tools)
        on_both_devices(tools)
        with_a_scaler(tools)
    other_functions(tools)


def against_float64(tools):
    torch, found = tools.torch, tools.found
    dtypes = {"fp32": (None, 5e-5), "bf16": (torch.bfloat16, 6e-2), "fp16": (torch.float16, 1e-2)}
    for name, (amp_dtype, tolerance) in dtypes.items():
        with found.trying(f"a step's loss and gradients in {name} against float64"):
            args = tools.args(drop_path_rate=0.0, batch_size_per_gpu=8, norm_last_layer=True)
            ours = Ours(tools, args, amp_dtype)
            apart(tools, ours)
            crops = tools.crops_of(8)
            wanted_loss, wanted = reference(tools, ours, crops)
            for tf32 in (True, False) if tools.cuda and amp_dtype is None else (True,):
                torch.backends.cudnn.allow_tf32 = tf32
                loss, gradients = ours.gradients(crops)
                error, worst, where = relative(gradients, wanted)
                loss_error = abs(loss.item() - wanted_loss) / wanted_loss
                suffix = "" if tf32 else "_without_tf32_convolutions"
                found.put(f"error_{name}{suffix}", {"loss": loss_error, "gradient": error, "worst": worst, "of": where})
                strict = not tf32 or not tools.cuda or amp_dtype is not None
                right = error < (tolerance if strict else 2e-3) and loss_error < (tolerance if strict else 2e-3)
                found.check(f"gradients_{name}{suffix}", right, f"{error:.1e} (loss {loss_error:.1e})")
            torch.backends.cudnn.allow_tf32 = True
            norms = tools.utils.clip_gradients(ours.student, 0.01)
            found.check(f"clip_{name}", torch.isfinite(norms).all().item() and norms.device.type == tools.device.type)
        if amp_dtype is not None:
            with found.trying(f"the plain step's gradients in {name} against float64, to compare"):
                plain = Plain.__new__(Plain)
                plain.tools, plain.center = tools, ours.loss.center
                student, teacher = (plain.network(tools.sizes.arch, 0.0).to(tools.device) for _ in range(2))
                student.load_state_dict(ours.student.state_dict())
                teacher.load_state_dict(ours.teacher.state_dict())
                views = [tools.utils.normalize(crop.to(tools.device)) for crop in crops]
                with torch.autocast(tools.device.type, dtype=amp_dtype):
                    with torch.no_grad():
                        taught = teacher(views[:2])
                    loss = plain.loss(student(views), taught)
                (loss * 1024).backward()
                named = student.named_parameters()
                gradients = {n: p.grad.double().cpu() / 1024 for n, p in named if n in wanted}
                found.put(f"error_plain_{name}", relative(gradients, wanted)[0])


def on_both_devices(tools):
    found = tools.found
    with found.trying("five float32 steps on this device and on the CPU"):
        if tools.cuda:
            tools.torch.backends.cudnn.allow_tf32 = False
        losses = []
        for device in (tools.device, tools.torch.device("cpu")):
            before, tools.device, cuda = tools.device, device, tools.cuda
            tools.cuda = device.type == "cuda"
            try:
                args = tools.args(drop_path_rate=0.0, batch_size_per_gpu=8, grad_accum_steps=2)
                ours = Ours(tools, args, None)
                losses.append([ours.train(tools.crops_of(16), 1, lr=1e-3)["loss"] for _ in range(5)])
            finally:
                tools.device, tools.cuda = before, cuda
        tools.torch.backends.cudnn.allow_tf32 = True
        gap = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
        found.check("trajectory_fp32", gap < 1e-3, f"{gap:.1e} apart after 5 steps in 2 passes: {losses[0]}")


def with_a_scaler(tools):
    torch, found = tools.torch, tools.found
    with found.trying("fp16 with its scaler"):
        ours = Ours(tools, tools.args(batch_size_per_gpu=8), torch.float16)
        means = ours.train(tools.crops_of(8), 8, lr=1e-3)
        scale = ours.scaler.get_scale()
        found.check("fp16_trains", math.isfinite(means["loss"]), f"loss {means['loss']:.3f}, scale {scale:g}")
        ours.scaler = torch.amp.GradScaler(tools.device.type, init_scale=2.0**60)
        before = [p.clone() for p in ours.student.parameters()]
        ours.train(tools.crops_of(8), 3, lr=1e-3)
        still = all(torch.equal(a, b) for a, b in zip(before, ours.student.parameters(), strict=True))
        scale = ours.scaler.get_scale()
        found.check("fp16_overflow_is_skipped", still and scale == 2.0**57, f"2^{math.log2(scale):g}")
        ours.scaler = torch.amp.GradScaler(tools.device.type, init_scale=1024.0)
        ours.train(tools.crops_of(8), 1, lr=1e-3)
        moved = not all(torch.equal(a, b) for a, b in zip(before, ours.student.parameters(), strict=True))
        found.check("fp16_goes_on", moved)


def other_functions(tools):
    torch, found, utils, device = tools.torch, tools.found, tools.utils, tools.device
    with found.trying("HostCopy, meters, features"):
        values = utils.HostCopy(torch.arange(4.0, device=device) + 0.5).read()
        found.check("host_copy", values == [0.5, 1.5, 2.5, 3.5], values)
        import dino_features
        import dino_health

        loss = tools.main_dino.DINOLoss(64, 4, 0.04, 0.04, 0, 1).to(device)
        loss(torch.randn(16, 64, device=device), torch.randn(8, 64, device=device), 0)
        numbers = dino_health.step_numbers(torch.randn(8, 32, device=device), loss, torch.rand(5, device=device))
        found.check("health", set(numbers) == set(dino_health.NUMBERS), shown(numbers))
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8)).to(device)
        images = torch.randint(256, (10, 3, 16, 16), dtype=torch.uint8)
        data = torch.utils.data.TensorDataset(images, torch.arange(10).flip(0))
        loader = torch.utils.data.DataLoader(data, 4, pin_memory=tools.cuda)
        features = dino_features.extract_features(network, loader)
        wanted = network(utils.normalize(images.to(device))).flip(0)
        found.check("extract_features", torch.allclose(features, wanted, atol=1e-4), str(features.device))
    with found.trying("the loss against a slow one in float64, K as large as it gets"):
        batch, out_dim = (4, 1024) if tools.sizes.tiny else (64, 65536)
        logits, taught = torch.randn(10 * batch, out_dim), torch.randn(2 * batch, out_dim)
        logits, taught = logits.div(logits.norm(dim=1, keepdim=True)).mul(16), taught.div(8)
        loss = tools.main_dino.DINOLoss(out_dim, 10, 0.04, 0.04, 0, 1).to(device)
        seen = logits.to(device, copy=True).requires_grad_()
        value = loss(seen, taught.to(device), 0)
        value.backward()
        check = logits.to(device).double().requires_grad_()
        targets = (taught.to(device).double() / 0.04).softmax(-1).unflatten(0, (2, batch))
        lsm = (check.unflatten(0, (10, batch)) / 0.1).log_softmax(-1)
        terms = [-(targets[i] * lsm[j]).sum(-1).mean() for i in range(2) for j in range(10) if i != j]
        (sum(terms) / 18).backward()
        error = abs(value.item() / (sum(terms).item() / 18) - 1)
        gradient = ((seen.grad - check.grad).norm() / check.grad.norm()).item()
        found.check("loss_fp32_large", error < 1e-4 and gradient < 1e-4, f"loss {error:.1e}, gradient {gradient:.1e}")


# ---- section: the training step ----


def step(tools):
    torch, found, sizes = tools.torch, tools.found, tools.sizes
    bf16, fp16, ours = torch.bfloat16, torch.float16, None
    with found.trying("ours, bf16"):
        ours = Ours(tools, tools.args(), bf16)
        for batch in sizes.batches:
            found.put(f"ours_bf16_{batch}", ours.speed(batch))
    if ours:
        with found.trying("waits for the device, by torch's own count"):
            count_syncs(tools, ours)
        with found.trying("ours, bf16, again, for the spread"):
            found.put(f"ours_bf16_again_{sizes.batch}", ours.speed(sizes.batch))
    with found.trying("plain, fp16"):
        plain = Plain(tools, sizes.arch, fp16)
        for batch in (sizes.batch, sizes.batches[-1]):
            found.put(f"plain_fp16_{batch}", plain.speed(batch))
        del plain
    with found.trying("plain, bf16"):
        found.put(f"plain_bf16_{sizes.batch}", Plain(tools, sizes.arch, bf16).speed(sizes.batch))
    if not sizes.tiny:
        with found.trying("ViT-B/16"):
            found.put("ours_base_bf16_64", Ours(tools, tools.args(arch="vit_base"), bf16).speed(64, 8, 3))
    with found.trying("ours, fp16"):
        found.put(f"ours_fp16_{sizes.batch}", Ours(tools, tools.args(), fp16).speed(sizes.batch))
    for name, use_fp16 in (("fp32", False), ("tf32", True)):
        with found.trying(f"ours, {name}"):
            if tools.cuda:
                tools.backbones.pick_amp_dtype(tools.device, use_fp16, "tf32")  # sets what float32 is
            found.put(f"ours_{name}_{sizes.batch}", Ours(tools, tools.args(), None).speed(sizes.batch, 4, 2))
    if ours:
        with found.trying("ours, bf16, checkpointed"):
            ours.student.backbone.set_grad_checkpointing()
            for batch in (sizes.batch, sizes.batches[-1]):
                found.put(f"ours_bf16_checkpointed_{batch}", ours.speed(batch))
            ours.student.backbone.set_grad_checkpointing(False)
        with found.trying("where the time goes"):
            profile(tools, ours, "eager")


def count_syncs(tools, ours):
    """How often the host waits in 20 steps, and from which lines; a wait for an event is none by torch's count."""
    if not tools.cuda:
        return
    torch = tools.torch
    crops, steps = tools.crops_of(tools.sizes.batch), 20
    ours.train(crops, 2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            ours.train(crops, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = {}
    for warning in seen:
        if "synchroniz" in str(warning.message):
            place = f"{Path(warning.filename).name}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    tools.found.put("syncs_in_20_steps", {"all": sum(places.values()), **places})


KINDS = {
    "attention": "flash|fmha|attention|sdpa|cudnn_generated",
    "products": "gemm|cutlass|nvjet|xmma|sm90_|sm80_|cublas|splitK",
    "convolution": "conv|wgrad|dgrad|implicit|nchwToNhwc|nhwcToNchw|im2col",
    "positions": "upsample|bicubic",
    "layer norm": "layer_norm|LayerNorm|GammaBeta",
    "optimizer, EMA": "multi_tensor|fused_adam|lpnorm",
    "softmax": "softmax|SoftMax",
    "weight norm": "weight_norm",
    "copies between": "Memcpy|Memset",
    "triton": "triton_",
    "reductions": "reduce_kernel|reduce",
    "elementwise": "elementwise|vectorized|unrolled|CatArray|copy",
}


def profile(tools, ours, name):
    if not tools.cuda:
        return
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    steps, crops = 3, tools.crops_of(tools.sizes.batch)
    ours.train(crops, 2)
    with tools.alone(), recorded(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        ours.train(crops, steps)
        tools.sync()
    totals, kernels, launches = {}, {}, 0
    for event in record.events():
        if "cuda" not in str(event.device_type).lower() or re.match(r"Optimizer\.|ProfilerStep|##", event.name):
            continue
        ms = event.time_range.elapsed_us() / 1e3 / steps
        kind = next((kind for kind, signs in KINDS.items() if re.search(signs, event.name)), "others")
        totals[kind] = totals.get(kind, 0) + ms
        kernels[event.name[:90]] = kernels.get(event.name[:90], 0) + ms
        launches += 1
    if not totals:
        raise RuntimeError("the profiler saw no kernel")
    tools.found.put(f"profile_{name}_launches_a_step", launches / steps)
    tools.found.put(f"profile_{name}_ms_a_step", dict(sorted(totals.items(), key=lambda kv: -kv[1])))
    top = sorted(kernels.items(), key=lambda kv: -kv[1])[:14]
    for kernel, ms in top:
        print(f"      {ms:7.3f} ms  {kernel}")
    tools.found.put(f"profile_{name}_top", {kernel: round(ms, 4) for kernel, ms in top})


# ---- section: others ----


def others(tools):
    for part in (launches, deterministic, micro, resnet, knn):
        with tools.found.trying(f"---- {part.__name__}"):
            part(tools)
            tools.free()


# ---- others: single functions ----


def launches(tools):
    """What the host spends per operation: within torch, in the driver, and by a replayed graph."""
    torch, found = tools.torch, tools.found
    small = torch.zeros(8, device=tools.device)

    def microseconds(work, number=2000):
        for _ in range(100):
            work()
        tools.sync()
        began = time.perf_counter()
        for _ in range(number):
            work()
        took = time.perf_counter() - began
        tools.sync()
        return took / number * 1e6

    with found.trying("operations"), tools.alone():
        found.put("host_us_view", microseconds(lambda: small.view(2, 4)))
        found.put("host_us_empty", microseconds(lambda: torch.empty_like(small)))
        found.put("host_us_add", microseconds(lambda: small.add_(1)))
        if tools.cuda:
            found.put("host_us_event", microseconds(lambda: torch.cuda.Event().record()))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(100):
                    small.add_(1)
            found.put("host_us_graph_of_100", microseconds(graph.replay, 100))
            print(subprocess.run(["lscpu"], capture_output=True, text=True).stdout[:2000])


def micro(tools):
    found, sizes, device = tools.found, tools.sizes, tools.device
    with found.trying("the loss, forward and backward"), tools.alone():
        views, half = 2 + sizes.locals, tools.torch.bfloat16
        loss = tools.main_dino.DINOLoss(sizes.out_dim, views, 0.04, 0.04, 0, 1).to(device)
        shape = (views * sizes.batch, sizes.out_dim)
        seen = tools.torch.randn(shape, device=device).div(3).to(half).requires_grad_()
        taught = tools.torch.randn(2 * sizes.batch, sizes.out_dim, device=device).div(3).to(half)
        found.put("loss_ms", tools.milliseconds(lambda: loss(seen, taught, 0, update_center=False).backward()))
    with found.trying("attention by kernel, forward and backward"), tools.alone():
        attention(tools)
    with found.trying("what comes after the gradients"), tools.alone():
        ours = Ours(tools, tools.args(), tools.torch.bfloat16)
        ours.gradients(tools.crops_of(sizes.batches[1]))
        utils, main_dino = tools.utils, tools.main_dino
        pieces = {
            "clip": lambda: utils.clip_gradients(ours.student, 3.0),
            "optimizer": ours.optimizer.step,
            "teacher": lambda: main_dino.update_teacher(ours.teacher, ours.student, 0.996),
        }
        for name, work in pieces.items():
            device_ms = tools.milliseconds(work)
            host = statistics.median(seconds_of(work) for _ in range(10)) * 1e3
            tools.sync()
            found.put(f"after_{name}", {"ms": device_ms, "host_ms": host})
        seeding = functools.partial(utils.fix_random_seeds, 7)
        found.put("seed_host_ms", statistics.median(seconds_of(seeding) for _ in range(20)) * 1e3)
        crops = [crop.to(device) for crop in tools.crops_of(sizes.batch)]
        found.put("normalize_ms", tools.milliseconds(lambda: [utils.normalize(c) for c in crops]))


def attention(tools):
    torch, found, sizes = tools.torch, tools.found, tools.sizes
    F, half = torch.nn.functional, torch.bfloat16
    kernels = {"default": None}
    if tools.cuda:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
        kernels |= {name.lower(): getattr(SDPBackend, name) for name in names if hasattr(SDPBackend, name)}
    for tokens, crops in ((197, 2), (37, 8)):
        images = sizes.batch * crops
        qkv = torch.randn(images, tokens, 3, 6, 64, device=tools.device, dtype=half, requires_grad=True)
        grad = torch.randn(images, tokens, 384, device=tools.device, dtype=half)

        def work(qkv=qkv, grad=grad):
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).backward(grad)

        for name, kernel in kernels.items():
            try:
                with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
                    found.put(f"attention_{tokens}_{name}_ms", tools.milliseconds(work, 10))
            except Exception as e:
                found.put(f"attention_{tokens}_{name}_ms", f"{type(e).__name__}: {str(e)[:80]}")


# ---- section: main_dino.py itself ----


def photos(tools):
    """A folder of class folders with JPEG files as large as ImageNet's; made once, by whoever comes first."""
    folder = tools.out / "photos"
    if folder.exists():
        return str(folder)
    from PIL import Image

    import dino_data
    import dino_images

    given = sorted(Path(tools.given.photos).rglob("*.[jJ]*")) if tools.given.photos else []
    sources = given or dino_data.find_photographs()
    number, build = (48, 96) if tools.sizes.tiny else (256, 10_240), tools.out / "photos.tmp"
    generator = tools.torch.Generator().manual_seed(0)
    files = []
    (build / "files").mkdir(parents=True, exist_ok=True)
    images = [dino_images.load_image(path) for path in sources]
    for i in range(number[0]):
        image = images[i % len(images)]
        share = 0.5 + 0.5 * tools.torch.rand(3, generator=generator)
        w, h = int(image.width * share[0]), int(image.height * share[1])
        left, top = int((image.width - w) * share[2]), int((image.height - h) * share[2])
        path = build / "files" / f"{i}.jpg"
        crop = image.crop((left, top, left + w, top + h)).resize((500, 375), Image.Resampling.BICUBIC)
        crop.save(path, "JPEG", quality=90)
        files.append(path)
    for i in range(number[1]):
        label = build / f"class{i % 4}"
        label.mkdir(exist_ok=True)
        os.link(files[i % len(files)], label / f"{i:05}.jpg")
    for path in files:
        path.unlink()
    (build / "files").rmdir()
    build.rename(folder)
    return str(folder)


def quickest(tools):
    """fast, or pil where there is no OpenCV that is new enough."""
    import dino_crops

    try:
        dino_crops.opencv()
    except tools.utils.UserError:
        return "pil"
    return "fast"


class Run:
    """A process of main_dino.py, its output in a file."""

    def __init__(self, tools, name, **flags):
        self.tools, self.name, self.began = tools, name, time.monotonic()
        self.folder, self.log = tools.out / f"run_{name}", tools.out / f"run_{name}.log"
        defaults = {"epochs": 1, "warmup_epochs": 0, "saveckp_freq": 0, "augmentation": quickest(tools)}
        defaults |= {"device": tools.given.device, "output_dir": self.folder}
        self.words = [sys.executable, "-u", "main_dino.py", *words(tools.sizes.flags(**{**defaults, **flags}))]
        self.start()

    def start(self):
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.words, cwd=self.tools.given.checkout, stdout=log, stderr=log)

    def text(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern, seconds):
        """Whether the log has come to hold it in time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            if re.search(pattern, self.text()):
                return True
            time.sleep(0.05)
        return bool(re.search(pattern, self.text()))

    def end(self, seconds):
        """Its exit code; it is ended if it takes longer."""
        try:
            return self.process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait() or "too slow"

    def trouble(self):
        """Lines of its output that should not be there."""
        signs = r"Traceback|Exception in thread|Exception ignored|[A-Za-z]*Warning:|^error"
        return [line[:200] for line in self.text().splitlines() if re.search(signs, line)][:6]


def weights(path, torch):
    state = torch.load(path, map_location="cpu", weights_only=False)
    return {f"{part}.{k}": v for part in ("student", "teacher", "dino_loss") for k, v in state[part].items()}


def distance(one, other):
    """(whether all bits are the same, relative distance of all tensors together)."""
    gap, norm = (math.hypot(*(t.double().norm().item() for t in tensors)) for tensors in
                 ([one[k].double() - other[k].double() for k in one], one.values()))  # fmt: skip
    return all(one[k].equal(other[k]) for k in one), gap / norm


def stop_and_go_on(tools, run, until):
    """Send a run the signal to stop when it is under way, and start it again."""
    if run.wait_for(r"\[ *10/", until - time.monotonic()):
        run.process.send_signal(signal.SIGTERM)
        code = run.end(until - time.monotonic())
        tools.found.check("stops_at_a_signal", code == 128 + signal.SIGTERM, f"exit code {code}")
        run.start()


def look_at(tools, run, until):
    """Wait for a run to end, and note how."""
    code, found, log = run.end(until - time.monotonic()), tools.found, run.folder / "log.txt"
    stats = json.loads(log.read_text().splitlines()[-1]) if log.exists() else {}
    loss, memory = stats.get("train_loss", math.nan), stats.get("train_max_mem_mb", math.nan)
    right = code == 3 if run.name == "bad" else code == 0 and math.isfinite(loss)
    found.check(f"run_{run.name}", right, f"exit code {code}, loss {loss:.4f}, {memory:.0f} MB")
    if run.trouble():
        found.put(f"run_{run.name}_says", " | ".join(run.trouble()))
    if not right:
        print("\n".join(run.text().splitlines()[-25:]), flush=True)
    lines = [line for line in run.text().splitlines() if " img/s" in line]
    found.put(f"run_{run.name}_line", lines[-1] if lines else "")
    if "knn_top1" in stats:
        found.put(f"run_{run.name}_top1", stats["knn_top1"])


def runs(tools):
    torch, found, sizes = tools.torch, tools.found, tools.sizes
    batch, steps, limit = (4, 12, 430) if sizes.tiny else (32, 24, 95)
    until = time.monotonic() + limit
    with found.trying("photographs"):
        source = Path(photos(tools))
        folder = tools.out / "some"
        for i, path in enumerate(sorted(source.rglob("*.jpg"))[: batch * steps]):
            (folder / f"class{i % 4}").mkdir(parents=True, exist_ok=True)
            os.link(path, folder / f"class{i % 4}" / f"{i:05}.jpg")
    workers = 1 if sizes.tiny else 3
    flags = {"data_path": folder, "batch_size_per_gpu": batch, "num_workers": workers}
    accumulated = {"batch_size_per_gpu": batch // 2, "grad_accum_steps": 2}
    ways = {
        "straight": {},
        "again": {},
        "stopped": {},
        "fp16": {"amp_dtype": "fp16", **accumulated},
        "fp32": {"use_fp16": False},
        "checkpointed": {"grad_checkpointing": True},
        "knn": {"knn_every": 1},
        "bad": {"lr": 1e30, "max_bad_steps": 1},
    }
    with tools.alone():
        going, names = {}, [*ways]
        together = 2 if sizes.tiny else len(names)
        for first in range(0, len(names), together):
            side_by_side = names[first : first + together]
            with found.trying(f"side by side: {', '.join(side_by_side)}"):
                for name in side_by_side:
                    going[name] = Run(tools, name, **{**flags, **ways[name]})
                if "stopped" in side_by_side:
                    stop_and_go_on(tools, going["stopped"], until)
                for name in side_by_side:
                    look_at(tools, going[name], until)
        with found.trying("what they came to"):
            one = weights(going["straight"].folder / "checkpoint.pth", torch)
            for name in ("again", "stopped", "checkpointed", "fp16", "fp32"):
                same, gap = distance(one, weights(going[name].folder / "checkpoint.pth", torch))
                found.put(f"straight_and_{name}", {"same_bits": same, "distance": gap})
            same, gap = distance(one, weights(going["stopped"].folder / "checkpoint.pth", torch))
            found.check("resume_is_near", gap < 1e-2, f"same bits: {same}, distance {gap:.1e}")


# ---- section: several processes ----


def ranks(tools):
    """Two processes on one GPU over gloo, which nccl refuses; and one over nccl that takes itself for many."""
    found = tools.found
    for name, number in (("two_ranks", 2), ("nccl", 1)):
        with found.trying(name), tools.alone():
            given = tools.given
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
            asked = ["--checkout", given.checkout, "--scratch", given.scratch, "--device", given.device]
            asked += ["--child", name, *["--tiny"] * given.tiny]
            how = {"capture_output": True, "text": True, "timeout": 300 if given.tiny else 70}
            done = subprocess.run([*launcher, __file__, *asked], env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)
            print(done.stdout[-6000:])
            if done.returncode:
                print(done.stderr[-6000:])
            found.check(name, done.returncode == 0, f"exit code {done.returncode}")
            path = tools.out / f"{name}.json"
            if path.exists():
                inner = json.loads(path.read_text())
                found.numbers |= inner["numbers"]
                found.checks |= inner["checks"]
                found.errors |= inner["errors"]
                found.write()


def two_ranks(tools):
    """In each of two processes: gradients of half a batch each, added up, against one process's of the whole."""
    import torch.distributed as dist

    torch, utils, found = tools.torch, tools.utils, tools.found
    rank = int(os.environ["RANK"])
    found.path = found.path if rank == 0 else found.path.with_name(f"{found.path.stem}_1.json")
    if tools.cuda:
        torch.cuda.set_device(0)
        torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("gloo")
    for arch, more in (("vit_nano", {"use_bn_in_head": False}), ("resnet18", {"optimizer": "sgd"})):
        with found.trying(f"{arch} on two processes"), small(tools):
            tools.sizes.arch, tools.sizes.large, tools.sizes.small = arch, 64, 32
            args = tools.args(drop_path_rate=0.0, batch_size_per_gpu=8, **more)
            whole = tools.crops_of(16)
            mine = [crop[rank::2].contiguous() for crop in whole]
            mine = [crop.pin_memory() for crop in mine] if tools.cuda else mine

            def wrap(student, teacher):
                return tools.backbones.distribute(student, teacher, tools.device)

            together = Ours(tools, args, None, wrap)
            _, gradients = together.gradients(mine)
            kinds = {type(m).__name__ for m in together.student.modules() if "Norm" in type(m).__name__}
            found.put(f"ranks_norms_{arch}", sorted(kinds))
            if tools.cuda or arch == "vit_nano":  # on a CPU each process normalizes its own batch
                before = utils.get_world_size
                utils.get_world_size = lambda: 1
                try:
                    _, wanted = Ours(tools, args, None).gradients(whole)
                finally:
                    utils.get_world_size = before
                error, worst, where = relative(gradients, wanted)
                found.check(f"ranks_gradients_{arch}", error < 1e-3, f"{error:.1e}, worst {worst:.1e} of {where}")
            together.train(mine, 3)
            totals = torch.stack([p.detach().double().sum() for p in together.student.parameters()]).sum().cpu()
            everyone = [torch.zeros_like(totals) for _ in range(2)]
            dist.all_gather(everyone, totals)
            found.check(f"ranks_stay_alike_{arch}", everyone[0].equal(everyone[1]), [t.item() for t in everyone])
    dist.destroy_process_group()


class Many(int):
    """A number of processes that is one and takes itself for more, so that what several do is done."""

    def __gt__(self, other):
        return True

    def __eq__(self, other):
        return False

    __hash__ = int.__hash__


def nccl(tools):
    """train_dino with DistributedDataParallel and all collectives over nccl (gloo on a CPU), in one process."""
    utils, main_dino, found = tools.utils, tools.main_dino, tools.found
    with found.trying("train_dino as one process of many"):
        once = Many(1)
        utils.rank_from_environment = lambda url: (0, once, 0)
        utils.get_world_size = lambda: once
        initialize = utils.init_distributed_mode

        def with_plain_number(args):
            device = initialize(args)
            args.world_size = 1
            return device

        utils.init_distributed_mode = with_plain_number
        folder = tools.out / "nccl_photos"
        for i, path in enumerate(sorted(Path(photos(tools)).rglob("*.jpg"))[:40]):
            (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            os.link(path, folder / f"class{i % 2}" / path.name)
        flags = {"data_path": folder, "arch": "vit_nano", "patch_size": 8, "global_crops_size": 48}
        flags |= {"local_crops_size": 24, "local_crops_number": 2, "out_dim": 512, "batch_size_per_gpu": 8}
        flags |= {"epochs": 2, "warmup_epochs": 0, "num_workers": 1, "knn_every": 1, "device": tools.given.device}
        args = tools.args(**flags, output_dir=tools.out / "run_nccl")
        main_dino.train_dino(args)
        import torch.distributed as dist

        backend = dist.get_backend()
        last = json.loads((tools.out / "run_nccl" / "log.txt").read_text().splitlines()[-1])
        found.check("nccl_trains", math.isfinite(last["train_loss"]), f"{backend}, loss {last['train_loss']:.3f}")
        found.check("nccl_knn", "knn_top1" in last, last.get("knn_top1"))
        dist.destroy_process_group()


# ---- section: from files to the GPU ----


def files(tools):
    end_to_end(tools)
    loader(tools)


def end_to_end(tools):
    found, sizes = tools.found, tools.sizes
    workers = 2 if sizes.tiny else tools.given.workers
    with found.trying("photographs"):
        folder = photos(tools)
    for kind in {quickest(tools): 0, "pil": 0}:
        with found.trying(f"main_dino.py, {workers} loaders, {kind}"), tools.alone():
            flags = {"data_path": folder, "augmentation": kind, "num_workers": workers}
            run = Run(tools, f"end_{kind}", **flags, batch_size_per_gpu=sizes.batch)
            code = run.end(70)
            pattern = r"\[ *(\d+)/\d+\].*?([\d.e+]+) img/s  \d+ MB(?:  wait (\d+)%)?"
            lines = [(int(i), float(speed), int(waits or 0)) for i, speed, waits in re.findall(pattern, run.text())]
            found.check(f"end_{kind}", code == 0 and lines, f"exit code {code}")
            # Before the first step each loader has made two batches: the first lines tell of those.
            later = [speed for i, speed, _ in lines if i >= 80] or [speed for _, speed, _ in lines]
            first = lines[0][1]
            numbers = {"images_s": statistics.median(later), "first_line": first, "says_waiting_percent": lines[-1][2]}
            found.put(f"end_to_end_{kind}", numbers)
            if run.trouble():
                found.put(f"end_{kind}_says", " | ".join(run.trouble()))
            if code:
                print("\n".join(run.text().splitlines()[-25:]), flush=True)


def loader(tools):
    import dino_data

    found, sizes = tools.found, tools.sizes
    workers = 2 if sizes.tiny else tools.given.workers
    folder = photos(tools)
    for kind in {quickest(tools): 0, "pil": 0}:
        with found.trying(f"{workers} loaders alone, {kind}"), tools.alone():
            args = tools.args(data_path=folder, augmentation=kind, batch_size_per_gpu=sizes.batch, num_workers=workers)
            images = dino_data.find_images(folder)
            augment = tools.main_dino.DataAugmentationDINO(
                args.global_crops_scale,
                args.local_crops_scale,
                args.local_crops_number,
                global_crops_size=args.global_crops_size,
                local_crops_size=args.local_crops_size,
                augmentation=kind,
                as_uint8=True,
            )
            batches = dino_data.training_loader(images, augment, args, tools.device)
            skipped, wanted, host = 2 * workers, (4 if sizes.tiny else 30), []
            for i, (crops, *_) in enumerate(batches):
                if i >= skipped:  # the queues are full at first
                    host.append(time.perf_counter())
                if i >= skipped + wanted:
                    break
                kept = [crop.to(tools.device, non_blocking=True) for crop in crops]
            del kept
            seconds = (host[-1] - host[0]) / max(len(host) - 1, 1)
            found.put(f"loader_{kind}_images_s", sizes.batch / seconds)
            found.check(f"loader_{kind}_pinned", crops[0].is_pinned() == tools.cuda)
            batches._iterator = None


# ---- others: nearest neighbors ----


def knn(tools):
    import dino_features

    torch, found, device = tools.torch, tools.found, tools.device
    shapes = {"50k_10k": (50_000, 10_000), "imagenet_10k": (1_281_167, 10_000)}
    shapes = {"small": (5_000, 500)} if tools.sizes.tiny else shapes
    for name, (train, test) in shapes.items():
        with found.trying(f"{test} among {train}"), tools.alone():
            generator = torch.Generator(device=device).manual_seed(0)
            points = torch.randn(1000, 384, generator=generator, device=device)
            task = []
            for number in (train, test):
                labels = torch.randint(1000, (number,), generator=generator, device=device)
                noise = torch.randn(number, 384, generator=generator, device=device)
                task += [torch.nn.functional.normalize(points[labels] + 3 * noise, dim=1), labels]
            tools.reset_peak()
            dino_features.knn_accuracies(*task[:2], *(t[:64] for t in task[2:]), [20], 0.07)
            tools.sync()
            began = time.perf_counter()
            accuracies = dino_features.knn_accuracies(*task, [10, 20, 100, 200], 0.07)
            tools.sync()
            found.put(f"knn_{name}", {"seconds": time.perf_counter() - began, "peak_mb": tools.peak_mb()})
            if train <= 50_000:
                some = [t.cpu() for t in task]
                on_cpu = dino_features.knn_accuracies(*some[:2], *(t[:500] for t in some[2:]), [20], 0.07)[20]
                here = dino_features.knn_accuracies(*task[:2], *(t[:500] for t in task[2:]), [20], 0.07)[20]
                near = abs(on_cpu[0] - here[0]) <= 0.4
                found.check("knn_as_on_the_cpu", near, f"{here} and {on_cpu}; of all {accuracies[20]}")
        tools.free()


# ---- others: a convnet ----


def resnet(tools):
    torch, found, sizes = tools.torch, tools.found, tools.sizes
    arch, batch = ("resnet18", 4) if sizes.tiny else ("resnet50", 64)
    sizes.arch = arch
    if sizes.tiny:  # 16 pixels end as one, where oneDNN's bf16 leaves weights' gradients unwritten
        sizes.large, sizes.small = 64, 32
    with found.trying(f"{arch}, bf16"):
        ours = Ours(tools, tools.args(optimizer="sgd", lr=0.03), torch.bfloat16)
        found.put(f"{arch}_bf16_{batch}", ours.speed(batch, 8, 4))
    with found.trying(f"{arch}, fp16 and SGD with a scaler"):
        ours = Ours(tools, tools.args(optimizer="lars"), torch.float16)
        found.check(f"{arch}_fp16_lars", math.isfinite(ours.train(tools.crops_of(8), 3)["loss"]))


# ---- others: the same bits again ----


def deterministic(tools):
    torch, found, sizes = tools.torch, tools.found, tools.sizes
    batch, steps = (4, 3) if sizes.tiny else (16, 4)
    ours = Ours(tools, tools.args(), torch.bfloat16)
    start = [{k: v.clone() for k, v in network.state_dict().items()} for network in (ours.student, ours.teacher)]
    states = []
    with found.trying(f"{steps} steps twice"):
        for _ in range(2):
            ours.student.load_state_dict(start[0])
            ours.teacher.load_state_dict(start[1])
            ours.loss.center.zero_()
            ours.optimizer.state.clear()
            ours.train(tools.crops_of(batch), steps, lr=1e-3)
            states.append({k: v.cpu() for k, v in ours.student.state_dict().items()})
        same, gap = distance(*states)
        found.put("twice", {"same_bits": same, "distance": gap})
    with found.trying("operations that torch calls nondeterministic"):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                ours.train(tools.crops_of(batch), 2)
            finally:
                torch.use_deterministic_algorithms(False)
        names = {str(w.message).split(" does not")[0][:90] for w in seen if "deterministic" in str(w.message)}
        found.put("nondeterministic", sorted(names))


# ---- section: the paper's tables ----


def tables(tools):
    torch, found, sizes = tools.torch, tools.found, tools.sizes
    for number in (0, 2, 6, 10):  # table 8
        with found.trying(f"2 global + {number} local crops"):
            sizes.locals = number
            ours = Ours(tools, tools.args(), torch.bfloat16)
            found.put(f"table8_{number}_local_{sizes.batches[-1]}", ours.speed(sizes.batches[-1], 8, 3))
            del ours
    networks = {"vit_small": (16, 8), "vit_base": (16, 8), "resnet50": (None,)}  # table 1
    for arch, patches in ({"vit_nano": (8,)} if sizes.tiny else networks).items():
        for patch in patches:
            with found.trying(f"inference, {arch}, patches of {patch}"), tools.alone():
                model, _ = tools.backbones.build_backbone(arch, patch or 16, sizes.large)
                model = tools.backbones.prepare_for_evaluation(model, tools.device)
                images = torch.randn(4 if sizes.tiny else 128, 3, sizes.large, sizes.large, device=tools.device)
                for name, amp_dtype in (("fp32", None), ("bf16", torch.bfloat16)):

                    def forward(model=model, images=images, amp_dtype=amp_dtype):
                        with torch.autocast(tools.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                            model(images)

                    ms = tools.milliseconds(forward, 5)
                    found.put(f"table1_{arch}_{patch}_{name}_images_s", 1e3 * len(images) / ms)


# ---- in the background: torch.compile ----


def compiled(tools):
    found, sizes, bf16 = tools.found, tools.sizes, tools.torch.bfloat16
    crops = tools.crops_of(sizes.batches[-1])
    with found.trying("eager"):
        eager = Ours(tools, tools.args(), bf16)
        losses = [eager.train(crops, 1)["loss"] for _ in range(3)]
        del eager
        tools.free()
    with found.trying("--compile true"):
        args = tools.args(compile=True)
        ours = Ours(tools, args, bf16)
        ours.loss.terms = tools.torch.compile(ours.loss.terms, dynamic=False)  # as train_dino does
        began = time.perf_counter()
        mine = [ours.train(crops, 1)["loss"] for _ in range(3)]
        tools.sync()
        found.put("compile_seconds", time.perf_counter() - began)
        gap = max(abs(a - b) / b for a, b in zip(mine, losses, strict=True))
        found.check("compile_gives_the_losses", gap < 5e-3, f"{gap:.1e}: {mine}, eager {losses}")
        found.put(f"ours_compiled_{sizes.batches[-1]}", ours.speed(sizes.batches[-1]))
        ours.train(tools.crops_of(sizes.batch), 2)  # compiles again
        tools.sync()
        found.put(f"ours_compiled_{sizes.batch}", ours.speed(sizes.batch))
    with found.trying("where the time goes, compiled"):
        profile(tools, ours, "compiled")


# ---- the parent ----


def start_child(given, section):
    asked = ["--checkout", given.checkout, "--scratch", given.scratch, "--device", given.device, "--child", section]
    asked += ["--workers", str(given.workers), "--photos", given.photos, *["--tiny"] * given.tiny]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if section == BACKGROUND:
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": str(max(given.workers // 2, 1))}
    with open(Path(given.scratch) / f"{section}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), *asked],
            stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip


def stop(process):
    """End a child and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(process, began, seconds):
    """How a child process ended. It is stopped after `seconds`."""
    try:
        code = process.wait(max(seconds, 1))
        return "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {time.monotonic() - began:.0f} s"
    finally:
        stop(process)


def parent(given):
    given.checkout, given.out = os.path.abspath(given.checkout), os.path.abspath(given.out)
    os.makedirs(given.out, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # then too the tables are printed
    states, took, background, patience = {}, {}, None, 4 if given.tiny else 1
    end = BEGAN + given.budget
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as given.scratch:
        try:
            for section, (limit, least) in SECTIONS.items():
                if section not in given.only:
                    continue
                began, left = time.monotonic(), end - time.monotonic()
                if left < least:
                    states[section] = "left out: no time"
                    continue
                print(f"{section} (at {began - BEGAN:.0f} s)", flush=True)
                if section in ("runs", "ranks", "numerics") and background is None and BACKGROUND in given.only:
                    background, background_began = start_child(given, BACKGROUND), time.monotonic()
                states[section] = wait(start_child(given, section), began, min(limit * patience, left))
                took[section] = round(time.monotonic() - began, 1)
                gather(given, states, took)
            if BACKGROUND in given.only:
                if background is None:
                    background, background_began = start_child(given, BACKGROUND), time.monotonic()
                left = min(end, background_began + COMPILE_LIMIT * patience) - time.monotonic()
                states[BACKGROUND] = wait(background, background_began, left)
                took[BACKGROUND] = round(time.monotonic() - background_began, 1)
        finally:
            if background:
                stop(background)
                states.setdefault(BACKGROUND, "stopped")
            report(given, gather(given, states, took), states, took)


def gather(given, states, took):
    """All that is known by now, in two files."""
    found = {"states": states, "seconds": took, "all_seconds": round(time.monotonic() - BEGAN, 1)}
    scratch, out, said = Path(given.scratch), Path(given.out), []
    for section in [*SECTIONS, BACKGROUND]:
        path, log = scratch / f"{section}.json", scratch / f"{section}.log"
        if path.exists():
            found[section] = json.loads(path.read_text())
        if log.exists():
            said.append(f"{'=' * 20} {section}\n{log.read_text(errors='replace')[-200_000:]}")
    (out / "gpu_check.json").write_text(json.dumps(found, indent=1))
    (out / "gpu_check.log").write_text("\n".join(said))
    return found


def report(given, found, states, took):
    """What was found, on the screen; what matters most comes last."""
    numbers = {k: v for section in states for k, v in found.get(section, {}).get("numbers", {}).items()}
    steps = {k: v for k, v in numbers.items() if isinstance(v, dict) and "images_s" in v}
    print("\n" + "=" * 100)
    for section, state in states.items():
        print(f"{section:14} {state:24} {took.get(section, 0):6.1f} s")
    print("\nnumbers")
    for name, value in numbers.items():
        if name not in steps and not name.endswith("_top"):
            print(f"  {name}: {shown(value)}")
    print("\nchecks")
    for section in states:
        for name, (right, detail) in found.get(section, {}).get("checks", {}).items():
            print(f"  {'ok  ' if right else 'FAIL'} {name}  {detail[:110]}")
    for section in states:
        for what, text in found.get(section, {}).get("errors", {}).items():
            print(f"  ERROR in {section}, {what}: {text.splitlines()[0]}")
            print("    " + "\n    ".join(text.splitlines()[-4:]))
    for section, state in states.items():
        log = Path(given.scratch) / f"{section}.log"
        if state != "done" and log.exists():
            print(f"\nlast lines of {section}:\n  " + "\n  ".join(log.read_text(errors="replace").splitlines()[-8:]))
    speeds(given, numbers, steps)
    print(f"\n{found['all_seconds']} s in all; everything is in {given.out}", flush=True)


def speeds(given, numbers, steps):
    """The table of steps, and how many times as fast as the plain one they are."""
    peak, batch = numbers.get("tflops_bf16") or numbers.get("tflops_fp32"), Sizes(given.tiny).batch
    if steps:
        print(f"\n{'training':34} images/s      ms   of peak   peak MB  MB/image")
    for name, step in steps.items():
        kind = "_vit_base" * ("_base_" in name) + "_resnet50" * ("resnet50" in name)
        flop = numbers.get(f"gflop_image{kind}")
        share = f"{step['images_s'] * flop / peak / 10:7.1f} %" if flop and peak else "        -"
        images = int((re.findall(r"_(\d+)$", name) or [0])[0])
        each = step.get("peak_mb", math.nan) / images if images else math.nan
        cells = (step["images_s"], step.get("ms", math.nan), share, step.get("peak_mb", math.nan), each)
        print("{:34} {:8.1f} {:7.2f} {} {:9.0f} {:9.1f}".format(name, *cells))
    for over in (f"plain_fp16_{batch}", f"plain_bf16_{batch}"):
        if over in steps:
            ratios = {k: v["images_s"] / steps[over]["images_s"] for k, v in steps.items() if k.endswith(f"_{batch}")}
            print(f"times {over}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))


def main():
    given = parse()
    if not given.child:
        parent(given)
        return
    tools = Tools(given)
    section = {BACKGROUND: compiled}.get(given.child) or globals()[given.child]
    section(tools)
    tools.found.write()


if __name__ == "__main__":
    main()
