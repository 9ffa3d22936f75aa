"""Train a network by self-distillation with no labels: DINO (Caron et al., ICCV 2021, arXiv 2104.14294).

    python main_dino.py --config recipes/demo.yaml --output_dir runs/demo                          # CPU, no data, 3 min
    python main_dino.py --config recipes/own_photos.yaml --data_path photos --output_dir runs/own  # one GPU
    torchrun --nproc_per_node 8 main_dino.py --data_path imagenet/train --output_dir runs/vits16   # eight GPUs

Writes checkpoint.pth and log.txt into --output_dir; the same command again resumes from them. The authors report 69.3 %
k-NN and 74.0 % linear for ViT-S/16 after 100 epochs of ImageNet (8 GPUs, 1.75 days).

After the flags, the file follows the paper: crops (sections 3.1, 3.2), loss (equations 1-4), one epoch (Algorithm 1),
the run. The head and the ViT are in vision_transformer.py; multi-crop, schedules and clipping are in utils.py.
dino_run.py keeps a long run alive (resuming, saving, signals, logs).
"""

import argparse
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import dino_ablations
import dino_backbones
import dino_cli
import dino_compile
import dino_crops
import dino_data
import dino_run
import utils
from dino_cli import at_least, between, share
from utils import UserError, bool_flag
from vision_transformer import DINOHead

