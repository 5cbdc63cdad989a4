// SPDX-License-Identifier: BSD-3-Clause
// Whether fp32 products may lose digits, as torch.set_float32_matmul_precision says.
#pragma once

namespace dcd {

// Whether fp32 pointwise layers now run as three products of bf16: the precision is 'high' or 'medium', and
// the products in use (cpu/mixed.h) do it fast.
bool splits_float32();

}  // namespace dcd
