# SPDX-License-Identifier: BSD-3-Clause
"""The compiled ops under torch.compile, torch.export, fake tensors and autocast."""

import io
from dataclasses import replace

import pytest
import test_ops_apply
import test_ops_depthwise
import test_ops_pointwise
import torch
from cases import assert_same, in_layout
from operands import (
    LAYOUTS,
    Case,
    call,
    label,
    operands,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dcd_kernels import ops
from dcd_kernels.arguments import ACTIVATIONS

WHOLE = [
    replace(test_ops_pointwise.WHOLE, activation="silu"),
    replace(test_ops_apply.WHOLE, activation="relu6"),
    replace(test_ops_apply.LATENT, activation="hardswish"),
    replace(test_ops_depthwise.WHOLE, activation="silu"),
]
EVERY = [case for module in (test_ops_pointwise, test_ops_apply, test_ops_depthwise) for case in module.CASES]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def resized(case: Case, batch: int, more: int) -> Case:
    return replace(case, batch=batch, size=tuple(size + more for size in case.size))


def assert_agree(mine, right) -> None:
    assert mine.dtype == right.dtype
    assert_same(mine.double(), right.double(), 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", EVERY, ids=label)
def test_fake_tensors_have_the_strides_of_real_ones(case, layout):
    tensors = operands(case, layout=layout)
    real = call(case, tensors)
    with FakeTensorMode() as mode:
        fake = call(case, [None if t is None else mode.from_tensor(t) for t in tensors])
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    for size, mine, right in zip(real.shape, fake.stride(), real.stride(), strict=True):
        assert size == 1 or mine == right


@pytest.mark.parametrize(
    ("layout", "dynamic"), (("contiguous", False), ("channels_last", True), ("sliced", True))
)
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_compile(case, layout, dynamic):
    def function(*tensors):
        return call(case, tensors).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, more in ((2, 0), (5, 0), (3, 2)):
        tensors = operands(resized(case, batch, more), layout=layout, requires_grad=True)
        wanted = [t for t in tensors if t is not None]
        mine, right = compiled(*tensors), function(*tensors)
        assert mine.stride() == right.stride()
        assert_agree(mine, right)
        for got, expected in zip(
            torch.autograd.grad(mine.sum(), wanted), torch.autograd.grad(right.sum(), wanted), strict=True
        ):
            assert_agree(got, expected)
        with torch.no_grad():
            assert_agree(compiled(*tensors), right)


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_one_graph_serves_every_size(case):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: call(case, t), fullgraph=True, backend=counter, dynamic=True)
    # Sizes that are equal when it is traced, torch takes for one: none are in the first call.
    for batch, more in ((2, 1), (3, 2), (7, 5)):
        compiled(*operands(resized(case, batch, more)))
    assert counter.frame_count == 1


def test_inductor():
    """Our ops among others: the layouts that Inductor hands over are those it was promised."""
    convolution, stencil = WHOLE[0], WHOLE[-1]
    first = operands(convolution, requires_grad=True)
    widths = replace(stencil, in_channels=21, out_channels=21, size=convolution.size)
    second = operands(widths, requires_grad=True)[1:]

    def network(tensors, rest):
        hidden = call(convolution, [tensors[0].relu() * 2, *tensors[1:]])
        hidden = hidden.to(memory_format=torch.channels_last) + 1
        return call(widths, [hidden, *rest]).tanh()

    compiled = torch.compile(network, fullgraph=True)
    mine, right = compiled(first, second), network(first, second)
    assert_agree(mine, right)
    wanted = [*first, *second]
    for got, expected in zip(
        torch.autograd.grad(mine.sum(), wanted), torch.autograd.grad(right.sum(), wanted), strict=True
    ):
        assert_agree(got, expected)


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_compiled_torch_func_grad(case):
    tensors = [t for t in operands(case) if t is not None]

    def loss(*given):
        it = iter(given)
        return call(case, [None if s is None else next(it) for s in case.shapes().values()]).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*tensors), gradient(*tensors), strict=True):
        assert_agree(got, expected)


# --- export


class Layer(nn.Module):
    """The parameters of a case as parameters, what depends on the sample as arguments."""

    def __init__(self, case: Case):
        super().__init__()
        self.case = case
        for key, tensor in zip(case.names, operands(case), strict=True):
            if tensor is not None and tensor.shape[0] != case.batch:
                setattr(self, key, nn.Parameter(tensor))

    def per_sample(self, case: Case, layout: str = "contiguous"):
        named = zip(case.names, operands(case, layout=layout), strict=True)
        return {key: t for key, t in named if t is not None and not hasattr(self, key)}

    def forward(self, samples):
        tensors = [samples.get(key, getattr(self, key, None)) for key in self.case.names]
        return getattr(ops, self.case.op)(*tensors, *self.case.geometry, ACTIVATIONS[self.case.activation])


