"""health.py: sick runs are told from healthy ones, by numbers that are what they say."""

import json
import math
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, arguments_of, log_without_times, run_script, tensor

import dino_health
import main_dino
from main_dino import DINOLoss

# ---- numbers ----


def entropy_and_divergence(student, teacher, center, ncrops, student_temp, teacher_temp):
    """Slowly, in float64, pair by pair: the teacher's mean entropy, and the mean KL divergence of the pairs."""
    student, teacher, center = (x.double().numpy() for x in (student, teacher, center))
    entropies, divergences = [], []
    batch = len(teacher) // 2
    for i in range(2):
        for j in range(ncrops):
            for b in range(batch):
                z, t = student[j * batch + b] / student_temp, (teacher[i * batch + b] - center[0]) / teacher_temp
                log_q = z - z.max() - np.log(np.exp(z - z.max()).sum())
                log_p = t - t.max() - np.log(np.exp(t - t.max()).sum())
                p = np.exp(log_p)
                if i != j:
                    entropies.append(-(p * log_p).sum())
                    divergences.append((p * (log_p - log_q)).sum())
    return np.mean(entropies), np.mean(divergences)


def test_the_loss_is_the_teachers_entropy_and_the_divergence():
    ncrops, batch, k = 5, 3, 40
    student, teacher = tensor("health/student", (ncrops * batch, k)), tensor("health/teacher", (2 * batch, k), 0.1)
    loss = DINOLoss(k, ncrops, 0.04, 0.04, 0, 1)
    loss.center = tensor("health/center", (1, k), 0.1)
    total = loss(student, teacher, 0, update_center=False)
    entropy, divergence = entropy_and_divergence(student, teacher, loss.center, ncrops, 0.1, 0.04)
    assert loss.entropy.item() == pytest.approx(entropy, rel=1e-5)
    assert total.item() - loss.entropy.item() == pytest.approx(divergence, rel=1e-5)
    mean = ((teacher - loss.center) / 0.04).softmax(-1).mean(0)
    assert loss.top_prototype.item() == pytest.approx(mean.max().item(), rel=1e-5)


def test_numbers_are_those_of_the_definitions():
    features, norms = tensor("health/features", (16, 32)) + 3, torch.tensor([0.5, 4.0, 2.0])
    loss = SimpleNamespace(top_prototype=torch.tensor(0.25), center=torch.tensor([[3.0, 4.0]]))
    found = dino_health.step_numbers(features, loss, norms)
    unit = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
    assert found["feature_std"] == pytest.approx(unit.std(axis=0).mean(), rel=1e-5)
    assert (found["center_norm"], found["grad_norm"], found["grad_norm_max"]) == (5, 2, 4)
    assert found["top_prototype"] == 0.25
    assert "grad_norm_max" not in dino_health.step_numbers(features, loss, torch.tensor([1.0, 2.0, math.inf]))


def test_every_line_of_the_log_splits_the_loss(tiny_root, tmp_path):
    flags = ["--data_path", tiny_root / "train", "--output_dir", tmp_path, "--grad_accum_steps", 2]
    flags += ["--blur_radius", 0.1, 0.5]  # else a warning
    said = run_script("main_dino.py", *SMALL_RUN, "--batch_size_per_gpu", 4, *flags).stdout
    lines = log_without_times(tmp_path)
    assert len(lines) == 2
    for line in lines:
        assert line["train_entropy"] + line["train_kl"] == pytest.approx(line["train_loss"], abs=1e-5)
        assert line["train_ln_k"] == pytest.approx(math.log(64))
        assert set(dino_health.NUMBERS) <= {name.removeprefix("train_") for name in line}
        assert "warnings" not in line
    assert "of ln K = 4.1589  kl: " in said
    whole = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert all(line["train_images_per_s"] > 0 and line["train_max_mem_mb"] > 100 for line in whole)
    assert all(0 <= line["train_data_wait"] <= 1 for line in whole)


# ---- warnings ----

WELL = {"entropy": 3.0, "kl": 0.5, "top_prototype": 0.1, "feature_std": 0.06, "feature_dim": 128}
WELL |= {"ln_k": math.log(64), "warm": True, "images": 32}


