# SPDX-License-Identifier: BSD-3-Clause
"""A few calls of every kernel, forward and backward, for compute-sanitizer: `python sanitized.py [device]`.

Sizes that are no multiple of anything, both layouts, tensors that begin in the middle of others.
"""

from __future__ import annotations

import pathlib
import sys

import torch

# appended, so that an installed dcd_kernels keeps its place before the source tree
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2]))

import dcd_kernels as dcd


def maps(device: torch.device, channels: int, size: tuple[int, int], dtype: torch.dtype):
    """The same image contiguous, channels_last, and as a misaligned slice."""
    image = torch.randn(2, channels, *size).to(device, dtype)
    larger = torch.zeros(3, channels + 2, size[0] + 1, size[1] + 3, dtype=dtype, device=device)
    inside = larger[1:, 1:-1, 1:, 1:-2]
    inside.copy_(image)
    return image, image.to(memory_format=torch.channels_last), inside


def main(device: torch.device) -> None:
    torch.manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype):
        return (0.3 * torch.randn(shape)).to(device, dtype).requires_grad_()

    for dtype in (torch.bfloat16, torch.float32):
        p, phi, q = (leaf(*shape, dtype=dtype) for shape in ((21, 5), (2, 5, 5), (13, 5)))
        weight, lam = leaf(21, 13, 1, 1, dtype=dtype), leaf(2, 21, dtype=torch.float32)
        bias, k = leaf(21, dtype=dtype), leaf(21, 13, 3, 3, dtype=dtype)
        stencils = leaf(13, 1, 3, 3, dtype=dtype), leaf(13, 4, dtype=dtype), leaf(2, 4, 4, dtype=dtype)
        r, scale = leaf(9, 4, dtype=dtype), leaf(2, 13, dtype=torch.float32)
        for image in maps(device, 13, (7, 5), dtype):
            x = image.detach().requires_grad_()
            branch = dcd.nn.DynamicBranch(13, 21, (5, 5), gate="se", bias=True, dtype=dtype).to(device)
            outputs = [
                *branch(x),
                dcd.dcd_conv2d(x, weight, p, phi, q, lam=lam, bias=bias, activation="relu6"),
                dcd.dcd_conv2d(x, k, p, phi, q, lam=lam, padding=1, stride=2),
                *(
                    dcd.dcd_conv2d(x, *stencils, r=r, lam=scale, padding=1, stride=stride, groups=13)
                    for stride in (1, 2)
                ),
            ]
            sum(y.float().square().sum() for y in outputs).backward()
    layer = dcd.nn.DCDConv2d(13, 21, 1, pool_size=2, gate="se").to(device)
    layer(torch.randn(2, 13, 7, 5).to(device).requires_grad_()).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("finished")


if __name__ == "__main__":
    main(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
