# SPDX-License-Identifier: BSD-3-Clause
"""What a forward does besides what torch.fx sees of it, and what is so for one example of an input alone."""

import copy
import gc
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from graphs import Net, chain, conv, dcd, norm
from runs import image
from torch import nn

import dcd_kernels

X = image(2, 3, 16, 16)


def check(network: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """Call by call what a copy of ``network`` gives; -> what is optimised."""
    written = copy.deepcopy(network.eval())
    optimised = dcd_kernels.optimize_for_inference(network)
    with torch.no_grad():
        for input in inputs:
            torch.testing.assert_close(optimised(input), written(input), rtol=1e-4, atol=1e-5)
    return optimised


# --- state


def test_statistics_that_training_mode_renews():
    """Norms write to them without their versions being counted."""
    optimised = dcd_kernels.optimize_for_inference(chain(conv(3, 16), norm(16)).eval())
    with torch.no_grad():
        before = optimised(X)
        optimised.train()
        optimised.written(5 * X + 1)
        optimised.eval()
        torch.testing.assert_close(optimised(X), optimised.written(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(optimised(X), before, rtol=1e-2)


@pytest.mark.parametrize(
    ("forward", "value", "other"),
    [
        (lambda s, x: s.a(x) * 10 if s.option else s.a(x), torch.tensor(False), True),
        (lambda s, x: s.a(x) * s.option.item(), torch.tensor(2.0), 5.0),
        (lambda s, x: s.a(x) * int(s.option), torch.tensor(2), 3),
    ],
    ids=["flag", "number", "integer"],
)
def test_buffers_that_a_forward_branches_on(forward, value, other):
    network = Net(forward, a=conv(3, 8))
    network.register_buffer("option", value)
    optimised = check(network, X)
    optimised.option.fill_(other)
    with torch.no_grad():
        torch.testing.assert_close(optimised(X), optimised.written(X), rtol=1e-4, atol=1e-5)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.a(x) * self.calls


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.before = conv(3, 8), None

    def forward(self, x):
        output = self.a(x)
        result = output if self.before is None else output + self.before
        self.before = output
        return result


@pytest.mark.parametrize("make", [Counting, Remembering])
def test_state_between_calls(make):
    optimised = check(make(), X, X + 1, X, 2 * X)
    fresh = dcd_kernels.optimize_for_inference(make().eval())
    assert getattr(fresh, "calls", torch.zeros(())) == 0, "the examples were counted"
    assert getattr(fresh.written, "before", None) is None
    pickle.loads(pickle.dumps(optimised))  # nothing of the tracer is left in it


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 8)

    def forward(self, x):
        return self.a(x) + torch.rand(1, device=x.device)


def test_random_numbers_are_drawn_at_every_call():
    network = Drawing().eval()
    state = torch.get_rng_state()
    optimised = dcd_kernels.optimize_for_inference(network)
    assert torch.equal(state, torch.get_rng_state()), "the examples drew numbers"
    assert not torch.equal(optimised(X), optimised(X))


# --- what a forward asks of its input


def _half_precision(s, x):
    with torch.autocast("cpu", torch.bfloat16):
        return s.a(x)


def _half_precision_inside(s, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = s.a(x)
    return s.b(y.float())


@pytest.mark.parametrize(
    "forward",
    [
        _half_precision,
        _half_precision_inside,
        lambda s, x: s.b(s.a((x - 0.5) / 0.25 if isinstance(x, torch.Tensor) else x)),
        lambda s, x: s.b(s.a(2 * x if torch.is_tensor(x) else x)),
        lambda s, x: s.b(s.a(x.tensors if hasattr(x, "tensors") else x)),
    ],
    ids=["autocast", "autocast inside", "isinstance", "is_tensor", "hasattr"],
)
def test_what_a_proxy_answers_otherwise(forward):
    network = Net(forward, a=conv(3, 8), b=conv(8, 8))
    optimised = check(network, X, image(1, 3, 9, 20))
    assert "torch.fx" in str(dcd_kernels.report(optimised))


class _Doubling(nn.Module):
    """Writes to its input, which no attribute says."""

    def forward(self, x):
        if x.shape[1] == 16:
            x *= 2
        return x


def test_a_module_that_writes_in_place():
    def forward(s, x):
        y = s.a(x)
        same = s.i(y)
        return s.b(s.q(y)) + same

    check(Net(forward, a=conv(3, 16), i=nn.Identity(), q=_Doubling(), b=conv(16, 16)), X)


# --- what is so for one batch or one size


class _Gated(nn.Module):
    """``y + g(mean(y))``: equal shapes where the image is one pixel."""

    def __init__(self, layers):
        super().__init__()
        self.body = chain(*(conv(8 if i else 3, 8, stride=2) for i in range(layers)))
        self.gate = conv(8, 8, 1)

    def forward(self, x):
        y = self.body(x)
        return y + self.gate(y.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("layers", [5, 6, 7])
def test_a_sum_of_equal_shapes_by_chance(layers):
    inputs = [image(1, 3, 32, 32), image(1, 3, 256, 256), image(2, 3, 160, 32)]
    optimised = check(_Gated(layers), *inputs)
    again = pickle.loads(pickle.dumps(optimised))  # which makes its plan for the first input
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(again(x), optimised.written(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_a_parameter_with_as_many_rows_as_samples(rows):
    network = Net(lambda s, x: s.a(x).mean((2, 3)) @ s.p(s.e).t(), a=conv(3, 8), p=nn.Linear(6, 8))
    network.e = nn.Parameter(torch.randn(rows, 6))
    check(network, X, image(3, 3, 16, 16), image(1, 3, 8, 30))


BATCHES = {
    "rows of pixels": lambda: Net(
        lambda s, x: (lambda y: (s.l(y.permute(0, 2, 3, 1).reshape(-1, 8)), s.f(y.mean((2, 3)))))(s.a(x)),
        a=conv(3, 8),
        l=nn.Linear(8, 4),
        f=nn.Linear(8, 4),
    ),
    "less the first sample": lambda: Net(lambda s, x: s.b(s.a(x) - s.a(x[:1])), a=conv(3, 8), b=conv(8, 8)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_parts_of_other_batches(name):
    check(BATCHES[name](), X, image(3, 3, 16, 16), image(1, 3, 8, 30))


def test_mirrored_images():
    """A batch of twice as many images is one, too."""

    def forward(s, x):
        both = s.b(F.relu(s.a(torch.cat([x, x.flip(3)]))))
        one, other = both.chunk(2)
        return s.c(one + other.flip(3))

    network = Net(forward, a=conv(3, 18), b=dcd(18, 18), c=conv(18, 5))
    optimised = check(network, X, image(1, 3, 9, 30), image(5, 3, 16, 16))
    taken = {entry.name for entry in dcd_kernels.report(optimised).taken}
    assert taken == {"a", "b", "c"}


def test_one_sample_alone():
    network = Net(
        lambda s, x: s.l(s.p(s.a(x)).view(1, 8)), a=conv(3, 8), p=nn.AdaptiveAvgPool2d(1), l=nn.Linear(8, 4)
    )
    optimised = check(network, image(1, 3, 16, 16), image(1, 3, 20, 16))
    assert "no other batch" in str(dcd_kernels.report(optimised))
    for size in range(8, 20):
        x = image(1, 3, size, 9)
        torch.testing.assert_close(optimised(x), optimised.written(x))


def test_groups_of_four_samples():
    network = Net(lambda s, x: s.b(s.a(x).unflatten(0, (-1, 4)).mean(1)), a=conv(3, 8), b=conv(8, 8))
    check(network, image(8, 3, 16, 16), image(4, 3, 9, 9))


def test_a_bad_input_first():
    """It is no reason to run all others as they are written."""
    optimised = dcd_kernels.optimize_for_inference(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval())
    with pytest.raises(RuntimeError):
        optimised(torch.zeros(2, 3, 5, 5))
    x = image(2, 3, 4, 4)
    torch.testing.assert_close(optimised(x), optimised.written(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer",
    [lambda: dcd(8, 6, 1, pool_size=2), lambda: dcd(8, 6, 3), lambda: conv(8, 6, 1)],
    ids=["pooling branch", "3×3", "static"],
)
def test_an_activation_of_a_sum_of_means(layer, dtype):
    """A vector, behind which a layer that reads images has to know that its image is one pixel."""

    def forward(s, x):
        q = F.relu(s.a(x).mean((2, 3), keepdim=True) + s.b(x).mean((2, 3), keepdim=True))
        return s.c(q) + s.d(q) + s.e(q)

    network = Net(forward, a=conv(3, 8), b=conv(3, 8), c=layer(), d=conv(8, 6, 1), e=nn.Conv2d(8, 6, 1))
    for linear in network.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight)
    network = network.to(dtype).eval()
    optimised = dcd_kernels.optimize_for_inference(network)
    with torch.no_grad():
        got, truth = optimised(X.to(dtype)), copy.deepcopy(network).double()(X.to(dtype).double())
    assert (got.double() - truth).norm() <= 16 * torch.finfo(dtype).eps * truth.norm()


def test_a_vector_beside_an_image_of_one_pixel():
    def forward(s, x):
        q = F.relu(s.a(x).mean((2, 3), keepdim=True) + s.b(x).mean((2, 3), keepdim=True))
        return s.c(q) + q

    network = Net(forward, a=conv(3, 8), b=conv(3, 8), c=conv(8, 8, 1)).bfloat16().eval()
    optimised = dcd_kernels.optimize_for_inference(network)
    with torch.no_grad():
        torch.testing.assert_close(optimised(X.bfloat16()), network(X.bfloat16()), rtol=0.03, atol=0.03)


def test_nothing_is_left_of_the_examples():
    optimised = dcd_kernels.optimize_for_inference(chain(conv(3, 43), nn.ReLU(), conv(43, 43)).eval())
    assert optimised.plan is not None
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dim() == 4]
    assert not [tensor.shape for tensor in tensors if tensor.shape[1] == 43 and tensor.shape[2] > 8]


# --- where it is called


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype(dtype):
    network = chain(conv(3, 40), norm(40), nn.ReLU(), dcd(40, 8)).eval()
    expected = network(X).detach()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = dcd_kernels.optimize_for_inference(network)(X)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_default_dtype(before)


def test_default_device():
    network = chain(conv(3, 40), norm(40), nn.ReLU(), dcd(40, 8)).eval()
    expected = network(X).detach()
    with torch.device("meta"):
        got = dcd_kernels.optimize_for_inference(network)(X)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_tensors_of_inference_mode():
    network = chain(conv(3, 8), norm(8)).eval()
    other = chain(conv(3, 8), norm(8)).eval()
    with torch.inference_mode():
        optimised = dcd_kernels.optimize_for_inference(network)
        optimised.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(optimised(X), other(X), rtol=1e-4, atol=1e-5)
        optimised.bfloat16()
        assert optimised(X.bfloat16()).dtype is torch.bfloat16
        optimised.float()
        assert all(isinstance(parameter, nn.Parameter) for parameter in optimised.parameters())
        optimised.get_submodule("0").weight.mul_(2)
        torch.testing.assert_close(optimised(X), optimised.written(X), rtol=1e-4, atol=1e-5)


# --- what it returns


@pytest.mark.parametrize(
    "pack",
    [
        lambda y, z: [y, z],
        lambda y, z: {"one": y, "two": [z]},
        lambda y, z: OrderedDict(z=z, a=(y, None, 3)),
    ],
    ids=["list", "dict", "OrderedDict"],
)
def test_containers_are_the_written_ones(pack):
    network = Net(lambda s, x: (lambda y: pack(y, s.b(y)))(s.a(x)), a=conv(3, 8), b=conv(8, 4)).eval()
    optimised = dcd_kernels.optimize_for_inference(network)
    got, again, right = optimised(X), optimised(X), network(X)
    torch.testing.assert_close(got, torch.utils._pytree.tree_map(_detached, right), rtol=1e-4, atol=1e-5)
    assert type(got) is type(right) and got is not again
    if isinstance(got, list):
        got.append(1)  # the caller's own
        assert len(optimised(X)) == 2
    else:
        assert list(got) == list(right) and [*map(type, got.values())] == [*map(type, right.values())]


def _detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value
