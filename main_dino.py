"""Train a network by self-distillation with no labels (DINO, arXiv 2104.14294).

    python main_dino.py --config recipes/demo.yaml --output_dir runs/demo       # some minutes on a CPU, no data needed
    python main_dino.py --data_path imagenet/train --output_dir runs/vits16                            # one GPU
    torchrun --nproc_per_node 8 main_dino.py --data_path imagenet/train --output_dir runs/vits16       # eight

Writes checkpoint.pth (student, teacher, optimiser, center; the run goes on from it when started again) and log.txt
(one JSON object an epoch) into --output_dir. ViT-S/16, 100 epochs on ImageNet: 69.3 % k-NN, 74.0 % linear.
"""

import argparse
import contextlib
import functools
import inspect
import json
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import dino_data
import dino_images
import health
import utils
from knn import OnlineKnn
from utils import UserError, at_least, between, bool_flag, share
from vision_transformer import DINOHead

# ---- arguments ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`; `utils.parse_args` also reads a recipe named by --config."""
    parser = argparse.ArgumentParser("DINO", add_help=False)
    # fmt: off
    model = parser.add_argument_group("model")
    model.add_argument("--arch", default="vit_small", metavar="NAME", help="""vit_nano (ours, for CPUs), vit_tiny,
        vit_small, vit_base; deit_tiny and deit_small mean the same as the vits; an XCiT such as xcit_small_12_p16; a
        torchvision classification network such as resnet50; or timm:<name>.""")
    model.add_argument("--list_archs", action=ListArchs, nargs=0, default=argparse.SUPPRESS,
        help="Print every name that --arch knows, and stop.")
    model.add_argument("--patch_size", default=16, type=at_least(1), metavar="PIXELS", help="""Side of a ViT's patches.
        8 instead of 16 gives better features for about five times the compute; fp16 may be unstable then: bf16, or
        --use_fp16 false.""")
    model.add_argument("--init_from", default="", metavar="FILE", help="""Start from these weights, not at random: a
        checkpoint or state dict; `published` for those of the paper's authors; `timm` for timm's pretrained ones. The
        run itself is new. To go on with a run, start it again with its --output_dir.""")
    model.add_argument("--out_dim", default=65536, type=at_least(1), metavar="K", help="""Width of the head's output,
        the number of prototypes. Large data likes it large; a few thousand images are served by 1024 to 4096.""")
    model.add_argument("--norm_last_layer", default=True, type=bool_flag, metavar="BOOL", help="""Keep the gain of the
        head's last layer at 1. false trains a little better where training is stable (the long ViT-S runs), true is
        the safe choice and what ViT-B wants.""")
    model.add_argument("--use_bn_in_head", default=False, type=bool_flag, metavar="BOOL",
        help="Batch normalisation inside the head's MLP. The paper's ViTs do without; with it short runs start faster.")
    model.add_argument("--drop_path_rate", default=0.1, type=between(0, 0.999, float), metavar="P",
        help="Stochastic depth of the student, rising linearly to this over a ViT's blocks.")

    teacher = parser.add_argument_group("teacher and temperatures")
    teacher.add_argument("--momentum_teacher", default=0.996, type=share, metavar="M", help="""How slowly the teacher
        follows the student (1 = not at all); rises to 1 over the run by a cosine. Small batches need it closer to 1:
        0.9995 for 256 images a step.""")
    teacher.add_argument("--warmup_teacher_temp", default=0.04, type=at_least(1e-6, float), metavar="T",
        help="Teacher temperature at the start. If the loss does not come down, try lower.")
    teacher.add_argument("--teacher_temp", default=0.04, type=at_least(1e-6, float), metavar="T",
        help="Teacher temperature after the warm-up. Up to 0.07 can pay in long runs; more tends to be unstable.")
    teacher.add_argument("--warmup_teacher_temp_epochs", default=0, type=at_least(0), metavar="EPOCHS",
        help="Epochs over which the teacher temperature goes from the first to the second. 30 with 0.07.")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", default=100, type=at_least(1), help="Length of the run.")
    optim.add_argument("--batch_size_per_gpu", default=64, type=at_least(1), metavar="B",
        help="Images a step in each process (one process per GPU).")
    optim.add_argument("--grad_accum_steps", default=1, type=at_least(1), metavar="N", help="""Compute each step's
        gradients in so many passes of --batch_size_per_gpu images: the result of a batch that large, in the memory of
        one pass.""")
    optim.add_argument("--lr", default=0.0005, type=at_least(0, float),
        help="Learning rate after the warm-up, for 256 images a step; it is scaled by (images a step)/256.")
    optim.add_argument("--warmup_epochs", default=10, type=at_least(0), metavar="EPOCHS",
        help="Epochs of linear learning-rate warm-up from 0.")
    optim.add_argument("--min_lr", default=1e-6, type=at_least(0, float), metavar="LR",
        help="Learning rate at the end of the run, not scaled by the batch.")
    optim.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd", "lars"],
        help="adamw suits ViTs; sgd (momentum 0.9) and lars are for convnets, lars for large batches.")
    optim.add_argument("--weight_decay", default=0.04, type=at_least(0, float), metavar="WD",
        help="Weight decay at the start. ViTs do well when it is low at first and high later.")
    optim.add_argument("--weight_decay_end", default=0.4, type=at_least(0, float), metavar="WD",
        help="Weight decay at the end, reached by a cosine.")
    optim.add_argument("--clip_grad", default=3.0, type=at_least(0, float), metavar="NORM", help="""Largest L2 norm that
        the gradient of any one parameter tensor may have; 0 does not clip. Lower (0.3 to 1) steadies a large ViT.""")
    optim.add_argument("--freeze_last_layer", default=1, type=at_least(0), metavar="EPOCHS",
        help="First epochs in which the head's last layer stays as it is. If the loss does not come down, try 2 or 3.")
    optim.add_argument("--max_bad_steps", default=5, type=at_least(0), metavar="N",
        help="How many steps in a row may have a loss that is not finite, and be left out, before the run ends.")
    optim.add_argument("--use_fp16", default=True, type=bool_flag, metavar="BOOL", help="""Mixed precision, in the dtype
        of --amp_dtype. false computes in float32 throughout: slower, and a way out if the loss becomes NaN.""")
    optim.add_argument("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16"], help="""Type of half precision.
        auto: bf16 where the hardware computes in it, else fp16 (CUDA) or none (other devices).""")

    crops = parser.add_argument_group("multi-crop")
    crops.add_argument("--global_crops_scale", default=(0.4, 1.0), type=between(1e-6, 1, float), nargs=2,
        metavar=("MIN", "MAX"), help="""Share of the image's area that a global crop covers. Without
        local crops take a wider range, such as 0.14 1.""")
    crops.add_argument("--local_crops_number", default=8, type=at_least(0), metavar="N",
        help="Small crops per image, seen by the student alone; 0 leaves only the two global ones.")
    crops.add_argument("--local_crops_scale", default=(0.05, 0.4), type=between(1e-6, 1, float), nargs=2,
        metavar=("MIN", "MAX"), help="""Share of the image's area that a local crop covers; its
        maximum best meets the globals' minimum""")
    crops.add_argument("--blur_radius", default=(0.1, 2.0), type=between(0, 1e4, float), nargs=2,
        metavar=("MIN", "MAX"), help="""Radius of the Gaussian blur, in pixels of the crop. The paper's is
        for crops of 224; on crops of 64 or less it wipes out all texture: take 0.1 0.5.""")
    crops.add_argument("--global_crops_size", default=224, type=at_least(1), metavar="PIXELS",
        help="Side of a global crop. Small images want small crops: 64 with local crops of 32.")
    crops.add_argument("--local_crops_size", default=96, type=at_least(1), metavar="PIXELS",
        help="Side of a local crop.")
    crops.add_argument("--augmentation", default="pil", choices=["pil", "fast"], help="""What makes the crops. pil gives
        the pixels of the paper's; fast (with OpenCV) the same crops to within a level or two, several times as fast:
        take it if the loaders can't keep up with the GPUs.""")

    images = parser.add_argument_group("what an image is")
    images.add_argument("--in_chans", default=3, type=between(1, 1000), metavar="N", help="""Channels of an image. 3:
        photographs, in RGB. 1: grey. Others: pages of a TIFF, bands of a picture, or numpy arrays (.npy) [H, W, N] or
        [N, H, W]. With other than 3, images keep the 16 bits or floats that they have, the crops are made on floats,
        grey is the mean of all channels, and hues, which such images have not, stay as they are.""")
    images.add_argument("--mean", default=None, type=share, nargs="+", metavar="M", help="""Mean of the training images
        by channel, where 0 is black and 1 white; unless given, ImageNet's (for 3 channels).""")
    images.add_argument("--std", default=None, type=between(1e-6, 1, float), nargs="+", metavar="S",
        help="Standard deviation of the training images by channel, in the same unit.")
    images.add_argument("--compute_stats", default=False, type=bool_flag, metavar="BOOL", help=f"""Measure mean and std
        before training, once, on all images, or on {dino_data.MOST_MEASURED} that are spread evenly over them. The
        checkpoint keeps them.""")
    images.add_argument("--value_range", default=None, type=between(-(10**10), 10**10, float), nargs=2,
        metavar=("MIN", "MAX"), help="""What counts as black and, above it, as white in the files, if there are not 3 channels: 0 4095 for 12
        bits, -1000 400 for a window of a CT. Unless given, 0 and the largest value of a type of integers; floats lie
        between 0 and 1.""")

    run = parser.add_argument_group("data, output and machine")
    run.add_argument("--config", metavar="FILE", help="""A recipe: a YAML file of `flag: value` lines (see recipes/).
        Flags on the command line win over it.""")
    run.add_argument("--print_config", action="store_true", default=argparse.SUPPRESS, help="""Print all settings, each
        with where it came from (the command line, the recipe, the default), as a recipe for --config, and stop.""")
    run.add_argument("--data_path", default="sample", metavar="PATH", help="""Training images (labels are not used): a
        folder with images in it or in sub-folders, a list of paths (.txt, or .csv and .tsv with a label behind), tar
        shards ('shards/{0000..0999}.tar', or a folder of them), a data set of torchvision's (torchvision:CIFAR10), or
        `sample`, a small set made from photographs that are installed already.""")
    run.add_argument("--data_format", default="auto", choices=dino_data.FORMATS, help="""What --data_path is. auto
        looks: a folder that has images directly in it is flat, has no classes.""")
    run.add_argument("--exif", default=False, type=bool_flag, metavar="BOOL",
        help="Turn photographs as their cameras noted. The paper's were taken as they lie in the file.")
    run.add_argument("--max_bad_images", default=0.001, type=share, metavar="SHARE", help="""Images that
        can't be read are left out, others taken in their places, and their names written to bad_images.txt. More of
        them than this share of all, rounded up, end the run.""")
    run.add_argument("--strict_images", default=False, type=bool_flag, metavar="BOOL",
        help="End the run at the first image that can't be read.")
    run.add_argument("--output_dir", default=".", metavar="DIR",
        help="Where checkpoints and logs go. If it has a checkpoint.pth, the run goes on from there.")
    run.add_argument("--saveckp_freq", default=20, type=at_least(0), metavar="EPOCHS",
        help="Every so many epochs keep the checkpoint under a name of its own as well; 0: never.")
    run.add_argument("--saveckp_iters", default=0, type=at_least(0), metavar="STEPS",
        help="Save checkpoint.pth every so many steps, too; 0: after epochs only.")
    run.add_argument("--save_every_minutes", default=15.0, type=at_least(0, float), metavar="MINUTES",
        help="Save checkpoint.pth when this much time has passed since the last saving, too; 0: never.")
    run.add_argument("--allow_changed_args", default=False, type=bool_flag, metavar="BOOL", help="""Go on from a
        checkpoint although arguments have changed that change the result, such as --epochs or --lr.""")
    run.add_argument("--seed", default=0, type=between(0, 2**63 - 1),
        help="Fixes everything random: initial weights, order, crops, drop path. The same for any --num_workers.")
    run.add_argument("--num_workers", default=10, type=at_least(0), metavar="N",
        help="Processes that prepare crops, for each GPU; 0: the training process does it.")
    run.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
        help="auto takes a GPU if there is one.")
    run.add_argument("--knn_every", default=0, type=at_least(0), metavar="EPOCHS", help="""Every so many epochs, and
        after the last, classify labelled images by their 20 nearest neighbours in the teacher's features, log the
        accuracy, and keep the best checkpoint so far as checkpoint_best.pth; 0: never. Changes nothing of the
        training.""")
    run.add_argument("--knn_data", default=None, metavar="DIR", help="""The labelled images for --knn_every: a folder
        with train/ and val/, or with class folders, of which each tenth image asks and the others answer. Unless given,
        those of --data_path are divided like that (and trained on like any other).""")
    run.add_argument("--stop_on_collapse", default=False, type=bool_flag, metavar="BOOL", help="""Save, and end with
        exit code 4, when the run is seen to have collapsed; otherwise that is a warning.""")
    run.add_argument("--tensorboard", default="auto", choices=["auto", "on", "off"], help="""Curves for TensorBoard, in
        --output_dir; auto: where it is installed.""")
    run.add_argument("--wandb", default="", metavar="PROJECT",
        help="Send curves to this project of Weights & Biases, too. Log in first (wandb login), or WANDB_MODE=offline.")
    run.add_argument("--grad_checkpointing", default=False, type=bool_flag, metavar="BOOL", help="""Compute activations
        again in the backward pass instead of keeping them: for a large network that does not fit into memory.""")
    run.add_argument("--compile", default=False, type=bool_flag, metavar="BOOL", help="""Compile the networks with
        torch.compile: minutes at the start, for faster steps on recent GPUs. Needs a C++ compiler. Results are the same
        to rounding.""")
    run.add_argument("--dist_url", default="env://", metavar="URL", help="""Where several processes meet: env:// (what
        torchrun and Slurm set), tcp://host:port, or file:///shared/file, another file for each start.""")
    run.add_argument("--local_rank", "--local-rank", default=0, type=int, metavar="N",
        help="Accepted because launchers pass it; not used.")
    # fmt: on
    return parser


