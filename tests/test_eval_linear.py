"""Linear evaluation: features, training and accuracies against slow obvious ones, and the script end to end."""

import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, arguments_of, assert_near, ending, run_script
from PIL import Image
from torch import nn
from torchvision import datasets, transforms

import dino_backbones
import dino_cli
import eval_linear
import hubconf
import utils

# A run of a second: 32 pixels in patches of 16, batches of 16, of 40 images the last has 8.
# fmt: off
SMALL = [
    "--arch", "vit_nano", "--image_size", "32", "--batch_size_per_gpu", "16", "--lr", "0.5", "--epochs", "3",
    "--num_workers", "0", "--device", "cpu",
]
# fmt: on


def arguments(*flags):
    return arguments_of(eval_linear, *SMALL, *flags)


def run(*flags):
    eval_linear.main(arguments(*flags))


def end(monkeypatch, capsys, *flags):
    return ending(monkeypatch, capsys, eval_linear, *SMALL, *flags)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)


def backbone(arch="vit_nano", seed=1):
    torch.manual_seed(seed)
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


@pytest.fixture
def starts(monkeypatch):
    """The weights that classifiers have at first, one after the other."""
    found = []

    class Recorded(eval_linear.LinearClassifier):
        def __init__(self, *shape):
            super().__init__(*shape)
            found.append(self.linear.weight.detach().clone())

    monkeypatch.setattr(eval_linear, "LinearClassifier", Recorded)
    return found


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    run(*data, "--output_dir", folder)
    return folder


# ---- flags ----


def test_flags_have_the_published_names_and_defaults():
    args = vars(dino_cli.OneLineParser(parents=[eval_linear.get_args_parser()]).parse_args(["--local-rank", "3"]))
    published = {
        "arch": "vit_small",
        "patch_size": 16,
        "n_last_blocks": 4,
        "avgpool_patchtokens": False,
        "pretrained_weights": "",
        "checkpoint_key": "teacher",
        "epochs": 100,
        "lr": 0.001,
        "batch_size_per_gpu": 128,
        "num_workers": 10,
        "val_freq": 1,
        "output_dir": ".",
        "evaluate": False,
        "dist_url": "env://",
        "local_rank": 3,
    }
    ours = {
        "data_path": "sample",
        "num_labels": None,
        "linear_weights": "",
        "image_size": 224,
        "exif": False,
        "seed": 0,
        "device": "auto",
    }
    assert args == {**published, **ours}


# ---- features ----


def block_outputs(model, image):
    """Tokens [1 + patches, D] behind each block, seen by hooks, then through the final norm in float64."""
    seen = []
    hooks = [block.register_forward_hook(lambda *call: seen.append(call[2][0].double())) for block in model.blocks]
    with torch.no_grad():
        model(image[None])
    for hook in hooks:
        hook.remove()
    normed = []
    for tokens in seen:
        centred = tokens - tokens.mean(-1, keepdim=True)
        centred /= ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt()
        normed.append((centred * model.norm.weight.double() + model.norm.bias.double()).detach())
    return normed


