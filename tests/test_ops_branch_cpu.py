# SPDX-License-Identifier: BSD-3-Clause
"""The CPU kernels behind channel_sums and branch: every instruction set, odd sizes, accuracy, same bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dcd_kernels import extension

if not extension.LOADED:
    pytest.skip(extension.REASON, allow_module_level=True)

from cases import assert_close_to_truth
from operands import ISAS, instruction_set, threads
from test_ops_branch import EVERY, call, leaves, operands

from dcd_kernels.nn.branch import GATES, LAM_ACTIVATIONS
from dcd_kernels.ops import branch as ops
from dcd_kernels.ops import branch_gradients

each_isa = pytest.mark.parametrize("isa", ISAS)
OP = torch.ops.dcd_kernels.branch_backward.default
SPREAD = torch.ops.dcd_kernels.quadrants_backward.default


def plain(tensors, gate, lam_activation, lam_channels, scale):
    """The branch in torch's operators, in the dtype of the tensors."""
    sums, w1, b1, wg, bg, w2, b2, w3, b3 = tensors
    hidden = F.linear(sums.sum(1) * scale, w1, b1)
    if gate == "se":
        hidden = hidden * LAM_ACTIVATIONS["hardsigmoid2"][0](F.linear(hidden, wg, bg))
    else:
        hidden = GATES[gate](hidden)
    logits = F.linear(hidden, w2, b2)
    phi = logits[:, lam_channels:] if w3 is None else F.linear(hidden, w3, b3)
    return LAM_ACTIVATIONS[lam_activation][0](logits[:, :lam_channels]), phi


def with_gradients(function, tensors):
    """λ, Φ and the gradients of everything, given random ones of λ and Φ."""
    outputs = function(tensors)
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves(tensors), given)]


