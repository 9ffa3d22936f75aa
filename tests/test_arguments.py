"""Every script's flags: each number has a range, --help shows it, and a value outside is refused in one line."""

import importlib
import re

import pytest
from conftest import ROOT, run_script

import dino_cli

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "def get_args_parser" in path.read_text())
REQUIRED = {
    "export": ["--to", "timm", "--output", "x.pth"],
    "report": ["run"],
    "video_generation": ["--input_path", "x"],
}


KINDS = ("int", "float", "share_or_none")


def parser_of(script):
    flags = importlib.import_module(script).get_args_parser()
    return dino_cli.OneLineParser(parents=[flags], formatter_class=dino_cli.HelpFormatter)


def numbers_of(script):
    """The flags that are numbers, but for --local_rank, which launchers pass and nobody reads."""
    actions = parser_of(script)._actions
    return [a for a in actions if getattr(a.type, "__name__", "") in KINDS and a.dest != "local_rank"]


NUMBERS = [(script, action) for script in SCRIPTS for action in numbers_of(script)]
EACH_NUMBER = pytest.mark.parametrize(("script", "flag"), NUMBERS, ids=lambda x: getattr(x, "dest", x))


def test_all_numbers_are_found():
    assert len(SCRIPTS) == 16
    found = {(script, flag.dest) for script, flag in NUMBERS}
    assert {("main_dino", "lr"), ("video_generation", "threshold"), ("benchmark", "processes")} <= found


@EACH_NUMBER
def test_help_shows_the_range_of_each_number(script, flag):
    text = " ".join(parser_of(script).format_help().split())
    assert re.search(
        rf"{flag.option_strings[0]}\b[^()]*.*?\((default: [^)]*\)?, )?{re.escape(flag.type.range)}\)", text
    )


def outside(flag):
    """Numbers just outside a flag's range, NaN and infinity."""
    whole, words = flag.type.__name__ == "int", flag.type.range.split()
    if words[0] == "above":
        return ["0", "-1", "nan", "inf"]
    low, *high = (int(word) if whole else float(word) for word in words if re.match(r"-?\d", word))
    if whole:
        return [str(low - 1), *(str(number + 1) for number in high)]
    return [str(low - 0.001 * (abs(low) or 1)), *(str(1.001 * number) for number in high), "nan", "inf"]


def refusal(script, flag, number, capsys):
    """What parsing a flag's value ends with."""
    words = [f"{flag.option_strings[0]}", *[number] * (flag.nargs if isinstance(flag.nargs, int) else 1)]
    words = [f"{words[0]}={number}"] if flag.nargs is None else words
    with pytest.raises(SystemExit) as ended:
        dino_cli.parse_args(parser_of(script), [*REQUIRED.get(script, []), *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


@EACH_NUMBER
def test_a_number_just_outside_its_range_is_refused(script, flag, capsys):
    for number in outside(flag):
        line = refusal(script, flag, number, capsys)
        assert line.count("\n") == 1
        assert f"{flag.option_strings[0]}: " in line
        assert f"{number} must be {flag.type.range}" in line


@EACH_NUMBER
def test_a_word_that_is_no_such_number_is_refused(script, flag, capsys):
    for word in ("nan", "inf", "1.5") if flag.type.__name__ == "int" else ("much",):
        assert f"invalid {flag.type.__name__} value: '{word}'" in refusal(script, flag, word, capsys)


def test_help_needs_neither_a_network_connection_nor_what_takes_seconds_to_import():
    code = """
import runpy, socket, sys
import torchvision
theirs = set(sys.modules)
def refuse(*_): raise OSError("asked for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
for script in ("main_dino", "eval_knn", "eval_linear", "eval_logistic", "eval_finetune"):
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(f"{script}.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code
slow = {"timm", "wandb", "tensorboard", "transformers", "onnx", "matplotlib", "cv2", "submitit", "av", "skimage"}
ours = set(sys.modules) - theirs
assert not slow & ours, slow & ours
"""
    said = run_script("-c", code, fresh=True).stdout
    assert said.count("usage: ") == 5
    assert "(default: " in said
