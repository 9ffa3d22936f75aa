"""k-NN during training (--knn_every): the held-out images, the accuracy, the best checkpoint, no effect on training.

The classifier itself is tested in test_eval_knn.py.
"""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, arguments_of, assert_same, log_without_times, run_script
from PIL import Image
from test_restarts import Run, finish

import dino_data
import dino_features
import dino_health
import eval_knn
import main_dino
import utils

pytestmark = pytest.mark.usefixtures("small_networks")
RUN = [*SMALL_RUN, "--use_bn_in_head", "true", "--lr", "0.05"]


def train(root, output, *flags):
    main_dino.train_dino(arguments_of(main_dino, *RUN, "--data_path", root / "train", "--output_dir", output, *flags))
    return output


def checkpoint(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


# ---- images ----


def class_folders(root, **numbers):
    for name, number in numbers.items():
        (root / name).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(root / name / f"{i:02}.png")
    return root


def test_every_tenth_image_of_a_class_is_held_out_for_validation(tmp_path):
    folder = dino_data.find_images(class_folders(tmp_path, ape=21, bee=1, cat=10, dog=2))
    train, val, train_labels, val_labels = dino_data.split_every_tenth(folder, lambda image: image, "it")
    held_out = [str(Path(path).relative_to(tmp_path)) for path in val.images.paths]
    assert held_out == ["ape/00.png", "ape/10.png", "ape/20.png", "cat/00.png", "dog/00.png"]
    assert val_labels.tolist() == [0, 0, 0, 2, 3]
    assert sorted(train.images.paths + val.images.paths) == folder.paths
    assert [Path(path).parent.name for path in train.images.paths] == [folder.classes[label] for label in train_labels]


def test_knn_data_is_a_folder_with_train_and_val_or_with_classes(tiny_root):
    def sizes(path):
        return [len(part) for part in dino_data.find_labeled(str(path), lambda image: image, False, "--knn_data")]

    assert sizes(tiny_root) == [40, 20, 40, 20]
    assert sizes(tiny_root / "train") == [36, 4, 36, 4]


FORTY_CLASSES = {f"c{i:02}": 1 for i in range(40)}


@pytest.mark.parametrize(
    ("classes", "flags", "flag"),
    [
        ({"only": 40}, ("--knn_every", 1), "train"),
        (FORTY_CLASSES, ("--knn_every", 1), "train"),
        ({"ape": 20, "bee": 20}, ("--knn_every", 1, "--knn_data", "nowhere"), "--knn_data nowhere"),
        ({"ape": 20, "bee": 20}, ("--knn_every", 1, "--knn_data", "."), "--knn_data ."),
        ({"ape": 20, "bee": 20}, ("--knn_data", "train"), "--knn_data train"),
    ],
)
def test_unusable_images_are_an_error_before_training_starts(tmp_path, monkeypatch, classes, flags, flag):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "train", **classes)
    with pytest.raises(utils.UserError, match=rf"{re.escape(flag)}.*(k-NN|train and val|does not exist|--knn_every)"):
        train(tmp_path, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "run.json").exists()


# ---- accuracy ----


@pytest.fixture(scope="module")
def labeled(sample_root, tmp_path_factory):
    """18 classes with 20 training and 5 validation images each."""
    root = tmp_path_factory.mktemp("labeled")
    for part, number in (("train", 20), ("val", 5)):
        for folder in sorted((sample_root / part).iterdir()):
            (root / part / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:number]:
                (root / part / folder.name / path.name).symlink_to(path)
    return root


def accuracies_printed(capsys, root, weights, *more):
    """(top-1, top-5) that eval_knn.py prints for a checkpoint."""
    flags = ["--arch", "vit_nano", "--image_size", 32, "--nb_knn", 20, "--data_path", root, "--num_workers", 0]
    eval_knn.main(arguments_of(eval_knn, *flags, "--pretrained_weights", weights, "--device", "cpu", *more))
    return [float(number) for number in re.search(r"Top1: (\S+), Top5: (\S+)", capsys.readouterr().out).groups()]


def test_logged_accuracies_match_eval_knn_and_the_best_checkpoint_is_saved(capsys, tiny_root, labeled, tmp_path):
    folder = train(tiny_root, tmp_path, "--knn_every", 1, "--epochs", 4, "--knn_data", labeled)
    logged = [[line["knn_top1"], line["knn_top5"]] for line in log_without_times(folder)]
    assert len(logged) == 4
    assert accuracies_printed(capsys, labeled, folder / "checkpoint.pth") == pytest.approx(logged[-1], abs=0.005)
    best = max(range(4), key=lambda epoch: logged[epoch][0])
    assert logged[best][0] > min(top1 for top1, _ in logged)
    assert checkpoint(folder, "checkpoint_best.pth")["epoch"] == best + 1
    assert accuracies_printed(capsys, labeled, folder / "checkpoint_best.pth") == pytest.approx(logged[best], abs=0.005)


