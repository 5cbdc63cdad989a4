# SPDX-License-Identifier: BSD-3-Clause
"""The public operators: check the arguments, choose a backend, lower the form to the compiled operators.

Every form is one of three compiled operators, beside convolutions that torch does best itself:

* a 1×1 kernel is `pointwise`, on a strided or padded view of the input;
* depthwise is `depthwise`;
* a static k×k or grouped convolution is torch's own, then `apply` adds everything dynamic in one pass;
* joint fusion (Eq. 9) is z = Qᵀx by `pointwise`, torch's convolution of z with R, then `apply`.
"""

from __future__ import annotations

from torch import Tensor

from . import checks, extension, geometry, packing, reference
from .arguments import ACTIVATIONS
from .backends import selection
from .packing import PackedWeight

if extension.LOADED:
    from . import ops

_CODES = ACTIVATIONS


def dcd_conv1d(
    input: Tensor,
    weight: Tensor | PackedWeight,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    *,
    r: Tensor | None = None,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Dynamic convolution decomposition over (N, Ci, length): :func:`dcd_conv2d` in one dimension."""
    return _conv(
        1, input, weight, p, phi, q, r, lam, bias, residual, stride, padding, dilation, groups, activation
    )


def dcd_conv2d(
    input: Tensor,
    weight: Tensor | PackedWeight,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    *,
    r: Tensor | None = None,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    r"""Convolution whose weights depend on the sample, ``y_n = act(W_n * x_n + bias + residual)``.

    ``W_n = Λ_n W0 + P Φ_n Qᵀ`` with W0 = weight, Λ_n = diag(lam[n]), Φ_n = phi[n] ("Revisiting Dynamic
    Convolution via Matrix Decomposition", ICLR 2021, §3 and §4). No per-sample weight is ever allocated.
    Which arguments are given decides the form:

    =====================  ==================  ========  ========  =========  ===============
    form                   weight              p         q         r          phi
    =====================  ==================  ========  ========  =========  ===============
    pointwise, Eqs. 5, 6   (Co, Ci, 1, 1)      (Co, L)   (Ci, L)              (N, L, L)
    blocks, Eq. 7          (Co, Ci, 1, 1)      (Co, L)   (Ci, L)              (N, B, L, L)
    depthwise, Eq. 8       (m·Ci, 1, kh, kw)   (Co, L)             (kh·kw, L) (N, L, L)
    joint, Eq. 9           (Co, Ci, kh, kw)    (Co, L)   (Ci, L)   (kh·kw, M) (N, M, L, L)
    centre tap, Fig. 4b    (Co, Ci, kh, kw)    (Co, L)   (Ci, L)              (N, L, L) or 4-D
    =====================  ==================  ========  ========  =========  ===============

    Without lam Λ is the identity (Eq. 5); without p, phi, q and r the weights are Λ_n W0.

    Args:
        input: (N, Ci, H, W), contiguous, channels_last or any strides.
        weight: the static weights W0, (Co, Ci / groups, kh, kw); or the :class:`PackedWeight` of a pointwise
            layer, beside which p, q and r are left out (:func:`pack_weight`).
        p, phi, q, r: the factors of the dynamic residual. In Eq. 7, block b takes the rows b of p and q.
        lam: (N, Co), the channel attention; it does not scale the bias.
        bias: (Co,), or (N, Co) for one bias per sample.
        residual: like the output; a network's skip connection, added before the activation.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`; padding may be 'same'
            or 'valid'. With groups > 1 a residual with q is block-diagonal, B a multiple of groups; for a
            dense one beside a grouped convolution call :func:`dcd_apply` on that convolution's output.
        activation: None, 'relu', 'relu6', 'silu' or 'hardswish'.

    Dtypes are float32, float64, float16, bfloat16 (complex on the reference), the same for all; lam, phi and
    bias may be float32 beside a half-precision input, and half precision accumulates in float32.

    Returns:
        (N, Co, H_out, W_out) in the dtype of input, channels_last for a channels_last input. An empty batch
        gives an empty output.

    Raises:
        TypeError: not a tensor, one without strides (sparse, mkldnn), a dtype that is unsupported or
            does not match.
        ValueError: rank (unbatched input too), shape, device, groups, blocks, geometry, a missing or surplus
            factor, even kernel sizes with a centre tap, an unknown activation.
        RuntimeError: a backend chosen by :class:`use_backend` cannot run the call.
    """
    return _conv(
        2, input, weight, p, phi, q, r, lam, bias, residual, stride, padding, dilation, groups, activation
    )


def dcd_conv3d(
    input: Tensor,
    weight: Tensor | PackedWeight,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    *,
    r: Tensor | None = None,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Dynamic convolution decomposition over (N, Ci, D, H, W): :func:`dcd_conv2d` in three dimensions."""
    return _conv(
        3, input, weight, p, phi, q, r, lam, bias, residual, stride, padding, dilation, groups, activation
    )


def dcd_linear(
    input: Tensor,
    weight: Tensor | PackedWeight,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    *,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Linear layer whose weights depend on the sample: ``y = act((Λ_n W0 + P Φ_n Qᵀ) x + bias + residual)``.

    The paper's classifier ("CLS" in Table 3b), a pointwise convolution whose pixels are the inner dimensions.

    Args:
        input: (N, …, Ci); all rows of sample n share its weights.
        weight: (Co, Ci), or a :class:`PackedWeight`, beside which p and q are left out.
        p, phi, q: (Co, L), (N, L, L) or in blocks (N, B, L, L), (Ci, L); all or none of them.
        lam: (N, Co). bias: (Co,) or (N, Co), not scaled by lam. residual: (N, …, Co).
        activation: None, 'relu', 'relu6', 'silu' or 'hardswish'.

    Returns:
        (N, …, Co) in the dtype of input; dtypes as for :func:`dcd_conv2d`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dcd_conv2d`.
    """
    if type(weight) is PackedWeight:
        packing.check_linear(input, weight, p, phi, q, lam, bias, residual, activation)
        if packing.runs_packed(input):
            skip = None if residual is None else _as_pixels(residual)
            output = ops.pointwise_packed(_as_pixels(input), weight, phi, lam, bias, skip, _CODES[activation])
            return _as_rows(output, input.shape)
        weight, p, q = weight.unpack()
    checks.linear("dcd_linear", input, weight, p, phi, q, lam, bias, residual, activation)
    if selection.select("linear", input, weight, p, phi, q, lam) == "reference":
        return reference.linear(input, weight, p, phi, q, lam, bias, residual, activation)
    pixels, skip = _as_pixels(input), None if residual is None else _as_pixels(residual)
    output = ops.pointwise(pixels, weight, p, phi, q, lam, bias, skip, _CODES[activation])
    return _as_rows(output, input.shape)


def _as_pixels(rows: Tensor) -> Tensor:
    """(N, …, C) as (N, C, pixels): a view, the rows are the pixels of a channels-last image."""
    return rows.unsqueeze(2) if rows.dim() == 2 else rows.flatten(1, -2).transpose(1, 2)


def _as_rows(pixels: Tensor, shape) -> Tensor:
    """The way back, for an input of ``shape``; a view too."""
    if len(shape) == 2:
        return pixels.squeeze(2)
    return pixels.transpose(1, 2).reshape(*shape[:-1], pixels.shape[1])


def dcd_apply(
    static: Tensor,
    input: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    *,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride=1,
    offset=0,
    activation: str | None = None,
) -> Tensor:
    r"""Everything dynamic on a static output of your own: ``y = act(λ⊙static + P Φ Qᵀ x + bias + residual)``.

    Output pixel o reads ``x = input[o * stride + offset]``, zero outside the input; the residual is dense
    (Eq. 6), or block-diagonal for a 4-D phi (Eq. 7), whatever groups or kernel made ``static`` (Fig. 4b).

    Args:
        static: (N, Co, \*size), for instance a convolution's output without its bias.
        input: (N, Ci, \*any size).
        p, phi, q: (Co, L), (N, L, L) or (N, B, L, L), (Ci, L). None, None, None: only lam, bias, residual and
            activation. q alone None: input is the latent itself and phi (N, L, Ci).
        lam: (N, Co). bias: (Co,) or (N, Co), not scaled by lam. residual: like static.
        stride, offset: integers, or one per spatial dimension; the offset may be negative.
        activation: None, 'relu', 'relu6', 'silu' or 'hardswish'.

    Returns:
        The shape and dtype of static; dtypes as for :func:`dcd_conv2d`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dcd_conv2d`.
    """
    stride, offset = checks.apply(
        "dcd_apply", static, input, p, phi, q, lam, bias, residual, stride, offset, activation
    )
    if selection.select("apply", input, static, p, phi, q, lam) == "reference":
        return reference.apply(static, input, p, phi, q, lam, bias, residual, stride, offset, activation)
    if p is None:
        return ops.apply(static, static, None, None, None, lam, bias, residual, _CODES[activation])
    sampled = geometry.sample(input, stride, offset, tuple(static.shape[2:]))
    return ops.apply(static, sampled, p, phi, q, lam, bias, residual, _CODES[activation])


def latent_moments(input: Tensor, q: Tensor, *, stride=1, offset=0) -> tuple[Tensor, Tensor]:
    r"""Mean and covariance of the latent ``z = Qᵀ x`` over each sample's pixels, without forming z.

    ``mean_n = E[z]`` and ``covariance_n = E[(z − mean)(z − mean)ᵀ]``, centred while it is accumulated: a mean
    of a thousand standard deviations costs no accuracy. They are all that normalising the latent in training
    needs, because ``Φ z`` has mean ``Φ mean`` and covariance ``Φ covariance Φᵀ``.

    Args:
        input: (N, Ci, \*spatial), contiguous, channels_last or any strides.
        q: (Ci, L), in the dtype of input.
        stride, offset: take the pixels offset + stride·i inside the input; integers, or one per dimension.

    Returns:
        mean (N, L) and covariance (N, L, L) in float32, float64 for float64. The covariance divides by the
        number of pixels.

    Raises:
        TypeError: not a tensor, an unsupported dtype or dtypes that differ.
        ValueError: rank, shape, device, a stride below 1, an offset outside the input.
        RuntimeError: a backend chosen by :class:`use_backend` cannot run the call.
    """
    stride, offset = checks.moments("latent_moments", input, q, stride, offset)
    pixels = geometry.every(input, stride, offset)
    if selection.select("moments", pixels, q) == "reference":
        return reference.moments(pixels, q)
    return ops.latent_moments(pixels, q)


def _conv(
    rank, input, weight, p, phi, q, r, lam, bias, residual, stride, padding, dilation, groups, activation
) -> Tensor:
    """A convolution with ``rank`` spatial dimensions; weights may be packed."""
    is_packed = type(weight) is PackedWeight
    check = packing.check_conv if is_packed else checks.conv
    # by name, not as a tuple, which would cost a hundredth of a small call
    plan = check(
        rank, input, weight, p, phi, q, r, lam, bias, residual, stride, padding, dilation, groups, activation
    )
    if is_packed:
        if packing.runs_packed(input):
            if plan is not None:
                where = plan.geometry
                input = geometry.sample(input, where.stride, where.centre, where.output)
            return ops.pointwise_packed(input, weight, phi, lam, bias, residual, _CODES[activation])
        # any other backend than the CPU's gets the plain tensors
        weight, p, q = weight.unpack()
        weight = weight.unflatten(1, (-1,) + (1,) * rank)
    if plan is None:
        if selection.select("pointwise", input, weight, p, phi, q, lam) != "reference":
            code = _CODES[activation]
            return ops.pointwise(input, weight.flatten(1), p, phi, q, lam, bias, residual, code)
    elif (
        selection.select(plan.form, input, weight, p, phi, r if q is None else q, lam, plan.geometry)
        != "reference"
    ):
        return _lower(plan, input, weight, p, phi, q, r, lam, bias, residual, groups, _CODES[activation])
    return reference.conv(plan, input, weight, p, phi, q, r, lam, bias, residual, groups, activation)


def _lower(plan, input, weight, p, phi, q, r, lam, bias, residual, groups, code) -> Tensor:
    where = plan.geometry
    if plan.form == "pointwise":
        sampled = geometry.sample(input, where.stride, where.centre, where.output)
        return ops.pointwise(sampled, weight.flatten(1), p, phi, q, lam, bias, residual, code)
    if plan.form == "depthwise":
        padded = geometry.pad_uneven(input, where)
        return ops.depthwise(
            padded, weight, p, phi, r, lam, bias, residual, where.stride, where.low, where.dilation, code
        )
    static = reference.convolve(input, weight, where, groups)
    if plan.form == "joint":
        latent = ops.pointwise(input, q.t(), None, None, None, None, None, None, 0)
        stencils = reference.stencil(latent, r, where)
        return ops.apply(static, stencils, p, reference.joint_phi(phi), None, lam, bias, residual, code)
    if p is None:
        return ops.apply(static, static, None, None, None, lam, bias, residual, code)
    sampled = geometry.sample(input, where.stride, where.centre, where.output)
    return ops.apply(static, sampled, p, phi, q, lam, bias, residual, code)
