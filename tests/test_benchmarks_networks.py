# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of whole networks, on tiny ones: folded networks are right, what is wrong gets no time."""

from __future__ import annotations

import copy
import csv
import importlib.util
import io
import pathlib
import sys

import pytest
import torch
from rich.console import Console

# appended, so that an installed dcd_kernels keeps its place before the source tree
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import base, environment
from benchmarks import report as shared
from benchmarks.accelerated.networks import PAPER, NetworkCase
from benchmarks.accelerated.report import print_bars
from benchmarks.candidates import CHANNELS_LAST, NCHW, STATIC, TRAINING
from benchmarks.cases import make_images
from benchmarks.networks import (
    baselines,
    candidates,
    command,
    folded,
    report,
    runtimes,
    summary,
    training,
    unit,
)
from benchmarks.networks.candidates import (
    COMPILED,
    EAGER,
    INFERENCE,
    ONNXRUNTIME,
    OPENVINO,
    OPENVINO_BF16,
    OURS,
    OURS_ALONE,
    OURS_BF16,
    PEERS_DCD,
    PROTOCOL,
    REGISTRY,
    Candidate,
)
from benchmarks.networks.verify import Checker
from benchmarks.networks.written import DCD, FOLDED, FORMS, make_written, to_run
from benchmarks.runner import Plan, Timing
from benchmarks.suite import REFUSED, RIGHT, WRONG, Entry
from dcd_kernels import extension
from dcd_kernels.models import released

NAME, SIZE, CLASSES = "mobilenet_v2_x0.1", 64, 10
CASE = NetworkCase(NAME, INFERENCE, 2, SIZE, CLASSES)
PLAN = Plan(seconds=0.0, min_rounds=2, block_seconds=1e-6)
RUN = dict.fromkeys((*shared.RUN_KEYS, *runtimes.PACKAGES), "test")
IN_PYTORCH = [c for c in REGISTRY if c.runtime == EAGER]


@pytest.fixture(scope="module")
def written():
    return make_written(NAME, SIZE, CLASSES)


@pytest.fixture(scope="module")
def result(written):
    chosen = [*IN_PYTORCH, Candidate(OURS, DCD, NCHW)]
    return unit.run_case(CASE, written, chosen, PLAN, 1, refusals={OURS: "not here"})


# ------------------------------------------------------------------------------------------------- cases


def test_every_candidate_of_pytorch_is_right_and_timed(result):
    entries = {entry.candidate: entry for entry in result.entries}
    assert {entries[candidate].status for candidate in IN_PYTORCH} == {RIGHT}, result.entries
    assert all(len(entries[candidate].timing.samples) == 2 for candidate in IN_PYTORCH)
    refused = entries[Candidate(OURS, DCD, NCHW)]
    assert (refused.status, refused.reason, refused.timing) == (REFUSED, "not here", None)


def test_candidate_names_are_unique_and_in_scope():
    assert len({candidate.name for candidate in REGISTRY}) == len(REGISTRY)
    mine = candidates.candidates(NAME, 1)
    assert {candidate.form for candidate in mine} == set(FORMS)
    assert OURS_ALONE not in {candidate.runtime for candidate in mine}
    assert OURS_ALONE in {candidate.runtime for candidate in candidates.candidates(NAME, 2)}
    resnet = candidates.candidates("resnet18", 1)
    assert {candidate.form for candidate in resnet} == {STATIC, DCD, FOLDED}
    forms, chosen = candidates.scope(INFERENCE, quick=True)
    assert not {COMPILED, OPENVINO_BF16, OURS_BF16} & {*chosen} and baselines.DY_CONV not in forms
    assert candidates.scope(PROTOCOL, quick=False)[0] == (STATIC, DCD)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda output: output * float("nan"),
        lambda output: output + 1e-2 * output.abs().max(),
        lambda output: output[:1],
        lambda output: output * (1 + 1e-3),
    ],
)
@pytest.mark.parametrize("runtime", [EAGER, OURS])
def test_wrong_numbers_get_no_time(spoil, runtime, written, monkeypatch):
    build = candidates.Builder.build

    def spoiled(self, candidate):
        run = build(self, Candidate(EAGER, candidate.form, candidate.variant))
        return lambda images: spoil(run(images))

    monkeypatch.setattr(candidates.Builder, "build", spoiled)
    result = unit.run_case(CASE, written, [Candidate(runtime, DCD, NCHW)], PLAN, 1)
    (entry,) = result.entries
    assert (entry.status, entry.timing) == (WRONG, None)
    (row,) = report.rows(result, RUN)
    assert row["p50_us"] is None and row["mean_us"] is None and row["reason"]


