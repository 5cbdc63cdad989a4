# SPDX-License-Identifier: BSD-3-Clause
"""Pooling and the dynamic branch: the kernels' bodies run on the CPU, thread by thread, against float64."""

from __future__ import annotations

import math

import branch_kernels as kernels
import numpy as np
import pytest
from branch_kernels import A100, GATES, H200, LAMS, image

pytestmark = pytest.mark.skipif(bool(kernels.available()), reason=kernels.available())

EPS = np.finfo(np.float32).eps


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return kernels.build(tmp_path_factory.mktemp("branch"))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- pooling

IMAGES = [
    # N, C, P: one pixel, fewer pixels than a vector, odd planes, several tiles, more of them than there are
    (2, 5, 1),
    (3, 16, 1),
    (1, 1, 1),
    (2, 3, 5),
    (2, 24, 49),
    (3, 40, 49),
    (1, 70, 196),
    (2, 8, 785),
    (1, 3, 1025),
    (1, 16, 9000),
]


def tile_sums(values: np.ndarray, tiles: int) -> np.ndarray:
    size = math.ceil(math.ceil(values.shape[2] / tiles) / 8) * 8
    parts = [values[:, :, t * size : (t + 1) * size].sum(2) for t in range(tiles)]
    return np.stack(parts, 1)


@pytest.mark.parametrize("element", kernels.ELEMENTS)
@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_every_element_is_added_once(host, rng, shape, layout, element):
    for shift, spare in ((0, 0), (1, 0), (3, 1), (0, 8)):
        x = image(rng, element, shape, layout, shift, spare)
        sums, counts, _ = kernels.pool(host, x)
        values = kernels.decode(x.array(), element)
        wanted = tile_sums(values, sums.shape[1])
        # a thread adds up a few dozen numbers one after the other, and then the threads
        bound = EPS * 64 * np.abs(values).sum(2).max()
        np.testing.assert_allclose(sums, wanted, rtol=0, atol=bound)
        size = 4 if element == "float32" else 2
        once = np.zeros(x.allocation.size, np.uint8)
        seen = kernels.Image(once, x.offset, x.strides, shape, "float32" if size == 4 else "float16")
        seen.array().view(np.uint32 if size == 4 else np.uint16)[...] = 0x01010101 if size == 4 else 0x0101
        np.testing.assert_array_equal(counts, once)


def test_other_strides(host, rng):
    """Channels and pixels far apart, as slices have them; more samples than a grid has rows."""
    x = image(rng, "float32", (2, 6, 50), "pixels")
    every_other = kernels.Image(x.allocation, x.offset, (300, 1, 12), (2, 6, 25), "float32")
    sums, _, plan = kernels.pool(host, every_other)
    assert not plan["planes"] and plan["wide"] == 0
    np.testing.assert_allclose(sums[:, 0], every_other.array().astype(np.float64).sum(2), rtol=1e-5)
    one_pixel = kernels.Image(x.allocation, x.offset, (300, 6, 1), (2, 6, 1), "float32")
    sums, _, plan = kernels.pool(host, one_pixel)
    assert plan["planes"]
    np.testing.assert_array_equal(sums[:, 0], one_pixel.array()[:, :, 0])
    with pytest.raises(RuntimeError, match="in place"):
        kernels.pool(host, kernels.Image(x.allocation, x.offset, (300, 2, 12), (2, 3, 25), "float32"))


def test_misaligned_reads_are_noticed(host, rng):
    """The harness would see a wide read where it must not be, so that the tests above mean something."""
    x = image(rng, "float32", (1, 8, 4), "pixels", shift=1)
    assert kernels.pool(host, x)[2]["wide"] == 0
    x = image(rng, "float32", (1, 8, 4), "pixels")
    assert kernels.pool(host, x)[2]["wide"] == 1
    x.allocation = x.allocation[: x.offset + 8 * 4 * 4 - 1]
    with pytest.raises(RuntimeError, match="out of bounds"):
        kernels.pool(host, x)


