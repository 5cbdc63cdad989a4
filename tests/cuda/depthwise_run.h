// SPDX-License-Identifier: BSD-3-Clause
// The bodies of the CUDA depthwise kernels run on the CPU: block after block, thread after thread. Shared
// memory starts as NaN and ends in a fence.
#pragma once

#include <stdexcept>
#include <vector>

#include "cuda/depthwise_convolve.h"
#include "cuda/depthwise_plan.h"
#include "cuda/depthwise_reduce.h"
#include "cuda/depthwise_sums.h"

namespace dcd::cuda::dw {

// --- rounding, by the definition

inline void from_float(float x, float* to) {
    *to = x;
}
inline void from_float(float x, BFloat* to) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x)
        to->bits = 0x7fff;
    else
        to->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, Half* to) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (x != x) {
        to->bits = 0x7fff;
    } else if (size >= 65520.0f) {
        to->bits = sign | 0x7c00;
    } else if (size < 0x1p-14f) {
        to->bits = static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyintf(size * 0x1p24f)));
    } else {
        int exponent;
        const float fraction = std::frexp(size, &exponent);  // [0.5, 1)
        const int digits = static_cast<int>(std::nearbyintf(fraction * 2048.0f));
        to->bits = static_cast<uint16_t>(sign | (((exponent + 13) << 10) + digits));
    }
}

// Shared memory of just the bytes that the launcher asks for.
class SharedMemory {
  public:
    explicit SharedMemory(int bytes) : size_(bytes), words_(static_cast<size_t>(bytes) / 16 + 3) {}
    char* fresh() {
        char* first = reinterpret_cast<char*>(words_.data());
        std::memset(first, 0xff, static_cast<size_t>(size_));  // NaN in every type
        std::memset(first + size_, 0x5a, kFence);
        return first;
    }
    void check() const {
        const char* fence = reinterpret_cast<const char*>(words_.data()) + size_;
        for (int i = 0; i < kFence; ++i)
            if (fence[i] != 0x5a) throw std::runtime_error("a write behind the end of shared memory");
    }

  private:
    static constexpr int kFence = 16;
    int size_;
    std::vector<Words> words_;
};

template <class T, bool LAST, int KERNEL, Mode MODE>
void run_convolve(const ConvolveParams& s) {
    SharedMemory shared(convolve_shared_bytes<T, LAST, KERNEL>(s));
    const int64_t blocks = s.batch * s.tiling.tiles() * static_cast<int64_t>(s.tiling.groups.divisor);
    for (int64_t i = 0; i < blocks; ++i) {
        Team<NoState, kThreads> block;
        convolve_block<T, LAST, KERNEL, MODE>(block, s, static_cast<int>(i), shared.fresh());
        shared.check();
    }
}

template <class T, bool LAST, int KERNEL, Mode MODE>
void run_sums(const SumsParams& s) {
    const int bytes = SumsMemory<T, LAST, KERNEL>::bytes(s);
    if (bytes > 99 * 1024) throw std::runtime_error("more shared memory than every device has");
    SharedMemory shared(bytes);
    for (int64_t i = 0; i < sums_blocks(s); ++i) {
        Team<Products<KERNEL * KERNEL, Arrangement<T, LAST>::kChannels>, kThreads> block;
        sums_block<T, LAST, KERNEL, MODE>(block, s, static_cast<int>(i), shared.fresh());
        shared.check();
    }
}

// f(T{}, LAST, KERNEL) as types.
template <class F>
void choose(int type, bool last, int kernel, const F& f) {
    const auto with_kernel = [&](auto zero, auto order) {
        if (kernel == 3)
            f(zero, order, std::integral_constant<int, 3>{});
        else if (kernel == 5)
            f(zero, order, std::integral_constant<int, 5>{});
        else
            f(zero, order, std::integral_constant<int, 7>{});
    };
    const auto with_type = [&](auto zero) {
        if (last)
            with_kernel(zero, std::true_type{});
        else
            with_kernel(zero, std::false_type{});
    };
    if (type == kFloat)
        with_type(float{});
    else if (type == kHalf)
        with_type(Half{});
    else
        with_type(BFloat{});
}

template <class T, bool LAST, int KERNEL>
void run_convolve(const ConvolveParams& s, Mode mode) {
    if (mode == kSame)
        run_convolve<T, LAST, KERNEL, kSame>(s);
    else if (mode == kDown)
        run_convolve<T, LAST, KERNEL, kDown>(s);
    else
        run_convolve<T, LAST, KERNEL, kUp>(s);
}

template <class T, bool LAST, int KERNEL>
void run_sums(const SumsParams& s, Mode mode) {
    if (mode == kSame)
        run_sums<T, LAST, KERNEL, kSame>(s);
    else
        run_sums<T, LAST, KERNEL, kDown>(s);
}

inline void run_reduce(ReduceParams s) {
    const int64_t blocks = number_blocks(s);
    std::vector<float> memory(kReduceThreads);
    for (int64_t i = 0; i < blocks; ++i) {
        Team<LaneSum, kReduceThreads> block;
        reduce_block(block, s, i, memory.data());
    }
}

}  // namespace dcd::cuda::dw
