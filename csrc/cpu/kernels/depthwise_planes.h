// SPDX-License-Identifier: BSD-3-Clause
// Depthwise convolution with the lanes along the width.
#pragma once

#include "depthwise_filters.h"

namespace dcd::DCD_ISA {
namespace dw {

// A piece of a plane in working memory, with its zero padding and, for a stride over the width, one phase of
// the columns after another. Every tap of an output row is then a run of neighbouring elements, whatever the
// geometry: element x of output row y and tap t is at y * row_step() + offset(t) + x.
template <class S>
struct Window {
    using T = typename S::Scalar;
    static constexpr int W = S::kLanes;
    static constexpr int64_t kColumns = 512;      // output columns of a window, at most
    static constexpr int64_t kBytes = 24 * 1024;  // half of the usual L1, unless one output row needs more
    static constexpr double kSparse = 64 * 1024;  // elements of a window that is always worth filling

    // The part of the output that a filling of the window serves, and where its input lies.
    struct Part {
        int64_t z, y, x, rows, columns;     // output slice, first row and column, counts
        int64_t count, row_begin, row_end;  // window columns; window rows that lie inside the input
    };
    struct Span {
        int64_t first, begin,
            end;  // element i of a phase is input column first + i * stride, inside for [begin, end)
    };

    const DepthwiseParams<T>& s;
    int64_t height, width;               // output rows and columns
    int64_t phases, pitch, line, lines;  // column phases, elements of one, of all; input rows
    int64_t band;                        // output rows that one call for a 3 x 3 kernel takes
    int64_t size;
    bool sparse;  // so much larger than what it serves that taps are better read where they are; size is 0

    explicit Window(const DepthwiseParams<T>& params) : s(params) {
        const int64_t reach = (s.kernel[1] - 1) * s.dilation[1] + 1;
        phases = least(s.kernel[2], s.stride[2] / gcd(s.stride[2], s.dilation[2]));
        width = share(s.out_size[2], kColumns);
        pitch = round_up(width + (s.kernel[2] - 1) * s.dilation[2] / s.stride[2], W);
        line = phases * pitch;
        // Far enough apart, taps make a line, and more so a window, of more elements than can be counted.
        const double slice_line = static_cast<double>(s.kernel[0]) * static_cast<double>(line);
        const int64_t fit = static_cast<int64_t>(static_cast<double>(kBytes / sizeof(T)) / slice_line);
        height = share(s.out_size[1], fit > reach ? (fit - reach) / s.stride[1] + 1 : 1);
        band = share(height, Shape<S>::kRows);
        lines = (height - 1) * s.stride[1] + reach;
        const double elements = slice_line * static_cast<double>(lines);
        const double served = static_cast<double>(s.kernel[0] * s.kernel[1] * s.kernel[2]) *
                              static_cast<double>(height * width);
        sparse = elements > kSparse && elements > 16 * served;
        // a vector may start on the last element
        size = sparse ? 0 : round_up(s.kernel[0] * lines * line + W, 64);
    }
    bool whole_plane() const { return height >= s.out_size[1] && width >= s.out_size[2]; }
    void offsets(int64_t* offset /* [taps] */) const {
        for (int64_t kz = 0; kz < s.kernel[0]; ++kz)
            for (int64_t ky = 0; ky < s.kernel[1]; ++ky)
                for (int64_t kx = 0; kx < s.kernel[2]; ++kx)
                    *offset++ = (kz * lines + ky * s.dilation[1]) * line + kx % phases * pitch +
                                kx * s.dilation[2] / s.stride[2];
    }
    // f(part) for all parts of the output, spans being those of the part.
    template <class F>
    void for_parts(Span* spans /* [phases] */, const F& f) const {
        for (int64_t z = 0; z < s.out_size[0]; ++z)
            for (int64_t y = 0; y < s.out_size[1]; y += height)
                for (int64_t x = 0; x < s.out_size[2]; x += width) f(part(z, y, x, spans));
    }
    int64_t row_step() const { return s.stride[1] * line; }
    Part part(int64_t z, int64_t y, int64_t x, Span* spans /* [phases] */) const {
        Part part = {z, y, x, least(height, s.out_size[1] - y), least(width, s.out_size[2] - x), 0, 0, 0};
        const int64_t used = (part.rows - 1) * s.stride[1] + (s.kernel[1] - 1) * s.dilation[1] + 1;
        const int64_t row = y * s.stride[1] - s.padding[1], step = s.stride[2];
        part.row_begin = least(most(-row, 0), used);
        part.row_end = most(least(s.in_size[1] - row, used), part.row_begin);
        part.count = part.columns + (s.kernel[2] - 1) * s.dilation[2] / step;
        for (int64_t phase = 0; phase < phases; ++phase) {
            const int64_t first = x * step - s.padding[2] + phase * s.dilation[2] % step;
            const int64_t begin = least(first < 0 ? ceil_div(-first, step) : 0, part.count);
            const int64_t inside = first < s.in_size[2] ? (s.in_size[2] - 1 - first) / step + 1 : 0;
            spans[phase] = {first, begin, most(least(inside, part.count), begin)};
        }
        return part;
    }

