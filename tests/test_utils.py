"""utils.py: seeds, devices, processes, meters, schedules, optimizers, files, multi-crop."""

import argparse
import itertools
import json
import math
import os
import platform
import random
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, array, assert_near, fill, run_script, shared, tensor, tiny_vit
from PIL import Image
from torchvision import models, transforms

import dino_backbones
import dino_cpu
import dino_features
import utils
from utils import UserError
from vision_transformer import DINOHead

# ---- randomness ----


def test_derived_seeds_stay_what_they_were():
    assert utils.derive_seed(0, 1, 2, 3) == 5735612403627336365
    assert utils.derive_seed(1, 2) == 5142973159532490859


def test_derived_seeds_do_not_collide_over_a_grid():
    grid = list(itertools.product(range(7), repeat=4))
    seeds = {utils.derive_seed(*parts) for parts in grid}
    assert len(seeds) == len(grid)  # includes every order of the same parts
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
def test_fixed_seeds_repeat_the_draws_of_all_three_generators(seed):
    def draws():
        return torch.rand(1).item(), np.random.rand(), random.random()

    utils.fix_random_seeds(seed)
    first = draws()
    utils.fix_random_seeds(seed + 1 if seed < 2**63 - 1 else 1)
    assert not set(draws()) & set(first)
    utils.fix_random_seeds(seed)
    assert draws() == first
    utils.fix_random_seeds(seed, cpu_only=True)
    assert draws() == first


# ---- devices and processes ----


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def clean_environment(monkeypatch):
    """No launcher's variables; what the test or the code sets is undone."""
    for name in (*LAUNCHER, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.setenv(name, "")  # so that it is put back even if it was not there
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a plain python in an sbatch script
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
)
def test_a_single_process_makes_no_process_group(clean_environment, variables):
    for name, value in variables.items():
        clean_environment.setenv(name, value)
    args = argparse.Namespace(device="cpu", dist_url="env://")
    assert utils.init_distributed_mode(args) == torch.device("cpu")
    assert (args.rank, args.world_size, args.gpu) == (0, 1, 0)
    assert not torch.distributed.is_initialized()
    assert (utils.get_rank(), utils.get_world_size(), utils.is_main_process()) == (0, 1, True)


@pytest.mark.parametrize(
    ("variables", "meeting"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, None),
        (
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "45678"},
            ("n3", "25678"),
        ),
    ],
)
def test_ranks_are_read_from_the_launchers_environment(clean_environment, scontrol, variables, meeting):
    for name, value in variables.items():
        clean_environment.setenv(name, value)
    joined = {}
    clean_environment.setattr(torch.distributed, "init_process_group", lambda **kwargs: joined.update(kwargs))
    args = argparse.Namespace(device="cpu", dist_url="env://")
    utils.init_distributed_mode(args)
    assert (args.rank, args.world_size, args.gpu) == (5, 8, 1)
    want = {"backend": "gloo", "init_method": "env://", "world_size": 8, "rank": 5, "device_id": None}
    assert joined == want
    assert (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")) == (meeting or (None, None))


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "zero", "WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "PATH": ""},
    ],
)
def test_an_incomplete_environment_is_an_error(clean_environment, variables):
    for name, value in variables.items():
        clean_environment.setenv(name, value)
    with pytest.raises(UserError, match=r"can't join the other processes: .*torchrun"):
        utils.init_distributed_mode(argparse.Namespace(device="cpu", dist_url="env://"))


