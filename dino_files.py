"""Numbered images of class folders, of a flat folder, of a list of paths, or of a torchvision data set."""

import contextlib
import copy
import csv
import hashlib
import inspect
import io
import json
import math
import mmap
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

import dino_images
import utils
from dino_images import EXTENSIONS, bad_image, extensions_of, is_image, one_line
from utils import UserError

# ---- where images come from ----

LISTS = (".csv", ".tsv", ".txt")
FORMATS = ("auto", "folder", "flat", "list", "torchvision")


class ImageFiles:
    """Images by index: `open(i)` is a PIL image that is not decoded yet, `name(i)` its path.

    `targets` [N] are indices into `classes`, the names of the classes, or None where there are no labels.
    """

    sharded = False

    def __init__(self, paths, targets=None, classes=(), exif=False):
        self.paths, self.classes, self.exif = paths, list(classes), exif
        self.targets = None if targets is None else torch.as_tensor(targets, dtype=torch.long)

    def __len__(self):
        return len(self.paths)

    def name(self, i):
        return self.paths[i]

    def names(self):
        return self.paths

    def open(self, i):
        return dino_images.open_image(self.paths[i], self.exif)

    def order(self, seed, epoch, first=0):
        return random_order(len(self), seed, epoch, first)

    def take(self, numbers):
        """These alone, of the same classes."""
        targets = None if self.targets is None else self.targets[numbers]
        return ImageFiles([self.paths[i] for i in numbers], targets, self.classes, self.exif)


class TorchvisionImages:
    """A torchvision data set, or a part of it, with the methods of ImageFiles."""

    sharded = False

    def __init__(self, dataset, source, has_parts=True):
        self.dataset, self.source, self.numbers, self.has_parts = dataset, source, range(len(dataset)), has_parts
        found = (getattr(dataset, name, None) for name in ("targets", "labels", "_labels"))
        pairs = getattr(dataset, "_samples", None) or [()]
        targets = next((t for t in found if t is not None), [i for _, i in pairs] if len(pairs[0]) == 2 else None)
        if targets is not None and len(targets) and min(targets) < 0:  # STL10's unlabeled images
            targets = None
        self.targets = None if targets is None else torch.as_tensor(targets, dtype=torch.long)
        named = getattr(dataset, "classes", None) or (range(int(self.targets.max()) + 1) if targets is not None else ())
        self.classes = [str(name) for name in named]

    def __len__(self):
        return len(self.numbers)

    def name(self, i):
        return f"{self.source}, image {self.numbers[i]}"

    def names(self):
        return map(self.name, range(len(self)))

    def open(self, i):
        try:
            return self.dataset[self.numbers[i]][0]
        except Exception as e:  # by data set
            raise bad_image(self.name(i), one_line(e)) from e

    def order(self, seed, epoch, first=0):
        return random_order(len(self), seed, epoch, first)

    def take(self, numbers):
        part = copy.copy(self)
        part.numbers = [self.numbers[i] for i in numbers]
        part.targets = None if self.targets is None else self.targets[numbers]
        return part


class DecodedImages:
    """Images of one small size, decoded once for all loader processes: `open(i)` is an image's pixels, uint8 [H, W, 3].

    Images of another size are opened as always. The processes are forked, so that anonymous memory is theirs in common.
    It is not counted as /dev/shm, which is 64 MB in many containers.
    """

    def __init__(self, images, size):
        self.images, self.size, shape = images, size, (len(images), *size[::-1], 3)
        self.pixels = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
        self.are_known = np.frombuffer(mmap.mmap(-1, len(images)), np.bool_)

    def open(self, i):
        if not self.are_known[i]:
            image = self.images.open(i)
            if getattr(image, "size", None) != self.size:  # arrays in files have none
                return image
            self.pixels[i], self.are_known[i] = dino_images.to_rgb(image), True
        return self.pixels[i]


SMALL_SIDE, SMALL_SET = 64, 2 * 2**30  # pixels and bytes, up to which images stay decoded in memory


def keep_small_decoded(images):
    """DecodedImages if the first photograph is small and a set of its size fits in memory; else None.

    Opening and decoding a small image takes longer than two crops of it.
    """
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if method != "fork":
        return None
    try:
        size = getattr(images.open(0), "size", (math.inf, 1))  # arrays in files have none
        small = max(size) <= SMALL_SIDE and 3 * math.prod(size) * len(images) <= SMALL_SET
        return DecodedImages(images, size) if small else None
    except (dino_images.BadImage, OSError):  # OSError: no memory for the pixels
        return None


