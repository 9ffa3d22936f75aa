"""Logistic regression: the minimum against scipy's, average precision against its definition, and the script."""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import arguments_of, assert_near
from scipy.optimize import minimize
from torchvision import datasets

import dino_backbones
import dino_crops
import eval_knn
import eval_logistic
import utils
from utils import UserError

SMALL = ["--arch", "vit_nano", "--image_size", 32, "--num_workers", 0, "--device", "cpu"]
RESULT = re.compile(r"^Logistic regression with --l2 (\S+): Top1: ([\d.]+), Top5: ([\d.]+)$", re.M)
CLASSES = ("astronaut", "brick", "coffee", "text")

# ---- the minimum ----


def features(number=40, width=5, spread=1.0, classes=3):
    """Features whose dimensions vary by a factor of `spread`, far from zero, and labels that they say something of."""
    labels = torch.arange(number) % classes
    rows = torch.randn(number, width) + 2 * torch.randn(classes, width)[labels]
    return (rows * torch.logspace(0, -np.log10(spread), width) + 1).float(), labels


def several_labels(number=40, width=5, classes=3):
    rows, labels = features(number, width, classes=classes)
    each = 2 * F.one_hot(labels, classes) - 1
    each[torch.rand(each.shape) < 0.2] = 0
    each[torch.rand(each.shape) < 0.1] = 1
    return rows, each


def slow_objective(weight, rows, labels, l2):
    """The objective as the top of the script states it, image by image."""
    weight, rows, labels = weight.reshape(-1, rows.shape[1]), rows.double().numpy(), labels.numpy()
    if labels.ndim == 1:
        scores = rows @ weight.T
        losses = [np.log(np.exp(z).sum()) - z[label] for z, label in zip(scores, labels, strict=True)]
        return np.mean(losses) + l2 / len(rows) / 2 * (weight**2).sum()
    total = 0.0
    for w, column in zip(weight, labels.T, strict=True):
        losses = [np.log(1 + np.exp(-y * (w @ x))) for x, y in zip(rows, column, strict=True) if y]
        total += np.mean(losses) + l2 / len(losses) / 2 * (w @ w)
    return total


def slow_minimum(rows, labels, l2, classes=3):
    start = np.zeros(classes * rows.shape[1])
    found = minimize(slow_objective, start, (rows, labels, l2), method="BFGS", options={"gtol": 1e-6})
    return found.fun, torch.from_numpy(found.x.reshape(classes, -1))


@pytest.mark.parametrize("l2", [0.1, 10.0])
@pytest.mark.parametrize("make", [features, several_labels])
def test_the_weights_are_the_minimum_of_the_objective(make, l2):
    rows, labels = make()
    least, weight = slow_minimum(rows, labels, l2)
    precise = eval_logistic.fit(rows, labels, 3, l2, tolerance=1e-9)
    assert_near(precise, weight, 1e-3)
    default = eval_logistic.fit(rows, labels, 3, l2)
    assert least - 1e-6 <= slow_objective(default.numpy(), rows, labels, l2) <= least + 1e-4


@pytest.mark.parametrize("make", [features, several_labels])
def test_the_distance_to_the_minimum_is_never_underestimated(make):
    rows, labels = make()
    least, best = slow_minimum(rows, labels, 0.1)
    objective = eval_logistic.Objective(rows, labels, 0.1, 3)
    for scale in (0.01, 0.1, 1.0):
        weight = best.clone()
        weight[0] += scale * torch.randn_like(best[0])
        value, _, gap = objective.measure(weight)
        assert value.item() == pytest.approx(slow_objective(weight.numpy(), rows, labels, 0.1))
        assert 0 < value.item() - least <= gap + 1e-9


def test_features_that_vary_by_a_factor_of_1000_converge_within_100_iterations(capsys):
    rows, labels = features(400, 30, spread=1000.0)
    eval_logistic.fit(rows, labels, 3)
    out = capsys.readouterr().out
    assert "warning" not in out
    assert float(re.findall(r"at most (\S+) above its minimum", out)[-1]) <= 1e-4


def test_too_few_iterations_are_a_warning(capsys):
    eval_logistic.fit(*features(400, 30, spread=1000.0), 3, max_iterations=7)
    out = capsys.readouterr().out
    assert "L-BFGS: [7/7]" in out
    assert re.search(r"^warning: after 7 iterations the objective may still be \S+ above its minimum", out, re.M)


