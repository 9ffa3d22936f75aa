"""Fine-tuning: learning rates, augmentation and steps against closed forms, and the script end to end."""

import contextlib
import json
import math
import os
import re
import shutil
import sys

import pytest
import torch
from conftest import CtrlC, arguments_of, assert_near, assert_same, run_script, same_state
from torch import nn

import dino_backbones
import dino_classifiers
import dino_features
import eval_finetune
import utils

# Runs for a second. 40 training images of 32 pixels, 4 patches each: 5 steps per epoch.
# fmt: off
SMALL = [
    "--arch", "vit_nano", "--image_size", "32", "--batch_size_per_gpu", "8", "--lr", "0.01", "--epochs", "3",
    "--warmup_epochs", "1", "--num_workers", "0", "--device", "cpu", "--use_fp16", "false",
]
PLAIN = [
    "--mixup", "0", "--cutmix", "0", "--reprob", "0", "--drop_path_rate", "0", "--repeats", "1", "--smoothing", "0",
    "--aa", "none",
]
# fmt: on
CPU = torch.device("cpu")
RESULT = re.compile(r"^Accuracy of the network on the (?P<number>\d+) test images: (?P<percent>[\d.]+)%$", re.M)
pytestmark = pytest.mark.usefixtures("small_networks")


def arguments(*flags):
    return arguments_of(eval_finetune, *SMALL, *flags)


