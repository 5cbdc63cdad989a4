// SPDX-License-Identifier: BSD-3-Clause
// The inner loop of a network's dense layers: some pixels x one or two planes of channels, held in registers,
//   y = act(lam (sum over taps W x + static_bias) + P t + bias + skip).
// The distance of neighbouring pixels is known when this is compiled, so that a row of them has one address.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../tile.h"
#include "narrow.h"

namespace dcd::DCD_ISA::net {

template <class W>
struct Product {
    // The static part: weight [planes Co, taps, Ci, 16], or pairs
    const W* weight = nullptr;
    int64_t weight_plane = 0;
    const int64_t* taps = nullptr;  // where each tap reads, from a pixel's first one
    int64_t tap_count = 0, channels = 0;
    int64_t input_plane = 0, pixel = kBlock;  // distance of planes, and of what neighbouring outputs read
    const float* static_bias = nullptr;       // [planes Co, 16] or null, as are lam and bias
    const float* lam = nullptr;
    // The dynamic part: p [planes Co, L, 16], or pairs; the mixed latent [planes L, pixels, 16]
    const W* p = nullptr;
    int64_t p_plane = 0, latent = 0, latent_plane = 0;
    const float* bias = nullptr;
    int64_t skip_plane = 0, output_plane = 0;
    int activation = kNone;
    // What another step will read is fetched by the prefetches of all tiles but the first, for which the
    // weights themselves are.
    const W *coming = nullptr, *coming_end = nullptr;
    bool near = false;  // the weights have been read
};

// Where one tile reads and writes: its first pixel, the first of its planes.
template <class TYPES>
struct Places {
    const typename TYPES::In* input;
    const typename TYPES::In* latent;
    const typename TYPES::Out* skip;
    typename TYPES::Out* output;
    float* sums = nullptr;  // [planes, 16], gets the sums over the tile's pixels added, or null
    int64_t reach = 0;      // where to prefetch, from the weights that are being read
};

// Means of the planes of one task; nothing where nobody reads them. Tiles, or rows, add up in `sums`; before
// their roundings do, which takes more pixels than the images have where time counts, those go into totals of
// twice the precision.
class Means {
  public:
    static constexpr int kMaxPlanes = 2;

    Means(float* means, int64_t plane, int64_t planes)
        : means_(means ? means + plane * kBlock : nullptr), planes_(planes) {
        if (means_) each([&](int64_t i) { sums_[i] = 0; });
    }
    // [planes, 16], or null
    float* sums() { return means_ ? sums_ : nullptr; }
    // `pixels` more of each plane are in the sums.
    void note(int64_t pixels) {
        if ((pixels_ += pixels) >= kPixels && means_) add_up();
    }
    void divide(int64_t pixels) {
        if (!means_) return;
        if (!has_totals_) {
            const float count = static_cast<float>(pixels);
            return each([&](int64_t i) { means_[i] = sums_[i] / count; });
        }
        add_up();
        const double share = 1.0 / static_cast<double>(pixels);
        each([&](int64_t i) { means_[i] = static_cast<float>(totals_[i] * share); });
    }

  private:
    static constexpr int64_t kPixels = 224;

    template <class F>
    void each(const F& f) {
        for (int64_t plane = 0; plane < planes_; ++plane)
            for (int64_t i = 0; i < kBlock; ++i) f(plane * kBlock + i);
    }
    void add_up() {
        if (!has_totals_) each([&](int64_t i) { totals_[i] = 0; });
        each([&](int64_t i) { totals_[i] += static_cast<double>(sums_[i]), sums_[i] = 0; });
        has_totals_ = true;
        pixels_ = 0;
    }

