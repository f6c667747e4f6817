/* What a forward pass does between its products, in bf16 on a CPU; see native.py.

   Arrays are contiguous. Numbers are bf16, computed in fp32 and rounded once, half to even; where torch rounds between
   two steps it is said. A call does the parts `first` to `last` of its work; parts do not touch each other. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../parts.h"
#include "../tiles.h"

#define LANES 16
#define AHEAD 2 /* tokens whose rows are fetched in advance */

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef uint16_t bf16;

static inline Floats all(float x) { return (Floats){0} + x; }

static inline Floats widen(const bf16 *from) {
    Halves half;
    memcpy(&half, from, sizeof half);
    return (Floats)(__builtin_convertvector(half, Bits) << 16);
}

/* The bits of the nearest bf16; a NaN stays one, since no operation makes one with all bits set. */
static inline Bits rounded(Floats x) {
    Bits bits = (Bits)x;
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

static inline void narrow(Floats x, bf16 *to) {
    Halves half = __builtin_convertvector(rounded(x), Halves);
    memcpy(to, &half, sizeof half);
}

/* As if it had been written as bf16 and read again. */
static inline Floats through(Floats x) { return (Floats)(rounded(x) << 16); }

static inline float sum(Floats x) {
    float y[LANES];
    memcpy(y, &x, sizeof y);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] += y[i + half];
    return y[0];
}

static inline float largest(Floats x) {
    float y[LANES];
    memcpy(y, &x, sizeof y);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] = y[i] > y[i + half] ? y[i] : y[i + half];
    return y[0];
}

static inline Floats choose(Ints is, Floats a, Floats b) { return (Floats)(((Ints)a & is) | ((Ints)b & ~is)); }

/* e to the x for x up to 88, 3e-6 off at most; what is below -87 counts as -87. NaN stays NaN. */
static inline Floats exponential(Floats x) {
    const float whole = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to a whole number */
    x = choose(x < -87.0f, all(-87.0f), x) * 1.44269504f;
    Floats shifted = x + whole, r = x - (shifted - whole);
    Floats y = r * 1.33335581e-3f + 9.61812911e-3f; /* 2^r, |r| <= .5, by its Taylor series */
    y = y * r + 5.55041087e-2f;
    y = y * r + 2.40226507e-1f;
    y = y * r + 6.93147181e-1f;
    y = y * r + 1.0f;
    return (Floats)((Ints)y + ((Ints)shifted << 23)); /* the last bits of `shifted` are the power of two */
}

/* Rows of `size` numbers, each over the root of its mean square, times the weights; torch rounds before the weights. */
void rms_norm(const Given *given, int64_t first, int64_t last) {
    const bf16 *x = POINTER, *weight = POINTER;
    bf16 *out = POINTER;
    int64_t size = INTEGER;
    float eps = REAL;
    for (int64_t row = first; row < last; row++) {
        const bf16 *from = x + row * size;
        bf16 *to = out + row * size;
        Floats a = all(0), b = all(0);
        for (int64_t i = 0; i < size; i += 2 * LANES) {
            Floats u = widen(from + i), v = i + LANES < size ? widen(from + i + LANES) : all(0);
            a += u * u;
            b += v * v;
        }
        Floats scale = all(1.0f / __builtin_sqrtf(sum(a + b) / (float)size + eps));
        for (int64_t i = 0; i < size; i += LANES) narrow(through(widen(from + i) * scale) * widen(weight + i), to + i);
    }
}

/* Heads [B, L, H, C] to [B, H, L, C], their first `width` channels turned by halves; a part is a sequence's position.
   Cosines and sines are fp32 [L, width]. */
