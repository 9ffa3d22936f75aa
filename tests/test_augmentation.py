"""dino_crops.py: PIL crops equal torchvision's pixel by pixel, and fast crops are within a level or so of them."""

import io
import itertools
import random
import sys
import types

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, arguments_of, ending
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as TF

import dino_checkpoints
import dino_crops
import dino_data
import dino_images
import dino_sample
import main_dino
import utils
from dino_crops import View
from utils import UserError

cv2 = pytest.importorskip("cv2")
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
KINDS = ("pil", "fast")


@pytest.fixture(scope="module")
def photographs():
    """Five color photographs, one of them made gray, and one that is taller than wide."""
    images = [dino_images.load_image(path) for path in dino_sample.find_photographs(PHOTOGRAPHS)]
    images[1] = images[1].convert("L").convert("RGB")
    return images + [images[2].transpose(Image.Transpose.ROTATE_90)]


def augmentation(kind="pil", sizes=(224, 96), number=8, as_uint8=True, strengths=dino_crops.PAPER):
    how = {"augmentation": kind, "strengths": strengths, "as_uint8": as_uint8}
    sizes = {"global_crops_size": sizes[0], "local_crops_size": sizes[1]}
    return main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), number, **sizes, **how)


def crops_of(image, seed, kind="pil", **settings):
    utils.fix_random_seeds(seed)
    return augmentation(kind, **settings)(image)


def view_of(size, box, **changes):
    """A plain view of a box in an image, except for `changes`."""
    view = View(size, box, flip=False, jitter=(), gray=False, blur=None, solarize=False)
    return view._replace(**changes)


def difference(image, size=224, whole=False, **changes):
    """Absolute difference in levels [3, size, size] of a view of an image, rendered with PIL and fast."""
    border = (0, 0, 0, 0) if whole else (9, 4, 13, 7)
    box = (*border[:2], image.width - border[2], image.height - border[3])
    slow, fast = (dino_crops.RENDERERS[kind](image, [view_of(size, box, **changes)])[0] for kind in KINDS)
    for crop in (slow, fast):
        assert crop.shape == (3, size, size)
        assert crop.dtype == torch.uint8
        assert crop.is_contiguous()
    return (slow.int() - fast.int()).abs().float()


def mean_differences(some, others):
    return [(a.int() - b.int()).abs().float().mean().item() for a, b in zip(some, others, strict=True)]


# ---- PIL ----


class PublishedBlur:
    """The blur of the release, as a transform."""

    def __init__(self, p, radius):
        self.p, self.radius = p, radius

    def __call__(self, image):
        if random.random() <= self.p:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(*self.radius)))
        return image


def torchvision_view(
    size, scale, blur_p, solarize_p=None, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, radius=(0.1, 2.0)
):
    """A view of the release, composed of torchvision's transforms."""
    chain = [
        transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(*jitter)], p=jitter_p),
        transforms.RandomGrayscale(gray_p),
        PublishedBlur(blur_p, radius),
    ]
    if solarize_p is not None:
        chain.append(lambda image: ImageOps.solarize(image) if random.random() < solarize_p else image)
    return transforms.Compose([*chain, transforms.PILToTensor()])


def torchvision_views(sizes, number):
    large, small = sizes
    views = [torchvision_view(large, (0.4, 1), 1.0), torchvision_view(large, (0.4, 1), 0.1, 0.2)]
    return views + [torchvision_view(small, (0.05, 0.4), 0.5)] * number


def test_crops_equal_torchvisions_pixel_by_pixel(photographs):
    for seed in range(40):
        image = photographs[seed % len(photographs)]
        got = crops_of(image, seed, sizes=(64, 40), number=3)
        utils.fix_random_seeds(seed)
        for crop, view in zip(got, torchvision_views((64, 40), 3), strict=True):
            assert torch.equal(crop, view(image)), seed
            assert crop.dtype == torch.uint8
            assert crop.is_contiguous()


def test_crops_of_other_strengths_equal_torchvisions(photographs):
    strengths = dino_crops.Strengths((0.8, 0.5, 0.0, 0.3), 0.6, 0.4, (0.3, 0.9, 0.2), (0.2, 0.6), 0.7)
    how = {"jitter": (0.8, 0.5, 0.0, 0.3), "jitter_p": 0.6, "gray_p": 0.4, "radius": (0.2, 0.6)}
    views = [torchvision_view(32, (0.4, 1), 0.3, **how), torchvision_view(32, (0.4, 1), 0.9, 0.7, **how)]
    views.append(torchvision_view(16, (0.05, 0.4), 0.2, **how))
    for seed in range(40):
        image = photographs[seed % len(photographs)]
        got = crops_of(image, seed, sizes=(32, 16), number=1, strengths=strengths)
        utils.fix_random_seeds(seed)
        assert all(torch.equal(crop, view(image)) for crop, view in zip(got, views, strict=True)), seed


