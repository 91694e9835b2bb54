// Products of bf16 matrices with fp32 sums: see bf16_cpu.h.
//
// Called through product_cpu.py. C = A B, rounded once to bf16; or C = keep C + gain A B in fp32, with factors for each
// row: the sums of a walk over the vocabulary, never rounded on the way.

#if defined(__x86_64__)

#include "bf16_cpu.h"

extern "C" {

struct Result {
    uint16_t* bf16;  // written, or null:
    float* fp32;     // changed
    int64_t stride;
    const float *keep, *gain;  // of each row; null: ones
};
}

namespace {

template <class Output>
bool multiply(Matrix a, Matrix b, const Output& output, long rows, long columns, long depth, long threads) {
    Product<Output> product(a, b, output, rows, columns, depth, threads);
    const long packed = product.of_a.words();
    uint32_t* const memory = (uint32_t*)workspace.get(4 * (size_t(packed) + size_t(product.words()) * threads));
    if (!memory) return false;
    product.place(memory, memory + packed, product.words());
    product.run();
    return true;
}

const float* from(const float* of_rows, long row) { return of_rows ? of_rows + row : nullptr; }

}  // namespace

extern "C" {

// Whether this processor has the instructions.
int prefkern_multiplies_bf16(void) {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// C (rows, columns) from A (rows, depth) and B (depth, columns). Returns 0 where memory for it was refused.
int prefkern_product(const Matrix* a, const Matrix* b, const Result* c, int64_t rows, int64_t columns, int64_t depth,
                     int64_t threads) {
    if (rows <= 0 || columns <= 0) return 1;
    const long least = STRIP * MR, step = std::max(least, 2 * A_WORDS / std::max<long>(depth, 1) / least * least);
    for (long row = 0; row < rows; row += step) {
        const Matrix part{a->data + (a->transposed ? row : row * a->stride), a->stride, a->transposed};
        const long count = std::min<long>(step, rows - row), at = row * c->stride;
        const bool done =
            c->bf16 ? multiply(part, *b, Written{c->bf16 + at, c->stride}, count, columns, depth, threads)
                    : multiply(part, *b, Blended{c->fp32 + at, c->stride, from(c->keep, row), from(c->gain, row)},
                               count, columns, depth, threads);
        if (!done) return 0;
    }
    return 1;
}
}

#else

extern "C" {
int prefkern_multiplies_bf16(void) { return 0; }
}

#endif
