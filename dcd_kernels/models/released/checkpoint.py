# SPDX-License-Identifier: BSD-3-Clause
"""Reads checkpoints as the released training code, and most copies of it, write them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor, nn

from dcd_kernels.arguments import check_module

Model = TypeVar("Model", bound=nn.Module)

_PARALLEL = "module."
_COUNTER = ".num_batches_tracked"
_SHOWN = 8


def _state(checkpoint: object) -> dict[str, Tensor]:
    """The state_dict in what a file has, by the keys of the model alone."""
    entry = "checkpoint"
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping):
        entry, checkpoint = "checkpoint['state_dict']", checkpoint["state_dict"]
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"load_checkpoint: checkpoint must be a file or a state_dict, got {type(checkpoint).__name__}"
        )
    for key, value in checkpoint.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"load_checkpoint: {entry} must have tensors by name, "
                f"got {type(value).__name__} under {key!r}"
            )
    parallel = all(key.startswith(_PARALLEL) for key in checkpoint)
    return {key.removeprefix(_PARALLEL) if parallel else key: value for key, value in checkpoint.items()}


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"


def _hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    for wanted, given, dropout in (("0", "1", "0.1"), ("1", "0", "None")):
        if any(key.startswith(f"classifier.{wanted}.") for key in missing) and any(
            key.startswith(f"classifier.{given}.") for key in unexpected
        ):
            return f" (its classifier is number {given}: make the model with dropout={dropout})"
    return ""


def _check_keys(model: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = [key for key in model if key not in state]
    if not any(key.endswith(_COUNTER) for key in state):
        # written before PyTorch 0.4.1, whose norms did not count: torch leaves the model's own counts
        missing = [key for key in missing if not key.endswith(_COUNTER)]
    unexpected = [key for key in state if key not in model]
    shapes = [
        f"{key} {tuple(value.shape)} instead of {tuple(model[key].shape)}"
        for key, value in state.items()
        if key in model and value.shape != model[key].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    faults = [_listed(what, names) for what, names in found.items() if names]
    if faults:
        raise ValueError(
            "load_checkpoint: checkpoint must have the keys and shapes of the model, got "
            f"{'; '.join(faults)}{_hint(missing, unexpected)}"
        )


def load_checkpoint(
    model: Model, checkpoint: str | os.PathLike[str] | BinaryIO | Mapping[str, object]
) -> Model:
    """Loads ``checkpoint`` into ``model``, strictly, and returns ``model``; on an error it is untouched.

    Args:
        model: a network of :mod:`dcd_kernels.models.released`, or any module.
        checkpoint: a file or its path, read on the CPU with ``weights_only=True``; or what ``torch.load``
            returned. Either a state_dict, or a dict that has one as ``'state_dict'`` beside whatever else
            training keeps. Where all keys start with ``'module.'``, as DataParallel writes them, that is
            left out. Values are converted to the dtype and device of the model's.

    Raises:
        ValueError: keys that are missing or unexpected, or another shape: the message names them. A model on
            the meta device, which has nothing to load into.
        TypeError: no state_dict in it, or a model that is not a module.
        OSError, pickle.UnpicklingError: what ``torch.load`` raises for no such file, or one with more than
            tensors and plain values in it.
    """
    check_module("load_checkpoint", model)
    target = model.state_dict()
    if any(value.is_meta for value in target.values()):
        raise ValueError(
            "load_checkpoint: model must have its tensors in memory, got some on the meta device"
        )
    if not isinstance(checkpoint, Mapping) and (
        isinstance(checkpoint, (str, os.PathLike)) or hasattr(checkpoint, "read")
    ):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = _state(checkpoint)
    _check_keys(target, state)
    model.load_state_dict(state)
    return model