def test_boxes_of_very_long_images_are_torchvisions():
    for seed, size in enumerate([(600, 3), (3, 600), (40, 30), (1, 1), (7, 5)] * 20):
        image, scale = Image.new("RGB", size), (0.05 + 0.009 * seed, 1.0)
        utils.fix_random_seeds(seed)
        top, left, height, width = transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
        utils.fix_random_seeds(seed)
        box = dino_crops.draw_box(*size, scale, torch.empty(1))
        assert box == (left, top, left + width, top + height)


@pytest.mark.parametrize("kind", KINDS)
def test_flags_turn_each_augmentation_off(photographs, kind):
    flags = ["--color_jitter_p", "0", "--gray_p", "0", "--blur_p", "0", "0", "0", "--solarize_p", "0"]
    args = arguments_of(main_dino, *SMALL_RUN, *flags, "--augmentation", kind)
    strengths = dino_crops.strengths_of(args)
    plain = augmentation(kind, sizes=(32, 16), strengths=strengths)
    for seed in range(20):
        utils.fix_random_seeds(seed)
        for transform in (plain.global_transfo1, plain.global_transfo2, plain.local_transfo):
            view = transform.draw(photographs[0])
            assert view == view_of(view.size, view.box, flip=view.flip)


def test_the_flags_of_the_augmentation_reach_the_loader(monkeypatch, tiny_root, tmp_path):
    class Built(Exception):
        pass

    def training_loader(images, augment, args, device):
        raise Built(augment)

    monkeypatch.setattr(dino_data, "training_loader", training_loader)
    flags = ["--gray_p", 1, "--blur_p", 0, 1, 0, "--blur_radius", 0.5, 0.5, "--solarize_p", 1, "--color_jitter_p", 0]
    args = arguments_of(main_dino, *SMALL_RUN, "--data_path", tiny_root / "train", "--output_dir", tmp_path, *flags)
    with pytest.raises(Built) as built:
        main_dino.train_dino(args)
    (augment,) = built.value.args
    image = Image.new("RGB", (40, 40))
    first, second, local = (
        t.draw(image) for t in (augment.global_transfo1, augment.global_transfo2, augment.local_transfo)
    )
    assert [view.gray for view in (first, second, local)] == [True] * 3
    assert [view.blur for view in (first, second, local)] == [None, 0.5, None]
    assert [view.solarize for view in (first, second, local)] == [False, True, False]
    assert [view.jitter for view in (first, second, local)] == [()] * 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--augmentation fast --blur_radius 1 30", "--augmentation fast has no blur of 30.0 pixels"),
        ("--color_jitter 0.4 0.4 0.2 0.7", "--color_jitter: a hue of 0.7 is more than half the color wheel. Use 0.5"),
        ("--blur_radius 2 1", "--blur_radius 2.0 1.0: put the smaller number first"),
    ],
)
def test_strengths_that_make_no_sense_are_errors(flags, says):
    with pytest.raises(UserError) as raised:
        main_dino.check_args(arguments_of(main_dino, *SMALL_RUN, *flags.split()))
    assert says in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_are_consumed_as_by_torchvision(photographs, kind):
    crops_of(photographs[0], 5, kind, sizes=(32, 16), number=1)
    after = torch.rand(1), random.random()
    utils.fix_random_seeds(5)
    for view in torchvision_views((32, 16), 1):
        view(photographs[0])
    assert after == (torch.rand(1), random.random())


def test_jitter_is_skipped_above_its_probability_in_float32(monkeypatch, photographs):
    number = torch.tensor(0.8)  # can be drawn
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda *_: number.clone())
    assert augmentation().local_transfo.draw(photographs[0]).jitter  # like torchvision, which skips if 0.8 < number
    number = torch.nextafter(number, torch.tensor(1.0))
    assert not augmentation().local_transfo.draw(photographs[0]).jitter


