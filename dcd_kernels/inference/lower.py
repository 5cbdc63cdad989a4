# SPDX-License-Identifier: BSD-3-Clause
"""From a network's data flow to steps: each layer takes in what follows it, as far as one kernel can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from dcd_kernels.arguments import ACTIVATIONS

from . import layers
from .capture import Captured
from .classify import Facts, activation_code, is_sum, layer_of, max_pool_geometry
from .layers import Convolution
from .pack import Layer, Packed, filtered, size_of
from .program import BLOCK, LAYOUT, Constant, Step, Value, padded

# what runs for kinds of nodes whose steps have nothing more to say
_TOLD = {"same": "nothing to compute", "mean": "means", "add": "sum", "max_pool": "max pooling"}


@dataclass
class Piece:
    """Steps that run as one op.

    ``inputs`` and ``outputs`` are nodes; ``layers`` the numbers of its steps, packed; ``told`` says what runs
    for a node; ``narrow``: it is in bfloat16.
    """

    nodes: list[fx.Node]
    narrow: bool = False
    steps: list[Step] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    layers: list[tuple[Callable[[], Packed], dict[str, Constant]]] = field(default_factory=list)
    told: dict[fx.Node, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Chain:
    """A layer and what of its followers is computed with it."""

    layer: Convolution
    norms: tuple[nn.Module, ...]
    skip: fx.Node | None
    activation: int
    last: fx.Node


class Alone(Exception):
    """A node that was to be computed with the one before it and cannot be."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(str(node))
        self.node = node


