// SPDX-License-Identifier: BSD-3-Clause
// The launch of the gradients' sums for one type of image; one .cu file a type includes it.
#pragma once

#include "depthwise_sums.h"

namespace dcd::cuda::dw {

template <class T, bool LAST, int KERNEL, Mode MODE>
__global__ __launch_bounds__(kThreads,
                             kSumsBlocks<KERNEL>) void sums_kernel(const __grid_constant__ SumsParams s) {
    extern __shared__ __align__(16) char memory[];
    Team<Products<KERNEL * KERNEL, Arrangement<T, LAST>::kChannels>, kThreads> block;
    sums_block<T, LAST, KERNEL, MODE>(block, s, static_cast<int>(blockIdx.x), memory);
}

template <class T, bool LAST, int KERNEL, Mode MODE>
int launch_sums(const SumsParams& s, cudaStream_t stream) {
    const int bytes = SumsMemory<T, LAST, KERNEL>::bytes(s);
    if (bytes > kSharedBytes) {
        const cudaError_t error = cudaFuncSetAttribute(sums_kernel<T, LAST, KERNEL, MODE>,
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return static_cast<int>(error);
    }
    sums_kernel<T, LAST, KERNEL, MODE>
        <<<static_cast<unsigned>(sums_blocks(s)), kThreads, static_cast<size_t>(bytes), stream>>>(s);
    return static_cast<int>(cudaGetLastError());
}

template <class T, int KERNEL>
int launch_sums(const SumsParams& s, bool last, Mode mode, cudaStream_t stream) {
    if (mode == kSame)
        return last ? launch_sums<T, true, KERNEL, kSame>(s, stream)
                    : launch_sums<T, false, KERNEL, kSame>(s, stream);
    return last ? launch_sums<T, true, KERNEL, kDown>(s, stream)
                : launch_sums<T, false, KERNEL, kDown>(s, stream);
}

template <class T>
int launch_sums(const SumsParams& s, bool last, int kernel, Mode mode, cudaStream_t stream) {
    if (kernel == 3) return launch_sums<T, 3>(s, last, mode, stream);
    if (kernel == 5) return launch_sums<T, 5>(s, last, mode, stream);
    return launch_sums<T, 7>(s, last, mode, stream);
}

}  // namespace dcd::cuda::dw