void rotate(const Given *given, int64_t first, int64_t last) {
    const bf16 *x = POINTER;
    const float *cosine = POINTER, *sine = POINTER;
    bf16 *out = POINTER;
    int64_t length = INTEGER, heads = INTEGER, channels = INTEGER, width = INTEGER;
    int64_t half = width / 2;
    for (int64_t part = first; part < last; part++) {
        int64_t sequence = part / length, position = part % length;
        const float *c = cosine + position * width, *s = sine + position * width;
        for (int64_t head = 0; head < heads; head++) {
            const bf16 *from = x + (part * heads + head) * channels;
            bf16 *to = out + ((sequence * heads + head) * length + position) * channels;
            for (int64_t i = 0; i < half; i += LANES) {
                Floats u = widen(from + i), v = widen(from + half + i), cu, cv, su, sv;
                memcpy(&cu, c + i, sizeof cu);
                memcpy(&cv, c + half + i, sizeof cv);
                memcpy(&su, s + i, sizeof su);
                memcpy(&sv, s + half + i, sizeof sv);
                narrow(u * cu - v * su, to + i);
                narrow(v * cv + u * sv, to + half + i);
            }
            memcpy(to + width, from + width, (size_t)(channels - width) * sizeof *to);
        }
    }
}

/* Probabilities of a row of fp32 scores, times `scale`, of which begin … end are seen; the scores are used up. */
static inline void softmax_row(float *from, bf16 *to, int64_t keys, int64_t begin, int64_t end, float scale) {
    int64_t low = begin / LANES * LANES, high = (end + LANES - 1) / LANES * LANES;
    for (int64_t i = low; i < begin; i++) from[i] = -__builtin_inff();
    for (int64_t i = end; i < high; i++) from[i] = -__builtin_inff();
    Floats most = all(-__builtin_inff()), total = all(0), x;
    for (int64_t i = low; i < high; i += LANES) {
        memcpy(&x, from + i, sizeof x);
        most = choose(most > x, most, x);
    }
    float top = largest(most);
    for (int64_t i = low; i < high; i += LANES) {
        memcpy(&x, from + i, sizeof x);
        x = exponential((x - top) * scale);
        total += x;
        memcpy(from + i, &x, sizeof x);
    }
    Floats share = all(1.0f / sum(total));
    memset(to, 0, (size_t)low * sizeof *to);
    memset(to + high, 0, (size_t)(keys - high) * sizeof *to);
    for (int64_t i = low; i < high; i += LANES) {
        memcpy(&x, from + i, sizeof x);
        narrow(x * share, to + i);
    }
    for (int64_t i = low; i < begin; i++) to[i] = 0;
    for (int64_t i = end; i < high; i++) to[i] = 0;
}

/* Probabilities of scores [S, Q, K]; query `start + i` sees keys `first_key + j` up to itself, `window` at most. A part
   is a row. */
void softmax(const Given *given, int64_t first, int64_t last) {
    float *scores = POINTER;
    bf16 *out = POINTER;
    int64_t queries = INTEGER, keys = INTEGER, start = INTEGER, first_key = INTEGER, window = INTEGER;
    for (int64_t row = first; row < last; row++) {
        int64_t end = start - first_key + row % queries + 1, begin = end > window ? end - window : 0;
        softmax_row(scores + row * keys, out + row * keys, keys, begin, end, 1.0f);
    }
}

#ifdef HAS_TILES

/* Rows [length, channels] as the right matrix of a product with other rows: [panels of 16 rows, steps of 32 channels]. */
static void pack_keys(const bf16 *rows, int64_t stride, int64_t length, int64_t channels, Pairs *packed) {
    for (int64_t panel = 0; panel < length; panel += SIDE)
        for (int64_t step = 0; step < channels; step += STEP, packed += SIDE) {
            Pairs line[SIDE];
            for (int i = 0; i < SIDE; i++) memcpy(line + i, rows + (panel + i) * stride + step, sizeof line[i]);
            transpose(line, packed);
        }
}

/* Rows [length, channels] as the right matrix of a product over the rows: [panels of 16 channels, steps of 32 rows]. */
static void pack_values(const bf16 *rows, int64_t stride, int64_t length, int64_t channels, Pairs *packed) {
    for (int64_t panel = 0; panel < channels; panel += SIDE)
        for (int64_t row = 0; row < length; row += 2, packed++)
            *packed = (Bits)widen(rows + row * stride + panel) >> 16 | (Bits)widen(rows + (row + 1) * stride + panel);
}

