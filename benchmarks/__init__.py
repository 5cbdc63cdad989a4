# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks of dcd_kernels: a registry of cases × candidates, one runner, results as rows."""
