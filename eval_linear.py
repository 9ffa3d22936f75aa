"""Linear classification of frozen features (section 4.1 of the paper).

    python eval_linear.py --pretrained_weights runs/vits16 --data_path imagenet --output_dir runs/linear
    python eval_linear.py --lr 0.001 0.01 0.1 --pretrained_weights runs/vits16 --data_path imagenet  # keeps the best
    python eval_linear.py --evaluate --data_path imagenet                          # published ViT-S/16 and head: 77.0 %
    python eval_linear.py --evaluate --arch vit_base --n_last_blocks 1 --avgpool_patchtokens true --data_path imagenet

--data_path holds train/<class>/* and val/<class>/*. Trains one linear layer on random crops and flips. Prints its
accuracy on the validation images. Writes log.txt, one JSON object per epoch, and checkpoint.pth.tar to --output_dir.
Run the same command again to resume; the result is bit-identical to an uninterrupted run.

Several values of --lr, --n_last_blocks and --avgpool_patchtokens train one layer per combination, each as if it were
alone, in one pass over the network. checkpoint.pth.tar then has the layer with the best validation accuracy, and
log.txt one line per epoch and layer. The paper sweeps the learning rate for each network (appendix F.2).
"""

import argparse
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision import transforms

import dino_backbones
import dino_checkpoints
import dino_classifiers
import dino_cli
import dino_crops
import dino_data
import dino_features
import dino_images
import dino_linear
import utils
from dino_classifiers import build_loader, check_finite, check_settings, in_words, validate
from dino_cli import at_least, between, positive
from dino_linear import values_of
from utils import UserError, bool_flag

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parents = [dino_cli.model_flags(), dino_cli.labeled_flags(), dino_cli.process_flags()]
    parser = argparse.ArgumentParser("Linear evaluation", add_help=False, parents=parents)
    # fmt: off
    several = {"nargs": "+", "action": dino_linear.OneOrMore}
    parser.add_argument("--n_last_blocks", default=4, type=at_least(1), metavar="N", **several, help="""Concatenate the
        CLS tokens of the last N blocks of a ViT: 4 for ViT-S and smaller, 1 for ViT-B. Ignored for other networks,
        which give their pooled output. One or more values.""")
    parser.add_argument("--avgpool_patchtokens", default=False, type=bool_flag, metavar="BOOL", **several,
        help="""Also use the mean patch token of a ViT's last block: false for ViT-S, true for ViT-B. One or two
        values.""")
    parser.add_argument("--image_size", default=224, type=at_least(1), metavar="PIXELS",
        help="""Input size of the network. Validation images are resized to 8/7 of this size, then center-cropped.
        Default for a run: its global crops.""")
    parser.add_argument("--epochs", default=100, type=at_least(1), metavar="E", help="Passes over the training images.")
    parser.add_argument("--lr", default=0.001, type=positive, metavar="LR", **several, help="""Initial learning rate
        for a global batch of 256, scaled linearly with the batch. It follows a cosine to 0, one value per epoch. For
        your own networks, name several values, such as 0.001 0.003 0.01 0.03 0.1 0.3: the best is kept.""")
    parser.add_argument("--batch_size_per_gpu", default=128, type=at_least(1), metavar="B",
        help="Images per process and step. The last batch of an epoch may be smaller.")
    parser.add_argument("--val_freq", default=1, type=at_least(1), metavar="E",
        help="Validate every E epochs, and after the last.")
    parser.add_argument("--num_labels", default=None, type=at_least(1), metavar="C", help="""Outputs of the linear
        layer. Default: the number of class folders, or 1000 for a published head.""")
    parser.add_argument("--evaluate", action="store_true", help="Evaluate a linear layer instead of training one.")
    parser.add_argument("--linear_weights", default="", metavar="FILE", help="""Linear layer for --evaluate: a
        checkpoint.pth.tar of this script, or a file in the published format. Default: the published layer for --arch
        and --patch_size.""")
    parser.add_argument("--output_dir", default=".", metavar="DIR", help="Folder for log.txt and checkpoint.pth.tar.")
    parser.add_argument("--seed", default=0, type=between(0, 2**63 - 1), metavar="N",
        help="Seed of the initial weights, the image order and the crops.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for flags that contradict each other, and for an unknown --arch."""
    if args.linear_weights and not args.evaluate:
        raise UserError("--linear_weights needs --evaluate. Training resumes from --output_dir instead")
    for flag in dino_linear.Setting._fields:
        values = values_of(args, flag)
        given = f"--{flag} {in_words(values)}"
        if len(set(values)) < len(values):
            raise UserError(f"{given} has a value twice. Remove one")
        if len(values) > 1 and args.evaluate:
            raise UserError(f"{given}: --evaluate is for one linear layer. Use one value")
        if len(values) > 1 and flag == "n_last_blocks" and not dino_backbones.vit_factory(args.arch):
            raise UserError(f"{given}: --arch {args.arch} gives its pooled output only. Use one value")
    if dino_backbones.vit_factory(args.arch):
        dino_cli.check_whole_patches("image_size", args.image_size, args.patch_size)
    dino_backbones.check_arch(args.arch)


# ---- data ----


def load_data(args):
    """(train, val, train labels [N], val labels [M], class names). Labels are indices into the class names.

    `train[epoch, index]` -> (random crop, index, None); `val[index]` -> (image, index). Images are uint8, or normalized
    floats if the network was not trained on RGB images. --evaluate does not need train/: without it, train and its
    labels are None and the classes are the folders of val/. Raises UserError.
    """
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights)
    transform = dino_crops.eval_transform(args.image_size, inputs)
    if args.evaluate and dino_data.find_part(args.data_path, "train") is None:
        how = {"in_chans": inputs.in_chans, "columns": args.list_columns}
        val = dino_data.labeled_part(args.data_path, "val", args.exif, **how)
        return None, dino_data.EvalImages(val, transform, inputs=inputs), None, val.targets, val.classes
    sets = dino_data.labeled_images(args.data_path, transform, args.exif, inputs=inputs, columns=args.list_columns)
    train, val, train_labels, val_labels = sets
    # MultiCropDataset, because random crops depend on the epoch as well as on the index.
    crop, flip = transforms.RandomResizedCrop(args.image_size), transforms.RandomHorizontalFlip()
    decode, finish = functools.partial(dino_images.decode, inputs=inputs), dino_crops.last_transforms(inputs)
    augment = transforms.Compose([decode, crop, flip, *finish])
    crops = dino_data.MultiCropDataset(train.images, augment, args.seed, strict=True)
    return crops, val, train_labels, val_labels, train.images.classes


