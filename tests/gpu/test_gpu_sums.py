# SPDX-License-Identifier: BSD-3-Clause
"""What the GPU kernels sum up on their way: pooled outputs, latent moments, channel sums, and the branch."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import test_grad
import test_ops_pointwise
import torch
from cases import assert_close_to_truth, assert_same, in_layout
from on_device import BF16, FP16, IEEE, PRECISIONS, random_map
from operands import LAYOUTS, Case, in_float64, operands, plain

import dcd_kernels as dcd
from dcd_kernels import ops
from dcd_kernels.arguments import ACTIVATIONS
from dcd_kernels.nn import DynamicBranch

POOLED = [
    *test_ops_pointwise.CASES,
    Case("pointwise", 4, 16, 96, 4, (56, 56), "relu6", bias="shared"),
    Case("pointwise", 70, 64, 40, 8, (3, 3), "relu"),
]


def pooled(case: Case, tensors):
    return ops.pointwise_pooled(*tensors, ACTIVATIONS[case.activation])


def summed(output: torch.Tensor) -> torch.Tensor:
    return output.flatten(2).sum(2, dtype=torch.promote_types(output.dtype, torch.float32))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", POOLED, ids=str)
def test_pointwise_pooled(case, layout, precision, device):
    with precision():
        tensors = operands(case, precision.dtype, layout, wide=precision.wide, device=device)
        output, sums = pooled(case, tensors)
        same, truth = plain(case, tensors), plain(case, in_float64(tensors))
        assert_close_to_truth(output, same, truth, "output", precision.eps)
        # a sum may cancel, the sizes of its terms may not: the tolerance's 4 eps are of those
        error = (sums.double() - summed(truth)).norm().item()
        allowed = 2 * (summed(same).double() - summed(truth)).norm().item()
        terms = summed(truth.abs()).norm().item()
        allowed += 4 * (precision.eps or torch.finfo(torch.float32).eps) * terms
        if precision.dtype is torch.bfloat16:
            eps, pixels = torch.finfo(torch.bfloat16).eps, truth[0, 0].numel()
            # what is summed was rounded, each pixel by itself, which few of them do not even out; and on the
            # CPU λ W0 once for all of them, which no number does
            allowed += (eps / 4 / pixels**0.5 + (eps / 16 if device.type == "cpu" else 0)) * terms
        assert sums.dtype == torch.float32 and error <= allowed, (error, allowed)


@pytest.mark.parametrize("activation", (None, "relu6", "silu"))
@pytest.mark.parametrize("precision", (IEEE, BF16), ids=str)
def test_gradients_of_pointwise_pooled(activation, precision, device):
    """The pooled gradient enters before the activation's mask, once."""
    case = replace(test_ops_pointwise.CASES[13], activation=activation)
    tensors = operands(case, precision.dtype, "channels_last", requires_grad=True, device=device)
    high = in_float64(tensors)
    shape = (case.batch, case.out_channels, *case.size)
    grad = random_map(*shape, seed=1, dtype=torch.float32)
    weights = random_map(*shape[:2], seed=2, dtype=torch.float32)
    mask = test_grad.away_from_kinks(case, tensors, 16 * torch.finfo(precision.dtype).eps).to(device)

    def loss(output, sums, wide):
        # what lies at a kink is left out of both outputs
        lost = torch.where(mask, 0, output).flatten(2).sum(2)
        kept = torch.where(mask, output, 0)
        return (kept * grad.to(wide)).sum() + ((sums - lost.to(sums.dtype)) * weights.to(wide)).sum()

    got = torch.autograd.grad(loss(*pooled(case, tensors), torch.float32), tensors)
    same, right = (
        torch.autograd.grad(loss(y, summed(y), wide), given)
        for wide, given in ((torch.float32, tensors), (torch.float64, high))
        for y in [plain(case, given)]
    )
    for key, mine, theirs, true in zip(case.names, got, same, right, strict=True):
        assert_close_to_truth(mine, theirs, true, f"d {key}")


@pytest.mark.parametrize("precision", PRECISIONS[:-1], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((2, 3, 7, 7), (3, 20, 1, 1), (2, 33, 5, 9), (4, 64, 28, 28)), ids=str)
@pytest.mark.parametrize("latent", (1, 4, 11))
def test_latent_moments(latent, shape, layout, precision, device):
    with precision():
        input = in_layout(random_map(*shape, seed=1, dtype=precision.dtype), layout)
        q = random_map(shape[1], latent, seed=2, dtype=precision.dtype) / shape[1] ** 0.5
        got = dcd.latent_moments(input, q)
        same = dcd.reference.latent_moments(input, q)
        truth = dcd.reference.latent_moments(input.double(), q.double())
    for name, *tensors in zip(("mean", "covariance"), got, same, truth, strict=True):
        assert_close_to_truth(*tensors, name, precision.eps)


