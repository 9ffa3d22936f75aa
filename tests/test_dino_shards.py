"""Tar shards: what is in them and must not be, their order in training, and runs that are killed and go on."""

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
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import SMALL_RUN, ending, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_restarts import Run, assert_same

import dino_data
import dino_images
import dino_shards
import eval_knn
import main_dino
import utils
from dino_shards import Piece, ShardSampler, TarShards
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
    """Shards of so many images each, written by WebDataset; images are numbered over all of them."""
    root.mkdir(parents=True, exist_ok=True)
    for k, count in enumerate(counts):
        with webdataset.TarWriter(str(root / f"{k:04}.tar")) as shard:
            for i in range(first, first + count):
                shard.write({"__key__": f"s/{i:04}", "png": picture(i)} | ({"cls": i % 3} if labels else {}))
        first += count
    return root


def write_folder(root, count):
    root.mkdir(parents=True)
    for i in range(count):
        (root / f"{i:04}.png").write_bytes(png(i))
    return root


def write_tar(path, members, kind=None, size=None, mode="w"):
    """A tar of {name: content}; of another `kind` of member, or with another size in its header."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content) if kind is None else 0
            if kind is not None:
                info.type, info.linkname = kind, "/etc/passwd"
            if size is not None:
                info.size = size
            tar.addfile(info, io.BytesIO(content))
    return path


# ---- what is in them ----


def test_shards_hold_what_webdatasets_own_reader_finds_in_them(tmp_path):
    root = write_shards(tmp_path / "shards", [3, 5, 1])
    theirs = list(webdataset.WebDataset(str(root / "{0000..0002}.tar"), shardshuffle=False))
    ours = TarShards(str(root / "{0000..0002}.tar"))
    assert len(ours) == len(theirs) == 9
    for i, sample in enumerate(theirs):
        assert ours.name(i) == f"{sample['__url__']}/{sample['__key__']}.png"
        assert ours.open(i).tobytes() == Image.open(io.BytesIO(sample["png"])).tobytes()
        assert ours.classes[ours.targets[i]] == sample["cls"].decode()


@pytest.mark.parametrize("beside", ["a/1.png", "1.png"])
def test_a_folder_with_images_or_folders_in_it_means_these_whatever_tars_lie_beside(tmp_path, beside):
    write_shards(tmp_path, [2])
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / beside).write_bytes(png(1))
    images = dino_data.find_images(tmp_path)
    assert [images.name(i) for i in range(len(images))] == [str(tmp_path / beside)]
    assert len(dino_data.find_images(tmp_path, data_format="shards")) == 2


def test_a_folder_may_be_named_like_a_shard_and_hold_much_beside_shards(tmp_path):
    root = write_shards(tmp_path / "photos.tar", [2])
    for i in range(1500):
        (root / f"{i}.json").touch()
    assert len(dino_data.find_images(root)) == 2
    write_folder(tmp_path / "images.tar", 3)
    assert len(dino_data.find_images(tmp_path / "images.tar")) == 3


def test_brackets_and_braces_in_the_names_of_folders_do_no_harm(tmp_path):
    root = write_shards(tmp_path / "a[1]", [2, 2])
    for pattern in ("{0000..0001}.tar", "*.tar", "0001.tar"):
        assert len(TarShards(str(root / pattern))) == (2 if pattern == "0001.tar" else 4)


@pytest.mark.parametrize("pattern", ["{0000..0002}.tar", "*.tar", "", "000{0,1,2}.tar", "{0000,000[12]}.tar"])
def test_patterns_and_folders_name_the_same_shards(tmp_path, pattern):
    root = write_shards(tmp_path / "shards", [2, 2, 2])
    (root / "._0000.tar").write_bytes(b"")
    images = dino_data.find_images(os.path.join(root, pattern))
    assert [Path(path).name for path in images.paths] == ["0000.tar", "0001.tar", "0002.tar"]
    assert len(images) == 6


def test_a_single_shard_and_one_with_braces_in_its_name_are_taken(tmp_path):
    write_shards(tmp_path, [4])
    assert len(dino_data.find_images(tmp_path / "0000.tar")) == 4
    os.rename(tmp_path / "0000.tar", tmp_path / "{a,b}.tar")
    assert len(dino_data.find_images(tmp_path / "{a,b}.tar")) == 4


def test_images_with_a_dot_in_their_key_are_not_lost_in_silence(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.1.png": png(1), "b.png": png(2), "a.2.png": png(3)})
    with pytest.raises(UserError, match=r"x.tar has a.1.png in it: names of images have one dot"):
        dino_shards.list_members(path)


def test_two_shards_in_one_file_are_not_taken_for_one(tmp_path):
    write_shards(tmp_path, [2, 2])
    first, second = ((tmp_path / name).read_bytes() for name in ("0000.tar", "0001.tar"))
    (tmp_path / "0000.tar").write_bytes(first + second)
    with pytest.raises(UserError, match=r"0000.tar goes on behind its end mark"):
        dino_shards.list_members(tmp_path / "0000.tar")


def test_parts_of_an_image_and_hidden_files_are_no_images(tmp_path):
    image = png(1)
    members = {
        "a/._1.png": b"x",
        "a/1.png": image,
        "a/1.seg.png": image,
        "a/1.json": b"{}",
        "README": b"x",
        ".b.png": image,
        "2.JPG": image,
    }
    images = TarShards(str(write_tar(tmp_path / "x.tar", members)))
    assert [images.name(i) for i in range(len(images))] == [f"{tmp_path}/x.tar/a/1.png", f"{tmp_path}/x.tar/2.JPG"]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{0000..0003}.tar", "no such shards; 2 of 4 are missing: .*0002.tar"),
        ("{0..2.tar", "is no pattern of shards"),
        ("{0..1}.tar", "no such shards; 2 of 2 are missing"),
        ("*x.tar", "there are no such shards"),
        ("{0000,0000}.tar", "names a shard twice"),
        ("{000000000..999999999}.tar", "more than 1000 shards"),
        ("https://x.org/{0..9}.tar", "read from file systems"),
        ("pipe:touch canary; cat 0000.tar", "read from file systems"),
    ],
)
def test_patterns_of_nothing_are_refused(tmp_path, monkeypatch, pattern, says):
    monkeypatch.setattr(dino_shards, "MOST_SHARDS", 1000)
    write_shards(tmp_path, [1, 1])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        dino_data.find_images(pattern)
    assert not Path("canary").exists()


def test_labels_are_numbers_or_names_and_all_or_none(tmp_path):
    image = png(1)

    def shard(*labels):
        members = {}
        for i, label in enumerate(labels):
            members[f"{i}.png"] = image
            if label is not None:
                members[f"{i}.cls"] = label
        return TarShards(str(write_tar(tmp_path / "x.tar", members)))

    numbers = shard(b"10", b"9\n", b"10")
    assert (numbers.classes, numbers.targets.tolist()) == (["9", "10"], [1, 0, 1])
    names = shard(b"bee", "äpe".encode(), b"bee")
    assert (names.classes, names.targets.tolist()) == (["bee", "äpe"], [0, 1, 0])
    assert shard(None, None).targets is None
    with pytest.raises(UserError, match="a label for 1 of 2 images"):
        shard(None, b"1").targets  # noqa: B018
    for odd in (b"\xff", b"", b"1" * 2000):
        with pytest.raises(UserError, match=r"x.tar has no label in 0.cls"):
            shard(odd)


def test_a_part_of_shards_keeps_names_labels_and_images(tmp_path):
    whole = TarShards(str(write_shards(tmp_path / "s", [3, 3])))
    part = whole.take([4, 1]).take([1, 0])
    assert [part.name(i) for i in range(2)] == [whole.name(1), whole.name(4)]
    assert part.targets.tolist() == [1, 1]
    assert part.open(1).tobytes() == picture(4).tobytes()


def test_arrays_in_shards_are_images_where_images_have_other_channels_than_three(tmp_path):
    file = io.BytesIO()
    np.save(file, np.full((5, 6, 4), 40000, np.uint16))
    path = write_tar(tmp_path / "x.tar", {"1.npy": file.getvalue(), "1.cls": b"7", "2.png": png(1)})
    photographs, arrays = (dino_data.find_images(path, in_chans=n) for n in (3, 4))
    assert [photographs.name(i) for i in range(len(photographs))] == [f"{path}/2.png"]
    assert [arrays.name(i) for i in range(len(arrays))] == [f"{path}/1.npy", f"{path}/2.png"]
    decoded = dino_images.decode(arrays.open(0), utils.RGB._replace(in_chans=4))
    assert torch.equal(decoded, torch.full((4, 5, 6), 40000 / 65535))


# ---- what must not be in them ----

HOSTILE = {
    "a path above": ({"../../x.jpg": b"x"}, None, "a path out of its folder"),
    "a path from the root": ({"/tmp/canary.jpg": b"x"}, None, "a path out of its folder"),
    "a path up again": ({"a/../../x.jpg": b"x"}, None, "a path out of its folder"),
    "a link": ({"x.jpg": b""}, tarfile.SYMTYPE, "a link or a device"),
    "a hard link": ({"x.jpg": b""}, tarfile.LNKTYPE, "a link or a device"),
    "a device": ({"x.jpg": b""}, tarfile.CHRTYPE, "a link or a device"),
    "a pipe": ({"x.jpg": b""}, tarfile.FIFOTYPE, "a link or a device"),
    "a link among labels": ({"x.cls": b""}, tarfile.SYMTYPE, "a link or a device"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_shards_that_nobody_makes_for_training_are_refused(tmp_path, what):
    members, kind, says = HOSTILE[what]
    path = write_tar(tmp_path / "x.tar", members, kind)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("good.png")
        info.size = len(png(0))
        tar.addfile(info, io.BytesIO(png(0)))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=f"the shard {path} has .*{says}"):
        dino_shards.list_members(path)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_run_over_a_hostile_shard_ends_with_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main_dino, "main", main_dino.train_dino, raising=False)
    path = write_tar(tmp_path / "x.tar", {"../canary.jpg": b"x"})
    flags = (*SMALL_RUN, "--data_path", path, "--output_dir", tmp_path / "run")
    code, line = ending(monkeypatch, capsys, main_dino, *flags)
    assert (code, line.count("\n")) == (2, 0)
    assert "has ../canary.jpg in it" in line
    assert not (tmp_path / "run" / "checkpoint.pth").exists()
    assert not (tmp_path.parent / "canary.jpg").exists()


def test_names_without_end_are_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a" * 2000 + ".jpg": b"x"})
    with pytest.raises(UserError, match="a name of 2004 letters"):
        dino_shards.list_members(path)


def test_files_with_holes_are_refused(tmp_path):
    if not shutil.which("tar"):
        pytest.skip("no tar program here")
    with open(tmp_path / "x.jpg", "wb") as file:
        file.truncate(1_000_000)
    subprocess.run(["tar", "--sparse", "-cf", "x.tar", "x.jpg"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match="a file with holes"):
        dino_shards.list_members(tmp_path / "x.tar")


@pytest.mark.parametrize("size", [-512, -1024, -5000, 2**40])
@pytest.mark.parametrize("how", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_impossible_sizes_neither_hang_nor_pass(tmp_path, size, how):
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("b.jpg")
    info.size = size
    if how == tarfile.PAX_FORMAT:
        info.size, info.pax_headers = 0, {"size": str(size)}
    good = tarfile.TarInfo("a.jpg")
    good.size = 512
    content = good.tobuf() + b"x" * 512 + info.tobuf(how) + b"\0" * 1024
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x.tar (ends within|is no tar file|is damaged)"):
        dino_shards.list_members(path)


def test_a_shard_cut_anywhere_is_never_taken_for_whole(tmp_path):
    write_shards(tmp_path, [2])
    whole = (tmp_path / "0000.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    marks = -(-end // 512) * 512  # where the end mark begins
    for cut in [0, 1, 511, 512, 513, 1000, *range(1024, marks, 300), marks]:
        (tmp_path / "0000.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"0000.tar "):
            dino_shards.list_members(tmp_path / "0000.tar")
    (tmp_path / "0000.tar").write_bytes(whole[: marks + 512])
    assert len(dino_shards.list_members(tmp_path / "0000.tar")) == 2


def test_a_damaged_header_does_not_end_a_shard_early(tmp_path):
    write_shards(tmp_path, [4], labels=False)
    path = tmp_path / "0000.tar"
    third = dino_shards.list_members(path)[2].start - 512
    content = bytearray(path.read_bytes())
    content[third + 150] ^= 1  # in its checksum
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"0000.tar is (damaged at byte {third}|no tar file, or damaged: bad checksum)"):
        dino_shards.list_members(path)


def test_compressed_and_other_files_are_named(tmp_path):
    write_shards(tmp_path, [1])
    path = tmp_path / "0000.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"0000.tar is compressed. Unpack it"):
        dino_shards.list_members(path)
    write_tar(path, {"x.txt": b"no image"})
    with pytest.raises(UserError, match="no images in these 1 shards"):
        TarShards(str(path))


# ---- lists that are kept ----


def test_a_second_start_reads_no_shard_and_a_changed_one_is_read_again(tmp_path, monkeypatch):
    root, real, listed = write_shards(tmp_path / "s", [2, 3]), dino_shards.list_members, []
    monkeypatch.setattr(
        dino_shards, "list_members", lambda path, *rest: listed.append(Path(path).name) or real(path, *rest)
    )
    first = dino_data.digest_of_names(TarShards(str(root)))
    assert listed == ["0000.tar", "0001.tar"]
    assert dino_data.digest_of_names(TarShards(str(root))) == first
    assert len(listed) == 2
    write_shards(tmp_path / "other", [3], first=7)
    shutil.copy(tmp_path / "other" / "0000.tar", root / "0001.tar")
    assert dino_data.digest_of_names(TarShards(str(root))) != first
    assert listed[2:] == ["0001.tar"]


@pytest.mark.parametrize("spoil", [b"", b"{", b"[]", b'{"path": 1}', b"\x93NUMPY", None])
@pytest.mark.parametrize("kind", [".json", ".npy"])
def test_lists_that_were_spoiled_do_not_matter(tmp_path, cache, kind, spoil):
    root = write_shards(tmp_path / "s", [3])
    TarShards(str(root))
    for path in (cache / "shards").glob(f"*{kind}"):
        path.unlink() if spoil is None else path.write_bytes(spoil)
    images = TarShards(str(root))
    assert [images.open(i).tobytes() for i in range(3)] == [picture(i).tobytes() for i in range(3)]


def test_a_list_of_fewer_images_does_not_matter(tmp_path, cache):
    root = write_shards(tmp_path / "s", [3])
    TarShards(str(root))
    (path,) = (cache / "shards").glob("*.npy")
    np.save(path, np.load(path)[:2])
    assert TarShards(str(root)).open(2).tobytes() == picture(2).tobytes()


def test_where_nothing_can_be_kept_that_is_said_and_the_shards_are_read_even_so(tmp_path, monkeypatch, capsys):
    root = write_shards(tmp_path / "s", [1, 2])
    kept = dino_data.digest_of_names(TarShards(str(root)))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "file"))
    dino_shards.load_index.cache_clear()
    images = TarShards(str(root))
    assert "Set DINO_CACHE" in capsys.readouterr().out
    assert dino_data.digest_of_names(images) == kept
    assert images.open(2).tobytes() == picture(2).tobytes()


def list_in_a_process(root):
    dino_shards.utils.lock_file = lambda *_, **__: (contextlib.nullcontext(), True)  # a file system without locks
    dino_shards.utils.log = lambda text: sys.exit(text)
    assert len(TarShards(str(root))) == 200


def test_several_processes_may_list_shards_at_once_where_files_can_not_be_locked(tmp_path):
    root = write_shards(tmp_path / "s", [5] * 40)
    processes = [multiprocessing.get_context("fork").Process(target=list_in_a_process, args=(root,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_file_system_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    images = TarShards(str(write_shards(tmp_path / "s", [2])))
    stat, tries, slept = os.stat, [], []

    def stale_at_first(path, **options):
        tries.append(path)
        if len(tries) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, **options)

    monkeypatch.setattr(dino_shards.os, "stat", stale_at_first)
    monkeypatch.setattr(dino_images.time, "sleep", slept.append)
    assert images.open(0).size == (20, 20)
    assert slept == [0.5, 1.0]


def test_a_new_mode_is_no_change_of_a_shard(tmp_path):
    root = write_shards(tmp_path / "s", [2])
    images = TarShards(str(root))
    os.chmod(root / "0000.tar", 0o600)
    assert images.open(0).size == (20, 20)


def test_an_image_that_is_damaged_in_its_shard_is_replaced_and_named(tmp_path):
    root = write_shards(tmp_path / "s", [10, 10], labels=False)
    bad = dino_shards.list_members(root / "0001.tar")[3]
    with open(root / "0001.tar", "r+b") as file:
        file.seek(bad.start)
        file.write(b"\0" * bad.size)
    flags = ("--data_path", root, "--output_dir", tmp_path / "run", "--max_bad_images", 0.05, "--epochs", 1)
    run_script("main_dino.py", *SMALL_RUN, *flags, "--batch_size_per_gpu", 10, "--num_workers", 2)
    (line,) = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert line == f"{root}/0001.tar/s/0013.png\tit is no image of a known kind"


def test_a_shard_that_changes_while_it_is_read_is_a_bad_image(tmp_path):
    root = write_shards(tmp_path / "s", [2])
    images = TarShards(str(root))
    write_shards(root, [3], first=5)
    with pytest.raises(dino_images.BadImage, match=r"0000.tar has changed"):
        images.open(0)
    os.remove(root / "0000.tar")
    with pytest.raises(dino_images.BadImage, match=r"0000.tar: No such file"):
        images.open(1)


# ---- their order ----


@pytest.fixture
def uneven(tmp_path):
    return TarShards(str(write_shards(tmp_path / "s", [7, 1, 12, 30, 2, 9, 35], labels=False)))  # 96


def all_of(lists):
    return list(itertools.chain.from_iterable(lists))


def shares(images, world, batch, epoch=0, first=0, sittings=()):
    found = []
    for rank in range(world):
        sampler = ShardSampler(images, batch, 5, rank, world)
        sampler.set_epoch(epoch, first, sittings)
        found.append([number for _, number in sampler])
        assert len(sampler) == len(found[-1])
        assert {e for e, _ in sampler} <= {epoch}
    return found


@pytest.mark.parametrize("window", [1, 5, 16, 1000])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_image_is_seen_once_by_one_process(uneven, monkeypatch, world, window):
    monkeypatch.setattr(dino_shards, "WINDOW", window)
    for epoch in range(3):
        each = shares(uneven, world, 24 // world, epoch)
        assert {len(numbers) for numbers in each} == {96 // world}
        assert sorted(all_of(each)) == list(range(96))
    assert shares(uneven, world, 24 // world, 0) != shares(uneven, world, 24 // world, 1)


def test_what_does_not_fill_a_batch_of_all_is_left_out_and_another_each_epoch(uneven):
    seen = [set(all_of(shares(uneven, 2, 5, epoch))) for epoch in range(30)]
    assert {len(numbers) for numbers in seen} == {90}
    assert set.union(*seen) == set(range(96))


@pytest.mark.parametrize("window", [4, 1000])
def test_processes_read_shards_of_their_own_and_share_those_at_the_borders(uneven, monkeypatch, window):
    monkeypatch.setattr(dino_shards, "WINDOW", window)
    shard_of = np.repeat(np.arange(7), np.diff(uneven.starts))
    for epoch in range(5):
        sets = [set(shard_of[numbers]) for numbers in shares(uneven, 4, 6, epoch)]
        assert sum(map(len, sets)) <= 7 + 3


def test_a_window_moves_over_a_run_of_shards(uneven, monkeypatch):
    """The images of a window are a run of the shards laid end to end, in another order."""
    monkeypatch.setattr(dino_shards, "WINDOW", 10)
    sampler = ShardSampler(uneven, 8, 5)
    end_to_end = np.concatenate([np.arange(uneven.starts[k], uneven.starts[k + 1]) for k in sampler.shards])
    seen = [number for _, number in sampler]
    for start in range(0, 96, 10):
        window = seen[start : start + 10]
        assert sorted(window) == sorted(end_to_end[start : start + 10])
        assert len(window) < 8 or window != list(end_to_end[start : start + 10])


def test_the_order_follows_from_the_seed(uneven):
    def order(seed):
        return [number for _, number in ShardSampler(uneven, 8, seed)]

    assert order(1) == order(1) != order(2)


def test_images_of_a_single_shard_have_another_order_in_each_epoch(tmp_path):
    shard = TarShards(str(write_shards(tmp_path / "s", [30])))
    assert shares(shard, 1, 5, 0) != shares(shard, 1, 5, 1)


@pytest.mark.parametrize("window", [3, 1000])
@pytest.mark.parametrize("before", [(1, 24), (2, 12), (3, 8), (4, 6)])
@pytest.mark.parametrize("after", [(1, 24), (2, 12), (3, 8), (4, 6)])
def test_an_epoch_goes_on_with_other_numbers_of_processes_without_loss_or_repetition(
    uneven, monkeypatch, before, after, window
):
    monkeypatch.setattr(dino_shards, "WINDOW", window)
    first = shares(uneven, *before)
    for third in ((2, 12), (4, 6)):
        seen = all_of(numbers[: before[1]] for numbers in first)  # a step
        second = shares(uneven, *after, first=1, sittings=[(*before, 1)])
        seen += all_of(numbers[: 2 * after[1]] for numbers in second)  # two more
        last = shares(uneven, *third, first=3, sittings=[(*before, 1), (*after, 2)])
        assert sorted(seen + all_of(last)) == list(range(96))
    if before == after:
        assert second == [numbers[before[1] :] for numbers in first]
        assert second == shares(uneven, *before, first=1)


def test_with_another_batch_no_image_is_seen_twice(uneven):
    seen = all_of(numbers[:20] for numbers in shares(uneven, 2, 10))  # 2 of 4 steps of 20
    rest = all_of(shares(uneven, 3, 3, first=5, sittings=[(2, 10, 2)]))  # 40 images are 5 steps of 9, begun
    assert len(rest) == 5 * 9
    assert not set(rest) & set(seen)
    assert len(set(rest)) == len(rest)


def test_pieces_are_split_like_a_list_of_their_images():
    pieces = [Piece(0, 10, 2, 5, 9), Piece(10, 20, 0, 10, 9), Piece(20, 22, 1, 1, 9), Piece(30, 40, 9, 10, 9)]

    def images(pieces):
        return [(piece.start, i) for piece in pieces for i in range(piece.first, piece.last)]

    for first in range(15):
        for second in range(15 - first):
            parts = dino_shards.split(pieces, [first, second])
            assert images(parts[0]) == images(pieces)[:first]
            assert images(parts[1]) == images(pieces)[first : first + second]


# ---- lanes, for loaders ----


@pytest.fixture
def many(tmp_path):
    """96 shards, 704 images: of two images a step, 40 lanes for one process and 20 for each of two."""
    return TarShards(str(write_shards(tmp_path / "many", [5, 9, 8, 7, 6, 9, 8, 6, 9, 3, 10, 8] * 8, labels=False)))


@pytest.mark.parametrize(
    ("shards", "batches", "lanes"),
    [
        (1000, 20_015, 80), (160, 640, 80), (159, 640, 40), (160, 639, 40), (80, 320, 40), (79, 320, 20), (40, 159, 10),
        (20, 80, 10), (19, 80, 4), (8, 32, 4), (8, 31, 2), (4, 16, 2), (3, 16, 1), (4, 15, 1), (1, 7, 1), (0, 0, 1),
    ],
)  # fmt: skip
def test_a_run_has_as_many_lanes_as_leave_two_shards_and_eight_batches_to_each(shards, batches, lanes):
    assert dino_shards.count_lanes(shards, batches) == lanes


class Opened(torch.utils.data.Dataset):
    """Images of shards as who opened them: (worker, shard, number of the image)."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, item):
        self.images.open(item[1])
        shard = int(Path(self.images.find(item[1])[0]).stem)
        return getattr(torch.utils.data.get_worker_info(), "id", -1), shard, item[1]


