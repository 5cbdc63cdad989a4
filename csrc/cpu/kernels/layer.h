// SPDX-License-Identifier: BSD-3-Clause
// What all samples of a call share: the static weight, its factors and their transposes; and how work is
// split.
#pragma once

#include "../plan.h"
#include "threads.h"

namespace dcd::DCD_ISA {

template <class T>
static inline T least(T a, T b) {
    return a < b ? a : b;
}
template <class T>
static inline T most(T a, T b) {
    return a > b ? a : b;
}

// out[c, r] = in[r, c]
template <class S>
static void transpose(const typename S::Scalar* in, int64_t in_row, int64_t rows, int64_t columns,
                      typename S::Scalar* out, int64_t out_row) {
    constexpr int64_t W = S::kLanes;
    for (int64_t r0 = 0; r0 < rows; r0 += W)
        for (int64_t c0 = 0; c0 < columns; c0 += W) {
            const int64_t r1 = least(r0 + W, rows), c1 = least(c0 + W, columns);
            if (r1 - r0 == W && c1 - c0 == W) {
                S::transpose(in + r0 * in_row + c0, in_row, out + c0 * out_row + r0, out_row);
                continue;
            }
            for (int64_t c = c0; c < c1; ++c)
                for (int64_t r = r0; r < r1; ++r) out[c * out_row + r] = in[r * in_row + c];
        }
}

// One layer: what all samples share.
template <class T>
struct Layer {
    int64_t in_channels, out_channels, latent, blocks;
    const T* weight;  // [Co, Ci]; null: the static part comes as the block's init
    const T* p;       // [Co, L]
    const T* q;       // [Ci, L]; null: x is the latent itself and Phi is [L, Ci]
    // Transposes, made once a call where a layout needs them.
    const T* weight_t = nullptr;  // [Ci, Co]; null: not worth making, see long_rows
    const T* p_t = nullptr;       // [L, Co]
    const T* q_t = nullptr;       // [L, Ci]
    int64_t in_block() const { return in_channels / blocks; }
    int64_t out_block() const { return out_channels / blocks; }
    int64_t all_latent() const { return latent * blocks; }
    int64_t phi_size() const { return q ? blocks * latent * latent : latent * in_channels; }  // of one sample
};

// f(block, first, last) for each diagonal block that [c0, c1) meets.
template <class F>
static inline void for_blocks(int64_t c0, int64_t c1, int64_t size, const F& f) {
    for (int64_t first = c0; first < c1;) {
        const int64_t b = first / size, last = least(c1, (b + 1) * size);
        f(b, first, last);
        first = last;
    }
}

// f(inside, first, last) for the parts of [c0, c1) before, inside and behind diagonal block b.
template <class F>
static inline void for_block_and_rest(int64_t b, int64_t size, int64_t c0, int64_t c1, const F& f) {
    const int64_t start = least(most(b * size, c0), c1), end = least(most((b + 1) * size, c0), c1);
    if (c0 < start) f(false, c0, start);
    if (start < end) f(true, start, end);
    if (end < c1) f(false, end, c1);
}

// Rows of W0 so long that a dot product of each with a pixel costs less than the transpose of W0.
static inline bool long_rows(int64_t in_channels) {
    return in_channels >= 512;
}

// Output channels of a sample are split only when there are fewer samples than threads, for every part
// repeats the latent projection.
static inline int64_t channel_parts(int64_t batch, int64_t threads, int64_t channels, int64_t least_part) {
    if (batch % threads == 0 || batch >= 4 * threads) return 1;
    return most<int64_t>(1, least(threads, channels / least_part));
}

// The layer's transposed factors, in memory shared by all tasks.
template <class S>
static Layer<typename S::Scalar> make_layer(int64_t in_channels, int64_t out_channels, int64_t latent,
                                            int64_t blocks, const typename S::Scalar* weight,
                                            const typename S::Scalar* p, const typename S::Scalar* q,
                                            bool need_weight_t) {
    using T = typename S::Scalar;
    Layer<T> layer{in_channels, out_channels, latent, blocks, weight, p, q};
    const int64_t weight_size = need_weight_t ? in_channels * out_channels : 0;
    Pieces<T> shared(
        static_cast<T*>(scratch((Pieces<T>::rounded(weight_size) + Pieces<T>::rounded(latent * in_channels) +
                                 Pieces<T>::rounded(latent * out_channels) + 1) *
                                    sizeof(T),
                                Scratch::kShared)));
    if (need_weight_t) {
        T* t = shared.take(weight_size);
        transpose<S>(weight, in_channels, out_channels, in_channels, t, out_channels);
        layer.weight_t = t;
    }
    if (latent) {
        T* t = shared.take(latent * in_channels);
        if (q) transpose<S>(q, latent, in_channels, latent, t, in_channels);
        layer.q_t = t;
        t = shared.take(latent * out_channels);
        transpose<S>(p, latent, out_channels, latent, t, out_channels);
        layer.p_t = t;
    }
    return layer;
}

}  // namespace dcd::DCD_ISA