def test_a_healthy_step_shows_nothing():
    assert dino_health.conditions(WELL) == {}


@pytest.mark.parametrize(
    ("number", "well", "ill", "name"),
    [
        ("entropy", 0.98 * math.log(64), 0.995 * math.log(64), "uniform"),
        ("entropy", 0.06 * math.log(64), 0.04 * math.log(64), "dominant"),
        ("kl", 0.0022 * math.log(64), 0.0018 * math.log(64), "agreement"),
        ("feature_std", 0.11 / math.sqrt(128), 0.09 / math.sqrt(128), "features"),
    ],
)
def test_each_condition_has_its_limit(number, well, ill, name):
    numbers = {**WELL, "top_prototype": 0.5}
    assert dino_health.conditions({**numbers, number: well}) == {}
    assert list(dino_health.conditions({**numbers, number: ill})) == [name]


def test_sharp_and_balanced_assignments_and_views_of_one_image_are_no_collapse():
    assert dino_health.conditions({**WELL, "entropy": 0.01, "top_prototype": 0.03}) == {}
    assert dino_health.conditions({**WELL, "feature_std": 0.0, "images": 1}) == {}


def test_curves_that_can_not_be_written_do_not_end_a_run(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    curves = dino_health.Curves(arguments_of(main_dino, "--tensorboard", "on", "--output_dir", tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    curves.send, curves.end = [full], [full]
    curves.add(0, {"loss": 1.0})
    curves.add(1, {"loss": 1.0})
    curves.close()
    assert capsys.readouterr().out.count("warning: no curves from here on: [Errno 28] No space left on device") == 2


def test_before_the_end_of_the_warm_up_a_uniform_teacher_is_no_sign():
    assert dino_health.conditions({**WELL, "entropy": math.log(64), "warm": False}) == {}


def doctor(*flags, steps=100):
    return dino_health.HealthMonitor(arguments_of(main_dino, "--out_dim", 64, "--warmup_epochs", 0, *flags), steps)


def moving(step):
    """Two networks of which both have just moved."""
    return [torch.nn.Linear(2, 2) for _ in range(2)] if step is not None else None


def test_a_condition_is_said_once_and_only_if_it_lasts(capsys):
    watching = doctor()
    sick = {**WELL, "kl": 1e-6}
    for step, numbers in enumerate([sick, sick, WELL, sick, sick]):
        watching.look(step, numbers, *moving(step))
    assert capsys.readouterr().out == ""
    assert not watching.collapse
    for step in range(5, 9):
        watching.look(step, sick, *moving(step))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: the student differs from the teacher by a KL divergence of 0.00000")
    assert watching.warnings == [line.removeprefix("warning: ")] == [watching.collapse]


def test_a_run_that_goes_on_says_what_one_without_a_stop_would(capsys):
    watching, sick = doctor("--teacher_temp", 0.08, "--momentum_teacher", 0.9995), {**WELL, "kl": 1e-6}
    watching.check_settings()
    watching.look(0, sick, *moving(0))
    watching.look(1, sick, *moving(1))
    kept = watching.state_dict()
    watching.look(2, sick, *moving(2))
    going_on = dino_health.HealthMonitor(watching.args, watching.steps, state=kept)
    assert "0.08 is more than 0.07" in going_on.warnings[0]  # it was not in the log yet
    going_on.check_settings()
    going_on.look(2, sick, *moving(2))
    assert going_on.warnings == watching.warnings
    assert going_on.collapse == watching.collapse != ""
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[1:4] for line in said] == [
        ["a", "teacher", "temperature"],
        *[["the", "student", "differs"]] * 2,
    ]


def test_what_a_strange_checkpoint_says_of_health_is_left_aside():
    for odd in (
        5,
        None,
        [],
        {"best_knn": "x", "bad_images": [1], "norms": 3.0, "seen": 4, "streaks": [], "warnings": {}},
    ):
        assert dino_health.HealthMonitor(doctor().args, 5, state=odd).state_dict() == doctor().state_dict()


@pytest.mark.parametrize(("share", "speed", "warns"), [(0.3, 31.0, True), (0.2, 15.0, False), (0.3, 33.0, False)])
def test_loaders_that_cost_half_a_minute_an_epoch_and_a_quarter_of_the_time_are_a_warning(share, speed, warns):
    watching = doctor("--batch_size_per_gpu", 32)  # epochs of 3,200 images
    watching.check_epoch({"epoch": 0, "train_data_wait": share, "train_images_per_s": speed})
    assert [what.split(":")[0] for what in watching.warnings] == ["the loaders don't keep up"] * warns


def test_a_teacher_that_stands_still_while_the_student_moves_is_seen(capsys):
    watching, teacher = doctor(), torch.nn.Linear(2, 2)
    for step in range(4):
        watching.look(step, WELL, torch.nn.Linear(2, 2), teacher)
    assert "the student changes and the teacher does not" in capsys.readouterr().out
    assert not watching.collapse
    standing, student = doctor(), torch.nn.Linear(2, 2)
    for step in range(4):
        standing.look(step, WELL, student, teacher)  # as at a learning rate of 0
    late = doctor("--epochs", 10)
    for step in range(950, 954):
        late.look(step, WELL, torch.nn.Linear(2, 2), teacher)  # as with a momentum that is all but 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "steps", "said"),
    [
        ((), 20_000, "--momentum_teacher 0.996 is low for 64 images a step"),
        (("--momentum_teacher", 0.9995), 20_000, None),
        (("--batch_size_per_gpu", 512), 2_500, None),
        (("--momentum_teacher", 0.97, "--epochs", 12), 67, None),  # the demo: a short run
        (("--teacher_temp", 0.08, "--momentum_teacher", 0.9995), 20_000, "a teacher temperature of 0.08 is more than"),
        (("--teacher_temp", 0.07, "--momentum_teacher", 0.9995), 20_000, None),
    ],
)
def test_unwise_settings_are_said_before_the_first_step(capsys, flags, steps, said):
    doctor(*flags, steps=steps).check_settings()
    out = capsys.readouterr().out
    assert out.startswith(f"warning: {said}") if said else out == ""


PUBLISHED = [
    "--out_dim",
    65536,
    "--warmup_epochs",
    10,
    "--batch_size_per_gpu",
    512,
]  # 8 processes of 64; 2,500 steps an epoch are ImageNet


@pytest.mark.parametrize(
    ("flags", "wise", "said"),
    [
        (("--warmup_teacher_temp", 0.06), None, None),  # has no effect without epochs of warm-up
        (
            ("--warmup_teacher_temp", 0.06, "--warmup_teacher_temp_epochs", 30),
            ("--teacher_temp", 0.06),
            "the teacher's temperature falls, from --warmup_teacher_temp 0.06 to --teacher_temp 0.04",
        ),
        (("--momentum_teacher", 1), ("--momentum_teacher", 0.9999), "--momentum_teacher 1 leaves the teacher as it"),
        (("--batch_size_per_gpu", 7, "--momentum_teacher", 0.9999), ("--batch_size_per_gpu", 8), "7 images a step are"),
        (("--lr", 0), ("--lr", 1e-6), "with --lr 0 nothing is learnt"),
        (("--min_lr", 0.0011), ("--min_lr", 0.001), "the learning rate rises to the end of the run: --min_lr 0.0011"),
        (("--lr", 0.006), ("--lr", 0.005), "--lr 0.006 is more than ten times the usual"),
        (("--lr", 0.03, "--optimizer", "sgd"), None, None),
        (("--weight_decay_end", 0.03), ("--weight_decay_end", 0.04), "the weight decay falls, from --weight_decay 0.0"),
        (("--epochs", 19), ("--epochs", 20), "--warmup_epochs 10 take more than half of --epochs 19"),
        (("--freeze_last_layer", 100), ("--freeze_last_layer", 99), "--freeze_last_layer 100 keeps the head's last"),
        (("--use_fp16", "off", "--amp_dtype", "bf16"), ("--use_fp16", "on"), "--amp_dtype bf16 has no effect with"),
        (
            ("--amp_dtype", "fp16", "--patch_size", 8),
            ("--amp_dtype", "bf16"),
            "fp16 is known to be unstable with patch",
        ),
        (("--amp_dtype", "fp16", "--patch_size", 8), ("--patch_size", 16), "fp16 is known to be unstable with patches"),
        (("--local_crops_number", 0), ("--global_crops_scale", 0.25, 1), "without local crops the two global ones"),
        (("--local_crops_scale", 0.05, 0.81), ("--local_crops_scale", 0.05, 0.8), "local crops cover up to 0.81 of an"),
        (("--local_crops_scale", 0.05, 1), ("--local_crops_number", 0), "local crops cover up to 1.0 of an image"),
        (("--local_crops_size", 240), ("--local_crops_size", 224), "--local_crops_size 240 is larger than --global"),
        (
            ("--global_crops_size", 128, "--patch_size", 128, "--local_crops_size", 128),
            ("--patch_size", 64),
            "--global_crops_size 128 is a single patch of --patch_size 128",
        ),
        (("--global_crops_size", 64, "--local_crops_size", 32), ("--blur_radius", 0.1, 1), "a blur of up to 2.0 pix"),
        (("--global_crops_size", 64, "--local_crops_size", 32), ("--global_crops_size", 80), "a blur of up to 2.0 pix"),
    ],
)
def test_a_setting_that_is_seldom_meant_is_a_warning(capsys, flags, wise, said):
    broken = doctor(*PUBLISHED, *flags, steps=2_500)
    broken.check_settings()
    out = capsys.readouterr().out
    assert out.count("warning: ") == bool(said), out
    if said:
        assert f"warning: {said}" in out
    if wise:
        repaired = doctor(*PUBLISHED, *flags, *wise, steps=2_500)
        repaired.check_settings()
        assert not set(broken.seen) & set(repaired.seen)


def test_far_more_prototypes_than_images_are_a_warning(capsys):
    for out_dim, warns in ((40_960, False), (40_961, True)):
        few = doctor("--out_dim", out_dim, "--momentum_teacher", 0.9995, steps=64)  # of 64 images
        few.check_settings()
        assert ("prototypes" in few.seen) == warns
    assert "--out_dim 40961 is more than ten prototypes for each of 4096 images" in capsys.readouterr().out


def test_a_teacher_that_copies_the_student_is_a_warning_in_the_shortest_run_too(capsys):
    for momentum, warns in ((0.89, True), (0.9, False)):
        short = doctor("--momentum_teacher", momentum, "--out_dim", 64, steps=1)
        short.check_settings()
        assert ("momentum" in short.seen) == warns
    assert "makes the teacher all but a copy of the student" in capsys.readouterr().out


def test_the_published_run_draws_no_warning(capsys):
    doctor(*PUBLISHED, steps=2_500).check_settings()
    assert capsys.readouterr().out == ""


# ---- sick runs, and healthy ones ----

STEPS = 70
RUN = ["--arch", "vit_nano", "--patch_size", 16, "--out_dim", 256, "--global_crops_size", 32, "--local_crops_size", 16]
RUN += ["--local_crops_number", 2, "--batch_size_per_gpu", 32, "--epochs", 1, "--warmup_epochs", 0, "--num_workers", 0]
RUN += ["--device", "cpu", "--saveckp_freq", 0, "--freeze_last_layer", 0, "--momentum_teacher", 0.99, "--lr", 0.004]
RUN += ["--tensorboard", "off", "--blur_radius", 0.1, 0.5]


@pytest.fixture(scope="module")
def images(sample_root, tmp_path_factory):
    """As many images of the embedded data as STEPS steps take."""
    folder = tmp_path_factory.mktemp("images")
    files = sorted((sample_root / "train").glob("*/*.png"))
    (folder / "all").mkdir()
    for i in range(STEPS * 32):
        (folder / "all" / f"{i:05}.png").symlink_to(files[i * 37 % len(files)])
    return folder


def warnings_of_a_run(images, folder, *flags):
    main_dino.train_dino(arguments_of(main_dino, *RUN, "--data_path", images, "--output_dir", folder, *flags))
    found = [what for line in log_without_times(folder) for what in line.get("warnings", [])]
    return [what for what in found if not what.startswith("the loaders don't keep up")]  # a busy machine's


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_raises_no_warning(images, tmp_path, seed):
    assert not warnings_of_a_run(images, tmp_path, "--seed", seed)


@pytest.mark.parametrize(
    ("sickness", "flags", "warning"),
    [
        ("no centering", (), "collapse onto one"),
        ("no sharpening", ("--teacher_temp", 1, "--warmup_teacher_temp", 1), "uniform collapse"),
        ("a still teacher", ("--momentum_teacher", 1), "the student changes and the teacher does not"),
    ],
)
def test_a_sick_run_raises_the_right_warning_within_70_steps(monkeypatch, images, tmp_path, sickness, flags, warning):
    if sickness == "no centering":
        monkeypatch.setattr(DINOLoss, "update_center", lambda self, logits: None)
    try:
        found = warnings_of_a_run(images, tmp_path, "--stop_on_collapse", "true", *flags)
    except dino_health.UserError as stop:  # at the warning: the steps that are left are not needed
        found = [str(stop)]
    assert any(warning in what for what in found), found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_collapse_ends_the_run_with_code_4_and_a_checkpoint_if_that_is_wanted(images, tmp_path, processes):
    flags = ["--teacher_temp", 1, "--warmup_teacher_temp", 1, "--stop_on_collapse", "true", "--data_path", images]
    flags += ["--batch_size_per_gpu", 32 // processes, "--output_dir", tmp_path]
    done = run_script("main_dino.py", *RUN, *flags, processes=processes, check=False)
    assert done.returncode == 4
    assert "saved: the teacher's entropy is" in done.stderr
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert 20 < checkpoint["step"] < 40


def test_a_collapse_that_is_seen_with_the_last_step_is_one_too(images, tmp_path):
    flags = ["--teacher_temp", 1, "--warmup_teacher_temp", 1, "--stop_on_collapse", "true", "--batch_size_per_gpu", 106]
    with pytest.raises(
        dino_health.UserError, match="all epochs are done and saved, but: the teacher's entropy is"
    ) as raised:
        warnings_of_a_run(images, tmp_path, *flags)  # 21 steps, of which the first, the middle and the last are logged
    assert raised.value.exit_code == 4
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 1


# ---- where it ran, and curves ----


def test_run_json_says_what_was_run_where(tiny_root, tmp_path):
    run_script("main_dino.py", *SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", tmp_path)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["changed"]["arch"] == "vit_nano"
    assert "lr" not in found["changed"]
    assert "main_dino.py --arch vit_nano" in found["command"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert (found["git"] or {}).get("commit") == (git.stdout.strip() if git.returncode == 0 else None)


def test_a_copy_without_git_has_no_commit(monkeypatch, tmp_path):
    shutil.copy(ROOT / "health.py", tmp_path)
    monkeypatch.setattr(dino_health, "__file__", str(tmp_path / "health.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert dino_health.git_state() is None


def test_curves_go_to_tensorboard(tiny_root, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--data_path", tiny_root / "train", "--output_dir", tmp_path, "--tensorboard", "on"]
    run_script("main_dino.py", *SMALL_RUN, *flags)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "entropy", "kl", "lr", *dino_health.NUMBERS} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [0, 4, 5, 9]  # the first and last of 5 steps an epoch


@pytest.mark.parametrize(
    ("module", "flags"), [("torch.utils.tensorboard", ("--tensorboard", "on")), ("wandb", ("--wandb", "dino"))]
)
def test_what_is_not_installed_is_named_with_the_command_that_gets_it(monkeypatch, tmp_path, module, flags):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(dino_health.UserError, match="pip install"):
        dino_health.check_curves(arguments_of(main_dino, *flags, "--output_dir", tmp_path))
    dino_health.Curves(arguments_of(main_dino, "--tensorboard", "off", "--output_dir", tmp_path)).close()
