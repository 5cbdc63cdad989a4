# SPDX-License-Identifier: BSD-3-Clause
"""Who may run an operator: each backend is a module with ``NAME`` and ``can_run``; selection.py asks them."""
