# SPDX-License-Identifier: BSD-3-Clause
"""Weights as the op `network` reads them: sixteen output channels next to each other, norms folded in.

All algebra is in float64 and rounded once. With the norm behind a layer as y ← a⊙y + c, and the latent norms
of the released form as z₁ = s₁⊙z + t₁ and s₂⊙(Φz₁) + t₂ (+ z₁):

    W0 ← a⊙W0,  P ← a⊙P,  Q ← Q diag(s₁),  Φ ← diag(s₂)Φ (+ I),  bias ← a⊙(bias + P t₂) + c,

and t₁ is added to the latent before Φ. Φ comes out of a linear layer, so that its factors go into that.

In a network of bfloat16, matrices whose columns are summed over are rounded to it, and lie in memory by pairs
of columns; biases and the filters of depthwise layers are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import side_by_side
from .program import BLOCK, padded

Packed = dict[str, Tensor]


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", torch.float64)


def rows_padded(matrix: Tensor) -> Tensor:
    """With rows of zeros up to whole planes."""
    return torch.cat([matrix, matrix.new_zeros(padded(matrix.shape[0]) - matrix.shape[0], *matrix.shape[1:])])


def planes(matrix: Tensor) -> Tensor:
    """(rows, K) as [planes of rows, K, 16]."""
    return rows_padded(matrix).unflatten(0, (-1, BLOCK)).transpose(1, 2)


# G of F(2×2, 3×3): Lavin and Gray 2016, section 4.1
_FILTERING = torch.tensor(
    [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64, device="cpu"
)


def filtered(weight: Tensor) -> Tensor:
    """3×3 taps of a layer, (Co, 9·Ci), as the points G g Gᵀ of Winograd's F(2×2, 3×3), (Co, 16·Ci)."""
    taps = weight.unflatten(1, (3, 3, -1))
    return torch.einsum("ay,bx,oyxc->oabc", _FILTERING, _FILTERING, taps).flatten(1)


def weights(matrix: Tensor, narrow: bool, run: int = 0) -> Tensor:
    """(rows, K) as `planes`, or ``narrow`` as [planes of rows, K / 2, 16, 2] in bfloat16.

    A pair is of two columns that are multiplied with neighbours; ``run`` columns are neighbours, 0 for all. A
    last one has a zero beside it.
    """
    if not narrow:
        return planes(matrix)
    blocks = rows_padded(matrix).unflatten(0, (-1, BLOCK)).unflatten(2, (-1, run or matrix.shape[1]))
    paired = nn.functional.pad(blocks, (0, blocks.shape[3] % 2)).unflatten(3, (-1, 2))
    return paired.permute(0, 2, 3, 1, 4).to(torch.bfloat16)


def size_of(packed: Tensor) -> int:
    """The numbers of float32 in whose place ``packed`` lies."""
    return packed.numel() // 2 if packed.dtype is torch.bfloat16 else packed.numel()


@dataclass
class Affine:
    """What a norm in eval mode does to a channel: factor ⊙ x + shift."""

    factor: Tensor
    shift: Tensor


