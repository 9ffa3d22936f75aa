"""Runs that are stopped, killed, damaged or moved resume as if nothing had happened: real processes, real files.

A run here is 3 epochs of 5 steps. Its processes are forked from one that has imported everything, which saves seconds
per process; a few start as users start them.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    FORKS,
    ROOT,
    SMALL_RUN,
    assert_same,
    free_port,
    log_without_times,
    run_script,
    start_forks,
    use_small_networks,
)

import dino_checkpoints
import dino_cli
import dino_features
import dino_images
import dino_signals
import main_dino
import utils

pytestmark = pytest.mark.usefixtures("small_networks")
STEPS = 5  # an epoch: 40 images, 8 a step
FILES = [".lock", "checkpoint.prev.pth", "checkpoint.pth", "log.txt", "run.json"]
RUN = [*SMALL_RUN, "--epochs", "3", "--use_bn_in_head", "true"]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
HALVES = ("--batch_size_per_gpu", "4")  # for two processes


# ---- what goes wrong: functions that a process calls before it trains ----


def nothing():
    pass


def around_step(at, act, rank=0):
    """`act()` in step `at` of the run (every step if None) on one rank, before its forward pass."""
    seed_step = utils.seed_step

    def spoiled(seed, step):
        if at in (None, step) and utils.get_rank() == rank:
            act()
        seed_step(seed, step)

    utils.seed_step = spoiled


def signal_in_step(at, number, rank=0):
    around_step(at, lambda: os.kill(os.getpid(), number), rank)


def kill_in_step(at, rank=0):
    signal_in_step(at, signal.SIGKILL, rank)


def kill_in_knn(number):
    """While k-NN accuracy number `number` of the run is measured; the first two are made before the first step."""
    measure, calls = dino_features.labeled_features, []

    def measure_or_die(*args, **named):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(*args, **named)

    dino_features.labeled_features = measure_or_die


def hanging_image(number):
    """The file system stops to answer at image `number`."""
    load, loaded = dino_images.open_image, []

    def load_or_hang(path, exif=False):
        loaded.append(path)
        if len(loaded) > number:
            print("an image hangs", flush=True)
            time.sleep(1000)
        return load(path, exif)

    dino_images.open_image, dino_signals.GRACE = load_or_hang, 0.3


def hanging_image_after_signal(number):
    """A signal at the end of the step before the one that waits forever."""
    hanging_image(number + 1)  # one is opened before the first step, to see if images are small
    clip, steps = utils.clip_gradients, []

    def clip_and_signal(*args):
        steps.append(1)
        if 8 * len(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    utils.clip_gradients = clip_and_signal


def lost_stdout(kind):
    """From step 1 on, nobody reads the output, or there is no room for it."""

    def lose():
        read, write = os.pipe()
        os.dup2(write if kind == "pipe" else os.open("/dev/full", os.O_WRONLY), 1)
        os.close(read)
        os.close(write)

    around_step(1, lose)


def another_flag(name, value):
    """Process 1 was started with another value of a flag."""
    check = main_dino.check_args

    def change_and_check(args):
        if os.environ["RANK"] == "1":
            setattr(args, name, value)
        check(args)

    main_dino.check_args = change_and_check


def slow_steps(seconds):
    def say_and_sleep():
        print("a step begins", flush=True)
        time.sleep(seconds)

    for rank in (0, 1):
        around_step(None, say_and_sleep, rank)


def raise_in(place, rank):
    """An error of ours at step 7, in process `rank` alone."""

    def fail(*_):
        raise ArithmeticError(f"made up in the {place}")

    if place == "forward":
        around_step(7, fail, rank)
    elif place == "backward":
        around_step(7, lambda: setattr(torch.Tensor, "backward", fail), rank)
    else:
        load = dino_images.open_image
        counted = []

        def load_seven(path, exif):
            counted.append(path)
            return load(path, exif) if len(counted) < 7 or int(os.environ.get("RANK", 0)) != rank else fail()

        dino_images.open_image = load_seven


def nan_in_step(at, rank):
    forward = main_dino.DINOLoss.forward

    def poison():
        main_dino.DINOLoss.forward = lambda *args, **named: forward(*args, **named) * float("nan")

    def heal():
        main_dino.DINOLoss.forward = forward

    around_step(at, poison, rank)
    around_step(at + 1, heal, rank)


def nan_gradient_in_step(at):
    """One number of one gradient, of a loss that is finite."""
    clip, bad = utils.clip_gradients, []

    def spoiled(params, norm):
        if bad:
            params[0].grad.flatten()[0] = float("nan")
            bad.clear()
        return clip(params, norm)

    utils.clip_gradients = spoiled
    around_step(at, lambda: bad.append(True))


def nan_crops_in_step(at):
    forward, bad = utils.MultiCropWrapper.forward, []
    utils.MultiCropWrapper.forward = lambda self, crops: forward(
        self, [c * float("nan") for c in crops] if bad else crops
    )
    around_step(at, lambda: bad.append(True))
    around_step(at + 1, bad.clear)


def slow_saving(seconds, then="nothing", *args):
    save = torch.save

    def save_slowly(*args):
        print("a saving begins", flush=True)
        time.sleep(seconds)
        save(*args)

    torch.save = save_slowly
    globals()[then](*args)


def no_room_for(name, then="nothing"):
    """The file of this name can't be written."""
    globals()[then]()
    write = utils.write_whole

    def write_or_not(path, *rest):
        if str(path).endswith(name):
            raise OSError(28, "No space left on device")
        return write(path, *rest)

    utils.write_whole = write_or_not


