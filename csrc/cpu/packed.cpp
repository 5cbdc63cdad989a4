// SPDX-License-Identifier: BSD-3-Clause
#include "packed.h"

#include <algorithm>

namespace dcd {
namespace {

int64_t panels_of(int64_t channels) {
    return (channels + kPanel - 1) / kPanel;
}

// [channels, row] to [panels, row, 16]
template <class T>
void to_panels(const T* from, int64_t channels, int64_t row, T* to) {
    for (int64_t o0 = 0; o0 < channels; o0 += kPanel) {
        const int64_t lanes = std::min(kPanel, channels - o0);
        for (int64_t k = 0; k < row; ++k, to += kPanel) {
            for (int64_t o = 0; o < lanes; ++o) to[o] = from[(o0 + o) * row + k];
            std::fill(to + lanes, to + kPanel, T(0));
        }
    }
}

}  // namespace

PackedParts packed_parts(int64_t in_channels, int64_t out_channels, int64_t latent) {
    PackedParts parts;
    parts.weight = 0;
    parts.p = panels_of(out_channels) * in_channels * kPanel;
    parts.q = parts.p + panels_of(out_channels) * latent * kPanel;
    parts.q_row = panels_of(latent) * kPanel;
    parts.size = parts.q + in_channels * parts.q_row;
    return parts;
}

template <class T>
void pack(const PackParams<T>& s) {
    const PackedParts parts = packed_parts(s.in_channels, s.out_channels, s.latent);
    to_panels(s.weight, s.out_channels, s.in_channels, s.packed + parts.weight);
    if (!s.latent) return;
    to_panels(s.p, s.out_channels, s.latent, s.packed + parts.p);
    T* q = s.packed + parts.q;
    for (int64_t i = 0; i < s.in_channels; ++i, q += parts.q_row) {
        std::copy(s.q + i * s.latent, s.q + (i + 1) * s.latent, q);
        std::fill(q + s.latent, q + parts.q_row, T(0));
    }
}

template void pack(const PackParams<float>&);
template void pack(const PackParams<double>&);

}  // namespace dcd
