# SPDX-License-Identifier: BSD-3-Clause
"""The data flow of a module's forward, by torch.fx, and what it took for granted."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class Untraceable(Exception):
    """A forward whose data flow is not the same for every input; the message is a reason to be reported."""


class _Tracer(fx.Tracer):
    """Every child is one step, as it may have hooks and a mode of its own; only a Sequential is opened."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential


@dataclass(frozen=True)
class Trace:
    """A module's forward in one mode, training or not.

    ``defaults`` are the arguments that kept their default; ``attributes`` the module's numbers, flags and
    names at that time, any of which the forward may have read; ``opened`` the names of the containers that
    are no step of the graph.
    """

    graph: fx.Graph
    defaults: dict[str, object]
    attributes: dict[str, object]
    opened: tuple[str, ...]


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """The attributes that a forward can branch on without a tracer's noticing."""
    found = {}
    for name, value in vars(module).items():
        if name == "training" or name.startswith("_"):
            continue
        if isinstance(value, _PLAIN) or (
            isinstance(value, (tuple, list)) and all(isinstance(v, _PLAIN) for v in value)
        ):
            found[name] = list(value) if isinstance(value, list) else value
    return found


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Attributes, parameters, buffers and children as they were; raises if the body changed any."""
    places = [vars(module), module._parameters, module._buffers, module._modules]
    before = [dict(place) for place in places]
    values = plain_attributes(module)
    changed: list[str] = []
    try:
        yield
    finally:
        for place, kept in zip(places, before, strict=True):
            if place.keys() != kept.keys() or any(place[key] is not kept[key] for key in kept):
                changed += [
                    key for key in {*place, *kept} if key not in kept or place.get(key) is not kept[key]
                ]
                place.clear()
                place.update(kept)
    changed += [key for key, value in plain_attributes(module).items() if values.get(key) != value]
    if changed:
        raise Untraceable(f"its forward sets self.{sorted(changed)[0]}")


def _defaults(module: nn.Module) -> dict[str, object]:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
            raise Untraceable(f"its forward takes {parameter}")
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def trace(module: nn.Module, training: bool) -> Trace:
    """The data flow of ``module.forward`` with ``module.training == training``.

    Raises:
        Untraceable: control flow that depends on data, attributes that forward sets, arguments by the dozen.
    """
    defaults = _defaults(module)
    if any(not isinstance(value, _PLAIN) for value in defaults.values()):
        raise Untraceable("its forward has defaults that are no plain values")
    attributes = plain_attributes(module)
    mode = module.training
    try:
        # only the flag of this module: its children are not entered
        module.training = training
        with _untouched(module):
            graph = _Tracer().trace(module, concrete_args=defaults or None)
    except Untraceable:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise Untraceable(f"torch.fx cannot follow its forward: {lines[0] if lines else error!r}") from error
    finally:
        module.training = mode
    _drop_defaults(graph, len(defaults))
    return Trace(graph, defaults, attributes, _opened(module, graph))


def _drop_defaults(graph: fx.Graph, count: int) -> None:
    """Removes the arguments that have their default, and the assertions that they do."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders[len(placeholders) - count :]:
        for user in reversed(list(node.users)):
            for assertion in reversed(list(user.users)):
                graph.erase_node(assertion)
            graph.erase_node(user)
        graph.erase_node(node)


def _opened(module: nn.Module, graph: fx.Graph) -> tuple[str, ...]:
    names = set()
    for node in graph.nodes:
        if node.op == "call_module":
            parts = node.target.split(".")
            names.update(".".join(parts[:i]) for i in range(1, len(parts)))
    return tuple(sorted(names))


class Shapes(fx.Interpreter):
    """Runs a graph on a module and keeps every value on the way, and the shape of tensors, by node."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.values: dict[fx.Node, object] = {}
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        self.values[n] = result
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        return result
