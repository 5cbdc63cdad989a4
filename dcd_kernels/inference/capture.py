# SPDX-License-Identifier: BSD-3-Clause
"""The data flow of a network, by torch.fx, with every layer that a kernel might know as one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn

from dcd_kernels.interop import acceleration, patch
from dcd_kernels.interop.guards import snapshot
from dcd_kernels.interop.trace import Shapes
from dcd_kernels.interop.tracer import ThreadTracer
from dcd_kernels.models.released.layers import ReleasedLayer
from dcd_kernels.nn.layer import DCDLayer

from .examples import Example, alike, repeatable, twin_of
from .layers import is_altered

ROOT = "network"


class _Root(nn.Module):
    """Calls the network, so that one that is a single layer is a node too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input):
        return self.network(input)


class _Unfaithful(Exception):
    """The data flow is not what the forward of ``module`` computes."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(reason)
        self.module = module


class _Tracer(ThreadTracer):
    """``whole`` are the modules that are one node."""

    # read at every call, as they may change
    proxy_buffer_attributes = True

    def __init__(self, whole: set[nn.Module]) -> None:
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.whole or super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: object) -> object:
        own = isinstance(a, nn.Parameter) or any(a is buffer for buffer in self.root.buffers())
        if isinstance(a, torch.Tensor) and not own:
            # a constant of the graph from now on, whether it is drawn, or depends on a device or a mode
            raise TypeError("it makes a tensor that depends on none of its inputs")
        return super().create_arg(a)


@dataclass(frozen=True)
class Run:
    """Shapes and dtypes of what each node gave for one example."""

    shapes: dict[fx.Node, torch.Size]
    dtypes: dict[fx.Node, torch.dtype]


class Captured:
    """A network's graph; ``recipes`` are those of its modules of the released form.

    ``opaque`` are modules that run as they are written, with the reason: torch.fx does not see all that their
    forwards do. ``runs`` are those on the examples, for which the graph has to give what the network gives;
    none where the network itself is opaque.
    """

    def __init__(self, network: nn.Module, examples: list[Example]) -> None:
        self.network = network
        known = {module for module in network.modules() if isinstance(module, (DCDLayer, ReleasedLayer))}
        self.recipes = acceleration.recipes(network, known)
        self.whole = known | set(self.recipes)
        self.opaque: dict[nn.Module, str] = {
            module: "it has hooks, or a forward of its own"
            for module in network.modules()
            if module not in self.whole and is_altered(module)
        }
        while True:
            try:
                self.graph = self._trace(network, _Root)
                self.runs = [] if network in self.opaque else [self._run(example) for example in examples]
                return
            except _Unfaithful as error:
                self.opaque[network.get_submodule(error.module)] = str(error)
            except Exception as error:
                if network in self.opaque:
                    raise
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                self.opaque[self._untraceable(network)] = f"torch.fx cannot follow its forward: {reason}"

    def _trace(self, module: nn.Module, make: Callable[[nn.Module], nn.Module] | None = None) -> fx.Graph:
        """The graph of ``make(module)``, traced on a copy, whose attributes its forward may change."""
        twin = twin_of(module)
        names = dict(twin.named_modules())
        whole = {
            names[name] for name, own in module.named_modules() if own in self.whole or own in self.opaque
        }
        before = {name: _attributes(own) for name, own in names.items()}
        graph = _Tracer(whole).trace(twin if make is None else make(twin))
        for name, own in names.items():
            if _attributes(own) != before[name]:
                raise _Unfaithful(name, "its forward sets attributes")
        return graph

    def _run(self, example: Example) -> Run:
        shapes = Shapes(_Root(twin_of(self.network)), self.graph)
        try:
            with repeatable():
                output = shapes.run(example.input.clone())
        except Exception as error:
            raise _Unfaithful("", f"its data flow by torch.fx raises: {error}") from error
        if not alike(output, example.output):
            raise _Unfaithful("", "its data flow by torch.fx gives other numbers than its forward")
        return Run(shapes.shapes, shapes.dtypes)

    def _untraceable(self, network: nn.Module) -> nn.Module:
        """An innermost module whose forward cannot be followed; the network where each can by itself."""
        for module in reversed(list(network.modules())):
            if (
                module in self.whole
                or module in self.opaque
                or type(module).__module__.startswith("torch.nn")
            ):
                continue
            try:
                self._trace(module)
            except Exception:
                return module
        return network

    def module(self, node: fx.Node) -> nn.Module:
        """What a call_module node calls."""
        name = node.target.removeprefix(ROOT).removeprefix(".")
        return self.network.get_submodule(name)

    def name(self, node: fx.Node) -> str:
        """What ``node`` is called in the network."""
        if node.op == "call_module":
            return node.target.removeprefix(ROOT).removeprefix(".") or ROOT
        return node.name

    def recipe(self, module: nn.Module) -> patch.Recipe | None:
        return self.recipes.get(module)


def _attributes(module: nn.Module) -> object:
    """What compares equal as long as no attribute of ``module`` has been set to something else."""
    try:
        return snapshot(vars(module))
    except RecursionError:  # objects that hold each other
        return {name: id(value) for name, value in vars(module).items()}
