# SPDX-License-Identifier: BSD-3-Clause
"""torch's FlopCounterMode on the ops: against numbers added up by hand (sizes as in test_madds.py)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dcd_kernels as dcd
from dcd_kernels import extension, madds
from dcd_kernels.latent_map import BATCH, RUNNING, Norm

pytestmark = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)

N, CI, CO, L, LK = 2, 6, 10, 3, 4
OPS = torch.ops.dcd_kernels

if extension.LOADED:
    from dcd_kernels import ops


def flops(call):
    """Operation -> what it was counted as, of ours alone."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts().get("Global", {})
    return {op: count for op, count in counts.items() if str(op).startswith("dcd_kernels.")}


def factors(latent=L, blocks=None):
    phi = (N, latent, latent) if blocks is None else (N, blocks, latent, latent)
    return torch.randn(CO, latent), torch.randn(phi), torch.randn(CI, latent)


def test_forward_of_a_pointwise_layer():
    x, weight = torch.randn(N, CI, 1, 7), torch.randn(CO, CI, 1, 1)
    p, phi, q = factors()
    # 60 for W0 and 57 for the factors a pixel; twice, for two samples
    conv = dcd.dcd_conv2d
    with dcd.use_backend("cpu"):
        assert flops(lambda: conv(x, weight, p, phi, q)) == {OPS.pointwise: 2 * N * (7 * 60 + 330)}
        few = x[..., :2]
        assert flops(lambda: conv(few, weight, p, phi, q)) == {OPS.pointwise: 2 * N * 2 * (60 + 57)}
        lam = torch.rand(N, CO)
        assert flops(lambda: conv(x, weight, lam=lam)) == {OPS.pointwise: 2 * N * 7 * 60}
        linear = flops(lambda: dcd.dcd_linear(x[..., 0, 0], weight[..., 0, 0], p, phi, q))
        assert linear == {OPS.pointwise: 2 * N * (60 + 57)}
        blocks = flops(lambda: conv(few, weight, *factors(blocks=2)))
        assert blocks == {OPS.pointwise: 2 * N * 2 * (60 + 18 + 18 + 30)}
    pooled = flops(lambda: OPS.pointwise_pooled(x, weight.flatten(1), p, phi, q, None, None, None, 1))
    assert pooled == {OPS.pointwise_pooled: 2 * N * (7 * 60 + 330)}


def test_backward_of_a_pointwise_layer():
    x, weight = torch.randn(N, CI, 1, 7), torch.randn(CO, CI, 1, 1)
    tensors = [x, weight, *factors(), torch.rand(N, CO)]

    def step(*wanted):
        x, weight, p, phi, q, lam = (
            tensor.clone().requires_grad_(place in wanted) for place, tensor in enumerate(tensors)
        )
        with dcd.use_backend("cpu"):
            dcd.dcd_conv2d(x, weight, p, phi, q, lam=lam).sum().backward()

    # d_x: W_n once, 330, and 60 a pixel; the rest from S, see test_madds.py
    assert flops(lambda: step(0))[OPS.pointwise_backward] == 2 * N * (7 * 60 + 330)
    assert flops(lambda: step(1))[OPS.pointwise_backward] == 2 * N * (7 * 60 + 60)
    everything = 2 * 7 * 60 + 330 + 120 + 180 + 90 + 90 + 90 + 180
    assert flops(lambda: step(0, 1, 2, 3, 4, 5)) == {
        OPS.pointwise: 2 * N * (7 * 60 + 330),
        OPS.pointwise_backward: 2 * N * everything,
    }


