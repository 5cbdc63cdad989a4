// SPDX-License-Identifier: BSD-3-Clause
// y = act(lam r + P Phi Q^T x + bias + residual) around a static output r, and its gradients.
#pragma once

#include "gradients.h"
#include "pointwise.h"

namespace dcd::DCD_ISA {

template <class S>
static void apply(const ApplyParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    const bool channels_last = s.channels_last && s.pixels > 1;
    const Layer<T> layer =
        make_layer<S>(s.in_channels, s.out_channels, s.latent, s.blocks, nullptr, s.p, s.q, false);
    const SampleProduct<S> product(layer, Direction::kForward, channels_last, false);
    const int64_t parts = channel_parts(s.batch, runtime.threads, s.out_channels, Shape<S>::kLanes);
    parallel(runtime, s.batch * parts, [&](int64_t task) {
        const int64_t n = task / parts, part = task % parts;
        const int64_t c0 = part * s.out_channels / parts, c1 = (part + 1) * s.out_channels / parts;
        Block<T> epilogue;
        epilogue.init = s.fixed.data + n * s.fixed.sample;
        epilogue.init_row = channels_last ? s.fixed.pixel : s.fixed.channel;
        epilogue.bias = s.bias ? s.bias + n * s.bias_sample : nullptr;
        epilogue.residual = s.residual.data ? s.residual.data + n * s.residual.sample : nullptr;
        epilogue.residual_row = channels_last ? s.residual.pixel : s.residual.channel;
        epilogue.c = s.output.data + n * s.output.sample;
        epilogue.c_row = channels_last ? s.output.pixel : s.output.channel;
        epilogue.activation = s.activation;
        T* memory = static_cast<T*>(scratch(product.scratch_size(c1 - c0) * sizeof(T)));
        product.run(s.phi + n * layer.phi_size(), s.lam ? s.lam + n * s.out_channels : nullptr,
                    s.input.data + n * s.input.sample, channels_last ? s.input.pixel : s.input.channel,
                    epilogue, s.pixels, c0, c1, memory);
    });
}

template <class S>
static void apply_grad(const ApplyGradParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    const bool channels_last = s.channels_last && s.pixels > 1;
    const Layer<T> layer =
        make_layer<S>(s.in_channels, s.out_channels, s.latent, s.blocks, nullptr, s.p, s.q, false);
    if (s.d_input.data && s.latent) input_gradient<S>(layer, s, channels_last, runtime);
    if (s.latent) {
        LatentGradients<S> latent(layer, s.batch, s.pixels, channels_last);
        latent.from_pixels(s.input, s.grad, s.phi, s.d_p, s.d_phi, s.d_q, runtime);
    }
    if (!s.d_fixed.data && !s.d_lam) return;
    // d_r = lam G, d_lam = sum over pixels of G r
    parallel(runtime, s.batch, [&](int64_t n) {
        const T* g = s.grad.data + n * s.grad.sample;
        const T* r = s.fixed.data ? s.fixed.data + n * s.fixed.sample : nullptr;
        T* d_r = s.d_fixed.data ? s.d_fixed.data + n * s.d_fixed.sample : nullptr;
        const T* lam = s.lam ? s.lam + n * s.out_channels : nullptr;
        T* d_lam = s.d_lam ? s.d_lam + n * s.out_channels : nullptr;
        if (channels_last) {
            // Short runs of pixels are summed by themselves, so that no sum has thousands of terms.
            constexpr int64_t kRun = 128;
            T* sums = static_cast<T*>(scratch(s.out_channels * sizeof(T)));
            for (int64_t p0 = 0; p0 < s.pixels; p0 += kRun) {
                for (int64_t c = 0; c < s.out_channels; ++c) sums[c] = 0;
                for (int64_t i = p0; i < least(p0 + kRun, s.pixels); ++i) {
                    const T *gi = g + i * s.grad.pixel, *ri = r + i * s.fixed.pixel;
                    T* di = d_r ? d_r + i * s.d_fixed.pixel : nullptr;
                    if (di)
                        for (int64_t c = 0; c < s.out_channels; ++c) di[c] = lam ? lam[c] * gi[c] : gi[c];
                    if (d_lam)
                        for (int64_t c = 0; c < s.out_channels; ++c) sums[c] += gi[c] * ri[c];
                }
                if (d_lam) add_scaled<S>(sums, T(1), s.out_channels, p0 == 0, d_lam);
            }
        } else {
            for (int64_t c = 0; c < s.out_channels; ++c) {
                const T* gc = g + c * s.grad.channel;
                if (d_r) {
                    const T factor = lam ? lam[c] : T(1);
                    T* dc = d_r + c * s.d_fixed.channel;
                    for (int64_t i = 0; i < s.pixels; ++i) dc[i] = factor * gc[i];
                }
                if (d_lam) dot<S>(gc, 0, 1, r + c * s.fixed.channel, 0, 1, s.pixels, false, d_lam + c, 1);
            }
        }
    });
}

}  // namespace dcd::DCD_ISA