    float* const means_;
    const int64_t planes_;
    int64_t pixels_ = 0;
    bool has_totals_ = false;
    alignas(64) float sums_[kMaxPlanes * kBlock];
    double totals_[kMaxPlanes * kBlock];
};

// Bytes of weights that are fetched before they are needed; found by measuring, as are the other distances.
constexpr int64_t kReach = 8 * 1024;

template <class S>
struct TileLimits {
    static constexpr int kVectors = kBlock / S::kLanes;  // of a plane
    static constexpr int kPlanes = S::kRegisters == 32 ? 2 : 1;
    static constexpr int kPixels = S::kRegisters == 32 ? 14 : 12 / kVectors;
};

// The smallest and the largest value that an activation lets through, where that is all it does.
template <class T>
static inline bool is_clamp(int activation, T& low, T& high) {
    constexpr T kAll = std::numeric_limits<T>::infinity();
    low = activation == kNone ? -kAll : T(0);
    high = activation == kRelu6 ? T(6) : kAll;
    return activation <= kRelu6;
}

template <class S, class TYPES, int PIXELS, int PLANES, int STEP>
struct Tile {
    using In = typename TYPES::In;
    using Weights = typename TYPES::W;
    using V = typename S::Vec;
    static constexpr int W = S::kLanes, VECTORS = TileLimits<S>::kVectors, ALL = PLANES * VECTORS;

    // The weights of `count` channels of one tap.
    template <int STRIDE>
    __attribute__((always_inline)) static inline void multiply(V (&acc)[PIXELS][ALL], const In* x,
                                                               int64_t pixel, const Weights*& w,
                                                               int64_t weight_plane, int64_t count,
                                                               int64_t reach) {
        const int64_t step = STRIDE ? STRIDE : pixel;
        if constexpr (kIsNarrow<Weights>) {
            for (; count > 1; count -= 2, x += 2, w += kBlock) {
                fetch<STRIDE>(w, weight_plane, reach);
                multiply_pair(acc, x, step, w, weight_plane);
            }
            if (count) multiply_last(acc, x, step, w, weight_plane), w += kBlock;
        } else {
            for (int64_t k = 0; k < count; ++k, w += kBlock) {
                fetch<STRIDE>(w, weight_plane, reach);
                V weight[ALL];
#pragma GCC unroll 8
                for (int j = 0; j < ALL; ++j)
                    weight[j] = S::load(w + (j / VECTORS) * weight_plane + (j % VECTORS) * W);
#pragma GCC unroll 16
                for (int i = 0; i < PIXELS; ++i) {
                    const V value = S::set1(x[i * step + k]);
#pragma GCC unroll 8
                    for (int j = 0; j < ALL; ++j) acc[i][j] = S::fma(value, weight[j], acc[i][j]);
                }
            }
        }
    }

    template <int STRIDE>
    __attribute__((always_inline)) static inline void fetch(const Weights* w, int64_t weight_plane,
                                                            int64_t reach) {
#pragma GCC unroll 2
        for (int j = 0; STRIDE == kBlock && j < PLANES; ++j)
            __builtin_prefetch(w + j * weight_plane + reach, 0, 3);
    }

    // Two channels of every pixel.
    __attribute__((always_inline)) static inline void multiply_pair(V (&acc)[PIXELS][ALL], const In* x,
                                                                    int64_t step, const Weights* w,
                                                                    int64_t weight_plane) {
        if constexpr (S::kDots && kIsNarrow<In>) {
            multiply_dots(acc, w, weight_plane, [&](int i) { return S::pair(x + i * step); });
        } else {
            multiply_half(
                acc, w, weight_plane, [](const Weights* p) { return S::firsts(p); },
                [&](int i) { return S::set_first(x + i * step); });
            // both halves are loaded anew: kept in registers, they would displace the sums
            __asm__ volatile("" ::: "memory");
            multiply_half(
                acc, w, weight_plane, [](const Weights* p) { return S::seconds(p); },
                [&](int i) { return S::set_second(x + i * step); });
        }
    }
    // The last of an odd number of channels: what lies behind it is not read.
    __attribute__((always_inline)) static inline void multiply_last(V (&acc)[PIXELS][ALL], const In* x,
                                                                    int64_t step, const Weights* w,
                                                                    int64_t weight_plane) {
        if constexpr (S::kDots && kIsNarrow<In>)
            multiply_dots(acc, w, weight_plane, [&](int i) { return S::lone(x + i * step); });
        else
            multiply_half(
                acc, w, weight_plane, [](const Weights* p) { return S::firsts(p); },
                [&](int i) { return S::set1(value_of(x[i * step])); });
    }
    template <class F>
    __attribute__((always_inline)) static inline void multiply_dots(V (&acc)[PIXELS][ALL], const Weights* w,
                                                                    int64_t weight_plane, const F& pair) {
        typename S::Pairs weight[ALL];
#pragma GCC unroll 8
        for (int j = 0; j < ALL; ++j)
            weight[j] = S::pairs(w + (j / VECTORS) * weight_plane + (j % VECTORS) * W);
#pragma GCC unroll 16
        for (int i = 0; i < PIXELS; ++i) {
            const auto value = pair(i);
#pragma GCC unroll 8
            for (int j = 0; j < ALL; ++j) acc[i][j] = S::dot(value, weight[j], acc[i][j]);
        }
    }
    template <class L, class F>
    __attribute__((always_inline)) static inline void multiply_half(V (&acc)[PIXELS][ALL], const Weights* w,
                                                                    int64_t weight_plane, const L& half,
                                                                    const F& value_at) {
        V weight[ALL];
#pragma GCC unroll 8
        for (int j = 0; j < ALL; ++j) weight[j] = half(w + (j / VECTORS) * weight_plane + (j % VECTORS) * W);
#pragma GCC unroll 16
        for (int i = 0; i < PIXELS; ++i) {
            const V value = value_at(i);
#pragma GCC unroll 8
            for (int j = 0; j < ALL; ++j) acc[i][j] = S::fma(value, weight[j], acc[i][j]);
        }
    }

