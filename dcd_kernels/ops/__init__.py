# SPDX-License-Identifier: BSD-3-Clause
"""The operators of the extension in torch's dispatcher, and the entry points that call them.

The schemas and kernels are defined in csrc/; this package adds what torch needs around them: fake
implementations (fakes.py), gradients (autograd.py), the autocast rule (autocast.py). Arguments are
not checked here: `dcd_kernels.functional` does that before it lowers to these ops, and the kernels
refuse what they cannot compute.

`torch.ops.dcd_kernels.*` may be called directly with the same results. The entry points below are the
same calls with less overhead in eager mode.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import triton
from ..packing import PackedWeight
from . import (  # noqa: F401 (flops registers formulas)
    autocast,
    autograd,
    branch,
    fakes,
    flops,
    latent_map,
    layer,
    moments,
    norm,
    packed,
)
from .calls import call

__all__ = ["apply", "depthwise", "latent_moments", "pointwise", "pointwise_packed", "pointwise_pooled"]

_pointwise = torch.ops.dcd_kernels.pointwise.default
_apply = torch.ops.dcd_kernels.apply.default
_depthwise = torch.ops.dcd_kernels.depthwise.default

_FORMS = (
    autograd.convolution(_pointwise, torch.ops.dcd_kernels.pointwise_backward.default),
    autograd.addition(_apply, torch.ops.dcd_kernels.apply_backward.default),
    autograd.convolution(_depthwise, torch.ops.dcd_kernels.depthwise_backward.default),
)

# The registrations live as long as this object.
_library = torch.library.Library("dcd_kernels", "FRAGMENT")


def _pooled_on_cpu(*args) -> tuple[Tensor, Tensor]:
    """No CPU kernel makes the sums on its way; a second pass does."""
    output = _pointwise(*args)
    return output, output.sum(
        tuple(range(2, output.dim())), dtype=torch.promote_types(output.dtype, torch.float32)
    )


_pooled = torch.ops.dcd_kernels.pointwise_pooled.default
_library.impl(_pooled, _pooled_on_cpu, "CPU")
fakes.register(_library)
moments.register(_library)
branch.register(_library)
latent_map.register(_library)
layer.register(_library)
norm.register(_library)
packed.register(_library)
autocast.register(_library, [*(form.forward for form in _FORMS), _pooled, moments.OP])
_pointwise_function, _apply_function, _depthwise_function = (
    autograd.register(_library, form) for form in _FORMS
)
_pooled_function = autograd.register_op(_library, _pooled, autograd.make_pooled_formula(_FORMS[0]))
_moments_function = autograd.register_op(_library, moments.OP, moments.FORMULA)
triton.register(_library)


def pointwise(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    """y_n = act(lam_n * (W0 x_n) + P phi_n Q^T x_n + bias + residual), Eqs. 5 to 7.

    input (N, Ci, *spatial) with at least one spatial dimension, weight (Co, Ci), p (Co, L), phi
    (N, L, L) or block-diagonal (N, B, L, L), q (Ci, L), lam (N, Co), bias (Co,) or (N, Co), residual
    (N, Co, *spatial), activation a code of
    `arguments.ACTIVATIONS`. p, phi and q are given together or not at
    all. All of one dtype; phi, lam and bias may be float32 beside float16 or bfloat16.

    Returns (N, Co, *spatial), channels-last where the input is, else contiguous. Raises RuntimeError
    for what the kernels cannot compute.
    """
    return call(_pointwise, _pointwise_function, input, weight, p, phi, q, lam, bias, residual, activation)


def pointwise_packed(
    input: Tensor,
    weight: PackedWeight,
    phi: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    """`pointwise` with weight, p and q packed; a dense phi (N, L, L)."""
    sizes = weight.out_channels, weight.latent_channels
    return call(packed.OP, packed.Function, input, weight.data, *sizes, phi, lam, bias, residual, activation)


def pointwise_pooled(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """`pointwise` and the sums of its output over each sample's pixels: the next layer's pooling.

    Returns (output, sums (N, Co)), the sums in float32, in float64 for float64.
    """
    return call(_pooled, _pooled_function, input, weight, p, phi, q, lam, bias, residual, activation)


def latent_moments(input: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, L) and centred covariance (N, L, L) of Qᵀx over each sample's pixels, `dcd.latent_moments`."""
    return call(moments.OP, _moments_function, input, q)


def apply(
    static: Tensor,
    input: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    """y_n = act(lam_n * static_n + P phi_n Q^T x_n + bias + residual), behind any static layer.

    static (N, Co, *spatial), input (N, Ci, *spatial) sampled to static's spatial size; the rest as in
    `pointwise`. With q=None the input is the latent itself and phi is rectangular, (N, L, Ci): the
    last step of Eq. 9. With p, phi and q None the input is not read.

    Returns (N, Co, *spatial), channels-last where static is, else contiguous. Raises RuntimeError for
    what the kernels cannot compute.
    """
    return call(_apply, _apply_function, static, input, p, phi, q, lam, bias, residual, activation)


def depthwise(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    r: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: int,
) -> Tensor:
    """y_n = act((lam_n W0 + P phi_n R^T) * x_n + bias + residual), a depthwise convolution, Eq. 8.

    input (N, Ci, *spatial), weight (Co, 1, *k) with Co a multiple of Ci, p (Co, L), phi (N, L, L),
    r (prod k, L) over the kernel's taps in row-major order, lam (N, Co), bias (Co,) or (N, Co),
    residual like the output; stride, padding and dilation with one entry a spatial dimension. Dtypes
    and activation as in `pointwise`.

    Returns (N, Co, *out), channels-last where the input is, else contiguous. Raises RuntimeError for
    what the kernels cannot compute.
    """
    return call(
        _depthwise,
        _depthwise_function,
        input,
        weight,
        p,
        phi,
        r,
        lam,
        bias,
        residual,
        stride,
        padding,
        dilation,
        activation,
    )
