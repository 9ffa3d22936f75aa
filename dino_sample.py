"""The sample data set: crops of photographs that come with scikit-image, so that nothing has to be downloaded."""

import importlib.util
import os
import random
import shutil
import tempfile
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

import dino_images
import utils
from utils import UserError

# Photographs in the scikit-image wheel, one class each. Read as files: skimage.data's functions can download.
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
SAMPLE_VERSION = 1  # part of the folder's name: raise it if anything drawn changes
SAMPLE_TRAIN, SAMPLE_VAL, SAMPLE_SIDE = 240, 60, 64  # crops per photograph, pixels


def sample_dataset():
    """The folder of the sample data set, train/<class>/*.png and val/<class>/*.png; built at the first call.

    One class per photograph: training crops are from its left 60 %, validation crops from its right 40 %. Each crop has
    its own flip, brightness, contrast and color, and some are gray, so that color alone does not tell the class.
    Deterministic. It appears whole or not at all, also for several processes. Raises UserError if a photograph is not
    installed or the cache can't be written.
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
        os.chmod(building, 0o755)  # mkdtemp makes it private
        os.rename(building, target)
    except OSError as e:
        if not os.path.isdir(target):  # otherwise another process was first
            raise UserError(
                f"can't build the sample data set in {utils.cache_dir()}: {e.strerror}. Set DINO_CACHE to a folder "
                "that you can write to"
            ) from e
    finally:
        if building:
            shutil.rmtree(building, ignore_errors=True)
    return target


def find_photographs(names=None):
    """Paths of photographs in scikit-image, default: PHOTOGRAPHS. Raises UserError if one is missing."""
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise UserError("the sample photographs are in scikit-image: pip install scikit-image")
    folder = os.path.join(os.path.dirname(spec.origin), "data")
    paths = [os.path.join(folder, name) for name in names or PHOTOGRAPHS]
    missing = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"this scikit-image has no {', '.join(missing)} in {folder}: pip install --force-reinstall scikit-image, "
            "or use images of your own"
        )
    return paths


def write_sample_crops(path, root, rng):
    """Draw the crops of a photograph and write them below root/train and root/val."""
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
    """A random square of the region at SAMPLE_SIDE pixels with its own flip, brightness and color, or gray.

    Brightness and color vary no more than in the training augmentation. A stronger tint would survive the augmentation
    and tell which crops are of one image without a look at their content.
    """
    side = round(rng.uniform(0.35, 0.8) * min(region.size))
    left, top = rng.randint(0, region.width - side), rng.randint(0, region.height - side)
    box = (left, top, left + side, top + side)
    crop = region.resize((SAMPLE_SIDE, SAMPLE_SIDE), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    hue, saturation, value = crop.convert("HSV").split()
    turn = rng.randint(-25, 25)  # of 256
    hue = hue.point([(level + turn) % 256 for level in range(256)])
    crop = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    gains = [rng.uniform(0.8, 1.2) for _ in range(3)]  # gray photographs get a color, too
    crop = crop.point([min(255, round(gain * level)) for gain in gains for level in range(256)])
    crop = ImageEnhance.Brightness(crop).enhance(rng.uniform(0.6, 1.4))
    crop = ImageEnhance.Contrast(crop).enhance(rng.uniform(0.6, 1.4))
    return ImageOps.grayscale(crop).convert("RGB") if rng.random() < 0.4 else crop
