"""Recipes: what each sets and says; --print_config: the settings of a run, as a recipe, with their sources."""

import argparse
import json
import math
import re
import sys

import pytest
import yaml
from conftest import ROOT, arguments_of, run_script

import dino_backbones
import dino_cli
import dino_health
import main_dino
import run_with_submitit
import utils
from utils import UserError

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EACH_RECIPE = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)

BOOSTED = {"epochs": 300, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30, "norm_last_layer": False}
LARGE = {
    "arch": "vit_base",
    "min_lr": 2e-6,
    "clip_grad": 0.3,
    "freeze_last_layer": 3,
    "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 50,
    "global_crops_scale": [0.25, 1.0],
    "local_crops_scale": [0.05, 0.25],
    "local_crops_number": 10,
    "use_fp16": False,
}
# What each recipe changes of the plain ViT-S/16 run, and the images it trains on.
IMAGENET = 1_281_167
CHANGES = {
    "imagenet_vits16": (IMAGENET, {}),
    "imagenet_vits16_boosted": (IMAGENET, BOOSTED),
    "imagenet_vits16_24gb": (IMAGENET, {"grad_accum_steps": 8}),
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
    "imagenet_xcits12_16": (IMAGENET, {**BOOSTED, "arch": "xcit_small_12_p16"}),
    "cifar": (
        50_000,
        {
            "arch": "vit_tiny",
            "patch_size": 4,
            "global_crops_size": 32,
            "local_crops_size": 16,
            "local_crops_scale": [0.1, 0.4],
            "local_crops_number": 6,
            "blur_radius": [0.1, 0.5],
            "out_dim": 4096,
            "epochs": 500,
            "batch_size_per_gpu": 256,
            "saveckp_freq": 50,
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
            "local_crops_size": 24,
            "local_crops_scale": [0.1, 0.4],
            "local_crops_number": 2,
            "blur_radius": [0.1, 0.5],
            "out_dim": 1024,
            "use_bn_in_head": True,
            "drop_path_rate": 0.0,
            "momentum_teacher": 0.97,
            "lr": 0.004,
            "epochs": 12,
            "warmup_epochs": 1,
            "saveckp_freq": 0,
            "num_workers": 2,
        },
    ),
}

# k-NN, linear of the weights that the paper's authors published, and of the two runs that they describe; in per cent.
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
}


def plain(*flags, script=main_dino):
    """{setting: value} of these flags, in plain types."""
    return utils.plain_args(arguments_of(script, *flags))


def without_config(settings):
    return {name: value for name, value in settings.items() if name != "config"}


def opening(recipe):
    """The comment at the top of a recipe, on one line."""
    lines = recipe.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


# ---- recipes ----


def test_the_table_of_this_test_has_every_recipe():
    assert {path.stem for path in RECIPES} == set(CHANGES)


@EACH_RECIPE
def test_a_recipe_changes_of_the_defaults_what_it_should_and_nothing_else(recipe):
    changed = {k: v for k, v in without_config(plain("--config", recipe)).items() if v != plain()[k]}
    assert changed == CHANGES[recipe.stem][1]