def test_centre_tap_and_joint():
    x, weight = torch.randn(N, CI, 5, 4), torch.randn(CO, CI, 3, 3)
    p, phi, q = factors()
    with FlopCounterMode(display=False) as counter, dcd.use_backend("cpu"):
        dcd.dcd_conv2d(x, weight, p, phi, q, padding=1, stride=2)
    counts = counter.get_flop_counts()["Global"]
    # 3 × 2 output pixels
    assert counts == {
        torch.ops.aten.convolution: 2 * N * 6 * 9 * 60,
        OPS.apply: 2 * N * 6 * 57,
    }
    joint_phi, r = torch.randn(N, 2, L, L), torch.randn(9, 2)
    with FlopCounterMode(display=False) as counter, dcd.use_backend("cpu"):
        dcd.dcd_conv2d(x, weight, p, joint_phi, q, r=r, padding=1, stride=2)
    counts = counter.get_flop_counts()["Global"]
    static = 2 * N * 6 * 9 * 60
    assert sum(counts.values()) == static + 2 * N * madds.joint_residual(CI, CO, L, 2, 9, 20, 6)
    assert counts[OPS.pointwise] == 2 * N * 20 * 18 and counts[OPS.apply] == 2 * N * 6 * (18 + 30)


def test_apply_and_its_gradients():
    static, x = torch.randn(N, CO, 7), torch.randn(N, CI, 7)
    p, phi, q = factors()
    lam = torch.rand(N, CO)
    leaves = [t.requires_grad_() for t in (static, x, p, phi, q, lam)]
    with dcd.use_backend("cpu"):
        counts = flops(lambda: dcd.dcd_apply(*leaves[:5], lam=lam).sum().backward())
        assert counts == {
            OPS.apply: 2 * N * 7 * 57,
            OPS.apply_backward: 2 * N * 7 * (10 + 57 + 18 + 9 + 30 + 9 + 30 + 9 + 18),
        }
        scaled = flops(lambda: dcd.dcd_apply(static, x, None, None, None, lam=lam).sum().backward())
        assert scaled == {OPS.apply: 0, OPS.apply_backward: 2 * N * 7 * 10}
        wide = torch.randn(N, L, CI, requires_grad=True)
        counts = flops(lambda: dcd.dcd_apply(static, x, p, wide, None).sum().backward())
        # Φx and P; Φᵀ(PᵀG); Φx again, d_P; PᵀG again, d_Φ
        assert counts == {
            OPS.apply: 2 * N * 7 * 48,
            OPS.apply_backward: 2 * N * 7 * (48 + 18 + 30 + 30 + 18),
        }


def test_depthwise_and_its_gradients():
    x, weight = torch.randn(N, 10, 5, 4), torch.randn(10, 1, 3, 3)
    p, phi, r = torch.randn(10, LK), torch.randn(N, LK, LK), torch.randn(9, LK)
    lam = torch.rand(N, 10)
    for tensor in (x, weight, p, phi, r, lam):
        tensor.requires_grad_()
    with dcd.use_backend("cpu"):
        counts = flops(
            lambda: (
                dcd.dcd_conv2d(x, weight, p, phi, r=r, lam=lam, groups=10, padding=1, stride=2)
                .sum()
                .backward()
            )
        )
    # 6 output pixels of 10 channels and 9 taps; the weights of a sample 144 + 360 + 90
    weights = 144 + 360 + 90
    assert counts == {
        OPS.depthwise: 2 * N * (6 * 90 + weights),
        OPS.depthwise_backward: 2 * N * (2 * 6 * 90 + weights + 180 + 360 + 160 + 160 + 160 + 360),
    }


def test_moments_and_branch():
    x, q = torch.randn(N, CI, 7), torch.randn(CI, L)
    assert flops(lambda: OPS.latent_moments(x, q)) == {OPS.latent_moments: 2 * N * 7 * (18 + 9)}
    grads = torch.randn(N, L), torch.randn(N, L, L)
    backward = OPS.latent_moments_backward
    for needs, given, madds_a_pixel in (
        (0b11, grads, 27 + 36),
        (0b10, grads, 27 + 18),
        (0b01, (grads[0], None), 18),
    ):
        counts = flops(lambda needs=needs, given=given: backward(x, q, grads[0], *given, needs))
        assert counts == {backward: 2 * N * 7 * madds_a_pixel}
    sums = torch.randn(N, 1, CI)
    squeeze, gate, expand = torch.randn(4, CI), torch.randn(4, 4), torch.randn(CO + 9, 4)
    codes = CO, 5, 1
    counts = flops(lambda: OPS.branch(sums, 1.0, squeeze, None, gate, None, expand, None, None, None, *codes))
    assert counts == {OPS.branch: 2 * N * (24 + 16 + 19 * 4)}
    lam, phi = torch.randn(CO, 4), torch.randn(9, 4)
    counts = flops(lambda: OPS.branch(sums, 1.0, squeeze, None, gate, None, lam, None, phi, None, *codes))
    assert counts == {OPS.branch: 2 * N * (24 + 16 + 19 * 4)}


