// SPDX-License-Identifier: BSD-3-Clause
// The dynamic branch: one launch, of clusters of blocks where the device has them.
#include <atomic>

#include "branch_body.h"
#include "machine.h"

namespace dcd::cuda {
namespace {

// What a block may have without being asked for more.
constexpr int64_t kPlainShared = 48 * 1024;
constexpr int kKnownDevices = 64;

// As many blocks of a processor as the registers of this kernel allow without spills.
template <class E, int SAMPLES>
constexpr int kResident = SAMPLES <= (sizeof(E) == 4 ? 4 : 1) ? 2 : 1;

template <class E, int SAMPLES>
__global__ void __launch_bounds__(kBranchThreads, kResident<E, SAMPLES>)
    branch_kernel(BranchParams s, BranchPlan plan) {
    extern __shared__ Four shared[];
    branch<E, SAMPLES>(Machine{plan.ranks}, s, plan, &shared[0].x);
}

// Clusters need a device that has them and code that was compiled for one: a later device may run older PTX.
template <class E>
bool can_cluster(int device, int major) {
    static std::atomic<int> known[kKnownDevices];  // 0: not asked yet
    if (major < 9) return false;
    if (device < kKnownDevices && known[device]) return known[device] == 2;
    cudaFuncAttributes attributes;
    const bool can =
        cudaFuncGetAttributes(&attributes, branch_kernel<E, 1>) == cudaSuccess && attributes.ptxVersion >= 90;
    if (!can) (void)cudaGetLastError();
    if (device < kKnownDevices) known[device] = can ? 2 : 1;
    return can;
}

template <class E>
cudaError_t describe(BranchDevice* found) {
    int device, major, shared;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&found->processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    found->shared_bytes = shared;
    found->clusters = can_cluster<E>(device, major);
    return cudaSuccess;
}

template <class E, int SAMPLES>
cudaError_t launch(const BranchParams& s, const BranchPlan& plan, cudaStream_t stream) {
    if (plan.shared_bytes > kPlainShared) {
        const cudaError_t error =
            cudaFuncSetAttribute(branch_kernel<E, SAMPLES>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(plan.shared_bytes));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(plan.ranks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.clusters * plan.ranks));
    config.blockDim = dim3(kBranchThreads);
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = plan.ranks > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, branch_kernel<E, SAMPLES>, s, plan);
}

template <class E>
cudaError_t launch_for(const BranchParams& s, cudaStream_t stream) {
    BranchDevice device{};
    const cudaError_t error = describe<E>(&device);
    if (error != cudaSuccess) return error;
    const BranchPlan plan = plan_branch(s, sizeof(E), device);
    switch (plan.samples) {
        case 1:
            return launch<E, 1>(s, plan, stream);
        case 4:
            return launch<E, 4>(s, plan, stream);
        case 8:
            return launch<E, 8>(s, plan, stream);
        default:
            return launch<E, 16>(s, plan, stream);
    }
}

}  // namespace

const char* launch_branch(const BranchParams& s, Element element, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    const cudaError_t error = element == Element::kFloat  ? launch_for<float>(s, on)
                              : element == Element::kHalf ? launch_for<Half>(s, on)
                                                          : launch_for<BFloat>(s, on);
    if (error == cudaSuccess) return nullptr;
    (void)cudaGetLastError();  // or the next launch would be taken for the one that failed
    return cudaGetErrorString(error);
}

}  // namespace dcd::cuda
