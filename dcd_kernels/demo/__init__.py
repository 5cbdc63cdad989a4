# SPDX-License-Identifier: BSD-3-Clause
"""``python -m dcd_kernels demo``: photographs through a dynamic network, and digits learnt from scratch."""

from __future__ import annotations

import argparse


def run(options: argparse.Namespace) -> int:
    """Both parts, or the one that ``options.only`` names. Returns 0 only if all formulations agree."""
    # here and not above: a process that measures memory loads this package, and nothing that draws
    from dcd_kernels.demo import parts

    return parts.run(options)
