// SPDX-License-Identifier: BSD-3-Clause
#include "depthwise_sums.cuh"

namespace dcd::cuda::dw {

int sums_float(const SumsParams& s, bool last, int kernel, Mode mode, void* stream) {
    return launch_sums<float>(s, last, kernel, mode, static_cast<cudaStream_t>(stream));
}

}  // namespace dcd::cuda::dw
