# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of accelerated networks, on a tiny one: what is wrong gets no time, whatever hides it."""

from __future__ import annotations

import copy
import functools
import io
import json
import pathlib
import sys
import types

import pytest
import torch
from rich.console import Console

# appended, so that an installed dcd_kernels keeps its place before the source tree
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import dcd_kernels as dcd
from benchmarks import environment
from benchmarks import report as shared
from benchmarks.accelerated import command, memory, report, summary, unit, verify
from benchmarks.accelerated.networks import (
    ACCELERATED,
    CANDIDATES,
    EVAL,
    UNPATCHED,
    Candidate,
    NetworkCase,
    call_of,
    factory,
    in_layout,
    make_network,
    make_networks,
)
from benchmarks.candidates import CHANNELS_LAST, NCHW, STATIC, TRAINING
from benchmarks.cases import make_images
from benchmarks.runner import Plan, Timing
from benchmarks.suite import REFUSED, RIGHT, WRONG, Entry
from dcd_kernels import extension
from dcd_kernels.demo.memory import can_measure

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="what is accelerated needs compiled kernels")
TINY = {"network": "mobilenet_v2_x0.1", "size": 64, "classes": 10}
STEP, INFERENCE = NetworkCase(task=TRAINING, batch=4, **TINY), NetworkCase(task=EVAL, batch=2, **TINY)
PLAN = Plan(seconds=0.0, min_rounds=2, block_seconds=1e-6)
RUN = dict.fromkeys(shared.RUN_KEYS, "test")
LAYER = "features.2.conv.0"


@pytest.fixture(scope="module")
def networks():
    return make_networks(TINY["network"], TINY["size"], TINY["classes"])


@pytest.fixture(scope="module")
def results(networks):
    """By task."""
    return {case.task: unit.run_case(case, networks, PLAN, "native", False) for case in (STEP, INFERENCE)}


@pytest.mark.parametrize("task", [TRAINING, EVAL])
def test_every_candidate_is_right_and_timed(task, results):
    result = results[task]
    assert [entry.candidate for entry in result.entries] == list(CANDIDATES)
    assert {entry.status for entry in result.entries} == {RIGHT}, result.entries
    assert all(len(entry.timing.samples) == 2 for entry in result.entries)
    assert (result.taken.layers, result.taken.taken, result.taken.objection) == (33, 33, "")
    assert ("32 latent_moments" in result.taken.operators) == (task == TRAINING)
    assert ("backward" in result.taken.operators) == (task == TRAINING)


def test_rows_have_every_key(results, tmp_path):
    made = []
    for result in results.values():
        result.peaks = {result.best(group).candidate.name: 2**20 for group in (STATIC, ACCELERATED)}
        made += report.rows(result, RUN)
    described = environment.describe("native", "none", 1, [0], "auto", "cpu")
    assert set(described) == set(shared.RUN_KEYS)
    assert len(made) == 2 * len(CANDIDATES)
    for row in made:
        assert tuple(row) == report.ROW_KEYS
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["ratio_to_best_static"] > 0 and row["ratio_to_best_unpatched"] > 0
        assert row["error"] < 1e-3 and (row["network"], row["size"]) == (TINY["network"], TINY["size"])
        assert (row["layers_taken"] == 33) == (row["group"] == ACCELERATED)
    assert sorted(row["peak_to_static"] for row in made if row["peak_mib"]) == [1.0] * 4
    lines, _ = shared.save(made, tmp_path, "rows")
    assert [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] == made


def _altered(layer, alter):
    """Patches the patched ``layer`` once more, so that copies of it are spoiled like itself."""
    patched = layer.forward.__func__

    @functools.wraps(patched)  # with the mark by which the report knows it
    def forward(self, input):
        return alter(self, patched(self, input))

    layer.forward = types.MethodType(forward, layer)


def _one_element_off(layer, output):
    if output.dtype != torch.float32:
        return output
    spoiled = output.clone()
    spoiled[0, 0, 0, 0] += 1e-2 * output.abs().max()
    return spoiled


def _gradient_off(layer, output):
    return output + 1e-3 * (output - output.detach()) if output.dtype == torch.float32 else output


