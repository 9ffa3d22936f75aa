"""k-NN: the classifier against goldens and a float64 loop, and the script end to end."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL_RUN, arguments_of, run_script, shared, sizes_of_results
from torchvision import datasets

import dino_backbones
import dino_crops
import dino_features
import eval_knn
import main_dino
import utils
from utils import UserError

SMALL = ["--arch", "vit_nano", "--image_size", 32, "--nb_knn", 1, 5, "--num_workers", 0, "--device", "cpu"]
RESULT = re.compile(r"^(\d+)-NN classifier result: Top1: ([\d.]+), Top5: ([\d.]+)$", re.M)

# ---- classifier ----


def slow_knn(train, train_labels, test, test_labels, k, T):
    """Top-1 and top-5 in percent, image by image in float64. Ties go to the class with the lower index."""
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


def test_accuracies_match_the_golden_values():
    golden = np.load(shared("goldens/knn.npz"))
    tensors = [torch.from_numpy(golden[name]) for name in ("train", "train_labels", "test", "test_labels")]
    for k, want in json.loads(str(golden["result"])).items():
        assert eval_knn.knn_classifier(*tensors, int(k), 0.07) == pytest.approx(tuple(want), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_accuracies_match_a_float64_loop(classes, k):
    train, test = features(60, 8, 1, classes), features(40, 8, 2, classes)
    assert eval_knn.knn_classifier(*train, *test, k, 0.07) == pytest.approx(slow_knn(*train, *test, k, 0.07))


def test_a_nearer_neighbor_outvotes_a_farther_majority_at_low_temperature():
    train = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), dim=1)
    labels, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    # exp(1 / T) exceeds 2 · exp(0.6 / T) below T = 0.4 / ln 2 = 0.577.
    assert eval_knn.knn_classifier(train, labels, test, torch.tensor([0]), 3, 0.5)[0] == 100.0
    assert eval_knn.knn_classifier(train, labels, test, torch.tensor([0]), 3, 0.7)[0] == 0.0


def test_top5_uses_at_most_k_neighbors():
    # One neighbor per class. The true class 4 is the farthest, so it is ranked fifth, with a vote (k=5) or without.
    train, labels = torch.tensor([[1.0], [0.9], [0.8], [0.7], [0.6]]), torch.arange(5)
    top5 = {k: eval_knn.knn_classifier(train, labels, torch.ones(1, 1), torch.tensor([4]), k, 1.0)[1] for k in (4, 5)}
    assert top5 == {4: 0.0, 5: 100.0}


def test_a_k_larger_than_the_training_set_uses_all_of_it():
    train, test = features(10, 4, 1, 3), features(1, 4, 2, 3)
    assert eval_knn.knn_classifier(*train, *test, 200, 0.07) == slow_knn(*train, *test, 200, 0.07)


def test_class_indices_above_1000_are_supported():
    (train, labels), (test, targets) = features(50, 6, 1, 5), features(20, 6, 2, 5)
    sparse = (train, labels * 400, test, targets * 400)
    assert eval_knn.knn_classifier(*sparse, 5, 0.07) == slow_knn(*sparse, 5, 0.07)


def test_a_low_temperature_does_not_overflow():
    train, test = features(30, 6, 1, 4), features(20, 6, 2, 4)
    assert eval_knn.knn_classifier(*train, *test, 7, 1e-3)[0] == eval_knn.knn_classifier(*train, *test, 1, 0.07)[0]


def test_a_large_search_runs_in_chunks_of_bounded_memory():
    train, (test, labels) = features(2**20, 4, 1, 12), features(40, 4, 2, 12)
    with sizes_of_results() as sizes:
        whole = dino_features.knn_accuracies(*train, test, labels, [3, 1000], 0.07)
    assert max(sizes) <= 2**25 < len(train[0]) * len(test)
    halves = [dino_features.knn_accuracies(*train, test[i::2], labels[i::2], [3, 1000], 0.07) for i in (0, 1)]
    for k in (3, 1000):
        assert whole[k] == pytest.approx(np.mean([half[k] for half in halves], axis=0))


def test_features_with_nan_are_an_error_and_not_a_perfect_score():
    train, labels = features(10, 4, 1, 3)
    train[3, 2] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        eval_knn.knn_classifier(train, labels, *features(5, 4, 2, 3), 5, 0.07)


# ---- the script ----


@pytest.fixture(scope="module")
def trained(tiny_root, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    args = arguments_of(main_dino, *SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", output)
    main_dino.train_dino(args)
    return output / "checkpoint.pth"


def evaluate(capsys, *flags):
    capsys.readouterr()
    eval_knn.main(arguments_of(eval_knn, *SMALL, *flags))
    return capsys.readouterr().out


def test_printed_accuracies_match_features_extracted_image_by_image(capsys, tiny_root, trained):
    out = evaluate(capsys, "--data_path", tiny_root, "--pretrained_weights", trained)
    assert f"loaded 54 of 54 tensors from {trained} [teacher], trained at 32 pixels\n" in out
    model, _ = dino_backbones.build_backbone("vit_nano", 16, 32)
    dino_backbones.load_weights(model.eval(), str(trained))
    tensors, transform = [], dino_crops.eval_transform(32)
    for part in ("train", "val"):
        folder = datasets.ImageFolder(tiny_root / part)
        with torch.no_grad():
            rows = [model(utils.normalize(transform(image))[None])[0] for image, _ in folder]
        tensors += [F.normalize(torch.stack(rows), dim=1), torch.tensor(folder.targets)]
    assert [int(k) for k, _, _ in RESULT.findall(out)] == [1, 5]
    for k, top1, top5 in RESULT.findall(out):
        assert (float(top1), float(top5)) == pytest.approx(slow_knn(*tensors, int(k), 0.07))


def test_checkpoint_key_selects_the_student(capsys, tiny_root, trained):
    flags = ["--data_path", tiny_root, "--pretrained_weights", trained, "--checkpoint_key", "student"]
    assert "[student]" in evaluate(capsys, *flags)


def test_dumped_features_give_the_same_result_without_a_network(capsys, tiny_root, trained, tmp_path):
    flags = ["--data_path", tiny_root, "--pretrained_weights", trained, "--dump_features", tmp_path]
    first = evaluate(capsys, *flags, "--baselines", "true")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth"}
    train = torch.load(tmp_path / "trainfeat.pth", weights_only=True)
    assert train.shape == (40, 128)
    assert torch.allclose(train.norm(dim=1), torch.ones(40))
    assert RESULT.findall(evaluate(capsys, "--load_features", tmp_path)) == RESULT.findall(first)

    table = first.splitlines()[-5:]
    assert [line[:20].strip() for line in table] == [
        *("k-NN top-1 (%)", "chance", "raw pixels", "untrained network", "trained teacher")
    ]
    assert table[1].split()[1:] == ["25.0", "25.0"]
    assert table[4].split()[2:] == [f"{float(top1):.1f}" for _, top1, _ in RESULT.findall(first)]


@pytest.mark.usefixtures("sample_root")
def test_the_defaults_evaluate_an_untrained_network_on_the_sample_images(capsys):
    out = evaluate(capsys, "--batch_size_per_gpu", 512)
    assert "1080 training and 270 validation images in 18 classes" in out
    assert "warning: no weights were published for vit_nano" in out
    assert len(RESULT.findall(out)) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path", "/no/where"], "--data_path /no/where"),
        (["--load_features", "x", "--baselines", "1"], "Remove --dump_features and --baselines"),
        (["--dump_features", str(ROOT / "README.md")], "can't write to --dump_features"),
        (["--pretrained_weights", "/no/where.pth"], "/no/where.pth"),
        (["--arch", "vit_tiny", "--pretrained_weights", "TRAINED"], "Check --arch"),
        (["--pretrained_weights", "TRAINED", "--checkpoint_key", "pupil"], "student, teacher"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_and_exit_code_2(refusal, tiny_root, trained, flags, message):
    flags = [trained if flag == "TRAINED" else flag for flag in flags]
    line = refusal(eval_knn, *SMALL, "--data_path", tiny_root, *flags)
    assert message in line


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trainlabels": torch.zeros(3, dtype=torch.long)}, "4 train features and 3 labels"),
        ({"trainfeat": torch.zeros(4, 8, dtype=torch.long)}, "must hold tensors: floats [N, D]"),
        ({"testfeat": [1, 2]}, "must hold tensors: floats [N, D]"),
        ({"testlabels": torch.zeros(2)}, "testlabels.pth must hold class indices"),
        ({"testlabels": torch.tensor([0, -1])}, "testlabels.pth must hold class indices"),
        ({"testfeat": torch.zeros(2, 9)}, "train features have 8 dimensions, test features 9"),
    ],
)
def test_feature_files_that_do_not_fit_together_are_an_error(tmp_path, changed, message):
    files = {"trainfeat": torch.zeros(4, 8), "trainlabels": torch.zeros(4).long()}
    files |= {"testfeat": torch.zeros(2, 8), "testlabels": torch.zeros(2).long()}
    for name, content in (files | changed).items():
        torch.save(content, tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match=re.escape(message)):
        eval_knn.main(arguments_of(eval_knn, *SMALL, "--load_features", tmp_path))


def test_half_precision_feature_files_are_supported(capsys, tmp_path):
    (train, labels), (test, targets) = features(9, 4, 1, 2), features(3, 4, 2, 2)
    files = {"trainfeat": train.half(), "trainlabels": labels.int(), "testfeat": test.half(), "testlabels": targets}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
    assert RESULT.findall(evaluate(capsys, "--load_features", tmp_path, "--nb_knn", 3))[0][2] == "100.00"


@pytest.mark.slow
def test_three_processes_print_what_one_prints(tiny_root, trained):
    flags = [*SMALL, "--data_path", tiny_root, "--pretrained_weights", trained, "--batch_size_per_gpu", 3]
    one = run_script("eval_knn.py", *flags).stdout
    three = run_script("eval_knn.py", *flags, processes=3).stdout
    assert RESULT.findall(three) == RESULT.findall(one)
    assert len(RESULT.findall(one)) == 2
