"""Vectors of images, with their names, from any network: for search, clustering and classifiers of your own.

    python embed.py --pretrained_weights runs/mine --data_path photos --output vectors.npz
    python embed.py --data_path photos --output vectors.npz                # published ViT-S/16
    python embed.py --embeddings vectors.npz --query cat.jpg --neighbors 10

Writes one file, .npz, .pt or .parquet: vectors, names, labels if there are any, and the settings of the network. With
--query, prints the nearest images of each query and draws them on a contact sheet. See docs/embeddings.md.
"""

import argparse
import contextlib
import errno
import functools
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch.utils.data import DataLoader, default_collate

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_crops
import dino_data
import dino_features
import dino_files
import dino_images
import dino_vectors
import utils
from dino_cli import at_least
from utils import UserError, bool_flag

# ---- arguments ----

TOKENS = ("cls", "patch_mean", "both", "patches")
NEIGHBORS, MOST_TILES = 10, 30  # of a query; in a row of the contact sheet


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parents = [dino_cli.model_flags(), dino_cli.exif_flag(), dino_cli.process_flags()]
    parser = argparse.ArgumentParser("Embeddings", add_help=False, parents=parents)
    # fmt: off
    parser.add_argument("--data_path", default="sample", metavar="PATH", help="""Images: a folder, with images in it or
        in sub-folders; a list of paths (.txt, .csv, .tsv); tar shards; torchvision:NAME; or `sample`. Labels are not
        needed. If there are any, such as class folders, they are written too.""")
    parser.add_argument("--list_columns", default=None, nargs="+", metavar="NAME", help="""Of a list with a header: the
        columns with the paths and, if there are any, with the labels. Default: recognized by their names.""")
    parser.add_argument("--strict_images", default=False, type=bool_flag, metavar="BOOL", help="""End at the first
        unreadable image. false: unreadable images get no vector and are listed in OUTPUT.unreadable.txt.""")
    parser.add_argument("--output", default=None, metavar="FILE", help="""What to write. .npz: numpy arrays; .parquet: a
        table (needs pyarrow); both are written as vectors come. .pt: torch tensors, all in memory at the end.""")
    parser.add_argument("--tokens", default="cls", choices=TOKENS, help="""cls: the CLS token, for retrieval and
        classification. patch_mean: the mean patch token. both: these two, concatenated. patches: all patch tokens, a
        grid per image. Networks other than ViTs have pooled features only, which are cls.""")
    parser.add_argument("--normalize", default=False, type=bool_flag, metavar="BOOL",
        help="Divide each vector by its length, so that dot products are cosine similarities.")
    parser.add_argument("--image_size", default=224, type=at_least(1), metavar="PIXELS", help="""Input size of the
        network. Images are resized to 8/7 of this size, then center-cropped. Default for a run: its global crops.""")
    parser.add_argument("--batch_size_per_gpu", default=128, type=at_least(1), metavar="B",
        help="Images per forward pass.")
    parser.add_argument("--neighbors", default=None, type=at_least(1), metavar="K", help=f"""Write the K nearest other
        images of each image to --output, and show K per --query. Default: none are written, {NEIGHBORS} are shown.""")
    parser.add_argument("--query", default=None, nargs="+", metavar="IMAGE",
        help="Print the nearest images of these, and draw them on --contact_sheet.")
    parser.add_argument("--contact_sheet", default=None, metavar="FILE", help="""PNG with a row per query: the query,
        then its neighbors. Default: beside the vectors, as vectors-neighbors.png.""")
    parser.add_argument("--embeddings", default=None, metavar="FILE", help="""Read a file that --output has written,
        instead of embedding --data_path. --query is embedded by the network that the file names, and --output writes
        the vectors in another format, or with --neighbors.""")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for flags that contradict each other. Sets args.contact_sheet to its default."""
    if args.embeddings is None and args.output is None:
        raise UserError("where should the vectors go? Set --output vectors.npz, or read others with --embeddings")
    if args.output is None and not args.query:
        raise UserError(f"--embeddings {args.embeddings}: nothing to do. Add --query IMAGE, or --output FILE")
    if args.contact_sheet is not None and not args.query:
        raise UserError(f"--contact_sheet {args.contact_sheet} shows neighbors of --query. Name query images")
    if args.embeddings is not None and (args.normalize or "data_path" in getattr(args, "given", ())):
        raise UserError("--embeddings embeds no images again. Remove --data_path and --normalize")
    dino_backbones.check_arch(args.arch)
    vit, grid = dino_backbones.vit_factory(args.arch), args.tokens == "patches"
    if vit:
        dino_cli.check_whole_patches("image_size", args.image_size, args.patch_size)
    elif args.tokens != "cls":
        raise UserError(f"--tokens {args.tokens}: --arch {args.arch} has pooled features only. Use --tokens cls")
    if grid and (args.neighbors or args.query):
        raise UserError("--tokens patches has no single vector per image, which neighbors need. Use another")
    if args.output is not None:
        dino_vectors.check_format("--output", args.output, grid)
    vectors = Path(args.output or args.embeddings)
    args.contact_sheet = args.contact_sheet or str(vectors.with_name(f"{vectors.stem}-neighbors.png"))
    if not args.contact_sheet.lower().endswith(".png"):
        raise UserError(f"--contact_sheet {args.contact_sheet} must end in .png")


def check_files(args):
    """Raise UserError if a file can't be written, or a query is not there. Creates the folders."""
    if missing := [path for path in args.query or () if not os.path.isfile(path)]:
        raise UserError(f"--query {missing[0]} is not a file. Name images")
    written = {"--output": args.output, "--contact_sheet": args.contact_sheet if args.query else None}
    for flag, path in written.items():
        if path is not None:
            path = Path(os.path.realpath(path))  # the target of a link is written
            dino_cli.check_output_dir(path.parent, f"the folder of {flag}", [path.name])
    if args.output is not None:
        dino_vectors.check_library("--output", args.output)


