"""Check and measure this code on one GPU: numbers, speed, memory. Under six minutes on an H100.

    python tests/gpu/gpu_check.py --out results                              # everything
    python tests/gpu/gpu_check.py --out results --only numerics step         # some sections
    python tests/gpu/gpu_check.py --out results --only compile               # has time for each way to compile
    python tests/gpu/gpu_check.py --out results --device cpu --tiny          # small networks on a CPU, to try it

Each section runs in its own process with a time limit and writes each result at once: a section that fails or is
stopped costs no other. Sections that time something run alone; `compile` runs beside the others, and a lock keeps its
measurement apart. Writes gpu_check.json (all numbers) and gpu_check.log (the output of the sections) into --out, and
prints tables at the end. Photographs and checkpoints go to a temporary folder.

The training steps, the baseline `plain` among them, and the way to measure them are in benchmark.py and
dino_steps.py of the checkout.
"""

import argparse
import contextlib
import cProfile
import fcntl
import gc
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
from functools import partial
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
COMPILE_LIMIT = 340


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
    parser.add_argument("--until", default=math.inf, type=float, help=argparse.SUPPRESS)  # by time.monotonic()
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
    """The sizes to measure: the paper's ViT-S/16 on 2 crops of 224 and 8 of 96 pixels; or, tiny, next to nothing."""

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
        of_size["batch_size_per_gpu"] = self.batch
        return {**of_size, "freeze_last_layer": 0, "tensorboard": "off", **others}


# ---- the child's tools ----


