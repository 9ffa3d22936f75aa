"""dino_images.py: every way to name images, every kind of file, and runs that meet images that can't be read."""

import argparse
import contextlib
import errno
import gzip
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from multiprocessing.reduction import DupFd
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, arguments_of, ending, log_without_times
from PIL import Image
from torchvision import datasets

import dino_cli
import dino_crops
import dino_data
import dino_images
import eval_knn
import main_dino
import utils
from utils import UserError

# ---- folders ----


def draw(path, level=0, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


def names(images, root):
    return [os.path.relpath(images.name(i), root) for i in range(len(images))]


def test_class_folders_are_numbered_as_torchvision_numbers_them(tmp_path):
    for name in ("b/2.png", "b/10.png", "b/x-y/1.png", "b/x/3.JPG", "b/x/z/4.webp", "a/1.png", "c d/é.png"):
        draw(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    theirs, ours = datasets.ImageFolder(tmp_path), dino_images.find_images(tmp_path)
    assert [ours.name(i) for i in range(len(ours))] == [path for path, _ in theirs.samples]
    assert ours.targets.tolist() == theirs.targets
    assert ours.classes == theirs.classes


def test_a_folder_with_images_directly_in_it_is_taken_whole_and_has_no_classes(tmp_path):
    for name in ("1.png", "2/3.png", "2/4/5.png", ".hidden.png", ".git/6.png", "._7.png"):
        draw(tmp_path / name)
    images = dino_images.find_images(tmp_path)
    assert names(images, tmp_path) == ["1.png", "2/3.png", "2/4/5.png"]
    assert images.targets is None
    asked = dino_images.find_images(tmp_path, data_format="folder")
    assert (names(asked, tmp_path), asked.classes) == (["2/3.png", "2/4/5.png"], ["2"])
    assert dino_images.find_images(tmp_path / "2", data_format="flat").targets is None


def test_links_are_followed_but_not_in_circles(tmp_path):
    draw(tmp_path / "real" / "1.png")
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "b").symlink_to(tmp_path / "real")
    (root / "a" / "again").symlink_to(root)
    assert names(dino_images.find_images(root), root) == ["a/b/1.png"]


def old(path, seconds=100):
    for folder in [path, *path.rglob("*")]:
        os.utime(folder, (time.time() - seconds,) * 2)


def test_the_index_of_a_large_folder_is_kept_until_a_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dino_images, "WORTH_KEEPING", 3)
    root = tmp_path / "images"
    for name in ("a/1.png", "a/2.png", "b/deep/3.png"):
        draw(root / name)
    listed = []
    index = dino_images.index
    monkeypatch.setattr(dino_images, "index", lambda *what: listed.append(what) or index(*what))

    def look():
        listed.clear()
        return names(dino_images.find_images(root), root), bool(listed)

    assert look()[1]
    assert look()[1]  # it may still have been growing
    old(root)
    assert look()[1]
    assert look() == (["a/1.png", "a/2.png", "b/deep/3.png"], False)
    draw(root / "b" / "deep" / "4.png")
    assert look() == (["a/1.png", "a/2.png", "b/deep/3.png", "b/deep/4.png"], True)
    old(root)
    look()
    (root / "a" / "1.png").unlink()
    assert look()[0] == ["a/2.png", "b/deep/3.png", "b/deep/4.png"]
    old(root)
    look()
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    damages = [
        b"",
        b"{}",
        b"[1]",
        b'{"root": 3}',
        whole[:-9],
        b"\xff\xfe",
        b"[" * 10**5,
        whole.replace(b'"a/2', b'"z/2'),
    ]
    damages += [
        json.dumps({**json.loads(whole), **part}).encode() for part in ({"folders": {}}, {"images": 5}, {"images": [5]})
    ]
    for damage in damages:
        kept.write_bytes(damage)
        assert look() == (["a/2.png", "b/deep/3.png", "b/deep/4.png"], True)
    elsewhere = tmp_path / "elsewhere"
    root.rename(elsewhere)
    with pytest.raises(UserError, match="is no folder"):
        look()


