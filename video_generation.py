"""A video of what a ViT looks at: the attention of CLS in the last block, frame by frame (the paper's project page).

    python video_generation.py --input_path dog.mp4 --output_path out --fps 25       # the published ViT-S/8
    python video_generation.py --input_path frames --arch vit_small --patch_size 16 --pretrained_weights runs/vits16/checkpoint.pth --output_path out
    python video_generation.py --input_path out/attention --video_only --output_path out   # put images together again

--input_path is a video, a folder of frames or, with --video_only, a folder of attention images. Writes
attention/attn-*.jpg, the mean over heads; masks/mask-*.jpg, the frame with all but the patches that hold --threshold of
that attention darkened; of a video frames/frame-*.jpg; and video.mp4 (or .avi), the attention images in motion.
"""  # noqa: E501 - a command stands on one line

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
from torchvision.transforms.functional import pil_to_tensor, resize

import dino_backbones
import dino_cli
import dino_data
import dino_features
import dino_images
import utils
from dino_cli import at_least, between, share
from utils import UserError

# ---- arguments ----


def share_or_none(text):
    """argparse type of --threshold: a share, or none for 0."""
    return 0.0 if text.lower() == "none" else share(text)


share_or_none.range = share.range


OWN_RATE = 30.0  # frames a second where the input has no rate of its own, as folders have none


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    flags = dino_cli.model_flags(patch_size=8)
    parser = argparse.ArgumentParser("Video of self-attention", add_help=False, parents=[flags])
    # fmt: off
    parser.add_argument("--input_path", required=True, metavar="PATH", help="""A video, or a folder of frames, which are
        taken in the order of the numbers in their names. With --video_only, a folder of attention images.""")
    parser.add_argument("--output_path", default="./", metavar="DIR", help="Where the video and its images go.")
    parser.add_argument("--threshold", default=0.6, type=share_or_none, metavar="SHARE", help="""The masks keep the
        fewest patches that hold this share of the attention: lower keeps less of the frame. 0 or none: no masks.""")
    parser.add_argument("--resize", default=None, nargs="+", type=at_least(1), metavar="PIXELS", help="""Resize the
        frames: one number is their shorter side, two are height and width. Fewer pixels take less time and show
        less.""")
    parser.add_argument("--video_only", action="store_true",
        help="No network: only put the images of --input_path together.")
    parser.add_argument("--fps", default=OWN_RATE, type=between(0.01, 1000, float), metavar="N",
        help="Frames a second of the video that is written. At the default, a video that was read in keeps its own.")
    parser.add_argument("--video_format", default="mp4", choices=["mp4", "avi"],
        help="mp4 is H.264, which browsers and slides play; avi is MPEG-4 part 2, for old players.")
    # fmt: on
    return parser


def check_args(args):
    if args.resize is not None:
        if len(args.resize) > 2:
            sizes = " ".join(map(str, args.resize))
            raise UserError(f"--resize {sizes}: give the shorter side, or height and width")
        if args.video_only:
            raise UserError("--video_only takes the images as they are: leave out --resize")
    dino_backbones.check_arch(args.arch)
    if not dino_backbones.vit_factory(args.arch):
        raise UserError(f"--arch {args.arch} has no CLS token that attends to patches. Take one of the vit_ networks")


def check_paths(args):
    """Raise UserError if there is nothing to read at --input_path, or if --output_path can't be written."""
    source, target = Path(args.input_path), Path(args.output_path)
    if not source.exists():
        raise UserError(f"--input_path {source}: there is no such file or folder")
    if args.video_only and not source.is_dir():
        raise UserError(f"--input_path {source}: --video_only needs a folder of attention images")
    video = f"video.{args.video_format}"
    written = [(target / name).resolve() for name in ("attention", "masks", video)]
    if not args.video_only and source.resolve() in written:
        raise UserError(f"--input_path {source} would be overwritten. Name another --output_path")
    dino_cli.check_output_dir(target, "--output_path", [video])
    for name in ("frames", "attention", "masks"):
        if (target / name).exists():
            dino_cli.check_output_dir(target / name, "--output_path")


