"""utils.py: everything that the scripts share, one behavior at a time."""

import argparse
import copy
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, array, assert_near, fill, run_script, shared, tensor
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_features
import dino_run
import hubconf
import utils
from utils import UserError
from vision_transformer import DINOHead, VisionTransformer


def tiny_vit(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"img_size": [32], "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "qkv_bias": True}
    return VisionTransformer(**{**settings, **changes})


def same_state(one, other):
    one, other = (m.state_dict() if isinstance(m, nn.Module) else m for m in (one, other))
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


# ---- flags and recipes ----


@pytest.mark.parametrize(
    ("words", "value"), [(("on", "true", "1", "True", "ON"), True), (("off", "false", "0", "False", "oFF"), False)]
)
def test_bool_flag_reads_the_public_words_in_any_case(words, value):
    assert [utils.bool_flag(word) for word in words] == [value] * len(words)


@pytest.mark.parametrize("word", ["yes", "2", "", "tru"])
def test_bool_flag_refuses_other_words_by_name(word):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{word}' is neither"):
        utils.bool_flag(word)


def flags():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", help="Recipe.")
    parser.add_argument("--lr", type=float, default=0.5, help="Learning rate.")
    parser.add_argument("--epochs", type=int, default=100, help="Epochs.")
    parser.add_argument("--scale", type=float, nargs=2, default=(0.4, 1.0), help="Scale.")
    parser.add_argument("--use_fp16", type=utils.bool_flag, default=True, help="Mixed precision.")
    parser.add_argument("--data_path", default="sample", help="Images.")
    return parser


@pytest.fixture
def parse(tmp_path):
    """parse(text of a recipe or None, *words of the command line) -> Namespace."""

    def parse(recipe, *words):
        if recipe is not None:
            (tmp_path / "recipe.yaml").write_text(recipe)
            words = ("--config", str(tmp_path / "recipe.yaml"), *words)
        return dino_cli.parse_args(dino_cli.OneLineParser(parents=[flags()]), words)

    return parse


def test_without_a_recipe_the_flags_have_their_defaults(parse):
    assert vars(parse(None, "--epochs", "3")) == {
        "config": None,
        "lr": 0.5,
        "epochs": 3,
        "scale": (0.4, 1.0),
        "use_fp16": True,
        "data_path": "sample",
    }


def test_a_recipe_sets_what_the_command_line_does_not(parse):
    args = parse("epochs: 7\nuse_fp16: false\ndata_path: my images\n")
    assert (args.epochs, args.use_fp16, args.data_path, args.lr) == (7, False, "my images", 0.5)


@pytest.mark.parametrize("words", [("--epochs", "9"), ("--epochs=9",), ("--epoc", "9")])
def test_the_command_line_wins_over_the_recipe(parse, words):
    assert parse("epochs: 7\n", *words).epochs == 9


def test_the_command_line_wins_even_with_the_default_value(parse):
    assert parse("epochs: 7\n", "--epochs", "100").epochs == 100


def test_a_recipe_reads_an_exponent_without_a_point_as_a_number(parse):
    assert parse("lr: 1e-3\n").lr == 1e-3


def test_a_recipe_reads_lists(parse):
    assert parse("scale: [0.25, 1]\n").scale == [0.25, 1.0]


def test_an_unknown_key_of_a_recipe_is_named_with_the_nearest_flag(parse):
    with pytest.raises(UserError, match=r"recipe\.yaml: unknown key 'epoch'; did you mean epochs") as e:
        parse("epoch: 7\n")
    assert e.value.exit_code == 2


def test_a_recipe_can_not_name_another_recipe(parse):
    with pytest.raises(UserError, match="unknown key 'config'"):
        parse("config: other.yaml\n")


@pytest.mark.parametrize("recipe", ["epochs: many\n", "scale: 1\n", "scale: [1, 2, 3]\n", "use_fp16: maybe\n"])
def test_a_wrong_value_in_a_recipe_is_one_line_that_names_the_file(parse, capsys, recipe):
    with pytest.raises(SystemExit) as ended:
        parse(recipe)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("error: in ")
    assert "recipe.yaml" in error


def test_a_wrong_value_on_the_command_line_is_not_blamed_on_the_recipe(parse, capsys):
    with pytest.raises(SystemExit):
        parse("epochs: 7\n", "--lr", "high")
    error = capsys.readouterr().err
    assert error.startswith("error: argument --lr: invalid float value: 'high'")
    assert error.count("\n") == 1


def test_mistakes_made_after_a_recipe_was_read_are_not_blamed_on_it(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("epochs: 7\n")
    parser = dino_cli.OneLineParser(parents=[flags()])
    dino_cli.parse_args(parser, ["--config", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit):
        parser.parse_args(["--lr", "high"])
    assert "recipe.yaml" not in capsys.readouterr().err


def test_a_key_without_a_value_is_an_error(parse):
    with pytest.raises((UserError, SystemExit)):
        parse("data_path:\n")


def test_a_missing_recipe_is_named(parse):
    with pytest.raises(UserError, match=r"--config nowhere\.yaml.*No such file"):
        parse(None, "--config", "nowhere.yaml")


@pytest.mark.parametrize("recipe", ["epochs: [1, 2\n", "- epochs\n- 7\n", "", "just words\n"])
def test_a_broken_recipe_is_a_user_error(parse, recipe):
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        parse(recipe)


# ---- run ----


@pytest.fixture
def run(monkeypatch, capsys):
    """run(main, *words) -> (exit code, stdout, stderr) of a script with this main function."""

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        code = 0
        try:
            dino_cli.run(main, flags(), "What the script does.\n\n    two commands\n")
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


def test_run_calls_main_with_the_arguments(run):
    seen = []
    assert run(seen.append, "--epochs", "4") == (0, "", "")
    assert [args.epochs for args in seen] == [4]


@pytest.mark.parametrize("code", [2, 3])
def test_run_turns_a_user_error_into_one_line_and_its_exit_code(run, code):
    def main(args):
        raise UserError("there is no folder x. Name another", exit_code=code)

    assert run(main) == (code, "", "error: there is no folder x. Name another\n")


def test_a_name_of_several_lines_does_not_make_several_lines_of_an_error(run):
    def main(args):
        raise UserError("there is no folder x\ny. Name another")

    assert run(main) == (2, "", "error: there is no folder x y. Name another\n")


def test_run_leaves_other_errors_alone(run):
    def main(args):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run(main)


class Unreadable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        try:
            raise OSError("truncated file")
        except OSError as e:
            raise UserError("can't read image 7") from e


def test_run_reduces_a_workers_traceback_to_its_message(run):
    batches = iter(DataLoader(Unreadable(), num_workers=1))
    code, _, error = run(lambda args: next(batches))
    assert (code, error) == (2, "error: can't read image 7\n")
    assert list(batches) == []  # lets the worker end now, not in the next garbage collection


def test_run_answers_a_wrong_flag_with_one_line(run):
    code, _, error = run(print, "--epochs", "x")
    assert code == 2
    assert error == "error: argument --epochs: invalid int value: 'x' (--help lists the flags)\n"


def test_help_prints_the_description_as_it_stands_and_the_defaults(run):
    code, out, _ = run(print, "--help")
    assert code == 0
    assert "What the script does.\n\n    two commands\n" in out
    assert "Epochs. (default: 100)" in out
    assert "(default: (0.4, 1.0))" in out


def test_an_output_dir_is_made_with_its_parents_and_left_empty(tmp_path):
    dino_cli.check_output_dir(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_output_dir_under_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir .*file/runs"):
        dino_cli.check_output_dir(tmp_path / "file" / "runs")


# ---- randomness ----


def test_derived_seeds_stay_what_they_were():
    assert utils.derive_seed(0, 1, 2, 3) == 5735612403627336365
    assert utils.derive_seed(1, 2) == 5142973159532490859


def test_derived_seeds_do_not_collide_over_a_grid():
    grid = list(itertools.product(range(7), repeat=4))
    seeds = {utils.derive_seed(*parts) for parts in grid}
    assert len(seeds) == len(grid)  # includes every order of the same parts
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_depend_on_a_zero_at_the_end():
    assert len({utils.derive_seed(1, 2), utils.derive_seed(1, 2, 0), utils.derive_seed(1, 2, 0, 0)}) == 3


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
def test_launchers_say_which_process_this_is(clean_environment, scontrol, variables, meeting):
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
def test_launchers_that_leave_something_out_are_user_errors(clean_environment, variables):
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
def test_auto_takes_the_first_of_cuda_mps_and_cpu(monkeypatch, cuda, mps, local_rank, device):
    machine_with(monkeypatch, cuda, mps)
    assert utils.pick_device("auto", local_rank) == torch.device(device)


def test_cpu_is_taken_when_asked_for_beside_a_gpu(monkeypatch):
    machine_with(monkeypatch, cuda=2)
    assert utils.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_a_user_error(monkeypatch, name):
    machine_with(monkeypatch)
    with pytest.raises(UserError, match=rf"--device {name} is not available.*this machine has cpu$"):
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
def test_half_precision_is_what_was_asked_for_or_what_the_hardware_has(
    monkeypatch, device, fast, use_fp16, amp_dtype, want
):
    monkeypatch.setattr(utils, "cpu_computes_bf16", lambda: fast)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if fast else (7, 5))
    assert utils.pick_amp_dtype(torch.device(device), use_fp16, amp_dtype) is want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("flags : fpu avx512f amx_bf16 amx_tile", True),
        ("flags : avx512_bf16", True),
        ("Features : asimd bf16", True),
        ("flags : fpu avx512f avx2 nobf16", False),
    ],
)
def test_bf16_is_read_off_the_processors_flags(monkeypatch, text, want):
    monkeypatch.setattr(utils.Path, "read_text", lambda self: text)
    assert utils.cpu_computes_bf16() is want


def test_a_machine_without_cpuinfo_has_no_bf16(monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(utils.Path, "read_text", missing)
    assert utils.cpu_computes_bf16() is False


FAULTS = """
import resource, sys, torch
sys.path.insert(0, {root!r})
import utils
torch.set_num_threads(1)
utils.pick_device("cpu") if {keep} else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24), torch.ones(2**24)
before = faults()
for _ in range(4):
    torch.ones(2**24)  # 64 MB, 16,384 pages of 4 kB
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_on_a_cpu_memory_that_was_freed_is_used_again_without_a_page_fault():
    plain, kept = (int(run_script("-c", FAULTS.format(root=str(ROOT), keep=keep)).stdout) for keep in (False, True))
    assert kept < 1000
    assert plain > 20 * kept


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
def test_onednn_multiplies_float32_where_it_is_exact_and_faster(monkeypatch, product_precision, cpu, exact, want):
    monkeypatch.setattr(utils, "cpu_flags", lambda: frozenset(cpu.split()))
    monkeypatch.setattr(torch, "allclose", lambda *_, **__: exact)
    utils.multiply_by_onednn()
    assert product_precision.fp32_precision == want


@pytest.mark.parametrize("shape", [(7, 13, 5), (197, 64, 197), (100, 2048, 256), (1576, 384, 1152), (1, 384, 4096)])
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


def test_a_meter_reads_each_tensor_once():
    meter = meter_of(torch.tensor(2.0))
    assert (meter.avg, meter.avg, meter.count, meter.total) == (2, 2, 1, 2)
    meter.update(torch.tensor(4.0))
    assert (meter.avg, meter.count) == (3, 2)


def test_a_meter_of_tensors_is_not_read_before_it_is_asked():
    class Unready(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            assert function is torch.Tensor.detach, f"{function} reads the value"
            return args[0]

    meter = meter_of(torch.tensor(1.0).as_subclass(Unready))
    assert meter.count == 0


def test_a_meter_prints_median_and_mean_of_all():
    assert str(meter_of(1.0, 2.0, 6.0)) == "2.000000 (3.000000)"
    assert str(meter_of(1.0, 2.0, 6.0, fmt="{avg:.1f} {max:.0f} {value:.2f}")) == "3.0 6 6.00"


def test_meters_of_one_process_synchronize_without_a_group():
    logger = utils.MetricLogger()
    logger.update(loss=torch.tensor(3.0), lr=0.5)
    logger.update(loss=torch.tensor(5.0), lr=0.5)
    logger.synchronize_between_processes()
    assert {name: meter.global_avg for name, meter in logger.meters.items()} == {"loss": 4, "lr": 0.5}


def test_a_logger_prints_its_meters_in_the_order_of_their_first_update():
    logger = utils.MetricLogger()
    logger.add_meter("acc", utils.SmoothedValue(fmt="{global_avg:.1f}"))
    logger.update(loss=1.0, acc=2.0)
    assert str(logger) == "acc: 2.0  loss: 1.000000 (1.000000)"


def test_the_console_line_has_the_public_form_every_ten_items_and_at_the_last(capsys):
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


def test_the_remaining_time_is_that_of_the_items_to_come(capsys, monkeypatch):
    clock = itertools.count(0, 30)  # half a minute between any two looks at the clock
    monkeypatch.setattr(utils.time, "time", lambda: next(clock))
    for _ in utils.MetricLogger().log_every(range(3), 1, "x"):
        pass
    etas = re.findall(r"eta: (\S+)", capsys.readouterr().out)
    assert etas == ["0:02:00", "0:01:00", "0:00:00"]  # 60 s an item, of which 30 waiting


def test_the_line_has_images_a_second_and_the_share_of_waiting_where_images_are_known(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(utils.time, "time", lambda: clock[0])

    class Slow:
        def __len__(self):
            return 3

        def __iter__(self):
            for _ in range(3):
                clock[0] += 1.0  # the wait
                yield None

    for images in (0, 32):
        metrics = utils.MetricLogger()
        metrics.images = images
        for _ in metrics.log_every(Slow(), 1):
            clock[0] += 3.0  # the work
        lines = [line for line in capsys.readouterr().out.splitlines() if "eta" in line]
        assert ["images/s: 8.0  waiting: 25%" in line for line in lines] == [False, bool(images), bool(images)]
        assert all(("images/s: 8.0" in line) == bool(images) for line in lines)


@pytest.mark.parametrize(("wait", "said"), [(30, None), (31, "(data wait 51% of the time: buy a disk)")])
def test_a_loader_that_is_too_slow_is_said_with_what_to_do(capsys, monkeypatch, wait, said):
    """Each item takes `wait` seconds to come and then 90, or 30 once it is too slow; the first one's wait is long."""
    work = 90 if said is None else 30
    clock = itertools.accumulate([0, 500, *itertools.chain(*[(work, 0, wait)] * 9)])
    monkeypatch.setattr(utils.time, "time", lambda: next(clock))
    for _ in utils.MetricLogger().log_every(range(3), 1, "x", hint="buy a disk"):
        pass
    lines = capsys.readouterr().out.splitlines()[:3]
    assert ["data wait" in line for line in lines] == [False, bool(said), bool(said)]
    assert said is None or lines[2].endswith(f"  {said}")


@pytest.mark.parametrize(("platform", "megabytes"), [("linux", 3072), ("darwin", 3)])
def test_peak_memory_is_in_megabytes_whatever_the_system_counts_in(monkeypatch, platform, megabytes):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(resource, "getrusage", lambda who: argparse.Namespace(ru_maxrss=3 * 2**20))
    assert utils.peak_memory_mb() == megabytes


def test_a_copy_for_the_host_is_the_numbers_themselves():
    assert utils.HostCopy(torch.tensor(1.5, requires_grad=True)).read() == 1.5
    assert utils.HostCopy(torch.tensor([-2.0, math.inf])).read() == [-2.0, math.inf]


@pytest.mark.parametrize(("loss", "bad"), [(1.0, 0), (math.nan, 1), (math.inf, 1), (-math.inf, 1)])
def test_one_process_agrees_with_itself(loss, bad):
    assert dino_run.agree(torch.tensor(loss, requires_grad=True), 15, False).read() == [bad, 15, 0]


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_log_lines_are_appended_one_json_object_an_epoch(tmp_path):
    for epoch in range(3):
        utils.write_log_line(tmp_path, {"train_loss": epoch / 2, "epoch": epoch})
    assert log_lines(tmp_path) == [{"train_loss": epoch / 2, "epoch": epoch} for epoch in range(3)]


def test_a_log_line_replaces_those_of_the_same_and_later_epochs(tmp_path):
    for epoch in range(4):
        utils.write_log_line(tmp_path, {"train_loss": 1.0, "epoch": epoch})
    utils.write_log_line(tmp_path, {"train_loss": 0.5, "epoch": 2})
    assert log_lines(tmp_path) == [
        {"train_loss": 1.0, "epoch": 0},
        {"train_loss": 1.0, "epoch": 1},
        {"train_loss": 0.5, "epoch": 2},
    ]


def test_a_torn_last_log_line_is_dropped(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"train_loss": 1.0, "ep')
    utils.write_log_line(tmp_path, {"epoch": 1})
    assert log_lines(tmp_path) == [{"epoch": 0}, {"epoch": 1}]


def test_lines_of_others_in_the_log_stay(tmp_path):
    foreign = b'notes \xff of mine\n\n{"epoch": 7, "mine": 1}\n[1]\n7\n{torn\n{"train_loss": 1.0, "note": 2}\n'
    (tmp_path / "log.txt").write_bytes(foreign)
    utils.write_log_line(tmp_path, {"train_loss": 2.0, "epoch": 1})
    assert (tmp_path / "log.txt").read_bytes() == foreign + b'{"train_loss": 2.0, "epoch": 1}\n'


def test_a_folder_where_a_file_is_to_go_is_a_user_error(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(UserError, match=r"--there .* has a folder named log\.txt"):
        dino_cli.check_output_dir(tmp_path, "--there", ("log.txt",))


def test_an_interrupted_script_ends_with_130_and_no_traceback(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stop:
        dino_cli.run(interrupted, argparse.ArgumentParser(add_help=False), "")
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


# ---- schedules ----


def test_cosine_schedules_equal_the_reference_numbers():
    reference = json.loads(shared("goldens/schedules.json").read_text())
    ((_, cases),) = [(name, cases) for name, cases in reference.items() if name.startswith("cosine")]
    assert len(cases) > 1
    for settings, want in cases.items():
        base, final, epochs, steps, warmup_epochs, start = json.loads(settings)
        got = utils.cosine_scheduler(base, final, epochs, steps, warmup_epochs, start)
        assert_near(got, want, 1e-12, settings)


@pytest.mark.parametrize(("warmup_epochs", "start"), [(0, 0), (2, 0), (2, 0.3), (5, 0)])
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


def test_biases_and_vectors_are_not_regularised_but_positions_and_cls_token_are():
    model = nn.Sequential(tiny_vit(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    names = {p: name for name, p in model.named_parameters()}
    decayed, plain = ({names[p] for p in group["params"]} for group in utils.get_params_groups(model))
    assert {"0.cls_token", "0.pos_embed", "0.patch_embed.proj.weight", "0.blocks.0.attn.qkv.weight"} <= decayed
    assert plain == {name for name in names.values() if name.endswith("bias") or "norm" in name or name == "1.weight"}
    assert decayed | plain == set(names.values())


def test_a_bias_of_two_dimensions_is_not_regularised():
    module = nn.Module()
    module.bias = nn.Parameter(torch.zeros(2, 2))
    module.inner = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(2, 2)), "w": nn.Parameter(torch.zeros(2, 2))})
    decayed, plain = (group["params"] for group in utils.get_params_groups(module))
    assert any(p is module.inner["w"] for p in decayed)
    assert any(p is module.inner["bias"] for p in plain)


def test_only_the_second_group_fixes_its_weight_decay():
    first, second = utils.get_params_groups(nn.Linear(2, 2))
    assert "weight_decay" not in first
    assert second["weight_decay"] == 0


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


def test_a_gradient_of_zeros_survives_clipping():
    module = parameters_with(torch.zeros(3))
    assert utils.clip_gradients(module, 1.0).tolist() == [0]
    assert torch.equal(module[0].grad, torch.zeros(3))


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


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 2, 2), ()])
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


def test_lars_goes_on_from_its_saved_momentum():
    gradients = [torch.tensor(array(f"gradient {i}", (3, 2))) for i in range(4)]

    def train(p, optimizer, part):
        for gradient in part:
            p.grad = gradient
            optimizer.step()

    whole = nn.Parameter(torch.ones(3, 2))
    optimizer = utils.LARS([whole], lr=1.0)
    train(whole, optimizer, gradients[:2])
    resumed = nn.Parameter(whole.detach().clone())
    again = utils.LARS([resumed], lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(again.state[resumed]) == {"mu"}
    train(whole, optimizer, gradients[2:])
    train(resumed, again, gradients[2:])
    assert torch.equal(whole, resumed)


def test_lars_leaves_the_gradients_as_they_were():
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.full((2, 2), 2.0)
    utils.LARS([p], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(p.grad, torch.full((2, 2), 2.0))


# ---- writing whole files ----


def test_a_file_is_written_whole(tmp_path):
    utils.write_whole(tmp_path / "file", lambda f: f.write(b"new"))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"new")]


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


# ---- checkpoints ----


def test_a_checkpoint_comes_back_as_plain_types_and_tensors(tmp_path):
    state = {"teacher": {"w": torch.arange(3.0)}, "epoch": 4, "args": {"arch": "vit_nano", "scale": [0.4, 1.0]}}
    utils.save_on_master(state, tmp_path / "c.pth")
    torch.load(tmp_path / "c.pth", weights_only=True)
    loaded = dino_checkpoints.load_checkpoint(tmp_path / "c.pth")
    assert torch.equal(loaded.pop("teacher")["w"], torch.arange(3.0))
    assert loaded == {"epoch": 4, "args": {"arch": "vit_nano", "scale": [0.4, 1.0]}}


def test_only_rank_0_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "get_rank", lambda: 1)
    utils.save_on_master({"epoch": 1}, tmp_path / "c.pth")
    assert list(tmp_path.iterdir()) == []


