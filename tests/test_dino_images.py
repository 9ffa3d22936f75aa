"""dino_images.py: all ways to name images, all kinds of files, and runs on images that can't be read."""

import contextlib
import errno
import gzip
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
import time
from multiprocessing.reduction import DupFd
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, arguments_of, ending, log_without_times, same_state
from PIL import Image
from test_restarts import Run
from torchvision import datasets

import dino_cli
import dino_crops
import dino_data
import dino_files
import dino_images
import eval_knn
import main_dino
from dino_images import BadImage
from utils import UserError

pytestmark = pytest.mark.usefixtures("small_networks")

# ---- folders ----


def draw(path, level=0, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


def names(images, root):
    return [os.path.relpath(name, root) for name in images.names()]


def test_class_folders_have_torchvisions_order_and_labels(tmp_path):
    for name in ("b/2.png", "b/10.png", "b/x-y/1.png", "b/x/3.JPG", "b/x/z/4.webp", "a/1.png", "c d/é.png"):
        draw(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    theirs, ours = datasets.ImageFolder(tmp_path), dino_files.find_images(tmp_path)
    assert [ours.name(i) for i in range(len(ours))] == [path for path, _ in theirs.samples]
    assert (ours.targets.tolist(), ours.classes) == (theirs.targets, theirs.classes)


def test_a_folder_with_images_directly_in_it_has_no_classes(tmp_path):
    for name in ("1.png", "2/3.png", "2/4/5.png", ".hidden.png", ".git/6.png", "._7.png"):
        draw(tmp_path / name)
    images = dino_files.find_images(tmp_path)
    assert names(images, tmp_path) == ["1.png", "2/3.png", "2/4/5.png"]
    assert images.targets is None
    images = dino_files.find_images(tmp_path, data_format="folder")
    assert (names(images, tmp_path), images.classes) == (["2/3.png", "2/4/5.png"], ["2"])
    assert dino_files.find_images(tmp_path / "2", data_format="flat").targets is None


def test_a_folder_without_classes_or_images_is_an_error(tmp_path):
    draw(tmp_path / "x.png")
    with pytest.raises(UserError, match="has images but no class folders"):
        dino_files.find_images(tmp_path, data_format="folder")
    (tmp_path / "x.png").unlink()
    with pytest.raises(UserError, match="has no images"):
        dino_files.find_images(tmp_path, data_format="folder")


def test_links_are_followed_but_not_in_circles(tmp_path):
    draw(tmp_path / "real" / "1.png")
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "b").symlink_to(tmp_path / "real")
    (root / "a" / "again").symlink_to(root)
    assert names(dino_files.find_images(root), root) == ["a/b/1.png"]


@pytest.fixture
def look(tmp_path, monkeypatch):
    """look() -> (names of the images in tmp_path/images, whether its folders were listed to find them)."""
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dino_files, "WORTH_CACHING", 3)
    root, listed, index = tmp_path / "images", [], dino_files.index
    for name in ("a/1.png", "a/2.png", "b/deep/3.png"):
        draw(root / name)
    monkeypatch.setattr(dino_files, "index", lambda *given: listed.append(given) or index(*given))

    def look(then_old=False):
        if then_old:
            for folder in [root, *root.rglob("*")]:
                os.utime(folder, (time.time() - 100,) * 2)
        listed.clear()
        return names(dino_files.find_images(root), root), bool(listed)

    return look


def test_the_index_of_a_large_folder_is_cached_until_a_folder_changes(tmp_path, look):
    three = ["a/1.png", "a/2.png", "b/deep/3.png"]
    assert look() == look() == (three, True)  # it might still be growing
    assert look(then_old=True) == (three, True)
    assert look() == (three, False)
    draw(tmp_path / "images" / "b" / "deep" / "4.png")
    assert look() == ([*three, "b/deep/4.png"], True)
    look(then_old=True)
    (tmp_path / "images" / "a" / "1.png").unlink()
    assert look() == ([*three[1:], "b/deep/4.png"], True)
    look(then_old=True)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"does not exist|is not a folder"):
        look()


def test_a_damaged_index_is_not_used(tmp_path, look):
    expected, _ = look(then_old=True)
    (cached,) = (tmp_path / "cache").iterdir()
    whole = cached.read_bytes()
    damages = [b"", b"{}", b"[1]", b'{"root": 3}', b"\xff\xfe", b"[" * 10**5]
    damages += [whole[:-9], whole.replace(b'"a/2', b'"z/2')]
    for part in ({"folders": {}}, {"images": 5}, {"images": [5]}):
        damages.append(json.dumps({**json.loads(whole), **part}).encode())
    for damage in damages:
        cached.write_bytes(damage)
        assert look() == (expected, True)