def loaded(images, workers, rank=0, world=1, sittings=(), first=0):
    """The batches [B, 3] that a loader with so many workers gives."""
    sampler = ShardSampler(images, 2, 5, rank, world)
    sampler.set_epoch(1, first, sittings)
    loader = torch.utils.data.DataLoader(Opened(images), 2, sampler=sampler, num_workers=workers)
    return sampler, [torch.stack(batch, 1).tolist() for batch in loader]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [2, 4])
def test_each_loader_opens_shards_of_its_own_but_for_those_at_borders_of_lanes(many, world, workers):
    opened_by, borders = {}, set()
    for rank in range(world):
        sampler, batches = loaded(many, workers, rank, world)
        assert sampler.lanes == 40 // world
        for worker, shard, _ in all_of(batches):
            opened_by.setdefault(shard, set()).add((rank, worker))
        each = len(batches)
        lengths = [2 * sum(k % sampler.lanes == lane for k in range(each)) for lane in range(sampler.lanes)]
        borders |= {2 * rank * each + sum(lengths[:lane]) for lane in range(sampler.lanes + 1)}
    stops = np.diff(many.starts)[sampler.shards].cumsum().tolist()
    starts = [0, *stops[:-1]]
    at_border = {
        shard
        for shard, a, b in zip(sampler.shards.tolist(), starts, stops, strict=True)
        if any(a < border < b for border in borders)
    }
    assert len(at_border) < 48
    assert len(opened_by) == 96
    assert all(len(whose) == 1 for shard, whose in opened_by.items() if shard not in at_border)
    assert all(len(whose) <= 3 for whose in opened_by.values())
    assert {whose for all_whose in opened_by.values() for whose in all_whose} == {
        (rank, worker) for rank in range(world) for worker in range(workers)
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_and_their_order_are_the_same_for_any_number_of_loaders(many):
    for how in ({}, {"sittings": [(2, 2, 17, 20), (1, 2, 5, 10)], "first": 39}):
        orders = [[[image[1:] for image in batch] for batch in loaded(many, n, **how)[1]] for n in range(5)]
        assert len(orders[0]) == 352 - how.get("first", 0)
        assert all(order == orders[0] for order in orders)


def test_a_window_moves_over_each_lane_and_lanes_take_turns(many, monkeypatch):
    """The images of a lane's window are those of a run of shards laid end to end, in another order."""
    monkeypatch.setattr(dino_shards, "WINDOW", 160)
    sampler = ShardSampler(many, 2, 5)
    end_to_end = all_of([range(many.starts[k], many.starts[k + 1]) for k in sampler.shards])
    seen = [number for _, number in sampler]
    batches, at = [seen[i : i + 2] for i in range(0, 704, 2)], 0
    for lane in range(40):
        images = all_of(batches[lane::40])
        for i in range(0, len(images), 10):
            window = images[i : i + 10]
            assert sorted(window) == sorted(end_to_end[at : at + len(window)])
            at += len(window)
    assert at == 704
    assert seen != end_to_end


@pytest.mark.parametrize(("shards", "lanes", "window"), [(1, 1, 16_384), (8, 4, 4096), (20, 10, 1638), (200, 80, 1024)])
def test_lanes_share_a_window_and_have_at_least_a_sixteenth_of_it(shards, lanes, window):
    images = Counted([400_000 // shards] * shards)
    sampler = ShardSampler(images, 10)
    assert sampler.lanes == lanes
    seen = np.array([number for _, number in sampler]).reshape(-1, 10)[::lanes].ravel()  # those of the first lane
    place = np.argsort(sampler.shards)[seen // (400_000 // shards)] * (400_000 // shards) + seen % (400_000 // shards)
    for i in range(0, min(4 * window, len(place)), window):
        assert set(place[i : i + window]) == set(range(i, min(i + window, len(place))))


class Counted:
    """What a sampler asks of shards with so many images each."""

    def __init__(self, counts):
        self.paths, self.starts = range(len(counts)), np.cumsum([0, *counts])

    def __len__(self):
        return int(self.starts[-1])


def slowly(images, world, batch, sittings, window, steps, seed=5, epoch=0):
    """The numbers that each rank sees in the last sitting: lists that batches are taken from, one by one.

    Sittings are (processes, images, steps) or, with a number of lanes of their own, four numbers.
    """
    order = ShardSampler(images, 1, seed)
    order.set_epoch(epoch)
    numbers = all_of([range(images.starts[k], images.starts[k + 1]) for k in order.shards])
    merged = []
    for sitting in [*sittings, (world, batch, 0)]:
        if merged and merged[-1][:2] == list(sitting[:2]):
            merged[-1][2] += sitting[2]
        else:
            merged.append(list(sitting))
    line = None
    for processes, share, done, *lanes in merged:
        n = len(numbers if line is None else line) // (processes * share)
        each = len(images.paths) // processes
        most = max(x for x in (1, 2, 4, 10, 20, 40, 80) if x == 1 or (each // x >= 2 and n // x >= 8))
        count = lanes[0] if lanes else most
        lengths = [sum(share for k in range(n) if k % count == lane) for lane in range(count)] * processes
        if line is None:
            line, first = [], 0
            for length in [*lengths, len(numbers) - sum(lengths)]:
                width = window // min(count, 16)
                for start in range(first, first + length, width):
                    stop = min(start + width, first + length)
                    own = torch.Generator().manual_seed(utils.derive_seed(seed, utils.ORDER, epoch, start))
                    line += [numbers[start + i] for i in torch.randperm(stop - start, generator=own).tolist()]
                first += length
        queues = []
        for length in lengths:
            queues.append(line[:length])
            del line[:length]
        ranks = [queues[r * count : (r + 1) * count] for r in range(processes)]
        for rank in ranks:
            for k in range(done):
                del rank[k % count][:share]
        line = all_of(queues) + line
    found = []
    for rank in ranks:
        found.append([])
        for k in range(done, done + steps):
            found[-1] += rank[k % count][:share]
            del rank[k % count][:share]
    return found


sittings_of_runs = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.floats(0, 1)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 12), min_size=4, max_size=50), sittings_of_runs, st.sampled_from([16, 100, 16_384]))
def test_whoever_had_a_share_of_an_epoch_no_image_is_seen_twice_and_the_order_is_that_of_lists(counts, runs, window):
    images = Counted(counts * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dino_shards, "WINDOW", window)
        sittings, seen, left = [], [], len(images)
        for world, batch, part in [*runs, (2, 3, 1.0), (2, 3, 1.0)]:
            first = min(-(-(len(images) - left) // (world * batch)), len(images) // (world * batch))
            samplers = [ShardSampler(images, batch, 5, rank, world) for rank in range(world)]
            for sampler in samplers:
                sampler.set_epoch(0, first, sittings)
            shares = [[number for _, number in sampler] for sampler in samplers]
            steps = len(images) // (world * batch) - first
            assert [len(numbers) for numbers in shares] == [steps * batch] * world
            assert shares == slowly(images, world, batch, sittings, window, steps)
            done = int(part * steps)
            seen += all_of(numbers[: done * batch] for numbers in shares)
            left -= done * batch * world
            sittings.append((world, batch, done, samplers[0].lanes))
    assert len(set(seen)) == len(seen) == len(images) - left
    assert left < len(images) % 6 + 3 * 4 * len(runs) + 6


@pytest.mark.parametrize("before", [[], [(3, 2, 11, 20)], [(1, 4, 5, 20), (3, 2, 11, 20)]])
def test_a_run_that_is_stopped_often_goes_on_as_if_it_had_never_been(many, before):
    first = -(-sum(processes * images * steps for processes, images, steps, _ in before) // 4)
    whole = shares(many, 2, 2, 1, first, [*before, (2, 2, 0, None)])
    stops = [(2, 2, steps, None) for steps in (1, 0, 22, 30)]
    for number in range(1, 5):
        done = sum(stop[2] for stop in stops[:number])
        again = shares(many, 2, 2, 1, first + done, [*before, *stops[:number]])
        assert again == [numbers[2 * done :] for numbers in whole]


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_from_before_there_were_lanes_ends_its_epoch_without_them(many, world):
    """Its sittings have three numbers. Each process read a run from first to last, in order of windows."""
    before = slowly(many, world, 2, [(world, 2, 0, 1)], dino_shards.WINDOW, 352 // world)
    steps = 100 // world
    assert shares(many, world, 2, 0, steps, [(world, 2, steps)]) == [numbers[2 * steps :] for numbers in before]
    other = 3 - world
    rest = all_of(shares(many, other, 2, 0, 100 // other, [(world, 2, steps)]))
    assert sorted(rest + all_of(numbers[: 2 * steps] for numbers in before)) == list(range(704))


def test_crops_of_an_image_are_those_of_the_same_image_in_a_folder(tmp_path):
    augment = main_dino.DataAugmentationDINO((0.4, 1), (0.05, 0.4), 2, 32, 16, as_uint8=True)
    sources = [write_folder(tmp_path / "folder", 6), write_shards(tmp_path / "shards", [4, 2])]
    folder, shards = (dino_data.MultiCropDataset(dino_data.find_images(source), augment, 3) for source in sources)
    for i in range(6):
        assert all(map(torch.equal, folder[1, i][0], shards[1, i][0]))


@pytest.mark.parametrize(
    ("labels", "are_sorted"),
    [
        (["a" * 12, "b" * 12, "c" * 12, "d" * 12], True),
        (["a" * 9 + "b" * 3, "b" * 12, "b" * 2 + "c" * 10, "c" * 6 + "d" * 6], True),  # cut without regard to classes
        (["ab" * 6, "ab" * 6, "ba" * 6, "ba" * 6], False),  # two are all there are
        (["abcd" * 3, "bcda" * 3, "cdab" * 3, "aabb" * 3], False),
        (["a" * 12] * 4, False),
        (["a" * 30, "a" * 29 + "b", "a" * 30, "a" * 30], False),  # one of them is rare
        (["a" * 3, "b" * 3, "c" * 3, "d" * 3], False),  # too few to tell
        (["-" * 12] * 4, False),  # no labels
    ],
)
def test_shards_that_are_packed_class_by_class_are_warned_of(tmp_path, capsys, labels, are_sorted):
    for k, letters in enumerate(labels):
        with webdataset.TarWriter(str(tmp_path / f"{k}.tar")) as shard:
            for i, letter in enumerate(letters):
                label = {} if letter == "-" else {"cls": letter}
                shard.write({"__key__": f"{k}-{i}", "png": picture(i), **label})
    dataset = dino_data.MultiCropDataset(dino_data.find_images(tmp_path), None, 0)
    dino_data.train_loader(dataset, 2, 0, 0, torch.device("cpu"))
    assert ("warning: these shards hold a class or two each" in capsys.readouterr().out) == are_sorted


# ---- evaluation ----


def test_labelled_shards_are_evaluated_like_the_folders_that_they_were_made_of(tmp_path):
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
    said = [
        [line for line in run_script("eval_knn.py", *flags, "--data_path", path).stdout.splitlines() if "NN" in line]
        for path in (folder, tmp_path)
    ]
    assert said[0] == said[1] != []


def test_the_neighbors_of_a_run_come_from_its_labelled_shards(tmp_path):
    root = write_shards(tmp_path / "s", [20, 20])
    run_script("main_dino.py", *SMALL_RUN, "--data_path", root, "--output_dir", tmp_path / "run", "--knn_every", 1)
    assert "knn" in (tmp_path / "run" / "log.txt").read_text()


def test_shards_named_after_both_parts_are_refused(tmp_path):
    write_shards(tmp_path, [3, 3])
    os.rename(tmp_path / "0000.tar", tmp_path / "train-val.tar")
    os.rename(tmp_path / "0001.tar", tmp_path / "trainval.tar")
    with pytest.raises(UserError, match=r"train-val.tar would be of train and of val"):
        dino_data.labelled_images(tmp_path, None)
    os.rename(tmp_path / "train-val.tar", tmp_path / "interval-strain.tar")
    assert dino_data.find_part(tmp_path, "val") is dino_data.find_part(tmp_path, "train") is None
    for name in ("val", "x_val", "val.1", "x.val-2"):
        shutil.copy(tmp_path / "trainval.tar", tmp_path / f"{name}.tar")
        assert [Path(p).stem for p in dino_data.find_images(dino_data.find_part(tmp_path, "val")).paths] == [name]
        os.remove(tmp_path / f"{name}.tar")


def test_training_takes_no_shards_of_val(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main_dino, "main", main_dino.train_dino, raising=False)
    write_shards(tmp_path, [8, 8])
    os.rename(tmp_path / "0000.tar", tmp_path / "train-0.tar")
    os.rename(tmp_path / "0001.tar", tmp_path / "val-0.tar")
    flags = (*SMALL_RUN, "--data_path", tmp_path, "--output_dir", tmp_path / "run")
    code, line = ending(monkeypatch, capsys, main_dino, *flags)
    assert (code, "holds train and val" in line) == (2, True)


@pytest.mark.parametrize(
    ("name", "says"),
    [("train/0.tar", "Name one of these"), ("0.tar.gz", "gunzip"), ("0.tgz", "gunzip"), ("a/0.npy", "by --in_chans")],
)
def test_a_folder_without_images_is_told_by_what_it_has(tmp_path, name, says):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"has no images in it .*{says}"):
        dino_data.find_images(tmp_path)


def test_a_pattern_without_quotes_is_told_in_one_line(tmp_path):
    flags = [word for i in range(300) for word in ([] if i else ["--data_path"]) + [f"shards/{i:04}.tar"]]
    done = run_script("main_dino.py", *flags, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: several shards are named. Put their pattern in quotes")


def test_shards_without_labels_are_no_labelled_images(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "train", [3], labels=False)
    write_shards(tmp_path / "val", [3], labels=False)
    flags = ("--arch", "vit_nano", "--pretrained_weights", "random", "--data_path", tmp_path)
    code, line = ending(monkeypatch, capsys, eval_knn, *flags)
    assert code == 2
    assert "has no labels" in line


# ---- runs ----

STEPS = 16  # an epoch: 64 images, 4 a step; in two lanes for each of 1, 2 and 4 processes
COUNTS = [3, 5, 4, 6, 2, 4, 1, 7] * 2


def steps_of(file, world):
    """{epoch: names of the images that were trained on} over all ranks."""
    found = {}
    for rank in range(world):
        for line in Path(f"{file}{rank}").read_text().splitlines():
            epoch, *names = line.split()
            found.setdefault(int(epoch), []).extend(names)
    return found


def flags_of(data, folder, world, workers, every=0):
    return (
        *SMALL_RUN, "--data_path", data, "--output_dir", folder, "--num_workers", workers,
        "--batch_size_per_gpu", 4 // world, "--saveckp_iters", every,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_killed_runs_over_shards_and_folder_see_every_image_once_an_epoch(tmp_path, world):
    """With 0 and 2 loaders, gone on with by as many processes and by another number."""
    shards, folder = write_shards(tmp_path / "shards", COUNTS), write_folder(tmp_path / "folder", 64)
    everything, ends = [f"{i:04}.png" for i in range(64)], {}
    for data, workers, after in (
        (shards, 0, world), (shards, 2, world), (shards, 2, 3 - min(world, 2)), (folder, 2 * (world == 2), world),
    ):  # fmt: skip
        name = f"{data.name}-{workers}-{after}"
        spoil = ("note_images", tmp_path / name, "kill_in_step", STEPS + 3)
        killed = Run(*flags_of(data, tmp_path / f"run-{name}", world, workers, STEPS + 3), world=world, spoil=spoil)
        killed.processes[0].join(120)
        assert killed.processes[0].exitcode == -signal.SIGKILL, killed.said()
        killed.kill()
        checkpoint = torch.load(tmp_path / f"run-{name}" / "checkpoint.pth", weights_only=True)
        assert checkpoint["sittings"] == [(world, 4 // world, 3, 2 if data is shards else 1)]
        seen = steps_of(tmp_path / name, world)
        assert sorted(seen[0]) == everything
        rest = []
        if after != world:  # and killed there once more
            spoil = ("note_images", tmp_path / f"{name}-second", "kill_in_step", STEPS + 5)
            second = Run(*flags_of(data, tmp_path / f"run-{name}", after, workers, STEPS + 5), world=after, spoil=spoil)
            second.processes[0].join(120)
            assert second.processes[0].exitcode == -signal.SIGKILL, second.said()
            second.kill()
            rest = first_steps(tmp_path / f"{name}-second", after, 2)
            after = world
        again = Run(
            *flags_of(data, tmp_path / f"run-{name}", after, workers), world=after,
            spoil=("note_images", tmp_path / f"{name}-again"),
        )  # fmt: skip
        codes, screens = again.end(120)
        assert not any(codes), screens
        rest += steps_of(tmp_path / f"{name}-again", after)[1]
        assert len(rest) == 64 - 3 * 4
        checkpoint = torch.load(tmp_path / f"run-{name}" / "checkpoint.pth", weights_only=True)
        ends[name] = {key: checkpoint[key] for key in ("student", "teacher", "epoch")}
        done = first_steps(tmp_path / name, world, 3)
        assert sorted(done + rest) == everything
    assert_same(ends[f"shards-0-{world}"], ends[f"shards-2-{world}"])
    if world > 2:
        return  # in which order more than two numbers are added up is another in a first step
    whole = Run(*flags_of(shards, tmp_path / "whole", world, 0), world=world)
    codes, screens = whole.end(120)
    assert not any(codes), screens
    checkpoint = torch.load(tmp_path / "whole" / "checkpoint.pth", weights_only=True)
    assert_same({key: checkpoint[key] for key in ("student", "teacher", "epoch")}, ends[f"shards-0-{world}"])


def first_steps(file, world, count):
    """Images of the first steps of epoch 1 over all ranks: another rank may have noted one step more, or one less."""
    found = []
    for rank in range(world):
        lines = [line.split() for line in Path(f"{file}{rank}").read_text().splitlines()]
        found += all_of([line[1:] for line in lines if line[0] == "1"][:count])
    return found
