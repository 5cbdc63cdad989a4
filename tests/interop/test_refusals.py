# SPDX-License-Identifier: BSD-3-Clause
"""What must be left alone, with a reason; and what may be fused in part, but never to other results."""

import copy
import random

import half
import hard
import pytest
import torch
import zoo
from families import draw, randomise
from half import CI, CO, L
from torch import nn
from twins import accelerated, as_tuple, assert_equal, assert_same_outcome, cotangent, leaves, outcome, run

import dcd_kernels as dcd

SHAPE = (CI, 5, 6)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def drawn(seed=0, dtype=torch.float64, batch=4):
    return draw(SHAPE, seed=seed, dtype=dtype, batch=batch)


def left(model):
    """The reason why the only module that looks like DCD was left."""
    report = dcd.report(model)
    assert not report.taken, str(report)
    assert len(report.left) == 1, str(report)
    (entry,) = report.left
    assert entry.kind == type(model).__name__ and entry.name == ""
    return entry.reason


@MODES
@pytest.mark.parametrize("name", half.HALVES)
def test_never_different(name, training):
    module = randomise(half.HALVES[name]()).double().train(training)
    twin = accelerated(module, taken=None)
    for seed in range(2):
        assert_equal(run(twin, drawn(seed), seed=seed), run(module, drawn(seed), seed=seed))


def test_whole_is_taken():
    """That the halves are left for what was changed in them, and not for how they are written."""
    assert len(dcd.report(accelerated(half.Half())).taken) == 1


#: what is no dynamic residual at all any more, whatever else is in it
NOTHING_TO_FUSE = [
    "Nonlinear",
    "NonlinearInPlace",
    "NonlinearBehind",
    "NonlinearAhead",
    "LatentFeedsPhi",
    "MixtureOverPixels",
    "LatentReturned",
    "LatentTwice",
    "ResidualOfAnotherTensor",
    "DropoutOnLatent",
    "ScrambledPixels",
    "GroupedP",
    "WideQ",
    "WideP",
]


@pytest.mark.parametrize("name", NOTHING_TO_FUSE)
def test_left_alone_with_the_reason(name):
    assert len(left(dcd.accelerate(half.HALVES[name]()))) > 10


@MODES
@pytest.mark.parametrize("name", hard.REFUSED)
def test_forwards_that_cannot_be_followed(name, training):
    """Left with a reason; attributes that forward stores are as accelerate found them."""
    module = randomise(hard.REFUSED[name]()).double().train(training)
    twin = dcd.accelerate(copy.deepcopy(module))
    assert vars(twin).keys() == vars(module).keys(), "accelerate left something behind"
    stored = ("calls", "log", "seen")
    assert {k: vars(twin).get(k) for k in stored} == {k: vars(module).get(k) for k in stored}
    assert len(left(twin)) > 10
    for seed in range(2):
        for batch in (3, 1) if not training else (3,):
            inputs = [x - 0.5 * seed for x in drawn(seed, batch=batch)]
            assert_equal(run(twin, inputs), run(module, inputs))
    assert vars(twin).keys() == vars(module).keys()
    if hasattr(module, "calls"):
        assert twin.calls == module.calls and module.calls > 0
    if hasattr(module, "log"):
        assert twin.log == module.log


@MODES
@pytest.mark.parametrize("name", hard.FOLLOWED)
def test_forwards_that_are_followed_wrongly_with_ease(name, training):
    """no_grad and autocast inside, modes, constants from nowhere, random numbers, edits in place."""
    module = randomise(hard.FOLLOWED[name]()).double().train(training)
    if name == "FullPrecision":
        module = module.float()
    relative = 0.05 if name in ("FullPrecision", "HalfPrecision", "Rounded", "WideStatic") else 1e-10
    twin = accelerated(module, taken=None)
    for seed in range(4):
        inputs = drawn(seed, next(module.parameters()).dtype)
        for backward in (False, True):
            results = []
            for model in (twin, module):
                random.seed(seed)
                options = {"seed": seed, "backward": backward, "call": lambda x, m=model: m(x * 1)}
                results.append(outcome(model, inputs, **options))
            assert_same_outcome(*results, relative=relative)
            assert backward or not isinstance(results[1], Exception)


@MODES
@pytest.mark.parametrize("name", ["GradEnabled", "AutocastEnabled", "FullPrecision", "HalfPrecision"])
def test_what_forward_asks_of_its_surroundings(name, training):
    """A forward that reads whether gradients or autocast are on reads it at every call."""
    module = randomise(hard.FOLLOWED[name]()).train(training)
    twin = accelerated(module, taken=None)
    (x,) = drawn(dtype=torch.float32)
    with torch.no_grad():
        mine, right = twin(x), module(x)
    torch.testing.assert_close(mine, right, rtol=0.02, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mine, right = twin(x), module(x)
    assert mine.dtype == right.dtype
    torch.testing.assert_close(mine.float(), right.float(), rtol=0.1, atol=0.2)


@MODES
def test_a_static_output_of_another_dtype(training):
    """The sum is as wide as torch makes it."""
    module = randomise(hard.WideStatic()).bfloat16().train(training)
    inputs = drawn(dtype=torch.bfloat16)
    mine, right = run(accelerated(module, taken=None), inputs), run(module, inputs)
    assert right["output 0"].dtype == torch.float32
    assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in right.items()}
    assert (mine["output 0"] - right["output 0"]).abs().max() < 0.05 * right["output 0"].abs().max()