def test_the_student_has_the_accuracies_that_eval_knn_prints_for_it(capsys, tiny_root, labeled, tmp_path):
    flags = ["--knn_every", 1, "--knn_student", "true", "--momentum_teacher", 0.999, "--knn_data", labeled]
    train(tiny_root, tmp_path, *flags, "--epochs", 3)
    line = log_without_times(tmp_path)[-1]
    logged = [line["knn_student_top1"], line["knn_student_top5"]]
    printed = accuracies_printed(capsys, labeled, tmp_path / "checkpoint.pth", "--checkpoint_key", "student")
    assert printed == pytest.approx(logged, abs=0.005)
    assert logged != [line["knn_top1"], line["knn_top5"]]


def test_two_processes_log_what_eval_knn_prints(capsys, tiny_root, labeled, tmp_path):
    flags = [*RUN, "--data_path", tiny_root / "train", "--knn_data", labeled, "--batch_size_per_gpu", 3, "--epochs", 1]
    run_script("main_dino.py", *flags, "--knn_every", 1, "--output_dir", tmp_path, processes=2, blocks=2)
    (line,) = log_without_times(tmp_path)
    printed = accuracies_printed(capsys, labeled, tmp_path / "checkpoint.pth")
    assert printed == pytest.approx([line["knn_top1"], line["knn_top5"]], abs=0.005)


def test_knn_runs_every_n_epochs_and_after_the_last(tiny_root, tmp_path):
    folder = train(tiny_root, tmp_path, "--knn_every", 2, "--epochs", 5)
    assert [line["epoch"] for line in log_without_times(folder) if "knn_top1" in line] == [1, 3, 4]


