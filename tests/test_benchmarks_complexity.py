# SPDX-License-Identifier: BSD-3-Clause
"""The published tables against the counts of the networks here: which rows agree, which follow no rule."""

from __future__ import annotations

import pathlib
import sys

import pytest

# appended, so that an installed dcd_kernels keeps its place before the source tree
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import complexity, run


@pytest.fixture(scope="module")
def agreements():
    return {(a.row["table"], *a.key): a for a in complexity.agreements()}


def test_every_row_is_there(agreements):
    rows = complexity.PUBLISHED["rows"]
    assert len(rows) == 49 and {row["table"] for row in rows} == {"1a", "1b", "2", "3a", "3b", "4a", "4b"}
    quoted = [row for row in rows if complexity.configuration(row) is None]
    assert len(quoted) == 7 and len(agreements) == 42
    assert all(row["variant"].startswith(("DY-Conv", "CondConv")) for row in quoted)


POINTWISE = [
    ("1a", 0.5, "LambdaW0"),
    ("1a", 0.5, "W0+PPhiQT"),
    ("1a", 0.5, "LambdaW0+PPhiQT"),
    *(("2", 0.5, f"DCD Lx{multiplier}") for multiplier in ("0.25", "0.50", "0.75")),
    *(("3a", 0.5, f"{form}+PPhiQT B={b}") for form in ("W0", "LambdaW0") for b in (2, 4, 8)),
    *(("4a", width, "DCD PW+CLS") for width in (1.0, 0.5, 0.35)),
]


def test_one_rule_for_the_pointwise_rows_of_mobilenet(agreements):
    rows = [agreements[table, "MobileNetV2", width, variant] for table, width, variant in POINTWISE]
    assert len(rows) == 15
    assert max(abs(row.parameters_off) for row in rows) < 0.031
    assert max(abs(row.on_static_off) for row in rows) < 0.005
    # and it is a rule, not fifteen times the same number
    assert len({round(row.parameters, 2) for row in rows}) == 15


def test_rows_that_follow_no_rule(agreements):
    """Each with its number; every one has a note."""
    outside = {key: row for key, row in agreements.items() if not row.follows_the_rule}
    off = {key[0] + " " + key[3]: round(100 * row.parameters_off, 1) for key, row in outside.items()}
    assert off == {
        "1b LambdaW0": 8.4,
        "3b DW": -4.5,
        "3b DW+CLS": -4.9,
        "3b DW+PW": -4.6,
        "3b DW+PW+CLS": -4.9,
        "4b DCD": -2.8,
        "4b static": 4.2,
    }
    assert {row.key for row in outside.values()} <= complexity.NOTES.keys()
    assert agreements["4b", "ResNet-50", None, "DCD"].on_static_off == pytest.approx(0.0064, abs=1e-4)
    assert agreements["4b", "ResNet-10", None, "static"] in outside.values()


def test_the_resnets(agreements):
    row = agreements["4b", "ResNet-18", None, "DCD"]
    assert row.parameters == pytest.approx(14.058, abs=1e-3)
    assert abs(row.madds_off) < 0.004
    assert agreements["4b", "ResNet-50", None, "static"].parameters == pytest.approx(23.508, abs=1e-3)


def test_the_command(capsys):
    assert run.main(["complexity"]) == 0
    text = capsys.readouterr().out
    for row in complexity.PUBLISHED["rows"]:
        assert row["variant"] in text
    assert "top-1 is quoted from the paper" in text
    line = next(line for line in text.splitlines() if "398,388,084" in line)
    assert line.split()[2:5] == ["326.0", "398.4", "327.4"] and line.endswith(" 398,388,084")
    line = next(line for line in text.splitlines() if "132,226,992" in line)
    assert line.split()[2:5] == ["104.8", "132.2", "104.6"]
    notes = [line for line in text.splitlines() if line.startswith("[")]
    assert len(notes) == len(set(complexity.NOTES.values()))
    assert all(len(line) <= 150 for line in text.splitlines() if not line.startswith("["))
    table = [line for line in text.splitlines() if "│" in line]
    assert len(table) == 49 + 2 and sum(" ! [" in line for line in table) == 7
