// Blocks of 32 x 64 sums by the processor's own matrix registers (AMX): two by two tiles of 16 x 16 sums at a time, to
// which a step adds the product of tiles of 16 rows by 32 of k. A tile of A or of B is a run of memory.

#pragma once

#include "bf16_cpu.h"

// GCC 11 has that header, and clang none of its name.
#if defined(__linux__) && __has_include(<amxbf16intrin.h>)

#include <sys/syscall.h>
#include <unistd.h>

#define TILES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prfchw,amx-tile,amx-bf16")))

namespace {

struct Tiles {
    static constexpr long MR = 32;     // rows of the innermost block
    static constexpr long PANELS = 4;  // that blocks of A pass by at once: a quarter of the traffic for these
    static constexpr long DEEP = 16;   // steps over k, of 32, of a block of A that the nearest cache holds
    static constexpr long STRIP = 1;   // blocks of A that are packed at once where A is transposed
    static constexpr long RANGES = 2, LEAST = 4;   // that each of the last panels is cut into; blocks of one
    static constexpr long GRADIENT_COLUMNS = 128;  // that dL/dlogits is made of at a time

    // In a block of A, [depth / 32][32][16] words: a line of memory is 32 elements of a row.
    static constexpr long words(long depth) { return (depth + 31) / 32 * 16 * MR; }
    static constexpr long place(long row, long column) { return column / 32 * 16 * MR + row * 16 + column % 32 / 2; }

    // In a panel of B, [depth / 32][4] tiles of 16 pairs of lines of k: 16 columns of a pair; from a pair to the next.
    static constexpr long in_panel(long pair, long column) {
        return pair / 16 * 16 * NR + column * 16 + pair % 16 * 16;
    }
    static constexpr long PAIR = 16;

    // Lines of k of the next panel that a block's steps fetch, of each part: four a step and half.
    static constexpr long fetched(long depth) { return std::max(64L, std::min(256L, depth / 256 * 64)); }

    // Whether the processor has them and the system lets this process use them; it has to be asked.
    static bool are_there() {
        constexpr long REQUEST = 0x1023, DATA = 18;
        return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
               syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
    }

    // Around all kernels of a thread.
    TILES static void begin() {
        struct alignas(64) {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];  // of a row of each tile
            uint8_t rows[16];
        } shape{};
        shape.palette = 1;
        for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }

    TILES static void end() { _tile_release(); }

    // 32 rows of 16 words.
    ISA static MEMBER void pack_words(const __m512i* r, uint32_t* out) {
        for (long i = 0; i < MR; i++) _mm512_storeu_si512(out + 16 * i, r[i]);
    }

