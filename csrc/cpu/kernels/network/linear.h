// SPDX-License-Identifier: BSD-3-Clause
// Linear layers and the dynamic branch: a few samples at a time, so that the weights are read once for all of
// them. At one sample they are read at the speed of the cache, so sums are split until there are enough of
// them in flight.
#pragma once

#include "../../../branch_codes.h"
#include "../branch.h"
#include "frame.h"

namespace dcd::DCD_ISA::net {

// y = lam (W x + static_bias) + P t + bias, each for `samples` rows; strides are those of samples, 0 where
// all have one place.
template <class W>
struct Affine {
    const float* input;  // [samples, Ci]
    int64_t input_stride, channels;
    const W* weight;           // [planes Co, Ci, 16], or pairs
    const float* static_bias;  // [planes Co, 16] or null
    const float* lam;          // [samples, planes Co, 16] or null
    int64_t lam_stride;
    const float* latent;  // [samples, L]
    int64_t latent_stride, latent_channels;
    const W* p;         // [planes Co, L, 16], or pairs
    const float* bias;  // [planes Co, 16] or null
    float* output;      // [samples, planes Co, 16]
    int64_t output_stride;
    int activation;
};

template <class S, class WEIGHT, int ROWS, int PLANES>
struct AffineTile {
    using V = typename S::Vec;
    static constexpr int W = S::kLanes, VECTORS = kBlock / S::kLanes, ALL = PLANES * VECTORS;
    static constexpr int64_t kDistance = 24 * kBlock;  // of what is fetched before it is needed
    static constexpr int kFlight = ROWS * ALL >= 8 ? 1 : 8 / (ROWS * ALL);

    __attribute__((always_inline)) static inline void multiply(V (&acc)[ROWS][ALL], const float* x,
                                                               int64_t stride, const WEIGHT* w,
                                                               int64_t channels) {
        V more[kFlight][ROWS][ALL];
        for (auto& part : more)
            for (auto& row : part)
                for (V& sum : row) sum = S::zero();
        const int64_t depth = depth_of(channels, kIsNarrow<WEIGHT>);
        const auto address = [&](int64_t k, int j) __attribute__((always_inline)) {
            return w + (j / VECTORS) * depth * kBlock + k * kBlock + (j % VECTORS) * W;
        };
        if constexpr (kIsNarrow<WEIGHT>) {
            const auto pair = [&](int64_t k, V(&first)[ROWS][ALL],
                                  V(&second)[ROWS][ALL]) __attribute__((always_inline)) {
#pragma GCC unroll 16
                for (int j = 0; j < ALL; ++j) {
                    const Pair* at = address(k, j);
                    S::prefetch(at + kDistance);
                    const V a = S::firsts(at), b = S::seconds(at);
#pragma GCC unroll 8
                    for (int n = 0; n < ROWS; ++n) {
                        first[n][j] = S::fma(S::set1(x[n * stride + 2 * k]), a, first[n][j]);
                        second[n][j] = S::fma(S::set1(x[n * stride + 2 * k + 1]), b, second[n][j]);
                    }
                }
            };
            constexpr int kPairs = kFlight < 2 ? 1 : kFlight / 2;
            int64_t k = 0;
            for (; 2 * (k + kPairs) <= channels; k += kPairs)
#pragma GCC unroll 8
                for (int u = 0; u < kPairs; ++u)
                    pair(k + u, more[2 * u % kFlight], more[(2 * u + 1) % kFlight]);
            for (; 2 * k + 1 < channels; ++k) pair(k, more[0], more[1 % kFlight]);
            if (2 * k < channels)
#pragma GCC unroll 16
                for (int j = 0; j < ALL; ++j) {
                    const V a = S::firsts(address(k, j));
#pragma GCC unroll 8
                    for (int n = 0; n < ROWS; ++n)
                        more[0][n][j] = S::fma(S::set1(x[n * stride + 2 * k]), a, more[0][n][j]);
                }
        } else {
            const auto step = [&](int64_t k, V(&to)[ROWS][ALL]) __attribute__((always_inline)) {
#pragma GCC unroll 16
                for (int j = 0; j < ALL; ++j) {
                    const float* at = address(k, j);
                    S::prefetch(at + kDistance);
                    const V weight = S::load(at);
#pragma GCC unroll 8
                    for (int n = 0; n < ROWS; ++n)
                        to[n][j] = S::fma(S::set1(x[n * stride + k]), weight, to[n][j]);
                }
            };
            int64_t k = 0;
            for (; k + kFlight <= channels; k += kFlight)
#pragma GCC unroll 8
                for (int u = 0; u < kFlight; ++u) step(k + u, more[u]);
            for (; k < channels; ++k) step(k, more[0]);
        }
#pragma GCC unroll 8
        for (int u = 0; u < kFlight; ++u)
#pragma GCC unroll 8
            for (int n = 0; n < ROWS; ++n)
#pragma GCC unroll 16
                for (int j = 0; j < ALL; ++j) acc[n][j] = S::add(acc[n][j], more[u][n][j]);
    }

