# SPDX-License-Identifier: BSD-3-Clause
"""The op `network` itself: its schema, and programs, constants and inputs that nobody should write."""

import random

import graphs
import pytest
import torch
from cases import SEED
from graphs import chain, conv, dcd, deep, norm
from operands import threads
from runs import image, randomise
from torch import nn

import dcd_kernels
from dcd_kernels import _core
from dcd_kernels.models import released

network = torch.ops.dcd_kernels.network.default
LAYOUT = _core.network_layout()
HEADER = 4


def everything():
    """A network with every kind of step."""
    return graphs.Net(
        lambda s, x: s.tail(torch.relu(s.deep(torch.relu(s.wide(s.pool(s.stem(x))))) + s.pool(s.stem(x)))),
        stem=chain(conv(3, 18), norm(18), nn.ReLU6()),
        pool=nn.MaxPool2d(3, 2, 1),
        wide=dcd(18, 18, 3, latent_channels=3, pool_size=2),
        deep=dcd(18, 18, 3, groups=18, latent_kernel=2),
        tail=chain(
            released.BasicConv(18, 20),
            dcd(20, 34, blocks=2, latent_channels=3),
            dcd(34, 10, 2, padding=0, joint=True, latent_channels=2, latent_kernel=4),
            conv(10, 33, 1),
            dcd(33, 33, 3, latent_channels=2),
            deep(33),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            dcd_kernels.nn.DCDLinear(33, 9, latent_channels=2, squeeze_channels=3),
            nn.Linear(9, 5),
        ),
    )


class Call:
    """The arguments of the op for a network, which a test may change."""

    def __init__(self, module, *shape, dtype=torch.float32):
        part = dcd_kernels.optimize_for_inference(randomise(module).to(dtype)).plan.whole
        assert part is not None
        self.inputs = [image(*shape).to(dtype)]
        # what lies behind the constants is NaN
        room = torch.full((part.constants.numel() + 4096,), float("nan"))
        self.constants = room[: part.constants.numel()].copy_(part.constants)
        self.program = part.program.clone()

    @property
    def counts(self):
        return self.program[:HEADER].tolist()

    def value(self, number, field):
        """Where this field of a value is in the program."""
        return HEADER + number * len(LAYOUT["value"]) + LAYOUT["value"].index(field)

    def step(self, number, field):
        values = self.counts[0] * len(LAYOUT["value"])
        return HEADER + values + number * len(LAYOUT["step"]) + LAYOUT["step"].index(field)

    def find(self, kind):
        """The steps of a kind."""
        code = list(LAYOUT["kinds"]).index(kind)
        return [i for i in range(self.counts[1]) if self.program[self.step(i, "kind")] == code]

    def __call__(self):
        return network(self.inputs, self.constants, self.program)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def made(request):
    torch.manual_seed(3)
    return Call(everything(), 2, 3, 21, 18, dtype=request.param)


@pytest.fixture
def call(made):
    """A fresh copy of its program."""
    twin = Call.__new__(Call)
    twin.inputs, twin.constants, twin.program = list(made.inputs), made.constants, made.program.clone()
    return twin


def test_every_kind_is_there(call):
    missing = [kind for kind in LAYOUT["kinds"] if not call.find(kind)]
    assert set(missing) <= {"pool", "import"}, missing


def test_schema(call):
    torch.library.opcheck(network, (call.inputs, call.constants, call.program), test_utils="test_schema")


def test_same_bits(call):
    for count in (1, 2):
        with threads(count):
            assert torch.equal(call()[0], call()[0])


def test_slots(call):
    kinds, uses = {}, {}
    for number in range(call.counts[0]):
        slot, vector = (int(call.program[call.value(number, name)]) for name in ("slot", "vector"))
        if slot >= 0:
            kinds.setdefault(slot, set()).add(vector)
            uses[slot] = uses.get(slot, 0) + 1
    assert set(kinds) == set(range(call.counts[2]))
    assert all(len(kind) == 1 for kind in kinds.values()), "a vector keeps a place as large as an image"
    assert sorted({next(iter(kinds[slot])) for slot, count in uses.items() if count > 1}) == [0, 1]


