# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of the op branch: a compiled kernel on the CPU, else a composition of torch's own operations.

The composition can be differentiated again, so it serves wherever a gradient is recorded, and every other
device. Both compute in the dtype of the sums, whatever autocast region they are called in.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd

#: The codes of csrc/branch_codes.h are the places in these.
GATES = (None, "relu", "relu6", "silu", "hardswish", "se")
LAM_ACTIVATIONS = (None, "hardsigmoid2", "sigmoid2", "hardsigmoid", "sigmoid")

_op = torch.ops.dcd_kernels.branch_backward.default

# Returns of branch_backward, in the order of branch's arguments; bit i of `needs` asks for the i-th.
_SUMS, _W1, _B1, _WG, _BG, _W2, _B2, _W3, _B3 = range(9)
_RETURNS = 9


def _without_autocast(device_type: str):
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _between(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """``grad`` where low < x < high, else 0, in one kernel."""
    return torch.ops.aten.hardtanh_backward(grad, x, low, high)


def _gated(before: Tensor, code: int) -> Tensor:
    """The hidden units."""
    name = GATES[code]
    if name == "relu":
        return before.relu()
    if name == "relu6":
        return F.relu6(before)
    if name == "silu":
        return F.silu(before)
    if name == "hardswish":
        return before * F.relu6(before + 3) / 6
    return before


def _behind_gate(grad: Tensor, before: Tensor, code: int) -> Tensor:
    """The gradient before the gate, given that of the hidden units."""
    name = GATES[code]
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, before, 0)
    if name == "relu6":
        return _between(grad, before, 0, 6)
    if name == "silu":
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(grad, before)
        sigmoid = before.sigmoid()  # aten's kernel has no derivative of its own
        return grad * (sigmoid * (1 + before * (1 - sigmoid)))
    if name == "hardswish":
        shifted = before + 3
        return (grad * F.relu6(shifted) + _between(grad * before, shifted, 0, 6)) / 6
    return grad


def _behind_lam(grad: Tensor, lam: Tensor, code: int) -> Tensor:
    """The gradient of the logits, given that of λ."""
    name = LAM_ACTIVATIONS[code]
    if name == "hardsigmoid2":
        return _between(grad, lam, 0, 2) / 3
    if name == "hardsigmoid":
        return _between(grad, lam, 0, 1) / 6
    if name == "sigmoid2":
        return grad * (lam * (1 - lam / 2))
    if name == "sigmoid":
        return grad * (lam * (1 - lam))
    return grad


def _composition(
    d_lam, d_phi, lam, sums, scale, w1, b1, wg, bg, w2, w3, gate, lam_activation, needs
) -> list[Tensor | None]:
    """What branch_backward returns, None where it was not asked for."""
    dtype = w1.dtype
    with _without_autocast(sums.device.type):
        w1, b1, wg, bg, w2, w3 = (None if t is None else t.to(sums.dtype) for t in (w1, b1, wg, bg, w2, w3))
        pooled = (sums.sum(1) if sums.shape[1] > 1 else sums[:, 0]) * scale
        before = F.linear(pooled, w1, b1)
        # rows of d_logits are those of expand, then those of w3
        first, second = _logits_gradients(d_lam, d_phi, lam, w2, w3, lam_activation)
        d_hidden = first @ w2 if w3 is None else torch.addmm(first @ w2, second, w3)
        d_gate = None
        if wg is not None:
            shifted = F.linear(before, wg, bg) + 3
            factor, third = F.relu6(shifted), before / 3
            hidden = third * factor
            d_gate = _between(d_hidden * third, shifted, 0, 6)
            d_before = torch.addmm(d_hidden * factor / 3, d_gate, wg)
        else:
            hidden = _gated(before, gate)
            d_before = _behind_gate(d_hidden, before, gate)
        found = {
            _SUMS: lambda: (d_before @ w1) * scale,
            _W1: lambda: d_before.mT @ pooled,
            _B1: lambda: d_before.sum(0),
            _WG: lambda: d_gate.mT @ before,
            _BG: lambda: d_gate.sum(0),
            _W2: lambda: first.mT @ hidden,
            _B2: lambda: first.sum(0),
            _W3: lambda: second.mT @ hidden,
            _B3: lambda: second.sum(0),
        }
        return [
            found[i]().to(sums.dtype if i == _SUMS else dtype) if needs >> i & 1 else None
            for i in range(_RETURNS)
        ]


