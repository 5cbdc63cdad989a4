// SPDX-License-Identifier: BSD-3-Clause
// Depthwise convolution with the lanes along the channels.
#pragma once

#include "depthwise_filters.h"

namespace dcd::DCD_ISA {
namespace dw {

// A line of the input that a row of output reads, at its first column, and the taps that it meets there.
template <class T>
struct Line {
    const T* input;
    const T* weights;
};

// A run of neighbouring output pixels of one row, for a block of channels.
template <class T>
struct Strip {
    // What all pixels share.
    int64_t weights_row;  // distance of neighbouring taps of a line
    int64_t channels;
    int64_t ahead;  // distance in the input to prefetch at, or 0
    const T* bias;  // [channels] or null
    Finish<T> how;
    // Of this run.
    const Line<T>* lines = nullptr;  // those inside the input
    int64_t line_count = 0;
    int64_t x = 0;                // input column of the first tap of the first pixel; may lie in the padding
    const T* residual = nullptr;  // the first pixel's, or null
    T* out = nullptr;

    Strip(int64_t weights_row, int64_t channels, int64_t ahead, const T* bias, const Finish<T>& how)
        : weights_row(weights_row), channels(channels), ahead(ahead), bias(bias), how(how) {}
};

// X pixels. KX = 3: a kernel three wide with dilation 1 and stride STEP, where neighbouring pixels share what
// they read; KX = 0: any. EDGE: some tap may fall outside the input's width.
template <class S, int X, int KX, int STEP, bool EDGE, bool TAIL>
__attribute__((always_inline)) static inline void pixels_block(const Conv<typename S::Scalar>& s,
                                                               const Strip<typename S::Scalar>& strip,
                                                               int64_t lane) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    const int64_t count = TAIL ? strip.channels - lane : S::kLanes, pixel = s.input_spatial[2];
    const int64_t low = -strip.x,
                  high = s.in_size[2] - strip.x;  // columns inside, counted from the first tap
    const auto load = [count](const T* p) {
        return TAIL ? S::load_first(p, static_cast<int>(count)) : S::load(p);
    };
    V sum[X];
    const V bias = strip.bias ? load(strip.bias + lane) : S::zero();
#pragma GCC unroll 8
    for (int i = 0; i < X; ++i) sum[i] = bias;
    for (int64_t r = 0; r < strip.line_count; ++r) {
        const T* from = strip.lines[r].input + strip.x * pixel + lane;
        const T* w = strip.lines[r].weights + lane;
        if constexpr (KX == 3) {
            const bool last = strip.ahead && r + STEP >= strip.line_count;
            const V w0 = S::load(w), w1 = S::load(w + strip.weights_row),
                    w2 = S::load(w + 2 * strip.weights_row);
#pragma GCC unroll 17
            for (int j = 0; j < (X - 1) * STEP + 3; ++j, from = pinned(from + pixel)) {
                if (EDGE && (j < low || j >= high)) continue;
                const V x = pinned(load(from));
                if (last) S::prefetch(from + strip.ahead);
#pragma GCC unroll 8
                for (int i = 0; i < X; ++i) {
                    const int t = j - i * STEP;
                    if (t >= 0 && t <= 2) sum[i] = S::fma(t == 0 ? w0 : t == 1 ? w1 : w2, x, sum[i]);
                }
            }
        } else {
            for (int64_t kx = 0; kx < s.kernel[2]; ++kx, w += strip.weights_row) {
                const V tap = S::load(w);
                int64_t column = kx * s.dilation[2];
#pragma GCC unroll 8
                for (int i = 0; i < X; ++i, column += s.stride[2])
                    if (!EDGE || (column >= low && column < high))
                        sum[i] = S::fma(tap, load(from + column * pixel), sum[i]);
            }
        }
    }
    finish<S>(strip.how, sum, strip.out + lane, s.output_spatial[2], shifted(strip.residual, lane),
              s.residual_spatial[2], count);
}

template <class S, int X, int KX, int STEP>
static void pixels_tail(const Conv<typename S::Scalar>& s, const Strip<typename S::Scalar>& strip,
                        int64_t lane) {
    pixels_block<S, X, KX, STEP, true, true>(s, strip, lane);
}

// The last vector of channels always minds the edge: one function less to compile, for one in many vectors.
template <class S, int X, int KX, int STEP, bool EDGE>
static void pixels(const Conv<typename S::Scalar>& s, const Strip<typename S::Scalar>& strip) {
    int64_t lane = 0;
    for (; lane + S::kLanes <= strip.channels; lane += S::kLanes)
        pixels_block<S, X, KX, STEP, EDGE, false>(s, strip, lane);
    if (lane < strip.channels) pixels_tail<S, X, KX, STEP>(s, strip, lane);
}

// The widths of a run that there are functions for.
static inline int64_t strip_width(int64_t columns) {
    return columns >= 8 ? 8 : columns == 7 ? 7 : columns >= 4 ? 4 : 1;
}

template <class S, int KX, int STEP>
static auto pixels_of(int64_t width, bool edge) -> decltype(&pixels<S, 1, KX, STEP, true>) {
    if (width == 8) return edge ? &pixels<S, 8, KX, STEP, true> : &pixels<S, 8, KX, STEP, false>;
    if (width == 7) return edge ? &pixels<S, 7, KX, STEP, true> : &pixels<S, 7, KX, STEP, false>;
    if (width == 4) return edge ? &pixels<S, 4, KX, STEP, true> : &pixels<S, 4, KX, STEP, false>;
    return &pixels<S, 1, KX, STEP, true>;
}

// Output rows [begin, end), counted over depth and height, of one sample and block of channels, whose maps
// start at input and output; strip comes with what all pixels share.
template <class S>
static void last_rows(const Conv<typename S::Scalar>& s, const typename S::Scalar* input,
                      typename S::Scalar* output, const typename S::Scalar* residual,
                      const typename S::Scalar* weights /* [taps, weights_row] */,
                      Strip<typename S::Scalar> strip, Line<typename S::Scalar>* lines, int64_t begin,
                      int64_t end) {
    const int64_t nx = s.out_size[2], stride = s.stride[2], reach = (s.kernel[2] - 1) * s.dilation[2];
    const bool three = s.kernel[2] == 3 && s.dilation[2] == 1 && stride <= 2;
    const int64_t width = share(nx, 8);
    strip.lines = lines;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t z = row / s.out_size[1], y = row % s.out_size[1];
        const auto* w = weights;
        strip.line_count = 0;
        for (int64_t kz = 0; kz < s.kernel[0]; ++kz)
            for (int64_t ky = 0; ky < s.kernel[1]; ++ky, w += s.kernel[2] * strip.weights_row) {
                const int64_t iz = z * s.stride[0] - s.padding[0] + kz * s.dilation[0];
                const int64_t iy = y * s.stride[1] - s.padding[1] + ky * s.dilation[1];
                if (iz >= 0 && iz < s.in_size[0] && iy >= 0 && iy < s.in_size[1])
                    lines[strip.line_count++] = {input + iz * s.input_spatial[0] + iy * s.input_spatial[1],
                                                 w};
            }
        for (int64_t x = 0, count; x < nx; x += count) {
            count = strip_width(least(width, nx - x));
            strip.x = x * stride - s.padding[2];
            strip.out = output + z * s.output_spatial[0] + y * s.output_spatial[1] + x * s.output_spatial[2];
            strip.residual = shifted(
                residual, z * s.residual_spatial[0] + y * s.residual_spatial[1] + x * s.residual_spatial[2]);
            const bool edge = strip.x < 0 || strip.x + (count - 1) * stride + reach >= s.in_size[2];
            const auto run = !three        ? pixels_of<S, 0, 1>(count, edge)
                             : stride == 1 ? pixels_of<S, 3, 1>(count, edge)
                                           : pixels_of<S, 3, 2>(count, edge);
            run(s, strip);
        }
    }
}

