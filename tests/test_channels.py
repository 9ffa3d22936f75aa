"""Images of one or many channels: files, crops, mean and std, networks, and runs on them from end to end."""

import io
import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, arguments_of, ending, run_script, tensor
from PIL import Image

import dino_backbones
import dino_checkpoints
import dino_crops
import dino_data
import dino_images
import eval_copy_detection
import eval_linear
import main_dino
import utils
import vision_transformer
from dino_data import View
from dino_run import OnlineKnn
from utils import Inputs, UserError

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers_in_each_test():
    RANDOM.bit_generator.state = np.random.default_rng(1).bit_generator.state


def inputs(in_chans, value_range=None):
    return Inputs(in_chans, (0.5,) * in_chans, (0.25,) * in_chans, value_range)


def array_file(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def planes(path, in_chans, value_range=None):
    return dino_images.planes(dino_images.open_image(path), inputs(in_chans, value_range))


# ---- files ----


def test_an_array_may_have_its_channels_first_or_last(tmp_path):
    values = RANDOM.random((4, 6, 5), dtype=np.float32)
    first, last = array_file(tmp_path / "a.npy", values), array_file(tmp_path / "b.npy", np.moveaxis(values, 0, -1))
    for path in (first, last):
        assert torch.equal(planes(path, 4), torch.from_numpy(values))
    both = array_file(tmp_path / "c.npy", values[:, :, :4])
    assert torch.equal(planes(both, 4), torch.from_numpy(values[:, :, :4]).permute(2, 0, 1))


@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (6, 5, 1)])
def test_an_array_of_one_channel_may_do_without_an_axis_for_it(tmp_path, shape):
    values = RANDOM.random((6, 5), dtype=np.float32)
    assert torch.equal(planes(array_file(tmp_path / "a.npy", values.reshape(shape)), 1)[0], torch.from_numpy(values))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "uint32", "int16"])
