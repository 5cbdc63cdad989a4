// SPDX-License-Identifier: BSD-3-Clause
// Depthwise convolution of one sample, two planes of channels at a time. Its input comes row by row into a
// ring of as many rows as the kernel is high: computed on the spot by the streamed step before it, whose
// output, the largest of the network, is then never in memory; or copied from a value.
#pragma once

#include "dense.h"
#include "stem.h"

namespace dcd::DCD_ISA::net {

// One row of the output, one plane: the lines that it reads, at the first column of the padding.
template <class T>
struct DepthwiseRow {
    const T* const* lines;
    int64_t line_count;
    const float* weight;  // [taps, 16]
    const float* bias;    // [16] or null
    T* output;
    float* sums;  // [16], gets the row's sums added, or null
    int64_t width, kernel, stride, dilation;
    int activation;
};

// PIXELS outputs from column x on. KERNEL 3: three taps next to each other, whose inputs neighbours share;
// 0: any.
template <class S, int PIXELS, int KERNEL, int STRIDE>
static void depthwise_pixels(const DepthwiseRow<Stored<S>>& s, int64_t x, typename S::Vec* sums) {
    using T = Stored<S>;
    using V = typename S::Vec;
    constexpr int W = S::kLanes, VECTORS = TileLimits<S>::kVectors;
    float low, high;
    const bool clamp = is_clamp(s.activation, low, high);
    const V lower = S::set1(low), upper = S::set1(high);
    for (int v = 0; v < VECTORS; ++v) {
        V acc[PIXELS];
        const V start = s.bias ? S::load(s.bias + v * W) : S::zero();
#pragma GCC unroll 16
        for (int i = 0; i < PIXELS; ++i) acc[i] = start;
        for (int64_t line = 0; line < s.line_count; ++line) {
            const T* from = s.lines[line] + x * s.stride * kBlock + v * W;
            const float* w = s.weight + line * s.kernel * kBlock + v * W;
            if constexpr (KERNEL == 3) {
                const V w0 = S::load(w), w1 = S::load(w + kBlock), w2 = S::load(w + 2 * kBlock);
#pragma GCC unroll 32
                for (int j = 0; j < (PIXELS - 1) * STRIDE + 3; ++j) {
                    const V value = S::load(from + j * kBlock);
#pragma GCC unroll 16
                    for (int i = 0; i < PIXELS; ++i) {
                        const int tap = j - i * STRIDE;
                        if (tap == 0) acc[i] = S::fma(w0, value, acc[i]);
                        if (tap == 1) acc[i] = S::fma(w1, value, acc[i]);
                        if (tap == 2) acc[i] = S::fma(w2, value, acc[i]);
                    }
                }
            } else {
                for (int64_t tap = 0; tap < s.kernel; ++tap, w += kBlock) {
                    const V weight = S::load(w);
                    const T* at = from + tap * s.dilation * kBlock;
#pragma GCC unroll 16
                    for (int i = 0; i < PIXELS; ++i)
                        acc[i] = S::fma(weight, S::load(at + i * s.stride * kBlock), acc[i]);
                }
            }
        }
        V total = S::zero();  // of the tile first: less is rounded
#pragma GCC unroll 16
        for (int i = 0; i < PIXELS; ++i) {
            const V y = clamp ? S::min(upper, S::max(lower, acc[i])) : activate<S>(acc[i], s.activation);
            S::store(s.output + (x + i) * kBlock + v * W, y);
            total = S::add(total, y);
        }
        sums[v] = S::add(sums[v], total);
    }
}

template <class S>
using RunDepthwise = void (*)(const DepthwiseRow<Stored<S>>&, int64_t, typename S::Vec*);

template <class S, int KERNEL, int STRIDE, int... PIXELS>
constexpr std::array<RunDepthwise<S>, sizeof...(PIXELS)> depthwise_runs(
    std::integer_sequence<int, PIXELS...>) {
    return {&depthwise_pixels<S, PIXELS + 1, KERNEL, STRIDE>...};
}

template <class S>
static void depthwise_row(const DepthwiseRow<Stored<S>>& s) {
    constexpr int kPixels = S::kRegisters == 32 ? 14 : 8, VECTORS = TileLimits<S>::kVectors;
    using Counts = std::make_integer_sequence<int, kPixels>;
    static constexpr auto kNear = depthwise_runs<S, 3, 1>(Counts{}),
                          kStrided = depthwise_runs<S, 3, 2>(Counts{}),
                          kAny = depthwise_runs<S, 0, 0>(Counts{});
    const bool three = s.kernel == 3 && s.dilation == 1;
    const RunDepthwise<S>* run = three && s.stride == 1   ? kNear.data()
                                 : three && s.stride == 2 ? kStrided.data()
                                                          : kAny.data();
    typename S::Vec sums[VECTORS];
    for (int v = 0; v < VECTORS; ++v) sums[v] = S::zero();
    const int64_t tiles = (s.width + kPixels - 1) / kPixels;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t x = t * s.width / tiles;
        run[(t + 1) * s.width / tiles - x - 1](s, x, sums);
    }
    if (s.sums)
        for (int v = 0; v < VECTORS; ++v)
            S::store(s.sums + v * S::kLanes, S::add(S::load(s.sums + v * S::kLanes), sums[v]));
}

