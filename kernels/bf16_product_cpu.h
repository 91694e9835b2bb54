// Blocked products of bf16 matrices with fp32 sums: what product_cpu.cpp and lm_head_cpu.cpp share.
//
// Blocked as fast products are: a panel of B (64 columns, at most KC deep), or a few of them side by side, stays in the
// second-level cache while blocks of A pass by, and the sums of a block stay near. How many rows a block has, how A is
// packed for it and how it is computed is an engine's: Vectors (6 rows) or Tiles (32). A word holds two
// neighbours in k. What is less usual: whatever comes next (rows of A, the next panel of B) is fetched by a few
// prefetches in each of the innermost steps, as without them, or by a burst of them, several percent are lost; A is
// packed on the way through the first panel; the last panels are cut into ranges of rows where threads then wait for
// each other, so that all end together; and what becomes of a block of sums is a parameter, so that more can be done
// with it while it is near: in registers, or in the first-level cache.
//
// No sum depends on the number of threads.

#pragma once

#include "bf16_cpu.h"
#include "bf16_tiles_cpu.h"
#include "bf16_vectors_cpu.h"

namespace prefkern {

// What multiplies: 1 vectors, 2 tiles; 0 before anybody has asked what there is, or where there is neither.
inline int engine __attribute__((visibility("hidden"))) = 0;

}  // namespace prefkern

#ifdef TILES
#define BY_ENGINE(FUNCTION, ...) (prefkern::engine == 2 ? FUNCTION<Tiles>(__VA_ARGS__) : FUNCTION<Vectors>(__VA_ARGS__))
#else
#define BY_ENGINE(FUNCTION, ...) FUNCTION<Vectors>(__VA_ARGS__)
#endif

namespace {

constexpr long KC = 1152;                // the deepest panel
constexpr long A_WORDS = long(4) << 20;  // of A at a time, about

// A panel of B becomes words in an engine's order, 0 beyond the matrix. It is packed in chunks of 1 KiB: 16 columns, 32
// deep, where B is transposed, and else 64 columns, 8 deep.
template <class Engine>
struct Panel {
    Matrix b;
    long column, k, columns, depth;  // where it begins, and what there is of it

    long chunks() const { return (depth + 31) / 32 * 4; }

    // Several side by side are packed, and fetched, part by part.
    long parts() const { return (columns + NR - 1) / NR; }
    Panel part(long i) const { return {b, column + i * NR, k, std::min(NR, columns - i * NR), depth}; }

    ISA void fetch(long chunk) const {
        if (b.transposed) {
            const long begin = chunk % 4 * 16, end = std::min(begin + 16, columns);
            for (long i = begin; i < end; i++) prefetch(b.data + (column + i) * b.stride + k + chunk / 4 * 32);
        } else {
            for (long q = chunk * 8; q < std::min(chunk * 8 + 8, depth); q++)
                for (long i = 0; i < NR; i += 32) prefetch(b.data + (k + q) * b.stride + column + i);
        }
    }

    ISA void pack(long chunk, uint32_t* out) const { b.transposed ? pack_columns(chunk, out) : pack_lines(chunk, out); }

    ISA void pack_columns(long chunk, uint32_t* out) const {
        const long j = chunk % 4 * 16, q = chunk / 4 * 32;
        const uint16_t* from = b.data + (column + j) * b.stride + k + q;
        __m512i r[16];
        if (columns - j >= 16 && depth - q >= 32) {
            UNROLL
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * b.stride);
        } else {
            UNROLL
            for (int i = 0; i < 16; i++)
                r[i] = j + i < columns ? _mm512_maskz_loadu_epi16(first(depth - q), from + i * b.stride)
                                       : _mm512_setzero_si512();
        }
        transpose(r);
        UNROLL
        for (int i = 0; i < 16; i++) _mm512_store_si512(out + Engine::in_panel(q / 2, j) + i * Engine::PAIR, r[i]);
    }

    ISA void pack_lines(long chunk, uint32_t* out) const {
        constexpr long NEIGHBOUR = Engine::in_panel(0, 16);
        for (long q = chunk * 8; q < chunk * 8 + 8; q += 2)
            for (int j = 0; j < NR; j += 32) {
                const uint16_t* from = b.data + (k + q) * b.stride + column + j;
                const __mmask32 there = first(columns - j);
                const __m512i even = _mm512_maskz_loadu_epi16(q < depth ? there : 0, from);
                const __m512i odd = _mm512_maskz_loadu_epi16(q + 1 < depth ? there : 0, from + b.stride);
                pair_lines(even, odd, out + Engine::in_panel(q / 2, j), NEIGHBOUR);
            }
    }
};