def _folded_layers(network):
    return [module for module in network.modules() if isinstance(module, folded.FoldedLayer)]


def test_a_folded_network_with_one_norm_forgotten_is_wrong(written):
    images = make_images(2, SIZE, NCHW)
    network = to_run(written, FOLDED, folded.FACTORED)
    _folded_layers(network)[3].q_bias.zero_()
    with torch.inference_mode():
        verdict = Checker(written, images).check(
            Candidate(OPENVINO, FOLDED, folded.FACTORED), network(images)
        )
    assert not verdict.right and "off by" in verdict.reason


def test_bfloat16_has_a_limit_of_its_own(written):
    checker = Checker(written, make_images(2, SIZE, NCHW))
    narrow, wide = (
        checker.check(Candidate(runtime, DCD), checker.truth(DCD).to(torch.bfloat16))
        for runtime in (OPENVINO, OPENVINO_BF16)
    )
    assert not narrow.right and wide.right
    nothing = checker.check(Candidate(OPENVINO_BF16, DCD), torch.zeros_like(checker.truth(DCD)))
    assert not nothing.right


@pytest.mark.skipif(not extension.LOADED, reason="needs compiled kernels")
def test_ours_in_bfloat16(written):
    # at this size the dynamic network is chaotic: in bf16 no two roundings agree
    chosen = [Candidate(OURS_BF16, STATIC, layout) for layout in candidates.LAYOUTS]
    result = unit.run_case(CASE, written, chosen, PLAN, 1)
    assert [entry.status for entry in result.entries] == [RIGHT, RIGHT], result.entries
    assert all(entry.error > 1e-4 for entry in result.entries)  # float32 has less
    assert {row["dtype"] for row in report.rows(result, RUN)} == {"bfloat16"}
    made = runtimes.narrowed(written[DCD])
    norms = [module for module in made.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and all(norm.running_mean.dtype is norm.weight.dtype is torch.float32 for norm in norms)
    assert {p.dtype for n, p in made.named_parameters() if p.dim() > 1} == {torch.bfloat16}


def test_ours_is_refused_without_its_function(written, monkeypatch):
    import dcd_kernels as dcd

    monkeypatch.delattr(dcd, "optimize_for_inference", raising=False)
    (entry,) = unit.run_case(CASE, written, [Candidate(OURS, DCD, NCHW)], PLAN, 1).entries
    assert entry.status == REFUSED and "optimize_for_inference" in entry.reason


def test_a_runtime_that_is_not_installed_is_refused(written, monkeypatch):
    for package in runtimes.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    chosen = [Candidate(ONNXRUNTIME, STATIC), Candidate(OPENVINO, STATIC), Candidate(EAGER, STATIC, NCHW)]
    entries = unit.run_case(CASE, written, chosen, PLAN, 1).entries
    assert [entry.status for entry in entries] == [REFUSED, REFUSED, RIGHT]
    assert all(entry.reason for entry in entries[:2])


@pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in runtimes.PACKAGES),
    reason=f"needs {', '.join(runtimes.PACKAGES)}: python -m pip install '.[bench]'",
)
def test_runtimes_that_read_onnx():
    torch.manual_seed(0)
    # a few layers of every kind: exporting one takes long
    made = {
        form: released.ReleasedResNet(
            released.resnet.Bottleneck, (1, 1, 0, 0), CLASSES, dynamic=form == DCD
        ).eval()
        for form in (STATIC, DCD)
    }
    forms = ((STATIC, ""), (DCD, ""), (FOLDED, folded.PRODUCT))
    chosen = [Candidate(runtime, *form) for form in forms for runtime in (ONNXRUNTIME, OPENVINO)]
    entries = unit.run_case(CASE, made, chosen, PLAN, 1).entries
    assert [entry.status for entry in entries] == [RIGHT] * len(chosen), entries


