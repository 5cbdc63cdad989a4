// SPDX-License-Identifier: BSD-3-Clause
// What the two arrangements of the depthwise convolution share: its description, the weights of a sample, and
// what becomes of a sum before it is stored.
#pragma once

#include <cstdint>

#include "../params.h"
#include "../scratch.h"
#include "threads.h"
#include "tile.h"

namespace dcd::DCD_ISA {
namespace dw {

static inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}  // a >= 0
static inline int64_t round_up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}
// [0, count) in equal shares of at most `limit`: the size of the largest.
static inline int64_t share(int64_t count, int64_t limit) {
    return count > 0 ? ceil_div(count, ceil_div(count, limit)) : 1;
}
static inline int64_t gcd(int64_t a, int64_t b) {
    return b ? gcd(b, a % b) : a;
}
// A stride over one element moves nowhere, whatever it says.
static inline bool unit(int64_t size, int64_t stride) {
    return size <= 1 || stride == 1;
}

// Output positions of an axis whose tap k lies inside the input.
struct Range {
    int64_t begin, end;
};
template <class T>
static inline Range inside(const DepthwiseParams<T>& s, int axis, int64_t k) {
    const int64_t first = k * s.dilation[axis] - s.padding[axis], last = s.in_size[axis] - 1 - first;
    const int64_t begin = least(first < 0 ? ceil_div(-first, s.stride[axis]) : 0, s.out_size[axis]);
    return {begin, most(last < 0 ? 0 : least(last / s.stride[axis] + 1, s.out_size[axis]), begin)};
}

// Null stays null.
template <class T>
static inline T* shifted(T* p, int64_t offset) {
    return p ? p + offset : p;
}

template <class T>
static inline int64_t bytes(int64_t count) {
    return Pieces<char>::rounded(count * static_cast<int64_t>(sizeof(T)));
}
template <class T>
static inline T* take(Pieces<char>& pieces, int64_t count) {
    return reinterpret_cast<T*>(pieces.take(count * static_cast<int64_t>(sizeof(T))));
}

// Pieces into which the work on one sample is cut so that every thread gets several.
static inline int64_t task_share(const Runtime& runtime, int64_t tasks, int64_t most_pieces) {
    return runtime.threads <= 1 ? 1 : least(most_pieces, ceil_div(4 * runtime.threads, most(tasks, 1)));
}

// A convolution to be carried out with some of the taps of a weight: all of them in the forward pass, those
// of one phase of the stride, in reverse order, in the input's gradient.
template <class T>
struct Conv : DepthwiseParams<T> {
    int64_t full[3];       // the weight's own kernel; `kernel` counts the taps used
    int64_t tap_first[3];  // kernel position i of an axis is the weight's tap tap_first + i * tap_step
    int64_t tap_step[3];
    int64_t row_first = 0;  // output channel o is row row_first + o * row_step of weight, p and lam
    int64_t row_step = 1;
    int64_t rows;  // Co of weight, p and lam
    int64_t taps() const { return this->kernel[0] * this->kernel[1] * this->kernel[2]; }
    int64_t full_taps() const { return full[0] * full[1] * full[2]; }
};

template <class T>
static Conv<T> all_taps(const DepthwiseParams<T>& s) {
    Conv<T> conv;
    static_cast<DepthwiseParams<T>&>(conv) = s;
    for (int i = 0; i < 3; ++i) conv.full[i] = s.kernel[i], conv.tap_first[i] = 0, conv.tap_step[i] = 1;
    conv.rows = s.channels * s.multiplier;
    return conv;
}

// Lanes ODD, ODD + 2, ... of a, behind them those of b.
template <class S, int ODD>
static inline typename S::Vec every_second(typename S::Vec a, typename S::Vec b) {
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
    constexpr int o = ODD;
    if constexpr (S::kLanes == 16)
        return {__builtin_shufflevector(a.v, b.v, o, o + 2, o + 4, o + 6, o + 8, o + 10, o + 12, o + 14,
                                        o + 16, o + 18, o + 20, o + 22, o + 24, o + 26, o + 28, o + 30)};
    else if constexpr (S::kLanes == 8)
        return {__builtin_shufflevector(a.v, b.v, o, o + 2, o + 4, o + 6, o + 8, o + 10, o + 12, o + 14)};
    else if constexpr (S::kLanes == 4)
        return {__builtin_shufflevector(a.v, b.v, o, o + 2, o + 4, o + 6)};
#endif
    typename S::Scalar lanes[2 * S::kLanes];
    S::store(lanes, a);
    S::store(lanes + S::kLanes, b);
    for (int i = 0; i < S::kLanes; ++i) lanes[i] = lanes[2 * i + ODD];
    return S::load(lanes);
}

