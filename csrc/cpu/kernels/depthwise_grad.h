// SPDX-License-Identifier: BSD-3-Clause
// Gradients of the depthwise convolution, given G = dy behind the activation. With the sums over output
// pixels
//   S_n[o, t] = sum G[n, o, pixel] x[n, o / m, pixel * stride + t * dilation - padding],   M_n = S_n R,
// everything but the input's gradient is a little algebra:
//   d_W0 = sum_n lam S_n,  d_lam = rowsum(S_n W0),  d_P = sum_n M_n Phi_n^T,  d_Phi_n = P^T M_n,
//   d_R = sum_n S_n^T P Phi_n.
// S_n exists for one channel, or one vector of channels, of one sample at a time. Sums over channels are kept
// apart for every block of channels and added up in the order of the blocks: the same bits for the same
// number of threads.
#pragma once

#include "depthwise.h"
#include "gradients.h"

namespace dcd::DCD_ISA {
namespace dw {

// What every `stride`-th element of an axis of the input, from `start` on, reads of the output's gradient: a
// convolution of stride 1 with every `step`-th tap, in reverse.
struct PhaseAxis {
    int64_t kernel, dilation, padding;  // taps
    int64_t tap_first, tap_step;
    int64_t start, size;  // first element and number of elements, at least one
};

// f(axis) for the phases that both a tap and an element of the input belong to; element i is of phase
// (i + padding) % stride. There are no more than taps, however large the stride. Returns how many.
template <class T, class F>
static int64_t for_phases(const DepthwiseParams<T>& s, int i, const F& f) {
    const int64_t stride = s.stride[i], dilation = s.dilation[i], padding = s.padding[i];
    const int64_t period = stride / gcd(stride, dilation);
    int64_t count = 0;
    for (int64_t tap = 0; tap < least(s.kernel[i], period); ++tap) {
        const int64_t phase = tap * dilation % stride;
        const int64_t start = (phase - padding % stride + stride) % stride;
        if (start >= s.in_size[i]) continue;
        PhaseAxis axis;
        axis.kernel = (s.kernel[i] - 1 - tap) / period + 1;
        axis.dilation = period * dilation / stride;
        axis.padding =
            tap * dilation / stride + (axis.kernel - 1) * axis.dilation - (start + padding) / stride;
        axis.tap_first = tap + (axis.kernel - 1) * period, axis.tap_step = -period;
        axis.start = start, axis.size = (s.in_size[i] - 1 - start) / stride + 1;
        f(axis);
        ++count;
    }
    return count;
}

// One phase, by its three axes, for the j-th of the output channels that read the same input.
template <class S>
static void phase_gradient(const DepthwiseGradParams<typename S::Scalar>& s, int64_t j,
                           const PhaseAxis* const (&axes)[3], const Runtime& runtime) {
    using T = typename S::Scalar;
    const DepthwiseParams<T>& f = s.forward;
    Conv<T> conv = all_taps(f);
    conv.multiplier = 1;
    conv.row_first = j, conv.row_step = f.multiplier;
    conv.input = s.grad + j * s.grad_channel;
    conv.input_sample = s.grad_sample, conv.input_channel = s.grad_channel * f.multiplier;
    conv.output = s.d_input;
    conv.output_sample = s.d_input_sample, conv.output_channel = s.d_input_channel;
    conv.bias = nullptr, conv.activation = kNone;
    for (int i = 0; i < 3; ++i) {
        const PhaseAxis& axis = *axes[i];
        conv.in_size[i] = f.out_size[i], conv.out_size[i] = axis.size;
        conv.kernel[i] = axis.kernel, conv.stride[i] = 1;
        conv.padding[i] = axis.padding, conv.dilation[i] = axis.dilation;
        conv.tap_first[i] = axis.tap_first, conv.tap_step[i] = axis.tap_step;
        conv.input_spatial[i] = s.grad_spatial[i];
        conv.output_spatial[i] = axis.size > 1 ? s.d_input_spatial[i] * f.stride[i] : s.d_input_spatial[i];
        conv.output += axis.start * s.d_input_spatial[i];
        conv.residual_spatial[i] = conv.output_spatial[i];
    }
    // The channels that read the same input add up: what is there already is the residual.
    conv.residual = j > 0 ? conv.output : nullptr;
    conv.residual_sample = conv.output_sample, conv.residual_channel = conv.output_channel;
    convolve<S>(conv, runtime);
}

template <class S>
static void input_gradient(const DepthwiseGradParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    const DepthwiseParams<T>& f = s.forward;
    bool gaps = false;  // elements that no tap reaches
    for (int i = 0; i < 3; ++i)
        gaps = gaps || for_phases(f, i, [](const PhaseAxis&) {}) < least(f.stride[i], f.in_size[i]);
    if (gaps)
        parallel(runtime, f.batch * f.channels, [&](int64_t i) {
            T* plane = s.d_input + i / f.channels * s.d_input_sample + i % f.channels * s.d_input_channel;
            for (int64_t z = 0; z < f.in_size[0]; ++z)
                for (int64_t y = 0; y < f.in_size[1]; ++y)
                    for (int64_t x = 0; x < f.in_size[2]; ++x)
                        plane[z * s.d_input_spatial[0] + y * s.d_input_spatial[1] +
                              x * s.d_input_spatial[2]] = T(0);
        });
    for (int64_t j = 0; j < f.multiplier; ++j)
        for_phases(f, 0, [&](const PhaseAxis& z) {
            for_phases(f, 1, [&](const PhaseAxis& y) {
                for_phases(f, 2, [&](const PhaseAxis& x) { phase_gradient<S>(s, j, {&z, &y, &x}, runtime); });
            });
        });
}

// sums[t] += sum of grad over rows x columns, times the window at tap t, for TAPS taps.
template <class S, int TAPS>
static void window_sums(const typename S::Scalar* window, int64_t row_step, const int64_t* offset,
                        const typename S::Scalar* grad, int64_t grad_row, int64_t rows, int64_t columns,
                        typename S::Scalar* sums) {
    using V = typename S::Vec;
    constexpr int W = S::kLanes;
    V sum[TAPS];
#pragma GCC unroll 9
    for (int t = 0; t < TAPS; ++t) sum[t] = S::zero();
    for (int64_t y = 0; y < rows; ++y, window += row_step, grad += grad_row) {
        int64_t x = 0;
        for (; x + W <= columns; x += W) {
            const V g = S::load(grad + x);
#pragma GCC unroll 9
            for (int t = 0; t < TAPS; ++t) sum[t] = S::fma(g, S::load(window + offset[t] + x), sum[t]);
        }
        if (x < columns) {
            const int rest = static_cast<int>(columns - x);
            const V g = S::load_first(grad + x, rest);
#pragma GCC unroll 9
            for (int t = 0; t < TAPS; ++t)
                sum[t] = S::fma(g, S::load_first(window + offset[t] + x, rest), sum[t]);
        }
    }
#pragma GCC unroll 9
    for (int t = 0; t < TAPS; ++t) sums[t] += S::sum(sum[t]);
}

// S_n for W output channels, [taps, W], one channel after another with the lanes along the width.
template <class S>
class PlaneSums {
  public:
    using T = typename S::Scalar;
    using Windows = Window<S>;
    static constexpr int W = S::kLanes;

