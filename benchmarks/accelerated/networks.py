# SPDX-License-Identifier: BSD-3-Clause
"""The networks that are measured, and the calls: a training step, or inference.

Weights are random, and the static twin's are its own: what is timed does not depend on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcd_kernels as dcd
from dcd_kernels.models import released

from ..candidates import CHANNELS_LAST, NCHW, STATIC, TRAINING
from ..cases import make_images

EVAL = "eval"
UNPATCHED, ACCELERATED = "unpatched", "accelerated"
PAPER = "ours"  # not the released form but the paper's, on the fused kernels
WIDTH = "mobilenet_v2_x"  # and a width
TITLES = {
    f"{WIDTH}0.5": "MobileNetV2 ×0.5",
    f"{WIDTH}1.0": "MobileNetV2 ×1.0",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
}
NETWORKS = tuple(TITLES)
SETTLING_BATCH = 8


@dataclass(frozen=True)
class NetworkCase:
    """A network at one task, batch and image size."""

    network: str
    task: str
    batch: int
    size: int = 224
    classes: int = 1000

    @property
    def name(self) -> str:
        return f"{self.network} {self.task}, batch {self.batch} at {self.size}²"


@dataclass(frozen=True)
class Candidate:
    """One way of running a network; the fastest layout of a group stands for it."""

    group: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.group} {self.layout}"


# what others are compared with comes first
CANDIDATES = tuple(
    Candidate(group, layout) for group in (STATIC, UNPATCHED, ACCELERATED) for layout in (NCHW, CHANNELS_LAST)
)


def factory(network: str, family=released) -> Callable[..., nn.Module]:
    """What makes the network called ``network``; ``family`` is a module that has its function.

    Raises:
        ValueError: there is no such network.
    """
    width = network.removeprefix(WIDTH)
    if width != network:
        try:
            width_mult = float(width)
        except ValueError:
            raise ValueError(f"network={network!r}: {WIDTH} must be followed by a width") from None
        return lambda **options: family.mobilenet_v2(width_mult, **options)
    if network not in NETWORKS:
        raise ValueError(f"network={network!r}: known are {', '.join(NETWORKS)}, and {WIDTH} with any width")
    return getattr(family, network)


def make_network(network: str, group: str, classes: int, seed: int = 0) -> nn.Module:
    """A network with random weights, without dropout: two calls have to give the same numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if group == PAPER:
            return factory(network, dcd.models)(num_classes=classes, dropout=0.0)
        made = factory(network)(num_classes=classes, dropout=0.0, dynamic=group != STATIC)
    return dcd.accelerate(made) if group == ACCELERATED else made


def make_networks(network: str, size: int, classes: int, seed: int = 0) -> dict[str, nn.Module]:
    """The three candidates; what is accelerated is a copy of what is not."""
    made = {group: make_network(network, group, classes, seed) for group in (STATIC, UNPATCHED)}
    images = make_images(SETTLING_BATCH, size, NCHW, seed=seed + 1)
    for peer in made.values():
        settle(peer, images)
    return {**made, ACCELERATED: dcd.accelerate(copy.deepcopy(made[UNPATCHED]))}


@torch.no_grad()
def settle(network: nn.Module, images: Tensor) -> None:
    """Gives the norms the statistics of ``images``.

    With those of a fresh network, 0 and 1, activations would shrink or grow from layer to layer in eval mode.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def in_layout(network: nn.Module, layout: str) -> nn.Module:
    """A copy of ``network`` in a memory format; copies of an accelerated network are accelerated."""
    made = copy.deepcopy(network)
    return made.to(memory_format=torch.channels_last) if layout == CHANNELS_LAST else made


def labels_for(case: NetworkCase) -> Tensor:
    return torch.arange(case.batch) % case.classes


def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images), labels)


def call_of(case: NetworkCase, network: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """What is timed: gradients dropped, forward, cross entropy and backward; or forward without gradients."""
    network.train(case.task == TRAINING)
    if case.task == EVAL:

        def infer() -> Tensor:
            with torch.inference_mode():
                return network(images)

        return infer

    parameters, labels = list(network.parameters()), labels_for(case)

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = loss_of(network, images, labels)
        loss.backward()
        return loss.detach()

    return step
