"""embed.py: vectors against extract_features and slow loops, files of each format, queries, real processes."""

import contextlib
import os
import re
import shutil
import signal
import tarfile
import time

import numpy as np
import pytest
import torch
from conftest import FORKS, ROOT, arguments_of, become, run_script, sizes_of_results, start_forks, wide_nano
from PIL import Image, ImageFont, ImageOps

import dino_backbones
import dino_crops
import dino_data
import dino_features
import dino_images
import dino_vectors
import embed
import utils

NETWORK = ["--arch", "vit_nano", "--patch_size", 8, "--image_size", 32, "--device", "cpu", "--num_workers", 0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return wide_nano(tmp_path_factory.mktemp("weights") / "plain.pth", 32)


@pytest.fixture(scope="module")
def model(weights):
    model, _ = dino_backbones.build_backbone("vit_nano", 8, 32)
    dino_backbones.load_weights(model, str(weights))
    return dino_backbones.prepare_for_evaluation(model, torch.device("cpu"))


@pytest.fixture(scope="module")
def photos(tiny_root):
    return tiny_root / "val"  # 4 classes of 5 images


@pytest.fixture
def run(weights):
    """run(*flags) -> what the file at --output contains, by dino_vectors.read; None without --output."""

    def run(*flags):
        args = arguments_of(embed, *NETWORK, "--pretrained_weights", weights, *flags)
        embed.main(args)
        return dino_vectors.read(args.output) if args.output else None

    return run


@pytest.fixture(scope="module")
def vectors(weights, photos, tmp_path_factory):
    """An .npz of all photos, with 3 neighbors each."""
    path = tmp_path_factory.mktemp("vectors") / "vectors.npz"
    flags = ["--pretrained_weights", weights, "--data_path", photos, "--output", path, "--neighbors", 3]
    embed.main(arguments_of(embed, *NETWORK, *flags))
    return path


def array_of(found):
    return np.concatenate(list(found.blocks()))


def batch_of(paths):
    transform = dino_crops.eval_transform(32)
    return utils.normalize(torch.stack([transform(dino_images.load_image(path)) for path in paths]))


def paths_of(folder):
    return sorted(str(path) for path in folder.rglob("*.png"))


@pytest.fixture
def spoiled(photos, tmp_path):
    """The photos, of which the third and the last are not images."""
    shutil.copytree(photos, tmp_path / "spoiled")
    bad = [paths_of(tmp_path / "spoiled")[i] for i in (2, 19)]
    for path in bad:
        os.unlink(path)
        with open(path, "wb") as file:
            file.write(b"no image")
    return tmp_path / "spoiled", bad


# ---- vectors ----


def test_vectors_are_those_of_the_evaluations_with_names_and_labels_in_the_order_of_the_data(vectors, photos, model):
    images = dino_data.find_images(photos)
    loader = dino_data.eval_loader(
        dino_data.EvalImages(images, dino_crops.eval_transform(32)), 128, 0, model.norm.weight.device
    )
    wanted = dino_features.extract_features(model, loader)
    with np.load(vectors, allow_pickle=False) as found:
        np.testing.assert_array_equal(found["features"], wanted.numpy())
        assert found["names"].tolist() == paths_of(photos)
        assert [found["classes"][label] for label in found["labels"]] == [p.split("/")[-2] for p in paths_of(photos)]
        assert (found["features"].dtype, found["labels"].dtype) == (np.float32, np.int64)


def test_each_kind_of_tokens_is_what_it_says(run, photos, model, tmp_path):
    tokens = model.get_intermediate_layers(batch_of(paths_of(photos)))[0].double()  # [20, 1 + 16, 128]
    patches = torch.stack([tokens[:, 1 + 4 * row : 5 + 4 * row] for row in range(4)], dim=1)
    mean = sum(tokens[:, i] for i in range(1, 17)) / 16
    wanted = {
        "patch_mean": mean,
        "both": torch.cat((tokens[:, 0], mean), dim=1),
        "patches": patches,
        "cls": tokens[:, 0],
    }
    for kind, value in wanted.items():
        found = run("--data_path", photos, "--output", tmp_path / "v.npz", "--tokens", kind)
        np.testing.assert_allclose(array_of(found), value, rtol=1e-4, atol=1e-5)
        assert found.settings["tokens"] == kind


@pytest.mark.parametrize("kind", ["cls", "patches"])
def test_normalized_vectors_have_length_1_and_the_same_direction(run, photos, tmp_path, kind):
    flags = ["--data_path", photos, "--output", tmp_path / "v.npz", "--tokens", kind]
    plain, normalized = array_of(run(*flags)), array_of(run(*flags, "--normalize", "true"))
    np.testing.assert_allclose(normalized, plain / np.sqrt((plain**2).sum(-1, keepdims=True)), rtol=1e-4, atol=1e-6)


def test_vectors_in_bf16_are_stored_as_float32_and_are_close(run, vectors, photos, tmp_path):
    found = array_of(run("--data_path", photos, "--output", tmp_path / "v.npz", "--amp_dtype", "bf16"))
    exact = np.load(vectors)["features"]
    assert found.dtype == np.float32
    assert 0 < np.linalg.norm(found - exact) < 5e-2 * np.linalg.norm(exact)  # large weights


def test_convnets_have_pooled_features(photos, tmp_path):
    flags = ["--arch", "resnet18", "--pretrained_weights", "random", "--image_size", 32, "--num_workers", 0]
    args = arguments_of(embed, *flags, "--device", "cpu", "--data_path", photos, "--output", tmp_path / "v.npz")
    embed.main(args)
    assert dino_vectors.read(args.output).shape == (512,)


def test_a_run_says_its_network_size_and_normalization(weights, photos, run, tmp_path):
    settings = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 48, "mean": [0.2] * 3, "std": [0.4] * 3}
    torch.save({"teacher": torch.load(weights, weights_only=True), "args": settings}, tmp_path / "checkpoint.pth")
    flags = ["--data_path", photos, "--output", tmp_path / "v.npz"]
    args = arguments_of(embed, *flags, "--pretrained_weights", tmp_path, "--device", "cpu", "--num_workers", 0)
    embed.main(args)
    found = dino_vectors.read(args.output)
    assert found.settings["image_size"] == 48
    assert found.settings["mean"] == [0.2] * 3
    other = array_of(run(*flags, "--image_size", 48))
    assert not np.allclose(array_of(found), other, atol=1e-2)


