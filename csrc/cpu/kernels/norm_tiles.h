// SPDX-License-Identifier: BSD-3-Clause
// The parts of a norm by the statistics of the batch: sums over tiles, and what normalises.
//
// Deviations are taken from the mean of a tile that is still in L1, and tiles are merged by Chan, Golub and
// LeVeque's formula: a mean of a thousand deviations costs no digits of the variance.
#pragma once

#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "../norm_act.h"
#include "layer.h"
#include "tile.h"

namespace dcd::DCD_ISA {
namespace norm {

constexpr int64_t kTile = 64;          // pixels whose sums are folded, channels-last
constexpr int64_t kPlaneTile = 2048;   // and of a plane
constexpr int64_t kChunk = 16 * 1024;  // elements of a chunk: 64 kB, beside its gradients in L2
// Elements ahead of which is fetched: the hardware does not follow two or three streams at once by itself.
constexpr int64_t kAhead = 1024;
constexpr int64_t kWorthThreads = 16 * 1024;  // elements

// act'(x) g
template <class S, int ACTIVATION>
static inline typename S::Vec gated(typename S::Vec x, typename S::Vec g) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    const V one = S::set1(T(1));
    if constexpr (ACTIVATION == kRelu) return S::keep_greater(x, S::zero(), g);
    if constexpr (ACTIVATION == kRelu6)
        return S::keep_greater(S::set1(T(6)), x, S::keep_greater(x, S::zero(), g));
    if constexpr (ACTIVATION == kSilu) {
        const V sigmoid = S::div(one, S::add(one, S::exp(S::sub(S::zero(), x))));
        return S::mul(g, S::mul(sigmoid, S::fma(x, S::sub(one, sigmoid), one)));
    }
    if constexpr (ACTIVATION == kHardswish) {
        const V three = S::set1(T(3));
        const V inside = S::keep_greater(three, x, S::fma(x, S::set1(T(1) / T(3)), S::set1(T(-0.5))));
        // 1 behind 3; between -3 and 3 that and x / 3 - 1/2 more
        return S::keep_greater(x, S::set1(T(-3)), S::mul(g, S::add(one, inside)));
    }
    return g;
}

// f(integral_constant<ACTIVATION>)
template <class F>
static void with_activation(int activation, const F& f) {
    switch (activation) {
        case kRelu:
            return f(std::integral_constant<int, kRelu>{});
        case kRelu6:
            return f(std::integral_constant<int, kRelu6>{});
        case kSilu:
            return f(std::integral_constant<int, kSilu>{});
        case kHardswish:
            return f(std::integral_constant<int, kHardswish>{});
        default:
            return f(std::integral_constant<int, kNone>{});
    }
}

// f(VECTORS, TAIL, first channel, channels of the last vector) for blocks of at most four vectors of
// channels.
template <class S, class F>
static inline void for_vectors(int64_t channels, const F& f) {
    constexpr int64_t W = S::kLanes;
    for (int64_t c = 0; c < channels;) {
        const int64_t left = (channels - c + W - 1) / W, vectors = least<int64_t>(left, 4);
        const int64_t count = least(vectors * W, channels - c);
        const int tail = static_cast<int>(count - (vectors - 1) * W);
        const auto run = [&](auto size) {
            if (tail == W)
                f(size, std::false_type{}, c, tail);
            else
                f(size, std::true_type{}, c, tail);
        };
        if (vectors == 4)
            run(std::integral_constant<int, 4>{});
        else if (vectors == 3)
            run(std::integral_constant<int, 3>{});
        else if (vectors == 2)
            run(std::integral_constant<int, 2>{});
        else
            run(std::integral_constant<int, 1>{});
        c += count;
    }
}

// Vectors of channels, the last of them with `tail` channels where TAIL.
template <class S, int VECTORS, bool TAIL>
struct Row {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    static constexpr int kVectors = VECTORS;
    int tail;
    V load_ahead(const T* p, int j) const {
        S::prefetch(p + j * S::kLanes + kAhead);
        return load(p, j);
    }
    V load(const T* p, int j) const {
        return TAIL && j == VECTORS - 1 ? S::load_first(p + j * S::kLanes, tail) : S::load(p + j * S::kLanes);
    }
    void store(T* p, int j, V x) const {
        if (TAIL && j == VECTORS - 1)
            S::store_first(p + j * S::kLanes, x, tail);
        else
            S::store(p + j * S::kLanes, x);
    }
    void load_all(const T* p, V (&out)[VECTORS]) const {
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) out[j] = load(p, j);
    }
};

