"""Nothing that is downloaded or loaded runs code, fills memory or writes where nobody asked it to."""

import argparse
import functools
import importlib
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, arguments_of
from PIL import EpsImagePlugin, Image

import dino_checkpoints
import dino_cli
import dino_images
import eval_linear
import eval_video_segmentation
import export
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
    """A path where nothing is, as long as no foreign code has run."""
    path = tmp_path_factory.mktemp("canary") / "dead"
    yield path
    assert not path.exists()


@pytest.fixture
def evil(canary, tmp_path_factory):
    """A checkpoint that would run code when it is loaded in full."""
    path = tmp_path_factory.mktemp("evil") / "evil.pth"
    state = {"teacher": {"a.weight": torch.ones(1)}, "extra": Malicious(os.system, f"touch {canary}")}
    torch.save({**state, "student": state["teacher"], "epoch": 1}, path)
    return path


def content_of(folder):
    """{path: content} of all that is in a folder, but for a run's lock."""
    found = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    return {path: content for path, content in found.items() if path.name != ".lock"}


@pytest.fixture
def refusal(monkeypatch, capsys):
    """refusal(script, *words) -> the one line on stderr with which a script ends; it must have a code of its own."""

    def run(script, *words):
        module = importlib.import_module(script)
        main = getattr(module, "main", None) or module.train_dino
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            dino_cli.run(main, module.get_args_parser(), "")
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2
        assert line.startswith("error: ")
        return line

    return run


# ---- checkpoints ----

NANO = ["--arch", "vit_nano", "--patch_size", 16]
HERE = [*NANO, "--device", "cpu", "--pretrained_weights"]
# script, and its words for malicious weights {evil}, images {data} and a folder {out} to write to.
READERS = {
    "eval_knn": [*HERE, "{evil}", "--data_path", "{data}", "--num_workers", 0, "--dump_features", "{out}"],
    "eval_linear": [*HERE, "{evil}", "--data_path", "{data}", "--num_workers", 0, "--output_dir", "{out}"],
    "visualize_attention": [*HERE, "{evil}", "--output_dir", "{out}"],
    "video_generation": [*HERE, "{evil}", "--input_path", "{data}/val/text", "--output_path", "{out}"],
    "export": [*HERE, "{evil}", "--to", "backbone", "--output", "{out}/out.pth"],
    "main_dino": [*SMALL_RUN, "--init_from", "{evil}", "--data_path", "{data}/train", "--output_dir", "{out}"],
}


@pytest.mark.parametrize("script", READERS)
def test_weights_that_would_run_code_are_refused_wherever_they_are_named(refusal, evil, tiny_root, tmp_path, script):
    (tmp_path / "mine.txt").write_text("mine")
    before = content_of(tmp_path)
    words = [str(word).format(evil=evil, data=tiny_root, out=tmp_path) for word in READERS[script]]
    assert re.search(r"evil\.pth holds a \w+\.system, which could run code", refusal(script, *words))
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint.prev.pth"])
def test_a_run_does_not_go_on_from_what_would_run_code(refusal, evil, tiny_root, tmp_path, name):
    shutil.copy(evil, tmp_path / name)
    before = content_of(tmp_path)
    line = refusal("main_dino", *SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", tmp_path)
    assert f"{name} holds a " in line
    assert content_of(tmp_path) == before


def test_a_linear_layer_that_would_run_code_is_refused(refusal, evil, tiny_root):
    words = [*HERE, "random", "--data_path", tiny_root, "--num_workers", 0]
    assert "evil.pth holds a " in refusal("eval_linear", *words, "--evaluate", "--linear_weights", evil)


def test_a_linear_evaluation_does_not_go_on_from_what_would_run_code(refusal, evil, tiny_root, tmp_path):
    shutil.copy(evil, tmp_path / "checkpoint.pth.tar")
    before = content_of(tmp_path)
    words = [*HERE, "random", "--data_path", tiny_root, "--num_workers", 0, "--output_dir", tmp_path]
    assert "checkpoint.pth.tar holds a " in refusal("eval_linear", *words)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("name", ["trainfeat", "trainlabels", "testfeat", "testlabels"])
def test_features_that_would_run_code_are_refused(refusal, evil, tmp_path, name):
    for other in ("trainfeat", "testfeat"):
        torch.save(torch.ones(4, 3), tmp_path / f"{other}.pth")
    for other in ("trainlabels", "testlabels"):
        torch.save(torch.arange(4), tmp_path / f"{other}.pth")
    shutil.copy(evil, tmp_path / f"{name}.pth")
    assert f"{name}.pth holds a " in refusal("eval_knn", "--load_features", tmp_path, "--device", "cpu")


def test_a_report_is_not_made_of_what_would_run_code(refusal, evil, tmp_path):
    shutil.copy(evil, tmp_path / "checkpoint.pth")
    before = content_of(tmp_path)
    assert "has nothing of a run in it" in refusal("report", tmp_path)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, os.mkdir, subprocess.check_call, exec, functools.partial])
