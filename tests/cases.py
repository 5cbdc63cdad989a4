# SPDX-License-Identifier: BSD-3-Clause
"""Random calls of the public functions, one generator for every form, and the project's tolerance.

``make_case('joint', kernel=3, stride=2).run(dcd)`` calls ``dcd.dcd_conv2d``; ``.run(dcd.reference)`` the
reference; ``.truth()`` asks the NumPy oracle for the same in float64.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass, field, replace

import numpy as np
import oracle
import torch
from torch import Tensor

#: Fresh in every session; conftest.py prints it, and the environment variable repeats a session.
SEED = int(os.environ.get("DCD_KERNELS_TEST_SEED") or random.SystemRandom().randrange(2**31))

#: name -> what make_case sets for it, beside the arguments of the call
FORMS = {
    "pointwise": {},  # Eq. 6
    "fusion alone": {"lam": False},  # Eq. 5
    "attention alone": {"dynamic": False},  # ΛW0
    "blocks": {"blocks": 2},  # Eq. 7
    "depthwise": {"kernel": 3, "padding": 1},  # Eq. 8
    "depthwise attention alone": {"kernel": 3, "padding": 1, "dynamic": False},
    "joint": {"kernel": 3, "padding": 1},  # Eq. 9
    "centre": {"kernel": 3, "padding": 1},  # Fig. 4b
    "centre attention alone": {"kernel": 3, "padding": 1, "dynamic": False},
    "centre blocks": {"kernel": 3, "padding": 1, "blocks": 2},
    "grouped": {"kernel": 3, "padding": 1, "groups": 2, "blocks": 4, "in_channels": 8, "out_channels": 12},
    "linear": {"size": ()},
    "linear rows": {"size": (2, 3)},
    "linear blocks": {"size": (3,), "blocks": 2},
    "apply": {},
    "apply blocks": {"blocks": 2},
    "apply attention alone": {"dynamic": False},
    "apply on a latent": {},
}
WIDE = ("lam", "phi", "bias")  # may be float32 beside half precision


@dataclass
class Case:
    """One call: ``function`` by name, named tensors (None where absent), and the other keyword arguments."""

    form: str
    function: str
    tensors: dict[str, Tensor | None]
    options: dict = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The tensors that are there."""
        return [name for name, tensor in self.tensors.items() if tensor is not None]

    def run(self, module) -> Tensor:
        """``module.dcd_…(…)``; module is dcd_kernels or dcd_kernels.reference."""
        return getattr(module, self.function)(**self.tensors, **self.options)

    def of(self, module, *tensors: Tensor) -> Tensor:
        """The same call with other tensors, given in the order of ``names``; for gradcheck and torch.func."""
        return self.with_tensors(dict(zip(self.names, tensors, strict=True))).run(module)

    def with_tensors(self, tensors: dict[str, Tensor | None]) -> Case:
        return replace(self, tensors={**self.tensors, **tensors})

    def converted(self, dtype: torch.dtype, wide: torch.dtype | None = None) -> Case:
        """The same values in another dtype; ``wide`` for lam, phi and bias."""
        return self.with_tensors(
            {
                name: self.tensors[name].detach().to(wide if wide and name in WIDE else dtype)
                for name in self.names
            }
        )

    def requiring_grad(self) -> Case:
        return self.with_tensors(
            {name: self.tensors[name].detach().clone().requires_grad_() for name in self.names}
        )

    def leaves(self) -> list[Tensor]:
        return [self.tensors[name] for name in self.names]

    def truth(self) -> Tensor:
        """The oracle's answer to the exact values of these tensors, in float64 (complex128)."""
        arrays = {name: None if t is None else as_array(t) for name, t in self.tensors.items()}
        kind = "conv" if self.function.startswith("dcd_conv") else self.function.removeprefix("dcd_")
        return torch.from_numpy(np.ascontiguousarray(getattr(oracle, kind)(**arrays, **self.options)))


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).cpu().numpy()


