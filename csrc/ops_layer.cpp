// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::released_layer: a pointwise layer of the released form in one call, for inference. Its parts
// are ops too; between them Python and the dispatcher would take as long as the kernels do.
#include <algorithm>

#include "branch_checks.h"
#include "latent_norm.h"

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

// A norm by running statistics, or none where there are no statistics.
NormArguments norm_of(int which, double eps, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& mean, const OptionalTensor& variance, int64_t latent) {
    STD_TORCH_CHECK(mean.has_value() == variance.has_value(), "running_mean", which, " and running_var",
                    which, " go together: give both or neither");
    for (const OptionalTensor* tensor : {&weight, &bias, &mean, &variance}) {
        STD_TORCH_CHECK(!*tensor || (mean && (*tensor)->is_cpu()), "weight", which, " and bias", which,
                        " need a norm, running_mean", which, ", on the CPU");
        check_vector(*tensor, "a tensor of the norm", latent);
    }
    return {which, mean ? kRunningStatistics : kNoNorm, 0, eps, weight, bias, mean, variance};
}

// Places in one piece of memory, each on a cache line of its own.
class Places {
  public:
    int64_t take(int64_t elements) {
        const int64_t place = end_;
        end_ += (elements + kLine - 1) / kLine * kLine;
        return place;
    }
    int64_t end() const { return end_; }

