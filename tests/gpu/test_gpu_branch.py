# SPDX-License-Identifier: BSD-3-Clause
"""Pooling and the dynamic branch on the GPU: values, gradients, which path a branch takes, launches."""

from __future__ import annotations

import copy

import pytest
import test_ops_branch as on_cpu
import torch
import torch.nn.functional as F
from on_device import seeded
from torch import Tensor

import dcd_kernels as dcd
from dcd_kernels.nn import DynamicBranch
from dcd_kernels.ops import branch as ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps

IMAGES = [
    # one pixel, planes shorter than a vector or of odd size, one to sixteen tiles, layers of MobileNetV2
    (3, 40, 1, 1),
    (2, 3, 5, 1),
    (2, 24, 7, 7),
    (5, 33, 14, 14),
    (2, 3, 33, 31),
    (8, 960, 7, 7),
    (4, 144, 28, 28),
    (2, 16, 112, 112),
    (2, 5, 300, 300),
]


def images(shape, dtype) -> dict[str, Tensor]:
    """The same values in both layouts and as slices whose planes and channels lie anywhere."""
    x = (torch.randn(shape, generator=seeded(0)) + 0.5).to(dtype)
    n, c, h, w = shape
    channels = torch.zeros(n + 1, c + 3, h, w, dtype=dtype)[1:, 1 : c + 1]
    window = torch.zeros(n, c, h + 1, w + 3, dtype=dtype)[:, :, 1:, 2 : w + 2]
    last = torch.zeros(n, c + 1, h, w, dtype=dtype).to(memory_format=torch.channels_last)[:, 1:]
    made = {"contiguous": x, "channels_last": x.to(memory_format=torch.channels_last)}
    for name, like in (("channels", channels), ("window", window), ("last", last)):
        like.copy_(x)
        made[name] = like
    return made


