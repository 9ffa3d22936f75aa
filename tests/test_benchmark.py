"""benchmark.py and dino_steps.py: the baseline computes the same as our code, and tables follow from the timings."""

import itertools
import math
import multiprocessing
import os
import re
import subprocess
import warnings
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import FORKS, arguments_of, assert_near, ending, start_forks

import benchmark
import dino_backbones
import dino_cpu
import dino_features
import dino_images
import dino_sample
import dino_steps
import eval_video_segmentation
import main_dino
import utils
from benchmark import Measured, Row

TINY = ("--arch", "vit_nano", "--rounds", "1", "--batch_size_per_gpu", "1", "--device", "cpu")
NANO = {"arch": "vit_nano", "device": "cpu", "use_fp16": False}


class Here:
    """Stands for the process of a row, and works in this one."""

    def __init__(self, workers, context):
        self.kept = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        benchmark.KEPT.clear()
        benchmark.KEPT.update(self.kept)
        future.set_result(function(*args))
        self.kept = dict(benchmark.KEPT)
        return future


@pytest.fixture
def here(monkeypatch):
    """Rows are measured in this process, and matrix products are small."""
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Here)
    monkeypatch.setitem(benchmark.SIDES, "cpu", 8)


@pytest.fixture
def forked(monkeypatch):
    """Processes are forked from one that has imported everything: new ones would take seconds."""
    start_forks()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKS)


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
    plain = dino_steps.plain_loss(student.chunk(5), teacher.chunk(2), loss.center)
    assert_near(plain, loss(student, teacher, 0), 1e-5)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def test_plain_steps_reach_the_weights_of_our_steps():
    args = dino_steps.training_args(**NANO, out_dim=64, drop_path_rate=0.0)
    plain, ours = dino_steps.PlainTraining(args), dino_steps.OurTraining(args)
    start = flat(plain.student.parameters()).clone()
    integers = dino_steps.random_crops(args, 2)
    crops = [utils.normalize(crop) for crop in integers]
    for _ in range(2):
        assert plain.step(crops) == pytest.approx(ours.train(integers, 1)["loss"], rel=1e-5)
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
    args = dino_steps.training_args(**NANO, out_dim=64)
    training = dino_steps.PlainTraining(args)
    loud = lambda seen, taught, center: 1e4 * sum(s.square().sum() for s in seen)  # noqa: E731
    monkeypatch.setattr(dino_steps, "plain_loss", loud)
    training.step([utils.normalize(crop) for crop in dino_steps.random_crops(args, 1)])
    norms = torch.stack([p.grad.norm() for p in training.student.parameters() if p.grad is not None])
    assert norms.max() == pytest.approx(3, rel=1e-4)
    assert (norms > 2.99).sum() > 10


def test_a_plain_loss_that_is_not_finite_ends_the_measurement():
    args = dino_steps.training_args(**NANO, out_dim=64)
    crops = [utils.normalize(crop) * math.nan for crop in dino_steps.random_crops(args, 1)]
    with pytest.raises(utils.UserError, match="the plain loss is nan"):
        dino_steps.PlainTraining(args).step(crops)


def test_plain_crops_have_the_pixels_of_augmentation_pil():
    image = dino_images.load_image(dino_sample.find_photographs(["coffee.png"])[0])
    plain = dino_steps.PlainAugmentation()
    ours = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8, as_uint8=True)
    for seed in range(4):
        utils.fix_random_seeds(seed)
        wanted = plain(image)
        utils.fix_random_seeds(seed)
        for a, b in zip(wanted, ours(image), strict=True):
            torch.testing.assert_close(a, utils.normalize(b))
        assert [tuple(crop.shape) for crop in wanted] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8


