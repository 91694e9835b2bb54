// Blocked products of bf16 matrices with fp32 sums, on x86 processors that multiply pairs of bf16 (AVX-512 BF16): what
// product_cpu.cpp and lm_head_cpu.cpp share.
//
// Blocked as fast products are: a panel of B (64 columns, at most KC deep) stays in the second-level cache while blocks
// of A (6 rows) pass by, and the 6 x 64 sums stay in 24 registers. A word holds two neighbours in k. What is less
// usual: whatever comes next (rows of A, the next panel of B) is fetched by a few prefetches in each of the innermost
// steps, as without them, or by a burst of them, several percent are lost; A is packed on the way through the first
// panel; the last panels are cut into ranges of rows where threads then wait for each other, so that all end together;
// and what becomes of a block of sums is a parameter, so that more can be done with it while it is in registers.
//
// No sum depends on the number of threads.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#define INLINE static inline __attribute__((always_inline))
#define MEMBER inline __attribute__((always_inline))
#define ISA __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prfchw")))
#define UNROLL _Pragma("GCC unroll 16")  // -O2 alone keeps arrays of registers in memory

extern "C" {
int omp_get_thread_num(void);
int omp_get_num_threads(void);

struct Matrix {
    const uint16_t* data;
    int64_t stride;      // elements from one line of memory to the next
    int64_t transposed;  // whether a line is a column
};
}

namespace prefkern {

// Memory of the calling thread, kept from call to call: fresh pages would cost a fault each.
struct Workspace {
    void* memory = nullptr;
    size_t bytes = 0;

    ~Workspace() { free(memory); }

    void* get(size_t wanted) {
        if (wanted > bytes) {
            free(memory);
            bytes = (wanted + 4095) / 4096 * 4096;
            memory = aligned_alloc(4096, bytes);
            if (!memory) bytes = 0;
        }
        return memory;
    }
};
inline thread_local Workspace workspace;

}  // namespace prefkern

namespace {

using prefkern::workspace;

constexpr long MR = 6, NR = 64;          // rows and columns of the innermost block
constexpr long KC = 1152;                // the deepest panel
constexpr long RANGES = 4;               // of rows, that each of the last panels is cut into
constexpr long STRIP = 16;               // blocks of A that are packed at once where A is transposed
constexpr long A_WORDS = long(4) << 20;  // of A at a time, about
constexpr long FOREVER = long(1) << 60;

// Not _mm_prefetch: GCC 12 takes a function of nothing else for one without effects, and drops its calls.
INLINE void prefetch(const void* line) { asm volatile("prefetcht0 %0" ::"m"(*(const char*)line)); }

INLINE __mmask32 first(long count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

// 16 x 16 words.
ISA static inline void transpose(__m512i* r) {
    __m512i t[16];
    UNROLL
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88), r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// 32 words, in order, of two lines.
ISA INLINE void pair_lines(__m512i even, __m512i odd, uint32_t* out) {
    const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    const __m512i x = _mm512_unpacklo_epi16(even, odd), y = _mm512_unpackhi_epi16(even, odd);
    _mm512_store_si512(out, _mm512_permutex2var_epi64(x, low, y));
    _mm512_store_si512(out + 16, _mm512_permutex2var_epi64(x, high, y));
}

// A panel of B becomes [depth / 2][64] words, 0 beyond the matrix. It is packed in chunks of 1 KiB: 16 columns, 32
// deep, where B is transposed, and else 64 columns, 8 deep.
struct Panel {
    Matrix b;
    long column, k, columns, depth;  // where it begins, and what there is of it

    long chunks() const { return (depth + 31) / 32 * 4; }

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
        for (int i = 0; i < 16; i++) _mm512_store_si512(out + (q / 2 + i) * NR + j, r[i]);
    }

    ISA void pack_lines(long chunk, uint32_t* out) const {
        for (long q = chunk * 8; q < chunk * 8 + 8; q += 2)
            for (int j = 0; j < NR; j += 32) {
                const uint16_t* from = b.data + (k + q) * b.stride + column + j;
                const __mmask32 there = first(columns - j);
                const __m512i even = _mm512_maskz_loadu_epi16(q < depth ? there : 0, from);
                const __m512i odd = _mm512_maskz_loadu_epi16(q + 1 < depth ? there : 0, from + b.stride);
                pair_lines(even, odd, out + q / 2 * NR + j);
            }
    }
};

// Where the words of 8 columns of a block of A come from: rows 0-3 of columns q and q + 4 lie in w01 (q = 0, 1) and
// w23, rows 4 and 5 in w45; `one` merges w01 and w45, `two` merges that and w23.
struct Order {
    alignas(64) int one[3][16], two[3][16];

