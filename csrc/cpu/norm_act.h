// SPDX-License-Identifier: BSD-3-Clause
// What the kernels of a norm by the statistics of the batch, with the activation behind it, are told.
#pragma once

#include <cstdint>

#include "params.h"

namespace dcd {

// y = act(weight (x - mean) / sqrt(variance + eps) + bias), mean and (biased) variance those of a channel
// over all samples and pixels.
template <class T>
struct NormActParams {
    int64_t batch, channels, pixels;
    bool channels_last;  // the layout of both maps
    Map<const T> input;  // [N, C, P]
    const T* weight;     // [C] or null: 1
    const T* bias;       // [C] or null: 0
    double eps;
    int activation;
    Map<T> output;  // [N, C, P]
    T* mean;        // [C]
    T* variance;    // [C]
};

// Gradients of the same; output, mean and variance of `forward` are unused. A null pointer is a gradient that
// nobody asked for.
template <class T>
struct NormActGradParams {
    NormActParams<T> forward;
    const T* mean;      // [C], the forward's
    const T* variance;  // [C]
    Map<const T> grad;  // [N, C, P], in the layout of the input
    Map<T> d_input;     // [N, C, P]
    T* d_weight;        // [C]
    T* d_bias;          // [C]
};

}  // namespace dcd
