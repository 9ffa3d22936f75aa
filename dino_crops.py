"""One view of an image (BYOL's augmentations, section 3.2): drawn first, then rendered by PIL, OpenCV, or torch.

Drawing consumes random numbers exactly as the release's transforms do. Rendering has no randomness, so that the same
views can be rendered exactly (`pil`) or faster (`fast`).
"""

import argparse
import contextlib
import functools
import math
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

import dino_images
import utils
from dino_cli import between, share
from utils import UserError

# ---- flags ----


class Strengths(NamedTuple):
    """How strongly crops are augmented, as the flags below say. The defaults are BYOL's, which the paper uses."""

    color_jitter: tuple = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    color_jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: tuple = (1.0, 0.1, 0.5)  # of the first global, the second global, and a local crop
    blur_radius: tuple = (0.1, 2.0)  # in pixels of the crop
    solarize_p: float = 0.2  # of the second global crop


PAPER = Strengths()


def flags():
    """The flags of the augmentation, as a parser for `parents=[...]`."""
    p = {"type": share, "metavar": "P"}
    parser = argparse.ArgumentParser(add_help=False)
    # fmt: off
    group = parser.add_argument_group("augmentation")
    group.add_argument("--augmentation", default="pil", choices=["pil", "fast"], help="""pil: the paper's
        pixels, bit for bit. fast: OpenCV, the same crops to within a level or two, several times as fast.""")
    group.add_argument("--color_jitter", default=PAPER.color_jitter, type=between(0, 10, float), nargs=4,
        metavar=("B", "C", "S", "H"), help="""Largest change of brightness, contrast and saturation (0.4: factors from
        0.6 to 1.4), and of hue (at most 0.5, half the color wheel). 0 turns one off.""")
    group.add_argument("--color_jitter_p", default=PAPER.color_jitter_p, **p, help="Share of crops with color jitter.")
    group.add_argument("--gray_p", default=PAPER.gray_p, **p, help="Share of crops that become gray.")
    group.add_argument("--blur_p", default=PAPER.blur_p, type=share, nargs=3, metavar=("FIRST", "SECOND", "LOCAL"),
        help="Share of blurred crops: of first and second global crops, and of local ones. 0 0 0 turns blur off.")
    group.add_argument("--blur_radius", default=PAPER.blur_radius, type=between(0, 1e4, float), nargs=2,
        metavar=("MIN", "MAX"), help="Gaussian blur in pixels of the crop; for crops up to 64 pixels use 0.1 0.5.")
    group.add_argument("--solarize_p", default=PAPER.solarize_p, **p,
        help="Share of second global crops whose bright values are inverted.")
    # fmt: on
    return parser


def check_flags(args):
    """Raise UserError for flags of the augmentation that cannot be followed."""
    if args.augmentation == "fast":
        opencv()  # is it installed?
    if args.color_jitter[3] > 0.5:
        raise UserError(f"--color_jitter: a hue of {args.color_jitter[3]} is more than half the color wheel. Use 0.5")
    low, high = args.blur_radius
    if low > high:
        raise UserError(f"--blur_radius {low} {high}: put the smaller number first")
    if args.augmentation == "fast" and high > 20:  # its kernel has steps of 1/256
        raise UserError(f"--augmentation fast has no blur of {high} pixels. Use --blur_radius up to 20, or pil")


def strengths_of(args):
    """The Strengths that a run's arguments name."""
    return Strengths(*(getattr(args, name) for name in Strengths._fields))


# ---- random choices ----


class View(NamedTuple):
    """All that is random about one crop of an image."""

    size: int  # side of the crop in pixels
    box: tuple  # left, top, right, bottom in the image
    flip: bool
    jitter: tuple  # ((operation, factor), ...) in their order; () for none
    gray: bool
    blur: float | None  # radius in pixels of the crop
    solarize: bool


