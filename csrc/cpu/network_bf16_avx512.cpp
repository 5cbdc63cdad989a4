// SPDX-License-Identifier: BSD-3-Clause
// Networks in bf16, multiplied in fp32. Compiled with the flags of its instruction set, like
// network_avx512.cpp.
#define DCD_ISA avx512
#include "kernels.h"
#include "kernels/network/run.h"
#include "simd/avx512.h"

namespace dcd::avx512 {
void run_network_bf16(const NetworkCall& call, const Runtime& runtime) {
    net::run<net::Narrow<Simd>>(call, runtime);
}
}  // namespace dcd::avx512
