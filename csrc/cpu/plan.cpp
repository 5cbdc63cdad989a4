// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>

namespace dcd {

ResidualCost residual_cost(int64_t in_channels, int64_t out_channels, int64_t latent, int64_t blocks,
                           int64_t pixels) {
    const int64_t product = out_channels * in_channels;
    return {product / blocks * latent + std::min(out_channels, in_channels) * latent * latent + product,
            pixels * (latent * (in_channels + out_channels) + blocks * latent * latent)};
}

namespace {

// Products in the time of one in fp32: measured for vdpbf16ps, for AMX by the instruction's throughput (16 x
// 16 x 32 products in 16 cycles, beside two vectors of 16 in one).
int64_t speed_of(Products products, bool split) {
    switch (products) {
        case Products::kAvx512Bf16:
            return 2;
        case Products::kAmx:
        case Products::kAmxEmulated:
            return split ? 5 : 16;
        default:
            return 1;
    }
}

}  // namespace

MixedPlan mixed_plan(Products products, bool split, int64_t in_channels, int64_t out_channels, int64_t latent,
                     int64_t blocks, int64_t pixels, bool channels_last) {
    // Widening, rounding and packing a weight take as long as this many products.
    constexpr int64_t kPacking = 6;
    const int64_t product = out_channels * in_channels, speed = speed_of(products, split);
    MixedPlan plan{};
    plan.synthesised_cost = product / blocks * latent + product * kPacking;
    plan.factored_cost = pixels * latent * blocks * (in_channels + out_channels) / speed;
    plan.synthesised = latent && plan.synthesised_cost < plan.factored_cost;
    // Few pixels leave lanes empty, but packing W0 as lanes would take longer than all products.
    plan.channel_rows = !channels_last || (!plan.synthesised && pixels < 32);
    return plan;
}

PointwisePlan pointwise_plan(int64_t in_channels, int64_t out_channels, int64_t latent, int64_t pixels,
                             int64_t batch, bool channels_last, int64_t threads, const TileSizes& tiles) {
    const int64_t tile_rows = tiles.panel_rows, tile_pixels = tiles.channel_lanes;
    constexpr int64_t kFar = 96 * 1024;  // elements, half of a 1 MB L2 and less
    const auto at_least_one = [](int64_t x) { return std::max<int64_t>(1, x); };
    PointwisePlan plan{};
    plan.synthesised = latent && residual_cost(in_channels, out_channels, latent, 1, pixels).synthesis_pays();

    // Samples share nothing but W0, so they are split first; then channels where W_n is synthesised, for
    // nothing is done twice, and pixels where it is not, for each channel needs the whole latent.
    plan.sample_tasks = plan.channel_tasks = plan.pixel_tasks = 1;
    if (threads > 1) {
        if (batch % threads == 0 || batch >= 4 * threads) {
            plan.sample_tasks = threads;
        } else {
            plan.sample_tasks = batch;
            const int64_t units = plan.synthesised ? (out_channels + 15) / 16 : pixels / 16;
            (plan.synthesised ? plan.channel_tasks : plan.pixel_tasks) =
                at_least_one(std::min(threads, units));
        }
    }

    plan.channels_at_a_time = std::max<int64_t>(16, kFar / in_channels / 16 * 16);
    if (channels_last) {
        // Many rows, for each pass over the panels costs its start; x stays in L2 in between.
        plan.rows_at_a_time =
            tile_rows * std::max<int64_t>(4, (plan.synthesised ? kFar / 2 : kFar) / in_channels / tile_rows);
    } else {
        plan.rows_at_a_time = tile_pixels * std::clamp<int64_t>(kFar / 2 / in_channels / tile_pixels, 1, 8);
    }
    plan.columns_at_a_time = in_channels > 64 ? 1 : at_least_one(kFar / in_channels / tile_pixels);
    return plan;
}

}  // namespace dcd