# ---- lists ----


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("x.txt", "a b.png\nsub/c.png\n", None),
        ("x.txt", "\ufeffa b.png\r\n\r\nsub/c.png", None),
        ("x.txt", "a b.png\tdog\nsub/c.png\tape", ["dog", "ape"]),
        ("x.txt", "a b.png 10\nsub/c.png 9", ["10", "9"]),
        ("x.csv", 'path,label\n"a b.png",dog\nsub/c.png,ape\n', ["dog", "ape"]),
        ("x.txt", "odd.name\na b.png\nsub/c.png", None),
        ("x.tsv", "file\tclass\tmore\na b.png\tdog\t1\nsub/c.png\tape\t2", ["dog", "ape"]),
    ],
)
def test_lists_name_images_relative_to_themselves_with_or_without_labels(tmp_path, name, text, labels):
    draw(tmp_path / "a b.png", 1)
    draw(tmp_path / "sub" / "c.png", 2)
    if text.startswith("odd"):
        draw(tmp_path / "odd.png", 0)
        (tmp_path / "odd.png").rename(tmp_path / "odd.name")
    (tmp_path / name).write_text(text, encoding="utf-8")
    images = dino_files.find_images(tmp_path / name)
    assert names(images, tmp_path) == ["odd.name"] * text.startswith("odd") + ["a b.png", "sub/c.png"]
    assert [images.open(i).getpixel((0, 0))[0] for i in range(len(images))] == [0, 1, 2][-len(images) :]
    assert (None if images.targets is None else [images.classes[t] for t in images.targets]) == labels
    if labels == ["10", "9"]:
        assert images.classes == ["9", "10"]  # sorted as numbers


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "has no paths of images"),
        ("x.txt", b"\xff\xfe\x00", "it is not UTF-8 text"),
        ("x.txt", b"no.png\nneither.png", "there is no .*no.png. Paths in a list are relative to its folder"),
        ("x.csv", b"1.png,a\n2.png,\n", "has labels for 1 of 2 images"),
        ("x.csv", b'1.png,"' + b"a" * 200_000, "can't read .*field larger than field limit"),
        ("x.csv", b"1.png\n,b\n", "or a line without one"),
    ],
)
def test_a_list_that_can_not_be_used_is_a_message_of_one_line(tmp_path, name, content, message):
    draw(tmp_path / "1.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        dino_files.find_images(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_train_and_val_can_be_lists(tmp_path):
    for part, classes in (("train", "ab"), ("val", "b")):
        for name in classes:
            draw(tmp_path / "files" / f"{part}{name}.png")
        rows = (f"files/{part}{name}.png,{name}\n" for name in classes)
        (tmp_path / f"{part}.csv").write_text("".join(rows))
    _, val, train_labels, val_labels = dino_data.labeled_images(tmp_path, dino_crops.eval_transform(8))
    assert (train_labels.tolist(), val_labels.tolist()) == ([0, 1], [1])
    assert val[0][0].shape == (3, 8, 8)
    (tmp_path / "train.csv").write_text("files/traina.png\n")
    with pytest.raises(UserError, match=r"train\.csv has no labels"):
        dino_data.labeled_images(tmp_path, None)


@pytest.mark.parametrize(
    ("header", "columns", "chosen"),
    [
        ("Path,Sex,Age,Class", (), "sb"),  # by their names
        ("Path,Sex,Age,No Finding", ("Path", "No Finding"), "sb"),
        ("Path,Sex,Age,No Finding", ("Path", "Sex"), "xy"),
        ("Path,Sex,Age,No Finding", ("Path",), None),
        ("Path,Sex,Age,No Finding", (), None),  # training needs no labels
    ],
)
def test_the_columns_of_a_table_are_known_by_its_header(tmp_path, capsys, header, columns, chosen):
    draw(tmp_path / "1.png")
    draw(tmp_path / "2.png")
    (tmp_path / "x.csv").write_text(f"{header}\n1.png,x,40,s\n2.png,y,41,b\n")
    images = dino_files.find_images(tmp_path / "x.csv", columns=columns)
    assert names(images, tmp_path) == ["1.png", "2.png"]
    found = None if images.targets is None else "".join(images.classes[t] for t in images.targets)
    assert found == chosen
    labels = f"labels from {(columns or ('', 'Class'))[1]!r}" if chosen else "no labels"
    assert f"x.csv: paths from the column 'Path', {labels}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("Foto,Sex,Age,No Finding\n1.png,x,40,s\n", (), r"\(Foto, Sex, Age, No Finding\).*--list_columns PATH LABEL"),
        ("id,Path,y\n7,1.png,x\n", ("Pat", "y"), "has no column 'Pat'; did you mean Path"),
        ("1.png,x,40,s\n", ("Path", "y"), "has no header with the columns --list_columns Path y"),
    ],
)
def test_columns_that_are_not_clear_are_asked_for(tmp_path, text, columns, message):
    draw(tmp_path / "1.png")
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        dino_files.find_images(tmp_path / "x.csv", columns=columns)


