"""No file that is downloaded or loaded runs code, starts another program, or makes a script write elsewhere."""

import functools
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN
from PIL import EpsImagePlugin, Image

import dino_checkpoints
import dino_files
import dino_images
import video_generation
from utils import UserError


class Malicious:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def canary(tmp_path_factory):
    """A path that exists only after foreign code has run."""
    path = tmp_path_factory.mktemp("canary") / "dead"
    yield path
    assert not path.exists()


@pytest.fixture
def evil(canary, tmp_path_factory):
    """A checkpoint that would run code if it were unpickled."""
    path = tmp_path_factory.mktemp("evil") / "evil.pth"
    state = {"teacher": {"a.weight": torch.ones(1)}, "extra": Malicious(os.system, f"touch {canary}")}
    torch.save({**state, "student": state["teacher"], "epoch": 1}, path)
    return path


def content_of(folder):
    """{path: content} of all files and folders in a folder, except a run's lock."""
    found = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    return {path: content for path, content in found.items() if path.name != ".lock"}


# ---- checkpoints ----

NANO = ["--arch", "vit_nano", "--patch_size", 16, "--device", "cpu"]
HERE = [*NANO, "--pretrained_weights"]
# script, and its flags for the weights {weights}, images {data} and an output folder {out}
READERS = {
    "eval_knn": [*HERE, "{weights}", "--data_path", "{data}", "--num_workers", 0, "--dump_features", "{out}"],
    "eval_linear": [*HERE, "{weights}", "--data_path", "{data}", "--num_workers", 0, "--output_dir", "{out}"],
    "eval_logistic": [*HERE, "{weights}", "--data_path", "{data}", "--num_workers", 0, "--dump_features", "{out}"],
    "visualize_attention": [*HERE, "{weights}", "--output_dir", "{out}"],
    "video_generation": [*HERE, "{weights}", "--input_path", "{data}/val/text", "--output_path", "{out}"],
    "export": [*HERE, "{weights}", "--to", "backbone", "--output", "{out}/out.pth"],
    "main_dino": [*SMALL_RUN, "--init_from", "{weights}", "--data_path", "{data}/train", "--output_dir", "{out}"],
}
LINEAR = [*HERE, "random", "--data_path", "{data}", "--num_workers", 0]


def filled(words, **places):
    return [str(word).format(**places) for word in words]


@pytest.mark.parametrize("script", READERS)
def test_no_script_runs_code_in_weights(refusal, evil, tiny_root, tmp_path, script):
    (tmp_path / "mine.txt").write_text("mine")
    before = content_of(tmp_path)
    line = refusal(script, *filled(READERS[script], weights=evil, data=tiny_root, out=tmp_path))
    assert re.search(r"evil\.pth .*\b\w+\.system, which could run code", line)
    assert content_of(tmp_path) == before


# script, name of the malicious file in the output folder {out}, and flags
RESUMED = {
    "a run": ("main_dino", "checkpoint.pth", [*SMALL_RUN, "--data_path", "{data}/train", "--output_dir", "{out}"]),
    "a run's previous checkpoint": (
        "main_dino",
        "checkpoint.prev.pth",
        [*SMALL_RUN, "--data_path", "{data}/train", "--output_dir", "{out}"],
    ),
    "a linear evaluation": ("eval_linear", "checkpoint.pth.tar", [*LINEAR, "--output_dir", "{out}"]),
    "a linear layer": ("eval_linear", "a.pth", [*LINEAR, "--evaluate", "--linear_weights", "{out}/a.pth"]),
    "features": ("eval_knn", "trainfeat.pth", ["--load_features", "{out}", "--device", "cpu"]),
    "labels": ("eval_logistic", "trainlabels.pth", ["--load_features", "{out}", "--device", "cpu"]),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_no_script_runs_code_in_files_of_its_own_kind(refusal, evil, tiny_root, tmp_path, kind):
    script, name, words = RESUMED[kind]
    if kind in ("features", "labels"):
        for part in ("train", "test"):
            torch.save(torch.ones(4, 3), tmp_path / f"{part}feat.pth")
            torch.save(torch.arange(4), tmp_path / f"{part}labels.pth")
    shutil.copy(evil, tmp_path / name)
    before = content_of(tmp_path)
    line = refusal(script, *filled(words, data=tiny_root, out=tmp_path))
    assert re.search(rf"{re.escape(name)} .*could run code", line)
    assert content_of(tmp_path) == before


def test_a_report_runs_no_code_in_a_checkpoint(refusal, evil, tmp_path):
    shutil.copy(evil, tmp_path / "checkpoint.pth")
    before = content_of(tmp_path)
    assert "no readable" in refusal("report", tmp_path)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, exec, functools.partial])
def test_a_checkpoint_that_would_run_code_is_refused_and_names_the_function(tmp_path, canary, function, zipped):
    argument = {os.system: f"touch {canary}", exec: f"open({str(canary)!r}, 'w')", functools.partial: print}[function]
    state = {"teacher": {"w": torch.ones(1)}, "extra": Malicious(function, argument)}
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"c\.pth .*{function.__name__}\b.*was not loaded"):
        dino_checkpoints.load_checkpoint(tmp_path / "c.pth")


