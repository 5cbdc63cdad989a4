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

// The branch's matrices and biases, which have one type among them, whatever the sums' is. The rows of
// expand_weight, and then those of phi_weight where it is given, give lam and then Phi.
struct BranchWeights {
    const Tensor& squeeze_weight;        // [S, I]
    const OptionalTensor& squeeze_bias;  // [S]
    const OptionalTensor& gate_weight;   // [S, S]
    const OptionalTensor& gate_bias;     // [S]
    const Tensor& expand_weight;         // [O, S]; with phi_weight [lam_channels, S]
    const OptionalTensor& expand_bias;   // like expand_weight's rows
    const OptionalTensor& phi_weight;    // [O - lam_channels, S]
    const OptionalTensor& phi_bias;      // like phi_weight's rows
};

// The sums set the device.
inline BranchShape check_branch(const Tensor& sums, const BranchWeights& w, int64_t lam_channels,
                                int64_t gate, int64_t lam_activation) {
    check_rank(sums, "sums", 3, true);
    STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float || sums.scalar_type() == ScalarType::Double,
                    "sums must be float32 or float64, got ", torch::headeronly::toString(sums.scalar_type()));
    check_rank(w.squeeze_weight, "squeeze_weight", 2, true);
    check_rank(w.expand_weight, "expand_weight", 2, true);
    if (w.phi_weight) check_rank(*w.phi_weight, "phi_weight", 2, true);
    const int64_t rows = w.expand_weight.size(0), more = w.phi_weight ? w.phi_weight->size(0) : 0;
    const BranchShape shape{sums.size(0), sums.size(1), sums.size(2), w.squeeze_weight.size(0), rows + more};
    STD_TORCH_CHECK(shape.inputs > 0 && shape.hidden > 0 && shape.outputs > 0,
                    "sums, squeeze_weight and expand_weight must have at least one channel, hidden unit and "
                    "coefficient, got ",
                    shape.inputs, ", ", shape.hidden, " and ", shape.outputs);
    check_operands(sums, "sums", {});
    check_operands(w.squeeze_weight, "squeeze_weight",
                   {{"squeeze_bias", w.squeeze_bias},
                    {"gate_weight", w.gate_weight},
                    {"gate_bias", w.gate_bias},
                    {"expand_weight", w.expand_weight},
                    {"expand_bias", w.expand_bias},
                    {"phi_weight", w.phi_weight},
                    {"phi_bias", w.phi_bias}});
    STD_TORCH_CHECK(w.squeeze_weight.get_device_index() == sums.get_device_index(),
                    "squeeze_weight must be on the device of sums, number ", sums.get_device_index(),
                    ", got ", w.squeeze_weight.get_device_index());
    check_sizes(w.squeeze_weight, "squeeze_weight", {shape.hidden, shape.inputs});
    check_sizes(w.expand_weight, "expand_weight", {rows, shape.hidden});
    if (w.squeeze_bias) check_sizes(*w.squeeze_bias, "squeeze_bias", {shape.hidden});
    if (w.expand_bias) check_sizes(*w.expand_bias, "expand_bias", {rows});
    if (w.phi_weight) check_sizes(*w.phi_weight, "phi_weight", {more, shape.hidden});
    STD_TORCH_CHECK(w.phi_weight || !w.phi_bias, "phi_bias must not be given without phi_weight");
    if (w.phi_bias) check_sizes(*w.phi_bias, "phi_bias", {more});
    check_code("gate", gate, kGateEnd);
    check_code("lam_activation", lam_activation, kLamEnd);
    STD_TORCH_CHECK(w.gate_weight.has_value() == (gate == kGateSE),
                    "gate_weight must be given with gate code ", static_cast<int>(kGateSE),
                    " and with no other, got it ", w.gate_weight ? "" : "not ", "with code ", gate);
    STD_TORCH_CHECK(w.gate_weight || !w.gate_bias, "gate_bias must not be given without gate_weight");
    if (w.gate_weight) check_sizes(*w.gate_weight, "gate_weight", {shape.hidden, shape.hidden});
    if (w.gate_bias) check_sizes(*w.gate_bias, "gate_bias", {shape.hidden});
    STD_TORCH_CHECK(lam_channels >= 0 && lam_channels <= rows,
                    "lam_channels must be from 0 to the rows of expand_weight, ", rows, ", got ",
                    lam_channels);
    STD_TORCH_CHECK(!w.phi_weight || lam_channels == rows, "lam_channels must be the rows of expand_weight, ",
                    rows, ", where phi_weight is given, got ", lam_channels);
    return shape;
}

}  // namespace dcd
