"""Files of embeddings: one vector per image, with its name. See docs/embeddings.md.

.npz and .parquet are written a few rows at a time, .pt from all of them at once. No file runs code when it is loaded.
"""

import functools
import importlib.util
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import dino_checkpoints
import utils
from utils import UserError

NUMBERS_AT_ONCE = 2**20  # of vectors, in memory at a time: 4 MB


class Embeddings(NamedTuple):
    """N vectors and the images that they belong to.

    `rows(n)` yields the vectors in order, float32 [n, *shape] at a time, the last ones [n or fewer, *shape]. `labels`
    [N] are indices into `classes`. `neighbors` are indices int64 and similarities float32, [N, K] each, best first.
    """

    names: list
    shape: tuple
    rows: Callable
    settings: dict
    labels: np.ndarray | None = None
    classes: list = ()
    neighbors: tuple | None = None

    def blocks(self):
        """All vectors in order, in blocks of at most NUMBERS_AT_ONCE numbers. Raises UserError if some are missing."""
        number = 0
        for block in self.rows(rows_at_once(self.shape)):
            number += len(block)
            yield block
        if number != len(self.names):
            raise UserError(
                f"{number} of {len(self.names)} vectors are there. Does another run write to this --output?"
            )


def rows_at_once(shape):
    return max(NUMBERS_AT_ONCE // math.prod(shape), 1)


def rows_of_file(path, shape):
    """`rows` of Embeddings whose vectors are in a file of raw float32 numbers."""

    def rows(number):
        # Read, not mapped: mapped pages would count as memory of the process.
        with open(path, "rb") as file:
            while len(block := np.fromfile(file, "<f4", number * math.prod(shape))):
                yield block.reshape(-1, *shape)

    return rows


def rows_of_array(array):
    """`rows` of Embeddings whose vectors are an array in memory."""
    return lambda number: (array[i : i + number] for i in range(0, len(array), number))


# ---- names of files ----


def check_format(flag, path, shape_is_grid=False):
    """Raise UserError if a flag's file has a suffix of no format, or of one that can't hold grids of vectors."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{flag} {path} must end in {', '.join(FORMATS)}")
    if suffix == ".parquet" and shape_is_grid:
        raise UserError(f"{flag} {path}: a table has one vector per image, not a grid of them. Use .npz or .pt")


def check_library(flag, path):
    """Raise UserError, with the pip command, if the library for a file's format is missing."""
    if Path(path).suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{flag} {path} needs a library that is not installed: pip install pyarrow")


# ---- writing ----


def write(path, embeddings):
    """Write Embeddings to a file, in the format of its suffix, whole or not at all. Raises UserError."""
    write_format, _ = FORMATS[Path(path).suffix.lower()]
    try:
        write_format(embeddings, path)
    except OSError as e:
        raise UserError(f"can't write {path}: {e.strerror or e}. Free space, or use another folder") from e


def write_npz(embeddings, path):
    utils.write_whole(path, functools.partial(write_arrays, embeddings))


def write_arrays(embeddings, file):
    """Write the arrays of an .npz file, one after the other. Vectors are not compressed."""
    names, total = embeddings.names, len(embeddings.names)
    width = max(map(len, names), default=1)
    text = (np.array(names[i : i + 4096], dtype=f"<U{width}") for i in range(0, total, 4096))
    small = {"settings": np.array(json.dumps(embeddings.settings))}
    if embeddings.labels is not None:
        small |= {"labels": embeddings.labels, "classes": np.array(embeddings.classes, dtype=str)}
    if embeddings.neighbors:
        small |= dict(zip(("neighbors", "similarities"), embeddings.neighbors, strict=True))
    with zipfile.ZipFile(file, "w") as archive:
        write_array(archive, "features", "<f4", (total, *embeddings.shape), embeddings.blocks())
        write_array(
            archive, "names", f"<U{width}", (total,), text, zipfile.ZIP_DEFLATED
        )  # of equal width: mostly zeros
        for name, array in small.items():
            write_array(archive, name, array.dtype.str, array.shape, [array])


def write_array(archive, name, dtype, shape, blocks, compression=zipfile.ZIP_STORED):
    """Write an array of an .npz file from blocks of its rows."""
    member = zipfile.ZipInfo(f"{name}.npy")  # without the time: equal content, equal files
    member.compress_type = compression
    with archive.open(member, "w", force_zip64=True) as file:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).tobytes())


