"""knn.py during training: which images ask and answer, the accuracy, the best checkpoint, and no trace in the run.

The classifier itself is tested with eval_knn.py.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_RUN, arguments_of, log_without_times, run_script
from PIL import Image

import dino_crops
import dino_data
import dino_health
import eval_knn
import main_dino
import utils

RUN = [*SMALL_RUN, "--use_bn_in_head", "true", "--lr", "0.05"]


def train(root, output, *flags):
    main_dino.train_dino(arguments_of(main_dino, *RUN, "--data_path", root / "train", "--output_dir", output, *flags))
    return output


def checkpoint(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


# ---- which images ----


def class_folders(root, **numbers):
    for name, number in numbers.items():
        (root / name).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(root / name / f"{i:02}.png")
    return root


def test_every_tenth_image_of_a_class_asks_and_the_others_answer(tmp_path):
    folder = dino_data.find_images(class_folders(tmp_path, ape=21, bee=1, cat=10, dog=2))
    train, val, train_labels, val_labels = dino_data.split_every_tenth(folder, lambda image: image, "it")
    asking = [str(Path(path).relative_to(tmp_path)) for path in val.images.paths]
    assert asking == ["ape/00.png", "ape/10.png", "ape/20.png", "cat/00.png", "dog/00.png"]
    assert val_labels.tolist() == [0, 0, 0, 2, 3]
    assert sorted(train.images.paths + val.images.paths) == folder.paths
    assert [Path(path).parent.name for path in train.images.paths] == [folder.classes[label] for label in train_labels]


def test_knn_data_means_its_train_and_val_or_else_its_classes(tiny_root):
    def sizes(path):
        return [len(part) for part in dino_data.find_labelled(str(path), lambda image: image, False, "--knn_data")]

    assert sizes(tiny_root) == [40, 20, 40, 20]
    assert sizes(tiny_root / "train") == [36, 4, 36, 4]


@pytest.mark.parametrize(
    ("classes", "flags", "says"),
    [
        ({"only": 40}, (), "train has its images in a single class folder, or in none, and k-NN needs labels"),
        ({f"c{i:02}": 1 for i in range(40)}, (), "train has one image in each class: nothing to hold out for k-NN"),
        ({"ape": 20, "bee": 20}, ("--knn_data", "nowhere"), "--knn_data nowhere is no folder"),
        ({"ape": 20, "bee": 20}, ("--knn_data", "."), "--knn_data . has only one of train and val"),
    ],
)
def test_without_labels_there_is_one_line_before_the_work(tmp_path, monkeypatch, classes, flags, says):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "train", **classes)
    with pytest.raises(utils.UserError, match=re.escape(says)):
        train(tmp_path, tmp_path / "run", "--knn_every", 1, *flags)
    assert not (tmp_path / "run" / "run.json").exists()


def test_knn_data_alone_does_nothing_and_is_an_error(tmp_path):
    with pytest.raises(utils.UserError, match="--knn_data here is for --knn_every"):
        train(tmp_path, tmp_path / "run", "--knn_data", "here")


# ---- the accuracy ----


@pytest.fixture(scope="module")
def labelled(sample_root, tmp_path_factory):
    """18 classes with 20 training and 5 validation images each."""
    root = tmp_path_factory.mktemp("labelled")
    for part, number in (("train", 20), ("val", 5)):
        for folder in sorted((sample_root / part).iterdir()):
            (root / part / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:number]:
                (root / part / folder.name / path.name).symlink_to(path)
    return root


def accuracies_printed(root, weights):
    flags = ["--arch", "vit_nano", "--image_size", 32, "--nb_knn", 20, "--data_path", root, "--num_workers", 0]
    out = run_script(ROOT / "eval_knn.py", *flags, "--pretrained_weights", weights, "--device", "cpu").stdout
    return [float(number) for number in re.search(r"Top1: (\S+), Top5: (\S+)", out).groups()]


def test_the_log_has_what_eval_knn_prints_and_the_best_of_it_is_kept(tiny_root, labelled, tmp_path):
    folder = train(tiny_root, tmp_path, "--knn_every", 1, "--epochs", 4, "--knn_data", labelled)
    found = [[line["knn_top1"], line["knn_top5"]] for line in log_without_times(folder)]
    assert len(found) == 4
    assert accuracies_printed(labelled, folder / "checkpoint.pth") == pytest.approx(found[-1])
    best = max(range(4), key=lambda epoch: found[epoch][0])
    assert found[best][0] > min(top1 for top1, _ in found)
    assert checkpoint(folder, "checkpoint_best.pth")["epoch"] == best + 1
    assert accuracies_printed(labelled, folder / "checkpoint_best.pth") == pytest.approx(found[best])


def test_two_processes_find_what_one_finds(tiny_root, labelled, tmp_path):
    flags = [*RUN, "--data_path", tiny_root / "train", "--knn_data", labelled, "--batch_size_per_gpu", 3, "--epochs", 1]
    run_script("main_dino.py", *flags, "--knn_every", 1, "--output_dir", tmp_path, processes=2)
    (line,) = log_without_times(tmp_path)
    assert accuracies_printed(labelled, tmp_path / "checkpoint.pth") == pytest.approx(
        [line["knn_top1"], line["knn_top5"]]
    )


def test_it_looks_every_so_many_epochs_and_behind_the_last(tiny_root, tmp_path):
    folder = train(tiny_root, tmp_path, "--knn_every", 2, "--epochs", 5)
    assert [line["epoch"] for line in log_without_times(folder) if "knn_top1" in line] == [1, 3, 4]


# ---- no trace ----


RESNET = ("--arch", "resnet18", "--use_fp16", "false")  # its batch norms keep statistics


@pytest.fixture(scope="module")
def without(tiny_root, tmp_path_factory):
    return train(tiny_root, tmp_path_factory.mktemp("without"), *RESNET)


@pytest.mark.xdist_group("knn")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_is_the_same_with_it_and_without(without, tiny_root, tmp_path, workers):
    with_it = train(tiny_root, tmp_path, *RESNET, "--knn_every", 1, "--num_workers", workers)
    one, other = checkpoint(without), checkpoint(with_it)
    for part in ("student", "teacher", "dino_loss"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    logs = [log_without_times(folder) for folder in (without, with_it)]
    assert logs[0] == [{k: v for k, v in line.items() if not k.startswith("knn_")} for line in logs[1]]


def test_a_run_killed_while_it_looks_goes_on_there(tiny_root, tmp_path):
    """A pipe in place of an image holds the evaluation up, in which the run is killed."""
    data = tmp_path / "labelled"
    for name in ("astronaut", "brick"):
        (data / name).mkdir(parents=True)
        for path in sorted((tiny_root / "train" / name).iterdir()):
            (data / name / path.name).symlink_to(path.resolve())
    flags = ("--knn_every", 1, "--knn_data", data)
    undisturbed = train(tiny_root, tmp_path / "undisturbed", *flags)

    image = sorted((data / "brick").iterdir())[3]
    real = image.readlink()
    image.unlink()
    os.mkfifo(image)
    folder = tmp_path / "killed"
    words = [*RUN, "--data_path", tiny_root / "train", "--output_dir", folder, *flags]
    command = [sys.executable, ROOT / "main_dino.py", *map(str, words)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("Averaged stats"):
            break
    until = time.monotonic() + 60
    while not (folder / "checkpoint.pth").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    assert run.poll() is None  # it waits for the image
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert (checkpoint(folder)["epoch"], checkpoint(folder)["step"]) == (0, 5)
    image.unlink()
    image.symlink_to(real)
    out = run_script(ROOT / "main_dino.py", *words).stdout
    assert "going on in epoch 0 behind step 5" in out
    assert log_without_times(folder) == log_without_times(undisturbed)
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        one, other = (checkpoint(f, name) for f in (folder, undisturbed))
        assert one["health"] == other["health"]
        assert all(torch.equal(one["teacher"][key], other["teacher"][key]) for key in one["teacher"])


@pytest.fixture(scope="module")
def looking(tiny_root, sample_root, tmp_path_factory):
    """Flags of a run that looks for some seconds, and the folder of one that nothing happened to."""
    flags = ("--knn_every", 1, "--knn_data", sample_root, "--epochs", 1, "--warmup_epochs", 0, "--num_workers", 2)
    return flags, train(tiny_root, tmp_path_factory.mktemp("looking"), *flags)


@pytest.mark.xdist_group("looking")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_while_it_looks_ends_the_run_at_once_and_it_goes_on_there(looking, tiny_root, tmp_path, number):
    (flags, undisturbed), folder = looking, tmp_path / "stopped"
    words = [*RUN, "--data_path", tiny_root / "train", "--output_dir", folder, *flags]
    command = [sys.executable, ROOT / "main_dino.py", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, start_new_session=True, **pipes)
    next(line for line in run.stdout if line.startswith("Features:"))
    os.killpg(run.pid, number)  # the loaders get it too
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (128 + number, "")
    assert "stopped behind epoch 0" in out
    assert "[100/540]" not in out
    assert not (folder / "log.txt").exists()
    assert "going on in epoch 0 behind step 5" in run_script(ROOT / "main_dino.py", *words).stdout
    assert log_without_times(folder) == log_without_times(undisturbed)


def test_the_best_of_other_images_is_forgotten(tiny_root, labelled, tmp_path):
    flags = ("--knn_every", 1, "--warmup_epochs", 0, "--allow_changed_args", "true")
    train(tiny_root, tmp_path, *flags, "--epochs", 1, "--knn_data", tiny_root)
    kept = checkpoint(tmp_path)
    kept["health"]["best_knn"] = 100.0
    torch.save(kept, tmp_path / "checkpoint.pth")
    train(tiny_root, tmp_path, *flags, "--epochs", 2, "--knn_data", labelled)
    assert checkpoint(tmp_path, "checkpoint_best.pth")["epoch"] == 2
    assert checkpoint(tmp_path)["health"]["best_knn"] < 100


def test_a_run_that_goes_on_remembers_the_best(capsys):
    args = arguments_of(main_dino)
    curves = dino_health.Curves(arguments_of(main_dino, "--tensorboard", "off"))
    first = dino_health.HealthMonitor(args, 5, curves)
    first.check_epoch({"epoch": 3, "knn_top1": 40.0})
    second = dino_health.HealthMonitor(args, 5, curves, first.state_dict())
    second.check_epoch({"epoch": 4, "knn_top1": 39.0})
    assert (second.best_knn, second.best_epoch) == (40.0, 3)
    second.check_epoch({"epoch": 5, "knn_top1": 40.5})
    assert (second.best_knn, second.best_epoch) == (40.5, 5)


def test_features_that_are_not_finite_are_an_error(tiny_root):
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4))
    torch.nn.init.constant_(network[2].weight, float("nan"))
    sets = dino_data.find_labelled(str(tiny_root), dino_crops.eval_transform(32), False, "--knn_data")
    features = eval_knn.labelled_features(network, sets, 8, 0, torch.device("cpu"))
    with pytest.raises(utils.UserError, match="the features hold NaN"):
        eval_knn.knn_accuracies(*features, [20], 0.07)