    void fill(const Part& part, const Span* spans, const T* plane /* [D, H, W] */, T* out) const {
        const int64_t row = part.y * s.stride[1] - s.padding[1];
        const bool neighbours = unit(s.in_size[2], s.input_spatial[2]);
        for (int64_t kz = 0; kz < s.kernel[0]; ++kz, out += lines * line) {
            const int64_t z = part.z * s.stride[0] - s.padding[0] + kz * s.dilation[0];
            if (z < 0 || z >= s.in_size[0] || part.row_begin == part.row_end) {
                clear(out, lines * line);
                continue;
            }
            clear(out, part.row_begin * line);
            clear(out + part.row_end * line, (lines - part.row_end) * line);
            const T* from = plane + z * s.input_spatial[0] + (row + part.row_begin) * s.input_spatial[1];
            T* to = out + part.row_begin * line;
            if (neighbours && s.stride[2] == 1) {
                fill_rows<1>(part, spans[0], spans[0], from, to, to);
            } else if (neighbours && s.stride[2] == 2 && phases == 2) {
                // The phase that the first input column belongs to, then the other.
                const int64_t even = column(spans[0]) > column(spans[1]);
                fill_rows<2>(part, spans[even], spans[1 - even], from, to + even * pitch,
                             to + (1 - even) * pitch);
            } else {
                for (int64_t phase = 0; phase < phases; ++phase)
                    fill_rows<0>(part, spans[phase], spans[phase], from, to + phase * pitch, nullptr);
            }
        }
    }

  private:
    // The input column of the first element inside.
    int64_t column(const Span& span) const { return span.first + span.begin * s.stride[2]; }

