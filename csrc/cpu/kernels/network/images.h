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
static void pool(const Image<Stored<S>>& image, int64_t planes, int64_t bins, float* output) {
    using T = Stored<S>;
    constexpr int W = S::kLanes;
    constexpr int64_t kRows = 14;  // that are summed up before they are added to the others
    for (int64_t c = 0; c < planes; ++c)
        for (int64_t by = 0; by < bins; ++by)
            for (int64_t bx = 0; bx < bins; ++bx) {
                const int64_t y0 = by * image.height / bins, y1 = ((by + 1) * image.height + bins - 1) / bins;
                const int64_t x0 = bx * image.width / bins, x1 = ((bx + 1) * image.width + bins - 1) / bins;
                float* to = output + ((by * bins + bx) * planes + c) * kBlock;
                Means means(to, 0, 1);
                for (int64_t y = y0; y < y1; y += kRows) {
                    const int64_t end = smaller(y1, y + kRows);
                    for (int v = 0; v < kBlock / W; ++v) {
                        auto total = S::zero();
                        for (int64_t i = y; i < end; ++i) {
                            // four sums at a time
                            const T* row = image.data + c * image.plane + i * image.row + v * W;
                            auto a = S::zero(), b = S::zero(), d = S::zero(), e = S::zero();
                            int64_t x = x0;
                            for (; x + 4 <= x1; x += 4) {
                                const T* at = row + x * kBlock;
                                a = S::add(a, S::load(at)), b = S::add(b, S::load(at + kBlock));
                                d = S::add(d, S::load(at + 2 * kBlock));
                                e = S::add(e, S::load(at + 3 * kBlock));
                            }
                            for (; x < x1; ++x) a = S::add(a, S::load(row + x * kBlock));
                            total = S::add(total, S::add(S::add(a, b), S::add(d, e)));
                        }
                        float* sum = means.sums() + v * W;
                        S::store(sum, S::add(S::load(sum), total));
                    }
                    means.note((end - y) * (x1 - x0));
                }
                means.divide((y1 - y0) * (x1 - x0));
            }
}

template <class S>
static void max_pool(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t sample) {
    using T = Stored<S>;
    constexpr int W = S::kLanes;
    const Image<T> from = frame.image(s.input, sample), to = frame.image(s.output, sample);
    frame.clear_halo(s.output, sample);
    parallel(frame.runtime, planes_of(s.out_channels), [&](int64_t c) {
        for (int64_t y = 0; y < to.height; ++y)
            for (int64_t x = 0; x < to.width; ++x) {
                const int64_t top = y * s.stride_h - s.padding_h, left = x * s.stride_w - s.padding_w;
                const int64_t y0 = top < 0 ? 0 : top, y1 = smaller(top + s.kernel_h, from.height);
                const int64_t x0 = left < 0 ? 0 : left, x1 = smaller(left + s.kernel_w, from.width);
                auto most = pixel_of<S>([](int) { return S::set1(-std::numeric_limits<float>::infinity()); });
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

// to = act(a + b), or act(a) where b has no data
template <class S, class A, class B, class C>
static void add_rows(const Runtime& runtime, const NetworkStep& s, const Image<A>& a, const Image<B>& b,
                     const Image<C>& to) {
    const int activation = static_cast<int>(s.activation);
    parallel(runtime, planes_of(s.out_channels), [&](int64_t c) {
        for (int64_t y = 0; y < to.height; ++y) {
            const A* left = a.data + c * a.plane + y * a.row;
            const B* right = b.data ? b.data + c * b.plane + y * b.row : nullptr;
            C* out = to.data + c * to.plane + y * to.row;
            for (int64_t i = 0; i < to.width * kBlock; i += S::kLanes) {
                const auto value = S::load(left + i);
                S::store(out + i, activate<S>(right ? S::add(value, S::load(right + i)) : value, activation));
            }
        }
    });
}

template <class S>
static void add(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t sample) {
    frame.clear_halo(s.output, sample);
    frame.with_value(s.output, sample, [&](const auto& to) {
        frame.with_value(s.input, sample, [&](const auto& a) {
            // what is added is of the kind of the sum
            std::decay_t<decltype(to)> b{};
            if (s.skip >= 0)
                frame.with_value(s.skip, sample, [&](const auto& skip) {
                    if constexpr (std::is_same_v<decltype(skip), decltype(to)>) b = skip;
                });
            add_rows<S>(frame.runtime, s, a, b, to);
        });
    });
}

// The channels of a tensor in any layout, sixteen at a time.
template <class S>
static void import(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t sample) {
    using T = Stored<S>;
    const NetworkTensor& tensor = frame.call.inputs[s.tensor];
    const T* from = static_cast<const T*>(tensor.data) + (frame.first + sample) * tensor.sample;
    frame.clear_halo(s.output, sample);
    frame.with_value(s.output, sample, [&](const auto& to) {
        using Value = std::decay_t<decltype(*to.data)>;
        parallel(frame.runtime, planes_of(tensor.channels), [&](int64_t c) {
            const int64_t count = smaller(kBlock, tensor.channels - c * kBlock);
            for (int64_t y = 0; y < to.height; ++y)
                for (int64_t x = 0; x < to.width; ++x) {
                    Value* pixel = to.data + c * to.plane + y * to.row + x * kBlock;
                    const T* at = from + c * kBlock * tensor.channel + y * tensor.row + x * tensor.column;
                    for (int64_t i = 0; i < kBlock; ++i)
                        pixel[i] = i < count ? converted<Value>(at[i * tensor.channel]) : Value{};
                }
        });
    });
}

template <class S>
static void export_(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t sample) {
    using T = Stored<S>;
    const NetworkTensor& tensor = frame.call.outputs[s.tensor];
    T* to = static_cast<T*>(tensor.data) + (frame.first + sample) * tensor.sample;
    frame.with_value(s.input, sample, [&](const auto& from) {
        parallel(frame.runtime, planes_of(tensor.channels), [&](int64_t c) {
            const int64_t count = smaller(kBlock, tensor.channels - c * kBlock);
            for (int64_t y = 0; y < from.height; ++y)
                for (int64_t x = 0; x < from.width; ++x) {
                    const auto* pixel = from.data + c * from.plane + y * from.row + x * kBlock;
                    T* at = to + c * kBlock * tensor.channel + y * tensor.row + x * tensor.column;
                    for (int64_t i = 0; i < count; ++i) at[i * tensor.channel] = converted<T>(pixel[i]);
                }
        });
    });
}

}  // namespace dcd::DCD_ISA::net
