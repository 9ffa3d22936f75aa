"""dino_checkpoints.py: checkpoints are written whole, read safely, and resumed."""

import argparse
import copy
import math
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import same_state, tiny_vit

import dino_backbones
import dino_checkpoints
import utils
from utils import UserError

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


def test_arguments_are_read_after_timm_loaded_a_file(tmp_path):
    """timm allows Namespace for its own loads, and withdraws it after each."""
    from timm.models import load_state_dict

    torch.save({"args": argparse.Namespace(arch="vit_nano"), "state_dict": {}}, tmp_path / "c.pth")
    numbers = set()
    for _ in range(2):
        assert dino_checkpoints.load_args(tmp_path / "c.pth") == {"arch": "vit_nano"}
        assert dino_checkpoints.load_checkpoint(tmp_path / "c.pth")["args"].arch == "vit_nano"
        numbers.add(len(torch.serialization.get_safe_globals()))
        load_state_dict(str(tmp_path / "c.pth"))
    assert len(numbers) == 1  # they do not add up


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
    with pytest.raises(UserError, match=r"there is no file or folder .*nowhere\.pth"):
        dino_checkpoints.load_checkpoint(tmp_path / "nowhere.pth")


# ---- resuming ----


def prefixed(state, prefix="module."):
    return {prefix + key: value for key, value in state.items()}


class Wrapped(nn.Module):
    """Puts `module.` in front of the keys, as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize(("in_file", "in_model"), [(True, False), (False, True)])
def test_resuming_works_with_and_without_the_module_prefix(tmp_path, in_file, in_model):
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


def test_nothing_to_resume_from_changes_nothing(tmp_path):
    target, progress = nn.Linear(3, 2), {"epoch": 0}
    before = {key: value.clone() for key, value in target.state_dict().items()}
    assert dino_checkpoints.restart_from_checkpoint(tmp_path / "nowhere.pth", progress, student=target) is None
    assert same_state(target, before)
    assert progress == {"epoch": 0}


def test_a_missing_part_starts_anew_with_a_warning(tmp_path, capsys):
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


def test_a_changed_learning_rate_is_allowed_and_logged(tmp_path, capsys):
    assert resume(tmp_path / "c.pth", {**RUN, "num_workers": 1}, {**RUN, "lr": 3.0, "num_workers": 2})
    assert "note: resuming with --lr 3.0 (was 0.1)\n" in capsys.readouterr().out


def test_an_older_name_of_the_same_network_is_accepted(tmp_path):
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
def test_a_file_that_is_not_a_training_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match="is not a training checkpoint and would be overwritten"):
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


@pytest.mark.parametrize(("saved", "resumed"), [("last", "first"), ("first", "last")])
def test_optimizer_moments_follow_the_memory_layout_of_the_weights(tmp_path, saved, resumed):
    """Convnets are not in channels_last on each device. Fused AdamW reads moments in the order of the weights."""
    layouts = {"first": torch.contiguous_format, "last": torch.channels_last}

    def training(layout):
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 6, 3).to(memory_format=layouts[layout])
        return conv, utils.build_optimizer("adamw", utils.get_params_groups(conv), torch.device("cpu"))

    def steps(conv, optimizer, number):
        for seed in range(number):
            images = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            conv(images).square().sum().backward()
            optimizer.step()

    straight, other = training(saved), training(resumed)
    steps(*straight, 3)
    other[0].load_state_dict(straight[0].state_dict())
    dino_checkpoints.load_state(other[1], copy.deepcopy(straight[1].state_dict()))
    steps(*straight, 3)
    steps(*other, 3)
    torch.testing.assert_close(other[0].weight, straight[0].weight, rtol=1e-5, atol=1e-6)


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


# ---- checkpoints that say what can't be true ----


def trained(name, shape=(2, 3)):
    """(parameter, its optimizer after one step)."""
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = utils.build_optimizer(name, [{"params": [parameter]}], torch.device("cpu"))
    parameter.sum().backward()
    optimizer.step()
    return parameter, optimizer


def resumed(path, optimizer, change):
    """Let `change` edit an optimizer's state in a checkpoint, and resume from it."""
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    torch.save({"optimizer": state}, path)
    dino_checkpoints.restart_from_checkpoint(path, optimizer=optimizer)