// f(Row, first channel, first pixel, end) for tiles of pixels, whose lines the next block of channels finds
// in L1.
template <class S, class F>
static inline void for_tiles(int64_t channels, int64_t pixels, const F& f) {
    for (int64_t p = 0; p < pixels; p += kTile)
        for_vectors<S>(channels, [&](auto vectors, auto tail, int64_t c, int last) {
            f(Row<S, vectors(), tail()>{last}, c, p, least(p + kTile, pixels));
        });
}

// sums[j] += term(pixel, j) over [p0, p1), in kWide sums that do not wait for each other
template <class S, int VECTORS, class F>
static inline void add_terms(int64_t p0, int64_t p1, const F& term, typename S::Vec (&sums)[VECTORS]) {
    using V = typename S::Vec;
    constexpr int kWide = VECTORS > 2 ? 2 : 4;
    V partial[kWide][VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) partial[i][j] = S::zero();
    int64_t p = p0;
    for (; p + kWide <= p1; p += kWide)
#pragma GCC unroll 4
        for (int i = 0; i < kWide; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) partial[i][j] = term(p + i, j, partial[i][j]);
    for (; p < p1; ++p)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) partial[0][j] = term(p, j, partial[0][j]);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
        V sum = S::add(partial[0][j], partial[1][j]);
        if constexpr (kWide == 4) sum = S::add(sum, S::add(partial[2][j], partial[3][j]));
        sums[j] = S::add(sums[j], sum);
    }
}

// sums[j] += g and products[j] += g d, g = term(pixel, j, d), over [p0, p1)
template <class S, int VECTORS, class F>
static inline void add_gradients(int64_t p0, int64_t p1, const F& term, typename S::Vec (&sums)[VECTORS],
                                 typename S::Vec (&products)[VECTORS]) {
    using V = typename S::Vec;
    V sum[2][VECTORS], product[2][VECTORS];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) sum[i][j] = product[i][j] = S::zero();
    const auto step = [&](int64_t p, int i) {
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) {
            V d;
            const V g = term(p, j, d);
            sum[i][j] = S::add(sum[i][j], g), product[i][j] = S::fma(g, d, product[i][j]);
        }
    };
    int64_t p = p0;
    for (; p + 2 <= p1; p += 2) step(p, 0), step(p + 1, 1);
    if (p < p1) step(p, 0);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
        sums[j] = S::add(sums[j], S::add(sum[0][j], sum[1][j]));
        products[j] = S::add(products[j], S::add(product[0][j], product[1][j]));
    }
}

// Mean and sum of squared deviations of each of some channels over `pixels` pixels.
template <class S, int VECTORS, bool TAIL>
static void moments_of_rows(const typename S::Scalar* x, int64_t pixels, int64_t pixel, int tail,
                            typename S::Scalar* mean, typename S::Scalar* squares) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    const Row<S, VECTORS, TAIL> row{tail};
    V all_mean[VECTORS], all_squares[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) all_mean[j] = all_squares[j] = S::zero();
    for (int64_t p0 = 0; p0 < pixels; p0 += kTile) {
        const int64_t p1 = least(p0 + kTile, pixels);
        V tile_mean[VECTORS], tile_squares[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) tile_mean[j] = tile_squares[j] = S::zero();
        add_terms<S, VECTORS>(
            p0, p1, [&](int64_t p, int j, V sum) { return S::add(sum, row.load_ahead(x + p * pixel, j)); },
            tile_mean);
        const V share = S::set1(T(1) / T(p1 - p0));
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) tile_mean[j] = S::mul(tile_mean[j], share);
        add_terms<S, VECTORS>(
            p0, p1,
            [&](int64_t p, int j, V sum) {
                const V d = S::sub(row.load(x + p * pixel, j), tile_mean[j]);
                return S::fma(d, d, sum);
            },
            tile_squares);
        const T ratio = T(p1 - p0) / T(p1);
        const V step = S::set1(ratio), weight = S::set1(ratio * T(p0));
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) {
            const V delta = S::sub(tile_mean[j], all_mean[j]);
            all_mean[j] = S::fma(delta, step, all_mean[j]);
            all_squares[j] = S::add(all_squares[j], S::fma(S::mul(delta, delta), weight, tile_squares[j]));
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) row.store(mean, j, all_mean[j]), row.store(squares, j, all_squares[j]);
}

