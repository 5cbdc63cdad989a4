// SPDX-License-Identifier: BSD-3-Clause
// Rows of channels against pixels of a contiguous map whose number is no multiple of the vector: the last
// few, which would leave most lanes of a vector empty (49 pixels are 3 vectors and 1), are done with lanes
// along the channels.
#pragma once

#include "dot.h"
#include "layer.h"

namespace dcd::DCD_ISA {

// At most this many pixels are thin. A single pixel, as in a classifier, always is.
template <class S>
struct Thin {
    static constexpr int64_t kPixels = S::kLanes >= 8 ? S::kLanes / 4 : 1;
    static int64_t of(int64_t pixels) {
        const int64_t rest = pixels % S::kLanes;
        return rest <= kPixels ? rest : 0;
    }
    using T = typename S::Scalar;
    static int64_t scratch_size(int64_t k, int64_t channels) {
        return Pieces<T>::rounded(kPixels * k) + 3 * Pieces<T>::rounded(kPixels * channels);
    }
};

// Pixels [first, first + count) of the block, whose rows are channels; a2_t [k2, channels] is a2 transposed.
template <class S>
static void multiply_thin(const Block<typename S::Scalar>& s, int64_t channels, int64_t first, int64_t count,
                          const typename S::Scalar* a2_t, int64_t a2_t_row, typename S::Scalar* memory) {
    using T = typename S::Scalar;
    Pieces<T> pieces(memory);
    T* x = pieces.take(Thin<S>::kPixels * s.k);  // [pixels, k]
    T* sums = pieces.take(Thin<S>::kPixels * channels);
    T* skip = pieces.take(Thin<S>::kPixels * channels);
    T* out = pieces.take(Thin<S>::kPixels * channels);
    for (int64_t k = 0; k < s.k; ++k)
        for (int64_t p = 0; p < count; ++p) x[p * s.k + k] = s.b[k * s.b_k + first + p];
    if (s.a_k == 1) {
        dot<S>(x, s.k, count, s.a, s.a_row, channels, s.k, false, sums, channels);
    } else {
        Block<T> product;
        product.a = x, product.a_row = s.k, product.a_k = 1;
        product.b = s.a, product.b_k = s.a_k, product.k = s.k;
        product.c = sums, product.c_row = channels;
        multiply<S>(product, count, channels);
    }
    Block<T> finish;
    finish.along_lanes = true;
    finish.init = sums, finish.init_row = channels;
    finish.scale = s.scale, finish.bias = s.bias;
    if (s.k2) {
        finish.a2 = s.b2 + first, finish.a2_row = 1, finish.a2_k = s.b2_k;
        finish.b2 = a2_t, finish.b2_k = a2_t_row, finish.k2 = s.k2;
    }
    if (s.residual) {
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t p = 0; p < count; ++p)
                skip[p * channels + c] = s.residual[c * s.residual_row + first + p];
        finish.residual = skip, finish.residual_row = channels;
    }
    finish.c = out, finish.c_row = channels;
    finish.activation = s.activation;
    multiply<S>(finish, count, channels);
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t p = 0; p < count; ++p) s.c[c * s.c_row + first + p] = out[p * channels + c];
}

// All pixels of the block: whole vectors by multiply(), the rest as above.
template <class S>
static void multiply_channel_rows(const Block<typename S::Scalar>& s, int64_t channels, int64_t pixels,
                                  const typename S::Scalar* a2_t, int64_t a2_t_row,
                                  typename S::Scalar* memory) {
    const int64_t thin = s.k > 0 ? Thin<S>::of(pixels) : 0;
    if (pixels > thin) multiply<S>(s, channels, pixels - thin);
    if (thin) multiply_thin<S>(s, channels, pixels - thin, thin, a2_t, a2_t_row, memory);
}

}  // namespace dcd::DCD_ISA
