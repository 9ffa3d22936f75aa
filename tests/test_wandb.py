"""Curves for Weights & Biases, by its real client where it is installed. Nothing is sent anywhere."""

import importlib.util
import json
import re
import struct
import sys
from types import SimpleNamespace

import pytest
from conftest import SMALL_RUN, arguments_of, run_script

import dino_health
import main_dino

needs_client = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture
def nobody(tmp_path):
    """The environment of a user who has never logged in, and no server."""
    home = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home" / "netrc"), "WANDB_API_KEY": ""}
    return {**home, "WANDB_BASE_URL": UNREACHABLE, "WANDB_MODE": "online"}


def train(folder, data, *flags, launcher=(), **kwargs):
    words = [*SMALL_RUN, "--data_path", data / "train", "--output_dir", folder, "--wandb", "test", *flags]
    return run_script(*launcher, "main_dino.py", *words, **kwargs)


def records(path):
    """What the client has written: LevelDB's log format, in which records are split at blocks of 32768 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""  # behind the file's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for another header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            record = Record()
            record.ParseFromString(part)
            part = b""
            yield record


def kept(folder):
    """For each start of a run: (its id, project, settings, {step: {name: number}})."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        run, history = None, {}
        for record in records(path):
            if record.HasField("run"):
                run = record.run
            elif record.HasField("history"):
                numbers = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                history[numbers.pop("_step")] = numbers
        settings = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in run.config.update}
        found.append((run.run_id, run.project, settings, history))
    return found


# ---- the real client ----


@needs_client
def test_the_numbers_of_the_log_arrive(nobody, tiny_root, tmp_path):
    said = train(tmp_path / "run", tiny_root, env={**nobody, "WANDB_MODE": "offline"}).stdout
    ((_, project, settings, history),) = kept(tmp_path / "run")
    assert project == "test"
    assert (settings["arch"], settings["out_dim"]) == ("vit_nano", 64)
    assert list(history) == [0, 4, 5, 9]  # the first and last of 5 steps an epoch
    for numbers in history.values():
        assert set(dino_health.NUMBERS) <= set(numbers)
        assert numbers["entropy"] + numbers["kl"] == pytest.approx(numbers["loss"], abs=1e-5)
    first_of_epochs = [float(loss) for loss in re.findall(r"\[0/5\].*? loss: ([\d.]+)", said)]
    assert first_of_epochs == pytest.approx([history[0]["loss"], history[5]["loss"]], abs=1e-6)


@needs_client
def test_a_run_that_goes_on_has_the_same_id_and_the_next_steps(nobody, tiny_root, tmp_path):
    env = {**nobody, "WANDB_MODE": "offline"}
    train(tmp_path / "run", tiny_root, "--epochs", 1, env=env)
    train(tmp_path / "run", tiny_root, "--epochs", 2, "--allow_changed_args", "true", env=env)
    train(tmp_path / "other", tiny_root, "--epochs", 1, env=env)
    (first, _, _, before), (second, _, _, after) = kept(tmp_path / "run")
    assert first == second
    assert (list(before), list(after)) == ([0, 4], [5, 9])
    assert kept(tmp_path / "other")[0][0] != first


@needs_client
def test_who_has_not_logged_in_is_told_in_one_line_before_any_training(nobody, tiny_root, tmp_path):
    done = train(tmp_path / "run", tiny_root, env=nobody, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --wandb test can't log in: ")
    assert "WANDB_MODE=offline" in line
    assert not list((tmp_path / "run").iterdir())


@needs_client
@pytest.mark.slow
def test_a_server_that_can_not_be_reached_is_named_before_any_training(nobody, tiny_root, tmp_path):
    env = {**nobody, "WANDB_API_KEY": "0123456789" * 4}
    done = train(tmp_path / "run", tiny_root, env=env, check=False, timeout=90)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(f"error: --wandb test can't log in: .*{UNREACHABLE}.*", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "log.txt").exists()


@needs_client
@pytest.mark.slow
def test_of_several_processes_the_first_one_sends(nobody, tiny_root, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    train(tmp_path / "run", tiny_root, launcher=launcher, env={**nobody, "WANDB_MODE": "offline"})
    ((_, _, _, history),) = kept(tmp_path / "run")
    assert list(history) == [0, 1, 2, 3]  # 40 images are 2 steps of 2 · 8
    done = train(tmp_path / "other", tiny_root, launcher=launcher, env=nobody, check=False, timeout=120)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: --wandb test can't log in: ") == 1


# ---- when it has to log in ----


@pytest.fixture
def client(monkeypatch):
    """A stand-in that can't log in, and counts how often it was asked to."""

    def login(**_):
        client.asked += 1
        raise RuntimeError("nobody\n is\tthere.")

    client = SimpleNamespace(login=login, asked=0)
    monkeypatch.setitem(sys.modules, "wandb", client)
    for name in ("WANDB_MODE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return client


@pytest.fixture
def args(tmp_path):
    return arguments_of(main_dino, "--tensorboard", "off", "--wandb", "test", "--output_dir", tmp_path)


def test_what_the_client_says_is_passed_on_in_one_line(client, args):
    with pytest.raises(dino_health.UserError) as error:
        dino_health.check_curves(args)
    assert re.fullmatch("--wandb test can't log in: nobody is there. Run `wandb login`.*sync`", str(error.value))


def test_a_client_that_does_not_fit_is_named(monkeypatch, args, tmp_path):
    (tmp_path / "wandb.py").write_text("import numpy\nnumpy.no_longer_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(dino_health.UserError, match=r"pip install --upgrade wandb \(module 'numpy' has no "):
        dino_health.check_curves(args)


@pytest.mark.parametrize("mode", ["offline", "disabled", "dryrun"])
def test_without_a_server_nobody_logs_in(client, args, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    dino_health.check_curves(args)
    assert client.asked == 0


def test_the_first_process_logs_in_for_all(client, args, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    dino_health.check_curves(args)
    assert client.asked == 0
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(dino_health.UserError):
        dino_health.check_curves(args)
    assert client.asked == 1


def test_without_the_flag_the_client_is_left_alone(client, tmp_path):
    dino_health.check_curves(arguments_of(main_dino, "--output_dir", tmp_path))
    assert client.asked == 0
