// SPDX-License-Identifier: BSD-3-Clause
// Sixteen fp32 lanes, AVX-512 F/DQ/BW/VL. Several files include this, each in a namespace of its own.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "exp.h"

namespace dcd::DCD_ISA {

struct Simd {
    using Scalar = float;
    static constexpr int kLanes = 16;
    static constexpr int kRegisters = 32;

    struct Vec {
        __m512 v;
    };

    static inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

    static inline Vec zero() { return {_mm512_setzero_ps()}; }
    static inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
    static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
    // The first `count` lanes (0 < count <= 16); memory behind them is not touched.
    static inline Vec load_first(const float* p, int count) {
        return {_mm512_maskz_loadu_ps(first(count), p)};
    }
    static inline void store_first(float* p, Vec x, int count) {
        _mm512_mask_storeu_ps(p, first(count), x.v);
    }
    static inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    static inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    static inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
    static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    // max and min return their second operand when either is NaN, so NaN in x propagates.
    static inline Vec max(Vec bound, Vec x) { return {_mm512_max_ps(bound.v, x.v)}; }
    static inline Vec min(Vec bound, Vec x) { return {_mm512_min_ps(bound.v, x.v)}; }
    // x where a > b, else 0
    static inline Vec keep_greater(Vec a, Vec b, Vec x) {
        return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), x.v)};
    }
    static inline float sum(Vec x) { return _mm512_reduce_add_ps(x.v); }

    // bf16 and back, to the nearest, ties to even.
    static inline __m512 widened(__m256i x) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    }
    static inline __m256i narrowed(__m512 x) {
#if defined(__AVX512BF16__)
        return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
        const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
    }
    static inline Vec widen(const uint16_t* p) {
        return {widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static inline Vec widen_first(const uint16_t* p, int count) {
        return {widened(_mm256_maskz_loadu_epi16(first(count), p))};
    }
    static inline void narrow(uint16_t* p, Vec x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(x.v));
    }
    static inline void narrow_first(uint16_t* p, Vec x, int count) {
        _mm256_mask_storeu_epi16(p, first(count), narrowed(x.v));
    }

    // Sixteen pairs of bf16: the first of each, the second of each; or one pair's, in every lane.
    static inline Vec firsts(const uint16_t* p) { return first_halves(_mm512_loadu_si512(p)); }
    static inline Vec seconds(const uint16_t* p) { return second_halves(_mm512_loadu_si512(p)); }
    static inline Vec set1_first(const uint16_t* p) { return first_halves(_mm512_set1_epi32(pair(p))); }
    static inline Vec set1_second(const uint16_t* p) { return second_halves(_mm512_set1_epi32(pair(p))); }
    static inline void narrow_pairs(uint16_t* p, Vec a, Vec b) {
        const __m512i low = _mm512_cvtepu16_epi32(narrowed(a.v)), high = _mm512_cvtepu16_epi32(narrowed(b.v));
        _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    static inline int32_t pair(const uint16_t* p) {
        int32_t bits;
        std::memcpy(&bits, p, sizeof(bits));
        return bits;
    }
    static inline Vec first_halves(__m512i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))}; }
    static inline Vec second_halves(__m512i x) {
        return {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-0x10000)))};
    }

    // out[i] = sum of the i-th operand's lanes
    static inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
        const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
        const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
    }

    // out[c, r] = in[r, c] for a square of 16: pairs, then fours, within 128 bits, then the 128-bit quarters.
    static inline void transpose(const float* in, int64_t in_row, float* out, int64_t out_row) {
        __m512 a[16], b[16];
        for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * in_row);
        for (int i = 0; i < 16; i += 4) {
            const __m512 t0 = _mm512_unpacklo_ps(a[i], a[i + 1]), t1 = _mm512_unpackhi_ps(a[i], a[i + 1]);
            const __m512 t2 = _mm512_unpacklo_ps(a[i + 2], a[i + 3]),
                         t3 = _mm512_unpackhi_ps(a[i + 2], a[i + 3]);
            b[i] = _mm512_shuffle_ps(t0, t2, 0x44), b[i + 1] = _mm512_shuffle_ps(t0, t2, 0xee);
            b[i + 2] = _mm512_shuffle_ps(t1, t3, 0x44), b[i + 3] = _mm512_shuffle_ps(t1, t3, 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            const __m512 even = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88),
                         odd = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
            const __m512 even2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
            const __m512 odd2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
            _mm512_storeu_ps(out + i * out_row, _mm512_shuffle_f32x4(even, even2, 0x88));
            _mm512_storeu_ps(out + (i + 4) * out_row, _mm512_shuffle_f32x4(odd, odd2, 0x88));
            _mm512_storeu_ps(out + (i + 8) * out_row, _mm512_shuffle_f32x4(even, even2, 0xdd));
            _mm512_storeu_ps(out + (i + 12) * out_row, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
        }
    }

    // 2^n for integral n in [-126, 128]; 128 gives infinity.
    static inline Vec pow2(Vec n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v)}; }
    static inline Vec round(Vec x) {
        return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    static inline Vec exp(Vec x) { return simd::exp<Simd>(x); }
    static inline void prefetch(const float* p) {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
    }
};

}  // namespace dcd::DCD_ISA