def test_a_table_of_two_columns_can_have_the_labels_first(tmp_path):
    draw(tmp_path / "1.png")
    for header in ("label,file", "label,where", "what,filename"):
        (tmp_path / "x.csv").write_text(f"{header}\nape,1.png\n")
        images = dino_files.find_images(tmp_path / "x.csv")
        assert (names(images, tmp_path), images.classes) == (["1.png"], ["ape"])


# ---- train, val and test ----


@pytest.mark.parametrize(
    ("parts", "used"),
    [("train val test", "val"), ("train Validation test", "Validation"), ("Training testing", "testing")],
)
def test_parts_have_other_names_too(tmp_path, monkeypatch, capsys, parts, used):
    for i, part in enumerate(parts.split()):
        for name in "ab":
            draw(tmp_path / part / name / "1.png", i)
    (tmp_path / "devkit").mkdir()  # without images
    _, val, _, _ = dino_data.labeled_images(tmp_path, dino_crops.eval_transform(8))
    assert names(val.images, tmp_path) == [f"{used}/a/1.png", f"{used}/b/1.png"]
    said = capsys.readouterr().out
    assert (f"has no val; {used.lower()} is used" in said) == (used != "val")
    train = parts.split()[0]
    flags = [*SMALL_RUN, "--data_path", tmp_path, "--output_dir", tmp_path / "run"]
    code, line = ending(monkeypatch, capsys, main_dino, *flags)
    assert code == 2
    assert line.endswith(f"Train on {train} alone: --data_path {tmp_path / train}")


def test_a_part_among_other_classes_is_a_class(tmp_path, capsys):
    for name in ("Bus", "Car", "Train"):
        for i in range(11):
            draw(tmp_path / "vehicles" / name / f"{i:02}.png", i)
    train, val, _, _ = dino_data.find_labeled(tmp_path / "vehicles", dino_crops.eval_transform(8), False, "--knn_data")
    assert (len(train), len(val)) == (27, 6)
    assert "has no train and val: every tenth image per class is held out" in capsys.readouterr().out
    for name in ("train", "test", "unlabeled"):
        draw(tmp_path / "stl" / name / "1.png")
    args = arguments_of(main_dino, *SMALL_RUN, "--data_path", tmp_path / "stl")
    assert len(dino_data.training_images(args)) == 3
    assert "contains train and test. Both are trained on" in capsys.readouterr().out


def test_knn_holds_out_every_tenth_image_of_class_folders(tmp_path, capsys):
    for name in ("a", "b"):
        for i in range(10):
            draw(tmp_path / name / f"{i}.png", 20 * i)
    flags = ["--arch", "vit_nano", "--pretrained_weights", "random", "--image_size", 32, "--num_workers", 0]
    eval_knn.main(arguments_of(eval_knn, *flags, "--nb_knn", 1, "--device", "cpu", "--data_path", tmp_path))
    assert "18 training and 2 validation images in 2 classes" in capsys.readouterr().out


def test_flat_test_images_are_told_to_be_labeled(tmp_path):
    draw(tmp_path / "train" / "a" / "1.png")
    draw(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UserError, match=r"has images but no class folders\. .* or write a list .* such as .*/val\.csv"):
        dino_data.labeled_images(tmp_path, None)


# ---- torchvision's data sets ----


def test_of_a_torchvision_data_set_without_test_images_every_tenth_is_held_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    for name in ("Forest", "River"):
        for i in range(11):
            draw(tmp_path / "torchvision" / "eurosat" / "2750" / name / f"{i:02}.png", i)
    train, val, train_labels, val_labels = dino_data.labeled_images("torchvision:EuroSAT", dino_crops.eval_transform(8))
    assert (train_labels.tolist(), val_labels.tolist()) == ([0] * 9 + [1] * 9, [0, 0, 1, 1])
    assert [val.load(i).getpixel((0, 0))[0] for i in range(4)] == [0, 10, 0, 10]
    assert not {*train.images.numbers} & {*val.images.numbers}
    assert "has no test images of its own: every tenth image per class is held out" in capsys.readouterr().out


