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

}  // namespace dcd