def run(*flags):
    eval_finetune.main(arguments(*flags))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def checkpoint_of(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def data(tiny_root, small_networks, tmp_path_factory):
    """Flags that name small data and weights."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save(dino_backbones.build_backbone("vit_nano", 16, 32)[0].state_dict(), path)
    return ["--data_path", tiny_root, "--pretrained_weights", path]


FULL = ["--layer_decay", "0.5", "--ema_decay", "0.9"]  # beside the defaults: all randomness that there is


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    run(*data, *FULL, "--output_dir", folder)
    return folder


def test_defaults_are_deits():
    args = vars(arguments_of(eval_finetune))
    deit = {"batch_size_per_gpu": 64, "warmup_epochs": 5, "weight_decay": 0.05, "drop_path_rate": 0.1, "layer_decay": 1}
    deit |= {"aa": "rand-m9-mstd0.5-inc1", "repeats": 3, "reprob": 0.25, "mixup": 0.8, "cutmix": 1, "smoothing": 0.1}
    assert deit.items() <= args.items()
    assert args["lr"] * 512 / 256 == 0.0005  # theirs is for 512 images
    assert (args["arch"], args["patch_size"], args["ema_decay"], args["evaluate"]) == ("vit_small", 16, 0, False)


# ---- learning rates ----


def groups_of(arch, *flags):
    """{parameter name: (lr_scale, weight_decay)} and the model, for --layer_decay 0.8."""
    args = arguments("--layer_decay", 0.8, "--weight_decay", 0.3, "--arch", arch, *flags)
    model = eval_finetune.Classifier(*dino_backbones.build_backbone(arch, 16, 32), num_classes=3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in eval_finetune.parameter_groups(model, args):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    assert set(found) == set(names.values())
    return found


@pytest.mark.parametrize("arch", ["vit_tiny", "timm:vit_tiny_patch16_224"])
def test_the_lr_of_each_block_is_a_power_of_the_layer_decay(arch):
    found = groups_of(arch)
    for i in range(12):
        assert found[f"backbone.blocks.{i}.attn.qkv.weight"] == (pytest.approx(0.8 ** (12 - i)), 0.3)
        assert found[f"backbone.blocks.{i}.mlp.fc1.bias"] == (pytest.approx(0.8 ** (12 - i)), 0)
    for name, decay in (("pos_embed", 0), ("cls_token", 0), ("patch_embed.proj.weight", 0.3)):
        assert found[f"backbone.{name}"] == (pytest.approx(0.8**13), decay)
    assert found["backbone.norm.weight"] == (pytest.approx(0.8), 0)
    assert (found["head.weight"], found["head.bias"]) == ((1, 0.3), (1, 0))


def test_a_timm_convnet_has_layers_and_a_torchvision_one_needs_a_decay_of_1():
    scales = {scale for scale, _ in groups_of("timm:resnet18").values()}
    assert sorted(scales) == pytest.approx([0.8**i for i in range(9, -1, -1)])  # stem, 8 blocks, head
    with pytest.raises(utils.UserError, match=r"--arch resnet18 has no order of layers for --layer_decay 0\.8"):
        groups_of("resnet18")
    assert {scale for scale, _ in groups_of("resnet18", "--layer_decay", 1).values()} == {1}


def test_lr_warms_up_and_follows_a_cosine_and_each_group_has_its_share(trained):
    """40 images, 8 per step: 5 steps per epoch, 15 in all. The warm-up has 5 of them."""
    peak, low = 0.01 * 8 / 256, 1e-6
    lrs = [peak * i / 4 for i in range(5)]
    lrs += [low + (peak - low) * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]
    means = [sum(lrs[first : first + 5]) / 5 for first in (0, 5, 10)]
    assert [line["train_lr"] for line in log_of(trained)] == pytest.approx(means)
    groups = checkpoint_of(trained)["optimizer"]["param_groups"]
    assert sorted({group["lr_scale"] for group in groups}) == [0.125, 0.25, 0.5, 1]  # stem, two blocks, head
    assert [group["lr"] for group in groups] == pytest.approx([lrs[-1] * group["lr_scale"] for group in groups])


# ---- augmentation ----


def test_copies_of_an_image_go_to_different_processes_and_have_different_crops(data):
    train = eval_finetune.load_data(arguments(*data), utils.RGB)[0]
    ranks = [eval_finetune.RepeatedSampler(train.images, 4, 7, rank, 2, repeats=3) for rank in (0, 1)]
    for sampler in ranks:
        sampler.set_epoch(5)
    assert [len(sampler) for sampler in ranks] == [20, 20]
    both = [key for pair in zip(*ranks, strict=True) for key in pair]
    generator = torch.Generator().manual_seed(utils.derive_seed(7, utils.ORDER, 5))
    order = torch.randperm(40, generator=generator).tolist()
    assert both == [(5, order[i // 3], i % 3) for i in range(40)]
    crops = [train[key][0] for key in ((5, 3, 0), (5, 3, 1), (6, 3, 0), (5, 3, 0))]
    assert crops[0].dtype == torch.uint8
    assert crops[0].shape == (3, 32, 32)
    assert torch.equal(crops[0], crops[3])
    assert not any(torch.equal(crops[0], other) for other in crops[1:3])


@pytest.mark.parametrize("policy", ["rand-m10-mstd0.5-inc1", "v0"])
def test_no_draw_of_a_policy_fails(data, policy):
    """Some draws of timm's Posterize keep no bit, which Pillow refuses."""
    train = eval_finetune.load_data(arguments(*data, "--aa", policy), utils.RGB)[0]
    assert all(train[0, i % 40, i][0].shape == (3, 32, 32) for i in range(300))


def mixed(images, labels, seed, *flags):
    """(images, targets) of BatchAugmentation in float64, without random erasing."""
    args = arguments("--reprob", 0, *flags)
    augment = eval_finetune.BatchAugmentation(args, 5, utils.RGB, CPU)
    utils.fix_random_seeds(seed)
    images, targets = augment(images, labels)
    return images.double(), targets.double()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_are_mixed_and_smoothed_as_the_images_are_mixed(kind):
    images, labels = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 4, 0])
    other = {"mixup": "cutmix", "cutmix": "mixup"}[kind]
    plain = utils.normalize(images).double()
    for seed in range(5):
        got, targets = mixed(images, labels, seed, f"--{other}", 0, "--smoothing", 0.2)
        if kind == "mixup":  # the share of the image itself, by least squares
            difference = plain - plain.flip(0)
            share = ((got - plain.flip(0)) * difference).sum() / (difference**2).sum()
            assert_near(got, share * plain + (1 - share) * plain.flip(0), 1e-5)
        else:
            own = (got == plain).all(dim=1)  # [B, H, W]
            assert torch.equal(got, torch.where(own[:, None], plain, plain.flip(0)))
            share = own[0].double().mean()
        smoothed = torch.full((6, 5), 0.2 / 5).double()
        smoothed[range(6), labels] += 0.8
        assert_near(targets, share * smoothed + (1 - share) * smoothed.flip(0), 1e-6)
        assert 0 <= share <= 1


