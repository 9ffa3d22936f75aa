"""Video object segmentation on DAVIS 2017 with frozen ViT features (section 4.2.2 of the paper).

    python eval_video_segmentation.py --data_path DAVIS --output_dir runs/davis      # published ViT-S/16: J&F 0.618
    python eval_video_segmentation.py --arch vit_base --patch_size 8 --data_path DAVIS --output_dir runs/davis  # 0.714
    python eval_video_segmentation.py --pretrained_weights runs/vits16/checkpoint.pth --data_path DAVIS --bs 1

The first frame's annotation is carried from frame to frame: each patch takes the labels of the patches around it, in
the first frame and in some previous ones, that have the most similar features. Nothing is trained. --data_path holds
ImageSets/2017/val.txt (a video's name a line), JPEGImages/480p/<video>/*.jpg and Annotations/480p/<video>/00000.png.
Writes <output_dir>/<video>/*.png, indexed and in the frames' size, as the official DAVIS evaluator reads them. For
videos that are annotated throughout it prints that evaluator's figures, and writes them to <output_dir>/results.json.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import dino_backbones
import dino_cli
import dino_images
import utils
from dino_cli import at_least
from utils import UserError

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("Video object segmentation", add_help=False, parents=[dino_cli.model_flags()])
    # fmt: off
    parser.add_argument("--data_path", default="DAVIS", metavar="DIR",
        help="Folder of DAVIS 2017, with ImageSets, JPEGImages and Annotations in it.")
    parser.add_argument("--output_dir", default=".", metavar="DIR", help="Where a folder of masks per video goes.")
    parser.add_argument("--n_last_frames", default=7, type=at_least(0), metavar="N", help="""Labels come from the first
        frame and from this many before the current one. More of them hold an object longer, and cost time and
        memory.""")
    parser.add_argument("--size_mask_neighborhood", default=12, type=at_least(0), metavar="PATCHES",
        help="""Labels come from at most so many patches up, down, left or right; 0: from anywhere, which takes longer.
        More for fast motion or small patches.""")
    parser.add_argument("--topk", default=5, type=at_least(1), metavar="K",
        help="How many of the most similar patches give their labels. More of them make smoother outlines.")
    parser.add_argument("--bs", default=6, type=at_least(1), metavar="B",
        help="Frames per forward pass of the network. Lower it if memory runs out; the result stays the same.")
    # fmt: on
    return parser


def check_args(args):
    dino_backbones.check_arch(args.arch)
    if not dino_backbones.vit_factory(args.arch):
        raise UserError(f"--arch {args.arch} gives no features of single patches. Choose a ViT, such as vit_small")


# ---- videos, frames and masks ----


def find_videos(data_path, output_dir):
    """What there is to do: (name, frame paths, annotation paths) of each video in val.txt, one annotation per frame.

    Only the first annotation is sure to be there. Raises UserError for what is missing, damaged or does not fit.
    """
    listing = Path(data_path) / "ImageSets" / "2017" / "val.txt"
    try:
        names = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"can't read the list of videos {listing}: {e}. Is --data_path the folder of DAVIS?") from e
    if not names:
        raise UserError(f"{listing} names no videos")
    for name in names:
        if Path(name).name != name:  # the masks would land in another folder
            raise UserError(f"{listing} names {name!r}, which is not the name of a folder. Name one video a line")
    videos = []
    for name in dict.fromkeys(names):
        frame_dir, annotation_dir = (Path(data_path) / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        frames = read_frame_list(frame_dir)
        annotations = [annotation_dir / f"{Path(frame).stem}.png" for frame in frames]
        check_video(frames, annotations, Path(output_dir) / name)
        videos.append((name, frames, annotations))
    return videos


def read_frame_list(video_dir):
    """Paths of a video's frames in order of time, that is of their names. Raises UserError if there are none."""
    frames = sorted(str(path) for path in Path(video_dir).glob("*.jpg"))
    if not frames:
        why = "has no *.jpg in it" if os.path.isdir(video_dir) else "is missing"
        raise UserError(f"the folder of frames {video_dir} {why}. Add the frames, or take the video out of val.txt")
    return frames


