"""benchmark.py: the baseline computes what the code it is held against does, and tables follow from what was timed."""

import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import FORKS, arguments_of, assert_near, ending, run_script, start_forks

import benchmark
import dino_backbones
import dino_data
import dino_images
import eval_knn
import eval_video_segmentation
import main_dino
import utils

TINY = ("--arch", "vit_nano", "--rounds", "1", "--batch_size_per_gpu", "1")

# Step i took i + 1 seconds: 21 seconds in all, one of them in the first step.
PROGRESS = """Epoch: [0/1]  [0/6]  eta: 0:00:00  loss: 4.1  time: 1.000000  data: 0.000000  max mem: 300
Epoch: [0/1]  [5/6]  eta: 0:00:00  loss: 4.0  time: 3.500000  data: 0.000000  max mem: 300
Averaged stats: loss: 4.0
"""


class Here:
    """Stands in for a Contender: works in this process; of the limit, which takes seconds, there is nothing to do."""

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
    monkeypatch.setattr(benchmark, "Contender", Here)


@pytest.fixture
def forked(monkeypatch):
    """Contenders in processes that are forked from a warm one: new ones take seconds to import what they need."""
    start_forks()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKS)


@pytest.fixture
def photographs(tmp_path):
    return benchmark.photographs("sample", tmp_path, side=120)


@pytest.fixture
def runs(monkeypatch):
    """Stands in for processes of Python: each prints PROGRESS; gives their command lines."""
    commands = []

    def run(words, **options):
        commands.append((words, options))
        return subprocess.CompletedProcess(words, 0, PROGRESS, "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def tiny(*flags):
    return arguments_of(benchmark, *TINY, *flags)


def table(text):
    """{first cell: other cells} of what print_rows printed; cells are two spaces apart."""
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


def test_plain_steps_end_at_the_weights_of_the_training_codes_steps():
    shape, out_dim = ("vit_nano", 16), 64
    plain = benchmark.PlainTraining(*shape, out_dim=out_dim, drop_path_rate=0.0)
    ours = benchmark.OurTraining(*shape, 2, None, out_dim, 8, 0.0)
    before = [p.detach().clone() for p in plain.student.parameters()]
    crops = [utils.normalize(crop) for crop in benchmark.some_crops(2)]
    for _ in range(2):
        assert plain.step(crops) == pytest.approx(ours.step()["loss"], rel=1e-5)
    assert_near(plain.center, ours.loss.center, 1e-4)
    decay = [[group["weight_decay"] for group in net.optimizer.param_groups] for net in (plain, ours)]
    assert decay == [[0.04, 0.0]] * 2

    def flat(tensors):
        return torch.cat([t.detach().flatten() for t in tensors])

    weights, start = [flat(net.parameters()) for net in (plain.student, ours.student)], flat(before)
    assert_near(weights[0] - start, weights[1] - start, 0.05)  # AdamW moves by the signs of the smallest gradients too
    assert (weights[0] - start).norm() > 0
    for name, parameter in plain.student.named_parameters():
        if parameter.requires_grad and "qkv.bias" not in name:  # keys' biases have a gradient of 0
            assert_near(parameter.grad, ours.student.get_parameter(name).grad, 1e-3, name)
    taught = [flat(net.parameters()) - start for net in (plain.teacher, ours.teacher)]
    assert_near(*taught, 0.05)
    assert taught[0].norm() < 0.02 * (weights[0] - start).norm()  # momentum 0.996


def test_a_plain_step_clips_each_gradient_to_a_norm_of_3(monkeypatch):
    training = benchmark.PlainTraining("vit_nano", 16, out_dim=64)
    monkeypatch.setattr(benchmark, "plain_loss", lambda seen, taught, center: 1e4 * sum(s.square().sum() for s in seen))
    training.step([utils.normalize(crop) for crop in benchmark.some_crops(1)])
    norms = torch.stack([p.grad.norm() for p in training.student.parameters() if p.grad is not None])
    assert norms.max() == pytest.approx(3, rel=1e-4)
    assert (norms > 2.99).sum() > 10


def test_plain_crops_are_the_pixels_of_augmentation_pil():
    image = dino_images.load_image(dino_data.find_photographs(["coffee.png"])[0])
    plain, ours = benchmark.PlainAugmentation(), benchmark.our_augmentation("pil")
    for seed in range(4):
        utils.fix_random_seeds(seed)
        wanted = plain(image)
        utils.fix_random_seeds(seed)
        for a, b in zip(wanted, ours(image), strict=True):
            torch.testing.assert_close(a, utils.normalize(b))


def test_plain_neighbors_give_the_same_predictions():
    task = benchmark.knn_task(600, 200, 48, 20, [2, 10, 40])
    plain, ours = benchmark.plain_knn(*task), eval_knn.knn_accuracies(*task)
    assert {k: round(top1, 6) for k, (top1, _) in ours.items()} == {k: round(top1, 6) for k, top1 in plain.items()}
    assert 10 < plain[2] < 90
    assert len(set(plain.values())) == 3


def test_plain_propagation_gives_the_same_labels():
    shape = (14, 17, 8, 3, 3, 5)
    plain = benchmark.plain_propagation(*benchmark.plain_propagation_task(*shape))
    ours = eval_video_segmentation.propagate(*benchmark.propagation_task(*shape))
    assert_near(plain.view(14, 17, 4), ours, 1e-5)


def test_useful_operations_are_those_counted_by_hand():
    width, out_dim, batch_size = 128, 64, 3

    def blocks(patches):
        n = patches + 1
        whole = 2 * n * width * 12 * width + 4 * n * n * width  # qkv, proj and MLP; two products of attention
        last = 2 * n * width * 2 * width + 2 * width * 10 * width + 4 * n * width  # keys and values of all, CLS's rest
        return 3 * whole + last

    embedding = {patches: 2 * patches * 3 * 16 * 16 * width for patches in (196, 36)}
    head = 2 * (width * 2048 + 2048 * 2048 + 2048 * 256 + 256 * out_dim)
    teacher = 2 * (blocks(196) + embedding[196] + head)
    student = 3 * (2 * blocks(196) + 8 * blocks(36) + 10 * head)
    student += 2 * (2 * embedding[196] + 8 * embedding[36])  # pixels need no gradient
    assert benchmark.useful_flop("vit_nano", 16, batch_size, out_dim) == batch_size * (teacher + student)


def test_every_augmentation_gives_two_large_and_eight_small_crops(photographs):
    for kind, make in benchmark.AUGMENTATIONS.items():
        needed = {"lightly": "lightly", "this, --augmentation fast": "cv2"}.get(kind)
        if kind == "decoding alone" or (needed and not benchmark.importlib.util.find_spec(needed)):
            continue
        crops = make()(dino_images.open_image(photographs[0]))
        assert [tuple(crop.shape) for crop in crops] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8, kind


def test_a_plain_epoch_trains_on_all_whole_batches_and_leaves_a_checkpoint(photographs, tmp_path, capsys):
    folder, output = benchmark.image_folder(tmp_path, photographs, 5), tmp_path / "run"
    output.mkdir()
    benchmark.plain_epoch(folder, output, "vit_nano", "16", "2")
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(65536), rel=0.1)
    assert set(torch.load(output / "checkpoint.pth")) == {"student", "teacher", "optimizer"}


