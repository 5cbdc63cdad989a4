# SPDX-License-Identifier: BSD-3-Clause
"""Modules one after another in training: a norm together with the activation behind it, and static layers.

In training, torch reads an image four times and writes one twice for them, six times and twice on the way
back; here it is read twice and written once, four times and once on the way back. Static convolutions run
on the kernels of dynamic ones where these are faster than torch's on one core: 1×1 (half of torch's time,
forward and back), and depthwise 3×3 on large maps (0.5 to 0.9; not strided ones of contiguous planes).
Everything is decided at every call, from the modules as they are then: what is not sure to be the same runs
as it was written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import extension, functional
from ..arguments import ACTIVATIONS
from ..backends import selection
from . import layers, norms

if extension.LOADED:
    from ..ops.autograd import is_traced
    from ..ops.norm import batch_norm_act

_RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}  # of what they read
_NONE = ACTIVATIONS[None]
_CODES = {
    nn.ReLU: ACTIVATIONS["relu"],
    nn.ReLU6: ACTIVATIONS["relu6"],
    nn.SiLU: ACTIVATIONS["silu"],
    nn.Hardswish: ACTIVATIONS["hardswish"],
}
_DTYPES = (torch.float32, torch.float64)
# Of smaller maps, what the kernel gains is what its way through Python costs.
_LARGE = 2**19  # elements


def run(sequence: nn.Module, input: Tensor) -> Tensor:
    """``sequence(input)``, norms by the batch's statistics fused with the activations behind them.

    A norm is fused if it is an ``nn.BatchNorm`` 1d to 3d that takes the batch's statistics, without hooks,
    and reads float32 or float64 on the CPU; the activation may be ``nn.ReLU``, ``nn.ReLU6``, ``nn.SiLU`` or
    ``nn.Hardswish``, in place or not. Running statistics move as torch moves them. An ``nn.Conv2d`` in
    training mode may run on the kernels of dynamic ones. Sequences inside are opened. Under a compiler, a
    tracer, torch.func, forward-mode differentiation or global module hooks, and where ``sequence`` is no
    plain ``nn.Sequential``, it is called as it is.
    """
    if type(sequence) is not nn.Sequential or layers.is_altered(sequence) or not _may_fuse(input):
        return sequence(input)
    return _run(sequence, input)


def run_within(sequence: nn.Sequential, input: Tensor) -> Tensor:
    """What the patched forward of ``sequence`` does: `run`, but for its own hooks, which run around it."""
    if not _may_fuse(input):
        return nn.Sequential.forward(sequence, input)
    return _run(sequence, input)


def has_norms(sequence: nn.Module) -> bool:
    """Whether `run` may find something to fuse: a norm that is a child of a plain ``nn.Sequential``."""
    return type(sequence) is nn.Sequential and any(type(child) in _RANKS for child in sequence)


def _run(sequence: nn.Sequential, input: Tensor) -> Tensor:
    modules = list(sequence._modules.values())
    place, end = 0, len(modules)
    while place < end:
        module = modules[place]
        place += 1
        ranks = _RANKS.get(type(module))
        if ranks is not None and _fits(module, ranks, input):
            code = _code(modules[place]) if place < end else _NONE
            input = _normalise(module, input, code)
            place += code != _NONE
        elif type(module) is nn.Conv2d and _is_ours(module, input):
            input = _convolve(module, input)
        else:
            input = run(module, input) if type(module) is nn.Sequential else module(input)
    return input


def _may_fuse(input: Tensor) -> bool:
    return (
        extension.LOADED
        and type(input) is Tensor
        and not is_traced()
        and forward_ad._current_level < 0
        and not layers.are_watched()
        and selection.current() in ("auto", "cpu")
    )


def _fits(norm: nn.Module, ranks: tuple[int, ...], input: Tensor) -> bool:
    return (
        norms.takes_moments(norm)
        and type(input) is Tensor
        and input.is_cpu
        and input.dtype in _DTYPES
        and input.dim() in ranks
        and input.shape[1] == norm.num_features
        and not layers.is_altered(norm)
        and all(tensor is None or _matches(tensor, input) for tensor in norm._parameters.values())
        and all(tensor is None or tensor.is_cpu for tensor in (norm.running_mean, norm.running_var))
        and input.numel() > input.shape[1]  # of a single value a channel torch has to complain
    )


def _matches(parameter: Tensor, input: Tensor) -> bool:
    return parameter.is_cpu and parameter.dtype == input.dtype


def _code(module: nn.Module) -> int:
    """The code of an activation that can be fused, else that of none."""
    code = _CODES.get(type(module), _NONE)
    if code == _NONE or layers.is_altered(module):
        return _NONE
    if type(module) is nn.ReLU6 and (module.min_val, module.max_val) != (0, 6):
        return _NONE
    return code


def _is_ours(conv: nn.Conv2d, input: Tensor) -> bool:
    """Whether a static convolution is one of those that our kernels compute faster."""
    if not (
        conv.training
        and type(input) is Tensor
        and input.is_cpu
        and input.dtype in _DTYPES
        and input.dim() == 4
        and not torch.is_autocast_enabled("cpu")
        and not layers.is_altered(conv)
        and all(tensor is None or _matches(tensor, input) for tensor in conv._parameters.values())
    ):
        return False
    if layers.is_projection(conv):
        return conv.stride == (1, 1)
    channels_last = input.stride(1) == 1
    return (
        conv.kernel_size == (3, 3)
        and (conv.stride == (1, 1) or (conv.stride == (2, 2) and channels_last))
        and conv.padding == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.groups == conv.in_channels == conv.out_channels == input.shape[1]
        and input.numel() >= _LARGE
    )


def _convolve(conv: nn.Conv2d, input: Tensor) -> Tensor:
    return functional.dcd_conv2d(
        input,
        conv.weight,
        bias=conv.bias,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
    )


def _normalise(norm: nn.Module, input: Tensor, code: int) -> Tensor:
    tracking = norms.count_batch(norm, input.shape)
    output, mean, variance = batch_norm_act(input, norm.weight, norm.bias, norm.eps, code)
    norms.move(norm, mean, variance, tracking)
    return output
