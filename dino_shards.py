"""Images in tar shards, by WebDataset's convention: thousands of large files instead of millions of small ones.

In a shard, `key.jpg` (or .png, .webp, ...) is an image and `key.cls` its label, if there is one. Shards stay packed: an
index of each, made once and cached, has the position of each image. Only the numbers of images and the indexes of the
few shards that are being read are in memory.
"""

import contextlib
import copy
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import tarfile
import uuid
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import dino_files
import dino_images
import utils
from utils import UserError

# Images in a row whose order is random: a dozen shards of ImageNet.
WINDOW = 16_384

# ---- which files ----

MOST_SHARDS = 1_000_000


def are_shards(data_path):
    """Whether a path means tar files: a pattern, a file, or a folder with some and without images in or below it."""
    if not os.path.isdir(data_path):
        return data_path.endswith(".tar")
    found = False
    with contextlib.suppress(OSError), os.scandir(data_path) as entries:
        for entry in entries:
            if dino_images.is_image(entry.name):  # the first of a million is enough
                return False
            found = found or is_shard(entry.name)
    return found and not any(dino_images.is_image(name) for _, _, files in os.walk(data_path) for name in files)


def is_shard(name):
    return name.endswith(".tar") and not name.startswith(".")


def shard_files(pattern, flag):
    """Paths of the shards in a folder, or that match `shards/{0000..0999}.tar` or `shards/*.tar`. Raises UserError."""
    from braceexpand import UnbalancedBracesError, braceexpand  # what WebDataset uses

    if os.path.isdir(pattern):
        paths = [os.path.join(pattern, name) for name in sorted(os.listdir(pattern)) if is_shard(name)]
    else:
        if re.match(r"(\w+://|pipe:)", pattern):
            raise UserError(f"{flag} {pattern}: only shards in a file system can be read. Mount or copy them")
        ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", pattern)
        if math.prod(abs(int(b) - int(a)) + 1 for a, b in ranges) > MOST_SHARDS:  # before they are all made
            raise UserError(f"{flag} {pattern} names more than {MOST_SHARDS} shards. Make fewer, larger ones")
        try:
            each = [pattern] if os.path.exists(pattern) else braceexpand(pattern)
            each = list(itertools.islice(each, MOST_SHARDS + 1))
        except (UnbalancedBracesError, ValueError, MemoryError, RecursionError) as e:
            raise UserError(f"{flag} {pattern} is not a pattern of shards such as {{0000..0999}}.tar ({e})") from e
        paths = [path for name in each for path in expand_glob(name)]
    missing = [path for path in paths[:MOST_SHARDS] if not os.path.isfile(path)]
    if not paths or missing:
        what = f"; {len(missing)} of {len(paths)} are missing: {utils.summarize(missing)}" if missing else ""
        raise UserError(f"{flag} {pattern}: there are no such shards{what}. Name existing ones: {{0000..0999}}.tar")
    if len(paths) > MOST_SHARDS or len(set(paths)) < len(paths):
        raise UserError(f"{flag} {pattern} names a shard twice, or more than {MOST_SHARDS} shards. Name each once")
    return paths


def expand_glob(name):
    """Paths that a name stands for: itself, or what its `*`, `?` and `[...]` match, sorted."""
    if os.path.exists(name) or not glob.has_magic(name):
        return [name]
    folder, last = os.path.split(name)
    return sorted(glob.glob(name) or glob.glob(os.path.join(glob.escape(folder), last)))


def shards_of_word(folder, part):
    """A pattern for the shards of a folder whose names contain the word `part`, such as train; None if none does."""
    word, no_letter = f"[{part[0]}{part[0].upper()}]{part[1:]}", "[!a-zA-Z]"
    names = (word, f"{word}{no_letter}*", f"*{no_letter}{word}", f"*{no_letter}{word}{no_letter}*")
    found = [name for name in names if expand_glob(os.path.join(glob.escape(folder), f"{name}.tar"))]
    either = f"{{{','.join(found)}}}" if len(found) > 1 else "".join(found)
    return os.path.join(glob.escape(folder), f"{either}.tar") if found else None


# ---- contents of a shard ----


