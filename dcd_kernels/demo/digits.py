# SPDX-License-Identifier: BSD-3-Clause
"""A small dynamic network and its static twin, trained on scikit-learn's handwritten digits."""

from __future__ import annotations

import copy
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from dcd_kernels.demo.measure import threads
from dcd_kernels.nn import DCDConv2d
from dcd_kernels.nn.convert import convert

SIZE = 16  # the digits are 8×8; twice that leaves a depthwise 3×3 something to look at
HELD_OUT = 0.3
BATCH = 64


@dataclass
class Digits:
    """Images ``(n, 1, SIZE, SIZE)`` with values from 0 to 1, and their labels ``(n,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Score:
    """``right`` of ``n`` held-out images named rightly, after ``seconds`` of training."""

    name: str
    right: int
    n: int
    parameters: int
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.right / self.n


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), which stays inside [0, 1] at 100 % right."""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def load(seed: int) -> Digits:
    """The 1,797 digits, upsampled, split at random with every class in proportion."""
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32).div(16).unsqueeze(1)
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    labels = torch.as_tensor(bunch.target)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(),
        test_size=HELD_OUT,
        stratify=bunch.target,
        random_state=seed,
    )
    return Digits(images[train], labels[train], images[test], labels[test])


class Bottleneck(nn.Module):
    """MobileNetV2's inverted residual: pointwise expansion, depthwise 3×3, pointwise projection."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        hidden = 3 * in_channels
        self.skip = stride == 1 and in_channels == out_channels
        self.expand = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand_norm(self.expand(x)))
        y = F.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.skip else y


def static_network() -> nn.Module:
    """Four bottlenecks between a 3×3 stem and a linear classifier."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
            bottleneck1=Bottleneck(16, 24, stride=2),
            bottleneck2=Bottleneck(24, 24, stride=1),
            bottleneck3=Bottleneck(24, 40, stride=2),
            bottleneck4=Bottleneck(40, 40, stride=1),
            pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            classifier=nn.Linear(40, 10),
        )
    )


def is_pointwise(name: str, module: nn.Module) -> bool:
    """Whether ``convert`` makes ``module`` dynamic: the 1×1 convolutions, as in the paper's MobileNetV2."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def twins(seed: int) -> tuple[nn.Module, nn.Module]:
    """A dynamic network and a static one that compute the same function before the first step.

    The dynamic one is the static one converted (λ = 1, Φ = 0), so that both start from the same weights, not
    merely from the same seed.
    """
    torch.manual_seed(seed)
    static = static_network()
    return convert(copy.deepcopy(static), where=is_pointwise, reduction=8), static


@torch.no_grad()
def count_right(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """How many of ``images`` the network names rightly, in eval mode."""
    network.eval()
    return sum(
        int((network(x).argmax(1) == y).sum())
        for x, y in zip(images.split(256), labels.split(256), strict=True)
    )


def train(
    network: nn.Module, digits: Digits, epochs: int, seed: int, on_step: Callable[[float], object]
) -> float:
    """Train with Adam, one cycle; the same ``seed`` gives the same batches. Returns the seconds it took."""
    order = torch.Generator().manual_seed(seed)
    steps = len(digits.train_labels) // BATCH
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=epochs * steps)
    network.train()
    start = time.perf_counter()
    for _ in range(epochs):
        shuffled = torch.randperm(len(digits.train_labels), generator=order)
        for batch in shuffled[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(network(digits.train_images[batch]), digits.train_labels[batch])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            on_step(loss.item())
    return time.perf_counter() - start


def train_twins(digits: Digits, epochs: int, seed: int, console: Console) -> tuple[nn.Module, list[Score]]:
    """Train both networks behind a progress bar each; returns the dynamic one and the two scores."""
    dynamic, static = twins(seed)
    total = epochs * (len(digits.train_labels) // BATCH)
    scores = []
    columns = (
        TextColumn("  {task.description:<14}"),
        BarColumn(bar_width=40),
        TextColumn("{task.completed:>4}/{task.total} steps  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, network in (("DCD network", dynamic), ("static twin", static)):
            task = progress.add_task(name, total=total, loss=float("nan"))
            # layers this small gain nothing from a second thread, and lose much where its core is busy
            with threads(1):
                seconds = train(
                    network,
                    digits,
                    epochs,
                    seed,
                    lambda loss, task=task: progress.update(task, advance=1, loss=loss),
                )
            right = count_right(network, digits.test_images, digits.test_labels)
            parameters = sum(p.numel() for p in network.parameters())
            scores.append(Score(name, right, len(digits.test_labels), parameters, seconds))
    return dynamic, scores


def score_table(scores: list[Score]) -> Table:
    """Accuracy with its interval, size and training time, one row a network."""
    table = Table(title="Handwritten digits, held-out images", title_justify="left")
    table.add_column("network")
    for heading in (
        "right",
        "of",
        "accuracy",
        "95 % interval",
        "parameters",
        "training",
    ):
        table.add_column(heading, justify="right")
    for score in scores:
        low, high = wilson(score.right, score.n)
        table.add_row(
            score.name,
            f"{score.right}",
            f"{score.n}",
            f"{score.accuracy:.1%}",
            f"{low:.1%} – {high:.1%}",
            f"{score.parameters:,}",
            f"{score.seconds:.1f} s",
        )
    return table


def one_of_each(labels: Tensor, count: int) -> Tensor:
    """Indices of the first image of each of the classes 0 … ``count − 1``."""
    return torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(count)])


@torch.no_grad()
def coefficients(network: nn.Module, images: Tensor) -> tuple[str, Tensor, Tensor]:
    """λ ``(n, Co)`` and Φ ``(n, L, L)`` of the last dynamic layer for ``images``, with the layer's name."""
    name, layer = [(n, m) for n, m in network.named_modules() if isinstance(m, DCDConv2d)][-1]
    seen = []
    handle = layer.branch.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        network.eval()(images)
    finally:
        handle.remove()
    lam, phi = seen[0]
    return name, lam, phi
