"""dino_data.py: folders with labels, training crops and batches, the sample data set."""

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
from conftest import ROOT, SMALL_RUN, arguments_of
from PIL import Image
from torchvision import transforms

import dino_data
import dino_files
import dino_images
import dino_sample
import main_dino
import utils
from utils import UserError

# ---- folders ----


def labeled(tmp_path, train, val):
    for part, classes in (("train", train), ("val", val)):
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
    return dino_data.labeled_images(tmp_path, transforms.PILToTensor())


@pytest.mark.parametrize(
    ("val", "message"), [(["a", "zebra"], "val has classes that train does not have: zebra"), ([], "has no val")]
)
def test_a_val_that_does_not_fit_train_is_an_error(tmp_path, val, message):
    with pytest.raises(UserError, match=message):
        labeled(tmp_path, ["a", "b"], val)


def test_images_in_one_folder_are_sorted_by_number_without_hidden_files(tmp_path):
    for name in ("f10.png", "f2.JPG", "._f1.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in dino_data.image_files(tmp_path, "--x")] == ["f2.JPG", "f10.png"]
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "is not a folder"), ("empty", "has no images")):
        with pytest.raises(UserError, match=f"--x .*{name} {message}"):
            dino_data.image_files(tmp_path / name, "--x")


# ---- crops and batches ----


def loader_of(root, *flags):
    args = arguments_of(main_dino, *SMALL_RUN, *flags)
    how = {"global_crops_size": 32, "local_crops_size": 16, "augmentation": args.augmentation, "as_uint8": True}
    augment = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 1, **how)
    return dino_data.training_loader(dino_data.find_images(root / "train"), augment, args, torch.device("cpu"))


def test_crops_are_a_function_of_seed_epoch_and_index(tiny_root):
    dataset = loader_of(tiny_root).dataset
    crops, index, unreadable = dataset[3, 5]
    assert (index, unreadable, len(dataset)) == (5, None, 40)
    torch.rand(5), random.random(), np.random.rand()
    dataset[0, 1]
    assert all(map(torch.equal, crops, dataset[3, 5][0]))
    for other in (dataset[4, 5], loader_of(tiny_root, "--seed", 1).dataset[3, 5]):
        assert not torch.equal(crops[0], other[0][0])


def photographs_of(root, sizes):
    """Noise in the given sizes, as PNG files of one class."""
    (root / "train" / "a").mkdir(parents=True)
    numbers = np.random.RandomState(0)
    for i, (width, height) in enumerate(sizes):
        noise = numbers.randint(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "train" / "a" / f"{i}.png")
    return root


FORKED = pytest.mark.skipif(
    multiprocessing.get_all_start_methods()[0] != "fork", reason="small images are kept where processes are forked"
)


@FORKED
@pytest.mark.parametrize(("workers", "augmentation"), [(0, "fast"), (2, "pil")])
def test_small_images_stay_decoded_for_all_workers_and_give_the_same_crops(tmp_path, workers, augmentation):
    root = photographs_of(tmp_path, [(20, 30)] * 11 + [(40, 30)])
    flags = ["--num_workers", workers, "--augmentation", augmentation]
    loader = loader_of(root, "--batch_size_per_gpu", 6, *flags)
    plain = dino_data.MultiCropDataset(loader.dataset.images, loader.dataset.augment, loader.dataset.seed)
    first = [(crops, indices) for crops, indices, _ in loader]
    for i in range(11):  # of one size: they are not read again
        (root / "train" / "a" / f"{i}.png").write_bytes(b"")
    loader.sampler.set_epoch(0)
    for (crops, indices), (again, same, unreadable) in zip(first, loader, strict=True):
        assert torch.equal(indices, same)
        assert unreadable == []
        assert all(map(torch.equal, crops, again))
    (tmp_path / "again").mkdir()
    photographs_of(tmp_path / "again", [(20, 30)] * 11 + [(40, 30)])
    plain.images.paths = [path.replace(str(root), str(tmp_path / "again")) for path in plain.images.paths]
    for crops, indices in first:
        for place, i in enumerate(indices.tolist()):
            assert all(torch.equal(mine[place], other) for mine, other in zip(crops, plain[0, i][0], strict=True))


