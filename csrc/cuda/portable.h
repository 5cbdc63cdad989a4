// SPDX-License-Identifier: BSD-3-Clause
// What lets one kernel body be compiled by nvcc for the GPU and by g++ for the tests: rounding, copies, and a
// team of threads that runs a body phase by phase. The host build reports every access to the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "elements.h"

#ifdef __CUDACC__
#    include <cuda_bf16.h>
#    include <cuda_fp16.h>
#    define DCD_PRAGMA(text) _Pragma(#text)
#    define DCD_UNROLL_BY(count) DCD_PRAGMA(unroll count)
#else
#    define DCD_UNROLL_BY(count)
#endif
// for every i in [0, count), a constant: written out
#define DCD_EACH(i, count) DCD_UNROLL for (int i = 0; i < (count); ++i)

namespace dcd::cuda::dw {

// --- numbers

enum Type : int { kFloat = 0, kHalf = 1, kBFloat = 2 };

template <class T>
constexpr Type kTypeOf = sizeof(T) == 4 ? kFloat : kHalf;
template <>
inline constexpr Type kTypeOf<BFloat> = kBFloat;

// To the nearest, ties to even.
#ifdef __CUDACC__
DCD_BODY void from_float(float x, float* to) {
    *to = x;
}
DCD_BODY void from_float(float x, Half* to) {
    to->bits = __half_as_ushort(__float2half_rn(x));
}
DCD_BODY void from_float(float x, BFloat* to) {
    to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
#else
void from_float(float x, float* to);
void from_float(float x, Half* to);
void from_float(float x, BFloat* to);
#endif

// Neighbours that are moved together.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T value[N];
};

// --- memory

#ifndef __CUDACC__
// Supplied by the tests: raise unless the range is aligned to its size and belongs to a tensor; count what is
// written.
void check_read(const void* from, size_t bytes);
void check_write(const void* to, size_t bytes);
// A phase in which the order of the threads matters is a race on the GPU.
extern bool last_thread_first;
#endif

template <class V>
DCD_BODY V read_global(const V* from) {
#ifndef __CUDACC__
    check_read(from, sizeof(V));
#endif
    return *from;
}

template <class V>
DCD_BODY void write_global(V* to, const V& value) {
#ifndef __CUDACC__
    check_write(to, sizeof(V));
#endif
    *to = value;
}

// Global to shared memory; it has arrived after wait_for_copies() and a barrier. Four bytes is the least that
// the hardware copies without passing registers.
template <int BYTES>
DCD_BODY void copy_to_shared(void* to, const void* from) {
#ifdef __CUDACC__
    [[maybe_unused]] const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(from) : "memory");
    else if constexpr (BYTES == 8)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(target), "l"(from) : "memory");
    else if constexpr (BYTES == 4)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(from) : "memory");
    else
        *static_cast<uint16_t*>(to) = *static_cast<const uint16_t*>(from);
#else
    check_read(from, BYTES);
    std::memcpy(to, from, BYTES);
#endif
}

DCD_BODY void wait_for_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A parameter of few elements, contiguous, of a type known when the kernel runs. Null: not given.
struct Parameter {
    const void* data;
    int type;
};

DCD_BODY float read(const Parameter& from, int64_t i) {
    if (from.type == kFloat) return read_global(static_cast<const float*>(from.data) + i);
    if (from.type == kHalf) return to_float(read_global(static_cast<const Half*>(from.data) + i));
    return to_float(read_global(static_cast<const BFloat*>(from.data) + i));
}

template <class T>
DCD_BODY T rounded(float value) {
    T result;
    from_float(value, &result);
    return result;
}

DCD_BODY void write(void* to, int type, int64_t i, float value) {
    if (type == kFloat)
        write_global(static_cast<float*>(to) + i, value);
    else if (type == kHalf)
        write_global(static_cast<Half*>(to) + i, rounded<Half>(value));
    else
        write_global(static_cast<BFloat*>(to) + i, rounded<BFloat>(value));
}

// --- activations

// Unlike fminf and fmaxf this keeps NaN, as torch does.
DCD_BODY float clamp(float x, float low, float high) {
#ifdef __CUDACC__
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
    return x;
#else
    return x < low ? low : x > high ? high : x;
#endif
}

// --- a block of threads

// team.each(f) is f(thread, state) for every thread, then a barrier. What a thread keeps from one phase to
// the next is in its state: registers on the GPU, an array in the tests, which run the threads one after
// another.
template <class State, int THREADS>
struct Team {
    static constexpr int kThreads = THREADS;
#ifdef __CUDACC__
    State state;
    template <class F>
    DCD_BODY void each(const F& f) {
        f(static_cast<int>(threadIdx.x), state);
        __syncthreads();
    }
#else
    State state[THREADS];
    template <class F>
    void each(const F& f) {
        for (int i = 0; i < THREADS; ++i) {
            const int thread = last_thread_first ? THREADS - 1 - i : i;
            f(thread, state[thread]);
        }
    }
#endif
};

}  // namespace dcd::cuda::dw
