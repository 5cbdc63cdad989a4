# SPDX-License-Identifier: BSD-3-Clause
"""The GPU benchmarks without a GPU: the whole pipeline on tiny shapes, and what is made of its rows."""

from __future__ import annotations

import contextlib
import csv
import pathlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

# appended, so that an installed dcd_kernels keeps its place before the source tree
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import dcd_kernels as dcd
from benchmarks import gpu, readme
from benchmarks.candidates import FORWARD, OURS, STATIC, TRAINING
from benchmarks.gpu import candidates, cases, command, networks, report, timing, unit, verify
from benchmarks.suite import REFUSED, RIGHT, WRONG
from dcd_kernels import extension

ROOT = pathlib.Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not extension.LOADED, reason="ours is measured by the compiled kernels")
SMOKE = ("--device", "cpu", "--tiny", "--minutes", "5")
CPU = torch.device("cpu")
RUN = dict.fromkeys(report.RUN_KEYS, "test") | {"copy_gbs": 10.0, "matmul_tflops": 1.0}
QUICK = timing.Plan(seconds=0.0, min_rounds=2, max_rounds=2, block_seconds=0.0)


@pytest.fixture(autouse=True)
def without_poison(poison, monkeypatch):
    """Times are taken as in the benchmark; what the candidates write is checked there."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(candidates, "COMPILE_OPTIONS", {"backend": "eager"})


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of everything: (exit status, folder, rows)."""
    folder = tmp_path_factory.mktemp("rows")
    status = gpu.main([*SMOKE, "--out", str(folder)])
    (path,) = folder.glob("gpu-*.csv")
    return status, folder, report.read(path)


def test_every_candidate_is_right_and_timed(smoke):
    status, _, rows = smoke
    assert status == 0
    assert {row["status"] for row in rows} == {RIGHT}, [row for row in rows if row["status"] != RIGHT]
    expected = 2 * len(candidates.REGISTRY) + 4 * len(networks.network_cases(3, tiny=True))
    assert len(rows) == expected
    for row in rows:
        assert tuple(row) == report.ROW_KEYS
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert float(row["ratio_to_ours"]) > 0
        assert row["device"] == "cpu" and row["date"] and row["commit"] and row["torch"]
        if row["in_channels"]:
            assert float(row["bytes_floor_us"]) > 0
    assert {row["clock"] for row in rows} == {timing.HOST}


def test_what_is_done_is_not_done_again(smoke, capsys):
    _, folder, rows = smoke
    assert gpu.main([*SMOKE, "--out", str(folder)]) == 0
    (path,) = folder.glob("gpu-*.csv")
    assert report.read(path) == rows
    assert "left" not in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on(smoke, tmp_path, capsys):
    _, folder, rows = smoke
    (path,) = folder.glob("gpu-*.csv")
    part = [row for row in rows if row["task"] == FORWARD and row["in_channels"] == "8"]
    with (tmp_path / path.name).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, report.ROW_KEYS)
        writer.writeheader()
        writer.writerows(part)
    options = [*SMOKE, "--out", str(tmp_path), "--tasks", FORWARD]
    assert gpu.main([*options[:-4], "--minutes", "0", *options[-4:]]) == 0
    assert "1 of 2 cases are left" in capsys.readouterr().out
    assert gpu.main(options) == 0
    again = report.read(tmp_path / path.name)
    assert again[: len(part)] == part
    assert {report.unit_of(row) for row in again} == {
        report.unit_of(row) for row in rows if row["task"] == FORWARD
    }


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) != 0
    said = capsys.readouterr().out
    assert "not yet run on hardware" in said and "make gpu-bench" in said


def test_list_needs_no_gpu(capsys):
    assert gpu.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "16→96@112 batch 256 L=4" in said and "512→2048@7 batch 256 L=16" in said
    assert "released max-autotune channels_last" in said and "materialised bmm nchw" in said
    assert "MobileNetV2 ×1.0 batch 1," in said


def test_times_of_the_cpu_are_not_rows_of_a_gpu(capsys):
    for options in (["--device", "cpu"], ["--tiny"]):
        with pytest.raises(SystemExit):
            gpu.main(options)
    assert "go together" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main([*SMOKE, "--tasks", "sideways"])


def test_the_shapes():
    """GPU_NOTES: L = 2^⌊log2 √Ci⌋, and inputs beyond the caches."""
    shapes = cases.gpu_cases(256)
    assert len({case.shape_name for case in shapes}) == 20
    assert all(case.latent_channels**2 <= case.in_channels < 4 * case.latent_channels**2 for case in shapes)
    cache = 60 << 20
    for case in shapes:
        assert cases.sets_needed(case, cache) * cases.image_bytes(case)[0] >= 4 * cache


@pytest.fixture
def operands():
    return cases.make_operands(cases.gpu_cases(3, tiny=True)[0], CPU, 2)


