# SPDX-License-Identifier: BSD-3-Clause
"""What each module of a network computes, in the terms of the op `network`; or why that has no such terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dcd_kernels.arguments import ACTIVATIONS
from dcd_kernels.interop import layers as torch_layers
from dcd_kernels.interop import patch, shortcut
from dcd_kernels.models.released.layers import ReleasedLayer
from dcd_kernels.nn.conv import DCDConv2d
from dcd_kernels.nn.layer import DCDLayer
from dcd_kernels.nn.linear import DCDLinear
from dcd_kernels.ops.branch import GATES, LAM_ACTIVATIONS
from dcd_kernels.ops.layer import Layer as ReleasedParts

from .blocks import blocks_together, merged, merged_phi
from .pack import Branch, Layer, affine_of, wide
from .program import BLOCK, LAYOUT, padded


class Unsupported(Exception):
    """A module that runs as it is written; the message says why."""


@dataclass(frozen=True)
class Geometry:
    """Of a convolution: (height, width) of each."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def fields(self) -> dict[str, int]:
        named = {
            "kernel": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }
        return {
            f"{name}_{axis}": size
            for name, sizes in named.items()
            for axis, size in zip("hw", sizes, strict=True)
        }

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == (1, 1)


@dataclass(frozen=True)
class Branched:
    """Codes and sizes of a dynamic layer."""

    bins: int
    hidden: int
    gate_code: int
    lam_code: int
    lam_channels: int
    latent: int  # of one block
    blocks: int = 1
    latent_kernel: int = 0  # of joint fusion

    def coefficients(self) -> int:
        """Numbers that the branch gives a sample: λ in whole planes, each Φ in whole planes of rows."""
        matrices = self.latent_kernel or self.blocks
        return padded(self.lam_channels) + matrices * padded(self.latent) * self.latent


@dataclass(frozen=True)
class Convolution:
    """A layer with weights. ``kind`` is ``'dense'``, ``'depthwise'`` or ``'linear'``.

    ``read`` gives its numbers as they are now, in float64; ``activation`` is its own one, behind which no
    norm can be folded.
    """

    kind: str
    in_channels: int
    out_channels: int
    read: Callable[[], Layer]
    geometry: Geometry = Geometry()
    branch: Branched | None = None
    activation: int = 0
    what: str = "static"

    @property
    def filters_minimally(self) -> bool:
        """Whether Winograd's F(2×2, 3×3) computes the static part: by 16 products where the taps take 36."""
        geometry = self.geometry
        return (
            geometry.kernel == (3, 3)
            and geometry.stride == geometry.dilation == (1, 1)
            and min(self.in_channels, self.out_channels) >= 2 * BLOCK
        )


_ACTIVATION_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


def activation_of(module: nn.Module) -> int | None:
    """The code of the activation that ``module`` is."""
    if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6):
        return ACTIVATIONS["relu6"]
    name = _ACTIVATION_MODULES.get(type(module))
    return None if name is None else ACTIVATIONS[name]


def is_altered(module: nn.Module) -> bool:
    """Whether calling ``module`` in eval mode does something else than the forward of its class."""
    if patch.recipe_of(module) is None and not patch.is_sequence(module):
        return torch_layers.is_altered(module)
    # accelerated: its forward computes the same
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or bool(module._backward_hooks or module._backward_pre_hooks)


def is_norm(module: nn.Module) -> bool:
    """A norm over channels that goes by running statistics."""
    return (
        type(module) in (nn.BatchNorm1d, nn.BatchNorm2d)
        and not module.training
        and module.running_mean is not None
        and not is_altered(module)
    )


def is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) in torch_layers.DROPOUTS and not module.training)


def convolution_of(module: nn.Module, recipe: patch.Recipe | None, dtype: torch.dtype) -> Convolution:
    """``module`` as a layer with weights, in a network of ``dtype``.

    ``recipe`` is that of a module of the released form.

    Raises:
        Unsupported: it is none, or one of a form that has no kernel here.
    """
    if any(child.training for child in module.modules()):
        raise Unsupported("it is in training mode")
    if any(map(is_altered, module.modules())):
        raise Unsupported("it has hooks, or a forward of its own")
    for child in module.modules():
        # torch takes norms in float32 beside images in bfloat16
        served = (dtype, torch.float32) if torch_layers.is_batch_norm(child) else (dtype,)
        for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False)):
            if tensor.is_floating_point() and (tensor.dtype not in served or not tensor.is_cpu):
                name = str(dtype).removeprefix("torch.")
                raise Unsupported(f"it is in {tensor.dtype} on {tensor.device}, not {name} on the CPU")
    if any("weight" in vars(type(child)) for child in module.modules()):
        raise Unsupported("its weight is computed (parametrised)")
    kind = type(module)
    if kind is nn.Conv2d:
        return _conv(module)
    if kind is nn.Linear:
        return Convolution("linear", module.in_features, module.out_features, lambda: _static(module))
    if kind is DCDConv2d:
        return _dcd_conv(module)
    if kind is DCDLinear:
        return _dcd_linear(module)
    if isinstance(module, DCDLayer):
        raise Unsupported(f"{kind.__name__} has no kernel here")
    if isinstance(module, ReleasedLayer):
        return _released(_released_parts(module))
    if recipe is not None:
        if recipe.only is None:
            raise Unsupported("its forward computes more than the layer and its branch")
        objection = recipe.objection(module)
        if objection is not None:
            raise Unsupported(objection)
        return _released(shortcut.layer_of(module, recipe.only))
    raise Unsupported("no kernel here computes it")


