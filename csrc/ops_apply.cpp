// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::apply and its gradient: checks, allocation, launch.
#include "layer_operands.h"

namespace dcd {
namespace {

LatentShape check_apply(const Tensor& fixed, const Tensor& input, const OptionalTensor& p,
                        const OptionalTensor& phi, const OptionalTensor& q, const OptionalTensor& lam) {
    check_rank(fixed, "static", 3, false);
    check_rank(input, "input", p ? fixed.dim() : 2, p.has_value());
    STD_TORCH_CHECK(fixed.size(1) > 0 && input.size(1) > 0,
                    "static and input must have at least one channel, got ", fixed.size(1), " and ",
                    input.size(1));
    check_operands(fixed, "static",
                   {{"input", input}, {"p", p}, {"phi", phi, true}, {"q", q}, {"lam", lam, true}});
    if (p) {
        std::vector<int64_t> sizes = sizes_of(fixed);
        sizes[1] = input.size(1);
        check_like(input, "input", sizes);
    }
    return check_latent(p, phi, q, fixed.size(0), input.size(1), fixed.size(1), true);
}

// y = act(lam r + P Phi_n Q^T x + bias + residual)
Tensor apply(const Tensor& fixed,             // [N, Co, *spatial], the static output r
             const Tensor& input,             // [N, Ci, *spatial], sampled to r's size
             const OptionalTensor& p,         // [Co, L]
             const OptionalTensor& phi,       // [N, L, L], [N, B, L, L]; q null: [N, L, Ci]
             const OptionalTensor& q,         // [Ci, L]; null: input is the latent itself
             const OptionalTensor& lam,       // [N, Co]
             const OptionalTensor& bias,      // [Co] or [N, Co]
             const OptionalTensor& residual,  // [N, Co, *spatial]
             int64_t activation) {
    const LatentShape shape = check_apply(fixed, input, p, phi, q, lam);
    check_operands(fixed, "static", {{"bias", bias, true}, {"residual", residual}});
    const LayerArguments arguments{phi, lam, bias, residual, activation};
    arguments.check(sizes_of(fixed));

    const ScalarType type = compute_type(fixed);
    const bool channels_last = is_channels_last(fixed);
    const Tensor output = empty_map(sizes_of(fixed), channels_last, type);
    if (output.numel() == 0) return in_type(output, fixed.scalar_type());
    const Tensor r = as_map(fixed, channels_last, type);
    const Tensor x = shape.latent ? as_map(input, channels_last, type) : r;
    const OptionalTensor p_ = dense(p, type), q_ = dense(q, type);
    const LayerOperands operands(arguments, channels_last, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        ApplyParams<T> s{};
        operands.fill(s, shape, output);
        s.in_channels = input.size(1), s.fixed = const_map<T>(r), s.input = const_map<T>(x);
        s.p = pointer<T>(p_), s.q = pointer<T>(q_);
        kernels<T>().apply(s, torch_runtime());
    });
    return in_type(output, fixed.scalar_type());
}

// Given G = dy behind the activation; bit i of `needs` asks for return i.
SixTensors apply_backward(const Tensor& grad,         // [N, Co, *spatial]
                          const Tensor& fixed,        // [N, Co, *spatial]
                          const Tensor& input,        // [N, Ci, *spatial]
                          const OptionalTensor& p,    // [Co, L]
                          const OptionalTensor& phi,  // [N, L, L], [N, B, L, L]; q null: [N, L, Ci]
                          const OptionalTensor& q,    // [Ci, L] or null
                          const OptionalTensor& lam,  // [N, Co]
                          int64_t needs) {
    const LatentShape shape = check_apply(fixed, input, p, phi, q, lam);
    check_lam(lam, fixed.size(0), fixed.size(1));
    check_operands(fixed, "static", {{"grad", grad, true}});
    check_like(grad, "grad", sizes_of(fixed));

    const ScalarType type = compute_type(fixed);
    const bool channels_last = is_channels_last(fixed), input_channels_last = is_channels_last(input);
    const Gradients wanted{needs, type, grad.numel() == 0};
    const Tensor d_fixed = wanted.map(0, fixed, channels_last);
    // The kernel writes d_input in static's layout; the caller gets it in input's.
    const bool relayout = channels_last != input_channels_last;
    const Tensor d_input = wanted.map(1, input, channels_last);
    const Tensor d_p = wanted.dense(2, p), d_phi = wanted.dense(3, phi), d_q = wanted.dense(4, q);
    const Tensor d_lam = wanted.dense(5, lam);
    if (!wanted.all_zero) {
        const Tensor g = as_map(grad, channels_last, type), r = as_map(fixed, channels_last, type);
        const Tensor x = shape.latent ? as_map(input, channels_last, type) : r;
        const OptionalTensor p_ = dense(p, type), phi_ = dense(phi, type), q_ = dense(q, type),
                             lam_ = dense(lam, type);
        with_type(type, [&](auto zero) {
            using T = decltype(zero);
            ApplyGradParams<T> s{};
            s.batch = fixed.size(0), s.in_channels = input.size(1), s.out_channels = fixed.size(1);
            s.pixels = pixels_of(fixed);
            s.latent = shape.latent, s.blocks = shape.blocks, s.channels_last = channels_last;
            s.grad = const_map<T>(g), s.fixed = const_map<T>(r), s.input = const_map<T>(x);
            s.p = pointer<T>(p_), s.phi = pointer<T>(phi_), s.q = pointer<T>(q_), s.lam = pointer<T>(lam_);
            if (d_fixed.numel()) s.d_fixed = mutable_map<T>(d_fixed);
            if (d_input.numel() && shape.latent) s.d_input = mutable_map<T>(d_input);
            s.d_p = target<T>(d_p), s.d_phi = target<T>(d_phi), s.d_q = target<T>(d_q),
            s.d_lam = target<T>(d_lam);
            kernels<T>().apply_grad(s, torch_runtime());
        });
        if (d_input.numel() && !shape.latent) {
            Tensor unread = d_input;
            torch::stable::zero_(unread);
        }
    }
    Tensor d_input_out = d_input;
    if (relayout && d_input.numel()) {
        d_input_out = empty_map(sizes_of(input), input_channels_last, type);
        torch::stable::copy_(d_input_out, d_input);
    }
    return {in_type_of(d_fixed, fixed), in_type_of(d_input_out, input),
            in_type_of(d_p, p),         in_type_of(d_phi, phi),
            in_type_of(d_q, q),         in_type_of(d_lam, lam)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def(
        "apply(Tensor static, Tensor input, Tensor? p, Tensor? phi, Tensor? q, Tensor? lam, Tensor? bias, "
        "Tensor? residual, int activation) -> Tensor");
    m.def(
        "apply_backward(Tensor grad, Tensor static, Tensor input, Tensor? p, Tensor? phi, Tensor? q, Tensor? "
        "lam, "
        "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("apply", TORCH_BOX(&apply));
    m.impl("apply_backward", TORCH_BOX(&apply_backward));
}

}  // namespace dcd
