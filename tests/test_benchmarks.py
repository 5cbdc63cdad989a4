# SPDX-License-Identifier: BSD-3-Clause
"""The benchmarks refuse wrong numbers, and their rows say everything about a run."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
import sys

import pytest
import torch
from rich.console import Console

# appended, so that an installed dcd_kernels keeps its place before the source tree
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import cases, environment, readme, report, suite
from benchmarks.candidates import (
    BMM,
    FACTORED,
    FORWARD,
    GROUPED,
    NORMALISED,
    OURS,
    REGISTRY,
    STATIC,
    TRAINING,
    Candidate,
    naive_bmm,
)
from benchmarks.runner import Plan, Timing, measure, paired_ratio
from benchmarks.verify import Truth, check_operands
from dcd_kernels import extension

SMALL = cases.Case("test", 8, 6, 5, 2)
PLAN = Plan(seconds=0.0, min_rounds=2, block_seconds=1e-6)
RUN = dict.fromkeys(report.RUN_KEYS, "test")
PEERS = (STATIC, GROUPED, BMM, FACTORED)


@pytest.fixture(scope="module")
def operands():
    return cases.make_operands(SMALL)


@pytest.fixture(scope="module")
def result():
    return suite.run_case(SMALL, FORWARD, PLAN, PEERS)


def _right(operands):
    arguments = (operands.input, operands.weight, operands.p, operands.phi, operands.q, operands.lam)
    return naive_bmm(*arguments)


def _one_element_off(operands):
    y = _right(operands).clone()
    y[1, 2, 3, 4] += 1e-3 * y.abs().max()
    return y


SPOILED = {
    "one element off": _one_element_off,
    "all a little off": lambda operands: _right(operands) * (1 + 1e-5),
    "nan": lambda operands: _right(operands).index_fill(1, torch.tensor([0]), float("nan")),
    "shape": lambda operands: _right(operands)[:, :, :-1],
    "lam forgotten": lambda operands: _right(operands) / operands.lam[:, :, None, None],
}


def test_the_seventeen_shapes():
    assert len(cases.pointwise_cases()) == 34
    assert {case.latent_channels for case in cases.pointwise_cases()} == {4, 8, 16, 32}
    assert [cases.latent_channels(c) for c in (3, 16, 24, 64, 144, 1024, 2048)] == [4, 4, 4, 8, 8, 32, 32]
    assert [case.shape_name for case in cases.pointwise_cases((1,), "384->96")] == ["384→96@14"]
    with pytest.raises(ValueError, match="shapes='385'"):
        cases.pointwise_cases((1,), "385")


def test_candidate_names_are_unique():
    assert len({(c.task, c.name) for c in REGISTRY}) == len(REGISTRY)
    assert {c.group for c in REGISTRY if c.task == TRAINING} == {STATIC, FACTORED, OURS}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("task", [FORWARD, TRAINING, NORMALISED])
def test_peers_are_right(task, batch):
    found = suite.run_case(cases.Case("test", 8, 6, 5, batch), task, PLAN, PEERS)
    assert {entry.status for entry in found.entries} == {suite.RIGHT}, found.entries
    assert all(len(entry.timing.samples) == 2 for entry in found.entries)


def test_peers_are_right_in_bfloat16():
    case = cases.Case("test", 8, 6, 5, 2, "bfloat16")
    assert case.name == "8→6@5 batch 2 bfloat16"
    assert {
        tensor.dtype
        for tensor in cases.make_operands(case).leaves("nchw", ("input", "weight", "lam")).values()
    } == {torch.bfloat16}
    found = suite.run_case(case, FORWARD, PLAN, PEERS)
    # oneDNN refuses to pack bf16 weights on a CPU without the instructions
    assert {entry.status for entry in found.entries} <= {suite.RIGHT, suite.REFUSED}, found.entries
    assert {row["dtype"] for row in report.rows(found, RUN)} == {"bfloat16"}
    truth = Truth(cases.make_operands(case), True, FORWARD)
    assert truth.check(truth.exact["output"].bfloat16()).right
    assert not truth.check((1.1 * truth.exact["output"]).bfloat16()).right


def test_bars_of_bfloat16_are_about_amx():
    entries = _synthetic(ours=1.1, static=1.0)
    half = dataclasses.replace(entries, case=dataclasses.replace(SMALL, dtype="bfloat16"))
    met, text = _bars([half], isa="avx512_bf16")
    assert met
    assert "no bar at this instruction set: got 1.100" in text and "aim" not in text
    _, text = _bars([half], isa="amx")
    assert "aim ≤ 1.00: got 1.100 missed" in text


def test_readme_keeps_the_dtypes_apart():
    rows = [
        {"task": FORWARD, "isa": "native", "dtype": dtype, "p50_us": "1", "date": date}
        for dtype, date in (("float32", "1"), ("bfloat16", "2"))
    ]
    assert readme.latest(rows, FORWARD, "native") == rows[:1]
    assert readme.latest(rows, FORWARD, "native", "bfloat16") == rows[1:]


@pytest.mark.parametrize("what", SPOILED)
def test_wrong_numbers_get_no_time(what, operands, monkeypatch):
    called = []

    def build(operands):
        def call():
            called.append(None)
            return SPOILED[what](operands)

        return call

    spoiled = Candidate("spoiled", BMM, FORWARD, "nchw", build)
    monkeypatch.setattr("benchmarks.candidates.REGISTRY", [spoiled])
    found = suite.run_case(SMALL, FORWARD, PLAN)
    (row,) = report.rows(found, RUN)
    assert len(called) == 1
    assert row["status"] == suite.WRONG
    assert row["reason"]
    assert [row[key] for key in ("p20_us", "p50_us", "p80_us", "gflops", "ratio_to_best_static")] == [
        None
    ] * 5
    assert suite.wrong_entries([found])


@pytest.mark.skipif(not extension.LOADED, reason="ours needs compiled kernels")
def test_a_norm_and_an_activation_are_folded_in(operands):
    entries = suite.run_case(SMALL, NORMALISED, PLAN, (OURS,)).entries
    assert [entry.status for entry in entries] == [suite.RIGHT] * 2, entries
    truth = Truth(operands, True, NORMALISED)
    exact = truth.exact["output"]
    assert ((exact == 0).any() or (exact == 6).any()) and exact.min() >= 0 and exact.max() <= 6
    assert not truth.check(_right(operands)).right
    forgotten = _right(operands) * operands.norm_scale[:, None, None]
    assert not truth.check(forgotten.clamp(0, 6)).right


def test_wrong_gradient_is_refused(operands):
    truth = Truth(operands, True, TRAINING)
    good = {name: tensor.float() for name, tensor in truth.exact.items()}
    assert truth.check(good).right
    for name in good:
        assert not truth.check({**good, name: good[name] * 1.001}).right, name
    assert not truth.check({"output": good["output"]}).right


def test_a_candidate_that_raises_is_refused(monkeypatch):
    def build(operands):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr("benchmarks.candidates.REGISTRY", [Candidate("absent", OURS, FORWARD, "nchw", build)])
    (entry,) = suite.run_case(SMALL, FORWARD, PLAN).entries
    assert (entry.status, entry.timing) == (suite.REFUSED, None)
    assert "not on this machine" in entry.reason


def test_subnormal_operands_are_refused():
    operands = cases.make_operands(SMALL)
    operands.p[0, 0] = 1e-40
    with pytest.raises(ValueError, match="p has subnormal"):
        check_operands(operands)


def test_rows_have_every_key(result, tmp_path):
    rows = report.rows(result, RUN)
    assert len(rows) == len(result.entries)
    described = environment.describe("native", "none", 1, [0], "cpu", "cpu")
    assert set(described) == set(report.RUN_KEYS)
    assert all(value not in (None, "") for value in described.values())
    for row in rows:
        assert tuple(row) == report.ROW_KEYS
        assert all(value is not None for value in row.values())
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    lines, sheet = report.save(rows, tmp_path, "rows")
    assert [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] == rows
    with sheet.open(encoding="utf-8") as stream:
        assert [row["candidate"] for row in csv.DictReader(stream)] == [row["candidate"] for row in rows]


def test_ratios_are_medians_of_pairs():
    first, second = Timing("cpu"), Timing("cpu")
    first.cpu, second.cpu = [1.0, 10.0, 3.0], [1.0, 5.0, 1.0]
    first.wall, second.wall = [9.0] * 3, [9.0] * 3
    assert paired_ratio(first, second) == 2.0
    assert (first.median, first.quantile(0.0), first.quantile(1.0)) == (3.0, 1.0, 10.0)


def test_every_candidate_gets_every_round():
    counts = dict.fromkeys("abc", 0)

    def call(name):
        def run():
            counts[name] += 1
            return torch.zeros(1)

        return run

    timings = measure({name: call(name) for name in counts}, Plan(0.0, min_rounds=4, block_seconds=1e-9))
    assert {len(timing.samples) for timing in timings.values()} == {4}
    assert all(timing.calls_per_block == 1 for timing in timings.values())


def _bars(results, isa="avx512", complete=True):
    console = Console(width=200, record=True, file=io.StringIO())
    met = report.print_bars(console, results, isa, complete)
    return met, console.export_text()


def _synthetic(**seconds):
    """A result whose groups take the given seconds in every round; ours is called `ours`."""
    entries = []
    for group in (*PEERS, OURS):
        timing = Timing("cpu")
        timing.cpu = timing.wall = [seconds.get(group.replace(" ", "_"), 4.0)] * 3
        candidate = Candidate(group, group, FORWARD, "nchw", lambda operands: None)
        entries.append(suite.Entry(candidate, suite.RIGHT, error=0.0, timing=timing))
    return suite.CaseResult(SMALL, FORWARD, entries)


def test_bars_without_ours_are_not_met(result):
    met, text = _bars([result], complete=False)
    assert not met
    assert "must ≤ 1.00, worst 1.20: not measured" in text
    assert "only part" in text


def test_bars_are_geometric_means():
    met, text = _bars([_synthetic(ours=0.8, static=1.0), _synthetic(ours=1.15, static=1.0)])
    assert "ours ÷ best static                   must ≤ 1.00, worst 1.20: got 0.959 met (worst 1.150" in text
    assert "naive bmm ÷ ours                     must ≥ 1.40: got 4.170 met (worst 3.478" in text
    assert met
    met, text = _bars([_synthetic(ours=1.1, static=1.0)])
    assert "must ≤ 1.00, worst 1.20: got 1.100 missed" in text
    assert not met
    met, text = _bars([_synthetic(ours=1.07, static=1.0)], isa="avx2")
    assert "must ≤ 1.08: got 1.070 met" in text and met


def test_one_case_alone_can_miss_a_bar():
    met, text = _bars([_synthetic(ours=0.5, static=1.0), _synthetic(ours=1.3, static=1.0)])
    assert "must ≤ 1.00, worst 1.20: got 0.806 missed (worst 1.300" in text
    assert not met


def test_environment_of_the_instruction_sets():
    narrow = environment.wanted_variables("avx2", 1, "cpu")
    assert narrow["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert environment.wanted_variables("avx512", 1, "cpu")["ONEDNN_MAX_CPU_ISA"] is None
    assert environment.wanted_variables("avx512", 2, "cpu")["OMP_NUM_THREADS"] == "2"


def test_a_process_is_replaced_until_its_environment_is_right(monkeypatch):
    started = []
    monkeypatch.setattr(
        "os.execve", lambda program, arguments, variables: started.append((arguments, variables))
    )
    monkeypatch.setattr("os.environ", {"ONEDNN_MAX_CPU_ISA": "AVX2", "HOME": "/"})
    environment.enter("pointwise", ["--quick"], "avx512", 1, "cpu")
    ((arguments, variables),) = started
    assert arguments[2:] == ["pointwise", "--quick"]
    assert variables["HOME"] == "/"
    assert "ONEDNN_MAX_CPU_ISA" not in variables
    monkeypatch.setattr("os.environ", variables)
    environment.enter("pointwise", ["--quick"], "avx512", 1, "cpu")
    assert len(started) == 1
