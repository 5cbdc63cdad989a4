# SPDX-License-Identifier: BSD-3-Clause
"""Parameters and multiply-adds of the paper's networks: the published figures, and what is counted here.

    python benchmarks/run.py complexity

Nothing is measured and nothing is trained: top-1 is quoted from the paper. The published figures, with their
source, are in published.json; the counts come from `dcd_kernels.models.complexity`.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from dcd_kernels import madds
from dcd_kernels.models import Complexity, complexity, mobilenet_v2, resnet10, resnet18, resnet50
from dcd_kernels.nn.latent import halving, released

PUBLISHED = json.loads((pathlib.Path(__file__).resolve().parent / "published.json").read_text("utf-8"))

CONVENTION = """\
Published convention of parameters: all of them, without biases on the branch; ResNet-18 and the static
ResNet-50 without the classifier. Of multiply-adds, at 224 × 224: the static network; the weights of the
branch's fully connected layers; for each dynamic layer the cheaper of synthesising the residual's weights,
Co·Ci·L/B + Co·L², and taking it on the map, HW·(L·(Ci + Co) + B·L²); Co·Ci for adding W0, in convolutions.
Pooling, λ, norms and activations are free. MobileNetV2: L by the rule 'released', squeeze max(Ci, Co)/r,
r = 8 for ×0.5 and ×0.35, else 16; classifier with L and squeeze of 32. ResNet: L = ⌊√I⌋ and squeeze I/16
for I pooled numbers, 4Ci in basic blocks, Ci in bottlenecks.
'on static': the difference of multiply-adds where what is dynamic is added to the published static count.
'executed': our CPU kernels on one thread, in the cheaper order for each 1 × 1 layer, with the residual of
k × k layers on the map and depthwise weights once a sample.
top-1 is quoted from the paper and was not measured here.
'!' marks a row farther away than 3.1 % of the parameters, or 0.5 % of the multiply-adds on static."""

# Farther away, a row needs a note.
PARAMETERS_WITHIN, MADDS_WITHIN = 0.031, 0.005

DEPTHWISE = "with dynamic depthwise layers the published rows hold 0.11 to 0.17 M more than Eq. 8 needs"
CLASSIFIER = "counted with the dynamic classifier; without any it would be 27.55 M"
RESNET_50 = (
    "with the stride in the first 1 × 1, nearer to the published figure, which is one decimal of a G; in the "
    "3 × 3, as by default, the static network has 4.09 G"
)
# (network, width, variant) -> why the row is not what the rule gives
NOTES: dict[tuple[str, float | None, str], str] = {
    ("MobileNetV2", 0.5, "DW"): DEPTHWISE,
    ("MobileNetV2", 0.5, "DW+CLS"): DEPTHWISE,
    ("MobileNetV2", 0.5, "DW+PW"): DEPTHWISE,
    ("MobileNetV2", 0.5, "DW+PW+CLS"): DEPTHWISE,
    (
        "ResNet-18",
        None,
        "LambdaW0",
    ): "the same branch without Φ has 1.5 M parameters, the published row 0.6 M",
    ("ResNet-50", None, "static"): RESNET_50,
    ("ResNet-50", None, "DCD"): f"{CLASSIFIER}; {RESNET_50}",
    ("ResNet-10", None, "static"): "5.42 M with the classifier, 4.91 M without, published 5.2 M: neither",
    ("ResNet-10", None, "DCD"): "counted with the classifier, unlike ResNet-18: without it, 6.04 M",
}


@functools.cache  # the tables repeat themselves
def _counted(make: Callable[..., nn.Module], options: tuple[tuple[str, object], ...]) -> Complexity:
    return complexity(make(device="meta", **dict(options)))


@dataclass(frozen=True)
class Configuration:
    """The network of a row."""

    make: Callable[..., nn.Module]
    options: dict = field(default_factory=dict)
    counts_classifier: bool = True

    def count(self) -> tuple[int, Complexity]:
        """Parameters by the row's convention, and everything else."""
        counted = _counted(self.make, tuple(sorted(self.options.items())))
        return counted.parameters - (0 if self.counts_classifier else counted.layers[-1].parameters), counted


