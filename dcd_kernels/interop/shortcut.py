# SPDX-License-Identifier: BSD-3-Clause
"""The shortest way through a patched forward in inference: one op, and as little Python as keeps it right.

A pointwise layer of the released form is some 40 µs of kernels. To look at its modules one by one, and be
sure that nothing has changed, takes as long. So where a call is the single op `released_layer`, what that
rests on is kept for the instance in a form that compares quickly, with the places of its tensors. Whatever is
not as it was sends the call the long way, which finds out what it means.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from .. import extension
from ..backends import selection

if extension.LOADED:
    from ..ops.autograd import is_traced
    from ..ops.layer import MODULES, Layer, released_layer

_geometry = operator.itemgetter("stride", "padding", "kernel_size", "groups")
_has_global_hooks = torch.nn.modules.module._has_any_global_hook
_HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BACKENDS = ("auto", "cpu")
_NAME = "_dcd_shortcut"


def layer_of(module: nn.Module, fields: tuple[str | int | bool | None, ...]) -> Layer:
    """The `Layer` whose fields these are, modules by their name in ``module``."""
    layer = Layer(*fields)
    names = {field: getattr(layer, field) for field in MODULES}
    present = {field: module.get_submodule(name) for field, name in names.items() if name is not None}
    return layer._replace(**present)


class Shortcut:
    """What an instance and its modules look like, and where their tensors are.

    ``plain`` are attributes of the instance, ``steps`` (module, attribute, value) of those it calls, in which
    its own forward could see a difference; ``layer`` is what the op computes.
    """

    def __init__(
        self, module: nn.Module, input: Tensor, plain: tuple, steps: list[tuple], layer: Layer
    ) -> None:
        inner = [child for child in module.modules() if child is not module]
        self.kind, self.own = type(module), type(module).forward
        self.state, self.plain = module.__dict__, plain
        norms = [norm for norm in (layer.norm1, layer.norm2) if norm is not None]
        steps = [*steps, *((norm, "eps", norm.eps) for norm in norms)]
        self.attributes = [(child.__dict__, name, value) for child, name, value in steps]
        self.inner, self.kinds = inner, [*map(type, inner)]
        self.states = [child.__dict__ for child in inner]
        owners = (module, *inner)
        self.families = [owner._modules for owner in owners if owner._modules]
        self.childless = [owner._modules for owner in owners if not owner._modules]
        self.members = [[*family.values()] for family in self.families]
        self.hooks = [place for state in self.states for place in _HOOKS(state)]
        self.sizes = [*map(len, self.states)]  # one more where somebody gives a module a forward of its own
        self.places, self.constants = layer.places(), layer.constants()
        self.absent = [place.get(name) is None for place, name in self.places]
        self.convolutions = [part.__dict__ for part in (layer.conv, layer.p, layer.q)]
        self.geometries = [*map(_geometry, self.convolutions)]
        self.rank, self.dtype = input.dim(), input.dtype

    def __call__(self, input: Tensor) -> Tensor | None:
        """The output, or None where the call has to go the long way."""
        if (
            input.dtype is not self.dtype
            or input.dim() != self.rank
            or not input.is_cpu
            or input.numel() == 0
            or torch.is_grad_enabled()
            or is_traced()
            or torch.is_autocast_enabled("cpu")
            or selection.current() not in _BACKENDS
            or selection.is_observed()
            or self.kind.forward is not self.own
            or _has_global_hooks()
            or any(self.hooks)
            or any(self.childless)
            or self.state["training"]
            or True in [state["training"] for state in self.states]
            or [*map(len, self.states)] != self.sizes
            or [*map(type, self.inner)] != self.kinds
            or [[*family.values()] for family in self.families] != self.members
            or [*map(_geometry, self.convolutions)] != self.geometries
        ):
            return None
        for name, value in self.plain:
            if self.state.get(name) != value:
                return None
        for state, name, value in self.attributes:
            if state.get(name) != value:
                return None
        tensors = [place.get(name) for place, name in self.places]
        if [tensor is None for tensor in tensors] != self.absent:
            return None
        return released_layer(input, tensors, self.constants)

    def __reduce__(self) -> tuple[type, tuple]:
        """Copies and pickles of an instance have none; they find their own."""
        return type(None), ()


def find(module: nn.Module) -> Shortcut | None:
    """The shortcut of ``module``, which is kept in the instance, as it refers to what the instance holds."""
    return module.__dict__.get(_NAME)


def keep(module: nn.Module, shortcut: Shortcut | None) -> None:
    """From now on `find` returns ``shortcut`` for ``module``."""
    if shortcut is not None:
        module.__dict__[_NAME] = shortcut


def forget(module: nn.Module) -> None:
    module.__dict__.pop(_NAME, None)
