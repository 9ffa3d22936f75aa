"""Video of a ViT's attention: where the CLS token attends in the last block, frame by frame.

    python video_generation.py --input_path dog.mp4 --output_path out                            # published ViT-S/8
    python video_generation.py --input_path frames --pretrained_weights runs/vits16 --output_path out
    python video_generation.py --input_path out/attention --video_only --output_path out         # only encode images

--input_path is a video, a folder of frames or, with --video_only, a folder of attention images. Writes
attention/attn-*.jpg (mean over heads), masks/mask-*.jpg (the frame, darkened outside the smallest set of patches that
holds --threshold of the attention), video.mp4 or video.avi (the attention images) and, for an input video,
frames/frame-*.jpg.
"""

import argparse
import os
import re
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_data
import dino_features
import dino_images
import utils
from dino_cli import at_least, between, share
from utils import UserError

# ---- arguments ----


def share_or_none(text):
    """argparse type of --threshold: a share from 0 to 1; `none` means 0."""
    return 0.0 if text.lower() == "none" else share(text)


share_or_none.range = share.range


DEFAULT_FPS = 30.0  # for inputs without a frame rate, such as folders


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    flags = dino_cli.model_flags(patch_size=8)
    parser = argparse.ArgumentParser("Video of self-attention", add_help=False, parents=[flags])
    # fmt: off
    parser.add_argument("--input_path", required=True, metavar="PATH", help="""A video, or a folder of frames,
        sorted by the numbers in their names. With --video_only, a folder of attention images.""")
    parser.add_argument("--output_path", default="./", metavar="DIR", help="Folder for the video and its images.")
    parser.add_argument("--threshold", default=0.6, type=share_or_none, metavar="SHARE", help="""Masks keep the
        smallest set of patches with this share of the attention. A lower value keeps less. 0 or none: no masks.""")
    parser.add_argument("--resize", default=None, nargs="+", type=at_least(1), metavar="PIXELS", help="""Resize the
        frames: one number sets the shorter side, two numbers set height and width. Smaller frames are faster, with
        coarser maps.""")
    parser.add_argument("--video_only", action="store_true",
        help="Only encode the images of --input_path as a video, without a network.")
    parser.add_argument("--fps", default=DEFAULT_FPS, type=between(0.01, 1000, float), metavar="N",
        help="Frames per second of the output. With the default, an input video keeps its own timing.")
    parser.add_argument("--video_format", default="mp4", choices=["mp4", "avi"],
        help="mp4: H.264, for browsers and slides. avi: MPEG-4 Part 2, for old players.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for flags that do not fit together."""
    if args.resize is not None:
        if len(args.resize) > 2:
            sizes = " ".join(map(str, args.resize))
            raise UserError(f"--resize {sizes} has more than two numbers. Set the shorter side, or height and width")
        if args.video_only:
            raise UserError("--video_only does not change the images. Remove --resize")
    dino_backbones.check_vit(args.arch, "CLS token that attends to patches")


def check_paths(args):
    """Raise UserError if --input_path does not exist or would be overwritten, or if --output_path can't be written."""
    source, target = Path(args.input_path), Path(args.output_path)
    if not source.exists():
        raise UserError(f"--input_path {source} does not exist. Name a video or a folder")
    if args.video_only and not source.is_dir():
        raise UserError(f"--input_path {source} is a file. --video_only needs a folder of attention images")
    video = f"video.{args.video_format}"
    written = [(target / name).resolve() for name in ("attention", "masks", video)]
    if not args.video_only and source.resolve() in written:
        raise UserError(f"--input_path {source} would be overwritten. Use another --output_path")
    dino_cli.check_output_dir(target, "--output_path", [video])
    for name in ("frames", "attention", "masks"):
        if (target / name).exists():
            dino_cli.check_output_dir(target / name, "--output_path")


# ---- frames ----


def frame_files(folder):
    """Paths of the images in a folder, in order. Raises UserError if there are none, or if two have the same stem.

    Output files are named after the stems.
    """
    paths = dino_data.image_files(folder, "--input_path")
    stems = {}
    for path in paths:
        other = stems.setdefault(path.stem, path)
        if other != path:
            raise UserError(f"{other} and {path.name} have the same name. Rename or remove one")
    return paths


def check_frames(paths, resize_to=None):
    """Raise UserError if an image is damaged, or if sizes differ and `resize_to` does not make them equal."""
    first = None
    for path in paths:
        size = dino_images.load_image(path).size
        first = first or size
        if size != first and (resize_to is None or len(resize_to) == 1):
            sizes = f"{path} has {size[0]} × {size[1]} pixels, {paths[0]} has {first[0]} × {first[1]}"
            raise UserError(f"{sizes}. Use images of one size, or --resize HEIGHT WIDTH for frames")


# FFmpeg formats that are lists of other files or URLs. They are excluded, because a video must not open anything else.
PLAYLISTS = frozenset(("concat", "concatf", "dash", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "webm_dash_manifest"))


def extract_frames(path, folder):
    """Write each frame of a video to folder/frame-00000.jpg, ...; returns (their paths, frames per second).

    If the rate varies, the second is a list: the seconds at which each frame is shown. Raises UserError if the file is
    not a video, or is damaged.
    """
    import av

    os.makedirs(folder)
    paths, times = [], []
    try:
        formats = ",".join(sorted(av.formats_available - PLAYLISTS))
        options = {"format_whitelist": formats, "protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=options) as container:  # `file:`, because a name may contain a colon
            # FFmpeg also opens single images and plain text as videos.
            if not container.streams.video or re.search(r"image|_pipe$|^tty$", container.format.name):
                raise UserError(f"--input_path {path} is not a video. Use a video, or a folder of frames")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # several threads do not report damaged frames
            rate = float(stream.average_rate or DEFAULT_FPS)
            for frame in progress(container.decode(stream), "reading frames", stream.frames or None):
                if frame.is_corrupt:
                    raise UserError(
                        f"--input_path {path}: frame {len(paths)} is damaged. Is it complete? Repair it, or cut it"
                    )
                paths.append(Path(folder, f"frame-{len(paths):05}.jpg"))
                times.append(frame.time)
                image = frame.to_image()
                if frame.rotation:  # degrees counterclockwise, stored by phones
                    image = image.rotate(frame.rotation, expand=True)
                image.save(paths[-1], quality=95)
            if len(paths) < stream.frames:
                utils.log(f"warning: {path} declares {stream.frames} frames, but only {len(paths)} can be read")
    except (av.FFmpegError, OSError) as e:
        where = f" after frame {len(paths)}" if paths else ""
        raise UserError(f"can't read --input_path {path} as a video{where}: {e.strerror}. Is it complete?") from e
    if not paths:
        raise UserError(f"--input_path {path} has no frames. Use another video")
    return paths, times if is_variable(times, rate) else rate


def is_variable(times, rate):
    """Whether frames are shown more than half a frame before or after a constant rate would show them."""
    if None in times:
        return False
    return any(abs((time - times[0]) * rate - i) > 0.5 for i, time in enumerate(times))


# ---- attention ----

FRAMES_AT_ONCE = 8  # per forward pass


def attention_images(model, paths, folder, args, inputs):
    """Yield the attention map of each frame, [H, W, 3] uint8. Write it, and the mask, to subfolders of `folder`.

    Raises UserError if the attention is not finite.
    """
    from matplotlib import colormaps

    os.makedirs(os.path.join(folder, "attention"))
    if args.threshold:
        os.makedirs(os.path.join(folder, "masks"))
    bar = progress(paths, "attention", len(paths))
    for start in range(0, len(paths), FRAMES_AT_ONCE):
        batch = paths[start : start + FRAMES_AT_ONCE]
        images = map(dino_images.load_image, batch)
        frames = torch.stack([dino_features.prepare(image, args.resize, args.patch_size) for image in images])
        frames_seen = inputs.normalize(frames.to(model.pos_embed.device))
        attention = dino_features.cls_attention(model, frames_seen)  # [B, heads, h, w]
        attention = attention.float().cpu()
        if not attention.isfinite().all():
            raise UserError("the attention is not finite: the weights are damaged, or training diverged")
        means = attention.mean(dim=1)
        masks = dino_features.largest_mass(means, args.threshold) if args.threshold else [None] * len(batch)
        for path, frame, mean, mask in zip(batch, frames, means, masks, strict=True):
            from_0_to_1 = (mean - mean.min()) / (mean.max() - mean.min()).clamp(min=1e-12)
            colors = colormaps["inferno"](from_0_to_1.numpy(), bytes=True)[..., :3]
            image = dino_features.to_pixels(colors, args.patch_size)
            Image.fromarray(image).save(os.path.join(folder, "attention", f"attn-{path.stem}.jpg"), quality=95)
            if mask is not None:
                mask = dino_features.to_pixels(mask, args.patch_size)
                masked = dino_features.draw_mask(frame.permute(1, 2, 0).numpy(), mask, divisor=4)
                Image.fromarray(masked).save(os.path.join(folder, "masks", f"mask-{path.stem}.jpg"), quality=95)
            yield image
            bar.update()
    bar.close()


# ---- video ----


def write_video(path, images, fps):
    """Write images [H, W, 3] uint8, all of one size, as a video. Returns their number.

    `fps` are frames per second, or a list of the seconds at which images are shown, counted from the first one.

    The extension selects the codec: .mp4 is H.264, with the index first so that it plays while loading; .avi is MPEG-4
    Part 2. An odd height or width is padded by one pixel, because both codecs store color at half the resolution.
    """
    import av
    from av.video.reformatter import Colorspace

    if str(path).endswith(".mp4"):
        codec, quality, layout, ticks = "libx264", {"crf": "18"}, {"movflags": "faststart"}, 1000
    else:
        codec, quality, layout, ticks = "mpeg4", {"qmin": "2", "qmax": "2"}, {}, 100  # each takes 24 bytes in AVI
    number, shown, times = 0, -1, fps if isinstance(fps, list) else None
    rate = ticks if times else Fraction(fps).limit_denominator(1001)
    with av.open(f"file:{path}", "w", options=layout) as container:
        stream = container.add_stream(codec, rate=rate, options=quality)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU601  # explicit: players assume BT.709 for large videos
        for number, image in enumerate(images, start=1):
            height, width = image.shape[:2]
            even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if number == 1:
                stream.height, stream.width = even.shape[:2]
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            if times:
                shown = max(round((times[number - 1] - times[0]) * ticks), shown + 1)
                frame.pts, frame.time_base = shown, Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return number


# ---- the run ----


def progress(items, label, total):
    """Progress bar over items, on stderr."""
    from tqdm import tqdm

    return tqdm(items, label, total, unit="frame", file=sys.stderr)


def publish(building, output_path):
    """Move all files from the temporary folder to `output_path`, the video last. Replaces files of the same names."""
    for folder in sorted(path for path in Path(building).iterdir() if path.is_dir()):
        target = Path(output_path, folder.name)
        target.mkdir(exist_ok=True)
        new = {path.name for path in folder.iterdir()}
        prefix = min(new).split("-")[0]
        old = [path.name for path in target.glob(f"{prefix}-*.jpg") if path.name not in new]
        for name in new:
            os.replace(folder / name, target / name)
        if old:
            utils.log(f"warning: {target} also has {len(old)} {prefix}-*.jpg of an earlier run, such as {min(old)}")
    for path in Path(building).iterdir():
        if path.is_file():
            os.replace(path, Path(output_path, path.name))


def main(args):
    """Write the attention images and the video. Raises UserError."""
    if not args.video_only:
        dino_checkpoints.follow_run(args, follow_size=False)
    check_args(args)
    check_paths(args)
    fps = args.fps
    with tempfile.TemporaryDirectory(prefix=".video-", dir=args.output_path) as building:
        video = os.path.join(building, f"video.{args.video_format}")
        if args.video_only:
            paths = frame_files(args.input_path)
            check_frames(paths)
            images = (np.asarray(dino_images.load_image(path)) for path in progress(paths, "writing", len(paths)))
        else:
            device = utils.pick_device(args.device)
            if os.path.isdir(args.input_path):
                paths = frame_files(args.input_path)
            else:
                paths, rate = extract_frames(args.input_path, os.path.join(building, "frames"))
                fps = rate if args.fps == DEFAULT_FPS else args.fps
            check_frames(paths, args.resize)
            # Fail before any work if frames are too small. All have one size here.
            dino_features.prepare(dino_images.load_image(paths[0]), args.resize, args.patch_size)
            utils.fix_random_seeds(0)  # an untrained network has the same weights in every run
            inputs = dino_checkpoints.photograph_inputs(args.pretrained_weights)
            model, _ = dino_backbones.frozen_backbone(args, device, part="attention", inputs=inputs)
            images = attention_images(model, paths, building, args, inputs)
        number = write_video(video, images, fps)
        publish(building, args.output_path)
    utils.log(f"{number} frames: {os.path.join(args.output_path, os.path.basename(video))}")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