def test_a_gpu_without_memory_for_knn_is_a_warning(tiny_root, tmp_path, monkeypatch, capsys):
    def no_memory(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.77 GiB. GPU 0 has ...")

    monkeypatch.setattr(dino_features, "knn_accuracies", no_memory)
    train(tiny_root, tmp_path, "--knn_every", 1, "--epochs", 1)
    assert "warning: no k-NN accuracy, the GPU's memory is full (CUDA out of memory)." in capsys.readouterr().out
    assert checkpoint(tmp_path)["epoch"] == 1
    assert "knn_top1" not in log_without_times(tmp_path)[0]


def test_a_process_among_others_without_memory_for_features_ends_the_run(tiny_root, tmp_path, monkeypatch):
    """The others wait for its features, so it must not continue alone."""

    def no_memory(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    args = arguments_of(main_dino, *RUN, "--data_path", tiny_root / "train", "--knn_every", 1)
    images = dino_data.training_images(args)
    neighbors = dino_features.OnlineKnn(args, images, torch.device("cpu"))
    monkeypatch.setattr(dino_features, "labeled_features", no_memory)
    monkeypatch.setattr(utils, "get_world_size", lambda: 2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        neighbors.accuracies(torch.nn.Identity())


def test_the_best_accuracy_on_other_images_does_not_count(tiny_root, labeled, tmp_path):
    flags = ("--knn_every", 1, "--warmup_epochs", 0, "--allow_changed_args", "true")
    train(tiny_root, tmp_path, *flags, "--epochs", 1, "--knn_data", tiny_root)
    saved = checkpoint(tmp_path)
    saved["health"]["best_knn"] = 100.0
    torch.save(saved, tmp_path / "checkpoint.pth")
    train(tiny_root, tmp_path, *flags, "--epochs", 2, "--knn_data", labeled)
    assert checkpoint(tmp_path, "checkpoint_best.pth")["epoch"] == 2
    assert checkpoint(tmp_path)["health"]["best_knn"] < 100


def test_a_resumed_run_remembers_the_best_accuracy():
    args = arguments_of(main_dino, "--tensorboard", "off")
    args.images_per_step = args.batch_size_per_gpu
    curves = dino_health.Curves(args)
    first = dino_health.HealthMonitor(args, 5, curves)
    first.check_epoch({"epoch": 3, "knn_top1": 40.0})
    second = dino_health.HealthMonitor(args, 5, curves, first.state_dict())
    second.check_epoch({"epoch": 4, "knn_top1": 39.0})
    assert (second.best_knn, second.best_epoch) == (40.0, 3)
    second.check_epoch({"epoch": 5, "knn_top1": 40.5})
    assert (second.best_knn, second.best_epoch) == (40.5, 5)


# ---- what to compare with ----


def test_the_untrained_network_and_raw_pixels_are_measured_before_the_first_step(capsys, tiny_root, labeled, tmp_path):
    train(tiny_root, tmp_path, "--knn_every", 1, "--epochs", 2, "--knn_data", labeled, "--momentum_teacher", 1)
    lines = log_without_times(tmp_path)
    for line in lines:  # a momentum of 1 leaves the teacher as it was
        assert line["knn_start"] == line["knn_top1"]
    flags = ["--arch", "vit_nano", "--image_size", 32, "--nb_knn", 20, "--data_path", labeled, "--num_workers", 0]
    said = capsys.readouterr().out
    eval_knn.main(arguments_of(eval_knn, *flags, "--pretrained_weights", "random", "--baselines", "true"))
    pixels = float(re.search(r"raw pixels +(\S+)", capsys.readouterr().out)[1])
    assert lines[0]["knn_raw_pixels"] == pytest.approx(pixels, abs=0.051)
    both = f"(untrained {lines[0]['knn_start']:.2f}, raw pixels {lines[0]['knn_raw_pixels']:.2f})"
    knn = f"top-1 {lines[0]['knn_top1']:.2f} % {both}"
    assert len(re.findall(rf"20-NN of the teacher, \d+ validation images among \d+: {re.escape(knn)}", said)) == 2
    assert f"finished: loss {lines[1]['train_loss']:.4f}, k-NN {knn}" in said
    assert f"warning: the features are no better than before training: {knn}. Start a longer run" in said
    assert f"before the first step: {both[1:-1]}\n" in said


def test_a_resumed_run_keeps_what_it_compares_with(tiny_root, tmp_path):
    flags = ("--data_path", tiny_root / "train", "--knn_every", 1, "--epochs", 2, "--output_dir")
    finish(*RUN, *flags, tmp_path / "whole")
    Run(*RUN, *flags, tmp_path / "run", spoil=("signal_in_step", 6, signal.SIGTERM)).end()
    said = finish(*RUN, *flags, tmp_path / "run")
    assert "before the first step" not in said
    assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "whole")
    assert all("knn_start" in line for line in log_without_times(tmp_path / "run"))


def test_a_signal_before_the_first_step_ends_the_run(tiny_root, tmp_path):
    flags = ("--knn_every", 1, "--data_path", tiny_root / "train", "--output_dir", tmp_path / "run")
    run = Run(*RUN, *flags, spoil=("hanging_image", 50))  # of raw pixels
    run.wait_for("an image hangs")
    os.killpg(run.processes[0].pid, signal.SIGTERM)
    codes, (said,) = run.end()
    assert codes == [128 + signal.SIGTERM]
    assert "stopped before the first step. Run the same command to resume" in said
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


# ---- no effect on training ----

CONVNET = ("--arch", "mobilenet_v3_small", "--use_fp16", "false")  # its batch norms keep running statistics


def test_training_is_bit_identical_with_and_without_knn(tiny_root, tmp_path):
    without_knn = train(tiny_root, tmp_path / "without", *CONVNET)
    with_knn = train(tiny_root, tmp_path / "with", *CONVNET, "--knn_every", 1, "--num_workers", 2)
    one, other = checkpoint(without_knn), checkpoint(with_knn)
    for part in ("student", "teacher", "dino_loss"):
        assert_same(one[part], other[part])
    logs = [log_without_times(folder) for folder in (without_knn, with_knn)]
    drop = ("knn_top1", "knn_top5", "knn_start", "knn_raw_pixels", "warnings")
    logs = [[{k: v for k, v in line.items() if k not in drop} for line in lines] for lines in logs]
    assert logs[0] == logs[1]


# The last step of the epoch is saved before k-NN starts, so that a resumed run repeats the evaluation only.
RESUMED = "continuing in epoch 0 after step 5"


def test_a_run_killed_during_knn_resumes_there(tiny_root, tmp_path):
    flags = ("--knn_every", 1, "--data_path", tiny_root / "train", "--output_dir")
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    finish(*RUN, *flags, undisturbed)
    assert Run(*RUN, *flags, folder, spoil=("kill_in_knn", 3)).end()[0] == [-signal.SIGKILL]
    assert not (folder / "log.txt").exists()
    assert RESUMED in finish(*RUN, *flags, folder)
    assert log_without_times(folder) == log_without_times(undisturbed)
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        one, other = (checkpoint(f, name) for f in (folder, undisturbed))
        assert one["health"] == other["health"]
        assert all(torch.equal(one["teacher"][key], other["teacher"][key]) for key in one["teacher"])


def test_a_signal_during_knn_stops_the_run_which_resumes_there(tiny_root, tmp_path):
    flags = ("--knn_every", 1, "--epochs", 1, "--warmup_epochs", 0, "--data_path", tiny_root / "train")
    undisturbed = tmp_path / "undisturbed"
    finish(*RUN, *flags, "--output_dir", undisturbed)
    words = [*RUN, *flags, "--output_dir", tmp_path / "run"]
    run = Run(*words, spoil=("hanging_image", 2 * 40 + 40 + 10))  # two baselines, one epoch
    run.wait_for("an image hangs")
    os.killpg(run.processes[0].pid, signal.SIGTERM)  # the data loader's processes receive it too
    codes, (said,) = run.end()
    assert codes == [128 + signal.SIGTERM]
    assert "Traceback" not in said
    assert "stopped after epoch 0, before its k-NN accuracy. Run the same command to resume" in said
    assert not (tmp_path / "run" / "log.txt").exists()
    assert RESUMED in finish(*words)
    assert log_without_times(tmp_path / "run") == log_without_times(undisturbed)