// Lanes along the channels, which are neighbours in memory; multiplier 1.
template <class S>
static void channels_last(const Conv<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    constexpr int W = S::kLanes;
    const int64_t taps = s.taps(), rows = s.out_size[0] * s.out_size[1],
                  most_lines = s.kernel[0] * s.kernel[1];
    // Long enough runs of channels for the prefetcher, short enough for the lines that rows share to stay in
    // L1.
    const int64_t fit = most(6 * 1024 / (most(taps, 1) * static_cast<int64_t>(sizeof(T))) / W * W, 64);
    const int64_t block = round_up(share(s.channels, fit), W);
    const int64_t blocks = ceil_div(s.channels, block);
    const int64_t bands = task_share(runtime, s.batch * blocks, rows);
    // Maps that do not stay in L2 are worth a prefetch of the lines that the next row of output is the first
    // to read.
    const int64_t in_bytes =
        s.in_size[0] * s.in_size[1] * s.in_size[2] * s.channels * static_cast<int64_t>(sizeof(T));
    const int64_t ahead = in_bytes * s.batch > 1024 * 1024 ? s.stride[1] * s.input_spatial[1] : 0;
    parallel(runtime, s.batch * blocks * bands, [&](int64_t task) {
        const int64_t band = task % bands, c0 = task / bands % blocks * block, n = task / bands / blocks;
        const int64_t channels = least(block, s.channels - c0);
        Filters<S> filters(s);
        Pieces<char> pieces(static_cast<char*>(
            scratch(filters.scratch_size() + bytes<T>(taps * block) + bytes<Line<T>>(most_lines))));
        filters.open(n, pieces);
        T* weights = take<T>(pieces, taps * block);
        for (int64_t c = 0; c < channels; c += W)
            filters.channels(c0 + c, least(W, channels - c), weights + c, block);
        const Strip<T> strip(block, channels, ahead, shifted(s.bias, n * s.bias_sample + c0),
                             Finish<T>(s.activation, s.residual));
        last_rows<S>(s, s.input + n * s.input_sample + c0, s.output + n * s.output_sample + c0,
                     shifted(s.residual, n * s.residual_sample + c0), weights, strip,
                     take<Line<T>>(pieces, most_lines), band * rows / bands, (band + 1) * rows / bands);
    });
}

