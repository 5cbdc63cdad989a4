# SPDX-License-Identifier: BSD-3-Clause
"""What other projects made of the released modules: other ranks, norms, λ, sources and ways to write them.

Names of classes and children are chosen to say nothing, or the wrong thing: what counts is the data flow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from zoo import Gate, HardSigmoid2

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Plain(nn.Module):
    """Any rank, norms and λ; reshape, flatten(2), bmm. y = P(norm2(Φ z) + z) + λ⊙static(x), z = norm1(Q x).

    ``norm`` is 'batch', 'group', None, or a function of L and the rank that returns norm1 and norm2; ``skip``
    False leaves out "+ z". ``options`` go to the static convolution; its stride also to Q.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        latent=5,
        kernel_size=1,
        *,
        rank=2,
        norm="batch",
        skip=True,
        lam=None,
        pool=1,
        bias=False,
        offset=0,
        **options,
    ):
        super().__init__()
        convolution, self.rank, self.latent, self.skip = CONVOLUTIONS[rank], rank, latent, skip
        pools = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
        self.summary = pools[rank](pool)
        self.squeeze = nn.Linear(in_channels * pool**rank, 8, bias=bias)
        self.gate = Gate(8)
        self.to_mixture = nn.Linear(8, latent**2, bias=bias)
        self.to_scale = nn.Linear(8, out_channels, bias=bias)
        self.scale = HardSigmoid2() if lam is None else lam
        self.static = convolution(in_channels, out_channels, kernel_size, bias=bias, **options)
        step = options.get("stride", 1)
        self.down = convolution(in_channels, latent, 1, step, offset, bias=bias)
        self.up = convolution(latent, out_channels, 1, bias=bias)
        if norm == "batch":
            norm = batch_norms
        elif norm == "group":
            norm = group_norms
        self.norm1, self.norm2 = (nn.Identity(), nn.Identity()) if norm is None else norm(latent, rank)

    def forward(self, x):
        n = x.shape[0]
        context = self.gate(F.relu(self.squeeze(self.summary(x).flatten(1))))
        mixture = self.to_mixture(context).reshape(n, self.latent, self.latent)
        scale = self.scale(self.to_scale(context)).reshape(n, -1, *([1] * self.rank))
        z = self.norm1(self.down(x))
        flat = z.flatten(2)
        mixed = self.norm2(torch.bmm(mixture, flat))
        if self.skip:
            mixed = mixed + flat
        return self.up(mixed.reshape(z.shape)) + self.static(x) * scale


def batch_norms(latent, rank, **options):
    return NORMS[rank](latent, **options), nn.BatchNorm1d(latent, **options)


def group_norms(latent, rank):
    groups = next(g for g in (4, 3, 2, 1) if latent % g == 0)
    return nn.GroupNorm(groups, latent), nn.GroupNorm(1, latent)


def norms(make1, make2):
    """A function for ``Plain(norm=...)``: norm1 and norm2 from functions of L, or None."""

    def make(latent, rank):
        return tuple(nn.Identity() if m is None else m(latent) for m in (make1, make2))

    return make


class Einsum(nn.Module):
    """torch.einsum, x.mean((2, 3)), indexing with None, and norms on the flattened latent."""

    def __init__(self, in_channels, out_channels, latent=6, stride=1, bias=True):
        super().__init__()
        self.a = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=bias)
        self.b = nn.Conv2d(in_channels, latent, 1, stride, bias=bias)
        self.c = nn.Conv2d(latent, out_channels, 1, bias=bias)
        self.d = nn.Sequential(nn.Linear(in_channels, 6), nn.ReLU(), nn.Linear(6, out_channels))
        self.e = nn.Sequential(nn.Linear(in_channels, 6), nn.ReLU(), nn.Linear(6, latent**2))
        self.f, self.g = nn.BatchNorm1d(latent), nn.BatchNorm1d(latent)

    def forward(self, x):
        means = x.mean((2, 3))
        r = self.a(x) * (1 + torch.tanh(self.d(means)))[:, :, None, None]
        latent = self.b(x)
        z = self.f(latent.flatten(2))
        phi = self.e(means).unflatten(1, (z.shape[1], z.shape[1]))
        z = self.g(torch.einsum("nij,njp->nip", phi, z)) + z
        return r + self.c(z.view_as(latent))


class InPlace(nn.Module):
    """The @ operator, in-place products and sums, and an in-place λ."""

    def __init__(self, in_channels, out_channels, latent=4):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.q = nn.Conv2d(in_channels, latent, 1, bias=False)
        self.p = nn.Conv2d(latent, out_channels, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(latent), nn.BatchNorm1d(latent)
        self.fc = nn.Linear(in_channels, 8)
        self.fc_phi = nn.Linear(8, latent**2)
        self.fc_scale = nn.Linear(8, out_channels)
        self.act, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)

    def forward(self, x):
        b, _, h, w = x.shape
        y = F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)
        y = self.act(self.fc(y))
        scale = self.relu6(self.fc_scale(y).add_(3)).div_(3)
        z = self.bn1(self.q(x)).view(b, -1, h * w)
        phi = self.fc_phi(y).view(b, z.size(1), -1)
        mixed = self.bn2(phi @ z)
        mixed += z
        out = self.p(mixed.view(b, -1, h, w))
        r = self.conv(x)
        r *= scale.unsqueeze(2).unsqueeze(3)
        out += r
        return out


