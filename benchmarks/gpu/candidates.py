# SPDX-License-Identifier: BSD-3-Clause
"""Registry of the GPU candidates: builders of calls, each of which computes an equation of verify.py.

A builder takes the operands and returns a function of a set's index; what it does before it returns is not
timed. Training candidates return the output and the gradients by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..candidates import (
    CHANNELS_LAST,
    FORWARD,
    NCHW,
    NORMALISED,
    OURS,
    STATIC,
    TRAINING,
    naive_bmm,
    naive_bmm_channels_last,
    norm_eager,
)
from .cases import Operands, Set

# What torch.compile makes of the released formulation takes so long to compile that it has a unit of its own.
COMPILED = "compiled"
TASKS = (FORWARD, TRAINING, NORMALISED, COMPILED)

BMM, RELEASED, RELEASED_COMPILED = "materialised bmm", "released eager", "released max-autotune"
NORM_EAGER, COPY = "conv + BN + ReLU6 eager", "copy"

# the equations
STATIC_PRODUCT, DYNAMIC, RELEASED_SUM, COPIED = "static", "dynamic", "released", "copied"
STATIC_NORM, DYNAMIC_NORM = "static, BN, ReLU6", "dynamic, BN, ReLU6"

STATIC_LEAVES = ("input", "weight")
DYNAMIC_LEAVES = ("input", "weight", "p", "phi", "q", "lam")

Result = Tensor | dict[str, Tensor]
Call = Callable[[int], Result]


@dataclass(frozen=True)
class Candidate:
    """One way of writing the layer; the fastest of a group stands for it."""

    name: str
    group: str
    task: str
    layout: str
    equation: str
    build: Callable[[Operands], Call]


REGISTRY: list[Candidate] = []
# what torch.compile is told; the smoke test has no use for minutes of tuning
COMPILE_OPTIONS: dict = {"mode": "max-autotune-no-cudagraphs"}


def candidates(task: str) -> list[Candidate]:
    return [candidate for candidate in REGISTRY if candidate.task == task]


def register(group: str, task: str, layout: str, equation: str, detail: str = ""):
    """Decorator: put a builder into the registry under '<group> <detail> <layout>'."""

    def add(build: Callable[[Operands], Call]):
        name = " ".join(word for word in (group, detail, layout) if word)
        REGISTRY.append(Candidate(name, group, task, layout, equation, build))
        return build

    return add


# ---------------------------------------------------------------------------------------------- the layers


def conv(input: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(input, weight)


def matmul_nchw(input: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(weight[:, :, 0, 0], input.flatten(2)).unflatten(2, input.shape[2:])


def matmul_channels_last(input: Tensor, weight: Tensor) -> Tensor:
    return F.linear(input.permute(0, 2, 3, 1), weight[:, :, 0, 0]).permute(0, 3, 1, 2)


def released(input, weight, p, core, q, lam, scale1, scale2, zero, one) -> Tensor:
    """z1 = BN1(Qᵀx), z = BN2(Φ z1) + z1, y = P z + λ ⊙ conv(x, W0), one operator after the other.

    Both norms are in eval, with a running mean of 0 and a running variance of 1.
    """
    n, _, height, width = input.shape
    first = F.conv2d(input, q.t()[:, :, None, None])
    first = F.batch_norm(first, zero, one, scale1, zero, eps=0.0).flatten(2)
    mixed = F.batch_norm(torch.bmm(core, first), zero, one, scale2, zero, eps=0.0) + first
    dynamic = F.conv2d(mixed.view(n, -1, height, width), p[:, :, None, None])
    scaled = lam[:, :, None, None] * F.conv2d(input, weight)
    return dynamic + scaled


def ours(input, weight, p, phi, q, lam, **options) -> Tensor:
    from dcd_kernels import dcd_conv2d

    return dcd_conv2d(input, weight, p, phi, q, lam=lam, **options)


# ------------------------------------------------------------------------------------------ builders


def static(layer, layout: str):
    return lambda operands: lambda i: layer(operands.sets[i].input[layout], operands.weight)


def dynamic(layer, layout: str):
    def build(operands: Operands) -> Call:
        def call(i: int) -> Tensor:
            it = operands.sets[i]
            return layer(it.input[layout], operands.weight, operands.p, it.phi, operands.q, it.lam)

        return call

    return build


def ours_forward(layout: str, normalised: bool = False):
    """λ and Φ in float32, as the branch makes them. A BatchNorm is folded into λ, P and the bias before."""

    def build(operands: Operands) -> Call:
        p, options = operands.p, {}
        scale = torch.ones_like(operands.norm_scale)
        if normalised:
            scale = operands.norm_scale
            p = (scale.double()[:, None] * p.double()).to(p.dtype)
            options = {"bias": operands.norm_shift.float(), "activation": "relu6"}
        wide = [(it.phi.float(), scale.float() * it.lam.float()) for it in operands.sets]

        def call(i: int) -> Tensor:
            phi, lam = wide[i]
            return ours(operands.sets[i].input[layout], operands.weight, p, phi, operands.q, lam, **options)

        return call

    return build


def released_call(layout: str, compiled: bool):
    def build(operands: Operands) -> Call:
        function = released
        if compiled:
            function = torch.compile(released, dynamic=False, fullgraph=True, **COMPILE_OPTIONS)
        running = torch.zeros_like(operands.scale1), torch.ones_like(operands.scale1)

        def call(i: int) -> Tensor:
            it = operands.sets[i]
            return function(
                it.input[layout],
                operands.weight,
                operands.p,
                it.core,
                operands.q,
                it.lam,
                operands.scale1,
                operands.scale2,
                *running,
            )

        return call

    return build


def training(layer, layout: str, names: tuple[str, ...], wide: bool = False):
    """Forward, and every gradient of what the layer is made of."""

    def leaves(operands: Operands, it: Set) -> dict[str, Tensor]:
        found = {"input": it.input[layout], "phi": it.phi, "lam": it.lam}
        found |= {name: getattr(operands, name) for name in ("weight", "p", "q")}
        if wide:
            found |= {name: found[name].float() for name in ("phi", "lam")}
        return {name: found[name].detach().requires_grad_() for name in names}

    def build(operands: Operands) -> Call:
        every = [leaves(operands, it) for it in operands.sets]

        def step(i: int) -> dict[str, Tensor]:
            arguments = list(every[i].values())
            output = layer(*arguments)
            gradients = torch.autograd.grad(output, arguments, operands.sets[i].grad[layout])
            return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}

        return step

    return build


def copy_call(operands: Operands) -> Call:
    """As many bytes as the static layer's images have, half of them read and half of them written."""
    case = operands.case
    count = case.batch * case.size**2 * (case.in_channels + case.out_channels) // 2
    generator = torch.Generator(operands.weight.device).manual_seed(1)
    sources = [
        torch.randn(count, generator=generator, device=operands.weight.device).to(operands.weight.dtype)
        for _ in operands.sets
    ]

    def call(i: int) -> Tensor:
        return sources[i].clone()

    call.sources = sources
    return call


