"""Crops: PIL's are torchvision's to the pixel, and the fast ones the same to within a level or so."""

import io
import itertools
import random
import sys
import types

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, arguments_of, run_script
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as TF

import dino_checkpoints
import dino_cli
import dino_crops
import dino_data
import dino_images
import main_dino
import utils
from dino_data import View
from utils import UserError

cv2 = pytest.importorskip("cv2")
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


@pytest.fixture(scope="module")
def photographs():
    """Five in color, one of them gray, and one that is taller than wide."""
    images = [dino_images.load_image(path) for path in dino_data.find_photographs(PHOTOGRAPHS)]
    images[1] = images[1].convert("L").convert("RGB")
    return images + [images[2].transpose(Image.Transpose.ROTATE_90)]


def augmentation(kind="pil", sizes=(224, 96), locals_number=8):
    return main_dino.DataAugmentationDINO(
        (0.4, 1.0), (0.05, 0.4), locals_number, *sizes, as_uint8=True, augmentation=kind
    )


def crops_of(image, seed, kind="pil", **settings):
    utils.fix_random_seeds(seed)
    return augmentation(kind, **settings)(image)


def plain(image, size=224, **changes):
    """The whole image, but for a border, as a view with nothing done to it but these changes."""
    width, height = image.size
    view = View(size, (9, 4, width - 13, height - 7), flip=False, jitter=(), gray=False, blur=None, solarize=False)
    return view._replace(**changes)


def both(image, view):
    """The view by PIL and by the fast way, as numbers."""
    slow, fast = (dino_crops.RENDERERS[kind](image, [view])[0] for kind in ("pil", "fast"))
    assert slow.shape == fast.shape == (3, view.size, view.size)
    assert slow.dtype == fast.dtype == torch.uint8
    assert slow.is_contiguous()
    assert fast.is_contiguous()
    return slow.int(), fast.int()


def difference(image, view):
    slow, fast = both(image, view)
    return (slow - fast).abs().float()


# ---- with PIL ----


class SeenBlur:
    """The blur of the paper, as a transform of its own."""

    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        if random.random() <= self.p:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return image


def torchvisions(size, scale, blur_p, solarize_p=None):
    """A view of the paper composed of torchvision's own transforms."""
    chain = [
        transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(0.2),
        SeenBlur(blur_p),
    ]
    if solarize_p is not None:
        chain.append(lambda image: ImageOps.solarize(image) if random.random() < solarize_p else image)
    return transforms.Compose([*chain, transforms.PILToTensor()])


def test_crops_are_pixel_by_pixel_those_of_torchvisions_transforms(photographs):
    chains = [torchvisions(64, (0.4, 1), 1.0), torchvisions(64, (0.4, 1), 0.1, 0.2)]
    chains += [torchvisions(40, (0.05, 0.4), 0.5)] * 3
    for seed in range(60):
        image = photographs[seed % len(photographs)]
        got = crops_of(image, seed, sizes=(64, 40), locals_number=3)
        utils.fix_random_seeds(seed)
        for crop, chain in zip(got, chains, strict=True):
            want = chain(image)
            assert crop.dtype == want.dtype
            assert torch.equal(crop, want), seed
            assert crop.is_contiguous()


def test_random_numbers_are_used_up_as_torchvision_does(photographs):
    for kind in ("pil", "fast"):
        crops_of(photographs[0], 5, kind, sizes=(32, 16), locals_number=1)
        got = torch.rand(1), random.random()
        utils.fix_random_seeds(5)
        for chain in (
            torchvisions(32, (0.4, 1), 1.0),
            torchvisions(32, (0.4, 1), 0.1, 0.2),
            torchvisions(16, (0.05, 0.4), 0.5),
        ):
            chain(photographs[0])
        assert got == (torch.rand(1), random.random())


def test_jitter_is_left_out_beyond_what_float32_takes_for_the_probability(monkeypatch, photographs):
    exactly = torch.tensor(0.8)  # a number that torch.rand can give
    monkeypatch.setattr(torch, "rand", lambda n: exactly[None])
    assert augmentation().local_transfo.draw(photographs[0]).jitter  # as torchvision: left out if 0.8 < it, in float32
    exactly = torch.nextafter(exactly, torch.tensor(1.0))
    assert not augmentation().local_transfo.draw(photographs[0]).jitter


