# SPDX-License-Identifier: BSD-3-Clause
"""Tile sizes: a few candidates a kernel, the fastest of them remembered on disk for each device.

Environment: ``DCD_KERNELS_TUNE=0`` measures nothing and takes each kernel's first fitting candidate;
``DCD_KERNELS_CACHE`` is the folder of the remembered choices, by default ``~/.cache/dcd_kernels``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

TUNE, FOLDER = "DCD_KERNELS_TUNE", "DCD_KERNELS_CACHE"
_ROUNDS = 5
_VERSION = 1  # of the kernels: a change that moves the fastest tile raises it
_TRIED = 3
_HEAD_START = 10_000_000  # clock cycles, some 5 ms
_SHORTEST = 32  # step of a reduction that is as long
MULTIPROCESSORS = 132  # of an H100 or H200; the other GPUs served have about as many
_chosen: dict[tuple[int, str], Config] = {}
_remembered: dict[int, dict[str, list[int]]] = {}
_lock = threading.Lock()


class Config(NamedTuple):
    """One tile: rows, columns and depth as the kernel's docstring names them, and how it is scheduled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose(kernel: str, key: tuple, candidates: Sequence[Config], run: Callable[[Config], None]) -> Config:
    """The candidate for a call that ``key`` describes; ``run(config)`` launches it, as often as wanted.

    The first candidate must fit every device. It is what runs while nothing may be measured: under CUDA-graph
    capture, without a GPU, under ``torch.use_deterministic_algorithms``, or by the user's wish.
    """
    if len(candidates) == 1 or not torch.cuda.is_initialized() or os.environ.get(TUNE) == "0":
        return candidates[0]
    device = torch.cuda.current_device()
    name = f"{kernel} {' '.join(map(str, key))}"
    if torch.are_deterministic_algorithms_enabled():
        return candidates[0]  # another tile may add up in another order
    known = _chosen.get((device, name))
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    with _lock:
        remembered = _remembered.setdefault(device, _read(device))
        found = remembered.get(name)
        if found is None or Config(*found) not in candidates:
            found = _measure(candidates, run)
            remembered[name] = list(found)
            _write(device, remembered)
        _chosen[device, name] = Config(*found)
        return _chosen[device, name]


def fitting(
    candidates: tuple[Config, ...], m: int, n: int, k: int, columns: int = 0, rows: int = 0
) -> tuple[Config, ...]:
    """The best three of the candidates that are no wider in any direction than what they cover.

    Best are those that give half of the multiprocessors a tile of ``rows`` × ``columns`` (where given), and
    of those the largest; one beyond the first candidate's size is worth a trial, but not a first choice.
    """
    return _fitting(candidates, m, n, k, columns, rows, MULTIPROCESSORS)


@functools.lru_cache(maxsize=4096)
def _fitting(candidates, m, n, k, columns, rows, multiprocessors) -> tuple[Config, ...]:
    widest = [max(16, bucket(size)) for size in (m, n, k)]
    fits = [c for c in candidates if all(own <= most for own, most in zip(c[:3], widest, strict=True))]
    # a reduction of many short steps is all waiting
    fits = [c for c in fits if c.block_k >= min(widest[2], _SHORTEST)] or fits

    def rank(config: Config) -> tuple[int, int]:
        tiles = -(-rows // config.block_m) * -(-columns // config.block_n) if rows else 0
        return -min(tiles, multiprocessors // 2), -math.prod(map(min, config[:3], candidates[0][:3]))

    return tuple(sorted(fits, key=rank)[:_TRIED])


def bucket(count: int) -> int:
    """The power of two at or above ``count``: calls of similar size share a choice."""
    return 1 << max(0, count - 1).bit_length()


def _measure(candidates: Sequence[Config], run: Callable[[Config], None]) -> Config:
    """The fastest, by medians over interleaved rounds that are all queued before the first one may begin."""
    held = []
    for config in candidates:
        try:
            run(config)  # compiles
            held.append(config)
        except triton.runtime.errors.OutOfResources:
            continue  # more shared memory than this device has
    if len(held) < 2:
        return held[0] if held else candidates[0]
    # the host takes longer to start a kernel than many kernels run, and would be what is measured
    torch.cuda._sleep(_HEAD_START)
    events = {config: [] for config in held}
    for _ in range(_ROUNDS):
        for config in held:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            run(config)
            pair[1].record()
            events[config].append(pair)
    torch.cuda.synchronize()
    times = {
        config: statistics.median(start.elapsed_time(end) for start, end in pairs)
        for config, pairs in events.items()
    }
    return min(held, key=times.__getitem__)


def _path(device: int) -> Path:
    properties = torch.cuda.get_device_properties(device)
    name = "".join(c if c.isalnum() else "-" for c in properties.name)
    folder = Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "dcd_kernels")
    return folder / f"tiles-{name}-triton-{triton.__version__}-{_VERSION}.json"


def _read(device: int) -> dict[str, list[int]]:
    try:
        found = json.loads(_path(device).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(device: int, choices: dict[str, list[int]]) -> None:
    """A whole file at once, so that a process that reads meanwhile sees an old or a new one; best effort."""
    path = _path(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as stream:
            json.dump(_read(device) | choices, stream, indent=0, sort_keys=True)
        os.replace(stream.name, path)
    except OSError:
        pass  # a read-only home costs measuring again in the next process