// A whole vector of neighbours, and the first `count` lanes of one.
template <class S>
struct AllLanes {
    static constexpr bool kWhole = true;
    typename S::Vec load(const typename S::Scalar* p) const { return S::load(p); }
    typename S::Vec load_ahead(const typename S::Scalar* p) const {
        S::prefetch(p + kAhead);
        return S::load(p);
    }
    void store(typename S::Scalar* p, typename S::Vec x) const { S::store(p, x); }
};
template <class S>
struct FirstLanes {
    static constexpr bool kWhole = false;
    int count;
    typename S::Vec load(const typename S::Scalar* p) const { return S::load_first(p, count); }
    typename S::Vec load_ahead(const typename S::Scalar* p) const { return load(p); }
    void store(typename S::Scalar* p, typename S::Vec x) const { S::store_first(p, x, count); }
};

// f(first, lanes) for the vectors of `count` neighbours.
template <class S, class F>
static inline void for_lanes(int64_t count, const F& f) {
    constexpr int W = S::kLanes;
    int64_t i = 0;
    for (; i + W <= count; i += W) f(i, AllLanes<S>{});
    if (i < count) f(i, FirstLanes<S>{static_cast<int>(count - i)});
}

// f(first, lanes, stream) for the same vectors, neighbours in streams 0 to 3: sums that need not wait for
// each other.
template <class S, class F>
static inline void for_streams(int64_t count, const F& f) {
    constexpr int W = S::kLanes;
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) f(i + k * W, AllLanes<S>{}, k);
    int stream = 0;
    for (; i + W <= count; i += W) f(i, AllLanes<S>{}, stream++);
    if (i < count) f(i, FirstLanes<S>{static_cast<int>(count - i)}, stream);
}

template <class S>
static inline typename S::Scalar sum_streams(const typename S::Vec (&v)[4]) {
    return S::sum(S::add(S::add(v[0], v[1]), S::add(v[2], v[3])));
}

// Moments of all that was merged, in double: few numbers, by which the whole image is normalised.
struct Moments {
    double count = 0, mean = 0, squares = 0;
    void merge(double more, double its_mean, double its_squares) {
        const double delta = its_mean - mean, all = count + more;
        mean += delta * (more / all);
        squares += its_squares + delta * delta * (count * more / all);
        count = all;
    }
};