    // 32 columns of 32 rows, stored as 32 rows of what is transposed.
    ISA static void pack_transposed(const __m512i* r, uint32_t* out) {
        alignas(64) uint32_t pairs[16][32];
        for (long i = 0; i < 16; i++) pair_lines(r[2 * i], r[2 * i + 1], pairs[i]);
        for (long half = 0; half < 2; half++) {
            __m512i t[16];
            UNROLL
            for (int i = 0; i < 16; i++) t[i] = _mm512_load_si512(pairs[i] + 16 * half);
            transpose(t);
            UNROLL
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + 256 * half + 16 * i, t[i]);
        }
    }

    // A block of A, 0 beyond the matrix: `rows` rows from `row` on.
    ISA static void pack_block(Matrix a, long row, long rows, long depth, uint32_t* out) {
        for (long k = 0; k < depth; k += 32, out += 16 * MR) {
            __m512i lines[32];
            const long there = a.transposed ? std::min(32L, depth - k) : rows;
            const __mmask32 inside = first(a.transposed ? rows : depth - k);
            const uint16_t* const from = a.data + (a.transposed ? k * a.stride + row : row * a.stride + k);
            for (long i = 0; i < 32; i++)
                lines[i] = i < there ? _mm512_maskz_loadu_epi16(inside, from + i * a.stride) : _mm512_setzero_si512();
            a.transposed ? pack_transposed(lines, out) : pack_words(lines, out);
        }
    }

    ISA static void pack_strip(Matrix a, long row, long depth, long, uint32_t* out) {
        pack_block(a, row, MR, depth, out);
    }

    // Groups of 32 columns of a block of rows become rows of what is transposed: of blocks that begin with `column`.
    ISA static MEMBER void pack_columns(const __m512i (&d)[4][MR], long groups, long row, long column, long, long apart,
                                        uint32_t* out) {
        for (long t = 0; t < groups; t++) pack_transposed(d[t], out + (column / 32 + t) * apart + row / 2 * MR);
    }

    struct Kernel : Operation {
        using Engine = Tiles;

        // take.take(sums, row) gets what was computed, a few rows at a time.
        template <class Take>
        ISA MEMBER void run(const Take& take) const {
            for (long row = 0; row < MR; row += 4) {
                __m512 some[4][4];
                UNROLL
                for (int i = 0; i < 4; i++) UNROLL
                for (int j = 0; j < 4; j++) some[i][j] = _mm512_load_ps(sums + (row + i) * NR + 16 * j);
                take.take(some, row);
            }
        }
    };

    // The sums of blocks side by side, of the same rows. Steps over k are taken DEEP at a time for all of the columns:
    // so far, the block of A stays in the first-level cache. The next one is brought to the second-level cache.
    //
    // The compiler does not know what tiles are loaded from: it is told that anything may be read. Beyond that, it
    // keeps statements of volatile assembly, which all of these are, in order.
    TILES __attribute__((noinline)) static void compute(const Kernel* blocks, long count, const Lines& lines) {
        const long steps = std::max(1L, (blocks->words + 15) / 16), pieces = (steps + DEEP - 1) / DEEP;
        const long deep = (steps + pieces - 1) / pieces, of_step = 2 * count;
        const long next_lines = blocks->to_next_block ? (MR + of_step - 1) / of_step : 0;
        const long all_lines = lines.rows * lines.of_row,
                   changed_lines = (all_lines + of_step * steps - 1) / (of_step * steps);
        const uint32_t* next = blocks->a + blocks->to_next_block;
        const char* changed = lines.from;
        long changed_left = all_lines, of_row_left = lines.of_row;
        struct {
            Fetch fetch;
            long on, left;
        } ahead[PANELS];
        for (long p = 0; p < count; p++) ahead[p] = {blocks[p].fetch, 0, blocks[p].fetch.run};
        asm volatile("" ::: "memory");
        for (long begin = 0; begin < steps; begin += deep)
            for (long p = 0; p < count; p++)
                for (long column = 0; column < NR; column += 32) {
                    const Kernel& block = blocks[p];
                    const uint32_t *a = block.a + begin * 16 * MR, *b = block.b + begin * 16 * NR + column * 16;
                    const float* const before = begin > 0 ? block.sums : block.before;
                    if (before) {
                        const float *const upper = before + column, *const lower = upper + 16 * NR;
                        _tile_loadd(0, upper, 4 * NR);
                        _tile_loadd(1, upper + 16, 4 * NR);
                        _tile_loadd(2, lower, 4 * NR);
                        _tile_loadd(3, lower + 16, 4 * NR);
                    } else {
                        _tile_zero(0);
                        _tile_zero(1);
                        _tile_zero(2);
                        _tile_zero(3);
                    }
                    auto [fetch, on, left] = ahead[p];
                    const long end = std::min(steps, begin + deep);
                    for (long step = begin; step < end; step++, a += 16 * MR, b += 16 * NR) {
                        if (fetch.step)
                            for (int i = 0; i < 4; i++) {
                                prefetch(fetch.from + on), prefetch(fetch.from + on + 32),
                                    prefetch(fetch.from + on + fetch.third);
                                on += fetch.step;
                                if (--left == 0) fetch.from += fetch.stride, on = 0, left = fetch.run;
                            }
                        // Loads first, and then products: in turns they are as fast, but a tenth slower where another
                        // process shares the core. What is loaded as a stream is the first to leave the nearest cache.
                        _tile_stream_loadd(6, b, 64);
                        _tile_loadd(4, a, 64);
                        _tile_stream_loadd(7, b + 256, 64);
                        _tile_loadd(5, a + 256, 64);
                        for (long i = 0; i < next_lines; i++, next += 16) prefetch_far(next);
                        for (long i = std::min(changed_lines, changed_left); i > 0; i--) {
                            __builtin_prefetch(changed, 1), changed += 64, changed_left--;
                            if (--of_row_left > 0) continue;
                            changed += lines.stride - 64 * lines.of_row, of_row_left = lines.of_row;
                        }
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                    ahead[p] = {fetch, on, left};
                    float *const upper = block.sums + column, *const lower = upper + 16 * NR;
                    _tile_stored(0, upper, 4 * NR);
                    _tile_stored(1, upper + 16, 4 * NR);
                    _tile_stored(2, lower, 4 * NR);
                    _tile_stored(3, lower + 16, 4 * NR);
                }
    }
};

}  // namespace

#endif
