# SPDX-License-Identifier: BSD-3-Clause
"""`make gpu-check`: the GPU tests in several processes at once, within a time, and what came of them.

Most of the time goes into compiling kernels, which is work for one CPU core a process; and a process whose
CUDA context was lost to one test's error cannot run another test, so the tests go in small parts.

`--device cpu` is a rehearsal of the tests themselves on the CPU kernels, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass, field

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PART = 80  # tests a process
GRACE = 60.0  # seconds for the test that is running when the time is spent
LATE = "not run: the time of this run is spent"


@dataclass
class Outcome:
    """What a process, or all of them, reported."""

    passed: int = 0
    skips: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.passed += other.passed
        self.skips += other.skips
        self.failures += other.failures

    @property
    def unfinished(self) -> int:
        return sum(count for reason, count in self.skips.items() if reason.startswith("not run"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python tests/gpu/run.py", description=__doc__)
    made.add_argument("--device", default="cuda", help="cuda, or cpu for the rehearsal")
    made.add_argument("--minutes", type=float, default=8.0, help="start no test after that (default 8)")
    made.add_argument("--jobs", type=int, help="processes at once (default: by cores, 8 at most)")
    made.add_argument("--logs", type=pathlib.Path, help="folder for the output of every part")
    made.add_argument("-k", dest="keyword", default="", help="as in pytest")
    return made


def refusal(device: str) -> str:
    """Why nothing can be checked; empty where it can."""
    code = "import on_device; print('=' + on_device.unusable())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables(device) | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), path()])},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["Python failed"])[-1]
    return done.stdout.strip().splitlines()[-1][1:]


def path() -> str:
    """The module search path of the parts: what was given, then this source tree."""
    return os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])


def variables(device: str, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": path(), "DCD_KERNELS_TEST_DEVICE": device, **more}


def pytest_command(file: pathlib.Path | None, keyword: str, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *options]
    return [*command, *(["-k", keyword] if keyword else []), str(file or HERE)]


def collect(device: str, keyword: str) -> dict[pathlib.Path, int]:
    """How many tests each file has."""
    done = subprocess.run(
        pytest_command(None, keyword, "--collect-only"),
        cwd=ROOT, env=variables(device), capture_output=True, text=True, check=False,
    )  # fmt: skip
    counts = collections.Counter(
        line.split("::")[0] for line in done.stdout.splitlines() if line.startswith("tests/gpu/")
    )
    if done.returncode or not counts:
        sys.exit(f"not all tests were collected:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return {ROOT / name: count for name, count in counts.items()}


def run_part(file, index, tests, device, keyword, seed, end, logs) -> tuple[str, Outcome]:
    """One process: the tests index, index + count, … of a file's ``tests``, in ``count`` parts."""
    count = -(-tests // PART)
    name = f"{file.stem.removeprefix('test_gpu_')}-{index + 1}of{count}"
    report = logs / f"{name}.xml"
    left = end - time.monotonic()
    if left <= 0:
        return name, Outcome(skips=collections.Counter({LATE: len(range(index, tests, count))}))
    env = variables(
        device,
        DCD_KERNELS_TEST_SECONDS=f"{left:.0f}",
        DCD_KERNELS_TEST_PART=f"{index}/{count}",
        DCD_KERNELS_TEST_SEED=seed,
    )
    command = pytest_command(file, keyword, "--tb=short", f"--junitxml={report}")
    with (logs / f"{name}.log").open("w", encoding="utf-8") as log:
        try:
            subprocess.run(
                command, cwd=ROOT, env=env, stdout=log, stderr=log, timeout=left + GRACE, check=False
            )
        except subprocess.TimeoutExpired:
            return name, Outcome(failures=[(name, f"hung: nothing for {GRACE:.0f} s behind the end")])
    return name, read(report, name, logs)


def read(report: pathlib.Path, name: str, logs: pathlib.Path) -> Outcome:
    """The outcome in a JUnit file; a process that left none has crashed."""
    found = Outcome()
    try:
        cases = xml.parse(report).getroot().iter("testcase")
    except (OSError, xml.ParseError):
        tail = (logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
        return Outcome(failures=[(name, "the process ended: " + " | ".join(tail))])
    for case in cases:
        title = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        wrong = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if wrong:
            found.failures.append((title, (wrong[0].get("message") or "").strip().split("\n")[0][:150]))
        elif skipped is not None:
            found.skips[skipped.get("message", "")] += 1
        else:
            found.passed += 1
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    began = time.monotonic()
    reason = refusal(options.device)
    if reason:
        print(f"gpu-check: not yet run on hardware: {reason}.")
        print("On a machine with an NVIDIA GPU of compute capability 8.0 or later and a CUDA build of torch:")
        print("  make gpu-check PYTHON=<the Python with that torch>")
        return 2
    logs = options.logs or pathlib.Path(tempfile.mkdtemp(prefix="gpu-check-"))
    logs.mkdir(parents=True, exist_ok=True)
    seed = os.environ.get("DCD_KERNELS_TEST_SEED") or str(random.SystemRandom().randrange(2**31))
    counts = collect(options.device, options.keyword)
    jobs = options.jobs or max(1, min(8, (os.cpu_count() or 2) // 2))
    end = began + 60 * options.minutes
    print(f"gpu-check on {options.device}: {sum(counts.values())} tests, {jobs} processes, seed {seed}")
    print(f"logs: {logs}", flush=True)
    parts = [(file, index, count) for file, count in counts.items() for index in range(-(-count // PART))]
    # the longest test first; then in any order, so that a run that is cut short has seen something of all
    random.Random(int(seed)).shuffle(parts)
    parts.sort(key=lambda part: "sanitizer" not in part[0].name)
    total = Outcome()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = [
            pool.submit(run_part, *part, options.device, options.keyword, seed, end, logs) for part in parts
        ]
        for done in concurrent.futures.as_completed(running):
            name, outcome = done.result()
            total.add(outcome)
            skipped = sum(outcome.skips.values())
            print(
                f"{time.monotonic() - began:5.0f} s  {name:<24}{outcome.passed:4} passed  "
                f"{skipped:3} skipped  {len(outcome.failures):3} failed",
                flush=True,
            )
    return report_total(total, time.monotonic() - began)


def report_total(total: Outcome, seconds: float) -> int:
    for reason, count in total.skips.most_common():
        print(f"skipped {count}: {reason}")
    for title, message in total.failures[:40]:
        print(f"FAILED {title}: {message}")
    if len(total.failures) > 40:
        print(f"… and {len(total.failures) - 40} more")
    verdict = "failed" if total.failures else "incomplete" if total.unfinished else "passed"
    print(
        f"gpu-check {verdict}: {total.passed} passed, {len(total.failures)} failed, "
        f"{sum(total.skips.values())} skipped in {seconds:.0f} s"
    )
    return 0 if verdict == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
