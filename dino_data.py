"""From images to batches: transforms, data sets, loaders, and the photographs that train with no data set at hand.

The way of a training image: (epoch, number) from the sampler -> file -> PIL image, RGB -> crops, uint8 -> batch. What
its crops are follows from (seed, epoch, number) alone, whichever process makes them and in whatever order.
"""

import contextlib
import functools
import importlib.util
import math
import operator
import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision import transforms

import dino_images
import dino_shards
import utils
from utils import UserError

# ---- transforms ----


class View(NamedTuple):
    """All that is random about one crop of an image: drawn first, then rendered with PIL or, faster, with OpenCV."""

    size: int  # side of the crop in pixels
    box: tuple  # left, top, right, bottom in the image
    flip: bool
    jitter: tuple  # ((operation, factor), ...) in their order; () leaves the colours alone
    grey: bool
    blur: float | None  # radius in pixels of the crop
    solarize: bool


class RandomView:
    """PIL image -> a crop of it, resized to `size` and augmented, as uint8 [3, size, size] (section 3.1).

    `draw` takes what torchvision's transforms take from torch's random numbers, in their order, and what the blur and
    the solarisation take from Python's.
    """

    def __init__(self, size, scale, blur, solarization=None, augmentation="pil"):
        self.size, self.scale, self.blur, self.solarization = size, scale, blur, solarization
        self.render = RENDERERS[augmentation]
        self.colours = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        self.jitter_p = torch.tensor(0.8).item()  # in float32, as torch compares it with a random number

    def __call__(self, image):
        return self.render(image, [self.draw(image)])[0]

    def draw(self, image):
        """A View for an image, of which only the size counts."""
        top, left, height, width = transforms.RandomResizedCrop.get_params(image, self.scale, (3 / 4, 4 / 3))
        return View(
            size=self.size,
            box=(left, top, left + width, top + height),
            flip=torch.rand(1).item() < 0.5,
            jitter=self.draw_jitter() if torch.rand(1).item() <= self.jitter_p else (),
            grey=torch.rand(1).item() < 0.2,
            blur=self.blur.draw(),
            solarize=self.solarization is not None and self.solarization.draw(),
        )

    def draw_jitter(self):
        j = self.colours
        order, *factors = j.get_params(j.brightness, j.contrast, j.saturation, j.hue)
        return tuple((("brightness", "contrast", "saturation", "hue")[i], factors[i]) for i in order.tolist())


class GaussianBlur:
    """PIL's Gaussian blur with probability p, its radius in pixels uniform in [radius_min, radius_max]."""

    def __init__(self, p=0.5, radius_min=0.1, radius_max=2.0):
        self.p, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, image):
        radius = self.draw()
        return image if radius is None else image.filter(ImageFilter.GaussianBlur(radius=radius))

    def draw(self):
        """A radius, or None for no blur."""
        return None if random.random() > self.p else random.uniform(self.radius_min, self.radius_max)


class Solarization:
    """Invert the levels from 128 up, with probability p."""

    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        return ImageOps.solarize(image) if self.draw() else image

    def draw(self):
        return random.random() < self.p