class RandomView:
    """PIL image or uint8 [H, W, 3] -> a crop of it, resized to `size` and augmented, as uint8 [3, size, size].

    `draw` consumes torch's random numbers as torchvision's transforms do, in their order, and Python's as blur and
    solarization do. Each is drawn into the same tensor: for small crops, torchvision's own drawing takes as long as all
    of the rendering.
    """

    def __init__(self, size, scale, blur, solarization=None, augmentation="pil", strengths=PAPER):
        self.size, self.scale, self.blur, self.solarization = size, scale, blur, solarization
        self.render = RENDERERS[augmentation]
        colors = transforms.ColorJitter(*strengths.color_jitter)
        self.jitter = [getattr(colors, name) for name in JITTER]  # None: turned off
        # As float32, since torch compares them with float32 numbers.
        self.jitter_p, self.gray_p = torch.tensor((strengths.color_jitter_p, strengths.gray_p)).tolist()

    def __call__(self, image):
        return self.render(image, [self.draw(image)])[0]

    def draw(self, image):
        """A View for an image, of which only the size matters."""
        number = torch.empty(1)
        return View(
            size=self.size,
            box=draw_box(*dino_images.size_of(image), self.scale, number),
            flip=number.uniform_().item() < 0.5,
            jitter=self.draw_jitter(number) if number.uniform_().item() <= self.jitter_p else (),
            gray=number.uniform_().item() < self.gray_p,
            blur=self.blur.draw(),
            solarize=self.solarization is not None and self.solarization.draw(),
        )

    def draw_jitter(self, number):
        order = torch.randperm(4).tolist()
        factors = [limits and number.uniform_(*limits).item() for limits in self.jitter]
        return tuple((JITTER[i], factors[i]) for i in order if factors[i] is not None)


JITTER = ("brightness", "contrast", "saturation", "hue")
# torchvision's limits of a crop's width divided by its height, as it stores them: logarithms in float32.
LOG_RATIO = torch.log(torch.tensor((3 / 4, 4 / 3))).tolist()


def draw_box(width, height, scale, number):
    """RandomResizedCrop's (left, top, right, bottom) in an image. `number` is a float32 tensor [1] to draw into."""
    whole = torch.empty(1, dtype=torch.int64)
    for _ in range(10):
        area = width * height * number.uniform_(*scale).item()
        ratio = number.uniform_(*LOG_RATIO).exp_().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = whole.random_(0, height - h + 1).item(), whole.random_(0, width - w + 1).item()
            return left, top, left + w, top + h
    # No box fits: the middle, as wide or as high as allowed.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


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
    """Invert values of 128 and above, with probability p."""

    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        return ImageOps.solarize(image) if self.draw() else image

    def draw(self):
        return random.random() < self.p


def eval_transform(image_size=224, inputs=utils.RGB):
    """PIL image -> uint8 [3, image_size, image_size]: resize to 8/7 of that (256 for 224), bicubic, then center crop.

    For inputs other than RGB: what dino_images.decode returns -> normalized floats of all channels.
    """
    return transforms.Compose(
        [
            shorten,
            transforms.Resize(image_size * 8 // 7, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(image_size),
            *last_transforms(inputs),
        ]
    )


def shorten(image):
    """The middle of an image more than 16 times as long as it is wide: all of it, resized, could fill the memory."""
    width, height = dino_images.size_of(image)
    if max(height, width) <= 16 * min(height, width):
        return image
    return transforms.functional.center_crop(image, [min(side, 2 * min(height, width)) for side in (height, width)])


def image_transform(image_size, inputs=utils.RGB, exif=False):
    """PIL image (or what dino_images.open_image returns) -> normalized floats [C, image_size, image_size]."""
    decode = functools.partial(dino_images.decode, inputs=inputs)
    steps = [decode, eval_transform(image_size, inputs), inputs.normalize]
    return transforms.Compose([ImageOps.exif_transpose, *steps] if exif else steps)


def last_transforms(inputs):
    """The last steps of a transform: to uint8 [3, H, W] for photographs, to normalized floats [C, H, W] for others."""
    steps = [transforms.PILToTensor() if inputs.photographs else to_int16]
    return steps if inputs == utils.RGB else [*steps, inputs.normalize]


def prepare(image, inputs):
    """An opened image as `RENDERERS` take it: photographs undecoded, since views are drawn before decoding."""
    lazy = inputs.photographs and not isinstance(image, dino_images.ArrayFile)
    return image if lazy else dino_images.decode(image, inputs)


# ---- rendering with PIL ----


def render_pil(image, views):
    """Views of an image, each uint8 [3, size, size]: the same pixels as torchvision's transforms on PIL images."""
    image = dino_images.to_rgb(image)
    return [render_pil_view(image, view) for view in views]


def render_pil_view(image, view):
    crop = image.crop(view.box).resize((view.size, view.size), Image.Resampling.BICUBIC)
    if view.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation, factor in view.jitter:
        crop = PIL_JITTER[operation](crop, factor)
    if view.gray:
        crop = crop.convert("L")
    if view.blur is not None:
        crop = crop.filter(ImageFilter.GaussianBlur(view.blur))
    # np.asarray(crop) takes a quarter longer, which counts for small crops.
    pixels = np.frombuffer(crop.tobytes(), np.uint8).reshape(view.size, view.size, -1)  # last: 3 or, gray, 1
    if view.solarize:
        pixels = np.minimum(pixels, ~pixels)  # ~ is 255 - value
    planes = pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.concatenate([planes] * 3) if view.gray else planes.copy())


