# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of the ops, first and higher order.

The three forward ops share one signature, (six factors, bias, residual, *geometry, activation), and
one structure: y = act(y1 + y2 + bias + residual), where y1 is the static term (lambda times W0 x, or
times the given static output) and y2 the low-rank term P Phi Q^T x, each linear in every one of its
factors. `Form` says which factor belongs to which term; the formulas below are written once for all.

* First order: G = act' dY here, everything behind it in the `*_backward` op.
* Second order: with H = sum_i <v_i, dF/dfactor_i>, F = <G, y>, H is the derivative of F along v. Since
  each term is linear in each factor, H is a sum of F's with one factor replaced by its v, so dH/dG is a
  sum of forward ops and dH/dfactor_j a sum of backward ops. They are ordinary differentiable calls,
  hence every higher order follows, also under torch.func.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..arguments import ACTIVATIONS

NONE, RELU, RELU6, SILU, HARDSWISH = (
    ACTIVATIONS[name] for name in (None, "relu", "relu6", "silu", "hardswish")
)

_FACTORS = 6
_BIAS, _RESIDUAL, _GEOMETRY = 6, 7, 8
_P, _PHI, _Q, _LAM = 2, 3, 4, 5
_HALF = (torch.float16, torch.bfloat16)


class Form(NamedTuple):
    """One op and its backward op, and where each factor enters.

    `static` and `low_rank` are the places of the factors in y1 and y2. `carrier` is the factor whose
    zero makes y1 vanish. `pairs` lists (factor of y1, factor of y2) so that each place occurs once in
    its column; a factor that is in both terms is paired with itself.
    """

    forward: Any
    backward: Any
    static: tuple[int, ...]
    low_rank: tuple[int, ...]
    carrier: int
    pairs: tuple[tuple[int | None, int], ...]


def convolution(forward, backward) -> Form:
    """Form of (input, weight, p, phi, q or r, lam): the input is in both terms."""
    pairs = ((0, 0), (1, _P), (_LAM, _PHI), (None, _Q))
    return Form(forward, backward, (0, 1, _LAM), (0, _P, _PHI, _Q), 1, pairs)


def addition(forward, backward) -> Form:
    """Form of (static, input, p, phi, q, lam): the terms share no factor."""
    pairs = ((0, 1), (_LAM, _P), (None, _PHI), (None, _Q))
    return Form(forward, backward, (0, _LAM), (1, _P, _PHI, _Q), 0, pairs)


def _without_autocast(device_type: str):
    # The gradients belong to the dtypes of the forward pass, whatever region backward() is called in.
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _needs(ctx, first: int) -> int:
    return sum(1 << i for i in range(_FACTORS) if ctx.needs_input_grad[1 + first + i])


def _behind_activation(form: Form, grad: Tensor, saved, geometry, activation: int) -> Tensor:
    """G = act' dY, in float32 where it would be rounded a second time in half precision."""
    if activation == NONE:
        return grad
    if activation == RELU:
        return torch.ops.aten.threshold_backward(grad, saved[-1], 0)
    if activation == RELU6:
        return torch.ops.aten.hardtanh_backward(grad, saved[-1], 0, 6)
    # Neither is invertible, and the pre-activation costs one image of memory: compute it again. In half
    # precision it was never rounded on the way forward, and its slope shall not be taken of a rounded one.
    if grad.dtype in _HALF:
        grad = grad.float()
        saved = [None if tensor is None else tensor.float() for tensor in saved]
    before = form.forward(*saved, *geometry, NONE)
    if activation == SILU:
        if torch.is_grad_enabled():  # aten's kernel has no derivative of its own
            sigmoid = before.sigmoid()
            return grad * (sigmoid * (1 + before * (1 - sigmoid)))
        return torch.ops.aten.silu_backward(grad, before)
    return torch.ops.aten.hardswish_backward(grad, before)


