# SPDX-License-Identifier: BSD-3-Clause
"""The compiled batch_norm_act and its gradient: values, layouts, instruction sets, special values."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import as_array, assert_close_to_truth, in_layout
from operands import HALF, ISAS, LAYOUTS, instruction_set, is_channels_last, threads

from dcd_kernels.arguments import ACTIVATIONS
from dcd_kernels.ops import norm

OPS = torch.ops.dcd_kernels
EPS = 1e-5
TORCH = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
# one pixel, one sample, columns of channels; whole and broken vectors of channels, several pixels for one
# vector; several tiles and chunks
SHAPES = [
    (6, 5),
    (33, 40, 1, 1),
    (1, 3, 7),
    (3, 1, 4, 5),
    (2, 8, 6, 6),
    (2, 24, 5, 6),
    (3, 70, 3, 3),
    (2, 130, 9, 9),
    (2, 5, 3, 2, 4),
    (3, 16, 40, 41),
    (2, 48, 37, 20),
    (1, 7, 60, 90),
]
TILED = [(3, 16, 40, 41), (2, 3, 67, 61), (5, 96, 20, 20)]
KERNELS = [*((isa, torch.float32) for isa in ISAS), (ISAS[0], torch.float64)]


def operands(shape, dtype=torch.float32, layout="contiguous", offset=0.5):
    """Input, weight, bias and the output's gradient; activations cut on both sides."""
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    input, weight, bias, grad = draw(*shape) + offset, 3 * draw(shape[1]), 2 * draw(shape[1]), draw(*shape)
    images = [in_layout(tensor.to(dtype), layout) for tensor in (input, grad)]
    vectors = [in_layout(tensor.to(dtype), layout, image=False) for tensor in (weight, bias)]
    return images[0], *vectors, images[1]


def by_torch(input, weight, bias, grad, activation, dtype):
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (input, weight, bias)]
    # torch's kernels, as its modules call them; a single value in every channel is their objection alone
    output = TORCH[activation](F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.1, EPS))
    found = iter(torch.autograd.grad(output, [t for t in leaves if t is not None], grad.to(dtype)))
    return output.detach(), *(None if t is None else next(found) for t in leaves)


def run(input, weight, bias, grad, activation, needs=0b111):
    code = ACTIVATIONS[activation]
    output, mean, variance = OPS.batch_norm_act(input, weight, bias, EPS, code)
    gradients = OPS.batch_norm_act_backward(grad, input, weight, bias, mean, variance, EPS, code, needs)
    return output, mean, variance, gradients


@pytest.mark.parametrize("isa,dtype", KERNELS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, activation, layout, isa, dtype):
    tensors = operands(shape, dtype, layout)
    with instruction_set(isa):
        output, mean, variance, gradients = run(*tensors, activation)
    exact = [t.double() for t in tensors]
    truth = by_torch(*exact, activation, torch.float64)
    plain = by_torch(*tensors, activation, dtype)
    equations = oracle.batch_norm_act(*(as_array(t) for t in exact[:3]), EPS, activation)
    torch.testing.assert_close(truth[0], torch.from_numpy(equations), rtol=1e-9, atol=1e-9)
    axes = [0, *range(2, len(shape))]
    true_variance, true_mean = torch.var_mean(exact[0], axes, correction=0)
    for got, right in ((mean, true_mean), (variance, true_variance)):
        scale = 1e-13 if dtype == torch.float64 else 4e-7
        assert (got - right).abs().max() <= scale * (true_variance + true_mean.square() + 1).max()
    for name, got, composed, right in zip(
        ("output", "d_input", "d_weight", "d_bias"), (output, *gradients), plain, truth, strict=True
    ):
        if dtype == torch.float64:
            assert torch.allclose(got, right, rtol=1e-10, atol=1e-11), name
        else:
            assert_close_to_truth(got, composed, right, name)
    for image in (output, gradients[0]):
        assert is_channels_last(image) == (is_channels_last(tensors[0]) and not image.is_contiguous())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("needs", range(8))
