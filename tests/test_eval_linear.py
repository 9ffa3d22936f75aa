"""Linear evaluation: features, training and accuracies against float64 references, and the script end to end."""

import contextlib
import io
import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import CtrlC, arguments_of, assert_near, assert_same, ending, run_script
from PIL import Image
from torch import nn
from torchvision import datasets, transforms

import dino_backbones
import dino_classifiers
import dino_linear
import eval_linear
import utils

# Runs for a second. 40 training images of 32 pixels, 4 patches each; the last batch of an epoch has 8 images.
# fmt: off
SMALL = [
    "--arch", "vit_nano", "--image_size", "32", "--batch_size_per_gpu", "16", "--lr", "0.5", "--epochs", "3",
    "--num_workers", "0", "--device", "cpu",
]
# fmt: on
RESULT = re.compile(r"^Accuracy of the network on the (?P<number>\d+) test images: (?P<percent>[\d.]+)%$", re.M)


def arguments(*flags):
    return arguments_of(eval_linear, *SMALL, *flags)


def run(*flags):
    eval_linear.main(arguments(*flags))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)


def backbone(arch="vit_nano"):
    torch.manual_seed(1)
    return dino_backbones.build_backbone(arch, 16, 32)[0].eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The state dict of a network, as --pretrained_weights."""
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save(backbone().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def data(tiny_root, weights):
    return ["--data_path", tiny_root, "--pretrained_weights", weights]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    run(*data, "--output_dir", folder)
    return folder


def test_flags_have_the_published_names_and_defaults():
    args = vars(arguments_of(eval_linear, "--local-rank", "3"))
    published = {"arch": "vit_small", "patch_size": 16, "pretrained_weights": "", "checkpoint_key": "teacher"}
    published |= {"n_last_blocks": 4, "avgpool_patchtokens": False, "epochs": 100, "lr": 0.001, "val_freq": 1}
    published |= {"batch_size_per_gpu": 128, "output_dir": ".", "evaluate": False}
    published |= {"dist_url": "env://", "local_rank": 3}
    ours = {"data_path": "sample", "num_labels": None, "linear_weights": "", "image_size": 224, "exif": False}
    ours |= {"amp_dtype": "float32", "list_columns": None}
    assert 1 <= args.pop("num_workers") <= 10  # the number of cores, at most 10
    assert args == {**published, **ours, "seed": 0, "device": "auto"}


# ---- features ----


def block_outputs(model, image):
    """Tokens [1 + patches, D] of each block, captured by hooks, after the final norm in float64."""
    seen = []
    hooks = [block.register_forward_hook(lambda *call: seen.append(call[2][0].double())) for block in model.blocks]
    with torch.no_grad():
        model(image[None])
    for hook in hooks:
        hook.remove()
    normed = []
    for tokens in seen:
        centered = tokens - tokens.mean(-1, keepdim=True)
        centered /= ((centered**2).mean(-1, keepdim=True) + 1e-6).sqrt()
        normed.append((centered * model.norm.weight.double() + model.norm.bias.double()).detach())
    return normed


def images(number=3, size=32):
    return torch.randint(256, (number, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def normalized(image):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image / 255 - mean[:, None, None]) / std[:, None, None]


def features_of(model, images, *blocks):
    return eval_linear.head_features(eval_linear.frozen_tokens(model, images, *blocks), *blocks)


@pytest.mark.parametrize("n", [1, 3])
def test_vit_features_are_the_cls_tokens_of_the_last_blocks_after_the_final_norm(n):
    model = backbone()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    features = features_of(model, images(size=64), n)
    assert not features.requires_grad
    for row, image in zip(features, images(size=64), strict=True):
        tokens = block_outputs(model, normalized(image))
        assert_near(row, torch.cat([tokens[i][0] for i in range(4 - n, 4)]), 1e-5)


@pytest.mark.parametrize("n", [1, 2])
def test_avgpool_interleaves_the_last_cls_token_with_the_mean_patch_token(n):
    model = backbone()
    for row, image in zip(features_of(model, images(), n, True), images(), strict=True):
        tokens = block_outputs(model, normalized(image))
        want = [number for i in range(4 - n, 3) for number in tokens[i][0].tolist()]
        for d in range(128):
            want += [tokens[3][0, d].item(), sum(tokens[3][1:, d].tolist()) / 4]
        assert_near(row, want, 1e-5)


def test_features_of_a_convnet_are_its_pooled_output():
    model = backbone("resnet18")
    with torch.no_grad():
        maps = nn.Sequential(*list(model.children())[:8])(normalized(images()))  # up to layer4: [B, 512, h, w]
    assert_near(features_of(model, images()), maps.mean(dim=(2, 3)), 1e-5)


@pytest.mark.parametrize(
    ("flags", "width"),
    [
        (["--n_last_blocks", "3"], 384),
        (["--n_last_blocks", "1", "--avgpool_patchtokens", "true"], 256),
        (["--arch", "resnet18"], 512),
        (["--arch", "xcit_nano_12_p16"], 128),
    ],
)
def test_the_announced_width_is_the_width_of_the_features(flags, width):
    args = arguments(*flags, "--pretrained_weights", "random")
    model, announced = eval_linear.build_model(args, torch.device("cpu"))
    tokens = eval_linear.frozen_tokens(model, images(), args.n_last_blocks, args.avgpool_patchtokens)
    features = eval_linear.head_features(tokens, args.n_last_blocks, args.avgpool_patchtokens)
    assert (tokens.shape, features.shape) == ((3, *announced), (3, width))


# ---- classifier and training ----


def test_the_classifier_starts_with_small_weights_and_no_bias_and_flattens_its_input():
    torch.manual_seed(0)
    classifier = eval_linear.LinearClassifier(600, 50)
    assert list(classifier.state_dict()) == ["linear.weight", "linear.bias"]
    weight = classifier.linear.weight.detach()
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert weight.mean().abs() < 2e-4
    assert classifier.linear.bias.abs().max() == 0
    x = torch.randn(2, 100, 2, 3)
    assert_near(classifier(x), x.reshape(2, 600) @ weight.T, 1e-6)


def slow_training(root, model, weight, batch, seed, epochs=2, lr=0.5):
    """Weight [C, D], bias [C] and each epoch's mean loss: SGD with momentum 0.9 in float64.

    The order of the images is a function of (seed, epoch), a crop of (seed, epoch, index).
    """
    folder = datasets.ImageFolder(root / "train")
    crop = transforms.Compose([transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip()])
    weight, bias = weight.double(), torch.zeros(len(weight), dtype=torch.float64)
    velocities, losses = [torch.zeros_like(weight), torch.zeros_like(bias)], []
    for epoch in range(epochs):
        rate = lr * batch / 256 * (1 + math.cos(math.pi * epoch / epochs)) / 2
        generator = torch.Generator().manual_seed(utils.derive_seed(seed, utils.ORDER, epoch))
        order, of_steps = torch.randperm(len(folder), generator=generator).tolist(), []
        for first in range(0, len(order), batch):
            rows, targets = [], []
            for index in order[first : first + batch]:
                utils.fix_random_seeds(utils.derive_seed(seed, utils.SAMPLE, epoch, index))
                image, label = folder[index]
                tokens = block_outputs(model, normalized(transforms.functional.pil_to_tensor(crop(image))))
                rows.append(torch.cat([layer[0] for layer in tokens]))
                targets.append(F.one_hot(torch.tensor(label), len(weight)).double())
            x, y = torch.stack(rows), torch.stack(targets)
            logits = x @ weight.T + bias
            probs = logits.exp() / logits.exp().sum(1, keepdim=True)
            of_steps.append(-(y * probs.log()).sum(1).mean().item())
            gradients = [(probs - y).T @ x / len(x), (probs - y).mean(0)]
            velocities = [0.9 * v + g for v, g in zip(velocities, gradients, strict=True)]
            weight, bias = weight - rate * velocities[0], bias - rate * velocities[1]
        losses.append(sum(of_steps) / len(of_steps))
    return weight, bias, losses


def initial_weight(data, folder, seed):
    """The classifier's weight [C, D] at the start of a run: the result of a training with almost no learning rate."""
    run(*data, "--epochs", 1, "--lr", 1e-30, "--seed", seed, "--output_dir", folder)
    return checkpoint_of(folder)["state_dict"]["module.linear.weight"]