def digest_of_names(images):
    """A digest that identifies a set of numbered images by their order and the last two parts of their names."""
    digest = hashlib.blake2b(digest_size=6)
    for name in images.names():
        digest.update("/".join(name.split("/")[-2:]).encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def recheck_bad_images(health, images, inputs=utils.RGB):
    """{name: reason} of the unreadable images that a checkpoint remembers and that can't be read now, either."""
    before = health.get("bad_images") if isinstance(health, dict) else None
    found = {}
    for i in range(len(images)) if before and isinstance(before, dict) else ():
        name = images.name(i)
        if name in before:
            try:
                dino_images.decode(images.open(i), inputs)
            except dino_images.BadImage as e:
                found[name] = e.reason
    return found


def random_order(number, seed, epoch, first=0):
    """The indices of `number` images in the order of an epoch, a function of (seed, epoch), from position `first`."""
    generator = torch.Generator().manual_seed(utils.derive_seed(seed, utils.ORDER, epoch))
    return iter(torch.randperm(number, generator=generator)[first:].tolist())


# What the parts of a data set are called, the first choice first.
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}


def find_images(data_path, part="", data_format="auto", exif=False, flag="--data_path", in_chans=3, columns=()):
    """The images of class folders, of a flat folder, of a list of paths, or of a torchvision data set.

    `part` (train or val) selects from the last. `exif` rotates by the EXIF orientation. .npy files in folders are
    images if `in_chans` is not 3. `columns` are the names of a table's columns with paths and labels. Raises UserError
    if there are no images.
    """
    data_path = os.fspath(data_path)
    kind = guess_format(data_path) if data_format == "auto" else data_format
    if kind == "torchvision":
        return torchvision_images(data_path, part, flag)
    if kind == "list":
        return listed_images(data_path, exif, flag, columns)
    if not os.path.isdir(data_path):
        what = "is not a folder" if os.path.exists(data_path) else "does not exist"
        others = "a list of paths (.txt, .csv, .tsv), shards ('{0000..0999}.tar', not gzipped), torchvision:NAME"
        raise UserError(f"{flag} {data_path} {what}. Name a folder of images, {others}, or `sample`")
    return folder_images(data_path, kind if data_format != "auto" else None, exif, flag, extensions_of(in_chans))


def guess_format(data_path):
    if data_path.startswith("torchvision:"):
        return "torchvision"
    return "list" if Path(data_path).suffix.lower() in LISTS else "folder"


# ---- folders ----


def folder_images(root, kind, exif, flag, extensions=EXTENSIONS):
    """Images below a folder, in the order of torchvision's ImageFolder.

    Each of its folders is a class (`kind` folder), or none is (flat). Default: flat if it has images directly in it.
    """
    names, folders = cached_index(root, extensions)
    if not names and extensions == EXTENSIONS:
        names, folders = cached_index(root, WITH_ARRAYS)  # a folder of arrays alone
    directly = any("/" not in name for name in names)
    if kind == "flat" or (kind is None and directly):
        images = ImageFiles([os.path.join(root, name) for name in names], exif=exif)
    else:
        inside = [name for name in names if "/" in name]
        classes = sorted({folder.partition("/")[0] for folder in folders} - {""})
        number = {name: i for i, name in enumerate(classes)}
        targets = [number[name.partition("/")[0]] for name in inside]
        images = ImageFiles([os.path.join(root, name) for name in inside], targets, classes, exif)
    if names and not len(images):
        raise UserError(
            f"{flag} {root} has images but no class folders. Sort them into one folder per class, or write a list of "
            f"their paths and labels, such as {root}.csv"
        )
    if not len(images):
        raise UserError(f"{flag} {root} has no images ({', '.join(extensions)}){empty_folder_hint(root)}")
    return images


def empty_folder_hint(root):
    """What to do with a folder without images, as the end of a message."""
    names = [name for _, _, files in os.walk(root) for name in files]
    hints = {
        ".tar": ", but tar shards in its folders. Name one of the folders, such as train",
        ".gz": ", but compressed files. Unpack .tar.gz to tar shards with gunzip",
        ".tgz": ", but compressed files. Unpack .tgz to tar shards with gunzip",
    }
    return next((hint for end, hint in hints.items() if any(name.lower().endswith(end) for name in names)), "")