# ---- lists ----


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("x.txt", "a b.png\nsub/c.png\n", None),
        ("x.txt", "\ufeffa b.png\r\n\r\nsub/c.png", None),
        ("x.txt", "a b.png\tdog\nsub/c.png\tape", ["dog", "ape"]),
        ("x.txt", "a b.png 10\nsub/c.png 9", ["10", "9"]),
        ("x.csv", 'path,label\n"a b.png",dog\nsub/c.png,ape\n', ["dog", "ape"]),
        ("x.csv", "a b.png\nsub/c.png", None),
        ("x.txt", "odd.name\na b.png\nsub/c.png", None),
        ("x.tsv", "file\tclass\tmore\na b.png\tdog\t1\nsub/c.png\tape\t2", ["dog", "ape"]),
    ],
)
def test_lists_name_images_relative_to_themselves_perhaps_with_labels(tmp_path, name, text, labels):
    draw(tmp_path / "a b.png", 1)
    draw(tmp_path / "sub" / "c.png", 2)
    if text.startswith("odd"):
        draw(tmp_path / "odd.png", 0)
        (tmp_path / "odd.png").rename(tmp_path / "odd.name")
    (tmp_path / name).write_text(text, encoding="utf-8")
    images = dino_images.find_images(tmp_path / name)
    assert names(images, tmp_path)[-2:] == ["a b.png", "sub/c.png"]
    assert [images.open(i).getpixel((0, 0))[0] for i in range(len(images))] == [0, 1, 2][-len(images) :]
    assert len(images) == 2 + text.startswith("odd")
    assert (None if images.targets is None else [images.classes[t] for t in images.targets]) == labels
    if labels == ["10", "9"]:
        assert images.classes == ["9", "10"]  # by their value


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.txt", b"", "has no paths of images in it"),
        ("x.csv", b"path,label\n", "has no paths of images in it"),
        ("x.txt", b"\xff\xfe\x00", "it is not UTF-8 text"),
        ("x.txt", b"no.png\nneither.png", "there is no .*no.png. Paths in it are relative to its own folder"),
        ("x.csv", b"1.png,a\n2.png,\n", "has a label for 1 of 2 images"),
        ("x.csv", b'1.png,"' + b"a" * 200_000, "can't read .*field larger than field limit"),
        ("x.csv", b"1.png\n,b\n", "or a line without one"),
    ],
)
def test_a_list_that_can_not_be_used_is_said_to_be_so_in_one_line(tmp_path, name, content, says):
    draw(tmp_path / "1.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        dino_images.find_images(tmp_path / name)
    assert "\n" not in str(raised.value)


# ---- torchvision's data sets ----


def write_mnist(root, numbers):
    """Files in MNIST's own format, of so many images in each part."""
    folder = root / "torchvision" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, number in numbers.items():
        pixels = np.arange(number * 28 * 28, dtype=np.uint32).astype(np.uint8)
        files = {
            f"{part}-images-idx3-ubyte": struct.pack(">IIII", 2051, number, 28, 28) + pixels.tobytes(),
            f"{part}-labels-idx1-ubyte": struct.pack(">II", 2049, number) + bytes(i % 10 for i in range(number)),
        }
        for name, content in files.items():
            (folder / name).write_bytes(content)
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))


def test_a_data_set_of_torchvisions_is_found_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    write_mnist(tmp_path, {"train": 40, "t10k": 20})
    train, val = (dino_images.find_images("torchvision:MNIST", part) for part in ("train", "val"))
    assert (len(train), len(val)) == (40, 20)
    assert train.targets.tolist() == [i % 10 for i in range(40)]
    assert train.open(3).size == (28, 28)
    flags = [
        "--arch",
        "vit_nano",
        "--pretrained_weights",
        "random",
        "--image_size",
        32,
        "--num_workers",
        0,
        "--nb_knn",
        1,
    ]
    args = arguments_of(eval_knn, *flags, "--device", "cpu", "--data_path", "torchvision:MNIST")
    eval_knn.main(args)
    assert "40 training and 20 validation images in 10 classes" in capsys.readouterr().out
    flags = [*SMALL_RUN, "--data_path", "torchvision:MNIST", "--output_dir", tmp_path / "run", "--epochs", 1]
    main_dino.train_dino(arguments_of(main_dino, *flags, "--knn_every", 1))
    assert "knn_top1" in log_without_times(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("name", "says"), [("CIFAR11", "did you mean CIFAR10"), ("", "no data set ''"), ("CIFAR10", "can't be had: ")]
)
def test_a_data_set_that_can_not_be_had_is_an_error(tmp_path, monkeypatch, name, says):
    def no_network(*_, **__):
        raise OSError("network is off")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=says):
        dino_images.find_images(f"torchvision:{name}")


