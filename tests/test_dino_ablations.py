"""Ablations: each compared with a float64 loop over its formula, and what short runs with them learn."""

import json

import pytest
import torch
from conftest import SMALL_RUN, arguments_of, assert_near, assert_same, run_script

import dino_ablations
import main_dino
import utils
from vision_transformer import DINOHead

pytestmark = pytest.mark.usefixtures("small_networks")


def arguments(*flags):
    return arguments_of(main_dino, *SMALL_RUN, *flags)


def train(root, output, *flags):
    main_dino.train_dino(arguments("--data_path", root / "train", "--output_dir", output, *flags))
    return torch.load(output / "checkpoint.pth", weights_only=True)


# ---- loss ----


def parts_with(loss, args):
    """Parts of a run whose networks are single weights."""
    student, teacher = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    schedules = {"momentum": utils.cosine_scheduler(0.9, 1, args.epochs, 3)}
    parts = main_dino.Parts(student, teacher, loss, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    dino_ablations.apply(args, parts, schedules)
    return parts, schedules["momentum"]


def loss_with(*flags, prototypes=12, ncrops=4):
    loss = main_dino.DINOLoss(prototypes, ncrops, 0.04, 0.07, 2, 2)
    parts_with(loss, arguments(*flags))
    return loss


def cross_entropy_by_hand(student, teacher_probs, student_temp=0.1):
    """The loss in float64 of student logits [ncrops, B, K] for teacher probabilities [2, B, K], pair by pair."""
    log_p = (student.double() / student_temp).log_softmax(-1)
    pairs = [(i, v) for i in range(2) for v in range(len(student)) if v != i]
    return sum(-(teacher_probs[i] * log_p[v]).sum(-1).mean() for i, v in pairs) / len(pairs)


def balanced_by_hand(logits, temperature, iterations):
    """Sinkhorn-Knopp in float64: columns, then rows, of exp(logits / temperature) to sums of 1."""
    shares = (logits.double() / temperature).exp()
    for _ in range(iterations):
        for k in range(shares.shape[1]):
            shares[:, k] /= shares[:, k].sum()
        for row in range(shares.shape[0]):
            shares[row] /= shares[row].sum()
    return shares


@pytest.mark.parametrize(("centering", "iterations"), [("sinkhorn", 3), ("softmax_batch", 1)])
def test_centering_on_a_batch_equals_scaling_columns_and_rows_in_turn(centering, iterations):
    torch.manual_seed(0)
    student, teacher = torch.randn(4 * 5, 12), torch.randn(2 * 5, 12)
    for epoch, temperature in ((0, 0.04), (1, 0.07)):
        loss = loss_with("--centering", centering)
        want = balanced_by_hand(teacher, temperature, iterations).unflatten(0, (2, 5))
        for _ in range(2):  # the center of the last batch has no influence
            got = loss(student, teacher, epoch)
            assert_near(got, cross_entropy_by_hand(student.unflatten(0, (4, 5)), want), 1e-5)
        assert_near(loss.entropy, -(want * want.clamp(min=1e-300).log()).sum(-1).mean(), 1e-4)
        assert_near(loss.top_prototype, want.mean((0, 1)).max(), 1e-5)


def test_centering_on_a_batch_works_in_half_precision_with_extreme_logits():
    loss = loss_with("--centering", "sinkhorn")
    teacher = torch.randn(10, 12).half() * 100
    assert loss(torch.randn(20, 12).half(), teacher, 0).isfinite()
    assert loss.center.isfinite().all()


def test_student_temperature_and_center_momentum_are_those_of_the_flags():
    torch.manual_seed(0)
    student, teacher = torch.randn(4 * 5, 12), torch.randn(2 * 5, 12)
    loss = loss_with("--student_temp", 0.3, "--center_momentum", 0.6)
    want = (teacher.double() / 0.04).softmax(-1).unflatten(0, (2, 5))
    assert_near(loss(student, teacher, 0), cross_entropy_by_hand(student.unflatten(0, (4, 5)), want, 0.3), 1e-5)
    assert_near(loss.center, 0.4 * teacher.double().mean(0, keepdim=True), 1e-6)


def test_a_center_momentum_of_1_is_no_centering():
    loss = loss_with("--center_momentum", 1)
    loss(torch.randn(20, 12), torch.randn(10, 12) + 5, 0)
    assert not loss.center.any()


def test_two_processes_center_on_the_batch_of_both(tiny_root, tmp_path):
    flags = [*SMALL_RUN, "--centering", "sinkhorn", "--use_fp16", "false", "--drop_path_rate", 0, "--epochs", 1]
    flags += ["--warmup_epochs", 0, "--optimizer", "sgd", "--lr", 0.05, "--data_path", tiny_root / "train"]
    for folder, size, processes in (("one", 8, 1), ("two", 4, 2)):
        output = ("--batch_size_per_gpu", size, "--output_dir", tmp_path / folder)
        run_script("main_dino.py", *flags, *output, processes=processes, blocks=2)
    one, two = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("one", "two"))
    assert one["dino_loss"]["center"].std() > 0.01
    assert_near(two["dino_loss"]["center"], one["dino_loss"]["center"], 1e-4)