class ListArchs(argparse.Action):
    """Like --help: print, and be done. Only here, because timm takes seconds to import."""

    def __call__(self, parser, *_):
        print("\n".join(utils.list_archs()))
        parser.exit()


def check_args(args):
    """Raise UserError for settings that contradict each other or mean nothing, before any work is done."""
    for flag in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        if getattr(args, flag) > args.epochs:
            raise UserError(
                f"--{flag} {getattr(args, flag)} is longer than the run (--epochs {args.epochs}). Lower --{flag} or "
                "train longer"
            )
    for flag in ("global_crops_scale", "local_crops_scale", "blur_radius"):
        low, high = getattr(args, flag)
        if low > high:
            raise UserError(f"--{flag} {low} {high}: the smaller number comes first")
    if args.knn_data is not None and not args.knn_every:
        raise UserError(f"--knn_data {args.knn_data} is for --knn_every. Say every how many epochs, or leave it out")
    check_inputs(args)
    if args.augmentation == "fast":
        dino_data.opencv()
    if utils.vit_factory(args.arch):
        for flag in ["global_crops_size"] + ["local_crops_size"] * (args.local_crops_number > 0):
            check_whole_patches(flag, getattr(args, flag), args.patch_size)
    utils.check_arch(args.arch)


def check_inputs(args):
    """Raise UserError if what the flags say of an image's channels and values does not make sense."""
    channels = f"--in_chans {args.in_chans}"
    if args.in_chans != 3 and args.augmentation == "fast":
        raise UserError(f"--augmentation fast is for 3 channels. With {channels} there is one way to make crops: pil")
    if args.in_chans == 3 and args.value_range:
        raise UserError(
            "--value_range is for grey images and arrays, --in_chans 1 or another number but 3. Leave it out"
        )
    if args.value_range and not args.value_range[0] < args.value_range[1]:
        low, high = args.value_range
        raise UserError(f"--value_range {low} {high}: give two numbers, the smaller one first")
    given = [flag for flag in ("mean", "std") if getattr(args, flag)]
    if given and args.compute_stats:
        raise UserError(f"--{given[0]} is given, and --compute_stats would measure it. Leave out one of them")
    if len(given) == 1:
        raise UserError(f"--{given[0]} is given without --{'std' if given == ['mean'] else 'mean'}. Give both, or none")
    if not given and args.in_chans != 3 and not args.compute_stats:
        raise UserError(f"{channels} needs --mean and --std, {args.in_chans} numbers each, or --compute_stats true")
    for flag in given:
        number = len(getattr(args, flag))
        if number != args.in_chans:
            raise UserError(f"--{flag} has {number} numbers, {channels} needs {args.in_chans}: one each")


