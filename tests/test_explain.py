# SPDX-License-Identifier: BSD-3-Clause
"""explain, the support table and the choice of a backend: one predicate says, explains and tabulates."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from cases import FORMS, make_case
from torch import nn

import dcd_kernels as dcd
from dcd_kernels import extension, functional, reference
from dcd_kernels.backends import cpu, selection
from dcd_kernels.explain import explain, support_table_markdown

OPS = {
    "pointwise": "pointwise",
    "blocks": "pointwise",
    "depthwise": "depthwise",
    "depthwise attention alone": "depthwise",
    "joint": "joint",
    "centre": "centre",
    "grouped": "centre",
    "linear rows": "linear",
    "apply on a latent": "apply",
}
BEST = "cpu" if extension.LOADED else "reference"


@pytest.fixture(autouse=True)
def automatic():
    before = selection.current()
    dcd.use_backend("auto")
    yield
    dcd.use_backend(before)


def explained(case):
    return explain(getattr(dcd, case.function), **case.tensors, **case.options)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.first = Layer("pointwise", out_channels=6)
        self.second = Layer("centre")

    def forward(self, x):
        return self.second(nn.functional.dropout(self.first(self.norm(x))))


class Layer(nn.Module):
    def __init__(self, form, **options):
        super().__init__()
        self.case = make_case(form, dtype=torch.float32, **options)

    def forward(self, x):
        return self.case.with_tensors({"input": x}).run(dcd)


# explain


@pytest.mark.parametrize("form", OPS)
def test_names_the_form_and_every_backend(form):
    (call,) = explained(make_case(form)).calls
    assert call.op == OPS[form]
    assert call.chosen == BEST
    assert {verdict.backend for verdict in call.verdicts} == set(selection.NAMES) - {"auto"}


def test_text():
    text = str(explained(make_case("pointwise", dtype=torch.float32)))
    assert "1. pointwise convolution: input (2, 6, 5, 4), weight (4, 6, 1, 1), p (4, 3)" in text
    assert "float32 on cpu" in text
    assert f"runs on {BEST}: " in text
    assert "triton: " in text and "cuda: " in text
    if extension.LOADED:
        assert torch.ops.dcd_kernels.cpu_isa() in text
        assert "reference: could, but cpu is preferred" in text


@pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)
def test_notes():
    half = explained(make_case("pointwise").converted(torch.float16, torch.float32))
    assert half.calls[0].notes[0] == "float16: computed in float32 and rounded back"
    assert "20 output pixels" in half.calls[0].notes[1]
    double = explained(make_case("pointwise"))
    assert "baseline" in double.calls[0].kernel and double.calls[0].notes
    assert "torch's convolution" in str(explained(make_case("centre")))
    with torch.autocast("cpu", torch.bfloat16):
        notes = explained(make_case("pointwise", dtype=torch.float32)).calls[0].notes
    assert notes[0] == "autocast: all but lam, phi and bias are converted to bfloat16 first"
    assert notes[1].startswith("bfloat16: ")


def test_reason_of_a_dtype_and_of_a_device():
    if extension.LOADED:
        text = str(explained(make_case("pointwise", dtype=torch.complex64)))
        assert "cpu: torch.complex64 is not one of float32, float64, bfloat16, float16" in text
        text = str(explained(make_case("pointwise", device="meta")))
        assert "cpu: input is on meta, these kernels run on the CPU" in text
    else:
        assert extension.REASON in str(explained(make_case("pointwise")))


def test_missing_extension_is_the_reason(monkeypatch):
    monkeypatch.setattr(extension, "LOADED", False)
    monkeypatch.setattr(extension, "REASON", "the library is gone")
    (call,) = explained(make_case("pointwise")).calls
    assert call.chosen == "reference"
    assert "cpu: the library is gone" in str(explained(make_case("pointwise")))


def test_module_by_name_and_without_traces():
    network = Network()
    x = torch.randn(2, 6, 5, 4)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    text = str(explain(network, x))
    assert torch.equal(torch.rand(1), expected)
    assert not network.norm.running_mean.any() and network.norm.num_batches_tracked == 0
    assert network.norm.running_mean.grad_fn is None
    assert "1. first (Layer): pointwise" in text and "2. second (Layer): k×k" in text
    assert text.count("why not on another backend") == 1
    assert not network.first._forward_hooks and not network.first._forward_pre_hooks


def test_compiled_module_runs_uncompiled(fresh_compiler):
    text = str(explain(torch.compile(Network(), backend="eager"), torch.randn(2, 6, 5, 4)))
    assert "1. first (Layer)" in text


@pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)
@pytest.mark.parametrize(
    "form,options,pixels",
    [
        ("pointwise", {"size": (8, 8)}, 64),
        ("pointwise", {"size": (8, 8), "stride": 8}, 1),
        ("pointwise", {"size": (3, 3), "stride": 2, "padding": 1}, 9),
        ("blocks", {"size": (8, 8)}, 64),
        ("linear", {}, 1),
        ("linear rows", {}, 6),
    ],
)
def test_order_of_the_product_of_this_call(form, options, pixels):
    case = make_case(form, in_channels=64, out_channels=64, latent=8, **options)
    from dcd_kernels import _core

    blocks = 2 if form == "blocks" else 1
    order = _core.pointwise_plan(64, 64, 8, pixels, blocks)["order"]
    (note,) = [note for note in explained(case).calls[0].notes if "output pixel" in note]
    words = {"synthesised": "synthesised in cache", "factored": "applied in factors"}
    assert words[order] in note and f": {pixels} output pixel" in note
    limit = int(re.search(r"more than (\d+)", note)[1])
    assert ("packed weights: " in note) == (blocks == 1)
    if form == "linear rows":
        assert "channels_last" in note and "4 panels" in note
    assert _core.pointwise_plan(64, 64, 8, limit, blocks)["order"] == "factored"
    assert _core.pointwise_plan(64, 64, 8, limit + 1, blocks)["order"] == "synthesised"


def test_order_is_left_out_without_the_module_that_knows(monkeypatch):
    monkeypatch.setitem(sys.modules, "dcd_kernels._core", None)
    monkeypatch.delattr(dcd, "_core", raising=False)
    assert "output pixel" not in str(explained(make_case("pointwise")))


def test_other_threads_keep_their_backend_and_are_not_recorded():
    case = make_case("pointwise")
    chosen, failed = [], []

    def elsewhere():
        chosen.append(functional.selection.select("linear", torch.ones(2, 2), torch.ones(2, 2)))
        try:
            with dcd.use_backend("triton"):
                case.run(dcd)
        except RuntimeError as error:
            failed.append(str(error))

    def here(**arguments):
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        return dcd.dcd_conv2d(**arguments)

    with dcd.use_backend("reference"):
        (call,) = explain(here, **case.tensors, **case.options).calls
    assert call.op == "pointwise" and call.demanded == "reference"
    assert chosen == ["reference"]
    assert failed and "'triton' cannot run" in failed[0]
    assert not selection._observed


def test_a_module_that_another_thread_runs_too_keeps_its_names():
    network = Network()
    x = torch.randn(2, 6, 5, 4)
    inner = []

    class Meanwhile(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            if threading.current_thread() is threading.main_thread() and not inner:
                inner.append(threading.Thread(target=lambda: network(x)))
                inner[0].start()
                inner[0].join()
            return self.network(x)

    names = [call.where for call in explain(Meanwhile(), x).calls]
    assert names == ["network.first (Layer): ", "network.second (Layer): "]


def test_hooks_go_when_the_call_raises():
    network = Network()
    with pytest.raises(ValueError, match="batched"):
        explain(network.second, torch.randn(6, 5, 4))
    assert not network.second._forward_hooks and not selection._observed
    assert selection.current() == "auto"


def test_nothing_dynamic():
    assert str(explain(nn.ReLU(), torch.ones(2))) == "no dynamic operator was called"


def test_not_callable():
    with pytest.raises(TypeError, match="fn_or_module must be callable, got int"):
        explain(3)


def test_demanded_backend_that_cannot():
    with dcd.use_backend("triton"):
        text = str(explained(make_case("pointwise")))
        assert selection.current() == "triton"
    assert re.search(r"use_backend\('triton'\) is in force, so that this call raises: \w+", text)


def test_demanded_reference():
    with dcd.use_backend("reference"):
        (call,) = explained(make_case("pointwise")).calls
    assert call.chosen == "reference"
    if extension.LOADED:
        assert "cpu: could, but reference was demanded" in call.others


# The support table


def test_support_table_says_what_can_run_says():
    table = support_table_markdown()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    head = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert head[1:] == ["cpu", "triton", "cuda", "reference"]
    assert len(rows) >= 2 + 7
    for row in rows[2:]:
        cells = dict(zip(head, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
        assert "complex64" in cells["reference"]
        on_gpus = "float32, bfloat16, float16"
        depthwise = "depthwise" in row
        assert cells["triton"] == ("–" if depthwise else on_gpus)
        assert cells["cuda"] == (on_gpus if depthwise else "–")
        assert cells["cpu"] == ("float32, float64, bfloat16, float16" if extension.LOADED else "–")


def test_support_table_follows_the_predicate(monkeypatch):
    monkeypatch.setattr(cpu, "can_run", lambda op, *tensors: (op == "linear", "linear only"))
    table = support_table_markdown()
    served = [
        line for line in table.splitlines() if line.startswith("|") and line.split("|")[2].strip() != "–"
    ]
    assert [line.split("|")[1].strip() for line in served[2:]] == ["linear"]
    assert "- cpu: linear only." in table


# Selection


@pytest.mark.parametrize("form", FORMS)
def test_auto_takes_the_best_that_can(form, monkeypatch):
    case = make_case(form)
    assert torch.equal(case.run(dcd), case.run(dcd))
    asked = []
    monkeypatch.setattr(cpu, "can_run", lambda op, *tensors: asked.append(op) or (False, "not today"))
    assert torch.equal(case.run(dcd), case.run(reference))
    assert asked and set(asked) <= set(selection.OPS)


@pytest.mark.parametrize("form", FORMS)
def test_demand_that_cannot_be_met_raises(form):
    """No GPU kernel runs on the CPU's tensors."""
    with dcd.use_backend("triton"), pytest.raises(RuntimeError, match=r"backend 'triton' cannot run \w+: \w"):
        make_case(form).run(dcd)


