# SPDX-License-Identifier: BSD-3-Clause
"""The op branch, alone and behind channel_sums: values, gradients, tracing, bad input. On the CPU."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from dcd_kernels import extension

if not extension.LOADED:
    pytest.skip(extension.REASON, allow_module_level=True)

from dcd_kernels.ops import branch as ops

GATES = [name for name in ops.GATES if name != "se"]
EVERY = [(gate, lam) for gate in ops.GATES for lam in ops.LAM_ACTIVATIONS]
CLIP = {
    None: lambda z: 1 + z,
    "hardsigmoid2": lambda z: np.clip(z + 3, 0, 6) / 3,
    "sigmoid2": lambda z: 2 / (1 + np.exp(-z)),
    "hardsigmoid": lambda z: np.clip(z + 3, 0, 6) / 6,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
}
GATE = {
    None: lambda h: h,
    "relu": lambda h: np.maximum(h, 0),
    "relu6": lambda h: np.clip(h, 0, 6),
    "silu": lambda h: h / (1 + np.exp(-h)),
    "hardswish": lambda h: h * np.clip(h + 3, 0, 6) / 6,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(
    gate="relu", *, dtype=torch.float32, weights=None, sizes=(3, 2, 7, 5, 4, 6), bias=True, split=False
):
    """Leaves: sums and the eight parameters in the order of the op, so large that all kinks are seen.

    split: λ and Φ have FCs of their own.
    """
    n, tiles, inputs, hidden, lam, others = sizes
    weights = weights or dtype

    def parameter(*shape):
        return (2 * torch.randn(shape)).to(weights).requires_grad_()

    def vector(size):
        return parameter(size) if bias else None

    gated = gate == "se"
    return [
        torch.randn(n, tiles, inputs).to(dtype).requires_grad_(),
        parameter(hidden, inputs),
        vector(hidden),
        parameter(hidden, hidden) if gated else None,
        vector(hidden) if gated else None,
        parameter(lam + (0 if split else others), hidden),
        vector(lam + (0 if split else others)),
        parameter(others, hidden) if split else None,
        vector(others) if split else None,
    ]


def leaves(tensors):
    return [t for t in tensors if t is not None]


def call(tensors, gate="relu", lam_activation="hardsigmoid2", lam_channels=4, scale=0.25, op=ops.branch):
    sums, *parameters = tensors
    codes = ops.GATES.index(gate), ops.LAM_ACTIVATIONS.index(lam_activation)
    return op(sums, scale, *parameters, lam_channels, *codes)


def truth(tensors, gate, lam_activation, lam_channels=4, scale=0.25):
    arrays = [None if t is None else t.detach().double().numpy() for t in tensors]
    sums, w1, b1, wg, bg, w2, b2, w3, b3 = arrays

    def affine(x, w, b):
        return x @ w.T + (0 if b is None else b)

    hidden = affine(sums.sum(1) * scale, w1, b1)
    logit = affine(hidden, wg, bg) if gate == "se" else None
    hidden = GATE[gate](hidden) if logit is None else hidden * np.clip(logit + 3, 0, 6) / 3
    logits = affine(hidden, w2, b2)
    if w3 is not None:
        return CLIP[lam_activation](logits), affine(hidden, w3, b3)
    return CLIP[lam_activation](logits[:, :lam_channels]), logits[:, lam_channels:]


# --- branch


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("gate", "lam_activation"), EVERY)
def test_formula(gate, lam_activation, split):
    tensors = operands(gate, split=split)
    wanted = truth(tensors, gate, lam_activation)
    for got, right in zip(call(tensors, gate, lam_activation), wanted, strict=True):
        assert got.dtype == torch.float32 and got.is_contiguous()
        torch.testing.assert_close(got.double(), torch.from_numpy(right), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types(weights):
    tensors = operands("se", weights=weights)
    for got, right in zip(call(tensors, "se"), truth(tensors, "se", "hardsigmoid2"), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), torch.from_numpy(right), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(sum(t.sum() for t in call(tensors, "se")), leaves(tensors))
    assert [g.dtype for g in gradients] == [torch.float32] + [weights] * 6


@pytest.mark.parametrize(
    "sizes", [(3, 1, 7, 5, 0, 6), (3, 2, 7, 5, 4, 0), (0, 2, 7, 5, 4, 6), (1, 1, 1, 1, 1, 0)]
)
def test_absent_parts(sizes):
    lam_channels = sizes[4]
    tensors = operands(sizes=sizes, bias=False)
    lam, phi = call(tensors, lam_channels=lam_channels)
    wanted = truth(tensors, "relu", "hardsigmoid2", lam_channels)
    for got, right in zip((lam, phi), wanted, strict=True):
        torch.testing.assert_close(got.double(), torch.from_numpy(right), rtol=1e-5, atol=1e-5)
    (lam.sum() + phi.sum()).backward()
    assert all(t.grad is not None for t in tensors if t is not None)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("gate", "lam_activation"), EVERY)
def test_gradients(gate, lam_activation, split):
    tensors = operands(gate, dtype=torch.float64, split=split)

    def function(*given):
        return call(given, gate, lam_activation)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("part", [0, 1])
def test_gradient_of_one_output(part):
    """The other one's gradient is absent, not zero."""
    tensors = operands("se", dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: call(given, "se", "sigmoid2")[part], tensors)


