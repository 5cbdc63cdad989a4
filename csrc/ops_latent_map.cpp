// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::latent_map and its gradient: checks, allocation, launch.
#include "latent_norm.h"

namespace dcd {
namespace {

void check_vector(const char* name, int which, const OptionalTensor& tensor, int64_t latent) {
    if (!tensor) return;
    const auto number = [&] { return which ? std::to_string(which) : std::string(); };
    STD_TORCH_CHECK(tensor->is_cpu(), name, number(), " must be on the CPU like phi");
    const ScalarType type = tensor->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                        type == ScalarType::BFloat16,
                    name, number(), " must be float32, float64, float16 or bfloat16, got ",
                    torch::headeronly::toString(type));
    if (tensor->dim() != 1 || tensor->size(0) != latent)
        check_sizes(*tensor, (name + number()).c_str(), {latent});
}

void check_norm(const NormArguments& norm, int64_t latent) {
    const int n = norm.which;
    STD_TORCH_CHECK(norm.statistics >= 0 && norm.statistics < kLatentStatisticsEnd, "norm", n,
                    " must be a code from 0 to ", kLatentStatisticsEnd - 1, ", got ", norm.statistics);
    if (norm.statistics == kGroupStatistics)
        STD_TORCH_CHECK(norm.groups > 0 && latent % norm.groups == 0, "groups", n,
                        " must divide the latent channels, ", latent, ", got ", norm.groups);
    const bool running = norm.statistics == kRunningStatistics;
    STD_TORCH_CHECK(norm.running_mean.has_value() == running && norm.running_var.has_value() == running,
                    "running_mean", n, " and running_var", n, " must be given with norm", n, " code ",
                    static_cast<int>(kRunningStatistics), " and with no other, got code ", norm.statistics);
    STD_TORCH_CHECK(norm.statistics != kNoNorm || !(norm.weight || norm.bias), "weight", n, " and bias", n,
                    " must not be given without a norm");
    check_vector("weight", n, norm.weight, latent);
    check_vector("bias", n, norm.bias, latent);
    check_vector("running_mean", n, norm.running_mean, latent);
    check_vector("running_var", n, norm.running_var, latent);
}

void check_matrices(const char* name, const OptionalTensor& tensor, const Tensor& phi, bool square) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_cpu(), name, " must be on the CPU like phi");
    STD_TORCH_CHECK(tensor->scalar_type() == phi.scalar_type(), name, " must have the dtype of phi, ",
                    torch::headeronly::toString(phi.scalar_type()), ", got ",
                    torch::headeronly::toString(tensor->scalar_type()));
    if (square)
        check_sizes(*tensor, name, {phi.size(0), phi.size(1), phi.size(1)});
    else
        check_sizes(*tensor, name, {phi.size(0), phi.size(1)});
}

void check(const Tensor& phi, const OptionalTensor& mean, const OptionalTensor& covariance,
           const NormArguments& first, const NormArguments& second, const OptionalTensor& latent_bias) {
    STD_TORCH_CHECK(phi.is_cpu(), "phi must be on the CPU");
    STD_TORCH_CHECK(phi.scalar_type() == ScalarType::Float || phi.scalar_type() == ScalarType::Double,
                    "phi must be float32 or float64, got ", torch::headeronly::toString(phi.scalar_type()));
    check_rank(phi, "phi", 3, true);
    const int64_t latent = phi.size(1);
    STD_TORCH_CHECK(latent > 0, "phi must have at least one latent channel");
    check_sizes(phi, "phi", {phi.size(0), latent, latent});
    STD_TORCH_CHECK(mean.has_value() == covariance.has_value(),
                    "mean and covariance go together: give both or neither");
    STD_TORCH_CHECK(mean || !(first.takes_moments() || second.takes_moments()),
                    "mean and covariance must be given where norm1 or norm2 takes statistics, codes ",
                    static_cast<int>(kBatchStatistics), " and ", static_cast<int>(kGroupStatistics));
    check_matrices("mean", mean, phi, false);
    check_matrices("covariance", covariance, phi, true);
    check_norm(first, latent);
    check_norm(second, latent);
    check_vector("latent_bias", 0, latent_bias, latent);
}