def test_lightlys_step_trains():
    pytest.importorskip("lightly")
    work = benchmark.lightly_step("vit_tiny", 16, 1, None)
    assert work() is None
    assert benchmark.has_lightly("vit_tiny", 16)
    assert not benchmark.has_lightly("vit_nano", 16)


# ---- taking turns ----


def test_contenders_take_turns_and_each_warms_up_first(monkeypatch):
    order = []

    class Fake(Here):
        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def run(self, warm_up):
            order.append(warm_up * "-" + self.name)
            return next(self.seconds), len(order)

        def end(self):
            order.append(f"end {self.name}")

    monkeypatch.setattr(benchmark, "Contender", Fake)
    contenders = {"a": ("a", [1, 2]), "b": ("b", [3, 4])}
    assert benchmark.take_turns(contenders, 2, warm_up=2, again=1) == ({"a": [1, 2], "b": [3, 4]}, {"a": 3, "b": 4})
    assert order == ["--a", "--b", "-a", "-b", "end a", "end b"]
    order.clear()
    benchmark.take_turns(contenders, 1, warm_up=0)
    assert order == ["a", "b", "end a", "end b"]


def test_a_table_has_medians_of_the_ratios_of_neighbors(monkeypatch, capsys):
    # The machine was slow in the second round: medians of the times would say 10 / 1 = 10.
    seconds = {"plain": [10, 100, 1], "this": [5, 20, 1], "most": [1, 10, 0.1]}
    monkeypatch.setattr(benchmark, "take_turns", lambda *_: (seconds, {"plain": 200.0, "this": 50.0, "most": 1.0}))
    pieces = {name: benchmark.Piece(units, "most", None) for name, units in (("plain", 4), ("this", 4), ("most", 4))}
    benchmark.compare("title", "images", pieces, 3, memory=True)
    rows = table(capsys.readouterr().out)
    assert rows["plain"] == ["0.4", "10", "1.00", "10 %", "200", "1"]
    assert rows["this"] == ["0.8", "5", "2.00 (1.00-5.00)", "20 %", "50", "0.25"]
    assert rows["most"] == ["4", "1", "10.00", "100 %"]