def cached_index(root, extensions=EXTENSIONS):
    """(images, folders) below `root`, by their names in it. Cached as long as no folder has changed: on network file
    systems, listing a million files takes minutes.
    """
    root = os.path.abspath(root)
    key = "\0".join((root, *extensions[len(EXTENSIONS) :]))
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=12).hexdigest()
    path = Path(utils.cache_dir()) / f"index-{digest}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        kept = json.loads(path.read_bytes())
        images, folders = kept["images"], kept["folders"]
        whole = kept["root"] == root and "" in folders and all(os.path.dirname(name) in folders for name in images)
        if whole and all(changes(os.path.join(root, folder)) == then for folder, then in folders.items()):
            return images, list(folders)
    images, folders = index(root, extensions)
    now = time.time_ns()
    if len(images) >= WORTH_CACHING and all(now - then[0] > 5e9 for then in folders.values()):  # not being written
        text = json.dumps({"root": root, "folders": folders, "images": images})
        with contextlib.suppress(OSError, UnicodeEncodeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            utils.write_whole(path, lambda file: file.write(text.encode()))
    return images, list(folders)


WORTH_CACHING = 10_000  # images


def changes(folder):
    """Times of the last change of its content, and of anything about it, which can't be set back."""
    state = os.stat(folder)
    return [state.st_mtime_ns, state.st_ctime_ns]


def index(root, extensions=EXTENSIONS):
    """(names of all images below `root`, {folder: when it changed}), without hidden ones; links are followed."""
    found, folders, inside = [], {}, {}

    def failed(error):
        raise UserError(f"can't list {error.filename}: {error.strerror}") from error

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=failed):
        state = os.stat(folder)
        here = os.path.relpath(folder, root)
        inside[folder] = inside.get(os.path.dirname(folder), frozenset()) | {(state.st_dev, state.st_ino)}
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and not leads_back(folder, s, inside[folder])]
        folders["" if here == "." else here] = [state.st_mtime_ns, state.st_ctime_ns]
        prefix = "" if here == "." else f"{here}/"
        found.append(
            (
                here.partition("/")[0],
                here,
                [prefix + name for name in sorted(files) if is_image(name, extensions)],
            )
        )
    return [name for _, _, names in sorted(found) for name in names], folders


def leads_back(folder, name, above):
    """Whether a folder is a link to one that contains it."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    state = os.stat(path)
    return (state.st_dev, state.st_ino) in above


# ---- lists ----


def listed_images(path, exif, flag, columns=()):
    """Images of a text file with one path per line, or of a table (.csv, .tsv) with paths and, optionally, labels.

    In text files, a label can follow after a tab or the last space. Paths are relative to the list. `columns` names a
    table's column of paths, and that of labels if there are any. Raises UserError if the files are not there.
    """
    rows = read_list(path, flag, columns)
    root = os.path.dirname(os.path.abspath(path))
    files = [os.path.join(root, row[0]) for row in rows]
    if not any(os.path.isfile(file) for file in files[:3]):
        raise UserError(f"{flag} {path}: there is no {files[0]}. Paths in a list are relative to its folder")
    labels = [row[1] for row in rows if len(row) > 1 and row[1]]
    return ImageFiles(files, *number_labels(labels, len(rows), f"{flag} {path}"), exif)


def number_labels(labels, num_images, source):
    """(class indices [N] or None, names of the classes) for labels that are text, numbers first, each sorted.

    Raises UserError if some are missing.
    """
    if labels and len(labels) < num_images:
        raise UserError(f"{source} has labels for {len(labels)} of {num_images} images. Label all of them, or none")
    classes = sorted(set(labels), key=lambda label: (len(label), label) if label.isdecimal() else (math.inf, label))
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[label] for label in labels]) if labels else None, classes


def read_list(path, flag, columns=()):
    """[[path], ...] or [[path, label], ...] of a list of images. A header, which names no file, is not among them."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for a writer
        raise UserError(f"{flag} {path} is neither a file nor a folder. Name a list of images")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"can't read {flag} {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"can't read {flag} {path}: it is not UTF-8 text (byte {e.start})") from e
    root, suffix = os.path.dirname(os.path.abspath(path)), Path(path).suffix.lower()
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        if suffix == ".txt":
            rows = split_lines([line.strip() for line in lines], root)
        else:
            table = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",")
            rows = [[cell.strip() for cell in row] for row in table]
    except csv.Error as e:
        raise UserError(f"can't read {flag} {path}: {e}") from e
    if rows and not any(is_image(os.path.basename(c), WITH_ARRAYS) or is_file(root, c) for c in rows[0]):
        header, *rows = rows
        if suffix != ".txt":
            chosen = choose_columns(header, columns, f"{flag} {path}")
            rows = [[row[i] for i in chosen if i < len(row)] for row in rows]
    elif columns:
        raise UserError(f"{flag} {path} has no header with the columns --list_columns {' '.join(columns)}. Remove it")
    rows = [row[:2] for row in rows]
    if not rows or not all(row and row[0] for row in rows):
        raise UserError(f"{flag} {path} has no paths of images, or a line without one. Write one path per line")
    return rows


WITH_ARRAYS = (*EXTENSIONS, ".npy")
PATH_COLUMNS = ("path", "image", "file", "filename", "image_path", "file_name", "filepath", "img", "img_path")
PATH_COLUMNS += ("image_name", "image_id", "name")
LABEL_COLUMNS = ("label", "class", "target", "category", "class_name", "label_name", "labels", "class_id")