def test_a_plain_pickle_and_an_array_of_objects_are_refused(tmp_path, canary):
    with open(tmp_path / "c.pth", "wb") as file:
        pickle.dump(Malicious(os.mkdir, str(canary)), file)
    with open(tmp_path / "c.npy", "wb") as file:
        np.save(file, np.array([Malicious(os.mkdir, str(canary))], dtype=object))
    for name in ("c.pth", "c.npy"):
        with pytest.raises(UserError, match=rf"{name}"):
            dino_checkpoints.load_checkpoint(tmp_path / name)
    with pytest.raises(dino_images.BadImage, match=r"c\.npy"):
        dino_images.open_image(str(tmp_path / "c.npy"))


@pytest.mark.parametrize("script", READERS)
def test_an_onnx_graph_is_refused_as_weights(refusal, tiny_root, tmp_path, script):
    """A stranger's graph can name files outside of its folder as its weights."""
    (tmp_path / "out").mkdir()
    (tmp_path / "stranger.onnx").write_bytes(b"\x08\x0a")
    words = filled(READERS[script], weights=tmp_path / "stranger.onnx", data=tiny_root, out=tmp_path / "out")
    assert re.search(r"stranger\.onnx .*not weights", refusal(script, *words))
    assert not content_of(tmp_path / "out")


def test_a_file_that_is_not_a_checkpoint_is_refused_without_advice_to_unpickle_it(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"\x08\x0a\x12\x05")
    with pytest.raises(UserError, match=r"w\.pth can't be read as a checkpoint") as refused:
        dino_checkpoints.load_checkpoint(tmp_path / "w.pth")
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize(
    "file",
    [
        {"state_dict": [1]},
        {"state_dict": {"linear.weight": torch.ones(3), "linear.bias": torch.ones(3)}},
        {"state_dict": {"linear.weight": 7, "linear.bias": torch.ones(3)}},
        {"linear.weight": torch.ones(4, 3), "linear.bias": torch.ones(3)},
    ],
)
def test_a_linear_layer_of_an_odd_form_is_one_line(refusal, tiny_root, tmp_path, file):
    torch.save(file, tmp_path / "head.pth")
    words = [*LINEAR, "--evaluate", "--linear_weights", tmp_path / "head.pth"]
    assert re.search(r"head\.pth .*linear\.weight", refusal("eval_linear", *filled(words, data=tiny_root)))


# ---- pickles of other kinds ----


@pytest.mark.parametrize("protocol", [0, 4])
def test_the_ground_truth_of_a_retrieval_benchmark_runs_no_code(refusal, canary, tmp_path, protocol):
    (tmp_path / "roxford5k").mkdir()
    gnd = [Malicious(os.system, f"touch {canary}")]
    with open(tmp_path / "roxford5k" / "gnd_roxford5k.pkl", "wb") as file:
        pickle.dump({"imlist": [], "qimlist": [], "gnd": gnd}, file, protocol=protocol)
    line = refusal("eval_image_retrieval", "--data_path", tmp_path, "--device", "cpu")
    assert re.search(r"\w+\.system, which could run code", line)


def test_changed_files_of_a_torchvision_data_set_are_not_unpickled(refusal, canary, tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    monkeypatch.setattr(dino_files.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")  # no server
    folder = tmp_path / "torchvision" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    parts = dino_files.datasets.CIFAR10
    for name, _ in [*parts.train_list, *parts.test_list, ("batches.meta", "")]:
        (folder / name).write_bytes(pickle.dumps(Malicious(os.mkdir, str(canary))))
    line = refusal("main_dino", *SMALL_RUN, "--data_path", "torchvision:CIFAR10", "--output_dir", tmp_path / "out")
    assert "torchvision:CIFAR10" in line


def test_lsun_is_not_offered_because_it_unpickles_a_file_in_the_current_folder():
    for name in ("LSUN", "LSUNClass"):
        with pytest.raises(UserError, match=f"torchvision has no data set '{name}'"):
            dino_files.find_images(f"torchvision:{name}")


def test_a_recipe_runs_no_code(refusal, canary, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"data_path: !!python/object/apply:os.system ['touch {canary}']\n")
    line = refusal("main_dino", "--config", tmp_path / "mine.yaml", "--device", "cpu", "--output_dir", tmp_path / "out")
    assert f"--data_path touch {canary}" in line  # the value is text, and there is no such folder


# ---- images and videos ----


@pytest.fixture
def ghostscript(canary, tmp_path, monkeypatch):
    """Pillow finds a `gs` that creates the canary."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
@pytest.mark.usefixtures("ghostscript")
def test_an_image_does_not_start_ghostscript(tmp_path, name):
    Image.new("RGB", (20, 20)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / name)
    with pytest.raises(dino_images.BadImage, match=name):
        dino_images.load_image(tmp_path / name)
    with pytest.raises(UserError, match=name):
        dino_images.use_file(tmp_path / name, np.array)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.mp4", "ffconcat version 1.0\nfile secret.mp4\n"),
        ("x.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n"),
        ("x.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
    ],
)
def test_a_video_does_not_open_other_files_or_urls(refusal, tmp_path, name, text):
    frames = [np.full((64, 64, 3), 50 * i, dtype=np.uint8) for i in range(4)]
    video_generation.write_video(tmp_path / "secret.mp4", frames, 5)
    shutil.copy(tmp_path / "secret.mp4", tmp_path / "secret.ts")
    (tmp_path / name).write_text(text)
    before = content_of(tmp_path)
    line = refusal("video_generation", *HERE, "random", "--input_path", tmp_path / name, "--output_path", tmp_path)
    assert str(tmp_path / name) in line
    assert content_of(tmp_path) == before
    paths, _ = video_generation.extract_frames(tmp_path / "secret.mp4", tmp_path / "frames")
    assert len(paths) == 4
