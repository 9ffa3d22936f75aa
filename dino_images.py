"""How image files are opened: photographs as PIL images in RGB, others as arrays of floats, one plane per channel.

An unreadable file raises BadImage with its name. A file system that does not answer is asked again.
"""

import errno
import functools
import io
import math
import os
import stat
import time
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

import utils
from utils import UserError

EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".avif", ".jp2", ".jfif")
# Formats by Pillow's names. It knows others, of which EPS starts another program.
KINDS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000")
MOST_PIXELS = 200_000_000  # per image: a small file can be made to fill all memory
Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # Pillow's own limit is lower


def is_image(name, extensions=EXTENSIONS):
    return name.lower().endswith(extensions) and not name.startswith(".")


def extensions_of(in_chans):
    """File name extensions of images; arrays, too, for other than 3 channels."""
    return EXTENSIONS if in_chans == 3 else (*EXTENSIONS, ".npy")


# ---- files ----


class BadImage(UserError):
    """An image that can't be read. `reason` is why, without its name."""

    def __init__(self, message, reason=""):  # loader processes raise it again with the message alone
        super().__init__(message)
        self.reason = reason or message


class Unreadable(NamedTuple):
    """What a training batch reports about an image that could not be read."""

    name: str
    reason: str


def bad_image(name, reason):
    return BadImage(f"can't read the image {name}: {reason}. Repair or remove it", reason)


def load_image(path, exif=False):
    """The file as a PIL image in RGB, rotated by its EXIF orientation if `exif`. Raises BadImage."""
    return to_rgb(open_image(path, exif))


def open_image(path, exif=False):
    """The file as a PIL image that is not decoded yet (unless `exif` rotates it), or as an ArrayFile if it is numpy's.

    Raises BadImage.
    """
    return open_content(read_file(path), os.fspath(path), exif)


def open_content(content, name, exif=False):
    """`open_image` for the bytes of a file."""
    try:
        if content.startswith(np.lib.format.MAGIC_PREFIX):
            return ArrayFile(read_array(content), name)
        image = Image.open(io.BytesIO(content), formats=known_kinds())
        image.filename = name
        check_pixels(image)
        if exif and image.getexif().get(ORIENTATION, 1) != 1:
            turned = ImageOps.exif_transpose(image)
            turned.filename = image.filename
            return turned
    except MemoryError:
        raise
    except Exception as e:  # Pillow's decoders raise almost anything on damaged data
        raise bad_image(name, one_line(e)) from e
    return image


@functools.cache
def known_kinds():
    """The formats of KINDS that this Pillow supports."""
    Image.init()
    return [kind for kind in KINDS if kind in Image.OPEN]


def check_pixels(image):
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} are more than {MOST_PIXELS // 10**6} million pixels")


ORIENTATION = 0x0112  # EXIF tag


def to_rgb(image):
    """A PIL image, an ArrayFile, or uint8 [H, W, 3], as a PIL image in 8-bit RGB. Raises BadImage if it is damaged.

    Three planes, of an array or of a TIFF with three gray pages, become red, green and blue.
    """
    try:
        if isinstance(image, np.ndarray):
            return Image.fromarray(image)
        if isinstance(image, ArrayFile) or has_three_pages(image):
            levels = (255 * planes(image, utils.RGB)).round().byte()
            return Image.fromarray(levels.permute(1, 2, 0).numpy())
        if image.mode.startswith("I"):  # 16 bits, which Pillow stores in 16 or 32 and would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        elif image.mode == "F":
            image = Image.fromarray(float_levels(np.asarray(image)))
        return image.convert("RGB")
    except BadImage:
        raise
    except Exception as e:
        name = getattr(image, "filename", "")
        raise bad_image(name, one_line(e)) from e


def size_of(image):
    """(width, height) of a PIL image, of uint8 [H, W, 3], or of a tensor [C, H, W]."""
    if isinstance(image, Image.Image):
        return image.size
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.shape[-2:]
    return width, height


def has_three_pages(image):
    """Whether a TIFF has three gray pages of one size: channels, not a document or a pyramid."""
    if image.format != "TIFF" or image.n_frames != 3:
        return False
    pages = set()
    for number in range(3):
        image.seek(number)
        pages.add((image.size, image.mode))
    image.seek(0)
    return len(pages) == 1 and pages.pop()[1] in ("L", "I;16", "I;16B", "I", "F")


def float_levels(values):
    """Floats from 0 to 1, or from 0 to 255 -> uint8."""
    values = np.nan_to_num(values)
    return (values * (255 if values.max(initial=0) <= 1 else 1)).clip(0, 255).round().astype(np.uint8)


def one_line(error):
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a known format"
    return " ".join(str(error).split())[:300] or type(error).__name__


MOST_BYTES = 2**31  # of an image
PATIENCE = 60.0  # seconds to wait for a file system that does not answer, until a file can be read again
retry_budget_used = 0.0  # seconds, by this process
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EAGAIN}


