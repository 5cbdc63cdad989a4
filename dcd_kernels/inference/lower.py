# SPDX-License-Identifier: BSD-3-Clause
"""From a network's data flow to steps: each layer takes in what follows it, as far as one kernel can."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from dcd_kernels.checks import ACTIVATIONS

from . import layers
from .capture import Captured
from .layers import Convolution, Unsupported
from .pack import Layer
from .program import BLOCK, LAYOUT, Constant, Step, Value, padded

_ADDITIONS = {operator.add, operator.iadd, torch.add}
_ACTIVATIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
# what runs for kinds of nodes whose steps have nothing more to say
_TOLD = {"same": "nothing to compute", "mean": "means", "add": "sum", "max_pool": "max pooling"}
_DROPOUTS = {F.dropout, F.dropout2d}


@dataclass
class Piece:
    """Steps that run as one op.

    ``inputs`` and ``outputs`` are nodes; ``layers`` the numbers of its steps; ``told`` says what runs for a
    node.
    """

    nodes: list[fx.Node]
    steps: list[Step] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    layers: list[tuple[Callable[[], Layer], dict[str, Constant]]] = field(default_factory=list)
    told: dict[fx.Node, str] = field(default_factory=dict)


@dataclass
class Facts:
    """What is known of the nodes of a graph.

    ``shapes`` are those of one example; ``flat`` the nodes that are vectors whatever the size of the images;
    ``kinds`` the step that each node is, ``reasons`` why others are none.
    """

    shapes: dict[fx.Node, torch.Size]
    flat: set[fx.Node] = field(default_factory=set)
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)

    def learn(self, captured: Captured) -> None:
        for node in captured.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr"):
                kind = None
            else:
                try:
                    kind = classify(captured, node, self)
                    self.kinds[node] = kind
                except Unsupported as error:
                    kind = None
                    self.reasons[node] = str(error)
            if (
                kind == "mean"
                or (kind in ("same", "add") and node.args[0] in self.flat)
                or len(self.shapes.get(node, ())) == 2
            ):
                self.flat.add(node)


@dataclass(frozen=True)
class _Chain:
    """A layer and what of its followers is computed with it."""

    layer: Convolution
    norms: tuple[nn.Module, ...]
    skip: fx.Node | None
    activation: int
    last: fx.Node


class Lowering:
    """Turns the nodes of one piece into steps, in their order.

    Raises:
        Unsupported: by `lower`, for a node that has no kernel here.
    """

    def __init__(self, captured: Captured, facts: Facts, nodes: list[fx.Node]) -> None:
        self.captured, self.shapes, self.flat = captured, facts.shapes, facts.flat
        self.kinds = facts.kinds
        self.piece = Piece(nodes)
        self.values: dict[fx.Node, Value] = {}
        self.order = {node: i for i, node in enumerate(captured.graph.nodes)}
        self.inside = set(nodes)
        self.absorbed: set[fx.Node] = set()

    def run(self) -> Piece:
        for node in self.piece.nodes:
            if node not in self.absorbed:
                self.lower(node)
        for node in self.piece.nodes:
            if any(user not in self.inside for user in node.users):
                self._export(node)
        self._stream()
        self._halos()
        return self.piece

    # --- values

    def _value(self, node: fx.Node) -> Value:
        """The value of ``node``; that of another piece is imported."""
        if node not in self.values:
            shape = self.shapes[node]
            value = Value(shape[1], node not in self.flat)
            self._step("import", what="input", tensor=self._input(node), in_channels=shape[1], output=value)
            self.values[node] = value
        return self.values[node]

    def _input(self, node: fx.Node) -> int:
        if node not in self.piece.inputs:
            self.piece.inputs.append(node)
        return self.piece.inputs.index(node)

    def _step(self, kind: str, what: str = "", **fields) -> Step:
        output = fields.get("output")
        if isinstance(output, Value):
            fields.setdefault("out_channels", output.channels)
        step = Step(kind, fields, what)
        if isinstance(output, Value):
            output.made_by = step
        self.piece.steps.append(step)
        return step

    def _pooled(self, value: Value, bins: int) -> Value:
        """The means of ``value``, from the step that makes it if that makes no others yet."""
        if bins in value.pooled:
            return value.pooled[bins]
        pooled = Value(bins * bins * padded(value.channels), False, value.scale)
        value.pooled[bins] = pooled
        if value.made_by.fields.get("pooled") is None and value.made_by.kind != "linear":
            value.made_by.fields |= {"pooled": pooled, "bins": bins}
        else:
            self._step(
                "pool", input=value, out_channels=value.channels, pooled=pooled, bins=bins, what="means"
            )
        return pooled

    def _export(self, node: fx.Node) -> None:
        value = self.values[node]
        self._step(
            "export",
            what="output",
            input=value,
            tensor=len(self.piece.outputs),
            out_channels=self.shapes[node][1],
            kernel_h=int(len(self.shapes[node]) == 4),
        )
        self.piece.outputs.append(node)

    # --- nodes

    def lower(self, node: fx.Node) -> None:
        kind = self.kinds[node]
        getattr(self, f"_lower_{kind}")(node)
        if kind in _TOLD:
            self.piece.told[node] = _TOLD[kind]

    def _lower_same(self, node: fx.Node) -> None:
        self.values[node] = self._value(node.args[0])

    def _lower_mean(self, node: fx.Node) -> None:
        self.values[node] = self._pooled(self._value(node.args[0]), 1)

    def _lower_add(self, node: fx.Node) -> None:
        left, right = node.args
        self._elementwise(node, self._value(left), self._value(right))

    def _elementwise(self, node: fx.Node, left: Value, right: Value) -> None:
        last, activation = node, 0
        user = self._only_user(node)
        if user is not None and classify_activation(self.captured, user) is not None:
            last, activation = user, classify_activation(self.captured, user)
            self.absorbed.add(user)
        output = Value(left.channels, left.image, left.scale)
        self._step("add", what="sum", input=left, skip=right, output=output, activation=activation)
        self.values[node] = self.values[last] = output

    def _lower_max_pool(self, node: fx.Node) -> None:
        module = self.captured.module(node)
        input = self._value(node.args[0])
        geometry = max_pool_geometry(module)
        output = Value(input.channels, True, input.scale * max(geometry.stride))
        self._step("max_pool", what="max pooling", input=input, output=output, **geometry.fields())
        self.values[node] = output

    def _lower_layer(self, node: fx.Node) -> None:
        chain = self._chain(node)
        layer, source = chain.layer, node.args[0]
        coefficients = None
        fields: dict[str, object] = {}
        if layer.branch is not None:
            coefficients = self._branch(layer, source)
            fields = {
                "coefficients": coefficients,
                "lam_channels": padded(layer.branch.lam_channels),
                "latent": layer.branch.latent,
            }
        kind = self._kind(layer, source)
        fields |= {"in_channels": layer.in_channels, "activation": chain.activation}
        if kind != "linear":
            fields |= layer.geometry.fields()
        if kind == "stem":
            input_scale = 1
            fields["tensor"] = self._input(source)
        else:
            input = self._value(source)
            input_scale = input.scale
            fields["input"] = input
        if chain.skip is not None:
            fields["skip"] = self._value(chain.skip)
        output = Value(layer.out_channels, kind != "linear", input_scale * max(layer.geometry.stride))
        step = self._step(kind, what=self._told(chain, kind), output=output, **fields)
        self.piece.told[node] = step.what

        def read() -> Layer:
            numbers = layer.read()
            for norm in chain.norms:
                numbers = numbers.normalised(norm)
            return _in_order(numbers, kind, layer)

        self._constants(read, [step] if coefficients is None else [step, coefficients.made_by])
        self.values[chain.last] = output

    @staticmethod
    def _told(chain: _Chain, kind: str) -> str:
        parts = [f"{chain.layer.what} {'convolution of the input' if kind == 'stem' else kind}"]
        parts += ["norm"] if chain.norms else []
        parts += ["sum"] if chain.skip is not None else []
        names = {code: name for name, code in ACTIVATIONS.items()}
        parts += [names[chain.activation]] if chain.activation else []
        return ", ".join(parts)

    def _kind(self, layer: Convolution, source: fx.Node) -> str:
        taps = layer.in_channels * layer.geometry.kernel[0] * layer.geometry.kernel[1]
        if (
            layer.kind == "dense"
            and layer.branch is None
            and source not in self.values
            and layer.in_channels < BLOCK
            and taps <= LAYOUT["max_stem_taps"]
        ):
            return "stem"
        return layer.kind

    def _branch(self, layer: Convolution, source: fx.Node) -> Value:
        branch, input = layer.branch, self._value(source)
        if input.image:
            pooled = self._pooled(input, branch.bins)
            inputs = pooled.channels
        else:
            pooled, inputs = input, padded(layer.in_channels)
        coefficients = Value(branch.coefficients(), False, input.scale)
        self._step(
            "branch",
            what="branch",
            input=pooled,
            in_channels=inputs,
            output=coefficients,
            hidden=branch.hidden,
            gate_code=branch.gate_code,
            lam_code=branch.lam_code,
            lam_channels=padded(branch.lam_channels),
        )
        return coefficients

    def _constants(self, read: Callable[[], Layer], steps: list[Step]) -> None:
        places: dict[str, Constant] = {}
        for name, numbers in read().pack().items():
            owner = steps[-1] if name.removesuffix("_bias") in ("squeeze", "gate", "expand") else steps[0]
            places[name] = owner.fields[name] = Constant(numbers.numel())
        self.piece.layers.append((read, places))

    # --- what goes together

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0] in self.inside else None

    def _chain(self, node: fx.Node) -> _Chain:
        layer = layer_of(self.captured, node)
        last, norms, skip, activation = node, [], None, layer.activation
        user = self._only_user(last)
        while user is not None and not activation:
            module = self.captured.module(user) if user.op == "call_module" else None
            if module is not None and layers.is_identity(module):
                pass
            elif module is not None and layers.is_norm(module) and skip is None:
                norms.append(module)
            elif layer.kind == "dense" and skip is None and self._is_sum(user, last, node):
                skip = user.args[1] if user.args[0] is last else user.args[0]
            elif classify_activation(self.captured, user) is not None:
                activation = classify_activation(self.captured, user)
            else:
                break
            self.absorbed.add(user)
            last = user
            user = self._only_user(last)
        return _Chain(layer, tuple(norms), skip, activation, last)

    def _is_sum(self, user: fx.Node, operand: fx.Node, first: fx.Node) -> bool:
        """Whether ``user`` adds to ``operand`` what is known before ``first`` is computed."""
        if not is_sum(user) or self.shapes[user] != self.shapes[operand]:
            return False
        other = user.args[1] if user.args[0] is operand else user.args[0]
        known = other in self.values or other not in self.inside
        earlier = self.order[other] < self.order[first]
        return other is not operand and known and earlier and self.shapes[other] == self.shapes[operand]

    def _stream(self) -> None:
        """A dense layer that only a depthwise one reads is computed row by row, within that."""
        readers: dict[int, list[Step]] = {}
        for step in self.piece.steps:
            for name in ("input", "skip", "coefficients"):
                value = step.fields.get(name)
                if isinstance(value, Value):
                    readers.setdefault(id(value), []).append(step)
        for step in self.piece.steps:
            if step.kind not in ("dense", "stem") or step.fields.get("skip") is not None:
                continue
            output = step.fields["output"]
            found = readers.get(id(output), [])
            if len(found) == 1 and found[0].kind == "depthwise" and step.fields.get("pooled") is None:
                step.fields["streamed"] = 1
                found[0].fields["producer"] = step
                for node, what in self.piece.told.items():
                    if what is step.what:
                        self.piece.told[node] = f"{what}; row by row within the depthwise layer that reads it"

    def _halos(self) -> None:
        """Convolutions read beyond the edges of their input, but for those that copy it."""
        for step in self.piece.steps:
            if step.kind == "dense":
                input, padding = step.fields["input"], (step.fields["padding_h"], step.fields["padding_w"])
                input.halo = tuple(map(max, input.halo, padding))


def _in_order(numbers: Layer, kind: str, layer: Convolution) -> Layer:
    """With the columns of W0 in the order in which ``kind`` reads them."""
    if kind == "stem":  # channels outermost
        taps = layer.geometry.kernel[0] * layer.geometry.kernel[1]
        numbers.weight = numbers.weight.unflatten(1, (taps, layer.in_channels)).transpose(1, 2).flatten(1)
    return numbers


def is_sum(node: fx.Node) -> bool:
    if node.op == "call_function":
        right = node.target in _ADDITIONS and not node.kwargs
    else:
        right = node.op == "call_method" and node.target in ("add", "add_") and not node.kwargs
    return right and len(node.args) == 2 and all(isinstance(operand, fx.Node) for operand in node.args)


def classify_activation(captured: Captured, node: fx.Node) -> int | None:
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


def layer_of(captured: Captured, node: fx.Node) -> Convolution:
    module = captured.module(node)
    return layers.convolution_of(module, captured.recipe(module))


def _is_mean(node: fx.Node, shape: torch.Size, input: torch.Size) -> bool:
    """Whether ``node`` is the mean over all pixels, with or without two dimensions of one."""
    return len(input) == 4 and shape[:2] == input[:2] and shape.numel() == input[0] * input[1]


def classify(captured: Captured, node: fx.Node, facts: Facts) -> str:
    """Which kind of step computes ``node``.

    Raises:
        Unsupported: none does.
    """
    shapes = facts.shapes
    inputs = [operand for operand in node.all_input_nodes if operand in shapes]
    if (
        node not in shapes
        or len(shapes[node]) not in (2, 4)
        or not inputs
        or len(inputs) != len(node.all_input_nodes)
    ):
        raise Unsupported("no image and no vector of each sample")
    source = shapes[inputs[0]]
    if len(source) not in (2, 4):
        raise Unsupported(f"it reads a tensor of {len(source)} dimensions")
    if _changes_what_others_read(captured, node):
        raise Unsupported("it changes its input in place, which others read too")
    if node.op == "call_module":
        module = captured.module(node)
        if module in captured.opaque:
            raise Unsupported(captured.opaque[module])
        if layers.is_identity(module) and not layers.is_altered(module):
            return "same"
        if type(module) is nn.Flatten and inputs[0] in facts.flat and source[:2] == shapes[node]:
            return "same"
        if type(module) is nn.AdaptiveAvgPool2d and _is_mean(node, shapes[node], source):
            return "mean"
        if type(module) is nn.MaxPool2d and not layers.is_altered(module):
            max_pool_geometry(module)
            return "max_pool"
        if layers.activation_of(module) is not None or layers.is_norm(module):
            if _follows_layer(captured, node, facts):
                return "follower"
            raise Unsupported(f"{type(module).__name__} behind no layer that could take it in")
        layer = layer_of(captured, node)
        if (layer.kind == "linear") != (len(source) == 2):
            raise Unsupported(f"a linear layer on an image of shape {tuple(source)}")
        return "layer"
    if is_sum(node) and shapes[node] == source == shapes[inputs[-1]]:
        return "add"
    arguments = (*node.args[1:], *node.kwargs.values())
    if (node.op == "call_method" and node.target == "mean") or node.target is torch.mean:
        dims = arguments[0] if arguments else None
        if (
            dims is not None
            and sorted(d % 4 for d in dims) == [2, 3]
            and _is_mean(node, shapes[node], source)
        ):
            return "mean"
    if node.target is F.adaptive_avg_pool2d and _is_mean(node, shapes[node], source):
        return "mean"
    if node.target in (torch.flatten, "flatten") and inputs[0] in facts.flat and source[:2] == shapes[node]:
        return "same"
    if node.target in _DROPOUTS and node.kwargs.get("training", True) is False:
        return "same"
    if classify_activation(captured, node) is not None and _follows_layer(captured, node, facts):
        return "follower"
    raise Unsupported("no kernel here computes it")


def _follows_layer(captured: Captured, node: fx.Node, facts: Facts) -> bool:
    """Whether a layer, or a sum, takes ``node`` in: nobody else reads what is between them."""
    norm = node.op == "call_module" and layers.is_norm(captured.module(node))
    before = node.args[0]
    while len(before.users) == 1:
        kind = facts.kinds.get(before)
        if kind == "layer":
            return not (layer_of(captured, before).activation and norm)
        if kind == "add":
            return not norm
        if kind == "follower":
            if classify_activation(captured, before) is not None:
                return False
        elif kind != "same":
            return False
        before = before.args[0]
    return False


def _changes_what_others_read(captured: Captured, node: fx.Node) -> bool:
    in_place = node.target is operator.iadd or (
        node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
    )
    if node.op == "call_module":
        in_place = bool(getattr(captured.module(node), "inplace", False))
    in_place = in_place or node.kwargs.get("inplace") is True
    return in_place and len(node.all_input_nodes[0].users) > 1
