# SPDX-License-Identifier: BSD-3-Clause
"""The backend for code that already has dynamic convolution decomposition, as it was written."""

from .acceleration import Entry, Report, accelerate, report, restore

__all__ = ["Entry", "Report", "accelerate", "report", "restore"]
