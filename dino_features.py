"""Frozen features and what they tell: extraction, attention, nearest neighbors, retrieval, pictures."""

import functools
import hashlib
import itertools
import math
import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, resize

import dino_backbones
import dino_checkpoints
import dino_crops
import dino_data
import utils
from utils import UserError

# ---- a trained network in two lines ----


def load_run(source, checkpoint_key="teacher", device="cpu"):
    """(frozen backbone, transform) of a run's folder, a checkpoint, a backbone.pth, or a torch.hub name.

    The transform maps a PIL image to the network's input, normalized floats [C, H, W], as the evaluations do: resize to
    8/7 of the training's global crops, bicubic, crop the center, subtract the mean, divide by the std.
    `checkpoint_key` is teacher or student, `device` cpu, cuda, mps or auto. Raises UserError.
    """
    model, settings = dino_backbones.trained_backbone(source, checkpoint_key, device)
    size, exif = settings.get("image_size", 224), settings.get("exif", False)
    return model, dino_crops.image_transform(size, utils.inputs_of(settings), exif)


# ---- extraction ----


def pick_dtype(device, amp_dtype):
    """dtype of autocast for --amp_dtype of an evaluation (dino_cli.process_flags), or None. Raises UserError."""
    # float32 leaves torch's settings alone, with which the published numbers were measured.
    return None if amp_dtype == "float32" else dino_backbones.pick_amp_dtype(device, True, amp_dtype)


def features_in(model, images, amp_dtype=None):
    """The features [B, D] of a model, computed by autocast in `amp_dtype` if there is one and returned as float32."""
    if amp_dtype is None:
        return utils.features_of(model, images)
    with torch.autocast(images.device.type, dtype=amp_dtype):
        return utils.features_of(model, images).float()


@torch.no_grad()
def extract_features(
    model, data_loader, use_cuda=True, multiscale=False, stop=None, amp_dtype=None, header="Features:"
):
    """Features of a whole data set, in its order: [N, D] float32 on rank 0, None on other ranks.

    `data_loader` yields (images, indices into the data set), images as uint8 RGB or normalized floats; each rank's
    loader covers its share, all shares of one length. `use_cuda` keeps the features on the model's GPU, if it has one,
    instead of in main memory. They are gathered once, at the end. Every 10 batches, all ranks check whether `stop`, a
    StopRequest, has a signal on any rank, and raise utils.Stopped. `amp_dtype` is what the model computes in, `header`
    the start of the lines that show progress.
    """
    network = functools.partial(features_in, model, amp_dtype=amp_dtype)
    weight = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    store = weight.device if use_cuda else torch.device("cpu")
    found, places = None, torch.empty(len(data_loader.sampler), dtype=torch.long)
    first = 0
    batches = stop.watch(data_loader) if stop else data_loader
    for i, (images, indices) in enumerate(utils.MetricLogger().log_every(batches, 10, header)):
        if stop and i % 10 == 0 and (number := max(utils.gather_objects(stop.signal))):
            raise utils.Stopped(int(number))
        images = utils.normalize(images.to(weight.device, non_blocking=True))
        features = multi_scale(images, network) if multiscale else network(images)
        if found is None:  # one buffer: parts and their concatenation would need twice the memory
            found = torch.empty(len(places), features.shape[1], device=store)
        here = slice(first, first + len(indices))
        found[here], places[here], first = features, indices, here.stop
    if utils.get_world_size() > 1:
        found, places = gather_rows(found, places)
        if found is None:
            return None
    if torch.equal(places, torch.arange(len(data_loader.dataset))):
        return found.to(store)
    ordered = torch.empty(len(data_loader.dataset), found.shape[1], device=store)
    ordered[places.to(store)] = found.to(store)
    return ordered


