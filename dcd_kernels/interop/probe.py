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
from .trace import Shapes, Trace

_BATCH = 3
_SIZES = ((7, 6, 5), (19, 18, 17))  # the second for kernels that do not fit into the first
_TOLERANCE = 1e-9
_SEED = 20


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
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in twin.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
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
        torch.manual_seed(_SEED)
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
    for guess in _guesses(twin, graph) if inputs is None else [inputs]:
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


def _guesses(twin: nn.Module, graph: fx.Graph) -> Iterator[list[Tensor]]:
    """Inputs by what reads the arguments; one that no convolution reads may be an image or a vector."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    readers = _readers(twin, graph)
    convolved = {node: max(found, key=lambda pair: pair[1]) for node, found in readers.items()}
    images = [(channels, rank) for channels, rank in convolved.values() if rank > 2]
    like = images[0] if images else next(iter(convolved.values()), None)
    if like is None:
        return
    generator = torch.Generator().manual_seed(_SEED)
    for size in _SIZES:
        for attempt in range(4 if len(placeholders) > 1 else 1):
            shapes = []
            for node in placeholders:
                channels, rank = convolved.get(node, like)
                if images and rank == 2:  # behind a pooling, to one number a channel or to four
                    rank = 2 if attempt == 1 else like[1]
                    channels = {0: like[0], 3: channels // 4}.get(attempt, channels)
                shapes.append((_BATCH, channels, *size[: rank - 2]))
            yield [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _readers(twin: nn.Module, graph: fx.Graph) -> dict[fx.Node, list[tuple[int, int]]]:
    """(channels, rank) that the first static layers behind each argument of forward read."""
    found: dict[fx.Node, list[tuple[int, int]]] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not layers.is_static(twin.get_submodule(node.target)):
            continue
        origin = node.args[0]
        while origin.op != "placeholder" and not _is_layer(twin, origin) and origin.all_input_nodes:
            origin = origin.all_input_nodes[0]
        if origin.op == "placeholder":
            layer = twin.get_submodule(node.target)
            channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            found.setdefault(origin, []).append((channels, layers.rank(layer)))
    return found


def _is_layer(twin: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and layers.is_static(twin.get_submodule(node.target))


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
