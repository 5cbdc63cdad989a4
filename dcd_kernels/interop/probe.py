# SPDX-License-Identifier: BSD-3-Clause
"""The proof by numbers: a copy of a module with random weights, in float64, as written and as patched."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from . import layers, patch
from .trace import SEED, Shapes, Trace, guesses

_TOLERANCE = 1e-10


class Differs(Exception):
    """A module whose patched form does not do what the module does; the message is a reason."""


def random_twin(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in float64, unpatched, with random parameters and statistics."""
    if torch.nn.modules.module._has_any_global_hook():
        raise Differs("there are global module hooks, which would see what is only tried")
    if any(nn.parameter.is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise Differs("it has parameters without a size yet")
    try:
        twin = copy.deepcopy(module)
    except Exception as error:
        raise Differs(f"it cannot be copied: {error}") from error
    for child in twin.modules():
        patch.remove(child)
        _remove_hooks(child)
    meta = any(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
    twin = (twin.to_empty(device="cpu") if meta else twin.to("cpu")).to(torch.float64)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in twin.parameters():
            fan_in = max(1, parameter.shape[1:].numel()) if parameter.dim() > 1 else 1
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
            )
        for child in twin.modules():
            if layers.is_batch_norm(child) and child.running_mean is not None:
                child.running_mean.normal_(generator=generator)
                child.running_var.uniform_(0.5, 1.5, generator=generator)
                if child.num_batches_tracked is not None:
                    child.num_batches_tracked.zero_()
    return twin


def _remove_hooks(module: nn.Module) -> None:
    """They are somebody's, and shall not see what is only tried."""
    for name, place in vars(module).items():
        if name.endswith("_hooks") and isinstance(place, dict):
            place.clear()


@contextlib.contextmanager
def _same_draws() -> Iterator[None]:
    """Random numbers of one seed, none of the caller's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def run(twin: nn.Module, traces: dict[bool, Trace]) -> tuple[dict[bool, Shapes], list[Tensor]]:
    """All values in either mode, and the inputs that gave them.

    Raises:
        Differs: the module takes none of the inputs that its layers suggest.
    """
    runs: dict[bool, Shapes] = {}
    inputs = None
    for training, traced in traces.items():
        runs[training], inputs = _run(twin, traced.graph, training, inputs)
    return runs, inputs


def _run(
    twin: nn.Module, graph: fx.Graph, training: bool, inputs: list[Tensor] | None
) -> tuple[Shapes, list[Tensor]]:
    error = Differs("what its forward takes could not be guessed")
    for guess in guesses(twin, graph) if inputs is None else [inputs]:
        runner = Shapes(copy.deepcopy(twin).train(training), graph)
        try:
            with _same_draws(), torch.no_grad():
                runner.run(*guess)
        except Exception as refused:
            error = Differs(f"it does not run on inputs like {[tuple(t.shape) for t in guess]}: {refused}")
            error.__cause__ = refused
        else:
            return runner, guess
    raise error


def proven(twin: nn.Module, recipe: patch.Recipe, inputs: list[Tensor]) -> patch.Recipe:
    """``recipe`` with those of its programs that give what the module gives: outputs, buffers, gradients.

    Raises:
        Differs: the module's own branch followed by the fused residual does not.
    """
    programs = {}
    for training, (whole, residual) in recipe.programs.items():
        truth = _everything(twin, recipe.own, training, inputs)
        _require_same(twin, residual, training, inputs, truth)
        try:
            if whole is not None:
                _require_same(twin, whole, training, inputs, truth)
        except Differs:
            whole = None
        programs[training] = whole, residual
    return replace(recipe, programs=programs)


def _require_same(
    twin: nn.Module, program: Callable, training: bool, inputs: list[Tensor], truth: dict[str, list]
) -> None:
    try:
        got = _everything(twin, program, training, inputs)
    except Exception as error:
        raise Differs(f"the fused form fails: {error}") from error
    for what, values in truth.items():
        # there are none where forward edits in place what its own gradient needs
        if not _agree(got[what], values) and (values or what != "gradients"):
            raise Differs(f"fused {what} differ from its own in {'training' if training else 'eval'} mode")


def _everything(twin: nn.Module, forward: Callable, training: bool, inputs: list[Tensor]) -> dict[str, list]:
    """Outputs, buffers and gradients of one forward and backward pass of a copy."""
    module = copy.deepcopy(twin).train(training).requires_grad_()
    leaves = [*(input.clone().requires_grad_() for input in inputs), *module.parameters()]
    with _same_draws(), torch.enable_grad():
        outputs = tree_leaves(forward(module, *[leaf.clone() for leaf in leaves[: len(inputs)]]))
        sums = [output.square().sum() for output in outputs if _has_gradient(output)]
        gradients = ()
        if sums:
            with contextlib.suppress(RuntimeError):
                gradients = torch.autograd.grad(sum(sums), leaves, allow_unused=True)
    return {"outputs": outputs, "buffers": list(module.buffers()), "gradients": list(gradients)}


def _has_gradient(output: object) -> bool:
    return isinstance(output, Tensor) and output.requires_grad


def _agree(values: list, truths: list) -> bool:
    """Whether all values are the truths, up to what rounding does to the largest of them."""
    if len(values) != len(truths):
        return False
    sizes = [
        truth.detach().norm() for truth in truths if isinstance(truth, Tensor) and truth.is_floating_point()
    ]
    allowed = _TOLERANCE * max(sizes, default=0.0)
    return all(_same(value, truth, allowed) for value, truth in zip(values, truths, strict=True))


def _same(value: object, truth: object, allowed: float) -> bool:
    if not isinstance(truth, Tensor):
        return type(value) is type(truth) and value == truth
    if not isinstance(value, Tensor) or value.shape != truth.shape or value.dtype != truth.dtype:
        return False
    if not truth.is_floating_point():
        return torch.equal(value, truth)
    return value.requires_grad == truth.requires_grad and bool((value - truth).detach().norm() <= allowed)