def test_on_one_thread_gives_the_threads_back():
    before = torch.get_num_threads()
    seen = []
    try:
        runtimes.on_one_thread(lambda images: seen.append(torch.get_num_threads()), 2)(None)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_protocol_runs_over_different_images(written):
    seen = []
    network = copy.deepcopy(written[STATIC])
    network.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten()[0].item()))
    plan = Plan(seconds=0.0, min_rounds=3, max_rounds=3, block_seconds=0.0)
    case = NetworkCase(NAME, PROTOCOL, 1, SIZE, CLASSES)
    chosen = [Candidate(EAGER, STATIC, NCHW)]
    result = unit.run_case(case, {STATIC: network}, chosen, plan, 1, different=3)
    (entry,) = result.entries
    assert entry.timing.calls_per_block == 1 and len(entry.timing.samples) == 3
    assert len(set(seen)) == 3
    (row,) = report.rows(result, RUN, images=3)
    assert row["images"] == 3 and row["mean_us"] == pytest.approx(1e6 * sum(entry.timing.samples) / 3)


# ------------------------------------------------------------------------------------------ rows and bars


def test_rows_have_every_key(result, tmp_path):
    made = report.rows(result, RUN)
    assert len(made) == len(result.entries)
    for row in made:
        assert tuple(row) == report.ROW_KEYS
        assert (row["network"], row["batch"], row["size"], row["dtype"]) == (NAME, 2, SIZE, "float32")
        if row["status"] == RIGHT:
            assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
            assert row["ratio_to_best_static"] > 0 and row["ratio_to_best_other_dcd"] > 0
            assert 0 < row["error"] < 1e-3
    assert min(row["ratio_to_best_static"] for row in made if row["p50_us"]) <= 1.0
    described = environment.describe("native", "none", 1, [0], "auto", "cpu") | runtimes.versions()
    assert set(described) == set(RUN)
    _, sheet = shared.save(made, tmp_path, "rows")
    with sheet.open(newline="", encoding="utf-8") as stream:
        read = list(csv.DictReader(stream))
    assert [row["candidate"] for row in read] == [row["candidate"] for row in made]


def _timed(**seconds):
    """A result whose candidates took ``seconds``, by runtime and form with '_' between them."""
    entries = []
    for name, value in seconds.items():
        runtime, form = name.split("__")
        timing = Timing("cpu", wall=[value] * 3, cpu=[value] * 3)
        names = {"ov": OPENVINO, "ours": OURS, "ort": ONNXRUNTIME, "bf16": OPENVINO_BF16, "alone": OURS_ALONE}
        names["narrow"] = OURS_BF16
        form = {"static": STATIC, "dcd": DCD, "folded": FOLDED}[form]
        entries.append(Entry(Candidate(names[runtime], form), RIGHT, timing=timing))
    case = NetworkCase("mobilenet_v2_x0.5", INFERENCE, 8)
    return unit.NetworkResult(case, INFERENCE, entries)


def test_best_static_and_best_of_others():
    result = _timed(
        ov__static=2.0, ort__static=3.0, ours__static=1.9, bf16__static=1.0, bf16__dcd=1.5,
        ov__dcd=6.0, ov__folded=5.0, ort__dcd=4.5, ours__dcd=2.2,
    )  # fmt: skip
    assert result.best(STATIC).candidate == Candidate(OURS, STATIC)
    assert result.best(PEERS_DCD).candidate == Candidate(ONNXRUNTIME, DCD)
    figures = {name: figure(result) for name, figure in report.FIGURES.items()}
    assert figures[report.TO_STATIC] == pytest.approx(2.2 / 1.9)
    assert figures[report.TO_OTHER_STATIC] == pytest.approx(2.2 / 2.0)
    assert figures[report.OVER_FOLDED] == pytest.approx(5.0 / 2.2)
    assert figures[report.TO_OTHERS] == pytest.approx(2.2 / 4.5)
    assert figures[report.OWN_STATIC] == pytest.approx(1.9 / 2.0)
    assert figures[report.THREADS] is None and figures[report.TO_OTHERS_BF16] is None
    narrow = _timed(bf16__dcd=6.0, bf16__folded=5.0, ov__dcd=1.0, ours__dcd=1.0, narrow__dcd=3.0)
    assert report.FIGURES[report.TO_OTHERS_BF16](narrow) == pytest.approx(3.0 / 5.0)
    assert narrow.best(STATIC) is None and narrow.best(PEERS_DCD).candidate == Candidate(OPENVINO, DCD)


