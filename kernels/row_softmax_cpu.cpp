// Row work of logits on a CPU, each logit read from a near cache and written at most once: the twin of row_softmax.py.
//
// Called through row_softmax_cpu.py. No header of Python's or torch's, so one shared object serves every version of
// both; setup.py builds it where a compiler is there, and without it torch does the work.
//
// Everything is a template over the number of lanes of a vector, compiled once for each instruction set below; the
// best one that the processor has is chosen at load. No sum depends on the number of threads.

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

extern "C" {

// Strides are in elements.
struct Tile {
    const void* logits;
    void* out;  // the logits themselves are allowed
    int64_t rows, width, stride, out_stride;
    const int64_t* labels;  // outside [0, width): not in this tile
    const float* bias;      // (width,), or null
    // z = scale * (x + bias), or where softcap is not 0: z = softcap * tanh(scale * (x + bias) / softcap) / temperature.
    float scale, softcap, temperature;
    int32_t is_bf16, threads;
};

// Of each row. The last three may be null: not wanted.
struct Sums {
    int64_t gradient;  // how many leading rows go to `out`
    float *top, *sum, *label, *dot, *total, *square;
};

// Of each row. The last two may be null: no gradient of the entropy.
struct Upstream {
    int64_t ignore_index;
    const float *lse, *g, *entropy, *e;
};
}

namespace {

constexpr float INF = __builtin_inff();
constexpr int STRETCH = 64;  // vectors summed before their sum joins the others': a long sum of sums rounds less

struct bf16 {
    uint16_t bits;
};

template <int LANES>
struct Types;

// Written out, because a compiler converts no vectors of a type that depends on a template's parameter.
#define TYPES(LANES)                                                                                      \
    template <>                                                                                           \
    struct Types<LANES> {                                                                                 \
        typedef float Floats __attribute__((vector_size(4 * LANES)));                                     \
        typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));                                    \
        typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));                                  \
        INLINE void widen(const Halves& from, Bits& to) { to = __builtin_convertvector(from, Bits); }     \
        INLINE void narrow(const Bits& from, Halves& to) { to = __builtin_convertvector(from, Halves); }  \
    };
TYPES(4)
TYPES(8)
TYPES(16)

template <int LANES>
struct Vector {
    typedef typename Types<LANES>::Floats Floats;
    typedef typename Types<LANES>::Bits Bits;
    typedef typename Types<LANES>::Halves Halves;

    Floats x;

    INLINE Floats all(float value) { return Floats{} + value; }

    INLINE void read(const float* from, Vector& to) { memcpy(&to, from, sizeof to); }

    INLINE void read(const bf16* from, Vector& to) {
        Halves halves;
        memcpy(&halves, from, sizeof halves);
        Bits bits;
        Types<LANES>::widen(halves, bits);
        bits <<= 16;
        memcpy(&to, &bits, sizeof to);
    }

    // Keeps a product from being fused with what follows: a value that is used twice shall be the same twice.
    INLINE void rounded(Vector& v) {
#if defined(__x86_64__)
        asm("" : "+v"(v.x));
#elif defined(__aarch64__)
        asm("" : "+w"(v.x));
#endif
        (void)v;
    }

    // The first `count`; 0 in the other lanes.
    template <class T>
    INLINE void read_some(const T* from, int64_t count, Vector& to) {
        T buffer[LANES] = {};
        memcpy(buffer, from, count * sizeof(T));
        read(buffer, to);
    }

    INLINE void write(float* to, const Vector& v) { memcpy(to, &v, sizeof v); }

    INLINE void write(bf16* to, const Vector& v) {
        Bits bits;
        memcpy(&bits, &v, sizeof bits);
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
        bits = v.x == v.x ? bits : Bits{} + 0x7fc0;
        Halves halves;
        Types<LANES>::narrow(bits, halves);
        memcpy(to, &halves, sizeof halves);
    }

    template <class T>
    INLINE void write_some(T* to, int64_t count, const Vector& v) {
        T buffer[LANES];
        write(buffer, v);
        memcpy(to, buffer, count * sizeof(T));
    }

    // `other` in the lanes from `count` on.
    INLINE void cut(Vector& v, int64_t count, float other) {
        float lanes[LANES];
        memcpy(lanes, &v, sizeof v);
        for (int64_t i = count; i < LANES; ++i) lanes[i] = other;
        memcpy(&v, lanes, sizeof v);
    }