@pytest.mark.parametrize(
    ("shape", "layout", "lanes"),
    [
        # the pixels of a tile decide how many threads stand side by side
        ((1, 16, 112 * 112), "pixels", 2),
        ((1, 960, 49), "pixels", 32),
        ((1, 144, 784), "pixels", 8),
        ((1, 960, 49), "planes", 8),
        ((1, 16, 112 * 112), "planes", 32),
    ],
)
def test_plan(host, shape, layout, lanes):
    x = image(np.random.default_rng(0), "bfloat16", shape, layout)
    assert kernels.pool(host, x)[2]["lanes"] == lanes


def test_tiles(host):
    for pixels in (1, 49, 512, 513, 784, 3136, 12544, 50176, 10**7):
        tiles = host.host_pool_tiles(pixels)
        assert 1 <= tiles <= 16
        # the partial sums, 4 bytes each, are a hundredth of a large image in half precision
        assert tiles == 1 or 4 * tiles < 0.016 * pixels


QUADRANTS = [
    # N, C, H, W: one pixel, one row, rows shorter than a vector, an odd middle, several tiles with and
    # without one that is not full
    (2, 5, 1, 1),
    (3, 16, 1, 1),
    (1, 3, 1, 9),
    (2, 8, 6, 1),
    (2, 3, 5, 3),
    (2, 24, 7, 7),
    (3, 40, 7, 7),
    (1, 70, 14, 14),
    (2, 8, 27, 29),
    (1, 3, 41, 25),
    (1, 16, 56, 56),
]