@pytest.fixture
def scontrol(tmp_path, clean_environment):
    """A `scontrol` on the path that knows one node list and two hosts."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "scontrol"
    script.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n')
    script.chmod(0o755)
    clean_environment.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    clean_environment.setenv("SLURM_STEP_NODELIST", "n[3-4]")
    return clean_environment


def test_slurm_processes_meet_at_the_first_node_on_a_port_of_the_job(scontrol):
    for job, port in (("139999", "39999"), ("140000", "20000")):
        scontrol.delenv("MASTER_PORT", raising=False)
        scontrol.setenv("SLURM_JOB_ID", job)
        utils.name_slurm_master()
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n3", port)


def test_slurm_processes_fall_back_on_the_nodes_of_the_job(scontrol):
    scontrol.delenv("SLURM_STEP_NODELIST")
    scontrol.setenv("SLURM_JOB_NODELIST", "n[3-4]")
    scontrol.setenv("SLURM_JOB_ID", "1")
    utils.name_slurm_master()
    assert os.environ["MASTER_ADDR"] == "n3"


def test_slurm_leaves_a_meeting_point_that_is_set(scontrol):
    scontrol.setenv("MASTER_ADDR", "elsewhere")
    scontrol.setenv("MASTER_PORT", "1234")
    scontrol.setenv("SLURM_JOB_ID", "123456")
    utils.name_slurm_master()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("elsewhere", "1234")


def machine_with(monkeypatch, cuda=0, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "local_rank", "device"),
    [(4, True, 2, "cuda:2"), (1, False, 0, "cuda:0"), (0, True, 1, "mps"), (0, False, 1, "cpu")],
)
def test_auto_is_the_first_of_cuda_mps_and_cpu(monkeypatch, cuda, mps, local_rank, device):
    machine_with(monkeypatch, cuda, mps)
    assert utils.pick_device("auto", local_rank) == torch.device(device)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_an_unavailable_device_is_an_error(monkeypatch, name):
    machine_with(monkeypatch)
    with pytest.raises(UserError, match=rf"--device {name} is not available.*this machine has cpu"):
        utils.pick_device(name)


def test_a_process_without_a_gpu_of_its_own_is_a_user_error(monkeypatch):
    machine_with(monkeypatch, cuda=2)
    assert utils.pick_device("cuda", 1) == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"process 2 .* there are 2"):
        utils.pick_device("cuda", 2)


@pytest.mark.parametrize(
    ("device", "fast", "use_fp16", "amp_dtype", "want"),
    [
        ("cpu", True, False, "bf16", None),
        ("cpu", False, True, "bf16", torch.bfloat16),
        ("cpu", False, True, "fp16", torch.float16),
        ("cpu", True, True, "auto", torch.bfloat16),
        ("cpu", False, True, "auto", None),
        ("mps", True, True, "auto", None),
        ("cuda", True, True, "auto", torch.bfloat16),
        ("cuda", False, True, "auto", torch.float16),
    ],
)
def test_amp_dtype_is_as_requested_or_what_the_hardware_has(monkeypatch, device, fast, use_fp16, amp_dtype, want):
    monkeypatch.setattr(dino_cpu, "cpu_computes_bf16", lambda: fast)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if fast else (7, 5))
    assert dino_backbones.pick_amp_dtype(torch.device(device), use_fp16, amp_dtype) is want


@pytest.mark.parametrize(
    ("use_fp16", "amp_dtype", "products", "convolutions"),
    [
        (True, "tf32", True, True),
        (False, "tf32", False, False),
        (False, "auto", False, False),
        (True, "bf16", False, True),
    ],
)
def test_float32_on_a_gpu_is_rounded_to_tf32_on_request(monkeypatch, use_fp16, amp_dtype, products, convolutions):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    for backend, wanted in zip(backends, (products, convolutions), strict=True):
        monkeypatch.setattr(backend, "allow_tf32", not wanted)  # by an earlier run in this process
    dino_backbones.pick_amp_dtype(torch.device("cuda"), use_fp16, amp_dtype)
    assert [backend.allow_tf32 for backend in backends] == [products, convolutions]


def test_tf32_needs_a_gpu():
    with pytest.raises(utils.UserError, match="--amp_dtype tf32 is a precision of NVIDIA GPUs, not of cpu"):
        dino_backbones.pick_amp_dtype(torch.device("cpu"), True, "tf32")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("vendor_id : AuthenticAMD flags : avx512_bf16", True),
        ("vendor_id : GenuineIntel flags : avx512_bf16", False),  # 82 GFLOP/s, in float32 149
        ("vendor_id : GenuineIntel flags : avx512_bf16 amx_bf16", True),
        ("Features : asimd bf16", True),
        ("flags : fpu avx512f avx2 nobf16", False),
    ],
)
def test_cpus_that_are_fast_in_bf16_are_known_from_cpuinfo(monkeypatch, text, want):
    monkeypatch.setattr(dino_cpu.Path, "read_text", lambda self: text)
    assert dino_cpu.cpu_computes_bf16() is want


def test_a_machine_without_cpuinfo_has_no_bf16(monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(dino_cpu.Path, "read_text", missing)
    assert dino_cpu.cpu_computes_bf16() is False


FAULTS = """
import resource, sys, torch
sys.path.insert(0, {root!r})
import dino_cpu
torch.set_num_threads(1)
dino_cpu.tune_cpu() if {keep} else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
before = faults()
for _ in range(4):
    torch.ones(2**24)  # 64 MB, 16,384 pages of 4 kB
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_reused_without_page_faults_on_cpus():
    plain, kept = (int(run_script("-c", FAULTS.format(root=str(ROOT), keep=keep)).stdout) for keep in (False, True))
    assert kept < plain / 4