def read_file(path, start=0, size=-1, name=None):
    """The bytes of a file, or `size` of them from `start`. `name` is for the error message, see `with_retries`."""

    def read():
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):  # a pipe would wait for a writer
            raise ValueError("it is not a regular file")
        if size < 0 and state.st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES // 2**20} MB")
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)

    return with_retries(read, path, name or path)


def with_retries(act, path, name):
    """`act()` on a file, repeated for up to a minute if its file system does not answer or is not there.

    After that minute each file is tried once, until one that failed can be read. Each other one that can be read gives
    back a millisecond of the minute: a folder that does not exist is waited for once, not for each image in it. Raises
    BadImage, or UserError if the process has too many open files.
    """
    global retry_budget_used
    pause = 0.5
    while True:
        try:
            result = act()
        except (OSError, ValueError) as e:  # ValueError: a name with a zero byte in it
            number = getattr(e, "errno", None)
            if number in (errno.EMFILE, errno.ENFILE):
                raise UserError(f"too many open files, at {name}. Raise `ulimit -n`, or lower --num_workers") from e
            gone = number == errno.ENOENT and not os.path.isdir(os.path.dirname(os.path.abspath(path)))
            if not (gone or number in PASSING) or retry_budget_used >= PATIENCE:
                reason = getattr(e, "strerror", None) or one_line(e)
                raise bad_image(name, reason) from e
        else:
            retry_budget_used = max(retry_budget_used - 0.001, 0.0) if pause == 0.5 else 0.0
            return result
        time.sleep(pause)
        retry_budget_used, pause = retry_budget_used + pause, 2 * pause


# ---- images of one or many channels ----


class ArrayFile(NamedTuple):
    """The array of a .npy file: an opened image with `planes`, but not a photograph."""

    array: np.ndarray
    filename: str