def test_integers_are_divided_by_the_largest_of_their_type(tmp_path, dtype):
    largest = np.iinfo(dtype).max
    values = np.array([[0, 1, largest // 3], [largest // 2, largest - 1, largest]], dtype)
    got = planes(array_file(tmp_path / "a.npy", values), 1)[0].numpy()
    np.testing.assert_allclose(got, values / largest, rtol=1e-6)


def test_floats_and_truth_values_are_taken_as_they_are(tmp_path):
    for values in (np.array([[0.25, 1.0]]), np.array([[True, False]]), np.array([[0.5, 0.125]], np.float16)):
        got = planes(array_file(tmp_path / "a.npy", values), 1)[0].numpy()
        assert got.tolist() == values.astype(float).tolist()


def test_a_range_of_values_becomes_zero_to_one_and_cuts_off_what_is_beyond(tmp_path):
    path = array_file(tmp_path / "ct.npy", np.array([[-3000, -1000, -300, 400, 2000]], np.int16))
    assert planes(path, 1, (-1000, 400))[0].tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


def header(shape, dtype="<f4"):
    """The beginning of a .npy file, without its numbers."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


ONES = np.ones((4, 8, 8), np.float32)
BAD_ARRAYS = {
    "pickled": (np.array([[{}]], dtype=object), "an array of object, not of numbers"),
    "text": (np.array([["a"]]), "an array of <U1, not of numbers"),
    "complex": (ONES * 1j, "an array of complex64"),
    "table": (np.zeros((8, 8), [("x", "f4")]), "not of numbers"),
    "NaN": (ONES * np.nan, "NaN or infinite"),
    "infinite": (np.where(RANDOM.random((4, 8, 8)) < 0.1, np.inf, 0.5), "NaN or infinite"),
    "three channels": (ONES[:3], r"\(3, 8, 8\) is not height, width and 4 channels \(--in_chans\)"),
    "one channel": (ONES[0], r"\(8, 8\) is not height, width and 4 channels"),
    "a batch": (ONES[None], "is not height, width and 4 channels"),
    "empty": (ONES[:, :0], "has no numbers in it"),
    "reflectances": (ONES * 3000, "go from 3000 to 3000, outside of 0 to 1; name the range by --value_range"),
    "Hounsfield units": ((ONES * -1).astype(np.int16), "go from -1 to -1, outside of 0 to 32767; .*--value_range"),
    "huge": (header((4, 10**6, 10**6)), "more than 200 million"),
    "cut": (header((4, 8, 8)), "Repair"),
    "no header": (b"\x93NUMPY", "Repair"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_a_bad_array_is_named_with_what_is_wrong(tmp_path, kind):
    array, words = BAD_ARRAYS[kind]
    path = tmp_path / "bad.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array, allow_pickle=True)
    with pytest.raises(dino_images.BadImage, match=words) as raised:
        planes(path, 4)
    assert f"{path}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_gray_pictures_keep_the_precision_of_their_file(tmp_path):
    deep = RANDOM.integers(0, 65536, (7, 9)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    Image.fromarray(deep.astype(">u2")).save(tmp_path / "big-endian.tif")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "wide.tif")
    for name in ("deep.png", "deep.tif", "big-endian.tif", "wide.tif"):
        np.testing.assert_allclose(planes(tmp_path / name, 1)[0].numpy(), deep / 65535, rtol=1e-6, err_msg=name)
    floats = RANDOM.random((7, 9), dtype=np.float32)
    Image.fromarray(floats).save(tmp_path / "floats.tif")
    assert torch.equal(planes(tmp_path / "floats.tif", 1)[0], torch.from_numpy(floats))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "1", "LA"])
def test_a_colored_picture_becomes_pils_gray(tmp_path, mode):
    image = Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3)).astype(np.uint8)).convert(mode)
    image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    (path,) = tmp_path.iterdir()
    want = np.asarray(Image.open(path).convert("L")) / 255
    np.testing.assert_allclose(planes(path, 1)[0].numpy(), want, rtol=1e-6)


def test_pages_of_a_tiff_and_bands_of_a_picture_are_channels(tmp_path):
    values = RANDOM.integers(0, 65536, (5, 6, 7)).astype(np.uint16)
    first, *others = map(Image.fromarray, values)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=others)
    np.testing.assert_allclose(planes(tmp_path / "pages.tif", 5).numpy(), values / 65535, rtol=1e-6)
    bands = RANDOM.integers(0, 256, (6, 7, 4)).astype(np.uint8)
    Image.fromarray(bands).save(tmp_path / "bands.png")
    np.testing.assert_allclose(planes(tmp_path / "bands.png", 4).permute(1, 2, 0).numpy(), bands / 255, rtol=1e-6)
    with pytest.raises(dino_images.BadImage, match=r"pages\.tif: it has 5 page\(s\) of 1 band\(s\), not 4 channels"):
        planes(tmp_path / "pages.tif", 4)


def test_pages_of_several_sizes_or_types_are_refused(tmp_path):
    gray = Image.new("L", (8, 8))
    for other in (Image.new("L", (8, 9)), Image.new("I;16", (8, 8))):
        gray.save(tmp_path / "a.tif", save_all=True, append_images=[other])
        with pytest.raises(dino_images.BadImage, match=r"a\.tif: (all input arrays must have the same|Cannot cast)"):
            planes(tmp_path / "a.tif", 2)


def test_arrays_are_images_of_a_folder_unless_these_have_three_channels(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dino_images, "WORTH_KEEPING", 1)
    root = tmp_path / "images"
    array_file(root / "b.npy", ONES)
    Image.new("RGB", (8, 8)).save(root / "a.png")
    os.utime(root, (1e9, 1e9))  # what has just changed is listed anew each time
    for _ in range(2):
        assert len(dino_images.find_images(root)) == 1
        assert len(dino_images.find_images(root, in_chans=4)) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("augmentation", ["pil", "fast"])
def test_an_array_in_a_list_of_photographs_is_refused(tmp_path, augmentation):
    array_file(tmp_path / "a.npy", ONES)
    (tmp_path / "list.txt").write_text("a.npy\n")
    images = dino_images.find_images(tmp_path / "list.txt")
    augment = main_dino.DataAugmentationDINO((0.4, 1), (0.05, 0.4), 1, 32, 16, augmentation=augmentation)
    for read in (lambda: augment(images.open(0)), lambda: dino_images.load_image(tmp_path / "a.npy")):
        with pytest.raises(dino_images.BadImage, match=r"a\.npy: it is an array, for --in_chans 1 or any other"):
            read()


# ---- crops ----


def cubic(x):
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def shrink(length, size):
    """Matrix [size, length] of Keys' kernel (a = -1/2), stretched where there is less room than before."""
    scale = length / size
    matrix = np.zeros((size, length))
    for i in range(size):
        for j in range(length):
            matrix[i, j] = cubic((j + 0.5 - (i + 0.5) * scale) / max(scale, 1))
    return matrix / matrix.sum(axis=1, keepdims=True)


def slow_view(image, view):
    """A view of an image [C, H, W] in float64, channel by channel."""
    left, top, right, bottom = view.box
    rows, columns = shrink(bottom - top, view.size), shrink(right - left, view.size)
    crop = np.stack([rows @ channel[top:bottom, left:right] @ columns.T for channel in image]).clip(0, 1)
    if view.flip:
        crop = crop[:, :, ::-1]
    for operation, factor in view.jitter:
        if operation == "brightness":
            crop = factor * crop
        elif operation == "contrast":
            crop = factor * crop + (1 - factor) * crop.mean()
        elif operation == "saturation":
            crop = factor * crop + (1 - factor) * sum(crop) / len(crop)
        crop = crop.clip(0, 1)
    if view.gray:
        crop = np.stack([sum(crop) / len(crop)] * len(crop))
    if view.blur is not None:
        kernel = dino_crops.exact_blur_kernel(view.blur)
        reach, blurred = len(kernel) // 2, np.zeros_like(crop)
        edges = np.arange(view.size)
        for i, a in enumerate(kernel):
            for j, b in enumerate(kernel):
                at_row, at_column = ((edges + k - reach).clip(0, view.size - 1) for k in (i, j))
                blurred += a * b * crop[:, at_row][:, :, at_column]
        crop = blurred
    return np.where(crop >= 0.5, 1 - crop, crop) if view.solarize else crop


PLAIN = View(16, (3, 2, 35, 27), flip=False, jitter=(), gray=False, blur=None, solarize=False)
TURNS = (("contrast", 1.4), ("hue", 0.1), ("brightness", 1.3), ("saturation", 1.2))
CHANGES = {
    "resized": {},
    "enlarged": {"size": 40},
    "flipped": {"flip": True},
    "darker": {"jitter": (("brightness", 0.6),)},
    "brighter": {"jitter": (("brightness", 1.4),)},
    "flat": {"jitter": (("contrast", 0.6),)},
    "harsh": {"jitter": (("contrast", 1.4),)},
    "saturated": {"jitter": (("saturation", 1.2),)},
    "pale": {"jitter": (("saturation", 0.8),)},
    "hue": {"jitter": (("hue", 0.1),)},
    "gray": {"gray": True},
    "blurred": {"blur": 1.3},
    "solarized": {"solarize": True},
    "all": {"flip": True, "jitter": TURNS, "blur": 0.7, "solarize": True},
    "all, gray": {"jitter": TURNS[::-1], "gray": True, "blur": 2.0, "solarize": True},
}


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_a_crop_is_that_of_the_slow_obvious_way(in_chans, change):
    image = RANDOM.random((in_chans, 30, 40))
    view = PLAIN._replace(**CHANGES[change])
    (got,) = dino_crops.render_planes(torch.from_numpy(image).float(), [view])
    assert got.dtype == torch.int16
    np.testing.assert_allclose((got.numpy() + 32768.0) / 65535, slow_view(image, view), atol=2e-5)


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 2.0, 7.0])
def test_a_blur_has_the_radius_as_its_standard_deviation(radius):
    kernel = dino_crops.exact_blur_kernel(radius)
    places = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1)
    assert kernel @ places**2 == pytest.approx(radius**2)