@pytest.mark.parametrize(("layout", "strict"), (("contiguous", True), ("channels_last", False)))
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_export_with_a_dynamic_batch(case, strict, layout):
    layer = Layer(case)
    samples = layer.per_sample(case, layout)
    batch = torch.export.Dim("batch")
    shapes = {"samples": {key: {0: batch} for key in samples}}
    program = torch.export.export(layer, (samples,), dynamic_shapes=shapes, strict=strict)
    ours = [node for node in program.graph.nodes if "dcd_kernels" in str(node.target)]
    assert len(ours) == 1
    saved = io.BytesIO()
    torch.export.save(program.run_decompositions(), saved)
    saved.seek(0)
    for module in (program.module(), torch.export.load(saved).module()):
        for size in (1, 2, 7):
            given = layer.per_sample(replace(case, batch=size), layout)
            if size == 1 and layout == "channels_last":
                # torch normalises the strides of a batch of one, the layout is what counts
                given = {
                    k: in_layout(t, layout) if t.dim() > 2 and k != "phi" else t for k, t in given.items()
                }
            assert torch.equal(module(given), layer(given))


# --- autocast


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_autocast(case, dtype):
    """The images and matrices go to the autocast dtype, lam, phi and bias stay in float32."""
    tensors = operands(case, requires_grad=True)
    cast = [
        t if t is None or key in ("lam", "phi", "bias") else t.detach().to(dtype).requires_grad_()
        for key, t in zip(case.names, tensors, strict=True)
    ]
    right = call(case, cast)
    direct = getattr(torch.ops.dcd_kernels, case.op)
    code = ACTIVATIONS[case.activation]
    with torch.autocast("cpu", dtype=dtype):
        outputs = [call(case, tensors), direct(*tensors, *case.geometry, code)]
        with torch.no_grad():
            outputs.append(call(case, tensors))
    for output in outputs:
        assert output.dtype == dtype
        assert torch.equal(output, right)
    wanted = [t for t in tensors if t is not None]
    expected = torch.autograd.grad(right.sum(), [t for t in cast if t is not None])
    for output in outputs[:2]:
        for got, half, tensor in zip(
            torch.autograd.grad(output.sum(), wanted), expected, wanted, strict=True
        ):
            assert got.dtype == tensor.dtype
            assert torch.equal(got, half.to(got.dtype))


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_autocast_under_compile(case):
    def function(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(case, tensors)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = operands(case, requires_grad=True)
    wanted = [t for t in tensors if t is not None]
    mine, right = compiled(*tensors), function(*tensors)
    assert mine.dtype == torch.bfloat16
    assert torch.equal(mine, right)
    for got, expected in zip(
        torch.autograd.grad(mine.sum(), wanted), torch.autograd.grad(right.sum(), wanted), strict=True
    ):
        assert torch.equal(got, expected)


def test_autocast_leaves_float64_alone():
    case = WHOLE[0]
    tensors = operands(case, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(case, tensors), call(case, tensors))
        assert call(case, tensors).dtype == torch.float64


def test_autocast_on_a_disabled_region():
    case = WHOLE[0]
    tensors = operands(case)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert call(case, tensors).dtype == torch.float32


@pytest.mark.parametrize("op", ("pointwise", "apply", "depthwise"))
@pytest.mark.parametrize("key", ("AutocastCPU", "AutocastCUDA"))
def test_autocast_rule_is_registered(op, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dcd_kernels::{op}", key)


# --- older tracers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_tracers_record_one_op(case, requires_grad):
    tensors = [t for t in operands(case, requires_grad=requires_grad) if t is not None]

    def function(*given):
        it = iter(given)
        return call(case, [None if s is None else next(it) for s in case.shapes().values()])

    traced = torch.jit.trace(function, tuple(tensors))
    assert [node.kind() for node in traced.graph.nodes() if "dcd" in node.kind()] == [
        f"dcd_kernels::{case.op}"
    ]
    assert torch.equal(traced(*tensors), function(*tensors))
    graph = make_fx(function, tracing_mode="symbolic")(*tensors).graph
    assert [str(node.target) for node in graph.nodes if "dcd" in str(node.target)] == [
        f"dcd_kernels.{case.op}.default"
    ]