def test_a_part_of_the_arguments_and_of_the_gradients(needs, given, layout):
    input, weight, bias, grad = operands((2, 24, 5, 6), layout=layout)
    tensors = input, weight if given[0] else None, bias if given[1] else None, grad
    output, _, _, gradients = run(*tensors, "relu6", needs)
    truth = by_torch(*(None if t is None else t.double() for t in tensors), "relu6", torch.float64)
    plain = by_torch(*tensors, "relu6", torch.float32)
    assert_close_to_truth(output, plain[0], truth[0])
    for i, got in enumerate(gradients):
        if needs >> i & 1 and tensors[i] is not None:
            assert_close_to_truth(got, plain[1 + i], truth[1 + i])
        else:
            assert got.shape == (0,)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", TILED, ids=str)
def test_a_mean_of_a_thousand_deviations(shape, layout, isa):
    """Raw second moments would leave no digit of the variance."""
    tensors = operands(shape, layout=layout, offset=1000.0)
    with instruction_set(isa):
        output, _, variance, gradients = run(*tensors, None)
    exact = [t.double() for t in tensors]
    true_variance = exact[0].var([0, *range(2, len(shape))], correction=0)
    assert ((variance - true_variance) / true_variance).abs().max() < 1e-5
    truth, plain = (by_torch(*exact, None, torch.float64), by_torch(*tensors, None, torch.float32))
    for got, composed, right in zip((output, *gradients), plain, truth, strict=True):
        assert_close_to_truth(got, composed, right)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_first_pixels_like_no_others(layout, isa):
    input, *rest = operands((2, 5, 40, 41), layout=layout)
    input[:, :, :3] += 1e4
    with instruction_set(isa):
        _, mean, variance, _ = run(input, *rest, "relu")
    true_variance, true_mean = torch.var_mean(input.double(), (0, 2, 3), correction=0)
    assert ((mean - true_mean) / true_mean).abs().max() < 1e-6
    assert ((variance - true_variance) / true_variance).abs().max() < 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(33, 40, 1, 1), *TILED], ids=str)
def test_as_many_threads_as_you_like_same_bits(shape, layout, isa):
    tensors = operands(shape, layout=layout)
    runs = []
    with instruction_set(isa):
        for count in (1, 1, 2, 3):
            with threads(count):
                *results, gradients = run(*tensors, "silu")
                runs.append((*results, *gradients))
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(value, layout, isa):
    input, *rest = operands((2, 24, 5, 6), layout=layout)
    input[1, 7, 2, 3] = value
    with instruction_set(isa):
        output, mean, variance, gradients = run(input, *rest, None)
    for result in (output, gradients[0]):
        assert result[:, 7].isnan().all()
        assert not result[:, :7].isnan().any() and not result[:, 8:].isnan().any()
    assert not mean[7].isfinite() and not variance[7].isfinite()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=("all half", "float32 parameters"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(layout, wide, dtype):
    input, weight, bias, grad = operands((2, 24, 5, 6), dtype, layout)
    if wide:
        weight, bias = weight.float(), bias.float()
    output, mean, variance, gradients = run(input, weight, bias, grad, "relu6")
    singles = [t.float() for t in (input, weight, bias, grad)]
    expected, *statistics, expected_gradients = run(*singles, "relu6")
    assert output.dtype == dtype and torch.equal(output, expected.to(dtype))
    assert torch.equal(mean, statistics[0]) and torch.equal(variance, statistics[1])
    for got, right, like in zip(gradients, expected_gradients, (input, weight, bias), strict=True):
        assert got.dtype == like.dtype and torch.equal(got, right.to(like.dtype))


@pytest.mark.parametrize("shape", [(6, 5), (7, 6, 1, 1), (2, 24, 5, 6)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_expanded_gradients(layout, shape):
    """sum().backward() sends one value for all; a pixel's may have any stride between its channels."""
    input, weight, bias, grad = operands(shape, layout=layout)
    expanded = grad.flatten()[:1].view([1] * len(shape)).expand(shape)
    *_, found = run(input, weight, bias, expanded, "relu6")
    *_, dense = run(input, weight, bias, expanded.contiguous(), "relu6")
    for got, right in zip(found, dense, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_denormals_are_flushed_only_inside():
    input, *rest = operands((2, 6, 9, 9), offset=0.0)
    _, mean, variance, _ = run(input * 1e-40, *rest, "relu")
    assert not mean.abs().max() > 1e-37 and not variance.abs().max() > 1e-37
    assert (torch.full((64,), 1e-40) * 1.0).ne(0).all(), "the kernel left denormals flushed"


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 4, 3, 2), (9, 2, 1, 1)], ids=str)
def test_gradcheck(shape, activation, layout):
    tensors = [t.requires_grad_() for t in operands(shape, torch.float64, layout)[:3]]

    def output(*arguments):
        return norm.batch_norm_act(*arguments, 1e-3, ACTIVATIONS[activation])[0]

    assert torch.autograd.gradcheck(output, tensors)
    assert torch.autograd.gradgradcheck(output, tensors)


def test_statistics_take_no_gradient():
    tensors = [t.requires_grad_() for t in operands((2, 5, 3, 3))[:3]]
    output, mean, variance = norm.batch_norm_act(*tensors, EPS, 0)
    assert output.requires_grad and not mean.requires_grad and not variance.requires_grad


def test_it_saves_its_input_and_vectors():
    tensors = [t.requires_grad_() for t in operands((2, 5, 3, 3))[:3]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm.batch_norm_act(*tensors, EPS, ACTIVATIONS["relu6"])
    images = [t for t in saved if t.numel() > 5]
    assert len(images) == 1 and images[0].data_ptr() == tensors[0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 3), (2, 17, 2, 2)], ids=str)
