// SPDX-License-Identifier: BSD-3-Clause
// Sums over the pixels of every channel, in tiles, and over the four bins of adaptive pooling to 2x2.
//
// Contiguous planes: four streams at a time, lanes along the row, so that one shuffle adds up the lanes of
// all four. They are four channels, or the four bins of one channel. Channels-last: lanes are channels.
// Either way a sum is taken of pieces of at most kPiece additions a lane, for a long fp32 sum loses digits.
#pragma once

#include "layer.h"

namespace dcd::DCD_ISA {
namespace pool {

constexpr int64_t kPiece = 64, kStreams = 4;

// Fewer numbers than this are summed before a second thread has woken up.
constexpr int64_t kWorthThreads = 64 * 1024;

// out[i] = sum over `rows` runs of `length` neighbours from from[i]
template <class S>
static inline void sum_streams(const typename S::Scalar* const (&from)[kStreams], int64_t rows, int64_t row,
                               int64_t length, typename S::Scalar* out) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    constexpr int W = S::kLanes;
    V total[kStreams], sum[kStreams], more[kStreams];
#pragma GCC unroll 4
    for (int i = 0; i < kStreams; ++i) total[i] = sum[i] = more[i] = S::zero();
    int64_t taken = 0;
    const auto fold = [&] {
#pragma GCC unroll 4
        for (int i = 0; i < kStreams; ++i) {
            total[i] = S::add(total[i], S::add(sum[i], more[i]));
            sum[i] = more[i] = S::zero();
        }
        taken = 0;
    };
    for (int64_t y = 0; y < rows; ++y) {
        const T* at[kStreams];
#pragma GCC unroll 4
        for (int i = 0; i < kStreams; ++i) at[i] = from[i] + y * row;
        int64_t x = 0;
        for (; x + 2 * W <= length; x += 2 * W) {
#pragma GCC unroll 4
            for (int i = 0; i < kStreams; ++i) {
                sum[i] = S::add(sum[i], S::load(at[i] + x));
                more[i] = S::add(more[i], S::load(at[i] + x + W));
            }
            if (++taken == kPiece) fold();
        }
        if (x + W <= length) {
#pragma GCC unroll 4
            for (int i = 0; i < kStreams; ++i) sum[i] = S::add(sum[i], S::load(at[i] + x));
            x += W;
        }
        if (x < length) {
            const int rest = static_cast<int>(length - x);
#pragma GCC unroll 4
            for (int i = 0; i < kStreams; ++i) more[i] = S::add(more[i], S::load_first(at[i] + x, rest));
        }
        if (++taken >= kPiece) fold();
    }
    fold();
    S::sum4(total[0], total[1], total[2], total[3], out);
}

// out[lane] = sum over `rows` runs of `length` pixels, for VECTORS vectors of channels, the last of which has
// `tail` when TAIL. The same sum of a channel wherever its block begins.
template <class S, int VECTORS, bool TAIL>
static inline void sum_pixels(const typename S::Scalar* from, int64_t rows, int64_t row, int64_t length,
                              int64_t pixel, int tail, typename S::Scalar* out) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    constexpr int W = S::kLanes, kPixels = VECTORS >= 8 ? 1 : VECTORS == 4 ? 2 : 4;
    const auto load = [tail](const T* p, int j) {
        return TAIL && j == VECTORS - 1 ? S::load_first(p + j * W, tail) : S::load(p + j * W);
    };
    V total[VECTORS], sum[kPixels][VECTORS];
    const auto clear = [&] {
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; ++j) sum[i][j] = S::zero();
    };
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) total[j] = S::zero();
    clear();
    int64_t taken = 0;
    const auto fold = [&] {
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) {
            if constexpr (kPixels == 4)
                sum[0][j] = S::add(S::add(sum[0][j], sum[1][j]), S::add(sum[2][j], sum[3][j]));
            if constexpr (kPixels == 2) sum[0][j] = S::add(sum[0][j], sum[1][j]);
            total[j] = S::add(total[j], sum[0][j]);
        }
        clear();
        taken = 0;
    };
    for (int64_t y = 0; y < rows; ++y) {
        const T* at = from + y * row;
        int64_t x = 0;
        for (; x + kPixels <= length; x += kPixels) {
#pragma GCC unroll 4
            for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; ++j) sum[i][j] = S::add(sum[i][j], load(at + i * pixel, j));
            at += kPixels * pixel;
            if (++taken == kPiece) fold();
        }
        for (; x < length; ++x, at += pixel)
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; ++j) sum[0][j] = S::add(sum[0][j], load(at, j));
        if (++taken >= kPiece) fold();
    }
    fold();
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j)
        if (TAIL && j == VECTORS - 1)
            S::store_first(out + j * W, total[j], tail);
        else
            S::store(out + j * W, total[j]);
}

