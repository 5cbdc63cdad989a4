// SPDX-License-Identifier: BSD-3-Clause
// Networks in bf16, multiplied by vdpbf16ps. Compiled with the flags of its instruction set, like
// kernels_avx512_bf16.cpp.
#define DCD_ISA avx512_bf16
#include "kernels.h"
#include "kernels/network/run.h"
#include "simd/avx512.h"

namespace dcd::avx512_bf16 {
namespace {

// A lane adds both products of its pair to its sum.
struct Dots : net::Narrow<Simd> {
    static constexpr bool kDots = true;
    using Pairs = __m512bh;

    static inline Pairs pairs(const Pair* p) { return reinterpret_cast<Pairs>(_mm512_loadu_si512(p)); }
    // Two neighbouring values, or one and zero, in every lane.
    static inline Pairs pair(const Bfloat16* p) {
        return reinterpret_cast<Pairs>(_mm512_set1_epi32(Simd::pair(&p->bits)));
    }
    static inline Pairs lone(const Bfloat16* p) {
        return reinterpret_cast<Pairs>(_mm512_set1_epi32(p->bits));
    }
    static inline Vec dot(Pairs a, Pairs b, Vec c) { return {_mm512_dpbf16_ps(c.v, a, b)}; }
};

}  // namespace

void run_network_bf16(const NetworkCall& call, const Runtime& runtime) {
    net::run<Dots>(call, runtime);
}
}  // namespace dcd::avx512_bf16
