# SPDX-License-Identifier: BSD-3-Clause
"""No per-sample weight is ever allocated: nothing of N·Co·Ci (depthwise: N·Co·taps) elements, in no form,
forward or backward. Three detectors, each shown to notice the version that does allocate it."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import Case, make_case
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dcd_kernels as dcd

BATCH, IN, OUT = 5, 22, 26
SIZE = (3, 2)
SHAPES = {"batch": BATCH, "in_channels": IN, "out_channels": OUT, "latent": 3, "dtype": torch.float32}
FORMS = {
    "pointwise": {"size": SIZE},
    "fusion alone": {"size": SIZE},
    "attention alone": {"size": SIZE},
    "blocks": {"size": SIZE},
    "depthwise": {"size": SIZE, "out_channels": 2 * IN, "latent": 4},
    "joint": {"size": SIZE},
    "centre": {"size": SIZE},
    "centre blocks": {"size": SIZE},
    "grouped": {"size": SIZE, "groups": 2, "blocks": 2, "in_channels": IN, "out_channels": OUT},
    "linear": {},
    "linear rows": {"size": (2, 3)},
    "apply": {"size": SIZE},
    "apply on a latent": {"size": SIZE},
}
# Torch runs part of these as a convolution of its own, whose workspace it chooses.
WITH_CONVOLUTION = ("joint", "centre", "centre blocks", "grouped")


def forbidden(case: Case) -> set[int]:
    """Sizes of a per-sample weight: of the whole kernel, of one tap, of one group."""
    if case.function == "dcd_apply":
        return {BATCH * OUT * IN}
    weight = case.tensors["weight"]
    if case.form.startswith("depthwise"):
        return {BATCH * weight.numel()}
    out_channels, in_group, *kernel = weight.shape
    one_tap = BATCH * out_channels * in_group
    return {one_tap, one_tap * math.prod(kernel), BATCH * OUT * IN, BATCH * OUT * IN * math.prod(kernel)}


class Tensors(TorchDispatchMode):
    """Elements of every tensor that any op returns."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes += [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


