// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::channel_sums and dcd_kernels::branch: what the dynamic branch is on a GPU. On the CPU they are
// plain loops, the definition that the GPU's kernels are held against; the layers use torch's own operators
// there.
#include <algorithm>

#include "branch.h"
#include "branch_checks.h"

namespace dcd {
namespace {

template <class T>
void sum_channels(const Map<const T>& input, int64_t batch, int64_t channels, int64_t pixels, int64_t tiles,
                  T* sums) {  // [N, T, C]
    const int64_t size = pool_tile_pixels(pixels, tiles);
    for (int64_t n = 0; n < batch; ++n)
        for (int64_t t = 0; t < tiles; ++t)
            for (int64_t c = 0; c < channels; ++c) {
                const T* from = input.data + n * input.sample + c * input.channel;
                double sum = 0;
                for (int64_t i = t * size; i < std::min((t + 1) * size, pixels); ++i)
                    sum += from[i * input.pixel];
                *sums++ = static_cast<T>(sum);
            }
}

// The four bins of adaptive pooling to 2x2.
template <class T>
void sum_quadrants(const Map<const T>& input, int64_t batch, int64_t channels, int64_t height, int64_t width,
                   T* sums) {  // [N, T, C, 2, 2]
    const int64_t tiles = quadrant_tiles(height, width), size = quadrant_tile_rows(height, width);
    for (int64_t n = 0; n < batch; ++n)
        for (int64_t t = 0; t < tiles; ++t)
            for (int64_t c = 0; c < channels; ++c)
                for (int64_t bin = 0; bin < kQuadrants; ++bin) {
                    const T* from = input.data + n * input.sample + c * input.channel;
                    const int64_t top = bin / 2 * half_down(height), left = bin % 2 * half_down(width);
                    double sum = 0;
                    for (int64_t y = t * size; y < std::min((t + 1) * size, half_up(height)); ++y)
                        for (int64_t x = 0; x < half_up(width); ++x)
                            sum += from[((top + y) * width + left + x) * input.pixel];
                    *sums++ = static_cast<T>(sum);
                }
}

// Partial per-sample channel sums of an image, in fp32 or float64.
Tensor channel_sums(const Tensor& input, int64_t bins) {  // [N, C, *spatial] -> [N, T, C·bins²]
    check_bins(input, bins);
    check_operands(input, "input", {});
    const ScalarType type = compute_type(input);
    const bool whole = bins == 1;
    const int64_t batch = input.size(0), channels = input.size(1), pixels = pixels_of(input);
    const int64_t tiles = whole ? pool_tiles(pixels) : quadrant_tiles(input.size(2), input.size(3));
    const Tensor sums = empty_dense({batch, tiles, channels * bins * bins}, type);
    if (sums.numel() == 0) return sums;
    const Tensor image = as_map(input, is_channels_last(input), type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        T* to = static_cast<T*>(sums.mutable_data_ptr());
        if (whole)
            sum_channels<T>(const_map<T>(image), batch, channels, pixels, tiles, to);
        else
            sum_quadrants<T>(const_map<T>(image), batch, channels, input.size(2), input.size(3), to);
    });
    return sums;
}

// y = W x + b for one vector
template <class T>
void affine(const T* weight, const T* bias, int64_t rows, int64_t columns, const T* x, T* y) {
    for (int64_t r = 0; r < rows; ++r) {
        double sum = bias ? bias[r] : 0;
        for (int64_t c = 0; c < columns; ++c) sum += static_cast<double>(weight[r * columns + c]) * x[c];
        y[r] = static_cast<T>(sum);
    }
}

// h = gate(squeeze x), x = scale · sum over T; lam = lam_activation, phi = the rest of expand h
std::tuple<Tensor, Tensor> branch(const Tensor& sums,                  // [N, T, I]
                                  double scale,                        //
                                  const Tensor& squeeze_weight,        // [S, I]
                                  const OptionalTensor& squeeze_bias,  // [S]
                                  const OptionalTensor& gate_weight,   // [S, S]
                                  const OptionalTensor& gate_bias,     // [S]
                                  const Tensor& expand_weight,         // [O, S]
                                  const OptionalTensor& expand_bias,   // [O]
                                  int64_t lam_channels, int64_t gate, int64_t lam_code) {
    const BranchShape shape = check_branch(sums, squeeze_weight, squeeze_bias, gate_weight, gate_bias,
                                           expand_weight, expand_bias, lam_channels, gate, lam_code);
    const ScalarType type = sums.scalar_type();
    const int64_t others = shape.outputs - lam_channels;
    const Tensor lam = empty_dense({shape.batch, lam_channels}, type);
    const Tensor phi = empty_dense({shape.batch, others}, type);
    const Tensor s = dense(sums, type), w1 = dense(squeeze_weight, type), w2 = dense(expand_weight, type);
    const OptionalTensor b1 = dense(squeeze_bias, type), b2 = dense(expand_bias, type);
    const OptionalTensor wg = dense(gate_weight, type), bg = dense(gate_bias, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        const int code = static_cast<int>(gate);
        std::vector<T> x(shape.inputs), h(shape.hidden), g(shape.hidden), z(shape.outputs);
        for (int64_t n = 0; n < shape.batch; ++n) {
            const T* from = static_cast<const T*>(s.const_data_ptr()) + n * shape.tiles * shape.inputs;
            for (int64_t i = 0; i < shape.inputs; ++i) {
                double sum = 0;
                for (int64_t t = 0; t < shape.tiles; ++t) sum += from[t * shape.inputs + i];
                x[i] = static_cast<T>(sum * scale);
            }
            affine(pointer<T>(w1), pointer<T>(b1), shape.hidden, shape.inputs, x.data(), h.data());
            if (code == kGateSE) {
                affine(pointer<T>(wg), pointer<T>(bg), shape.hidden, shape.hidden, h.data(), g.data());
                for (int64_t i = 0; i < shape.hidden; ++i) h[i] = se_gate(h[i], g[i]);
            } else {
                for (T& unit : h) unit = gate_activation(unit, code);
            }
            affine(pointer<T>(w2), pointer<T>(b2), shape.outputs, shape.hidden, h.data(), z.data());
            T* to = lam_channels ? static_cast<T*>(lam.mutable_data_ptr()) + n * lam_channels : nullptr;
            for (int64_t i = 0; i < lam_channels; ++i)
                to[i] = lam_activation(z[i], static_cast<int>(lam_code));
            if (others)
                std::copy(z.begin() + lam_channels, z.end(),
                          static_cast<T*>(phi.mutable_data_ptr()) + n * others);
        }
    });
    return {lam, phi};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def("channel_sums(Tensor input, int bins) -> Tensor");
    m.def(
        "branch(Tensor sums, float scale, Tensor squeeze_weight, Tensor? squeeze_bias, Tensor? gate_weight, "
        "Tensor? gate_bias, Tensor expand_weight, Tensor? expand_bias, int lam_channels, int gate, "
        "int lam_activation) -> (Tensor lam, Tensor phi)");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("channel_sums", TORCH_BOX(&channel_sums));
    m.impl("branch", TORCH_BOX(&branch));
}

}  // namespace dcd