@pytest.fixture
def product_precision():
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this torch does not let oneDNN multiply float32")
    before = settings.fp32_precision
    settings.fp32_precision = "none"
    yield settings
    settings.fp32_precision = before


@pytest.mark.parametrize(
    ("cpu", "exact", "want"),
    [
        ("AuthenticAMD avx512f avx512_bf16", True, "bf16"),
        ("AuthenticAMD avx512f avx512_bf16", False, "none"),
        ("AuthenticAMD avx512f amx_bf16", True, "none"),
        ("AuthenticAMD avx2", True, "none"),
        ("GenuineIntel avx512f", True, "none"),
    ],
)
def test_onednn_is_used_where_it_is_exact_and_faster(monkeypatch, product_precision, cpu, exact, want):
    monkeypatch.setattr(dino_cpu, "cpu_flags", lambda: frozenset(cpu.split()))
    monkeypatch.setattr(torch, "allclose", lambda *_, **__: exact)
    dino_cpu.multiply_by_onednn()
    assert product_precision.fp32_precision == want


@pytest.mark.parametrize("shape", [(7, 13, 5), (100, 2048, 256), (1, 384, 4096)])
def test_float32_products_on_a_cpu_are_float32s(shape):
    utils.pick_device("cpu")
    n, k, m = shape
    left, right = tensor("products/left", (n, k)), tensor("products/right", (k, m))
    want = left.double() @ right.double()
    assert_near(left @ right, want, 1e-6)
    assert_near(F.linear(left, right.T.contiguous(), torch.ones(m)), want + 1, 1e-6)
    assert_near(left.expand(3, n, k) @ right.expand(3, k, m), want.expand(3, n, m), 1e-6)


# ---- meters and logs ----


def meter_of(*values, window_size=20, fmt="{median:.6f} ({global_avg:.6f})"):
    meter = utils.SmoothedValue(window_size, fmt)
    for value in values:
        meter.update(value)
    return meter


def test_a_meter_has_median_mean_and_extremes_of_its_window_and_the_mean_of_all():
    meter = meter_of(100.0, 7.0, 1.0, 3.0, window_size=3)
    assert (meter.median, meter.avg, meter.max, meter.value) == (3, pytest.approx(11 / 3), 7, 3)
    assert meter.global_avg == pytest.approx(111 / 4)


def test_a_meter_weights_its_mean_by_n():
    meter = utils.SmoothedValue()
    meter.update(1.0, n=3)
    meter.update(torch.tensor(5.0), n=1)
    assert meter.global_avg == 2
    assert meter.avg == 3