@functools.cache
def _multiplied(multiplier: float) -> Callable[[int, int], int]:
    return lambda in_channels, out_channels: int(released(in_channels, out_channels) * multiplier)


_FORMULATIONS = {
    "W0 (static)": "static",
    "static": "static",
    "LambdaW0": "lam",
    "W0+PPhiQT": "fusion",
    "LambdaW0+PPhiQT": "dcd",
    "DCD": "dcd",
}


def _mobilenet(width: float, variant: str) -> Configuration:
    form, _, blocks = variant.partition(" B=")
    options: dict = {"width_mult": width, "classifier": "static"}
    if form in _FORMULATIONS:
        options |= {"pointwise": _FORMULATIONS[form], "blocks": int(blocks or 1)}
    elif form.startswith("DCD Lx"):
        options["latent_channels"] = _multiplied(float(form.removeprefix("DCD Lx")))
    else:
        dynamic = form.removeprefix("DCD ").split("+")
        names = {"PW": "pointwise", "DW": "depthwise", "CLS": "classifier"}
        options |= {name: "dcd" if short in dynamic else "static" for short, name in names.items()}
    return Configuration(mobilenet_v2, options)


def configuration(row: dict) -> Configuration | None:
    """The network of a published row; None for the rows of other methods, which are only quoted."""
    network, variant = row["network"], row["variant"]
    if variant.startswith(("DY-Conv", "CondConv")):
        return None
    if network == "MobileNetV2":
        return _mobilenet(row["width"], variant)
    options = {"convolutions": _FORMULATIONS[variant]}
    if network == "ResNet-18":
        return Configuration(resnet18, options, counts_classifier=False)
    if network == "ResNet-10":
        return Configuration(resnet10, options)
    options["bottleneck_stride"] = "1x1"
    if variant == "static":
        return Configuration(resnet50, options, counts_classifier=False)
    return Configuration(resnet50, {**options, "classifier": "dcd"})


@dataclass(frozen=True)
class Agreement:
    """A published row and what is counted here; counts in millions."""

    row: dict
    parameters: float
    madds: float
    executed: float
    # of multiply-adds, with what is dynamic added to the published static count
    on_static: float

    @property
    def parameters_off(self) -> float:
        return self.parameters / self.row["params_M"] - 1

    @property
    def madds_off(self) -> float:
        return self.madds / self.row["madds_M"] - 1

    @property
    def on_static_off(self) -> float:
        return self.on_static / self.row["madds_M"] - 1

    @property
    def follows_the_rule(self) -> bool:
        return abs(self.parameters_off) <= PARAMETERS_WITHIN and abs(self.on_static_off) <= MADDS_WITHIN

    @property
    def key(self) -> tuple[str, float | None, str]:
        return self.row["network"], self.row["width"], self.row["variant"]


def _static_row(row: dict) -> dict:
    return next(
        other
        for other in PUBLISHED["rows"]
        if (other["network"], other["width"]) == (row["network"], row["width"])
        and "static" in other["variant"]
    )


def agreements() -> list[Agreement]:
    """Every row of the tables that is about DCD or a static network, in their order."""
    rows = []
    for row in PUBLISHED["rows"]:
        network = configuration(row)
        if network is None:
            continue
        parameters, counted = network.count()
        on_static = _static_row(row)["madds_M"] + (counted.published - counted.static) / 1e6
        rows.append(
            Agreement(row, parameters / 1e6, counted.published / 1e6, counted.executed / 1e6, on_static)
        )
    return rows


def released_networks() -> list[tuple[dict, Complexity]]:
    """The networks of the released code, as far as the models here have them: without norms on the latent."""
    make = {"ResNet-18": resnet18, "ResNet-50": resnet50}
    networks = []
    for row in PUBLISHED["released"]:
        if row["network"] == "MobileNetV2":
            model = mobilenet_v2(row["width"], squeeze="pooled", device="meta")
        else:
            model = make[row["network"]](classifier="dcd", device="meta")
        networks.append((row, complexity(model)))
    return networks


