"""Recipes: what each one sets and says. --print_config: the settings of a run as a recipe."""

import json
import math
import re
import sys

import pytest
import yaml
from conftest import CAN_COMPILE, ROOT, arguments_of, run_script

import dino_checkpoints
import dino_cli
import dino_health
import eval_finetune
import main_dino
import run_with_submitit
import utils
from utils import UserError

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EACH_RECIPE = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
TRAINING = [path for path in RECIPES if not path.stem.startswith("finetune_")]  # the others are of eval_finetune.py
EACH_OF_TRAINING = pytest.mark.parametrize("recipe", TRAINING, ids=lambda path: path.stem)

BOOSTED = {"epochs": 300, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30, "norm_last_layer": False}
TEN_CROPS = {"global_crops_scale": [0.25, 1.0], "local_crops_scale": [0.05, 0.25], "local_crops_number": 10}
LARGE = {
    "arch": "vit_base",
    "min_lr": 2e-6,
    "clip_grad": 0.3,
    "freeze_last_layer": 3,
    "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 50,
    **TEN_CROPS,
    "use_fp16": False,
}
TWO_SMALL_CROPS = {
    "global_crops_size": 24,
    "global_crops_scale": [0.2, 1.0],
    "local_crops_number": 0,
    "blur_p": [0.0, 0.0, 0.0],
    "use_bn_in_head": True,
    "momentum_teacher": 0.99,
    "momentum_teacher_end": 0.99,
    "saveckp_freq": 0,
}
FEW_LAUNCHES = {"compile": "reduce-overhead", "saveckp_epochs": 10, "augmentation": "fast", "num_workers": 14}
# The number of training images, and the settings that differ from the defaults (ViT-S/16, 100 epochs).
IMAGENET = 1_281_167
CHANGES = {
    "imagenet_vits16": (IMAGENET, {}),
    "imagenet_vits16_boosted": (IMAGENET, BOOSTED),
    "imagenet_vits16_24gb": (IMAGENET, {"grad_accum_steps": 8, "num_workers": 10}),
    "imagenet_vits8": (
        IMAGENET,
        {**BOOSTED, "patch_size": 8, "batch_size_per_gpu": 16, "grad_accum_steps": 4, "use_fp16": False},
    ),
    "imagenet_vitb16": (IMAGENET, {**LARGE, "epochs": 400, "batch_size_per_gpu": 32, "lr": 0.00075}),
    "imagenet_vitb8": (
        IMAGENET,
        {**LARGE, "patch_size": 8, "epochs": 300, "batch_size_per_gpu": 8, "grad_accum_steps": 4},
    ),
    "imagenet_resnet50": (
        IMAGENET,
        {
            "arch": "resnet50",
            "optimizer": "sgd",
            "lr": 0.03,
            "weight_decay": 1e-4,
            "weight_decay_end": 1e-4,
            "global_crops_scale": [0.14, 1.0],
            "local_crops_scale": [0.05, 0.14],
        },
    ),
    "imagenet_vits16_800ep": (IMAGENET, {**BOOSTED, **TEN_CROPS, "epochs": 800}),
    "imagenet_vits16_no_multicrop": (
        IMAGENET,
        {**BOOSTED, "local_crops_number": 0, "global_crops_scale": [0.14, 1.0], "clip_grad": 0.0, "min_lr": 1e-5},
    ),
    "imagenet_vitb16_vissl": (
        IMAGENET,
        {
            **{name: value for name, value in LARGE.items() if name not in TEN_CROPS},
            "epochs": 400,
            "batch_size_per_gpu": 32,
            "min_lr": 8e-6,
        },
    ),
    "imagenet_resnet50_800ep": (
        IMAGENET,
        {
            "arch": "resnet50",
            "epochs": 800,
            "batch_size_per_gpu": 51,
            "optimizer": "lars",
            "lr": 0.3,
            "weight_decay": 1e-6,
            "weight_decay_end": 1e-6,
            "global_crops_scale": [0.14, 1.0],
            "local_crops_scale": [0.05, 0.14],
        },
    ),
    "landmarks_vits16": (1_580_470, BOOSTED),
    "imagenet_xcits12_16": (
        IMAGENET,
        {
            **BOOSTED,
            "arch": "xcit_small_12_p16",
            "min_lr": 1e-5,
            "drop_path_rate": 0.05,
            "global_crops_scale": [0.3, 1.0],
            "local_crops_scale": [0.05, 0.3],
        },
    ),
    "cifar10_resnet18": (
        50_000,
        {
            **TWO_SMALL_CROPS,
            "arch": "resnet18_cifar",
            "out_dim": 2048,
            **FEW_LAUNCHES,
            "global_crops_size": 28,
            "warmup_teacher_temp": 0.025,
            "warmup_teacher_temp_epochs": 20,
            "epochs": 148,
            "warmup_epochs": 5,
            "batch_size_per_gpu": 128,
            "lr": 0.002,
        },
    ),
    "cifar10_vit": (
        50_000,
        {
            **TWO_SMALL_CROPS,
            "arch": "vit_tiny_conv",
            "patch_size": 4,
            **FEW_LAUNCHES,
            "out_dim": 2048,
            "drop_path_rate": 0.0,
            "centering": "sinkhorn",
            "warmup_teacher_temp": 0.03,
            "teacher_temp": 0.03,
            "epochs": 130,
            "batch_size_per_gpu": 128,
            "lr": 0.0016,
            "weight_decay_end": 0.1,
        },
    ),
    "cifar10_cpu": (
        50_000,
        {
            **TWO_SMALL_CROPS,
            "arch": "resnet8",
            "augmentation": "fast",
            "out_dim": 1024,
            "head_hidden_dim": 512,
            "warmup_teacher_temp": 0.025,
            "teacher_temp": 0.025,
            "epochs": 28,
            "warmup_epochs": 1,
            "freeze_last_layer": 0,
            "lr": 0.004,
            "knn_every": 7,
            "num_workers": 1,
        },
    ),
    "own_photos": (
        1_000,
        {
            "init_from": "published",
            "warmup_epochs": 5,
            "lr": 0.0001,
            "out_dim": 4096,
            "freeze_last_layer": 3,
            "saveckp_freq": 10,
        },
    ),
    "demo": (
        4_320,
        {
            "arch": "vit_nano",
            "patch_size": 8,
            "global_crops_size": 48,
            "global_crops_scale": [0.1, 1.0],
            "local_crops_number": 0,
            "blur_radius": [0.1, 0.5],
            "out_dim": 1024,
            "use_bn_in_head": True,
            "drop_path_rate": 0.0,
            "momentum_teacher": 0.97,
            "momentum_teacher_end": 0.996,
            "warmup_teacher_temp": 0.03,
            "teacher_temp": 0.03,
            "lr": 0.008,
            "weight_decay_end": 0.1,
            "freeze_last_layer": 0,
            "batch_size_per_gpu": 32,
            "epochs": 7,
            "warmup_epochs": 1,
            "saveckp_freq": 0,
            "num_workers": 2,
        },
    ),
}