def test_a_released_layer_in_one_call():
    layer = dcd.accelerate(dcd.models.released.PointwiseConv(CI, CO, 16).eval())
    latent, hidden = layer.latent_channels, layer.squeeze_channels
    x = torch.randn(N, CI, 1, 7)
    p, phi, q = factors(latent)
    with torch.no_grad():
        (count,) = flops(lambda: layer(x)).values()
        weight = layer.conv.weight
        (product,) = flops(lambda: dcd.dcd_conv2d(x, weight, p, phi, q)).values()
    branch = 4 * CI * hidden + hidden**2 + (CO + latent**2) * hidden
    assert count == product + 2 * N * (branch + latent**2 + CO * latent)


def test_gradients_of_the_branch():
    from dcd_kernels.ops import branch

    sums = torch.randn(N, 1, CI, requires_grad=True)
    squeeze, gate = (torch.randn(4, columns, requires_grad=True) for columns in (CI, 4))
    lam, phi = (torch.randn(rows, 4, requires_grad=True) for rows in (CO, 9))
    frozen = [t.detach() for t in (squeeze, gate, lam, phi)]

    def run(sums, squeeze, gate, lam, phi):
        args = sums, 1.0, squeeze, None, gate, None, lam, None, phi, None, CO, 5, 1
        sum(t.sum() for t in branch.branch(*args)).backward()

    # the hidden units again, then both products of each FC
    wanted = 2 * N * (24 + 16 + 2 * (24 + 16 + 19 * 4))
    assert flops(lambda: run(sums, squeeze, gate, lam, phi))[OPS.branch_backward] == wanted
    joined = torch.randn(CO + 9, 4, requires_grad=True)
    assert flops(lambda: run(sums, squeeze, gate, joined, None))[OPS.branch_backward] == wanted
    wanted = 2 * N * (24 + 16 + 24 + 16 + 19 * 4)
    assert flops(lambda: run(sums, *frozen))[OPS.branch_backward] == wanted


def test_latent_map():
    phi, mean, covariance = torch.randn(N, L, L), torch.randn(N, L), torch.eye(L).repeat(N, 1, 1)
    given = tuple(t.requires_grad_() for t in (phi, mean, covariance))

    def counts(norm1, norm2, moments=given[1:]):
        return flops(
            lambda: ops.latent_map.latent_map(phi, *moments, norm1, norm2, None, True)[0].sum().backward()
        )

    batch, running = Norm(BATCH), Norm(RUNNING, running_mean=torch.zeros(L), running_var=torch.ones(L))
    without = {OPS.latent_map: 2 * N * 9, OPS.latent_map_backward: 2 * N * 3 * 9}
    assert counts(running, running, (None, None)) == without
    assert counts(batch, running) == without
    first = 9 + 27  # Φ mean and Φ covariance
    assert counts(running, batch) == {
        OPS.latent_map: 2 * N * (9 + first),
        OPS.latent_map_backward: 2 * N * (3 * 9 + first + 2 * 9 + 27),
    }


def test_a_module_is_counted_without_data():
    """Under fake tensors, layer by layer, and the same with data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = dcd.nn.DCDConv2d(CI, CO, 1, latent_channels=L)
    with FlopCounterMode(display=False) as counter, dcd.use_backend("cpu"):
        layer(torch.randn(N, CI, 3, 3))
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as fake:
        layer(torch.empty(N, CI, 3, 3))
    assert counter.get_flop_counts() == fake.get_flop_counts()
    assert counter.get_flop_counts()["DCDConv2d"][OPS.pointwise] == 2 * N * (9 * 60 + 330)