// The rows of the input, as they are asked for, for some planes at a time.
template <class S>
class Ring {
  public:
    using T = Stored<S>;
    Ring(const NetworkStep& s, const NetworkPlace& input)
        : rows_((s.kernel_h - 1) * s.dilation_h + 1), height_(input.height), pad_(s.padding_w * kBlock) {
        image_.width = input.width, image_.height = rows_;
        image_.row = (input.width + 2 * s.padding_w) * kBlock;
        image_.plane = rows_ * image_.row;
    }
    // The rows of each plane, and a row of zeros.
    int64_t size(int64_t planes) const { return planes * image_.plane + image_.row; }

    void open(T* memory, int64_t planes) {
        zeros_ = memory;
        Frame<T>::fill(zeros_, image_.row);
        image_.data = memory + image_.row;
        for (int64_t r = 0; r < planes * rows_; ++r) {
            Frame<T>::fill(image_.data + r * image_.row, pad_);
            Frame<T>::fill(image_.data + (r + 1) * image_.row - pad_, pad_);
        }
        next_ = 0;
    }
    // Rows up to `last`, each by produce(y, image of one row).
    template <class F>
    void fill_to(int64_t last, const F& produce) {
        for (last = smaller(last, height_ - 1); next_ <= last; ++next_) {
            Image<T> row = image_;
            row.data += next_ % rows_ * image_.row + pad_;
            produce(next_, row);
        }
    }
    // No row before `first` will be read.
    void skip_to(int64_t first) { next_ = next_ < first ? first : next_; }
    const T* line(int64_t plane, int64_t y) const {
        return y < 0 || y >= height_ ? zeros_ : image_.data + plane * image_.plane + y % rows_ * image_.row;
    }

  private:
    const int64_t rows_, height_, pad_;
    Image<T> image_;
    T* zeros_ = nullptr;
    int64_t next_ = 0;
};