def write_pt(embeddings, path):
    """Write a dict of tensors and plain types, for torch.load(weights_only=True)."""
    features, first = torch.empty(len(embeddings.names), *embeddings.shape), 0
    for block in embeddings.blocks():
        features[first : first + len(block)] = torch.from_numpy(block)
        first += len(block)
    content = {"features": features, "names": list(embeddings.names), "settings": embeddings.settings}
    if embeddings.labels is not None:
        content |= {"labels": torch.from_numpy(embeddings.labels), "classes": list(embeddings.classes)}
    if embeddings.neighbors:
        indices, similarities = map(torch.from_numpy, embeddings.neighbors)
        content |= {"neighbors": indices, "similarities": similarities}
    dino_checkpoints.save(path, content)


def write_parquet(embeddings, path):
    utils.write_whole(path, functools.partial(write_table, embeddings))


def write_table(embeddings, file):
    """Write one row per image, in row groups as they come."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"name": pa.string(), "label": pa.string(), "embedding": pa.list_(pa.float32())}
    if embeddings.neighbors:
        columns |= {"neighbors": pa.list_(pa.int64()), "similarities": pa.list_(pa.float32())}
    about = {"settings": json.dumps(embeddings.settings), "classes": json.dumps(list(embeddings.classes))}
    schema, first = pa.schema(columns, metadata=about), 0
    with parquet.ParquetWriter(file, schema, use_dictionary=["label"]) as writer:
        for block in embeddings.blocks():
            here = slice(first, first + len(block))
            labels = [None] * len(block) if embeddings.labels is None else embeddings.labels[here].tolist()
            labels = [None if label is None else as_utf8(embeddings.classes[label]) for label in labels]
            cells = [pa.array([as_utf8(name) for name in embeddings.names[here]]), pa.array(labels, pa.string())]
            cells += [as_lists(rows) for rows in (block, *(part[here] for part in embeddings.neighbors or ()))]
            writer.write_table(pa.Table.from_arrays(cells, schema=schema))
            first = here.stop


def as_utf8(name):
    """A file name without the bytes that are no text, which tables can't hold."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def as_lists(rows):
    """An array [n, d] as a column of n lists."""
    import pyarrow as pa

    ends = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(ends, pa.array(np.ascontiguousarray(rows).reshape(-1)))


# ---- reading ----


def read(path, flag="--embeddings"):
    """The Embeddings in a file, in memory. Raises UserError if it can't be read, or was not written by embed.py."""
    check_format(flag, path)
    check_library(flag, path)
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path} does not exist. Name a file that embed.py --output has written")
    _, read_format = FORMATS[Path(path).suffix.lower()]
    try:
        found = read_format(path)
        features, names, settings = np.asarray(found["features"]), list(map(str, found["names"])), found["settings"]
        labels, classes = found.get("labels"), list(map(str, found.get("classes", ())))
        neighbors = [np.asarray(found[key]) for key in ("neighbors", "similarities") if key in found]
        whole = features.ndim > 1 and features.dtype == np.float32 and len(features) == len(names) > 0
        if not whole or not isinstance(settings, dict):
            raise ValueError(f"features are {features.dtype} {list(features.shape)}, for {len(names)} names")
    except UserError:
        raise
    except Exception as e:  # zipfile, numpy and pyarrow raise almost anything on damaged files
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{flag} {path} can't be read: is it a whole file of embed.py? ({reason})") from e
    labels = None if labels is None else np.asarray(labels)
    return Embeddings(
        names, features.shape[1:], rows_of_array(features), settings, labels, classes, tuple(neighbors) or None
    )


def read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        found = dict(file)
    return {**found, "settings": json.loads(str(found["settings"]))}


def read_parquet(path):
    from pyarrow import parquet

    table = parquet.read_table(path)
    about = {
        key.decode(): json.loads(value) for key, value in (table.schema.metadata or {}).items() if value[:1] in b"[{"
    }
    lists = {"features": "embedding", "neighbors": "neighbors", "similarities": "similarities"}
    found = {key: stack_lists(table[name]) for key, name in lists.items() if name in table.column_names}
    found |= {"names": table["name"].to_pylist(), "settings": about["settings"]}
    if about["classes"]:
        number = {as_utf8(name): i for i, name in enumerate(about["classes"])}
        labels = np.array([number[name] for name in table["label"].to_pylist()])
        found |= {"labels": labels, "classes": about["classes"]}
    return found


def stack_lists(column):
    """A column of n lists of one length d as an array [n, d]."""
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]  # one list could be too long
    return np.concatenate(values).reshape(len(column), -1)


FORMATS = {
    ".npz": (write_npz, read_npz),
    ".pt": (write_pt, dino_checkpoints.load_checkpoint),
    ".parquet": (write_parquet, read_parquet),
}
