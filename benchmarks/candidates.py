# SPDX-License-Identifier: BSD-3-Clause
"""Registry of candidates: every way of writing the layer that is measured, each as a builder of a call.

A builder takes the operands of a case and returns a function without arguments; what it does before it
returns (packing the weights of a static convolution, choosing a view) is not timed. Static candidates compute
W0 x; all the others compute (Λ W0 + P Φ Qᵀ) x with λ and Φ given. Forward candidates return y (N, Co, H, W);
training candidates return y and its gradients by name; normalised ones relu6(s ⊙ y + b), with a BatchNorm in
eval mode and a ReLU6 behind the layer, whose static peer runs the three in eager.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .cases import Case, Operands

FORWARD, TRAINING, NORMALISED = "forward", "training", "normalised"
STATIC, GROUPED, BMM, FACTORED, OURS = "static", "naive grouped", "naive bmm", "factored eager", "ours"
NCHW, CHANNELS_LAST = "nchw", "channels_last"

STATIC_LEAVES = ("input", "weight")
DYNAMIC_LEAVES = ("input", "weight", "p", "phi", "q", "lam")

Result = torch.Tensor | dict[str, torch.Tensor]
Layer = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way of writing the layer. `group` is what figures compare, the fastest of a group stands for it."""

    name: str
    group: str
    task: str
    layout: str
    build: Callable[[Operands], Callable[[], Result]]
    applies: Callable[[Case], bool] = lambda case: True

    @property
    def dynamic(self) -> bool:
        return self.group != STATIC


REGISTRY: list[Candidate] = []


def candidates(task: str, case: Case, groups: tuple[str, ...] = ()) -> list[Candidate]:
    """The registered candidates of a task that apply to `case`; `groups` empty means all of them."""
    return [c for c in REGISTRY if c.task == task and c.applies(case) and (not groups or c.group in groups)]


def register(group: str, task: str, layout: str, detail: str = "", applies=lambda case: True):
    """Decorator: put a builder into the registry under '<group> <detail> <layout>'."""

    def add(build: Callable[[Operands], Callable[[], Result]]):
        name = " ".join(word for word in (group, detail, layout) if word)
        REGISTRY.append(Candidate(name, group, task, layout, build, applies))
        return build

    return add


# ---------------------------------------------------------------------------------------------- the layers
# Functions of tensors, shared by the forward and the training candidates.


def static_conv(input, weight):
    return F.conv2d(input, weight)


def sample_weights(weight, p, phi, q, lam):
    """W_n = λ_n ⊙ W0 + P Φ_n Qᵀ as an (N, Co, Ci) tensor."""
    return torch.addcmul((p @ phi) @ q.t(), lam[:, :, None], weight[None, :, :, 0, 0])


def naive_grouped(input, weight, p, phi, q, lam):
    n, ci, height, width = input.shape
    weights = sample_weights(weight, p, phi, q, lam).reshape(-1, ci, 1, 1)
    return F.conv2d(input.reshape(1, n * ci, height, width), weights, groups=n).view(n, -1, height, width)


def naive_bmm(input, weight, p, phi, q, lam):
    weights = sample_weights(weight, p, phi, q, lam)
    return torch.bmm(weights, input.flatten(2)).unflatten(2, input.shape[2:])


def naive_bmm_channels_last(input, weight, p, phi, q, lam):
    weights = sample_weights(weight, p, phi, q, lam)
    pixels = input.permute(0, 2, 3, 1)
    y = torch.bmm(pixels.flatten(1, 2), weights.transpose(1, 2))
    return y.unflatten(1, pixels.shape[1:3]).permute(0, 3, 1, 2)


def factored_conv(input, weight, p, phi, q, lam):
    """λ ⊙ conv(x, W0) + conv(Φ conv(x, Qᵀ), P), everything 1×1."""
    latent = F.conv2d(input, q.t()[:, :, None, None])
    latent = torch.bmm(phi, latent.flatten(2)).view(latent.shape)
    return torch.addcmul(
        F.conv2d(latent, p[:, :, None, None]), lam[:, :, None, None], F.conv2d(input, weight)
    )


def factored_conv_channels_last(input, weight, p, phi, q, lam):
    latent = F.conv2d(input, q.t()[:, :, None, None]).permute(0, 2, 3, 1)
    mixed = torch.bmm(latent.flatten(1, 2), phi.transpose(1, 2)).view(latent.shape).permute(0, 3, 1, 2)
    return torch.addcmul(F.conv2d(mixed, p[:, :, None, None]), lam[:, :, None, None], F.conv2d(input, weight))


def factored_matmul(input, weight, p, phi, q, lam):
    """The same by matrix products, with P Φ formed once a sample and added by the product itself."""
    pixels = input.flatten(2)
    scaled = lam[:, :, None] * torch.matmul(weight[:, :, 0, 0], pixels)
    y = torch.baddbmm(scaled, torch.matmul(p, phi), torch.matmul(q.t(), pixels))
    return y.unflatten(2, input.shape[2:])


def factored_matmul_channels_last(input, weight, p, phi, q, lam):
    n, _, height, width = input.shape
    pixels = input.permute(0, 2, 3, 1).flatten(1, 2)
    scaled = lam[:, None, :] * torch.matmul(pixels, weight[:, :, 0, 0].t())
    y = torch.baddbmm(scaled, torch.matmul(pixels, q), torch.matmul(p, phi).transpose(1, 2))
    return y.view(n, height, width, -1).permute(0, 3, 1, 2)


