# SPDX-License-Identifier: BSD-3-Clause
"""The launches that real layers make, forward and backward, found on tensors without memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ahead
import torch

from benchmarks.cases import POINTWISE_SHAPES, latent_channels
from dcd_kernels.arguments import ACTIVATIONS

BATCH = 256
LAYOUTS = ("contiguous", "channels_last")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """One pointwise layer of a network, or the 1×1 part of a larger convolution."""

    in_channels: int
    out_channels: int
    size: int  # height and width

    def __str__(self) -> str:
        return f"{self.in_channels}-{self.out_channels}@{self.size}"


LAYERS = [
    *(Layer(*shape[1:]) for shape in POINTWISE_SHAPES),
    # the other half of ResNet-50's bottlenecks
    *(Layer(*shape) for shape in ((128, 512, 28), (256, 1024, 14), (512, 2048, 7))),
]


@dataclass(frozen=True)
class Call:
    """An op on a layer."""

    op: str
    layer: Layer
    layout: str = "contiguous"
    dtype: str = "bf16"
    batch: int = BATCH

    def __str__(self) -> str:
        return f"{self.op} {self.layer} {'last' if self.layout == 'channels_last' else 'first'}"

    @property
    def wide(self) -> bool:
        """Whether every row of its images begins at a multiple of 16 bytes and can be read so.

        wgmma takes float32 (as tf32) only with the reduction axis, the channels, contiguous in shared
        memory: contiguous images are turned on their way there, four bytes at a time.
        """
        if self.dtype == "fp32" and self.layout == "contiguous":
            return False
        channels = self.layer.in_channels, self.layer.out_channels
        axes = channels if self.layout == "channels_last" else (self.layer.size**2,)
        return all(axis * DTYPES[self.dtype].itemsize % 16 == 0 for axis in axes)

    def image(self, channels: int) -> torch.Tensor:
        shape = (self.batch, channels, self.layer.size, self.layer.size)
        last = self.layout == "channels_last"
        return torch.empty(
            shape,
            dtype=DTYPES[self.dtype],
            device="meta",
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )

    def factors(self) -> tuple[torch.Tensor, ...]:
        """input or static, weight or input, p, phi, q, lam: phi and lam in float32, as under autocast."""
        ci, co, latent = (
            self.layer.in_channels,
            self.layer.out_channels,
            latent_channels(self.layer.in_channels),
        )

        def parameter(*shape: int, dtype: torch.dtype = DTYPES[self.dtype]) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        coefficients = (
            parameter(co, latent),
            parameter(self.batch, latent, latent, dtype=torch.float32),
            parameter(ci, latent),
            parameter(self.batch, co, dtype=torch.float32),
        )
        if self.op.startswith("apply"):
            return self.image(co), self.image(ci), *coefficients
        return self.image(ci), parameter(co, ci), *coefficients

    def run(self) -> None:
        """Calls the Triton entry point, with everything that a layer may have."""
        from dcd_kernels.backends.triton import entry

        co = self.layer.out_channels
        factors = self.factors()
        function = getattr(entry, self.op)
        if self.op == "latent_moments":
            function(factors[0], factors[4])
        elif self.op.endswith("_backward"):
            function(self.image(co), *factors, 0b111111)
        else:
            bias = torch.empty(co, dtype=torch.float32, device="meta")
            function(*factors, bias, self.image(co), ACTIVATIONS["relu6"])


OPS = ("pointwise", "pointwise_pooled", "pointwise_backward", "apply", "apply_backward", "latent_moments")


def calls(
    layers: Iterable[Layer] = LAYERS,
    ops: Iterable[str] = OPS,
    layouts: Iterable[str] = LAYOUTS,
    dtypes: Iterable[str] = ("bf16",),
) -> list[Call]:
    return [
        Call(op, layer, layout, dtype)
        for op in ops
        for dtype in dtypes
        for layout in layouts
        for layer in layers
    ]


def launches(wanted: Iterable[Call], *, every: bool = False) -> list[tuple[Call, ahead.Launch]]:
    """What the calls launch; `every`: with all candidates for the tiles."""
    found = []
    for call in wanted:
        with ahead.recording(str(call), every=every) as made:
            call.run()
        assert made, f"{call} launches nothing"
        found += [(call, launch) for launch in made]
    return found


def results(
    made: Iterable[tuple[Call, ahead.Launch]], targets: Iterable[ahead.Target]
) -> Iterator[tuple[Call, ahead.Result]]:
    """Each compilation once, in the order of the calls; as many at a time as there are cores."""
    wanted: dict[str, tuple[Call, ahead.Launch, ahead.Target]] = {}
    for target, (call, launch) in itertools.product(targets, made):
        name = ahead.key(launch, target)
        if name not in wanted or launch.untuned:  # of which more is asked
            wanted[name] = (call, launch, target)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [
            (call, pool.submit(ahead.compile_for, launch, target)) for call, launch, target in wanted.values()
        ]
        try:
            for call, task in tasks:
                yield call, task.result()
        finally:
            pool.shutdown(cancel_futures=True)
