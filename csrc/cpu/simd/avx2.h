// Eight fp32 lanes, AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>

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
  static inline Vec load_first(const float* p, int count) {
    return {_mm256_maskload_ps(p, first(count))};
  }
  static inline void store_first(float* p, Vec x, int count) {
    _mm256_maskstore_ps(p, first(count), x.v);
  }
  static inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  // max and min return their second operand when either is NaN, so NaN in x propagates.
  static inline Vec max(Vec bound, Vec x) { return {_mm256_max_ps(bound.v, x.v)}; }
  static inline Vec min(Vec bound, Vec x) { return {_mm256_min_ps(bound.v, x.v)}; }
  static inline float sum(Vec x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  // 2^n for integral n in [-126, 127].
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
