"""dino_cli.py: flags, recipes, and how a script ends."""

import argparse
import os
import re
import sys

import pytest
from conftest import ROOT, SMALL_RUN, run_script
from torch.utils.data import DataLoader, Dataset

import dino_cli
import utils
from utils import UserError

# ---- flags and recipes ----


@pytest.mark.parametrize(
    ("words", "value"), [(("on", "true", "1", "True", "ON"), True), (("off", "false", "0", "False", "oFF"), False)]
)
def test_bool_flag_reads_the_public_words_in_any_case(words, value):
    assert [utils.bool_flag(word) for word in words] == [value] * len(words)


@pytest.mark.parametrize("word", ["yes", "2", "", "tru"])
def test_bool_flag_refuses_other_words_by_name(word):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{word}' must be true or false"):
        utils.bool_flag(word)


def flags():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", help="Recipe.")
    parser.add_argument("--lr", type=float, default=0.5, help="Learning rate.")
    parser.add_argument("--epochs", type=int, default=100, help="Epochs.")
    parser.add_argument("--scale", type=float, nargs=2, default=(0.4, 1.0), help="Scale.")
    parser.add_argument("--use_fp16", type=utils.bool_flag, default=True, help="Mixed precision.")
    parser.add_argument("--data_path", default="sample", help="Images.")
    return parser


@pytest.fixture
def parse(tmp_path):
    """parse(text of a recipe or None, *words of the command line) -> Namespace."""

    def parse(recipe, *words):
        if recipe is not None:
            (tmp_path / "recipe.yaml").write_text(recipe)
            words = ("--config", str(tmp_path / "recipe.yaml"), *words)
        return dino_cli.parse_args(dino_cli.OneLineParser(parents=[flags()]), words)

    return parse


@pytest.mark.parametrize("words", [("--epochs", "9"), ("--epochs=9",), ("--epoc", "9")])
def test_the_command_line_wins_over_the_recipe(parse, words):
    assert parse("epochs: 7\n", *words).epochs == 9


@pytest.fixture
def error(capsys):
    """error(*words) -> the line with which these words end the parser."""

    def error(*words):
        with pytest.raises(SystemExit) as ended:
            dino_cli.parse_args(dino_cli.OneLineParser(parents=[flags()]), words)
        assert ended.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    return error


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["--epohcs", "3"], "--epochs"),
        (["--use-fp16", "true"], "--use_fp16"),
        (["-epochs", "3"], "--epochs"),
        (["--scale", "1", "2", "3", "--data-path=x"], "--data_path"),
    ],
)
def test_an_unknown_flag_gets_the_nearest_one(error, words, near):
    line = error(*words)
    assert line.startswith("error: unrecognized arguments: ")
    assert f"; did you mean {near}" in line


def test_a_word_without_a_flag_has_no_near_one(error):
    assert error("epochs") == "error: unrecognized arguments: epochs (--help lists the flags)\n"