def test_a_piece_counts_by_its_units(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "take_turns", lambda *_: ({"plain": [2.0], "this": [2.0]}, {}))
    pieces = {"plain": benchmark.Piece(4, None, None), "this": benchmark.Piece(12, None, None)}
    benchmark.compare("title", "images", pieces, 1)
    assert table(capsys.readouterr().out)["this"] == ["6", "2", "3.00"]


def test_a_contender_works_in_a_process_of_its_own_and_tells_its_peak_of_memory():
    contender = benchmark.Contender(functools.partial, torch.ones, 50_000_000)
    contender.receive()
    seconds, peak = contender.run()
    contender.end()
    assert seconds > 0
    assert 190 < peak < 260  # 200 million bytes are 191 MB
    assert contender.process.exitcode is not None


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("contender", "says"),
    [
        ((os._exit, 1), "has died"),
        ((dino_backbones.check_arch, "vit_smal"), "unknown --arch vit_smal"),
        ((open, "/no/such\nfile"), "failed: FileNotFoundError: "),
    ],
)
def test_a_contender_that_fails_is_one_line(contender, says):
    with pytest.raises(utils.UserError, match=says) as failure:
        benchmark.take_turns({"one": contender}, 1)
    assert "\n" not in str(failure.value)


def test_contend_sends_what_a_benchmark_asks_for():
    class Pipe:
        def __init__(self):
            self.sent, self.asked = [], iter([0, 2])

        def send(self, answer):
            self.sent.append(answer)

        def recv(self):
            for warm_up in self.asked:
                return warm_up
            raise EOFError

    pipe, done = Pipe(), itertools.count()
    benchmark.contend(pipe, lambda start: lambda: next(start), (done,))
    assert next(done) == 1 + 2 + 1
    assert len(pipe.sent) == 3
    assert pipe.sent[0] is None
    assert all(seconds >= 0 and mb >= 0 for seconds, mb in pipe.sent[1:])
    for error, line in (
        (utils.UserError("no room"), "no room"),
        (ValueError("a\nb"), "measured failed: ValueError: a b"),
    ):
        benchmark.contend(pipe, lambda e: (_ for _ in ()).throw(e), (error,))
        assert pipe.sent[-1].endswith(line)


def test_numbers_have_three_digits_and_columns_are_flush(capsys):
    benchmark.print_rows([["", "a", "long"], ["name", 1234.5, 0.012345], ["n", 99.99, "x"]])
    assert capsys.readouterr().out == "      a    long\nname  1234  0.0123\nn      100       x\n".replace(
        "      a  ", "         a  "
    )


# ---- processes from start to end ----


def test_a_failing_run_is_one_line():
    with pytest.raises(utils.UserError, match=r"^a run to be measured failed: no room$"):
        benchmark.run_python("-c", "import sys; sys.exit('error: no room\\nmore')")
    with pytest.raises(utils.UserError, match=r"failed: ValueError: 3$"):
        benchmark.run_python("-c", "raise ValueError(3)")
    with pytest.raises(utils.UserError, match=r"failed: it ended with 7$"):
        benchmark.run_python("-c", "import os; os._exit(7)")


def test_threads_and_folder_of_a_run():
    said = benchmark.run_python("-c", "import os; print(os.environ['OMP_NUM_THREADS'], os.getcwd())", threads=3)
    assert said.split() == ["3", str(Path(benchmark.__file__).parent)]


def test_each_whole_run_has_a_new_folder(runs):
    work = benchmark.whole_runs("main_dino.py", "--output_dir", benchmark.OUTPUT)
    work()
    work()
    folders = [words[-1] for words, _ in runs]
    assert folders[0] != folders[1]
    assert not any(os.path.exists(folder) for folder in folders)
    assert runs[0][0][1:3] == ["main_dino.py", "--output_dir"]


