# SPDX-License-Identifier: BSD-3-Clause
"""The compiled apply op: cases, and what test_ops.py does not ask of every op."""

import op_checks
import pytest
import torch
from cases import in_layout
from operands import (
    ISAS,
    LAYOUTS,
    Case,
    call,
    operands,
)

CASES = [
    # awkward sizes: latent channels 1, 3, 11; three input channels; 1, 5, 49 pixels; odd output channels
    Case("apply", 1, 3, 1, 1, (1,)),
    Case("apply", 2, 3, 7, 3, (5,), "relu", bias="shared"),
    Case("apply", 3, 3, 20, 11, (7, 7), "silu", bias="sample", residual=True),
    Case("apply", 1, 24, 33, 3, (1, 1), "relu6", bias="shared", residual=True),
    Case("apply", 2, 17, 33, 11, (5, 1), "hardswish"),
    Case("apply", 3, 40, 20, 1, (2, 5, 3), "relu", residual=True),
    # the terms one by one
    Case("apply", 2, 19, 20, 4, (7, 7), lam=False),
    Case("apply", 2, 19, 20, 4, (7, 7), dynamic=False, bias="sample"),
    Case("apply", 2, 19, 20, 4, (7, 7), "relu", lam=False, dynamic=False, bias="sample", residual=True),
    # blocks
    Case("apply", 2, 12, 20, 3, (3, 5), "relu6", blocks=4, bias="shared"),
    Case("apply", 3, 14, 14, 1, (49,), "silu", blocks=7, residual=True),
    # the input is the latent, phi is rectangular: the last step of joint fusion
    Case("apply", 2, 12, 33, 3, (5, 3), "relu", given_latent=True, bias="shared"),
    Case("apply", 1, 44, 20, 11, (7, 7), lam=False, given_latent=True, residual=True),
    Case("apply", 3, 3, 7, 5, (1, 1), given_latent=True),
    # sizes that reach full tiles
    Case("apply", 2, 32, 64, 4, (28, 28), "relu6", bias="shared"),
    Case("apply", 1, 130, 96, 8, (15, 13), "relu", bias="sample", residual=True),
]
WHOLE = Case("apply", 2, 13, 21, 5, (3, 7), bias="sample", residual=True)
TILED = Case("apply", 2, 32, 64, 4, (28, 28), bias="sample", residual=True)
LATENT = Case("apply", 2, 10, 21, 5, (3, 7), given_latent=True, bias="shared")
FINISH = Case("apply", 2, 13, 21, 5, (3, 7), "silu", dynamic=False, bias="sample", residual=True)
EACH_ACTIVATION = [
    Case("apply", 2, 18, 35, 5, (9, 6), name, bias="shared")
    for name in (None, "relu", "relu6", "silu", "hardswish")
]
IN_HALF = CASES[1:5] + CASES[7:12]


@pytest.mark.full
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", (1, 2, 7, 8, 15, 16, 17, 47, 48, 49, 50, 96, 97, 196, 400))
@pytest.mark.parametrize("channels", ((1, 1), (3, 8), (8, 9), (16, 15), (31, 16), (33, 65), (130, 7)))
def test_values_at_every_tile_edge(channels, pixels, layout, isa):
    for latent in (1, 2, 4, 7, 8, 17):
        for given_latent in (False, True):
            case = Case(
                "apply",
                2,
                *channels,
                latent,
                (pixels,),
                "relu",
                bias="shared",
                residual=True,
                given_latent=given_latent,
            )
            op_checks.values(case, torch.float32, layout, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_mixed_layouts_of_the_images(isa):
    """static and input come from different layers, often in different layouts."""
    contiguous, channels_last = operands(TILED), operands(TILED, layout="channels_last")
    for own in (contiguous, channels_last):
        expected = call(TILED, own)
        for place, name in ((1, "contiguous"), (1, "channels_last"), (1, "sliced"), (7, "channels_last")):
            tensors = list(own)
            tensors[place] = in_layout(own[place], name)
            got = call(TILED, tensors)
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()


def test_strided_sample_of_a_larger_input():
    """What functional.py passes for stride 2: a view with gaps."""
    tensors = operands(WHOLE)
    larger = torch.full((2, 13, 6, 14), float("nan"))
    larger[:, :, ::2, ::2] = tensors[1]
    expected = call(WHOLE, tensors)
    tensors[1] = larger[:, :, ::2, ::2]
    assert torch.equal(call(WHOLE, tensors), expected)


def test_input_is_ignored_without_the_residual():
    tensors = operands(FINISH)
    expected = call(FINISH, tensors)
    tensors[1] = torch.full_like(tensors[0], float("nan"))
    assert torch.equal(call(FINISH, tensors), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_nan_and_infinity(layout, isa):
    for case in (TILED, FINISH):
        op_checks.propagation_through_residual(case, layout, isa)
    for case in (WHOLE, TILED):
        op_checks.infinity_is_not_lost(case, layout, isa)
        for place in range(6):
            op_checks.nan_stays_in_its_pixels(case, layout, isa, place)
    for place in (0, 1, 2, 3, 5):
        op_checks.nan_stays_in_its_pixels(LATENT, layout, isa, place)


@pytest.mark.parametrize("size", ((0, 3, 7), (2, 0, 7)))
def test_empty(size):
    tensors = operands(WHOLE)
    batch, *spatial = size
    tensors[0] = torch.empty(batch, 21, *spatial)
    tensors[1] = torch.empty(batch, 13, *spatial)
    for place in (3, 5, 6):
        tensors[place] = tensors[place][:batch]
    tensors[7] = torch.empty(batch, 21, *spatial)
    assert call(WHOLE, tensors).shape == (batch, 21, *spatial)


@pytest.mark.parametrize(
    ("place", "shape", "named"),
    (
        (0, (2, 21), "static"),
        (1, (2, 13, 3, 6), "input"),
        (1, (1, 13, 3, 7), "input"),
        (2, (20, 5), "p"),
        (3, (2, 5, 4), "phi"),
        (3, (1, 5, 5), "phi"),
        (4, (12, 5), "q"),
        (5, (1, 21), "lam"),
        (6, (3, 21), "bias"),
        (7, (2, 21, 7, 3), "residual"),
    ),
)
def test_wrong_shapes_name_the_argument(place, shape, named):
    tensors = operands(WHOLE)
    tensors[place] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=rf"\b{named}\b"):
        call(WHOLE, tensors)


@pytest.mark.parametrize("missing", (2, 3))
def test_incomplete_residual(missing):
    tensors = operands(WHOLE)
    tensors[missing] = None
    with pytest.raises(RuntimeError, match=r"\b(p|phi|q)\b"):
        call(WHOLE, tensors)


def test_rectangular_phi_must_fit_the_latent():
    tensors = operands(LATENT)
    tensors[3] = tensors[3][:, :, :9]
    with pytest.raises(RuntimeError, match=r"\bphi\b"):
        call(LATENT, tensors)
