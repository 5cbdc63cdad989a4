// SPDX-License-Identifier: BSD-3-Clause
// dcd_kernels._core: what Python may ask of the kernels without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"
#include "cpu/packed.h"
#include "cpu/plan.h"

namespace py = pybind11;

namespace {

// Which instruction sets were built, and which of them this CPU can run.
py::dict cpu_features() {
    py::dict features;
#define DCD_ROW(name, usable) features[#name] = dcd::supports_instruction_set(#name);
    DCD_INSTRUCTION_SETS(DCD_ROW)
#undef DCD_ROW
    return features;
}

py::dict build_info() {
    py::dict info;
    info["version"] = DCD_VERSION;
    info["compiler"] = DCD_COMPILER;
    info["cpu_kernels"] = py::str(DCD_BUILT).attr("split")();
    info["cuda"] = DCD_CUDA_BUILT;  // for which devices; empty: not built
    info["cuda_left_out"] = DCD_CUDA_LEFT_OUT;
    info["sanitizers"] = DCD_SANITIZE;
    return info;
}

// The ways to multiply bf16, and why each cannot run here or is not the one to take; empty where it is.
py::dict products() {
    py::dict ways;
    for (int i = 0; i < dcd::kProducts; ++i) {
        const auto way = static_cast<dcd::Products>(i);
        ways[dcd::name_of(way)] = dcd::obstacle(way);
    }
    return ways;
}

dcd::Products products_called(const std::string& name) {
    for (int i = 0; i < dcd::kProducts; ++i)
        if (name == dcd::name_of(static_cast<dcd::Products>(i))) return static_cast<dcd::Products>(i);
    throw py::value_error("products must be empty or a key of products(), got '" + name + "'");
}

// The order of the product that a pointwise layer takes, what the residual costs a sample in each order, and
// how the fp32 kernels for packed weights of the instruction set in use go about it. `products` names a way
// to multiply bf16, and `split` says that the maps are fp32 all the same.
py::dict pointwise_plan(int64_t in_channels, int64_t out_channels, int64_t latent_channels, int64_t pixels,
                        int64_t blocks, const std::string& products, bool split, bool channels_last,
                        int64_t batch, int64_t threads) {
    if (in_channels < 1 || out_channels < 1 || latent_channels < 0 || pixels < 0 || blocks < 1)
        throw py::value_error(
            "channels and blocks must be positive, latent_channels and pixels not negative");
    if (batch < 1 || threads < 1) throw py::value_error("batch and threads must be positive");
    py::dict plan;
    if (!products.empty()) {
        const dcd::MixedPlan mixed =
            dcd::mixed_plan(products_called(products), split, in_channels, out_channels, latent_channels,
                            blocks, pixels, channels_last);
        plan["order"] = mixed.synthesised ? "synthesised" : "factored";
        plan["rows"] = mixed.channel_rows ? "channels" : "pixels";
        plan["synthesised_madds"] = mixed.synthesised_cost;
        plan["factored_madds"] = mixed.factored_cost;
        return plan;
    }
    const dcd::ResidualCost cost =
        dcd::residual_cost(in_channels, out_channels, latent_channels, blocks, pixels);
    plan["order"] = latent_channels && cost.synthesis_pays() ? "synthesised" : "factored";
    plan["synthesised_madds"] = cost.synthesised;
    plan["factored_madds"] = cost.factored;
    if (blocks > 1 || pixels < 1) return plan;  // no packed form, or nothing to do
    channels_last = channels_last && pixels > 1;
    const dcd::TileSizes& tiles = dcd::kernels<float>().tiles;
    const dcd::PointwisePlan how = dcd::pointwise_plan(in_channels, out_channels, latent_channels, pixels,
                                                       batch, channels_last, threads, tiles);
    plan["layout"] = channels_last ? "channels_last" : "contiguous";
    plan["instruction_set"] = dcd::instruction_set();
    if (channels_last) {
        plan["tile"] = py::make_tuple(tiles.panel_rows, tiles.panel_lanes);  // pixels x output channels
    } else {
        plan["tile"] = py::make_tuple(tiles.channel_rows, tiles.channel_lanes);  // output channels x pixels
        plan["columns_at_a_time"] = how.columns_at_a_time;
    }
    plan["panels"] = (out_channels + dcd::kPanel - 1) / dcd::kPanel;
    plan["pixels_at_a_time"] = how.rows_at_a_time;
    if (how.synthesised) plan["channels_at_a_time"] = how.channels_at_a_time;
    plan["tasks"] = py::make_tuple(how.sample_tasks, how.channel_tasks, how.pixel_tasks);
    return plan;
}

// Names of the fields of a network's values and steps, and of the kinds of steps, in order: see network.h.
py::dict network_layout() {
    const auto names = [](const char* text) { return py::str(text).attr("split")(); };
#define DCD_NAME(name) #name " "
    py::dict layout;
    layout["value"] = names(DCD_VALUE_FIELDS(DCD_NAME));
    layout["step"] = names(DCD_STEP_FIELDS(DCD_NAME));
    layout["kinds"] = names(DCD_STEP_KINDS(DCD_NAME));
#undef DCD_NAME
    layout["block"] = dcd::kBlock;
    layout["max_taps"] = dcd::kMaxTaps;
    layout["max_stem_taps"] = dcd::kMaxStemTaps;
    layout["max_kernel"] = dcd::kMaxKernel;
    return layout;
}

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

// y = diag(lam) W0 x + P Phi Q^T x for x [N, Ci, P] on the baseline kernel in double precision, on one
// thread: the kernel itself, without torch around it.
Array pointwise(const Array& input, const Array& weight, const Array& p, const Array& phi, const Array& q,
                const Array& lam) {
    const auto need = [](bool ok, const char* what) {
        if (!ok) throw py::value_error(what);
    };
    need(input.ndim() == 3, "input must have shape (N, in_channels, pixels)");
    need(weight.ndim() == 2 && weight.shape(1) == input.shape(1),
         "weight must have shape (out_channels, in_channels)");
    const auto n = input.shape(0), ci = input.shape(1), pixels = input.shape(2), co = weight.shape(0);
    need(p.ndim() == 2 && p.shape(0) == co, "p must have shape (out_channels, latent_channels)");
    const auto l = p.shape(1);
    need(q.ndim() == 2 && q.shape(0) == ci && q.shape(1) == l,
         "q must have shape (in_channels, latent_channels)");
    need(phi.ndim() == 3 && phi.shape(0) == n && phi.shape(1) == l && phi.shape(2) == l,
         "phi must have shape (N, latent_channels, latent_channels)");
    need(lam.ndim() == 2 && lam.shape(0) == n && lam.shape(1) == co, "lam must have shape (N, out_channels)");
    Array output({n, co, pixels});
    dcd::PointwiseParams<double> s{};
    s.batch = n, s.in_channels = ci, s.out_channels = co, s.pixels = pixels, s.latent = l, s.blocks = 1;
    s.input = {input.data(), ci * pixels, pixels, 1};
    s.weight = weight.data(), s.p = p.data(), s.phi = phi.data(), s.q = q.data(), s.lam = lam.data();
    s.output = {output.mutable_data(), co * pixels, pixels, 1};
    if (output.size()) dcd::kernels<double>().pointwise(s, dcd::Runtime{nullptr, 1});
    return output;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "CPU features, build information and kernels on NumPy arrays; does not need torch.";
    m.def("cpu_features", &cpu_features, "Instruction sets built, and whether this CPU supports each.");
    m.def("build_info", &build_info, "Version, compiler and what was built.");
    m.def(
        "instruction_set", [] { return std::string(dcd::instruction_set()); },
        "The one chosen for this CPU.");
    m.def(
        "pointwise_plan", &pointwise_plan, py::arg("in_channels"), py::arg("out_channels"),
        py::arg("latent_channels"), py::arg("pixels"), py::arg("blocks") = 1, py::arg("products") = "",
        py::arg("split") = false, py::arg("channels_last") = false, py::arg("batch") = 1,
        py::arg("threads") = 1,
        "The order a pointwise layer takes, the multiply-adds of its residual for one sample in each order, "
        "and how packed weights are gone about: layout, tile, panels of 16 output channels, what passes at "
        "a time, tasks over (samples, channels, pixels). With bf16 products the multiply-adds are in units "
        "of one in float32, and it says what the rows of the product are.");
    m.def("products", &products,
          "The ways to multiply bf16, best first: why each is not taken on this CPU, empty where nothing "
          "speaks against it. The first without an obstacle runs.");
    m.def("network_layout", &network_layout, "How the program of a network is written.");
    m.def("pointwise", &pointwise, py::arg("input"), py::arg("weight"), py::arg("p"), py::arg("phi"),
          py::arg("q"), py::arg("lam"),
          "The float64 pointwise kernel on NumPy arrays (N, in_channels, pixels), one thread.");
}
