"""Every script's flags: each number has limits, --help says them, and what lies outside is one line."""

import importlib
import math
import re

import pytest
from conftest import ROOT, run_script

import utils

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "def get_args_parser" in path.read_text())
REQUIRED = {
    "export": ["--to", "timm", "--output", "x.pth"],
    "report": ["run"],
    "video_generation": ["--input_path", "x"],
}


def parser_of(script):
    flags = importlib.import_module(script).get_args_parser()
    return utils.OneLineParser(parents=[flags], formatter_class=utils.HelpFormatter)


def numbers_of(script):
    return [action for action in parser_of(script)._actions if action.type and is_number(action.type)]


def is_number(read):
    """Whether an argparse type makes numbers, and bool_flag's true and false are none."""
    try:
        return type(read("1")) in (int, float)
    except ValueError:
        return False


NUMBERS = [(script, action) for script in SCRIPTS for action in numbers_of(script)]
EACH_NUMBER = pytest.mark.parametrize(("script", "flag"), NUMBERS, ids=lambda x: getattr(x, "dest", x))


def answer(script, flag, number):
    """What the script itself says of a flag's value, before any work."""
    words = [flag.option_strings[0], *[number] * (flag.nargs if isinstance(flag.nargs, int) else 1)]
    args = utils.parse_args(parser_of(script), [*REQUIRED.get(script, []), *words])
    importlib.import_module(script).check_args(args)


def test_all_numbers_are_found():
    assert len(SCRIPTS) == 12
    found = {(script, flag.dest) for script, flag in NUMBERS}
    assert {("main_dino", "lr"), ("video_generation", "threshold"), ("benchmark", "processes")} <= found


@EACH_NUMBER
def test_help_says_the_limits_of_each_number(script, flag):
    parser = parser_of(script)
    text = " ".join(parser.format_help().split())
    limits = utils.describe_limits(*flag.limits)
    assert re.search(rf"{flag.option_strings[0]}\b[^()]*.*?\(default: [^)]*\)?, {re.escape(limits)}\)", text)


def outside(flag):
    """Numbers that lie just outside of a flag's limits, and NaN and the infinite."""
    lowest, highest = flag.limits
    if flag.type is int:
        return [str(number) for number in (lowest - 1, highest + 1) if math.isfinite(number)]
    just_below = 0.0 if lowest == utils.ABOVE_0[0] else lowest - 0.001 * (abs(lowest) or 1)
    just_above = [str(1.001 * highest)] if math.isfinite(highest) else []
    return [str(just_below), *just_above, "nan", "inf"]


@EACH_NUMBER
def test_a_number_just_outside_its_limits_is_refused(script, flag):
    says = re.escape(f"--{flag.dest} ") + ".*" + re.escape(utils.describe_limits(*flag.limits))
    for number in outside(flag):
        with pytest.raises(utils.UserError, match=says) as error:
            answer(script, flag, number)
        assert error.value.exit_code == 2


@EACH_NUMBER
def test_a_word_that_is_no_such_number_is_refused(script, flag, capsys):
    for word in ("nan", "inf", "1.5") if flag.type is int else ("much",):
        with pytest.raises(SystemExit) as ended:
            answer(script, flag, word)
        assert ended.value.code == 2
        assert f"invalid {flag.type.__name__} value: '{word}'" in capsys.readouterr().err


def test_limits_are_said_as_they_are_meant():
    assert utils.describe_limits(0, 1) == "between 0 and 1"
    assert utils.describe_limits(*utils.AT_LEAST_1) == "at least 1"
    assert utils.describe_limits(*utils.ABOVE_0) == "above 0"
    assert utils.describe_limits(utils.ABOVE_0[0], 1) == "above 0 and at most 1"


@pytest.mark.parametrize("script", ["main_dino", "eval_knn", "eval_linear"])
def test_help_needs_neither_a_network_connection_nor_what_takes_seconds_to_import(script):
    code = (
        "import runpy, socket, sys\n"
        "def refuse(*_): raise OSError('asked for the network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        f"sys.argv = ['{script}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{script}.py', run_name='__main__')\n"
        "finally:\n"
        "    slow = {'timm', 'wandb', 'tensorboard', 'transformers', 'onnx', 'matplotlib', 'cv2', 'submitit', 'av'}\n"
        "    slow |= {'skimage', 'scipy'}\n"
        "    assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    said = run_script("-c", code).stdout
    assert "--patch_size PIXELS" in said
    assert "(default: " in said