def test_images_without_class_folders_have_no_labels(run, photos, tmp_path):
    found = run("--data_path", photos / "coffee", "--output", tmp_path / "v.npz")
    assert found.names == paths_of(photos / "coffee")
    assert found.labels is None


def test_no_tensor_grows_with_the_number_of_images(run, photos, sample_root, tmp_path):
    largest = []
    for folder in (photos / "coffee", sample_root / "train" / "coffee"):  # 5 and 60 images
        with sizes_of_results() as sizes:
            run("--data_path", folder, "--output", tmp_path / "v.npz", "--batch_size_per_gpu", 5)
        largest.append(max(sizes))
    assert largest[0] == largest[1]


# ---- formats ----


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet")


def test_npz_pt_and_parquet_hold_the_same(run, vectors, photos, tmp_path, parquet):
    wanted = dino_vectors.read(vectors)
    for suffix in ("pt", "parquet"):
        found = run("--data_path", photos, "--output", tmp_path / f"v.{suffix}", "--neighbors", 3)
        assert (found.names, found.settings, found.classes) == (wanted.names, wanted.settings, wanted.classes)
        for one, other in zip(found.neighbors, wanted.neighbors, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(array_of(found), array_of(wanted))
        np.testing.assert_array_equal(found.labels, wanted.labels)
    loaded = torch.load(tmp_path / "v.pt", weights_only=True)
    assert loaded["features"].shape == (20, 128)
    table = parquet.read_table(tmp_path / "v.parquet")
    assert table["label"].to_pylist() == [path.split("/")[-2] for path in wanted.names]
    np.testing.assert_array_equal(np.stack(table["embedding"].to_pylist()), array_of(wanted))


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".parquet"])
def test_vectors_are_written_block_by_block_and_names_of_any_kind_come_back(tmp_path, monkeypatch, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(dino_vectors, "NUMBERS_AT_ONCE", 6)  # two rows
    array = np.arange(21, dtype=np.float32).reshape(7, 3)
    (tmp_path / "raw").write_bytes(array.tobytes())
    names = ["a", "ü/日本.png", "new\nline", "x" * 300, "bad\udce9byte", "", "g"]
    neighbors = (np.arange(14).reshape(7, 2), np.linspace(1, -1, 14, dtype=np.float32).reshape(7, 2))
    rows = dino_vectors.rows_of_file(tmp_path / "raw", (3,))
    assert [len(block) for block in rows(2)] == [2, 2, 2, 1]
    labels = np.array([0, 1, 1, 0, 0, 1, 0])
    written = dino_vectors.Embeddings(names, (3,), rows, {"arch": "x"}, labels, ["one", "two"], neighbors)
    dino_vectors.write(tmp_path / f"v{suffix}", written)
    found = dino_vectors.read(tmp_path / f"v{suffix}")
    np.testing.assert_array_equal(array_of(found), array)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.names == [name.replace("\udce9", "\ufffd") if suffix == ".parquet" else name for name in names]
    assert (found.settings, found.classes) == ({"arch": "x"}, ["one", "two"])
    for one, other in zip(found.neighbors, neighbors, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


def test_a_file_is_converted_to_what_would_have_been_written_at_once(run, vectors, photos, tmp_path):
    for suffix in ("npz", "pt"):
        run("--data_path", photos, "--output", tmp_path / f"once.{suffix}", "--neighbors", 2)
        flags = ["--embeddings", vectors, "--output", tmp_path / f"later.{suffix}", "--neighbors", 2]
        embed.main(arguments_of(embed, *flags))
    assert (tmp_path / "once.npz").read_bytes() == (tmp_path / "later.npz").read_bytes()
    one, other = (dino_vectors.read(tmp_path / f"{name}.pt") for name in ("once", "later"))
    assert (one.settings, one.names) == (other.settings, other.names)
    np.testing.assert_array_equal(one.neighbors[0], other.neighbors[0])


@pytest.mark.parametrize("suffix", ["npz", "pt", "parquet"])
def test_the_code_in_the_docs_loads_each_format(vectors, tmp_path, monkeypatch, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    embed.main(arguments_of(embed, "--embeddings", vectors, "--output", f"vectors.{suffix}"))
    (code,) = re.findall(rf"```python\n([^`]*vectors\.{suffix}[^`]*)```", (ROOT / "docs/embeddings.md").read_text())
    found = {}
    exec(code, found)
    names = found["table"]["name"].to_pylist() if suffix == "parquet" else list(found["names"])
    assert names == np.load(vectors)["names"].tolist()
    if suffix != "parquet":
        np.testing.assert_array_equal(found["features"], np.load(vectors)["features"])


# ---- neighbors ----


def slow_neighbors(features, k):
    """[[(similarity, index), ...]] of the nearest other rows, best first, in float64."""
    rows = [np.asarray(row, dtype=np.float64) for row in features]
    rows = [row / np.sqrt((row * row).sum()) for row in rows]
    found = [[(float((a * b).sum()), j) for j, b in enumerate(rows) if j != i] for i, a in enumerate(rows)]
    return [sorted(others, reverse=True)[:k] for others in found]


def test_neighbors_match_a_float64_loop_and_leave_out_the_image_itself(vectors):
    found = np.load(vectors)
    wanted = slow_neighbors(found["features"], 3)
    assert found["neighbors"].tolist() == [[j for _, j in row] for row in wanted]
    np.testing.assert_allclose(found["similarities"], [[value for value, _ in row] for row in wanted], atol=1e-5)
    assert found["neighbors"].dtype == np.int64


def test_neighbors_in_chunks_of_bounded_memory_are_the_same(monkeypatch):
    features = np.random.RandomState(0).standard_normal((101, 6)).astype(np.float32)
    found = dino_vectors.Embeddings([str(i) for i in range(101)], (6,), dino_vectors.rows_of_array(features), {})
    monkeypatch.setattr(dino_vectors, "NUMBERS_AT_ONCE", 60)  # ten rows
    monkeypatch.setattr(dino_features, "NUMBERS_AT_ONCE", 4 * 130)  # for 13 queries on a CPU
    with sizes_of_results() as sizes:
        indices, similarities = embed.neighbors_of_all(found, 12, torch.device("cpu"))
    assert max(set(sizes) - {101 * 12}) <= 13 * (12 + 10)  # but for the result: best so far, and a block
    wanted = slow_neighbors(features, 12)
    assert indices.tolist() == [[j for _, j in row] for row in wanted]
    np.testing.assert_allclose(similarities, [[value for value, _ in row] for row in wanted], atol=1e-6)


def test_there_are_no_more_neighbors_than_other_images(run, photos, tmp_path):
    found = run("--data_path", photos / "coffee", "--output", tmp_path / "v.npz", "--neighbors", 50)
    assert [sorted(row) for row in found.neighbors[0].tolist()] == [[j for j in range(5) if j != i] for i in range(5)]


# ---- unreadable images ----


def test_unreadable_images_get_no_row_and_are_listed(run, vectors, spoiled, tmp_path, capsys):
    folder, bad = spoiled
    found = run("--data_path", folder, "--output", tmp_path / "v.npz", "--batch_size_per_gpu", 1)
    kept = [i for i in range(20) if i not in (2, 19)]
    assert found.names == [paths_of(folder)[i] for i in kept]
    np.testing.assert_allclose(array_of(found), np.load(vectors)["features"][kept], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.labels, np.load(vectors)["labels"][kept])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert line.startswith(f"warning: 2 of 20 images can't be read and have no vector: {bad[0]}, {bad[1]}. See ")
    listed = (tmp_path / "v.npz.unreadable.txt").read_text().splitlines()
    assert listed == [f"{path}\tit is not an image of a known format" for path in bad]
    run("--data_path", folder / "brick", "--output", tmp_path / "v.npz")
    assert not (tmp_path / "v.npz.unreadable.txt").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_images_end_the_run_without_output(refusal, weights, spoiled, tmp_path, workers):
    folder, bad = spoiled
    flags = ["--pretrained_weights", weights, "--data_path", folder, "--output", tmp_path / "o/v.npz"]
    line = refusal(embed, *NETWORK, *flags, "--strict_images", "true", "--num_workers", workers)
    assert line == f"error: can't read the image {bad[0]}: it is not an image of a known format. Repair or remove it"
    assert not (tmp_path / "o").exists()  # made by the run, and empty


def test_no_readable_image_is_an_error_without_output(refusal, weights, spoiled, tmp_path):
    _, bad = spoiled
    (tmp_path / "list.txt").write_text("\n".join(bad))
    flags = ["--pretrained_weights", weights, "--data_path", tmp_path / "list.txt", "--output", tmp_path / "o/v.npz"]
    line = refusal(embed, *NETWORK, *flags)
    assert "none of the 2 images can be read" in line
    assert not (tmp_path / "o").exists()  # made by the run, and empty


# ---- queries ----


def test_a_query_prints_the_nearest_names_and_draws_them(weights, vectors, photos, tmp_path, capsys):
    queries = [paths_of(photos)[i] for i in (7, 0)]
    sheet = tmp_path / "sheet.png"
    flags = ["--embeddings", vectors, "--query", *queries, "--neighbors", 4, "--contact_sheet", sheet]
    embed.main(arguments_of(embed, *flags, "--device", "cpu"))  # the file says the network
    file = np.load(vectors)
    wanted = slow_neighbors(file["features"], 3)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("loaded", "contact sheet"))]
    for i, block in zip((7, 0), (lines[:5], lines[5:]), strict=True):
        near = [(1.0, i), *wanted[i]]
        names = [file["names"][j] for _, j in near]
        assert block[0] == f"{file['names'][i]}:"
        assert [line.split()[1] for line in block[1:]] == names
        assert [float(line.split()[0]) for line in block[1:]] == pytest.approx([s for s, _ in near], abs=1e-4)
    drawn = np.asarray(Image.open(sheet))
    assert drawn.shape == (8 + 2 * (128 + 30 + 8), 8 + 5 * (128 + 8), 3)
    for row, i in enumerate((7, 0)):
        for column, j in enumerate([i, i, *(j for _, j in wanted[i])]):
            top, left = 8 + 166 * row, 8 + 136 * column
            image = ImageOps.pad(dino_images.load_image(file["names"][j]), (128, 128), color="white")
            np.testing.assert_array_equal(drawn[top : top + 128, left : left + 128], np.asarray(image))
            assert (drawn[top + 128 : top + 158, left : left + 128] < 100).any()  # text


def test_images_are_embedded_and_queried_in_one_run(run, photos, tmp_path, capsys):
    query = paths_of(photos)[3]
    run("--data_path", photos, "--output", tmp_path / "v.npz", "--query", query)
    lines = capsys.readouterr().out.splitlines()
    found = [line.split() for line in lines[lines.index(f"{query}:") + 1 :][:10]]
    assert found[0] == ["1.0000", query]
    assert Image.open(tmp_path / "v-neighbors.png").size == (8 + 11 * 136, 8 + 166)


def test_neighbors_in_shards_are_drawn_and_lost_ones_are_gray(weights, photos, tmp_path, capsys, monkeypatch):
    paths = paths_of(photos)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, path in enumerate(paths):
            tar.add(os.path.realpath(path), f"{i:02}.png")
    monkeypatch.chdir(tmp_path)
    flags = [*NETWORK, "--pretrained_weights", weights, "--data_path", "a.tar", "--output", "v.npz"]
    query = ["--query", paths[4], "--neighbors", 1]
    embed.main(arguments_of(embed, *flags, *query))
    assert "  1.0000  a.tar/04.png" in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for lost in (False, True):
        if lost:
            os.unlink(tmp_path / "a.tar")
        embed.main(arguments_of(embed, "--device", "cpu", "--embeddings", "../v.npz", *query))
        drawn = np.asarray(Image.open(tmp_path / "v-neighbors.png"))
        tile = np.asarray(ImageOps.pad(dino_images.load_image(paths[4]), (128, 128)))
        np.testing.assert_array_equal(drawn[8:136, 144:272], np.full_like(tile, 211) if lost else tile)
        assert ("neighbors are not on this machine" in capsys.readouterr().out) == lost


def test_a_query_with_other_weights_or_tokens_is_warned_about(vectors, photos, tmp_path, capsys):
    other = wide_nano(tmp_path / "other.pth", 32)
    state = torch.load(other, weights_only=True)
    torch.save({**state, "norm.bias": -state["norm.bias"]}, other)
    flags = ["--embeddings", vectors, "--query", paths_of(photos)[0], "--contact_sheet", tmp_path / "s.png"]
    flags += ["--device", "cpu"]
    for more, words in (
        ([], None),
        (["--pretrained_weights", other], "other weights than"),
        (["--tokens", "patch_mean"], "other tokens than"),
    ):
        embed.main(arguments_of(embed, *flags, *more))
        said = capsys.readouterr().out
        assert words in said if words else "warning" not in said


def test_queries_that_are_very_long_or_of_one_pixel_are_drawn(vectors, tmp_path):
    for name, size in (("long.png", (4000, 2)), ("dot.png", (1, 1))):
        Image.new("RGB", size, (200, 0, 0)).save(tmp_path / name)
    queries = ["--query", tmp_path / "long.png", tmp_path / "dot.png", "--contact_sheet", tmp_path / "s.png"]
    embed.main(arguments_of(embed, "--device", "cpu", "--embeddings", vectors, *queries))
    drawn = np.asarray(Image.open(tmp_path / "s.png"))
    red = (drawn[:, 8:136] == (200, 0, 0)).all(axis=2)
    assert red[8 + 64, 64]
    assert (red[:166].sum(), red[166:].sum()) == (128 * 64, 128 * 128)  # the middle: 4 x 2


def test_a_query_on_another_machine_needs_neither_the_precision_nor_the_folder_of_the_file(
    vectors, photos, tmp_path, monkeypatch
):
    settings = {**dino_vectors.read(vectors).settings, "amp_dtype": "tf32", "folder": "/none", "data_path": "/none"}
    dino_vectors.write(tmp_path / "v.npz", dino_vectors.read(vectors)._replace(settings=settings))
    flags = ["--embeddings", tmp_path / "v.npz", "--query", paths_of(photos)[0], "--device", "cpu"]
    embed.main(arguments_of(embed, *flags))
    assert (tmp_path / "v-neighbors.png").exists()


def test_images_of_other_channels_are_embedded_and_drawn(tmp_path, capsys):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.random.RandomState(i).rand(40, 40, 2).astype(np.float32))
    how = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 32, "in_chans": 2, "mean": [0.5] * 2}
    state = dino_backbones.build_backbone("vit_nano", 8, 32, in_chans=2)[0].state_dict()
    torch.save({"teacher": state, "args": {**how, "std": [0.3] * 2}}, tmp_path / "checkpoint.pth")
    flags = ["--pretrained_weights", tmp_path, "--data_path", tmp_path, "--output", tmp_path / "v.npz"]
    flags += ["--query", tmp_path / "1.npy", "--device", "cpu", "--num_workers", 0]
    embed.main(arguments_of(embed, *flags))
    assert f"  1.0000  {tmp_path}/1.npy" in capsys.readouterr().out
    drawn = np.asarray(Image.open(tmp_path / "v-neighbors.png"))
    np.testing.assert_array_equal(drawn[8:136, 8:136], drawn[8:136, 144:272])  # the query finds itself
    np.testing.assert_array_equal(drawn[8:136, 8:136, 0], drawn[8:136, 8:136, 2])  # gray: the first channel


