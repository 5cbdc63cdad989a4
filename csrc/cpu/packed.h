// SPDX-License-Identifier: BSD-3-Clause
// Packed weights: W0 and P in panels of 16 output channels, Q in padded rows. A panel holds the 16 weights of
// each input channel next to each other: maps in channels_last load them as lanes, contiguous ones broadcast
// them as rows, and W_n is synthesised in the same form.
#pragma once

#include <cstdint>

namespace dcd {

// Lanes of a panel: a line of memory in fp32, and a multiple of every instruction set's vector.
constexpr int64_t kPanel = 16;

// Where the parts begin, in elements. Lanes behind the last channel are zero.
struct PackedParts {
    int64_t weight;  // [panels of Co, Ci, 16]
    int64_t p;       // [panels of Co, L, 16]
    int64_t q;       // [Ci, q_row]
    int64_t q_row;   // L, padded to whole panels
    int64_t size;
};

PackedParts packed_parts(int64_t in_channels, int64_t out_channels, int64_t latent);

template <class T>
struct PackParams {
    int64_t in_channels, out_channels, latent;
    const T* weight;  // [Co, Ci]
    const T* p;       // [Co, L] or null
    const T* q;       // [Ci, L] or null
    T* packed;        // [packed_parts().size]
};

template <class T>
void pack(const PackParams<T>& s);

}  // namespace dcd
