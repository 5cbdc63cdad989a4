# SPDX-License-Identifier: BSD-3-Clause
"""Modules that half match the decomposition: what is fused of them, if anything, must still be right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CI, CO, L = 8, 12, 4


class Half(nn.Module):
    """P(bn2(Φ z) + z) + λ⊙conv(x) in steps that a subclass changes one of."""

    def __init__(self, in_channels=CI, out_channels=CO, latent=L):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.q = nn.Conv2d(in_channels, latent, 1)
        self.p = nn.Conv2d(latent, out_channels, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(latent), nn.BatchNorm1d(latent)
        self.fc = nn.Sequential(nn.Linear(in_channels, 6), nn.Tanh())
        self.fc_phi, self.fc_scale = nn.Linear(6, latent**2), nn.Linear(6, out_channels)
        self.build()

    def build(self):
        pass

    def coefficients(self, x):
        y = self.fc(x.mean((2, 3)))
        phi = self.fc_phi(y).view(x.size(0), self.q.out_channels, -1)
        return phi, 2 * torch.sigmoid(self.fc_scale(y))[:, :, None, None]

    def latent(self, x):
        return self.bn1(self.q(x)).flatten(2)

    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi, z)) + z

    def expand(self, z, x):
        return self.p(z.view(x.size(0), -1, x.size(2), x.size(3)))

    def forward(self, x):
        phi, lam = self.coefficients(x)
        return self.conv(x) * lam + self.expand(self.mix(phi, self.latent(x)), x)


# ------------------------------------------------------------------------------- the latent is read elsewhere


class LatentReturned(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        z = self.mix(phi, self.latent(x))
        return self.conv(x) * lam + self.expand(z, x), z


class ProjectionReturned(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        projected = self.q(x)
        z = self.mix(phi, self.bn1(projected).flatten(2))
        return self.conv(x) * lam + self.expand(z, x), projected


class ExpansionReturned(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        dynamic = self.expand(self.mix(phi, self.latent(x)), x)
        return self.conv(x) * lam + dynamic, dynamic


class StaticReturned(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        static = self.conv(x)
        return static * lam + self.expand(self.mix(phi, self.latent(x)), x), static


class LatentFeedsLam(Half):
    def build(self):
        self.from_latent = nn.Linear(L, CO)

    def forward(self, x):
        phi, _ = self.coefficients(x)
        z = self.latent(x)
        lam = torch.sigmoid(self.from_latent(z.mean(-1)))[:, :, None, None]
        return self.conv(x) * lam + self.expand(self.mix(phi, z), x)


class LatentFeedsPhi(Half):
    """Attention over the latent channels."""

    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi + z @ z.transpose(1, 2) / z.size(2), z)) + z


class LatentTwice(Half):
    """A second expansion of the same latent."""

    def build(self):
        self.other = nn.Conv2d(L, CO, 1)

    def forward(self, x):
        phi, lam = self.coefficients(x)
        z = self.mix(phi, self.latent(x))
        return self.conv(x) * lam + self.expand(z, x) + self.other(z.view(len(x), L, *x.shape[2:]))


class LatentIsStatic(Half):
    """Another layer on the raw projection."""

    def build(self):
        self.other = nn.Conv2d(L, CO, 3, padding=1)

    def forward(self, x):
        phi, lam = self.coefficients(x)
        z = self.bn1(self.q(x))
        return self.other(z) * lam + self.expand(self.mix(phi, z.flatten(2)), x)


# ------------------------------------------------------------------------------------ another latent


class Nonlinear(Half):
    def latent(self, x):
        return F.relu(self.bn1(self.q(x))).flatten(2)


class NonlinearInPlace(Half):
    def latent(self, x):
        return torch.relu_(self.bn1(self.q(x))).flatten(2)


class NonlinearBehind(Half):
    def mix(self, phi, z):
        return F.relu(self.bn2(torch.matmul(phi, z))) + z


class NonlinearAhead(Half):
    def expand(self, z, x):
        return super().expand(torch.tanh(z), x)


class ResidualOfAnotherTensor(Half):
    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi, z)) + z.roll(1, 2)


class ResidualBeforeNorm(Half):
    """bn2(Φ z) + the projection, not the normalised one."""

    def forward(self, x):
        phi, lam = self.coefficients(x)
        projected = self.q(x)
        z = self.bn1(projected).flatten(2)
        z = self.bn2(torch.matmul(phi, z)) + projected.flatten(2)
        return self.conv(x) * lam + self.expand(z, x)


class ResidualInsideNorm(Half):
    """bn2(Φ z + z)."""

    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi, z) + z)


class ResidualScaled(Half):
    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi, z)) + 0.5 * z


class ResidualAlpha(Half):
    def mix(self, phi, z):
        return torch.add(self.bn2(torch.matmul(phi, z)), z, alpha=0.5)


class ResidualTwice(Half):
    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi, z)) + z + z


class ResidualSubtracted(Half):
    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi, z)) - z


class PhiResidual(Half):
    """(Φ + I) z written as Φ with an identity added, no other residual."""

    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi + torch.eye(L, dtype=phi.dtype), z))


class Transposed(Half):
    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi.transpose(1, 2), z)) + z


class FromTheRight(Half):
    """Pixels by channels: z Φ, which is Φᵀz."""

    def mix(self, phi, z):
        return self.bn2(torch.bmm(z.transpose(1, 2), phi).transpose(1, 2)) + z


class EinsumTransposed(Half):
    def mix(self, phi, z):
        return self.bn2(torch.einsum("nji,njp->nip", phi, z)) + z


class EinsumOverSamples(Half):
    """The matrix of another sample."""

    def mix(self, phi, z):
        return self.bn2(torch.einsum("nij,mjp->mip", phi, z)) + z


class TwoMixtures(Half):
    def mix(self, phi, z):
        return self.bn2(torch.matmul(phi, torch.matmul(phi, z))) + z


class PhiOfTheNextSample(Half):
    def mix(self, phi, z):
        return super().mix(phi.roll(1, 0), z)


class MixtureOverPixels(Half):
    """A matrix product on the other side: over the pixels."""

    def mix(self, phi, z):
        return self.bn2(torch.matmul(z, torch.softmax(z.transpose(1, 2) @ z, -1))) + torch.matmul(phi, z)


class LayerNorm(Half):
    def build(self):
        self.bn1 = nn.LayerNorm([L, 5, 6])


class InstanceNorm(Half):
    def build(self):
        self.bn1, self.bn2 = nn.InstanceNorm2d(L, affine=True), nn.InstanceNorm1d(L, track_running_stats=True)


class NormOfTheOther(Half):
    """BatchNorm whose channels are the samples: on the transposed latent."""

    def mix(self, phi, z):
        mixed = torch.matmul(phi, z)
        return self.bn2(mixed.transpose(1, 2).reshape(-1, L)).reshape(len(z), -1, L).transpose(1, 2) + z


class DropoutOnLatent(Half):
    def latent(self, x):
        return F.dropout(super().latent(x), 0.3, self.training)


class ScrambledPixels(Half):
    """A view that is no view: pixels and channels in another order."""

    def latent(self, x):
        z = self.bn1(self.q(x))
        return z.permute(0, 2, 3, 1).reshape(len(x), L, -1)


class FlippedPixels(Half):
    def expand(self, z, x):
        return self.p(z.view(x.size(0), -1, x.size(2), x.size(3)).flip(3))


class OtherSpatialShape(Half):
    """Height and width exchanged; P does not mind, the sum does not either on a square map."""

    def expand(self, z, x):
        return self.p(z.view(x.size(0), -1, x.size(3), x.size(2)).transpose(2, 3))


# ------------------------------------------------------------------------------- another projection


class Functional(Half):
    """F.conv2d on the weights of the layers."""

    def forward(self, x):
        phi, lam = self.coefficients(x)
        z = self.bn1(F.conv2d(x, self.q.weight, self.q.bias)).flatten(2)
        z = self.mix(phi, z).view(len(x), L, *x.shape[2:])
        return self.conv(x) * lam + F.conv2d(z, self.p.weight, self.p.bias)


class ChannelsLast(Half):
    """Q and P as Linear on the last dimension."""

    def build(self):
        self.q, self.p, self.bn1 = nn.Linear(CI, L), nn.Linear(L, CO), nn.BatchNorm1d(L)
        self.q.out_channels = L

    def latent(self, x):
        return self.bn1(self.q(x.permute(0, 2, 3, 1).flatten(1, 2)).transpose(1, 2))

    def expand(self, z, x):
        return self.p(z.transpose(1, 2)).transpose(1, 2).reshape(len(x), CO, *x.shape[2:])


class ManyGroups(Half):
    """Φ as the weight of a convolution with a group a sample."""

    def mix(self, phi, z):
        n, latent, pixels = z.shape
        mixed = F.conv1d(z.reshape(1, n * latent, pixels), phi.reshape(n * latent, latent, 1), groups=n)
        return self.bn2(mixed.view(n, latent, pixels)) + z


class Fused(Half):
    """The residual inside the product."""

    def mix(self, phi, z):
        return torch.baddbmm(z, phi, z)


class FusedScaled(Half):
    def mix(self, phi, z):
        return torch.baddbmm(z, phi, z, beta=0.5, alpha=2)


class GroupedP(Half):
    def build(self):
        self.p = nn.Conv2d(L, CO, 1, groups=2)


class GroupedQ(Half):
    def build(self):
        self.q = nn.Conv2d(CI, L, 1, groups=2)


class WideQ(Half):
    def build(self):
        self.q = nn.Conv2d(CI, L, 3, padding=1)


class WideP(Half):
    def build(self):
        self.p = nn.Conv2d(L, CO, 3, padding=1)


class StridedP(Half):
    """The stride in P and not in Q."""

    def build(self):
        self.p = nn.Conv2d(L, CO, 1, 2)
        self.conv = nn.Conv2d(CI, CO, 3, 2, 1)


class TransposedQ(Half):
    def build(self):
        self.q = nn.ConvTranspose2d(CI, L, 1)


class PTwice(Half):
    """P also expands something else."""

    def forward(self, x):
        phi, lam = self.coefficients(x)
        z = self.latent(x)
        return self.conv(x) * lam + self.expand(self.mix(phi, z), x) + self.expand(z, x)


class QOfSomethingElse(Half):
    def latent(self, x):
        return super().latent(F.relu(x))


class StaticOfSomethingElse(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        return self.conv(x.flip(3)) * lam + self.expand(self.mix(phi, self.latent(x)), x)


# ------------------------------------------------------------------------------------------ another sum


class LamOverAll(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        return (self.conv(x) + self.expand(self.mix(phi, self.latent(x)), x)) * lam


class LamOverDynamic(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        return self.conv(x) + self.expand(self.mix(phi, self.latent(x)), x) * lam


class LamPerPixel(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        return self.conv(x) * (lam * x.mean(1, keepdim=True)) + self.expand(self.mix(phi, self.latent(x)), x)


class LamPerSample(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        return self.conv(x) * lam.mean(1, keepdim=True) + self.expand(self.mix(phi, self.latent(x)), x)


class LamShared(Half):
    """One λ for all samples."""

    def forward(self, x):
        phi, lam = self.coefficients(x)
        return self.conv(x) * lam.mean(0, keepdim=True) + self.expand(self.mix(phi, self.latent(x)), x)


class Subtracted(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        return self.conv(x) * lam - self.expand(self.mix(phi, self.latent(x)), x)


class Weighted(Half):
    def forward(self, x):
        phi, lam = self.coefficients(x)
        return torch.add(self.conv(x) * lam, self.expand(self.mix(phi, self.latent(x)), x), alpha=0.3)


class WithShortcut(Half):
    """More than two terms, an activation behind."""

    def build(self):
        self.bn = nn.BatchNorm2d(CO)

    def forward(self, x):
        phi, lam = self.coefficients(x)
        y = self.expand(self.mix(phi, self.latent(x)), x) + self.conv(x) * lam + self.bn(self.conv(x))
        return F.silu(y)


class NormOnStatic(Half):
    def build(self):
        self.bn = nn.BatchNorm2d(CO)

    def forward(self, x):
        phi, lam = self.coefficients(x)
        return lam * F.relu(self.bn(self.conv(x))) + self.expand(self.mix(phi, self.latent(x)), x)


class BroadcastStatic(Half):
    """A static part of one pixel, broadcast over the map."""

    def forward(self, x):
        phi, lam = self.coefficients(x)
        return self.conv(x).mean((2, 3), keepdim=True) * lam + self.expand(self.mix(phi, self.latent(x)), x)


class SelfAdded(Half):
    def forward(self, x):
        phi, _ = self.coefficients(x)
        y = self.expand(self.mix(phi, self.latent(x)), x)
        return y + y


class Identity(Half):
    """The static part is the input itself."""

    def build(self):
        self.p, self.fc_scale = nn.Conv2d(L, CI, 1), nn.Linear(6, CI)

    def forward(self, x):
        phi, lam = self.coefficients(x)
        return x * lam + self.expand(self.mix(phi, self.latent(x)), x)


class TwoResiduals(Half):
    """Two dynamic residuals in one forward, the second on the output of the first."""

    def build(self):
        self.q2, self.p2 = nn.Conv2d(CO, L, 1), nn.Conv2d(L, CO, 1)

    def forward(self, x):
        phi, lam = self.coefficients(x)
        y = self.conv(x) * lam + self.expand(self.mix(phi, self.latent(x)), x)
        z = self.q2(y).flatten(2)
        return y + self.p2((phi @ z).view(len(x), L, *y.shape[2:]))


HALVES = {
    name: kind for name, kind in list(globals().items()) if isinstance(kind, type) and issubclass(kind, Half)
}
