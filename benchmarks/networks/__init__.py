# SPDX-License-Identifier: BSD-3-Clause
"""Whole networks on every runtime, static and dynamic: `python -m benchmarks.networks`."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """The command line; torch is loaded only now."""
    from .command import main as command

    return command(arguments)
