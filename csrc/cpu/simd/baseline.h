// SPDX-License-Identifier: BSD-3-Clause
// Portable lanes: a small array that any C++ compiler can map to the vectors of its target. fp32 and fp64.
#pragma once

#include <cmath>
#include <cstdint>

namespace dcd::baseline {

template <class T>
struct Simd {
    using Scalar = T;
    static constexpr int kLanes = 16 / sizeof(T);
    static constexpr int kRegisters = 16;

#if defined(__GNUC__)
    // GCC and Clang keep a vector type in a register; they often spill an array.
    typedef T Data __attribute__((vector_size(16)));
    struct Vec {
        Data v;
    };
#else
    struct Vec {
        T v[kLanes];
    };
#endif

    static inline Vec zero() { return set1(T(0)); }
    static inline Vec set1(T x) {
        Vec r;
        for (int i = 0; i < kLanes; ++i) r.v[i] = x;
        return r;
    }
    static inline Vec load(const T* p) {
        Vec r;
        for (int i = 0; i < kLanes; ++i) r.v[i] = p[i];
        return r;
    }
    static inline void store(T* p, Vec x) {
        for (int i = 0; i < kLanes; ++i) p[i] = x.v[i];
    }
    // The first `count` lanes (0 < count <= kLanes); memory behind them is not touched.
    static inline Vec load_first(const T* p, int count) {
        Vec r = zero();
        for (int i = 0; i < count; ++i) r.v[i] = p[i];
        return r;
    }
    static inline void store_first(T* p, Vec x, int count) {
        for (int i = 0; i < count; ++i) p[i] = x.v[i];
    }

#define DCD_LANEWISE(name, ...)             \
    static inline Vec name(Vec a, Vec b) {  \
        Vec r;                              \
        for (int i = 0; i < kLanes; ++i) {  \
            const T x = a.v[i], y = b.v[i]; \
            r.v[i] = (__VA_ARGS__);         \
        }                                   \
        return r;                           \
    }
    DCD_LANEWISE(add, x + y)
    DCD_LANEWISE(sub, x - y)
    DCD_LANEWISE(mul, x* y)
    DCD_LANEWISE(div, x / y)
    // max and min return their second operand when either is NaN, so NaN in x propagates.
    DCD_LANEWISE(max, x > y ? x : y)
    DCD_LANEWISE(min, x < y ? x : y)
#undef DCD_LANEWISE

    static inline Vec fma(Vec a, Vec b, Vec c) { return add(mul(a, b), c); }
    static inline T sum(Vec x) {
        T s = x.v[0];
        for (int i = 1; i < kLanes; ++i) s += x.v[i];
        return s;
    }
    // out[i] = sum of the i-th operand's lanes
    static inline void sum4(Vec a, Vec b, Vec c, Vec d, T* out) {
        out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
    }
    // out[c, r] = in[r, c] for a square of kLanes
    static inline void transpose(const T* in, int64_t in_row, T* out, int64_t out_row) {
        for (int c = 0; c < kLanes; ++c)
            for (int r = 0; r < kLanes; ++r) out[c * out_row + r] = in[r * in_row + c];
    }
    static inline Vec exp(Vec x) {
        Vec r;
        for (int i = 0; i < kLanes; ++i) r.v[i] = std::exp(x.v[i]);
        return r;
    }
    static inline void prefetch(const T*) {}
};

}  // namespace dcd::baseline
