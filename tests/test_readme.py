# SPDX-License-Identifier: BSD-3-Clause
"""The README says what is so: its support table, its example, its variables, its links and its commands."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

import dcd_kernels as dcd
from benchmarks import readme
from dcd_kernels import extension
from dcd_kernels.backends import selection
from dcd_kernels.explain import support_table_markdown

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(begin: str, end: str) -> str:
    """What stands between two marker comments, of which there is one each."""
    assert README.count(f"<!-- {begin}") == 1 and README.count(f"<!-- {end} -->") == 1
    return README.split(f"<!-- {begin}")[1].split("-->", 1)[1].split(f"<!-- {end} -->")[0].strip()


@pytest.mark.skipif(not extension.LOADED, reason="without the compiled kernels the table is another one")
def test_the_support_table_is_what_can_run_says():
    table = between("support table:", "end of the support table")
    assert table == support_table_markdown(), "paste in: python -m dcd_kernels info --support-table"


def test_the_numbers_have_their_place():
    between("numbers:", "end of the numbers")


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_equals_what_it_says_it_equals():
    example, equivalent, layers, *_ = EXAMPLES
    torch.manual_seed(0)
    names: dict = {}
    exec(example, names)
    fused = names["y"]
    exec(equivalent, names)
    assert names["w"].shape == (8, 128, 64)
    torch.testing.assert_close(fused, names["y"], rtol=1e-4, atol=1e-4)
    assert (fused > 0).any() and fused.shape == (8, 128, 28, 28)

    names["trained_conv"] = torch.nn.Conv2d(64, 128, 1)
    names["network"] = torch.nn.Sequential(names["trained_conv"], torch.nn.ReLU())
    expected = names["network"](names["x"])
    exec(layers, names)
    assert names["layer"](names["x"]).shape == fused.shape
    assert isinstance(names["dynamic"][0], names["dcd"].nn.DCDConv2d)
    torch.testing.assert_close(names["dynamic"](names["x"]), expected, rtol=1e-4, atol=1e-4)


def test_the_checkpoint_s_example(tmp_path, monkeypatch):
    (example,) = [text for text in EXAMPLES if "checkpoint" in text]
    trained = dcd.models.released.mobilenet_v2()
    monkeypatch.chdir(tmp_path)
    state = {f"module.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, "checkpoint.pth.tar")
    names = {"dcd": dcd}
    exec(example, names)
    loaded = names["model"].state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in trained.state_dict().items())


def test_accelerate_s_example():
    (example,) = [text for text in EXAMPLES if "accelerate" in text]
    names = {"dcd": dcd, "model": dcd.models.released.mobilenet_v2(0.1)}
    exec(example, names)
    assert len(dcd.report(names["model"]).taken) == 33


def test_optimize_for_inference_s_example(capsys):
    (example,) = [text for text in EXAMPLES if "optimize_for_inference" in text]
    images = torch.rand(2, 3, 64, 64)
    names = {"dcd": dcd, "model": dcd.models.mobilenet_v2(0.25), "images": images}
    exec(example, names)
    torch.testing.assert_close(names["y"], names["model"](images).detach(), rtol=1e-3, atol=1e-4)
    assert "OptimizedNetwork" in repr(names["fast"]) and "features.0.0" in capsys.readouterr().out


def test_the_numbers_are_those_of_the_rows():
    assert readme.main(["--check"]) == 0, "run: python -m benchmarks.readme"


def test_every_environment_variable_is_in_the_table_and_no_other():
    files = [*(ROOT / "dcd_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.[hc]*")]
    read = set()
    for path in files:
        read |= set(re.findall(r'"(DCD_KERNELS_[A-Z_]+)"', path.read_text(encoding="utf-8")))
    read |= set(re.findall(r'environ\.get\("(\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))
    named = set(re.findall(r"^\| `(DCD_[A-Z_]+)`", README, re.MULTILINE))
    assert named == read
    assert selection.ENVIRONMENT in named


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_make_target_named_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", (ROOT / page).read_text("utf-8"), re.MULTILINE))
        assert named and named <= targets, named - targets