def norm_eager(input, weight, scale, shift, zero, one):
    """relu6(s ⊙ (W0 x) + b) in three operations."""
    y = F.batch_norm(F.conv2d(input, weight), zero, one, scale, shift, eps=0.0)
    return F.relu6(y, inplace=True)


def ours() -> Layer:
    """Our operator with plain weights: packing them is part of the call. Loaded only when it is measured."""
    from dcd_kernels import dcd_conv2d

    return lambda input, weight, p, phi, q, lam, **options: dcd_conv2d(
        input, weight, p, phi, q, lam=lam, **options
    )


def ours_packed(layout: str):
    """Our operator with weights packed beforehand, as its layers keep them in inference."""

    def build(operands: Operands) -> Callable[[], torch.Tensor]:
        from dcd_kernels import dcd_conv2d, pack_weight

        packed = pack_weight(operands.weight, operands.p, operands.q)
        x, phi, lam = operands.input_as(layout), operands.phi, operands.lam
        return lambda: dcd_conv2d(x, packed, phi=phi, lam=lam)

    return build


# ------------------------------------------------------------------------------------------ builders


def forward(layer: Layer, layout: str, names: tuple[str, ...]):
    def build(operands: Operands) -> Callable[[], torch.Tensor]:
        arguments = [leaf.detach() for leaf in operands.leaves(layout, names).values()]
        call = layer() if layer is ours else layer
        return lambda: call(*arguments)

    return build


def training(layer: Layer, layout: str, names: tuple[str, ...]):
    def build(operands: Operands) -> Callable[[], dict[str, torch.Tensor]]:
        leaves = operands.leaves(layout, names)
        arguments = list(leaves.values())
        grad = operands.grad_as(layout)
        call = layer() if layer is ours else layer

        def step() -> dict[str, torch.Tensor]:
            y = call(*arguments)
            gradients = torch.autograd.grad(y, arguments, grad)
            return {"output": y.detach(), **dict(zip(names, gradients, strict=True))}

        return step

    return build


def normalised_eager(layout: str):
    def build(operands: Operands) -> Callable[[], torch.Tensor]:
        x, scale = operands.input_as(layout), operands.norm_scale
        running = torch.zeros_like(scale), torch.ones_like(scale)
        return lambda: norm_eager(x, operands.weight, scale, operands.norm_shift, *running)

    return build


def normalised_ours(layout: str):
    """The norm folded into λ, P and the bias beforehand, the activation fused."""

    def build(operands: Operands) -> Callable[[], torch.Tensor]:
        call, x, scale = ours(), operands.input_as(layout), operands.norm_scale
        p, lam = scale[:, None] * operands.p, scale * operands.lam
        arguments = x, operands.weight, p, operands.phi, operands.q, lam
        return lambda: call(*arguments, bias=operands.norm_shift, activation="relu6")

    return build


def prepacked(layout: str):
    """oneDNN's convolution with its weights reordered beforehand, as a frozen graph would have them."""

    def build(operands: Operands) -> Callable[[], torch.Tensor]:
        x = operands.input_as(layout)
        zero, one = [0, 0], [1, 1]
        weight = torch.ops.mkldnn._reorder_convolution_weight(
            operands.weight, zero, one, one, 1, list(x.shape)
        )
        convolve = torch.ops.mkldnn._convolution_pointwise
        return lambda: convolve(x, weight, None, zero, one, one, 1, "none", [], "")

    return build


def _one_sample(case: Case) -> bool:
    return case.batch == 1


for _layout in (NCHW, CHANNELS_LAST):
    register(STATIC, FORWARD, _layout, "conv2d")(forward(static_conv, _layout, STATIC_LEAVES))
    register(STATIC, FORWARD, _layout, "prepacked")(prepacked(_layout))
    register(STATIC, TRAINING, _layout, "conv2d")(training(static_conv, _layout, STATIC_LEAVES))
    register(STATIC, NORMALISED, _layout, "conv2d, BN, ReLU6")(normalised_eager(_layout))
    register(OURS, NORMALISED, _layout)(normalised_ours(_layout))
    register(OURS, FORWARD, _layout, "packed")(ours_packed(_layout))

register(GROUPED, FORWARD, NCHW)(forward(naive_grouped, NCHW, DYNAMIC_LEAVES))
# beyond one sample the grouped convolution has to copy a channels-last input into NCHW
register(GROUPED, FORWARD, CHANNELS_LAST, applies=_one_sample)(
    forward(naive_grouped, CHANNELS_LAST, DYNAMIC_LEAVES)
)

for _group, _detail, _layout, _layer in (
    (BMM, "", NCHW, naive_bmm),
    (BMM, "", CHANNELS_LAST, naive_bmm_channels_last),
    (FACTORED, "conv", NCHW, factored_conv),
    (FACTORED, "conv", CHANNELS_LAST, factored_conv_channels_last),
    (FACTORED, "matmul", NCHW, factored_matmul),
    (FACTORED, "matmul", CHANNELS_LAST, factored_matmul_channels_last),
    (OURS, "", NCHW, ours),
    (OURS, "", CHANNELS_LAST, ours),
):
    register(_group, FORWARD, _layout, _detail)(forward(_layer, _layout, DYNAMIC_LEAVES))
    if _group in (FACTORED, OURS):
        register(_group, TRAINING, _layout, _detail)(training(_layer, _layout, DYNAMIC_LEAVES))