def read_array(content):
    """The array in the bytes of a .npy file, whose header is checked first. Raises ValueError."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of numpy's format is for tables")
    shape, _, dtype = readers[version](file)
    check_shape(shape)
    if dtype.kind not in "buif":
        raise ValueError(f"it is an array of {dtype}, not of image values")
    return np.load(io.BytesIO(content), allow_pickle=False)


def check_shape(shape):
    if not 0 < math.prod(shape) <= MOST_PIXELS:
        raise ValueError(f"an array of shape {shape} is empty, or has more than {MOST_PIXELS // 10**6} million values")


def decode(image, inputs):
    """Opened image or uint8 [H, W, 3] -> PIL image in RGB, or `planes` for other than 3 channels. Raises BadImage."""
    return to_rgb(image) if inputs.photographs else planes(image, inputs)


def planes(image, inputs):
    """A PIL image or an ArrayFile as float32 [inputs.in_chans, H, W] with values from 0 to 1.

    0 and 1 are the ends of inputs.value_range, where values are clipped. Without a range, integers are divided by the
    largest value of their type, and floats or negative integers outside 0 to 1 raise BadImage.
    """
    try:
        values, largest = stored_planes(image, inputs.in_chans)
        low, high, slack = float(values.min()), float(values.max()), TOLERANCE * (values.dtype.kind == "f")
        if not math.isfinite(high - low):
            raise ValueError("it contains NaN or infinite values")
        if inputs.value_range:
            bottom, top = inputs.value_range
            values = ((values - np.float64(bottom)) / (top - bottom)).clip(0, 1).astype(np.float32, order="C")
        elif low < -slack or high > largest + slack:
            raise ValueError(
                f"its values are between {low:g} and {high:g}, outside of 0 to {largest:g}; set --value_range"
            )
        else:
            values = (values.astype(np.float32, order="C") / np.float32(largest)).clip(0, 1)
        return torch.from_numpy(values)
    except MemoryError:
        raise
    except Exception as e:
        name = getattr(image, "filename", "")
        raise bad_image(name, one_line(e)) from e


def shown(image):
    """A decoded image as people see it, a PIL image in RGB: the first three channels, or the first of one or two."""
    if not isinstance(image, torch.Tensor):
        return image
    levels = (255 * image[: 3 if len(image) > 2 else 1]).round().byte()  # [3 or 1, H, W]
    return Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).numpy())


TOLERANCE = 1e-3  # interpolation can overshoot 0 and 1 by this


def stored_planes(image, in_chans):
    """(the stored values of an image [in_chans, H, W], what counts as 1). Raises ValueError."""
    if isinstance(image, ArrayFile):
        found = channels_first(image.array, in_chans)
        return found, {"b": 1, "f": 1}.get(found.dtype.kind) or np.iinfo(found.dtype).max
    pages, bands = getattr(image, "n_frames", 1), len(image.getbands())
    check_shape((in_chans, *image.size))
    if in_chans == 1:
        found = gray_page(image)[None]
    elif pages == in_chans:  # of a TIFF
        pages = [gray_page(image, number) for number in range(in_chans)]
        found = np.stack(pages, casting="no")  # all pages must have the same type
    elif pages == 1 and bands == in_chans:
        found = np.moveaxis(np.asarray(image), -1, 0)
    else:
        raise ValueError(f"it has {pages} page(s) of {bands} band(s), not --in_chans {in_chans}")
    return found, {"uint8": 255, "float32": 1}.get(found.dtype.name, 65535)  # Pillow has 16 bits in 16 or 32


def channels_first(array, in_chans):
    """An array [H, W], [H, W, in_chans] or [in_chans, H, W] -> [in_chans, H, W]; channels last if both fit."""
    if array.ndim == 2 and in_chans == 1:
        return array[None]
    if array.ndim == 3 and in_chans in (array.shape[2], array.shape[0]):
        return np.moveaxis(array, -1, 0) if array.shape[2] == in_chans else array
    raise ValueError(f"an array of shape {array.shape} does not have --in_chans {in_chans}")


def gray_page(image, number=0):
    """A page of a PIL image as values [H, W]: colors converted to gray, anything else as it is stored."""
    if number:
        image.seek(number)
    check_shape(image.size)
    kept = image.mode.startswith("I") or image.mode == "F"
    return np.asarray(image if kept else image.convert("L"))


# ---- images whose pixels are labels ----

VOID = 255  # label of pixels that the annotators of PASCAL VOC and DAVIS left undecided


def use_file(path, use):
    """use(PIL image) for the image file at `path`. Raises UserError if the file is missing or damaged."""
    try:
        with Image.open(path, formats=known_kinds()) as image:
            check_pixels(image)
            return use(image)
    except Exception as e:  # Pillow's decoders raise almost any exception on damaged data
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"can't read {path}: {reason}. Replace the file, or remove it from the list of files") from e


def read_labels(path):
    """Labels [H, W] uint8 of an annotation: 0 is background, then the objects. Raises UserError if it is not one."""
    mode, labels = use_file(path, lambda image: (image.mode, np.array(image)))
    if mode not in ("P", "L"):
        raise UserError(f"the annotation {path} is an image in mode {mode}. Save it as indexed, one label per pixel")
    return labels
