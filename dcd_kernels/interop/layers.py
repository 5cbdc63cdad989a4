# SPDX-License-Identifier: BSD-3-Clause
"""Which of torch's own layers the parts of a dynamic residual may be."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _modules
from torch.utils.module_tracker import ModuleTracker

# All of these are asked at every call of a patched module, hence the look-ups before the loops.
_RANKS = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}  # of what they read
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS = (*_BATCH_NORMS, nn.GroupNorm)
# what does nothing outside training
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_ONES = ((1,), (1, 1), (1, 1, 1))
_NO_PADDING = ((0,), (0, 0), (0, 0, 0), "valid")


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
    known = _RANKS.get(type(module))
    if known is not None:
        return known
    return next((rank for kind, rank in _RANKS.items() if _computes_as(module, kind)), None)


def is_static(module: nn.Module) -> bool:
    """A convolution of torch, or nn.Linear."""
    return rank(module) is not None


def is_projection(module: nn.Module) -> bool:
    """A static layer whose every output pixel reads one input pixel."""
    if not is_static(module):
        return False
    if isinstance(module, nn.Linear):
        return True
    return module.groups == 1 and module.kernel_size in _ONES and module.padding in _NO_PADDING


def is_expansion(module: nn.Module) -> bool:
    """A projection that leaves no pixel out."""
    return is_projection(module) and (isinstance(module, nn.Linear) or module.stride in _ONES)


def is_norm(module: nn.Module) -> bool:
    """A norm whose statistics follow from mean and covariance of what it reads."""
    return type(module) in _NORMS or any(_computes_as(module, kind) for kind in _NORMS)


def is_batch_norm(module: nn.Module) -> bool:
    return type(module) in _BATCH_NORMS or any(_computes_as(module, kind) for kind in _BATCH_NORMS)


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


def are_watched() -> bool:
    """Whether hooks on all modules would miss those that are not called, but for torch's own name-keeper.

    That is what FlopCounterMode follows the modules with; it is to count what really runs.
    """
    if not _modules._has_any_global_hook():
        return False
    places = (
        _modules._global_forward_pre_hooks,
        _modules._global_forward_hooks,
        _modules._global_backward_pre_hooks,
        _modules._global_backward_hooks,
    )
    hooks = [hook for place in places for hook in place.values()]
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)
