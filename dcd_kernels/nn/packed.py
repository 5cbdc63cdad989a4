# SPDX-License-Identifier: BSD-3-Clause
"""The packed weights that a pointwise layer keeps for inference, and when they are made again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dcd_kernels import extension
from dcd_kernels.packing import PackedWeight, pack_weight, runs_packed

_NAMES = ("weight", "p", "q")
_PLAIN = (Tensor, nn.Parameter)


class _Kept:
    """What was packed, or is to be packed at the next call that finds the same.

    The parameters themselves and tensors on their memory are held, so that neither an identity nor an address
    that is compared can have been given to something else meanwhile.
    """

    __slots__ = ("held", "packed", "parameters", "state")

    def __init__(self, parameters: tuple[Tensor | None, ...], state: tuple) -> None:
        self.parameters = parameters
        self.held = [None if t is None else t.detach() for t in parameters]
        self.state = state
        self.packed: PackedWeight | None = None


def _state(parameters: tuple[Tensor | None, ...]) -> tuple:
    """What changes with every edit that torch can see and every exchange of the memory."""
    return tuple(
        None if t is None else (t._version, t.data_ptr(), t.dtype, t.shape, t.stride()) for t in parameters
    )


def _looked_at() -> bool:
    """Whether a compiler, a tracer, a transform or a mode has to see what the layer calls."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
    )


def _channels_innermost(layer: nn.Module, input: Tensor) -> bool:
    """Whether each pixel's channels lie next to each other: contiguous maps do not gain by packing."""
    channels = input.dim() - 1 if hasattr(layer, "in_features") else 1
    return input.stride(channels) == 1 and input.dim() > 2 and not (channels == 1 and input.is_contiguous())


def packed_for(layer: nn.Module, input: Tensor) -> PackedWeight | None:
    """The packed weights of ``layer`` for a call with ``input``, or None where it takes the plain ones.

    Packing is for inference: the layer in eval mode, no gradient recorded, the kernels of the CPU, channels
    that lie next to each other, as in channels_last images. It waits for the second call in a row with the
    same parameters, so that a call with others (``torch.func.functional_call``) costs no packing.
    """
    if layer.training or not layer.keep_packed or _looked_at():
        return None
    if not runs_packed(input) or not extension.LOADED or not _channels_innermost(layer, input):
        return None
    if input.dtype is torch.bfloat16:  # has kernels that multiply it as it is, from plain weights
        return None
    registered = layer._parameters
    parameters = tuple(registered.get(name) for name in _NAMES)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(input, *parameters):
        return None
    kept: _Kept | None = layer._kept
    try:
        if kept is None or any(a is not b for a, b in zip(kept.parameters, parameters, strict=True)):
            # a weight that is recomputed at each call is no registered parameter
            if any(t is not None and (type(t) not in _PLAIN or not t.is_cpu) for t in parameters):
                return None
            if parameters[0] is None:
                return None
            layer._kept = _Kept(parameters, _state(parameters))
            return None
        state = _state(parameters)
    except RuntimeError:  # made in inference mode: torch does not count the edits of such tensors
        return None
    if kept.state != state:
        layer._kept = _Kept(parameters, state)
        return None
    if kept.packed is None:
        weight, p, q = parameters
        packed = pack_weight(weight, p, q)
        if _state(parameters) == state:  # nobody wrote meanwhile
            kept.packed = packed
        return packed
    return kept.packed