def test_a_meter_takes_floats_and_tensors_mixed_and_keeps_their_order():
    meter = meter_of(torch.tensor(9.0), 2.0, torch.tensor(4), torch.tensor(1.0, requires_grad=True), 3.0, window_size=3)
    assert meter.global_avg == pytest.approx(19 / 5)
    assert list(meter.read().window) == [4, 1, 3]
    assert meter.value == 3


def test_a_meter_of_tensors_is_not_read_before_it_is_asked():
    class Unready(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            assert function is torch.Tensor.detach, f"{function} reads the value"
            return args[0]

    meter = meter_of(torch.tensor(1.0).as_subclass(Unready))
    assert meter.count == 0


def test_an_unknown_meter_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no meter 'los'"):
        utils.MetricLogger().los  # noqa: B018


def test_the_console_line_has_the_public_form(capsys):
    logger, numbers = utils.MetricLogger(), []
    for number in logger.log_every(range(24), 10, "Epoch: [3/100]"):
        logger.update(loss=torch.tensor(float(number)), lr=0.125, wd=0.04)
        numbers.append(number)
    assert numbers == list(range(24))
    *lines, last = capsys.readouterr().out.splitlines()
    cell = r"\d+\.\d{6} \(\d+\.\d{6}\)"
    form = (
        rf"Epoch: \[3/100\]  \[([ \d]\d)/24\]  eta: \d+:\d\d:\d\d  loss: ({cell})  lr: {cell}  wd: {cell}"
        r"  time: \d+\.\d{6}  data: \d+\.\d{6}  max mem: \d+"
    )
    matches = [re.fullmatch(form, line) for line in lines]
    assert all(matches), lines
    assert [m[1] for m in matches] == [" 0", "10", "20", "23"]
    assert matches[1][2] == "5.000000 (5.000000)"
    assert re.fullmatch(r"Epoch: \[3/100\] Total time: \d+:\d\d:\d\d \(\d+\.\d{6} s / it\)", last)


def test_eta_is_the_time_of_the_remaining_items(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])
    for _ in utils.MetricLogger().log_every(range(3), 1, "x"):
        now[0] += 60
    assert re.findall(r"eta: (\S+)", capsys.readouterr().out) == ["0:02:00", "0:01:00", "0:00:00"]


def test_a_line_reads_all_meters_in_one_transfer(monkeypatch):
    transfers, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors: transfers.append(len(tensors)) or cat(tensors))
    logger = utils.MetricLogger()
    for i in logger.log_every(range(4), 2, "x"):
        logger.update(loss=torch.tensor(1.0 + i), kl=torch.tensor(10 * i), lr=0.5)
    assert transfers == [2, 4, 2]  # of the lines after items 0, 2 and 3
    assert [logger.loss.global_avg, logger.kl.global_avg, logger.lr.global_avg] == [2.5, 15.0, 0.5]
    logger.update(loss=torch.tensor(5.0))
    assert utils.read_together([logger.loss], torch.eye(2), torch.tensor(7)) == [[1, 0, 0, 1], [7]]
    assert transfers.pop() == 3
    assert logger.loss.value == 5


def test_the_share_of_waiting_starts_with_the_second_item(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])

    class Items:
        def __len__(self):
            return 5

        def __iter__(self):
            for i in range(5):
                now[0] += 20 if i else 1000  # loaders start
                yield i

    logger = utils.MetricLogger()
    for _ in logger.log_every(Items(), 2, "x"):
        now[0] += 60
    assert logger.waiting == pytest.approx(20 / 80)


@pytest.mark.parametrize(("platform", "megabytes"), [("linux", 3072), ("darwin", 3)])
def test_peak_memory_is_in_megabytes_whatever_the_system_counts_in(monkeypatch, platform, megabytes):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(resource, "getrusage", lambda who: argparse.Namespace(ru_maxrss=3 * 2**20))
    assert utils.peak_memory_mb() == megabytes