def rewrite_pickle(path, change):
    """Apply `change` to the bytes of the pickle inside a torch file."""
    with zipfile.ZipFile(path) as source:
        entries = [(info.filename, source.read(info)) for info in source.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, content in entries:
            target.writestr(name, change(content) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_a_public_checkpoint_with_a_namespace_and_numpy_learning_rates_is_read(tmp_path, module):
    args = argparse.Namespace(arch="vit_small", lr=0.0005, local_crops_scale=(0.05, 0.4), data_path=None)
    groups = [{"lr": np.float64(0.00025), "weight_decay": np.float64(0.125), "params": [0]}]
    torch.save({"args": args, "optimizer": {"state": {}, "param_groups": groups}, "epoch": 3}, tmp_path / "c.pth")

    def spell(content):
        changed = re.sub(rb"numpy\._?core\.multiarray", module, content)
        assert b"c" + module + b"\nscalar\n" in changed
        return changed

    rewrite_pickle(tmp_path / "c.pth", spell)
    loaded = dino_checkpoints.load_checkpoint(tmp_path / "c.pth")
    assert loaded["args"] == args
    assert loaded["optimizer"]["param_groups"] == groups


def test_safetensors_are_read_and_a_torn_file_is_named(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    state = tiny_vit(4).state_dict()
    save_file(state, path)
    target = tiny_vit(5)
    dino_backbones.load_weights(target, str(path))
    assert same_state(target, state)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"weights\.safetensors can't be read"):
        dino_checkpoints.load_checkpoint(path)


def test_without_safetensors_its_files_are_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        dino_checkpoints.load_checkpoint(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_torn_checkpoint_is_a_user_error(tmp_path, keep):
    torch.save({"w": torch.ones(1000)}, tmp_path / "c.pth")
    whole = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else keep])
    with pytest.raises(UserError, match=r"c\.pth can't be read as a checkpoint; is it complete\?"):
        dino_checkpoints.load_checkpoint(tmp_path / "c.pth")


def test_a_missing_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.pth"):
        dino_checkpoints.load_checkpoint(tmp_path / "nowhere.pth")


# ---- resuming ----


def prefixed(state, prefix="module."):
    return {prefix + key: value for key, value in state.items()}


class Wrapped(nn.Module):
    """Puts `module.` in front of the keys, as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("in_model", [True, False])
def test_resuming_does_not_mind_the_module_prefix(tmp_path, in_file, in_model):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    state = source.state_dict()
    torch.save({"student": prefixed(state) if in_file else state, "epoch": 7}, tmp_path / "c.pth")
    progress = {"epoch": 0, "best": 1}
    model = Wrapped(target) if in_model else target
    assert dino_checkpoints.restart_from_checkpoint(tmp_path / "c.pth", progress, student=model) == str(
        tmp_path / "c.pth"
    )
    assert same_state(target, source)
    assert progress == {"epoch": 7, "best": 1}


def test_resuming_restores_the_optimizer(tmp_path):
    def trained(steps):
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for _ in range(steps):
            net(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return net, optimizer

    _, optimizer = trained(3)
    utils.save_on_master({"optimizer": optimizer.state_dict()}, tmp_path / "c.pth")
    _, fresh = trained(0)
    dino_checkpoints.restart_from_checkpoint(tmp_path / "c.pth", optimizer=fresh)
    for p, q in zip(optimizer.param_groups[0]["params"], fresh.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], fresh.state[q]["exp_avg_sq"])
        assert fresh.state[q]["step"] == 3


def test_nothing_to_resume_from_changes_nothing(tmp_path):
    target, progress = nn.Linear(3, 2), {"epoch": 0}
    before = {key: value.clone() for key, value in target.state_dict().items()}
    assert dino_checkpoints.restart_from_checkpoint(tmp_path / "nowhere.pth", progress, student=target) is None
    assert same_state(target, before)
    assert progress == {"epoch": 0}


def test_what_a_checkpoint_lacks_starts_afresh_with_a_warning(tmp_path, capsys):
    torch.save({"epoch": 2}, tmp_path / "c.pth")
    dino_checkpoints.restart_from_checkpoint(
        tmp_path / "c.pth", {"epoch": 0}, student=nn.Linear(1, 1), fp16_scaler=None
    )
    out = capsys.readouterr().out
    assert "warning" in out
    assert "'student'" in out
    assert "fp16_scaler" not in out


RUN = {
    "arch": "vit_small",
    "patch_size": 16,
    "out_dim": 4096,
    "norm_last_layer": True,
    "use_bn_in_head": False,
    "optimizer": "adamw",
    "global_crops_size": 224,
    "lr": 0.1,
}


def resume(path, before, now):
    network = nn.Sequential(nn.Linear(3, 2))
    torch.save({"epoch": 1, "args": before, "student": network.state_dict(), "teacher": network.state_dict()}, path)
    return dino_checkpoints.restart_from_checkpoint(path, args=argparse.Namespace(**now), student=network)


@pytest.mark.parametrize("kind", [dict, lambda settings: argparse.Namespace(**settings)])
def test_resuming_with_other_networks_names_the_flags_that_differ(tmp_path, kind):
    with pytest.raises(UserError) as e:
        resume(tmp_path / "c.pth", kind(RUN), {**RUN, "out_dim": 512, "arch": "vit_tiny", "lr": 0.3})
    assert "--arch vit_small --out_dim 4096" in str(e.value)
    assert "--arch vit_tiny --out_dim 512" in str(e.value)
    assert "--lr" not in str(e.value)


@pytest.mark.parametrize("name", sorted(set(RUN) - {"lr"}))
def test_each_flag_that_shapes_the_run_is_compared(tmp_path, name):
    with pytest.raises(UserError, match=f"--{name} something"):
        resume(tmp_path / "c.pth", RUN, {**RUN, name: "something"})


def test_other_learning_rates_can_be_gone_on_with_and_are_named(tmp_path, capsys):
    assert resume(tmp_path / "c.pth", {**RUN, "num_workers": 1}, {**RUN, "lr": 3.0, "num_workers": 2})
    assert "note: going on with --lr 3.0 (was 0.1)\n" in capsys.readouterr().out


def test_an_older_name_of_the_same_network_can_be_gone_on_with(tmp_path):
    assert resume(tmp_path / "c.pth", {**RUN, "arch": "deit_small"}, RUN)


@pytest.mark.parametrize(
    "content",
    [
        nn.Linear(2, 2).state_dict(),
        torch.zeros(3),
        [1],
        {"epoch": -3, "student": nn.Linear(2, 2).state_dict(), "teacher": nn.Linear(2, 2).state_dict()},
        {"epoch": "x", "student": nn.Linear(2, 2).state_dict(), "teacher": nn.Linear(2, 2).state_dict()},
        {"epoch": 1, "student": torch.zeros(3), "teacher": torch.zeros(3)},
    ],
)
def test_a_file_that_is_no_training_checkpoint_is_not_taken_for_one(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match="no training checkpoint, and would be overwritten"):
        dino_checkpoints.restart_from_checkpoint(
            tmp_path / "c.pth", args=argparse.Namespace(**RUN), student=nn.Linear(2, 2)
        )


def test_an_optimizer_state_of_an_older_torch_keeps_the_fused_kernels(tmp_path):
    network = nn.Linear(3, 2)
    optimizer = utils.build_optimizer("adamw", utils.get_params_groups(network), torch.device("cpu"))
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    known = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
    state["param_groups"] = [{**{k: g[k] for k in known}, "lr": np.float64(0.25)} for g in state["param_groups"]]
    for values in state["state"].values():
        values["step"] = int(values["step"])
    torch.save({"optimizer": state}, tmp_path / "c.pth")
    dino_checkpoints.restart_from_checkpoint(tmp_path / "c.pth", optimizer=optimizer)
    for group in optimizer.param_groups:
        assert group["fused"]
        assert group["lr"] == 0.25
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(network(torch.ones(1, 3)).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


@pytest.mark.parametrize(
    "target", [nn.Linear(3, 5), nn.Linear(3, 2, bias=False), torch.optim.SGD(nn.Linear(1, 1).parameters())]
)
def test_a_checkpoint_of_another_network_is_a_user_error(tmp_path, target):
    state = nn.Linear(3, 2).state_dict()
    if isinstance(target, torch.optim.Optimizer):
        state = torch.optim.SGD([nn.Parameter(torch.ones(1)) for _ in range(5)]).state_dict()
    torch.save({"student": state}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth does not fit this run: student: "):
        dino_checkpoints.restart_from_checkpoint(tmp_path / "c.pth", student=target)


# ---- backbones ----


@pytest.mark.parametrize(
    ("arch", "width", "depth"),
    [
        ("vit_nano", 128, 4),
        ("vit_tiny", 192, 12),
        ("deit_tiny", 192, 12),
        ("deit_small", 384, 12),
        ("vit_base", 768, 12),
    ],
)
def test_vits_are_built_by_either_name(arch, width, depth):
    with torch.device("meta"):
        model, features = dino_backbones.build_backbone(arch, patch_size=8, img_size=64, drop_path_rate=0.2)
    assert (features, model.embed_dim, len(model.blocks)) == (width, width, depth)
    assert model.pos_embed.shape == (1, 65, width)
    assert model.patch_embed.patch_size == 8
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert isinstance(model.head, nn.Identity)


@pytest.mark.parametrize(
    ("arch", "width"), [("resnet50", 2048), ("mobilenet_v3_small", 1024), ("convnext_tiny", 768), ("densenet121", 1024)]
)
def test_convnets_are_built_without_their_classifier(arch, width):
    model, features = dino_backbones.build_backbone(arch)
    assert features == width
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, width)
    assert not dino_backbones.is_vit(model)


@pytest.mark.parametrize(
    ("arch", "width"),
    [
        ("squeezenet1_1", 512),  # its classifier is a convolution, with a pooling behind it
        ("vit_b_32", 768),  # heads.head
        ("swin_t", 768),  # head
        ("maxvit_t", 512),  # in a Sequential, without a bias
        ("xcit_nano_12_p16", 128),
        ("xcit_nano_12_p8_384", 128),
        ("timm:convnext_atto", 320),  # has its pooling in `head`
        ("timm:mambaout_femto", 1152),  # and more than that
        ("timm:vit_tiny_patch16_224", 192),
    ],
)
def test_backbones_of_every_kind_give_pooled_features_of_the_width_said(arch, width):
    model, features = dino_backbones.build_backbone(arch, img_size=224)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        alone = model.eval()(images)
        wrapped = utils.MultiCropWrapper(model, nn.Identity()).eval()([images])
    assert features == width
    assert alone.shape == (2, width)
    assert torch.equal(alone, wrapped)
    assert not torch.allclose(alone[0], alone[1])


@pytest.mark.parametrize("arch", ["timm:vit_tiny_patch16_224", "xcit_nano_12_p16", "timm:swin_tiny_patch4_window7_224"])
def test_transformers_of_timm_take_crops_of_two_sizes(arch):
    model, width = dino_backbones.build_backbone(arch, img_size=64)
    wrapped = utils.MultiCropWrapper(model, nn.Identity()).eval()
    with torch.no_grad():
        assert wrapped([torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 32, 32)]).shape == (2, width)


def test_drop_path_reaches_networks_of_timm_that_have_it():
    rates = [
        module.drop_prob
        for rate in (0.0, 0.3)
        for module in dino_backbones.build_backbone("timm:vit_tiny_patch16_224", drop_path_rate=rate)[0].modules()
        if type(module).__name__ == "DropPath"
    ]
    assert max(rates) == pytest.approx(0.3)
    assert dino_backbones.build_backbone("timm:mixnet_s", img_size=64, drop_path_rate=0.3)[1] == 1536


@pytest.mark.parametrize(
    ("arch", "size", "says"),
    [
        ("timm:convit_tiny", 96, "--arch timm:convit_tiny does not take images of 96 pixels"),
        ("timm:sam2_hiera_tiny_", 96, "unknown --arch timm:sam2_hiera_tiny_; did you mean timm:sam2_hiera_tiny"),
        ("xcit_smal_12_p16", 96, "unknown --arch xcit_smal_12_p16; did you mean xcit_small_12_p16"),
        ("vit_b_16", 96, "--arch vit_b_16 does not take images of 96 pixels"),
    ],
)
def test_networks_that_can_not_be_used_say_so(arch, size, says):
    with pytest.raises(UserError) as raised:
        dino_backbones.build_backbone(arch, img_size=size)
    assert says in str(raised.value)


def test_a_network_without_pooled_features_says_so():
    with pytest.raises(UserError, match="--arch some_net gives no pooled features"):
        dino_backbones.features_width(nn.Conv2d(3, 4, 3), 16, "some_net")


def test_without_timm_its_networks_are_a_user_error_and_the_others_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for arch in ("xcit_small_12_p16", "timm:resnet18"):
        with pytest.raises(UserError, match="pip install timm"):
            dino_backbones.build_backbone(arch)
    assert dino_backbones.build_backbone("vit_nano")[1] == 128


def test_the_width_is_found_without_a_trace_in_the_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert dino_backbones.features_width(model, 8, "some_net") == 4
    assert torch.equal(torch.rand(1), drawn)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_convnet_in_the_wrapper_gives_its_features_to_the_head():
    model, width = dino_backbones.build_backbone("mobilenet_v3_small")
    wrapped = utils.MultiCropWrapper(model, nn.Linear(width, 5)).eval()
    assert wrapped([torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 32, 32)]).shape == (4, 5)


@pytest.mark.parametrize(
    ("arch", "near"), [("vit_smal", "vit_small"), ("resnet5", "resnet50"), ("qwertz", "vit_small and resnet50")]
)
def test_an_unknown_backbone_is_named_with_its_nearest_neighbors(arch, near):
    with pytest.raises(UserError, match=f"unknown --arch {arch}.*{near}"):
        dino_backbones.build_backbone(arch)


def test_a_network_without_a_classifier_is_a_user_error():
    with pytest.raises(UserError, match="some_net does not end in a classifier"):
        dino_backbones.take_off_classifier(nn.Sequential(nn.Linear(3, 3)), "some_net")


@pytest.mark.parametrize("name", ["fc", "classifier", "head", "heads"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_last_linear_is_taken_off_under_each_of_its_names(name, nested):
    model, last = nn.Module(), nn.Linear(6, 4)
    setattr(model, name, nn.Sequential(nn.Linear(3, 6), last) if nested else last)
    assert dino_backbones.take_off_classifier(model, "some_net") is model
    layer = getattr(model, name)
    assert isinstance(layer[1] if nested else layer, nn.Identity)
    assert not nested or isinstance(layer[0], nn.Linear)


@pytest.mark.parametrize(
    ("device", "amp_dtype", "fused"),
    [("cpu", None, True), ("cpu", torch.bfloat16, False), ("cuda", torch.bfloat16, True), ("cuda", None, True)],
)
def test_fused_attention_is_on_except_in_half_precision_on_a_cpu(device, amp_dtype, fused):
    model = tiny_vit(depth=2)
    dino_backbones.use_fused_attention(model, torch.device(device), amp_dtype)
    assert [block.attn.fused for block in model.blocks] == [fused, fused]


def test_fused_attention_leaves_convnets_alone():
    dino_backbones.use_fused_attention(nn.Linear(1, 1), torch.device("cpu"))


def test_batch_norms_are_found_wherever_they_are():
    assert utils.has_batchnorms(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3))))
    assert utils.has_batchnorms(DINOHead(4, 3, use_bn=True))
    assert not utils.has_batchnorms(tiny_vit())


# ---- weights ----


def training_checkpoint(backbone, **more):
    wrapped = utils.MultiCropWrapper(backbone, DINOHead(16, 5, hidden_dim=8, bottleneck_dim=4))
    return {
        "student": prefixed({key: value + 1 for key, value in wrapped.state_dict().items()}),
        "teacher": wrapped.state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "args": {"arch": "vit_tiny"},
        "dino_loss": {"center": torch.zeros(1, 5)},
        **more,
    }


@pytest.fixture
def save(tmp_path):
    """save(state) -> path of a file that holds it."""

    def save(state):
        torch.save(state, tmp_path / "weights.pth")
        return str(tmp_path / "weights.pth")

    return save


def test_an_xcit_trained_with_its_authors_code_is_loaded(save):
    torch.manual_seed(0)
    target, _ = dino_backbones.build_backbone("xcit_nano_12_p16", img_size=32)
    state = {key: torch.randn_like(value) for key, value in target.state_dict().items() if value.is_floating_point()}
    published = {key.replace("pos_embed.", "pos_embeder."): value for key, value in state.items()}
    for block in (0, 1):
        for kind in ("weight", "bias"):
            three = [published.pop(f"cls_attn_blocks.{block}.attn.{part}.{kind}") for part in "qkv"]
            published[f"cls_attn_blocks.{block}.attn.qkv.{kind}"] = torch.cat(three)
    dino_backbones.load_weights(
        target, save({"student": prefixed({f"backbone.{k}": v for k, v in published.items()})}), "student"
    )
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in state.items())


def test_the_head_of_a_backbone_is_not_taken_for_the_projection_head(save):
    """ConvNeXt of timm keeps its last norm in a `head`, as the wrapper keeps the projection head."""
    source, target = (dino_backbones.build_backbone("timm:convnext_atto", img_size=64)[0] for _ in range(2))
    wrapped = utils.MultiCropWrapper(source, DINOHead(320, 5, hidden_dim=8, bottleneck_dim=4))
    nn.init.constant_(source.head.norm.weight, 3.0)
    assert "backbone.head.norm.weight" in wrapped.state_dict()
    dino_backbones.load_weights(target, save({"teacher": wrapped.state_dict()}))
    assert same_state(target, source)


# ---- initial weights ----


def test_initial_weights_are_the_teachers_or_the_only_network_of_the_file(save):
    checkpoint = training_checkpoint(tiny_vit())
    state, source = dino_backbones.initial_weights(save(checkpoint), "vit_tiny", 16)
    assert source.endswith("[teacher]")
    assert torch.equal(state["head.last_layer.weight_v"], checkpoint["teacher"]["head.last_layer.weight_v"])
    state, source = dino_backbones.initial_weights(
        save({"model": tiny_vit(2).state_dict(), "epoch": 7}), "vit_tiny", 16
    )
    assert source.endswith("[model]")
    assert torch.equal(state["cls_token"], tiny_vit(2).cls_token)
    plain = tiny_vit(3).state_dict()
    assert dino_backbones.initial_weights(save(plain), "vit_tiny", 16)[0].keys() == plain.keys()


def test_initial_weights_that_nobody_published_are_an_error():
    with pytest.raises(UserError, match="no weights were published for --arch vit_nano --patch_size 16"):
        dino_backbones.initial_weights("published", "vit_nano", 16)


@pytest.mark.parametrize(
    ("arch", "patch_size", "name"),
    [
        ("deit_tiny", 16, "vit_tiny_patch16_224"),
        ("xcit_nano_12_p8", 16, "xcit_nano_12_p8_224"),
        ("timm:convnext_atto.d2_in1k", 16, "convnext_atto.d2_in1k"),
        ("resnet18", 16, "resnet18"),
    ],
)
def test_timms_weights_are_asked_for_by_timms_name_and_fit(monkeypatch, arch, patch_size, name):
    import timm

    def create(asked, pretrained, **kwargs):
        assert (asked, pretrained) == (name, True)
        return real(asked, pretrained=False, **kwargs)  # stands in for the download

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    state, source = dino_backbones.initial_weights("timm", arch, patch_size)
    monkeypatch.undo()
    assert source == f"{arch if arch.startswith(('timm', 'xcit')) else 'timm:' + name} [pretrained]"
    model, _ = dino_backbones.build_backbone(arch, patch_size)
    matched, number = dino_backbones.load_backbone_state(model, state, source, arch)
    assert matched == number
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_without_a_connection_timms_weights_are_a_user_error(monkeypatch):
    import timm

    def create(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match="can't get timm's weights of timm:vit_tiny_patch16_224: no route"):
        dino_backbones.initial_weights("timm", "vit_tiny", 16)


def test_positions_are_resampled_to_the_grid_of_the_network():
    model = tiny_vit()  # a grid of its own
    side = math.isqrt(model.pos_embed.shape[1] - 1)
    larger = 2 * side
    ramp = torch.arange(larger).float()[None, :, None].expand(larger, larger, 16).reshape(1, -1, 16)
    state = {"pos_embed": torch.cat((torch.full((1, 1, 16), 7.0), ramp), dim=1)}
    dino_backbones.resize_state_grid(model, state)
    assert state["pos_embed"].shape == model.pos_embed.shape
    assert (state["pos_embed"][:, 0] == 7).all()
    rows = state["pos_embed"][0, 1:].view(side, side, 16)
    assert torch.allclose(rows[0], rows[-1])  # what runs along the columns still does
    assert (rows[0, 1:] > rows[0, :-1]).all()
    assert rows.mean().item() == pytest.approx((larger - 1) / 2, abs=1e-4)


def test_a_teacher_is_loaded_without_its_prefix_and_head(save, capsys):
    source, target = tiny_vit(0), tiny_vit(1)
    path = save(training_checkpoint(source))
    number = len(target.state_dict())
    assert dino_backbones.load_weights(target, path) == (number, number)
    assert same_state(target, source)
    assert capsys.readouterr().out == f"loaded {number} of {number} tensors from {path} [teacher]\n"


def test_a_student_is_loaded_without_both_prefixes(save):
    source, target = tiny_vit(0), tiny_vit(1)
    dino_backbones.load_weights(target, save(training_checkpoint(source)), "student")
    assert same_state(target, {key: value + 1 for key, value in source.state_dict().items()})


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_a_plain_state_dict_is_loaded_under_any_wrapper(save, prefix):
    source, target = tiny_vit(0), tiny_vit(1)
    dino_backbones.load_weights(target, save(prefixed(source.state_dict(), prefix)))
    assert same_state(target, source)


def test_a_convnets_weights_are_loaded_with_the_buffers_of_its_batch_norms(save):
    def net():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    source, target = net(), net()
    source(torch.rand(2, 3, 4, 4))
    dino_backbones.load_weights(target, save({"teacher": prefixed(source.state_dict(), "module.backbone.")}))
    assert same_state(target, source)
    assert target[1].num_batches_tracked == 1


def test_a_missing_tensor_is_named_and_nothing_is_loaded(save):
    source, target = tiny_vit(0).state_dict(), tiny_vit(1)
    del source["norm.bias"]
    with pytest.raises(UserError, match=r"has only 17 of the 18 tensors .*it lacks norm\.bias"):
        dino_backbones.load_weights(target, save(source))
    assert same_state(target, tiny_vit(1))


def test_left_over_tensors_are_named(save, capsys):
    source, target = tiny_vit(0), tiny_vit(1)
    assert dino_backbones.load_weights(target, save({**source.state_dict(), "mask_token": torch.zeros(1)})) == (18, 18)
    assert same_state(target, source)
    assert "warning: in the file but not in the model: mask_token\n" in capsys.readouterr().out


def test_weights_of_another_network_altogether_are_a_user_error(save):
    with pytest.raises(UserError, match=r"none of the 18 tensors of vit_tiny .*it has weight, bias.*--checkpoint_key"):
        dino_backbones.load_weights(tiny_vit(), save(nn.Linear(2, 2).state_dict()), arch="vit_tiny")


def test_a_tensor_of_another_shape_is_named_with_both_shapes_and_nothing_is_loaded(save):
    target = tiny_vit(1, num_heads=1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    path = save({**tiny_vit(0).state_dict(), "blocks.0.mlp.fc2.weight": torch.zeros(16, 48)})
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.fc2\.weight is \[16, 48\] in .* but \[16, 64\] in vit_tiny"):
        dino_backbones.load_weights(target, path, arch="vit_tiny")
    assert same_state(target, before)


def test_a_wrong_checkpoint_key_is_answered_with_the_networks_in_the_file(save):
    path = save(training_checkpoint(tiny_vit()))
    with pytest.raises(UserError, match=r"'techer'; --checkpoint_key could be one of student, teacher$"):
        dino_backbones.load_weights(tiny_vit(), path, "techer")


def test_a_checkpoint_key_that_holds_no_network_is_a_user_error(save):
    with pytest.raises(UserError, match="epoch"):
        dino_backbones.load_weights(tiny_vit(), save(training_checkpoint(tiny_vit())), "epoch")


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3)])
def test_a_file_without_a_state_dict_is_a_user_error(save, content):
    with pytest.raises(UserError, match=f"holds a {type(content).__name__}, not a state dict"):
        dino_backbones.load_weights(tiny_vit(), save(content))


def test_the_positional_grid_of_the_file_is_adopted(save):
    source, target = tiny_vit(0, img_size=[48]), tiny_vit(1, img_size=[32])
    dino_backbones.load_weights(target, save(source.state_dict()))
    assert same_state(target, source)
    assert (target.patch_embed.num_patches, target.patch_embed.img_size) == (36, 48)
    for size in (48, 32, 40):
        images = tensor("images", (2, 3, size, size))
        assert torch.equal(target.eval()(images), source.eval()(images))


def test_an_adopted_grid_keeps_precision_and_freezing_of_the_model(save):
    target = tiny_vit(1).double().requires_grad_(False)
    dino_backbones.load_weights(target, save(tiny_vit(0, img_size=[48]).state_dict()))
    assert target.pos_embed.dtype == torch.float64
    assert not target.pos_embed.requires_grad


@pytest.mark.parametrize("shape", [(1, 17, 24), (1, 16, 16)])
def test_positions_that_fit_no_grid_are_a_shape_error(save, shape):
    path = save({**tiny_vit().state_dict(), "pos_embed": torch.zeros(shape)})
    with pytest.raises(UserError, match=r"pos_embed is \[1, .* but \[1, 17, 16\]"):
        dino_backbones.load_weights(tiny_vit(), path)


def test_random_weights_are_left_as_they_are_and_said_so(capsys):
    target = tiny_vit()
    assert dino_backbones.load_weights(target, "random") == (0, len(target.state_dict()))
    assert same_state(target, tiny_vit())
    assert "random weights, as asked for" in capsys.readouterr().out


@pytest.fixture
def downloads(monkeypatch):
    """Stands in for the network: the URLs asked for; each holds what `state` does."""
    asked = []

    def download(url):
        asked.append(url)
        return download.state

    monkeypatch.setattr(hubconf, "_download", download)
    asked_and_state = argparse.Namespace(urls=asked, hold=lambda state: setattr(download, "state", state))
    asked_and_state.hold(None)
    return asked_and_state


@pytest.mark.parametrize("arch", ["vit_small", "deit_small"])
def test_without_a_file_the_published_weights_are_taken(downloads, capsys, arch):
    source, target = tiny_vit(0), tiny_vit(1)
    downloads.hold(source.state_dict())
    number = len(target.state_dict())
    assert dino_backbones.load_weights(target, "", arch=arch, patch_size=8) == (number, number)
    url = hubconf.BASE_URL + "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
    assert downloads.urls == [url]
    assert same_state(target, source)
    assert f"from {url}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arch", "patch_size", "named"), [("vit_tiny", 16, "vit_tiny with patch size 16"), ("resnet18", 16, "resnet18")]
)
def test_where_nothing_was_published_random_weights_are_kept_with_a_warning(downloads, capsys, arch, patch_size, named):
    target = tiny_vit()
    assert dino_backbones.load_weights(target, "", arch=arch, patch_size=patch_size) == (0, len(target.state_dict()))
    assert downloads.urls == []
    assert same_state(target, tiny_vit())
    assert f"warning: no weights were published for {named}:" in capsys.readouterr().out


def test_a_download_that_fails_is_a_user_error(monkeypatch):
    def unreachable(url):
        raise OSError("name resolution failed")

    monkeypatch.setattr(hubconf, "_download", unreachable)
    with pytest.raises(UserError, match=r"can't download https.*name resolution failed.*--pretrained_weights"):
        dino_backbones.load_weights(tiny_vit(), "", arch="vit_small", patch_size=16)


def test_the_public_name_of_load_weights_is_the_same_function():
    assert dino_backbones.load_pretrained_weights is dino_backbones.load_weights


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


def test_normalize_leaves_floats_and_the_given_pixels_alone():
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


# ---- features ----


class Levels(Dataset):
    """Images of one level each, and their places."""

    def __init__(self, number, dtype):
        self.number, self.dtype = number, dtype

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        image = torch.full((3, 4, 4), 10 * i + 5, dtype=torch.uint8)
        return (image if self.dtype == torch.uint8 else utils.normalize(image)), i


class FirstPixel(nn.Module):
    """[B, 3, h, w] -> the first pixel of each image [B, 3] in float64, times a parameter."""

    def __init__(self, as_tuple=False):
        super().__init__()
        self.gain, self.as_tuple = nn.Parameter(torch.tensor(2.0)), as_tuple

    def forward(self, x):
        features = (self.gain * x[:, :, 0, 0]).double()
        return (features, None) if self.as_tuple else features


def expected_features(number):
    rows = []
    for i in range(number):
        level = (10 * i + 5) / 255
        rows.append([2 * (level - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))])
    return rows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_features_come_in_the_order_of_the_data_set(dtype, as_tuple):
    loader = DataLoader(Levels(11, dtype), batch_size=3, sampler=[7, 2, 10, 0, 1, 9, 8, 3, 4, 6, 5])
    features = dino_features.extract_features(FirstPixel(as_tuple), loader)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert_near(features, expected_features(11), 1e-6)


def test_multi_scale_features_are_the_normalized_mean_over_three_scales():
    images = tensor("images", (2, 3, 64, 48))
    network = nn.Sequential(nn.Conv2d(3, 5, 7, stride=3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        half = F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False)
        middle = F.interpolate(images, scale_factor=1 / math.sqrt(2), mode="bilinear", align_corners=False)
        assert (half.shape[2:], middle.shape[2:]) == ((32, 24), (45, 33))
        want = (network(images) + network(middle) + network(half)).double() / 3
        assert_near(dino_features.multi_scale(images, network), want / want.norm(dim=1, keepdim=True), 1e-6)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_features_over_scales_are_extracted_on_demand(as_tuple):
    features = dino_features.extract_features(FirstPixel(as_tuple), DataLoader(Levels(3, torch.uint8)), multiscale=True)
    want = np.array(expected_features(3))  # images of one level look the same at each scale
    assert_near(features, want / np.linalg.norm(want, axis=1, keepdims=True), 1e-6)


# ---- two processes ----

TWO_PROCESSES = """
import argparse, json, sys
sys.path.insert(0, {root!r})
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
import utils

{classes}

args = argparse.Namespace(device="cpu", dist_url="file://{folder}/meeting")
utils.init_distributed_mode(args)
rank = utils.get_rank()
utils.log("said once")

data = Levels(7, torch.uint8)
loader = DataLoader(data, batch_size=3, sampler=DistributedSampler(data, shuffle=False))
features = utils.extract_features(FirstPixel(), loader)

meter = utils.SmoothedValue()
for value in ((1.0, 2.0), (6.0, torch.tensor(3.0), 13.0))[rank]:
    meter.update(value)
meter.synchronize_between_processes()

utils.save_on_master({{"rank": rank}}, "{folder}/saved.pth")
result = {{
    "rank": [args.rank, args.world_size, args.gpu, rank, utils.get_world_size(), utils.is_main_process()],
    "features": None if features is None else features.tolist(),
    "meter": [meter.count, meter.total, meter.global_avg, meter.avg],
}}
print(json.dumps(result))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two real processes found: [(result, the lines they printed before it)]."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    classes = inspect.getsource(Levels) + inspect.getsource(FirstPixel)
    script.write_text(TWO_PROCESSES.format(root=str(ROOT), classes=classes, folder=folder))
    started = []
    for rank in "01":
        launcher = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        command = [sys.executable, str(script)]
        started.append(
            subprocess.Popen(command, env={**os.environ, **launcher}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    results = []
    try:
        for process in started:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err.decode()
            *lines, last = out.decode().splitlines()
            results.append((json.loads(last), lines))
    finally:
        for process in started:
            process.kill()
    return results


def test_each_of_two_processes_knows_its_place(two_processes):
    assert [result["rank"] for result, _ in two_processes] == [[0, 2, 0, 0, 2, True], [1, 2, 1, 1, 2, False]]


def test_two_processes_gather_features_in_order_on_rank_0_alone(two_processes):
    (first, _), (second, _) = two_processes
    assert_near(first["features"], expected_features(7), 1e-6)
    assert second["features"] is None


def test_two_processes_add_up_their_meters_and_keep_their_windows(two_processes):
    (first, _), (second, _) = two_processes
    assert first["meter"] == [5, 25, 5, 1.5]
    assert second["meter"][:3] == [5, 25, 5]
    assert second["meter"][3] == pytest.approx(22 / 3)


def test_only_rank_0_of_two_prints(two_processes):
    (_, first), (_, second) = two_processes
    assert first[0] == "said once"
    assert any(line.startswith("Features:") for line in first)
    assert second == []


def test_sigterm_clears_away_what_is_half_written(tmp_path):
    code = f"""
import os, signal, tempfile
import argparse, utils
def main(args):
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        os.kill(os.getpid(), signal.SIGTERM)
utils.run(main, argparse.ArgumentParser(add_help=False), "")
"""
    assert run_script("-c", code, check=False).returncode == 143
    assert not list(tmp_path.iterdir())


def test_an_output_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"can't write to --output_dir {path}: a file is in its way"):
            dino_cli.check_output_dir(path)


def test_timm_has_no_weights_of_our_smallest_vit():
    with pytest.raises(UserError, match="timm has no weights of vit_nano_patch8_224"):
        dino_backbones.initial_weights("timm", "vit_nano", 8)
