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
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_crops
import dino_data
import dino_health
import dino_images
import dino_run
import utils
from dino_cli import at_least, between, share
from utils import UserError, bool_flag
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
    model.add_argument("--list_archs", action=dino_backbones.ListArchs, nargs=0, default=argparse.SUPPRESS,
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
    dino_data.check_inputs(args)
    if args.augmentation == "fast":
        dino_crops.opencv()
    if dino_backbones.vit_factory(args.arch):
        for flag in ["global_crops_size"] + ["local_crops_size"] * (args.local_crops_number > 0):
            check_whole_patches(flag, getattr(args, flag), args.patch_size)
    dino_backbones.check_arch(args.arch)


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
        self.render = dino_crops.RENDERERS[augmentation]

        def crop(size, scale, blur_p, solarization=None):
            blur = dino_crops.GaussianBlur(blur_p, *blur_radius)
            return dino_crops.RandomView(size, scale, blur, solarization, augmentation)

        # The two global crops differ: one is always blurred, the other seldom, but it may be solarised.
        self.global_transfo1 = crop(global_crops_size, global_crops_scale, 1.0)
        self.global_transfo2 = crop(global_crops_size, global_crops_scale, 0.1, dino_crops.Solarization(p=0.2))
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
    keeper = keeper or dino_run.RunKeeper()
    metrics, done = utils.MetricLogger(), keeper.first_step
    metrics.images = utils.global_batch(vars(args)) or 0
    ln_k = math.log(dino_loss.center.shape[1])
    metrics.add_meters("loss", "lr", "wd", entropy=f"{{median:.6f}} ({{global_avg:.6f}}) of ln K = {ln_k:.4f}")
    metrics.add_meters("kl", **dict.fromkeys(dino_health.NUMBERS, "{median:.3g}"))
    buffers = [*student.buffers(), *teacher.buffers()]  # statistics of batch norms
    metrics.restore(keeper.meters)
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
            norms = functools.partial(dino_run.gradient_norms, student, fp16_scaler.get_scale())
            dino_run.leave_out(
                keeper.bad_steps, loss, loss_terms, norms, data_loader.dataset, indices, epoch, step, args
            )
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
                verdict = dino_run.agree(total, *keeper.wishes(step))
            fp16_scaler.scale(loss / passes).backward()
    return total, torch.stack(entropies).mean(), torch.stack(terms), torch.stack(teacher_means), verdict


# ---- the run ----


def build_student_and_teacher(args, device, amp_dtype):
    """Two networks of one shape and one start; the student has drop path, the teacher no gradients."""
    networks = []
    for drop_path_rate in (args.drop_path_rate, 0.0):
        shape = (args.arch, args.patch_size, args.global_crops_size, drop_path_rate, args.in_chans)
        backbone, width = dino_backbones.build_backbone(*shape)
        dino_backbones.use_fused_attention(backbone, device, amp_dtype)
        if dino_backbones.vit_factory(args.arch):
            backbone.set_cls_only(True)
        # The gain of the teacher's last layer gets no gradient in any case: it is frozen by what the student is.
        head = DINOHead(width, args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer)
        networks.append(utils.MultiCropWrapper(backbone, head))
    if args.local_crops_number:  # the global crops were tried when it was built
        dino_backbones.features_width(backbone, args.local_crops_size, args.arch, args.in_chans)
    student, teacher = networks
    if args.grad_checkpointing:
        dino_backbones.checkpoint_activations(student.backbone, args.arch)
    if args.compile:
        for network in networks:
            dino_backbones.compile_in_place(network.backbone)
    teacher.load_state_dict(student.state_dict())
    return student.to(device), teacher.to(device).requires_grad_(False)


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
    dino_cli.check_output_dir(args.output_dir, files=("checkpoint.pth", "log.txt", "run.json", ".lock"))
    dino_health.check_curves(args)
    device = utils.init_distributed_mode(args)
    amp_dtype = utils.pick_amp_dtype(device, args.use_fp16, args.amp_dtype)
    utils.fix_random_seeds(args.seed)

    # ---- data ----
    data_loader, args.images = dino_data.build_data(args, device)
    args.image_names = dino_images.digest_of_names(data_loader.dataset.images)
    neighbours = dino_run.OnlineKnn(args, data_loader.dataset.images, device) if args.knn_every else None

    # ---- student and teacher ----
    checkpoint_path = os.path.join(args.output_dir, "checkpoint.pth")
    student, teacher = build_student_and_teacher(args, device, amp_dtype)
    begun = any(map(os.path.isfile, (checkpoint_path, dino_checkpoints.previous_checkpoint(checkpoint_path))))
    if args.init_from and begun:
        utils.log(f"note: --init_from {args.init_from} is not used: the run in {args.output_dir} goes on")
    elif args.init_from:
        dino_backbones.start_from_weights(student, teacher, args)
    student, teacher = utils.distribute(student, teacher, device)

    # ---- loss, optimiser, schedules ----
    temperatures = (args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs)
    dino_loss = DINOLoss(args.out_dim, 2 + args.local_crops_number, *temperatures, args.epochs).to(device)
    optimizer = utils.build_optimizer(args.optimizer, utils.get_params_groups(student), device)
    fp16_scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    schedules = build_schedules(args, len(data_loader))

    # ---- resume ----
    lock = dino_checkpoints.lock_output_dir(args.output_dir)
    progress = {"epoch": 0, "step": 0, "meters": [], "sittings": [], "args": {}, "health": {}}
    scaler_if_used = fp16_scaler if fp16_scaler.is_enabled() else None
    trained = {"student": student, "teacher": teacher, "optimizer": optimizer, "dino_loss": dino_loss}
    loaded = dino_checkpoints.restart_from_checkpoint(
        checkpoint_path, progress, args, **trained, fp16_scaler=scaler_if_used
    )
    if utils.plain_args(progress["args"]).get("image_names") != args.image_names:
        progress["sittings"] = []  # of other images
    dino_checkpoints.check_progress(progress, loaded, args.images)
    utils.check_same_everywhere((progress["epoch"], progress["step"]), f"the epoch or step in {checkpoint_path}")
    first_step = dino_checkpoints.steps_done(progress, args, len(data_loader))
    utils.log(dino_run.describe_run(args, device, amp_dtype, len(data_loader)))
    if loaded:
        utils.log(f"going on in epoch {progress['epoch']} behind step {first_step}")
    if progress["epoch"] >= args.epochs:
        utils.log(f"{loaded} already holds {progress['epoch']} epochs of {args.epochs}: nothing to do")

    # ---- epochs ----
    start = time.time()
    curves = dino_health.Curves(args)
    doctor = dino_health.HealthMonitor(args, len(data_loader), curves, progress["health"])
    doctor.bad_images = dino_images.recheck_bad_images(
        doctor.bad_images, data_loader.dataset.images, utils.inputs_of(args)
    )
    if utils.plain_args(progress["args"]).get("knn_data") != args.knn_data:
        doctor.best_knn, doctor.best_epoch = -1.0, None  # of other images
    doctor.check_settings()
    dino_health.write_environment(args, get_args_parser())
    state = functools.partial(
        dino_checkpoints.run_state, student, teacher, optimizer, dino_loss, fp16_scaler, args, doctor
    )
    writer = dino_checkpoints.CheckpointWriter(checkpoint_path, keep_previous=loaded in (None, checkpoint_path))
    with lock, dino_run.StopRequest() as stop, contextlib.closing(curves), writer:
        before = (first_step, progress["meters"], progress["sittings"])
        keeper = dino_run.RunKeeper(args, student, state, writer, stop, doctor, neighbours, *before)
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
            doctor.check_epoch(stats)
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


if __name__ == "__main__":
    dino_cli.run(train_dino, get_args_parser(), __doc__)
