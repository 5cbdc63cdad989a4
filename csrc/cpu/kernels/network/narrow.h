// SPDX-License-Identifier: BSD-3-Clause
// What a network's images and weights are in memory: numbers of fp32; or bf16, with the weights in pairs.
// Sums are fp32 either way, so that kernels differ only in how they load, store and multiply.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../../network.h"
#include "../../mixed.h"

namespace dcd::DCD_ISA::net {

// A network in bf16, multiplied in fp32: what is loaded becomes fp32 in registers.
template <class Simd>
struct Narrow : Simd {
    using Vec = typename Simd::Vec;
    static constexpr bool kNarrow = true;
    static constexpr bool kDots = false;  // see network_avx512_bf16.cpp

    using Simd::load;
    using Simd::prefetch;
    using Simd::store;
    static inline Vec load(const Bfloat16* p) { return Simd::widen(&p->bits); }
    static inline void store(Bfloat16* p, Vec x) { Simd::narrow(&p->bits, x); }
    static inline void prefetch(const Pair* p) { Simd::prefetch(reinterpret_cast<const float*>(p)); }

    // Of a vector of pairs, or of two neighbouring values in every lane.
    static inline Vec firsts(const Pair* p) { return Simd::firsts(&p->first); }
    static inline Vec seconds(const Pair* p) { return Simd::seconds(&p->first); }
    static inline Vec set_first(const Bfloat16* p) { return Simd::set1_first(&p->bits); }
    static inline Vec set_second(const Bfloat16* p) { return Simd::set1_second(&p->bits); }
    static inline Vec set_first(const Pair* p) { return Simd::set1_first(&p->first); }
    static inline Vec set_second(const Pair* p) { return Simd::set1_second(&p->first); }
    static inline Vec set_first(const float* p) { return Simd::set1(p[0]); }
    static inline Vec set_second(const float* p) { return Simd::set1(p[1]); }
    static inline void store_pairs(Pair* p, Vec first, Vec second) {
        Simd::narrow_pairs(&p->first, first, second);
    }
};

template <class S, class = void>
struct StorageOf {
    using Image = typename S::Scalar;
    using Weight = typename S::Scalar;
};
template <class S>
struct StorageOf<S, std::enable_if_t<S::kNarrow>> {
    using Image = Bfloat16;
    using Weight = Pair;
};

// What images, and weights that are summed over channels, consist of.
template <class S>
using Stored = typename StorageOf<S>::Image;
template <class S>
using Weight = typename StorageOf<S>::Weight;

// The weights that go with images of T.
template <class T>
using Packed = std::conditional_t<std::is_arithmetic_v<T>, T, Pair>;

template <class T>
constexpr bool kIsNarrow = !std::is_arithmetic_v<T>;

// Of a tile: what it reads, what that is multiplied with, what it writes.
template <class IN, class WEIGHT, class OUT>
struct Types {
    using In = IN;
    using W = WEIGHT;
    using Out = OUT;
};

static inline float value_of(float x) {
    return x;
}
static inline float value_of(Bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// One number, rounded to the nearest, ties to even.
template <class TO, class FROM>
static inline TO converted(FROM x) {
    if constexpr (std::is_same_v<TO, FROM>) {
        return x;
    } else if constexpr (std::is_same_v<TO, float>) {
        return value_of(x);
    } else {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof(bits));
        const bool nan = (bits & 0x7fffffff) > 0x7f800000;
        return {static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
    }
}

// Numbers of fp32 that `count` of T take.
template <class T>
static inline int64_t floats(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 3) / 4;
}

}  // namespace dcd::DCD_ISA::net
