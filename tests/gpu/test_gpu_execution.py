# SPDX-License-Identifier: BSD-3-Clause
"""How the kernels run on the GPU: graphs, streams, devices, synchronisation, memory, determinism, size."""

from __future__ import annotations

import contextlib
import json

import op_checks
import pytest
import test_ops_apply
import test_ops_pointwise
import torch
import torch.nn.functional as F
from on_device import BF16_WIDE, DEPTHWISE, ON_GPU, module_backend, random_map
from operands import call, label, operands

import dcd_kernels as dcd
from dcd_kernels.nn import DCDConv2d

OPS = [test_ops_pointwise.TILED, test_ops_apply.TILED, DEPTHWISE[1]]
LAYERS = {
    "pointwise": ((32, 48, 1), {}),
    "pointwise released branch": ((32, 48, 1), {"pool_size": 2, "gate": "se"}),
    "3x3": ((16, 24, 3), {"padding": 1}),
    "joint": ((16, 24, 3), {"padding": 1, "joint": True}),
    "depthwise": ((32, 32, 3), {"padding": 1, "groups": 32}),
}


def a_layer(key: str, device, dtype=torch.bfloat16) -> tuple[DCDConv2d, torch.Tensor]:
    torch.manual_seed(0)
    arguments, options = LAYERS[key]
    layer = DCDConv2d(*arguments, **options).to(device, dtype)
    return layer, random_map(4, arguments[0], 14, 14, seed=1, dtype=dtype, layout="channels_last")


def forward_backward(layer, input) -> list[torch.Tensor]:
    output = layer(input)
    return [output, *torch.autograd.grad(output, [input, *layer.parameters()], torch.ones_like(output))]


@contextlib.contextmanager
def no_synchronisation():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# --- CUDA graphs


@pytest.mark.parametrize("training", (False, True), ids=("forward", "and backward"))
@pytest.mark.parametrize("key", LAYERS)
def test_graph_capture_and_replay(key, training, cuda):
    """Captured once, replayed with other inputs: the bits of the eager call."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    layer, input = a_layer(key, cuda)
    static = input.clone().requires_grad_(training)

    def step():
        return forward_backward(layer, static) if training else [layer(static)]

    with torch.set_grad_enabled(training):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in (2, 3):
            fresh = random_map(*input.shape, seed=seed, dtype=input.dtype, layout="channels_last")
            with torch.no_grad():
                static.copy_(fresh)
            graph.replay()
            replayed = [t.clone() for t in captured]
            for got, expected in zip(replayed, step(), strict=True):
                assert torch.equal(got, expected)


def test_graph_of_a_call_that_was_never_tuned(cuda, tuned, tmp_path):
    """Nothing is measured under capture, which would end it: the first tile is taken, and none remembered."""
    case = OPS[0]
    tensors = operands(case, torch.bfloat16, "channels_last", device=cuda)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCD_KERNELS_TUNE", "0")
        call(case, tensors)  # compiles the tile that capture will take
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(case, tensors)
    graph.replay()
    torch.testing.assert_close(captured, call(case, tensors))


def test_tiles_are_measured_once_and_remembered(cuda, tuned, tmp_path):
    case = OPS[0]
    tensors = operands(case, torch.float16, "channels_last", device=cuda)
    first = call(case, tensors)
    files = list(tmp_path.glob("*.json"))
    assert torch.equal(first, call(case, tensors))
    if files:  # no file where the kernel has one candidate for this size
        assert json.loads(files[0].read_text(encoding="utf-8"))


# --- streams and devices


@pytest.mark.parametrize("case", OPS, ids=label)
def test_side_stream(case, cuda):
    """On another stream, on an input that is not there before that stream has slept."""
    tensors = operands(case, torch.bfloat16, "channels_last", wide=True, device=cuda)
    expected = call(case, tensors)
    late = torch.full_like(tensors[0], float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(tensors[0])
        got = call(case, [late, *tensors[1:]])
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", OPS, ids=label)
def test_second_device(case, cuda):
    """Tensors elsewhere than on the current device: their device counts."""
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device")
    second = torch.device("cuda", 1)
    tensors = operands(case, torch.bfloat16, "channels_last", wide=True, requires_grad=True, device=cuda)
    expected = call(case, tensors)
    there = [None if t is None else t.detach().to(second).requires_grad_() for t in tensors]
    assert torch.cuda.current_device() == 0
    got = call(case, there)
    assert got.device == second
    torch.testing.assert_close(got.cpu(), expected.cpu())
    for mine, right in zip(
        torch.autograd.grad(got.sum(), [t for t in there if t is not None]),
        torch.autograd.grad(expected.sum(), [t for t in tensors if t is not None]),
        strict=True,
    ):
        assert mine.device == second
        torch.testing.assert_close(mine.cpu(), right.cpu())


@pytest.mark.parametrize("key", LAYERS)
def test_no_host_synchronisation(key, cuda):
    layer, input = a_layer(key, cuda)
    input.requires_grad_()
    forward_backward(layer, input)  # compiles, and makes what is made once
    torch.cuda.synchronize()
    with no_synchronisation():
        forward_backward(layer, input)
        with torch.no_grad():
            layer(input)


def test_synchronisation_would_be_seen(cuda):
    with no_synchronisation(), pytest.raises(RuntimeError):
        torch.ones(1, device=cuda).item()


# --- memory

BATCH, CHANNELS = 256, 512
PER_SAMPLE = BATCH * CHANNELS * CHANNELS * 2  # bytes of N·Co·Ci in bf16


def grown(function) -> int:
    """Bytes by which the peak of a second call lies above what was there before it."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def big_call(form: str, device):
    dtype = torch.bfloat16
    p, q = (random_map(CHANNELS, 8, seed=i, dtype=dtype).requires_grad_() for i in (1, 2))
    phi = random_map(BATCH, 8, 8, seed=3, dtype=dtype).requires_grad_()
    lam = random_map(BATCH, CHANNELS, seed=4, dtype=dtype).requires_grad_()
    weight = random_map(CHANNELS, CHANNELS, 1, 1, seed=5, dtype=dtype).requires_grad_()
    input = random_map(BATCH, CHANNELS, 2, 2, seed=6, dtype=dtype).requires_grad_()
    leaves = [input, weight, p, phi, q, lam]

    def pointwise():
        return dcd.dcd_conv2d(input, weight, p, phi, q, lam=lam)

    def linear():
        return dcd.dcd_linear(input[:, :, 0, 0], weight[:, :, 0, 0], p, phi, q, lam=lam)

    def apply():
        return dcd.dcd_apply(input, input, p, phi, q, lam=lam) + weight.sum()

    def materialised():
        weights = dcd.reference.dcd_weight(weight, p, phi, q, lam=lam).flatten(2)
        return torch.bmm(weights, input.flatten(2))

    function = {
        "pointwise": pointwise,
        "linear": linear,
        "apply": apply,
        "materialised": materialised,
    }[form]

    def step():
        output = function()
        torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    return step