@pytest.mark.parametrize("ratio", (30, 1000))
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_latent_moments_beside_a_large_mean(layout, ratio, device):
    """The mean is a thousand standard deviations: E[zzᵀ] − mean² would have lost every digit."""
    input = ratio + random_map(3, 24, 14, 14, seed=1, dtype=torch.float32, layout=layout)
    q = (random_map(24, 8, seed=2, dtype=torch.float32) + 1) / 24
    got, same = dcd.latent_moments(input, q), dcd.reference.latent_moments(input, q)
    truth = dcd.reference.latent_moments(input.double(), q.double())
    for mine, theirs, true in zip(got, same, truth, strict=True):
        error, allowed = ((t.double() - true).norm().item() for t in (mine, theirs))
        assert error <= 2 * allowed + 1e-3 * true.norm().item(), (error, allowed)


def test_gradients_of_latent_moments(device):
    found = []
    for moments, dtype in (
        (dcd.latent_moments, torch.float32),
        (dcd.reference.latent_moments, torch.float64),
    ):
        input = random_map(3, 20, 7, 5, seed=1, dtype=torch.float32).to(dtype).requires_grad_()
        q = random_map(20, 6, seed=2, dtype=torch.float32).to(dtype).requires_grad_()
        mean, covariance = moments(input, q)
        found.append(torch.autograd.grad(mean.sin().sum() + covariance.square().sum(), (input, q)))
    for mine, right in zip(*found, strict=True):
        assert (mine.double() - right).norm().item() <= 1e-4 * right.norm().item()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", ((2, 3, 1, 1), (3, 17, 7, 7), (2, 96, 33, 31), (1, 40, 112, 112), (5, 9, 11))
)
def test_channel_sums(shape, layout, dtype, device):
    input = in_layout(random_map(*shape, seed=1, dtype=dtype), layout)
    got = ops.branch.channel_sums(input)
    truth = input.double().flatten(2)
    assert got.dtype == torch.float32 and (got.shape[0], got.shape[2]) == shape[:2]
    error = (got.double().sum(1) - truth.sum(2)).norm().item()
    assert error <= 4 * torch.finfo(torch.float32).eps * truth.abs().sum(2).norm().item()


BRANCHES = {
    "paper": {},
    "released": {"gate": "se", "bias": True},
    "pooled to 2x2": {"pool_size": (2, 2), "gate": "se"},
    "blocks, silu": {"phi_shape": (2, 3, 3), "gate": "silu", "lam_activation": "sigmoid2"},
    "no lam": {"lam_channels": 0},
    "no phi": {"phi_shape": None, "gate": "hardswish", "lam_activation": None},
}


@pytest.mark.parametrize("precision", (IEEE, FP16, BF16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BRANCHES)
def test_branch(name, layout, precision, device):
    """λ and Φ and every gradient against float64, beside torch's operators at the same precision."""
    torch.manual_seed(0)
    options = {"lam_channels": 70, "phi_shape": (5, 5), **BRANCHES[name]}
    branch = DynamicBranch(45, options.pop("lam_channels"), options.pop("phi_shape"), **options)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.mul_(2).add_(0.02 * torch.randn_like(parameter))
    branch = branch.to(device, precision.dtype)
    input = in_layout(random_map(6, 45, 7, 5, seed=1, dtype=precision.dtype), layout)
    weights = [random_map(6, 70, seed=2, dtype=torch.float32), random_map(6, 50, seed=3, dtype=torch.float32)]

    def results(module, image):
        image = image.detach().requires_grad_()
        outputs = [t for t in module(image) if t is not None]
        flat = [t.flatten(1) for t in outputs]
        loss = sum((t * w[:, : t.shape[1]].to(t.dtype)).sum() for t, w in zip(flat, weights, strict=False))
        leaves = [image, *module.parameters()]
        return [*(t.detach() for t in outputs), *torch.autograd.grad(loss, leaves)]

    able, reason = branch.runs_fused(input)
    assert able, reason
    got = results(branch, input)
    with dcd.use_backend("reference"):
        same = results(branch, input)
    right = results(copy.deepcopy(branch).double(), input.double())
    for mine, theirs, true in zip(got, same, right, strict=True):
        error, allowed = ((t.double() - true).norm().item() for t in (mine, theirs))
        assert mine.isfinite().all()
        assert error <= 2 * allowed + 8 * torch.finfo(mine.dtype).eps * true.norm().item(), (error, allowed)


def test_layers_pool_once_where_the_producer_has_summed(device):
    """pointwise_pooled's sums are what channel_sums gives on its output."""
    case = replace(test_ops_pointwise.CASES[11], activation="relu6")
    tensors = operands(case, device=device)
    output, sums = pooled(case, tensors)
    again = ops.branch.channel_sums(output).sum(1)
    assert_same(sums.double(), again.double(), 1e-5)
