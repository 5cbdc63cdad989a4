// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::pack_pointwise and pointwise_packed: the pointwise op on weights packed beforehand, for
// inference.
#include "cpu/packed.h"
#include "layer_operands.h"

namespace dcd {
namespace {

Tensor pack_pointwise(const Tensor& weight,     // [Co, Ci]
                      const OptionalTensor& p,  // [Co, L]
                      const OptionalTensor& q)  // [Ci, L]
{
    check_rank(weight, "weight", 2, true);
    const int64_t out_channels = weight.size(0), in_channels = weight.size(1);
    STD_TORCH_CHECK(out_channels > 0 && in_channels > 0, "weight must have at least one channel, got ",
                    out_channels, " and ", in_channels);
    STD_TORCH_CHECK(p.has_value() == q.has_value(), "p and q must be given together, got only ",
                    p ? "p" : "q");
    check_operands(weight, "weight", {{"p", p}, {"q", q}});
    int64_t latent = 0;
    if (p) {
        check_rank(*p, "p", 2, true);
        latent = p->size(1);
        STD_TORCH_CHECK(latent > 0, "p must have at least one latent channel, got 0");
        check_sizes(*p, "p", {out_channels, latent});
        check_sizes(*q, "q", {in_channels, latent});
    }
    const ScalarType type = compute_type(weight);
    const Tensor packed = empty_dense({packed_parts(in_channels, out_channels, latent).size}, type);
    const Tensor w = dense(weight, type);
    const OptionalTensor p_ = dense(p, type), q_ = dense(q, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        pack(PackParams<T>{in_channels, out_channels, latent, static_cast<const T*>(w.const_data_ptr()),
                           pointer<T>(p_), pointer<T>(q_), static_cast<T*>(packed.mutable_data_ptr())});
    });
    return packed;
}

// pointwise() with weight, p and q as pack_pointwise() returned them.
Tensor pointwise_packed(const Tensor& input,   // [N, Ci, *spatial]
                        const Tensor& packed,  // [packed_parts().size]
                        int64_t out_channels, int64_t latent_channels,
                        const OptionalTensor& phi,       // [N, L, L]
                        const OptionalTensor& lam,       // [N, Co]
                        const OptionalTensor& bias,      // [Co] or [N, Co]
                        const OptionalTensor& residual,  // [N, Co, *spatial]
                        int64_t activation) {
    check_rank(input, "input", 3, false);
    check_rank(packed, "packed", 1, true);
    const int64_t batch = input.size(0), in_channels = input.size(1);
    STD_TORCH_CHECK(in_channels > 0 && out_channels > 0 && latent_channels >= 0,
                    "in_channels and out_channels must be positive and latent_channels not negative, got ",
                    in_channels, ", ", out_channels, " and ", latent_channels);
    const ScalarType type = compute_type(input);
    STD_TORCH_CHECK(packed.scalar_type() == type && packed.device() == input.device(),
                    "packed must be on the input's device, in the type that the input is computed in");
    check_sizes(packed, "packed", {packed_parts(in_channels, out_channels, latent_channels).size});
    STD_TORCH_CHECK(phi.has_value() == (latent_channels > 0),
                    "phi must be given exactly where latent_channels is not 0, got latent_channels ",
                    latent_channels, phi ? " and a phi" : " and no phi");
    if (phi) check_sizes(*phi, "phi", {batch, latent_channels, latent_channels});
    check_operands(input, "input",
                   {{"phi", phi, true}, {"lam", lam, true}, {"bias", bias, true}, {"residual", residual}});
    const LayerArguments arguments{phi, lam, bias, residual, activation};
    std::vector<int64_t> sizes = sizes_of(input);
    sizes[1] = out_channels;
    arguments.check(sizes);

    const bool channels_last = is_channels_last(input);
    const Tensor output = empty_map(sizes, channels_last, type);
    if (output.numel() == 0) return in_type(output, input.scalar_type());
    const Tensor x = as_map(input, channels_last, type);
    const Tensor packed_ = dense(packed, type);
    const LayerOperands operands(arguments, channels_last, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        PointwiseParams<T> s{};
        operands.fill(s, {latent_channels, 1}, output);
        s.in_channels = in_channels, s.input = const_map<T>(x);
        s.packed = static_cast<const T*>(packed_.const_data_ptr());
        kernels<T>().pointwise(s, torch_runtime());
    });
    return in_type(output, input.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def("pack_pointwise(Tensor weight, Tensor? p, Tensor? q) -> Tensor");
    m.def(
        "pointwise_packed(Tensor input, Tensor packed, int out_channels, int latent_channels, Tensor? phi, "
        "Tensor? lam, Tensor? bias, Tensor? residual, int activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("pack_pointwise", TORCH_BOX(&pack_pointwise));
    m.impl("pointwise_packed", TORCH_BOX(&pointwise_packed));
}

}  // namespace dcd