def test_a_torchvision_data_set_has_its_own_names_for_its_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    root = tmp_path / "torchvision" / "oxford-iiit-pet"
    for i in (1, 2, 3):
        draw(root / "images" / f"Beagle_{i}.jpg", i)
    (root / "annotations").mkdir()
    (root / "annotations" / "trainval.txt").write_text("Beagle_1 1 1 1\nBeagle_2 1 1 1\n")
    (root / "annotations" / "test.txt").write_text("Beagle_3 1 1 1\n")
    train, val = (dino_files.find_images("torchvision:OxfordIIITPet", part) for part in ("train", "val"))
    assert (len(train), len(val), train.targets.tolist(), train.has_parts) == (2, 1, [0, 0], True)
    assert len(dino_files.find_images("torchvision:OxfordIIITPet:test")) == 1
    with pytest.raises(UserError, match=r"OxfordIIITPet:dev is not available: Unknown value 'dev'.*trainval"):
        dino_files.find_images("torchvision:OxfordIIITPet:dev")
    with pytest.raises(UserError, match=r"EMNIST is not available: .*'split'.*torchvision:EMNIST:SPLIT"):
        dino_files.find_images("torchvision:EMNIST", "train")


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A cache with files in MNIST's format: 40 training and 20 test images."""
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "torchvision" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, number in (("train", 40), ("t10k", 20)):
        pixels = np.arange(number * 28 * 28, dtype=np.uint32).astype(np.uint8)
        files = {
            "images-idx3": struct.pack(">IIII", 2051, number, 28, 28) + pixels.tobytes(),
            "labels-idx1": struct.pack(">II", 2049, number) + bytes(i % 10 for i in range(number)),
        }
        for name, content in files.items():
            (folder / f"{part}-{name}-ubyte").write_bytes(content)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))


def test_a_torchvision_data_set_is_used_by_its_name(mnist, tmp_path, capsys):
    train, val = (dino_files.find_images("torchvision:MNIST", part) for part in ("train", "val"))
    assert (len(train), len(val), train.open(3).size) == (40, 20, (28, 28))
    assert train.targets.tolist() == [i % 10 for i in range(40)]
    flags = ["--arch", "vit_nano", "--pretrained_weights", "random", "--image_size", 32, "--num_workers", 0]
    eval_knn.main(arguments_of(eval_knn, *flags, "--nb_knn", 1, "--device", "cpu", "--data_path", "torchvision:MNIST"))
    assert "40 training and 20 validation images in 10 classes" in capsys.readouterr().out
    if multiprocessing.get_all_start_methods()[0] == "fork":
        pixels = dino_files.keep_small_decoded(train).open(3)
        np.testing.assert_array_equal(pixels, train.open(3).convert("RGB"))
    flags = [*SMALL_RUN, "--data_path", "torchvision:MNIST", "--output_dir", tmp_path / "run", "--epochs", 1]
    main_dino.train_dino(arguments_of(main_dino, *flags, "--knn_every", 1))
    assert "knn_top1" in log_without_times(tmp_path / "run")[0]


class Downloaded(datasets.VisionDataset):
    """A data set like torchvision's, with one file per part."""

    def __init__(self, root, train=True, download=False):
        super().__init__(root)
        self.path = Path(root) / "numbers" / f"{train}.png"
        if download:
            draw(self.path, 7 if train else 8)
        if not self.path.exists():
            raise RuntimeError("Dataset not found")

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return Image.open(self.path), 0


def test_a_torchvision_data_set_is_downloaded_if_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "MNIST", Downloaded)
    train, val = (dino_files.find_images("torchvision:MNIST", part) for part in ("train", "val"))
    assert (train.open(0).getpixel((0, 0))[0], val.open(0).getpixel((0, 0))[0]) == (7, 8)
    monkeypatch.setattr(sys.modules[__name__], "draw", lambda *_: pytest.fail("downloaded again"))
    assert len(dino_files.find_images("torchvision:MNIST", "train")) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("CIFAR11", "did you mean CIFAR10"), ("", "no data set ''"), ("CIFAR10", "is not available: .*network is off")],
)
def test_a_torchvision_data_set_that_is_not_available_is_an_error(tmp_path, monkeypatch, name, message):
    def no_network(*_, **__):
        raise OSError("network is off")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message):
        dino_files.find_images(f"torchvision:{name}")


# ---- kinds of files ----


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    gray = np.full((5, 7), 200, np.uint16 if mode == "I;16" else np.uint8)
    (Image.fromarray(gray) if mode == "I;16" else Image.fromarray(gray).convert(mode)).save(path)
    image = dino_images.load_image(path)
    assert (image.mode, image.size) == ("RGB", (7, 5))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_get_the_color_stored_below(tmp_path, mode):
    image = Image.new("P", (2, 1), 1)
    image.putpalette([9, 9, 9, 90, 90, 90])
    if mode != "P":
        image = Image.new("RGBA", (2, 1), (90, 90, 90, 0)).convert(mode)
    image.save(tmp_path / "x.png", **({"transparency": 1} if mode == "P" else {}))
    assert Image.open(tmp_path / "x.png").convert("RGBA").getpixel((0, 0))[3] == 0
    assert dino_images.load_image(tmp_path / "x.png").getpixel((0, 0)) == (90, 90, 90)


