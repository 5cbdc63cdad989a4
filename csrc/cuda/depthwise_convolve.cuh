// SPDX-License-Identifier: BSD-3-Clause
// The launch of the depthwise convolution for one type of image; one .cu file a type includes it.
#pragma once

#include "depthwise_convolve.h"

namespace dcd::cuda::dw {

template <class T, bool LAST, int KERNEL, Mode MODE>
__global__ __launch_bounds__(kThreads,
                             KERNEL == 7 ? 3
                                         : 4) void convolve_kernel(const __grid_constant__ ConvolveParams s) {
    extern __shared__ __align__(16) char memory[];
    Team<NoState, kThreads> block;
    convolve_block<T, LAST, KERNEL, MODE>(block, s, static_cast<int>(blockIdx.x), memory);
}

template <class T, bool LAST, int KERNEL, Mode MODE>
int launch_convolve(const ConvolveParams& s, cudaStream_t stream) {
    const int64_t blocks = s.batch * s.tiling.tiles() * static_cast<int64_t>(s.tiling.groups.divisor);
    const int bytes = convolve_shared_bytes<T, LAST, KERNEL>(s);
    convolve_kernel<T, LAST, KERNEL, MODE>
        <<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(bytes), stream>>>(s);
    return static_cast<int>(cudaGetLastError());
}

template <class T, bool LAST, int KERNEL>
int launch_convolve(const ConvolveParams& s, Mode mode, cudaStream_t stream) {
    if (mode == kSame) return launch_convolve<T, LAST, KERNEL, kSame>(s, stream);
    if (mode == kDown) return launch_convolve<T, LAST, KERNEL, kDown>(s, stream);
    return launch_convolve<T, LAST, KERNEL, kUp>(s, stream);
}

template <class T>
int launch_convolve(const ConvolveParams& s, bool last, int kernel, Mode mode, cudaStream_t stream) {
    if (kernel == 3)
        return last ? launch_convolve<T, true, 3>(s, mode, stream)
                    : launch_convolve<T, false, 3>(s, mode, stream);
    if (kernel == 5)
        return last ? launch_convolve<T, true, 5>(s, mode, stream)
                    : launch_convolve<T, false, 5>(s, mode, stream);
    return last ? launch_convolve<T, true, 7>(s, mode, stream)
                : launch_convolve<T, false, 7>(s, mode, stream);
}

}  // namespace dcd::cuda::dw