# ---- frames ----


def frame_files(folder):
    """The images in a folder, in order. Raises UserError if there are none, or two of one name."""
    paths = dino_data.image_files(folder, "--input_path")
    stems = {}
    for path in paths:
        other = stems.setdefault(path.stem, path)
        if other != path:
            raise UserError(f"{other} and {path.name} have one name: rename or remove one")
    return paths


def check_frames(paths, resize_to=None):
    """Raise UserError if an image is damaged, or of another size than the first where no --resize makes them equal."""
    first = None
    for path in paths:
        size = dino_images.load_image(path).size
        first = first or size
        if size != first and (resize_to is None or len(resize_to) == 1):
            raise UserError(
                f"{path} has {size[0]} × {size[1]} pixels, {paths[0]} has {first[0]} × {first[1]}. Make them all of "
                "one size, by --resize HEIGHT WIDTH if they are frames"
            )


# What FFmpeg takes for a video, and opens other files or addresses for.
PLAYLISTS = frozenset(("concat", "concatf", "dash", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "webm_dash_manifest"))


def extract_frames(path, folder):
    """Write each frame of a video as folder/frame-00000.jpg, ...; returns their paths, and the frames a second.

    Raises UserError if the file is no video, or damaged.
    """
    import av

    os.makedirs(folder)
    paths = []
    try:
        formats = ",".join(sorted(av.formats_available - PLAYLISTS))
        options = {"format_whitelist": formats, "protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=options) as container:  # `file:`, as a colon in a name is no protocol's
            # A single image and plain text count as videos there.
            if not container.streams.video or re.search(r"image|_pipe$|^tty$", container.format.name):
                raise UserError(f"--input_path {path} is not a video. Name one, or a folder of frames")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or OWN_RATE)
            for frame in progress(container.decode(stream), "reading frames", stream.frames or None):
                if frame.is_corrupt:
                    raise UserError(f"--input_path {path}: frame {len(paths)} is damaged. Repair it, or cut it out")
                paths.append(Path(folder, f"frame-{len(paths):05}.jpg"))
                image = frame.to_image()
                if frame.rotation:  # degrees counterclockwise, as phones note how they were held
                    image = image.rotate(frame.rotation, expand=True)
                image.save(paths[-1], quality=95)
            if len(paths) < stream.frames:
                utils.log(f"warning: {path} announces {stream.frames} frames, only {len(paths)} can be read")
    except (av.FFmpegError, OSError) as e:
        where = f" after frame {len(paths)}" if paths else ""
        raise UserError(f"can't read --input_path {path} as a video{where}: {e.strerror}. Is it complete?") from e
    if not paths:
        raise UserError(f"--input_path {path} has no frames in it")
    return paths, rate


def prepare(path, resize_to, patch_size):
    """The frame as uint8 [3, H, W], resized, less what is over behind the last whole patch."""
    image = dino_images.load_image(path)
    if resize_to is not None:
        image = resize(image, resize_to)
    height, width = (side - side % patch_size for side in (image.height, image.width))
    if not height or not width:
        size = f"{image.width} × {image.height}"
        raise UserError(f"{path} has {size} pixels, less than one patch (--patch_size {patch_size})")
    return pil_to_tensor(image)[:, :height, :width]


# ---- attention ----

FRAMES_AT_ONCE = 8  # in the network