@pytest.mark.parametrize("batch", [16, 64])  # with a smaller last batch, and with less than one batch
def test_training_matches_a_float64_loop_over_the_same_crops(batch, tiny_root, data, tmp_path):
    run(*data, "--epochs", 2, "--batch_size_per_gpu", batch, "--seed", 7, "--output_dir", tmp_path / "run")
    start = initial_weight(data, tmp_path / "start", seed=7)
    weight, bias, losses = slow_training(tiny_root, backbone(), start, batch, seed=7)
    state = checkpoint_of(tmp_path / "run")["state_dict"]
    assert_near(state["module.linear.weight"] - start, weight - start, 1e-4)
    assert_near(state["module.linear.bias"], bias, 1e-4)
    assert [line["train_loss"] for line in log_of(tmp_path / "run")] == pytest.approx(losses, rel=1e-5)


def test_num_workers_does_not_change_the_result(data, trained, tmp_path):
    run(*data, "--num_workers", 2, "--output_dir", tmp_path)
    assert (tmp_path / "log.txt").read_text() == (trained / "log.txt").read_text()


def test_the_seed_determines_the_initial_weights(data, tmp_path):
    starts = [initial_weight(data, tmp_path / str(i), seed) for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_loss_that_is_not_finite_stops_with_exit_code_3_and_writes_nothing(monkeypatch, capsys, data, tmp_path):
    code, line = ending(monkeypatch, capsys, eval_linear, *SMALL, *data, "--lr", "1e38", "--output_dir", tmp_path)
    assert code == 3
    assert re.fullmatch(r"error: the loss is (nan|inf) in epoch \[0/3\]\. Lower --lr.*", line)
    assert not list(tmp_path.iterdir())


# ---- validation ----


@pytest.mark.parametrize("classes", [3, 7])
def test_loss_and_accuracies_match_a_count_image_by_image(classes):
    generator = torch.Generator().manual_seed(classes)
    rows, labels = torch.randn(23, 6, generator=generator), torch.randint(classes, (23,), generator=generator)
    heads = eval_linear.Heads([dino_linear.Setting(0.1, 1, False)] * 2, (1, 6), classes)
    for classifier in heads.classifiers:
        nn.init.normal_(classifier.linear.weight)
    batches = [(rows[indices, None], indices) for indices in torch.arange(23).split(10)]  # the last has 3
    _, got = dino_classifiers.validate(heads, batches, labels)

    loss = top1 = top5 = 0
    for row, label in zip(rows.double(), labels.tolist(), strict=True):
        logits = (classifier.linear.weight.double() @ row).tolist()
        loss += math.log(sum(map(math.exp, logits))) - logits[label]
        better = sum(logit > logits[label] for logit in logits)
        top1, top5 = top1 + (better < 1), top5 + (better < 5)
    assert got == pytest.approx({"loss": loss / 23, "acc1": 100 * top1 / 23, "acc5": 100 * top5 / 23})
    assert (got["acc5"] == 100) == (classes < 5)


def test_nan_features_are_an_error_and_not_an_accuracy(monkeypatch, capsys, data, trained, tmp_path):
    broken = backbone()
    broken.norm.bias.data[3] = math.nan
    torch.save(broken.state_dict(), tmp_path / "weights.pth")
    torch.save({"state_dict": checkpoint_of(trained)["state_dict"]}, tmp_path / "head.pth")
    flags = ["--pretrained_weights", tmp_path / "weights.pth", "--linear_weights", tmp_path / "head.pth"]
    code, line = ending(monkeypatch, capsys, eval_linear, *SMALL, *data, "--evaluate", *flags)
    assert code == 3
    assert line.startswith("error: the loss is nan on the test images")


def test_validation_labels_follow_the_class_names_of_train(capsys, tiny_root, data, tmp_path):
    shutil.copytree(tiny_root / "train", tmp_path / "train")
    for name, number in (("brick", 1), ("coffee", 2), ("text", 4)):  # val has no astronaut, the first class of train
        (tmp_path / "val" / name).mkdir(parents=True)
        for source in sorted((tiny_root / "val" / name).iterdir())[:number]:
            shutil.copy(source, tmp_path / "val" / name)
    coffee = {"module.linear.weight": torch.zeros(4, 512), "module.linear.bias": torch.tensor([0.0, 0.0, 1.0, 0.0])}
    torch.save({"state_dict": coffee}, tmp_path / "head.pth")  # always predicts class 2
    run(*data, "--data_path", tmp_path, "--evaluate", "--linear_weights", tmp_path / "head.pth")
    assert RESULT.findall(capsys.readouterr().out) == [("7", f"{100 * 2 / 7:.1f}")]


# ---- log, checkpoint, resume ----


def test_the_log_has_one_line_per_epoch_and_test_results_every_val_freq_epochs(data, tmp_path):
    run(*data, "--epochs", 4, "--val_freq", 2, "--output_dir", tmp_path)
    train, test = {"train_loss", "train_lr", "epoch"}, {"test_loss", "test_acc1", "test_acc5"}
    log = log_of(tmp_path)
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    assert [set(line) for line in log] == [train | test, train, train | test, train | test]


def test_the_checkpoint_has_the_published_layout(trained):
    checkpoint = checkpoint_of(trained)
    assert {"best_acc", "epoch", "optimizer", "scheduler", "state_dict"} <= checkpoint.keys()
    assert checkpoint["epoch"] == 3
    assert checkpoint["best_acc"] == max(line["test_acc1"] for line in log_of(trained))
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    assert shapes == {"module.linear.weight": (4, 512), "module.linear.bias": (4,)}
    assert checkpoint["optimizer"]["param_groups"][0]["momentum"] == 0.9
    assert checkpoint["scheduler"]["T_max"] == 3


def interrupt(epoch, folder, data):
    """Run in `folder` until the first line of an epoch."""
    with contextlib.redirect_stdout(CtrlC(f"Epoch: [{epoch}/3]")), pytest.raises(KeyboardInterrupt):
        run(*data, "--output_dir", folder)
    assert len(log_of(folder)) == checkpoint_of(folder)["epoch"] == epoch
    return checkpoint_of(folder)


@pytest.mark.parametrize(("epoch", "published"), [(1, False), (2, True)])  # the authors' checkpoints store no args
def test_an_interrupted_run_resumes_bit_identically(epoch, published, data, trained, tmp_path):
    checkpoint = interrupt(epoch, tmp_path, data)
    if published:
        del checkpoint["args"]
        torch.save(checkpoint, tmp_path / "checkpoint.pth.tar")
    run(*data, "--output_dir", tmp_path)
    assert (tmp_path / "log.txt").read_text() == (trained / "log.txt").read_text()
    got, want = checkpoint_of(tmp_path), checkpoint_of(trained)
    for part in ("best_acc", "epoch", "optimizer", "scheduler", "state_dict"):
        assert_same(got[part], want[part])


def test_a_resumed_run_keeps_the_best_accuracy(capsys, data, tmp_path):
    checkpoint = interrupt(2, tmp_path, data)
    torch.save({**checkpoint, "best_acc": 99.5}, tmp_path / "checkpoint.pth.tar")
    run(*data, "--output_dir", tmp_path)
    out = capsys.readouterr().out
    assert re.findall(r"Max accuracy so far: ([\d.]+)%", out) == ["99.50"]
    assert out.strip().endswith("Top-1 test accuracy: 99.5")
    assert checkpoint_of(tmp_path)["best_acc"] == 99.5


def test_a_finished_run_prints_its_result_again_also_if_its_weights_moved(capsys, data, weights, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    moved = shutil.copy(weights, tmp_path / "moved.pth")
    run(*data, "--pretrained_weights", moved, "--output_dir", tmp_path)
    out = capsys.readouterr().out
    assert f"Top-1 test accuracy: {checkpoint_of(trained)['best_acc']:.1f}" in out
    assert "Epoch:" not in out
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


# ---- sweeps ----

SWEEP = ["--lr", 0.05, 0.5, "--n_last_blocks", 4, 2, "--avgpool_patchtokens", "true", "false"]
FLAGS = ("lr", "n_last_blocks", "avgpool_patchtokens")
RESULTS = ("train_loss", "train_lr", "epoch", "test_loss", "test_acc1", "test_acc5")


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
    """The folder of a finished sweep, and what it printed."""
    folder = tmp_path_factory.mktemp("swept")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(*data, *SWEEP, "--output_dir", folder)
    return folder, out.getvalue()


def lines_of(folder, *setting):
    """The log lines of one linear layer of a sweep, without its setting."""
    lines = [line for line in log_of(folder) if tuple(line[flag] for flag in FLAGS) == setting]
    return [{name: line[name] for name in line if name not in FLAGS} for line in lines]


@pytest.mark.parametrize("setting", [(0.5, 4, False), (0.05, 2, True)])
def test_a_layer_of_a_sweep_is_the_layer_that_is_trained_alone(setting, data, swept, tmp_path):
    values = [word for flag, value in zip(FLAGS, setting, strict=True) for word in (f"--{flag}", value)]
    run(*data, *map(str, values), "--output_dir", tmp_path)
    assert lines_of(swept[0], *setting) == log_of(tmp_path)
    alone, sweep = checkpoint_of(tmp_path), checkpoint_of(swept[0])
    number = [tuple(s) for s in dino_linear.sweep_of(arguments(*SWEEP))].index(setting)
    assert_same(sweep[f"optimizer_{number}"], alone["optimizer"])
    for name in ("weight", "bias"):
        got, want = sweep[f"state_dict_{number}"], alone["state_dict"]
        assert torch.equal(got[f"linear.{name}"], want[f"module.linear.{name}"])


def test_a_sweep_logs_every_setting_and_prints_a_table(swept):
    folder, out = swept
    log = log_of(folder)
    assert [line["epoch"] for line in log] == [0] * 8 + [1] * 8 + [2] * 8
    assert all(set(line) == {*FLAGS, *RESULTS} for line in log)
    rows = re.findall(
        r"^ +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)  --lr (\S+) --n_last_blocks (\d) "
        r"--avgpool_patchtokens (\w+)(  \(best\))?$",
        out,
        re.M,
    )
    assert len(rows) == 8
    for line, row in zip(log[-8:], rows, strict=True):
        most = max(each["test_acc1"] for each in lines_of(folder, *(line[flag] for flag in FLAGS)))
        assert row[:3] == (f"{line['test_acc1']:.2f}", f"{line['test_acc5']:.2f}", f"{line['test_loss']:.4g}")
        assert row[3:7] == (f"{most:.2f}", *(str(line[flag]).lower() for flag in FLAGS))
    best = max(log[-8:], key=lambda line: (line["test_acc1"], -line["test_loss"]))
    assert [bool(row[7]) for row in rows] == [line is best for line in log[-8:]]
    assert f"note: the best --lr {best['lr']} is the {'largest' if best['lr'] == 0.5 else 'smallest'} of" in out
    most = max(each["test_acc1"] for each in lines_of(folder, *(best[flag] for flag in FLAGS)))
    assert out.endswith(f"Top-1 test accuracy: {most:.1f}\n")  # as for one layer


def test_the_best_layer_of_a_sweep_is_evaluated_like_one_that_was_trained_alone(capsys, data, trained, swept):
    checkpoint = checkpoint_of(swept[0])
    assert set(checkpoint_of(trained)) <= set(checkpoint)
    kept = {flag: checkpoint["args"][flag] for flag in FLAGS}
    best = max(log_of(swept[0])[-8:], key=lambda line: (line["test_acc1"], -line["test_loss"]))
    assert kept == {flag: best[flag] for flag in FLAGS}
    flags = ["--n_last_blocks", kept["n_last_blocks"], "--avgpool_patchtokens", kept["avgpool_patchtokens"]]
    capsys.readouterr()
    run(*data, *flags, "--evaluate", "--linear_weights", swept[0] / "checkpoint.pth.tar")
    out = capsys.readouterr().out
    assert RESULT.findall(out) == [("20", f"{best['test_acc1']:.1f}")]
    assert f"Top-5: {best['test_acc5']:.1f}%, loss: {best['test_loss']:.4f}\n" in out


def test_an_interrupted_sweep_resumes_bit_identically_and_prints_its_table_again(capsys, data, swept, tmp_path):
    with contextlib.redirect_stdout(CtrlC("Epoch: [2/3]")), pytest.raises(KeyboardInterrupt):
        run(*data, *SWEEP, "--output_dir", tmp_path)
    assert checkpoint_of(tmp_path)["epoch"] == 2
    for table in (False, True):
        capsys.readouterr()
        run(*data, *SWEEP, "--output_dir", tmp_path)
        out = capsys.readouterr().out
        assert ("Epoch:" in out) != table
        assert out[out.index("top-1") :] == swept[1][swept[1].index("top-1") :]
    assert (tmp_path / "log.txt").read_text() == (swept[0] / "log.txt").read_text()
    got, want = checkpoint_of(tmp_path), checkpoint_of(swept[0])
    assert_same({**got, "args": {}}, {**want, "args": {}})


def test_a_layer_that_diverges_leaves_the_others_as_they_are(capsys, data, trained, tmp_path):
    run(*data, "--lr", "1e38", 0.5, "--output_dir", tmp_path)
    assert lines_of(tmp_path, 0.5, 4, False) == log_of(trained)
    assert all(line["diverged"] and line["train_loss"] is None for line in lines_of(tmp_path, 1e38, 4, False))
    assert_same(checkpoint_of(tmp_path)["state_dict"], checkpoint_of(trained)["state_dict"])
    assert re.search(r"^ +diverged +--lr 1e\+38 --n_last_blocks 4", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("results", [[{"best_acc": 1.0}], [{"best_acc": "1"}] * 8, {"best_acc": 1.0}])
def test_a_sweep_with_damaged_results_is_not_overwritten(refusal, data, swept, tmp_path, results):
    torch.save({**checkpoint_of(swept[0]), "results": results}, tmp_path / "checkpoint.pth.tar")
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    line = refusal(eval_linear, *SMALL, *data, *SWEEP, "--output_dir", tmp_path)
    assert "checkpoint.pth.tar is not a checkpoint of this sweep. Move it, or use another --output_dir" in line
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def test_the_network_sees_the_validation_images_once(monkeypatch, data, tmp_path):
    seen = []
    tokens = eval_linear.frozen_tokens
    monkeypatch.setattr(eval_linear, "frozen_tokens", lambda *a, **k: seen.append(len(a[1])) or tokens(*a, **k))
    run(*data, "--lr", 0.1, 0.5, "--output_dir", tmp_path)
    assert sum(seen) == 3 * 40 + 20


# ---- --evaluate ----


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_evaluating_the_trained_head_gives_the_logged_result(arch, capsys, tiny_root, tmp_path):
    """Training must not change the network: not even the running statistics of its batch norms."""
    torch.save(backbone(arch).state_dict(), tmp_path / "weights.pth")
    flags = ["--arch", arch, "--pretrained_weights", tmp_path / "weights.pth"]
    run(*flags, "--data_path", tiny_root, "--epochs", 1, "--output_dir", tmp_path)
    (line,) = log_of(tmp_path)
    capsys.readouterr()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val").symlink_to(tiny_root / "val")  # train/ is not needed
    run(*flags, "--data_path", tmp_path / "data", "--evaluate", "--linear_weights", tmp_path / "checkpoint.pth.tar")
    out = capsys.readouterr().out
    assert RESULT.findall(out) == [("20", f"{line['test_acc1']:.1f}")]
    assert f"Top-5: {line['test_acc5']:.1f}%, loss: {line['test_loss']:.4f}\n" in out


def test_the_published_network_and_head_are_downloaded_and_evaluated(monkeypatch, capsys, tiny_root):
    model = backbone("vit_small")
    torch.manual_seed(2)
    weight, bias = torch.zeros(1000, 4 * 384), torch.full((1000,), -99.0)
    weight[:4], bias[:4] = torch.randn(4, 4 * 384), torch.randn(4)
    head = {"state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}}
    files = {"dino_deitsmall16_pretrain.pth": model.state_dict(), "dino_deitsmall16_linearweights.pth": head}
    urls = []

    def download(url, **_):
        urls.append(url)
        return files[url.rsplit("/", 1)[1]]

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    run("--arch", "deit_small", "--data_path", tiny_root, "--evaluate")
    assert urls == [f"https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/{name}" for name in files]

    correct = 0
    for label, name in enumerate(("astronaut", "brick", "coffee", "text")):
        for path in (tiny_root / "val" / name).iterdir():
            image = Image.open(path).convert("RGB").resize((36, 36), Image.Resampling.BICUBIC).crop((2, 2, 34, 34))
            tokens = block_outputs(model, normalized(transforms.functional.pil_to_tensor(image)))
            features = torch.cat([layer[0] for layer in tokens[-4:]])
            correct += label == int((weight.double() @ features + bias).argmax())
    assert 0 < correct < 20
    out = capsys.readouterr().out
    assert RESULT.findall(out) == [("20", f"{100 * correct / 20:.1f}")]
    assert "4 classes of the data use the first of the head's 1000 outputs" in out


# ---- errors ----

HEAD = ["--evaluate", "--linear_weights", "TRAINED/checkpoint.pth.tar"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_last_blocks", "5"], "--n_last_blocks 5: vit_nano has only 4 blocks"),
        (["--arch", "resnet18", "--avgpool_patchtokens", "true"], "resnet18 has no patch tokens"),
        (["--image_size", "15"], "--image_size 15 is not a multiple of --patch_size 16. Use 16"),
        (["--arch", "alexnet"], "--arch alexnet"),
        (["--num_labels", "3"], "has 4 classes, more than --num_labels 3"),
        (["--linear_weights", "TRAINED/checkpoint.pth.tar"], "--linear_weights needs --evaluate"),
        (["--evaluate"], "no linear head was published for vit_nano with --patch_size 16"),
        (["--evaluate", "--linear_weights", "WEIGHTS"], "holds no linear.weight and linear.bias"),
        ([*HEAD, "--n_last_blocks", "2"], "4 labels and 512 features; this run has 4 labels and 256 features"),
        ([*HEAD, "--pretrained_weights", "random"], "was made with weights "),
        (["--output_dir", "TRAINED", "--amp_dtype", "bf16"], "with amp_dtype float32; this run has amp_dtype bf16"),
        (["--output_dir", "TRAINED", "--lr", "0.5", "0.1"], "was made with lr 0.5; this run has lr 0.5 0.1"),
        (
            ["--output_dir", "SWEPT"],
            "lr 0.05 0.5, n_last_blocks 4 2, avgpool_patchtokens true false; this run has lr 0.5,",
        ),
        (["--lr", "0.1", "0.2", "1e-1"], "--lr 0.1 0.2 0.1 has a value twice"),
        (["--lr", "0.1", "0"], "--lr: 0 must be above 0"),
        (["--n_last_blocks", "1", "5"], "--n_last_blocks 5: vit_nano has only 4 blocks"),
        (["--arch", "resnet18", "--n_last_blocks", "1", "4"], "--arch resnet18 gives its pooled output only"),
        ([*HEAD, "--n_last_blocks", "1", "4"], "--n_last_blocks 1 4: --evaluate is for one linear layer"),
        (["--output_dir", "TRAINED", "--epochs", "9"], "was made with epochs 3; this run has epochs 9"),
        (["--output_dir", "TRAINED", "--batch_size_per_gpu", "8"], "global_batch 16; this run has global_batch 8"),
        (["--output_dir", "TRAINED", "--pretrained_weights", "random"], "Use the same, or another --output_dir"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_changes_no_file(
    refusal, data, weights, trained, swept, tmp_path, flags, message
):
    places = {"TRAINED": str(trained), "WEIGHTS": str(weights), "SWEPT": str(swept[0])}
    flags = [re.sub("TRAINED|WEIGHTS|SWEPT", lambda found: places[found[0]], flag) for flag in flags]
    before = sorted((path.name, path.read_bytes()) for path in trained.iterdir())
    line = refusal(eval_linear, *SMALL, *data, "--output_dir", tmp_path, *flags)
    assert message in line
    assert not list(tmp_path.iterdir())
    assert sorted((path.name, path.read_bytes()) for path in trained.iterdir()) == before


SAVED = {"epoch": "3", "best_acc": 0.0, "state_dict": {}, "optimizer": {}, "scheduler": {}}


@pytest.mark.parametrize("content", [{"epoch": 3, "teacher": {}}, [1, 2], SAVED, "PUBLISHED"])
def test_a_checkpoint_that_does_not_fit_is_not_overwritten(refusal, data, trained, tmp_path, content):
    message = "is not a checkpoint of this script. Move it"
    if content == "PUBLISHED":  # without args, so that only the shapes tell that the features differ
        content = {name: part for name, part in checkpoint_of(trained).items() if name != "args"}
        message = "checkpoint.pth.tar does not fit this run: state_dict"
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    flags = ["--n_last_blocks", 2, "--output_dir", tmp_path]
    line = refusal(eval_linear, *SMALL, *data, *flags)
    assert message in line
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def test_more_processes_than_training_images_are_an_error(data):
    args = arguments(*data)
    args.rank, args.world_size = 0, 41
    train = eval_linear.load_data(args)[0]
    with pytest.raises(utils.UserError, match="40 training images are too few for 41 processes"):
        eval_linear.train_heads(None, None, (train, None), None, args)


# ---- whole commands ----


@pytest.mark.slow
def test_two_processes_match_one_with_twice_the_batch(tiny_root, data, tmp_path):
    root = tmp_path / "odd"  # 19 validation images: 10 for one process, 9 for the other
    shutil.copytree(tiny_root, root)
    next((root / "val" / "text").iterdir()).unlink()
    flags = [*SMALL, *data, "--data_path", root]
    eval_linear.main(arguments(*flags, "--output_dir", tmp_path / "one"))
    flags += ["--batch_size_per_gpu", 8, "--output_dir", tmp_path / "two"]
    out = run_script("eval_linear.py", *flags, processes=2).stdout
    assert [number for number, _ in RESULT.findall(out)] == ["19"] * 3
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    weights = [checkpoint_of(tmp_path / name)["state_dict"] for name in ("one", "two")]
    for name in weights[0]:
        assert_near(weights[1][name], weights[0][name], 1e-4, name)