@pytest.mark.parametrize("make", [features, several_labels])
def test_large_sets_are_computed_in_chunks_with_the_same_result(monkeypatch, make):
    rows, labels = make()
    whole = eval_logistic.fit(rows, labels, 3)
    monkeypatch.setattr(eval_logistic, "LOGITS_AT_ONCE", 3 * 7)
    assert_near(eval_logistic.fit(rows, labels, 3), whole, 1e-6)
    if labels.ndim == 1:
        top1, top5 = eval_logistic.accuracies(whole, rows, labels)
        right = [(rows[i].double() @ whole.T).argmax() == labels[i] for i in range(40)]
        assert (top1, top5) == (pytest.approx(100 * sum(right).item() / 40), 100)
        assert 34 < top1 < 100


# ---- average precision ----


def slow_average_precisions(scores, labels):
    """VOC's two forms, from the definition of precision and recall at each threshold."""
    pairs = sorted([(s, y) for s, y in zip(scores, labels, strict=True) if y], key=lambda pair: -pair[0])
    positives = sum(y > 0 for _, y in pairs)
    curve = []  # (recall, precision)
    for rank in range(1, len(pairs) + 1):
        hits = sum(y > 0 for _, y in pairs[:rank])
        curve.append((hits / positives, hits / rank))

    def precision_at(recall):
        return max((p for r, p in curve if r >= recall), default=0.0)

    area = sum(precision_at(k / positives) / positives for k in range(1, positives + 1))
    return sum(precision_at(t / 10) for t in range(11)) / 11, area


@pytest.mark.parametrize("positives", [1, 7, 20])
def test_average_precisions_match_their_definition(positives):
    labels = np.array([1] * positives + [-1] * 30 + [0] * 10)
    for seed in range(5):
        scores = np.random.RandomState(seed).randn(len(labels)) + 0.8 * (labels > 0)
        got = eval_logistic.average_precisions(scores, labels)
        assert got == pytest.approx(slow_average_precisions(scores, labels))


def test_average_precision_of_a_small_example():
    # Hits at ranks 1 and 4: precision 1 up to recall 0.5, then 0.5. The image with 0 would be first and is not counted.
    got = eval_logistic.average_precisions([9, 5, 4, 3, 2], [0, 1, -1, -1, 1])
    assert got == pytest.approx(((6 * 1 + 5 * 0.5) / 11, 0.5 * 1 + 0.5 * 0.5))
    assert np.isnan(eval_logistic.average_precisions([1, 2], [-1, 0])).all()


# ---- the script ----


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for arch in ("vit_nano", "resnet18"):
        torch.manual_seed(1)
        torch.save(dino_backbones.build_backbone(arch, 16, 32)[0].state_dict(), folder / f"{arch}.pth")
    return folder


def evaluate(capsys, *flags):
    capsys.readouterr()
    eval_logistic.main(arguments_of(eval_logistic, *SMALL, *flags))
    return capsys.readouterr().out


def by_hand(root, weights, arch="vit_nano", scale=True):
    """Features [N, D] and labels of train and val, computed image by image."""
    model = dino_backbones.build_backbone(arch, 16, 32)[0].eval()
    model.load_state_dict(torch.load(weights / f"{arch}.pth", weights_only=True))
    transform, tensors = dino_crops.eval_transform(32), []
    for part in ("train", "val"):
        folder = datasets.ImageFolder(root / part)
        with torch.no_grad():
            rows = torch.cat([model(utils.normalize(transform(image))[None]) for image, _ in folder])
        tensors += [F.normalize(rows, dim=1) if scale else rows, torch.tensor(folder.targets)]
    return tensors


@pytest.mark.parametrize(("arch", "scale"), [("vit_nano", True), ("vit_nano", False), ("resnet18", True)])
def test_printed_accuracies_are_those_of_features_computed_image_by_image(capsys, tiny_root, weights, arch, scale):
    flags = ["--arch", arch, "--pretrained_weights", weights / f"{arch}.pth", "--normalize", scale]
    out = evaluate(capsys, "--data_path", tiny_root, *flags, "--l2", 0.1, 100)
    assert "40 training and 20 validation images in 4 classes" in out
    train, labels, test, targets = by_hand(tiny_root, weights, arch, scale)
    expected = []
    for l2 in ("0.1", "100"):
        weight = eval_logistic.fit(train, labels, 4, float(l2))
        right = ((test.double() @ weight.T).argmax(dim=1) == targets).float().mean().item()
        expected.append((l2, f"{100 * right:.2f}", "100.00"))
    assert RESULT.findall(out) == expected


