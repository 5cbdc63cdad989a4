# SPDX-License-Identifier: BSD-3-Clause
"""A network as pieces that are one op each, and nodes between them that run as they are written."""

from __future__ import annotations

import contextlib
import copy
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .capture import Captured, _Root
from .classify import Facts
from .examples import Example
from .lower import Alone, Lowering, Piece
from .program import Constant, encode
from .watch import Watch

_network = torch.ops.dcd_kernels.network.default
_below_autograd = torch._C._AutoDispatchBelowAutograd
_ALIGNED = 16  # numbers in a cache line


def _on_large_pages(count: int) -> Tensor:
    """Zeros in memory of which a page is two megabytes, where the system has such pages.

    Weights are read from end to end at every call; with small pages, half of the time would go into finding
    them.
    """
    size = count * 4
    if size < 2**21 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=torch.float32, device="cpu")
    # shared memory, the default, has large pages on few systems
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32, count=count)


class Weights:
    """The constants of a piece."""

    def __init__(self, piece: Piece) -> None:
        self.layers = piece.layers
        end = 0
        for _, places in self.layers:
            for constant in places.values():
                constant.offset, end = end, end + -(-constant.size // _ALIGNED) * _ALIGNED
        self.size = end

    def pack(self) -> Tensor:
        packed = _on_large_pages(self.size)
        for pack, places in self.layers:
            for name, numbers in pack().items():
                constant: Constant = places[name]
                place = packed[constant.offset : constant.offset + constant.size]
                if numbers.dtype is torch.bfloat16:  # pairs
                    place = place.view(torch.bfloat16)
                place.copy_(numbers.flatten())
        return packed


def _described(watch: Watch) -> list[tuple]:
    return [(key, tensor.shape, tensor.dtype, tensor.device) for _, key, tensor in watch.places()]


class Plan:
    """How a network runs for inputs like the examples that it was made with."""

    def __init__(self, network: nn.Module, watch: Watch, examples: list[Example]) -> None:
        self.watch, self.state = watch, watch.renew()  # before anything is read
        self.described = _described(watch)
        self.captured = Captured(network, examples)
        self.root = _Root(network)
        example = examples[0]
        self.rank, self.dtype = example.input.dim(), example.input.dtype
        # torch.fx makes lists and dictionaries of its own of those that a forward returns
        self.form = None if isinstance(example.output, Tensor) else pytree.tree_structure(example.output)
        self.facts = Facts.of(self.captured, self.dtype)
        self.parts = self._divided()
        nodes = list(self.captured.graph.nodes)
        self.input = next(node for node in nodes if node.op == "placeholder")
        self.output = next(node for node in nodes if node.op == "output")
        only = self.parts[0] if len(self.parts) == 1 else None
        self.whole = only if isinstance(only, Part) and self.output.args[0] in only.piece.outputs else None

    def _divided(self) -> list[Part | fx.Node]:
        while True:
            try:
                return list(self._parts())
            except Alone as alone:
                self.facts.give_up(alone.node, "it is called apart from the layer that could take it in")

    def _parts(self) -> Iterator[Part | fx.Node]:
        run: list[fx.Node] = []
        for node in self.captured.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            if node in self.facts.kinds:
                if run and self.facts.batch(node) != self.facts.batch(run[0]):
                    yield from self._run_of(run)
                    run = []
                run.append(node)
                continue
            yield from self._run_of(run)
            run = []
            if node.op != "output":
                yield node

    def _run_of(self, run: list[fx.Node]) -> Iterator[Part | fx.Node]:
        """Neighbouring nodes as one piece, where there is a layer among them."""
        if any(self.facts.kinds[node] == "layer" for node in run):
            yield Part(Lowering(self.captured, self.facts, run).run())
            return
        for node in run:
            self.facts.reasons[node] = "no layer is next to it"
        yield from run

    def is_current(self) -> bool:
        """Whether no weight has changed since it was made."""
        return self.watch.state() == self.state

    def keeps_structure(self) -> bool:
        """Whether the steps are right for the tensors that the network has now, but for their numbers."""
        return _described(self.watch) == self.described

    def renewed(self) -> Plan:
        """The same steps with the numbers that the network has now."""
        plan = copy.copy(self)
        plan.state = self.watch.renew()
        plan.parts = [part.renewed() if isinstance(part, Part) else part for part in self.parts]
        plan.whole = plan.parts[0] if self.whole is not None else None
        return plan

    def reason(self, node: fx.Node) -> str:
        """What runs for ``node``, or why it runs as it is written."""
        if node in self.facts.reasons:
            return self.facts.reasons[node]
        for part in self.parts:
            if isinstance(part, Part) and node in part.piece.told:
                return part.piece.told[node]
        return "computed with the layer before it"

    def __call__(self, input: Tensor) -> object:
        if self.whole is not None:
            return self.whole([input])[0]
        with torch.no_grad():
            return self._interpreted(input)

    def _interpreted(self, input: Tensor) -> object:
        interpreter = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.captured.graph)
        values = interpreter.env
        values[self.input] = input
        for node in self.captured.graph.nodes:
            if node.op == "get_attr":
                values[node] = interpreter.run_node(node)
        for part in self.parts:
            if isinstance(part, Part):
                results = part([values[node] for node in part.piece.inputs])
                values.update(zip(part.piece.outputs, results, strict=True))
            else:
                values[part] = interpreter.run_node(part)
        result = fx.node.map_arg(self.output.args[0], values.__getitem__)
        if self.form is None:
            return result
        leaves = pytree.tree_leaves(result)
        return pytree.tree_unflatten(leaves, self.form) if len(leaves) == self.form.num_leaves else result


class Part:
    """A piece as arguments of the op."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.weights = Weights(piece)
        self.program = encode(piece.steps, piece.narrow)
        self.constants = self.weights.pack()

    def renewed(self) -> Part:
        part = copy.copy(self)
        part.constants = self.weights.pack()
        return part

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        with _below_autograd():
            return _network(inputs, self.constants, self.program)