# Of eval_finetune.py: processes, and what differs from its defaults (DeiT's; 100 epochs).
ONE_GPU = {"lr": 0.0001, "layer_decay": 0.75, "repeats": 1}
FINE_TUNING = {
    "finetune_cifar10": {**ONE_GPU, "batch_size_per_gpu": 256},
    "finetune_cifar100": {**ONE_GPU, "batch_size_per_gpu": 256},
    "finetune_flowers": {**ONE_GPU, "epochs": 500},
    "finetune_cars": {**ONE_GPU, "epochs": 200, "batch_size_per_gpu": 128},
    "finetune_inat18": {"layer_decay": 0.75},
    "finetune_inat19": {"layer_decay": 0.75},
    "finetune_imagenet": {"epochs": 300, "batch_size_per_gpu": 128, "min_lr": 1e-5},
}
# Accuracy in percent of fine-tuned ViT-S/16 and ViT-B/16 in table 6 of the paper.
TABLE_6 = {
    "finetune_cifar10": ("99.0", "99.1"),
    "finetune_cifar100": ("90.5", "91.7"),
    "finetune_inat18": ("72.0", "72.6"),
    "finetune_inat19": ("78.2", "78.6"),
    "finetune_flowers": ("98.5", "98.8"),
    "finetune_cars": ("93.0", "93.0"),
    "finetune_imagenet": ("81.5", "82.8"),
}

