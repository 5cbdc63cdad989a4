// SPDX-License-Identifier: BSD-3-Clause
// Elements of the tensors that the kernels read, one at a time and 16 bytes at a time. The kernels' bodies
// compile for the host as well, where the tests run them and are told of every read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#    define DCD_INDEX __host__ __device__ __forceinline__  // arithmetic that launchers and tests need as well
#    define DCD_BODY __device__ __forceinline__
#    define DCD_UNROLL _Pragma("unroll")
#    define DCD_UNROLL_BY_4 _Pragma("unroll 4")
#else
#    define DCD_INDEX inline
#    define DCD_BODY inline
#    define DCD_UNROLL
#    define DCD_UNROLL_BY_4
#endif

namespace dcd {

#ifndef __CUDACC__
namespace cuda {
// Supplied by the tests: raises unless the range is aligned to its size and belongs to a tensor.
void check_read(const void* from, size_t bytes);
}  // namespace cuda
#endif

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

template <class E>
constexpr int kVector = 16 / sizeof(E);  // elements of a 16-byte load

struct alignas(16) Words {
    uint32_t word[4];
};

DCD_BODY float float_of_bits(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

DCD_BODY float to_float(float x) {
    return x;
}

DCD_BODY float to_float(BFloat x) {
    return float_of_bits(static_cast<uint32_t>(x.bits) << 16);
}

DCD_BODY float to_float(Half x) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
#else
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) return (sign ? -1.0f : 1.0f) * static_cast<float>(rest) * 0x1p-24f;
    return float_of_bits(sign | ((rest << 13) + (112u << 23)));
#endif
}

// Through the read-only path: for what no kernel writes.
template <class E>
DCD_BODY E load_one(const E* from) {
#ifdef __CUDACC__
    if constexpr (sizeof(E) == 2)
        return {__ldg(reinterpret_cast<const unsigned short*>(from))};
    else
        return __ldg(from);
#else
    cuda::check_read(from, sizeof(E));
    return *from;
#endif
}

DCD_BODY Words load_words(const void* from) {
#ifdef __CUDACC__
    const uint4 four = __ldg(static_cast<const uint4*>(from));
    return {{four.x, four.y, four.z, four.w}};
#else
    cuda::check_read(from, sizeof(Words));
    Words words;
    std::memcpy(&words, from, sizeof words);
    return words;
#endif
}

DCD_BODY void decode(const Words& words, float (&values)[4], float) {
    DCD_UNROLL
    for (int i = 0; i < 4; ++i) values[i] = float_of_bits(words.word[i]);
}

template <class E>
DCD_BODY void decode(const Words& words, float (&values)[8], E) {
    DCD_UNROLL
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = to_float(E{static_cast<uint16_t>(words.word[i] & 0xffff)});
        values[2 * i + 1] = to_float(E{static_cast<uint16_t>(words.word[i] >> 16)});
    }
}

// kVector<E> neighbouring elements; `from` lies on a multiple of 16 bytes.
template <class E>
DCD_BODY void load_vector(const E* from, float (&values)[kVector<E>]) {
    decode(load_words(from), values, E{});
}

}  // namespace dcd
