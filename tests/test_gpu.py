"""What only a GPU has. tests/gpu/gpu_check.py checks more, and measures."""

import json
import re
import time
import warnings

import pytest
import torch
from conftest import ROOT, run_script

import dino_backbones
import dino_steps
import main_dino
import utils

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])


def checks(tmp_path, device, *sections):
    script = ROOT / "tests" / "gpu" / "gpu_check.py"
    run_script(script, "--device", device, "--tiny", "--out", tmp_path, "--only", *sections, "--budget", 600)
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert set(found["states"].values()) == {"done"}, found["states"]
    errors = {what: error for section in sections for what, error in found[section]["errors"].items()}
    wrong = {name: c for section in sections for name, c in found[section]["checks"].items() if not c[0]}
    assert not errors
    assert not wrong
    return found


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_loss_and_gradients_of_all_precisions_agree_with_float64(tmp_path, device):
    assert len(checks(tmp_path, device, "numerics")["numerics"]["checks"]) >= 10


@pytest.mark.slow
@on_gpu
def test_runs_ranks_and_compiled_code_pass_all_checks(tmp_path, device):
    checks(tmp_path, device, "runs", "ranks", "compile")


@pytest.mark.slow
@on_gpu
def test_the_benchmark_measures_networks_on_a_gpu(device):
    words = ("--arch", "vit_nano", "--batch_size_per_gpu", 4, "--rounds", 1, "--device", device)
    lines = run_script("benchmark.py", *words, "--", "step", "inference", "multicrop", fresh=True).stdout.splitlines()
    rows = {re.split(r" {2,}", line)[0]: re.split(r" {2,}", line)[1:] for line in lines if "  " in line}
    precisions = ("float32", "tf32", "bf16", "fp16", "compiled")
    steps = [*(f"this {name}" for name in precisions), "plain fp16", "plain bf16"]
    assert rows.keys() >= {*steps, "2 x 224 + 10 x 96 pixels", "vit_nano/16 float32", "vit_nano/16 bf16"}
    assert all(float(rows[name][0]) > 0 for name in steps)
    assert rows["this bf16"][-1] == "0"  # host waits
    assert float(rows["plain bf16"][-1]) > 0


@pytest.mark.slow
@on_gpu
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("arch", ["resnet8", "vit_nano", "vit_nano_conv"])
def test_cuda_graphs_train_as_eager_steps_do(device, arch, mixed):
    rounding = 10 if mixed else 1  # of bf16, which compiled code rounds less often
    flags = {"arch": arch, "patch_size": 8, "out_dim": 64, "global_crops_size": 32, "local_crops_size": 16}
    flags |= {"local_crops_number": 2, "batch_size_per_gpu": 16, "use_fp16": mixed}
    losses, weights, launches = [], [], []
    for mode in ("false", "reduce-overhead"):
        args = dino_steps.training_args(**flags, device=device, compile=mode)
        training, crops = dino_steps.OurTraining(args), dino_steps.random_crops(args, 16)
        with torch.profiler.profile() as profile:
            losses.append([training.train(crops, 1, lr=1e-3)["loss"] for _ in range(6)])
        launches.append(sum(event.name == "cudaGraphLaunch" for event in profile.events()))
        networks = (training.parts.student, training.parts.teacher)
        weights.append(torch.cat([v.flatten().double() for n in networks for v in n.state_dict().values()]))
    assert launches == [0, 5 * 6]  # teacher, student, loss, and two of them backward
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 * rounding)
    assert losses[0][-1] < losses[0][0] - 0.1
    assert (weights[0] - weights[1]).norm() < 1e-2 * rounding * weights[0].norm()


@on_gpu
def test_waiting_is_the_time_in_which_the_gpu_waits(device):
    """The host needs 30 ms per item, and the GPU 120 ms per step: the GPU never waits."""

    class Items:
        def __len__(self):
            return 10

        def __iter__(self):
            for i in range(10):
                time.sleep(0.03)
                yield i

    torch.zeros(1, device=device)
    logger = utils.MetricLogger()
    for _ in logger.log_every(Items(), 100, "x"):
        torch.cuda._sleep(int(0.12 * 1.5e9))  # cycles
    assert logger.waiting < 0.1


@on_gpu
def test_positions_have_the_same_gradients_twice(device):
    model, _ = dino_backbones.build_backbone("vit_nano", 16, 224)
    images, gradients = torch.randn(8, 3, 96, 96, device=device), []
    model = model.to(device)
    for _ in range(2):
        model.zero_grad()
        model.prepare_tokens(images).square().sum().backward()
        gradients.append(model.pos_embed.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_convnets_train_in_channels_last(device):
    words = ["--arch", "resnet18", "--out_dim", "64", "--global_crops_size", "32", "--local_crops_number", "0"]
    args = main_dino.get_args_parser().parse_args(words)
    student, _ = main_dino.build_student_and_teacher(args, torch.device(device), torch.bfloat16)
    assert student.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@on_gpu
def test_each_tensor_is_scaled_by_its_factor(device):
    tensors = [torch.randn(shape, device=device) for shape in ((), (5,), (3, 4), (2, 3, 4, 4))]
    tensors.append(torch.randn(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last))
    factors = torch.rand(len(tensors), device=device)
    wanted = [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    utils.scale_each(tensors, factors)
    assert all(map(torch.equal, tensors, wanted))


@on_gpu
def test_meters_and_other_numbers_are_read_with_one_wait(device):
    logger = utils.MetricLogger()
    logger.update(loss=torch.tensor(2.0, device=device), entropy=torch.tensor(1.5, device=device))
    others = torch.arange(3.0, device=device), torch.ones(2, device=device)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found = utils.read_together(logger.meters.values(), *others)
        torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing" in str(warning.message) for warning in seen) == 1
    assert (found, logger.loss.value, logger.entropy.value) == ([[0, 1, 2], [1, 1]], 2, 1.5)