    explicit PlaneSums(const DepthwiseGradParams<T>& s)
        : s_(s), window_(s.forward), pitch_(round_up(window_.width, W)) {
        taps_ = s.forward.kernel[0] * s.forward.kernel[1] * s.forward.kernel[2];
    }
    int64_t scratch_size() const {
        return bytes<int64_t>(taps_) + bytes<typename Windows::Span>(window_.phases) +
               bytes<T>(window_.size) + bytes<T>(window_.height * pitch_) + bytes<T>(W * taps_);
    }
    void open(Pieces<char>& pieces) {
        offset_ = take<int64_t>(pieces, taps_);
        spans_ = take<typename Windows::Span>(pieces, window_.phases);
        memory_ = take<T>(pieces, window_.size);
        staged_ = take<T>(pieces, window_.height * pitch_);
        sums_ = take<T>(pieces, W * taps_);
        if (!window_.sparse) window_.offsets(offset_);
    }
    // Output channels [o0, o0 + count); zero in the lanes behind them.
    void run(int64_t n, int64_t o0, int64_t count, T* out /* [taps, W] */) {
        const DepthwiseParams<T>& p = s_.forward;
        const int64_t m = p.multiplier, end = o0 + count;
        for (int64_t i = 0; i < W * taps_; ++i) sums_[i] = T(0);
        for (int64_t o = o0, next; o < end; o = next) {
            const int64_t c = o / m;
            next = least((c + 1) * m, end);
            const T* input = p.input + n * p.input_sample + c * p.input_channel;
            if (window_.sparse) {
                for (int64_t k = o; k < next; ++k)
                    far_sums(p, input, s_.grad + n * s_.grad_sample + k * s_.grad_channel, s_.grad_spatial,
                             sums_ + (k - o0) * taps_);
                continue;
            }
            window_.for_parts(spans_, [&](const typename Windows::Part& part) {
                window_.fill(part, spans_, input, memory_);
                for (int64_t k = o; k < next; ++k) add_part(part, n, k, sums_ + (k - o0) * taps_);
            });
        }
        for (int64_t k = 0; k < W; ++k)
            for (int64_t t = 0; t < taps_; ++t) out[t * W + k] = sums_[k * taps_ + t];
    }