# ---- flags ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`; augmentation, data and run have theirs in their own files."""
    parents = [dino_crops.flags(), dino_data.training_flags(), dino_run.flags()]
    parser = argparse.ArgumentParser("DINO", add_help=False, parents=parents)
    # fmt: off
    model = parser.add_argument_group("model")
    model.add_argument("--arch", default="vit_small", metavar="NAME", help="""vit_nano (ours, for CPUs), vit_tiny,
        vit_small, vit_base; an XCiT such as xcit_small_12_p16; a torchvision classification network such as resnet50;
        resnet18_cifar, vit_tiny_conv and the like (for small images); or timm:<name>. --list_archs prints all.""")
    model.add_argument("--list_archs", action=dino_backbones.ListArchs, nargs=0, default=argparse.SUPPRESS,
        help="Print every name that --arch knows, and exit.")
    model.add_argument("--patch_size", default=16, type=at_least(1), metavar="PIXELS", help="""Side of a ViT's patches.
        8 instead of 16 gives better features for about five times the compute; fp16 may be unstable then: use bf16, or
        --use_fp16 false.""")
    model.add_argument("--init_from", default="", metavar="FILE", help="""Start from these weights instead of random
        ones: a checkpoint or state dict; `published` for the authors' weights; `timm` for timm's. To resume a run,
        start it again with the same --output_dir instead.""")
    model.add_argument("--out_dim", default=65536, type=at_least(1), metavar="K", help="""Number of prototypes (width of
        the head's output). Large data sets benefit from a larger K; a few thousand images need 1024 to 4096.""")
    model.add_argument("--norm_last_layer", default=True, type=bool_flag, metavar="BOOL", help="""Keep the gain of the
        head's last layer at 1. false is a little better where training is stable (long ViT-S runs), true is safer and
        recommended for ViT-B.""")
    model.add_argument("--use_bn_in_head", default=False, type=bool_flag, metavar="BOOL",
        help="Batch norm in the head's MLP. The paper's ViTs do without it; it helps short runs get started.")
    model.add_argument("--drop_path_rate", default=0.1, type=between(0, 0.999, float), metavar="P",
        help="Stochastic depth of the student, rising linearly to this value over the blocks.")

    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--momentum_teacher", default=0.996, type=share, metavar="M", help="""EMA momentum of the
        teacher, rising to the final one along a cosine. Use a higher value for small batches: 0.9995 for 256.""")
    teacher.add_argument("--momentum_teacher_end", default=1.0, type=share, metavar="M",
        help="Final momentum. The same as --momentum_teacher keeps it constant, which suits short runs.")
    teacher.add_argument("--warmup_teacher_temp", default=0.04, type=at_least(1e-6, float), metavar="T",
        help="Teacher temperature at the start. Lower it if the loss does not come down.")
    teacher.add_argument("--teacher_temp", default=0.04, type=at_least(1e-6, float), metavar="T", help="""Teacher
        temperature after the warm-up. The paper's long runs go from 0.04 to 0.07 in 30 epochs; above 0.07 training is
        unstable.""")
    teacher.add_argument("--warmup_teacher_temp_epochs", default=0, type=at_least(0), metavar="EPOCHS",
        help="Length of the temperature warm-up. 30 goes well with --teacher_temp 0.07.")

    optim = parser.add_argument_group("optimization")
    optim.add_argument("--epochs", default=100, type=at_least(1), help="Length of the run.")
    optim.add_argument("--batch_size_per_gpu", default=64, type=at_least(1), metavar="B",
        help="Images per step and process; there is one process per GPU.")
    optim.add_argument("--grad_accum_steps", default=1, type=at_least(1), metavar="N",
        help="Passes per step: the same result as a batch N times as large, in the memory of one pass.")
    optim.add_argument("--lr", default=0.0005, type=at_least(0, float),
        help="Peak learning rate for 256 images per step; scaled linearly with the batch.")
    optim.add_argument("--warmup_epochs", default=10, type=at_least(0), metavar="EPOCHS", help="Linear warm-up of lr.")
    optim.add_argument("--min_lr", default=1e-6, type=at_least(0, float), metavar="LR", help="Final lr, not scaled.")
    optim.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd", "lars"],
        help="adamw for ViTs; sgd (momentum 0.9) or, for large batches, lars for convnets.")
    optim.add_argument("--weight_decay", default=0.04, type=at_least(0, float), metavar="WD", help="Initial decay.")
    optim.add_argument("--weight_decay_end", default=0.4, type=at_least(0, float), metavar="WD",
        help="Final decay, reached along a cosine: a low one early and a high one late suit ViTs.")
    optim.add_argument("--clip_grad", default=3.0, type=at_least(0, float), metavar="NORM", help="""Largest L2 norm of
        any single parameter's gradient; 0 turns clipping off. 0.3 to 1 steadies large ViTs.""")
    optim.add_argument("--freeze_last_layer", default=1, type=at_least(0), metavar="EPOCHS",
        help="Keep the head's last layer fixed for this long. Try 2 or 3 if the loss does not come down.")
    optim.add_argument("--use_fp16", default=True, type=bool_flag, metavar="BOOL",
        help="Mixed precision. false trains in float32: slower, and the first thing to try if the loss becomes NaN.")
    optim.add_argument("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "tf32"], help="""auto: bf16 where
        it is fast, else fp16 on CUDA and float32 elsewhere. tf32 is for GPUs: twice as fast as float32.""")

    crops = parser.add_argument_group("multi-crop")
    crops.add_argument("--global_crops_scale", default=(0.4, 1.0), type=between(1e-6, 1, float), nargs=2,
        metavar=("MIN", "MAX"), help="Area relative to the image. Without local crops use a wider range: 0.14 1.")
    crops.add_argument("--global_crops_size", default=224, type=at_least(1), metavar="PIXELS",
        help="Side of a global crop.")
    crops.add_argument("--local_crops_number", default=8, type=at_least(0), metavar="N",
        help="Local crops per image, for the student only; 0 turns multi-crop off.")
    crops.add_argument("--local_crops_scale", default=(0.05, 0.4), type=between(1e-6, 1, float), nargs=2,
        metavar=("MIN", "MAX"), help="Area of a local crop. Best set MAX to the MIN of --global_crops_scale.")
    crops.add_argument("--local_crops_size", default=96, type=at_least(1), metavar="PIXELS",
        help="Side of a local crop.")
    # fmt: on
    dino_ablations.add_flags(parser)
    return parser


def check_args(args):
    """Raise UserError for flags that contradict each other, before any work is done."""
    args.arch = dino_backbones.ALIASES.get(args.arch, args.arch)
    warmups = {flag: getattr(args, flag) for flag in ("warmup_epochs", "warmup_teacher_temp_epochs")}
    if long := [f"--{flag} {value}" for flag, value in warmups.items() if value > args.epochs]:
        verb = "is" if len(long) == 1 else "are"
        what = f"{' and '.join(long)} {verb} longer than the run (--epochs {args.epochs})"
        raise UserError(f"{what}. Shorten the warm-up, or train longer")
    for flag in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, flag)
        if low > high:
            raise UserError(f"--{flag} {low} {high}: put the smaller number first")
    dino_crops.check_flags(args)
    dino_data.check_flags(args)
    dino_run.check_flags(args)
    dino_backbones.check_arch(args.arch)
    if dino_backbones.vit_factory(args.arch):
        for flag in ["global_crops_size"] + ["local_crops_size"] * (args.local_crops_number > 0):
            dino_cli.check_whole_patches(flag, getattr(args, flag), args.patch_size)


# ---- crops (multi-crop of section 3.1, BYOL's augmentations of section 3.2) ----


class DataAugmentationDINO:
    """PIL image or uint8 [H, W, 3] -> 2 global and `local_crops_number` local crops, each augmented independently.

    Returns tensors [3, size, size]: normalized floats or, `as_uint8`, integers. These are a quarter of the bytes for
    the loader to move, and utils.normalize converts them to the same floats on the device. With `inputs` (a
    utils.Inputs) other than photographs, crops are int16.
    """

    def __init__(
        self,
        global_crops_scale,
        local_crops_scale,
        local_crops_number,
        *,
        global_crops_size=224,
        local_crops_size=96,
        augmentation="pil",
        strengths=dino_crops.PAPER,
        as_uint8=False,
        inputs=utils.RGB,
    ):
        kind = augmentation if inputs.photographs else "planes"

        def transform(size, scale, blur_p, solarization=None):
            blur = dino_crops.GaussianBlur(blur_p, *strengths.blur_radius)
            return dino_crops.RandomView(size, scale, blur, solarization, kind, strengths)

        # As in BYOL, the global crops differ: the first is always blurred, the second rarely, but it may be solarized.
        blur_p, solarization = strengths.blur_p, dino_crops.Solarization(strengths.solarize_p)
        self.global_transfo1 = transform(global_crops_size, global_crops_scale, blur_p[0])
        self.global_transfo2 = transform(global_crops_size, global_crops_scale, blur_p[1], solarization)
        self.local_transfo = transform(local_crops_size, local_crops_scale, blur_p[2])
        self.local_crops_number, self.as_uint8, self.inputs = local_crops_number, as_uint8, inputs
        self.render = dino_crops.RENDERERS[kind]

    def __call__(self, image):
        transforms = [self.global_transfo1, self.global_transfo2] + [self.local_transfo] * self.local_crops_number
        image = dino_crops.prepare(image, self.inputs)
        crops = self.render(image, [t.draw(image) for t in transforms])  # all randomness is drawn before rendering
        return crops if self.as_uint8 else [self.inputs.normalize(crop) for crop in crops]


# ---- loss (equations 1-4) ----


class DINOLoss(nn.Module):
    """Cross-entropy between the centered, sharpened teacher and the student.

    Each of the teacher's 2 views teaches every student view except itself: 2 * ncrops - 2 pairs, averaged. Computed in
    float32 whatever the logits are. For the log it keeps the terms `cross_entropy` [2, ncrops]; the teacher's mean
    `entropy` (loss minus entropy is the KL divergence); and `top_prototype`, the largest share of a prototype in the
    teacher's mean distribution.
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
        """Student [ncrops * B, K] and teacher [2 * B, K] logits, crop by crop -> scalar loss."""
        tau = torch.full((), self.teacher_temp_schedule[epoch], device=self.center.device)
        with torch.autocast(student_output.device.type, enabled=False):
            loss, self.cross_entropy, self.entropy, self.top_prototype = self.terms(student_output, teacher_output, tau)
        if update_center:
            self.update_center(teacher_output)
        return loss

    def terms(self, student_output, teacher_output, tau):
        """(loss, cross-entropies, entropy, top prototype). `tau` is a tensor, as a number would be compiled in."""
        # The student's P_s is the softmax of these logits (eq. 1).
        logits = student_output.float().unflatten(0, (self.ncrops, -1)) / self.student_temp  # [ncrops, B, K]
        # The teacher's P_t is centered and sharpened. Minus, as in Algorithm 1; the text of section 3.1 has a plus.
        sharpened = (teacher_output.detach().float() - self.center) / tau  # [2 * B, K]
        probs = sharpened.softmax(dim=-1).unflatten(0, (2, -1))  # [2, B, K]

        # H(P_t, P_s) of each pair (eq. 2). Since p sums to 1, -sum p log softmax(z) = logsumexp(z) - sum p z, which
        # avoids a K-wide log-softmax for each pair.
        log_norm = logits.logsumexp(dim=-1).mean(dim=-1)  # [ncrops]
        cross_entropy = log_norm - probs.flatten(1) @ logits.flatten(1).T / logits.shape[1]  # [2, ncrops]
        # A view does not teach itself (eq. 3). Of one prototype, nothing can be learned: no rounding is left either.
        pairs = torch.full_like(cross_entropy, float(logits.shape[-1] > 1)).fill_diagonal_(0)
        loss = (cross_entropy * pairs).sum() / (2 * self.ncrops - 2)

        entropy = (sharpened.logsumexp(dim=-1) - torch.linalg.vecdot(probs.flatten(0, 1), sharpened)).mean()
        return loss, cross_entropy.detach(), entropy, probs.mean(dim=(0, 1)).max()

    @torch.no_grad()
    def update_center(self, teacher_output):
        """center <- m center + (1 - m) mean (eq. 4).

        The mean is over the rows [n, K] of all processes: logits of the teacher, or their means over equal batches.
        """
        total = teacher_output.float().sum(dim=0, keepdim=True)
        if utils.get_world_size() > 1:
            dist.all_reduce(total)
        mean = total / (len(teacher_output) * utils.get_world_size())
        self.center.lerp_(mean, 1 - self.center_momentum)


# ---- one epoch (Algorithm 1) ----


class Parts(NamedTuple):
    """What a step changes and a checkpoint keeps, under the names that checkpoints use."""

    student: nn.Module
    teacher: nn.Module
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    fp16_scaler: torch.amp.GradScaler


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """theta_teacher <- momentum theta_teacher + (1 - momentum) theta_student; buffers are not averaged."""
    torch._foreach_lerp_(utils.parameters_of(teacher), utils.parameters_of(student), 1 - momentum)


def train_one_epoch(parts, data_loader, schedules, epoch, args, autocast=None, run=None):
    """One pass over the data, or over the part that a resumed run has left. Returns the means of the logged values.

    `schedules` has lr, weight_decay and momentum, one value per step of the run. `run` (a dino_run.Run) counts steps,
    logs, saves, and raises utils.Stopped on a signal; without one the epoch runs bare, as in tests.

    Not in Algorithm 1 but in the authors' code: clipping, the frozen last layer, drop path, no weight decay for biases
    and norms, mixed precision. Ours: accumulation over passes, and skipped steps.
    """
    student, teacher, dino_loss, optimizer, scaler = parts
    autocast, run = autocast or nullcontext(), run or dino_run.Bare(args, len(data_loader))
    device, passes, inputs = dino_loss.center.device, args.grad_accum_steps, utils.inputs_of(args)
    weights = [list(model.parameters()) for model in (teacher, student)]  # found once per epoch, because it takes long
    for step, crops in run.steps(data_loader, epoch):  # crops from the loader: a list of [B, 3, h, w]
        # Learning rate and weight decay of this step; biases and norms (group 1) are never decayed.
        for group in optimizer.param_groups:
            group["lr"] = float(schedules["lr"][step])
        optimizer.param_groups[0]["weight_decay"] = float(schedules["weight_decay"][step])

        # Forward and backward: the teacher sees the 2 global crops, the student all of them.
        optimizer.zero_grad(set_to_none=True)
        losses, entropies, teacher_means = [], [], []
        for i, views in enumerate(zip(*(crop.chunk(passes) for crop in crops), strict=True)):  # part i of each crop
            views = [inputs.normalize(view.to(device, non_blocking=True)) for view in views]  # uint8 -> float
            utils.seed_step(args.seed, step * passes + i)  # drop path: a function of seed, step and rank
            student.require_backward_grad_sync = i == passes - 1  # DDP: one all-reduce per step, in the last pass
            with autocast:
                with torch.no_grad():
                    teacher_output = teacher(views[:2])  # [2 * B, K]
                student_output = student(views)  # [ncrops * B, K]
            loss = dino_loss(student_output, teacher_output, epoch, update_center=False)
            losses.append(loss.detach())
            entropies.append(dino_loss.entropy)
            teacher_means.append(teacher_output.float().mean(dim=0))
            if i == passes - 1:
                run.vote(torch.stack(losses).mean())  # all ranks: is it finite, do we stop? Travels during backward.
            scaler.scale(loss / passes).backward()
        if run.skips(step):  # the loss is not finite on some rank
            continue

        # Student: clip each parameter's gradient on its own, then update.
        scaler.unscale_(optimizer)
        norms = utils.clip_gradients(weights[1], args.clip_grad)
        utils.cancel_gradients_last_layer(epoch, student, args.freeze_last_layer)
        scaler.step(optimizer)
        scaler.update()

        # Teacher and center.
        update_teacher(*weights, float(schedules["momentum"][step]))
        dino_loss.update_center(torch.stack(teacher_means))

        run.end_step(step, parts, torch.stack(losses).mean(), torch.stack(entropies).mean(), norms)
    # Not `step`: a run that resumes after the last step of an epoch has none left.
    last_step = (epoch + 1) * len(schedules["momentum"]) // args.epochs - 1
    return {**run.means(), "momentum": float(schedules["momentum"][last_step])}


# ---- the run ----


def build_student_and_teacher(args, device, amp_dtype):
    """Two networks with the same weights; the student has drop path, the teacher gets no gradients."""
    networks = []
    for drop_path_rate in (args.drop_path_rate, 0.0):
        how = args.patch_size, args.global_crops_size, drop_path_rate, args.in_chans
        backbone, width = dino_backbones.build_backbone(args.arch, *how)
        # Both get norm_last_layer: the teacher has no gradients, so its gain (weight_g) follows the student's.
        head = DINOHead(width, args.out_dim, args.use_bn_in_head, args.norm_last_layer, **dino_ablations.head(args))
        networks.append(utils.MultiCropWrapper(backbone, head))
    student, teacher = networks
    if args.init_from and not dino_run.has_begun(args.output_dir):
        dino_backbones.start_from_weights(student, args)
    dino_backbones.prepare_for_training(student, teacher, args, device, amp_dtype)
    teacher.load_state_dict(student.state_dict())
    return student.to(device), teacher.to(device).requires_grad_(False)


def build_schedules(args, steps_per_epoch):
    """lr, weight decay and teacher momentum per step. (The teacher temperature, per epoch, is in DINOLoss.)"""
    peak_lr = args.lr * args.images_per_step / 256  # linear scaling rule
    momentum = args.momentum_teacher, args.momentum_teacher_end
    return {
        "lr": utils.cosine_scheduler(peak_lr, args.min_lr, args.epochs, steps_per_epoch, args.warmup_epochs),
        "weight_decay": utils.cosine_scheduler(args.weight_decay, args.weight_decay_end, args.epochs, steps_per_epoch),
        "momentum": utils.cosine_scheduler(*momentum, args.epochs, steps_per_epoch),
    }


def train_dino(args):
    """Train as specified by `args` (see get_args_parser), or resume the run in --output_dir. Raises UserError."""
    check_args(args)
    dino_run.prepare(args)
    device = utils.init_distributed_mode(args)  # sets args.rank, world_size and gpu
    args.images_per_step = args.batch_size_per_gpu * args.grad_accum_steps * args.world_size
    amp_dtype = dino_backbones.training_dtype(args, device)
    autocast = torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)
    utils.fix_random_seeds(args.seed)

    # ---- data ----
    images = dino_data.training_images(args)  # with --compute_stats sets args.mean and args.std
    augment = DataAugmentationDINO(
        args.global_crops_scale,
        args.local_crops_scale,
        args.local_crops_number,
        global_crops_size=args.global_crops_size,
        local_crops_size=args.local_crops_size,
        augmentation=args.augmentation,
        strengths=dino_crops.strengths_of(args),
        as_uint8=True,
        inputs=utils.inputs_of(args),
    )
    data_loader = dino_data.training_loader(images, augment, args, device)

    # ---- student, teacher ----
    student, teacher = build_student_and_teacher(args, device, amp_dtype)
    student, teacher = dino_backbones.distribute(student, teacher, device)  # DDP, synchronized batch norms

    # ---- loss, optimizer, schedules ----
    dino_loss = DINOLoss(
        out_dim=args.out_dim,
        ncrops=2 + args.local_crops_number,
        warmup_teacher_temp=args.warmup_teacher_temp,
        teacher_temp=args.teacher_temp,
        warmup_teacher_temp_epochs=args.warmup_teacher_temp_epochs,
        nepochs=args.epochs,
    ).to(device)
    optimizer = utils.build_optimizer(args.optimizer, utils.get_params_groups(student), device)
    fp16_scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    schedules = build_schedules(args, len(data_loader))

    # ---- epochs ----
    parts = Parts(student, teacher, dino_loss, optimizer, fp16_scaler)
    dino_ablations.apply(args, parts, schedules)
    with dino_run.Run(args, parts, data_loader, get_args_parser(), amp_dtype) as run:  # locks, resumes, catches signals
        if args.compile and run.first_epoch < args.epochs:
            dino_compile.compile_training(parts, args, amp_dtype)
        for epoch in range(run.first_epoch, args.epochs):
            run.begin_epoch(epoch)
            means = train_one_epoch(parts, data_loader, schedules, epoch, args, autocast, run)
            run.end_epoch(epoch, means)  # k-NN if due, log line, checkpoints
        run.finish()


if __name__ == "__main__":
    dino_cli.run(train_dino, get_args_parser(), __doc__)