struct Task {
    long column, block, blocks;  // of a panel of B, and a range of blocks of A
};

// Blocks of rows of A, packed.
template <class Engine>
struct Rows {
    static constexpr long MR = Engine::MR;
    long rows, depth, blocks, apart;  // apart: words between two blocks

    Rows(long rows, long depth) : rows(rows), depth(depth), blocks((rows + MR - 1) / MR) {
        apart = (Engine::words(depth) + 15) / 16 * 16 + 16;  // 64 bytes more: else blocks meet in the same cache sets
    }

    long words() const { return (blocks * apart + 1023) / 1024 * 1024; }
};

// A B, each block of which goes to `output`.
template <class Engine, class Output>
struct Product {
    static constexpr long MR = Engine::MR, STRIP = Engine::STRIP, PANELS = Engine::PANELS;
    static_assert((PANELS & (PANELS - 1)) == 0, "as many are halved until they are few enough");
    Matrix a;  // data null: packed before
    Matrix b;
    Output output;
    Rows<Engine> of_a;
    long columns, depth;
    int threads;

    long blocks, apart, piece, width, side, panels, ours, whole, ranges, tasks, panel_words, own_words;
    uint32_t *packed_a, *own;
    std::atomic<long> next{0};

    // is_last: whether threads wait for each other at the end, rather than begin with something else.
    Product(Matrix a, Matrix b, const Output& output, long rows, long columns, long depth, int threads,
            bool is_last = true)
        : a(a), b(b), output(output), of_a(rows, depth), columns(columns), depth(depth), threads(threads) {
        blocks = of_a.blocks, apart = of_a.apart;
        const long pieces = std::max(1L, (depth + KC - 1) / KC);
        piece = std::max(32L, (depth + pieces * 32 - 1) / (pieces * 32) * 32);
        // Columns of a panel, or of several side by side if that leaves enough for all threads. No sum depends on it.
        width = PANELS * NR;
        while (width > NR && columns < 4 * threads * width) width /= 2;
        panels = (columns + width - 1) / width, side = width / NR;
        // While A is not packed, the first panel is everybody's: each thread takes a range of rows, and packs them for
        // all on the way. Then panels one by one, and the last in ranges of rows, for each of which they are packed
        // again: not where threads go on with something else, if there are panels enough for all.
        ours = a.data ? 1 : 0;
        const bool goes_on = !is_last && panels - ours >= 4 * threads;
        whole = threads == 1 || goes_on ? panels - ours : std::max(0L, (panels - ours) / threads - 1) * threads;
        ranges = std::min(Engine::RANGES, std::max(1L, blocks / Engine::LEAST));
        tasks = whole + (panels - ours - whole) * ranges;
        panel_words = (std::min(depth, piece) + 31) / 32 * 16 * NR;
        own_words = side * (2 * panel_words + (depth > piece ? blocks * MR * NR : 0));
    }

    // Of one thread's panels and sums.
    long words() const { return own_words; }

    // packed: A, or room for it; own: room for all threads' panels and sums, `words` for each.
    void place(uint32_t* packed, uint32_t* own, long words) { packed_a = packed, this->own = own, own_words = words; }

    void run() {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
    }

    Task claim() {
        const long task = next++;
        if (task >= tasks) return {-1, 0, 0};
        if (task < whole) return {(ours + task) * width, 0, blocks};
        const long range = (task - whole) % ranges, begin = blocks * range / ranges;
        return {(ours + whole + (task - whole) / ranges) * width, begin, blocks * (range + 1) / ranges - begin};
    }

    Panel<Engine> panel(Task task, long k) const {
        return {b, task.column, k, std::min(width, columns - task.column), std::min(piece, depth - k)};
    }

