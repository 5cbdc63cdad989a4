// SPDX-License-Identifier: BSD-3-Clause
// How an image is cut into tiles. Host only: the launcher plans, the kernels look things up.
#pragma once

#include "depthwise.h"

namespace dcd::cuda::dw {

// [0, count) in equal shares of at most `limit`: the size of the largest.
inline int share(int count, int limit) {
    return ceil_div(count, ceil_div(count, limit));
}

inline int power_of_two(int at_most) {
    int power = 1;
    while (2 * power <= at_most) power *= 2;
    return power;
}

// What depends on the extents that were chosen.
template <class T, bool LAST>
void complete(Tiling& t, int mode, int kernel, int channels, int patch_rows_in_all,
              int patch_columns_in_all) {
    using A = Arrangement<T, LAST>;
    t.in_rows = input_extent(mode, kernel, t.rows), t.in_columns = input_extent(mode, kernel, t.columns);
    // not LAST: room for the shift, and no vector over the end of a row
    t.pitch = LAST ? t.in_columns : round_up(t.in_columns + t.vector - 1, t.vector);
    t.group_shift = 0;
    while (1 << t.group_shift < t.group) ++t.group_shift;
    t.groups = Divider(ceil_div(channels, t.group));
    t.row_tiles = Divider(ceil_div(patch_rows_in_all, t.rows / A::kPatchRows));
    t.column_tiles = Divider(ceil_div(patch_columns_in_all, t.columns / A::kPatchColumns));
    t.image = Divider(t.tiles()), t.sample = Divider(t.tiles() * static_cast<int>(t.groups.divisor));
    t.patch_columns = Divider(t.columns / A::kPatchColumns);
    t.in_row_divider = Divider(t.in_rows);
    t.line = Divider(LAST ? t.in_columns : t.pitch / t.vector);
}

// `beside`: elements of a second tile without a halo, of as many columns, that has to fit in as well: 0 or 1
// times.
template <class T, bool LAST>
Tiling plan_tiles(int mode, int kernel, int channels, int height, int width, int pad_rows, int pad_columns,
                  int vector, int beside = 0) {
    using A = Arrangement<T, LAST>;
    Tiling t{};
    t.vector = vector;
    t.lead_rows = lead_in(mode, pad_rows), t.lead_columns = lead_in(mode, pad_columns);
    const int patch_rows = ceil_div(height + t.lead_rows, A::kPatchRows);
    const int patch_columns = ceil_div(width + t.lead_columns, A::kPatchColumns);
    // LAST: 8 threads a channel pair, and seven patches of four columns divide the usual 28, 56 and 112.
    // Else: whole rows where they are not too long.
    const int most_columns = LAST ? (mode == kDown ? 4 : 7) : 64;
    const int most_patches = LAST ? 56 : 2 * kThreads;
    const auto extend = [&](int high, int wide, int group) {
        t.rows = high * A::kPatchRows, t.columns = wide * A::kPatchColumns, t.group = group;
        complete<T, LAST>(t, mode, kernel, channels, patch_rows, patch_columns);
        const int64_t second = int64_t{t.rows} * (t.columns + 2 * A::kVector) * group;
        return (t.tile_elements() + beside * second) * static_cast<int64_t>(sizeof(T)) <= kTileBytes;
    };
    const int least_group = LAST ? A::kGroup : 1;
    int wide = share(patch_columns, most_columns);
    int high = share(patch_rows, larger(1, most_patches / wide));
    while (!extend(high, wide, least_group)) {
        if (high > 1)
            high = share(patch_rows, high - 1);
        else
            wide = share(patch_columns, wide - 1);
    }
    if (!LAST) {  // planes of less than a tile go together
        const int patches = high * wide;
        int group =
            power_of_two(larger(1, smaller(smaller(A::kGroup, 2 * channels - 1), most_patches / patches)));
        while (group > 1 && !extend(high, wide, group)) group /= 2;
        extend(high, wide, group);
    }
    return t;
}

// The widest piece that lies on a multiple of its size everywhere: 16 bytes, or less where the layout is
// uneven.
template <class T, bool LAST>
int vector_of(const Image& image, int64_t batch, int channels) {
    const int inner = LAST ? channels : image.width, step = LAST ? image.channel : image.column;
    if (inner > 1 && step != 1) return 1;
    const auto fits = [](int64_t size, int64_t stride, int vector) {
        return size <= 1 || stride % vector == 0;
    };
    for (int vector = 16 / static_cast<int>(sizeof(T)); vector > 1; vector /= 2)
        if (reinterpret_cast<uintptr_t>(image.data) % (sizeof(T) * static_cast<size_t>(vector)) == 0 &&
            fits(batch, image.sample, vector) && fits(image.height, image.row, vector) &&
            fits(LAST ? image.width : channels, LAST ? image.column : image.channel, vector))
            return vector;
    return 1;
}

// Whether two neighbours that a thread has, its channels or its columns, can be moved at once.
template <class T, bool LAST>
bool moves_pairs(const Image& image, int64_t batch, int channels, int lead_columns) {
    return lead_columns % 2 == 0 && (LAST ? image.channel : image.column) == 1 &&
           vector_of<T, LAST>(image, batch, channels) >= 2;
}

// Blocks that the sums are split over: enough for every multiprocessor of the largest devices to have
// several, and independent of the device, so that results are too. It bounds the memory of the partial sums.
constexpr int kSplitBlocks = 768;

// Completes parameters whose images, factors and padding are given.
template <class T, bool LAST>
void plan_convolve(ConvolveParams& s, int mode, int kernel) {
    s.tiling = plan_tiles<T, LAST>(mode, kernel, s.channels, s.output.height, s.output.width, s.pad_rows,
                                   s.pad_columns, vector_of<T, LAST>(s.input, s.batch, s.channels));
    const int lead = s.tiling.lead_columns;
    s.output_pairs = moves_pairs<T, LAST>(s.output, s.batch, s.channels, lead);
    s.residual_pairs = s.residual.data && moves_pairs<T, LAST>(s.residual, s.batch, s.channels, lead);
}

template <class T, bool LAST>
void plan_sums(SumsParams& s, int mode, int kernel) {
    s.tiling = plan_tiles<T, LAST>(mode, kernel, s.channels, s.grad.height, s.grad.width, s.pad_rows,
                                   s.pad_columns, vector_of<T, LAST>(s.input, s.batch, s.channels), 1);
    // the same outputs, each read where it is
    using A = Arrangement<T, LAST>;
    s.grad_tiling = s.tiling;
    s.grad_tiling.vector = vector_of<T, LAST>(s.grad, s.batch, s.channels);
    complete<T, LAST>(s.grad_tiling, kSame, 1, s.channels, ceil_div(s.grad.height, A::kPatchRows),
                      ceil_div(s.grad.width, A::kPatchColumns));
    const int wanted = ceil_div(kSplitBlocks, static_cast<int>(s.tiling.groups.divisor));
    s.sample_splits = static_cast<int>(s.batch < wanted ? s.batch : wanted);
    s.tile_splits = smaller(s.tiling.tiles(), larger(1, wanted / s.sample_splits));
}

// Turns the parameters of a forward convolution, whose input is already the gradient of its output, into
// those of the input's gradient; returns the mode.
inline Mode transpose(ConvolveParams& s, int kernel, int stride) {
    if (stride == 2) return kUp;
    s.factors.flip = true;
    s.pad_rows = kernel - 1 - s.pad_rows, s.pad_columns = kernel - 1 - s.pad_columns;
    return kSame;
}

}  // namespace dcd::cuda::dw