def test_crops_of_a_gray_image_are_pils_to_a_level():
    image = Image.open(*dino_data.find_photographs(["brick.png"])).convert("L").resize((80, 64))
    values = torch.from_numpy(np.array(image))[None].float() / 255
    photograph, off = Image.merge("RGB", [image] * 3), []
    view = dino_crops.RandomView(32, (0.4, 1), dino_crops.GaussianBlur(), dino_crops.Solarization(0.2))
    for seed in range(60):
        utils.fix_random_seeds(seed)
        drawn = view.draw(photograph)
        (slow,), (got,) = dino_crops.render_pil(photograph, [drawn]), dino_crops.render_planes(values, [drawn])
        off.append((slow[0].float() - (got[0].float() + 32768) / 257).abs())
    off = torch.stack(off)
    assert off.mean() < 1  # PIL rounds, or cuts off, a level in each of its steps
    assert off[:, 6:-6, 6:-6].max() < 6


def test_an_array_gets_the_boxes_and_flips_of_a_photograph_of_its_size():
    view = dino_crops.RandomView(16, (0.4, 1), dino_crops.GaussianBlur(), dino_crops.Solarization(0.2))
    for seed in range(20):
        drawn = []
        for image in (Image.new("RGB", (50, 40)), torch.zeros(4, 40, 50)):
            utils.fix_random_seeds(seed)
            drawn.append(view.draw(image))
            drawn.append(random.random())
        assert drawn[:2] == drawn[2:]


