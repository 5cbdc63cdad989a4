# SPDX-License-Identifier: BSD-3-Clause
"""For all interpreted tests: bfloat16 as the hardware computes it."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def right_bfloat16():
    import bfloat16

    with bfloat16.right_bfloat16():
        yield