def test_the_first_step_of_a_scaling_run_does_not_count(runs, tmp_path):
    rate = benchmark.images_a_second(3, tmp_path, "vit_nano", 4, tiny("--threads", 2))
    assert rate == pytest.approx(3 * 4 * 5 / 20)
    assert runs[0][0][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    assert runs[0][1]["env"]["OMP_NUM_THREADS"] == "2"
    benchmark.images_a_second(1, tmp_path, "vit_nano", 4, tiny())
    assert runs[1][0][1] == "main_dino.py"


def test_scaling_runs_take_turns_and_ratios_are_between_neighbors(monkeypatch, photographs, capsys):
    rates, order = iter([10, 18, 1, 1.9, 100, 190]), []  # the machine was slow in the second round
    monkeypatch.setattr(benchmark, "images_a_second", lambda n, folder, *_: order.append((n, folder)) or next(rates))
    args = tiny("--rounds", 3, "--processes", 2, 4)
    args.photographs = photographs
    benchmark.scaling(args, steps=5)
    assert [number for number, _ in order] == [2, 4] * 3
    rows = table(capsys.readouterr().out)
    assert rows["2"] == ["10", "1.00", "100 %"]
    assert rows["4"] == ["18", "1.90 (1.80-1.90)", "95 %"]


def test_a_run_without_progress_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "run_python", lambda *_, **__: "")
    with pytest.raises(utils.UserError, match="2 processes says nothing"):
        benchmark.images_a_second(2, tmp_path, "vit_nano", 4, tiny())


# ---- data and flags ----


def test_a_folder_of_so_many_links_goes_over_the_photographs_again_and_again(photographs, tmp_path):
    folder = benchmark.image_folder(tmp_path, photographs, 40)
    links = [os.readlink(path) for path in sorted(Path(folder).glob("*/*"))]
    assert links == (photographs * 3)[:40]


def test_photographs_are_found_in_subfolders_or_made_from_installed_ones(tmp_path):
    made = benchmark.photographs("sample", tmp_path)
    assert {Path(path).suffix for path in made} == {".jpg"}
    assert max(max(dino_images.load_image(path).size) for path in made) == 500
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.JPEG").touch()
    (tmp_path / "sub" / "x.png").touch()
    assert benchmark.photographs(tmp_path / "sub", None) == [str(tmp_path / "sub" / "x.JPEG")]


def test_an_index_counts_every_file(tmp_path):
    benchmark.empty_files(tmp_path, 25, folders=3)
    dataset = benchmark.index_of(str(tmp_path))()
    assert dataset is None  # what the timed work returns is not looked at
    assert sorted(len(os.listdir(tmp_path / name)) for name in os.listdir(tmp_path)) == [8, 8, 9]


def test_bad_flags_are_one_line(monkeypatch, capsys, tmp_path):
    def line(*flags):
        code, said = ending(monkeypatch, capsys, benchmark, *flags)
        assert code == 2
        return said

    assert "no table 'stepp'; did you mean step, startup? All there are: limits, crops" in line("stepp")
    assert "no table 'x'. All" in line("x")
    assert line("--processes", 0).startswith("error: --processes 0 must be")
    assert "--rounds 100 must be between 1 and 99" in line("--rounds", 100)
    assert "unknown --arch nano" in line("--arch", "nano")
    assert f"--data_path {tmp_path} has no JPEG files" in line("crops", "--data_path", tmp_path)


def test_what_is_not_installed_is_said(capsys):
    assert benchmark.installed("torch", "torch")
    assert not benchmark.installed("no_such_module", "a row")
    assert capsys.readouterr().out == "\n(without a row: no_such_module is not installed)\n"


def test_precisions_are_those_of_the_hardware(monkeypatch):
    monkeypatch.setattr(utils, "cpu_computes_bf16", lambda: False)
    assert benchmark.precisions() == {"fp32": (None, torch.float32)}
    monkeypatch.setattr(utils, "cpu_computes_bf16", lambda: True)
    assert benchmark.precisions()["bf16"] == (torch.bfloat16, torch.bfloat16)


# ---- tables ----


def test_main_runs_the_tables_that_are_named(monkeypatch):
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
    assert rows["plain"] == [str(4 * 3 * (2 * 224**2 + 8 * 96**2)), "1"]  # the second table's
    assert rows["this"] == [str(3 * (2 * 224**2 + 8 * 96**2)), "0.25"]


