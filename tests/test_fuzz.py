"""Random input from files and the command line is read, or is refused with one line.

100 examples per test; FUZZ_EXAMPLES=10000 in the environment tries more, with other random numbers. Hypothesis keeps
failures in .hypothesis and tries them first the next time.
"""

import io
import os
import random
import tarfile
import zipfile

import numpy as np
import torch
from conftest import SMALL_RUN
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import dino_checkpoints
import dino_cli
import dino_files
import dino_images
import dino_shards
import main_dino
import utils
from utils import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))


def fuzz(strategy, check):
    """Call `check` with examples of a strategy."""
    phases = [Phase.reuse, Phase.generate]
    options = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": phases}
    settings(max_examples=EXAMPLES or 100, derandomize=not EXAMPLES, **options)(given(strategy)(check))()


def answers(read, *args):
    """The result of `read`, or None if it raises a UserError, which must be one line."""
    try:
        return read(*args)
    except UserError as e:
        line = str(e)
    assert "\n" not in line
    assert len(line) > 20
    return None


@st.composite
def damaged(draw, wholes):
    """Files in which bits are flipped, and bytes inserted, deleted, repeated or cut off."""
    content = bytearray(draw(st.sampled_from(wholes)))
    rng = random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(0, 8))):
        at = rng.randrange(len(content) + 1)
        what = rng.randrange(5)
        if what == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            content[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif what == 2:
            del content[at : at + rng.randrange(1, 40)]
        elif what == 3:
            content[at:at] = content[at : at + rng.randrange(1, 200)]
        elif rng.random() < 0.2:
            del content[at:]
    return bytes(content)


def read_arguments(argv):
    """Parse and check a command line."""
    code, parser = 0, dino_cli.OneLineParser(parents=[main_dino.get_args_parser()])
    try:
        args = answers(dino_cli.parse_args, parser, argv)
        if args is not None:
            answers(main_dino.check_args, args)
    except SystemExit as e:
        code = e.code
    assert code in (None, 0, 2)


def checkpoints():
    state = {"student": {"a.weight": torch.ones(3, 2), "b": torch.zeros(1)}, "epoch": 3, "args": {"arch": "vit_nano"}}
    files = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        file = io.BytesIO()
        torch.save(state, file, **options)
        files.append(file.getvalue())
    return files


def test_damaged_checkpoints(tmp_path):
    path = tmp_path / "x.pth"

    def read(content):
        path.write_bytes(content)
        answers(dino_checkpoints.load_checkpoint, str(path))
        answers(dino_checkpoints.load_newest, str(path))

    fuzz(damaged(checkpoints()) | st.binary(max_size=400), read)


def test_damaged_pickles_in_whole_checkpoints(tmp_path):
    """The checksums are right, so the pickle is read."""
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(io.BytesIO(checkpoints()[0])) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    (pickled,) = [name for name in parts if name.endswith("data.pkl")]

    def read(content):
        with zipfile.ZipFile(path, "w") as new:
            for name, part in parts.items():
                new.writestr(name, content if name == pickled else part)
        answers(dino_checkpoints.load_checkpoint, str(path), True)

    fuzz(damaged([parts[pickled]]) | st.binary(max_size=400), read)


def test_checkpoints_with_any_plain_content(tmp_path):
    path = str(tmp_path / "checkpoint.pth")
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    tensors = st.sampled_from([torch.ones(2), torch.zeros(65536, 3), torch.tensor(1)])
    progress = {"epoch": 0, "step": 0, "images_done": None, "meters": [], "args": {}}
    keys = st.sampled_from(["student", "teacher", "optimizer", "dino_loss", "health", "x", *progress])
    values = st.recursive(scalars | tensors, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=4))
    args = main_dino.get_args_parser().parse_args(SMALL_RUN)

    def read(content):
        torch.save(content, path)
        checkpoint = answers(dino_checkpoints.load_checkpoint, path)
        if checkpoint is not None:
            answers(dino_checkpoints.check_resumable, path, checkpoint, args)
        if isinstance(checkpoint, dict):
            answers(dino_checkpoints.position, {**progress, **checkpoint}, args, path)

    fuzz(values | st.dictionaries(keys, values), read)