/* Sums 0 to 3 of `steps` products of two panels of 16 lines, `left_stride` numbers apart, and two packed ones. */
static inline void multiply(const bf16 *left, int64_t left_stride, const Pairs *right, int64_t panel, int64_t steps) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; steps; steps--, left += STEP, right += SIDE) {
        _tile_loadd(6, right, sizeof(Pairs));
        _tile_loadd(7, right + panel, sizeof(Pairs));
        _tile_loadd(4, left, left_stride * (int64_t)sizeof *left);
        _tile_loadd(5, left + SIDE * left_stride, left_stride * (int64_t)sizeof *left);
        ALL_FOUR
    }
}

/* The first `count` lines of sums [32, 32] as bf16, `stride` numbers apart. */
static inline void narrow_sums(const float *sums, bf16 *out, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < STEP; c += LANES) {
            Floats x;
            memcpy(&x, sums + i * STEP + c, sizeof x);
            narrow(x, out + i * stride + c);
        }
}

/* Causal attention: queries and keys [B, H or K, L, C], values [B, K, L, V], out [B, L, H, V]; `strides` are those of the
   first three axes of queries, keys and values. All lengths are multiples of 32. Scores are fp32, probabilities rounded.
   A part is a sequence's head of keys, with all the queries' that read it. Does nothing where memory is short. */
void attention(const Given *given, int64_t first, int64_t last) {
    bf16 *out = POINTER;
    int32_t *is_done = POINTER;
    const int64_t *strides = POINTER;
    const bf16 *q = POINTER, *k = POINTER, *v = POINTER;
    int64_t length = INTEGER, channels = INTEGER, values = INTEGER, heads = INTEGER, key_heads = INTEGER;
    int64_t window = INTEGER;
    float scale = REAL;
    /* lines as far apart as a power of two would drive each other out of the cache */
    int64_t apart = length + STEP, repeats = heads / key_heads, steps = channels / STEP, blocks = length / STEP;
    size_t size = (size_t)(length * (channels + values) * 2 + STEP * apart * 6 + STEP * STEP * 4);
    char *room = aligned_alloc(64, size);
    if (!room) return;
    Pairs *keys = (Pairs *)room, *packed = keys + length * channels / STEP;
    float *scores = (float *)(packed + length * values / STEP), *sums = scores + STEP * apart;
    bf16 *shares = (bf16 *)(sums + STEP * STEP);
    configure_tiles();
    for (int64_t part = first; part < last; part++) {
        int64_t sequence = part / key_heads, key_head = part % key_heads;
        pack_keys(k + sequence * strides[3] + key_head * strides[4], strides[5], length, channels, keys);
        pack_values(v + sequence * strides[6] + key_head * strides[7], strides[8], length, values, packed);
        for (int64_t head = key_head * repeats; head < (key_head + 1) * repeats; head++)
            for (int64_t start = 0; start < length; start += STEP) {
                const bf16 *rows = q + sequence * strides[0] + head * strides[1] + start * strides[2];
                int64_t from = start >= window ? (start - window + 1) / STEP * STEP : 0, seen = start + STEP - from;
                BARRIER;
                for (int64_t j = 0; j < seen; j += STEP) {
                    multiply(rows, strides[2], keys + (from + j) / SIDE * steps * SIDE, steps * SIDE, steps);
                    store_sums(scores + j, apart);
                }
                BARRIER;
                for (int64_t i = 0; i < STEP; i++) {
                    int64_t end = seen - STEP + i + 1, begin = end > window ? end - window : 0;
                    softmax_row(scores + i * apart, shares + i * apart, seen, begin, end, scale);
                }
                BARRIER;
                for (int64_t j = 0; j < values; j += STEP) {
                    multiply(shares, apart, packed + (j / SIDE * blocks + from / STEP) * SIDE, blocks * SIDE,
                             seen / STEP);
                    store_sums(sums, STEP);
                    BARRIER;
                    narrow_sums(sums, out + ((sequence * length + start) * heads + head) * values + j, heads * values, STEP);
                }
            }
    }
    _tile_release();
    free(room);
    __atomic_fetch_add(is_done, (int32_t)(last - first), __ATOMIC_RELAXED);
}