class Tools:
    """What the sections share. Everything of the checkout is imported here, by its path."""

    def __init__(self, given):
        sys.path.insert(0, os.path.abspath(given.checkout))
        import torch

        import benchmark
        import dino_backbones
        import dino_steps
        import main_dino
        import utils

        self.torch, self.main_dino, self.utils, self.backbones = torch, main_dino, utils, dino_backbones
        self.benchmark, self.steps = benchmark, dino_steps
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

    def milliseconds(self, call, repeats=20, warm=3):
        """Median time of a call on the device."""
        return self.milliseconds_of(self.benchmark.repeat(call), repeats, warm)

    def milliseconds_of(self, work, repeats=20, warm=3):
        """Median time of a step of some work (see benchmark.repeat) on the device."""
        return 1e3 * self.benchmark.measure(work, warm, repeats if self.cuda else 3).seconds

    def args(self, precision="bf16", **flags):
        """main_dino.py's arguments for a precision that has a name in benchmark.py, the sizes, and more flags."""
        about = {"output_dir": self.out, "device": self.device.type, **self.benchmark.PRECISION_FLAGS[precision]}
        return self.steps.training_args(**self.sizes.flags(**{**about, **flags}))

    def ours(self, precision="bf16", wrap=None, **flags):
        return self.steps.OurTraining(self.args(precision, **flags), wrap or (lambda *networks: networks))

    def crops_of(self, batch, args=None):
        """Crops as a loader returns them: uint8 [B, 3, h, w], pinned."""
        crops = self.steps.random_crops(args or self.args(), batch)
        return [crop.pin_memory() for crop in crops] if self.cuda else crops

    def speed(self, training, batch, steps=None, warm=None):
        """{images/s, ms per step, peak MB} at a batch size. At 2 the ms are what the host takes to launch it all."""
        work = self.benchmark.steps_of(training, self.steps.random_crops(training.args, batch))
        self.free()
        with self.alone():
            warm = self.sizes.warm if warm is None else warm
            seconds, peak_mb, _ = self.benchmark.measure(work, warm, steps or self.sizes.steps)
        return {"images_s": batch / seconds, "ms": seconds * 1e3, "peak_mb": peak_mb}

    def has_time(self, what, seconds):
        """Whether this section may run for that long. If not, print its name."""
        if self.given.until - time.monotonic() > seconds:
            return True
        print(f"  left out, no time: {what}", flush=True)
        return False


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def gradients_of(ours, crops):
    """(loss, {name: gradient}) of one step of an OurTraining, which is then left out."""
    import dino_run

    class Looking(dino_run.Bare):
        def vote(self, loss):
            self.loss = loss

        def skips(self, step):
            return True

    run, scaler = Looking(ours.args, 1), ours.parts.fp16_scaler
    ours.train(crops, 1, run=run)
    scale = scaler.get_scale() if scaler.is_enabled() else 1.0
    named = ours.parts.student.named_parameters()
    grads = {n.removeprefix("module."): p.grad.double().cpu() / scale for n, p in named if p.grad is not None}
    return run.loss, grads


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
    kind, names = tools.device.type, {"bf16": "bf16", "fp16": "fp16", "fp32": "float32", "tf32": "tf32"}
    if tiny:
        tools.benchmark.SIDES[kind] = 256
    side = tools.benchmark.SIDES[kind]
    for name in names if tools.cuda else ("fp32",):
        with found.trying(f"products of {side}³ in {name}"), tools.alone():
            ms = tools.milliseconds_of(tools.benchmark.matrix_product(kind, names[name]))
            found.put(f"tflops_{name}", 2 * side**3 / ms / 1e9)
    with found.trying("products as a ViT-S has them, bf16"), tools.alone():
        dtype, rows = (torch.bfloat16, 64 * 394) if tools.cuda else (torch.float32, 64)
        for wide, narrow in ((1152, 384), (384, 384), (1536, 384), (384, 1536)):
            x, w = torch.randn(rows, narrow, device=tools.device), torch.randn(wide, narrow, device=tools.device)
            x, w, bias = x.to(dtype), w.to(dtype), torch.randn(wide, device=tools.device).to(dtype)
            ms = tools.milliseconds(lambda x=x, w=w, bias=bias: torch.nn.functional.linear(x, w, bias))
            found.put(f"tflops_linear_{narrow}_{wide}", 2 * rows * wide * narrow / ms / 1e9)
    with found.trying("memory"), tools.alone():
        gigabytes = 0.004 if tiny else 2
        ms = tools.milliseconds_of(tools.benchmark.memory_copy(kind, gigabytes))
        found.put("copy_tb_s", 2 * gigabytes / ms)
        if tools.cuda:
            host = torch.empty(2**26, dtype=torch.uint8).pin_memory()
            there = torch.empty_like(host, device=tools.device)
            ms = tools.milliseconds(lambda: there.copy_(host, non_blocking=True))
            found.put("to_device_gb_s", host.nbytes / ms / 1e6)
    with found.trying("operations of a step"):
        for name, arch in {"": tools.sizes.arch, "_vit_base": "vit_base", "_resnet50": "resnet50"}.items():
            if not (tiny and name):
                args = tools.args(arch=arch)
                found.put(f"gflop_image{name}", tools.steps.useful_flop(args, 2) / 2e9)


# ---- section: the numbers ----


def reference(tools, ours, crops):
    """(loss, {name: gradient}) of a step in float64 on the CPU, attention written out, all pairs one by one."""
    networks = []
    for source in (ours.parts.student, ours.parts.teacher):
        network = tools.steps.plain_network(ours.args)
        network.load_state_dict({k.removeprefix("module."): v.cpu() for k, v in source.state_dict().items()})
        networks.append(network.double())
    student, teacher = networks
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not name.endswith("weight_g"))
    views = [tools.utils.normalize(crop).double() for crop in crops]
    with tools.torch.no_grad():
        taught = teacher(views[:2])
    center = ours.parts.dino_loss.center.double().cpu()
    loss = tools.steps.plain_loss(student(views).chunk(len(views)), taught.chunk(2), center)
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
        for parameter in ours.parts.student.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
        center = ours.parts.dino_loss.center
        center += 0.1 * torch.randn(center.shape, generator=generator).to(tools.device)


def numerics(tools):
    with small(tools):
        against_float64(tools)
        on_both_devices(tools)
        with_a_scaler(tools)
    other_functions(tools)


