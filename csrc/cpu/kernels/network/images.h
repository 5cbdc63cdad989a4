// SPDX-License-Identifier: BSD-3-Clause
// Steps that move or pool images.
#pragma once

#include "frame.h"

namespace dcd::DCD_ISA::net {

template <class S>
using PixelVec = std::array<typename S::Vec, kBlock / S::kLanes>;

// f(v) for each vector of a pixel's sixteen channels
template <class S, class F>
__attribute__((always_inline)) static inline PixelVec<S> pixel_of(const F& f) {
    PixelVec<S> pixel;
    for (int v = 0; v < kBlock / S::kLanes; ++v) pixel[v] = f(v);
    return pixel;
}

// means of bins x bins regions, [bins, bins, planes, 16]; region i of an axis is [i size / bins, ceil((i + 1)
// size / bins)): on sizes that bins does not divide they overlap
template <class S>
static void pool(const Image<typename S::Scalar>& image, int64_t planes, int64_t bins,
                 typename S::Scalar* output) {
    using T = typename S::Scalar;
    constexpr int W = S::kLanes;
    for (int64_t c = 0; c < planes; ++c)
        for (int64_t by = 0; by < bins; ++by)
            for (int64_t bx = 0; bx < bins; ++bx) {
                const int64_t y0 = by * image.height / bins, y1 = ((by + 1) * image.height + bins - 1) / bins;
                const int64_t x0 = bx * image.width / bins, x1 = ((bx + 1) * image.width + bins - 1) / bins;
                auto total = pixel_of<S>([](int) { return S::zero(); });
                for (int64_t y = y0; y < y1; ++y) {
                    // sums of rows, so that not every pixel is added to the sum of all; four at a time
                    const T* row = image.data + c * image.plane + y * image.row;
                    for (int v = 0; v < kBlock / W; ++v) {
                        auto a = S::zero(), b = S::zero(), d = S::zero(), e = S::zero();
                        int64_t x = x0;
                        for (; x + 4 <= x1; x += 4) {
                            const T* at = row + x * kBlock + v * W;
                            a = S::add(a, S::load(at)), b = S::add(b, S::load(at + kBlock));
                            d = S::add(d, S::load(at + 2 * kBlock)), e = S::add(e, S::load(at + 3 * kBlock));
                        }
                        for (; x < x1; ++x) a = S::add(a, S::load(row + x * kBlock + v * W));
                        total[v] = S::add(total[v], S::add(S::add(a, b), S::add(d, e)));
                    }
                }
                T* to = output + ((by * bins + bx) * planes + c) * kBlock;
                const auto count = S::set1(static_cast<T>((y1 - y0) * (x1 - x0)));
                for (int v = 0; v < kBlock / W; ++v) S::store(to + v * W, S::div(total[v], count));
            }
}

template <class S>
static void max_pool(const Frame<typename S::Scalar>& frame, const NetworkStep& s, int64_t sample) {
    using T = typename S::Scalar;
    constexpr int W = S::kLanes;
    const Image<T> from = frame.image(s.input, sample), to = frame.image(s.output, sample);
    frame.clear_halo(s.output, sample);
    parallel(frame.runtime, planes_of(s.out_channels), [&](int64_t c) {
        for (int64_t y = 0; y < to.height; ++y)
            for (int64_t x = 0; x < to.width; ++x) {
                const int64_t top = y * s.stride_h - s.padding_h, left = x * s.stride_w - s.padding_w;
                const int64_t y0 = top < 0 ? 0 : top, y1 = smaller(top + s.kernel_h, from.height);
                const int64_t x0 = left < 0 ? 0 : left, x1 = smaller(left + s.kernel_w, from.width);
                auto most = pixel_of<S>([](int) { return S::set1(-std::numeric_limits<T>::infinity()); });
                for (int64_t i = y0; i < y1; ++i)
                    for (int64_t j = x0; j < x1; ++j) {
                        const T* at = from.data + c * from.plane + i * from.row + j * kBlock;
                        for (int v = 0; v < kBlock / W; ++v) {
                            const auto value = S::load(at + v * W), zero = S::zero();
                            // max keeps a NaN that it has seen, but takes no new one for larger: what is
                            // added is a zero, or the NaN
                            most[v] = S::add(S::max(value, most[v]), S::max(zero, S::min(zero, value)));
                        }
                    }
                for (int v = 0; v < kBlock / W; ++v)
                    S::store(to.data + c * to.plane + y * to.row + x * kBlock + v * W, most[v]);
            }
    });
}

template <class S>
static void add(const Frame<typename S::Scalar>& frame, const NetworkStep& s, int64_t sample) {
    using T = typename S::Scalar;
    const Image<T> a = frame.image(s.input, sample), b = frame.image(s.skip, sample),
                   to = frame.image(s.output, sample);
    frame.clear_halo(s.output, sample);
    parallel(frame.runtime, planes_of(s.out_channels), [&](int64_t c) {
        for (int64_t y = 0; y < to.height; ++y) {
            const T *left = a.data + c * a.plane + y * a.row, *right = b.data + c * b.plane + y * b.row;
            T* out = to.data + c * to.plane + y * to.row;
            for (int64_t i = 0; i < to.width * kBlock; i += S::kLanes)
                S::store(out + i, activate<S>(S::add(S::load(left + i), S::load(right + i)),
                                              static_cast<int>(s.activation)));
        }
    });
}

// The channels of a tensor in any layout, sixteen at a time.
template <class S>
static void import(const Frame<typename S::Scalar>& frame, const NetworkStep& s, int64_t sample) {
    using T = typename S::Scalar;
    const NetworkTensor& tensor = frame.call.inputs[s.tensor];
    const T* from = tensor.data + (frame.first + sample) * tensor.sample;
    const Image<T> to = frame.image(s.output, sample);
    frame.clear_halo(s.output, sample);
    parallel(frame.runtime, planes_of(tensor.channels), [&](int64_t c) {
        const int64_t count = smaller(kBlock, tensor.channels - c * kBlock);
        for (int64_t y = 0; y < to.height; ++y)
            for (int64_t x = 0; x < to.width; ++x) {
                T* pixel = to.data + c * to.plane + y * to.row + x * kBlock;
                const T* at = from + c * kBlock * tensor.channel + y * tensor.row + x * tensor.column;
                for (int64_t i = 0; i < kBlock; ++i) pixel[i] = i < count ? at[i * tensor.channel] : T(0);
            }
    });
}

template <class S>
static void export_(const Frame<typename S::Scalar>& frame, const NetworkStep& s, int64_t sample) {
    using T = typename S::Scalar;
    const NetworkTensor& tensor = frame.call.outputs[s.tensor];
    T* to = tensor.data + (frame.first + sample) * tensor.sample;
    const Image<T> from = frame.image(s.input, sample);
    parallel(frame.runtime, planes_of(tensor.channels), [&](int64_t c) {
        const int64_t count = smaller(kBlock, tensor.channels - c * kBlock);
        for (int64_t y = 0; y < from.height; ++y)
            for (int64_t x = 0; x < from.width; ++x) {
                const T* pixel = from.data + c * from.plane + y * from.row + x * kBlock;
                T* at = to + c * kBlock * tensor.channel + y * tensor.row + x * tensor.column;
                for (int64_t i = 0; i < count; ++i) at[i * tensor.channel] = pixel[i];
            }
    });
}

}  // namespace dcd::DCD_ISA::net
