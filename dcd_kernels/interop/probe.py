# SPDX-License-Identifier: BSD-3-Clause
"""The proof by numbers: a copy of a module with random weights, in float64, as written and as patched."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from . import layers, patch
from .trace import SEED, Shapes, Trace, guesses

_TOLERANCE = 1e-9


class Differs(Exception):
    """A module whose patched form does not do what the module does; the message is a reason."""


def random_twin(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in float64, unpatched, with random parameters and statistics."""
    try:
        twin = copy.deepcopy(module)
    except Exception as error:
        raise Differs(f"it cannot be copied: {error}") from error
    for child in twin.modules():
        patch.remove(child)
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
                child.num_batches_tracked.zero_()
    return twin


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


def compare(twin: nn.Module, recipe: patch.Recipe, inputs: list[Tensor]) -> None:
    """Raises Differs unless every program gives what the module gives, outputs and buffers."""
    for training, programs in recipe.programs.items():
        plain = copy.deepcopy(twin).train(training)
        with _same_draws(), torch.no_grad():
            expected = recipe.own(plain, *inputs)
        for program in programs:
            if program is None:
                continue
            patched = copy.deepcopy(twin).train(training)
            try:
                with _same_draws(), torch.no_grad():
                    got = program(patched, *inputs)
            except Exception as error:
                raise Differs(f"the fused form fails: {error}") from error
            mode = "training" if training else "eval"
            for what, values, truths in (
                ("outputs", tree_leaves(got), tree_leaves(expected)),
                ("buffers", list(patched.buffers()), list(plain.buffers())),
            ):
                if len(values) != len(truths) or not all(map(_agree, values, truths)):
                    raise Differs(f"fused {what} differ from its own in {mode} mode")


def _agree(value: object, truth: object) -> bool:
    if not isinstance(truth, Tensor):
        return type(value) is type(truth) and value == truth
    if not isinstance(value, Tensor) or value.shape != truth.shape or value.dtype != truth.dtype:
        return False
    if not truth.is_floating_point():
        return torch.equal(value, truth)
    return bool((value - truth).norm() <= _TOLERANCE * truth.norm())
