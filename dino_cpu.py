"""What makes training and evaluation fast on CPUs: which precision, and settings of this process."""

import ctypes
import sys
from pathlib import Path

import torch


def cpu_computes_bf16():
    """Whether this CPU multiplies bf16 faster than float32. Intel's without AMX have slower instructions for it.

    Not measured: a busy machine gives another answer now and then, and a run has to resume in the same precision.
    """
    flags = cpu_flags()
    return bool(flags & {"amx_bf16", "bf16"}) or {"avx512_bf16", "AuthenticAMD"} <= flags


def cpu_flags():
    """The words of /proc/cpuinfo, vendor and instruction sets among them; none where there is no such file."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def tune_cpu():
    """Make training on CPUs faster: keep freed memory, and use oneDNN where it beats MKL. Settings of the process."""
    keep_freed_memory()
    multiply_by_onednn()


def keep_freed_memory():
    """Let glibc keep large blocks that are freed, as torch does on GPUs.

    By default they are returned to the system, and each step has its activations mapped and zeroed again, page by page:
    a third of the time of a step. The price is that the process stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # other C libraries have none
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def multiply_by_onednn():
    """Multiply float32 matrices with oneDNN on AMD CPUs with AVX-512: as exact as MKL, torch's choice, twice as fast.

    torch uses oneDNN only where it may round to bf16, which oneDNN does only on CPUs with AMX; these are left alone. If
    a product is rounded nevertheless, the setting is undone. torch.get_float32_matmul_precision() raises after this.
    """
    flags, settings = cpu_flags(), getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(settings, "fp32_precision") or "AuthenticAMD" not in flags or "avx512f" not in flags:
        return
    if any(flag.startswith("amx") for flag in flags):
        return
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    ramp = torch.linspace(1, 2, 2**16).view(256, 256)  # numbers that bf16 does not have
    exact = ramp.double() @ ramp.double()
    if not torch.allclose((ramp @ ramp).double(), exact, rtol=1e-5, atol=0):
        settings.fp32_precision = before