def test_torch_func():
    tensors = operands("se", dtype=torch.float64)

    def loss(*given):
        lam, phi = call((*given[:2], *tensors[2:]), "se")
        return lam.square().sum() + phi.sin().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(*tensors[:2])
    wanted = torch.autograd.grad(loss(*tensors[:2]), tensors[:2])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    twice = torch.func.grad(lambda s: torch.func.grad(loss)(s, *tensors[1:2]).square().sum())(tensors[0])
    assert torch.isfinite(twice).all()


def test_autocast_changes_nothing():
    tensors = operands("se")
    image = torch.randn(2, 3, 5, 5, requires_grad=True)
    wanted = [*call(tensors, "se"), ops.channel_sums(image)]
    outer = torch.autograd.grad(sum(t.sum() for t in wanted), [*leaves(tensors), image])
    with torch.autocast("cpu", torch.bfloat16):
        got = [*call(tensors, "se"), ops.channel_sums(image)]
        inner = torch.autograd.grad(sum(t.sum() for t in got), [*leaves(tensors), image])
    for a, b in zip([*got, *inner], [*wanted, *outer], strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


# --- tracing


@pytest.mark.parametrize("gate", ["relu", "se"])
def test_opcheck(gate):
    for dtype in (torch.float32, torch.float64):
        call(operands(gate, dtype=dtype), gate, op=_opcheck(torch.ops.dcd_kernels.branch.default))
    for weights in (torch.bfloat16, torch.float16):
        call(operands(gate, weights=weights), gate, op=_opcheck(torch.ops.dcd_kernels.branch.default))


def _opcheck(op):
    return lambda *args: torch.library.opcheck(op, args)


def image_and_parameters(image, gate="se"):
    return [image, *operands(gate)[1:]]


def layer(image, *parameters, bins=1):
    scale = bins * bins / image[0, 0].numel()
    lam, phi = call((ops.channel_sums(image, bins), *parameters), "se", scale=scale)
    return lam.sin().sum() + phi.square().sum()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("bins", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, bins):
    layer_ = functools.partial(layer, bins=bins)
    compiled = torch.compile(layer_, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 8, 5, 4), (3, 8, 5, 4), (3, 8, 40, 30)):
        sizes = (3, 2, 8 * bins * bins, 5, 4, 6)
        tensors = [torch.randn(shape, requires_grad=True), *operands("se", sizes=sizes)[1:]]
        got, wanted = compiled(*tensors), layer_(*tensors)
        torch.testing.assert_close(got, wanted)
        for a, b in zip(*(torch.autograd.grad(y, leaves(tensors)) for y in (got, wanted)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_serves_every_batch():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    parameters = image_and_parameters(None)[1:]
    for batch in (2, 3, 9):
        image = torch.randn(batch, 7, 30, 20)
        torch._dynamo.mark_dynamic(image, 0)
        compiled(image, *parameters)
    assert counter.frame_count == 1


def test_export():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parameters_ = torch.nn.ParameterList(leaves(operands("se", split=True))[1:])

        def forward(self, image):
            return call((ops.channel_sums(image), *self.parameters_), "se", scale=0.1)

    module = Module()
    shapes = {"image": {0: torch.export.Dim("batch")}}
    program = torch.export.export(module, (torch.randn(2, 7, 9, 9),), dynamic_shapes=shapes)
    for batch in (1, 5):
        image = torch.randn(batch, 7, 9, 9)
        for a, b in zip(program.module()(image), module(image), strict=True):
            assert torch.equal(a, b)


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums": torch.zeros(3, 7)}, "sums must have 3 dimensions"),
        ({"sums": torch.zeros(3, 1, 7, dtype=torch.float16)}, "sums must be float32 or float64"),
        ({"sums": torch.zeros(3, 1, 8)}, r"squeeze_weight must have shape \(5, 8\), got \(5, 7\)"),
        ({"squeeze_weight": torch.zeros(5)}, "squeeze_weight must have 2 dimensions"),
        (
            {"squeeze_weight": torch.zeros(5, 7, dtype=torch.int32)},
            "must be float32, float64, float16 or bfloat16",
        ),
        ({"squeeze_bias": torch.zeros(4)}, r"squeeze_bias must have shape \(5,\), got \(4,\)"),
        ({"squeeze_bias": torch.zeros(5).half()}, "squeeze_bias must have the dtype of squeeze_weight"),
        ({"gate_weight": None}, "gate_weight must be given with gate code 5"),
        ({"gate_weight": torch.zeros(5, 4)}, r"gate_weight must have shape \(5, 5\)"),
        ({"gate_bias": torch.zeros(5, 1)}, r"gate_bias must have shape \(5,\)"),
        ({"gate": 1}, "gate_weight must be given with gate code 5 and with no other, got it with code 1"),
        ({"gate": 1, "gate_weight": None}, "gate_bias must not be given without gate_weight"),
        ({"gate": 6}, "gate must be a code from 0 to 5, got 6"),
        ({"expand_weight": torch.zeros(10, 4)}, r"expand_weight must have shape \(10, 5\)"),
        ({"expand_weight": torch.zeros(0, 5)}, "at least one"),
        ({"expand_bias": torch.zeros(9)}, r"expand_bias must have shape \(10,\)"),
        ({"lam_channels": 11}, "lam_channels must be from 0 to the rows of expand_weight, 10, got 11"),
        ({"lam_channels": -1}, "lam_channels must be from 0"),
        ({"phi_bias": torch.zeros(6)}, "phi_bias must not be given without phi_weight"),
        ({"phi_weight": torch.zeros(5)}, "phi_weight must have 2 dimensions"),
        ({"phi_weight": torch.zeros(6, 4)}, r"phi_weight must have shape \(6, 5\), got \(6, 4\)"),
        ({"phi_weight": torch.zeros(6, 5).half()}, "phi_weight must have the dtype of squeeze_weight"),
        (
            {"phi_weight": torch.zeros(6, 5)},
            "lam_channels must be the rows of expand_weight, 10, where phi_weight is given, got 4",
        ),
        (
            {"phi_weight": torch.zeros(6, 5), "phi_bias": torch.zeros(5), "lam_channels": 10},
            r"phi_bias must have shape \(6,\), got \(5,\)",
        ),
        ({"lam_activation": -1}, "lam_activation must be a code from 0 to 4, got -1"),
    ],
)
def test_bad_input(change, message):
    names = (
        "sums",
        "squeeze_weight",
        "squeeze_bias",
        "gate_weight",
        "gate_bias",
        "expand_weight",
        "expand_bias",
        "phi_weight",
        "phi_bias",
    )
    given = dict(zip(names, (None if t is None else t.detach() for t in operands("se")), strict=True))
    given |= {"scale": 1.0, "lam_channels": 4, "gate": 5, "lam_activation": 1}
    with pytest.raises(RuntimeError, match=message):
        ops.branch(**(given | change))


def test_codes_are_those_of_the_compiled_code():
    """Each place in the two lists computes what its name says, beside torch's own functions."""
    one = torch.ones(1, 1)
    for z in (-4.0, -1.0, 0.5, 7.0):
        value = torch.tensor(z)
        named = {
            "relu": F.relu,
            "relu6": F.relu6,
            "silu": F.silu,
            "hardswish": F.hardswish,
            None: lambda h: h,
        }
        for gate in GATES:
            parameters = (one, None, None, None, one, None, None, None)
            _, phi = ops.branch(value.view(1, 1, 1), 1.0, *parameters, 0, ops.GATES.index(gate), 0)
            torch.testing.assert_close(phi.squeeze(), named[gate](value))