@pytest.mark.parametrize("factor", [-0.1, -0.05, -0.003, 0.0, 0.003, 0.0123, 0.1])
def test_the_turn_of_the_hue_is_torchvisions_for_colors_of_all_kinds(factor):
    levels = np.random.RandomState(3).randint(0, 256, (256, 256, 3), dtype=np.uint8)
    grid = np.array(list(itertools.product(range(0, 256, 10), repeat=3)), np.uint8)
    levels[:64] = grid[: 64 * 256].reshape(64, 256, 3)
    levels[64:68] = np.arange(256, dtype=np.uint8)[:, None]  # grays
    image = Image.fromarray(levels)
    assert dino_crops.pil_hue(image, factor).tobytes() == TF.adjust_hue(image, factor).tobytes()


def test_the_way_back_from_hsv_is_pils_for_every_hue_saturation_and_value(monkeypatch):
    saturation, value = np.meshgrid(np.arange(256), np.arange(256))
    for hue in range(256):
        levels = np.stack([np.full_like(value, hue), saturation, value], axis=-1).astype(np.uint8)
        image = Image.frombytes("HSV", (256, 256), levels.tobytes())
        want = image.convert("RGB")
        monkeypatch.setattr(image, "convert", lambda mode, image=image: image)  # is in HSV already
        assert dino_crops.pil_hue(image, 0.0).tobytes() == want.tobytes(), hue


def test_each_transform_takes_a_pil_image_of_any_mode(photographs):
    for kind in ("pil", "fast"):
        augment = augmentation(kind, (48, 32), 1)
        for mode in ("RGB", "L", "RGBA", "CMYK"):
            image = photographs[0].convert(mode)
            assert augment.global_transfo1(image).shape == (3, 48, 48)
            assert augment.local_transfo(image).shape == (3, 32, 32)
        assert augment.global_transfo2(photographs[0]).dtype == torch.uint8


def test_crops_are_normalized_floats_by_default(photographs):
    for kind in ("pil", "fast"):
        utils.fix_random_seeds(1)
        floats = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 1, 32, 16, augmentation=kind)(photographs[0])
        levels = crops_of(photographs[0], 1, kind, sizes=(32, 16), locals_number=1)
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        for crop, level in zip(floats, levels, strict=True):
            torch.testing.assert_close(crop, (level / 255 - mean) / std)


# ---- the fast way: each operation ----


@pytest.mark.parametrize("size", [224, 96])
def test_fast_resizing_differs_by_a_level_at_most(photographs, size):
    for image in photographs:
        off = difference(image, plain(image, size))
        # Newer Pillows resize what is clearly taller than wide along its columns first, which rounds differently.
        tall = image.height > 1.2 * image.width
        assert (off > 1).float().mean() <= (1e-3 if tall else 1e-4)
        assert off.max() <= (8 if tall else 2)
        assert off.mean() <= 0.3


JITTERS = [
    *[("brightness", f) for f in (0.6, 0.9, 1.0, 1.17, 1.4)],
    *[("contrast", f) for f in (0.6, 0.9, 1.0, 1.17, 1.4)],
    *[("saturation", f) for f in (0.8, 0.93, 1.0, 1.2)],
]


@pytest.mark.parametrize("jitter", JITTERS, ids=str)
def test_fast_jitter_of_light_is_pils_to_a_tenth_of_a_level(photographs, jitter):
    for image in photographs[:5]:
        off = difference(image, plain(image, 96, jitter=(jitter,)))
        assert off.mean() <= 0.1
        assert off.quantile(0.999) <= 1


@pytest.mark.parametrize("factor", [-0.1, -0.04, 0.0, 0.04, 0.1])
def test_fast_turn_of_the_hue_is_pils_to_a_level(photographs, factor):
    for image in photographs:
        assert difference(image, plain(image, jitter=(("hue", factor),))).mean() <= 1.0
    gray = difference(photographs[1], plain(photographs[1], jitter=(("hue", factor),)))
    assert gray.max() <= 2