# ---- schedules ----


def test_cosine_schedules_equal_the_reference_numbers():
    reference = json.loads(shared("goldens/schedules.json").read_text())
    ((_, cases),) = [(name, cases) for name, cases in reference.items() if name.startswith("cosine")]
    assert len(cases) > 1
    for settings, want in cases.items():
        base, final, epochs, steps, warmup_epochs, start = json.loads(settings)
        got = utils.cosine_scheduler(base, final, epochs, steps, warmup_epochs, start)
        assert_near(got, want, 1e-12, settings)


@pytest.mark.parametrize(("warmup_epochs", "start"), [(0, 0), (2, 0.3), (5, 0)])
def test_cosine_schedule_equals_its_formula_step_by_step(warmup_epochs, start):
    base, final, epochs, steps = 0.8, 0.1, 5, 3
    warmup, want = warmup_epochs * steps, []
    for i in range(warmup):
        want.append(start + (base - start) * i / (warmup - 1))
    for i in range(epochs * steps - warmup):
        want.append(final + (base - final) / 2 * (1 + math.cos(math.pi * i / (epochs * steps - warmup))))
    got = utils.cosine_scheduler(base, final, epochs, steps, warmup_epochs=warmup_epochs, start_warmup_value=start)
    assert got.dtype == np.float64
    assert got.tolist() == pytest.approx(want, rel=1e-12, abs=1e-15)


def test_a_warm_up_longer_than_the_run_is_a_user_error():
    with pytest.raises(UserError, match=r"warmup_epochs 10 .* \(5 epochs\)"):
        utils.cosine_scheduler(1, 0, 5, 3, warmup_epochs=10)


# ---- optimizers and gradients ----


def test_biases_and_vectors_are_not_decayed_but_positions_and_cls_token_are():
    model = nn.Sequential(tiny_vit(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    names = {p: name for name, p in model.named_parameters()}
    groups = utils.get_params_groups(model)
    assert [group.get("weight_decay") for group in groups] == [None, 0]
    decayed, plain = ({names[p] for p in group["params"]} for group in groups)
    assert {"0.cls_token", "0.pos_embed", "0.patch_embed.proj.weight", "0.blocks.0.attn.qkv.weight"} <= decayed
    assert plain == {name for name in names.values() if name.endswith("bias") or "norm" in name or name == "1.weight"}
    assert decayed | plain == set(names.values())


def test_a_bias_of_two_dimensions_is_not_decayed():
    module = nn.Module()
    module.bias = nn.Parameter(torch.zeros(2, 2))
    module.inner = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(2, 2)), "w": nn.Parameter(torch.zeros(2, 2))})
    decayed, plain = (group["params"] for group in utils.get_params_groups(module))
    assert any(p is module.inner["w"] for p in decayed)
    assert any(p is module.inner["bias"] for p in plain)


def test_frozen_parameters_are_in_no_group():
    head = DINOHead(4, 3, hidden_dim=5, bottleneck_dim=2)
    groups = utils.get_params_groups(head)
    assert not any(p is head.last_layer.weight_g for group in groups for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(head.parameters())) - 1


def test_optimizers_are_built_by_name():
    groups = utils.get_params_groups(nn.Linear(2, 2))
    cpu = torch.device("cpu")
    built = {name: utils.build_optimizer(name, groups, cpu) for name in ("adamw", "sgd", "lars")}
    assert type(built["adamw"]) is torch.optim.AdamW
    assert built["adamw"].defaults["betas"] == (0.9, 0.999)
    assert type(built["sgd"]) is torch.optim.SGD
    assert (built["sgd"].defaults["momentum"], built["sgd"].defaults["nesterov"]) == (0.9, False)
    assert type(built["lars"]) is utils.LARS