def test_a_file_that_would_run_code_is_refused_by_name_and_runs_nothing(tmp_path, canary, function, zipped):
    argument = {
        os.system: f"touch {canary}",
        os.mkdir: str(canary),
        subprocess.check_call: ["touch", str(canary)],
        exec: f"open({str(canary)!r}, 'w')",
        functools.partial: print,
    }[function]
    state = {"teacher": {"w": torch.ones(1)}, "extra": Malicious(function, argument)}
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"c\.pth holds a \S*{function.__name__}\b.*was not loaded"):
        dino_checkpoints.load_checkpoint(tmp_path / "c.pth")


def test_a_plain_pickle_and_an_array_of_objects_are_refused_and_run_nothing(tmp_path, canary):
    with open(tmp_path / "c.pth", "wb") as file:
        pickle.dump(Malicious(os.mkdir, str(canary)), file)
    with open(tmp_path / "c.npy", "wb") as file:
        np.save(file, np.array([Malicious(os.mkdir, str(canary))], dtype=object))
    for name in ("c.pth", "c.npy"):
        with pytest.raises(UserError, match=rf"{name}"):
            dino_checkpoints.load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "file",
    [
        {"state_dict": [1]},
        {"state_dict": {"linear.weight": torch.ones(3), "linear.bias": torch.ones(3)}},
        {"state_dict": {"linear.weight": 7, "linear.bias": torch.ones(3)}},
        {"linear.weight": torch.ones(4, 3), "linear.bias": torch.ones(3)},
    ],
)
def test_a_strange_linear_layer_is_one_line(tmp_path, file):
    torch.save(file, tmp_path / "head.pth")
    args = argparse.Namespace(linear_weights=str(tmp_path / "head.pth"))
    with pytest.raises(UserError, match=r"head\.pth holds no linear\.weight and linear\.bias"):
        eval_linear.load_head(eval_linear.LinearClassifier(3, 4), args)


# ---- pickles of others ----


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_ground_truth_that_would_run_code_is_refused(refusal, canary, tmp_path, protocol):
    (tmp_path / "roxford5k").mkdir()
    gnd = [Malicious(os.system, f"touch {canary}")]
    with open(tmp_path / "roxford5k" / "gnd_roxford5k.pkl", "wb") as file:
        pickle.dump({"imlist": [], "qimlist": [], "gnd": gnd}, file, protocol=protocol)
    line = refusal("eval_image_retrieval", "--data_path", tmp_path, "--device", "cpu")
    assert re.search(r"holds a \w+\.system, which could run code", line)


