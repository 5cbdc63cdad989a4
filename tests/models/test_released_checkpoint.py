# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints into the released form: what loads, and what is said of one that does not."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dcd_kernels.models import released


def checkpoint_of(model, prefix=""):
    """As the released training loop writes it."""
    state = {prefix + key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1).state_dict()
    return {"epoch": 3, "arch": "a_network", "state_dict": state, "best_prec1": 75.2, "optimizer": optimizer}


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(1)
    model = released.resnet10(5)
    # one step, so that the statistics of the norms are somebody's too
    model(torch.randn(2, 3, 32, 32))
    return model


def assert_same(model, wanted):
    ours, theirs = model.state_dict(), wanted.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_of_training(trained, tmp_path, prefix, legacy):
    path = tmp_path / "best.pth.tar"
    torch.save(checkpoint_of(trained, prefix), path, _use_new_zipfile_serialization=not legacy)
    fresh = released.resnet10(5)
    assert not torch.equal(fresh.conv1.weight, trained.conv1.weight)
    assert released.load_checkpoint(fresh, path) is fresh
    assert_same(fresh, trained)
    assert_same(released.load_checkpoint(released.resnet10(5), str(path)), trained)
    with open(path, "rb") as file:
        assert_same(released.load_checkpoint(released.resnet10(5), file), trained)


def test_bare_states(trained):
    state = nn.DataParallel(trained).state_dict()
    assert all(key.startswith("module.") for key in state)
    before = dict(state)
    assert_same(released.load_checkpoint(released.resnet10(5), state), trained)
    assert state.keys() == before.keys()
    assert_same(released.load_checkpoint(released.resnet10(5), trained.state_dict()), trained)
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    loaded = released.load_checkpoint(released.resnet10(5), half)
    assert torch.equal(loaded.conv1.weight, trained.conv1.weight.half().float())


def test_states_from_before_norms_counted(trained):
    state = {k: v for k, v in trained.state_dict().items() if not k.endswith("num_batches_tracked")}
    loaded = released.load_checkpoint(released.resnet10(5), state)
    assert torch.equal(loaded.layer4[0].conv2.bn2.running_var, trained.layer4[0].conv2.bn2.running_var)
    # of a newer one, all or none
    state["bn1.num_batches_tracked"] = torch.tensor(7)
    with pytest.raises(ValueError, match=r"missing: layer1\.0\.conv1\.bn1\.num_batches_tracked"):
        released.load_checkpoint(released.resnet10(5), state)


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: without(state, "conv1.weight", "classifier.0.cls.bias"),
            r"got 2 missing: conv1\.weight, classifier\.0\.cls\.bias$",
        ),
        (lambda state: {**state, "fc.weight": torch.ones(2)}, r"got 1 unexpected: fc\.weight$"),
        (
            lambda state: {**state, "bn1.bias": torch.ones(1)},
            r"got 1 of another shape: bn1\.bias \(1,\) instead of \(64,\)$",
        ),
        (
            lambda state: {**without(state, "bn1.bias"), "module.bn1.bias": state["bn1.bias"]},
            r"1 missing: bn1\.bias; 1 unexpected: module\.bn1\.bias$",
        ),
        (lambda state: {}, r"missing: conv1\.weight, .* and \d+ more$"),
        (
            lambda state: {k.replace("classifier.0", "classifier.1"): v for k, v in state.items()},
            r"18 missing: classifier\.0\..*make the model with dropout=0\.1\)$",
        ),
    ],
)
def test_what_does_not_fit_is_named(trained, change, message):
    state = change({key: value + 1 for key, value in trained.state_dict().items()})
    model = copy.deepcopy(trained)
    with pytest.raises(ValueError, match="load_checkpoint: checkpoint must have the keys .*" + message):
        released.load_checkpoint(model, {"state_dict": state})
    # nothing of it was loaded
    assert_same(model, trained)


def test_a_checkpoint_without_dropout(trained):
    with pytest.raises(ValueError, match=r"its classifier is number 0: make the model with dropout=None"):
        released.load_checkpoint(released.resnet10(5, dropout=0.0), trained.state_dict())


def test_what_is_no_checkpoint(trained, tmp_path):
    with pytest.raises(TypeError, match=r"load_checkpoint: model must be a torch\.nn\.Module, got str"):
        released.load_checkpoint("resnet10", trained.state_dict())
    with pytest.raises(TypeError, match="must be a file or a state_dict, got list"):
        released.load_checkpoint(trained, [1, 2])
    with pytest.raises(
        TypeError, match="checkpoint must have tensors by name, got OrderedDict under 'model'"
    ):
        released.load_checkpoint(trained, {"model": trained.state_dict()})
    with pytest.raises(
        TypeError, match=r"checkpoint\['state_dict'\] must have tensors by name, got int under"
    ):
        released.load_checkpoint(trained, {"state_dict": {"conv1.weight": 3}})
    with pytest.raises(FileNotFoundError):
        released.load_checkpoint(trained, tmp_path / "none.pth")
    torch.save({"state_dict": trained}, tmp_path / "code.pth")  # a whole module would run its code on loading
    with pytest.raises(pickle.UnpicklingError):
        released.load_checkpoint(trained, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="model must have its tensors in memory"):
        released.load_checkpoint(released.resnet10(5, device="meta"), trained.state_dict())