def parameters_with(*gradients):
    """A module whose parameters are zeros with these gradients (None: without)."""
    module = nn.ParameterList()
    for gradient in gradients:
        module.append(nn.Parameter(torch.zeros_like(gradient) if gradient is not None else torch.zeros(2)))
        module[-1].grad = gradient
    return module


def test_each_gradient_is_clipped_on_its_own():
    large, small = tensor("large", (4, 5), 10), tensor("small", (7,), 0.01)
    module = parameters_with(large.clone(), None, small.clone())
    norms = utils.clip_gradients(module, 1.5)
    want_norm = math.sqrt(sum(float(x) ** 2 for x in large.flatten()))
    assert want_norm > 1.5
    assert norms.tolist() == pytest.approx([want_norm, float(small.double().norm())], rel=1e-6)
    assert_near(module[0].grad, large.double() * 1.5 / (want_norm + 1e-6), 1e-6)
    assert module[1].grad is None
    assert torch.equal(module[2].grad, small)


def test_clipping_adds_a_millionth_to_the_norm():
    module = parameters_with(torch.tensor([1e-6, 0.0]))
    utils.clip_gradients(module, 1e-6)
    assert module[0].grad[0].item() == pytest.approx(0.5e-6, rel=1e-4)


def test_clipping_without_gradients_returns_no_norms():
    assert utils.clip_gradients(nn.Linear(2, 2), 1.0).tolist() == []


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_the_last_layer_gets_no_gradient_while_it_is_frozen(epoch):
    model = utils.MultiCropWrapper(tiny_vit(), DINOHead(16, 5, hidden_dim=8, bottleneck_dim=4, norm_last_layer=False))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    utils.cancel_gradients_last_layer(epoch, model, freeze_last_layer=2)
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == ({"head.last_layer.weight_g", "head.last_layer.weight_v"} if epoch < 2 else set())


def test_clipping_and_lars_equal_the_reference_numbers():
    reference = np.load(shared("goldens/lars_clip.npz"))
    net = fill(nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)), "open/lars")
    optimizer = utils.LARS(utils.get_params_groups(net))
    for group, decay in zip(optimizer.param_groups, (0.01, 0.0), strict=True):
        group.update(lr=0.5, weight_decay=decay)
    for step in range(4):
        for name, p in net.named_parameters():
            p.grad = tensor(f"lars_g{step}_{name}", tuple(p.shape))
        assert_near(utils.clip_gradients(net, 1.5), reference[f"clip{step}"], 1e-5)
        optimizer.step()
    for name, p in net.named_parameters():
        assert_near(p, reference[f"lars_{name}"], 1e-5, name)


def slow_lars(start, gradients, lr, decay, momentum=0.9, eta=0.001):
    p, mu = start.astype(np.float64), 0.0
    for g in gradients:
        g = g.astype(np.float64)
        if p.ndim != 1:
            g = g + decay * p
            if np.linalg.norm(p) > 0 and np.linalg.norm(g) > 0:
                g = g * eta * np.linalg.norm(p) / np.linalg.norm(g)
        mu = momentum * mu + g
        p = p - lr * mu
    return p


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 2, 2)])
def test_lars_equals_a_step_by_step_computation_in_float64(shape):
    start, gradients = array("start", shape, 3), [array(f"gradient {i}", shape) for i in range(4)]
    p, unused = nn.Parameter(torch.tensor(start)), nn.Parameter(torch.ones(2, 2))
    optimizer = utils.LARS([p, unused], lr=2.0, weight_decay=0.3)
    for gradient in gradients:
        p.grad = torch.tensor(gradient)
        optimizer.step()
    assert_near(p, slow_lars(np.asarray(start), gradients, 2.0, 0.3), 1e-6)
    assert torch.equal(unused, torch.ones(2, 2))


