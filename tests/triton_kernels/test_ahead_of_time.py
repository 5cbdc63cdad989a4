# SPDX-License-Identifier: BSD-3-Clause
"""What the compiler makes of the Triton kernels on the layers of real networks, without a GPU."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import ahead
import layers
import triton

import dcd_kernels.backends.triton as kernels

LAYER = layers.Layer(64, 256, 56)
NARROW = layers.Layer(24, 144, 56)  # 24 channels: the JIT does not know by itself that rows are aligned
SMALL = layers.Layer(576, 160, 7)  # maps smaller than a tile
# large and small maps, wide and narrow, channels that 16 does not divide
OF_EACH_KIND = [
    layers.Layer(*shape) for shape in ((16, 96, 112), (24, 144, 56), (384, 96, 14), (2048, 512, 7))
]
TARGETS = [
    pytest.param(
        target,
        id=name,
        marks=()
        if target.gpu.backend != "cuda" or ahead.assembler(target)
        else pytest.mark.skip("Triton came without ptxas, which knows registers and spills"),
    )
    for name, target in ahead.TARGETS.items()
]
NVIDIA = TARGETS[:2]


def check(calls: list[layers.Call], target: ahead.Target, *, every: bool = False) -> None:
    bad = []
    for call, result in layers.results(layers.launches(calls, every=every), [target]):
        problems = result.problems(wide=call.wide)
        bad += [ahead.row(result, wide=call.wide)] if problems else []
    assert not bad, "\n" + ahead.table(bad)


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("op", layers.OPS)
def test_one_configuration_of_each_kernel(op, target):
    check(layers.calls([LAYER], [op], ["channels_last"]), target)


@pytest.mark.parametrize("op", ("pointwise", "pointwise_backward"))
def test_the_other_layout_and_other_layers(op):
    target = ahead.TARGETS["sm_90a"]
    check(layers.calls([LAYER], [op], ["contiguous"]), target)
    check(layers.calls([SMALL, NARROW], [op], ["channels_last"]), target)


@pytest.mark.full
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("layout", layers.LAYOUTS)
@pytest.mark.parametrize("op", layers.OPS)
def test_all_configurations_on_all_layers(op, layout, target):
    check(layers.calls(ops=[op], layouts=[layout]), target, every=True)


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        *(
            pytest.param("fp16", *target.values, id=f"fp16-{target.id}", marks=target.marks)
            for target in NVIDIA
        ),
        *(
            pytest.param("fp32", *target.values, id=f"fp32-{target.id}", marks=target.marks)
            for target in NVIDIA
        ),
        pytest.param("bf16", ahead.TARGETS["gfx942"], id="bf16-gfx942"),
    ],
)
@pytest.mark.parametrize("layout", layers.LAYOUTS)
@pytest.mark.parametrize("op", layers.OPS)
def test_first_configurations_in_other_types(op, layout, dtype, target):
    """What runs untuned, on one layer of each kind."""
    chosen = [layer for layer in layers.LAYERS if layer in OF_EACH_KIND]
    check(layers.calls(chosen, [op], [layout], [dtype]), target)


def test_every_kernel_is_launched_by_some_op():
    """A kernel that no call above reaches is proved by nothing."""
    there = set()
    for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, triton.JITFunction) and "program_id" in value.src:
                there.add(value.fn.__name__)
    calls = layers.calls([LAYER, SMALL, layers.Layer(16, 96, 112)])
    launched = {launch.kernel.fn.__name__ for _, launch in layers.launches(calls, every=True)}
    assert there, "no kernel found"
    assert there == launched


def test_launches_do_not_depend_on_memory():
    """Grids and arguments come from shapes alone: nothing waits for the device."""
    call = layers.Call("pointwise_backward", LAYER)
    first, again = (layers.launches([call]) for _ in range(2))
    for (_, one), (_, other) in zip(first, again, strict=True):
        assert one.grid == other.grid
        assert ahead.key(one, ahead.TARGETS["sm_90a"]) == ahead.key(other, ahead.TARGETS["sm_90a"])