  private:
    void add_part(const typename Windows::Part& part, int64_t n, int64_t o, T* sums) const {
        const T* grad = s_.grad + n * s_.grad_sample + o * s_.grad_channel + part.z * s_.grad_spatial[0] +
                        part.y * s_.grad_spatial[1] + part.x * s_.grad_spatial[2];
        int64_t grad_row = s_.grad_spatial[1];
        if (!unit(s_.forward.out_size[2], s_.grad_spatial[2])) {
            copy_rows(grad, grad_row, s_.grad_spatial[2], staged_, pitch_, 1, part.rows, part.columns);
            grad = staged_, grad_row = pitch_;
        }
        for (int64_t t = 0; t < taps_;) {
            const int64_t left = taps_ - t, some = left >= 9 ? 9 : left >= 3 ? 3 : 1;
            const auto run = some == 9   ? &window_sums<S, 9>
                             : some == 3 ? &window_sums<S, 3>
                                         : &window_sums<S, 1>;
            run(memory_, window_.row_step(), offset_ + t, grad, grad_row, part.rows, part.columns, sums + t);
            t += some;
        }
    }

    const DepthwiseGradParams<T>& s_;
    const Windows window_;
    int64_t pitch_, taps_;
    int64_t* offset_ = nullptr;                // [taps]
    typename Windows::Span* spans_ = nullptr;  // [phases]
    T* memory_ = nullptr;                      // a window
    T* staged_ = nullptr;                      // rows of the gradient [height, pitch]
    T* sums_ = nullptr;                        // [W, taps]
};

// The same with the lanes along the channels, which are neighbours in memory; multiplier 1.
template <class S>
class ChannelSums {
  public:
    using T = typename S::Scalar;
    using V = typename S::Vec;
    static constexpr int W = S::kLanes;

