"""Images in tar shards, by WebDataset's convention: some thousand large files in place of millions of small ones.

In a shard, `key.jpg` (or .png, .webp ...) is an image, and `key.cls` beside it, where there is one, its label. Shards
stay packed: a table of contents, made once and kept in the cache, says where in its shard an image lies. In memory are
the numbers of images, and the contents of the few shards that are being read.
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
from torch.utils.data import Sampler

import dino_images
import utils
from utils import UserError

# ---- which files ----

MOST_SHARDS = 1_000_000


def are_shards(data_path):
    """Whether a path means tar files: a pattern of them, one, or a folder with some and no images, also not below."""
    if not os.path.isdir(data_path):
        return data_path.endswith(".tar")
    found = False
    with contextlib.suppress(OSError), os.scandir(data_path) as entries:
        for entry in entries:
            if dino_images.is_image(entry.name):  # of a million the first one will do
                return False
            found = found or is_shard(entry.name)
    return found and not any(dino_images.is_image(name) for _, _, files in os.walk(data_path) for name in files)


def is_shard(name):
    return name.endswith(".tar") and not name.startswith(".")


def shard_files(pattern, flag):
    """Paths of the shards that a folder has, or that `shards/{0000..0999}.tar` or `shards/*.tar` stands for."""
    from braceexpand import UnbalancedBracesError, braceexpand  # WebDataset's own

    if os.path.isdir(pattern):
        paths = [os.path.join(pattern, name) for name in sorted(os.listdir(pattern)) if is_shard(name)]
    else:
        if re.match(r"(\w+://|pipe:)", pattern):
            raise UserError(f"{flag} {pattern}: shards are read from file systems. Mount or copy them")
        ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", pattern)
        if math.prod(abs(int(b) - int(a)) + 1 for a, b in ranges) > MOST_SHARDS:  # which would be made, all of them
            raise UserError(f"{flag} {pattern} names more than {MOST_SHARDS} shards. Make them larger, and fewer")
        try:
            each = [pattern] if os.path.exists(pattern) else braceexpand(pattern)
            each = list(itertools.islice(each, MOST_SHARDS + 1))
        except (UnbalancedBracesError, ValueError, MemoryError, RecursionError) as e:
            raise UserError(f"{flag} {pattern} is no pattern of shards, such as {{0000..0999}}.tar ({e})") from e
        paths = [path for name in each for path in expand_glob(name)]
    missing = [path for path in paths[:MOST_SHARDS] if not os.path.isfile(path)]
    if not paths or missing:
        what = f"; {len(missing)} of {len(paths)} are missing: {utils.summarize(missing)}" if missing else ""
        raise UserError(
            f"{flag} {pattern}: there are no such shards{what}. Name those that there are, as in {{0000..0999}}.tar"
        )
    if len(paths) > MOST_SHARDS or len(set(paths)) < len(paths):
        raise UserError(f"{flag} {pattern} names a shard twice, or more than {MOST_SHARDS}. Name each once")
    return paths


def expand_glob(name):
    """Paths that a name stands for: itself, or what `*`, `?` and `[...]` in it match, by the alphabet."""
    if os.path.exists(name) or not glob.has_magic(name):
        return [name]
    folder, last = os.path.split(name)
    return sorted(glob.glob(name) or glob.glob(os.path.join(glob.escape(folder), last)))


def shards_of_part(folder, part):
    """A pattern of the shards of a folder with `part` (train or val) as a word in their names; None if none has."""
    word, no_letter = f"[{part[0]}]{part[1:]}", "[!a-zA-Z]"
    names = (word, f"{word}{no_letter}*", f"*{no_letter}{word}", f"*{no_letter}{word}{no_letter}*")
    found = [name for name in names if expand_glob(os.path.join(glob.escape(folder), f"{name}.tar"))]
    either = f"{{{','.join(found)}}}" if len(found) > 1 else "".join(found)
    return os.path.join(glob.escape(folder), f"{either}.tar") if found else None


# ---- what is in a shard ----


class Member(NamedTuple):
    """An image in a shard: `size` bytes from `start` on; its label as text, or None."""

    name: str
    start: int
    size: int
    label: str | None


def list_members(path, extensions=dino_images.EXTENSIONS):
    """The images in a shard, as Members in their order. Raises UserError if it is damaged, or made for other ends."""
    found, labels, dotted = [], {}, {}
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise UserError(f"the shard {path} is compressed. Unpack it: gunzip")
        with tarfile.open(path, "r:") as tar:
            size = os.path.getsize(path)
            while (member := tar.next()) is not None:
                check_member(member, path, size)
                if not member.isreg() or os.path.basename(member.name).startswith("."):  # ._a.jpg is none
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
        raise UserError(f"the shard {path} is no tar file, or damaged: {dino_images.one_line(e)}. Copy it anew") from e
    return [Member(member.name, member.offset_data, member.size, labels.get(key)) for key, member in found]


def split_name(name):
    """(key, extension) as WebDataset divides the name of a file in a shard: at the first dot of its last part."""
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    return (key, extension.lower()) if key else (name, "")


def check_member(member, path, size):
    """Raise UserError for what no shard has that was made for training. Nothing is ever unpacked, even so."""
    where = f"the shard {path} has {utils.printable(member.name[:200])} in it"
    if len(member.name) > 1000:
        raise UserError(f"{where}, a name of {len(member.name)} letters. Make it anew, with names of up to 1000")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(f"{where}, a path out of its folder. Make it anew, of names below one folder")
    if not (member.isreg() or member.isdir()):
        raise UserError(f"{where}, which is no file but a link or a device. Make it anew (tar --dereference)")
    if member.issparse():
        raise UserError(f"{where}, a file with holes. Make it anew, without tar --sparse")
    if not 0 <= member.offset_data <= member.offset_data + member.size <= size:
        raise UserError(f"the shard {path} ends within {utils.printable(member.name)}. Copy it anew")


def read_label(tar, member, path):
    content = tar.extractfile(member).read(1000)
    try:
        label = content.decode().strip()
    except UnicodeDecodeError:
        label = ""
    if not label or member.size > 1000:
        raise UserError(
            f"the shard {path} has no label in {utils.printable(member.name)}. It takes a number, or a name"
        )
    return label


def check_end(tar, path):
    """Raise UserError if reading ended at anything but the end mark, which tarfile takes for the end in silence."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block != tarfile.NUL * tarfile.BLOCKSIZE:
        what = "is damaged at" if block else "ends, without a mark that it is whole, at"
        raise UserError(f"the shard {path} {what} byte {tar.offset}. Copy it, or make it, anew")
    while block := tar.fileobj.read(2**20):
        if block.strip(tarfile.NUL):
            raise UserError(f"the shard {path} goes on behind its end mark: are there several in it? Keep them apart")


