# SPDX-License-Identifier: BSD-3-Clause
"""Accelerated networks are checked before any time is taken, against the same network unpatched.

1. Every dynamic layer is taken, and each but the classifier, whose few rows accelerate leaves to torch, does
   call an operator of this package.
2. In float64, on small images: outputs, gradients and running statistics, each within 1e-10 of its size, or,
   where it is a difference of larger numbers, within `AMPLIFIED` times what float32 loses there, at 2⁻²⁹.
3. In float32, layer by layer on what reaches it in the network at the size that is timed: twice the error of
   the unpatched layer in the same memory format, plus 4 eps of the size; √(N·HW) eps for the gradients of
   parameters. Gradients sent back are random.
4. In float32, the network that is timed: outputs and statistics within the limit of step 3, in the root mean
   square over the tensors, by the unpatched network's error in its worse memory format. Gradients, all
   together, within `FLIPPED` of their size: a ReLU whose input is next to zero lets its gradient through or
   not as rounding has it, and everything in front of it differs. That is why layers are looked at one by one.

The peers are PyTorch itself and their own yardstick: their output has to be finite, its error is in the rows.
"""

from __future__ import annotations

import collections
import copy
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dcd_kernels as dcd
from dcd_kernels.models.released import Classifier, ReleasedLayer

from ..candidates import TRAINING
from ..cases import make_images
from ..suite import UNABLE, reason_of
from ..verify import Verdict, compare, distance
from .networks import ACCELERATED, STATIC, UNPATCHED, Candidate, NetworkCase, labels_for, loss_of

SMALL_BATCH, SMALL_SIZE = 4, 64
SAME, AMPLIFIED, FLIPPED = 1e-10, 256, 0.1
OUTPUT, GRADIENT, STATISTIC = "output", "gradient of ", "statistic "  # how the names of results begin
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Taken:
    """What of an accelerated network is patched: dynamic layers, those taken, and what one step calls."""

    layers: int
    taken: int
    operators: str
    objection: str = ""


class _Operators(TorchDispatchMode):
    """Counts the calls of operators of this package. It leaves the path to them as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dcd_kernels":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def dynamic_layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, ReleasedLayer)]


def what_is_taken(network: nn.Module, case: NetworkCase, images: Tensor) -> Taken:
    """Asks `dcd.report`, and counts the operators of one step."""
    layers = dynamic_layers(network)
    taken = {entry.name for entry in dcd.report(network).taken}
    left = [name for name in layers if name not in taken]
    objection = f"{len(left)} of {len(layers)} dynamic layers are not taken: {', '.join(left[:3])} …"
    called = _Operators()
    try:
        with called:
            network_results(network, case, images)
    except UNABLE as error:
        return Taken(len(layers), len(layers) - len(left), "", reason_of(error))
    operators = ", ".join(f"{count} {name}" for name, count in called.counts.items())
    return Taken(len(layers), len(layers) - len(left), operators or "none", objection if left else "")


def network_results(network: nn.Module, case: NetworkCase, images: Tensor) -> Results:
    """Outputs, and in training gradients of all parameters and statistics; ``network`` is left as it is."""
    network = copy.deepcopy(network).train(case.task == TRAINING)
    if case.task != TRAINING:
        with torch.inference_mode():
            return {OUTPUT: network(images)}
    outputs = []
    handle = network.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    loss_of(network, images, labels_for(case)).backward()
    handle.remove()
    return {OUTPUT: outputs[0], **_gradients(network), **_statistics(network)}


def layer_results(layer: nn.Module, training: bool, input: Tensor, grad: Tensor) -> Results:
    """As of a network, and the gradient of the input, for the output's gradient ``grad``."""
    layer = copy.deepcopy(layer).train(training)
    if not training:
        return {OUTPUT: layer(input)}
    with torch.enable_grad():
        input = input.detach().requires_grad_()
        output = layer(input)
        output.backward(grad)
    found = {OUTPUT: output.detach(), f"{GRADIENT}input": input.grad}
    return {**found, **_gradients(layer), **_statistics(layer)}


def _gradients(module: nn.Module) -> Results:
    parameters = module.named_parameters()
    return {f"{GRADIENT}{name}": found.grad for name, found in parameters if found.grad is not None}


def _statistics(module: nn.Module) -> Results:
    # counts of batches are whole numbers
    return {
        f"{STATISTIC}{name}": buffer if buffer.is_floating_point() else buffer.double()
        for name, buffer in module.named_buffers()
    }


def limits(single: Results, exact: Results, values: int = 0) -> dict[str, float]:
    """Twice the error of ``single`` plus 4 eps of the size; √values eps for gradients of parameters."""
    found = {}
    for name, truth in exact.items():
        share = 4.0
        if name.startswith(GRADIENT) and name != f"{GRADIENT}input":
            share = max(share, values**0.5)
        size = truth.norm().item()
        if name.endswith("running_mean"):
            # what is averaged may cancel, and is as large as its deviation
            size += exact[name.removesuffix("mean") + "var"].sqrt().norm().item()
        found[name] = 2.0 * distance(single[name], truth) + share * EPS32 * size
    return found