    explicit ChannelSums(const DepthwiseGradParams<T>& s) : s_(s) {}
    int64_t scratch_size() const { return 0; }
    void open(Pieces<char>&) {}
    void run(int64_t n, int64_t o0, int64_t count, T* out /* [taps, W] */) const {
        const DepthwiseParams<T>& p = s_.forward;
        const T* x = p.input + n * p.input_sample + o0;
        const T* grad = s_.grad + n * s_.grad_sample + o0;
        if (square_of_three(p)) {
            count < W ? nine_taps<true>(x, grad, count, out) : nine_taps<false>(x, grad, count, out);
            return;
        }
        for (int64_t kz = 0; kz < p.kernel[0]; ++kz)
            for (int64_t ky = 0; ky < p.kernel[1]; ++ky)
                for (int64_t kx = 0; kx < p.kernel[2];) {
                    const int64_t some = p.kernel[2] - kx >= 3 ? 3 : 1;
                    if (count < W)
                        some == 3 ? taps<3, true>(x, grad, kz, ky, kx, count, out)
                                  : taps<1, true>(x, grad, kz, ky, kx, count, out);
                    else
                        some == 3 ? taps<3, false>(x, grad, kz, ky, kx, count, out)
                                  : taps<1, false>(x, grad, kz, ky, kx, count, out);
                    kx += some, out += some * W;
                }
    }

  private:
    // 3x3 that reaches one pixel beyond the image at most: all taps in one pass over the rows, so that each
    // row of the image comes from memory once and not three times.
    static bool square_of_three(const DepthwiseParams<T>& p) {
        if (p.kernel[0] != 1 || p.in_size[0] != 1 || p.padding[0] != 0) return false;
        for (int i : {1, 2})
            if (p.kernel[i] != 3 || p.dilation[i] != 1 || p.padding[i] != 1 || p.in_size[i] < 2 ||
                p.out_size[i] < 2)
                return false;
        return true;
    }

    // LINES lines of taps, from `first` on, of one row of the gradient.
    template <int LINES, bool TAIL>
    void add_row(const T* g, const T* from, int64_t count, int first, V (&total)[9]) const {
        const DepthwiseParams<T>& p = s_.forward;
        const int64_t g_step = s_.grad_spatial[2], pixel = p.input_spatial[2], line = p.input_spatial[1],
                      x_step = pixel * p.stride[2], columns = p.out_size[2];
        // beyond the row: its neighbour in the image, and what will be read next
        const int64_t g_ahead = s_.grad_spatial[1], x_ahead = LINES * line;
        const auto load = [count](const T* at) {
            return TAIL ? S::load_first(at, static_cast<int>(count)) : S::load(at);
        };
        V sum[LINES][3];
#pragma GCC unroll 3
        for (int r = 0; r < LINES; ++r)
#pragma GCC unroll 3
            for (int k = 0; k < 3; ++k) sum[r][k] = S::zero();
        const auto edge = [&](int64_t i) {
            const V here = load(g + i * g_step);
            for (int k = 0; k < 3; ++k) {
                const int64_t column = i * p.stride[2] + k - 1;
                if (column < 0 || column >= p.in_size[2]) continue;
                for (int r = 0; r < LINES; ++r)
                    sum[r][k] = S::fma(here, load(from + r * line + column * pixel), sum[r][k]);
            }
        };
        edge(0);
        const T *g_at = g + g_step, *x_at = from + x_step - pixel;
        for (int64_t i = 1; i + 1 < columns; ++i, g_at += g_step, x_at += x_step) {
            const V here = load(g_at);
            S::prefetch(g_at + g_ahead);
            for (int64_t j = 0; j < p.stride[2]; ++j)
                for (int64_t r = 0; r < p.stride[1]; ++r) S::prefetch(x_at + x_ahead + r * line + j * pixel);
#pragma GCC unroll 3
            for (int r = 0; r < LINES; ++r)
#pragma GCC unroll 3
                for (int k = 0; k < 3; ++k)
                    sum[r][k] = S::fma(here, load(x_at + r * line + k * pixel), sum[r][k]);
        }
        edge(columns - 1);
        for (int r = 0; r < LINES; ++r)
            for (int k = 0; k < 3; ++k)
                total[(first + r) * 3 + k] = S::add(total[(first + r) * 3 + k], sum[r][k]);
    }

