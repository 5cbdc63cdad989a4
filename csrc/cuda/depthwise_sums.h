// SPDX-License-Identifier: BSD-3-Clause
// Gradients of everything but the input, given G = dy behind the activation. With the sums over output pixels
//   S_n[c, t] = sum G[n, c, o] x[n, c, stride o + t - pad],    M_n = S_n R,
// they are a little algebra, linear in S_n:
//   d_W0 = sum_n lam S_n,  d_lam = rowsum(S_n W0),  d_P = sum_n M_n Phi_n^T,  d_Phi_n = P^T M_n,
//   d_R = sum_n S_n^T P Phi_n.
// A block has one group of channels, some samples and some tiles of each. Its S_n stays on chip; what it adds
// to each gradient goes out as one partial sum, and depthwise_reduce.h adds those up.
#pragma once

#include "depthwise_tile.h"

namespace dcd::cuda::dw {

// A thread's share of S_n.
template <int TAPS, int CHANNELS>
struct Products {
    float sum[TAPS][CHANNELS];
};

// Shared memory of a block. Everything with channels has them innermost: neighbouring threads, neighbouring
// banks.
template <class T, bool LAST, int KERNEL>
struct SumsMemory {
    static constexpr int kTaps = KERNEL * KERNEL;
    // the upper half of the threads hands over its sums
    static constexpr int kHandedOver = kThreads / 2 * kTaps * Arrangement<T, LAST>::kChannels;

    float* products;  // S_n [taps, group]
    float* d_weight;  // [taps, group]
    float* p;         // [L_k, group], zero behind the last channel
    float* d_p;       // [L_k, group]
    float* moments;   // M_n [L_k, group]
    float* mixed;     // P Phi_n [L_k, group]
    float* r;         // [taps, L_k]
    float* d_r;       // [taps, L_k]
    float* phi;       // Phi_n [L_k, L_k]
    T* tile;
    T* grad_tile;
    float* handed_over;  // in the tiles' place, which are not needed by then

