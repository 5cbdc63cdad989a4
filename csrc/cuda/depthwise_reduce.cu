// SPDX-License-Identifier: BSD-3-Clause
#include "depthwise_reduce.h"

namespace dcd::cuda::dw {

__global__ __launch_bounds__(kReduceThreads) void reduce_kernel(const __grid_constant__ ReduceParams s) {
    __shared__ float memory[kReduceThreads];
    Team<LaneSum, kReduceThreads> block;
    reduce_block(block, s, blockIdx.x, memory);
}

int reduce(ReduceParams s, void* stream) {
    const int64_t blocks = number_blocks(s);
    if (blocks == 0) return 0;
    if (blocks >= int64_t{1} << 31) return static_cast<int>(cudaErrorInvalidValue);
    reduce_kernel<<<static_cast<unsigned>(blocks), kReduceThreads, 0, static_cast<cudaStream_t>(stream)>>>(s);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace dcd::cuda::dw