@pytest.mark.parametrize("form", ("pointwise", "linear", "apply"))
def test_no_per_sample_weight(form, cuda):
    assert grown(big_call(form, cuda)) < PER_SAMPLE // 2


def test_a_per_sample_weight_would_be_seen(cuda):
    assert grown(big_call("materialised", cuda)) > PER_SAMPLE


# --- determinism


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("case", OPS, ids=label)
def test_same_inputs_same_bits(case, layout, device):
    op_checks.same_bits(case, layout, None, 1, device=device)
    op_checks.same_bits(case, layout, None, 1, device=device, dtype=BF16_WIDE.dtype)


@pytest.mark.parametrize("key", LAYERS)
def test_a_layer_gives_the_same_bits(key, device):
    layer, input = a_layer(key, device)
    input.requires_grad_()
    with dcd.use_backend(module_backend()):
        first = forward_backward(layer, input)
        for _ in range(2):
            for got, expected in zip(forward_backward(layer, input), first, strict=True):
                assert torch.equal(got, expected)


# --- beyond 2^31 elements

SIDE = 4096 if ON_GPU else 16


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("form", ("pointwise", "depthwise"))
def test_more_elements_than_an_int_counts(form, layout, device):
    """Right, checked at both ends, or a clear error; 2.7·10⁹ elements on a GPU, the same code on few here."""
    batch, channels, strip = 5, 32, 3
    if ON_GPU:
        torch.utils.deterministic.fill_uninitialized_memory = False
        wanted = 5 * batch * channels * SIDE**2 * 2
        free, _ = torch.cuda.mem_get_info()
        if free < wanted:
            pytest.skip(f"needs {wanted / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}")
    dtype = torch.bfloat16
    last = layout == "channels_last"
    shape = (batch, SIDE, SIDE, channels) if last else (batch, channels, SIDE, SIDE)
    generator = torch.Generator(device).manual_seed(0)
    input = torch.empty(shape, dtype=dtype, device=device)
    for sample in input:
        sample.uniform_(-1, 1, generator=generator)
    input = input.permute(0, 3, 1, 2) if last else input
    latent = random_map(batch, 4, 4, seed=1, dtype=dtype)
    lam = random_map(batch, channels, seed=2, dtype=dtype)
    p, q = random_map(channels, 4, seed=3, dtype=dtype), random_map(channels, 4, seed=4, dtype=dtype)
    options = {"lam": lam}
    if form == "pointwise":
        weight = random_map(channels, channels, 1, 1, seed=5, dtype=dtype)
        factors = (weight, p, latent, q)
    else:
        weight = random_map(channels, 1, 3, 3, seed=5, dtype=dtype)
        factors = (weight, p, latent)
        options |= {"r": random_map(9, 4, seed=6, dtype=dtype), "padding": 1, "groups": channels}
    try:
        with torch.no_grad():
            output = dcd.dcd_conv2d(input, *factors, **options)
    except torch.OutOfMemoryError:
        pytest.skip("other processes took the memory meanwhile")
    except (RuntimeError, ValueError) as error:
        # what is refused must be refused for its size
        assert any(text in str(error) for text in ("2**31", "2^31", "elements", "large")), error
        return
    for rows in (slice(0, strip), slice(SIDE - strip, SIDE)):
        inner = slice(max(0, rows.start - 1), min(SIDE, rows.stop + 1))
        piece = input[:, :, inner].double()
        high = {key: t.double() if isinstance(t, torch.Tensor) else t for key, t in options.items()}
        truth = dcd.reference.dcd_conv2d(piece, *(t.double() for t in factors), **high)
        truth = truth[:, :, rows.start - inner.start :][:, :, :strip]
        got = output[:, :, rows].double()
        assert got.isfinite().all()
        for sample in range(batch):
            error = (got[sample] - truth[sample]).norm().item()
            assert error <= 8 * torch.finfo(dtype).eps * truth[sample].norm().item(), (sample, rows)


def test_static_peer_agrees_on_small_sizes(device):
    """The strips of the test above are what they claim to be: λ = 1 and Φ = 0 give torch's convolution."""
    input = random_map(2, 8, 9, 9, seed=0, dtype=torch.float32)
    weight = random_map(8, 1, 3, 3, seed=1, dtype=torch.float32)
    lam = torch.ones(2, 8, device=device)
    got = dcd.dcd_conv2d(input, weight, lam=lam, padding=1, groups=8)
    torch.testing.assert_close(got, F.conv2d(input, weight, padding=1, groups=8))