def test_lars_takes_a_plain_step_where_weight_or_gradient_is_zero():
    zero, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zero.grad, still.grad = torch.full((2, 2), 3.0), torch.zeros(2, 2)
    utils.LARS([zero, still], lr=0.1).step()
    assert_near(zero, torch.full((2, 2), -0.3), 1e-6)
    assert torch.equal(still, torch.ones(2, 2))


# ---- writing whole files ----


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_crash_while_writing_leaves_the_old_file_alone(tmp_path, error):
    def write(file):
        file.write(b"half of the n")
        raise error

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(error):
        utils.write_whole(tmp_path / "file", write)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_a_kill_while_writing_leaves_the_old_file_and_the_next_write_works(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    code = """
import os, signal, sys, utils
def write(file):
    file.write(b"half of the n")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
utils.write_whole(sys.argv[1], write)
"""
    assert run_script("-c", code, tmp_path / "file", check=False).returncode == -9
    assert (tmp_path / "file").read_bytes() == b"old"
    utils.write_whole(tmp_path / "file", lambda f: f.write(b"new"))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"new")]


def test_the_bytes_are_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (order.append(name), real(*args)))
    utils.write_whole(tmp_path / "file", lambda f: f.write(b"new"))
    assert order == ["fsync", "replace"]


# ---- multi-crop ----


def test_normalize_equals_torchvision_bit_for_bit():
    levels = np.random.RandomState(0).randint(0, 256, (37, 29, 3), dtype=np.uint8)
    levels[0] = np.arange(87).reshape(29, 3) * 2
    convert = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    pixels = torch.from_numpy(levels).permute(2, 0, 1)
    want = convert(Image.fromarray(levels))
    assert torch.equal(utils.normalize(pixels), want)
    assert torch.equal(utils.normalize(torch.stack([pixels] * 2)), torch.stack([want] * 2))


def test_normalize_changes_neither_floats_nor_its_input():
    floats, pixels = torch.rand(2, 3, 4, 4), torch.full((3, 2, 2), 7, dtype=torch.uint8)
    assert utils.normalize(floats) is floats
    utils.normalize(pixels)
    assert (pixels == 7).all()


class Means(nn.Module):
    """Backbone whose features are the mean of an image and its height and width; counts its calls."""

    def __init__(self, as_tuple=False):
        super().__init__()
        self.fc, self.head, self.as_tuple, self.batches = nn.Linear(3, 3), nn.Linear(3, 3), as_tuple, []

    def forward(self, x):
        self.batches.append(tuple(x.shape))
        size = torch.tensor(x.shape[-2:], dtype=x.dtype).expand(len(x), 2)
        features = torch.cat((x.mean((1, 2, 3))[:, None], size), dim=1)
        return (features, None) if self.as_tuple else features


def crops_of(*sizes, batch=2):
    """Crops [batch, 3, h, w]; every image of every crop has a level of its own."""
    levels = itertools.count(1)
    return [torch.stack([torch.full((3, *size), float(next(levels))) for _ in range(batch)]) for size in sizes]


SIZES = [(8, 8), (8, 8), (4, 4), (4, 4), (4, 4), (8, 8), (4, 8), (8, 4)]


@pytest.mark.parametrize("as_tuple", [False, True])
def test_consecutive_crops_of_one_size_share_a_forward_and_keep_their_order(as_tuple):
    heads = []
    head = nn.Identity()
    head.register_forward_hook(lambda module, inputs, output: heads.append(len(output)))
    backbone = Means(as_tuple)
    got = utils.MultiCropWrapper(backbone, head)(crops_of(*SIZES))
    assert got[:, 0].tolist() == list(range(1, 17))
    assert got[::2, 1:].tolist() == [list(size) for size in SIZES]
    assert backbone.batches == [(4, 3, 8, 8), (6, 3, 4, 4), (2, 3, 8, 8), (2, 3, 4, 8), (2, 3, 8, 4)]
    assert heads == [16]


