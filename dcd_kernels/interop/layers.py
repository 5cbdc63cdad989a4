# SPDX-License-Identifier: BSD-3-Clause
"""Which of torch's own layers the parts of a dynamic residual may be."""

from __future__ import annotations

from torch import nn

_CONVOLUTIONS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}  # and the rank of what they read
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` is calling a ``kind``: a parametrised one is of another class and does."""
    cls = type(module)
    if cls is kind:
        return True
    return (
        issubclass(cls, kind)
        and cls.forward is kind.forward
        and getattr(cls, "_conv_forward", None) is getattr(kind, "_conv_forward", None)
    )


def rank(module: nn.Module) -> int | None:
    """Rank of what a static layer reads; None for another module."""
    if _computes_as(module, nn.Linear):
        return 2
    return next((rank for kind, rank in _CONVOLUTIONS.items() if _computes_as(module, kind)), None)


def is_static(module: nn.Module) -> bool:
    """A convolution of torch, or nn.Linear."""
    return rank(module) is not None


def is_projection(module: nn.Module) -> bool:
    """A static layer whose every output pixel reads one input pixel."""
    if not is_static(module):
        return False
    if isinstance(module, nn.Linear):
        return True
    return (
        module.groups == 1
        and all(k == 1 for k in module.kernel_size)
        and (module.padding == "valid" or all(pad == 0 for pad in module.padding))
    )


def is_expansion(module: nn.Module) -> bool:
    """A projection that leaves no pixel out."""
    return is_projection(module) and (isinstance(module, nn.Linear) or all(s == 1 for s in module.stride))


def is_norm(module: nn.Module) -> bool:
    """A norm whose statistics follow from mean and covariance of what it reads."""
    return is_batch_norm(module) or _computes_as(module, nn.GroupNorm)


def is_batch_norm(module: nn.Module) -> bool:
    return any(_computes_as(module, kind) for kind in _BATCH_NORMS)


def is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity


def is_altered(module: nn.Module) -> bool:
    """Whether calling ``module`` does something else than the forward of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
