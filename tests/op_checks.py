# SPDX-License-Identifier: BSD-3-Clause
"""The checks that every compiled op has to pass, written once; test_ops*.py say on which cases."""

from __future__ import annotations

import operands as given
import torch
from cases import assert_close_to_truth
from operands import Case, call, operands, plain

from dcd_kernels.arguments import ACTIVATIONS


def values(
    case: Case,
    dtype: torch.dtype,
    layout: str,
    isa: str | None,
    *,
    wide: bool = False,
    device: torch.device | str = "cpu",
    eps: float | None = None,
) -> None:
    tensors = operands(case, dtype, layout, wide=wide, device=device)
    with given.instruction_set(isa):
        got = call(case, tensors)
    assert_close_to_truth(got, plain(case, tensors), given.truth(case, tensors), eps=eps)
    followed = given.is_channels_last(tensors[0])
    assert given.is_channels_last(got) == (followed and not got.is_contiguous())
    if not followed:
        assert got.is_contiguous()


def same_bits(
    case: Case,
    layout: str,
    isa: str | None,
    count: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    tensors = operands(case, dtype, layout, requires_grad=True, device=device)
    wanted = [t for t in tensors if t is not None]
    with given.instruction_set(isa), given.threads(count):
        runs = []
        for _ in range(3):
            output = call(case, tensors)
            runs.append(
                [output, *torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)]
            )
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert (first is None and again is None) or torch.equal(first, again)


def propagation_through_residual(case: Case, layout: str, isa: str) -> None:
    """NaN and infinities arrive at the activation unchanged, and go on as torch's activation sends them."""
    assert case.residual
    tensors = operands(case, layout=layout)
    tensors[-1] = tensors[-1].clone()
    flat = tensors[-1].view(-1) if tensors[-1].is_contiguous() else tensors[-1].movedim(1, -1).reshape(-1)
    special = torch.tensor([float("nan"), float("inf"), -float("inf")])
    where = torch.arange(0, flat.numel(), 5)
    flat[where] = special[torch.arange(where.numel()) % 3]
    if not tensors[-1].is_contiguous():
        tensors[-1] = flat.view(tensors[-1].movedim(1, -1).shape).movedim(-1, 1)
    for name in ACTIVATIONS:
        activated = Case(**{**case.__dict__, "activation": name})
        with given.instruction_set(isa):
            got = call(activated, tensors)
        expected = plain(activated, tensors)
        assert torch.equal(got.isnan(), expected.isnan()), name
        infinite = expected.isinf()
        assert torch.equal(got.isinf(), infinite), name
        assert torch.equal(got[infinite], expected[infinite]), name


def nan_stays_in_its_pixels(case: Case, layout: str, isa: str, place: int) -> None:
    """A NaN in factor `place` reaches exactly the outputs that depend on it."""
    tensors = operands(case, layout=layout)
    tensors[place] = tensors[place].clone()
    tensors[place][(-1,) * tensors[place].dim()] = float("nan")
    if case.op == "apply" and not case.dynamic:
        tensors[1] = tensors[0]
    with given.instruction_set(isa):
        got = call(case, tensors)
    assert torch.equal(got.isnan(), plain(case, tensors).isnan())


def infinity_is_not_lost(case: Case, layout: str, isa: str) -> None:
    """Inf - Inf depends on the order of the products, so only the pixels can be compared, not the signs."""
    tensors = operands(case, layout=layout)
    tensors[0] = tensors[0].clone()
    tensors[0][(0,) * tensors[0].dim()] = float("inf")
    with given.instruction_set(isa):
        got = call(case, tensors)
    assert torch.equal(got.isfinite(), plain(case, tensors).isfinite())


def denormals(case: Case, layout: str, isa: str) -> None:
    """Kernels may flush denormals: right to within the flush, and only inside of the kernel."""
    tensors = operands(case, layout=layout)
    small = torch.finfo(torch.float32).tiny
    for scale in (1e-40, None):
        scaled = list(tensors)
        if scale is not None:
            scaled[0] = tensors[0] * scale
        else:
            scaled[0] = torch.where(tensors[0] > 0, tensors[0], tensors[0] * 1e-40)
        if case.op == "apply" and not case.dynamic:
            scaled[1] = scaled[0]
        with given.instruction_set(isa):
            got = call(case, scaled)
        truth = given.truth(case, scaled)
        error = (got.double() - truth).abs().max().item()
        allowed = 2 * (plain(case, scaled).double() - truth).abs().max().item()
        weights = max(1.0, *(t.abs().max().item() for t in tensors[1:] if t is not None)) ** 4
        flushed = small * weights * case.in_channels * max(case.latent, 1) ** 2
        assert error <= allowed + 4 * torch.finfo(torch.float32).eps * truth.abs().max().item() + flushed
    tiny = torch.full((64,), 1e-40)
    assert (tiny * 1.0).ne(0).all(), "the kernel left denormals flushed"


def opcheck(
    case: Case,
    dtype: torch.dtype,
    layout: str,
    *,
    wide: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    op = getattr(torch.ops.dcd_kernels, case.op).default
    code = ACTIVATIONS[case.activation]
    tensors = operands(case, dtype, layout, wide=wide, requires_grad=True, device=device)
    torch.library.opcheck(op, (*tensors, *case.geometry, code))


def opcheck_backward(
    case: Case,
    dtype: torch.dtype,
    layout: str,
    needs: int,
    *,
    wide: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    op = getattr(torch.ops.dcd_kernels, case.op + "_backward").default
    factors = operands(case, dtype, layout, wide=wide, device=device)[:6]
    grad = torch.randn(case.batch, case.out_channels, *case.out_size).to(device, dtype)
    for index, factor in enumerate(factors):
        if factor is None:
            needs &= ~(1 << index)
    torch.library.opcheck(op, (grad, *factors, *case.geometry, needs))