// What forward and backward read, contiguous.
struct DenseArguments {
    const Tensor phi;
    const bool uses_moments;
    const OptionalTensor mean, covariance, latent_bias;
    const DenseNorm first, second;
    const bool residual;

    DenseArguments(const Tensor& phi_, const OptionalTensor& mean_, const OptionalTensor& covariance_,
                   const NormArguments& first_, const NormArguments& second_,
                   const OptionalTensor& latent_bias_, bool residual_)
        : phi(dense(phi_, phi_.scalar_type())),
          uses_moments(first_.takes_moments() || second_.takes_moments()),
          mean(uses_moments ? dense(mean_, phi_.scalar_type()) : std::nullopt),
          covariance(uses_moments ? dense(covariance_, phi_.scalar_type()) : std::nullopt),
          latent_bias(dense(latent_bias_, phi_.scalar_type())),
          first(first_, phi_.scalar_type()),
          second(second_, phi_.scalar_type()),
          residual(residual_) {}

    template <class T>
    LatentMapParams<T> params() const {
        LatentMapParams<T> s{};
        s.batch = phi.size(0), s.latent = phi.size(1);
        s.phi = pointer<T>(phi), s.mean = pointer<T>(mean), s.covariance = pointer<T>(covariance);
        s.norms[0] = first.pointers<T>(), s.norms[1] = second.pointers<T>();
        s.latent_bias = pointer<T>(latent_bias), s.residual = residual;
        return s;
    }
};