def _bars(result, threads=1):
    console = Console(file=io.StringIO(), width=200)
    return print_bars(console, [result], threads, report.BARS, report.FIGURES), console.file.getvalue()


def test_bars_are_met_or_not():
    good = {"ov__static": 2.0, "ov__folded": 5.0, "ours__static": 2.0}
    met, text = _bars(_timed(**good, ours__dcd=2.1))
    assert met and "missed" not in text and report.OVER_FOLDED in text and report.THREADS not in text
    met, text = _bars(_timed(**good, ours__dcd=2.3))
    assert met and "missed" in text  # an aim alone
    assert not _bars(_timed(**good, ours__dcd=2.5))[0]
    assert not _bars(_timed(**good))[0]  # nothing of ours was measured
    fast = {**good, "ours__static": 1.0}
    met, text = _bars(_timed(**fast, ours__dcd=2.1))
    assert not met and text.count("2.100") == 2 and "1.050" in text  # our own static is the best then
    met, text = _bars(_timed(ours__dcd=1.0, alone__dcd=1.8), threads=2)
    assert met and report.THREADS in text and report.TO_STATIC not in text
    assert not _bars(_timed(ours__dcd=1.0, alone__dcd=1.6), threads=2)[0]


# ----------------------------------------------------------------------------------------------- training


@pytest.mark.skipif(not extension.LOADED, reason="the step of ours needs compiled kernels")
def test_a_training_step_is_checked_and_timed(monkeypatch):
    case = NetworkCase(NAME, TRAINING, 4, SIZE, CLASSES)
    result = training.run_case(case, PLAN, "native", False)
    assert [entry.candidate for entry in result.entries] == list(training.CANDIDATES)
    assert {entry.status for entry in result.entries} == {RIGHT}, result.entries
    assert report.FIGURES[report.STEP](result) > 0
    assert all(tuple(row) == report.ROW_KEYS for row in report.rows(result, RUN))

    honest = training.network_results

    def spoiled(network, case, images):
        found = honest(network, case, images)
        if images.dtype == torch.float32 and images.is_contiguous():
            found["output"] = found["output"] * 1.01
        return found

    checker = training.Checker(training.make_network(NAME, PAPER, CLASSES), case, 0)
    network = training.make_network(NAME, PAPER, CLASSES)
    assert checker.check(network, NCHW).right
    monkeypatch.setattr(training, "network_results", spoiled)
    assert not checker.check(network, NCHW).right
    assert checker.check(training.in_layout(network, CHANNELS_LAST), CHANNELS_LAST).right


# -------------------------------------------------------------------------------------------- the README's


def _csv_row(group, p50, static, **more):
    values = {"task": INFERENCE, "network": "resnet18", "batch": 1, "threads": 1, "size": 224, "group": group}
    values |= {"date": "2026-01-02", "commit": "c" * 14, "cpu": "a CPU", "torch": "2", "p50_us": p50}
    values |= {"ratio_to_best_static": p50 / static, "mean_us": p50, "peak_to_static": "", "images": 1}
    values |= dict.fromkeys(runtimes.PACKAGES, "1") | more
    return {key: str(value) for key, value in values.items()}