def check_whole_patches(flag, size, patch_size):
    if size % patch_size:
        below = size // patch_size * patch_size
        near = f"{below} or {below + patch_size}" if below else f"{patch_size}"
        raise UserError(f"--{flag} {size} is no multiple of --patch_size {patch_size}. Take {near}")


# ---- crops ----


class DataAugmentationDINO:
    """PIL image -> 2 global crops and `local_crops_number` local ones, each augmented on its own (section 3.1).

    Returns a list of tensors [3, size, size]: floats with ImageNet's mean and standard deviation, or, `as_uint8`, the
    levels themselves, a quarter of the bytes, which `utils.normalize` turns into the same floats on any device. With
    `inputs` (a utils.Inputs) of other than 3 channels an image may be an ArrayFile, and levels are int16.
    """

    def __init__(
        self,
        global_crops_scale,
        local_crops_scale,
        local_crops_number,
        global_crops_size=224,
        local_crops_size=96,
        blur_radius=(0.1, 2.0),
        as_uint8=False,
        augmentation="pil",
        inputs=utils.RGB,
    ):
        self.local_crops_number, self.as_uint8, self.inputs = local_crops_number, as_uint8, inputs
        augmentation = augmentation if inputs.in_chans == 3 else "planes"
        self.render = dino_data.RENDERERS[augmentation]

        def crop(size, scale, blur_p, solarization=None):
            blur = dino_data.GaussianBlur(blur_p, *blur_radius)
            return dino_data.RandomView(size, scale, blur, solarization, augmentation)

        # The two global crops differ: one is always blurred, the other seldom, but it may be solarised.
        self.global_transfo1 = crop(global_crops_size, global_crops_scale, 1.0)
        self.global_transfo2 = crop(global_crops_size, global_crops_scale, 0.1, dino_data.Solarization(p=0.2))
        self.local_transfo = crop(local_crops_size, local_crops_scale, 0.5)

    def __call__(self, image):
        if self.inputs.in_chans != 3 or isinstance(image, dino_images.ArrayFile):
            image = dino_images.decode(image, self.inputs)  # a photograph not until it is known how large
        drawn = [self.global_transfo1, self.global_transfo2] + [self.local_transfo] * self.local_crops_number
        crops = self.render(image, [view.draw(image) for view in drawn])
        return crops if self.as_uint8 else [self.inputs.normalize(crop) for crop in crops]


# ---- loss ----


