// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::released_layer: a pointwise layer of the released form in one call, for inference. Its parts
// are ops too; between them Python and the dispatcher would take as long as the kernels do.
#include <algorithm>

#include "branch.h"
#include "ops.h"

namespace dcd {
namespace {

// A weight of a 1x1 convolution or of a linear layer, [rows, columns, 1, ...].
void check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(tensor.dim() >= 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
                        tensor.numel() == rows * columns,
                    name, " must be a matrix of ", rows, " rows and ", columns,
                    " columns, with kernel size 1");
}

void check_vector(const OptionalTensor& tensor, const char* name, int64_t size) {
    if (tensor) check_sizes(*tensor, name, {size});
}

// q[i, l] = weight[l, i]
template <class T>
void transpose(const T* from, int64_t rows, int64_t columns, T* to) {
    constexpr int64_t kTile = 16;  // columns whose lines of `to` stay in the cache
    for (int64_t first = 0; first < columns; first += kTile)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = first; c < std::min(first + kTile, columns); ++c)
                to[c * rows + r] = from[r * columns + c];
}

// bias_n = P shift_n + p_bias + lam_n static_bias
template <class T>
void sum_biases(const T* p, const T* p_bias, const T* shift, const T* lam, const T* static_bias,
                int64_t batch, int64_t channels, int64_t latent, T* bias) {
    constexpr int64_t kRows = 8;  // sums that do not wait for each other
    for (int64_t n = 0; n < batch; ++n, shift += latent, lam += channels, bias += channels)
        for (int64_t first = 0; first < channels; first += kRows) {
            const int64_t rows = std::min(kRows, channels - first);
            T sum[kRows] = {};
            if (rows == kRows)
                for (int64_t l = 0; l < latent; ++l)
                    for (int64_t r = 0; r < kRows; ++r) sum[r] += p[(first + r) * latent + l] * shift[l];
            else
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t l = 0; l < latent; ++l) sum[r] += p[(first + r) * latent + l] * shift[l];
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t o = first + r;
                bias[o] =
                    sum[r] + (p_bias ? p_bias[o] : T(0)) + (static_bias ? lam[o] * static_bias[o] : T(0));
            }
        }
}