class Lowering:
    """Turns the nodes of one piece into steps, in their order.

    Raises:
        Alone: by `run`, for a norm or an activation that no layer of this piece takes in.
    """

    def __init__(self, captured: Captured, facts: Facts, nodes: list[fx.Node]) -> None:
        self.captured, self.facts = captured, facts
        self.shapes, self.flat = facts.shapes, facts.flat
        self.kinds = facts.kinds
        self.piece = Piece(nodes, facts.dtype is torch.bfloat16)
        self.values: dict[fx.Node, Value] = {}
        self.images: dict[fx.Node, Value] = {}
        self.order = {node: i for i, node in enumerate(captured.graph.nodes)}
        self.inside = set(nodes)
        self.absorbed: set[fx.Node] = set()
        self.made: dict[Step, fx.Node] = {}  # the layers that steps are

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
            channels = self.facts.channels(node)
            value = Value(channels, node not in self.flat)
            self._step("import", what="input", tensor=self._input(node), in_channels=channels, output=value)
            self.values[node] = value
        return self.values[node]

    def _image(self, node: fx.Node) -> Value:
        """The value of ``node`` for a kernel that reads images, of one pixel where it is a vector."""
        value = self._value(node)
        if value.image or not self.piece.narrow:
            return value
        if node not in self.images:
            image = Value(value.channels, True, value.scale)
            self._step("add", what="rounding", input=value, output=image)
            self.images[node] = image
        return self.images[node]

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
            out_channels=self.facts.channels(node),
            rank=self.facts.rank(node),
        )
        self.piece.outputs.append(node)

    # --- nodes

    def lower(self, node: fx.Node) -> None:
        kind = self.kinds[node]
        getattr(self, f"_lower_{kind}")(node)
        if kind in _TOLD:
            self.piece.told[node] = _TOLD[kind]

    def _lower_follower(self, node: fx.Node) -> None:
        raise Alone(node)

    def _lower_same(self, node: fx.Node) -> None:
        self.values[node] = self._value(node.args[0])

    def _lower_mean(self, node: fx.Node) -> None:
        value = self._value(node.args[0])
        self.values[node] = self._pooled(value, 1) if value.image else value

    def _lower_add(self, node: fx.Node) -> None:
        left, right = node.args
        self._elementwise(node, self._value(left), self._value(right))

    def _elementwise(self, node: fx.Node, left: Value, right: Value) -> None:
        last, activation = node, 0
        user = self._only_user(node)
        if user is not None and activation_code(self.captured, user) is not None:
            last, activation = user, activation_code(self.captured, user)
            self.absorbed.add(user)
        output = Value(left.channels, left.image, left.scale)
        self._step("add", what="sum", input=left, skip=right, output=output, activation=activation)
        self.values[node] = self.values[last] = output

    def _lower_max_pool(self, node: fx.Node) -> None:
        module = self.captured.module(node)
        input = self._image(node.args[0])
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
                "blocks": layer.branch.blocks,
                "latent_kernel": layer.branch.latent_kernel,
            }
        kind = self._kind(chain, source)
        fields |= {"in_channels": layer.in_channels, "activation": chain.activation}
        if kind != "linear":
            fields |= layer.geometry.fields()
        if kind == "stem":
            input_scale = 1
            fields["tensor"] = self._input(source)
        else:
            input = self._value(source) if kind == "linear" else self._image(source)
            input_scale = input.scale
            fields["input"] = input
            # in bf16 the sums of the inputs would be rounded
            fields["winograd"] = int(kind == "dense" and layer.filters_minimally and not self.piece.narrow)
        if chain.skip is not None:
            fields["skip"] = self._value(chain.skip)
        output = Value(layer.out_channels, kind != "linear", input_scale * max(layer.geometry.stride))
        how = "filtered (Winograd)" if fields.get("winograd") else kind
        step = self._step(kind, what=self._told(chain, how), output=output, **fields)
        self.piece.told[node] = step.what
        self.made[step] = node

        narrow = self.piece.narrow

        def pack() -> Packed:
            numbers = layer.read()
            for norm in chain.norms:
                numbers = numbers.normalised(norm)
            return _in_order(numbers, step).pack(narrow, kind == "depthwise")

        self._constants(pack, [step] if coefficients is None else [step, coefficients.made_by])
        self.values[chain.last] = output

    @staticmethod
    def _told(chain: _Chain, how: str) -> str:
        parts = [f"{chain.layer.what} {'convolution of the input' if how == 'stem' else how}"]
        parts += ["norm"] if chain.norms else []
        parts += ["sum"] if chain.skip is not None else []
        names = {code: name for name, code in ACTIVATIONS.items()}
        parts += [names[chain.activation]] if chain.activation else []
        return ", ".join(parts)

    def _kind(self, chain: _Chain, source: fx.Node) -> str:
        layer = chain.layer
        taps = layer.in_channels * layer.geometry.kernel[0] * layer.geometry.kernel[1]
        if (
            layer.kind == "dense"
            and layer.branch is None
            and chain.skip is None
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

    def _constants(self, pack: Callable[[], Packed], steps: list[Step]) -> None:
        places: dict[str, Constant] = {}
        for name, numbers in pack().items():
            owner = steps[-1] if name.removesuffix("_bias") in ("squeeze", "gate", "expand") else steps[0]
            places[name] = owner.fields[name] = Constant(size_of(numbers))
        self.piece.layers.append((pack, places))

    # --- what goes together

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0] in self.inside else None

    def _chain(self, node: fx.Node) -> _Chain:
        layer = layer_of(self.captured, node, self.facts)
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
            elif activation_code(self.captured, user) is not None:
                activation = activation_code(self.captured, user)
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
        pixels = self.facts.pixels
        alike = (
            self.shapes[other] == self.shapes[operand]
            and other not in self.flat
            and (other in pixels) == (operand in pixels)
        )
        return other is not operand and known and earlier and alike

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
            if step.fields.get("winograd"):  # by tiles of two rows
                continue
            output = step.fields["output"]
            found = readers.get(id(output), [])
            if len(found) == 1 and found[0].kind == "depthwise" and step.fields.get("pooled") is None:
                step.fields["streamed"] = 1
                found[0].fields["producer"] = step
                self.piece.told[self.made[step]] += "; row by row within the depthwise layer that reads it"

    def _halos(self) -> None:
        """Convolutions read beyond the edges of their input, but for those that copy it."""
        for step in self.piece.steps:
            if step.kind == "dense":
                input, padding = step.fields["input"], (step.fields["padding_h"], step.fields["padding_w"])
                input.halo = tuple(map(max, input.halo, padding))


def _in_order(numbers: Layer, step: Step) -> Layer:
    """With the columns of W0 in the order in which ``step`` reads them."""
    fields = step.fields
    numbers.run = fields["in_channels"]
    if step.kind == "stem":  # channels outermost
        taps = fields["kernel_h"] * fields["kernel_w"]
        numbers.weight = numbers.weight.unflatten(1, (taps, -1)).transpose(1, 2).flatten(1)
        numbers.run = fields["kernel_w"] if fields["dilation_w"] == 1 else 1
    elif fields.get("winograd"):
        numbers.weight = filtered(numbers.weight)
    return numbers
