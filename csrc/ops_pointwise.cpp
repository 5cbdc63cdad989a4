// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::pointwise and its gradient: checks, allocation, launch.
#include "float32_precision.h"
#include "layer_operands.h"

namespace dcd {
namespace {

LatentShape check_shapes(const Tensor& input,        // [N, Ci, *spatial]
                         const Tensor& weight,       // [Co, Ci]
                         const OptionalTensor& p,    // [Co, L]
                         const OptionalTensor& phi,  // [N, L, L] or [N, B, L, L]
                         const OptionalTensor& q)    // [Ci, L]
{
    check_rank(input, "input", 3, false);
    check_rank(weight, "weight", 2, true);
    const int64_t batch = input.size(0), in_channels = input.size(1), out_channels = weight.size(0);
    check_sizes(weight, "weight", {out_channels, in_channels});
    const LatentShape shape = check_latent(p, phi, q, batch, in_channels, out_channels);
    STD_TORCH_CHECK(in_channels > 0 && out_channels > 0,
                    "input and weight must have at least one channel, got ", in_channels, " and ",
                    out_channels);
    return shape;
}

// The checked call of `pointwise` by a kernel for maps of `type`, which in C++ is T, that sums in S.
template <class T, class S>
Tensor launch(const Tensor& input,      // [N, Ci, *spatial]
              const Tensor& weight,     // [Co, Ci]
              const OptionalTensor& p,  // [Co, L]
              const OptionalTensor& q,  // [Ci, L]
              const LayerArguments& arguments, const LatentShape& shape,
              const std::vector<int64_t>& sizes,  // of the output
              ScalarType type, void (*kernel)(const PointwiseParams<T, S>&, const Runtime&)) {
    const bool channels_last = is_channels_last(input);
    const Tensor output = empty_map(sizes, channels_last, type);
    if (output.numel() == 0) return output;
    const Tensor x = as_map(input, channels_last, type), w = dense(weight, type);
    const OptionalTensor p_ = dense(p, type), q_ = dense(q, type);
    const LayerOperands operands(arguments, channels_last, type);
    PointwiseParams<T, S> s{};
    operands.fill(s, shape, output);
    s.in_channels = input.size(1), s.input = const_map<T>(x);
    s.weight = static_cast<const T*>(w.const_data_ptr()), s.p = pointer<T>(p_), s.q = pointer<T>(q_);
    const LaunchScope scope;
    kernel(s, torch_runtime());
    return output;
}

// y = act(W_n x + bias + residual), W_n = diag(lam_n) W0 + P Phi_n Q^T
Tensor pointwise(const Tensor& input,             // [N, Ci, *spatial]
                 const Tensor& weight,            // [Co, Ci]
                 const OptionalTensor& p,         // [Co, L]
                 const OptionalTensor& phi,       // [N, L, L] or [N, B, L, L]
                 const OptionalTensor& q,         // [Ci, L]
                 const OptionalTensor& lam,       // [N, Co]
                 const OptionalTensor& bias,      // [Co] or [N, Co]
                 const OptionalTensor& residual,  // [N, Co, *spatial]
                 int64_t activation) {
    const LatentShape shape = check_shapes(input, weight, p, phi, q);
    check_operands(input, "input",
                   {{"weight", weight},
                    {"p", p},
                    {"phi", phi, true},
                    {"q", q},
                    {"lam", lam, true},
                    {"bias", bias, true},
                    {"residual", residual}});
    const LayerArguments arguments{phi, lam, bias, residual, activation};
    std::vector<int64_t> sizes = sizes_of(input);
    sizes[1] = weight.size(0);
    arguments.check(sizes);

    const auto run = [&](ScalarType type, auto kernel) {
        return launch(input, weight, p, q, arguments, shape, sizes, type, kernel);
    };
    const ScalarType type = input.scalar_type();
    if (type == ScalarType::Double) return run(type, kernels<double>().pointwise);
    if (type == ScalarType::BFloat16) return run(type, mixed_kernels().half);
    if (type == ScalarType::Float && splits_float32()) return run(type, mixed_kernels().single);
    return in_type(run(ScalarType::Float, kernels<float>().pointwise), type);
}

// Given G = dy behind the activation; bit i of `needs` asks for return i.
SixTensors pointwise_backward(const Tensor& grad,         // [N, Co, *spatial]
                              const Tensor& input,        // [N, Ci, *spatial]
                              const Tensor& weight,       // [Co, Ci]
                              const OptionalTensor& p,    // [Co, L]
                              const OptionalTensor& phi,  // [N, L, L] or [N, B, L, L]
                              const OptionalTensor& q,    // [Ci, L]
                              const OptionalTensor& lam,  // [N, Co]
                              int64_t needs) {
    const LatentShape shape = check_shapes(input, weight, p, phi, q);
    check_operands(input, "input",
                   {{"grad", grad, true},
                    {"weight", weight},
                    {"p", p},
                    {"phi", phi, true},
                    {"q", q},
                    {"lam", lam, true}});
    check_lam(lam, input.size(0), weight.size(0));
    std::vector<int64_t> sizes = sizes_of(input);
    sizes[1] = weight.size(0);
    check_like(grad, "grad", sizes);

    const ScalarType type = compute_type(input);
    const bool channels_last = is_channels_last(input);
    const Tensor g = as_map(grad, channels_last, type), x = as_map(input, channels_last, type);
    const Tensor w = dense(weight, type);
    const OptionalTensor p_ = dense(p, type), phi_ = dense(phi, type), q_ = dense(q, type),
                         lam_ = dense(lam, type);
    const Gradients wanted{needs, type, grad.numel() == 0 || input.numel() == 0};
    const Tensor d_input = wanted.map(0, input, channels_last);
    const Tensor d_weight = wanted.dense(1, weight), d_p = wanted.dense(2, p), d_phi = wanted.dense(3, phi);
    const Tensor d_q = wanted.dense(4, q), d_lam = wanted.dense(5, lam);
    if (!wanted.all_zero)
        with_type(type, [&](auto zero) {
            using T = decltype(zero);
            PointwiseGradParams<T> s{};
            s.batch = input.size(0), s.in_channels = input.size(1), s.out_channels = weight.size(0);
            s.pixels = pixels_of(input);
            s.latent = shape.latent, s.blocks = shape.blocks, s.channels_last = channels_last;
            s.grad = const_map<T>(g), s.input = const_map<T>(x);
            s.weight = static_cast<const T*>(w.const_data_ptr());
            s.p = pointer<T>(p_), s.phi = pointer<T>(phi_), s.q = pointer<T>(q_), s.lam = pointer<T>(lam_);
            if (d_input.numel()) s.d_input = mutable_map<T>(d_input);
            s.d_weight = target<T>(d_weight), s.d_p = target<T>(d_p), s.d_phi = target<T>(d_phi);
            s.d_q = target<T>(d_q), s.d_lam = target<T>(d_lam);
            kernels<T>().pointwise_grad(s, torch_runtime());
        });
    return {in_type_of(d_input, input), in_type_of(d_weight, weight), in_type_of(d_p, p),
            in_type_of(d_phi, phi),     in_type_of(d_q, q),           in_type_of(d_lam, lam)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def(
        "pointwise(Tensor input, Tensor weight, Tensor? p, Tensor? phi, Tensor? q, Tensor? lam, Tensor? "
        "bias, "
        "Tensor? residual, int activation) -> Tensor");
    // The channel sums of its output come with it: a pooling that the next layer's branch need not do.
    m.def(
        "pointwise_pooled(Tensor input, Tensor weight, Tensor? p, Tensor? phi, Tensor? q, Tensor? lam, "
        "Tensor? "
        "bias, Tensor? residual, int activation) -> (Tensor, Tensor)");
    m.def(
        "pointwise_backward(Tensor grad, Tensor input, Tensor weight, Tensor? p, Tensor? phi, Tensor? q, "
        "Tensor? lam, "
        "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("pointwise", TORCH_BOX(&pointwise));
    m.impl("pointwise_backward", TORCH_BOX(&pointwise_backward));
}

}  // namespace dcd