# Settings of the network, which a file of vectors keeps.
OF_NETWORK = ("pretrained_weights", "checkpoint_key", "arch", "patch_size", "image_size", "exif", "tokens")


def follow_file(args, settings):
    """Let a file of vectors say what its network is, in the flags `args`. Flags that were given stay.

    --pretrained_weights, if given, say it like elsewhere: see dino_checkpoints.follow_run. Raises UserError.
    """
    given = getattr(args, "given", vars(args))
    for name in OF_NETWORK:
        if name not in given and type(settings.get(name)) is type(getattr(args, name)):
            setattr(args, name, settings[name])
    weights = args.pretrained_weights
    if "pretrained_weights" in given:
        dino_checkpoints.follow_run(args)
    elif args.query and weights not in ("", "random") and not os.path.exists(weights):
        raise UserError(
            f"--embeddings {args.embeddings} is of the network {weights}, which is not there. Name it with "
            "--pretrained_weights"
        )


# ---- the network ----


class Network(NamedTuple):
    """`extract` maps images [B, C, H, W], uint8 or normalized, to vectors; `settings` go to the file."""

    extract: functools.partial
    transform: object
    inputs: utils.Inputs
    device: torch.device
    settings: dict


def load_network(args, device):
    """The Network that the flags name. Raises UserError."""
    utils.fix_random_seeds(0)  # an untrained network has the same weights in every run
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights)
    amp_dtype = dino_features.pick_dtype(device, args.amp_dtype)
    model, _ = dino_backbones.frozen_backbone(args, device, args.image_size, inputs=inputs, amp_dtype=amp_dtype)
    settings = {name: getattr(args, name) for name in (*OF_NETWORK, "normalize", "amp_dtype")}
    settings |= utils.plain_args(inputs._asdict())
    if os.path.exists(args.pretrained_weights):
        settings["pretrained_weights"] = os.path.abspath(args.pretrained_weights)
    settings["weights"] = dino_features.digest_of_weights(model)
    tokens = functools.partial(tokens_of, model, args.tokens)
    extract = functools.partial(vectors_of, tokens, device, amp_dtype, args.normalize)
    return Network(extract, dino_crops.eval_transform(args.image_size, inputs), inputs, device, settings)