def in_double(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def of_usual_size(tensors):
    """Products of the size that a network has, with some beyond every kink."""
    return [
        None if t is None else (t.detach() * (2 / t.shape[-1] ** 0.5 if t.dim() > 1 else 1)).requires_grad_()
        for t in tensors
    ]


def check_against_truth(tensors, gate, lam_activation, lam_channels, scale):
    options = gate, lam_activation, lam_channels, scale
    mine = with_gradients(lambda ts: call(ts, *options), tensors)
    torchs = with_gradients(lambda ts: plain(ts, *options), tensors)
    truth = with_gradients(lambda ts: plain(ts, *options), in_double(tensors))
    for i, (got, peer, right) in enumerate(zip(mine, torchs, truth, strict=True)):
        assert_close_to_truth(got, peer, right, f"result {i}")


SIZES = [
    # N, T, I, hidden, lam_channels, the others: around vectors, panels and blocks of samples; sums longer
    # than a run of additions
    (1, 1, 1, 1, 1, 0),
    (1, 3, 7, 5, 4, 6),
    (1, 1, 257, 16, 8, 33),
    (1, 1, 530, 70, 30, 49),
    (2, 1, 16, 16, 16, 16),
    (3, 16, 130, 17, 0, 9),
    (4, 1, 33, 4, 31, 1),
    (5, 2, 40, 129, 3, 130),
    (6, 1, 64, 12, 70, 49),
    (7, 1, 2100, 20, 5, 17),
    (13, 1, 96, 33, 65, 100),
]


@each_isa
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("gate", ["relu", "se"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, gate, split, isa):
    split = split and sizes[4] > 0 and sizes[5] > 0
    tensors = of_usual_size(operands(gate, sizes=sizes, split=split, bias=sizes[0] % 2 == 1))
    with instruction_set(isa):
        check_against_truth(tensors, gate, "hardsigmoid2", sizes[4], 0.7)


@each_isa
@pytest.mark.parametrize(("gate", "lam_activation"), EVERY)
def test_formula(gate, lam_activation, isa):
    tensors = operands(gate, sizes=(3, 2, 24, 19, 21, 6))
    with instruction_set(isa):
        check_against_truth(of_usual_size(tensors), gate, lam_activation, 21, 0.5)


@each_isa
@pytest.mark.parametrize("gate", ops.GATES)
def test_kinks_and_extremes(gate, isa):
    """At the kinks torch's slopes, far beyond them no NaN; a NaN stays in its sample."""
    points = [-1e4, -100, -6, -3, -0.0, 0.0, 3, 6, 100, 1e4]
    for lam_activation in ops.LAM_ACTIVATIONS:
        one = torch.ones(1, 1)
        gated = one * 0.5 if gate == "se" else None
        tensors = [torch.tensor(points).view(-1, 1, 1), one, None, gated, None, torch.ones(2, 1)] + [None] * 3
        tensors = [None if t is None else t.requires_grad_() for t in tensors]
        with instruction_set(isa):
            mine = with_gradients(lambda ts, a=lam_activation: call(ts, gate, a, 1, 1.0), tensors)
            poisoned = [torch.where(tensors[0] == 3, torch.nan, tensors[0].detach()), *tensors[1:]]
            for out in call(poisoned, gate, lam_activation, 1, 1.0):
                assert torch.equal(out.isnan().flatten(), torch.tensor(points) == 3)
        torchs = with_gradients(lambda ts, a=lam_activation: plain(ts, gate, a, 1, 1.0), tensors)
        for got, right in zip(mine, torchs, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


def test_strided_operands_and_expanded_gradients():
    tensors = [
        None if t is None else torch.stack((t.detach(), t.detach()), -1)[..., 1].requires_grad_()
        for t in of_usual_size(operands("se", split=True))
    ]
    assert not tensors[1].is_contiguous()
    results = []
    for function in (call, plain):
        lam, phi = function(tensors, "se", "sigmoid2", 4, 0.5)
        results.append([lam, phi, *torch.autograd.grad(lam.sum() + phi.sum(), leaves(tensors))])
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@each_isa
@pytest.mark.parametrize("gate", ["silu", "se"])
def test_same_bits(gate, isa):
    """Whatever the number of threads, which decides how many samples are taken at once."""
    for batch in (1, 4, 13):
        tensors = of_usual_size(operands(gate, sizes=(batch, 2, 640, 45, 300, 209), split=True))
        runs = []
        with instruction_set(isa):
            for count in (1, 2, 3, 2):
                with threads(count):
                    runs.append(with_gradients(lambda ts: call(ts, gate, "sigmoid", 300, 0.1), tensors))
            alone = call([tensors[0][-1:], *tensors[1:]], gate, "sigmoid", 300, 0.1)
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
        assert all(torch.equal(a[0], b[-1]) for a, b in zip(alone, runs[0], strict=False))


# --- the op of the gradients


def gradient_call(gate="se", split=True, needs=511, drop=(), dtype=torch.float32, weights=None):
    tensors = [
        None if t is None else t.detach() for t in operands(gate, split=split, dtype=dtype, weights=weights)
    ]
    sums, w1, b1, wg, bg, w2, _, w3, _ = tensors
    lam, phi = call(tensors, gate)
    given = [None if i in drop else torch.randn_like(t) for i, t in enumerate((lam, phi))]
    absent = [i for i, t in enumerate(tensors) if t is None]
    needs &= ~sum(1 << i for i in absent)
    return [*given, lam, sums, 0.25, w1, b1, wg, bg, w2, w3, ops.GATES.index(gate), 1, needs]


@each_isa
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("drop", [(), (0,), (1,), (0, 1)], ids=str)
def test_kernel_and_composition_agree(drop, split, isa):
    for gate in ops.GATES:
        args = gradient_call(gate, split, drop=drop)
        with instruction_set(isa):
            mine = OP(*args)
        for got, right in zip(mine, branch_gradients._op_as_composition(*args), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for():
    whole = OP(*gradient_call())
    for i in range(9):
        torch.manual_seed(0)
        for j, (got, right) in enumerate(zip(OP(*gradient_call(needs=1 << i)), whole, strict=True)):
            assert got.shape == (right.shape if i == j else (0,))


def test_gradients_of_an_empty_batch():
    tensors = operands("se", sizes=(0, 2, 7, 5, 4, 6), split=True)
    for gradient in with_gradients(lambda ts: call(ts, "se"), tensors)[3:]:
        assert gradient.numel() and (gradient == 0).all()


@pytest.mark.parametrize("weights", [None, torch.bfloat16])
def test_opcheck_of_the_gradients(weights):
    for drop in ((), (0,), (1,)):
        torch.library.opcheck(OP, tuple(gradient_call(drop=drop, weights=weights)))
    args = gradient_call(dtype=torch.float64)
    args = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    torch.library.opcheck(OP, tuple(args))


def test_the_gradients_can_be_differentiated():
    args = gradient_call(dtype=torch.float64)
    args[12] = ops.LAM_ACTIVATIONS.index("sigmoid2")  # smooth in λ, which is an argument of its own here
    places = [i for i, t in enumerate(args) if isinstance(t, torch.Tensor)]
    given = [args[i].requires_grad_() for i in places]

    def function(*tensors):
        call_ = list(args)
        for i, t in zip(places, tensors, strict=True):
            call_[i] = t
        return OP(*call_)

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, torch.zeros(3), "lam must have 2 dimensions"),
        (2, torch.zeros(2, 4), r"lam must have shape \(3, 4\), got \(2, 4\)"),
        (2, torch.zeros(3, 5), "lam_channels must be from 0 to the rows of expand_weight, 4, got 5"),
        (2, torch.zeros(3, 3), "lam_channels must be the rows of expand_weight, 4, .* got 3"),
        (2, torch.zeros(3, 4).double(), "lam must have the dtype of sums, Float, got Double"),
        (0, torch.zeros(3, 5), r"d_lam must have shape \(3, 4\), got \(3, 5\)"),
        (1, torch.zeros(3, 5), r"d_phi must have shape \(3, 6\), got \(3, 5\)"),
        (1, torch.zeros(3, 6).half(), "d_phi must have the dtype of sums, Float, got Half"),
        (5, torch.zeros(5, 8), r"squeeze_weight must have shape \(5, 7\), got \(5, 8\)"),
        (11, 9, "gate must be a code from 0 to 5, got 9"),
    ],
)
def test_bad_gradients(place, value, message):
    args = gradient_call()
    args[place] = value
    with pytest.raises(RuntimeError, match=message):
        OP(*args)


# --- channel sums

MAPS = [(1, 1), (1, 9), (5, 1), (7, 7), (14, 13), (33, 31), (112, 3)]
CHANNELS = [1, 3, 4, 5, 8, 17, 64, 130, 300]


def layouts(x):
    """The same values contiguous, channels-last, and as slices of either whose rows are not aligned."""
    n, c, h, w = x.shape
    window = torch.full((n, c + 1, h, w), torch.nan, dtype=x.dtype)[:, 1:]
    last = torch.full((n, c + 3, h, w), torch.nan, dtype=x.dtype).to(memory_format=torch.channels_last)
    rows = torch.full((n, c, h + 1, w + 2), torch.nan, dtype=x.dtype)[:, :, 1:, 1:-1]
    slices = window, last[:, 2:-1], rows
    for like in slices:
        like.copy_(x)
    return x, x.to(memory_format=torch.channels_last), *slices


@each_isa
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_sums_of_every_layout(size, channels, isa):
    """NaN around the slices would be seen."""
    x = torch.randn(2, channels, *size) + 0.5
    wanted = x.sum((2, 3)), F.adaptive_avg_pool2d(x, 2).flatten(1)
    truth = x.double().sum((2, 3)), F.adaptive_avg_pool2d(x.double(), 2).flatten(1)
    bin_pixels = -(-size[0] // 2) * -(-size[1] // 2)
    with instruction_set(isa):
        for image in layouts(x):
            assert_close_to_truth(ops.channel_sums(image).sum(1), wanted[0], truth[0])
            means = ops.channel_sums(image, 2).sum(1) / bin_pixels
            assert_close_to_truth(means, wanted[1], truth[1])


@each_isa
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_long_sums_keep_their_digits(layout, isa):
    """A million pixels of one sign: adding them up one after the other would lose three digits."""
    x = (torch.rand(1, 3, 1200, 1000) + 1).to(memory_format=layout)
    right = x.double().sum((2, 3))
    with instruction_set(isa):
        for bins in (1, 2):
            sums = ops.channel_sums(x, bins).double().sum(1).view(1, 3, -1).sum(2)
            assert ((sums - right).abs() <= 4 * torch.finfo(torch.float32).eps * right).all()


@each_isa
@pytest.mark.parametrize("shape", [(3, 37, 61, 40), (2, 600, 14, 14), (1, 8, 112, 112)], ids=str)
def test_same_bits_of_sums(shape, isa):
    """Whatever the number of threads."""
    for image in layouts(torch.randn(shape)):
        gradient = torch.randn_like(ops.channel_sums(image, 2))
        runs = []
        for count in (1, 2, 3):
            with instruction_set(isa), threads(count):
                sums = [ops.channel_sums(image, bins) for bins in (1, 2)]
                runs.append([*sums, *(SPREAD(gradient, *shape[2:], last) for last in (False, True))])
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 5, 33])
@pytest.mark.parametrize("size", [*MAPS, (75, 60)], ids=str)
def test_gradient_of_quadrants_is_the_composition(size, channels, dtype, isa):
    """To the bit, of every tile and of one gradient for all of them, in both layouts."""
    tiles = ops.channel_sums(torch.zeros(1, 1, *size), 2).shape[1]
    for count in {1, tiles}:
        grad = torch.randn(2, count, 4 * channels, dtype=dtype)
        for last in (False, True):
            wanted = ops._spread_quadrants(grad, *size, last)
            for given in (grad, torch.stack((grad, grad), -1)[..., 1]):
                with instruction_set(isa):
                    got = SPREAD(given, *size, last)
                assert torch.equal(got, wanted) and got.stride() == wanted.stride()


