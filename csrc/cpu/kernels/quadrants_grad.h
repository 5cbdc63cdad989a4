// SPDX-License-Identifier: BSD-3-Clause
// The gradient of the sums over the four bins of 2x2 pooling: every pixel has that of its bin, those that
// bins share have their sum. The image is written once.
#pragma once

#include "channel_sums.h"

namespace dcd::DCD_ISA {
namespace pool {

template <class S>
static inline void fill(typename S::Scalar* to, typename S::Scalar value, int64_t count) {
    constexpr int64_t W = S::kLanes;
    const auto x = S::set1(value);
    int64_t i = 0;
    for (; i + W <= count; i += W) S::store(to + i, x);
    if (i < count) S::store_first(to + i, x, static_cast<int>(count - i));
}

// f(y, above, below) for each row: the tiles whose top and bottom bins it is in, -1 for none.
template <class T, class F>
static inline void each_row(const QuadrantsGradParams<T>& s, const F& f) {
    const Bins down(s.height);
    const auto tile = [&](int64_t row) { return s.tiles == 1 ? 0 : row / s.tile_rows; };
    for (int64_t y = 0; y < s.height; ++y)
        f(y, y < down.length ? tile(y) : -1, y >= down.begin[1] ? tile(y - down.begin[1]) : -1);
}

template <class S>
static void spread_plane(const QuadrantsGradParams<typename S::Scalar>& s, const typename S::Scalar* grad,
                         typename S::Scalar* plane) {  // grad: of this channel in the first tile
    using T = typename S::Scalar;
    const int64_t tile = s.channels * kStreams, half = s.width / 2;
    each_row(s, [&](int64_t y, int64_t above, int64_t below) {
        T left = T(0), right = T(0);
        if (above >= 0) left += grad[above * tile], right += grad[above * tile + 1];
        if (below >= 0) left += grad[below * tile + 2], right += grad[below * tile + 3];
        T* row = plane + y * s.width;
        fill<S>(row, left, half);
        if (s.width % 2) row[half] = left + right;
        fill<S>(row + s.width - half, right, half);
    });
}

// Of channels that lie side by side.
template <class S>
static void spread_pixels(const QuadrantsGradParams<typename S::Scalar>& s, const typename S::Scalar* grad,
                          typename S::Scalar* image, int64_t pixel) {
    using T = typename S::Scalar;
    const int64_t tile = s.channels * kStreams, half = s.width / 2, c = s.channels;
    T* side[3];  // left, middle, right
    T* memory = static_cast<T*>(scratch(3 * c * static_cast<int64_t>(sizeof(T))));
    for (int i = 0; i < 3; ++i) side[i] = memory + i * c;
    int64_t known_above = -2, known_below = -2;
    each_row(s, [&](int64_t y, int64_t above, int64_t below) {
        if (above != known_above || below != known_below) {
            known_above = above, known_below = below;
            for (int64_t i = 0; i < c; ++i) {
                T left = T(0), right = T(0);
                if (above >= 0) left += grad[above * tile + 4 * i], right += grad[above * tile + 4 * i + 1];
                if (below >= 0)
                    left += grad[below * tile + 4 * i + 2], right += grad[below * tile + 4 * i + 3];
                side[0][i] = left, side[1][i] = left + right, side[2][i] = right;
            }
        }
        for (int64_t x = 0; x < s.width; ++x) {
            const T* from = side[x < half ? 0 : x < s.width - half ? 1 : 2];
            T* to = image + (y * s.width + x) * pixel;
            constexpr int64_t W = S::kLanes;
            int64_t i = 0;
            for (; i + W <= c; i += W) S::store(to + i, S::load(from + i));
            if (i < c) {
                const int rest = static_cast<int>(c - i);
                S::store_first(to + i, S::load_first(from + i, rest), rest);
            }
        }
    });
}

}  // namespace pool

template <class S>
static void quadrants_grad(const QuadrantsGradParams<typename S::Scalar>& s, const Runtime& given) {
    const bool alone = s.batch * s.channels * s.height * s.width < pool::kWorthThreads;
    const Runtime runtime = alone ? Runtime{nullptr, 1} : given;
    const int64_t sums = s.tiles * s.channels * pool::kStreams;
    const Map<typename S::Scalar>& to = s.d_input;
    if (s.channels_last) {
        parallel(runtime, s.batch, [&](int64_t n) {
            pool::spread_pixels<S>(s, s.grad + n * sums, to.data + n * to.sample, to.pixel);
        });
        return;
    }
    parallel(runtime, s.batch * s.channels, [&](int64_t task) {
        const int64_t n = task / s.channels, c = task % s.channels;
        pool::spread_plane<S>(s, s.grad + n * sums + c * pool::kStreams,
                              to.data + n * to.sample + c * to.channel);
    });
}

}  // namespace dcd::DCD_ISA
