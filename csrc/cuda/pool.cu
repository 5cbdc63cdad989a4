// SPDX-License-Identifier: BSD-3-Clause
// Channel sums of images and of their quadrants. Two kernels each, one for each layout; the sums of a tile
// are added up in an order that depends on the shape and alignment alone, so the same input gives the same
// bits.
#include "machine.h"
#include "quadrants.h"

namespace dcd::cuda {
namespace {

template <class E, int LANES>
__global__ void __launch_bounds__(kPoolThreads, 4) planes_kernel(PoolParams s) {
    pool_planes<E, LANES>(Machine{}, s);
}

template <class E, int V>
__global__ void __launch_bounds__(kPoolThreads, 4) pixels_kernel(PoolParams s, int lanes) {
    __shared__ float shared[kPoolThreads / kWarp * kWarp * V];
    pool_pixels<E, V>(Machine{}, s, lanes, shared);
}

template <class E, int LANES>
__global__ void __launch_bounds__(kPoolThreads, 4) quadrant_planes_kernel(QuadrantParams s) {
    pool_plane_quadrants<E, LANES>(Machine{}, s);
}

template <class E, int V>
__global__ void __launch_bounds__(kPoolThreads, 4) quadrant_pixels_kernel(QuadrantParams s, int lanes) {
    __shared__ float shared[kPoolThreads / kWarp * kWarp * V];
    pool_pixel_quadrants<E, V>(Machine{}, s, lanes, shared);
}

template <class E>
void launch(const PoolParams& s, cudaStream_t stream) {
    const PoolPlan plan = plan_pool(s, sizeof(E));
    const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.rows));
    if (plan.planes && plan.lanes == kWarp)
        planes_kernel<E, kWarp><<<grid, kPoolThreads, 0, stream>>>(s);
    else if (plan.planes)
        planes_kernel<E, 8><<<grid, kPoolThreads, 0, stream>>>(s);
    else if (plan.wide)
        pixels_kernel<E, kVector<E>><<<grid, kPoolThreads, 0, stream>>>(s, plan.lanes);
    else
        pixels_kernel<E, 1><<<grid, kPoolThreads, 0, stream>>>(s, plan.lanes);
}

template <class E>
void launch(const QuadrantParams& s, cudaStream_t stream) {
    const PoolPlan plan = plan_pool(s.pool, sizeof(E));
    const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.rows));
    if (plan.planes && plan.lanes == kWarp)
        quadrant_planes_kernel<E, kWarp><<<grid, kPoolThreads, 0, stream>>>(s);
    else if (plan.planes)
        quadrant_planes_kernel<E, 8><<<grid, kPoolThreads, 0, stream>>>(s);
    else if (plan.wide)
        quadrant_pixels_kernel<E, kVector<E>><<<grid, kPoolThreads, 0, stream>>>(s, plan.lanes);
    else
        quadrant_pixels_kernel<E, 1><<<grid, kPoolThreads, 0, stream>>>(s, plan.lanes);
}

template <class Params>
const char* launch_for(const Params& s, Element element, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (element == Element::kFloat)
        launch<float>(s, on);
    else if (element == Element::kHalf)
        launch<Half>(s, on);
    else
        launch<BFloat>(s, on);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_pool(const PoolParams& s, Element element, void* stream) {
    return launch_for(s, element, stream);
}

const char* launch_quadrants(const QuadrantParams& s, Element element, void* stream) {
    return launch_for(s, element, stream);
}

}  // namespace dcd::cuda