def tokens_of(model, tokens, images):
    """One of TOKENS of a ViT's last block, after its norm; pooled features of other networks.

    Images [B, C, H, W] -> [B, D], for `both` [B, 2 D], for `patches` [B, H / patch, W / patch, D].
    """
    if tokens == "cls":
        return utils.features_of(model, images)
    found = model.get_intermediate_layers(images)[0]  # [B, 1 + patches, D]
    cls, patches = found[:, 0], found[:, 1:]
    if tokens == "patches":
        return patches.unflatten(1, [side // model.patch_embed.patch_size for side in images.shape[-2:]])
    mean = patches.mean(dim=1)
    return mean if tokens == "patch_mean" else torch.cat((cls, mean), dim=1)


@torch.no_grad()
def vectors_of(network, device, amp_dtype, normalize, images):
    """Vectors of images, float32 on the CPU. Raises UserError if they are not finite."""
    images = utils.normalize(images.to(device, non_blocking=True))
    found = dino_features.features_in(network, images, amp_dtype)
    found = F.normalize(found, dim=-1) if normalize else found
    dino_features.check_finite_features(found)
    return found.float().cpu()


# ---- embedding a data set ----


class ReadableImages(dino_data.EvalImages):
    """Numbered images: dataset[i] -> (image, i), or (why it can't be read, i). `strict` raises BadImage instead."""

    def __init__(self, images, transform, inputs, strict):
        super().__init__(images, transform, inputs=inputs)
        self.strict = strict

    def __getitem__(self, i):
        try:
            return super().__getitem__(i)
        except dino_images.BadImage as e:
            if self.strict:
                raise
            return e.reason, i


def collate(batch):
    """[(image or reason, index)] -> (images [b, C, H, W] or None, {index: reason})."""
    images = [image for image, _ in batch if not isinstance(image, str)]
    reasons = {i: reason for reason, i in batch if isinstance(reason, str)}
    return default_collate(images) if images else None, reasons


def write_rows(network, images, args, path):
    """Write the vectors of this rank's images to a file of raw numbers. Returns (their shape or None, {index: reason}).

    The batches are the same for any number of processes: ranks divide them, in order.
    """
    rank, ranks, size = utils.get_rank(), utils.get_world_size(), args.batch_size_per_gpu
    batches = [range(first, min(first + size, len(images))) for first in range(0, len(images), size)]
    mine = batches[len(batches) * rank // ranks : len(batches) * (rank + 1) // ranks]
    dataset = ReadableImages(images, network.transform, network.inputs, args.strict_images)
    how = {"num_workers": args.num_workers, "pin_memory": network.device.type == "cuda", "collate_fn": collate}
    loader, shape, unreadable = DataLoader(dataset, batch_sampler=mine, **how), None, {}
    with open(path, "wb") as file:  # not mapped: on a full disk, writing to a map kills the process
        for batch, reasons in utils.MetricLogger().log_every(loader, 10, "Embedding:"):
            unreadable |= reasons
            if batch is not None:
                vectors = network.extract(batch)
                shape = tuple(vectors.shape[1:])
                file.write(vectors.contiguous().numpy().data)
    return shape, unreadable


def embed_images(network, images, args, parts):
    """The Embeddings of a data set on rank 0, None elsewhere. Their vectors are in the file parts[0].

    Each rank writes to its own of `parts`, and rank 0 appends them to its own. Raises UserError.
    """
    own = parts[utils.get_rank()]
    try:
        with naming_output(args):
            mine = write_rows(network, images, args, own)
        shapes, reasons = zip(*utils.gather_objects(mine), strict=True)  # now all parts are whole
    except BaseException:
        Path(own).unlink(missing_ok=True)
        raise
    shape = next(filter(None, shapes), None)
    unreadable = {i: reason for part in reasons for i, reason in part.items()}
    if shape is None:
        first = f"the first: {utils.printable(images.name(0))}: {unreadable[0]}"
        raise UserError(f"--data_path {args.data_path}: none of the {len(images)} images can be read; {first}")
    if not utils.is_main_process():
        return None
    with naming_output(args):
        append(parts)
        report_unreadable(unreadable, images, args)
    kept = [i for i in range(len(images)) if i not in unreadable]
    labels = None if images.targets is None else images.targets[kept].numpy()
    at_home = args.data_path == "sample" or args.data_path.startswith("torchvision:")
    path = args.data_path if at_home else os.path.abspath(args.data_path)
    settings = {
        **network.settings,
        "data_path": path,
        "list_columns": list(args.list_columns or ()),
        "folder": os.getcwd(),
    }
    rows = dino_vectors.rows_of_file(parts[0], shape)
    return dino_vectors.Embeddings([images.name(i) for i in kept], shape, rows, settings, labels, images.classes)


# What a disk or network file system says that can't store a file. Loaders fail for other reasons.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOENT, errno.ESTALE, errno.EACCES}


@contextlib.contextmanager
def naming_output(args):
    """Raise a UserError that names --output for an OSError that is due to it, such as a full disk."""
    try:
        yield
    except OSError as e:
        if e.errno not in UNWRITABLE:
            raise
        remedy = "Free space, or use a folder that all processes share"
        raise UserError(f"can't write --output {args.output}: {e.strerror or e}. {remedy}") from e


def append(parts):
    """Append the content of files to the first of them, and remove the others."""
    with open(parts[0], "ab") as file:
        for part in parts[1:]:
            with open(part, "rb") as more:
                shutil.copyfileobj(more, file, 2**24)
            os.remove(part)


def report_unreadable(unreadable, images, args):
    """List unreadable images, {index: reason}, in a file and in one warning. Removes the list of an earlier run."""
    path = Path(f"{args.output}.unreadable.txt")
    if not unreadable:
        path.unlink(missing_ok=True)
        return
    names = [utils.printable(images.name(i)) for i in sorted(unreadable)]
    text = "".join(f"{name}\t{unreadable[i]}\n" for name, i in zip(names, sorted(unreadable), strict=True))
    utils.write_whole(path, lambda file: file.write(text.encode(errors="backslashreplace")))
    what = f"{len(names)} of {len(images)} images can't be read and have no vector"
    utils.log(f"warning: {what}: {utils.summarize(names)}. See {path}")


def neighbors_of_all(found, number, device):
    """(indices int64, cosine similarities float32) of the nearest other images of each, [N, K]. Memory is bounded."""
    numbers = dino_features.NUMBERS_AT_ONCE // (4 if device.type == "cpu" else 1)  # CPUs gain nothing from more
    total, at_once = len(found.names), max(numbers // dino_vectors.rows_at_once(found.shape), 1)
    # Not one small array per chunk: these would break up the large blocks of memory that the chunks use in turn.
    indices = torch.empty(total, min(number, total - 1), dtype=torch.long)
    similarities = torch.empty(indices.shape)
    starts = utils.MetricLogger().log_every(range(0, total, at_once), 10, "Neighbors:")
    for first, queries in zip(starts, found.rows(at_once), strict=True):
        queries, here = torch.from_numpy(queries).to(device), slice(first, first + len(queries))
        nearest = dino_features.nearest_neighbors(queries, found.blocks(), indices.shape[1], first)
        similarities[here], indices[here] = nearest
    return indices.numpy(), similarities.numpy()


# ---- queries ----


def read_queries(args, inputs):
    """[(input of the network [C, H, W], small PIL image)] of the images of --query. Raises UserError."""
    images = (dino_images.decode(dino_images.open_image(path, args.exif), inputs) for path in args.query or ())
    return [(dino_crops.eval_transform(args.image_size, inputs)(image), tile_of(image)) for image in images]


def tile_of(image):
    """A decoded image at the size at which people see it; of a very long one, the middle."""
    return ImageOps.contain(dino_crops.shorten(dino_images.shown(image)), [dino_features.TILE] * 2)


def answer(network, queries, found, args):
    """Print the nearest images of the `queries` of read_queries, and draw the contact sheet. Raises UserError."""
    batches = torch.stack([image for image, _ in queries]).split(args.batch_size_per_gpu)
    vectors = torch.cat([network.extract(batch) for batch in batches]).to(network.device)  # [Q, D]
    if vectors.shape[1:] != found.shape:
        ours, theirs = ("x".join(map(str, shape)) for shape in (vectors.shape[1:], found.shape))
        raise UserError(
            f"--query: vectors of this network have {ours} numbers, in --embeddings {args.embeddings} they have "
            f"{theirs}. Name the network that they are from: --pretrained_weights, --tokens"
        )
    number = min(args.neighbors or NEIGHBORS, len(found.names))
    if number > MOST_TILES:
        utils.log(f"note: the contact sheet shows {MOST_TILES} of {number} neighbors")
    nearest = dino_features.nearest_neighbors(vectors, found.blocks(), number)
    images = open_named({found.names[i] for i in nearest[1].flatten().tolist()}, found.settings, network.inputs)
    sheet = []
    for path, (_, tile), *near in zip(args.query, queries, *(part.tolist() for part in nearest), strict=True):
        utils.log(f"{utils.printable(path)}:")
        sheet.append([(tile, "query", path)])
        for similarity, i in zip(*near, strict=True):
            name = found.names[i]
            utils.log(f"  {similarity:.4f}  {utils.printable(name)}")
            sheet[-1] += [(images.get(name), f"{similarity:.3f}", name)] * (len(sheet[-1]) <= MOST_TILES)
    utils.write_whole(args.contact_sheet, lambda file: dino_features.draw_sheet(sheet).save(file, "PNG"))
    utils.log(f"contact sheet: {args.contact_sheet}")


def open_named(names, settings, inputs):
    """{name: small PIL image} of the images with these names that can still be read, as `settings` of a file say."""
    exif, folder = bool(settings.get("exif")), str(settings.get("folder", ""))
    paths = {os.path.join(folder, name): name for name in names}
    opened = {path: functools.partial(dino_images.open_image, path, exif) for path in paths if os.path.isfile(path)}
    try:
        if len(opened) < len(paths):  # in shards, or in a data set of torchvision
            how = {"exif": exif, "in_chans": inputs.in_chans, "columns": settings["list_columns"]}
            images = dino_data.find_images(settings["data_path"], "train", **how)
            known = ((os.path.join(folder, images.name(i)), i) for i in range(len(images)))
            opened |= {path: functools.partial(images.open, i) for path, i in known if path in paths}
    except (UserError, KeyError, OSError):
        utils.log("note: some neighbors are not on this machine; their places on the contact sheet are empty")
    found = {}
    for path, open_image in opened.items():
        try:
            found[paths[path]] = tile_of(dino_images.decode(open_image(), inputs))
        except dino_images.BadImage as e:
            utils.log(f"warning: {e}")
    return found


# ---- the run ----


def main(args):
    """Embed a data set, or read its vectors; then write them, and answer queries. Raises UserError."""
    found = None if args.embeddings is None else dino_vectors.read(args.embeddings)
    if found:
        follow_file(args, found.settings)
    else:
        dino_checkpoints.follow_run(args)
    check_args(args)
    check_files(args)
    device, network = utils.init_distributed_mode(args), None
    if found and not utils.is_main_process():
        return
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights) if args.query or not found else None
    queries = read_queries(args, inputs)
    if not found:
        how = {"exif": args.exif, "in_chans": inputs.in_chans, "columns": args.list_columns}
        images = dino_data.find_images(args.data_path, "train", **how)
        digest = dino_files.digest_of_names(images)
        utils.check_same_everywhere(digest, f"--data_path {args.data_path}", "It must be the same for all")
    if queries or not found:
        network = load_network(args, device)
    ranks = () if found else range(utils.get_world_size())
    parts = [f"{os.path.realpath(args.output)}.rank{rank}.tmp" for rank in ranks]  # where a link points to
    try:
        found = found or embed_images(network, images, args, parts)
        if utils.is_main_process():
            finish(found, network, queries, args, device)
    finally:
        for part in parts if utils.is_main_process() else ():  # other ranks may be ready long before
            Path(part).unlink(missing_ok=True)


def finish(found, network, queries, args, device):
    """Write Embeddings to --output, if there is one, and answer the queries, if there are any."""
    if args.output is not None:
        if args.neighbors:
            if args.neighbors >= len(found.names):
                utils.log(f"note: --neighbors {args.neighbors}, but there are {len(found.names) - 1} other images")
            found = found._replace(neighbors=neighbors_of_all(found, args.neighbors, device))
        dino_vectors.write(args.output, found)
        shape = " x ".join(map(str, (len(found.names), *found.shape)))
        utils.log(f"{args.output}: features [{shape}] of {len(found.names)} images")
    if queries:
        differ = [name for name in ("weights", "tokens") if found.settings.get(name) != network.settings[name]]
        if differ:
            what = f"warning: --embeddings {args.embeddings} is of other {' and '.join(differ)} than the query"
            utils.log(f"{what}, so similarities mean little. Embed the images again")
        answer(network, queries, found, args)


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
