"""dino_health.py: numbers, warnings, first and last words, log.txt, run.json, curves."""

import json
import math
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, arguments_of, log_without_times, run_script, tensor

import dino_checkpoints
import dino_health
import main_dino
from main_dino import DINOLoss

pytestmark = pytest.mark.usefixtures("small_networks")

# ---- numbers ----


def entropy_and_divergence(student, teacher, center, ncrops, student_temp, teacher_temp):
    """(teacher's mean entropy, mean KL divergence of the pairs), slowly in float64, pair by pair."""
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


def test_loss_equals_teacher_entropy_plus_KL_divergence():
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


def test_step_numbers_equal_their_definitions():
    features, norms = tensor("health/features", (16, 32)) + 3, torch.tensor([0.5, 4.0, 2.0])
    loss = SimpleNamespace(top_prototype=torch.tensor(0.25), center=torch.tensor([[3.0, 4.0]]))
    found = dino_health.step_numbers(features, loss, norms)
    unit = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
    assert found["feature_std"] == pytest.approx(unit.std(axis=0).mean(), rel=1e-5)
    assert (found["center_norm"], found["grad_norm"], found["grad_norm_max"]) == (5, 2, 4)
    assert found["top_prototype"] == 0.25


def test_norms_of_weights_are_one_per_parameter():
    network = torch.nn.Linear(2, 1)
    network.weight.data, network.bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([-2.0])
    assert dino_health.norms_of_weights(network).tolist() == [5, 2]


def test_log_and_console_split_the_loss_into_entropy_and_KL(tiny_root, tmp_path):
    flags = ["--data_path", tiny_root / "train", "--output_dir", tmp_path, "--grad_accum_steps", 2]
    flags += ["--blur_radius", 0.1, 0.5]  # else a warning
    said = run_script("main_dino.py", *SMALL_RUN, "--batch_size_per_gpu", 4, *flags).stdout
    lines = log_without_times(tmp_path)
    assert len(lines) == 2
    for line in lines:
        assert line["train_entropy"] + line["train_kl"] == pytest.approx(line["train_loss"], abs=1e-5)
        assert line["train_ln_k"] == pytest.approx(math.log(64))
        assert set(dino_health.NUMBERS) <= {name.removeprefix("train_") for name in line}
    (warning,) = lines[0]["warnings"]
    assert warning.startswith("10 steps in all are too few to learn from random weights")
    assert "warnings" not in lines[1]
    console = [line for line in said.splitlines() if line.startswith("Epoch: [") and "eta:" in line]
    assert all(len(line) <= 120 for line in console)
    for line in console:
        loss, entropy, kl = map(float, re.search(r"eta: \S+  loss: (\S+) = (\S+) \+ (\S+)  lr: ", line).groups())
        assert loss == pytest.approx(entropy + kl, abs=2e-3)
    whole = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert all(line["train_images_per_s"] > 0 and line["train_max_mem_mb"] > 100 for line in whole)
    assert all(0 <= line["train_data_wait"] <= 1 for line in whole)


# ---- warnings ----

WELL = {"entropy": 3.0, "kl": 0.5, "top_prototype": 0.1, "feature_std": 0.06, "feature_dim": 128}
WELL |= {"ln_k": math.log(64), "warm": True, "images": 32}


@pytest.mark.parametrize(
    ("number", "well", "ill", "name"),
    [
        ("entropy", 0.98 * math.log(64), 0.995 * math.log(64), "uniform"),
        ("entropy", 0.06 * math.log(64), 0.04 * math.log(64), "dominant"),
        ("kl", 0.0022 * math.log(64), 0.0018 * math.log(64), "agreement"),
        ("feature_std", 0.11 / math.sqrt(128), 0.09 / math.sqrt(128), "features"),
    ],
)
def test_each_condition_has_its_threshold(number, well, ill, name):
    numbers = {**WELL, "top_prototype": 0.5}
    assert dino_health.conditions({**numbers, number: well}) == {}
    assert list(dino_health.conditions({**numbers, number: ill})) == [name]


