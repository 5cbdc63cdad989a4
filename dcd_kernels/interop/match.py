# SPDX-License-Identifier: BSD-3-Clause
"""Finds ``P norm₂(Φ norm₁(Qᵀx)) + λ⊙static`` in the data flow of a module's forward.

The product with Φ is where the search begins. Behind it are the first norm, if there is one, and the
projection Q; ahead of it the second norm, the latent residual, the expansion P, and the sum with a static
output and its λ. Names and classes of the module play no part, only what flows where.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import layers

Shapes = dict[fx.Node, torch.Size]

_LIKE = {"expand_as", "view_as", "reshape_as"}  # they read the shape of their argument
_VIEWS = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "view_as",
    "reshape_as",
}
_VIEW_FUNCTIONS = {torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze}
_EXPANSIONS = {"expand", "expand_as"}
_SIZES = {"size", "dim", "numel"}
_ADD = ({operator.add, operator.iadd, torch.add}, {"add", "add_", "__add__", "__radd__", "__iadd__"})
_MULTIPLY = ({operator.mul, operator.imul, torch.mul}, {"mul", "mul_", "__mul__", "__rmul__", "__imul__"})
_MATMUL = (
    {operator.matmul, torch.matmul, torch.bmm, torch.einsum, F.linear},
    {"matmul", "bmm", "__matmul__"},
)
_IN_PLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv}


class NoMatch(Exception):
    """Something that looks like the decomposition and is not; the message says what."""


@dataclass(frozen=True)
class Match:
    """Where the parts of one dynamic residual are in a graph.

    ``output`` is the node whose value the fused call replaces: the sum with the static output where there is
    one, else P's own. ``phi`` gives (N, L, L), transposed where ``transposed``. ``static`` is the node of the
    static output and ``conv`` the module that made it, where it read the same ``input``. Modules are given by
    name, ``identities`` those that hand on what they read. ``ranks`` are those of the latent's tensors, which
    are not formed any more; ``absorbed`` are all nodes that the fused call replaces.
    """

    output: fx.Node
    input: fx.Node
    phi: fx.Node
    transposed: bool
    q: str
    p: str
    norm1: str | None
    norm2: str | None
    latent_residual: bool
    lam: fx.Node | None = None
    static: fx.Node | None = None
    conv: str | None = None
    identities: tuple[str, ...] = ()
    ranks: dict[fx.Node, int] = field(default_factory=dict)
    absorbed: frozenset[fx.Node] = field(default_factory=frozenset)


def is_product(node: fx.Node) -> bool:
    """Whether ``node`` is a matrix product of two tensors, as that of Φ and the latent is."""
    return _is(node, _MATMUL) and sum(isinstance(a, fx.Node) for a in node.args) == 2


def find(module: nn.Module, graph: fx.Graph, shapes: Shapes) -> list[Match]:
    """All dynamic residuals of ``graph``, in its order.

    Raises:
        NoMatch: there is none; the message is that of the product that came nearest.
    """
    found, reasons = [], []
    for node in graph.nodes:
        if is_product(node):
            try:
                found.append(_Matcher(module, shapes).around(node))
            except NoMatch as error:
                reasons.append(str(error))
    if not found:
        raise NoMatch(reasons[-1] if reasons else "there is no product of a Φ with a latent in its forward")
    return found


def _is(node: object, kinds: tuple[set[Callable], set[str]]) -> bool:
    if not isinstance(node, fx.Node):
        return False
    functions, methods = kinds
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _VIEWS
    if node.op != "call_function":
        return False
    return node.target in _VIEW_FUNCTIONS or (node.target is operator.getitem and _keeps_all(node.args[1]))


def _keeps_all(index: object) -> bool:
    """Whether ``tensor[index]`` is all of it, with more dimensions at most."""
    entries = index if isinstance(index, tuple) else (index,)
    return all(entry in (None, Ellipsis, slice(None)) for entry in entries)


def _is_size(node: fx.Node, of: fx.Node) -> bool:
    """Whether ``node`` asks for the shape of ``of`` and for nothing else."""
    if node.op == "call_method":
        return node.target in _SIZES or (node.target in _LIKE and node.args[0] is not of)
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


def _changes_in_place(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    return node.op == "call_function" and (
        node.target in _IN_PLACE
        or node.kwargs.get("inplace") is True
        or getattr(node.target, "__name__", "").endswith("_")
    )


def _users(node: fx.Node) -> list[fx.Node]:
    """Those that read the values of ``node``, not only its shape."""
    return [user for user in node.users if not _is_size(user, node)]


class _Matcher:
    """Walks from one product with Φ outwards; what it passes is absorbed."""

    def __init__(self, module: nn.Module, shapes: Shapes) -> None:
        self.module, self.shapes = module, shapes
        self.absorbed: set[fx.Node] = set()
        self.identities: list[str] = []

    def around(self, product: fx.Node) -> Match:
        phi, latent, transposed = self._operands(product)
        self.absorbed.add(product)
        batch, channels = self.shapes[product][:2]
        self.latent_shape = (batch, channels)
        self._same_latent(latent)

        norm1, source = None, self._back(latent)
        normalised = source
        if self._calls(source, layers.is_norm):
            norm1 = source.target
            self.absorbed.add(source)
            source = self._back(source.args[0])
        if not self._calls(source, layers.is_projection):
            found = f", but {self._described(source)}"
            raise NoMatch(f"what Φ is multiplied with is no 1×1 projection, nor a norm of one{found}")
        self.absorbed.add(source)
        q, input = source.target, source.args[0]

        norm2, ahead = None, self._ahead(product, residual=True)
        if len(ahead) == 1 and self._calls(ahead[0], layers.is_norm):
            norm2 = ahead[0].target
            self.absorbed.add(ahead[0])
            ahead = self._ahead(ahead[0], residual=True)
        latent_residual = len(ahead) == 1 and _is(ahead[0], _ADD)
        if latent_residual:
            self._latent_residual(ahead[0], normalised)
            ahead = self._ahead(ahead[0])
        if len(ahead) != 1 or not self._calls(ahead[0], layers.is_expansion):
            raise NoMatch("what becomes of Φ times the latent is more, or other, than a 1×1 expansion")
        expansion = ahead[0]
        self.absorbed.add(expansion)
        ranks = {len(self.shapes[input]), *(layers.rank(self._module(n)) for n in (source, expansion))}
        if len(ranks) > 1 or self.shapes[expansion][2:] != self.shapes[source][2:]:
            raise NoMatch("projection and expansion are of different ranks")
        self._no_other_readers(source, normalised, expansion, input)
        match = Match(expansion, input, phi, transposed, q, expansion.target, norm1, norm2, latent_residual)
        latents = self.absorbed - {expansion}
        match = replace(
            match,
            identities=tuple(self.identities),
            ranks={node: len(self.shapes[node]) for node in latents},
        )
        return self._with_static(match, expansion)

    def _operands(self, product: fx.Node) -> tuple[fx.Node, fx.Node, bool]:
        if product.kwargs:
            raise NoMatch("a product with keyword arguments")
        if product.target is not torch.einsum:
            phi, latent = product.args[:2]
            if len(self.shapes.get(phi, ())) != 3:
                raise NoMatch("the product with the latent is not by a (N, L, L) matrix")
            return phi, latent, False
        equation, *operands = product.args
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        terms = inputs.split(",")
        if not arrow or len(terms) != 2 or "." in equation or len(output) < 2:
            raise NoMatch(f"einsum({equation!r}) is not a product by Φ")
        batch, row = output[:2]
        for term, other, phi, latent in (
            (terms[0], terms[1], operands[0], operands[1]),
            (terms[1], terms[0], operands[1], operands[0]),
        ):
            column = other[1:2]
            if other == batch + column + output[2:] and column not in output:
                if term == batch + row + column:
                    return phi, latent, False
                if term == batch + column + row:
                    return phi, latent, True
        raise NoMatch(f"einsum({equation!r}) is not a product by Φ")

    def _described(self, node: fx.Node) -> str:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return f"{node.target}, {self._module(node)}"
        return str(node)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(node.target)

    def _calls(self, node: object, kind: Callable[[nn.Module], bool]) -> bool:
        return (
            isinstance(node, fx.Node)
            and node.op == "call_module"
            and len(node.args) == 1
            and not node.kwargs
            and isinstance(node.args[0], fx.Node)
            and kind(self._module(node))
        )

    def _same_latent(self, node: fx.Node) -> None:
        if tuple(self.shapes.get(node, ())[:2]) != self.latent_shape:
            raise NoMatch("the latent changes its channels on the way")

    def _back(self, node: fx.Node) -> fx.Node:
        """What ``node`` is a view of."""
        while isinstance(node, fx.Node) and self._hands_on(node):
            self.absorbed.add(node)
            node = node.args[0]
            self._same_latent(node)
        return node

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether ``node`` is a view of its argument, or what nn.Identity makes of it."""
        if self._calls(node, layers.is_identity):
            self.identities.append(node.target)
            return True
        return _is_view(node)

    def _ahead(self, node: fx.Node, residual: bool = False) -> list[fx.Node]:
        """Who reads ``node``, or views of it that keep its channels."""
        self._same_latent(node)
        readers = []
        for user in _users(node):
            if self._hands_on(user):
                self.absorbed.add(user)
                readers += self._ahead(user, residual)
            else:
                readers.append(user)
        return readers

    def _latent_residual(self, total: fx.Node, normalised: fx.Node) -> None:
        if total.kwargs or len(total.args) != 2:
            raise NoMatch("a latent residual with a factor")
        self.absorbed.add(total)
        sides = [self._root(side) for side in total.args]
        if normalised not in sides:
            raise NoMatch("what is added to Φ times the latent is another tensor than the latent")

    def _root(self, node: object) -> object:
        while isinstance(node, fx.Node) and self._hands_on(node) and self._keeps_channels(node):
            self.absorbed.add(node)
            node = node.args[0]
        return node

    def _keeps_channels(self, node: fx.Node) -> bool:
        return tuple(self.shapes.get(node, ())[:2]) == self.latent_shape

    def _no_other_readers(
        self, source: fx.Node, normalised: fx.Node, expansion: fx.Node, input: fx.Node
    ) -> None:
        """Whatever is inside is not formed any more, so nobody else may read it."""
        for node in self.absorbed - {expansion}:
            if any(user not in self.absorbed for user in _users(node)):
                raise NoMatch("the latent is read by others too")
            like = [user for user in node.users if user.target in _LIKE and user not in self.absorbed]
            if any(_is_size(user, node) for user in like):
                raise NoMatch("another tensor gets the shape of the latent")
            if _changes_in_place(node) and len(_users(node.args[0])) > 1:
                raise NoMatch("a tensor that is changed in place is read again")
        if any(_changes_in_place(user) for user in input.users):
            raise NoMatch("the input is changed in place")

    def _shape_escapes(self, node: fx.Node, absorbed: set[fx.Node]) -> bool:
        """Whether the shape of ``node`` decides about anything that is not absorbed too."""

        def decides(user: fx.Node) -> bool:
            if user in absorbed:
                return False
            number = user not in self.shapes and user.op in ("call_function", "call_method")
            return not number or any(decides(further) for further in user.users)

        return any(decides(user) for user in node.users if _is_size(user, node))

    def _with_static(self, match: Match, expansion: fx.Node) -> Match:
        """Takes the static output and λ in, where the sum with them is next."""
        shape = self.shapes[expansion]
        alone = replace(match, absorbed=frozenset(self.absorbed))
        users = _users(expansion)
        total = users[0] if len(users) == 1 else None
        if not _is(total, _ADD) or total.kwargs or len(total.args) != 2 or self.shapes[total] != shape:
            return alone
        other = total.args[1] if total.args[0] is expansion else total.args[0]
        if other is expansion or self.shapes.get(other) != shape:
            return alone
        if _changes_in_place(total) and total.args[0] is other and len(_users(other)) > 1:
            return alone
        absorbed = self.absorbed | {total}
        if self._shape_escapes(expansion, absorbed):
            return alone
        static, lam, between = self._scaled(other, shape, match.input, absorbed)
        absorbed |= between
        conv = None
        if self._reads(static, match.input) and len(_users(static)) == 1:
            conv = None if self._shape_escapes(static, absorbed) else static.target
        return replace(match, output=total, static=static, lam=lam, conv=conv, absorbed=frozenset(absorbed))

    def _scaled(
        self, node: fx.Node, shape: torch.Size, input: fx.Node, absorbed: set[fx.Node]
    ) -> tuple[fx.Node, fx.Node | None, set[fx.Node]]:
        """Static output, λ and the nodes between, where ``node`` is their product and read by nobody else."""
        unscaled = node, None, set()
        if not _is(node, _MULTIPLY) or node.kwargs or len(node.args) != 2 or len(_users(node)) != 1:
            return unscaled
        if not all(isinstance(argument, fx.Node) for argument in node.args):
            return unscaled
        # behind a linear layer both have one shape, and the layer is the one to be fused
        for static, lam in sorted(
            (node.args, node.args[::-1]), key=lambda pair: not self._reads(pair[0], input)
        ):
            if _changes_in_place(node) and (node.args[0] is not static or len(_users(static)) > 1):
                continue
            between = {node}
            while lam.op == "call_method" and lam.target in _EXPANSIONS and len(_users(lam)) == 1:
                between.add(lam)
                lam = lam.args[0]
            size = self.shapes.get(lam, torch.Size())
            per_channel = size[:2] == shape[:2] and size.numel() == shape[0] * shape[1]
            if (
                per_channel
                and len(size) == len(shape)
                and self.shapes.get(static) == shape
                and static is not lam
            ):
                if any(self._shape_escapes(inner, absorbed | between) for inner in between):
                    return unscaled
                return static, lam, between
        return unscaled

    def _reads(self, node: fx.Node, input: fx.Node) -> bool:
        return self._calls(node, layers.is_static) and node.args[0] is input