@pytest.mark.parametrize(("size", "flags"), [((65, 20), ()), ((20, 20), ("--in_chans", 1, "--mean", 0, "--std", 1))])
def test_large_images_and_other_channels_are_read_again_each_epoch(tmp_path, size, flags):
    loader = loader_of(photographs_of(tmp_path, [size] * 8), "--batch_size_per_gpu", 2, *flags)
    assert loader.dataset.decoded is loader.dataset.images


@FORKED
def test_images_stay_decoded_only_where_processes_are_forked_and_memory_suffices(tmp_path, monkeypatch):
    def no_memory(*_):
        raise OSError(12, "Cannot allocate memory")

    images = dino_data.find_images(photographs_of(tmp_path, [(20, 30)] * 8) / "train")
    assert dino_files.keep_small_decoded(images).pixels.shape == (8, 30, 20, 3)
    for module, name, value in (
        (dino_files, "SMALL_SET", 8 * 30 * 20 * 3 - 1),
        (dino_files.mmap, "mmap", no_memory),
        (multiprocessing, "get_start_method", lambda **_: "spawn"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert dino_files.keep_small_decoded(images) is None
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"")
    assert dino_files.keep_small_decoded(images) is None


@FORKED
def test_large_images_after_a_small_one_are_opened_as_always(tmp_path):
    root = photographs_of(tmp_path, [(20, 20)])
    Image.open(dino_sample.find_photographs(["coffee.png"])[0]).save(root / "train" / "a" / "1.jpg")
    images = dino_data.find_images(root / "train")
    np.save(root / "train" / "a" / "2.npy", np.zeros((20, 20, 3), np.uint8))
    images.paths.append(str(root / "train" / "a" / "2.npy"))
    assert dino_images.to_rgb(dino_files.keep_small_decoded(images).open(2)).size == (20, 20)
    image = dino_files.keep_small_decoded(images).open(1)
    assert image.tile  # not decoded yet: a loader may decode it at half its size
    assert image.size == (600, 400)


def test_arrays_with_three_channels_train(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(4):
        np.save(tmp_path / "train" / "a" / f"{i}.npy", np.full((32, 32, 3), 60 * i, np.uint8))
    (tmp_path / "list.txt").write_text("".join(f"train/a/{i}.npy\n" for i in range(4)))
    args = arguments_of(main_dino, *SMALL_RUN, "--batch_size_per_gpu", 4)
    augment = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 0, global_crops_size=32, as_uint8=True)
    images = dino_data.find_images(tmp_path / "list.txt")
    ((crops, _, unreadable),) = dino_data.training_loader(images, augment, args, torch.device("cpu"))
    assert (crops[0].shape, unreadable) == ((4, 3, 32, 32), [])


def test_crops_of_one_size_leave_a_loader_process_as_one_tensor():
    batch = [([torch.full((3, side, side), 10 * i + k) for k, side in enumerate((8, 8, 4))], i, None) for i in (5, 7)]
    crops, indices, unreadable = dino_data.pack(batch)
    assert [tuple(same.shape) for same in crops] == [(2, 2, 3, 8, 8), (1, 2, 3, 4, 4)]
    assert [same[..., 0, 0, 0].tolist() for same in crops] == [[[50, 70], [51, 71]], [[52, 72]]]
    assert (indices.tolist(), unreadable) == ([5, 7], [])


def test_a_small_image_that_is_damaged_is_reported_in_each_epoch(tmp_path):
    root = photographs_of(tmp_path, [(20, 20)] * 8)
    loader = loader_of(root, "--batch_size_per_gpu", 8)
    file = root / "train" / "a" / "3.png"
    file.write_bytes(file.read_bytes()[:200])
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        (_, _, unreadable), *_ = loader
        assert [bad.name for bad in unreadable] == [str(file)]


def test_training_batches_are_uint8_and_of_equal_size(tiny_root):
    loader = loader_of(tiny_root, "--batch_size_per_gpu", 6, "--grad_accum_steps", 2)
    batches = list(loader)
    assert len(loader) == len(batches) == 3  # 40 images: 4 are left out
    for crops, indices, unreadable in batches:
        assert [tuple(crop.shape) for crop in crops] == [(12, 3, 32, 32)] * 2 + [(12, 3, 16, 16)]
        assert {crop.dtype for crop in crops} == {torch.uint8}
        assert (len(indices), unreadable) == (12, [])


def test_fewer_images_than_one_step_are_an_error(tiny_root):
    with pytest.raises(
        UserError, match=r"40 training images are fewer than one step of 41. Use --batch_size_per_gpu 40 or less"
    ):
        loader_of(tiny_root, "--batch_size_per_gpu", 41)


# ---- the sample data set ----


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*.png"))}


def test_the_sample_has_eighteen_classes_in_train_and_val(sample_root):
    for part, number in (("train", dino_sample.SAMPLE_TRAIN), ("val", dino_sample.SAMPLE_VAL)):
        assert dino_data.find_data("sample", part) == str(sample_root / part)
        images = dino_data.find_images("sample", part)
        assert images.classes == sorted(Path(name).stem for name in dino_sample.PHOTOGRAPHS)
        assert images.targets.bincount().tolist() == [number] * 18
        assert images.open(0).size == (dino_sample.SAMPLE_SIDE, dino_sample.SAMPLE_SIDE)
    assert dino_data.find_data("some/folder", "val") == "some/folder"


def test_training_crops_are_from_the_left_of_a_photograph_and_validation_crops_from_the_right(tmp_path):
    # Black up to 60 % of the width, white beyond: saturation, hue and color gains leave black and white apart.
    image = Image.new("L", (200, 100))
    image.paste(255, (120, 0, 200, 100))
    image.save(tmp_path / "two.png")
    dino_sample.write_sample_crops(tmp_path / "two.png", tmp_path, random.Random(0))
    for part, number in (("train", dino_sample.SAMPLE_TRAIN), ("val", dino_sample.SAMPLE_VAL)):
        crops = [np.asarray(Image.open(path)) for path in (tmp_path / part / "two").iterdir()]
        assert len(crops) == number
        assert all((crop < 100).all() if part == "train" else (crop > 100).all() for crop in crops)


@pytest.fixture
def quick_sample(monkeypatch, tmp_path):
    """The cache in which a small sample data set will be built."""
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dino_sample, "SAMPLE_TRAIN", 3)
    monkeypatch.setattr(dino_sample, "SAMPLE_VAL", 2)
    return tmp_path / "cache"


