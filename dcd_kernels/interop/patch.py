# SPDX-License-Identifier: BSD-3-Clause
"""The forward of a patched instance: the module's own data flow with the dynamic residual in one call."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from . import fused, layers
from .match import Match
from .trace import Trace

_MARK = "dcd_recipe"  # attribute of the function that makes it ours


@dataclass(frozen=True)
class Recipe:
    """What a patched forward needs besides its module, which may be a copy of the one that was looked at.

    ``own`` is the class's forward. ``replaced`` are the modules that are not called any more, by name, and
    what each has to be for that; ``opened`` the containers that are not called.
    """

    own: Callable
    programs: dict[bool, Callable]
    arguments: int
    defaults: dict[str, object]
    attributes: dict[str, object]
    replaced: tuple[tuple[str, Callable[[nn.Module], bool]], ...]
    opened: tuple[str, ...]
    summary: str

    def objection(self, module: nn.Module) -> str | None:
        """Why ``module`` has to run its own forward now; None for no reason."""
        if type(module).forward is not self.own:
            return "its class has another forward now"
        if torch.nn.modules.module._has_any_global_hook():
            return "there are global module hooks"
        now = vars(module)
        for name, value in self.attributes.items():
            if now.get(name) != value:
                return f"its attribute {name} has changed since it was accelerated"
        for name, fits in self.replaced:
            child = _child(module, name)
            if child is None or not fits(child):
                return f"{name} is another kind of module now"
            if layers.has_hooks(child):
                return f"{name} has hooks"
        for name in self.opened:
            child = _child(module, name)
            if child is None or layers.has_hooks(child):
                return f"{name} has hooks"
        return None


def _child(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = module._modules.get(part)
        if module is None:
            return None
    return module


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
        plain = len(args) <= arguments and all(isinstance(arg, Tensor) for arg in args)
        if plain and not (defaults and kwargs.keys() & defaults.keys()) and recipe.objection(self) is None:
            return programs[self.training](self, *args, **kwargs)
        return own(self, *args, **kwargs)

    setattr(forward, _MARK, recipe)
    module.forward = types.MethodType(forward, module)


def remove(module: nn.Module) -> None:
    """Takes the patch off ``module``, if there is one."""
    if recipe_of(module) is not None:
        del module.forward


def program(trace: Trace, matches: list[Match]) -> Callable:
    """A function (module, \\*arguments) of the same data flow with every match in one call."""
    graph = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(trace.graph, places))
    for match in matches:
        _replace(graph, places, match)
    source = graph.python_code("self")
    scope = dict(source.globals)
    exec(compile(source.src, "<accelerated forward>", "exec"), scope)
    return scope["forward"]


def _replace(graph: fx.Graph, places: dict[fx.Node, fx.Node], match: Match) -> None:
    output = places[match.output]
    input, phi, lam, static = (
        None if node is None else places[node] for node in (match.input, match.phi, match.lam, match.static)
    )
    with graph.inserting_before(output):
        q, p, norm1, norm2, conv = (
            None if name is None else graph.get_attr(name)
            for name in (match.q, match.p, match.norm1, match.norm2, match.conv)
        )
        if conv is not None:
            static = None
        arguments = (
            input,
            phi,
            q,
            p,
            norm1,
            norm2,
            match.latent_residual,
            match.transposed,
            lam,
            static,
            conv,
        )
        call = graph.call_function(fused.residual, arguments)
    output.replace_all_uses_with(call)
    places[match.output] = call
    absorbed = {places[node] for node in match.absorbed if node is not match.output} | {output}
    if match.conv is not None:
        absorbed.add(places[match.static])
    for node in reversed(graph.nodes):
        if node in absorbed or (not node.users and node.op != "output" and _asks_for_size(node, absorbed)):
            graph.erase_node(node)


def _asks_for_size(node: fx.Node, absorbed: set[fx.Node]) -> bool:
    """Whether ``node`` is about the shape of an absorbed tensor, which nobody forms or reads any more."""
    source = node
    while (
        source.op in ("call_function", "call_method") and source.args and isinstance(source.args[0], fx.Node)
    ):
        source = source.args[0]
        if source in absorbed:
            return True
    return False
