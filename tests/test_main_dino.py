"""main_dino.py: flags, crops, loss, steps, runs, resuming, several processes."""

import argparse
import json
import math
import random
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torch.nn as nn
from conftest import (
    ROOT,
    SMALL_RUN,
    arguments_of,
    assert_near,
    assert_same,
    compiles,
    ending,
    fill,
    free_port,
    run_script,
    shared,
    tensor,
)
from PIL import Image

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_compile
import dino_run
import dino_steps
import main_dino
import utils
import vision_transformer as vits
from vision_transformer import DINOHead

pytestmark = pytest.mark.usefixtures("small_networks")
arguments = partial(arguments_of, main_dino)


def train(root, output, *flags):
    """A small run in this process; returns its checkpoint."""
    main_dino.train_dino(arguments(*SMALL_RUN, "--data_path", root / "train", "--output_dir", output, *flags))
    return torch.load(output / "checkpoint.pth", weights_only=True)


def assert_same_run(one, other):
    for part in ("student", "teacher", "optimizer", "epoch", "dino_loss"):
        assert_same(one[part], other[part])


# ---- arguments ----

# Names, defaults: what commands written for the authors' release rely on.
PUBLIC_DEFAULTS = {
    "arch": "vit_small",
    "patch_size": 16,
    "out_dim": 65536,
    "norm_last_layer": True,
    "momentum_teacher": 0.996,
    "use_bn_in_head": False,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0,
    "use_fp16": True,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
    "batch_size_per_gpu": 64,
    "epochs": 100,
    "freeze_last_layer": 1,
    "lr": 0.0005,
    "warmup_epochs": 10,
    "min_lr": 1e-6,
    "optimizer": "adamw",
    "drop_path_rate": 0.1,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_number": 8,
    "local_crops_scale": (0.05, 0.4),
    "output_dir": ".",
    "saveckp_freq": 20,
    "seed": 0,
    "num_workers": dino_cli.default_workers(),
    "dist_url": "env://",
}


def test_flags_have_the_public_names_and_defaults():
    args = vars(arguments())
    assert {name: args[name] for name in PUBLIC_DEFAULTS} == PUBLIC_DEFAULTS
    assert (args["global_crops_size"], args["local_crops_size"], args["device"]) == (224, 96, "auto")


def test_the_momentum_rises_to_its_final_value_along_a_cosine():
    for end in (1.0, 0.9, 0.996):
        args = arguments("--epochs", 10, "--momentum_teacher_end", end)
        args.images_per_step = 64
        found = main_dino.build_schedules(args, 5)["momentum"]
        want = [end + 0.5 * (0.996 - end) * (1 + math.cos(math.pi * step / 50)) for step in range(50)]
        assert np.abs(found - want).max() < 1e-12
    assert arguments().momentum_teacher_end == 1


