"""Progress of loops: a bar on a terminal, plain lines in files."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from io import StringIO

import pytest
import torch
from conftest import FORKS, SMALL_RUN, become, log_without_times, run_script, start_forks

import utils

# Six items; a warning in the fourth, after which the loop may end in several ways.
LOOP = """
import argparse, time
import dino_cli, utils

def main(args):
    metrics = utils.MetricLogger()
    for i in metrics.log_every(range(6), 2, "Loop:"):
        metrics.update(loss=9.5 - i)
        time.sleep(0.12)
        if i == 3:
            utils.log("warning: in between")
            {then}

dino_cli.run(main, argparse.ArgumentParser(add_help=False), "")
"""


def loop(then="pass"):
    return "-c", LOOP.format(then=then)


def on_terminal(*words, env=None, type_at=""):
    """Run `python <words>` on a terminal of its own: (exit code, all that was written to it).

    Once the text `type_at` has appeared, Ctrl-C is pressed.
    """
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "", **(env or {})}
    terminal, other_end = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    start_forks()
    process = FORKS.Process(target=become, args=([str(word) for word in words], environment, os.ttyname(other_end), 4))
    process.start()
    written, until = b"", time.monotonic() + 120
    while process.is_alive() or select.select([terminal], [], [], 0)[0]:
        if time.monotonic() > until:
            process.kill()
        if not select.select([terminal], [], [], 0.02)[0]:
            continue
        written += os.read(terminal, 4096)
        if type_at and type_at.encode() in written:
            time.sleep(0.3)  # Ctrl-C makes the terminal discard what it has not shown yet
            os.write(terminal, b"\x03")
            type_at = ""
    os.close(terminal)
    os.close(other_end)
    return process.exitcode, written.decode()


def left_on_screen(written):
    """The lines that stay: of each, the text after the last return to its start, over the rest of the old text."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return [line.replace("^C", "").strip() for line in lines if line]


def kinds_of(lines):
    """Lines without times."""
    return [re.sub(r"(eta|time|data|max mem|Total time):? *[\d:.]+|\([\d.]+ s / it\)", r"\1", line) for line in lines]


@pytest.fixture(scope="module")
def looped():
    code, written = on_terminal(*loop())
    assert code == 0, written
    return written


def test_a_terminal_shows_a_bar_while_the_loop_runs_and_only_lines_after_it(looped):
    assert re.search(r"Loop:: +50%\|.*\| 3/6 \[", looped)
    lines = left_on_screen(looped)
    patterns = [r"Loop:  \[0/6\].*", r"Loop:  \[2/6\].*", r".*warning: in between.*", r"Loop:  \[4/6\].*"]
    patterns += [r"Loop:  \[5/6\].*", r"Loop: Total time: 0:00:0\d \(0\.\d+ s / it\)"]
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line


def test_a_file_gets_the_same_lines_without_bar_and_color(looped):
    plain = run_script(*loop()).stdout
    assert "\r" not in plain
    assert "\x1b" not in plain
    colored = [re.sub(r"\x1b\[\d+m", "", line) for line in left_on_screen(looped)]
    assert kinds_of(plain.splitlines()) == kinds_of(colored)


def test_warnings_are_yellow_on_a_terminal_but_not_with_NO_COLOR(looped):
    assert "\x1b[33mwarning: in between\x1b[0m" in looped
    code, written = on_terminal(*loop(), env={"NO_COLOR": "1"})
    assert code == 0
    assert not re.search(r"\x1b\[\d+m", written)
    assert "warning: in between" in left_on_screen(written)


@pytest.mark.parametrize(
    ("then", "code", "last"),
    [
        ("raise utils.UserError('this and that')", 2, "error: this and that"),
        ("raise ZeroDivisionError('of our own')", 1, "ZeroDivisionError: of our own"),
    ],
)
def test_an_error_within_a_loop_has_a_line_of_its_own(then, code, last):
    ended, written = on_terminal(*loop(then))
    assert ended == code
    lines = left_on_screen(written)
    assert lines[-1] == last
    assert not any("%|" in line for line in lines)


def test_ctrl_c_exits_with_130_and_whole_lines():
    code, written = on_terminal(*loop("time.sleep(60)"), type_at="in between")
    assert code == 130
    lines = left_on_screen(written)
    assert lines[-1] == "interrupted"
    assert not any("%|" in line for line in lines)


def test_ctrl_c_in_training_saves_and_exits_with_130(tiny_root, tmp_path):
    words = ["main_dino.py", *SMALL_RUN, "--epochs", 500, "--data_path", tiny_root / "train", "--output_dir", tmp_path]
    code, written = on_terminal(*words, type_at="Epoch: [2/500]")
    assert code == 130
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    where = f"stopped in epoch {checkpoint['epoch']} after step {checkpoint['images_done'] // 8}."
    lines = left_on_screen(written)
    assert lines[-1] == f"{where} Run the same command to resume"
    assert not any("%|" in line for line in lines)
    assert len(log_without_times(tmp_path)) == checkpoint["epoch"]


# ---- in this process ----


class Terminal(StringIO):
    """A standard output that claims to be a terminal."""

    def isatty(self):
        return True


def test_meters_are_read_from_the_device_only_for_a_line():
    metrics, unread = utils.MetricLogger(), []
    with contextlib.redirect_stdout(Terminal()):
        for i in metrics.log_every(range(21), 10, "Loop:"):
            metrics.update(loss=torch.tensor(float(i)))
            unread.append(len(metrics.loss.unread))
    assert unread == [1, *range(1, 11), *range(1, 11)]


def test_the_bar_of_a_resumed_loop_starts_where_it_is():
    with contextlib.redirect_stdout(Terminal()) as terminal:
        list(utils.MetricLogger().log_every(range(3), 10, "Epoch: [4/9]", start=7))
    assert "| 7/10 [" in terminal.getvalue()


def test_other_ranks_print_nothing(monkeypatch):
    monkeypatch.setattr(utils, "get_rank", lambda: 1)
    with contextlib.redirect_stdout(Terminal()) as terminal:
        list(utils.MetricLogger().log_every(range(3), 10, "Loop:"))
    assert terminal.getvalue() == ""
