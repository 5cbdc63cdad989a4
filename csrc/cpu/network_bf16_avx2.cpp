// SPDX-License-Identifier: BSD-3-Clause
// Networks in bf16, multiplied in fp32. Compiled with the flags of its instruction set, like
// network_avx2.cpp.
#define DCD_ISA avx2
#include "kernels.h"
#include "kernels/network/run.h"
#include "simd/avx2.h"

namespace dcd::avx2 {
void run_network_bf16(const NetworkCall& call, const Runtime& runtime) {
    net::run<net::Narrow<Simd>>(call, runtime);
}
}  // namespace dcd::avx2
