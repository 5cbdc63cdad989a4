# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of the compiled ops on images share: cases, operands, the same call in plain PyTorch."""

from __future__ import annotations

import math
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import oracle
import torch
from cases import SEED, as_array, in_layout
from torch import Tensor

from dcd_kernels import ops, pack_weight, reference
from dcd_kernels.arguments import ACTIVATIONS

FACTORS = {
    "pointwise": ("input", "weight", "p", "phi", "q", "lam"),
    "apply": ("static", "input", "p", "phi", "q", "lam"),
    "depthwise": ("input", "weight", "p", "phi", "r", "lam"),
}
ISAS = [isa for isa in ("baseline", "avx2", "avx512") if torch.ops.dcd_kernels.has_cpu_isa(isa)]
LAYOUTS = ("contiguous", "channels_last", "sliced")
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call of an op, but for dtype and layout."""

    op: str
    batch: int
    in_channels: int
    out_channels: int
    latent: int
    size: tuple[int, ...]
    activation: str | None = None
    lam: bool = True
    dynamic: bool = True
    bias: str | None = None  # 'shared' (Co,) or 'sample' (N, Co)
    residual: bool = False
    blocks: int = 1
    given_latent: bool = False  # apply with q=None
    packed: bool = False  # pointwise with weight, p and q packed
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    def __str__(self) -> str:
        flags = [
            self.activation,
            None if self.lam else "nolam",
            None if self.dynamic else "static",
            self.bias and f"bias-{self.bias}",
            "residual" if self.residual else None,
            f"blocks{self.blocks}" if self.blocks > 1 else None,
            "latent" if self.given_latent else None,
            "packed" if self.packed else None,
            "k" + "".join(map(str, self.kernel + self.stride + self.padding + self.dilation))
            if self.kernel
            else None,
        ]
        size = "x".join(map(str, self.size))
        channels = f"{self.batch}x{self.in_channels}to{self.out_channels}@{size}L{self.latent}"
        return "-".join([channels, *(flag for flag in flags if flag)])

    @property
    def out_size(self) -> tuple[int, ...]:
        if self.op != "depthwise":
            return self.size
        return tuple(
            (size + 2 * pad - spread * (k - 1) - 1) // step + 1
            for size, k, step, pad, spread in zip(
                self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @property
    def geometry(self) -> tuple:
        return (self.stride, self.padding, self.dilation) if self.op == "depthwise" else ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*FACTORS[self.op], "bias", "residual")

    @property
    def positive(self) -> bool:
        """Whether results are so small that one cancellation could decide the norm of an error."""
        return self.batch * min(self.latent**2, self.out_channels) < 8

    def scale(self, name: str) -> float:
        """Keeps the sums near one, where the activations bend; biases reach past relu6's six."""
        taps = math.prod(self.kernel)
        fan_in = {
            "weight": taps if self.op == "depthwise" else self.in_channels,
            "p": self.latent,
            "phi": self.in_channels if self.given_latent else self.latent,
            "q": self.in_channels / self.blocks,
            "r": taps,
        }
        return 3.0 if name == "bias" else fan_in.get(name, 1) ** -0.5

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        n, ci, co, rank = self.batch, self.in_channels, self.out_channels, self.latent
        taps = math.prod(self.kernel)
        blocked = (n, rank, rank) if self.blocks == 1 else (n, self.blocks, rank, rank)
        shapes = {
            "input": (n, ci if self.dynamic or self.op != "apply" else co, *self.size),
            "static": (n, co, *self.size),
            "weight": (co, 1, *self.kernel) if self.op == "depthwise" else (co, ci),
            "p": (co, rank) if self.dynamic else None,
            "phi": ((n, rank, ci) if self.given_latent else blocked) if self.dynamic else None,
            "q": (ci, rank) if self.dynamic and not self.given_latent else None,
            "r": (taps, rank) if self.dynamic else None,
            "lam": (n, co) if self.lam else None,
            "bias": {None: None, "shared": (co,), "sample": (n, co)}[self.bias],
            "residual": (n, co, *self.out_size) if self.residual else None,
        }
        return {name: shapes[name] for name in self.names}


def label(case: Case) -> str:
    """The id of a case among those of several ops."""
    return f"{case.op}-{case}"


