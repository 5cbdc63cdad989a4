# SPDX-License-Identifier: BSD-3-Clause
"""Multiply-adds of the forms, added up by hand; the choice of order against the kernels' own plan."""

import pytest

from dcd_kernels import extension, madds

CI, CO, L, PIXELS = 6, 10, 3, 7


def test_orders_of_a_pointwise_layer():
    # Qᵀx 6·3, Φ 3·3, P 10·3 at each of 7 pixels
    assert madds.on_map(CI, CO, L, 1, PIXELS) == 7 * (18 + 9 + 30)
    # two blocks of 3 and 5 channels with L = 3 each: Q 2·3·3, Φ 2·9, P 2·5·3
    assert madds.on_map(CI, CO, L, 2, PIXELS) == 7 * (18 + 18 + 30)
    # PΦ 10·3·3, then a row of ten for each of six columns, 3 each
    assert madds.synthesised(CI, CO, L) == 90 + 180
    assert madds.synthesised(CI, CO, L, 2) == 90 + 2 * (5 * 3 * 3)
    few, many = (madds.pointwise_residual(CI, CO, L, 1, pixels) for pixels in (2, 1000))
    assert few == 2 * 57
    assert many == 90 + 180 + 60  # and ΛW0 is added, 6·10
    assert madds.pointwise_residual(CI, CO, 0, 1, 1000) == 0
    assert madds.without_q(CI, CO, L, PIXELS) == 7 * (3 * 6 + 10 * 3)


@pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_order_is_that_of_the_kernels(blocks):
    from dcd_kernels import _core

    seen = set()
    for in_channels in (4, 16, 96, 384):
        for out_channels in (8, 24, 320):
            for latent in (0, 1, 4, 11):
                sizes = (in_channels, out_channels, latent)
                costs = _core.pointwise_plan(*sizes, 1, blocks)
                at = costs["synthesised_madds"] // max(1, costs["factored_madds"])
                for pixels in {0, 1, at - 1, at, at + 1, at + 2, 3136} - {-1}:
                    plan = _core.pointwise_plan(*sizes, pixels, blocks)
                    pays = madds.synthesis_pays(*sizes, blocks, pixels)
                    assert pays == (plan["order"] == "synthesised"), (sizes, pixels)
                    if not pays and latent:
                        counted = madds.pointwise_residual(*sizes, blocks, pixels)
                        assert counted == plan["factored_madds"]
                    seen.add(pays)
    assert seen == {True, False}


def test_weights_of_a_depthwise_layer_and_the_joint_form():
    # ΦRᵀ: (4 × 4)·(4 × 9); P: (10 × 4)·(4 × 9); λW0: 10 × 9
    assert madds.depthwise_weights(10, 9, 4) == 144 + 360 + 90
    assert madds.depthwise_weights(10, 9, 4, lam=False) == 144 + 360
    assert madds.depthwise_weights(10, 9, 0) == 90
    # stride 2: Qᵀx (18) on 20 pixels; on 5 pixels two stencils of 9 taps on each of 3 channels, Φ and P
    assert madds.joint_residual(6, 10, 3, 2, 9, 20, 5) == 20 * 18 + 5 * (2 * 3 * 9 + 18 + 30)


INPUT, WEIGHT, P, PHI, Q, LAM = (1 << bit for bit in range(6))


