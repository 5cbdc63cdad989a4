# SPDX-License-Identifier: BSD-3-Clause
"""Accelerated modules whose weights, children or attributes change afterwards: what is there now counts."""

import copy
import types

import pytest
import torch
import zoo
import zoo_variants as wild
from families import draw, make, randomise
from torch import nn
from torch.nn.utils import parametrize, prune
from twins import accelerated, assert_equal, run
from zoo_variants import Plain

import dcd_kernels as dcd

CO, CI, L = 12, 16, 4  # of ConvDY(16, 12)


def released():
    return randomise(zoo.ConvDY(CI, CO, 3, 1, 1)).double()


def assert_follows(change, module=None, drawn=None, taken=1):
    """``change`` on a module that was accelerated and has run; the same in training and in eval after it."""
    module = module or released()
    drawn = drawn or draw((CI, 5, 6))
    models = accelerated(module, taken), module
    for training in (True, False):
        mine, right = (run(model.train(training), drawn) for model in models)
        assert_equal(mine, right)
    before = right
    for model in models:
        torch.manual_seed(5)
        change(model)
    for training in (False, True):
        mine, right = (run(model.train(training), drawn) for model in models)
        assert_equal(mine, right)
        effect = training or not torch.equal(before["output 0"], right["output 0"])
        assert effect, "the change has no effect"


def edited(name):
    def change(module):
        with torch.no_grad():
            module.get_parameter(name).mul_(-0.5).add_(0.1)

    return change


def replaced(name):
    def change(module):
        path, _, attribute = name.rpartition(".")
        parameter = module.get_parameter(name)
        setattr(module.get_submodule(path), attribute, nn.Parameter(torch.randn_like(parameter)))

    return change


def by_data(name):
    def change(module):
        module.get_parameter(name).data = torch.randn_like(module.get_parameter(name))

    return change


def transposed(name):
    """Not contiguous."""

    def change(module):
        path, _, attribute = name.rpartition(".")
        shape = module.get_parameter(name).shape
        values = torch.randn(shape[::-1], dtype=torch.float64).permute(*range(len(shape))[::-1])
        setattr(module.get_submodule(path), attribute, nn.Parameter(values))

    return change


PARAMETERS = [name for name, _ in zoo.ConvDY(16, 12).named_parameters()]


@pytest.mark.parametrize("how", [edited, replaced, by_data, transposed])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name, how):
    assert_follows(how(name))


@pytest.mark.parametrize(
    "name", ["bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var"]
)
def test_statistics(name):
    module = released().eval()
    twin = accelerated(module)
    for model in (twin, module):
        run(model, draw((CI, 5, 6)))
        model.get_buffer(name).mul_(1.5).add_(0.2)
    assert_equal(run(twin, draw((CI, 5, 6))), run(module, draw((CI, 5, 6))))


def test_load_state_dict():
    other = randomise(zoo.ConvDY(CI, CO, 3, 1, 1), seed=9).double()
    assert_follows(lambda module: module.load_state_dict(other.state_dict()))
    assert_follows(lambda module: module.load_state_dict(copy.deepcopy(other.state_dict()), assign=True))


def test_an_optimiser_that_was_made_before():
    module = released().train()
    optimisers = []
    twin = copy.deepcopy(module)
    for model in (twin, module):
        optimisers.append(torch.optim.Adam(model.parameters(), lr=0.1))
    dcd.accelerate(twin)
    for model, optimiser in zip((twin, module), optimisers, strict=True):
        for seed in range(3):
            optimiser.zero_grad()
            model(*draw((CI, 5, 6), seed=seed)).square().mean().backward()
            optimiser.step()
    assert_equal(twin.state_dict(), module.state_dict(), 1e-7)  # Adam divides by what may be rounding


@pytest.mark.parametrize("name", ["conv", "q", "p", "fc_phi", "fc_scale", "fc.0"])
def test_pruned(name):
    def change(module):
        prune.random_unstructured(module.get_submodule(name), "weight", 0.5)

    assert_follows(change)

    def and_made_permanent(module):
        change(module)
        prune.remove(module.get_submodule(name), "weight")

    assert_follows(and_made_permanent)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.flip(0)


@pytest.mark.parametrize("name", ["conv", "q", "p", "fc_phi", "bn1", "bn2"])
def test_parametrised(name):
    def change(module):
        parametrize.register_parametrization(module.get_submodule(name), "weight", Symmetric())

    assert_follows(change)


