// SPDX-License-Identifier: BSD-3-Clause
// Loops over the index arithmetic of the CUDA depthwise kernels (cuda/index.h) for whole images, without
// data: what the kernels would write, copy and multiply.
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/depthwise_plan.h"

namespace dcd::cuda::dw {
namespace {

void demand(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(what);
}

struct Problem {
    int mode, kernel, channels, height, width;  // of the output
    int in_height, in_width, pad_rows, pad_columns, vector;
};

// Along one axis: wherever tap_between says that an output of a patch meets an input, the convolution's own
// formula says the same, and every pair that the formula has is found.
template <int PATCH>
void check_axis(const Problem& p, int first_output, int pad, int size, int in_size) {
    const int first = first_input(p.mode, p.kernel, first_output, pad);
    const int extent = input_extent(p.mode, p.kernel, PATCH);
    for (int o = 0; o < PATCH; ++o) {
        const int output = first_output + o;
        if (output < 0 || output >= size) continue;
        int met = 0, due = 0;
        for (int i = 0; i < extent; ++i) {
            const int tap = tap_between(p.mode, p.kernel, o, i), input = first + i;
            if (tap < 0 || tap >= p.kernel || input < 0 || input >= in_size) continue;
            const int twice = output + pad - tap;
            demand(p.mode == kSame   ? input == output + tap - pad
                   : p.mode == kDown ? input == 2 * output + tap - pad
                                     : 2 * input == twice,
                   "an output meets an input at a wrong tap");
            ++met;
        }
        for (int tap = 0; tap < p.kernel; ++tap) {
            const int position = p.mode == kSame   ? output + tap - pad
                                 : p.mode == kDown ? 2 * output + tap - pad
                                                   : output + pad - tap;
            if (p.mode == kUp && (position < 0 || position % 2)) continue;
            const int input = p.mode == kUp ? position / 2 : position;
            due += input >= 0 && input < in_size;
        }
        demand(met == due, "an output misses an input");
    }
}

template <class T, bool LAST>
void check_copies(const Tiling& t, int first_column) {
    const int shift = alignment_shift<LAST>(t, first_column);
    std::vector<char> copied(static_cast<size_t>(t.tile_elements()), 0);
    demand(t.tile_elements() % t.vector == 0, "a tile is not of whole vectors");
    for (int i = 0; i < pieces(t, t.vector); ++i) {
        const Piece at = piece<T, LAST>(t, i, shift, t.vector);
        demand(at.target % t.vector == 0, "a vector is not aligned in shared memory");
        demand((LAST ? at.channel : first_column + at.column) % t.vector == 0,
               "a vector is not aligned in the image");
        for (int e = 0; e < t.vector; ++e) {
            const int channel = at.channel + (LAST ? e : 0), column = at.column + (LAST ? 0 : e);
            demand(channel >= 0 && channel < t.group && at.row >= 0 && at.row < t.in_rows,
                   "a vector is outside of the tile");
            demand(tile_offset<T, LAST>(t, channel, at.row, column + shift) == at.target + e,
                   "an element is copied to where it is not read");
            ++copied[static_cast<size_t>(at.target + e)];
        }
    }
    for (const char count : copied) demand(count == 1, "an element of the tile is not copied once");
}

template <class T, bool LAST>
void check(const Problem& p, int beside) {
    using A = Arrangement<T, LAST>;
    const Tiling t = plan_tiles<T, LAST>(p.mode, p.kernel, p.channels, p.height, p.width, p.pad_rows,
                                         p.pad_columns, p.vector, beside);
    demand(t.tile_elements() * static_cast<int64_t>(sizeof(T)) <= kTileBytes, "a tile is too large");
    demand(static_cast<int64_t>(t.groups.divisor) * t.group >= p.channels, "channels are left over");
    std::vector<uint8_t> written(static_cast<size_t>(p.height) * static_cast<size_t>(p.width), 0);
    std::vector<int> patches(kThreads, 0);
    int checked = -1;
    for (int tile = 0; tile < t.tiles(); ++tile) {
        const TilePlace place = tile_place(t, tile);
        const int first_column = first_input(p.mode, p.kernel, place.column, p.pad_columns);
        const int shift = alignment_shift<LAST>(t, first_column);
        if (shift != checked) check_copies<T, LAST>(t, first_column), checked = shift;
        // the threads of the first channel; each thread place exists once
        for (int thread = 0; thread < kThreads; ++thread) {
            const ThreadPlace mine = thread_place<T, LAST>(t, thread);
            demand(mine.channel >= 0 && mine.channel + A::kChannels <= t.group, "a thread has no channel");
            demand(mine.member >= 0 && mine.member < mine.members, "a thread is not one of its channel");
            if (tile == 0)
                ++patches[static_cast<size_t>(mine.channel / A::kChannels * mine.members + mine.member)];
            if (mine.channel > 0) continue;
            const int count = t.rows / A::kPatchRows * static_cast<int>(t.patch_columns.divisor);
            for (int i = mine.member; i < count; i += mine.members) {
                const int patch_row = t.patch_columns.divide(i);
                const int patch_column = t.patch_columns.remainder(i, patch_row);
                const int row = place.row + patch_row * A::kPatchRows;
                const int column = place.column + patch_column * A::kPatchColumns;
                if (row >= p.height || column >= p.width) continue;
                demand(patch_row * input_step(p.mode, A::kPatchRows) +
                               input_extent(p.mode, p.kernel, A::kPatchRows) <=
                           t.in_rows,
                       "a patch reads below its tile");
                demand(patch_column * input_step(p.mode, A::kPatchColumns) + shift +
                               input_extent(p.mode, p.kernel, A::kPatchColumns) <=
                           t.pitch,
                       "a patch reads beside its tile");
                demand(first_input(p.mode, p.kernel, row, p.pad_rows) ==
                               first_input(p.mode, p.kernel, place.row, p.pad_rows) +
                                   patch_row * input_step(p.mode, A::kPatchRows) &&
                           first_input(p.mode, p.kernel, column, p.pad_columns) ==
                               first_column + patch_column * input_step(p.mode, A::kPatchColumns),
                       "a patch is not where its inputs are");
                for (int r = 0; r < A::kPatchRows; ++r)
                    for (int q = 0; q < A::kPatchColumns; ++q)
                        if (row + r >= 0 && row + r < p.height && column + q >= 0 && column + q < p.width)
                            ++written[static_cast<size_t>(row + r) * static_cast<size_t>(p.width) +
                                      static_cast<size_t>(column + q)];
                if (patch_column == 0) check_axis<A::kPatchRows>(p, row, p.pad_rows, p.height, p.in_height);
                if (patch_row == 0)
                    check_axis<A::kPatchColumns>(p, column, p.pad_columns, p.width, p.in_width);
            }
        }
    }
    const int of_sample = t.tiles() * static_cast<int>(t.groups.divisor);
    for (int i = 0; i < 3 * of_sample; i += larger(1, of_sample / 100)) {
        const BlockPlace block = block_place(t, i);
        demand(
            block.tile < t.tiles() && block.group < static_cast<int>(t.groups.divisor) &&
                (block.sample * static_cast<int>(t.groups.divisor) + block.group) * t.tiles() + block.tile ==
                    i,
            "a block has no place");
    }
    demand(1 << t.group_shift == t.group, "a group is not a power of two");
    for (const int count : patches) demand(count == 1, "two threads have the same place");
    for (const uint8_t count : written) demand(count == 1, "an output is not written once");
}

std::string message;

}  // namespace
}  // namespace dcd::cuda::dw