def test_16_bits_become_the_upper_8(tmp_path):
    levels = np.array([[0, 255, 256, 25_700, 65_535]], dtype=np.uint16)
    for name, values in (("x.png", levels), ("x.tif", levels), ("y.tif", levels.astype(np.int32))):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(dino_images.load_image(tmp_path / name))[0, :, 1].tolist() == [0, 0, 1, 100, 255]


@pytest.mark.parametrize(("values", "levels"), [([0, 0.5, 1], [0, 128, 255]), ([0, 100.4, 255], [0, 100, 255])])
def test_floats_are_from_0_to_1_or_from_0_to_255(tmp_path, values, levels):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "x.tif")
    assert np.asarray(dino_images.load_image(tmp_path / "x.tif"))[0, :, 0].tolist() == levels


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png"])
def test_the_first_frame_of_an_animation_is_used(tmp_path, name):
    first, second = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
    red, green, blue = dino_images.load_image(tmp_path / name).getpixel((1, 1))
    assert red > 250 > 5 > max(green, blue)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotates_an_image_only_if_asked(tmp_path, orientation):
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0, 0] = 255  # the corner to find again
    exif = Image.Exif()
    exif[dino_images.ORIENTATION] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(dino_images.load_image(tmp_path / "x.png"), pixels)
    rotated = np.asarray(dino_images.load_image(tmp_path / "x.png", exif=True))[..., 0]
    corner = {1: (0, 0), 2: (0, 5), 3: (3, 5), 4: (3, 0), 5: (0, 0), 6: (0, 3), 7: (5, 3), 8: (5, 0)}[orientation]
    assert rotated.shape == ((4, 6) if orientation < 5 else (6, 4))
    assert np.argwhere(rotated).tolist() == [list(corner)]


@pytest.mark.parametrize("kind", ["pil", "fast"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_the_smallest_images_give_crops(tmp_path, kind, size):
    if kind == "fast":
        pytest.importorskip("cv2")
    augment = main_dino.DataAugmentationDINO(
        (0.4, 1), (0.05, 0.4), 2, global_crops_size=32, local_crops_size=16, augmentation=kind
    )
    for name in ("x.png", "x.jpg"):
        draw(tmp_path / name, 77, size)
        crops = augment(dino_images.open_image(tmp_path / name))
        assert [crop.shape for crop in crops] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 2


@pytest.mark.parametrize(("size", "opens"), [((16_000, 12_000), True), ((20_000, 12_000), False)])
def test_images_of_more_than_200_million_pixels_are_not_opened(tmp_path, size, opens):
    Image.new("1", size).save(tmp_path / "x.png")
    with contextlib.nullcontext() if opens else pytest.raises(BadImage, match=r"x\.png: 20000 x 12000 are more than"):
        assert dino_images.open_image(tmp_path / "x.png").size == size


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch /tmp/x) (w) file\n%%EOF\n"


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "eps"])
def test_a_damaged_or_foreign_file_is_named_and_starts_no_program(tmp_path, sample_root, monkeypatch, damage):
    whole = next((sample_root / "train" / "coffee").iterdir()).read_bytes()
    content = {"empty": b"", "text": b"not an image", "truncated": whole[:2000], "eps": EPS}[damage]
    (tmp_path / "bad.png").write_bytes(content)
    monkeypatch.setattr(subprocess, "Popen", None)  # Pillow renders EPS with Ghostscript
    with pytest.raises(BadImage, match=r"can't read the image .*bad\.png: ") as raised:
        dino_images.load_image(tmp_path / "bad.png")
    if damage != "truncated":
        assert raised.value.reason == "it is not an image of a known format"


# ---- file systems that don't answer ----


def test_a_file_system_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    draw(tmp_path / "x.png", 9)
    tries, pauses = [], []

    def stale_at_first(path, mode):
        tries.append(path)
        if len(tries) < 4:
            raise OSError(errno.ESTALE, "Stale file handle")
        return open(path, mode)

    monkeypatch.setattr(dino_images, "open", stale_at_first, raising=False)
    monkeypatch.setattr(dino_images.time, "sleep", pauses.append)
    assert dino_images.load_image(tmp_path / "x.png").getpixel((0, 0)) == (9, 9, 9)
    assert pauses == [0.5, 1.0, 2.0]


