// SPDX-License-Identifier: BSD-3-Clause
// Compiled with the flags of its instruction set: see CMakeLists.txt and kernels_avx512.cpp.
#define DCD_ISA amx_emulated
#include "kernels/amx.h"
#include "kernels/mixed.h"
#include "simd/avx512.h"
#include "simd/tiles_emulated.h"

namespace dcd::amx_emulated {
extern const MixedKernels mixed;
const MixedKernels mixed = {&mixed_pointwise<Amx<Simd, Tiles, false>>,
                            &mixed_pointwise<Amx<Simd, Tiles, true>>};
}  // namespace dcd::amx_emulated