def test_flags_that_are_on_or_off_say_true_or_false(error, run):
    assert "argument --use_fp16: 'yes' must be true or false (" in error("--use_fp16", "yes")
    assert "Mixed precision. (default: True, true or false)" in run(print, "--help")[1]


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A folder that has recipes/short.yaml beside dino_cli.py, and another one to be in."""
    (tmp_path / "code" / "recipes").mkdir(parents=True)
    (tmp_path / "code" / "recipes" / "short.yaml").write_text("epochs: 7\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(dino_cli, "__file__", str(tmp_path / "code" / "dino_cli.py"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_a_recipe_is_found_by_its_name_from_any_folder(recipes, parse):
    (recipes / "elsewhere" / "short").mkdir()  # no file
    args = parse(None, "--config", "short")
    assert (args.epochs, args.config) == (7, "short")
    (recipes / "elsewhere" / "short").rmdir()
    (recipes / "elsewhere" / "short").write_text("epochs: 8\n")
    assert parse(None, "--config", "short").epochs == 8  # a file of that name comes first


def test_a_part_of_a_name_finds_all_recipes_that_contain_it():
    with pytest.raises(UserError, match=r"did you mean cifar10_cpu, cifar10_resnet18, cifar10_vit, finetune_cifar10, "):
        dino_cli.find_recipe("cifar10")
    with pytest.raises(UserError, match=r"nor the name of a recipe\. There are cifar10_cpu, "):
        dino_cli.find_recipe("")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("shrot", "--config shrot is neither a file nor the name of a recipe; did you mean short?"),
        ("x", "--config x is neither a file nor the name of a recipe. There are short"),
        ("short.yml", "can't read the recipe --config short.yml: No such file or directory; did you mean short?"),
        ("./short", "can't read the recipe --config ./short: No such file"),
        ("recipes/shrot.yaml", "recipes/shrot.yaml: No such file or directory; did you mean short?"),
        ("mine/shrot.yaml", "mine/shrot.yaml: No such file or directory\n"),
    ],
)
def test_an_unknown_recipe_lists_what_there_is(recipes, parse, name, says):
    with pytest.raises(UserError) as raised:
        parse(None, "--config", name)
    assert says in f"{raised.value}\n"


def test_a_wrong_value_on_the_command_line_is_not_blamed_on_the_recipe(parse, capsys):
    with pytest.raises(SystemExit):
        parse("epochs: 7\n", "--lr", "high")
    error = capsys.readouterr().err
    assert error.startswith("error: argument --lr: invalid float value: 'high'")
    assert error.count("\n") == 1


def test_flags_know_which_of_them_were_given(parse):
    args = parse("epochs: 100\n", "--sca", "0.4", "1.0", "--lr=0.5")
    assert args.given == {"config", "epochs", "scale", "lr"}  # also those that are given their defaults
    assert "given" not in vars(args)
    assert parse(None).given == set()


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (36, "--crop 36 is not a multiple of --patch_size 16. Use 32 or 48"),
        (15, "--crop 15 is not a multiple of --patch_size 16. Use 16"),
        ([33, 64], "--crop 33 64 is not a multiple of --patch_size 16. Use 32 64 or 48 64"),
    ],
)
def test_a_size_of_no_whole_patches_is_refused_with_the_nearest_ones(size, says):
    with pytest.raises(UserError) as raised:
        dino_cli.check_whole_patches("crop", size, 16)
    assert str(raised.value) == says
    dino_cli.check_whole_patches("crop", 48, 16)


# ---- run ----


@pytest.fixture
def run(monkeypatch, capsys):
    """run(main, *words) -> (exit code, stdout, stderr) of a script with this main function."""

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        code = 0
        try:
            dino_cli.run(main, flags(), "What the script does.\n\n    two commands\n")
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


def test_run_calls_main_with_the_arguments(run):
    seen = []
    assert run(seen.append, "--epochs", "4") == (0, "", "")
    assert [args.epochs for args in seen] == [4]


@pytest.mark.parametrize("code", [2, 3])
def test_a_user_error_is_one_line_and_its_exit_code(run, code):
    def main(args):
        raise UserError("there is no folder x. Name another", exit_code=code)

    assert run(main) == (code, "", "error: there is no folder x. Name another\n")


def test_an_error_is_one_line_even_if_a_name_in_it_has_two(run):
    def main(args):
        raise UserError("there is no folder x\ny. Name another")

    assert run(main) == (2, "", "error: there is no folder x y. Name another\n")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (KeyError("a bug"), None),
        (RuntimeError("unable to open shared memory object </torch_1_2>"), "/dev/shm, through which loaders pass"),
        (OSError(24, "Too many open files"), "too many open files. Raise `ulimit -n`"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a loader process was killed"),
        (RuntimeError("CUDA out of memory. Tried to allocate 1 GiB"), "not enough memory. Lower --batch_size_per_gpu"),
        (RuntimeError("received 0 items of ancdata"), "too many open files. Raise `ulimit -n`"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory. Lower --batch"),
        (RuntimeError("Pin memory thread exited unexpectedly"), "a loader process was killed. Most likely"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:5"), "the connection to another process is lost"),
    ],
)
def test_other_errors_keep_their_traceback_and_get_a_hint_if_the_cause_is_known(monkeypatch, capsys, error, hint):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as ended:
        dino_cli.run(main, argparse.ArgumentParser(add_help=False), "")
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback (most recent call last)" in said
    assert type(error).__name__ in said
    assert ("hint: " in said) == bool(hint)
    assert hint is None or f"hint: {hint}" in said.splitlines()[-1]


class Unreadable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        try:
            raise OSError("truncated file")
        except OSError as e:
            raise UserError("can't read image 7") from e


def test_a_user_error_of_a_loader_process_is_one_line(run):
    batches = iter(DataLoader(Unreadable(), num_workers=1))
    code, _, error = run(lambda args: next(batches))
    assert (code, error) == (2, "error: can't read image 7\n")
    assert list(batches) == []  # lets the worker end now, not in the next garbage collection


def test_help_prints_the_description_and_the_defaults(run):
    code, out, _ = run(print, "--help")
    assert code == 0
    assert "What the script does.\n\n    two commands\n" in out
    assert "Epochs. (default: 100)" in out
    assert "(default: (0.4, 1.0))" in out


def test_a_folder_in_the_way_of_an_output_file_is_an_error(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(UserError, match=r"--there .* has a folder named log\.txt"):
        dino_cli.check_output_dir(tmp_path, "--there", ("log.txt",))


def test_sigterm_removes_temporary_files(tmp_path):
    code = f"""