class Trace(nn.Module):
    """Conv1d as in seismic picking: nothing to flatten, an odd kernel, 'same' padding."""

    def __init__(self, in_channels, out_channels, latent=7, dilation=2):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, 5, padding="same", dilation=dilation)
        self.q = nn.Conv1d(in_channels, latent, 1)
        self.p = nn.Conv1d(latent, out_channels, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(latent), nn.BatchNorm1d(latent)
        self.fc = nn.Sequential(nn.Linear(in_channels, 4), nn.SiLU())
        self.fc_phi, self.fc_scale = nn.Linear(4, latent**2), nn.Linear(4, out_channels)

    def forward(self, x):
        b, _, _ = x.size()
        y = self.fc(x.mean(-1))
        phi = self.fc_phi(y).view(b, -1, self.q.out_channels)
        out = self.bn1(self.q(x))
        out = self.p(self.bn2(torch.matmul(phi, out)) + out)
        return out + self.conv(x) * F.hardsigmoid(self.fc_scale(y)).unsqueeze(-1)


class Strip(nn.Module):
    """(3, 1) kernels, a bias on every projection, dropout on the logits of Φ and λ."""

    def __init__(self, in_channels, out_channels, latent=3, dropout=0.3, stride=(2, 1)):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, (3, 1), stride, (1, 0))
        self.q = nn.Conv2d(in_channels, latent, 1, stride)
        self.p = nn.Conv2d(latent, out_channels, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(latent), nn.BatchNorm1d(latent)
        self.fc1, self.fc2 = nn.Linear(in_channels, 8), nn.Linear(8, 8)
        self.fc_phi, self.fc_scale = nn.Linear(8, latent**2), nn.Linear(8, out_channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        b = x.shape[0]
        y = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1).view(b, -1))))
        phi = self.drop(self.fc_phi(y)).view(b, self.q.out_channels, -1)
        scale = torch.sigmoid(self.drop(self.fc_scale(y))).view(b, -1, 1, 1)
        r = self.conv(x)
        r = r * scale
        z = self.bn1(self.q(x))
        flat = z.view(b, z.size(1), -1)
        flat = self.bn2(torch.matmul(phi, flat)) + flat
        return self.p(flat.view(b, -1, *z.shape[2:])) + r