class DINOLoss(nn.Module):
    """Cross-entropy between the centred, sharpened teacher and the student (equations 1-4 of the paper).

    Each of the teacher's 2 views teaches every view of the student but the same one: 2 · ncrops - 2 pairs, averaged.
    `forward` takes logits, crop by crop, student [ncrops · B, K] and teacher [2 · B, K], and the epoch, which sets the
    teacher's temperature; returns the scalar loss in float32 and moves the center, unless told not to. The terms of the
    loss stay in `cross_entropy` [2, ncrops], the teacher's view in rows; the teacher's mean entropy in `entropy`: what
    the loss is more than that is the mean KL divergence of the student from it; and the largest share that a prototype
    has in the teacher's mean distribution, in `top_prototype`.
    """

    def __init__(
        self,
        out_dim,
        ncrops,
        warmup_teacher_temp,
        teacher_temp,
        warmup_teacher_temp_epochs,
        nepochs,
        student_temp=0.1,
        center_momentum=0.9,
    ):
        super().__init__()
        self.ncrops, self.student_temp, self.center_momentum = ncrops, student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        rising = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        constant = np.full(max(nepochs - warmup_teacher_temp_epochs, 0), float(teacher_temp))
        self.teacher_temp_schedule = np.concatenate((rising, constant))  # [nepochs]

    def forward(self, student_output, teacher_output, epoch, update_center=True):
        with torch.autocast(student_output.device.type, enabled=False):
            logits = student_output.float().unflatten(0, (self.ncrops, -1)) / self.student_temp  # [ncrops, B, K]
            teacher_output = teacher_output.detach().float()
            sharpened = (teacher_output - self.center) / float(self.teacher_temp_schedule[epoch])
            probs = sharpened.softmax(dim=-1).unflatten(0, (2, -1))  # [2, B, K]

            # -Σ p log softmax(z) = logsumexp(z) - Σ p·z: no K-wide log-softmax is made, let alone kept, for each pair.
            batch = logits.shape[1]
            log_norm = logits.logsumexp(dim=-1).mean(dim=-1)  # [ncrops]
            cross_entropy = log_norm - probs.flatten(1) @ logits.flatten(1).T / batch  # [2, ncrops]
            pairs = torch.ones_like(cross_entropy).fill_diagonal_(0)  # view v against itself is not counted
            loss = (cross_entropy * pairs).sum() / (2 * self.ncrops - 2)
            self.entropy = (sharpened.logsumexp(dim=-1) - torch.linalg.vecdot(probs.flatten(0, 1), sharpened)).mean()
        self.cross_entropy, self.top_prototype = cross_entropy.detach(), probs.mean(dim=(0, 1)).max()
        if update_center:
            self.update_center(teacher_output)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_output):
        """Move the center a tenth of the way to the mean of the teacher's logits [n, K] over all processes."""
        batch_sum = teacher_output.float().sum(dim=0, keepdim=True)
        if utils.get_world_size() > 1:
            dist.all_reduce(batch_sum)
        batch_mean = batch_sum / (len(teacher_output) * utils.get_world_size())
        self.center.lerp_(batch_mean, 1 - self.center_momentum)


