// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels::channel_sums and dcd_kernels::branch, the dynamic branch in two calls: checks, allocation,
// launch.
#include "branch.h"
#include "branch_checks.h"

namespace dcd {
namespace {

// Partial per-sample channel sums of an image, in fp32 or float64.
Tensor channel_sums(const Tensor& input, int64_t bins) {  // [N, C, *spatial] -> [N, T, C·bins²]
    check_bins(input, bins);
    check_operands(input, "input", {});
    const ScalarType type = compute_type(input);
    const bool quadrants = bins == 2;
    const int64_t pixels = pixels_of(input);
    const int64_t height = quadrants ? input.size(2) : 1, width = quadrants ? input.size(3) : pixels;
    const int64_t tiles = quadrants ? quadrant_tiles(height, width) : pool_tiles(pixels);
    Tensor sums = empty_dense({input.size(0), tiles, input.size(1) * bins * bins}, type);
    if (sums.numel() == 0) return sums;
    if (pixels == 0) return torch::stable::zero_(sums);
    const bool channels_last = is_channels_last(input);
    const Tensor image = as_map(input, channels_last, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        ChannelSumsParams<T> s{};
        s.batch = input.size(0), s.channels = input.size(1), s.pixels = pixels;
        s.channels_last = channels_last, s.quadrants = quadrants;
        s.height = height, s.width = width, s.tiles = tiles;
        s.tile_size = quadrants ? quadrant_tile_rows(height, width) : pool_tile_pixels(pixels, tiles);
        s.input = const_map<T>(image);
        s.sums = static_cast<T*>(sums.mutable_data_ptr());
        kernels<T>().channel_sums(s, torch_runtime());
    });
    return sums;
}

// A branch's weights as the kernels read them: contiguous, of the type that is computed in.
struct DenseWeights {
    Tensor squeeze, expand;
    OptionalTensor gate, phi, squeeze_bias, gate_bias, expand_bias, phi_bias;

    DenseWeights(const BranchWeights& w, ScalarType type)
        : squeeze(dense(w.squeeze_weight, type)),
          expand(dense(w.expand_weight, type)),
          gate(dense(w.gate_weight, type)),
          phi(dense(w.phi_weight, type)),
          squeeze_bias(dense(w.squeeze_bias, type)),
          gate_bias(dense(w.gate_bias, type)),
          expand_bias(dense(w.expand_bias, type)),
          phi_bias(dense(w.phi_bias, type)) {}

