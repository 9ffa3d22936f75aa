"""Image retrieval: average precision against goldens and loops, the ground truth file, and the script end to end."""

import json
import os
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import area_under_curve, arguments_of, run_script, shared, wide_nano
from PIL import Image, ImageEnhance, ImageOps
from torchvision import transforms

import dino_features
import dino_images
import dino_sample
import eval_image_retrieval as retrieval
import vision_transformer as vits

SMALL = ["--arch", "vit_nano", "--patch_size", "8", "--device", "cpu", "--num_workers", "0", "--imsize", "64"]


# ---- a small data set ----


@pytest.fixture(scope="module")
def photographs():
    chosen = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left")
    files = {os.path.basename(path).split(".")[0]: path for path in dino_sample.find_photographs()}
    return [dino_images.load_image(files[name]) for name in chosen]


def variants(image):
    """Three views of a photograph, with different shape and brightness."""
    width, height = image.size
    return [
        image.crop((width // 8, 0, width, height)),
        ImageEnhance.Brightness(ImageOps.mirror(image)).enhance(0.7),
        image.crop((0, height // 4, width, height)),
    ]


@pytest.fixture
def data(tmp_path, photographs):
    """Each photograph is a query. One of its views is easy, one hard, one junk."""
    name, folder = "roxford5k", tmp_path / "data" / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    cfg = {"imlist": [], "qimlist": [], "gnd": []}
    for number, photograph in enumerate(photographs):
        for view, image in enumerate(variants(photograph)):
            cfg["imlist"].append(f"view_{number}_{view}")
            image.resize((image.width // 4, image.height // 4)).save(folder / "jpg" / f"view_{number}_{view}.jpg")
        cfg["qimlist"].append(f"query_{number}")
        photograph.resize((photograph.width // 4, photograph.height // 4)).save(folder / "jpg" / f"query_{number}.jpg")
        easy, hard, junk = 3 * number, 3 * number + 1, 3 * number + 2
        cfg["gnd"].append({"bbx": [0.0, 1.0, 20.5, 30.0], "easy": [easy], "hard": np.array([hard]), "junk": [junk]})
    cfg["gnd"][4]["hard"] = []  # a query without a hard positive
    with open(folder / f"gnd_{name}.pkl", "wb") as file:
        pickle.dump(cfg, file, protocol=2)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return wide_nano(tmp_path_factory.mktemp("weights") / "nano.pth", 64)


@pytest.fixture
def error_line(refusal):
    """error_line(*flags) -> the error line of a run that exits with code 2."""
    return partial(refusal, retrieval, *SMALL)


def test_flags_have_the_published_names_and_defaults():
    args = vars(arguments_of(retrieval))
    published = {"dataset": "roxford5k", "multiscale": False, "imsize": 224, "pretrained_weights": "", "use_cuda": True}
    published |= {"arch": "vit_small", "patch_size": 16, "checkpoint_key": "teacher"}
    assert published.items() <= args.items()
    assert {"data_path", "dist_url", "local_rank", "device", "num_workers"} <= args.keys()


# ---- mean average precision ----


def slow_map(ranks, gnd, kappas):
    aps, precisions = [], []
    for i, query in enumerate(gnd):
        if not query["ok"]:
            continue
        kept = [image for image in ranks[:, i] if image not in query["junk"]]
        found = [rank for rank, image in enumerate(kept) if image in query["ok"]]
        aps.append(area_under_curve(query["ok"], kept))
        row = []
        for k in kappas:
            depth = min(k, found[-1] + 1)
            row.append(sum(image in query["ok"] for image in kept[:depth]) / depth)
        precisions.append(row)
    return np.mean(aps), np.mean(precisions, axis=0)


def test_map_and_precisions_match_the_golden_values():
    golden = json.loads(shared("goldens/retrieval.json").read_text())
    ranks = np.argsort(-np.array(golden["similarity"]), axis=0)
    mean_ap, aps, precisions, _ = dino_features.compute_map(ranks, golden["gnd"], golden["kappas"])
    assert mean_ap == pytest.approx(golden["map"], abs=1e-12)
    assert precisions == pytest.approx(golden["pr"], abs=1e-12)
    for ours, theirs in zip(aps, golden["aps"], strict=True):
        assert np.isnan(ours) if theirs is None else ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_map_and_precisions_match_a_loop_over_random_rankings(seed):
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(40) for _ in range(12)], axis=1)
    gnd = []
    for _ in range(12):
        chosen = rng.permutation(40)[: rng.integers(0, 15)].tolist()
        border = rng.integers(0, len(chosen) + 1)
        gnd.append({"ok": chosen[:border], "junk": chosen[border:]})
    mean_ap, aps, precisions, _ = dino_features.compute_map(ranks, gnd, [1, 5, 10])
    want_ap, want_precisions = slow_map(ranks, gnd, [1, 5, 10])
    assert mean_ap == pytest.approx(want_ap, abs=1e-12)
    assert precisions == pytest.approx(want_precisions, abs=1e-12)
    assert [bool(np.isnan(ap)) for ap in aps] == [not query["ok"] for query in gnd]


def test_average_precision_of_simple_rankings():
    assert dino_features.compute_ap([0, 1, 2], 3) == 1
    assert dino_features.compute_ap([0, 1], 4) == pytest.approx(0.5)  # half of the positives, ranked first
    assert dino_features.compute_ap([1], 1) == pytest.approx((0 + 1 / 2) / 2)
    assert dino_features.compute_ap([], 3) == 0


def test_junk_images_are_ignored():
    ranks = np.array([[3], [0], [1], [2]])
    assert dino_features.compute_map(ranks, [{"ok": [0], "junk": [3]}], [1])[0] == 1
    assert dino_features.compute_map(ranks, [{"ok": [0]}], [1])[0] == pytest.approx(0.25)


def test_a_protocol_ignores_the_positives_of_the_others():
    gnd = [{"easy": [1], "hard": [2, 3], "junk": [4]}]
    found = {name: retrieval.protocol_truth(gnd, name)[0] for name in retrieval.PROTOCOLS}
    sets = {name: (set(truth["ok"]), set(truth["junk"])) for name, truth in found.items()}
    assert sets == {"Medium": ({1, 2, 3}, {4}), "Hard": ({2, 3}, {1, 4}), "Easy": ({1}, {2, 3, 4})}


# ---- ground truth ----


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_ground_truth_of_any_pickle_protocol_is_read(tmp_path, protocol):
    gnd = {"easy": np.array([0]), "hard": [np.int64(1)], "junk": np.array([], dtype=np.int32), "bbx": np.ones(4) * 2.5}
    with open(tmp_path / "gnd.pkl", "wb") as file:
        pickle.dump({"imlist": ["a", "b"], "qimlist": np.array(["q"]), "gnd": (gnd,)}, file, protocol=protocol)
    read = retrieval.load_ground_truth(tmp_path / "gnd.pkl")
    assert read == {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [{"easy": [0], "hard": [1], "junk": []}]}


def test_ground_truth_pickled_by_numpy_1_is_read(tmp_path):
    gnd = {"easy": np.array([0]), "hard": [np.int64(1)], "junk": []}
    now = pickle.dumps({"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [gnd]}, protocol=2)
    old = now.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")  # module names are text in this protocol
    assert b"cnumpy.core.multiarray" in old
    (tmp_path / "gnd.pkl").write_bytes(old)
    assert retrieval.load_ground_truth(tmp_path / "gnd.pkl")["gnd"] == [{"easy": [0], "hard": [1], "junk": []}]


def test_an_invalid_ground_truth_is_one_line(error_line, data):
    path = data / "roxford5k" / "gnd_roxford5k.pkl"
    whole = path.read_bytes()
    for share in (0, 0.3, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        assert "gnd_roxford5k.pkl was not loaded" in error_line("--data_path", data)
    cfg = pickle.loads(whole)
    nothing = {"easy": [], "hard": [], "junk": []}
    infinite = {**cfg, "gnd": [{**query, "easy": [np.inf]} for query in cfg["gnd"]]}
    empty = {"imlist": [], "qimlist": cfg["qimlist"], "gnd": [nothing] * 5}
    no_positives = {**cfg, "gnd": [{**nothing, "junk": [1]}] * 5}
    shortened = ({**cfg, "gnd": cfg["gnd"][:2]}, {**cfg, "imlist": cfg["imlist"][:3]})
    outside = [{**cfg, "gnd": [*cfg["gnd"][:4], {**nothing, "junk": [number]}]} for number in (-1, 15)]
    for wrong in ([1, 2], {"imlist": ["a"]}, *shortened, *outside, infinite, empty, no_positives):
        path.write_bytes(pickle.dumps(wrong))
        line = error_line("--data_path", data)
        assert "must hold imlist, qimlist and gnd (easy, hard, junk): " in line
    path.unlink()
    assert "No such file" in error_line("--data_path", data)


def test_an_image_listed_twice_gives_a_warning(tmp_path, capsys):
    gnd = [{"easy": [0], "hard": [], "junk": [1]}, {"easy": [0, 0], "hard": [], "junk": []}]
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps({"imlist": ["a", "b"], "qimlist": ["p", "q"], "gnd": gnd}))
    retrieval.load_ground_truth(tmp_path / "gnd.pkl")
    assert "lists an image twice for queries 1\n" in capsys.readouterr().out


def test_missing_damaged_and_too_small_images_are_named(error_line, data):
    flags = ("--data_path", data, "--pretrained_weights", "random", "--multiscale", "true")
    query = data / "roxford5k" / "jpg" / "query_1.jpg"
    Image.new("RGB", (64, 15)).save(query)  # multiscale halves the size, and one patch has 8 pixels
    assert f"{query} has 64 × 15 pixels, at least 16 are needed" in error_line(*flags)
    image = data / "roxford5k" / "jpg" / "view_2_1.jpg"
    image.write_bytes(image.read_bytes()[:900])
    assert str(image) in error_line(*flags)
    image.unlink()
    line = error_line(*flags)
    assert "1 of the 15 database images are missing" in line
    assert str(image) in line


def test_nan_features_are_an_error_and_not_a_result(error_line, data, weights):
    state = torch.load(weights, weights_only=True)
    state["norm.bias"][0] = np.nan
    torch.save(state, data / "nan.pth")
    flags = ("--data_path", data, "--pretrained_weights", data / "nan.pth")
    assert "NaN or infinite numbers" in error_line(*flags)


# ---- images ----


def test_images_are_scaled_down_to_imsize_and_never_up(data):
    split = retrieval.OxfordParisDataset(data, "roxford5k", "query", None, 50)
    for index in range(len(split)):
        image, number = split[index]
        assert number == index
        assert max(image.shape[1:]) == 50
        assert image.dtype == torch.uint8
    whole = retrieval.OxfordParisDataset(data, "roxford5k", "query", None, 5000)[0][0]
    original = dino_images.load_image(data / "roxford5k" / "jpg" / "query_0.jpg")
    assert torch.equal(whole, transforms.PILToTensor()(original))


# ---- end to end ----


def results(output):
    return {
        name: tuple(map(float, numbers))
        for name, *numbers in re.findall(
            r"^>> roxford5k (\w+): mAP ([\d.]+), mP@1 ([\d.]+), mP@5 ([\d.]+), mP@10 ([\d.]+)$", output, re.M
        )
    }


def slow_results(data, weights, multiscale):
    """The whole evaluation, image by image in float64."""
    model = vits.vit_nano(patch_size=8, img_size=[64]).double().eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    mean, std = (torch.tensor(v).double()[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    @torch.no_grad()
    def feature(name):
        image = Image.open(data / "roxford5k" / "jpg" / f"{name}.jpg").convert("RGB")
        image.thumbnail((64, 64), Image.Resampling.LANCZOS)
        pixels = ((torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255 - mean) / std)[None]
        total = 0
        for scale in (1, 2**-0.5, 0.5) if multiscale else (1,):
            scaled = pixels if scale == 1 else F.interpolate(pixels, scale_factor=scale, mode="bilinear")
            total = total + model(scaled)[0]
        return total / total.norm()

    with open(data / "roxford5k" / "gnd_roxford5k.pkl", "rb") as file:
        cfg = pickle.load(file)
    database, queries = ([feature(name) for name in cfg[key]] for key in ("imlist", "qimlist"))
    ranks = np.array([[float(d @ q) for q in queries] for d in database]).argsort(axis=0)[::-1]
    truths = {
        "Medium": [{"ok": [*g["easy"], *g["hard"]], "junk": [*g["junk"]]} for g in cfg["gnd"]],
        "Hard": [{"ok": [*g["hard"]], "junk": [*g["junk"], *g["easy"]]} for g in cfg["gnd"]],
        "Easy": [{"ok": [*g["easy"]], "junk": [*g["junk"], *g["hard"]]} for g in cfg["gnd"]],
    }
    found = {name: slow_map(ranks, gnd, [1, 5, 10]) for name, gnd in truths.items()}
    return {name: (100 * mean_ap, *(100 * precisions)) for name, (mean_ap, precisions) in found.items()}


@pytest.mark.parametrize("multiscale", [False, True])
def test_printed_results_match_a_float64_evaluation(data, weights, multiscale):
    flags = (*SMALL, "--data_path", data, "--pretrained_weights", weights, "--multiscale", multiscale)
    printed = results(run_script("eval_image_retrieval.py", *flags).stdout)
    want = slow_results(data, weights, multiscale)
    assert printed.keys() == want.keys() == {"Medium", "Hard", "Easy"}
    for name, numbers in printed.items():
        assert numbers == pytest.approx(want[name], abs=0.006)
    assert len({numbers[0] for numbers in printed.values()}) > 1


@pytest.mark.parametrize("flags", [("--num_workers", 2), ("--use_cuda", "false")])
def test_loading_and_storage_do_not_change_the_results(capsys, data, weights, flags):
    def run(*more):
        words = (*SMALL, "--data_path", data, "--pretrained_weights", weights, *more)
        retrieval.main(arguments_of(retrieval, *words))
        return results(capsys.readouterr().out)

    assert run() == run(*flags) != {}


def test_a_vit_with_a_convolutional_stem_takes_images_of_any_shape(capsys, data):
    flags = ("--arch", "vit_nano_conv", "--data_path", data, "--pretrained_weights", "random", "--multiscale", "true")
    retrieval.main(arguments_of(retrieval, *SMALL, *flags))
    assert results(capsys.readouterr().out).keys() == {"Medium", "Hard", "Easy"}


@pytest.mark.slow
def test_two_processes_print_what_one_prints(data, weights):
    flags = ("eval_image_retrieval.py", *SMALL, "--data_path", data, "--pretrained_weights", weights)
    alone = run_script(*flags).stdout
    together = run_script(*flags, "--num_workers", 1, processes=2).stdout
    assert results(alone) == results(together) != {}


@pytest.mark.usefixtures("offline")
def test_the_default_weights_are_the_ones_trained_on_landmarks(error_line, data):
    line = error_line("--data_path", data, "--arch", "vit_small", "--patch_size", "16")
    assert "dino_vitsmall16_googlelandmark_pretrain.pth" in line


def test_a_protocol_without_positives_has_no_result(capsys):
    retrieval.print_results(np.array([[0], [1]]), [{"easy": [0], "hard": [], "junk": []}], "roxford5k")
    out = capsys.readouterr().out
    assert ">> roxford5k Hard: no query has a positive" in out
    assert ">> roxford5k Easy: mAP 100.00" in out
