// SPDX-License-Identifier: BSD-3-Clause
// What the depthwise kernels are told, and their launchers: plain pointers, sizes and strides, nothing of
// torch.
#pragma once

#include <cstdint>

#include "index.h"
#include "portable.h"

namespace dcd::cuda::dw {

// An image (N, C, H, W); strides in elements. Within a sample offsets fit 31 bits, samples may lie further
// apart.
struct Image {
    const void* data;
    int64_t sample;
    int channel, row, column;
    int height, width;
};

// Everything that W_n = diag(lam_n) W0 + P Phi_n R^T is formed from (paper Eq. 8).
struct Factors {
    int latent;        // L_k; 0: no dynamic residual
    bool flip;         // the taps in reverse order
    Parameter weight;  // [C, taps]
    Parameter p;       // [C, L_k]
    Parameter phi;     // [N, L_k, L_k]
    Parameter r;       // [taps, L_k]
    Parameter lam;     // [N, C] or null
};

// y = act(W_n * x + bias + residual), in one of the modes of index.h.
struct ConvolveParams {
    int64_t batch;
    int channels;
    int pad_rows, pad_columns;
    Tiling tiling;
    Factors factors;
    Image input;
    Image output;    // data is written
    Image residual;  // data null: none
    Parameter bias;  // [C] (bias_sample = 0), [N, C] or null
    int64_t bias_sample;
    bool output_pairs, residual_pairs;  // two neighbours are stored and loaded at once
    int activation;
};

// Partial sums of everything but the input's gradient, given G = dy behind the activation; see
// depthwise_sums.h. A null pointer is a gradient nobody asked for. One split has some samples and some tiles
// of each.
struct SumsParams {
    int64_t batch;
    int channels;
    int pad_rows, pad_columns;
    int sample_splits, tile_splits;
    Tiling tiling, grad_tiling;
    Factors factors;
    Image input;
    Image grad;
    float* d_weight;  // [splits, C, taps]
    float* d_p;       // [splits, C, L_k]
    float* d_r;       // [splits, groups, taps, L_k]
    float* d_phi;     // [tile_splits, groups, N, L_k, L_k]
    float* d_lam;     // [tile_splits, N, C]
};

// to[i] = the sum over s of from[s, i], always in the same order.
struct Reduction {
    const float* from;  // [count, size]
    int64_t size;
    int count;
    void* to;  // [size]
    int type;
    int64_t first_block;  // filled in by the launcher
};
constexpr int kReductions = 5;
struct ReduceParams {
    int used;
    Reduction each[kReductions];
};

// Bytes of a tile in shared memory, so that several blocks fit on any multiprocessor of compute
// capability 8.0 on.
constexpr int kTileBytes = 32 * 1024;
// Shared memory of a block that needs no permission by the driver.
constexpr int kSharedBytes = 48 * 1024;
constexpr int kLatentLimit = 48;  // what the sums of k = 7 still fit into 99 KB with

// Blocks whose registers shall fit on a multiprocessor at once: what hides the latency of memory.
template <int KERNEL>
constexpr int kConvolveBlocks = KERNEL == 3   ? 7
                                : KERNEL == 5 ? 4
                                              : 3;
template <int KERNEL>
constexpr int kSumsBlocks = KERNEL == 3   ? 7
                            : KERNEL == 5 ? 4
                                          : 2;

// Each starts its kernel on `stream` and returns the error code of the launch, 0 for success.
int convolve_float(const ConvolveParams& s, bool last, int kernel, Mode mode, void* stream);
int convolve_half(const ConvolveParams& s, bool last, int kernel, Mode mode, void* stream);
int convolve_bfloat(const ConvolveParams& s, bool last, int kernel, Mode mode, void* stream);
int sums_float(const SumsParams& s, bool last, int kernel, Mode mode, void* stream);
int sums_half(const SumsParams& s, bool last, int kernel, Mode mode, void* stream);
int sums_bfloat(const SumsParams& s, bool last, int kernel, Mode mode, void* stream);
int reduce(ReduceParams s, void* stream);

}  // namespace dcd::cuda::dw