using namespace dcd::cuda::dw;

extern "C" {

// numbers: as in Problem. Null, or what is wrong.
const char* index_check(const int* n, int type, int last, int beside) {
    const Problem p{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
    try {
        if (type == kFloat)
            last ? check<float, true>(p, beside) : check<float, false>(p, beside);
        else
            last ? check<dcd::Half, true>(p, beside) : check<dcd::Half, false>(p, beside);
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

// Which divisors get a wrong quotient or remainder: of small numbers, of the largest, of those around
// multiples.
int64_t index_wrong_divisions(int divisor, int count) {
    int64_t wrong = 0;
    const Divider by(divisor);
    const auto check = [&](int64_t n) {
        if (n < 0 || n > 0x7fffffff) return;
        const int quotient = by.divide(static_cast<int>(n));
        wrong += quotient != n / divisor || by.remainder(static_cast<int>(n), quotient) != n % divisor;
    };
    for (int n = 0; n < count; ++n) check(n), check(int64_t{0x7fffffff} - n);
    const int64_t step = int64_t{divisor} * (0x7fffffff / divisor / 1000 + 1);
    for (int64_t n = divisor; n < 0x7fffffff; n += step) check(n - 1), check(n), check(n + 1);
    return wrong;
}

// Whether the parts of [0, count) follow one another and differ by one at most.
int index_parts_are_even(int64_t count, int parts) {
    int64_t next = 0;
    for (int i = 0; i < parts; ++i) {
        const Range range = part_of(count, parts, i);
        const int64_t size = range.end - range.begin;
        if (range.begin != next || size < count / parts || size > count / parts + 1) return 0;
        next = range.end;
    }
    return next == count;
}
}