    template <bool TAIL>
    void nine_taps(const T* x, const T* grad, int64_t count, T* out) const {
        const DepthwiseParams<T>& p = s_.forward;
        const int64_t line = p.input_spatial[1];
        V total[9];
        for (V& t : total) t = S::zero();
        for (int64_t y = 0; y < p.out_size[1]; ++y) {
            const T* g = grad + y * s_.grad_spatial[1];
            const int64_t top = y * p.stride[1] - 1;
            if (top < 0)
                add_row<2, TAIL>(g, x, count, 1, total);
            else if (top + 2 >= p.in_size[1])
                add_row<2, TAIL>(g, x + top * line, count, 0, total);
            else
                add_row<3, TAIL>(g, x + top * line, count, 0, total);
        }
        for (int t = 0; t < 9; ++t) S::store(out + t * W, total[t]);
    }

    // K taps of a line: a gradient that is loaded serves all of them where all lie inside. Sums end with the
    // row, which keeps them short, and alternate, so that an addition need not wait for the one before.
    template <int K, bool TAIL>
    void taps(const T* x, const T* grad, int64_t kz, int64_t ky, int64_t kx, int64_t count, T* out) const {
        const DepthwiseParams<T>& p = s_.forward;
        const auto load = [count](const T* at) {
            return TAIL ? S::load_first(at, static_cast<int>(count)) : S::load(at);
        };
        const Range zs = inside(p, 0, kz), ys = inside(p, 1, ky);
        Range xs[K], all = inside(p, 2, kx);
        for (int k = 0; k < K; ++k) {
            xs[k] = inside(p, 2, kx + k);
            all = {most(all.begin, xs[k].begin), least(all.end, xs[k].end)};
        }
        if (all.begin >= all.end) all = {xs[0].end, xs[0].end};
        const int64_t g_step = s_.grad_spatial[2], x_step = p.input_spatial[2] * p.stride[2];
        const int64_t tap_step = p.input_spatial[2] * p.dilation[2];
        V total[K];
        for (int k = 0; k < K; ++k) total[k] = S::zero();
        for (int64_t z = zs.begin; z < zs.end; ++z)
            for (int64_t y = ys.begin; y < ys.end; ++y) {
                const T* g_row = grad + z * s_.grad_spatial[0] + y * s_.grad_spatial[1];
                const T* x_row = x +
                                 (z * p.stride[0] + kz * p.dilation[0] - p.padding[0]) * p.input_spatial[0] +
                                 (y * p.stride[1] + ky * p.dilation[1] - p.padding[1]) * p.input_spatial[1] +
                                 (kx * p.dilation[2] - p.padding[2]) * p.input_spatial[2];
                V sum[2][K];
#pragma GCC unroll 3
                for (int k = 0; k < K; ++k) sum[0][k] = sum[1][k] = S::zero();
                const T* g = g_row + all.begin * g_step;
                const T* from = x_row + all.begin * x_step;
                for (int64_t i = all.begin; i + 1 < all.end; i += 2)
#pragma GCC unroll 2
                    for (int j = 0; j < 2; ++j, g += g_step, from += x_step) {
                        const V here = load(g);
#pragma GCC unroll 3
                        for (int k = 0; k < K; ++k)
                            sum[j][k] = S::fma(here, load(from + k * tap_step), sum[j][k]);
                    }
#pragma GCC unroll 3
                for (int k = 0; k < K; ++k) {
                    const int64_t odd = all.end > all.begin && (all.end - all.begin) % 2;
                    const auto add = [&](int64_t begin, int64_t end) {
                        for (int64_t i = begin; i < end; ++i)
                            sum[1][k] = S::fma(load(g_row + i * g_step),
                                               load(x_row + i * x_step + k * tap_step), sum[1][k]);
                    };
                    add(xs[k].begin, least(all.begin, xs[k].end));
                    add(most(all.end - odd, xs[k].begin), xs[k].end);
                    total[k] = S::add(total[k], S::add(sum[0][k], sum[1][k]));
                }
            }
        for (int k = 0; k < K; ++k) S::store(out + k * W, total[k]);
    }

