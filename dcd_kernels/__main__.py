# SPDX-License-Identifier: BSD-3-Clause
"""``python -m dcd_kernels``."""

import sys

from dcd_kernels.cli import main

sys.exit(main())
