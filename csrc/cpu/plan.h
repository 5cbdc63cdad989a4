// SPDX-License-Identifier: BSD-3-Clause
// Which order of the product a layer takes: the cost model, which the kernels ask and `explain` prints.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "mixed.h"

namespace dcd {

// Multiply-adds that the dynamic residual adds to one sample, in either order (see kernels/lowrank.h).
struct ResidualCost {
    int64_t
        synthesised;   // Co Ci L / B to form P Phi Q^T, min(Co, Ci) L^2 for P Phi or Phi Q^T, Co Ci to add W0
    int64_t factored;  // L (Ci + Co) + B L^2 a pixel
    bool synthesis_pays() const { return synthesised < factored; }
};

// latent: latent channels of one block.
ResidualCost residual_cost(int64_t in_channels, int64_t out_channels, int64_t latent, int64_t blocks,
                           int64_t pixels);

// How a layer runs with bf16 products (see kernels/mixed.h), and what the dynamic residual costs a sample in
// either order, in units of a multiply-add in fp32.
struct MixedPlan {
    bool synthesised;
    bool channel_rows;  // the rows of the products are channels, the lanes pixels; else the reverse
    int64_t synthesised_cost, factored_cost;
};

MixedPlan mixed_plan(Products products, bool split, int64_t in_channels, int64_t out_channels, int64_t latent,
                     int64_t blocks, int64_t pixels, bool channels_last);

// How the kernels of kernels/packed.h go about one layer. Tasks are shared out to threads.
struct PointwisePlan {
    bool synthesised;
    int64_t sample_tasks, channel_tasks, pixel_tasks;
    int64_t rows_at_a_time;  // channels_last: rows of x that pass all panels; contiguous: pixels of a latent
    int64_t channels_at_a_time;  // output channels of which W_n is formed at a time
    int64_t columns_at_a_time;   // contiguous: tiles side by side that pass all channels
};

PointwisePlan pointwise_plan(int64_t in_channels, int64_t out_channels, int64_t latent, int64_t pixels,
                             int64_t batch, bool channels_last, int64_t threads, const TileSizes& tiles);

}  // namespace dcd