def test_dumped_features_are_read_here_and_by_knn(capsys, tiny_root, weights, tmp_path):
    flags = ["--data_path", tiny_root, "--pretrained_weights", weights / "vit_nano.pth"]
    first = evaluate(capsys, *flags, "--dump_features", tmp_path)
    assert RESULT.findall(evaluate(capsys, "--load_features", tmp_path)) == RESULT.findall(first)
    outputs = []
    for source in (["--load_features", tmp_path], flags):
        eval_knn.main(arguments_of(eval_knn, *SMALL, *source, "--nb_knn", 5))
        outputs.append(capsys.readouterr().out.splitlines()[-1])
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("5-NN")


# ---- a part of the training images ----


def test_a_list_trains_on_the_images_that_it_names_alone(capsys, sample_root, weights, tmp_path):
    parts = {"train": 8, "part/train": 3, "val": 5, "part/val": 5}
    for part, number in parts.items():
        for i, name in enumerate(CLASSES):
            (tmp_path / part / name).mkdir(parents=True)
            for source in sorted((sample_root / part.split("/")[-1] / name).iterdir())[:number]:
                (tmp_path / part / name / f"n{i}_{source.name}").symlink_to(source)
    names = sorted(path.name for path in (tmp_path / "part" / "train").glob("*/*"))
    (tmp_path / "list.txt").write_text("\n".join(reversed(names)) + "\n\n")
    flags = ["--pretrained_weights", weights / "vit_nano.pth", "--data_path"]
    listed = evaluate(capsys, *flags, tmp_path, "--train_list", tmp_path / "list.txt")
    assert "12 training and 20 validation images in 4 classes" in listed
    assert listed.splitlines()[-2:] == evaluate(capsys, *flags, tmp_path / "part").splitlines()[-2:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "text/0001.png\nnone.png\nother.png\n",
            "names images that are not in train (2): none.png, other.png. Check --data_path",
        ),
        ("0001.png\n", "names images that are in train more than once (1): 0001.png. Write class/name"),
        ("brick/0001.png\nbrick/0002.png\n", "only one class in the training images"),
        (None, "can't read --train_list"),
    ],
)
def test_a_list_that_does_not_fit_is_an_error(refusal, tiny_root, tmp_path, text, message):
    if text:
        (tmp_path / "list.txt").write_text(text)
    flags = ["--pretrained_weights", "random", "--data_path", tiny_root, "--train_list", tmp_path / "list.txt"]
    assert message in refusal(eval_logistic, *SMALL, *flags)


# ---- several labels per image ----


@pytest.fixture
def voc(tiny_root, tmp_path):
    """A folder in VOC's layout. The classes are the letters in the names of the sample's; one label in ten is 0."""
    lists = tmp_path / "VOC2007" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (tmp_path / "VOC2007" / "JPEGImages").mkdir()
    generator = np.random.RandomState(0)
    for part, folder in (("trainval", "train"), ("test", "val")):
        lines = {letter: [] for letter in "oc"}
        for source in sorted((tiny_root / folder).glob("*/*")):
            name = f"{part}_{source.parent.name}_{source.stem}"
            shutil.copy(source, tmp_path / "VOC2007" / "JPEGImages" / f"{name}.jpg")
            for letter, rows in lines.items():
                label = 0 if generator.rand() < 0.1 else 1 if letter in source.parent.name else -1
                rows.append(f"{name} {label:2}\n")
        for letter, rows in lines.items():
            (lists / f"{letter}_{part}.txt").write_text("".join(rows))
        (lists / f"{part}.txt").write_text("not read\n")
    return tmp_path / "VOC2007"