def make_formula(form: Form):
    """(setup_context, backward) of the forward op."""
    is_addition = 1 not in form.static

    def setup_context(ctx, inputs, output):
        *factors, bias, residual = inputs[:_GEOMETRY]
        activation = inputs[-1]
        ctx.geometry = tuple(inputs[_GEOMETRY:-1])
        ctx.activation = activation
        ctx.bias_like = None if bias is None else (bias.dim(), bias.dtype)
        ctx.residual_dtype = None if residual is None else residual.dtype
        recomputes = activation in (SILU, HARDSWISH)
        if is_addition and not recomputes:
            # Whole images that no gradient reads need not be kept alive.
            if factors[_LAM] is None:
                factors[0] = None
            if factors[_P] is None:
                factors[1] = None
        if recomputes:
            ctx.save_for_backward(*factors, bias, residual)
        elif activation == NONE:
            ctx.save_for_backward(*factors)
        else:
            ctx.save_for_backward(*factors, output)

    def backward(ctx, grad):
        with _without_autocast(grad.device.type):
            saved = ctx.saved_tensors
            factors = list(saved[:_FACTORS])
            gated = _behind_activation(form, grad, saved, ctx.geometry, ctx.activation)
            needs = _needs(ctx, 0)
            gradients: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 1)
            if is_addition and factors[_LAM] is None:
                # G itself is the static output's gradient; of that, the shape is all that is left to know.
                if needs & 1:
                    gradients[0] = gated.to(grad.dtype)
                needs &= ~1
                factors[0] = grad
            if is_addition and factors[_P] is None:
                needs &= ~2
                factors[1] = factors[0]
            if needs:
                computed = form.backward(gated, *factors, *ctx.geometry, needs)
                for index in range(_FACTORS):
                    if needs >> index & 1:
                        gradients[index] = computed[index]
            if ctx.needs_input_grad[1 + _BIAS]:
                dim, dtype = ctx.bias_like
                reduced = [axis for axis in range(gated.dim()) if axis != 1 and (dim == 1 or axis > 1)]
                gradients[_BIAS] = gated.sum(reduced, dtype=dtype)
            if ctx.needs_input_grad[1 + _RESIDUAL]:
                gradients[_RESIDUAL] = gated.to(ctx.residual_dtype)
            return tuple(gradients)

    return setup_context, backward


def make_pooled_formula(form: Form):
    """(setup_context, backward) of the forward op that also returns its output's channel sums."""
    setup_plain, backward_plain = make_formula(form)

    def setup_context(ctx, inputs, outputs):
        ctx.set_materialize_grads(False)
        ctx.output_like = outputs[0].shape
        setup_plain(ctx, inputs, outputs[0])

    def backward(ctx, grad, grad_sums):
        # the sums are of the activation's values, so their gradient passes through it too
        if grad_sums is not None:
            spread = grad_sums.reshape(*grad_sums.shape, *[1] * (len(ctx.output_like) - 2))
            dtype = ctx.saved_tensors[0].dtype
            spread = spread.to(dtype).expand(ctx.output_like)
            grad = spread if grad is None else grad + spread
        if grad is None:
            return (None,) * (len(ctx.needs_input_grad) - 1)
        return backward_plain(ctx, grad)

    return setup_context, backward


def make_second_formula(form: Form):
    """(setup_context, backward) of the backward op."""

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: 1 + _FACTORS])
        ctx.geometry = tuple(inputs[1 + _FACTORS : -1])
        ctx.given = inputs[-1]

    def backward(ctx, *directions):
        grad, *factors = ctx.saved_tensors
        directions = [v if ctx.given >> i & 1 else None for i, v in enumerate(directions)]
        wanted = _needs(ctx, 1)
        total: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 1)

        def add(place: int, term: Tensor) -> None:
            total[place] = term if total[place] is None else total[place] + term

        with _without_autocast(grad.device.type):
            for pair in form.pairs:
                along, live = _replace(form, factors, directions, pair)
                if along is None:
                    continue
                if ctx.needs_input_grad[1]:
                    add(0, form.forward(*along, None, None, *ctx.geometry, NONE).to(grad.dtype))
                needs = wanted & live
                if needs:
                    computed = form.backward(grad, *along, *ctx.geometry, needs)
                    for index in range(_FACTORS):
                        if needs >> index & 1:
                            add(1 + index, computed[index])
        return tuple(total)

    return setup_context, backward


def _replace(form: Form, factors, directions, pair) -> tuple[list[Tensor | None] | None, int]:
    """`factors` with the pair replaced by its directions, a term without direction dropped.

    Returns them with the mask of the factors that the remaining terms still depend on; None where
    no term remains.
    """
    along = list(factors)
    live = 0
    static_place, low_rank_place = pair
    keeps_static = static_place is not None and directions[static_place] is not None
    keeps_low_rank = factors[_P] is not None and directions[low_rank_place] is not None
    if not keeps_static and not keeps_low_rank:
        return None, 0
    if keeps_static:
        along[static_place] = directions[static_place]
        live |= sum(1 << place for place in form.static if place != static_place)
    else:
        along[form.carrier] = torch.zeros_like(factors[form.carrier])
        along[_LAM] = None
    if keeps_low_rank:
        along[low_rank_place] = directions[low_rank_place]
        live |= sum(1 << place for place in form.low_rank if place != low_rank_place)
    else:
        along[_P] = along[_PHI] = along[_Q] = None
    return along, live


