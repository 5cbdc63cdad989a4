# SPDX-License-Identifier: BSD-3-Clause
"""Whole networks: DCD-MobileNetV2 ×1.0 against its static twin, under the same settings.

Training: a step at bf16 autocast, forward, cross entropy, backward, SGD with momentum; device time between
events. Inference: parameters in bf16, captured in a CUDA graph. Both networks have random weights, the same
W0, unfolded BatchNorms, and every setting but the formulation in common.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..candidates import CHANNELS_LAST, NCHW, OURS, STATIC
from ..cases import make_images
from ..suite import REFUSED, RIGHT, UNABLE, WRONG, reason_of
from .cases import DTYPE
from .report import NETWORK_INFERENCE, NETWORK_TRAINING
from .timing import Block, Plan, measure, peak_bytes
from .unit import _mebibytes, finish, release

FORMULATIONS = {
    OURS: {},
    STATIC: {"pointwise": "static", "classifier": "static"},
}
CHECKED_BATCH = 8  # float64 on the whole batch would take more memory than there is
TINY_OPTIONS = {
    "stem_stride": 1,
    "settings": ((1, 16, 1, 1), (6, 24, 2, 2)),
    "stem_channels": 16,
    "last_channels": 64,
}


@dataclass(frozen=True)
class NetworkCase:
    task: str
    batch: int
    size: int = 224
    width: float = 1.0
    classes: int = 1000
    tiny: bool = False

    @property
    def network(self) -> str:
        return f"MobileNetV2 ×{self.width}"

    @property
    def name(self) -> str:
        return f"{self.network} batch {self.batch}"


def network_cases(batch: int, tiny: bool = False) -> list[NetworkCase]:
    small = {"size": 16, "classes": 10, "tiny": True} if tiny else {}
    return [
        NetworkCase(NETWORK_TRAINING, batch, **small),
        NetworkCase(NETWORK_INFERENCE, 1, **small),
        NetworkCase(NETWORK_INFERENCE, batch, **small),
    ]


def build(case: NetworkCase, group: str, layout: str, device: torch.device) -> nn.Module:
    from dcd_kernels.models import mobilenet_v2

    torch.manual_seed(0)
    options = {"dropout": 0.0, **FORMULATIONS[group], **(TINY_OPTIONS if case.tiny else {})}
    network = mobilenet_v2(case.width, case.classes, **options).to(device)
    if layout == CHANNELS_LAST:
        network = network.to(memory_format=torch.channels_last)
    if case.task == NETWORK_TRAINING:
        return network.train()
    return network.eval().to(DTYPE)


def images(case: NetworkCase, batch: int, layout: str, device: torch.device, seed: int = 0) -> Tensor:
    found = make_images(batch, case.size, layout, device, seed)
    return found if case.task == NETWORK_TRAINING else found.to(DTYPE)


def loss_of(network: nn.Module, input: Tensor, labels: Tensor, autocast: bool) -> Tensor:
    with torch.autocast(input.device.type, DTYPE, enabled=autocast):
        output = network(input)
    return F.cross_entropy(output if output.dtype == torch.float64 else output.float(), labels)


def results(case: NetworkCase, network: nn.Module, input: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What is compared: the logits, or every parameter's gradient."""
    exact = input.dtype == torch.float64
    if case.task == NETWORK_INFERENCE:
        with torch.inference_mode():
            return {"output": network(input).clone()}
    loss_of(network, input, labels, autocast=not exact).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def check(case: NetworkCase, network: nn.Module, layout: str, device: torch.device) -> tuple[bool, float]:
    """Against float64 on a small batch, all tensors together: (right, error).

    Twice the error of the reference backend at the same precision is allowed, plus 4 eps.
    """
    from dcd_kernels import use_backend

    batch = min(case.batch, CHECKED_BATCH)
    input = images(case, batch, layout, device, seed=1)
    labels = torch.arange(batch, device=device) % case.classes
    mine = results(case, copy.deepcopy(network), input, labels)
    with use_backend("reference"):
        plain = results(case, copy.deepcopy(network), input, labels)
        exact = results(case, copy.deepcopy(network).double(), input.double(), labels)
    errors = []
    for found in (mine, plain):
        relative = [
            (found[name].double() - truth).norm().item() / (truth.norm().item() or 1.0)
            for name, truth in exact.items()
        ]
        errors.append(math.sqrt(sum(error**2 for error in relative) / len(relative)))
    error, allowed = errors
    # written so that NaN is refused
    return error <= 2 * allowed + 4 * torch.finfo(DTYPE).eps, error


def step_of(case: NetworkCase, network: nn.Module, layout: str, device: torch.device):
    """The call that is timed."""
    input = images(case, case.batch, layout, device)
    if case.task == NETWORK_INFERENCE:
        return lambda i: network(input)
    labels = torch.arange(case.batch, device=device) % case.classes
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=4e-5)

    def step(i: int) -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(network, input, labels, autocast=True)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def run(case: NetworkCase, plan: Plan, device: torch.device, run_keys: dict) -> list[dict]:
    """The rows of one network case: both networks in both layouts.

    Under 'auto' on a GPU, as several backends take part: who runs what is asked beforehand.
    """
    from dcd_kernels import use_backend

    with use_backend("cpu" if device.type == "cpu" else "auto"):
        return _run(case, plan, device, run_keys)


def _run(case: NetworkCase, plan: Plan, device: torch.device, run_keys: dict) -> list[dict]:
    rows: dict[str, dict] = {}
    blocks: dict[str, Block] = {}
    training = case.task == NETWORK_TRAINING
    with torch.inference_mode(not training):
        for group in FORMULATIONS:
            for layout in (NCHW, CHANNELS_LAST):
                name = f"{group} {layout}"
                rows[name] = row = {
                    **run_keys,
                    **{"task": case.task, "network": case.network, "size": case.size, "batch": case.batch},
                    "dtype": "bfloat16 autocast" if training else "bfloat16",
                    **{"candidate": name, "group": group, "layout": layout},
                }
                try:
                    before = _allocated(device)
                    with torch.inference_mode(False):
                        network = build(case, group, layout, device)
                        right, row["error"] = check(case, network, layout, device)
                    row["status"] = RIGHT if right else WRONG
                    if not right:
                        row["reason"] = f"off by {row['error']:.3e} of its size"
                        continue
                    if reason := _not_ours(group, network, case, layout, device):
                        row.update(status=REFUSED, reason=reason)
                        continue
                    release(device)
                    step = step_of(case, network, layout, device)
                    grown = peak_bytes(lambda step=step: step(0), device)
                    if grown is not None:
                        row["peak_mib"] = _mebibytes(grown + _kept(network, before, device))
                    blocks[name] = Block(step, 1, device, capture=not training)
                except UNABLE as error:
                    row.update(status=REFUSED, reason=reason_of(error))
        samples = measure(blocks, plan) if blocks else {}
    finish(rows, samples)
    blocks.clear()
    release(device)
    return list(rows.values())


def _not_ours(group: str, network: nn.Module, case: NetworkCase, layout: str, device: torch.device) -> str:
    """Which dynamic layer would run on the reference, and not on our kernels; empty if none."""
    from dcd_kernels import explain

    if group != OURS:
        return ""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, DTYPE):
        calls = explain(network, images(case, 2, layout, device)).calls
    if not calls:
        return "no dynamic layer was called"
    return next((str(call).splitlines()[0] for call in calls if call.chosen == "reference"), "")


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _kept(network: nn.Module, before: int, device: torch.device) -> int:
    """What the network, its gradients and its optimiser hold between the steps."""
    return max(0, _allocated(device) - before)
