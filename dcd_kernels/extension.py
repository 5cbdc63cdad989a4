# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled op library, and says why where it cannot.

Environment: ``DCD_KERNELS_ISA``, read when the library is loaded, names the instruction set its kernels use.
"""

import os
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_ops.so")
ISA_VARIABLE = "DCD_KERNELS_ISA"

LOADED = False
REASON = ""

_REMEDY = "Reinstall with `pip install --no-build-isolation .` from a checkout, with torch installed first."

try:
    if not LIBRARY.exists():
        raise OSError(f"{LIBRARY.name} was not built")
    torch.ops.load_library(str(LIBRARY))
    LOADED = True
except (OSError, RuntimeError) as error:
    REASON = f"the compiled extension is not available: {error}"
    warnings.warn(
        f"dcd_kernels: {REASON}. Everything runs on the slower PyTorch reference. {_REMEDY}",
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
