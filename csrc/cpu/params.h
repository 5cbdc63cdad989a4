// SPDX-License-Identifier: BSD-3-Clause
// What a kernel is told: plain pointers, sizes and strides (in elements), nothing of torch.
#pragma once

#include <cstdint>

#include "../branch_codes.h"

namespace dcd {

enum Activation : int { kNone = 0, kRelu = 1, kRelu6 = 2, kSilu = 3, kHardswish = 4 };

// The threads that a kernel may use: torch's pool behind a function pointer, or the caller alone.
struct Runtime {
    using Body = void (*)(int64_t begin, int64_t end, void* context);
    void (*parallel_for)(int64_t begin, int64_t end, Body body, void* context);
    int64_t threads;
};

// A tensor (N, C, pixels) whose spatial dimensions collapse into one.
template <class T>
struct Map {
    T* data = nullptr;
    int64_t sample = 0, channel = 0, pixel = 0;  // strides
};

// y = act(W_n x + bias + residual), W_n = diag(lam_n) W0 + P Phi_n Q^T   (paper Eq. 6; blocks: Eq. 7)
// S is the type of its sums and coefficients.
template <class T, class S = T>
struct PointwiseParams {
    int64_t batch, in_channels, out_channels, pixels;
    bool channels_last;      // the layout of every map below
    int64_t latent, blocks;  // latent channels of one block; latent = 0: no dynamic residual
    Map<const T> input;      // [N, Ci, P]
    const T* weight;         // [Co, Ci]
    const T* p;              // [Co, L]
    const S* phi;            // [N, B, L, L]
    const T* q;              // [Ci, L]
    const S* lam;            // [N, Co] or null
    const S* bias;           // [Co] (bias_sample = 0), [N, Co] or null
    int64_t bias_sample;
    Map<const T> residual;  // [N, Co, P] or null
    Map<T> output;          // [N, Co, P]
    int activation;
    const T* packed;  // weight, p and q as pack() leaves them, which then are null; or null
};

// Gradients of the same, given G = dy behind the activation. A null pointer is a gradient nobody asked for.
template <class T>
struct PointwiseGradParams {
    int64_t batch, in_channels, out_channels, pixels;
    bool channels_last;  // the layout of every map below
    int64_t latent, blocks;
    Map<const T> grad;   // [N, Co, P]
    Map<const T> input;  // [N, Ci, P]
    const T* weight;     // [Co, Ci]
    const T* p;          // [Co, L]
    const T* phi;        // [N, B, L, L]
    const T* q;          // [Ci, L]
    const T* lam;        // [N, Co] or null
    Map<T> d_input;      // [N, Ci, P]
    T* d_weight;         // [Co, Ci]
    T* d_p;              // [Co, L]
    T* d_phi;            // [N, B, L, L]
    T* d_q;              // [Ci, L]
    T* d_lam;            // [N, Co]
};

// y = act(lam r + P Phi Q^T x + bias + residual), r a static output of somebody else's. q null: x is the
// latent.
template <class T>
struct ApplyParams {
    int64_t batch, in_channels, out_channels, pixels;
    bool channels_last;  // the layout of every map below
    int64_t latent, blocks;
    Map<const T> fixed;  // [N, Co, P], the static output r
    Map<const T> input;  // [N, Ci, P]
    const T* p;          // [Co, L]
    const T* phi;        // [N, B, L, L]; q null: [N, L, Ci]
    const T* q;          // [Ci, L] or null
    const T* lam;        // [N, Co] or null
    const T* bias;       // [Co] (bias_sample = 0), [N, Co] or null
    int64_t bias_sample;
    Map<const T> residual;  // [N, Co, P] or null
    Map<T> output;          // [N, Co, P]
    int activation;
};

template <class T>
struct ApplyGradParams {
    int64_t batch, in_channels, out_channels, pixels;
    bool channels_last;  // the layout of every map below
    int64_t latent, blocks;
    Map<const T> grad;   // [N, Co, P]
    Map<const T> fixed;  // [N, Co, P]
    Map<const T> input;  // [N, Ci, P]
    const T* p;          // [Co, L]
    const T* phi;        // [N, B, L, L]; q null: [N, L, Ci]
    const T* q;          // [Ci, L] or null
    const T* lam;        // [N, Co] or null
    Map<T> d_fixed;      // [N, Co, P]
    Map<T> d_input;      // [N, Ci, P]
    T* d_p;              // [Co, L]
    T* d_phi;            // like phi
    T* d_q;              // [Ci, L]
    T* d_lam;            // [N, Co]
};

// Per sample, over its pixels and with z = Q^T x: mean E[z], covariance E[(z - mean)(z - mean)^T].
template <class T>
struct MomentsParams {
    int64_t batch, in_channels, latent, pixels;
    bool channels_last;  // the layout of input
    Map<const T> input;  // [N, Ci, P]
    const T* q;          // [Ci, L]
    T* mean;             // [N, L]
    T* covariance;       // [N, L, L]
};

// Gradients of the same. A null pointer is a gradient that nobody asked for, or gave.
template <class T>
struct MomentsGradParams {
    int64_t batch, in_channels, latent, pixels;
    bool channels_last;        // the layout of both maps
    Map<const T> input;        // [N, Ci, P]
    const T* q;                // [Ci, L]
    const T* mean;             // [N, L], the forward's
    const T* grad_mean;        // [N, L] or null
    const T* grad_covariance;  // [N, L, L] or null
    Map<T> d_input;            // [N, Ci, P]
    T* d_q;                    // [Ci, L]
};

// Depthwise convolution of rank 1 to 3 (missing dimensions have size 1), W_n = diag(lam_n) W0 + P Phi_n R^T
// (paper Eq. 8), Co = multiplier * Ci.
template <class T>
struct DepthwiseParams {
    int64_t batch, channels, multiplier;  // Ci; Co = channels * multiplier
    int64_t in_size[3], out_size[3], kernel[3], stride[3], padding[3], dilation[3];  // depth, height, width
    int64_t latent;  // L_k; 0: no dynamic residual
    const T* input;  // [N, Ci, D, H, W]
    int64_t input_sample, input_channel, input_spatial[3];
    const T* weight;  // [Co, taps]
    const T* p;       // [Co, L_k]
    const T* phi;     // [N, L_k, L_k]
    const T* r;       // [taps, L_k]
    const T* lam;     // [N, Co] or null
    const T* bias;    // [Co] (bias_sample = 0), [N, Co] or null
    int64_t bias_sample;
    const T* residual;  // [N, Co, D', H', W'] or null
    int64_t residual_sample, residual_channel, residual_spatial[3];
    T* output;  // [N, Co, D', H', W']
    int64_t output_sample, output_channel, output_spatial[3];
    int activation;
};

// Gradients of the same, given G. The forward's fields keep their meaning; bias, residual, output, activation
// unused.
template <class T>
struct DepthwiseGradParams {
    DepthwiseParams<T> forward;
    const T* grad;  // [N, Co, D', H', W']
    int64_t grad_sample, grad_channel, grad_spatial[3];
    T* d_input;  // [N, Ci, D, H, W]; every element is written
    int64_t d_input_sample, d_input_channel, d_input_spatial[3];
    T* d_weight;  // [Co, taps]
    T* d_p;       // [Co, L_k]
    T* d_phi;     // [N, L_k, L_k]
    T* d_r;       // [taps, L_k]
    T* d_lam;     // [N, Co]
};

// Partial sums of every channel over the pixels, or over the four bins of adaptive pooling to 2x2.
template <class T>
struct ChannelSumsParams {
    int64_t batch, channels, pixels;
    bool channels_last;
    bool quadrants;
    int64_t height, width;     // of the image that has quadrants
    int64_t tiles, tile_size;  // pixels of a tile; with quadrants, rows of each bin
    Map<const T> input;        // [N, C, P]
    T* sums;                   // [N, tiles, C] or [N, tiles, C, 4]
};

// The gradient of the sums over quadrants, spread over the image.
template <class T>
struct QuadrantsGradParams {
    int64_t batch, channels, height, width;
    bool channels_last;
    int64_t tiles, tile_rows;  // one tile: its gradient is that of all of them
    const T* grad;             // [N, tiles, C, 4]
    Map<T> d_input;            // [N, C, H·W]
};

// With x = scale · sum over tiles:  h = gate(squeeze x),  lam = act(lam_weight h),  phi = phi_weight h
template <class T>
struct BranchParams {
    int64_t batch, tiles, inputs, hidden;
    int64_t lam_channels, others;  // numbers of lambda and of Phi; either may be 0
    const T* sums;                 // [N, tiles, I]
    T scale;
    const T* squeeze;       // [S, I]
    const T* squeeze_bias;  // [S] or null
    const T* gate;          // [S, S], with kGateSE
    const T* gate_bias;     // [S] or null
    const T* lam_weight;    // [lam_channels, S]
    const T* lam_bias;      // [lam_channels] or null
    const T* phi_weight;    // [others, S]
    const T* phi_bias;      // [others] or null
    T* lam;                 // [N, lam_channels]
    T* phi;                 // [N, others]
    int gate_code, lam_code;
};

// Gradients of the same; a null pointer is one that nobody asked for.
template <class T>
struct BranchGradParams {
    BranchParams<T> forward;  // its lam and phi unused
    const T* lam;             // [N, lam_channels], what the forward gave
    const T* d_lam;           // [N, lam_channels], or null for zero
    const T* d_phi;           // [N, others], or null for zero
    T* d_sums;                // [N, I]: that of every tile
    T* d_squeeze;             // each like its parameter
    T* d_squeeze_bias;
    T* d_gate;
    T* d_gate_bias;
    T* d_lam_weight;
    T* d_lam_bias;
    T* d_phi_weight;
    T* d_phi_bias;
};

}  // namespace dcd
