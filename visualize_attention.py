"""What the heads of a ViT look at: the attention of CLS in the last block, as pictures (figures 1 and 3 of the paper).

    python visualize_attention.py --output_dir out                      # the published ViT-S/8 on a photograph from here
    python visualize_attention.py --image_path cat.jpg --threshold 0.6 --output_dir out
    python visualize_attention.py --arch vit_small --patch_size 16 --pretrained_weights runs/vits16/checkpoint.pth --image_path photos --output_dir out

Writes attn-head{h}.png for each head, img.png, what the network saw, and overview.png, all of them on one page; with
--threshold also mask_th{t}_head{h}.png, the fewest patches that hold that share of a head's attention. Several images
get a folder each.
"""  # noqa: E501 - a command stands on one line

import argparse
import math
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, resize
from torchvision.utils import save_image

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_crops
import dino_data
import dino_features
import dino_images
import utils
from dino_cli import at_least, between
from utils import UserError

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    flags = dino_cli.model_flags(patch_size=8)
    parser = argparse.ArgumentParser("Visualise self-attention", add_help=False, parents=[flags])
    # fmt: off
    parser.add_argument("--image_path", default=None, nargs="+", metavar="PATH", help="""Images, or folders of them.
        Without this flag a photograph that is installed already.""")
    parser.add_argument("--image_size", default=[480, 480], nargs="+", type=at_least(1), metavar="PIXELS",
        help="""Height and width to which the whole image is resized, one number for a square. More pixels, or smaller
        patches, give finer maps and take time that grows with the square of the number of patches.""")
    parser.add_argument("--threshold", default=None, type=between(1e-06, 1, float), metavar="SHARE",
        help="Also mark the fewest patches that hold this share of each head's attention; 0.6 shows objects well.")
    parser.add_argument("--output_dir", default=".", metavar="DIR", help="Where the pictures go.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for what can't work; make --image_size two numbers."""
    dino_backbones.check_arch(args.arch)
    if not dino_backbones.vit_factory(args.arch):
        raise UserError(f"--arch {args.arch} has no CLS token that attends to patches. Take one of the vit_ networks")
    if len(args.image_size) > 2:
        sizes = " ".join(map(str, args.image_size))
        raise UserError(f"--image_size {sizes}: give height and width, or one number for a square")
    args.image_size = [args.image_size[0], args.image_size[-1]]
    if min(args.image_size) < args.patch_size:
        size = f"{args.image_size[0]} {args.image_size[1]}"
        raise UserError(f"--image_size {size} is smaller than one patch (--patch_size {args.patch_size})")


# ---- images ----

EXAMPLE = "astronaut.png"  # 512 × 512 pixels, from scikit-image


def find_images(image_path):
    """The files that --image_path names, of a folder the images in it by name. Raises UserError if there are none."""
    if image_path is None:
        return list(map(Path, dino_data.find_photographs([EXAMPLE])))
    found = []
    for path in map(Path, image_path):
        if path.is_dir():
            found += dino_data.image_files(path, "--image_path")
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--image_path {path}: there is no such file or folder")
    return found


def output_folders(paths, output_dir):
    """A folder for each image: `output_dir` itself if there is one image, else named as the image in there.

    Images of one name are told apart by a number; upper and lower case count as the same, as on many disks.
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
    """Make the folders; raise UserError if files of these names can't be written there, or are inputs."""
    inputs = {path.resolve() for path in inputs}
    for folder in folders:
        dino_cli.check_output_dir(folder, files=names)
        for name in names:
            if Path(folder, name).resolve() in inputs:
                raise UserError(f"--image_path {Path(folder, name)} would be overwritten. Name another --output_dir")


def prepare(image, image_size, patch_size):
    """PIL image -> uint8 [3, H, W]: the whole image resized, less what is over behind the last whole patch."""
    height, width = image_size
    resized = pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized[:, : height - height % patch_size, : width - width % patch_size]


def load(path, args, inputs):
    """An image file as what to show, uint8 [3, H, W], and what the network sees, normalised floats [C, H, W]."""
    if inputs.in_chans == 3:
        shown = prepare(dino_images.load_image(path), args.image_size, args.patch_size)
        return shown, inputs.normalize(shown)
    height, width = (side - side % args.patch_size for side in args.image_size)
    values = dino_images.planes(dino_images.open_image(path), inputs)
    values = resize(values, args.image_size, antialias=True)[:, :height, :width]
    return (255 * values).round().byte().expand(3, -1, -1), inputs.normalize(dino_crops.to_int16(values))


# ---- pictures ----


def picture_names(heads, threshold):
    """Names of the pictures of an image, in the order in which they are made."""
    masks = [] if threshold is None else [f"mask_th{threshold}_head{head}.png" for head in range(heads)]
    return ["img.png", *(f"attn-head{head}.png" for head in range(heads)), *masks, "overview.png"]


def write_pictures(folder, image, attention, patch_size, threshold=None):
    """All pictures of one image, uint8 [3, H, W], with its attention [heads, H / patch, W / patch], into `folder`.

    They are made beside their place and moved there together.
    """
    from matplotlib.image import imsave

    pixels = image.permute(1, 2, 0).numpy()  # [H, W, 3]
    with tempfile.TemporaryDirectory(prefix=".attention-", dir=folder) as building:
        names = picture_names(len(attention), threshold)
        paths = iter([os.path.join(building, name) for name in names])
        save_image(utils.normalize(image), next(paths), normalize=True, scale_each=True)
        for head in attention:
            imsave(next(paths), to_pixels(head, patch_size), cmap="viridis")
        if threshold is not None:
            for mask in dino_features.largest_mass(attention, threshold):
                Image.fromarray(draw_mask(pixels, to_pixels(mask, patch_size))).save(next(paths))
        draw_overview(pixels, attention).savefig(next(paths))
        for name in names:
            os.replace(os.path.join(building, name), os.path.join(folder, name))


def to_pixels(patches, patch_size):
    """Each patch's number, [h, w], at all of its pixels: [h · patch, w · patch]."""
    return patches.repeat_interleave(patch_size, dim=0).repeat_interleave(patch_size, dim=1).numpy()


def draw_mask(pixels, mask):
    """The image [H, W, 3], dark where the mask [H, W] is False, with a line around what it keeps."""
    from skimage.segmentation import find_boundaries

    drawn = np.where(mask[..., None], pixels, pixels // 3)
    drawn[find_boundaries(mask, mode="thick")] = (255, 220, 0)
    return drawn


def draw_overview(pixels, attention):
    """A matplotlib figure of the image, the mean over heads, and each head, every map from its least to its most."""
    from matplotlib.figure import Figure

    tiles = {"image": pixels, "mean of heads": attention.mean(dim=0).numpy()}
    tiles |= {f"head {number}": head.numpy() for number, head in enumerate(attention)}
    height, width = pixels.shape[:2]
    # The page that comes nearest to a slide, 16:9; for each number of rows with no more columns than it takes.
    grids = {math.ceil(len(tiles) / columns): columns for columns in range(len(tiles), 0, -1)}
    rows, columns = min(grids.items(), key=lambda grid: abs(math.log(grid[1] * width * 9 / (grid[0] * height * 16))))
    scale = 2.4 / math.sqrt(height * width)  # inches a pixel
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


def main(args):
    """Write the pictures that `args` (see get_args_parser) ask for. Raises UserError."""
    check_args(args)
    paths = find_images(args.image_path)
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights)
    if inputs.in_chans not in (1, 3):
        raise UserError(
            f"--pretrained_weights {args.pretrained_weights} takes images of {inputs.in_chans} channels, and pictures "
            "have 1 or 3. report.py shows the attention on those"
        )
    for path in paths:  # a damaged one is named before any work
        dino_images.decode(dino_images.open_image(path), inputs)
    dino_cli.check_output_dir(args.output_dir)
    device = utils.pick_device(args.device)
    utils.fix_random_seeds(0)  # an untrained network is the same each time
    model, _ = dino_backbones.frozen_backbone(args, device, part="attention", inputs=inputs)
    folders = output_folders(paths, args.output_dir)
    check_folders(folders, picture_names(model.blocks[-1].attn.num_heads, args.threshold), paths)
    for path, folder in zip(paths, folders, strict=True):
        image, seen = load(path, args, inputs)
        attention = dino_features.cls_attention(model, seen[None].to(device))[0].float().cpu()
        if not attention.isfinite().all():
            raise UserError(
                f"the attention on {path} is not finite: the network has diverged, or its weights are damaged"
            )
        write_pictures(folder, image, attention, args.patch_size, args.threshold)
        print(f"{path}: {len(attention)} heads, {attention.shape[1]} × {attention.shape[2]} patches, in {folder}")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
