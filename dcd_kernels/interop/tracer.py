# SPDX-License-Identifier: BSD-3-Clause
"""A torch.fx tracer beside which other threads may call modules, or trace."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import fx, nn

# Two tracers at once would each put back what the other had put in place of nn.Module's methods.
_ONE_AT_A_TIME = threading.RLock()


class ThreadTracer(fx.Tracer):
    """Follows the modules of its own thread.

    While it traces, torch.fx has methods of its own in the place of ``nn.Module.__call__`` and
    ``nn.Module.__getattr__``, for the whole process: what other threads call meanwhile has to run as ever.
    """

    def trace(self, root: nn.Module, concrete_args: dict[str, object] | None = None) -> fx.Graph:
        with _ONE_AT_A_TIME:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Callable[..., object], args: tuple, kwargs: dict) -> object:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: object, parameter_proxy_cache: dict[str, fx.Proxy]) -> object:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
