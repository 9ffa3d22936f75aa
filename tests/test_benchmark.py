"""benchmark.py: the baseline computes the same as the code it is compared with, and tables follow from the timings."""

import functools
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import FORKS, arguments_of, assert_near, ending, start_forks

import benchmark
import dino_backbones
import dino_data
import dino_features
import dino_images
import eval_video_segmentation
import main_dino
import utils

TINY = ("--arch", "vit_nano", "--rounds", "1", "--batch_size_per_gpu", "1")


class Here:
    """A Worker in this process. It skips the matrix products of the limits, which take seconds."""

    def __init__(self, prepare, *args):
        self.work = (lambda: None) if prepare is benchmark.matrix_product else prepare(*args)

    def receive(self):
        pass

    def run(self, warm_up=0):
        began = time.perf_counter()
        self.work()
        return time.perf_counter() - began, 7.0

    def end(self):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(benchmark, "Worker", Here)


@pytest.fixture
def forked(monkeypatch):
    """Workers are forked from a process that has imported everything: new ones would take seconds."""
    start_forks()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKS)


@pytest.fixture
def photographs(tmp_path):
    return benchmark.photographs("sample", tmp_path, side=120)


@pytest.fixture
def runs(monkeypatch):
    """Replaces processes of Python: each writes a log of two epochs. A list of (command line, options)."""
    commands = []

    def run(words, **options):
        commands.append((words, options))
        for flag, value in itertools.pairwise(words):
            if flag == "--output_dir":
                Path(value, "log.txt").write_text('{"train_images_per_s": 2.0}\n{"train_images_per_s": 7.5}\n')
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def tiny(*flags):
    return arguments_of(benchmark, *TINY, *flags)


def table(text):
    """{first cell: other cells} of printed rows; cells are at least two spaces apart."""
    rows = [re.split(r" {2,}", line.strip()) for line in text.splitlines() if "  " in line]
    return {row[0]: row[1:] for row in rows}


# ---- the baseline ----


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_the_plain_loss_is_the_loss(center):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n * 3, 20, generator=generator) for n in (5, 2))
    loss = main_dino.DINOLoss(20, 5, 0.04, 0.04, 0, 1)
    loss.center.copy_(center * torch.randn(1, 20, generator=generator))
    plain = benchmark.plain_loss(student.chunk(5), teacher.chunk(2), loss.center)
    assert_near(plain, loss(student, teacher, 0), 1e-5)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def test_plain_steps_reach_the_weights_of_our_steps():
    shape, out_dim = ("vit_nano", 16), 64
    plain = benchmark.PlainTraining(*shape, out_dim=out_dim, drop_path_rate=0.0)
    ours = benchmark.OurTraining(*shape, 2, None, out_dim, 8, 0.0)
    start = flat(plain.student.parameters()).clone()
    crops = [utils.normalize(crop) for crop in benchmark.random_crops(2)]
    for _ in range(2):
        assert plain.step(crops) == pytest.approx(ours.step()["loss"], rel=1e-5)
    assert_near(plain.center, ours.parts.dino_loss.center, 1e-4)
    decay = [[group["weight_decay"] for group in net.param_groups] for net in (plain.optimizer, ours.parts.optimizer)]
    assert decay == [[0.04, 0.0]] * 2
    moved = [flat(net.parameters()) - start for net in (plain.student, ours.parts.student)]
    assert_near(*moved, 0.05)  # AdamW moves by the signs of the smallest gradients too
    assert moved[0].norm() > 0
    for name, parameter in plain.student.named_parameters():
        if parameter.requires_grad and "qkv.bias" not in name:  # the gradient of the keys' biases is 0
            assert_near(parameter.grad, ours.parts.student.get_parameter(name).grad, 1e-3, name)
    followed = [flat(net.parameters()) - start for net in (plain.teacher, ours.parts.teacher)]
    assert_near(*followed, 0.05)
    assert followed[0].norm() < 0.02 * moved[0].norm()  # momentum 0.996


def test_a_plain_step_clips_each_gradient_to_a_norm_of_3(monkeypatch):
    training = benchmark.PlainTraining("vit_nano", 16, out_dim=64)
    monkeypatch.setattr(benchmark, "plain_loss", lambda seen, taught, center: 1e4 * sum(s.square().sum() for s in seen))
    training.step([utils.normalize(crop) for crop in benchmark.random_crops(1)])
    norms = torch.stack([p.grad.norm() for p in training.student.parameters() if p.grad is not None])
    assert norms.max() == pytest.approx(3, rel=1e-4)
    assert (norms > 2.99).sum() > 10