def test_limits_are_rates(monkeypatch, capsys):
    times = {"GFLOP/s, fp32 matrix products": [2.0], "GB/s copied (read, and written)": [0.5]}
    monkeypatch.setattr(benchmark, "take_turns", lambda *_: (times, {}))
    benchmark.limits(tiny(), side=1000, gigabytes=3)
    rows = table(capsys.readouterr().out)
    assert rows == {"GFLOP/s, fp32 matrix products": ["1"], "GB/s copied (read, and written)": ["6"]}
    assert torch.equal(benchmark.memory_copy(1e-6)(), torch.ones(250))
    assert benchmark.matrix_product(torch.float32, 8)().shape == (8, 8)


def test_evaluations_make_tables(here, capsys):
    benchmark.knn(tiny(), 200, 100, 8, 10, (5, 10))
    assert table(capsys.readouterr().out).keys() >= {"plain", "this", "matrix products"}
    benchmark.propagation(tiny(), h=8, w=9, width=4, frames=2, window=2, topk=3)
    rows = table(capsys.readouterr().out)
    assert rows["plain"][2] == "1.00"


def test_an_epoch_and_the_startup_are_whole_runs(here, runs, photographs, capsys):
    args = tiny("--batch_size_per_gpu", 3)
    args.photographs = photographs
    benchmark.epoch(args, number=10)
    words = [list(map(str, words)) for words, _ in runs]
    assert words[0][1] == "-c"
    assert words[0][-3:] == ["vit_nano", "16", "3"]
    assert words[1][1] == "main_dino.py"
    flags = dict(zip(words[1][2::2], words[1][3::2], strict=True))
    assert (flags["--num_workers"], flags["--batch_size_per_gpu"], flags["--epochs"]) == ("2", "3", "1")
    main_dino.check_args(arguments_of(main_dino, *words[1][2:]))
    runs.clear()
    benchmark.startup(args)
    assert [words[1:] for words, _ in runs[:3]] == [
        ["-c", "import torch, torchvision"], ["-c", "import main_dino"], ["main_dino.py", "--help"],
    ]  # fmt: skip
    assert "/ plain: import torch, torchvision" in capsys.readouterr().out


def test_growth_is_the_middle_against_the_mean_of_the_ends(monkeypatch, capsys):
    ends = {(2, 7, 36864): 1, (6, 7, 36864): 3, (4, 4, 36864): 1, (4, 10, 36864): 5, (4, 7, 8192): 1, (4, 7, 65536): 1}
    seconds = {**ends, (4, 7, 36864): 2}

    def take_turns(contenders, rounds, warm_up=1):
        if "index" in contenders:
            benchmark.index_of(contenders["index"][1])()
            return {"index": [4.0]}, {"index": 300.0}
        assert contenders.keys() == seconds.keys()
        assert contenders[4, 10, 36864] == (benchmark.our_step, "vit_nano", 16, 4, None, 36864, 8)
        return {key: [s] for key, s in seconds.items()}, {key: 10.0 * s for key, s in seconds.items()}

    monkeypatch.setattr(benchmark, "take_turns", take_turns)
    benchmark.growth(tiny(), files=1000)
    rows = table(capsys.readouterr().out)
    assert rows["images"] == ["2 4 6", "1 2 3", "1.00", "10 20 30", "1.00"]
    assert [rows[name][2] for name in ("crops", "K")] == ["0.67", "2.00"]
    assert (rows["seconds"], rows["MB"]) == (["4"], ["300"])


@pytest.mark.slow
def test_steps_make_a_table(here, capsys):
    benchmark.step(tiny())
    rows = table(capsys.readouterr().out)
    assert rows["plain fp32"][2] == "1.00"
    assert 0.2 < float(rows["this fp32"][2].split()[0]) < 20


@pytest.mark.usefixtures("forked")
def test_real_limits_make_a_table(capsys):
    benchmark.main(arguments_of(benchmark, "limits", *TINY))
    assert float(table(capsys.readouterr().out)["GB/s copied (read, and written)"][0]) > 0.1


@pytest.mark.slow
def test_real_processes_make_a_table(sample_root):
    rows = table(run_script("benchmark.py", "scaling", *TINY, "--batch_size_per_gpu", 1).stdout)
    one, two = (float(rows[number][0]) for number in "12")
    assert float(rows["2"][1]) == pytest.approx(two / one, rel=0.1)
    assert json.loads(rows["2"][2].removesuffix(" %")) == pytest.approx(50 * two / one, rel=0.1)