def _statistics_off(layer, output):
    if layer.training and output.dtype == torch.float32:
        layer.bn2.running_var.mul_(1.001)
    return output


def _float64_off(layer, output):
    return output * (1 + 1e-6) if output.dtype == torch.float64 else output


def _raises(layer, output):
    if output.dtype == torch.float64:
        raise RuntimeError("no float64 here")
    return output


def _nan(layer, output):
    return output * float("nan")


SPOILED = {
    "one element off": (_one_element_off, f"{LAYER}: output is off"),
    "gradient off": (_gradient_off, f"{LAYER}: gradient of "),
    "statistics off": (_statistics_off, f"{LAYER}: statistic bn2.running_var is off"),
    "float64 off": (_float64_off, "in float64, "),
    "nan": (_nan, "in float64, "),
}


def _check(networks, case=STEP):
    checker = verify.Checker(case, networks, seed=0)
    verdicts = {}
    for candidate in (Candidate(UNPATCHED, NCHW), Candidate(ACCELERATED, NCHW)):
        network = in_layout(networks[candidate.group], NCHW)
        images = make_images(case.batch, case.size, NCHW)
        verdicts[candidate.group] = checker.check(candidate, network, images)
    assert verdicts[UNPATCHED].right
    return verdicts[ACCELERATED]


@pytest.mark.parametrize("what", SPOILED)
def test_wrong_numbers_are_found(what, networks):
    alter, reason = SPOILED[what]
    spoiled = {**networks, ACCELERATED: copy.deepcopy(networks[ACCELERATED])}
    _altered(spoiled[ACCELERATED].get_submodule(LAYER), alter)
    verdict = _check(spoiled)
    assert not verdict.right
    assert reason in verdict.reason


def test_a_layer_that_is_not_taken_is_found(networks):
    spoiled = {**networks, ACCELERATED: copy.deepcopy(networks[ACCELERATED])}
    dcd.restore(spoiled[ACCELERATED].get_submodule(LAYER))
    assert f"1 of 33 dynamic layers are not taken: {LAYER}" in _check(spoiled, INFERENCE).reason


def test_a_layer_that_is_taken_and_runs_as_written_is_found(networks):
    spoiled = {**networks, ACCELERATED: copy.deepcopy(networks[ACCELERATED])}
    spoiled[ACCELERATED].get_submodule(LAYER).conv_q.register_forward_hook(lambda *given: None)
    assert len(dcd.report(spoiled[ACCELERATED]).taken) == 33
    assert _check(spoiled, INFERENCE).reason == f"{LAYER} is taken and runs as it was written"


def test_what_the_network_does_besides_its_layers_is_found(networks):
    images = make_images(STEP.batch, STEP.size, NCHW)
    network = networks[UNPATCHED]
    exact = verify.network_results(copy.deepcopy(network).double(), STEP, images.double())
    single = verify.network_results(network, STEP, images)
    assert verify.network_is_right(single, [single], exact).right
    gradients = {name for name in exact if name.startswith("gradient of ")}
    for names in ({"output"}, {"statistic features.0.1.running_var"}, gradients):
        for factor in (2.0, float("nan")):
            spoiled = {name: found * factor if name in names else found for name, found in single.items()}
            assert not verify.network_is_right(spoiled, [single], exact).right, names
    counted = "statistic features.0.1.num_batches_tracked"
    assert not verify.network_is_right({**single, counted: single[counted] + 1}, [single], exact).right
    del single["gradient of classifier.1.cls.bias"]
    assert "expected" in verify.network_is_right(single, [single], exact).reason


def _run(monkeypatch, networks, *options):
    monkeypatch.setattr("benchmarks.accelerated.networks.make_networks", lambda *given: networks)
    given = ["--networks", TINY["network"], "--size", "64", "--classes", "10", "--seconds", "0", *options]
    return command.run(command.parser().parse_args(given), cores=[0], given=given)


def test_the_command(networks, monkeypatch, capsys):
    assert _run(monkeypatch, networks, "--quick", "--task", "eval", "--check") == 0
    text = capsys.readouterr().out
    assert "33 of 33 dynamic layers taken" in text and "no bar is about these cases" in text


