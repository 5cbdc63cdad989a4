# SPDX-License-Identifier: BSD-3-Clause
"""What accelerate must not disturb: hooks, copies, pickles, the report, autograd, and everything's state."""

import copy
import io
import itertools
import pickle
import threading

import pytest
import torch
import zoo
import zoo_variants as wild
from families import draw, inputs, make, randomise
from torch import nn
from twins import accelerated, assert_equal, cotangent, leaves, outcome, run

import dcd_kernels as dcd

SHAPE = (16, 5, 6)


def released(training=True):
    return randomise(zoo.ConvDY(16, 12, 3, 1, 1)).double().train(training)


def network(training=True):
    return randomise(zoo.Network()).double().train(training)


def state(model):
    """Everything that accelerate must leave alone, by identity where there is one and by value."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        [(name, id(t), t._version, t.requires_grad, id(t.grad)) for name, t in tensors],
        [(name, t.detach().numpy().tobytes()) for name, t in tensors],
        list(model.state_dict()),
        [
            {k: v for k, v in vars(m).items() if k != "forward" and not k.startswith("_")}
            for m in model.modules()
        ],
    )


# ------------------------------------------------------------------------------------------------ the model


def test_the_same_model_and_nothing_else_changed():
    model = network()
    model(draw((3, 16, 16))[0]).sum().backward()
    model.expand[0].eval()
    before, generator = state(model), torch.get_rng_state()
    assert dcd.accelerate(model) is model
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert len(dcd.report(model).taken) == 5
    assert torch.equal(torch.get_rng_state(), generator)
    assert dcd.restore(model) is model
    assert state(model) == before
    assert not any("forward" in vars(m) for m in model.modules())


def test_no_other_attributes_of_instances():
    """What is private to nn.Module and to the user's classes stays as well."""
    model = network()
    before = [set(vars(m)) for m in model.modules()]
    dcd.accelerate(model)
    for module, names in zip(model.modules(), before, strict=True):
        assert set(vars(module)) <= names | {"forward", "_replicate_for_data_parallel"}
    dcd.restore(model)
    assert [set(vars(m)) for m in model.modules()] == before


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_restored_gives_the_same_bits(training):
    model = network(training)
    drawn = draw((3, 16, 16))
    right = run(copy.deepcopy(model), drawn)
    restored = dcd.restore(dcd.accelerate(model))
    mine = run(restored, drawn)
    assert all(torch.equal(mine[name], right[name]) for name in right)
    assert not dcd.report(restored).taken


def test_twice_is_once():
    model = dcd.accelerate(network())
    forwards = [vars(m).get("forward") for m in model.modules()]
    before, report = state(model), str(dcd.report(model))
    dcd.accelerate(model)
    assert state(model) == before and str(dcd.report(model)) == report
    right = run(network(), draw((3, 16, 16)))
    assert_equal(run(model, draw((3, 16, 16))), right)
    dcd.restore(model)
    assert not any("forward" in vars(m) for m in model.modules()), "patched on top of a patch"
    assert any(forwards)


def test_a_model_with_nothing_to_accelerate():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    before = state(model)
    assert dcd.accelerate(model) is model and state(model) == before
    report = dcd.report(model)
    assert len(report) == 0 and list(report) == [] and report.taken == report.left == []
    assert "nothing" in str(report)
    assert dcd.restore(model) is model
    with pytest.raises(IndexError):
        report[0]


@pytest.mark.parametrize("function", [dcd.accelerate, dcd.restore, dcd.report])
@pytest.mark.parametrize("bad", [None, 3, "model", torch.zeros(2), nn.Conv2d, [nn.ReLU()]], ids=repr)
def test_no_module(function, bad):
    with pytest.raises(TypeError, match=r"model must be .*Module.* got "):
        function(bad)


def test_report():
    class Recurrent(zoo.ConvDY):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = nn.Sequential(zoo.DYModule(8, 16), nn.ReLU(), Recurrent(16, 16), zoo.ConvBasicDY(16, 8))
    assert not dcd.report(model).taken
    report = dcd.report(dcd.accelerate(model))
    assert [entry.name for entry in report.taken] == ["0", "3"]
    assert [entry.name for entry in report.left] == ["2"]
    assert len(report) == 3 and [entry.name for entry in report] == ["0", "2", "3"]
    assert [entry.kind for entry in report] == ["DYModule", "Recurrent", "ConvBasicDY"]
    assert [entry.taken for entry in report] == [True, False, True]
    assert all(isinstance(entry.reason, str) and len(entry.reason) > 5 for entry in report)
    assert report[1].name == "2" and report[-1].name == "3"
    table = str(report)
    assert all(entry.name in table and entry.kind in table and entry.reason in table for entry in report)


