// SPDX-License-Identifier: BSD-3-Clause
// Gradients of the dynamic branch behind its pooling, given those of lam and Phi. What stands between the
// sums and the logits is computed again, which costs as much as reading the weights. First everything that
// belongs to one sample, then the weights' gradients, whose every number is one sum over the samples in their
// order.
#pragma once

#include "branch.h"

namespace dcd::DCD_ISA {
namespace fc {

template <class T>
static inline T relu6(T x) {
    return x < T(0) ? T(0) : x > T(6) ? T(6) : x;
}

// Plain loops: they become vectors, and the choice of a slope has no other form here.
template <class T>
static void behind_lam(const T* grad, const T* lam, int64_t count, int code, T* out) {
    const T top = code == kLamHardsigmoid ? T(1) : T(2), slope = code == kLamHardsigmoid ? T(6) : T(3);
    switch (code) {
        case kLamHardsigmoid2:
        case kLamHardsigmoid:
            for (int64_t i = 0; i < count; ++i)
                out[i] = lam[i] <= T(0) || lam[i] >= top ? T(0) : grad[i] / slope;
            return;
        case kLamSigmoid2:
            for (int64_t i = 0; i < count; ++i) out[i] = grad[i] * (lam[i] * (T(1) - lam[i] / T(2)));
            return;
        case kLamSigmoid:
            for (int64_t i = 0; i < count; ++i) out[i] = grad[i] * (lam[i] * (T(1) - lam[i]));
            return;
        default:
            for (int64_t i = 0; i < count; ++i) out[i] = grad[i];
    }
}

// grad becomes that of the squeeze FC's output; kGateSE's, without the part through its logits, and theirs.
template <class S>
static void behind_gate(const typename S::Scalar* before, const typename S::Scalar* logits, int64_t count,
                        int code, typename S::Scalar* grad, typename S::Scalar* d_logits) {
    using T = typename S::Scalar;
    switch (code) {
        case kGateRelu:
            for (int64_t i = 0; i < count; ++i) grad[i] = before[i] <= T(0) ? T(0) : grad[i];
            return;
        case kGateRelu6:
            for (int64_t i = 0; i < count; ++i)
                grad[i] = before[i] <= T(0) || before[i] >= T(6) ? T(0) : grad[i];
            return;
        case kGateSilu:
            each_vector<S>(count, [&](auto load, auto store) {
                const auto one = S::set1(T(1)), x = load(before);
                const auto sigmoid = S::div(one, S::add(one, S::exp(S::sub(S::zero(), x))));
                const auto slope = S::mul(sigmoid, S::fma(x, S::sub(one, sigmoid), one));
                store(grad, S::mul(load(grad), slope));
            });
            return;
        case kGateHardswish:
            for (int64_t i = 0; i < count; ++i) {
                const T x = before[i], shifted = x + T(3);
                const T inner = shifted <= T(0) || shifted >= T(6) ? T(0) : x;
                grad[i] *= (relu6(shifted) + inner) / T(6);
            }
            return;
        case kGateSE:
            for (int64_t i = 0; i < count; ++i) {
                const T shifted = logits[i] + T(3);
                d_logits[i] = shifted <= T(0) || shifted >= T(6) ? T(0) : grad[i] * (before[i] / T(3));
                grad[i] *= relu6(shifted) / T(3);
            }
            return;
        default:
            return;
    }
}

// Columns [j, j + VECTORS) of c = A B, for ROWS rows of A.
template <class S, int ROWS, int VECTORS>
static void wide_panel(const Block<typename S::Scalar>& s, int64_t j) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    V sum[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v)
            sum[r][v] = s.init ? S::load(s.init + r * s.init_row + j + v * S::kLanes) : S::zero();
    const T* a = s.a;
    const T* b = s.b + j;
    for (int64_t i = 0; i < s.k; ++i, a += s.a_k, b += s.b_k) {
        V x[ROWS];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) x[r] = S::set1(a[r * s.a_row]);
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) {
            const V y = S::load(b + v * S::kLanes);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; ++r) sum[r][v] = S::fma(x[r], y, sum[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) {
            const V y = s.scale ? S::mul(sum[r][v], S::set1(s.scale[r])) : sum[r][v];
            S::store(s.c + r * s.c_row + j + v * S::kLanes, y);
        }
}

template <class S, int ROWS, int VECTORS>
static int64_t wide_panels(const Block<typename S::Scalar>& s, int64_t j, int64_t lanes) {
    for (; j + VECTORS * S::kLanes <= lanes; j += VECTORS * S::kLanes) wide_panel<S, ROWS, VECTORS>(s, j);
    if constexpr (VECTORS > 4) return wide_panels<S, ROWS, VECTORS / 2>(s, j, lanes);
    return j;
}

// The first columns of c = A B, as many as fill panels.
template <class S, int ROWS>
static int64_t wide_panels(const Block<typename S::Scalar>& s, int64_t lanes) {
    constexpr int kWide = S::kRegisters == 32 ? 16 : 8;
    return wide_panels<S, ROWS, ROWS == 1 ? kWide : ROWS <= 3 ? kWide / 2 : 4>(s, 0, lanes);
}

// c = A B as multiply(), for the few rows of a task. B is read once, from far away, and its rows are long: in
// panels so wide that the next lines of a row are on their way while the first are multiplied.
template <class S>
static void multiply_few(const Block<typename S::Scalar>& s, int64_t rows, int64_t lanes) {
    int64_t done = 0;
    switch (rows) {
        case 1:
            done = wide_panels<S, 1>(s, lanes);
            break;
        case 2:
            done = wide_panels<S, 2>(s, lanes);
            break;
        case 3:
            done = wide_panels<S, 3>(s, lanes);
            break;
        default:
            if constexpr (S::kRegisters == 32) {
                if (rows == 4) done = wide_panels<S, 4>(s, lanes);
                if (rows == 5) done = wide_panels<S, 5>(s, lanes);
                if (rows == 6) done = wide_panels<S, 6>(s, lanes);
            }
    }
    if (done < lanes) multiply<S>(s.at(0, done), rows, lanes - done);
}

// out[r, :] = a[r] b for rows of `columns` numbers
template <class S>
static void outer_of_one(const typename S::Scalar* a, int64_t rows, const typename S::Scalar* b,
                         int64_t columns, typename S::Scalar* out) {
    constexpr int64_t W = S::kLanes;
    int64_t j = 0;
    for (; j + 4 * W <= columns; j += 4 * W) {
        const auto x0 = S::load(b + j), x1 = S::load(b + j + W), x2 = S::load(b + j + 2 * W),
                   x3 = S::load(b + j + 3 * W);
        for (int64_t r = 0; r < rows; ++r) {
            const auto f = S::set1(a[r]);
            auto* to = out + r * columns + j;
            S::store(to, S::mul(f, x0)), S::store(to + W, S::mul(f, x1));
            S::store(to + 2 * W, S::mul(f, x2)), S::store(to + 3 * W, S::mul(f, x3));
        }
    }
    for (; j + W <= columns; j += W) {
        const auto x = S::load(b + j);
        for (int64_t r = 0; r < rows; ++r) S::store(out + r * columns + j, S::mul(S::set1(a[r]), x));
    }
    if (j < columns) {
        const int rest = static_cast<int>(columns - j);
        const auto x = S::load_first(b + j, rest);
        for (int64_t r = 0; r < rows; ++r)
            S::store_first(out + r * columns + j, S::mul(S::set1(a[r]), x), rest);
    }
}

// The gradient of one FC's weight and bias: sum over the samples of grad[n] input[n]^T and of grad[n].
template <class T>
struct LayerGrad {
    const T* grad;   // [N, rows]; null: zero
    const T* input;  // [N, columns]
    int64_t rows, columns;
    T* d_weight;  // [rows, columns] or null
    T* d_bias;    // [rows] or null
};

template <class S>
static void layer_gradient(const LayerGrad<typename S::Scalar>& l, int64_t batch, int64_t r0, int64_t r1) {
    using T = typename S::Scalar;
    T* weight = l.d_weight ? l.d_weight + r0 * l.columns : nullptr;
    if (!l.grad) {
        if (weight)
            for (int64_t i = 0; i < (r1 - r0) * l.columns; ++i) weight[i] = T(0);
        if (l.d_bias)
            for (int64_t r = r0; r < r1; ++r) l.d_bias[r] = T(0);
        return;
    }
    if (weight && batch == 1) {
        outer_of_one<S>(l.grad + r0, r1 - r0, l.input, l.columns, weight);
    } else if (weight) {
        Block<T> block;
        block.a = l.grad + r0, block.a_row = 1, block.a_k = l.rows;
        block.b = l.input, block.b_k = l.columns, block.k = batch;
        block.c = weight, block.c_row = l.columns;
        multiply<S>(block, r1 - r0, l.columns);
    }
    if (l.d_bias)
        each_vector<S>(r1 - r0, [&](auto load, auto store) {
            auto sum = S::zero();
            for (int64_t n = 0; n < batch; ++n) sum = S::add(sum, load(l.grad + n * l.rows + r0));
            store(l.d_bias + r0, sum);
        });
}

}  // namespace fc

