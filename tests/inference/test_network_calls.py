# SPDX-License-Identifier: BSD-3-Clause
"""Calls of an optimised network that its kernels do not serve: right as they are written, or an error."""

import pytest
import torch
import torch.utils.flop_counter
from graphs import Net, chain, conv, norm
from runs import image, randomise
from subjects import assert_follows, each, in_parts, mobilenet, written
from torch import nn

import dcd_kernels


def test_training_mode_raises():
    network = mobilenet()
    with pytest.raises(ValueError, match=r"model must be in eval mode.*the model itself is in training mode"):
        dcd_kernels.optimize_for_inference(network.train())
    network.eval().features[1].conv[0][1].train()
    with pytest.raises(ValueError, match=r"'features\.1\.conv\.0\.1' is in training mode"):
        dcd_kernels.optimize_for_inference(network)
    optimised = dcd_kernels.optimize_for_inference(network.eval())
    x = image(1, 3, 32, 32)
    expected = optimised(x)
    for module in (optimised, optimised.features, optimised.classifier[0]):
        module.train()
        with pytest.raises(RuntimeError, match=r"training mode.*eval\(\)"):
            optimised(x)
        optimised.eval()
        assert torch.equal(optimised(x), expected)


@pytest.mark.parametrize("bad", [None, 3, torch.relu, torch.zeros(3)], ids=str)
def test_no_module(bad):
    with pytest.raises(TypeError, match=r"optimize_for_inference: model must be a torch\.nn\.Module, got"):
        dcd_kernels.optimize_for_inference(bad)


BAD_INPUTS = {
    "channels": lambda: torch.zeros(1, 4, 32, 32),
    "a vector": lambda: torch.zeros(1, 3),
    "no batch": lambda: torch.zeros(3),
    "no tensor": lambda: [1, 2],
    "None": lambda: None,
    "five dimensions": lambda: torch.zeros(1, 3, 4, 4, 4),
    "integers": lambda: torch.zeros(1, 3, 32, 32, dtype=torch.int64),
    "float64": lambda: torch.zeros(1, 3, 32, 32, dtype=torch.float64),
    "bfloat16": lambda: torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16),
    "no rows": lambda: torch.zeros(1, 3, 0, 32),
    "sparse": lambda: torch.zeros(1, 3, 8, 8).to_sparse(),
}


@pytest.mark.parametrize("make", [mobilenet, in_parts], ids=["whole", "in parts"])
@pytest.mark.parametrize("bad", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(make, bad):
    optimised = dcd_kernels.optimize_for_inference(make())
    with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)) as written:
        optimised.written(bad())
    with pytest.raises((RuntimeError, written.type)):  # the kernels' own error, or torch's
        optimised(bad())
    with pytest.raises(TypeError, match="argument"):
        optimised()
    with pytest.raises(TypeError, match="argument"):
        optimised(image(1, 3, 32, 32), 1, 2)
    assert_follows(optimised)


def test_too_small_an_image():
    optimised = dcd_kernels.optimize_for_inference(chain(conv(3, 8, 5, padding=0), nn.ReLU()).eval())
    with pytest.raises(RuntimeError, match=r"^OptimizedNetwork: the input is too small.*5 x 5.*4 x 9"):
        optimised(torch.zeros(1, 3, 4, 9))


def test_image_of_fixed_size():
    """A network for one size alone is planned for that, and says no to others."""
    network = chain(conv(3, 8, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 20 * 20, 5))
    optimised = dcd_kernels.optimize_for_inference(randomise(network, channels=None))
    assert optimised.plan is None
    assert_follows(optimised, image(3, 3, 40, 40))
    assert optimised.plan is not None
    with pytest.raises(RuntimeError):
        optimised(image(1, 3, 42, 40))


def test_forward_that_asserts():
    def forward(s, x):
        assert x.shape[-1] == 48
        return s.a(x)

    network = Net(forward, a=conv(3, 8)).eval()
    optimised = dcd_kernels.optimize_for_inference(network)
    torch.testing.assert_close(optimised(image(1, 3, 48, 48)), written(network, image(1, 3, 48, 48)))
    with pytest.raises(AssertionError):
        optimised(image(1, 3, 32, 32))


@each
def test_gradients_of_the_input(make):
    network = make()
    optimised = dcd_kernels.optimize_for_inference(network)
    one, other = (image(2, 3, 33, 32).requires_grad_() for _ in range(2))
    optimised(one).square().sum().backward()
    network(other).square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not optimised(one).requires_grad
    assert not optimised(image(1, 3, 33, 32)).requires_grad


def test_autocast_runs_as_written():
    network = mobilenet()
    optimised = dcd_kernels.optimize_for_inference(network)
    x = image(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = optimised(x), network(x)
    assert got.dtype is expected.dtype is torch.bfloat16 and torch.equal(got, expected)


def test_reference_backend_runs_as_written():
    network = mobilenet()
    optimised = dcd_kernels.optimize_for_inference(network)
    x = image(2, 3, 32, 32)
    with dcd_kernels.use_backend("reference"):
        got = optimised(x)
    assert torch.equal(got, written(network, x)) and got.requires_grad


@pytest.mark.full
@each
def test_compile(make, fresh_compiler):
    optimised = dcd_kernels.optimize_for_inference(make())
    x = image(2, 3, 33, 40)
    compiled = torch.compile(optimised, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), optimised(x), rtol=1e-4, atol=1e-4)


