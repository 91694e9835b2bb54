// An LM head on a CPU, a slice of the vocabulary at a time. Called through lm_head_cpu.py.
//
// Forward: logits that are folded into sums while they are in registers. Each row has a reference r that is near the
// log-sum-exp of what was seen before, not the maximum of the slice, which is known only when all of it is. So a
// logit's exponential can be taken at once, and nothing has to be read twice:
//
//     e = exp(z - r);   sum += sum_v e,   dot += sum_v e (z - r),   acc += e @ weight,   e 0 at the label in the latter
//
// Any r would do that neither overflows nor loses all to underflow: e has fp32's range in bf16 too. When a sum leaves
// [1/16, 16], r moves by a whole number, and what was summed is scaled. A slice of which a row's sum leaves what fp32
// can hold comfortably is given up before anything was changed, and its caller does it by other means. All slices are
// one walk of the threads, which wait for each other twice in each: for the logits, and for what the sums become.
// After the last one they wait once more, and make of acc the gradient of hidden for dL/dlogp = 1.
//
// Backward: each logit is read once, and its gradient lies in memory as the two products that follow read it, packed.

#if defined(__x86_64__)

#include <math.h>

#include <new>

#include "bf16_product_cpu.h"

extern "C" {

struct Head {
    const uint32_t* hidden;  // (rows, depth), packed by prefkern_pack_rows
    Matrix weight;           // (vocab, depth), a line an entry
    int64_t rows, vocab, depth;
    int64_t first, step;  // the entry to begin with, and how many a slice has
    const int64_t* labels;
    int64_t ignore_index;  // the label of rows whose sums may be anything
    float scale;           // z = scale * logit
    int32_t threads;
    // Written, or null; those of a slice that begins at entry v: dense lines of its width, from v * apart on, these
    // rows after `rows_before`.
    uint16_t* logits;
    int64_t logits_apart, rows_before;
    float* acc;  // (gradient, depth), or null
    int64_t acc_stride, gradient;
    uint16_t* unit;  // (gradient, depth), dense: d logp / d hidden, written when all of the vocabulary has been seen
    float *reference, *sum, *label;  // of each row; label: z of the label where this slice has it, else as it was
    float *dot, *top;                // the same, or both null: not wanted. top: the largest z
};

struct Upstream {
    const uint16_t* logits;  // (rows, width)
    Matrix hidden, weight;   // (rows, depth) and (width, depth), lines
    int64_t rows, width, depth, logits_stride;
    const int64_t* labels;
    int64_t first, ignore_index;
    float scale;  // z = scale * logit
    int32_t threads;
    const float *lse, *g, *entropy, *e;  // of each row; the last two null: no gradient of the entropy
    float* dhidden;                      // (rows, depth), added to; or null
    uint16_t* dweight;                   // (width, depth), written over, be it the logits; or null
    float* dweight_sum;                  // (width, depth), added to; or null
    int64_t dhidden_stride, dweight_stride;
};
}

namespace {

// exp(x), for x of at most 87, to about 1 + |x| units in the last place: most where it matters in a sum. The polynomial
// is the best of its degree for 2^f on [-1/2, 1/2].
ISA INLINE __m512 exponential(__m512 x) {
    // The maximum in this order lets NaN pass.
    const __m512 t = _mm512_max_ps(_mm512_set1_ps(-1000.0f), _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
    const __m512 n = _mm512_roundscale_ps(t, 0), f = _mm512_sub_ps(t, n);
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(1.5461445e-4f), _mm512_set1_ps(1.3400428e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6180569e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5503272e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f)), n);
}

// 32 bf16 as fp32: those in even and those in odd places.
ISA INLINE void widen(__m512i halves, __m512& even, __m512& odd) {
    even = (__m512)_mm512_slli_epi32(halves, 16), odd = (__m512)_mm512_and_si512(halves, _mm512_set1_epi32(-65536));
}

