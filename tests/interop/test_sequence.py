# SPDX-License-Identifier: BSD-3-Clause
"""Norms fused with the activations behind them: when they are, when they must not be, and what then runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dcd_kernels as dcd
from dcd_kernels import extension
from dcd_kernels.interop import sequence
from dcd_kernels.models import mobilenet_v2, released

pytestmark = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.fused = self.pointwise = self.depthwise = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += func is torch.ops.dcd_kernels.batch_norm_act.default
        self.pointwise += func is torch.ops.dcd_kernels.pointwise.default
        self.depthwise += func is torch.ops.dcd_kernels.depthwise.default
        return func(*args, **(kwargs or {}))


def chain(activation=None, **options):
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.Sequential(nn.BatchNorm2d(8, **options), activation or nn.ReLU6(inplace=True)),
        nn.Conv2d(8, 5, 1),
        nn.BatchNorm2d(5, **options),
        nn.Identity(),
    )
    for norm in (made[1][0], made[3]):
        if norm.affine:
            nn.init.normal_(norm.weight, std=3.0)
            nn.init.normal_(norm.bias, std=2.0)
    return made


def results(module, images, call=None):
    """Output, gradients and statistics of one step, and how many norms were fused."""
    module.zero_grad()
    images = images.detach().requires_grad_()
    with Called() as called:
        output = call(module, images) if call else module(images)
        output.square().sum().backward()
    gradients = [p.grad for p in module.parameters()]
    return [output, images.grad, *gradients, *module.buffers()], called.fused


def same(module, images, fused, call=sequence.run):
    peer = copy.deepcopy(module)
    right, none = results(peer, images)
    found, count = results(module, images, call)
    assert none == 0 and count == fused
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def images():
    return torch.randn(4, 3, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, lambda inplace: nn.Tanh()], ids=str
)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"momentum": 0.3}], ids=str)
def test_a_step_is_that_of_torch(options, inplace, activation, images):
    module = chain(activation(inplace=inplace), **options).double()
    same(module, images, 2)
    same(module, images, 2)  # a second one moves the statistics from where the first left them


@pytest.mark.parametrize("options", [{"track_running_stats": False}], ids=str)
def test_statistics_of_the_batch_without_training(options, images):
    same(chain(**options).double().eval(), images, 2)


def test_in_eval_mode_nothing_is_fused(images):
    same(chain().double().eval(), images, 0)


CHANGES = {
    "a hook on the norm": (lambda m: m[3].register_forward_hook(lambda *_: None), 1),
    "a hook on the activation": (lambda m: m[1][1].register_forward_hook(lambda *_: None), 2),
    "a hook on the inner sequence": (lambda m: m[1].register_forward_pre_hook(lambda *_: None), 1),
    "a hook on the outer sequence": (lambda m: m.register_forward_hook(lambda *_: None), 0),
    "a frozen norm": (lambda m: m[3].eval(), 1),
    "another bound": (lambda m: setattr(m[1][1], "max_val", 4.0), 2),
    "a forward of its own": (lambda m: setattr(m[3], "forward", lambda x: 2 * x), 1),
    "a norm of another class": (lambda m: m.__setitem__(3, nn.GroupNorm(5, 5).double()), 1),
    "half of the affine part": (lambda m: m[3].register_parameter("bias", None), 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_sure_runs_as_it_was_written(change, images):
    module = chain().double()
    alter, fused = CHANGES[change]
    alter(module)
    same(module, images, fused)


def test_global_hooks_see_all_modules(images):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        same(chain().double(), images, 0)
    finally:
        handle.remove()
    assert nn.BatchNorm2d in seen


CONVOLUTIONS = {
    "pointwise": (lambda: nn.Conv2d(3, 5, 1), "pointwise"),
    "without bias": (lambda: nn.Conv2d(3, 5, 1, bias=False), "pointwise"),
    "strided": (lambda: nn.Conv2d(3, 5, 1, 2), None),
    "padded": (lambda: nn.Conv2d(3, 5, 1, padding=1), None),
    "grouped": (lambda: nn.Conv2d(3, 6, 1, groups=3), None),
    "dense": (lambda: nn.Conv2d(3, 5, 3, padding=1), None),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3), "depthwise"),
    "strided depthwise": (lambda: nn.Conv2d(3, 3, 3, 2, padding=1, groups=3), "channels_last depthwise"),
    "steep depthwise": (lambda: nn.Conv2d(3, 3, 3, (2, 1), padding=1, groups=3), None),
    "dilated depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3), None),
    "reflecting depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3, padding_mode="reflect"), None),
    "multiplied depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), None),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_static_convolutions(kind, layout, images, monkeypatch):
    monkeypatch.setattr(sequence, "_LARGE", 1)
    make, ours = CONVOLUTIONS[kind]
    module = nn.Sequential(make(), nn.ReLU()).double().to(memory_format=layout)
    images = images.to(memory_format=layout)
    same(module, images, 0)
    for training, count in ((True, 1), (False, 0)):
        with Called() as called:
            sequence.run(module.train(training), images)
        assert called.pointwise == (count if ours == "pointwise" else 0)
        kinds = ("depthwise", "channels_last depthwise" if layout == torch.channels_last else "depthwise")
        assert called.depthwise == (count if ours in kinds else 0)


def test_small_depthwise_layers_are_torchs(images):
    with Called() as called:
        sequence.run(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3)).double(), images)
    assert called.depthwise == 0


def test_convolutions_under_autocast_are_torchs():
    module, images = nn.Sequential(nn.Conv2d(3, 5, 1)), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16), Called() as called:
        assert torch.equal(sequence.run(module, images), module(images))
    assert called.pointwise == 0


def test_a_single_value_is_torchs_error():
    module = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    with pytest.raises(ValueError, match="more than 1 value"):
        sequence.run(module, torch.ones(1, 3, 1, 1))
    assert module[0].num_batches_tracked == 1


def test_wrong_ranks_are_torchs_error():
    with pytest.raises(ValueError, match="4D"):
        sequence.run(nn.Sequential(nn.BatchNorm2d(3)), torch.ones(2, 3, 4))


def test_the_reference_is_torch(images):
    with dcd.use_backend("reference"):
        same(chain().double(), images, 0)


def test_torch_func_and_forward_mode_take_torchs_norm(images):
    module = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()).double()
    right = torch.func.jvp(module, (images,), (torch.ones_like(images),))[1]
    found = torch.func.jvp(lambda x: sequence.run(module, x), (images,), (torch.ones_like(images),))[1]
    torch.testing.assert_close(found, right)


def test_it_compiles_into_one_graph(fresh_compiler):
    module = chain()
    images = torch.randn(4, 3, 5, 6)
    right = copy.deepcopy(module)(images)
    compiled = torch.compile(lambda x: sequence.run(module, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), right, rtol=1e-5, atol=1e-5)


def small_released(**options):
    torch.manual_seed(0)
    return released.mobilenet_v2(0.1, num_classes=7, dropout=0.0, **options)


def test_accelerated_containers_are_patched_and_restored():
    model = small_released()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    dcd.accelerate(model)
    report = dcd.report(model)
    assert report.containers and "nn.Sequential" in str(report)
    assert all(type(model.get_submodule(name)) is nn.Sequential for name in report.containers)
    dcd.accelerate(model)
    assert dcd.report(model).containers == report.containers
    dcd.restore(model)
    assert not dcd.report(model).containers
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_a_static_network_is_left_alone():
    model = dcd.accelerate(small_released(dynamic=False))
    assert not dcd.report(model).containers


def test_an_accelerated_step_fuses_every_norm():
    model, images = small_released().double(), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    plain = copy.deepcopy(model)
    dcd.accelerate(model)
    norms = [m for m in model.features.modules() if isinstance(m, nn.BatchNorm2d)]
    right, _ = results(plain, images)
    found, fused = results(model, images)
    # the norms of the latents are folded, those behind a convolution fused
    assert 50 <= fused <= len(norms) + 1
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item() + 1e-9)
    again = pickle.loads(pickle.dumps(model))
    assert not dcd.report(again).containers
    assert dcd.report(copy.deepcopy(model)).containers


def test_our_own_network_fuses_every_norm():
    torch.manual_seed(0)
    model = mobilenet_v2(0.1, num_classes=7, dropout=0.0).double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    plain = copy.deepcopy(model)
    with dcd.use_backend("reference"):
        right, none = results(plain, images)
    found, fused = results(model, images)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert none == 0 and fused == len(norms)
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item() + 1e-9)
