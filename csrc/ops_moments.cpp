// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::latent_moments and its gradient: checks, allocation, launch.
#include <limits>

#include "tensors.h"

namespace dcd {
namespace {

void check_moments(const Tensor& input, const Tensor& q) {
    check_rank(input, "input", 3, false);
    check_rank(q, "q", 2, true);
    check_sizes(q, "q", {input.size(1), q.size(1)});
    STD_TORCH_CHECK(q.size(0) > 0 && q.size(1) > 0,
                    "input and q must have at least one channel and one latent channel, got ", q.size(0),
                    " and ", q.size(1));
    check_operands(input, "input", {{"q", q}});
}

Tensor no_pixels(const std::vector<int64_t>& sizes, ScalarType type) {
    Tensor result = empty_dense(sizes, type);
    return torch::stable::fill_(result, std::numeric_limits<double>::quiet_NaN());
}

// E[z] and E[(z - E[z])(z - E[z])^T] over a sample's pixels, z = Q^T x; in fp32 for half precision
std::tuple<Tensor, Tensor> latent_moments(const Tensor& input,  // [N, Ci, *spatial]
                                          const Tensor& q) {    // [Ci, L]
    check_moments(input, q);
    const int64_t batch = input.size(0), latent = q.size(1), pixels = pixels_of(input);
    const ScalarType type = compute_type(input);
    if (pixels == 0) return {no_pixels({batch, latent}, type), no_pixels({batch, latent, latent}, type)};
    const Tensor mean = empty_dense({batch, latent}, type);
    const Tensor covariance = empty_dense({batch, latent, latent}, type);
    if (batch == 0) return {mean, covariance};
    const bool channels_last = is_channels_last(input);
    const Tensor x = as_map(input, channels_last, type), q_ = dense(q, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        MomentsParams<T> s{};
        s.batch = batch, s.in_channels = input.size(1), s.latent = latent, s.pixels = pixels;
        s.channels_last = channels_last;
        s.input = const_map<T>(x);
        s.q = static_cast<const T*>(q_.const_data_ptr());
        s.mean = static_cast<T*>(mean.mutable_data_ptr());
        s.covariance = static_cast<T*>(covariance.mutable_data_ptr());
        kernels<T>().moments(s, torch_runtime());
    });
    return {mean, covariance};
}

// Bit i of `needs` asks for return i.
std::tuple<Tensor, Tensor> latent_moments_backward(
    const Tensor& input,                    // [N, Ci, *spatial]
    const Tensor& q,                        // [Ci, L]
    const Tensor& mean,                     // [N, L], what latent_moments returned
    const OptionalTensor& grad_mean,        // [N, L]
    const OptionalTensor& grad_covariance,  // [N, L, L]
    int64_t needs) {
    check_moments(input, q);
    check_operands(
        input, "input",
        {{"mean", mean, true}, {"grad_mean", grad_mean, true}, {"grad_covariance", grad_covariance, true}});
    const int64_t batch = input.size(0), latent = q.size(1);
    check_sizes(mean, "mean", {batch, latent});
    if (grad_mean) check_sizes(*grad_mean, "grad_mean", {batch, latent});
    if (grad_covariance) check_sizes(*grad_covariance, "grad_covariance", {batch, latent, latent});

    const ScalarType type = compute_type(input);
    const bool channels_last = is_channels_last(input);
    const Gradients wanted{needs, type, input.numel() == 0 || (!grad_mean && !grad_covariance)};
    const Tensor d_input = wanted.map(0, input, channels_last), d_q = wanted.dense(1, q);
    if (!wanted.all_zero && (needs & 3)) {
        const Tensor x = as_map(input, channels_last, type), q_ = dense(q, type), mean_ = dense(mean, type);
        const OptionalTensor grad_mean_ = dense(grad_mean, type);
        const OptionalTensor grad_covariance_ = dense(grad_covariance, type);
        with_type(type, [&](auto zero) {
            using T = decltype(zero);
            MomentsGradParams<T> s{};
            s.batch = batch, s.in_channels = input.size(1), s.latent = latent, s.pixels = pixels_of(input);
            s.channels_last = channels_last;
            s.input = const_map<T>(x);
            s.q = static_cast<const T*>(q_.const_data_ptr());
            s.mean = static_cast<const T*>(mean_.const_data_ptr());
            s.grad_mean = pointer<T>(grad_mean_), s.grad_covariance = pointer<T>(grad_covariance_);
            if (d_input.numel()) s.d_input = mutable_map<T>(d_input);
            s.d_q = target<T>(d_q);
            kernels<T>().moments_grad(s, torch_runtime());
        });
    }
    return {in_type_of(d_input, input), in_type_of(d_q, q)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def("latent_moments(Tensor input, Tensor q) -> (Tensor, Tensor)");
    m.def(
        "latent_moments_backward(Tensor input, Tensor q, Tensor mean, Tensor? grad_mean, Tensor? "
        "grad_covariance, "
        "int needs) -> (Tensor, Tensor)");
}

// The GPU's implementations are registered from Python.
STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("latent_moments", TORCH_BOX(&latent_moments));
    m.impl("latent_moments_backward", TORCH_BOX(&latent_moments_backward));
}

}  // namespace dcd
