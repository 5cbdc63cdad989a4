// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::depthwise and its gradient: checks, allocation, launch.
#include "depthwise_checks.h"

namespace dcd {
namespace {

// Up to two spatial dimensions stand behind leading dimensions of size one.
template <class F>
void each_dimension(int64_t rank, const F& f) {
    for (int64_t d = 0; d < rank; ++d) f(d, 3 - rank + d);
}

void spatial_strides(const Tensor& t, int64_t* sample, int64_t* channel, int64_t* spatial) {
    *sample = t.stride(0), *channel = t.stride(1);
    spatial[0] = spatial[1] = spatial[2] = 0;
    each_dimension(t.dim() - 2, [&](int64_t from, int64_t to) { spatial[to] = t.stride(from + 2); });
}

template <class T>
DepthwiseParams<T> make_params(const Tensor& input, const Tensor& weight, const OptionalTensor& p,
                               const OptionalTensor& phi, const OptionalTensor& r, const OptionalTensor& lam,
                               const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                               const DepthwiseShape& shape) {
    DepthwiseParams<T> s{};
    s.batch = input.size(0), s.channels = input.size(1), s.multiplier = weight.size(0) / input.size(1);
    for (int d = 0; d < 3; ++d) {
        s.in_size[d] = s.out_size[d] = s.kernel[d] = s.stride[d] = s.dilation[d] = 1;
        s.padding[d] = 0;
    }
    each_dimension(input.dim() - 2, [&](int64_t from, int64_t to) {
        s.in_size[to] = input.size(from + 2), s.out_size[to] = shape.out_sizes[static_cast<size_t>(from) + 2];
        s.kernel[to] = weight.size(from + 2);
        s.stride[to] = stride[static_cast<size_t>(from)], s.padding[to] = padding[static_cast<size_t>(from)];
        s.dilation[to] = dilation[static_cast<size_t>(from)];
    });
    s.latent = shape.latent;
    s.input = static_cast<const T*>(input.const_data_ptr());
    spatial_strides(input, &s.input_sample, &s.input_channel, s.input_spatial);
    s.weight = static_cast<const T*>(weight.const_data_ptr());
    s.p = pointer<T>(p), s.phi = pointer<T>(phi), s.r = pointer<T>(r), s.lam = pointer<T>(lam);
    return s;
}

// y = act(x conv W_n + bias + residual), W_n = diag(lam_n) W0 + P Phi_n R^T
Tensor depthwise(const Tensor& input,             // [N, Ci, *spatial]
                 const Tensor& weight,            // [Co, 1, *kernel]
                 const OptionalTensor& p,         // [Co, L_k]
                 const OptionalTensor& phi,       // [N, L_k, L_k]
                 const OptionalTensor& r,         // [taps, L_k]
                 const OptionalTensor& lam,       // [N, Co]
                 const OptionalTensor& bias,      // [Co] or [N, Co]
                 const OptionalTensor& residual,  // [N, Co, *out_spatial]
                 const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t activation) {
    const DepthwiseShape shape = check_depthwise(input, weight, p, phi, r, lam, stride, padding, dilation);
    check_activation(activation);
    check_operands(input, "input", {{"bias", bias, true}, {"residual", residual}});
    check_bias(bias, input.size(0), weight.size(0));
    if (residual) check_like(*residual, "residual", shape.out_sizes);
    const ScalarType type = compute_type(input);
    const Tensor output = empty_map(shape.out_sizes, is_channels_last(input), type);
    if (output.numel() == 0) return in_type(output, input.scalar_type());
    const Tensor x = in_type(input, type), w = dense(weight, type);
    const OptionalTensor p_ = dense(p, type), phi_ = dense(phi, type), r_ = dense(r, type),
                         lam_ = dense(lam, type);
    const OptionalTensor bias_ = dense(bias, type);
    const OptionalTensor residual_ = residual ? OptionalTensor(in_type(*residual, type)) : std::nullopt;
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        DepthwiseParams<T> s = make_params<T>(x, w, p_, phi_, r_, lam_, stride, padding, dilation, shape);
        s.bias = pointer<T>(bias_), s.bias_sample = bias && bias->dim() == 2 ? weight.size(0) : 0;
        if (residual_) {
            s.residual = pointer<T>(residual_);
            spatial_strides(*residual_, &s.residual_sample, &s.residual_channel, s.residual_spatial);
        }
        s.output = static_cast<T*>(output.mutable_data_ptr());
        spatial_strides(output, &s.output_sample, &s.output_channel, s.output_spatial);
        s.activation = static_cast<int>(activation);
        kernels<T>().depthwise(s, torch_runtime());
    });
    return in_type(output, input.scalar_type());
}