    static void run(const Affine<WEIGHT>& s, int64_t plane, int64_t n0) {
        V acc[ROWS][ALL];
        for (int n = 0; n < ROWS; ++n)
            for (int j = 0; j < ALL; ++j)
                acc[n][j] = s.static_bias ? S::load(s.static_bias + plane * kBlock + j * W) : S::zero();
        const auto plane_of = [plane](const WEIGHT* w, int64_t channels) {
            return w + plane * depth_of(channels, kIsNarrow<WEIGHT>) * kBlock;
        };
        multiply(acc, s.input + n0 * s.input_stride, s.input_stride, plane_of(s.weight, s.channels),
                 s.channels);
        if (s.lam)
            for (int n = 0; n < ROWS; ++n)
                for (int j = 0; j < ALL; ++j)
                    acc[n][j] =
                        S::mul(acc[n][j], S::load(s.lam + (n0 + n) * s.lam_stride + plane * kBlock + j * W));
        if (s.latent_channels)
            multiply(acc, s.latent + n0 * s.latent_stride, s.latent_stride, plane_of(s.p, s.latent_channels),
                     s.latent_channels);
        for (int n = 0; n < ROWS; ++n)
            for (int j = 0; j < ALL; ++j) {
                V y = acc[n][j];
                if (s.bias) y = S::add(y, S::load(s.bias + plane * kBlock + j * W));
                S::store(s.output + (n0 + n) * s.output_stride + plane * kBlock + j * W,
                         activate<S>(y, s.activation));
            }
    }
};

template <class S>
struct AffineLimits {
    static constexpr int kRows = S::kRegisters == 32 ? 6 : 2;
    static constexpr int kPlanes = S::kRegisters == 32 ? 4 : 2;
};

template <class S, int PLANES, class W, int... ROWS>
static void affine_rows(const Affine<W>& s, int64_t plane, int64_t samples,
                        std::integer_sequence<int, ROWS...>) {
    using Run = void (*)(const Affine<W>&, int64_t, int64_t);
    static constexpr Run kRun[] = {&AffineTile<S, W, ROWS + 1, PLANES>::run...};
    constexpr int64_t kRows = sizeof...(ROWS);
    const int64_t tiles = (samples + kRows - 1) / kRows;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t n = t * samples / tiles;
        kRun[(t + 1) * samples / tiles - n - 1](s, plane, n);
    }
}

template <class S, class W>
static void affine(const Affine<W>& s, int64_t out_channels, int64_t samples, const Runtime& given) {
    using Rows = std::make_integer_sequence<int, AffineLimits<S>::kRows>;
    constexpr int64_t kAtOnce = AffineLimits<S>::kPlanes;
    const int64_t planes = planes_of(out_channels);
    Runtime runtime = given;
    if (samples * s.channels * out_channels < fc::kWorthThreads) runtime.threads = 1;
    parallel(runtime, (planes + kAtOnce - 1) / kAtOnce, [&](int64_t task) {
        int64_t plane = task * kAtOnce;
        const int64_t end = smaller(plane + kAtOnce, planes);
        if (end - plane == kAtOnce) {
            affine_rows<S, kAtOnce>(s, plane, samples, Rows{});
            return;
        }
        for (; plane < end; ++plane) affine_rows<S, 1>(s, plane, samples, Rows{});
    });
}