@pytest.mark.parametrize("name", ["p", "bn2"])
def test_the_report_is_of_now(name):
    """What is patched but runs its own forward for the time being says so, and why."""
    model = dcd.accelerate(nn.Sequential(released()))
    fused = dcd.report(model)[0].reason
    handle = model[0].get_submodule(name).register_forward_hook(lambda *_: None)
    reason = dcd.report(model)[0].reason
    assert reason != fused and name in reason and "hook" in reason
    handle.remove()
    assert dcd.report(model)[0].reason == fused


# -------------------------------------------------------------------------------------------------- hooks

HOOKS = {
    "forward": lambda module, log: module.register_forward_hook(lambda m, i, o: log.append(o.shape)),
    "forward_pre": lambda module, log: module.register_forward_pre_hook(lambda m, i: log.append(i[0].shape)),
    "full_backward": lambda module, log: module.register_full_backward_hook(
        lambda m, i, o: log.append(o[0].shape)
    ),
    "full_backward_pre": lambda module, log: module.register_full_backward_pre_hook(
        lambda m, o: log.append(o[0].shape)
    ),
}
CHILDREN = ["", "conv", "q", "p", "bn1", "bn2", "fc", "fc.1.fc", "hs"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("child", CHILDREN)
def test_hooks_fire_as_they_did(child, kind, when):
    """Once a call, with what they got before."""
    results, logs = [], []
    for patched in (True, False):
        model, log = released(), []
        if patched and when == "after":
            dcd.accelerate(model)
        HOOKS[kind](model.get_submodule(child), log)
        if patched and when == "before":
            dcd.accelerate(model)
        log.clear()
        results.append(run(model, draw(SHAPE)))
        logs.append(log)
    assert_equal(*results)
    assert logs[0] == logs[1] and len(logs[1]) == 1


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_a_static_layer_that_is_fused(kind):
    """A 1×1 convolution runs inside of the fused call when nobody watches it."""
    results, logs = [], []
    for accelerate in (dcd.accelerate, lambda model: model):
        model, log = accelerate(make("DYModule expand").train()), []
        HOOKS[kind](model.conv, log)
        results.append(run(model, inputs("DYModule expand")))
        logs.append(log)
    assert_equal(*results)
    assert logs[0] == logs[1] and len(logs[1]) == 1


def test_hooks_do_not_fire_while_accelerate_looks():
    """They may count, log or write files."""
    model, log = released(), []
    for child in CHILDREN:
        for register in HOOKS.values():
            register(model.get_submodule(child), log)
    for function in (dcd.accelerate, dcd.report, dcd.accelerate, dcd.restore, dcd.report):
        function(model)
        assert not log, f"{function.__name__} fired {len(log)} hooks"


@pytest.mark.parametrize("child", ["", "conv", "q", "p", "bn1", "bn2", "fc_phi", "fc"])
def test_hooks_that_change_values(child):
    module = released()
    twin = accelerated(module)
    handles = [m.get_submodule(child).register_forward_hook(lambda m, i, o: 2 * o) for m in (twin, module)]
    assert_equal(run(twin, draw(SHAPE)), run(module, draw(SHAPE)))
    for model in (twin, module):
        handles.append(model.get_submodule(child).register_forward_pre_hook(lambda m, i: (-i[0],)))
    assert_equal(run(twin, draw(SHAPE)), run(module, draw(SHAPE)))
    for handle in handles:
        handle.remove()
    assert_equal(run(twin, draw(SHAPE)), run(module, draw(SHAPE)))


def test_global_hooks():
    """They see every child, as long as they are there."""
    module = released()
    logs = []
    for model in (accelerated(module), module):
        log = []
        names = {m: n for n, m in model.named_modules()}
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, i, o, log=log, names=names: log.append(names.get(m))
        )
        try:
            run(model, draw(SHAPE))
        finally:
            handle.remove()
        logs.append(log)
    assert sorted(logs[0]) == sorted(logs[1]) and "q" in logs[1]


