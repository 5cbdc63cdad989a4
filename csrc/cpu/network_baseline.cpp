// SPDX-License-Identifier: BSD-3-Clause
// Compiled with the flags of its instruction set, like kernels_baseline.cpp.
#define DCD_ISA baseline
#include "kernels.h"
#include "kernels/network/run.h"
#include "simd/baseline.h"

namespace dcd::baseline {
void run_network(const NetworkCall& call, const Runtime& runtime) {
    net::run<Simd<float>>(call, runtime);
}
}  // namespace dcd::baseline
