# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of the compiled ops: values, only what is asked for, any strides, higher orders, torch.func."""

import itertools
from dataclasses import replace

import operands as given
import pytest
import torch
from cases import assert_close_to_truth, assert_same, in_layout
from operands import (
    FACTORS,
    HALF,
    ISAS,
    LAYOUTS,
    Case,
    call,
    in_float64,
    label,
    operands,
    plain,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dcd_kernels.arguments import ACTIVATIONS


def depthwise(batch, channels, latent, size, activation=None, *, out=None, stride=1, **options):
    rank = len(size)
    return Case(
        "depthwise",
        batch,
        channels,
        out or channels,
        latent,
        size,
        activation,
        kernel=(3,) * rank,
        stride=(stride,) * rank,
        padding=(1,) * rank,
        dilation=(1,) * rank,
        **options,
    )


CASES = [
    Case("pointwise", 1, 3, 1, 1, (1,), bias="shared"),
    Case("pointwise", 3, 3, 20, 11, (7, 7), "silu", bias="sample", residual=True),
    Case("pointwise", 2, 17, 33, 3, (5,), "hardswish", bias="shared", residual=True),
    Case("pointwise", 2, 19, 20, 4, (7, 7), "relu", lam=False, bias="sample"),
    Case("pointwise", 2, 19, 20, 4, (2, 3, 4), "relu6", dynamic=False, bias="shared"),
    Case("pointwise", 2, 12, 20, 3, (3, 5), "relu6", blocks=4, bias="shared"),
    Case("pointwise", 2, 40, 72, 4, (16, 15), residual=True),
    Case("pointwise", 3, 130, 50, 8, (7, 7), "silu", bias="shared"),
    Case("apply", 1, 3, 1, 1, (1,), bias="shared"),
    Case("apply", 3, 3, 20, 11, (7, 7), "silu", bias="sample", residual=True),
    Case("apply", 2, 17, 33, 3, (5,), "hardswish", bias="shared", lam=False, residual=True),
    Case("apply", 2, 19, 20, 4, (7, 7), "relu", dynamic=False, bias="sample", residual=True),
    Case("apply", 2, 19, 20, 4, (7, 7), "relu", dynamic=False, lam=False, bias="sample"),
    Case("apply", 2, 12, 20, 3, (3, 5), "relu6", blocks=4, bias="shared"),
    Case("apply", 2, 12, 33, 3, (5, 3), "relu", given_latent=True, bias="shared"),
    Case("apply", 2, 40, 72, 4, (16, 15), residual=True),
    depthwise(1, 1, 1, (1,), bias="shared"),
    depthwise(3, 3, 4, (7, 7), "silu", bias="sample", residual=True),
    depthwise(2, 20, 11, (5, 1), "hardswish", bias="shared"),
    depthwise(2, 7, 13, (3, 5, 4), "relu", lam=False),
    depthwise(2, 9, 4, (7, 8), "relu6", dynamic=False, stride=2, bias="shared"),
    depthwise(2, 9, 4, (8, 7), "silu", out=27, stride=2, bias="sample", residual=True),
    depthwise(2, 33, 4, (16, 15), residual=True),
]
# Every term and every argument in few elements: gradcheck takes two calls an element.
TINY = [
    Case("pointwise", 2, 3, 4, 2, (2, 2), bias="sample", residual=True),
    Case("pointwise", 2, 4, 2, 1, (3,), blocks=2, bias="shared"),
    Case("pointwise", 2, 2, 3, 2, (2,), lam=False),
    Case("pointwise", 2, 2, 3, 2, (2,), dynamic=False),
    Case("apply", 2, 3, 4, 2, (2, 2), bias="sample", residual=True),
    Case("apply", 2, 4, 2, 1, (3,), blocks=2, bias="shared"),
    Case("apply", 2, 3, 2, 2, (2,), given_latent=True, lam=False),
    Case("apply", 2, 3, 2, 2, (2,), dynamic=False),
    Case("apply", 2, 3, 2, 2, (2,), dynamic=False, lam=False, bias="sample"),
    depthwise(2, 2, 2, (3, 2), bias="sample", residual=True),
    depthwise(2, 2, 2, (4,), out=4, stride=2, lam=False, bias="shared"),
    depthwise(1, 2, 2, (3,), dynamic=False),
]
WHOLE = [case for case in TINY if case.residual]


def both_ways(case):
    """The entry point of ops, and the same op straight from the dispatcher."""
    direct = getattr(torch.ops.dcd_kernels, case.op)
    code = ACTIVATIONS[case.activation]
    return (
        lambda *tensors: call(case, tensors),
        lambda *tensors: direct(*tensors, *case.geometry, code),
    )


def with_grad(case, tensors):
    """Leaves for which gradients can be asked: apply without a residual reads its input nowhere."""
    return [
        None if t is None else t.detach().requires_grad_(case.dynamic or case.op != "apply" or i != 1)
        for i, t in enumerate(tensors)
    ]


def grads_of(function, tensors, grad):
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return torch.autograd.grad(function(tensors), wanted, grad)


KINKS = {"relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}


def away_from_kinks(case, tensors, distance):
    """Where the slope of the activation does not hang on how the pre-activation was rounded."""
    before = given.truth(replace(case, activation=None), tensors)
    near = torch.zeros_like(before, dtype=torch.bool)
    for kink in KINKS.get(case.activation, ()):
        near |= (before - kink).abs() < distance
    return ~near


def check_values(case, dtype, layout, isa, *, wide=False, device="cpu", eps=None):
    tensors = with_grad(case, operands(case, dtype, layout, wide=wide, device=device))
    names = [key for key, t in zip(case.names, tensors, strict=True) if t is not None and t.requires_grad]
    grad = torch.randn(case.batch, case.out_channels, *case.out_size, dtype=dtype).to(device)
    grad = in_layout(grad.abs() if case.positive else grad, layout)
    grad = grad * away_from_kinks(case, tensors, 16 * (eps or torch.finfo(dtype).eps)).to(device, dtype)
    with given.instruction_set(isa):
        got = grads_of(lambda t: call(case, t), tensors, grad)
    same = grads_of(lambda t: plain(case, t), tensors, grad)
    high = in_float64(tensors)
    truth = grads_of(lambda t: plain(case, t), high, grad.double())
    for key, mine, theirs, right in zip(names, got, same, truth, strict=True):
        assert_close_to_truth(mine, theirs, right, f"d {key}", eps)
    return dict(zip(names, got, strict=True)), dict(zip(case.names, tensors, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_values(case, layout, isa):
    found, tensors = check_values(case, torch.float32, layout, isa)
    for key, gradient in found.items():
        if key not in ("input", "static"):
            continue
        expected = given.is_channels_last(tensors[key])
        if key == "input" or case.lam:
            assert given.is_channels_last(gradient) == (expected and not gradient.is_contiguous())


@pytest.mark.parametrize("wide", (False, True), ids=("half", "wide"))
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_values_half(case, dtype, wide):
    check_values(case, dtype, "channels_last", ISAS[-1], wide=wide)


@pytest.mark.full
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", (1, 2, 7, 8, 15, 16, 17, 48, 49, 97, 196))
def test_values_at_every_tile_edge(pixels, layout, isa):
    for op in ("pointwise", "apply"):
        for channels, latent in itertools.product(((1, 1), (8, 9), (31, 16), (33, 65)), (1, 4, 8, 17)):
            case = Case(op, 2, *channels, latent, (pixels,), "relu", bias="shared", residual=True)
            check_values(case, torch.float32, layout, isa)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_gradcheck_of_each_activation(case, activation):
    case = replace(case, activation=activation)
    for function in both_ways(case):
        assert torch.autograd.gradcheck(function, with_grad(case, operands(case, torch.float64)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", TINY, ids=label)
def test_gradcheck(case, layout):
    tensors = with_grad(case, operands(case, torch.float64, layout))
    assert torch.autograd.gradcheck(both_ways(case)[0], tensors)


@pytest.mark.parametrize("activation", (None, "silu"))
@pytest.mark.parametrize("case", TINY, ids=label)
def test_gradgradcheck(case, activation):
    case = replace(case, activation=activation)
    tensors = with_grad(case, operands(case, torch.float64))
    assert torch.autograd.gradgradcheck(both_ways(case)[0], tensors)


@pytest.mark.full
@pytest.mark.parametrize("activation", ("relu", "relu6", "hardswish"))
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_gradgradcheck_of_each_activation(case, activation):
    case = replace(case, activation=activation)
    for function in both_ways(case):
        assert torch.autograd.gradgradcheck(function, with_grad(case, operands(case, torch.float64)))


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_third_order(case):
    case = replace(case, activation="silu")
    found = []
    for function in (call, plain):
        tensors = with_grad(case, operands(case, torch.float64))
        order = [function(case, tensors).sin().sum()]
        for _ in range(3):
            order = torch.autograd.grad(
                sum((t.square() * t).sum() for t in order), tensors, create_graph=True
            )
        found.append(order)
    for mine, right in zip(*found, strict=True):
        assert_same(mine, right, 1e-9)


class Calls(TorchDispatchMode):
    """Records (name, last argument) of every op of ours."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dcd_kernels":
            self.seen.append((func._opname, args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_only_what_is_asked_for(case):
    everything = with_grad(case, operands(case))
    full = torch.autograd.grad(call(case, everything).sin().sum(), everything)
    for wanted in itertools.product((False, True), repeat=8):
        if not any(wanted):
            continue
        tensors = [t.detach().requires_grad_(w) for t, w in zip(everything, wanted, strict=True)]
        loss = call(case, tensors).sin().sum()
        with Calls() as calls:
            found = torch.autograd.grad(loss, [t for t in tensors if t.requires_grad])
        needs = sum(1 << i for i in range(6) if wanted[i])
        assert calls.seen == ([(case.op + "_backward", needs)] if needs else [])
        for mine, right in zip(found, (f for f, w in zip(full, wanted, strict=True) if w), strict=True):
            torch.testing.assert_close(mine, right)


def test_an_input_that_is_not_read_is_not_asked_for():
    case = Case("apply", 2, 3, 4, 2, (2, 2), dynamic=False)
    tensors = operands(case)
    tensors[0].requires_grad_()  # which is tensors[1], too
    with Calls() as calls:
        torch.autograd.grad(call(case, tensors).sum(), tensors[0])
    assert calls.seen[1:] == [("apply_backward", 1)]


@pytest.mark.parametrize("case", [case for case in TINY if case.lam], ids=label)
def test_each_subset_of_the_returns(case):
    """The backward op itself: what is asked for does not depend on what else is, the rest is empty."""
    op = getattr(torch.ops.dcd_kernels, case.op + "_backward")
    factors = operands(case)[:6]
    grad = torch.randn(case.batch, case.out_channels, *case.out_size)
    there = sum(1 << i for i, factor in enumerate(factors) if factor is not None)
    if case.op == "apply" and not case.dynamic:
        there &= ~0b10  # the input is not read
    full = op(grad, *factors, *case.geometry, there)
    for needs in range(64):
        if needs & ~there:
            continue
        for index, (mine, right) in enumerate(
            zip(op(grad, *factors, *case.geometry, needs), full, strict=True)
        ):
            if needs >> index & 1:
                torch.testing.assert_close(mine, right)
            else:
                assert mine.shape == (0,)


def strided(grad, kind):
    if kind == "expanded":
        return grad.new_tensor(0.75).expand(grad.shape)
    if kind == "expanded pixels":
        return grad[(slice(None), slice(None), *[slice(0, 1)] * (grad.dim() - 2))].expand(grad.shape)
    if kind == "expanded channels":
        return grad[:, :1].expand(grad.shape)
    if kind == "transposed":
        return grad.transpose(-1, -2).contiguous().transpose(-1, -2)
    return in_layout(grad, kind)


@pytest.mark.parametrize("activation", (None, "relu"))
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", [c for c in CASES if len(c.size) == 2 and c.residual], ids=label)
def test_any_strides_of_the_gradient(case, layout, activation):
    case = replace(case, activation=activation)
    tensors = with_grad(case, operands(case, layout=layout))
    output = call(case, tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    for kind in ("expanded", "expanded pixels", "expanded channels", "transposed", *LAYOUTS):
        grad = strided(torch.randn(output.shape), kind)
        mine = torch.autograd.grad(output, wanted, grad, retain_graph=True)
        dense = in_layout(grad, layout)
        for got, right in zip(
            mine, torch.autograd.grad(output, wanted, dense, retain_graph=True), strict=True
        ):
            assert_same(got.double(), right.double(), 1e-5, kind)


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_dtypes_of_the_gradients(case):
    for activation in ACTIVATIONS:
        tensors = with_grad(case, operands(case, torch.bfloat16, wide=True))
        output = call(replace(case, activation=activation), tensors)
        for tensor, gradient in zip(tensors, torch.autograd.grad(output.sum(), tensors), strict=True):
            assert gradient.dtype == tensor.dtype


grads_without_graph = (torch.no_grad, torch.inference_mode)


@pytest.mark.parametrize("context", grads_without_graph)
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_nothing_is_recorded_without_grad_mode(case, context):
    tensors = with_grad(case, operands(case))
    with context():
        output = call(case, tensors)
    assert not output.requires_grad
    assert torch.equal(output, call(case, [t.detach() for t in tensors]))
    assert call(case, tensors).requires_grad


def test_a_change_in_place_after_forward_is_noticed():
    case = WHOLE[0]
    tensors = with_grad(case, operands(case))
    output = call(case, tensors)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        output.sum().backward()


def test_apply_keeps_no_image_that_it_does_not_read():
    case = Case("apply", 2, 3, 4, 2, (2, 2), "relu", dynamic=False, lam=False, bias="shared")
    tensors = with_grad(case, operands(case))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = call(case, tensors)
    assert [t.data_ptr() for t in kept] == [output.data_ptr()]


@pytest.mark.parametrize("activation", ("relu", "hardswish"))
@pytest.mark.parametrize("case", TINY, ids=label)
def test_backward_inside_of_autocast(case, activation):
    """The gradient has the precision of the forward pass, wherever backward() is called."""
    case = replace(case, activation=activation)
    tensors = with_grad(case, operands(case))
    output = call(case, tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    right = torch.autograd.grad(output, wanted, torch.ones_like(output), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = torch.autograd.grad(output, wanted, torch.ones_like(output))
    for got, expected in zip(mine, right, strict=True):
        assert torch.equal(got, expected)


# --- torch.func


def loss_of(function, case):
    """<y, y> as a function of the tensors that are there."""
    absent = [shape is None for shape in case.shapes().values()]

    def loss(*tensors):
        it = iter(tensors)
        return function(case, [None if missing else next(it) for missing in absent]).square().sum()

    return loss


@pytest.mark.parametrize("case", TINY, ids=label)
def test_func_grad(case):
    case = replace(case, activation="silu")
    tensors = [t for t in operands(case, torch.float64) if t is not None]
    places = tuple(i for i in range(len(tensors)) if case.dynamic or case.op != "apply" or i != 1)
    mine, right = (torch.func.grad(loss_of(f, case), argnums=places)(*tensors) for f in (call, plain))
    for got, expected in zip(mine, right, strict=True):
        assert_same(got, expected, 1e-11)


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_func_grad_of_grad(case):
    case = replace(case, activation="silu")
    tensors = operands(case, torch.float64)
    found = []
    for function in (call, plain):
        first = torch.func.grad(loss_of(function, case))
        second = torch.func.grad(lambda *t, first=first: first(*t).square().sum(), argnums=(0, 1, 2, 5))
        found.append(second(*tensors))
    for got, expected in zip(*found, strict=True):
        assert_same(got, expected, 1e-11)


@pytest.mark.parametrize("case", WHOLE, ids=label)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_func_vmap_of_grad(case):
    """Gradients per example, torch's way: vmap over grad. There is no batching rule, torch loops."""
    tensors = operands(case, torch.float64)
    many = [torch.stack([t, 2 * t, -t]) for t in tensors]
    function = loss_of(call, case)
    mine = torch.func.vmap(torch.func.grad(function))(*many)
    for i in range(3):
        assert_same(mine[i], torch.func.grad(function)(*(t[i] for t in many)), 1e-11)


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_forward_mode_raises(case):
    tensors = operands(case, torch.float64)
    function = loss_of(call, case)
    for lazily in (
        lambda: torch.func.jvp(function, tuple(tensors), tuple(tensors)),
        lambda: torch.func.jacfwd(function)(*tensors),
    ):
        with pytest.raises(NotImplementedError, match=f"dcd_kernels::{case.op}.*forward-mode"):
            lazily()
    with torch.autograd.forward_ad.dual_level():
        assert call(case, tensors).shape  # no tangent, no objection
        tensors[0] = torch.autograd.forward_ad.make_dual(tensors[0], tensors[0])
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(case, tensors)


def test_every_factor_is_tested():
    for op, names in FACTORS.items():
        assert any(case.op == op and all(case.shapes()[name] for name in names) for case in WHOLE)


# --- torch's other ways to run a backward pass


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_checkpoint_and_batched_gradients(case):
    case = replace(case, activation="hardswish")
    tensors = with_grad(case, operands(case))
    output = call(case, tensors)
    grads = torch.randn(2, *output.shape)
    one = torch.autograd.grad(output, tensors, grads[0], retain_graph=True)
    again = checkpoint(lambda *t: call(case, t), *tensors, use_reentrant=False)
    batched = torch.autograd.grad(output, tensors, grads, is_grads_batched=True)
    for first, second, third in zip(one, torch.autograd.grad(again, tensors, grads[0]), batched, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, third[0])