def pil_contrast(image, factor):
    """ImageEnhance.Contrast: blend with the mean gray of the image."""
    levels = np.frombuffer(image.convert("L").tobytes(), np.uint8)
    mean = int(levels.sum() / levels.size + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean,) * 3), image, factor)


def pil_hue(image, factor):
    """torchvision's hue shift, in PIL's HSV.

    Back from HSV to RGB, PIL's formula is applied to all pixels at once, for large crops in a third of PIL's time: a
    channel is v * (1 - s * w), where w from 0 to 1 is a function of the hue. Equal to PIL for each of the 256^3 colors.
    """
    colors = np.frombuffer(bytearray(image.convert("HSV").tobytes()), np.uint8).reshape(-1, 3)
    levels, shift = colors[:, 0].tobytes(), int(factor * 255) % 256
    value = colors[:, 2].astype(np.float32)
    drop = colors[:, 1] * value / (-255 * 255)
    value += 0.5  # rounds
    for channel, table in enumerate(hue_weights()):
        weight = np.frombuffer(levels.translate(table[shift : shift + 256]), np.uint8)
        colors[:, channel] = weight * drop + value
    return Image.frombytes("RGB", image.size, colors.tobytes())


@functools.cache
def hue_weights():
    """w * 255 of each channel for each hue, twice around the color wheel: 3 x 512 bytes."""
    sixth, within = np.divmod(np.arange(256) * 6, 255)
    zero, one = np.zeros_like(within), np.full_like(within, 255)
    up, down = within, 255 - within
    red = np.choose(sixth % 6, [zero, up, one, one, down, zero])
    green = np.choose(sixth % 6, [down, zero, zero, up, one, one])
    blue = np.choose(sixth % 6, [one, one, down, zero, zero, up])
    return [np.tile(weights, 2).astype(np.uint8).tobytes() for weights in (red, green, blue)]


PIL_JITTER = {
    "brightness": lambda image, factor: Image.blend(Image.new("RGB", image.size), image, factor),
    "contrast": pil_contrast,
    "saturation": lambda image, factor: Image.blend(image.convert("L").convert("RGB"), image, factor),
    "hue": pil_hue,
}


# ---- rendering with torch and OpenCV ----


TRUNCATE = 0.498  # subtracted, since PIL truncates and OpenCV rounds


@functools.cache
def opencv():
    """The module cv2 without threads, since each loader is a process. Raises UserError if it is not installed."""
    try:
        import cv2

        cv2.IMREAD_COLOR_RGB  # noqa: B018 (new in OpenCV 4.11)
    except (ImportError, AttributeError) as e:
        remedy = "pip install opencv-python-headless, or use --augmentation pil"
        raise UserError(f"--augmentation fast needs OpenCV 4.11 or newer: {remedy}") from e
    cv2.setNumThreads(0)
    return cv2


def render_fast(image, views):
    """Views of an image, each uint8 [3, size, size]: render_pil's to within a level or two, much faster.

    A JPEG that is not decoded yet (dino_images.open_image) is decoded at 1/2, 1/4 or 1/8 of its size if each view still
    has to be shrunk by 2 or more. Boxes are then rounded to whole pixels of the smaller image.
    """
    width, _ = dino_images.size_of(image)
    pixels = decode_reduced(image, views)  # [H, W, 3]
    shrunk = round(width / pixels.shape[1])
    if shrunk > 1:
        views = [view._replace(box=tuple(round(edge / shrunk) for edge in view.box)) for view in views]
    return [render_fast_view(pixels, view) for view in views]