def gather_rows(*tensors):
    """The rows of all ranks (the same number each) in one tensor, on the CPU of rank 0; None per tensor elsewhere."""
    group = dist.new_group(backend="gloo")  # main memory on every rank, whatever the training runs on
    gathered = []
    for rows in tensors:
        rows = rows.cpu()
        everyone = [torch.empty_like(rows) for _ in range(utils.get_world_size())] if utils.is_main_process() else None
        dist.gather(rows, everyone, group=group)
        gathered.append(torch.cat(everyone) if everyone else None)
    utils.leave_processes(group)
    return gathered


def multi_scale(images, model):
    """Mean of a model's features [B, D] over the scales 1, 1/sqrt(2) and 1/2 of the images, L2-normalized."""
    features = [utils.features_of(model, images)]
    for scale in (2**-0.5, 0.5):
        smaller = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        features.append(utils.features_of(model, smaller))
    return F.normalize(torch.stack(features).mean(0), dim=1)


def check_finite_features(*features):
    """Raise UserError if features contain NaN or infinite numbers."""
    if not all(part.isfinite().all() for part in features):
        raise UserError(
            "the features contain NaN or infinite numbers: the network has diverged, or its weights are damaged"
        )


def digest_of_weights(model):
    """A digest of all tensors of a network, which changes with any of them."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- attention ----


@torch.no_grad()
def cls_attention(model, images, token=0):
    """Attention of CLS to each patch in a ViT's last block: images [B, 3, H, W] -> [B, heads, H / patch, W / patch].

    H and W are multiples of the patch size. Without the attention to CLS itself, so a map sums to less than 1. `token`
    is another token to look from: 1 + row * columns + column is a patch.
    """
    rows, columns = (side // model.patch_embed.patch_size for side in images.shape[-2:])
    tokens = model.prepare_tokens(images)
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    last = model.blocks[-1]
    queries, keys, _ = last.attn.split_heads(last.norm1(tokens))
    attention = last.attn.attention_map(queries[:, :, token : token + 1], keys)  # [B, heads, 1, 1 + patches]: one row
    return attention[:, :, 0, 1:].unflatten(-1, (rows, columns))


def largest_mass(attention, threshold):
    """Mask of the fewest patches that have a share `threshold` of each map's mass: bool like attention [..., h, w]."""
    mass, order = attention.flatten(-2).sort(dim=-1)
    cumulative = mass.cumsum(dim=-1) / mass.sum(dim=-1, keepdim=True)
    kept = cumulative > 1 - threshold
    return torch.zeros_like(kept).scatter(-1, order, kept).view(attention.shape)


