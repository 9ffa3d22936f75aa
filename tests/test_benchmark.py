"""benchmark.py: what it prints follows from what its runs printed."""

import re
import subprocess

import pytest
from conftest import arguments_of, ending, run_script

import benchmark

# Step i took i + 1 seconds: 21 seconds in all, one of them in the first step.
PROGRESS = """Epoch: [0/1]  [0/6]  eta: 0:00:00  loss: 4.1  time: 1.000000  data: 0.000000  max mem: 300
Epoch: [0/1]  [5/6]  eta: 0:00:00  loss: 4.0  time: 3.500000  data: 0.000000  max mem: 300
Averaged stats: loss: 4.0
"""


@pytest.fixture
def runs(monkeypatch, sample_root):
    """Stands in for the training runs: each takes as long as PROGRESS says; gives their command lines."""
    commands = []

    def run(words, **_):
        commands.append(words)
        return subprocess.CompletedProcess(words, 0, PROGRESS, "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_first_step_does_not_count(runs, tmp_path):
    args = arguments_of(benchmark, "scaling", "--batch_size_per_gpu", 4)
    assert benchmark.images_a_second(3, tmp_path, args) == pytest.approx(3 * 4 * 5 / 20)
    assert runs[0][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]


def test_runs_take_turns_and_ratios_are_between_neighbours(runs, monkeypatch, capsys):
    rates = iter([10, 18, 1, 1.9, 100, 190])  # the machine was slow in the second round
    order = []
    monkeypatch.setattr(benchmark, "images_a_second", lambda number, *_: order.append(number) or next(rates))
    benchmark.main(arguments_of(benchmark, "scaling"))
    assert order == [1, 2] * 3
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["1", "10.00", "1.00", "1.00"], ["2", "18.00", "1.90", "0.95"]]


def test_every_process_gets_the_same_number_of_images(runs, monkeypatch, tmp_path):
    root = benchmark.write_images(str(tmp_path), 7)
    assert len(list((tmp_path / "images" / "all").iterdir())) == 7
    assert root == str(tmp_path / "images")


def test_bad_flags_and_failing_runs_are_one_line(monkeypatch, capsys, sample_root):
    assert ending(monkeypatch, capsys, benchmark, "scaling", "--steps", 21)[1].startswith("error: --steps 21 must be")
    assert ending(monkeypatch, capsys, benchmark, "scaling", "--processes", 0)[0] == 2
    failed = subprocess.CompletedProcess([], 2, "", "error: no room\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert "a run with 1 processes failed: no room" in ending(monkeypatch, capsys, benchmark, "scaling")[1]


@pytest.mark.slow
def test_real_runs_give_a_table(sample_root):
    flags = ("--rounds", 1, "--steps", 2, "--arch", "vit_nano", "--batch_size_per_gpu", 1)
    lines = run_script("benchmark.py", "scaling", *flags).stdout.splitlines()
    assert re.split(r" {2,}", lines[0].strip()) == ["processes", "images/s", "ratio", "efficiency"]
    (one, two) = ([float(number) for number in line.split()] for line in lines[1:])
    assert one[0] == 1
    assert one[2:] == [1, 1]
    assert two[2] == pytest.approx(two[1] / one[1], rel=0.1)
    assert two[3] == pytest.approx(two[2] / 2, abs=0.006)
