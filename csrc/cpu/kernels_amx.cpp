// SPDX-License-Identifier: BSD-3-Clause
// Compiled with the flags of its instruction set: see CMakeLists.txt and kernels_avx512.cpp.
#define DCD_ISA amx
#include "kernels/amx.h"
#include "kernels/mixed.h"
#include "simd/avx512.h"
#include "simd/tiles_amx.h"

namespace dcd::amx {
extern const MixedKernels mixed;
const MixedKernels mixed = {&mixed_pointwise<Amx<Simd, Tiles, false>>,
                            &mixed_pointwise<Amx<Simd, Tiles, true>>};
}  // namespace dcd::amx