def check_video(frames, annotations, target):
    """Raise UserError unless the first frame is annotated, all images have one size, and `target` may be replaced."""
    if set(np.unique(read_mask(annotations[0]))) - {0} == {VOID}:
        raise UserError(f"{annotations[0]} has no label but {VOID}, which is void. Number the objects 1, 2, ...")
    width, height = open_image(annotations[0], image_size)
    for path in (*frames, *filter(os.path.exists, annotations)):
        size = open_image(path, image_size)
        if size != (width, height):
            raise UserError(f"{path} is {size[0]} × {size[1]} pixels, the video's first annotation {width} × {height}")
    earlier_result = target.is_dir() and set(os.listdir(target)) <= {path.name for path in annotations}
    if (target.exists() and not earlier_result) or target.resolve() == annotations[0].parent.resolve():
        raise UserError(f"{target} would be replaced, but is no earlier result. Choose another --output_dir")


def open_image(path, use):
    """What the function `use` makes of an image file. Raises UserError if the file is missing or damaged."""
    try:
        with Image.open(path, formats=dino_images.known_kinds()) as image:
            dino_images.check_pixels(image)
            return use(image)
    except Exception as e:  # Pillow's decoders raise almost anything on damaged data
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"can't read {path}: {reason}. Bring it whole, or take its video out of val.txt") from e


def image_size(image):
    return image.size


def scaled_size(height, width, scale_size=(480,)):
    """(height, width) for the network: the short side as given, the long one in proportion, down to a multiple of 64.

    Two numbers in `scale_size` are the result themselves.
    """
    if len(scale_size) == 2:
        return tuple(scale_size)
    short = scale_size[0]
    long = int(short * max(height, width) / min(height, width) // 64 * 64)
    return (long, short) if height > width else (short, long)


# Not quite ImageNet's 0.229 elsewhere: the published figures were measured with these.
FRAME_MEAN, FRAME_STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)


def read_frame(frame_dir, scale_size=(480,), multiple=1):
    """(normalised image [3, h, w], original height, original width) of the frame in the file `frame_dir`.

    h and w are those of `scaled_size`, down to a multiple of `multiple`. Raises UserError if the file is damaged.
    """
    image = dino_images.load_image(frame_dir)
    size = [side // multiple * multiple for side in scaled_size(image.height, image.width, scale_size)]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # [3, H, W], 0 to 255
    # Without antialiasing, and rounded to whole levels, as OpenCV resizes: the published figures were measured so.
    pixels = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0].round()
    mean, std = (torch.tensor(values)[:, None, None] for values in (FRAME_MEAN, FRAME_STD))
    return (pixels / 255 - mean) / std, image.height, image.width


VOID = 255  # label of pixels that the annotators left open


def read_mask(path):
    """Labels [H, W] uint8 of an annotation: 0 background, then the objects. Raises UserError if it is no such file."""
    mode, labels = open_image(path, lambda image: (image.mode, np.array(image)))
    if mode not in ("P", "L"):
        raise UserError(f"the annotation {path} is an image in mode {mode}. Save it as indexed, one label a pixel")
    return labels


