"""--compile: torch.compile for networks and loss; CUDA graphs for networks so small that a GPU waits for its host."""

import os
import shutil
import sys
import warnings

import torch

import utils
from utils import UserError


def check_flags(args):
    """Raise UserError if a run can't be compiled as its arguments say."""
    if args.compile and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5):
        raise UserError(f"--compile needs torch 2.5, not {torch.__version__}. Use --compile false")
    if args.compile == "reduce-overhead":
        for flag, off in {"grad_accum_steps": 1, "grad_checkpointing": False}.items():
            if getattr(args, flag) != off:
                raise UserError(
                    f"--{flag} {getattr(args, flag)} does not work with --compile reduce-overhead. Use --compile true"
                )


def compile_training(parts, args, amp_dtype):
    """Compile networks and loss of a main_dino.Parts in place; they keep their state-dict keys.

    There is one compiled graph per list of crop sizes. Random numbers stay torch's own, so that drop path drops the
    same. Raises UserError without a C++ compiler, and for CUDA graphs of several processes.
    """
    import torch._inductor.config

    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))  # as torch does
    if not shutil.which(compiler.partition(" ")[0]):
        raise UserError(
            f"--compile needs a C++ compiler: there is no {compiler or 'program in CXX'}. Install one and name it in "
            "CXX, or use --compile false"
        )
    if args.compile == "reduce-overhead" and utils.get_world_size() > 1:
        raise UserError("--compile reduce-overhead is for one process. Use --compile true")
    utils.log("note: compiling the networks, before or in the first step, takes a minute or more")
    torch._inductor.config.fallback_random = True
    warnings.filterwarnings("ignore", "TensorFloat32")  # advice to round products that are float32 on purpose
    student, loss = getattr(parts.student, "module", parts.student), parts.dino_loss  # without DDP
    for network in (student, parts.teacher):
        network.forward = torch.compile(network.forward, dynamic=False)
    loss.terms = torch.compile(loss.terms, dynamic=False)
    if args.compile == "reduce-overhead" and loss.center.device.type == "cuda":
        record_cuda_graphs(student, parts.teacher, loss, args, amp_dtype)


def record_cuda_graphs(student, teacher, loss, args, amp_dtype):
    """Record forward and backward passes of networks and loss as CUDA graphs, which replace them in training.

    A step then launches five graphs instead of hundreds of kernels. Their memory is fixed: weights and center have to
    be changed in place, and the next pass overwrites what they return.
    """
    # Gradients are recorded on another stream than steps run on. Each is waited for, as torch warns; that costs little.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    device, batch_size = loss.center.device, args.batch_size_per_gpu
    sizes = [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number
    crops = [torch.zeros(batch_size, args.in_chans, size, size, device=device) for size in sizes]
    buffers = [*student.buffers(), *teacher.buffers()]  # statistics of batch norms, which recording changes
    before = [buffer.clone() for buffer in buffers]
    with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None, cache_enabled=False):
        torch.cuda.make_graphed_callables((teacher, student), ((crops[:2],), (crops,)), allow_unused_input=True)
        teacher_output, student_output = teacher(crops[:2]), student(crops).detach().requires_grad_()
    # The loss reads the memory that the networks write to, so nothing is copied between them.
    inputs = student_output, teacher_output, torch.ones((), device=device)
    loss.terms = torch.cuda.make_graphed_callables(loss.terms, inputs)
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
