# SPDX-License-Identifier: BSD-3-Clause
"""A residual in diagonal blocks (paper, Eq. 7) as the kernels read it.

Block b is rows b of P and Q, and Φ_b. The kernels give each block latent channels in whole planes of its own.
Neighbouring blocks are one block, whose P, Q and Φ are filled up with zeros, where a plane holds them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .program import BLOCK, padded


def blocks_together(blocks: int, channels: int, latent: int) -> int:
    """How many of ``blocks`` are one for the kernels, which compute whole planes.

    As many as share a plane of ``channels``, the smaller of a layer's two, and a plane of latent channels.
    """
    fits = (
        n for n in range(1, blocks + 1) if blocks % n == 0 and max(latent, channels // blocks) * n <= BLOCK
    )
    return max(fits, default=1)


def _spread(rows: Tensor, columns: int) -> Tensor:
    """(B, C/B, L) as the (C, B·columns) matrix in which block b has columns b·columns and the next ones."""
    count, height, latent = rows.shape
    wide = rows.new_zeros(count, height, count, columns)
    for b in range(count):
        wide[b, :, b, :latent] = rows[b]
    return wide.flatten(2).flatten(0, 1)


def merged(matrix: Tensor, blocks: int, together: int) -> Tensor:
    """P or Q, (C, L) in ``blocks`` blocks of rows, as (C, together·L) in blocks/together of them."""
    groups = matrix.unflatten(0, (blocks // together, together, -1))
    return torch.cat([_spread(group, matrix.shape[1]) for group in groups])


def merged_phi(phi: Tensor, together: int) -> Tensor:
    """(B, L, L, K) as (B/together, together·L, together·L, K), block-diagonal."""
    groups = phi.unflatten(0, (-1, together))
    wide = phi.new_zeros(len(groups), together, phi.shape[1], together, *phi.shape[2:])
    for b in range(together):
        wide[:, b, :, b] = groups[:, b]
    return wide.flatten(3, 4).flatten(1, 2)


def side_by_side(matrix: Tensor, blocks: int) -> Tensor:
    """P or Q, (C, L) in ``blocks`` blocks of rows, as the dense matrix (C, latents of all blocks).

    The latents of each block but the last are in whole planes.
    """
    latent = matrix.shape[1]
    wide = _spread(matrix.unflatten(0, (blocks, -1)), padded(latent))
    return wide[:, : (blocks - 1) * padded(latent) + latent]
