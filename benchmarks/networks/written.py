# SPDX-License-Identifier: BSD-3-Clause
"""The networks as they are written in PyTorch, by form, and what of them goes to a runtime."""

from __future__ import annotations

import torch
from torch import nn

from ..accelerated.networks import UNPATCHED, WIDTH, make_network, settle
from ..candidates import STATIC
from ..cases import make_images
from . import baselines, folded

DCD, FOLDED = "DCD", "folded DCD"
FORMS = (STATIC, DCD, FOLDED, *baselines.EXPERTS)
SETTLING_BATCH = 8


def is_mobilenet(network: str) -> bool:
    return network.startswith(WIDTH)


def make_written(
    network: str, size: int, classes: int, seed: int = 0, forms: tuple[str, ...] = FORMS
) -> dict[str, nn.Module]:
    """Networks by form, in eval mode, their norms settled; a folded one is made of that of ``DCD``.

    The baselines are MobileNets only.

    Raises:
        ValueError: there is no such network.
    """
    made = {}
    for form in forms:
        if form == FOLDED or (form in baselines.EXPERTS and not is_mobilenet(network)):
            continue
        made[form] = make_network(network, UNPATCHED if form == DCD else STATIC, classes, seed)
        if form in baselines.EXPERTS:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                baselines.make_dynamic(made[form], form)
    images = make_images(SETTLING_BATCH, size, "nchw", seed=seed + 1)
    for written in made.values():
        settle(written, images)
        written.eval()
    if FOLDED in forms and DCD not in made:
        raise ValueError(f"forms={forms}: {FOLDED!r} is made of {DCD!r}, which is not among them")
    return made


def written_form(form: str) -> str:
    """The form that a form has to equal."""
    return DCD if form == FOLDED else form


def to_run(written: dict[str, nn.Module], form: str, variant: str) -> nn.Module:
    """What a runtime is given: the network as it is written, or folded as ``variant`` says."""
    if form == FOLDED:
        return folded.fold(written[DCD], variant)
    return written[form]