# ---- features ----


def build_model(args, device, amp_dtype=None):
    """(frozen network on the device, [T, D] of its `frozen_tokens`). Raises UserError if the flags do not fit it."""
    blocks, avgpool = max(values_of(args, "n_last_blocks")), any(values_of(args, "avgpool_patchtokens"))
    if dino_backbones.vit_factory(args.arch):
        with torch.device("meta"):  # no memory, no download: this only reads the depth
            depth = len(dino_backbones.build_backbone(args.arch, args.patch_size)[0].blocks)
        if blocks > depth:
            raise UserError(f"--n_last_blocks {blocks}: {args.arch} has only {depth} blocks. Lower it")
    elif avgpool:
        raise UserError(f"--arch {args.arch} has no patch tokens to pool. Remove --avgpool_patchtokens")
    # The network stays in evaluation mode: no dropout, and batch norms keep their statistics.
    inputs = dino_checkpoints.trained_inputs(args.pretrained_weights)
    model, width = dino_backbones.frozen_backbone(args, device, args.image_size, inputs=inputs, amp_dtype=amp_dtype)
    return model, (blocks + avgpool if dino_backbones.is_vit(model) else 1, width)


@torch.no_grad()
def frozen_tokens(model, images, n_last_blocks=4, avgpool=False):
    """Tokens [B, T, D] of images [B, C, H, W], uint8 or normalized, on the model's device.

    For a ViT: the mean patch token of the last block, if `avgpool`, then the CLS tokens of the last n blocks, first to
    last; all after the final norm. For other networks: their pooled output, as one token.
    """
    images = utils.normalize(images)
    if not dino_backbones.is_vit(model):
        return utils.features_of(model, images).flatten(1)[:, None]
    layers = model.get_intermediate_layers(images, n_last_blocks)  # n of [B, 1 + patches, D]
    mean = [layers[-1][:, 1:].mean(dim=1)] if avgpool else []
    return torch.stack(mean + [tokens[:, 0] for tokens in layers], dim=1)


def head_features(tokens, n_last_blocks=4, avgpool=False):
    """Features [B, width] of one linear layer, from `frozen_tokens` of at least n blocks.

    The CLS tokens of the last n blocks, first to last. `avgpool` interleaves the last with the mean patch token:
    (cls_0, mean_0, cls_1, mean_1, ...). The published ViT-B heads were trained on this order.
    """
    parts = [tokens[:, -n_last_blocks:]]
    if avgpool:
        parts = [parts[0][:, :-1], torch.stack((tokens[:, -1], tokens[:, 0]), dim=-1)]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


