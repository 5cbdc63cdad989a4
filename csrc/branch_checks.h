// SPDX-License-Identifier: BSD-3-Clause
// What dcd_kernels::channel_sums and branch demand of their arguments, on every device.
#pragma once

#include "branch.h"
#include "tensors.h"

namespace dcd {

struct BranchShape {
    int64_t batch, tiles, inputs, hidden, outputs;
};

// Raises unless `code` is one of the first `end`.
inline void check_code(const char* name, int64_t code, int end) {
    STD_TORCH_CHECK(code >= 0 && code < end, name, " must be a code from 0 to ", end - 1, ", got ", code);
}

// Of dcd_kernels::channel_sums: one sum a channel, or one for each bin of adaptive pooling to 2x2.
inline void check_bins(const Tensor& input, int64_t bins) {
    STD_TORCH_CHECK(bins == 1 || bins == 2, "bins must be 1 or 2, got ", bins);
    check_rank(input, "input", bins == 1 ? 3 : 4, bins == 2);
}

// The sums set the device. The matrices and biases have one type among them, whatever the sums' is.
inline BranchShape check_branch(const Tensor& sums, const Tensor& squeeze_weight,
                                const OptionalTensor& squeeze_bias, const OptionalTensor& gate_weight,
                                const OptionalTensor& gate_bias, const Tensor& expand_weight,
                                const OptionalTensor& expand_bias, int64_t lam_channels, int64_t gate,
                                int64_t lam_activation) {
    check_rank(sums, "sums", 3, true);
    STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float || sums.scalar_type() == ScalarType::Double,
                    "sums must be float32 or float64, got ", torch::headeronly::toString(sums.scalar_type()));
    check_rank(squeeze_weight, "squeeze_weight", 2, true);
    check_rank(expand_weight, "expand_weight", 2, true);
    const BranchShape shape{sums.size(0), sums.size(1), sums.size(2), squeeze_weight.size(0),
                            expand_weight.size(0)};
    STD_TORCH_CHECK(shape.inputs > 0 && shape.hidden > 0 && shape.outputs > 0,
                    "sums, squeeze_weight and expand_weight must have at least one channel, hidden unit and "
                    "coefficient, got ",
                    shape.inputs, ", ", shape.hidden, " and ", shape.outputs);
    check_operands(sums, "sums", {});
    check_operands(squeeze_weight, "squeeze_weight",
                   {{"squeeze_bias", squeeze_bias},
                    {"gate_weight", gate_weight},
                    {"gate_bias", gate_bias},
                    {"expand_weight", expand_weight},
                    {"expand_bias", expand_bias}});
    STD_TORCH_CHECK(squeeze_weight.get_device_index() == sums.get_device_index(),
                    "squeeze_weight must be on the device of sums, number ", sums.get_device_index(),
                    ", got ", squeeze_weight.get_device_index());
    check_sizes(squeeze_weight, "squeeze_weight", {shape.hidden, shape.inputs});
    check_sizes(expand_weight, "expand_weight", {shape.outputs, shape.hidden});
    if (squeeze_bias) check_sizes(*squeeze_bias, "squeeze_bias", {shape.hidden});
    if (expand_bias) check_sizes(*expand_bias, "expand_bias", {shape.outputs});
    check_code("gate", gate, kGateEnd);
    check_code("lam_activation", lam_activation, kLamEnd);
    STD_TORCH_CHECK(gate_weight.has_value() == (gate == kGateSE), "gate_weight must be given with gate code ",
                    static_cast<int>(kGateSE), " and with no other, got it ", gate_weight ? "" : "not ",
                    "with code ", gate);
    STD_TORCH_CHECK(gate_weight || !gate_bias, "gate_bias must not be given without gate_weight");
    if (gate_weight) check_sizes(*gate_weight, "gate_weight", {shape.hidden, shape.hidden});
    if (gate_bias) check_sizes(*gate_bias, "gate_bias", {shape.hidden});
    STD_TORCH_CHECK(lam_channels >= 0 && lam_channels <= shape.outputs,
                    "lam_channels must be from 0 to the rows of expand_weight, ", shape.outputs, ", got ",
                    lam_channels);
    return shape;
}

}  // namespace dcd
