# SPDX-License-Identifier: BSD-3-Clause
"""Where accelerate is called, replicas, what is kept alive, and what only looks like the released branch."""

import contextlib
import copy
import gc
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from families import draw, inputs, make, randomise
from torch import nn
from twins import accelerated, assert_equal, leaves, run

import dcd_kernels as dcd

CI, CO = 16, 12
SHAPE = (CI, 5, 6)


def released():
    return randomise(zoo.ConvDY(CI, CO, 3, 1, 1)).double()


def assert_both_modes(module, twin=None, drawn=None):
    twin = accelerated(module) if twin is None else twin
    for training in (True, False):
        mine, right = (run(m.train(training), drawn or draw(SHAPE), seed=3) for m in (twin, module))
        assert_equal(mine, right)


# ---------------------------------------------------------------------------- where accelerate is called


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "detect_anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", CONTEXTS)
def test_accelerate_inside(name):
    """The module is taken there as elsewhere, and is right afterwards."""
    module = released()
    twin = copy.deepcopy(module)
    with CONTEXTS[name]():
        dcd.accelerate(twin)
        assert len(dcd.report(twin).taken) == 1
    assert_both_modes(module, twin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_another_default_dtype(dtype):
    """What is made on the way has the dtype of the module, not the default one."""
    module = make("DYModule expand", torch.float32)
    twin = accelerated(module)
    right = run(module, inputs("DYModule expand", dtype=torch.float32))
    with default_dtype(dtype):
        mine = run(twin, inputs("DYModule expand", dtype=torch.float32))
    assert_equal(mine, right, 1e-4)


@pytest.mark.parametrize("name", ["conv_dy 3×3", "Einsum", "GroupNorm"])
def test_float64_under_autocast(name):
    """Autocast leaves float64 as it is."""
    module = make(name)
    twin = accelerated(module)
    for training in (True, False):
        mine, right = (
            run(m.train(training), inputs(name), context=torch.autocast("cpu", torch.bfloat16))
            for m in (twin, module)
        )
        assert_equal(mine, right)


def test_nothing_is_said_or_drawn():
    """No warnings, no numbers from any generator."""
    model = randomise(zoo.Network())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcd.accelerate(model)
        dcd.report(model)
        dcd.restore(model)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_nothing_is_printed(capfd):
    dcd.accelerate(zoo.Network())
    assert capfd.readouterr() == ("", "")


def test_models_are_let_go():
    model = dcd.accelerate(released())
    model(*draw(SHAPE)).sum().backward()
    kept = weakref.ref(model), weakref.ref(model.p.weight)
    del model
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


# --------------------------------------------------------------------------------------------- replicas


def replica_of(model):
    """As nn.DataParallel makes one, with other numbers in it as another device would have after a step."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    generator = torch.Generator().manual_seed(4)
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            moved = tensor
            if tensor is not None and tensor.is_floating_point():
                moved = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.1
            setattr(replica, name, moved)
    return replicas[model]


def test_replicas_use_their_own_weights():
    """Those of nn.DataParallel are shallow copies: what is bound to the original would use its weights."""
    for training in (True, False):
        module = released().train(training)
        (x,) = draw(SHAPE)
        mine, right = (replica_of(model)(x) for model in (accelerated(module), module))
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


def test_shallow_copies():
    module = released()
    twin = copy.copy(dcd.accelerate(copy.deepcopy(module)))
    twin.q = nn.Conv2d(CI, 4, 1).double()
    module.q = copy.deepcopy(twin.q)
    assert_both_modes(module, twin)


def test_backward_twice():
    gradients = []
    for model in (released(), dcd.accelerate(released())):
        (x,) = leaves(draw(SHAPE))
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()} | {"x": x.grad})
    assert_equal(*gradients)


def test_saved_tensors_hooks():
    """Offloading of what backward needs: packed once, unpacked as it was."""
    results = []
    for model in (dcd.accelerate(released()), released()):
        context = torch.autograd.graph.saved_tensors_hooks(
            lambda t: (t.device, t.cpu()), lambda p: p[1].to(p[0])
        )
        results.append(run(model, draw(SHAPE), context=context))
    assert_equal(*results)


# ------------------------------------------------------------------------ what looks like the released branch


class WithBuffer(nn.Module):
    """relu6(s/T + 3)/3 with T = 1 in a buffer, to be annealed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))

    def forward(self, s):
        return F.relu6(s / self.temperature + 3) / 3


