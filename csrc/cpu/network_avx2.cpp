// SPDX-License-Identifier: BSD-3-Clause
// Compiled with the flags of its instruction set, like kernels_avx2.cpp.
#define DCD_ISA avx2
#include "kernels.h"
#include "kernels/network/run.h"
#include "simd/avx2.h"

namespace dcd::avx2 {
void run_network(const NetworkCall& call, const Runtime& runtime) {
    net::run<Simd>(call, runtime);
}
}  // namespace dcd::avx2
