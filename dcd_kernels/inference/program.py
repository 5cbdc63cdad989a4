# SPDX-License-Identifier: BSD-3-Clause
"""The program of the op `network`: values, steps, and where in memory each value lies (csrc/network.h)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dcd_kernels import _core

LAYOUT = _core.network_layout()
BLOCK: int = LAYOUT["block"]
_KINDS = {name: code for code, name in enumerate(LAYOUT["kinds"])}
# fields that mean nothing when they are 0, and are absent when they are -1
_COUNTS = {"streamed", "latent", "blocks", "latent_kernel", "lam_channels", "activation", "stage", "winograd"}


def padded(channels: int) -> int:
    """Channels in whole planes."""
    return -(-channels // BLOCK) * BLOCK


@dataclass
class Value:
    """An image of ``channels``, or a vector; ``scale`` is by what it is smaller than the network's input.

    In a network of bfloat16 vectors are float32.
    """

    channels: int
    image: bool
    scale: int = 1
    halo: tuple[int, int] = (0, 0)
    # the means of its regions, by the number of bins a dimension
    pooled: dict[int, Value] = field(default_factory=dict)
    made_by: Step | None = None


@dataclass(eq=False)
class Step:
    """One step: its kind, and its fields by name, which are numbers, `Value`, `Step` or `Constant`."""

    kind: str
    fields: dict[str, object]
    what: str = ""  # in words, for reports

    def values(self) -> list[Value]:
        """What it reads or writes."""
        return [value for value in self.fields.values() if isinstance(value, Value)]


class Constant:
    """Numbers of a step; ``offset`` is where they begin. A pair of bfloat16 takes the place of a number."""

    def __init__(self, size: int) -> None:
        self.size, self.offset = size, -1


def _stages(steps: list[Step]) -> list[int]:
    """Steps on large images run sample by sample, so that a sample's images stay in the cache; the others,
    whose weights are larger than their images (in the published networks from a sixteenth of the input's size
    on), one after the other for all samples."""
    large, stages = True, []
    for step in steps:
        output = step.fields.get("output")
        large = large and isinstance(output, Value) and (not output.image or output.scale < 16)
        stages.append(0 if large else len(stages) + 1)
    return stages


@dataclass
class _Life:
    """From which step to which a value is needed."""

    value: Value
    first: int
    last: int
    shared: bool = False


def _lives(steps: list[Step], stages: list[int]) -> dict[int, _Life]:
    position = {id(step): i for i, step in enumerate(steps)}
    at = list(range(len(steps)))
    for step in steps:  # a streamed step runs within the one that reads it
        producer = step.fields.get("producer")
        if producer is not None:
            at[position[id(producer)]] = position[id(step)]
    lives: dict[int, _Life] = {}
    ends: dict[int, set[int]] = {}
    for i, step in enumerate(steps):
        for value in step.values():
            life = lives.setdefault(id(value), _Life(value, i, i))
            life.first, life.last = min(life.first, i), max(life.last, at[i])
            ends.setdefault(id(value), set()).add(stages[at[i]])
    # more than one step in a stage: every sample goes through all of them before the next one
    sizes = {stage: stages.count(stage) for stage in stages}
    for key, life in lives.items():
        life.shared = len(ends[key]) == 1 and sizes[next(iter(ends[key]))] > 1
        if not life.shared:
            for i, stage in enumerate(stages):
                if stage in ends[key] and sizes[stage] > 1:
                    life.first, life.last = min(life.first, i), max(life.last, i)
    return lives


def _size(value: Value) -> int:
    """Numbers of a sample, were the network's input of the usual size."""
    return padded(value.channels) * ((224 // value.scale) ** 2 if value.image else 1)


def _slots(lives: dict[int, _Life]) -> tuple[dict[int, int], int]:
    """A slot for each value: values whose lives do not meet may have the same one.

    Of the free ones it is the one that has to grow least, then the one that fits best. Vectors have slots of
    their own, as one of them would keep a place that is as large as an image.
    """
    ends: list[_Life] = []
    sizes: list[int] = []
    chosen = {}
    for key, life in sorted(lives.items(), key=lambda item: item[1].first):
        size, kind = _size(life.value), (life.shared, life.value.image)
        free = [
            i for i, old in enumerate(ends) if old.last < life.first and (old.shared, old.value.image) == kind
        ]
        slot = min(free, key=lambda i: (max(sizes[i], size) - sizes[i], sizes[i]), default=len(ends))
        sizes[slot : slot + 1] = [max([size, *sizes[slot : slot + 1]])]
        ends[slot : slot + 1] = [life]
        chosen[key] = slot
    return chosen, len(ends)


def encode(steps: list[Step], narrow: bool) -> Tensor:
    """The op's ``program`` (int64, one dimension); constants have their offsets by now.

    ``narrow``: of a network of bfloat16, not float32.
    """
    stages = _stages(steps)
    lives = _lives(steps, stages)
    streamed = {id(step.fields["output"]) for step in steps if step.fields.get("streamed")}
    slots, count = _slots({key: life for key, life in lives.items() if key not in streamed})
    values: dict[int, Value] = {}
    for step in steps:
        values.update((id(value), value) for value in step.values())
    number = {key: i for i, key in enumerate(values)}
    position = {id(step): i for i, step in enumerate(steps)}
    numbers = [len(values), len(steps), count, int(narrow)]
    for key, value in values.items():
        described = {
            "channels": value.channels,
            "halo_h": value.halo[0],
            "halo_w": value.halo[1],
            "slot": slots.get(key, -1),
            "shared": int(lives[key].shared),
            "vector": int(not value.image),
        }
        numbers += [described[name] for name in LAYOUT["value"]]
    for step, stage in zip(steps, stages, strict=True):
        unknown = step.fields.keys() - set(LAYOUT["step"])
        assert not unknown, unknown
        for name in LAYOUT["step"]:
            field_ = step.fields.get(name)
            if name == "kind":
                field_ = _KINDS[step.kind]
            elif name == "stage":
                field_ = stage
            elif isinstance(field_, Value):
                field_ = number[id(field_)]
            elif isinstance(field_, Step):
                field_ = position[id(field_)]
            elif isinstance(field_, Constant):
                field_ = field_.offset
            elif field_ is None:
                field_ = 0 if name in _COUNTS else -1
            numbers.append(int(field_))
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
