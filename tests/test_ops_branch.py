# SPDX-License-Identifier: BSD-3-Clause
"""The ops channel_sums and branch: values against NumPy, gradients, tracing, bad input. On the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

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


def operands(gate="relu", *, dtype=torch.float32, weights=None, sizes=(3, 2, 7, 5, 4, 6), bias=True):
    """Leaves: sums and the six parameters in the order of the op, so large that all kinks are seen."""
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
        parameter(lam + others, hidden),
        vector(lam + others),
    ]


def call(tensors, gate="relu", lam_activation="hardsigmoid2", lam_channels=4, scale=0.25, op=ops.branch):
    sums, *parameters = tensors
    codes = ops.GATES.index(gate), ops.LAM_ACTIVATIONS.index(lam_activation)
    return op(sums, scale, *parameters, lam_channels, *codes)


def truth(tensors, gate, lam_activation, lam_channels=4, scale=0.25):
    sums, w1, b1, wg, bg, w2, b2 = (None if t is None else t.detach().double().numpy() for t in tensors)

    def affine(x, w, b):
        return x @ w.T + (0 if b is None else b)

    hidden = affine(sums.sum(1) * scale, w1, b1)
    logit = affine(hidden, wg, bg) if gate == "se" else None
    hidden = GATE[gate](hidden) if logit is None else hidden * np.clip(logit + 3, 0, 6) / 3
    logits = affine(hidden, w2, b2)
    return CLIP[lam_activation](logits[:, :lam_channels]), logits[:, lam_channels:]


# --- channel_sums


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 3, 23, 23), (2, 4, 3, 4, 50), (3, 4, 1, 1), (1, 2, 96, 96)])
def test_sums(shape, dtype):
    x = torch.randn(shape).to(dtype)
    layouts = [x, x.transpose(1, -1).contiguous().transpose(1, -1), torch.stack((x, x), -1)[..., 1]]
    wanted = x.double().flatten(2).sum(2)
    for image in layouts:
        sums = ops.channel_sums(image)
        pixels = x[0, 0].numel()
        assert sums.shape == (shape[0], min(max(1, -(-pixels // 512)), 16), shape[1])
        assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(sums.double().sum(1), wanted, rtol=0, atol=1e-6 * pixels)


def test_sums_of_nothing():
    assert (ops.channel_sums(torch.zeros(2, 3, 0, 4)) == 0).all()
    assert ops.channel_sums(torch.zeros(0, 3, 4)).shape == (0, 1, 3)
    assert ops.channel_sums(torch.zeros(2, 0, 700)).shape == (2, 2, 0)


def test_sums_do_not_overflow_in_half():
    assert (ops.channel_sums(torch.full((1, 1, 400, 400), 2.0, dtype=torch.float16)).sum() == 320_000).all()


@pytest.mark.parametrize("shape", [(1, 2, 9), (1, 2, 33, 32)])
def test_gradient_of_sums(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.channel_sums, x)
    assert torch.autograd.gradgradcheck(lambda x: ops.channel_sums(x).square(), x)
    gradient = torch.func.grad(lambda x: ops.channel_sums(x).square().sum())(x)
    (wanted,) = torch.autograd.grad(ops.channel_sums(x).square().sum(), x)
    torch.testing.assert_close(gradient, wanted)


def test_the_gradient_of_a_mean_is_not_written_out():
    x = torch.randn(2, 3, 40, 40, requires_grad=True)
    seen = []
    y = x.view_as(x)
    y.register_hook(lambda grad: seen.append(grad.stride()))
    ops.channel_sums(y).sum(1).square().sum().backward()
    assert seen[0][2:] == (0, 0)
    torch.testing.assert_close(x.grad, (2 * x.detach().sum((2, 3), keepdim=True)).expand_as(x))


# --- branch


@pytest.mark.parametrize(("gate", "lam_activation"), EVERY)
def test_formula(gate, lam_activation):
    tensors = operands(gate)
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
    gradients = torch.autograd.grad(sum(t.sum() for t in call(tensors, "se")), tensors)
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


@pytest.mark.parametrize(("gate", "lam_activation"), EVERY)
def test_gradients(gate, lam_activation):
    tensors = operands(gate, dtype=torch.float64)

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
    outer = torch.autograd.grad(sum(t.sum() for t in wanted), [*tensors, image])
    with torch.autocast("cpu", torch.bfloat16):
        got = [*call(tensors, "se"), ops.channel_sums(image)]
        inner = torch.autograd.grad(sum(t.sum() for t in got), [*tensors, image])
    for a, b in zip([*got, *inner], [*wanted, *outer], strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


# --- tracing


@pytest.mark.parametrize("gate", ["relu", "se"])
def test_opcheck(gate):
    for dtype in (torch.float32, torch.float64):
        call(operands(gate, dtype=dtype), gate, op=_opcheck(torch.ops.dcd_kernels.branch.default))
    for weights in (torch.bfloat16, torch.float16):
        call(operands(gate, weights=weights), gate, op=_opcheck(torch.ops.dcd_kernels.branch.default))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck_of_sums(dtype):
    op = torch.ops.dcd_kernels.channel_sums.default
    for shape in ((2, 3, 5, 4), (1, 2, 30, 30)):
        image = torch.randn(shape).to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.library.opcheck(op, (image.to(memory_format=layout).requires_grad_(),))


def _opcheck(op):
    return lambda *args: torch.library.opcheck(op, args)


def test_fake_tensors():
    with FakeTensorMode():
        for pixels, tiles in ((0, 1), (1, 1), (512, 1), (513, 2), (8192, 16), (100_000, 16)):
            assert ops.channel_sums(torch.empty(2, 3, pixels)).shape == (2, tiles, 3)


def image_and_parameters(image, gate="se"):
    return [image, *operands(gate)[1:]]


def layer(image, *parameters):
    lam, phi = call((ops.channel_sums(image), *parameters), "se", scale=1 / image[0, 0].numel())
    return lam.sin().sum() + phi.square().sum()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 7, 5, 4), (3, 7, 5, 4), (3, 7, 40, 30)):
        tensors = image_and_parameters(torch.randn(shape, requires_grad=True))
        got, wanted = compiled(*tensors), layer(*tensors)
        torch.testing.assert_close(got, wanted)
        for a, b in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(wanted, tensors), strict=True):
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
            self.parameters_ = torch.nn.ParameterList(operands("se")[1:])

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
    )
    given = dict(zip(names, (t.detach() for t in operands("se")), strict=True))
    given |= {"scale": 1.0, "lam_channels": 4, "gate": 5, "lam_activation": 1}
    with pytest.raises(RuntimeError, match=message):
        ops.branch(**(given | change))


def test_bad_images():
    with pytest.raises(RuntimeError, match="input must have at least 3 dimensions"):
        ops.channel_sums(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="input must be float32, float64, float16 or bfloat16"):
        ops.channel_sums(torch.zeros(2, 3, 4, dtype=torch.int64))


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
            parameters = (one, None, None, None, one, None)
            _, phi = ops.branch(value.view(1, 1, 1), 1.0, *parameters, 0, ops.GATES.index(gate), 0)
            torch.testing.assert_close(phi.squeeze(), named[gate](value))
