# SPDX-License-Identifier: BSD-3-Clause
"""What else the Triton kernels give: pooled outputs, latent moments; and every tile tuning may choose."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import op_checks
import operands as given
import test_grad
import torch
from cases import SEED, assert_close_to_truth, in_layout
from operands import HALF, LAYOUTS, Case, operands
from patching import replaced
from triton.runtime.interpreter import InterpretedFunction

import dcd_kernels.backends.triton as package
from dcd_kernels.arguments import ACTIVATIONS
from dcd_kernels.backends.triton import entry, tuning

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

POOLED = [
    Case("pointwise", 1, 3, 1, 1, (1,)),
    Case("pointwise", 3, 24, 20, 11, (7, 7), "silu", bias="sample", residual=True),
    Case("pointwise", 7, 40, 24, 4, (1, 1), "relu", bias="shared"),
    Case("pointwise", 5, 24, 40, 4, (3, 7), "relu6", bias="shared"),
    Case("pointwise", 2, 16, 96, 4, (17, 13), "relu6", bias="sample"),
    Case("pointwise", 2, 12, 20, 3, (3, 5), "hardswish", blocks=4),
    Case("pointwise", 2, 24, 48, 4, (9, 7), lam=False, dynamic=False),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("case", POOLED, ids=str)
def test_pooled_output(case, dtype, layout, launches):
    check_pooled(case, dtype, layout)


def check_pooled(case: Case, dtype: torch.dtype, layout: str) -> None:
    tensors = operands(case, dtype, layout)
    output, sums = entry.pointwise_pooled(*tensors, ACTIVATIONS[case.activation])
    truth, plain = given.truth(case, tensors), given.plain(case, tensors)
    assert_close_to_truth(output, plain, truth)
    # sums of what was rounded on the way, for all that they are float32
    eps = torch.finfo(dtype).eps
    assert_close_to_truth(sums, plain.float().flatten(2).sum(2), truth.flatten(2).sum(2), "sums", eps)


@pytest.mark.parametrize("shape", ((0, 3, 7), (2, 0, 7)), ids=str)
def test_pooled_output_without_a_sample_or_a_pixel(shape):
    case = Case("pointwise", shape[0], 13, 21, 5, shape[1:], bias="shared")
    output, sums = entry.pointwise_pooled(*operands(case), 0)
    assert output.shape == (shape[0], 21, *shape[1:])
    assert sums.shape == (shape[0], 21)
    assert not sums.any()


def moments(x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and centred covariance of z = Qᵀx over pixels, at the precision of the tensors."""
    z = torch.einsum("ncp,cl->nlp", x.flatten(2), q)
    z = z if z.dtype == torch.float64 else z.float()
    mean = z.mean(2)
    centred = z - mean.unsqueeze(2)
    return mean, centred @ centred.mT / z.shape[2]


MOMENTS = [
    (1, 3, 1, (1,)),
    (3, 24, 4, (7, 7)),
    (7, 40, 11, (1, 1)),
    (2, 40, 16, (9, 7)),
    (2, 24, 33, (3, 5)),
    (2, 130, 3, (17, 13)),
]


