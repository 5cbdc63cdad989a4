// SPDX-License-Identifier: BSD-3-Clause
// The dynamic branch behind its pooling: x = scale · sum over tiles, h = gate(squeeze x), lam and Phi from h.
// A few samples at a time, so that the weights are read once for all of them. A sample's numbers do not
// depend on its neighbours: dot() adds up the same way for one row and for several.
#pragma once

#include "dot.h"
#include "layer.h"

namespace dcd::DCD_ISA {
namespace fc {

// As many samples as dot() takes in one pass over the weights.
template <class S>
constexpr int64_t kSamples = S::kRegisters == 32 ? 6 : 3;

// Fewer multiply-adds than this are done before a second thread has woken up.
constexpr int64_t kWorthThreads = 128 * 1024;

// f(i, load, store) for i = 0, W, 2W, … below count, with what reads and writes the vector at i: the last one
// has fewer lanes.
template <class S, class F>
static inline void each_vector(int64_t count, const F& f) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    constexpr int64_t W = S::kLanes;
    int64_t i = 0;
    for (; i + W <= count; i += W)
        f([i](const T* p) { return S::load(p + i); }, [i](T* p, V x) { S::store(p + i, x); });
    if (i < count) {
        const int rest = static_cast<int>(count - i);
        f([i, rest](const T* p) { return S::load_first(p + i, rest); },
          [i, rest](T* p, V x) { S::store_first(p + i, x, rest); });
    }
}

// y = W x + b for each of `samples` rows x [columns] and y [rows]
template <class S>
static void affine(const typename S::Scalar* weight, const typename S::Scalar* bias, int64_t rows,
                   int64_t columns, const typename S::Scalar* x, int64_t samples, typename S::Scalar* y) {
    if (bias)
        for (int64_t n = 0; n < samples; ++n)
            each_vector<S>(rows, [&](auto load, auto store) { store(y + n * rows, load(bias)); });
    dot<S>(x, columns, samples, weight, columns, rows, columns, bias != nullptr, y, rows);
}

// relu6(x + 3), the numerator of the hard sigmoids
template <class S>
static inline typename S::Vec hard(typename S::Vec x) {
    using T = typename S::Scalar;
    return S::min(S::set1(T(6)), S::max(S::zero(), S::add(x, S::set1(T(3)))));
}

template <class S>
static inline typename S::Vec lam_of(typename S::Vec logit, int code) {
    using T = typename S::Scalar;
    const auto one = S::set1(T(1));
    switch (code) {
        case kLamHardsigmoid2:
            return S::div(hard<S>(logit), S::set1(T(3)));
        case kLamHardsigmoid:
            return S::div(hard<S>(logit), S::set1(T(6)));
        case kLamSigmoid2:
        case kLamSigmoid:
            return S::div(S::set1(T(code == kLamSigmoid ? 1 : 2)),
                          S::add(one, S::exp(S::sub(S::zero(), logit))));
        default:
            return S::add(one, logit);
    }
}

// What stands between the sums and the logits, for some samples at a time.
template <class S>
struct Hidden {
    using T = typename S::Scalar;
    T* pooled;  // [samples, I]
    T* before;  // [samples, S], squeeze x
    T* logits;  // [samples, S], of the gate; kGateSE alone has them
    T* units;   // [samples, S]

    static int64_t size(const BranchParams<T>& s, int64_t samples) {
        return Pieces<T>::rounded(samples * s.inputs) + 3 * Pieces<T>::rounded(samples * s.hidden);
    }

    Hidden(const BranchParams<T>& s, int64_t samples, Pieces<T>& memory)
        : pooled(memory.take(samples * s.inputs)),
          before(memory.take(samples * s.hidden)),
          logits(memory.take(samples * s.hidden)),
          units(memory.take(samples * s.hidden)) {}

    // The part that belongs to samples [n, …).
    Hidden(const Hidden& all, const BranchParams<T>& s, int64_t n)
        : pooled(all.pooled + n * s.inputs),
          before(all.before + n * s.hidden),
          logits(all.logits + n * s.hidden),
          units(all.units + n * s.hidden) {}

    // For samples n0 … n0 + samples - 1 of the batch.
    void compute(const BranchParams<T>& s, int64_t n0, int64_t samples) const {
        const auto scale = S::set1(s.scale);
        for (int64_t n = 0; n < samples; ++n) {
            const T* sums = s.sums + (n0 + n) * s.tiles * s.inputs;
            each_vector<S>(s.inputs, [&](auto load, auto store) {
                auto total = load(sums);
                for (int64_t t = 1; t < s.tiles; ++t) total = S::add(total, load(sums + t * s.inputs));
                store(pooled + n * s.inputs, S::mul(total, scale));
            });
        }
        affine<S>(s.squeeze, s.squeeze_bias, s.hidden, s.inputs, pooled, samples, before);
        const bool se = s.gate_code == kGateSE;
        if (se) affine<S>(s.gate, s.gate_bias, s.hidden, s.hidden, before, samples, logits);
        each_vector<S>(samples * s.hidden, [&](auto load, auto store) {
            const auto h = load(before);
            store(units,
                  se ? S::mul(h, S::div(hard<S>(load(logits)), S::set1(T(3)))) : activate<S>(h, s.gate_code));
        });
    }
};

// How many samples a task takes: as many as one pass over the weights serves, but work for every thread.
template <class S>
static int64_t samples_of_a_task(const BranchParams<typename S::Scalar>& s, Runtime& runtime) {
    const int64_t products = s.hidden * (s.inputs + s.hidden + s.lam_channels + s.others);
    if (s.batch * products < kWorthThreads) runtime.threads = 1;
    const int64_t share = (s.batch + runtime.threads - 1) / runtime.threads;
    const int64_t passes = (share + kSamples<S> - 1) / kSamples<S>;
    return (share + passes - 1) / passes;
}

}  // namespace fc

template <class S>
static void branch(const BranchParams<typename S::Scalar>& s, const Runtime& given) {
    using T = typename S::Scalar;
    Runtime runtime = given;
    const int64_t samples = fc::samples_of_a_task<S>(s, runtime);
    parallel(runtime, (s.batch + samples - 1) / samples, [&](int64_t task) {
        const int64_t n0 = task * samples, count = least(samples, s.batch - n0);
        Pieces<T> memory(static_cast<T*>(scratch(fc::Hidden<S>::size(s, count) * sizeof(T))));
        const fc::Hidden<S> hidden(s, count, memory);
        hidden.compute(s, n0, count);
        if (s.lam_channels) {
            T* lam = s.lam + n0 * s.lam_channels;
            fc::affine<S>(s.lam_weight, s.lam_bias, s.lam_channels, s.hidden, hidden.units, count, lam);
            fc::each_vector<S>(count * s.lam_channels, [&](auto load, auto store) {
                store(lam, fc::lam_of<S>(load(lam), s.lam_code));
            });
        }
        if (s.others)
            fc::affine<S>(s.phi_weight, s.phi_bias, s.others, s.hidden, hidden.units, count,
                          s.phi + n0 * s.others);
    });
}

}  // namespace dcd::DCD_ISA