// And back, rounded.
ISA INLINE __m512i narrowed(__m512 even, __m512 odd) {
    const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(places, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// What a block of logits leaves.
struct Left {
    float *sums, *dots, *tops;  // of each row, over the columns; the last two may be null
    uint32_t* e;                // as a block of A of the product with the weight; or null
};

// Not inlined, and from memory: beside the sums of the product there are no registers for the constants of this.
template <class Engine, bool SCALES>
ISA __attribute__((noinline)) void fold(const uint16_t* logits, const float* reference, float scale, const Left& left) {
    constexpr long MR = Engine::MR;
    __m512i packed[2][MR];
#pragma GCC unroll 1
    for (int i = 0; i < MR; i++) {
        __m512 z[4], e[4];
        const __m512 r = _mm512_set1_ps(reference[i]);
        widen(_mm512_load_si512(logits + i * NR), z[0], z[1]),
            widen(_mm512_load_si512(logits + i * NR + 32), z[2], z[3]);
        UNROLL
        for (int j = 0; j < 4; j++) {
            if (SCALES) z[j] = _mm512_mul_ps(z[j], _mm512_set1_ps(scale));
            asm("" : "+v"(z[j]));  // rounded, as the label's is: not fused with the difference
            e[j] = exponential(_mm512_sub_ps(z[j], r));
        }
        left.sums[i] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(e[0], e[1]), _mm512_add_ps(e[2], e[3])));
        packed[0][i] = narrowed(e[0], e[1]), packed[1][i] = narrowed(e[2], e[3]);
        if (!left.dots) continue;
        __m512 dot = _mm512_setzero_ps(), top = z[0];
        UNROLL
        for (int j = 0; j < 4; j++) {
            // 0 times an excluded logit shall be 0.
            dot = _mm512_fmadd_ps(e[j], _mm512_max_ps(_mm512_sub_ps(z[j], r), _mm512_set1_ps(-1e30f)), dot);
            top = _mm512_max_ps(top, z[j]);
        }
        left.dots[i] = _mm512_reduce_add_ps(dot), left.tops[i] = _mm512_reduce_max_ps(top);
    }
    if (left.e) Engine::pack_words(packed[0], left.e), Engine::pack_words(packed[1], left.e + 16 * MR);
}

// What the rows' sums become by a slice, and what its blocks leave for that.
struct Sums {
    long rows;                                       // as many as fill blocks
    float *reference, *labels;                       // of each row, before the slice; labels: and with it
    float *next_sum, *next_dot, *next_top, *factor;  // of each row, with it; factor: of what was summed before
    float *sums, *dots, *tops;                       // [panel][rows]; the last two null: not wanted

    static size_t words(const Head& head, long width) {
        return 6 * filled(head.rows) + (head.dot ? 3 : 1) * filled(head.rows) * (width / NR);
    }

    // Whole blocks, of whichever engine.
    static long filled(long rows) { return (rows + FILLS - 1) / FILLS * FILLS; }
    static constexpr long FILLS = 96;

    Sums(const Head& head, long width, float* memory) : rows(filled(head.rows)) {
        if (!memory) return;
        for (float** of : {&reference, &labels, &next_sum, &next_dot, &next_top, &factor}) *of = memory, memory += rows;
        const long size = rows * (width / NR);
        sums = memory, dots = head.dot ? sums + size : nullptr, tops = head.dot ? dots + size : nullptr;
        std::fill(reference, reference + rows, 0.0f);
    }

    void begin(const Head& head) const {
        for (long row = 0; row < head.rows; row++) {
            reference[row] = head.reference[row] == -INFINITY ? 0 : head.reference[row];
            labels[row] = head.label[row];
        }
    }

