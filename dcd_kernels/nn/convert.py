# SPDX-License-Identifier: BSD-3-Clause
"""Make the layers of an existing network dynamic."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from dcd_kernels.arguments import check_module
from dcd_kernels.nn.branch import DynamicBranch
from dcd_kernels.nn.conv import DCDConv1d, DCDConv2d, DCDConv3d
from dcd_kernels.nn.layer import DCDLayer, cannot_convert
from dcd_kernels.nn.linear import DCDLinear

Where = Callable[[str, nn.Module], bool]

# What ``where`` is asked about. Wider than what can be converted, so that asking for one of the others is an
# error and not a layer that stays static without a word.
CANDIDATES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
CONVOLUTIONS = {nn.Conv1d: DCDConv1d, nn.Conv2d: DCDConv2d, nn.Conv3d: DCDConv3d}

# An image, a spectrogram or a waveform has nothing to fuse in a latent space below its few channels.
FEWEST_CHANNELS = 8

# These read the weights of their linear layers and never call them, so a dynamic layer would be static
# without a word.
READ_WEIGHTS_ONLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def recommended(name: str, module: nn.Module) -> bool:
    """What :func:`convert` takes when it is not told: the dense convolutions of the inside of a network.

    That is every ``nn.Conv1d/2d/3d`` with ``groups=1``, odd kernel sizes and at least 8 input channels: the
    paper's choice for its networks (Section 5.2), where depthwise DCD beside the rest loses accuracy. A
    classifier gains too, but which ``nn.Linear`` is one cannot be seen from outside: name it in ``where``.
    """
    return (
        type(module) in CONVOLUTIONS
        and cannot_convert(module) is None
        and module.groups == 1
        and module.in_channels >= FEWEST_CHANNELS
        and all(size % 2 for size in module.kernel_size)
    )


def _label(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"


def _dynamic(name: str, module: nn.Module, options: dict) -> DCDLayer:
    reason = cannot_convert(module)
    if reason is not None:
        raise TypeError(
            f"convert: where selected {_label(name, module)}, which cannot become a DCD layer: {reason}"
        )
    made = DCDLinear if type(module) is nn.Linear else CONVOLUTIONS[type(module)]
    try:
        return (made.from_linear if made is DCDLinear else made.from_conv)(module, **options)
    except (TypeError, ValueError) as error:
        # Python's own message about an option that there is not
        message = re.sub(r"^\w+\.__init__\(\)", made.__name__, str(error))
        raise type(error)(f"convert: {_label(name, module)}: {message}") from error


def convert(model: nn.Module, where: Where | None = None, **options) -> nn.Module:
    """Replace static layers of ``model`` by DCD layers that compute the same, in place.

    Each replaced layer keeps its parameters (the same objects: optimisers, tied weights and ``requires_grad``
    stay as they are), dtype, device and training mode; λ = 1 and Φ = 0, so the network's output is unchanged
    until it is trained. A layer used in several places becomes one DCD layer used in those places.

    An optimiser made before does not have the new parameters (``p``, ``q``, ``r`` and the ``branch``): make
    it afterwards, or add them. They are trainable, also in a network whose parameters are frozen.

    Args:
        model: the network. A model that is itself a convolution or a linear layer cannot be replaced in
            place: the DCD layer is returned.
        where: which layers; called with the name and the module, once for each convolution (transposed ones
            too), linear layer and subclass of these that is not inside a DCD layer. By default
            :func:`recommended`: dense convolutions with odd kernels and at least 8 input channels, no
            depthwise ones, no ``nn.Linear``.
        **options: of :meth:`DCDConv2d.from_conv` or :meth:`DCDLinear.from_linear`; call ``convert`` again
            with another ``where`` for layers that need other options.

    Returns:
        ``model``, or its replacement where the model itself was selected.

    Raises:
        TypeError: ``where`` selected a module that has no DCD layer: transposed, lazy and quantised layers,
            subclasses, layers with hooks or recomputed weights (weight_norm, pruning, parametrisations),
            linear layers that ``nn.MultiheadAttention`` or ``nn.TransformerEncoderLayer`` read without
            calling. An option that no layer has, a ``model`` that is not a module, a ``where`` that cannot be
            called.
        ValueError: an option's value that a selected layer cannot have.

        Nothing is replaced then.
    """
    check_module("convert", model)
    where = recommended if where is None else where
    if not callable(where):
        raise TypeError(f"convert: where must be a function of a name and a module, got {where!r}")
    made: dict[nn.Module, DCDLayer] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module, parent: nn.Module | None) -> None:
        if module not in seen:
            seen.add(module)
            if isinstance(module, (DCDLayer, DynamicBranch)):
                return
            if isinstance(module, CANDIDATES) and where(name, module):
                made[module] = _dynamic(name, module, options)
            # _modules, because named_children passes over a module that it has met in another place.
            for child_name, child in module._modules.items():
                if child is not None:
                    visit(f"{name}.{child_name}" if name else child_name, child, module)
        if module in made and parent is not None:
            if isinstance(parent, READ_WEIGHTS_ONLY):
                raise TypeError(
                    f"convert: where selected {_label(name, module)}, which cannot become a DCD layer: "
                    f"nn.{type(parent).__name__} reads its weight without calling it"
                )
            places.append((parent, name.rpartition(".")[2], module))

    visit("", model, None)
    for parent, name, module in places:
        setattr(parent, name, made[module])
    return made.get(model, model)