def _name(row: dict) -> str:
    return row["network"] if row["width"] is None else f"{row['network']} ×{row['width']}"


def _print_rows() -> None:
    head = (
        f"{'table':5} {'network':17} {'variant':20} │{'published':>9} {'ours':>6} {'diff':>7} │"
        f"{'published':>9} {'ours':>7} {'diff':>7} {'on static':>9} {'executed':>8} │ {'top-1':>5}"
    )
    print(f"{'':45}│{'parameters, M':^24} │{'multiply-adds, M':^44} │ quoted")
    print(head)
    counted = iter(agreements())
    notes: dict[str, int] = {}
    for row in PUBLISHED["rows"]:
        published_madds, top1 = row["madds_M"], row["top1"]
        left = f"{row['table']:5} {_name(row):17} {row['variant']:20} │{row['params_M']:9.1f} "
        if configuration(row) is None:
            print(f"{left}{'':6} {'':7} │{published_madds:9.1f} {'':7} {'':7} {'':9} {'':8} │ {top1:5.1f}")
            continue
        ours = next(counted)
        note = NOTES.get(ours.key)
        mark = "" if ours.follows_the_rule else " !"
        if note is not None:
            mark += f" [{notes.setdefault(note, len(notes) + 1)}]"
        print(
            f"{left}{ours.parameters:6.2f} {ours.parameters_off:+7.1%} │"
            f"{published_madds:9.1f} {ours.madds:7.1f} {ours.madds_off:+7.2%} {ours.on_static_off:+9.2%} "
            f"{ours.executed:8.1f} │ {top1:5.1f}{mark}"
        )
    print("\nRows of DY-Conv and CondConv are other methods, quoted only.")
    for note, number in notes.items():
        print(f"[{number}] {note}.")


def _print_executed() -> None:
    published = {_name(row): row["madds_M"] for row in PUBLISHED["rows"] if row["variant"].startswith("DCD")}
    print(
        "\nThe released networks, which end in a dynamic classifier, M multiply-adds: published, executed\n"
        "by the released code, and by ours. 'latent norms' are the parameters that ours have not: two\n"
        "BatchNorms of the latent a layer. 'on the map' counts ours with every residual in factors."
    )
    print(
        f"{'network':17} {'published':>9} {'released':>9} {'ours':>7} {'÷ released':>10} "
        f"{'latent norms':>13} {'released, exactly':>18} {'on the map':>14}"
    )
    for row, counted in released_networks():
        ours, theirs = counted.executed / 1e6, row["madds"] / 1e6
        norms = row["params"] - counted.parameters
        print(
            f"{_name(row):17} {published[_name(row)]:9.1f} {theirs:9.1f} {ours:7.1f} {ours / theirs:10.2f} "
            f"{norms:13,} {row['madds']:18,} {counted.factored:14,}"
        )


def _print_formulas() -> None:
    print("\nParameters of a 1 × 1 layer by Section 3.4, ÷ C²: C inputs and outputs, r = 16, L by halving C")
    print(f"{'C':>5} {'L':>3} {'DCD':>6} {'bound':>6} {'K = 4 kernels':>13} {'K = 8':>6}")
    for channels in (64, 128, 256, 512, 1024, 2048):
        latent, static = halving(channels, channels), channels**2
        print(
            f"{channels:5} {latent:3} {madds.dcd_parameters(channels, latent, 16) / static:6.3f} "
            f"{madds.dcd_parameter_bound(channels, 16) / static:6.3f} "
            f"{madds.kernels_parameters(channels, 4) / static:13.1f} "
            f"{madds.kernels_parameters(channels, 8) / static:6.1f}"
        )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dcd_kernels bench complexity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    print(CONVENTION + "\n")
    _print_rows()
    _print_executed()
    _print_formulas()
    return 0