    // Of some rows. Returns whether their sums allow it; `next`: those of the slice that comes after.
    ISA bool merge(const Head& head, long panels, long begin, long end, const Sums& next) const {
        bool is_allowed = true;
        for (long row = begin; row < end; row++) {
            next_sum[row] = head.sum[row];
            if (dots) next_dot[row] = head.dot[row], next_top[row] = head.top[row];
        }
        for (long at = 0; at < rows * panels; at += rows) {
#pragma omp simd
            for (long row = begin; row < end; row++) next_sum[row] += sums[at + row];
            if (!dots) continue;
#pragma omp simd
            for (long row = begin; row < end; row++) {
                next_dot[row] += dots[at + row];
                next_top[row] = tops[at + row] > next_top[row] ? tops[at + row] : next_top[row];
            }
        }
        for (long row = begin; row < end; row++) {
            const float sum = next_sum[row];
            factor[row] = 1.0f, next.reference[row] = reference[row], next.labels[row] = labels[row];
            if (head.labels[row] == head.ignore_index) {  // whatever it holds: nobody reads it
                next_sum[row] = head.sum[row];
                continue;
            }
            if (!(sum > 1e-30f && sum < 1e30f)) is_allowed = false;
            if (sum >= 0.0625f && sum <= 16.0f) continue;
            // Of a large reference not every whole number is the next one's distance.
            next.reference[row] = reference[row] + rintf(logf(sum));
            const float shift = next.reference[row] - reference[row];
            factor[row] = expf(-shift);
            next_sum[row] = sum * factor[row];
            if (dots) next_dot[row] = (next_dot[row] - shift * sum) * factor[row];
        }
        return is_allowed;
    }

    void commit(const Head& head, long begin, long end, const Sums& next) const {
        for (long row = begin; row < end; row++) {
            head.reference[row] = next.reference[row];
            head.sum[row] = next_sum[row], head.label[row] = labels[row];
            if (dots) head.dot[row] = next_dot[row], head.top[row] = next_top[row];
        }
    }
};

// d logp / d hidden of some rows = scale ((1 - p) weight[label] - acc / sum): acc lacks the label's own share, and 1 -
// p is by expm1, as both would cancel where p is nearly 1.
ISA void finish(const Head& head, long begin, long end) {
    for (long row = begin; row < end; row++) {
        uint16_t* const to = head.unit + row * head.depth;
        const int64_t label = head.labels[row];
        if (label == head.ignore_index) {
            memset(to, 0, head.depth * sizeof *to);
            continue;
        }
        const float sum = head.sum[row], logp = head.label[row] - head.reference[row] - logf(sum);
        const __m512 rest = _mm512_set1_ps(-expm1f(logp) * head.scale), gain = _mm512_set1_ps(-head.scale / sum);
        const int64_t entry = std::max<int64_t>(0, std::min<int64_t>(label, head.vocab - 1));
        const uint16_t* const own = head.weight.data + entry * head.weight.stride;
        const float* const acc = head.acc + row * head.acc_stride;
        for (long i = 0; i < head.depth; i += 16) {
            const __mmask16 there = (__mmask16)::first(std::min(16L, head.depth - i));
            const __m512 w =
                (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, own + i)), 16);
            const __m512 u = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, acc + i), gain, _mm512_mul_ps(w, rest));
            _mm256_mask_storeu_epi16(to + i, there, (__m256i)_mm512_cvtneps_pbh(u));
        }
    }
}

// Blocks of logits, and where what they leave is gathered.
struct Gathered {
    const Head* head;
    long first, width;
    Sums sums;
    uint16_t* to;  // where logits are kept, or null
    uint32_t* e;   // or null
    long apart;    // words between two blocks of it

    template <class Engine>
    Lines lines(long block, long, long column, long count) const {
        return {(char*)(e + block * apart + column / 2 * Engine::MR), e ? 1 : 0, count * Engine::MR * NR / 32, 0};
    }