def eval_transform(image_size=224, inputs=utils.RGB):
    """PIL image -> uint8 [3, image_size, image_size]: the centre of the image resized to 8/7 of that (256 for 224).

    With other inputs than photographs, what dino_images.decode gives -> normalised floats of their channels.
    """
    return transforms.Compose(
        [
            transforms.Resize(image_size * 8 // 7, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(image_size),
            *to_levels(inputs),
        ]
    )


def to_levels(inputs):
    """The last steps of a transform: uint8 [3, H, W] of a photograph, normalised floats [C, H, W] of other inputs."""
    steps = [transforms.PILToTensor() if inputs.in_chans == 3 else levels]
    return steps if inputs == utils.RGB else [*steps, inputs.normalize]


# ---- transforms: with PIL ----


def render_pil(image, views):
    """Views of a PIL image, each uint8 [3, size, size]: the very pixels of torchvision's transforms on PIL images."""
    image = dino_images.to_rgb(image)
    return [render_pil_view(image, view) for view in views]


def render_pil_view(image, view):
    crop = image.crop(view.box).resize((view.size, view.size), Image.Resampling.BICUBIC)
    if view.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation, factor in view.jitter:
        crop = PIL_JITTER[operation](crop, factor)
    bands = [crop.convert("L")] if view.grey else crop.split()  # apart: what follows is faster so, and so are tensors
    if view.blur is not None:
        bands = [band.filter(ImageFilter.GaussianBlur(view.blur)) for band in bands]
    if view.solarize:
        bands = [ImageOps.solarize(band) for band in bands]
    return planes([band.tobytes() for band in bands] * (3 // len(bands)), view.size)


def planes(channels, size):
    """The bytes of three channels as a tensor [3, size, size]."""
    return torch.frombuffer(bytearray().join(channels), dtype=torch.uint8).view(3, size, size)


def pil_contrast(image, factor):
    """ImageEnhance.Contrast: away from, or towards, the mean grey of the image."""
    counts = image.convert("L").histogram()
    mean = sum(map(operator.mul, counts, range(256))) / (image.width * image.height)
    return Image.blend(Image.new("RGB", image.size, (int(mean + 0.5),) * 3), image, factor)


def pil_hue(image, factor):
    """torchvision's turn of the hue, which is a level of PIL's HSV.

    The way back from HSV to RGB is PIL's formula for all pixels at once, in a third of PIL's time: a channel is
    v · (1 - s · w), where w, between 0 and 1, follows from the hue. Equal to PIL for every one of the 256³ colours.
    """
    hue, saturation, value = image.convert("HSV").split()
    value = np.asarray(value).astype(np.float32).ravel()
    drop = np.asarray(saturation).ravel() * value / (-255 * 255)
    value += 0.5  # rounds
    levels = hue.tobytes()
    channels = []
    for table in np.roll(hue_weights(), -int(factor * 255), axis=1):  # the hue is turned in the table
        weight = np.frombuffer(levels.translate(table.tobytes()), np.uint8)
        channels.append((weight * drop + value).astype(np.uint8))
    return Image.merge("RGB", [Image.frombytes("L", image.size, channel) for channel in channels])


@functools.cache
def hue_weights():
    """[3, 256]: how much of the saturation, of 255, each channel loses for each level of hue."""
    sixth, within = np.divmod(np.arange(256) * 6, 255)
    zero, one = np.zeros_like(within), np.full_like(within, 255)
    up, down = within, 255 - within
    red = np.choose(sixth % 6, [zero, up, one, one, down, zero])
    green = np.choose(sixth % 6, [down, zero, zero, up, one, one])
    blue = np.choose(sixth % 6, [one, one, down, zero, zero, up])
    return np.stack([red, green, blue]).astype(np.uint8)


PIL_JITTER = {
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": pil_contrast,
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "hue": pil_hue,
}


# ---- transforms: with torch and OpenCV ----

TRUNCATE = 0.498  # taken off levels, which PIL truncates and OpenCV rounds


@functools.cache
def opencv():
    """The module cv2, told to use no threads: each process makes its own crops. Raises UserError if not installed."""
    try:
        import cv2

        cv2.IMREAD_COLOR_RGB  # noqa: B018 (new in OpenCV 4.11)
    except (ImportError, AttributeError) as e:
        raise UserError("--augmentation fast takes OpenCV, 4.11 or newer: pip install opencv-python-headless") from e
    cv2.setNumThreads(0)
    return cv2


def render_fast(image, views):
    """Views of a PIL image, each uint8 [3, size, size]: what render_pil gives but for a level or so, much faster.

    An image that is not decoded yet (see dino_images.open_image) is decoded at a half, a quarter or an eighth of its
    size if it is a JPEG and each view has to be shrunk by 2 or more even so; boxes then count in whole pixels of the
    smaller image.
    """
    width = image.width
    pixels = decode(image, views)  # [1, 3, H, W]
    shrunk = round(width / pixels.shape[-1])
    if shrunk > 1:
        views = [view._replace(box=tuple(round(edge / shrunk) for edge in view.box)) for view in views]
    return [render_fast_view(pixels, view) for view in views]


def decode(image, views):
    """A PIL image as uint8 [1, 3, H, W], channels last in memory, perhaps reduced for these views."""
    pixels = None
    if image.format == "JPEG" and image.mode == "RGB" and image.tile:  # not decoded yet, nor of an odd kind
        spare = min(min(v.box[2] - v.box[0], v.box[3] - v.box[1]) / v.size for v in views)
        shrink = max(k for k in (1, 2, 4, 8) if k == 1 or spare >= 2 * k)
        if shrink > 1:
            image.draft(None, (image.width // shrink, image.height // shrink))
        else:
            pixels = decode_whole_jpeg(image.fp)
    if pixels is None:
        pixels = np.array(dino_images.to_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def decode_whole_jpeg(file):
    """An open JPEG file as levels [H, W, 3], PIL's in less time; None if there is anything unusual about it."""
    cv2 = opencv()
    file.seek(0)
    data = file.read()
    if not data.endswith(b"\xff\xd9"):  # OpenCV would fill what is missing of a truncated file with grey
        return None
    with contextlib.suppress(cv2.error):
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def render_fast_view(pixels, view):
    cv2 = opencv()
    left, top, right, bottom = view.box
    region = pixels[:, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)  # so it remains
    crop = F.interpolate(region, (view.size, view.size), mode="bicubic", antialias=True)
    crop = crop[0].permute(1, 2, 0).numpy()  # [size, size, 3]
    for operation, factor in view.jitter:
        crop = FAST_JITTER[operation](cv2, crop, factor)
    if view.grey:
        crop = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)  # [size, size]
    if view.blur is not None:
        kernel = blur_kernel(view.blur)
        crop = cv2.sepFilter2D(crop, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    if view.solarize:
        crop = np.minimum(crop, ~crop)  # ~ inverts levels
    channels = [crop] * 3 if view.grey else cv2.split(crop)
    if view.flip:
        channels = [cv2.flip(channel, 1) for channel in channels]
    return torch.from_numpy(np.stack(channels))


def fast_contrast(cv2, crop, factor):
    mean = int(cv2.mean(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(crop, factor, crop, 0, (1 - factor) * mean - TRUNCATE)


def fast_saturation(cv2, crop, factor):
    grey = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(crop, factor, grey, 1 - factor, -TRUNCATE)


def fast_hue(cv2, crop, factor):
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(factor * 255) % 256)  # goes round at 256
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


FAST_JITTER = {
    "brightness": lambda cv2, crop, factor: cv2.addWeighted(crop, factor, crop, 0, -TRUNCATE),
    "contrast": fast_contrast,
    "saturation": fast_saturation,
    "hue": fast_hue,
}


def blur_kernel(radius):
    """PIL's Gaussian of this radius: three boxes in a row with fractions of a pixel at their ends.

    In steps of 1/256, as OpenCV computes, but with a sum of 1, so that no light is lost.
    """
    kernel = np.round(256 * exact_blur_kernel(radius))
    kernel[len(kernel) // 2] += 256 - kernel.sum()
    return kernel[kernel > 0] / 256


def exact_blur_kernel(radius):
    variance = radius * radius / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([part, *[1.0] * (2 * whole + 1), part]) / (2 * (whole + part) + 1)
    return np.convolve(np.convolve(box, box), box)


# ---- transforms: of one or many channels ----


def render_planes(image, views):
    """Views of an image, float32 [C, H, W] from 0 to 1, each as int16 [C, size, size]: its `levels`.

    Step for step what render_pil does, but on floats, which are cut off at 0 and 1 where levels are at 0 and 255. The
    mean of all channels takes the place of grey; there are no hues.
    """
    return [render_planes_view(image, view) for view in views]


def render_planes_view(image, view):
    left, top, right, bottom = view.box
    region = image[None, :, top:bottom, left:right]
    crop = F.interpolate(region, (view.size, view.size), mode="bicubic", antialias=True)[0].clamp(0, 1)
    if view.flip:
        crop = crop.flip(-1)
    for operation, factor in view.jitter:
        if operation != "hue":
            crop = crop.lerp(PLANES_JITTER[operation](crop), 1 - factor).clamp(0, 1)
    if view.grey:
        crop = crop.mean(dim=0, keepdim=True).expand_as(crop)
    if view.blur is not None:
        crop = blur_planes(crop, view.blur)
    if view.solarize:
        crop = torch.minimum(crop, 1 - crop)
    return levels(crop)


# What a factor of 0 would leave of a crop [C, H, W]; 1 leaves all as it is.
PLANES_JITTER = {
    "brightness": torch.zeros_like,
    "contrast": lambda crop: crop.mean().expand_as(crop),
    "saturation": lambda crop: crop.mean(dim=0, keepdim=True).expand_as(crop),
}


def blur_planes(crop, radius):
    kernel = torch.from_numpy(exact_blur_kernel(radius)).to(crop).expand(len(crop), 1, 1, -1)  # [C, 1, 1, length]
    reach = kernel.shape[-1] // 2
    crop = F.pad(crop, (reach, reach, reach, reach), mode="replicate")[None]
    for one_way in (kernel, kernel.transpose(2, 3)):
        crop = F.conv2d(crop, one_way, groups=len(kernel))  # each channel by itself
    return crop[0]


def levels(values):
    """Values from 0 to 1 in 65,536 levels: half the bytes of floats, and nothing lost of images of 16 bits.

    They are counted from -32,768 on, int16, because torch can do little with uint16, and the older the less.
    """
    return values.clamp(0, 1).mul(65535).round().sub(32768).to(torch.int16)


RENDERERS = {"pil": render_pil, "fast": render_fast, "planes": render_planes}


# ---- data sets ----

FORMATS = (*dino_images.FORMATS, "shards")


def image_files(folder, flag):
    """Paths of the images directly in a folder, frame-2 before frame-10. Raises UserError, naming the flag, if none."""
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder} is no folder")
    try:
        files = [path for path in Path(folder).iterdir() if not path.name.startswith(".")]  # ._a.jpg is none
    except OSError as e:
        raise UserError(f"can't list {flag} {folder}: {e.strerror}") from e
    paths = [path for path in files if path.suffix.lower() in dino_images.EXTENSIONS]
    if not paths:
        raise UserError(f"{flag} {folder} has no images in it ({', '.join(dino_images.EXTENSIONS)})")
    return sorted(paths, key=lambda path: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", path.name)])


def find_images(data_path, part="", data_format="auto", exif=False, flag="--data_path", in_chans=3):
    """The numbered images that --data_path means, of dino_images or dino_shards; `sample` are the embedded ones.

    Of `sample` and of torchvision's sets, `part` (train or val) is taken. Raises UserError if there are none.
    """
    path = os.fspath(find_data(data_path, part))
    if data_format == "shards" or (data_format == "auto" and dino_shards.are_shards(path)):
        return dino_shards.TarShards(path, exif, flag, dino_images.extensions_of(in_chans))
    return dino_images.find_images(path, part, data_format, exif, flag, in_chans)


class MultiCropDataset(Dataset):
    """Training crops of numbered images: dataset[epoch, i] -> (crops, number of the image, "" or what is wrong with i).

    In the place of an image that can't be read comes another, which follows from (seed, epoch, i). BadImage is raised
    if TRIES in a row can't be read, or, with `strict`, one. What is wrong is its name, a zero, and why.
    """

    TRIES = 100

    def __init__(self, images, augment, seed, strict=False):
        self.images, self.augment, self.seed, self.strict = images, augment, seed, strict

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        number, wrong = key[1], ""
        for attempt in range(1 if self.strict else self.TRIES):
            utils.fix_random_seeds(utils.derive_seed(self.seed, utils.SAMPLE, *key), cpu_only=True)
            try:
                return self.augment(self.images.open(number)), number, wrong
            except dino_images.BadImage as e:
                bad, wrong = e, wrong or f"{self.images.name(number)}\0{e}"
            number = utils.derive_seed(self.seed, utils.REPLACEMENT, *key, attempt) % len(self.images)
        raise bad


class EvalImages(Dataset):
    """Numbered images for evaluation: dataset[i] -> (transform(image, decoded for the inputs: RGB), i).

    One that can't be read raises BadImage, or, with `lenient`, is a warning, and black.
    """

    def __init__(self, images, transform, lenient=False, inputs=utils.RGB):
        self.images, self.transform, self.lenient, self.inputs = images, transform, lenient, inputs

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        try:
            image = self.load(i)
        except dino_images.BadImage as e:
            if not self.lenient:
                raise
            utils.say(f"warning: {e}. It is taken for a black one")
            channels = self.inputs.in_chans
            image = Image.new("RGB", (8, 8)) if channels == 3 else torch.zeros(channels, 8, 8)
        return self.transform(image), i

    def load(self, i):
        return dino_images.decode(self.images.open(i), self.inputs)


def find_part(data_path, part):
    """Where --data_path has one of the two parts of a data set: a folder, list or shards so named; None if nowhere."""
    root = os.fspath(find_data(data_path))
    if root.startswith("torchvision:"):  # which has both
        return root
    names = [part, *(part + suffix for suffix in dino_images.LISTS)]
    found = next((path for path in (os.path.join(root, name) for name in names) if os.path.exists(path)), None)
    return found or dino_shards.shards_of_part(root, part)


def holds_both_parts(data_path, images):
    """Whether training would take the images of val as well, of class folders or of shards."""
    if isinstance(images, dino_shards.TarShards):
        return all(dino_shards.shards_of_part(os.fspath(data_path), part) for part in ("train", "val"))
    return images.classes == ["train", "val"]


def labelled_part(data_path, part, exif=False, flag="--data_path", in_chans=3):
    """The numbered images of train or val of --data_path. Raises UserError if it is not there, or has no labels."""
    path = find_part(data_path, part)
    if path is None:
        what = f"has no {part} in it" if os.path.isdir(find_data(data_path)) else "is no folder"
        raise UserError(
            f"{flag} {data_path} {what}. It takes folders {part}/<class>/*, a list {part}.csv, or, in that folder, "
            f"shards {part}-*.tar"
        )
    images = find_images(path, part, labelled_format(path), exif, flag, in_chans)
    if images.targets is None:
        raise UserError(
            f"{flag} {path} has no labels. Sort the images into a folder for each class, or write a list; in shards, "
            "give each a key.cls"
        )
    return images


def labelled_images(data_path, transform, exif=False, flag="--data_path", inputs=utils.RGB):
    """(train, val, labels of train, labels of val): train and val of data_path as EvalImages, labels by one numbering.

    The classes are train's; val may lack some of them. Raises UserError if it has one that train has not.
    """
    train, val = (labelled_part(data_path, part, exif, flag, inputs.in_chans) for part in ("train", "val"))
    both = isinstance(train, dino_shards.TarShards) and set(train.paths) & set(getattr(val, "paths", ()))
    if both:
        raise UserError(f"{flag} {data_path}: {utils.some_of(sorted(both))} would be of train and of val. Rename them")
    number = {name: i for i, name in enumerate(train.classes)}
    unknown = sorted(set(val.classes) - set(number))
    if unknown:
        some = ", ".join(unknown[:5])
        raise UserError(f"{flag} {data_path}: val has classes that train has not: {some}. Give both the same")
    renumbered = torch.tensor([number[name] for name in val.classes])
    sets = (EvalImages(images, transform, inputs=inputs) for images in (train, val))
    return *sets, train.targets, renumbered[val.targets]


def find_labelled(path, transform, exif, flag, inputs=utils.RGB):
    """(train, val, labels of train, labels of val) of train and val in a folder, or of the labelled images in it."""
    parts = [find_part(path, part) for part in ("train", "val")]
    if all(parts):
        return labelled_images(path, transform, exif, flag, inputs)
    if any(parts) and not dino_shards.are_shards(os.fspath(path)):
        raise UserError(f"{flag} {path} has only one of train and val. Name a folder that has both, or class folders")
    images = find_images(path, "", labelled_format(path), exif, flag, inputs.in_chans)
    return held_out(images, transform, f"{flag} {path}", inputs)


def labelled_format(path):
    """What a path with labelled images is, for find_images: of a folder the sub-folders are classes."""
    return "folder" if os.path.isdir(path) and not dino_shards.are_shards(os.fspath(path)) else "auto"


def held_out(images, transform, source, inputs=utils.RGB):
    """(train, val, labels of train, labels of val) of one set of images: every tenth of a class is in `val`.

    Classes of fewer than ten images give their first one, those of a single image none. Raises UserError if `source`,
    where they are from, has a single class, or nothing to hold out.
    """
    targets = images.targets
    if targets is None or len(targets.unique()) < 2:
        raise UserError(
            f"{source} has its images in a single class folder, or in none, and k-NN needs labels. Name a folder with "
            "some by --knn_data, or leave out --knn_every (class folders beside single images: --data_format folder)"
        )
    order, counts = targets.argsort(stable=True), targets.bincount()
    number_in_class = torch.empty_like(targets)
    number_in_class[order] = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[targets[order]]
    is_val = (number_in_class % 10 == 0) & (counts[targets] > 1)
    if not is_val.any():
        raise UserError(
            f"{source} has one image in each class: nothing to hold out for k-NN. Name another by --knn_data"
        )
    parts = [wanted.nonzero()[:, 0] for wanted in (~is_val, is_val)]
    sets = (EvalImages(images.take(part.tolist()), transform, inputs=inputs) for part in parts)
    return *sets, *(targets[part] for part in parts)


# ---- mean and standard deviation ----

MOST_MEASURED = 5000  # images


class ImageStatistics(Dataset):
    """Of an image its channels' means and variances, float64 [2, C]; of one that can't be read what is wrong."""

    def __init__(self, images, inputs):
        self.images, self.inputs = images, inputs

    def __len__(self):
        return min(len(self.images), MOST_MEASURED)

    def __getitem__(self, i):
        number = i * len(self.images) // len(self)  # spread evenly over all
        try:
            image = dino_images.decode(self.images.open(number), self.inputs)
        except dino_images.BadImage as e:
            return str(e)
        if self.inputs.in_chans == 3:
            image = transforms.functional.pil_to_tensor(image).double() / 255
        variance, mean = torch.var_mean(image.double().flatten(1), dim=1, correction=0)
        return torch.stack((mean, variance))


def measure_images(images, inputs, num_workers):
    """(mean, std) by channel of numbered images, of at most 5,000 of them, two tuples of values from 0 to 1.

    Each image counts as much as any other, whatever its size, as it does in training. Raises UserError if none can be
    read, or if a channel is constant.
    """
    measured = ImageStatistics(images, inputs)
    how = {"num_workers": num_workers, "worker_init_fn": utils.ignore_signals}
    own = torch.Generator()  # else it would take a number from those that the networks are made of
    loader = DataLoader(measured, batch_size=None, generator=own, **how)
    found = list(utils.MetricLogger().log_every(loader, 500, "Mean and std:"))
    good = [one for one in found if isinstance(one, torch.Tensor)]
    if not good:
        raise UserError(f"--compute_stats: none of {len(found)} images can be read. Of the first one: {found[0]}")
    means, variances = torch.stack(good).unbind(1)  # [images, C] each
    std = (variances.mean(dim=0) + means.var(dim=0, correction=0)).sqrt()
    if not (std > 1e-9).all():
        constant = (std <= 1e-9).nonzero()[0].item()
        raise UserError(
            f"--compute_stats: channel {constant} (from 0) is the same number in all {len(good)} images. Leave it out, "
            "or name --mean and --std"
        )
    return tuple(means.mean(dim=0).tolist()), tuple(std.tolist())


# ---- samplers and loaders ----


class EpochSampler(Sampler):
    """(epoch, index) of the images that this rank sees in an epoch: every image at most once over all ranks.

    The order follows from (seed, epoch). Step i of n ranks with b images each sees the same n·b images as step i of one
    process with a batch of n·b. What does not fill a last global batch is left out.
    """

    lanes = 1  # see ShardSampler

    def __init__(self, num_images, batch_size, seed=0, rank=0, world_size=1):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.used = num_images // (batch_size * world_size) * batch_size * world_size
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0, sittings=()):
        """Which epoch comes next, and with which of its steps it begins; what came before is not even looked at.

        By how many processes it was done (`sittings`, see ShardSampler) does not matter here.
        """
        self.epoch, self.first = epoch, first_step * self.batch_size * self.world_size

    def __len__(self):
        return max(self.used - self.first, 0) // self.world_size

    def __iter__(self):
        generator = torch.Generator().manual_seed(utils.derive_seed(self.seed, utils.ORDER, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)[: self.used]
        for index in order[self.first + self.rank :: self.world_size].tolist():
            yield self.epoch, index


def train_loader(dataset, batch_size, seed, num_workers, device):
    """Loader of this rank's training batches: (list of crops [B, 3, h, w] uint8, indices [B])."""
    rank, world_size = utils.get_rank(), utils.get_world_size()
    if len(dataset) < batch_size * world_size:
        raise UserError(
            f"the {len(dataset)} training images are fewer than one batch of {batch_size * world_size} "
            f"(--batch_size_per_gpu × --grad_accum_steps {batch_size} × {world_size} processes). Lower it to "
            f"{len(dataset) // world_size}"
        )
    share = (batch_size, seed, rank, world_size)
    shards = isinstance(dataset.images, dino_shards.TarShards)
    if shards and dataset.images.are_sorted():
        utils.log(
            "warning: these shards hold a class or two each. A batch comes from a few shards, so it will have few "
            "classes, of which little is learnt. Pack the images anew, in random order"
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=dino_shards.ShardSampler(dataset.images, *share) if shards else EpochSampler(len(dataset), *share),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=utils.ignore_signals,
    )


def eval_loader(dataset, batch_size, num_workers, device, in_worker=None):
    """Loader of this rank's share of a labelled data set, in order, all shares of one length."""
    sampler = DistributedSampler(dataset, shuffle=False) if utils.get_world_size() > 1 else None
    how = {"num_workers": num_workers, "pin_memory": device.type == "cuda", "worker_init_fn": in_worker}
    return DataLoader(dataset, batch_size, sampler=sampler, **how)


# ---- the sample data set ----

# Photographs inside the scikit-image wheel, each a class. Read as files: skimage.data's functions may download.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
SAMPLE_VERSION = 1  # part of the folder's name: raise it with any change to what is drawn
SAMPLE_TRAIN, SAMPLE_VAL, SAMPLE_SIDE = 240, 60, 64  # crops per photograph, pixels


def find_data(data_path, part=""):
    """The folder that --data_path means, or, for `sample`, the `part` (train or val) of the embedded data set."""
    return os.path.join(sample_dataset(), part) if data_path == "sample" else data_path


def sample_dataset():
    """The folder of the embedded data set, train/<class>/*.png and val/<class>/*.png; built at the first call.

    One class per photograph; training crops come from its left 60 %, validation crops from its right 40 %. Each has its
    own flip, light, contrast and colour baked in, and some are grey, so that colour alone does not give the class away.
    Deterministic. It appears whole or not at all, also when several processes ask at once. Raises UserError if a
    photograph is not installed or the cache can't be written.
    """
    target = os.path.join(utils.cache_dir(), f"sample-v{SAMPLE_VERSION}")
    if os.path.isdir(target):
        return target
    photographs = find_photographs()
    building = None
    try:
        os.makedirs(utils.cache_dir(), exist_ok=True)
        building = tempfile.mkdtemp(prefix=".sample-", dir=utils.cache_dir())
        for number, path in enumerate(photographs):
            write_sample_crops(path, building, random.Random(number))
        os.chmod(building, 0o755)  # mkdtemp's is for its owner only
        os.rename(building, target)
    except OSError as e:
        if not os.path.isdir(target):  # else another process was first, which is as good
            raise UserError(
                f"can't build the sample data set in {utils.cache_dir()}: {e.strerror}. Set DINO_CACHE to a folder you "
                "may write to"
            ) from e
    finally:
        if building:
            shutil.rmtree(building, ignore_errors=True)
    return target


def find_photographs(names=None):
    """Paths of photographs inside scikit-image, by default all PHOTOGRAPHS. Raises UserError if one is not there."""
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise UserError("photographs to do without data come from scikit-image: pip install scikit-image")
    folder = os.path.join(os.path.dirname(spec.origin), "data")
    paths = [os.path.join(folder, name) for name in names or PHOTOGRAPHS]
    missing = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"this scikit-image has no {', '.join(missing)} in {folder}: pip install --force-reinstall scikit-image, "
            "or name images of your own"
        )
    return paths


def write_sample_crops(path, root, rng):
    """Draw a photograph's crops and write them below root/train and root/val."""
    image = dino_images.load_image(path)
    border = round(0.6 * image.width)
    name = Path(path).stem
    for part, number, left, right in (
        ("train", SAMPLE_TRAIN, 0, border),
        ("val", SAMPLE_VAL, border, image.width),
    ):
        folder = os.path.join(root, part, name)
        os.makedirs(folder)
        region = image.crop((left, 0, right, image.height))
        for i in range(number):
            sample_crop(region, rng).save(os.path.join(folder, f"{i:04}.png"))


def sample_crop(region, rng):
    """A random square of the region at SAMPLE_SIDE pixels, with a flip, light and colour of its own, or grey.

    Light and colour vary no more than in the training augmentation. A stronger tint would outlast the augmentation, and
    tell which crops come from one image without a look at what they show: such a set teaches nothing.
    """
    side = round(rng.uniform(0.35, 0.8) * min(region.size))
    left, top = rng.randint(0, region.width - side), rng.randint(0, region.height - side)
    box = (left, top, left + side, top + side)
    crop = region.resize((SAMPLE_SIDE, SAMPLE_SIDE), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    hue, saturation, value = crop.convert("HSV").split()
    turn = rng.randint(-25, 25)  # of 256 levels
    hue = hue.point([(level + turn) % 256 for level in range(256)])
    crop = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    gains = [rng.uniform(0.8, 1.2) for _ in range(3)]  # so that grey photographs get a colour too
    crop = crop.point([min(255, round(gain * level)) for gain in gains for level in range(256)])
    crop = ImageEnhance.Brightness(crop).enhance(rng.uniform(0.6, 1.4))
    crop = ImageEnhance.Contrast(crop).enhance(rng.uniform(0.6, 1.4))
    return ImageOps.grayscale(crop).convert("RGB") if rng.random() < 0.4 else crop