def test_gradients_of_a_pointwise_layer():
    def count(needs, pixels=PIXELS, latent=L):
        return madds.pointwise_gradients(CI, CO, latent, 1, pixels, needs)

    assert count(0) == 0
    # W0ᵀ(λG) 60 and Q Φᵀ PᵀG 30 + 9 + 18 a pixel; on many pixels W_n once, 90 + 180 + 60
    assert count(INPUT, 2) == 2 * (60 + 57)
    assert count(INPUT, 1000) == 1000 * 60 + 330
    # S = G xᵀ, 60 a pixel; then λS is added to d_W0, and d_λ is the sum over rows of S ⊙ W0
    assert count(WEIGHT) == 7 * 60 + 60
    assert count(WEIGHT | LAM) == 7 * 60 + 120
    # 60 < 16 · 7: from S. S Q 180; times Φᵀ 90; Pᵀ S Q 90; PΦ 90 and Sᵀ PΦ 180
    assert count(P) == 7 * 60 + 180 + 90
    assert count(PHI | P) == 7 * 60 + 180 + 90 + 90
    assert count(Q) == 7 * 60 + 90 + 180
    everything = INPUT | WEIGHT | P | PHI | Q | LAM
    dynamic = count(INPUT) - 7 * 60
    assert count(everything) == 2 * 7 * 60 + dynamic + 120 + 180 + 90 + 90 + 90 + 180
    assert count(everything, latent=0) == 2 * 7 * 60 + 120
    # 60 > 16 · 3: from Qᵀx (18), ΦT (9), PᵀG (30), ΦᵀH (9) a pixel, and d_P 30, d_Φ 9, d_Q 18
    assert count(P | PHI | Q, 3) == 3 * (18 + 9 + 30 + 9 + 30 + 9 + 18)
    assert count(P, 3) == 3 * (18 + 9 + 30)
    assert count(Q, 3) == 3 * (30 + 9 + 18)


def test_gradients_beside_a_static_output():
    """Places: static, input, P, Φ, Q, λ."""
    static, image, p, phi, q, lam = (1 << bit for bit in range(6))
    arguments = (CI, CO, L, 1, PIXELS)
    assert madds.apply_gradients(*arguments, static, True) == 0
    assert madds.apply_gradients(*arguments, lam, True) == 10 * 7
    assert madds.apply_gradients(*arguments, image, True) == 7 * (30 + 9 + 18)
    assert madds.apply_gradients(*arguments, p | phi | q, True) == 7 * (18 + 9 + 30 + 9 + 30 + 9 + 18)
    assert madds.apply_gradients(CI, CO, 0, 1, PIXELS, static | lam, True) == 10 * 7
    # without Q, Φ is 3 × 6: Φᵀ(PᵀG) 30 + 18; Φx 18 for d_P 30; PᵀG 30 for d_Φ 18
    assert madds.apply_gradients(*arguments, image, False) == 7 * (30 + 18)
    assert madds.apply_gradients(*arguments, p, False) == 7 * (18 + 30)
    assert madds.apply_gradients(*arguments, p | phi, False) == 7 * (18 + 30 + 30 + 18)


def test_gradients_of_a_depthwise_layer():
    arguments = (10, 9, 4, PIXELS)
    weights = 144 + 360
    assert madds.depthwise_gradients(*arguments, INPUT, False) == 7 * 90 + weights
    assert madds.depthwise_gradients(*arguments, INPUT, True) == 7 * 90 + weights + 90
    assert madds.depthwise_gradients(*arguments, WEIGHT | LAM, True) == 7 * 90 + 180
    # S R 360, times Φᵀ 160, Pᵀ S R 160, PΦ 160 and Sᵀ PΦ 360
    assert madds.depthwise_gradients(*arguments, P | PHI | Q, True) == 7 * 90 + 360 + 160 + 160 + 160 + 360


def test_closed_formulas_of_section_3_4():
    # C = 64, L = 4, r = 16: W0 4096, P and Q 512, the branch 64·4 + (64 + 16)·4
    assert madds.dcd_parameters(64, 4, 16) == 4096 + 512 + 256 + 320
    assert madds.dcd_parameter_bound(64, 16) == 4096 * (1 + 3 / 16) + 2 * 64 * 8
    assert madds.kernels_parameters(64, 4) == 4 * 4096
    for channels in (2, 10, 64, 100, 1024):
        latent = max(1, int((channels - 1) ** 0.5))
        assert latent**2 < channels
        for reduction in (4, 8, 16):
            exact = madds.dcd_parameters(channels, latent, reduction)
            assert exact < madds.dcd_parameter_bound(channels, reduction)


def test_the_closed_formula_is_the_layer():
    from dcd_kernels.nn import DCDConv2d

    layer = DCDConv2d(64, 64, 1, bias=False, device="meta")
    assert layer.latent_channels == 4
    assert sum(p.numel() for p in layer.parameters()) == madds.dcd_parameters(64, 4, 16)
