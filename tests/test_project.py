"""The README's commands, and the scripts that set the project up."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import dino_cli

README = (ROOT / "README.md").read_text()
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = [line.split(" #")[0].strip() for line in BASH.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_is_one_that_exists(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0].startswith("./"):
        assert os.access(words[0], os.X_OK)
        return
    (script,) = (word for word in words if word.endswith(".py"))
    module = importlib.import_module(script.removesuffix(".py"))
    parser = dino_cli.OneLineParser(parents=[module.get_args_parser()])
    module.check_args(dino_cli.parse_args(parser, words[words.index(script) + 1 :]))


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "def get_args_parser" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_in_the_readme_and_measured_by_the_test_suite(script):
    assert f"python {script} " in BASH
    assert f"| `{script}` |" in README
    assert script.removesuffix(".py") in (ROOT / "test.sh").read_text().split()


def test_files_that_the_readme_names_are_there():
    for name in set(re.findall(r"`([\w/]+\.(?:py|yaml|sh))`", README)):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_the_readme_code_that_loads_backbones_runs():
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "torch.hub" in code)
    offline = [line for line in code.splitlines() if "published weights" not in line]
    code = "\n".join(offline).replace("path/to/this/checkout", str(ROOT))
    code += "\nassert features.shape == (1, 384) and attention.shape == (1, 6, 901, 901)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


# ---- dependencies ----

DEPENDENCIES = (ROOT / "docs" / "dependencies.md").read_text()


def test_the_list_of_dependencies_is_that_of_the_requirements():
    needed = DEPENDENCIES.partition("Nothing below is needed")[0]
    rows = re.findall(r"^\| ([\w-]+) \| `", needed, re.M)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [re.match(r"[\w-]+", line)[0] for line in lines if line and not line.startswith("#")]
    assert sorted(rows) == sorted(required)


def imports_of(script):
    """Top-level names of all modules that a script imports anywhere in it."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_whatever_a_script_imports_is_in_the_list_of_dependencies():
    scripts = list(ROOT.glob("*.py"))
    imported = {name for script in scripts for name in imports_of(script)}
    foreign = imported - sys.stdlib_module_names - {script.stem for script in scripts}
    assert {"torch", "yaml", "wandb", "cv2"} <= foreign
    listed = set(re.findall(r"`(\w+)`", "".join(row.split("|")[2] for row in re.findall(r"^\|.*", DEPENDENCIES, re.M))))
    assert foreign <= listed


# ---- setting up ----


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a stand-in for `python -m venv` whose pip notes what it is asked to install."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "venv.sh", tmp_path / ".ci")
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "fake-python"
    fake.write_text(
        "#!/bin/bash\n"
        'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; exit; fi\n'
        'if [ "$1 $2 $3" = "-m pip install" ]; then echo "${@: -1}" >>installed; [ ! -e broken ]; exit; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    fake.chmod(0o755)
    return tmp_path


def set_up(checkout, requirements, python="./fake-python"):
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'. .ci/venv.sh {requirements}; echo "ready: $python"'],
        cwd=checkout,
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
    )


def test_requirements_are_installed_once_and_again_when_they_change(checkout):
    for _ in range(2):
        assert set_up(checkout, "requirements.txt").stdout.endswith("ready: .venv/bin/python\n")
    assert (checkout / "installed").read_text().split() == ["requirements.txt"]
    with open(checkout / "requirements.txt", "a") as file:
        file.write("six\n")
    set_up(checkout, "requirements.txt")
    assert (checkout / "installed").read_text().split() == ["requirements.txt"] * 2


def test_the_developers_requirements_serve_the_demo_too(checkout):
    set_up(checkout, "requirements-dev.txt")
    set_up(checkout, "requirements.txt")
    assert (checkout / "installed").read_text().split() == ["requirements-dev.txt"]


def test_an_installation_that_failed_is_tried_again(checkout):
    (checkout / "broken").touch()
    assert set_up(checkout, "requirements.txt").returncode != 0
    (checkout / "broken").unlink()
    assert set_up(checkout, "requirements.txt").returncode == 0
    assert len((checkout / "installed").read_text().split()) == 2


def test_an_old_python_is_named(checkout):
    old = checkout / "old-python"
    old.write_text('#!/bin/bash\n[ "$1" = --version ] && echo "Python 3.8.2"\nexit 1\n')
    old.chmod(0o755)
    done = set_up(checkout, "requirements.txt", python="./old-python")
    assert done.returncode == 2
    assert "Python 3.8.2" in done.stderr
    assert not (checkout / ".venv").exists()