def test_opcheck(shape, layout, dtype):
    *tensors, grad = operands(shape, dtype, layout)
    code = ACTIVATIONS["relu6"]
    _, mean, variance = OPS.batch_norm_act(*tensors, EPS, code)
    for given in (tensors, [tensors[0], None, None]):
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        torch.library.opcheck(OPS.batch_norm_act.default, (*leaves, EPS, code))
        for needs in (0, 1, 7):
            arguments = grad, *given, mean, variance, EPS, code, needs
            torch.library.opcheck(OPS.batch_norm_act_backward.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_training_compiles_into_one_graph(fresh_compiler, layout):
    *tensors, grad = operands((2, 6, 5, 4), layout=layout)
    tensors = [t.requires_grad_() for t in tensors]

    def loss(*arguments):
        return (OPS.batch_norm_act(*arguments, EPS, ACTIVATIONS["relu6"])[0] * grad).sum()

    eager = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    for got, expected in zip(compiled, eager, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


def test_autocast_computes_in_the_dtype_given():
    *tensors, _ = operands((2, 6, 5, 4))
    plain = OPS.batch_norm_act(*tensors, EPS, 1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm.batch_norm_act(*tensors, EPS, 1)[0], plain)


def test_it_counts_no_operations():
    tensors = [t.requires_grad_() for t in operands((2, 6, 5, 4))[:3]]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        norm.batch_norm_act(*tensors, EPS, 1)[0].sum().backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (0, torch.ones(4), "input"),
        (0, torch.ones(0, 4, 3), "input"),
        (0, torch.ones(2, 4, 3, dtype=torch.int64), "input"),
        (1, torch.ones(3), "weight"),
        (1, torch.ones(4).double(), "weight"),
        (2, torch.ones(4, 1), "bias"),
        (3, -1.0, "eps"),
        (4, 5, "activation"),
    ],
)
def test_wrong_operands_are_named(place, value, named):
    arguments = [torch.ones(2, 4, 3), torch.ones(4), torch.ones(4), EPS, 0]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=rf"\b{named}\b"):
        OPS.batch_norm_act(*arguments)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (0, torch.ones(2, 4, 4), "grad"),
        (0, torch.ones(2, 4, 3).double(), "grad"),
        (4, torch.ones(3), "mean"),
        (5, torch.ones(4).double(), "variance"),
    ],
)
def test_wrong_operands_of_the_gradient_are_named(place, value, named):
    image, vector = torch.ones(2, 4, 3), torch.ones(4)
    arguments = [image, image, vector, vector, vector, vector, EPS, 0, 7]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=rf"\b{named}\b"):
        OPS.batch_norm_act_backward(*arguments)
