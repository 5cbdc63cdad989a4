# SPDX-License-Identifier: BSD-3-Clause
"""Accelerated against unpatched: outputs, every gradient and the statistics, family by family."""

import copy
import functools

import families
import pytest
import torch
import zoo
import zoo_variants as wild
from families import FAMILIES, MAY_BE_LEFT, RELATIVE, draw, inputs, make, randomise
from twins import accelerated, assert_as_accurate, assert_equal, run

import dcd_kernels as dcd

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
PICTURES = [name for name, (_, shape, *_) in FAMILIES.items() if len(shape) == 3]
ONE_PIXEL = ("DYCls", "1×1 map", "1 pixel of 1-D")

#: what is also run in low precision: every norm, rank and way of the fused product, L not below 3
LOW_PRECISION = [
    "conv_dy 3×3",
    "conv_dy stride 2",
    "conv_basic_dy",
    "DYModule expand",
    "DYModule project",
    "DYModule odd",
    "DYCls",
    "Einsum",
    "Trace",
    "Strip, no dropout",
    "Branch stride 2",
    "3×3 dilation",
    "3-D 1×1",
    "L = 45",
    "GroupNorm",
    "GroupNorm 1×1",
    "no norms",
    "norm1 only",
    "norm2 only",
    "no skip",
]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", FAMILIES)
def test_float64(name, backend):
    """One accelerated copy in training and in eval, whatever mode it was in when it was accelerated."""
    module = make(name).train(backend == "auto")
    twin = accelerated(module, None if name in MAY_BE_LEFT else 1)
    with dcd.use_backend(backend):
        for training in (True, False):
            mine, right = (run(model.train(training), inputs(name)) for model in (twin, module))
            assert_equal(mine, right, RELATIVE.get(name, 1e-10))


@pytest.mark.parametrize("name", PICTURES)
def test_channels_last(name):
    """Against the original on contiguous inputs: the 2×2 pools of the original crash on channels_last."""
    module = make(name)
    twin = accelerated(module, taken=None)
    for training in (True, False):
        right = run(module.train(training), inputs(name))
        assert_equal(run(twin.train(training), inputs(name), layout="channels_last"), right)


@MODES
def test_channels_last_weights(training):
    """The whole module in channels_last, parameters included."""
    module = make("DYModule expand").train(training)
    right = run(copy.deepcopy(module), inputs("DYModule expand"))
    model = accelerated(module).to(memory_format=torch.channels_last)
    assert_equal(run(model, inputs("DYModule expand"), layout="channels_last"), right)


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_of_one(name):
    """In training too, where there is more than one pixel for the statistics."""
    module = make(name)
    twin = accelerated(module, taken=None)
    for training in (False, True) if name not in ONE_PIXEL else (False,):
        mine, right = (run(model.train(training), inputs(name, batch=1)) for model in (twin, module))
        assert_equal(mine, right, RELATIVE.get(name, 1e-10))


@pytest.mark.parametrize("name", ["conv_dy 3×3", "conv_basic_dy", "DYModule expand", "Einsum", "Trace"])
def test_sliced_inputs(name):
    """Views into a larger tensor, and an input expanded over the batch with stride 0."""
    module = make(name).train()
    twin = accelerated(module)
    for drawn in (inputs(name, batch=6), inputs(name, batch=1)):
        views = [x[::2] if len(x) > 1 else x.expand(3, *x.shape[1:]) for x in drawn]
        wanted, got = copy.deepcopy(module)(*views), copy.deepcopy(twin)(*views)
        assert_equal({"output": got.detach()}, {"output": wanted.detach()})


