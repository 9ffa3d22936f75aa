"""k-NN: the classifier against a slow obvious one, and the script end to end."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL_RUN, run_script, shared
from torchvision import datasets

import dino_backbones
import dino_cli
import dino_crops
import dino_features
import eval_knn
import main_dino
import utils
from utils import UserError

# ---- classifier ----


def knn_by_hand(train, train_labels, test, test_labels, k, T):
    """Top-1 and top-5 in per cent, image by image in float64; ties go to the class with the lower number."""
    train, test = train.double().tolist(), test.double().tolist()
    classes = max(*train_labels.tolist(), *test_labels.tolist()) + 1
    hits = [0, 0]
    for row, label in zip(test, test_labels.tolist(), strict=True):
        similarity = [sum(a * b for a, b in zip(row, other, strict=True)) for other in train]
        nearest = sorted(range(len(train)), key=lambda j: -similarity[j])[:k]
        votes = [0.0] * classes
        for j in nearest:
            votes[int(train_labels[j])] += math.exp(similarity[j] / T)
        ranking = sorted(range(classes), key=lambda c: (-votes[c], c))
        hits[0] += label in ranking[:1]
        hits[1] += label in ranking[: min(5, k)]
    return 100 * hits[0] / len(test), 100 * hits[1] / len(test)


def features(number, width, seed, classes):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (number,), generator=generator)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return F.normalize(centers[labels] + 1.5 * torch.randn(number, width, generator=generator), dim=1), labels


def test_accuracies_match_the_reference_numbers():
    reference = np.load(shared("goldens/knn.npz"))
    tensors = [torch.from_numpy(reference[name]) for name in ("train", "train_labels", "test", "test_labels")]
    for k, want in json.loads(str(reference["result"])).items():
        assert eval_knn.knn_classifier(*tensors, int(k), 0.07) == pytest.approx(tuple(want), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_accuracies_equal_those_of_the_slow_obvious_way(classes, k):
    train, test = features(60, 8, 1, classes), features(40, 8, 2, classes)
    assert eval_knn.knn_classifier(*train, *test, k, 0.07) == pytest.approx(knn_by_hand(*train, *test, k, 0.07))


def test_nearer_neighbours_outvote_a_farther_majority():
    train = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), dim=1)
    labels, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    # e^(1/T) against 2·e^(0.6/T): the single nearest wins below T = 0.4 / ln 2 = 0.577.
    assert eval_knn.knn_classifier(train, labels, test, torch.tensor([0]), 3, 0.5)[0] == 100.0
    assert eval_knn.knn_classifier(train, labels, test, torch.tensor([0]), 3, 0.7)[0] == 0.0


def test_one_test_image_and_a_k_above_the_training_set():
    train, test = features(10, 4, 1, 3), features(1, 4, 2, 3)
    got = eval_knn.knn_classifier(*train, *test, 200, 0.07)
    assert got == knn_by_hand(*train, *test, 200, 0.07)


def test_class_numbers_over_a_thousand_are_counted():
    train, labels = features(50, 6, 1, 5)
    test, targets = features(20, 6, 2, 5)
    sparse = (train, labels * 400, test, targets * 400)
    assert eval_knn.knn_classifier(*sparse, 5, 0.07) == knn_by_hand(*sparse, 5, 0.07)


def test_a_low_temperature_does_not_overflow():
    train, test = features(30, 6, 1, 4), features(20, 6, 2, 4)
    assert eval_knn.knn_classifier(*train, *test, 7, 1e-3)[0] == eval_knn.knn_classifier(*train, *test, 1, 0.07)[0]


def test_chunks_change_nothing(monkeypatch):
    train, test = features(70, 8, 1, 6), features(45, 8, 2, 6)
    whole = eval_knn.knn_accuracies(*train, *test, [3, 10], 0.07)
    monkeypatch.setattr(dino_features, "NUMBERS_AT_ONCE", 100)
    assert eval_knn.knn_accuracies(*train, *test, [3, 10], 0.07) == whole
    assert whole == {k: eval_knn.knn_classifier(*train, *test, k, 0.07) for k in (3, 10)}


def test_features_that_are_not_finite_are_an_error_and_not_a_perfect_score():
    train, labels = features(10, 4, 1, 3)
    train[3, 2] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        eval_knn.knn_classifier(train, labels, *features(5, 4, 2, 3), 5, 0.07)


def test_memory_does_not_grow_with_the_number_of_neighbours(monkeypatch):
    largest = []
    topk = torch.Tensor.topk

    def spy(self, *args, **kwargs):
        largest.append(self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", spy)
    monkeypatch.setattr(dino_features, "NUMBERS_AT_ONCE", 1000)
    eval_knn.knn_classifier(*features(300, 4, 1, 3), *features(50, 4, 2, 3), 300, 0.07)
    assert max(largest) <= 1000


# ---- the script ----


@pytest.fixture(scope="module")
def trained(tiny_root, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    parser = dino_cli.OneLineParser(parents=[main_dino.get_args_parser()])
    flags = [*SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", output]
    main_dino.train_dino(parser.parse_args([str(flag) for flag in flags]))
    return output / "checkpoint.pth"


def evaluate(monkeypatch, *flags):
    fixed = ["--arch", "vit_nano", "--image_size", 32, "--nb_knn", 1, 5, "--num_workers", 0, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", *map(str, [*fixed, *flags])])
    dino_cli.run(eval_knn.main, eval_knn.get_args_parser(), "")


RESULT = re.compile(r"^(\d+)-NN classifier result: Top1: ([\d.]+), Top5: ([\d.]+)$", re.M)


def test_a_checkpoint_is_evaluated_and_the_tensors_are_counted(monkeypatch, capsys, tiny_root, trained):
    evaluate(monkeypatch, "--data_path", tiny_root, "--pretrained_weights", trained)
    out = capsys.readouterr().out
    assert f"loaded 54 of 54 tensors from {trained} [teacher], trained at 32 pixels\n" in out
    assert [int(k) for k, _, _ in RESULT.findall(out)] == [1, 5]

    # The same accuracies from features made image by image.

    model, _ = dino_backbones.build_backbone("vit_nano", 16, 32)
    dino_backbones.load_weights(model.eval(), str(trained))
    tensors = []
    for part in ("train", "val"):
        folder = datasets.ImageFolder(tiny_root / part)
        transform = dino_crops.eval_transform(32)
        with torch.no_grad():
            rows = [model(utils.normalize(transform(image))[None])[0] for image, _ in folder]
        tensors += [F.normalize(torch.stack(rows), dim=1), torch.tensor(folder.targets)]
    for k, top1, top5 in RESULT.findall(out):
        assert (float(top1), float(top5)) == pytest.approx(knn_by_hand(*tensors, int(k), 0.07))


def test_student_and_teacher_are_told_apart(monkeypatch, capsys, tiny_root, trained):
    evaluate(monkeypatch, "--data_path", tiny_root, "--pretrained_weights", trained, "--checkpoint_key", "student")
    assert "[student]" in capsys.readouterr().out


def test_dumped_features_give_the_same_result_without_a_network(monkeypatch, capsys, tiny_root, trained, tmp_path):
    folder = tmp_path / "features"
    evaluate(
        monkeypatch,
        "--data_path",
        tiny_root,
        "--pretrained_weights",
        trained,
        "--dump_features",
        folder,
        "--baselines",
        1,
    )
    first = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == sorted(eval_knn.FEATURE_FILES)
    train = torch.load(folder / "trainfeat.pth", weights_only=True)
    assert train.shape == (40, 128)
    assert torch.allclose(train.norm(dim=1), torch.ones(40))
    evaluate(monkeypatch, "--load_features", folder)
    assert RESULT.findall(capsys.readouterr().out) == RESULT.findall(first)

    rows = [line[:20].strip() for line in first.splitlines()[-5:]]
    assert rows == ["k-NN top-1 (%)", "chance", "raw pixels", "untrained network", "trained teacher"]
    assert first.splitlines()[-4].split()[1:] == ["25.0", "25.0"]


def test_images_and_weights_left_out_mean_the_sample_and_random_ones(monkeypatch, capsys, sample_root):
    evaluate(monkeypatch, "--batch_size_per_gpu", 512)
    out = capsys.readouterr().out
    assert "4320 training and 1080 validation images in 18 classes" in out
    assert "warning: no weights were published for vit_nano" in out
    assert "trained" not in out
    assert len(RESULT.findall(out)) == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data_path", "/no/where"], "--data_path /no/where"),
        (["--nb_knn", "0"], "--nb_knn 0 must be at least 1"),
        (["--temperature", "0"], "--temperature 0.0 must be above 0"),
        (["--temperature", "nan"], "--temperature nan must be above 0"),
        (["--load_features", "x", "--baselines", "1"], "leave out --dump_features and --baselines"),
        (["--dump_features", str(ROOT / "README.md")], "can't write to --dump_features"),
        (["--image_size", "8"], "smaller than one patch"),
        (["--load_features", "/no/where"], "/no/where/trainfeat.pth"),
        (["--pretrained_weights", "/no/where.pth"], "there is no file /no/where.pth"),
        (["--arch", "vit_tiny", "--pretrained_weights", "TRAINED"], "Check --arch"),
        (["--pretrained_weights", "TRAINED", "--checkpoint_key", "pupil"], "could be one of student, teacher"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(monkeypatch, capsys, tiny_root, trained, flags, says):
    flags = [str(trained) if flag == "TRAINED" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, "--data_path", tiny_root, *flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert says in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({1: torch.zeros(3, dtype=torch.long)}, "4 train features and 3 labels"),
        ({0: torch.zeros(4, 8, dtype=torch.long)}, "must hold tensors, floats"),
        ({2: [1, 2]}, "must hold tensors, floats"),
        ({3: torch.zeros(2)}, "testlabels.pth must hold class numbers"),
        ({3: torch.tensor([0, -1])}, "testlabels.pth must hold class numbers"),
        ({2: torch.zeros(2, 9)}, "train features are 8 wide, test features 9"),
    ],
)
def test_feature_files_that_do_not_fit_together_are_errors(tmp_path, changed, says):
    tensors = [torch.zeros(4, 8), torch.zeros(4).long(), torch.zeros(2, 8), torch.zeros(2).long()]
    for i, name in enumerate(eval_knn.FEATURE_FILES):
        torch.save(changed.get(i, tensors[i]), tmp_path / name)
    with pytest.raises(UserError, match=re.escape(says)):
        eval_knn.load_features(tmp_path, "cpu")


def test_dumped_features_in_half_precision_are_read(tmp_path):
    for name, tensor in zip(eval_knn.FEATURE_FILES, (*features(9, 4, 1, 2), *features(3, 4, 2, 2)), strict=True):
        torch.save(tensor.half() if tensor.is_floating_point() else tensor.int(), tmp_path / name)
    assert eval_knn.knn_accuracies(*eval_knn.load_features(tmp_path, "cpu"), [3], 0.07)[3][1] == 100.0


@pytest.mark.slow
def test_two_processes_print_what_one_prints(tiny_root, trained):
    flags = ["--arch", "vit_nano", "--image_size", "32", "--data_path", tiny_root, "--pretrained_weights", trained]
    flags += ["--nb_knn", "1", "5", "--num_workers", "0", "--device", "cpu", "--batch_size_per_gpu", "3"]
    one = run_script(ROOT / "eval_knn.py", *flags).stdout
    three = run_script(ROOT / "eval_knn.py", *flags, processes=3).stdout
    assert RESULT.findall(three) == RESULT.findall(one)
    assert len(RESULT.findall(one)) == 2
