# SPDX-License-Identifier: BSD-3-Clause
"""What a traced forward took for granted: everything it may have read that is no tensor and no layer.

A number, an option in a dictionary, whether there is a bias: what torch.fx finds it takes for constant.
Which attributes a forward reads is known from the names in its code, and in that of the other methods of its
class. They are compared at every call; what has changed since makes the module run its own forward.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_IDENTITIES = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type)
_MISSING = object()
_PLAIN = (bool, int, float, str)

Path = tuple[str, ...]


def child(module: nn.Module, path: Path) -> nn.Module | None:
    """The module that is called ``path`` inside ``module``."""
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def snapshot(value: object) -> object:
    """What compares equal as long as ``value`` means the same; of tensors and layers only that they are."""
    if isinstance(value, fx.Proxy):
        return fx.Proxy  # which has every attribute
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, nn.Module):
        return nn.Module
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), [snapshot(entry) for entry in value]
    if isinstance(value, dict):
        return {key: snapshot(entry) for key, entry in value.items()}
    if isinstance(value, _IDENTITIES) or not hasattr(value, "__dict__"):
        return value
    # a copy of the module has a copy of the object
    return type(value), snapshot(vars(value))


def structure(module: nn.Module) -> tuple[list[list[str]], list[int]]:
    """Names of parameters, buffers and children, and how many of each are absent."""
    own = module.__dict__
    places = (own["_modules"], own["_parameters"], own["_buffers"])
    return [[*place] for place in places], [[*place.values()].count(None) if place else 0 for place in places]


@dataclass(frozen=True)
class Guards:
    """Values by module and attribute, and the structure of the module and its containers.

    ``plain`` are numbers, flags and strings in the module itself, the commonest and the quickest to compare.
    """

    plain: tuple[tuple[str, object], ...]
    values: tuple[tuple[Path, str, object], ...]
    structures: tuple[tuple[Path, list[list[str]], list[int]], ...]

    def change(self, module: nn.Module) -> str | None:
        """What is not any more as it was; None if everything is."""
        own = module.__dict__
        for name, value in self.plain:
            if own.get(name) != value:
                return name
        for path, names, absent in self.structures:
            place = child(module, path) if path else module
            if place is None or structure(place) != (names, absent):
                return f"the children or parameters of {'.'.join(path) or 'the module'}"
        for path, name, value in self.values:
            if snapshot(getattr(child(module, path), name, _MISSING)) != value:
                return ".".join((*path, name))
        return None


def guard(module: nn.Module) -> Guards:
    """The guards of ``module`` as it is now."""
    names = sorted(names_in_code(type(module)))
    plain, values, structures = [], [], [((), *structure(module))]
    for name, value in _readable(module, names):
        if isinstance(value, _PLAIN) and name in vars(module):
            plain.append((name, value))
        else:
            values.append(((), name, snapshot(value)))
    for path, inner in _children(module, ()):
        if isinstance(inner, _CONTAINERS):
            structures.append((path, *structure(inner)))
        else:
            values += [(path, name, snapshot(value)) for name, value in _readable(inner, names)]
    return Guards(tuple(plain), tuple(values), tuple(structures))


def _children(module: nn.Module, path: Path) -> Iterator[tuple[Path, nn.Module]]:
    """The direct children, and those of containers."""
    for name, inner in module._modules.items():
        if inner is not None:
            yield (*path, name), inner
            if isinstance(inner, _CONTAINERS):
                yield from _children(inner, (*path, name))


def _readable(module: nn.Module, names: list[str]) -> Iterator[tuple[str, object]]:
    """The attributes among ``names`` that are neither layers and tensors that are there, nor methods."""
    for name in names:
        own = next((place[name] for place in _places(module) if name in place), _MISSING)
        if own is _MISSING:
            own = inspect.getattr_static(type(module), name, _MISSING)
            if own is _MISSING or hasattr(nn.Module, name) or hasattr(own, "__get__"):
                continue
        if not isinstance(own, (Tensor, nn.Module)):
            yield name, own


def _places(module: nn.Module) -> tuple[dict, ...]:
    return vars(module), module._parameters, module._buffers, module._modules


def names_in_code(cls: type) -> set[str]:
    """Names and strings in the code of forward, and of the methods and properties that it names."""
    found: set[str] = set()
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        value = inspect.getattr_static(cls, name, None)
        named: set[str] = set()
        inner = [getattr(value, place, None) for place in ("__func__", "__wrapped__", "fget")]
        for part in (value, *inner):
            if isinstance(part, types.FunctionType):
                _add_names(part.__code__, named)
        found |= named
        waiting += [name for name in named - seen if not hasattr(nn.Module, name)]
    return found - {"training"}


def _add_names(code: types.CodeType, found: set[str]) -> None:
    found.update(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_names(constant, found)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