def against_float64(tools):
    torch, found = tools.torch, tools.found
    precisions = {"fp32": ("float32", 5e-5), "bf16": ("bf16", 6e-2), "fp16": ("fp16", 1e-2)}
    for name, (precision, tolerance) in precisions.items():
        with found.trying(f"a step's loss and gradients in {name} against float64"):
            ours = tools.ours(precision, drop_path_rate=0.0, batch_size_per_gpu=8, norm_last_layer=True)
            apart(tools, ours)
            crops = tools.crops_of(8)
            wanted_loss, wanted = reference(tools, ours, crops)
            for tf32 in (True, False) if tools.cuda and name == "fp32" else (True,):
                torch.backends.cudnn.allow_tf32 = tf32
                loss, gradients = gradients_of(ours, crops)
                error, worst, where = relative(gradients, wanted)
                loss_error = abs(loss.item() - wanted_loss) / wanted_loss
                suffix = "" if tf32 else "_without_tf32_convolutions"
                found.put(f"error_{name}{suffix}", {"loss": loss_error, "gradient": error, "worst": worst, "of": where})
                strict = not tf32 or not tools.cuda or name != "fp32"
                right = error < (tolerance if strict else 2e-3) and loss_error < (tolerance if strict else 2e-3)
                found.check(f"gradients_{name}{suffix}", right, f"{error:.1e} (loss {loss_error:.1e})")
            torch.backends.cudnn.allow_tf32 = True
            norms = tools.utils.clip_gradients(ours.parts.student, 0.01)
            found.check(f"clip_{name}", torch.isfinite(norms).all().item() and norms.device.type == tools.device.type)
        if name != "fp32":
            with found.trying(f"the plain step's gradients in {name} against float64, to compare"):
                student, teacher = (tools.steps.plain_network(ours.args).to(tools.device) for _ in range(2))
                student.load_state_dict(ours.parts.student.state_dict())
                teacher.load_state_dict(ours.parts.teacher.state_dict())
                views = [tools.utils.normalize(crop.to(tools.device)) for crop in crops]
                with ours.autocast:
                    with torch.no_grad():
                        taught = teacher(views[:2]).chunk(2)
                    seen = student(views).chunk(len(views))
                    loss = tools.steps.plain_loss(seen, taught, ours.parts.dino_loss.center)
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
                ours = tools.ours("float32", drop_path_rate=0.0, batch_size_per_gpu=8, grad_accum_steps=2)
                losses.append([ours.train(tools.crops_of(16), 1, lr=1e-3)["loss"] for _ in range(5)])
            finally:
                tools.device, tools.cuda = before, cuda
        tools.torch.backends.cudnn.allow_tf32 = True
        gap = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
        found.check("trajectory_fp32", gap < 1e-3, f"{gap:.1e} apart after 5 steps in 2 passes: {losses[0]}")


