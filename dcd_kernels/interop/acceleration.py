# SPDX-License-Identifier: BSD-3-Clause
"""accelerate, restore and report: fused kernels for networks that were written without them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..arguments import check_module
from . import branch, layers, match, patch, probe, sequence
from .trace import Untraceable, trace


@dataclass(frozen=True)
class Entry:
    """One module of a model, and what became of it.

    ``name`` is its name in the model, ``kind`` its class, ``taken`` whether it is patched, ``reason`` what
    runs in its place, or why it was left alone.
    """

    name: str
    kind: str
    taken: bool
    reason: str


class Report:
    """The modules of a model that are, or look like, dynamic convolution decomposition; a sequence.

    ``containers`` are the names of the ``nn.Sequential`` whose norms run with the activations behind them in
    training.
    """

    def __init__(self, entries: list[Entry], containers: list[str]) -> None:
        self._entries = entries
        self.containers = containers

    @property
    def taken(self) -> list[Entry]:
        """Those that are patched."""
        return [entry for entry in self._entries if entry.taken]

    @property
    def left(self) -> list[Entry]:
        """Those that run as they were written."""
        return [entry for entry in self._entries if not entry.taken]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __getitem__(self, index: int) -> Entry:
        return self._entries[index]

    def __str__(self) -> str:
        if not self._entries:
            return "no module looks like dynamic convolution decomposition: nothing to accelerate"
        lines = [f"{len(self.taken)} of {len(self)} modules accelerated"]
        width = max(len(entry.name) for entry in self)
        kinds = max(len(entry.kind) for entry in self)
        for entry in self:
            mark = "+" if entry.taken else "-"
            lines.append(f"{mark} {entry.name:<{width}}  {entry.kind:<{kinds}}  {entry.reason}")
        if self.containers:
            count = len(self.containers)
            lines.append(f"norms and their activations fused in training, in {count} nn.Sequential")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Report({len(self.taken)} taken, {len(self.left)} left)"


def accelerate(model: nn.Module) -> nn.Module:
    r"""Patches the DCD modules of ``model`` in place, so that they run fused, in training and inference.

    A module is recognised by what its forward computes, ``P [norm₂(Φ norm₁(Qᵀx)) + norm₁(Qᵀx)] + λ⊙W0*x``
    with any of λ, the norms, the latent residual and the static part absent, whatever its class and its parts
    are called. The rest of its forward (pooling, the layers that make λ and Φ, dropout) stays as it is
    written. A copy of the module with random numbers in it, in float64, has to give the same outputs and
    running statistics before and after, in training and in eval mode, before the module itself is patched.

    What changes is one attribute of each instance, ``forward``: class, parameters, buffers, keys of the
    state_dict, hooks and training mode are as they were, and weights may be edited, loaded, moved or replaced
    at any time. The module runs its own forward whenever the patch cannot honour something: hooks on the
    layers of the latent, SyncBatchNorm, an attribute that changed, other arguments. Copies (deepcopy) are
    patched like their original; a pickle holds the unpatched module and needs no dcd_kernels to load.

    Where a module was patched, so are the plain ``nn.Sequential`` of the model that hold norms: in training
    on the CPU, a norm by the batch's statistics and the activation behind it are one op.

    Args:
        model: any module, a DCD module itself or a network of them. Patched already: looked at again.

    Returns:
        ``model``, the same object. :func:`report` tells what was and what was not taken, and why;
        :func:`restore` undoes it.

    Raises:
        TypeError: ``model`` is not a module.

    Source: the latent norms are those of the released networks; for their algebra see
    :mod:`dcd_kernels.interop.norms`.
    """
    check_module("accelerate", model)
    for _, module in _candidates(model):
        recipe, _ = _examined(module)
        patch.remove(module)
        if recipe is not None:
            patch.install(module, recipe)
    for _, module in _containers(model):
        patch.remove(module)
        if not _is_overridden(module):
            patch.install_sequence(module)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Takes the patches of :func:`accelerate` off ``model``, in place, and returns it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("restore", model)
    for module in model.modules():
        patch.remove(module)
    return model


def report(model: nn.Module) -> Report:
    """What :func:`accelerate` did with ``model``, or would do: a :class:`Report`, printed as a table.

    Of a module that :func:`dcd_kernels.optimize_for_inference` returned: what runs for each of its modules,
    and why those run as they are written that do.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("report", model)
    from ..inference.optimize import OptimizedNetwork, entries_of  # it is built on this module

    if isinstance(model, OptimizedNetwork):
        return Report([Entry(*entry) for entry in entries_of(model)], [])
    entries = []
    for name, module in _candidates(model):
        installed = patch.recipe_of(module)
        if installed is not None:
            objection = installed.objection(module)
            reason = installed.summary if objection is None else f"runs as written at present: {objection}"
        else:
            recipe, reason = _examined(module)
            if recipe is not None:
                reason = f"not accelerated yet: {recipe.summary}"
            elif not _has_latent(module):
                continue
        entries.append(Entry(name, type(module).__name__, installed is not None, reason))
    return Report(entries, [name for name, module in model.named_modules() if patch.is_sequence(module)])


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that could be one: not torch's, not those that run fused by themselves."""
    for name, module in list(model.named_modules()):
        if not type(module).__module__.startswith(("torch.", "dcd_kernels.nn")) and _has_parts(module):
            yield name, module


