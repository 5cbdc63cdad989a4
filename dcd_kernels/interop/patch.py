# SPDX-License-Identifier: BSD-3-Clause
"""The forward of a patched instance: the module's own data flow with the dynamic residual in one call."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .. import extension
from ..backends import selection
from . import fused, layers, sequence, shortcut
from .branch import Branch
from .guards import Guards, Path, child, guard
from .match import Match
from .trace import Trace

_MARK = "dcd_recipe"  # attribute of the function that makes it ours
_SEQUENCE_MARK = "dcd_sequence"  # the same of a container
_PATCHED = ("forward", "_replicate_for_data_parallel")  # attributes of a patched instance

Found = list[tuple[Match, Branch | None]]
Program = Callable[..., object]


@dataclass(frozen=True)
class Recipe:
    """What a patched forward needs besides its module, which may be a copy of the one that was looked at.

    ``own`` is the class's forward. ``programs`` are two a mode: one that also makes λ and Φ in one call, if
    the branch is a known one, and one that leaves the branch as it is written. ``replaced`` are the modules
    that neither calls, and what each has to be for that; ``opened`` the containers that are not called;
    ``steps`` the modules of the branch with class and attributes, by mode. ``only`` are the fields of a
    `shortcut.Layer`, modules by name, where forward in inference is that and nothing besides.
    """

    own: Program
    programs: dict[bool, tuple[Program | None, Program]]
    arguments: int
    defaults: dict[str, object]
    guards: Guards
    replaced: tuple[tuple[Path, Callable[[nn.Module], bool]], ...]
    opened: tuple[Path, ...]
    steps: dict[bool, tuple[tuple[Path, type, dict[str, object]], ...]]
    only: tuple[str | int | bool | None, ...] | None
    summary: str

    @staticmethod
    def of(module: nn.Module, traces: dict[bool, Trace], found: dict[bool, Found]) -> Recipe:
        """The recipe for ``module`` with what was found in its traces."""
        replaced = {}
        for residual, _ in (*found[True], *found[False]):
            replaced[residual.q], replaced[residual.p] = layers.is_projection, layers.is_expansion
            for norm in (residual.norm1, residual.norm2):
                if norm is not None:
                    replaced[norm] = layers.is_norm
            replaced.update(dict.fromkeys(residual.identities, layers.is_identity))
        first = traces[False]
        programs, steps = {}, {}
        for mode, traced in traces.items():
            plain = [(residual, None) for residual, _ in found[mode]]
            known = any(branch is not None for _, branch in found[mode])
            whole = _program(traced, found[mode]) if known else None
            programs[mode] = whole, _program(traced, plain)
            steps[mode] = tuple(
                (tuple(name.split(".")), *kind)
                for _, branch in found[mode]
                if branch is not None
                for name, *kind in branch.steps
            )
        return Recipe(
            type(module).forward,
            programs,
            sum(node.op == "placeholder" for node in first.graph.nodes),
            first.defaults,
            guard(module),
            tuple((tuple(name.split(".")), fits) for name, fits in replaced.items()),
            tuple(tuple(name.split(".")) for name in first.opened),
            steps,
            _only(first, found[False]),
            "; ".join(map(_summary, found[False])),
        )

    def objection(self, module: nn.Module) -> str | None:
        """Why ``module`` has to run its own forward now; None for no reason."""
        if type(module).forward is not self.own:
            return "its class has another forward now"
        if layers.are_watched():
            return "there are global module hooks"
        changed = self.guards.change(module)
        if changed is not None:
            return f"{changed} changed since it was accelerated"
        for path, fits in self.replaced:
            part = child(module, path)
            if part is None or not fits(part):
                return f"{'.'.join(path)} is another kind of module now"
            if layers.is_altered(part):
                return f"{'.'.join(path)} has hooks or a forward of its own"
        for path in self.opened:
            part = child(module, path)
            if type(part) is not nn.Sequential or layers.is_altered(part):
                return f"{'.'.join(path)} has hooks or is another kind of module now"
        return None

    def keeps_branch(self, module: nn.Module) -> bool:
        """Whether the branch of ``module`` has to be called as it is written, if it ever has not."""
        mode = module.training
        for path, kind, attributes in self.steps[mode]:
            part = child(module, path)
            if type(part) is not kind or part.training is not mode or layers.is_altered(part):
                return True
            if attributes and any(part.__dict__.get(name) != value for name, value in attributes.items()):
                return True
        return False


def _only(trace: Trace, found: Found) -> tuple[str | int | bool | None, ...] | None:
    """What a `shortcut.Layer` has, if that is all of the forward that was traced."""
    if len(found) != 1 or found[0][1] is None:
        return None
    residual, branch = found[0]
    inputs = [node for node in trace.graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in trace.graph.nodes if node.op == "output")
    if output.args[0] is not residual.output or inputs != [residual.input] or residual.conv is None:
        return None
    parts = residual.conv, residual.p, residual.q, branch.squeeze, branch.gate_layer, branch.lam, branch.phi
    codes = branch.pool, branch.gate, branch.lam_activation
    return (*parts, *codes, residual.norm1, residual.norm2, residual.latent_residual)


def _shortcut(module: nn.Module, recipe: Recipe, input: Tensor) -> shortcut.Shortcut | None:
    """For the next calls like this one, if it was a single op."""
    guards = recipe.guards
    if not extension.LOADED or recipe.only is None or guards.values or selection.is_observed():
        return None

    layer = shortcut.layer_of(module, recipe.only)
    if not fused.is_one_call(input, layer):
        return None
    steps = [
        (child(module, path), name, value)
        for path, _, attributes in recipe.steps[False]
        for name, value in attributes.items()
    ]
    return shortcut.Shortcut(module, input, guards.plain, steps, layer)


def recipe_of(module: nn.Module) -> Recipe | None:
    """The recipe by which ``module`` is patched."""
    function = getattr(vars(module).get("forward"), "__func__", None)
    return getattr(function, _MARK, None)


def install(module: nn.Module, recipe: Recipe) -> None:
    """Patches ``module``: an attribute of the instance, a method of it, so that copies get their own."""
    programs, own, arguments, defaults = recipe.programs, recipe.own, recipe.arguments, recipe.defaults

    # Pickles under this name: a method is looked up in the class when it is loaded, which gives the class's
    # own forward, also where this package is not installed.
    def forward(self, *args, **kwargs):
        short = None if torch.compiler.is_compiling() else shortcut.find(self)
        if short is not None and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            output = short(args[0])
            if output is not None:
                return output
        plain = len(args) <= arguments and all(isinstance(arg, Tensor) for arg in (*args, *kwargs.values()))
        if not plain or (defaults and kwargs.keys() & defaults.keys()) or recipe.objection(self) is not None:
            return own(self, *args, **kwargs)
        whole, residual = programs[self.training]
        if whole is None or recipe.keeps_branch(self):
            return residual(self, *args, **kwargs)
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()) and len(args) == 1:
            shortcut.keep(self, _shortcut(self, recipe, args[0]))
        return whole(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(own)  # torch.export goes by the names of the arguments
    setattr(forward, _MARK, recipe)
    _bind(module, forward)


def is_sequence(module: nn.Module) -> bool:
    """Whether ``module`` is a patched container."""
    return hasattr(getattr(vars(module).get("forward"), "__func__", None), _SEQUENCE_MARK)


def install_sequence(module: nn.Sequential) -> None:
    """Patches a container, so that its norms run with the activations behind them."""

    # the name by which it pickles
    def forward(self, input):
        return sequence.run_within(self, input)

    setattr(forward, _SEQUENCE_MARK, True)
    _bind(module, forward)


def _bind(module: nn.Module, forward: Callable) -> None:
    module.forward = types.MethodType(forward, module)
    module._replicate_for_data_parallel = types.MethodType(_replicate_for_data_parallel, module)


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """DataParallel's replicas get the attributes of their original, methods bound to it included."""
    replica = type(self)._replicate_for_data_parallel(self)
    shortcut.forget(replica)
    for name in _PATCHED:
        setattr(replica, name, types.MethodType(vars(self)[name].__func__, replica))
    return replica