def test_compile_a_small_one(fresh_compiler):
    network = randomise(chain(conv(3, 8), norm(8), nn.ReLU()))
    optimised = dcd_kernels.optimize_for_inference(network)
    x = image(1, 3, 8, 8)
    compiled = torch.compile(optimised, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), optimised(x))


@pytest.mark.full
@each
def test_export(make):
    optimised = dcd_kernels.optimize_for_inference(make())
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(optimised, (image(2, 3, 32, 32),), dynamic_shapes=(({0: batch},),))
        x = image(5, 3, 32, 32, seed=3)
        torch.testing.assert_close(program.module()(x), optimised(x), rtol=1e-4, atol=1e-4)


def test_function_transforms():
    network = mobilenet()
    optimised = dcd_kernels.optimize_for_inference(network)
    x, tangent = image(2, 3, 32, 32), image(2, 3, 32, 32, seed=1)
    got = torch.func.grad(lambda x: optimised(x).sum())(x)
    assert got.abs().sum() > 0
    state = {key: value * 1.5 for key, value in optimised.state_dict().items() if value.is_floating_point()}
    got = torch.func.functional_call(optimised, state, (x,))
    with torch.no_grad():
        torch.testing.assert_close(
            got, torch.func.functional_call(network, state, (x,)), rtol=1e-3, atol=1e-3
        )
    assert_follows(optimised, x)
    with dcd_kernels.use_backend("reference"):
        _, along = torch.func.jvp(optimised, (x,), (tangent,))
    assert along.abs().sum() > 0
    each = torch.func.vmap(optimised)(image(3, 2, 3, 32, 32).contiguous())
    assert each.shape == (3, 2, 11)


def test_dual_numbers_are_not_lost():
    """Forward-mode tangents pass through the written network, or it says that they cannot."""
    optimised = dcd_kernels.optimize_for_inference(randomise(chain(conv(3, 8), nn.ReLU())))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(image(1, 3, 8, 8), image(1, 3, 8, 8, seed=1))
        tangent = torch.autograd.forward_ad.unpack_dual(optimised(dual)).tangent
    assert tangent is not None and tangent.abs().sum() > 0


def test_flops_are_counted():
    network = randomise(chain(conv(3, 8), norm(8), nn.ReLU(), conv(8, 8)))
    optimised = dcd_kernels.optimize_for_inference(network)
    counts = []
    for module in (network, optimised):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
            module(image(1, 3, 16, 16))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_hooks_on_all_modules_see_every_module():
    optimised = dcd_kernels.optimize_for_inference(randomise(chain(conv(3, 8), nn.ReLU())))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        optimised(image(1, 3, 8, 8))
    finally:
        handle.remove()
    assert {"Conv2d", "ReLU"} <= set(seen)


def test_hooks_of_the_result():
    optimised = dcd_kernels.optimize_for_inference(mobilenet())
    x = image(1, 3, 32, 32)
    expected = optimised(x)
    optimised.register_forward_hook(lambda m, i, o: o + 1)
    assert torch.equal(optimised(x), expected + 1)


def test_input_with_a_negative_bit():
    optimised = dcd_kernels.optimize_for_inference(randomise(chain(conv(3, 8), nn.ReLU())))
    x = torch.complex(image(1, 3, 8, 8), image(1, 3, 8, 8, seed=1)).conj().imag
    assert x.is_neg()
    assert torch.equal(optimised(x), optimised(x.clone()))


# --- what it says


def test_report_and_explain():
    optimised = dcd_kernels.optimize_for_inference(mobilenet())
    report = dcd_kernels.report(optimised)
    assert not report.left and "depthwise" in str(report)
    names = {entry.name: entry for entry in report}
    assert "sum" in names["features.3.conv.2"].reason
    assert "row by row" in str(report)
    x = image(1, 3, 32, 32)
    assert str(report) in str(dcd_kernels.explain(optimised, x))
    with_gradient = dcd_kernels.explain(optimised, x.clone().requires_grad_())
    assert str(report) not in str(with_gradient)
    left = dcd_kernels.report(dcd_kernels.optimize_for_inference(in_parts())).left
    assert [entry.name for entry in left] == ["sigmoid"] and "no kernel" in left[0].reason


def test_report_before_the_first_call():
    network = Net(lambda s, x: s.a(x.flatten(1)), a=nn.Linear(3 * 5 * 5, 4)).eval()
    optimised = dcd_kernels.optimize_for_inference(network)
    assert "no input has been seen" in str(dcd_kernels.report(optimised))
    optimised(image(2, 3, 5, 5))
    assert "linear" in str(dcd_kernels.report(optimised))