def test_plain_crops_have_the_pixels_of_augmentation_pil():
    image = dino_images.load_image(dino_data.find_photographs(["coffee.png"])[0])
    plain, ours = benchmark.PlainAugmentation(), benchmark.our_augmentation("pil")
    for seed in range(4):
        utils.fix_random_seeds(seed)
        wanted = plain(image)
        utils.fix_random_seeds(seed)
        for a, b in zip(wanted, ours(image), strict=True):
            torch.testing.assert_close(a, utils.normalize(b))


def test_the_plain_classifier_has_the_accuracies_of_ours():
    task = benchmark.knn_task(600, 200, 48, 20, [2, 10, 40])
    plain, ours = benchmark.plain_knn(*task), dino_features.knn_accuracies(*task)
    assert {k: round(top1, 6) for k, (top1, _) in ours.items()} == {k: round(top1, 6) for k, top1 in plain.items()}
    assert 10 < plain[2] < 90
    assert len(set(plain.values())) == 3


def test_the_plain_propagation_has_the_labels_of_ours():
    shape = (14, 17, 8, 3, 3, 5)
    plain = benchmark.plain_propagation(*benchmark.plain_propagation_task(*shape))
    ours = eval_video_segmentation.propagate(*benchmark.propagation_task(*shape))
    assert_near(plain.view(14, 17, 4), ours, 1e-5)


def test_useful_operations_agree_with_a_count_by_hand():
    width, out_dim, batch_size = 128, 64, 3

    def blocks(patches):
        n = patches + 1
        whole = 2 * n * width * 12 * width + 4 * n * n * width  # qkv, proj and MLP; two products of attention
        last = 2 * n * width * 2 * width + 2 * width * 10 * width + 4 * n * width  # keys, values; the rest for CLS
        return 3 * whole + last

    embedding = {patches: 2 * patches * 3 * 16 * 16 * width for patches in (196, 36)}
    head = 2 * (width * 2048 + 2048 * 2048 + 2048 * 256 + 256 * out_dim)
    teacher = 2 * (blocks(196) + embedding[196] + head)
    student = 3 * (2 * blocks(196) + 8 * blocks(36) + 10 * head)
    student += 2 * (2 * embedding[196] + 8 * embedding[36])  # pixels need no gradient
    positions = 2 * 2 * (6 * 14 * 14 * width + 6 * 14 * 6 * width)  # forward and backward, once per step
    assert benchmark.useful_flop("vit_nano", 16, batch_size, out_dim) == batch_size * (teacher + student) + positions


def test_every_augmentation_makes_two_large_and_eight_small_crops(photographs):
    for kind, make in benchmark.AUGMENTATIONS.items():
        needed = {"lightly": "lightly", "this, --augmentation fast": "cv2"}.get(kind)
        if kind == "decoding alone" or (needed and not benchmark.installed(needed, kind)):
            continue
        crops = make()(dino_images.open_image(photographs[0]))
        assert [tuple(crop.shape) for crop in crops] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8, kind


def test_a_plain_epoch_trains_on_whole_batches_and_saves_a_checkpoint(photographs, tmp_path, capsys):
    folder, output = benchmark.image_folder(tmp_path, photographs, 5), tmp_path / "run"
    output.mkdir()
    benchmark.plain_epoch(folder, output, "vit_nano", "16", "2")
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(65536), rel=0.1)
    assert set(torch.load(output / "checkpoint.pth", weights_only=True)) == {"student", "teacher", "optimizer"}


# ---- measuring in turn ----


def test_workers_take_turns_and_warm_up_first(monkeypatch):
    order = []

    class Fake(Here):
        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def run(self, warm_up):
            order.append(warm_up * "-" + self.name)
            return next(self.seconds), len(order)

        def end(self):
            order.append(f"end {self.name}")

    monkeypatch.setattr(benchmark, "Worker", Fake)
    works = {"a": ("a", [1, 2]), "b": ("b", [3, 4])}
    assert benchmark.take_turns(works, 2, warm_up=2, again=1) == ({"a": [1, 2], "b": [3, 4]}, {"a": 3, "b": 4})
    assert order == ["--a", "--b", "-a", "-b", "end a", "end b"]