def test_crops_are_levels_or_normalized_floats(tmp_path):
    image = dino_images.open_image(array_file(tmp_path / "a.npy", RANDOM.random((40, 50, 2))))
    crops = []
    for as_levels in (True, False):
        augment = main_dino.DataAugmentationDINO(
            (0.4, 1), (0.05, 0.4), 2, 32, 16, as_uint8=as_levels, inputs=Inputs(2, (0.25, 0.5), (0.5, 2.0))
        )
        utils.fix_random_seeds(3)
        crops.append(augment(image))
    assert [tuple(crop.shape) for crop in crops[0]] == [(2, 32, 32)] * 2 + [(2, 16, 16)] * 2
    for counted, floats in zip(*crops, strict=True):
        values = (counted.numpy() + 32768.0) / 65535
        want = np.stack([(values[0] - 0.25) / 0.5, (values[1] - 0.5) / 2.0])
        np.testing.assert_allclose(floats.numpy(), want, atol=1e-6)


def test_photographs_can_be_normalized_with_numbers_of_ones_own():
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = utils.normalize(pixels, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)).numpy()
    for i in range(3):
        want = (pixels[:, i].numpy() / 255 - (0.1, 0.2, 0.3)[i]) / (0.4, 0.5, 0.6)[i]
        np.testing.assert_allclose(got[:, i], want, atol=1e-6)


def test_evaluation_takes_the_center_of_an_array_as_of_a_photograph():
    # Gray enough that no level is cut off: PIL would do so after each of its two passes, and round (0.5 levels each).
    image = Image.fromarray(RANDOM.integers(80, 176, (20, 30)).astype(np.uint8)).resize((60, 40))
    values = torch.from_numpy(np.array(image))[None].float() / 255
    got = dino_crops.eval_transform(28, Inputs(1, (0.5,), (0.25,)))(values)
    want = dino_crops.eval_transform(28)(Image.merge("RGB", [image] * 3))
    assert (255 * (got[0] * 0.25 + 0.5) - want[0]).abs().max() < 1.2


# ---- mean and std ----


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """Arrays of 4 channels with labels, train/ and val/, of which two can be told apart."""
    root, random = tmp_path_factory.mktemp("bands"), np.random.default_rng(2)
    for part, number in (("train", 12), ("val", 4)):
        for name in ("a", "b"):
            for i in range(number):
                values = random.random((4, 36, 40)) * np.array([0.1, 0.3, 0.6, 1.0])[:, None, None]
                values[0] += 0.8 * (name == "b")
                array_file(root / part / name / f"{i}.npy", values.astype(np.float32))
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_mean_and_std_are_numpys(bands, workers):
    images = dino_images.find_images(bands / "train", in_chans=4)
    mean, std = dino_data.image_statistics(images, inputs(4), workers)
    everything = np.stack([np.load(images.name(i)).astype(np.float64) for i in range(len(images))])
    np.testing.assert_allclose(mean, everything.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, everything.std(axis=(0, 2, 3)), rtol=1e-12)


def test_mean_and_std_of_photographs_are_of_rgb_and_of_a_spread_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(dino_data, "MOST_MEASURED", 3)
    for i in range(40):
        Image.fromarray(RANDOM.integers(0, 50 + 5 * i, (8, 8, 3)).astype(np.uint8)).save(tmp_path / f"{i:02}.png")
    images = dino_images.find_images(tmp_path)
    mean, std = dino_data.image_statistics(images, utils.RGB, 0)
    pixels = np.stack([np.asarray(Image.open(images.name(i)).convert("RGB")) / 255 for i in (0, 13, 26)])
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


