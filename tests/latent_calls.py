# SPDX-License-Identifier: BSD-3-Clause
"""Random calls of latent_map, and what the composition says to them."""

from __future__ import annotations

import torch
from cases import SEED

from dcd_kernels import latent_map as composition
from dcd_kernels import ops
from dcd_kernels.latent_map import BATCH, GROUPS, NO_NORM, RUNNING, Norm

_GROUPS = {1: 1, 3: 3, 8: 2, 45: 5}
NAMES = ("phi", "mean", "covariance", "weight1", "bias1", "weight2", "bias2", "latent_bias")


class Call:
    """Arguments of one call, and the pixels (N, P, L) of Qᵀx whose moments are among them."""

    def __init__(self, size, pair, residual=True, bias=True, affine=True, dtype=torch.float64, far=1.0):
        batch, latent = size
        key = (SEED, *size, *pair, residual, bias, affine)
        generator = torch.Generator().manual_seed(hash(key) % 2**63)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def norm(code):
            if code == NO_NORM:
                return Norm()
            weight, shift = (1 + draw(latent) / 3, draw(latent)) if affine else (None, None)
            running = (draw(latent), draw(latent).square() + 0.5) if code == RUNNING else (None, None)
            return Norm(code, _GROUPS[latent] if code == GROUPS else 0, 1e-5, weight, shift, *running)

        self.residual = residual
        self.phi = draw(batch, latent, latent) / latent**0.5
        self.pixels = draw(batch, 7, latent) + far * (1 + draw(latent) / 4)
        self.norm1, self.norm2 = norm(pair[0]), norm(pair[1])
        self.latent_bias = draw(latent) if bias else None
        self.mean = self.covariance = None
        if max(pair) >= BATCH:
            self.mean = self.pixels.mean(1)
            centred = self.pixels - self.mean.unsqueeze(1)
            self.covariance = centred.mT @ centred / 7
        self.grads = draw(batch, latent, latent), draw(batch, latent)
        self.convert(dtype)

    def convert(self, dtype):
        """Every tensor in ``dtype``, leaves that require gradients where they can have some."""

        def leaf(tensor, requires_grad=True):
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_(requires_grad)

        def converted(norm):
            *numbers, weight, bias, mean, variance = norm
            return Norm(*numbers, leaf(weight), leaf(bias), leaf(mean, False), leaf(variance, False))

        self.phi, self.mean, self.covariance = leaf(self.phi), leaf(self.mean), leaf(self.covariance)
        self.norm1, self.norm2 = converted(self.norm1), converted(self.norm2)
        self.latent_bias = leaf(self.latent_bias)
        self.grads = tuple(leaf(grad, False) for grad in self.grads)
        return self

    @property
    def arguments(self):
        return (self.phi, self.mean, self.covariance, self.norm1, self.norm2, self.latent_bias, self.residual)

    @property
    def flat(self):
        """As the op itself takes them."""
        return (*self.arguments[:3], *self.norm1, *self.norm2, self.latent_bias, self.residual)

    @property
    def leaves(self):
        affine = (self.norm1.weight, self.norm1.bias, self.norm2.weight, self.norm2.bias)
        return dict(zip(NAMES, (*self.arguments[:3], *affine, self.latent_bias), strict=True))

    def with_leaves(self, *given):
        """The arguments with these in place of the leaves that are there; the covariance made symmetric."""
        given = iter(given)
        phi, mean, covariance, w1, b1, w2, b2, latent_bias = (
            None if leaf is None else next(given) for leaf in self.leaves.values()
        )
        if covariance is not None:
            covariance = (covariance + covariance.mT) / 2
        norm1, norm2 = self.norm1._replace(weight=w1, bias=b1), self.norm2._replace(weight=w2, bias=b2)
        return phi, mean, covariance, norm1, norm2, latent_bias, self.residual

    def there(self):
        return [leaf for leaf in self.leaves.values() if leaf is not None]


def op(*arguments):
    return ops.latent_map.latent_map(*arguments)


def plain(*arguments):
    mapped, shift, statistics = composition.latent_map(*arguments)
    return mapped, shift, torch.stack(statistics) if statistics else mapped.new_empty((0, mapped.shape[1]))


def gradients(function, call):
    """By name, zeros where a leaf has no influence."""
    outputs = [(y, g) for y, g in zip(function(*call.arguments), call.grads, strict=False) if y.requires_grad]
    ys, grads = zip(*outputs, strict=True)
    found = torch.autograd.grad(ys, call.there(), grads, allow_unused=True)
    names = [name for name, leaf in call.leaves.items() if leaf is not None]
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for name, leaf, gradient in zip(names, call.there(), found, strict=True)
    }