# ---- one epoch ----


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """θ_teacher ← momentum · θ_teacher + (1 - momentum) · θ_student; buffers are left alone (section 3.1)."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def train_one_epoch(
    student,
    teacher,
    dino_loss,
    data_loader,
    optimizer,
    schedules,
    epoch,
    fp16_scaler,
    args,
    amp_dtype=None,
    keeper=None,
):
    """One pass over the data, or what is left of it; returns the means of what was logged, over all processes.

    `schedules` holds `lr`, `weight_decay` and `momentum`, a value per iteration of the run. `fp16_scaler` is a
    GradScaler, disabled unless amp_dtype is float16. `keeper` (a RunKeeper) saves on the way, and says where to begin
    and when to stop: then None is returned. A step whose loss is not finite on some process is left out on all;
    UserError (exit code 3) is raised for more than args.max_bad_steps of them in a row.
    """
    keeper = keeper or RunKeeper()
    metrics, done = utils.MetricLogger(), keeper.first_step
    metrics.images = utils.global_batch(vars(args)) or 0
    ln_k = math.log(dino_loss.center.shape[1])
    metrics.add_meters("loss", "lr", "wd", entropy=f"{{median:.6f}} ({{global_avg:.6f}}) of ln K = {ln_k:.4f}")
    metrics.add_meters("kl", **dict.fromkeys(health.NUMBERS, "{median:.3g}"))
    buffers = [*student.buffers(), *teacher.buffers()]  # statistics of batch norms
    metrics.go_on_from(keeper.meters)
    first = epoch * (done + len(data_loader)) + done
    hint = "try --augmentation fast or more --num_workers" if args.augmentation == "pil" else "try more --num_workers"
    batches = metrics.log_every(data_loader, 10, f"Epoch: [{epoch}/{args.epochs}]", done, hint)
    for step, (crops, indices, *bad_images) in enumerate(batches, start=first):
        keeper.note_bad_images(*bad_images)
        # ---- schedules ----
        for group in optimizer.param_groups:
            group["lr"] = float(schedules["lr"][step])
        optimizer.param_groups[0]["weight_decay"] = float(schedules["weight_decay"][step])  # group 1 has none

        # ---- gradients ----
        before = [buffer.clone() for buffer in buffers]
        loss, entropy, loss_terms, teacher_means, verdict = compute_gradients(
            student, teacher, dino_loss, crops, optimizer, step, epoch, fp16_scaler, args, amp_dtype, keeper
        )
        bad, stop_signal, save, collapsed = verdict.read()  # the backward pass is still under way
        keeper.bad_steps = keeper.bad_steps + 1 if bad else 0
        if bad:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            norms = functools.partial(gradient_norms, student, fp16_scaler.get_scale())
            leave_out(keeper.bad_steps, loss, loss_terms, norms, data_loader.dataset, indices, epoch, step, args)
        else:
            # ---- student ----
            fp16_scaler.unscale_(optimizer)
            norms = utils.clip_gradients(student, args.clip_grad)
            utils.cancel_gradients_last_layer(epoch, student, args.freeze_last_layer)
            fp16_scaler.step(optimizer)
            fp16_scaler.update()

            # ---- teacher ----
            update_teacher(teacher, student, float(schedules["momentum"][step]))
            dino_loss.update_center(teacher_means)
            lr, wd = (optimizer.param_groups[0][name] for name in ("lr", "weight_decay"))
            metrics.update(loss=loss, lr=lr, wd=wd, entropy=entropy, kl=loss - entropy)  # kl: of the student's from it
            if metrics.due:
                keeper.look(step, metrics, student, teacher, dino_loss, norms)

        # ---- what must not be lost ----
        done += 1
        if stop_signal or collapsed or (save and not bad):
            keeper.save(epoch, done, metrics.totals())
        if collapsed:
            keeper.end_collapsed(epoch, done)
        if stop_signal:
            utils.log(f"stopped in epoch {epoch} after step {done}: the same command again goes on from there")
            keeper.stopped_by = int(stop_signal)
            return None

    if keeper.evaluates(epoch) and done > keeper.first_step:
        keeper.save(epoch, done, metrics.totals())  # should the evaluation be killed
    metrics.synchronize_between_processes()
    if done > keeper.first_step:
        utils.log(f"Averaged stats: {metrics}")
    means = {name: meter.global_avg for name, meter in metrics.meters.items() if meter.count}
    momentum = float(schedules["momentum"][(epoch + 1) * done - 1])
    return {**means, "ln_k": ln_k, "momentum": momentum, **metrics.pace(utils.global_batch(vars(args)))}


def compute_gradients(student, teacher, dino_loss, crops, optimizer, step, epoch, fp16_scaler, args, amp_dtype, keeper):
    """Gradients of a step, summed up over args.grad_accum_steps passes.

    Returns the loss, the teacher's entropy, the loss's terms [passes, 2, ncrops], the mean logits of the teacher
    [passes, K], and, on its way to the host, what all processes agree on: whether the loss is not finite somewhere, a
    signal to stop, whether to save, whether the run has collapsed.
    """
    device, passes, inputs = dino_loss.center.device, args.grad_accum_steps, utils.inputs_of(args)
    optimizer.zero_grad(set_to_none=True)
    losses, entropies, terms, teacher_means = [], [], [], []
    for i, views in enumerate(zip(*(crop.chunk(passes) for crop in crops), strict=True)):
        views = [inputs.normalize(view.to(device, non_blocking=True)) for view in views]
        # For drop path.
        utils.fix_random_seeds(utils.derive_seed(args.seed, utils.STEP, step * passes + i, utils.get_rank()))
        last = i == passes - 1
        later = contextlib.nullcontext() if last or utils.get_world_size() == 1 else student.no_sync()
        with later:
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                with torch.no_grad():
                    teacher_output = teacher(views[:2])  # [2·B, K]
                student_output = student(views)  # [ncrops·B, K]
            loss = dino_loss(student_output, teacher_output, epoch, update_center=False)
            losses.append(loss.detach())
            entropies.append(dino_loss.entropy)
            terms.append(dino_loss.cross_entropy)
            teacher_means.append(teacher_output.float().mean(dim=0))
            if last:
                total = torch.stack(losses).mean()
                verdict = utils.agree(total, *keeper.wishes(step))
            fp16_scaler.scale(loss / passes).backward()
    return total, torch.stack(entropies).mean(), torch.stack(terms), torch.stack(teacher_means), verdict


def gradient_norms(student, scale):
    """L2 norm of each parameter's gradient by its name, as text: NaN and infinity are no JSON. `scale` is fp16's."""
    return {name: str(p.grad.norm().item() / scale) for name, p in student.named_parameters() if p.grad is not None}


def leave_out(bad_steps, loss, loss_terms, norms, dataset, indices, epoch, step, args):
    """Say that a step is left out; after too many, write what there is to know to bad_step.json and end the run."""
    losses = utils.gather_objects(loss.item())
    bad_ranks = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
    value = losses[bad_ranks[0]]
    where = f"in epoch {epoch}, step {step}" + f" (rank {', '.join(map(str, bad_ranks))})" * (len(losses) > 1)
    utils.log(f"warning: the loss is {value} {where}: this step is left out ({bad_steps} in a row)")
    if bad_steps <= args.max_bad_steps:
        return
    found = {
        "step": step,
        "epoch": epoch,
        "loss": str(loss.item()),
        "loss_terms": [[[str(term) for term in view] for view in views] for views in loss_terms.tolist()],
        "gradient_norms": norms(),
        "images": [dataset.images.name(i) for i in indices.tolist()],
    }
    everyones, details = utils.gather_objects(found), "bad_step.json has details"
    if utils.is_main_process():
        text = json.dumps(everyones, indent=1)
        try:
            utils.write_whole(os.path.join(args.output_dir, "bad_step.json"), lambda file: file.write(text.encode()))
        except OSError as e:
            details = f"bad_step.json could not be written ({e.strerror})"
    raise UserError(
        f"the loss is {value} {where}, after {bad_steps - 1} such steps in a row; {details}. The checkpoints are from "
        "before; lower --lr or --clip_grad, or try --use_fp16 false",
        exit_code=3,
    )


# ---- the run ----


def build_student_and_teacher(args, device, amp_dtype):
    """Two networks of one shape and one start; the student has drop path, the teacher no gradients."""
    networks = []
    for drop_path_rate in (args.drop_path_rate, 0.0):
        shape = (args.arch, args.patch_size, args.global_crops_size, drop_path_rate, args.in_chans)
        backbone, width = utils.build_backbone(*shape)
        utils.use_fused_attention(backbone, device, amp_dtype)
        if utils.vit_factory(args.arch):
            backbone.set_cls_only(True)
        # The gain of the teacher's last layer gets no gradient in any case: it is frozen by what the student is.
        head = DINOHead(width, args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer)
        networks.append(utils.MultiCropWrapper(backbone, head))
    if args.local_crops_number:  # the global crops were tried when it was built
        utils.features_width(backbone, args.local_crops_size, args.arch, args.in_chans)
    student, teacher = networks
    if args.grad_checkpointing:
        utils.checkpoint_activations(student.backbone, args.arch)
    if args.compile:
        for network in networks:
            utils.compile_in_place(network.backbone)
    teacher.load_state_dict(student.state_dict())
    return student.to(device), teacher.to(device).requires_grad_(False)


def start_from_weights(student, teacher, args):
    """Give both networks the weights that --init_from names: the backbone's, and the projection head's if they fit."""
    state, source = utils.initial_weights(args.init_from, args.arch, args.patch_size)
    backbone = utils.backbone_state(state)
    utils.resample_positional_grid(student.backbone, backbone)
    utils.fit_first_layer(student.backbone, backbone, source)
    utils.fill_backbone(student.backbone, backbone, source, args.arch)
    wanted = student.head.state_dict()
    head = {name: state.get(f"head.{name}") for name in wanted}
    fits = all(tensor is not None and tensor.shape == wanted[name].shape for name, tensor in head.items())
    if fits:
        student.head.load_state_dict(head)
    what = f"comes from there too ({len(head)} tensors)" if fits else "starts afresh: the file has none that fits"
    utils.log(f"the projection head {what}")
    teacher.load_state_dict(student.state_dict())


def distribute(student, teacher, device):
    """Wrap the student for several processes, and let batch norms see the batches of all of them."""
    if utils.get_world_size() == 1:
        return student, teacher
    if utils.has_batchnorms(student):
        if device.type == "cuda":
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
            teacher = nn.SyncBatchNorm.convert_sync_batchnorm(teacher)
        else:
            utils.log("note: torch synchronises batch norms on GPUs only; each process normalises its own batch")
    # Buffers are the batch norms': synchronised already, or each process's own. The flag has two names, by torch's age.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    no_broadcast = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    device_ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(student, device_ids=device_ids, gradient_as_bucket_view=True, **no_broadcast)
    return wrapped, teacher


def run_state(student, teacher, optimizer, dino_loss, fp16_scaler, args, doctor, epoch, step=0, meters=(), sittings=()):
    """What a checkpoint holds: the public release's keys and prefixes, and plain types only beside the tensors.

    `epoch` is the one to go on with, `step` how many of its steps are done, `meters` what they have added up,
    `sittings` who has done them: (processes, images a step in each, steps, lanes of shards) for each start. `doctor` is
    health.py's.
    """

    def with_prefix(module):
        return {f"module.{key.removeprefix('module.')}": value for key, value in module.state_dict().items()}

    state = {
        "student": with_prefix(student),
        "teacher": with_prefix(teacher) if utils.has_batchnorms(teacher) else teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "step": step,
        "meters": list(meters),
        "sittings": list(sittings),
        "args": utils.plain_args(args),
        "dino_loss": dino_loss.state_dict(),
        "health": doctor.state_dict(),
    }
    if fp16_scaler.is_enabled():
        state["fp16_scaler"] = fp16_scaler.state_dict()
    return state


class RunKeeper:
    """Where in its epoch a run begins, when it has to be saved, and whether it is to stop.

    `state(epoch, step, meters)` gives what a checkpoint holds; the doctor is health.py's, the neighbours are an
    OnlineKnn or None. Without arguments one that does nothing.
    """

    def __init__(
        self,
        args=None,
        student=None,
        state=None,
        writer=None,
        stop=None,
        doctor=None,
        neighbours=None,
        first_step=0,
        meters=(),
        sittings=(),
    ):
        self.args, self.student, self.state, self.writer, self.stop = args, student, state, writer, stop
        self.doctor, self.neighbours = doctor, neighbours
        self.first_step, self.meters, self.sittings = first_step, meters, sittings
        self.saved_at, self.stopped_by, self.bad_steps, self.lanes = time.monotonic(), 0, 0, 1
        self.unlogged = []

    def look(self, step, metrics, student, teacher, dino_loss, gradient_norms):
        """Measure the run's health, on the steps that are logged; rank 0 warns of what it sees."""
        if self.args is None:
            return
        metrics.update(**health.measure(teacher.features, dino_loss, gradient_norms))
        if utils.is_main_process():
            numbers = {name: meter.value for name, meter in metrics.meters.items()}
            self.doctor.curves.add(step, numbers)
            about = {"feature_dim": teacher.features.shape[1], "images": len(teacher.features) // 2}
            self.doctor.look(step, {**numbers, **about}, student, teacher)

    def note_bad_images(self, wrong=()):
        """Take down what could not be read for a batch; UserError is raised when that is too much."""
        found = dict(text.split("\0", 1) for text in wrong if text)
        if self.args is None or found.keys() <= self.doctor.bad_images.keys():
            return
        for name in found.keys() - self.doctor.bad_images.keys():
            utils.say(f"warning: {found[name]}. Another is taken in its place")
        self.doctor.bad_images.update(found)
        self.check_bad_images()

    def check_bad_images(self):
        bad, images = self.doctor.bad_images, self.args.images
        if len(bad) > math.ceil(self.args.max_bad_images * images):
            self.write_bad_images()
            raise UserError(
                f"{len(bad)} of {images} images can't be read, which is more than --max_bad_images "
                f"{self.args.max_bad_images} allows: {utils.some_of(sorted(bad))}. Repair or remove what stands in "
                f"{os.path.join(self.args.output_dir, 'bad_images.txt')}, or allow more"
            )

    def share_bad_images(self):
        """Let all processes know what any of them could not read. All of them have to call it."""
        known = len(self.doctor.bad_images)
        for found in utils.gather_objects(self.doctor.bad_images):
            self.doctor.bad_images.update(found)
        if self.doctor.bad_images and utils.is_main_process():
            self.write_bad_images()
        if len(self.doctor.bad_images) > known:
            self.check_bad_images()

    def write_bad_images(self):
        """bad_images.txt: in each line a name (an odd one as Python writes it), a tab, and what is wrong with it."""
        lines = []
        for name, why in sorted(self.doctor.bad_images.items()):
            why = why.removeprefix(f"can't read the image {name}: ").removesuffix(". Repair or remove it")
            lines.append(f"{utils.shown(name)}\t{' '.join(why.split())}\n")
        text = "".join(lines)
        path = os.path.join(self.args.output_dir, "bad_images.txt")
        try:
            utils.write_whole(path, lambda file: file.write(text.encode(errors="replace")))
        except OSError as e:
            utils.log(f"warning: {path} could not be written ({e.strerror})")

    def evaluates(self, epoch):
        """Whether this epoch ends with a look at the neighbours."""
        return bool(self.neighbours and self.neighbours.due(epoch))

    def end_collapsed(self, epoch, done):
        what = utils.gather_objects(self.doctor.collapse)[0]
        self.writer.wait()
        utils.gather_objects(None)  # nobody ends before rank 0 has written
        saved = "not saved" if self.writer.failures else "saved"
        raise UserError(f"stopped in epoch {epoch} after step {done}, {saved}: {what}", exit_code=4)

    def wishes(self, step):
        """(signal to stop or 0, whether to save, whether the run has collapsed) after this step, as far as is known."""
        if self.args is None:
            return 0, False, False
        minutes = (time.monotonic() - self.saved_at) / 60
        by_time = self.args.save_every_minutes and minutes >= self.args.save_every_minutes
        by_step = self.args.saveckp_iters and (step + 1) % self.args.saveckp_iters == 0
        return self.stop.signal, bool(by_time or by_step), bool(self.args.stop_on_collapse and self.doctor.collapse)

    def check_weights(self):
        """Raise UserError (exit code 3) rather than save weights that no run can go on from."""
        if not torch.stack([parameter.isfinite().all() for parameter in self.student.parameters()]).all():
            raise UserError(
                "the weights are no longer finite: a gradient was not, in a step whose loss was. The checkpoints are "
                "from before; lower --lr or --clip_grad, or try --use_fp16 false",
                exit_code=3,
            )

    def save(self, epoch, step, meters):
        self.check_weights()
        self.share_bad_images()
        share = utils.global_batch(vars(self.args)) // utils.get_world_size()
        now = (utils.get_world_size(), share)
        unknown = [(*now, self.first_step, self.lanes)] if self.first_step else []  # as the sampler took it
        sitting = (*now, step - self.first_step, self.lanes)
        self.writer.save(self.state(epoch, step, meters, [*(self.sittings or unknown), sitting]))
        self.saved_at = time.monotonic()

    def log_epoch(self, stats):
        """Add a line to log.txt on rank 0. What can't be written now is written with the next."""
        if not utils.is_main_process():
            return
        if self.doctor.warnings:
            stats["warnings"] = self.doctor.warnings
            self.doctor.warnings = []
        self.unlogged.append(stats)
        try:
            while self.unlogged:
                utils.write_log_line(self.args.output_dir, self.unlogged[0])
                self.unlogged.pop(0)
        except OSError as e:
            path = os.path.join(self.args.output_dir, "log.txt")
            utils.log(f"warning: {path} could not be written ({e.strerror}). The run goes on")

    def save_epoch(self, epoch, best=False):
        """Save behind a whole epoch, the best and some others under a name of its own too; the next starts afresh."""
        self.check_weights()
        copies = [os.path.join(self.args.output_dir, "checkpoint_best.pth")] * best
        if self.args.saveckp_freq and epoch % self.args.saveckp_freq == 0:
            copies.append(os.path.join(self.args.output_dir, f"checkpoint{epoch:04}.pth"))
        self.writer.save(self.state(epoch + 1), *copies)
        self.saved_at, self.first_step, self.meters, self.sittings = time.monotonic(), 0, (), ()


def build_data(args, device):
    """Loader of this process's crops, and the number of images. With --compute_stats, sets args.mean and args.std."""
    images = dino_data.find_images(args.data_path, "train", args.data_format, args.exif, in_chans=args.in_chans)
    if dino_data.holds_both_parts(args.data_path, images):
        raise UserError(f"--data_path {args.data_path} holds train and val. Training takes the images of train alone")
    if args.compute_stats:
        args.mean, args.std = measured_before(args) or measure(images, args)
    sizes = (args.global_crops_size, args.local_crops_size)
    scales = (args.global_crops_scale, args.local_crops_scale, args.local_crops_number)
    how = (args.blur_radius, True, args.augmentation, utils.inputs_of(args))
    dataset = dino_data.MultiCropDataset(
        images, DataAugmentationDINO(*scales, *sizes, *how), args.seed, args.strict_images
    )
    images_a_step = args.batch_size_per_gpu * args.grad_accum_steps
    loader = dino_data.train_loader(dataset, images_a_step, args.seed, args.num_workers, device)
    return loader, len(dataset)


def measured_before(args):
    """(mean, std) that the run in --output_dir has measured, as rank 0 reads them; None if there is none."""
    checkpoint, _ = utils.load_newest(os.path.join(args.output_dir, "checkpoint.pth"))
    before = utils.plain_args(checkpoint.get("args")) if isinstance(checkpoint, dict) else {}
    now = utils.plain_args(args)
    same = before.get("compute_stats") and all(before.get(name) == now[name] for name in ("in_chans", "value_range"))
    return utils.gather_objects((before.get("mean"), before.get("std")) if same else None)[0]


def measure(images, args):
    """(mean, std) of the images, two lists, measured by rank 0. Raises UserError on all of them."""
    found = None
    if utils.is_main_process():
        try:
            inputs = utils.RGB._replace(in_chans=args.in_chans, value_range=args.value_range)
            found = [list(numbers) for numbers in dino_data.measure_images(images, inputs, args.num_workers)]
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
            "warning: nearly all values lie in a tenth of the range: the images are all but black or white. Say what "
            "counts as 0 and as 1 by --value_range, such as 0 4095 for 12 bits"
        )
    return found