def test_gradient_of_no_quadrants():
    assert SPREAD(torch.zeros(0, 1, 8), 4, 4, False).shape == (0, 2, 4, 4)
    assert SPREAD(torch.zeros(2, 1, 0), 4, 4, True).shape == (2, 0, 4, 4)
    assert SPREAD(torch.zeros(2, 1, 8), 0, 4, True).shape == (2, 2, 0, 4)


def test_opcheck_of_the_gradient_of_quadrants():
    for size, tiles, last in (((5, 4), 1, True), ((75, 60), 8, False)):
        grad = torch.randn(2, tiles, 12, requires_grad=True)
        torch.library.opcheck(SPREAD, (grad, *size, last))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 8), 4, 4, False), "grad must have 3 dimensions"),
        ((torch.zeros(2, 1, 6), 4, 4, False), "grad must have 4 sums a channel in 1 or 1 tiles, got 6 sums"),
        ((torch.zeros(2, 3, 8), 75, 60, False), "in 1 or 8 tiles, got 8 sums in 3 tiles"),
        ((torch.zeros(2, 1, 8), 4, -1, False), "height and width must not be negative, got 4 and -1"),
        ((torch.zeros(2, 1, 8).int(), 4, 4, False), "must be float32, float64, float16 or bfloat16"),
    ],
)
def test_bad_gradient_of_quadrants(args, message):
    with pytest.raises(RuntimeError, match=message):
        SPREAD(*args)