    static DCD_INDEX int tile_bytes(const SumsParams& s) {
        const int tiles = Shared::shared_bytes(static_cast<int>(sizeof(T)) * s.tiling.tile_elements()) +
                          Shared::shared_bytes(static_cast<int>(sizeof(T)) * s.grad_tiling.tile_elements());
        return larger(tiles, 4 * kHandedOver);
    }
    static DCD_INDEX int bytes(const SumsParams& s) {
        const int group = s.tiling.group, latent = s.factors.latent;
        return 2 * Shared::shared_bytes(4 * kTaps * group) + 4 * Shared::shared_bytes(4 * latent * group) +
               2 * Shared::shared_bytes(4 * kTaps * latent) + Shared::shared_bytes(4 * latent * latent) +
               tile_bytes(s);
    }
    DCD_BODY SumsMemory(const SumsParams& s, char* memory) {
        const int group = s.tiling.group, latent = s.factors.latent;
        Shared shared{memory};
        products = shared.take<float>(kTaps * group), d_weight = shared.take<float>(kTaps * group);
        p = shared.take<float>(latent * group), d_p = shared.take<float>(latent * group);
        moments = shared.take<float>(latent * group), mixed = shared.take<float>(latent * group);
        r = shared.take<float>(kTaps * latent), d_r = shared.take<float>(kTaps * latent);
        phi = shared.take<float>(latent * latent);
        handed_over = reinterpret_cast<float*>(shared.next);
        tile = shared.take<T>(s.tiling.tile_elements()),
        grad_tile = shared.take<T>(s.grad_tiling.tile_elements());
    }
};

// What a block has: samples x tiles of one group of channels.
struct SumsPlace {
    int group, first_channel, split, tile_split;
    Range samples, tiles;
};
DCD_INDEX int64_t sums_blocks(const SumsParams& s) {
    return int64_t{s.sample_splits} * s.tile_splits * static_cast<int>(s.tiling.groups.divisor);
}
DCD_INDEX SumsPlace sums_place(const SumsParams& s, int index) {
    const int split = s.tiling.groups.divide(index), group = s.tiling.groups.remainder(index, split);
    const int sample_split = split / s.tile_splits, tile_split = split - sample_split * s.tile_splits;
    return {group,
            group * s.tiling.group,
            split,
            tile_split,
            part_of(s.batch, s.sample_splits, sample_split),
            part_of(s.tiling.tiles(), s.tile_splits, tile_split)};
}

// Adds the products of one tile to the thread's sums.
template <class T, bool LAST, int KERNEL, Mode MODE>
DCD_BODY void add_products(const SumsParams& s, const SumsMemory<T, LAST, KERNEL>& m, TilePlace place,
                           int shift, int grad_shift, int thread,
                           Products<KERNEL * KERNEL, Arrangement<T, LAST>::kChannels>& mine) {
    using A = Arrangement<T, LAST>;
    constexpr int rows = A::kPatchRows, columns = A::kPatchColumns, channels = A::kChannels;
    constexpr int in_rows = input_extent(MODE, KERNEL, rows),
                  in_columns = input_extent(MODE, KERNEL, columns);
    const Tiling& t = s.tiling;
    const ThreadPlace at = thread_place<T, LAST>(t, thread);
    const int count = t.rows / rows * static_cast<int>(t.patch_columns.divisor);
    for (int i = at.member; i < count; i += at.members) {
        const int patch_row = t.patch_columns.divide(i),
                  patch_column = t.patch_columns.remainder(i, patch_row);
        if (place.row + patch_row * rows >= s.grad.height ||
            place.column + patch_column * columns >= s.grad.width)
            continue;
        const T* x_from = m.tile + tile_offset<T, LAST>(t, at.channel, patch_row * input_step(MODE, rows),
                                                        patch_column * input_step(MODE, columns) + shift);
        const T* g_from = m.grad_tile + tile_offset<T, LAST>(s.grad_tiling, at.channel, patch_row * rows,
                                                             patch_column * columns + grad_shift);
        float g[rows][columns][channels];
        DCD_EACH (r, rows)
            DCD_EACH (q, columns) read_tile(g_from + tile_offset<T, LAST>(s.grad_tiling, 0, r, q), g[r][q]);
        DCD_EACH (y, in_rows) {
            float x[in_columns][channels];
            DCD_EACH (j, in_columns) read_tile(x_from + tile_offset<T, LAST>(t, 0, y, j), x[j]);
            DCD_EACH (r, rows) {
                const int tap_row = tap_between(MODE, KERNEL, r, y);
                if (tap_row < 0 || tap_row >= KERNEL) continue;
                DCD_EACH (q, columns)
                    DCD_EACH (j, in_columns) {
                        const int tap_column = tap_between(MODE, KERNEL, q, j);
                        if (tap_column < 0 || tap_column >= KERNEL) continue;
                        DCD_EACH (c, channels)
                            mine.sum[tap_row * KERNEL + tap_column][c] += g[r][q][c] * x[j][c];
                    }
            }
        }
    }
}

// S_n from the threads' sums: half of the threads of a channel hand theirs to the other half, until one has
// all.
template <class T, bool LAST, int KERNEL, class Block>
DCD_BODY void collect(Block& block, const Tiling& t, const SumsMemory<T, LAST, KERNEL>& m) {
    constexpr int taps = KERNEL * KERNEL, channels = Arrangement<T, LAST>::kChannels;
    using State = Products<taps, channels>;
    const auto slot = [](const ThreadPlace& at, int half) {
        return at.channel / channels * half + at.member % half;
    };
    for (int half = thread_place<T, LAST>(t, 0).members / 2; half > 0; half /= 2) {
        block.each([&](int thread, State& mine) {
            const ThreadPlace at = thread_place<T, LAST>(t, thread);
            if (at.member < half || at.member >= 2 * half) return;
            DCD_EACH (i, taps)
                DCD_EACH (c, channels)
                    m.handed_over[(i * channels + c) * (kThreads / 2) + slot(at, half)] = mine.sum[i][c];
        });
        block.each([&](int thread, State& mine) {
            const ThreadPlace at = thread_place<T, LAST>(t, thread);
            if (at.member >= half) return;
            DCD_EACH (i, taps)
                DCD_EACH (c, channels)
                    mine.sum[i][c] += m.handed_over[(i * channels + c) * (kThreads / 2) + slot(at, half)];
        });
    }
    block.each([&](int thread, State& mine) {
        const ThreadPlace at = thread_place<T, LAST>(t, thread);
        if (at.member > 0) return;
        DCD_EACH (i, taps)
            DCD_EACH (c, channels) m.products[i * t.group + at.channel + c] = mine.sum[i][c];
    });
}

// What follows from S_n without M_n, and M_n and P Phi_n themselves.
template <class T, bool LAST, int KERNEL>
DCD_BODY void first_algebra(const SumsParams& s, const SumsMemory<T, LAST, KERNEL>& m, const SumsPlace& place,
                            int64_t n, int thread) {
    constexpr int taps = KERNEL * KERNEL;
    const int group = s.tiling.group, latent = s.factors.latent;
    const auto lam = [&](int channel) {
        return s.factors.lam.data && channel < s.channels ? read(s.factors.lam, n * s.channels + channel)
                                                          : 1.0f;
    };
    if (s.d_weight)
        for (int i = thread; i < taps * group; i += kThreads)
            m.d_weight[i] += lam(place.first_channel + (i & (group - 1))) * m.products[i];
    if (s.d_lam && thread < group && place.first_channel + thread < s.channels) {
        const int channel = place.first_channel + thread;
        float sum = 0;
        for (int t = 0; t < taps; ++t)
            sum += m.products[t * group + thread] * read(s.factors.weight, int64_t{channel} * taps + t);
        write_global(s.d_lam + (place.tile_split * s.batch + n) * s.channels + channel, sum);
    }
    for (int i = thread; i < latent * group; i += kThreads) {
        const int b = i >> s.tiling.group_shift, c = i & (group - 1);
        float moment = 0, mixed = 0;
        for (int t = 0; t < taps; ++t) moment += m.products[t * group + c] * m.r[t * latent + b];
        for (int a = 0; a < latent; ++a) mixed += m.p[a * group + c] * m.phi[a * latent + b];
        m.moments[i] = moment, m.mixed[i] = mixed;
    }
}

template <class T, bool LAST, int KERNEL>
DCD_BODY void second_algebra(const SumsParams& s, const SumsMemory<T, LAST, KERNEL>& m,
                             const SumsPlace& place, int64_t n, int thread) {
    constexpr int taps = KERNEL * KERNEL;
    const int group = s.tiling.group, latent = s.factors.latent;
    if (s.d_p)
        for (int i = thread; i < latent * group; i += kThreads) {
            const int a = i >> s.tiling.group_shift, c = i & (group - 1);
            float sum = 0;
            for (int b = 0; b < latent; ++b) sum += m.moments[b * group + c] * m.phi[a * latent + b];
            m.d_p[i] += sum;
        }
    if (s.d_phi) {
        const int64_t groups = s.tiling.groups.divisor;
        float* d_phi = s.d_phi + ((place.tile_split * groups + place.group) * s.batch + n) * latent * latent;
        for (int i = thread; i < latent * latent; i += kThreads) {
            const int a = i / latent, b = i - a * latent;
            float sum = 0;
            for (int c = 0; c < group; ++c) sum += m.p[a * group + c] * m.moments[b * group + c];
            write_global(d_phi + i, sum);
        }
    }
    if (s.d_r)
        for (int i = thread; i < taps * latent; i += kThreads) {
            const int t = i / latent, b = i - t * latent;
            float sum = 0;
            for (int c = 0; c < group; ++c) sum += m.products[t * group + c] * m.mixed[b * group + c];
            m.d_r[i] += sum;
        }
}

template <class T, bool LAST, int KERNEL>
DCD_BODY void open_sums(const SumsParams& s, const SumsMemory<T, LAST, KERNEL>& m, const SumsPlace& place,
                        int thread) {
    constexpr int taps = KERNEL * KERNEL;
    const int group = s.tiling.group, latent = s.factors.latent;
    for (int i = thread; i < taps * group; i += kThreads) m.d_weight[i] = 0;
    for (int i = thread; i < latent * group; i += kThreads) {
        const int a = i >> s.tiling.group_shift, channel = place.first_channel + (i & (group - 1));
        m.p[i] = channel < s.channels ? read(s.factors.p, int64_t{channel} * latent + a) : 0.0f;
        m.d_p[i] = 0;
    }
    for (int i = thread; i < taps * latent; i += kThreads) m.r[i] = read(s.factors.r, i), m.d_r[i] = 0;
}

template <class T, bool LAST, int KERNEL>
DCD_BODY void close_sums(const SumsParams& s, const SumsMemory<T, LAST, KERNEL>& m, const SumsPlace& place,
                         int thread) {
    constexpr int taps = KERNEL * KERNEL;
    const int group = s.tiling.group, latent = s.factors.latent;
    const int valid = smaller(group, s.channels - place.first_channel);
    const int64_t first = int64_t{place.split} * s.channels + place.first_channel;
    if (s.d_weight)
        for (int i = thread; i < valid * taps; i += kThreads)
            write_global(s.d_weight + first * taps + i, m.d_weight[i % taps * group + i / taps]);
    if (s.d_p)
        for (int i = thread; i < valid * latent; i += kThreads) {
            const int c = i / latent, a = i - c * latent;
            write_global(s.d_p + first * latent + i, m.d_p[a * group + c]);
        }
    if (s.d_r) {
        const int64_t groups = s.tiling.groups.divisor;
        float* d_r = s.d_r + (place.split * groups + place.group) * taps * latent;
        for (int i = thread; i < taps * latent; i += kThreads) write_global(d_r + i, m.d_r[i]);
    }
}

template <class T, bool LAST, int KERNEL, Mode MODE, class Block>
DCD_BODY void sums_block(Block& block, const SumsParams& s, int index, char* memory) {
    constexpr int taps = KERNEL * KERNEL, channels = Arrangement<T, LAST>::kChannels;
    using State = Products<taps, channels>;
    const SumsPlace place = sums_place(s, index);
    const SumsMemory<T, LAST, KERNEL> m(s, memory);
    const int latent = s.factors.latent;
    block.each([&](int thread, State&) { open_sums(s, m, place, thread); });
    for (int64_t n = place.samples.begin; n < place.samples.end; ++n) {
        block.each([&](int thread, State& mine) {
            DCD_EACH (i, taps)
                DCD_EACH (c, channels) mine.sum[i][c] = 0;
            for (int i = thread; i < latent * latent; i += kThreads)
                m.phi[i] = read(s.factors.phi, n * latent * latent + i);
        });
        for (int64_t i = place.tiles.begin; i < place.tiles.end; ++i) {
            const TilePlace at = tile_place(s.tiling, static_cast<int>(i));
            const int first_row = first_input(MODE, KERNEL, at.row, s.pad_rows);
            const int first_column = first_input(MODE, KERNEL, at.column, s.pad_columns);
            block.each([&](int thread, State&) {
                load_tile<T, LAST>(s.tiling, s.input, n, s.channels, place.first_channel, first_row,
                                   first_column, thread, m.tile);
                load_tile<T, LAST>(s.grad_tiling, s.grad, n, s.channels, place.first_channel, at.row,
                                   at.column, thread, m.grad_tile);
                wait_for_copies();
            });
            block.each([&](int thread, State& mine) {
                add_products<T, LAST, KERNEL, MODE>(s, m, at, alignment_shift<LAST>(s.tiling, first_column),
                                                    alignment_shift<LAST>(s.grad_tiling, at.column), thread,
                                                    mine);
            });
        }
        collect<T, LAST, KERNEL>(block, s.tiling, m);
        block.each([&](int thread, State&) { first_algebra(s, m, place, n, thread); });
        block.each([&](int thread, State&) { second_algebra(s, m, place, n, thread); });
    }
    block.each([&](int thread, State&) { close_sums(s, m, place, thread); });
}

}  // namespace dcd::cuda::dw