    template <class Kernel>
    ISA MEMBER void block(const Kernel& kernel, long block, long count, long column, long) const {
        using Engine = typename Kernel::Engine;
        constexpr long MR = Engine::MR;
        static_assert(Sums::FILLS % MR == 0, "sums are of whole blocks");
        const long row = block * MR, at = column / NR * sums.rows + row;
        uint32_t* const words = e ? e + block * apart + column / 2 * MR : nullptr;
        const Left left{sums.sums + at, sums.dots ? sums.dots + at : nullptr, sums.dots ? sums.tops + at : nullptr,
                        words};
        for (long i = 0; Engine::PANELS == 1 && words && i < MR * NR / 2; i += 16) __builtin_prefetch(words + i, 1);
        alignas(64) uint16_t logits[MR * NR];
        kernel.run(Written{logits, NR});
        (head->scale == 1 ? fold<Engine, false> : fold<Engine, true>)(logits, sums.reference + row, head->scale, left);
        if (to) keep(logits, to + row * width + column, count);
        for (long y = 0; y < count; y++) {
            const uint64_t label = head->labels[row + y] - first - column;
            if (label >= NR) continue;
            const uint32_t bits = uint32_t(logits[y * NR + label]) << 16;
            float z;
            memcpy(&z, &bits, sizeof z);
            sums.labels[row + y] = z * head->scale;
            if (words) ((uint16_t*)(words + Engine::place(y, label)))[label % 2] = 0;
        }
    }

    // Past the caches, which have no use for logits that backward will read.
    ISA MEMBER void keep(const uint16_t* logits, uint16_t* to, long count) const {
        const bool is_aligned = uintptr_t(to) % 64 == 0 && width % 32 == 0;
        for (long y = 0; y < count; y++)
            for (long x = 0; x < NR; x += 32) {
                const __m512i line = _mm512_load_si512(logits + y * NR + x);
                __m512i* const there = (__m512i*)(to + y * width + x);
                is_aligned ? _mm512_stream_si512(there, line) : _mm512_storeu_si512(there, line);
            }
    }
};

// A slice: its logits, folded, and what it adds to acc.
template <class Engine>
struct Slice {
    long width;
    Rows<Engine> of_e;
    Product<Engine, Gathered> logits;
    Product<Engine, Blended> gradient;
    std::atomic<bool> is_refused{false};

    Slice(const Head& head, long first, long width, bool is_last, const Sums& sums, uint32_t* e, uint32_t* own,
          size_t words)
        : width(width),
          of_e(head.rows, width),
          logits({nullptr, 0, 0}, {line(head, first), head.weight.stride, 1},
                 Gathered{&head, first, width, sums, place(head, first, width), e, of_e.apart}, head.rows, width,
                 head.depth, head.threads),
          gradient({nullptr, 0, 0}, {line(head, first), head.weight.stride, 0},
                   Blended{head.acc, head.acc_stride, sums.factor, sums.factor}, head.gradient, head.depth, width,
                   head.threads, is_last) {
        if (own) logits.place((uint32_t*)head.hidden, own, words), gradient.place(e, own, words);
    }

    static const uint16_t* line(const Head& head, long entry) { return head.weight.data + entry * head.weight.stride; }

    static uint16_t* place(const Head& head, long first, long width) {
        return head.logits ? head.logits + first * head.logits_apart + head.rows_before * width : nullptr;
    }

    size_t words() const { return std::max(logits.words(), gradient.words()); }
};

// dL/dlogits = g (onehot - p) - e p (log p + entropy), p = exp(z - lse), as two products read it.
template <class Engine>
struct Gradient {
    static constexpr long MR = Engine::MR, GROUPS = Engine::GRADIENT_COLUMNS / 32;

    const Upstream& of;
    Rows<Engine> by_row, by_column;  // packed: rows of it, for dhidden, and columns, for dweight
    uint32_t *to_row, *to_column;    // null: not wanted
    std::atomic<long> next{0};

    Gradient(const Upstream& of) : of(of), by_row(of.rows, of.width), by_column(of.width, of.rows) {}

    ISA void work() {
        for (long column; (column = next++ * GROUPS * 32) < of.width;)
            for (long row = 0; row < of.rows; row += MR) strip(row, column);
    }