def check_keys(found, dotted, path):
    """Raise UserError if there are images that WebDataset's convention makes parts of others, which are not there."""
    lost = sorted(dotted.keys() - {key for key, _ in found})
    if lost:
        raise UserError(
            f"the shard {path} has {utils.printable(dotted[lost[0]])} in it: names of images have one dot, key.jpg. Rename "
            f"it, and {len(lost) - 1} more"
        )


# ---- tables of contents ----


def state_of(path):
    """What changes with a shard: its size and times."""
    state = os.stat(path)
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def table_path(path, state, extensions):
    """Where the table of a shard in this state is kept: of another machine's file at the same path there is another."""
    named = f"{os.path.abspath(path)}\0{state}\0{'.npy' in extensions}"
    digest = hashlib.blake2b(named.encode(errors="surrogateescape"), digest_size=12).hexdigest()
    return Path(utils.cache_dir()) / "shards" / f"{digest}.npy"


def read_head(path, state, extensions):
    """(number of images, digest of their names) of a shard's table of contents; None if there is none of its state."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        table = table_path(path, state, extensions)
        head = json.loads(table.with_suffix(".json").read_bytes())
        if head["state"] == state and table.is_file():
            return int(head["images"]), str(head["digest"])
    return None


def make_table(path, state, extensions):
    """Write a shard's table of contents: a row for each image; then its head, by which it counts as written."""
    table = as_table(list_members(path, extensions))
    images, digest = index_header(table)
    head = json.dumps({"path": os.path.abspath(path), "state": state, "images": images, "digest": digest})
    target = table_path(path, state, extensions)
    arriving = target.with_name(f".{uuid.uuid4().hex}")  # another process may be at it, where files can't be locked
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
    """The table of contents of a shard whose state is that still. It stays on the disk; what is looked up is read."""
    now = dino_images.with_retries(lambda: state_of(path), path, path)
    if now[:2] != list(state)[:2]:  # a new owner, name or mode is no change
        raise dino_images.BadImage(f"can't read the image: the shard {path} has changed since the start")
    head = read_head(path, list(state), extensions)
    with contextlib.suppress(OSError, ValueError, EOFError):
        table = np.load(table_path(path, list(state), extensions), mmap_mode="r", allow_pickle=False)
        if head and table.shape == head[:1] and table.dtype.names == ("name", "start", "size", "label"):
            return table
    return as_table(list_members(path, extensions))  # the list that was kept is gone


