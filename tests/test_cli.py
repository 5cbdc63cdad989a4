# SPDX-License-Identifier: BSD-3-Clause
"""``python -m dcd_kernels info | demo | bench``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dcd_kernels import cli, extension, info


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dcd_kernels", *arguments], capture_output=True, text=True, timeout=120
    )


def test_info_runs_as_a_program():
    answer = run("info")
    assert answer.returncode == 0, answer.stderr
    assert torch.__version__ in answer.stdout
    assert info.processor() in answer.stdout
    assert info.aligned(info.support_table_markdown()) in answer.stdout


def test_info_needs_no_extra():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['rich', 'matplotlib', 'sklearn', 'PIL']));"
    program = blocked + "from dcd_kernels.cli import main; sys.exit(main(['info']))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.skipif(not extension.LOADED, reason="there is no instruction set without the compiled kernels")
def test_info_names_the_instruction_set_in_use():
    before = torch.ops.dcd_kernels.cpu_isa()
    torch.ops.dcd_kernels.set_cpu_isa("baseline")
    try:
        assert "running baseline" in info.report()
    finally:
        torch.ops.dcd_kernels.set_cpu_isa(before)
    assert f"running {before}" in info.report()


def test_info_says_why_the_kernels_are_not_loaded(monkeypatch):
    monkeypatch.setattr(extension, "LOADED", False)
    monkeypatch.setattr(extension, "REASON", "a reason of its own")
    text = info.report()
    assert "NOT LOADED" in text and "a reason of its own" in text


def test_a_missing_extra_is_one_line_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(cli, "DEMO_PACKAGES", {"json": "json", "no_such_module": "some-package"})
    assert cli.main(["demo"]) == 2
    message = capsys.readouterr().err
    assert message == "the demo needs some-package: python -m pip install some-package\n"


def test_bench_says_where_the_benchmarks_are(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "benchmarks_folder", lambda: tmp_path)
    assert cli.main(["bench"]) == 2
    assert "make bench" in capsys.readouterr().err


def test_bench_passes_its_arguments_on(monkeypatch, tmp_path, capsys):
    (tmp_path / "run.py").write_text("import sys; print(sys.argv[1:])")
    monkeypatch.setattr(cli, "benchmarks_folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["before"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["bench", "pointwise", "--quick", "--help"]) == 0
    assert capsys.readouterr().out == "['pointwise', '--quick', '--help']\n"


@pytest.mark.parametrize(
    "arguments", [[], ["unheard-of"], ["demo", "--rounds", "0"], ["demo", "--only", "x"]]
)
def test_wrong_arguments_end_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m dcd_kernels" in capsys.readouterr().err