  private:
    static constexpr int64_t kLine = 16;
    int64_t end_ = 0;
};

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
    check_bins(input, bins);
    check_code("gate", gate, kGateEnd);
    check_code("lam_activation", lam_activation, kLamEnd);
    check_rank(squeeze_weight, "squeeze_weight", 2, true);
    const int64_t batch = input.size(0), in_channels = input.size(1), out_channels = weight.size(0),
                  latent = q.size(0), hidden = squeeze_weight.size(0), pixels = pixels_of(input),
                  inputs = in_channels * bins * bins;
    check_operands(input, "input",
                   {{"weight", weight},
                    {"bias", bias},
                    {"p", p},
                    {"p_bias", p_bias},
                    {"q", q},
                    {"q_bias", q_bias},
                    {"squeeze_weight", squeeze_weight},
                    {"squeeze_bias", squeeze_bias},
                    {"gate_weight", gate_weight},
                    {"gate_bias", gate_bias},
                    {"lam_weight", lam_weight},
                    {"lam_bias", lam_bias},
                    {"phi_weight", phi_weight},
                    {"phi_bias", phi_bias}});
    STD_TORCH_CHECK(input.numel() > 0 && out_channels > 0 && latent > 0 && hidden > 0,
                    "input, weight, q and squeeze_weight must not be empty");
    check_matrix(weight, "weight", out_channels, in_channels);
    check_matrix(q, "q", latent, in_channels);
    check_matrix(p, "p", out_channels, latent);
    check_matrix(squeeze_weight, "squeeze_weight", hidden, inputs);
    check_matrix(lam_weight, "lam_weight", out_channels, hidden);
    check_matrix(phi_weight, "phi_weight", latent * latent, hidden);
    STD_TORCH_CHECK(gate_weight.has_value() == (gate == kGateSE), "gate_weight must be given with gate code ",
                    static_cast<int>(kGateSE), " and with no other, got code ", gate);
    if (gate_weight) check_matrix(*gate_weight, "gate_weight", hidden, hidden);
    check_vector(bias, "bias", out_channels);
    check_vector(p_bias, "p_bias", out_channels);
    check_vector(q_bias, "q_bias", latent);
    check_vector(squeeze_bias, "squeeze_bias", hidden);
    check_vector(gate_bias, "gate_bias", hidden);
    check_vector(lam_bias, "lam_bias", out_channels);
    check_vector(phi_bias, "phi_bias", latent * latent);
    const NormArguments norm1 = norm_of(1, eps1, weight1, bias1, running_mean1, running_var1, latent);
    const NormArguments norm2 = norm_of(2, eps2, weight2, bias2, running_mean2, running_var2, latent);

    const ScalarType type = compute_type(input);
    const bool channels_last = is_channels_last(input), quadrants = bins == 2;
    const Tensor x = as_map(input, channels_last, type);
    const int64_t height = quadrants ? input.size(2) : 1, width = quadrants ? input.size(3) : pixels;
    const int64_t tiles = quadrants ? quadrant_tiles(height, width) : pool_tiles(pixels);
    const Tensor w = dense(weight, type), p_ = dense(p, type), q_ = dense(q, type);
    const Tensor squeeze = dense(squeeze_weight, type), lam_fc = dense(lam_weight, type),
                 phi_fc = dense(phi_weight, type);
    const OptionalTensor gate_fc = dense(gate_weight, type), squeeze_b = dense(squeeze_bias, type),
                         gate_b = dense(gate_bias, type), lam_b = dense(lam_bias, type),
                         phi_b = dense(phi_bias, type), bias_ = dense(bias, type), p_b = dense(p_bias, type),
                         q_b = dense(q_bias, type);
    const DenseNorm first(norm1, type), second(norm2, type);
    std::vector<int64_t> sizes = sizes_of(input);
    sizes[1] = out_channels;
    const Tensor output = empty_map(sizes, channels_last, type);

    // All that lies between the kernels is one allocation.
    Places places;
    const int64_t sums = places.take(batch * tiles * inputs), lam = places.take(batch * out_channels),
                  phi = places.take(batch * latent * latent), mapped = places.take(batch * latent * latent),
                  shift = places.take(batch * latent), turned = places.take(in_channels * latent),
                  total = places.take(batch * out_channels);
    const Tensor memory = empty_dense({places.end()}, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        T* const at = target<T>(memory);
        const Runtime runtime = torch_runtime();

        ChannelSumsParams<T> pooling{};
        pooling.batch = batch, pooling.channels = in_channels, pooling.pixels = pixels;
        pooling.channels_last = channels_last, pooling.quadrants = quadrants;
        pooling.height = height, pooling.width = width, pooling.tiles = tiles;
        pooling.tile_size = quadrants ? quadrant_tile_rows(height, width) : pool_tile_pixels(pixels, tiles);
        pooling.input = const_map<T>(x), pooling.sums = at + sums;
        kernels<T>().channel_sums(pooling, runtime);

        BranchParams<T> fc{};
        fc.batch = batch, fc.tiles = tiles, fc.inputs = inputs, fc.hidden = hidden;
        fc.lam_channels = out_channels, fc.others = latent * latent;
        fc.sums = at + sums;
        fc.scale = T(1) / static_cast<T>(quadrants ? half_up(height) * half_up(width) : pixels);
        fc.squeeze = pointer<T>(squeeze), fc.squeeze_bias = pointer<T>(squeeze_b);
        fc.gate = pointer<T>(gate_fc), fc.gate_bias = pointer<T>(gate_b);
        fc.lam_weight = pointer<T>(lam_fc), fc.lam_bias = pointer<T>(lam_b);
        fc.phi_weight = pointer<T>(phi_fc), fc.phi_bias = pointer<T>(phi_b);
        fc.lam = at + lam, fc.phi = at + phi;
        fc.gate_code = static_cast<int>(gate), fc.lam_code = static_cast<int>(lam_activation);
        kernels<T>().branch(fc, runtime);

        LatentMapParams<T> fold{};
        fold.batch = batch, fold.latent = latent, fold.phi = at + phi;
        fold.norms[0] = first.pointers<T>(), fold.norms[1] = second.pointers<T>();
        fold.latent_bias = pointer<T>(q_b), fold.residual = latent_residual;
        fold.mapped = at + mapped, fold.shift = at + shift;
        kernels<T>().latent_map(fold, runtime);

        transpose<T>(pointer<T>(q_), latent, in_channels, at + turned);
        sum_biases<T>(pointer<T>(p_), pointer<T>(p_b), at + shift, at + lam, pointer<T>(bias_), batch,
                      out_channels, latent, at + total);
        PointwiseParams<T> s{};
        s.batch = batch, s.in_channels = in_channels, s.out_channels = out_channels;
        s.pixels = pixels, s.latent = latent, s.blocks = 1, s.channels_last = channels_last;
        s.input = const_map<T>(x), s.weight = pointer<T>(w);
        s.p = pointer<T>(p_), s.phi = at + mapped, s.q = at + turned;
        s.lam = at + lam, s.bias = at + total, s.bias_sample = out_channels;
        s.output = mutable_map<T>(output);
        kernels<T>().pointwise(s, runtime);
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
