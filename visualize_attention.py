"""Attention maps of a ViT: which patches the CLS token attends to in the last block (figures 1, 3 and 8 of the paper).

    python visualize_attention.py --output_dir out                               # published ViT-S/8, example photograph
    python visualize_attention.py --image_path cat.jpg --threshold 0.6 --output_dir out
    python visualize_attention.py --pretrained_weights runs/vits16 --image_path photos

Writes img.png (the input), attn-head{h}.png (one map per head), overview.png (all of them on one page) and heads.png
(each head in a color). --threshold adds mask_th{t}_head{h}.png: the smallest set of patches that holds this share of a
head's attention. --points adds attn-point{n}.png: where these points of the image attend to (figure 8). With several
images, each gets a folder.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import resize
from torchvision.utils import save_image

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_crops
import dino_data
import dino_features
import dino_files
import dino_images
import dino_sample
import utils
from dino_cli import at_least, between
from utils import UserError

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    flags = [dino_cli.model_flags(patch_size=8), dino_cli.exif_flag()]
    parser = argparse.ArgumentParser("Visualize self-attention", add_help=False, parents=flags)
    # fmt: off
    parser.add_argument("--image_path", default=None, nargs="+", metavar="PATH", help="""Images or folders of
        images. Default: an example photograph that comes with scikit-image.""")
    parser.add_argument("--image_size", default=[480, 480], nargs="+", type=at_least(1), metavar="PIXELS",
        help="""Resize the image to this height and width; one number sets the shorter side. More pixels or smaller
        patches give finer maps, but time grows with the square of the number of patches.""")
    parser.add_argument("--threshold", default=None, type=between(1e-06, 1, float), metavar="SHARE",
        help="Also draw the smallest set of patches with this share of the attention. 0.6 often shows the object.")
    parser.add_argument("--points", default=[], nargs="+", type=between(0, 1, float), metavar="X Y", help="""Also draw
        the attention of the patches at these points. X and Y are shares of width and height, from the top left corner:
        0.5 0.5 is the middle.""")
    parser.add_argument("--output_dir", default=".", metavar="DIR", help="Folder for the pictures.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for flags that do not fit together."""
    dino_backbones.check_vit(args.arch, "CLS token that attends to patches")
    size = " ".join(map(str, args.image_size))
    if len(args.image_size) > 2:
        raise UserError(f"--image_size {size} has more than two numbers. Set height and width, or the shorter side")
    if len(args.points) % 2:
        raise UserError(f"--points has {len(args.points)} numbers. Give an X and a Y for each point")
    if min(args.image_size) < args.patch_size:
        raise UserError(f"--image_size {size} is smaller than one patch (--patch_size {args.patch_size}). Raise it")


# ---- images ----

EXAMPLE = "astronaut.png"  # 512 × 512 pixels, from scikit-image


def find_images(image_path):
    """Paths of the images in --image_path, folders replaced by all images below them, as in training.

    Raises UserError if there are none.
    """
    if image_path is None:
        return list(map(Path, dino_sample.find_photographs([EXAMPLE])))
    found = []
    for path in map(Path, image_path):
        if path.is_dir():
            below = dino_files.find_images(path, data_format="flat", flag="--image_path").names()
            folders = dict.fromkeys(os.path.dirname(name) for name in below)
            found += [image for folder in folders for image in dino_data.image_files(folder, "--image_path")]
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--image_path {path} does not exist. Name an image or a folder")
    return found


def output_folders(paths, output_dir):
    """One folder per image: `output_dir` for a single image, otherwise a subfolder with the name of the image.

    Equal names get a number. Upper and lower case are equal, because many file systems do not distinguish them.
    """
    if len(paths) == 1:
        return [Path(output_dir)]
    taken, folders = set(), []
    for path in paths:
        name, number = path.stem, 2
        while name.casefold() in taken:
            name, number = f"{path.stem}-{number}", number + 1
        taken.add(name.casefold())
        folders.append(Path(output_dir, name))
    return folders


