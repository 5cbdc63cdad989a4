# SPDX-License-Identifier: BSD-3-Clause
"""How the entry points call an op, by the shortest way that computes the same; and that the ops are there."""

import torch
from torch.autograd import forward_ad

_NAMES = (
    "pointwise",
    "pointwise_pooled",
    "pointwise_packed",
    "pack_pointwise",
    "apply",
    "depthwise",
    "latent_moments",
    "latent_map",
    "channel_sums",
    "branch",
    "released_layer",
    "batch_norm_act",
)


def _require_extension() -> None:
    missing = [name for name in _NAMES if not hasattr(torch.ops.dcd_kernels, name)]
    if missing:
        from dcd_kernels import extension

        raise ImportError(
            f"dcd_kernels.ops cannot be imported: {extension.REASON}. "
            "dcd_kernels.reference serves every form without it."
        )


_require_extension()

# Bound once: half of the time of the checks below would go into finding what they call.
_is_compiling = torch.compiler.is_compiling
_is_transformed = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_grad_enabled = torch.is_grad_enabled
_any_requires_grad = torch._C._any_requires_grad
_below_autograd = torch._C._AutoDispatchBelowAutograd


def call(op, function, *args):
    """`op(*args)`; `function` is its autograd.Function.

    The autograd kernel in the dispatcher is Python and costs 3 to 4 microseconds a call, also where
    nothing requires a gradient. Outside of tracing and torch.func, whose levels only the dispatcher
    knows, it is entered below that kernel, or the autograd.Function is applied here. Under autocast the
    casts have to be recorded too, and they are made in the dispatcher above autograd.
    """
    if _is_compiling() or _is_transformed() or _tracing_state() is not None:
        return op(*args)
    if forward_ad._current_level < 0 and not (_is_grad_enabled() and _any_requires_grad(*args)):
        with _below_autograd():
            return op(*args)
    if torch._C._is_any_autocast_enabled():
        return op(*args)
    return function.apply(None, *args)