template <class S>
static void branch_grad(const BranchGradParams<typename S::Scalar>& s, const Runtime& given) {
    using T = typename S::Scalar;
    const BranchParams<T>& f = s.forward;
    Runtime runtime = given;
    const int64_t samples = fc::samples_of_a_task<S>(f, runtime);
    const bool se = f.gate_code == kGateSE;
    const int64_t units = f.batch * f.hidden, lams = f.batch * f.lam_channels;
    Pieces<T> memory(static_cast<T*>(
        scratch((fc::Hidden<S>::size(f, f.batch) + Pieces<T>::rounded(lams) + 2 * Pieces<T>::rounded(units)) *
                    static_cast<int64_t>(sizeof(T)),
                Scratch::kShared)));
    const fc::Hidden<S> all(f, f.batch, memory);
    T* d_logits = memory.take(lams);        // [N, lam_channels]
    T* d_before = memory.take(units);       // [N, S]
    T* d_gate_logits = memory.take(units);  // [N, S]

    parallel(runtime, (f.batch + samples - 1) / samples, [&](int64_t task) {
        const int64_t n0 = task * samples, count = least(samples, f.batch - n0), h0 = n0 * f.hidden;
        const fc::Hidden<S> hidden(all, f, n0);
        hidden.compute(f, n0, count);
        Block<T> from_lam, from_phi;
        from_lam.c = from_phi.c = d_before + h0, from_lam.c_row = from_phi.c_row = f.hidden;
        if (s.d_lam) {
            const int64_t l0 = n0 * f.lam_channels;
            fc::behind_lam(s.d_lam + l0, s.lam + l0, count * f.lam_channels, f.lam_code, d_logits + l0);
            from_lam.a = d_logits + l0, from_lam.a_row = f.lam_channels, from_lam.a_k = 1;
            from_lam.b = f.lam_weight, from_lam.b_k = f.hidden, from_lam.k = f.lam_channels;
            fc::multiply_few<S>(from_lam, count, f.hidden);
            from_phi.init = from_phi.c, from_phi.init_row = f.hidden;
        }
        from_phi.b = f.phi_weight, from_phi.b_k = f.hidden;
        if (s.d_phi) {
            from_phi.a = s.d_phi + n0 * f.others, from_phi.a_row = f.others, from_phi.a_k = 1;
            from_phi.k = f.others;
        }
        if (s.d_phi || !s.d_lam) fc::multiply_few<S>(from_phi, count, f.hidden);
        fc::behind_gate<S>(hidden.before, hidden.logits, count * f.hidden, f.gate_code, d_before + h0,
                           d_gate_logits + h0);
        if (se) {
            Block<T> through;
            through.a = d_gate_logits + h0, through.a_row = f.hidden, through.a_k = 1;
            through.b = f.gate, through.b_k = f.hidden, through.k = f.hidden;
            through.init = through.c = d_before + h0, through.init_row = through.c_row = f.hidden;
            multiply<S>(through, count, f.hidden);
        }
        if (s.d_sums) {
            T scale[fc::kSamples<S>];
            for (T& factor : scale) factor = f.scale;
            Block<T> back;
            back.a = d_before + h0, back.a_row = f.hidden, back.a_k = 1;
            back.b = f.squeeze, back.b_k = f.inputs, back.k = f.hidden;
            back.scale = scale;
            back.c = s.d_sums + n0 * f.inputs, back.c_row = f.inputs;
            fc::multiply_few<S>(back, count, f.inputs);
        }
    });

    const fc::LayerGrad<T> layers[] = {
        {d_before, all.pooled, f.hidden, f.inputs, s.d_squeeze, s.d_squeeze_bias},
        {d_gate_logits, all.before, f.hidden, f.hidden, s.d_gate, s.d_gate_bias},
        {s.d_lam ? d_logits : nullptr, all.units, f.lam_channels, f.hidden, s.d_lam_weight, s.d_lam_bias},
        {s.d_phi, all.units, f.others, f.hidden, s.d_phi_weight, s.d_phi_bias}};
    constexpr int64_t kRows = 64;
    int64_t first[5] = {0};
    for (int i = 0; i < 4; ++i)
        first[i + 1] =
            first[i] + (layers[i].d_weight || layers[i].d_bias ? (layers[i].rows + kRows - 1) / kRows : 0);
    parallel(runtime, first[4], [&](int64_t task) {
        int i = 0;
        while (task >= first[i + 1]) ++i;
        const int64_t r0 = (task - first[i]) * kRows;
        fc::layer_gradient<S>(layers[i], f.batch, r0, least(r0 + kRows, layers[i].rows));
    });
}

}  // namespace dcd::DCD_ISA