def test_parser_can_be_a_parent_of_another():
    args = argparse.ArgumentParser(parents=[main_dino.get_args_parser()]).parse_args(["--local-rank=3"])
    assert args.local_rank == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--epochs 5", "--warmup_epochs 10 is longer than the run (--epochs 5)"),
        (
            "--epochs 5 --warmup_teacher_temp_epochs 6",
            "--warmup_epochs 10 and --warmup_teacher_temp_epochs 6 are longer than the run (--epochs 5)",
        ),
        ("--epochs 20 --warmup_teacher_temp_epochs 30", "--warmup_teacher_temp_epochs 30 is longer"),
        ("--global_crops_size 100", "--global_crops_size 100 is not a multiple of --patch_size 16. Use 96 or 112"),
        ("--local_crops_size 8", "--local_crops_size 8 is not a multiple of --patch_size 16. Use 16"),
        ("--arch vit_smal", "vit_small"),
        ("--data_path /nowhere/at/all", "--data_path /nowhere/at/all does not exist"),
        ("--local_crops_scale 0.5 0.1", "--local_crops_scale 0.5 0.1"),
        ("--blur_radius 2 1", "--blur_radius 2.0 1.0"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(monkeypatch, capsys, tmp_path, flags, says):
    code, error = ending(
        monkeypatch, capsys, main_dino, "--device", "cpu", "--output_dir", tmp_path / "out", *flags.split()
    )
    assert code == 2
    assert says in error
    assert not list(tmp_path.rglob("*.*"))


def test_strict_images_ends_the_run_at_a_broken_image_and_names_it(refusal, tiny_root, tmp_path):
    folder = tmp_path / "train" / "class"
    folder.mkdir(parents=True)
    whole = next((tiny_root / "train" / "brick").iterdir()).read_bytes()
    for i in range(8):
        (folder / f"{i}.png").write_bytes(whole if i != 3 else whole[: len(whole) // 2])
    for workers in (0, 1):
        flags = [*SMALL_RUN, "--data_path", tmp_path / "train", "--output_dir", tmp_path, "--num_workers", workers]
        error = refusal(main_dino, *flags, "--strict_images", "true")
        assert error.startswith(f"error: can't read the image {folder / '3.png'}: ")


# ---- crops ----


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="the numbers are Pillow 13's")
def test_crops_match_the_reference_numbers():
    reference = np.load(shared("goldens/augmentation.npz"))
    image = Image.fromarray(reference["image"])
    seeds = sorted({int(key.split("_")[0][4:]) for key in reference.files if key.startswith("seed")})
    for seed in seeds:
        for as_uint8 in (False, True):
            utils.fix_random_seeds(seed)
            augment = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 2, as_uint8=as_uint8)
            for i, crop in enumerate(augment(image)):
                every = 4 if i < 2 else 1
                levels = reference[f"seed{seed}_crop{i}"]
                if as_uint8:
                    got = crop[:, ::every, ::every].numpy()
                    got = got if got.shape == levels.shape else got.transpose(1, 2, 0)
                    np.testing.assert_array_equal(got, levels)
                normalized = utils.normalize(crop)
                assert_near(normalized.mean((1, 2)), reference[f"seed{seed}_crop{i}_mean"], 1e-5)
                assert_near(normalized.std((1, 2)), reference[f"seed{seed}_crop{i}_std"], 1e-5)


# ---- loss ----


def loss_by_hand(student, teacher, center, student_temp, teacher_temp, ncrops):
    """The loss in float64, pair by pair, with the log-softmax written out."""
    student = student.double().chunk(ncrops)
    teacher = ((teacher.double() - center.double()) / teacher_temp).softmax(-1).chunk(2)
    terms = [
        -(p * (s / student_temp).log_softmax(-1)).sum(-1).mean()
        for i, p in enumerate(teacher)
        for v, s in enumerate(student)
        if v != i
    ]
    assert len(terms) == 2 * ncrops - 2
    return sum(terms) / len(terms)


def test_loss_gradient_and_center_match_the_reference_numbers():
    reference = np.load(shared("goldens/loss.npz"))
    for ncrops, batch, width in ((10, 4, 128), (2, 3, 64)):
        loss_module = main_dino.DINOLoss(width, ncrops, 0.04, 0.07, 3, 6)
        for epoch in range(4):
            student = tensor(f"loss_s{ncrops}_{epoch}", (ncrops * batch, width), 2.0).requires_grad_()
            teacher = tensor(f"loss_t{ncrops}_{epoch}", (2 * batch, width), 0.5)
            loss = loss_module(student, teacher, epoch)
            loss.backward()
            key = f"c{ncrops}_ep{epoch}"
            assert_near(loss, reference[f"{key}_loss"], 1e-6, key)
            assert_near(student.grad, reference[f"{key}_grad"], 1e-5, key)
            assert_near(loss_module.center, reference[f"{key}_center"], 1e-6, key)


def test_teacher_temperatures_match_the_reference_numbers():
    reference = json.loads(shared("goldens/schedules.json").read_text())
    (cases,) = (cases for name, cases in reference.items() if name != "meta" and not name.startswith("cosine"))
    for case, want in cases.items():
        assert_near(main_dino.DINOLoss(8, 4, *json.loads(case)).teacher_temp_schedule, want, 1e-12)


@pytest.mark.parametrize("ncrops", [2, 5])
def test_loss_and_gradient_equal_a_float64_loop_over_pairs(ncrops):
    torch.manual_seed(ncrops)
    student, teacher = torch.randn(ncrops * 3, 40, requires_grad=True), torch.randn(6, 40)
    module = main_dino.DINOLoss(40, ncrops, 0.04, 0.07, 2, 4)
    module.center.copy_(torch.randn(1, 40) * 0.3)
    want = loss_by_hand(student, teacher, module.center, 0.1, 0.07, ncrops)
    (want_gradient,) = torch.autograd.grad(want, student)
    got = module(student, teacher, epoch=2)
    (gradient,) = torch.autograd.grad(got, student)
    assert_near(got, want, 1e-6)
    assert_near(gradient, want_gradient, 1e-5)


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_the_loss_of_one_output_is_exactly_zero(batch):
    student = tensor("one/student", (4 * batch, 1), 5.0).requires_grad_()
    loss = main_dino.DINOLoss(1, 4, 0.04, 0.04, 0, 1)(student, tensor("one/teacher", (2 * batch, 1), 5.0), 0)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_center_moves_a_tenth_of_the_way_to_the_teachers_mean():
    module = main_dino.DINOLoss(8, 2, 0.04, 0.04, 0, 1)
    module.center.fill_(1.0)
    teacher = torch.randn(6, 8)
    module(torch.randn(6, 8), teacher, 0)
    assert_near(module.center, 0.9 + 0.1 * teacher.double().mean(0, keepdim=True), 1e-6)


def test_loss_uses_the_center_of_earlier_batches():
    student, teacher = torch.randn(4, 8), torch.randn(4, 8)
    module = main_dino.DINOLoss(8, 2, 0.04, 0.04, 0, 1)
    assert_near(module(student, teacher, 0), loss_by_hand(student, teacher, torch.zeros(1, 8), 0.1, 0.04, 2), 1e-6)


def test_a_compiled_loss_is_compiled_once_for_all_teacher_temperatures():
    from torch._dynamo.testing import CompileCounter

    graphs, epochs = CompileCounter(), 10  # torch gives up compiling after 8 graphs
    plain, compiled = (main_dino.DINOLoss(16, 4, 0.04, 0.07, epochs, epochs) for _ in range(2))
    compiled.terms = torch.compile(compiled.terms, backend=graphs, dynamic=False)
    student, teacher = tensor("student", (12, 16)), tensor("teacher", (6, 16))
    for epoch in range(epochs):
        assert_near(compiled(student, teacher, epoch), plain(student, teacher, epoch), 1e-6)
    assert graphs.frame_count == 1


def test_teacher_temperature_rises_linearly_then_is_constant():
    schedule = main_dino.DINOLoss(4, 2, 0.04, 0.07, 4, 6).teacher_temp_schedule
    np.testing.assert_allclose(schedule, [0.04, 0.05, 0.06, 0.07, 0.07, 0.07], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_for_half_precision_logits_under_autocast(dtype):
    student, teacher = torch.randn(8, 512).to(dtype), torch.randn(4, 512).to(dtype)
    module = main_dino.DINOLoss(512, 4, 0.04, 0.04, 0, 1)
    want = loss_by_hand(student, teacher, module.center, 0.1, 0.04, 4)
    with torch.autocast("cpu", dtype=dtype):
        got = module(student, teacher, 0)
    assert got.dtype == module.center.dtype == torch.float32
    assert_near(got, want, 1e-6)


def test_the_teacher_gets_no_gradient():
    student, teacher = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    main_dino.DINOLoss(8, 2, 0.04, 0.04, 0, 1)(student, teacher, 0).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


# ---- steps ----


def test_teacher_averages_parameters_and_keeps_its_buffers():
    def network():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    teacher, student = network(), network()
    before = {name: p.detach().double().clone() for name, p in teacher.named_parameters()}
    student[1].running_mean.fill_(7.0)
    main_dino.update_teacher(list(teacher.parameters()), list(student.parameters()), 0.9)
    for name, p in teacher.named_parameters():
        assert_near(p, 0.9 * before[name] + 0.1 * dict(student.named_parameters())[name].detach().double(), 1e-6)
    assert torch.equal(teacher[1].running_mean, torch.zeros(4))


@pytest.mark.parametrize("case", ["adamw", "sgd"])
def test_six_steps_match_the_reference_trajectory(case):
    reference = json.loads(shared("goldens/trajectory.json").read_text())
    names = [name for name in reference if name.startswith(case)]
    assert names
    for name in names:
        check_trajectory(name, reference[name])


def check_trajectory(name, want):
    opt_name, clip, freeze = name.split("_")
    tag = f"traj_{opt_name}_{clip[4:]}_{freeze[6:]}"

    def network():
        norm = partial(nn.LayerNorm, eps=1e-6)
        size = {"img_size": [64], "patch_size": 16, "embed_dim": 96, "depth": 3, "num_heads": 3}
        backbone = vits.VisionTransformer(**size, mlp_ratio=4, qkv_bias=True, norm_layer=norm)
        return fill(utils.MultiCropWrapper(backbone, DINOHead(96, 256, hidden_dim=2048)), f"open/{tag}")

    student, teacher = network(), network().requires_grad_(False)
    steps = len(want["losses"])
    batches = []
    for step in range(steps):
        shapes = [(4, 3, 64, 64)] * 2 + [(4, 3, 32, 32)] * 4
        batches.append([tensor(f"{tag}_im{step}_{i}", shape) for i, shape in enumerate(shapes)])
    per_epoch = steps // 3
    schedules = {
        "lr": utils.cosine_scheduler(0.002, 1e-5, 3, per_epoch, warmup_epochs=1),
        "weight_decay": utils.cosine_scheduler(0.04, 0.4, 3, per_epoch),
        "momentum": utils.cosine_scheduler(0.9, 1, 3, per_epoch),
    }
    optimizer = utils.build_optimizer(opt_name, utils.get_params_groups(student), torch.device("cpu"))
    loss = main_dino.DINOLoss(256, 6, 0.04, 0.07, 2, 3)
    losses = []
    loss.register_forward_hook(lambda module, inputs, output: losses.append(output.item()))
    args = arguments("--epochs", 3, "--clip_grad", clip[4:], "--freeze_last_layer", freeze[6:])
    args.images_per_step = 4
    parts = main_dino.Parts(student, teacher, loss, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    for epoch in range(3):
        loader = [(crops, None) for crops in batches[epoch * per_epoch : (epoch + 1) * per_epoch]]
        main_dino.train_one_epoch(parts, loader, schedules, epoch, args)
    assert_near(losses, want["losses"], 1e-5, name)
    for side, network in (("student", student), ("teacher", teacher)):
        state = network.state_dict()
        sums = [[v.double().sum(), v.double().pow(2).sum()] for v in (state[key] for key in want[side])]
        squares = np.array(sums)[:, 1]
        assert_near(squares, [v[1] for v in want[side].values()], 1e-4, f"{name} {side}")
        # A sum may be near 0: its error is measured by the length of the tensor.
        scale = np.sqrt(squares * [state[key].numel() for key in want[side]]) + 1e-12
        assert np.abs((np.array(sums)[:, 0] - [v[0] for v in want[side].values()]) / scale).max() < 1e-4


def one_epoch_of(monkeypatch, tmp_path, tiny_root, *flags):
    """The dtypes of logits that the loss saw in a small run, and the run's checkpoint."""
    seen = set()
    forward = main_dino.DINOLoss.forward

    def spy(self, student, teacher, *rest, **named):
        seen.update((student.dtype, teacher.dtype))
        return forward(self, student, teacher, *rest, **named)

    monkeypatch.setattr(main_dino.DINOLoss, "forward", spy)
    checkpoint = train(tiny_root, tmp_path, "--epochs", 1, "--warmup_epochs", 0, *flags)
    for value in checkpoint["teacher"].values():
        assert value.isfinite().all()
    return seen, checkpoint


def start_scaling_at(monkeypatch, scale):
    """Gradients of these small networks overflow at the default scale."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale))


def test_fp16_trains_with_a_gradient_scaler_and_saves_it(monkeypatch, tmp_path, tiny_root):
    start_scaling_at(monkeypatch, 2.0**10)
    seen, checkpoint = one_epoch_of(monkeypatch, tmp_path, tiny_root, "--amp_dtype", "fp16")
    assert seen == {torch.float16}
    assert checkpoint["fp16_scaler"]["scale"] > 0
    assert checkpoint["fp16_scaler"]["_growth_tracker"] > 0
    steps = [state["step"].item() for state in checkpoint["optimizer"]["state"].values()]
    assert max(steps) > 0


def test_norms_of_overflowing_gradients_are_not_in_the_log(monkeypatch, tmp_path, tiny_root):
    start_scaling_at(monkeypatch, 2.0**60)  # too large for all steps of the epoch
    one_epoch_of(monkeypatch, tmp_path, tiny_root, "--amp_dtype", "fp16")
    (line,) = map(json.loads, (tmp_path / "log.txt").read_text().splitlines())
    assert not {"train_grad_norm", "train_grad_norm_max"} & set(line)
    assert math.isfinite(line["train_center_norm"])


def test_bf16_trains_without_a_scaler(monkeypatch, tmp_path, tiny_root):
    seen, checkpoint = one_epoch_of(monkeypatch, tmp_path, tiny_root, "--amp_dtype", "bf16")
    assert seen == {torch.bfloat16}
    assert "fp16_scaler" not in checkpoint


def test_last_layer_is_frozen_for_the_first_epochs_only(tmp_path, tiny_root):
    flags = ("--freeze_last_layer", 1, "--saveckp_freq", 1)
    train(tiny_root, tmp_path, *flags)
    torch.manual_seed(0)
    args = arguments(*SMALL_RUN)
    start, _ = main_dino.build_student_and_teacher(args, torch.device("cpu"), None)
    first = torch.load(tmp_path / "checkpoint0000.pth", weights_only=True)["student"]
    second = torch.load(tmp_path / "checkpoint0001.pth", weights_only=True)["student"]
    key = "head.last_layer.weight_v"
    assert torch.equal(first[f"module.{key}"], start.state_dict()[key])
    assert not torch.equal(first["module.head.mlp.0.weight"], start.state_dict()["head.mlp.0.weight"])
    assert not torch.equal(second[f"module.{key}"], first[f"module.{key}"])
    gain = second["module.head.last_layer.weight_g"]
    assert torch.equal(gain, torch.ones_like(gain))


# ---- losses that are not finite ----


def losses_that_are(monkeypatch, bad):
    """The loss of the calls whose number is in `bad` becomes NaN."""
    forward, calls = main_dino.DINOLoss.forward, []

    def spoil(*args, **named):
        calls.append(len(calls))
        return forward(*args, **named) * (math.nan if calls[-1] in bad else 1)

    monkeypatch.setattr(main_dino.DINOLoss, "forward", spoil)


def test_too_many_bad_steps_exit_with_3_and_keep_the_checkpoint(monkeypatch, capsys, tmp_path, tiny_root):
    flags = [*SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", tmp_path, "--max_bad_steps", 2]
    flags += ["--grad_accum_steps", 2, "--batch_size_per_gpu", 4]
    losses_that_are(monkeypatch, range(12, 100))  # 5 steps of 2 passes an epoch
    code, error = ending(monkeypatch, capsys, main_dino, *flags)
    assert code == 3
    assert "the loss is nan in epoch 1, step 3, after 2 such steps in a row; bad_step.json" in error
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 1
    (found,) = json.loads((tmp_path / "bad_step.json").read_text())
    assert (found["epoch"], found["step"], found["loss"]) == (1, 3, "nan")
    assert np.array(found["loss_terms_of_last_pass"]).shape == (2, 4)
    assert len(found["images"]) == 8
    assert all(Path(image).is_file() for image in found["images"])
    assert {"backbone.cls_token", "head.mlp.0.weight"} <= set(found["gradient_norms"])


def test_a_skipped_step_leaves_no_trace(monkeypatch, capsys, tmp_path, tiny_root):
    """The first step is skipped: networks, center and optimizer are as before it."""
    losses_that_are(monkeypatch, {0})
    states = []

    class Watching(dino_run.Run):
        def vote(self, loss):
            networks = (self.parts.student, self.parts.teacher, self.parts.dino_loss)
            states.append([{k: v.clone() for k, v in network.state_dict().items()} for network in networks])
            super().vote(loss)

    monkeypatch.setattr(dino_run, "Run", Watching)
    flags = ("--epochs", 1, "--warmup_epochs", 0, "--use_bn_in_head", "false")
    checkpoint = train(tiny_root, tmp_path, *flags)
    for before, after in zip(states[0], states[1], strict=True):
        assert_same(before, after)
    assert not torch.equal(states[1][2]["center"], states[2][2]["center"])
    assert all(value.isfinite().all() for value in checkpoint["student"].values())
    assert {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()} == {4}
    assert "the loss is nan in epoch 0, step 0: this step is skipped (1 in a row)" in capsys.readouterr().out


def test_single_bad_steps_are_not_added_up(monkeypatch, tmp_path, tiny_root):
    losses_that_are(monkeypatch, {1, 3, 6, 8})
    assert train(tiny_root, tmp_path, "--max_bad_steps", 1)["epoch"] == 2


def test_a_save_that_is_due_in_a_bad_step_is_put_off(monkeypatch, tmp_path, tiny_root):
    """Steps 3, 6 and 9 are to be saved; the loss of step 3 is bad. Each step notes whether one before it was saved."""
    losses_that_are(monkeypatch, {2})
    saved, forward = [], main_dino.DINOLoss.forward

    def note(*args, **named):
        saved.append((tmp_path / "checkpoint.pth").exists())
        return forward(*args, **named)

    monkeypatch.setattr(main_dino.DINOLoss, "forward", note)
    train(tiny_root, tmp_path, "--saveckp_iters", 3)
    assert saved == [False] * 5 + [True] * 5  # after the first epoch of 5 steps


# ---- gradient accumulation ----


def test_accumulated_gradients_equal_a_large_batch(tiny_root, tmp_path):
    flags = ("--drop_path_rate", 0, "--use_fp16", "false", "--optimizer", "sgd", "--lr", 1)
    large = train(tiny_root, tmp_path / "large", *flags, "--batch_size_per_gpu", 8)
    small = train(tiny_root, tmp_path / "small", *flags, "--batch_size_per_gpu", 2, "--grad_accum_steps", 4)
    start, _ = main_dino.build_student_and_teacher(seeded(arguments(*SMALL_RUN)), torch.device("cpu"), None)
    for network in ("student", "teacher", "dino_loss"):
        for key, value in large[network].items():
            assert_near(small[network][key], value, 1e-5, f"{network} {key}")
    key = "backbone.blocks.0.mlp.fc1.weight"
    assert not torch.allclose(large["teacher"][key], start.state_dict()[key], rtol=1e-3)
    logs = [(tmp_path / name / "log.txt").read_text().splitlines() for name in ("large", "small")]
    for one, other in zip(*logs, strict=True):
        one, other = json.loads(one), json.loads(other)
        assert one["train_lr"] == other["train_lr"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)


def test_fp16_clips_unscaled_gradients(monkeypatch, tmp_path, tiny_root):
    start_scaling_at(monkeypatch, 2.0**10)
    # Without weight decay, which would hide how small the clipped gradients are.
    flags = ("--optimizer", "sgd", "--lr", 1, "--clip_grad", 0.01, "--epochs", 1, "--warmup_epochs", 0)
    flags += ("--weight_decay", 0, "--weight_decay_end", 0)
    half = train(tiny_root, tmp_path / "half", *flags, "--amp_dtype", "fp16", "--drop_path_rate", 0)["student"]
    full = train(tiny_root, tmp_path / "full", *flags, "--use_fp16", "false", "--drop_path_rate", 0)["student"]
    start, _ = main_dino.build_student_and_teacher(seeded(arguments(*SMALL_RUN)), torch.device("cpu"), None)
    key = "backbone.blocks.0.mlp.fc1.weight"
    before = start.state_dict()[key]
    assert_near(half[f"module.{key}"] - before, full[f"module.{key}"] - before, 0.2)


def seeded(args):
    utils.fix_random_seeds(args.seed)
    return args


def test_student_and_teacher_start_equal_and_only_the_student_has_drop_path():
    student, teacher = main_dino.build_student_and_teacher(arguments(*SMALL_RUN), torch.device("cpu"), None)
    assert_same(dict(student.state_dict()), dict(teacher.state_dict()))
    assert max(m.drop_prob for m in student.modules() if isinstance(m, vits.DropPath)) == pytest.approx(0.1)
    assert not [m for m in teacher.modules() if isinstance(m, vits.DropPath)]
    assert not any(p.requires_grad for p in teacher.parameters())


def test_batch_norms_are_synchronized_on_gpus_only(monkeypatch, capsys):
    monkeypatch.setattr(utils, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        dino_backbones.DistributedDataParallel, "__new__", lambda kind, module, **kwargs: (module, kwargs)
    )
    for device, kind, notes in (("cuda", nn.SyncBatchNorm, 0), ("cpu", nn.BatchNorm2d, 1)):
        networks = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)]
        (student, settings), teacher = dino_backbones.distribute(*networks, torch.device(device))
        assert type(student[1]) is type(teacher[1]) is kind
        assert [value for name, value in settings.items() if "buffers" in name] == [False]
        assert capsys.readouterr().out.count("each process normalizes its own batch") == notes


# ---- runs ----


@pytest.fixture(scope="module")
def finished(tiny_root, tmp_path_factory):
    """A small run and its folder."""
    output = tmp_path_factory.mktemp("finished")
    return train(tiny_root, output), output


def test_checkpoints_have_the_public_keys_and_plain_types(finished):
    checkpoint, _ = finished
    public = {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"}
    assert set(checkpoint) == public | {"images_done", "meters", "health"}
    assert checkpoint["epoch"] == 2
    student, teacher = checkpoint["student"], checkpoint["teacher"]
    assert set(student) == {f"module.{key}" for key in teacher}
    assert {key.split(".")[0] for key in teacher} == {"backbone", "head"}
    assert checkpoint["dino_loss"]["center"].shape == (1, 64)
    assert checkpoint["args"]["arch"] == "vit_nano"
    for value in checkpoint["args"].values():
        assert isinstance(value, str | int | float | bool | list | None)
    assert [g["weight_decay"] == 0 for g in checkpoint["optimizer"]["param_groups"]] == [False, True]


def test_log_has_one_json_object_per_epoch(finished):
    lines = [json.loads(line) for line in (finished[1] / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert {"train_loss", "train_lr", "train_wd", "epoch"} <= set(line)
    # 5 steps an epoch at 8 images a step: warm-up over the first, weight decay half-way through its cosine at step 5.
    peak = 0.0005 * 8 / 256
    assert_near(lines[0]["train_lr"], np.linspace(0, peak, 5).mean(), 1e-9)
    assert_near(lines[1]["train_wd"], utils.cosine_scheduler(0.04, 0.4, 2, 5)[5:].mean(), 1e-9)


def test_equal_seeds_give_equal_runs_and_other_seeds_others(finished, tiny_root, tmp_path):
    assert_same_run(train(tiny_root, tmp_path / "again"), finished[0])
    other = train(tiny_root, tmp_path / "other", "--seed", 1)
    key = "backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(other["teacher"][key], finished[0]["teacher"][key])


def test_a_run_does_not_depend_on_num_workers(finished, tiny_root, tmp_path):
    assert_same_run(train(tiny_root, tmp_path, "--num_workers", 2), finished[0])


def test_a_run_does_not_depend_on_the_callers_random_state(finished, tiny_root, tmp_path, monkeypatch):
    normalize = utils.normalize

    def disturb(images, *statistics):
        torch.rand(3), random.random(), np.random.rand()
        return normalize(images, *statistics)

    monkeypatch.setattr(utils, "normalize", disturb)
    assert_same_run(train(tiny_root, tmp_path), finished[0])


def test_each_step_seeds_the_gpu_that_is_in_use(monkeypatch):
    seeds = []
    monkeypatch.setattr(utils, "uses_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    utils.seed_step(3, 5)
    assert seeds == [torch.initial_seed()]  # the CPU has it, too


def test_drop_path_is_a_function_of_seed_step_and_rank(monkeypatch):
    draws = {}
    for step, rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        monkeypatch.setattr(utils, "get_rank", lambda rank=rank: rank)
        utils.seed_step(7, step)
        draw = vits.DropPath(0.5).train()(torch.ones(64, 1, 1)).flatten()
        assert torch.equal(draws.setdefault((step, rank), draw), draw)
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 3


@pytest.mark.parametrize("arch", ["vit_nano", "vit_nano_conv"])
def test_grad_checkpointing_changes_no_number(tiny_root, tmp_path, arch):
    flags = ["--epochs", 1, "--warmup_epochs", 0, "--drop_path_rate", 0.5, "--arch", arch]
    plain = train(tiny_root, tmp_path / "plain", *flags)
    again = train(tiny_root, tmp_path / "again", *flags, "--grad_checkpointing", "true")
    assert_same(plain["student"], again["student"])
    assert any("running_mean" in key for key in plain["student"]) == arch.endswith("_conv")


def test_grad_checkpointing_of_a_network_with_batch_norms_is_an_error(refusal, tmp_path, tiny_root):
    flags = [*SMALL_RUN, "--arch", "resnet18", "--grad_checkpointing", "true", "--data_path", tiny_root / "train"]
    error = refusal(main_dino, *flags, "--output_dir", tmp_path)
    assert "not for --arch resnet18" in error


@compiles
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_compile_gives_the_same_losses_to_rounding(tiny_root, tmp_path):
    """Of one block: each of the compiler's files takes it a second."""
    script = tmp_path / "shallow.py"
    script.write_text(
        "from functools import partial\nimport dino_cli, main_dino\nimport vision_transformer as vits\n"
        "vits.vit_nano = partial(vits.vit_nano, depth=1)\n"
        "dino_cli.run(main_dino.train_dino, main_dino.get_args_parser(), '')\n"
    )
    flags = [*SMALL_RUN, "--epochs", 1, "--warmup_epochs", 0, "--use_fp16", "false", "--local_crops_number", 0]
    flags += ["--data_path", tiny_root / "train"]
    losses, keys = [], []
    for compiled in ("false", "true", "reduce-overhead"):
        folder = tmp_path / compiled
        words = (script, *flags, "--compile", compiled, "--output_dir", folder)
        said = run_script(*words, env={"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1"}).stdout
        assert ("compiling the networks" in said) == (compiled != "false")
        losses.append(json.loads((folder / "log.txt").read_text())["train_loss"])
        keys.append(torch.load(folder / "checkpoint.pth", weights_only=True)["student"].keys())
    assert keys[0] == keys[1] == keys[2]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


@compiles
@pytest.mark.parametrize(("flag", "value"), [("grad_accum_steps", 2), ("grad_checkpointing", True)])
def test_flags_that_cuda_graphs_cannot_follow_are_an_error(refusal, tmp_path, flag, value):
    words = ["--compile", "reduce-overhead", f"--{flag}", value, "--output_dir", tmp_path]
    error = refusal(main_dino, *SMALL_RUN, *words)
    assert f"--{flag} {value} does not work with --compile reduce-overhead" in error


@pytest.mark.parametrize("arch", ["resnet8", "vit_nano"])
def test_recording_graphs_changes_no_statistics(monkeypatch, arch):
    """With a stand-in for torch's function, which needs a GPU: it runs what it would record."""
    ran = []

    def rehearse(callables, inputs, **_):
        several = isinstance(callables, tuple)
        for function, given in zip(callables, inputs, strict=True) if several else [(callables, inputs)]:
            ran.append(function(*given))
        return callables

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", rehearse)
    flags = ["--arch", arch, "--out_dim", 16, "--global_crops_size", 32, "--local_crops_size", 16]
    args = arguments(*flags, "--local_crops_number", 1, "--batch_size_per_gpu", 2)
    student, teacher = main_dino.build_student_and_teacher(args, torch.device("cpu"), None)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    loss = main_dino.DINOLoss(16, 3, 0.04, 0.04, 0, 1)
    dino_compile.record_cuda_graphs(student, teacher, loss, args, None)
    assert [len(output) for output in ran[:2]] == [4, 6]  # in the order of a step: teacher, student
    assert ran[2][0].requires_grad  # the loss, with gradients for the student
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("flag", ["false", "true", "reduce-overhead"])
def test_networks_and_loss_are_compiled(monkeypatch, flag):
    compiled = []
    monkeypatch.setenv("CXX", sys.executable)  # a program that exists
    monkeypatch.setattr(torch, "compile", lambda function, *, dynamic: compiled.append(function.__self__) or function)
    args = dino_steps.training_args(arch="resnet8", out_dim=16, global_crops_size=32, device="cpu", compile=flag)
    parts = dino_steps.OurTraining(args).parts
    assert compiled == [parts.student, parts.teacher, parts.dino_loss] * (flag != "false")


@compiles
def test_a_finished_run_needs_no_compiler(tiny_root, tmp_path, monkeypatch):
    before = train(tiny_root, tmp_path, "--epochs", 1)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert_same_run(train(tiny_root, tmp_path, "--epochs", 1, "--compile", "true"), before)


def test_cuda_graphs_of_several_processes_are_an_error(monkeypatch):
    args = dino_steps.training_args(arch="resnet8", out_dim=16, device="cpu", compile="reduce-overhead")
    monkeypatch.setattr(utils, "get_world_size", lambda: 2)
    with pytest.raises(utils.UserError, match="is for one process"):
        dino_steps.OurTraining(args)


@pytest.mark.parametrize("mode", ["true", "reduce-overhead"])
def test_compile_needs_torch_2_5(monkeypatch, refusal, tmp_path, mode):
    monkeypatch.setattr(torch, "__version__", "2.4.1+cu121")
    error = refusal(main_dino, *SMALL_RUN, "--compile", mode, "--output_dir", tmp_path)
    assert "--compile needs torch 2.5, not 2.4.1+cu121. Use --compile false" in error


@pytest.mark.parametrize(
    ("named", "missing"), [(None, ""), ("", "program in CXX"), ("/nowhere/g++ -O2", "/nowhere/g++ -O2")]
)
def test_compile_without_a_compiler_is_an_error(monkeypatch, named, missing):
    args = dino_steps.training_args(arch="resnet8", out_dim=16, device="cpu", compile="true")
    if named is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setenv("CXX", named)
    with pytest.raises(utils.UserError, match=re.escape(f"--compile needs a C++ compiler: there is no {missing}")):
        dino_steps.OurTraining(args)


def test_training_works_without_local_crops(tiny_root, tmp_path):
    assert train(tiny_root, tmp_path, "--local_crops_number", 0, "--epochs", 1)["epoch"] == 1


def test_one_process_makes_no_process_group(finished):
    assert not torch.distributed.is_initialized()


def test_other_optimizers_train_and_resume(tiny_root, tmp_path, finished):
    flags = ("--optimizer", "lars", "--lr", 0.03)
    whole = train(tiny_root, tmp_path / "whole", *flags)
    assert_same_run(interrupted(tiny_root, tmp_path / "cut", *flags), whole)
    key = "backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(whole["teacher"][key], finished[0]["teacher"][key])


# ---- resuming ----


def interrupted(root, output, *flags):
    """The small run, interrupted at the start of its second epoch, then resumed."""
    epoch_by_epoch = main_dino.train_one_epoch

    def stop_in_second(*args):
        if args[3] == 1:  # the epoch
            raise KeyboardInterrupt
        return epoch_by_epoch(*args)

    main_dino.train_one_epoch = stop_in_second
    try:
        with pytest.raises(KeyboardInterrupt):
            train(root, output, *flags)
    finally:
        main_dino.train_one_epoch = epoch_by_epoch
    return train(root, output, *flags)


def test_starting_a_finished_run_changes_nothing(finished, tiny_root):
    before = (finished[1] / "checkpoint.pth").read_bytes()
    train(tiny_root, finished[1])
    assert (finished[1] / "checkpoint.pth").read_bytes() == before


def test_resumes_from_a_checkpoint_of_the_authors_release(tiny_root, tmp_path):
    """Arguments as a Namespace, learning rates as numpy scalars, groups and steps as an old torch wrote them."""
    flags = ("--amp_dtype", "fp16", "--saveckp_freq", 1)
    whole = train(tiny_root, tmp_path, *flags)
    checkpoint = torch.load(tmp_path / "checkpoint0000.pth", weights_only=True)
    args = {k: v for k, v in checkpoint["args"].items() if k not in ("device", "amp_dtype", "global_crops_size")}
    checkpoint["args"] = argparse.Namespace(**args)
    known = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
    groups = checkpoint["optimizer"]["param_groups"]
    groups = [{**{k: group[k] for k in known}, "lr": np.float64(group["lr"])} for group in groups]
    checkpoint["optimizer"]["param_groups"] = groups
    for state in checkpoint["optimizer"]["state"].values():
        state["step"] = int(state["step"])
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    assert_same_run(train(tiny_root, tmp_path, *flags), whole)


SOUND = {"epoch": 0, "step": 3, "images_done": 24, "meters": [{"loss": (1.5, 3), "lr": (2, 3)}], "args": {}}
RUN = argparse.Namespace(batch_size_per_gpu=8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch", -1),
        *(("images_done", value) for value in (1.5, True, 2**70)),
        *(
            ("meters", value)
            for value in (None, [{"loss": 3}], [{"loss": (1.0, -1.0)}], [{"loss": (10**400, 1)}], [{3: (1.0, 1)}])
        ),
    ],
)
def test_an_impossible_position_is_refused(name, value):
    assert dino_checkpoints.position(SOUND, RUN, "checkpoint.pth") == (0, 24)
    with pytest.raises(utils.UserError, match=r"checkpoint\.pth has an impossible position"):
        dino_checkpoints.position({**SOUND, name: value}, RUN, "checkpoint.pth")


@pytest.mark.parametrize(("before", "want"), [({}, 24), ({"batch_size_per_gpu": 4, "world_size": 3}, 36)])
def test_older_checkpoints_count_steps_of_their_own_batch(before, want):
    progress = {**SOUND, "images_done": None, "args": before}
    assert dino_checkpoints.position(progress, RUN, "checkpoint.pth") == (0, want)


def test_a_folder_with_train_and_val_is_refused(monkeypatch, capsys, tiny_root, tmp_path):
    for name in ("train", "val"):
        (tmp_path / "data" / name).mkdir(parents=True)
        image = next((tiny_root / "train" / "brick").iterdir())
        (tmp_path / "data" / name / "0.png").write_bytes(image.read_bytes())
    run = [*SMALL_RUN, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "out"]
    assert ending(monkeypatch, capsys, main_dino, *run)[1].endswith(
        f"Train on train alone: --data_path {tmp_path / 'data' / 'train'}"
    )


# ---- initial weights ----


def first_networks(*flags):
    """State dicts of student and teacher before the first step of a run."""
    args = arguments(*SMALL_RUN, *flags)
    utils.fix_random_seeds(args.seed)
    networks = main_dino.build_student_and_teacher(args, torch.device("cpu"), None)
    return [network.state_dict() for network in networks]


def test_a_run_starts_from_the_teacher_of_another_with_its_head(finished, capsys):
    source = finished[1] / "checkpoint.pth"
    student, teacher = first_networks("--init_from", source)
    assert_same(dict(student), finished[0]["teacher"])
    assert_same(dict(teacher), finished[0]["teacher"])
    said = capsys.readouterr().out
    number = sum(key.startswith("backbone.") for key in student)
    assert f"loaded {number} of {number} tensors from {source} [teacher]" in said
    assert "loaded the projection head from there" in said


def test_a_run_starts_from_a_backbone_of_another_size_with_a_new_head(tmp_path, capsys):
    published = vits.vit_nano(patch_size=16, img_size=[64]).state_dict()
    torch.save(published, tmp_path / "backbone.pth")
    student, teacher = first_networks("--init_from", tmp_path / "backbone.pth")
    assert_same(dict(student), dict(teacher))
    assert student["backbone.pos_embed"].shape == (1, 5, 128)  # crops of 32 pixels are 2 x 2 patches
    assert torch.equal(student["backbone.blocks.1.mlp.fc2.weight"], published["blocks.1.mlp.fc2.weight"])
    untouched, _ = first_networks()
    heads = [{k: v for k, v in network.items() if k.startswith("head.")} for network in (student, untouched)]
    assert_same(*heads)
    assert "the projection head starts at random" in capsys.readouterr().out


def test_an_interrupted_run_resumes_from_its_own_weights_not_from_init_from(tiny_root, tmp_path):
    torch.save(vits.vit_nano(patch_size=16, img_size=[64]).state_dict(), tmp_path / "backbone.pth")
    flags = ("--init_from", tmp_path / "backbone.pth")
    whole = train(tiny_root, tmp_path / "whole", *flags)
    assert_same_run(interrupted(tiny_root, tmp_path / "cut", *flags), whole)


def test_missing_or_unfit_initial_weights_are_one_line(monkeypatch, capsys, tiny_root, tmp_path):
    run = [*SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", tmp_path / "out", "--init_from"]
    unpublished = "--init_from published: no weights were published for --arch vit_tiny --patch_size 16. Name a file"
    assert unpublished in ending(monkeypatch, capsys, main_dino, *run, "published", "--arch", "vit_tiny")[1]
    assert "there is no file or folder nowhere.pth" in ending(monkeypatch, capsys, main_dino, *run, "nowhere.pth")[1]
    torch.save(vits.vit_tiny().state_dict(), tmp_path / "tiny.pth")
    assert "is [1, 1, 192] in" in ending(monkeypatch, capsys, main_dino, *run, tmp_path / "tiny.pth")[1]
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def test_list_archs_prints_one_known_name_per_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["main_dino.py", "--list_archs"])
    with pytest.raises(SystemExit) as ended:
        dino_cli.run(main_dino.train_dino, main_dino.get_args_parser(), "")
    assert ended.value.code == 0
    names = capsys.readouterr().out.split("\n")
    assert {"vit_small", "xcit_small_12_p16", "xcit_medium_24_p8", "resnet50", "timm:convnext_tiny"} <= set(names)
    for name in names[:-1:40]:
        dino_backbones.check_arch(name)
    assert "list_archs" not in vars(arguments())


@pytest.mark.parametrize("arch", ["xcit_nano_12_p16", "timm:resnet10t"])
def test_timm_networks_train(tiny_root, tmp_path, arch):
    flags = ("--arch", arch, "--epochs", 1, "--local_crops_size", 16 if "vit" in arch else 32)
    flags += ("--global_crops_size", 64)
    state = train(tiny_root, tmp_path, *flags)
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["student"].values())


# ---- several processes ----

# Trains with main_dino and writes the loss of each step, averaged over the processes, as JSON to the first argument.
RECORDER = """
import json, sys
import torch, torch.distributed as dist
import dino_cli, main_dino, utils
losses, forward = [], main_dino.DINOLoss.forward
def record(self, *inputs, **named):
    loss = forward(self, *inputs, **named)
    mean = loss.detach().clone().double()
    if utils.get_world_size() > 1:
        dist.all_reduce(mean)
    losses.append(mean.item() / utils.get_world_size())
    return loss
main_dino.DINOLoss.forward = record
path, sys.argv = sys.argv[1], sys.argv[1:]
def main(args):
    main_dino.train_dino(args)
    if utils.is_main_process():
        open(path, "w").write(json.dumps(losses))
dino_cli.run(main, main_dino.get_args_parser(), "")
"""


def recorded_losses(tmp_path, name, *flags, **options):
    script = tmp_path / "recorder.py"
    script.write_text(RECORDER)
    output = tmp_path / name
    flags = [*SMALL_RUN, "--output_dir", output, *flags]
    run_script(script, tmp_path / f"{name}.json", *flags, env={"PYTHONPATH": str(ROOT)}, **options)
    return json.loads((tmp_path / f"{name}.json").read_text()), torch.load(output / "checkpoint.pth", weights_only=True)


@pytest.mark.slow
def test_two_processes_match_one_with_the_same_global_batch(tmp_path, tiny_root):
    flags = ["--data_path", tiny_root / "train", "--optimizer", "sgd", "--lr", 0.05]
    flags += ["--drop_path_rate", 0, "--use_fp16", "false"]
    one, state = recorded_losses(tmp_path, "one", *flags, "--batch_size_per_gpu", 8)
    two, states = recorded_losses(tmp_path, "two", *flags, "--batch_size_per_gpu", 4, processes=2)
    assert len(one) == 10
    assert_near(two, one, 1e-6)
    assert one[0] != one[-1]
    assert_near(states["dino_loss"]["center"], state["dino_loss"]["center"], 1e-3)
    assert set(states["student"]) == set(state["student"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_resnet_trains_on_two_processes_and_is_evaluated(tmp_path, tiny_root):
    flags = ["--config", "recipes/imagenet_resnet50.yaml", *SMALL_RUN, "--arch", "resnet18", "--local_crops_size", 32]
    flags += ["--data_path", tiny_root / "train", "--output_dir", tmp_path, "--batch_size_per_gpu", 6, "--epochs", 1]
    done = run_script("main_dino.py", *flags, processes=2)
    assert "[2/3]" in done.stdout
    assert done.stdout.count("each process normalizes its own batch") == 1
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert all(key.startswith("module.backbone.") or key.startswith("module.head.") for key in checkpoint["teacher"])
    model, _ = dino_backbones.build_backbone("resnet18")
    number = len(model.state_dict())
    assert dino_backbones.load_weights(model, tmp_path / "checkpoint.pth") == (number, number)


@pytest.mark.slow
def test_the_old_launcher_works(tmp_path, tiny_root):
    launcher = ("-m", "torch.distributed.launch", "--nproc_per_node", 2, "--master_port", free_port())
    flags = [*SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", tmp_path, "--epochs", 1]
    run_script(*launcher, "main_dino.py", "--local_rank=0", *flags, "--warmup_epochs", 0)
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 1


def test_an_error_ends_all_processes_without_a_traceback(tmp_path):
    done = run_script("main_dino.py", *SMALL_RUN, "--data_path", tmp_path / "none", check=False, processes=2)
    assert done.returncode == 2
    assert done.stderr.count("--data_path") == 1  # by the first of them
    assert re.match(r"error \(rank [01]\): --data_path", done.stderr)
    assert "Traceback" not in done.stderr
