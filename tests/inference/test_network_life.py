# SPDX-License-Identifier: BSD-3-Clause
"""What becomes of an optimised network: weights that change, copies, threads, processes."""

import concurrent.futures
import copy
import gc
import io
import multiprocessing
import pickle
import threading
import weakref

import pytest
import torch
from graphs import chain, conv, deep
from operands import threads
from runs import image, randomise
from subjects import accelerated, assert_follows, each, in_parts, mobilenet, written
from torch import nn

import dcd_kernels

# --- the module


@each
def test_argument_is_left_as_it_is(make):
    network = make()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modules = dict(network.named_modules())
    optimised = dcd_kernels.optimize_for_inference(network)
    with torch.no_grad():
        for parameter in optimised.parameters():
            parameter.zero_()
    optimised(image(1, 3, 32, 32))
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert dict(network.named_modules()) == modules
    assert all(type(parameter) is nn.Parameter for parameter in network.parameters())
    assert not network.training


@each
def test_keys_and_modules_are_the_same(make):
    network = make()
    optimised = dcd_kernels.optimize_for_inference(network)
    assert list(optimised.state_dict()) == list(network.state_dict())
    assert [name for name, _ in optimised.named_parameters()] == [n for n, _ in network.named_parameters()]
    assert [name for name, _ in optimised.named_buffers()] == [name for name, _ in network.named_buffers()]
    assert [name for name, _ in optimised.named_modules()] == [name for name, _ in network.named_modules()]
    assert all(torch.equal(a, b) for a, b in zip(optimised.parameters(), network.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in optimised.parameters())
    assert type(network).__name__ in repr(optimised)


def test_parameters_that_take_no_gradient():
    network = in_parts()
    network.a.weight.requires_grad_(False)
    optimised = dcd_kernels.optimize_for_inference(network)
    assert not optimised.a.weight.requires_grad and optimised.b.weight.requires_grad


def test_optimised_again():
    optimised = dcd_kernels.optimize_for_inference(mobilenet())
    again = dcd_kernels.optimize_for_inference(optimised)
    assert again is not optimised and type(again) is type(optimised)
    x = image(2, 3, 32, 32)
    assert torch.equal(again(x), optimised(x))
    with torch.no_grad():
        again.classifier[1].bias.add_(1)
    assert_follows(again)
    assert not torch.equal(again(x), optimised(x))


# --- weights


@each
def test_every_tensor_counts(make):
    """An edit in place of any one parameter or statistic is seen at the next call."""
    optimised = dcd_kernels.optimize_for_inference(make())
    x = image(2, 3, 33, 40)
    expected = optimised(x)
    tensors = optimised.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            own = tensor.detach().clone()
            with torch.no_grad():
                tensor.mul_(1 + torch.rand_like(tensor))
            assert not torch.equal(optimised(x), expected), name
            with torch.no_grad():
                tensor.copy_(own)
    assert torch.equal(optimised(x), expected)


def _add(tensor):
    tensor.add_(0.25)


EDITS = {
    "in place": lambda m: _add(m.weight),
    "through data": lambda m: m.weight.data.mul_(1.5),
    "data replaced": lambda m: setattr(m.weight, "data", m.weight.data * 1.5),
    "data replaced twice": lambda m: [setattr(m.weight, "data", m.weight.data * 1.5) for _ in range(2)],
    "parameter replaced": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 1.5)),
    "parameter deleted and set": lambda m: (
        delattr(m, "weight"),
        setattr(m, "weight", nn.Parameter(m.other)),
    ),
    "copy_": lambda m: m.weight.copy_(m.other),
    "set_": lambda m: m.weight.set_(m.other.clone()),
    "a slice of it": lambda m: m.weight[0].fill_(2),
    "a view of it": lambda m: m.weight.detach().view(-1)[3:5].zero_(),
    "init": lambda m: nn.init.normal_(m.weight),
    "reset": lambda m: (torch.manual_seed(77), m.reset_parameters()),
    "apply": lambda m: m.apply(lambda child: _add(child.weight)),
    "double and back": lambda m: (m.double(), _add(m.weight), m.float()),
    "half and back": lambda m: m.bfloat16().float(),
    "foreach": lambda m: torch._foreach_mul_([m.weight], 2.0),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        torch.randn(len(m.bias) + m.other.numel()), m.parameters()
    ),
    "load_state_dict": lambda m: m.load_state_dict({"weight": m.other, "bias": m.bias * 2}),
    "load_state_dict, assigned": lambda m: m.load_state_dict(
        {"weight": m.other, "bias": m.bias * 2}, assign=True
    ),
    "store updated": lambda m: m._parameters.update(weight=nn.Parameter(m.other.clone())),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_are_seen(edit):
    network = randomise(chain(conv(3, 8), conv(8, 8), nn.ReLU(), deep(8)))
    optimised = dcd_kernels.optimize_for_inference(network)
    x = image(2, 3, 12, 9)
    before = optimised(x)
    layer = optimised[1] if hasattr(type(optimised), "__getitem__") else optimised.get_submodule("1")
    object.__setattr__(layer, "other", torch.randn_like(layer.weight.detach()))
    for _ in range(2):  # the second time with tensors that came in later
        with torch.no_grad():
            edit(layer)
        assert_follows(optimised, x)
        assert not torch.equal(optimised(x), before)
        before = None or torch.zeros(())