// True: the means of the output, if it has any, came with it.
template <class S>
static bool depthwise(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t sample) {
    using T = Stored<S>;
    const NetworkStep* producer = s.producer < 0 ? nullptr : &frame.call.program.steps[s.producer];
    std::optional<Dense<S>> dense;
    std::optional<Stem<S>> stem;
    Image<T> from;
    if (!producer)
        from = frame.image(s.input, sample);
    else if (producer->kind == kDense)
        dense.emplace(frame, *producer, sample);
    else
        stem.emplace(frame, *producer, sample);
    const Image<T> to = frame.image(s.output, sample);
    const int64_t taps = s.kernel_h * s.kernel_w, planes = planes_of(s.out_channels),
                  at_once = TileLimits<S>::kPlanes;
    const float* coefficients = frame.vector(s.coefficients, sample);
    const float* lam = s.lam_channels ? coefficients : nullptr;
    const Synthesis<float> filters{
        frame.constant(s.q),
        frame.constant(s.weight),
        frame.constant(s.p),
        taps,
        s.latent,
        lam,
        coefficients ? coefficients + (s.lam_channels ? planes * kBlock : 0) : nullptr,
        s.out_channels,
        1,
        s.latent * kBlock};
    float* pooled = s.bins == 1 ? frame.vector(s.pooled, sample) : nullptr;
    const Coming<Weight<S>> coming(frame, s);
    frame.clear_halo(s.output, sample);
    parallel(frame.runtime, (planes + at_once - 1) / at_once, [&](int64_t task) {
        const int64_t plane = task * at_once, count = smaller(at_once, planes - plane);
        Ring<S> ring(s, frame.call.places[s.input]);
        const int64_t filter_size = Synthesis<float>::scratch_size(s.latent, taps, count);
        const int64_t size = floats<T>(ring.size(count)) + filter_size +
                             (dense ? Dense<S>::scratch_size(*producer, count) : 0) +
                             (stem ? floats<T>(stem->scratch_size()) : 0);
        float* memory = static_cast<float*>(scratch(size * static_cast<int64_t>(sizeof(float))));
        ring.open(reinterpret_cast<T*>(memory), count);
        float* fused = memory + floats<T>(ring.size(count));
        float* own = fused + count * s.latent * kBlock;
        float* rest = fused + filter_size;
        const float* weight = filters.fixed + plane * taps * kBlock;
        if (s.latent) {
            synthesise<S>(filters, plane, count, fused, own);
            weight = own;
        } else if (lam) {
            for (int64_t c = 0; c < count; ++c)
                for (int64_t i = 0; i < taps * kBlock; ++i)
                    own[c * taps * kBlock + i] =
                        weight[c * taps * kBlock + i] * lam[(plane + c) * kBlock + i % kBlock];
            weight = own;
        }
        Product<Weight<S>> product;
        if (dense) {
            product = dense->open(plane, count, rest);
            coming.share(product, task, (planes + at_once - 1) / at_once);
        }
        const auto produce = [&](int64_t y, Image<T> row) {
            row.data -= y * row.row;  // the streamed step counts its rows itself
            if (dense) {
                dense->rows(product, plane, count, y, y + 1, row, nullptr, 0, 0);
            } else if (stem) {
                stem->rows(plane, count, y, y + 1, row, reinterpret_cast<T*>(rest));
            } else {
                for (int64_t c = 0; c < count; ++c)
                    std::memcpy(row.data + y * row.row + c * row.plane,
                                from.data + (plane + c) * from.plane + y * from.row,
                                static_cast<size_t>(from.width * kBlock) * sizeof(T));
            }
        };
        Means means(pooled, plane, count);
        const T* lines[kMaxKernel];
        const int64_t span = (s.kernel_h - 1) * s.dilation_h;
        for (int64_t y = 0; y < to.height; ++y) {
            const int64_t top = y * s.stride_h - s.padding_h;
            ring.skip_to(top);
            ring.fill_to(top + span, produce);
            for (int64_t c = 0; c < count; ++c) {
                for (int64_t k = 0; k < s.kernel_h; ++k) lines[k] = ring.line(c, top + k * s.dilation_h);
                depthwise_row<S>({lines, s.kernel_h, weight + c * taps * kBlock,
                                  s.bias < 0 ? nullptr : frame.constant(s.bias) + (plane + c) * kBlock,
                                  to.data + (plane + c) * to.plane + y * to.row,
                                  means.sums() ? means.sums() + c * kBlock : nullptr, to.width, s.kernel_w,
                                  s.stride_w, s.dilation_w, static_cast<int>(s.activation)});
            }
            means.note(to.width);
        }
        means.divide(to.height * to.width);
    });
    return s.bins == 1;
}

}  // namespace dcd::DCD_ISA::net