@EACH_RECIPE
def test_a_recipe_holds_no_contradiction_and_draws_no_warning(recipe, monkeypatch):
    args = arguments_of(main_dino, "--config", recipe)
    main_dino.check_args(args)
    dino_backbones.check_arch(args.arch)
    args.world_size = processes(recipe)
    doctor = dino_health.HealthMonitor(args, CHANGES[recipe.stem][0] // utils.global_batch(vars(args)))
    doctor.check_settings()
    assert doctor.warnings == []


def processes(recipe):
    return int(re.search(r"Hardware: (\d+) (?:GPUs?|process) ×", opening(recipe))[1])


@EACH_RECIPE
def test_the_images_a_step_that_a_recipe_names_are_those_it_makes(recipe):
    args = {**plain("--config", recipe), "world_size": processes(recipe)}
    product, said = re.search(r"Hardware: (.*?) = ([\d,]+) images a step", opening(recipe)).groups()
    assert utils.global_batch(args) == int(said.replace(",", "")) == math.prod(map(int, re.findall(r"\d+", product)))


@EACH_RECIPE
def test_a_recipe_says_what_to_expect_in_how_long(recipe):
    words = opening(recipe)
    assert "k-NN" in words
    assert "linear" in words
    assert re.search(r"\d days|\d minutes|not (stated|measured)", words)
    if recipe.stem in PUBLISHED:
        assert "{} % k-NN, {} % linear".format(*PUBLISHED[recipe.stem]) in words
    else:
        assert re.search(r"\d\d\.\d % k-NN", words)


@EACH_RECIPE
def test_whose_each_value_is_stands_behind_it_or_at_the_top(recipe):
    lines = [line for line in recipe.read_text().splitlines() if line and not line.startswith("#")]
    unmarked = [line for line in lines if not re.search(r" # (paper|authors|ours)\b", line)]
    assert not unmarked or (recipe.stem == "demo" and "All values are `ours`" in opening(recipe))


@EACH_RECIPE
def test_a_recipe_sets_nothing_twice_and_nothing_that_belongs_to_one_machine(recipe):
    keys = re.findall(r"^(\w+):", recipe.read_text(), re.M)
    assert len(keys) == len(set(keys))
    assert not {"data_path", "output_dir", "device", "dist_url", "local_rank", "seed", "wandb"} & set(keys)


def test_the_run_on_one_gpu_is_the_plain_run_in_eight_passes():
    one, eight = (
        plain("--config", ROOT / "recipes" / f"{name}.yaml") for name in ("imagenet_vits16_24gb", "imagenet_vits16")
    )
    assert utils.global_batch(one) == utils.global_batch({**eight, "world_size": 8})
    ways = {"config", "grad_accum_steps"}
    assert {k: v for k, v in one.items() if k not in ways} == {k: v for k, v in eight.items() if k not in ways}


def test_the_recipe_for_small_images_trains(tiny_root, tmp_path):
    few = ["--epochs", 1, "--warmup_epochs", 1, "--batch_size_per_gpu", 8, "--num_workers", 0, "--tensorboard", "off"]
    where = ["--data_path", tiny_root / "train", "--output_dir", tmp_path, "--device", "cpu"]
    main_dino.train_dino(arguments_of(main_dino, "--config", ROOT / "recipes" / "cifar.yaml", *few, *where))
    (line,) = map(json.loads, (tmp_path / "log.txt").read_text().splitlines())
    assert line["train_loss"] == pytest.approx(math.log(4096), rel=0.05)  # as of a network that knows nothing


# ---- reading a recipe ----


@pytest.fixture
def read(tmp_path):
    """read(text of a recipe, *words of the command line) -> {setting: value}."""

    def read(text, *words, script=main_dino):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return plain("--config", tmp_path / "mine.yaml", *words, script=script)

    return read


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("tensorboard: off", "off"),
        ("tensorboard: on", "on"),
        ("use_fp16: off", False),
        ("use_fp16: False", False),
        ("data_path: 2024", "2024"),
        ("data_path: 007", "007"),
        ("data_path: 1:30", "1:30"),
        ("data_path: 'a # b'", "a # b"),
        ("data_path: grün", "grün"),
        ("wandb: ''", ""),
        ("lr: 1e-3", 1e-3),
        ("lr: .5", 0.5),
        ("clip_grad: 3", 3.0),
        ("local_crops_scale: [.1, 1]", [0.1, 1.0]),
    ],
)
def test_a_value_of_a_recipe_is_read_as_on_the_command_line(read, line, value):
    assert read(line)[line.partition(":")[0]] == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: 1\nepochs: 3\nlr: 2\n", r"mine\.yaml: lr stands there 2 times$"),
        ("lr: {a: 1}\n", r"in .*mine\.yaml: lr is a table"),
        ("data_path: {a: 1}\n", r"in .*mine\.yaml: data_path is a table"),
        ("lr:\n", r"in .*mine\.yaml: lr has no value"),
        ("lr: null\n", r"in .*mine\.yaml: lr has no value"),
        ("print_config: true\n", "unknown key 'print_config'"),
        ("out_dims: 3\n", "unknown key 'out_dims'; did you mean out_dim"),
        ("5: 3\n", "unknown key '5'"),
        ("? [lr, wd]\n: 3\n", "can't read the recipe"),
        ("lr: 1\x00\n", "can't read the recipe"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_line_that_names_it(read, text, says):
    with pytest.raises(UserError, match=says) as error:
        read(text)
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"lr: \xff\xfe")
    with pytest.raises(UserError, match=r"can't read the recipe --config .*mine\.yaml: 'utf-8' codec"):
        plain("--config", tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("epochs: 3.5", "argument --epochs: invalid int value: '3.5'"),
        ("lr: [1, 2]", "unrecognized arguments: 2"),
        ("global_crops_scale: 1", "argument --global_crops_scale: expected 2 arguments"),
        ("global_crops_scale: []", "argument --global_crops_scale: expected 2 arguments"),
        ("optimizer: adam", "argument --optimizer: invalid choice: 'adam'"),
        ("use_fp16: 7", "argument --use_fp16: '7' is neither"),
    ],
)
def test_a_wrong_type_in_a_recipe_is_one_line_that_names_it(read, capsys, line, says):
    with pytest.raises(SystemExit) as ended:
        read(line)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(rf"error: in \S*mine\.yaml: {re.escape(says)}.*\n", error)


@pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("!!bool on", True), ("false", False)])
def test_a_recipe_sets_a_switch_of_the_slurm_script(read, word, value):
    settings = read(f"wait: {word}\nlr: 1\n", script=run_with_submitit)
    assert (settings["wait"], settings["use_volta32"], settings["lr"]) == (value, False, 1.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: [[1]]\n", "lr is a table, or a list of lists"),
        ("blur_radius: &a [1]\nlr: [*a, *a]\n", "lr is a table, or a list of lists"),
        ("lr: !!binary AAAA\n", "lr is a table, or a list of lists"),
        ("lr: " + "[" * 20_000, "is nested too deeply"),
        ("use_fp16: !!bool maybe\n", "can't read the recipe"),
        ("seed: !!timestamp x\n", "can't read the recipe"),
        ("lr: 1\n" + "#" * 2**20, "is longer than 1048576 letters"),
    ],
)
def test_recipes_that_would_grow_or_sink_are_refused(read, text, says):
    with pytest.raises(utils.UserError, match=says):
        read(text)


def test_a_switch_that_is_neither_true_nor_false_is_refused(read, capsys):
    with pytest.raises(SystemExit):
        read("wait: maybe\n", script=run_with_submitit)
    assert "mine.yaml: argument --wait: ignored explicit argument 'maybe'" in capsys.readouterr().err


# ---- --print_config ----


@pytest.fixture
def printed(capsys):
    """printed(*words of the command line) -> the recipe that --print_config makes of them."""

    def printed(*words, script=main_dino):
        with pytest.raises(SystemExit) as ended:
            script.check_args(arguments_of(script, *words, "--print_config"))
        assert not ended.value.code
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return printed


def sources(text):
    """{setting: where it came from} of a printed recipe."""
    lines = re.findall(r"^((?:# )?(\w+): .+)$", text, re.M)
    return {name: line.rpartition(" # ")[2] for line, name in lines}


ALL_WAYS = [
    *("--epochs", "20", "--lr=1e-3", "--use_fp16=off", "--norm_last_layer", "TRUE", "--optim", "sgd"),
    *("--global_crops_scale", ".3", "1", "--local-rank=2", "--wandb", "it's: #1 of 'grün'", "--tensorboard", "off"),
    *("--data_path", "1e3", "--output_dir", "null", "--save_every", "0.1"),
]


@pytest.mark.parametrize("words", [[], ALL_WAYS], ids=["defaults", "all ways"])
@pytest.mark.parametrize("script", [main_dino, run_with_submitit], ids=lambda script: script.__name__)
def test_printed_settings_are_a_recipe_of_the_same_run(printed, read, script, words):
    before = plain(*words, script=script)
    assert without_config(read(printed(*words, script=script), script=script)) == without_config(before)


@EACH_RECIPE
def test_printed_settings_of_a_recipe_are_a_recipe_of_the_same_run(printed, read, recipe):
    before = plain("--config", recipe, "--epochs", "77")
    assert without_config(read(printed("--config", recipe, "--epochs", "77"))) == without_config(before)


def test_printed_job_flags_are_read_again(printed, read):
    words = ["--wait", "--mem_gb", "2.5", "--slurm_extra", "a=b", "c=d,e", "--comment", "12: 'x'\ny", "--ngpus", "0"]
    text = printed(*words, script=run_with_submitit)
    settings = read(text, script=run_with_submitit)
    assert without_config(settings) == without_config(plain(*words, script=run_with_submitit))
    assert settings["comment"] == "12: 'x'\ny"
    assert [sources(text)[name] for name in ("wait", "use_volta32", "slurm_account")] == [
        "command line",
        "default",
        "default",
    ]


def test_every_setting_is_printed_once(printed):
    assert sorted(sources(printed())) == sorted(without_config(plain()))


