# SPDX-License-Identifier: BSD-3-Clause
"""Which kind of step each node of a network's data flow is, or why it is none."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from dcd_kernels.checks import ACTIVATIONS

from . import layers
from .aliases import shared_with_a_write
from .capture import Captured
from .layers import Convolution, Unsupported

_ADDITIONS = {operator.add, operator.iadd, torch.add}
_ACTIVATIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_DROPOUTS = {F.dropout, F.dropout2d}


@dataclass
class Facts:
    """What is known of the nodes of a graph.

    ``shapes`` and ``dtypes`` are those of one example; ``dtype`` is that of the network, float32 or bfloat16;
    ``flat`` the nodes that are vectors whatever the size of the images;
    ``kinds`` the step that each node is, ``reasons`` why others are none.
    """

    shapes: dict[fx.Node, torch.Size]
    dtypes: dict[fx.Node, torch.dtype]
    dtype: torch.dtype
    flat: set[fx.Node] = field(default_factory=set)
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)

    def learn(self, captured: Captured) -> None:
        shared = shared_with_a_write(captured)
        for node in captured.graph.nodes:
            kind = None
            if node in shared:
                self.reasons[node] = "something is written in place to memory that others read too"
            elif node.op not in ("placeholder", "output", "get_attr"):
                try:
                    kind = classify(captured, node, self)
                    self.kinds[node] = kind
                except Unsupported as error:
                    self.reasons[node] = str(error)
            if (
                kind == "mean"
                or (kind in ("same", "add") and node.args[0] in self.flat)
                or len(self.shapes.get(node, ())) == 2
            ):
                self.flat.add(node)

    def give_up(self, node: fx.Node, reason: str) -> None:
        """``node`` runs as it is written after all."""
        del self.kinds[node]
        self.reasons[node] = reason


def is_sum(node: fx.Node) -> bool:
    if node.op == "call_function":
        right = node.target in _ADDITIONS and not node.kwargs
    else:
        right = node.op == "call_method" and node.target in ("add", "add_") and not node.kwargs
    return right and len(node.args) == 2 and all(isinstance(operand, fx.Node) for operand in node.args)


def activation_code(captured: Captured, node: fx.Node) -> int | None:
    """The code of the activation that ``node`` is."""
    if node.op == "call_module":
        module = captured.module(node)
        return None if layers.is_altered(module) else layers.activation_of(module)
    if node.op == "call_function" and node.target in _ACTIVATIONS and set(node.kwargs) <= {"inplace"}:
        return ACTIVATIONS[_ACTIVATIONS[node.target]]
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return ACTIVATIONS["relu"]
    return None


def max_pool_geometry(module: nn.MaxPool2d) -> layers.Geometry:
    def pair(value):
        return (value, value) if isinstance(value, int) else tuple(value)

    if module.ceil_mode or module.return_indices or pair(module.dilation) != (1, 1):
        raise Unsupported("max pooling with ceil_mode, indices or dilation")
    return layers.Geometry(pair(module.kernel_size), pair(module.stride), pair(module.padding))


def layer_of(captured: Captured, node: fx.Node, facts: Facts) -> Convolution:
    module = captured.module(node)
    return layers.convolution_of(module, captured.recipe(module), facts.dtype)


def _mean_dims(node: fx.Node) -> list[int] | None:
    """The dimensions that a call of mean is over; None where there are none, or something else is asked."""
    arguments = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    dims = arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if (
        len(node.args) > 3
        or not arguments.keys() <= {"dim", "keepdim"}
        or not isinstance(dims, (tuple, list))
    ):
        return None
    return sorted(dim % 4 for dim in dims) if all(isinstance(dim, int) for dim in dims) else None


def _is_mean(captured: Captured, node: fx.Node, source: torch.Size) -> bool:
    """Whether ``node`` is the mean over all pixels, with or without two dimensions of one."""
    if len(source) != 4:
        return False
    if node.op == "call_module":
        module = captured.module(node)
        return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1), [1, 1])
    if node.target is F.adaptive_avg_pool2d:
        arguments = [*node.args[1:], *node.kwargs.values()]
        return len(arguments) == 1 and arguments[0] in (1, (1, 1), [1, 1])
    if node.target is torch.mean or (node.op == "call_method" and node.target == "mean"):
        return _mean_dims(node) == [2, 3]
    return False


def _is_flattened(captured: Captured, node: fx.Node, shape: torch.Size, facts: Facts) -> bool:
    """Whether ``node`` takes dimensions of one away from a vector."""
    source = node.args[0]
    if node.op == "call_module":
        right = type(captured.module(node)) is nn.Flatten
    else:
        right = node.target in (torch.flatten, "flatten")
    return right and source in facts.flat and facts.shapes[source][:2] == shape


def classify(captured: Captured, node: fx.Node, facts: Facts) -> str:
    """Which kind of step computes ``node``.

    Raises:
        Unsupported: none does.
    """
    shapes = facts.shapes
    inputs = node.all_input_nodes
    ranks = [len(shapes[operand]) if operand in shapes else 0 for operand in (node, *inputs)]
    if not inputs or any(rank not in (2, 4) for rank in ranks):
        raise Unsupported("no image and no vector of each sample")
    if not node.args or node.args[0] is not inputs[0]:
        raise Unsupported("its input is not its first argument")
    for operand in (node, *inputs):
        if facts.dtypes[operand] is not facts.dtype:
            raise Unsupported(f"it is in {facts.dtypes[operand]}, the network in {facts.dtype}")
    source = shapes[inputs[0]]
    if is_sum(node):
        left, right = node.args
        # a vector would be added to images of one pixel alone, which those of the example may happen to be
        if shapes[node] == source == shapes[right] and (left in facts.flat) == (right in facts.flat):
            return "add"
        raise Unsupported("it adds tensors of unequal shapes")
    if node.op == "call_module":
        return _classify_module(captured, node, source, facts)
    if _is_mean(captured, node, source):
        return "mean"
    if _is_flattened(captured, node, shapes[node], facts):
        return "same"
    if node.target in _DROPOUTS and node.kwargs.get("training", True) is False:
        return "same"
    if activation_code(captured, node) is not None and _follows_layer(captured, node, facts):
        return "follower"
    raise Unsupported("no kernel here computes it")


def _classify_module(captured: Captured, node: fx.Node, source: torch.Size, facts: Facts) -> str:
    module = captured.module(node)
    if module in captured.opaque:
        raise Unsupported(captured.opaque[module])
    if len(node.args) != 1 or node.kwargs:
        raise Unsupported("it is called with more than an image or a vector")
    if layers.is_altered(module):
        raise Unsupported("it has hooks, or a forward of its own")
    if layers.is_identity(module) or _is_flattened(captured, node, facts.shapes[node], facts):
        return "same"
    if _is_mean(captured, node, source):
        return "mean"
    if type(module) is nn.MaxPool2d:
        max_pool_geometry(module)
        return "max_pool"
    if layers.activation_of(module) is not None or layers.is_norm(module):
        if _follows_layer(captured, node, facts):
            return "follower"
        raise Unsupported(f"{type(module).__name__} behind no layer that could take it in")
    layer = layer_of(captured, node, facts)
    if (layer.kind == "linear") != (len(source) == 2):
        raise Unsupported(f"a linear layer on an image of shape {tuple(source)}")
    if node.args[0] in facts.flat and len(source) == 4:
        if layer.kind == "dense" and layer.geometry.padding != (0, 0):
            raise Unsupported("it pads an image of one pixel")
        if layer.branch is not None and layer.branch.bins != 1:
            raise Unsupported(f"its branch pools one pixel to {layer.branch.bins} × {layer.branch.bins}")
    return "layer"


def _follows_layer(captured: Captured, node: fx.Node, facts: Facts) -> bool:
    """Whether a layer, or a sum, takes ``node`` in: nobody else reads what is between them."""
    norm = node.op == "call_module" and layers.is_norm(captured.module(node))
    before = node.args[0]
    while len(before.users) == 1:
        kind = facts.kinds.get(before)
        if kind == "layer":
            return not (layer_of(captured, before, facts).activation and norm)
        if kind == "add":
            return not norm
        if kind == "follower":
            if activation_code(captured, before) is not None:
                return False
        elif kind != "same":
            return False
        before = before.args[0]
    return False
