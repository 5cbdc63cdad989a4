# SPDX-License-Identifier: BSD-3-Clause
"""The data flow of a network, by torch.fx, with every layer that a kernel might know as one node."""

from __future__ import annotations

import torch
from torch import fx, nn

from dcd_kernels.interop import acceleration, patch
from dcd_kernels.interop.tracer import ThreadTracer
from dcd_kernels.models.released.layers import ReleasedLayer
from dcd_kernels.nn.layer import DCDLayer

from .layers import is_altered

ROOT = "network"


class _Root(nn.Module):
    """Calls the network, so that one that is a single layer is a node too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input):
        return self.network(input)


class _Tracer(ThreadTracer):
    """``whole`` are the modules that are one node."""

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


class Captured:
    """A network's graph; ``recipes`` are those of its modules of the released form."""

    def __init__(self, network: nn.Module) -> None:
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
            root = _Root(network)
            try:
                self.graph = self._trace(root)
                return
            except Exception as error:
                if network in self.opaque:
                    raise
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                self.opaque[self._untraceable(network)] = f"torch.fx cannot follow its forward: {reason}"

    def _trace(self, root: nn.Module) -> fx.Graph:
        return _Tracer(self.whole | set(self.opaque)).trace(root)

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