// Of channels [0, count) at `from`, count at most 8 vectors.
template <class S>
static void sum_channels(const typename S::Scalar* from, int64_t count, int64_t rows, int64_t row,
                         int64_t length, int64_t pixel, typename S::Scalar* out) {
    constexpr int64_t W = S::kLanes;
    const auto run = [&](auto whole, auto partial, int64_t vectors) {
        const int64_t taken = least(count, vectors * W);
        const int tail = static_cast<int>(taken - (vectors - 1) * W);
        (tail == W ? whole : partial)(from, rows, row, length, pixel, tail, out);
        from += taken, out += taken, count -= taken;
    };
    while (count > 0) {
        const int64_t vectors = (count + W - 1) / W;
        if (vectors >= 8)
            run(sum_pixels<S, 8, false>, sum_pixels<S, 8, true>, 8);
        else if (vectors >= 4)
            run(sum_pixels<S, 4, false>, sum_pixels<S, 4, true>, 4);
        else if (vectors >= 2)
            run(sum_pixels<S, 2, false>, sum_pixels<S, 2, true>, 2);
        else
            run(sum_pixels<S, 1, false>, sum_pixels<S, 1, true>, 1);
    }
}

// Where the bins of an axis begin, and how long they are: on odd sizes they share the middle.
struct Bins {
    int64_t begin[2];
    int64_t length;
    explicit Bins(int64_t size) : begin{0, size / 2}, length((size + 1) / 2) {}
};

// One block of channels in one tile of one sample.
template <class S>
static void sum_block(const ChannelSumsParams<typename S::Scalar>& s, const typename S::Scalar* image,
                      bool along_channels, int64_t tile, int64_t c0, int64_t c1, typename S::Scalar* sums) {
    using T = typename S::Scalar;
    const int64_t channel = s.input.channel, pixel = s.input.pixel;
    if (!s.quadrants) {
        const int64_t p0 = least(tile * s.tile_size, s.pixels), p1 = least(p0 + s.tile_size, s.pixels);
        if (along_channels) {
            sum_channels<S>(image + c0 * channel + p0 * pixel, c1 - c0, 1, 0, p1 - p0, pixel, sums + c0);
            return;
        }
        for (int64_t c = c0; c < c1; c += kStreams) {
            const T* from[kStreams];
            for (int64_t i = 0; i < kStreams; ++i) from[i] = image + least(c + i, c1 - 1) * channel + p0;
            T out[kStreams];
            sum_streams<S>(from, 1, 0, p1 - p0, out);
            for (int64_t i = 0; i < least(kStreams, c1 - c); ++i) sums[c + i] = out[i];
        }
        return;
    }
    const Bins down(s.height), across(s.width);
    const int64_t y0 = least(tile * s.tile_size, down.length), y1 = least(y0 + s.tile_size, down.length);
    const auto corner = [&](int64_t bin) {
        return ((down.begin[bin / 2] + y0) * s.width + across.begin[bin % 2]) * pixel;
    };
    if (!along_channels) {
        for (int64_t c = c0; c < c1; ++c) {
            const T* from[kStreams];
            for (int64_t i = 0; i < kStreams; ++i) from[i] = image + c * channel + corner(i);
            sum_streams<S>(from, y1 - y0, s.width, across.length, sums + c * kStreams);
        }
        return;
    }
    T bins[kStreams][8 * S::kLanes];
    for (int64_t i = 0; i < kStreams; ++i)
        sum_channels<S>(image + c0 * channel + corner(i), c1 - c0, y1 - y0, s.width * pixel, across.length,
                        pixel, bins[i]);
    for (int64_t c = c0; c < c1; ++c)
        for (int64_t i = 0; i < kStreams; ++i) sums[c * kStreams + i] = bins[i][c - c0];
}

}  // namespace pool

template <class S>
static void channel_sums(const ChannelSumsParams<typename S::Scalar>& s, const Runtime& runtime) {
    // A single pixel is a column of channels in either layout.
    const bool along_channels = s.input.channel == 1 && (s.channels_last || s.pixels == 1);
    const int64_t block = along_channels ? 8 * S::kLanes : 16;
    const int64_t blocks = (s.channels + block - 1) / block;
    const bool alone = s.batch * s.channels * s.pixels < pool::kWorthThreads;
    parallel(alone ? Runtime{nullptr, 1} : runtime, s.batch * s.tiles * blocks, [&](int64_t task) {
        const int64_t n = task / (s.tiles * blocks), tile = task / blocks % s.tiles,
                      c0 = task % blocks * block;
        pool::sum_block<S>(s, s.input.data + n * s.input.sample, along_channels, tile, c0,
                           least(c0 + block, s.channels),
                           s.sums + (n * s.tiles + tile) * s.channels * (s.quadrants ? pool::kStreams : 1));
    });
}

}  // namespace dcd::DCD_ISA
