// What products of bf16 matrices on x86 processors share, be they of vectors (bf16_vectors_cpu.h) or of tiles
// (bf16_tiles_cpu.h): see bf16_product_cpu.h.

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
inline thread_local Workspace workspace __attribute__((visibility("hidden")));

}  // namespace prefkern

namespace {

using prefkern::workspace;

constexpr long NR = 64;  // columns of the innermost block
constexpr long FOREVER = long(1) << 60;

// Not _mm_prefetch: GCC 12 takes a function of nothing else for one without effects, and drops its calls.
INLINE void prefetch(const void* line) { asm volatile("prefetcht0 %0" ::"m"(*(const char*)line)); }

INLINE void prefetch_far(const void* line) { asm volatile("prefetcht1 %0" ::"m"(*(const char*)line)); }

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

// 32 words, in order, of two lines: 16, and 16 more `apart` words from where those begin.
ISA INLINE void pair_lines(__m512i even, __m512i odd, uint32_t* out, long apart = 16) {
    const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    const __m512i x = _mm512_unpacklo_epi16(even, odd), y = _mm512_unpackhi_epi16(even, odd);
    _mm512_store_si512(out, _mm512_permutex2var_epi64(x, low, y));
    _mm512_store_si512(out + apart, _mm512_permutex2var_epi64(x, high, y));
}

// What the innermost steps fetch on the side: each the lines at `from`, 32 elements on, and `third` elements on; then
// `step` elements further, and after `run` steps `stride` elements from where those began.
struct Fetch {
    const uint16_t* from;
    long step, run, stride, third;
};

// An innermost block, ready to be computed.
struct Operation {
    const uint32_t *a, *b;  // packed
    long words, to_next_block;
    Fetch fetch;
    const float* before;  // sums over earlier k, a line of 64 for each row, or null
    float* sums;          // the same with this k: where they are if they go on, or, of tiles, are asked for later
};

// What blocks side by side are about to change: rows of `of_row` lines of memory, `stride` bytes apart.
struct Lines {
    char* from;
    long rows, of_row, stride;
};

// A line of what a block of C is about to change, fetched for writing.
template <class T>
INLINE void prefetch_line(T* to, long stride, long line) {
    constexpr long OF_ROW = NR * long(sizeof(T)) / 64;
    __builtin_prefetch(to + line / OF_ROW * stride + line % OF_ROW * (64 / long(sizeof(T))), 1);
}

// What becomes of a block's sums if those over k go on: they are kept, a line of 64 for each row.
struct Partial {
    static constexpr long OF_ROW = NR * sizeof(float) / 64;  // lines of memory
    float* to;

    MEMBER void fetch(long line) const { prefetch_line(to, NR, line); }

    template <long ROWS>
    ISA MEMBER void take(const __m512 (&sums)[ROWS][4], long row) const {
        UNROLL
        for (int i = 0; i < ROWS; i++) UNROLL
        for (int j = 0; j < 4; j++) _mm512_store_ps(to + (row + i) * NR + 16 * j, sums[i][j]);
    }
};

}  // namespace
