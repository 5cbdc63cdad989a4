# SPDX-License-Identifier: BSD-3-Clause
"""Which kind of step each node of a network's data flow is, or why it is none."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from dcd_kernels.arguments import ACTIVATIONS

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

    ``shapes`` are those for each of the examples, which differ in batch and, where the network takes more
    than one, in the size of the image: nodes of equal shapes are so always. ``dtypes`` are those of one;
    ``dtype`` is that of the network, float32 or bfloat16; ``flat`` are the nodes that are vectors whatever
    the size of the images, ``pixels`` those and what is made of them alone, images of one pixel; ``kinds`` is
    the step that each node is, ``reasons`` why others are none.
    """

    shapes: dict[fx.Node, tuple[torch.Size, ...]]
    dtypes: dict[fx.Node, torch.dtype]
    dtype: torch.dtype
    flat: set[fx.Node] = field(default_factory=set)
    pixels: set[fx.Node] = field(default_factory=set)
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)

    @classmethod
    def of(cls, captured: Captured, dtype: torch.dtype) -> Facts:
        """Those of ``captured``, from its runs."""
        shapes = {
            node: tuple(run.shapes[node] for run in captured.runs)
            for node in captured.graph.nodes
            if captured.runs and all(node in run.shapes for run in captured.runs)
        }
        dtypes = captured.runs[0].dtypes if captured.runs else {}
        facts = cls(shapes, dtypes, dtype)
        facts._learn(captured)
        return facts

    def rank(self, node: fx.Node) -> int:
        """Of images and vectors, more for a larger batch and of as many channels for each example; else 0."""
        shapes = self.shapes.get(node, ())
        ranks = {len(shape) for shape in shapes}
        if len(ranks) != 1 or not ranks <= {2, 4}:
            return 0
        grows = len(set(self.batch(node))) == len(shapes)
        return ranks.pop() if grows and len({shape[1] for shape in shapes}) == 1 else 0

    def batch(self, node: fx.Node) -> tuple[int, ...]:
        """How many there are for each example: the network's batch, twice that with mirrored images, …"""
        return tuple(shape[0] for shape in self.shapes[node])

    def channels(self, node: fx.Node) -> int:
        return self.shapes[node][0][1]

    def _learn(self, captured: Captured) -> None:
        shared = shared_with_a_write(captured)
        for node in captured.graph.nodes:
            kind = None
            if node.op not in ("placeholder", "output", "get_attr"):
                try:
                    found = classify(captured, node, self)
                    if node in shared:
                        raise Unsupported("something is written in place to memory that others read too")
                    self.kinds[node] = kind = found
                except Unsupported as error:
                    self.reasons[node] = str(error)
            if (
                kind == "mean"
                or (kind in ("same", "add", "follower") and node.args[0] in self.flat)
                or self.rank(node) == 2
            ):
                self.flat.add(node)
            if node in self.flat or self._is_one_pixel(node):
                self.pixels.add(node)

    def _is_one_pixel(self, node: fx.Node) -> bool:
        """Whether ``node`` is an image of one pixel because all that it is made of is."""
        sources = [operand for operand in node.all_input_nodes if self.rank(operand)]
        one = self.rank(node) == 4 and all(shape[2:] == (1, 1) for shape in self.shapes[node])
        return one and bool(sources) and self.pixels.issuperset(sources)

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


def _is_mean(captured: Captured, node: fx.Node, facts: Facts) -> bool:
    """Whether ``node`` is the mean over all pixels, with or without two dimensions of one."""
    if facts.rank(node.args[0]) != 4:
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


def _is_flattened(captured: Captured, node: fx.Node, facts: Facts) -> bool:
    """Whether ``node`` takes dimensions of one away from a vector."""
    source = node.args[0]
    if node.op == "call_module":
        right = type(captured.module(node)) is nn.Flatten
    else:
        right = node.target in (torch.flatten, "flatten")
    return (
        right
        and source in facts.flat
        and (facts.rank(node), facts.channels(node))
        == (
            2,
            facts.channels(source),
        )
    )


def classify(captured: Captured, node: fx.Node, facts: Facts) -> str:
    """Which kind of step computes ``node``.

    Raises:
        Unsupported: none does.
    """
    inputs = node.all_input_nodes
    if node.op == "call_module" and captured.module(node) in captured.opaque:
        raise Unsupported(captured.opaque[captured.module(node)])
    if not inputs or not all(facts.rank(operand) for operand in (node, *inputs)):
        raise Unsupported("no image and no vector of each sample")
    if any(facts.batch(operand) != facts.batch(node) for operand in inputs):
        raise Unsupported("it is of another batch than its input")
    if not node.args or node.args[0] is not inputs[0]:
        raise Unsupported("its input is not its first argument")
    for operand in (node, *inputs):
        if facts.dtypes[operand] is not facts.dtype:
            raise Unsupported(f"it is in {facts.dtypes[operand]}, the network in {facts.dtype}")
    if is_sum(node):
        left, right = node.args
        if facts.shapes[node] == facts.shapes[left] == facts.shapes[right] and all(
            (left in same) == (right in same) for same in (facts.flat, facts.pixels)
        ):
            return "add"
        raise Unsupported("it adds tensors of unequal shapes")
    if node.op == "call_module":
        return _classify_module(captured, node, facts)
    if _is_mean(captured, node, facts):
        return "mean"
    if _is_flattened(captured, node, facts):
        return "same"
    if node.target in _DROPOUTS and node.kwargs.get("training", True) is False:
        return "same"
    if activation_code(captured, node) is not None and _follows_layer(captured, node, facts):
        return "follower"
    raise Unsupported("no kernel here computes it")


def _classify_module(captured: Captured, node: fx.Node, facts: Facts) -> str:
    module = captured.module(node)
    if len(node.args) != 1 or node.kwargs:
        raise Unsupported("it is called with more than an image or a vector")
    if layers.is_altered(module):
        raise Unsupported("it has hooks, or a forward of its own")
    if layers.is_identity(module) or _is_flattened(captured, node, facts):
        return "same"
    if _is_mean(captured, node, facts):
        return "mean"
    if type(module) is nn.MaxPool2d:
        max_pool_geometry(module)
        return "max_pool"
    if layers.activation_of(module) is not None or layers.is_norm(module):
        if _follows_layer(captured, node, facts):
            return "follower"
        raise Unsupported(f"{type(module).__name__} behind no layer that could take it in")
    layer = layer_of(captured, node, facts)
    rank = facts.rank(node.args[0])
    if (layer.kind == "linear") != (rank == 2):
        raise Unsupported(f"a linear layer on an image of shape {tuple(facts.shapes[node.args[0]][0])}")
    if node.args[0] in facts.flat and rank == 4:
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