def test_gradients_that_forward_holds_back():
    """As they are None in the original, and not zeros or numbers."""
    for name in ("NoGradPhi", "NoGradLatent", "DetachedLatent", "DetachedProjection"):
        module = randomise(hard.FOLLOWED[name]()).double()
        names = run(module, drawn()).keys()
        assert len(names) < len(run(randomise(half.Half()).double(), drawn()))
        assert run(accelerated(module, taken=None), drawn()).keys() == names


@MODES
def test_optional_arguments(training):
    for kind in (hard.OptionalGuide, hard.OptionalScale, hard.Variadic):
        module = randomise(kind()).double().train(training)
        twin = accelerated(module, taken=None)
        (x,), (other,) = drawn(), drawn(1)
        calls = {
            hard.OptionalGuide: [((x,), {}), ((x, other), {}), ((x,), {"guide": other}), ((x, None), {})],
            hard.OptionalScale: [((x,), {}), ((x, 2.0), {}), ((x,), {"shift": 1.5}), ((x, other.mean()), {})],
            hard.Variadic: [((x,), {}), ((x, other), {}), ((x,), {"scale": 3})],
        }[kind]
        for arguments, named in calls:
            mine, right = twin(*arguments, **named), module(*arguments, **named)
            assert_equal({"y": mine.detach()}, {"y": right.detach()})


def test_nested_modules():
    """A dynamic module whose static part is one."""
    module = randomise(hard.FOLLOWED["Nested"]()).double()
    twin = accelerated(module, taken=None)
    assert {entry.name for entry in dcd.report(twin).taken} == {"", "conv"}
    assert_equal(run(twin, drawn()), run(module, drawn()))


def test_a_subclass_that_adds_to_forward():
    class Activated(zoo.ConvDY):
        def forward(self, x):
            return torch.relu(super().forward(x)) + 1

    module = randomise(Activated(16, 12)).double()
    assert_equal(run(accelerated(module, None), draw((16, 4, 5))), run(module, draw((16, 4, 5))))


def test_lazy_modules_are_not_touched():
    """Before its first call a lazy layer has no weight to look at."""

    class Lazy(half.Half):
        def build(self):
            self.q, self.conv = nn.LazyConv2d(L, 1), nn.LazyConv2d(CO, 3, padding=1)

    torch.manual_seed(0)
    module = Lazy().double()
    twin = dcd.accelerate(copy.deepcopy(module))
    (x,) = drawn()
    torch.manual_seed(1)
    right = module(x)
    torch.manual_seed(1)
    assert_equal({"y": twin(x).detach()}, {"y": right.detach()})


def test_a_model_on_the_meta_device():
    """Looked at without its numbers, which come later."""
    module = randomise(zoo.ConvDY(16, 12)).double().eval()
    with torch.device("meta"):
        twin = zoo.ConvDY(16, 12).double().eval()
    dcd.accelerate(twin)
    assert all(p.is_meta for p in twin.parameters())
    twin.load_state_dict(module.state_dict(), assign=True)
    assert_equal(run(twin, draw((16, 4, 5))), run(module, draw((16, 4, 5))))


def test_modules_that_cannot_be_copied():
    """Left alone, or taken without a copy; never an error."""

    class Uncopied(half.Half):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies of this")

    torch.manual_seed(0)
    module = Uncopied().double()
    right = run(module, drawn())
    module.load_state_dict({k: v for k, v in module.state_dict().items() if "running" not in k}, strict=False)
    module.bn1.reset_running_stats()
    module.bn2.reset_running_stats()
    assert_equal(run(dcd.accelerate(module), drawn()), right)


def test_quantised_and_scripted_children_are_left():
    torch.manual_seed(0)
    module = half.Half().eval()
    scripted = copy.deepcopy(module)
    scripted.fc = torch.jit.script(scripted.fc)
    twin = dcd.accelerate(scripted)
    (x,) = drawn(dtype=torch.float32)
    torch.testing.assert_close(twin(x), module(x), rtol=1e-4, atol=1e-4)
    whole = torch.jit.trace(module, x)
    before = whole(x)
    assert dcd.accelerate(whole) is whole
    assert torch.equal(whole(x), before)


def test_outputs_of_every_kind_keep_their_structure():
    class Dictionary(half.Half):
        def forward(self, x):
            return {"y": super().forward(x), "x": x, "n": len(x)}

    class Named(half.Half):
        def forward(self, x):
            return [super().forward(x), (x, None)]

    for kind in (Dictionary, Named):
        module = randomise(kind()).double()
        twin = accelerated(module, taken=None)
        (x,) = drawn()
        mine, right = twin(x), module(x)
        assert type(mine) is type(right)
        if kind is Dictionary:
            assert mine.keys() == right.keys() and mine["x"] is x and mine["n"] == 4
            torch.testing.assert_close(mine["y"], right["y"], rtol=1e-10, atol=1e-10)
        else:
            assert mine[1][0] is x and mine[1][1] is None
            torch.testing.assert_close(mine[0], right[0], rtol=1e-10, atol=1e-10)


def test_outputs_may_be_edited():
    """No output is a view of, or the same as, something that backward needs."""
    module = randomise(half.Half()).double()
    gradients = []
    for model in (accelerated(module), module):
        (x,) = leaves(drawn())
        outputs = as_tuple(model(x))
        for y in outputs:
            gradient = cotangent(y, 0)
            y.mul_(2).add_(1)
            y.backward(gradient)
        gradients.append({n: p.grad for n, p in model.named_parameters()} | {"x": x.grad})
    assert_equal(*gradients)