def main_components(tokens):
    """The first three principal components of tokens [N, P, D], scaled to 0..1: [N, P, 3].

    0 and 1 are the 2nd and 98th percentile of each component.
    """
    centered = tokens.flatten(0, 1).double()
    centered -= centered.mean(dim=0)
    axes = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -3:].flip(1)  # [D, 3], the largest first
    axes *= axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()  # eigenvectors have no sign: fix one
    found = centered @ axes
    low, high = found.quantile(torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    return ((found - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).unflatten(0, tokens.shape[:2])


@torch.no_grad()
def accuracy(output, target, topk=(1,)):
    """Top-k accuracies in percent, one scalar tensor per k, of logits [N, C] and labels [N]."""
    hits = output.topk(max(topk), dim=1).indices == target.view(-1, 1)  # [N, largest k]
    return [100.0 * hits[:, :k].any(dim=1).float().mean() for k in topk]


# ---- nearest neighbors ----


def labeled_features(
    model, sets, batch_size, num_workers, device, use_cuda=True, stop=None, amp_dtype=None, name="Features", unit=True
):
    """(train features, train labels, test features, test labels); None on other ranks than 0.

    `sets` are two data sets of (image, index), and the labels of each. Features are L2-normalized if `unit`. All ranks
    have to call it. Raises utils.Stopped if the StopRequest `stop` has a signal. `name` is the network's, for the lines
    that show progress.
    """
    train, test, train_labels, test_labels = sets
    features = []
    for part, dataset in (("train", train), ("val", test)):
        # A signal to the whole process group is for the training process, not for its loaders.
        in_worker = utils.ignore_signals if stop else None
        loader = dino_data.eval_loader(dataset, batch_size, num_workers, device, in_worker)
        how = {"stop": stop, "amp_dtype": amp_dtype, "header": f"{name}, {part}:"}
        features.append(extract_features(model, loader, use_cuda, **how))
    if not utils.is_main_process():
        return None
    for rows in features if unit else ():
        rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(1e-12))  # in place: they may fill half of a GPU
    train_features, test_features = features
    return train_features, train_labels.to(train_features.device), test_features, test_labels.to(test_features.device)


# In the order in which `labeled_features` returns the tensors.
FEATURE_FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def dump_features(tensors, folder):
    """Write (train features, train labels, test features, test labels) to FEATURE_FILES in `folder`."""
    for tensor, name in zip(tensors, FEATURE_FILES, strict=True):
        utils.save_on_master(tensor.cpu(), os.path.join(folder, name))


def load_features(folder, device, multilabel=False):
    """Read the files of --dump_features: (train features [N, D], train labels [N], test features, test labels).

    With `multilabel`, labels may also be [N, C] of 1 (has the label), -1 (has not) and 0 (not counted). Raises
    UserError if a file is missing, or if the tensors do not fit together.
    """
    for name in FEATURE_FILES:
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(f"--load_features {folder} has no {name}. Use a folder that --dump_features wrote")
    tensors = [dino_checkpoints.load_checkpoint(os.path.join(folder, name)) for name in FEATURE_FILES]
    for part, features, labels in (("train", *tensors[:2]), ("test", *tensors[2:])):
        both = isinstance(features, torch.Tensor) and isinstance(labels, torch.Tensor)
        per_class = multilabel and both and labels.ndim == 2
        if not both or features.ndim != 2 or not (labels.ndim == 1 or per_class) or not features.is_floating_point():
            names = f"{folder}/{part}feat.pth and {part}labels.pth"
            raise UserError(f"{names} must hold tensors: floats [N, D] and labels [N]")
        if per_class and not ((labels == -1).any() and torch.isin(labels, torch.tensor([-1, 0, 1])).all()):
            raise UserError(f"{folder}/{part}labels.pth must hold 1 (has the label), -1 (has not) and 0 (not counted)")
        if labels.is_floating_point() or (not per_class and len(labels) and labels.min() < 0):
            raise UserError(f"{folder}/{part}labels.pth must hold class indices >= 0")
        if len(features) != len(labels) or not len(features):
            raise UserError(f"{folder} has {len(features)} {part} features and {len(labels)} labels")
    if tensors[0].shape[1] != tensors[2].shape[1]:
        widths = f"train features have {tensors[0].shape[1]} dimensions, test features {tensors[2].shape[1]}"
        raise UserError(f"{folder}: {widths}. Dump both again with one network")
    if tensors[1].shape[1:] != tensors[3].shape[1:]:
        raise UserError(f"{folder}: train labels and test labels are of different classes. Dump both again")
    return [tensor.to(device, torch.float32 if tensor.is_floating_point() else torch.long) for tensor in tensors]


NUMBERS_AT_ONCE = 2**25  # similarities, or votes, in memory at a time: 128 MB


def knn_classifier(train_features, train_labels, test_features, test_labels, k, T, num_classes=1000):
    """Weighted k-NN accuracy (section 4.1, after arXiv 1805.01978): (top-1, top-5) in percent.

    L2-normalized features [N, D], labels [N] from 0. `num_classes` is ignored: the labels say it. If k is larger than
    the training set, all of it votes. Raises UserError for NaN or infinite features. Memory is bounded.
    """
    return knn_accuracies(train_features, train_labels, test_features, test_labels, [k], T)[k]


@torch.no_grad()
def knn_accuracies(train_features, train_labels, test_features, test_labels, ks, T):
    """{k: (top-1, top-5)} as `knn_classifier` gives them for each k of a list, from one search."""
    check_finite_features(train_features, test_features)
    classes, labels = torch.cat((train_labels, test_labels)).unique(return_inverse=True)  # renumbered without gaps
    train_labels, test_labels = labels.split((len(train_labels), len(test_labels)))
    rows = max(NUMBERS_AT_ONCE // max(len(train_features), len(classes)), 1)
    hits = torch.zeros(len(ks), 2, device=test_features.device)
    for chunk, target in zip(test_features.split(rows), test_labels.split(rows), strict=True):
        # Cosine similarities and labels of the nearest training images, best first: [rows, largest k].
        similarity, nearest = (chunk @ train_features.T).topk(min(max(ks), len(train_features)), dim=1)
        for i, k in enumerate(ks):
            rank = rank_of_target(similarity[:, :k], train_labels[nearest[:, :k]], target, T, classes)
            hits[i] += torch.stack(((rank < 1).sum(), (rank < min(5, k)).sum()))
    percent = (100.0 * hits.double().cpu() / len(test_labels)).tolist()
    return {k: tuple(accuracies) for k, accuracies in zip(ks, percent, strict=True)}


def rank_of_target(similarities, neighbor_labels, target, T, classes):
    """Rank of the right class (0: best) if neighbor j votes with weight exp(similarity_j / T): [rows].

    Labels are indices into the sorted class numbers `classes`. Classes with equal votes rank by number. So do classes
    without votes, and numbers that no image has count too, as if votes were kept for all of 1000 classes.
    """
    weights = ((similarities - similarities[:, :1]) / T).exp()  # relative to the nearest: no overflow, the same ranks
    votes = weights.new_zeros(len(weights), len(classes)).scatter_add_(1, neighbor_labels, weights)
    target = target[:, None]
    votes_of_target = votes.gather(1, target)
    voted, lower = votes > 0, torch.arange(len(classes), device=votes.device) < target
    before = (votes > votes_of_target) | (voted & lower & (votes == votes_of_target))
    lower_without_votes = classes[target[:, 0]] - (voted & lower).sum(dim=1)
    return before.sum(dim=1) + torch.where(votes_of_target[:, 0] > 0, 0, lower_without_votes)


@torch.no_grad()
def nearest_neighbors(queries, blocks, k, own=None):
    """The k rows that are most similar to each query: (cosine similarities, indices), [Q, k] each, best first.

    `queries` [Q, D] are on the device that computes. `blocks` yields all rows in order, float32 [b, D] at a time, of
    which there must be k. If the queries are rows themselves, `own` is the index of the first: none finds itself.
    """
    queries, first = F.normalize(queries, dim=1), 0
    best = queries.new_full((len(queries), k), -math.inf)
    places = torch.zeros_like(best, dtype=torch.long)
    for block in blocks:
        block = F.normalize(torch.as_tensor(block).to(queries.device), dim=1)
        similarity = queries @ block.T  # [Q, b]
        if own is not None:
            similarity.diagonal(own - first).fill_(-math.inf)
        values, found = similarity.topk(min(k, len(block)), dim=1)
        best, order = torch.cat((best, values), dim=1).topk(k, dim=1)
        places = torch.cat((places, found + first), dim=1).gather(1, order)
        first += len(block)
    return best, places


# ---- k-NN during training ----

NEIGHBORS, TEMPERATURE = 20, 0.07


class OnlineKnn:
    """k-NN accuracy of the teacher every N epochs. Training is the same with it and without.

    Without `knn_data`, every tenth image per class of the training folder is classified by the others. Raises UserError
    if there are no labels.
    """

    def __init__(self, args, images, device):
        self.args, self.device = args, device
        inputs = utils.inputs_of(args)
        transform = dino_crops.eval_transform(args.global_crops_size, inputs)
        if args.knn_data is None:
            self.sets = dino_data.split_every_tenth(images, transform, f"--data_path {args.data_path}", inputs)
        else:
            how = (args.exif, "--knn_data", inputs, args.list_columns)
            self.sets = dino_data.find_labeled(args.knn_data, transform, *how)
        part = "held-out" if args.knn_data is None else "validation"
        self.what = f"{len(self.sets[1])} {part} images among {len(self.sets[0])}"
        for dataset in self.sets[:2]:
            dataset.lenient = True  # an unreadable image does not end a run of a week

    def due(self, epoch):
        """Whether to measure after this epoch (from 0). After the last one, always."""
        return (epoch + 1) % self.args.knn_every == 0 or epoch + 1 == self.args.epochs

    def baselines(self, backbone, stop=None):
        """{"knn_start": ..., "knn_raw_pixels": ...}: top-1 accuracies of the start weights and of raw pixels."""
        models = {"knn_start": (backbone, "start weights"), "knn_raw_pixels": (raw_pixels(self.device), "raw pixels")}
        found = {key: self.accuracies(model, stop, name).get("knn_top1") for key, (model, name) in models.items()}
        return {name: top1 for name, top1 in found.items() if top1 is not None}

    def accuracies(self, backbone, stop=None, name="teacher"):
        """{"knn_top1": ..., "knn_top5": ...} in percent, the same on all ranks. {} if the GPU has no memory for it.

        All ranks have to call it. Raises utils.Stopped if the StopRequest `stop` has a signal on any rank.
        """
        training = backbone.training
        backbone.eval()
        how = (self.args.batch_size_per_gpu, self.args.num_workers, self.device)
        found, features = {}, None
        try:
            features = labeled_features(backbone, self.sets, *how, stop=stop, name=f"Features of the {name}")
            if features:
                top1, top5 = knn_accuracies(*features, [NEIGHBORS], TEMPERATURE)[NEIGHBORS]
                found = {"knn_top1": top1, "knn_top5": top5}
        except torch.cuda.OutOfMemoryError as e:
            if features is None and utils.get_world_size() > 1:
                raise  # the others wait for features of this process
            reason = str(e).split(". ")[0]
            utils.say(f"warning: no k-NN accuracy, the GPU's memory is full ({reason}). Use a smaller --knn_data")
        backbone.train(training)
        return utils.gather_objects(found)[0]  # the others wait for rank 0 here


def raw_pixels(device=None):
    """Baseline: the image itself, averaged down to 16 x 16 pixels, as the feature vector [B, 16 * 16 * channels]."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten())
    model.register_buffer("place", torch.empty(0, device=device))
    return model


# ---- retrieval ----


def compute_ap(ranks, nres):
    """Average precision (by trapezoids) of a query whose `nres` positives have these ranks, from 0."""
    before = np.arange(len(ranks))
    ranks = np.asarray(ranks, dtype=np.float64)
    precision_left = np.where(ranks == 0, 1.0, before / np.maximum(ranks, 1))
    precision_right = (before + 1) / (ranks + 1)
    return float((precision_left + precision_right).sum() / (2 * nres))


def compute_map(ranks, gnd, kappas=()):
    """(mAP, AP per query, mP@k for each k of `kappas`, P@k per query and k), from 0 to 1.

    `ranks` [database, queries] has the indices of database images, best first; `gnd` one dict per query with the
    indices that are `ok` and, optionally, `junk`, which are skipped. Queries without a positive are NaN and do not
    count. If the last positive of a query comes before rank k, its P@k is over the ranks up to that one.
    """
    aps, precisions = np.full(len(gnd), np.nan), np.full((len(gnd), len(kappas)), np.nan)
    for i, query in enumerate(gnd):
        if not len(query["ok"]):
            continue
        junk = np.isin(ranks[:, i], query.get("junk", ()))
        places = np.arange(len(ranks)) - np.cumsum(junk)  # ranks from 0 without the junk
        found = places[np.isin(ranks[:, i], query["ok"])]
        aps[i] = compute_ap(found, len(query["ok"]))
        depths = np.minimum(kappas, found.max() + 1)
        precisions[i] = [(found < depth).sum() / depth for depth in depths]
    counted = ~np.isnan(aps)
    if not counted.any():
        return math.nan, aps, np.full(len(kappas), np.nan), precisions
    return aps[counted].mean(), aps, precisions[counted].mean(axis=0), precisions


class PCA:
    """Projection to `dim` principal components, each divided by its variance to the power `whit` (0.5: whitened).

    `mean`, if set, is subtracted first.
    """

    def __init__(self, dim=256, whit=0.5):
        self.dim, self.whit, self.mean = dim, whit, None

    def train_pca(self, cov):
        """Learn the components of a symmetric matrix [D, D]. Variances are at least 1e-5 of the largest."""
        variances, components = np.linalg.eigh(np.asarray(cov, dtype=np.float64))  # ascending; components in columns
        variances = np.maximum(variances, 1e-5 * variances.max())[::-1][: self.dim]
        self.dvt = components[:, ::-1][:, : self.dim].T / variances[:, None] ** self.whit  # [dim, D]

    def apply(self, x):
        """Project the rows of x [N, D], an array or a tensor -> [N, dim], of the same type."""
        rows = x.cpu().double().numpy() if isinstance(x, torch.Tensor) else x
        projected = (rows if self.mean is None else rows - self.mean) @ self.dvt.T
        return torch.from_numpy(projected).to(x.dtype).to(x.device) if isinstance(x, torch.Tensor) else projected


# ---- pictures of attention ----


def prepare(image, size, patch_size):
    """PIL image -> uint8 [3, H, W], resized and cropped to whole patches at the bottom and on the right.

    `size` is (height, width), or (shorter side,), or None for the original size. Raises UserError if the result is
    smaller than one patch.
    """
    if size is not None:
        image = resize(image, list(size))
    height, width = (side - side % patch_size for side in (image.height, image.width))
    if not height or not width:
        found = f"{image.width} × {image.height} pixels are less than one patch (--patch_size {patch_size})"
        raise UserError(f"{found}. Use larger images, or resize them")
    return pil_to_tensor(image)[:, :height, :width]


def to_pixels(patches, patch_size):
    """Repeat the value of each patch at all of its pixels: [h, w, ...] -> NumPy array [h · patch, w · patch, ...]."""
    return np.asarray(patches).repeat(patch_size, axis=0).repeat(patch_size, axis=1)


def draw_mask(pixels, mask, divisor, outline=None):
    """The image [H, W, 3] uint8, divided by `divisor` where `mask` [H, W] is False.

    `outline` is the color of a line along the border of the mask, two pixels wide; None draws no line.
    """
    drawn = np.where(mask[..., None], pixels, pixels // divisor)
    if outline is not None:
        from skimage.segmentation import find_boundaries

        drawn[find_boundaries(mask, mode="thick")] = outline
    return drawn


# ---- contact sheets ----

TILE, GAP, CAPTION = 128, 8, 30  # pixels: side of an image, margin, height of the two lines below an image


def draw_sheet(rows):
    """A PIL image of rows of (PIL image or None, first line, name), each drawn whole in a square with text below."""
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, len(rows) * (TILE + CAPTION + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, tiles in enumerate(rows):
        for column, (image, line, name) in enumerate(tiles):
            left, top = GAP + column * (TILE + GAP), GAP + row * (TILE + CAPTION + GAP)
            square = Image.new("RGB", (TILE, TILE), "lightgray")
            sheet.paste(square if image is None else ImageOps.pad(image, (TILE, TILE), color="white"), (left, top))
            draw.text((left, top + TILE + 2), line, "black", font)
            draw.text((left, top + TILE + 2 + CAPTION // 2), shorten(name, font), "black", font)
    return sheet


def shorten(name, font):
    """The end of a path, at most TILE pixels wide: its middle becomes dots."""
    name = os.path.basename(name).encode("latin-1", errors="replace").decode("latin-1")  # what the font has
    short = name
    for kept in range(len(name) // 2, 0, -1):
        if font.getlength(short) <= TILE:
            break
        short = f"{name[:kept]}...{name[-kept:]}"
    return short