    INLINE float largest(const Vector& v) {
        float lanes[LANES];
        memcpy(lanes, &v, sizeof v);
        for (int i = 1; i < LANES; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
        return lanes[0];
    }

    INLINE float total(const Floats& x) {
        float lanes[LANES];
        memcpy(lanes, &x, sizeof x);
        for (int n = LANES / 2; n; n /= 2)
            for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
        return lanes[0];
    }
};

// exp to about one unit in the last place, 0 where it would be subnormal, at most exp(88): reduction to
// |r| <= ln(2) / 2, where the polynomial of Cephes' expf serves.
template <class V>
INLINE void exponential(V& v) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer, kept in the low bits
    auto x = v.x > 88.0f ? V::all(88.0f) : v.x;
    const auto shifted = x * 1.44269504f + magic, n = shifted - magic;
    auto r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    auto p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    typename V::Bits power;
    memcpy(&power, &shifted, sizeof power);
    power = (power << 23) + (127u << 23);
    typename V::Floats scale;
    memcpy(&scale, &power, sizeof scale);
    v.x = v.x < -87.0f ? V::all(0.0f) : p * scale;
}

template <class V>
INLINE void hyperbolic_tangent(V& v) {
    const auto x = v.x, size = x < 0.0f ? -x : x, square = x * x;
    V big{size + size};
    exponential(big);
    big.x = 1.0f - 2.0f / (big.x + 1.0f);
    auto p = square * -5.70498872745e-3f + 2.06390887954e-2f;  // of Cephes' tanhf, for small arguments
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    v.x = size < 0.625f ? p * square * x + x : x < 0.0f ? -big.x : big.x;
}

// What a row is read with. PLAIN: z is a multiple of the logit.
template <class V, class T, bool PLAIN>
struct Reader {
    // All of z but a softcap, which keeps the order.
    template <bool WHOLE>
    INLINE void uncapped(const Tile& tile, const T* x, int64_t column, int64_t count, V& z) {
        WHOLE ? V::read(x + column, z) : V::read_some(x + column, count, z);
        if (!PLAIN && tile.bias) {
            V bias;
            WHOLE ? V::read(tile.bias + column, bias) : V::read_some(tile.bias + column, count, bias);
            z.x += bias.x;
        }
        z.x *= tile.scale;
        V::rounded(z);
    }

    // slope: the part of dz/dx that differs between elements.
    INLINE void cap(const Tile& tile, V& z, V& slope) {
        if (PLAIN || tile.softcap == 0) return;
        z.x *= 1 / tile.softcap;
        hyperbolic_tangent(z);
        slope.x = 1.0f - z.x * z.x;
        z.x *= tile.softcap / tile.temperature;
        V::rounded(z);
    }

    template <bool WHOLE>
    INLINE void read(const Tile& tile, const T* x, int64_t column, int64_t count, V& z, V& slope) {
        uncapped<WHOLE>(tile, x, column, count, z);
        slope.x = V::all(1.0f);
        cap(tile, z, slope);
    }

    INLINE float largest(const Tile& tile, const T* x, int lanes) {
        const int64_t whole = tile.width - tile.width % (4 * lanes);
        V tops[4], z, slope;
        for (V& top : tops) top.x = V::all(-INF);
        for (int64_t column = 0; column < whole; column += 4 * lanes)
            for (int i = 0; i < 4; ++i) {
                uncapped<true>(tile, x, column + i * lanes, lanes, z);
                tops[i].x = z.x > tops[i].x ? z.x : tops[i].x;
            }
        for (int64_t column = whole; column < tile.width; column += lanes) {
            const int64_t count = tile.width - column < lanes ? tile.width - column : lanes;
            uncapped<false>(tile, x, column, count, z);
            V::cut(z, count, -INF);
            tops[0].x = z.x > tops[0].x ? z.x : tops[0].x;
        }
        for (int i = 1; i < 4; ++i) tops[0].x = tops[i].x > tops[0].x ? tops[i].x : tops[0].x;
        z.x = V::all(V::largest(tops[0]));
        cap(tile, z, slope);
        return z.x[0];
    }
};

template <class V>
struct Running {
    typename V::Floats sum, dot, total, square;

    INLINE void add(const Running& more, Running& to) {
        to.sum += more.sum;
        to.dot += more.dot;
        to.total += more.total;
        to.square += more.square;
    }
};

