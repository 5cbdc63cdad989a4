// SPDX-License-Identifier: BSD-3-Clause
// The dynamic branch in one launch: what the kernel is told, and how its work is laid out.
//
// A cluster of blocks serves a few samples, so that the weights are read once for all of them. Its blocks
// share the work three times: each takes some columns of the squeeze FC (its partial products are added up
// through distributed shared memory), each then has all hidden units, and each takes some rows of the expand
// FC.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "elements.h"
#include "pool.h"

namespace dcd::cuda {

struct BranchParams {
    const float* sums;         // [N, T, I]
    const void* squeeze;       // [S, I]; all matrices and biases have one element type
    const void* squeeze_bias;  // [S] or null
    const void* gate;          // [S, S] or null: kGateSE alone has one
    const void* gate_bias;     // [S] or null
    const void* expand;        // [O, S]; with phi [lam_channels, S]
    const void* expand_bias;   // like expand's rows, or null
    const void* phi;           // [O - lam_channels, S], the other rows, or null
    const void* phi_bias;      // like phi's rows, or null
    float* lam;                // [N, lam_channels]
    float* others;             // [N, O - lam_channels]
    int64_t batch;             // N
    int tiles, inputs, hidden, outputs, lam_channels;  // T, I, S, O
    int gate_code, lam_code;
    float scale;  // of the sums: 1 / pixels
};

constexpr int kBranchThreads = 256;
constexpr int kBranchWarps = kBranchThreads / kWarp;
constexpr int kBranchMaxRanks = 8;  // blocks of a cluster: every device that has clusters takes so many
// A group of lanes multiplies so many rows of a matrix at a time: each vector is read once for all of them.
constexpr int kBranchRows = 4;
// Lanes of a group: a warp where rows are long and few (squeeze), less where they are short and many (gate,
// expand).
constexpr int kLongRow = kWarp, kShortRow = 8;

struct BranchPlan {
    int samples;        // of a cluster: 1, 4, 8 or 16
    int ranks;          // blocks of a cluster: 1, 2, 4 or 8
    int columns;        // of the squeeze FC, for each rank
    int rows;           // of the expand FC, for each rank
    int pooled_stride;  // numbers that a sample's pooled columns take in shared memory
    int hidden_stride;  // the same of its hidden units
    bool wide_squeeze, wide_gate, wide_expand;  // matrices whose rows can be read 16 bytes at a time
    int64_t clusters;
    int64_t shared_bytes;
};

// What the plan depends on beside the shape.
struct BranchDevice {
    int processors;        // streaming multiprocessors
    int64_t shared_bytes;  // of a block, at most
    bool clusters;
};

constexpr int64_t round_up(int64_t x, int64_t to) {
    return (x + to - 1) / to * to;
}

// Shared memory: pooled columns, partial hidden units, hidden units (and the gated ones), for each sample.
inline int64_t branch_shared_bytes(const BranchPlan& plan, int hidden, bool gated) {
    return int64_t{4} * plan.samples *
           (plan.pooled_stride + round_up(hidden, 4) + int64_t{plan.hidden_stride} * (gated ? 2 : 1));
}

inline BranchPlan plan_branch(const BranchParams& s, int element_size, const BranchDevice& device) {
    const int vector = 16 / element_size;
    const bool gated = s.gate_code == kGateSE;
    BranchPlan plan{};
    // 64 KB of fp32 weights are half a microsecond's reading for a block: below that, sharing costs more.
    plan.ranks = device.clusters ? kBranchMaxRanks : 1;
    while (plan.ranks > 1 && int64_t{s.hidden} * (s.inputs + s.outputs) < int64_t{16384} * plan.ranks)
        plan.ranks /= 2;
    plan.columns = static_cast<int>(round_up((s.inputs + plan.ranks - 1) / plan.ranks, 8));
    plan.rows = static_cast<int>(round_up((s.outputs + plan.ranks - 1) / plan.ranks, kBranchRows));
    plan.pooled_stride = static_cast<int>(round_up(plan.columns, kLongRow * vector));
    plan.hidden_stride = static_cast<int>(round_up(s.hidden, kShortRow * vector));
    const auto wide = [&](const void* matrix, int columns) {
        return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && columns % vector == 0;
    };
    plan.wide_squeeze = wide(s.squeeze, s.inputs);
    plan.wide_gate = gated && wide(s.gate, s.hidden);
    plan.wide_expand = wide(s.expand, s.hidden) && (!s.phi || wide(s.phi, s.hidden));
    // More samples a cluster only where there are more than the processors take at once.
    plan.samples = 1;
    for (const int samples : {4, 8, 16}) {
        BranchPlan larger = plan;
        larger.samples = samples;
        const int64_t blocks = (s.batch + plan.samples - 1) / plan.samples * plan.ranks;
        if (blocks > device.processors && branch_shared_bytes(larger, s.hidden, gated) <= device.shared_bytes)
            plan = larger;
    }
    plan.clusters = (s.batch + plan.samples - 1) / plan.samples;
    plan.shared_bytes = branch_shared_bytes(plan, s.hidden, gated);
    return plan;
}

// Starts the kernel on the given stream (a cudaStream_t) of the current device. Returns null, or what CUDA
// says.
const char* launch_branch(const BranchParams& s, Element element, void* stream);

}  // namespace dcd::cuda