    template <class T>
    BranchParams<T> params(const BranchShape& shape, const Tensor& sums, double scale, int64_t lam_channels,
                           int64_t gate_code, int64_t lam_code) const {
        BranchParams<T> s{};
        s.batch = shape.batch, s.tiles = shape.tiles, s.inputs = shape.inputs, s.hidden = shape.hidden;
        s.lam_channels = lam_channels, s.others = shape.outputs - lam_channels;
        s.sums = static_cast<const T*>(sums.const_data_ptr()), s.scale = static_cast<T>(scale);
        s.squeeze = static_cast<const T*>(squeeze.const_data_ptr());
        s.squeeze_bias = pointer<T>(squeeze_bias);
        s.gate = pointer<T>(gate), s.gate_bias = pointer<T>(gate_bias);
        s.lam_weight = static_cast<const T*>(expand.const_data_ptr()), s.lam_bias = pointer<T>(expand_bias);
        s.phi_weight = phi ? pointer<T>(phi) : s.lam_weight + lam_channels * s.hidden;
        s.phi_bias = phi ? pointer<T>(phi_bias) : s.lam_bias ? s.lam_bias + lam_channels : nullptr;
        s.gate_code = static_cast<int>(gate_code), s.lam_code = static_cast<int>(lam_code);
        return s;
    }
};

// h = gate(squeeze x), x = scale · sum over T; lam = lam_activation, phi = the rest of expand h, or
// phi_weight h
std::tuple<Tensor, Tensor> branch(const Tensor& sums,  // [N, T, I]
                                  double scale, const Tensor& squeeze_weight,
                                  const OptionalTensor& squeeze_bias, const OptionalTensor& gate_weight,
                                  const OptionalTensor& gate_bias, const Tensor& expand_weight,
                                  const OptionalTensor& expand_bias, const OptionalTensor& phi_weight,
                                  const OptionalTensor& phi_bias, int64_t lam_channels, int64_t gate,
                                  int64_t lam_code) {
    const BranchWeights weights{squeeze_weight, squeeze_bias, gate_weight, gate_bias,
                                expand_weight,  expand_bias,  phi_weight,  phi_bias};
    const BranchShape shape = check_branch(sums, weights, lam_channels, gate, lam_code);
    const ScalarType type = sums.scalar_type();
    const Tensor lam = empty_dense({shape.batch, lam_channels}, type);
    const Tensor phi = empty_dense({shape.batch, shape.outputs - lam_channels}, type);
    if (shape.batch == 0) return {lam, phi};
    const Tensor own_sums = dense(sums, type);
    const DenseWeights own(weights, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        BranchParams<T> s = own.params<T>(shape, own_sums, scale, lam_channels, gate, lam_code);
        s.lam = target<T>(lam), s.phi = target<T>(phi);
        kernels<T>().branch(s, torch_runtime());
    });
    return {lam, phi};
}

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Bit i of `needs` asks for return i: of the sums, [N, I] for every tile of them, then of the parameters in
// branch's order.
NineTensors branch_backward(const OptionalTensor& d_lam,  // [N, lam_channels]; absent: zero
                            const OptionalTensor& d_phi,  // [N, the others]; absent: zero
                            const Tensor& lam,            // what branch gave
                            const Tensor& sums, double scale, const Tensor& squeeze_weight,
                            const OptionalTensor& squeeze_bias, const OptionalTensor& gate_weight,
                            const OptionalTensor& gate_bias, const Tensor& expand_weight,
                            const OptionalTensor& phi_weight, int64_t gate, int64_t lam_code, int64_t needs) {
    check_rank(lam, "lam", 2, true);
    const int64_t lam_channels = lam.size(1);
    const BranchWeights weights{squeeze_weight, squeeze_bias, gate_weight, gate_bias,
                                expand_weight,  {},           phi_weight,  {}};
    const BranchShape shape = check_branch(sums, weights, lam_channels, gate, lam_code);
    const int64_t others = shape.outputs - lam_channels;
    check_operands(sums, "sums", {{"d_lam", d_lam}, {"d_phi", d_phi}, {"lam", lam}});
    check_sizes(lam, "lam", {shape.batch, lam_channels});
    if (d_lam) check_sizes(*d_lam, "d_lam", {shape.batch, lam_channels});
    if (d_phi) check_sizes(*d_phi, "d_phi", {shape.batch, others});

    const ScalarType type = sums.scalar_type(), own_type = squeeze_weight.scalar_type();
    const Tensor own_sums = dense(sums, type), own_lam = dense(lam, type);
    const OptionalTensor g_lam = dense(d_lam, type), g_phi = dense(d_phi, type);
    const DenseWeights own(weights, type);
    const auto make = [&](int i, const std::vector<int64_t>& sizes) {
        if (!(needs >> i & 1)) return nothing(type);
        Tensor result = empty_dense(sizes, type);
        return shape.batch ? result : torch::stable::zero_(result);
    };
    const int64_t rows = expand_weight.size(0), more = shape.outputs - rows;
    const Tensor found[] = {make(0, {shape.batch, shape.inputs}),
                            make(1, {shape.hidden, shape.inputs}),
                            make(2, {shape.hidden}),
                            make(3, {shape.hidden, shape.hidden}),
                            make(4, {shape.hidden}),
                            make(5, {rows, shape.hidden}),
                            make(6, {rows}),
                            make(7, {more, shape.hidden}),
                            make(8, {more})};
    if (shape.batch > 0)
        with_type(type, [&](auto zero) {
            using T = decltype(zero);
            BranchGradParams<T> s{};
            s.forward = own.params<T>(shape, own_sums, scale, lam_channels, gate, lam_code);
            s.lam = static_cast<const T*>(own_lam.const_data_ptr());
            s.d_lam = lam_channels ? pointer<T>(g_lam) : nullptr;
            s.d_phi = others ? pointer<T>(g_phi) : nullptr;
            s.d_sums = target<T>(found[0]);
            s.d_squeeze = target<T>(found[1]), s.d_squeeze_bias = target<T>(found[2]);
            s.d_gate = target<T>(found[3]), s.d_gate_bias = target<T>(found[4]);
            s.d_lam_weight = target<T>(found[5]), s.d_lam_bias = target<T>(found[6]);
            s.d_phi_weight = target<T>(found[7]), s.d_phi_bias = target<T>(found[8]);
            if (!phi_weight && s.d_lam_weight) s.d_phi_weight = s.d_lam_weight + lam_channels * shape.hidden;
            if (!phi_weight && s.d_lam_bias) s.d_phi_bias = s.d_lam_bias + lam_channels;
            kernels<T>().branch_grad(s, torch_runtime());
        });
    const auto out = [&](int i) { return in_type(found[i], own_type); };
    return {found[0], out(1), out(2), out(3), out(4), out(5), out(6), out(7), out(8)};
}