// out[i, k] = in[k, i] for `count` <= W rows of length n and rows of W of the output.
template <class S>
static void rows_to_lanes(const typename S::Scalar* in, int64_t in_row, int64_t count, int64_t n,
                          typename S::Scalar* out) {
    constexpr int W = S::kLanes;
    for (int64_t i = 0; i < n; i += W) {
        typename S::Vec a[W];
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) a[k] = k < count ? load_up_to<S>(in + k * in_row + i, n - i) : S::zero();
        transpose_square<S>(a);
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k)
            if (i + k < n) S::store(out + (i + k) * W, a[k]);
    }
}

// out[k, i] = in[i, k], the reverse.
template <class S>
static void lanes_to_rows(const typename S::Scalar* in, int64_t count, int64_t n, typename S::Scalar* out,
                          int64_t out_row) {
    constexpr int W = S::kLanes;
    for (int64_t i = 0; i < n; i += W) {
        typename S::Vec a[W];
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) a[k] = i + k < n ? S::load(in + (i + k) * W) : S::zero();
        transpose_square<S>(a);
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k)
            if (k < count) store_up_to<S>(out + k * out_row + i, a[k], n - i);
    }
}

// Contiguous planes whose rows fill at most half a vector: W of them at a time are transposed, convolved with
// the lanes along the channels, and transposed back.
template <class S>
static void narrow_planes(const Conv<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    constexpr int W = S::kLanes;
    const int64_t taps = s.taps(), most_lines = s.kernel[0] * s.kernel[1];
    const int64_t in_pixels = s.in_size[0] * s.in_size[1] * s.in_size[2];
    const int64_t out_pixels = s.out_size[0] * s.out_size[1] * s.out_size[2];
    Conv<T> lanes = s;
    for (int64_t i = 2, in = W, out = W; i >= 0; in *= s.in_size[i], out *= s.out_size[i], --i)
        lanes.input_spatial[i] = in, lanes.output_spatial[i] = lanes.residual_spatial[i] = out;
    const int64_t groups = ceil_div(s.channels, W), parts = task_share(runtime, s.batch, groups);
    parallel(runtime, s.batch * parts, [&](int64_t task) {
        const int64_t n = task / parts, part = task % parts;
        Filters<S> filters(s);
        Pieces<char> pieces(static_cast<char*>(scratch(filters.scratch_size() + bytes<T>(taps * W) +
                                                       bytes<Line<T>>(most_lines) + bytes<T>(in_pixels * W) +
                                                       2 * bytes<T>(out_pixels * W))));
        filters.open(n, pieces);
        T* weights = take<T>(pieces, taps * W);
        Line<T>* lines = take<Line<T>>(pieces, most_lines);
        T* x = take<T>(pieces, in_pixels * W);
        T* y = take<T>(pieces, out_pixels * W);
        T* added = take<T>(pieces, out_pixels * W);
        for (int64_t g = part * groups / parts; g < (part + 1) * groups / parts; ++g) {
            const int64_t c = g * W, count = least(W, s.channels - c);
            filters.channels(c, count, weights, W);
            rows_to_lanes<S>(s.input + n * s.input_sample + c * s.input_channel, s.input_channel, count,
                             in_pixels, x);
            if (s.residual)
                rows_to_lanes<S>(s.residual + n * s.residual_sample + c * s.residual_channel,
                                 s.residual_channel, count, out_pixels, added);
            const Strip<T> strip(W, count, 0, shifted(s.bias, n * s.bias_sample + c),
                                 Finish<T>(s.activation, s.residual));
            last_rows<S>(lanes, x, y, s.residual ? added : nullptr, weights, strip, lines, 0,
                         s.out_size[0] * s.out_size[1]);
            lanes_to_rows<S>(y, count, out_pixels, s.output + n * s.output_sample + c * s.output_channel,
                             s.output_channel);
        }
    });
}

}  // namespace dw
}  // namespace dcd::DCD_ISA
