# SPDX-License-Identifier: BSD-3-Clause
"""A module and its accelerated copy, run side by side: outputs, gradients and buffers."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

import dcd_kernels as dcd


def accelerated(module: nn.Module, taken: int | None = 1) -> nn.Module:
    """An accelerated copy. ``taken``: how many modules must have been patched (None: whatever it is).

    Equality of what was left alone would prove nothing.
    """
    model = dcd.accelerate(copy.deepcopy(module))
    if taken is not None:
        report = dcd.report(model)
        assert len(report.taken) == taken, f"{len(report.taken)} taken, not {taken}\n{report}"
    return model


def leaves(inputs, layout=None) -> list[Tensor]:
    """Fresh leaves with the values of the inputs; 'channels_last' where there are two spatial dimensions."""
    fresh = []
    for x in inputs:
        x = x.detach().clone()
        if layout == "channels_last" and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        fresh.append(x.requires_grad_())
    return fresh


def cotangent(output: Tensor, seed: int) -> Tensor:
    """A gradient for this output; the same values, of few digits, whatever the dtype."""
    generator = torch.Generator().manual_seed(seed + 99)
    return torch.randn(output.shape, generator=generator, dtype=torch.bfloat16).to(output.dtype)


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def run(module, inputs, *, seed: int = 0, layout=None, context=None, backward: bool = True, call=None):
    """name -> tensor: outputs, gradients of inputs and of parameters, buffers after the call.

    ``context``: a context manager around the forward pass. ``call``: what to call instead of the module, when
    that is wrapped. Gradients that are None are absent. Ends with the module's gradients put back to None.
    """
    mine = leaves(inputs, layout)
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)  # dropout
    with context or contextlib.nullcontext():
        outputs = as_tuple((module if call is None else call)(*mine))
    results = {f"output {i}": y.detach().clone() for i, y in enumerate(outputs)}
    if backward:
        torch.autograd.backward(outputs, [cotangent(y, seed) for y in outputs])
        results |= {f"input {i}.grad": x.grad for i, x in enumerate(mine) if x.grad is not None}
        results |= {f"{n}.grad": p.grad for n, p in module.named_parameters() if p.grad is not None}
        module.zero_grad(set_to_none=True)
    return results | {name: b.detach().clone() for name, b in module.named_buffers()}


def assert_equal(mine: dict[str, Tensor], right: dict[str, Tensor], relative: float = 1e-10) -> None:
    """The same names, dtypes and shapes; in every entry within ``relative`` of the tensor's largest value."""
    assert sorted(mine) == sorted(right)
    for name, truth in right.items():
        got = mine[name]
        assert (got.shape, got.dtype) == (truth.shape, truth.dtype), f"{name}: {got.shape}, {got.dtype}"
        if not truth.dtype.is_floating_point:
            assert torch.equal(got, truth), f"{name}: {got}, not {truth}"
        elif truth.numel():
            assert bool(truth.isfinite().all()), f"{name}: the original is not finite"
            error = (got - truth).abs().max().item()
            scale = max(truth.abs().max().item(), 0.1)  # 0.1: gradients that are zero but for rounding
            assert error <= relative * scale, f"{name}: error {error:.3g}, largest value {scale:.3g}"


def outcome(*arguments, **options):
    """What ``run`` returns, or the error it raises."""
    try:
        return run(*arguments, **options)
    except Exception as error:
        return error


def assert_same_outcome(mine, right, relative: float = 1e-10) -> None:
    """Equal results, or errors of the same type and text."""
    if isinstance(right, Exception):
        assert type(mine) is type(right) and str(mine) == str(right)
    else:
        assert not isinstance(mine, Exception), repr(mine)
        assert_equal(mine, right, relative)


def assert_as_accurate(module, draws, *, context=None, eps: float | None = None, times: float = 2, **options):
    """DESIGN section 6: error against the float64 module at most twice the module's own, plus 4 eps·‖y‖.

    ``draws``: lists of inputs; each tensor's error is taken over all of them together, so that a few numbers
    that happen to round well do not decide. ``context`` makes the context manager around the low-precision
    forward pass.
    """
    twin, truth = accelerated(module), copy.deepcopy(module).double()
    mine, plain, right = ({} for _ in range(3))
    for seed, inputs in enumerate(draws):
        for model, results in ((twin, mine), (module, plain)):
            values = run(model, inputs, seed=seed, context=context and context(), **options)
            for name, tensor in values.items():
                results.setdefault(name, []).append(tensor.flatten())
        values = run(truth, [x.double() for x in inputs], seed=seed, backward=options.get("backward", True))
        for name, tensor in values.items():
            right.setdefault(name, []).append(tensor.flatten())
    assert sorted(mine) == sorted(plain) == sorted(right)
    for name in right:
        got, same, exact = (torch.cat(results[name]) for results in (mine, plain, right))
        assert got.dtype == same.dtype, f"{name}: {got.dtype}, not {same.dtype}"
        if not got.dtype.is_floating_point:
            assert torch.equal(got, same), name
            continue
        assert not (exact.isfinite() & ~got.isfinite()).any(), f"{name}: not finite"
        error, own = ((t.double() - exact).norm().item() for t in (got, same))
        size = _noise(name, exact, right) or exact.norm().item()
        allowed = times * own + 4 * (eps or torch.finfo(got.dtype).eps) * size
        assert error <= allowed, f"{name}: error {error:.3g}, the module's own {own:.3g}, size {size:.3g}"


def _noise(name: str, exact: Tensor, right: dict[str, list[Tensor]]) -> float:
    """The size of the terms that cancel in a bias's gradient ahead of BatchNorm, where it is zero; else 0."""
    weight = name.replace("bias.grad", "weight.grad")
    if not name.endswith("bias.grad") or weight not in right:
        return 0.0
    terms = torch.cat(right[weight]).norm().item()
    return terms if exact.norm().item() < 1e-9 * terms else 0.0