def test_data_of_torchvision_that_were_changed_are_not_unpickled(refusal, canary, tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    monkeypatch.setattr(dino_images.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")  # nobody is there
    folder = tmp_path / "torchvision" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    parts = dino_images.datasets.CIFAR10
    for name, _ in [*parts.train_list, *parts.test_list, ("batches.meta", "")]:
        (folder / name).write_bytes(pickle.dumps(Malicious(os.mkdir, str(canary))))
    line = refusal("main_dino", *SMALL_RUN, "--data_path", "torchvision:CIFAR10", "--output_dir", tmp_path / "out")
    assert "torchvision:CIFAR10 can't be had" in line


def test_the_set_that_unpickles_what_lies_in_the_working_folder_is_not_offered():
    for name in ("LSUN", "LSUNClass"):
        with pytest.raises(UserError, match=f"torchvision has no data set '{name}'"):
            dino_images.find_images(f"torchvision:{name}")


# ---- ONNX ----

SECRET = b"secret67"  # two numbers of float32


@pytest.fixture
def graph(tmp_path_factory):
    """A stranger's graph x + w, in which w is to be read from a file outside of its folder."""
    onnx = pytest.importorskip("onnx")
    root = tmp_path_factory.mktemp("elsewhere")
    (root / "secret").write_bytes(SECRET)
    (root / "a" / "b").mkdir(parents=True)
    w = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2])
    w.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "../../secret", "offset": "0", "length": "8"}.items():
        w.external_data.add(key=key, value=value)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y"))
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [x], [y], [w]))
    path = root / "a" / "b" / "stranger.onnx"
    path.write_bytes(model.SerializeToString())
    yield path
    assert (root / "secret").read_bytes() == SECRET


@pytest.mark.parametrize("script", READERS)
def test_a_graph_whose_weights_lie_elsewhere_is_refused_wherever_weights_are_named(
    refusal, graph, tiny_root, tmp_path, script
):
    words = [str(word).format(evil=graph, data=tiny_root, out=tmp_path) for word in READERS[script]]
    line = refusal(script, *words)
    assert "stranger.onnx is a graph for other software, not weights" in line
    assert SECRET not in line.encode()
    assert not content_of(tmp_path)


def test_a_graph_is_no_linear_layer(refusal, graph, tiny_root):
    words = [*HERE, "random", "--data_path", tiny_root, "--num_workers", 0]
    line = refusal("eval_linear", *words, "--evaluate", "--linear_weights", graph)
    assert "stranger.onnx is a graph for other software, not weights" in line


@pytest.mark.parametrize("name", ["w.pth", "w.pth.tar", "w.safetensors", "w"])
def test_a_graph_by_another_name_is_refused_without_advice_to_load_it_in_full(graph, name):
    path = shutil.copy(graph, graph.with_name(name))
    with pytest.raises(UserError, match=rf"{name} can't be read as a checkpoint; is it complete\?") as refused:
        dino_checkpoints.load_checkpoint(path)
    assert "weights_only" not in str(refused.value)
    assert SECRET.decode() not in str(refused.value)


def test_a_run_does_not_go_on_from_a_graph(refusal, graph, tiny_root, tmp_path):
    shutil.copy(graph, tmp_path / "checkpoint.pth")
    before = content_of(tmp_path)
    line = refusal("main_dino", *SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", tmp_path)
    assert "checkpoint.pth can't be read as a checkpoint" in line
    assert content_of(tmp_path) == before


def test_an_export_neither_follows_planted_links_nor_needs_a_file_beside_it(tmp_path):
    onnx, onnxruntime, _ = (pytest.importorskip(name) for name in ("onnx", "onnxruntime", "onnxscript"))
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").mkdir()
    planted = [f"{name}.onnx{end}" for name in ("a", "graph") for end in (".data", ".tmp")] + ["graph.onnx"]
    for name in planted:
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    words = ["--to", "onnx", "--output", str(tmp_path / "out" / "a.onnx"), "--image_size", "32", *HERE, "random"]
    export.main(arguments_of(export, *words))
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*planted, "a.onnx"])
    assert all((tmp_path / "out" / name).is_symlink() for name in planted)
    (tmp_path / "alone").mkdir()
    alone = shutil.move(tmp_path / "out" / "a.onnx", tmp_path / "alone")
    exported = onnx.load(alone, load_external_data=False).graph
    inside = [a.t for node in exported.node for a in node.attribute if a.HasField("t")]
    assert len(exported.initializer) > 20
    for tensor in (*exported.initializer, *inside):
        assert tensor.data_location == onnx.TensorProto.DEFAULT
        assert not tensor.external_data
    session = onnxruntime.InferenceSession(alone, providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, {"images": np.ones((1, 3, 32, 32), np.float32)})[0]).all()


