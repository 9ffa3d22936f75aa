"""Images of other than 3 channels: files, crops, mean and std, networks, and whole runs."""

import io
import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, arguments_of, assert_near, run_script, same_state, tensor
from PIL import Image

import dino_backbones
import dino_checkpoints
import dino_crops
import dino_data
import dino_files
import dino_images
import dino_layouts
import eval_copy_detection
import eval_knn
import eval_linear
import eval_logistic
import export
import main_dino
import report
import utils
import vision_transformer
import visualize_attention
from dino_crops import View
from dino_features import OnlineKnn
from utils import Inputs, UserError

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def inputs(in_chans, value_range=None):
    return Inputs(in_chans, (0.5,) * in_chans, (0.25,) * in_chans, value_range)


def array_file(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def planes(path, in_chans, value_range=None):
    return dino_images.decode(dino_images.open_image(path), inputs(in_chans, value_range))


def assert_planes(path, expected):
    """The planes of a file equal an array [C, H, W] to rounding."""
    np.testing.assert_allclose(planes(path, len(expected)).numpy(), expected, rtol=1e-6, err_msg=str(path))


# ---- files ----


def test_arrays_have_channels_first_or_last(tmp_path, rng):
    values = rng.random((4, 6, 5), dtype=np.float32)
    for array in (values, np.moveaxis(values, 0, -1)):
        assert_planes(array_file(tmp_path / "a.npy", array), values)
    both = values[:, :, :4]  # 4 x 6 x 4: channels are last
    assert_planes(array_file(tmp_path / "b.npy", both), np.moveaxis(both, -1, 0))


@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (6, 5, 1)])
def test_arrays_of_one_channel_need_no_axis_for_it(tmp_path, rng, shape):
    values = rng.random((6, 5), dtype=np.float32)
    assert_planes(array_file(tmp_path / "a.npy", values.reshape(shape)), values[None])


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "int16"])
def test_integers_are_divided_by_the_largest_value_of_their_type(tmp_path, dtype):
    largest = np.iinfo(dtype).max
    values = np.array([[0, 1, largest // 3], [largest // 2, largest - 1, largest]], dtype)
    assert_planes(array_file(tmp_path / "a.npy", values), values[None] / largest)


def test_floats_and_booleans_are_kept(tmp_path):
    for values in (np.array([[0.25, 1.0]]), np.array([[True, False]]), np.array([[0.5, 0.125]], np.float16)):
        assert_planes(array_file(tmp_path / "a.npy", values), values[None].astype(float))


def test_a_value_range_maps_to_0_and_1_and_clips(tmp_path):
    path = array_file(tmp_path / "ct.npy", np.array([[-3000, -1000, -300, 400, 2000]], np.int16))
    assert planes(path, 1, (-1000, 400))[0].tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


def header(shape, dtype="<f4"):
    """The start of a .npy file, without its values."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


ONES = np.ones((4, 8, 8), np.float32)
BAD_ARRAYS = {
    "pickled": (np.array([[{}]], dtype=object), "an array of object, not of image values"),
    "complex": (ONES * 1j, "an array of complex64"),
    "NaN": (ONES * np.nan, "NaN or infinite"),
    "three channels": (ONES[:3], r"an array of shape \(3, 8, 8\) does not have --in_chans 4"),
    "empty": (ONES[:, :0], "is empty"),
    "reflectances": (ONES * 3000, "between 3000 and 3000, outside of 0 to 1; set --value_range"),
    "Hounsfield units": ((ONES * -1).astype(np.int16), "between -1 and -1, outside of 0 to 32767; .*--value_range"),
    "huge": (header((4, 10**6, 10**6)), "more than 200 million"),
    "cut": (header((4, 8, 8)), "Repair"),
    "no header": (b"\x93NUMPY", "Repair"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_a_bad_array_is_named_with_the_reason(tmp_path, kind):
    array, words = BAD_ARRAYS[kind]
    path = tmp_path / "bad.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array, allow_pickle=True)
    with pytest.raises(dino_images.BadImage, match=f"{path}.*{words}") as raised:
        planes(path, 4)
    assert "\n" not in str(raised.value)


def test_gray_images_keep_their_precision(tmp_path, rng):
    deep = rng.integers(0, 65536, (7, 9)).astype(np.uint16)
    files = {"a.png": deep, "a.tif": deep, "big-endian.tif": deep.astype(">u2"), "wide.tif": deep.astype(np.int32)}
    for name, values in files.items():
        Image.fromarray(values).save(tmp_path / name)
        assert_planes(tmp_path / name, deep[None] / 65535)
    floats = rng.random((7, 9), dtype=np.float32)
    Image.fromarray(floats).save(tmp_path / "floats.tif")
    assert torch.equal(planes(tmp_path / "floats.tif", 1)[0], torch.from_numpy(floats))


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "LA"])
def test_color_images_become_pils_gray(tmp_path, rng, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).convert(mode).save(path)
    assert_planes(path, np.asarray(Image.open(path).convert("L"))[None] / 255)


def test_pages_of_a_tiff_and_bands_of_an_image_are_channels(tmp_path, rng):
    values = rng.integers(0, 65536, (5, 6, 7)).astype(np.uint16)
    first, *others = map(Image.fromarray, values)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=others)
    assert_planes(tmp_path / "pages.tif", values / 65535)
    bands = rng.integers(0, 256, (6, 7, 4)).astype(np.uint8)
    Image.fromarray(bands).save(tmp_path / "bands.png")
    assert_planes(tmp_path / "bands.png", np.moveaxis(bands, -1, 0) / 255)
    with pytest.raises(dino_images.BadImage, match=r"pages\.tif: it has 5 page\(s\) of 1 band\(s\), not --in_chans 4"):
        planes(tmp_path / "pages.tif", 4)


@pytest.mark.parametrize("other", [Image.new("L", (8, 9)), Image.new("I;16", (8, 8))], ids=["size", "type"])
def test_pages_that_differ_in_size_or_type_are_refused(tmp_path, other):
    Image.new("L", (8, 8)).save(tmp_path / "a.tif", save_all=True, append_images=[other])
    with pytest.raises(dino_images.BadImage, match=r"a\.tif: (all input arrays must have the same|Cannot cast)"):
        planes(tmp_path / "a.tif", 2)


def test_arrays_in_folders_are_images_only_for_other_than_3_channels(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dino_files, "WORTH_CACHING", 1)
    root = tmp_path / "images"
    array_file(root / "b.npy", ONES)
    Image.new("RGB", (8, 8)).save(root / "a.png")
    os.utime(root, (1e9, 1e9))  # the index of a folder that has just changed is not cached
    for _ in range(2):
        assert [len(dino_files.find_images(root, in_chans=number)) for number in (3, 4)] == [1, 2]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("augmentation", ["pil", "fast"])
def test_an_array_in_a_list_of_photographs_is_refused(tmp_path, augmentation):
    array_file(tmp_path / "a.npy", ONES)
    (tmp_path / "list.txt").write_text("a.npy\n")
    image = dino_files.find_images(tmp_path / "list.txt").open(0)
    augment = main_dino.DataAugmentationDINO((0.4, 1), (0.05, 0.4), 1, augmentation=augmentation)
    for read in (augment, dino_images.to_rgb):
        with pytest.raises(dino_images.BadImage, match=r"a\.npy: an array of shape \(4, 8, 8\) does not have"):
            read(image)


def three_planes(folder, kind):
    """A file with the planes 0, 100 and 65535 of 16 bits, as an array or as the pages of a TIFF."""
    values = np.zeros((3, 4, 4), np.uint16)
    values[1], values[2] = 100, 65535
    folder.mkdir(exist_ok=True)
    if kind == "array":
        np.save(folder / "x.npy", np.moveaxis(values, 0, -1))
    else:
        first, *others = map(Image.fromarray, values)
        first.save(folder / "x.tif", save_all=True, append_images=others)
    return dino_files.find_images(folder)


@pytest.mark.parametrize("kind", ["array", "pages"])
def test_three_planes_are_a_photograph_or_keep_their_bits(tmp_path, kind):
    images = three_planes(tmp_path / kind, kind)
    assert dino_images.decode(images.open(0), utils.RGB).getpixel((1, 1)) == (0, 0, 255)
    exact = utils.RGB._replace(value_range=(0, 200))
    assert dino_images.decode(images.open(0), exact)[:, 1, 1].tolist() == [0, 0.5, 1]
    crop = dino_crops.eval_transform(3, exact)(dino_images.decode(images.open(0), exact))
    want = (torch.tensor([0, 0.5, 1]) - torch.tensor(utils.IMAGENET_MEAN)) / torch.tensor(utils.IMAGENET_STD)
    assert_near(crop[:, 1, 1], want, 1e-4)


def test_a_document_or_a_pyramid_of_three_pages_is_its_first_page(tmp_path):
    sizes, pages = [(8, 8), (4, 4), (2, 2)], [Image.new("1", (8, 8), white) for white in (1, 0, 0)]
    for name, kept in {"pyramid": [Image.new("L", size, 7) for size in sizes], "fax": pages}.items():
        kept[0].save(tmp_path / f"{name}.tif", save_all=True, append_images=kept[1:])
    assert dino_images.load_image(tmp_path / "pyramid.tif").getpixel((1, 1)) == (7, 7, 7)
    assert dino_images.load_image(tmp_path / "fax.tif").getpixel((1, 1)) == (255, 255, 255)


def test_a_run_on_three_planes_keeps_their_range(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        np.save(tmp_path / "images" / f"{i}.npy", rng.integers(0, 4096, (12, 12, 3), dtype=np.uint16))
    flags = [*SMALL_RUN, "--data_path", "images", "--value_range", 0, 4095, "--output_dir", "run", "--epochs", 1]
    main_dino.train_dino(arguments_of(main_dino, *flags, "--warmup_epochs", 0, "--batch_size_per_gpu", 4))
    saved = torch.load("run/checkpoint.pth", weights_only=True)["args"]
    assert (saved["in_chans"], saved["value_range"]) == (3, [0, 4095])


# ---- crops ----


def cubic(x):
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_matrix(length, size):
    """Matrix [size, length] of Keys' cubic kernel (a = -1/2), stretched where the size shrinks."""
    scale = length / size
    matrix = np.zeros((size, length))
    for i in range(size):
        for j in range(length):
            matrix[i, j] = cubic((j + 0.5 - (i + 0.5) * scale) / max(scale, 1))
    return matrix / matrix.sum(axis=1, keepdims=True)


def slow_view(image, view):
    """A view of an image [C, H, W] in float64, with plain loops."""
    left, top, right, bottom = view.box
    rows, columns = resize_matrix(bottom - top, view.size), resize_matrix(right - left, view.size)
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
JITTER = (("contrast", 1.4), ("hue", 0.1), ("brightness", 1.3), ("saturation", 1.2))
CHANGES = {
    "resized": {},
    "enlarged": {"size": 40},
    "flipped": {"flip": True},
    **{name: {"jitter": ((name, 0.7),)} for name in ("brightness", "contrast", "saturation")},
    "hue": {"jitter": (("hue", 0.1),)},
    "gray": {"gray": True},
    "blurred": {"blur": 1.3},
    "solarized": {"solarize": True},
    "all": {"flip": True, "jitter": JITTER, "blur": 0.7, "solarize": True},
    "all, gray": {"jitter": JITTER[::-1], "gray": True, "blur": 2.0, "solarize": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_crops_match_plain_loops_in_float64(rng, change):
    image = rng.random((4, 30, 40))
    view = PLAIN._replace(**CHANGES[change])
    (got,) = dino_crops.render_planes(torch.from_numpy(image).float(), [view])
    assert got.dtype == torch.int16
    np.testing.assert_allclose((got.numpy() + 32768.0) / 65535, slow_view(image, view), atol=2e-5)


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 2.0, 7.0])
def test_the_radius_of_a_blur_is_its_standard_deviation(radius):
    kernel = np.array(dino_crops.exact_blur_kernel(radius))
    places = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1)
    assert kernel @ places**2 == pytest.approx(radius**2)


VIEW = dino_crops.RandomView(32, (0.4, 1), dino_crops.GaussianBlur(), dino_crops.Solarization(0.2))


def test_arrays_and_photographs_of_a_size_get_the_same_views():
    for seed in range(20):
        drawn = []
        for image in (Image.new("RGB", (50, 40)), torch.zeros(4, 40, 50)):
            utils.fix_random_seeds(seed)
            drawn.append((VIEW.draw(image), random.random()))
        assert drawn[0] == drawn[1]


def test_crops_are_16_bit_integers_or_normalized_floats(tmp_path, rng):
    image = dino_images.open_image(array_file(tmp_path / "a.npy", rng.random((40, 50, 2))))
    crops = []
    for as_integers in (True, False):
        augment = main_dino.DataAugmentationDINO(
            (0.4, 1), (0.05, 0.4), 2, global_crops_size=32, local_crops_size=16, as_uint8=as_integers,
            inputs=Inputs(2, (0.25, 0.5), (0.5, 2.0)),
        )  # fmt: skip
        utils.fix_random_seeds(3)
        crops.append(augment(image))
    assert [tuple(crop.shape) for crop in crops[0]] == [(2, 32, 32)] * 2 + [(2, 16, 16)] * 2
    for integers, floats in zip(*crops, strict=True):
        assert integers.dtype == torch.int16
        values = (integers.numpy() + 32768.0) / 65535
        expected = np.stack([(values[0] - 0.25) / 0.5, (values[1] - 0.5) / 2.0])
        np.testing.assert_allclose(floats.numpy(), expected, atol=1e-6)


def test_eval_transform_crops_the_center_of_an_array_like_that_of_a_photograph(rng):
    # Levels far from 0 and 255: nothing is clipped. PIL still rounds after each of two passes.
    image = Image.fromarray(rng.integers(80, 176, (20, 30)).astype(np.uint8)).resize((60, 40))
    values = torch.from_numpy(np.array(image))[None].float() / 255
    got = dino_crops.eval_transform(28, Inputs(1, (0.5,), (0.25,)))(values)
    expected = dino_crops.eval_transform(28)(Image.merge("RGB", [image] * 3))
    assert (255 * (got[0] * 0.25 + 0.5) - expected[0]).abs().max() < 1.2


# ---- mean and std ----


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """train/ and val/ with arrays of 4 channels in two classes, which differ in one channel."""
    root, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(2)
    for part, number in (("train", 12), ("val", 4)):
        for name in ("a", "b"):
            for i in range(number):
                values = rng.random((4, 36, 40)) * np.array([0.1, 0.3, 0.6, 1.0])[:, None, None]
                values[0] += 0.8 * (name == "b")
                array_file(root / part / name / f"{i}.npy", values.astype(np.float32))
    return root


def test_mean_and_std_equal_numpys(bands):
    images = dino_files.find_images(bands / "train", in_chans=4)
    mean, std = dino_data.image_statistics(images, inputs(4), 2)
    everything = np.stack([np.load(images.name(i)).astype(np.float64) for i in range(len(images))])
    np.testing.assert_allclose(mean, everything.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, everything.std(axis=(0, 2, 3)), rtol=1e-12)


def test_many_photographs_are_measured_on_a_sample_spread_over_all(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(dino_data, "MOST_MEASURED", 3)
    for i in range(40):
        Image.fromarray(rng.integers(0, 50 + 5 * i, (8, 8, 3)).astype(np.uint8)).save(tmp_path / f"{i:02}.png")
    images = dino_files.find_images(tmp_path)
    mean, std = dino_data.image_statistics(images, utils.RGB, 0)
    pixels = np.stack([np.asarray(Image.open(images.name(i)).convert("RGB")) / 255 for i in (0, 13, 26)])
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize(
    ("in_chans", "words"),
    [
        (2, r"channel 1 \(from 0\) is constant in all 1 images"),
        (5, r"none of 1 images can be read\. The first: .*does not have --in_chans 5"),
    ],
)
def test_what_can_not_be_measured_is_an_error(tmp_path, rng, in_chans, words):
    array_file(tmp_path / "a.npy", np.stack([rng.random((8, 8)), np.full((8, 8), 0.5)]))
    images = dino_files.find_images(tmp_path, in_chans=in_chans)
    with pytest.raises(UserError, match=words):
        dino_data.image_statistics(images, inputs(in_chans), 0)


@pytest.mark.parametrize(("largest", "warns"), [(4095, True), (65535, False)])
def test_images_that_fill_a_small_part_of_their_range_give_a_warning(tmp_path, capsys, rng, largest, warns):
    for i in range(3):
        Image.fromarray(rng.integers(0, largest, (20, 20), dtype=np.uint16)).save(tmp_path / f"{i}.png")
    flags = ["--in_chans", 1, "--compute_stats", "true", "--num_workers", 0, "--data_path", tmp_path]
    args = arguments_of(main_dino, *flags, "--output_dir", tmp_path)
    dino_data.training_images(args)
    assert ("--value_range, such as 0 4095" in capsys.readouterr().out) == warns
    assert args.mean[0] == pytest.approx(largest / 65535 / 2, rel=0.1)


# ---- arguments ----

FOUR = ("--in_chans", 4)
MISTAKES = {
    "--in_chans 4 needs --mean and --std, 4 numbers each, or --compute_stats true": FOUR,
    "--mean has 2 numbers, --in_chans 4 needs 4": (*FOUR, "--mean", 0.1, 0.2, "--std", 1, 1),
    "--std has 2 numbers, --in_chans 3 needs 3": ("--mean", 0.1, 0.2, 0.3, "--std", 1, 1),
    "--mean is given without --std": ("--mean", 0.1, 0.2, 0.3),
    "--std is given without --mean": ("--std", 0.1, 0.2, 0.3),
    "--mean is given, and --compute_stats": ("--mean", 0, 0, 0, "--std", 1, 1, 1, "--compute_stats", "true"),
    "--augmentation fast is for photographs": (*FOUR, "--compute_stats", "true", "--augmentation", "fast"),
    "Use --augmentation pil with --value_range": ("--value_range", 0, 1, "--augmentation", "fast"),
    "--value_range 1.0 0.0: put the smaller number first": (*FOUR, "--compute_stats", "true", "--value_range", 1, 0),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_flags_that_contradict_each_other_are_refused_before_any_work(words, refusal, tmp_path):
    flags = ["--data_path", tmp_path, "--output_dir", tmp_path / "out", *MISTAKES[words]]
    line = refusal(main_dino, *flags)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_channels_mean_and_std_in_a_checkpoint_must_fit_together():
    assert utils.inputs_of(None) == utils.inputs_of({"mean": None, "arch": "vit_tiny"}) == utils.RGB
    assert utils.inputs_of({"in_chans": 1, "mean": [0.5], "std": [1]}) == Inputs(1, (0.5,), (1.0,))
    for args in ({"in_chans": 4}, {"mean": 3}, {"in_chans": "x"}, {"mean": ["a", "b", "c"]}):
        with pytest.raises(UserError, match="don't fit together"):
            utils.inputs_of(args)


# ---- networks ----


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18", "swin_t", "xcit_nano_12_p16", "timm:convnext_atto"])
def test_networks_support_any_number_of_channels_and_look_at_each(arch):
    model, width = dino_backbones.build_backbone(arch, 16, 64, in_chans=5)
    images = torch.randn(2, 5, 64, 64, generator=torch.Generator().manual_seed(0))
    features = utils.features_of(model.eval(), images)
    assert features.shape == (2, width)
    for channel in range(5):
        others = images.clone()
        others[:, channel] += 1
        assert not torch.allclose(utils.features_of(model, others), features), f"channel {channel} has no effect"


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_weights_for_rgb_are_summed_for_gray_images(arch):
    color, gray = (dino_backbones.build_backbone(arch, 16, 32, in_chans=n)[0].eval() for n in (3, 1))
    state = color.state_dict()
    dino_layouts.fit_first_layer(gray, state, "a file")
    dino_backbones.load_backbone_state(gray, state, "a file", arch)
    images = tensor("gray", (2, 1, 32, 32))
    expected = utils.features_of(color, images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(utils.features_of(gray, images), expected, atol=1e-4, rtol=1e-4)


def test_for_many_channels_the_first_layer_starts_at_random_which_is_logged(capsys):
    color, many = (dino_backbones.build_backbone("vit_nano", 16, 32, in_chans=n)[0] for n in (3, 4))
    fresh, state = many.patch_embed.proj.weight.clone(), color.state_dict()
    dino_layouts.fit_first_layer(many, state, "a file")
    dino_backbones.load_backbone_state(many, state, "a file", "vit_nano")
    assert torch.equal(many.patch_embed.proj.weight, fresh)
    assert torch.equal(many.blocks[0].attn.qkv.weight, color.blocks[0].attn.qkv.weight)
    assert "patch_embed.proj starts at random: it has 3 channels in a file, 4 here" in capsys.readouterr().out


# ---- runs ----

ON_BANDS = [*SMALL_RUN, "--in_chans", "4", "--saveckp_freq", "1"]
EVALUATED = ["--arch", "vit_nano", "--patch_size", 16, "--device", "cpu"]


def run(script, *flags):
    """Run a script (a module) in this process."""
    main = getattr(script, "main", None) or script.train_dino
    main(arguments_of(script, *flags))


@pytest.fixture(scope="module")
def trained(bands, tmp_path_factory):
    """A run on arrays with --compute_stats and --knn_every."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--compute_stats", "true", "--knn_every", 1, "--knn_data", bands, "--data_path", bands / "train"]
    run(main_dino, *ON_BANDS, *flags, "--output_dir", folder)
    return folder


def weights(folder):
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    return {key: value for name in ("student", "teacher") for key, value in checkpoint[name].items()}


def test_weights_do_not_depend_on_workers_or_on_whether_mean_and_std_are_measured_or_flags(trained, bands, tmp_path):
    args = torch.load(trained / "checkpoint.pth", weights_only=True)["args"]
    measured = ["--mean", *args["mean"], "--std", *args["std"]]
    workers = ["--num_workers", 2]
    run(main_dino, *ON_BANDS, *measured, *workers, "--data_path", bands / "train", "--output_dir", tmp_path)
    assert same_state(weights(trained), weights(tmp_path))


@pytest.fixture
def with_flags(bands, tmp_path):
    """Arguments of a run with another mean and std for each channel."""
    numbers = ["--mean", 0.45, 0.15, 0.3, 0.5, "--std", 0.4, 0.1, 0.2, 0.3]
    flags = ["--epochs", 1, *numbers, "--data_path", bands / "train", "--output_dir", tmp_path]
    args = arguments_of(main_dino, *ON_BANDS, *flags)
    return args, *(np.array(numbers)[:, None, None] for numbers in (args.mean, args.std))


def test_the_network_sees_crops_minus_the_mean_divided_by_the_std(with_flags, monkeypatch):
    args, mean, std = with_flags
    make, loaders, seen, embed = dino_data.training_loader, [], [], vision_transformer.PatchEmbed.forward
    monkeypatch.setattr(dino_data, "training_loader", lambda *given: loaders.append(make(*given)) or loaders[-1])
    monkeypatch.setattr(
        vision_transformer.PatchEmbed, "forward", lambda self, images: seen.append(images) or embed(self, images)
    )
    main_dino.train_dino(args)
    loaders[0].sampler.set_epoch(0)
    crops, *_ = next(iter(loaders[0]))
    (first, *_) = [images for images in seen if images.any()]  # the teacher's, after zeros that probe the network
    expected = ((torch.cat(crops[:2]).numpy() + 32768.0) / 65535 - mean) / std
    np.testing.assert_allclose(first.numpy(), expected, atol=1e-5)


def test_knn_sees_images_minus_the_mean_divided_by_the_std(with_flags, bands):
    args, mean, std = with_flags
    args.knn_every, args.knn_data = 1, str(bands)
    train = OnlineKnn(args, None, torch.device("cpu")).sets[0]
    values = np.load(train.images.name(3))[:, 2:34, 4:36]  # of 36 x 40 pixels, which is 8/7 of 32
    np.testing.assert_allclose(train[3][0].numpy(), (values - mean) / std, atol=1e-3)


def test_a_resumed_run_uses_mean_and_std_of_its_checkpoint(trained, bands, tmp_path, capsys):
    shutil.copy(trained / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    flags = ["--compute_stats", "true", "--data_path", bands / "train", "--output_dir", tmp_path]
    run(main_dino, *ON_BANDS, *flags)
    said = capsys.readouterr().out
    assert "continuing in epoch 1" in said
    assert "measured" not in said
    assert same_state(weights(trained), weights(tmp_path))
    args = arguments_of(main_dino, *ON_BANDS, *flags)
    assert dino_data.earlier_statistics(args)
    args.value_range = [0.0, 2.0]  # then it is measured again
    assert dino_data.earlier_statistics(args) is None


@pytest.mark.parametrize("stored", [False, True])
def test_a_run_on_photographs_resumes_only_with_the_same_statistics(stored):
    before = utils.plain_args(arguments_of(main_dino))
    if not stored:  # by a version without these flags
        before = {name: value for name, value in before.items() if name not in ("in_chans", "mean", "std")}
    networks = {name: {"norm.weight": torch.zeros(1)} for name in ("student", "teacher")}

    def check(*flags):
        checkpoint = {**networks, "epoch": 1, "args": before}
        dino_checkpoints.check_resumable("x.pth", checkpoint, arguments_of(main_dino, *flags))

    check()
    check("--mean", *utils.IMAGENET_MEAN, "--std", *utils.IMAGENET_STD)
    with pytest.raises(UserError, match=r"made with --mean \[0.485, .*this run has --mean \[0.1, .*result"):
        check("--mean", 0.1, 0.1, 0.1, "--std", *utils.IMAGENET_STD)
    with pytest.raises(UserError, match=r"made with --in_chans 3, this run has --in_chans 1"):
        check("--in_chans", 1, "--mean", 0.5, "--std", 0.2)


def test_mean_and_std_are_in_run_json(trained):
    found = json.loads((trained / "run.json").read_text())["changed"]
    assert len(found["mean"]) == len(found["std"]) == found["in_chans"] == 4
    log = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert all(0 <= line["knn_top1"] <= 100 for line in log)


def test_evaluations_use_channels_mean_and_std_of_the_checkpoint(trained, bands, tmp_path, capsys):
    flags = [*EVALUATED, "--image_size", 32, "--data_path", bands, "--num_workers", 0]
    flags += ["--pretrained_weights", trained / "checkpoint.pth"]
    run(eval_knn, *flags, "--nb_knn", 20, "--baselines", "true")
    logged = json.loads((trained / "log.txt").read_text().splitlines()[-1])["knn_top1"]
    said = capsys.readouterr().out
    assert f"20-NN classifier result: Top1: {logged}" in said
    assert re.search(r"raw pixels +\d", said)
    run(eval_logistic, *flags)
    assert "Logistic regression with --l2 0.1: Top1: " in capsys.readouterr().out
    run(eval_linear, *flags, "--epochs", 1, "--n_last_blocks", 1, "--output_dir", tmp_path)
    assert "The linear classifier is trained" in capsys.readouterr().out


def test_linear_evaluation_normalizes_random_crops_and_validation_images(bands, monkeypatch):
    args, found = arguments_of(eval_linear, *EVALUATED, "--image_size", 32, "--data_path", bands), []
    for mean, std in ((0.0, 1.0), (0.25, 0.5)):
        kind = Inputs(4, (mean,) * 4, (std,) * 4)
        monkeypatch.setattr(dino_checkpoints, "trained_inputs", lambda _, kind=kind: kind)
        train, val, *_ = eval_linear.load_data(args)
        found.append((train[0, 5][0], val[5][0]))
    for plain, normalized in zip(*found, strict=True):
        assert plain.shape == (4, 32, 32)
        torch.testing.assert_close(normalized, (plain - 0.25) / 0.5, atol=1e-5, rtol=0)


def test_an_exported_backbone_of_4_channels_needs_its_checkpoint_to_load(trained, tmp_path, capsys):
    flags = ["--arch", "vit_nano", "--pretrained_weights", trained / "checkpoint.pth", "--to", "backbone"]
    run(export, *flags, "--output", tmp_path / "plain.pth")
    said = capsys.readouterr().out
    assert "in_chans=4" in said
    assert "4 channels of values from 0 to 1, less the mean (0." in said
    model, _ = dino_backbones.build_backbone("vit_nano", 16)
    with pytest.raises(UserError, match="Use the training checkpoint, which says how many channels"):
        dino_backbones.load_weights(model, tmp_path / "plain.pth", arch="vit_nano")


def test_a_report_shows_images_of_4_channels(trained, bands, tmp_path):
    flags = ["--data_path", bands, "--output", tmp_path / "page.html", "--device", "cpu", "--num_workers", 0]
    run(report, trained, *flags)
    assert (tmp_path / "page.html").read_text().count("<img") > 30


def test_evaluations_for_photographs_refuse_other_inputs(trained, tmp_path, refusal):
    for name in ("original/200000.png", "strong/200001.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    flags = ["--data_path", tmp_path, "--pretrained_weights", trained / "checkpoint.pth"]
    line = refusal(eval_copy_detection, *EVALUATED, *flags)
    assert "was trained on other inputs (channels: 4, mean 0." in line
    assert "needs RGB photographs" in line


def test_gray_images_of_16_bits_can_be_trained_on_and_show_their_attention(tmp_path, rng):
    for i in range(16):
        level = rng.integers(20000, 40000)
        Image.fromarray((level + rng.integers(0, 9000, (36, 40))).astype(np.uint16)).save(tmp_path / f"{i}.png")
    out = tmp_path / "out"
    flags = ["--in_chans", 1, "--compute_stats", "true", "--data_path", tmp_path, "--output_dir", out]
    run(main_dino, *SMALL_RUN, "--epochs", 1, *flags)
    args = torch.load(out / "checkpoint.pth", weights_only=True)["args"]
    assert 0.3 < args["mean"][0] < 0.7
    shown = ["--image_path", tmp_path / "0.png", "--image_size", 32, "--output_dir", tmp_path / "shown"]
    run(visualize_attention, *EVALUATED, "--pretrained_weights", out / "checkpoint.pth", *shown)
    assert (tmp_path / "shown" / "overview.png").exists()


def test_two_processes_train_on_pages_and_replace_a_file_with_too_few(tmp_path, rng):
    for i in range(20):
        pages = [Image.fromarray(rng.integers(0, 256, (36, 40)).astype(np.uint8)) for _ in range(5 - (i == 7))]
        pages[0].save(tmp_path / f"{i:02}.tif", save_all=True, append_images=pages[1:])
    out = tmp_path / "out"
    flags = ["--in_chans", 5, "--compute_stats", "true", "--data_path", tmp_path, "--output_dir", out]
    rest = ["--epochs", 1, "--batch_size_per_gpu", 5, "--max_bad_images", 0.1]
    run_script("main_dino.py", *SMALL_RUN, *rest, *flags, processes=2)
    (line,) = (out / "bad_images.txt").read_text().splitlines()
    assert line == f"{tmp_path / '07.tif'}\tit has 4 page(s) of 1 band(s), not --in_chans 5"