def test_reference_on_demand_calls_no_kernel(monkeypatch):
    monkeypatch.setattr(functional, "ops", None, raising=False)
    with dcd.use_backend("reference"):
        for form in FORMS:
            case = make_case(form)
            assert torch.equal(case.run(dcd), case.run(reference))


def test_use_backend_sets_and_restores():
    dcd.use_backend("reference")
    assert selection.current() == "reference"
    with dcd.use_backend("cpu") as chosen:
        assert selection.current() == "cpu"
        with dcd.use_backend("auto"):
            assert selection.current() == "auto"
        assert selection.current() == "cpu"
    assert selection.current() == "reference"
    with chosen:  # once more
        assert selection.current() == "cpu"
    assert selection.current() == "reference"


def test_use_backend_restores_after_an_error():
    with pytest.raises(KeyError), dcd.use_backend("reference"):
        raise KeyError
    assert selection.current() == "auto"


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*, got 'tpu'"):
        dcd.use_backend("tpu")
    assert selection.current() == "auto"


def test_environment():
    done = in_environment(
        " Reference ", "from dcd_kernels.backends import selection as s; print(s.current())"
    )
    assert done.stdout.split() == ["reference"], done.stderr


def test_environment_with_an_unknown_backend():
    done = in_environment("tpu", "import dcd_kernels")
    assert done.returncode != 0
    assert "DCD_KERNELS_BACKEND must be one of 'auto'" in done.stderr and "'tpu'" in done.stderr


def in_environment(value, code):
    environment = {**os.environ, "DCD_KERNELS_BACKEND": value}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_the_choice_is_seen_by_compiled_code(fresh_compiler):
    case = make_case("pointwise", dtype=torch.float32)
    compiled = torch.compile(
        lambda x: case.with_tensors({"input": x}).run(dcd), fullgraph=True, backend="eager"
    )
    x = case.tensors["input"]
    with dcd.use_backend("reference"):
        assert torch.equal(compiled(x), case.run(reference))
    if extension.LOADED:
        seen = []
        with dcd.use_backend("cpu"):
            compiled = torch.compile(
                lambda x: case.with_tensors({"input": x}).run(dcd),
                fullgraph=True,
                backend=lambda graph, _: seen.extend(str(node.target) for node in graph.graph.nodes) or graph,
            )
            compiled(x)
        assert any("dcd_kernels.pointwise" in target for target in seen)