template <class T>
static Affine<Packed<T>> affine_of(const Frame<T>& frame, int64_t weight, int64_t bias, int64_t channels) {
    Affine<Packed<T>> s{};
    s.weight = frame.weight(weight), s.bias = frame.constant(bias), s.channels = channels;
    return s;
}

// Samples [first, first + samples) of the frame.
template <class S>
static void linear(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t first, int64_t samples) {
    using Weights = Affine<Weight<S>>;
    Weights main = affine_of(frame, s.weight, s.bias, s.in_channels);
    main.input = frame.vector(s.input, first), main.input_stride = frame.vector_stride(s.input);
    main.output = frame.vector(s.output, first), main.output_stride = frame.vector_stride(s.output);
    main.static_bias = frame.constant(s.static_bias), main.activation = static_cast<int>(s.activation);
    const float* coefficients = frame.vector(s.coefficients, first);
    const int64_t stride = s.coefficients < 0 ? 0 : frame.vector_stride(s.coefficients);
    if (s.lam_channels) main.lam = coefficients, main.lam_stride = stride;
    float* memory = nullptr;
    if (s.latent) {
        const int64_t wide = planes_of(s.latent) * kBlock;
        memory = static_cast<float*>(
            scratch(2 * samples * wide * static_cast<int64_t>(sizeof(float)), Scratch::kShared));
        Weights project = affine_of(frame, s.q, s.latent_bias, s.in_channels);
        project.input = main.input, project.input_stride = main.input_stride;
        project.output = memory, project.output_stride = wide;
        affine<S>(project, s.latent, samples, frame.runtime);
        float* mixed = memory + samples * wide;
        for (int64_t n = 0; n < samples; ++n) {
            Affine<float> mix{};
            mix.weight =
                coefficients + n * stride + (s.lam_channels ? planes_of(s.out_channels) * kBlock : 0);
            mix.channels = s.latent, mix.input = memory + n * wide, mix.output = mixed + n * wide;
            affine<S>(mix, s.latent, 1, frame.runtime);
        }
        main.latent = mixed, main.latent_stride = wide, main.latent_channels = s.latent,
        main.p = frame.weight(s.p);
    }
    affine<S>(main, s.out_channels, samples, frame.runtime);
}

template <class S>
static void branch(const Frame<Stored<S>>& frame, const NetworkStep& s, int64_t first, int64_t samples) {
    using Weights = Affine<Weight<S>>;
    const int64_t hidden = planes_of(s.hidden) * kBlock, inputs = s.in_channels;
    float* memory = static_cast<float*>(
        scratch(2 * samples * hidden * static_cast<int64_t>(sizeof(float)), Scratch::kShared));
    float* logits = memory + samples * hidden;
    Weights squeeze = affine_of(frame, s.squeeze, s.squeeze_bias, inputs);
    squeeze.input = frame.vector(s.input, first), squeeze.input_stride = frame.vector_stride(s.input);
    squeeze.output = memory, squeeze.output_stride = hidden;
    const bool se = s.gate_code == kGateSE;
    squeeze.activation = se ? static_cast<int>(kNone) : static_cast<int>(s.gate_code);
    affine<S>(squeeze, s.hidden, samples, frame.runtime);
    if (se) {
        Weights gate = affine_of(frame, s.gate, s.gate_bias, s.hidden);
        gate.input = memory, gate.input_stride = gate.output_stride = hidden, gate.output = logits;
        affine<S>(gate, s.hidden, samples, frame.runtime);
        fc::each_vector<S>(samples * hidden, [&](auto load, auto store) {
            store(memory, S::mul(load(memory), S::div(fc::hard<S>(load(logits)), S::set1(3.0f))));
        });
    }
    Weights expand = affine_of(frame, s.expand, s.expand_bias, s.hidden);
    expand.input = memory, expand.input_stride = hidden;
    expand.output = frame.vector(s.output, first), expand.output_stride = frame.vector_stride(s.output);
    affine<S>(expand, s.out_channels, samples, frame.runtime);
    if (s.lam_channels)
        for (int64_t n = 0; n < samples; ++n) {
            float* lam = expand.output + n * expand.output_stride;
            fc::each_vector<S>(s.lam_channels, [&](auto load, auto store) {
                store(lam, fc::lam_of<S>(load(lam), static_cast<int>(s.lam_code)));
            });
        }
}

}  // namespace dcd::DCD_ISA::net