def test_wrong_numbers_get_no_time(networks, monkeypatch, capsys):
    spoiled = {**networks, ACCELERATED: copy.deepcopy(networks[ACCELERATED])}
    _altered(spoiled[ACCELERATED].get_submodule(LAYER), _one_element_off)
    result = unit.run_case(INFERENCE, spoiled, PLAN, "native", False)
    for row in report.rows(result, RUN):
        wrong = row["group"] == ACCELERATED
        assert row["status"] == (WRONG if wrong else RIGHT)
        assert bool(row["reason"]) == wrong
        for key in ("p20_us", "p50_us", "p80_us", "ratio_to_best_static", "rounds"):
            assert (row[key] is None) == wrong
    monkeypatch.setattr(unit, "run_case", lambda *given: result)
    assert _run(monkeypatch, spoiled, "--task", "eval", "--batch", "2") == 1
    text = capsys.readouterr().out
    assert f"wrong: accelerated nchw, {INFERENCE.name}: {LAYER}: output is off" in text


def test_a_candidate_that_raises_is_refused(networks):
    spoiled = {**networks, ACCELERATED: copy.deepcopy(networks[ACCELERATED])}
    _altered(spoiled[ACCELERATED].get_submodule(LAYER), _raises)
    result = unit.run_case(INFERENCE, spoiled, PLAN, "native", False)
    refused = [entry for entry in result.entries if entry.status == REFUSED]
    assert {entry.candidate.group for entry in refused} == {ACCELERATED}
    assert all(entry.timing is None and "no float64 here" in entry.reason for entry in refused)


def test_a_step_starts_without_gradients(networks):
    network = in_layout(networks[UNPATCHED], NCHW)
    step = call_of(STEP, network, make_images(STEP.batch, STEP.size, NCHW))
    first, again = step(), step()
    assert network.training and not first.requires_grad and torch.equal(first, again)
    gradient = network.get_submodule(LAYER).conv.weight.grad.clone()
    step()
    assert torch.equal(network.get_submodule(LAYER).conv.weight.grad, gradient)
    infer = call_of(INFERENCE, network, make_images(INFERENCE.batch, INFERENCE.size, NCHW))
    assert not network.training and infer().is_inference()


def test_networks_by_name():
    assert make_network("mobilenet_v2_x0.1", STATIC, 10).classifier[-1].out_features == 10
    for name in ("resnet18", "resnet50"):
        assert callable(factory(name))
    for name in ("resnet", "mobilenet_v2", "mobilenet_v2_xl", "resnet18 "):
        with pytest.raises(ValueError, match=f"network='{name}'"):
            factory(name)


