// SPDX-License-Identifier: BSD-3-Clause
// Portable lanes, fp32 and fp64: the vector type of GCC and Clang, which they map to whatever the target has;
// one lane, a plain number, for other compilers. The same expressions serve both.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dcd::baseline {

template <class T>
struct Simd {
    using Scalar = T;
#if defined(__GNUC__)
    typedef T Data __attribute__((vector_size(16)));
#else
    typedef T Data;
#endif
    static constexpr int kLanes = sizeof(Data) / sizeof(T);
    static constexpr int kRegisters = 16;

    struct Vec {
        Data v;
    };

    static inline Vec zero() { return {Data{}}; }
    static inline Vec set1(T x) { return {x - Data{}}; }  // not x + 0, which would lose the sign of -0
    static inline Vec load(const T* p) {
        Vec r;
        std::memcpy(&r.v, p, sizeof(Data));
        return r;
    }
    static inline void store(T* p, Vec x) { std::memcpy(p, &x.v, sizeof(Data)); }
    // The first `count` lanes (0 < count <= kLanes); memory behind them is not touched.
    static inline Vec load_first(const T* p, int count) {
        T lanes[kLanes] = {};
        for (int i = 0; i < count; ++i) lanes[i] = p[i];
        return load(lanes);
    }
    static inline void store_first(T* p, Vec x, int count) {
        T lanes[kLanes];
        store(lanes, x);
        for (int i = 0; i < count; ++i) p[i] = lanes[i];
    }

    static inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
    static inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
    static inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
    static inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
    static inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
    // max and min return their second operand when either is NaN, so NaN in x propagates.
    static inline Vec max(Vec bound, Vec x) { return {bound.v > x.v ? bound.v : x.v}; }
    static inline Vec min(Vec bound, Vec x) { return {bound.v < x.v ? bound.v : x.v}; }
    // x where a > b, else 0
    static inline Vec keep_greater(Vec a, Vec b, Vec x) { return {a.v > b.v ? x.v : Data{}}; }
    static inline T sum(Vec x) {
        T lanes[kLanes];
        store(lanes, x);
        T s = lanes[0];
        for (int i = 1; i < kLanes; ++i) s += lanes[i];
        return s;
    }
    // bf16 and back, to the nearest, ties to even.
    static inline Vec widen(const uint16_t* p) { return widen_first(p, kLanes); }
    static inline Vec widen_first(const uint16_t* p, int count) {
        uint32_t bits[kLanes] = {};
        for (int i = 0; i < count; ++i) bits[i] = uint32_t(p[i]) << 16;
        Vec r;
        std::memcpy(&r.v, bits, sizeof(Data));
        return r;
    }
    static inline void narrow(uint16_t* p, Vec x) { narrow_first(p, x, kLanes); }
    static inline void narrow_first(uint16_t* p, Vec x, int count) {
        uint32_t bits[kLanes];
        std::memcpy(bits, &x.v, sizeof(Data));
        for (int i = 0; i < count; ++i) {
            const bool nan = (bits[i] & 0x7fffffff) > 0x7f800000;
            p[i] = static_cast<uint16_t>(
                (nan ? bits[i] | 0x400000 : bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16);
        }
    }
    // kLanes pairs of bf16: the first of each, the second of each; or one pair's, in every lane.
    static inline Vec firsts(const uint16_t* p) { return every_second(p); }
    static inline Vec seconds(const uint16_t* p) { return every_second(p + 1); }
    static inline Vec set1_first(const uint16_t* p) { return set1(widened(*p)); }
    static inline Vec set1_second(const uint16_t* p) { return set1(widened(p[1])); }
    static inline void narrow_pairs(uint16_t* p, Vec a, Vec b) {
        uint16_t first[kLanes], second[kLanes];
        narrow(first, a), narrow(second, b);
        for (int i = 0; i < kLanes; ++i) p[2 * i] = first[i], p[2 * i + 1] = second[i];
    }
    static inline Vec every_second(const uint16_t* p) {
        uint32_t bits[kLanes];
        for (int i = 0; i < kLanes; ++i) bits[i] = uint32_t(p[2 * i]) << 16;
        Vec r;
        std::memcpy(&r.v, bits, sizeof(Data));
        return r;
    }
    static inline T widened(uint16_t x) {
        const uint32_t bits = uint32_t(x) << 16;
        T r;
        std::memcpy(&r, &bits, sizeof(r));
        return r;
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
        T lanes[kLanes];
        store(lanes, x);
        for (int i = 0; i < kLanes; ++i) lanes[i] = std::exp(lanes[i]);
        return load(lanes);
    }
    static inline void prefetch(const T*) {}
};

}  // namespace dcd::baseline