def keep_states(folder):
    """Save both networks of every process as they are at the end."""
    epoch = main_dino.train_one_epoch

    def keep(parts, *rest):
        means = epoch(parts, *rest)
        modules = {"student": parts.student, "teacher": parts.teacher, "loss": parts.dino_loss}
        states = {name: module.state_dict() for name, module in modules.items()}
        torch.save(states, f"{folder}/rank{utils.get_rank()}.pth")
        return means

    main_dino.train_one_epoch = keep


def nan_and_keep_states(at, rank, folder):
    nan_in_step(at, rank)
    keep_states(folder)


def note_images(file, then="nothing", *args):
    """Write `epoch name name ...` for the images of each step that begins, for each rank to a file of its own."""
    file = f"{file}{os.environ.get('RANK', 0)}"
    epoch = main_dino.train_one_epoch

    def noted(parts, loader, schedules, number, *rest):
        class Loader:
            sampler, dataset = loader.sampler, loader.dataset

            def __len__(self):
                return len(loader)

            def __iter__(self):
                for batch in loader:
                    names = ["/".join(Path(loader.dataset.images.name(i)).parts[-2:]) for i in batch[1].tolist()]
                    with open(file, "a") as out:
                        out.write(f"{number} {' '.join(names)}\n")
                    yield batch

        return epoch(parts, Loader(), schedules, number, *rest)

    main_dino.train_one_epoch = noted
    globals()[then](*args)


def leave_slowly(seconds):
    leave = dino_signals.StopRequest.leave

    def slowly(*args):
        print("leaving", flush=True)
        time.sleep(seconds)
        leave(*args)

    dino_signals.StopRequest.leave = slowly
    slow_steps(0)