MOMENTS = {"adamw": "exp_avg", "sgd": "momentum_buffer", "lars": "mu"}


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize(
    "value", [torch.zeros(3), torch.zeros(3, 2), torch.zeros(()), torch.zeros(2, 3, dtype=torch.long), 5, "x", [1.0]]
)
def test_a_moment_of_another_shape_or_type_is_refused(tmp_path, name, value):
    _, optimizer = trained(name)
    with pytest.raises(UserError, match=r"c\.pth does not fit this run: optimizer: .*"):
        resumed(tmp_path / "c.pth", optimizer, lambda state: state["state"][0].update({MOMENTS[name]: value}))


def test_the_parameter_and_both_shapes_are_named(tmp_path):
    _, optimizer = trained("adamw")
    with pytest.raises(UserError, match=r"exp_avg of parameter 0 is \[6\], the parameter is \[2, 3\]"):
        resumed(tmp_path / "c.pth", optimizer, lambda state: state["state"][0].update(exp_avg=torch.zeros(6)))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["state"][0].pop("exp_avg_sq"),
        lambda state: state["state"][0].update(step=torch.tensor([1.0, 2.0])),
        lambda state: state["state"][0].update(step=-1),
        lambda state: state["state"][0].update(step=10**400),
        lambda state: state["state"].update({0: 5}),
        lambda state: state.update(state=[]),
        lambda state: state.update(param_groups=3),
        lambda state: state["param_groups"].append({}),
        lambda state: state["param_groups"][0].update(params=7),
        lambda state: state["param_groups"][0].update(params=[[0]]),
        lambda state: state["param_groups"][0].update(lr="x"),
        lambda state: state["param_groups"][0].update(lr=math.nan),
        lambda state: state["param_groups"][0].update(lr=True),
        lambda state: state["param_groups"][0].update(betas=(0.9,)),
        lambda state: state["param_groups"][0].update(betas=(0.9, None)),
        lambda state: state["param_groups"][0].update(betas=3),
        lambda state: state["param_groups"][0].update(amsgrad=True),
        lambda state: state["param_groups"][0].update(maximize=True),
    ],
)
def test_nonsense_in_an_optimizers_state_is_one_line(tmp_path, change):
    _, optimizer = trained("adamw")
    with pytest.raises(UserError, match="does not fit this run: optimizer: ") as raised:
        resumed(tmp_path / "c.pth", optimizer, change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("shape", [(2, 3), (1,), ()])
def test_an_optimizers_own_state_resumes_exactly(tmp_path, name, shape):
    (one, straight), (other, stopped) = trained(name, shape), trained(name, shape)
    resumed(tmp_path / "c.pth", stopped, lambda state: state["param_groups"][0].update(lr=0.5))
    straight.param_groups[0]["lr"] = 0.5
    for optimizer in (straight, stopped):
        optimizer.step()
    assert stopped.param_groups[0]["lr"] == 0.5
    assert torch.equal(one, other)
    assert not torch.equal(one, torch.ones(shape))


def test_a_loss_scale_that_is_no_number_is_refused(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for name, value in (("scale", "x"), ("scale", math.inf), ("growth_interval", None)):
        torch.save({"fp16_scaler": {**scaler.state_dict(), name: value}}, tmp_path / "c.pth")
        with pytest.raises(UserError, match=f"fp16_scaler: {name} is {value}"):
            dino_checkpoints.restart_from_checkpoint(tmp_path / "c.pth", fp16_scaler=scaler)


@pytest.mark.parametrize("args", [5, "x", [1], torch.ones(2)])
def test_a_checkpoint_whose_arguments_are_something_else_is_refused(tmp_path, args):
    with pytest.raises(UserError, match="is not a training checkpoint"):
        resume(tmp_path / "c.pth", args, RUN)


@pytest.mark.parametrize("value", [torch.ones(2), {"a": 1}, "y" * 10**6, [[]]])
def test_a_setting_that_is_something_else_is_named_in_one_short_line(tmp_path, value):
    with pytest.raises(UserError, match="was made with --optimizer") as raised:
        resume(tmp_path / "c.pth", {**RUN, "optimizer": value}, RUN)
    assert len(str(raised.value)) < 1000
