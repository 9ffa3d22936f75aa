"""Video object segmentation on DAVIS 2017 with frozen ViT features (section 4.2.2 of the paper).

    python eval_video_segmentation.py --data_path DAVIS --output_dir runs/davis      # published ViT-S/16: J&F 0.618
    python eval_video_segmentation.py --pretrained_weights runs/vits16 --data_path DAVIS --output_dir runs/davis

Each patch copies the labels of the most similar patches nearby, in the first frame and in the previous frames. Nothing
is trained. --data_path holds ImageSets/2017/val.txt (one video name per line), JPEGImages/480p/<video>/*.jpg and
Annotations/480p/<video>/00000.png. Writes <output_dir>/<video>/*.png for the official DAVIS evaluator. If all frames of
a video are annotated, also prints that evaluator's scores and writes them to <output_dir>/results.json.
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
import dino_checkpoints
import dino_cli
import dino_data
import dino_images
import utils
from dino_cli import at_least
from utils import UserError

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("Video object segmentation", add_help=False, parents=[dino_cli.model_flags()])
    # fmt: off
    parser.add_argument("--data_path", default="DAVIS", metavar="DIR", help="Folder of DAVIS 2017.")
    parser.add_argument("--output_dir", default=".", metavar="DIR",
        help="Folder for the masks, one subfolder per video.")
    parser.add_argument("--n_last_frames", default=7, type=at_least(0), metavar="N", help="""Previous frames to copy
        labels from, besides the first frame. More frames keep an object longer, but take time and memory.""")
    parser.add_argument("--size_mask_neighborhood", default=12, type=at_least(0), metavar="PATCHES",
        help="""Copy labels from patches at most this far away in each direction (0: no limit, slower). Raise it for
        fast motion or small patches.""")
    parser.add_argument("--topk", default=5, type=at_least(1), metavar="K",
        help="Number of most similar patches to copy labels from. More patches give smoother outlines.")
    parser.add_argument("--bs", default=6, type=at_least(1), metavar="B",
        help="Frames per forward pass. Lower it if memory runs out; the result is the same.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError if --arch is unknown, or is not a ViT."""
    dino_backbones.check_vit(args.arch, "patch features")


# ---- videos, frames and masks ----


