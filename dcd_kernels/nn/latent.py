# SPDX-License-Identifier: BSD-3-Clause
"""Sizes of a DCD layer: latent channels ``L``, latent kernel elements ``L_k`` and the squeeze of the branch.

The paper names a default for ``L`` that its own words read in two ways, and the published parameter counts
follow a third; all three are here, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

LatentRule = Callable[[int, int], int]

# A squeeze or a latent space of one or two channels cannot carry a fusion, however narrow the layer.
SMALLEST_RELEASED = 4
SMALLEST_SQUEEZE = 4


def halving(in_channels: int, out_channels: int) -> int:
    """Halve ``C = min(in_channels, out_channels)`` until the result is below ``√C``; at least 1.

    The words of Section 3.2 ("dividing C by 2 repeatedly until it is less than √C"). Keeps ``L² < C`` for
    every ``C`` above 1, which the parameter bound of Section 3.4 rests on.
    """
    channels = min(in_channels, out_channels)
    latent = channels
    while latent * latent >= channels and latent > 1:
        latent //= 2
    return latent


def printed(in_channels: int, out_channels: int) -> int:
    """``⌊C / 2^⌊log2 √C⌋⌋`` with ``C = min(in_channels, out_channels)``.

    The formula of Section 3.2. It gives ``√C`` where ``C`` is a power of four and up to ``2√C`` elsewhere, so
    it breaks the paper's own ``L² < C``.
    """
    channels = min(in_channels, out_channels)
    # ⌊log2 √C⌋ in integers: a float logarithm is off by one next to large powers of four.
    return channels >> ((channels.bit_length() - 1) // 2)


def released(in_channels: int, out_channels: int) -> int:
    """The rule that reproduces the published counts of MobileNetV2 (Tables 1 to 4).

    ``I = 4·in_channels`` (2×2 pooling) and ``ρ = 8`` where it expands (``in_channels < out_channels``);
    ``I = in_channels`` and ``ρ = 2`` elsewhere. ``L = min(I, out_channels) // ρ``, with ``ρ`` doubled while
    ``L² > 2·I``; at least 4.
    """
    expands = in_channels < out_channels
    pooled = 4 * in_channels if expands else in_channels
    ratio = 8 if expands else 2
    narrow = min(pooled, out_channels)
    while (narrow // ratio) ** 2 > 2 * pooled:
        ratio *= 2
    return max(narrow // ratio, SMALLEST_RELEASED)


LATENT_RULES: dict[str, LatentRule] = {"halving": halving, "printed": printed, "released": released}


def latent_channels(
    rule: int | str | LatentRule,
    in_channels: int,
    out_channels: int,
    *,
    blocks: int = 1,
    latent_kernel: int = 1,
) -> int:
    """The number of latent channels ``L`` of a layer (``L_b`` of one block where ``blocks > 1``).

    Args:
        rule: a number, which is taken as it is; the name of a rule (``'halving'``, ``'printed'``,
            ``'released'``); or a function of ``(in_channels, out_channels)``.
        in_channels, out_channels: of the layer.
        blocks: ``B`` of Eq. 7; the rule is applied to ``in_channels / B`` and ``out_channels / B``.
        latent_kernel: ``L_k`` of Eq. 9; the rule is applied to ``C / L_k``, which keeps ``L²·L_k ≤ C``.

    Raises:
        ValueError: an unknown name, or a result below 1.
        TypeError: a rule that is neither a number, a name nor a function.
    """
    if isinstance(rule, int) and not isinstance(rule, bool):
        latent = rule
    elif isinstance(rule, str) or callable(rule):
        apply = LATENT_RULES.get(rule) if isinstance(rule, str) else rule
        if apply is None:
            raise ValueError(
                f"latent_channels must be an integer or one of {sorted(LATENT_RULES)}, got {rule!r}"
            )
        share = blocks * latent_kernel
        latent = apply(max(1, in_channels // share), max(1, out_channels // share))
    else:
        raise TypeError(
            f"latent_channels must be an integer, one of {sorted(LATENT_RULES)} or a function of "
            f"(in_channels, out_channels), got {type(rule).__name__}"
        )
    if not isinstance(latent, int) or latent < 1:
        raise ValueError(f"latent_channels must be a positive integer, got {latent!r} (from {rule!r})")
    return latent


def latent_kernel_elements(kernel_size: Sequence[int]) -> int:
    """``L_k = ⌊∏k / 2⌋``, the default of Sections 4.2 and 4.3; at least 1."""
    return max(1, math.prod(kernel_size) // 2)


def squeeze_channels(in_channels: int, out_channels: int, reduction: int) -> int:
    """Width of the branch between its two FCs: ``max(in_channels, out_channels) // reduction``, at least 4.

    ``C / r`` of Section 3.4 for a square layer; for the others the wider side, which is what the published
    parameter counts follow.

    Raises:
        TypeError: a reduction that is not an integer.
        ValueError: a reduction below 1.
    """
    if isinstance(reduction, bool) or not hasattr(reduction, "__index__"):
        raise TypeError(f"reduction must be an integer, got {reduction!r}")
    if reduction < 1:
        raise ValueError(f"reduction must be at least 1, got {reduction}")
    return max(max(in_channels, out_channels) // reduction, SMALLEST_SQUEEZE)
