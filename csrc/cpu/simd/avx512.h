// Sixteen fp32 lanes, AVX-512 F/DQ/BW/VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "exp.h"

namespace dcd::avx512 {

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
  static inline float sum(Vec x) { return _mm512_reduce_add_ps(x.v); }

  // 2^n for integral n in [-126, 127].
  static inline Vec pow2(Vec n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v)}; }
  static inline Vec round(Vec x) {
    return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static inline Vec exp(Vec x) { return simd::exp<Simd>(x); }
  static inline void prefetch(const float* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }
};

}  // namespace dcd::avx512