def _logits_gradients(d_lam, d_phi, lam, w2, w3, lam_activation) -> tuple[Tensor, Tensor | None]:
    """Of the logits that w2 gives and of those that w3 gives; absent gradients are zeros."""
    d_lam = torch.zeros_like(lam) if d_lam is None else _behind_lam(d_lam, lam, lam_activation)
    others = w2.shape[0] - lam.shape[1] if w3 is None else w3.shape[0]
    if d_phi is None:
        d_phi = lam.new_zeros((lam.shape[0], others))
    if w3 is not None:
        return d_lam, d_phi
    if others == 0:
        return d_lam, None
    return (torch.cat((d_lam, d_phi), 1) if lam.shape[1] else d_phi), None


def _as_returned(gradients: list[Tensor | None], sums: Tensor) -> tuple[Tensor, ...]:
    return tuple(sums.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake(d_lam, d_phi, lam, sums, scale, w1, b1, wg, bg, w2, w3, gate, lam_activation, needs):
    hidden, inputs = w1.shape
    shapes = {
        _SUMS: (sums.shape[0], inputs),
        _W1: (hidden, inputs),
        _B1: (hidden,),
        _WG: (hidden, hidden),
        _BG: (hidden,),
        _W2: w2.shape,
        _B2: w2.shape[:1],
        _W3: None if w3 is None else w3.shape,
        _B3: None if w3 is None else w3.shape[:1],
    }
    return _as_returned(
        [
            (sums if i == _SUMS else w1).new_empty(shapes[i]) if needs >> i & 1 else None
            for i in range(_RETURNS)
        ],
        sums,
    )


def _op_as_composition(*args) -> tuple[Tensor, ...]:
    return _as_returned(_composition(*args), args[3])


def setup_context(ctx, inputs, outputs):
    sums, scale, w1, b1, wg, bg, w2, _, w3, _ = inputs[:10]
    ctx.set_materialize_grads(False)
    ctx.scale = scale
    _, ctx.gate, ctx.lam_activation = inputs[10:]
    ctx.save_for_backward(sums, w1, b1, wg, bg, w2, w3, outputs[0])


def backward(ctx, d_lam, d_phi):
    """The gradients of branch's thirteen arguments."""
    if d_lam is None and d_phi is None:
        return (None,) * 13
    sums, *parameters, lam = ctx.saved_tensors
    wanted = ctx.needs_input_grad  # of the keyset and of branch's arguments, of which the second is the scale
    needs = 1 if wanted[1] else 0
    for i in range(_W1, _RETURNS):
        if wanted[2 + i]:
            needs |= 1 << i
    args = (d_lam, d_phi, lam, sums, ctx.scale, *parameters, ctx.gate, ctx.lam_activation, needs)
    has_kernel = sums.is_cpu and not torch.is_grad_enabled()
    found = _op(*args) if has_kernel else _composition(*args)
    d_sums, *others = [found[i] if needs >> i & 1 else None for i in range(_RETURNS)]
    if d_sums is not None:  # one gradient for all tiles
        d_sums = d_sums.unsqueeze(1)
        if sums.shape[1] > 1:
            d_sums = d_sums.expand(sums.shape)
    return d_sums, None, *others, None, None, None


def register(library: torch.library.Library) -> None:
    """Registers the fake implementation, and the composition in place of the kernel."""
    torch.library.register_fake("dcd_kernels::branch_backward", _fake, lib=library)
    autograd.register_composition(library, _op, _op_as_composition)