    // Rows of a block, and as many columns as are made at a time.
    ISA void strip(long row, long column) {
        const long groups = std::min(GROUPS, (of.width - column) / 32), count = std::min(MR, of.rows - row);
        const long ahead = std::max(24L, MR);
        __m512i d[GROUPS][MR];
        for (long i = 0; i < MR; i++) {
            const bool is_live = i < count && of.labels[row + i] != of.ignore_index;
            if (row + ahead + i < of.rows)
                for (long t = 0; t < groups; t++)
                    prefetch(of.logits + (row + ahead + i) * of.logits_stride + column + 32 * t);
            for (long t = 0; t < groups; t++)
                d[t][i] = is_live ? of_logits(row + i, column + 32 * t) : _mm512_setzero_si512();
        }
        if (to_row)
            for (long t = 0; t < groups; t++)
                Engine::pack_words(d[t], to_row + row / MR * by_row.apart + (column / 2 + 16 * t) * MR);
        if (to_column) Engine::pack_columns(d, groups, row, column, by_column.blocks, by_column.apart, to_column);
    }

    // 32 columns of a row, rounded to bf16.
    ISA MEMBER __m512i of_logits(long row, long column) const {
        const uint16_t* const from = of.logits + row * of.logits_stride + column;
        __m512 half[2];
        widen(_mm512_loadu_si512(from), half[0], half[1]);
        const uint64_t label = of.labels[row] - of.first - column;
        UNROLL
        for (unsigned j = 0; j < 2; j++) {
            const __mmask16 hit = label < 32 && label % 2 == j ? 1 << label / 2 : 0;
            const __m512 z = _mm512_mul_ps(half[j], _mm512_set1_ps(of.scale));
            const __m512 log_p = _mm512_sub_ps(z, _mm512_set1_ps(of.lse[row])), p = exponential(log_p);
            const __m512 g = _mm512_set1_ps(of.g[row]);
            __m512 factor = g;
            if (of.e) {
                const __m512 finite = _mm512_max_ps(log_p, _mm512_set1_ps(-1e30f));
                factor = _mm512_fmadd_ps(_mm512_add_ps(finite, _mm512_set1_ps(of.entropy[row])),
                                         _mm512_set1_ps(of.e[row]), g);
            }
            half[j] = _mm512_fnmadd_ps(p, factor, _mm512_maskz_mov_ps(hit, g));
        }
        return narrowed(half[0], half[1]);
    }
};

template <class Engine>
int64_t packed_words(long rows, long depth) {
    return Rows<Engine>(rows, depth).words();
}

template <class Engine>
void pack_rows(const Matrix& a, long rows, long depth, uint32_t* out, long threads) {
    const Rows<Engine> packed(rows, depth);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < packed.blocks; i++)
        Engine::pack_block(a, i * packed.MR, std::min(packed.MR, rows - i * packed.MR), depth, out + i * packed.apart);
}

template <class Engine>
int64_t head_forward(const Head& head) {
    const long left = head.vocab - head.first, most = std::min<long>(head.step, left), rest = left % most;
    const long end = head.vocab - (most % NR ? left : rest % NR ? rest : 0);
    if (end <= head.first) return head.first;
    // Memory of two slices: threads begin with the next one while others still add to acc.
    const size_t of_sums = (Sums::words(head, most) + 1023) / 1024 * 1024;
    const size_t of_e = head.acc ? Rows<Engine>(head.rows, most).words() : 0,
                 all_e = end - head.first > most ? 2 * of_e : of_e;
    size_t of_thread = 0;
    for (long width : {most, rest}) {
        if (width == 0) continue;
        const Slice<Engine> slice(head, head.first, width, true, Sums(head, 0, nullptr), nullptr, nullptr, 0);
        of_thread = std::max(of_thread, slice.words());
    }
    uint32_t* const memory = (uint32_t*)workspace.get(4 * (2 * of_sums + all_e + of_thread * head.threads));
    if (!memory) return -1;
    uint32_t* const own = memory + 2 * of_sums + all_e;
    const Sums sums[2] = {Sums(head, most, (float*)memory), Sums(head, most, (float*)(memory + of_sums))};
    sums[0].begin(head);
    alignas(Slice<Engine>) char room[2][sizeof(Slice<Engine>)];
    const auto prepare = [&](long first, long turn) {
        uint32_t* const e = head.acc ? memory + 2 * of_sums + turn * of_e : nullptr;
        const long width = std::min(most, end - first);
        return new (room[turn]) Slice<Engine>(head, first, width, first + width == end, sums[turn], e, own, of_thread);
    };
    prepare(head.first, 0);
    long done = head.first;
#pragma omp parallel num_threads(head.threads)
    {
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
        const long begin = head.rows * thread / team, stop = head.rows * (thread + 1) / team;
        long turn = 0;
        for (long first = head.first; first < end; turn = 1 - turn) {
            auto& slice = *(Slice<Engine>*)room[turn];
            slice.logits.work(thread, team);
            _mm_sfence();
            first += slice.width;
#pragma omp barrier
            const bool is_allowed = sums[turn].merge(head, slice.width / NR, begin, stop, sums[1 - turn]);
            if (!is_allowed) slice.is_refused = true;
            if (thread == 0 && first < end) prepare(first, 1 - turn);
#pragma omp barrier
            if (slice.is_refused) break;
            sums[turn].commit(head, begin, stop, sums[1 - turn]);
            if (head.acc) slice.gradient.work(thread, team);
            if (thread == 0) done = first;
        }
#pragma omp barrier
        if (head.unit && done == head.vocab)
            finish(head, head.gradient * thread / team, head.gradient * (thread + 1) / team);
    }
    return done;
}

