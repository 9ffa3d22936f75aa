"""Copy detection: features, whitening and average precision against float64 loops, the layout on disk, whole runs."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import area_under_curve, arguments_of, assert_near, run_script, shared, tensor, wide_nano
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

import dino_features
import dino_images
import dino_sample
import eval_copy_detection as copy_detection
import utils
import vision_transformer as vits

SMALL = ["--arch", "vit_nano", "--patch_size", "8", "--device", "cpu", "--num_workers", "0", "--imsize", "40"]


# ---- a small data set ----

# fmt: off
PHOTOGRAPHS = {
    "200000": "astronaut", "200050": "motorcycle_left", "200100": "chelsea", "200200": "coffee", "200300": "rocket",
    "200400": "camera", "200500": "coins", "200600": "text",
}
# fmt: on


def attack(image, kind):
    """A strong copy of a photograph: mirrored, rotated and blurred, or on a page."""
    width, height = image.size
    if kind == 0:
        return ImageEnhance.Brightness(ImageOps.mirror(image)).enhance(0.6)
    if kind == 1:
        inside = image.crop((width // 5, height // 5, width, height)).rotate(12)
        return inside.filter(ImageFilter.GaussianBlur(2))
    page = Image.new("RGB", (2 * width, 2 * height), "white")
    page.paste(image, (width // 3, height // 2))
    ImageDraw.Draw(page).rectangle((0, 0, width // 2, height), fill="blue")
    return page


def crop(image, share):
    """A photograph without `share` percent of its area, cropped on all sides."""
    kept = (1 - share / 100) ** 0.5
    width, height = image.size
    left, top = round(width * (1 - kept) / 2), round(height * (1 - kept) / 2)
    return image.crop((left, top, width - left, height - top))


@pytest.fixture(scope="module")
def copydays(tmp_path_factory):
    """Eight originals, two of them with the same prefix, ten strong copies, and four of the other blocks."""
    root, blocks = tmp_path_factory.mktemp("data") / "copydays", ("jpegqual/3", "jpegqual/20", "crops/20", "crops/80")
    folders = {name: root / name for name in ("original", "strong", *blocks)}
    for folder in folders.values():
        folder.mkdir(parents=True)
    files = {Path(path).stem: path for path in dino_sample.find_photographs()}
    for number, (name, photograph) in enumerate(PHOTOGRAPHS.items()):
        image = dino_images.load_image(files[photograph])
        image.thumbnail((160, 160))
        image.save(folders["original"] / f"{name}.jpg", quality=95)
        image.save(folders["jpegqual/3"] / f"{name}.jpg", quality=3)
        image.save(folders["jpegqual/20"] / f"{name}.jpg", quality=20)
        crop(image, 20).save(folders["crops/20"] / f"{name}.jpg")
        if number % 3:
            crop(image, 80).save(folders["crops/80"] / f"{name}.jpg")
        for copy in range(2 if number < 2 else 1):
            attack(image, (number + copy) % 3).save(folders["strong"] / f"{int(name) + copy + 1}.jpg")
    return root


@pytest.fixture
def own(copydays, tmp_path):
    """A copy of the data set that a test may change."""
    shutil.copytree(copydays, tmp_path / "copydays")
    return tmp_path / "copydays"


@pytest.fixture(scope="module")
def others(sample_root, tmp_path_factory):
    """Folders of 306 images for the whitening, more than the features have dimensions, and of 54 distractors."""
    root = tmp_path_factory.mktemp("others")
    classes = sorted((sample_root / "train").iterdir())
    for name, places in (("whitening", range(17)), ("distractors", range(20, 23))):
        (root / name).mkdir()
        for source in (folder / f"{i:04}.png" for folder in classes for i in places):
            (root / name / f"{source.parent.name}_{source.name}").symlink_to(source)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return wide_nano(tmp_path_factory.mktemp("weights") / "nano.pth", 40)


def run(capsys, *flags):
    capsys.readouterr()
    copy_detection.main(arguments_of(copy_detection, *SMALL, *flags))
    return capsys.readouterr().out


@pytest.fixture
def error_line(refusal):
    """error_line(*flags) -> the error line of a run that exits with code 2."""
    return partial(refusal, copy_detection, *SMALL)


def results(output):
    """{block: (mAP, number of queries)} as printed by a run."""
    found = re.findall(r"^eval on (\S+) mAP=(\d\.\d{3}) \((\d+) queries\)$", output, re.M)
    return {block: (float(mean_ap), int(number)) for block, mean_ap, number in found}


# ---- flags ----


def test_flags_have_the_published_names_and_defaults():
    args = vars(arguments_of(copy_detection, "--batch_size", 16))  # an abbreviation in use
    published = {"arch": "vit_base", "patch_size": 8, "imsize": 320, "batch_size_per_gpu": 16, "use_cuda": True}
    published |= {"pretrained_weights": "", "checkpoint_key": "teacher"}
    assert published.items() <= args.items()
    assert {"data_path", "whitening_path", "distractors_path", "dist_url", "local_rank", "num_workers"} <= args.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "resnet50"], "--arch resnet50 has no CLS and patch tokens. Use a ViT, such as vit_small"),
        (["--whitening_path", "EMPTY"], "--whitening_path EMPTY"),
        (["--distractors_path", "EMPTY"], "--distractors_path EMPTY"),
        (["--data_path", "EMPTY"], "--data_path EMPTY must hold original/"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(error_line, copydays, tmp_path, flags, message):
    flags = [flag.replace("EMPTY", str(tmp_path)) for flag in flags]
    line = error_line("--data_path", copydays, "--pretrained_weights", "random", *flags)
    assert message.replace("EMPTY", str(tmp_path)) in line


# ---- data ----


def test_blocks_are_the_existing_folders_with_all_their_images(copydays):
    sizes = {block: len(files) for block, files in copy_detection.find_blocks(copydays).items()}
    assert sizes == {"original": 8, "strong": 10, "jpegqual/3": 8, "jpegqual/20": 8, "crops/20": 8, "crops/80": 5}


def test_all_published_blocks_are_known(tmp_path):
    wanted = ["original", "strong", *(f"jpegqual/{q}" for q in (3, 5, 8, 10, 15, 20, 30, 50, 75))]
    wanted += [f"crops/{share}" for share in (10, 15, 20, 30, 40, 50, 60, 70, 80)]
    for block in [*wanted, "crops/90", "other"]:
        (tmp_path / block).mkdir(parents=True)
        (tmp_path / block / "1.jpg").touch()
    assert list(copy_detection.find_blocks(tmp_path)) == wanted


def paths(folder, *names):
    return [Path(folder) / name for name in names]


def test_originals_are_matched_by_name_by_prefix_or_by_order():
    originals = paths("original", "200000.jpg", "200050.jpg", "200100.jpg")
    strong = paths("strong", "200001.jpg", "2001.jpg", "200077.JPG")
    assert copy_detection.positives("strong", strong, originals) == [[0, 1], [2], [0, 1]]
    copies = paths("crops/50", "200100.jpg", "200050.jpg")
    assert copy_detection.positives("crops/50", copies, originals) == [[2], [1]]
    renamed = paths("jpegqual/3", "copy1.jpg", "copy2.jpg", "copy3.jpg")
    assert copy_detection.positives("jpegqual/3", renamed, originals) == [[0], [1], [2]]


def test_strong_copies_with_whole_names_are_matched_by_them(capsys):
    names = [f"IMG_{number}" for number in range(1000, 1020)]
    originals, strong = (
        paths("original", *(f"{name}.jpg" for name in names)),
        paths("strong", "IMG_1003.png", "IMG_1019.jpg"),
    )
    assert copy_detection.positives("strong", strong, originals) == [[3], [19]]
    assert capsys.readouterr().out == "pairs of strong/ and original/: by name\n"


@pytest.mark.parametrize("names", [["IMG_1", "IMG_2"], ["IMG_1", "IMG_2", "DSC_1", "DSC_2"]])
def test_a_prefix_that_most_originals_share_is_refused(names):
    originals = paths("original", *(f"{name}.jpg" for name in names))
    with pytest.raises(utils.UserError, match=r"do not tell \d images apart: they are (DSC_, )?IMG_\. Give copies"):
        copy_detection.positives("strong", paths("strong", "IMG_1_copy.jpg"), originals)


@pytest.mark.parametrize(
    ("block", "names", "how"),
    [
        ("strong", ["200001.jpg"], "by the first 4 characters of the names"),
        ("crops/50", ["200000.jpg"], "by name"),
        ("crops/50", ["a.jpg", "b.jpg"], "in sorted order: no names match"),
    ],
)
def test_it_is_logged_how_pairs_were_made(capsys, block, names, how):
    copy_detection.positives(block, paths(block, *names), paths("original", "200000.jpg", "200100.jpg"))
    assert capsys.readouterr().out == f"pairs of {block}/ and original/: {how}\n"


@pytest.mark.parametrize(
    ("block", "names", "unmatched"),
    [
        ("crops/50", ["2000.jpg", "2001.jpg", "2003.jpg"], "1 of the 3 images in crops/50/ have no original: f/2003"),
        ("strong", ["2000a.jpg", "2009a.jpg"], "1 of the 2 images in strong/ have no original: f/2009a.jpg"),
        ("strong", ["x.jpg", "y.jpg", "z.jpg"], "3 of the 3 images in strong/ have no original"),
    ],
)
def test_copies_without_an_original_are_named(block, names, unmatched):
    originals = paths("original", "2000.jpg", "2001.jpg", "2002.jpg")
    with pytest.raises(utils.UserError, match=re.escape(unmatched)):
        copy_detection.positives(block, paths("f", *names), originals)


def test_incomplete_data_is_one_line(error_line, own):
    flags = ("--data_path", own, "--pretrained_weights", "random")
    (own / "strong" / "299900.jpg").symlink_to(own / "strong" / "200001.jpg")
    assert "1 of the 11 images in strong/ have no original" in error_line(*flags)
    for file in (own / "strong").iterdir():
        file.unlink()
    assert f"--data_path {own}/strong has no images" in error_line(*flags)
    for block in ("strong", "jpegqual", "crops"):
        shutil.rmtree(own / block)
    assert f"--data_path {own} must hold original/" in error_line(*flags)
    (own / "original").rename(own / "strong")
    assert f"--data_path {own} must hold original/" in error_line(*flags)


def test_damaged_images_are_named(error_line, own):
    image = own / "crops" / "80" / "200050.jpg"
    image.write_bytes(image.read_bytes()[:400])
    flags = ("--data_path", own, "--pretrained_weights", "random", "--num_workers", 1)
    assert f"can't read the image {image}" in error_line(*flags)


def test_case_of_the_extension_renamed_blocks_and_other_files_do_not_matter(capsys, own, weights):
    flags = ("--pretrained_weights", weights, "--data_path", own)
    before = results(run(capsys, *flags))
    for file in list((own / "jpegqual" / "3").iterdir()):
        file.rename(file.with_name(f"copy_of_{file.stem}.JPG"))
    (own / "strong" / "notes.txt").write_text("not an image")
    (own / "strong" / ".jpg").write_text("a hidden file")
    assert results(run(capsys, *flags)) == before


def test_nan_features_are_an_error_and_not_a_result(error_line, copydays, weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["blocks.0.mlp.fc1.bias"][0] = np.nan
    torch.save(state, tmp_path / "diverged.pth")
    flags = ("--data_path", copydays, "--pretrained_weights", tmp_path / "diverged.pth")
    assert "NaN or infinite numbers" in error_line(*flags)


# ---- features ----


def test_features_are_the_cls_token_and_the_gem_pooled_patch_tokens():
    torch.manual_seed(2)
    vit = vits.vit_nano(patch_size=8, img_size=[32]).eval()
    seen = []
    vit.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().double().numpy()))
    features = copy_detection.CopyFeatures(vit)(tensor("copies", (2, 3, 32, 24)))
    (tokens,) = seen
    assert tokens.shape == (2, 1 + 4 * 3, vit.embed_dim)
    assert (tokens[:, 1:] < 0).any()
    for image, feature in zip(tokens, features, strict=True):
        pooled = []
        for dimension in range(vit.embed_dim):
            total = 0.0
            for patch in image[1:]:
                total += max(float(patch[dimension]), 1e-6) ** 4
            pooled.append((total / 12) ** 0.25)
        assert_near(feature, [*image[0], *pooled], 2e-6)


# ---- whitening ----


def golden_rows():
    """Rows [16, 16] with the golden Gram matrix, the Gram matrix, and the golden covariance after whitening."""
    golden = json.loads(shared("goldens/retrieval.json").read_text())
    gram = np.array(golden["pca_input_gram"])
    return np.linalg.cholesky(gram).T, gram, np.array(golden["pca_out_cov"])


def test_the_whitened_covariance_matches_the_golden_value():
    rows, gram, want = golden_rows()
    pca = dino_features.PCA(dim=8)
    pca.train_pca(gram)
    projected = pca.apply(rows)
    assert projected.shape == (16, 8)
    assert projected.T @ projected == pytest.approx(want, abs=1e-6)


def test_pca_divides_each_component_by_a_power_of_its_variance():
    pca = dino_features.PCA(dim=2, whit=0.25)
    pca.train_pca(np.diag([16.0, 81.0]))
    assert np.abs(pca.apply(np.eye(2))) == pytest.approx(np.array([[0, 1 / 2], [1 / 3, 0]]))


def test_pca_subtracts_the_mean_and_keeps_the_type_of_its_input():
    pca = dino_features.PCA(dim=3)
    pca.train_pca(torch.eye(3))
    pca.mean = np.array([1.0, 2.0, 3.0])
    rows = tensor("rows", (4, 3))
    assert (pca.apply(rows.numpy()) ** 2).sum(1) == pytest.approx(
        ((rows - torch.tensor([1, 2, 3])) ** 2).sum(1).numpy()
    )
    for dtype in (torch.float32, torch.float64):
        found = pca.apply(rows.to(dtype))
        assert found.dtype == dtype
        assert_near(found, pca.apply(rows.numpy()), 1e-6)


def test_whitened_features_have_mean_0_and_unit_second_moment(capsys):
    rows = (tensor("white", (500, 24)) @ tensor("mix", (24, 24)) + 5 * tensor("mean", (24,))).float()
    pca = copy_detection.learn_whitening(rows)
    white = pca.apply(rows)
    assert white.shape == (500, 24)
    assert white.dtype == torch.float32
    assert white.mean(dim=0).numpy() == pytest.approx(np.zeros(24), abs=1e-4)
    pca.mean = None
    about_0 = pca.apply(rows).double()
    assert (about_0.T @ about_0 / 500).numpy() == pytest.approx(np.eye(24), abs=1e-3)
    assert capsys.readouterr().out == ""


def test_pca_clamps_variances_to_1e_minus_5_of_the_largest():
    pca = dino_features.PCA(dim=3)
    pca.train_pca(np.diag([4.0, 4e-9, 0.0]))
    found = np.abs(pca.apply(np.eye(3)))
    assert sorted(found.sum(axis=0)) == pytest.approx([0.5, (4e-5) ** -0.5, (4e-5) ** -0.5])


def test_whitening_from_few_images_gives_a_warning_and_is_finite(capsys):
    few = tensor("few", (6, 24)) + 3
    pca = copy_detection.learn_whitening(few)
    assert "warning: only 6 images in --whitening_path for 24 dimensions" in capsys.readouterr().out
    assert pca.apply(tensor("new", (9, 24))).isfinite().all()
    pca.mean = None
    white = pca.apply(few).double()
    gram = white @ white.T / 6  # 6 points in 6 dimensions with unit second moment are orthogonal
    assert gram.numpy() == pytest.approx(np.eye(6), abs=1e-3)


def test_whitening_needs_images_that_differ(error_line, copydays, weights, tmp_path):
    flags = ("--data_path", copydays, "--pretrained_weights", weights, "--whitening_path", tmp_path)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        shutil.copy(copydays / "original" / "200100.jpg", tmp_path / name)
        line = error_line(*flags, "--batch_size_per_gpu", 2)
        assert "all images in --whitening_path have the same features" in line


# ---- search ----


def test_only_the_20_nearest_images_count():
    angles = torch.arange(30) * 0.05
    database = torch.stack((angles.cos(), angles.sin()), dim=1)
    queries = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    found = copy_detection.average_precisions(queries, database, [[0], [19], [20], [1, 25]])
    assert found == pytest.approx([1, (0 + 1 / 20) / 2, 0, (0 + 1 / 2) / 2 / 2])


def test_average_precisions_match_a_float64_search():
    queries, database = (
        torch.nn.functional.normalize(tensor(name, (n, 6)), dim=1) for name, n in (("q", 15), ("d", 40))
    )
    rng = np.random.default_rng(0)
    right = [rng.permutation(40)[: rng.integers(1, 9)].tolist() for _ in range(15)]
    want = []
    for query, numbers in zip(queries.tolist(), right, strict=True):
        similarity = [sum(a * b for a, b in zip(query, row, strict=True)) for row in database.tolist()]
        want.append(area_under_curve(numbers, sorted(range(40), key=lambda i, s=similarity: -s[i])[:20]))
    assert copy_detection.average_precisions(queries, database, right) == pytest.approx(want, abs=1e-9)
    assert len(set(want)) > 10


# ---- end to end ----


def slow_results(data, weights, whitening=None, distractors=None):
    """The whole evaluation, image by image in float64."""
    model = vits.vit_nano(patch_size=8, img_size=[40]).double().eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    tokens = []
    model.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output[0].numpy()))
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    @torch.no_grad()
    def feature(path):
        image = Image.open(path).convert("RGB").resize((40, 40), Image.Resampling.BICUBIC)
        model(torch.from_numpy((np.array(image).transpose(2, 0, 1) / 255 - mean) / std)[None])
        cls, *patches = tokens.pop()
        return np.concatenate((cls, (np.maximum(patches, 1e-6) ** 4).mean(axis=0) ** 0.25))

    def features(folder):
        return np.stack([feature(path) for path in sorted(folder.iterdir())])

    center, basis = 0, np.eye(2 * model.embed_dim)
    if whitening:
        learned = features(whitening)
        center = learned.mean(axis=0)
        _, spread, basis = np.linalg.svd(learned)  # a full basis, including directions without variance
        variances = np.zeros(len(basis))
        variances[: len(spread)] = spread**2 / len(learned)
        basis = basis / np.sqrt(np.maximum(variances, variances.max() / 1e5))[:, None]

    def directions(folder):
        rows = (features(folder) - center) @ basis.T
        return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))

    originals = sorted(os.listdir(data / "original"))
    database = directions(data / "original")
    if distractors:
        database = np.concatenate((database, directions(distractors)))
    found = {}
    for block in ("original", "strong", "jpegqual/3", "jpegqual/20", "crops/20", "crops/80"):
        aps = []
        for name, query in zip(sorted(os.listdir(data / block)), directions(data / block), strict=True):
            end = 4 if block == "strong" else None
            right = [i for i, original in enumerate(originals) if original[:end] == name[:end]]
            aps.append(area_under_curve(right, (-(database @ query)).argsort().tolist()[:20]))
        found[block] = (sum(aps) / len(aps), len(aps))
    return found


def assert_results(printed, want):
    assert list(printed) == list(want)
    for block, (mean_ap, number) in want.items():
        assert printed[block] == (pytest.approx(mean_ap, abs=0.00051), number)
    assert len({mean_ap for mean_ap, _ in want.values()}) > 2


@pytest.mark.parametrize("parts", [(), ("whitening", "distractors")])
def test_results_match_a_float64_evaluation(capsys, copydays, weights, others, parts):
    flags = [word for part in parts for word in (f"--{part}_path", others / part)]
    flags = ["--data_path", copydays, "--pretrained_weights", weights, *flags]
    output = run(capsys, *flags)
    assert_results(results(output), slow_results(copydays, weights, **{part: others / part for part in parts}))
    number = 54 if "distractors" in parts else 0
    assert f"database: {8 + number} images, including {number} distractors" in output
    assert "warning" not in output


def test_a_distractor_nearer_than_the_original_lowers_the_result(capsys, copydays, weights, tmp_path):
    flags = ("--data_path", copydays, "--pretrained_weights", weights)
    without = results(run(capsys, *flags))
    assert without["jpegqual/20"] == (1, 8)
    shutil.copytree(copydays / "jpegqual" / "20", tmp_path / "distractors")
    found = results(run(capsys, *flags, "--distractors_path", tmp_path / "distractors"))
    assert found["jpegqual/20"] == (0.25, 8)  # the original is ranked second: (0 + 1 / 2) / 2
    assert found["original"] == (1, 8)


@pytest.mark.parametrize("flags", [("--num_workers", 2), ("--batch_size_per_gpu", 3), ("--use_cuda", "false")])
def test_loading_and_storage_do_not_change_the_results(capsys, copydays, weights, others, flags):
    common = ("--data_path", copydays, "--pretrained_weights", weights, "--whitening_path", others / "distractors")
    assert results(run(capsys, *common, *flags)) == results(run(capsys, *common)) != {}


@pytest.mark.slow
def test_two_processes_print_what_one_prints(copydays, weights, others):
    flags = ["eval_copy_detection.py", *SMALL, "--data_path", copydays, "--pretrained_weights", weights]
    flags += [word for part in ("whitening", "distractors") for word in (f"--{part}_path", others / part)]
    alone = run_script(*flags).stdout
    together = run_script(*flags, "--num_workers", 1, processes=2).stdout
    assert results(alone) == results(together) != {}
    assert together.count("database: ") == 1