def remove(module: nn.Module) -> None:
    """Takes the patch off ``module``, if there is one."""
    shortcut.forget(module)
    if recipe_of(module) is not None or is_sequence(module):
        for name in _PATCHED:
            delattr(module, name)


def _summary(found: tuple[Match, Branch | None]) -> str:
    residual, branch = found
    latent = "norm₁(Qᵀx)" if residual.norm1 else "Qᵀx"
    text = f"norm₂(Φ {latent})" if residual.norm2 else f"Φ {latent}"
    text = f"P [{text} + latent]" if residual.latent_residual else f"P {text}"
    if residual.static is not None:
        static = "static" if residual.conv is None else f"{residual.conv}(x)"
        text = f"{'λ⊙' if residual.lam is not None else ''}{static} + {text}"
    return f"{text} fused" + (", and its branch" if branch is not None else "")


def _program(trace: Trace, found: Found) -> Program:
    """A function (module, \\*arguments) of the same data flow with every residual in one call."""
    graph = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(trace.graph, places))
    for match, branch in found:
        _replace(graph, places, match, branch)
    source = graph.python_code("self")
    scope = dict(source.globals)
    exec(compile(source.src, "<accelerated forward>", "exec"), scope)
    return scope["forward"]


def _replace(graph: fx.Graph, places: dict[fx.Node, fx.Node], match: Match, branch: Branch | None) -> None:
    output = places[match.output]

    def layer(name: str | None) -> fx.Node | None:
        return None if name is None else graph.get_attr(name)

    def place(node: fx.Node | None) -> fx.Node | None:
        return None if node is None else places[node]

    input = place(match.input)
    with graph.inserting_before(output):
        residual = (layer(match.q), layer(match.p), layer(match.norm1), layer(match.norm2))
        flags = match.latent_residual, match.transposed
        static = None if match.conv is not None else place(match.static)
        conv = layer(match.conv)
        if branch is None:
            coefficients = place(match.lam), place(match.phi)
            arguments = (input, *coefficients, *residual, *flags, static, conv)
            call = graph.call_function(fused.residual, arguments)
        else:
            names = branch.squeeze, branch.gate_layer, branch.lam, branch.phi
            codes = branch.pool, branch.gate, branch.lam_activation
            arguments = (input, *map(layer, names), *codes, *residual, match.latent_residual, static, conv)
            call = graph.call_function(fused.layer, arguments)
    output.replace_all_uses_with(call)
    places[match.output] = call
    absorbed = {places[node] for node in match.absorbed if node is not match.output} | {output}
    if match.conv is not None:
        absorbed.add(places[match.static])
    if branch is not None:
        absorbed |= {places[node] for node in branch.nodes}
    for node in reversed(graph.nodes):
        if not node.users and node.op != "output" and (node in absorbed or _asks_for_size(node, absorbed)):
            graph.erase_node(node)
    _keep_sizes(graph, places, match, absorbed)


def _keep_sizes(
    graph: fx.Graph, places: dict[fx.Node, fx.Node], match: Match, absorbed: set[fx.Node]
) -> None:
    """What still asks for the size of a latent that is not formed any more is told by another."""
    for original, rank in match.ranks.items():
        node = places[original]
        if node not in absorbed or not node.users or original is match.output:
            continue
        with graph.inserting_before(node):
            size = graph.call_function(fused.LatentSize, (places[match.input], graph.get_attr(match.q), rank))
        for user in list(node.users):
            if user not in absorbed:
                user.replace_input_with(node, size)
    for node in reversed(graph.nodes):
        if node in absorbed:
            graph.erase_node(node)


def _asks_for_size(node: fx.Node, absorbed: set[fx.Node]) -> bool:
    """Whether ``node`` is about the shape of an absorbed tensor, which nobody forms or reads any more."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and (source in absorbed or _asks_for_size(source, absorbed))
