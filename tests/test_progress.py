"""What a loop shows of its progress: a bar on a terminal, plain lines everywhere else."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from io import StringIO

import pytest
import torch
from conftest import ROOT, SMALL_RUN, log_without_times, run_script

import dino_checkpoints
import utils

# ---- terminals ----

COLUMNS = 100


def on_terminal(*words, env=None, type_at="", typed=b"\x03", columns=COLUMNS):
    """Run `python <words>` on a terminal of its own: (exit code, all that was written to it).

    Once the text `type_at` has appeared, the keys `typed` are pressed.
    """
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "", **(env or {})}
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, *map(str, words)], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    written, until = b"", time.monotonic() + 120
    while time.monotonic() < until:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # so Linux says that all who had the terminal open have ended
            break
        if not part:
            break
        written += part
        if type_at and type_at.encode() in written:
            time.sleep(0.3)  # Ctrl-C makes the terminal throw away what it has not shown yet
            os.write(terminal, typed)
            type_at = ""
    else:
        os.kill(process, signal.SIGKILL)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), written.decode()


def screen(written, columns=COLUMNS):
    """The rows of text that a terminal shows in the end of what was written to it."""
    rows, row, column = [[]], 0, 0
    for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.", written, re.DOTALL):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
        elif part == "\x1b[2K":
            rows[row] = []
        elif part == "\x1b[A":
            row -= 1
        elif not part.endswith("m") or len(part) == 1:  # colors take no room
            assert part.isprintable(), repr(part)
            if column == columns:  # it wraps
                row, column = row + 1, 0
            rows += [[] for _ in range(row + 1 - len(rows))]
            rows[row] += " " * (column + 1 - len(rows[row]))
            rows[row][column] = part
            column += 1
        rows += [[] for _ in range(row + 1 - len(rows))]
    return ["".join(row).rstrip() for row in rows]


def bars(written):
    """Each state of the bar that was drawn, but for its blocks."""
    drawn = re.findall(r"\x1b\[2K([^\r\n]+)\r", written)
    return [re.sub(r"\|.*\|", "|", text) for text in drawn]


def wrapped(text):
    """The rows that lines of text take on the terminal."""
    rows = []
    for line in text.splitlines():
        rows += [line[i : i + COLUMNS].rstrip() for i in range(0, len(line) or 1, COLUMNS)]
    return rows


def without_times(text):
    text = re.sub(r"(eta|Total time): [^ ]+", r"\1:", text)
    text = re.sub(
        r"(time|data|images/s|waiting): [\d.]+%?|max mem: \d+|\([\d.]+ s / it\)|took \d+ s|  \(data wait.*\)", "", text
    )
    return [line.rstrip() for line in text.splitlines()]


# Six items of 0.12 s; a warning in the fourth, after which it may end in several ways.
LOOP = """
import argparse, sys, time
import utils

def main(args):
    metrics = utils.MetricLogger()
    for i in metrics.log_every(range(6), 2, "Loop:"):
        metrics.update(loss=9.5 - i)
        time.sleep(0.12)
        if i == 3:
            utils.log("warning: a warning in between")
            {then}