def test_the_sample_is_built_once_and_the_same_everywhere(monkeypatch, tmp_path, quick_sample):
    built = dino_sample.sample_dataset()
    first = contents(built)
    assert len(first) == 18 * 5
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "second"))
    assert contents(dino_sample.sample_dataset()) == first
    monkeypatch.setenv("DINO_CACHE", str(quick_sample))
    monkeypatch.setattr(dino_sample, "find_photographs", lambda: pytest.fail("built again"))
    assert dino_sample.sample_dataset() == built


def build(queue):
    queue.put(dino_sample.sample_dataset())


def test_processes_that_build_the_sample_at_the_same_time_all_get_all_of_it(quick_sample):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=build, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    (path,) = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(contents(path)) == 18 * 5
    assert [p.name for p in quick_sample.iterdir()] == [Path(path).name]


def test_a_build_that_is_killed_leaves_no_sample(tmp_path):
    code = "import dino_sample; dino_sample.sample_dataset()"
    environment = {**os.environ, "DINO_CACHE": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.rglob("*.png"))
    assert not list(tmp_path.glob("sample-*"))


def test_missing_photographs_are_named_with_the_remedy(monkeypatch, quick_sample):
    monkeypatch.setattr(dino_sample, "PHOTOGRAPHS", ("astronaut.png", "unicorn.png"))
    with pytest.raises(UserError, match=r"has no unicorn\.png"):
        dino_sample.sample_dataset()
    monkeypatch.setattr(dino_sample.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        dino_sample.sample_dataset()
    assert not quick_sample.exists()


def test_a_cache_that_is_not_writable_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="DINO_CACHE"):
        dino_sample.sample_dataset()


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("DINO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert utils.cache_dir() == "/x/dino"
    monkeypatch.setenv("DINO_CACHE", "/y")
    assert utils.cache_dir() == "/y"