def check_folders(folders, names, inputs):
    """Create the folders. Raises UserError if files of these names can't be written, or would overwrite an input."""
    inputs = {path.resolve() for path in inputs}
    for folder in folders:
        dino_cli.check_output_dir(folder, files=names)
        for name in names:
            if Path(folder, name).resolve() in inputs:
                raise UserError(f"--image_path {Path(folder, name)} would be overwritten. Use another --output_dir")


def load(path, args, inputs):
    """(image to show, uint8 [3, H, W], input of the network, normalized floats [C, H, W]) for an image file."""
    if inputs.in_chans == 3:
        shown = dino_features.prepare(dino_images.load_image(path, args.exif), args.image_size, args.patch_size)
        return shown, inputs.normalize(shown)
    values = dino_images.planes(dino_images.open_image(path, args.exif), inputs)
    values = resize(values, args.image_size, antialias=True)
    height, width = (side - side % args.patch_size for side in values.shape[1:])
    values = values[:, :height, :width]
    return (255 * values).round().byte().expand(3, -1, -1), inputs.normalize(dino_crops.to_int16(values))


# ---- pictures ----

YELLOW = (255, 220, 0)


def picture_names(heads, threshold, points=0):
    """File names of the pictures of one image, in the order in which `write_pictures` draws them."""
    masks = [] if threshold is None else [f"mask_th{threshold}_head{head}.png" for head in range(heads)]
    drawn = [f"attn-head{head}.png" for head in range(heads)] + masks + [f"attn-point{n}.png" for n in range(points)]
    return ["img.png", *drawn, "heads.png", "overview.png"]


def write_pictures(folder, image, attention, patch_size, threshold=None, points=()):
    """Write all pictures of an image, uint8 [3, H, W], with attention [heads, H / patch, W / patch], to `folder`.

    `points` has ((row, column) of a patch, its attention [H / patch, W / patch]) per reference point. Draws them in a
    temporary folder first, so that an interrupted run leaves no partial result.
    """
    from matplotlib.image import imsave

    pixels = image.permute(1, 2, 0).numpy()  # [H, W, 3]
    with tempfile.TemporaryDirectory(prefix=".attention-", dir=folder) as building:
        names = picture_names(len(attention), threshold, len(points))
        paths = iter([os.path.join(building, name) for name in names])
        save_image(utils.normalize(image), next(paths), normalize=True, scale_each=True)
        for head in attention:
            imsave(next(paths), dino_features.to_pixels(head, patch_size), cmap="viridis")
        if threshold is not None:
            for mask in dino_features.largest_mass(attention, threshold):
                mask = dino_features.to_pixels(mask, patch_size)
                drawn = dino_features.draw_mask(pixels, mask, divisor=3, outline=YELLOW)
                Image.fromarray(drawn).save(next(paths))
        for patch, of_point in points:
            imsave(next(paths), draw_point(pixels, patch, of_point, patch_size))
        imsave(next(paths), draw_heads(pixels, attention, patch_size, threshold or SHARE))
        draw_overview(pixels, attention).savefig(next(paths))
        for name in names:
            os.replace(os.path.join(building, name), os.path.join(folder, name))


SHARE = 0.6  # of a head's attention that its color covers in heads.png, as in figure 3


def draw_heads(pixels, attention, patch_size, share):
    """The image [H, W, 3], gray, where each head of `attention` [heads, h, w] colors the patches with most of its mass.

    A patch of several heads has the color of the head for which it is the most important.
    """
    from matplotlib import colormaps

    heads = len(attention)
    colors = colormaps["hsv"](np.arange(heads) / heads)[:, :3]  # [heads, 3], 0 to 1
    masks = dino_features.largest_mass(attention, share)
    strongest = (attention / attention.amax(dim=(1, 2), keepdim=True) * masks).argmax(dim=0)  # [h, w]
    gray = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2) / 255
    tint = dino_features.to_pixels(colors[strongest.numpy()], patch_size)
    covered = dino_features.to_pixels(masks.any(dim=0), patch_size)[..., None]
    return np.where(covered, 0.4 * gray + 0.6 * tint, gray)