utils.run(main, argparse.ArgumentParser(add_help=False), "")
"""


def loop(then="pass"):
    return "-c", LOOP.format(then=then)


# ---- the bar ----


@pytest.fixture(scope="module")
def looped():
    code, written = on_terminal(*loop())
    assert code == 0, written
    return written


def test_the_bar_moves_with_every_step_and_has_the_loss_of_the_last_line(looped):
    drawn = bars(looped)
    for done, loss in [(1, 9.5), (2, 9.5), (3, 7.5), (4, 7.5), (5, 5.5)]:
        pattern = rf"Loop: +{100 * done / 6:.0f}%\| {done}/6 \[00:00<00:00, +[\d.]+(it/s|s/it), loss: {loss:.4f}\]"
        assert any(re.fullmatch(pattern, text) for text in drawn), (done, drawn)
    assert drawn[0] == "Loop:   0%| 0/6 [00:00<?, ?it/s]"


def test_the_bar_is_as_wide_as_the_terminal_but_for_the_last_column(looped):
    drawn = re.findall(r"\x1b\[2K([^\r\n]+)\r", looped)
    assert {len(text) for text in drawn} == {COLUMNS - 1}


def test_the_lines_stand_above_the_bar_and_nothing_else_is_left_in_the_end(looped):
    lines = [line for line in screen(looped) if line]
    kinds = [r"Loop: +\[0/6\].*", r"Loop: +\[2/6\].*", "warning: a warning in between", r"Loop: +\[4/6\].*"]
    kinds += [r"Loop: +\[5/6\].*", r"Loop: Total time: 0:00:00 \(0\.\d+ s / it\)"]
    assert len(lines) == len(kinds)
    for line, kind in zip(lines, kinds, strict=True):
        assert re.fullmatch(kind, line), line


def test_a_warning_is_yellow_on_a_terminal_and_nothing_else_has_a_color(looped):
    assert "\x1b[33mwarning: a warning in between\x1b[0m" in looped
    assert len(re.findall(r"\x1b\[[0-9;]*m", looped)) == 2


def test_with_NO_COLOR_there_is_the_bar_but_no_color():
    code, written = on_terminal(*loop(), env={"NO_COLOR": "1"})
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*m", written)
    assert len(bars(written)) > 5
    assert "warning: a warning in between" in screen(written)


def test_a_file_gets_the_lines_and_nothing_else(looped):
    plain = run_script(*loop()).stdout
    assert "\r" not in plain
    assert "\x1b" not in plain
    assert without_times(plain) == without_times("\n".join(line for line in screen(looped) if line))


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_terminal_that_can_draw_no_line_anew_gets_plain_lines(looped, term):
    words = loop() if term else ("-c", "import os; del os.environ['TERM']" + loop()[1])
    code, written = on_terminal(*words, env={"TERM": "dumb"})
    assert code == 0
    assert "\x1b" not in written
    plain = written.replace("\r\n", "\n")  # the terminal's own doing
    assert "\r" not in plain
    assert without_times(plain) == without_times("\n".join(line for line in screen(looped) if line))


# ---- ends ----


@pytest.mark.parametrize(
    ("then", "code", "said"),
    [
        ("raise utils.UserError('this and that')", 2, "error: this and that"),
        ("raise ZeroDivisionError('of our own')", 1, "ZeroDivisionError: of our own"),
        ("return", 0, "warning: a warning in between"),
    ],
)
def test_a_loop_that_ends_early_leaves_no_bar(then, code, said):
    ended, written = on_terminal(*loop(then))
    assert ended == code
    lines = [line for line in screen(written) if line]
    assert lines[-1] == said
    assert not any("%|" in line or "it/s" in line for line in lines)
    assert lines[2] == "warning: a warning in between"


def test_ctrl_c_ends_with_130_and_whole_lines():
    code, written = on_terminal(*loop("time.sleep(60)"), type_at="in between")
    assert code == 130
    lines = [line for line in screen(written) if line]
    assert lines[2:] == ["warning: a warning in between", "interrupted"]
    assert not any("%|" in line or "^C" in line for line in lines)


# ---- whole runs ----


@pytest.fixture(scope="module")
def runs(tiny_root, tmp_path_factory):
    """A training run that writes to a terminal and the same with a pipe: (their outputs, the first one's folder)."""
    outputs = []
    for kind in ("pipe", "terminal"):
        folder = tmp_path_factory.mktemp(kind)
        words = ["main_dino.py", *SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", folder]
        if kind == "pipe":
            outputs.append(run_script(*words, small_heads=False).stdout.replace(str(folder), "FOLDER"))
        else:
            code, written = on_terminal(*words, columns=1000)
            assert code == 0, written
            outputs.append(written.replace(str(folder), "FOLDER"))
    return outputs


def test_a_training_run_leaves_on_the_terminal_what_a_file_gets(runs):
    plain, written = runs
    assert "\r" not in plain
    assert "\x1b" not in plain
    assert without_times("\n".join(screen(written, 1000)).rstrip("\n")) == without_times(plain)


def test_a_training_runs_bar_has_epoch_share_and_loss(runs):
    drawn = bars(runs[1])
    assert drawn[0] == "Epoch: [0/2]:   0%| 0/5 [00:00<?, ?it/s]"
    assert any(re.fullmatch(r"Epoch: \[1/2\]: .*%\| \d/5 \[.*, loss: \d\.\d{4}\]", text) for text in drawn)


def test_ctrl_c_in_training_ends_with_130_saved_and_with_whole_lines(tiny_root, tmp_path):
    words = ["main_dino.py", *SMALL_RUN, "--epochs", 500, "--data_path", tiny_root / "train", "--output_dir", tmp_path]
    code, written = on_terminal(*words, type_at="Epoch: [2/500]", columns=1000)
    assert code == 130
    lines = [line for line in screen(written, 1000) if line]
    assert re.fullmatch(r"stopped in epoch \d+ after step \d: the same command again .*", lines[-2])
    assert lines[-1].startswith("Training took")
    assert not any("%|" in line or "^C" in line for line in lines)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert f"stopped in epoch {checkpoint['epoch']} after step {checkpoint['step']}:" in lines[-2]
    assert len(log_without_times(tmp_path)) == checkpoint["epoch"]


def test_an_evaluation_has_a_bar_too(tiny_root):
    words = ["eval_knn.py", "--arch", "vit_nano", "--pretrained_weights", "random", "--image_size", 32]
    words += ["--data_path", tiny_root, "--nb_knn", 5, "--batch_size_per_gpu", 4, "--num_workers", 0]
    code, written = on_terminal(*words)
    assert code == 0
    assert any(re.match(r"Features: +\d+%\| \d+/10 \[", text) for text in bars(written))
    assert any(re.match(r"Features: +\d+%\| \d/5 \[", text) for text in bars(written))
    lines = [line for line in screen(written) if line]
    assert lines[-1].startswith("5-NN classifier result: Top1: ")
    assert not any("%|" in line for line in lines)


# ---- in this process ----


class Terminal(StringIO):
    """A standard output that takes itself for a terminal."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def term(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")


def test_between_lines_nothing_is_read_from_the_device():
    metrics, unread = utils.MetricLogger(), []
    with contextlib.redirect_stdout(Terminal()) as terminal:
        for i in metrics.log_every(range(21), 10, "Loop:"):
            metrics.update(loss=torch.tensor(float(i)))
            unread.append(len(metrics.meters["loss"].unread))
    assert unread == [1, *range(1, 11), *range(1, 11)]
    assert "loss: 20.0000]" in terminal.getvalue()


def test_a_loop_that_goes_on_shows_where_it_is():
    with contextlib.redirect_stdout(Terminal()) as terminal:
        list(utils.MetricLogger().log_every(range(3), 10, "Epoch: [4/9]", start=7))
    assert bars(terminal.getvalue())[0] == "Epoch: [4/9]:  70%| 7/10 [00:00<?, ?it/s]"


def test_other_processes_show_none(monkeypatch):
    monkeypatch.setattr(utils, "get_rank", lambda: 1)
    with contextlib.redirect_stdout(Terminal()) as terminal:
        list(utils.MetricLogger().log_every(range(3), 10, "Loop:"))
    assert terminal.getvalue() == ""


def test_what_the_background_writer_says_stands_above_the_bar(tmp_path):
    with contextlib.redirect_stdout(Terminal()) as terminal, utils.Bar("Loop:", 0, 5):
        writer = dino_checkpoints.CheckpointWriter(str(tmp_path / "missing" / "checkpoint.pth"))
        writer.save({"weights": torch.zeros(2)})
        writer.wait()
        warning, bar = screen(terminal.getvalue(), 1000)
    assert re.fullmatch(f"warning: {tmp_path}.* could not be written .No such file.* The run goes on", warning)
    assert bar.startswith("Loop:   0%|")
    assert screen(terminal.getvalue(), 1000) == [warning, ""]
