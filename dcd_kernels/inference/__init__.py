# SPDX-License-Identifier: BSD-3-Clause
"""Whole networks in one call: `optimize_for_inference`.

optimize.py: the public function and the module that it returns; watch.py: whether a weight has changed;
plan.py: a network as pieces; capture.py: its data flow; classify.py: which step each node is, or why none;
aliases.py: what is written in place; layers.py: what each module computes; lower.py: steps of the data flow;
pack.py: weights as the kernel reads them, norms folded in; program.py: the steps as the op `network` takes
them.
"""

from .optimize import OptimizedNetwork, optimize_for_inference

__all__ = ["OptimizedNetwork", "optimize_for_inference"]