@pytest.mark.parametrize(
    "options", [("--batch", "1"), ("--size", "63"), ("--classes", "0"), ("--task", "forward")]
)
def test_options_that_cannot_be(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(list(options))
    assert options[0] in capsys.readouterr().err


def test_unknown_networks_are_refused(capsys):
    assert command.run(command.parser().parse_args(["--networks", "resnet19"]), cores=[0]) == 2
    assert "network='resnet19'" in capsys.readouterr().out


def test_without_kernels_nothing_is_measured(monkeypatch, capsys):
    assert command.run(command.parser().parse_args(["--backend", "reference"]), cores=[0]) == 2
    assert "nothing is accelerated" in capsys.readouterr().out
    monkeypatch.setattr(extension, "LOADED", False)
    monkeypatch.setattr(extension, "REASON", "no extension here")
    assert command.run(command.parser().parse_args([]), cores=[0]) == 2
    assert "nothing is measured: no extension here" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- bars


def _synthetic(case, peaks=(), **seconds):
    """A result whose groups take the given seconds; channels_last twice as many, so that nchw counts."""
    entries = []
    for candidate in CANDIDATES:
        timing = Timing("cpu")
        slower = 2 if candidate.layout == CHANNELS_LAST else 1
        timing.cpu = timing.wall = [slower * seconds[candidate.group]] * 3
        entries.append(Entry(candidate, RIGHT, error=0.0, timing=timing))
    groups = (STATIC, UNPATCHED, ACCELERATED)
    named = {f"{group} {NCHW}": peak for group, peak in zip(groups, peaks, strict=False)}
    return unit.NetworkResult(case, case.task, entries, verify.Taken(1, 1, "1 pointwise"), named)


def _bars(results, threads=1):
    console = Console(width=200, record=True, file=io.StringIO())
    met = report.print_bars(console, results, threads)
    return met, [line.split() for line in console.export_text().splitlines() if "│" in line]


HALF_STEP = NetworkCase("mobilenet_v2_x0.5", TRAINING, 8)


@pytest.mark.parametrize(
    ("accelerated", "met", "marks"),
    [(1.0, True, ["met"] * 3), (1.2, True, ["met", "missed", "met"]), (1.3, False, ["missed"] * 2 + ["met"])],
)
def test_musts_decide_and_aims_do_not(accelerated, met, marks):
    fine = _synthetic(HALF_STEP, (100, 128, 110), static=1.0, unpatched=1.68, accelerated=accelerated)
    got, lines = _bars([fine])
    assert got is met
    assert [line[-2] for line in lines] == marks
    assert [line[1] for line in lines] == ["MUST", "aim", "aim"]
    assert [f"{value:.3f}" for value in (1.68 / accelerated, accelerated, 1.1)] == [
        line[-4] for line in lines
    ]


def test_bars_of_other_cases():
    both = {"static": 1.0, "unpatched": 1.8}
    first = NetworkCase("mobilenet_v2_x0.5", EVAL, 1)
    assert _bars([_synthetic(first, accelerated=1.0, **both)])[0]
    assert not _bars([_synthetic(first, accelerated=1.1, **both)])[0]
    met, lines = _bars([_synthetic(NetworkCase("resnet18", TRAINING, 8), accelerated=1.2, **both)])
    assert met and [line[-2] for line in lines] == ["missed"]
    for case in (NetworkCase("mobilenet_v2_x0.5", EVAL, 8), NetworkCase("mobilenet_v2_x0.5", EVAL, 1, 64)):
        assert _bars([_synthetic(case, accelerated=9.0, **both)]) == (True, [])
    assert _bars([_synthetic(first, accelerated=9.0, **both)], threads=2) == (True, [])


def test_a_must_that_was_not_measured_is_not_met():
    result = _synthetic(HALF_STEP, static=1.0, unpatched=1.6, accelerated=1.0)
    for entry in result.entries:
        if entry.candidate.group == ACCELERATED:
            entry.timing = None
    met, lines = _bars([result])
    assert not met
    assert all(line[-3:-1] == ["not", "measured"] for line in lines)


@pytest.mark.skipif(not can_measure(), reason="needs Linux's /proc/self/clear_refs")
def test_memory_is_that_of_a_step(networks):
    parameters = sum(4 * parameter.numel() for parameter in networks[UNPATCHED].parameters())
    peak = memory.peak_bytes(STEP, Candidate(ACCELERATED, NCHW), "native")
    assert parameters < peak < 200 * 2**20
    with pytest.raises(RuntimeError, match="resnet19"):
        memory.peak_bytes(NetworkCase("resnet19", EVAL, 1), Candidate(STATIC, NCHW), "native")


def test_the_readme_s_table():
    def row(group, time, date="2026-01-02", peak="", **more):
        values = {"task": TRAINING, "network": "resnet18", "batch": 8, "threads": 1, "size": 224}
        values |= {"group": group, "date": date, "commit": "c" * 14, "cpu": "a CPU", "torch": "2"}
        values |= {"p50_us": time, "ratio_to_best_static": time / 2, "ratio_to_best_unpatched": time / 5}
        return {key: str(value) for key, value in (values | {"peak_to_static": peak} | more).items()}

    rows = [row(STATIC, 2.0), row(UNPATCHED, 5.0, peak=1.5), row(UNPATCHED, 6.0), row(ACCELERATED, 2.5)]
    text = summary.table([*rows, row(ACCELERATED, 0.1, date="2026-01-01"), row(ACCELERATED, 9.0, batch=1)])
    assert "| ResNet-18, a training step, batch 8 | **2.00** | 1.25 (2.50) | – (1.50) |" in text
    assert text.count("ResNet-18") == 1
    assert "torch 2, commit cccccccccccc, 2026-01-02." in text
    assert summary.table(rows[:1]) == "not yet measured"
