# SPDX-License-Identifier: BSD-3-Clause
"""dcd_kernels._core, the module without torch, and what happens where the extension is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dcd_kernels
from dcd_kernels import extension

needs_extension = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)


def _operands(rng, n, ci, co, pixels, latent):
    return (
        rng.standard_normal((n, ci, pixels)),
        rng.standard_normal((co, ci)),
        rng.standard_normal((co, latent)),
        rng.standard_normal((n, latent, latent)),
        rng.standard_normal((ci, latent)),
        rng.uniform(size=(n, co)),
    )


@needs_extension
@pytest.mark.parametrize(
    "shape", [(1, 3, 7, 1, 1), (2, 20, 33, 49, 3), (3, 16, 8, 196, 11), (1, 64, 5, 5, 4)]
)
def test_kernel_on_numpy_arrays(shape):
    from dcd_kernels import _core

    x, weight, p, phi, q, lam = _operands(np.random.default_rng(0), *shape)
    per_sample = lam[:, :, None] * weight + p @ phi @ q.T
    np.testing.assert_allclose(
        _core.pointwise(x, weight, p, phi, q, lam), per_sample @ x, rtol=1e-11, atol=1e-11
    )


@needs_extension
def test_kernel_names_the_argument_that_does_not_fit():
    from dcd_kernels import _core

    x, weight, p, phi, q, lam = _operands(np.random.default_rng(0), 2, 4, 6, 5, 3)
    with pytest.raises(ValueError, match="phi must have shape"):
        _core.pointwise(x, weight, p, phi[:1], q, lam)
    with pytest.raises(ValueError, match="weight must have shape"):
        _core.pointwise(x, weight[:, :3], p, phi, q, lam)


@needs_extension
def test_core_does_not_import_torch():
    program = "import sys; sys.path.insert(0, sys.argv[1]); import _core; assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", program + "; print(_core.instruction_set())", str(extension.LIBRARY.parent)],
        check=True,
        capture_output=True,
    )


@needs_extension
def test_build_information():
    from dcd_kernels import _core

    features = _core.cpu_features()
    assert features["baseline"] is True
    assert features[_core.instruction_set()]
    assert set(_core.build_info()["cpu_kernels"]) == set(features)


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_package_works_without_the_extension_and_says_why(tmp_path, broken):
    package = Path(dcd_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "dcd_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if broken:
        (tmp_path / "dcd_kernels" / extension.LIBRARY.name).write_bytes(b"not a library")
    program = """
import torch, dcd_kernels as dcd
x = torch.randn(2, 3, 4, 4)
y = dcd.dcd_conv2d(x, torch.randn(5, 3, 1, 1), lam=torch.rand(2, 5))
assert y.shape == (2, 5, 4, 4)
try:
    with dcd.use_backend("cpu"):
        dcd.dcd_conv2d(x, torch.randn(5, 3, 1, 1), lam=torch.rand(2, 5))
except RuntimeError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the compiled extension is not available" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr
    assert "refused:" in done.stdout and "not available" in done.stdout


@needs_extension
def test_plan_takes_the_order_with_fewer_multiply_adds():
    from dcd_kernels import _core

    few = _core.pointwise_plan(in_channels=96, out_channels=24, latent_channels=8, pixels=10)
    many = _core.pointwise_plan(in_channels=96, out_channels=24, latent_channels=8, pixels=3136)
    assert few["order"] == "factored" and many["order"] == "synthesised"
    assert few["factored_madds"] == 10 * (8 * (96 + 24) + 8 * 8)
    assert few["synthesised_madds"] == 96 * 24 * 8 + 24 * 8 * 8 + 96 * 24
    with pytest.raises(ValueError, match="must be positive"):
        _core.pointwise_plan(0, 1, 1, 1)
    with pytest.raises(ValueError, match="batch and threads"):
        _core.pointwise_plan(8, 8, 2, 9, threads=0)


@needs_extension
def test_plan_of_packed_weights():
    """What is printed is what the kernels go by: every share of the work is covered, and fits its cache."""
    from dcd_kernels import _core

    sizes = ((16, 96, 4, 112 * 112), (2048, 512, 32, 49), (1024, 256, 32, 196), (24, 20, 4, 1), (5, 3, 0, 7))
    for in_channels, out_channels, latent, pixels in sizes:
        for batch in (1, 3, 8):
            for threads in (1, 2, 5):
                for last in (False, True):
                    plan = _core.pointwise_plan(
                        in_channels,
                        out_channels,
                        latent,
                        pixels,
                        batch=batch,
                        channels_last=last,
                        threads=threads,
                    )
                    assert plan["layout"] == ("channels_last" if last and pixels > 1 else "contiguous")
                    assert plan["panels"] * 16 >= out_channels > (plan["panels"] - 1) * 16
                    samples, channels, pieces = plan["tasks"]
                    assert 1 <= samples <= batch and 1 <= channels <= plan["panels"] and 1 <= pieces <= pixels
                    assert samples * channels * pieces <= max(threads, batch * threads)
                    assert (threads > 1) or samples == channels == pieces == 1
                    rows, lanes = plan["tile"]
                    assert (
                        plan["pixels_at_a_time"] % (rows if plan["layout"] == "channels_last" else lanes) == 0
                    )
                    if plan["order"] == "synthesised":
                        assert plan["channels_at_a_time"] % 16 == 0
                        assert plan["channels_at_a_time"] * in_channels <= max(96 * 1024, 16 * in_channels)
    assert "tile" not in _core.pointwise_plan(8, 8, 2, 9, blocks=2)


@needs_extension
def test_unknown_instruction_set_is_reported():
    done = subprocess.run(
        [sys.executable, "-c", "import dcd_kernels"],
        cwd=Path(dcd_kernels.__file__).parent.parent,
        env={**os.environ, extension.ISA_VARIABLE: "avx9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "'avx9' is not an instruction set" in done.stderr
