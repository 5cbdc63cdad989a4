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
template <class T>
struct Affine {
    const T* input;  // [samples, Ci]
    int64_t input_stride, channels;
    const T* weight;       // [planes Co, Ci, 16]
    const T* static_bias;  // [planes Co, 16] or null
    const T* lam;          // [samples, planes Co, 16] or null
    int64_t lam_stride;
    const T* latent;  // [samples, L]
    int64_t latent_stride, latent_channels;
    const T* p;     // [planes Co, L, 16]
    const T* bias;  // [planes Co, 16] or null
    T* output;      // [samples, planes Co, 16]
    int64_t output_stride;
    int activation;
};

template <class S, int ROWS, int PLANES>
struct AffineTile {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    static constexpr int W = S::kLanes, VECTORS = kBlock / S::kLanes, ALL = PLANES * VECTORS;
    static constexpr int64_t kDistance = 24 * kBlock;  // of what is fetched before it is needed
    static constexpr int kFlight = ROWS * ALL >= 8 ? 1 : 8 / (ROWS * ALL);

    __attribute__((always_inline)) static inline void multiply(V (&acc)[ROWS][ALL], const T* x,
                                                               int64_t stride, const T* w, int64_t channels) {
        V more[kFlight][ROWS][ALL];
        for (auto& part : more)
            for (auto& row : part)
                for (V& sum : row) sum = S::zero();
        const auto step = [&](int64_t k, V(&to)[ROWS][ALL]) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int j = 0; j < ALL; ++j) {
                const T* at = w + (j / VECTORS) * channels * kBlock + k * kBlock + (j % VECTORS) * W;
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
#pragma GCC unroll 8
        for (int u = 0; u < kFlight; ++u)
#pragma GCC unroll 8
            for (int n = 0; n < ROWS; ++n)
#pragma GCC unroll 16
                for (int j = 0; j < ALL; ++j) acc[n][j] = S::add(acc[n][j], more[u][n][j]);
    }

