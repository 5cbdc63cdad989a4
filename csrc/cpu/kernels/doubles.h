// SPDX-License-Identifier: BSD-3-Clause
// Small algebra in double: rows that are padded with zeros to whole vectors.
#pragma once

#include <cstdint>
#include <cstring>

namespace dcd::DCD_ISA {

// As many doubles as a register of this instruction set holds; one for compilers without vector types.
struct Doubles {
#if defined(__GNUC__) && defined(__AVX512F__)
    typedef double Data __attribute__((vector_size(64)));
#elif defined(__GNUC__) && defined(__AVX2__)
    typedef double Data __attribute__((vector_size(32)));
#elif defined(__GNUC__)
    typedef double Data __attribute__((vector_size(16)));
#else
    typedef double Data;
#endif
    static constexpr int64_t kLanes = sizeof(Data) / sizeof(double);
    Data v;

    static inline Doubles zero() { return {Data{}}; }
    static inline Doubles all(double x) { return {x - Data{}}; }
    static inline Doubles load(const double* p) {
        Doubles r;
        std::memcpy(&r.v, p, sizeof(Data));
        return r;
    }
    inline void store(double* p) const { std::memcpy(p, &v, sizeof(Data)); }
    inline double sum() const {
        double lanes[kLanes];
        store(lanes);
        double s = 0;
        for (int64_t i = 0; i < kLanes; ++i) s += lanes[i];
        return s;
    }
};
static inline Doubles operator+(Doubles a, Doubles b) {
    return {a.v + b.v};
}
static inline Doubles operator*(Doubles a, Doubles b) {
    return {a.v * b.v};
}

// Elements of a row of `count`: whole vectors of every instruction set.
static inline int64_t padded_row(int64_t count) {
    return (count + 7) / 8 * 8;
}

template <class T>
static inline void widen(const T* from, int64_t count, int64_t width, double* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    for (int64_t i = count; i < width; ++i) to[i] = 0;
}

template <class T>
static inline void narrow(const double* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

static inline double dot(const double* a, const double* b, int64_t width) {
    Doubles sum = Doubles::zero();
    for (int64_t j = 0; j < width; j += Doubles::kLanes)
        sum = sum + Doubles::load(a + j) * Doubles::load(b + j);
    return sum.sum();
}

// to += a from
static inline void add_multiple(double a, const double* from, int64_t width, double* to) {
    const Doubles factor = Doubles::all(a);
    for (int64_t j = 0; j < width; j += Doubles::kLanes)
        (Doubles::load(to + j) + factor * Doubles::load(from + j)).store(to + j);
}

template <int ROWS, int VECTORS>
static inline void product_tile(const double* a, int64_t a_row, int64_t a_k, const double* b, int64_t k,
                                double* c, int64_t width) {
    Doubles sums[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = Doubles::zero();
    for (int64_t i = 0; i < k; ++i) {
        Doubles x[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) x[v] = Doubles::load(b + i * width + v * Doubles::kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const Doubles w = Doubles::all(a[r * a_row + i * a_k]);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = sums[r][v] + w * x[v];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) sums[r][v].store(c + r * width + v * Doubles::kLanes);
}

template <int ROWS>
static inline void product_rows(const double* a, int64_t a_row, int64_t a_k, const double* b, int64_t k,
                                double* c, int64_t width) {
    constexpr int64_t kLanes = Doubles::kLanes;
    int64_t j = 0;
    for (; j + 3 * kLanes <= width; j += 3 * kLanes)
        product_tile<ROWS, 3>(a, a_row, a_k, b + j, k, c + j, width);
    for (; j < width; j += kLanes) product_tile<ROWS, 1>(a, a_row, a_k, b + j, k, c + j, width);
}

// c = a b with b [k, width], c [rows, width]; a's strides are free.
static void product(const double* a, int64_t a_row, int64_t a_k, const double* b, int64_t rows, int64_t k,
                    double* c, int64_t width) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) product_rows<4>(a + i * a_row, a_row, a_k, b, k, c + i * width, width);
    for (; i < rows; ++i) product_rows<1>(a + i * a_row, a_row, a_k, b, k, c + i * width, width);
}

}  // namespace dcd::DCD_ISA
