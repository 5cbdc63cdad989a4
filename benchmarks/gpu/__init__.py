# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks on a GPU: `python -m benchmarks.gpu`, from the root of the repository."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """The command line; torch is loaded only now."""
    from .command import main as command

    return command(arguments)