    const DepthwiseGradParams<T>& s_;
};

// to (+)= the sum over `count` arrays of `size`, in their order.
template <class T>
static void add_arrays(const T* from, int64_t count, int64_t size, bool onto, T* to) {
    for (int64_t i = 0; i < size; ++i) {
        T sum = onto ? to[i] : T(0);
        for (int64_t k = 0; k < count; ++k) sum += from[k * size + i];
        to[i] = sum;
    }
}

// A task has W output channels, its lanes, and a chunk of the samples. The first chunk writes to the outputs
// themselves, the others to arrays of their own.
template <class S, class Sums>
static void parameter_gradients(const DepthwiseGradParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    constexpr int W = S::kLanes;
    const DepthwiseParams<T>& f = s.forward;
    const int64_t taps = f.kernel[0] * f.kernel[1] * f.kernel[2], latent = f.latent, square = latent * latent;
    const int64_t channels = f.channels * f.multiplier, blocks = ceil_div(channels, W);
    const int64_t chunks = most(1, least(f.batch, runtime.threads / most(blocks, 1)));
    T* d_p = latent > 0 ? s.d_p : nullptr;
    T* d_phi = latent > 0 ? s.d_phi : nullptr;
    T* d_r = latent > 0 ? s.d_r : nullptr;
    const Buffer<T> more_weight(s.d_weight ? (chunks - 1) * channels * taps : 0);
    const Buffer<T> more_p(d_p ? (chunks - 1) * channels * latent : 0);
    const Buffer<T> phi_parts(d_phi ? f.batch * blocks * square : 0);
    const Buffer<T> r_parts(d_r ? blocks * chunks * taps * latent : 0);

    parallel(runtime, blocks * chunks, [&](int64_t task) {
        const int64_t b = task / chunks, chunk = task % chunks, o0 = b * W, count = least(W, channels - o0);
        Sums sums(s);
        const int64_t numbers = (3 * taps + taps * latent + 4 * latent) * W;
        Pieces<char> pieces(static_cast<char*>(scratch(sums.scratch_size() + bytes<T>(numbers))));
        sums.open(pieces);
        T* sum = take<T>(pieces, numbers);  // S_n [taps, W]
        T* w0 = sum + taps * W;             // [taps, W]
        T* to_weight = w0 + taps * W;       // d_W0 [taps, W]
        T* to_r = to_weight + taps * W;     // d_R before the sum over the lanes [taps, L_k, W]
        T* p = to_r + taps * latent * W;    // [L_k, W]
        T* to_p = p + latent * W;           // d_P [L_k, W]
        T* product = to_p + latent * W;     // M_n [L_k, W]
        T* mixed = product + latent * W;    // P Phi_n [L_k, W]
        for (int64_t i = 0; i < numbers; ++i) sum[i] = T(0);
        for (int64_t k = 0; k < count; ++k) {
            for (int64_t t = 0; t < taps; ++t) w0[t * W + k] = f.weight[(o0 + k) * taps + t];
            for (int64_t a = 0; a < latent; ++a) p[a * W + k] = f.p[(o0 + k) * latent + a];
        }
        const auto at = [](T* array, int64_t i) { return S::load(array + i * S::kLanes); };
        for (int64_t n = chunk * f.batch / chunks; n < (chunk + 1) * f.batch / chunks; ++n) {
            const T* phi = shifted(f.phi, n * square);
            sums.run(n, o0, count, sum);
            const V lam = f.lam ? load_up_to<S>(f.lam + n * channels + o0, count) : S::set1(T(1));
            V dot = S::zero();
            for (int64_t t = 0; t < taps; ++t) {
                S::store(to_weight + t * W, S::fma(lam, at(sum, t), at(to_weight, t)));
                dot = S::fma(at(sum, t), at(w0, t), dot);
            }
            if (s.d_lam) store_up_to<S>(s.d_lam + n * channels + o0, dot, count);
            if (!(d_p || d_phi || d_r)) continue;
            for (int64_t c = 0; c < latent; ++c) {
                V m = S::zero(), v = S::zero();
                for (int64_t t = 0; t < taps; ++t) m = S::fma(S::set1(f.r[t * latent + c]), at(sum, t), m);
                for (int64_t a = 0; a < latent; ++a) v = S::fma(S::set1(phi[a * latent + c]), at(p, a), v);
                S::store(product + c * W, m);
                S::store(mixed + c * W, v);
            }
            T* to_phi = shifted(phi_parts.get(), (n * blocks + b) * square);
            for (int64_t a = 0; a < latent; ++a) {
                V v = S::zero();
                for (int64_t c = 0; c < latent; ++c) {
                    v = S::fma(S::set1(phi[a * latent + c]), at(product, c), v);
                    if (to_phi) to_phi[a * latent + c] = S::sum(S::mul(at(p, a), at(product, c)));
                }
                S::store(to_p + a * W, S::add(at(to_p, a), v));
            }
            for (int64_t i = 0, t = 0; d_r && t < taps; ++t)
                for (int64_t c = 0; c < latent; ++c, ++i)
                    S::store(to_r + i * W, S::fma(at(sum, t), at(mixed, c), at(to_r, i)));
        }
        T* weight = chunk == 0 ? s.d_weight : shifted(more_weight.get(), (chunk - 1) * channels * taps);
        T* factor = chunk == 0 ? d_p : shifted(more_p.get(), (chunk - 1) * channels * latent);
        for (int64_t k = 0; k < count; ++k) {
            for (int64_t t = 0; weight && t < taps; ++t) weight[(o0 + k) * taps + t] = to_weight[t * W + k];
            for (int64_t a = 0; factor && a < latent; ++a) factor[(o0 + k) * latent + a] = to_p[a * W + k];
        }
        for (int64_t i = 0; d_r && i < taps * latent; ++i)
            r_parts.get()[task * taps * latent + i] = S::sum(at(to_r, i));
    });

    const int64_t weights = channels * taps, factors = channels * latent;
    if (s.d_weight && chunks > 1) add_arrays(more_weight.get(), chunks - 1, weights, true, s.d_weight);
    if (d_p && chunks > 1) add_arrays(more_p.get(), chunks - 1, factors, true, d_p);
    if (d_r) add_arrays(r_parts.get(), blocks * chunks, taps * latent, false, d_r);
    if (d_phi)
        parallel(runtime, f.batch, [&](int64_t n) {
            add_arrays(phi_parts.get() + n * blocks * square, blocks, square, false, d_phi + n * square);
        });
}

}  // namespace dw

template <class S>
static void depthwise_grad(const DepthwiseGradParams<typename S::Scalar>& s, const Runtime& runtime) {
    const auto& f = s.forward;
    if (s.d_input) dw::input_gradient<S>(s, runtime);
    if (!(s.d_weight || s.d_p || s.d_phi || s.d_r || s.d_lam)) return;
    if (f.channels > 1 && f.multiplier == 1 && f.input_channel == 1 && s.grad_channel == 1 &&
        !(f.in_size[2] > 1 && f.input_spatial[2] == 1))
        dw::parameter_gradients<S, dw::ChannelSums<S>>(s, runtime);
    else
        dw::parameter_gradients<S, dw::PlaneSums<S>>(s, runtime);
}

}  // namespace dcd::DCD_ISA