class KeptFeatures:
    """Batches (tokens [B, T, D], indices [B]) of a loader of images, on a device.

    The images of an evaluation are the same in each epoch, so their tokens are computed in the first pass and kept.
    """

    def __init__(self, extract, data_loader, device):
        self.extract, self.data_loader, self.device = extract, data_loader, device
        self.batches, self.length = None, len(data_loader)

    def __len__(self):
        return self.length

    def __iter__(self):
        if self.batches is None:
            batches = []
            for images, indices in self.data_loader:
                tokens = self.extract(images.to(self.device, non_blocking=True))
                batches.append((tokens, indices.to(self.device, non_blocking=True)))
                yield batches[-1]
            self.batches, self.data_loader = batches, None  # and its processes end
        else:
            yield from self.batches


# ---- classifier ----


class LinearClassifier(nn.Module):
    """Linear layer on top of frozen features: [B, ...] with `dim` values per image -> logits [B, num_labels]."""

    def __init__(self, dim, num_labels=1000):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(x.flatten(1))


class Heads(nn.Module):
    """H linear layers with a Setting each: tokens [B, T, D] -> H logits [B, num_labels].

    Each starts with the weights that it would have alone.
    """

    def __init__(self, settings, token_shape, num_labels):
        super().__init__()
        self.settings, self.classifiers = settings, nn.ModuleList()
        start = torch.get_rng_state()
        for features in self.features(torch.zeros(1, *token_shape)):
            torch.set_rng_state(start)
            self.classifiers.append(LinearClassifier(features.shape[1], num_labels))

    def features(self, tokens):
        return [head_features(tokens, s.n_last_blocks, s.avgpool_patchtokens) for s in self.settings]

    def forward(self, tokens):
        return [head(x) for head, x in zip(self.classifiers, self.features(tokens), strict=True)]