def images(number=3, size=32):
    return torch.randint(256, (number, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def normalised(image):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image / 255 - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("n", [1, 3, 4])
def test_features_of_a_vit_are_the_normalised_cls_tokens_of_its_last_blocks(n):
    model = backbone()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    got = eval_linear.frozen_features(model, images(size=64), n)
    for row, image in zip(got, images(size=64), strict=True):
        tokens = block_outputs(model, normalised(image))
        assert_near(row, torch.cat([tokens[i][0] for i in range(4 - n, 4)]), 1e-5)


@pytest.mark.parametrize("n", [1, 2])
def test_with_avgpool_each_number_of_the_last_cls_token_is_followed_by_its_mean_over_the_patches(n):
    model = backbone()
    got = eval_linear.frozen_features(model, images(), n, avgpool=True)
    for row, image in zip(got, images(), strict=True):
        tokens = block_outputs(model, normalised(image))
        earlier = [number for i in range(4 - n, 3) for number in tokens[i][0].tolist()]
        last = []
        for d in range(128):
            last += [tokens[3][0, d].item(), sum(tokens[3][1:, d].tolist()) / 4]
        assert_near(row, earlier + last, 1e-5)


def test_features_have_no_gradients_even_if_the_network_has():
    assert next(backbone().parameters()).requires_grad
    assert not eval_linear.frozen_features(backbone(), images()).requires_grad


def test_features_of_a_convnet_are_its_pooled_output():
    model = backbone("resnet18")
    with torch.no_grad():
        maps = nn.Sequential(*list(model.children())[:8])(normalised(images()))  # up to layer4: [B, 512, h, w]
    assert_near(eval_linear.frozen_features(model, images()), maps.mean(dim=(2, 3)), 1e-5)


@pytest.mark.parametrize(
    ("flags", "width"),
    [
        (["--n_last_blocks", "3"], 384),
        (["--n_last_blocks", "1", "--avgpool_patchtokens", "true"], 256),
        (["--arch", "resnet18"], 512),
        (["--arch", "xcit_nano_12_p16"], 128),
        (["--arch", "timm:vit_tiny_patch16_224"], 192),
    ],
)
def test_the_width_of_the_features_is_known_beforehand(flags, width):
    args = arguments(*flags, "--pretrained_weights", "random")
    model, announced = eval_linear.build_model(args, torch.device("cpu"))
    features = eval_linear.frozen_features(model, images(), args.n_last_blocks, args.avgpool_patchtokens)
    assert (announced, features.shape) == (width, (3, width))


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18", "xcit_nano_12_p16"])
def test_training_leaves_the_network_as_it_was(arch, monkeypatch, tiny_root, tmp_path):
    built = []
    monkeypatch.setattr(
        eval_linear, "build_model", lambda *args, build=eval_linear.build_model: built.append(build(*args)) or built[0]
    )
    torch.save(backbone(arch).state_dict(), tmp_path / "weights.pth")
    flags = ["--arch", arch, "--pretrained_weights", tmp_path / "weights.pth", "--epochs", 1, "--output_dir", tmp_path]
    run(*flags, "--data_path", tiny_root)
    after, before = built[0][0].state_dict(), torch.load(tmp_path / "weights.pth", weights_only=True)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)  # batch norm's statistics among them
    assert log_of(tmp_path)[0]["train_loss"] > 0


# ---- the classifier and its training ----


def test_the_classifier_starts_with_small_weights_no_bias_and_flattens_its_input():
    torch.manual_seed(0)
    classifier = eval_linear.LinearClassifier(600, 50)
    assert list(classifier.state_dict()) == ["linear.weight", "linear.bias"]
    weight = classifier.linear.weight.detach()
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert weight.mean().abs() < 2e-4
    assert classifier.linear.bias.abs().max() == 0
    x = torch.randn(2, 100, 2, 3)
    assert_near(classifier(x), x.reshape(2, 600) @ weight.T, 1e-6)


def trained_by_hand(root, model, weight, batch, lr, epochs, seed):
    """Weight [C, D] and bias [C] behind SGD with momentum .9 in float64, and each epoch's mean loss.

    The order and crops of an epoch, as documented: functions of (seed, epoch) and (seed, epoch, index).
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
                tokens = block_outputs(model, normalised(transforms.functional.pil_to_tensor(crop(image))))
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


@pytest.mark.parametrize("batch", [16, 64])  # with a short last batch, and with less than one batch
def test_training_equals_a_float64_loop_over_the_same_crops(batch, starts, tiny_root, data, tmp_path):
    run(*data, "--epochs", 2, "--batch_size_per_gpu", batch, "--seed", 7, "--output_dir", tmp_path)
    weight, bias, losses = trained_by_hand(tiny_root, backbone(), starts[0], batch, lr=0.5, epochs=2, seed=7)
    state = checkpoint_of(tmp_path)["state_dict"]
    assert_near(state["module.linear.weight"] - starts[0], weight - starts[0], 1e-4)
    assert_near(state["module.linear.bias"], bias, 1e-4)
    assert [line["train_loss"] for line in log_of(tmp_path)] == pytest.approx(losses, rel=1e-5)


def test_the_learning_rate_falls_along_a_cosine_by_epoch_and_is_scaled_with_the_batch(data, tmp_path):
    run(*data, "--epochs", 5, "--val_freq", 9, "--output_dir", tmp_path)
    want = [0.5 * 16 / 256 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]
    assert [line["train_lr"] for line in log_of(tmp_path)] == pytest.approx(want)


def test_processes_that_load_images_change_nothing(data, trained, tmp_path):
    run(*data, "--num_workers", 2, "--output_dir", tmp_path)
    assert (tmp_path / "log.txt").read_text() == (trained / "log.txt").read_text()


def test_the_seed_decides_the_start(starts, data, tmp_path):
    for i, seed in enumerate((1, 1, 2)):
        run(*data, "--epochs", 1, "--seed", seed, "--output_dir", tmp_path / str(i))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_loss_that_is_not_finite_ends_the_run_with_code_3_and_writes_nothing(monkeypatch, capsys, data, tmp_path):
    code, error = end(monkeypatch, capsys, *data, "--lr", "1e38", "--output_dir", tmp_path)
    assert code == 3
    assert re.fullmatch(r"error: the loss is (nan|inf) in epoch 0\. Lower --lr.*", error)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_epoch_before_the_step():
    rows, seen = torch.ones(3, 2, 6), []
    rows[1] = math.nan

    def model(batch):
        seen.append(batch)
        return batch

    classifier = eval_linear.LinearClassifier(6, 2)
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1)
    batches = [(batch, torch.tensor([0, 1])) for batch in rows]
    with pytest.raises(utils.UserError, match="the loss is nan in epoch 4"):
        eval_linear.train_one_epoch(model, classifier, batches, torch.tensor([0, 1]), optimizer, 4, arguments())
    assert len(seen) == 2
    assert classifier.linear.weight.isfinite().all()


# ---- validation ----


@pytest.mark.parametrize("classes", [3, 7])
def test_loss_and_accuracies_equal_those_counted_image_by_image(classes):
    generator = torch.Generator().manual_seed(classes)
    rows, labels = torch.randn(23, 6, generator=generator), torch.randint(classes, (23,), generator=generator)
    classifier = eval_linear.LinearClassifier(6, classes)
    nn.init.normal_(classifier.linear.weight)
    batches = [(rows[indices], indices) for indices in torch.arange(23).split(10)]  # the last has 3
    got = eval_linear.validate(nn.Identity(), classifier, batches, labels, arguments())

    loss = first = among_5 = 0
    for row, label in zip(rows.double(), labels.tolist(), strict=True):
        logits = (classifier.linear.weight.double() @ row).tolist()
        loss += math.log(sum(map(math.exp, logits))) - logits[label]
        better = sum(logit > logits[label] for logit in logits)
        first, among_5 = first + (better < 1), among_5 + (better < 5)
    assert got == pytest.approx({"loss": loss / 23, "acc1": 100 * first / 23, "acc5": 100 * among_5 / 23})
    assert (got["acc5"] == 100) == (classes < 5)


def test_a_network_that_gives_nan_is_an_error_and_not_an_accuracy(monkeypatch, capsys, tiny_root, trained, tmp_path):
    broken = backbone()
    broken.norm.bias.data[3] = math.nan
    torch.save(broken.state_dict(), tmp_path / "weights.pth")
    head = {"state_dict": checkpoint_of(trained)["state_dict"]}
    torch.save(head, tmp_path / "head.pth")
    flags = ["--pretrained_weights", tmp_path / "weights.pth", "--linear_weights", tmp_path / "head.pth"]
    code, error = end(monkeypatch, capsys, "--data_path", tiny_root, "--evaluate", *flags)
    assert code == 3
    assert error.startswith("error: the loss is nan on the test images")


def constant_head(path, answer, classes=4, width=512):
    """The file of a linear layer that always gives the same answer."""
    bias = F.one_hot(torch.tensor(answer), classes).float()
    torch.save({"state_dict": {"module.linear.weight": torch.zeros(classes, width), "module.linear.bias": bias}}, path)
    return path


def test_labels_go_by_the_names_of_trains_classes(capsys, tiny_root, data, tmp_path):
    shutil.copytree(tiny_root / "train", tmp_path / "train")
    for name, number in (("brick", 1), ("coffee", 2), ("text", 4)):  # no astronaut, train's first
        (tmp_path / "val" / name).mkdir(parents=True)
        for source in sorted((tiny_root / "val" / name).iterdir())[:number]:
            shutil.copy(source, tmp_path / "val" / name)
    head = constant_head(tmp_path / "head.pth", answer=2)  # coffee
    run(*data, "--data_path", tmp_path, "--evaluate", "--linear_weights", head)
    assert f"on the 7 test images: {100 * 2 / 7:.1f}%\n" in capsys.readouterr().out


# ---- log, checkpoint, resuming ----


def test_the_log_has_a_line_an_epoch_with_tests_where_validation_was_due(data, tmp_path):
    run(*data, "--epochs", 4, "--val_freq", 2, "--output_dir", tmp_path)
    train = {"train_loss", "train_lr", "epoch"}
    test = {"test_loss", "test_acc1", "test_acc5"}
    log = log_of(tmp_path)
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    assert [set(line) for line in log] == [train | test, train, train | test, train | test]


def test_the_checkpoint_has_the_public_layout(trained):
    checkpoint = checkpoint_of(trained)
    assert {"best_acc", "epoch", "optimizer", "scheduler", "state_dict"} <= checkpoint.keys()
    assert checkpoint["epoch"] == 3
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    assert shapes == {"module.linear.weight": (4, 512), "module.linear.bias": (4,)}
    assert checkpoint["optimizer"]["param_groups"][0]["momentum"] == 0.9
    assert checkpoint["scheduler"]["T_max"] == 3


def test_the_best_accuracy_is_the_highest_of_all_epochs_also_across_a_stop(monkeypatch, capsys, data, tmp_path):
    accuracies = iter([40.0, 60.0, 50.0])

    def fake(*_):
        return {"loss": 1.0, "acc1": next(accuracies), "acc5": 100.0}

    monkeypatch.setattr(eval_linear, "validate", fake)
    with pytest.raises(KeyboardInterrupt):
        stop_after(2, monkeypatch, *data, "--output_dir", tmp_path)
    run(*data, "--output_dir", tmp_path)
    assert checkpoint_of(tmp_path)["best_acc"] == 60.0
    out = capsys.readouterr().out
    assert re.findall(r"Max accuracy so far: ([\d.]+)%", out) == ["40.00", "60.00", "60.00"]
    assert out.strip().endswith("Top-1 test accuracy: 60.0")


def stop_after(epochs, monkeypatch, *flags):
    """A run that is interrupted once it has saved the checkpoint of so many epochs."""
    save = utils.save_on_master

    def save_and_stop(state, path):
        save(state, path)
        if state["epoch"] == epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(utils, "save_on_master", save_and_stop)
        run(*flags)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_stopped_run_goes_on_bit_identically(epochs, monkeypatch, data, trained, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stop_after(epochs, monkeypatch, *data, "--output_dir", tmp_path)
    assert len(log_of(tmp_path)) == epochs
    run(*data, "--output_dir", tmp_path)
    assert (tmp_path / "log.txt").read_text() == (trained / "log.txt").read_text()
    got, want = checkpoint_of(tmp_path), checkpoint_of(trained)
    for part in ("best_acc", "epoch", "optimizer", "scheduler", "state_dict"):
        assert_same(got[part], want[part])


def test_a_checkpoint_of_the_authors_release_is_gone_on_from(monkeypatch, data, trained, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stop_after(2, monkeypatch, *data, "--output_dir", tmp_path)
    public = checkpoint_of(tmp_path)
    del public["args"]  # theirs has none
    torch.save(public, tmp_path / "checkpoint.pth.tar")
    run(*data, "--output_dir", tmp_path)
    assert_same(checkpoint_of(tmp_path)["state_dict"], checkpoint_of(trained)["state_dict"])


def test_a_finished_run_started_again_says_its_result_and_changes_nothing(capsys, data, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    run(*data, "--output_dir", tmp_path)
    best = max(line["test_acc1"] for line in log_of(trained))
    out = capsys.readouterr().out
    assert f"Top-1 test accuracy: {best:.1f}" in out
    assert "Epoch:" not in out
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def test_weights_that_moved_are_the_same_weights(data, weights, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    moved = shutil.copy(weights, tmp_path / "moved.pth")
    run(*data, "--pretrained_weights", moved, "--output_dir", tmp_path)
    assert log_of(tmp_path) == log_of(trained)


# ---- --evaluate ----

RESULT = re.compile(r"^Accuracy of the network on the (?P<number>\d+) test images: (?P<percent>[\d.]+)%$", re.M)


def test_the_users_own_head_is_evaluated_to_what_training_logged(capsys, data, trained):
    run(*data, "--evaluate", "--linear_weights", trained / "checkpoint.pth.tar")
    assert RESULT.findall(capsys.readouterr().out) == [("20", f"{log_of(trained)[-1]['test_acc1']:.1f}")]


def test_a_head_can_be_evaluated_without_the_training_images(capsys, tiny_root, data, trained, tmp_path):
    (tmp_path / "val").symlink_to(tiny_root / "val")
    run(*data, "--data_path", tmp_path, "--evaluate", "--linear_weights", trained / "checkpoint.pth.tar")
    assert RESULT.findall(capsys.readouterr().out) == [("20", f"{log_of(trained)[-1]['test_acc1']:.1f}")]


def test_the_published_head_and_network_are_fetched_and_evaluated(monkeypatch, capsys, tiny_root):
    model = backbone("vit_small")
    torch.manual_seed(2)
    weight, bias = torch.zeros(1000, 4 * 384), torch.full((1000,), -99.0)
    weight[:4], bias[:4] = torch.randn(4, 4 * 384), torch.randn(4)
    files = {
        "dino_deitsmall16_pretrain.pth": model.state_dict(),
        "dino_deitsmall16_linearweights.pth": {
            "state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}
        },
    }
    fetched = []
    monkeypatch.setattr(hubconf, "_download", lambda url: fetched.append(url) or files[url.rsplit("/", 1)[1]])
    run("--arch", "deit_small", "--data_path", tiny_root, "--evaluate")
    assert fetched == [f"https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/{name}" for name in files]

    right = 0
    for label, name in enumerate(("astronaut", "brick", "coffee", "text")):
        for path in (tiny_root / "val" / name).iterdir():
            image = Image.open(path).convert("RGB").resize((36, 36), Image.Resampling.BICUBIC).crop((2, 2, 34, 34))
            tokens = block_outputs(model, normalised(transforms.functional.pil_to_tensor(image)))
            features = torch.cat([layer[0] for layer in tokens[-4:]])
            right += label == int((weight.double() @ features + bias).argmax())
    assert 0 < right < 20
    out = capsys.readouterr().out
    assert RESULT.findall(out) == [("20", f"{100 * right / 20:.1f}")]
    assert "4 classes are taken for the first of the head's 1000" in out


def test_a_download_that_fails_is_one_line(monkeypatch, capsys, data):
    def offline(url):
        raise OSError("no route")

    monkeypatch.setattr(hubconf, "_download", offline)
    flags = ["--arch", "vit_base", "--pretrained_weights", "random", "--evaluate"]
    code, error = end(monkeypatch, capsys, *data, *flags)
    assert code == 2
    assert re.fullmatch(r"error: can't download \S+/dino_vitbase16_linearweights.pth: no route\. .*", error)


# ---- errors ----


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data_path", "/no/where"], "--data_path /no/where is no folder. It takes folders train/"),
        (["--data_path", "/no/where", "--evaluate"], "--data_path /no/where is no folder. It takes folders val/"),
        (["--pretrained_weights", "/no/where.pth"], "there is no file /no/where.pth"),
        (["--n_last_blocks", "5"], "--n_last_blocks 5: vit_nano has 4 blocks"),
        (["--arch", "resnet18", "--avgpool_patchtokens", "true"], "resnet18 gives no patch tokens"),
        (["--image_size", "15"], "--image_size 15 is smaller than one patch (--patch_size 16)"),
        (["--arch", "vit_smal", "--data_path", "/no/where"], "unknown --arch vit_smal; did you mean vit_small"),
        (["--arch", "alexnet"], "--arch alexnet does not take images of 32 pixels"),
        (["--val_freq", "0"], "--val_freq 0 must be at least 1"),
        (["--num_labels", "0"], "--num_labels 0 must be at least 1"),
        (["--seed", "-1"], "--seed -1 must be "),
        (["--lr", "0"], "--lr 0.0 must be above 0"),
        (["--lr", "nan"], "--lr nan must be above 0"),
        (["--num_labels", "3"], "has 4 classes, more than 3 labels"),
        (["--linear_weights", "TRAINED/checkpoint.pth.tar"], "--linear_weights is for --evaluate"),
        (["--evaluate"], "no linear head was published for vit_nano at --patch_size 16"),
        (["--evaluate", "--linear_weights", "/no/where.pth"], "there is no file /no/where.pth"),
        (["--evaluate", "--linear_weights", "WEIGHTS"], "holds no linear.weight and linear.bias"),
        (
            ["--evaluate", "--linear_weights", "TRAINED/checkpoint.pth.tar", "--n_last_blocks", "2"],
            "is for 4 labels and 512 features, here are 4 and 256",
        ),
        (
            ["--evaluate", "--linear_weights", "TRAINED/checkpoint.pth.tar", "--num_labels", "9"],
            "is for 4 labels and 512 features, here are 9 and 512",
        ),
        (
            ["--evaluate", "--linear_weights", "TRAINED/checkpoint.pth.tar", "--pretrained_weights", "random"],
            "was made with weights ",
        ),
        (["--output_dir", "TRAINED", "--epochs", "9"], "was made with epochs 3; this run has epochs 9"),
        (["--output_dir", "TRAINED", "--lr", "1"], "was made with lr 0.5; this run has lr 1.0"),
        (["--output_dir", "TRAINED", "--n_last_blocks", "1"], "n_last_blocks 4; this run has n_last_blocks 1"),
        (["--output_dir", "TRAINED", "--batch_size_per_gpu", "8"], "global_batch 16; this run has global_batch 8"),
        (["--output_dir", "TRAINED", "--pretrained_weights", "random"], "Use the same, or another --output_dir"),
        (["--output_dir", "WEIGHTS"], "can't write to --output_dir"),
    ],
)
def test_what_the_user_can_put_right_ends_with_one_line_and_code_2(
    monkeypatch, capsys, data, weights, trained, tmp_path, flags, says
):
    places = {"TRAINED": str(trained), "WEIGHTS": str(weights)}
    flags = [re.sub("TRAINED|WEIGHTS", lambda found: places[found[0]], flag) for flag in flags]
    before = sorted((path.name, path.read_bytes()) for path in trained.iterdir())
    code, error = end(monkeypatch, capsys, *data, "--output_dir", tmp_path, *flags)
    assert code == 2
    assert error.startswith("error: ")
    assert says in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())
    assert sorted((path.name, path.read_bytes()) for path in trained.iterdir()) == before


SAVED = {"epoch": "3", "best_acc": 0.0, "state_dict": {}, "optimizer": {}, "scheduler": {}}


@pytest.mark.parametrize("content", [{"epoch": 3, "teacher": {}}, [1, 2], SAVED])
def test_a_checkpoint_of_another_kind_is_not_overwritten(monkeypatch, capsys, data, tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    code, error = end(monkeypatch, capsys, *data, "--output_dir", tmp_path)
    assert code == 2
    assert "is of another kind, and would be overwritten" in error
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def test_a_public_checkpoint_of_another_shape_is_an_error(monkeypatch, capsys, data, trained, tmp_path):
    public = {name: part for name, part in checkpoint_of(trained).items() if name != "args"}
    torch.save(public, tmp_path / "checkpoint.pth.tar")
    code, error = end(monkeypatch, capsys, *data, "--n_last_blocks", 2, "--output_dir", tmp_path)
    assert code == 2
    assert "does not fit this run: state_dict" in error
    assert "\n" not in error


def test_fewer_training_images_than_processes_is_an_error(data, tmp_path):
    args = arguments(*data, "--output_dir", tmp_path)
    args.rank, args.world_size = 0, 41
    with pytest.raises(utils.UserError, match="40 training images are too few for 41 processes"):
        eval_linear.train_classifier(None, None, (range(40), None), (None, None), args, torch.device("cpu"))


# ---- whole commands ----


def test_the_command_of_the_readme_trains_and_evaluates(data, trained, tmp_path):
    done = run_script(ROOT / "eval_linear.py", *SMALL, *data, "--output_dir", tmp_path)
    assert log_of(tmp_path) == log_of(trained)
    assert len(RESULT.findall(done.stdout)) == 3
    assert re.search(r"^Epoch: \[2/3\]  \[2/3\]  eta: 0:00:00  loss: \S+ \(\S+\)  lr: ", done.stdout, re.M)


@pytest.mark.slow
def test_two_processes_train_and_count_as_one_does_with_the_whole_batch(tiny_root, data, tmp_path):
    root = tmp_path / "odd"  # 19 validation images: shares of 10 and 9
    shutil.copytree(tiny_root, root)
    next((root / "val" / "text").iterdir()).unlink()
    flags = [*SMALL, *data, "--data_path", root]
    eval_linear.main(arguments(*flags, "--output_dir", tmp_path / "one"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "eval_linear.py")
    out = run_script(*launcher, *flags, "--batch_size_per_gpu", 8, "--output_dir", tmp_path / "two").stdout
    assert [number for number, _ in RESULT.findall(out)] == ["19"] * 3
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    weights = [checkpoint_of(tmp_path / name)["state_dict"] for name in ("one", "two")]
    for name in weights[0]:
        assert_near(weights[1][name], weights[0][name], 1e-4, name)
