# SPDX-License-Identifier: BSD-3-Clause
"""The op released_layer against the layer as it is written, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dcd_kernels.models.released import PointwiseConv
from dcd_kernels.ops import layer as ops

OP = torch.ops.dcd_kernels.released_layer


def make(in_channels=6, out_channels=20, bias=False, norms=True):
    torch.manual_seed(0)
    module = PointwiseConv(in_channels, out_channels, 8)
    if bias:
        for name in ("conv", "conv_q", "conv_p"):
            old = getattr(module, name)
            setattr(module, name, nn.Conv2d(old.in_channels, old.out_channels, 1))
        for name in ("fc_phi", "fc_scale"):
            old = getattr(module, name)
            setattr(module, name, nn.Linear(old.in_features, old.out_features))
    if not norms:
        module.bn1, module.bn2 = nn.Identity(), nn.Identity()
    for norm in (module.bn1, module.bn2):
        if norms:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return module.eval()


def arguments(module):
    norms = [
        norm if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) else None
        for norm in (module.bn1, module.bn2)
    ]
    pool = 2 if module.in_channels < module.out_channels else 1
    parts = module.fc[0], module.fc[1].fc[0], module.fc_scale, module.fc_phi
    made = ops.Layer(module.conv, module.p, module.q, *parts, pool, "se", "hardsigmoid2", *norms, True)
    return [place.get(name) for place, name in made.places()], made.constants()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(7, 5), (1, 1), (14, 14)])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"norms": False}, {"in_channels": 20, "out_channels": 6}]
)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_values(batch, options, size, layout):
    module = make(**options)
    x = torch.randn(batch, module.in_channels, *size).contiguous(memory_format=layout)
    right = copy.deepcopy(module).double()(x.double())
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        exact = dtype != torch.bfloat16
        twin = copy.deepcopy(module).to(dtype)
        got = ops.released_layer(x.to(dtype), *arguments(twin))
        truth = right if exact else copy.deepcopy(twin).double()(x.to(dtype).double())
        assert got.dtype == dtype and got.shape == truth.shape
        assert got.is_contiguous(memory_format=layout)
        assert (got.double() - truth).norm() <= allowed * truth.norm()


@torch.no_grad()
def test_the_same_bits_on_any_number_of_threads():
    module = make()
    x = torch.randn(5, 6, 9, 9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.released_layer(x, *arguments(module))
        torch.set_num_threads(2)
        assert torch.equal(ops.released_layer(x, *arguments(module)), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (20, 7, 1, 1), "weight must be a matrix of 20 rows and 6 columns"),
        (2, (20, 3, 1, 1), "p must be a matrix"),
        (4, (4, 6, 3, 3), "q must be a matrix"),
        (6, (4, 6), "squeeze_weight must be a matrix"),
        (8, (5, 4), "gate_weight must be a matrix"),
        (10, (20, 3), "lam_weight must be a matrix"),
        (12, (15, 4), "phi_weight must be a matrix"),
        (16, (3,), "norm"),
        (1, (3,), "bias must"),
    ],
)
@torch.no_grad()
def test_refuses(place, shape, message):
    tensors, constants = arguments(make())
    tensors[place] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=message):
        ops.released_layer(torch.randn(2, 6, 5, 5), tensors, constants)


@torch.no_grad()
def test_refuses_codes_dtypes_and_an_absent_gate():
    x = torch.randn(2, 6, 5, 5)
    tensors, constants = arguments(make())
    for place, code in ((0, 3), (1, 99), (2, -1)):
        wrong = [*constants]
        wrong[place] = code
        with pytest.raises(RuntimeError, match="must be"):
            ops.released_layer(x, tensors, tuple(wrong))
    with pytest.raises(RuntimeError, match="weight"):
        ops.released_layer(x.double(), tensors, constants)
    with pytest.raises(RuntimeError, match="must not be empty"):
        ops.released_layer(x[:0], tensors, constants)
    tensors[8] = None
    with pytest.raises(RuntimeError, match="gate_weight must be given"):
        ops.released_layer(x, tensors, constants)


def test_fake():
    tensors, (bins, gate, lam, eps1, eps2, residual) = arguments(make())
    tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    first = (torch.randn(2, 6, 5, 5), *tensors[:14], bins, gate, lam)
    call = (*first, eps1, *tensors[14:18], eps2, *tensors[18:], residual)
    torch.library.opcheck(OP.default, call, test_utils=("test_schema", "test_faketensor"))
