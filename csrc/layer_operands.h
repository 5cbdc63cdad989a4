// SPDX-License-Identifier: BSD-3-Clause
// What pointwise, pointwise_packed and apply are given alike, and what their kernels are told of it.
#pragma once

#include <type_traits>

#include "tensors.h"

namespace dcd {

struct LayerArguments {
    const OptionalTensor& phi;       // [N, L, L] or [N, B, L, L]; of apply also [N, L, Ci]
    const OptionalTensor& lam;       // [N, Co]
    const OptionalTensor& bias;      // [Co] or [N, Co]
    const OptionalTensor& residual;  // [N, Co, *spatial]
    int64_t activation;

    // Raises unless they fit an output [N, Co, *spatial]; phi's shape is up to the op.
    void check(const std::vector<int64_t>& sizes) const {
        check_activation(activation);
        check_lam(lam, sizes[0], sizes[1]);
        check_bias(bias, sizes[0], sizes[1]);
        if (residual) check_like(*residual, "residual", sizes);
    }
};

// The same as a kernel reads them, which must not outlive this: maps in one layout and of one type, phi, lam
// and bias of the type that is summed in.
class LayerOperands {
  public:
    LayerOperands(const LayerArguments& arguments, bool channels_last, ScalarType maps)
        : sums_(maps == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
          phi_(dense(arguments.phi, sums_)),
          lam_(dense(arguments.lam, sums_)),
          bias_(dense(arguments.bias, sums_)),
          residual_(arguments.residual ? OptionalTensor(as_map(*arguments.residual, channels_last, maps))
                                       : std::nullopt),
          activation_(static_cast<int>(arguments.activation)),
          channels_last_(channels_last) {}

    // All of `s` but the input and what is static: the sizes are those of the output and of `shape`.
    template <class Params>
    void fill(Params& s, const LatentShape& shape, const Tensor& output) const {
        using T = std::decay_t<decltype(*s.output.data)>;
        using Coefficient = std::decay_t<decltype(*s.lam)>;
        s.batch = output.size(0), s.out_channels = output.size(1), s.pixels = pixels_of(output);
        s.latent = shape.latent, s.blocks = shape.blocks, s.channels_last = channels_last_;
        s.phi = pointer<Coefficient>(phi_), s.lam = pointer<Coefficient>(lam_);
        s.bias = pointer<Coefficient>(bias_);
        s.bias_sample = bias_ && bias_->dim() == 2 ? output.size(1) : 0;
        if (residual_) s.residual = const_map<T>(*residual_);
        s.output = mutable_map<T>(output);
        s.activation = activation_;
    }

  private:
    const ScalarType sums_;
    const OptionalTensor phi_, lam_, bias_, residual_;
    const int activation_;
    const bool channels_last_;
};

}  // namespace dcd