class Arriving(datasets.VisionDataset):
    """A data set of torchvision's kind that takes any folder `numbers` for whole, as some do."""

    interrupted = False

    def __init__(self, root, train=True, download=False):
        super().__init__(root)
        folder = Path(root) / "numbers"
        if download:
            folder.mkdir()
            (folder / "0.png").write_bytes(b"half of a file")
            if self.interrupted:
                raise KeyboardInterrupt
            draw(folder / "0.png", 5)
        if not folder.is_dir():
            raise RuntimeError("Dataset not found")
        self.image = Image.open(folder / "0.png")

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return self.image, 0


@pytest.mark.parametrize("in_the_way", [False, True])
def test_a_download_that_is_interrupted_is_not_taken_for_whole(tmp_path, monkeypatch, in_the_way):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "MNIST", Arriving)
    if in_the_way:
        (tmp_path / "torchvision" / "numbers").mkdir(parents=True)
    monkeypatch.setattr(Arriving, "interrupted", True)
    with pytest.raises(KeyboardInterrupt):
        dino_images.find_images("torchvision:MNIST")
    monkeypatch.setattr(Arriving, "interrupted", False)
    (tmp_path / "torchvision" / ".arriving" / "numbers").mkdir(parents=True)  # of one that was killed
    for _ in range(2):
        assert dino_images.find_images("torchvision:MNIST").open(0).getpixel((0, 0)) == (5, 5, 5)
    assert not (tmp_path / "torchvision" / ".arriving").exists()


def test_a_data_set_is_not_downloaded_over_http(tmp_path, monkeypatch):
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    class OverHttp(Arriving):
        def __init__(self, root, download=False):
            if download:
                datasets.utils.download_url(f"http://localhost:{server.server_port}/x.png", root)
            raise RuntimeError("Dataset not found")

    server = http.server.HTTPServer(("localhost", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "MNIST", OverHttp)
    with pytest.raises(UserError, match="is not https, and nothing else is downloaded"):
        dino_images.find_images("torchvision:MNIST")
    server.shutdown()
    assert not asked


def test_parts_of_a_data_set_that_come_one_by_one_stay_beside_each_other(tmp_path, monkeypatch):
    class ByPart(Arriving):
        def __init__(self, root, train=True, download=False):
            datasets.VisionDataset.__init__(self, root)
            self.path = Path(root) / "numbers" / f"{train}.png"
            if download:
                draw(self.path, 7 if train else 8)
            if not self.path.exists():
                raise RuntimeError("Dataset not found")

        def __getitem__(self, i):
            return Image.open(self.path), 0

    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "MNIST", ByPart)
    train, val = (dino_images.find_images("torchvision:MNIST", part) for part in ("train", "val"))
    assert (train.open(0).getpixel((0, 0))[0], val.open(0).getpixel((0, 0))[0]) == (7, 8)


# ---- train and val ----


def test_train_and_val_may_be_lists(tmp_path):
    for part, classes in (("train", "ab"), ("val", "b")):
        rows = []
        for name in classes:
            draw(tmp_path / "files" / f"{part}{name}.png")
            rows.append(f"files/{part}{name}.png,{name}\n")
        (tmp_path / f"{part}.csv").write_text("".join(rows))
    _, val, train_labels, val_labels = dino_data.labelled_images(tmp_path, dino_crops.eval_transform(8))
    assert (train_labels.tolist(), val_labels.tolist()) == ([0, 1], [1])
    assert val[0][0].shape == (3, 8, 8)
    (tmp_path / "train.csv").write_text("files/traina.png\n")
    with pytest.raises(UserError, match=r"train\.csv has no labels"):
        dino_data.labelled_images(tmp_path, None)