    constexpr Order() : one(), two() {
        for (int word = 0; word < 48; word++) {
            const int column = word / 6, row = word % 6, q = column % 4, s = column / 4;
            const int upper = (q % 2 * 2 + s) * 4 + row, lower = 16 + (q / 2 * 2 + s) * 4 + q % 2 * 2 + row - 4;
            one[word / 16][word % 16] = row > 3 ? lower : upper;
            two[word / 16][word % 16] = row < 4 && q > 1 ? 16 + upper : word % 16;
        }
    }
};
constexpr Order ORDER;

// 6 rows of 16 words, stored transposed: 6 words for each of 16 columns.
ISA INLINE void pack_words(const __m512i* r, uint32_t* out) {
    __m512i t[4];
    UNROLL
    for (int i = 0; i < 2; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    const __m512i u0 = _mm512_unpacklo_epi64(t[0], t[2]), u1 = _mm512_unpackhi_epi64(t[0], t[2]);
    const __m512i u2 = _mm512_unpacklo_epi64(t[1], t[3]), u3 = _mm512_unpackhi_epi64(t[1], t[3]);
    const __m512i v0 = _mm512_unpacklo_epi32(r[4], r[5]), v1 = _mm512_unpackhi_epi32(r[4], r[5]);
    const __m512i w01[2] = {_mm512_shuffle_i32x4(u0, u1, 0x44), _mm512_shuffle_i32x4(u0, u1, 0xee)};
    const __m512i w23[2] = {_mm512_shuffle_i32x4(u2, u3, 0x44), _mm512_shuffle_i32x4(u2, u3, 0xee)};
    const __m512i w45[2] = {_mm512_shuffle_i32x4(v0, v1, 0x44), _mm512_shuffle_i32x4(v0, v1, 0xee)};
    UNROLL
    for (int half = 0; half < 2; half++) UNROLL
    for (int z = 0; z < 3; z++) {
        const __m512i one = _mm512_permutex2var_epi32(w01[half], _mm512_load_si512(ORDER.one[z]), w45[half]);
        const __m512i two = _mm512_permutex2var_epi32(one, _mm512_load_si512(ORDER.two[z]), w23[half]);
        _mm512_storeu_si512(out + 48 * half + 16 * z, two);
    }
}

// A block of A becomes [depth / 2][6] words, 0 beyond the matrix: `rows` rows from `row` on.
ISA static void pack_block(Matrix a, long row, long rows, long depth, uint32_t* out) {
    const uint16_t* from = a.data + (a.transposed ? row : row * a.stride);
    long k2 = 0;
    if (rows == MR && !a.transposed)
        for (; k2 + 16 <= depth / 2; k2 += 16) {
            __m512i r[MR];
            UNROLL
            for (int i = 0; i < MR; i++) r[i] = _mm512_loadu_si512(from + i * a.stride + 2 * k2);
            pack_words(r, out + k2 * MR);
        }
    const long along = a.transposed ? a.stride : 1, down = a.transposed ? 1 : a.stride;
    for (; 2 * k2 < depth; k2++)
        for (long i = 0; i < MR; i++) {
            const uint16_t* pair = from + i * down + 2 * k2 * along;
            const uint32_t low = i < rows ? pair[0] : 0, high = i < rows && 2 * k2 + 1 < depth ? pair[along] : 0;
            out[k2 * MR + i] = low | high << 16;
        }
}

// STRIP whole blocks of a transposed A at once, 96 of its rows: whole cache lines. `apart`: words between two blocks.
ISA static void pack_strip(Matrix a, long row, long depth, long apart, uint32_t* out) {
    for (long k2 = 0; 2 * k2 < depth; k2++) {
        const uint16_t *even = a.data + row + 2 * k2 * a.stride, *odd = even + a.stride;
        for (int ahead = 16; ahead < 18; ahead++)
            for (int i = 0; i < STRIP * MR; i += 32) prefetch(even + ahead * a.stride + i);
        for (int block = 0; block < STRIP; block++) {
            // 8 elements are read for 6; the last block's end where the strip does.
            const bool last = block == STRIP - 1;
            const long offset = MR * block - (last ? 2 : 0);
            __m128i x = _mm_loadu_si128((const __m128i*)(even + offset));
            __m128i y = _mm_maskz_loadu_epi16(2 * k2 + 1 < depth ? 0xff : 0, odd + offset);
            if (last) x = _mm_bsrli_si128(x, 4), y = _mm_bsrli_si128(y, 4);
            uint32_t* to = out + block * apart + k2 * MR;
            _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi16(x, y));
            _mm_storel_epi64((__m128i*)(to + 4), _mm_unpackhi_epi16(x, y));
        }
    }
}

// What the innermost steps fetch on the side: each the lines at `from`, 32 elements on, and `third` elements on; then
// `step` elements further, and after `run` steps in the next line of memory.
struct Fetch {
    const uint16_t* from;
    long step, run, stride, third;
};

// The sums of an innermost block: 6 rows and 64 columns of C.
typedef __m512 Block[MR][4];

// A line of what a block of C is about to change, fetched for writing.
template <class T>
INLINE void prefetch_line(T* to, long stride, long line) {
    constexpr long OF_ROW = NR * long(sizeof(T)) / 64;
    __builtin_prefetch(to + line / OF_ROW * stride + line % OF_ROW * (64 / long(sizeof(T))), 1);
}

// What becomes of them if the sums over k go on: they are kept, [6][64].
struct Partial {
    static constexpr long LINES = MR * NR * sizeof(float) / 64;
    float* to;

