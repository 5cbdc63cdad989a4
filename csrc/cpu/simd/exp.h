// SPDX-License-Identifier: BSD-3-Clause
// e^x in fp32 for the instruction sets that have no such instruction.
#pragma once

namespace dcd::simd {

// Range reduction x = n ln2 + r, |r| <= ln2 / 2, then a degree-6 Taylor-like polynomial in r; below 2 ulp.
// ln2 is split in two so that r keeps its digits for large n. NaN comes back as NaN, x above 88.03 as
// infinity and x below -87.33 as a value near FLT_MIN, which is all that the activations need.
template <class S>
static inline typename S::Vec exp(typename S::Vec x) {
    using V = typename S::Vec;
    x = S::min(S::set1(89.0f), S::max(S::set1(-87.3365478515625f), x));
    const V n = S::round(S::mul(x, S::set1(1.44269504088896341f)));
    V r = S::fma(n, S::set1(-0.693359375f), x);
    r = S::fma(n, S::set1(2.12194440e-4f), r);
    V y = S::set1(1.0f / 720.0f);
    y = S::fma(y, r, S::set1(1.0f / 120.0f));
    y = S::fma(y, r, S::set1(1.0f / 24.0f));
    y = S::fma(y, r, S::set1(1.0f / 6.0f));
    y = S::fma(y, r, S::set1(0.5f));
    y = S::fma(y, r, S::set1(1.0f));
    y = S::fma(y, r, S::set1(1.0f));
    return S::mul(y, S::pow2(n));
}

}  // namespace dcd::simd
