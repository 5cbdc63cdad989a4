// SPDX-License-Identifier: BSD-3-Clause
// A tile of an image in shared memory, zeros outside of the image, and the weights of one sample on chip.
#pragma once

#include "depthwise.h"

namespace dcd::cuda::dw {

template <class T, bool LAST, int VECTOR>
DCD_BODY void copy_piece(const Image& image, const T* sample, int channels, int channel, int row, int column,
                         T* to) {
    const bool inside = row >= 0 && row < image.height;
    const int begin = LAST ? channel : column, end = LAST ? channels : image.width;
    const bool on = inside && (LAST ? column >= 0 && column < image.width : channel < channels);
    const int64_t offset =
        int64_t{channel} * image.channel + int64_t{row} * image.row + int64_t{column} * image.column;
    if (on && begin >= 0 && begin + VECTOR <= end) {
        copy_to_shared<VECTOR* static_cast<int>(sizeof(T))>(to, sample + offset);
        return;
    }
    const int step = LAST ? image.channel : image.column;
    // kept rolled: few pieces lie on an edge
    DCD_UNROLL_BY(1)
    for (int i = 0; i < VECTOR; ++i) {
        T value{};
        if (on && begin + i >= 0 && begin + i < end) value = read_global(sample + offset + int64_t{i} * step);
        to[i] = value;
    }
}

template <class T, bool LAST, int VECTOR>
DCD_BODY void copy_pieces(const Tiling& t, const Image& image, int64_t n, int channels, int first_channel,
                          int first_row, int first_column, int thread, T* tile) {
    const T* sample = static_cast<const T*>(image.data) + n * image.sample;
    const int shift = alignment_shift<LAST>(t, first_column), count = pieces(t, VECTOR);
    // only those that pass registers have to be on their way together
    [[maybe_unused]] constexpr int at_once = VECTOR * sizeof(T) < 4 ? 4 : 1;
    DCD_UNROLL_BY(at_once)
    for (int i = thread; i < count; i += kThreads) {
        const Piece at = piece<T, LAST>(t, i, shift, VECTOR);
        copy_piece<T, LAST, VECTOR>(image, sample, channels, first_channel + at.channel, first_row + at.row,
                                    first_column + at.column, tile + at.target);
    }
}

// Starts the copy of all inputs from (first_row, first_column) on.
template <class T, bool LAST>
DCD_BODY void load_tile(const Tiling& t, const Image& image, int64_t n, int channels, int first_channel,
                        int first_row, int first_column, int thread, T* tile) {
    constexpr int most = Arrangement<T, LAST>::kVector;
    if (t.vector == most)
        copy_pieces<T, LAST, most>(t, image, n, channels, first_channel, first_row, first_column, thread,
                                   tile);
    else if (most > 4 && t.vector == 4)
        copy_pieces<T, LAST, 4>(t, image, n, channels, first_channel, first_row, first_column, thread, tile);
    else if (t.vector == 2)
        copy_pieces<T, LAST, 2>(t, image, n, channels, first_channel, first_row, first_column, thread, tile);
    else
        copy_pieces<T, LAST, 1>(t, image, n, channels, first_channel, first_row, first_column, thread, tile);
}

// The CHANNELS elements of a thread at one place of a tile.
template <class T, int CHANNELS>
DCD_BODY void read_tile(const T* from, float (&value)[CHANNELS]) {
    const auto pack = *reinterpret_cast<const Pack<T, CHANNELS>*>(from);
    DCD_EACH (c, CHANNELS) value[c] = to_float(pack.value[c]);
}

// basis[a, t] = sum_b Phi_n[a, b] R[t, b], the same for all channels.
template <int TAPS>
DCD_BODY void form_basis(const Factors& f, int64_t n, int thread, float* basis /* [L_k, taps] */) {
    const int latent = f.latent;
    for (int i = thread; i < latent * TAPS; i += kThreads) {
        const int a = i / TAPS, t = i % TAPS;
        const int64_t row = (n * latent + a) * latent;
        float sum = 0;
        for (int b = 0; b < latent; ++b) sum += read(f.phi, row + b) * read(f.r, t * latent + b);
        basis[i] = sum;
    }
}

// weights[t, c] = W_n of the tile's channel c; zero behind the last channel.
template <int TAPS>
DCD_BODY void form_weights(const Factors& f, int64_t n, int channels, int first_channel, int group_shift,
                           const float* basis, int thread, float* weights /* [taps, group] */) {
    for (int i = thread; i < TAPS << group_shift; i += kThreads) {
        const int t = i >> group_shift, channel = first_channel + (i & ((1 << group_shift) - 1));
        const int tap = f.flip ? TAPS - 1 - t : t;
        float sum = 0;
        if (channel < channels) {
            sum = read(f.weight, int64_t{channel} * TAPS + tap);
            if (f.lam.data) sum *= read(f.lam, n * channels + channel);
            for (int a = 0; a < f.latent; ++a)
                sum += read(f.p, int64_t{channel} * f.latent + a) * basis[a * TAPS + tap];
        }
        weights[i] = sum;
    }
}

// Shared memory behind one another, each piece on a multiple of 16 bytes.
struct Shared {
    char* next;
    template <class T>
    DCD_BODY T* take(int count) {
        T* here = reinterpret_cast<T*>(next);
        next += shared_bytes(static_cast<int>(sizeof(T)) * count);
        return here;
    }
    DCD_INDEX static int shared_bytes(int bytes) { return round_up(bytes, 16); }
};

}  // namespace dcd::cuda::dw