def with_a_scaler(tools):
    torch, found = tools.torch, tools.found
    with found.trying("fp16 with its scaler"):
        ours = tools.ours("fp16", batch_size_per_gpu=8)

        def start_scale_at(scale):
            ours.parts = ours.parts._replace(fp16_scaler=torch.amp.GradScaler(tools.device.type, init_scale=scale))

        means = ours.train(tools.crops_of(8), 8, lr=1e-3)
        scale = ours.parts.fp16_scaler.get_scale()
        found.check("fp16_trains", math.isfinite(means["loss"]), f"loss {means['loss']:.3f}, scale {scale:g}")
        start_scale_at(2.0**60)
        before = [p.clone() for p in ours.parts.student.parameters()]
        ours.train(tools.crops_of(8), 3, lr=1e-3)
        still = all(torch.equal(a, b) for a, b in zip(before, ours.parts.student.parameters(), strict=True))
        scale = ours.parts.fp16_scaler.get_scale()
        found.check("fp16_overflow_is_skipped", still and scale == 2.0**57, f"2^{math.log2(scale):g}")
        start_scale_at(1024.0)
        ours.train(tools.crops_of(8), 1, lr=1e-3)
        moved = not all(torch.equal(a, b) for a, b in zip(before, ours.parts.student.parameters(), strict=True))
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
    found, sizes, ours, steps = tools.found, tools.sizes, None, tools.steps
    with found.trying("ours, bf16"):
        ours = tools.ours()
        for batch in sizes.batches:
            found.put(f"ours_bf16_{batch}", tools.speed(ours, batch))
    if ours:
        with found.trying("waits for the device, by torch's own count"):
            count_syncs(tools, ours)
        with found.trying("ours, bf16, again, for the spread"):
            found.put(f"ours_bf16_again_{sizes.batch}", tools.speed(ours, sizes.batch))
    for precision, batches in {"fp16": (sizes.batch, sizes.batches[-1]), "bf16": (sizes.batch,)}.items():
        with found.trying(f"plain, {precision}"):
            plain = steps.PlainTraining(tools.args(precision))
            for batch in batches:
                found.put(f"plain_{precision}_{batch}", tools.speed(plain, batch))
            del plain
    if not sizes.tiny:
        with found.trying("ViT-B/16"):
            found.put("ours_base_bf16_64", tools.speed(tools.ours(arch="vit_base"), 64, 8, 3))
    with found.trying("ours, fp16"):
        found.put(f"ours_fp16_{sizes.batch}", tools.speed(tools.ours("fp16"), sizes.batch))
    for name, precision in {"fp32": "float32", "tf32": "tf32"}.items():
        if tools.cuda or name == "fp32":
            with found.trying(f"ours, {name}"):
                found.put(f"ours_{name}_{sizes.batch}", tools.speed(tools.ours(precision), sizes.batch, 4, 2))
    if ours:
        with found.trying("ours, bf16, checkpointed"):
            ours.parts.student.backbone.set_grad_checkpointing()
            for batch in (sizes.batch, sizes.batches[-1]):
                found.put(f"ours_bf16_checkpointed_{batch}", tools.speed(ours, batch))
            ours.parts.student.backbone.set_grad_checkpointing(False)
        with found.trying("where the time goes"):
            profile(tools, ours, "eager")


def count_syncs(tools, ours):
    """How often the host waits in 20 steps, and from which lines; a wait for an event is none by torch's count."""
    if tools.cuda:
        crops = tools.crops_of(tools.sizes.batch)
        ours.train(crops, 2)
        median, places = tools.benchmark.host_waits(partial(ours.train, crops), 20)
        tools.found.put("syncs_in_20_steps", {"all": sum(places.values()), **places})
        tools.found.check("no_sync_in_a_step_that_is_not_logged", median == 0, f"median {median}")


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

    steps, crops = 3, tools.crops_of(ours.args.batch_size_per_gpu, ours.args)
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
        ours = tools.ours()
        gradients_of(ours, tools.crops_of(sizes.batches[1]))
        utils, main_dino = tools.utils, tools.main_dino
        student, teacher = (list(network.parameters()) for network in (ours.parts.student, ours.parts.teacher))
        pieces = {
            "clip": lambda: utils.clip_gradients(student, 3.0),
            "optimizer": ours.parts.optimizer.step,
            "teacher": lambda: main_dino.update_teacher(teacher, student, 0.996),
        }
        for name, work in pieces.items():
            device_ms = tools.milliseconds(work)
            host = statistics.median(seconds_of(work) for _ in range(10)) * 1e3
            tools.sync()
            found.put(f"after_{name}", {"ms": device_ms, "host_ms": host})
        seeding = partial(utils.seed_step, 7, 0)
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
    """A folder of class folders with JPEG files as large as ImageNet's; made once, by the section that is first."""
    folder = tools.out / "photos"
    if not folder.exists():
        number = 96 if tools.sizes.tiny else 10_240
        made = tools.benchmark.image_folder(tools.out, tools.given.photos or "sample", number, classes=4)
        Path(made).rename(folder)
    return str(folder)