// The first `count` lanes, none for a count of zero or less.
template <class S>
static inline typename S::Vec load_up_to(const typename S::Scalar* p, int64_t count) {
    if (count >= S::kLanes) return S::load(p);
    return count > 0 ? S::load_first(p, static_cast<int>(count)) : S::zero();
}

// The same for a store of at least one.
template <class S>
static inline void store_up_to(typename S::Scalar* p, typename S::Vec x, int64_t count) {
    if (count >= S::kLanes)
        S::store(p, x);
    else
        S::store_first(p, x, static_cast<int>(count));
}

// A value that is computed here and now. GCC would rather read an operand from memory once for each use, and
// keep a pointer for each of thirty reads, and makes a call of memset of two stores of zeros.
template <class V>
static inline V pinned(V x) {
#if defined(DCD_X86) && defined(__GNUC__)
    asm("" : "+v"(x.v));
#endif
    return x;
}
template <class T>
static inline const T* pinned(const T* p) {
#if defined(__GNUC__)
    asm("" : "+r"(p));
#endif
    return p;
}

// Transposes W vectors of W lanes: each round moves the lowest bit of the lane to the top of the vector's
// number.
template <class S>
static inline void transpose_square(typename S::Vec (&a)[S::kLanes]) {
    constexpr int W = S::kLanes;
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        typename S::Vec b[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            b[i] = every_second<S, 0>(a[2 * i], a[2 * i + 1]);
            b[i + W / 2] = every_second<S, 1>(a[2 * i], a[2 * i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) a[i] = b[i];
    }
}

// The weights of one sample. Lanes run over the taps.
template <class S>
class Filters {
  public:
    using T = typename S::Scalar;
    using V = typename S::Vec;
    static constexpr int W = S::kLanes;

    explicit Filters(const Conv<T>& conv) : s_(conv), pitch_(round_up(conv.full_taps(), W)) {}
    int64_t pitch() const { return pitch_; }  // room for the taps of a channel
    int64_t scratch_size() const {
        return bytes<T>((2 * s_.latent + 1) * pitch_) + bytes<T>(W * W) + bytes<int64_t>(pitch_);
    }

    void open(int64_t n, Pieces<char>& pieces) {
        const int64_t taps = s_.full_taps(), latent = s_.latent;
        lam_ = shifted(s_.lam, n * s_.rows);
        basis_ = take<T>(pieces, (2 * latent + 1) * pitch_);
        T* r = basis_ + latent * pitch_;  // [L_k, taps]
        row_ = r + latent * pitch_;
        square_ = take<T>(pieces, W * W);
        place_ = take<int64_t>(pieces, pitch_);
        const T* phi = shifted(s_.phi, n * latent * latent);
        for (int64_t c = 0; c < latent; ++c)
            for (int64_t t = 0; t < pitch_; ++t) r[c * pitch_ + t] = t < taps ? s_.r[t * latent + c] : T(0);
        for (int64_t a = 0; a < latent; ++a)
            for (int64_t t = 0; t < pitch_; t += W) {
                V sum = S::zero();
                for (int64_t c = 0; c < latent; ++c)
                    sum = S::fma(S::set1(phi[a * latent + c]), S::load(r + c * pitch_ + t), sum);
                S::store(basis_ + a * pitch_ + t, sum);
            }
        for (int64_t t = 0; t < pitch_; ++t) place_[t] = -1;
        int64_t at = 0;
        plain_ = s_.taps() == taps;
        for (int64_t z = 0; z < s_.kernel[0]; ++z)
            for (int64_t y = 0; y < s_.kernel[1]; ++y)
                for (int64_t x = 0; x < s_.kernel[2]; ++x)
                    place_[((s_.tap_first[0] + z * s_.tap_step[0]) * s_.full[1] + s_.tap_first[1] +
                            y * s_.tap_step[1]) *
                               s_.full[2] +
                           s_.tap_first[2] + x * s_.tap_step[2]] = at++;
        for (int64_t t = 0; t < taps; ++t) plain_ = plain_ && place_[t] == t;
    }

    // w[i] = the weight at kernel position i (row-major) of output channel o.
    void channel(int64_t o, T* w /* [pitch] */) const {
        const int64_t taps = s_.full_taps();
        for (int64_t t = 0; t < taps; t += W) S::store((plain_ ? w : row_) + t, vector(o, t));
        if (plain_) return;
        for (int64_t t = 0; t < taps; ++t)
            if (place_[t] >= 0) w[place_[t]] = row_[t];
    }

    // w[i, k] = the weight at kernel position i of output channel o + k, for count <= W channels and W of w.
    void channels(int64_t o, int64_t count, T* w /* [taps, row] */, int64_t row) const {
        const int64_t taps = s_.full_taps();
        for (int64_t t = 0; t < taps; t += W) {
            for (int64_t k = 0; k < count; ++k) S::store(square_ + k * W, vector(o + k, t));
            V a[W];
#pragma GCC unroll 16
            for (int k = 0; k < W; ++k) a[k] = k < count ? S::load(square_ + k * W) : S::zero();
            transpose_square<S>(a);
#pragma GCC unroll 16
            for (int k = 0; k < W; ++k)
                if (place_[t + k] >= 0) S::store(w + place_[t + k] * row, a[k]);
        }
    }

  private:
    // Taps [t, t + W) of output channel o.
    V vector(int64_t o, int64_t t) const {
        const int64_t k = s_.row_first + o * s_.row_step, taps = s_.full_taps(), latent = s_.latent;
        V sum = load_up_to<S>(s_.weight + k * taps + t, taps - t);
        if (lam_) sum = S::mul(S::set1(lam_[k]), sum);
        for (int64_t a = 0; a < latent; ++a)
            sum = S::fma(S::set1(s_.p[k * latent + a]), S::load(basis_ + a * pitch_ + t), sum);
        return sum;
    }

    const Conv<T>& s_;
    int64_t pitch_;
    const T* lam_ = nullptr;    // [Co]
    T* basis_ = nullptr;        // Phi_n R^T [L_k, taps]
    T* row_ = nullptr;          // [taps]
    T* square_ = nullptr;       // [W, W]
    int64_t* place_ = nullptr;  // kernel position of each tap, or -1
    bool plain_ = false;        // kernel positions are the taps
};

// What becomes of a sum. None, relu and relu6 are all a clamp, which stays in line; a residual and the
// costlier activations go through one function that all kernels share, or its copies would be most of the
// library.
template <class T>
struct Finish {
    int activation;
    bool clamps;
    T low, high;
    Finish(int code = kNone, bool has_residual = false)
        : activation(code),
          clamps(!has_residual && (code == kNone || code == kRelu || code == kRelu6)),
          low(code == kNone ? -T(__builtin_inf()) : T(0)),
          high(code == kRelu6 ? T(6) : T(__builtin_inf())) {}
};

template <class S>
__attribute__((noinline)) static typename S::Vec finish_any(typename S::Vec y,
                                                            const typename S::Scalar* residual,
                                                            int activation, int64_t count) {
    if (residual) y = S::add(y, load_up_to<S>(residual, count));
    return activate<S>(y, activation);
}

// Stores N sums at equal distances, of each the first `count` lanes or all there are.
template <class S, int N>
static inline void finish(const Finish<typename S::Scalar>& how, typename S::Vec (&sum)[N],
                          typename S::Scalar* out, int64_t out_step, const typename S::Scalar* residual,
                          int64_t residual_step, int64_t count) {
    if (how.clamps) {
        const typename S::Vec low = S::set1(how.low), high = S::set1(how.high);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) sum[i] = S::min(high, S::max(low, sum[i]));
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
            sum[i] = finish_any<S>(sum[i], shifted(residual, i * residual_step), how.activation, count);
    }
    if (count >= S::kLanes) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) S::store(out + i * out_step, sum[i]);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) S::store_first(out + i * out_step, sum[i], static_cast<int>(count));
    }
}

}  // namespace dw
}  // namespace dcd::DCD_ISA
