# SPDX-License-Identifier: BSD-3-Clause
"""Registry of candidates: runtime × form of the network × variant, and what groups of them stand for.

A variant is a memory format, or how a folded layer is computed; the fastest stands for its group.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

from torch import Tensor, nn

from ..candidates import CHANNELS_LAST, NCHW, OURS, STATIC
from . import baselines, folded, runtimes
from .runtimes import BFLOAT16, FLOAT32, Run
from .written import DCD, FOLDED, FORMS, is_mobilenet, to_run

EAGER, COMPILED, ONNXRUNTIME, OPENVINO = "PyTorch", "torch.compile", "ONNX Runtime", "OpenVINO"
OPENVINO_BF16, OURS_BF16 = "OpenVINO bf16", f"{OURS} bf16"
ACCELERATED, OURS_ALONE = "accelerate", "ours, one thread"
RUNTIMES = (EAGER, COMPILED, ONNXRUNTIME, OPENVINO, OPENVINO_BF16, ACCELERATED, OURS, OURS_ALONE, OURS_BF16)
PEERS = (EAGER, COMPILED, ONNXRUNTIME, OPENVINO)
THIS_PACKAGE = (ACCELERATED, OURS, OURS_ALONE, OURS_BF16)
IN_BF16 = (OPENVINO_BF16, OURS_BF16)
LAYOUTS = (NCHW, CHANNELS_LAST)

INFERENCE, PROTOCOL = "inference", "protocol"

# groups of groups: the fastest in float32 of any runtime, and of any that is not of this package; in bfloat16
PEERS_DCD, PEERS_STATIC = "best DCD of others", "best static of others"
PEERS_DCD_BF16 = "best bf16 DCD of others"
COLLECTIVE = {
    STATIC: tuple(f"{runtime} {STATIC}" for runtime in (*PEERS, OURS)),
    PEERS_STATIC: tuple(f"{runtime} {STATIC}" for runtime in PEERS),
    PEERS_DCD: tuple(f"{runtime} {form}" for runtime in PEERS for form in (DCD, FOLDED)),
    PEERS_DCD_BF16: tuple(f"{OPENVINO_BF16} {form}" for form in (DCD, FOLDED)),
}


@dataclass(frozen=True)
class Candidate:
    """One way of running one form of a network."""

    runtime: str
    form: str
    variant: str = ""

    @property
    def group(self) -> str:
        return f"{self.runtime} {self.form}"

    @property
    def layout(self) -> str:
        return self.variant if self.variant in LAYOUTS else NCHW

    @property
    def name(self) -> str:
        return f"{self.group} {self.variant}".rstrip()

    @property
    def precision(self) -> str:
        return BFLOAT16 if self.runtime in IN_BF16 else FLOAT32


def _register() -> tuple[Candidate, ...]:
    made = []
    for form in (STATIC, DCD):
        made += [Candidate(EAGER, form, layout) for layout in LAYOUTS]
    made += [Candidate(EAGER, FOLDED, form) for form in folded.FORMS]
    made += [Candidate(EAGER, form, layout) for form in baselines.EXPERTS for layout in LAYOUTS]
    made += [Candidate(COMPILED, form, CHANNELS_LAST) for form in (STATIC, DCD)]
    made += [Candidate(COMPILED, FOLDED, form) for form in (folded.PRODUCT, folded.FACTORED)]
    for runtime in (ONNXRUNTIME, OPENVINO, OPENVINO_BF16):
        made += [Candidate(runtime, form) for form in FORMS if form != FOLDED]
        made += [Candidate(runtime, FOLDED, form) for form in folded.FORMS]
    made += [Candidate(ACCELERATED, DCD, layout) for layout in LAYOUTS]
    for runtime, forms in ((OURS, (STATIC, DCD)), (OURS_ALONE, (DCD,)), (OURS_BF16, (STATIC, DCD))):
        made += [Candidate(runtime, form, layout) for form in forms for layout in LAYOUTS]
    return tuple(made)


REGISTRY = _register()


def scope(task: str, quick: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The forms and the runtimes of a task; what is left out takes long, or says nothing there."""
    if task == PROTOCOL:
        return (STATIC, DCD), (EAGER, ONNXRUNTIME, OPENVINO, ACCELERATED, OURS)
    if quick:
        left = (COMPILED, *IN_BF16)
        return (STATIC, DCD, FOLDED), tuple(runtime for runtime in RUNTIMES if runtime not in left)
    return FORMS, RUNTIMES


def candidates(
    network: str, threads: int, only: tuple[str, ...] = RUNTIMES, forms: tuple[str, ...] = FORMS
) -> list[Candidate]:
    """The candidates of some runtimes and forms that apply to a network and a number of threads."""
    return [
        candidate
        for candidate in REGISTRY
        if candidate.runtime in only
        and candidate.form in forms
        and (candidate.form not in baselines.EXPERTS or is_mobilenet(network))
        and (candidate.runtime != OURS_ALONE or threads > 1)
    ]


class Builder:
    """Makes what runs in one case; the same ONNX file serves all runtimes that read one."""

    def __init__(
        self, written: dict[str, nn.Module], images: Tensor, threads: int, folder: pathlib.Path
    ) -> None:
        self.written, self.images, self.threads, self.folder = written, images, threads, folder
        self.files: dict[tuple[str, str], pathlib.Path] = {}

    def file(self, form: str, variant: str) -> pathlib.Path:
        key = form, variant
        if key not in self.files:
            path = self.folder / f"{len(self.files)}.onnx"
            self.files[key] = runtimes.export(to_run(self.written, form, variant), self.images, path)
        return self.files[key]

    def build(self, candidate: Candidate) -> Run:
        """What runs a candidate, of images in its layout; raises what its runtime raises if it cannot."""
        form, variant, layout = candidate.form, candidate.variant, candidate.layout
        if candidate.runtime == ONNXRUNTIME:
            return runtimes.onnxruntime(self.file(form, variant), self.threads)
        if candidate.runtime in (OPENVINO, OPENVINO_BF16):
            return runtimes.openvino(self.file(form, variant), self.threads, candidate.precision)
        network = to_run(self.written, form, variant)
        if candidate.runtime == EAGER:
            return runtimes.inferring(network, layout)
        if candidate.runtime == COMPILED:
            return runtimes.compiled(network, layout)
        if candidate.runtime == ACCELERATED:
            return runtimes.accelerated(network, layout)
        run = runtimes.optimized(network, layout, candidate.precision)
        return run if candidate.runtime != OURS_ALONE else runtimes.on_one_thread(run, self.threads)