def find_videos(data_path, output_dir):
    """[(name, frame paths, annotation paths)] of the videos in val.txt, with one annotation path per frame.

    Only the first annotation is sure to exist. Raises UserError if something is missing, damaged or inconsistent.
    """
    listing = Path(data_path) / "ImageSets" / "2017" / "val.txt"
    try:
        names = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"can't read the list of videos {listing}: {e}. Set --data_path to the DAVIS folder") from e
    if not names:
        raise UserError(f"{listing} names no videos. Write one name per line")
    videos = []
    for name in dict.fromkeys(names):
        if Path(name).name != name:  # the masks would be written to another folder
            raise UserError(f"{listing} names {name!r}, which is not a folder name. Write one name per line")
        frame_dir, annotation_dir = (Path(data_path) / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        frames = read_frame_list(frame_dir)
        annotations = [annotation_dir / f"{Path(frame).stem}.png" for frame in frames]
        check_video(frames, annotations, Path(output_dir) / name)
        videos.append((name, frames, annotations))
    return videos


def read_frame_list(video_dir):
    """Paths of a video's frames, frame 2 before frame 10. Raises UserError if there are none."""
    frames = dino_data.image_files(video_dir, "--data_path") if any(Path(video_dir).glob("[!.]*.jpg")) else []
    if not frames:
        problem = "has no *.jpg files" if os.path.isdir(video_dir) else "is missing"
        raise UserError(f"the frame folder {video_dir} {problem}. Add the frames, or remove the video from val.txt")
    return [str(path) for path in frames if path.suffix == ".jpg"]


def check_video(frames, annotations, target):
    """Raise UserError if a video can't be segmented, or if its output folder `target` is not an earlier result."""
    if set(np.unique(dino_images.read_labels(annotations[0]))) - {0} == {dino_images.VOID}:
        raise UserError(f"{annotations[0]} has no label but {dino_images.VOID} (void). Number the objects 1, 2, ...")
    width, height = dino_images.use_file(annotations[0], lambda image: image.size)
    for path in (*frames, *filter(os.path.exists, annotations)):
        size = dino_images.use_file(path, lambda image: image.size)
        if size != (width, height):
            raise UserError(f"{path} has {size[0]} × {size[1]} pixels, the first annotation {width} × {height}")
    earlier_result = target.is_dir() and set(os.listdir(target)) <= {path.name for path in annotations}
    if (target.exists() and not earlier_result) or target.resolve() == annotations[0].parent.resolve():
        raise UserError(f"{target} is not an earlier result and would be overwritten. Use another --output_dir")


def scaled_size(height, width, scale_size=(480,)):
    """(height, width) for the network: the short side is `scale_size`, the long side a multiple of 64, rounded down."""
    if len(scale_size) == 2:
        return tuple(scale_size)
    (short,) = scale_size
    long = int(short * max(height, width) / min(height, width) // 64 * 64)
    return (long, short) if height > width else (short, long)


# The std differs slightly from ImageNet's (0.229, ...) used elsewhere. The published scores were measured with it.
FRAME_MEAN_STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)


def read_frame(frame_dir, scale_size=(480,), multiple=1, mean_std=FRAME_MEAN_STD):
    """(normalized image [3, h, w], original height, original width) of the frame file `frame_dir`.

    h and w are the `scaled_size`, rounded down to a multiple of `multiple`. Raises UserError if the file is damaged.
    """
    image = dino_images.load_image(frame_dir)
    size = [side // multiple * multiple for side in scaled_size(image.height, image.width, scale_size)]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # [3, H, W], 0 to 255
    # Like OpenCV: no antialiasing, and rounded to integers. The published scores were measured this way.
    pixels = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0].round()
    mean, std = (torch.tensor(values)[:, None, None] for values in mean_std)
    return (pixels / 255 - mean) / std, image.height, image.width


def read_seg(seg_dir, factor, scale_size=(480,)):
    """(one-hot labels of the patches [1, C, h, w], original labels [H, W] uint8) of the annotation file `seg_dir`.

    Patches are `factor` pixels wide. C includes the background; void pixels become background. Raises UserError.
    """
    labels = dino_images.read_labels(seg_dir)
    height, width = scaled_size(*labels.shape, scale_size)
    known = np.where(labels == dino_images.VOID, 0, labels)
    small = Image.fromarray(known).resize((width // factor, height // factor), Image.Resampling.NEAREST)
    return to_one_hot(torch.from_numpy(np.array(small))[None], int(known.max()) + 1), labels


def to_one_hot(y_tensor, n_dims=None):
    """Labels [1, h, w] -> [1, n_dims, h, w] float32. `n_dims` defaults to the highest label + 1."""
    return F.one_hot(y_tensor.long(), n_dims or int(y_tensor.max()) + 1).permute(0, 3, 1, 2).float()


def davis_palette():
    """The 256 colors [256, 3] uint8 of PASCAL VOC and DAVIS."""
    labels, colors = np.arange(256), np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):  # from low to high, to red, green, blue, red, ...; each channel is filled from its high bit
        colors[:, bit % 3] |= (((labels >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    return colors


def imwrite_indexed(filename, array, color_palette=None):
    """Write labels [H, W] as an indexed PNG with the colors [256, 3] (default: DAVIS). Raises UserError."""
    array = np.asarray(array, dtype=np.uint8)
    if array.ndim != 2:
        raise UserError(f"{filename}: labels must be [H, W], not {list(array.shape)}")
    image = Image.fromarray(array)
    palette = davis_palette() if color_palette is None else color_palette
    image.putpalette(np.asarray(palette, dtype=np.uint8).ravel().tolist())
    image.save(filename, format="PNG")


@contextmanager
def whole_folder(target):
    """A new, empty folder that replaces `target` at the end. If anything fails, `target` stays unchanged."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            if target.exists():
                target.rename(Path(scratch) / "old")
            new.rename(target)
    except OSError as e:
        raise UserError(f"can't write {target}: {e.strerror or e}. Free space, or use another --output_dir") from e


# ---- features ----


def patch_features(model, frames):
    """Patch tokens [B, h, w, D] of a ViT, after the last block and norm, for normalized frames [B, 3, H, W]."""
    rows, columns = (side // model.patch_embed.patch_size for side in frames.shape[-2:])
    frames = frames.to(next(model.parameters()).device)
    return model.get_intermediate_layers(frames, n=1)[0][:, 1:].unflatten(1, (rows, columns))


@torch.no_grad()
def extract_feature(model, frame, return_h_w=False):
    """Patch tokens [h·w, D] of a normalized frame [3, H, W]. With `return_h_w`: (tokens, h, w)."""
    features = patch_features(model, frame[None])[0]
    h, w, _ = features.shape
    return (features.flatten(0, 1), h, w) if return_h_w else features.flatten(0, 1)


@torch.no_grad()
def frame_features(model, frame_list, batch_size, mean_std=FRAME_MEAN_STD):
    """Yield the L2-normalized features [h, w, D] of each frame, computed for `batch_size` frames at a time."""
    for start in range(0, len(frame_list), batch_size):
        batch = frame_list[start : start + batch_size]
        frames = [read_frame(path, (480,), model.patch_embed.patch_size, mean_std)[0] for path in batch]
        yield from F.normalize(patch_features(model, torch.stack(frames)), dim=-1)


# ---- label propagation ----

TEMPERATURE, TILE = 0.1, 12  # TILE: side, in patches, of the square of targets in one matrix product


def restrict_neighborhood(h, w, size_mask_neighborhood=12):
    """Mask [h·w, h·w] of the pairs of patches at most `size_mask_neighborhood` apart in each direction."""
    return window_mask(near(h, size_mask_neighborhood), near(w, size_mask_neighborhood))


def near(number, distance, device=None):
    """Mask [number, number] of the pairs of indices at most `distance` apart."""
    indices = torch.arange(number, device=device)
    return (indices[:, None] - indices).abs() <= distance


def window_mask(near_rows, near_columns):
    """Mask [a·b, A·B] of pairs of patches that are near in rows [a, A] and in columns [b, B]."""
    return (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)


def propagate(features, sources, labels, size, topk, mask=None):
    """Labels [h, w, C] of a frame's patches: a weighted mean of the `topk` most similar patches in n labeled frames.

    `features` [h, w, D] and `sources` [n, h, w, D] are L2-normalized; `labels` are [n, h, w, C]. A source has weight
    exp(cosine / 0.1); the weights of a target sum to 1. Sources are at most `size` patches away in each direction (0:
    no limit), or where `mask` [h·w, h·w] or [n, h·w, h·w], [target, source], is not 0. See section 4.2.2.
    """
    h, w, classes = labels.shape[1:]
    reach = size if size and mask is None else max(h, w)
    near_rows, near_columns = (near(side, reach, features.device) for side in (h, w))
    masks = None if mask is None else mask.to(features.device).bool().reshape(-1, h, w, h, w)
    propagated = labels.new_empty(h, w, classes)
    # One matrix product per square of targets, with all sources in any of their windows. The windows overlap so much
    # that this is faster than one product per target, and needs far less memory than one product for all of them.
    for top in range(0, h, TILE):
        for left in range(0, w, TILE):
            target = slice(top, top + TILE), slice(left, left + TILE)
            source = slice(max(top - reach, 0), top + TILE + reach), slice(max(left - reach, 0), left + TILE + reach)
            candidates = sources[:, source[0], source[1]].flatten(1, 2)  # [n, S, D]
            similarity = features[target].flatten(0, 1) @ candidates.flatten(0, 1).T  # [T, n·S]
            if mask is None:
                rows, columns = near_rows[target[0], source[0]], near_columns[target[1], source[1]]
                allowed = window_mask(rows, columns)[None]  # [1, T, S]
            else:
                allowed = masks[(slice(None), *target, *source)].flatten(3).flatten(1, 2)  # [1 or n, T, S]
            similarity.unflatten(1, (len(sources), -1)).masked_fill_(~allowed.transpose(0, 1), -math.inf)
            best, places = similarity.topk(min(topk, similarity.shape[1]), dim=1)  # [T, k]
            weights = (best / TEMPERATURE).softmax(dim=1)[..., None]
            nearest = labels[:, source[0], source[1]].flatten(0, 2)[places]  # [T, k, C]
            propagated[target] = (weights * nearest).sum(dim=1).view_as(propagated[target])
    return propagated


@torch.no_grad()
def label_propagation(args, model, frame_tar, list_frame_feats, list_segs, mask_neighborhood=None):
    """One step with the public signature: (labels [1, C, h, w], features [D, h·w], mask_neighborhood) of `frame_tar`.

    `frame_tar` is normalized, [3, H, W]. The n source frames are given by features [D, h·w] and labels [1, C, h, w].
    Reads args.topk and args.size_mask_neighborhood; `mask_neighborhood`, [h·w, h·w] or n of these, replaces the latter.
    """
    feat_tar, h, w = extract_feature(model, frame_tar, return_h_w=True)  # [h·w, D]
    sources = torch.stack(list_frame_feats).transpose(1, 2).unflatten(1, (h, w)).contiguous()  # [n, h, w, D]
    labels = torch.cat(list_segs).to(feat_tar.device).permute(0, 2, 3, 1)  # [n, h, w, C]
    targets = F.normalize(feat_tar, dim=-1).unflatten(0, (h, w))
    sources, window = F.normalize(sources, dim=-1), args.size_mask_neighborhood
    seg_tar = propagate(targets, sources, labels, window, args.topk, mask_neighborhood)
    return seg_tar.permute(2, 0, 1)[None], feat_tar.T, mask_neighborhood


def norm_mask(mask):
    """Rescale each channel of [C, H, W] to the range 0 to 1. Channels without positive values stay unchanged."""
    lowest, highest = mask.amin(dim=(1, 2), keepdim=True), mask.amax(dim=(1, 2), keepdim=True)
    extent = torch.where(highest > lowest, highest - lowest, 1)
    return torch.where(highest > 0, (mask - lowest) / extent, mask)


def full_size_labels(seg, patch_size, height, width):
    """Labels [height, width] uint8 of a frame's pixels, from soft labels [h, w, C] of its patches."""
    maps = F.interpolate(seg.permute(2, 0, 1)[None], scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    labels = norm_mask(maps).argmax(dim=0).byte().cpu().numpy()
    return np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def eval_video_tracking_davis(args, model, frame_list, video_dir, first_seg, seg_ori, color_palette=None):
    """Segment a video: returns the labels [H, W] uint8 of all frames, and writes them as PNG files.

    Their folder is named after `video_dir`, and holds all of them or none. `first_seg` [1, C, h, w] and `seg_ori`
    [H, W] are the first annotation, as returned by `read_seg`. Raises UserError.
    """
    inputs = dino_checkpoints.photograph_inputs(args.pretrained_weights)
    mean_std = FRAME_MEAN_STD if inputs == utils.RGB else (inputs.mean, inputs.std)
    first, history, masks = [], deque(maxlen=args.n_last_frames), []  # sources: (features [h, w, D], labels [h, w, C])
    with whole_folder(Path(args.output_dir) / Path(video_dir).name) as folder:
        for path, features in zip(frame_list, frame_features(model, frame_list, args.bs, mean_std), strict=True):
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
    """Pixels of a mask [H, W] bool that differ from the neighbor to the right, below, or below right."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != diagonal)


def boundary_accuracy(mask, truth, bound_th=0.008):
    """F: harmonic mean of the precision and recall of a mask's boundary. 0 if one mask has no boundary, 1 if both.

    The tolerance is `bound_th` of the image diagonal, rounded up to whole pixels.
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
    """{mean, recall: share above 0.5, decay: mean of the first quarter - mean of the last} of one score per frame."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    decay = np.mean(values[: ends[1] + 1]) - np.mean(values[ends[3] :])
    return {"mean": np.mean(values), "recall": np.mean(np.array(values) > 0.5), "decay": decay}


def score_video(masks, annotations):
    """{object label: {"J": statistics, "F": statistics}} of label images [H, W] and the annotation files.

    Objects are the labels of the first annotation; void is background. The first and the last frame do not count.
    """
    truths = [np.where(labels == dino_images.VOID, 0, labels) for labels in map(dino_images.read_labels, annotations)]
    pairs = list(zip(masks, truths, strict=True))[1:-1]
    scores = {}
    for label in sorted(set(np.unique(truths[0]).tolist()) - {0}) if pairs else ():
        objects = [(mask == label, truth == label) for mask, truth in pairs]
        scores[label] = {"J": statistics([region_similarity(*masks) for masks in objects])}
        scores[label]["F"] = statistics([boundary_accuracy(*masks) for masks in objects])
    return scores


def mean_scores(scores):
    """Means over objects: {"J&F": number, "J": statistics, "F": statistics}."""
    keys = ("mean", "recall", "decay")
    means = {name: {key: float(np.mean([score[name][key] for score in scores])) for key in keys} for name in "JF"}
    return {"J&F": (means["J"]["mean"] + means["F"]["mean"]) / 2, **means}


# ---- the evaluation ----


def main(args):
    """Segment all videos, and score the annotated ones. Raises UserError."""
    dino_checkpoints.follow_run(args)
    check_args(args)
    videos = find_videos(args.data_path, args.output_dir)
    dino_cli.check_output_dir(args.output_dir, files=("results.json",))
    utils.fix_random_seeds(0)
    model, _ = dino_backbones.frozen_backbone(args, utils.pick_device(args.device))
    scores = {}  # per object
    for number, (name, frames, annotations) in enumerate(videos, start=1):
        start = time.time()
        masks = eval_video_tracking_davis(args, model, frames, name, *read_seg(annotations[0], args.patch_size))
        speed = len(frames) / (time.time() - start)
        line = f"[{number}/{len(videos)}] {name}: {len(frames)} frames, {speed:.2f} frames/s"
        if all(map(os.path.exists, annotations)) and (found := score_video(masks, annotations)):
            line += f", J&F {mean_scores(found.values())['J&F']:.3f}"
            scores |= {f"{name}_{label}": mean_scores([score]) for label, score in found.items()}
        print(line, flush=True)
    if not scores:
        print(f"no scores: no video has annotated objects in all frames. The masks are in {args.output_dir}")
        return
    scored = {name.rpartition("_")[0] for name in scores}
    print(f"scores of {len(scored)} of {len(videos)} videos, {len(scores)} objects")
    report({"mean": mean_scores(scores.values()), "objects": scores}, args.output_dir)


def report(results, output_dir):
    """Print one line of scores per object, and write all of them to results.json."""
    rows = {**results["objects"], "mean": results["mean"]}
    width = max(map(len, rows))
    keys = [(name, key) for name in "JF" for key in results["mean"][name]]
    print(" " * width + "    J&F" + "".join(f"{f'{name}-{key}':>10}" for name, key in keys))
    for row, score in rows.items():
        print(f"{row:{width}}{score['J&F']:7.3f}" + "".join(f"{score[name][key]:10.3f}" for name, key in keys))
    content = json.dumps(results, indent=1).encode()
    utils.write_whole(Path(output_dir) / "results.json", lambda file: file.write(content))


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