class Member(NamedTuple):
    """An image in a shard: `size` bytes from `start`; its label as text, or None."""

    name: str
    start: int
    size: int
    label: str | None


def list_members(path, extensions=dino_images.EXTENSIONS):
    """The images in a shard as Members, in their order. Raises UserError if it is damaged or not made for training."""
    found, labels, dotted = [], {}, {}
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise UserError(f"the shard {path} is compressed. Unpack it with gunzip")
        with tarfile.open(path, "r:") as tar:
            size = os.path.getsize(path)
            while (member := tar.next()) is not None:
                check_member(member, path, size)
                if not member.isreg() or os.path.basename(member.name).startswith("."):  # ._a.jpg is not an image
                    continue
                key, extension = split_name(member.name)
                if f".{extension}" in extensions:
                    found.append((key, member))
                elif extension == "cls":
                    labels[key] = read_label(tar, member, path)
                elif extension.endswith(extensions):
                    dotted.setdefault(key, member.name)
            check_end(tar, path)
            check_keys(found, dotted, path)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"can't read the shard {path}: {e.strerror or dino_images.one_line(e)}") from e
    except Exception as e:  # tarfile raises almost anything on damaged headers
        raise UserError(
            f"the shard {path} is not a tar file, or damaged: {dino_images.one_line(e)}. Copy it again"
        ) from e
    return [Member(member.name, member.offset_data, member.size, labels.get(key)) for key, member in found]


def split_name(name):
    """(key, extension) of a file in a shard as WebDataset splits its name: at the first dot of its last part."""
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    return (key, extension.lower()) if key else (name, "")


def check_member(member, path, size):
    """Raise UserError for members that no training shard has. (Nothing is ever unpacked.)"""
    where = f"the shard {path} contains {utils.printable(member.name[:200])}"
    if len(member.name) > 1000:
        raise UserError(f"{where}, a name of {len(member.name)} characters. Write it again with names of up to 1000")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(f"{where}, a path outside of its folder. Write it again with names below one folder")
    if not (member.isreg() or member.isdir()):
        raise UserError(f"{where}, a link or a device instead of a file. Write it again with tar --dereference")
    if member.issparse():
        raise UserError(f"{where}, a sparse file. Write it again without tar --sparse")
    if not 0 <= member.offset_data <= member.offset_data + member.size <= size:
        raise UserError(f"the shard {path} ends within {utils.printable(member.name)}. Copy it again")


def read_label(tar, member, path):
    content = tar.extractfile(member).read(1000)
    try:
        label = content.decode().strip()
    except UnicodeDecodeError:
        label = ""
    if not label or member.size > 1000:
        raise UserError(
            f"the shard {path} has no label in {utils.printable(member.name)}. Write a number or a name there"
        )
    return label


def check_end(tar, path):
    """Raise UserError unless reading ended at the end mark: tarfile silently takes damage for the end, too."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block != tarfile.NUL * tarfile.BLOCKSIZE:
        what = "is damaged at" if block else "ends without an end mark at"
        raise UserError(f"the shard {path} {what} byte {tar.offset}. Copy or write it again")
    while block := tar.fileobj.read(2**20):
        if block.strip(tarfile.NUL):
            raise UserError(
                f"the shard {path} has data after its end mark: is it several shards in one? Keep them apart"
            )


def check_keys(found, dotted, path):
    """Raise UserError for images that WebDataset's convention takes for parts of others, which are not there."""
    lost = sorted(dotted.keys() - {key for key, _ in found})
    if lost:
        raise UserError(
            f"the shard {path} contains {utils.printable(dotted[lost[0]])}: names of images have one dot, key.jpg. "
            f"Rename it, and {len(lost) - 1} more"
        )


# ---- indexes ----


def state_of(path):
    """Size and times of a shard, which change with it."""
    state = os.stat(path)
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def table_path(path, state, extensions):
    """Where the index of a shard in this state is cached. A file of another machine at the same path has another."""
    named = f"{os.path.abspath(path)}\0{state}\0{'.npy' in extensions}"
    digest = hashlib.blake2b(named.encode(errors="surrogateescape"), digest_size=12).hexdigest()
    return Path(utils.cache_dir()) / "shards" / f"{digest}.npy"