def test_a_table_has_medians_of_round_by_round_ratios(monkeypatch, capsys):
    # The machine was slow in the second round: medians of the times would give 10 / 1 = 10.
    seconds = {"plain": [10, 100, 1], "this": [5, 20, 1], "most": [1, 10, 0.1], "batches": [10, 100, 1]}
    peaks = {"plain": 200.0, "this": 50.0, "most": 1.0, "batches": 100.0}
    monkeypatch.setattr(benchmark, "take_turns", lambda *_: (seconds, peaks))
    units = {"plain": 4, "this": 4, "most": 4, "batches": 12}
    rows = {name: benchmark.Row(number, "most", None) for name, number in units.items()}
    benchmark.compare("title", "images", rows, 3, memory=True)
    cells = table(capsys.readouterr().out)
    assert cells["plain"] == ["0.4", "10", "1.00", "10 %", "200", "1"]
    assert cells["this"] == ["0.8", "5", "2.00 (1.00-5.00)", "20 %", "50", "0.25"]
    assert cells["most"] == ["4", "1", "10.00", "100 %"]
    assert cells["batches"][2] == "3.00"  # three times the images in the same time


def test_a_worker_is_a_process_that_reports_its_peak_memory():
    worker = benchmark.Worker(functools.partial, torch.ones, 50_000_000)
    worker.receive()
    seconds, peak = worker.run(warm_up=2)
    worker.end()
    assert seconds > 0
    assert 190 < peak < 260  # 200 million bytes are 191 MB
    assert worker.process.exitcode is not None


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("work", "message"),
    [
        ((os._exit, 1), "has died"),
        ((dino_backbones.check_arch, "vit_smal"), "unknown --arch vit_smal"),
        ((open, "/no/such\nfile"), "has failed: FileNotFoundError: "),
    ],
)
def test_a_worker_that_fails_is_one_line(work, message):
    with pytest.raises(utils.UserError, match=message) as failure:
        benchmark.take_turns({"one": work}, 1)
    assert "\n" not in str(failure.value)


# ---- whole processes ----


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('error: no room\\nmore')", r"^a measured run has failed: no room$"),
        ("raise ValueError(3)", r"failed: ValueError: 3$"),
        ("import os; os._exit(7)", r"failed: exit code 7$"),
    ],
)
def test_a_run_that_fails_is_one_line(code, message):
    with pytest.raises(utils.UserError, match=message):
        benchmark.run_python("-c", code)


def test_each_whole_run_has_a_new_folder(runs):
    work = benchmark.whole_runs("main_dino.py", "--output_dir", benchmark.OUTPUT)
    work()
    work()
    folders = [words[-1] for words, _ in runs]
    assert folders[0] != folders[1]
    assert not any(os.path.exists(folder) for folder in folders)
    assert runs[0][0][1:3] == ["main_dino.py", "--output_dir"]
    assert runs[0][1]["cwd"] == str(Path(benchmark.__file__).parent)


