# SPDX-License-Identifier: BSD-3-Clause
"""Accelerated modules inside torch.compile, torch.export, checkpointing and data parallelism."""

import copy
import functools
import inspect
import warnings

import pytest
import torch
import zoo
from families import RELATIVE, draw, inputs, make, randomise
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from twins import accelerated, as_tuple, assert_equal, run

import dcd_kernels as dcd

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])

pytestmark = pytest.mark.usefixtures("fresh_compiler")


full = functools.partial(pytest.param, marks=pytest.mark.full)
COMPILED = [
    ("conv_dy 3×3", True),
    ("DYModule expand", True),
    full("conv_basic_dy stride 2", False),
    full("Guided", False),
    full("GroupNorm", False),
    full("conv_dy squeeze of 0", True),
    full("conv_basic_dy stride 2", True),
    full("DYCls", True),
    full("Einsum", True),
    full("Trace", True),
    full("Branch", True),
    full("Masked", True),
    full("GroupNorm", True),
    full("no running statistics", True),
    full("momentum None", False),
    full("3-D stride", False),
]


@pytest.mark.parametrize(("name", "training"), COMPILED)
def test_compile(name, training):
    """In one graph; with gradients and statistics; at a second size as well."""
    module = make(name).train(training)
    twin = accelerated(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for batch, seed in ((4, 0), (3, 1)):
        drawn = inputs(name, batch=batch, seed=seed)
        assert_equal(run(twin, drawn, call=compiled), run(module, drawn), RELATIVE.get(name, 1e-10))


def test_compile_without_gradients():
    module = make("DYModule expand").eval()
    compiled = torch.compile(accelerated(module), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (1, 2, 5):
            drawn = inputs("DYModule expand", batch=batch)
            torch.testing.assert_close(compiled(*drawn), module(*drawn), rtol=1e-10, atol=1e-10)


@pytest.mark.full
def test_compile_a_network():
    network = randomise(zoo.Network()).double().train()
    twin = accelerated(network, taken=5)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    drawn = draw((3, 16, 16))
    assert_equal(run(twin, drawn, call=compiled), run(network, drawn))
    twin.eval()
    network.eval()
    assert_equal(run(twin, drawn, call=compiled), run(network, drawn))


def test_compiled_modules_see_what_changes():
    """Weights edited, mode switched and hooks added after the first compiled call."""
    module = make("conv_dy 3×3").eval()
    twin, drawn = accelerated(module), inputs("conv_dy 3×3")
    compiled = torch.compile(twin, backend="aot_eager")
    assert_equal(run(twin, drawn, call=compiled), run(module, drawn))
    for model in (twin, module):
        with torch.no_grad():
            model.bn1.running_var.mul_(2)
            model.p.weight.neg_()
    assert_equal(run(twin, drawn, call=compiled), run(module, drawn))
    for model in (twin, module):
        model.bn1.momentum = 0.5
        model.train()
    assert_equal(run(twin, drawn, call=compiled), run(module, drawn))
    for model in (twin, module):
        model.bn2 = nn.Tanh()
    assert_equal(run(twin, drawn, call=compiled), run(module, drawn))


EXPORTED = [
    "conv_dy 3×3",
    "DYModule expand",
    "Branch",
    *map(full, ("conv_basic_dy", "DYCls", "GroupNorm", "3-D")),
]


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name):
    """With a dynamic batch, in eval; the program survives saving."""
    module = make(name).eval()
    drawn = inputs(name, batch=3)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} for _ in drawn)
    with torch.no_grad():
        program = torch.export.export(accelerated(module), tuple(drawn), dynamic_shapes=shapes)
    assert not [n for n in program.graph.nodes if "autograd" in str(n.target)]
    for size in (1, 2, 7):
        drawn = inputs(name, batch=size)
        mine, right = program.module()(*drawn), module(*drawn)
        for got, wanted in zip(as_tuple(mine), as_tuple(right), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert set(program.state_dict) == set(module.state_dict())


@pytest.mark.parametrize("how", ["by position", "keyword arguments"])
def test_export_with_arguments_by_name(how):
    """The patched forward has the names that the original has."""
    module = make("Guided").eval()
    twin = accelerated(module)
    assert inspect.signature(twin.forward) == inspect.signature(module.forward)
    x, guide = inputs("Guided", batch=3)
    batch = torch.export.Dim("batch", min=1, max=64)
    arguments, named = ((x,), {"guide": guide}) if how == "keyword arguments" else ((x, guide), {})
    shapes = {"x": {0: batch}, "guide": {0: batch}}
    with torch.no_grad():
        program = torch.export.export(twin, arguments, named, dynamic_shapes=shapes)
    x, guide = inputs("Guided", batch=5)
    arguments, named = ((x,), {"guide": guide}) if how == "keyword arguments" else ((x, guide), {})
    torch.testing.assert_close(
        program.module()(*arguments, **named), module(x, guide), rtol=1e-10, atol=1e-10
    )


@pytest.mark.full
def test_export_a_network():
    network = randomise(zoo.Network()).double().eval()
    twin = accelerated(network, taken=5)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(twin, tuple(draw((3, 16, 16))), dynamic_shapes=shapes)
    drawn = draw((3, 16, 16), batch=7)
    torch.testing.assert_close(program.module()(*drawn), network(*drawn), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace():
    module = make("DYModule expand").eval()
    drawn = inputs("DYModule expand")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(accelerated(module), tuple(drawn), check_trace=False)
    torch.testing.assert_close(traced(*drawn), module(*drawn), rtol=1e-10, atol=1e-10)


@MODES
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["conv_dy 3×3", "DYModule expand", "GroupNorm"])
def test_checkpoint(name, reentrant, training):
    """The second forward updates the statistics a second time, as it does in the original."""
    module, drawn = make(name).train(training), inputs(name)
    twin = accelerated(module)
    mine, right = (
        run(model, drawn, call=lambda *x, m=model: checkpoint(m, *x, use_reentrant=reentrant))
        for model in (twin, module)
    )
    assert_equal(mine, right)


def test_checkpoint_with_dropout():
    """The masks of the first forward come again."""
    from zoo_variants import Strip

    module, drawn = randomise(Strip(8, 10)).double().train(), draw((8, 9, 4))
    twin = accelerated(module)
    mine, right = (
        run(model, drawn, call=lambda *x, m=model: checkpoint(m, *x, use_reentrant=False))
        for model in (twin, module)
    )
    assert_equal(mine, right)


def test_checkpoint_sequential():
    network = randomise(nn.Sequential(*(zoo.ConvDY(16, 16) for _ in range(3)))).double().train()
    drawn = draw((16, 4, 4))
    mine, right = (
        run(model, drawn, call=lambda x, m=model: checkpoint_sequential(m, 2, x, use_reentrant=False))
        for model in (accelerated(network, taken=3), network)
    )
    assert_equal(mine, right)


# ------------------------------------------------------------------------------------- data parallelism


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel(one_process):
    """DDP around an accelerated model, and accelerate of a model inside DDP."""
    network, drawn = randomise(zoo.Network()).double().train(), draw((3, 16, 16))
    right = run(copy.deepcopy(network), drawn)
    outside = accelerated(network, taken=5)
    inside = DistributedDataParallel(copy.deepcopy(network))
    dcd.accelerate(inside)
    assert len(dcd.report(inside).taken) == 5
    for model, wrapped in ((outside, DistributedDataParallel(outside)), (inside.module, inside)):
        assert_equal(run(model, drawn, call=wrapped), right)


def test_sync_batch_norm_is_left_alone():
    network = nn.Sequential(zoo.ConvDY(16, 16), nn.BatchNorm2d(16), zoo.ConvDY(16, 16))
    network = randomise(network).double()
    network[0].bn1 = nn.SyncBatchNorm(4).double()
    twin = accelerated(network)
    (left,) = dcd.report(twin).left
    assert left.name == "0" and "SyncBatchNorm" in left.reason
    drawn = draw((16, 5, 5))
    for training in (True, False):
        assert_equal(run(twin.train(training), drawn), run(network.train(training), drawn))


@MODES
def test_convert_sync_batch_norm_after_accelerate(training):
    network = randomise(nn.Sequential(zoo.ConvDY(16, 16), zoo.ConvDY(16, 8))).double().train(training)
    twin = accelerated(network, taken=2)
    drawn = draw((16, 5, 5))
    assert_equal(run(twin, drawn), run(network, drawn))
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert_equal(run(twin, drawn), run(network, drawn))
    assert all("SyncBatchNorm" in entry.reason or "bn" in entry.reason for entry in dcd.report(twin))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_sync_batch_norm_in_a_process_group(one_process):
    """What torch does there for tensors on the CPU, the accelerated module does."""
    network = nn.SyncBatchNorm.convert_sync_batchnorm(dcd.accelerate(nn.Sequential(zoo.ConvDY(16, 16))))
    outcomes = []
    for model in (network, dcd.restore(copy.deepcopy(network))):
        try:
            model(torch.randn(2, 16, 4, 4))
            outcomes.append(None)
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
