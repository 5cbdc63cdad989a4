# SPDX-License-Identifier: BSD-3-Clause
"""The op latent_map: norms on the latent as an affine map of it, on the CPU in one call each way.

Its first gradients are an op of their own; the gradient of that one is the composition's, which can be
differentiated again. There is no autocast rule: results have the dtype of phi in every region.
"""

import contextlib

import torch
from torch import Tensor

from .. import latent_map as composition
from ..latent_map import BATCH, Norm
from . import autograd
from .calls import call

_op = torch.ops.dcd_kernels.latent_map.default
_backward_op = torch.ops.dcd_kernels.latent_map_backward.default

# Places among the arguments of latent_map: phi, mean and covariance; two norms, each three numbers and four
# tensors; latent_bias and residual.
_NORM1, _NORM2, _LATENT_BIAS, _COUNT = 3, 10, 17, 19
#: The differentiable ones, in the order in which latent_map_backward returns their gradients.
_PLACES = (0, 1, 2, _NORM1 + 3, _NORM1 + 4, _NORM2 + 3, _NORM2 + 4, _LATENT_BIAS)


def _without_autocast(device_type: str):
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _fake(*args) -> tuple[Tensor, Tensor, Tensor]:
    phi = args[0]
    batch, latent = phi.shape[:2]
    tracked = (args[_NORM1] == BATCH) + (args[_NORM2] == BATCH)
    return (
        phi.new_empty((batch, latent, latent)),
        phi.new_empty((batch, latent)),
        phi.new_empty((2 * tracked, latent)),
    )


def _backward_fake(grad_mapped, grad_shift, *args) -> tuple[Tensor, ...]:
    phi, needs = args[0], args[-1]
    gradients = []
    for bit, place in enumerate(_PLACES):
        tensor = args[place]
        wanted = tensor is not None and needs >> bit & 1
        gradients.append(tensor.new_empty(tensor.shape) if wanted else _nothing(phi, tensor))
    return tuple(gradients)


def _nothing(phi: Tensor, tensor: Tensor | None) -> Tensor:
    return phi.new_empty((0,), dtype=phi.dtype if tensor is None else tensor.dtype)


def _tensors(args) -> tuple:
    return (*args[:3], *args[6:10], *args[13:18])


def _others(args) -> tuple:
    return args[3:6], args[10:13], args[18]


def _joined(tensors, others) -> tuple:
    """The arguments of which these are `_tensors` and `_others`."""
    norm1, norm2, residual = others
    return (*tensors[:3], *norm1, *tensors[3:7], *norm2, *tensors[7:], residual)


def _setup(ctx, args, outputs):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(outputs[2])
    ctx.save_for_backward(*_tensors(args))
    ctx.others = _others(args)


def _backward(ctx, grad_mapped, grad_shift, _):
    gradients = [None] * _COUNT
    if grad_mapped is None and grad_shift is None:
        return tuple(gradients)
    needed = ctx.needs_input_grad
    needs = 0
    for bit, place in enumerate(_PLACES):
        if needed[1 + place]:
            needs |= 1 << bit
    found = _backward_op(grad_mapped, grad_shift, *_joined(ctx.saved_tensors, ctx.others), needs)
    for bit, place in enumerate(_PLACES):
        if needed[1 + place]:
            gradients[place] = found[bit]
    return tuple(gradients)


def _second_setup(ctx, args, outputs):
    ctx.set_materialize_grads(False)
    *inputs, ctx.needs = args
    ctx.save_for_backward(*inputs[:2], *_tensors(inputs[2:]))
    ctx.others = _others(inputs[2:])


def _second_backward(ctx, *directions):
    records = torch.is_grad_enabled()
    needed = ctx.needs_input_grad[1:]
    total: list[Tensor | None] = [None] * len(needed)
    with torch.enable_grad(), _without_autocast(ctx.saved_tensors[2].device.type):
        # Views of the arguments are what is differentiated by: the result has the arguments' history, but no
        # path to one of them leads through the history of another.
        grad_mapped, grad_shift, *tensors = (None if t is None else t.view_as(t) for t in ctx.saved_tensors)
        args = (grad_mapped, grad_shift, *_joined(tensors, ctx.others))
        wanted = [place for place, need in enumerate(needed) if need]
        pairs = [
            (first, along)
            for first, along in zip(_first_gradients(args, ctx.needs), directions, strict=True)
            if first is not None and along is not None and first.requires_grad
        ]
        if pairs and wanted:
            found = torch.autograd.grad(
                [first for first, _ in pairs],
                [args[place] for place in wanted],
                [along for _, along in pairs],
                create_graph=records,
                allow_unused=True,
            )
            for place, gradient in zip(wanted, found, strict=True):
                total[place] = gradient
    return tuple(total)


def _first_gradients(args, needs: int) -> list[Tensor | None]:
    """What latent_map_backward computes, by differentiating the composition, with a graph behind it."""
    grads, args = args[:2], list(args[2:])
    gradients: list[Tensor | None] = [None] * len(_PLACES)
    sought = [bit for bit, place in enumerate(_PLACES) if needs >> bit & 1 and args[place] is not None]
    for bit in sought:
        if not args[_PLACES[bit]].requires_grad:
            args[_PLACES[bit]] = args[_PLACES[bit]].detach().requires_grad_()
    outputs = composition.latent_map(*args[:3], Norm(*args[3:10]), Norm(*args[10:17]), *args[17:])[:2]
    given = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if grad is not None and output.requires_grad  # without norms the shift is a constant
    ]
    if given and sought:
        found = torch.autograd.grad(
            [output for output, _ in given],
            [args[_PLACES[bit]] for bit in sought],
            [grad for _, grad in given],
            create_graph=True,
            allow_unused=True,
        )
        for bit, gradient in zip(sought, found, strict=True):
            gradients[bit] = gradient
    return gradients


def register(library: torch.library.Library) -> None:
    """Registers the fake implementations and the gradients of both orders."""
    global _function
    torch.library.register_fake("dcd_kernels::latent_map", _fake, lib=library)
    torch.library.register_fake("dcd_kernels::latent_map_backward", _backward_fake, lib=library)
    autograd.register_op(library, _backward_op, (_second_setup, _second_backward), records=True)
    _function = autograd.register_op(library, _op, (_setup, _backward))


def latent_map(
    phi: Tensor,
    mean: Tensor | None,
    covariance: Tensor | None,
    norm1: Norm,
    norm2: Norm,
    latent_bias: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dcd_kernels.latent_map.latent_map` by the CPU's compiled kernels: the same arguments and formulas.

    phi, mean and covariance in float32 or float64, all of one dtype; the covariance is taken to be
    symmetric. The other tensors may be float32, float64, float16 or bfloat16 and are converted. Everything
    is computed in float64.

    Returns Φ' (N, L, L), shift (N, L) and the statistics, (2k, L) of the k norms that take those of the
    batch: a row for each one's mean and one for its biased variance, first norm first. No gradient flows
    into the statistics.

    Raises RuntimeError for what does not fit together, and for tensors on another device.
    """
    return call(_op, _function, phi, mean, covariance, *norm1, *norm2, latent_bias, residual)