def test_a_file_system_that_is_gone_is_given_up_after_a_minute_until_a_file_can_be_read(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(dino_images, "retry_budget_used", 0.0)
    monkeypatch.setattr(dino_images.time, "sleep", pauses.append)

    def seconds_for(path):
        pauses.clear()
        with pytest.raises(BadImage, match=rf"{path}: No such file or directory"):
            dino_images.open_image(tmp_path / path)
        return sum(pauses)

    assert seconds_for("gone/x.png") == 63.5  # 0.5 + 1 + 2 + ... until a minute is over
    assert seconds_for("gone/y.png") == seconds_for("x.png") == 0  # the minute is over, or only the file is missing
    draw(tmp_path / "x.png")
    for _ in range(600):
        dino_images.open_image(tmp_path / "x.png")
    assert seconds_for("gone/y.png") == 0  # not for each image of a folder that does not exist
    for _ in range(4000):
        dino_images.open_image(tmp_path / "x.png")
    assert 0 < seconds_for("gone/y.png") < 10


def test_a_file_system_that_comes_back_is_waited_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(dino_images, "retry_budget_used", 0.0)
    monkeypatch.setattr(dino_images.time, "sleep", lambda pause: pause == 16 and draw(tmp_path / "gone" / "x.png"))
    dino_images.open_image(tmp_path / "gone" / "x.png")
    assert dino_images.retry_budget_used == 0


def test_pipes_and_very_large_files_are_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(BadImage, match=r"x\.png: it is not a regular file"):
        dino_images.open_image(tmp_path / "x.png")
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"x\.csv is neither a file nor a folder"):
        dino_files.find_images(tmp_path / "x.csv")
    with open(tmp_path / "y.png", "wb") as file:
        file.truncate(2**31 + 1)  # without content
    with pytest.raises(BadImage, match=r"y\.png: it has more than 2048 MB"):
        dino_images.open_image(tmp_path / "y.png")


def test_a_very_thin_image_is_cut_before_it_is_resized(tmp_path):
    image = Image.new("RGB", (2, 50_000))
    image.paste((255, 0, 0), (0, 24_990, 2, 25_010))
    cut = dino_crops.shorten(image)
    assert (cut.size, cut.getpixel((0, 0)), cut.getpixel((1, 3))) == ((2, 4), (255, 0, 0), (255, 0, 0))
    assert dino_crops.shorten(torch.zeros(4, 3, 60)).shape == (4, 3, 6)
    assert dino_crops.shorten(cut) is cut
    assert dino_crops.eval_transform(224)(image)[0].min() == 255


# ---- runs with unreadable images ----


