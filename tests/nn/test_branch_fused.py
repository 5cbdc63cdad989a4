# SPDX-License-Identifier: BSD-3-Clause
"""The branch as two ops against the branch in torch's operators, both on the CPU, and who chooses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dcd_kernels import extension, use_backend
from dcd_kernels.backends import branch as kernels
from dcd_kernels.backends import cuda
from dcd_kernels.nn import DCDConv2d, DynamicBranch
from dcd_kernels.nn.branch import GATES, LAM_ACTIVATIONS

pytestmark = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)

EVERY_GATE = [*GATES, "se"]


@pytest.fixture
def both(monkeypatch):
    """both(f) calls f with the ops and with torch's operators."""
    calls = []

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "can_run", lambda *_: calls.append(1) or (True, ""))
            fused = function()
        assert calls, "the ops were not asked for"
        with use_backend("reference"):
            return fused, function()

    return run


def strong(branch):
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.normal_()
    return branch


def coefficients(branch, *args):
    return [c for c in branch(*args) if c is not None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lam_activation", LAM_ACTIVATIONS)
@pytest.mark.parametrize("gate", EVERY_GATE)
def test_same_values_and_gradients(both, gate, lam_activation, bias):
    torch.manual_seed(0)
    options = {"gate": gate, "lam_activation": lam_activation, "bias": bias, "squeeze_channels": 5}
    branch = strong(DynamicBranch(6, 7, (3, 2, 2), **options))
    x = torch.randn(4, 6, 30, 30, requires_grad=True)
    leaves = [x, *branch.parameters()]

    def run():
        found = coefficients(branch, x)
        loss = sum(c.square().sum() for c in found)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() * 1e3, leaves, allow_unused=True)
        return [*found, *first, *second]

    for a, b in zip(*both(run), strict=True):
        assert (a is None or (a == 0).all()) if b is None else a.shape == b.shape
        if b is not None:
            scale = b.detach().abs().max().item()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale + 1e-7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(7, 7), (8, 6), (1, 1), (1, 9), (40, 33)], ids=str)
def test_two_by_two_pooling(both, size, layout):
    """Values, gradients and second derivatives beside torch's adaptive pooling."""
    torch.manual_seed(0)
    options = {"gate": "se", "lam_activation": "sigmoid2", "squeeze_channels": 5, "pool_size": (2, 2)}
    branch = strong(DynamicBranch(6, 7, (2, 2), **options))
    x = torch.randn(4, 6, *size).to(memory_format=layout).requires_grad_()
    leaves = [x, *branch.parameters()]

    def run():
        found = coefficients(branch, x)
        first = torch.autograd.grad(sum(c.square().sum() for c in found), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), leaves)
        return [*found, *first, *second]

    for a, b in zip(*both(run), strict=True):
        scale = b.detach().abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale + 1e-7)