def test_mean_average_precisions_of_a_voc_folder(capsys, voc, tiny_root, weights, tmp_path):
    flags = ["--data_path", voc, "--pretrained_weights", weights / "vit_nano.pth", "--dump_features", tmp_path / "out"]
    out = evaluate(capsys, *flags)
    train, _, test, _ = by_hand(tiny_root, weights)
    labels = []
    for part in ("trainval", "test"):
        texts = [(voc / "ImageSets" / "Main" / f"{letter}_{part}.txt").read_text() for letter in "co"]
        labels.append(torch.tensor([[int(line.split()[1]) for line in text.splitlines()] for text in texts]).T)
    assert all(set(part.unique().tolist()) == {-1, 0, 1} for part in labels)
    scores = test.double() @ eval_logistic.fit(train, labels[0], 2).T
    found = [
        slow_average_precisions(*map(torch.Tensor.tolist, pair)) for pair in zip(scores.T, labels[1].T, strict=True)
    ]
    lines = out.splitlines()[-3:]
    for line, name, (points, area) in zip(lines, "co", found, strict=False):
        assert line.split() == [name, "AP:", f"{100 * points:.2f}", "(11", "points),", f"{100 * area:.2f}", "(area)"]
    points, area = 100 * np.mean(found, axis=0)
    last = f"Logistic regression with --l2 0.1: mAP: {points:.2f} (11 points), {area:.2f} (area)"
    assert lines[2] == last
    assert 20 < area < 100
    assert evaluate(capsys, "--load_features", tmp_path / "out").splitlines()[-1] == last
    with pytest.raises(UserError, match=r"floats \[N, D\] and labels \[N\]"):
        eval_knn.main(arguments_of(eval_knn, *SMALL, "--load_features", tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ImageSets/Main/c_test.txt", None, "c_test.txt: No such file or directory. VOC's test annotations"),
        ("ImageSets/Main/c_test.txt", "", "c_test.txt is empty"),
        (
            "ImageSets/Main/c_trainval.txt",
            "a 1\nb 2\n",
            "c_trainval.txt: line 2 must be an image and 1, -1 or 0, not 'b 2'",
        ),
        ("ImageSets/Main/c_trainval.txt", "a 1\nb -1\n", "c_trainval.txt and o_trainval.txt list different images"),
        ("JPEGImages/test_text_0001.jpg", None, "1 images of"),
    ],
)
def test_a_damaged_voc_folder_is_an_error(refusal, voc, name, text, message):
    if text is None:
        (voc / name).unlink()
    else:
        (voc / name).write_text(text)
    assert message in refusal(eval_logistic, *SMALL, "--pretrained_weights", "random", "--data_path", voc)


def test_the_parent_of_a_voc_folder_is_an_error_that_names_the_year(refusal, voc):
    line = refusal(eval_logistic, *SMALL, "--pretrained_weights", "random", "--data_path", voc.parent)
    assert line.endswith(f"has a folder per year. Use --data_path {voc}")


# ---- errors ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_features", "x", "--train_list", "y"], "Remove --dump_features and --train_list"),
        (["--load_features", "x", "--dump_features", "y"], "Remove --dump_features and --train_list"),
        (["--dump_features", "x", "--normalize", "false"], "Remove --normalize false"),
        (["--image_size", 30], "--image_size 30 is not a multiple of --patch_size 16"),
        (["--data_path", "/no/where"], "--data_path /no/where does not exist"),
        (["--load_features", "/no/where"], "--load_features /no/where has no trainfeat.pth. Use a folder that --dump_"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_and_exit_code_2(refusal, flags, message):
    assert message in refusal(eval_logistic, *SMALL, "--pretrained_weights", "random", *flags)


@pytest.mark.parametrize("labels", [[[0, 1], [1, 0]], [[5, -1], [-1, 5]], [[True, False], [False, True]]])
def test_labels_per_class_must_be_1_minus_1_or_0(refusal, tmp_path, labels):
    for part in ("train", "test"):
        torch.save(torch.eye(2), tmp_path / f"{part}feat.pth")
        torch.save(torch.tensor(labels), tmp_path / f"{part}labels.pth")
    line = refusal(eval_logistic, *SMALL, "--load_features", tmp_path)
    assert "trainlabels.pth must hold 1 (has the label), -1 (has not) and 0 (not counted)" in line


def test_features_of_nan_are_an_error(tmp_path):
    files = {"trainfeat": torch.full((4, 2), torch.nan), "trainlabels": torch.arange(4)}
    files |= {"testfeat": torch.zeros(4, 2), "testlabels": torch.arange(4)}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match="NaN"):
        eval_logistic.main(arguments_of(eval_logistic, *SMALL, "--load_features", tmp_path))