// Given G = dy behind the activation; bit i of `needs` asks for return i.
SixTensors depthwise_backward(const Tensor& grad,         // [N, Co, *out_spatial]
                              const Tensor& input,        // [N, Ci, *spatial]
                              const Tensor& weight,       // [Co, 1, *kernel]
                              const OptionalTensor& p,    // [Co, L_k]
                              const OptionalTensor& phi,  // [N, L_k, L_k]
                              const OptionalTensor& r,    // [taps, L_k]
                              const OptionalTensor& lam,  // [N, Co]
                              const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                              int64_t needs) {
    const DepthwiseShape shape = check_depthwise(input, weight, p, phi, r, lam, stride, padding, dilation);
    check_operands(input, "input", {{"grad", grad, true}});
    check_like(grad, "grad", shape.out_sizes);
    const ScalarType type = compute_type(input);
    const Gradients wanted{needs, type, grad.numel() == 0};
    const Tensor d_input = wanted.map(0, input, is_channels_last(input));
    const Tensor d_weight = wanted.dense(1, weight), d_p = wanted.dense(2, p), d_phi = wanted.dense(3, phi);
    const Tensor d_r = wanted.dense(4, r), d_lam = wanted.dense(5, lam);
    if (!wanted.all_zero) {
        // in the input's layout, for a gradient in another one is read an element at a time
        const Tensor x = in_type(input, type), g = as_map(grad, is_channels_last(input), type);
        const Tensor w = dense(weight, type);
        const OptionalTensor p_ = dense(p, type), phi_ = dense(phi, type), r_ = dense(r, type),
                             lam_ = dense(lam, type);
        with_type(type, [&](auto zero) {
            using T = decltype(zero);
            DepthwiseGradParams<T> s{};
            s.forward = make_params<T>(x, w, p_, phi_, r_, lam_, stride, padding, dilation, shape);
            s.grad = static_cast<const T*>(g.const_data_ptr());
            spatial_strides(g, &s.grad_sample, &s.grad_channel, s.grad_spatial);
            if (d_input.numel()) {
                s.d_input = target<T>(d_input);
                spatial_strides(d_input, &s.d_input_sample, &s.d_input_channel, s.d_input_spatial);
            }
            s.d_weight = target<T>(d_weight), s.d_p = target<T>(d_p), s.d_phi = target<T>(d_phi);
            s.d_r = target<T>(d_r), s.d_lam = target<T>(d_lam);
            kernels<T>().depthwise_grad(s, torch_runtime());
        });
    }
    return {in_type_of(d_input, input), in_type_of(d_weight, weight), in_type_of(d_p, p),
            in_type_of(d_phi, phi),     in_type_of(d_r, r),           in_type_of(d_lam, lam)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def(
        "depthwise(Tensor input, Tensor weight, Tensor? p, Tensor? phi, Tensor? r, Tensor? lam, Tensor? "
        "bias, "
        "Tensor? residual, int[] stride, int[] padding, int[] dilation, int activation) -> Tensor");
    m.def(
        "depthwise_backward(Tensor grad, Tensor input, Tensor weight, Tensor? p, Tensor? phi, Tensor? r, "
        "Tensor? lam, "
        "int[] stride, int[] padding, int[] dilation, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
        "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("depthwise", TORCH_BOX(&depthwise));
    m.impl("depthwise_backward", TORCH_BOX(&depthwise_backward));
}

}  // namespace dcd