template <class Engine>
int gradient_slice(const Upstream& slice) {
    Gradient<Engine> gradient(slice);
    const Matrix packed{nullptr, 0, 0};
    const bool has_sum = slice.dweight_sum, has_weight = slice.dweight || has_sum;
    const long rows = slice.rows, width = slice.width, depth = slice.depth, threads = slice.threads;
    Product<Engine, Blended> dhidden(packed, slice.weight,
                                     Blended{slice.dhidden, slice.dhidden_stride, nullptr, nullptr}, rows, depth, width,
                                     threads, !has_weight);
    Product<Engine, Written> dweight(packed, slice.hidden, Written{slice.dweight, slice.dweight_stride}, width, depth,
                                     rows, threads);
    Product<Engine, Blended> dweight_sum(packed, slice.hidden,
                                         Blended{slice.dweight_sum, slice.dweight_stride, nullptr, nullptr}, width,
                                         depth, rows, threads);
    const size_t by_row = slice.dhidden ? gradient.by_row.words() : 0,
                 by_column = has_weight ? gradient.by_column.words() : 0;
    const size_t panels = std::max(dhidden.words(), dweight.words());
    uint32_t* const memory = (uint32_t*)workspace.get(4 * (by_row + by_column + panels * threads));
    if (!memory) return 2;
    uint32_t *const columns = memory + by_row, *const own = columns + by_column;
    gradient.to_row = slice.dhidden ? memory : nullptr, gradient.to_column = has_weight ? columns : nullptr;
    dhidden.place(memory, own, panels);
    dweight.place(columns, own, panels), dweight_sum.place(columns, own, panels);
#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
        gradient.work();
#pragma omp barrier
        if (slice.dhidden) dhidden.work(thread, team);
        if (slice.dweight) dweight.work(thread, team);
        if (has_sum) dweight_sum.work(thread, team);
    }
    return 0;
}
}  // namespace

extern "C" {

// Words of packed rows, each of 4 bytes.
int64_t prefkern_packed_words(int64_t rows, int64_t depth) { return BY_ENGINE(packed_words, rows, depth); }

void prefkern_pack_rows(const Matrix* a, int64_t rows, int64_t depth, uint32_t* out, int64_t threads) {
    BY_ENGINE(pack_rows, *a, rows, depth, out, threads);
}

// Folds slice after slice into the rows' sums, up to one whose width is not a multiple of 64 or of which a row's sum
// does not allow it; of the latter only `logits` may have been changed. Returns the entry that it came to, or -1 where
// memory was refused.
int64_t prefkern_head_forward(const Head* head) { return BY_ENGINE(head_forward, *head); }

// dhidden and dweight of a slice, whose width is a multiple of 32. Returns 0, or 2 where memory was refused.
int prefkern_gradient_slice(const Upstream* slice) { return BY_ENGINE(gradient_slice, *slice); }
}

#endif
