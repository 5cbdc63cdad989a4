// SPDX-License-Identifier: BSD-3-Clause
// The depthwise convolution of one tile with the weights of its sample, and what becomes of the sums.
#pragma once

#include "depthwise_tile.h"

namespace dcd::cuda::dw {

struct NoState {};

template <class T, bool LAST, int KERNEL>
DCD_INDEX int convolve_shared_bytes(const ConvolveParams& s) {
    return Shared::shared_bytes(4 * s.factors.latent * KERNEL * KERNEL) +
           Shared::shared_bytes(4 * s.tiling.group * KERNEL * KERNEL) +
           static_cast<int>(sizeof(T)) * s.tiling.tile_elements();
}

template <int N>
DCD_BODY void activate(float (&value)[N], int code) {
    constexpr float infinity = HUGE_VALF;
    if (code <= 2) {  // none, relu and relu6 are all a clamp
        const float low = code == 0 ? -infinity : 0.0f, high = code == 2 ? 6.0f : infinity;
        DCD_EACH (i, N) value[i] = clamp(value[i], low, high);
    } else if (code == 3) {
        DCD_EACH (i, N) value[i] = value[i] / (1.0f + expf(-value[i]));
    } else {
        DCD_EACH (i, N) value[i] *= clamp(value[i] + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
    }
}

// Adds the residual to N neighbours and stores the first `count` of them. `pairs`: N may be moved at once.
template <class T, int N>
DCD_BODY void store(float (&value)[N], int count, T* to, int to_step, bool to_pairs, const T* residual,
                    int residual_step, bool residual_pairs, int activation) {
    if (residual) {
        if (residual_pairs && count == N) {
            const auto pack = read_global(reinterpret_cast<const Pack<T, N>*>(residual));
            DCD_EACH (i, N) value[i] += to_float(pack.value[i]);
        } else {
            DCD_EACH (i, N)
                if (i < count) value[i] += to_float(read_global(residual + int64_t{i} * residual_step));
        }
    }
    activate(value, activation);
    if (to_pairs && count == N) {
        Pack<T, N> pack;
        DCD_EACH (i, N) pack.value[i] = rounded<T>(value[i]);
        write_global(reinterpret_cast<Pack<T, N>*>(to), pack);
    } else {
        DCD_EACH (i, N)
            if (i < count) write_global(to + int64_t{i} * to_step, rounded<T>(value[i]));
    }
}

// One patch of outputs, from its inputs in shared memory.
template <class T, bool LAST, int KERNEL, Mode MODE>
DCD_BODY void patch_sums(const Tiling& t, const T* from,
                         const float (&w)[KERNEL * KERNEL][Arrangement<T, LAST>::kChannels],
                         float (&sum)[Arrangement<T, LAST>::kPatchRows][Arrangement<T, LAST>::kPatchColumns]
                                     [Arrangement<T, LAST>::kChannels]) {
    using A = Arrangement<T, LAST>;
    constexpr int rows = A::kPatchRows, columns = A::kPatchColumns, channels = A::kChannels;
    constexpr int in_rows = input_extent(MODE, KERNEL, rows),
                  in_columns = input_extent(MODE, KERNEL, columns);
    DCD_EACH (i, in_rows) {
        float x[in_columns][channels];
        DCD_EACH (j, in_columns) read_tile(from + tile_offset<T, LAST>(t, 0, i, j), x[j]);
        DCD_EACH (r, rows) {
            const int tap_row = tap_between(MODE, KERNEL, r, i);
            if (tap_row < 0 || tap_row >= KERNEL) continue;
            DCD_EACH (q, columns)
                DCD_EACH (j, in_columns) {
                    const int tap_column = tap_between(MODE, KERNEL, q, j);
                    if (tap_column < 0 || tap_column >= KERNEL) continue;
                    DCD_EACH (c, channels) sum[r][q][c] += w[tap_row * KERNEL + tap_column][c] * x[j][c];
                }
        }
    }
}

template <class T, bool LAST, int KERNEL, Mode MODE>
DCD_BODY void convolve_tile(const ConvolveParams& s, int64_t n, int first_channel, TilePlace place, int shift,
                            const float* weights, const T* tile, int thread) {
    using A = Arrangement<T, LAST>;
    constexpr int rows = A::kPatchRows, columns = A::kPatchColumns, channels = A::kChannels;
    constexpr int taps = KERNEL * KERNEL;
    const Tiling& t = s.tiling;
    const ThreadPlace mine = thread_place<T, LAST>(t, thread);
    const int channel = first_channel + mine.channel,
              valid_channels = smaller(channels, s.channels - channel);
    if (valid_channels <= 0) return;
    float w[taps][channels], bias[channels] = {};
    DCD_EACH (k, taps) {
        const auto pack =
            *reinterpret_cast<const Pack<float, channels>*>(weights + k * t.group + mine.channel);
        DCD_EACH (c, channels) w[k][c] = pack.value[c];
    }
    if (s.bias.data) {
        DCD_EACH (c, channels)
            if (c < valid_channels) bias[c] = read(s.bias, n * s.bias_sample + channel + c);
    }
    T* output = static_cast<T*>(const_cast<void*>(s.output.data)) + n * s.output.sample +
                int64_t{channel} * s.output.channel;
    const T* residual = s.residual.data ? static_cast<const T*>(s.residual.data) + n * s.residual.sample +
                                              int64_t{channel} * s.residual.channel
                                        : nullptr;
    const int count = t.rows / rows * static_cast<int>(t.patch_columns.divisor);
    for (int i = mine.member; i < count; i += mine.members) {
        const int patch_row = t.patch_columns.divide(i),
                  patch_column = t.patch_columns.remainder(i, patch_row);
        const int row = place.row + patch_row * rows, column = place.column + patch_column * columns;
        if (row >= s.output.height || column >= s.output.width) continue;
        float sum[rows][columns][channels];
        DCD_EACH (r, rows)
            DCD_EACH (q, columns)
                DCD_EACH (c, channels) sum[r][q][c] = bias[c];
        const T* from = tile + tile_offset<T, LAST>(t, mine.channel, patch_row * input_step(MODE, rows),
                                                    patch_column * input_step(MODE, columns) + shift);
        patch_sums<T, LAST, KERNEL, MODE>(t, from, w, sum);
        DCD_EACH (r, rows) {
            const int y = row + r;
            if (y < 0 || y >= s.output.height) continue;
            T* to = output + int64_t{y} * s.output.row + int64_t{column} * s.output.column;
            const T* skip = residual
                                ? residual + int64_t{y} * s.residual.row + int64_t{column} * s.residual.column
                                : nullptr;
            if constexpr (LAST) {
                DCD_EACH (q, columns)
                    if (column + q >= 0 && column + q < s.output.width)
                        store<T, channels>(sum[r][q], valid_channels, to + int64_t{q} * s.output.column,
                                           s.output.channel, s.output_pairs,
                                           skip ? skip + int64_t{q} * s.residual.column : nullptr,
                                           s.residual.channel, s.residual_pairs, s.activation);
            } else {
                float values[columns];
                DCD_EACH (q, columns) values[q] = sum[r][q][0];
                const bool before = column < 0;  // the first patch of a row in kUp
                if (before) values[0] = values[1];
                const int skipped = before ? 1 : 0;
                store<T, columns>(values, smaller(columns, s.output.width - column) - skipped,
                                  to + skipped * s.output.column, s.output.column, s.output_pairs,
                                  skip ? skip + skipped * s.residual.column : nullptr, s.residual.column,
                                  s.residual_pairs, s.activation);
            }
        }
    }
}

// Block `index` has one tile of one group of channels of one sample.
template <class T, bool LAST, int KERNEL, Mode MODE, class Block>
DCD_BODY void convolve_block(Block& block, const ConvolveParams& s, int index, char* memory) {
    constexpr int taps = KERNEL * KERNEL;
    const Tiling& t = s.tiling;
    const BlockPlace at = block_place(t, index);
    const int64_t n = at.sample;
    const int first_channel = at.group * t.group;
    const TilePlace place = tile_place(t, at.tile);
    const int first_row = first_input(MODE, KERNEL, place.row, s.pad_rows);
    const int first_column = first_input(MODE, KERNEL, place.column, s.pad_columns);
    Shared shared{memory};
    float* basis = shared.take<float>(s.factors.latent * taps);
    float* weights = shared.take<float>(t.group * taps);
    T* tile = shared.take<T>(t.tile_elements());
    block.each([&](int thread, NoState&) {
        load_tile<T, LAST>(t, s.input, n, s.channels, first_channel, first_row, first_column, thread, tile);
        form_basis<taps>(s.factors, n, thread, basis);
    });
    block.each([&](int thread, NoState&) {
        form_weights<taps>(s.factors, n, s.channels, first_channel, t.group_shift, basis, thread, weights);
        wait_for_copies();
    });
    block.each([&](int thread, NoState&) {
        convolve_tile<T, LAST, KERNEL, MODE>(s, n, first_channel, place,
                                             alignment_shift<LAST>(t, first_column), weights, tile, thread);
    });
}

}  // namespace dcd::cuda::dw
