// SPDX-License-Identifier: BSD-3-Clause
// The portable kernels: what any target of the compiler can run, and the only ones in double precision.
#define DCD_ISA baseline
#include "kernels.h"
#include "kernels/all.h"
#include "kernels/mixed.h"
#include "kernels/widened.h"
#include "simd/baseline.h"

namespace dcd::baseline {
const Kernels<float> kernels_float = all_kernels<Simd<float>>();
const MixedKernels mixed = {&mixed_pointwise<Widened<Simd<float>>>, nullptr};
const Kernels<double> kernels_double = all_kernels<Simd<double>>();
}  // namespace dcd::baseline