# ---- kinds of files ----


def test_sixteen_bits_become_the_eight_upper_ones(tmp_path):
    levels = np.array([[0, 255, 256, 25_700, 65_535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    Image.fromarray(levels).save(tmp_path / "x.tif")
    Image.fromarray(levels.astype(np.int32)).save(tmp_path / "y.tif")
    for name in ("x.png", "x.tif", "y.tif"):
        image = dino_images.load_image(tmp_path / name)
        assert image.mode == "RGB"
        assert np.asarray(image)[0, :, 1].tolist() == [0, 0, 1, 100, 255]


@pytest.mark.parametrize(("values", "want"), [([0, 0.5, 1], [0, 128, 255]), ([0, 100.4, 255], [0, 100, 255])])
def test_floats_go_from_0_to_1_or_to_255(tmp_path, values, want):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "x.tif")
    assert np.asarray(dino_images.load_image(tmp_path / "x.tif"))[0, :, 0].tolist() == want


def test_of_an_animation_the_first_picture_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for name in ("x.gif", "x.webp", "x.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        red, green, blue = dino_images.load_image(tmp_path / name).getpixel((1, 1))
        assert red > 250 > 5 > max(green, blue)


@pytest.mark.parametrize("turned", range(1, 9))
def test_exif_turns_an_image_if_that_is_wanted(tmp_path, turned):
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0, 0] = 255  # the corner that is to be found again
    exif = Image.Exif()
    exif[0x0112] = turned
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    as_it_lies = dino_images.load_image(tmp_path / "x.png")
    assert np.array_equal(as_it_lies, pixels)
    shown = np.asarray(dino_images.load_image(tmp_path / "x.png", exif=True))[..., 0]
    corner = {1: (0, 0), 2: (0, 5), 3: (3, 5), 4: (3, 0), 5: (0, 0), 6: (0, 3), 7: (5, 3), 8: (5, 0)}[turned]
    assert shown.shape == ((4, 6) if turned < 5 else (6, 4))
    assert np.argwhere(shown).tolist() == [list(corner)]


@pytest.mark.parametrize("kind", ["pil", "fast"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_the_smallest_images_make_crops(tmp_path, kind, size):
    if kind == "fast":
        pytest.importorskip("cv2")
    for name in ("x.png", "x.jpg"):
        draw(tmp_path / name, 77, size)
        augment = main_dino.DataAugmentationDINO((0.4, 1), (0.05, 0.4), 2, 32, 16, as_uint8=True, augmentation=kind)
        crops = augment(dino_images.open_image(tmp_path / name))
        assert [crop.shape for crop in crops] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 2


def test_a_bomb_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(dino_images, "MOST_PIXELS", 99)
    draw(tmp_path / "x.png", size=(10, 10))
    with pytest.raises(dino_images.BadImage, match=r"x\.png: 10 × 10 are more than"):
        dino_images.open_image(tmp_path / "x.png")


def test_images_of_up_to_200_million_pixels_are_taken(tmp_path):
    Image.new("1", (16_000, 12_000)).save(tmp_path / "x.png")
    assert dino_images.open_image(tmp_path / "x.png").size == (16_000, 12_000)
    Image.new("1", (20_000, 12_000)).save(tmp_path / "x.png")
    with pytest.raises(dino_images.BadImage, match="20000 × 12000"):
        dino_images.open_image(tmp_path / "x.png")


def test_a_file_system_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    draw(tmp_path / "x.png", 9)
    tries, slept = [], []

    def stale_at_first(path, mode):
        tries.append(path)
        if len(tries) < 4:
            raise OSError(errno.ESTALE, "Stale file handle")
        return open(path, mode)

    monkeypatch.setattr(dino_images, "open", stale_at_first, raising=False)
    monkeypatch.setattr(dino_images.time, "sleep", slept.append)
    assert dino_images.load_image(tmp_path / "x.png").getpixel((0, 0)) == (9, 9, 9)
    assert slept == [0.5, 1.0, 2.0]


def test_one_that_stays_away_is_given_up(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(dino_images, "waited", 0.0)
    monkeypatch.setattr(dino_images.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    with pytest.raises(dino_images.BadImage, match=r"gone/x\.png: No such file or directory"):
        dino_images.open_image(tmp_path / "gone" / "x.png")
    assert 60 < clock[0] < 130
    clock[0] = 0.0
    for missing in (tmp_path / "x.png", tmp_path / "gone" / "y.png"):  # the folder is there; the minute is over
        with pytest.raises(dino_images.BadImage, match="No such file"):
            dino_images.open_image(missing)
    assert clock[0] == 0
    draw(tmp_path / "x.png")
    dino_images.open_image(tmp_path / "x.png")
    with pytest.raises(dino_images.BadImage):
        dino_images.open_image(tmp_path / "gone" / "y.png")
    assert clock[0] > 60  # files were read again


# ---- what can't be read is left out ----


def corpus(root, good=60, bad=4, seed=0):
    """Class folders with so many good images, and bad ones of each kind among them."""
    rng = random.Random(seed)
    for i in range(good):
        draw(root / "ab"[i % 2] / f"{i:03}.png", rng.randrange(256), (40, 30))
    whole = (root / "a" / "000.png").read_bytes()
    kinds = [b"", b"text", whole[: len(whole) // 2], whole[:16] + os.urandom(40)]
    for i in range(bad):
        (root / "ab"[i % 2] / f"x{i}.png").write_bytes(kinds[i % len(kinds)])
    return root


FLAGS = (*SMALL_RUN, "--max_bad_images", "0.1")


def result(root, folder, *flags):
    main_dino.train_dino(arguments_of(main_dino, *FLAGS, "--data_path", root, "--output_dir", folder, *flags))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def bad_names(folder):
    return [line.split("\t")[0] for line in (folder / "bad_images.txt").read_text().splitlines()]


def test_bad_images_are_replaced_counted_and_listed_whatever_the_number_of_workers(tmp_path, capsys):
    root, runs = corpus(tmp_path / "data"), {}
    for workers in (0, 1, 3):
        runs[workers] = result(root, tmp_path / f"run{workers}", "--num_workers", workers)
        assert bad_names(tmp_path / f"run{workers}") == sorted(str(path) for path in root.glob("*/x*.png"))
        for line in (tmp_path / f"run{workers}" / "bad_images.txt").read_text().splitlines():
            assert re.fullmatch(
                r"[^\t]*/x\d\.png\t(it is no image of a known kind|.*truncated.*|.*PNG.*|.*broken.*)", line
            )
        assert [line["bad_images"] for line in log_without_times(tmp_path / f"run{workers}")] == [4, 4]
    assert capsys.readouterr().out.count("warning: can't read the image") == 4 * 3
    for workers in (1, 3):
        assert all(torch.equal(runs[0]["student"][name], runs[workers]["student"][name]) for name in runs[0]["student"])


def test_an_image_in_the_place_of_a_bad_one_follows_from_seed_epoch_and_number(tmp_path):
    images = dino_images.find_images(corpus(tmp_path / "data"))
    bad = next(i for i in range(len(images)) if Path(images.name(i)).name.startswith("x"))

    def taken(seed, epoch):
        _, number, wrong = dino_data.MultiCropDataset(images, lambda image: dino_images.to_rgb(image), seed)[epoch, bad]
        assert wrong.startswith(f"{images.name(bad)}\0can't read the image {images.name(bad)}: ")
        return number

    found = [taken(seed, epoch) for seed in range(3) for epoch in range(5)]
    assert found == [taken(seed, epoch) for seed in range(3) for epoch in range(5)]
    assert len(set(found)) > 8
    good = dino_data.MultiCropDataset(images, lambda image: dino_images.to_rgb(image), 0)[0, 0]
    assert good[1:] == (0, "")


def test_too_many_bad_images_end_the_run_with_their_list(tmp_path, monkeypatch, capsys):
    root = corpus(tmp_path / "data", good=40, bad=8)
    monkeypatch.setattr(main_dino, "main", main_dino.train_dino, raising=False)
    code, line = ending(monkeypatch, capsys, main_dino, *FLAGS, "--data_path", root, "--output_dir", tmp_path / "run")
    assert code == 2
    found = re.match(r"error: (\d) of 48 images can't be read, which is more than --max_bad_images 0.1 allows: ", line)
    assert int(found[1]) == len(bad_names(tmp_path / "run")) >= 5
    code, line = ending(
        monkeypatch, capsys, main_dino, *FLAGS, "--data_path", root, "--output_dir", tmp_path / "x",
        "--strict_images", "true", "--num_workers", 1,
    )  # fmt: skip
    assert code == 2
    assert line.startswith("error: can't read the image ")


def test_a_bad_image_in_a_small_folder_is_allowed_and_after_its_repair_forgotten(tmp_path):
    root = corpus(tmp_path / "data", good=47, bad=1)
    odd = root / "b" / "a\tb\nc.png"
    result(root, tmp_path / "run", "--max_bad_images", 0.001)  # rounded up
    assert len(bad_names(tmp_path / "run")) == 1
    (bad,) = root.glob("*/x*.png")
    draw(bad, size=(40, 30))
    odd.write_bytes(b"")
    flags = ("--max_bad_images", 0.001, "--epochs", 3, "--allow_changed_args", "true")
    result(root, tmp_path / "run", *flags)
    assert bad_names(tmp_path / "run") == [repr(str(odd))]


def test_files_that_pillow_would_start_a_program_for_are_no_images(tmp_path, monkeypatch):
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch /tmp/x) (w) file\n%%EOF\n"
    (tmp_path / "x.png").write_bytes(text)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(dino_images.BadImage, match="no image of a known kind"):
        dino_images.load_image(tmp_path / "x.png")


def test_where_nothing_can_be_read_the_run_ends(tmp_path):
    root = tmp_path / "data"
    for i in range(30):
        path = root / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    with pytest.raises(UserError, match="can't read the image"):
        result(root, tmp_path / "run", "--max_bad_images", 1)


def test_bad_images_do_not_end_a_run_that_looks_at_neighbors(tmp_path, capsys):
    root = corpus(tmp_path / "data")
    result(root, tmp_path / "run", "--knn_every", 1)
    assert all("knn_top1" in line for line in log_without_times(tmp_path / "run"))
    assert capsys.readouterr().out.count("It is taken for a black one") == 2 * 4
    for dataset in dino_data.find_labelled(str(root), dino_crops.eval_transform(8), False, "--knn_data")[:2]:
        with pytest.raises(dino_images.BadImage):
            list(dataset)


def test_a_run_goes_on_with_the_same_images_wherever_they_lie_and_with_no_others(tmp_path, capsys):
    root = corpus(tmp_path / "data", bad=0)
    result(root, tmp_path / "run", "--epochs", 1, "--warmup_epochs", 1)
    moved = root.rename(tmp_path / "moved")
    again = (moved, tmp_path / "run", "--epochs", 1, "--warmup_epochs", 1)
    result(*again, "--init_from", "no.pth")
    said = capsys.readouterr().out
    assert "nothing to do" in said
    assert "note: --init_from no.pth is not used" in said
    (moved / "a" / "000.png").rename(moved / "a" / "new.png")
    with pytest.raises(UserError, match=r"was made with names of the training images \w+; this run has"):
        result(*again)


def test_class_folders_are_not_looked_for_in_vain(tmp_path):
    draw(tmp_path / "x.png")
    with pytest.raises(UserError, match="has images in it but no class folders"):
        dino_images.find_images(tmp_path, data_format="folder")
    (tmp_path / "x.png").unlink()
    with pytest.raises(UserError, match="has no images in it"):
        dino_images.find_images(tmp_path, data_format="folder")


def test_a_run_that_goes_on_remembers_the_bad_images(tmp_path, capsys):
    root = corpus(tmp_path / "data")
    result(root, tmp_path / "run", "--epochs", 1, "--warmup_epochs", 1)
    before = bad_names(tmp_path / "run")
    (tmp_path / "run" / "bad_images.txt").unlink()
    capsys.readouterr()
    result(root, tmp_path / "run", "--allow_changed_args", "true")
    assert bad_names(tmp_path / "run") == before
    assert "Another is taken" not in capsys.readouterr().out  # said before


# Suffix -> how one is written, of each kind that Pillow can write here.
KINDS = {
    "rgb.jpg": {}, "progressive.jpg": {"progressive": True}, "gray.jpg": {"mode": "L"}, "cmyk.jpg": {"mode": "CMYK"},
    "rgb.png": {}, "palette.png": {"mode": "P"}, "alpha.png": {"mode": "RGBA"}, "bits.png": {"mode": "1"},
    "deep.png": {"mode": "I;16"}, "x.webp": {}, "x.bmp": {}, "x.gif": {"mode": "P"}, "x.ppm": {},
    "raw.tif": {}, "packed.tif": {"compression": "tiff_lzw"},
}  # fmt: skip


def hostile_corpus(root, source):
    """Photographs of every kind, whole and damaged in 21 ways each: 330 files."""
    image, rng = dino_images.load_image(source).resize((40, 32)), random.Random(0)
    root.mkdir(parents=True)
    for kind, options in KINDS.items():
        mode = {**options}.pop("mode", "RGB")
        converted = (
            Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
            if mode == "I;16"
            else image.convert(mode)
        )
        file = io.BytesIO()
        save = {name: value for name, value in options.items() if name != "mode"}
        converted.save(file, {".jpg": "JPEG", ".tif": "TIFF"}.get(Path(kind).suffix, Path(kind).suffix[1:]), **save)
        whole = file.getvalue()
        damaged = {"whole": whole, "empty": b"", "zeros": bytes(len(whole)), "text": b"no image at all"}
        for share in (1, 5, 20, 50, 80, 95, 99):
            damaged[f"cut{share}"] = whole[: len(whole) * share // 100]
        for number in range(9):
            flipped = bytearray(whole)
            for _ in range(1 + 3 * number):
                flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            damaged[f"flip{number}"] = bytes(flipped)
        damaged["tail"] = whole + b"more" * 50
        for name, content in damaged.items():
            (root / f"{name}-{kind}").write_bytes(content)
        (root / f"named-{kind}{'.png' if kind.endswith('.jpg') else '.jpg'}").write_bytes(whole)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pil", "fast"])
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_folder_is_trained_on_with_the_right_count_and_the_same_result_for_any_workers(
    sample_root, tmp_path, kind
):
    if kind == "fast":
        pytest.importorskip("cv2")
    root = hostile_corpus(tmp_path / "data", next((sample_root / "train" / "coffee").iterdir()))
    images, bad = dino_images.find_images(root), []
    augment = main_dino.DataAugmentationDINO((0.4, 1), (0.1, 0.4), 0, 32, as_uint8=True, augmentation=kind)
    for i in range(len(images)):
        with contextlib.suppress(dino_images.BadImage):
            augment(images.open(i))
            continue
        bad.append(images.name(i))
    assert len(images) == 22 * len(KINDS) >= 300
    for name in ("whole", "tail", "named"):
        assert not [path for path in bad if Path(path).name.startswith(name)]
    for name in ("empty", "zeros", "text", "cut1-"):
        assert len([path for path in bad if Path(path).name.startswith(name)]) == len(KINDS)
    runs = {}
    for workers in (0, 2):
        flags = ("--batch_size_per_gpu", 11, "--max_bad_images", 1, "--epochs", 1, "--warmup_epochs", 0)
        folder = tmp_path / f"run{workers}"
        runs[workers] = result(root, folder, *flags, "--num_workers", workers, "--augmentation", kind)
        assert bad_names(folder) == sorted(bad)
        assert log_without_times(folder)[0]["bad_images"] == len(bad)
    assert all(torch.equal(runs[0]["student"][name], runs[2]["student"][name]) for name in runs[0]["student"])


# ---- too little of something ----


def test_a_loader_that_is_killed_ends_the_run_with_one_line(tiny_root, tmp_path):
    words = [
        *SMALL_RUN,
        "--num_workers",
        2,
        "--epochs",
        500,
        "--data_path",
        tiny_root / "train",
        "--output_dir",
        tmp_path,
    ]
    command = [sys.executable, ROOT / "main_dino.py", *map(str, words)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in run.stdout if line.startswith("Epoch: [1/"))
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2
    # As torch tells it, or, if it was in the middle of handing over, as Python does.
    assert re.search(
        "^error: a loader's process (was ended from|could not hand).*machine ran out of memory", said, re.M
    )
    assert "Traceback" not in said
    assert (tmp_path / "checkpoint.pth").exists()


def test_too_little_shared_memory_ends_the_run_with_one_line(tiny_root, tmp_path):
    words = [*SMALL_RUN, "--num_workers", 1, "--data_path", tiny_root / "train", "--output_dir", tmp_path]
    train = shlex.join([sys.executable, str(ROOT / "main_dino.py"), *map(str, words)])
    unshare = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=100k tmpfs /dev/shm && exec {train}"]
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("only root can make /dev/shm small")
    done = subprocess.run(unshare, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "error: /dev/shm, through which loaders hand over their images, is too small." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "error: too many open files. Raise `ulimit -n`"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "error: not enough memory. Lower --batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "error: not enough memory. Lower"),
        (RuntimeError("received 0 items of ancdata"), "error: too many open files. Raise `ulimit -n`"),
        (RuntimeError("Pin memory thread exited unexpectedly"), "error: a loader's process was ended from outside."),
    ],
)
def test_a_shortage_is_one_line_and_any_other_error_keeps_its_traceback(monkeypatch, capsys, error, says):
    def short_of_something(_):
        raise error

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as ended:
        dino_cli.run(short_of_something, argparse.ArgumentParser(add_help=False), "")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(says)
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        dino_cli.run(short_of_something, argparse.ArgumentParser(add_help=False), "")


def hand_over(pipe):
    pipe.send(DupFd(0))
    signal.pause()


def ending_of_a_lost_handover(monkeypatch, capsys, wrap=lambda e: e):
    """(exit code, error line) where a loader's process dies while it hands something over, as batches are."""
    ours, theirs = multiprocessing.Pipe()
    loader = multiprocessing.get_context("fork").Process(target=hand_over, args=(theirs,), daemon=True)
    loader.start()
    batch = ours.recv()
    loader.kill()
    loader.join()

    def take(_):
        try:
            batch.detach()
        except OSError as e:
            raise wrap(e) from None

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as ended:
        dino_cli.run(take, argparse.ArgumentParser(add_help=False), "")
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loader_that_dies_while_it_hands_over_a_batch_is_named(monkeypatch, capsys, world_size):
    monkeypatch.setattr(utils, "get_world_size", lambda: world_size)
    code, line = ending_of_a_lost_handover(monkeypatch, capsys)
    assert code == 2
    assert re.match(r"error( \(rank 0\))?: a loader's process could not hand over a batch \(Connection", line)
    assert "ran out of memory, and it was ended: lower --num_workers" in line


def test_too_many_open_files_are_named_in_a_handover_too(monkeypatch, capsys):
    error = OSError(errno.EMFILE, "Too many open files")
    code, line = ending_of_a_lost_handover(monkeypatch, capsys, lambda e: error.with_traceback(e.__traceback__))
    assert code == 2
    assert line.startswith("error: too many open files.")


def test_seeds_of_replacements_are_a_stream_of_their_own():
    assert len({utils.ORDER, utils.SAMPLE, utils.STEP, utils.REPLACEMENT}) == 4
