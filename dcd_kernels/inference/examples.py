# SPDX-License-Identifier: BSD-3-Clause
"""What a network makes of inputs that nobody gave it: tried on copies, so that it keeps no trace of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SEED = 20
_CLOSE = 1e-4  # roundings of tens of layers add up to less, those of one layer in bfloat16 to more


@dataclass(frozen=True)
class Example:
    """An input, and the output of the network as it is written."""

    input: Tensor
    output: object


def twin_of(network: nn.Module) -> nn.Module:
    """A copy with the parameters of ``network`` and buffers and attributes of its own."""
    parameters = {id(tensor): tensor for tensor in network.parameters()}
    return copy.deepcopy(network, parameters)


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Random numbers are the same in each such block, and go on behind it as if there had been none."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


def examples_like(network: nn.Module, input: Tensor) -> list[Example]:
    """Two inputs like ``input``, of different batch and image sizes; none where ``network`` takes no two.

    So that what is so for one batch or one size by chance, an image of one pixel or a parameter with as many
    rows as there are samples, is not taken for a rule. The image sizes are equal where it takes one alone.
    """
    batch, channels, *size = input.shape
    larger = [2 * length if length <= 64 else length + 64 for length in size]
    for first, second in ((2, 3), (batch, 2 * batch)):
        one = _example(network, input, (first, channels, *size))
        if one is None:
            continue
        for sizes in (larger, size):
            other = _example(network, input, (second, channels, *sizes))
            if other is not None:
                return [one, other]
    return []


def _example(network: nn.Module, like: Tensor, shape: tuple[int, ...]) -> Example | None:
    generator = torch.Generator().manual_seed(_SEED)
    input = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(like.dtype)
    try:
        with repeatable():
            return Example(input, twin_of(network)(input.clone()))
    except Exception:  # whatever it raises: it is for other inputs
        return None


def alike(left: object, right: object) -> bool:
    """Whether two outputs are the same but for rounding."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and _close(left, right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(alike(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(alike, left, right))
    if type(left) is type(right) and hasattr(left, "__dict__"):
        return alike(vars(left), vars(right))
    return left == right


def _close(left: Tensor, right: Tensor) -> bool:
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    if not (left.is_floating_point() or left.is_complex()):
        return torch.equal(left, right)
    eps = torch.finfo(left.dtype).eps
    left, right = (torch.nan_to_num(tensor.detach(), nan=1.0).double() for tensor in (left, right))
    return bool((left - right).norm() <= max(_CLOSE, 4 * eps) * right.norm())