@pytest.mark.parametrize("radius", [0.1, 0.3, 0.5, 0.8, 1.2, 1.4, 1.42, 1.7, 2.0])
def test_fast_blur_is_pils_to_a_level(photographs, radius):
    for image in photographs[:5]:
        off = difference(image, plain(image, blur=radius))
        assert off.mean() <= 0.9
        assert off[:, 8:-8, 8:-8].max() <= 4


def test_fast_blur_keeps_the_light():
    for radius in np.linspace(0, 2, 41):
        assert dino_crops.blur_kernel(radius).sum() == 1
    assert dino_crops.blur_kernel(0.0).tolist() == [1]


def test_fast_blur_of_a_wide_radius_is_pils_too(photographs):
    assert difference(photographs[0], plain(photographs[0], blur=7.0)).mean() <= 1.5


def test_fast_flip_gray_and_solarization_are_exact(photographs):
    # At the size of the box nothing is resized.
    image = photographs[2].crop((50, 50, 146, 146))
    whole = View(96, (0, 0, 96, 96), flip=False, jitter=(), gray=False, blur=None, solarize=False)
    for changes in ({}, {"flip": True}, {"solarize": True}, {"solarize": True, "flip": True}):
        slow, fast = both(image, whole._replace(**changes))
        assert torch.equal(slow, fast), changes
    slow, fast = both(image, whole._replace(gray=True, flip=True))
    assert (slow - fast).abs().max() <= 1  # the luminance is rounded at other digits
    assert torch.equal(fast[0], fast[2])


# ---- the fast way: whole crops ----


def test_fast_crops_of_a_seed_are_pils_to_two_levels(photographs):
    means = []
    for seed in range(30):
        image = photographs[seed % len(photographs)]
        pairs = zip(crops_of(image, seed), crops_of(image, seed, "fast"), strict=True)
        means += [(a.int() - b.int()).abs().float().mean().item() for a, b in pairs]
    assert np.mean(means) <= 0.7
    assert max(means) <= 2.5


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "I;16", "wide", "one pixel"])
def test_odd_images_give_the_crops_that_pil_gives(tmp_path, photographs, mode):
    image = photographs[2].resize((90, 60))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
    elif mode in ("wide", "one pixel"):
        image = image.resize((700, 3) if mode == "wide" else (1, 1))
    else:
        image = image.convert(mode)
    for suffix in [".png"] * (mode != "CMYK") + [".jpg"] * (mode in ("L", "CMYK", "wide", "one pixel")):
        image.save(tmp_path / f"x{suffix}")
        slow = crops_of(dino_images.load_image(tmp_path / f"x{suffix}"), 1, sizes=(48, 32))
        fast = crops_of(dino_images.open_image(tmp_path / f"x{suffix}"), 1, "fast", sizes=(48, 32))
        for a, b in zip(slow, fast, strict=True):
            assert (a.int() - b.int()).abs().float().mean() <= 2.5


def jpeg(path, image, **settings):
    image.save(path, quality=95, **settings)
    return path


def test_jpegs_are_decoded_to_pils_pixels_and_not_turned(tmp_path, photographs):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    for settings in ({}, {"progressive": True}, {"subsampling": 0}, {"exif": exif}):
        path = jpeg(tmp_path / "x.jpg", photographs[2], **settings)
        pixels = dino_crops.decode_reduced(dino_images.open_image(path), [plain(photographs[2])])
        assert pixels.shape == (1, 3, photographs[2].height, photographs[2].width)
        np.testing.assert_array_equal(pixels[0].permute(1, 2, 0), np.asarray(dino_images.load_image(path)))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_in_other_colors_are_pils_pixels_too(tmp_path, photographs, mode):
    levels = np.random.RandomState(0).randint(0, 256, (40, 50, 4), dtype=np.uint8)
    image = photographs[2].convert("L") if mode == "L" else Image.frombytes("CMYK", (50, 40), levels.tobytes())
    path = jpeg(tmp_path / "x.jpg", image)
    pixels = dino_crops.decode_reduced(dino_images.open_image(path), [plain(image)])
    np.testing.assert_array_equal(pixels[0].permute(1, 2, 0), np.asarray(dino_images.load_image(path)))