def _csv_rows():
    return [
        _csv_row(f"{EAGER} {STATIC}", 4000.0, 2000.0),
        _csv_row(f"{EAGER} {DCD}", 9000.0, 2000.0),
        _csv_row(f"{EAGER} {DCD}", 8000.0, 2000.0),
        _csv_row(f"{EAGER} {baselines.DY_CONV}", 12000.0, 2000.0),
        _csv_row(f"{OPENVINO} {FOLDED}", 3000.0, 2000.0),
        _csv_row(f"{OURS} {STATIC}", 2000.0, 2000.0),
        _csv_row(f"{OURS} {DCD}", 2200.0, 2000.0),
        # an older run
        _csv_row(f"{OURS} {DCD}", 100.0, 2000.0, date="2026-01-01"),
        _csv_row(f"{OURS} {DCD}", 30000.0, 29000.0, batch=8, threads=2),
        _csv_row(f"{OURS_ALONE} {DCD}", 54000.0, 29000.0, batch=8, threads=2),
        _csv_row(PAPER, 220.0, 200.0, task=TRAINING, batch=8, peak_to_static=1.05),
        _csv_row(f"{OURS} {STATIC}", 2000.0, 2000.0, task=PROTOCOL, images=300),
        _csv_row(f"{OURS} {DCD}", 9.0, 2000.0, task=PROTOCOL, mean_us=2280.0, images=300),
    ]


def test_the_readme_s_table():
    text = summary.table(_csv_rows())
    assert f"| {EAGER} | – | – | 4.00 → 8.00 (4.00) | – |" in text
    assert f"| {OPENVINO}, folded by hand | – | – | 3.00 (1.50) | – |" in text
    assert f"| **{OURS}** | – | – | 2.00 → 2.20 (1.10) | – |" in text
    assert "batch 8 |" not in text
    assert f"{EAGER}, batch 1: {baselines.DY_CONV} 12.00 ms (6.00)." in text
    assert "times as fast as with one: 1.80 (ResNet-18)." in text
    assert "ResNet-18 1.10 of the time and 1.05 of the memory." in text
    assert "mean over 300 images: ours 2.00 → 2.28 ms (+14 %)." in text
    measured = "ResNet-18, two threads, training, protocol"
    packages = "torch 2, onnxruntime 1, openvino 1"
    assert f"- {measured}: a CPU; {packages}; commit cccccccccccc, 2026-01-02." in text
    assert summary.table([]) == "not yet measured"


def test_the_readme_s_chart(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "chart.png"
    assert not summary.chart([], picture) and not picture.exists()
    assert summary.chart(_csv_rows(), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------ the rest


def _run(monkeypatch, *options):
    given = ["--networks", NAME, "--size", str(SIZE), "--classes", "10", "--seconds", "0", *options]
    monkeypatch.setattr(command.session, "save", lambda *given: pytest.fail("nothing was to be saved"))
    return command.run(command.parser().parse_args(given), cores=[0], given=given)


def test_the_command(monkeypatch, capsys):
    quick = ("--quick", "--batch", "1", "--runtimes", EAGER)
    assert _run(monkeypatch, *quick) == 0
    assert f"{EAGER} {FOLDED} {folded.PRODUCT}" in capsys.readouterr().out
    assert _run(monkeypatch, "--task", PROTOCOL, "--images", "2", "--runtimes", EAGER) == 0
    assert "mean over the images" in capsys.readouterr().out
    assert _run(monkeypatch, "--runtimes", "nothing") == 2
    monkeypatch.setattr(unit.Checker, "limit", lambda *given: 0.0)
    assert _run(monkeypatch, *quick) == 1
    assert "wrong: " in capsys.readouterr().out


@pytest.mark.parametrize("options", [("--size", "32"), ("--images", "0"), ("--base", "no such commit")])
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(list(options))
    assert stopped.value.code == 2 and options[0] in capsys.readouterr().err


def test_the_base_s_arguments_and_changes():
    given = ["--quick", "--base", "HEAD~1", "--check", "--batch", "1", "--base=HEAD"]
    assert base.without_option(given) == ["--quick", "--batch", "1"]

    def row(group, time, **more):
        return {"task": "inference", "network": "n", "batch": 1, "candidate": group, "group": group} | {
            "p50_us": time,
            **more,
        }

    own = [row("ours DCD", 80.0), row("OpenVINO static", 20.0), row("ours static", None), row("new", 1.0)]
    before = [row("ours DCD", "100.0"), row("OpenVINO static", "10.0"), row("ours static", "9")]
    ((found, now, then, ratio),) = base.changes(own, before)
    assert (found["candidate"], now, then) == ("ours DCD", 80.0, 100.0)
    # the machine was half as fast
    assert ratio == pytest.approx(0.4)
