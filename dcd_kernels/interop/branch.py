# SPDX-License-Identifier: BSD-3-Clause
"""Finds the released form's branch, ``pool → FC → gate → FC into Φ, FC into λ``, in a module's data flow.

Which function stands between two linear layers is found out by asking it: numbers go in on one side and are
compared with what each known gate, λ activation and pooling makes of them. What is no such branch is left as
it was written, and only what follows it is fused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.branch import ADAPTIVE_POOLS, GATES, LAM_ACTIVATIONS
from . import layers
from .match import Match
from .trace import Shapes, plain_attributes

_EXACT = 1e-12
_COMMON = {*vars(nn.Module())}  # attributes that every module has


@dataclass(frozen=True)
class Branch:
    """The parts of a branch, linear layers by name; ``pool`` is the number of bins along each dimension.

    ``steps`` are all modules that it calls, and those inside them, with their class and plain attributes;
    ``nodes`` what the fused branch replaces.
    """

    input: fx.Node
    squeeze: str
    gate: str
    gate_layer: str | None
    phi: str
    lam: str
    lam_activation: str | None
    pool: int
    steps: tuple[tuple[str, type, dict[str, object]], ...]
    nodes: frozenset[fx.Node]


def find(twin: nn.Module, match: Match, run: Shapes) -> Branch | None:
    """The branch that makes λ and Φ of ``match``, from the same input; None where there is none.

    ``run`` has the values of all nodes for one input of ``twin``.
    """
    try:
        return _Finder(twin, match, run).branch()
    except _Other:
        return None


class _Other(Exception):
    """The branch is another one."""


class _Finder:
    def __init__(self, twin: nn.Module, match: Match, run: Shapes) -> None:
        self.twin, self.match, self.run = twin, match, run
        self.order = {node: i for i, node in enumerate(run.graph.nodes)}
        self.nodes: set[fx.Node] = set()

    def branch(self) -> Branch:
        match = self.match
        if match.lam is None or match.transposed:
            raise _Other
        phi, lam = self._layer_before(match.phi), self._layer_before(match.lam)
        if phi is lam or phi.args[0] is not lam.args[0]:
            raise _Other
        hidden = phi.args[0]
        squeeze = self._layer_before(hidden, through=True)
        self._check_phi(phi)
        lam_activation = self._lam_activation(lam)
        gate, gate_layer = self._gate(squeeze, hidden)
        pool = self._pool(squeeze)
        self._check_readers()
        return Branch(
            match.input,
            squeeze.target,
            gate,
            gate_layer,
            phi.target,
            lam.target,
            lam_activation,
            pool,
            self._steps(),
            frozenset(self.nodes),
        )

    def _module(self, node: fx.Node) -> nn.Module:
        return self.run.module.get_submodule(node.target)  # it has run, and may have stored something

    def _is_linear(self, node: fx.Node) -> bool:
        return node.op == "call_module" and layers.rank(self._module(node)) == 2 and len(node.args) == 1

    def _layer_before(self, node: fx.Node, through: bool = False) -> fx.Node:
        """The linear layer that everything in ``node`` comes from; ``through`` one inside a gate, too."""
        found = []
        waiting, seen = [node], set()
        while waiting:
            node = waiting.pop()
            if node in seen or node not in self.run.shapes:
                continue
            seen.add(node)
            if self._is_linear(node):
                found.append(node)
                if through:
                    waiting += node.all_input_nodes
            elif node is not self.match.input:
                waiting += node.all_input_nodes
        if not found:
            raise _Other
        return min(found, key=self.order.get)

    def _between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The nodes that ``end`` is made of, from ``start`` on."""
        behind: set[fx.Node] = {start}
        for node in self.order:
            if any(source in behind for source in node.all_input_nodes):
                behind.add(node)
        needed, waiting = set(), [end]
        while waiting:
            node = waiting.pop()
            if node in behind and node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        return sorted(needed, key=self.order.get)

    def _answer(self, start: fx.Node, end: fx.Node, value: Tensor) -> Tensor:
        """``end`` if ``start`` had ``value``."""
        path = self._between(start, end)
        if start is not end and (not path or path[0] is not start):
            raise _Other
        self.nodes |= set(path) - {start}
        values = dict(self.run.values)
        values[start] = value.clone()  # it may be changed in place
        runner = fx.Interpreter(self.run.module, graph=self.run.graph)
        runner.env = values
        for node in path:
            if node is not start:
                values[node] = runner.run_node(node)
        return values[end]

    def _random_like(self, node: fx.Node) -> Tensor:
        generator = torch.Generator().manual_seed(len(self.order))
        return 3 * torch.randn(self.run.shapes[node], generator=generator, dtype=torch.float64)

    def _check_phi(self, layer: fx.Node) -> None:
        logits = self._random_like(layer)
        size = self.run.shapes[self.match.phi]
        if logits.numel() != size.numel():
            raise _Other
        _require(self._answer(layer, self.match.phi, logits), logits.reshape(size))
        self.nodes.add(layer)

    def _lam_activation(self, layer: fx.Node) -> str | None:
        logits = self._random_like(layer)
        lam = self._answer(layer, self.match.lam, logits)
        if lam.numel() != logits.numel():
            raise _Other
        self.nodes.add(layer)
        return _first_equal(
            lam.reshape(logits.shape), {name: f(logits) for name, (f, _) in LAM_ACTIVATIONS.items()}
        )

    def _gate(self, squeeze: fx.Node, hidden: fx.Node) -> tuple[str | None, str | None]:
        before = self._random_like(squeeze)
        after = self._answer(squeeze, hidden, before)
        self.nodes.add(squeeze)
        inner = [
            (f"{node.target}.{name}" if name else node.target, child)
            for node in self._between(squeeze, hidden)
            if node.op == "call_module" and node is not squeeze
            for name, child in self._module(node).named_modules()
            if next(child.parameters(recurse=False), None) is not None
        ]
        if not inner:
            return _first_equal(after, {name: f(before) for name, f in GATES.items()}), None
        name, layer = inner[0]
        width = before.shape[1]
        if len(inner) > 1 or layers.rank(layer) != 2 or tuple(layer.weight.shape) != (width, width):
            raise _Other
        gated = before * F.relu6(F.linear(before, layer.weight, layer.bias) + 3) / 3
        return _first_equal(after, {"se": gated}), name

    def _pool(self, squeeze: fx.Node) -> int:
        """Bins a dimension of the adaptive pooling between the input and the first FC."""
        start, end = self.match.input, squeeze.args[0]
        image = self._random_like(start)
        pooled = image if start is end else self._answer(start, end, image)
        rank = image.dim()
        if rank == 2:
            return _first_equal(pooled, {1: image})
        pools = {1: ADAPTIVE_POOLS[rank - 2](image, 1).flatten(1)}
        if rank == 4:
            pools[2] = F.adaptive_avg_pool2d(image, 2).flatten(1)
        return _first_equal(pooled, pools)

    def _check_readers(self) -> None:
        """Nobody else may read what is not formed any more."""
        for node in self.nodes:
            others = [
                user for user in node.users if user not in self.nodes and user not in self.match.absorbed
            ]
            if node in self.run.shapes and others:
                raise _Other

    def _steps(self) -> tuple[tuple[str, type, dict[str, object]], ...]:
        """All modules that are not called any more; theirs may not depend on what is not compared."""
        found = {}
        for node in self.nodes:
            if node.op == "call_module":
                for inner, child in self._module(node).named_modules():
                    name = f"{node.target}.{inner}" if inner else node.target
                    found[name] = (type(child), {} if _is_torch(child) else _attributes(child))
        return tuple((name, *kind) for name, kind in sorted(found.items()))


def _is_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _attributes(module: nn.Module) -> dict[str, object]:
    """The attributes of somebody's own module, if all are plain; what it stored when it was called is one."""
    own = {name: value for name, value in vars(module).items() if name not in _COMMON}
    plain = plain_attributes(module)
    if module._buffers or own.keys() - plain.keys():
        raise _Other
    return plain


def _require(value: Tensor, truth: Tensor) -> None:
    if value.shape != truth.shape or not (value - truth).norm() <= _EXACT * truth.norm():
        raise _Other


def _first_equal(value: Tensor, candidates: dict) -> object:
    for name, truth in candidates.items():
        if value.shape == truth.shape and (value - truth).norm() <= _EXACT * truth.norm():
            return name
    raise _Other
