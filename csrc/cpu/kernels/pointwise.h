// SPDX-License-Identifier: BSD-3-Clause
// y = act(W_n x + bias + residual), W_n = diag(lam_n) W0 + P Phi_n Q^T: shares the work out and runs
// lowrank.h.
#pragma once

#include "lowrank.h"
#include "packed.h"

namespace dcd::DCD_ISA {

template <class S>
static void pointwise(const PointwiseParams<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    if (s.packed) return pointwise_packed<S>(s, runtime);
    // A single pixel is a column of channels in either layout.
    const bool channels_last = s.channels_last && s.pixels > 1;
    const bool synthesised =
        s.latent &&
        residual_cost(s.in_channels, s.out_channels, s.latent, s.blocks, s.pixels).synthesis_pays();
    const Layer<T> layer = make_layer<S>(s.in_channels, s.out_channels, s.latent, s.blocks, s.weight, s.p,
                                         s.q, channels_last && (synthesised || !long_rows(s.in_channels)));
    const SampleProduct<S> product(layer, Direction::kForward, channels_last, synthesised);
    const int64_t parts = channel_parts(s.batch, runtime.threads, s.out_channels, Shape<S>::kLanes);
    parallel(runtime, s.batch * parts, [&](int64_t task) {
        const int64_t n = task / parts, part = task % parts;
        const int64_t c0 = part * s.out_channels / parts, c1 = (part + 1) * s.out_channels / parts;
        Block<T> epilogue;
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

}  // namespace dcd::DCD_ISA