@pytest.mark.parametrize("options", [{"lam_channels": 0}, {"phi_shape": None}], ids=str)
def test_absent_parts(both, options):
    branch = DynamicBranch(6, **{"lam_channels": 3, "phi_shape": (2, 2), **options})
    x = torch.randn(2, 6, 4, 4)
    for a, b in zip(*both(lambda: branch(x)), strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pool_size", [1, (2, 2)])
def test_accuracy(both, pool_size, dtype, layout):
    """Against float64 of the same values: at most twice the error of torch's operators."""
    torch.manual_seed(0)
    options = {"gate": "se", "lam_activation": "sigmoid2", "pool_size": pool_size}
    branch = strong(DynamicBranch(40, 30, (6, 6), **options, dtype=dtype))
    x = torch.randn(3, 40, 14, 15).to(dtype).to(memory_format=layout)
    truth = coefficients(copy.deepcopy(branch).double(), x.double())
    for fused, plain, right in zip(*both(lambda: coefficients(branch, x)), truth, strict=True):
        assert fused.dtype == plain.dtype == torch.float32
        error, allowed = ((c.double() - right).norm() for c in (fused, plain))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * right.norm()


def test_autocast(both):
    branch = strong(DynamicBranch(6, 3, (2, 2)))
    x = torch.randn(2, 6, 5, 5)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return coefficients(branch, x)

    for a, b in zip(*both(run), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_the_producer(both, dtype, tiled):
    """The same coefficients, and gradients that go to the sums instead of the input."""
    torch.manual_seed(0)
    branch = strong(DynamicBranch(6, 3, (2, 2), dtype=dtype))
    x = torch.randn(2, 6, 5, 4).to(dtype)
    sums = x.float().sum(2) if tiled else x.float().sum((2, 3))
    sums = (sums.mT.contiguous() if tiled else sums).requires_grad_()
    poisoned = torch.full_like(x, float("nan"))  # the input itself is not read

    def run():
        found = coefficients(branch, poisoned, sums)
        return [*found, *torch.autograd.grad(sum(c.sum() for c in found), sums)]

    fused, plain = both(run)
    for a, b, right in zip(fused, plain, coefficients(branch, x), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused[-1], plain[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sums", "error", "message"),
    [
        (torch.zeros(2, 5), ValueError, r"sums must have shape \(N, C\) or \(N, T, C\)"),
        (torch.zeros(3, 6), ValueError, "sums must have shape"),
        (torch.zeros(2, 1, 1, 6), ValueError, "sums must have shape"),
        (torch.zeros(2, 6).half(), TypeError, "sums must be torch.float32"),
    ],
)
def test_bad_sums(sums, error, message):
    with pytest.raises(error, match=message):
        DynamicBranch(6, 3, None)(torch.zeros(2, 6, 4), sums)


def test_sums_where_they_cannot_be_used():
    with pytest.raises(ValueError, match="sums must not be given"):
        DynamicBranch(6, 3, None, pool_size=(2, 2))(torch.zeros(2, 6, 4, 4), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="sums must not be given"):
        DynamicBranch(6, 3, None)(torch.zeros(2, 6), torch.zeros(2, 6))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("pool_size", [1, 2])
def test_layer_compiles_whole(monkeypatch, pool_size, trains):
    """A layer whose branch is the ops, in one graph that has both of them."""
    monkeypatch.setattr(kernels, "can_run", lambda *_: (True, ""))
    torch.manual_seed(0)
    layer = DCDConv2d(8, 12, 1, gate="se", pool_size=pool_size)
    x = torch.randn(3, 8, 6, 5, requires_grad=trains)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    got = torch.compile(layer, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(got, layer(x))
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert len(graphs) == 1 and {"dcd_kernels.channel_sums.default", "dcd_kernels.branch.default"} <= targets
    if trains:
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, layer(x))))


# --- who chooses


class OnCuda:
    """What the predicate looks at, without a GPU."""

    def __init__(self, shape, dtype=torch.bfloat16, index=0):
        self.shape, self.dtype = torch.Size(shape), dtype
        self.device, self.is_cuda, self.is_cpu = torch.device("cuda", index), True, False

    def dim(self):
        return len(self.shape)

    def numel(self):
        return self.shape.numel()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(extension, "CUDA_LOADED", True)
    monkeypatch.setattr(cuda, "capability", lambda index: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("image", "weight", "reason"),
    [
        (OnCuda((2, 6, 4, 4)), OnCuda((5, 6)), None),
        (OnCuda((2, 6, 4)), OnCuda((5, 6), torch.float32), None),
        (OnCuda((2, 6, 4, 4), torch.float64), OnCuda((5, 6)), "input is torch.float64"),
        (OnCuda((2, 6, 4, 4)), OnCuda((5, 6), torch.float64), "the branch's weight is torch.float64"),
        (OnCuda((2, 6, 4, 4)), OnCuda((5, 6), index=1), "the branch on cuda:1"),
        (OnCuda((2, 6)), OnCuda((5, 6)), None),
        (OnCuda((2, 6, 0, 4)), OnCuda((5, 6)), "size 0"),
        (OnCuda((2, 8193, 4)), OnCuda((5, 8193)), "these kernels hold 8192"),
        (OnCuda((2, 6, 4)), OnCuda((1025, 6)), "these kernels hold 8192 and 1024"),
    ],
)
def test_reasons(image, weight, reason):
    able, said = kernels.can_run(image, weight, weight)
    assert able == (reason is None)
    assert reason is None or reason in said


@pytest.mark.usefixtures("hopper")
def test_reasons_of_the_machine(monkeypatch):
    image, weight = OnCuda((2, 6, 4)), OnCuda((5, 6))
    assert "different dtypes" in kernels.can_run(image, weight, OnCuda((5, 6), torch.float32))[1]
    for name, able in (("reference", False), ("triton", False), ("cuda", True)):
        with use_backend(name):
            assert kernels.can_run(image, weight)[0] == able
    monkeypatch.setattr(cuda, "capability", lambda index: (7, 5))
    assert kernels.can_run(image, weight) == (False, "compute capability 7.5, these kernels need 8.0")
    monkeypatch.setattr(extension, "CUDA_LOADED", False)
    monkeypatch.setattr(extension, "CUDA_REASON", "torch is not a CUDA build")
    assert kernels.can_run(image, weight) == (False, "torch is not a CUDA build")


def test_reasons_of_the_branch(monkeypatch):
    monkeypatch.setattr(kernels, "can_run", lambda *_: (True, ""))
    x = torch.zeros(2, 6, 4, 4)
    assert DynamicBranch(6, 3, None).runs_fused(x)[0]
    assert DynamicBranch(6, 3, None, pool_size=(2, 2)).runs_fused(x)[0]
    for other in ((2,), (2, 1), (3, 3), (2, 2, 2)):
        assert "pool_size" in DynamicBranch(6, 3, None, pool_size=other).runs_fused(x)[1]
    dropping = DynamicBranch(6, 3, None, dropout=0.5)
    assert "dropout" in dropping.runs_fused(x)[1]
    assert dropping.eval().runs_fused(x)[0]
    altered = DynamicBranch(6, 3, None, gate="se")
    for layer in (altered.squeeze, altered.gate, altered.expand):
        for hook in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
            handle = getattr(layer, f"register_{hook}_hook")(lambda *_: None)
            assert "hooks" in altered.runs_fused(x)[1]
            handle.remove()
            assert altered.runs_fused(x)[0]
        layer.forward = lambda input: input
        assert "forward of its own" in altered.runs_fused(x)[1]
        del layer.forward
    altered.expand = nn.Sequential(altered.expand)
    assert "another class" in altered.runs_fused(x)[1]


def test_parameters_that_are_not_registered():
    """As wrappers leave them that shard a model or make replicas of it: plain attributes."""
    torch.manual_seed(0)
    branch = strong(DynamicBranch(6, 3, (2, 2), gate="se", bias=True))
    x = torch.randn(2, 6, 4, 4)
    wanted = coefficients(branch, x)
    for layer in (branch.squeeze, branch.gate, branch.expand):
        for name in ("weight", "bias"):
            value = getattr(layer, name).detach()
            delattr(layer, name)
            setattr(layer, name, value)
    assert branch.runs_fused(x)[0]
    for got, right in zip(coefficients(branch, x), wanted, strict=True):
        assert torch.equal(got, right)


def test_reasons_on_the_cpu():
    branch, x = DynamicBranch(6, 3, (2, 2)), torch.zeros(2, 6, 4, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert branch.runs_fused(x.to(dtype)) == (True, "a CPU tensor of a supported dtype")
    assert "input is torch.int32" in branch.runs_fused(x.int())[1]
    assert "size 0" in branch.runs_fused(x[..., :0])[1]
    assert branch.runs_fused(x[:0])[0]
    assert "input is on meta, these kernels run on the CPU and on CUDA" in branch.runs_fused(x.to("meta"))[1]
    assert "input is on cpu, the branch on meta" in branch.to("meta").runs_fused(x)[1]
    branch = DynamicBranch(6, 3, (2, 2))
    for name, able in (("reference", False), ("triton", False), ("cuda", False), ("cpu", True)):
        with use_backend(name):
            assert branch.runs_fused(x)[0] == able
    with use_backend("reference"):
        assert branch.runs_fused(x)[1] == "backend 'reference' was asked for"


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "LOADED", False)
    monkeypatch.setattr(extension, "REASON", "it was not built")
    branch, x = DynamicBranch(6, 3, (2, 2)), torch.zeros(2, 6, 4, 4)
    assert branch.runs_fused(x) == (False, "it was not built") and branch(x)[0].shape == (2, 3)
