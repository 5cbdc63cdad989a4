# SPDX-License-Identifier: BSD-3-Clause
"""Parameters and multiply-adds of a network, layer by layer, without computing anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcd_kernels import madds
from dcd_kernels.arguments import check_module
from dcd_kernels.backends.selection import use_backend
from dcd_kernels.models.released.layers import Classifier, ReleasedLayer
from dcd_kernels.nn.branch import DynamicBranch
from dcd_kernels.nn.conv import DCDConv1d, DCDConv2d, DCDConv3d
from dcd_kernels.nn.layer import DCDLayer
from dcd_kernels.nn.linear import DCDLinear

_DYNAMIC_CONVS = (DCDConv1d, DCDConv2d, DCDConv3d)
_COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, DCDLayer, DynamicBranch, ReleasedLayer)


@dataclass(frozen=True)
class LayerCount:
    """One call of one layer, in multiply-adds a sample.

    Attributes:
        name: of the module.
        parameters: of the module, its branch included.
        static: W0 on every pixel.
        branch: the fully connected layers.
        on_map: the dynamic residual in factors on the map.
        synthesised: the dynamic residual's weights once a sample, without the sum with ΛW0.
        added: what the paper counts for that sum, ``Co·Ci·∏k/groups``, in convolutions.
        residual: the dynamic residual as the CPU kernels execute it; in the layers of
            :mod:`dcd_kernels.models.released`, which are plain PyTorch, that is on the map.
    """

    name: str
    parameters: int
    static: int
    branch: int = 0
    on_map: int = 0
    synthesised: int = 0
    added: int = 0
    residual: int = 0


@dataclass(frozen=True)
class Complexity:
    """Parameters of a model and multiply-adds of one sample; made by :func:`complexity`.

    Pooling, norms, activations, additions of maps and λ on a finished output are free in every figure.
    """

    parameters: int
    layers: tuple[LayerCount, ...]

    @property
    def static(self) -> int:
        """The network with every W0 alone."""
        return sum(layer.static for layer in self.layers)

    @property
    def published(self) -> int:
        """By the paper's convention: the cheaper order for each residual, and the sum with W0 beside it."""
        return sum(
            layer.static + layer.branch + min(layer.synthesised, layer.on_map) + layer.added
            for layer in self.layers
        )

    @property
    def factored(self) -> int:
        """With every residual in factors on the map, as the released code executes all of them."""
        return sum(layer.static + layer.branch + layer.on_map for layer in self.layers)

    @property
    def executed(self) -> int:
        """As the CPU kernels execute it on one thread: the cheaper order for each layer."""
        return sum(layer.static + layer.branch + layer.residual for layer in self.layers)


def _static(weight: Tensor, pixels: int) -> int:
    return weight.numel() * pixels


def _branch(branch: DynamicBranch) -> int:
    layers = (branch.squeeze, branch.gate, branch.expand)
    return sum(layer.weight.numel() for layer in layers if layer is not None)


def _dynamic(name: str, layer: DCDLayer, input: Sequence[int], pixels: int) -> LayerCount:
    weight, taps = layer.weight, math.prod(layer.weight.shape[2:])
    out_channels, in_channels = weight.shape[0], weight.shape[1]
    depthwise = getattr(layer, "depthwise", False)
    added = weight.numel() if layer.channel_fusion and not isinstance(layer, DCDLinear) else 0
    if layer.channel_fusion and not depthwise:
        in_channels = layer.q.shape[0]
        added = min(added, in_channels * out_channels)  # one slice of a k×k kernel
    sizes = (in_channels, out_channels, layer.latent_channels or 0)
    blocks, latent_kernel = layer.blocks, layer.latent_kernel or 0
    on_map = synthesised = residual = 0
    if depthwise:
        # always by weights; on the map it would be as many products with R, and P, as there are pixels
        residual = madds.depthwise_weights(out_channels, taps, latent_kernel, layer.channel_attention)
        if layer.channel_fusion:
            synthesised = out_channels * latent_kernel * (taps + latent_kernel)
            on_map = pixels * out_channels * latent_kernel * (taps + latent_kernel + 1)
    elif layer.joint:
        residual = on_map = madds.joint_residual(*sizes, latent_kernel, taps, math.prod(input[2:]), pixels)
        # PΦ and Qᵀ for each of L_k slices, then R
        synthesised = latent_kernel * (madds.synthesised(*sizes) + in_channels * out_channels * taps)
        added = weight.numel()
    elif layer.channel_fusion:
        on_map = madds.on_map(*sizes, blocks, pixels)
        synthesised = madds.synthesised(*sizes, blocks)
        # beside a k×k or grouped convolution the residual is always taken in factors
        plain = taps == 1 and getattr(layer, "groups", 1) == 1
        residual = madds.pointwise_residual(*sizes, blocks, pixels) if plain else on_map
    return LayerCount(
        name=name,
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        static=_static(weight, pixels),
        branch=_branch(layer.branch),
        on_map=on_map,
        synthesised=synthesised,
        added=added,
        residual=residual,
    )