# --- geometry


def _pair(value: object) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _geometry(module: nn.Module) -> tuple[str, Geometry]:
    """Kind and geometry of a two-dimensional convolution."""
    if module.padding_mode != "zeros":
        raise Unsupported(f"padding_mode={module.padding_mode!r}")
    kernel, stride, dilation = _pair(module.kernel_size), _pair(module.stride), _pair(module.dilation)
    padding = module.padding
    if padding == "valid":
        padding = 0
    elif padding == "same":
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if any(r % 2 for r in reach):
            raise Unsupported("padding='same' with an even reach, which pads one side more")
        padding = tuple(r // 2 for r in reach)
    geometry = Geometry(kernel, stride, _pair(padding), dilation)
    if max(kernel) > LAYOUT["max_kernel"] or math.prod(kernel) > LAYOUT["max_taps"]:
        raise Unsupported(f"kernel_size={kernel}")
    if module.groups == 1:
        return "dense", geometry
    if module.groups == module.in_channels == module.out_channels:
        return "depthwise", geometry
    raise Unsupported(f"groups={module.groups} for {module.in_channels} and {module.out_channels} channels")


def _require_centred(geometry: Geometry) -> None:
    """The 1×1 of the dynamic residual reads the centre tap."""
    if any(size % 2 == 0 for size in geometry.kernel):
        raise Unsupported(f"kernel_size={geometry.kernel} has no centre")


# --- static


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    """(Co, Ci, *k) as (Co, taps·Ci), channels innermost."""
    return wide(weight).flatten(2).transpose(1, 2).flatten(1) if weight.dim() > 2 else wide(weight)


def _static(module: nn.Module) -> Layer:
    return Layer(_matrix(module.weight), wide(module.bias))


def _conv(module: nn.Conv2d) -> Convolution:
    kind, geometry = _geometry(module)
    return Convolution(kind, module.in_channels, module.out_channels, lambda: _static(module), geometry)


# --- our layers


def _linear(layer: nn.Linear | None) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    return None if layer is None else (wide(layer.weight), wide(layer.bias))


def _own_branch(module: DCDLayer, together: int) -> tuple[Branched, Callable[[], Branch]]:
    """Its branch, and how to read that; ``together`` blocks of the layer's are one."""
    branch = module.branch
    channels = getattr(module, "in_channels", None) or module.in_features
    if branch.in_channels != channels:
        raise Unsupported("λ and Φ may be computed from another tensor")
    sizes = branch.pool_size or (1,)
    if len(set(sizes)) != 1:
        raise Unsupported(f"pool_size={branch.pool_size}")
    latent = 0 if branch.phi_shape is None else branch.phi_shape[-1]
    shape = {
        "latent": latent * together,
        "blocks": module.blocks // together,
        "latent_kernel": module.latent_kernel if module.joint else 0,
    }
    branched = Branched(
        sizes[0],
        branch.squeeze_channels,
        GATES.index(branch.gate_name),
        LAM_ACTIVATIONS.index(branch.lam_activation),
        branch.lam_channels,
        **shape,
    )

    def expanded(rows: torch.Tensor | None) -> torch.Tensor | None:
        if rows is None or together == 1:
            return rows
        phi = rows[branch.lam_channels :].reshape(module.blocks, latent, latent, -1)
        return torch.cat(
            [rows[: branch.lam_channels], merged_phi(phi, together).reshape(-1, *rows.shape[1:])]
        )

    def read() -> Branch:
        return Branch(
            branch.in_channels,
            sizes[0],
            _linear(branch.squeeze),
            _linear(branch.gate),
            tuple(map(expanded, _linear(branch.expand))),
            branch.lam_channels,
            **shape,
        )

    return branched, read


def _own_layer(module: DCDLayer, together: int, read_branch: Callable[[], Branch]) -> Layer:
    p, q = wide(module.p), wide(module.r if module.q is None else module.q)
    if together > 1:
        p, q = (merged(matrix, module.blocks, together) for matrix in (p, q))
    return Layer(
        _matrix(module.weight),
        wide(module.bias),
        p=p,
        q=q,
        r=wide(module.r) if module.joint else None,
        blocks=module.blocks // together,
        branch=read_branch(),
    )


def _what(module: DCDLayer) -> str:
    if module.joint:
        return "dynamic (joint fusion)"
    return "dynamic" if module.blocks == 1 else f"dynamic ({module.blocks} blocks)"


def _dcd_conv(module: DCDConv2d) -> Convolution:
    kind, geometry = _geometry(module)
    if module.channel_fusion and kind == "dense" and not module.joint:
        _require_centred(geometry)
    channels = min(module.in_channels, module.out_channels)
    together = blocks_together(module.blocks, channels, module.latent_channels or 0)
    branched, read_branch = _own_branch(module, together)
    return Convolution(
        kind,
        module.in_channels,
        module.out_channels,
        lambda: _own_layer(module, together, read_branch),
        geometry,
        branched,
        ACTIVATIONS[module.activation],
        _what(module),
    )


def _dcd_linear(module: DCDLinear) -> Convolution:
    # of one row there is not enough to save for kernels with blocks
    branched, read_branch = _own_branch(module, module.blocks)
    return Convolution(
        "linear",
        module.in_features,
        module.out_features,
        lambda: _own_layer(module, module.blocks, read_branch),
        branch=branched,
        activation=ACTIVATIONS[module.activation],
        what=_what(module),
    )


# --- the released form


def _released_parts(module: ReleasedLayer) -> ReleasedParts:
    pool = getattr(module, "pool", None)
    return ReleasedParts(
        module.static,
        module.p,
        module.q,
        module.fc[0],
        module.fc[1].fc[0],
        module.fc_scale,
        module.fc_phi,
        1 if pool is None else pool.output_size,
        "se",
        "hardsigmoid2",
        module.bn1,
        module.bn2,
        True,
    )


def _released(layer: ReleasedParts) -> Convolution:
    conv = layer.conv
    if layer.squeeze.out_features < 1:
        raise Unsupported("its branch has a squeeze of 0: nothing in it is dynamic")
    if isinstance(conv, nn.Linear):
        kind, geometry = "linear", Geometry()
        channels = conv.in_features, conv.out_features
    elif type(conv) is nn.Conv2d:
        kind, geometry = _geometry(conv)
        channels = conv.in_channels, conv.out_channels
        _require_centred(geometry)
        centred = tuple(d * (k // 2) for k, d in zip(geometry.kernel, geometry.dilation, strict=True))
        if kind != "dense" or _pair(layer.q.stride) != geometry.stride or geometry.padding != centred:
            raise Unsupported("Q does not read the centre of what the static layer reads")
    else:
        raise Unsupported(f"{type(conv).__name__} has no kernel here")
    for norm in (layer.norm1, layer.norm2):
        if norm is not None and (not torch_layers.is_batch_norm(norm) or norm.running_mean is None):
            raise Unsupported(f"{type(norm).__name__} takes its statistics from each image")
    latent = layer.q.weight.shape[0]
    branched = Branched(
        layer.pool,
        layer.squeeze.out_features,
        GATES.index(layer.gate),
        LAM_ACTIVATIONS.index(layer.lam_activation),
        channels[1],
        latent,
    )
    return Convolution(
        kind,
        *channels,
        lambda: _released_layer(layer, channels[0]),
        geometry,
        branched,
        what="dynamic (released form)",
    )


def _released_layer(layer: ReleasedParts, in_channels: int) -> Layer:
    latent = layer.q.weight.shape[0]
    first, second = affine_of(layer.norm1, latent), affine_of(layer.norm2, latent)
    p, q = wide(layer.p.weight).flatten(1), wide(layer.q.weight).flatten(1).T
    latent_bias, p_bias = first.shift, p @ second.shift
    if layer.q.bias is not None:
        latent_bias = latent_bias + first.factor * wide(layer.q.bias)
    if layer.p.bias is not None:
        p_bias = p_bias + wide(layer.p.bias)
    lam, phi = _linear(layer.lam_layer), _linear(layer.phi_layer)
    expand = torch.cat([lam[0], phi[0]])
    bias = None
    if lam[1] is not None or phi[1] is not None:
        bias = torch.cat(
            [weight.new_zeros(len(weight)) if own is None else own for weight, own in (lam, phi)]
        )
    return Layer(
        _matrix(layer.conv.weight),
        p_bias,
        wide(layer.conv.bias),
        p,
        q * first.factor,
        latent_bias=latent_bias,
        branch=Branch(
            in_channels,
            layer.pool,
            _linear(layer.squeeze),
            _linear(layer.gate_layer),
            (expand, bias),
            lam[0].shape[0],
            latent,
            scale=second.factor,
            residual=layer.latent_residual,
        ),
    )