def is_traced() -> bool:
    """Whether a compiler, a tracer or a torch.func transform looks on: they need the whole dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def needs_graph(*args) -> bool:
    """Whether a call with these arguments must be recorded, for backward or forward mode."""
    if forward_ad._current_level >= 0:
        # Nothing tells cheaply which tensors carry a tangent. autograd.Function looks, and raises
        # where one does: these ops have no forward-mode formula.
        return True
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def _redispatch(op, keyset, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


class _Unpacked:
    """A ctx whose saved tensors were asked for already.

    Unpacking may run code that has to be recorded: a checkpointed forward is computed again there.
    """

    def __init__(self, ctx, saved_tensors: tuple[Tensor | None, ...]) -> None:
        self._ctx, self.saved_tensors = ctx, saved_tensors

    def __getattr__(self, name: str):
        return getattr(self._ctx, name)


def make_function(op, setup_context, backward_formula) -> type[torch.autograd.Function]:
    """The autograd.Function of `op`: apply(keyset, *args), keyset None outside of the dispatcher.

    torch.library.register_autograd makes a similar one. This one also works below torch.func.grad,
    which enters its level in the dispatcher, and can be applied without the dispatcher's detour.
    """

    class Function(torch.autograd.Function):
        @classmethod
        def apply(cls, *args):
            # Straight to the C++ base class: the Python one refuses to run inside a torch.func level.
            apply = super(torch.autograd.Function, cls).apply
            if not torch._C._are_functorch_transforms_active():
                return apply(*args)
            with torch._functorch.autograd_function.enable_single_level_autograd_function():
                return apply(*args)

        @staticmethod
        def forward(ctx, keyset, *args):
            if keyset is None:
                with torch._C._AutoDispatchBelowAutograd():
                    output = op(*args)
            elif torch._C._are_functorch_transforms_active():
                # Gradients are off inside of forward, but only this level's: the levels below record.
                with torch.enable_grad():
                    output = _redispatch(op, keyset, args)
            else:
                output = _redispatch(op, keyset, args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(
                f"{op.name()} has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors); "
                "use reverse mode, or the plain PyTorch of dcd_kernels.use_backend('reference')"
            )

        @staticmethod
        def backward(ctx, *grads):
            if torch.is_grad_enabled() or is_traced():
                return (None, *backward_formula(ctx, *grads))
            unpacked = _Unpacked(ctx, ctx.saved_tensors)
            # Spares each op of the formula its way through the Python autograd kernel.
            with torch._C._AutoDispatchBelowAutograd():
                return (None, *backward_formula(unpacked, *grads))

    Function.__name__ = Function.__qualname__ = f"dcd_kernels::{op._opname}"
    return Function


def _make_kernel(op, function):
    def kernel(keyset, *args):
        if needs_graph(*args):
            return function.apply(keyset, *args)
        return _redispatch(op, keyset, args)

    return kernel


def register_composition(library: torch.library.Library, op, composition) -> None:
    """Registers what computes the same as a CPU-only `op` in torch's operations.

    It serves CUDA, and any device where the result is to be differentiated.
    """

    def kernel(keyset, *args):
        return composition(*args) if needs_graph(*args) else _redispatch(op, keyset, args)

    library.impl(op, kernel, "Autograd", with_keyset=True)
    library.impl(op, composition, "CUDA")


def register_op(library: torch.library.Library, op, formula) -> type[torch.autograd.Function]:
    """Registers (setup_context, backward) as the gradient of an op; returns its autograd.Function."""
    function = make_function(op, *formula)
    library.impl(op, _make_kernel(op, function), "Autograd", with_keyset=True)
    return function


def register(library: torch.library.Library, form: Form) -> type[torch.autograd.Function]:
    """Registers the gradient of both ops of a form; returns the forward op's autograd.Function."""
    register_op(library, form.backward, make_second_formula(form))
    return register_op(library, form.forward, make_formula(form))
