# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA backend takes and refuses; asked of tensors without data, for there may be no GPU."""

from __future__ import annotations

import re

import pytest
import torch

import dcd_kernels as dcd
from dcd_kernels import extension, geometry
from dcd_kernels.backends import cuda, selection


def _supports(size=(8, 8), kernel=(3, 3), *, batch=2, channels=6, multiplier=1, latent=4,
              stride=1, padding=1, dilation=1, dtype=torch.float16):  # fmt: skip
    input = torch.empty(batch, channels, *size, dtype=dtype, device="meta")
    weight = torch.empty(channels * multiplier, 1, *kernel, dtype=dtype, device="meta")
    phi = torch.empty(batch, latent, latent, device="meta")
    where = geometry.resolve("test", size, kernel, stride, padding, dilation)
    return cuda.supports("depthwise", input, weight, None, phi, None, None, where)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"kernel": (5, 5), "padding": 0},
        {"kernel": (7, 7), "padding": "same", "dtype": torch.bfloat16},
        {"padding": (3, 0), "dtype": torch.float32},
        {"batch": 0},
        {"size": (1, 1)},
        {"latent": 1, "channels": 3},
        {"batch": 2**20, "size": (64, 64)},  # samples may lie far apart
    ],
)
def test_supported(options):
    assert _supports(**options)[0], _supports(**options)[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"size": (8,), "kernel": (3,)}, "1 spatial dimensions"),
        ({"size": (4, 8, 8), "kernel": (3, 3, 3)}, "3 spatial dimensions"),
        ({"kernel": (3, 5)}, r"kernel size \(3, 5\)"),
        ({"kernel": (1, 1), "padding": 0}, r"kernel size \(1, 1\)"),
        ({"kernel": (9, 9), "padding": 4}, r"kernel size \(9, 9\)"),
        ({"multiplier": 2}, "2 outputs a channel"),
        ({"latent": 49}, "49 latent components"),
        ({"stride": 3}, r"stride \(3, 3\)"),
        ({"stride": (1, 2)}, r"stride \(1, 2\)"),
        ({"dilation": 2, "padding": 2}, r"dilation \(2, 2\)"),
        ({"channels": 2**10, "size": (2**11, 2**10)}, "2\\*\\*31 or more elements in a sample"),
        ({"channels": 1, "size": (1, 2**29)}, "2\\*\\*29 or more rows or columns"),
        ({"channels": 1, "size": (2, 2), "padding": 2**15}, "2\\*\\*31 or more elements in a sample"),
    ],
)
def test_refused_with_the_reason(options, reason):
    able, said = _supports(**options)
    assert not able
    assert re.search(reason, said), said


def test_other_operators_are_not_here():
    weight = torch.empty(4, 4, device="meta")
    for op in selection.OPS:
        if op != "depthwise":
            reason = "only the depthwise convolution has a CUDA kernel"
            assert cuda.can_run(op, weight, weight) == (False, reason)


def test_cpu_tensors_stay_on_the_cpu():
    input, weight = torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3)
    able, reason = selection.ask("cuda", "depthwise", input, weight)
    assert not able
    assert reason == extension.CUDA_REASON or "run on CUDA devices" in reason
    with dcd.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run depthwise"):
        dcd.dcd_conv2d(input, weight, groups=2, padding=1)


def test_geometry_reaches_the_backends(monkeypatch):
    asked = []

    def can_run(op, *call):
        asked.append((op, call[-1]))
        return False, "not today"

    monkeypatch.setattr(cuda, "can_run", can_run)
    with dcd.use_backend("cuda"), pytest.raises(RuntimeError, match="not today"):
        dcd.dcd_conv2d(torch.ones(1, 2, 9, 9), torch.ones(2, 1, 3, 3), groups=2, stride=2, dilation=2)
    op, where = asked[-1]
    assert (
        op == "depthwise" and where.stride == (2, 2) and where.dilation == (2, 2) and where.output == (3, 3)
    )
