# SPDX-License-Identifier: BSD-3-Clause
"""Photographs as a batch a network takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# what photographs of everyday scenes have as mean and deviation a channel (red, green, blue; range 0 to 1)
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


def centre_square(photograph: Image.Image, size: int) -> Image.Image:
    """The largest centred square, scaled to ``size`` × ``size``."""
    side = min(photograph.size)
    left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
    box = (left, top, left + side, top + side)
    return photograph.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)


def open_all(files: Sequence[Path] | None) -> list[tuple[str, Image.Image]]:
    """The named photographs; scikit-learn's two bundled ones when ``files`` is empty."""
    if files:
        return [(path.name, Image.open(path)) for path in files]
    from sklearn.datasets import load_sample_image

    return [(name, Image.fromarray(load_sample_image(name))) for name in ("china.jpg", "flower.jpg")]


def batch(photographs: Sequence[tuple[str, Image.Image]], size: int = 224) -> Tensor:
    """Normalised photographs as one ``(n, 3, size, size)`` float32 tensor."""
    pixels = np.stack([np.asarray(centre_square(picture, size)) for _, picture in photographs])
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous()
    return (channels_first - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