def test_a_single_tensor_counts_as_one_crop():
    wrapper, (crop,) = utils.MultiCropWrapper(Means(), nn.Identity()), crops_of((4, 4))
    assert torch.equal(wrapper(crop), wrapper([crop]))
    assert wrapper(crop).shape == (2, 3)


def test_the_backbones_own_classifiers_become_the_identity():
    backbone = Means()
    head = nn.Linear(3, 2)
    wrapper = utils.MultiCropWrapper(backbone, head)
    assert isinstance(backbone.fc, nn.Identity)
    assert isinstance(backbone.head, nn.Identity)
    assert list(wrapper.state_dict()) == ["head.weight", "head.bias"]
    assert wrapper.backbone is backbone
    assert wrapper.head is head


def test_vit_in_the_wrapper_equals_crop_by_crop_forwards():
    backbone, head = tiny_vit(depth=2), DINOHead(16, 5, hidden_dim=8, bottleneck_dim=4)
    crops = [tensor(f"crop{i}", (2, 3, size, size)) for i, size in enumerate((32, 32, 16, 16))]
    got = utils.MultiCropWrapper(backbone, head)(crops)
    assert_near(got, torch.cat([head(backbone(crop)) for crop in crops]), 1e-5)
    keys = utils.MultiCropWrapper(backbone, head).state_dict()
    assert {key.split(".")[0] for key in keys} == {"backbone", "head"}


def test_resnet50_multi_crop_equals_the_reference_logits():
    reference = np.load(shared("goldens/resnet50.npz"))
    wrapper = utils.MultiCropWrapper(fill(models.resnet50(), "open/rn50"), fill(DINOHead(2048, 128), "open/rnh")).eval()
    assert sorted(wrapper.state_dict()) == list(reference["keys"])
    crops = [tensor(f"rn{i}", (2, 3, size, size)) for i, size in enumerate((96, 96, 64))]
    with torch.no_grad():
        assert_near(wrapper(crops), reference["out"], 1e-4)


# ---- names of the authors' utils that nothing here calls ----


def test_accuracy_is_the_share_of_labels_among_the_top_k():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    top1, top2 = utils.accuracy(logits, torch.tensor([0, 2, 2, 0]), topk=(1, 2))
    assert (top1.item(), top2.item()) == (50, 75)


def test_reduce_dict_of_one_process_is_the_dict_itself():
    values = {"loss": torch.tensor(2.0)}
    assert utils.reduce_dict(values) is values


def test_reduce_dict_averages_or_sums_over_processes(monkeypatch):
    monkeypatch.setattr(utils, "get_world_size", lambda: 2)
    monkeypatch.setattr(utils.dist, "all_reduce", lambda values: values.add_(torch.tensor([4.0, 8.0])))
    values = {"loss": torch.tensor(2.0), "acc": torch.tensor(6.0)}  # in the order of names: acc, loss
    assert {k: v.item() for k, v in utils.reduce_dict(values).items()} == {"acc": 5.0, "loss": 5.0}
    assert {k: v.item() for k, v in utils.reduce_dict(values, average=False).items()} == {"acc": 10.0, "loss": 10.0}


def test_setup_for_distributed_silences_print_unless_forced(capsys, monkeypatch):
    import builtins

    monkeypatch.setattr(builtins, "print", print)  # restored after the test
    utils.setup_for_distributed(is_master=False)
    print("hidden")
    print("shown", force=True)
    assert capsys.readouterr().out == "shown\n"


def test_get_sha_names_the_commit():
    assert re.fullmatch(r"sha: (N/A|[0-9a-f]{40}), status: .+, branch: .+", utils.get_sha())


def test_public_names_of_other_files_are_found_in_utils():
    assert utils.PCA is dino_features.PCA
    assert utils.load_pretrained_weights is dino_backbones.load_pretrained_weights


def test_a_line_that_can_not_be_printed_is_dropped(monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Full())
    utils.say("warning: a line")
    utils.say("another")
