"""From disk to crops: folders, transforms, the sampler, the embedded photographs."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision import transforms

import dino_crops
import dino_data
import dino_images
import main_dino
import utils
from utils import UserError

# ---- transforms ----


def test_blur_and_solarization_draw_from_python_random_as_published(sample_root):
    image = dino_images.load_image(next((sample_root / "train" / "coffee").iterdir()))
    for seed in range(8):
        random.seed(seed)
        blurred = dino_crops.GaussianBlur(p=0.5)(image)
        after = random.random()
        random.seed(seed)
        if random.random() <= 0.5:
            from PIL import ImageFilter

            expected = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        else:
            expected = image
        assert blurred.tobytes() == expected.tobytes()
        assert random.random() == after


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
    expected = np.asarray(whole)[top : top + size, left : left + size]
    got = dino_crops.eval_transform(size)(image)
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got.permute(1, 2, 0), expected)


# ---- folders ----


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    suffix = ".tif" if mode == "CMYK" else ".png"
    gray = Image.fromarray(np.full((5, 7), 200, dtype=np.uint8))
    image = Image.fromarray(np.full((5, 7), 200, dtype=np.uint16)) if mode == "I;16" else gray.convert(mode)
    image.save(tmp_path / f"x{suffix}")
    loaded = dino_images.load_image(tmp_path / f"x{suffix}")
    assert (loaded.mode, loaded.size) == ("RGB", (7, 5))


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_a_damaged_image_is_named(tmp_path, sample_root, damage):
    whole = next((sample_root / "train" / "coffee").iterdir()).read_bytes()
    path = tmp_path / "bad.png"
    path.write_bytes({"empty": b"", "text": b"not an image", "truncated": whole[:2000]}[damage])
    with pytest.raises(UserError, match=r"bad\.png"):
        dino_images.load_image(path)


def test_a_missing_folder_is_named():
    with pytest.raises(UserError, match="--data_path /no/where is no folder"):
        dino_data.find_images("/no/where")


def labelled(tmp_path, train, val):
    for part, classes in (("train", train), ("val", val)):
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
    return dino_data.labelled_images(tmp_path, transforms.PILToTensor())


def test_labels_of_val_follow_the_class_names_of_train(tmp_path):
    _, _, train_labels, val_labels = labelled(tmp_path, ["a", "b", "c"], ["a", "c"])
    assert train_labels.tolist() == [0, 1, 2]
    assert val_labels.tolist() == [0, 2]


def test_a_class_that_only_val_has_is_an_error(tmp_path):
    with pytest.raises(UserError, match="has not: zebra"):
        labelled(tmp_path, ["a", "b"], ["a", "zebra"])


def test_missing_val_is_named(tmp_path):
    with pytest.raises(UserError, match="has no val in it"):
        labelled(tmp_path, ["a"], [])


# ---- samples and order ----


def crops_dataset(root, seed=0):
    augment = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 1, 32, 16, as_uint8=True)
    return dino_data.MultiCropDataset(dino_data.find_images(root / "train"), augment, seed)


def test_crops_follow_from_seed_epoch_and_index_alone(tiny_root):
    dataset = crops_dataset(tiny_root)
    crops, index, _ = dataset[3, 5]
    assert index == 5
    assert len(dataset) == 40
    torch.rand(5), random.random(), np.random.rand()
    dataset[0, 1]
    again, _, _ = dataset[3, 5]
    assert all(torch.equal(a, b) for a, b in zip(crops, again, strict=True))
    for other in (dataset[4, 5], crops_dataset(tiny_root, seed=1)[3, 5]):
        assert not torch.equal(crops[0], other[0][0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_see_in_each_step_what_one_process_sees(world_size):
    batch = 12 // world_size
    whole = dino_data.EpochSampler(100, 12, seed=3)
    ranks = [dino_data.EpochSampler(100, batch, 3, rank, world_size) for rank in range(world_size)]
    for sampler in (whole, *ranks):
        sampler.set_epoch(2)
    assert len(whole) == 96
    seen = [list(sampler) for sampler in ranks]
    assert [len(s) for s in ranks] == [96 // world_size] * world_size == [len(s) for s in seen]
    everything = list(whole)
    for step in range(8):
        together = [key for keys in seen for key in keys[step * batch : (step + 1) * batch]]
        assert sorted(together) == sorted(everything[step * 12 : (step + 1) * 12])
    assert len(set(everything)) == 96
    assert {epoch for epoch, _ in everything} == {2}


def test_order_differs_between_epochs_and_seeds():
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        sampler = dino_data.EpochSampler(50, 10, seed)
        sampler.set_epoch(epoch)
        orders.add(tuple(index for _, index in sampler))
    assert len(orders) == 4


def test_training_batches_are_uint8_and_whole(tiny_root):
    loader = dino_data.train_loader(crops_dataset(tiny_root), 12, 0, 0, torch.device("cpu"))
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    for crops, indices, _ in batches:
        assert [tuple(c.shape) for c in crops] == [(12, 3, 32, 32)] * 2 + [(12, 3, 16, 16)]
        assert {c.dtype for c in crops} == {torch.uint8}
        assert len(indices) == 12


def test_a_second_epoch_of_living_workers_has_crops_of_its_own(tiny_root):
    loader = dino_data.train_loader(crops_dataset(tiny_root), 40, 0, 1, torch.device("cpu"))
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        ((crops, indices, _),) = list(loader)
        epochs.append(crops[0][indices.argsort()])
    assert not torch.equal(epochs[0], epochs[1])


# ---- the sample data set ----


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*.png"))}


def test_sample_is_an_image_folder_of_eighteen_classes(sample_root):
    train = dino_data.find_images(sample_root / "train")
    val = dino_data.find_images(sample_root / "val")
    assert train.classes == val.classes == sorted(Path(name).stem for name in dino_data.PHOTOGRAPHS)
    assert len(train.classes) == 18
    assert np.bincount(train.targets).tolist() == [dino_data.SAMPLE_TRAIN] * 18
    assert np.bincount(val.targets).tolist() == [dino_data.SAMPLE_VAL] * 18
    assert train.open(0).size == (dino_data.SAMPLE_SIDE, dino_data.SAMPLE_SIDE)


def test_sample_is_found_in_place_of_a_path(sample_root):
    assert dino_data.find_data("sample", "val") == str(sample_root / "val")
    assert dino_data.find_data("some/folder", "val") == "some/folder"


def test_training_crops_come_from_the_left_and_validation_crops_from_the_right(monkeypatch, tmp_path):
    # Red up to 60 % of the width, blue beyond.
    image = Image.new("RGB", (200, 100), "blue")
    image.paste("red", (0, 0, 120, 100))
    image.save(tmp_path / "two.png")
    seen = {"train": set(), "val": set()}
    regions = []

    def record(region, rng):
        regions.append(region)
        return region

    monkeypatch.setattr(dino_data, "sample_crop", record)
    dino_data.write_sample_crops(tmp_path / "two.png", tmp_path, random.Random(0))
    for part, region in zip(["train"] * dino_data.SAMPLE_TRAIN + ["val"] * dino_data.SAMPLE_VAL, regions, strict=True):
        seen[part].update(color for _, color in region.getcolors())
    assert seen == {"train": {(255, 0, 0)}, "val": {(0, 0, 255)}}


def test_crops_of_the_sample_differ_in_light_and_color_and_some_are_gray(sample_root):
    means, gray = [], 0
    for path in sorted((sample_root / "train" / "coffee").iterdir()):
        pixels = np.asarray(Image.open(path)).reshape(-1, 3).astype(float)
        means.append(pixels.mean(0))
        gray += bool((pixels[:, 0] == pixels[:, 1]).all() and (pixels[:, 1] == pixels[:, 2]).all())
    assert 0.1 < gray / len(means) < 0.7
    assert np.std(means, axis=0).min() > 10


@pytest.fixture
def quick_sample(monkeypatch, tmp_path):
    """The building of a small sample data set in a cache of its own."""
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dino_data, "SAMPLE_TRAIN", 3)
    monkeypatch.setattr(dino_data, "SAMPLE_VAL", 2)
    return tmp_path / "cache"


def test_sample_is_the_same_wherever_it_is_built(monkeypatch, tmp_path, quick_sample):
    first = contents(dino_data.sample_dataset())
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "second"))
    assert contents(dino_data.sample_dataset()) == first
    assert len(first) == 18 * 5


def test_sample_is_built_once(quick_sample, monkeypatch):
    built = dino_data.sample_dataset()
    monkeypatch.setattr(dino_data, "find_photographs", lambda: pytest.fail("built again"))
    assert dino_data.sample_dataset() == built


def build(queue):
    queue.put(dino_data.sample_dataset())


def test_processes_that_build_the_sample_at_once_all_get_it_whole(quick_sample):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=build, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    paths = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    (path,) = paths
    assert len(contents(path)) == 18 * 5
    assert [p.name for p in quick_sample.iterdir()] == [Path(path).name]


def test_building_that_is_killed_leaves_no_sample(tmp_path):
    code = "import dino_data; dino_data.sample_dataset()"
    environment = {**os.environ, "DINO_CACHE": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.rglob("*.png"))
    assert not list(tmp_path.glob("sample-*"))


def test_a_photograph_that_is_not_installed_is_named(monkeypatch, quick_sample):
    monkeypatch.setattr(dino_data, "PHOTOGRAPHS", ("astronaut.png", "unicorn.png"))
    with pytest.raises(UserError, match=r"has no unicorn\.png"):
        dino_data.sample_dataset()
    assert not quick_sample.exists()


def test_without_scikit_image_the_remedy_is_named(monkeypatch, quick_sample):
    monkeypatch.setattr(dino_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        dino_data.sample_dataset()


def test_a_cache_that_can_not_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="DINO_CACHE"):
        dino_data.sample_dataset()


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("DINO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert utils.cache_dir() == "/x/dino"
    monkeypatch.setenv("DINO_CACHE", "/y")
    assert utils.cache_dir() == "/y"


def test_seeds_of_samples_do_not_meet_those_of_steps_or_orders():
    uses = (utils.ORDER, utils.SAMPLE, utils.STEP)
    assert len({utils.derive_seed(0, use, 1, 2) for use in uses}) == 3


def test_the_images_of_a_folder_are_listed_by_their_numbers_and_without_hidden_files(tmp_path):
    for name in ("f10.png", "f2.JPG", "._f1.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in dino_data.image_files(tmp_path, "--x")] == ["f2.JPG", "f10.png"]
    with pytest.raises(UserError, match=r"--x .* is no folder"):
        dino_data.image_files(tmp_path / "nowhere", "--x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--x .*empty has no images"):
        dino_data.image_files(tmp_path / "empty", "--x")
