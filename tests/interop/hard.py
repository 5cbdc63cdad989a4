# SPDX-License-Identifier: BSD-3-Clause
"""Forwards that no tracer can follow, or that one follows wrongly without noticing."""

from __future__ import annotations

import random

import torch
from half import HALVES, Half, L
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------- forwards hard to follow


class DataDependent(Half):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else super().forward(2 * x)


class ShapeDependent(Half):
    def forward(self, x):
        return super().forward(x) if x.shape[2] > 3 else super().forward(2 * x)


class BatchDependent(Half):
    def forward(self, x):
        return super().forward(x) if len(x) > 1 else super().forward(2 * x)


class DtypeDependent(Half):
    def forward(self, x):
        return super().forward(x) if x.dtype == torch.float64 else super().forward(2 * x)


class StoresTensor(Half):
    def forward(self, x):
        self.last = x.mean()
        return super().forward(x)


class StoresPhi(Half):
    def mix(self, phi, z):
        self.phi = phi.detach()
        return super().mix(phi, z)


class Counts(Half):
    def build(self):
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class CountsInBuffer(Half):
    def build(self):
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Appends(Half):
    def build(self):
        self.log = []

    def forward(self, x):
        self.log.append(x.shape)
        return super().forward(x)


class Remembers(Half):
    def build(self):
        self.seen = {}

    def forward(self, x):
        self.seen["means"] = x.mean((2, 3))
        return super().forward(x)


REFUSED = {
    kind.__name__: kind
    for kind in (
        DataDependent,
        ShapeDependent,
        BatchDependent,
        DtypeDependent,
        StoresTensor,
        StoresPhi,
        Counts,
        CountsInBuffer,
        Appends,
        Remembers,
    )
}


# --------------------------------------------------------------- forwards that a tracer follows wrongly


class NoGradPhi(Half):
    def coefficients(self, x):
        with torch.no_grad():
            return super().coefficients(x)


class NoGradLatent(Half):
    def latent(self, x):
        with torch.no_grad():
            return super().latent(x)


class SetGradEnabled(Half):
    def coefficients(self, x):
        torch.set_grad_enabled(False)
        y = self.fc(x.mean((2, 3)))
        torch.set_grad_enabled(True)
        return self.fc_phi(y).view(len(x), L, L), 2 * torch.sigmoid(self.fc_scale(y))[:, :, None, None]


class Decorated(Half):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Detached(Half):
    def coefficients(self, x):
        return super().coefficients(x.detach())


class DetachedLatent(Half):
    def latent(self, x):
        return super().latent(x).detach()


class DetachedProjection(Half):
    def latent(self, x):
        return self.bn1(self.q(x).detach()).flatten(2)


class FullPrecision(Half):
    """The norms outside autocast."""

    def mix(self, phi, z):
        with torch.autocast("cpu", enabled=False):
            return self.bn2(torch.matmul(phi.float(), z.float())) + z.float()


class HalfPrecision(Half):
    def mix(self, phi, z):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.matmul(phi, z) + z


class Rounded(Half):
    """Explicit conversions on the way."""

    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi.bfloat16(), z.bfloat16()).to(z.dtype)) + z


class WideStatic(Half):
    """The static output in another dtype than the rest."""

    def forward(self, x):
        phi, lam = self.coefficients(x)
        return self.conv(x).to(torch.float32) * lam + self.expand(self.mix(phi, self.latent(x)), x)


class Checkpointed(Half):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class TrainingOnly(Half):
    """Another function in training."""

    def forward(self, x):
        phi, lam = self.coefficients(x)
        if self.training:
            phi = torch.tanh(phi)
        return self.conv(x) * lam + self.expand(self.mix(phi, self.latent(x)), x)


class SkipsInEval(Half):
    def forward(self, x):
        return super().forward(x) if self.training else self.conv(x)


class ModeOfAChild(Half):
    def mix(self, phi, z):
        return super().mix(phi if self.bn2.training else 2 * phi, z)


class GradEnabled(Half):
    def mix(self, phi, z):
        return super().mix(phi if torch.is_grad_enabled() else 2 * phi, z)


class AutocastEnabled(Half):
    def mix(self, phi, z):
        return super().mix(2 * phi if torch.is_autocast_enabled("cpu") else phi, z)


class NoisyPhi(Half):
    """Random numbers that depend on no input."""

    def mix(self, phi, z):
        if self.training:
            phi = phi + 0.3 * torch.randn(L, L, dtype=torch.float64)
        return super().mix(phi, z)


class DropsPath(Half):
    """Python's own random numbers."""

    def forward(self, x):
        phi, lam = self.coefficients(x)
        y = self.conv(x) * lam
        if self.training and random.random() < 0.5:
            return y
        return y + self.expand(self.mix(phi, self.latent(x)), x)


class DropsPathByTensor(Half):
    def mix(self, phi, z):
        if self.training and torch.rand(()).item() < 0.5:
            phi = torch.zeros_like(phi)
        return super().mix(phi, z)


class OptionalGuide(Half):
    def forward(self, x, guide=None):
        phi, lam = self.coefficients(x if guide is None else guide)
        return self.conv(x) * lam + self.expand(self.mix(phi, self.latent(x)), x)


class OptionalScale(Half):
    def forward(self, x, scale=1.0, *, shift=0.0):
        phi, lam = self.coefficients(x)
        return self.conv(x) * lam * scale + self.expand(self.mix(phi, self.latent(x)), x) + shift


class Variadic(Half):
    def forward(self, *inputs, **options):
        return super().forward(inputs[0] * options.get("scale", 1))


class InstanceChecked(Half):
    def forward(self, x):
        return super().forward(x if isinstance(x, torch.Tensor) else x[0])


class EditsItsInput(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        static = self.conv(x) * lam
        x = x.mul_(2)
        return static + self.expand(self.mix(phi, self.latent(x)), x)


class EditsStaticLater(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        static = self.conv(x)
        y = static * lam + self.expand(self.mix(phi, self.latent(x)), x)
        return y + static.mul_(3).detach()


class EditsLamLater(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        lam = lam.detach()
        y = self.conv(x).detach() * lam
        lam.mul_(2)
        return y + self.expand(self.mix(phi, self.latent(x)), x) + lam


class EditsPhiLater(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        phi = phi.detach()
        mixed = torch.matmul(phi, self.latent(x))
        phi.mul_(2)
        return self.conv(x) * lam + self.expand(self.bn2(mixed), x) + phi.mean()


class Nested(Half):
    """A dynamic module inside a dynamic module."""

    def build(self):
        self.conv = Half()


FOLLOWED = {
    name: kind
    for name, kind in list(globals().items())
    if isinstance(kind, type) and issubclass(kind, Half) and name not in {**HALVES, **REFUSED}
}