def build_schedules(args, steps):
    """Learning rate, weight decay and teacher momentum for each iteration of the run, `steps` an epoch."""
    peak_lr = args.lr * utils.global_batch(vars(args)) / 256  # linear scaling rule
    return {
        "lr": utils.cosine_scheduler(peak_lr, args.min_lr, args.epochs, steps, args.warmup_epochs),
        "weight_decay": utils.cosine_scheduler(args.weight_decay, args.weight_decay_end, args.epochs, steps),
        "momentum": utils.cosine_scheduler(args.momentum_teacher, 1, args.epochs, steps),
    }


def train_dino(args):
    """Train as `args` say (see get_args_parser), or go on with what --output_dir already holds. Raises UserError."""
    check_args(args)
    utils.check_output_dir(args.output_dir, files=("checkpoint.pth", "log.txt", "run.json", ".lock"))
    health.check_curves(args)
    device = utils.init_distributed_mode(args)
    amp_dtype = utils.pick_amp_dtype(device, args.use_fp16, args.amp_dtype)
    utils.fix_random_seeds(args.seed)

    # ---- data ----
    data_loader, args.images = build_data(args, device)
    args.image_names = dino_images.digest_of_names(data_loader.dataset.images)
    neighbours = OnlineKnn(args, data_loader.dataset.images, device) if args.knn_every else None

    # ---- student and teacher ----
    checkpoint_path = os.path.join(args.output_dir, "checkpoint.pth")
    student, teacher = build_student_and_teacher(args, device, amp_dtype)
    begun = any(map(os.path.isfile, (checkpoint_path, utils.previous_checkpoint(checkpoint_path))))
    if args.init_from and begun:
        utils.log(f"note: --init_from {args.init_from} is not used: the run in {args.output_dir} goes on")
    elif args.init_from:
        start_from_weights(student, teacher, args)
    student, teacher = distribute(student, teacher, device)

    # ---- loss, optimiser, schedules ----
    temperatures = (args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs)
    dino_loss = DINOLoss(args.out_dim, 2 + args.local_crops_number, *temperatures, args.epochs).to(device)
    optimizer = utils.build_optimizer(args.optimizer, utils.get_params_groups(student), device)
    fp16_scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    schedules = build_schedules(args, len(data_loader))

    # ---- resume ----
    lock = utils.lock_output_dir(args.output_dir)
    progress = {"epoch": 0, "step": 0, "meters": [], "sittings": [], "args": {}, "health": {}}
    scaler_if_used = fp16_scaler if fp16_scaler.is_enabled() else None
    trained = {"student": student, "teacher": teacher, "optimizer": optimizer, "dino_loss": dino_loss}
    loaded = utils.restart_from_checkpoint(checkpoint_path, progress, args, **trained, fp16_scaler=scaler_if_used)
    if utils.plain_args(progress["args"]).get("image_names") != args.image_names:
        progress["sittings"] = []  # of other images
    check_progress(progress, loaded, args.images)
    utils.check_same_everywhere((progress["epoch"], progress["step"]), f"the epoch or step in {checkpoint_path}")
    first_step = steps_done(progress, args, len(data_loader))
    utils.log(describe_run(args, device, amp_dtype, len(data_loader)))
    if loaded:
        utils.log(f"going on in epoch {progress['epoch']} behind step {first_step}")
    if progress["epoch"] >= args.epochs:
        utils.log(f"{loaded} already holds {progress['epoch']} epochs of {args.epochs}: nothing to do")

    # ---- epochs ----
    start = time.time()
    curves = health.Curves(args)
    doctor = health.Doctor(args, len(data_loader), curves, progress["health"])
    doctor.bad_images = dino_images.still_bad(doctor.bad_images, data_loader.dataset.images, utils.inputs_of(args))
    if utils.plain_args(progress["args"]).get("knn_data") != args.knn_data:
        doctor.best_knn, doctor.best_epoch = -1.0, None  # of other images
    doctor.look_at_settings()
    health.write_environment(args, get_args_parser())
    state = functools.partial(run_state, student, teacher, optimizer, dino_loss, fp16_scaler, args, doctor)
    writer = utils.CheckpointWriter(checkpoint_path, keep_previous=loaded in (None, checkpoint_path))
    with lock, utils.StopRequest() as stop, contextlib.closing(curves), writer:
        before = (first_step, progress["meters"], progress["sittings"])
        keeper = RunKeeper(args, student, state, writer, stop, doctor, neighbours, *before)
        for epoch in range(progress["epoch"], args.epochs):
            data_loader.sampler.set_epoch(epoch, keeper.first_step, keeper.sittings)
            keeper.lanes = data_loader.sampler.lanes
            means = train_one_epoch(
                student, teacher, dino_loss, data_loader, optimizer, schedules, epoch, fp16_scaler, args, amp_dtype,
                keeper,
            )  # fmt: skip
            if keeper.stopped_by:
                break
            means["feature_dim"] = next(teacher.head.parameters()).shape[1]
            stats = {f"train_{name}": value for name, value in means.items()} | {"epoch": epoch}
            if keeper.evaluates(epoch):
                try:
                    stats |= neighbours.accuracies(teacher.backbone, stop)
                except utils.Stopped as e:  # the epoch is saved
                    utils.log(
                        f"stopped behind epoch {epoch}: the same command again looks at the neighbours, and goes on"
                    )
                    keeper.stopped_by = e.signal
                    break
            doctor.look_at_epoch(stats)
            keeper.share_bad_images()
            if doctor.bad_images:
                stats["bad_images"] = len(doctor.bad_images)
            keeper.log_epoch(stats)
            keeper.save_epoch(epoch, best=doctor.best_epoch == epoch)
        writer.wait()
        unlogged = [stats["epoch"] for stats in keeper.unlogged]
        # Nobody ends before rank 0 has written: a launcher would end it too.
        lost, unlogged, collapse = utils.gather_objects((list(writer.failures.values()), unlogged, doctor.collapse))[0]
    if lost:
        raise UserError(f"a checkpoint is lost: {', '.join(lost)}. Make room, and start again", exit_code=5)
    if unlogged:
        epochs = ", ".join(map(str, unlogged))
        raise UserError(f"the lines of epochs {epochs} of log.txt are lost: it could not be written", exit_code=5)
    if collapse and args.stop_on_collapse and not keeper.stopped_by:
        raise UserError(f"all epochs are done and saved, but: {collapse}", exit_code=4)
    at = checkpoint_path if os.path.isfile(checkpoint_path) else loaded
    utils.log(f"Training took {time.time() - start:.0f} s; weights are in {at}")
    if keeper.stopped_by:
        stop.leave(keeper.stopped_by)