# k-NN and linear accuracy in percent: of the weights that the authors published, and of two runs in the paper.
PUBLISHED = {
    "imagenet_vits16": ("69.3", "74.0"),
    "imagenet_vits16_24gb": ("69.3", "74.0"),
    "imagenet_vits16_boosted": ("73.3", "76.0"),
    "imagenet_vits8": ("78.3", "79.7"),
    "imagenet_vitb16": ("76.1", "78.2"),
    "imagenet_vitb8": ("77.4", "80.1"),
    "imagenet_resnet50": ("67.5", "75.3"),
    "imagenet_xcits12_16": ("76.0", "77.8"),
    "own_photos": ("74.5", "77.0"),
    "imagenet_vits16_800ep": ("74.5", "77.0"),
    "imagenet_vits16_no_multicrop": ("67.9", "72.5"),
    "imagenet_vitb16_vissl": ("76.1", "78.2"),
    "imagenet_resnet50_800ep": ("67.5", "75.3"),
}


def settings_of(*flags, script=main_dino):
    """{setting: value} of these flags, in plain types, without --config."""
    settings = utils.plain_args(arguments_of(script, *flags))
    return {name: value for name, value in settings.items() if name != "config"}


def script_of(recipe):
    """The script that a recipe is for."""
    return eval_finetune if recipe.stem in FINE_TUNING else main_dino


def opening(recipe):
    """The comment at the top of a recipe, as one line."""
    lines = recipe.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


# ---- recipes ----


def test_all_recipes_are_tested_here():
    assert {path.stem for path in RECIPES} == set(CHANGES) | set(FINE_TUNING)


@EACH_RECIPE
def test_a_recipe_changes_these_defaults_and_no_others(recipe, monkeypatch):
    monkeypatch.setattr(dino_cli, "default_workers", lambda: 7)  # else it is the number of cores
    script = script_of(recipe)
    defaults, settings = settings_of(script=script), settings_of("--config", recipe, script=script)
    changed = {name: value for name, value in settings.items() if value != defaults[name]}
    assert changed == (FINE_TUNING[recipe.stem] if recipe.stem in FINE_TUNING else CHANGES[recipe.stem][1])


@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_recipe_for_fine_tuning_passes_all_checks_and_leaves_the_network_to_the_weights(name):
    recipe = ROOT / "recipes" / f"{name}.yaml"
    args = arguments_of(eval_finetune, "--config", recipe)
    eval_finetune.check_args(args)
    assert not {"arch", "patch_size", "image_size"} & args.given
    assert "{} % top-1 with the published ViT-S/16, {} % with ViT-B/16 (paper".format(*TABLE_6[name]) in opening(recipe)
    assert "not measured" in opening(recipe)


