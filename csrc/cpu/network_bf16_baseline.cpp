// SPDX-License-Identifier: BSD-3-Clause
// Networks in bf16, multiplied in fp32. Compiled with the flags of its instruction set, like
// network_baseline.cpp.
#define DCD_ISA baseline
#include "kernels.h"
#include "kernels/network/run.h"
#include "simd/baseline.h"

namespace dcd::baseline {
void run_network_bf16(const NetworkCall& call, const Runtime& runtime) {
    net::run<net::Narrow<Simd<float>>>(call, runtime);
}
}  // namespace dcd::baseline
