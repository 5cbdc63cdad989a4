// SPDX-License-Identifier: BSD-3-Clause
#include "depthwise_convolve.cuh"

namespace dcd::cuda::dw {

int convolve_float(const ConvolveParams& s, bool last, int kernel, Mode mode, void* stream) {
    return launch_convolve<float>(s, last, kernel, mode, static_cast<cudaStream_t>(stream));
}

}  // namespace dcd::cuda::dw
