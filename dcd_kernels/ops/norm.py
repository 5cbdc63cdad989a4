# SPDX-License-Identifier: BSD-3-Clause
"""The ops batch_norm_act and batch_norm_act_backward: a norm by the batch's statistics and its activation.

With x̂ = (x − mean)/√(variance + eps) and G = act' dY: d_bias = Σ G, d_weight = Σ G x̂ and
dX = weight/√(variance + eps) (G − mean of G − x̂ · mean of G x̂). The pre-activation is computed again, so
that x is all that is saved. There is no autocast rule: like torch's norms, it computes in the dtype given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd
from .calls import call
from .fakes import empty_map

_op = torch.ops.dcd_kernels.batch_norm_act.default
_backward_op = torch.ops.dcd_kernels.batch_norm_act_backward.default

_ACTIVATIONS = {
    autograd.NONE: lambda x: x,
    autograd.RELU: F.relu,
    autograd.RELU6: F.relu6,
    autograd.SILU: F.silu,
    autograd.HARDSWISH: F.hardswish,
}


def _fake(input, weight, bias, eps, activation) -> tuple[Tensor, Tensor, Tensor]:
    channels, wide = input.shape[1], torch.promote_types(input.dtype, torch.float32)
    statistics = [input.new_empty((channels,), dtype=wide) for _ in range(2)]
    return empty_map(input, channels, input.shape[2:]), *statistics


def _backward_fake(grad, input, weight, bias, mean, variance, eps, activation, needs):
    gradients = [_nothing(tensor, mean) for tensor in (input, weight, bias)]
    if needs & 1:
        gradients[0] = empty_map(input, input.shape[1], input.shape[2:])
    for bit, tensor in ((1, weight), (2, bias)):
        if needs >> bit & 1 and tensor is not None:
            gradients[bit] = tensor.new_empty(tensor.shape)
    return tuple(gradients)


def _nothing(tensor: Tensor | None, mean: Tensor) -> Tensor:
    return mean.new_empty((0,), dtype=mean.dtype if tensor is None else tensor.dtype)


def _setup(ctx, inputs, outputs):
    input, weight, bias, ctx.eps, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(input, weight, bias, *outputs[1:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    wanted = ctx.needs_input_grad[1:4]
    needs = wanted[0] + 2 * wanted[1] + 4 * wanted[2]
    found = _backward_op(grad, *ctx.saved_tensors, ctx.eps, ctx.activation, needs)
    return *(gradient if asked else None for gradient, asked in zip(found, wanted, strict=True)), None, None


def composition(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What batch_norm_act computes, in torch's operations."""
    wide = torch.promote_types(input.dtype, torch.float32)
    axes, shape = [0, *range(2, input.dim())], [1, -1] + [1] * (input.dim() - 2)
    variance, mean = torch.var_mean(input.to(wide), axes, correction=0)
    output = (input.to(wide) - mean.view(shape)) * (variance.view(shape) + eps).rsqrt()
    if weight is not None:
        output = output * weight.to(wide).view(shape)
    if bias is not None:
        output = output + bias.to(wide).view(shape)
    return _ACTIVATIONS[activation](output).to(input.dtype), mean, variance


def _backward_composition(grad, input, weight, bias, mean, variance, eps, activation, needs):
    """What batch_norm_act_backward computes, by differentiating the composition, with a graph behind it."""
    # Views are what is differentiated by: no path to one argument leads through the history of another.
    tensors = [None if t is None else t.view_as(t) for t in (input, weight, bias)]
    sought = [i for i, tensor in enumerate(tensors) if needs >> i & 1 and tensor is not None]
    for i in sought:
        if not tensors[i].requires_grad:
            tensors[i] = tensors[i].detach().requires_grad_()
    found = {}
    if sought:
        with torch.enable_grad():
            output = composition(*tensors, eps, activation)[0]
            gradients = torch.autograd.grad(
                output, [tensors[i] for i in sought], grad.to(output.dtype), create_graph=True
            )
        found = dict(zip(sought, gradients, strict=True))
    return tuple(found.get(i, _nothing(tensor, mean)) for i, tensor in enumerate(tensors))


def register(library: torch.library.Library) -> None:
    """Registers the fake implementations and the gradients of both orders."""
    global _function
    torch.library.register_fake("dcd_kernels::batch_norm_act", _fake, lib=library)
    torch.library.register_fake("dcd_kernels::batch_norm_act_backward", _backward_fake, lib=library)
    autograd.register_composition(library, _backward_op, _backward_composition)
    library.impl(_op, composition, "CUDA")
    _function = autograd.register_op(library, _op, (_setup, _backward))


def batch_norm_act(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""y = act(weight · (x − mean)/√(variance + eps) + bias), batch normalisation (Ioffe and Szegedy, 2015).

    input (N, C, \*spatial), also (N, C); weight and bias (C,) or None; activation a code of
    `arguments.ACTIVATIONS`. float32, float64, float16, bfloat16; weight and bias may be float32 beside half
    precision, in which sums are float32.

    Returns y, laid out like input, and mean and biased variance (C,) over samples and pixels, in float32 or
    float64, into which no gradient flows. Raises RuntimeError for an input without values, wrong shapes,
    dtypes or codes, and a negative eps.
    """
    return call(_op, _function, input, weight, bias, eps, activation)