@pytest.mark.parametrize("factor", [-0.1, -0.003, 0.0, 0.0123, 0.1])
def test_hue_shifts_equal_torchvisions_for_all_kinds_of_colors(factor):
    levels = np.random.RandomState(3).randint(0, 256, (256, 256, 3), dtype=np.uint8)
    grid = np.array(list(itertools.product(range(0, 256, 10), repeat=3)), np.uint8)
    levels[:64] = grid[: 64 * 256].reshape(64, 256, 3)
    levels[64:68] = np.arange(256, dtype=np.uint8)[:, None]  # grays
    image = Image.fromarray(levels)
    assert dino_crops.pil_hue(image, factor).tobytes() == TF.adjust_hue(image, factor).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (33, 21)])
@pytest.mark.parametrize(
    ("operation", "factors"),
    [(name, (0.0, 0.3, 1.0, 2.5, 11.0)) for name in ("brightness", "contrast", "saturation")]
    + [("hue", (-0.5, -0.31, 0.2, 0.5))],
)
def test_color_changes_of_any_strength_equal_torchvisions(operation, factors, size):
    levels = np.random.RandomState(4).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for image in (Image.fromarray(levels), Image.fromarray(levels[..., 0]).convert("RGB"), Image.new("RGB", size, 255)):
        for factor in factors:
            got = dino_crops.PIL_JITTER[operation](image, factor)
            expected = getattr(TF, f"adjust_{operation}")(image, factor)
            assert (got.mode, got.size, got.tobytes()) == (expected.mode, expected.size, expected.tobytes())


def test_conversion_from_hsv_equals_pils(monkeypatch):
    saturation, value = np.meshgrid(np.arange(256), np.arange(256))
    for hue in range(0, 256, 5):
        levels = np.stack([np.full_like(value, hue), saturation, value], axis=-1).astype(np.uint8)
        image = Image.frombytes("HSV", (256, 256), levels.tobytes())
        expected = image.convert("RGB")
        monkeypatch.setattr(image, "convert", lambda mode, image=image: image)  # it is in HSV already
        assert dino_crops.pil_hue(image, 0.0).tobytes() == expected.tobytes(), hue


def test_solarization_inverts_the_bright_half():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    levels = np.asarray(dino_crops.Solarization(p=1.0)(image)).ravel()
    assert levels.tolist() == [v if v < 128 else 255 - v for v in range(256)]
    assert dino_crops.Solarization(p=0.0)(image) is image


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (64, 73), (448, 512)])
def test_eval_transform_is_the_center_of_the_resized_image(size, resized):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 500, 3), dtype=np.uint8))
    width = int(resized * 500 / 300)
    whole = image.resize((width, resized), Image.Resampling.BICUBIC)
    top, left = round((resized - size) / 2), round((width - size) / 2)
    got = dino_crops.eval_transform(size)(image)
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got.permute(1, 2, 0), np.asarray(whole)[top : top + size, left : left + size])


# ---- fast: each operation ----


@pytest.mark.parametrize("size", [224, 96])
def test_fast_resizing_differs_by_a_level_at_most(photographs, size):
    for image in photographs:
        off = difference(image, size)
        # Newer versions of Pillow resize tall images along columns first, with another rounding.
        tall = image.height > 1.2 * image.width
        assert (off > 1).float().mean() <= (1e-3 if tall else 1e-4)
        assert off.max() <= (8 if tall else 2)
        assert off.mean() <= 0.3


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_fast_jitter_is_within_a_tenth_of_a_level_on_average(photographs, operation, factor):
    if operation == "saturation":
        factor = 1 + (factor - 1) / 2  # 0.8 to 1.2
    for image in photographs[:5]:
        off = difference(image, 96, jitter=((operation, factor),))
        assert off.mean() <= 0.1
        assert off.quantile(0.999) <= 1


@pytest.mark.parametrize("factor", [-0.1, 0.0, 0.04])
def test_fast_hue_shifts_are_within_a_level_on_average(photographs, factor):
    off = [difference(image, jitter=(("hue", factor),)) for image in photographs]
    assert max(each.mean() for each in off) <= 1.0
    assert off[1].max() <= 2  # the gray photograph


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.4, 1.42, 2.0])
def test_fast_blur_is_within_a_level_on_average(photographs, radius):
    for image in photographs[:5]:
        off = difference(image, blur=radius)
        assert off.mean() <= 0.9
        assert off[:, 8:-8, 8:-8].max() <= 4