def draw_point(pixels, patch, attention, patch_size):
    """The image [H, W, 3] with the attention [h, w] of a patch (row, column) over it, and the patch in red.

    The brightest color is for the largest hundredth: a single patch would leave the others dark.
    """
    from matplotlib import colormaps

    heat = dino_features.to_pixels((attention / attention.quantile(0.99)).clamp(max=1), patch_size)
    drawn = 0.4 * pixels / 255 + 0.6 * colormaps["viridis"](heat)[..., :3]
    top, left = (patch_size * position for position in patch)
    drawn[top : top + patch_size, left : left + patch_size] = (1, 0, 0)
    return drawn


def draw_overview(pixels, attention):
    """A matplotlib figure of the image [H, W, 3], the mean over heads, and each head of `attention` [heads, h, w].

    The colors of each map span its own minimum to maximum.
    """
    from matplotlib.figure import Figure

    tiles = {"image": pixels, "mean of heads": attention.mean(dim=0).numpy()}
    tiles |= {f"head {number}": head.numpy() for number, head in enumerate(attention)}
    height, width = pixels.shape[:2]
    # The grid with the aspect ratio closest to 16:9. Each number of rows has the fewest columns possible.
    grids = {math.ceil(len(tiles) / columns): columns for columns in range(len(tiles), 0, -1)}
    rows, columns = min(grids.items(), key=lambda grid: abs(math.log(grid[1] * width * 9 / (grid[0] * height * 16))))
    scale = 2.4 / math.sqrt(height * width)  # inches per pixel
    size = (columns * (width * scale + 0.1), rows * (height * scale + 0.35))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (label, tile) in zip(axes, tiles.items(), strict=False):
        axis.imshow(tile, cmap="viridis", interpolation="nearest")
        axis.set_title(label, fontsize=11)
    for axis in axes:
        axis.axis("off")
    return figure


# ---- the run ----


def attention_of_points(model, images, points):
    """Yield ((row, column), attention [h, w], the mean over heads) of the patch at each point X, Y of one image."""
    rows, columns = (side // model.patch_embed.patch_size for side in images.shape[-2:])
    for x, y in zip(points[::2], points[1::2], strict=True):
        row, column = min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)
        attention = dino_features.cls_attention(model, images, token=1 + row * columns + column)
        yield (row, column), attention[0].float().mean(dim=0).cpu()


def main(args):
    """Write the pictures of all images. Raises UserError."""
    trained = dino_checkpoints.follow_run(args, follow_size=False)
    if trained and "image_size" not in getattr(args, "given", vars(args)):  # whole patches: nothing is cropped
        args.image_size = [max(side // args.patch_size, 1) * args.patch_size for side in args.image_size]
    check_args(args)
    paths = find_images(args.image_path)
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights)
    if inputs.in_chans not in (1, 3):
        channels = f"expects {inputs.in_chans} channels, but pictures have 1 or 3"
        raise UserError(f"--pretrained_weights {args.pretrained_weights} {channels}. Use report.py instead")
    for path in paths:  # find a damaged image before any work
        dino_images.decode(dino_images.open_image(path), inputs)
    dino_cli.check_output_dir(args.output_dir)
    device = utils.pick_device(args.device)
    utils.fix_random_seeds(0)  # an untrained network has the same weights in every run
    model, _ = dino_backbones.frozen_backbone(args, device, part="attention", inputs=inputs)
    folders = output_folders(paths, args.output_dir)
    names = picture_names(model.blocks[-1].attn.num_heads, args.threshold, len(args.points) // 2)
    check_folders(folders, names, paths)
    for path, folder in zip(paths, folders, strict=True):
        image, seen = load(path, args, inputs)
        attention = dino_features.cls_attention(model, seen[None].to(device))[0].float().cpu()
        if not attention.isfinite().all():
            raise UserError(f"the attention on {path} is not finite: the weights are damaged, or training diverged")
        points = list(attention_of_points(model, seen[None].to(device), args.points))
        write_pictures(folder, image, attention, args.patch_size, args.threshold, points)
        print(f"{path}: {len(attention)} heads, {attention.shape[1]} × {attention.shape[2]} patches, in {folder}")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