/* Weights [E, O, I] for `expert_products`; a part is 16 outputs of an expert. */
void pack_weights(const Given *given, int64_t first, int64_t last) {
    const bf16 *weights = POINTER;
    Pairs *packed = POINTER;
    int64_t inputs = INTEGER;
    for (int64_t part = first; part < last; part++)
        pack_keys(weights + part * SIDE * inputs, inputs, SIDE, inputs, packed + part * inputs / STEP * SIDE);
}

/* Rows [R, I] times packed weights of their experts: [R, O]. A part is the rows begin … end, 32 at most, of `expert`. */
void expert_products(const Given *given, int64_t first, int64_t last) {
    const bf16 *x = POINTER;
    const Pairs *packed = POINTER;
    bf16 *out = POINTER;
    const int64_t *expert = POINTER, *begin = POINTER, *end = POINTER;
    int64_t rows = INTEGER, inputs = INTEGER, outputs = INTEGER;
    enum { WIDEST = 1024 }; /* inputs */
    int64_t steps = inputs / STEP;
    bf16 rest[STEP * WIDEST];
    float sums[STEP * STEP];
    configure_tiles();
    for (int64_t part = first; part < last; part++) {
        const bf16 *from = x + begin[part] * inputs;
        int64_t count = end[part] - begin[part];
        if (begin[part] + STEP > rows) { /* nothing lies behind the last rows */
            memset(rest, 0, (size_t)(STEP * inputs) * sizeof *rest);
            from = memcpy(rest, from, (size_t)(count * inputs) * sizeof *rest);
        }
        const Pairs *weights = packed + expert[part] * outputs / SIDE * steps * SIDE;
        for (int64_t o = 0; o < outputs; o += STEP, weights += 2 * steps * SIDE) {
            BARRIER;
            multiply(from, inputs, weights, steps * SIDE, steps);
            store_sums(sums, STEP);
            BARRIER;
            narrow_sums(sums, out + begin[part] * outputs + o, outputs, count);
        }
    }
    _tile_release();
}

#endif

/* silu(gate) * up; torch rounds between the two. A part is LANES numbers. */
void swiglu(const Given *given, int64_t first, int64_t last) {
    const bf16 *gate = POINTER, *up = POINTER;
    bf16 *out = POINTER;
    for (int64_t i = first * LANES; i < last * LANES; i += LANES) {
        Floats x = widen(gate + i);
        Ints is_low = x < -87.0f; /* zero there, and no number for minus infinity, as x / (1 + e) would be */
        Floats silu = choose(is_low, x * 0.0f, x / (exponential(choose(is_low, all(0), -x)) + 1.0f));
        narrow(through(silu) * widen(up + i), out + i);
    }
}

/* Σ_k score[k] * rows[place[k]] of each token; a part is a token. Scores are fp32. */
void combine(const Given *given, int64_t first, int64_t last) {
    const bf16 *rows = POINTER;
    const int64_t *place = POINTER;
    const float *score = POINTER;
    bf16 *total = POINTER;
    int64_t top_k = INTEGER, size = INTEGER;
    for (int64_t token = first; token < last; token++) {
        const int64_t *at = place + token * top_k;
        const float *weight = score + token * top_k;
        if (token + AHEAD < last)
            for (int64_t k = 0; k < top_k; k++)
                for (int64_t i = 0; i < size; i += 32) __builtin_prefetch(rows + at[AHEAD * top_k + k] * size + i);
        for (int64_t i = 0; i < size; i += LANES) {
            Floats x = all(0);
            for (int64_t k = 0; k < top_k; k++) x += widen(rows + at[k] * size + i) * weight[k];
            narrow(x, total + token * size + i);
        }
    }
}