class Run:
    """A process of main_dino.py, its output in a file."""

    def __init__(self, tools, name, **flags):
        self.tools, self.name, self.began = tools, name, time.monotonic()
        self.folder, self.log = tools.out / f"run_{name}", tools.out / f"run_{name}.log"
        defaults = {"epochs": 1, "warmup_epochs": 0, "saveckp_freq": 0, "augmentation": tools.benchmark.fast_or_pil()}
        defaults |= {"device": tools.given.device, "output_dir": self.folder}
        settings = tools.sizes.flags(**{**defaults, **flags})
        self.words = [sys.executable, "-u", "main_dino.py", *tools.steps.flags_of(**settings)]
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
        folder = tools.benchmark.image_folder(tools.out, photos(tools), batch * steps, classes=4)
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
            flags = {"drop_path_rate": 0.0, "batch_size_per_gpu": 8, **more}
            whole = tools.crops_of(16)
            mine = [crop[rank::2].contiguous() for crop in whole]
            mine = [crop.pin_memory() for crop in mine] if tools.cuda else mine

            def wrap(student, teacher):
                return tools.backbones.distribute(student, teacher, tools.device)

            together = tools.ours("float32", wrap, **flags)
            _, gradients = gradients_of(together, mine)
            kinds = {type(m).__name__ for m in together.parts.student.modules() if "Norm" in type(m).__name__}
            found.put(f"ranks_norms_{arch}", sorted(kinds))
            if tools.cuda or arch == "vit_nano":  # on a CPU each process normalizes its own batch
                before = utils.get_world_size
                utils.get_world_size = lambda: 1
                try:
                    _, wanted = gradients_of(tools.ours("float32", **flags), whole)
                finally:
                    utils.get_world_size = before
                error, worst, where = relative(gradients, wanted)
                # Batch norms on small maps enlarge rounding: 0.7e-3 and 1.5e-3 were measured. Not synchronized: 0.8.
                most = 1e-3 if arch == "vit_nano" else 1e-2
                found.check(f"ranks_gradients_{arch}", error < most, f"{error:.1e}, worst {worst:.1e} of {where}")
            together.train(mine, 3)
            totals = torch.stack([p.detach().double().sum() for p in together.parts.student.parameters()]).sum().cpu()
            everyone = [torch.zeros_like(totals) for _ in range(2)]
            dist.all_gather(everyone, totals)
            found.check(f"ranks_stay_alike_{arch}", everyone[0].equal(everyone[1]), [t.item() for t in everyone])
    tools.utils.leave_processes()


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
        folder = tools.benchmark.image_folder(tools.out, photos(tools), 40, classes=2)
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
    for kind in {tools.benchmark.fast_or_pil(): 0, "pil": 0}:
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
    for kind in {tools.benchmark.fast_or_pil(): 0, "pil": 0}:
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

    found, device = tools.found, tools.device
    shapes = {"50k_10k": (50_000, 10_000), "imagenet_10k": (1_281_167, 10_000)}
    shapes = {"small": (5_000, 500)} if tools.sizes.tiny else shapes
    for name, (train, test) in shapes.items():
        with found.trying(f"{test} among {train}"), tools.alone():
            *task, _, _ = tools.benchmark.knn_task(device, train, test, 384, 1000, [])
            search = partial(dino_features.knn_accuracies, *task, [10, 20, 100, 200], 0.07)
            seconds, peak_mb, _ = tools.benchmark.measure(tools.benchmark.repeat(search))
            found.put(f"knn_{name}", {"seconds": seconds, "peak_mb": peak_mb})
            if train <= 50_000:
                some = [t.cpu() for t in task]
                on_cpu = dino_features.knn_accuracies(*some[:2], *(t[:500] for t in some[2:]), [20], 0.07)[20]
                here = dino_features.knn_accuracies(*task[:2], *(t[:500] for t in task[2:]), [20], 0.07)[20]
                near = abs(on_cpu[0] - here[0]) <= 0.4
                found.check("knn_as_on_the_cpu", near, f"{here} and {on_cpu}")
        tools.free()


# ---- others: a convnet ----