def read_seg(seg_dir, factor, scale_size=(480,)):
    """An annotation as labels of the patches, one-hot [1, C, h, w], and as it stands in the file, [H, W] uint8.

    Patches are `factor` pixels wide. C counts the background; void pixels belong to it. Raises UserError.
    """
    labels = read_mask(seg_dir)
    height, width = scaled_size(*labels.shape, scale_size)
    known = np.where(labels == VOID, 0, labels)
    small = Image.fromarray(known).resize((width // factor, height // factor), Image.Resampling.NEAREST)
    return to_one_hot(torch.from_numpy(np.array(small))[None], int(known.max()) + 1), labels


def to_one_hot(y_tensor, n_dims=None):
    """Labels [1, h, w] -> [1, n_dims, h, w] float32; n_dims without a value is the highest label + 1."""
    labels = y_tensor.long()
    return F.one_hot(labels, n_dims or int(labels.max()) + 1).permute(0, 3, 1, 2).float()


def davis_palette():
    """The 256 colours [256, 3] uint8 of PASCAL VOC and DAVIS.

    A label's bits, the lowest first, go to red, green, blue, red, ... of its colour, each channel's highest bit first.
    """
    labels, colours = np.arange(256), np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= (((labels >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


def imwrite_indexed(filename, array, color_palette):
    """Write labels [H, W] uint8 as a PNG with the colours [256, 3]. Raises UserError for another shape."""
    array = np.asarray(array, dtype=np.uint8)
    if array.ndim != 2:
        raise UserError(f"{filename}: labels must be [H, W], these are {list(array.shape)}")
    image = Image.fromarray(array)
    image.putpalette(np.asarray(color_palette, dtype=np.uint8).ravel().tolist())
    image.save(filename, format="PNG")


@contextmanager
def whole_folder(target):
    """A new folder to write into, which then takes the place of `target`; if something fails, that stays as it was."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            if target.exists():
                target.rename(Path(scratch) / "old")
            new.rename(target)
    except OSError as e:
        raise UserError(f"can't write {target}: {e.strerror or e}. Make room, or choose another --output_dir") from e


# ---- features ----


def patch_features(model, frames):
    """Patch tokens behind a ViT's last block and norm, [B, h, w, D], of normalised frames [B, 3, H, W]."""
    rows, columns = (side // model.patch_embed.patch_size for side in frames.shape[-2:])
    frames = frames.to(next(model.parameters()).device)
    return model.get_intermediate_layers(frames, n=1)[0][:, 1:].unflatten(1, (rows, columns))


@torch.no_grad()
def extract_feature(model, frame, return_h_w=False):
    """Patch tokens [h·w, D] of a normalised frame [3, H, W]; with `return_h_w` (tokens, h, w)."""
    features = patch_features(model, frame[None])[0]
    h, w, _ = features.shape
    return (features.flatten(0, 1), h, w) if return_h_w else features.flatten(0, 1)


@torch.no_grad()
def frame_features(model, frame_list, batch_size):
    """Yield the L2-normalised features [h, w, D] of each frame; the network sees `batch_size` of them at a time."""
    for start in range(0, len(frame_list), batch_size):
        batch = frame_list[start : start + batch_size]
        frames = [read_frame(path, multiple=model.patch_embed.patch_size)[0] for path in batch]
        yield from F.normalize(patch_features(model, torch.stack(frames)), dim=-1)


# ---- label propagation ----

TEMPERATURE = 0.1
TILE = 12  # side, in patches, of the squares of targets that are looked at together


def restrict_neighborhood(h, w, size_mask_neighborhood=12):
    """Which patches (columns) lie in the window around which (rows): bool [h·w, h·w].

    The window reaches `size_mask_neighborhood` patches up, down, left and right, as far as there are any.
    """
    everywhere = slice(None), slice(None)
    return in_window(torch.arange(h), torch.arange(w), everywhere, everywhere, size_mask_neighborhood)


def in_window(rows, columns, target, source, size):
    """Which patches of the part `source` are in the windows of those of the part `target`: bool [targets, sources].

    A part is a pair of slices of all `rows` [h] and `columns` [w].
    """
    near_rows = (rows[target[0], None] - rows[source[0]]).abs() <= size  # [a, A]
    near_columns = (columns[target[1], None] - columns[source[1]]).abs() <= size  # [b, B]
    return (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)  # [a·b, A·B]


def propagate(features, sources, labels, size, topk, mask=None):
    """Labels [h, w, C] of a frame's patches, from the `topk` most similar ones in n labelled frames (section 4.2.2).

    `features` [h, w, D] and `sources` [n, h, w, D] are L2-normalised, `labels` are [n, h, w, C]; a source counts with
    exp(cosine / 0.1), the weights of a target sum to 1. Sources lie at most `size` patches away in each direction
    (0: anywhere), or where `mask` [h·w, h·w] or [n, h·w, h·w], [target, source], is not 0. Square by square: its
    targets' windows overlap so much that one matrix product with all that is in any of them is the quickest.
    """
    h, w, classes = labels.shape[1:]
    rows, columns = (torch.arange(side, device=features.device) for side in (h, w))
    reach = size if size and mask is None else max(h, w)
    masks = None if mask is None else mask.to(features.device).bool().reshape(-1, h, w, h, w)
    propagated = labels.new_empty(h, w, classes)
    for top in range(0, h, TILE):
        for left in range(0, w, TILE):
            target = slice(top, top + TILE), slice(left, left + TILE)
            source = slice(max(top - reach, 0), top + TILE + reach), slice(max(left - reach, 0), left + TILE + reach)
            candidates = sources[:, source[0], source[1]].flatten(1, 2)  # [n, S, D]
            similarity = features[target].flatten(0, 1) @ candidates.flatten(0, 1).T  # [T, n·S]
            if mask is None:
                allowed = in_window(rows, columns, target, source, reach)[None]  # [1, T, S]
            else:
                allowed = masks[(slice(None), *target, *source)].flatten(3).flatten(1, 2)  # [1 or n, T, S]
            similarity.unflatten(1, (len(sources), -1)).masked_fill_(~allowed.transpose(0, 1), -math.inf)
            best, places = similarity.topk(min(topk, similarity.shape[1]), dim=1)  # [T, k]
            weights = (best / TEMPERATURE).softmax(dim=1)[..., None]
            found = labels[:, source[0], source[1]].flatten(0, 2)[places]  # [T, k, C]
            propagated[target] = (weights * found).sum(dim=1).view_as(propagated[target])
    return propagated


@torch.no_grad()
def label_propagation(args, model, frame_tar, list_frame_feats, list_segs, mask_neighborhood=None):
    """One step by the public signature: (labels [1, C, h, w], features [D, h·w], mask_neighborhood) of `frame_tar`.

    `frame_tar` is normalised, [3, H, W]; the n source frames are given by features [D, h·w] and labels [1, C, h, w].
    Reads args.topk and args.size_mask_neighborhood; a `mask_neighborhood` ([h·w, h·w], or n of these; target, source)
    takes the place of that window. It is returned as it came: the window itself needs none.
    """
    feat_tar, h, w = extract_feature(model, frame_tar, return_h_w=True)  # [h·w, D]
    sources = torch.stack(list_frame_feats).transpose(1, 2).unflatten(1, (h, w)).contiguous()  # [n, h, w, D]
    labels = torch.cat(list_segs).to(feat_tar.device).permute(0, 2, 3, 1)  # [n, h, w, C]
    targets = F.normalize(feat_tar, dim=-1).unflatten(0, (h, w))
    reach = args.size_mask_neighborhood
    seg_tar = propagate(targets, F.normalize(sources, dim=-1), labels, reach, args.topk, mask_neighborhood)
    return seg_tar.permute(2, 0, 1)[None], feat_tar.T, mask_neighborhood


def norm_mask(mask):
    """Stretch each channel of [C, H, W] to the range 0 to 1; one that is nowhere above 0 stays as it is."""
    lowest, highest = mask.amin(dim=(1, 2), keepdim=True), mask.amax(dim=(1, 2), keepdim=True)
    extent = torch.where(highest > lowest, highest - lowest, 1)
    return torch.where(highest > 0, (mask - lowest) / extent, mask)


def full_size_labels(seg, patch_size, height, width):
    """The label [height, width] uint8 of every pixel of the original frame, of soft labels of its patches [h, w, C]."""
    maps = seg.permute(2, 0, 1)[None]  # [1, C, h, w]
    maps = F.interpolate(maps, scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    labels = norm_mask(maps).argmax(dim=0).byte().cpu().numpy()
    return np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def eval_video_tracking_davis(args, model, frame_list, video_dir, first_seg, seg_ori, color_palette):
    """Segment a video; returns the labels [H, W] uint8 of its frames and writes them below args.output_dir.

    The folder gets the last part of `video_dir` for a name and is written whole or not at all. `first_seg`
    [1, C, h, w] and `seg_ori` [H, W] are the first annotation as `read_seg` gives it. Raises UserError.
    """
    first, history = [], deque(maxlen=args.n_last_frames)  # (features [h, w, D], soft labels [h, w, C]) of frames
    masks = []
    with whole_folder(Path(args.output_dir) / Path(video_dir).name) as folder:
        for path, features in zip(frame_list, frame_features(model, frame_list, args.bs), strict=True):
            if not first:
                mask = seg_ori
                first.append((features, first_seg[0].permute(1, 2, 0).to(features.device)))
            else:
                sources, labels = map(torch.stack, zip(*first, *history, strict=True))
                seg = propagate(features, sources, labels, args.size_mask_neighborhood, args.topk)
                mask = full_size_labels(seg, model.patch_embed.patch_size, *seg_ori.shape)
                history.append((features, seg))
            imwrite_indexed(folder / f"{Path(path).stem}.png", mask, color_palette)
            masks.append(mask)
    return masks


# ---- scores: J and F of the DAVIS 2017 evaluator (arXiv 1704.00675) ----


def region_similarity(mask, truth):
    """J: intersection over union of two masks [H, W] bool; 1 if both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0


def boundary(mask):
    """Pixels of a mask [H, W] bool that differ from their neighbour to the right, below, or right below."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != diagonal)


def boundary_accuracy(mask, truth, bound_th=0.008):
    """F: harmonic mean of the parts of either mask's boundary that have the other's within a tolerance.

    The tolerance is `bound_th` of the image's diagonal, rounded up to whole pixels. An empty boundary is precise, and
    found in full; so two of them give 1, and one of them 0.
    """
    from scipy.ndimage import distance_transform_edt

    ours, theirs = boundary(mask), boundary(truth)
    if not (ours.any() and theirs.any()):
        return float(ours.any() == theirs.any())
    tolerance = math.ceil(bound_th * math.hypot(*mask.shape))
    precision = (distance_transform_edt(~theirs)[ours] <= tolerance).mean()
    recall = (distance_transform_edt(~ours)[theirs] <= tolerance).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def statistics(values):
    """Of an object's figures, one per frame: mean, part above 0.5, and fall from the first quarter to the last."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    decay = np.mean(values[: ends[1] + 1]) - np.mean(values[ends[3] :])
    return {"mean": np.mean(values), "recall": np.mean(np.array(values) > 0.5), "decay": decay}


def score_video(masks, annotations):
    """{object's label: {"J": statistics, "F": statistics}} of label images [H, W] and the files with the true ones.

    The objects are those of the first annotation, void pixels count as background, and the first and the last frame
    don't count: for fewer than three frames there is nothing to tell.
    """
    truths = [np.where(labels == VOID, 0, labels) for labels in map(read_mask, annotations)]
    pairs = list(zip(masks, truths, strict=True))[1:-1]
    scores = {}
    for label in sorted(set(np.unique(truths[0]).tolist()) - {0}) if pairs else ():
        parts = [(mask == label, truth == label) for mask, truth in pairs]
        measures = (("J", region_similarity), ("F", boundary_accuracy))
        scores[label] = {name: statistics([measure(*part) for part in parts]) for name, measure in measures}
    return scores


def mean_scores(scores):
    """Means over objects: {"J&F": number, "J": statistics, "F": statistics}."""
    means = {}
    for name in "JF":
        parts = [score[name] for score in scores]
        means[name] = {key: float(np.mean([part[key] for part in parts])) for key in ("mean", "recall", "decay")}
    return {"J&F": (means["J"]["mean"] + means["F"]["mean"]) / 2, **means}


# ---- the evaluation ----


def main(args):
    """Segment every video as `args` say (see get_args_parser), and score those that can be. Raises UserError."""
    check_args(args)
    device = utils.pick_device(args.device)
    videos = find_videos(args.data_path, args.output_dir)
    dino_cli.check_output_dir(args.output_dir, files=("results.json",))
    utils.fix_random_seeds(0)
    model, _ = dino_backbones.frozen_backbone(args, device)
    scores, scored = {}, 0
    for number, (name, frames, annotations) in enumerate(videos, start=1):
        start = time.time()
        first_seg, seg_ori = read_seg(annotations[0], args.patch_size)
        masks = eval_video_tracking_davis(args, model, frames, name, first_seg, seg_ori, davis_palette())
        speed = len(frames) / (time.time() - start)
        line = f"[{number}/{len(videos)}] {name}: {len(frames)} frames, {speed:.2f} frames/s"
        found = score_video(masks, annotations) if all(map(os.path.exists, annotations)) else {}
        if found:
            line += f", J&F {mean_scores(found.values())['J&F']:.3f}"
            scores |= {f"{name}_{label}": mean_scores([score]) for label, score in found.items()}
            scored += 1
        print(line, flush=True)
    if not scores:
        print(f"no scores: no video has annotations of objects in all frames. The masks are in {args.output_dir}")
        return
    print(f"scores of {scored} of {len(videos)} videos, {len(scores)} objects")
    report({"mean": mean_scores(scores.values()), "objects": scores}, args.output_dir)


def report(results, output_dir):
    """Print the evaluator's table, an object a line, and write it all to results.json."""
    rows = {**results["objects"], "mean": results["mean"]}
    width = max(map(len, rows))
    keys = [(name, key) for name in "JF" for key in ("mean", "recall", "decay")]
    print(" " * width + "    J&F" + "".join(f"{f'{name}-{key}':>10}" for name, key in keys))
    for row, score in rows.items():
        print(f"{row:{width}}{score['J&F']:7.3f}" + "".join(f"{score[name][key]:10.3f}" for name, key in keys))
    text = json.dumps(results, indent=1)
    utils.write_whole(Path(output_dir) / "results.json", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
