# SPDX-License-Identifier: BSD-3-Clause
"""Training: statistics over several steps, norms that are frozen or changed, and what training can raise."""

import copy
import functools

import pytest
import torch
import zoo
import zoo_variants as wild
from families import draw, inputs, make, randomise
from torch import nn
from twins import accelerated, assert_as_accurate, assert_equal, assert_same_outcome, cotangent, outcome, run
from zoo_variants import Plain, batch_norms, norms

import dcd_kernels as dcd

BN = {
    "default": {},
    "momentum None": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0},
    "affine False": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "eps 1": {"eps": 1.0},
}


def plain(*arguments, dtype=torch.float64, **options):
    return randomise(Plain(*arguments, **options)).to(dtype)


def steps(model, drawn, rate=0.05):
    """SGD with momentum on these inputs; the outputs."""
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    outputs = []
    for seed, batch in enumerate(drawn):
        torch.manual_seed(seed)
        output = model(*batch)
        optimiser.zero_grad()
        (output * cotangent(output, seed)).mean().backward()
        optimiser.step()
        outputs.append(output.detach())
    return outputs


def assert_same_training(module, drawn, taken=1, relative=1e-10):
    """Outputs, weights and statistics over several steps; then in eval."""
    twin, module = accelerated(module, taken), copy.deepcopy(module)
    for mine, right in zip(steps(twin, drawn), steps(module, drawn), strict=True):
        assert_equal({"output": mine}, {"output": right}, relative)
    assert_equal(twin.state_dict(), module.state_dict(), relative)
    assert_equal(run(twin.eval(), drawn[0]), run(module.eval(), drawn[0]), relative)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("options", BN.values(), ids=BN)
def test_statistics_over_several_steps(options, rank):
    module = plain(10, 8, 4, rank=rank, norm=functools.partial(batch_norms, **options)).train()
    drawn = [draw((10, *(5, 3, 2)[:rank]), batch=3 + s, seed=s) for s in range(4)]
    assert_same_training(module, drawn)


@pytest.mark.parametrize(
    "name",
    [
        "conv_dy 3×3",
        "conv_dy squeeze of 0",
        "conv_basic_dy stride 2",
        "DYModule expand",
        "DYCls",
        "Einsum",
        "Trace",
    ],
)
def test_training_the_released_and_others(name):
    drawn = [inputs(name, seed=s) for s in range(4)]
    assert_same_training(make(name).train(), drawn, relative=1e-6 if name == "Trace" else 1e-10)


def test_training_a_network():
    network = randomise(zoo.Network()).double().train()
    assert_same_training(network, [draw((3, 20, 16), seed=s) for s in range(3)], 5, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["conv_dy 3×3", "DYModule expand", "Trace"])
