# SPDX-License-Identifier: BSD-3-Clause
"""Which nodes of a data flow share memory that one of them writes to, so that all must run as written."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from dcd_kernels.interop.layers import DROPOUTS

from .capture import Captured

_MAY_RETURN_THEIR_INPUT = (
    nn.Identity,
    *DROPOUTS,
    nn.Flatten,
    nn.Unflatten,
    nn.Sequential,
)
_FRESH_FUNCTIONS = {
    operator.add,
    torch.add,
    torch.relu,
    torch.mean,
    F.relu,
    F.relu6,
    F.silu,
    F.hardswish,
    F.adaptive_avg_pool2d,
}
_FRESH_METHODS = {"add", "relu", "mean"}
_IN_PLACE_OPERATORS = {getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "ipow")}


# what is called from elsewhere, by torch.fx.wrap, may write to anything
_KNOWN_LIBRARIES = ("torch", "_operator", "operator", "builtins", "math")


def written_to(captured: Captured, node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory ``node`` writes to, or may write to."""
    if isinstance(node.kwargs.get("out"), fx.Node):
        return [node.kwargs["out"]]
    in_place = node.kwargs.get("inplace") is True
    if node.op == "call_module":
        module = captured.module(node)
        if module in captured.opaque:
            return node.all_input_nodes
        in_place = bool(getattr(module, "inplace", False))
    elif node.op == "call_method":
        in_place = in_place or (node.target.endswith("_") and not node.target.endswith("__"))
    elif node.op == "call_function":
        if not (getattr(node.target, "__module__", None) or "torch").startswith(_KNOWN_LIBRARIES):
            return node.all_input_nodes
        name = getattr(node.target, "__name__", "")
        in_place = (
            in_place
            or node.target in _IN_PLACE_OPERATORS
            or (name.endswith("_") and not name.endswith("__"))
            or (node.target in _FRESH_FUNCTIONS and any(argument is True for argument in node.args[1:]))
        )
    return node.all_input_nodes[:1] if in_place else []


def shared_with_a_write(captured: Captured) -> set[fx.Node]:
    """Nodes that write to memory which others read besides, or may be views of it."""
    found: set[fx.Node] = set()
    for node in captured.graph.nodes:
        for target in written_to(captured, node):
            above = _above(captured, target)
            if any(len(own.users) > 1 or own.op in ("placeholder", "get_attr") for own in above):
                found |= {node, *_below(captured, above)}
    return found


def _is_fresh(captured: Captured, node: fx.Node) -> bool:
    """Whether the result of ``node`` is certainly memory of its own."""
    if written_to(captured, node):
        return False
    if node.op == "call_module":
        module = captured.module(node)
        if module in captured.whole:
            return True
        return type(module).__module__.startswith("torch.nn.modules") and not isinstance(
            module, _MAY_RETURN_THEIR_INPUT
        )
    if node.op == "call_function":
        return node.target in _FRESH_FUNCTIONS
    return node.op == "call_method" and node.target in _FRESH_METHODS


def _above(captured: Captured, node: fx.Node) -> set[fx.Node]:
    """``node`` and all that it may be a view of."""
    found, open_nodes = set(), [node]
    while open_nodes:
        node = open_nodes.pop()
        if node not in found:
            found.add(node)
            if not _is_fresh(captured, node):
                open_nodes += node.all_input_nodes
    return found


def _below(captured: Captured, nodes: set[fx.Node]) -> set[fx.Node]:
    """All that may be views of ``nodes``."""
    found: set[fx.Node] = set()
    open_nodes = list(nodes)
    while open_nodes:
        for user in open_nodes.pop().users:
            if user not in found and user.op != "output" and not _is_fresh(captured, user):
                found.add(user)
                open_nodes.append(user)
    return found