# ---- teacher ----


@pytest.mark.parametrize("teacher", ["student", "previous_iteration", "previous_epoch"])
def test_the_teacher_is_a_copy_of_the_student(teacher, tiny_root, tmp_path, monkeypatch):
    """Compared with the student's weights before each step and after it, recorded in a real run of 2 epochs."""
    students, teachers, build, update = [], [], utils.build_optimizer, main_dino.update_teacher

    def recording_optimizer(name, groups, device):
        optimizer = build(name, groups, device)
        optimizer.register_step_pre_hook(lambda *_: students.append(first_mlp_of(groups[0]["params"])))
        return optimizer

    def recording_update(teacher, student, momentum):
        update(teacher, student, momentum)
        teachers.append(first_mlp_of(teacher))
        students_after.append(first_mlp_of(student))

    students_after = []
    monkeypatch.setattr(utils, "build_optimizer", recording_optimizer)
    monkeypatch.setattr(main_dino, "update_teacher", recording_update)
    train(tiny_root, tmp_path, "--teacher", teacher)
    before = students  # of each step
    assert len(teachers) == len(before) == 10
    for step, got in enumerate(teachers):
        start = before[0] if step < 4 else students_after[4] if step < 9 else students_after[9]
        want = {"student": students_after[step], "previous_iteration": before[step], "previous_epoch": start}
        assert torch.equal(got, want[teacher]), step
    assert not torch.equal(before[1], before[2])


def first_mlp_of(params):
    """The first block's first MLP weight, of vit_nano's shape."""
    return next(p for p in params if p.shape == (512, 128)).detach().clone()


def test_a_copied_teacher_resumes_bit_identically(tiny_root, tmp_path):
    flags = ("--teacher", "previous_iteration", "--centering", "softmax_batch", "--saveckp_freq", 1)
    whole = train(tiny_root, tmp_path / "whole", *flags)
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "checkpoint0000.pth").rename(tmp_path / "cut" / "checkpoint.pth")
    resumed = train(tiny_root, tmp_path / "cut", *flags)
    for part in ("student", "teacher", "dino_loss", "optimizer"):
        assert_same(resumed[part], whole[part])


# ---- head ----


def test_the_head_has_the_sizes_of_the_flags(tiny_root, tmp_path, refusal):
    sizes = ("--head_layers", 2, "--head_hidden_dim", 48, "--head_bottleneck_dim", 20)
    found = train(tiny_root, tmp_path, *sizes)["student"]
    want = DINOHead(128, 64, nlayers=2, hidden_dim=48, bottleneck_dim=20).state_dict()
    head = {k.removeprefix("module.head."): v.shape for k, v in found.items() if "head." in k}
    assert head == {name: tensor.shape for name, tensor in want.items()}
    again = [*SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", tmp_path, *sizes, "--head_layers", 3]
    assert "was made with --head_layers 2, this run has --head_layers 3" in refusal(main_dino, *again)


# ---- the start and the student of a run ----


def test_a_run_starts_from_the_center_of_another_if_it_has_its_head(tiny_root, tmp_path, capsys):
    source = train(tiny_root, tmp_path / "source", "--epochs", 1, "--warmup_epochs", 0)["dino_loss"]["center"]
    start = ("--init_from", tmp_path / "source", "--center_momentum", 1)
    assert source.any()
    assert torch.equal(train(tiny_root, tmp_path / "same", *start)["dino_loss"]["center"], source)
    assert "loaded the center of the loss from there, too" in capsys.readouterr().out
    other = train(tiny_root, tmp_path / "other", *start, "--head_hidden_dim", 48)
    assert not other["dino_loss"]["center"].any()


def test_the_student_is_measured_beside_the_teacher(tiny_root, tmp_path, capsys, refusal):
    flags = ("--knn_every", 1, "--momentum_teacher", 0, "--momentum_teacher_end", 0, "--drop_path_rate", 0.5)
    measured = train(tiny_root, tmp_path / "both", *flags, "--knn_student", "true")
    said = capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "both" / "log.txt").read_text().splitlines()]
    for line in log:  # the teacher is a copy of the student
        assert line["knn_student_top1"] == line["knn_top1"]
        assert line["knn_student_top5"] == line["knn_top5"]
        assert f"; student: top-1 {line['knn_top1']:.2f} %" in said
    assert_same(measured["student"], train(tiny_root, tmp_path / "teacher", *flags)["student"])
    words = [*SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", tmp_path / "new", "--knn_student", "true"]
    assert "--knn_student True has no effect without --knn_every" in refusal(main_dino, *words)