def test_fast_blur_of_a_large_radius_is_close_too_and_keeps_the_brightness(photographs):
    assert difference(photographs[0], blur=7.0).mean() <= 1.5
    assert all(dino_crops.blur_kernel(radius).sum() == 1 for radius in np.linspace(0, 2, 41))
    assert dino_crops.blur_kernel(0.0).tolist() == [1]


def test_fast_flip_and_solarization_are_exact_and_gray_is_within_a_level(photographs):
    image = photographs[2].crop((50, 50, 146, 146))  # of the size of the crop: nothing is resized
    for changes in ({}, {"flip": True}, {"solarize": True}, {"solarize": True, "flip": True}):
        assert not difference(image, 96, whole=True, **changes).any(), changes
    assert difference(image, 96, whole=True, gray=True, flip=True).max() <= 1  # luminance is rounded differently
    (gray,) = dino_crops.render_fast(image, [view_of(96, (0, 0, 96, 96), gray=True)])
    assert torch.equal(gray[0], gray[2])


# ---- fast: whole crops ----


def test_fast_crops_of_a_seed_are_within_two_levels_on_average(photographs):
    off = []
    for seed in range(30):
        image = photographs[seed % len(photographs)]
        off += mean_differences(crops_of(image, seed), crops_of(image, seed, "fast"))
    assert np.mean(off) <= 0.7
    assert max(off) <= 2.5


def jpeg(path, image, **settings):
    image.save(path, quality=95, **settings)
    return path


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "I;16", "wide", "one pixel"])
def test_fast_crops_of_unusual_images_are_close_to_pils(tmp_path, photographs, mode):
    image = photographs[2].resize((90, 60))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
    elif mode in ("wide", "one pixel"):
        image = image.resize((700, 3) if mode == "wide" else (1, 1))
    else:
        image = image.convert(mode)
    suffixes = [".png"] * (mode != "CMYK") + [".jpg"] * (mode in ("L", "CMYK", "wide", "one pixel"))
    for path in (tmp_path / f"x{suffix}" for suffix in suffixes):
        image.save(path)
        slow, fast = (crops_of(dino_images.open_image(path), 1, kind, sizes=(48, 32)) for kind in KINDS)
        assert max(mean_differences(slow, fast)) <= 2.5


EXIF = Image.Exif()
EXIF[dino_images.ORIENTATION] = 6  # a quarter turn


@pytest.mark.parametrize(
    "kind", [{}, {"progressive": True}, {"subsampling": 0}, {"exif": EXIF}, {"mode": "L"}, {"mode": "CMYK"}]
)
def test_jpegs_are_decoded_to_pils_pixels_and_not_rotated(tmp_path, photographs, kind):
    mode = kind.get("mode", "RGB")
    image = photographs[2].convert(mode)
    if mode == "CMYK":  # with all of its inks
        levels = np.random.RandomState(0).randint(0, 256, (40, 50, 4), dtype=np.uint8)
        image = Image.frombytes("CMYK", (50, 40), levels.tobytes())
    path = jpeg(tmp_path / "x.jpg", image, **{name: value for name, value in kind.items() if name != "mode"})
    pixels = dino_crops.decode_reduced(dino_images.open_image(path), [view_of(224, (9, 4, 40, 30))])
    np.testing.assert_array_equal(pixels, np.asarray(dino_images.load_image(path)))


