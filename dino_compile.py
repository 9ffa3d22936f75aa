"""--compile: torch.compile for networks."""

import os
import shutil
import warnings

from utils import UserError


def compile_in_place(*models, mode=None):
    """torch.compile, in one of its modes, for models that keep their state-dict keys; one graph per list of crop sizes.

    Random numbers stay torch's own, so that drop path drops the same. Raises UserError without a C++ compiler.
    """
    import torch._inductor.config

    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    if not any(map(shutil.which, compilers)):
        raise UserError(
            f"--compile needs a C++ compiler: there is no {' or '.join(compilers)}. Install one, or use --compile false"
        )
    torch._inductor.config.fallback_random = True
    warnings.filterwarnings("ignore", "TensorFloat32")  # advice to round products that are float32 on purpose
    for model in models:
        model.compile(dynamic=False, mode=mode)
