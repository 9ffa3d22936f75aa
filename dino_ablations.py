"""The paper's ablations (Tables 7, 14 and 15, Figures 6 and 7, appendices B and D), all off by default.

main_dino.py calls this file three times: for the flags, for the sizes of the head, and to change what it has built.
"""

import functools

import torch
import torch.distributed as dist

import utils
from dino_cli import at_least, share


def add_flags(parser):
    """Add the group of flags. With their defaults, training is as in the paper."""
    # fmt: off
    group = parser.add_argument_group("ablations", "For experiments as in the paper's tables 7, 14 and 15.")
    group.add_argument("--teacher", default="ema", choices=["ema", "student", "previous_iteration", "previous_epoch"],
        help="""Weights of the teacher: ema, their average (--momentum_teacher); or without momentum a copy of the
        student now, one step ago, or at the end of the last epoch. The first two copies do not learn.""")
    group.add_argument("--centering", default="mean", choices=["mean", "sinkhorn", "softmax_batch"], help="""mean: an
        average of the teacher's logits (--center_momentum). Or, without momentum, the center that gives all prototypes
        equal shares of a batch: by three iterations of Sinkhorn-Knopp as in SwAV, or by one (softmax_batch).""")
    group.add_argument("--center_momentum", default=0.9, type=share, metavar="M",
        help="EMA momentum of the center. 1 turns centering off. Training collapses then, and also with 0.999.")
    group.add_argument("--student_temp", default=0.1, type=at_least(1e-6, float), metavar="T",
        help="Temperature of the student.")
    group.add_argument("--head_layers", default=3, type=at_least(1), metavar="N",
        help="Linear layers of the head's MLP.")
    group.add_argument("--head_hidden_dim", default=2048, type=at_least(1), metavar="DIM",
        help="Width of the hidden layers of the head.")
    group.add_argument("--head_bottleneck_dim", default=256, type=at_least(1), metavar="DIM",
        help="Width of the head's last hidden layer, which is L2-normalized.")
    # fmt: on


def head(args):
    """The sizes of DINOHead, as keyword arguments."""
    return {
        "nlayers": args.head_layers,
        "hidden_dim": args.head_hidden_dim,
        "bottleneck_dim": args.head_bottleneck_dim,
    }


def apply(args, parts, schedules):
    """Change a run's loss, optimizer and schedule of the momentum as `args` say. The defaults change nothing.

    A step that is skipped, since its loss is not finite, copies no weights: the teacher stays as it was.
    """
    loss, momentum = parts.dino_loss, schedules["momentum"]
    loss.student_temp, loss.center_momentum = args.student_temp, args.center_momentum
    if args.centering != "mean":
        loss.center_momentum = 1.0  # the center of the last batch is not averaged with others
        iterations = {"sinkhorn": 3, "softmax_batch": 1}[args.centering]
        loss.register_forward_pre_hook(functools.partial(center_on_batch, iterations=iterations))
    # update_teacher copies the student with a momentum of 0, and keeps the teacher with 1.
    if args.teacher == "student":
        momentum[:] = 0
    elif args.teacher == "previous_iteration":
        momentum[:] = 1
        parts.optimizer.register_step_pre_hook(lambda *_: copy_weights(parts.student, parts.teacher))
    elif args.teacher == "previous_epoch":
        momentum[:] = 1
        momentum[len(momentum) // args.epochs - 1 :: len(momentum) // args.epochs] = 0


@torch.no_grad()
def copy_weights(student, teacher):
    torch._foreach_copy_(list(teacher.parameters()), list(student.parameters()))


@torch.no_grad()
def center_on_batch(loss, inputs, iterations):
    """Forward pre-hook of DINOLoss: a center with which the teacher uses all prototypes equally (appendix B).

    Sinkhorn-Knopp scales the columns of exp(logits / tau) [n, K] to equal sums, then the rows to sums of 1, and
    repeats. A scale u of a column is a center: u exp(z / tau) = exp((z - c) / tau) with c = -tau log u. The loss's
    softmax is the last scaling of the rows. The n rows are both views of all images in a pass, of all processes.
    """
    _, teacher_output, epoch = inputs
    tau = loss.teacher_temp_schedule[epoch]
    scaled = teacher_output.float() / tau  # [n, K]
    log_rows = torch.zeros_like(scaled[:, :1])
    for _ in range(iterations):
        log_columns = logsumexp_over_processes(scaled - log_rows)  # [K]
        log_rows = (scaled - log_columns).logsumexp(dim=1, keepdim=True)
    loss.center.copy_(tau * log_columns)


def logsumexp_over_processes(x):
    """logsumexp over the rows [n, K] of all processes -> [K]."""
    largest = x.amax(dim=0)
    if utils.get_world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = (x - largest).exp().sum(dim=0)
    if utils.get_world_size() > 1:
        dist.all_reduce(total)
    return largest + total.log()
