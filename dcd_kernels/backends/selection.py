# SPDX-License-Identifier: BSD-3-Clause
"""Which backend runs an operator.

'auto' takes the first backend whose ``can_run`` agrees; a backend that was asked for by name and cannot run
a call raises with its reason. The same predicates write :func:`dcd_kernels.explain` and the support table.

Environment: ``DCD_KERNELS_BACKEND``, read at import, sets what :class:`use_backend` sets.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Self

import torch
from torch import Tensor

from ..geometry import Geometry
from . import cpu, cuda, reference, triton

OPS = ("pointwise", "linear", "depthwise", "centre", "joint", "apply", "moments")
NAMES = ("auto", "reference", "cpu", "triton", "cuda")
ENVIRONMENT = "DCD_KERNELS_BACKEND"
_AUTO = (cpu, cuda, triton, reference)  # in order of preference; the last one runs everything
_BUILT = {backend.NAME: backend for backend in _AUTO}


def _valid(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


# Plain module globals: torch.compile reads and guards them, and reading one costs nothing on the way to a
# kernel.
_requested: str = _valid(os.environ.get(ENVIRONMENT, "").strip().lower() or "auto", ENVIRONMENT)
_observed: int = 0  # threads that are being observed; no other reads more than this number
_observed_lock = threading.Lock()
_thread = threading.local()


class use_backend:
    """Choose the backend: ``use_backend('cpu')`` sets it, ``with use_backend('cpu'):`` sets and restores it.

    The choice holds for the whole process, all threads. 'auto' takes the best backend that runs a call; any
    other name is an order: a call that this backend cannot run raises RuntimeError with its reason.

    Args:
        name: 'auto', 'cpu', 'cuda', 'triton' or 'reference'.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        global _requested
        self._name = _valid(name, "backend")
        self._before = _requested
        _requested = name

    def __enter__(self) -> Self:
        global _requested
        _requested = self._name  # again, for an object that is entered twice
        return self

    def __exit__(self, *_) -> None:
        global _requested
        _requested = self._before


def current() -> str:
    """The name last given to :class:`use_backend` (or by the environment); 'auto' unless somebody chose."""
    return _requested


def is_observed() -> bool:
    """Whether some thread looks on, and choices should be made where it can see them."""
    return _observed > 0


def select(
    op: str,
    input: Tensor,
    weight: Tensor,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    lam: Tensor | None = None,
    where: Geometry | None = None,
) -> str:
    """Name of the backend for a checked call of ``op``, one of ``OPS``.

    ``where`` is a convolution's geometry; ``None`` where every pixel of the input is one of the output.

    Raises:
        RuntimeError: a backend was chosen by name and cannot run this call.
    """
    automatic = _requested == "auto"
    if _observed:
        observe = getattr(_thread, "observe", None)
        if observe is not None:
            observe(op, input, weight, p, phi, q, lam, where)
            automatic = True
    if automatic:
        for backend in _AUTO:
            if backend.can_run(op, input, weight, p, phi, q, lam, where)[0]:
                return backend.NAME
    able, reason = ask(_requested, op, input, weight, p, phi, q, lam, where)
    if not able:
        raise RuntimeError(
            f"backend '{_requested}' cannot run {op}: {reason}; use_backend('auto') takes another one"
        )
    return _requested


@contextlib.contextmanager
def observed_by(observe: Callable[..., None]) -> Iterator[None]:
    """Every choice of a backend in this thread passes ``observe``; 'auto' meanwhile, whatever is demanded."""
    global _observed
    before = getattr(_thread, "observe", None)
    _thread.observe = observe
    with _observed_lock:
        _observed += 1
    try:
        yield
    finally:
        _thread.observe = before
        with _observed_lock:
            _observed -= 1


def ask(name: str, op: str, *call: Tensor | Geometry | None) -> tuple[bool, str]:
    """``can_run`` of the backend called ``name``."""
    return _BUILT[name].can_run(op, *call)


def supports(name: str, op: str, *tensors: Tensor | None) -> tuple[bool, str]:
    """Whether the kernels of the backend called ``name`` take such operands on a device of their own."""
    backend = _BUILT[name]
    return getattr(backend, "supports", backend.can_run)(op, *tensors)


def preferences() -> list[str]:
    """The backends that 'auto' tries, best first."""
    return [backend.NAME for backend in _AUTO]


def kernel(name: str, op: str, dtype: torch.dtype) -> str:
    """What the backend called ``name`` would run for ``op``, in words; it must be one that can."""
    return _BUILT[name].kernel(op, dtype)


def notes(name: str, dtype: torch.dtype) -> str:
    """What a user of ``dtype`` should know about the backend called ``name``; empty for nothing."""
    return _BUILT[name].NOTES.get(dtype, "")


def plan(name: str, op: str, where: Geometry | None, *tensors: Tensor | None) -> str | None:
    """What the backend called ``name`` decides by the shape of a call, in words; ``where`` as in select."""
    size = None if where is None else where.output
    return getattr(_BUILT[name], "plan", lambda *_: None)(op, size, *tensors)