def test_hooks_on_parameters():
    module = released()
    logs = []
    for model in (accelerated(module), module):
        log = {}
        for name, p in model.named_parameters():
            found = log[name] = []
            p.register_hook(lambda g, found=found: found.append(g.clone()))
            p.register_post_accumulate_grad_hook(lambda p, found=found: found.append(p.grad.clone()))
        run(model, draw(SHAPE))
        logs.append({f"{name} {i}": t for name, found in log.items() for i, t in enumerate(found)})
    assert len(logs[1]) == 2 * len(list(module.parameters()))
    assert_equal(*logs)


# ------------------------------------------------------------------------------------------------- copies


def copies():
    def pickled(model):
        return pickle.loads(pickle.dumps(model))

    def saved(model):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}


@pytest.mark.parametrize("again", [False, True], ids=["as it is", "accelerated again"])
@pytest.mark.parametrize("how", copies())
@pytest.mark.parametrize("kind", [released, network])
def test_copies(kind, how, again):
    """A copy uses its own weights and statistics, whether its original is changed or gone."""
    model = dcd.accelerate(kind())
    drawn = draw(SHAPE if kind is released else (3, 16, 16))
    right = run(kind(), drawn)
    twin = copies()[how](model)
    if again:
        dcd.accelerate(twin)
        assert dcd.report(twin).taken
    assert list(twin.state_dict()) == list(model.state_dict()) == list(kind().state_dict())
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.zero_()
    assert_equal(run(twin, drawn), right)
    del model
    twin = copies()[how](twin)
    other = randomise(kind(), seed=8)
    twin.load_state_dict(other.state_dict())
    assert_equal(run(twin, drawn), run(other, drawn))
    dcd.restore(twin)
    twin.load_state_dict(randomise(kind(), seed=8).state_dict())
    assert_equal(run(twin, drawn), run(randomise(kind(), seed=8), drawn))


def test_state_dict_hooks_and_keys():
    module = zoo.DYModule(8, 16)
    keys = list(module.state_dict())
    metadata = module.state_dict()._metadata
    dcd.accelerate(module)
    assert list(module.state_dict()) == keys and module.state_dict()._metadata == metadata
    assert [n for n, _ in module.named_children()] == [n for n, _ in zoo.DYModule(8, 16).named_children()]
    assert isinstance(module, zoo.DYModule) and type(module) is zoo.DYModule
    assert repr(module) == repr(zoo.DYModule(8, 16))


# ----------------------------------------------------------------------------------------------- autograd


