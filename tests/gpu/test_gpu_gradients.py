# SPDX-License-Identifier: BSD-3-Clause
"""Every gradient of the three ops on the GPU, against float64."""

from __future__ import annotations

import pytest
import test_grad
import torch
from on_device import BF16_WIDE, DEPTHWISE, IEEE, MAIN, PRECISIONS, takes
from operands import LAYOUTS, Case, call, label, operands

STENCILS = [c for c in DEPTHWISE + test_grad.CASES if c.op == "depthwise" and takes(c)]
CASES = [case for case in test_grad.CASES if case.op != "depthwise"] + STENCILS
# Many pixels and many samples: sums that are taken in parts, and weights of more than one tile.
LAYERS = [
    Case("pointwise", 4, 16, 96, 4, (56, 56), "relu6", bias="shared"),
    Case("pointwise", 8, 160, 960, 8, (7, 7), bias="shared"),
    Case("pointwise", 40, 96, 24, 8, (14, 14), residual=True),
    Case("pointwise", 3, 300, 201, 45, (13, 11), "silu", lam=False),
    Case("apply", 8, 96, 144, 8, (28, 28), "relu6", bias="sample", residual=True),
    Case("apply", 4, 256, 256, 16, (14, 14), given_latent=True),
]


def check(case, precision, layout, device):
    with precision():
        test_grad.check_values(
            case,
            precision.dtype,
            layout,
            None,
            wide=precision.wide,
            device=device,
            eps=precision.eps if case.op != "depthwise" else None,
        )


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_values(case, layout, precision, device):
    check(case, precision, layout, device)


@pytest.mark.parametrize("precision", MAIN, ids=str)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_values_of_misaligned_slices(case, precision, device):
    check(case, precision, "sliced", device)


@pytest.mark.parametrize("deterministic", (True, False), ids=("deterministic", "any order"))
@pytest.mark.parametrize("precision", (IEEE, BF16_WIDE), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", LAYERS, ids=label)
def test_values_of_whole_layers(case, layout, precision, deterministic, device):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    check(case, precision, layout, device)


@pytest.mark.parametrize("case", test_grad.WHOLE, ids=label)
def test_gradients_that_are_expanded(case, device):
    """sum().backward() sends strides of zero."""
    if not takes(case):
        case = DEPTHWISE[1]
    tensors = [t for t in operands(case, requires_grad=True, device=device) if t is not None]
    given = iter(tensors)
    whole = [None if shape is None else next(given) for shape in case.shapes().values()]
    with IEEE():
        output = call(case, whole)
        expanded = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
        dense = torch.autograd.grad(output, tensors, torch.ones_like(output))
    for got, expected in zip(expanded, dense, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", [c for c in test_grad.WHOLE if c.op != "depthwise"], ids=label)
def test_second_order(case, device):
    """A gradient penalty: the same kernels once more, against the reference in float64."""
    found = []
    for function, convert in ((call, torch.Tensor.float), (test_grad.plain, torch.Tensor.double)):
        tensors = [convert(t).detach().requires_grad_() for t in operands(case, device=device)]
        with IEEE():
            first = torch.autograd.grad(function(case, tensors).sin().sum(), tensors, create_graph=True)
            penalty = sum(t.square().sum() for t in first)
            found.append(torch.autograd.grad(penalty, tensors, allow_unused=True))
    for mine, right in zip(*found, strict=True):
        if right is not None:
            error = (mine.double() - right).norm().item()
            assert error <= 1e-4 * max(1.0, right.norm().item()), error
