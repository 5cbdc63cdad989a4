// SPDX-License-Identifier: BSD-3-Clause
// The second stage of every gradient that is summed over blocks: partial sums, added in a fixed order.
#pragma once

#include "depthwise.h"

namespace dcd::cuda::dw {

constexpr int kReduceColumns = 32;  // elements of a block, neighbours in memory
constexpr int kReduceLanes = 32;    // partial sums read side by side
constexpr int kReduceThreads = kReduceColumns * kReduceLanes;

DCD_INDEX int64_t reduce_blocks(int64_t size) {
    return (size + kReduceColumns - 1) / kReduceColumns;
}

struct LaneSum {
    float value;
};

template <class Block>
DCD_BODY void reduce_block(Block& block, const ReduceParams& s, int64_t index, float* memory) {
    // constant indices only, or the parameters would be copied to memory of the thread's own
    Reduction mine = s.each[0];
    DCD_UNROLL
    for (int i = 1; i < kReductions; ++i)
        if (i < s.used && index >= s.each[i].first_block) mine = s.each[i];
    const int64_t first = (index - mine.first_block) * kReduceColumns;
    block.each([&](int thread, LaneSum& sum) {
        const int64_t column = first + thread % kReduceColumns;
        const int lane = thread / kReduceColumns;
        sum.value = 0;
        if (column < mine.size) {
            DCD_UNROLL_BY(4)
            for (int i = lane; i < mine.count; i += kReduceLanes)
                sum.value += read_global(mine.from + i * mine.size + column);
        }
        memory[thread] = sum.value;
    });
    for (int half = kReduceLanes / 2; half > 0; half /= 2)
        block.each([&](int thread, LaneSum&) {
            if (thread < half * kReduceColumns) memory[thread] += memory[thread + half * kReduceColumns];
        });
    block.each([&](int thread, LaneSum&) {
        if (thread < kReduceColumns && first + thread < mine.size)
            write(mine.to, mine.type, first + thread, memory[thread]);
    });
}

// Numbers the blocks; returns how many there are.
inline int64_t number_blocks(ReduceParams& s) {
    int64_t blocks = 0;
    for (int i = 0; i < s.used; ++i) {
        s.each[i].first_block = blocks;
        blocks += reduce_blocks(s.each[i].size);
    }
    return blocks;
}

}  // namespace dcd::cuda::dw
