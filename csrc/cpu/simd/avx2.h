// SPDX-License-Identifier: BSD-3-Clause
// Eight fp32 lanes, AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "exp.h"

namespace dcd::avx2 {

struct Simd {
    using Scalar = float;
    static constexpr int kLanes = 8;
    static constexpr int kRegisters = 16;

    struct Vec {
        __m256 v;
    };

    static inline __m256i first(int count) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
    }

    static inline Vec zero() { return {_mm256_setzero_ps()}; }
    static inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
    static inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
    // The first `count` lanes (0 < count <= 8); memory behind them is not touched.
    static inline Vec load_first(const float* p, int count) { return {_mm256_maskload_ps(p, first(count))}; }
    static inline void store_first(float* p, Vec x, int count) { _mm256_maskstore_ps(p, first(count), x.v); }
    static inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
    static inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
    static inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
    static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    // max and min return their second operand when either is NaN, so NaN in x propagates.
    static inline Vec max(Vec bound, Vec x) { return {_mm256_max_ps(bound.v, x.v)}; }
    static inline Vec min(Vec bound, Vec x) { return {_mm256_min_ps(bound.v, x.v)}; }
    // x where a > b, else 0
    static inline Vec keep_greater(Vec a, Vec b, Vec x) {
        return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ), x.v)};
    }
    static inline float sum(Vec x) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    // bf16 and back, to the nearest, ties to even.
    static inline Vec widen(const uint16_t* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
    }
    static inline Vec widen_first(const uint16_t* p, int count) {
        alignas(16) uint16_t lanes[kLanes] = {};
        for (int i = 0; i < count; ++i) lanes[i] = p[i];
        return widen(lanes);
    }
    static inline void narrow(uint16_t* p, Vec x) {
        const __m256i bits = _mm256_castps_si256(x.v), one = _mm256_set1_epi32(1);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        const __m128i packed =
            _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    }
    static inline void narrow_first(uint16_t* p, Vec x, int count) {
        alignas(16) uint16_t lanes[kLanes];
        narrow(lanes, x);
        for (int i = 0; i < count; ++i) p[i] = lanes[i];
    }

    // Eight pairs of bf16: the first of each, the second of each; or one pair's, in every lane.
    static inline Vec firsts(const uint16_t* p) { return first_halves(pairs(p)); }
    static inline Vec seconds(const uint16_t* p) { return second_halves(pairs(p)); }
    static inline Vec set1_first(const uint16_t* p) { return first_halves(pair(p)); }
    static inline Vec set1_second(const uint16_t* p) { return second_halves(pair(p)); }
    static inline void narrow_pairs(uint16_t* p, Vec a, Vec b) {
        alignas(16) uint16_t first[kLanes], second[kLanes];
        narrow(first, a), narrow(second, b);
        const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(first)),
                      high = _mm_load_si128(reinterpret_cast<const __m128i*>(second));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi16(low, high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + kLanes), _mm_unpackhi_epi16(low, high));
    }
    static inline __m256i pairs(const uint16_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static inline __m256i pair(const uint16_t* p) {
        int32_t bits;
        std::memcpy(&bits, p, sizeof(bits));
        return _mm256_set1_epi32(bits);
    }
    static inline Vec first_halves(__m256i x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))}; }
    static inline Vec second_halves(__m256i x) {
        return {_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-0x10000)))};
    }

    // out[i] = sum of the i-th operand's lanes
    static inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
        const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
    }

    // out[c, r] = in[r, c] for a square of 8: pairs, then fours, within 128 bits, then the halves.
    static inline void transpose(const float* in, int64_t in_row, float* out, int64_t out_row) {
        __m256 a[8], b[8];
        for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(in + i * in_row);
        for (int i = 0; i < 8; i += 4) {
            const __m256 t0 = _mm256_unpacklo_ps(a[i], a[i + 1]), t1 = _mm256_unpackhi_ps(a[i], a[i + 1]);
            const __m256 t2 = _mm256_unpacklo_ps(a[i + 2], a[i + 3]),
                         t3 = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
            b[i] = _mm256_shuffle_ps(t0, t2, 0x44), b[i + 1] = _mm256_shuffle_ps(t0, t2, 0xee);
            b[i + 2] = _mm256_shuffle_ps(t1, t3, 0x44), b[i + 3] = _mm256_shuffle_ps(t1, t3, 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            _mm256_storeu_ps(out + i * out_row, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
            _mm256_storeu_ps(out + (i + 4) * out_row, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
        }
    }

    // 2^n for integral n in [-126, 128]; 128 gives infinity.
    static inline Vec pow2(Vec n) {
        const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 23))};
    }
    static inline Vec round(Vec x) {
        return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    static inline Vec exp(Vec x) { return simd::exp<Simd>(x); }
    static inline void prefetch(const float* p) {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
    }
};

}  // namespace dcd::avx2