def make_images(root, good=60, bad=4):
    """Two class folders with `good` images, and `bad` unreadable ones of several kinds."""
    rng = random.Random(0)
    for i in range(good):
        draw(root / "ab"[i % 2] / f"{i:03}.png", rng.randrange(256), (40, 30))
    whole = (root / "a" / "000.png").read_bytes() if good else b""
    kinds = [b"", b"text", whole[: len(whole) // 2], whole[:16] + rng.randbytes(40)]
    for i in range(bad):
        path = root / "ab"[i % 2] / f"x{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kinds[i % len(kinds)])
    return root


FLAGS = (*SMALL_RUN, "--max_bad_images", "0.1")


def student_of(root, folder, *flags):
    """The weights of the student after a run."""
    main_dino.train_dino(arguments_of(main_dino, *FLAGS, "--data_path", root, "--output_dir", folder, *flags))
    return torch.load(folder / "checkpoint.pth", weights_only=True)["student"]


def bad_names(folder):
    return [line.split("\t")[0] for line in (folder / "bad_images.txt").read_text().splitlines()]


def test_unreadable_images_are_replaced_counted_and_listed_for_any_number_of_workers(tmp_path, capsys):
    root, weights = make_images(tmp_path / "data"), []
    for workers in (0, 2):
        folder = tmp_path / f"run{workers}"
        weights.append(student_of(root, folder, "--num_workers", workers))
        assert bad_names(folder) == sorted(str(path) for path in root.glob("*/x*.png"))
        for line in (folder / "bad_images.txt").read_text().splitlines():
            assert re.search(r"/x\d\.png\t(it is not an image of a known format|.*truncated|.*PNG|.*broken)", line)
        assert [line["bad_images"] for line in log_without_times(folder)] == [4, 4]
        assert capsys.readouterr().out.count("warning: can't read the image") == 4
        assert same_state(weights[0], weights[-1])


def test_the_replacement_of_an_unreadable_image_is_a_function_of_seed_epoch_and_index(tmp_path):
    images = dino_files.find_images(make_images(tmp_path / "data"))
    bad = next(i for i in range(len(images)) if Path(images.name(i)).name.startswith("x"))

    def replacement(seed, epoch):
        _, index, unreadable = dino_data.MultiCropDataset(images, dino_images.to_rgb, seed)[epoch, bad]
        assert unreadable == (images.name(bad), "it is not an image of a known format")
        return index

    found = [replacement(seed, epoch) for seed in range(3) for epoch in range(5)]
    assert found == [replacement(seed, epoch) for seed in range(3) for epoch in range(5)]
    assert len(set(found)) > 8


def test_too_many_unreadable_images_end_the_run_with_their_list(tmp_path, monkeypatch, capsys):
    root = make_images(tmp_path / "data", good=40, bad=8)
    code, line = ending(monkeypatch, capsys, main_dino, *FLAGS, "--data_path", root, "--output_dir", tmp_path / "run")
    found = re.match(r"error: (\d) of 48 images can't be read, more than --max_bad_images 0.1 allows: ", line)
    assert int(found[1]) == len(bad_names(tmp_path / "run")) >= 5
    assert code == 2


@pytest.mark.parametrize("flags", [("--max_bad_images", 1), ("--strict_images", "true", "--num_workers", 1)])
def test_a_run_on_unreadable_images_alone_ends_also_if_all_are_allowed(tmp_path, refusal, flags):
    root = make_images(tmp_path / "data", good=0, bad=30)
    flags = [*FLAGS, "--data_path", root, "--output_dir", tmp_path / "run", *flags]
    line = refusal(main_dino, *flags)
    assert re.match(rf"error: can't read the image {root}/[ab]/x\d+\.png: it is not an image .*", line)


def test_one_unreadable_image_in_a_small_folder_is_allowed_and_forgotten_when_repaired(tmp_path):
    root = make_images(tmp_path / "data", good=47, bad=1)
    student_of(root, tmp_path / "run", "--max_bad_images", 0.001)  # rounded up
    (bad,) = root.glob("*/x*.png")
    assert bad_names(tmp_path / "run") == [str(bad)]
    draw(bad, size=(40, 30))
    odd = root / "b" / "a\tb\nc.png"
    odd.write_bytes(b"")
    flags = ("--max_bad_images", 0.001, "--epochs", 3, "--allow_changed_args", "true")
    student_of(root, tmp_path / "run", *flags)
    assert bad_names(tmp_path / "run") == [repr(str(odd))]


def test_a_resumed_run_remembers_unreadable_images_without_a_second_warning(tmp_path, capsys):
    root = make_images(tmp_path / "data")
    student_of(root, tmp_path / "run", "--epochs", 1)
    before = bad_names(tmp_path / "run")
    (tmp_path / "run" / "bad_images.txt").unlink()
    capsys.readouterr()
    student_of(root, tmp_path / "run", "--allow_changed_args", "true")
    assert bad_names(tmp_path / "run") == before
    assert "can't read the image" not in capsys.readouterr().out


def test_knn_replaces_unreadable_images_by_black_ones_and_evaluations_end(tmp_path, capsys):
    root = make_images(tmp_path / "data")
    student_of(root, tmp_path / "run", "--knn_every", 1)
    assert all("knn_top1" in line for line in log_without_times(tmp_path / "run"))
    assert capsys.readouterr().out.count("A black image replaces it") == 4 * 4  # twice before training
    for dataset in dino_data.find_labeled(str(root), dino_crops.eval_transform(8), False, "--knn_data")[:2]:
        with pytest.raises(BadImage):
            list(dataset)


def test_a_run_resumes_with_moved_images_but_not_with_renamed_ones(tmp_path, capsys):
    root = make_images(tmp_path / "data", bad=0)
    student_of(root, tmp_path / "run", "--epochs", 1)
    before = (tmp_path / "run" / "run.json").read_text()
    moved = root.rename(tmp_path / "moved")
    student_of(moved, tmp_path / "run", "--epochs", 1, "--init_from", "no.pth")
    assert (tmp_path / "run" / "run.json").read_text() == before
    output = capsys.readouterr().out
    assert "nothing to do" in output
    assert "note: --init_from no.pth is not used" in output
    (moved / "a" / "000.png").rename(moved / "a" / "new.png")
    with pytest.raises(UserError, match=r"was made with names of the training images \w+; this run has"):
        student_of(moved, tmp_path / "run", "--epochs", 1)


# Name -> how Pillow writes a file of this kind.
KINDS = {
    "rgb.jpg": {}, "progressive.jpg": {"progressive": True}, "gray.jpg": {"mode": "L"}, "cmyk.jpg": {"mode": "CMYK"},
    "rgb.png": {}, "palette.png": {"mode": "P"}, "alpha.png": {"mode": "RGBA"}, "bits.png": {"mode": "1"},
    "deep.png": {"mode": "I;16"}, "x.webp": {}, "x.bmp": {}, "x.gif": {"mode": "P"}, "x.ppm": {},
    "raw.tif": {}, "packed.tif": {"compression": "tiff_lzw"},
}  # fmt: skip


def damaged_versions(whole, rng):
    """{name: content}: a file, and 20 damaged versions of it."""
    versions = {"whole": whole, "tail": whole + b"more" * 50}
    versions |= {"empty": b"", "zeros": bytes(len(whole)), "text": b"not an image at all"}
    versions |= {f"cut{share}": whole[: len(whole) * share // 100] for share in (1, 5, 20, 50, 80, 95, 99)}
    for number in range(9):
        flipped = bytearray(whole)
        for _ in range(1 + 3 * number):
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        versions[f"flip{number}"] = bytes(flipped)
    return versions


def make_hostile_images(root, source):
    """A photograph in files of all KINDS, whole, damaged, and with a wrong suffix: 330 files."""
    image, rng = dino_images.load_image(source).resize((40, 32)), random.Random(0)
    root.mkdir(parents=True)
    for kind, options in KINDS.items():
        options, suffix, file = {**options}, kind.split(".")[1], io.BytesIO()
        mode = options.pop("mode", "RGB")
        deep = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
        written = deep if mode == "I;16" else image.convert(mode)
        written.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix), **options)
        for name, content in damaged_versions(file.getvalue(), rng).items():
            (root / f"{name}-{kind}").write_bytes(content)
        (root / f"renamed-{kind}.{'png' if suffix == 'jpg' else 'jpg'}").write_bytes(file.getvalue())
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pil", "fast"])
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_folder_is_trained_on(sample_root, tmp_path, kind):
    if kind == "fast":
        pytest.importorskip("cv2")
    root = make_hostile_images(tmp_path / "data", next((sample_root / "train" / "coffee").iterdir()))
    images, bad = dino_files.find_images(root), []
    augment = main_dino.DataAugmentationDINO((0.4, 1), (0.1, 0.4), 0, global_crops_size=32, augmentation=kind)
    for i in range(len(images)):
        try:
            augment(images.open(i))
        except BadImage:
            bad.append(images.name(i))
    assert len(images) == 22 * len(KINDS) == 330
    found = [Path(path).name.split("-")[0] for path in bad]
    assert [found.count(name) for name in ("whole", "tail", "renamed")] == [0] * 3
    assert [found.count(name) for name in ("empty", "zeros", "text", "cut1")] == [len(KINDS)] * 4
    flags = ("--batch_size_per_gpu", 11, "--max_bad_images", 1, "--epochs", 1, "--warmup_epochs", 0)
    student_of(root, tmp_path / "run", *flags, "--num_workers", 2, "--augmentation", kind)
    assert bad_names(tmp_path / "run") == sorted(bad)
    assert log_without_times(tmp_path / "run")[0]["bad_images"] == len(bad)
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["args"]["augmentation"] == kind


# ---- shortages ----

KILLED = "a loader process was killed. Most likely the machine ran out of memory"


def assert_hint(code, said, hint):
    """The process ended with a traceback, then this hint."""
    assert code == 1
    assert "Traceback" in said
    assert said.count("hint: ") == 1
    assert said.strip().splitlines()[-1].startswith(f"hint: {hint}")


def test_a_loader_that_is_killed_ends_the_run_with_a_hint(tiny_root, tmp_path):
    flags = [*SMALL_RUN, "--num_workers", 2, "--epochs", 500, "--data_path", tiny_root / "train"]
    run = Run(*flags, "--output_dir", tmp_path / "run")
    run.wait_for("Epoch: [1/")
    pid = run.processes[0].pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    (code,), (said,) = run.end()
    assert_hint(code, said, KILLED)
    assert (tmp_path / "run" / "checkpoint.pth").exists()


def test_too_little_shared_memory_ends_the_run_with_a_hint(tiny_root, tmp_path):
    words = [*SMALL_RUN, "--num_workers", 1, "--data_path", tiny_root / "train", "--output_dir", tmp_path]
    train = shlex.join([sys.executable, str(ROOT / "main_dino.py"), *map(str, words)])
    unshare = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=100k tmpfs /dev/shm && exec {train}"]
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("only root can make /dev/shm small")
    done = subprocess.run(unshare, capture_output=True, text=True, timeout=120)
    assert_hint(done.returncode, done.stderr, "/dev/shm, through which loaders pass images, is too small.")


def pass_a_file(pipe):
    pipe.send(DupFd(0))  # as loaders pass their batches
    signal.pause()


def test_a_loader_that_is_killed_while_it_passes_a_batch_has_the_same_hint():
    ours, theirs = multiprocessing.Pipe()
    loader = multiprocessing.get_context("fork").Process(target=pass_a_file, args=(theirs,), daemon=True)
    loader.start()
    batch = ours.recv()
    loader.kill()
    loader.join()
    with pytest.raises(OSError) as raised:
        batch.detach()
    assert dino_cli.find_hint(raised.value).startswith(KILLED)


def test_too_many_open_files_while_reading_images_end_a_run_instead_of_counting_as_bad_images(tmp_path, monkeypatch):
    def no_more(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    draw(tmp_path / "x.png")
    monkeypatch.setattr(dino_images, "open", no_more, raising=False)
    with pytest.raises(UserError, match=r"too many open files, at .*x\.png. Raise `ulimit -n`") as raised:
        dino_images.open_image(tmp_path / "x.png")
    assert not isinstance(raised.value, BadImage)