// Of channel_sums with bins = 2, in the type of `grad`. One tile: its gradient is that of all.
Tensor quadrants_backward(const Tensor& grad,  // [N, T or 1, 4·C] -> [N, C, height, width]
                          int64_t height, int64_t width, bool channels_last) {
    check_rank(grad, "grad", 3, true);
    check_operands(grad, "grad", {});
    STD_TORCH_CHECK(height >= 0 && width >= 0, "height and width must not be negative, got ", height, " and ",
                    width);
    const int64_t tiles = quadrant_tiles(height, width), channels = grad.size(2) / kQuadrants;
    STD_TORCH_CHECK(grad.size(2) % kQuadrants == 0 && (grad.size(1) == 1 || grad.size(1) == tiles),
                    "grad must have 4 sums a channel in 1 or ", tiles, " tiles, got ", grad.size(2),
                    " sums in ", grad.size(1), " tiles");
    const ScalarType type = compute_type(grad);
    const Tensor image = empty_map({grad.size(0), channels, height, width}, channels_last, type);
    if (image.numel() == 0) return image;
    const Tensor g = dense(grad, type);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        QuadrantsGradParams<T> s{};
        s.batch = grad.size(0), s.channels = channels, s.height = height, s.width = width;
        s.channels_last = channels_last;
        s.tiles = grad.size(1), s.tile_rows = quadrant_tile_rows(height, width);
        s.grad = static_cast<const T*>(g.const_data_ptr());
        s.d_input = mutable_map<T>(image);
        kernels<T>().quadrants_grad(s, torch_runtime());
    });
    return image;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcd_kernels, m) {
    m.def("channel_sums(Tensor input, int bins) -> Tensor");
    m.def(
        "branch(Tensor sums, float scale, Tensor squeeze_weight, Tensor? squeeze_bias, Tensor? gate_weight, "
        "Tensor? gate_bias, Tensor expand_weight, Tensor? expand_bias, Tensor? phi_weight, Tensor? phi_bias, "
        "int lam_channels, int gate, int lam_activation) -> (Tensor lam, Tensor phi)");
    m.def(
        "branch_backward(Tensor? d_lam, Tensor? d_phi, Tensor lam, Tensor sums, float scale, "
        "Tensor squeeze_weight, Tensor? squeeze_bias, Tensor? gate_weight, Tensor? gate_bias, "
        "Tensor expand_weight, Tensor? phi_weight, int gate, int lam_activation, int needs) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def("quadrants_backward(Tensor grad, int height, int width, bool channels_last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dcd_kernels, CPU, m) {
    m.impl("channel_sums", TORCH_BOX(&channel_sums));
    m.impl("branch", TORCH_BOX(&branch));
    m.impl("branch_backward", TORCH_BOX(&branch_backward));
    m.impl("quadrants_backward", TORCH_BOX(&quadrants_backward));
}

}  // namespace dcd