// norm2(Phi norm1(z)) (+ norm1(z)) = Phi' Q^T x + shift, z = Q^T x + latent_bias
std::tuple<Tensor, Tensor, Tensor> latent_map(
    const Tensor& phi,                 // [N, L, L]
    const OptionalTensor& mean,        // [N, L] of Q^T x
    const OptionalTensor& covariance,  // [N, L, L] of Q^T x
    int64_t norm1, int64_t groups1, double eps1, const OptionalTensor& weight1, const OptionalTensor& bias1,
    const OptionalTensor& running_mean1, const OptionalTensor& running_var1, int64_t norm2, int64_t groups2,
    double eps2, const OptionalTensor& weight2, const OptionalTensor& bias2,
    const OptionalTensor& running_mean2, const OptionalTensor& running_var2,
    const OptionalTensor& latent_bias, bool residual) {
    const NormArguments first{1, norm1, groups1, eps1, weight1, bias1, running_mean1, running_var1};
    const NormArguments second{2, norm2, groups2, eps2, weight2, bias2, running_mean2, running_var2};
    check(phi, mean, covariance, first, second, latent_bias);
    const DenseArguments arguments(phi, mean, covariance, first, second, latent_bias, residual);
    const ScalarType type = phi.scalar_type();
    const int64_t batch = phi.size(0), latent = phi.size(1);
    const int64_t tracked = (norm1 == kBatchStatistics) + (norm2 == kBatchStatistics);
    const Tensor mapped = empty_dense({batch, latent, latent}, type),
                 shift = empty_dense({batch, latent}, type);
    const Tensor statistics = empty_dense({2 * tracked, latent}, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        LatentMapParams<T> s = arguments.params<T>();
        s.mapped = target<T>(mapped), s.shift = target<T>(shift), s.statistics = target<T>(statistics);
        kernels<T>().latent_map(s, torch_runtime());
    });
    return {mapped, shift, statistics};
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Bit i of `needs` asks for return i.
EightTensors latent_map_backward(const OptionalTensor& grad_mapped,  // [N, L, L]; null: zero
                                 const OptionalTensor& grad_shift,   // [N, L]; null: zero
                                 const Tensor& phi, const OptionalTensor& mean,
                                 const OptionalTensor& covariance, int64_t norm1, int64_t groups1,
                                 double eps1, const OptionalTensor& weight1, const OptionalTensor& bias1,
                                 const OptionalTensor& running_mean1, const OptionalTensor& running_var1,
                                 int64_t norm2, int64_t groups2, double eps2, const OptionalTensor& weight2,
                                 const OptionalTensor& bias2, const OptionalTensor& running_mean2,
                                 const OptionalTensor& running_var2, const OptionalTensor& latent_bias,
                                 bool residual, int64_t needs) {
    const NormArguments first{1, norm1, groups1, eps1, weight1, bias1, running_mean1, running_var1};
    const NormArguments second{2, norm2, groups2, eps2, weight2, bias2, running_mean2, running_var2};
    check(phi, mean, covariance, first, second, latent_bias);
    check_matrices("grad_mapped", grad_mapped, phi, true);
    check_matrices("grad_shift", grad_shift, phi, false);
    const DenseArguments arguments(phi, mean, covariance, first, second, latent_bias, residual);
    const ScalarType type = phi.scalar_type();
    // moments that no norm takes have no influence
    const Gradients wanted{needs, type, phi.size(0) == 0};
    const Gradients of_moments{needs, type, wanted.all_zero || !arguments.uses_moments};
    const Tensor d_phi = wanted.dense(0, phi), d_mean = of_moments.dense(1, mean);
    const Tensor d_covariance = of_moments.dense(2, covariance);
    const Tensor d_weight1 = wanted.dense(3, weight1), d_bias1 = wanted.dense(4, bias1);
    const Tensor d_weight2 = wanted.dense(5, weight2), d_bias2 = wanted.dense(6, bias2);
    const Tensor d_latent_bias = wanted.dense(7, latent_bias);
    if (!wanted.all_zero) {
        const OptionalTensor g = dense(grad_mapped, type), h = dense(grad_shift, type);
        with_type(type, [&](auto zero) {
            using T = decltype(zero);
            LatentMapGradParams<T> s{};
            s.forward = arguments.params<T>();
            s.grad_mapped = pointer<T>(g), s.grad_shift = pointer<T>(h);
            s.d_phi = target<T>(d_phi);
            if (arguments.uses_moments)
                s.d_mean = target<T>(d_mean), s.d_covariance = target<T>(d_covariance);
            s.d_weight[0] = target<T>(d_weight1), s.d_bias[0] = target<T>(d_bias1);
            s.d_weight[1] = target<T>(d_weight2), s.d_bias[1] = target<T>(d_bias2);
            s.d_latent_bias = target<T>(d_latent_bias);
            kernels<T>().latent_map_grad(s, torch_runtime());
        });
    }
    return {d_phi,
            d_mean,
            d_covariance,
            in_type_of(d_weight1, weight1),
            in_type_of(d_bias1, bias1),
            in_type_of(d_weight2, weight2),
            in_type_of(d_bias2, bias2),
            in_type_of(d_latent_bias, latent_bias)};
}

}  // namespace

#define DCD_LATENT_MAP_ARGUMENTS                                                                          \
    "Tensor phi, Tensor? mean, Tensor? covariance, int norm1, int groups1, float eps1, Tensor? weight1, " \
    "Tensor? bias1, Tensor? running_mean1, Tensor? running_var1, int norm2, int groups2, float eps2, "    \
    "Tensor? weight2, Tensor? bias2, Tensor? running_mean2, Tensor? running_var2, Tensor? latent_bias, "  \
    "bool residual"

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def("latent_map(" DCD_LATENT_MAP_ARGUMENTS ") -> (Tensor mapped, Tensor shift, Tensor statistics)");
    m.def("latent_map_backward(Tensor? grad_mapped, Tensor? grad_shift, " DCD_LATENT_MAP_ARGUMENTS
          ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("latent_map", TORCH_BOX(&latent_map));
    m.impl("latent_map_backward", TORCH_BOX(&latent_map_backward));
}

}  // namespace dcd
