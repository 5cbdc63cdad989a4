// SPDX-License-Identifier: BSD-3-Clause
// Compiled with the flags of its instruction set: see CMakeLists.txt and kernels_avx512.cpp.
#define DCD_ISA avx512_bf16
#include "kernels/dot_products.h"
#include "kernels/mixed.h"
#include "simd/avx512.h"

namespace dcd::avx512_bf16 {
extern const MixedKernels mixed;
const MixedKernels mixed = {&mixed_pointwise<DotProducts<Simd>>, nullptr};
}  // namespace dcd::avx512_bf16
