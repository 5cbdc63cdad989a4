// SPDX-License-Identifier: BSD-3-Clause
// Compiled with the flags of its instruction set, like kernels_avx512.cpp.
#define DCD_ISA avx512
#include "kernels.h"
#include "kernels/network/run.h"
#include "simd/avx512.h"

namespace dcd::avx512 {
void run_network(const NetworkCall& call, const Runtime& runtime) {
    net::run<Simd>(call, runtime);
}
}  // namespace dcd::avx512