def die_while_saving(number):
    """SIGKILL in the middle of writing checkpoint number `number`."""
    save, numbers = torch.save, []

    def tear(state, file):
        numbers.append(len(numbers))
        if len(numbers) == number:
            file.write(b"PK" * 1000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = tear


def no_room(first, last, limit=200_000):
    """From step `first` to step `last` no file may get larger than `limit` bytes: a log's line, but no checkpoint."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    around_step(first, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
    around_step(last, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)))


def no_room_and_signal(at):
    no_room(at, 99)
    signal_in_step(at, signal.SIGTERM)


def read_only(path, at):
    """From step `at` on nothing can be written below `path`: it is laid over itself as a read-only mount."""

    def lay_over():
        subprocess.run(["mount", "--bind", path, path], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", path], check=True)

    around_step(at, lay_over)


def no_log(first, last):
    """log.txt can't be written in the steps from `first` to `last`."""
    write, full = utils.write_log_line, []

    def write_or_not(*given):
        if full:
            raise OSError(28, "No space left on device")
        write(*given)

    utils.write_log_line = write_or_not
    around_step(first, lambda: full.append(True))
    around_step(last, full.clear)


# ---- runs ----


def train(flags, spoil="nothing", *args):
    """What `python main_dino.py <flags>` does, after a call of the function of this file that `spoil` names."""
    sys.argv = ["main_dino.py", *map(str, flags)]
    torch.set_num_threads(1)
    use_small_networks(blocks=2)
    globals()[spoil](*args)
    dino_cli.run(main_dino.train_dino, main_dino.get_args_parser(), "")


def enter(screen, environment, *args):
    """The first function of a forked process: a session and a screen of its own."""
    os.setsid()
    for number in utils.STOP_SIGNALS:  # runs in the process that started this one leave them ignored
        signal.signal(number, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's processes, which are spoiled too
    with open(screen, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    train(*args)


class Run:
    """`world` processes that train together; `spoil` names what each calls before, with its arguments."""

    def __init__(self, *flags, world=1, spoil=("nothing",)):
        output = Path(flags[flags.index("--output_dir") + 1]).absolute()
        self.screens = [output.parent / f"{output.name}-screen{rank}" for rank in range(world)]
        port = str(free_port())
        start_forks()
        self.processes = []
        for rank, screen in enumerate(self.screens):
            place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            screen.write_bytes(b"")
            process = FORKS.Process(target=enter, args=(screen, place if world > 1 else {}, flags, *spoil))
            process.start()
            self.processes.append(process)

    def end(self, timeout=60):
        """Exit codes and outputs. A process that is still there after `timeout` seconds is an error."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0.01))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        assert None not in codes, f"a process hangs: {codes}\n{self.said()}"
        return codes, [screen.read_text() for screen in self.screens]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def said(self):
        return "\n".join(screen.read_text()[-3000:] for screen in self.screens)

    def wait_for(self, words, times=1, timeout=60):
        """Until rank 0 has printed this `times` times."""
        until = time.monotonic() + timeout
        while self.screens[0].read_text().count(words) < times:
            assert time.monotonic() < until, f"no {words!r}:\n{self.said()}"
            time.sleep(0.005)


def finish(*flags, timeout=60, **named):
    """A run that has to end well; what rank 0 printed."""
    codes, screens = Run(*flags, **named).end(timeout)
    assert not any(codes), "\n".join(screens)
    return screens[0]


def load(path):
    return torch.load(path, weights_only=True)


def progress(path):
    checkpoint = load(path)
    return checkpoint["epoch"] * STEPS + checkpoint["images_done"] // 8


def result(folder):
    """All results of a run, but for times and memory; of its arguments, the ones that shape the result."""
    checkpoint = load(folder / "checkpoint.pth")
    checkpoint["args"] = {key: checkpoint["args"][key] for key in ("arch", "lr", "epochs", "seed")}
    return checkpoint, log_without_times(folder)


@pytest.fixture(scope="module")
def common(tiny_root):
    return [*RUN, "--data_path", tiny_root / "train"]


@pytest.fixture
def flags(common, tmp_path):
    return [*common, "--output_dir", tmp_path / "run"]


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(common, tmp_path_factory):
    """The result of an undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(*common, "--output_dir", folder)
    return result(folder)


@pytest.fixture(scope="module")
def whole_of_two(common, tmp_path_factory):
    """The same, of two processes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(*common, *HALVES, "--output_dir", folder, world=2)
    return result(folder)


@pytest.fixture(scope="module")
def stopped(common, tmp_path_factory):
    """The folder of a run that was killed after step 8, with the checkpoints of steps 8 and 7."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    codes, _ = Run(*common, "--output_dir", folder, "--saveckp_iters", 1, spoil=("kill_in_step", 8)).end()
    assert codes == [-signal.SIGKILL]
    assert [progress(folder / f"checkpoint{name}.pth") for name in (".prev", "")] == [7, 8]
    return folder


# ---- resuming ----


def test_the_script_gives_the_same_result_as_the_runs_of_this_file(whole, flags, run):
    run_script("main_dino.py", *flags, blocks=2)
    assert_same(result(run), whole)


@pytest.mark.parametrize("at", [0, 4, 8])
def test_a_killed_run_resumes_bit_identically(whole, flags, run, at):
    flags += ["--saveckp_iters", 2]
    assert Run(*flags, spoil=("kill_in_step", at)).end()[0] == [-signal.SIGKILL]
    assert at == 0 or progress(run / "checkpoint.pth") == max(at // 2 * 2, at // STEPS * STEPS)
    said = finish(*flags)
    assert ("resuming" in said) == (at > 0)
    assert_same(result(run), whole)


@pytest.mark.parametrize(("flag", "value"), [("--saveckp_iters", 1), ("--save_every_minutes", 1e-9)])
def test_checkpoints_are_saved_by_step_and_time_and_two_are_kept(flags, run, flag, value):
    spoil = ("signal_in_step", 8, signal.SIGUSR1)
    assert Run(*flags, flag, value, spoil=spoil).end()[0] == [128 + signal.SIGUSR1]
    assert [progress(run / f"checkpoint{name}.pth") for name in (".prev", "")] == [8, 9]
    assert sorted(file.name for file in run.iterdir()) == FILES


def test_by_default_a_short_run_saves_after_epochs_only(flags, run):
    Run(*flags, "--save_every_minutes", 0, spoil=("kill_in_step", 13)).end()
    assert [progress(run / f"checkpoint{name}.pth") for name in (".prev", "")] == [5, 10]


@pytest.mark.parametrize("at", [7, 14])
def test_rarer_checkpoints_are_of_every_nth_epoch_and_the_last(whole, flags, run, at):
    flags += ["--saveckp_epochs", 2]
    assert Run(*flags, spoil=("kill_in_step", at)).end()[0] == [-signal.SIGKILL]
    assert not (run / "checkpoint.prev.pth").exists()
    assert [progress(file) for file in run.glob("checkpoint.pth")] == [10] * (at > 9)
    finish(*flags)
    assert_same(result(run), whole)


def test_the_gradient_scaler_is_resumed_within_an_epoch(common, tmp_path):
    flags = [*common, "--amp_dtype", "fp16", "--epochs", 1, "--output_dir"]
    finish(*flags, tmp_path / "whole")
    Run(*flags, tmp_path / "run", spoil=("signal_in_step", 2, signal.SIGTERM)).end()
    assert load(tmp_path / "run" / "checkpoint.pth")["fp16_scaler"]["_growth_tracker"] == 3
    finish(*flags, tmp_path / "run")
    assert_same(result(tmp_path / "run"), result(tmp_path / "whole"))


def test_two_killed_processes_resume_bit_identically(whole_of_two, flags, run):
    flags += [*HALVES, "--saveckp_iters", 3]
    assert Run(*flags, world=2, spoil=("kill_in_step", 11)).end()[0][0] == -signal.SIGKILL
    assert progress(run / "checkpoint.pth") == 10
    finish(*flags, world=2)
    assert_same(result(run), whole_of_two)


def images_of_steps(prefix, world):
    """What each step of the run saw, over all processes: a list of sets of (epoch, image)."""
    ranks = [[line.split() for line in Path(f"{prefix}{rank}").read_text().splitlines()] for rank in range(world)]
    return [{(epoch, name) for epoch, *names in step for name in names} for step in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def images_in_order(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    finish(*common, "--output_dir", folder / "run", spoil=("note_images", folder / "seen"))
    return images_of_steps(folder / "seen", 1)


@pytest.mark.parametrize(
    ("world", "flag"), [(1, "--grad_accum_steps 4 --batch_size_per_gpu 2"), (2, "--batch_size_per_gpu 4")]
)
def test_other_numbers_of_processes_and_passes_resume_at_the_same_image(
    images_in_order, stopped, flags, tmp_path, run, world, flag
):
    shutil.copytree(stopped, run)
    assert len(images_in_order) == 15
    assert all(len(images) == 8 for images in images_in_order)
    said = finish(*flags, *flag.split(), world=world, spoil=("note_images", tmp_path / "seen"))
    assert "continuing in epoch 1 after step 3" in said
    assert "note: resuming with" not in said
    assert images_of_steps(tmp_path / "seen", world) == images_in_order[8:]


def test_one_process_resumes_a_run_of_two(images_in_order, flags, tmp_path, run):
    Run(*flags, *HALVES, world=2, spoil=("note_images", tmp_path / "a", "signal_in_step", 6, 15, 1)).end()
    assert images_of_steps(tmp_path / "a", 2) == images_in_order[:7]
    finish(*flags, spoil=("note_images", tmp_path / "b"))
    assert images_of_steps(tmp_path / "b", 1) == images_in_order[7:]


def test_the_log_of_an_epoch_counts_the_steps_of_other_processes(whole, flags, run):
    """Stopped after the last step of the epoch, resumed by two: the mean over the epoch is the one process's."""
    assert Run(*flags, spoil=("signal_in_step", 4, signal.SIGTERM)).end()[0] == [143]
    finish(*flags, *HALVES, world=2)
    first, second, _ = log_without_times(run)
    assert first == whole[1][0]
    assert second["train_loss"] == pytest.approx(whole[1][1]["train_loss"], rel=0.05)


def test_steps_of_two_processes_and_of_one_have_the_same_weight_in_the_log(whole, flags, run):
    Run(*flags, *HALVES, world=2, spoil=("signal_in_step", 6, signal.SIGTERM)).end()
    finish(*flags)
    rates = [[line["train_lr"] for line in log] for log in (log_without_times(run), whole[1])]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)
    assert rates[0][0] != rates[0][1]


def test_a_resumed_epoch_may_have_no_good_step(flags, run):
    """Nothing but what the checkpoint has added up is there to be printed at the end of the epoch."""
    Run(*flags, spoil=("signal_in_step", 3, signal.SIGTERM)).end()
    said = finish(*flags, spoil=("nan_in_step", 4, 0))
    assert "this step is skipped (1 in a row)" in said
    assert len((run / "log.txt").read_text().splitlines()) == 3


# ---- changed arguments ----


@pytest.mark.parametrize(
    ("flag", "then", "now"),
    [
        ("--lr 0.001", "--lr 0.0005", "--lr 0.001"),
        ("--grad_accum_steps 2", "images per step 8", "images per step 16"),
        ("--local_crops_number 1", "--local_crops_number 2", "--local_crops_number 1"),
        ("--use_fp16 false", "--use_fp16 True", "--use_fp16 False"),
    ],
)
def test_a_changed_setting_that_changes_the_result_must_be_allowed(refusal, stopped, flags, run, flag, then, now):
    shutil.copytree(stopped, run)
    before = (run / "checkpoint.pth").read_bytes()
    line = refusal(main_dino, *flags, *flag.split())
    assert f"was made with {then}; this run has {now}, which would change the result" in line
    assert line.endswith("Use the same settings or another --output_dir, or add --allow_changed_args true")
    assert (run / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "then"),
    [
        ("--gray_p 1", "--gray_p 0.2"),
        ("--blur_p 0 0 0", "--blur_p [1.0, 0.1, 0.5]"),
        ("--momentum_teacher_end 0.99", "--momentum_teacher_end 1.0"),
    ],
)
def test_a_checkpoint_from_before_an_argument_has_what_runs_did_then(refusal, stopped, flags, run, flag, then):
    shutil.copytree(stopped, run)
    checkpoint = torch.load(run / "checkpoint.pth", weights_only=True)
    for name in dino_checkpoints.ADDED_ARGS:
        del checkpoint["args"][name]
    torch.save(checkpoint, run / "checkpoint.pth")
    assert f"was made with {then}; this run has" in refusal(main_dino, *flags, *flag.split())
    assert "note: resuming with" not in finish(*flags)


def test_another_number_of_images_must_be_allowed(refusal, stopped, flags, run, tmp_path, tiny_root):
    shutil.copytree(stopped, run)
    shutil.copytree(tiny_root / "train", tmp_path / "grown", symlinks=True)
    first = sorted((tmp_path / "grown" / "brick").iterdir())[0]
    shutil.copy(first, first.with_name("more.png"))
    flags[flags.index("--data_path") + 1] = tmp_path / "grown"
    line = refusal(main_dino, *flags)
    assert "was made with training images 40; this run has training images 41, which would change the result" in line
    assert "note: resuming with training images 41 (was 40)" in finish(*flags, "--allow_changed_args", "true")


def test_a_moved_run_resumes_without_a_note(stopped, flags, tmp_path, tiny_root, whole):
    shutil.copytree(stopped, tmp_path / "moved")
    shutil.copytree(tiny_root / "train", tmp_path / "images")
    flags += ["--output_dir", tmp_path / "moved", "--data_path", tmp_path / "images", "--num_workers", 1]
    said = finish(*flags, "--saveckp_freq", 7, "--save_every_minutes", 1)
    assert "resuming with" not in said
    assert_same(result(tmp_path / "moved"), whole)


# ---- signals ----


@pytest.mark.parametrize(("name", "at"), [("SIGTERM", 1), ("SIGHUP", 2), ("SIGUSR2", 4)])  # 4 is an epoch's last step
def test_a_signal_saves_after_the_step_and_the_run_resumes_bit_identically(whole, flags, run, name, at):
    number = getattr(signal, name).value
    codes, (said,) = Run(*flags, spoil=("signal_in_step", at, number)).end()
    assert codes == [128 + number], said
    stopped = load(run / "checkpoint.pth")
    assert (stopped["epoch"], stopped["images_done"]) == (at // 5, 8 * (at % 5 + 1))
    if name != "SIGHUP":  # the terminal is closed
        assert f"stopped in epoch {at // 5} after step {at % 5 + 1}" in said
    assert "Traceback" not in said
    assert f"continuing in epoch {at // 5} after step {at % 5 + 1}" in finish(*flags)
    assert_same(result(run), whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_while_the_loader_hangs_saves_what_is_done(whole, flags, run, workers):
    stuck = Run(*flags, "--num_workers", workers, spoil=("hanging_image", 20))
    stuck.wait_for("an image hangs")
    time.sleep(1)  # it trains on the batches that are there
    os.kill(stuck.processes[0].pid, signal.SIGTERM)
    codes, (said,) = stuck.end(timeout=20)
    assert codes == [128 + signal.SIGTERM], said
    assert "stopped in epoch 0 after step 2. Run the same command to resume" in said
    assert "Traceback" not in said
    assert progress(run / "checkpoint.pth") == 2
    finish(*flags)
    assert_same(result(run), whole)


def test_a_run_stopped_twice_in_an_epoch_resumes(whole, flags, run):
    for at in (1, 3):
        assert Run(*flags, spoil=("signal_in_step", at, signal.SIGTERM)).end()[0] == [143]
    finish(*flags)
    assert_same(result(run), whole)


def test_a_signal_just_before_the_loader_hangs_saves_what_is_done(flags, run):
    """After the vote of a step, which is where a run looks for signals."""
    stuck = Run(*flags, spoil=("hanging_image_after_signal", 16))
    codes, (said,) = stuck.end(timeout=20)
    assert (codes, progress(run / "checkpoint.pth")) == ([128 + signal.SIGTERM], 2), said


def test_a_signal_before_the_first_batch_saves_too(whole, flags, run):
    stuck = Run(*flags, spoil=("hanging_image", 3))
    stuck.wait_for("an image hangs")
    os.kill(stuck.processes[0].pid, signal.SIGTERM)
    codes, (said,) = stuck.end(timeout=20)
    assert (codes, progress(run / "checkpoint.pth")) == ([128 + signal.SIGTERM], 0), said
    finish(*flags)
    assert_same(result(run), whole)


@pytest.mark.parametrize("kind", ["pipe", "full disk"])
def test_a_run_that_can_not_print_goes_on(whole, flags, run, kind):
    assert Run(*flags, spoil=("lost_stdout", kind)).end()[0] == [0]
    assert_same(result(run), whole)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("lr", 0.1, "--lr differs between processes: 0.0005, 0.1. Use the same for all"),
        ("arch", "vit_tiny", "--arch differs between processes: 'vit_nano', 'vit_tiny'"),
        ("data_path", "val", r"the training images (number, digest of names) differs between processes: (40, "),
    ],
)
def test_processes_that_disagree_do_not_train(flags, tiny_root, run, name, value, says):
    value = str(tiny_root / value) if name == "data_path" else value
    codes, screens = Run(*flags, *HALVES, world=2, spoil=("another_flag", name, value)).end()
    assert codes == [2, 2], screens
    assert "".join(screens).count(says) == 1, screens  # by the first
    assert not (run / "checkpoint.pth").exists()


def test_a_signal_to_one_process_stops_both_after_the_same_step(whole_of_two, flags, run):
    flags += HALVES
    codes, screens = Run(*flags, world=2, spoil=("signal_in_step", 6, signal.SIGUSR1, 1)).end()
    assert codes == [128 + signal.SIGUSR1] * 2, screens
    assert progress(run / "checkpoint.pth") == 7
    assert not any("Traceback" in said for said in screens)
    finish(*flags, world=2)
    assert_same(result(run), whole_of_two)


def test_a_second_signal_does_not_change_the_exit_code(flags):
    """srun and torchrun send SIGTERM to all processes when the first has ended."""
    running = Run(*flags, spoil=("leave_slowly", 1))
    running.wait_for("a step begins")
    os.kill(running.processes[0].pid, signal.SIGUSR1)
    running.wait_for("leaving")
    os.kill(running.processes[0].pid, signal.SIGTERM)
    codes, (said,) = running.end()
    assert codes == [128 + signal.SIGUSR1], said


@pytest.mark.parametrize(("error", "deaf"), [(utils.UserError("collapse", 4), True), (RuntimeError("a bug"), False)])
def test_sigterm_does_not_change_the_exit_code_of_a_user_error(error, deaf):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        signal.signal(signal.SIGTERM, utils.terminate)
        with pytest.raises(type(error)), dino_signals.StopRequest():
            raise error
        assert signal.getsignal(signal.SIGTERM) is (signal.SIG_IGN if deaf else utils.terminate)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("early", [True, False])
def test_a_wait_for_a_batch_ends_some_time_after_a_signal(monkeypatch, early):
    monkeypatch.setattr(dino_signals, "GRACE", 0.05)
    seen = []

    class Loader:
        def __len__(self):
            return 2

        def __iter__(self):
            yield "a batch"
            if not early:
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(20)

    def use_all(batches):
        for batch in batches:
            seen.append(batch)
            if early:
                os.kill(os.getpid(), signal.SIGUSR1)

    with dino_signals.StopRequest() as stop:
        watched = stop.watch(Loader())
        assert len(watched) == 2
        with pytest.raises(utils.Stopped) as stopped:
            use_all(watched)
        assert (stopped.value.signal, stop.signal, seen) == (signal.SIGUSR1, signal.SIGUSR1, ["a batch"])


def test_a_run_that_has_stopped_may_take_long_to_exit():
    """The alarm that ends a wait for a batch would end Python itself, which resets its handler when it exits."""
    with dino_signals.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        batches = iter(stop.watch([1]))
        assert next(batches) == 1
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 4
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_second_ctrl_c_interrupts_at_once():
    with dino_signals.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.interrupted -= 2  # seconds ago
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_ctrl_c_reaches_loaders_without_harm(whole, flags, run):
    """Ctrl-C reaches the loader's processes too."""
    flags += ["--num_workers", 2]
    running = Run(*flags, spoil=("slow_steps", 0.1))
    running.wait_for("a step begins", 2)
    os.killpg(running.processes[0].pid, signal.SIGINT)
    codes, (said,) = running.end()
    assert codes == [130]
    assert "stopped in epoch" in said
    assert "Traceback" not in said
    finish(*flags)
    assert_same(result(run), whole)


@pytest.mark.parametrize(("pause", "at_once"), [(1.2, True), (0.2, False)])
def test_a_second_ctrl_c_after_a_second_ends_the_run_at_once(flags, run, pause, at_once):
    running = Run(*flags, spoil=("slow_steps", 3))
    running.wait_for("a step begins")
    os.kill(running.processes[0].pid, signal.SIGINT)
    time.sleep(pause)
    os.kill(running.processes[0].pid, signal.SIGINT)
    codes, (said,) = running.end()
    assert codes == [130]
    assert "Traceback" not in said
    assert ("interrupted" in said) == at_once
    assert (run / "checkpoint.pth").exists() != at_once


def test_a_second_ctrl_c_ends_a_slow_save(whole, flags, run):
    running = Run(*flags, "--saveckp_iters", 1, spoil=("slow_saving", 30, "slow_steps", 3))
    running.wait_for("a saving begins")
    os.kill(running.processes[0].pid, signal.SIGINT)
    time.sleep(1.2)
    os.kill(running.processes[0].pid, signal.SIGINT)
    began = time.monotonic()
    assert running.end()[0] == [130]
    assert time.monotonic() - began < 10
    finish(*flags)
    assert_same(result(run), whole)


def test_no_process_exits_before_rank_0_has_saved(flags, run):
    """A launcher ends all when one has ended: the signal comes to rank 1, whose end must not be the saving's."""
    running = Run(*flags, *HALVES, world=2, spoil=("slow_saving", 2, "signal_in_step", 6, signal.SIGUSR1, 1))
    running.wait_for("a saving begins", 2, timeout=90)  # the first is after epoch 0
    assert not (run / "checkpoint.pth").exists() or progress(run / "checkpoint.pth") == 5
    running.processes[1].join(60)
    assert progress(run / "checkpoint.pth") == 7
    assert running.end()[0] == [128 + signal.SIGUSR1] * 2


def test_a_process_that_waits_for_others_can_be_terminated(flags):
    running = Run(*flags, *HALVES, world=2)
    running.processes[1].kill()
    running.processes[1].join()
    time.sleep(4)
    os.kill(running.processes[0].pid, signal.SIGTERM)
    running.processes[0].join(10)
    assert running.processes[0].exitcode in (-signal.SIGTERM, 143)
    running.kill()


@pytest.mark.slow
def test_a_signal_to_torchrun_leaves_a_resumable_run(whole_of_two, flags, run, tmp_path):
    flags += HALVES
    script = tmp_path / "slow.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import test_restarts\ntest_restarts.train(sys.argv[1:], 'slow_steps', 0.3)\n"
    )
    screen = tmp_path / "screen"
    with open(screen, "wb") as file:
        launcher = subprocess.Popen(
            [sys.executable, *TORCHRUN, str(script), *map(str, flags)],
            stdout=file, stderr=file, cwd=ROOT,
        )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while "[0/5]" not in screen.read_text():
            assert time.monotonic() < until, screen.read_text()
            time.sleep(0.02)
        launcher.terminate()
        assert launcher.wait(30) != 0
    finally:
        launcher.kill()
    assert 1 <= progress(run / "checkpoint.pth") < 15
    assert "stopped in epoch 0" in screen.read_text()
    finish(*flags, world=2)
    assert_same(result(run), whole_of_two)


# ---- two runs in one folder ----


def test_a_second_run_in_the_folder_is_refused_while_the_first_runs(refusal, whole, flags, run):
    running = Run(*flags, spoil=("slow_steps", 2))
    running.wait_for("a step begins")
    assert f"another run is writing to --output_dir {run}." in refusal(main_dino, *flags)
    running.kill()
    finish(*flags)
    assert_same(result(run), whole)


# ---- damage ----


def flip(path, place):
    """Turn over a bit in each of 200 bytes from this place on, a share of the file's length. Padding is shorter."""
    content = bytearray(path.read_bytes())
    start = int(place * (len(content) - 200))
    for i in range(start, start + 200):
        content[i] ^= 16
    path.write_bytes(content)


def truncate(path, share):
    os.truncate(path, int(share * path.stat().st_size))


@pytest.mark.parametrize(("damage", "where"), [(truncate, 0), (truncate, 0.99999), (flip, 0.2), (flip, 0.8)])
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(stopped, whole, flags, run, damage, where):
    shutil.copytree(stopped, run)
    damage(run / "checkpoint.pth", where)
    said = finish(*flags)
    assert f"warning: {run}/checkpoint.pth can't be read" in said
    assert f"Using the previous one, {run}/checkpoint.prev.pth" in said
    assert "continuing in epoch 1 after step 2" in said
    assert_same(result(run), whole)


def test_no_flipped_bit_that_changes_a_checkpoint_goes_unnoticed(stopped, tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = load(stopped / "checkpoint.pth")
    small = {"epoch": 1, "center": state["dino_loss"]["center"], "args": state["args"], "lr": 0.125}
    torch.save(small, path)
    whole = path.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            assert_same(dino_checkpoints.load_checkpoint(path, verify=True), small)
        except utils.UserError as e:
            noticed += "can't be read" in str(e)
    assert noticed > len(whole) / 7 / 3  # the rest is padding and what zip files say twice


def test_a_lost_checkpoint_is_replaced_by_the_previous_one(stopped, whole, flags, run):
    shutil.copytree(stopped, run)
    (run / "checkpoint.pth").unlink()
    assert "warning: there is no" in finish(*flags)
    assert_same(result(run), whole)


def test_a_damaged_checkpoint_does_not_become_the_previous_one(stopped, flags, run):
    shutil.copytree(stopped, run)
    good = (run / "checkpoint.prev.pth").read_bytes()
    truncate(run / "checkpoint.pth", 0.5)
    Run(*flags, spoil=("signal_in_step", 7, signal.SIGTERM)).end()
    assert progress(run / "checkpoint.pth") == 8
    assert (run / "checkpoint.prev.pth").read_bytes() == good
    Run(*flags, spoil=("signal_in_step", 8, signal.SIGTERM)).end()
    assert [progress(run / f"checkpoint{name}.pth") for name in (".prev", "")] == [8, 9]


def test_two_damaged_checkpoints_are_one_error_line_and_stay(refusal, stopped, flags, run):
    shutil.copytree(stopped, run)
    truncate(run / "checkpoint.pth", 0.5)
    flip(run / "checkpoint.prev.pth", 0.4)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    assert f"{run}/checkpoint.prev.pth can't be read as a checkpoint" in refusal(main_dino, *flags)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


@pytest.mark.parametrize("number", [1, 4])
def test_a_run_killed_while_saving_resumes_from_the_previous_checkpoint(whole, flags, run, number):
    flags += ["--saveckp_iters", 1]
    assert Run(*flags, spoil=("die_while_saving", number)).end()[0] == [-signal.SIGKILL]
    assert (run / "checkpoint.pth.tmp").exists()
    assert (run / "checkpoint.pth").exists() == (number > 1)
    finish(*flags)
    assert sorted(file.name for file in run.iterdir()) == sorted([*FILES, "backbone.json", "backbone.pth"])
    assert_same(result(run), whole)


def test_a_copy_that_a_kill_prevented_is_made_after_resuming(whole, flags, run):
    flags += ["--saveckp_freq", 1]
    assert Run(*flags, spoil=("die_while_saving", 1)).end()[0] == [-signal.SIGKILL]
    assert [file.name for file in run.glob("checkpoint*")] == ["checkpoint0000.pth.tmp"]
    finish(*flags)
    assert sorted(file.name for file in run.glob("checkpoint0*")) == [f"checkpoint000{i}.pth" for i in range(3)]
    assert [load(run / f"checkpoint000{i}.pth")["epoch"] for i in range(3)] == [1, 2, 3]
    assert_same(result(run), whole)


# ---- no room ----


def test_a_copy_that_can_not_be_written_exits_with_5(whole, flags, run):
    codes, (said,) = Run(*flags, "--saveckp_freq", 2, spoil=("no_room_for", "checkpoint0000.pth")).end()
    assert codes == [5]
    assert f"error: a checkpoint is lost: {run}/checkpoint0000.pth could not be written (No space left" in said
    assert f"{run}/checkpoint.pth could not" not in said
    assert sorted(file.name for file in run.glob("checkpoint0*")) == ["checkpoint0002.pth"]
    assert_same(result(run), whole)


def test_a_failed_save_keeps_the_old_checkpoint_and_the_run_continues(whole, flags, run):
    codes, (said,) = Run(*flags, spoil=("no_room", 8, 13)).end()
    assert codes == [0], said
    assert said.count(f"warning: {run}/checkpoint.pth could not be written (File too large)") == 1
    assert "The run continues and tries again at the next save" in said
    assert progress(run / "checkpoint.prev.pth") == 5
    assert_same(result(run), whole)


def test_a_failed_last_save_exits_with_5(whole, flags, run):
    codes, (said,) = Run(*flags, spoil=("no_room", 8, 99)).end()
    assert codes == [5]
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert "a checkpoint is lost" in line
    assert "File too large" in line
    assert progress(run / "checkpoint.pth") == 5
    assert sorted(file.name for file in run.iterdir()) == [".lock", "checkpoint.pth", "log.txt", "run.json"]
    finish(*flags)
    assert_same(result(run), whole)


@pytest.fixture
def disk(run):
    """The output folder is a file system of its own."""
    run.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", run], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield
    subprocess.run(["umount", run], check=True)


@pytest.mark.usefixtures("disk")
def test_a_disk_that_becomes_read_only_does_not_end_the_run(whole, flags, run):
    codes, (said,) = Run(*flags, spoil=("read_only", str(run), 8)).end()
    assert codes == [5]
    assert said.count(f"warning: {run}/checkpoint.pth could not be written (Read-only file system)") == 2
    assert said.count(f"warning: {run}/log.txt could not be written (Read-only file system)") == 2
    assert "error: a checkpoint is lost" in said
    assert "Traceback" not in said
    assert progress(run / "checkpoint.pth") == 5
    codes, (said,) = Run(*flags).end()
    assert codes == [2]
    assert said.startswith(f"error: can't write to --output_dir {run}: Read-only file system. Use a folder that")
    subprocess.run(["umount", str(run)], check=True)
    finish(*flags)
    assert_same(result(run), whole)


def test_a_log_line_that_can_not_be_written_is_printed(whole, flags, run):
    codes, (said,) = Run(*flags, spoil=("no_log", 4, 13)).end()
    assert codes == [0], said
    warning = f"warning: {run}/log.txt could not be written (No space left on device): "
    lost = [json.loads(line.removeprefix(warning)) for line in said.splitlines() if line.startswith(warning)]
    assert [line["epoch"] for line in lost] == [0, 1]
    assert [line["epoch"] for line in log_without_times(run)] == [2]


def test_a_signal_does_not_hide_that_nothing_could_be_saved(flags, run):
    codes, (said,) = Run(*flags, spoil=("no_room_and_signal", 3)).end()
    assert codes == [5]
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert line.startswith("error: stopped in epoch 0 after step 4, not saved: ")
    assert not (run / "checkpoint.pth").exists()


def test_a_full_disk_leaves_no_torn_line_in_the_log(tmp_path):
    utils.write_log_line(tmp_path, {"epoch": 0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        with pytest.raises(OSError, match=r"No space left on device|File too large"):
            utils.write_log_line(tmp_path, {"epoch": 1, "train_loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    utils.write_log_line(tmp_path, {"epoch": 2})
    assert (tmp_path / "log.txt").read_text().splitlines() == ['{"epoch": 0}', '{"epoch": 2}']


# ---- a process that fails ----


@pytest.mark.parametrize(("place", "rank"), [("forward", 0), ("backward", 1), ("loader", 1)])
def test_an_error_in_one_process_ends_the_other_with_a_hint(flags, place, rank):
    codes, screens = Run(*flags, *HALVES, "--num_workers", 1, world=2, spoil=("raise_in", place, rank)).end()
    assert all(codes), codes
    assert f"ArithmeticError: made up in the {place}" in screens[rank]
    assert f"ArithmeticError: made up in the {place}" not in screens[1 - rank]
    assert "hint: the connection to another process is lost" in screens[1 - rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other_with_a_hint(flags, rank):
    running = Run(*flags, *HALVES, "--num_workers", 1, world=2, spoil=("signal_in_step", 6, signal.SIGKILL, rank))
    codes, screens = running.end()
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] > 0
    assert "hint: the connection to another process is lost" in screens[1 - rank]


@pytest.mark.slow
def test_torchrun_ends_all_processes_if_one_fails(flags, tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        f"import test_restarts\ntest_restarts.train(sys.argv[1:], 'raise_in', 'backward', 1)\n"
    )
    done = run_script(*TORCHRUN, script, *flags, *HALVES, check=False, timeout=60)
    assert done.returncode != 0
    assert "ArithmeticError: made up in the backward" in done.stderr


def test_a_nan_loss_in_one_process_skips_the_step_in_both(flags, tmp_path, run):
    spoil = ("nan_and_keep_states", 6, 1, str(tmp_path))
    codes, screens = Run(*flags[:-2], "--output_dir", run, *HALVES, world=2, spoil=spoil).end()
    assert codes == [0, 0], screens
    assert screens[0].count("this step is skipped (1 in a row)") == 1
    assert "in epoch 1, step 1 (rank 1): this step is skipped" in screens[0]
    one, other = (load(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    for states in (one, other):  # each process's own batch norms
        for part in ("student", "teacher"):
            states[part] = {k: v for k, v in states[part].items() if "running" not in k and "num_batches" not in k}
    assert_same(one, other)
    assert all(value.isfinite().all() for value in one["student"].values())
    checkpoint = load(run / "checkpoint.pth")
    assert {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()} >= {14}


def test_weights_that_are_not_finite_are_not_saved(flags, run):
    """A gradient is NaN in step 8, and with it all weights; the losses of the steps that are left are bad."""
    codes, (said,) = Run(*flags, "--saveckp_iters", 1, "--max_bad_steps", 20, spoil=("nan_gradient_in_step", 8)).end()
    assert codes == [3]
    assert "error: the weights are no longer finite" in said
    assert [progress(run / f"checkpoint{name}.pth") for name in (".prev", "")] == [7, 8]
    assert all(value.isfinite().all() for value in load(run / "checkpoint.pth")["student"].values())


def test_a_skipped_step_leaves_batch_norm_statistics_unchanged(flags, run):
    codes, (said,) = Run(*flags, spoil=("nan_crops_in_step", 6)).end()
    assert codes == [0]
    assert said.count("this step is skipped") == 1
    checkpoint = load(run / "checkpoint.pth")
    for part in ("student", "teacher"):
        statistics = {name: value for name, value in checkpoint[part].items() if "running" in name}
        assert statistics
        assert all(value.isfinite().all() for value in statistics.values())
        counted = {int(value) for name, value in checkpoint[part].items() if name.endswith("num_batches_tracked")}
        assert counted == {14}


def test_too_many_bad_steps_exit_with_3_also_on_a_full_disk(flags, run):
    codes, (said,) = Run(*flags, "--max_bad_steps", 2, spoil=("no_room_for", "bad_step.json", "always_nan")).end()
    assert codes == [3]
    assert "bad_step.json could not be written (No space left on device)" in said
    assert "Traceback" not in said


def test_bad_steps_in_a_row_are_counted_across_epochs(flags):
    """More than --max_bad_steps in a row, but not within one epoch of 5."""
    codes, (said,) = Run(*flags, "--max_bad_steps", 6, spoil=("always_nan",)).end()
    assert codes == [3], said
    assert "in epoch 1, step 1, after 6 such steps in a row" in said


def always_nan():
    forward = main_dino.DINOLoss.forward
    main_dino.DINOLoss.forward = lambda *args, **named: forward(*args, **named) * float("nan")


# ---- all of it, again and again ----


@pytest.mark.slow
def test_a_run_killed_twenty_times_equals_an_undisturbed_one(common, tmp_path):
    """At random moments, and every fourth time while a checkpoint is being written."""
    flags = [*common, *HALVES, "--epochs", 20, "--saveckp_iters", 2, "--output_dir"]
    finish(*flags, tmp_path / "whole", world=2, timeout=200)
    folder, rng = tmp_path / "run", random.Random(0)
    for number in range(20):
        running = Run(*flags, folder, world=2, spoil=("slow_steps", 0.1))
        running.wait_for("steps per epoch")
        if number % 4 == 3:
            while running.processes[0].is_alive() and not (folder / "checkpoint.pth.tmp").exists():
                time.sleep(0.0002)
        else:
            running.wait_for("a step begins", rng.randrange(6))
            time.sleep(rng.uniform(0, 0.2))
        first = rng.randrange(2)
        for rank in (first, 1 - first):
            assert running.processes[rank].exitcode is None or rank != first, running.said()
            running.processes[rank].kill()
        running.end()
    assert 0 < progress(folder / "checkpoint.pth") < 100
    finish(*flags, folder, world=2, timeout=200)
    assert_same(result(folder), result(tmp_path / "whole"))