def operands(
    case: Case,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    *,
    wide: bool = False,
    requires_grad: bool = False,
    device: torch.device | str = "cpu",
) -> list[Tensor | None]:
    """The tensors of a case in the op's order; `wide`: lam, phi, bias in float32 beside half precision."""
    generator = torch.Generator().manual_seed((SEED + zlib.crc32(str(case).encode())) % 2**31)
    tensors: list[Tensor | None] = []
    for name, shape in case.shapes().items():
        if shape is None:
            tensors.append(None)
            continue
        own = torch.float32 if wide and name in ("lam", "phi", "bias") else dtype
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensor = ((tensor.abs() if case.positive else tensor) * case.scale(name)).to(device, own)
        tensor = in_layout(tensor, layout, image=name in ("input", "static", "residual"))
        tensors.append(tensor.requires_grad_(requires_grad))
    if case.op == "apply" and not case.dynamic:
        tensors[1] = tensors[0]
    return tensors


def call(case: Case, tensors, activation: str | None = "of the case") -> Tensor:
    """The op on the tensors of `operands`; what it takes packed is packed here."""
    code = ACTIVATIONS[case.activation if activation == "of the case" else activation]
    if case.packed:
        input, weight, p, phi, q, *others = tensors
        return ops.pointwise_packed(input, pack_weight(weight, p, q), phi, *others, code)
    return getattr(ops, case.op)(*tensors, *case.geometry, code)


def plain(case: Case, tensors) -> Tensor:
    """The same in plain PyTorch, at the precision of the tensors."""
    named = dict(zip(case.names, tensors, strict=True))
    lam, bias, residual = named["lam"], named["bias"], named["residual"]
    finish = {"lam": lam, "bias": bias, "residual": residual, "activation": case.activation}
    p, phi = named["p"], named["phi"]
    if case.op == "apply":
        return reference.dcd_apply(named["static"], named["input"], p, phi, named["q"], **finish)
    convolution = getattr(reference, f"dcd_conv{len(case.size)}d")
    if case.op == "depthwise":
        stride, padding, dilation = case.geometry
        return convolution(
            named["input"],
            named["weight"],
            p,
            phi,
            r=named["r"],
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=case.in_channels,
            **finish,
        )
    weight = named["weight"].reshape(*named["weight"].shape, *[1] * len(case.size))
    return convolution(named["input"], weight, p, phi, named["q"], **finish)


def truth(case: Case, tensors) -> Tensor:
    """The oracle's answer to the exact values of these tensors, in float64."""
    return _truth(case, tuple(None if t is None else as_array(t).tobytes() for t in tensors))


@lru_cache(maxsize=64)
def _truth(case: Case, values: tuple[bytes | None, ...]) -> Tensor:
    named = {
        name: None if value is None else np.frombuffer(value).reshape(shape)
        for (name, shape), value in zip(case.shapes().items(), values, strict=True)
    }
    options = {name: named[name] for name in ("lam", "bias", "residual")} | {"activation": case.activation}
    if case.op == "apply":
        static, input, p, phi, q = (named[name] for name in FACTORS["apply"][:5])
        result = oracle.apply(static, input, p, phi, q, **options)
    elif case.op == "depthwise":
        input, weight, p, phi, r = (named[name] for name in FACTORS["depthwise"][:5])
        options |= dict(zip(("stride", "padding", "dilation"), case.geometry, strict=True))
        result = oracle.conv(input, weight, p, phi, r=r, groups=case.in_channels, **options)
    else:
        input, weight, p, phi, q = (named[name] for name in FACTORS["pointwise"][:5])
        weight = weight.reshape(*weight.shape, *[1] * len(case.size))
        result = oracle.conv(input, weight, p, phi, q, **options)
    return torch.from_numpy(np.ascontiguousarray(result))


def in_float64(tensors) -> list[Tensor | None]:
    """Leaves of the same values, whose results are the truth."""
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def gradients(output: Tensor, tensors, grad: Tensor) -> list[Tensor | None]:
    """d <output, grad> / d tensor for each of `tensors` that requires one, None for the others."""
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad.to(output.dtype), allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]


def is_channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.stride(1) == 1 and tensor.shape[1] > 1


@contextmanager
def instruction_set(isa: str | None):
    """The CPU kernels at one instruction set; None leaves them alone, on devices that have none."""
    if isa is None:
        yield
        return
    before = torch.ops.dcd_kernels.cpu_isa()
    torch.ops.dcd_kernels.set_cpu_isa(isa)
    try:
        yield
    finally:
        torch.ops.dcd_kernels.set_cpu_isa(before)


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
