// SPDX-License-Identifier: BSD-3-Clause
// What dcd_kernels::depthwise and its gradient demand of their arguments, on every device.
#pragma once

#include "tensors.h"

namespace dcd {

using Sizes = std::vector<int64_t>;

struct DepthwiseShape {
    int64_t latent;
    Sizes out_sizes;
};

inline std::string text(const Sizes& sizes) {
    std::string s = "(";
    for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
    return s + (sizes.size() == 1 ? ",)" : ")");
}

// Sums of a few products of such numbers stay within int64.
constexpr int64_t kGeometryEnd = int64_t{1} << 31;

inline void check_geometry(const char* name, const Sizes& values, int64_t rank, int64_t least) {
    STD_TORCH_CHECK(static_cast<int64_t>(values.size()) == rank, name, " must have one entry for each of ",
                    rank, " spatial dimensions, got ", text(values));
    for (const int64_t value : values)
        STD_TORCH_CHECK(value >= least && value < kGeometryEnd, name, " must be at least ", least,
                        " and below 2^31, got ", text(values));
}

inline DepthwiseShape check_depthwise(const Tensor& input, const Tensor& weight, const OptionalTensor& p,
                                      const OptionalTensor& phi, const OptionalTensor& r,
                                      const OptionalTensor& lam, const Sizes& stride, const Sizes& padding,
                                      const Sizes& dilation) {
    const int64_t rank = input.dim() - 2;
    STD_TORCH_CHECK(rank >= 1 && rank <= 3, "input must have 1 to 3 spatial dimensions behind batch and ",
                    "channels, got shape ", text(sizes_of(input)));
    STD_TORCH_CHECK(weight.dim() == rank + 2, "weight must have shape (out_channels, 1, *kernel_size) with ",
                    rank, " kernel sizes, got ", text(sizes_of(weight)));
    check_geometry("stride", stride, rank, 1);
    check_geometry("padding", padding, rank, 0);
    check_geometry("dilation", dilation, rank, 1);
    const int64_t batch = input.size(0), in_channels = input.size(1), out_channels = weight.size(0);
    STD_TORCH_CHECK(in_channels > 0, "input must have at least one channel, got shape ",
                    text(sizes_of(input)));
    STD_TORCH_CHECK(weight.size(1) == 1 && out_channels % in_channels == 0,
                    "weight must have shape (multiplier * in_channels, 1, *kernel_size) with in_channels ",
                    in_channels, ", got ", text(sizes_of(weight)));
    check_operands(input, "input",
                   {{"weight", weight}, {"p", p}, {"phi", phi, true}, {"r", r}, {"lam", lam, true}});
    check_lam(lam, batch, out_channels);
    DepthwiseShape shape{0, {batch, out_channels}};
    int64_t taps = 1;
    double elements = static_cast<double>(batch) * static_cast<double>(out_channels);
    for (size_t d = 0; d < static_cast<size_t>(rank); ++d) {
        const int64_t in = input.size(static_cast<int64_t>(d) + 2),
                      k = weight.size(static_cast<int64_t>(d) + 2);
        STD_TORCH_CHECK(k > 0, "weight must have kernel sizes of at least one, got shape ",
                        text(sizes_of(weight)));
        // divided, for the product may not fit
        const int64_t last = in + 2 * padding[d] - 1;
        STD_TORCH_CHECK(last >= 0 && k - 1 <= last / dilation[d],
                        "the kernel must not be larger than the padded input, got kernel size ", k,
                        " with dilation ", dilation[d], " for input size ", in, " with padding ", padding[d],
                        " in spatial dimension ", d);
        shape.out_sizes.push_back((last - dilation[d] * (k - 1)) / stride[d] + 1);
        elements *= static_cast<double>(shape.out_sizes.back());
        taps *= k;
    }
    STD_TORCH_CHECK(elements < 1e18, "padding must leave an output that can be counted, got ", text(padding),
                    " and an output of shape ", text(shape.out_sizes));
    STD_TORCH_CHECK(p.has_value() == phi.has_value() && p.has_value() == r.has_value(),
                    "p, phi and r go together: give all three or none");
    if (p) {
        STD_TORCH_CHECK(p->dim() == 2, "p must have shape (out_channels, latent_kernel)");
        shape.latent = p->size(1);
        check_sizes(*p, "p", {out_channels, shape.latent});
        check_sizes(*phi, "phi", {batch, shape.latent, shape.latent});
        check_sizes(*r, "r", {taps, shape.latent});
    }
    return shape;
}

}  // namespace dcd