def resnet(tools):
    found, sizes = tools.found, tools.sizes
    arch, batch = ("resnet18", 4) if sizes.tiny else ("resnet50", 64)
    sizes.arch = arch
    if sizes.tiny:  # 16 pixels end as one, where oneDNN's bf16 leaves weights' gradients unwritten
        sizes.large, sizes.small = 64, 32
    with found.trying(f"{arch}, bf16"):
        found.put(f"{arch}_bf16_{batch}", tools.speed(tools.ours(optimizer="sgd", lr=0.03), batch, 8, 4))
    with found.trying(f"{arch}, fp16 and SGD with a scaler"):
        ours = tools.ours("fp16", optimizer="lars")
        found.check(f"{arch}_fp16_lars", math.isfinite(ours.train(tools.crops_of(8), 3)["loss"]))


# ---- others: the same bits again ----


def deterministic(tools):
    torch, found, sizes = tools.torch, tools.found, tools.sizes
    batch, steps = (4, 3) if sizes.tiny else (16, 4)
    ours = tools.ours()
    student, teacher, loss, optimizer, _ = ours.parts
    start = [{k: v.clone() for k, v in network.state_dict().items()} for network in (student, teacher)]
    states = []
    with found.trying(f"{steps} steps twice"):
        for _ in range(2):
            student.load_state_dict(start[0])
            teacher.load_state_dict(start[1])
            loss.center.zero_()
            optimizer.state.clear()
            ours.train(tools.crops_of(batch), steps, lr=1e-3)
            states.append({k: v.cpu() for k, v in student.state_dict().items()})
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
    found, sizes, benchmark, batch = tools.found, tools.sizes, tools.benchmark, tools.sizes.batches[-1]
    for number in (0, 2, 6, 10):  # table 8
        with found.trying(f"2 global + {number} local crops"):
            sizes.locals = number
            speed = tools.speed(tools.ours(), batch, 8, 3)
            found.put(f"table8_{number}_local_{batch}", speed)
            found.put(f"table8_{number}_local_hours", benchmark.imagenet_hours(speed["images_s"]))
    images = 4 if sizes.tiny else 128
    for arch, patch in [("vit_nano", 8)] if sizes.tiny else benchmark.NETWORKS:  # table 1
        with found.trying(f"inference, {arch}, patches of {patch}"), tools.alone():
            for name, precision in {"fp32": "float32", "bf16": "bf16"}.items():
                work = benchmark.forward_pass(tools.device.type, precision, images, arch, patch, sizes.large)
                found.put(f"table1_{arch}_{patch}_{name}_images_s", 1e3 * images / tools.milliseconds_of(work, 5))


# ---- in the background: torch.compile ----


def compiled(tools):
    """Cold starts and speeds. Parts that begin late are left out."""
    found, sizes, largest = tools.found, tools.sizes, tools.sizes.batches[-1]
    with found.trying("eager"):
        eager = tools.ours()
        losses = [eager.train(tools.crops_of(largest), 1)["loss"] for _ in range(3)]
        del eager
        tools.free()
    with found.trying("--compile true"):
        ours = tools.ours("compiled")
        first_steps(tools, "compile", ours, losses)
        profile(tools, ours, "compiled")
        del ours
    # Each block has its own drop path rate, a constant of its graph. Without drop path, blocks share graphs.
    variants = {"compile_blocks": 0.1} if sizes.tiny else {"compile_blocks": 0.1, "compile_blocks_no_drop_path": 0.0}
    for name, rate in variants.items():
        if tools.has_time(name, 60):
            with found.trying(f"one graph per block, drop path {rate}"):
                ours = tools.ours(wrap=per_block, drop_path_rate=rate)
                ours.parts.dino_loss.terms = tools.torch.compile(ours.parts.dino_loss.terms, dynamic=False)
                first_steps(tools, name, ours, losses if rate else None)
                del ours
    variants = {"ours_graphs": {"compile": "reduce-overhead"}, "ours_compiled": {}}
    variants |= {} if sizes.tiny else {"ours_base_compiled": {"arch": "vit_base"}}
    for name, flags in variants.items():
        if tools.has_time(name, 60):
            with found.trying(f"--compile true, {flags}, {sizes.batch} images"):
                found.put(f"{name}_{sizes.batch}", tools.speed(tools.ours("compiled", **flags), sizes.batch))
    if tools.has_time("small images", 60):
        with found.trying("small images, --compile reduce-overhead"):
            small_images(tools)