    template <int STRIDE>
    __attribute__((always_inline)) static inline void planes(V (&acc)[PIXELS][ALL], const In* x,
                                                             int64_t input_plane, int64_t pixel,
                                                             const Weights*& w, int64_t weight_plane,
                                                             int64_t channels, int64_t reach) {
        for (; channels >= kBlock; channels -= kBlock, x += input_plane)
            multiply<STRIDE>(acc, x, pixel, w, weight_plane, kBlock, reach);
        if (channels) multiply<STRIDE>(acc, x, pixel, w, weight_plane, channels, reach);
    }

    template <class F>
    __attribute__((always_inline)) static inline void each(V (&acc)[PIXELS][ALL], const F& f) {
#pragma GCC unroll 16
        for (int i = 0; i < PIXELS; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < ALL; ++j) acc[i][j] = f(acc[i][j], i, j);
    }

    static void run(const Product<Weights>& s, int64_t plane, const Places<TYPES>& at) {
        V acc[PIXELS][ALL];
        const bool plain = !s.lam && !s.static_bias;
        const float* start = plain ? s.bias : s.static_bias;
        if (start) {
            start += plane * kBlock;
            each(acc, [&](V, int, int j) { return S::load(start + j * W); });
        } else {
            each(acc, [](V, int, int) { return S::zero(); });
        }
        const Weights* w = s.weight + plane * s.weight_plane;
        for (int64_t t = 0; t < s.tap_count; ++t)
            planes<STEP>(acc, at.input + s.taps[t], s.input_plane, s.pixel, w, s.weight_plane, s.channels,
                         at.reach);
        if (s.lam) {
            V lam[ALL];
#pragma GCC unroll 8
            for (int j = 0; j < ALL; ++j) lam[j] = S::load(s.lam + plane * kBlock + j * W);
            each(acc, [&](V a, int, int j) { return S::mul(a, lam[j]); });
        }
        if (s.latent) {
            const Weights* p = s.p + plane * s.p_plane;
            planes<kBlock>(acc, at.latent, s.latent_plane, kBlock, p, s.p_plane, s.latent,
                           kReach / sizeof(Weights));
        }
        if (!plain && s.bias) {
            const float* bias = s.bias + plane * kBlock;
            each(acc, [&](V a, int, int j) { return S::add(a, S::load(bias + j * W)); });
        }
        if (at.skip) {
            each(acc, [&](V a, int i, int j) {
                return S::add(
                    a, S::load(at.skip + (j / VECTORS) * s.skip_plane + i * kBlock + (j % VECTORS) * W));
            });
        }
        float low, high;
        if (is_clamp(s.activation, low, high)) {
            const V lower = S::set1(low), upper = S::set1(high);
            if (s.activation != kNone)
                each(acc, [&](V a, int, int) { return S::min(upper, S::max(lower, a)); });
        } else {
            each(acc, [&](V a, int, int) { return activate<S>(a, s.activation); });
        }
        if (at.sums)
#pragma GCC unroll 8
            for (int j = 0; j < ALL; ++j) {
                V total = acc[0][j];  // of the tile first: less is rounded
#pragma GCC unroll 16
                for (int i = 1; i < PIXELS; ++i) total = S::add(total, acc[i][j]);
                S::store(at.sums + j * W, S::add(S::load(at.sums + j * W), total));
            }
#pragma GCC unroll 16
        for (int i = 0; i < PIXELS; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < ALL; ++j)
                S::store(at.output + (j / VECTORS) * s.output_plane + i * kBlock + (j % VECTORS) * W,
                         acc[i][j]);
    }
};

template <class TYPES>
using RunTile = void (*)(const Product<typename TYPES::W>&, int64_t, const Places<TYPES>&);

template <class S, class TYPES, int PLANES, int STEP, int... PIXELS>
constexpr std::array<RunTile<TYPES>, sizeof...(PIXELS)> tiles(std::integer_sequence<int, PIXELS...>) {
    return {&Tile<S, TYPES, PIXELS + 1, PLANES, STEP>::run...};
}

// For the distance `pixel` of neighbouring pixels: by the number of pixels, less one.
template <class S, class TYPES, int PLANES>
static inline const RunTile<TYPES>* tiles_for([[maybe_unused]] int64_t pixel) {
    using Counts = std::make_integer_sequence<int, TileLimits<S>::kPixels>;
    static constexpr auto kNear = tiles<S, TYPES, PLANES, kBlock>(Counts{});
    if constexpr (std::is_same_v<typename TYPES::In, Stored<S>>) {
        static constexpr auto kStrided = tiles<S, TYPES, PLANES, 2 * kBlock>(Counts{}),
                              kStem = tiles<S, TYPES, PLANES, 2>(Counts{}),
                              kAny = tiles<S, TYPES, PLANES, 0>(Counts{});
        return pixel == kBlock       ? kNear.data()
               : pixel == 2 * kBlock ? kStrided.data()
               : pixel == 2          ? kStem.data()
                                     : kAny.data();
    } else {
        return kNear.data();  // no image
    }
}

template <class S, class TYPES>
static inline const RunTile<TYPES>* tiles_for(int64_t pixel, int64_t planes) {
    if constexpr (TileLimits<S>::kPlanes == 2)
        if (planes == 2) return tiles_for<S, TYPES, 2>(pixel);
    return tiles_for<S, TYPES, 1>(pixel);
}

// What the rows of an image are apart in each operand.
struct Rows {
    int64_t input = 0, latent = 0, skip = 0, output = 0;
};

// Rows [y0, y1) of planes [plane, plane + planes) of the result, planes at most kPlanes; `at` is row 0.
// `means` gets their sums.
template <class S, class TYPES = Types<Stored<S>, Weight<S>, Stored<S>>>
static void product_rows(Product<typename TYPES::W>& s, int64_t plane, int64_t planes,
                         const Places<TYPES>& at, const Rows& rows, int64_t width, int64_t y0, int64_t y1,
                         Means* means = nullptr) {
    constexpr int64_t kPixels = TileLimits<S>::kPixels;
    const RunTile<TYPES>* run = tiles_for<S, TYPES>(s.pixel, planes);
    const int64_t tiles = (width + kPixels - 1) / kPixels;
    static_assert(TileLimits<S>::kPlanes <= Means::kMaxPlanes);
    for (int64_t y = y0; y < y1; ++y)
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t x = t * width / tiles, count = (t + 1) * width / tiles - x;
            int64_t reach = kReach / sizeof(typename TYPES::W);
            if (s.near && s.coming < s.coming_end) {
                reach = s.coming - (s.weight + plane * s.weight_plane);
                s.coming += planes * s.weight_plane;
            }
            s.near = true;
            run[count - 1](
                s, plane,
                {at.input ? at.input + y * rows.input + x * s.pixel : nullptr,
                 at.latent ? at.latent + y * rows.latent + x * kBlock : nullptr,
                 at.skip ? at.skip + y * rows.skip + x * kBlock : nullptr,
                 at.output + y * rows.output + x * kBlock, means ? means->sums() : nullptr, reach});
            if (means) means->note(count);
        }
}

}  // namespace dcd::DCD_ISA::net
