// SPDX-License-Identifier: BSD-3-Clause
// The table of kernels that every instruction set fills, and the choice among them.
#pragma once

#include "../network.h"
#include "latent_map.h"
#include "mixed.h"
#include "norm_act.h"
#include "params.h"

namespace dcd {

// The register blocks of an instruction set's products.
struct TileSizes {
    int64_t lanes;                        // of a vector
    int64_t panel_rows, panel_lanes;      // packed weights, channels_last: pixels x output channels
    int64_t channel_rows, channel_lanes;  // contiguous maps: output channels x pixels
};

template <class T>
struct Kernels {
    TileSizes tiles;
    void (*pointwise)(const PointwiseParams<T>&, const Runtime&);
    void (*pointwise_grad)(const PointwiseGradParams<T>&, const Runtime&);
    void (*apply)(const ApplyParams<T>&, const Runtime&);
    void (*apply_grad)(const ApplyGradParams<T>&, const Runtime&);
    void (*moments)(const MomentsParams<T>&, const Runtime&);
    void (*moments_grad)(const MomentsGradParams<T>&, const Runtime&);
    void (*depthwise)(const DepthwiseParams<T>&, const Runtime&);
    void (*depthwise_grad)(const DepthwiseGradParams<T>&, const Runtime&);
    void (*channel_sums)(const ChannelSumsParams<T>&, const Runtime&);
    void (*quadrants_grad)(const QuadrantsGradParams<T>&, const Runtime&);
    void (*branch)(const BranchParams<T>&, const Runtime&);
    void (*branch_grad)(const BranchGradParams<T>&, const Runtime&);
    void (*latent_map)(const LatentMapParams<T>&, const Runtime&);
    void (*latent_map_grad)(const LatentMapGradParams<T>&, const Runtime&);
    void (*norm_act)(const NormActParams<T>&, const Runtime&);
    void (*norm_act_grad)(const NormActGradParams<T>&, const Runtime&);
};

// One X-macro row an instruction set: name, what it asks of the machine. Best first. It declares the tables
// here and drives the dispatcher, `info` and the tests; CMakeLists.txt compiles kernels_<name>.cpp with its
// flags.
#if defined(DCD_X86)
#    define DCD_INSTRUCTION_SETS(X)                                                               \
        X(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&      \
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && \
                      avx2_usable())                                                              \
        X(avx2, avx2_usable())                                                                    \
        X(baseline, true)
#else
#    define DCD_INSTRUCTION_SETS(X) X(baseline, true)
#endif

#define DCD_DECLARE(name, usable)                              \
    namespace name {                                           \
    extern const Kernels<float> kernels_float;                 \
    void run_network(const NetworkCall&, const Runtime&);      \
    void run_network_bf16(const NetworkCall&, const Runtime&); \
    extern const MixedKernels mixed;                           \
    }
DCD_INSTRUCTION_SETS(DCD_DECLARE)
#undef DCD_DECLARE
namespace baseline {
extern const Kernels<double> kernels_double;  // gradcheck's: the same algebra in double precision
}

// dispatch.cpp
const char* instruction_set();               // the one in use
bool set_instruction_set(const char* name);  // false: unknown here or not supported by this CPU
bool supports_instruction_set(const char* name);
template <class T>
const Kernels<T>& kernels();
void run_network(const NetworkCall& call, const Runtime& runtime);
const MixedKernels& widened_kernels();                                      // bf16 through fp32 tiles
void run_widened_network(const NetworkCall& call, const Runtime& runtime);  // likewise
// mixed_dispatch.cpp
void run_network_bf16(const NetworkCall& call, const Runtime& runtime);

}  // namespace dcd
