// SPDX-License-Identifier: BSD-3-Clause
// Depthwise convolution for taps so far apart that a window over what lies
// between them would be mostly padding: one tap of a row after another,
// straight from the input.
#pragma once

#include "depthwise_filters.h"

namespace dcd::DCD_ISA {
namespace dw {

// f(row of the input, tap) for each line of taps that output row (z, y) meets
// inside the input, by the element at column 0 and the number of the line's
// first tap.
template <class T, class F>
static inline void for_lines(const DepthwiseParams<T>& s, int64_t z, int64_t y, const F& f) {
    for (int64_t kz = 0, tap = 0; kz < s.kernel[0]; ++kz)
        for (int64_t ky = 0; ky < s.kernel[1]; ++ky, tap += s.kernel[2]) {
            const int64_t iz = z * s.stride[0] - s.padding[0] + kz * s.dilation[0];
            const int64_t iy = y * s.stride[1] - s.padding[1] + ky * s.dilation[1];
            if (iz >= 0 && iz < s.in_size[0] && iy >= 0 && iy < s.in_size[1])
                f(iz * s.input_spatial[0] + iy * s.input_spatial[1], tap);
        }
}

// The input column that the first output position inside reads.
template <class T>
static inline int64_t first_column(const DepthwiseParams<T>& s, const Range& range, int64_t kx) {
    return range.begin * s.stride[2] - s.padding[2] + kx * s.dilation[2];
}

// Takes any strides.
template <class S>
static void far_taps(const Conv<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    constexpr int W = S::kLanes;
    const int64_t m = s.multiplier, columns = s.out_size[2];
    const int64_t parts = task_share(runtime, s.batch, s.channels * m);
    parallel(runtime, s.batch * parts, [&](int64_t task) {
        const int64_t n = task / parts, part = task % parts;
        Filters<S> filters(s);
        Pieces<char> pieces(static_cast<char*>(scratch(filters.scratch_size() + bytes<T>(filters.pitch()) +
                                                       bytes<Range>(s.kernel[2]) + 2 * bytes<T>(columns))));
        filters.open(n, pieces);
        T* weights = take<T>(pieces, filters.pitch());
        Range* ranges = take<Range>(pieces, s.kernel[2]);
        T* sums = take<T>(pieces, columns);
        T* added = take<T>(pieces, columns);
        for (int64_t kx = 0; kx < s.kernel[2]; ++kx) ranges[kx] = inside(s, 2, kx);
        const auto row = [&](int64_t o, int64_t z, int64_t y) {
            const T* input = s.input + n * s.input_sample + o / m * s.input_channel;
            for (int64_t x = 0; x < columns; ++x) sums[x] = s.bias ? s.bias[n * s.bias_sample + o] : T(0);
            for_lines(s, z, y, [&](int64_t line, int64_t tap) {
                for (int64_t kx = 0; kx < s.kernel[2]; ++kx) {
                    const Range range = ranges[kx];
                    const int64_t first = first_column(s, range, kx);
                    for (int64_t x = range.begin; x < range.end; ++x)
                        sums[x] +=
                            weights[tap + kx] *
                            input[line + (first + (x - range.begin) * s.stride[2]) * s.input_spatial[2]];
                }
            });
            const T* residual =
                shifted(s.residual, n * s.residual_sample + o * s.residual_channel +
                                        z * s.residual_spatial[0] + y * s.residual_spatial[1]);
            for (int64_t x = 0; residual && x < columns; ++x) added[x] = residual[x * s.residual_spatial[2]];
            const Finish<T> how(s.activation, residual);
            for (int64_t x = 0; x < columns; x += W) {
                typename S::Vec one[1] = {load_up_to<S>(sums + x, columns - x)};
                finish<S>(how, one, sums + x, 0, residual ? added + x : nullptr, 0, columns - x);
            }
            T* out = s.output + n * s.output_sample + o * s.output_channel + z * s.output_spatial[0] +
                     y * s.output_spatial[1];
            for (int64_t x = 0; x < columns; ++x) out[x * s.output_spatial[2]] = sums[x];
        };
        const int64_t channels = s.channels * m;
        for (int64_t o = part * channels / parts; o < (part + 1) * channels / parts; ++o) {
            filters.channel(o, weights);
            for (int64_t z = 0; z < s.out_size[0]; ++z)
                for (int64_t y = 0; y < s.out_size[1]; ++y) row(o, z, y);
        }
    });
}

// sums[t] = sum over the output's pixels of grad times the input at tap t, both
// of one channel.
template <class T>
static void far_sums(const DepthwiseParams<T>& s, const T* input, const T* grad, const int64_t* grad_spatial,
                     T* sums /* [taps] */) {
    for (int64_t z = 0; z < s.out_size[0]; ++z)
        for (int64_t y = 0; y < s.out_size[1]; ++y)
            for_lines(s, z, y, [&](int64_t line, int64_t tap) {
                const T* g = grad + z * grad_spatial[0] + y * grad_spatial[1];
                for (int64_t kx = 0; kx < s.kernel[2]; ++kx) {
                    const Range range = inside(s, 2, kx);
                    const int64_t first = first_column(s, range, kx);
                    T sum = T(0);
                    for (int64_t x = range.begin; x < range.end; ++x)
                        sum += g[x * grad_spatial[2]] *
                               input[line + (first + (x - range.begin) * s.stride[2]) * s.input_spatial[2]];
                    sums[tap + kx] += sum;
                }
            });
}

}  // namespace dw
}  // namespace dcd::DCD_ISA