// y = lam (weight x + bias) + P [norm2(Phi z1) (+ z1)] + p_bias,  z1 = norm1(q x + q_bias),  lam and Phi from
// the branch of x; the norms by running statistics, or absent.
Tensor released_layer(const Tensor& input,           // [N, Ci, *spatial]
                      const Tensor& weight,          // [Co, Ci, 1...]
                      const OptionalTensor& bias,    // [Co]
                      const Tensor& p,               // [Co, L, 1...]
                      const OptionalTensor& p_bias,  // [Co]
                      const Tensor& q,               // [L, Ci, 1...]
                      const OptionalTensor& q_bias,  // [L]
                      const Tensor& squeeze_weight,  // [S, Ci or 4 Ci]
                      const OptionalTensor& squeeze_bias, const OptionalTensor& gate_weight,
                      const OptionalTensor& gate_bias, const Tensor& lam_weight,  // [Co, S]
                      const OptionalTensor& lam_bias, const Tensor& phi_weight,   // [L L, S]
                      const OptionalTensor& phi_bias, int64_t bins, int64_t gate, int64_t lam_activation,
                      double eps1, const OptionalTensor& weight1, const OptionalTensor& bias1,  // [L]
                      const OptionalTensor& running_mean1, const OptionalTensor& running_var1, double eps2,
                      const OptionalTensor& weight2, const OptionalTensor& bias2,
                      const OptionalTensor& running_mean2, const OptionalTensor& running_var2,
                      bool latent_residual) {
    check_rank(input, "input", 3, false);
    const int64_t batch = input.size(0), in_channels = input.size(1), out_channels = weight.size(0),
                  latent = q.size(0);
    check_operands(input, "input",
                   {{"weight", weight}, {"bias", bias}, {"p", p}, {"p_bias", p_bias}, {"q", q}});
    STD_TORCH_CHECK(input.numel() > 0 && out_channels > 0 && latent > 0,
                    "input, weight and q must not be empty");
    check_matrix(weight, "weight", out_channels, in_channels);
    check_matrix(q, "q", latent, in_channels);
    check_matrix(p, "p", out_channels, latent);
    check_vector(bias, "bias", out_channels);
    check_vector(p_bias, "p_bias", out_channels);
    check_sizes(phi_weight, "phi_weight", {latent * latent, squeeze_weight.size(0)});
    check_sizes(lam_weight, "lam_weight", {out_channels, squeeze_weight.size(0)});

    const ScalarType type = compute_type(input);
    const bool channels_last = is_channels_last(input);
    const Tensor x = as_map(input, channels_last, type);
    const Tensor sums = channel_sums(input, bins);
    const int64_t bin = bins == 2 ? ((input.size(2) + 1) / 2) * ((input.size(3) + 1) / 2) : pixels_of(input);
    const auto [lam, logits] =
        branch(sums, 1.0 / static_cast<double>(bin), squeeze_weight, squeeze_bias, gate_weight, gate_bias,
               lam_weight, lam_bias, phi_weight, phi_bias, out_channels, gate, lam_activation);
    const Tensor phi = torch::stable::view(logits, {batch, latent, latent});
    const int64_t code1 = running_mean1 ? kRunningStatistics : kNoNorm;
    const int64_t code2 = running_mean2 ? kRunningStatistics : kNoNorm;
    const auto [mapped, shift, none] =
        latent_map(phi, {}, {}, code1, 0, eps1, weight1, bias1, running_mean1, running_var1, code2, 0, eps2,
                   weight2, bias2, running_mean2, running_var2, q_bias, latent_residual);

    const Tensor w = dense(weight, type), p_ = dense(p, type), q_ = dense(q, type);
    const OptionalTensor bias_ = dense(bias, type), p_bias_ = dense(p_bias, type);
    const Tensor transposed = empty_dense({in_channels, latent}, type);
    const Tensor total = empty_dense({batch, out_channels}, type);
    std::vector<int64_t> sizes = sizes_of(input);
    sizes[1] = out_channels;
    const Tensor output = empty_map(sizes, channels_last, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        transpose<T>(pointer<T>(q_), latent, in_channels, target<T>(transposed));
        sum_biases<T>(pointer<T>(p_), pointer<T>(p_bias_), pointer<T>(shift), pointer<T>(lam),
                      pointer<T>(bias_), batch, out_channels, latent, target<T>(total));
        PointwiseParams<T> s{};
        s.batch = batch, s.in_channels = in_channels, s.out_channels = out_channels;
        s.pixels = pixels_of(input), s.latent = latent, s.blocks = 1, s.channels_last = channels_last;
        s.input = const_map<T>(x), s.weight = pointer<T>(w);
        s.p = pointer<T>(p_), s.phi = pointer<T>(mapped), s.q = pointer<T>(transposed);
        s.lam = pointer<T>(lam), s.bias = pointer<T>(total), s.bias_sample = out_channels;
        s.output = mutable_map<T>(output);
        s.activation = 0;
        kernels<T>().pointwise(s, torch_runtime());
    });
    return in_type(output, input.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def(
        "released_layer(Tensor input, Tensor weight, Tensor? bias, Tensor p, Tensor? p_bias, Tensor q, "
        "Tensor? q_bias, Tensor squeeze_weight, Tensor? squeeze_bias, Tensor? gate_weight, "
        "Tensor? gate_bias, Tensor lam_weight, Tensor? lam_bias, Tensor phi_weight, Tensor? phi_bias, "
        "int bins, int gate, int lam_activation, float eps1, Tensor? weight1, Tensor? bias1, "
        "Tensor? running_mean1, Tensor? running_var1, float eps2, Tensor? weight2, Tensor? bias2, "
        "Tensor? running_mean2, Tensor? running_var2, bool latent_residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("released_layer", TORCH_BOX(&released_layer));
}

}  // namespace dcd