def test_optimiser_steps_are_seen():
    optimised = dcd_kernels.optimize_for_inference(mobilenet())
    x = image(2, 3, 33, 40)
    for make in (torch.optim.SGD, torch.optim.AdamW):
        steps = make(optimised.parameters(), lr=0.01)
        before = optimised(x)
        optimised(x.clone().requires_grad_()).square().sum().backward()
        assert all(p.grad is not None for p in optimised.parameters())
        steps.step()
        assert not torch.equal(optimised(x), before)
        assert_follows(optimised, x)
        optimised.zero_grad()


@each
def test_load_state_dict(make):
    first, second = make(), make()
    with torch.no_grad():
        for tensor in second.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    optimised = dcd_kernels.optimize_for_inference(first)
    x = image(1, 3, 40, 33)
    optimised(x)
    for options in ({}, {"assign": True}, {}):
        assert not optimised.load_state_dict(second.state_dict(), **options).missing_keys
        torch.testing.assert_close(optimised(x), written(second, x), rtol=1e-4, atol=1e-4)
        first, second = second, first
    with pytest.raises(RuntimeError, match="nothing"):
        optimised.load_state_dict({"nothing": torch.zeros(1)})


class _Stateful(nn.Sequential):
    """With a state beside its tensors, a hook, and an older format of its keys."""

    def __init__(self):
        super().__init__(conv(3, 8), nn.ReLU())
        self.epoch = 3
        self.register_state_dict_post_hook(_with_a_note)

    def get_extra_state(self):
        return {"epoch": self.epoch}

    def set_extra_state(self, state):
        self.epoch = state["epoch"]

    def _load_from_state_dict(self, state, prefix, *rest):
        if prefix + "old" in state:
            state[prefix + "0.weight"] = state.pop(prefix + "old")
        super()._load_from_state_dict(state, prefix, *rest)


def _with_a_note(module, state, prefix, metadata):
    metadata["note"] = module.epoch


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in another module"])
def test_state_of_the_network_s_own(inside):
    network = _Stateful().eval()
    optimised = dcd_kernels.optimize_for_inference(network)
    holder = nn.ModuleList([optimised]) if inside else optimised
    prefix = "0." if inside else ""
    state = holder.state_dict()
    assert list(state) == [prefix + key for key in network.state_dict()]
    assert state[prefix + "_extra_state"] == {"epoch": 3}
    assert inside or state._metadata[""]["note"] == 3
    x = image(1, 3, 8, 8)
    optimised(x)
    weight = torch.randn_like(state.pop(prefix + "0.weight"))
    state |= {prefix + "old": weight, prefix + "_extra_state": {"epoch": 5}}
    holder.load_state_dict(state)
    assert optimised.written.epoch == 5 and network.epoch == 3
    assert torch.equal(optimised.get_submodule("0").weight, weight)
    assert_follows(optimised, x)


