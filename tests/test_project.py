"""The commands, links and tables of README and docs/, and the scripts that set the project up."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import CAN_COMPILE, ROOT
from PIL import Image

import dino_cli
import vision_transformer

README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
PAGES["CONTRIBUTING.md"] = (ROOT / "CONTRIBUTING.md").read_text()
EACH_PAGE = pytest.mark.parametrize("page", sorted(PAGES))

# ---- commands ----


def commands_of(text):
    """Commands in a page's bash blocks, without comments; a backslash at the end of a line continues it."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
    lines = [re.split(r"(?:^| +)# ", line)[0] for line in lines]
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


COMMANDS = sorted({command for text in PAGES.values() for command in commands_of(text)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_docs_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] in ("git", "cd"):  # to get a checkout
        return
    if words[0].startswith("./"):
        assert os.access(words[0], os.X_OK)
        return
    if words[0] == "pip":
        assert words[1:3] == ["install", "-r"]
        assert (ROOT / words[3]).is_file()
        return
    assert words[0] in ("python", "torchrun")
    (script,) = (word for word in words if word.endswith(".py"))
    module = importlib.import_module(script.removesuffix(".py"))
    parser = dino_cli.OneLineParser(parents=[module.get_args_parser()])
    args = dino_cli.parse_args(parser, words[words.index(script) + 1 :])
    if getattr(args, "compile", False) and not CAN_COMPILE:
        pytest.skip("--compile needs torch 2.5")
    module.check_args(args)


def test_commands_are_found_across_lines_and_without_comments():
    text = "```bash\n# first\npython a.py \\\n  --x 1   # why\ngit clone y && ./b.sh\n```\n```sh\nno\n```\n"
    assert [command.split() for command in commands_of(text)] == [
        ["python", "a.py", "--x", "1"],
        ["git", "clone", "y"],
        ["./b.sh"],
    ]


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "def get_args_parser" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_command_in_the_docs(script):
    assert any(f"python {script}" in command for command in COMMANDS)


@pytest.fixture
def run_code(tmp_path, monkeypatch):
    """run_code(code) -> its names. It runs in a folder with photo.jpg, and a ViT-S/16 with settings and without."""
    Image.new("RGB", (300, 260), (200, 120, 40)).save(tmp_path / "photo.jpg")
    state = vision_transformer.vit_small(patch_size=16).state_dict()
    for name in ("backbone.pth", "plain.pth"):
        torch.save(state, tmp_path / name)
    (tmp_path / "backbone.json").write_text('{"arch": "vit_small", "patch_size": 16, "image_size": 224}')
    monkeypatch.chdir(tmp_path)

    def run(code):
        names = {}
        exec(code, names)
        return names

    return run


def test_the_code_in_the_readme_that_loads_a_backbone_runs(run_code):
    ours, hub = re.findall(r"```python\n(.*?)```", README, re.S)
    names = run_code(ours.replace('"dino_vits16"', '"backbone.pth"'))
    assert (names["features"].shape, names["attention"].shape) == ((1, 384), (1, 6, 197, 197))
    offline = hub.replace("path/to/dino-pytorch", str(ROOT)).replace('"local")', '"local", pretrained=False)')
    assert "pretrained=False" in offline
    assert run_code(f"import torch\n{offline}")["model"].embed_dim == 384


def test_the_code_in_the_page_about_evaluation_runs(run_code):
    ours, plain = re.findall(r"```python\n(.*?)```", PAGES["docs/evaluation.md"], re.S)
    names = run_code(ours.replace('"runs/vits16"', '"backbone.pth"'))
    shapes = [tuple(names[name].shape) for name in ("cls_token", "tokens", "patches", "attention", "maps")]
    assert shapes == [(1, 384), (1, 197, 384), (1, 14, 14, 384), (1, 6, 197, 197), (1, 6, 14, 14)]
    assert [tokens.shape for tokens in names["last_four"]] == [names["tokens"].shape] * 4
    assert torch.equal(run_code(plain)["model"].cls_token.cpu(), names["model"].cls_token.cpu())


# ---- files, links, tables, lines ----


def test_the_table_of_files_in_the_readme_names_every_file():
    section = README.partition("## The code")[2].partition("\n## ")[0]
    cells = " ".join(row.split("|")[1] for row in section.splitlines() if row.startswith("| `"))
    named = [path.name for pattern in re.findall(r"`([\w*]+\.py)`", cells) for path in ROOT.glob(pattern)]
    missing = [name for name in re.findall(r"`([\w]+\.py)`", cells) if not (ROOT / name).exists()]
    assert not missing
    assert sorted(named) == sorted(path.name for path in ROOT.glob("*.py"))


@EACH_PAGE
def test_files_that_a_page_names_exist(page):
    for name in set(re.findall(r"[` ]([\w/]+\.(?:py|yaml|sh))\b", PAGES[page])):
        assert (ROOT / name).exists() or (ROOT / "recipes" / name).exists(), name


def anchors_of(text):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH_PAGE
def test_links_lead_to_files_and_headings_that_exist(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text()), link


def test_every_page_is_linked_from_the_readme():
    assert all(f"]({page})" in README for page in PAGES if page != "README.md")


@EACH_PAGE
def test_lines_are_no_wider_than_their_limits(page):
    code = False
    for number, line in enumerate(PAGES[page].splitlines(), start=1):
        code ^= line.startswith("```")
        # Diagrams of imports are as wide as text.
        limit = 98 if code and page != "CONTRIBUTING.md" else 120
        assert len(line) <= limit, f"{page}:{number} has {len(line)} columns, more than {limit}"


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 200


def test_every_recipe_is_in_the_docs():
    for path in ROOT.glob("recipes/*.yaml"):
        page = "docs/evaluation.md" if path.stem.startswith("finetune_") else "docs/training.md"
        assert f"| `{path.stem}`" in PAGES[page], path.name


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


@pytest.mark.parametrize(
    ("option", "code", "says"),
    [("-h", 0, "Usage: ./demo.sh [OUTPUT_DIR]\n"), ("--help", 0, "Usage:"), ("--epochs", 2, "option --epochs (usage")],
)
def test_the_demo_takes_no_option_for_a_folder(checkout, option, code, says):
    shutil.copy(ROOT / "demo.sh", checkout)
    done = subprocess.run(["./demo.sh", option], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == code
    assert says in (done.stderr if code else done.stdout)
    assert not (checkout / ".venv").exists()


def test_pip_install_brings_the_requirements_and_no_module(tmp_path, monkeypatch):
    """Modules called utils or hubconf would be in the way of other projects."""
    build = pytest.importorskip("setuptools.build_meta")
    for name in ("pyproject.toml", "requirements.txt", "utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        needed = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.M)
        assert not [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert Path(wheel.filename).name.startswith("dino_pytorch-")
    assert sorted(needed) == sorted((ROOT / "requirements.txt").read_text().split())