def quadrant_sums(values: np.ndarray, height: int, width: int, tiles: int) -> np.ndarray:
    """(N, T, C, 2, 2): tiles of whole rows of each bin, all of one size but the last."""
    n, c, _ = values.shape
    values = values.reshape(n, c, height, width)
    rows = -(-height // 2)
    size = max(-(-128 // -(-width // 2)), -(-rows // 16))
    assert tiles == -(-rows // size)
    sums = np.empty((n, tiles, c, 2, 2))
    for t in range(tiles):
        for i in range(2):
            top = i * height // 2
            part = values[:, :, top + t * size : min(top + (t + 1) * size, top + rows)]
            sums[:, t, :, i, 0] = part[..., : -(-width // 2)].sum((2, 3))
            sums[:, t, :, i, 1] = part[..., width // 2 :].sum((2, 3))
    return sums


@pytest.mark.parametrize("element", kernels.ELEMENTS)
@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("shape", QUADRANTS, ids=str)
def test_quadrants(host, rng, shape, layout, element):
    n, c, height, width = shape
    for shift, spare in ((0, 0), (1, 0), (3, 1), (0, 8)):
        x = image(rng, element, (n, c, height * width), layout, shift, spare)
        sums, counts, _ = kernels.quadrants(host, x, height, width)
        values = kernels.decode(x.array(), element)
        wanted = quadrant_sums(values, height, width, sums.shape[1])
        bound = EPS * 64 * np.abs(values).sum(2).max()
        np.testing.assert_allclose(sums, wanted, rtol=0, atol=bound)
        # Nothing is read twice but the middle of odd sizes: by planes its row, by pixels its column as well.
        size = 4 if element == "float32" else 2
        like = kernels.Image(counts, x.offset, x.strides, x.shape, "float32" if size == 4 else "float16")
        reads = like.array().view(np.uint32 if size == 4 else np.uint16) & 0xFF
        reads = reads.reshape(n, c, height, width)
        planes = c == 1 or (layout == "planes" and height * width > 1)
        per_row = 1 + (2 * np.arange(height) + 1 == height)
        per_column = 1 + (2 * np.arange(width) + 1 == width) * (not planes)
        if height * width > 1:
            np.testing.assert_array_equal(reads, np.broadcast_to(np.outer(per_row, per_column), reads.shape))
        assert counts.sum(dtype=np.int64) == reads.sum(dtype=np.int64) * size


def test_nan_stays_in_its_bins(host, rng):
    """In slices whose pixels lie apart, too."""
    x = image(rng, "float32", (2, 6, 98), "pixels")
    every_other = kernels.Image(x.allocation, x.offset, (588, 1, 12), (2, 6, 49), "float32")
    every_other.array()[1, 2, 8], every_other.array()[0, 5, 6] = np.nan, np.inf
    sums, _, plan = kernels.quadrants(host, every_other, 7, 7)
    assert not plan["planes"] and not plan["wide"]
    assert np.isnan(sums[1, 0, 2, 0, 0]) and np.isinf(sums[0, 0, 5, 0, 1])
    assert np.isfinite(sums).sum() == sums.size - 2
    x = image(rng, "float16", (2, 8, 49), "planes")
    x.array()[1, 2, 8], x.array()[0, 5, 6] = np.nan, np.inf
    sums, _, plan = kernels.quadrants(host, x, 7, 7)
    assert plan["planes"]
    assert np.isnan(sums[1, 0, 2, 0, 0]) and np.isinf(sums[0, 0, 5, 0, 1])
    assert np.isfinite(sums).sum() == sums.size - 2


@pytest.mark.parametrize(
    ("shape", "layout", "lanes"),
    [
        # what expands in MobileNetV2
        ((16, 112), "pixels", 2),
        ((24, 56), "pixels", 4),
        ((160, 7), "pixels", 32),
        ((160, 7), "planes", 8),
        ((16, 112), "planes", 32),
    ],
)
def test_plan_of_quadrants(host, shape, layout, lanes):
    channels, size = shape
    x = image(np.random.default_rng(0), "bfloat16", (1, channels, size * size), layout)
    plan = kernels.quadrants(host, x, size, size)[2]
    assert plan["lanes"] == lanes and plan["wide"]


def test_tiles_of_quadrants(host):
    """As of whole images; none is without rows, so that none is without work."""
    for height in (1, 2, 7, 14, 28, 33, 56, 112, 224, 1000):
        for width in (1, 2, 7, 112, 5000):
            tiles = host.host_quadrant_tiles(height, width)
            assert 1 <= tiles <= 16 and tiles <= -(-height // 2)
            assert tiles == 1 or 16 * tiles < 0.08 * height * width


def test_nan_and_infinity_stay_where_they_are(host, rng):
    x = image(rng, "float16", (2, 9, 60), "planes")
    x.array()[0, 3, 17] = np.nan
    x.array()[1, 8, 59] = np.inf
    sums, _, _ = kernels.pool(host, x)
    assert np.isnan(sums[0, 0, 3]) and np.isinf(sums[1, 0, 8])
    assert np.isfinite(sums).sum() == sums.size - 2


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_every_half_is_decoded(host, element):
    bits = np.arange(0, 1 << 16, 7, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wanted = kernels.decode(bits.view(np.float16) if element == "float16" else bits, element)
    got = [host.host_to_float(kernels.ELEMENTS[element], int(b)) for b in bits]
    np.testing.assert_array_equal(np.array(got), wanted)


# --- the branch


def relu6(x):
    return np.clip(x, 0, 6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


GATE = {
    None: lambda h: h,
    "relu": lambda h: np.maximum(h, 0),
    "relu6": relu6,
    "silu": lambda h: h * sigmoid(h),
    "hardswish": lambda h: h * relu6(h + 3) / 6,
}
LAM = {
    None: lambda z: 1 + z,
    "hardsigmoid2": lambda z: relu6(z + 3) / 3,
    "sigmoid2": lambda z: 2 * sigmoid(z),
    "hardsigmoid": lambda z: relu6(z + 3) / 6,
    "sigmoid": sigmoid,
}


def truth(sums, scale, matrices, biases, lam_channels, gate, lam_activation):
    def affine(x, i):
        return x @ matrices[i].T + (0 if biases[i] is None else biases[i])

    hidden = affine(sums.astype(np.float64).sum(1) * scale, 0)
    hidden = hidden * relu6(affine(hidden, 1) + 3) / 3 if gate == "se" else GATE[gate](hidden)
    logits = affine(hidden, 2)
    if matrices[3] is not None:
        return LAM[lam_activation](logits), affine(hidden, 3)
    return LAM[lam_activation](logits[:, :lam_channels]), logits[:, lam_channels:]


def run(
    host,
    rng,
    sizes,
    *,
    gate="relu",
    lam_activation="hardsigmoid2",
    element="float32",
    bias=True,
    device=H200,
    aligned=True,
    split=False,
):
    """One launch against the truth; returns its plan."""
    n, tiles, inputs, hidden, lam_channels, others = sizes
    outputs = lam_channels + others
    scale = 1 / 7
    sums = (rng.standard_normal((n, tiles, inputs)) * 7 / np.sqrt(tiles)).astype(np.float32)

    def parameter(*shape):
        values = rng.standard_normal(shape) * (2 / np.sqrt(shape[-1]))
        bits = kernels.encode(values, element)
        memory = np.zeros(bits.size + 33, bits.dtype)
        start = (-memory.ctypes.data % 16) // bits.itemsize + (0 if aligned else 1)
        placed = memory[start : start + bits.size].reshape(shape)
        placed[...] = bits
        return placed

    rows = lam_channels if split else outputs  # of the expand FC
    matrices = [
        parameter(hidden, inputs),
        parameter(hidden, hidden) if gate == "se" else None,
        parameter(rows, hidden),
        parameter(others, hidden) if split else None,
    ]
    biases = [
        parameter(hidden),
        parameter(hidden) if gate == "se" else None,
        parameter(rows),
        parameter(others) if split else None,
    ]
    biases = biases if bias else [None] * 4
    call = (sums, scale, matrices, biases, lam_channels, gate, lam_activation)
    lam, phi, plan = kernels.branch(host, *call, element, device)
    exact = [
        [None if a is None else kernels.decode(a, element) for a in group] for group in (matrices, biases)
    ]
    wanted = truth(sums, np.float32(scale).astype(np.float64), *exact, *call[4:])
    for got, right in zip((lam, phi), wanted, strict=True):
        np.testing.assert_allclose(got, right, rtol=0, atol=2e-5 * max(1, np.abs(right).max(initial=0)))
    return plan


@pytest.mark.parametrize("element", kernels.ELEMENTS)
@pytest.mark.parametrize("lam_activation", LAMS)
@pytest.mark.parametrize("gate", GATES)
def test_formula(host, rng, gate, lam_activation, element):
    run(host, rng, (3, 2, 24, 8, 5, 9), gate=gate, lam_activation=lam_activation, element=element)


SHAPES = [
    # N, T, I, hidden, lam_channels, the others
    (1, 1, 1, 1, 1, 0),
    (2, 1, 3, 4, 0, 1),
    (1, 16, 96, 6, 24, 16),
    (5, 4, 130, 7, 33, 9),
    (2, 1, 257, 33, 1, 130),
    (17, 1, 40, 12, 20, 16),
]


@pytest.mark.parametrize("device", [H200, A100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("element", kernels.ELEMENTS)
@pytest.mark.parametrize("sizes", [(1, 1, 3, 4, 1, 1), (5, 4, 130, 7, 33, 9), (2, 1, 1024, 64, 1024, 256)])
def test_fcs_of_their_own(host, rng, sizes, element, bias, device):
    """λ's rows and Φ's lie apart, and a group's four rows may be of both."""
    plan = run(host, rng, sizes, element=element, bias=bias, split=True, device=device)
    assert plan["wide_expand"] == (sizes[3] % (4 if element == "float32" else 8) == 0)
    plan = run(host, rng, sizes, element=element, aligned=False, gate="se", split=True, device=device)
    assert not plan["wide_expand"]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("element", kernels.ELEMENTS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_shapes(host, rng, sizes, element, aligned):
    plan = run(host, rng, sizes, element=element, bias=False, aligned=aligned, gate="se")
    vector = 4 if element == "float32" else 8
    assert plan["wide_squeeze"] == (aligned and sizes[2] % vector == 0)
    assert plan["wide_expand"] == (aligned and sizes[3] % vector == 0)


@pytest.mark.parametrize(
    ("sizes", "element", "processors", "samples", "ranks"),
    [
        # samples of a cluster grow with the batch, ranks with the weights
        ((3, 1, 96, 8, 24, 16), "float32", 1, 4, 1),
        ((9, 1, 96, 8, 24, 16), "float32", 2, 8, 1),
        ((18, 1, 96, 8, 24, 16), "bfloat16", 1, 16, 1),
        ((19, 1, 96, 8, 24, 16), "float32", 1, 16, 1),
        ((1, 1, 576, 40, 160, 169), "float32", 132, 1, 2),
        ((1, 2, 960, 60, 320, 225), "bfloat16", 132, 1, 4),
        ((2, 1, 1024, 64, 1024, 256), "float16", 132, 1, 8),
        ((5, 1, 1000, 64, 1000, 250), "float32", 16, 4, 8),
    ],
)
def test_samples_and_ranks(host, rng, sizes, element, processors, samples, ranks):
    plan = run(host, rng, sizes, element=element, gate="se", device=(processors, *H200[1:]))
    assert (plan["samples"], plan["ranks"]) == (samples, ranks)
    plan = run(host, rng, sizes, element=element, device=(processors, *A100[1:]))
    assert plan["ranks"] == 1


@pytest.mark.parametrize("device", [H200, A100])
@pytest.mark.parametrize("element", ["float32", "bfloat16"])
def test_the_largest_fits(host, rng, element, device):
    """kBranchMaxInputs and kBranchMaxHidden with a gate, whatever the batch."""
    plan = run(host, rng, (5, 1, 8192, 1024, 8, 4), gate="se", element=element, device=(1, *device[1:]))
    assert plan["samples"] >= 1


def test_same_bits(host, rng):
    sums = rng.standard_normal((6, 3, 100)).astype(np.float32)
    matrices = [rng.standard_normal(s).astype(np.float32) for s in ((9, 100), (9, 9), (50, 9))] + [None]
    call = (sums, 0.1, matrices, [None] * 4, 20, "se", "sigmoid2", "float32", (1, *H200[1:]))
    first, again = kernels.branch(host, *call), kernels.branch(host, *call)
    assert all(np.array_equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))


def test_nan_stays_in_its_sample(host, rng):
    sums = rng.standard_normal((6, 1, 40)).astype(np.float32)
    sums[4, 0, 3] = np.nan
    matrices = [rng.standard_normal(s).astype(np.float32) for s in ((9, 40), (9, 9), (50, 9))] + [None]
    for gate in GATES:
        for lam in LAMS:
            lam, phi, plan = kernels.branch(
                host, sums, 1.0, matrices, [None] * 4, 20, gate, lam, "float32", (1, *H200[1:])
            )
            assert plan["samples"] == 8
            for out in (lam, phi):
                assert np.isnan(out[4]).all() and np.isfinite(np.delete(out, 4, 0)).all()


@pytest.mark.parametrize("lanes", [32, 8])
@pytest.mark.parametrize(("element", "vector"), [("float32", 4), ("bfloat16", 8)])
def test_slots_keep_the_lanes_apart(host, element, vector, lanes):
    """Reads of four numbers a lane: any eight lanes together touch every bank once."""
    count = 2 * lanes * vector
    slots = np.zeros(count, np.int32)
    host.host_slots(kernels.ELEMENTS[element], lanes, count, kernels.pointer(slots))
    np.testing.assert_array_equal(np.sort(slots), np.arange(count))
    for chunk in slots.reshape(2, lanes, vector // 4, 4):
        for part in range(vector // 4):
            fours = chunk[:, part]
            assert (np.diff(fours, axis=1) == 1).all() and (fours[:, 0] % 4 == 0).all()
            for eight in fours.reshape(lanes // 8, 8 * 4):
                assert len(set(eight % 32)) == 32
