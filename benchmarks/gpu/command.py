# SPDX-License-Identifier: BSD-3-Clause
"""The operator and whole networks on a GPU, against the best that PyTorch has: `python -m benchmarks.gpu`.

Rows are appended to a file as they come; started again, the command goes on where it stopped. Without a GPU
`--list` prints what would be measured. README.md in benchmarks/ says how it is done.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import sys
import tempfile
import time

from .. import environment

RESULTS = environment.ROOT / "benchmarks" / "results"
NOT_YET = "not yet run on hardware"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m dcd_kernels bench gpu", description=__doc__)
    made.add_argument("--list", action="store_true", help="print cases and candidates; needs no GPU")
    made.add_argument("--minutes", type=float, default=8.0, help="begin no case after that (default 8)")
    made.add_argument("--tasks", nargs="+", default=(), metavar="TASK", help="only these, see --list")
    made.add_argument("--shapes", default="", metavar="TEXT", help="only shapes with TEXT: '384->96', '@14'")
    made.add_argument("--batch", type=int, help="batch size (default 256)")
    made.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the rows")
    made.add_argument("--commit", help="what the rows say where git cannot tell")
    made.add_argument("--fresh", action="store_true", help="forget the rows of this device and commit")
    made.add_argument("--table", action="store_true", help="measure nothing, print what the rows say")
    made.add_argument("--cases", action="store_true", help="print a line per case too")
    made.add_argument("--device", default="cuda", help="cuda, or cpu for the smoke test")
    made.add_argument("--tiny", action="store_true", help="smoke test: tiny shapes, times without meaning")
    return made


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    if (options.device == "cpu") != options.tiny:
        made.error("--device cpu and --tiny go together: the CPU is measured by benchmarks.pointwise")
    if options.tiny and options.out == RESULTS:
        options.out = pathlib.Path(tempfile.mkdtemp(prefix="gpu-bench-"))
    # torch may be loaded only now: `--help` needs none
    from . import report

    try:
        work = plan_work(options)
    except ValueError as error:
        made.error(str(error))
    if options.list:
        print_list(work)
        return 0
    if options.table:
        rows = [row for path in sorted(options.out.glob("gpu-*.csv")) for row in report.read(path)]
        return summarise(rows, options.cases)
    reason = refusal(options.device)
    if reason:
        print(f"benchmarks.gpu: {NOT_YET}: {reason}.")
        print("On a machine with an NVIDIA GPU of compute capability 8.0 or later and a CUDA build of torch:")
        print("  make gpu-bench PYTHON=<the Python with that torch>      (again, until nothing is left)")
        return 2
    return run(options, work)


def plan_work(options) -> list[tuple[str, object]]:
    """(task, case) in the order of measuring: what takes longest to compile comes last."""
    from ..candidates import FORWARD, TRAINING
    from .candidates import COMPILED, NORMALISED
    from .cases import BATCH, TINY_BATCH, gpu_cases
    from .networks import network_cases

    batch = options.batch or (TINY_BATCH if options.tiny else BATCH)
    shapes = gpu_cases(batch, options.shapes, options.tiny)
    networks = network_cases(batch, options.tiny)
    work: list[tuple[str, object]] = [(task, case) for task in (FORWARD, TRAINING) for case in shapes]
    work += [(case.task, case) for case in networks]
    work += [(task, case) for task in (NORMALISED, COMPILED) for case in shapes]
    known = list(dict.fromkeys(task for task, _ in work))
    if unknown := set(options.tasks) - set(known):
        raise ValueError(f"tasks={sorted(unknown)}: known are {known}")
    return [(task, case) for task, case in work if not options.tasks or task in options.tasks]


def print_list(work) -> None:
    from .candidates import TASKS, candidates
    from .networks import FORMULATIONS
    from .report import BARS

    shapes = {case: f"{case.name} L={case.latent_channels}" for task, case in work if task in TASKS}
    print("shapes, bf16:", *(f"  {text}" for text in shapes.values()), sep="\n")
    for task in dict.fromkeys(task for task, _ in work):
        if task in TASKS:
            print(f"{task}, every shape:", *(f"  {it.name}" for it in candidates(task)), sep="\n")
            continue
        print(f"{task}:")
        for group in FORMULATIONS:
            for case in (case for other, case in work if other == task):
                print(f"  {group}, {case.name}, both layouts")
    print("bars:")
    for bar in BARS:
        print(f"  {bar.kind}: {bar.label} {'≤' if bar.at_most else '≥'} {bar.limit:.2f}")


def refusal(device: str) -> str:
    """Why nothing can be measured; empty where it can."""
    import torch

    from dcd_kernels import extension

    if not extension.LOADED:
        return extension.REASON
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} finds none"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()}, the kernels need (8, 0)"
    return ""


def describe(options, device) -> dict:
    """Everything about the run that a row repeats, but the ceilings."""
    import torch

    found = dict.fromkeys(("capability", "driver", "cuda", "cudnn"), "none")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    commit = environment.commit()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": options.commit if options.commit and commit == "unknown" else commit,
        "device": "cpu",
        **found,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "dcd_kernels": _version("dcd-kernels"),
        "backend": "cpu" if device.type == "cpu" else "triton",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "source tree" if name == "dcd-kernels" else "none"


def _driver() -> str:
    try:
        text = pathlib.Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return next((word for word in text.split() if word[:1].isdigit() and word.count(".") >= 1), "unknown")


def file_name(run_keys: dict) -> str:
    """One file a device and commit: what resumes has to agree in both."""
    device = "".join(c if c.isalnum() else "-" for c in run_keys["device"]).strip("-").lower()
    return f"gpu-{device}-{run_keys['commit'].replace('+', '-edited')}.csv"


def run(options, work) -> int:
    import torch

    import dcd_kernels as dcd

    from ..suite import reason_of
    from . import candidates, networks, report, timing, unit

    began = time.monotonic()
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    run_keys = describe(options, device)
    path = options.out / file_name(run_keys)
    if options.fresh:
        path.unlink(missing_ok=True)
    rows = report.read(path)
    plan = timing.Plan()
    cache = 1 << 10
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    if options.tiny:
        plan = timing.Plan(seconds=0.0, min_rounds=2, max_rounds=2, block_seconds=0.0)
        candidates.COMPILE_OPTIONS = {"backend": "eager"}
    found = timing.ceilings(device, options.tiny)
    run_keys |= {"copy_gbs": found["copy_bytes"] * 1e-9, "matmul_tflops": found["matmul_flops"] * 1e-12}
    print(
        f"{run_keys['device']}, torch {run_keys['torch']}, Triton {run_keys['triton']}, commit "
        f"{run_keys['commit']}: copy {run_keys['copy_gbs']:.0f} GB/s read and written, bf16 product "
        f"{run_keys['matmul_tflops']:.0f} TFLOP/s, L2 {cache / 2**20:.0f} MiB"
    )
    print(f"rows: {path}", flush=True)
    done = {report.unit_of(row) for row in rows}
    left, longest = [], {}
    with dcd.use_backend(run_keys["backend"]):
        for task, case in work:
            if key_of(task, case) in done:
                continue
            start = time.monotonic()
            spent = start - began
            if spent + longest.get(task, 0.0) > 60 * options.minutes:
                left.append((task, case))
                continue
            try:
                if isinstance(case, networks.NetworkCase):
                    made = networks.run(case, plan, device, run_keys)
                else:
                    made = unit.run(case, task, plan, device, cache, run_keys)
            except torch.OutOfMemoryError as error:
                print(f"{task}, {case.name}: {reason_of(error)}", flush=True)
                unit.release(device)
                left.append((task, case))
                continue
            rows += report.append(path, made)
            took = time.monotonic() - start
            longest[task] = max(took, longest.get(task, 0.0))
            print(progress(task, case, made, time.monotonic() - began), flush=True)
    status = summarise(rows, options.cases)
    if left:
        task, case = left[0]
        print(f"{len(left)} of {len(work)} cases are left, start again to go on: {task}, {case.name} …")
    if options.tiny:
        print("smoke test: these times and ratios mean nothing")
    return status


def key_of(task: str, case) -> tuple[str, ...]:
    fields = (task, case.network, *(getattr(case, name, "") for name in ("in_channels", "out_channels")))
    return tuple(map(str, (*fields, case.size, case.batch)))


def progress(task: str, case, made: list[dict], seconds: float) -> str:
    """A line when a case is done: the best of ours and of the others."""
    groups = dict.fromkeys(row["group"] for row in made)
    times = [(row["group"], row["p50_us"]) for row in made if row.get("p50_us")]
    best = {group: min((time for own, time in times if own == group), default=None) for group in groups}
    cells = ", ".join(f"{group} {'-' if time is None else f'{time:.1f}'}" for group, time in best.items())
    return f"{seconds:5.0f} s  {task:<18}{case.name:<26} µs: {cells}"


def summarise(rows, with_cases: bool) -> int:
    """The tables; 1 if a candidate had wrong numbers."""
    from . import report

    if with_cases and rows:
        print(report.cases_table(rows))
    for line in report.failures(rows)[:30]:
        print(line)
    print(report.bars_table(rows))
    return int(any(row["status"] == "wrong" for row in rows))


if __name__ == "__main__":
    os.chdir(environment.ROOT)
    sys.exit(main())
