# SPDX-License-Identifier: BSD-3-Clause
"""Autocast rule of the forward ops.

The tensors that make up the large products go to the autocast dtype. lam, phi and bias stay as they
are: they are a few numbers a sample, they scale or shift whole channels, and the kernels take them in
float32 beside half precision images. `torch.library.register_autocast` casts every argument, which is
why the rule is written here.
"""

import torch
from torch import Tensor

# Places in (input, weight, p, phi, q or r, lam, bias, residual), or in apply's
# (static, input, p, phi, q, lam, bias, residual): everything but phi, lam and bias.
_CAST = (0, 1, 2, 4, 7)


def _cast(tensor: Tensor | None, device_type: str, dtype: torch.dtype) -> Tensor | None:
    # The eligibility rule of torch.autocast itself: float64 was asked for on purpose.
    if tensor is None or tensor.device.type != device_type:
        return tensor
    if not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(dtype)


def _make_rule(op: torch._ops.OpOverload, device_type: str, key: torch._C.DispatchKey):
    own_key = torch._C.DispatchKeySet(key)

    def rule(*args):
        dtype = torch.get_autocast_dtype(device_type)
        cast = [_cast(arg, device_type, dtype) if i in _CAST else arg for i, arg in enumerate(args)]
        with torch._C._ExcludeDispatchKeyGuard(own_key):
            return op(*cast)

    return rule


def register(library: torch.library.Library, ops) -> None:
    """Registers the rule of each of `ops` for CPU and CUDA autocast."""
    for op in ops:
        for device_type in ("cpu", "cuda"):
            name = "Autocast" + device_type.upper()
            key = getattr(torch._C.DispatchKey, name)
            library.impl(op, _make_rule(op, device_type, key), name)