def test_each_setting_is_printed_with_its_value_and_source(printed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my run.yaml").write_text("epochs: 20\nlr: 0.2\nuse_fp16: true\nlocal_crops_scale: [0.1, 0.3]\n")
    words = ["--conf", "my run.yaml", "--lr=0.1", "--global_crops_scale", "0.4", "1", "--compile", "off"]
    words += ["--saveckp_f", "3"]
    text = printed(*words)
    found = sources(text)
    came = {source: {k for k in found if found[k] == source} for source in set(found.values())}
    assert came.pop("default") == found.keys() - set().union(*came.values())
    assert came == {
        "my run.yaml": {"epochs", "use_fp16", "local_crops_scale"},
        "command line": {"lr", "global_crops_scale", "compile", "saveckp_freq"},
    }
    values = yaml.safe_load(text)
    assert (values["epochs"], values["lr"], values["saveckp_freq"], values["warmup_epochs"]) == (20, 0.1, 3, 10)
    assert (values["local_crops_scale"], values["compile"], values["arch"]) == ([0.1, 0.3], False, "vit_small")
    assert values["min_lr"] == 1e-6  # a number to any reader of YAML


def test_the_default_said_on_the_command_line_comes_from_there(printed):
    assert sources(printed("--patch_size", "16", "--seed=0"))["patch_size"] == "command line"


def test_a_long_value_stays_on_its_line(printed):
    path = "a folder with many words " * 20
    assert sources(printed("--data_path", path))["data_path"] == "command line"


def test_a_setting_that_has_no_value_is_a_comment(printed):
    text = printed(script=run_with_submitit)
    assert re.search(r"^# partition: not set +# default$", text, re.M)
    assert "partition" not in yaml.safe_load(text)
    assert re.search(r"^output_dir: runs/%j +# default$", text, re.M)


def test_print_config_may_be_abbreviated_and_is_no_setting_itself(capsys):
    with pytest.raises(SystemExit) as ended:
        main_dino.check_args(arguments_of(main_dino, "--print", "--epochs", "30"))
    assert not ended.value.code
    text = capsys.readouterr().out
    assert "epochs: 30" in text
    assert "print_config" not in text
    assert not re.search(r"^config", text, re.M)
    assert "print_config" not in plain()


def test_of_several_processes_the_first_prints(printed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "epochs: 100" in printed()
    monkeypatch.setenv("RANK", "1")
    assert printed() == ""


def test_under_slurm_the_first_task_prints(printed, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert printed() == ""
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert "epochs: 100" in printed()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", "nowhere.yaml"], "can't read the recipe --config nowhere.yaml"),
        (["--lr", "high"], "argument --lr: invalid float value: 'high'"),
        (["--epoch_s", "3"], "unrecognized arguments: --epoch_s 3"),
        (["--epochs", "3"], "--warmup_epochs 10 is longer than the run (--epochs 3)"),
        (["--momentum_teacher", "2"], "--momentum_teacher 2.0 must be between 0 and 1"),
        (["--local_crops_size", "97"], "--local_crops_size 97 is no multiple of --patch_size 16"),
    ],
)
def test_mistakes_are_the_same_with_print_config(monkeypatch, capsys, words, says):
    monkeypatch.setattr(sys, "argv", ["main_dino.py", "--print_config", *words])
    with pytest.raises(SystemExit) as ended:
        dino_cli.run(main_dino.train_dino, main_dino.get_args_parser(), "")
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.startswith(f"error: {says}")
    assert err.count("\n") == 1


def test_scripts_without_recipes_have_no_such_flag():
    import eval_knn

    with pytest.raises(SystemExit):
        arguments_of(eval_knn, "--print_config")


def test_flags_given_are_told_by_any_parser_of_the_standard_library():
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=3)
    parser.add_argument("--pair", nargs=2, default=("a", "b"))
    parser.add_argument("--rest", nargs="+", default=[])
    parser.add_argument("--on", action="store_true")
    assert utils.flags_given(parser, []) == []
    assert utils.flags_given(parser, ["--num=3", "--on", "--pair", "a", "b"]) == ["number", "pair", "on"]
    assert utils.flags_given(parser, ["--rest", "x"]) == ["rest"]


def test_a_network_that_there_is_not_is_no_good_setting():
    with pytest.raises(utils.UserError, match="unknown --arch vit_smal; did you mean vit_small"):
        main_dino.check_args(arguments_of(main_dino, "--arch", "vit_smal", "--print_config"))


def test_the_script_prints_before_any_work_and_its_output_runs_again(tmp_path):
    words = ["main_dino.py", "--config", "recipes/imagenet_vitb8.yaml", "--output_dir", tmp_path / "out"]
    done = run_script("-X", "importtime", *words, "--print_config", "--data_path", "/nowhere")
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
    assert "torch" in imported
    assert "timm" not in imported  # which takes seconds, and is for networks that are not ours
    assert not (tmp_path / "out").exists()
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = run_script(
        "main_dino.py", "--config", tmp_path / "again.yaml", "--print_config", "--local_rank", "0"
    ).stdout
    assert yaml.safe_load(again) == yaml.safe_load(done.stdout)
    assert sources(again)["local_rank"] == "command line"
    assert sources(again)["epochs"] == str(tmp_path / "again.yaml")
