# SPDX-License-Identifier: BSD-3-Clause
"""The bodies of the CUDA depthwise kernels, compiled for the CPU and called as the op calls them.

Every byte that they read has to belong to a tensor, every element of a result is written exactly once, and
the order in which the threads of a phase run must not matter.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from operands import Case
from torch import Tensor

from dcd_kernels.arguments import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
COMPILER = shutil.which("g++") or shutil.which("c++")
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Given(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("padding", ctypes.c_int64 * 2),
        ("latent", ctypes.c_int64),
        ("bias_sample", ctypes.c_int64),
        ("activation", ctypes.c_int64),
    )


class _Parameter(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int))


class _Image(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("sizes", ctypes.c_int64 * 4),
    )


def unavailable() -> str:
    """Why they cannot be compiled here; empty where they can."""
    if COMPILER is None:
        return "no C++ compiler"
    return "" if (SOURCES / "cuda").is_dir() else "not a checkout: csrc/cuda is not there"


def build(folder: Path) -> ctypes.CDLL:
    library = folder / "depthwise_host.so"
    source = Path(__file__).with_name("depthwise_host.cpp")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{SOURCES}"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
    host = ctypes.CDLL(str(library))
    for name in ("host_convolve", "host_input_gradient", "host_sums"):
        getattr(host, name).restype = ctypes.c_char_p
    host.host_tensor.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    host.host_wide_reads.restype = ctypes.c_int64
    host.host_rounded.restype = ctypes.c_float
    host.host_rounded.argtypes = [ctypes.c_float, ctypes.c_int]
    return host


class Run:
    """One call of a kernel: what is handed over, and what is checked afterwards."""

    def __init__(self, host: ctypes.CDLL, case: Case, backwards: bool) -> None:
        self.host, self.case = host, case
        self.kept: list[tuple[Tensor, Tensor]] = []  # results and their marks
        self.alive: list[Tensor] = []
        host.host_reset(int(backwards))

    def register(self, tensor: Tensor, writable: bool) -> int:
        """Which bytes of the tensor's memory are its own; the address of its first element."""
        storage = tensor.untyped_storage()
        width = tensor.element_size()
        marks = torch.zeros(storage.nbytes() // width, width, dtype=torch.uint8)
        mine = marks.as_strided((*tensor.shape, width), (*(s * width for s in tensor.stride()), 1),
                                tensor.storage_offset() * width)  # fmt: skip
        mine.fill_(1)
        self.host.host_tensor(storage.data_ptr(), storage.nbytes(), marks.data_ptr(), int(writable))
        self.alive += [tensor, marks]
        if writable:
            self.kept.append((tensor, mine))
        return tensor.data_ptr()

    def image(self, tensor: Tensor | None, writable: bool = False) -> _Image:
        if tensor is None:
            return _Image()
        place = self.register(tensor, writable)
        return _Image(place, tuple(tensor.stride()), tuple(tensor.shape))

    def parameter(self, tensor: Tensor | None, writable: bool = False) -> _Parameter:
        if tensor is None:
            return _Parameter(None, 0)
        return _Parameter(self.register(tensor.contiguous(), writable), TYPES[tensor.dtype])

    def given(self, bias: Tensor | None = None) -> _Given:
        case = self.case
        per_sample = case.out_channels if bias is not None and bias.dim() == 2 else 0
        latent = case.latent if case.dynamic else 0
        code = ACTIVATIONS[case.activation]
        return _Given(case.batch, case.out_channels, tuple(case.padding), latent, per_sample, code)

    def call(
        self, name: str, parameters, images, *gradients, like: Tensor, last: bool, bias=None
    ) -> list[int]:
        plan = (ctypes.c_int64 * 8)()
        arrays = [(type(group[0]) * len(group))(*group) for group in (parameters, images, *gradients)]
        message = getattr(self.host, name)(
            ctypes.byref(self.given(bias)),
            *arrays,
            TYPES[like.dtype],
            int(last),
            self.case.kernel[0],
            self.case.stride[0],
            plan,
        )
        assert message is None, f"{self.case}: {message.decode()}"
        for tensor, marks in self.kept:
            assert (marks == 2).all(), (
                f"{self.case}: elements of a result of {tuple(tensor.shape)} not written once"
            )
        return list(plan)


def is_last(input: Tensor) -> bool:
    """The op's rule of layouts."""
    return not input.is_contiguous() and input.stride(1) == 1 and input.shape[1] > 1


def empty_like(tensor: Tensor, size, last: bool) -> Tensor:
    shape = (*tensor.shape[:2], *size)
    filled = torch.full(shape, float("nan"), dtype=tensor.dtype)
    return filled.movedim(1, -1).contiguous().movedim(-1, 1) if last else filled


def convolve(host: ctypes.CDLL, case: Case, tensors, *, backwards: bool = False) -> tuple[Tensor, list[int]]:
    """dcd_kernels::depthwise; beside its result [vector, rows, columns, channels, tiles, pairs, bytes]."""
    input, weight, p, phi, r, lam, bias, residual = tensors
    run = Run(host, case, backwards)
    last = is_last(input)
    output = empty_like(input, case.out_size, last)
    parameters = [run.parameter(t) for t in (weight, p, phi, r, lam, bias)]
    images = [run.image(input), run.image(output, True), run.image(residual)]
    plan = run.call("host_convolve", parameters, images, like=input, last=last, bias=bias)
    return output, plan


def backward(
    host: ctypes.CDLL, case: Case, tensors, grad: Tensor, *, backwards: bool = False
) -> list[Tensor | None]:
    """dcd_kernels::depthwise_backward with everything asked for."""
    input, weight, p, phi, r, lam = tensors[:6]
    last = is_last(input)
    run = Run(host, case, backwards)
    d_input = empty_like(input, case.size, last)
    parameters = [run.parameter(t) for t in (weight, p, phi, r, lam)]
    images = [run.image(grad), run.image(d_input, True)]
    run.call("host_input_gradient", parameters, images, like=input, last=last)
    run = Run(host, case, backwards)
    gradients = [
        None if t is None else torch.full(t.shape, float("nan"), dtype=t.dtype) for t in tensors[1:6]
    ]
    parameters = [run.parameter(t) for t in (weight, p, phi, r, lam)]
    images = [run.image(input), run.image(grad)]
    run.call(
        "host_sums", parameters, images, [run.parameter(t, True) for t in gradients], like=input, last=last
    )
    return [d_input, *gradients]