def shard_index(paths, extensions):
    """[(number of images, digest of their names)] of shards. Of the processes of a machine one lists what is new."""
    shards = [(path, state_of(path), extensions) for path in paths]
    if None in (read_head(*shard) for shard in shards):
        folder = Path(utils.cache_dir()) / "shards"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock, _ = utils.lock_file(folder / ".lock", patience=3600)
            with lock:
                new = [shard for shard in shards if read_head(*shard) is None]
                if len(new) > 10:
                    utils.say(f"listing the images of {len(new)} shards; {folder} keeps the lists")
                for shard in new:
                    make_table(*shard)
        except OSError as e:
            utils.log(
                f"warning: lists of the images in shards can't be kept in {folder} ({e.strerror}): each start makes "
                "them anew. Set DINO_CACHE to a folder that you may write to"
            )
    return [read_head(*shard) or index_header(load_index(shard[0], tuple(shard[1]), extensions)) for shard in shards]


# ---- images ----


class TarShards:
    """Images in shards, in the way of dino_images.ImageFiles: numbered shard by shard, in the order of their names."""

    def __init__(self, pattern, exif=False, flag="--data_path", extensions=dino_images.EXTENSIONS):
        self.extensions = extensions
        self.paths, self.exif, self.flag, self.pattern = shard_files(pattern, flag), exif, flag, pattern
        self.states = [tuple(state_of(path)) for path in self.paths]
        counts, self.digests = zip(*shard_index(self.paths, extensions), strict=True)
        self.starts = np.cumsum([0, *counts])  # number of each shard's first image, and of all
        self.numbers = range(int(self.starts[-1]))
        if not len(self.numbers):
            raise UserError(
                f"{flag} {pattern}: there are no images in these {len(self.paths)} shards. Files in them are named "
                "key.jpg (key.png, ...), the key without a dot"
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
        except (UserError, OSError):  # the shard is gone, or another now
            return f"{self.pattern}, image {self.numbers[i]}"

    def names(self):
        """What tells this set from others: the shards, each with a digest of the names in it."""
        return [f"{path}/{digest}" for path, digest in zip(self.paths, self.digests, strict=True)]

    def open(self, i):
        try:
            path, name, start, size = self.find(i)
        except OSError as e:
            raise dino_images.BadImage(f"can't read {self.name(i)}: {e.strerror}") from e
        content = dino_images.read_file(path, start, size, f"{path}/{name}")
        return dino_images.open_content(content, f"{path}/{name}", self.exif)

    @functools.cached_property
    def labels(self):
        """(class number of each image [N] or None, names of the classes)."""
        shards = zip(self.paths, self.states, strict=True)
        tables = [load_index(*shard, self.extensions)["label"] for shard in shards]
        found = [label.decode() for label in np.concatenate(tables)[np.asarray(self.numbers)].tolist()]
        return dino_images.number_labels([label for label in found if label], len(found), self.pattern)

    @property
    def targets(self):
        return self.labels[0]

    @property
    def classes(self):
        return self.labels[1]

    def are_sorted(self):
        """Whether shards hold a class or two each, of more: as the labels say in some twenty shards of ten images."""
        some = range(0, len(self.paths), max(len(self.paths) // 20, 1))
        tables = [load_index(self.paths[k], self.states[k], self.extensions)["label"] for k in some]
        found = [Counter(labels.tolist()) for labels in tables if len(labels) >= 10]
        each = statistics.median(map(len, found)) if found else 0
        commonest = {labels.most_common(1)[0][0] for labels in found}  # one, where other classes are rare
        return 0 < each <= 2 <= len(commonest) and len(set().union(*found)) >= 2 * each

    def take(self, numbers):
        """These alone, of the same classes."""
        part = copy.copy(self)
        part.numbers = np.asarray(self.numbers)[numbers]
        targets, classes = self.labels
        part.labels = (None if targets is None else targets[numbers], classes)
        return part


# ---- their order in training ----

WINDOW = 16_384  # images: of this many that follow each other the order is random; a dozen shards of ImageNet
LANES = (80, 40, 20, 10, 4, 2)  # 80 is shared out evenly by 2, 4, 8, 10 (the default), 16 and 20 loaders


def count_lanes(shards, batches):
    """Into how many lanes a run is divided: as many as leave two shards and eight batches to each, else one."""
    return next((lanes for lanes in LANES if shards >= 2 * lanes and batches >= 8 * lanes), 1)


def lane_window(lanes):
    """Images of a lane whose order is random. Lanes share a window, else caches would have to hold all their shards."""
    return WINDOW // min(lanes, 16)


def lane_lengths(batches, lanes):
    """How many of a run's first batches are of each lane: batch k is of lane k % lanes."""
    return [len(range(lane, batches, lanes)) for lane in range(lanes)]


class Piece(NamedTuple):
    """Images `first` to `last` of those at the positions `start` to `stop` of an epoch, shuffled window by window."""

    start: int
    stop: int
    first: int
    last: int
    window: int


class ShardSampler(Sampler):
    """(epoch, number) of the images that this rank sees in an epoch: every image at most once over all ranks.

    Shards, in an order that follows from (seed, epoch), are cut into one run for each process, and a run into `lanes`.
    Batch k comes from lane k % lanes, which is read from first to last, shuffled within a window that moves over it.
    Loaders take turns too: W of them are gcd(W, lanes) groups, each with lanes of its own. So if W divides the number
    of lanes no shard is read by two, but for those at borders. Neither the lanes nor the order depend on W, and where
    it goes on follows from the number of steps done. What does not fill a last global batch is left out.
    """

    def __init__(self, images, batch_size, seed=0, rank=0, world_size=1):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0, sittings=()):
        """Which epoch comes next, with which of its steps, and who had which share of it before.

        `sittings` are (processes, images a step in each, steps, lanes) of the runs that did the steps before, in their
        order; unless given, they were done by as many processes as there are now. A sitting of three numbers is from
        before there were lanes: it had one.
        """
        self.epoch = epoch
        generator = torch.Generator().manual_seed(utils.derive_seed(self.seed, utils.ORDER, epoch))
        self.shards = torch.randperm(len(self.images.paths), generator=generator).numpy()
        self.ends = np.diff(self.images.starts)[self.shards].cumsum()  # of each shard among the epoch's positions
        now = (self.world_size, self.batch_size)
        self.mine, self.done = self.deal([*(sittings or [(*now, first_step, None)]), (*now, 0, None)])
        self.lanes = len(self.mine)
        self.steps = max(len(self.images) // (self.batch_size * self.world_size) - first_step, 0)

    def deal(self, sittings):
        """What this process has before it in the last of the sittings: pieces of each lane; and batches behind it.

        A sitting of as many processes as the one before goes on where that was. Another divides what is left: the rests
        of lanes, process by process, and what filled no batch. It has as many lanes as fit, where they are None.
        """
        left, pieces = len(self.images), None
        for (processes, batch_size), same in itertools.groupby(sittings, key=lambda sitting: tuple(sitting[:2])):
            same = [(*sitting, 1)[:4] for sitting in same]
            batches = left // (processes * batch_size)  # of each process
            done = min(sum(sitting[2] for sitting in same), batches)
            lanes = same[0][3] or count_lanes(len(self.images.paths) // processes, batches)
            sizes, given = (
                [number * batch_size for number in lane_lengths(n, lanes)] * processes for n in (batches, done)
            )
            sizes, given = [*sizes, left - sum(sizes)], [*given, 0]  # the last: what fills no batch of all
            if pieces is None:
                ends, window = itertools.accumulate(sizes), lane_window(lanes)
                pieces = [Piece(end - size, end, 0, size, window) for size, end in zip(sizes, ends, strict=True)]
            edges = [number for size, gone in zip(sizes, given, strict=True) for number in (gone, size - gone)]
            parts = split(pieces, edges)[1::2]  # without those that are gone
            pieces, left = list(itertools.chain(*parts)), left - sum(given)
        return parts[self.rank * lanes : (self.rank + 1) * lanes], done

    def __len__(self):
        return self.steps * self.batch_size

    def __iter__(self):
        lanes = [self.positions(pieces) for pieces in self.mine]
        for k in range(self.done, self.done + self.steps):
            for position in itertools.islice(lanes[k % self.lanes], self.batch_size):
                yield self.epoch, self.number_at(position)

    def positions(self, pieces):
        """Positions in the epoch of the images of pieces; no more than one window is in memory."""
        for piece in pieces:
            for start in range(piece.start, piece.stop, piece.window):
                stop = min(start + piece.window, piece.stop)
                first, last = (max(edge + piece.start - start, 0) for edge in (piece.first, piece.last))
                if first >= stop - start or last <= first:
                    continue
                seed = utils.derive_seed(self.seed, utils.ORDER, self.epoch, start)
                order = torch.randperm(stop - start, generator=torch.Generator().manual_seed(seed))[first:last]
                for position in order.numpy():
                    yield start + int(position)

    def number_at(self, position):
        """Number of the image at a position of the epoch."""
        k = int(np.searchsorted(self.ends, position, side="right"))
        shard = self.shards[k]
        return int(self.images.starts[shard + 1] - self.ends[k] + position)


def split(pieces, sizes):
    """Pieces laid end to end, divided into parts of so many images each: a list of pieces for each part."""
    rest, parts = list(reversed(pieces)), []
    for size in sizes:
        parts.append([])
        while size:
            piece = rest.pop()
            middle = min(piece.first + size, piece.last)
            parts[-1].append(piece._replace(last=middle))
            if middle < piece.last:
                rest.append(piece._replace(first=middle))
            size -= middle - piece.first
    return parts
