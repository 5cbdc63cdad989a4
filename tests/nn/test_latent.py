# SPDX-License-Identifier: BSD-3-Clause
"""The rules for L, L_k and the squeeze."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcd_kernels.nn import latent

CHANNELS = st.integers(1, 4096)

# By hand, from the words and the formula of Section 3.2 and from the rule of the released networks.
TABLE = [
    # in, out, halving, printed, released
    (1, 1, 1, 1, 4),
    (4, 4, 1, 2, 4),
    (15, 15, 3, 7, 4),
    (16, 16, 2, 4, 4),
    (16, 96, 2, 4, 8),
    (24, 144, 3, 6, 12),
    (96, 24, 3, 6, 12),
    (144, 32, 4, 8, 16),
    (96, 576, 6, 12, 24),
    (576, 160, 10, 20, 20),
    (160, 960, 10, 20, 20),
    (960, 160, 10, 20, 40),
    (1280, 1000, 31, 62, 31),
]


@pytest.mark.parametrize(("ci", "co", "halving", "printed", "released"), TABLE)
def test_rules_by_name(ci, co, halving, printed, released):
    assert latent.latent_channels("halving", ci, co) == halving
    assert latent.latent_channels("printed", ci, co) == printed
    assert latent.latent_channels("released", ci, co) == released


@given(CHANNELS, CHANNELS)
def test_halving_stops_at_the_first_value_below_the_root(ci, co):
    channels = min(ci, co)
    size = latent.halving(ci, co)
    below = [channels >> i for i in range(13) if (channels >> i) ** 2 < channels]
    assert size == (max(1, below[0]) if channels > 1 else 1)


@given(CHANNELS, CHANNELS)
def test_printed_is_the_formula(ci, co):
    exponent = 0  # ⌊log2 √C⌋ is the largest e with 4^e <= C
    while 4 ** (exponent + 1) <= min(ci, co):
        exponent += 1
    assert latent.printed(ci, co) == min(ci, co) // 2**exponent


@given(CHANNELS, CHANNELS)
def test_released_bounds(ci, co):
    size = latent.released(ci, co)
    pooled = 4 * ci if ci < co else ci
    assert size >= 4
    assert size == 4 or size**2 <= 2 * pooled
    # no halving more than needed: twice the size (give or take the floor) would be too large or too wide
    assert (
        size == 4 or (2 * size + 1) ** 2 > 2 * pooled or (size + 1) * (8 if ci < co else 2) > min(pooled, co)
    )


def test_blocks_and_kernels_divide_the_channels():
    assert latent.latent_channels("released", 96, 576, blocks=4) == latent.released(24, 144)
    assert latent.latent_channels("halving", 64, 64, latent_kernel=4) == latent.halving(16, 16)
    assert latent.latent_channels("halving", 3, 3, latent_kernel=4) == 1
    # the constraint of Section 4.3
    for channels in (64, 128, 256, 512):
        assert latent.latent_channels("halving", channels, channels, latent_kernel=4) ** 2 * 4 <= channels


def test_a_number_and_a_function_are_taken_as_they_are():
    assert latent.latent_channels(45, 8, 8, blocks=2) == 45
    assert latent.latent_channels(lambda ci, co: math.isqrt(4 * ci), 64, 128) == 16


@pytest.mark.parametrize("rule", ["halve", "", 0, -3])
def test_bad_rule(rule):
    with pytest.raises(ValueError, match=r"latent_channels must .* got " + repr(rule)):
        latent.latent_channels(rule, 16, 16)


@pytest.mark.parametrize("rule", [2.0, None, True])
def test_bad_rule_type(rule):
    with pytest.raises(TypeError, match=f"latent_channels must .* got {type(rule).__name__}"):
        latent.latent_channels(rule, 16, 16)


def test_kernel_and_squeeze_defaults():
    assert [latent.latent_kernel_elements(k) for k in ((1,), (3,), (3, 3), (5, 5), (3, 1), (3, 3, 3))] == [
        1,
        1,
        4,
        12,
        1,
        13,
    ]
    assert latent.squeeze_channels(96, 576, 16) == 36
    assert latent.squeeze_channels(576, 96, 16) == 36
    assert latent.squeeze_channels(16, 16, 16) == 4
    with pytest.raises(ValueError, match="reduction must be at least 1, got 0"):
        latent.squeeze_channels(16, 16, 0)