def test_crops_of_torchvisions_v2_transforms_are_nearly_the_plain_ones():
    image = dino_images.load_image(dino_sample.find_photographs(["coffee.png"])[0])
    plain, v2 = (make((64, 32), 1) for make in (dino_steps.PlainAugmentation, dino_steps.V2Augmentation))
    assert [tuple(crop.shape) for crop in v2(image)] == [(3, 64, 64)] * 2 + [(3, 32, 32)]
    utils.fix_random_seeds(0)
    means = [torch.stack([crop.mean() for _ in range(100) for crop in make(image)]) for make in (plain, v2)]
    assert means[1].mean().item() == pytest.approx(means[0].mean().item(), abs=0.2)
    assert means[1].std().item() == pytest.approx(means[0].std().item(), rel=0.3)
    # The first crop is always blurred, which halves the differences between neighbors.
    edges = [sum(make(image)[0].diff().abs().mean().item() for _ in range(60)) for make in (plain, v2)]
    assert edges[1] == pytest.approx(edges[0], rel=0.15)


def test_the_plain_classifier_has_the_accuracies_of_ours():
    task = benchmark.knn_task("cpu", 600, 200, 48, 20, [2, 10, 40])
    plain, ours = dino_steps.plain_knn(*task), dino_features.knn_accuracies(*task)
    assert {k: round(top1, 6) for k, (top1, _) in ours.items()} == {k: round(top1, 6) for k, top1 in plain.items()}
    assert 10 < plain[2] < 90
    assert len(set(plain.values())) == 3


def test_the_plain_propagation_has_the_labels_of_ours():
    shape = ("cpu", (14, 17), 8, 3, 3, 5)
    plain = dino_steps.plain_propagation(*benchmark.propagation_task(*shape, plain=True))
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
    args = dino_steps.training_args(**NANO, out_dim=out_dim)
    assert dino_steps.useful_flop(args, batch_size) == batch_size * (teacher + student) + positions


def test_a_plain_epoch_trains_on_whole_batches_and_saves_a_checkpoint(tmp_path, capsys):
    folder, output = benchmark.image_folder(tmp_path, "sample", 5, side=120), tmp_path / "run"
    output.mkdir()
    dino_steps.plain_epoch(folder, output, "vit_nano", "16", "2")
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(65536), rel=0.1)
    assert set(torch.load(output / "checkpoint.pth", weights_only=True)) == {"student", "teacher", "optimizer"}


# ---- one measurement ----


def test_a_measurement_is_the_median_of_the_steps_after_the_warm_up():
    times = [0, 100, 101, 103, 106, 116]

    def work(steps, watch):
        watch.ticks += times[: steps + 1]

    assert benchmark.measure(work, warm_up=1, steps=3).seconds == 2
    assert benchmark.measure(work, warm_up=2, steps=3).seconds == 3
    assert benchmark.measure(work, warm_up=0).seconds == 100


def test_each_call_and_each_step_of_training_is_between_two_ticks():
    calls, watch = [], benchmark.Watch(lambda: len(calls))
    benchmark.repeat(lambda: calls.append(1))(3, watch)
    assert watch.ticks == [0, 1, 2, 3]
    args = dino_steps.training_args(**NANO, out_dim=64, local_crops_number=0, global_crops_size=32, patch_size=16)
    ours = dino_steps.OurTraining(args)
    watch = benchmark.Watch(
        lambda: float(ours.parts.optimizer.state[next(iter(ours.parts.student.parameters()))].get("step", 0))
    )
    ours.train(dino_steps.random_crops(args, 2), 3, watch)
    assert watch.ticks == [0, 1, 2, 3]


