# SPDX-License-Identifier: BSD-3-Clause
"""The op latent_map: norms on the latent as an affine map of it, on the CPU in one call each way.

Its gradients are an op of their own; where they are to be differentiated again, they are the composition's.
There is no autocast rule: results have the dtype of phi in every region.
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


def _backward_composition(*args) -> tuple[Tensor, ...]:
    """What latent_map_backward computes, by differentiating the composition, with a graph behind it."""
    *inputs, needs = args
    # Views of the arguments are what is differentiated by: the result has the arguments' history, but no
    # path to one of them leads through the history of another.
    grad_mapped, grad_shift, *inputs = (t.view_as(t) if isinstance(t, Tensor) else t for t in inputs)
    sought = [place for bit, place in enumerate(_PLACES) if needs >> bit & 1 and inputs[place] is not None]
    for place in sought:
        if not inputs[place].requires_grad:
            inputs[place] = inputs[place].detach().requires_grad_()
    gradients = dict.fromkeys(sought)
    with torch.enable_grad(), _without_autocast(inputs[0].device.type):
        norm1, norm2 = Norm(*inputs[_NORM1:_NORM2]), Norm(*inputs[_NORM2:_LATENT_BIAS])
        outputs = composition.latent_map(*inputs[:_NORM1], norm1, norm2, *inputs[_LATENT_BIAS:])[:2]
        given = [
            (output, grad)
            for output, grad in zip(outputs, (grad_mapped, grad_shift), strict=True)
            if grad is not None and output.requires_grad  # without norms the shift is a constant
        ]
        if given and sought:
            found = torch.autograd.grad(
                [output for output, _ in given],
                [inputs[place] for place in sought],
                [grad for _, grad in given],
                create_graph=True,
                allow_unused=True,
            )
            gradients = dict(zip(sought, found, strict=True))
    return tuple(
        _nothing(inputs[0], inputs[place])
        if place not in gradients
        else torch.zeros_like(inputs[place])
        if gradients[place] is None
        else gradients[place]
        for place in _PLACES
    )


def register(library: torch.library.Library) -> None:
    """Registers the fake implementations and the gradients of both orders."""
    global _function
    torch.library.register_fake("dcd_kernels::latent_map", _fake, lib=library)
    torch.library.register_fake("dcd_kernels::latent_map_backward", _backward_fake, lib=library)
    autograd.register_composition(library, _backward_op, _backward_composition)
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