def small_images(tools):
    """recipes/cifar10_resnet18.yaml's steps on crops in memory, and where the host's time goes."""
    batch, steps = (4, 2) if tools.sizes.tiny else (128, 100)
    flags = {"arch": "resnet8" if tools.sizes.tiny else "resnet18_cifar", "out_dim": 2048, "use_bn_in_head": True}
    flags |= {"global_crops_size": 28, "local_crops_number": 0, "batch_size_per_gpu": batch}
    ours = tools.ours("compiled", compile="reduce-overhead", **flags)
    tools.found.put("small_images", tools.speed(ours, batch, steps=steps))
    profile(tools, ours, "small_images")
    crops, record = tools.crops_of(batch, ours.args), cProfile.Profile()
    with tools.alone():
        record.runcall(ours.train, crops, steps)
    lines = sorted(record.getstats(), key=lambda line: -line.inlinetime)[:20]
    names = [getattr(line.code, "co_name", str(line.code)) for line in lines]
    times = [round(1e3 * line.inlinetime / steps, 3) for line in lines]
    tools.found.put("small_images_host_ms", dict(zip(names, times, strict=True)))


def per_block(*networks):
    """Compile each transformer block and each head, in place of whole networks."""
    import torch._dynamo
    import torch._inductor.config

    config = torch._dynamo.config
    setattr(config, "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit", 64)
    torch._inductor.config.fallback_random = True  # drop path drops the same
    for network in networks:
        for part in (*network.backbone.blocks, network.head):
            part.compile(dynamic=False)
    return networks


def first_steps(tools, name, ours, losses):
    """Time of the first three steps, which compile, and number of graphs; are the losses eager's?; then the speed."""
    from torch._dynamo.utils import counters

    found, largest = tools.found, tools.sizes.batches[-1]
    tools.torch.compiler.reset()
    counters.clear()
    crops, began = tools.crops_of(largest), time.perf_counter()
    mine = [ours.train(crops, 1)["loss"] for _ in range(3)]
    tools.sync()
    found.put(f"{name}_seconds", time.perf_counter() - began)
    found.put(f"{name}_graphs", counters["stats"]["unique_graphs"])
    if losses:
        gap = max(abs(a - b) / b for a, b in zip(mine, losses, strict=True))
        found.check(f"{name}_gives_the_losses", gap < 5e-3, f"{gap:.1e}: {mine}, eager {losses}")
    found.put(f"ours_{name.replace('compile', 'compiled')}_{largest}", tools.speed(ours, largest))


# ---- the parent ----


def start_child(given, section, until=math.inf):
    asked = ["--checkout", given.checkout, "--scratch", given.scratch, "--device", given.device, "--child", section]
    asked += ["--workers", str(given.workers), "--photos", given.photos, *["--tiny"] * given.tiny]
    asked += ["--until", str(until)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if section == BACKGROUND:
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": str(max(given.workers // 2, 1))}
        if not given.tiny:  # starts are cold
            environment |= {"TORCHINDUCTOR_CACHE_DIR": os.path.join(given.scratch, "inductor")}
    with open(Path(given.scratch) / f"{section}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), *asked],
            stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip


def start_background(given, end, patience):
    """(process, when it began, when it has to end)."""
    began = time.monotonic()
    until = min(end, began + COMPILE_LIMIT * patience)
    return start_child(given, BACKGROUND, until), began, until


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
                    background, background_began, until = start_background(given, end, patience)
                states[section] = wait(start_child(given, section), began, min(limit * patience, left))
                took[section] = round(time.monotonic() - began, 1)
                gather(given, states, took)
            if BACKGROUND in given.only:
                if background is None:
                    background, background_began, until = start_background(given, end, patience)
                states[BACKGROUND] = wait(background, background_began, until - time.monotonic())
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
    """Print the findings; the most important ones come last."""
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