class WithTensor(nn.Module):
    """T in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.temperature = torch.ones((), dtype=torch.float64)

    def forward(self, s):
        return F.relu6(s / self.temperature + 3) / 3


class WithNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = 1.0

    def forward(self, s):
        return F.relu6(s / self.temperature + 3) / 3


class WithOptions(nn.Module):
    def __init__(self):
        super().__init__()
        self.options = {"temperature": 1.0}

    def forward(self, s):
        return F.relu6(s / self.options["temperature"] + 3) / 3


class Remembering(nn.Module):
    """Keeps what it gave, for a plot."""

    def forward(self, s):
        self.last = F.relu6(s + 3) / 3
        return self.last


class Noisy(nn.Module):
    """Another function in training."""

    def forward(self, s):
        return F.relu6(s + 3 + (0.1 * torch.randn_like(s) if self.training else 0)) / 3


class Hard(nn.Module):
    """The released function as far as to |s| = 40."""

    def forward(self, s):
        return torch.where(s.abs() > 40, torch.full_like(s, 0.5), F.relu6(s + 3) / 3)


class OverTheBatch(nn.Module):
    """Normalised over the samples."""

    def forward(self, s):
        return F.relu6(s + 3) / (F.relu6(s + 3).mean(0, keepdim=True) + 1)


class Straight(nn.Module):
    """The released values with another gradient."""

    def forward(self, s):
        return s + (F.relu6(s + 3) / 3 - s).detach()


def set_temperature(module):
    places = [m for m in module.modules() if type(m).__name__.startswith("With")]
    for place in places:
        if isinstance(place, WithOptions):
            place.options["temperature"] = 0.3
        elif isinstance(place, WithNumber):
            place.temperature = 0.3
        else:
            place.temperature.fill_(0.3)
    return bool(places)


LOOKALIKES = [
    WithBuffer,
    WithTensor,
    WithNumber,
    WithOptions,
    Remembering,
    Noisy,
    Hard,
    OverTheBatch,
    Straight,
]


@pytest.mark.parametrize("where", ["hs", "fc.1.fc.1", "fc.2", "avg_pool"])
@pytest.mark.parametrize("kind", LOOKALIKES)
def test_functions_that_agree_with_the_released_one_today(kind, where):
    """In place of λ's function, inside the gate, behind the gate; ``avg_pool`` an identity of the kind."""
    module = zoo.ConvDY(CI, CO, 3, 1, 1)
    if where == "avg_pool":
        module.avg_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), kind())
    elif where == "fc.2":
        module.fc.append(kind())
    else:
        setattr(module.get_submodule(where.rpartition(".")[0]), where.rpartition(".")[2], kind())
    module = randomise(module).double()
    with torch.no_grad():
        module.fc_scale.weight.mul_(30)  # beyond 40 as well
    twin = accelerated(module, taken=None)
    assert_both_modes(module, twin)
    if set_temperature(module):
        set_temperature(twin)
        assert_both_modes(module, twin)
    if kind is Remembering:
        places = [next(m for m in model.modules() if isinstance(m, Remembering)) for model in (twin, module)]
        torch.testing.assert_close(places[0].last, places[1].last, rtol=1e-10, atol=1e-10)


BRANCHES = {
    "biases": lambda s: nn.Sequential(nn.Linear(CI, s), zoo.Gate(s)),
    "no gate": lambda s: nn.Sequential(nn.Linear(CI, s, bias=False)),
    "a layer alone": lambda s: nn.Linear(CI, s),
    "ReLU": lambda s: nn.Sequential(nn.Linear(CI, s), nn.ReLU()),
    "ReLU in place": lambda s: nn.Sequential(nn.Linear(CI, s), nn.ReLU(inplace=True)),
    "Hardswish": lambda s: nn.Sequential(nn.Linear(CI, s), nn.Hardswish()),
    "dropout": lambda s: nn.Sequential(nn.Linear(CI, s), nn.Dropout(0.5), zoo.Gate(s)),
    "BatchNorm": lambda s: nn.Sequential(nn.Linear(CI, s), nn.BatchNorm1d(s), nn.ReLU()),
    "LayerNorm": lambda s: nn.Sequential(nn.Linear(CI, s), nn.LayerNorm(s), zoo.Gate(s)),
    "two layers": lambda s: nn.Sequential(nn.Linear(CI, s), nn.ReLU(), nn.Linear(s, s), nn.ReLU()),
    "nested": lambda s: nn.Sequential(nn.Sequential(nn.Linear(CI, s), nn.Identity()), zoo.Gate(s)),
    "the gate of another": lambda s: nn.Sequential(nn.Linear(CI, s), zoo.Gate(s), zoo.Gate(s)),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_other_branches(name):
    """Between the pooling and the logits; hooks in it fire, and its children may go into eval."""
    module = zoo.ConvDY(CI, CO, 3, 1, 1)
    module.fc, module.fc_phi, module.fc_scale = BRANCHES[name](5), nn.Linear(5, 16), nn.Linear(5, CO)
    module = randomise(module).double()
    twin = accelerated(module)
    relative = 1e-7 if name == "Hardswish" else 1e-10  # torch's own gradient has 1/6 in float32
    for training in (True, False):
        mine, right = (run(m.train(training), draw(SHAPE), seed=3) for m in (twin, module))
        assert_equal(mine, right, relative)
    for model in (twin, module):
        model.train()
        model.fc.eval()
    assert_equal(run(twin, draw(SHAPE)), run(module, draw(SHAPE)), relative)


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveMaxPool2d(1), nn.AvgPool2d((5, 6)), nn.AdaptiveAvgPool2d((1, None))]
)
def test_other_poolings(pool):
    class Pooled(zoo.ConvDY):
        def __init__(self):
            super().__init__(CI, CO, 3, 1, 1)
            self.avg_pool = nn.Sequential(pool, nn.AdaptiveMaxPool2d(1))

    assert_both_modes(randomise(Pooled()).double())