def _released(name: str, layer: ReleasedLayer, pixels: int) -> LayerCount:
    out_channels, latent = layer.p.weight.shape[:2]
    in_channels = layer.q.weight.shape[1]
    on_map = madds.on_map(in_channels, out_channels, latent, 1, pixels)
    fully_connected = (layer.fc[0], layer.fc[1].fc[0], layer.fc_phi, layer.fc_scale)
    return LayerCount(
        name=name,
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        static=_static(layer.static.weight, pixels),
        branch=sum(linear.weight.numel() for linear in fully_connected),
        on_map=on_map,
        synthesised=madds.synthesised(in_channels, out_channels, latent),
        added=0 if isinstance(layer, Classifier) else in_channels * out_channels,
        residual=on_map,
    )


def _count(name: str, module: nn.Module, input: Sequence[int], output: Sequence[int]) -> LayerCount:
    if isinstance(module, DCDLayer):
        linear = isinstance(module, DCDLinear)
        return _dynamic(name, module, input, math.prod(output[1:-1] if linear else output[2:]))
    if isinstance(module, ReleasedLayer):
        return _released(name, module, math.prod(output[2:]))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if isinstance(module, DynamicBranch):
        return LayerCount(name, parameters, static=0, branch=_branch(module))
    pixels = math.prod(output[1:-1] if isinstance(module, nn.Linear) else output[2:])
    return LayerCount(name, parameters, static=_static(module.weight, pixels))


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are counted, each with all that is inside it."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, _COUNTED):
            found[name] = module
            inside.update(module.modules())
        elif not isinstance(module, nn.LayerNorm) and any(
            parameter.dim() > 1 for parameter in module.parameters(recurse=False)
        ):
            kinds = "convolutions, linear layers, DCD layers and branches"
            raise TypeError(
                f"complexity: model must have its matrices in {kinds}, "
                f"got {type(module).__name__} {name!r} with others"
            )
    return found


def complexity(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> Complexity:
    """Parameters of ``model`` and the multiply-adds of one sample of shape ``input_size``.

    The model is called once on the meta device, in eval mode, with its parameters replaced by their shapes:
    nothing is computed, and the model stays as it is. A layer that is called twice is counted twice.

    Args:
        model: of any size, on any device; it takes one tensor.
        input_size: of one sample, ``(channels, *spatial)``.

    Returns:
        :class:`Complexity`, whose ``layers`` are in the order of the calls: convolutions, linear layers, DCD
        layers (with their branch) and branches that stand alone.

    Raises:
        TypeError: not a module, or one with matrices in other modules (attention, transposed convolutions),
            whose multiply-adds are not known here. Whatever the call itself raises.

    Source: paper, Tables 1 to 4; the convention of ``published`` is the one that fits them best.
    """
    check_module("complexity", model)
    counts: list[LayerCount] = []

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            counts.append(_count(name, module, tuple(inputs[0].shape), shape))

        return hook

    modes = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_hook(record(name)) for name, layer in _layers(model).items()]
    state = {
        name: tensor.detach().to("meta")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    dtypes = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    sample = torch.empty((1, *input_size), device="meta", dtype=dtypes[0] if dtypes else None)
    try:
        model.eval()
        with torch.no_grad(), use_backend("reference"):
            torch.func.functional_call(model, state, (sample,))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return Complexity(sum(parameter.numel() for parameter in model.parameters()), tuple(counts))