@EACH_OF_TRAINING
def test_a_recipe_passes_all_checks_without_a_warning(recipe):
    args = arguments_of(main_dino, "--config", recipe)
    if args.compile and not CAN_COMPILE:
        pytest.skip("--compile needs torch 2.5")
    main_dino.check_args(args)
    args.world_size = processes(recipe)
    args.images_per_step = dino_checkpoints.global_batch(vars(args))
    args.images = CHANGES[recipe.stem][0]
    assert dino_health.suspicious_settings(args, args.images // args.images_per_step) == {}


def processes(recipe):
    return int(re.search(r"Hardware: (\d+) (?:GPUs?|process) ×", opening(recipe))[1])


@EACH_RECIPE
def test_the_images_per_step_in_a_comment_are_right(recipe):
    args = {**settings_of("--config", recipe, script=script_of(recipe)), "world_size": processes(recipe)}
    product, number = re.search(r"Hardware: (.*?) = ([\d,]+) images (?:a|per) step", opening(recipe)).groups()
    assert (
        dino_checkpoints.global_batch(args)
        == int(number.replace(",", ""))
        == math.prod(map(int, re.findall(r"\d+", product)))
    )


@EACH_OF_TRAINING
def test_a_recipe_says_which_accuracy_to_expect_and_how_long_it_takes(recipe):
    words = opening(recipe)
    assert "linear" in words
    assert re.search(r"\d days|\d minutes|not (stated|measured)", words)
    if recipe.stem in PUBLISHED:
        assert "{} % k-NN, {} % linear".format(*PUBLISHED[recipe.stem]) in words
    else:
        assert re.search(r"\d\d\.\d (% k-NN|mAP)", words)


@EACH_RECIPE
def test_each_value_names_its_source_and_none_belongs_to_one_machine(recipe):
    text = recipe.read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    unmarked = [line for line in lines if not re.search(r" # (paper|authors|DeiT|ours)\b", line)]
    assert not unmarked or (recipe.stem == "demo" and "All values are `ours`" in opening(recipe))
    keys = re.findall(r"^(\w+):", text, re.M)
    assert len(keys) == len(set(keys))
    assert not {"data_path", "output_dir", "device", "dist_url", "local_rank", "seed", "wandb"} & set(keys)


def test_the_run_on_one_gpu_is_the_run_on_eight_in_eight_passes():
    one, eight = (
        settings_of("--config", ROOT / "recipes" / f"{name}.yaml")
        for name in ("imagenet_vits16_24gb", "imagenet_vits16")
    )
    assert dino_checkpoints.global_batch(one) == dino_checkpoints.global_batch({**eight, "world_size": 8})
    assert {**one, "grad_accum_steps": 1, "num_workers": eight["num_workers"]} == eight


@pytest.mark.parametrize("name", ["resnet18", "vit", "cpu"])
def test_the_recipes_for_small_images_train(tiny_root, tmp_path, name):
    few = ["--compile", "false", "--warmup_teacher_temp_epochs", 0]
    few += ["--epochs", 1, "--warmup_epochs", 1, "--batch_size_per_gpu", 8, "--num_workers", 0, "--tensorboard", "off"]
    where = ["--data_path", tiny_root / "train", "--output_dir", tmp_path, "--device", "cpu", "--knn_every", 0]
    recipe = ROOT / "recipes" / f"cifar10_{name}.yaml"
    run_script("main_dino.py", "--config", recipe, *few, *where)
    (line,) = map(json.loads, (tmp_path / "log.txt").read_text().splitlines())
    prototypes = settings_of("--config", recipe)["out_dim"]
    assert line["train_loss"] == pytest.approx(math.log(prototypes), rel=0.05)  # an untrained network


# ---- reading a recipe ----


@pytest.fixture
def read(tmp_path):
    """read(text of a recipe, *words of the command line) -> {setting: value}."""

    def read(text, *words, script=main_dino):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return settings_of("--config", tmp_path / "mine.yaml", *words, script=script)

    return read


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("tensorboard: off", "off"),
        ("use_fp16: off", False),
        ("data_path: 007", "007"),
        ("data_path: 1:30", "1:30"),
        ("data_path: 'a # b'", "a # b"),
        ("data_path: grün", "grün"),
        ("lr: 1e-3", 1e-3),
        ("local_crops_scale: [.1, 1]", [0.1, 1.0]),
        ("lr: 1\nlr: 2", 2.0),  # the last one counts
    ],
)
def test_a_value_in_a_recipe_is_read_as_on_the_command_line(read, line, value):
    assert read(line)[line.partition(":")[0]] == value


def test_the_command_line_overrides_a_recipe(read):
    settings = read("epochs: 20\nlr: 0.2\n", "--lr=0.1")
    assert (settings["epochs"], settings["lr"]) == (20, 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: {a: 1}\n", r"in .*mine\.yaml: lr is nested"),
        ("lr: [[1]]\n", r"in .*mine\.yaml: lr is nested"),
        ("lr:\n", r"in .*mine\.yaml: lr has no value"),
        ("print_config: true\n", "unknown key 'print_config'"),
        ("out_dims: 3\n", "unknown key 'out_dims'; did you mean out_dim"),
        ("5: 3\n", "unknown key '5'"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("lr: 1\x00\n", r"can't read the recipe --config .*mine\.yaml"),
        ("- lr\n", "no `flag: value` lines"),
        ("lr: " + "[" * 20_000, r"can't read the recipe --config .*mine\.yaml"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(read, text, message):
    with pytest.raises(UserError, match=message) as error:
        read(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epochs: 0", "argument --epochs: 0 must be at least 1"),
        ("lr: [1, 2]", "unrecognized arguments: 2"),
        ("global_crops_scale: 1", "argument --global_crops_scale: expected 2 arguments"),
        ("use_fp16: 7", "argument --use_fp16: '7' must be true or false"),
        ("compile: 7", "argument --compile: '7' must be true, false or reduce-overhead"),
    ],
)
def test_a_wrong_value_in_a_recipe_is_one_line(read, capsys, line, message):
    with pytest.raises(SystemExit) as ended:
        read(line)
    assert ended.value.code == 2
    assert re.fullmatch(rf"error: in \S*mine\.yaml: {re.escape(message)}.*\n", capsys.readouterr().err)


def test_a_recipe_sets_a_switch_to_true_or_false(read, capsys):
    for word, value in (("True", True), ("false", False)):
        settings = read(f"wait: {word}\nlr: 1\n", script=run_with_submitit)
        assert (settings["wait"], settings["use_volta32"], settings["lr"]) == (value, False, 1.0)
    with pytest.raises(SystemExit):
        read("wait: maybe\n", script=run_with_submitit)
    assert "mine.yaml: argument --wait: ignored explicit argument 'maybe'" in capsys.readouterr().err


# ---- --print_config ----


@pytest.fixture
def printed(capsys, monkeypatch):
    """printed(*words of the command line) -> the recipe that --print_config prints."""

    def printed(*words, script=main_dino):
        def main(args):
            raise AssertionError("--print_config does no work")

        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words), "--print_config"])
        dino_cli.run(main, script.get_args_parser(), "")
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return printed