    MEMBER void fetch(long line) const { prefetch_line(to, NR, line); }

    ISA MEMBER void take(const Block& sums) const {
        UNROLL
        for (int i = 0; i < MR; i++) UNROLL
        for (int j = 0; j < 4; j++) _mm512_store_ps(to + i * NR + 16 * j, sums[i][j]);
    }
};

// An innermost block, ready to be computed.
struct Kernel {
    const uint32_t *a, *b;  // packed
    long words, to_next_block;
    Fetch fetch;
    const float* before;  // sums over earlier k, [6][64], or null

    // take.take(sums) gets the result. Its lines are fetched on the way, each in two of the innermost steps: all at
    // once, they would keep the panel waiting. Where there are too few steps for that, they have to be.
    template <class Take>
    ISA MEMBER void run(const Take& take) const {
        const uint32_t *a = this->a, *b = this->b;
        Fetch fetch = this->fetch;
        Block sums;
#define EACH(OPERATION)                 \
    UNROLL                              \
    for (int i = 0; i < MR; i++) UNROLL \
    for (int j = 0; j < 4; j++) sums[i][j] = OPERATION
#define STEP(q)                                                                                                 \
    {                                                                                                           \
        const __m512bh y0 = (__m512bh)_mm512_load_si512(b + (q) * NR),                                          \
                       y1 = (__m512bh)_mm512_load_si512(b + (q) * NR + 16);                                     \
        const __m512bh y2 = (__m512bh)_mm512_load_si512(b + (q) * NR + 32),                                     \
                       y3 = (__m512bh)_mm512_load_si512(b + (q) * NR + 48);                                     \
        UNROLL                                                                                                  \
        for (int i = 0; i < MR; i++) {                                                                          \
            const __m512bh x = (__m512bh)_mm512_set1_epi32((int)a[(q) * MR + i]);                               \
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, y0), sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, y1); \
            sums[i][2] = _mm512_dpbf16_ps(sums[i][2], x, y2), sums[i][3] = _mm512_dpbf16_ps(sums[i][3], x, y3); \
        }                                                                                                       \
    }
        EACH(_mm512_setzero_ps());
        if (words < 16 * Take::LINES)
            for (long line = 0; line < Take::LINES; line++) take.fetch(line);
        long k = 0, on = 0, left = fetch.run;
        for (; k + 8 <= words; k += 8, a += 8 * MR, b += 8 * NR) {
            UNROLL
            for (int i = 0; i < 3; i++) prefetch(a + to_next_block + 16 * i);
            prefetch(fetch.from + on), prefetch(fetch.from + on + 32), prefetch(fetch.from + on + fetch.third);
            take.fetch(std::min(k / 16, Take::LINES - 1));
            on += fetch.step;
            if (--left == 0) fetch.from += fetch.stride, on = 0, left = fetch.run;
            UNROLL
            for (int q = 0; q < 8; q++) STEP(q)
        }
        for (; k < words; k++, a += MR, b += NR) STEP(0)
        if (before) EACH(_mm512_add_ps(sums[i][j], _mm512_load_ps(before + i * NR + 16 * j)));
        take.take(sums);
#undef STEP
#undef EACH
    }
};