def make_case(form: str, **options) -> Case:
    """A random call of one of ``FORMS``.

    Options (defaults depend on the form): spatial (1, 2 or 3), batch, in_channels, out_channels, latent,
    size, kernel, stride, padding, dilation, groups, blocks, latent_kernel, offset, lam (bool), bias (None,
    'shared', 'sample'), residual (bool), activation, dynamic (bool), dtype, device, layout ('contiguous',
    'channels_last', 'sliced'), requires_grad, seed.
    """
    given = {**FORMS[form], **options}
    take = given.pop
    spatial = take("spatial", 2)
    batch, ci, co = take("batch", 2), take("in_channels", 6), take("out_channels", 4)
    depthwise = form.startswith("depthwise")
    if depthwise:
        co = co // ci * ci or ci
    latent = take("latent", 3)
    dynamic, blocks, groups = take("dynamic", True), take("blocks", 1), take("groups", 1)
    size = oracle.each(take("size", (5, 4, 3)[:spatial]), spatial)
    kernel = oracle.each(take("kernel", 1), spatial)
    stride, padding, dilation = take("stride", 1), take("padding", 0), take("dilation", 1)
    offset, latent_kernel = take("offset", 0), take("latent_kernel", 2)
    with_lam, bias, with_residual = take("lam", True), take("bias", None), take("residual", False)
    activation = take("activation", None)
    dtype, device = take("dtype", torch.float64), take("device", "cpu")
    layout, requires_grad, seed = take("layout", "contiguous"), take("requires_grad", False), take("seed", 0)
    assert not given, f"unknown options {given}"
    generator = torch.Generator().manual_seed((SEED + seed) % 2**63)

    def random_tensor(*shape, fan: int = 1):
        values = torch.randn(shape, generator=generator, dtype=torch.promote_types(dtype, torch.float64))
        return (values / math.sqrt(fan)).to(dtype)

    rest: dict = {}
    groups = ci if depthwise else groups
    if form.startswith("linear"):
        function = "dcd_linear"
        shape, output = (batch, *size, ci), (batch, *size, co)
        weight = (co, ci)
    elif form.startswith("apply"):
        function, rest = "dcd_apply", {"stride": stride, "offset": offset}
        shape, output = (batch, ci, *size), (batch, co, *output_size(size, (1,) * spatial, stride, 0, 1))
        weight = None
    else:
        function = f"dcd_conv{spatial}d"
        rest = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        shape = (batch, ci, *size)
        output = (batch, co, *output_size(size, kernel, stride, padding, dilation))
        weight = (co, ci // groups, *kernel)
    taps = math.prod(kernel)
    tensors: dict[str, Tensor | None] = {}
    if weight is None:
        tensors["static"] = random_tensor(*output)
    tensors["input"] = random_tensor(*shape)
    if weight is not None:
        tensors["weight"] = random_tensor(*weight, fan=math.prod(weight[1:]))
    square = (latent, latent)
    phi = {"joint": (latent_kernel, *square), "apply on a latent": (latent, ci)}.get(form)
    phi = phi or ((blocks, *square) if blocks > 1 else square)
    has_q = not depthwise and form != "apply on a latent"
    has_r = (depthwise or form == "joint") and dynamic
    tensors["p"] = random_tensor(co, latent, fan=latent) if dynamic else None
    tensors["phi"] = random_tensor(batch, *phi, fan=latent) if dynamic else None
    tensors["q"] = random_tensor(ci, latent, fan=ci) if dynamic and has_q else None
    if has_r:
        tensors["r"] = random_tensor(taps, latent if depthwise else latent_kernel, fan=taps)
    tensors["lam"] = random_tensor(batch, co) if with_lam else None
    tensors["bias"] = None if bias is None else random_tensor(*((co,) if bias == "shared" else (batch, co)))
    tensors["residual"] = random_tensor(*output) if with_residual else None
    for name, tensor in tensors.items():
        if tensor is not None:
            image = name in ("input", "static", "residual")
            tensors[name] = in_layout(tensor.to(device), layout, image).requires_grad_(requires_grad)
    return Case(form, function, tensors, {**rest, "activation": activation})


def output_size(size, kernel, stride, padding, dilation) -> tuple[int, ...]:
    """The size of a convolution's output, as torch.nn.functional defines it."""
    spatial = len(size)
    steps, spread = oracle.each(stride, spatial), oracle.each(dilation, spatial)
    around = oracle.margins(padding, kernel, spread)
    return tuple(
        (length + sum(pads) - d * (k - 1) - 1) // s + 1
        for length, pads, k, d, s in zip(size, around, kernel, spread, steps, strict=True)
    )


def in_layout(tensor: Tensor, layout: str, image: bool = True) -> Tensor:
    """The same values: contiguous, channels last (images only), or a view into a larger tensor of NaN."""
    if layout == "channels_last" and image and tensor.dim() > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        sizes = [length + 3 for length in tensor.shape]
        larger = torch.full(sizes, float("nan"), dtype=tensor.dtype, device=tensor.device)
        return larger[tuple(slice(1, 1 + length) for length in tensor.shape)].copy_(tensor)
    return tensor.contiguous()


def assert_close_to_truth(
    got: Tensor,
    torch_same_precision: Tensor,
    truth64: Tensor,
    what: str = "",
    eps: float | None = None,
) -> None:
    """Error at most twice that of plain PyTorch at the same precision, plus 4 eps times the truth's norm.

    ``torch_same_precision`` is what the reference computes from the same tensors; ``truth64`` the float64
    answer to their exact values; ``eps`` is that of the dtype unless the products are asked for in less
    (tf32). Shape and dtype must agree, and everything that is finite in truth must be finite.
    """
    assert got.shape == truth64.shape, f"{what} shape {tuple(got.shape)}, expected {tuple(truth64.shape)}"
    assert got.dtype == torch_same_precision.dtype, f"{what} {got.dtype}, not {torch_same_precision.dtype}"
    high = torch.complex128 if got.is_complex() else torch.float64
    mine, plain, truth = (t.detach().cpu().to(high) for t in (got, torch_same_precision, truth64))
    lost = truth.isfinite() & ~mine.isfinite()
    assert not lost.any(), f"{what} {int(lost.sum())} of {lost.numel()} values are not finite"
    error = torch.linalg.vector_norm(mine - truth).item()
    allowed = 2 * torch.linalg.vector_norm(plain - truth).item()
    allowed += 4 * (eps or torch.finfo(got.dtype).eps) * torch.linalg.vector_norm(truth).item()
    assert error <= allowed, f"{what} error {error:.3g}, allowed {allowed:.3g}"


def assert_same(got: Tensor, truth: Tensor, relative: float = 1e-12, what: str = "") -> None:
    """Agreement of two float64 results: ``relative`` times the largest value of the truth, in every entry."""
    assert got.shape == truth.shape, f"{what} shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == truth.dtype, f"{what} {got.dtype}, not {truth.dtype}"
    if truth.numel():
        error = (got.detach() - truth.detach()).abs().max().item()
        scale = max(1.0, truth.detach().abs().max().item())
        assert error <= relative * scale, f"{what} error {error:.3g}, scale {scale:.3g}"
