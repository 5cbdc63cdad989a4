// SPDX-License-Identifier: BSD-3-Clause
// Ops of the CPU that other ops are made of: what the dispatcher would call, without its detour.
#pragma once

#include "tensors.h"

namespace dcd {

// ops_branch.cpp
Tensor channel_sums(const Tensor& input, int64_t bins);
std::tuple<Tensor, Tensor> branch(const Tensor& sums, double scale, const Tensor& squeeze_weight,
                                  const OptionalTensor& squeeze_bias, const OptionalTensor& gate_weight,
                                  const OptionalTensor& gate_bias, const Tensor& expand_weight,
                                  const OptionalTensor& expand_bias, const OptionalTensor& phi_weight,
                                  const OptionalTensor& phi_bias, int64_t lam_channels, int64_t gate,
                                  int64_t lam_code);

// ops_latent_map.cpp
std::tuple<Tensor, Tensor, Tensor> latent_map(
    const Tensor& phi, const OptionalTensor& mean, const OptionalTensor& covariance, int64_t norm1,
    int64_t groups1, double eps1, const OptionalTensor& weight1, const OptionalTensor& bias1,
    const OptionalTensor& running_mean1, const OptionalTensor& running_var1, int64_t norm2, int64_t groups2,
    double eps2, const OptionalTensor& weight2, const OptionalTensor& bias2,
    const OptionalTensor& running_mean2, const OptionalTensor& running_var2,
    const OptionalTensor& latent_bias, bool residual);

}  // namespace dcd
