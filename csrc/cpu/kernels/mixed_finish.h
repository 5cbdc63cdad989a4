// SPDX-License-Identifier: BSD-3-Clause
// From a block of fp32 sums to the map: scale, second product, bias, residual, activation, rounding.
#pragma once

#include "../mixed.h"
#include "layer.h"
#include "tile.h"

namespace dcd::DCD_ISA {

// Reads and writes lanes of a map.
template <class S, class T>
struct Elements {
    using V = typename S::Vec;
    static inline V load(const float* p, int64_t count) {
        return count >= S::kLanes ? S::load(p) : S::load_first(p, static_cast<int>(count));
    }
    static inline void store(float* p, V x, int64_t count) {
        if (count >= S::kLanes)
            S::store(p, x);
        else
            S::store_first(p, x, static_cast<int>(count));
    }
    static inline V load(const Bfloat16* p, int64_t count) {
        return count >= S::kLanes ? S::widen(&p->bits) : S::widen_first(&p->bits, static_cast<int>(count));
    }
    static inline void store(Bfloat16* p, V x, int64_t count) {
        if (count >= S::kLanes)
            S::narrow(&p->bits, x);
        else
            S::narrow_first(&p->bits, x, static_cast<int>(count));
    }
};

// rows x lanes of  to = act(lam * sums + second + bias + residual); memory of the map is [rows, lanes].
template <class T>
struct Finish {
    const float* sums = nullptr;    // [rows, lanes]
    const float* second = nullptr;  // like sums, or null
    int64_t row = 0;                // stride of both
    bool along_lanes = false;       // channels are lanes: lam and bias have one entry a lane
    const float* lam = nullptr;     // per channel, or null
    const float* bias = nullptr;    // per channel, or null
    const T* residual = nullptr;    // or null
    int64_t residual_row = 0;
    T* to = nullptr;
    int64_t to_row = 0;
    int activation = kNone;
};

template <class S, class T, bool ALONG>
static void finish_rows(const Finish<T>& f, int64_t rows, int64_t lanes) {
    using V = typename S::Vec;
    using Load = Elements<S, T>;
    constexpr int64_t W = S::kLanes;
    const auto factor = [](const float* p, int64_t row, int64_t lane, int64_t count) {
        return ALONG ? Load::load(p + lane, count) : S::set1(p[row]);
    };
    for (int64_t r = 0; r < rows; ++r) {
        const float* sums = f.sums + r * f.row;
        const float* second = f.second ? f.second + r * f.row : nullptr;
        const T* residual = f.residual ? f.residual + r * f.residual_row : nullptr;
        T* to = f.to + r * f.to_row;
        for (int64_t j = 0; j < lanes; j += W) {
            const int64_t count = lanes - j;
            V v = Load::load(sums + j, count);
            if (f.lam) v = S::mul(v, factor(f.lam, r, j, count));
            if (second) v = S::add(v, Load::load(second + j, count));
            if (f.bias) v = S::add(v, factor(f.bias, r, j, count));
            if (residual) v = S::add(v, Load::load(residual + j, count));
            if (f.activation != kNone) v = activate<S>(v, f.activation);
            Load::store(to + j, v, count);
        }
    }
}

template <class S, class T>
static void finish(const Finish<T>& f, int64_t rows, int64_t lanes) {
    if (f.along_lanes)
        finish_rows<S, T, true>(f, rows, lanes);
    else
        finish_rows<S, T, false>(f, rows, lanes);
}

}  // namespace dcd::DCD_ISA
