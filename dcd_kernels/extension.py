# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled op libraries, and says why where it cannot.

The CPU's library defines the ops and is always wanted; the one with the CUDA kernels adds to it under a CUDA
build of torch, whose symbols it needs.

Environment: ``DCD_KERNELS_ISA``, read when the library is loaded, names the instruction set its kernels use.
"""

import os
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_ops.so")
ISA_VARIABLE = "DCD_KERNELS_ISA"

CUDA_LIBRARY = Path(__file__).with_name("_ops_cuda.so")

LOADED = False
REASON = ""
CUDA_LOADED = False
CUDA_REASON = ""

_REMEDY = "Reinstall with `pip install --no-build-isolation .` from a checkout, with torch installed first."

try:
    if not LIBRARY.exists():
        raise OSError(f"{LIBRARY.name} was not built")
    torch.ops.load_library(str(LIBRARY))
    LOADED = True
except (OSError, RuntimeError) as error:
    REASON = f"the compiled extension is not available: {error}"
    warnings.warn(
        f"dcd_kernels: {REASON}. Everything but pack_weight runs, on the slower PyTorch reference. {_REMEDY}",
        RuntimeWarning,
        stacklevel=2,
    )

_isa = os.environ.get(ISA_VARIABLE)
if LOADED and _isa and not torch.ops.dcd_kernels.has_cpu_isa(_isa):
    warnings.warn(
        f"dcd_kernels: {ISA_VARIABLE}={_isa!r} is not an instruction set that this build and CPU support; "
        f"the kernels use {torch.ops.dcd_kernels.cpu_isa()}",
        RuntimeWarning,
        stacklevel=2,
    )


def _cuda_obstacle() -> str:
    if not LOADED:
        return "the library that defines the ops is not loaded"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not CUDA_LIBRARY.exists():
        return f"{CUDA_LIBRARY.name} was not built: `python -m dcd_kernels info` says why"
    return ""


CUDA_REASON = _cuda_obstacle()
if not CUDA_REASON:
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
        CUDA_LOADED = True
    except (OSError, RuntimeError) as error:
        CUDA_REASON = f"{CUDA_LIBRARY.name} cannot be loaded: {error}"
        warnings.warn(f"dcd_kernels: {CUDA_REASON}", RuntimeWarning, stacklevel=2)