@pytest.mark.parametrize("shift", (0.0, 1000.0), ids=("centred", "shifted"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("shape", MOMENTS, ids=str)
def test_latent_moments(shape, dtype, layout, shift, launches):
    """Also where the mean is a thousand standard deviations, and raw second moments lose every digit."""
    batch, channels, latent, size = shape
    generator = torch.Generator().manual_seed(SEED + sum(size) + latent)
    x = torch.randn(batch, channels, *size, generator=generator) + shift
    q = torch.randn(channels, latent, generator=generator) * channels**-0.5
    x, q = in_layout(x.to(dtype), layout), in_layout(q.to(dtype), layout, image=False)
    found = entry.latent_moments(x, q)
    plain, truth = moments(x, q), moments(x.double(), q.double())
    for name, mine, theirs, right in zip(("mean", "covariance"), found, plain, truth, strict=True):
        assert mine.dtype == torch.float32
        scale = right
        if name == "covariance":
            # one pixel has none: what rounding leaves of it is measured by what was subtracted
            scale = truth[0].unsqueeze(2) * truth[0].unsqueeze(1) * torch.finfo(torch.float32).eps
        error = torch.linalg.vector_norm(mine - right).item()
        allowed = 2 * torch.linalg.vector_norm(theirs - right).item()
        allowed += 4 * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(right).item()
        allowed += 4 * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(scale).item()
        if name == "covariance":
            # each pixel's z is rounded to eps·|mean|, whoever sums; of that, eps·|mean|·σ arrives here
            spread = truth[1].diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
            carried = torch.linalg.vector_norm(truth[0].unsqueeze(2) * spread.unsqueeze(1)).item()
            allowed += torch.finfo(torch.float32).eps * carried / x[0, 0].numel() ** 0.5
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


# Few channels on maps of many pixels: W_n is made on chip
SYNTHESISED = [
    Case("pointwise", 2, 24, 40, 4, (33, 32), "relu6", bias="sample", residual=True),
    Case("pointwise", 1, 3, 20, 11, (1100,), lam=False, bias="shared"),
    Case("pointwise", 1, 60, 70, 33, (32, 32), "silu"),
    Case("pointwise", 2, 12, 20, 3, (37, 31), "relu", blocks=4, bias="shared"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("case", SYNTHESISED, ids=str)
def test_synthesised_weights(case, dtype, layout, launches):
    op_checks.values(case, dtype, layout, None, wide=dtype != torch.float32)
    assert {kernel for kernel, _ in launches} == {"synthesised"}


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_deep_layers_synthesise_in_half_precision_alone(dtype, launches):
    case = Case("pointwise", 1, 100, 70, 33, (32, 32), "silu")
    op_checks.values(case, dtype, "contiguous", None)
    assert {kernel for kernel, _ in launches} == {"product" if dtype == torch.float32 else "synthesised"}


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_pooled_output_of_synthesised_weights(dtype, launches):
    for layout in LAYOUTS[:2]:
        check_pooled(SYNTHESISED[0], dtype, layout)
    assert {kernel for kernel, _ in launches} == {"synthesised"}


def test_every_kernel_is_interpreted(launches):
    """By the calls here alone; a kernel that none of them reaches needs a case above."""
    op_checks.values(SYNTHESISED[1], torch.float32, "contiguous", None)
    for case in (*TILED, replace(TILED[1], batch=33)):
        test_grad.check_values(replace(case, activation=None), torch.float32, "contiguous", None)
    entry.latent_moments(torch.randn(2, 3, 4), torch.randn(3, 2))
    assert {kernel for kernel, _ in launches} == kernels()


def kernels() -> set[str]:
    """Those that are launched: what has a program's number."""
    found = set()
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, InterpretedFunction) and "program_id" in inspect.getsource(value.fn):
                found.add(value.fn.__name__)
    return found


TILED = [
    Case("pointwise", 2, 40, 70, 4, (9, 7), "relu", bias="sample", residual=True),
    Case("pointwise", 3, 24, 40, 3, (1, 1), bias="shared"),
    Case("apply", 2, 40, 70, 4, (9, 7), "relu", bias="sample", residual=True),
]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_every_tile(case, layout, launches):
    """Whatever tuning chooses on some device computes the same."""
    most = 1

    def choose(kernel, key, candidates, run):
        nonlocal most
        most = max(most, len(candidates))
        return candidates[index % len(candidates)]

    index = 0
    while index < most:
        with replaced(tuning.choose, choose):
            op_checks.values(replace(case, activation=None), torch.float32, layout, None)
            test_grad.check_values(case, torch.float32, layout, None)
        index += 1
    assert most > 1 or case.size == (1, 1)  # one tile serves three pixels