def moved(x: Tensor, device) -> Tensor:
    """On the device with its strides and its place in its storage."""
    storage = torch.empty(x.untyped_storage().size() // x.element_size(), dtype=x.dtype)
    storage.copy_(torch.as_strided(x, storage.shape, (1,), 0))
    return torch.as_strided(storage.to(device), x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_channel_sums(shape, dtype, device):
    pixels = shape[2] * shape[3]
    for name, x in images(shape, dtype).items():
        sums = ops.channel_sums(moved(x, device))
        assert sums.shape == (shape[0], min(max(1, -(-pixels // 512)), 16), shape[1]), name
        wanted = x.double().sum((2, 3))
        error = (sums.double().sum(1).cpu() - wanted).abs()
        assert (error <= 16 * EPS * x.double().abs().sum((2, 3))).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*IMAGES, (8, 160, 7, 7), (2, 3, 1, 9), (2, 24, 56, 56)], ids=str)
def test_quadrants(shape, dtype, device):
    area = -(-shape[2] // 2) * -(-shape[3] // 2)
    for name, x in images(shape, dtype).items():
        sums = ops.channel_sums(moved(x, device), 2)
        assert sums.shape == ops.channel_sums(x, 2).shape, name
        pooled = [F.adaptive_avg_pool2d(t, 2).flatten(1) * area for t in (x.double(), x.double().abs())]
        error = (sums.double().sum(1).cpu() - pooled[0]).abs()
        assert (error <= 16 * EPS * pooled[1]).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(7, 7), (28, 28), (75, 60)], ids=str)
def test_gradient_of_quadrants(size, dtype, device):
    """Of the partial sums too: on the device and on the CPU the tiles have the same rows."""
    x = torch.randn(2, 16, *size, generator=seeded(0)).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = []
        for place in (device, "cpu"):
            image = x.to(place).to(memory_format=layout).requires_grad_()
            sums = ops.channel_sums(image, 2)
            weights = torch.arange(sums.numel()).view(sums.shape).to(place) / sums.numel()
            found += torch.autograd.grad((sums * weights).sum(), image)
            found.append(sums)
        assert found[0].stride() == x.to(memory_format=layout).stride()
        torch.testing.assert_close(found[0].cpu(), found[2], rtol=0, atol=0)
        torch.testing.assert_close(found[1].cpu(), found[3], rtol=1e-4, atol=1e-4)


def test_more_samples_than_a_grid_has_rows(device):
    x = torch.randn(70_000, 8, 2, 2, generator=seeded(0)).to(device)
    for image in (x, x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(ops.channel_sums(image)[:, 0], x.sum((2, 3)), rtol=1e-5, atol=1e-5)
        assert torch.equal(ops.channel_sums(image, 2)[:, 0], x.flatten(1))  # bins of one pixel


def test_sums_of_nothing(device):
    assert (ops.channel_sums(torch.zeros(2, 3, 0, 4, device=device)) == 0).all()
    assert ops.channel_sums(torch.zeros(0, 3, 4, device=device)).shape == (0, 1, 3)
    assert (ops.channel_sums(torch.zeros(2, 3, 0, 4, device=device), 2) == 0).all()


def on(tensors, device, aligned=True):
    """The operands on the device; not aligned: one element behind where a tensor may begin."""

    def place(t):
        if t is None:
            return None
        memory = torch.zeros(t.numel() + 1, dtype=t.dtype, device=device)[0 if aligned else 1 :]
        return memory[: t.numel()].view(t.shape).copy_(t.detach())

    return [place(t) for t in tensors]


def check(tensors, gate, lam_activation, lam_channels, device, aligned=True):
    scale = 0.25 / tensors[0].shape[2] ** 0.5
    wanted = on_cpu.truth(tensors, gate, lam_activation, lam_channels, scale)
    got = on_cpu.call(on(tensors, device, aligned), gate, lam_activation, lam_channels, scale)
    for mine, right in zip(got, map(torch.from_numpy, wanted), strict=True):
        assert mine.dtype == torch.float32 and mine.is_contiguous()
        if right.numel():
            size = max(1.0, right.abs().max().item())
            torch.testing.assert_close(mine.cpu().double(), right, rtol=0, atol=2e-5 * size)


@pytest.mark.parametrize("split", [False, True], ids=["one FC", "two FCs"])
@pytest.mark.parametrize(("gate", "lam_activation"), on_cpu.EVERY)
def test_formula(gate, lam_activation, split, device):
    torch.manual_seed(0)
    check(on_cpu.operands(gate, split=split), gate, lam_activation, 4, device)


BRANCHES = [
    # N, T, I, hidden, lam_channels, the others. A cluster of blocks has more samples where there are more,
    # and more blocks where there are more weights
    (1, 1, 1, 1, 1, 0),
    (2, 16, 130, 7, 33, 9),
    (1, 1, 576, 40, 160, 169),
    (1, 2, 960, 60, 320, 225),
    (256, 1, 96, 6, 24, 64),
    (600, 7, 32, 12, 20, 16),
    (3000, 1, 33, 5, 0, 21),
    (256, 1, 960, 60, 320, 900),
    (64, 1, 2048, 128, 512, 1024),
    (5, 1, 8192, 1024, 8, 4),
]


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", BRANCHES, ids=str)
def test_sizes(sizes, weights, aligned, device):
    torch.manual_seed(0)
    for gate in ("relu", "se"):
        split = gate == "se" and sizes[4] > 0 and sizes[5] > 0
        tensors = on_cpu.operands(gate, weights=weights, sizes=sizes, bias=aligned, split=split)
        tensors = [t if t is None or t.dim() < 2 else t / t.shape[-1] ** 0.5 for t in tensors]
        tensors[0] = tensors[0] * sizes[2]
        check(tensors, gate, "hardsigmoid2", sizes[4], device, aligned)


def test_too_large_is_refused(cuda):
    for sizes, message in (((1, 1, 8193, 4, 4, 4), "at most 8192"), ((1, 1, 4, 1025, 4, 4), "at most 1024")):
        with pytest.raises(RuntimeError, match=message):
            on_cpu.call(on(on_cpu.operands(sizes=sizes), cuda))
    branch = DynamicBranch(8193, 3, None, squeeze_channels=4).to(cuda)
    image = torch.randn(2, 8193, 2, 2, device=cuda)
    assert not branch.runs_fused(image)[0] and branch(image)[0].shape == (2, 3)


# --- whole branches


def coefficients_and_gradients(branch, *args):
    found = [c for c in branch(*args) if c is not None]
    leaves = [args[-1], *branch.parameters()]
    return [*found, *torch.autograd.grad(sum(c.square().sum() for c in found), leaves)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["relu", "se", "silu", "hardswish", "se, 2x2"])
def test_branch_and_gradients(gate, dtype, layout, device):
    """At most twice the error of torch's own operators, or what rounding to the dtype costs."""
    torch.manual_seed(0)
    gate, *pool_size = gate.split(", ")
    options = {
        "gate": gate,
        "lam_activation": "sigmoid2",
        "bias": True,
        "pool_size": (2, 2) if pool_size else 1,
    }
    branch = DynamicBranch(64, 96, (8, 8), **options, dtype=dtype)
    branch = branch.to(device)
    x = torch.randn(6, 64, 28, 28, generator=seeded(1)).to(device, dtype).contiguous(memory_format=layout)
    x.requires_grad_()
    assert branch.runs_fused(x)[0], branch.runs_fused(x)[1]
    mine = coefficients_and_gradients(branch, x)
    with dcd.use_backend("reference"):
        assert not branch.runs_fused(x)[0]
        plain = coefficients_and_gradients(branch, x)
    wide = copy.deepcopy(branch).double()
    truth = coefficients_and_gradients(wide, x.detach().double().requires_grad_())
    for got, peer, right in zip(mine, plain, truth, strict=True):
        assert got.dtype == peer.dtype and got.shape == peer.shape
        error, allowed = ((t.double() - right).norm() for t in (got, peer))
        assert error <= 2 * allowed + 4 * torch.finfo(got.dtype).eps * right.norm()


def test_second_derivatives(device):
    torch.manual_seed(0)
    branch = DynamicBranch(6, 5, (2, 2), gate="se", lam_activation="sigmoid2").to(device)
    x = torch.randn(3, 6, 4, 4, generator=seeded(0)).to(device).requires_grad_()

    def second():
        lam, phi = branch(x)
        (first,) = torch.autograd.grad(lam.square().sum() + phi.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *branch.parameters()])

    mine = second()
    with dcd.use_backend("reference"):
        plain = second()
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_sums_of_a_producer(device):
    branch = DynamicBranch(32, 24, (4, 4)).to(device)
    x = torch.randn(4, 32, 9, 9, generator=seeded(0)).to(device)
    for got, wanted in zip(branch(x, x.sum((2, 3))), branch(x), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("pool_size", [1, (2, 2)], ids=str)
def test_two_launches_and_the_same_bits(pool_size, layout, cuda):
    options = {"gate": "se", "pool_size": pool_size, "dtype": torch.bfloat16}
    branch = DynamicBranch(96, 24, (4, 4), **options).to(cuda)
    x = torch.randn(8, 96, 56, 56, generator=seeded(0)).to(cuda, torch.bfloat16)
    x = x.contiguous(memory_format=layout)
    torch.utils.deterministic.fill_uninitialized_memory = False  # fills are launches too
    with torch.no_grad():
        first = branch(x)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            again = branch(x)
            torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if "kernel" in event.name]
    assert len(launched) == 2 and "branch_kernel" in launched[1], launched
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_compiled_whole(device):
    torch._dynamo.reset()
    branch = DynamicBranch(32, 24, (4, 4), gate="se").to(device)
    x = torch.randn(4, 32, 9, 9, generator=seeded(0)).to(device).requires_grad_()
    compiled = torch.compile(branch, fullgraph=True)
    for got, wanted in zip(
        coefficients_and_gradients(compiled, x), coefficients_and_gradients(branch, x), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_opcheck(device):
    torch.manual_seed(0)
    tensors = [
        None if t is None else t.detach().to(device).requires_grad_()
        for t in on_cpu.operands("se", split=True)
    ]
    codes = ops.GATES.index("se"), ops.LAM_ACTIVATIONS.index("sigmoid2")
    torch.library.opcheck(torch.ops.dcd_kernels.branch.default, (tensors[0], 0.5, *tensors[1:], 4, *codes))
    image = torch.randn(2, 5, 30, 30, generator=seeded(0)).to(device).requires_grad_()
    torch.library.opcheck(torch.ops.dcd_kernels.channel_sums.default, (image, 1))
    torch.library.opcheck(torch.ops.dcd_kernels.channel_sums.default, (image, 2))
