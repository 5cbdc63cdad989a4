# SPDX-License-Identifier: BSD-3-Clause
"""The data flow of a module's forward, by torch.fx, and what it took for granted."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from . import layers
from .guards import names_in_code, snapshot
from .tracer import ThreadTracer

SEED = 20  # of everything that is drawn to look at a module
_BATCH = 3
_SIZES = ((7, 6, 5), (19, 18, 17))  # the second for kernels that do not fit into the first
_MISSING = object()
_MODES = {
    "no_grad",
    "enable_grad",
    "set_grad_enabled",
    "inference_mode",
    "is_grad_enabled",
    "autocast",
    "is_autocast_enabled",
    "custom_fwd",
    "checkpoint",
    "requires_grad",
    "requires_grad_",
    "register_hook",
}
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class Untraceable(Exception):
    """A forward whose data flow is not the same for every input; the message is a reason to be reported."""


class _UnknownLength(Exception):
    """Something is unpacked whose length is not in the code; ``graph`` is what led there."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        super().__init__(str(node))
        self.graph, self.node = graph, node


class _Proxy(fx.Proxy):
    def __len__(self) -> int:
        return self.tracer.length(self.node)

    def __getattr__(self, name: str) -> fx.Proxy:
        return _Attribute(self, name)


class _Attribute(fx.proxy.Attribute):
    __len__, __getattr__ = _Proxy.__len__, _Proxy.__getattr__


class _Tracer(ThreadTracer):
    """Every child is one step, as it may have hooks and a mode of its own; only a Sequential is opened.

    ``lengths`` are those of shapes and tuples that are unpacked into arguments, by their node's name.
    """

    proxy_buffer_attributes = True

    def __init__(self, lengths: dict[str, int]) -> None:
        super().__init__()
        self.lengths = lengths

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def length(self, node: fx.Node) -> int:
        if node.name not in self.lengths:
            raise _UnknownLength(self.graph, node)
        return self.lengths[node.name]

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            return iter([obj[index] for index in range(self.length(obj.node))])


def _graph(module: nn.Module, defaults: dict[str, object]) -> fx.Graph:
    """Traces as often as another length has to be found out first, from an example."""
    lengths: dict[str, int] = {}
    while True:
        try:
            return _Tracer(lengths).trace(module, concrete_args=defaults or None)
        except _UnknownLength as unknown:
            lengths[unknown.node.name] = _length(module, unknown.graph, unknown.node)


def _length(module: nn.Module, graph: fx.Graph, node: fx.Node) -> int:
    for inputs in guesses(module, graph):
        runner = Shapes(copy.deepcopy(module), graph)
        with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.no_grad():
            runner.run(*inputs)
        if isinstance(runner.values.get(node), (tuple, list)):
            return len(runner.values[node])
    raise Untraceable(f"its forward loops over {node}")


@dataclass(frozen=True)
class Trace:
    """A module's forward in one mode, training or not.

    ``defaults`` are the arguments that kept their default; ``opened`` the names of the containers that are no
    step of the graph.
    """

    graph: fx.Graph
    defaults: dict[str, object]
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
    """Raises if the body changes an attribute of ``module``, or anything in one."""
    before = snapshot(vars(module))
    yield
    after = snapshot(vars(module))
    places = [(before, after), *((before[name], after[name]) for name in ("_parameters", "_buffers"))]
    for old, new in places:
        for name in sorted({*old, *new}):
            if not name.startswith("_") and old.get(name, _MISSING) != new.get(name, _MISSING):
                raise Untraceable(f"its forward sets self.{name}")


def _require_followable(cls: type) -> None:
    """torch.fx records what is computed, not in which mode of autograd or precision."""
    if hasattr(cls.forward, "__wrapped__"):
        raise Untraceable("its forward is decorated")
    modes = names_in_code(cls) & _MODES
    if modes:
        raise Untraceable(f"its code has {sorted(modes)[0]} in it")


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
    _require_followable(type(module))
    defaults = _defaults(module)
    if any(not isinstance(value, _PLAIN) for value in defaults.values()):
        raise Untraceable("its forward has defaults that are no plain values")
    mode = module.training
    try:
        # only the flag of this module: its children are not entered
        module.training = training
        with _untouched(module):
            graph = _graph(module, defaults)
    except Untraceable:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise Untraceable(f"torch.fx cannot follow its forward: {lines[0] if lines else error!r}") from error
    finally:
        module.training = mode
    _drop_defaults(graph, len(defaults))
    return Trace(graph, defaults, _opened(graph))


def _drop_defaults(graph: fx.Graph, count: int) -> None:
    """Removes the arguments that have their default, and the assertions that they do."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders[len(placeholders) - count :]:
        for user in reversed(list(node.users)):
            for assertion in reversed(list(user.users)):
                graph.erase_node(assertion)
            graph.erase_node(user)
        graph.erase_node(node)


def _opened(graph: fx.Graph) -> tuple[str, ...]:
    names = set()
    for node in graph.nodes:
        if node.op == "call_module":
            parts = node.target.split(".")
            names.update(".".join(parts[:i]) for i in range(1, len(parts)))
    return tuple(sorted(names))


class Shapes(fx.Interpreter):
    """Runs a graph on a module and keeps every value on the way, and shape and dtype of tensors, by node."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.values: dict[fx.Node, object] = {}
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.dtypes: dict[fx.Node, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        self.values[n] = result
        if isinstance(result, Tensor):
            self.shapes[n], self.dtypes[n] = result.shape, result.dtype
        return result


def guesses(twin: nn.Module, graph: fx.Graph) -> Iterator[list[Tensor]]:
    """Inputs by what reads the arguments; one that no convolution reads may be an image or a vector."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    readers = _readers(twin, graph)
    convolved = {node: max(found, key=lambda pair: pair[1]) for node, found in readers.items()}
    images = [(channels, rank) for channels, rank in convolved.values() if rank > 2]
    like = images[0] if images else next(iter(convolved.values()), None)
    if like is None:
        return
    generator = torch.Generator().manual_seed(SEED)
    for size in _SIZES:
        for attempt in range(4 if len(placeholders) > 1 else 1):
            shapes = []
            for node in placeholders:
                channels, rank = convolved.get(node, like)
                if images and rank == 2:  # behind a pooling, to one number a channel or to four
                    rank = 2 if attempt == 1 else like[1]
                    channels = {0: like[0], 3: channels // 4}.get(attempt, channels)
                shapes.append((_BATCH, channels, *size[: rank - 2]))
            yield [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _readers(twin: nn.Module, graph: fx.Graph) -> dict[fx.Node, list[tuple[int, int]]]:
    """(channels, rank) that the first static layers behind each argument of forward read."""
    found: dict[fx.Node, list[tuple[int, int]]] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not layers.is_static(twin.get_submodule(node.target)):
            continue
        origin = node.args[0]
        while origin.op != "placeholder" and not _is_layer(twin, origin) and origin.all_input_nodes:
            origin = origin.all_input_nodes[0]
        if origin.op == "placeholder":
            layer = twin.get_submodule(node.target)
            channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            found.setdefault(origin, []).append((channels, layers.rank(layer)))
    return found


def _is_layer(twin: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and layers.is_static(twin.get_submodule(node.target))
