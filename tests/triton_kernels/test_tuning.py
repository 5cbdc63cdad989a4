# SPDX-License-Identifier: BSD-3-Clause
"""The choice of tiles: what fits, what is measured once and remembered, and what is never measured."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import torch
import triton

from dcd_kernels.backends.triton import gradients, product, synthesised, tuning
from dcd_kernels.backends.triton.tuning import Config

SMALL, MIDDLE, LARGE = Config(16, 16, 16, 4, 3), Config(64, 64, 64, 4, 3), Config(128, 128, 64, 8, 3)
CANDIDATES = (SMALL, MIDDLE, LARGE)


class Device:
    """A GPU that is not there: what tuning asks of torch.cuda, and how long each tile takes on it."""

    def __init__(self, monkeypatch, folder):
        self.index, self.name, self.capturing = 0, "NVIDIA Imaginary 100", False
        self.times = {SMALL: 3.0, MIDDLE: 1.0, LARGE: 2.0}
        self.too_large: set[Config] = set()
        self.ran: list[Config] = []
        self.clock = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setenv(tuning.FOLDER, str(folder))
        monkeypatch.delenv(tuning.TUNE, raising=False)
        for name, value in {
            "is_initialized": lambda: True,
            "current_device": lambda: self.index,
            "is_current_stream_capturing": lambda: self.capturing,
            "get_device_properties": lambda index: SimpleNamespace(name=self.name),
            "Event": Event,
            "_sleep": lambda cycles: None,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.forget(monkeypatch)

    def forget(self, monkeypatch):
        """As a new process begins."""
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(tuning, "_remembered", {})
        self.ran.clear()

    def run(self, config):
        if config in self.too_large:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        self.ran.append(config)
        self.clock += self.times[config]

    def choose(self, key=("bfloat16", 96, 24), candidates=CANDIDATES):
        return tuning.choose("product", key, candidates, self.run)


@pytest.fixture
def device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    return Device(monkeypatch, tmp_path)


def test_the_fastest_is_chosen_and_not_measured_again(device):
    assert device.choose() == MIDDLE
    assert set(device.ran) == set(CANDIDATES)
    device.ran.clear()
    assert device.choose() == MIDDLE and not device.ran


def test_another_key_is_measured_for_itself(device):
    device.choose()
    device.times[LARGE] = 0.5
    assert device.choose(key=("bfloat16", 24, 144)) == LARGE
    assert device.choose() == MIDDLE


def test_the_next_process_reads_it_from_disk(device, monkeypatch, tmp_path):
    device.choose()
    device.forget(monkeypatch)
    assert device.choose() == MIDDLE and not device.ran
    (file,) = tmp_path.iterdir()
    assert "Imaginary-100" in file.name and triton.__version__ in file.name
    assert list(json.loads(file.read_text()).values()) == [list(MIDDLE)]


def test_each_device_has_choices_of_its_own(device, tmp_path):
    device.choose()
    device.index, device.name = 1, "NVIDIA Imaginary 200"
    device.times[SMALL] = 0.1
    assert device.choose() == SMALL
    assert len(list(tmp_path.iterdir())) == 2
    device.index = 0
    assert device.choose() == MIDDLE


def test_nothing_is_measured_under_capture_and_nothing_is_remembered_of_it(device):
    device.capturing = True
    assert device.choose() == SMALL and not device.ran
    device.capturing = False
    assert device.choose() == MIDDLE
    device.capturing = True
    assert device.choose() == MIDDLE


def test_nothing_is_measured_by_the_users_wish_or_without_a_gpu(device, monkeypatch):
    monkeypatch.setenv(tuning.TUNE, "0")
    assert device.choose() == SMALL
    monkeypatch.delenv(tuning.TUNE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert device.choose() == SMALL
    assert not device.ran


def test_determinism_takes_the_same_tile_everywhere(device, monkeypatch):
    assert device.choose() == MIDDLE
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert device.choose() == SMALL


def test_a_single_candidate_needs_no_measuring(device):
    assert device.choose(candidates=(LARGE,)) == LARGE and not device.ran


def test_a_tile_that_the_device_cannot_hold_is_passed_over(device):
    device.too_large.add(MIDDLE)
    assert device.choose() == LARGE


def test_a_remembered_tile_that_is_no_candidate_any_more_is_measured_again(device, monkeypatch):
    device.choose()
    device.forget(monkeypatch)
    assert device.choose(candidates=(SMALL, LARGE)) == LARGE and device.ran


@pytest.mark.parametrize("text", ["", "{", "[1, 2]"])
def test_a_spoilt_file_is_as_none(device, tmp_path, text):
    device.choose()
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    device.ran.clear()
    tuning._chosen.clear()
    tuning._remembered.clear()
    assert device.choose() == MIDDLE and device.ran


def test_a_folder_that_cannot_be_written_does_no_harm(device, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "file" / "folder"))
    assert device.choose() == MIDDLE


@pytest.mark.parametrize("module", [product, synthesised, gradients])
def test_the_candidates_differ(module):
    assert len(set(module.CONFIGS)) == len(module.CONFIGS)


@pytest.mark.parametrize("k", [1, 3, 16, 24, 960])
@pytest.mark.parametrize("n", [1, 16, 24, 40, 1000])
@pytest.mark.parametrize("m", [1, 9, 49, 12544])
def test_every_size_has_a_tile_that_is_no_wider(m, n, k):
    fits = tuning.fitting(product.CONFIGS, m, n, k, n, m)
    assert 1 <= len(fits) <= 3
    for config in fits:
        for own, size in zip(config[:3], (m, n, k), strict=True):
            assert own <= max(16, tuning.bucket(size))
    assert tuning.fitting(gradients.CONFIGS, m, n, 64)


def test_large_layers_get_large_tiles_and_small_ones_many():
    large = tuning.fitting(product.CONFIGS, 50176, 96, 384, 96, 50176)[0]
    small = tuning.fitting(product.CONFIGS, 49, 96, 384, 96, 49)[0]
    assert large == product.CONFIGS[0]
    assert small.block_m * small.block_n < large.block_m * large.block_n