template <class V, class T, bool PLAIN, bool STATS, bool WRITE, bool WHOLE>
INLINE void fold_some(const Tile& tile, const T* x, T* out, int64_t column, int64_t count, float top,
                      Running<V>& to) {
    V z, slope;
    Reader<V, T, PLAIN>::template read<WHOLE>(tile, x, column, count, z, slope);
    V e{z.x - top};
    if (!WHOLE) V::cut(e, count, -INF);
    const auto d = e.x < -1e30f ? V::all(-1e30f) : e.x;  // 0 times an excluded logit shall be 0
    exponential(e);
    to.sum += e.x;
    if (STATS) {
        if (!WHOLE) V::cut(z, count, 0.0f);
        to.dot += e.x * d;
        to.total += z.x;
        to.square += e.x * e.x;
    }
    if (!WRITE) return;
    if (!PLAIN) e.x *= slope.x;
    WHOLE ? V::write(out + column, e) : V::write_some(out + column, count, e);
}

template <int LANES, class T, bool PLAIN, bool STATS, bool WRITE>
INLINE void fold_row(const Tile& tile, const Sums& sums, int64_t row) {
    typedef Vector<LANES> V;
    typedef Reader<V, T, PLAIN> Rows;
    const T* x = (const T*)tile.logits + row * tile.stride;
    T* out = (T*)tile.out + row * tile.out_stride;
    const int64_t width = tile.width, whole = width - width % LANES, label = tile.labels[row];
    const bool inside = 0 <= label && label < width;
    V own{V::all(0.0f)}, slope;
    if (inside) Rows::template read<false>(tile, x, label, 1, own, slope);
    const float top = Rows::largest(tile, x, LANES);
    const float from = top == -INF ? 0.0f : top;  // in a row of -inf every exponential is 0
    Running<V> to = {};
    for (int64_t begin = 0; begin < whole; begin += STRETCH * LANES) {
        const int64_t end = begin + STRETCH * LANES < whole ? begin + STRETCH * LANES : whole;
        Running<V> part = {};
        for (int64_t column = begin; column < end; column += LANES)
            fold_some<V, T, PLAIN, STATS, WRITE, true>(tile, x, out, column, LANES, from, part);
        Running<V>::add(part, to);
    }
    if (whole < width) fold_some<V, T, PLAIN, STATS, WRITE, false>(tile, x, out, whole, width - whole, from, to);
    if (WRITE && inside) memset(out + label, 0, sizeof(T));
    sums.top[row] = top;
    sums.label[row] = own.x[0];
    sums.sum[row] = V::total(to.sum);
    if (!STATS) return;
    if (sums.dot) sums.dot[row] = V::total(to.dot);
    if (sums.total) sums.total[row] = V::total(to.total);
    if (sums.square) sums.square[row] = V::total(to.square);
}

struct Factors {
    float lse, g, entropy, e;
};

template <class V, class T, bool PLAIN, bool ENTROPY, bool WHOLE>
INLINE void gradient_some(const Tile& tile, const T* x, T* out, int64_t column, int64_t count, const Factors& of,
                          float hit) {
    V z, slope;
    Reader<V, T, PLAIN>::template read<WHOLE>(tile, x, column, count, z, slope);
    V p{z.x - of.lse};
    auto factor = V::all(of.g);
    if (ENTROPY) factor += ((p.x < -1e30f ? V::all(-1e30f) : p.x) + of.entropy) * of.e;
    exponential(p);
    V dz{hit - p.x * factor};
    if (!PLAIN) dz.x *= slope.x;
    WHOLE ? V::write(out + column, dz) : V::write_some(out + column, count, dz);
}

