"""Data sets, samplers and loaders, and the sample set that trains with no data at hand.

The path of a training image: (epoch, index) from the sampler -> file -> PIL image or uint8 [H, W, 3] -> crops, uint8
-> batch. Its crops are a function of (seed, epoch, index) alone, whichever process makes them and in whatever order.
"""

import argparse
import contextlib
import itertools
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate
from torchvision import transforms

import dino_checkpoints
import dino_files
import dino_images
import dino_sample
import dino_shards
import utils
from dino_cli import between, share
from utils import UserError, bool_flag

# ---- flags ----

FORMATS = (*dino_files.FORMATS, "shards")
MOST_MEASURED = 5000  # images that --compute_stats reads


def training_flags():
    """The flags of the training data, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False)
    # fmt: off
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", default="sample", metavar="PATH", help="""Training images (labels are not used): a
        folder with images in it or in sub-folders; a list of paths (.txt, or .csv and .tsv with labels); tar shards
        ('shards/{0000..0999}.tar', or a folder of them); a torchvision data set (torchvision:CIFAR10); or `sample`, a
        small set made from photographs that are installed with the requirements.""")
    data.add_argument("--data_format", default="auto", choices=FORMATS, help="""What --data_path is. auto: a folder with
        images directly in it is flat, any other has class folders.""")
    data.add_argument("--list_columns", default=None, nargs="+", metavar="NAME", help="""Of a list with a header: the
        columns with the paths and, if there are any, with the labels. Default: recognized by their names.""")
    data.add_argument("--exif", default=False, type=bool_flag, metavar="BOOL",
        help="Rotate photographs by their EXIF orientation. The authors' code does not.")
    data.add_argument("--max_bad_images", default=0.001, type=share, metavar="SHARE", help="""Unreadable images are
        replaced by others and listed in bad_images.txt. A larger share of them (rounded up) ends the run.""")
    data.add_argument("--strict_images", default=False, type=bool_flag, metavar="BOOL",
        help="End the run at the first unreadable image.")

    images = parser.add_argument_group("channels")
    images.add_argument("--in_chans", default=3, type=between(1, 1000), metavar="N", help="""Channels of an image. 3:
        RGB photographs. 1: grayscale. N: the pages of a TIFF, the bands of an image, or numpy arrays (.npy) [H, W, N]
        or [N, H, W]. Other than 3 keep 16 bits and floats, as 3 do with --value_range; grayscale crops are the mean
        over channels, and hue jitter is skipped.""")
    images.add_argument("--mean", default=None, type=share, nargs="+", metavar="M",
        help="Mean of the training images per channel, from 0 (black) to 1 (white). Default: ImageNet's.")
    images.add_argument("--std", default=None, type=between(1e-6, 1, float), nargs="+", metavar="S",
        help="Standard deviation of the training images per channel.")
    images.add_argument("--compute_stats", default=False, type=bool_flag, metavar="BOOL", help=f"""Measure mean and std
        once before training, on at most {MOST_MEASURED} images. They are stored in the checkpoint.""")
    images.add_argument("--value_range", default=None, type=between(-(10**10), 10**10, float), nargs=2,
        metavar=("MIN", "MAX"), help="""Values that count as black and white in the files: 0 4095 for 12 bits, -1000 400
        for a CT window. Default: 0 and the largest value of the integer type; floats are between 0 and 1. With 3
        channels, it keeps all bits.""")
    # fmt: on
    return parser


def check_flags(args):
    """Raise UserError for flags on channels and values that contradict each other."""
    channels = f"--in_chans {args.in_chans}"
    if (args.in_chans != 3 or args.value_range) and args.augmentation == "fast":
        other = "--value_range" if args.in_chans == 3 else channels
        raise UserError(f"--augmentation fast is for photographs. Use --augmentation pil with {other}")
    if args.value_range and not args.value_range[0] < args.value_range[1]:
        low, high = args.value_range
        raise UserError(f"--value_range {low} {high}: put the smaller number first")
    given = [flag for flag in ("mean", "std") if getattr(args, flag)]
    if given and args.compute_stats:
        raise UserError(f"--{given[0]} is given, and --compute_stats would measure it. Remove one of them")
    if len(given) == 1:
        raise UserError(f"--{given[0]} is given without --{'std' if given == ['mean'] else 'mean'}. Give both, or none")
    if not given and args.in_chans != 3 and not args.compute_stats:
        raise UserError(f"{channels} needs --mean and --std, {args.in_chans} numbers each, or --compute_stats true")
    for flag in given:
        number = len(getattr(args, flag))
        if number != args.in_chans:
            raise UserError(f"--{flag} has {number} numbers, {channels} needs {args.in_chans}: one per channel")


# ---- data sets ----


def image_files(folder, flag):
    """Paths of the images directly in a folder, frame-2 before frame-10. Raises UserError if there are none."""
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder} is not a folder")
    try:
        files = [path for path in Path(folder).iterdir() if not path.name.startswith(".")]  # ._a.jpg is not an image
    except OSError as e:
        raise UserError(f"can't list {flag} {folder}: {e.strerror}") from e
    paths = [path for path in files if path.suffix.lower() in dino_images.EXTENSIONS]
    if not paths:
        raise UserError(f"{flag} {folder} has no images ({', '.join(dino_images.EXTENSIONS)})")
    return sorted(paths, key=lambda path: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", path.name)])


def find_data(data_path, part=""):
    """The folder of --data_path or, for `sample`, the `part` (train or val) of the sample data set."""
    return os.path.join(dino_sample.sample_dataset(), part) if data_path == "sample" else data_path


def find_images(data_path, part="", data_format="auto", exif=False, flag="--data_path", in_chans=3, columns=()):
    """The numbered images of --data_path (dino_files.ImageFiles, TorchvisionImages or dino_shards.TarShards).

    `part` (train or val) selects from `sample` and from torchvision's sets. Raises UserError if there are none.
    """
    path = os.fspath(find_data(data_path, part))
    if data_format == "shards" or (data_format == "auto" and dino_shards.are_shards(path)):
        return dino_shards.TarShards(path, exif, flag, dino_images.extensions_of(in_chans))
    return dino_files.find_images(path, part, data_format, exif, flag, in_chans, columns)


class MultiCropDataset(Dataset):
    """Training crops: dataset[epoch, i] -> (crops, index, None or the problem with image i).

    An unreadable image is replaced by another, which is a function of (seed, epoch, i). BadImage is raised if TRIES
    images in a row can't be read, or, if `strict`, for the first. `decoded` are the same images, opened faster.
    """

    TRIES = 100

    def __init__(self, images, augment, seed, strict=False, decoded=None):
        self.images, self.augment, self.seed, self.strict = images, augment, seed, strict
        self.decoded = decoded or images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, unreadable = key[1], None
        for attempt in range(1 if self.strict else self.TRIES):
            utils.fix_random_seeds(utils.derive_seed(self.seed, utils.SAMPLE, *key), cpu_only=True)
            try:
                return self.augment(self.decoded.open(index)), index, unreadable
            except dino_images.BadImage as e:
                bad, unreadable = e, unreadable or dino_images.Unreadable(self.images.name(index), e.reason)
            index = utils.derive_seed(self.seed, utils.REPLACEMENT, *key, attempt) % len(self.images)
        raise bad


def collate(batch):
    """[(crops, index, unreadable)] -> ([[B, C, h, w] per crop], indices [B], [dino_images.Unreadable, ...])."""
    crops, indices, unreadable = zip(*batch, strict=True)
    return default_collate(crops), torch.tensor(indices), [image for image in unreadable if image]


class EvalImages(Dataset):
    """Numbered images for evaluation: dataset[i] -> (transform(decoded image), i).

    An unreadable image raises BadImage or, with `lenient`, becomes a black one with a warning.
    """

    def __init__(self, images, transform, lenient=False, inputs=utils.RGB):
        self.images, self.transform, self.lenient, self.inputs = images, transform, lenient, inputs

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        try:
            image = self.load(i)
        except dino_images.BadImage as e:
            if not self.lenient:
                raise
            utils.say(f"warning: {e}. A black image replaces it")
            channels = self.inputs.in_chans
            image = Image.new("RGB", (8, 8)) if channels == 3 else torch.zeros(channels, 8, 8)
        return self.transform(image), i

    def load(self, i):
        return dino_images.decode(self.images.open(i), self.inputs)


def find_part(data_path, part):
    """The path of train or val in --data_path: a folder, a list or shards of that name; None if there is none.

    See dino_files.PARTS for other names, such as validation and test.
    """
    return named_part(data_path, part)[1]


def named_part(data_path, part):
    """(name, path) of train or val in --data_path; (None, None) if there is none."""
    root = os.fspath(find_data(data_path))
    if root.startswith("torchvision:"):
        return part, root
    names = {name.lower(): name for name in sorted(os.listdir(root))} if os.path.isdir(root) else {}
    for word in dino_files.PARTS[part]:
        found = [names[word + end] for end in ("", *dino_files.LISTS) if word + end in names]
        if path := os.path.join(root, found[0]) if found else dino_shards.shards_of_word(root, word):
            return word, path
    return None, None


def check_parts(data_path, images):
    """Raise UserError if a path for training contains test images as well, as class folders or as shards."""
    if isinstance(images, dino_shards.TarShards):
        train, val = (named_part(data_path, part)[0] for part in dino_files.PARTS)
        path = os.path.join(data_path, f"*{train}*.tar")
    else:
        classes = [images.classes[i] for i in images.targets.unique().tolist()] if images.classes else []
        found = [[name for name in classes if name.lower() in words] for words in dino_files.PARTS.values()]
        train, val = (names[0] if names else None for names in found)
        path = os.path.join(data_path, train or "")
        if train and val and sum(map(len, found)) < len(classes):
            utils.log(f"warning: --data_path {data_path} contains {train} and {val}. Both are trained on")
            return
    if train and val:
        raise UserError(
            f"--data_path {data_path} contains {train} and {val}. Train on {train} alone: --data_path {path}"
        )


def labeled_part(data_path, part, exif=False, flag="--data_path", in_chans=3, columns=()):
    """The numbered images of train or val in --data_path. Raises UserError if they or their labels are missing."""
    name, path = named_part(data_path, part)
    if path is None:
        root = find_data(data_path)
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        what = f"has no {part}" if os.path.isdir(root) else what
        raise UserError(
            f"{flag} {data_path} {what}. It needs class folders {part}/<class>/*, a list {part}.csv, or shards "
            f"{part}-*.tar"
        )
    if name != part:
        utils.log(f"note: {data_path} has no {part}; {name} is used")
    images = find_images(path, part, labeled_format(path), exif, flag, in_chans, columns)
    if images.targets is None:
        raise UserError(
            f"{flag} {path} has no labels. Sort the images into one folder per class, or write a list with labels "
            "(--list_columns PATH LABEL names its columns); in shards, add key.cls files"
        )
    return images


def labeled_images(data_path, transform, exif=False, flag="--data_path", inputs=utils.RGB, columns=()):
    """(train, val, labels of train, labels of val) of data_path: EvalImages, and class indices [N].

    The classes are those in train. Of a torchvision data set without test images, every tenth image is in val. Raises
    UserError if val has a class that train does not have.
    """
    train, val = (labeled_part(data_path, part, exif, flag, inputs.in_chans, columns) for part in ("train", "val"))
    if not getattr(train, "has_parts", True):
        utils.log(f"note: {data_path} has no test images of its own: every tenth image per class is held out")
        return split_every_tenth(train, transform, f"{flag} {data_path}", inputs)
    both = isinstance(train, dino_shards.TarShards) and set(train.paths) & set(getattr(val, "paths", ()))
    if both:
        raise UserError(f"{flag} {data_path}: {utils.summarize(sorted(both))} match train and val. Rename them")
    number = {name: i for i, name in enumerate(train.classes)}
    unknown = sorted(set(val.classes) - set(number))
    if unknown:
        some = ", ".join(unknown[:5])
        raise UserError(f"{flag} {data_path}: val has classes that train does not have: {some}. Use the same classes")
    renumbered = torch.tensor([number[name] for name in val.classes])
    sets = (EvalImages(images, transform, inputs=inputs) for images in (train, val))
    return *sets, train.targets, renumbered[val.targets]


def find_labeled(path, transform, exif, flag, inputs=utils.RGB, columns=()):
    """(train, val, labels of train, labels of val) of train and val in a folder, or of its images, split."""
    parts = [find_part(path, part) for part in ("train", "val")]
    if all(parts):
        return labeled_images(path, transform, exif, flag, inputs, columns)
    images = find_images(path, "", labeled_format(path), exif, flag, inputs.in_chans, columns)
    known = {word for words in dino_files.PARTS.values() for word in words}
    if any(parts) and not images.sharded and all(name.lower() in known for name in images.classes):
        raise UserError(
            f"{flag} {path} has only one of train and val. Name a folder with both, or one of class folders"
        )
    utils.log(f"note: {path} has no train and val: every tenth image per class is held out")
    return split_every_tenth(images, transform, f"{flag} {path}", inputs)


def labeled_format(path):
    """data_format of a path with labels: the sub-folders of a folder are classes."""
    return "folder" if os.path.isdir(path) and not dino_shards.are_shards(os.fspath(path)) else "auto"


def split_every_tenth(images, transform, source, inputs=utils.RGB):
    """(train, val, labels of train, labels of val): every tenth image per class is in val.

    Classes of fewer than ten images contribute their first one; classes of one image, none. Raises UserError, naming
    `source`, if there is only one class, or nothing for val.
    """
    targets = images.targets
    if targets is None or len(targets.unique()) < 2:
        raise UserError(
            f"{source} has one class folder or none, but labels are needed. Name class folders, a folder with train "
            "and val, or a list with labels (if there are single images beside class folders: --data_format folder)"
        )
    order, counts = targets.argsort(stable=True), targets.bincount()
    number_in_class = torch.empty_like(targets)
    number_in_class[order] = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[targets[order]]
    is_val = (number_in_class % 10 == 0) & (counts[targets] > 1)
    if not is_val.any():
        raise UserError(f"{source} has one image per class: none is left for k-NN. Name more images")
    parts = [wanted.nonzero()[:, 0] for wanted in (~is_val, is_val)]
    sets = (EvalImages(images.take(part.tolist()), transform, inputs=inputs) for part in parts)
    return *sets, *(targets[part] for part in parts)


# ---- mean and standard deviation ----


class ImageStatistics(Dataset):
    """Per image: means and variances of its channels, float64 [2, C]; the error message of an unreadable one."""

    def __init__(self, images, inputs):
        self.images, self.inputs = images, inputs

    def __len__(self):
        return min(len(self.images), MOST_MEASURED)

    def __getitem__(self, i):
        number = i * len(self.images) // len(self)  # spread evenly over all
        try:
            image = dino_images.decode(self.images.open(number), self.inputs)
        except dino_images.BadImage as e:
            return str(e)
        if self.inputs.photographs:
            image = transforms.functional.pil_to_tensor(image).double() / 255
        variance, mean = torch.var_mean(image.double().flatten(1), dim=1, correction=0)
        return torch.stack((mean, variance))


def image_statistics(images, inputs, num_workers):
    """(mean, std) per channel over numbered images, at most MOST_MEASURED of them: two tuples of values from 0 to 1.

    Each image has the same weight, whatever its size, as in training. Raises UserError if none can be read, or if a
    channel is constant.
    """
    measured = ImageStatistics(images, inputs)
    how = {"num_workers": num_workers, "worker_init_fn": utils.ignore_signals}
    own = torch.Generator()  # without it, the initial weights would depend on --compute_stats
    loader = DataLoader(measured, batch_size=None, generator=own, **how)
    found = list(utils.MetricLogger().log_every(loader, 500, "Mean and std:"))
    good = [one for one in found if isinstance(one, torch.Tensor)]
    if not good:
        raise UserError(f"--compute_stats: none of {len(found)} images can be read. The first: {found[0]}")
    means, variances = torch.stack(good).unbind(1)  # [images, C] each
    std = (variances.mean(dim=0) + means.var(dim=0, correction=0)).sqrt()
    if not (std > 1e-9).all():
        constant = (std <= 1e-9).nonzero()[0].item()
        raise UserError(
            f"--compute_stats: channel {constant} (from 0) is constant in all {len(good)} images. Remove it, or set "
            "--mean and --std"
        )
    return tuple(means.mean(dim=0).tolist()), tuple(std.tolist())


def earlier_statistics(args):
    """(mean, std) that the run in --output_dir has measured, as rank 0 reads them; None if there are none."""
    found, now = None, utils.plain_args(args)
    if utils.is_main_process():
        with contextlib.suppress(UserError):  # of a damaged checkpoint; resuming will report it
            checkpoint, _ = dino_checkpoints.load_newest(os.path.join(args.output_dir, "checkpoint.pth"))
            before = utils.plain_args(checkpoint.get("args")) if isinstance(checkpoint, dict) else {}
            same = all(before.get(name) == now[name] for name in ("in_chans", "value_range"))
            found = (before.get("mean"), before.get("std")) if before.get("compute_stats") and same else None
    return utils.gather_objects(found)[0]


def measure_statistics(images, args):
    """(mean, std) of the images, two lists, measured by rank 0. Raises UserError on all ranks."""
    found = None
    if utils.is_main_process():
        try:
            inputs = utils.RGB._replace(in_chans=args.in_chans, value_range=args.value_range)
            found = [list(numbers) for numbers in image_statistics(images, inputs, args.num_workers)]
        except UserError as e:
            found = str(e)
    found = utils.gather_objects(found)[0]
    if isinstance(found, str):
        raise UserError(found)
    for name, numbers in zip(("mean", "std"), found, strict=True):
        utils.log(f"measured: --{name} {' '.join(f'{number:.6g}' for number in numbers)}")
    mean, std = map(np.asarray, found)
    if args.in_chans != 3 and ((mean + 2 * std < 0.1).all() or (mean - 2 * std > 0.9).all()):
        utils.log(
            "warning: nearly all values are in a tenth of the range: the images are almost black or white. Set "
            "--value_range, such as 0 4095 for 12 bits"
        )
    return found


# ---- samplers and loaders ----


class EpochSampler(Sampler):
    """(epoch, index) of the images that this rank sees in an epoch: each image at most once over all ranks.

    The order of an epoch is one sequence, a function of (seed, epoch). Step k of n ranks with B images each takes the
    slice k of n * B images, whatever n is. Images that do not fill a last slice are left out.
    """

    def __init__(self, images, batch_size, seed=0, rank=0, world_size=1):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        images_per_step = batch_size * world_size
        self.used = len(images) // images_per_step * images_per_step
        self.set_epoch(0)

    def set_epoch(self, epoch, images_done=0):
        """Which epoch comes next, and how many of its images are done already, over all ranks."""
        self.epoch, self.first, self.left = epoch, images_done, max(self.used - images_done, 0)

    def __len__(self):
        return self.left // self.world_size

    def __iter__(self):
        order = self.images.order(self.seed, self.epoch, self.first)
        for index in itertools.islice(order, self.rank, self.left, self.world_size):
            yield self.epoch, index


def training_images(args):
    """The numbered images of --data_path. With --compute_stats, sets args.mean and args.std. Raises UserError."""
    how = {"in_chans": args.in_chans, "columns": args.list_columns}
    images = find_images(args.data_path, "train", args.data_format, args.exif, **how)
    check_parts(args.data_path, images)
    if args.compute_stats:
        args.mean, args.std = earlier_statistics(args) or measure_statistics(images, args)
    return images


def training_loader(images, augment, args, device):
    """Loader of this rank's batches: ([[B, C, h, w] per crop], indices [B], unreadable images).

    A batch has --batch_size_per_gpu * --grad_accum_steps images. Raises UserError if there is not one per step.
    """
    rank, world_size, batch_size = utils.get_rank(), utils.get_world_size(), args.batch_size_per_gpu
    batch_size *= args.grad_accum_steps
    if len(images) < batch_size * world_size:
        raise UserError(
            f"the {len(images)} training images are fewer than one step of {batch_size * world_size}. Use "
            f"--batch_size_per_gpu {len(images) // (world_size * args.grad_accum_steps)} or less"
        )
    if images.sharded and images.are_sorted:
        utils.log(
            "warning: these shards contain one or two classes each, so images are read in random order from all of "
            "them. That is slow on disks and network file systems: write the shards again, in random order"
        )
    decoded = dino_files.keep_small_decoded(images) if utils.inputs_of(args).photographs else None
    return CropLoader(
        MultiCropDataset(images, augment, args.seed, args.strict_images, decoded),
        batch_size=batch_size,
        sampler=EpochSampler(images, batch_size, args.seed, rank, world_size),
        num_workers=args.num_workers,
        collate_fn=pack,
        pin_memory=device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        worker_init_fn=utils.ignore_signals,
    )


class CropLoader(DataLoader):
    """A DataLoader of `pack`ed batches, which returns them as `collate` does."""

    def __iter__(self):
        if utils.get_world_size() > 1:
            time.sleep(0.1)  # a worker forked while a thread of gloo has Python's locks would wait for them forever
        for crops, indices, unreadable in super().__iter__():
            yield [crop for same in crops for crop in same], torch.from_numpy(indices), unreadable


def pack(batch):
    """`collate` with consecutive crops of one size in one tensor [n, B, C, h, w], and indices as a numpy array.

    Each tensor from a loader process costs the one that trains a connection and a handshake, however small it is.
    """
    crops, indices, unreadable = zip(*batch, strict=True)
    same = itertools.groupby(zip(*crops, strict=True), key=lambda views: views[0].shape)
    # default_collate writes to shared memory, and raises here if there is too little of it.
    crops = [default_collate([torch.stack(views) for views in group]) for _, group in same]
    return crops, np.array(indices), [image for image in unreadable if image]


def eval_loader(dataset, batch_size, num_workers, device, in_worker=None):
    """Loader of this rank's share of a data set, in order. All shares have the same length."""
    sampler = DistributedSampler(dataset, shuffle=False) if utils.get_world_size() > 1 else None
    how = {"num_workers": num_workers, "pin_memory": device.type == "cuda", "worker_init_fn": in_worker}
    return DataLoader(dataset, batch_size, sampler=sampler, **how)
