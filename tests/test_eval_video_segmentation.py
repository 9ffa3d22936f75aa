"""Video object segmentation: each step and score against goldens and float64 loops, and the script end to end."""

import json
import math
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import arguments_of, assert_near, fill, run_script, shared, sizes_of_results, tensor
from PIL import Image

import dino_images
import dino_sample
import eval_video_segmentation as evs
import vision_transformer as vits
from utils import UserError

# ---- a small DAVIS: part of a photograph moves over another photograph ----

HEIGHT, WIDTH = 60, 80
SMALL = ["--arch", "vit_nano", "--patch_size", "32", "--pretrained_weights", "random", "--device", "cpu"]


@pytest.fixture(scope="module")
def photographs():
    """Two photographs [HEIGHT, WIDTH, 3]."""
    files = [file for file in dino_sample.find_photographs() if file.endswith(("coffee.png", "chelsea.png"))]
    return [np.array(dino_images.load_image(file).resize((WIDTH, HEIGHT))) for file in files]


def write_video(root, name, photographs, length=5, annotated=None):
    """A video with two objects. The first `annotated` frames have annotations (default: all)."""
    frames, annotations = root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name
    frames.mkdir(parents=True)
    annotations.mkdir(parents=True)
    back, front = photographs
    for t in range(length):
        labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        labels[8:32, 6 + 4 * t : 34 + 4 * t] = 1
        labels[38:56, 44 : 68 - 2 * t] = 2
        pixels = back.copy()
        pixels[8:32, 6 + 4 * t : 34 + 4 * t] = front[8:32, 6:34]
        pixels[labels == 2] = 255 - front[labels == 2]
        Image.fromarray(pixels).save(frames / f"{t:05}.jpg", quality=95)
        if annotated is None or t < annotated:
            evs.imwrite_indexed(annotations / f"{t:05}.png", labels)
    listing = root / "ImageSets" / "2017" / "val.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    with open(listing, "a") as file:
        file.write(f"{name}\n")


@pytest.fixture
def davis(tmp_path, photographs):
    write_video(tmp_path / "DAVIS", "cup", photographs)
    return tmp_path / "DAVIS"


def paths(davis, name="cup"):
    return [str(path) for path in sorted((davis / "JPEGImages" / "480p" / name).iterdir())]


def annotation(davis, t=0, name="cup"):
    return davis / "Annotations" / "480p" / name / f"{t:05}.png"


def arguments(*flags):
    return arguments_of(evs, *SMALL, *flags)


def run(*flags):
    evs.main(arguments(*flags))


@pytest.fixture
def error_line(refusal, davis):
    """error_line(*flags) -> the error line of a run that exits with code 2 and leaves no masks."""

    def run(*flags):
        output_dir = davis.parent / "masks"
        line = refusal(evs, *SMALL, "--data_path", davis, "--output_dir", output_dir, *flags)
        assert not output_dir.is_dir() or not list(output_dir.iterdir())
        return line

    return run