def test_statistics_in_low_precision(name, dtype):
    """Running statistics after four batches, their rounding included."""
    module = make(name, dtype).train()
    models = accelerated(module), copy.deepcopy(module), copy.deepcopy(module).double()
    for model in models:
        wanted = torch.float64 if model is models[2] else dtype
        for seed in range(4):
            model(*(x.to(wanted) for x in inputs(name, dtype=dtype, seed=seed)))
    mine, right, truth = (dict(model.named_buffers()) for model in models)
    for buffer in truth:
        if buffer.endswith("tracked"):
            assert mine[buffer] == right[buffer] == 7
            continue
        assert mine[buffer].dtype == right[buffer].dtype
        errors = [(b[buffer].double() - truth[buffer]).norm() for b in (mine, right)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(dtype).eps * truth[buffer].norm(), buffer


@pytest.mark.parametrize("frozen", [("norm1",), ("norm2",), ("norm1", "norm2")], ids=", ".join)
def test_frozen_norms(frozen):
    """Norms in eval inside a module that trains, their parameters frozen as well."""
    module = plain(10, 8, 4, 3, padding=1, bias=True).train()
    for name in frozen:
        module.get_submodule(name).eval().requires_grad_(False)
    assert_same_training(module, [draw((10, 5, 4), seed=s) for s in range(3)])


def test_norms_that_train_in_a_module_that_does_not():
    module = plain(10, 8, 4).eval()
    module.norm1.train()
    module.norm2.train()
    assert_same_training(module, [draw((10, 5, 4), seed=s) for s in range(3)])


def test_norms_without_a_counter():
    """num_batches_tracked is None in modules of old checkpoints."""
    module = plain(10, 8, 4).train()
    module.norm1.num_batches_tracked = module.norm2.num_batches_tracked = None
    assert_same_training(module, [draw((10, 5, 4), seed=s) for s in range(3)])


def test_frozen_after_accelerate():
    module = plain(10, 8, 4).train()
    twin = accelerated(module)
    for model in (twin, module):
        steps(model, [draw((10, 5, 4))])
        model.norm1.eval()
    drawn = draw((10, 5, 4), seed=1)
    assert_equal(run(twin, drawn), run(module, drawn))
    for model in (twin, module):
        model.norm1.train()
        model.norm2.eval()
    assert_equal(run(twin, drawn), run(module, drawn))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_changed_attributes_of_norms(dtype):
    """momentum is scheduled and eps set after loading in many a script."""
    module = plain(10, 8, 6, dtype=dtype).train()
    twin = accelerated(module)
    for index, (name, value) in enumerate(
        (("momentum", 0.5), ("eps", 0.3), ("momentum", None), ("track_running_stats", False))
    ):
        for model in (twin, module):
            setattr(model.norm1, name, value)
            setattr(model.norm2, name, value)
        drawn = draw((10, 5, 4), dtype=dtype, seed=index)
        relative = 1e-10 if dtype == torch.float64 else 1e-3
        assert_equal(run(twin, drawn), run(module, drawn), relative)
        module.load_state_dict(twin.state_dict())


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("pixels", [1, 2])
def test_few_values_per_channel(rank, pixels):
    """Running variance with n/(n − 1): n = 2 doubles it. With n = 1 torch raises."""
    module = plain(6, 5, 3, rank=rank, bias=True).train()
    shape = (6, pixels) if rank == 1 else (6, 1, pixels)
    drawn = [draw(shape, batch=2 // pixels, seed=s) for s in range(3)]
    assert_same_training(module, drawn)


ONE_VALUE = {
    "both": (lambda: plain(6, 5, 3, rank=2), (6, 1, 1)),
    "1-D": (lambda: plain(6, 5, 3, rank=1), (6, 1)),
    "stride leaves one pixel": (lambda: plain(6, 5, 3, 3, padding=1, stride=2), (6, 2, 2)),
    "norm1 only": (lambda: plain(6, 5, 3, norm=norms(nn.BatchNorm2d, None)), (6, 1, 1)),
    "norm2 only": (lambda: plain(6, 5, 3, norm=norms(None, nn.BatchNorm1d)), (6, 1, 1)),
    "no running statistics": (
        lambda: plain(6, 5, 3, norm=functools.partial(batch_norms, track_running_stats=False)),
        (6, 1, 1),
    ),
    "GroupNorm, a channel a group": (
        lambda: plain(6, 5, 3, norm=norms(*2 * (functools.partial(nn.GroupNorm, 3),))),
        (6, 1, 1),
    ),
    "DYCls": (lambda: randomise(zoo.DYCls(6, 5)).double(), (6,)),
    "DYModule": (lambda: randomise(zoo.DYModule(6, 16)).double(), (6, 1, 1)),
}


@pytest.mark.parametrize("frozen", [None, "first", "second"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ONE_VALUE)
def test_one_value_per_channel(name, training, frozen):
    """The same ValueError with the same text, from the same norm, and the same counts after it."""
    module, shape = ONE_VALUE[name][0]().train(training), ONE_VALUE[name][1]
    found = [m for m in module.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))]
    if frozen:
        found[0 if frozen == "first" else -1].eval()
    twin = accelerated(module)
    assert_same_outcome(*(outcome(model, draw(shape, batch=1)) for model in (twin, module)))
    assert_equal(dict(twin.named_buffers()), dict(module.named_buffers()))


def test_the_error_for_one_value_is_there():
    """That test_one_value_per_channel compares errors and not only results."""
    module = dcd.accelerate(plain(6, 5, 3).train())
    message = (
        r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 3, 1, 1\]\)"
    )
    with pytest.raises(ValueError, match=message):
        module(*draw((6, 1, 1), batch=1))