@pytest.mark.parametrize(
    ("name", "bad"),
    {
        "constants of another dtype": ("constants", lambda c: c.double()),
        "constants that are not contiguous": ("constants", lambda c: torch.stack([c, c], 1)[:, 0]),
        "no constants": ("constants", lambda c: c[:0]),
        "one constant less": ("constants", lambda c: c[: -(c.numel() // 3)]),
        "program of another dtype": ("program", lambda p: p.int()),
        "program in two dimensions": ("program", lambda p: p[None]),
        "program too short": ("program", lambda p: p[:-1]),
        "program too long": ("program", lambda p: torch.cat([p, p[:1]])),
        "empty program": ("program", lambda p: p[:0]),
        "program for another dtype": ("program", lambda p: torch.cat([p[:3], 1 - p[3:4], p[4:]])),
        "program that is not contiguous": ("program", lambda p: torch.stack([p, p], 1)[:, 0]),
        "no inputs": ("inputs", lambda x: []),
        "input of another dtype": ("inputs", lambda x: [x[0].double()]),
        "input of the other dtype": (
            "inputs",
            lambda x: [x[0].to(torch.float32 if x[0].dtype is torch.bfloat16 else torch.bfloat16)],
        ),
        "input with five dimensions": ("inputs", lambda x: [x[0][None]]),
        "input without channels": ("inputs", lambda x: [x[0][:, :0]]),
        "input with other channels": ("inputs", lambda x: [x[0][:, :2]]),
        "input without rows": ("inputs", lambda x: [x[0][:, :, :0]]),
        "inputs of two batches": ("inputs", lambda x: [x[0], x[0][:1]]),
        "a vector": ("inputs", lambda x: [x[0][0]]),
    }.values(),
)
def test_bad_arguments(call, name, bad):
    setattr(call, name, bad(getattr(call, name)))
    with pytest.raises(RuntimeError, match=r"constants|program|input"):
        call()


BAD = (-(2**63), -(2**40), -2, -1, 0, 1, 3, 17, 2**20, 2**31, 2**40, 2**62, 2**63 - 1)


def test_no_number_of_a_program_is_trusted(call):
    """Whatever one number is: an error, or a result without what lies outside of the memory it is for."""
    right = call()[0]
    assert right.isfinite().all()
    errors = 0
    for place in range(len(call.program)):
        before = call.program[place].item()
        for bad in (*BAD, before + 1, before - 1):
            if bad == before:
                continue
            call.program[place] = bad
            try:
                outputs = call()
            except RuntimeError:
                errors += 1
            else:
                assert all(output.shape[0] == 2 for output in outputs), (place, bad)
        call.program[place] = before
    assert torch.equal(call()[0], right)
    assert errors > 5 * len(call.program)


def test_random_programs(call):
    """Several wrong numbers at once, from small ones, which pass the most checks."""
    source = random.Random(SEED)
    right = call.program.clone()
    for _ in range(3000):
        call.program.copy_(right)
        for _ in range(source.randrange(1, 5)):
            other = source.randrange(HEADER, len(right))
            bad = source.choice((-1, 0, 1, 2, 3, 16, 18, 33, 48, right[other].item()))
            call.program[source.randrange(HEADER, len(right))] = bad
        try:
            call()
        except RuntimeError as error:
            assert str(error)


def test_constants_end_where_they_end(call):
    """Every offset one plane further than the last constant raises."""
    names = (
        "weight",
        "bias",
        "static_bias",
        "p",
        "q",
        "latent_bias",
        "r",
        "squeeze",
        "gate",
        "expand",
        "expand_bias",
    )
    tried = 0
    for step in range(call.counts[1]):
        for name in names:
            place = call.step(step, name)
            before = call.program[place].item()
            if before < 0:
                continue
            call.program[place] = call.constants.numel() - 15
            with pytest.raises(
                RuntimeError, match=rf"{name} of step {step} must be \d+ of the \d+ constants"
            ):
                call()
            call.program[place] = before
            tried += 1
    assert tried > 30


SENSE = {
    "a value made twice": ("dense", "output", lambda call, step: call.program[call.step(0, "output")]),
    "a value of later": (
        "dense",
        "input",
        lambda call, step: call.program[call.step(call.counts[1] - 2, "output")],
    ),
    "another latent": ("dense", "latent", lambda call, step: 40),
    "some of λ": ("dense", "lam_channels", lambda call, step: 16),
    "blocks of a joint residual": ("joint", "blocks", lambda call, step: 2),
    "a longer latent kernel": ("joint", "latent_kernel", lambda call, step: 5),
    "blocks that do not divide": ("blocks", "blocks", lambda call, step: 3),
    "no blocks": ("blocks", "blocks", lambda call, step: 0),
    "a latent bias of blocks": ("blocks", "latent_bias", lambda call, step: 0),
    "more padding than halo": ("dense", "padding_h", lambda call, step: 3),
    "a stride of nothing": ("depthwise", "stride_w", lambda call, step: 0),
    "a kernel too high": ("depthwise", "kernel_h", lambda call, step: 17),
    "more channels than the input": ("depthwise", "out_channels", lambda call, step: 49),
    "an unknown activation": ("linear", "activation", lambda call, step: 5),
    "an unknown gate": ("branch", "gate_code", lambda call, step: 6),
    "more hidden units": ("branch", "hidden", lambda call, step: 2000),
    "a sum for a stem": ("stem", "skip", lambda call, step: 0),
    "an output of three dimensions": ("export", "rank", lambda call, step: 3),
    "an output of no dimension": ("export", "rank", lambda call, step: 0),
    "an output out of turn": ("export", "tensor", lambda call, step: 1),
}


@pytest.mark.parametrize("what", SENSE)
def test_programs_without_sense(call, what):
    kind, field, bad = SENSE[what]
    found = call.find("dense" if kind in ("blocks", "joint") else kind)
    if kind == "blocks":
        found = [step for step in found if call.program[call.step(step, "blocks")] > 1]
    if kind == "joint":
        found = [step for step in found if call.program[call.step(step, "latent_kernel")] > 0]
    step = found[-1]
    call.program[call.step(step, field)] = bad(call, step)
    with pytest.raises(RuntimeError, match=r"program"):
        call()


def test_huge_images_are_refused():
    """An expanded tensor has any size without having memory."""
    call = Call(chain(conv(3, 8), nn.ReLU()), 1, 3, 8, 8)
    call.inputs = [torch.zeros(1, 1, 1, 1).expand(1, 3, 2**25, 2**25)]
    with pytest.raises(RuntimeError, match="inputs are too large"):
        call()
    call.inputs = [torch.zeros(1, 1, 1, 1).expand(2**50, 3, 8, 8)]
    with pytest.raises(RuntimeError, match="inputs are too large"):
        call()