def check_progress(progress, path, images):
    """Raise UserError if what a checkpoint says of its epoch can't be; `images` is how many there are."""

    def count(value, least=0, most=2**53):
        return type(value) is int and least <= value <= most

    def is_sitting(sitting):
        numbers = isinstance(sitting, list | tuple) and len(sitting) in (3, 4) and all(map(count, sitting))
        processes, batch_size, _, lanes = (*sitting, 1)[:4] if numbers else (0,) * 4
        return count(processes * batch_size * lanes, 1, images)

    def is_total(total):
        return isinstance(total, list | tuple) and len(total) == 2 and is_number(total[0]) and count(total[1])

    def is_number(value):
        return type(value) is float or (type(value) is int and abs(value) < 2**53)

    def are_totals(totals):
        return isinstance(totals, dict) and all(map(is_total, totals.values()))

    if not (
        all(count(progress[name]) for name in ("epoch", "step"))
        and all(isinstance(progress[name], list | tuple) for name in ("meters", "sittings"))
        and all(map(are_totals, progress["meters"]))
        and all(map(is_sitting, progress["sittings"]))
    ):
        raise UserError(
            f"{path} says of its epoch what can't be: it is damaged, or was made by something else. Remove it, or give "
            "another --output_dir"
        )


def steps_done(progress, args, steps):
    """How many of an epoch's `steps` the checkpoint has behind it, also if a step was of another number of images."""
    now, before = utils.global_batch(vars(args)), utils.global_batch(utils.plain_args(progress["args"]))
    return min(math.ceil(progress["step"] * (before or now) / now), steps)  # no image twice


def describe_run(args, device, amp_dtype, steps):
    precision = str(amp_dtype).removeprefix("torch.") if amp_dtype else "float32"
    flags = "\n".join(f"{k}: {v}" for k, v in sorted(vars(args).items()))
    return (
        f"{flags}\n{args.arch} on {args.world_size} × {device.type} in {precision}: {args.images} images, "
        f"{steps} steps of {utils.global_batch(vars(args))} in each of {args.epochs} epochs"
    )


if __name__ == "__main__":
    utils.run(train_dino, get_args_parser(), __doc__)
