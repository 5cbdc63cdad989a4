# SPDX-License-Identifier: BSD-3-Clause
"""The plain PyTorch backend: runs whatever passed the checks, on any device."""

from __future__ import annotations

import torch

NAME = "reference"
NOTES: dict[torch.dtype, str] = {}  # what a dtype's user should know


def can_run(*_) -> tuple[bool, str]:
    """Always: a call that passed the checks is one that PyTorch can run."""
    return True, "plain PyTorch runs every form, dtype and device"


def kernel(op: str, dtype: torch.dtype) -> str:
    """What runs a call, in words."""
    return "plain PyTorch, factored"