class Reflected(nn.Module):
    """Reflection padding on the static path only; its convolution may have groups."""

    def __init__(self, in_channels, out_channels, latent=4, groups=1):
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, groups=groups)
        self.q, self.p = nn.Conv2d(in_channels, latent, 1), nn.Conv2d(latent, out_channels, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(latent), nn.BatchNorm1d(latent)
        self.fc_phi, self.fc_scale = nn.Linear(in_channels, latent**2), nn.Linear(in_channels, out_channels)

    def coefficients(self, x):
        y = x.flatten(2).mean(-1)
        phi = self.fc_phi(y).view(x.size(0), self.q.out_channels, self.q.out_channels)
        return phi, 2 * torch.sigmoid(self.fc_scale(y))[..., None, None]

    def residual(self, x, phi):
        z = self.bn1(self.q(x))
        flat = z.flatten(2)
        return self.p((self.bn2(phi.matmul(flat)) + flat).view(z.size()))

    def forward(self, x):
        phi, lam = self.coefficients(x)
        return self.conv(self.pad(x)).mul(lam).add(self.residual(x, phi))


class Guided(nn.Module):
    """Φ and λ computed from another tensor than x."""

    def __init__(self, in_channels, guide_channels, out_channels, latent=4):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="reflect")
        self.q, self.p = nn.Conv2d(in_channels, latent, 1), nn.Conv2d(latent, out_channels, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(latent), nn.BatchNorm1d(latent)
        self.head = nn.Linear(guide_channels, 8)
        self.fc_phi, self.fc_scale = nn.Linear(8, latent**2), nn.Linear(8, out_channels)
        self.lam = HardSigmoid2()

    def forward(self, x, guide):
        y = F.gelu(self.head(guide))
        phi = self.fc_phi(y).view(-1, self.q.out_channels, self.q.out_channels)
        z = self.bn1(self.q(x))
        z = (self.bn2(torch.bmm(phi, z.flatten(2))) + z.flatten(2)).view(*z.shape)
        return self.lam(self.fc_scale(y)).unsqueeze(-1).unsqueeze(-1) * self.conv(x) + self.p(z)


class Branch(nn.Module):
    """No convolution inside: λ and the residual, for somebody else's static output."""

    def __init__(self, in_channels, out_channels, latent=4, stride=1):
        super().__init__()
        self.q = nn.Conv2d(in_channels, latent, 1, stride, bias=False)
        self.p = nn.Conv2d(latent, out_channels, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(latent), nn.BatchNorm1d(latent)
        self.fc = nn.Sequential(nn.Linear(in_channels, 4, bias=False), Gate(4))
        self.fc_phi, self.fc_scale = nn.Linear(4, latent**2), nn.Linear(4, out_channels)
        self.hs = HardSigmoid2()

    def forward(self, x):
        b, _, _, _ = x.size()
        y = self.fc(x.mean(dim=(2, 3)))
        phi = self.fc_phi(y).view(b, self.q.out_channels, self.q.out_channels)
        lam = self.hs(self.fc_scale(y)).view(b, -1, 1, 1)
        out = self.bn1(self.q(x))
        _, _, h, w = out.size()
        out = out.view(b, -1, h * w)
        out = self.bn2(phi @ out) + out
        return lam, self.p(out.view(b, -1, h, w))


class Attached(nn.Module):
    """A static convolution of another module with a ``Branch`` beside it."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.backbone = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        self.branch = Branch(in_channels, out_channels, stride=stride)

    def forward(self, x):
        lam, residual = self.branch(x)
        return self.backbone(x) * lam + residual


class Masked(nn.Module):
    """Masks over Φ and λ with a static remainder; one head for both, so no fc_phi and no fc_scale."""

    def __init__(self, in_channels, out_channels, latent=4, kernel_size=3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.q = nn.Conv2d(in_channels, latent, 1, bias=False)
        self.p = nn.Conv2d(latent, out_channels, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(latent), nn.BatchNorm1d(latent)
        self.head = nn.Linear(in_channels, latent**2 + out_channels)
        self.phi_static = nn.Parameter(torch.zeros(latent, latent))
        self.lam_static = nn.Parameter(torch.ones(out_channels))
        self.register_buffer("phi_mask", (torch.arange(latent**2) % 2).view(latent, latent).float())
        self.register_buffer("lam_mask", (torch.arange(out_channels) % 3 == 0).float())

    def forward(self, x):
        size = self.q.out_channels
        logits = self.head(x.mean((2, 3)))
        phi = logits[:, : size * size].view(-1, size, size)
        phi = self.phi_mask * phi + (1 - self.phi_mask) * self.phi_static
        lam = F.relu6(logits[:, size * size :] + 3) / 3
        lam = torch.where(self.lam_mask.bool(), lam, self.lam_static)
        z = self.bn1(self.q(x))
        mixed = torch.matmul(phi, z.reshape(z.size(0), size, -1)).reshape_as(z)
        z = z + self.bn2(mixed.flatten(2)).view_as(z)
        return torch.addcmul(self.p(z), self.conv(x), lam[:, :, None, None])


class Unflattened(nn.Module):
    """einsum on the map as it is, BatchNorm2d on both sides, nothing flattened; the latent comes first."""

    def __init__(self, in_channels, out_channels, latent=4):
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, latent, 1, bias=False)
        self.restore = nn.Conv2d(latent, out_channels, 1)
        self.before, self.after = nn.BatchNorm2d(latent), nn.BatchNorm2d(latent)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.mixing, self.scaling = nn.Linear(in_channels, latent**2), nn.Linear(in_channels, out_channels)

    def forward(self, x):
        y = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
        mixture = self.mixing(y).unflatten(-1, (-1, self.reduce.out_channels))
        z = self.before(self.reduce(x))
        z = self.after(torch.einsum("bchw,bkc->bkhw", z, mixture)) + z
        return self.restore(z) + torch.einsum("bchw,bc->bchw", self.conv(x), self.scaling(y).sigmoid())


class Bare(nn.Module):
    """No norm, no skip, no λ: x through the convolution, plus P Φ Q x."""

    def __init__(self, in_channels, out_channels, latent=4):
        super().__init__()
        self.main = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.q = nn.Conv2d(in_channels, latent, 1, bias=False)
        self.p = nn.Conv2d(latent, out_channels, 1, bias=False)
        self.dynamic = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, latent**2), nn.Softmax(-1)
        )

    def forward(self, x):
        n, _, h, w = x.shape
        phi = self.dynamic(x).view(n, -1, self.q.out_channels)
        z = torch.bmm(phi, self.q(x).view(n, -1, h * w)).view(n, -1, h, w)
        return self.main(x) + self.p(z)


class Softmax(nn.Module):
    """A λ that is a function of the whole vector, with a temperature of its own."""

    def __init__(self, temperature=3.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, s):
        return s.size(-1) * torch.softmax(s / self.temperature, -1)


class Learned(nn.Module):
    """A λ with parameters."""

    def __init__(self, channels):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(channels))

    def forward(self, s):
        return 1 + torch.tanh(self.slope * s)


class Function(nn.Module):
    """A λ that is any function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, s):
        return self.function(s)


class Sum(nn.Module):
    """Two branches of a static part, before they are merged."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x) + self.second(x)


class Standardised(nn.Conv2d):
    """A convolution of a class of its own."""

    def forward(self, input):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


def one_plus_tanh(s):
    return 1 + torch.tanh(s)
