# SPDX-License-Identifier: BSD-3-Clause
"""Which of the Triton tests run in this process.

Triton decides when a kernel is defined whether it will be interpreted, so that interpreted kernels and
compiled ones cannot share a process. Both kinds are skipped where Triton is not installed.
"""

from __future__ import annotations

import os

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
FOLDER = "tests/triton_kernels"


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if "triton_kernels" not in item.path.parts or ("interpreted" in item.path.parts) == INTERPRETING:
            continue
        if INTERPRETING:
            reason = f"compiles, which an interpreting process cannot: python -m pytest {FOLDER}"
        else:
            reason = f"needs the interpreter: TRITON_INTERPRET=1 python -m pytest {FOLDER}/interpreted"
        item.add_marker(pytest.mark.skip(reason=reason))