def labels_in(folder):
    return [np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def small_model(patch_size=32):
    torch.manual_seed(3)
    return vits.vit_nano(patch_size).eval()


# ---- flags ----


def test_flags_have_the_published_names_and_defaults():
    published = {"output_dir": ".", "pretrained_weights": "", "arch": "vit_small", "patch_size": 16, "bs": 6}
    published |= {"checkpoint_key": "teacher", "n_last_frames": 7, "size_mask_neighborhood": 12, "topk": 5}
    assert vars(arguments_of(evs)) == {**published, "data_path": "DAVIS", "device": "auto"}


# ---- frames ----


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    names = ["0.jpg", "1.jpg", "2.jpg", "10.jpg", "11.jpg", "100.jpg"]
    for name in [*sorted(names), "3.png", "notes.txt", ".4.jpg"]:
        (tmp_path / name).touch()
    assert [Path(path).name for path in evs.read_frame_list(tmp_path)] == names


@pytest.mark.parametrize(
    ("original", "scaled"), [((854, 480), (832, 480)), ((480, 480), (480, 448)), ((1080, 1920), (480, 832))]
)
def test_the_short_side_becomes_480_and_the_long_one_a_multiple_of_64(original, scaled, tmp_path):
    Image.new("RGB", original[::-1]).save(tmp_path / "0.jpg")
    frame, height, width = evs.read_frame(str(tmp_path / "0.jpg"))
    assert frame.shape == (3, *scaled)
    assert (height, width) == original


def test_any_patch_size_is_supported(tmp_path):
    Image.new("RGB", (854, 480)).save(tmp_path / "0.jpg")
    Image.new("L", (854, 480)).save(tmp_path / "0.png")
    assert evs.read_frame(tmp_path / "0.jpg", multiple=14)[0].shape == (3, 34 * 14, 59 * 14)
    assert evs.read_seg(tmp_path / "0.png", 14)[0].shape == (1, 1, 34, 59)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_frames_are_resized_bilinearly_rounded_and_normalized(photographs, tmp_path, mode):
    Image.fromarray(photographs[0]).convert(mode).crop((0, 0, 73, 55)).save(tmp_path / "0.png")
    pixels = np.array(Image.open(tmp_path / "0.png").convert("RGB")).astype(float)
    frame, height, width = evs.read_frame(tmp_path / "0.png", [24, 30])
    h, w = frame.shape[1:]
    for y, x in ((0, 0), (3, 17), (11, 8), (23, 29), (20, 0)):
        row, column = (y + 0.5) * height / h - 0.5, (x + 0.5) * width / w - 0.5
        top, left = max(math.floor(row), 0), max(math.floor(column), 0)
        down, right = max(row - top, 0), max(column - left, 0)
        below, beside = min(top + 1, height - 1), min(left + 1, width - 1)
        level = (1 - down) * ((1 - right) * pixels[top, left] + right * pixels[top, beside])
        level += down * ((1 - right) * pixels[below, left] + right * pixels[below, beside])
        want = (np.round(level) / 255 - [0.485, 0.456, 0.406]) / [0.228, 0.224, 0.225]
        assert_near(frame[:, y, x], want, 1e-5, f"{y}, {x}")


# ---- labels ----


def test_patch_labels_are_sampled_at_the_patch_center_and_void_is_background(tmp_path):
    labels = np.random.default_rng(0).integers(0, 4, (60, 80)).astype(np.uint8)
    labels[20:30] = 255
    evs.imwrite_indexed(tmp_path / "0.png", labels)
    small, original = evs.read_seg(tmp_path / "0.png", 16)
    assert np.array_equal(original, labels)
    h, w = 480 // 16, 640 // 16
    assert small.shape == (1, 4, h, w)
    for y in range(h):
        for x in range(w):
            label = labels[int((y + 0.5) * 60 / h), int((x + 0.5) * 80 / w)]
            assert small[0, :, y, x].tolist() == [float(label % 255 == channel) for channel in range(4)]


def test_an_object_smaller_than_a_patch_keeps_its_channel(tmp_path):
    labels = np.zeros((480, 640), dtype=np.uint8)
    labels[0, 0] = 3
    Image.fromarray(labels).save(tmp_path / "0.png")
    assert evs.read_seg(tmp_path / "0.png", 16)[0].sum(dim=(2, 3)).tolist() == [[1200, 0, 0, 0]]


def test_one_hot_has_a_channel_per_label_or_the_given_number():
    labels = torch.tensor([[[0, 2], [1, 1]]])
    want = [[[[1, 0], [0, 0]], [[0, 0], [1, 1]], [[0, 1], [0, 0]]]]
    assert evs.to_one_hot(labels).tolist() == want
    assert evs.to_one_hot(labels.float(), 4).shape == (1, 4, 2, 2)


def test_the_palette_is_the_pascal_voc_palette():
    palette = evs.davis_palette().tolist()
    assert palette[:5] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert palette[8:10] == [[64, 0, 0], [192, 0, 0]]
    assert palette[16:18] == [[0, 64, 0], [128, 64, 0]]
    assert [palette[32], palette[64], palette[255]] == [[0, 0, 64], [32, 0, 0], [224, 224, 192]]


def test_masks_are_written_as_indexed_png_if_they_have_two_dimensions(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    evs.imwrite_indexed(tmp_path / "0.png", labels)
    with Image.open(tmp_path / "0.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), labels)
        assert np.array_equal(np.array(image.convert("RGB")), evs.davis_palette()[labels])
    with pytest.raises(UserError, match=r"labels must be \[H, W\], not \[8, 32, 1\]"):
        evs.imwrite_indexed(tmp_path / "1.png", labels[..., None])


# ---- features ----


def test_features_are_the_patch_tokens_after_the_final_norm():
    model, frame = small_model(16), torch.randn(3, 48, 80)
    features, h, w = evs.extract_feature(model, frame, return_h_w=True)
    assert (h, w) == (3, 5)
    seen = []
    model.norm.register_forward_hook(lambda *call: seen.append(call[2]))
    model(frame[None])
    assert_near(features, seen[0][0, 1:], 1e-6)
    assert torch.equal(evs.extract_feature(model, frame), features)


# ---- one propagation step ----


def slow_step(features, sources, labels, reach, topk):
    """Label propagation in float64: features [h, w, D], sources [n, h, w, D], labels [n, h, w, C] -> [h, w, C]."""
    features, sources = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (features, sources))
    labels = labels.double()
    n, h, w, classes = labels.shape
    out = torch.zeros(h, w, classes, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            found = []
            for i in range(n):
                for v in range(h):
                    for u in range(w):
                        if not reach or (abs(v - y) <= reach and abs(u - x) <= reach):
                            found.append((math.exp(float(features[y, x] @ sources[i, v, u]) / 0.1), i, v, u))
            best = sorted(found)[-topk:]
            total = sum(weight for weight, *_ in best)
            for weight, i, v, u in best:
                out[y, x] += weight / total * labels[i, v, u]
    return out


def step_input(h, w, n=2, d=6, classes=3):
    generator = torch.Generator().manual_seed(h * w)
    features, sources = (torch.randn(*shape, h, w, d, generator=generator) for shape in ((), (n,)))
    labels = torch.rand(n, h, w, classes, generator=generator)
    return F.normalize(features, dim=-1), F.normalize(sources, dim=-1), labels


# Frames smaller than one tile, of several tiles, and of incomplete tiles; windows larger than the frame; topk larger
# than the window.
STEPS = [(5, 7, 0, 5), (5, 7, 2, 1), (14, 9, 3, 4), (5, 7, 1, 30), (4, 4, 20, 5), (13, 14, 0, 3)]


@pytest.mark.parametrize(("h", "w", "reach", "topk"), STEPS)
def test_a_step_matches_a_float64_loop(h, w, reach, topk):
    features, sources, labels = step_input(h, w)
    got = evs.propagate(features, sources, labels, reach, topk)
    assert_near(got, slow_step(features, sources, labels, reach, topk), 1e-5)


@pytest.mark.parametrize("reach", [0, 2])
def test_a_step_matches_the_golden_values(reach):
    golden = np.load(shared("goldens/label_propagation.npz"))
    model = fill(vits.vit_tiny(16), "open/seg").eval()
    feats = [evs.extract_feature(model, tensor(f"seg_f{i}", (3, 96, 144))).T for i in (0, 1)]
    segs = [tensor(f"seg_s{i}", (1, 3, 6, 9), 3).softmax(dim=1) for i in (0, 1)]
    args = SimpleNamespace(topk=5, size_mask_neighborhood=reach, patch_size=16)
    target = tensor("seg_t", (3, 96, 144))
    seg, feat, mask = evs.label_propagation(args, model, target, feats, segs)
    assert_near(seg, golden[f"neigh{reach}"], 1e-5)
    assert_near(feat, evs.extract_feature(model, target).T, 1e-6)
    assert mask is None
    if reach:
        args.size_mask_neighborhood = 1  # replaced by the mask
        mask = evs.restrict_neighborhood(6, 9, reach).float()
        for given in (mask, mask.repeat(2, 1, 1)):
            seg, _, returned = evs.label_propagation(args, model, target, feats, segs, given)
            assert_near(seg, golden[f"neigh{reach}"], 1e-5)
            assert returned is given


def test_a_custom_mask_selects_the_sources_of_each_target():
    features, sources, labels = step_input(13, 14)  # four tiles
    mask = torch.zeros(2, 182, 182)
    for target in range(182):
        mask[target % 2, target, (5 * target + 1) % 182] = 1  # one source each
    got = evs.propagate(features, sources, labels, 1, 5, mask).flatten(0, 1)
    for target in range(182):
        assert_near(got[target], labels[target % 2].flatten(0, 1)[(5 * target + 1) % 182], 1e-6)


def test_the_neighborhood_is_a_square_window_cropped_at_the_borders():
    mask = evs.restrict_neighborhood(5, 7, 2)
    assert mask.shape == (35, 35)
    for target in range(35):
        for source in range(35):
            down, right = source // 7 - target // 7, source % 7 - target % 7
            assert mask[target, source] == (-2 <= down <= 2 and -2 <= right <= 2)


def test_the_memory_of_a_step_is_bounded_by_the_window():
    features, sources, labels = step_input(40, 60, n=4)
    with sizes_of_results() as sizes:
        evs.propagate(features, sources, labels, 3, 5)
    assert max(sizes) <= max(sources.numel(), 144 * 4 * 18 * 18)  # the dense matrix would have 23 million numbers


# ---- from soft labels to the frame ----


def test_norm_mask_matches_the_golden_values_and_does_not_change_its_input():
    golden = np.load(shared("goldens/label_propagation.npz"))
    given = torch.from_numpy(golden["norm_mask_in"])
    before = given.clone()
    assert_near(evs.norm_mask(given), golden["norm_mask"], 1e-6)
    assert torch.equal(given, before)


def test_pixel_labels_are_the_argmax_of_the_rescaled_upsampled_maps():
    seg = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.3, 0.6])
    got = evs.full_size_labels(seg, 8, 40, 64)  # sizes without ties between neighbors
    maps = F.interpolate(seg.permute(2, 0, 1)[None], size=(24, 32), mode="bilinear")[0]
    maps = torch.stack([(channel - channel.min()) / (channel.max() - channel.min()) for channel in maps])
    assert got.shape == (40, 64)
    assert got.dtype == np.uint8
    for y in range(40):
        for x in range(64):
            assert got[y, x] == maps[:, int((y + 0.5) * 24 / 40), int((x + 0.5) * 32 / 64)].argmax()


# ---- a video ----


def slow_video(args, model, frames, first_seg, shape):
    """Labels of a video by the public function for one step, with explicit indices of the source frames."""
    feats = [evs.extract_feature(model, evs.read_frame(path)[0]).T for path in frames]
    segs, masks = [first_seg], []
    for t in range(1, len(frames)):
        used = [0] + [s for s in range(1, t) if s >= t - args.n_last_frames]
        frame = evs.read_frame(frames[t])[0]
        step = evs.label_propagation(args, model, frame, [feats[s] for s in used], [segs[s] for s in used])
        segs.append(step[0])
        masks.append(evs.full_size_labels(step[0][0].permute(1, 2, 0), args.patch_size, *shape))
    return masks


@pytest.mark.parametrize("flags", [["--n_last_frames", "0"], ["--n_last_frames", "2", "--bs", "2"]])
def test_labels_come_from_the_first_frame_and_the_last_n_frames(davis, tmp_path, flags):
    args, model = arguments("--output_dir", tmp_path, "--size_mask_neighborhood", "4", *flags), small_model()
    first_seg, seg_ori = evs.read_seg(annotation(davis), 32)
    got = evs.eval_video_tracking_davis(args, model, paths(davis), "x/cup", first_seg, seg_ori)
    want = [seg_ori, *slow_video(args, model, paths(davis), first_seg, seg_ori.shape)]
    assert len(got) == 5
    for mask, expected in zip(got, want, strict=True):
        assert (mask != expected).mean() < 0.002  # rounding may decide where two labels are almost equal
    for mask, written in zip(got, labels_in(tmp_path / "cup"), strict=True):
        assert np.array_equal(mask, written)


def test_the_first_mask_is_copied_including_void(davis, tmp_path):
    labels = dino_images.read_labels(annotation(davis))
    labels[0, :7] = 255
    evs.imwrite_indexed(annotation(davis), labels)
    run("--data_path", davis, "--output_dir", tmp_path / "masks")
    first, *others = labels_in(tmp_path / "masks" / "cup")
    assert np.array_equal(first, labels)
    assert max(mask.max() for mask in others) == 2


def test_a_video_without_objects_gets_masks_without_objects(davis, tmp_path, capsys):
    for t in range(5):
        evs.imwrite_indexed(annotation(davis, t), np.zeros((HEIGHT, WIDTH)))
    run("--data_path", davis, "--output_dir", tmp_path / "masks")
    assert all(not mask.any() for mask in labels_in(tmp_path / "masks" / "cup"))
    assert "no scores" in capsys.readouterr().out


# ---- scores ----


def random_masks(seed, shape=(40, 56)):
    """Two overlapping blobs [H, W] bool, which reach the border for some seeds."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    center, radius = rng.uniform(0, shape), rng.uniform(6, 16)
    blob = [np.hypot(y - center[0] - d, x - center[1] - d) < radius + 3 * np.sin(x / 2 + d) for d in (0, 2)]
    return blob[0], blob[1]


def slow_boundary(mask):
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            below, right = min(y + 1, height - 1), min(x + 1, width - 1)
            if any(mask[y, x] != mask[other] for other in ((y, right), (below, x), (below, right))):
                found.append((y, x))
    return found


def slow_boundary_accuracy(mask, truth, tolerance):
    ours, theirs = slow_boundary(mask), slow_boundary(truth)

    def part_near(points, others):
        return sum(any((y - v) ** 2 + (x - u) ** 2 <= tolerance**2 for v, u in others) for y, x in points) / len(points)

    precision, recall = part_near(ours, theirs), part_near(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize(("seed", "tolerance"), [(0, 1), (1, 2), (3, 2)])
def test_boundary_accuracy_matches_a_loop_over_pixels(seed, tolerance):
    mask, truth = random_masks(seed)
    bound_th = (tolerance - 0.5) / math.hypot(40, 56)  # rounded up
    want = slow_boundary_accuracy(mask, truth, tolerance)
    assert 0.1 < want < 1
    assert evs.boundary_accuracy(mask, truth, bound_th) == pytest.approx(want)


def test_the_tolerance_is_a_share_of_the_diagonal_rounded_up():
    def accuracy(shape, shift):
        masks = np.zeros((2, *shape), dtype=bool)
        masks[0, :, 50:] = True
        masks[1, :, 50 + shift :] = True
        return evs.boundary_accuracy(*masks)

    assert [accuracy((480, 854), shift) for shift in (8, 9)] == [1, 0]  # 0.008 · 979.7 = 7.8
    assert [accuracy((300, 400), shift) for shift in (4, 5)] == [1, 0]  # 0.008 · 500 = 4


def test_boundary_accuracy_of_empty_masks():
    mask, nothing = random_masks(0)[0], np.zeros((40, 56), dtype=bool)
    assert evs.boundary_accuracy(nothing, nothing) == 1
    assert evs.boundary_accuracy(mask, nothing) == 0
    assert evs.boundary_accuracy(nothing, mask) == 0
    assert evs.boundary_accuracy(~nothing, nothing) == 1  # a full mask has no boundary either


def test_region_similarity_is_intersection_over_union():
    mask, truth = np.zeros((2, 10, 10), dtype=bool)
    assert evs.region_similarity(mask, truth) == 1
    mask[:4, :5], truth[2:4, :] = True, True
    assert evs.region_similarity(mask, truth) == 10 / 30
    assert evs.region_similarity(mask, ~mask) == 0


def test_statistics_are_mean_recall_and_decay_from_the_first_to_the_last_quarter():
    values = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]  # quarters end at frames 3, 5, 7, 9, and share these
    assert evs.statistics(values) == pytest.approx({"mean": 0.5, "recall": 4 / 9, "decay": 0.8 - 0.2})
    assert evs.statistics([0.25]) == {"mean": 0.25, "recall": 0, "decay": 0}
    values = np.random.default_rng(0).random(48)  # ends 1, 12.75, 24.5, 36.25, 48 round to 1, 13, 25, 36, 48
    assert evs.statistics(values)["decay"] == pytest.approx(values[0:13].mean() - values[35:48].mean())
    values = np.random.default_rng(0).random(3)  # ends 1, 1.5, 2, 2.5, 3 round to 1, 2, 2, 3, 3
    assert evs.statistics(values)["decay"] == pytest.approx(values[:2].mean() - values[2])


def test_each_object_is_scored_without_the_first_and_the_last_frame(davis):
    files = [annotation(davis, t) for t in range(5)]
    truth = [dino_images.read_labels(file) for file in files]
    masks = [truth[1]] * 5  # object 1 moves 4 pixels a frame, object 2 loses 2 columns of 24, 22, ...
    masks[0] = masks[4] = np.zeros_like(truth[0])  # these do not count
    scores = evs.score_video(masks, files)
    assert list(scores) == [1, 2]
    J = [24 * 28 / (24 * 28), 24 * 24 / (24 * 32), 24 * 20 / (24 * 36)]
    assert scores[1]["J"]["mean"] == pytest.approx(np.mean(J))
    assert scores[2]["J"]["mean"] == pytest.approx(np.mean([22 / 22, 20 / 22, 18 / 22]))
    want = [slow_boundary_accuracy(masks[t] == 1, truth[t] == 1, 1) for t in (1, 2, 3)]  # 0.008 · 100 pixels
    assert scores[1]["F"]["mean"] == pytest.approx(np.mean(want))
    assert scores[1]["F"]["recall"] == np.mean(np.array(want) > 0.5)


def test_objects_are_the_labels_of_the_first_annotation_and_void_is_background(davis):
    files = [annotation(davis, t) for t in range(5)]
    truth = [dino_images.read_labels(file) for file in files]
    for t, labels in enumerate(truth):
        changed = labels.copy()
        changed[labels == 1] = 200
        changed[labels == 2] = 255
        changed[:4] = 255
        if t:
            changed[57:] = 7
        evs.imwrite_indexed(files[t], changed)
    scores = evs.score_video([np.where(labels == 1, 200, 0) for labels in truth], files)
    assert list(scores) == [200]
    assert scores[200]["J"]["mean"] == scores[200]["F"]["mean"] == 1


# ---- the script ----


def test_the_script_tracks_objects_writes_masks_and_scores_them(tmp_path, photographs):
    davis, masks = tmp_path / "DAVIS", tmp_path / "masks"
    write_video(davis, "cup", photographs, length=6)
    write_video(davis, "other", photographs, length=4, annotated=1)
    done = run_script(
        "eval_video_segmentation.py", *SMALL, "--patch_size", "16", "--data_path", davis, "--output_dir", masks
    )
    assert sorted(path.name for path in masks.iterdir()) == ["cup", "other", "results.json"]
    assert [path.name for path in sorted((masks / "cup").iterdir())] == [f"{t:05}.png" for t in range(6)]
    written, truth = labels_in(masks / "cup"), labels_in(annotation(davis).parent)
    with Image.open(masks / "cup" / "00003.png") as image:
        assert image.mode == "P"
        assert image.size == (WIDTH, HEIGHT)
        assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    results = json.loads((masks / "results.json").read_text())
    assert list(results["objects"]) == ["cup_1", "cup_2"]
    J = {}
    for label in (1, 2):
        pairs = [(written[t] == label, truth[t] == label) for t in range(1, 5)]
        J[label] = np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs])
        assert results["objects"][f"cup_{label}"]["J"]["mean"] == pytest.approx(J[label])
        still = np.mean([((truth[0] == label) & b).sum() / ((truth[0] == label) | b).sum() for _, b in pairs])
        assert J[label] > max(0.75, still + 0.02 * label)  # better than copying the first mask
    mean = results["mean"]
    assert mean["J"]["mean"] == pytest.approx((J[1] + J[2]) / 2)
    for name in ("F", "J"):
        for key in ("mean", "recall", "decay"):
            both = [results["objects"][f"cup_{label}"][name][key] for label in (1, 2)]
            assert mean[name][key] == pytest.approx(np.mean(both))
    assert mean["J&F"] == pytest.approx((mean["J"]["mean"] + mean["F"]["mean"]) / 2)
    lines = done.stdout.splitlines()
    assert "[1/2] cup: 6 frames" in done.stdout
    assert "frames/s, J&F" in done.stdout
    assert "scores of 1 of 2 videos, 2 objects" in lines
    assert lines[-1].split()[:3] == ["mean", f"{mean['J&F']:.3f}", f"{mean['J']['mean']:.3f}"]
    assert lines[-4].split() == ["J&F", *(f"{n}-{key}" for n in "JF" for key in ("mean", "recall", "decay"))]


def test_a_real_video_without_later_annotations_gets_masks_but_no_scores(tmp_path, capsys):
    run("--data_path", shared("data/davis_mini"), "--output_dir", tmp_path)
    masks = labels_in(tmp_path / "bike")
    assert [mask.shape for mask in masks] == [(480, 854)] * 4
    assert np.array_equal(masks[0], dino_images.read_labels(shared("data/davis_mini/Annotations/480p/bike/00000.png")))
    assert all({0} < set(np.unique(mask)) <= {0, 1, 2} for mask in masks)
    said = capsys.readouterr().out
    assert "[1/1] bike: 4 frames" in said
    assert "no scores" in said
    assert sorted(os.listdir(tmp_path)) == ["bike"]


# ---- errors ----


def rewrite(path, change):
    """Save an image file again, changed."""
    with Image.open(path) as image:
        changed = change(image)
    changed.save(path)


def truncate(path, size):
    os.truncate(path, size if size >= 0 else os.path.getsize(path) + size)


def listing(davis):
    return davis / "ImageSets" / "2017" / "val.txt"


def crop(width, height):
    return lambda image: image.crop((0, 0, width, height))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda davis: shutil.rmtree(davis), "val.txt"),
        (lambda davis: listing(davis).write_text("\n"), "val.txt names no videos"),
        (lambda davis: [os.remove(path) for path in paths(davis)], "cup has no *.jpg files"),
        (lambda davis: annotation(davis).unlink(), "can't read {annotation}: No such file or directory"),
        (lambda davis: truncate(annotation(davis), -60), "can't read {annotation}: "),
        (lambda davis: truncate(paths(davis)[3], 1500), "{frame}: "),
        (
            lambda davis: rewrite(annotation(davis), lambda image: image.convert("RGB")),
            "{annotation} is an image in mo",
        ),
        (lambda davis: rewrite(annotation(davis), crop(80, 59)), "has 80 × 60 pixels, the first annotation 80 × 59"),
        (lambda davis: rewrite(annotation(davis, 4), crop(79, 60)), "00004.png has 79 × 60 pixels"),
        (
            lambda davis: rewrite(annotation(davis), lambda image: image.convert("L").point(lambda x: 255 * (x > 0))),
            "{annotation} has no label but 255",
        ),
    ],
)
def test_missing_and_damaged_files_are_named(damage, message, davis, error_line):
    damage(davis)
    message = message.format(annotation=annotation(davis), frame=paths(davis)[3] if "frame" in message else "")
    assert message in error_line("--bs", "1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "resnet50"], "--arch resnet50 has no patch features"),
        (["--output_dir", "FILE/masks"], "can't write to --output_dir"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(flags, message, davis, error_line):
    (davis.parent / "file").touch()
    flags = [flag.replace("FILE", str(davis.parent / "file")) for flag in flags]
    assert message in error_line(*flags)


@pytest.mark.parametrize("place", ["notes", "file", "Annotations"])
def test_only_an_earlier_result_is_overwritten(place, davis, error_line):
    output_dir = davis / place / "480p" if place == "Annotations" else davis.parent / "other"
    if place == "notes":
        (output_dir / "cup").mkdir(parents=True)
        (output_dir / "cup" / "notes.txt").touch()
    elif place == "file":
        output_dir.mkdir()
        (output_dir / "cup").touch()
    before = {path: path.read_bytes() for path in davis.parent.rglob("*") if path.is_file()}
    line = error_line("--output_dir", output_dir)
    assert f"{output_dir / 'cup'} is not an earlier result and would be overwritten" in line
    assert {path: path.read_bytes() for path in davis.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("cause", ["damaged frame", "full disk"])
def test_an_interrupted_video_keeps_the_earlier_result(cause, davis, tmp_path, error_line, capsys):
    run("--data_path", davis, "--output_dir", tmp_path / "earlier")
    before = {path: path.read_bytes() for path in (tmp_path / "earlier" / "cup").iterdir()}
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if cause == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # no file larger than 100 bytes
    else:
        truncate(paths(davis)[3], 1500)
    try:
        line = error_line("--output_dir", tmp_path / "earlier", "--bs", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    place = tmp_path / "earlier" / "cup" if cause == "full disk" else paths(davis)[3]
    assert f"{place}: " in line
    assert sorted(os.listdir(tmp_path / "earlier")) == ["cup", "results.json"]
    assert {path: path.read_bytes() for path in (tmp_path / "earlier" / "cup").iterdir()} == before