def test_scaling_measures_the_second_epoch(runs, tmp_path):
    assert benchmark.images_per_second(3, tmp_path, "vit_nano", 4, tiny("--threads", 2)) == 7.5
    assert benchmark.images_per_second(1, tmp_path, "vit_nano", 4, tiny()) == 7.5
    assert runs[0][0][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    assert [options["env"]["OMP_NUM_THREADS"] for _, options in runs] == ["2", "1"]
    assert runs[1][0][1] == "main_dino.py"
    for words, _ in runs:
        args = arguments_of(main_dino, *words[words.index("main_dino.py") + 1 :])
        main_dino.check_args(args)
        assert (args.epochs, args.batch_size_per_gpu, args.num_workers) == (2, 4, 0)


# ---- data and flags ----


def test_photographs_are_found_in_subfolders_or_made_from_installed_ones(tmp_path):
    made = benchmark.photographs("sample", tmp_path)
    assert {Path(path).suffix for path in made} == {".jpg"}
    assert max(max(dino_images.load_image(path).size) for path in made) == 500
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.JPEG").touch()
    (tmp_path / "sub" / "x.png").touch()
    assert benchmark.photographs(tmp_path / "sub", None) == [str(tmp_path / "sub" / "x.JPEG")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["stepp"], "no table 'stepp'; did you mean step? (all: limits, crops"),
        (["--rounds", 100], "--rounds: 100 must be between 1 and 99"),
        (["crops", "--data_path", "."], "has no JPEG files"),
    ],
)
def test_a_wrong_flag_is_one_line(monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    code, line = ending(monkeypatch, capsys, benchmark, *flags)
    assert (code, message in line) == (2, True), line


# ---- tables ----


def test_main_measures_the_named_tables_or_all(monkeypatch):
    called = []
    monkeypatch.setattr(benchmark, "TABLES", {n: lambda args, n=n: called.append(n) for n in ("one", "two", "three")})
    benchmark.main(tiny("--threads", 1, "three", "one"))
    benchmark.main(tiny())
    assert called == ["three", "one", "one", "two", "three"]


def test_crops_without_opencv_and_lightly_have_two_rows_less(here, monkeypatch, photographs, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    args = tiny()
    args.photographs = photographs
    benchmark.crops(args, number=1)
    text = capsys.readouterr().out
    assert "(without --augmentation fast: cv2 is not installed)" in text
    rows = table(text)
    assert rows.keys() >= {"torchvision v2, uint8", "decoding alone"}
    assert not rows.keys() & {"lightly", "this, --augmentation fast"}
    assert rows["plain"] == [str(4 * 3 * (2 * 224**2 + 8 * 96**2)), "1"]  # of the second table
    assert rows["this"] == [str(3 * (2 * 224**2 + 8 * 96**2)), "0.25"]


def test_limits_are_rates(monkeypatch, capsys):
    times = {"GFLOP/s, fp32 matrix products": [2.0], "GB/s copied (read and written)": [0.5]}
    monkeypatch.setattr(benchmark, "take_turns", lambda *_: (times, {}))
    benchmark.limits(tiny(), side=1000, gigabytes=3)
    rows = table(capsys.readouterr().out)
    assert rows == {"GFLOP/s, fp32 matrix products": ["1"], "GB/s copied (read and written)": ["6"]}
    assert torch.equal(benchmark.memory_copy(1e-6)(), torch.ones(250))
    assert benchmark.matrix_product(torch.float32, 8)().shape == (8, 8)


def test_evaluations_have_tables(here, capsys):
    benchmark.knn(tiny(), 200, 100, 8, 10, (5, 10))
    assert table(capsys.readouterr().out).keys() >= {"plain", "this", "matrix products"}
    benchmark.propagation(tiny(), h=8, w=9, width=4, frames=2, window=2, topk=3)
    assert table(capsys.readouterr().out)["plain"][2] == "1.00"


def test_an_epoch_is_a_whole_run(here, runs, photographs):
    args = tiny("--batch_size_per_gpu", 3)
    args.photographs = photographs
    benchmark.epoch(args, number=10)
    words = [list(map(str, words)) for words, _ in runs]
    assert words[0][1] == "-c"
    assert words[0][-3:] == ["vit_nano", "16", "3"]
    assert words[1][1] == "main_dino.py"
    flags = arguments_of(main_dino, *words[1][2:])
    main_dino.check_args(flags)
    assert (flags.num_workers, flags.batch_size_per_gpu, flags.epochs) == (2, 3, 1)


@pytest.mark.slow
def test_steps_have_a_table(here, capsys):
    benchmark.step(tiny())
    rows = table(capsys.readouterr().out)
    assert rows["plain fp32"][2] == "1.00"
    assert 0.2 < float(rows["this fp32"][2].split()[0]) < 20


@pytest.mark.slow
def test_a_real_process_has_a_table(sample_root, capsys):
    benchmark.main(arguments_of(benchmark, *TINY, "--processes", 1, "--", "scaling"))
    assert table(capsys.readouterr().out)["1"][1:] == ["1.00", "100 %"]


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (None, None),
        (benchmark.UserError("no such network"), "no such network"),
        (ValueError("a bug"), "a measured process has failed: ValueError: a bug"),
    ],
)
def test_a_measured_process_answers_until_the_benchmark_ends(error, answer):
    calls = []

    def prepare():
        if error:
            raise error
        return lambda: calls.append(1)

    ours, theirs = multiprocessing.Pipe()
    process = threading.Thread(target=benchmark.serve, args=(theirs, prepare, ()))
    process.start()
    assert ours.recv() == answer
    if not error:
        ours.send(2)
        seconds, megabytes = ours.recv()
        assert seconds >= 0
        assert megabytes >= 0
        assert len(calls) == 3  # two warm-up calls, one that is measured
    ours.close()
    process.join(10)
    assert not process.is_alive()