def test_lists_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(dino_images, "PATIENCE", 0.0)
    (tmp_path / "a.png").write_bytes(b"")
    path = st.sampled_from([tmp_path / f"x{suffix}" for suffix in dino_files.LISTS])
    words = st.sampled_from(["a.png", "path", "label", "../x.jpg", "/etc/passwd", "http://x/y.png", '"', "\0", "é", ""])
    ends = st.sampled_from(["\n", "\r\n", "\r", "\x1c", "\u2028"])
    text = st.lists(words | st.text(max_size=6) | ends | st.sampled_from([",", "\t", " "])).map("".join)

    def read(example):
        path, content = example
        path.write_bytes(content)
        images = answers(dino_files.find_images, path)
        if images is not None:
            for i in range(len(images)):
                answers(images.open, i)

    content = text.map(lambda words: words.encode(errors="surrogatepass")) | st.binary(max_size=80)
    fuzz(st.tuples(path, content), read)


def shards():
    """Tar files in three formats."""
    files = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for name, content in {
                "a.png": b"x" * 600,
                "a.cls": b"7",
                "b" * (120 if form else 90) + ".jpg": b"y",
            }.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        files.append(file.getvalue())
    return files


def with_right_checksums(content):
    """Correct the checksum of each header, so that damaged headers are read."""
    content = bytearray(content)
    for start in range(0, len(content) - 511, 512):
        header = content[start : start + 512]
        if b"ustar" in header[257:263]:
            total = sum(header[:148]) + 8 * 32 + sum(header[156:])
            content[start + 148 : start + 156] = b"%06o\0 " % (total % 8**6)
    return bytes(content)


def test_tar_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dino_images, "PATIENCE", 0.0)
    path = tmp_path / "x.tar"

    def read(content):
        path.write_bytes(content)
        images = answers(dino_shards.TarShards, str(path))
        if images is not None:
            answers(lambda: images.classes)
            for i in range(len(images)):
                answers(images.open, i)

    content = damaged(shards())
    fuzz(content | content.map(with_right_checksums) | st.binary(max_size=1200), read)
    assert {name.name for name in tmp_path.iterdir()} == {"cache", "x.tar"}


def test_patterns_of_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dino_shards, "MOST_SHARDS", 1000)
    part = st.sampled_from(["{", "}", "..", ",", "0", "007", "-1", "*", "[", "]", "?", "/", "**", "\\", "x", "pipe:"])
    text = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=3)
    pattern = st.lists(part | text, max_size=10).map("".join)
    fuzz(pattern, lambda text: answers(dino_shards.shard_files, text + ".tar", "--data_path"))


def test_arrays(tmp_path):
    path, wholes = tmp_path / "x.npy", []
    for array in (np.ones((4, 6, 5), np.float32), np.zeros((5, 6, 4), np.int16), np.ones((7, 8), bool)):
        file = io.BytesIO()
        np.save(file, array)
        wholes.append(file.getvalue())

    def read(content):
        path.write_bytes(content)
        image = answers(dino_images.open_image, path)
        for in_chans in (1, 3, 4):
            if image is not None:
                answers(dino_images.decode, image, utils.RGB._replace(in_chans=in_chans))

    fuzz(damaged(wholes), read)


def test_recipes(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    keys = st.sampled_from(
        ["lr", "arch", "use_fp16", "global_crops_scale", "config", "print_config", "<<", "x", "epochs"]
    )
    values = st.sampled_from(
        ["1", "[1, 2]", "&a [1]", "*a", "{a: 1}", "!!python/name:os.system", "|", "~", "[", "true"]
    )
    line = st.tuples(keys | st.text(max_size=4), values | st.text(max_size=8)).map(": ".join)

    def read(content):
        path.write_bytes(content)
        read_arguments(["--config", str(path)])

    text = st.lists(line | st.text(max_size=10)).map("\n".join)
    fuzz(text.map(lambda lines: lines.encode(errors="surrogatepass")) | st.binary(max_size=60), read)


def test_command_lines(capsys):
    flags = [f"--{name}" for name in vars(main_dino.get_args_parser().parse_args([])) if name != "wandb"]
    numbers = st.floats().map(str) | st.integers().map(str)
    odd = st.sampled_from(
        ["", "-1", "nan", "inf", "1e999", "0x10", "١", "true", "false", "vit_small", "--", "=", "1 2"]
    )
    words = st.sampled_from(flags) | numbers | odd | st.text(max_size=5)
    fuzz(st.lists(words, max_size=6), read_arguments)