def same_in_float64(networks: dict[str, nn.Module], case: NetworkCase, seed: int) -> Verdict:
    """Step 2."""
    small = NetworkCase(
        case.network,
        case.task,
        min(case.batch, SMALL_BATCH),
        min(case.size, SMALL_SIZE),
        case.classes,
    )
    images = make_images(small.batch, small.size, "nchw", seed=seed)
    plain, ours = networks[UNPATCHED], networks[ACCELERATED]
    single = network_results(plain, small, images)
    exact, found = (
        network_results(copy.deepcopy(network).double(), small, images.double()) for network in (plain, ours)
    )
    limit = {
        name: SAME * truth.norm().item() + AMPLIFIED * EPS64 / EPS32 * distance(single[name], truth)
        for name, truth in exact.items()
    }
    verdict = compare(found, exact, limit)
    return verdict if verdict.right else Verdict(False, verdict.error, f"in float64, {verdict.reason}")


def layers_are_right(
    plain: nn.Module, ours: nn.Module, case: NetworkCase, images: Tensor, seed: int
) -> Verdict:
    """Step 3, all layers in the order in which they run, up to the first that is wrong."""
    training = case.task == TRAINING
    generator = torch.Generator().manual_seed(seed)
    verdicts: list[Verdict] = []

    def check(name: str, input: Tensor, output: Tensor) -> Verdict:
        peer, mine = plain.get_submodule(name), ours.get_submodule(name)
        grad = torch.randn(output.shape, generator=generator).to(output)
        # in its memory format, as the network's next layer would send it
        grad = torch.empty_like(output).copy_(grad)
        exact = layer_results(copy.deepcopy(peer).double(), training, input.double(), grad.double())
        limit = limits(layer_results(peer, training, input, grad), exact, input.numel() // input.shape[1])
        with _Operators() as called:  # a layer that is taken may still refuse
            found = layer_results(mine, training, input, grad)
        if not called.counts and not isinstance(peer, Classifier):
            return Verdict(False, math.nan, f"{name} is taken and runs as it was written")
        verdict = compare(found, exact, limit)
        return Verdict(verdict.right, verdict.error, verdict.reason and f"{name}: {verdict.reason}")

    runner = copy.deepcopy(plain).train(training)
    for name in dynamic_layers(plain):

        def hook(module, args, output, name=name):
            if all(verdict.right for verdict in verdicts):
                verdicts.append(check(name, args[0], output))

        runner.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad() if training else torch.inference_mode():
        runner(images)
    worst = max((verdict.error for verdict in verdicts), default=0.0)
    return next((verdict for verdict in verdicts if not verdict.right), Verdict(True, worst))


def network_is_right(found: Results, singles: Iterable[Results], exact: Results) -> Verdict:
    """Step 4; ``singles`` are the results of the unpatched network, one a memory format."""
    if found.keys() != exact.keys():
        return Verdict(False, math.nan, f"the results are {sorted(found)}, expected {sorted(exact)}")
    error = error_of(found, exact)
    allowed = [limits(single, exact) for single in singles]
    for kind in (OUTPUT, STATISTIC):
        shares = {
            name: distance(found[name], truth) / max(limit[name] for limit in allowed)
            for name, truth in exact.items()
            if name.startswith(kind)
        }
        score = math.sqrt(sum(share**2 for share in shares.values()) / max(1, len(shares)))
        # written so that NaN is refused
        if not score <= 1:
            worst = max(shares, key=shares.get)
            return Verdict(False, error, f"{worst} of the network is {shares[worst]:.2f} times its limit off")
    names = [name for name in exact if name.startswith(GRADIENT)]
    off = math.hypot(*(distance(found[name], exact[name]) for name in names))
    if not off <= FLIPPED * math.hypot(*(exact[name].norm().item() for name in names)):
        return Verdict(False, error, f"the gradients of the network are {off:.3e} off")
    return Verdict(True, error)


def error_of(found: Results, exact: Results) -> float:
    """Of the output, relative."""
    return distance(found[OUTPUT], exact[OUTPUT]) / exact[OUTPUT].norm().item()


class Checker:
    """All checks of one case."""

    def __init__(self, case: NetworkCase, networks: dict[str, nn.Module], seed: int) -> None:
        self.case, self.seed = case, seed
        self.exact: dict[str, Results] = {}
        self.single: dict[str, Results] = {}
        self.plain: dict[str, nn.Module] = {}
        images = make_images(case.batch, case.size, "nchw", seed=seed)
        for group in (STATIC, UNPATCHED):
            self.exact[group] = network_results(
                copy.deepcopy(networks[group]).double(), case, images.double()
            )
        self.taken = what_is_taken(networks[ACCELERATED], case, images)
        self.networks = networks

    @functools.cached_property
    def double(self) -> Verdict:
        return same_in_float64(self.networks, self.case, self.seed)

    def check(self, candidate: Candidate, network: nn.Module, images: Tensor) -> Verdict:
        """The verdict on a candidate; those that are unpatched come before those that are accelerated."""
        group, layout = candidate.group, candidate.layout
        if group != ACCELERATED:
            found = network_results(network, self.case, images)
            error = error_of(found, self.exact[group])
            if group == UNPATCHED:
                self.single[layout], self.plain[layout] = found, network
            right = math.isfinite(error)
            return Verdict(right, error, "" if right else "the output is not finite")
        if self.taken.objection:
            return Verdict(False, math.nan, self.taken.objection)
        if not self.double.right:
            return self.double
        # where the unpatched network does not run in a layout, its layers are asked in the other
        other = layout if layout in self.plain else next(iter(self.plain))
        verdict = layers_are_right(self.plain[other], network, self.case, images, self.seed)
        if not verdict.right:
            return verdict
        found = network_results(network, self.case, images)
        return network_is_right(found, self.single.values(), self.exact[UNPATCHED])