template <int LANES, class T, bool PLAIN, bool ENTROPY>
INLINE void gradient_row(const Tile& tile, const Upstream& upstream, int64_t row) {
    typedef Vector<LANES> V;
    const T* x = (const T*)tile.logits + row * tile.stride;
    T* out = (T*)tile.out + row * tile.out_stride;
    const int64_t width = tile.width, whole = width - width % LANES, label = tile.labels[row];
    if (label == upstream.ignore_index) {
        memset(out, 0, width * sizeof(T));
        return;
    }
    const Factors of = {upstream.lse[row], upstream.g[row], ENTROPY ? upstream.entropy[row] : 0.0f,
                        ENTROPY ? upstream.e[row] : 0.0f};
    const bool inside = 0 <= label && label < width;
    T own = {};
    if (inside) own = x[label];
    for (int64_t column = 0; column < whole; column += LANES)
        gradient_some<V, T, PLAIN, ENTROPY, true>(tile, x, out, column, LANES, of, 0.0f);
    if (whole < width)
        gradient_some<V, T, PLAIN, ENTROPY, false>(tile, x, out, whole, width - whole, of, 0.0f);
    if (!inside) return;
    out[label] = own;  // raw again, had it been written over
    gradient_some<V, T, PLAIN, ENTROPY, false>(tile, out, out, label, 1, of, of.g);
}

template <int LANES, class T>
INLINE void fold_as(const Tile& tile, const Sums& sums, int64_t row) {
    const bool plain = !tile.bias && tile.softcap == 0 && !sums.dot && !sums.total && !sums.square;
    const bool write = row < sums.gradient;
    if (plain)
        write ? fold_row<LANES, T, true, false, true>(tile, sums, row)
              : fold_row<LANES, T, true, false, false>(tile, sums, row);
    else
        write ? fold_row<LANES, T, false, true, true>(tile, sums, row)
              : fold_row<LANES, T, false, true, false>(tile, sums, row);
}

template <int LANES, class T>
INLINE void gradient_as(const Tile& tile, const Upstream& upstream, int64_t row) {
    if (upstream.e)
        gradient_row<LANES, T, false, true>(tile, upstream, row);
    else if (tile.bias || tile.softcap != 0)
        gradient_row<LANES, T, false, false>(tile, upstream, row);
    else
        gradient_row<LANES, T, true, false>(tile, upstream, row);
}

typedef void Fold(const Tile&, const Sums&, int64_t);
typedef void Gradient(const Tile&, const Upstream&, int64_t);

#define ROWS(NAME, LANES, ...)                                                                               \
    __VA_ARGS__ void fold_##NAME(const Tile& tile, const Sums& sums, int64_t row) {                          \
        tile.is_bf16 ? fold_as<LANES, bf16>(tile, sums, row) : fold_as<LANES, float>(tile, sums, row);       \
    }                                                                                                        \
    __VA_ARGS__ void gradient_##NAME(const Tile& tile, const Upstream& upstream, int64_t row) {              \
        tile.is_bf16 ? gradient_as<LANES, bf16>(tile, upstream, row)                                         \
                     : gradient_as<LANES, float>(tile, upstream, row);                                       \
    }

ROWS(any, 4)
#if defined(__x86_64__)
ROWS(avx2, 8, __attribute__((target("avx2,fma"))))
ROWS(avx512, 16, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))))
#endif

struct Functions {
    int32_t lanes;
    Fold* fold;
    Gradient* gradient;
};

// The widest vectors that the processor has, of at most so many lanes.
Functions widest(int32_t most) {
#if defined(__x86_64__)
    if (most >= 16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return {16, fold_avx512, gradient_avx512};
    if (most >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return {8, fold_avx2, gradient_avx2};
#endif
    (void)most;
    return {4, fold_any, gradient_any};
}

Functions functions = widest(16);

}  // namespace

extern "C" {

// top = max z, sum = sum exp(z - top), label = z of the label or 0, dot = sum exp(z - top) (z - top), total = sum z,
// square = sum exp(z - top)^2; out = exp(z - top) times the softcap's slope, 0 at the label.
void prefkern_fold(const Tile* tile, const Sums* sums) {
    Fold* const fold = functions.fold;
#pragma omp parallel for schedule(static) num_threads(tile->threads)
    for (int64_t row = 0; row < tile->rows; ++row) fold(*tile, *sums, row);
}

// out = (g (onehot - p) - e p (log p + entropy)) times the softcap's slope, p = exp(z - lse); 0 in ignored rows.
void prefkern_gradient(const Tile* tile, const Upstream* upstream) {
    Gradient* const gradient = functions.gradient;
#pragma omp parallel for schedule(static) num_threads(tile->threads)
    for (int64_t row = 0; row < tile->rows; ++row) gradient(*tile, *upstream, row);
}

// For tests: vectors of at most so many lanes from now on. Returns how many there are.
int32_t prefkern_limit_lanes(int32_t most) {
    functions = widest(most);
    return functions.lanes;
}
}