ALL_WAYS = [
    *("--epochs", "20", "--lr=1e-3", "--use_fp16=off", "--norm_last_layer", "TRUE", "--optim", "sgd"),
    *("--global_crops_scale", ".3", "1", "--local-rank=2", "--wandb", "it's: #1 of 'grün'", "--tensorboard", "off"),
    *("--data_path", "1e3", "--output_dir", "null", "--save_every", "0.1"),
]
JOB = ["--wait", "--mem_gb", "2.5", "--slurm_extra", "a=b", "c=d,e", "--comment", "12: 'x'\ny" + " z" * 99]


@pytest.mark.parametrize(
    ("script", "words"),
    [(main_dino, []), (main_dino, ALL_WAYS), (run_with_submitit, []), (run_with_submitit, [*ALL_WAYS, *JOB])],
)
def test_printed_settings_are_a_recipe_of_the_same_run(printed, read, script, words):
    text = printed(*words, script=script)
    assert read(text, script=script) == settings_of(*words, script=script)
    names = re.findall(r"^(?:# )?(\w+):", text, re.M)
    assert names == list(settings_of(script=script))


@EACH_RECIPE
def test_the_printed_settings_of_a_recipe_are_the_same_run(printed, read, recipe):
    words, how = ("--config", recipe, "--epochs", "77"), {"script": script_of(recipe)}
    assert read(printed(*words, **how), **how) == settings_of(*words, **how)


def test_printed_settings_are_yaml_with_comments_for_unset_ones(printed):
    text = printed(script=run_with_submitit)
    assert re.search(r"^# partition: not set$", text, re.M)
    values = yaml.safe_load(text)
    assert "partition" not in values
    assert (values["output_dir"], values["min_lr"], values["use_fp16"]) == ("runs/%j", 1e-6, True)
    assert values["global_crops_scale"] == [0.4, 1.0]


@pytest.mark.parametrize("names", [("WORLD_SIZE", "RANK"), ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")])
def test_only_the_first_process_prints(printed, monkeypatch, names):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_LOCALID", "0")
    for rank, prints in (("0", True), ("1", False)):
        for name, value in zip(names, ("2", rank), strict=True):
            monkeypatch.setenv(name, value)
        assert ("epochs: 100" in printed()) == prints


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere.yaml"], "can't read the recipe --config nowhere.yaml"),
        (["--lr", "high"], "argument --lr: invalid float value: 'high'"),
        (["--epoch_s", "3"], "unrecognized arguments: --epoch_s 3"),
    ],
)
def test_print_config_reports_mistakes(printed, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        printed(*words)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message}")


def test_the_script_prints_before_any_work_and_its_output_runs_again(tmp_path):
    words = ["main_dino.py", "--config", "recipes/imagenet_vitb8.yaml", "--output_dir", tmp_path / "out"]
    done = run_script(*words, "--print_config", "--data_path", "/nowhere")
    assert not (tmp_path / "out").exists()
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert run_script("main_dino.py", "--config", tmp_path / "again.yaml", "--print_config").stdout == done.stdout