def test_moved_and_back():
    optimised = dcd_kernels.optimize_for_inference(mobilenet())
    x = image(2, 3, 32, 33)
    expected = optimised(x)
    optimised.double()
    wide = optimised(x.double())
    assert wide.dtype is torch.float64
    torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"[Dd]ouble|dtype|type"):
        optimised(x)
    optimised.float()
    assert torch.equal(optimised(x), expected)
    optimised.to(torch.bfloat16)
    assert optimised(x.bfloat16()).dtype is torch.bfloat16
    optimised.to(torch.float32)
    assert_follows(optimised, x)
    optimised.to(memory_format=torch.channels_last)
    assert_follows(optimised, x)
    optimised.to("meta")
    with pytest.raises(RuntimeError, match=r"[mM]eta"):
        optimised(x)


def test_network_on_another_device():
    """Runs as it is written there; brought to the CPU, on the kernels."""
    network = chain(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()).eval()
    optimised = dcd_kernels.optimize_for_inference(network.to("meta"))
    assert optimised(torch.empty(2, 3, 9, 9, device="meta")).shape == (2, 8, 9, 9)
    optimised.to_empty(device="cpu")
    optimised.get_submodule("0").reset_parameters()
    randomise(optimised.written)
    assert_follows(optimised, image(2, 3, 9, 9))
    assert not dcd_kernels.report(optimised).left


def test_lazy_layers():
    """Their sizes are found out by a first call with an image, which is not ours to make."""
    network = chain(nn.LazyConv2d(8, 3), nn.ReLU()).eval()
    with pytest.raises(ValueError, match=r"'0\.weight' has no size yet: call the model once"):
        dcd_kernels.optimize_for_inference(network)
    network(image(1, 3, 9, 9))
    assert_follows(dcd_kernels.optimize_for_inference(network), image(1, 3, 9, 9))


def test_input_on_another_device():
    optimised = dcd_kernels.optimize_for_inference(mobilenet())
    with pytest.raises(RuntimeError, match=r"[mM]eta|device"):
        optimised(torch.empty(1, 3, 32, 32, device="meta"))


def test_shared_parameters_stay_shared():
    network = randomise(chain(conv(3, 8), conv(8, 8), nn.ReLU(), conv(8, 8)))
    network[3].weight = network[1].weight
    optimised = dcd_kernels.optimize_for_inference(network)
    one, other = (optimised.get_submodule(name) for name in "13")
    assert one.weight is other.weight and len(list(optimised.parameters())) == 5
    with torch.no_grad():
        one.weight.mul_(2)
    assert_follows(optimised, image(1, 3, 9, 9))


@pytest.mark.parametrize("inside", ["made", "optimised", "called", "edited"])
def test_inference_mode(inside):
    with torch.inference_mode(inside == "made"):
        network = mobilenet()
    with torch.inference_mode(inside in ("made", "optimised")):
        optimised = dcd_kernels.optimize_for_inference(network)
    x = image(2, 3, 32, 32)
    with torch.inference_mode(inside == "called"):
        optimised(x)
    weight = optimised.get_submodule("classifier.1").bias
    with torch.inference_mode(inside == "edited"), torch.no_grad():
        weight.add_(1)
    assert_follows(optimised, x)
    with torch.inference_mode():
        assert_follows(optimised, x.clone())


# --- copies