    // What one thread of a team does.
    ISA void work(long thread, long team) {
        uint32_t* this_panel = own + thread * own_words;
        uint32_t* next_panel = this_panel + side * panel_words;
        float* const partial = (float*)(this_panel + 2 * side * panel_words);  // of a task, over the k so far
        alignas(64) float at_last[PANELS > 1 ? PANELS * MR * NR : 1];          // of blocks side by side, over all k
        const long unit = a.transposed ? STRIP : 1, units = (blocks + unit - 1) / unit;
        const long from = std::min(blocks, units * thread / team * unit);
        bool is_first = a.data;  // panel, on whose way A is packed
        Task task = is_first ? Task{0, from, std::min(blocks, units * (thread + 1) / team * unit) - from} : claim();
        if (task.column < 0) return;
        Engine::begin();
        long k = 0;
        Panel<Engine> here = panel(task, 0);
        for (long p = 0; p < here.parts(); p++) {
            const Panel<Engine> part = here.part(p);
            for (long i = 0; i < part.chunks(); i++) {
                if (i + 8 < part.chunks()) part.fetch(i + 8);
                part.pack(i, this_panel + p * panel_words);
            }
        }
        while (task.column >= 0) {
            const bool is_last = k + piece >= depth;
            const Task then = is_last ? claim() : task;
            const long then_k = is_last ? 0 : k + piece;
            const Panel<Engine> there = then.column >= 0 ? panel(then, then_k) : Panel<Engine>{};
            const bool is_new = then.column >= 0 && (there.column != here.column || there.k != here.k);
            // The next panel is fetched by the last kernels: some lines of k each. Where its chunks are lines, each
            // kernel's are packed at once, in memory of their own, before they leave the cache again.
            const long fetched = Engine::fetched(here.depth);
            const long chunks = is_new ? there.chunks() : 0, kernels = (there.depth + fetched - 1) / fetched,
                       end = task.block + task.blocks, parts = PANELS == 1 ? 1 : here.parts(),
                       parts_there = PANELS == 1 ? 1 : there.parts();
            uint32_t* const room = b.transposed ? this_panel : next_panel;
            const auto pack_until = [&](long& packed, long until) {
                for (; packed < until; packed++)
                    for (long p = 0; p < parts_there; p++) there.part(p).pack(packed, room + p * panel_words);
            };
            long packed = 0;
            for (long i = task.block; i < end; i++) {
                const long q = (kernels - end + i) * fetched;  // the lines that block i fetches
                const bool fetches = is_new && q >= 0;
                typename Engine::Kernel at[PANELS];
                for (long p = 0; p < parts; p++) {
                    Fetch fetch{(const uint16_t*)this_panel, 0, FOREVER, 0, 32};  // nothing that is not there
                    if (is_first) {
                        if (p == 0) pack_first(i, end, k, here.depth);
                        fetch_first(i, end, k, here.depth, p, parts, fetch);
                    }
                    if (!is_first && fetches && p < parts_there) {
                        const long column = there.column + p * NR, line = there.k + q;
                        fetch = {b.data + (b.transposed ? column * b.stride + line : line * b.stride + column),
                                 b.stride, b.transposed ? NR : FOREVER, 64, 32};
                    }
                    float* const sums = partial + (i * side + p) * MR * NR;
                    at[p] = {{packed_a + i * apart + k / 2 * MR, this_panel + p * panel_words, (here.depth + 1) / 2,
                              i + 1 < end && !(PANELS > 1 && is_first) ? apart : 0, fetch, k > 0 ? sums : nullptr,
                              is_last ? at_last + p * MR * NR : sums}};
                }
                if constexpr (PANELS > 1) {
                    // What goes on is changed on the way: that of the next block is fetched.
                    const long rows = std::min(MR, of_a.rows - i * MR);
                    Engine::compute(at, parts,
                                    is_last ? output.template lines<Engine>(i, rows, here.column, parts)
                                            : Lines{(char*)(at->sums + side * MR * NR), i + 1 < end ? 1 : 0,
                                                    parts * MR * NR / 16, 0});
                }
                for (long p = 0; p < parts; p++) {
                    const long column = here.column + p * NR;
                    if (is_last)
                        output.block(at[p], i, std::min(MR, of_a.rows - i * MR), column,
                                     std::min(NR, columns - column));
                    else if constexpr (PANELS == 1)
                        at[p].run(Partial{at[p].sums});
                }
                if (!is_first && fetches && !b.transposed) pack_until(packed, std::min(chunks, (q + fetched) / 8));
            }
            pack_until(packed, chunks);
            if (is_new && room == next_panel) std::swap(this_panel, next_panel);
            if (is_first && is_last) {
#pragma omp barrier
                is_first = false;
            }
            task = then, k = then_k, here = there;
        }
        Engine::end();
    }

    // A from line k on, of its rows' elements or of its columns'.
    Matrix from(long k) const { return {a.data + (a.transposed ? k * a.stride : k), a.stride, a.transposed}; }

    // Packs block i of A, or its strip.
    ISA void pack_first(long i, long end, long k, long piece_depth) {
        const Matrix from = this->from(k);
        uint32_t* const to = packed_a + i * apart + k / 2 * MR;
        const long row = i * MR, rows = of_a.rows;
        if (!a.transposed) {
            Engine::pack_block(from, row, std::min(MR, rows - row), piece_depth, to);
        } else if (i % STRIP == 0 && (i + STRIP) * MR <= rows) {
            Engine::pack_strip(from, row, piece_depth, apart, to);
        } else if (i % STRIP == 0) {
            for (long j = i; j < end; j++)
                Engine::pack_block(from, j * MR, std::min(MR, rows - j * MR), piece_depth, to + (j - i) * apart);
        }
    }

