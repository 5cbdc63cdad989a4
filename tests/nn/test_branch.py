# SPDX-License-Identifier: BSD-3-Clause
"""The dynamic branch against the same written out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dcd_kernels.nn import DynamicBranch
from dcd_kernels.nn.branch import _slice_means

LAM = {
    "hardsigmoid2": lambda z: (z + 3).clamp(0, 6) / 3,
    "sigmoid2": lambda z: 2 / (1 + torch.exp(-z)),
    "hardsigmoid": lambda z: (z + 3).clamp(0, 6) / 6,
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    None: lambda z: 1 + z,
}
GATE = {
    "relu": lambda h, _: h.clamp(min=0),
    "relu6": lambda h, _: h.clamp(0, 6),
    "silu": lambda h, _: h / (1 + torch.exp(-h)),
    "hardswish": lambda h, _: h * (h + 3).clamp(0, 6) / 6,
    "se": lambda h, w: h * ((h @ w.T + 3).clamp(0, 6) / 3),
    None: lambda h, _: h,
}


def bins(length, count):
    """What the documentation of torch's adaptive pooling says, one bin after the other."""
    return [range((i * length) // count, ((i + 1) * length + count - 1) // count) for i in range(count)]


def pooled(x, size):
    """Adaptive average pooling of (N, C, H, W) by loops, flattened channel by channel."""
    columns = []
    for rows in bins(x.shape[2], size[0]):
        for columns_of in bins(x.shape[3], size[1]):
            columns.append(
                sum(x[:, :, i, j] for i in rows for j in columns_of) / (len(rows) * len(columns_of))
            )
    return torch.stack(columns, 2).flatten(1)


def strong(branch):
    """Weights large enough that every nonlinearity is left and right of its kinks."""
    with torch.no_grad():
        for weight in branch.parameters():
            weight.normal_()
    return branch


@pytest.mark.parametrize("gate", GATE)
@pytest.mark.parametrize("lam_activation", LAM)
def test_formula(gate, lam_activation):
    torch.manual_seed(0)
    options = {"gate": gate, "lam_activation": lam_activation, "squeeze_channels": 5, "dtype": torch.float64}
    branch = strong(DynamicBranch(6, 7, (3, 2, 2), bias=True, **options))
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    hidden = x.mean((2, 3)) @ branch.squeeze.weight.T + branch.squeeze.bias
    if gate == "se":
        torch.nn.init.zeros_(branch.gate.bias)
    hidden = GATE[gate](hidden, None if branch.gate is None else branch.gate.weight)
    logits = hidden @ branch.expand.weight.T + branch.expand.bias
    lam, phi = branch(x)
    torch.testing.assert_close(lam, LAM[lam_activation](logits[:, :7]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(phi, logits[:, 7:].reshape(4, 3, 2, 2), rtol=1e-12, atol=1e-12)
    assert lam.min() < 0.8 < 0.95 < lam.max(), "the test saw no range of λ"


@pytest.mark.parametrize("gate", GATE)
@pytest.mark.parametrize("lam_activation", LAM)
def test_second_derivatives(gate, lam_activation):
    torch.manual_seed(0)
    branch = strong(
        DynamicBranch(3, 2, (2, 2), gate=gate, lam_activation=lam_activation, dtype=torch.float64)
    )
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(branch, x)
    assert torch.autograd.gradgradcheck(lambda x: [c.square() for c in branch(x)], x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(7, 7), (8, 6), (1, 5)])
def test_two_by_two_pooling(size, dtype, layout):
    torch.manual_seed(0)
    branch = DynamicBranch(3, 4, None, pool_size=(2, 2), dtype=dtype)
    x = torch.randn(2, 3, *size).to(dtype).to(memory_format=layout)
    wide = copy.deepcopy(branch).double()
    wanted = wide(pooled(x.double(), (2, 2))[:, :, None, None].reshape(2, 3, 2, 2))[0]
    lam, _ = branch(x)
    # half input is pooled and carried in fp32: its coefficients are as good as those of fp32 input
    eps = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(lam.double(), wanted, rtol=0, atol=eps)


def test_any_rank_and_a_pooled_vector_agree():
    torch.manual_seed(0)
    branch = DynamicBranch(6, 3, (2, 2))
    x = torch.randn(4, 6)
    for shape in ((4, 6, 1), (4, 6, 1, 1), (4, 6, 1, 1, 1)):
        for got, wanted in zip(branch(x.view(shape)), branch(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gives_float32_coefficients(dtype):
    branch = DynamicBranch(6, 3, (2, 2), dtype=dtype)
    lam, phi = branch(torch.randn(2, 6, 4, 4, dtype=dtype))
    assert lam.dtype == phi.dtype == torch.float32
    # 70,000 is beyond fp16: a sum over the pixels must not be taken in it
    branch = DynamicBranch(1, 1, None, dtype=dtype)
    assert torch.isfinite(branch(torch.full((1, 1, 400, 400), 2.0, dtype=dtype))[0]).all()


def test_autocast_leaves_the_branch_alone():
    branch = strong(DynamicBranch(6, 3, (2, 2), pool_size=(2, 2)))
    x = torch.randn(2, 6, 5, 5)
    wanted = branch(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = branch(x)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_parts_may_be_absent():
    x = torch.randn(2, 6, 4, 4)
    lam, phi = DynamicBranch(6, 0, (3, 3))(x)
    assert lam is None and phi.shape == (2, 3, 3)
    lam, phi = DynamicBranch(6, 5, None)(x)
    assert phi is None and lam.shape == (2, 5)


def test_fresh_branch_is_near_one_and_zero_and_never_dead():
    for seed in range(40):  # with independent rows some of these forty would be dead
        torch.manual_seed(seed)
        branch = DynamicBranch(32, 32, (4, 4), squeeze_channels=4)
        lam, phi = branch(torch.rand(3, 32, 5, 5))
        assert (lam - 1).abs().max() < 0.2 and phi.abs().max() < 0.5
        assert (phi != 0).any(dim=(1, 2)).all(), seed
        (lam.sum() + phi.sum()).backward()
        assert all(p.grad.abs().max() > 0 for p in branch.parameters())


def test_dropout_leaves_one_and_zero():
    torch.manual_seed(0)
    branch = strong(DynamicBranch(6, 40, (6, 6), dropout=0.5, gate=None))
    x = torch.randn(3, 6, 4, 4)
    lam, phi = branch(x)
    assert 0.2 < (phi == 0).float().mean() < 0.8
    assert (lam == 1).float().mean() > 0.2
    branch.eval()
    assert (branch(x)[1] != 0).all()
    assert torch.equal(branch(x)[1], branch(x)[1])


@pytest.mark.parametrize("name", ["sigmoid", "hardsigmoid"])
def test_no_static_start_for_a_lam_below_one(name):
    with pytest.raises(ValueError, match=f"lam_activation must be one of .*{name}"):
        DynamicBranch(6, 3, None, lam_activation=name).reset_to_static()
    DynamicBranch(6, 0, (2, 2), lam_activation=name).reset_to_static()


@pytest.mark.parametrize("name", ["hardsigmoid2", "sigmoid2", None])
def test_static_start_is_exact(name):
    branch = DynamicBranch(6, 3, (2, 2), lam_activation=name, bias=True)
    branch.reset_to_static()
    lam, phi = branch(torch.randn(2, 6, 4))
    assert (lam == 1).all() and (phi == 0).all()


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("in_channels", {"in_channels": 0}),
        ("lam_channels", {"lam_channels": -1}),
        ("lam_channels", {"lam_channels": 0, "phi_shape": None}),
        ("phi_shape", {"phi_shape": ()}),
        ("phi_shape", {"phi_shape": (2, 0)}),
        ("reduction", {"reduction": 0}),
        ("squeeze_channels", {"squeeze_channels": 0}),
        ("pool_size", {"pool_size": 2}),
        ("pool_size", {"pool_size": (2, 0)}),
        ("pool_size", {"pool_size": (1, 1, 1, 1)}),
        ("gate", {"gate": "tanh"}),
        ("lam_activation", {"lam_activation": "softmax"}),
        ("dropout", {"dropout": 1.0}),
    ],
)
def test_bad_options(argument, options):
    with pytest.raises(ValueError, match=f"{argument} must"):
        DynamicBranch(**{"in_channels": 6, "lam_channels": 3, "phi_shape": (2, 2), **options})


def test_bad_input():
    branch = DynamicBranch(6, 3, None)
    with pytest.raises(
        ValueError, match=r"input of the branch must have shape \(N, 6, \*spatial\), got \(2, 5, 4\)"
    ):
        branch(torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match="input of the branch must have shape"):
        branch(torch.randn(6))
    with pytest.raises(TypeError, match=r"DynamicBranch: input must be a torch\.Tensor, got ndarray"):
        branch(torch.randn(2, 6).numpy())
    with pytest.raises(ValueError, match="2 spatial dimensions"):
        DynamicBranch(6, 3, None, pool_size=(2, 2))(torch.randn(2, 6, 4))


def test_empty_batch_and_nan():
    branch = DynamicBranch(6, 3, (2, 2), pool_size=(2, 2))
    lam, phi = branch(torch.randn(0, 6, 4, 4))
    assert lam.shape == (0, 3) and phi.shape == (0, 2, 2)
    x = torch.randn(2, 6, 4, 4)
    x[1, 2, 3, 3] = float("nan")
    lam, phi = branch(x)
    assert torch.isfinite(lam[0]).all() and torch.isnan(lam[1]).all() and torch.isnan(phi[1]).all()


def test_pooling_by_slices_agrees():
    """The pooling that deterministic CUDA and half input take, on float32 here."""
    x = torch.randn(2, 3, 7, 5)
    for size in ((2, 2), (3, 4), (1, 2)):
        torch.testing.assert_close(
            _slice_means(x, size, torch.float32), F.adaptive_avg_pool2d(x, size).flatten(1)
        )