def affine_of(norm: nn.Module | None, channels: int) -> Affine:
    """``norm`` by its running statistics; one that does nothing for None."""
    if norm is None:
        options = {"dtype": torch.float64, "device": "cpu"}
        return Affine(torch.ones(channels, **options), torch.zeros(channels, **options))
    factor = (wide(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * wide(norm.weight)
    shift = -wide(norm.running_mean) * factor
    return Affine(factor, shift if norm.bias is None else shift + wide(norm.bias))


@dataclass
class Branch:
    """The linear layers of a dynamic branch as (weight, bias), by name; ``bins`` of its pooling a dimension.

    ``expand`` gives λ's logits, then those of Φ: (blocks, L, L), or (latent_kernel, L, L) where that is not
    0. ``scale`` (L,) and ``residual`` are the second latent norm's factor and the latent residual, which are
    part of Φ from here on; layers with several blocks or a latent kernel have neither.
    """

    channels: int
    bins: int
    squeeze: tuple[Tensor, Tensor | None]
    gate: tuple[Tensor, Tensor | None] | None
    expand: tuple[Tensor, Tensor | None]
    lam_channels: int
    latent: int
    blocks: int = 1
    latent_kernel: int = 0
    scale: Tensor | None = None
    residual: bool = False

    def pack(self, narrow: bool) -> Packed:
        weight, bias = self.squeeze
        # columns c·bins² + bin, as torch flattens them, become bin·planes·16 + c
        columns = weight.unflatten(1, (self.channels, self.bins**2)).permute(2, 1, 0)
        columns = torch.cat([rows_padded(region) for region in columns])
        packed = {"squeeze": weights(columns.T, narrow), "squeeze_bias": _vector(bias)}
        if self.gate is not None:
            packed |= {"gate": weights(self.gate[0], narrow), "gate_bias": _vector(self.gate[1])}
        weight, bias = self.expand
        if bias is None and self.residual:
            bias = weight.new_zeros(weight.shape[0])
        packed["expand"] = weights(self._rows(weight), narrow)
        packed["expand_bias"] = None if bias is None else self._rows(bias[:, None], self.residual)
        return packed

    def _rows(self, matrix: Tensor, residual: bool = False) -> Tensor:
        """λ's rows in whole planes, then Φ's in the order [blocks, planes of i, j, 16 of i] of Φ_b[i, j].

        Jointly with the kernel, j runs over (c, j) of Φ_c[i, j].
        """
        lam, phi = matrix[: self.lam_channels], matrix[self.lam_channels :]
        phi = phi.unflatten(0, (self.latent_kernel or self.blocks, self.latent, self.latent))
        if self.latent_kernel:
            phi = phi.transpose(0, 1).flatten(1, 2)[None]
        if self.scale is not None:
            phi = self.scale[:, None, None] * phi
        if residual:
            phi = phi + torch.eye(self.latent, dtype=phi.dtype, device=phi.device)[:, :, None]
        blocks = [rows_padded(block).unflatten(0, (-1, BLOCK)).transpose(1, 2) for block in phi]
        return torch.cat([rows_padded(lam), *(block.flatten(0, 2) for block in blocks)])


@dataclass
class Layer:
    """The numbers of one layer: W0 and biases, P, Q (R of a depthwise layer) with what is folded into them.

    weight (Co, K), K being the taps and channels in the order in which they are multiplied; ``run`` of them
    are multiplied with neighbours in memory, 0 for all. r is that of joint fusion.
    """

    weight: Tensor
    bias: Tensor | None = None
    static_bias: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None
    blocks: int = 1
    latent_bias: Tensor | None = None
    branch: Branch | None = None
    run: int = 0

    def normalised(self, norm: nn.Module | None) -> Layer:
        """With the norm behind it folded in."""
        if norm is None:
            return self
        folded = affine_of(norm, self.weight.shape[0])
        self.weight = folded.factor[:, None] * self.weight
        self.bias = folded.shift if self.bias is None else folded.factor * self.bias + folded.shift
        if self.static_bias is not None:
            self.static_bias = folded.factor * self.static_bias
        if self.p is not None:
            self.p = folded.factor[:, None] * self.p
        return self

    def pack(self, narrow: bool = False, depthwise: bool = False) -> Packed:
        """What the op reads, by field; ``narrow`` for a network of bfloat16."""
        # in the order in which they are read
        packed = {} if self.branch is None else self.branch.pack(narrow)
        narrow = narrow and not depthwise
        if self.p is not None:
            p, q = (side_by_side(matrix, self.blocks) for matrix in (self.p, self.q))
            packed |= {"p": weights(p, narrow), "q": weights(q.T, narrow), "r": self.r}
            packed["latent_bias"] = _vector(self.latent_bias)
        packed |= {
            "static_bias": _vector(self.static_bias),
            "bias": _vector(self.bias),
            "weight": weights(self.weight, narrow, self.run),
        }
        return {name: tensor for name, tensor in packed.items() if tensor is not None}


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else rows_padded(tensor)
