// SPDX-License-Identifier: BSD-3-Clause
// A whole network as data: values (images and vectors) and the steps that make them. dcd_kernels::network
// runs it; dcd_kernels/inference writes it, with the names below, which _core hands to Python.
#pragma once

#include <cstdint>

namespace dcd {

// Images lie in memory as [N, planes, H, W, 16]: sixteen neighbouring channels are neighbours, whatever the
// instruction set, and the last plane is filled up with zeros. Weights follow: [planes of Co, taps, Ci, 16].
// A network is in fp32, or in bf16 (`narrow`): then images are bf16, and weights that are summed over
// channels are pairs of bf16, [planes of Co, taps, (Ci + 1) / 2, 16, 2], one pair in the place of a number;
// all else is fp32, vectors, lam and Phi, biases and the filters of depthwise layers, and so are all sums.
constexpr int64_t kBlock = 16;

inline int64_t planes_of(int64_t channels) {
    return (channels + kBlock - 1) / kBlock;
}

// Two neighbours along the axis that is summed over, zero where there is no second one.
struct Pair {
    uint16_t first, second;
};
static_assert(sizeof(Pair) == sizeof(float));

// Numbers that `channels` of a weight take in the direction of the sum.
inline int64_t depth_of(int64_t channels, bool narrow) {
    return narrow ? (channels + 1) / 2 : channels;
}

enum StepKind : int64_t {
    kStem,       // y = act(W * x + bias), x a tensor of few channels in any layout
    kDense,      // y = act(lam (W * x + static_bias) + P Phi (Q^T x + latent_bias) + bias + skip), groups = 1
    kDepthwise,  // y = act(lam W * x + (P Phi R^T) * x + bias); x may be the output of a streamed step
    kLinear,     // as kDense for vectors
    kBranch,     // lam = act(expand gate(squeeze x)), Phi likewise, from a pooled x
    kPool,       // means over bins x bins regions
    kMaxPool,
    kAdd,     // y = act(x + skip); an image from a vector, or the other way round, where there is no skip
    kImport,  // from a tensor
    kExport,  // to a tensor
    kStepKinds
};

#define DCD_STEP_KINDS(X) \
    X(stem) X(dense) X(depthwise) X(linear) X(branch) X(pool) X(max_pool) X(add) X(import) X(export)

// What is -1 is absent. Values and steps are meant by number, constants by where they begin in `constants`.
// clang-format off
#define DCD_STEP_FIELDS(X) \
    X(kind) \
    X(stage) /* steps of one stage, if several, run sample by sample */ \
    X(streamed) /* 1: not run by itself but row by row, by the depthwise step that reads it */ \
    X(producer) /* the streamed step that makes a depthwise step's input */ \
    X(tensor) /* which of the op's inputs or outputs kStem, kImport and kExport mean */ \
    X(rank) /* kExport: dimensions of the output, 4 for an image, 2 for a vector */ \
    X(input) /* value */ \
    X(output) /* value */ \
    X(skip) /* value that is added */ \
    X(coefficients) /* value: lam [planes Co, 16], Phi [blocks, planes L (row), L (column), 16 (row)], and \
                       before its columns L_k where there is a latent kernel */ \
    X(pooled) /* value: the output's means, [bins, bins, planes, 16] */ \
    X(bins) \
    X(in_channels) \
    X(out_channels) \
    X(kernel_h) \
    X(kernel_w) \
    X(stride_h) \
    X(stride_w) \
    X(padding_h) \
    X(padding_w) \
    X(dilation_h) \
    X(dilation_w) \
    X(activation) /* Activation */ \
    X(winograd) /* 1: a 3 x 3 dense layer of stride 1 by F(2 x 2, 3 x 3), of whose weight these are the points */ \
    X(weight) /* [planes Co, taps or kPoints, Ci, 16]; depthwise [planes C, taps, 16] */ \
    X(static_bias) /* [planes Co, 16], scaled by lam */ \
    X(bias) /* [planes Co, 16] */ \
    X(lam_channels) /* in whole planes; 0: no lam */ \
    X(latent) /* L, of one block; 0: no dynamic residual */ \
    X(blocks) /* kDense: diagonal blocks of the residual */ \
    X(latent_kernel) /* kDense: L_k of joint fusion; 0: the residual is at the centre tap */ \
    X(p) /* [planes Co, L of all blocks, each but the last in whole planes, 16], 0 outside of the block */ \
    X(q) /* [blocks, planes L, Ci, 16], 0 outside of the block; depthwise R, [planes L, taps, 16] */ \
    X(r) /* of joint fusion: [taps, L_k] */ \
    X(latent_bias) /* [planes L, 16] */ \
    X(hidden) /* kBranch: units behind the squeeze */ \
    X(squeeze) /* like kLinear's weight, as are gate and expand */ \
    X(squeeze_bias) /* like kLinear's bias */ \
    X(gate) \
    X(gate_bias) \
    X(expand) \
    X(expand_bias) \
    X(gate_code) /* Gate */ \
    X(lam_code) /* LamActivation */

#define DCD_VALUE_FIELDS(X) \
    X(channels) /* of a vector: its length */ \
    X(halo_h) /* zeros around an image, for whoever reads beyond it */ \
    X(halo_w) \
    X(slot) /* which piece of memory; values that are never needed at the same time may share */ \
    X(shared) /* 1: all samples have one place, as only one is worked on at a time */ \
    X(vector) /* 1: numbers of fp32 in a network of bf16 too */
// clang-format on

#define DCD_FIELD(name) int64_t name;
struct NetworkStep {
    DCD_STEP_FIELDS(DCD_FIELD)
};
struct NetworkValue {
    DCD_VALUE_FIELDS(DCD_FIELD)
};
#undef DCD_FIELD

// What the op got: int64 numbers, [values, steps, slots, narrow], then each value's and each step's fields.
struct NetworkProgram {
    const NetworkValue* values;
    const NetworkStep* steps;
    int64_t value_count, step_count, slot_count;
    int64_t narrow;  // 1: a network in bf16
};

// A tensor [N, C, H, W] or [N, C] of the op's, in any layout, of fp32 or bf16 like the network.
struct NetworkTensor {
    void* data;
    int64_t channels, height, width;
    int64_t sample, channel, row, column;  // strides
};

// A value, once the sizes of the inputs are known: its size and where it begins in the memory of a share.
struct NetworkPlace {
    int64_t height, width;
    int64_t begin;   // bytes; streamed values have no place
    int64_t sample;  // elements of one sample
};

struct NetworkCall {
    NetworkProgram program;
    const float* constants;
    int64_t batch;
    int64_t shares;        // parts of the batch, each run by one thread in memory of its own
    int64_t memory, work;  // bytes: of all values of a share, and of what steps need besides
    const NetworkTensor* inputs;
    const NetworkTensor* outputs;
    const NetworkPlace* places;  // of each value
};

// Products that F(2 x 2, 3 x 3) takes for a tile of 2 x 2 outputs.
constexpr int64_t kPoints = 16;

// What fits into the kernels' fixed arrays.
constexpr int64_t kMaxTaps = 64, kMaxStemTaps = 256, kMaxKernel = 16;

// cpu/network.cpp
int64_t window_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation);
// Numbers that the latent of one sample takes, before and behind Phi, and what else is needed to make it.
int64_t latent_size(const NetworkStep& step, const NetworkPlace& input, const NetworkPlace& output);

// Latent channels of all blocks side by side, each but the last in whole planes.
inline int64_t latent_width(const NetworkStep& step) {
    return (step.blocks - 1) * planes_of(step.latent) * kBlock + step.latent;
}

}  // namespace dcd