    static void run(const Affine<T>& s, int64_t plane, int64_t n0) {
        V acc[ROWS][ALL];
        for (int n = 0; n < ROWS; ++n)
            for (int j = 0; j < ALL; ++j)
                acc[n][j] = s.static_bias ? S::load(s.static_bias + plane * kBlock + j * W) : S::zero();
        multiply(acc, s.input + n0 * s.input_stride, s.input_stride, s.weight + plane * s.channels * kBlock,
                 s.channels);
        if (s.lam)
            for (int n = 0; n < ROWS; ++n)
                for (int j = 0; j < ALL; ++j)
                    acc[n][j] =
                        S::mul(acc[n][j], S::load(s.lam + (n0 + n) * s.lam_stride + plane * kBlock + j * W));
        if (s.latent_channels)
            multiply(acc, s.latent + n0 * s.latent_stride, s.latent_stride,
                     s.p + plane * s.latent_channels * kBlock, s.latent_channels);
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

template <class S, int PLANES, int... ROWS>
static void affine_rows(const Affine<typename S::Scalar>& s, int64_t plane, int64_t samples,
                        std::integer_sequence<int, ROWS...>) {
    using Run = void (*)(const Affine<typename S::Scalar>&, int64_t, int64_t);
    static constexpr Run kRun[] = {&AffineTile<S, ROWS + 1, PLANES>::run...};
    constexpr int64_t kRows = sizeof...(ROWS);
    const int64_t tiles = (samples + kRows - 1) / kRows;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t n = t * samples / tiles;
        kRun[(t + 1) * samples / tiles - n - 1](s, plane, n);
    }
}

template <class S>
static void affine(const Affine<typename S::Scalar>& s, int64_t out_channels, int64_t samples,
                   const Runtime& given) {
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
static Affine<T> affine_of(const Frame<T>& frame, int64_t weight, int64_t bias, int64_t channels) {
    Affine<T> s{};
    s.weight = frame.constant(weight), s.bias = frame.constant(bias), s.channels = channels;
    return s;
}

// Samples [first, first + samples) of the frame.
template <class S>
static void linear(const Frame<typename S::Scalar>& frame, const NetworkStep& s, int64_t first,
                   int64_t samples) {
    using T = typename S::Scalar;
    Affine<T> main = affine_of(frame, s.weight, s.bias, s.in_channels);
    main.input = frame.vector(s.input, first), main.input_stride = frame.vector_stride(s.input);
    main.output = frame.vector(s.output, first), main.output_stride = frame.vector_stride(s.output);
    main.static_bias = frame.constant(s.static_bias), main.activation = static_cast<int>(s.activation);
    const T* coefficients = frame.vector(s.coefficients, first);
    const int64_t stride = s.coefficients < 0 ? 0 : frame.vector_stride(s.coefficients);
    if (s.lam_channels) main.lam = coefficients, main.lam_stride = stride;
    T* memory = nullptr;
    if (s.latent) {
        const int64_t wide = planes_of(s.latent) * kBlock;
        memory =
            static_cast<T*>(scratch(2 * samples * wide * static_cast<int64_t>(sizeof(T)), Scratch::kShared));
        Affine<T> project = affine_of(frame, s.q, s.latent_bias, s.in_channels);
        project.input = main.input, project.input_stride = main.input_stride;
        project.output = memory, project.output_stride = wide;
        affine<S>(project, s.latent, samples, frame.runtime);
        T* mixed = memory + samples * wide;
        for (int64_t n = 0; n < samples; ++n) {
            Affine<T> mix{};
            mix.weight =
                coefficients + n * stride + (s.lam_channels ? planes_of(s.out_channels) * kBlock : 0);
            mix.channels = s.latent, mix.input = memory + n * wide, mix.output = mixed + n * wide;
            affine<S>(mix, s.latent, 1, frame.runtime);
        }
        main.latent = mixed, main.latent_stride = wide, main.latent_channels = s.latent,
        main.p = frame.constant(s.p);
    }
    affine<S>(main, s.out_channels, samples, frame.runtime);
}

template <class S>
static void branch(const Frame<typename S::Scalar>& frame, const NetworkStep& s, int64_t first,
                   int64_t samples) {
    using T = typename S::Scalar;
    const int64_t hidden = planes_of(s.hidden) * kBlock, inputs = s.in_channels;
    T* memory =
        static_cast<T*>(scratch(2 * samples * hidden * static_cast<int64_t>(sizeof(T)), Scratch::kShared));
    T* logits = memory + samples * hidden;
    Affine<T> squeeze = affine_of(frame, s.squeeze, s.squeeze_bias, inputs);
    squeeze.input = frame.vector(s.input, first), squeeze.input_stride = frame.vector_stride(s.input);
    squeeze.output = memory, squeeze.output_stride = hidden;
    const bool se = s.gate_code == kGateSE;
    squeeze.activation = se ? static_cast<int>(kNone) : static_cast<int>(s.gate_code);
    affine<S>(squeeze, s.hidden, samples, frame.runtime);
    if (se) {
        Affine<T> gate = affine_of(frame, s.gate, s.gate_bias, s.hidden);
        gate.input = memory, gate.input_stride = gate.output_stride = hidden, gate.output = logits;
        affine<S>(gate, s.hidden, samples, frame.runtime);
        fc::each_vector<S>(samples * hidden, [&](auto load, auto store) {
            store(memory, S::mul(load(memory), S::div(fc::hard<S>(load(logits)), S::set1(T(3)))));
        });
    }
    Affine<T> expand = affine_of(frame, s.expand, s.expand_bias, s.hidden);
    expand.input = memory, expand.input_stride = hidden;
    expand.output = frame.vector(s.output, first), expand.output_stride = frame.vector_stride(s.output);
    affine<S>(expand, s.out_channels, samples, frame.runtime);
    if (s.lam_channels)
        for (int64_t n = 0; n < samples; ++n) {
            T* lam = expand.output + n * expand.output_stride;
            fc::each_vector<S>(s.lam_channels, [&](auto load, auto store) {
                store(lam, fc::lam_of<S>(load(lam), static_cast<int>(s.lam_code)));
            });
        }
}

}  // namespace dcd::DCD_ISA::net