def test_gradients_accumulate():
    module = make("DYModule expand").train()
    twin = accelerated(module)
    for model in (twin, module):
        for seed in range(2):
            model(*inputs("DYModule expand", seed=seed)).square().mean().backward()
    mine, right = ({n: p.grad for n, p in model.named_parameters()} for model in (twin, module))
    assert_equal(mine, right)


@pytest.mark.parametrize("name", ["conv_dy 3×3", "DYModule expand", "Einsum", "norm2 only", "norm1 only"])
@pytest.mark.parametrize(("shift", "times"), [(3, 2), (1e2, 8), (1e4, 8)])
def test_means_far_from_zero(name, shift, times):
    """Raw second moments lose every digit here; the original, in two passes, does not.

    Far away some more than the original's error is allowed: it takes the mean off before Φ, the fused form
    behind P. That costs a factor (up to 4 was seen), not digits.
    """
    module = make(name, torch.float32).train()
    draws = [[x + shift for x in inputs(name, dtype=torch.float32, seed=s)] for s in range(4)]
    assert_as_accurate(module, draws, times=times)


def test_dropout_on_the_logits():
    """The same numbers from the generator give the same masks; in eval there are none."""
    module = randomise(wild.Strip(8, 10, dropout=0.3)).double()
    drawn = draw((8, 9, 4))
    twin = accelerated(module)
    for training in (True, False):
        twin.train(training)
        module.train(training)
        assert_equal(run(twin, drawn, seed=7), run(module, drawn, seed=7))
    twin.train()
    first, again, other = (run(twin, drawn, seed=seed)["output 0"] for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    module.train()
    steps_of = [torch.cat([y.flatten() for y in steps(model, [drawn] * 3)]) for model in (twin, module)]
    assert_equal({"outputs": steps_of[0]}, {"outputs": steps_of[1]})


def test_the_generator_ends_in_the_same_state():
    """What comes after the module draws the same numbers too."""
    module = randomise(wild.Strip(8, 10, dropout=0.3)).double().train()
    states = []
    for model in (accelerated(module), module):
        run(model, draw((8, 9, 4)), seed=3)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_module_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = zoo.ConvDY(16, 16, 3, 1, 1)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)) + x)

    assert_same_training(randomise(Twice()).double().train(), [draw((16, 5, 5), seed=s) for s in range(3)])


@pytest.mark.parametrize("shared", ["p", "q", "bn1", "bn2", "fc_phi", "conv"])
def test_tied_children(shared):
    """A child, and so its parameters and statistics, that two modules have in common."""
    first, second = zoo.ConvDY(16, 16, 3, 1, 1), zoo.ConvDY(16, 16, 3, 1, 1)
    setattr(second, shared, getattr(first, shared))
    network = randomise(nn.Sequential(first, nn.ReLU(), second)).double().train()
    drawn = [draw((16, 5, 5), seed=s) for s in range(3)]
    assert_same_training(network, drawn, taken=2)


def test_tied_parameters():
    first, second = zoo.ConvDY(16, 16), zoo.ConvDY(16, 16)
    second.p.weight, second.fc_scale.weight = first.p.weight, first.fc_scale.weight
    network = randomise(nn.Sequential(first, second)).double().train()
    twin = accelerated(network, taken=2)
    assert twin[0].p.weight is twin[1].p.weight
    assert_same_training(network, [draw((16, 4, 4), seed=s) for s in range(3)], taken=2)


def test_one_norm_on_both_sides():
    """bn1 is bn2: two updates a step, in order."""
    module = wild.Trace(8, 6, 4)
    module.bn2 = module.bn1
    module = randomise(module).double().train()
    assert_same_training(module, [draw((8, 11), seed=s) for s in range(3)], taken=None, relative=1e-6)
