// SPDX-License-Identifier: BSD-3-Clause
// Compiled with the flags of its instruction set: see CMakeLists.txt. Only this file's namespace may be used
// here, for an inline function shared with another file could be linked in this file's version.
#define DCD_ISA avx2
#include "kernels.h"
#include "kernels/all.h"
#include "kernels/mixed.h"
#include "kernels/widened.h"
#include "simd/avx2.h"

namespace dcd::avx2 {
const Kernels<float> kernels_float = all_kernels<Simd>();
const MixedKernels mixed = {&mixed_pointwise<Widened<Simd>>, nullptr};
}  // namespace dcd::avx2