struct Task {
    long column, block, blocks;  // of a panel of B, and a range of blocks of A
};

// Blocks of 6 rows of A, packed.
struct Rows {
    long rows, depth, blocks, apart;  // apart: words between two blocks

    Rows(long rows, long depth) : rows(rows), depth(depth), blocks((rows + MR - 1) / MR) {
        apart = ((depth + 1) / 2 * MR + 15) / 16 * 16 + 16;  // 64 bytes more: else blocks meet in the same cache sets
    }

    long words() const { return (blocks * apart + 1023) / 1024 * 1024; }
};

// A B, each block of which goes to `output`.
template <class Output>
struct Product {
    Matrix a;  // data null: packed before
    Matrix b;
    Output output;
    Rows of_a;
    long columns, depth;
    int threads;

    long blocks, apart, piece, panels, ours, whole, ranges, tasks, panel_words, own_words;
    uint32_t *packed_a, *own;
    std::atomic<long> next{0};

    // is_last: whether threads wait for each other at the end, rather than begin with something else.
    Product(Matrix a, Matrix b, const Output& output, long rows, long columns, long depth, int threads,
            bool is_last = true)
        : a(a), b(b), output(output), of_a(rows, depth), columns(columns), depth(depth), threads(threads) {
        blocks = of_a.blocks, apart = of_a.apart;
        const long pieces = std::max(1L, (depth + KC - 1) / KC);
        piece = std::max(32L, (depth + pieces * 32 - 1) / (pieces * 32) * 32);
        panels = (columns + NR - 1) / NR;
        // While A is not packed, the first panel is everybody's: each thread takes a range of rows, and packs them for
        // all on the way. Then panels one by one, and the last in ranges of rows, for each of which they are packed
        // again: not where threads go on with something else, if there are panels enough for all.
        ours = a.data ? 1 : 0;
        const bool goes_on = !is_last && panels - ours >= 4 * threads;
        whole = threads == 1 || goes_on ? panels - ours : std::max(0L, (panels - ours) / threads - 1) * threads;
        ranges = std::min(RANGES, std::max(1L, blocks / 8));
        tasks = whole + (panels - ours - whole) * ranges;
        panel_words = (std::min(depth, piece) + 31) / 32 * 16 * NR;
        own_words = 2 * panel_words + (depth > piece ? blocks * MR * NR : 0);
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
        if (task < whole) return {(ours + task) * NR, 0, blocks};
        const long range = (task - whole) % ranges, begin = blocks * range / ranges;
        return {(ours + whole + (task - whole) / ranges) * NR, begin, blocks * (range + 1) / ranges - begin};
    }

    Panel panel(Task task, long k) const {
        return {b, task.column, k, std::min(NR, columns - task.column), std::min(piece, depth - k)};
    }