@each
@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "save"])
def test_copies(make, way):
    optimised = dcd_kernels.optimize_for_inference(make())
    x = image(2, 3, 33, 40)
    expected = optimised(x)
    if way == "deepcopy":
        twin = copy.deepcopy(optimised)
    elif way == "copy":
        twin = copy.copy(optimised)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(optimised))
    else:
        memory = io.BytesIO()
        torch.save(optimised, memory)
        memory.seek(0)
        twin = torch.load(memory, weights_only=False)
    assert type(twin) is type(optimised)
    if make is accelerated:  # a pickle holds modules that are not patched, whose numbers are taken elsewhere
        torch.testing.assert_close(twin(x), expected)
    else:
        assert torch.equal(twin(x), expected)
    assert list(twin.state_dict()) == list(optimised.state_dict())
    if way == "copy":
        return
    with torch.no_grad():
        next(twin.parameters()).mul_(1.5)
    assert_follows(twin, x)
    assert torch.equal(optimised(x), expected), "a copy shares weights with its original"


def test_state_dict_is_plain():
    """What is saved loads without dcd_kernels, also with weights_only."""
    memory = io.BytesIO()
    torch.save(dcd_kernels.optimize_for_inference(mobilenet()).state_dict(), memory)
    memory.seek(0)
    state = torch.load(memory, weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    mobilenet().load_state_dict(state)


def test_nothing_leaks():
    optimised = dcd_kernels.optimize_for_inference(mobilenet())
    x = image(1, 3, 32, 32)
    packed = weakref.ref(optimised.plan.parts[0].constants)
    with torch.no_grad():
        next(optimised.parameters()).mul_(1.5)
    optimised(x)
    gc.collect()
    assert packed() is None, "the weights from before the edit are still there"
    packed = weakref.ref(optimised.plan.parts[0].constants)
    parameter = weakref.ref(next(optimised.parameters()))
    network = weakref.ref(optimised.written)
    del optimised
    gc.collect()
    assert packed() is None and parameter() is None and network() is None


# --- threads and processes


@each
def test_several_threads_at_once(make):
    network = dcd_kernels.optimize_for_inference(make())
    inputs = [image(batch, 3, 24 + 3 * batch, 40, seed=batch) for batch in (1, 2, 3)]
    with threads(1):
        expected = [network(x) for x in inputs]
        barrier = threading.Barrier(4)

        def work(number):
            torch.set_num_threads(1)
            barrier.wait()
            return [network(inputs[(number + i) % 3]) for i in range(12)]

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for number, results in enumerate(pool.map(work, range(4))):
                for i, got in enumerate(results):
                    assert torch.equal(got, expected[(number + i) % 3])


def test_several_threads_pack_once():
    """All meet a network whose weights have changed: each gets the new numbers."""
    network = dcd_kernels.optimize_for_inference(mobilenet())
    x = image(1, 3, 32, 32)
    with threads(1):
        for _ in range(3):
            with torch.no_grad():
                next(network.parameters()).mul_(1.25)
            barrier = threading.Barrier(4)

            def work(_, barrier=barrier):
                torch.set_num_threads(1)
                barrier.wait()
                return network(x), network.plan

            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                results, plans = zip(*pool.map(work, range(4)), strict=True)
            assert all(torch.equal(got, network(x)) for got in results)
            assert len(set(map(id, plans))) == 1
            assert_follows(network, x)


def _in_child(network, x, connection):
    torch.set_num_threads(1)
    first = network(x)
    with torch.no_grad():
        next(network.parameters()).mul_(1.5)
    connection.send((first.numpy(), network(x).numpy()))
    connection.close()


def test_fork():
    network = dcd_kernels.optimize_for_inference(mobilenet())
    x = image(1, 3, 32, 32)
    with threads(1):
        expected = network(x)
        mine, theirs = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(network, x, theirs))
        child.start()
        assert mine.poll(60), "the child does not answer"
        first, second = map(torch.from_numpy, mine.recv())
        child.join(60)
        assert child.exitcode == 0
        assert torch.equal(first, expected) and not torch.equal(second, expected)
        assert torch.equal(network(x), expected), "the child's edit reached the parent"
        with torch.no_grad():
            next(network.parameters()).mul_(1.5)
        assert torch.equal(network(x), second)
