# SPDX-License-Identifier: BSD-3-Clause
"""Tells at once whether any weight of a network has changed.

To look at some four hundred tensors takes as long as a tenth of a small network does. So every way to change
one leaves its trace in one place. Written to in place, tensors count versions, and all of them share one
counter; another tensor in a module's ``_parameters`` or ``_buffers`` is noticed by the dictionary; and
``tensor.data = other`` by the parameter; of buffers, which torch.compile wants to be plain tensors, the
addresses are compared. What is edited through ``parameter.data`` counts too: here that is a detached alias,
which shares the counter, where torch's own has one of its own. Norms in training mode write to their
statistics unseen, but count their batches. Out of reach are edits through NumPy and through ``buffer.data``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

_STORES = ("_parameters", "_buffers")


class Watch:
    """Watches the tensors of ``network``, whose modules and tensors it makes its own.

    Tensors that come in later, in place of others, are looked at one by one.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.changes = 0  # but for edits in place
        self._late: list[Tensor] = []
        self._buffers: list[Tensor] = []
        with torch.inference_mode(False):
            self.anchor = torch.empty(0, dtype=torch.float32, device="cpu")
            adopted: dict[int, Tensor] = {}
            for module in network.modules():
                for name in _STORES:
                    store = module.__dict__[name]
                    for key, tensor in store.items():
                        if tensor is not None and _is_plain(tensor):
                            if id(tensor) not in adopted:
                                adopted[id(tensor)] = self._adopted(tensor)
                            store[key] = adopted[id(tensor)]
                    module.__dict__[name] = _Store(store, self)

    def _adopted(self, tensor: Tensor) -> Tensor:
        """``tensor`` as one that counts its versions with all the others."""
        if not isinstance(tensor, nn.Parameter):
            own = self.anchor.detach()
            own.data = tensor.data
            self._buffers.append(own)
            return own.requires_grad_(tensor.requires_grad)
        own = torch.Tensor._make_subclass(WatchedParameter, self.anchor.detach(), False)
        _set_data(own, tensor.data)
        own.watch = self
        own.requires_grad_(tensor.requires_grad)
        return own

    def places(self) -> Iterator[tuple[dict, str, Tensor]]:
        """Every tensor of the network, and where it is."""
        for module in self.network.modules():
            for name in _STORES:
                store = module.__dict__[name]
                for key, tensor in store.items():
                    if tensor is not None:
                        yield store, key, tensor

    def note_change(self) -> None:
        self.changes += 1

    def state(self) -> tuple:
        """What is the same as long as no weight changes."""
        late = [(id(tensor), tensor._version, tensor.data_ptr()) for tensor in self._late]
        return self.changes, self.anchor._version, late, list(map(Tensor.data_ptr, self._buffers))

    def _replace_inference_tensors(self) -> None:
        """Puts others in the place of tensors that were made in inference mode, which count no versions."""
        copies: dict[int, Tensor] = {}
        with torch.inference_mode(False):
            for store, key, tensor in list(self.places()):
                if not tensor.is_inference():
                    continue
                if id(tensor) not in copies:
                    own = tensor.clone()
                    own = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
                    copies[id(tensor)] = self._adopted(own) if _is_plain(own) else own
                store[key] = copies[id(tensor)]

    def renew(self) -> tuple:
        """The state, with tensors that came in since the last time looked at from now on."""
        self._replace_inference_tensors()
        own = set(map(id, self._buffers))
        self._late = [
            tensor
            for _, _, tensor in self.places()
            if getattr(tensor, "watch", None) is not self and id(tensor) not in own
        ]
        # so that no other tensor gets the addresses that are compared
        self._held = [tensor.detach() for tensor in (*self._late, *self._buffers)]
        return self.state()


def _is_plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` can be the data of another one; others, which no kernel reads, are looked at."""
    return (
        (tensor.is_floating_point() or not isinstance(tensor, nn.Parameter))
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and type(tensor) in (Tensor, nn.Parameter, nn.Buffer, WatchedParameter)
    )


_set_data = torch.Tensor.data.__set__


class WatchedParameter(nn.Parameter):
    """A parameter that tells its `Watch` of changes; copies and pickles of it are nn.Parameter."""

    watch: Watch | None = None

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        _set_data(self, value)
        if self.watch is not None:
            self.watch.note_change()

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> tuple:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


class _Store(dict):
    """A module's tensors by name; copies and pickles of it are plain dictionaries."""

    def __init__(self, content: dict, watch: Watch) -> None:
        super().__init__(content)
        self.watch = watch

    def __reduce_ex__(self, protocol: int) -> tuple:
        return dict, (), None, None, iter(self.items())

    def __setitem__(self, key: str, value: Tensor | None) -> None:
        super().__setitem__(key, value)
        self.watch.note_change()

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.watch.note_change()

    def _changing(name: str):
        own = getattr(dict, name)

        def method(self, *args, **kwargs):
            result = own(self, *args, **kwargs)
            self.watch.note_change()
            return result

        method.__name__ = name
        return method

    pop, popitem, clear, update, setdefault, __ior__ = map(
        _changing, ("pop", "popitem", "clear", "update", "setdefault", "__ior__")
    )
    del _changing
