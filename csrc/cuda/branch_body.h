// SPDX-License-Identifier: BSD-3-Clause
// The branch kernel itself, on a machine M: on the GPU its intrinsics (machine.h), in the tests a cluster of
// blocks that runs on the CPU.
#pragma once

#include "branch.h"

namespace dcd::cuda {

// Four neighbouring numbers in shared memory, read at once.
struct alignas(16) Four {
    float x, y, z, w;
};

// Where element k of a vector lies in shared memory. A lane multiplies kVector<E> neighbouring elements,
// which it reads in fours; the first fours of a group's lanes lie side by side, then the second ones, so that
// the lanes' reads fall into different banks. For 4-byte weights every element stays where it is.
template <class E, int LANES>
DCD_INDEX int slot(int k) {
    constexpr int v = kVector<E>, chunk = LANES * v;
    const int within = k % chunk;
    return k - within + within % v / 4 * (4 * LANES) + within / v * 4 + within % 4;
}

// The products that a lane has after one pass over its group's rows: of row r and sample j at [r * SAMPLES +
// j].
template <int SAMPLES>
constexpr int kProducts = kBranchRows * SAMPLES;

// After add_up, a lane has the totals of its group's products first_product(lane), … (kOwned of them); of
// lanes that have the same ones, the first is the owner.
template <int COUNT, int LANES>
constexpr int kOwned = COUNT > LANES ? COUNT / LANES : 1;

template <int COUNT, int LANES>
DCD_INDEX int first_product(int lane) {
    int first = 0, count = COUNT;
    for (int apart = LANES / 2; apart && count > 1; apart /= 2) {
        count /= 2;
        if (lane & apart) first += count;
    }
    return first;
}

template <int COUNT, int LANES>
DCD_INDEX bool owns_products(int lane) {
    return COUNT >= LANES || lane % (LANES / (COUNT < LANES ? COUNT : LANES)) == 0;
}

// Sums over a group's lanes. At each step two lanes share their products: each keeps one half and sends the
// other, which takes a fraction of the exchanges that a sum for each product would.
template <int LANES, int COUNT, class M>
DCD_BODY void add_up(const M& m, float (&products)[COUNT], int lane) {
    int count = COUNT;
    DCD_UNROLL
    for (int apart = LANES / 2; apart; apart /= 2) {
        if (count > 1) {
            count /= 2;
            const bool upper = lane & apart;
            DCD_UNROLL
            for (int i = 0; i < COUNT / 2; ++i) {
                if (i >= count) break;
                const float mine = upper ? products[i + count] : products[i];
                const float theirs = upper ? products[i] : products[i + count];
                products[i] = mine + m.exchange(theirs, apart);
            }
        } else {
            products[0] += m.exchange(products[0], apart);
        }
    }
}

// A matrix as a block sees it: some of its columns. Its last rows may lie elsewhere.
template <class E>
struct Columns {
    const E* from;   // first of them in row 0
    int64_t stride;  // between rows
    int rows, count;
    bool wide;
    const E* rest;  // the same in row `together`
    int together;   // rows that lie behind the first
};

template <class E>
DCD_INDEX Columns<E> one_matrix(const E* from, int64_t stride, int rows, int count, bool wide) {
    return {from, stride, rows, count, wide, from, rows};
}

// One lane's share of the products of rows row, row + 1, … with every sample's vector, of which element k is
// at vectors[j * stride + slot<E, LANES>(k)] and those behind the last up to `stride` are zero.
template <class E, int SAMPLES, int LANES>
DCD_BODY void multiply(const Columns<E>& matrix, int row, const float* vectors, int stride, int lane,
                       float (&products)[kProducts<SAMPLES>]) {
    constexpr int v = kVector<E>;
    const E* from[kBranchRows];
    DCD_UNROLL
    for (int r = 0; r < kBranchRows; ++r) {
        // rows behind the last are computed from the last, and dropped
        const int known = row + r < matrix.rows ? row + r : matrix.rows - 1;
        const int behind = known - matrix.together;
        from[r] = behind < 0 ? matrix.from + known * matrix.stride : matrix.rest + behind * matrix.stride;
    }
    DCD_UNROLL
    for (int i = 0; i < kProducts<SAMPLES>; ++i) products[i] = 0.0f;
    for (int chunk = 0; chunk < matrix.count; chunk += LANES * v) {
        const int k = chunk + lane * v;
        float weights[kBranchRows][v];
        DCD_UNROLL
        for (int r = 0; r < kBranchRows; ++r) {
            if (matrix.wide && k < matrix.count) {
                load_vector(from[r] + k, weights[r]);
            } else {
                DCD_UNROLL
                for (int i = 0; i < v; ++i)
                    weights[r][i] = k + i < matrix.count ? to_float(load_one(from[r] + k + i)) : 0.0f;
            }
        }
        DCD_UNROLL
        for (int part = 0; part < v / 4; ++part) {
            const float* at = vectors + chunk + part * (4 * LANES) + lane * 4;
            DCD_UNROLL
            for (int j = 0; j < SAMPLES; ++j) {
                const Four x = *reinterpret_cast<const Four*>(at + j * stride);
                DCD_UNROLL
                for (int r = 0; r < kBranchRows; ++r) {
                    const float* w = &weights[r][part * 4];
                    float& sum = products[r * SAMPLES + j];
                    sum += w[0] * x.x;
                    sum += w[1] * x.y;
                    sum += w[2] * x.z;
                    sum += w[3] * x.w;
                }
            }
        }
    }
}

// store(row, sample, product) for rows first … last - 1 of a matrix, by the block's groups of lanes in turn.
template <class E, int SAMPLES, int LANES, class M, class F>
DCD_BODY void each_product(const M& m, const Columns<E>& matrix, int first, int last, const float* vectors,
                           int stride, const F& store) {
    constexpr int count = kProducts<SAMPLES>;
    constexpr int groups = kBranchThreads / LANES;
    const int lane = m.thread() % LANES, group = m.thread() / LANES;
    const int first_of_warp = first + m.thread() / kWarp * (kWarp / LANES * kBranchRows);
    // the lanes of a warp exchange their sums together, so its groups go on as long as the first has a row
    for (int done = 0; first_of_warp + done < last; done += groups * kBranchRows) {
        const int row = first + group * kBranchRows + done;
        float products[count];
        multiply<E, SAMPLES, LANES>(matrix, row, vectors, stride, lane, products);
        add_up<LANES>(m, products, lane);
        if (!owns_products<count, LANES>(lane)) continue;
        DCD_UNROLL
        for (int i = 0; i < kOwned<count, LANES>; ++i) {
            const int product = first_product<count, LANES>(lane) + i;
            const int r = row + product / SAMPLES;
            if (r < last) store(r, product % SAMPLES, products[i]);
        }
    }
}

template <class E>
DCD_BODY float bias_of(const void* bias, int i) {
    return bias ? to_float(load_one(static_cast<const E*>(bias) + i)) : 0.0f;
}

// Zeros from element `count` up to the stride of each sample's vector.
template <class E, int SAMPLES>
DCD_BODY void clear_behind(float* vectors, int count, int stride, int thread) {
    for (int k = count + thread; k < stride; k += kBranchThreads)
        for (int j = 0; j < SAMPLES; ++j) vectors[j * stride + slot<E, kShortRow>(k)] = 0.0f;
}

// lam, phi = f(expand · gate(squeeze · (scale · sums over T))), all in fp32.
template <class E, int SAMPLES, class M>
DCD_BODY void branch(const M& m, const BranchParams& s, const BranchPlan& plan, float* shared) {
    float* pooled = shared;                                  // [SAMPLES][pooled_stride], in slots
    float* partial = pooled + SAMPLES * plan.pooled_stride;  // [SAMPLES][hidden], read by the other ranks
    float* units = partial + SAMPLES * ((s.hidden + 3) / 4 * 4);  // [SAMPLES][hidden_stride], in slots
    const int rank = static_cast<int>(m.block_x() % plan.ranks), thread = m.thread();
    const int64_t first_sample = m.block_x() / plan.ranks * SAMPLES;
    const int first_column = rank * plan.columns;
    int columns = s.inputs - first_column;
    columns = columns < 0 ? 0 : columns < plan.columns ? columns : plan.columns;

    // All samples' sums are under way at once: this is the one place where the block waits for the memory.
    for (int k = thread; k < plan.pooled_stride; k += kBranchThreads) {
        float total[SAMPLES];
        DCD_UNROLL
        for (int j = 0; j < SAMPLES; ++j) total[j] = 0.0f;
        if (k < columns) {
            const float* sums = s.sums + first_sample * s.tiles * s.inputs + first_column + k;
            for (int t = 0; t < s.tiles; ++t) {
                DCD_UNROLL
                for (int j = 0; j < SAMPLES; ++j)
                    if (first_sample + j < s.batch)
                        total[j] += load_one(sums + (int64_t{j} * s.tiles + t) * s.inputs);
            }
        }
        DCD_UNROLL
        for (int j = 0; j < SAMPLES; ++j)
            pooled[j * plan.pooled_stride + slot<E, kLongRow>(k)] = total[j] * s.scale;
    }
    m.sync();

    const Columns<E> squeeze = one_matrix(static_cast<const E*>(s.squeeze) + first_column, s.inputs, s.hidden,
                                          columns, plan.wide_squeeze);
    each_product<E, SAMPLES, kLongRow>(
        m, squeeze, 0, s.hidden, pooled, plan.pooled_stride,
        [&](int row, int j, float product) { partial[j * s.hidden + row] = product; });
    m.sync_cluster();

    for (int i = thread; i < SAMPLES * s.hidden; i += kBranchThreads) {
        float parts[kBranchMaxRanks];
        DCD_UNROLL
        for (int q = 0; q < kBranchMaxRanks; ++q) parts[q] = q < plan.ranks ? m.of_rank(partial, q)[i] : 0.0f;
        float unit = 0.0f;
        DCD_UNROLL
        for (int q = 0; q < kBranchMaxRanks; ++q) unit += parts[q];
        const int j = i / s.hidden, k = i - j * s.hidden;
        unit = gate_activation(unit + bias_of<E>(s.squeeze_bias, k), s.gate_code);
        units[j * plan.hidden_stride + slot<E, kShortRow>(k)] = unit;
    }
    clear_behind<E, SAMPLES>(units, s.hidden, plan.hidden_stride, thread);
    // of the cluster: no block may end, and take its memory away, before the others have read it
    m.sync_cluster();

    if (s.gate_code == kGateSE) {
        float* gated = units + SAMPLES * plan.hidden_stride;
        clear_behind<E, SAMPLES>(gated, s.hidden, plan.hidden_stride, thread);
        const Columns<E> gate =
            one_matrix(static_cast<const E*>(s.gate), s.hidden, s.hidden, s.hidden, plan.wide_gate);
        each_product<E, SAMPLES, kShortRow>(
            m, gate, 0, s.hidden, units, plan.hidden_stride, [&](int row, int j, float product) {
                const int at = j * plan.hidden_stride + slot<E, kShortRow>(row);
                gated[at] = se_gate(units[at], product + bias_of<E>(s.gate_bias, row));
            });
        m.sync();
        units = gated;
    }

    const Columns<E> expand{static_cast<const E*>(s.expand),
                            s.hidden,
                            s.outputs,
                            s.hidden,
                            plan.wide_expand,
                            static_cast<const E*>(s.phi),
                            s.phi ? s.lam_channels : s.outputs};
    const int first_row = rank * plan.rows;
    const int last_row = first_row + plan.rows < s.outputs ? first_row + plan.rows : s.outputs;
    each_product<E, SAMPLES, kShortRow>(
        m, expand, first_row, last_row, units, plan.hidden_stride, [&](int row, int j, float product) {
            const int64_t n = first_sample + j;
            if (n >= s.batch) return;
            const int others = s.outputs - s.lam_channels, behind = row - expand.together;
            const float bias = behind < 0 ? bias_of<E>(s.expand_bias, row) : bias_of<E>(s.phi_bias, behind);
            const float logit = product + bias;
            if (row < s.lam_channels)
                s.lam[n * s.lam_channels + row] = lam_activation(logit, s.lam_code);
            else
                s.others[n * others + row - s.lam_channels] = logit;
        });
}

}  // namespace dcd::cuda