class Allocations:
    """Elements (of four bytes) of every allocation from torch's CPU allocator, those inside of ops too."""

    def __init__(self):
        self.sizes: list[int] = []

    def __enter__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        events = list(self.profile.profiler.kineto_results.experimental_event_tree())
        while events:
            event = events.pop()
            events += event.children
            kind, fields = event.typed
            if kind == torch._C._profiler._EventType.Allocation and fields.alloc_size > 0:
                self.sizes.append(fields.alloc_size // 4)


def forward_backward(case: Case, module) -> None:
    output = case.run(module)
    torch.autograd.grad(output, [t for t in case.leaves() if t.requires_grad], torch.ones_like(output))


def watched(case: Case, module, detector):
    forward_backward(case, module)  # what is made once, such as a thread's working memory, is made now
    with detector() as found:
        forward_backward(case, module)
    assert found.sizes
    return found.sizes


class Materialised:
    """The version to catch: per-sample weights and a grouped convolution."""

    @staticmethod
    def dcd_conv2d(input, weight, p, phi, q, *, r=None, lam, bias, residual, stride, padding, dilation,
                   groups, activation):  # fmt: skip
        per_sample = dcd.reference.dcd_weight(weight, p, phi, q, r=r, lam=lam, groups=groups)
        stacked = per_sample.flatten(0, 1)
        merged = input.reshape(1, -1, *input.shape[2:])
        output = F.conv2d(merged, stacked, None, stride, padding, dilation, groups * len(input))
        return output.reshape(len(input), -1, *output.shape[2:])


def a_case(form: str, layout: str = "contiguous") -> Case:
    return make_case(form, **{**SHAPES, **FORMS[form]}, layout=layout, requires_grad=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_shapes_tell(form):
    case = a_case(form)
    output = case.run(dcd.reference)
    assert not forbidden(case) & {t.numel() for t in (*case.leaves(), output)}


@pytest.mark.parametrize("detector", (Tensors, Allocations))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("form", FORMS)
def test_no_per_sample_weight(form, layout, detector, backend):
    case = a_case(form, layout)
    sizes = watched(case, dcd, detector)
    assert not forbidden(case) & set(sizes)
    if backend == "cpu" and form not in WITH_CONVOLUTION:
        assert max(sizes) < min(forbidden(case))


@pytest.mark.parametrize("activation", ("relu", "silu", "hardswish"))
@pytest.mark.parametrize("form", ("pointwise", "depthwise", "apply"))
def test_no_per_sample_weight_behind_an_activation(form, activation):
    case = a_case(form)
    case.options["activation"] = activation
    with dcd.use_backend("cpu"):
        assert max(watched(case, dcd, Allocations)) < min(forbidden(case))


@pytest.mark.parametrize("form", ("pointwise", "depthwise", "apply"))
def test_no_per_sample_weight_in_second_order(form):
    case = a_case(form)
    with dcd.use_backend("cpu"), Allocations() as found:
        gradients = torch.autograd.grad(case.run(dcd).square().sum(), case.leaves(), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in gradients), case.leaves())
    assert not forbidden(case) & set(found.sizes)


def test_allocations_inside_of_an_op_are_seen():
    """The kernels compute float16 in float32: that copy of the input exists nowhere outside of the op."""
    case = a_case("pointwise").converted(torch.float16)
    with dcd.use_backend("cpu"), Allocations() as found:
        case.run(dcd)
    assert case.tensors["input"].numel() in found.sizes


@pytest.mark.parametrize("detector", (Tensors, Allocations))
@pytest.mark.parametrize("form", ("pointwise", "blocks", "depthwise", "joint", "centre"))
def test_the_detectors_detect(form, detector):
    case = a_case(form)
    assert forbidden(case) & set(watched(case, Materialised, detector))


# --- the memory of the process

# Working memory of the kernels does not come from torch's allocator, but from the process all the same. The
# peak of a process never falls, so the version that allocates comes last. 16 x 768 x 768 floats are 38 MB and
# 16 x 8192 x 49 are 26 MB, far more than the tensors of these layers.
PROCESS = """
import json
import torch
import torch.nn.functional as F
import dcd_kernels as dcd

def leaf(*shape):
    return torch.randn(shape, requires_grad=True)

def factors(batch, channels, latent, rows):
    return leaf(channels, latent), leaf(batch, latent, latent), leaf(rows, latent)

def peak():
    # not getrusage: its peak goes on from that of the process which started this one
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith('VmHWM'))

torch.set_num_threads(2)
dcd.use_backend('cpu')
batch, channels = 16, 768
p, phi, q = factors(batch, channels, 8, channels)
lam, weight, input = leaf(batch, channels), leaf(channels, channels, 1, 1), leaf(batch, channels, 2, 2)
many = 8192
stencils, deep = factors(batch, many, 8, 49), leaf(batch, many, 2, 2)
scales, kernels = leaf(batch, many), leaf(many, 1, 7, 7)

def materialised():
    weights = dcd.reference.dcd_weight(weight, p, phi, q, lam=lam).flatten(0, 1)
    return F.conv2d(input.reshape(1, -1, 2, 2), weights, groups=batch)

def depthwise():
    return dcd.dcd_conv2d(deep, kernels, *stencils[:2], r=stencils[2], lam=scales, padding=3, groups=many)

calls = {
    'pointwise': lambda: dcd.dcd_conv2d(input, weight, p, phi, q, lam=lam),
    'channels_last': lambda: dcd.dcd_conv2d(
        input.to(memory_format=torch.channels_last), weight, p, phi, q, lam=lam),
    'linear': lambda: dcd.dcd_linear(input[:, :, 0, 0], weight[:, :, 0, 0], p, phi, q, lam=lam),
    'apply': lambda: dcd.dcd_apply(input, input, p, phi, q, lam=lam),
    'depthwise': depthwise,
    'materialised': materialised,
}
# Code, threads and caches come with the first call of anything: here a small one.
small = leaf(8, 8, 2, 2), leaf(8, 8, 1, 1), *factors(8, 8, 2, 8)
dcd.dcd_conv2d(*small).sum().backward()
grown, before = {}, peak()
for name, call in calls.items():
    call().sum().backward()
    grown[name], before = peak() - before, peak()
print(json.dumps(grown))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_process_does_not_grow_by_them():
    run = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    grown = json.loads(run.stdout.splitlines()[-1])
    half = 16 * 768 * 768 * 4 // 2
    assert grown.pop("materialised") > half
    assert grown.pop("depthwise") < 16 * 8192 * 49 * 4 // 2
    assert max(grown.values()) < half, grown