def test_boxes_are_drawn_before_anything_is_decoded(tmp_path, photographs):
    image = dino_images.open_image(jpeg(tmp_path / "x.jpg", photographs[2]))
    utils.fix_random_seeds(3)
    view = augmentation("fast").local_transfo.draw(image)
    assert image.tile
    utils.fix_random_seeds(3)
    assert view == augmentation("pil").local_transfo.draw(photographs[2])


@pytest.mark.parametrize("kind", ["cut", "one byte", "text", "empty", "png"])
def test_damaged_files_are_the_same_error_either_way(tmp_path, photographs, kind):
    path = tmp_path / "bad.jpg"
    whole = jpeg(tmp_path / "good.jpg", photographs[2]).read_bytes()
    png = io.BytesIO()
    photographs[2].save(png, "PNG")
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "one byte": whole[:1],
            "text": b"no image",
            "empty": b"",
            "png": png.getvalue()[:9000],
        }[kind]
    )
    with pytest.raises(UserError) as slow:
        crops_of(dino_images.load_image(path), 0)
    with pytest.raises(UserError) as fast:
        crops_of(dino_images.open_image(path), 0, "fast")
    assert str(path) in str(fast.value)
    assert str(slow.value) == str(fast.value)


# ---- large photographs ----


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A JPEG of 3001 × 1801, sharp to the pixel."""
    (path,) = dino_data.find_photographs(["coffee.png"])
    image = dino_images.load_image(path).resize((3001, 1801), Image.Resampling.BICUBIC)
    levels = np.asarray(image).astype(int) + np.random.RandomState(0).randint(-12, 13, (1801, 3001, 1))
    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return jpeg(tmp_path_factory.mktemp("large") / "x.jpg", image)


@pytest.mark.parametrize(
    ("sides", "size", "decoded"),
    [((896, 1800), 224, 1500), ((895, 1800), 224, 3001), ((1800, 447), 112, 3001), ((1024, 1500), 128, 751),
     ((1792, 1792), 96, 376), ((200, 200), 224, 3001)],
)  # fmt: skip
def test_a_jpeg_is_decoded_as_small_as_leaves_every_crop_twice_its_pixels(large, sides, size, decoded):
    boxes = [(0, 0, sides[0], sides[1]), (0, 0, 1800, 1800)]
    views = [View(size, box, False, (), False, None, False) for box in boxes]
    shape = dino_crops.decode_reduced(dino_images.open_image(large), views).shape
    assert abs(shape[-1] - decoded) <= 1
    assert abs(shape[-2] - decoded * 1801 / 3001) <= 1


def test_reduced_decoding_shows_in_a_level_or_so(large):
    whole = dino_images.load_image(large)
    for box in ((1500, 700, 2413, 1599), (3, 1, 2994, 1793)):
        view = View(96, box, False, (), False, None, False)
        assert dino_crops.decode_reduced(dino_images.open_image(large), [view]).shape[-1] < 1501
        slow, fast = (r(i, [view])[0].int() for r, i in (
            (dino_crops.render_pil, whole), (dino_crops.render_fast, dino_images.open_image(large))))  # fmt: skip
        assert (slow - fast).abs().float().mean() <= 1.5
        assert abs((fast - slow).float().mean()) <= 0.3


def test_other_formats_are_not_reduced(tmp_path, large):
    dino_images.load_image(large).resize((900, 900)).save(tmp_path / "x.png", compress_level=1)
    view = View(32, (0, 0, 900, 900), False, (), False, None, False)
    assert dino_crops.decode_reduced(dino_images.open_image(tmp_path / "x.png"), [view]).shape[-1] == 900


def test_a_damaged_large_jpeg_is_an_error(tmp_path, large):
    path = tmp_path / "cut.jpg"
    path.write_bytes(large.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        dino_crops.render_fast(
            dino_images.open_image(path), [View(32, (0, 0, 900, 900), False, (), False, None, False)]
        )


# ---- runs ----


def fast_run(root, output, *flags):
    """A run of one epoch as a process; its checkpoint."""
    words = [*SMALL_RUN, "--epochs", "1", "--data_path", root / "train", "--augmentation", "fast", *flags]
    run_script("main_dino.py", *words, "--output_dir", output)
    return torch.load(output / "checkpoint.pth", weights_only=True)


@pytest.mark.slow
def test_fast_runs_are_the_same_with_and_without_workers(tiny_root, tmp_path):
    one, other = (fast_run(tiny_root, tmp_path / str(n), "--num_workers", n) for n in (0, 2))
    assert one["args"]["augmentation"] == "fast"
    for name, tensor in one["student"].items():
        assert torch.equal(tensor, other["student"][name]), name


def test_a_run_asks_for_fast_crops_of_files_that_are_not_decoded(tiny_root):
    flags = [*SMALL_RUN, "--data_path", tiny_root / "train"]
    batches = {}
    for kind in ("pil", "fast"):
        args = arguments_of(main_dino, *flags, "--augmentation", kind)
        loader, _ = dino_data.build_data(args, torch.device("cpu"))
        loader.sampler.set_epoch(0)
        batches[kind] = next(iter(loader))
        assert loader.dataset.images.open(0).tile  # what is decoded, and how far, depends on the crops
    slow, fast = (batches[kind][0] for kind in ("pil", "fast"))
    off = [(a.int() - b.int()).abs().float().mean().item() for a, b in zip(slow, fast, strict=True)]
    assert 0 < max(off) < 2


def test_pil_is_the_default():
    assert arguments_of(main_dino).augmentation == "pil"
    assert main_dino.DataAugmentationDINO((0.4, 1), (0.05, 0.4), 0).render is dino_crops.render_pil


def test_without_opencv_the_remedy_is_named_before_the_work(monkeypatch, capsys, tmp_path):
    dino_crops.opencv.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    flags = ["--device", "cpu", "--augmentation", "fast", "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["main_dino.py", *flags])
    with pytest.raises(SystemExit) as ended:
        dino_cli.run(main_dino.train_dino, main_dino.get_args_parser(), "")
    assert ended.value.code == 2
    remedy = "--augmentation fast takes OpenCV, 4.11 or newer: pip install opencv-python-headless"
    assert capsys.readouterr().err == f"error: {remedy}\n"
    assert not (tmp_path / "run").exists()


def test_an_old_opencv_is_as_good_as_none(monkeypatch):
    dino_crops.opencv.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace())
    with pytest.raises(UserError, match=r"4\.11 or newer: pip install"):
        dino_crops.opencv()


def test_what_opencv_can_not_decode_is_left_to_pil(monkeypatch, tmp_path, photographs):
    whole = jpeg(tmp_path / "x.jpg", photographs[2]).read_bytes()
    assert dino_crops.decode_whole_jpeg(io.BytesIO(whole)).shape == (photographs[2].height, photographs[2].width, 3)
    for data in (b"no JPEG" + b"\xff\xd9", b"", whole[:-2], whole + b"more"):
        assert dino_crops.decode_whole_jpeg(io.BytesIO(data)) is None

    def refuse(*_):
        raise cv2.error("too large")

    monkeypatch.setattr(cv2, "imdecode", refuse)
    assert dino_crops.decode_whole_jpeg(io.BytesIO(whole)) is None


def test_opencv_makes_no_threads():
    dino_crops.opencv.cache_clear()
    cv2.setNumThreads(2)
    assert dino_crops.opencv() is cv2
    assert cv2.getNumThreads() == 1


def test_a_run_does_not_go_on_with_the_other_crops_unasked():
    before, now = (arguments_of(main_dino, "--augmentation", kind) for kind in ("pil", "fast"))
    networks = {name: {"norm.weight": torch.zeros(1)} for name in ("student", "teacher")}
    checkpoint = {**networks, "epoch": 1, "args": utils.plain_args(before)}
    with pytest.raises(UserError, match=r"made with --augmentation pil; this run has --augmentation fast, .*result"):
        dino_checkpoints.check_resumable("x.pth", checkpoint, now)
    now.allow_changed_args = True
    dino_checkpoints.check_resumable("x.pth", checkpoint, now)
