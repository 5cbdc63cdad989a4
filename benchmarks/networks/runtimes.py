# SPDX-License-Identifier: BSD-3-Clause
"""The runtimes: each makes of a network a function from images (N, 3, H, W) to outputs (N, classes).

It is limited to some threads and may be good for one shape only. What making it takes (tracing, compiling,
packing) is not timed, nor is its first call.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import logging
import pathlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..accelerated.networks import in_layout

Run = Callable[[Tensor], Tensor]
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino")
BFLOAT16, FLOAT32 = "bfloat16", "float32"


def versions() -> dict[str, str]:
    """Of the packages that runtimes need; 'none' where one is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


# ------------------------------------------------------------------------------------------------- PyTorch


def inferring(network: nn.Module, layout: str) -> Run:
    """``network`` as it is, in a memory format."""
    return torch.inference_mode()(in_layout(network, layout).eval())


def compiled(network: nn.Module, layout: str) -> Run:
    """By inductor with its weights frozen and the calls between kernels in C++."""
    torch._dynamo.reset()
    network = in_layout(network, layout).eval().requires_grad_(False)
    options = {"freezing": True, "cpp_wrapper": True}
    # it does not freeze what runs in inference mode
    return torch.no_grad()(torch.compile(network, fullgraph=True, dynamic=False, options=options))


# ----------------------------------------------------------------------------------------------------- ONNX


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress and its warnings about packages that are not needed off the screen."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def export(network: nn.Module, images: Tensor, path: pathlib.Path) -> pathlib.Path:
    """Write ``network`` at the shape of ``images`` as ONNX, with its weights in the same file.

    By the exporter that goes through ``torch.export``: the older one has no adaptive pooling of odd maps.
    """
    with _quiet():
        torch.onnx.export(
            copy.deepcopy(network).eval().requires_grad_(False),
            (images,),
            path,
            dynamo=True,
            verbose=False,
            external_data=False,
        )
    return path


def onnxruntime(path: pathlib.Path, threads: int) -> Run:
    """On the CPU provider; its threads stop spinning when a call ends: the next candidate needs the cores."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(path: pathlib.Path, threads: int, precision: str) -> Run:
    """On the CPU plugin, for the shortest time of one call, in ``precision``."""
    import openvino as runtime

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {FLOAT32: "f32", BFLOAT16: "bf16"}[precision],
        # the process is pinned as a whole
        "ENABLE_CPU_PINNING": False,
    }
    request = runtime.Core().compile_model(str(path), "CPU", options).create_infer_request()
    # neither input nor output is copied
    sharing = {"share_inputs": True, "share_outputs": True}
    return lambda images: torch.from_numpy(request.infer({0: images.numpy()}, **sharing)[0])


# ----------------------------------------------------------------------------------------------------- ours


def optimized(network: nn.Module, layout: str, precision: str = FLOAT32) -> Run:
    """`dcd.optimize_for_inference` of the network as it is written, or in bfloat16 but for its norms.

    Images and outputs are in float32 either way, like those of OpenVINO: what converting them takes counts.
    """
    import dcd_kernels as dcd

    network = copy.deepcopy(network).eval()
    if precision == FLOAT32:
        return inferring(dcd.optimize_for_inference(network), layout)
    run = inferring(dcd.optimize_for_inference(narrowed(network)), layout)
    return lambda images: run(images.bfloat16()).float()


def narrowed(network: nn.Module) -> nn.Module:
    """A copy in bfloat16 whose norms stay in float32: they are folded before anything is rounded."""
    made = copy.deepcopy(network).bfloat16()
    for own, norm in zip(network.modules(), made.modules(), strict=True):
        if isinstance(own, nn.BatchNorm2d):
            norm.float().load_state_dict(own.state_dict())
    return made


def accelerated(network: nn.Module, layout: str) -> Run:
    """`dcd.accelerate` of the network as it is written: one call a dynamic layer, the rest as it is."""
    import dcd_kernels as dcd

    return inferring(dcd.accelerate(copy.deepcopy(network)), layout)


def on_one_thread(run: Run, threads: int) -> Run:
    """``run`` on one thread in a process that has ``threads``."""

    def alone(images: Tensor) -> Tensor:
        torch.set_num_threads(1)
        try:
            return run(images)
        finally:
            torch.set_num_threads(threads)

    return alone