def read_head(path, state, extensions):
    """(number of images, digest of their names) from a shard's cached index; None if there is none for its state."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        table = table_path(path, state, extensions)
        head = json.loads(table.with_suffix(".json").read_bytes())
        if head["state"] == state and table.is_file():
            return int(head["images"]), str(head["digest"])
    return None


def make_table(path, state, extensions):
    """Write a shard's index: one row per image; then its header, which makes it valid."""
    table = as_table(list_members(path, extensions))
    images, digest = index_header(table)
    head = json.dumps({"path": os.path.abspath(path), "state": state, "images": images, "digest": digest})
    target = table_path(path, state, extensions)
    arriving = target.with_name(f".{uuid.uuid4().hex}")  # another process may do the same where files can't be locked
    with open(arriving, "wb") as file:
        np.save(file, table, allow_pickle=False)
    os.replace(arriving, target)
    arriving.write_text(head)
    os.replace(arriving, target.with_suffix(".json"))


def index_header(table):
    """(number of images, digest of their names)."""
    return len(table), hashlib.blake2b(b"\n".join(table["name"].tolist()), digest_size=6).hexdigest()


def as_table(members):
    """Members as an array of rows of one width; no label is an empty one."""
    rows = [(m.name.encode(errors="surrogateescape"), m.start, m.size, (m.label or "").encode()) for m in members]
    names, labels = (max([1, *(len(row[i]) for row in rows)]) for i in (0, 3))
    return np.array(rows, [("name", f"S{names}"), ("start", "<i8"), ("size", "<i8"), ("label", f"S{labels}")])


@functools.lru_cache(maxsize=1024)
def load_index(path, state, extensions):
    """The index of a shard that is still in this state, memory-mapped. Raises BadImage if the shard has changed."""
    now = dino_images.with_retries(lambda: state_of(path), path, path)
    if now[:2] != list(state)[:2]:  # a new owner, name or mode does not matter
        raise dino_images.bad_image(f"in {path}", "the shard has changed since the start of the run")
    head = read_head(path, list(state), extensions)
    with contextlib.suppress(OSError, ValueError, EOFError):
        table = np.load(table_path(path, list(state), extensions), mmap_mode="r", allow_pickle=False)
        if head and table.shape == head[:1] and table.dtype.names == ("name", "start", "size", "label"):
            return table
    return as_table(list_members(path, extensions))  # the cached index is gone


def shard_index(paths, extensions):
    """[(number of images, digest of their names)] of shards. One process per machine indexes new ones."""
    shards = [(path, state_of(path), extensions) for path in paths]
    if None in (read_head(*shard) for shard in shards):
        folder = Path(utils.cache_dir()) / "shards"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock, _ = utils.lock_file(folder / ".lock", patience=3600)
            with lock:
                new = [shard for shard in shards if read_head(*shard) is None]
                if len(new) > 10:
                    utils.say(f"indexing {len(new)} shards; the indexes are cached in {folder}")
                for shard in new:
                    make_table(*shard)
        except OSError as e:
            utils.log(
                f"warning: indexes of shards can't be cached in {folder} ({e.strerror}) and are made at each start. "
                "Set DINO_CACHE to a folder that you can write to"
            )
    return [read_head(*shard) or index_header(load_index(shard[0], tuple(shard[1]), extensions)) for shard in shards]


# ---- images ----


def class_of(label, name):
    """The class of an image: its label, else the WordNet number in its name; else it is unknown."""
    found = re.match(rb"(?:.*/)?(n\d{8})[_/]", name)
    return label or (found[1] if found else name)