import os, signal, tempfile
import argparse, dino_cli
def main(args):
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        os.kill(os.getpid(), signal.SIGTERM)
dino_cli.run(main, argparse.ArgumentParser(add_help=False), "")
"""
    assert run_script("-c", code, check=False).returncode == 143
    assert not list(tmp_path.iterdir())


def test_an_output_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"can't write to --output_dir {path}: a file is in its way"):
            dino_cli.check_output_dir(path)


def test_a_refused_start_leaves_no_empty_folder(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    for folder in (tmp_path / "new" / "run", kept):
        flags = ["--data_path", tmp_path / "none", "--output_dir", folder]
        assert run_script("main_dino.py", *SMALL_RUN, *flags, check=False).returncode == 2
    assert not (tmp_path / "new" / "run").exists()
    assert kept.is_dir()


ON_A_BUSY_MACHINE = """
import os, time
from pathlib import Path
import dino_cli, main_dino

sleep, say, waits = time.sleep, dino_cli.say_error, Path(__file__).with_name("waits")
if os.environ["RANK"] == "0":  # it has the error first, and then wakes only after the other has ended
    time.sleep = lambda seconds: (waits.touch(), sleep(max(seconds, 3)))
else:
    def say_later(message):
        while not waits.exists():
            sleep(0.01)
        say(message)
    dino_cli.say_error = say_later
dino_cli.run(main_dino.train_dino, main_dino.get_args_parser(), "")
"""


def test_torchrun_repeats_an_error_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    script = tmp_path / "busy.py"
    script.write_text(ON_A_BUSY_MACHINE)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run_script(*torchrun, script, *SMALL_RUN, "--data_path", tmp_path / "none", check=False)
    assert done.returncode == 1
    said, *repeated = re.finditer(r"error \(rank ([01])\): --data_path \S+ does not exist", done.stderr)
    assert said[1] == "0"
    assert 1 <= len(repeated) <= 2  # once for each process that torchrun saw fail
    assert "Traceback" not in done.stderr[: said.start()]
    assert "Root Cause" in done.stderr[: repeated[-1].start()]


def test_an_error_of_one_process_alone_is_printed(tmp_path, monkeypatch):
    """Before the processes meet, such as a machine with one GPU for two of them."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = run_script("main_dino.py", *SMALL_RUN, "--data_path", tmp_path / "none", check=False)
    assert "does not exist" in done.stderr
