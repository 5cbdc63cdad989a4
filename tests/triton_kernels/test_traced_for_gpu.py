# SPDX-License-Identifier: BSD-3-Clause
"""What torch.compile makes of calls on GPU tensors, traced on fake ones: one op a call, with no break."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dcd_kernels as dcd
from dcd_kernels.backends import cuda


class Call(nn.Module):
    def __init__(self, function: str, options: dict):
        super().__init__()
        self.function, self.options = getattr(dcd, function), options

    def forward(self, *tensors: Tensor, **named: Tensor) -> Tensor:
        return self.function(*tensors, **named, **self.options)


# function, its first two tensors, options, what is left in the graph but for reshaping
POINTWISE, APPLY = "dcd_kernels.pointwise.default", "dcd_kernels.apply.default"
CALLS = [
    ("dcd_conv2d", (4, 24, 7, 7), (40, 24, 1, 1), {}, [POINTWISE]),
    ("dcd_conv1d", (4, 24, 7), (40, 24, 1), {}, [POINTWISE]),
    ("dcd_conv2d", (4, 24, 7, 7), (40, 24, 3, 3), {"padding": 1}, ["aten.conv2d.default", APPLY]),
    ("dcd_linear", (4, 24), (40, 24), {}, [POINTWISE]),
    ("dcd_linear", (4, 5, 24), (40, 24), {}, [POINTWISE]),
    ("dcd_apply", (4, 40, 7, 7), (4, 24, 7, 7), {}, [APPLY]),
]


def traced(function: str, first, second, options, capability: tuple[int, int], monkeypatch) -> list[str]:
    """Operators of the whole graph; torch.export raises where torch.compile(fullgraph=True) would."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    cuda._known_capability.cache_clear()
    with FakeTensorMode(), torch.no_grad():

        def given(*shape: int) -> Tensor:
            return torch.empty(shape, device="cuda:0")

        tensors = given(*first), given(*second), given(40, 4), given(4, 4, 4), given(24, 4)
        options = {"activation": "relu", **options}
        program = torch.export.export(
            Call(function, options), tensors, {"lam": given(4, 40), "bias": given(40)}, strict=True
        )
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("function", "first", "second", "options", "expected"), CALLS)
def test_one_op_a_call(function, first, second, options, expected, monkeypatch, fresh_compiler):
    found = traced(function, first, second, options, (9, 0), monkeypatch)
    reshaping = ("aten.flatten", "aten.unflatten", "aten.squeeze", "aten.unsqueeze", "aten.transpose")
    reshaping += ("aten.view", "aten.reshape", "aten.permute", "aten.slice", "aten.movedim")
    computing = [name for name in found if not name.startswith(reshaping)]
    assert computing == expected


def test_an_old_gpu_gets_the_reference(monkeypatch, fresh_compiler):
    found = traced(*CALLS[0][:4], (7, 5), monkeypatch)
    assert found
    assert not any(name.startswith("dcd_kernels") for name in found)