def test_host_waits_are_counted_per_step_and_by_place(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    logged = {0, 5}

    def work(steps, watch):
        for step in range(steps):
            watch.tick()
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            if step in logged:
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        watch.tick()

    median, places = benchmark.host_waits(work)
    assert median == 1
    assert sorted(places.values()) == [2, 6]
    assert all(place.startswith("test_benchmark.py:") for place in places)
    assert modes == ["warn", "default"]


# ---- measuring in turn ----


def test_rows_take_turns(here):
    order = []

    def prepare(name):
        order.append(f"prepare {name}")

        def work(steps, watch):
            order.append(name * steps)
            watch.ticks += range(steps + 1)

        return work

    found = benchmark.take_turns({name: partial(prepare, name) for name in "ab"}, 2, warm_up=2, steps=1)
    assert order == ["prepare a", "prepare b", "aaa", "bbb", "aaa", "bbb"]
    assert [len(measured) for measured in found.values()] == [2, 2]


def test_a_table_has_medians_of_round_by_round_ratios(monkeypatch, capsys):
    # The machine was slow in the second round: medians of the times would give 10 / 1 = 10.
    seconds = {"plain": [10, 100, 1], "this": [5, 20, 1], "most": [1, 10, 0.1], "batches": [10, 100, 1]}
    peaks = {"plain": 200.0, "this": 50.0, "most": 1.0, "batches": 100.0}
    found = {name: [Measured(s, peaks[name], 3) for s in seconds[name]] for name in seconds}
    monkeypatch.setattr(benchmark, "take_turns", lambda *_, **how: found)
    units = {"plain": 4, "this": 4, "most": 4, "batches": 12}
    rows = {name: Row(number, "most", None) for name, number in units.items()}
    benchmark.compare("title", "images", rows, 3, ("peak", 2), {"twice": lambda speed: 2 * speed}, waits=True)
    cells = table(capsys.readouterr().out)
    assert cells["plain"] == ["0.4", "10", "0.8", "1.00", "10.0 %", "100", "3"]
    assert cells["this"] == ["0.8", "5", "1.6", "2.00 (1.00-5.00)", "20.0 (10.0-50.0) %", "25", "3"]
    assert cells["most"] == ["4", "1", "8", "10.00", "100.0 %"]
    assert cells["batches"][3] == "3.00"  # three times the images in the same time


def run_out_of_memory():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def out_of_memory_later():
    return benchmark.repeat(run_out_of_memory)


def nothing():
    return benchmark.repeat(int)


@pytest.mark.usefixtures("forked")
def test_a_row_that_the_gpu_has_no_memory_for_says_so_and_the_rest_is_measured(capsys):
    work = {"plain": out_of_memory_later, "this": nothing, "at once": run_out_of_memory}
    rows = {name: Row(1, None, prepare) for name, prepare in work.items()}
    benchmark.compare("title", "images", rows, 2)
    cells = table(capsys.readouterr().out)
    assert cells["plain"] == cells["at once"] == ["out of memory"]
    assert float(cells["this"][0]) > 0
    assert cells["this"][2] == "-"  # / plain


def allocate(number):
    return benchmark.repeat(partial(torch.ones, number))


def test_a_process_reports_its_peak_memory():
    (measured,) = benchmark.take_turns({"one": partial(allocate, 50_000_000)}, 1)["one"]
    assert measured.seconds > 0
    assert 190 < measured.mb < 260  # 200 million bytes are 191 MB


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (partial(os._exit, 1), utils.UserError, "has died. Is there enough memory"),
        (partial(dino_backbones.check_arch, "vit_smal"), utils.UserError, "unknown --arch vit_smal"),
        (partial(open, "/no/such/file"), FileNotFoundError, "/no/such/file"),
    ],
)
def test_a_process_that_fails_ends_the_table(work, error, message):
    with pytest.raises(error, match=message):
        benchmark.take_turns({"one": work}, 1)


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


def test_each_run_has_a_new_folder(runs):
    for _ in range(2):
        log = benchmark.run_python("main_dino.py", "--output_dir", benchmark.OUTPUT)
        assert log == {"train_images_per_s": 7.5}  # of the last epoch
    folders = [words[-1] for words, _ in runs]
    assert folders[0] != folders[1]
    assert not any(os.path.exists(folder) for folder in folders)
    assert runs[0][0][1:3] == ["main_dino.py", "--output_dir"]
    assert runs[0][1]["cwd"] == str(Path(benchmark.__file__).parent)


