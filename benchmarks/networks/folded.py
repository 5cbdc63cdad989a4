# SPDX-License-Identifier: BSD-3-Clause
"""Released-form networks folded by hand, as one would before handing them to an inference runtime.

In eval mode every norm is a scale and a shift. With s₁, b₁ and s₂, b₂ those of the latent's norms and s, b of
the norm behind the layer, whose λ is relu6(v + 3)/3::

    z₁ = Q'ᵀx + b₁                      Q' = Q diag(s₁)
    z  = Φ' z₁                          Φ' = diag(s₂) Φ + I
    y  = λ' ⊙ (W' * x) + P' z + b'      W' = ⅓ diag(s) W0    P' = diag(s) P    λ' = relu6(v + 3)

with b' = P' b₂ + b. s₂, I, 3 and the ⅓ of the branch's gate go into the linear layer that makes λ' and Φ'.
What is left is computed in factors, three convolutions and one small product; or, where the layer is 1×1, by
the weights of each sample, W(x) = diag(λ') W' + P' Φ' Q'ᵀ with bias P' Φ' b₁ + b', either as a convolution,
grouped by samples, or as a product with the pixels. What is fastest depends on the runtime and the batch.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dcd_kernels.models.released import Classifier, ReleasedLayer

CONVOLUTION, PRODUCT, FACTORED = "W(x) convolution", "W(x) product", "factored"
FORMS = (CONVOLUTION, PRODUCT, FACTORED)


def pooled(input: Tensor, bins: int) -> Tensor:
    """``adaptive_avg_pool2d`` of maps whose size is known: (N, C, H, W) → (N, C·bins²).

    Bins of an odd map overlap, for which ONNX has no pooling: they are taken one by one.
    """
    if bins == 1:
        return input.mean((2, 3))
    height, width = input.shape[2:]
    if height % bins == 0 and width % bins == 0:
        return F.avg_pool2d(input, (height // bins, width // bins)).flatten(1)
    rows, columns = (
        [slice(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)] for size in (height, width)
    )
    means = [input[:, :, row, column].mean((2, 3)) for row in rows for column in columns]
    return torch.stack(means, 2).flatten(1)


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


class FoldedLayer(nn.Module):
    """A dynamic layer in eval mode with its norms, and that of the norm behind it where there is one.

    Args:
        layer: of :mod:`dcd_kernels.models.released`; it is left as it is.
        norm: the norm behind it.
        form: of ``FORMS``; only 1×1 convolutions with stride 1 have W(x), the others are in factors.

    Shapes:
        as those of ``layer``.
    """

    @torch.no_grad()
    def __init__(self, layer: ReleasedLayer, norm: nn.Module | None, form: str) -> None:
        super().__init__()
        weight, linear = layer.static.weight, isinstance(layer, Classifier)
        outputs, latent = layer.out_channels, layer.latent_channels
        one, zero = weight.new_ones(outputs), weight.new_zeros(outputs)
        scale, shift = _scale_and_shift(norm) if norm else (one, zero)
        (scale1, shift1), (scale2, shift2) = _scale_and_shift(layer.bn1), _scale_and_shift(layer.bn2)
        self.outputs, self.latent = outputs, latent
        self.bins = 0 if linear else layer.pool.output_size
        self.geometry = {} if linear else {"stride": layer.static.stride, "padding": layer.static.padding}
        plain = not linear and weight[0, 0].numel() == 1 and layer.static.stride == (1, 1)
        self.form = form if plain else FACTORED

        def across(values: Tensor, like: Tensor) -> Tensor:
            return values.view(-1, *[1] * (like.dim() - 1))

        p = layer.p.weight * across(scale, layer.p.weight)
        phi = layer.fc_phi.weight.unflatten(0, (latent, latent)) * scale2[:, None, None]
        eye = torch.eye(latent, dtype=weight.dtype)
        static_bias = getattr(layer.static, "bias", None)
        folded = {
            "squeeze": layer.fc[0].weight,
            "gate": layer.fc[1].fc[0].weight,
            "expand": torch.cat([layer.fc_scale.weight, phi.flatten(0, 1)]) / 3,
            "expand_bias": torch.cat([3 * one, eye.flatten()]),
            "weight": weight * across(scale, weight) / 3,
            "static_bias": None if static_bias is None else static_bias * scale / 3,
            "q": layer.q.weight * across(scale1, layer.q.weight),
            "q_bias": shift1,
            "p": p,
            "bias": p.flatten(1) @ shift2 + shift,
        }
        if self.form != FACTORED:
            folded |= {name: folded[name].flatten(1) for name in ("weight", "q", "p")}
            # the bias is one more column of W(x): of Q'ᵀ it is b₁
            folded["q"] = torch.cat([folded["q"], folded.pop("q_bias")[:, None]], 1)
        for name, value in folded.items():
            self.register_buffer(name, None if value is None else value.clone())

    def coefficients(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """λ' ``(N, out_channels)`` and Φ' ``(N, L, L)``."""
        squeezed = F.linear(pooled(input, self.bins) if self.bins else input, self.squeeze)
        gated = squeezed * F.relu6(F.linear(squeezed, self.gate) + 3)
        lam, phi = F.linear(gated, self.expand, self.expand_bias).split([self.outputs, self.latent**2], 1)
        return F.relu6(lam), phi.unflatten(1, (self.latent, self.latent))

    def forward(self, input: Tensor) -> Tensor:
        lam, phi = self.coefficients(input)
        if not self.bins:
            latent = (phi @ F.linear(input, self.q, self.q_bias)[:, :, None]).flatten(1)
            return lam * F.linear(input, self.weight, self.static_bias) + F.linear(latent, self.p, self.bias)
        if self.form != FACTORED:
            return self.with_weights(input, lam, phi)
        latent = F.conv2d(input, self.q, self.q_bias, self.geometry["stride"])
        mixed = (phi @ latent.flatten(2)).reshape(latent.shape)
        static = F.conv2d(input, self.weight, **self.geometry)
        return lam[:, :, None, None] * static + F.conv2d(mixed, self.p, self.bias)

    def with_weights(self, input: Tensor, lam: Tensor, phi: Tensor) -> Tensor:
        """By W(x), (N, out_channels, in_channels)."""
        residual = self.p @ (phi @ self.q)
        weights = torch.addcmul(residual[:, :, :-1], lam[:, :, None], self.weight)
        bias = residual[:, :, -1:] + self.bias[:, None]
        samples, size = input.shape[0], input.shape[2:]
        if self.form == PRODUCT:
            pixels = input.permute(0, 2, 3, 1).flatten(1, 2)
            output = pixels @ weights.transpose(1, 2) + bias.transpose(1, 2)
            return output.unflatten(1, size).permute(0, 3, 1, 2)
        if samples == 1:
            return F.conv2d(input, weights[0, :, :, None, None]) + bias[:, :, :, None]
        output = F.conv2d(
            input.reshape(1, -1, *size), weights.flatten(0, 1)[:, :, None, None], groups=samples
        )
        return output.reshape(samples, -1, *size) + bias[:, :, :, None]


def _fold(layer: nn.Module, norm: nn.Module | None, form: str) -> nn.Module:
    if isinstance(layer, ReleasedLayer):
        return FoldedLayer(layer, norm, form)
    return fuse_conv_bn_eval(layer, norm) if norm else layer


# norms of ResNet's blocks by the convolution in front of them; elsewhere they follow in a list
NORM_OF = {f"conv{i}": f"bn{i}" for i in (1, 2, 3)}


def fold(network: nn.Module, form: str) -> nn.Module:
    """A copy of a network in the released form, or of its static twin, without norms, in eval mode.

    Raises:
        ValueError: ``form`` is not one of ``FORMS``.
    """
    if form not in FORMS:
        raise ValueError(f"fold: form must be one of {FORMS}, got {form!r}")
    made = copy.deepcopy(network).eval()
    for module in list(made.modules()):
        if isinstance(module, ReleasedLayer):
            continue
        children = dict(module.named_children())
        names = list(children)
        for position, (name, child) in enumerate(children.items()):
            behind = names[position + 1] if position + 1 < len(names) else None
            behind = NORM_OF.get(name, behind)
            norm = children.get(behind)
            norm = norm if isinstance(norm, nn.BatchNorm2d) else None
            if isinstance(child, ReleasedLayer) or (norm and isinstance(child, nn.Conv2d)):
                setattr(module, name, _fold(child, norm, form))
                if norm:
                    setattr(module, behind, nn.Identity())
    return made