    // Lets one of the parts of block i fetch its share of what is packed after it.
    ISA void fetch_first(long i, long end, long k, long piece_depth, long part, long parts, Fetch& fetch) const {
        const Matrix from = this->from(k);
        const long in_strip = i % STRIP, ahead = i - in_strip + STRIP;
        if (!a.transposed && i + 1 < end)
            fetch = {from.data + ((i + 1) * MR + MR * part / parts) * a.stride, 96, 11, a.stride, 64};
        else if (a.transposed && ahead < end)
            fetch = {from.data + ahead * MR +
                         ((piece_depth + STRIP - 1) / STRIP * in_strip + piece_depth * part / parts) * a.stride,
                     a.stride, FOREVER, 0, 64};
    }
};

// Rows of a block in a matrix, and as many columns as blocks side by side have.
template <class Engine, class T>
Lines lines_of(T* to, long stride, long block, long rows, long column, long count) {
    return {(char*)(to + block * Engine::MR * stride + column), rows, count * NR * long(sizeof(T)) / 64,
            stride * long(sizeof(T))};
}

// To bf16, rounded once.
struct Written {
    static constexpr long OF_ROW = NR * sizeof(uint16_t) / 64;
    uint16_t* out;
    long stride;

    MEMBER void fetch(long line) const { prefetch_line(out, stride, line); }

    template <class Engine>
    Lines lines(long block, long rows, long column, long count) const {
        return lines_of<Engine>(out, stride, block, rows, column, count);
    }

    template <long ROWS>
    ISA MEMBER void take(const __m512 (&sums)[ROWS][4], long row) const {
        UNROLL
        for (int i = 0; i < ROWS; i++) UNROLL
        for (int j = 0; j < 4; j += 2)
            _mm512_storeu_si512(out + (row + i) * stride + 16 * j,
                                (__m512i)_mm512_cvtne2ps_pbh(sums[i][j + 1], sums[i][j]));
    }

    template <class Kernel>
    ISA MEMBER void block(const Kernel& kernel, long block, long rows, long column, long columns) const {
        constexpr long MR = Kernel::Engine::MR;
        uint16_t* const to = out + block * MR * stride + column;
        if (rows == MR && columns == NR) return kernel.run(Written{to, stride});
        alignas(64) uint16_t edge[MR * NR];
        kernel.run(Written{edge, NR});
        for (long y = 0; y < rows; y++) memcpy(to + y * stride, edge + y * NR, columns * sizeof(uint16_t));
    }
};

INLINE float factor(const float* of, long row) { return of ? of[row] : 1.0f; }

// total = keep total + gain sums, with factors for each row; a null is ones.
struct Blended {
    static constexpr long OF_ROW = NR * sizeof(float) / 64;
    float* total;
    long stride;
    const float *keep, *gain;

    MEMBER void fetch(long line) const { prefetch_line(total, stride, line); }

    template <class Engine>
    Lines lines(long block, long rows, long column, long count) const {
        return lines_of<Engine>(total, stride, block, rows, column, count);
    }

    template <long ROWS>
    ISA MEMBER void take(const __m512 (&sums)[ROWS][4], long row) const {
        UNROLL
        for (int i = 0; i < ROWS; i++) UNROLL
        for (int j = 0; j < 4; j++) {
            float* const to = total + (row + i) * stride + 16 * j;
            const __m512 more = _mm512_mul_ps(sums[i][j], _mm512_set1_ps(factor(gain, row + i)));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(factor(keep, row + i)), _mm512_loadu_ps(to), more));
        }
    }

    template <class Kernel>
    ISA MEMBER void block(const Kernel& kernel, long block, long rows, long column, long columns) const {
        constexpr long MR = Kernel::Engine::MR;
        const long row = block * MR;
        float* const to = total + row * stride + column;
        const float *of_keep = keep ? keep + row : nullptr, *of_gain = gain ? gain + row : nullptr;
        if (rows == MR && columns == NR) return kernel.run(Blended{to, stride, of_keep, of_gain});
        alignas(64) float edge[MR * NR];
        kernel.run(Partial{edge});
        for (long y = 0; y < rows; y++)
            for (long x = 0; x < columns; x++) {
                float& at = to[y * stride + x];
                at = factor(of_keep, y) * at + factor(of_gain, y) * edge[y * NR + x];
            }
    }
};

}  // namespace
