# SPDX-License-Identifier: BSD-3-Clause
"""The packed weights that layers keep: used in inference, never stale, never in the way of anything else."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import assert_close_to_truth
from torch import nn

import dcd_kernels as dcd
from dcd_kernels import extension, ops

pytestmark = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)


def _layer(kind: str, **options) -> nn.Module:
    torch.manual_seed(1)
    if kind == "linear":
        return dcd.nn.DCDLinear(24, 40, **options).eval()
    return getattr(dcd.nn, f"DCDConv{kind}d")(24, 40, 1, **options).eval()


def _image(kind: str, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = {"linear": (5, 24), "1": (24, 9), "2": (24, 7, 7), "3": (24, 2, 3, 5)}[kind]
    image = torch.randn(batch, *shape, generator=generator)
    return image if kind == "linear" else image.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture
def packed_calls(monkeypatch):
    """How often the op on packed weights was called."""
    calls = []
    original = ops.pointwise_packed

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(ops, "pointwise_packed", counted)
    return calls


def _right(layer: nn.Module, x: torch.Tensor) -> None:
    """Three calls, which the kernels for packed weights must have part in, against float64."""
    with dcd.use_backend("reference"):
        plain = layer(x)
        exact = copy.deepcopy(layer).double()(x.double())
    for _ in range(3):
        assert_close_to_truth(layer(x), plain, exact)


@pytest.mark.parametrize("kind", ("linear", "1", "2", "3"))
def test_inference_is_right_and_packed(kind, packed_calls):
    layer, x = _layer(kind, activation="relu6"), _image(kind)
    with torch.no_grad():
        _right(layer, x)
    assert len(packed_calls) == 2, "packed from the second call on"
    with torch.inference_mode():
        layer(x)
    assert len(packed_calls) == 3


@pytest.mark.parametrize("options", ({"channel_attention": False}, {"channel_fusion": False}), ids=str)
def test_each_term_alone(options, packed_calls):
    with torch.no_grad():
        _right(_layer("2", **options), _image("2"))
    assert len(packed_calls) == 2


def test_stride_padding_and_skip(packed_calls):
    layer, x = dcd.nn.DCDConv2d(24, 24, 1, stride=2, padding=1).eval(), _image("2")
    with torch.no_grad():
        _right(layer, x)
        wide = dcd.nn.DCDConv2d(24, 24, 1).eval()
        first = wide(x, x)
        torch.testing.assert_close(wide(x, x), first)
    assert len(packed_calls) == 3


@pytest.mark.parametrize(
    "layer",
    (
        dcd.nn.DCDConv2d(24, 24, 3, padding=1),
        dcd.nn.DCDConv2d(24, 24, 3, padding=1, groups=24),
        dcd.nn.DCDConv2d(24, 24, 1, groups=2),
        dcd.nn.DCDConv2d(24, 24, 1, blocks=2),
        dcd.nn.DCDConv2d(24, 24, 3, joint=True),
    ),
    ids=lambda layer: repr(layer).splitlines()[0],
)
def test_other_forms_keep_nothing(layer, packed_calls):
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            layer(_image("2"))
    assert not packed_calls


def _edit_under_no_grad(layer):
    with torch.no_grad():
        layer.weight.mul_(-2)


def _edit_q(layer):
    with torch.no_grad():
        layer.q[0, 0] += 1


def _edit_in_inference_mode(layer):
    with torch.inference_mode():
        layer.p.mul_(3)


def _step(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _load(layer):
    layer.load_state_dict({name: value * 1.5 for name, value in layer.state_dict().items()})


def _assign(layer):
    state = {name: value * 1.5 for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _swap_data(layer):
    layer.weight.data = layer.weight.data * 2


def _swap_data_back_and_forth(layer):
    # the second one is likely to be given the first one's memory
    layer.weight.data = layer.weight.data * 2
    layer.weight.data = layer.weight.data * 2


def _transpose_data(layer):
    layer.p.data = layer.p.data.flip(0).t().contiguous().t()


def _new_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() + 1)


def _through_data_and_eval(layer):
    layer.weight.data.mul_(2)
    layer.eval()


def _to_half_and_back(layer):
    layer.bfloat16().float()


@pytest.mark.parametrize(
    "edit",
    (
        _edit_under_no_grad,
        _edit_q,
        _edit_in_inference_mode,
        _step,
        _load,
        _assign,
        _swap_data,
        _swap_data_back_and_forth,
        _transpose_data,
        _new_parameter,
        _through_data_and_eval,
        _to_half_and_back,
    ),
)
@pytest.mark.parametrize("kind", ("linear", "2"))
def test_never_stale(kind, edit, packed_calls):
    layer, x = _layer(kind), _image(kind)
    with torch.no_grad():
        _right(layer, x)
        before = layer(x)
    edit(layer)
    with torch.no_grad():
        _right(layer, x)
        assert not torch.equal(layer(x), before)
    assert len(packed_calls) == 6, "packed again"


def test_a_square_weight_turned_in_place(packed_calls):
    """Same parameter, same address, same version: only the strides tell."""
    layer, x = dcd.nn.DCDConv2d(24, 24, 1).eval(), _image("2")
    with torch.no_grad():
        _right(layer, x)
        layer.weight.data = layer.weight.data.transpose(0, 1)
        _right(layer, x)


def test_double_and_half(packed_calls):
    layer, x = _layer("2"), _image("2")
    with torch.no_grad():
        _right(layer, x)
        _right(layer.double(), x.double())
        layer.bfloat16()
        outputs = [layer(x.bfloat16()) for _ in range(3)]
        assert all(torch.equal(outputs[0], other) for other in outputs[1:])
        assert len(packed_calls) == 4  # bfloat16 has kernels of its own, for plain weights
        layer.half()
        outputs = [layer(x.half()) for _ in range(3)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert len(packed_calls) == 6


def test_training_and_gradients_keep_nothing(packed_calls):
    layer, x = _layer("2"), _image("2")
    for _ in range(3):
        layer(x).sum().backward()
    layer.train()
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    layer.eval().requires_grad_(False)
    for _ in range(3):
        layer(x.requires_grad_()).sum().backward()
    assert not packed_calls
    assert layer._kept is None


def test_frozen_parameters_need_no_no_grad(packed_calls):
    layer, x = _layer("2").requires_grad_(False), _image("2")
    for _ in range(3):
        layer(x)
    assert len(packed_calls) == 2


@pytest.mark.parametrize("kind", ("2", "linear"))
def test_only_where_channels_are_innermost(kind, packed_calls):
    """Contiguous maps and single rows gain nothing; a layer may be given both in turn."""
    layer, x = _layer(kind), _image(kind)
    other = x[:, 0] if kind == "linear" else x.contiguous()
    with torch.no_grad():
        for _ in range(3):
            layer(other)
        assert layer._kept is None
        _right(layer, x)
        _right(layer, other)
        _right(layer, x)
    assert len(packed_calls) == 5


def test_can_be_turned_off(packed_calls):
    layer, x = _layer("2"), _image("2")
    layer.keep_packed = False
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert not packed_calls


def test_other_parameters_for_one_call_cost_no_packing(packed_calls):
    layer, x = _layer("2"), _image("2")
    others = [{name: value * factor for name, value in layer.named_parameters()} for factor in (2.0, 3.0)]
    with torch.no_grad():
        _right(layer, x)
        del packed_calls[:]
        for other in others:
            got = torch.func.functional_call(layer, other, (x,))
            fresh = _layer("2")
            fresh.load_state_dict(other)
            torch.testing.assert_close(got, fresh(x))
        assert not packed_calls
        _right(layer, x)


def test_recomputed_weights_are_not_kept(packed_calls):
    layer, x = _layer("2"), _image("2")
    with torch.no_grad():
        _right(layer, x)
        del packed_calls[:]
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
        for _ in range(3):
            layer(x)
    assert not packed_calls


def test_parameters_made_in_inference_mode(packed_calls):
    with torch.inference_mode():
        layer, x = _layer("2"), _image("2")
        before = [layer(x) for _ in range(3)][-1]
        layer.weight.mul_(2)
        assert not torch.equal(layer(x), before)
    assert not packed_calls


@pytest.mark.parametrize("twin", (copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))))
def test_copies_start_without(twin, packed_calls):
    layer, x = _layer("2"), _image("2")
    with torch.no_grad():
        _right(layer, x)
        other = twin(layer)
        assert other._kept is None
        assert layer._kept is not None
        _right(other, x)
        torch.testing.assert_close(other(x), layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert not any("kept" in name or "packed" in name for name in layer.state_dict())


def test_threads_share_a_layer(packed_calls):
    layer, x = _layer("2"), _image("2")

    def run(_):
        with torch.no_grad():
            return layer(x)

    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(run, range(60)):
            torch.testing.assert_close(result, expected)
    _edit_under_no_grad(layer)
    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(run, range(60)):
            torch.testing.assert_close(result, expected)


def test_compiled_whole(fresh_compiler, packed_calls):
    layer, x = _layer("2"), _image("2")
    with torch.no_grad():
        _right(layer, x)
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        _edit_under_no_grad(layer)
        torch.testing.assert_close(compiled(x), layer(x))


def test_transforms_and_modes_see_the_plain_operator(packed_calls):
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = _layer("2"), _image("2")
    with torch.no_grad():
        counts = []
        for _ in range(3):
            with FlopCounterMode(display=False) as counter:
                layer(x)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] == counts[2] > 0
        for _ in range(3):
            torch.func.vmap(lambda image: layer(image[None]))(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == layer(x).dtype == torch.bfloat16
    assert not packed_calls


def test_explain_is_told_of_the_layer(packed_calls):
    layer, x = _layer("2"), _image("2")
    with torch.no_grad():
        _right(layer, x)
    assert "pointwise" in str(dcd.explain(layer, x))