def load_head(classifier, args):
    """Load the linear layer for --evaluate. Raises UserError if it does not fit the features or the labels."""
    if args.linear_weights:
        source, file = args.linear_weights, dino_checkpoints.load_checkpoint(args.linear_weights)
    else:
        source, file = dino_backbones.load_published(args.arch, args.patch_size, "linear", "--linear_weights")
        if file is None:
            name = f"{args.arch} with --patch_size {args.patch_size}"
            raise UserError(f"no linear head was published for {name}. Set --linear_weights")
    state = file.get("state_dict", file) if isinstance(file, dict) else {}
    tensors = state.items() if isinstance(state, dict) else ()
    head = {str(key).removeprefix("module."): value for key, value in tensors if isinstance(value, torch.Tensor)}
    weight, bias = head.get("linear.weight"), head.get("linear.bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise UserError(f"{source} holds no linear.weight and linear.bias. Use a checkpoint.pth.tar of this script")
    (labels, width), (labels_here, width_here) = weight.shape, classifier.linear.weight.shape
    if (labels, width) != (labels_here, width_here):
        raise UserError(
            f"the head in {source} has {labels} labels and {width} features; this run has {labels_here} labels and "
            f"{width_here} features. Set --num_labels, --n_last_blocks and --avgpool_patchtokens (published heads: 4 "
            "and false for ViT-S, 1 and true for ViT-B)"
        )
    check_settings(source, file, args, dino_linear.FEATURE_SETTINGS)
    classifier.load_state_dict({name: head[name] for name in classifier.state_dict()})


# ---- training ----


def train_one_epoch(extract, heads, data_loader, labels, optimizers, epoch_name, shown=0):
    """Train for one epoch; returns {loss, lr} per linear layer, means over the steps of all processes.

    `extract` maps a batch of images to tokens [B, T, D] without gradients; `labels` [N] are on the device;
    `epoch_name` is for messages, such as [3/100]; the lines show layer number `shown`. Raises UserError (exit code 3)
    if no loss is finite, before the optimizer step.
    """
    metrics = [utils.MetricLogger() for _ in optimizers]
    for images, indices, *_ in metrics[shown].log_every(data_loader, 20, f"Epoch: {epoch_name}"):
        images = images.to(labels.device, non_blocking=True)
        targets = labels[indices.to(labels.device, non_blocking=True)]  # [B]
        losses = torch.stack([F.cross_entropy(logits, targets) for logits in heads(extract(images))])  # [H]
        losses_on_host = utils.HostCopy(losses)  # copied while the backward pass runs
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()  # a layer gets only the gradient of its own loss
        numbers = losses_on_host.read()
        check_finite(numbers, f"in epoch {epoch_name}")
        for meters, loss, optimizer in zip(metrics, numbers, optimizers, strict=True):
            optimizer.step()
            meters.update(loss=loss, lr=optimizer.param_groups[0]["lr"])
    for meters in metrics:
        meters.synchronize_between_processes()
    means = [{name: meter.global_avg for name, meter in meters.meters.items()} for meters in metrics]
    check_finite([mean["loss"] for mean in means], f"in epoch {epoch_name}")
    return means


# ---- the run ----


def main(args):
    """Train linear classifiers, resume their training, or --evaluate one. Raises UserError."""
    dino_checkpoints.follow_run(args)
    check_args(args)
    if not args.evaluate:
        dino_cli.check_output_dir(args.output_dir, files=("checkpoint.pth.tar", "log.txt"))
    device = utils.init_distributed_mode(args)
    utils.fix_random_seeds(args.seed)

    # ---- data ----
    train, val, train_labels, val_labels, classes = load_data(args)
    args.classes = dino_classifiers.digest_of_classes(classes)
    args.num_labels = args.num_labels or (1000 if args.evaluate and not args.linear_weights else len(classes))
    if len(classes) > args.num_labels:
        number = f"{len(classes)} classes, more than --num_labels {args.num_labels}"
        raise UserError(f"--data_path {args.data_path} has {number}. Raise --num_labels")
    if args.evaluate and len(classes) < args.num_labels:
        utils.log(f"note: the {len(classes)} classes of the data use the first of the head's {args.num_labels} outputs")
    # Each image on exactly one process. dino_data.eval_loader would repeat images to give all ranks the same number.
    val_loader = build_loader(val, range(args.rank, len(val), args.world_size), args, device)
    val_labels = val_labels.to(device)

    # ---- frozen network, classifiers ----
    amp_dtype = dino_features.pick_dtype(device, args.amp_dtype)
    model, token_shape = build_model(args, device, amp_dtype)
    args.weights = dino_features.digest_of_weights(model)
    blocks = {
        "n_last_blocks": max(values_of(args, "n_last_blocks")),
        "avgpool": any(values_of(args, "avgpool_patchtokens")),
    }
    network = functools.partial(frozen_tokens, model, **blocks)
    extract = functools.partial(dino_features.features_in, network, amp_dtype=amp_dtype)
    heads = Heads(dino_linear.sweep_of(args), token_shape, args.num_labels).to(device)
    val_set = KeptFeatures(extract, val_loader, device), val_labels
    if args.evaluate:
        load_head(heads.classifiers[0], args)
        validate(heads, *val_set)
        return
    train_heads(extract, heads, (train, train_labels.to(device)), val_set, args)


def train_heads(extract, heads, train_set, val_set, args):
    """Train for the remaining epochs. Writes log lines and a checkpoint after each. Raises UserError.

    `train_set` is (images, labels [N]), `val_set` is (batches, labels [M]) of `validate`. Labels are on the device.
    """
    train, train_labels = train_set
    # A sampler with batch size 1 drops only the remainder of images by processes. The loader makes the batches.
    sampler = dino_data.EpochSampler(train.images, 1, args.seed, args.rank, args.world_size)
    if not len(sampler):
        raise UserError(f"{len(train)} training images are too few for {args.world_size} processes. Start fewer")
    device = train_labels.device
    train_loader = build_loader(train, sampler, args, device, dino_data.collate)
    args.num_images, args.global_batch = len(train), args.batch_size_per_gpu * args.world_size
    training = dino_linear.Training(heads, args)
    training.resume()
    shared = heads
    if args.world_size > 1:
        shared = DistributedDataParallel(heads, device_ids=[device] if device.type == "cuda" else None)
    for epoch in range(training.epoch, args.epochs):
        sampler.set_epoch(epoch)
        name = f"[{epoch}/{args.epochs}]"
        means = train_one_epoch(extract, shared, train_loader, train_labels, training.optimizers, name, training.best())
        for scheduler in training.schedulers:
            scheduler.step()
        tested = None
        if epoch % args.val_freq == 0 or epoch == args.epochs - 1:
            tested = validate(heads, *val_set)
        training.end_epoch(means, tested)
    training.print_result()


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
