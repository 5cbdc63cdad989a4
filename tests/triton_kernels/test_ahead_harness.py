# SPDX-License-Identifier: BSD-3-Clause
"""The ahead-of-time harness itself: a kernel with nothing wrong passes, each way of spoiling it is found."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import ahead
import trial

SM_80, SM_90, GFX942 = (ahead.TARGETS[name] for name in ("sm_80", "sm_90a", "gfx942"))
NVIDIA = [
    pytest.param(
        target, id=target.name, marks=() if ahead.assembler(target) else pytest.mark.skip("no ptxas")
    )
    for target in (SM_80, SM_90)
]


def launch(num_warps: int = 4, num_stages: int = 3, **given) -> ahead.Launch:
    return ahead.Launch(trial.product_kernel, (1, 1), trial.arguments(**given), num_warps, num_stages)


def result(target, num_warps: int = 4, num_stages: int = 3, **given) -> ahead.Result:
    return ahead.compile_for(launch(num_warps, num_stages, **given), target)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("target", (*NVIDIA, pytest.param(GFX942, id="gfx942")))
def test_a_good_kernel_has_no_problems(target, dtype):
    found = result(target, dtype=dtype)
    assert found.problems(wide=True) == []
    assert found.registers > 32
    assert found.shared > 0
    assert found.spills == 0
    assert set(found.matrix) == {{"sm_80": "mma", "sm_90a": "wgmma", "gfx942": "mfma"}[target.name]}
    assert found.moved("load", wide=True) > found.moved("load", wide=False)
    assert found.moved("store", wide=True) > 0


@pytest.mark.parametrize("target", NVIDIA)
def test_spills_are_found(target):
    assert any("spilled" in problem for problem in result(target, BLOCK_M=128, BLOCK_N=256).problems())


def test_spills_are_found_on_amd():
    spilled = result(GFX942, BLOCK_M=256, BLOCK_N=256)
    assert any("spilled" in problem for problem in spilled.problems())


def test_serialised_wgmma_is_found():
    spoilt = result(SM_90, SCALE_FIRST=True)
    assert spoilt.matrix["wgmma"], "which the count of instructions does not tell"
    assert any("C75" in problem for problem in spoilt.problems())


@pytest.mark.parametrize("target", NVIDIA)
def test_too_much_shared_memory_is_found(target):
    large = result(target, num_warps=8, num_stages=6, BLOCK_M=256, BLOCK_N=128)
    assert any("shared memory" in problem for problem in large.problems())


@pytest.mark.parametrize("target", NVIDIA)
def test_narrow_loads_are_found(target):
    """24 channels: rows begin at multiples of 16 bytes, but the kernel cannot know."""
    found = result(target, in_channels=24, BLOCK_K=32).problems(wide=True)
    assert any("narrow loads" in problem and "trial.py" in problem for problem in found)


def test_narrow_stores_are_found():
    found = result(SM_90, out_channels=100).problems(wide=True)
    assert any("narrow stores" in problem for problem in found)


def test_a_dot_without_matrix_instructions_is_found():
    """float32 products in full precision have none on NVIDIA, in tf32 they have."""
    plain, rounded = (
        result(SM_90, dtype=torch.float32, PRECISION=name, BLOCK_M=64) for name in ("ieee", "tf32")
    )
    assert not plain.matrix
    assert not plain.dots[0].matrix
    assert rounded.matrix["wgmma"]
    assert rounded.dots[0].wgmma
    assert rounded.problems(wide=True) == []


def test_missing_wgmma_is_found():
    narrow = result(SM_90, BLOCK_M=32)
    assert not narrow.dots[0].wgmma
    assert narrow.problems() == [], "32 rows are too few for it"
    wide = ahead.Dot(64, 32, 16, "bf16", wgmma=False, matrix=True, precision="ieee")
    narrow = ahead.Result(narrow.launch, SM_90, narrow.shared, narrow.asm, narrow.log, dots=[wide])
    assert narrow.problems() == ["no wgmma for 64x32x16:bf16:mma"]


def test_launches_are_specialised_as_on_the_hardware():
    given = trial.arguments(pixels=49, in_channels=24, out_channels=1)
    given["x_ptr"] = torch.empty(50, 24, dtype=torch.bfloat16, device="meta")[1:]
    given["w_ptr"] = torch.empty(50, 24, dtype=torch.bfloat16, device="meta")[:, 1:]
    _, signature, constants, attributes = ahead.specialise(
        ahead.Launch(trial.product_kernel, (1, 1), given, 4, 3), SM_90
    )
    names = list(signature)
    assert signature["x_ptr"] == "*bf16"
    assert signature["scale_ptr"] == "*fp32"
    assert signature["pixels"] == "i32"
    assert signature["out_channels"] == "constexpr", "an argument of one is a constant to the JIT"
    assert constants[names.index("out_channels"),] == 1
    divisible = {names[path[0]] for path, attribute in attributes.items() if attribute}
    assert divisible == {"x_ptr", "scale_ptr", "y_ptr"}, "a slice that begins at 48 bytes, one at two"


def test_equal_launches_are_compiled_once():
    assert ahead.key(launch(pixels=4096), SM_90) == ahead.key(launch(pixels=8192), SM_90)
    assert ahead.key(launch(pixels=4096), SM_90) != ahead.key(launch(pixels=4097), SM_90)
    assert ahead.key(launch(), SM_90) != ahead.key(launch(), SM_80)
    assert ahead.key(launch(), SM_90) != ahead.key(launch(num_stages=2), SM_90)