# ---- recipes ----


def test_a_recipe_that_would_run_code_is_refused(refusal, canary, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"data_path: !!python/object/apply:os.system ['touch {canary}']\n")
    line = refusal("main_dino", "--config", tmp_path / "mine.yaml", "--output_dir", tmp_path / "out")
    assert re.search(r"can't read the recipe --config .*mine\.yaml: could not determine a constr", line)
    assert not (tmp_path / "out").exists()


def test_recipes_are_not_merged_from_themselves_again_and_again(tmp_path):
    text = "{x0: 1}"
    for i in range(1, 12):  # what is inside of each ten times, by its alias
        text = f"{{? !!merge '<<' : [&a{i} {text}, {', '.join([f'*a{i}'] * 9)}]}}"
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"can't read the recipe --config .*mine\.yaml: could not determine a constr"):
        dino_cli.read_recipe(tmp_path / "mine.yaml", {"lr"})


# ---- images and videos ----


def patched(path, kind, **options):
    """An image of 8 × 8 pixels in a file, whose header then says that it is enormous."""
    Image.new("RGB", (8, 8), (9, 8, 7)).save(path, kind, **options)
    data = bytearray(path.read_bytes())
    if kind == "PNG":
        data[16:24] = struct.pack(">II", 60_000, 60_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    elif kind == "WEBP":
        at = data.index(b"VP8L") + 9
        data[at : at + 4] = struct.pack("<I", 16_383 | 16_383 << 14)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", 60_000, 60_000)
    elif kind == "TIFF":
        for tag in (256, 257):  # width and height, each a number of four bytes
            at = re.search(re.escape(struct.pack("<H", tag)) + rb"[\x03\x04]\x00\x01\x00\x00\x00", data).start()
            data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 60_000)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_an_image_that_says_it_is_enormous_is_refused(refusal, tmp_path, tiny_root, kind):
    patched(tmp_path / "x.png", kind, **({"lossless": True} if kind == "WEBP" else {}))
    with pytest.raises(dino_images.BadImage, match=r"x\.png: .*(more than 200 million|exceeds limit)"):
        dino_images.load_image(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"can't read .*x\.png: .*(more than 200 million|exceeds limit)"):
        eval_video_segmentation.open_image(tmp_path / "x.png", np.array)
    line = refusal("visualize_attention", *HERE, "random", "--image_path", tmp_path / "x.png", "--output_dir", tmp_path)
    assert "x.png: " in line


@pytest.fixture
def ghostscript(canary, tmp_path, monkeypatch):
    """Pillow finds a `gs`, which leaves a sign that it was started."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
@pytest.mark.usefixtures("ghostscript")
def test_a_file_that_pillow_would_give_to_another_program_is_no_image(tmp_path, name):
    Image.new("RGB", (20, 20)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / name)
    with pytest.raises(dino_images.BadImage, match="no image of a known kind"):
        dino_images.load_image(tmp_path / name)
    with pytest.raises(UserError, match="cannot identify"):
        eval_video_segmentation.open_image(tmp_path / name, np.array)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.mp4", "ffconcat version 1.0\nfile secret.mp4\n"),
        ("x.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n"),
        ("x.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
    ],
)
def test_a_video_that_is_a_list_of_others_opens_none_of_them(refusal, tmp_path, name, text):
    frames = [np.full((64, 64, 3), 50 * i, dtype=np.uint8) for i in range(4)]
    video_generation.write_video(tmp_path / "secret.mp4", frames, 5)
    shutil.copy(tmp_path / "secret.mp4", tmp_path / "secret.ts")
    (tmp_path / name).write_text(text)
    before = content_of(tmp_path)
    line = refusal("video_generation", *HERE, "random", "--input_path", tmp_path / name, "--output_path", tmp_path)
    assert f"can't read --input_path {tmp_path / name} as a video: " in line
    assert content_of(tmp_path) == before
    paths, _ = video_generation.extract_frames(tmp_path / "secret.mp4", tmp_path / "frames")
    assert len(paths) == 4


# ---- links ----