def second_derivatives(model, drawn):
    model.zero_grad()
    mine = leaves(drawn)
    output = model(*mine)
    wanted = [*mine, *model.parameters()]
    first = torch.autograd.grad(output, wanted, cotangent(output, 0), create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    second = torch.autograd.grad(penalty, wanted, allow_unused=True)
    return {str(i): g.detach() for i, g in enumerate((*first, *second)) if g is not None}


@pytest.mark.parametrize("name", ["conv_dy 3×3", "DYModule expand", "GroupNorm", "Reflected", "DYCls"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_double_backward(name, training):
    """A gradient penalty."""
    module = make(name).train(training)
    twin = accelerated(module)
    assert_equal(second_derivatives(twin, inputs(name)), second_derivatives(module, inputs(name)), 1e-9)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_input_edited_between_forward_and_backward(training):
    for model in (released(training), dcd.accelerate(released(training))):
        (x,) = draw(SHAPE)
        x = x.requires_grad_() * 1
        output = model(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("name", ["q.weight", "p.weight", "bn1.weight", "bn2.weight", "fc_phi.weight"])
def test_a_weight_edited_between_forward_and_backward(name):
    """Raises, or gives the gradients of the values that forward saw."""
    right = run(released(), draw(SHAPE))
    model = dcd.accelerate(released())
    (x,) = leaves(draw(SHAPE))
    output = model(x)
    with torch.no_grad():
        model.get_parameter(name).mul_(3)
    try:
        output.backward(cotangent(output, 0))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    assert_equal({"x": x.grad}, {"x": right["input 0.grad"]})
    assert_equal(
        {n: p.grad for n, p in model.named_parameters()},
        {n: right[f"{n}.grad"] for n, _ in model.named_parameters()},
    )


@pytest.mark.parametrize("kind", ["conv_dy 3×3", "Branch", "InPlace"])
def test_an_output_edited_in_place(kind):
    """By a ReLU(inplace=True) behind it, or by the caller's own sum."""
    module = make(kind).train()
    drawn = inputs(kind)
    twin = accelerated(module)
    results = []
    for model in (twin, module):
        (x,) = leaves(drawn)
        output = model(x * 1)
        outputs = output if isinstance(output, tuple) else (output,)
        total = sum(torch.relu_(y).square().sum() for y in outputs)
        total.backward()
        results.append({n: p.grad for n, p in model.named_parameters()} | {"x": x.grad})
    assert_equal(*results)


def test_functional_call():
    """Other parameters for one call; torch.func.grad through it."""
    module = released(False)
    twin = accelerated(module)
    others = {n: torch.randn_like(p) for n, p in module.named_parameters()}
    (x,) = draw(SHAPE)
    results = [torch.func.functional_call(model, others, (x,)) for model in (twin, module)]
    assert_equal({"y": results[0].detach()}, {"y": results[1].detach()})

    def loss(parameters, model):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    assert_equal(*(torch.func.grad(loss)(others, model) for model in (twin, module)))


def test_an_empty_batch():
    """Like the original, which may not take one; with a batch again behind it."""
    for module, shape in ((released(), SHAPE), (make("Einsum"), (10, 5, 6)), (make("1×1"), (12, 5, 6))):
        for training in (True, False):
            module.train(training)
            models = accelerated(module, taken=None), copy.deepcopy(module)
            mine, right = (outcome(model, draw(shape, batch=0)) for model in models)
            if isinstance(right, Exception):
                # a size of -1 that cannot be told is none of ours
                assert type(mine) is type(right) or "unspecified dimension" in str(right), repr(mine)
            else:  # the mean of no numbers is NaN
                assert not isinstance(mine, Exception), repr(mine)
                assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in right.items()}
            for model in models:
                model.load_state_dict(module.state_dict())
            assert_equal(*(run(model, draw(shape)) for model in models))


@pytest.mark.parametrize("bad", ["channels", "rank", "dtype", "kind"])
def test_bad_input_still_raises(bad):
    x = {
        "channels": torch.zeros(2, 3, 5, 5).double(),
        "rank": torch.zeros(2, 16, 5).double(),
        "dtype": torch.zeros(2, 16, 5, 5),
        "kind": None,
    }[bad]
    for model in (released(), dcd.accelerate(released())):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            model(x)


def test_arguments_by_name():
    module, drawn = released(), draw(SHAPE)
    right = run(copy.deepcopy(module), drawn)
    mine = run(model := dcd.accelerate(module), drawn, call=lambda x: model(x=x))
    assert_equal(mine, right)
    guided = make("Guided").train()
    x, guide = draw((8, 6, 6), (5,))
    wanted = copy.deepcopy(guided)(x, guide)
    twin = accelerated(guided, taken=None)
    for call in (lambda m: m(x, guide=guide), lambda m: m(guide=guide, x=x)):
        torch.testing.assert_close(call(copy.deepcopy(twin)), wanted, rtol=1e-10, atol=1e-10)


def test_two_threads():
    model, drawn = dcd.accelerate(released(False)), draw(SHAPE)
    right = model(*drawn)
    outputs = []

    def work():
        for _ in range(5):
            outputs.append(model(*drawn))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 10 and all(torch.equal(y, right) for y in outputs)


def test_outside_code_that_reads_the_module():
    """Its weights by name, a subclass test, and the same call by way of the class."""
    model = dcd.accelerate(released(False))
    assert isinstance(model, zoo.ConvDY) and model.p.weight.shape == (12, 4, 1, 1)
    (x,) = draw(SHAPE)
    torch.testing.assert_close(zoo.ConvDY.forward(model, x), model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.forward(x), model(x), rtol=0, atol=0)


def test_same_bits_again():
    model = dcd.accelerate(wild.Einsum(10, 12).eval())
    (x,) = draw((10, 5, 6), dtype=torch.float32)
    assert torch.equal(model(x), model(x))