def test_scaling_measures_the_second_epoch(here, runs, capsys):
    benchmark.scaling(tiny("--threads", 2, "--batch_size_per_gpu", 4, "--processes", 1, 3))
    cells = table(capsys.readouterr().out)
    assert cells["1 processes"] == cells["3 processes"] == ["7.5", "0.133", "1.00"]
    assert runs[0][0][1] == "main_dino.py"
    assert runs[1][0][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    for words, options in runs:
        assert options["env"]["OMP_NUM_THREADS"] == "2"
        args = arguments_of(main_dino, *words[words.index("main_dino.py") + 1 :])
        main_dino.check_args(args)
        assert (args.epochs, args.batch_size_per_gpu, args.num_workers, args.device) == (2, 4, 0, "cpu")


def test_an_epoch_is_a_whole_run(here, runs):
    benchmark.epoch(tiny("--batch_size_per_gpu", 3), number=10)
    words = [list(map(str, words)) for words, _ in runs]
    assert words[0][1] == "-c"
    assert words[0][-3:] == ["vit_nano", "16", "3"]
    assert words[1][1] == "main_dino.py"
    flags = arguments_of(main_dino, *words[1][2:])
    main_dino.check_args(flags)
    assert (flags.num_workers, flags.batch_size_per_gpu, flags.epochs) == (2, 3, 1)


# ---- data and flags ----


def test_images_are_links_to_installed_photographs_or_to_files_in_subfolders(tmp_path):
    files = sorted(Path(benchmark.image_folder(tmp_path, "sample", 30)).rglob("*.jpg"))
    assert len(files) == 30
    assert max(max(dino_images.load_image(path).size) for path in files) == 500
    (tmp_path / "given" / "sub").mkdir(parents=True)
    (tmp_path / "given" / "sub" / "x.JPEG").write_text("x")
    (tmp_path / "given" / "sub" / "x.png").touch()
    files = list(Path(benchmark.image_folder(tmp_path, tmp_path / "given", 2)).rglob("*.jpg"))
    assert [path.read_text() for path in files] == ["x", "x"]


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_missing_is_one_line(monkeypatch, capsys):
    code, line = ending(monkeypatch, capsys, benchmark, "limits", "--device", "cuda")
    assert (code, "--device cuda is not available" in line) == (2, True), line


# ---- tables ----


def test_main_measures_the_named_tables_or_all(monkeypatch):
    called = []
    monkeypatch.setattr(benchmark, "TABLES", {n: lambda args, n=n: called.append(n) for n in ("one", "two", "three")})
    benchmark.main(tiny("--threads", 1, "three", "one"))
    benchmark.main(tiny())
    assert called == ["three", "one", "one", "two", "three"]


def test_crops_without_opencv_have_a_row_less(here, monkeypatch, capsys):
    def missing():
        raise utils.UserError("no OpenCV")

    args = tiny()
    benchmark.crops(args, number=1)
    assert capsys.readouterr().out.count("this, --augmentation fast") == 3
    monkeypatch.setattr(benchmark.dino_crops, "opencv", missing)
    benchmark.crops(args, number=1)
    out = capsys.readouterr().out
    assert "fast" not in out
    sizes = (
        "2 crops of 224 pixels and 8 of 96",
        "2 crops of 32 pixels and 0 of 16",
        "2 crops of 32 pixels and 6 of 16",
    )
    for title, part in zip(sizes, out.split("crops: ")[1:], strict=True):
        assert title in part
        rows = [name for name in table(part) if name != "lightly"]
        assert [name for name in rows if name in ("plain", "torchvision v2", "this, --augmentation pil")] == rows[1:4]


def test_limits_are_rates(here, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda work, **how: Measured(2.0, 0))
    benchmark.limits(tiny(), gigabytes=0.001)
    rows = table(capsys.readouterr().out)
    assert rows["float32 matrix products"][0] == f"{2 * 8**3 / 2e9:.3g}"
    assert rows["memory copied (read and written)"][0] == "0.0005"


def test_evaluations_have_tables(here, capsys):
    benchmark.knn(tiny(), 200, 100, 8, 10, (5, 10))
    assert table(capsys.readouterr().out).keys() >= {"plain", "this"}
    benchmark.propagation(tiny(), h=8, w=9, width=4, frames=2, window=2, topk=3)
    assert table(capsys.readouterr().out)["plain"][2] == "1.00"


def test_100_epochs_of_imagenet_take_hours():
    assert benchmark.imagenet_hours(1_281_167) == pytest.approx(100 / 3600)
    assert benchmark.imagenet_hours(1998) == pytest.approx(17.8, abs=0.05)  # docs/benchmarks.md


def test_a_gpu_measures_every_precision_once_and_compiles_the_largest_batch():
    rows = {size: benchmark.step_rows("cuda", size, [32, 64, 128, 256]) for size in (32, 64, 128, 256)}
    plain = [("plain", "fp16"), ("plain", "bf16"), ("this", "bf16")]
    assert rows[32] == rows[128] == plain
    assert rows[64] == [*plain, ("this", "fp16"), ("this", "tf32"), ("this", "float32")]
    assert rows[256] == [*plain, ("this", "compiled")]
    assert len(benchmark.step_rows("cuda", 8, [8])) == 7
    assert benchmark.step_rows("cpu", 4, [4, 16])[:2] == [("plain", "float32"), ("this", "float32")]


@pytest.mark.parametrize("precision", benchmark.PRECISION_FLAGS)
def test_each_precision_is_one_of_main_dino(precision):
    args = dino_steps.training_args(**benchmark.PRECISION_FLAGS[precision])
    assert args.use_fp16 == (precision != "float32")
    assert args.compile == (precision == "compiled")
    assert precision in ("float32", "compiled") or args.amp_dtype == precision


@pytest.mark.parametrize(
    ("device", "given", "sizes", "one"),
    [("cpu", [], [4, 16], 4), ("cuda", [], [32, 64, 128, 256], 256), ("cuda", [8, 2], [8, 2], 2)],
)
def test_batch_sizes_follow_from_the_device(device, given, sizes, one):
    args = arguments_of(benchmark, *(["--batch_size_per_gpu", *given] if given else []))
    assert benchmark.batch_sizes(args, device) == sizes
    assert benchmark.one_batch_size(args, device) == one


def test_networks_have_tables(here, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "pace", lambda *_: {"warm_up": 0})
    benchmark.step(tiny())
    rows = table(capsys.readouterr().out)
    assert rows["plain float32"][2] == "1.00"
    assert 0.02 < float(rows["this float32"][2].split()[0]) < 50
    benchmark.multicrop(tiny())
    rows = table(capsys.readouterr().out)
    assert len(rows) == 5
    speed, _, hours, _ = map(float, rows["2 x 224 + 10 x 96 pixels"])
    assert hours == pytest.approx(100 * 1_281_167 / speed / 3600, rel=0.01)
    benchmark.inference(tiny())
    assert "vit_nano/16 float32" in table(capsys.readouterr().out)


def test_inference_measures_the_networks_of_table_1(monkeypatch):
    tables = []
    monkeypatch.setattr(benchmark, "compare", lambda title, unit, rows, *_, **how: tables.append(list(rows)))
    monkeypatch.setattr(dino_cpu, "cpu_computes_bf16", lambda: True)
    benchmark.inference(arguments_of(benchmark, "--device", "cpu"))
    names = ["vit_small/16", "vit_small/8", "vit_base/16", "vit_base/8", "resnet50"]
    assert tables == [[f"{name} {precision}" for name in names for precision in ("float32", "bf16")]]


@pytest.mark.slow
def test_a_real_process_has_a_table(sample_root, capsys):
    benchmark.main(arguments_of(benchmark, *TINY, "--processes", 1, "--", "scaling"))
    assert table(capsys.readouterr().out)["1 processes"][2] == "1.00"
