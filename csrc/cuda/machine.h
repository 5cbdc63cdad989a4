// SPDX-License-Identifier: BSD-3-Clause
// The GPU as the kernels' bodies see it. The tests have a second machine, which runs the same bodies on a
// CPU.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace dcd::cuda {

// Thread-block clusters: what compute capability 9.0 added.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#    define DCD_HAS_CLUSTERS 1
#else
#    define DCD_HAS_CLUSTERS 0
#endif

struct Machine {
    int ranks = 1;  // blocks of a cluster

    __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
    __device__ __forceinline__ int64_t block_x() const { return blockIdx.x; }
    __device__ __forceinline__ int64_t block_y() const { return blockIdx.y; }
    __device__ __forceinline__ int64_t grid_y() const { return gridDim.y; }
    __device__ __forceinline__ void sync() const { __syncthreads(); }

    // The value of the lane whose number differs in the bit `apart`. All lanes of the warp take part.
    __device__ __forceinline__ float exchange(float value, int apart) const {
        return __shfl_xor_sync(0xffffffffu, value, apart);
    }

    __device__ __forceinline__ void sync_cluster() const {
#if DCD_HAS_CLUSTERS
        if (ranks > 1) {
            cooperative_groups::this_cluster().sync();
            return;
        }
#endif
        __syncthreads();
    }

    // The same place in the shared memory of another block of the cluster.
    __device__ __forceinline__ const float* of_rank(const float* shared, int rank) const {
#if DCD_HAS_CLUSTERS
        if (ranks > 1)
            return cooperative_groups::this_cluster().map_shared_rank(const_cast<float*>(shared), rank);
#endif
        return shared;
    }
};

}  // namespace dcd::cuda
