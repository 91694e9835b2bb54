// Blocks of 6 x 64 sums in 24 registers, by instructions that multiply vectors of pairs of bf16 (AVX-512 BF16).

#pragma once

#include "bf16_cpu.h"

namespace {

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

struct Vectors {
    static constexpr long MR = 6;                         // rows of the innermost block
    static constexpr long PANELS = 1;                     // that blocks of A pass by at once
    static constexpr long STRIP = 16;                     // blocks of A that are packed at once where A is transposed
    static constexpr long RANGES = 4, LEAST = 8;          // that each of the last panels is cut into; blocks of one
    static constexpr long GRADIENT_COLUMNS = STRIP * MR;  // that dL/dlogits is made of at a time

    // In a block of A, [depth / 2][6] words.
    static constexpr long words(long depth) { return (depth + 1) / 2 * MR; }
    static constexpr long place(long row, long column) { return column / 2 * MR + row; }

    // In a panel of B, [depth / 2][64] words: 16 columns of a pair of lines of k; from a pair to the next.
    static constexpr long in_panel(long pair, long column) { return pair * NR + column; }
    static constexpr long PAIR = NR;

    // Lines of k of the next panel that a block's steps fetch.
    static constexpr long fetched(long) { return 64; }

    static void begin() {}
    static void end() {}

    // 6 rows of 16 words, stored transposed: 6 words for each of 16 columns.
    ISA static MEMBER void pack_words(const __m512i* r, uint32_t* out) {
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

    // STRIP whole blocks of a transposed A at once, 96 of its rows: whole cache lines. `apart`: words between two
    // blocks.
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

    // Groups of 32 columns of a block of rows become rows of what is transposed: of blocks that begin with `column`.
    ISA static MEMBER void pack_columns(const __m512i (&d)[3][MR], long groups, long row, long column, long all_blocks,
                                        long apart, uint32_t* out) {
        constexpr long AHEAD = 16 * MR;  // words, of what is fetched for writing
        const long blocks = std::min(STRIP, all_blocks - column / MR);
        uint32_t* const first = out + column / MR * apart + row / 2 * MR;
        for (long i = 0; i < blocks; i++) __builtin_prefetch(first + i * apart + AHEAD, 1);
        for (long pair = 0; pair < MR / 2; pair++) {
            alignas(64) uint32_t words[STRIP * MR] = {};
            for (long t = 0; t < groups; t++) pair_lines(d[t][2 * pair], d[t][2 * pair + 1], words + 32 * t);
            uint32_t* to = first + pair * MR;
            for (long i = 0; i < blocks; i++, to += apart) {
                _mm_storeu_si128((__m128i*)to, _mm_loadu_si128((const __m128i*)(words + MR * i)));
                _mm_storel_epi64((__m128i*)(to + 4), _mm_loadl_epi64((const __m128i*)(words + MR * i + 4)));
            }
        }
    }

    struct Kernel : Operation {
        using Engine = Vectors;

        // take.take(sums, row) gets the result. Its lines are fetched on the way, each in two of the innermost steps:
        // all at once, they would keep the panel waiting. Where there are too few steps for that, they have to be.
        template <class Take>
        ISA MEMBER void run(const Take& take) const {
            const uint32_t *a = this->a, *b = this->b;
            Fetch fetch = this->fetch;
            __m512 sums[MR][4];
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
            constexpr long LINES = MR * Take::OF_ROW;
            EACH(_mm512_setzero_ps());
            if (words < 16 * LINES)
                for (long line = 0; line < LINES; line++) take.fetch(line);
            long k = 0, on = 0, left = fetch.run;
            for (; k + 8 <= words; k += 8, a += 8 * MR, b += 8 * NR) {
                UNROLL
                for (int i = 0; i < 3; i++) prefetch(a + to_next_block + 16 * i);
                prefetch(fetch.from + on), prefetch(fetch.from + on + 32), prefetch(fetch.from + on + fetch.third);
                take.fetch(std::min(k / 16, LINES - 1));
                on += fetch.step;
                if (--left == 0) fetch.from += fetch.stride, on = 0, left = fetch.run;
                UNROLL
                for (int q = 0; q < 8; q++) STEP(q)
            }
            for (; k < words; k++, a += MR, b += NR) STEP(0)
            if (before) EACH(_mm512_add_ps(sums[i][j], _mm512_load_ps(before + i * NR + 16 * j)));
            take.take(sums, 0);
#undef STEP
#undef EACH
        }
    };
};

}  // namespace