class TarShards:
    """Images in shards, with the methods of dino_files.ImageFiles: numbered shard by shard, sorted by name."""

    sharded = True

    def __init__(self, pattern, exif=False, flag="--data_path", extensions=dino_images.EXTENSIONS):
        self.extensions = extensions
        self.paths, self.exif, self.flag, self.pattern = shard_files(pattern, flag), exif, flag, pattern
        self.states = [tuple(state_of(path)) for path in self.paths]
        counts, self.digests = zip(*shard_index(self.paths, extensions), strict=True)
        self.starts = np.cumsum([0, *counts])  # number of each shard's first image, and of all
        self.numbers = range(int(self.starts[-1]))
        if not len(self.numbers):
            raise UserError(
                f"{flag} {pattern}: there are no images in these {len(self.paths)} shards. Images must be named "
                "key.jpg (key.png, ...), with no dot in the key"
            )

    def __len__(self):
        return len(self.numbers)

    def find(self, i):
        """(path of the shard, name in it, first byte, number of bytes) of image i."""
        number = int(self.numbers[i])
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        row = load_index(self.paths[shard], self.states[shard], self.extensions)[number - int(self.starts[shard])]
        return self.paths[shard], row["name"].decode(errors="surrogateescape"), int(row["start"]), int(row["size"])

    def name(self, i):
        try:
            return "/".join(self.find(i)[:2])
        except (UserError, OSError):  # the shard is gone or has changed
            return f"{self.pattern}, image {self.numbers[i]}"

    def names(self):
        """What identifies this set: the shards, each with a digest of the names in it."""
        return [f"{path}/{digest}" for path, digest in zip(self.paths, self.digests, strict=True)]

    def open(self, i):
        try:
            path, name, start, size = self.find(i)
        except OSError as e:
            raise dino_images.bad_image(self.name(i), e.strerror) from e
        content = dino_images.read_file(path, start, size, f"{path}/{name}")
        return dino_images.open_content(content, f"{path}/{name}", self.exif)

    def order(self, seed, epoch, first=0):
        """The indices of the images in the order of an epoch, a function of (seed, epoch), from position `first`.

        Shards follow each other in random order, and images are shuffled within windows of WINDOW of them. Only one
        window is in memory, and nothing before `first` is looked at. If shards have one class each, a window would have
        few classes: all images are shuffled.
        """
        if self.are_sorted:
            yield from dino_files.random_order(len(self), seed, epoch, first)
            return
        generator = torch.Generator().manual_seed(utils.derive_seed(seed, utils.ORDER, epoch))
        shards = torch.randperm(len(self.paths), generator=generator).numpy()
        ends = np.diff(self.starts)[shards].cumsum()  # of each shard among the positions of the epoch
        for start in range(first // WINDOW * WINDOW, len(self), WINDOW):
            generator.manual_seed(utils.derive_seed(seed, utils.ORDER, epoch, start))
            window = torch.randperm(min(WINDOW, len(self) - start), generator=generator).numpy()
            positions = start + window[max(first - start, 0) :]
            which = np.searchsorted(ends, positions, side="right")
            yield from (self.starts[shards[which] + 1] - ends[which] + positions).tolist()

    @functools.cached_property
    def labels(self):
        """(class number of each image [N] or None, names of the classes)."""
        shards = zip(self.paths, self.states, strict=True)
        tables = [load_index(*shard, self.extensions)["label"] for shard in shards]
        found = [label.decode() for label in np.concatenate(tables)[np.asarray(self.numbers)].tolist()]
        return dino_files.number_labels([label for label in found if label], len(found), self.pattern)

    @property
    def targets(self):
        return self.labels[0]

    @property
    def classes(self):
        return self.labels[1]

    @functools.cached_property
    def are_sorted(self):
        """Whether shards contain one or two classes each, of more: by labels or else names, in about twenty of them.

        Without labels, names as in ImageNet's own tar files tell: n01440764_18.JPEG.
        """
        some = range(0, len(self.paths), max(len(self.paths) // 20, 1))
        tables = [load_index(self.paths[k], self.states[k], self.extensions) for k in some]
        found = [Counter(map(class_of, table["label"].tolist(), table["name"].tolist())) for table in tables]
        found = [classes for classes in found if classes.total() >= 10]
        each = statistics.median(map(len, found)) if found else 0
        commonest = {classes.most_common(1)[0][0] for classes in found}  # one, if other classes are rare
        return 0 < each <= 2 <= len(commonest) and len(set().union(*found)) >= 2 * each

    def take(self, numbers):
        """A subset, with the same classes."""
        part = copy.copy(self)
        part.numbers = np.asarray(self.numbers)[numbers]
        targets, classes = self.labels
        part.labels = (None if targets is None else targets[numbers], classes)
        return part
