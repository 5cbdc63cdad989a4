// SPDX-License-Identifier: BSD-3-Clause
// A norm by the statistics of the batch and the activation behind it: the image is read twice, once for the
// statistics and once to be normalised, and never written before its activation. Its gradient too reads twice
// and writes once; what lies before the activation is computed again.
//
// Contiguous planes: a task is a channel, whose second pass finds in L2 what the first one read; lanes are
// pixels. Channels-last: lanes are channels, a task is a chunk of pixels, whose sums are merged afterwards in
// a fixed order; the second pass begins with what the first one read last.
#pragma once

#include "norm_tiles.h"

namespace dcd::DCD_ISA {
namespace norm {

// Where an image (N, C, P) is walked along its channels: a single pixel is a column of channels in either
// layout, and the samples are the pixels then.
template <class T>
struct Walk {
    bool along_channels, turned;
    int64_t batch, pixels;
    // A gradient of a single pixel may have any stride between its channels: one value expanded, for example.
    Walk(const NormActParams<T>& s, int64_t other_channel)
        : along_channels(s.input.channel == 1 && other_channel == 1 && (s.channels_last || s.pixels == 1)),
          turned(along_channels && s.pixels == 1),
          batch(turned ? 1 : s.batch),
          pixels(turned ? s.batch : s.pixels) {}
    template <class U>
    int64_t pixel(const Map<U>& map) const {
        return turned ? map.sample : map.pixel;
    }
    template <class U>
    bool dense(const Map<U>& map, int64_t channels) const {
        return !map.data || pixel(map) == channels;
    }
};

template <class S>
static void forward_rows(const NormActParams<typename S::Scalar>& s, const Walk<typename S::Scalar>& walk,
                         const Runtime& runtime) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    const bool dense = walk.dense(s.input, s.channels) && walk.dense(s.output, s.channels);
    const Rows rows(walk.batch, s.channels, walk.pixels, dense, S::kLanes);
    const int64_t channels = rows.channels, tasks = rows.tasks();
    const int64_t x_pixel = walk.pixel(s.input) * rows.repeats, y_pixel = walk.pixel(s.output) * rows.repeats;
    Pieces<T> pieces(static_cast<T*>(
        scratch((Factors<T>::size(channels) + Pieces<T>::rounded(2 * tasks * channels)) * sizeof(T) + 64,
                Scratch::kShared)));
    Factors<T> factors(pieces, channels);
    T* const parts = pieces.take(2 * tasks * channels);  // [task, mean or squares, channel]
    parallel(runtime, tasks, [&](int64_t task) {
        rows.of_task(task, [&](int64_t n, int64_t p0, int64_t count) {
            const T* x = s.input.data + n * s.input.sample + p0 * x_pixel;
            T* const part = parts + 2 * task * channels;
            for_vectors<S>(channels, [&](auto vectors, auto tail, int64_t c, int last) {
                moments_of_rows<S, vectors(), tail()>(x + c, count, x_pixel, last, part + c,
                                                      part + channels + c);
            });
        });
    });
    for (int64_t c = 0; c < s.channels; ++c) {
        Moments moments;
        for (int64_t task = 0; task < tasks; ++task)
            rows.of_task(task, [&](int64_t, int64_t, int64_t count) {
                const T* part = parts + 2 * task * channels + c;
                for (int64_t i = 0; i < rows.repeats; ++i, part += s.channels)
                    moments.merge(static_cast<double>(count), part[0], part[channels]);
            });
        const double variance = moments.squares / moments.count;
        s.mean[c] = static_cast<T>(moments.mean), s.variance[c] = static_cast<T>(variance);
        factors.set(c, s.channels, rows.repeats, Plane<T>(s, c, s.mean[c], variance));
    }
    with_activation(s.activation, [&](auto activation) {
        parallel(runtime, tasks, [&](int64_t task) {
            rows.of_task(tasks - 1 - task, [&](int64_t n, int64_t p0, int64_t count) {
                const T* x = s.input.data + n * s.input.sample + p0 * x_pixel;
                T* y = s.output.data + n * s.output.sample + p0 * y_pixel;
                for_tiles<S>(channels, count, [&](auto row, int64_t c, int64_t begin, int64_t end) {
                    constexpr int kVectors = decltype(row)::kVectors;
                    V mean[kVectors], scale[kVectors], bias[kVectors];
                    row.load_all(factors.mean + c, mean), row.load_all(factors.scale + c, scale);
                    row.load_all(factors.bias + c, bias);
                    for (int64_t p = begin; p < end; ++p)
#pragma GCC unroll 4
                        for (int j = 0; j < kVectors; ++j) {
                            const V d = S::sub(row.load_ahead(x + p * x_pixel + c, j), mean[j]);
                            row.store(y + p * y_pixel + c, j,
                                      activate<S>(S::fma(d, scale[j], bias[j]), activation()));
                        }
                });
            });
        });
    });
}

template <class S>
static void forward_planes(const NormActParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    parallel(runtime, s.channels, [&](int64_t c) {
        Moments moments;
        for (int64_t n = 0; n < s.batch; ++n)
            merge_row<S>(s.input.data + n * s.input.sample + c * s.input.channel, s.pixels, moments);
        const double variance = moments.squares / moments.count;
        s.mean[c] = static_cast<T>(moments.mean), s.variance[c] = static_cast<T>(variance);
        const Plane<T> plane(s, c, s.mean[c], variance);
        const V mean = S::set1(plane.mean), scale = S::set1(plane.scale), bias = S::set1(plane.bias);
        with_activation(s.activation, [&](auto activation) {
            for (int64_t n = 0; n < s.batch; ++n) {
                const T* x = s.input.data + n * s.input.sample + c * s.input.channel;
                T* y = s.output.data + n * s.output.sample + c * s.output.channel;
                for_lanes<S>(s.pixels, [&](int64_t i, auto lanes) {
                    const V d = S::sub(lanes.load(x + i), mean);
                    lanes.store(y + i, activate<S>(S::fma(d, scale, bias), activation()));
                });
            }
        });
    });
}

template <class S>
static void backward_rows(const NormActGradParams<typename S::Scalar>& s,
                          const Walk<typename S::Scalar>& walk, const Runtime& runtime) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    const NormActParams<T>& f = s.forward;
    const bool dense = walk.dense(f.input, f.channels) && walk.dense(s.grad, f.channels) &&
                       walk.dense(s.d_input, f.channels);
    const Rows rows(walk.batch, f.channels, walk.pixels, dense, S::kLanes);
    const int64_t channels = rows.channels, tasks = rows.tasks();
    const int64_t x_pixel = walk.pixel(f.input) * rows.repeats, g_pixel = walk.pixel(s.grad) * rows.repeats,
                  d_pixel = walk.pixel(s.d_input) * rows.repeats;
    Pieces<T> pieces(static_cast<T*>(
        scratch((Factors<T>::size(channels) + Pieces<T>::rounded(2 * tasks * channels)) * sizeof(T) + 64,
                Scratch::kShared)));
    Factors<T> factors(pieces, channels);
    T* const parts = pieces.take(2 * tasks * channels);  // [task, sum of g or of g (x - mean), channel]
    for (int64_t c = 0; c < f.channels; ++c)
        factors.set(c, f.channels, rows.repeats, Plane<T>(f, c, s.mean[c], s.variance[c]));
    with_activation(f.activation, [&](auto activation) {
        constexpr int kActivation = decltype(activation)::value;
        parallel(runtime, tasks, [&](int64_t task) {
            rows.of_task(task, [&](int64_t n, int64_t p0, int64_t count) {
                const T* x = f.input.data + n * f.input.sample + p0 * x_pixel;
                const T* g = s.grad.data + n * s.grad.sample + p0 * g_pixel;
                T* const part = parts + 2 * task * channels;
                for_vectors<S>(channels, [&](auto vectors, auto tail, int64_t c, int last) {
                    constexpr int kVectors = decltype(vectors)::value;
                    const Row<S, kVectors, tail()> row{last};
                    V mean[kVectors], scale[kVectors], bias[kVectors], sum[kVectors], product[kVectors];
                    row.load_all(factors.mean + c, mean), row.load_all(factors.scale + c, scale);
                    row.load_all(factors.bias + c, bias);
#pragma GCC unroll 4
                    for (int j = 0; j < kVectors; ++j) sum[j] = product[j] = S::zero();
                    for (int64_t p1 = 0; p1 < count; p1 += kTile)
                        add_gradients<S, kVectors>(
                            p1, least(p1 + kTile, count),
                            [&](int64_t p, int j, V& d) {
                                d = S::sub(row.load_ahead(x + p * x_pixel + c, j), mean[j]);
                                return gated<S, kActivation>(S::fma(d, scale[j], bias[j]),
                                                             row.load_ahead(g + p * g_pixel + c, j));
                            },
                            sum, product);
#pragma GCC unroll 4
                    for (int j = 0; j < kVectors; ++j)
                        row.store(part + c, j, sum[j]), row.store(part + channels + c, j, product[j]);
                });
            });
        });
        for (int64_t c = 0; c < f.channels; ++c) {
            double sum = 0, product = 0;
            for (int64_t task = 0; task < tasks; ++task) {
                const T* part = parts + 2 * task * channels + c;
                for (int64_t i = 0; i < rows.repeats; ++i, part += f.channels)
                    sum += part[0], product += part[channels];
            }
            write_sums(s, c, sum, product);
            Plane<T> plane(f, c, s.mean[c], s.variance[c]);
            plane.set_slope(s.variance[c], f.eps, sum, product, double(f.batch * f.pixels));
            factors.set(c, f.channels, rows.repeats, plane);
        }
        if (!s.d_input.data) return;
        parallel(runtime, tasks, [&](int64_t task) {
            rows.of_task(tasks - 1 - task, [&](int64_t n, int64_t p0, int64_t count) {
                const T* x = f.input.data + n * f.input.sample + p0 * x_pixel;
                const T* g = s.grad.data + n * s.grad.sample + p0 * g_pixel;
                T* d_x = s.d_input.data + n * s.d_input.sample + p0 * d_pixel;
                for_tiles<S>(channels, count, [&](auto row, int64_t c, int64_t begin, int64_t end) {
                    constexpr int kVectors = decltype(row)::kVectors;
                    V mean[kVectors], scale[kVectors], bias[kVectors], slope[kVectors], offset[kVectors];
                    row.load_all(factors.mean + c, mean), row.load_all(factors.scale + c, scale);
                    row.load_all(factors.bias + c, bias), row.load_all(factors.slope + c, slope);
                    row.load_all(factors.offset + c, offset);
                    for (int64_t p = begin; p < end; ++p)
#pragma GCC unroll 4
                        for (int j = 0; j < kVectors; ++j) {
                            const V d = S::sub(row.load_ahead(x + p * x_pixel + c, j), mean[j]);
                            const V before = S::fma(d, scale[j], bias[j]);
                            const V behind =
                                gated<S, kActivation>(before, row.load_ahead(g + p * g_pixel + c, j));
                            row.store(d_x + p * d_pixel + c, j,
                                      S::fma(scale[j], behind, S::fma(slope[j], d, offset[j])));
                        }
                });
            });
        });
    });
}