def _containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The containers with norms outside of patched modules, if there are any of these."""
    taken = [name for name, module in model.named_modules() if patch.recipe_of(module) is not None]
    inside = tuple(f"{name}." if name else "" for name in taken)
    for name, module in list(model.named_modules()):
        if taken and sequence.has_norms(module) and not name.startswith(inside):
            yield name, module


def _is_overridden(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own that is not ours."""
    return (
        "forward" in vars(module)
        and patch.recipe_of(module) is None
        and not patch.is_sequence(module)
        and not _is_plain_method(module)
    )


def _examined(module: nn.Module) -> tuple[patch.Recipe | None, str]:
    """The recipe for ``module``, or None and the reason why there is none."""
    try:
        # whatever the caller's surroundings are: they are not those of the calls to come
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            recipe = examine(module)
    except (Untraceable, match.NoMatch, probe.Differs) as error:
        return None, str(error)
    return recipe, recipe.summary


def recipes(model: nn.Module, known: set[nn.Module]) -> dict[nn.Module, patch.Recipe]:
    """The modules of ``model``, but for the ``known`` ones, that are the decomposition, patched or not."""
    found = {}
    for _, module in _candidates(model):
        if module in known:
            continue
        recipe = patch.recipe_of(module) or _examined(module)[0]
        if recipe is not None:
            found[module] = recipe
    return found


def _parts(module: nn.Module) -> list[nn.Module]:
    """The static layers that ``module`` calls itself."""
    found = []
    for child in module.children():
        if isinstance(child, nn.Sequential):
            found += _parts(child)
        elif layers.is_static(child):
            found.append(child)
    return found


def _channels(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


def _has_parts(module: nn.Module) -> bool:
    """Whether there is a Q and a P: what Q makes, P takes."""
    parts = [_channels(part) for part in _parts(module) if layers.is_projection(part)]
    return any(
        first[1] == second[0] for i, first in enumerate(parts) for j, second in enumerate(parts) if i != j
    )


def _has_latent(module: nn.Module) -> bool:
    """Whether there is a layer besides Q and P that could make Φ: one of L² numbers."""
    parts = [_channels(part) for part in _parts(module)]
    latents = {outputs for _, outputs in parts} & {inputs for inputs, _ in parts}
    return any(outputs == size**2 for _, outputs in parts for size in latents if size > 1)


def examine(module: nn.Module) -> patch.Recipe:
    """The recipe for ``module``, proven on a copy.

    Raises:
        Untraceable, match.NoMatch, probe.Differs: with the reason to leave it alone.
    """
    if _is_overridden(module):
        raise Untraceable("the instance has a forward of its own already")
    twin = probe.random_twin(module)
    traces = {mode: trace(twin, mode) for mode in (True, False)}
    runs, inputs = probe.run(twin, traces)
    found = {}
    for mode, run in runs.items():
        matches = match.find(twin, run.graph, run.shapes)
        found[mode] = [(residual, branch.find(twin, residual, run)) for residual in matches]
    return probe.proven(twin, patch.Recipe.of(module, traces, found), inputs)


def _is_plain_method(module: nn.Module) -> bool:
    """A pickle of a patched module leaves the class's own method in the instance."""
    return getattr(vars(module)["forward"], "__func__", None) is type(module).forward