def test_names_below_a_picture_fit_its_width():
    font = ImageFont.load_default()
    assert dino_features.shorten("photos/cat.jpg", font) == "cat.jpg"
    short = dino_features.shorten("a/first" + 80 * "x" + "last.jpg", font)
    assert font.getlength(short) <= 128
    assert short.startswith("first")
    assert short.endswith("last.jpg")
    assert dino_features.shorten("日本.png", font) == "??.png"


# ---- several processes, and processes that end early ----


def test_two_processes_write_the_file_of_one(weights, spoiled, tmp_path):
    folder, _ = spoiled
    flags = ["--pretrained_weights", weights, "--data_path", folder, "--batch_size_per_gpu", 3, "--neighbors", 2]
    for processes in (1, 2):
        output = tmp_path / f"of{processes}" / "v.npz"
        said = run_script("embed.py", *NETWORK, *flags, "--output", output, processes=processes).stdout
        assert f"[0/{7 // processes}]" in said  # of seven batches, the first process has its share
        assert sorted(os.listdir(output.parent)) == ["v.npz", "v.npz.unreadable.txt"]
    assert (tmp_path / "of1/v.npz").read_bytes() == (tmp_path / "of2/v.npz").read_bytes()


def test_more_processes_than_batches_write_the_file_of_one(weights, photos, vectors, tmp_path):
    flags = ["--pretrained_weights", weights, "--data_path", photos, "--neighbors", 3, "--output", tmp_path / "v.npz"]
    run_script("embed.py", *NETWORK, *flags, processes=2)  # one batch of 128: the first process has no image
    with np.load(tmp_path / "v.npz") as found:
        np.testing.assert_array_equal(found["features"], np.load(vectors)["features"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_killed_half_way_leaves_no_output(weights, sample_root, photos, tmp_path, number):
    output = tmp_path / "v.npz"
    output.write_bytes(b"of an earlier run")
    how = [*NETWORK, "--pretrained_weights", weights, "--tokens", "patches", "--batch_size_per_gpu", 1]
    words = ["embed.py", *how, "--data_path", sample_root / "train", "--output", output]
    start_forks()
    screen = tmp_path.parent / f"{tmp_path.name}-screen"
    how_to_run = (list(map(str, words)), dict(os.environ), [os.devnull, screen], None)
    process = FORKS.Process(target=become, args=how_to_run)
    process.start()
    part, until = tmp_path / "v.npz.rank0.tmp", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 10 * 16 * 128 * 4):  # ten images
        assert process.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    code = -signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM
    assert process.exitcode == code, screen.read_text()
    assert output.read_bytes() == b"of an earlier run"
    assert part.exists() == (number == signal.SIGKILL)
    args = arguments_of(embed, *how, "--data_path", photos, "--output", output)
    embed.main(args)
    assert os.listdir(tmp_path) == ["v.npz"]
    assert len(dino_vectors.read(output).names) == 20


@pytest.mark.parametrize(("suffix", "limit"), [("npz", 8000), ("npz", 10300), ("pt", 10300), ("parquet", 10300)])
def test_a_full_disk_is_one_line_and_leaves_nothing(weights, photos, tmp_path, suffix, limit):
    """Of the 10,240 bytes of vectors, or of the file that is made from them."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    code = f"""
import resource, signal, sys, runpy
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
runpy.run_path("embed.py", run_name="__main__")
"""
    flags = [*NETWORK, "--pretrained_weights", weights, "--data_path", photos, "--output", tmp_path / f"o/v.{suffix}"]
    done = run_script("-c", code, *flags, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: can't write ")
    assert "File too large. Free space" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()  # made by the run, and empty


# ---- mistakes ----


@pytest.fixture
def no_network(monkeypatch):
    """Loading a network fails: mistakes are found before."""

    def refuse(*_):
        raise AssertionError("a network is loaded")

    monkeypatch.setattr(embed, "load_network", refuse)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "where should the vectors go? Set --output vectors.npz, or read others with --embeddings"),
        (["--output", "OUT/v.csv"], "--output OUT/v.csv must end in .npz, .pt, .parquet"),
        (["--output", "OUT/folder.npz"], "the folder of --output OUT has a folder named folder.npz"),
        (["--output", "OUT/file/v.npz"], "can't write to the folder of --output OUT/file: a file is in its way"),
        (["--output", "OUT/v.npz", "--contact_sheet", "OUT/s.png"], "OUT/s.png shows neighbors of --query"),
        (["--output", "OUT/v.npz", "--query", "OUT/none.jpg"], "OUT/none.jpg is not a file"),
        (["--output", "OUT/v.npz", "--query", "OUT/file", "--contact_sheet", "x.gif"], "x.gif must end in .png"),
        (["--output", "OUT/v.npz", "--tokens", "patches", "--neighbors", 3], "patches has no single vector per image"),
        (["--output", "OUT/v.parquet", "--tokens", "patches"], "a table has one vector per image"),
        (["--output", "OUT/v.npz", "--tokens", "both", "--arch", "resnet18"], "resnet18 has pooled features only"),
        (["--output", "OUT/v.npz", "--image_size", 36], "--image_size 36 is not a multiple of --patch_size 8"),
        (["--output", "OUT/v.npz", "--data_path", "OUT/nothing"], "--data_path OUT/nothing does not exist"),
        (["--embeddings", "VECTORS"], "VECTORS: nothing to do. Add --query IMAGE, or --output FILE"),
        (["--embeddings", "VECTORS", "--output", "OUT/v.npz", "--normalize", 1], "--embeddings embeds no images again"),
        (["--embeddings", "OUT/no.npz", "--query", "OUT/file"], "--embeddings OUT/no.npz does not exist. Name a file"),
        (["--embeddings", "OUT/bad.npz", "--query", "OUT/file"], "OUT/bad.npz can't be read: is it a whole file"),
        (["--embeddings", "OUT/bad.pt", "--query", "OUT/file"], "OUT/bad.pt can't be read as a checkpoint"),
        (["--embeddings", "OUT/other.npz", "--query", "OUT/file"], "OUT/other.npz can't be read: is it a whole file"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_the_network_is_loaded(
    refusal, no_network, weights, vectors, photos, tmp_path, flags, line
):
    (tmp_path / "folder.npz").mkdir()
    for name in ("file", "bad.npz", "bad.pt"):
        (tmp_path / name).write_bytes(b"x")
    np.savez(tmp_path / "other.npz", features=np.zeros((2, 3)), names=["a", "b"], settings="{}")
    names = {"OUT": str(tmp_path), "VECTORS": str(vectors), "PHOTOS": str(photos)}
    for name, value in names.items():
        flags, line = [str(flag).replace(name, value) for flag in flags], line.replace(name, value)
    known = [] if "--embeddings" in flags else ["--pretrained_weights", weights]
    assert line in refusal(embed, *NETWORK, *known, *flags)


def test_tables_without_pyarrow_say_how_to_install_it(refusal, no_network, weights, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(dino_vectors.importlib.util, "find_spec", lambda name: None)
    flags = ["--pretrained_weights", weights, "--data_path", photos, "--output", tmp_path / "v.parquet"]
    line = refusal(embed, *NETWORK, *flags)
    assert line.endswith("v.parquet needs a library that is not installed: pip install pyarrow")


def test_a_query_of_another_width_is_one_line(refusal, vectors, photos, tmp_path):
    flags = ["--embeddings", vectors, "--query", paths_of(photos)[0], "--contact_sheet", tmp_path / "s.png"]
    line = refusal(embed, *flags, "--tokens", "both", "--device", "cpu")
    assert f"vectors of this network have 256 numbers, in --embeddings {vectors} they have 128" in line


def test_a_query_whose_network_is_gone_is_one_line(refusal, no_network, photos, weights, tmp_path):
    shutil.copy(weights, tmp_path / "gone.pth")
    found = dino_vectors.Embeddings(["a"], (3,), dino_vectors.rows_of_array(np.ones((1, 3), np.float32)), {})
    settings = {"pretrained_weights": str(tmp_path / "missing.pth")}
    dino_vectors.write(tmp_path / "v.npz", found._replace(settings=settings))
    line = refusal(embed, "--embeddings", tmp_path / "v.npz", "--query", paths_of(photos)[0])
    assert line.endswith("missing.pth, which is not there. Name it with --pretrained_weights")


def test_weights_that_are_not_finite_end_the_run_without_output(refusal, weights, photos, tmp_path):
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "norm.bias": state["norm.bias"] * float("nan")}, tmp_path / "nan.pth")
    flags = ["--pretrained_weights", tmp_path / "nan.pth", "--data_path", photos, "--output", tmp_path / "o/v.npz"]
    with contextlib.suppress(FileNotFoundError):
        os.unlink(tmp_path / "o")
    assert "contain NaN or infinite numbers" in refusal(embed, *NETWORK, *flags)
    assert not (tmp_path / "o").exists()  # made by the run, and empty
