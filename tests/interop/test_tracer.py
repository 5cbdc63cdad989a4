# SPDX-License-Identifier: BSD-3-Clause
"""Tracing in one thread while others call modules, and trace: torch.fx patches nn.Module for all of them."""

import threading

import pytest
import torch
from torch import nn

from dcd_kernels.inference import capture
from dcd_kernels.interop import trace
from dcd_kernels.interop.tracer import ThreadTracer

TRACERS = {"inference": lambda: capture._Tracer(set()), "interop": lambda: trace._Tracer({})}
CALL, GETATTR = nn.Module.__call__, nn.Module.__getattr__


class Waiting(nn.Module):
    """A forward that is in the middle of being traced until it may go on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.begun, self.go = threading.Event(), threading.Event()

    def forward(self, input):
        self.begun.set()
        assert self.go.wait(60)
        return self.layer(input)


def started(function, *arguments):
    """In a thread; the list gets its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    return thread, results


@pytest.mark.parametrize("make", TRACERS.values(), ids=TRACERS)
def test_others_call_modules_meanwhile(make):
    waiting, other, x = Waiting(), nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.randn(4, 3)
    expected, weight = other(x), other[0].weight
    thread, graphs = started(make().trace, waiting)
    try:
        assert waiting.begun.wait(60)
        assert nn.Module.__call__ is not CALL, "torch.fx patches no more: the tracer is needless"
        assert torch.equal(other(x), expected)
        assert other[0].weight is weight
    finally:
        waiting.go.set()
        thread.join()
    assert [node.op for node in graphs[0].nodes] == ["placeholder", "call_module", "output"]


@pytest.mark.parametrize("make", TRACERS.values(), ids=TRACERS)
def test_one_traces_at_a_time(make):
    first, second = Waiting(), Waiting()
    second.go.set()
    one, _ = started(make().trace, first)
    assert first.begun.wait(60)
    two, graphs = started(make().trace, second)
    began = second.begun.wait(0.2)
    first.go.set()
    one.join(), two.join()
    assert not began
    assert len(graphs[0].nodes) == 3
    assert nn.Module.__call__ is CALL and nn.Module.__getattr__ is GETATTR


def test_a_trace_within_a_trace():
    """As finding out a length, or why a forward cannot be followed, takes."""

    class Outer(nn.Module):
        def forward(self, input):
            ThreadTracer().trace(nn.ReLU())
            return input + 1

    assert len(ThreadTracer().trace(Outer()).nodes) == 3
    assert nn.Module.__call__ is CALL
