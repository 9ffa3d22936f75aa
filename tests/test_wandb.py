"""Curves for Weights & Biases, with its real client if it is installed. Nothing is sent anywhere."""

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
    """The environment of a user who has never logged in, without a server."""
    home = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home" / "netrc"), "WANDB_API_KEY": ""}
    return {**home, "WANDB_BASE_URL": UNREACHABLE, "WANDB_MODE": "online"}


def train(folder, data, *flags, **kwargs):
    words = [*SMALL_RUN, "--data_path", data / "train", "--output_dir", folder, "--wandb", "test", *flags]
    return run_script("main_dino.py", *words, **kwargs)


def records(path):
    """The records in a file of the client: LevelDB's log format, with records split at blocks of 32768 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""  # after the header of the file
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for another header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(part)
            part = b""
            yield record


def saved(folder):
    """For each start of a run: (its ID, project, settings, {step: {name: number}})."""
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
def test_a_run_and_its_continuation_are_one_curve_with_the_numbers_of_the_log(nobody, tiny_root, tmp_path):
    env = {**nobody, "WANDB_MODE": "offline"}
    output = train(tmp_path / "run", tiny_root, "--epochs", 1, env=env).stdout
    output += train(tmp_path / "run", tiny_root, "--epochs", 2, "--allow_changed_args", "true", env=env).stdout
    (first, project, settings, before), (second, _, _, after) = saved(tmp_path / "run")
    assert first == second
    assert (project, settings["arch"], settings["out_dim"]) == ("test", "vit_nano", 64)
    assert (list(before), list(after)) == ([0, 4], [5, 9])  # the first and last of 5 steps per epoch
    for numbers in (before | after).values():
        assert set(dino_health.NUMBERS) <= set(numbers)
        assert numbers["entropy"] + numbers["kl"] == pytest.approx(numbers["loss"], abs=1e-5)
    first_of_epochs = [float(loss) for loss in re.findall(r"\[0/5\].*? loss: ([\d.]+)", output)]
    assert first_of_epochs == pytest.approx([before[0]["loss"], after[5]["loss"]], abs=1e-3)
    train(tmp_path / "other", tiny_root, "--epochs", 1, env=env)
    assert saved(tmp_path / "other")[0][0] != first


@needs_client
def test_a_user_who_has_not_logged_in_is_told_before_training(nobody, tiny_root, tmp_path):
    done = train(tmp_path / "run", tiny_root, env=nobody, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --wandb test can't log in: ")
    assert "WANDB_MODE=offline" in line
    assert not list((tmp_path / "run").iterdir())


@needs_client
@pytest.mark.slow
def test_a_server_that_can_not_be_reached_is_named_before_training(nobody, tiny_root, tmp_path):
    env = {**nobody, "WANDB_API_KEY": "0123456789" * 4}
    done = train(tmp_path / "run", tiny_root, env=env, check=False, timeout=90)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: --wandb test can't log in: .*{UNREACHABLE}.*", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "log.txt").exists()


@needs_client
def test_only_the_first_of_several_processes_sends(nobody, tiny_root, tmp_path):
    train(tmp_path / "run", tiny_root, processes=2, env={**nobody, "WANDB_MODE": "offline"})
    ((_, _, _, history),) = saved(tmp_path / "run")
    assert list(history) == [0, 1, 2, 3]  # 40 images are 2 steps of 2 x 8


# ---- logging in, with a client that fails ----


@pytest.fixture
def client(monkeypatch):
    """A client that can't log in, and counts the attempts."""

    def login(**_):
        client.attempts += 1
        raise RuntimeError("no\n such\tuser.")

    client = SimpleNamespace(login=login, attempts=0)
    monkeypatch.setitem(sys.modules, "wandb", client)
    for name in ("WANDB_MODE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return client


@pytest.fixture
def args(tmp_path):
    return arguments_of(main_dino, "--tensorboard", "off", "--wandb", "test", "--output_dir", tmp_path)


def test_the_clients_error_is_one_line(client, args):
    with pytest.raises(dino_health.UserError) as error:
        dino_health.check_curves(args)
    assert re.fullmatch("--wandb test can't log in: no such user. Run `wandb login`.*sync`", str(error.value))


def test_a_client_that_can_not_be_imported_is_named_with_the_pip_command(monkeypatch, args, tmp_path):
    (tmp_path / "wandb.py").write_text("import numpy\nnumpy.no_longer_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(dino_health.UserError, match=r"pip install --upgrade wandb \(module 'numpy' has no "):
        dino_health.check_curves(args)


@pytest.mark.parametrize("environment", [{"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}, {"RANK": "1"}])
def test_offline_runs_and_other_ranks_do_not_log_in(client, args, monkeypatch, environment):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in ({"RANK": "0"} | environment).items():
        monkeypatch.setenv(name, value)
    dino_health.check_curves(args)
    assert client.attempts == 0


def test_without_the_flag_the_client_is_not_used(client, tmp_path):
    dino_health.check_curves(arguments_of(main_dino, "--output_dir", tmp_path))
    assert client.attempts == 0