template <class S>
static void backward_planes(const NormActGradParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    const NormActParams<T>& f = s.forward;
    with_activation(f.activation, [&](auto activation) {
        constexpr int kActivation = decltype(activation)::value;
        parallel(runtime, f.channels, [&](int64_t c) {
            Plane<T> plane(f, c, s.mean[c], s.variance[c]);
            const V mean = S::set1(plane.mean), scale = S::set1(plane.scale), bias = S::set1(plane.bias);
            double all = 0, all_products = 0;
            for (int64_t n = 0; n < f.batch; ++n) {
                const T* x = f.input.data + n * f.input.sample + c * f.input.channel;
                const T* g = s.grad.data + n * s.grad.sample + c * s.grad.channel;
                for (int64_t p = 0; p < f.pixels; p += kPlaneTile) {
                    T sum, product;
                    gradients_of_row<S>(
                        least(kPlaneTile, f.pixels - p),
                        [&](int64_t i, auto lanes, V& d) {
                            // a lane without a pixel has no gradient, whatever d is
                            d = S::sub(lanes.load_ahead(x + p + i), mean);
                            return gated<S, kActivation>(S::fma(d, scale, bias), lanes.load_ahead(g + p + i));
                        },
                        sum, product);
                    all += sum, all_products += product;
                }
            }
            write_sums(s, c, all, all_products);
            if (!s.d_input.data) return;
            plane.set_slope(s.variance[c], f.eps, all, all_products, double(f.batch * f.pixels));
            const V slope = S::set1(plane.slope), offset = S::set1(plane.offset);
            for (int64_t n = 0; n < f.batch; ++n) {
                const T* x = f.input.data + n * f.input.sample + c * f.input.channel;
                const T* g = s.grad.data + n * s.grad.sample + c * s.grad.channel;
                T* d_x = s.d_input.data + n * s.d_input.sample + c * s.d_input.channel;
                for_lanes<S>(f.pixels, [&](int64_t i, auto lanes) {
                    const V d = S::sub(lanes.load(x + i), mean);
                    const V behind = gated<S, kActivation>(S::fma(d, scale, bias), lanes.load(g + i));
                    lanes.store(d_x + i, S::fma(scale, behind, S::fma(slope, d, offset)));
                });
            }
        });
    });
}

}  // namespace norm

template <class S>
static void norm_act(const NormActParams<typename S::Scalar>& s, const Runtime& runtime) {
    const norm::Walk<typename S::Scalar> walk(s, s.output.channel);
    const bool alone = s.batch * s.channels * s.pixels < norm::kWorthThreads;
    const Runtime used = alone ? Runtime{nullptr, 1} : runtime;
    if (walk.along_channels)
        norm::forward_rows<S>(s, walk, used);
    else
        norm::forward_planes<S>(s, used);
}

template <class S>
static void norm_act_grad(const NormActGradParams<typename S::Scalar>& s, const Runtime& runtime) {
    const norm::Walk<typename S::Scalar> walk(s.forward, s.grad.channel);
    const bool alone = s.forward.batch * s.forward.channels * s.forward.pixels < norm::kWorthThreads;
    const Runtime used = alone ? Runtime{nullptr, 1} : runtime;
    if (walk.along_channels)
        norm::backward_rows<S>(s, walk, used);
    else
        norm::backward_planes<S>(s, used);
}

}  // namespace dcd::DCD_ISA