def decode_reduced(image, views):
    """An image as uint8 [H, W, 3], decoded unless it is, reduced where these views allow it."""
    if isinstance(image, np.ndarray):
        return image
    pixels = None
    if image.format == "JPEG" and image.mode == "RGB" and image.tile:  # not decoded yet, and a plain one
        spare = min(min(v.box[2] - v.box[0], v.box[3] - v.box[1]) / v.size for v in views)
        shrink = max(k for k in (1, 2, 4, 8) if k == 1 or spare >= 2 * k)
        if shrink > 1:
            image.draft(None, (image.width // shrink, image.height // shrink))
        else:
            pixels = decode_whole_jpeg(image.fp)
    return np.array(dino_images.to_rgb(image)) if pixels is None else pixels


def decode_whole_jpeg(file):
    """An open JPEG file -> uint8 [H, W, 3], as PIL decodes it but faster; None if anything about it is unusual."""
    cv2 = opencv()
    file.seek(0)
    data = file.read()
    if not data.endswith(b"\xff\xd9"):  # truncated: OpenCV would fill the rest with gray
        return None
    with contextlib.suppress(cv2.error):
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def render_fast_view(pixels, view):
    cv2 = opencv()
    left, top, right, bottom = view.box
    region = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right]))[None]
    region = region.permute(0, 3, 1, 2)  # [1, 3, h, w], for torch in the format channels_last, which is faster
    crop = F.interpolate(region, (view.size, view.size), mode="bicubic", antialias=True)
    crop = crop.numpy()[0].transpose(1, 2, 0)  # [size, size, 3]
    for operation, factor in view.jitter:
        crop = FAST_JITTER[operation](cv2, crop, factor)
    if view.flip:
        crop = cv2.flip(crop, 1)
    if view.gray:
        crop = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)  # [size, size]
    if view.blur is not None:
        kernel = blur_kernel(view.blur)
        crop = cv2.sepFilter2D(crop, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    if view.solarize:
        crop = np.minimum(crop, ~crop)  # ~ is 255 - value
    planes = np.empty((3, view.size, view.size), np.uint8)
    if view.gray:
        planes[:] = crop
    else:
        cv2.split(crop, list(planes))  # into them
    return torch.from_numpy(planes)


def fast_contrast(cv2, crop, factor):
    mean = int(cv2.mean(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(crop, factor, crop, 0, (1 - factor) * mean - TRUNCATE)


def fast_saturation(cv2, crop, factor):
    gray = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(crop, factor, gray, 1 - factor, -TRUNCATE)


def fast_hue(cv2, crop, factor):
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(factor * 255) % 256)  # wraps at 256
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


FAST_JITTER = {
    "brightness": lambda cv2, crop, factor: cv2.addWeighted(crop, factor, crop, 0, -TRUNCATE),
    "contrast": fast_contrast,
    "saturation": fast_saturation,
    "hue": fast_hue,
}


def blur_kernel(radius):
    """PIL's Gaussian kernel of this radius: three box blurs with fractional ends.

    In steps of 1/256, as OpenCV computes, with a sum of exactly 1.
    """
    kernel = [round(256 * weight) for weight in exact_blur_kernel(radius)]
    kernel[len(kernel) // 2] += 256 - sum(kernel)
    return np.array([weight / 256 for weight in kernel if weight > 0])


def exact_blur_kernel(radius):
    variance = radius * radius / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    total = 2 * (whole + part) + 1
    box = [part / total, *[1 / total] * (2 * whole + 1), part / total]
    return convolve(convolve(box, box), box)


def convolve(a, b):
    """np.convolve for a few numbers, for which it takes longer than the blur."""
    out = [0.0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b, i):
            out[j] += x * y
    return out


# ---- rendering N channels ----


def render_planes(image, views):
    """Views of an image, float32 [C, H, W] from 0 to 1, each as int16 [C, size, size] (see `to_int16`).

    The steps of render_pil on floats, clipped to 0 and 1. Gray is the mean over channels; hue jitter is skipped.
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
    if view.gray:
        crop = crop.mean(dim=0, keepdim=True).expand_as(crop)
    if view.blur is not None:
        crop = blur_planes(crop, view.blur)
    if view.solarize:
        crop = torch.minimum(crop, 1 - crop)
    return to_int16(crop)


# What a crop [C, H, W] is blended with: all of it at a factor of 0, nothing of it at 1.
PLANES_JITTER = {
    "brightness": torch.zeros_like,
    "contrast": lambda crop: crop.mean().expand_as(crop),
    "saturation": lambda crop: crop.mean(dim=0, keepdim=True).expand_as(crop),
}


def blur_planes(crop, radius):
    kernel = crop.new_tensor(exact_blur_kernel(radius)).expand(len(crop), 1, 1, -1)  # [C, 1, 1, length]
    reach = kernel.shape[-1] // 2
    crop = F.pad(crop, (reach, reach, reach, reach), mode="replicate")[None]
    for one_way in (kernel, kernel.transpose(2, 3)):
        crop = F.conv2d(crop, one_way, groups=len(kernel))  # depthwise
    return crop[0]


def to_int16(values):
    """Values from 0 to 1 -> int16 from -32,768: half the bytes of floats, and lossless for 16-bit images.

    Not uint16, which torch barely supports. utils.normalize converts it back.
    """
    return values.clamp(0, 1).mul(65535).round().sub(32768).to(torch.int16)


RENDERERS = {"pil": render_pil, "fast": render_fast, "planes": render_planes}