@pytest.mark.parametrize("kind", ["cut", "one byte", "text", "empty", "png"])
def test_damaged_files_give_the_same_error_with_pil_and_fast(tmp_path, photographs, kind):
    path, png = tmp_path / "bad.jpg", io.BytesIO()
    whole = jpeg(tmp_path / "good.jpg", photographs[2]).read_bytes()
    photographs[2].save(png, "PNG")
    contents = {"cut": whole[: len(whole) // 2], "one byte": whole[:1], "text": b"not an image", "empty": b""}
    path.write_bytes({**contents, "png": png.getvalue()[:9000]}[kind])
    messages = []
    for renderer in KINDS:
        with pytest.raises(dino_images.BadImage, match=r"bad\.jpg") as raised:
            crops_of(dino_images.open_image(path), 0, renderer)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


# ---- fast: large photographs ----


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A JPEG of 3001 x 1801 pixels with details of one pixel."""
    (path,) = dino_sample.find_photographs(["coffee.png"])
    image = dino_images.load_image(path).resize((3001, 1801), Image.Resampling.BICUBIC)
    levels = np.asarray(image).astype(int) + np.random.RandomState(0).randint(-12, 13, (1801, 3001, 1))
    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return jpeg(tmp_path_factory.mktemp("large") / "x.jpg", image)


@pytest.mark.parametrize(
    ("sides", "size", "decoded"),
    [((896, 1800), 224, 1500), ((895, 1800), 224, 3001), ((1800, 447), 112, 3001), ((1024, 1500), 128, 751),
     ((1792, 1792), 96, 376), ((200, 200), 224, 3001)],
)  # fmt: skip
def test_a_jpeg_is_reduced_as_long_as_each_crop_still_shrinks_by_two(large, sides, size, decoded):
    views = [view_of(size, (0, 0, *sides)), view_of(size, (0, 0, 1800, 1800))]
    height, width, _ = dino_crops.decode_reduced(dino_images.open_image(large), views).shape
    assert abs(width - decoded) <= 1
    assert abs(height - decoded * 1801 / 3001) <= 1


@pytest.mark.parametrize("box", [(1500, 700, 2413, 1599), (3, 1, 2994, 1793)])
def test_reduced_decoding_changes_crops_by_a_level_or_so(large, box):
    slow, fast = (
        dino_crops.RENDERERS[kind](dino_images.open_image(large), [view_of(96, box)])[0].float() for kind in KINDS
    )
    assert (slow - fast).abs().mean() <= 1.5
    assert abs((slow - fast).mean()) <= 0.3


def test_a_damaged_jpeg_is_an_error_also_if_it_is_reduced(tmp_path, large):
    path = tmp_path / "cut.jpg"
    path.write_bytes(large.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        dino_crops.render_fast(dino_images.open_image(path), [view_of(32, (0, 0, 900, 900))])


# ---- runs ----


def test_loaders_pass_undecoded_files_to_fast_crops(tiny_root):
    args = arguments_of(main_dino, *SMALL_RUN, "--data_path", tiny_root / "train")
    images, batches = dino_data.training_images(args), []
    for kind in KINDS:
        loader = dino_data.training_loader(images, augmentation(kind, (32, 16), 2), args, torch.device("cpu"))
        batches.append(next(iter(loader))[0])
    assert images.open(0).tile  # the crops decide how far it is reduced
    assert 0 < max(mean_differences(*batches)) < 2


@pytest.mark.parametrize("installed", [None, types.SimpleNamespace()], ids=["none", "old"])
def test_without_opencv_or_with_an_old_one_the_run_ends_before_any_work(monkeypatch, capsys, tmp_path, installed):
    dino_crops.opencv.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", installed)
    flags = ["--device", "cpu", "--augmentation", "fast", "--output_dir", tmp_path / "run"]
    message = "error: --augmentation fast needs OpenCV 4.11 or newer: pip install opencv-python-headless, "
    message += "or use --augmentation pil"
    assert ending(monkeypatch, capsys, main_dino, *flags) == (2, message)
    assert not (tmp_path / "run").exists()


def test_jpegs_that_opencv_can_not_decode_are_left_to_pil(monkeypatch, tmp_path, photographs):
    whole = jpeg(tmp_path / "x.jpg", photographs[2]).read_bytes()
    assert dino_crops.decode_whole_jpeg(io.BytesIO(whole)).shape == (photographs[2].height, photographs[2].width, 3)
    for data in (b"not a JPEG" + b"\xff\xd9", b"", whole[:-2], whole + b"more"):
        assert dino_crops.decode_whole_jpeg(io.BytesIO(data)) is None

    def refuse(*_):
        raise cv2.error("too large")

    monkeypatch.setattr(cv2, "imdecode", refuse)
    assert dino_crops.decode_whole_jpeg(io.BytesIO(whole)) is None


def test_opencv_uses_no_threads():
    dino_crops.opencv.cache_clear()
    cv2.setNumThreads(2)
    assert dino_crops.opencv() is cv2
    assert cv2.getNumThreads() == 1


def test_a_run_resumes_with_another_augmentation_only_if_that_is_allowed():
    before, now = (arguments_of(main_dino, "--augmentation", kind) for kind in KINDS)
    networks = {name: {"norm.weight": torch.zeros(1)} for name in ("student", "teacher")}
    checkpoint = {**networks, "epoch": 1, "args": utils.plain_args(before)}
    with pytest.raises(UserError, match=r"--augmentation pil.*--augmentation fast"):
        dino_checkpoints.check_resumable("x.pth", checkpoint, now)
    now.allow_changed_args = True
    dino_checkpoints.check_resumable("x.pth", checkpoint, now)