def test_sharp_balanced_assignments_and_single_images_are_not_a_collapse():
    assert dino_health.conditions({**WELL, "entropy": 0.01, "top_prototype": 0.03}) == {}
    assert dino_health.conditions({**WELL, "feature_std": 0.0, "images": 1}) == {}


def test_a_full_disk_ends_curves_but_not_the_run(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    curves = dino_health.Curves(arguments_of(main_dino, "--tensorboard", "on", "--output_dir", tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    curves.send, curves.end = [full], [full]
    curves.add(0, {"loss": 1.0})
    curves.add(1, {"loss": 1.0})
    curves.close()
    assert capsys.readouterr().out.count("warning: no more curves: [Errno 28] No space left on device") == 2


def test_a_uniform_teacher_is_normal_during_warm_up():
    assert dino_health.conditions({**WELL, "entropy": math.log(64), "warm": False}) == {}


def monitor(*flags, steps=100):
    args = arguments_of(main_dino, "--out_dim", 64, "--warmup_epochs", 0, *flags)
    args.images_per_step = args.batch_size_per_gpu * args.grad_accum_steps
    args.images = steps * args.images_per_step + 5  # that do not fill a step
    return dino_health.HealthMonitor(args, steps)


def moving(step):
    """Norms of two networks that have just moved."""
    return [2.0, 3.0 + step], [5.0, 7.0 + step]


def test_a_lasting_condition_is_a_warning_once(capsys):
    watching = monitor()
    sick = {**WELL, "kl": 1e-6}
    for step, numbers in enumerate([sick, sick, WELL, sick, sick]):
        watching.check_step(step, numbers, *moving(step))
    assert capsys.readouterr().out == ""
    assert not watching.collapse
    for step in range(5, 9):
        watching.check_step(step, sick, *moving(step))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: the KL divergence of the student from the teacher is 0.00000")
    assert watching.warnings == [line.removeprefix("warning: ")] == [watching.collapse]


def test_a_resumed_run_warns_as_if_it_had_not_been_stopped(capsys):
    watching, sick = monitor("--teacher_temp", 0.08, "--momentum_teacher", 0.9995), {**WELL, "kl": 1e-6}
    watching.check_settings()
    watching.check_step(0, sick, *moving(0))
    watching.check_step(1, sick, *moving(1))
    kept = watching.state_dict()
    watching.check_step(2, sick, *moving(2))
    resumed = dino_health.HealthMonitor(watching.args, watching.steps, state=kept)
    assert "0.08 is above 0.07" in resumed.warnings[0]  # it was not in the log yet
    resumed.check_settings()
    resumed.check_step(2, sick, *moving(2))
    assert resumed.warnings == watching.warnings
    assert resumed.collapse == watching.collapse != ""
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[1:4] for line in said] == [
        ["a", "teacher", "temperature"],
        *[["the", "KL", "divergence"]] * 2,
    ]


def test_nonsense_in_a_checkpoints_health_is_ignored():
    odds = [5, None, [], {"best_knn": "x", "norms": 3.0, "seen": 4, "streaks": [], "warnings": {}}]
    odds += [{"best_knn": math.nan, "norms": 3, "seen": [{}], "streaks": {"still": "x"}, "warnings": [torch.ones(2)]}]
    odds += [{"norms": norms, "best_epoch": 1.5, "baselines": [1]} for norms in ([], [1.0], ["x", 1.0], [1.0] * 3)]
    for odd in odds:
        assert dino_health.HealthMonitor(monitor().args, 5, state=odd).state_dict() == monitor().state_dict()


@pytest.mark.parametrize(("share", "speed", "warns"), [(0.3, 31.0, True), (0.2, 15.0, False), (0.3, 33.0, False)])
def test_a_slow_loader_is_a_warning(share, speed, warns):
    watching = monitor("--batch_size_per_gpu", 32)  # epochs of 3,200 images
    watching.check_epoch({"epoch": 0, "train_data_wait": share, "train_images_per_s": speed})
    assert [what.split(":")[0] for what in watching.warnings] == ["the data loader is too slow"] * warns


def test_a_teacher_that_is_the_student_of_the_last_epoch_may_stand_still(capsys):
    watching = monitor("--teacher", "previous_epoch")
    for step in range(4):
        watching.check_step(step, WELL, [1.0, step], [1.0, 2.0])
    assert "the teacher does not" not in capsys.readouterr().out


def test_a_frozen_teacher_is_a_warning(capsys):
    watching, still = monitor(), [1.0, 2.0]
    for step in range(4):
        watching.check_step(step, WELL, [1.0, step], still)
    assert "the student changes but the teacher does not" in capsys.readouterr().out
    assert not watching.collapse
    standing = monitor()
    for step in range(4):
        standing.check_step(step, WELL, still, still)  # as at a learning rate of 0
    late = monitor("--epochs", 10)
    for step in range(950, 954):
        late.check_step(step, WELL, [1.0, step], still)  # as with a momentum that is all but 1
    assert capsys.readouterr().out == ""


# 2,500 steps per epoch of ImageNet.
PUBLISHED = ["--out_dim", 65536, "--warmup_epochs", 10, "--batch_size_per_gpu", 512]
SMALL = ("--global_crops_size", 64, "--local_crops_size", 32)
TWO = (*SMALL, "--local_crops_number", 0, "--global_crops_scale", 0.14, 1)


@pytest.mark.parametrize(
    ("flags", "fix", "says"),
    [
        ((), (), None),
        (("--teacher_temp", 0.071), ("--teacher_temp", 0.07), "a teacher temperature of 0.071 is above 0.07"),
        (("--batch_size_per_gpu", 64), ("--momentum_teacher", 0.9995), "--momentum_teacher 0.996 is low for 64 images"),
        (("--momentum_teacher", 1), ("--momentum_teacher", 0.996), "--momentum_teacher 1 freezes the teacher"),
        (SMALL, ("--blur_radius", 0.1, 1), "blur of up to 2.0 pixels removes all texture from crops of 64"),
        (SMALL, ("--blur_p", 0, 0, 0), "blur of up to 2.0 pixels removes all texture from crops of 64"),
        (TWO, ("--blur_p", 0, 0, 1), "blur of up to 2.0 pixels removes all texture from crops of 64"),
        (("--amp_dtype", "fp16", "--patch_size", 8), ("--patch_size", 16), "fp16 is known to be unstable"),
        (("--local_crops_number", 0), ("--global_crops_scale", 0.14, 1), "without local crops, two global crops"),
    ],
)
def test_suspicious_settings_are_a_warning_before_the_first_step(capsys, flags, fix, says):
    broken = monitor(*PUBLISHED, *flags, steps=2_500)
    broken.check_settings()
    out = capsys.readouterr().out
    assert out.count("warning: ") == bool(says), out
    assert f"warning: {says}" in out if says else not out
    fixed = monitor(*PUBLISHED, *flags, *fix, steps=2_500)
    fixed.check_settings()
    assert not fixed.seen


def test_far_more_prototypes_than_images_are_a_warning(capsys):
    for out_dim, warns in ((41_010, False), (41_011, True)):
        few = monitor("--out_dim", out_dim, "--momentum_teacher", 0.9995, steps=64)  # of 64 images
        few.check_settings()
        assert ("prototypes" in few.seen) == warns
    said = capsys.readouterr().out
    assert "--out_dim 41011 is more than ten prototypes per image (4101 images)" in said
    assert "Use at most 41010\n" in said


def test_a_run_too_short_to_learn_is_a_warning_that_names_enough_epochs(capsys):
    for flags, warns in (((), True), (("--epochs", 24), False), (("--init_from", "published"), False)):
        short = monitor("--momentum_teacher", 0.9995, "--epochs", 23, *flags, steps=10)
        short.check_settings()
        assert ("short" in short.seen) == warns
    assert "230 steps in all are too few to learn from random weights (the demo has 945). Use --epochs 95\n" in (
        capsys.readouterr().out
    )


def test_the_momentum_does_not_matter_where_the_teacher_is_a_copy():
    copied = monitor("--momentum_teacher", 0.5, "--teacher", "student", steps=1)
    copied.check_settings()
    assert "momentum" not in copied.seen


def test_a_short_run_may_have_a_low_momentum_but_not_below_0_9():
    for momentum, warns in ((0.89, True), (0.9, False)):
        short = monitor("--momentum_teacher", momentum, "--out_dim", 64, steps=1)
        short.check_settings()
        assert ("momentum" in short.seen) == warns


# ---- broken runs and healthy ones ----

STEPS = 70
RUN = ["--arch", "vit_nano", "--patch_size", 16, "--out_dim", 256, "--global_crops_size", 32, "--local_crops_size", 16]
RUN += ["--local_crops_number", 2, "--batch_size_per_gpu", 16, "--epochs", 1, "--warmup_epochs", 0, "--num_workers", 0]
RUN += ["--device", "cpu", "--saveckp_freq", 0, "--freeze_last_layer", 0, "--momentum_teacher", 0.99, "--lr", 0.008]
RUN += ["--tensorboard", "off", "--blur_radius", 0.1, 0.5]


@pytest.fixture(scope="module")
def images(sample_root, tmp_path_factory):
    """Sample images for STEPS steps."""
    folder = tmp_path_factory.mktemp("images")
    files = sorted((sample_root / "train").glob("*/*.png"))
    (folder / "all").mkdir()
    for i in range(STEPS * 16):
        (folder / "all" / f"{i:05}.png").symlink_to(files[i * 37 % len(files)])
    return folder


def warnings_of_a_run(images, folder, *flags):
    main_dino.train_dino(arguments_of(main_dino, *RUN, "--data_path", images, "--output_dir", folder, *flags))
    found = [what for line in log_without_times(folder) for what in line.get("warnings", [])]
    return [what for what in found if not what.startswith("the data loader is too slow")]  # a busy machine's


def test_a_healthy_run_raises_no_warning(images, tmp_path):
    assert [what[:15] for what in warnings_of_a_run(images, tmp_path)] == ["70 steps in all"]


@pytest.mark.parametrize(
    ("defect", "flags", "warning"),
    [
        ("no centering", ("--center_momentum", 1, "--lr", 0.06), "collapse onto one"),
        ("no sharpening", ("--teacher_temp", 1, "--warmup_teacher_temp", 1), "uniform collapse"),
        ("a frozen teacher", ("--momentum_teacher", 1), "the student changes but the teacher does not"),
    ],
)
def test_a_broken_run_raises_the_right_warning_within_70_steps(images, tmp_path, defect, flags, warning):
    try:
        found = warnings_of_a_run(images, tmp_path, "--stop_on_collapse", "true", *flags)
    except dino_health.UserError as stop:  # at the warning: the steps that are left are not needed
        found = [str(stop)]
    assert any(warning in what for what in found), found


def test_stop_on_collapse_saves_and_exits_with_4(images, tmp_path):
    flags = ["--teacher_temp", 1, "--warmup_teacher_temp", 1, "--stop_on_collapse", "true", "--data_path", images]
    flags += ["--batch_size_per_gpu", 8, "--output_dir", tmp_path]
    done = run_script("main_dino.py", *RUN, *flags, processes=2, check=False, blocks=2)
    assert done.returncode == 4
    assert "saved: the teacher's entropy is" in done.stderr
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert 20 < checkpoint["images_done"] / 16 < 40


def test_a_collapse_at_the_last_step_exits_with_4_too(images, tmp_path):
    flags = ["--teacher_temp", 1, "--warmup_teacher_temp", 1, "--stop_on_collapse", "true"]
    (tmp_path / "few").mkdir()
    for path in sorted((images / "all").iterdir())[: 21 * 16]:
        (tmp_path / "few" / path.name).symlink_to(path)
    with pytest.raises(
        dino_health.UserError, match="all epochs are done and saved, but: the teacher's entropy is"
    ) as raised:
        warnings_of_a_run(
            tmp_path / "few", tmp_path, *flags
        )  # 21 steps, of which the first, the middle and the last are logged
    assert raised.value.exit_code == 4
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 1


# ---- where it ran, and curves ----


def test_run_json_has_settings_command_and_machine(tiny_root, tmp_path):
    run_script("main_dino.py", *SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", tmp_path)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["changed"]["arch"] == "vit_nano"
    assert "lr" not in found["changed"]
    assert (found["args"]["lr"], found["args"]["images_per_step"]) == (0.0005, 8)
    assert "main_dino.py --arch vit_nano" in found["command"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert (found["git"] or {}).get("commit") == (git.stdout.strip() if git.returncode == 0 else None)


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
def test_a_missing_package_is_named_with_its_install_command(monkeypatch, tmp_path, module, flags):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(dino_health.UserError, match="pip install"):
        dino_health.check_curves(arguments_of(main_dino, *flags, "--output_dir", tmp_path))
    dino_health.Curves(arguments_of(main_dino, "--tensorboard", "off", "--output_dir", tmp_path)).close()


# ---- log.txt and the last words ----


def test_a_restart_drops_the_lines_that_it_will_write_again(tmp_path):
    lines = [json.dumps({"train_ln_k": 1.0, "epoch": epoch}) for epoch in range(3)]
    other = [json.dumps({"epoch": 7, "train_loss": 1.0}), "not JSON"]
    (tmp_path / "log.txt").write_text("\n".join([*other, *lines, '{"train_lo']))
    dino_checkpoints.drop_log_lines(tmp_path, 2, lambda line: "train_ln_k" in line)
    assert (tmp_path / "log.txt").read_text().splitlines() == [*other, *lines[:2]]
    dino_checkpoints.drop_log_lines(tmp_path / "nowhere", 0, bool)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("load", "policy", "threads", "says"),
    [(1.6, "", 2, True), (1.4, "", 2, False), (9, "PASSIVE", 2, False), (9, "", 1, False)],
)
def test_a_busy_machine_is_noted_with_what_helps(monkeypatch, load, policy, threads, says):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    args = arguments_of(main_dino)
    args.world_size, args.images, args.images_per_step = 1, 64, 64
    said = dino_health.describe_start(args, main_dino.get_args_parser(), torch.device("cpu"), None, 1)
    assert ("is busy (load average 1.6 on 2 cores)" in said and "OMP_WAIT_POLICY=PASSIVE" in said) == says


@pytest.mark.parametrize(("flags", "name"), [((), "fp32"), (("--amp_dtype", "tf32"), "tf32")])
def test_the_first_line_names_the_precision(flags, name):
    args = arguments_of(main_dino, *flags)
    args.world_size, args.images, args.images_per_step = 1, 640, 64
    parser = main_dino.get_args_parser()
    said = dino_health.describe_start(args, parser, torch.device("cpu"), None, 10)
    assert said.startswith(f"vit_small/16 on 1 x CPU in {name}: 640 images, 10 steps per epoch, 100 epochs\n")


def test_a_run_starts_and_ends_with_what_one_wants_to_know(tiny_root, tmp_path):
    flags = ["--data_path", tiny_root / "train", "--output_dir", tmp_path / "a b", "--use_fp16", "false"]
    said = run_script(
        "main_dino.py", *SMALL_RUN, *flags, "--batch_size_per_gpu", 12, "--knn_every", 2
    ).stdout.splitlines()
    assert said[0] == "vit_nano/16 on 1 x CPU in fp32: 40 images, 3 steps per epoch, 2 epochs"
    assert said[1] == "settings that differ from the defaults (all are in run.json):"
    settings = " ".join(
        said[
            2 : said.index("a line per 10 steps: loss = entropy of the teacher + KL divergence of the student from it")
        ]
    )
    assert " use_fp16=False," in settings
    assert "momentum_teacher" not in settings
    assert "output_dir" not in settings
    assert "note: 4 images per epoch do not fill a step of 12 and are not used" in said
    assert re.fullmatch(
        r"finished: loss \S+, k-NN top-1 \S+ % \(.*\)\. This run took \d+ s; weights are in .*", said[-3]
    )
    assert f"--pretrained_weights '{tmp_path / 'a b'}'" in said[-2]
    assert said[-1].strip() == f"python report.py '{tmp_path / 'a b'}'"