    // The rows inside the input. STEP = 1: neighbouring elements, one phase; 2: two phases at once; 0: one
    // phase at any distance.
    template <int STEP>
    void fill_rows(const Part& part, const Span& one, const Span& two, const T* from, T* to,
                   T* to_two) const {
        // Copies of everything: a store of a vector may alias all that is in memory.
        const int64_t room = pitch, next = line, next_row = s.input_spatial[1], count = part.count;
        const int64_t rows = part.row_end - part.row_begin, begin = one.begin, begin_two = two.begin;
        const int64_t step = STEP == 0 ? s.stride[2] * s.input_spatial[2] : STEP;
        const int64_t n = one.end - begin;
        const int64_t elements = STEP == 2 ? most(2 * n - 1, 2 * (two.end - begin_two)) : n;
        const int64_t end = STEP == 0 ? n : ceil_div(most(elements, 0), most(step, 1) * W) * W;
        from += column(one) * (STEP == 0 ? s.input_spatial[2] : 1);
        if (STEP != 0 && end == W && most(begin, begin_two) <= W && least(begin, begin_two) + W >= count) {
            // Narrow rows, one vector each: most of the general loops' time would be branches.
            const typename S::Vec zero = pinned(S::zero());
            const int64_t in_one = least(W, room - begin), in_two = least(W, room - begin_two);
            for (int64_t j = 0; j < rows; ++j, from += next_row, to += next, to_two += next) {
                typename S::Vec x = load_up_to<S>(from, elements);
                S::store(to, zero);
                if constexpr (STEP == 2) {
                    const typename S::Vec behind = load_up_to<S>(from + W, elements - W);
                    S::store(to_two, zero);
                    store_up_to<S>(to_two + begin_two, every_second<S, 1>(x, behind), in_two);
                    x = every_second<S, 0>(x, behind);
                }
                store_up_to<S>(to + begin, x, in_one);
            }
            return;
        }
        for (int64_t j = 0; j < rows; ++j, from += next_row, to += next) {
            clear_around(to, begin, begin + end, count, room);
            if constexpr (STEP == 0) {
                for (int64_t i = 0; i < n; ++i) to[begin + i] = from[i * step];
            } else if constexpr (STEP == 1) {
                int64_t i = 0;
                for (; i + W <= n; i += W) S::store(to + begin + i, S::load(from + i));
                if (i < n) put(to, begin + i, S::load_first(from + i, static_cast<int>(n - i)), room);
            } else {
                clear_around(to_two, begin_two, begin_two + end, count, room);
                for (int64_t i = 0; i < end; i += W) {
                    const typename S::Vec a = load_up_to<S>(from + 2 * i, elements - 2 * i);
                    const typename S::Vec b = load_up_to<S>(from + 2 * i + W, elements - 2 * i - W);
                    put(to, begin + i, every_second<S, 0>(a, b), room);
                    put(to_two, begin_two + i, every_second<S, 1>(a, b), room);
                }
                to_two += next;
            }
        }
    }
    // As much of x as there is room for.
    static inline void put(T* to, int64_t i, typename S::Vec x, int64_t room) {
        if (i < room) store_up_to<S>(to + i, x, room - i);
    }
    static inline void clear_around(T* to, int64_t begin, int64_t end, int64_t count, int64_t room) {
        const typename S::Vec zero = pinned(S::zero());
        for (int64_t i = 0; i < begin; i += W) S::store(to + i, zero);
        for (int64_t i = end; i < count; i += W) put(to, i, zero, room);
    }
    static inline void clear(T* to, int64_t count) {
        const typename S::Vec zero = pinned(S::zero());
        for (; count > 0; count -= W, to += W)
            S::store(to, zero);  // count is a multiple of the pitch, so of W
    }
};

// Where rows of output go, and what is added on the way.
template <class T>
struct Target {
    T* out;  // rows of stride out_row
    int64_t out_row;
    const T* residual;  // the same, or null
    int64_t residual_row;
    T bias;
    Finish<T> how;
    Target at_row(int64_t y) const {
        return {out + y * out_row, out_row, shifted(residual, y * residual_row), residual_row, bias, how};
    }
};

// ROWS output rows of a 3 x 3 kernel with stride STEP and no dilation: each vector of the window, loaded
// once, serves every row that it meets.
template <class S, int ROWS, int STEP>
static void rows_3x3(const typename S::Scalar* window, int64_t pitch, const typename S::Scalar* w,
                     const Target<typename S::Scalar>& target, int64_t width) {
    using V = typename S::Vec;
    const Target<typename S::Scalar> to = target;  // a copy that the stores cannot change
    constexpr int W = S::kLanes;
    V taps[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) taps[t] = S::set1(w[t]);
    for (int64_t x = 0; x < width; x += W) {
        V sum[ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) sum[i] = S::set1(to.bias);
        const auto* from = window + x;
#pragma GCC unroll 17
        for (int j = 0; j < (ROWS - 1) * STEP + 3; ++j) {
            const V x0 = pinned(S::load(from)), x1 = pinned(S::load(from + (STEP == 1 ? 1 : pitch)));
            const V x2 = pinned(S::load(from + (STEP == 1 ? 2 : 1)));
            from = pinned(from + STEP * pitch);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                const int t = j - i * STEP;
                if (t < 0 || t > 2) continue;
                sum[i] = S::fma(taps[3 * t], x0, sum[i]);
                sum[i] = S::fma(taps[3 * t + 1], x1, sum[i]);
                sum[i] = S::fma(taps[3 * t + 2], x2, sum[i]);
            }
        }
        finish<S>(to.how, sum, to.out + x, to.out_row, shifted(to.residual, x), to.residual_row, width - x);
    }
}

// The numbers of rows that there are functions for.
template <class S>
static inline int64_t band_rows(int64_t rows) {
    if (Shape<S>::kRows == 8 && rows >= 7) return rows >= 8 ? 8 : 7;
    return rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

template <class S, int STEP>
static auto rows_3x3_of(int64_t rows) -> decltype(&rows_3x3<S, 1, STEP>) {
    if constexpr (Shape<S>::kRows == 8) {
        if (rows == 8) return &rows_3x3<S, 8, STEP>;
        if (rows == 7) return &rows_3x3<S, 7, STEP>;
    }
    if (rows == 4) return &rows_3x3<S, 4, STEP>;
    if (rows == 2) return &rows_3x3<S, 2, STEP>;
    return &rows_3x3<S, 1, STEP>;
}

// Any kernel: eight vectors of output at a time, wherever in the rows they are, so that short rows too keep
// the arithmetic units busy.
template <class S>
static void rows_any(const typename S::Scalar* window, int64_t row_step, const int64_t* offset,
                     const typename S::Scalar* w, int64_t taps, const Target<typename S::Scalar>& to,
                     int64_t height, int64_t width) {
    using T = typename S::Scalar;
    using V = typename S::Vec;
    constexpr int W = S::kLanes, N = 8;
    const int64_t end = ceil_div(width, W) * W;
    int64_t y = 0, x = 0;
    while (y < height) {
        const T* from[N];
        int64_t at_y[N], at_x[N];
        int used = 0;
        for (int i = 0; i < N; ++i) {
            if (y < height) {
                at_y[i] = y, at_x[i] = x, ++used;
                x += W;
                if (x == end) x = 0, ++y;
            } else {
                at_y[i] = at_y[i - 1], at_x[i] = at_x[i - 1];  // computed again, not stored
            }
            from[i] = window + at_y[i] * row_step + at_x[i];
        }
        V sum[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) sum[i] = S::set1(to.bias);
        for (int64_t t = 0; t < taps; ++t) {
            const V tap = S::set1(w[t]);
            const int64_t o = offset[t];
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) sum[i] = S::fma(tap, S::load(from[i] + o), sum[i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
            if (i < used) {
                V one[1] = {sum[i]};
                finish<S>(to.how, one, to.out + at_y[i] * to.out_row + at_x[i], 0,
                          shifted(to.residual, at_y[i] * to.residual_row + at_x[i]), 0, width - at_x[i]);
            }
    }
}

template <class T>
static void copy_rows(const T* from, int64_t from_row, int64_t from_column, T* to, int64_t to_row,
                      int64_t to_column, int64_t rows, int64_t columns) {
    for (int64_t y = 0; y < rows; ++y)
        for (int64_t x = 0; x < columns; ++x)
            to[y * to_row + x * to_column] = from[y * from_row + x * from_column];
}

// Lanes along the width, one channel after another. Takes any strides: rows that are not contiguous are
// copied element by element.
template <class S>
static void planes(const Conv<typename S::Scalar>& s, const Runtime& runtime) {
    using T = typename S::Scalar;
    using Windows = Window<S>;
    const Windows window(s);
    const int64_t taps = s.taps(), m = s.multiplier, pitch = round_up(window.width, S::kLanes);
    bool nine = s.kernel[0] == 1 && s.stride[1] == s.stride[2] && s.stride[1] <= 2;
    for (int i = 1; i < 3; ++i) nine = nine && s.kernel[i] == 3 && s.dilation[i] == 1;
    const bool direct = unit(s.out_size[2], s.output_spatial[2]);
    const bool direct_residual = unit(s.out_size[2], s.residual_spatial[2]);
    // Small planes in groups: a load that meets several recent, narrower stores waits until they have left
    // the store buffer, which the copies of the rest of the group give them time for.
    const int64_t size = window.size * static_cast<int64_t>(sizeof(T));
    const int64_t group = window.whole_plane() ? most(1, least(16, 16 * 1024 / size)) : 1;
    const int64_t parts = task_share(runtime, s.batch, s.channels);
    parallel(runtime, s.batch * parts, [&](int64_t task) {
        const int64_t n = task / parts, c0 = task % parts * s.channels / parts;
        const int64_t c1 = (task % parts + 1) * s.channels / parts;
        Filters<S> filters(s);
        const int64_t weights_row = filters.pitch();
        Pieces<char> pieces(static_cast<char*>(scratch(
            filters.scratch_size() + bytes<int64_t>(taps) + bytes<typename Windows::Span>(window.phases) +
            bytes<T>(group * m * weights_row) + group * size + 2 * bytes<T>(window.height * pitch))));
        filters.open(n, pieces);
        int64_t* offset = take<int64_t>(pieces, taps);
        auto* spans = take<typename Windows::Span>(pieces, window.phases);
        T* weights = take<T>(pieces, group * m * weights_row);
        T* memory = take<T>(pieces, group * window.size);
        T* staged = take<T>(pieces, window.height * pitch);
        T* staged_residual = take<T>(pieces, window.height * pitch);
        window.offsets(offset);

        // Output channel o of a part that has been filled in.
        const auto compute = [&](const typename Windows::Part& part, const T* from, const T* w, int64_t o) {
            T* out = s.output + n * s.output_sample + o * s.output_channel + part.z * s.output_spatial[0] +
                     part.y * s.output_spatial[1] + part.x * s.output_spatial[2];
            const T* residual = shifted(
                s.residual, n * s.residual_sample + o * s.residual_channel + part.z * s.residual_spatial[0] +
                                part.y * s.residual_spatial[1] + part.x * s.residual_spatial[2]);
            Target<T> to = {direct ? out : staged,
                            direct ? s.output_spatial[1] : pitch,
                            residual,
                            s.residual_spatial[1],
                            s.bias ? s.bias[n * s.bias_sample + o] : T(0),
                            Finish<T>(s.activation, residual)};
            if (residual && !direct_residual) {
                copy_rows(residual, s.residual_spatial[1], s.residual_spatial[2], staged_residual, pitch, 1,
                          part.rows, part.columns);
                to.residual = staged_residual, to.residual_row = pitch;
            }
            if (nine)
                for (int64_t y = 0, rows; y < part.rows; y += rows) {
                    rows = band_rows<S>(least(window.band, part.rows - y));
                    const auto run = s.stride[1] == 1 ? rows_3x3_of<S, 1>(rows) : rows_3x3_of<S, 2>(rows);
                    run(from + y * window.row_step(), window.pitch, w, to.at_row(y), part.columns);
                }
            else
                rows_any<S>(from, window.row_step(), offset, w, taps, to, part.rows, part.columns);
            if (!direct)
                copy_rows(staged, pitch, 1, out, s.output_spatial[1], s.output_spatial[2], part.rows,
                          part.columns);
        };

        for (int64_t g0 = c0; g0 < c1; g0 += group) {
            const int64_t g1 = least(g0 + group, c1);
            for (int64_t o = g0 * m; o < g1 * m; ++o)
                filters.channel(o, weights + (o - g0 * m) * weights_row);
            window.for_parts(spans, [&](const typename Windows::Part& part) {
                for (int64_t c = g0; c < g1; ++c)
                    window.fill(part, spans, s.input + n * s.input_sample + c * s.input_channel,
                                memory + (c - g0) * window.size);
                for (int64_t c = g0, i = 0; c < g1; ++c)
                    for (int64_t k = 0; k < m; ++k, ++i)
                        compute(part, memory + (c - g0) * window.size, weights + i * weights_row, g0 * m + i);
            });
        }
    });
}

}  // namespace dw
}  // namespace dcd::DCD_ISA