// `count` neighbours of one channel.
template <class S>
static void merge_row(const typename S::Scalar* x, int64_t count, Moments& moments) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    for (int64_t p = 0; p < count; p += kPlaneTile) {
        const int64_t length = least(kPlaneTile, count - p);
        const T* from = x + p;
        V sums[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
        for_streams<S>(length, [&](int64_t i, auto lanes, int k) {
            sums[k] = S::add(sums[k], lanes.load_ahead(from + i));
        });
        const T mean = sum_streams<S>(sums) / T(length);
        const V shift = S::set1(mean);
        T repeated[S::kLanes];
        S::store(repeated, shift);
        V squares[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
        for_streams<S>(length, [&](int64_t i, auto lanes, int k) {
            // no deviation in lanes without a pixel
            const V d = S::sub(lanes.load(from + i), lanes.kWhole ? shift : lanes.load(repeated));
            squares[k] = S::fma(d, d, squares[k]);
        });
        moments.merge(static_cast<double>(length), mean, sum_streams<S>(squares));
    }
}

// Sums of g = term(first, lanes, d) and of g d over `count` neighbours.
template <class S, class F>
static inline void gradients_of_row(int64_t count, const F& term, typename S::Scalar& sum,
                                    typename S::Scalar& product) {
    using V = typename S::Vec;
    V sums[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    V products[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    for_streams<S>(count, [&](int64_t i, auto lanes, int k) {
        V d;
        const V g = term(i, lanes, d);
        sums[k] = S::add(sums[k], g), products[k] = S::fma(g, d, products[k]);
    });
    sum = sum_streams<S>(sums), product = sum_streams<S>(products);
}

// A channels-last image as rows of channels. Where a row has not whole vectors, several pixels are taken for
// one of as many times the channels, if they fill vectors: `repeats` of them.
struct Rows {
    int64_t batch, channels, pixels, repeats, chunk, chunks;  // chunks of a sample
    Rows(int64_t batch_, int64_t channels_, int64_t pixels_, bool dense, int64_t lanes)
        : batch(batch_), channels(channels_), pixels(pixels_), repeats(1) {
        int64_t times = 1;
        while (channels * times % lanes) times *= 2;
        if (dense && times <= lanes && channels * times <= 4 * lanes && pixels % times == 0) repeats = times;
        channels *= repeats, pixels /= repeats;
        chunk = least(pixels, most(kTile, kChunk / channels / kTile * kTile));
        chunks = (pixels + chunk - 1) / chunk;
    }
    int64_t tasks() const { return batch * chunks; }
    // f(sample, first pixel, count)
    template <class F>
    void of_task(int64_t task, const F& f) const {
        const int64_t n = task / chunks, p0 = task % chunks * chunk;
        f(n, p0, least(chunk, pixels - p0));
    }
};

// What normalises a channel: x -> (x - mean) scale + bias, and in backward d_x = scale g + slope (x - mean) +
// offset.
template <class T>
struct Plane {
    T mean, scale, bias, slope = 0, offset = 0;
    Plane(const NormActParams<T>& s, int64_t c, T mean_, double variance)
        : mean(mean_),
          scale(static_cast<T>(double(s.weight ? s.weight[c] : T(1)) / std::sqrt(variance + s.eps))),
          bias(s.bias ? s.bias[c] : T(0)) {}
    // From the sums over all `count` values of g and of g (x - mean).
    void set_slope(double variance, double eps, double sum, double product, double count) {
        slope = static_cast<T>(-double(scale) * product / (variance + eps) / count);
        offset = static_cast<T>(-double(scale) * sum / count);
    }
};

// The same of all channels, for `repeats` pixels in a row.
template <class T>
struct Factors {
    T *mean, *scale, *bias, *slope, *offset;
    static int64_t size(int64_t channels) { return 5 * Pieces<T>::rounded(channels); }
    Factors(Pieces<T>& pieces, int64_t channels) {
        for (T** piece : {&mean, &scale, &bias, &slope, &offset}) *piece = pieces.take(channels);
    }
    void set(int64_t c, int64_t channels, int64_t repeats, const Plane<T>& plane) {
        for (int64_t i = c; i < channels * repeats; i += channels) {
            mean[i] = plane.mean, scale[i] = plane.scale, bias[i] = plane.bias;
            slope[i] = plane.slope, offset[i] = plane.offset;
        }
    }
};

template <class T>
static void write_sums(const NormActGradParams<T>& s, int64_t c, double sum, double product) {
    if (s.d_bias) s.d_bias[c] = static_cast<T>(sum);
    if (s.d_weight)
        s.d_weight[c] = static_cast<T>(product / std::sqrt(double(s.variance[c]) + s.forward.eps));
}

}  // namespace norm
}  // namespace dcd::DCD_ISA
