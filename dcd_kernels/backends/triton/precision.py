# SPDX-License-Identifier: BSD-3-Clause
"""How float32 products are taken: on the matrix units in TF32 only where torch's settings allow it."""

import torch
from torch import Tensor


def of_products(image: Tensor) -> str:
    """'tf32' or 'ieee' for products with ``image``.

    Convolutions follow ``torch.backends.cudnn.conv.fp32_precision`` (TF32 unless switched off). An image of
    one spatial dimension may be a linear layer's rows, and follows ``torch.backends.cuda.matmul`` as well.
    """
    if image.dtype != torch.float32:
        return "ieee"  # of no effect: half-precision products are exact in float32
    allowed = _allows(torch.backends.cudnn.conv) and (image.dim() > 3 or _allows(torch.backends.cuda.matmul))
    return "tf32" if allowed else "ieee"


def of_latents(image: Tensor) -> str:
    """The same for products with Φ, whose float32 values next to the identity bfloat16 would lose."""
    return "tf32" if image.dtype != torch.float32 else of_products(image)


def _allows(backend) -> bool:
    return backend.fp32_precision == "tf32"
