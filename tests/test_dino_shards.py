"""dino_shards.py: tar shards, good and hostile, their order in training, and runs on them."""

import contextlib
import errno
import gzip
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import SMALL_RUN, arguments_of, assert_same, ending, run_script
from PIL import Image
from test_restarts import Run, finish

import dino_data
import dino_files
import dino_images
import dino_shards
import eval_knn
import main_dino
import utils
from dino_shards import TarShards
from utils import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    dino_shards.load_index.cache_clear()
    return tmp_path / "cache"


def picture(i, side=20):
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))


def png(i):
    file = io.BytesIO()
    picture(i).save(file, "png")
    return file.getvalue()


def write_shards(root, counts, labels=True, first=0):
    """Shards with these numbers of images, written by WebDataset. Images are numbered across shards."""
    root.mkdir(parents=True, exist_ok=True)
    for k, count in enumerate(counts):
        with webdataset.TarWriter(str(root / f"{k:04}.tar")) as shard:
            for i in range(first, first + count):
                shard.write({"__key__": f"s/{i:04}", "png": picture(i)} | ({"cls": i % 3} if labels else {}))
        first += count
    return root


def write_tar(path, members, kind=None, mode="w"):
    """A tar file of {name: content}, or of empty members of another `kind`."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content) if kind is None else 0
            if kind is not None:
                info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))
    return path


def assert_images(images, numbers):
    """These images are the pictures of these numbers."""
    assert [images.open(i).tobytes() for i in range(len(images))] == [picture(i).tobytes() for i in numbers]


def assert_refused(path, message):
    with pytest.raises(UserError, match=message):
        dino_data.find_images(path)


# ---- which shards ----


def test_images_and_labels_equal_those_of_webdatasets_reader(tmp_path):
    pattern = str(write_shards(tmp_path / "shards", [3, 5, 1]) / "{0000..0002}.tar")
    theirs, ours = list(webdataset.WebDataset(pattern, shardshuffle=False)), TarShards(pattern)
    assert len(ours) == len(theirs) == 9
    for i, sample in enumerate(theirs):
        assert ours.name(i) == f"{sample['__url__']}/{sample['__key__']}.png"
        assert ours.open(i).tobytes() == Image.open(io.BytesIO(sample["png"])).tobytes()
        assert ours.classes[ours.targets[i]] == sample["cls"].decode()


@pytest.mark.parametrize("name", ["a/1.png", "1.png"])
def test_a_folder_with_images_is_not_a_folder_of_shards(tmp_path, name):
    write_shards(tmp_path, [2])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(png(1))
    assert list(dino_data.find_images(tmp_path).names()) == [str(tmp_path / name)]
    assert len(dino_data.find_images(tmp_path, data_format="shards")) == 2


def test_folders_named_like_shards_are_recognized_by_their_content(tmp_path):
    root = write_shards(tmp_path / "photos.tar", [2])
    for i in range(1500):
        (root / f"{i}.json").touch()
    assert len(dino_data.find_images(root)) == 2
    (tmp_path / "images.tar").mkdir()
    (tmp_path / "images.tar" / "1.png").write_bytes(png(1))
    assert dino_data.find_images(tmp_path / "images.tar").sharded is False


@pytest.mark.parametrize("pattern", ["{0000..0002}.tar", "*.tar", "", "{0000,000[12]}.tar"])
def test_patterns_and_folders_name_the_same_shards_also_below_a_name_with_brackets(tmp_path, pattern):
    root = write_shards(tmp_path / "a[1]", [2, 2, 2])
    (root / "._0000.tar").write_bytes(b"")
    images = dino_data.find_images(os.path.join(root, pattern))
    assert [Path(path).name for path in images.paths] == ["0000.tar", "0001.tar", "0002.tar"]
    assert len(images) == 6


def test_a_file_with_braces_in_its_name_is_one_shard(tmp_path):
    write_shards(tmp_path, [4])
    os.rename(tmp_path / "0000.tar", tmp_path / "{a,b}.tar")
    assert len(dino_data.find_images(tmp_path / "{a,b}.tar")) == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0000..0003}.tar", "no such shards; 2 of 4 are missing: .*0002.tar"),
        ("*x.tar", "there are no such shards"),
        ("{0000,0000}.tar", "names a shard twice"),
        ("{000000000..999999999}.tar", "more than 1000 shards"),
        ("https://x.org/{0..9}.tar", "only shards in a file system"),
        ("pipe:touch canary; cat 0000.tar", "only shards in a file system"),
    ],
)
def test_patterns_without_shards_are_refused(tmp_path, monkeypatch, pattern, message):
    monkeypatch.setattr(dino_shards, "MOST_SHARDS", 1000)
    write_shards(tmp_path, [1, 1])
    monkeypatch.chdir(tmp_path)
    assert_refused(pattern, message)
    assert not Path("canary").exists()


def test_a_pattern_without_quotes_is_an_error_of_one_line():
    done = run_script("main_dino.py", "--data_path", *(f"shards/{i:04}.tar" for i in range(300)), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --data_path takes one pattern. Quote it")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [("train/0.tar", "Name one of the folders"), ("0.tar.gz", "gunzip")],
)
def test_a_folder_without_images_gives_a_hint_on_its_content(tmp_path, name, hint):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert_refused(tmp_path, f"has no images .*{hint}")


# ---- images and labels ----


def test_hidden_files_and_other_parts_of_a_sample_are_not_images(tmp_path):
    image = png(1)
    members = {"a/._1.png": b"x", "a/1.png": image, "a/1.seg.png": image, "a/1.json": b"{}", "README": b"x"}
    images = TarShards(str(write_tar(tmp_path / "x.tar", {**members, ".b.png": image, "2.JPG": image})))
    assert [images.name(i) for i in range(len(images))] == [f"{tmp_path}/x.tar/a/1.png", f"{tmp_path}/x.tar/2.JPG"]


def labeled(path, *labels):
    """A shard of images with these labels; None is no label."""
    members = {f"{i}.png": png(1) for i in range(len(labels))}
    members |= {f"{i}.cls": label for i, label in enumerate(labels) if label is not None}
    return TarShards(str(write_tar(path, members)))


def test_labels_are_numbers_or_names(tmp_path):
    numbers = labeled(tmp_path / "a.tar", b"10", b"9\n", b"10")
    assert (numbers.classes, numbers.targets.tolist()) == (["9", "10"], [1, 0, 1])
    texts = labeled(tmp_path / "b.tar", b"bee", "äpe".encode(), b"bee")
    assert (texts.classes, texts.targets.tolist()) == (["bee", "äpe"], [0, 1, 0])
    assert labeled(tmp_path / "c.tar", None, None).targets is None


def test_missing_or_odd_labels_are_an_error(tmp_path):
    with pytest.raises(UserError, match="labels for 1 of 2 images"):
        labeled(tmp_path / "a.tar", None, b"1").targets  # noqa: B018
    for k, odd in enumerate((b"\xff", b"", b"1" * 2000)):
        with pytest.raises(UserError, match=r"\.tar has no label in 0.cls"):
            labeled(tmp_path / f"{k}.tar", odd)


def test_a_subset_keeps_names_labels_and_images(tmp_path):
    whole = TarShards(str(write_shards(tmp_path / "s", [3, 3])))
    part = whole.take([4, 1]).take([1, 0])
    assert [part.name(i) for i in range(2)] == [whole.name(1), whole.name(4)]
    assert part.targets.tolist() == [1, 1]
    assert_images(part, [1, 4])


def test_arrays_in_shards_are_images_only_for_other_than_3_channels(tmp_path):
    file = io.BytesIO()
    np.save(file, np.full((5, 6, 4), 40000, np.uint16))
    path = write_tar(tmp_path / "x.tar", {"1.npy": file.getvalue(), "1.cls": b"7", "2.png": png(1)})
    photographs, arrays = (dino_data.find_images(path, in_chans=n) for n in (3, 4))
    assert [photographs.name(i) for i in range(len(photographs))] == [f"{path}/2.png"]
    assert [arrays.name(i) for i in range(len(arrays))] == [f"{path}/1.npy", f"{path}/2.png"]
    decoded = dino_images.decode(arrays.open(0), utils.RGB._replace(in_chans=4))
    assert torch.equal(decoded, torch.full((4, 5, 6), 40000 / 65535))


def test_crops_of_an_image_are_the_same_from_a_shard_and_from_a_folder(tmp_path):
    write_shards(tmp_path / "shards", [4, 2])
    (tmp_path / "folder").mkdir()
    for i in range(6):
        (tmp_path / "folder" / f"{i}.png").write_bytes(png(i))
    augment = main_dino.DataAugmentationDINO((0.4, 1), (0.05, 0.4), 2, as_uint8=True)
    folder, shards = (
        dino_data.MultiCropDataset(dino_data.find_images(tmp_path / name), augment, 3) for name in ("folder", "shards")
    )
    for i in range(6):
        assert all(map(torch.equal, folder[1, i][0], shards[1, i][0]))


# ---- hostile and damaged shards ----


@pytest.mark.parametrize(
    ("members", "kind", "message"),
    [
        ({"../../x.jpg": b"x"}, None, "a path outside of its folder"),
        ({"x.jpg": b""}, tarfile.SYMTYPE, "a link or a device"),
        ({"x.jpg": b""}, tarfile.FIFOTYPE, "a link or a device"),
        ({"x.cls": b""}, tarfile.SYMTYPE, "a link or a device"),
        ({"a" * 2000 + ".jpg": b"x"}, None, "a name of 2004 characters"),
        ({"a.1.png": b"x", "b.png": b"x"}, None, "a.1.png: names of images have one dot"),
    ],
)
def test_shards_with_members_that_no_training_set_has_are_refused(tmp_path, members, kind, message):
    path = write_tar(tmp_path / "x.tar", members, kind)
    write_tar(path, {"good.png": png(0)}, mode="a")
    before = set(os.listdir(tmp_path))
    assert_refused(path, f"the shard {path} contains .*{message}")
    assert set(os.listdir(tmp_path)) - before <= {"cache"}


def test_sparse_files_are_refused(tmp_path):
    if not shutil.which("tar"):
        pytest.skip("no tar program here")
    with open(tmp_path / "x.jpg", "wb") as file:
        file.truncate(1_000_000)
    subprocess.run(["tar", "--sparse", "-cf", "x.tar", "x.jpg"], cwd=tmp_path, check=True)
    assert_refused(tmp_path / "x.tar", "a sparse file")


@pytest.mark.parametrize("size", [-512, 2**40])
@pytest.mark.parametrize("how", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_impossible_sizes_are_refused(tmp_path, size, how):
    good, bad = tarfile.TarInfo("a.jpg"), tarfile.TarInfo("b.jpg")
    good.size, bad.size = 512, size
    if how == tarfile.PAX_FORMAT:
        bad.size, bad.pax_headers = 0, {"size": str(size)}
    (tmp_path / "x.tar").write_bytes(good.tobuf() + b"x" * 512 + bad.tobuf(how) + b"\0" * 1024)
    assert_refused(tmp_path / "x.tar", r"x.tar (ends within|is not a tar file|is damaged)")


def test_a_shard_cut_anywhere_is_refused(tmp_path):
    path = write_shards(tmp_path, [2]) / "0000.tar"
    whole = path.read_bytes()
    mark = -(-len(whole.rstrip(b"\0")) // 512) * 512  # where the end mark begins
    for cut in [0, 1, 511, 512, 513, 1000, *range(1024, mark, 300), mark]:
        path.write_bytes(whole[:cut])
        assert_refused(path, r"0000.tar ")
    path.write_bytes(whole[: mark + 512])
    assert len(dino_data.find_images(path)) == 2


def test_a_damaged_header_does_not_end_a_shard_early(tmp_path):
    path = write_shards(tmp_path, [4], labels=False) / "0000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[third + 150] ^= 1  # in its checksum
    path.write_bytes(content)
    assert_refused(path, f"0000.tar is (damaged at byte {third}|not a tar file, or damaged: bad checksum)")


def test_two_shards_in_one_file_compressed_ones_and_ones_without_images_are_refused(tmp_path):
    path = write_shards(tmp_path, [1]) / "0000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    assert_refused(path, r"0000.tar has data after its end mark")
    path.write_bytes(gzip.compress(whole))
    assert_refused(path, r"0000.tar is compressed. Unpack it")
    write_tar(path, {"x.txt": b"not an image"})
    assert_refused(path, "no images in these 1 shards")


# ---- cached indexes ----


def test_a_second_start_reads_no_shard_except_a_changed_one(tmp_path, monkeypatch):
    root, list_members, listed = write_shards(tmp_path / "s", [2, 3]), dino_shards.list_members, []
    monkeypatch.setattr(
        dino_shards, "list_members", lambda path, *rest: listed.append(Path(path).name) or list_members(path, *rest)
    )
    first = dino_files.digest_of_names(TarShards(str(root)))
    assert listed == ["0000.tar", "0001.tar"]
    assert dino_files.digest_of_names(TarShards(str(root))) == first
    assert len(listed) == 2
    write_shards(tmp_path / "other", [3], first=7)
    shutil.copy(tmp_path / "other" / "0000.tar", root / "0001.tar")
    assert dino_files.digest_of_names(TarShards(str(root))) != first
    assert listed[2:] == ["0001.tar"]


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"path": 1}', "removed", "shorter"])
@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_damaged_indexes_are_made_again(tmp_path, cache, suffix, damage):
    root = write_shards(tmp_path / "s", [3])
    TarShards(str(root))
    (path,) = (cache / "shards").glob(f"*{suffix}")
    if damage == "removed":
        path.unlink()
    elif damage == "shorter":
        (path,) = (cache / "shards").glob("*.npy")
        np.save(path, np.load(path)[:2])
    else:
        path.write_bytes(damage)
    assert_images(TarShards(str(root)), range(3))


def test_without_a_writable_cache_shards_are_read_with_a_warning(tmp_path, monkeypatch, capsys):
    root = write_shards(tmp_path / "s", [1, 2])
    cached = dino_files.digest_of_names(TarShards(str(root)))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "file"))
    dino_shards.load_index.cache_clear()
    images = TarShards(str(root))
    assert "Set DINO_CACHE" in capsys.readouterr().out
    assert dino_files.digest_of_names(images) == cached
    assert_images(images, range(3))


def index_in_a_process(root):
    utils.lock_file = lambda *_, **__: (contextlib.nullcontext(), True)  # a file system without locks
    utils.log = sys.exit
    assert len(TarShards(str(root))) == 200


def test_several_processes_can_index_shards_at_the_same_time_without_locks(tmp_path):
    root = write_shards(tmp_path / "s", [5] * 40)
    processes = [multiprocessing.get_context("fork").Process(target=index_in_a_process, args=(root,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


# ---- shards that change or fail during a run ----


def test_a_file_system_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    images = TarShards(str(write_shards(tmp_path / "s", [2])))
    stat, tries, pauses = os.stat, [], []

    def stale_at_first(path, **options):
        tries.append(path)
        if len(tries) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, **options)

    monkeypatch.setattr(dino_shards.os, "stat", stale_at_first)
    monkeypatch.setattr(dino_images.time, "sleep", pauses.append)
    assert images.open(0).size == (20, 20)
    assert pauses == [0.5, 1.0]


def test_images_of_a_shard_that_has_changed_or_is_gone_are_unreadable_but_a_new_mode_is_no_change(tmp_path):
    root = write_shards(tmp_path / "s", [2])
    images = TarShards(str(root))
    os.chmod(root / "0000.tar", 0o600)
    assert images.open(0).size == (20, 20)
    dino_shards.load_index.cache_clear()
    write_shards(root, [3], first=5)
    with pytest.raises(dino_images.BadImage, match=r"0000.tar: the shard has changed"):
        images.open(0)
    os.remove(root / "0000.tar")
    with pytest.raises(dino_images.BadImage, match=r"0000.tar: No such file"):
        images.open(1)


def test_an_image_that_is_damaged_in_its_shard_is_replaced_and_listed(tmp_path):
    root = write_shards(tmp_path / "s", [10, 10], labels=False)
    with tarfile.open(root / "0001.tar") as tar:
        bad = tar.getmember("s/0013.png")
    with open(root / "0001.tar", "r+b") as file:
        file.seek(bad.offset_data)
        file.write(b"\0" * bad.size)
    flags = ("--data_path", root, "--output_dir", tmp_path / "run", "--max_bad_images", 0.05, "--epochs", 1)
    run_script("main_dino.py", *SMALL_RUN, *flags, "--batch_size_per_gpu", 10, "--num_workers", 2)
    (line,) = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert line == f"{root}/0001.tar/s/0013.png\tit is not an image of a known format"


# ---- the order of images in training ----

NUMBER, COUNTS = 96, [7, 1, 12, 30, 2, 9, 35]


@pytest.fixture(params=["folder", "shards", "one shard"])
def images(request, tmp_path):
    if request.param == "folder":
        return dino_files.ImageFiles([f"{i}.png" for i in range(NUMBER)])
    counts = COUNTS if request.param == "shards" else [NUMBER]
    return TarShards(str(write_shards(tmp_path / "s", counts, labels=False)))


def indices_of_ranks(images, world_size, batch_size, epoch=0, images_done=0, seed=5):
    """The indices that each rank sees, in order: one list per rank."""
    found = []
    for rank in range(world_size):
        sampler = dino_data.EpochSampler(images, batch_size, seed, rank, world_size)
        sampler.set_epoch(epoch, images_done)
        keys = list(sampler)
        assert len(sampler) == len(keys)
        assert {key[0] for key in keys} <= {epoch}
        found.append([index for _, index in keys])
    return found


@pytest.mark.parametrize(("window", "world_size"), [(1, 1), (10, 4), (16_384, 2)])
def test_each_image_is_seen_once_per_epoch(images, monkeypatch, world_size, window):
    monkeypatch.setattr(dino_shards, "WINDOW", window)
    for epoch in range(3):
        ranks = indices_of_ranks(images, world_size, 24 // world_size, epoch)
        assert {len(indices) for indices in ranks} == {NUMBER // world_size}
        assert sorted(itertools.chain(*ranks)) == list(range(NUMBER))


@pytest.mark.parametrize("world_size", [1, 3, 12])
def test_all_ranks_together_see_the_same_images_in_step_k_for_any_number_of_ranks(images, world_size):
    order, batch_size = list(images.order(5, epoch=2)), 12 // world_size
    ranks = indices_of_ranks(images, world_size, batch_size, epoch=2)
    for step in range(NUMBER // 12):
        together = [i for indices in ranks for i in indices[step * batch_size : (step + 1) * batch_size]]
        assert sorted(together) == sorted(order[step * 12 : (step + 1) * 12])


def test_images_that_do_not_fill_a_step_are_left_out_and_others_in_each_epoch(images):
    seen = [set(itertools.chain(*indices_of_ranks(images, 2, 5, epoch))) for epoch in range(30)]
    assert {len(indices) for indices in seen} == {90}
    assert set.union(*seen) == set(range(NUMBER))


@pytest.mark.parametrize("window", [10, 16_384])
def test_a_resumed_epoch_is_the_rest_of_the_whole_one_for_any_number_of_ranks(images, monkeypatch, window):
    monkeypatch.setattr(dino_shards, "WINDOW", window)
    whole = list(images.order(5, epoch=1))
    for done in range(NUMBER + 1):
        assert list(images.order(5, 1, done)) == whole[done:]
    for done, world_size, batch_size in itertools.product((0, 12, 36, 84, 96), (1, 2, 4), (3, 5)):
        ranks = indices_of_ranks(images, world_size, batch_size, 1, done)
        step = world_size * batch_size
        left = whole[done : NUMBER // step * step]
        assert ranks == [left[rank::world_size] for rank in range(world_size)]


def test_the_order_is_a_function_of_seed_and_epoch(images):
    orders = [tuple(images.order(seed, epoch)) for seed in range(2) for epoch in range(2)]
    assert len(set(orders)) == 4
    assert orders == [tuple(images.order(seed, epoch)) for seed in range(2) for epoch in range(2)]


@pytest.mark.parametrize("epoch", range(2))
def test_images_of_neighboring_shards_are_shuffled_within_windows_and_only_there(tmp_path, monkeypatch, epoch):
    images = TarShards(str(write_shards(tmp_path / "s", COUNTS, labels=False)))
    monkeypatch.setattr(dino_shards, "WINDOW", 1)
    end_to_end = list(images.order(5, epoch))  # shards in their order, nothing shuffled
    shards = [list(range(images.starts[k], images.starts[k + 1])) for k in range(len(COUNTS))]
    in_order = sorted(shards, key=lambda shard: end_to_end.index(shard[0]))
    assert end_to_end == list(itertools.chain(*in_order))
    assert in_order != shards
    monkeypatch.setattr(dino_shards, "WINDOW", 10)
    shuffled = list(images.order(5, epoch))
    windows = [(shuffled[i : i + 10], end_to_end[i : i + 10]) for i in range(0, NUMBER, 10)]
    assert all(sorted(one) == sorted(other) for one, other in windows)
    assert all(one != other for one, other in windows)


def test_the_order_of_a_billion_images_takes_no_memory_and_opens_no_shard(tmp_path, monkeypatch):
    images = TarShards(str(write_shards(tmp_path / "s", [1])))
    images.paths, images.starts = [f"{k}.tar" for k in range(1000)], np.arange(1001) * 1_300_000
    images.numbers, images.are_sorted = range(1_300_000_000), False  # which looks into twenty shards
    monkeypatch.setattr(dino_shards, "load_index", None)
    sizes, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda number, **how: sizes.append(number) or randperm(number, **how))
    first = 10**9 + 7
    tracemalloc.start()
    part = list(itertools.islice(images.order(0, 0, first), 100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6
    assert max(sizes) <= dino_shards.WINDOW
    assert part == list(itertools.islice(images.order(0, 0, first - 50), 50, 150))
    assert len({index // 1_300_000 for index in part}) <= 2


@pytest.mark.parametrize(
    ("labels", "are_sorted"),
    [
        (["a" * 12, "b" * 12, "c" * 12, "d" * 12], True),
        (["a" * 9 + "b" * 3, "b" * 12, "b" * 2 + "c" * 10, "c" * 6 + "d" * 6], True),  # sorted, cut anywhere
        (["ab" * 6, "ab" * 6, "ba" * 6, "ba" * 6], False),  # there are only two
        (["abcd" * 3, "bcda" * 3, "cdab" * 3, "aabb" * 3], False),
        (["a" * 12] * 4, False),
        (["a" * 30, "a" * 29 + "b", "a" * 30, "a" * 30], False),  # one of them is rare
        (["a" * 3, "b" * 3, "c" * 3, "d" * 3], False),  # too few to tell
        (["-" * 12] * 4, False),  # no labels, and numbers as names
    ],
)
def test_shards_sorted_by_class_give_a_warning(tmp_path, capsys, labels, are_sorted):
    for k, letters in enumerate(labels):
        with webdataset.TarWriter(str(tmp_path / f"{k}.tar")) as shard:
            for i, letter in enumerate(letters):
                shard.write({"__key__": f"{k}-{i}", "png": b"x"} | ({} if letter == "-" else {"cls": letter}))
    args = arguments_of(main_dino, *SMALL_RUN, "--data_path", tmp_path)
    dino_data.training_loader(dino_data.training_images(args), None, args, torch.device("cpu"))
    assert ("warning: these shards contain one or two classes each" in capsys.readouterr().out) == are_sorted


@pytest.mark.parametrize(
    ("key", "are_sorted"),
    [
        ("n0144076{k}_{i}", True),  # as in ImageNet's own tar files
        ("n0144076{i}_{k}", False),
        ("n0144076{k}/{i}", True),
        ("{word}_{i}", False),  # a camera, a source
        ("train_{k}{i}", False),
        ("shard{k}_{i}", False),  # a number that is no class
        ("{k}/{i}", False),
    ],
)
def test_shards_without_labels_are_known_to_be_sorted_by_names(tmp_path, key, are_sorted):
    for k in range(4):
        with webdataset.TarWriter(str(tmp_path / f"{k}.tar")) as shard:
            for i in range(12):
                shard.write({"__key__": key.format(k=k, i=i, word=("ape", "bee", "cat", "dog")[k]), "png": b"x"})
    images = dino_data.find_images(tmp_path)
    assert images.are_sorted == are_sorted


def test_images_of_shards_sorted_by_class_are_read_in_random_order_from_all(tmp_path, monkeypatch):
    monkeypatch.setattr(dino_shards, "WINDOW", 24)
    for k in range(8):
        with webdataset.TarWriter(str(tmp_path / f"{k}.tar")) as shard:
            for i in range(12):
                shard.write({"__key__": f"n0144076{k}_{i}", "png": b"x"})
    images = dino_data.find_images(tmp_path)
    order = list(images.order(0, 3))
    assert sorted(order) == list(range(96))
    assert len({index // 12 for index in order[:24]}) >= 6  # of 8 classes; a window would have 2
    assert list(images.order(0, 3, 40)) == order[40:]
    assert order != list(images.order(0, 4))


# ---- train and val ----


def test_labeled_shards_give_the_same_accuracy_as_the_folders_they_were_made_of(tmp_path):
    folder = tmp_path / "folder"
    for part, count in (("train", 12), ("val", 6)):
        with webdataset.TarWriter(str(tmp_path / f"set-{part}-0000.tar")) as shard:
            for i in range(count):
                path = folder / part / str(i % 3) / f"{i:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(i + 100 * (part == "val")).save(path)
                shard.write({"__key__": f"{i:04}", "png": path.read_bytes(), "cls": i % 3})
    flags = ["--arch", "vit_nano", "--pretrained_weights", "random", "--device", "cpu", "--image_size", "32"]
    flags += ["--num_workers", "1", "--nb_knn", "1", "3", "--batch_size_per_gpu", "4"]
    outputs = [run_script("eval_knn.py", *flags, "--data_path", path).stdout for path in (folder, tmp_path)]
    accuracies = [[line for line in output.splitlines() if "NN" in line] for output in outputs]
    assert accuracies[0] == accuracies[1] != []


def test_knn_during_training_uses_labeled_shards(tmp_path):
    root = write_shards(tmp_path / "s", [20, 20])
    run_script("main_dino.py", *SMALL_RUN, "--data_path", root, "--output_dir", tmp_path / "run", "--knn_every", 1)
    assert "knn_top1" in (tmp_path / "run" / "log.txt").read_text()


def test_shards_whose_names_contain_train_and_val_are_refused(tmp_path):
    write_shards(tmp_path, [3, 3])
    os.rename(tmp_path / "0000.tar", tmp_path / "train-val.tar")
    os.rename(tmp_path / "0001.tar", tmp_path / "trainval.tar")
    with pytest.raises(UserError, match=r"train-val.tar match train and val"):
        dino_data.labeled_images(tmp_path, None)


@pytest.mark.parametrize("name", ["val", "x_val", "x.val-2", "interval-strain", "trainval"])
def test_a_part_of_shards_has_train_or_val_as_a_word_in_its_name(tmp_path, name):
    os.rename(write_shards(tmp_path, [1]) / "0000.tar", tmp_path / f"{name}.tar")
    found = dino_data.find_part(tmp_path, "val")
    if name in ("interval-strain", "trainval"):
        assert found is None
    else:
        assert dino_data.find_images(found).paths == [str(tmp_path / f"{name}.tar")]
    assert dino_data.find_part(tmp_path, "train") is None


def test_training_on_shards_of_train_and_val_is_refused(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path, [8, 8])
    os.rename(tmp_path / "0000.tar", tmp_path / "train-0.tar")
    os.rename(tmp_path / "0001.tar", tmp_path / "val-0.tar")
    flags = (*SMALL_RUN, "--data_path", tmp_path, "--output_dir", tmp_path / "run")
    code, line = ending(monkeypatch, capsys, main_dino, *flags)
    assert (code, "contains train and val" in line) == (2, True)


def test_an_evaluation_needs_labels_in_shards(tmp_path, monkeypatch, capsys):
    for part in ("train", "val"):
        write_shards(tmp_path / part, [3], labels=False)
    flags = ("--arch", "vit_nano", "--pretrained_weights", "random", "--data_path", tmp_path)
    code, line = ending(monkeypatch, capsys, eval_knn, *flags)
    assert (code, "has no labels" in line) == (2, True)


# ---- runs ----

STEPS = 16  # per epoch: 64 images, 4 per step


def steps_of(file, world_size, epoch, count=STEPS):
    """The names of the images of the first `count` steps of an epoch, over all ranks."""
    found = []
    for rank in range(world_size):
        lines = [line.split() for line in Path(f"{file}{rank}").read_text().splitlines()]
        found += itertools.chain(*[names for number, *names in lines if number == str(epoch)][:count])
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "after", "workers"), [(1, 1, 2), (2, 1, 0)])
def test_a_killed_run_on_shards_resumes_with_the_images_that_are_left(tmp_path, world_size, after, workers):
    root, everything = write_shards(tmp_path / "s", [3, 5, 4, 6, 2, 4, 1, 7] * 2), [f"s/{i:04}.png" for i in range(64)]

    def flags(name, number, workers):
        batch = ("--batch_size_per_gpu", 4 // number, "--num_workers", workers)
        return (*SMALL_RUN, "--data_path", root, "--output_dir", tmp_path / name, *batch)

    def checkpoint(name):
        return torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)

    spoil = ("note_images", tmp_path / "killed", "kill_in_step", STEPS + 3)
    killed = (*flags("run", world_size, workers), "--saveckp_iters", STEPS + 3)
    codes, screens = Run(*killed, world=world_size, spoil=spoil).end()
    assert codes[0] == -signal.SIGKILL, screens
    assert checkpoint("run")["images_done"] == 3 * 4
    finish(*flags("run", after, workers), world=after, spoil=("note_images", tmp_path / "resumed"))
    assert steps_of(tmp_path / "killed", world_size, epoch=0) == everything
    done, rest = steps_of(tmp_path / "killed", world_size, 1, count=3), steps_of(tmp_path / "resumed", after, 1)
    assert sorted(done + rest) == everything
    if after == world_size:
        finish(*flags("whole", world_size, 0), world=world_size)
        for key in ("student", "teacher", "epoch"):
            assert_same(checkpoint("run")[key], checkpoint("whole")[key])