    // What one thread of a team does.
    ISA void work(long thread, long team) {
        uint32_t* this_panel = own + thread * own_words;
        uint32_t* next_panel = this_panel + panel_words;
        float* const partial = (float*)(this_panel + 2 * panel_words);  // of a task, over the pieces of k so far
        const long unit = a.transposed ? STRIP : 1, units = (blocks + unit - 1) / unit;
        const long from = std::min(blocks, units * thread / team * unit);
        bool is_first = a.data;  // panel, on whose way A is packed
        Task task = is_first ? Task{0, from, std::min(blocks, units * (thread + 1) / team * unit) - from} : claim();
        if (task.column < 0) return;
        long k = 0;
        Panel here = panel(task, 0);
        for (long i = 0; i < here.chunks(); i++) {
            if (i + 8 < here.chunks()) here.fetch(i + 8);
            here.pack(i, this_panel);
        }
        while (task.column >= 0) {
            const bool is_last = k + piece >= depth;
            const Task then = is_last ? claim() : task;
            const long then_k = is_last ? 0 : k + piece;
            const Panel there = then.column >= 0 ? panel(then, then_k) : Panel{};
            const bool is_new = then.column >= 0 && (there.column != here.column || there.k != here.k);
            // The next panel is fetched by the last kernels: 64 lines of k each. Where its chunks are lines, each
            // kernel's are packed at once, in memory of their own, before they leave the cache again.
            const long chunks = is_new ? there.chunks() : 0, kernels = (there.depth + 63) / 64,
                       end = task.block + task.blocks;
            uint32_t* const room = b.transposed ? this_panel : next_panel;
            long packed = 0;
            for (long i = task.block; i < end; i++) {
                Fetch fetch{(const uint16_t*)this_panel, 0, FOREVER, 0, 32};  // nothing that is not there
                long fetched = 0;
                if (is_first)
                    pack_ahead(i, end, k, here.depth, fetch);
                else if (is_new && end - 1 - i < kernels) {
                    const long q = (kernels - end + i) * 64;
                    if (!b.transposed) fetched = std::min(chunks, q / 8 + 8);
                    const long column = there.column, line = there.k + q;
                    fetch = {b.data + (b.transposed ? column * b.stride + line : line * b.stride + column), b.stride,
                             FOREVER, 0, 32};
                }
                float* const sums = partial + i * MR * NR;
                const Kernel kernel{packed_a + i * apart + k / 2 * MR, this_panel, (here.depth + 1) / 2,
                                    i + 1 < end ? apart : 0,           fetch,      k > 0 ? sums : nullptr};
                if (is_last)
                    output.block(kernel, i, std::min(MR, of_a.rows - i * MR), here.column, here.columns);
                else
                    kernel.run(Partial{sums});
                for (; packed < fetched; packed++) there.pack(packed, room);
            }
            for (; packed < chunks; packed++) there.pack(packed, room);
            if (is_new && room == next_panel) std::swap(this_panel, next_panel);
            if (is_first && is_last) {
#pragma omp barrier
                is_first = false;
            }
            task = then, k = then_k, here = there;
        }
    }

    // Packs block i of A, or its strip, and lets the kernel fetch what is packed after it.
    ISA void pack_ahead(long i, long end, long k, long piece_depth, Fetch& fetch) {
        const Matrix from{a.data + (a.transposed ? k * a.stride : k), a.stride, a.transposed};
        uint32_t* const to = packed_a + i * apart + k / 2 * MR;
        const long row = i * MR, rows = of_a.rows;
        if (!a.transposed) {
            pack_block(from, row, std::min(MR, rows - row), piece_depth, to);
            if (i + 1 < end) fetch = {from.data + (row + MR) * a.stride, 96, 11, a.stride, 64};
            return;
        }
        const long in_strip = i % STRIP, ahead = i - in_strip + STRIP;
        if (in_strip == 0 && (i + STRIP) * MR <= rows)
            pack_strip(from, row, piece_depth, apart, to);
        else if (in_strip == 0)
            for (long j = i; j < end; j++)
                pack_block(from, j * MR, std::min(MR, rows - j * MR), piece_depth, to + (j - i) * apart);
        if (ahead < end)
            fetch = {from.data + ahead * MR + (piece_depth + STRIP - 1) / STRIP * in_strip * a.stride, a.stride,
                     FOREVER, 0, 64};
    }
};

// To bf16, rounded once.
struct Written {
    static constexpr long LINES = MR * NR * sizeof(uint16_t) / 64;
    uint16_t* out;
    long stride;

    MEMBER void fetch(long line) const { prefetch_line(out, stride, line); }

    ISA MEMBER void take(const Block& sums) const {
        UNROLL
        for (int i = 0; i < MR; i++) UNROLL
        for (int j = 0; j < 4; j += 2)
            _mm512_storeu_si512(out + i * stride + 16 * j, (__m512i)_mm512_cvtne2ps_pbh(sums[i][j + 1], sums[i][j]));
    }

    ISA MEMBER void block(const Kernel& kernel, long block, long rows, long column, long columns) const {
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
    static constexpr long LINES = MR * NR * sizeof(float) / 64;
    float* total;
    long stride;
    const float *keep, *gain;

    MEMBER void fetch(long line) const { prefetch_line(total, stride, line); }

    ISA MEMBER void take(const Block& sums) const {
        UNROLL
        for (int i = 0; i < MR; i++) UNROLL
        for (int j = 0; j < 4; j++) {
            float* const to = total + i * stride + 16 * j;
            const __m512 more = _mm512_mul_ps(sums[i][j], _mm512_set1_ps(factor(gain, i)));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(factor(keep, i)), _mm512_loadu_ps(to), more));
        }
    }

    ISA MEMBER void block(const Kernel& kernel, long block, long rows, long column, long columns) const {
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