def attention_images(model, paths, folder, args, device):
    """Yield the attention on each frame, [H, W, 3] uint8, and write it and its mask below `folder`.

    Raises UserError if the attention is not finite.
    """
    from matplotlib import colormaps

    os.makedirs(os.path.join(folder, "attention"))
    if args.threshold:
        os.makedirs(os.path.join(folder, "masks"))
    bar = progress(paths, "attention", len(paths))
    for start in range(0, len(paths), FRAMES_AT_ONCE):
        batch = paths[start : start + FRAMES_AT_ONCE]
        frames = torch.stack([prepare(path, args.resize, args.patch_size) for path in batch])  # [B, 3, H, W]
        attention = (
            dino_features.cls_attention(model, utils.normalize(frames.to(device))).float().cpu()
        )  # [B, heads, h, w]
        if not attention.isfinite().all():
            raise UserError("the attention is not finite: the network has diverged, or its weights are damaged")
        means = attention.mean(dim=1)
        masks = dino_features.largest_mass(means, args.threshold) if args.threshold else [None] * len(batch)
        for path, frame, mean, mask in zip(batch, frames, means, masks, strict=True):
            from_0_to_1 = (mean - mean.min()) / (mean.max() - mean.min()).clamp(min=1e-12)
            image = to_pixels(colormaps["inferno"](from_0_to_1.numpy(), bytes=True)[..., :3], args.patch_size)
            Image.fromarray(image).save(os.path.join(folder, "attention", f"attn-{path.stem}.jpg"), quality=95)
            if mask is not None:
                masked = darken(frame.permute(1, 2, 0).numpy(), to_pixels(mask.numpy(), args.patch_size))
                Image.fromarray(masked).save(os.path.join(folder, "masks", f"mask-{path.stem}.jpg"), quality=95)
            yield image
            bar.update()
    bar.close()


def to_pixels(patches, patch_size):
    """What each patch has, [h, w, ...], at all of its pixels: [h · patch, w · patch, ...]."""
    return patches.repeat(patch_size, axis=0).repeat(patch_size, axis=1)


def darken(pixels, mask):
    """The frame [H, W, 3], dark where the mask [H, W] is False."""
    return np.where(mask[..., None], pixels, pixels // 4)


# ---- video ----


def write_video(path, images, fps):
    """Write a video of images, [H, W, 3] uint8 and all of one size, taken one by one. Returns their number.

    The name's ending says how: .mp4 H.264, its index in front so that it plays while it loads; .avi MPEG-4 part 2.
    An odd height or width grows by a pixel that repeats the last: both codecs halve the resolution of colour.
    """
    import av
    from av.video.reformatter import Colorspace

    if str(path).endswith(".mp4"):
        codec, quality, layout = "libx264", {"crf": "18"}, {"movflags": "faststart"}
    else:
        codec, quality, layout = "mpeg4", {"qmin": "2", "qmax": "2"}, {}
    number = 0
    with av.open(f"file:{path}", "w", options=layout) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=quality)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU601  # said, because players take 709 for large videos
        for number, image in enumerate(images, start=1):
            height, width = image.shape[:2]
            even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if number == 1:
                stream.height, stream.width = even.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())
    return number


# ---- the run ----


def progress(items, what, total):
    """A progress bar over items, on stderr."""
    from tqdm import tqdm

    return tqdm(items, what, total, unit="frame", file=sys.stderr)


def publish(building, output_path):
    """Move all files to their places, over what an earlier run left there; the video last."""
    for folder in sorted(path for path in Path(building).iterdir() if path.is_dir()):
        target = Path(output_path, folder.name)
        target.mkdir(exist_ok=True)
        new = {path.name for path in folder.iterdir()}
        prefix = min(new).split("-")[0]
        old = [path.name for path in target.glob(f"{prefix}-*.jpg") if path.name not in new]
        for name in new:
            os.replace(folder / name, target / name)
        if old:
            utils.log(f"warning: {target} also has {len(old)} {prefix}-*.jpg of another run, such as {min(old)}")
    for path in Path(building).iterdir():
        if path.is_file():
            os.replace(path, Path(output_path, path.name))


def main(args):
    """Write the images and the video that `args` (see get_args_parser) ask for. Raises UserError."""
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
                fps = rate if args.fps == OWN_RATE else args.fps
            check_frames(paths, args.resize)
            prepare(paths[0], args.resize, args.patch_size)  # too small a frame is named before any work
            utils.fix_random_seeds(0)  # an untrained network is the same each time
            model, _ = dino_backbones.frozen_backbone(args, device, part="attention")
            images = attention_images(model, paths, building, args, device)
        number = write_video(video, images, fps)
        publish(building, args.output_path)
    utils.log(f"{number} frames: {os.path.join(args.output_path, os.path.basename(video))}")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
