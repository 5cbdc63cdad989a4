# SPDX-License-Identifier: BSD-3-Clause
"""The plain PyTorch backend: runs whatever passed the checks, on any device."""

from __future__ import annotations

from torch import Tensor

NAME = "reference"
KERNEL = "plain PyTorch, factored"


def can_run(
    op: str,
    input: Tensor,
    weight: Tensor,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    lam: Tensor | None = None,
) -> tuple[bool, str]:
    """Always: a call that passed the checks is one that PyTorch can run."""
    return True, "plain PyTorch runs every form, dtype and device"
