# SPDX-License-Identifier: BSD-3-Clause
"""What the GPU tests share: the device under test, the precisions, who runs what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from operands import Case
from torch import Tensor

import dcd_kernels as dcd
from dcd_kernels import extension

DEVICE = torch.device(os.environ.get("DCD_KERNELS_TEST_DEVICE", "cuda"))
LEAST_CAPABILITY = (8, 0)
ON_GPU = DEVICE.type == "cuda"

# Which backend has to run an operator of selection.OPS on the device under test.
_TRITON = ("pointwise", "linear", "centre", "joint", "apply")
BACKENDS = dict.fromkeys(_TRITON, "triton" if ON_GPU else "cpu")
BACKENDS["depthwise"] = "cuda" if ON_GPU else "cpu"


def unusable() -> str:
    """Why nothing can be tested on the device under test; empty where it can."""
    if not extension.LOADED:
        return extension.REASON
    if not ON_GPU:
        return ""
    if not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} finds none"
    capability = torch.cuda.get_device_capability(DEVICE)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability}, the kernels need {LEAST_CAPABILITY}"
    return ""


@dataclass(frozen=True)
class Precision:
    """A dtype; float32 with the products in tf32 or not; lam, phi and bias in float32 beside half."""

    name: str
    dtype: torch.dtype
    tf32: bool = False
    wide: bool = False

    @property
    def eps(self) -> float | None:
        """Of the products, where it is not that of the dtype: tf32 has 10 bits behind the point."""
        return 2.0**-10 if self.tf32 else None

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


IEEE = Precision("fp32", torch.float32)
TF32 = Precision("tf32", torch.float32, tf32=True)
FP16 = Precision("fp16", torch.float16)
BF16 = Precision("bf16", torch.bfloat16)
BF16_WIDE = Precision("bf16-wide", torch.bfloat16, wide=True)
# on the CPU tf32 is nobody's arithmetic
PRECISIONS = [IEEE, *([TF32] if ON_GPU else []), FP16, BF16, BF16_WIDE]
# every layout, where every precision would take too long
MAIN = [IEEE, BF16_WIDE]


def takes(case: Case) -> bool:
    """Whether the kernels of the device under test have this form: all but some depthwise geometries."""
    if case.op != "depthwise" or not ON_GPU:
        return True
    return (
        len(case.size) == 2
        and case.kernel in ((3, 3), (5, 5), (7, 7))
        and case.stride in ((1, 1), (2, 2))
        and case.dilation == (1, 1)
        and case.out_channels == case.in_channels
    )


def depthwise(batch, channels, latent, size, kernel, activation=None, *, stride=1, padding=None, **options):
    pad = kernel // 2 if padding is None else padding
    return Case("depthwise", batch, channels, channels, latent, size, activation, kernel=(kernel, kernel),
                stride=(stride, stride), padding=(pad, pad), dilation=(1, 1), **options)  # fmt: skip


# Every kernel size and stride that there are kernels for, on sizes that fill tiles and on sizes that do not.
DEPTHWISE = [
    depthwise(2, 3, 1, (1, 1), 3, "relu", bias="shared"),
    depthwise(2, 32, 4, (28, 28), 3, "relu6", bias="shared"),
    depthwise(3, 17, 4, (9, 12), 3, "silu", stride=2, bias="sample", residual=True),
    depthwise(2, 96, 4, (15, 17), 3, stride=2),
    depthwise(1, 20, 12, (14, 13), 5, "hardswish", bias="shared", residual=True),
    depthwise(2, 64, 12, (7, 7), 5, stride=2, lam=False),
    depthwise(2, 9, 24, (11, 10), 7, "relu", bias="sample"),
    depthwise(1, 40, 24, (33, 31), 7, stride=2, residual=True),
    depthwise(2, 13, 3, (5, 7), 3, padding=0, dynamic=False),
    depthwise(1, 2050, 4, (3, 3), 3),
]


@contextmanager
def ours(op: str) -> Iterator[None]:
    """Under the kernels of the device under test, by name: a call they cannot run raises."""
    with dcd.use_backend(BACKENDS[op]):
        yield


def module_backend() -> str:
    """For whole modules, in which several backends take part: 'auto' on a GPU."""
    return "auto" if ON_GPU else "cpu"


def seeded(seed: int) -> torch.Generator:
    """Tensors are drawn on the CPU, so that a seed means the same values everywhere."""
    return torch.Generator().manual_seed(seed)


def random_map(*shape: int, seed: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    tensor = torch.randn(shape, generator=seeded(seed)).to(DEVICE, dtype)
    return tensor.to(memory_format=torch.channels_last) if layout == "channels_last" else tensor
