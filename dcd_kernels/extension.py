# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled op library, and says why where it cannot."""

import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_ops.so")

LOADED = False
REASON = ""

_REMEDY = "Reinstall with `pip install --no-build-isolation .` from a checkout (torch must be installed first)."

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