def test_operands_are_random_and_differ(operands):
    first, second = operands.sets
    assert not torch.equal(first.input["nchw"], second.input["nchw"])
    assert torch.equal(first.input["nchw"], first.input["channels_last"])
    assert first.input["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert all((t != 0).float().mean() > 0.9 for t in (first.input["nchw"], operands.weight, first.phi))


SPOILED = {
    "one row zero": lambda y: y.index_fill(1, torch.tensor([0]), 0.0),
    "a tenth too large": lambda y: y * 1.1,
    "nan": lambda y: torch.where(y == y.max(), torch.nan, y),
    "shape": lambda y: y[:, :, :-1],
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("task", (FORWARD, TRAINING, candidates.NORMALISED))
def test_wrong_numbers_get_no_time(task, how, operands, monkeypatch):
    """Each candidate, spoiled in its output or in its last gradient, beside its right self."""

    def spoil(candidate):
        def build(operands):
            call = candidate.build(operands)

            def run(i):
                found = call(i)
                if not isinstance(found, dict):
                    return SPOILED[how](found)
                name = "output" if how == "shape" else list(found)[-1]
                return found | {name: SPOILED[how](found[name])}

            return run

        return replace(candidate, name=f"spoiled {candidate.name}", build=build)

    right = [one for one in candidates.candidates(task) if one.group != candidates.COPY]
    monkeypatch.setattr(unit, "candidates", lambda task: [*right, *map(spoil, right)])
    for row in unit.run(operands.case, task, QUICK, CPU, 1, RUN):
        spoiled = row["candidate"].startswith("spoiled")
        assert row["status"] == (WRONG if spoiled else RIGHT), row
        assert ("p50_us" in row) != spoiled and bool(row["reason"]) == spoiled


def test_a_candidate_that_raises_is_refused(operands, monkeypatch):
    def absent(operands):
        raise RuntimeError("not on this machine")

    one = candidates.Candidate("absent", OURS, FORWARD, "nchw", verify.DYNAMIC, absent)
    monkeypatch.setattr(unit, "candidates", lambda task: [one])
    (row,) = unit.run(operands.case, FORWARD, QUICK, CPU, 1, RUN)
    assert (row["status"], "p50_us" in row) == (REFUSED, False)
    assert "not on this machine" in row["reason"]


def test_the_released_formulation_is_the_operator(operands):
    """Φ inside its two norms is phi = (diag(scale2) Φ + I) diag(scale1), in float64 exactly."""
    double = {name: getattr(operands, name).double() for name in ("weight", "p", "q", "scale1", "scale2")}
    it = operands.sets[0]
    input, core, lam = it.input["nchw"].double(), it.core.double(), it.lam.double()
    zero, one = torch.zeros_like(double["scale1"]), torch.ones_like(double["scale1"])
    order = (double[name] for name in ("scale1", "scale2"))
    y = candidates.released(input, double["weight"], double["p"], core, double["q"], lam, *order, zero, one)
    truth = verify.composition(operands, candidates.RELEASED_SUM, torch.float64, FORWARD)["output"]
    torch.testing.assert_close(y, truth)


def test_a_network_on_the_reference_is_refused():
    case = networks.network_cases(2, tiny=True)[1]
    network = networks.build(case, OURS, "nchw", CPU)
    assert networks._not_ours(OURS, network, case, "nchw", CPU) == ""
    assert networks._not_ours(STATIC, network, case, "nchw", CPU) == ""
    for module in network.modules():
        if isinstance(module, dcd.nn.DCDConv2d):
            module.double()  # what no half-precision kernel takes
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        networks._not_ours(OURS, network, case, "nchw", CPU)


# --- what rows say


def row(task, group, ratio, **more):
    values = {"network": "test", "in_channels": "8", "out_channels": "8", "size": "7", "batch": "256"}
    values |= {"task": task, "group": group, "layout": "nchw", "p50_us": str(50.0 * ratio), "status": RIGHT}
    values |= {
        "ratio_to_ours": str(ratio),
        "bytes_floor_us": "45",
        "flops_floor_us": "5",
        "copy_share": "0.9",
    }
    values |= {
        "device": "GPU",
        "commit": "c" * 12,
        "date": "2026",
        "torch": "t",
        "triton": "t",
        "driver": "d",
    }
    values |= {"copy_gbs": "4000", "matmul_tflops": "700"}
    return dict.fromkeys(report.ROW_KEYS, "") | values | more


def verdicts(rows):
    return {bar.label: bar.verdict(rows)[:3] for bar in report.BARS}


def test_bars():
    rows = [
        row(FORWARD, OURS, 1.0),
        row(FORWARD, STATIC, 1.25),
        row(FORWARD, STATIC, 2.0, layout="channels_last"),
        row(FORWARD, OURS, 1.0, size="14"),
        row(FORWARD, STATIC, 0.8, size="14"),
        row(FORWARD, candidates.BMM, 1.5),
        row(networks.NETWORK_TRAINING, OURS, 1.0, peak_mib="105", in_channels=""),
        row(networks.NETWORK_TRAINING, STATIC, 0.5, peak_mib="100", in_channels=""),
    ]
    found = verdicts(rows)
    met, mean, worst = found["forward: ours ÷ best static"]
    assert met == "met" and mean == pytest.approx(1.0) and worst == pytest.approx(1.25)
    assert found["forward: ours ÷ best static, worst"][0] == "met"
    assert found["materialised bmm ÷ ours"][:2] == ("missed", pytest.approx(1.5))
    assert found["peak memory of a training step ÷ static"][:2] == ("met", pytest.approx(1.05))
    assert found["network, training step: DCD ÷ static"][:2] == ("missed", pytest.approx(2.0))
    assert found["share of copy bandwidth, floor ≥ 40 µs"][:2] == ("met", pytest.approx(0.9))
    assert found["released eager ÷ ours"] == (report.NOT_YET, None, None)
    assert "missed" in report.bars_table(rows) and "8→8@7 batch 256" in report.cases_table(rows)


def test_the_worst_case_has_a_bar_of_its_own():
    rows = [row(FORWARD, OURS, 1.0), row(FORWARD, STATIC, 0.7)]
    assert verdicts(rows)["forward: ours ÷ best static, worst"][0] == "missed"


def test_small_floors_are_held_to_a_copy():
    small = {"bytes_floor_us": "10"}
    rows = [row(FORWARD, OURS, 1.0, **small), row(FORWARD, candidates.COPY, 0.8, **small)]
    found = verdicts(rows)
    assert found["ours ÷ copy of the bytes, floor < 40 µs"][:2] == ("met", pytest.approx(1.25))
    assert found["share of copy bandwidth, floor ≥ 40 µs"][0] == report.NOT_YET


def test_the_readme_says_what_the_rows_say():
    assert readme.gpu_table([]) == "not yet run on hardware"
    assert readme.gpu_table([row(FORWARD, OURS, 1.0, device="cpu")]) == "not yet run on hardware"
    text = readme.gpu_table([row(FORWARD, OURS, 1.0), row(FORWARD, STATIC, 2.0)])
    assert "| forward: ours ÷ best static | must ≤ 1.05 | **0.50** | 0.50 (8→8@7 batch 256) | met |" in text
    assert "GPU, driver d, torch t" in text
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    between = page.split(readme.GPU_START)[1].split(readme.GPU_END)[0].strip()
    assert between == readme.gpu_table(readme.read("gpu-*.csv")), "run: python -m benchmarks.readme"


def test_files_are_named_by_device_and_commit():
    assert (
        command.file_name({"device": "NVIDIA H200", "commit": "0123+"}) == "gpu-nvidia-h200-0123-edited.csv"
    )


class FakeCuda:
    """Stands for torch.cuda's streams, events and graphs: replays count, and a clock ticks with each call."""

    def __init__(self, monkeypatch, captures: bool):
        self.captures, self.replays, self.now = captures, 0, 0.0
        self.capturing = False
        for name, value in {
            "Stream": self.stream_like,
            "current_stream": self.stream_like,
            "stream": lambda stream: contextlib.nullcontext(),
            "set_stream": lambda stream: None,
            "synchronize": lambda: None,
            "CUDAGraph": lambda: self,
            "graph": self.graph,
            "Event": self.event,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def stream_like(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(self, graph):
        assert graph is self
        self.capturing = True
        yield
        self.capturing = False

    def replay(self):
        self.replays += 1
        self.now += 3.0

    def event(self, enable_timing):
        made = SimpleNamespace(at=0.0, synchronize=lambda: None)
        made.record = lambda: setattr(made, "at", self.now)
        made.elapsed_time = lambda end: end.at - made.at  # milliseconds
        return made

    def call(self, i):
        if self.capturing and not self.captures:
            self.capturing = False
            raise RuntimeError("operation not permitted when stream is capturing")
        self.now += 1.0
        return torch.zeros(1)


@pytest.mark.parametrize("captures", (True, False))
def test_calls_are_captured_where_they_can_be(captures, monkeypatch):
    fake = FakeCuda(monkeypatch, captures)
    block = timing.Block(fake.call, 3, torch.device("cuda"))
    assert block.clock == (timing.GRAPH if captures else timing.EVENTS)
    taken = timing.measure({"it": block}, timing.Plan(seconds=0.0, min_rounds=2))["it"]
    assert taken.seconds == pytest.approx([1e-3] * 2)  # three milliseconds a block of three calls, either way
    assert (fake.replays > 0) == captures