for _layout, _matmul, _bmm in (
    (NCHW, matmul_nchw, naive_bmm),
    (CHANNELS_LAST, matmul_channels_last, naive_bmm_channels_last),
):
    for _detail, _layer in (("conv2d", conv), ("matmul", _matmul)):
        register(STATIC, FORWARD, _layout, STATIC_PRODUCT, _detail)(static(_layer, _layout))
        register(STATIC, TRAINING, _layout, STATIC_PRODUCT, _detail)(training(_layer, _layout, STATIC_LEAVES))
    register(OURS, FORWARD, _layout, DYNAMIC)(ours_forward(_layout))
    register(OURS, TRAINING, _layout, DYNAMIC)(training(ours, _layout, DYNAMIC_LEAVES, wide=True))
    register(RELEASED, FORWARD, _layout, RELEASED_SUM)(released_call(_layout, compiled=False))
    register(BMM, FORWARD, _layout, DYNAMIC)(dynamic(_bmm, _layout))
    register(OURS, NORMALISED, _layout, DYNAMIC_NORM)(ours_forward(_layout, normalised=True))
    register(OURS, COMPILED, _layout, DYNAMIC)(ours_forward(_layout))
    register(RELEASED_COMPILED, COMPILED, _layout, RELEASED_SUM)(released_call(_layout, compiled=True))

    @register(NORM_EAGER, NORMALISED, _layout, STATIC_NORM)
    def _build(operands: Operands, layout=_layout) -> Call:
        affine = operands.norm_scale, operands.norm_shift
        running = torch.zeros_like(affine[0]), torch.ones_like(affine[0])
        return lambda i: norm_eager(operands.sets[i].input[layout], operands.weight, *affine, *running)


register(COPY, FORWARD, "", COPIED)(copy_call)