def test_a_constant_channel_and_images_that_are_none_are_named(tmp_path):
    array_file(tmp_path / "a.npy", np.stack([RANDOM.random((8, 8)), np.full((8, 8), 0.5)]))
    images = dino_images.find_images(tmp_path, in_chans=2)
    with pytest.raises(UserError, match=r"channel 1 \(from 0\) is the same number in all 1 images"):
        dino_data.image_statistics(images, inputs(2), 0)
    with pytest.raises(UserError, match=r"none of 1 images can be read\. Of the first one: .*not height, width and 5"):
        dino_data.image_statistics(images, inputs(5), 0)


# ---- arguments ----

FOUR = ("--in_chans", 4)
MISTAKES = {
    "--in_chans 4 needs --mean and --std, 4 numbers each, or --compute_stats true": FOUR,
    "--mean has 2 numbers, --in_chans 4 needs 4": (*FOUR, "--mean", 0.1, 0.2, "--std", 1, 1),
    "--std has 2 numbers, --in_chans 3 needs 3": ("--mean", 0.1, 0.2, 0.3, "--std", 1, 1),
    "--mean is given without --std": ("--mean", 0.1, 0.2, 0.3),
    "--std is given without --mean": ("--std", 0.1, 0.2, 0.3),
    "--std 0.0 must be": ("--mean", 0.1, 0.2, 0.3, "--std", 0, 1, 1),
    "--mean 120.0 must be": ("--mean", 120, 0.2, 0.3, "--std", 1, 1, 1),
    "--mean nan must be": ("--mean", "nan", 0.2, 0.3, "--std", 1, 1, 1),
    "--mean is given, and --compute_stats": ("--mean", 0, 0, 0, "--std", 1, 1, 1, "--compute_stats", "true"),
    "--augmentation fast is for 3 channels": (*FOUR, "--compute_stats", "true", "--augmentation", "fast"),
    "--value_range is for": ("--value_range", 0, 1),
    "--value_range 1.0 0.0: give two": (*FOUR, "--compute_stats", "true", "--value_range", 1, 0),
    "--value_range nan must be between": (*FOUR, "--compute_stats", "true", "--value_range", "nan", 0),
    "--in_chans 0 must be": ("--in_chans", 0),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_flags_that_contradict_each_other_are_refused_before_any_work(words, tmp_path):
    args = arguments_of(main_dino, "--data_path", tmp_path, "--output_dir", tmp_path / "out", *MISTAKES[words])
    with pytest.raises(UserError) as raised:
        main_dino.train_dino(args)
    assert words in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_what_a_checkpoint_says_of_its_inputs_must_fit():
    assert utils.inputs_of(None) == utils.inputs_of({"mean": None, "arch": "vit_tiny"}) == utils.RGB
    assert utils.inputs_of({"in_chans": 1, "mean": [0.5], "std": [1]}) == Inputs(1, (0.5,), (1.0,))
    for args in ({"in_chans": 4}, {"mean": 3}, {"in_chans": "x"}, {"mean": ["a", "b", "c"]}):
        with pytest.raises(UserError, match="don't fit each other"):
            utils.inputs_of(args)


# ---- networks ----


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18", "swin_t", "xcit_nano_12_p16", "timm:convnext_atto"])
@pytest.mark.parametrize("in_chans", [1, 5])
def test_networks_take_any_number_of_channels(arch, in_chans):
    model, width = dino_backbones.build_backbone(arch, 16, 64, in_chans=in_chans)
    images = torch.randn(2, in_chans, 64, 64, generator=torch.Generator().manual_seed(0))
    features = utils.features_of(model.eval(), images)
    assert features.shape == (2, width)
    for channel in range(in_chans):
        others = images.clone()
        others[:, channel] += 1
        assert not torch.allclose(utils.features_of(model, others), features), f"channel {channel} is not looked at"


def test_a_new_first_convolution_is_as_spread_as_the_old_one():
    torch.manual_seed(0)
    old, new = (dino_backbones.build_convnet("resnet18", in_chans=n).conv1.weight for n in (3, 12))
    assert new.shape == (64, 12, 7, 7)
    assert new.std().item() == pytest.approx(old.std().item(), rel=0.05)


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_weights_for_colors_are_added_up_for_gray_images(arch):
    color, gray = (dino_backbones.build_backbone(arch, 16, 32, in_chans=n)[0].eval() for n in (3, 1))
    state = color.state_dict()
    dino_backbones.fit_first_layer(gray, state, "a file")
    dino_backbones.load_backbone_state(gray, state, "a file", arch)
    images = tensor("gray", (2, 1, 32, 32))
    same = utils.features_of(color, images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(utils.features_of(gray, images), same, atol=1e-4, rtol=1e-4)


def test_for_many_channels_the_first_layer_starts_afresh_and_says_so(capsys):
    color, many = (dino_backbones.build_backbone("vit_nano", 16, 32, in_chans=n)[0] for n in (3, 4))
    fresh, state = many.patch_embed.proj.weight.clone(), color.state_dict()
    dino_backbones.fit_first_layer(many, state, "a file")
    dino_backbones.load_backbone_state(many, state, "a file", "vit_nano")
    assert torch.equal(many.patch_embed.proj.weight, fresh)
    assert torch.equal(many.blocks[0].attn.qkv.weight, color.blocks[0].attn.qkv.weight)
    assert "patch_embed.proj starts afresh: it is for 3 channels in a file, for 4 here" in capsys.readouterr().out


# ---- runs ----

ON_BANDS = [*SMALL_RUN, "--in_chans", "4", "--saveckp_freq", "1"]
EVALUATED = ["--arch", "vit_nano", "--patch_size", 16, "--device", "cpu"]


@pytest.fixture(scope="module")
def run(bands, tmp_path_factory):
    """A run on arrays that measures its images, and looks at neighbors."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--compute_stats", "true", "--knn_every", 1, "--knn_data", bands, "--data_path", bands / "train"]
    run_script("main_dino.py", *ON_BANDS, *flags, "--output_dir", folder)
    return folder


def weights(folder):
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    return {key: value for name in ("student", "teacher") for key, value in checkpoint[name].items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_on_arrays_is_the_same_for_any_workers_and_with_its_numbers_as_flags(run, bands, tmp_path):
    args = torch.load(run / "checkpoint.pth", weights_only=True)["args"]
    measured = ["--mean", *args["mean"], "--std", *args["std"]]
    workers = ["--num_workers", 2]
    run_script("main_dino.py", *ON_BANDS, *measured, *workers, "--data_path", bands / "train", "--output_dir", tmp_path)
    assert_same(weights(run), weights(tmp_path))


def given(bands, folder):
    """Arguments of a run with numbers of its own for each channel."""
    numbers = ["--mean", 0.45, 0.15, 0.3, 0.5, "--std", 0.4, 0.1, 0.2, 0.3]
    return arguments_of(
        main_dino, *ON_BANDS, "--epochs", 1, *numbers, "--data_path", bands / "train", "--output_dir", folder
    )


def test_the_network_sees_crops_less_the_mean_over_the_std(bands, tmp_path, monkeypatch):
    args, seen = given(bands, tmp_path), []
    loader, _ = dino_data.build_data(args, torch.device("cpu"))
    crops, *_ = next(iter(loader))
    embed = vision_transformer.PatchEmbed.forward

    def watch(self, images):
        seen.append(images)
        return embed(self, images)

    monkeypatch.setattr(vision_transformer.PatchEmbed, "forward", watch)
    main_dino.train_dino(args)
    mean, std = (np.array(numbers)[:, None, None] for numbers in (args.mean, args.std))
    want = ((torch.cat(crops[:2]).numpy() + 32768.0) / 65535 - mean) / std
    (first, *_) = [images for images in seen if images.any()]  # the teacher's, behind some to try the network with
    np.testing.assert_allclose(first.numpy(), want, atol=1e-5)


def test_neighbors_are_looked_for_among_images_less_the_mean_over_the_std(bands, tmp_path):
    args = given(bands, tmp_path)
    args.knn_every, args.knn_data = 1, str(bands)
    train = OnlineKnn(args, None, torch.device("cpu")).sets[0]
    mean, std = (np.array(numbers)[:, None, None] for numbers in (args.mean, args.std))
    values = np.load(train.images.name(3))[:, 2:34, 4:36]  # of 36 × 40 pixels, which is 8/7 of 32 already
    np.testing.assert_allclose(train[3][0].numpy(), (values - mean) / std, atol=1e-3)


def test_a_resumed_run_takes_mean_and_std_from_its_checkpoint(run, bands, tmp_path):
    shutil.copy(run / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    flags = ["--compute_stats", "true", "--data_path", bands / "train", "--output_dir", tmp_path]
    done = run_script("main_dino.py", *ON_BANDS, *flags)
    assert "going on in epoch 1" in done.stdout
    assert "measured" not in done.stdout
    assert_same(weights(run), weights(tmp_path))


def test_with_another_range_of_values_they_are_measured_anew(run, bands, tmp_path):
    shutil.copy(run / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    args = arguments_of(main_dino, *ON_BANDS, "--compute_stats", "true", "--output_dir", tmp_path)
    assert dino_data.earlier_statistics(args)
    args.value_range = [args.value_range[0], 2 * args.value_range[1]] if args.value_range else [0.0, 2.0]
    assert dino_data.earlier_statistics(args) is None


@pytest.mark.parametrize("said", [False, True])
def test_a_run_of_photographs_goes_on_with_imagenets_statistics_alone(said):
    imagenet = ["--mean", *utils.IMAGENET_MEAN, "--std", *utils.IMAGENET_STD]
    before = utils.plain_args(arguments_of(main_dino))
    if not said:  # a version before there were any
        before = {name: value for name, value in before.items() if name not in ("in_chans", "mean", "std")}
    networks = {name: {"norm.weight": torch.zeros(1)} for name in ("student", "teacher")}
    checkpoint = {**networks, "epoch": 1, "args": before}
    for flags in ([], imagenet):
        dino_checkpoints.check_resumable("x.pth", checkpoint, arguments_of(main_dino, *flags))
    others = ["--mean", 0.1, 0.1, 0.1, "--std", *utils.IMAGENET_STD]
    with pytest.raises(UserError, match=r"made with --mean \[0.485, .*this run has --mean \[0.1, .*result"):
        dino_checkpoints.check_resumable("x.pth", checkpoint, arguments_of(main_dino, *others))
    gray = arguments_of(main_dino, "--in_chans", 1, "--mean", 0.5, "--std", 0.2)
    with pytest.raises(UserError, match=r"made with --in_chans 3, this run has --in_chans 1"):
        dino_checkpoints.check_resumable("x.pth", checkpoint, gray)


@pytest.mark.parametrize(("largest", "warns"), [(4095, True), (65535, False)])
def test_images_that_fill_a_small_part_of_their_range_are_a_warning(tmp_path, capsys, largest, warns):
    for i in range(3):
        deep = np.random.default_rng(i).integers(0, largest, (20, 20), dtype=np.uint16)
        Image.fromarray(deep).save(tmp_path / f"{i}.png")
    args = arguments_of(main_dino, "--in_chans", 1, "--compute_stats", "true", "--num_workers", 0)
    dino_data.measure(dino_data.find_images(tmp_path, in_chans=1), args)
    assert ("by --value_range, such as 0 4095" in capsys.readouterr().out) == warns


def test_a_run_tells_its_mean_and_std(run):
    found = json.loads((run / "run.json").read_text())["changed"]
    assert len(found["mean"]) == len(found["std"]) == found["in_chans"] == 4
    log = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert all(0 <= line["knn_top1"] <= 100 for line in log)


def test_evaluations_take_channels_and_numbers_from_the_checkpoint(run, bands, tmp_path):
    flags = [*EVALUATED, "--image_size", 32, "--data_path", bands, "--num_workers", 0]
    trained = ["--pretrained_weights", run / "checkpoint.pth"]
    done = run_script("eval_knn.py", *flags, *trained, "--nb_knn", 20, "--baselines", "true")
    logged = json.loads((run / "log.txt").read_text().splitlines()[-1])["knn_top1"]
    assert f"20-NN classifier result: Top1: {logged}" in done.stdout
    assert re.search(r"raw pixels +\d", done.stdout)
    done = run_script("eval_linear.py", *flags, *trained, "--epochs", 1, "--output_dir", tmp_path)
    assert "The linear classifier is trained" in done.stdout


def test_linear_evaluation_normalizes_its_random_crops_and_its_validation_images(bands, monkeypatch):
    args, found = arguments_of(eval_linear, *EVALUATED, "--image_size", 32, "--data_path", bands), []
    for mean, std in ((0.0, 1.0), (0.25, 0.5)):
        kind = Inputs(4, (mean,) * 4, (std,) * 4)
        monkeypatch.setattr(dino_checkpoints, "trained_inputs", lambda _, kind=kind: kind)
        train, val, *_ = eval_linear.load_data(args)
        found.append((train[0, 5][0], val[5][0]))
    for plain, normalized in zip(*found, strict=True):
        assert plain.shape == (4, 32, 32)
        torch.testing.assert_close(normalized, (plain - 0.25) / 0.5, atol=1e-5, rtol=0)


def test_an_export_of_many_channels_is_opened_again(run, tmp_path):
    flags = ["--arch", "vit_nano", "--pretrained_weights", run / "checkpoint.pth", "--to", "backbone"]
    done = run_script("export.py", *flags, "--output", tmp_path / "plain.pth")
    assert "in_chans=4" in done.stdout
    assert "4 channels of values from 0 to 1, less the mean (0." in done.stdout
    model, _ = dino_backbones.build_backbone("vit_nano", 16)
    with pytest.raises(UserError, match="Name the training checkpoint, which says how many channels"):
        dino_backbones.load_weights(model, tmp_path / "plain.pth", arch="vit_nano")


def test_a_report_shows_the_first_channels(run, bands, tmp_path):
    flags = ["--data_path", bands, "--output", tmp_path / "page.html", "--device", "cpu", "--num_workers", 0]
    run_script("report.py", run, *flags)
    assert (tmp_path / "page.html").read_text().count("<img") > 30


def test_what_is_made_of_photographs_refuses_other_inputs(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "original").mkdir()
    (tmp_path / "strong").mkdir()
    for name in ("original/200000.png", "strong/200001.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    flags = ["--data_path", tmp_path, "--pretrained_weights", run / "checkpoint.pth"]
    code, line = ending(monkeypatch, capsys, eval_copy_detection, *EVALUATED, *flags)
    assert code == 2
    assert "takes images of its own kind (channels: 4, mean 0." in line


def test_gray_images_of_16_bits_train_and_show_their_attention(tmp_path):
    for i in range(16):
        level = RANDOM.integers(20000, 40000)
        Image.fromarray((level + RANDOM.integers(0, 9000, (36, 40))).astype(np.uint16)).save(tmp_path / f"{i}.png")
    out = tmp_path / "out"
    flags = ["--in_chans", 1, "--compute_stats", "true", "--data_path", tmp_path, "--output_dir", out]
    run_script("main_dino.py", *SMALL_RUN, "--epochs", 1, *flags)
    args = torch.load(out / "checkpoint.pth", weights_only=True)["args"]
    assert 0.3 < args["mean"][0] < 0.7
    shown = ["--image_path", tmp_path / "0.png", "--image_size", 32, "--output_dir", tmp_path / "shown"]
    trained = ["--pretrained_weights", out / "checkpoint.pth"]
    run_script("visualize_attention.py", *EVALUATED, *trained, *shown)
    assert (tmp_path / "shown" / "overview.png").exists()


def test_two_processes_train_on_pages_and_leave_out_what_is_none(tmp_path):
    for i in range(20):
        pages = [Image.fromarray(RANDOM.integers(0, 256, (36, 40)).astype(np.uint8)) for _ in range(5 - (i == 7))]
        pages[0].save(tmp_path / f"{i:02}.tif", save_all=True, append_images=pages[1:])
    out = tmp_path / "out"
    flags = ["--in_chans", 5, "--compute_stats", "true", "--data_path", tmp_path, "--output_dir", out]
    rest = ["--epochs", 1, "--batch_size_per_gpu", 5, "--max_bad_images", 0.1]
    run_script("main_dino.py", *SMALL_RUN, *rest, *flags, processes=2)
    (line,) = (out / "bad_images.txt").read_text().splitlines()
    assert line.startswith(f"{tmp_path / '07.tif'}\tit has 4 page(s) of 1 band(s), not 5 channels")
