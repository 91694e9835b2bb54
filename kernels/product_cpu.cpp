// Products of bf16 matrices with fp32 sums: see bf16_product_cpu.h.
//
// Called through product_cpu.py. C = A B, rounded once to bf16; or C = keep C + gain A B in fp32, with factors for each
// row: the sums of a walk over the vocabulary, never rounded on the way.

#if defined(__x86_64__)

#include "bf16_product_cpu.h"

extern "C" {

struct Result {
    uint16_t* bf16;  // written, or null:
    float* fp32;     // changed
    int64_t stride;
    const float *keep, *gain;  // of each row; null: ones
};
}

namespace {

template <class Engine, class Output>
bool multiply(Matrix a, Matrix b, const Output& output, long rows, long columns, long depth, long threads) {
    Product<Engine, Output> product(a, b, output, rows, columns, depth, threads);
    const long packed = product.of_a.words();
    uint32_t* const memory = (uint32_t*)workspace.get(4 * (size_t(packed) + size_t(product.words()) * threads));
    if (!memory) return false;
    product.place(memory, memory + packed, product.words());
    product.run();
    return true;
}

const float* from(const float* of_rows, long row) { return of_rows ? of_rows + row : nullptr; }

template <class Engine>
int multiply_all(const Matrix& a, const Matrix& b, const Result& c, long rows, long columns, long depth, long threads) {
    if (rows <= 0 || columns <= 0) return 1;
    const long least = Engine::STRIP * Engine::MR;
    const long step = std::max(least, 2 * A_WORDS / std::max<long>(depth, 1) / least * least);
    for (long row = 0; row < rows; row += step) {
        const Matrix part{a.data + (a.transposed ? row : row * a.stride), a.stride, a.transposed};
        const long count = std::min<long>(step, rows - row), at = row * c.stride;
        const bool done =
            c.bf16 ? multiply<Engine>(part, b, Written{c.bf16 + at, c.stride}, count, columns, depth, threads)
                   : multiply<Engine>(part, b, Blended{c.fp32 + at, c.stride, from(c.keep, row), from(c.gain, row)},
                                      count, columns, depth, threads);
        if (!done) return 0;
    }
    return 1;
}

}  // namespace

extern "C" {

// Asks the system what may multiply here: nothing (0), vectors (1) or tiles (2), at most `most`. From now on that does,
// if it is anything. Not while something is multiplied, nor between packing rows and using them: each packs in its own
// way.
int prefkern_multiply_by(int most) {
    const bool has_vectors = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool has_tiles = false;
#ifdef TILES
    has_tiles = has_vectors && Tiles::are_there();
#endif
    return prefkern::engine = std::min(most, has_tiles ? 2 : has_vectors ? 1 : 0);
}

// C (rows, columns) from A (rows, depth) and B (depth, columns). Returns 0 where memory for it was refused.
int prefkern_product(const Matrix* a, const Matrix* b, const Result* c, int64_t rows, int64_t columns, int64_t depth,
                     int64_t threads) {
    return BY_ENGINE(multiply_all, *a, *b, *c, rows, columns, depth, threads);
}
}

#else

extern "C" {
int prefkern_multiply_by(int) { return 0; }
}

#endif
