// SPDX-License-Identifier: BSD-3-Clause
// What the kernel of the latent's norms is told: z = Q^T x + b, and norm2(Phi norm1(z)) (+ norm1(z)) written
// as Phi' Q^T x + shift.
#pragma once

#include <cstdint>

namespace dcd {

// Where a norm takes mean and variance from. The codes are those of the op.
enum LatentStatistics : int {
    kNoNorm = 0,
    kRunningStatistics = 1,  // given
    kBatchStatistics = 2,    // a channel's, over all samples
    kGroupStatistics = 3,    // each sample's, over the channels of a group
    kLatentStatisticsEnd = 4,
};

// norm(z) = weight (z - mean) / sqrt(variance + eps) + bias
template <class T>
struct LatentNorm {
    int statistics;
    int64_t groups;
    double eps;
    const T* weight;            // [L] or null
    const T* bias;              // [L] or null
    const T* running_mean;      // [L], for running statistics
    const T* running_variance;  // [L]
};

template <class T>
struct LatentMapParams {
    int64_t batch, latent;
    const T* phi;         // [N, L, L]
    const T* mean;        // [N, L] of Q^T x; null: no norm takes moments
    const T* covariance;  // [N, L, L], symmetric
    LatentNorm<T> norms[2];
    const T* latent_bias;  // [L] or null: b
    bool residual;         // whether norm1(z) is added
    T* mapped;             // [N, L, L]: Phi'
    T* shift;              // [N, L]
    T* statistics;         // [2 k, L]: mean and biased variance of each of the k norms over the batch
};

// Gradients of the same; mapped, shift and statistics are unused. A null pointer is a gradient nobody asked
// for.
template <class T>
struct LatentMapGradParams {
    LatentMapParams<T> forward;
    const T* grad_mapped;  // [N, L, L] or null: zero
    const T* grad_shift;   // [N, L] or null: zero
    T* d_phi;              // [N, L, L]
    T* d_mean;             // [N, L]
    T* d_covariance;       // [N, L, L]
    T* d_weight[2];        // [L]
    T* d_bias[2];          // [L]
    T* d_latent_bias;      // [L]
};

}  // namespace dcd
