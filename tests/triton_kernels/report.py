# SPDX-License-Identifier: BSD-3-Clause
"""A table of what the compiler makes of the Triton kernels, to choose tiles by. Needs no GPU.

python tests/triton_kernels/report.py                              bf16 on sm_90a, each call's first tile
python tests/triton_kernels/report.py --every --op pointwise       all candidates of one op
python tests/triton_kernels/report.py --layer 96-24@56 --layout channels_last --dtype fp16 --target sm_80
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/, which is not installed

import ahead
import layers

WIDTHS = (15, 34, 8, 54, 6, 3, 6, 5, 14, 60, 8, 8, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    choices = {
        "op": layers.OPS,
        "layer": [str(layer) for layer in layers.LAYERS],
        "layout": layers.LAYOUTS,
        "dtype": list(layers.DTYPES),
        "target": list(ahead.TARGETS),
    }
    default = {"dtype": ["bf16"], "target": ["sm_90a"]}
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=default.get(name, values))
    parser.add_argument(
        "--every", action="store_true", help="all candidates for the tiles, not only the first"
    )
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--problems", action="store_true", help="only what has a problem")
    given = parser.parse_args()

    chosen = [layer for layer in layers.LAYERS if str(layer) in given.layer]
    made = layers.launches(layers.calls(chosen, given.op, given.layout, given.dtype), every=given.every)
    made = [(call, launch) for call, launch in made if (given.kernel or "") in launch.kernel.fn.__name__]
    found = 0
    for call, result in layers.results(made, [ahead.TARGETS[name] for name in given.target]):
        row = ahead.row(result, wide=call.wide)
        found += row[-1] != "-"
        if not given.problems or row[-1] != "-":
            # as it comes: all of them take minutes
            print("  ".join(map(str.ljust, row, WIDTHS)), flush=True)
    return found > 0


if __name__ == "__main__":
    sys.exit(main())