@pytest.mark.parametrize("name", ["conv", "q", "p", "fc_phi", "bn1"])
def test_a_weight_is_read_once_a_call(name):
    """A parametrisation may be costly, draw random numbers, or count."""
    reads = []

    class Counting(nn.Module):
        def forward(self, weight):
            reads.append(name)
            return weight.clone()

    for training in (True, False):
        model = accelerated(randomise(zoo.ConvDY(CI, CO)).double().train(training))
        parametrize.register_parametrization(model.get_submodule(name), "weight", Counting())
        reads.clear()
        model(*draw((CI, 5, 6)))
        assert len(reads) == 1


@pytest.mark.parametrize("name", ["conv", "q", "p"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_spectral_norm(name, when):
    """Its power iteration moves on with every read of the weight in training: one read a step."""
    module = released().train()
    if when == "before":
        nn.utils.parametrizations.spectral_norm(module.get_submodule(name))
    twin = accelerated(module, taken=None)
    if when == "after":
        for model in (module, twin):
            torch.manual_seed(0)
            nn.utils.parametrizations.spectral_norm(model.get_submodule(name))
    for seed in range(3):
        assert_equal(run(twin, draw((CI, 5, 6), seed=seed)), run(module, draw((CI, 5, 6), seed=seed)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", ["conv", "q", "p"])
def test_weight_norm(name):
    """The old kind, a forward_pre_hook, and the new kind, a parametrisation."""

    def old(module):
        nn.utils.weight_norm(module.get_submodule(name))
        edited(f"{name}.weight_g")(module)

    def new(module):
        nn.utils.parametrizations.weight_norm(module.get_submodule(name))
        edited(f"{name}.parametrizations.weight.original0")(module)

    assert_follows(old)
    assert_follows(new)


CONVOLUTIONS = {
    "1×1": lambda: nn.Conv2d(CI, CO, 1),
    "5×5": lambda: nn.Conv2d(CI, CO, 5, padding=2, bias=False),
    "dilated": lambda: nn.Conv2d(CI, CO, 3, padding=3, dilation=3),
    "grouped": lambda: nn.Conv2d(CI, CO, 3, padding=1, groups=4),
    "reflecting": lambda: nn.Conv2d(CI, CO, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(CI, CO, 3, padding="same"),
    "valid and padded": lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(CI, CO, 3, padding="valid")),
    "Sequential with BatchNorm": lambda: nn.Sequential(
        nn.Conv2d(CI, CO, 3, padding=1, bias=False), nn.BatchNorm2d(CO), nn.ReLU()
    ),
    "two branches": lambda: wild.Sum(nn.Conv2d(CI, CO, 3, padding=1), nn.Conv2d(CI, CO, 1)),
    "subclass": lambda: wild.Standardised(CI, CO, 3, padding=1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_another_inner_convolution(name):
    """As by re-parameterisation after training."""

    def change(module):
        module.conv = randomise(CONVOLUTIONS[name](), seed=4).double().train(module.training)

    assert_follows(change)
    assert_follows(change, randomise(zoo.ConvDY(CI, CO)).double())


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_inner_convolution_of_any_kind_from_the_start(name):
    for training in (True, False):
        module = zoo.ConvDY(CI, CO, 3, 1, 1)
        module.conv = CONVOLUTIONS[name]()
        module = randomise(module).double().train(training)
        assert_equal(run(accelerated(module), draw((CI, 5, 6))), run(module, draw((CI, 5, 6))))


def with_child(name, make_child):
    def change(module):
        path, _, attribute = name.rpartition(".")
        child = randomise(make_child(), seed=6).double().train(module.training)
        setattr(module.get_submodule(path), attribute, child)

    return change


class TwiceConv(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class TwiceNorm(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Doubled(nn.Sequential):
    def forward(self, input):
        return 2 * super().forward(input)


CHILDREN = {
    "q with a bias": ("q", lambda: nn.Conv2d(CI, L, 1)),
    "q in a Sequential": ("q", lambda: nn.Sequential(nn.Conv2d(CI, L, 1), nn.Tanh())),
    "q 3×3": ("q", lambda: nn.Conv2d(CI, L, 3, padding=1)),
    "q in groups": ("q", lambda: nn.Conv2d(CI, L, 1, groups=2)),
    "q with a padding that reflects": ("q", lambda: nn.Conv2d(CI, L, 3, padding=1, padding_mode="reflect")),
    "q of a subclass": ("q", lambda: TwiceConv(CI, L, 1)),
    "p of a subclass": ("p", lambda: TwiceConv(L, CO, 1)),
    "p in groups": ("p", lambda: nn.Conv2d(L, CO, 1, groups=2)),
    "p with a bias": ("p", lambda: nn.Conv2d(L, CO, 1)),
    "p 3×3": ("p", lambda: nn.Conv2d(L, CO, 3, padding=1)),
    "bn1 GroupNorm": ("bn1", lambda: nn.GroupNorm(2, L)),
    "bn1 Identity": ("bn1", nn.Identity),
    "bn1 InstanceNorm": ("bn1", lambda: nn.InstanceNorm2d(L, affine=True)),
    "bn1 of a subclass": ("bn1", lambda: TwiceNorm(L)),
    "bn2 GroupNorm": ("bn2", lambda: nn.GroupNorm(1, L)),
    "bn2 Identity": ("bn2", nn.Identity),
    "bn2 an activation": ("bn2", nn.Tanh),
    "bn2 InstanceNorm": ("bn2", lambda: nn.InstanceNorm1d(L)),
    "bn2 SyncBatchNorm": ("bn2", lambda: nn.SyncBatchNorm(L)),
    "fc longer": ("fc", lambda: nn.Sequential(nn.Linear(CI, 2), nn.Linear(2, 1), nn.Tanh())),
    "fc shorter": ("fc", lambda: nn.Sequential(nn.Linear(CI, 1))),
    "fc of a subclass": ("fc", lambda: Doubled(nn.Linear(CI, 1), zoo.Gate(1))),
    "fc a module": ("fc", lambda: nn.Linear(CI, 1)),
    "fc.1 another gate": ("fc.1", nn.Sigmoid),
    "fc_phi deeper": ("fc_phi", lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, L * L))),
    "another λ": ("hs", nn.Softplus),
    "another pooling": ("avg_pool", lambda: nn.AdaptiveMaxPool2d(1)),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_another_child(name):
    assert_follows(with_child(*CHILDREN[name]))


def test_another_stride_or_padding_of_a_child():
    def change(module):
        module.q.stride = module.conv.stride = (2, 2)

    assert_follows(change)

    def pad(module):
        module.q.padding, module.conv.padding = (1, 1), (2, 2)

    assert_follows(pad)


def test_strides_that_differ_and_sizes_that_agree():
    """On a 4×4 map stride 2 takes pixels 0 and 2, stride 3 takes 0 and 3."""

    def change(module):
        module.q.stride = (3, 3)

    assert_follows(change, randomise(zoo.ConvDY(CI, CO, 1, 2)).double(), draw((CI, 4, 4)))


def test_a_sequential_that_grows():
    def change(module):
        module.fc.append(nn.Tanh())

    assert_follows(change)


def test_a_list_of_layers_that_grows():
    class Listed(zoo.ConvDY):
        def __init__(self):
            super().__init__(CI, CO, 3, 1, 1)
            self.more = nn.ModuleList([nn.Tanh()])

        def forward(self, x):
            b, c, _, _ = x.size()
            y = self.fc(self.avg_pool(x).view(b, c))
            for layer in self.more:
                y = layer(y)
            phi = self.fc_phi(y).view(b, self.dim, self.dim)
            r = self.conv(x) * self.hs(self.fc_scale(y)).view(b, -1, 1, 1)
            out = self.bn1(self.q(x))
            flat = out.view(b, self.dim, -1)
            flat = self.bn2(torch.matmul(phi, flat)) + flat
            return self.p(flat.view(out.size())) + r

    assert_follows(lambda module: module.more.append(nn.Sigmoid()), randomise(Listed()).double())


def test_a_larger_latent():
    """q, p, norms and fc_phi replaced together; forward reads the size of q."""

    def change(module):
        for name, child in {
            "b": nn.Conv2d(10, 7, 1),
            "c": nn.Conv2d(7, 12, 1),
            "f": nn.BatchNorm1d(7),
            "g": nn.BatchNorm1d(7),
            "e": nn.Linear(10, 49),
        }.items():
            with_child(name, lambda child=child: child)(module)

    assert_follows(change, make("Einsum"), draw((10, 5, 6)))


def test_a_low_rank_adapter_on_a_projection():
    """An instance's own forward on q, p or the static convolution, as adapters set it."""
    for name in ("q", "p", "conv"):

        def change(module, name=name):
            child = module.get_submodule(name)
            own = child.forward
            child.forward = lambda x: 1.5 * own(x)

        assert_follows(change)
    assert_follows(change, randomise(zoo.ConvDY(CI, CO)).double())  # a static layer that is fused


def test_a_forward_set_on_the_instance():
    """After accelerate somebody's own forward wins; ``restore`` does not take it away."""

    def doubled(self, x):
        return 2 * type(self).forward(self, x)

    def change(module):
        module.forward = types.MethodType(doubled, module)

    assert_follows(change)
    module = released()
    change(module)
    mine = module.forward
    dcd.restore(dcd.accelerate(module))
    assert module.forward == mine


class Tempered(Plain):
    """Φ divided by attributes of every kind; ``shift`` may be a parameter, ``drop`` a module, or None."""

    threshold = 0.0

    def __init__(self):
        super().__init__(CI, CO, 4)
        self.temperature = 2.0
        self.options = {"temperature": 2.0}
        self.config = types.SimpleNamespace(temperature=2.0)
        self.ranges = [1.0, 2.0]
        self.register_buffer("scale_of_phi", torch.tensor(2.0))
        self.register_parameter("shift", None)
        self.drop = None
        self.function = torch.tanh
        self.constant = torch.tensor(2.0)

    @property
    def schedule(self):
        return self.config.temperature + 1

    def forward(self, x):
        n = x.shape[0]
        context = self.gate(self.squeeze(self.summary(x).flatten(1)))
        logits = self.to_mixture(context) / self.temperature / self.options["temperature"]
        logits = logits / self.config.temperature / self.ranges[1] / self.scale_of_phi + self.threshold
        logits = self.function(logits) * self.constant * self.schedule
        if self.shift is not None:
            logits = logits + self.shift
        if self.drop is not None:
            logits = self.drop(logits)
        if self.squeeze.bias is not None:
            logits = 2 * logits
        mixture = logits.reshape(n, self.latent, self.latent)
        scale = self.scale(self.to_scale(context)).reshape(n, -1, 1, 1)
        z = self.norm1(self.down(x))
        flat = z.flatten(2)
        mixed = self.norm2(torch.bmm(mixture, flat)) + flat
        return self.up(mixed.reshape(z.shape)) + self.static(x) * scale


CHANGES = {
    "a number": lambda m: setattr(m, "temperature", 0.5),
    "a number that becomes a tensor": lambda m: setattr(m, "temperature", torch.tensor(0.5)),
    "a dictionary's entry": lambda m: m.options.update(temperature=0.5),
    "an object's attribute": lambda m: setattr(m.config, "temperature", 0.5),
    "another object": lambda m: setattr(m, "config", types.SimpleNamespace(temperature=0.5)),
    "a list's entry": lambda m: m.ranges.__setitem__(1, 0.5),
    "a tensor's value": lambda m: m.constant.fill_(0.5),
    "another tensor": lambda m: setattr(m, "constant", torch.tensor(0.5)),
    "a buffer": lambda m: m.scale_of_phi.fill_(0.5),
    "another buffer": lambda m: setattr(m, "scale_of_phi", torch.tensor(0.5)),
    "a parameter where there was none": lambda m: setattr(m, "shift", nn.Parameter(torch.ones(1).double())),
    "a module where there was none": lambda m: setattr(m, "drop", nn.Tanh()),
    "a child's bias": lambda m: setattr(m.squeeze, "bias", nn.Parameter(torch.ones(8).double())),
    "a function": lambda m: setattr(m, "function", torch.sigmoid),
    "an attribute that hides the class's": lambda m: setattr(m, "threshold", 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_attribute_that_forward_reads(name):
    """Annealed temperatures and the like: a number, or whatever it is kept in."""
    assert_follows(CHANGES[name], randomise(Tempered()).double(), taken=None)


def test_the_plain_attributes_are_no_hindrance():
    class Annealed(wild.Trace):
        def __init__(self):
            super().__init__(CI, CO, 4)
            self.temperature = 30.0

        def forward(self, x):
            b, _, _ = x.size()
            y = self.fc(x.mean(-1))
            phi = torch.softmax(self.fc_phi(y).view(b, -1, self.q.out_channels) / self.temperature, -1)
            out = self.bn1(self.q(x))
            return self.p(self.bn2(phi @ out) + out) + self.conv(x) * self.fc_scale(y).unsqueeze(-1)

    assert_follows(
        lambda m: setattr(m, "temperature", 1.0), randomise(Annealed()).double(), draw((CI, 9)), taken=1
    )


def test_an_attribute_of_the_class():
    module = randomise(Tempered()).double().eval()
    twin = accelerated(module, taken=None)
    drawn = draw((CI, 5, 6))
    assert_equal(run(twin, drawn), run(module, drawn))
    try:
        Tempered.threshold = 0.5
        assert_equal(run(twin, drawn), run(module, drawn))
    finally:
        Tempered.threshold = 0.0
