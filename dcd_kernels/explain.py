# SPDX-License-Identifier: BSD-3-Clause
"""Which kernel runs a call, and why the others do not.

The answers come from the predicates that choose at run time, ``can_run`` of each backend, and never from a
table of their own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from . import arguments
from .backends import selection

_FORMS = {
    "pointwise": "pointwise convolution",
    "linear": "linear",
    "depthwise": "depthwise convolution (Eq. 8)",
    "centre": "k×k convolution with a 1×1 residual at the centre tap (Fig. 4b)",
    "joint": "k×k convolution, joint fusion (Eq. 9)",
    "apply": "dynamic terms on a given static output",
    "moments": "mean and covariance of the latent",
}


@dataclass(frozen=True)
class Verdict:
    """One backend's answer to one call.

    ``able`` whether it runs it, ``reason`` why not, ``kernel`` what would run, in words.
    """

    backend: str
    able: bool
    reason: str
    kernel: str


@dataclass(frozen=True)
class Call:
    """One dynamic operator that was called, and every backend's answer.

    ``op`` is its form in words, ``where`` the module that called it, ``operands`` shapes and dtypes,
    ``demanded`` the backend asked for ('auto': any), ``chosen`` the one that runs it, ``notes`` what else
    there is to know.
    """

    op: str
    where: str
    operands: str
    demanded: str
    chosen: str
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    @property
    def kernel(self) -> str:
        """What runs it, in words."""
        return next(verdict.kernel for verdict in self.verdicts if verdict.backend == self.chosen)

    @property
    def others(self) -> tuple[str, ...]:
        """Why each other backend does not run it."""
        why = f"could, but {self.chosen} {'was demanded' if self.chosen == self.demanded else 'is preferred'}"
        return tuple(
            f"{verdict.backend}: {why if verdict.able else verdict.reason}"
            for verdict in self.verdicts
            if verdict.backend != self.chosen
        )


@dataclass(frozen=True)
class Explanation:
    """The dynamic operators of one call, in the order in which they ran; print it.

    ``network`` is the table of a network that runs as a whole, whose operators are not called one by one.
    """

    calls: tuple[Call, ...]
    network: str = ""

    def __str__(self) -> str:
        if self.network:
            return self.network
        if not self.calls:
            return "no dynamic operator was called"
        lines = []
        for number, call in enumerate(self.calls, 1):
            lines.append(f"{number}. {call.where}{_FORMS[call.op]}: {call.operands}")
            lines.append(f"   runs on {call.chosen}: {call.kernel}")
            lines.extend(f"   note: {note}" for note in call.notes)
        answers: dict[tuple[str, ...], list[int]] = {}
        for number, call in enumerate(self.calls, 1):
            answers.setdefault(call.others, []).append(number)
        lines.append("why not on another backend")
        for others, numbers in answers.items():
            prefix = "" if len(answers) == 1 else f"{_ranges(numbers)}: "
            lines.extend(f"   {prefix}{reason}" for reason in others)
        return "\n".join(lines)

    __repr__ = __str__


def explain(fn_or_module: Callable, *args, **kwargs) -> Explanation:
    """Which kernel each dynamic operator in ``fn_or_module(*args, **kwargs)`` runs on, and why not another.

    The call is made, but without gradients; a module's buffers (running statistics) and the random state stay
    as they were. Compiled functions run uncompiled here. Only what the calling thread calls is recorded;
    other threads keep their backend, but should not run the same module meanwhile. If the backend that
    :class:`use_backend` demands cannot run an operator, the answer is what 'auto' takes, with a note that the
    real call raises.

    Args:
        fn_or_module: a public function (``dcd.dcd_conv2d``), any callable that calls one, or a module.
        *args, **kwargs: its arguments.

    Returns:
        An :class:`Explanation`: print it, or read its ``calls``.

    Raises:
        TypeError: ``fn_or_module`` is not callable. Whatever the call itself raises.
    """
    if not callable(fn_or_module):
        raise TypeError(f"explain: fn_or_module must be callable, got {type(fn_or_module).__name__}")
    fn_or_module = getattr(fn_or_module, "_orig_mod", fn_or_module)  # what torch.compile(module) wraps
    from .inference.optimize import OptimizedNetwork  # which is built on all that this module explains

    if isinstance(fn_or_module, OptimizedNetwork):
        return fn_or_module.explain(*args, **kwargs)
    calls: list[Call] = []
    names: list[str] = []
    demanded = selection.current()

    def observe(op, *tensors):
        calls.append(_judge(op, names[-1] if names else "", demanded, *tensors))

    with (
        torch.no_grad(),
        torch.random.fork_rng(),
        torch.compiler.set_stance("force_eager"),
        selection.observed_by(observe),
        _naming(fn_or_module, names),
    ):
        if isinstance(fn_or_module, nn.Module):
            buffers = {name: buffer.clone() for name, buffer in fn_or_module.named_buffers()}
            torch.func.functional_call(fn_or_module, buffers, args, kwargs)
        else:
            fn_or_module(*args, **kwargs)
    return Explanation(tuple(calls))


def support_table_markdown() -> str:
    """Which backend takes which form and dtype, asked of ``can_run`` with tensors on the CPU, as Markdown."""
    names = [name for name in selection.NAMES if name != "auto"]
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    order = [*(name for name in names if name != "reference"), "reference"]
    refusals: dict[str, None] = {}
    remarks: dict[str, None] = {}
    rows = []
    for title, op, shapes in _PROBES:
        cells = []
        for name in order:
            able = []
            for dtype in dtypes:
                tensors = [None if shape is None else torch.zeros(shape, dtype=dtype) for shape in shapes]
                yes, reason = selection.supports(name, op, *tensors)
                if yes:
                    able.append(_short(dtype))
                    note = selection.notes(name, dtype)
                    if note:
                        remarks[f"{name}, {_short(dtype)}: {note}."] = None
                else:
                    refusals[f"{name}: {reason}."] = None
            cells.append(", ".join(able) or "–")
        rows.append([title, *cells])
    header = ["form (1-D, 2-D, 3-D)", *order]
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join([*lines, "", *(f"- {line}" for line in (*remarks, *refusals))])


# Title, operator, and the shapes of (input, weight or static, p, phi, q or r, lam).
_PROBES = (
    ("pointwise, Eqs. 5 and 6", "pointwise", ((1, 2, 1, 1), (2, 2, 1, 1), (2, 1), (1, 1, 1), (2, 1), (1, 2))),
    ("pointwise, ΛW0 alone", "pointwise", ((1, 2, 1, 1), (2, 2, 1, 1), None, None, None, (1, 2))),
    ("blocks, Eq. 7", "pointwise", ((1, 2, 1, 1), (2, 2, 1, 1), (2, 1), (1, 2, 1, 1), (2, 1), (1, 2))),
    ("depthwise, Eq. 8", "depthwise", ((1, 2, 3, 3), (2, 1, 3, 3), (2, 1), (1, 1, 1), (9, 1), (1, 2))),
    ("k×k joint, Eq. 9", "joint", ((1, 2, 3, 3), (2, 2, 3, 3), (2, 1), (1, 1, 1, 1), (2, 1), (1, 2))),
    (
        "k×k channel fusion, Fig. 4b",
        "centre",
        ((1, 2, 3, 3), (2, 2, 3, 3), (2, 1), (1, 1, 1), (2, 1), (1, 2)),
    ),
    ("linear", "linear", ((1, 2), (2, 2), (2, 1), (1, 1, 1), (2, 1), (1, 2))),
    ("`dcd_apply`", "apply", ((1, 2, 1, 1), (1, 2, 1, 1), (2, 1), (1, 1, 1), (2, 1), (1, 2))),
    ("`latent_moments`", "moments", ((1, 2, 1, 1), (2, 1), None, None, None, None)),
)


def _judge(op, where, demanded, input, weight, p, phi, q, lam, geometry) -> Call:
    verdicts = []
    for name in selection.NAMES[1:]:
        able, reason = selection.ask(name, op, input, weight, p, phi, q, lam, geometry)
        verdicts.append(Verdict(name, able, reason, selection.kernel(name, op, input.dtype) if able else ""))
    able = {verdict.backend: verdict for verdict in verdicts if verdict.able}
    chosen = next(name for name in selection.preferences() if name in able)
    notes = []
    if demanded in able:
        chosen = demanded
    elif demanded != "auto":
        reason = next(verdict.reason for verdict in verdicts if verdict.backend == demanded)
        notes.append(f"use_backend('{demanded}') is in force, so that this call raises: {reason}")
    dtype = input.dtype
    if arguments.autocast_enabled(input.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        notes.append(f"autocast: all but lam, phi and bias are converted to {_short(dtype)} first")
    note = selection.notes(chosen, dtype)
    if note:
        notes.append(f"{_short(dtype)}: {note}")
    plan = selection.plan(chosen, op, geometry, input, weight, p, phi, q, lam)
    if plan:
        notes.append(plan)
    described = {
        "input": input,
        {"apply": "static", "moments": "q"}.get(op, "weight"): weight,
        "p": p,
        "phi": phi,
        "r" if op == "depthwise" else "q": q,
        "lam": lam,
    }
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in described.items() if t is not None)
    where = f"{where}: " if where else ""
    operands = f"{shapes}, {_short(input.dtype)} on {input.device}"
    return Call(op, where, operands, demanded, chosen, tuple(verdicts), tuple(notes))


@contextlib.contextmanager
def _naming(fn_or_module, names: list[str]) -> Iterator[None]:
    """Keeps the qualified names of the submodules that are running in ``names``, innermost last."""
    handles = []
    owner = threading.get_ident()  # a module that another thread runs too is not where this one is
    if isinstance(fn_or_module, nn.Module):
        # hooks on its parts would make an accelerated module run as it was written
        closed = tuple(
            f"{name}." if name else ""
            for name, module in fn_or_module.named_modules()
            if "forward" in vars(module)
        )
        for name, module in fn_or_module.named_modules():
            if name and name.startswith(closed):
                continue
            label = f"{name} ({type(module).__name__})" if name else type(module).__name__

            def enter(_module, _args, label=label):
                if threading.get_ident() == owner:
                    names.append(label)

            def leave(_module, _args, _output):
                if threading.get_ident() == owner:
                    names.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] as '1–3, 7'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in runs)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