def is_file(root, name):
    return os.path.isfile(os.path.join(root, name)) if name and "\0" not in name else False


def choose_columns(header, columns, source):
    """Indices of the columns with paths and labels in a table with this header. Raises UserError if that is not clear.

    `columns` names them; otherwise they are known by the usual names or, of two columns, by their order.
    """
    names = [name.lower() for name in header]
    if columns:
        missing = [name for name in columns if name not in header]
        if missing:
            near = utils.did_you_mean(missing[0], header)
            raise UserError(f"--list_columns: {source} has no column {missing[0]!r}{near} ({', '.join(header)})")
        chosen = [header.index(name) for name in columns]
    else:
        known = [[names.index(word) for word in words if word in names][:1] for words in (PATH_COLUMNS, LABEL_COLUMNS)]
        if len(header) <= 2:
            path = (known[0] or [i for i in range(len(header)) if [i] != known[1]])[0]
            chosen = [path, *(i for i in range(len(header)) if i != path)]
        elif known[0]:
            chosen = known[0] + known[1]
        else:
            raise UserError(
                f"{source}: which of its columns are paths and labels ({', '.join(header)})? Name them with "
                "--list_columns PATH LABEL"
            )
    if len(header) > 2:
        unlabeled = ", no labels (--list_columns PATH LABEL would name them)"
        labels = f", labels from {header[chosen[1]]!r}" if len(chosen) > 1 else unlabeled
        utils.log(f"{source}: paths from the column {header[chosen[0]]!r}{labels}")
    return chosen


def split_lines(lines, root):
    if any("\t" in line for line in lines):
        return [line.split("\t")[:2] for line in lines]
    parts = lines[0].rsplit(None, 1) if lines else []
    labeled = len(parts) == 2 and is_image(parts[0], WITH_ARRAYS) and not os.path.exists(os.path.join(root, lines[0]))
    return [line.rsplit(None, 1) if labeled else [line] for line in lines]


# ---- torchvision's data sets ----


def torchvision_images(data_path, part, flag):
    """A data set such as torchvision:CIFAR10: training images, or test images for `val`. Downloaded if needed.

    torchvision:NAME:SPLIT has one split of those that have several, such as torchvision:STL10:unlabeled.
    """
    _, name, *split = data_path.split(":", 2)
    known = {n: getattr(datasets, n) for n in datasets.__all__ if isinstance(getattr(datasets, n), type)}
    known = {
        n: kind for n, kind in known.items() if not n.startswith("LSUN")
    }  # it unpickles files of the working folder
    if name not in known:
        raise UserError(f"{flag} {data_path}: torchvision has no data set {name!r}{utils.did_you_mean(name, known)}")
    root = os.path.join(utils.cache_dir(), "torchvision")
    wants = arguments_of(known[name])
    options = {"train": part != "val"} if "train" in wants else {}
    if "root" in wants:
        options["root"] = root
    splits = [{"split": word} for word in split or SPLITS[part == "val"]]
    splits = splits if split or ("split" in wants and "train" not in wants) else [{}]
    try:
        os.makedirs(root, exist_ok=True)
        lock, _ = utils.lock_file(os.path.join(root, ".lock"), patience=3600)  # one process downloads
        with lock, contextlib.redirect_stdout(io.StringIO()):
            dataset = open_first(known[name], [{**options, **choice} for choice in splits], "download" in wants)
    except Exception as e:  # depends on the data set: no network, no such split, files that are not free to download
        other = f", or name a split: torchvision:{name}:SPLIT" if "split" in wants and not split else ""
        raise UserError(f"{flag} {data_path} is not available: {one_line(e)}. Its files belong in {root}{other}") from e
    if not len(dataset) or not isinstance(dataset[0][0], Image.Image):
        raise UserError(f"{flag} {data_path} is not a data set of images")
    return TorchvisionImages(dataset, data_path, has_parts="train" in wants or (len(splits) > 1))


SPLITS = (("train", "trainval", "train-standard"), ("test", "val", "valid"))  # of training and of evaluation


def arguments_of(kind):
    """Names of the arguments of a class, with those that it passes on to the classes that it is made from."""
    names = {}
    for each in kind.__mro__:
        own = inspect.signature(each.__init__).parameters
        names |= own
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
            break
    return names


def open_first(kind, choices, can_download):
    """A torchvision data set with the first of `choices`, its possible arguments, that it knows."""
    for i, options in enumerate(choices):
        try:
            try:
                return kind(**options)
            except RuntimeError:  # not there yet
                if not can_download:
                    raise
                return kind(**options, download=True)
        except ValueError as e:
            if "Unknown value" not in str(e) or i == len(choices) - 1:
                raise