@MODES
@pytest.mark.parametrize("name", LOW_PRECISION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision(name, dtype, training):
    module = make(name, dtype).train(training)
    assert_as_accurate(module, [inputs(name, dtype=dtype, seed=s) for s in range(4)])


@MODES
@pytest.mark.parametrize("name", ["conv_basic_dy", "DYModule expand", "DYModule project", "GroupNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_channels_last(name, dtype, training):
    module = make(name, dtype).train(training)
    twin, contiguous = accelerated(module), accelerated(module)
    drawn = inputs(name, dtype=dtype)
    mine, right = run(twin, drawn, layout="channels_last"), run(contiguous, drawn)
    assert_equal(mine, right, 64 * torch.finfo(dtype).eps)


@MODES
@pytest.mark.parametrize("name", LOW_PRECISION)
def test_autocast(name, training):
    module = make(name, torch.float32).train(training)
    context = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    draws = [inputs(name, dtype=torch.float32, seed=s) for s in range(4)]
    assert_as_accurate(module, draws, context=context, eps=torch.finfo(torch.bfloat16).eps)


@MODES
@pytest.mark.parametrize("name", ["conv_dy 3×3", "DYModule expand", "Einsum", "Trace", "GroupNorm", "Branch"])
@pytest.mark.parametrize("inside", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_dtypes_under_autocast(name, inside, training):
    """The dtype of outputs and gradients, for inputs that are half precision already as well."""
    module = make(name, torch.float32).train(training)
    for dtype in (torch.float32, inside):
        drawn = inputs(name, dtype=dtype)
        results = [
            run(model, drawn, context=torch.autocast("cpu", inside))
            for model in (accelerated(module), copy.deepcopy(module))
        ]
        mine, right = ({name: t.dtype for name, t in result.items()} for result in results)
        assert mine == right


@MODES
def test_patched_then_converted(training):
    """.to(bfloat16) and .double() after accelerate and after a call: nothing of the old dtype is kept."""
    module = make("DYModule expand", torch.float32).train(training)
    model = accelerated(module)
    for dtype, relative in ((torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float64, 1e-10)):
        drawn = inputs("DYModule expand", dtype=dtype)
        mine, right = run(model.to(dtype), drawn), run(module.to(dtype), drawn)
        assert {t.dtype for t in mine.values() if t.is_floating_point()} == {dtype}
        assert_equal(mine, right, relative)
        model.load_state_dict(module.state_dict())  # statistics differ by rounding
    assert len(dcd.report(model).taken) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_trained_statistics_in_half_precision(dtype):
    """A running variance of 1336 occurs in trained networks, beside tiny ones: no overflow, and accurate."""
    module = make("DYModule project", torch.float32).eval()
    with torch.no_grad():
        module.bn1.running_var.copy_(torch.logspace(-3, 3.2, module.dim))
        module.bn2.running_var.copy_(torch.logspace(3.2, -1, module.dim))
        module.bn1.weight.mul_(8)
        module.conv_q.weight.mul_(module.bn1.running_var.sqrt().view(-1, 1, 1, 1))
        module.fc_phi.weight.mul_(10)
    draws = [inputs("DYModule project", dtype=dtype, seed=s) for s in range(4)]
    assert_as_accurate(module.to(dtype), draws, backward=False)


@MODES
@pytest.mark.parametrize("name", ["conv_dy 3×3", "DYModule expand", "Trace"])
def test_norms_in_float32_of_a_module_in_bfloat16(name, training):
    """As many keep them; gradients in the dtype of each parameter."""
    module = make(name, torch.bfloat16).train(training)
    module.bn1.float()
    module.bn2.float()
    assert_as_accurate(module, [inputs(name, dtype=torch.bfloat16, seed=s) for s in range(4)])


@MODES
def test_network(training):
    """All five dynamic layers of a network, seen from its input to its output."""
    module = randomise(zoo.Network()).double().train(training)
    model = accelerated(module, taken=5)
    assert {entry.name for entry in dcd.report(model).taken} == set(zoo.DYNAMIC)
    pictures = draw((3, 24, 20))
    assert_equal(run(model, pictures), run(module, pictures))


@MODES
@pytest.mark.parametrize("needs", ["input alone", "parameters alone", "p and fc_phi alone"])
def test_some_gradients_alone(needs, training):
    """Frozen parameters get no gradient, and what is left is right."""
    module = make("DYModule expand").train(training)
    chosen = {"input alone": (), "p and fc_phi alone": ("conv_p.weight", "fc_phi.weight")}.get(needs)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(chosen is None or name in chosen)
    gradients = []
    for model in (accelerated(module), module):
        (x,) = inputs("DYModule expand")
        x.requires_grad_(needs == "input alone")
        model(x).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        gradients[-1] |= {"input": x.grad} if x.grad is not None else {}
    assert_equal(*gradients)
    assert len(gradients[0]) == {"input alone": 1, "p and fc_phi alone": 2}.get(needs, 11)


@pytest.mark.parametrize("name", ["DYModule expand", "Strip, no dropout", "GroupNorm", "Branch"])
def test_without_gradients(name):
    """no_grad and inference_mode, in training (statistics are still updated) and in eval."""
    for context in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            module = make(name).train(training)
            twin = accelerated(module)
            with context():
                mine, right = twin(*inputs(name)), module(*inputs(name))
            for got, wanted in zip(
                *(y if isinstance(y, tuple) else (y,) for y in (mine, right)), strict=True
            ):
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
                assert not got.requires_grad
            assert_equal(dict(twin.named_buffers()), dict(module.named_buffers()))


def test_a_pixel_that_is_not_finite_stays_in_its_sample():
    module = make("DYModule expand").eval()
    (x,) = inputs("DYModule expand")
    x[1, 2, 3, 3] = float("inf")
    mine, right = accelerated(module)(x), module(x)
    assert torch.equal(mine.isfinite(), right.isfinite())
    torch.testing.assert_close(mine[[0, 2, 3]], right[[0, 2, 3]], rtol=1e-10, atol=1e-10)


@pytest.mark.full
@MODES
@pytest.mark.parametrize(
    ("module", "shape", "batch"),
    [
        (lambda: zoo.DYModule(16, 96, 16), (16, 112, 112), 2),
        (lambda: zoo.DYModule(160, 960, 16), (160, 7, 7), 8),
        (lambda: zoo.DYModule(960, 160, 16), (960, 7, 7), 8),
        (lambda: zoo.ConvBasicDY(128, 256, 2), (128, 28, 28), 2),
        (lambda: zoo.ConvDY(256, 64), (256, 28, 28), 4),
        (lambda: zoo.DYCls(1280, 1000), (1280,), 16),
        (lambda: wild.Plain(16, 16, 8, 3, padding=1, norm="group"), (16, 512, 512), 1),
        (lambda: wild.Plain(64, 64, 45, rank=1), (64, 3000), 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_wide(module, shape, batch, dtype, training):
    made = families.randomise(module()).to(dtype).train(training)
    assert_as_accurate(made, [draw(shape, batch=batch, dtype=dtype)])
