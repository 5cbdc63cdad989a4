# SPDX-License-Identifier: BSD-3-Clause
"""Triton kernels for GPUs: pointwise, linear and apply, and the dynamic part of k×k convolutions."""