def test_erasing_replaces_a_rectangle_by_noise():
    images = torch.full((32, 3, 24, 24), 124, dtype=torch.uint8)
    args = arguments(*PLAIN, "--reprob", 1)
    utils.fix_random_seeds(3)
    got, labels = eval_finetune.BatchAugmentation(args, 5, utils.RGB, CPU)(images, torch.arange(32))
    assert torch.equal(labels, torch.arange(32))
    erased = (got != utils.normalize(images)).any(dim=1)  # [B, H, W]
    for mask in erased:
        rows, columns = (mask.any(dim=side).nonzero() for side in (1, 0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    noise = got.permute(0, 2, 3, 1)[erased]
    assert noise.std().item() == pytest.approx(1, abs=0.05)


def test_images_are_normalized_by_the_networks_mean_and_std():
    inputs = utils.RGB._replace(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    got, _ = eval_finetune.BatchAugmentation(arguments(*PLAIN), 5, inputs, CPU)(images, torch.arange(2))
    assert_near(got[0, :, 0, 0], [0.9 / 0.5, 0.8 / 0.25, 0.7 / 2], 1e-6)


# ---- a step ----


def test_the_new_layer_starts_at_a_thousandth_of_the_usual_weights():
    head = eval_finetune.Classifier(nn.Identity(), 500, 400).head
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert head.bias.abs().max() == 0


def larger_head(args):
    """A Classifier whose new layer has usual weights: else the backbone's gradients are lost in float32 rounding."""
    utils.fix_random_seeds(0)
    model = eval_finetune.build_model(args, 4, utils.RGB, CPU)
    model.head.weight.data.mul_(1000)
    return model


def one_epoch(data, *flags, smoothing=0.3):
    """(model, loss, [(crop, label)]) after an epoch of SGD with lr 0.5."""
    args = arguments(*data, *PLAIN, "--smoothing", smoothing, *flags)
    args.rank, args.world_size = 0, 1
    train, _, labels, _ = eval_finetune.load_data(args, utils.RGB)
    model = larger_head(args)
    groups = [{**group, "lr_scale": 1.0} for group in utils.get_params_groups(model)]
    augment = eval_finetune.BatchAugmentation(args, 4, utils.RGB, CPU)
    optimizer, scaler = torch.optim.SGD(groups, lr=0), torch.amp.GradScaler("cpu", enabled=False)
    parts = eval_finetune.Parts(model, None, optimizer, scaler, augment, None)
    per_step = args.batch_size_per_gpu * args.grad_accum_steps
    sampler = eval_finetune.RepeatedSampler(train.images, per_step, repeats=1)
    loader = dino_classifiers.build_loader(train, sampler, args, CPU, eval_finetune.dino_data.collate)
    means = eval_finetune.train_one_epoch(parts, loader, labels, [0.5] * 5, 0, args)
    return model, means["loss"], [(train[key][0], labels[key[1]]) for key in sampler]


def test_two_passes_are_one_batch_of_twice_the_size_and_the_step_is_the_gradient_of_the_mean_loss(data):
    one, loss, images = one_epoch(data, "--batch_size_per_gpu", 40)
    two, loss_of_two, _ = one_epoch(data, "--batch_size_per_gpu", 20, "--grad_accum_steps", 2)
    assert loss == pytest.approx(loss_of_two, rel=1e-5)

    # The same step in float64, with the smoothed cross-entropy written out.
    model = larger_head(arguments(*data, *PLAIN))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model, slow = model.double(), 0
    for crop, label in images:
        logits = model(utils.normalize(crop)[None].double())[0]
        log_probs = logits - logits.exp().sum().log()
        slow = slow - (0.7 * log_probs[label] + 0.3 * log_probs.mean()) / len(images)
    slow.backward()
    assert loss == pytest.approx(slow.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        for trained in (one, two):
            step = trained.state_dict()[name] - start[name]
            assert (step + 0.5 * parameter.grad).norm() <= 1e-3 * step.norm() + 2e-6, name  # rounding of the weights


def test_the_average_of_the_weights_has_its_momentum_and_copies_buffers():
    model, ema = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
    model[1].running_mean.fill_(5)
    want = 0.9 * ema[0].weight.detach() + 0.1 * model[0].weight.detach()
    eval_finetune.update_average(ema, model, 0.9)
    assert_near(ema[0].weight, want, 1e-6)
    assert torch.equal(ema[1].running_mean, torch.tensor([5.0, 5.0]))


def test_a_loss_that_is_not_finite_stops_with_exit_code_3(data, tmp_path):
    weights = torch.load(data[3], weights_only=True)
    weights["norm.bias"][3] = math.nan
    torch.save(weights, tmp_path / "broken.pth")
    with pytest.raises(utils.UserError, match=r"the loss is nan in epoch \[0/3\]") as ended:
        run(*data, "--pretrained_weights", tmp_path / "broken.pth", "--output_dir", tmp_path / "out")
    assert ended.value.exit_code == 3
    assert not list((tmp_path / "out").iterdir())


# ---- whole runs ----


def test_training_raises_the_accuracy_on_the_training_images(data, tiny_root, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(tiny_root / "train")
    flags = ["--epochs", 12, "--lr", 0.05, "--val_freq", 11, "--output_dir", tmp_path / "out", "--aa", "none"]
    run(*data, "--data_path", tmp_path, *PLAIN, *flags)
    first, *_, last = (line["test_acc1"] for line in log_of(tmp_path / "out") if "test_acc1" in line)
    assert last >= first + 20
    assert last > 60


@pytest.mark.parametrize(("epoch", "workers"), [(1, 0), (2, 2)])
def test_an_interrupted_run_resumes_bit_identically(epoch, workers, data, trained, tmp_path):
    flags = [*data, *FULL, "--output_dir", tmp_path]
    with contextlib.redirect_stdout(CtrlC(f"Epoch: [{epoch}/3]")), pytest.raises(KeyboardInterrupt):
        run(*flags)
    assert len(log_of(tmp_path)) == checkpoint_of(tmp_path)["epoch"] == epoch
    run(*flags, "--num_workers", workers)
    assert (tmp_path / "log.txt").read_text() == (trained / "log.txt").read_text()
    got, want = checkpoint_of(tmp_path), checkpoint_of(trained)
    for part in ("best_acc", "epoch", "optimizer", "state_dict", "ema"):
        assert_same(got[part], want[part])
    assert same_state(*(checkpoint_of(path, "checkpoint_best.pth")["state_dict"] for path in (tmp_path, trained)))


def test_the_seed_changes_a_run(data, trained, tmp_path):
    run(*data, *FULL, "--seed", 1, "--output_dir", tmp_path)
    assert log_of(tmp_path)[0]["train_loss"] != log_of(trained)[0]["train_loss"]


def test_the_average_is_what_is_validated_and_kept_as_the_best(trained, data, capsys):
    best, lines = checkpoint_of(trained, "checkpoint_best.pth"), log_of(trained)
    assert best["best_acc"] == max(line["test_acc1"] for line in lines)
    assert best["best_acc"] == lines[best["epoch"] - 1]["test_acc1"]
    last = checkpoint_of(trained)
    assert not same_state(last["state_dict"], last["ema"])
    capsys.readouterr()
    run(*data, "--pretrained_weights", trained / "checkpoint_best.pth", "--evaluate")
    assert RESULT.findall(capsys.readouterr().out) == [("20", f"{best['best_acc']:.1f}")]


def test_the_folder_of_a_run_with_an_average_stands_for_the_last_average(trained, data, capsys):
    capsys.readouterr()
    run(*data, "--pretrained_weights", trained, "--evaluate")
    assert RESULT.findall(capsys.readouterr().out) == [("20", f"{log_of(trained)[-1]['test_acc1']:.1f}")]
    average = checkpoint_of(trained)["ema"]
    model, _ = dino_features.load_run(trained)
    assert same_state(model, {k.removeprefix("backbone."): v for k, v in average.items() if k.startswith("backbone.")})


def test_classes_with_other_names_are_refused(refusal, data, trained, tiny_root, tmp_path):
    for part in ("train", "val"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for name, other in zip(("astronaut", "brick", "coffee", "text"), "dcba", strict=True):
            (tmp_path / "data" / part / other).symlink_to(tiny_root / part / name)
    renamed = ["--data_path", tmp_path / "data", *data[2:]]
    line = refusal(eval_finetune, *SMALL, *renamed, "--pretrained_weights", trained, "--evaluate")
    assert re.search(r"was made with classes \w+; this run has classes \w+\. Use the same", line)
    shutil.copytree(trained, tmp_path / "run")
    line = refusal(eval_finetune, *SMALL, *renamed, *FULL, "--output_dir", tmp_path / "run")
    assert "was made with classes" in line


def test_other_scripts_read_a_fine_tuned_network_by_its_folder(data, tmp_path):
    run(*data, "--epochs", 1, "--output_dir", tmp_path)
    model, _ = dino_features.load_run(tmp_path, "state_dict")
    state = checkpoint_of(tmp_path)["state_dict"]
    assert same_state(model, {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})


@pytest.mark.parametrize("arch", ["timm:vit_tiny_patch16_224", "resnet8"])
def test_other_networks_train(arch, data, tmp_path):
    flags = ["--arch", arch, "--pretrained_weights", "random", "--epochs", 1, "--output_dir", tmp_path]
    run(*data[:2], *flags)
    (line,) = log_of(tmp_path)
    assert line["train_loss"] == pytest.approx(math.log(4), rel=0.3)


# ---- errors ----


def test_the_images_to_evaluate_on_must_be_of_the_same_classes(refusal, data, trained, tiny_root, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for name in ("brick", "text"):
            (tmp_path / part / name).symlink_to(tiny_root / part / name)
    flags = ["--evaluate", "--pretrained_weights", trained / "checkpoint_best.pth", "--data_path", tmp_path]
    assert f"--data_path {tmp_path} has 2 classes; the network has 4" in refusal(eval_finetune, *SMALL, *flags)
    shutil.rmtree(tmp_path / "train")
    shutil.copytree(tmp_path / "val" / "text", tmp_path / "train" / "text")
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").symlink_to("train")
    assert "has only one class" in refusal(eval_finetune, *SMALL, *flags)


def test_a_network_for_other_values_than_8_bits_is_refused(refusal, data, tmp_path):
    weights = {
        "teacher": torch.load(data[3], weights_only=True),
        "args": {"arch": "vit_nano", "value_range": [0, 4095]},
    }
    torch.save(weights, tmp_path / "checkpoint.pth")
    flags = ["--data_path", data[1], "--pretrained_weights", tmp_path, "--output_dir", tmp_path / "out"]
    assert "was trained with --value_range. Fine-tuning is for 8-bit" in refusal(eval_finetune, *SMALL, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size", "20"], "--image_size 20 is not a multiple of --patch_size 16. Use 16 or 32"),
        (["--arch", "alexnett"], "unknown --arch alexnett"),
        (["--warmup_epochs", "9"], "--warmup_epochs 9 is longer than the run (--epochs 3)"),
        (["--batch_size_per_gpu", "7"], "--batch_size_per_gpu 7 is odd, and mixup pairs images"),
        (["--crop_scale", "1", "0.5"], "--crop_scale 1.0 0.5: put the smaller number first"),
        (["--aa", "best"], "--aa best is not a policy of timm"),
        (["--batch_size_per_gpu", "44"], "the 40 training images are fewer than one step of 44"),
        (["--lr", "1e-9"], "below --min_lr 1e-06"),
        (["--data_path", "nowhere"], "--data_path nowhere does not exist"),
        (
            ["--arch", "resnet8", "--pretrained_weights", "random", "--layer_decay", "0.7"],
            "no order of layers for --layer_decay 0.7",
        ),
        (["--evaluate", "--pretrained_weights", "random"], "--evaluate needs a network that this script has"),
        (["--evaluate"], "has no classifier. --evaluate needs a checkpoint of this script"),
        (["--output_dir", "TRAINED", "--lr", "0.02"], "was made with lr 0.01; this run has lr 0.02"),
        (["--output_dir", "TRAINED", "--grad_accum_steps", "2"], "global_batch 8; this run has global_batch 16"),
        (["--output_dir", "TRAINED", "--pretrained_weights", "random"], "was made with weights "),
    ],
)
def test_a_mistake_is_one_line_and_changes_no_file(refusal, data, trained, tmp_path, flags, message):
    before = sorted((path.name, path.read_bytes()) for path in trained.iterdir())
    flags = [str(trained) if flag == "TRAINED" else flag for flag in flags]
    assert message in refusal(eval_finetune, *SMALL, *data, *FULL, "--output_dir", tmp_path, *flags)
    assert not list(tmp_path.iterdir())
    assert sorted((path.name, path.read_bytes()) for path in trained.iterdir()) == before


def test_a_checkpoint_of_another_script_is_not_overwritten(refusal, data, tmp_path):
    torch.save({"student": {"a.weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "checkpoint.pth")
    line = refusal(eval_finetune, *SMALL, *data, "--output_dir", tmp_path)
    assert "is not a checkpoint of this script. Move it, or use another --output_dir" in line
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_without_timm_the_message_says_what_to_install(refusal, monkeypatch, data):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    line = refusal(eval_finetune, *SMALL, *data)
    assert line == "error: eval_finetune.py needs timm, for RandAugment and mixup: pip install timm"


@pytest.mark.slow
def test_two_processes_match_one_with_twice_the_batch(data, tmp_path):
    flags = [*SMALL, *data[:2], "--pretrained_weights", "random", *PLAIN, "--repeats", 2]
    flags += ["--epochs", 1, "--warmup_epochs", 0]
    run_script("eval_finetune.py", *flags, "--output_dir", tmp_path / "one")
    flags += ["--batch_size_per_gpu", 4, "--output_dir", tmp_path / "two"]
    assert RESULT.findall(run_script("eval_finetune.py", *flags, processes=2).stdout)
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
