/* The solver's inner loops on a CPU; see native.py. Compiled without contraction: no product is fused with a sum.

   Arrays are fp32 and contiguous, columns first: [E, I, O], the rows of a matrix lie side by side. A call does the
   tiles `first` to `last` of E times ceil(O / ROWS); tiles do not touch each other, so threads share a call by them. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define VECTORS 4
#define ROWS (LANES * VECTORS)
#define COLUMNS 128 /* of a block at most: 32 KB a tile */
#define LEAF 4      /* columns whose moves reach the others together, from registers */

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef union {
    Vector v[VECTORS];
    float x[ROWS];
} Line;

typedef struct {
    int32_t is_float, has_zero;
    float low, high, least_binade, steps;
} Grid;

static inline float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* 1.5 * 2^23: a float below 2^22 that is added to it is rounded to a whole number, half to even */
#define WHOLE 12582912.0f

/* The nearest grid value, as formats.quantize_values rounds. */
static inline float grid_value(float x, float zero, int is_float, int has_zero, Grid grid) {
    if (is_float) {
        x = clamp(x, grid.low, grid.high);
        int32_t bits;
        memcpy(&bits, &x, sizeof bits);
        bits &= 0x7F800000;
        float binade;
        memcpy(&binade, &bits, sizeof bits);
        binade = binade < grid.least_binade ? grid.least_binade : binade;
        float shift = binade * grid.steps;
        return (x + shift) - shift;
    }
    x = (clamp(x, -4194303.0f, 4194303.0f) + WHOLE) - WHOLE;
    return has_zero ? clamp(x + zero, grid.low, grid.high) - zero : clamp(x, grid.low, grid.high);
}

/* A function for each kind of grid, so that what is asked of its kind is known when it is compiled. */
#define BY_KIND(function, ...)                                                                                         \
    if (grid->is_float) function(__VA_ARGS__, 1, 0);                                                                   \
    else if (grid->has_zero) function(__VA_ARGS__, 0, 1);                                                              \
    else function(__VA_ARGS__, 0, 0);
#define EACH_KIND static inline __attribute__((always_inline)) void

/* t[k] += Σ reach[j][k] * moved[j] for k from `begin` on, in the order of j. */
static inline void spread(Line *restrict t, const float *restrict reach, int64_t stride, const Line *restrict moved,
                          int64_t leaf, int64_t begin, int64_t end) {
    if (leaf == LEAF) {
        for (int64_t k = begin; k < end; k++)
            for (int i = 0; i < VECTORS; i++) {
                Vector sum = t[k].v[i];
                for (int j = 0; j < LEAF; j++) sum += moved[j].v[i] * reach[j * stride + k];
                t[k].v[i] = sum;
            }
        return;
    }
    for (int64_t j = 0; j < leaf; j++)
        for (int64_t k = begin; k < end; k++)
            for (int i = 0; i < VECTORS; i++) t[k].v[i] += moved[j].v[i] * reach[j * stride + k];
}

typedef struct {
    int64_t at, count, reach; /* of the tile's first column in [E, I, O]; its rows; of the block in [E, I, I] */
    int64_t in_block;         /* of the first column in [E, width, O] */
} Tile;

static inline Tile tile_of(int64_t index, int64_t columns, int64_t rows, int64_t start, int64_t width) {
    int64_t tiles = (rows + ROWS - 1) / ROWS, expert = index / tiles, row = index % tiles * ROWS;
    return (Tile){(expert * columns + start) * rows + row, rows - row < ROWS ? rows - row : ROWS,
                  (expert * columns + start) * columns + start, expert * width * rows + row};
}

static inline void load(Line *t, const float *from, int64_t stride, int64_t width, int64_t count) {
    for (int64_t j = 0; j < width; j++) {
        memcpy(t[j].x, from + j * stride, count * sizeof(float));
        if (count < ROWS) memset(t[j].x + count, 0, (ROWS - count) * sizeof(float));
    }
}

static inline void store(float *to, const Line *t, int64_t stride, int64_t width, int64_t count) {
    for (int64_t j = 0; j < width; j++) memcpy(to + j * stride, t[j].x, count * sizeof(float));
}

/* Columns lie far apart, so the processor does not see by itself which ones come next. */
static inline void fetch(const float *from, int64_t stride, int64_t begin, int64_t end, int64_t count) {
    for (int64_t j = begin; j < end; j++)
        for (int64_t r = 0; r < count; r += LANES) __builtin_prefetch(from + j * stride + r);
}

EACH_KIND walk(float *restrict target, const float *restrict w, const float *restrict step, const float *restrict zero,
               const float *restrict feedback, float *restrict value, float *restrict error, int64_t columns,
               int64_t rows, int64_t start, int64_t width, int64_t first, int64_t last, Grid grid, int is_float,
               int has_zero) {
    for (int64_t index = first; index < last; index++) {
        Tile tile = tile_of(index, columns, rows, start, width);
        const float *reach = feedback + tile.reach;
        Line t[COLUMNS], moved[LEAF] = {0};
        load(t, target + tile.at, rows, width, tile.count);
        for (int64_t leaf = 0; leaf < width; leaf += LEAF) {
            int64_t end = leaf + LEAF < width ? leaf + LEAF : width;
            int64_t next = end + LEAF < width ? end + LEAF : width;
            const float *soon[] = {w, step, value, error};
            for (int i = 0; i < 4; i++) fetch(soon[i] + tile.at, rows, end, next, tile.count);
            for (int64_t j = leaf; j < end; j++) {
                int64_t at = tile.at + j * rows;
                Line *by = moved + j - leaf;
                for (int64_t r = 0; r < tile.count; r++) {
                    float v = grid_value(t[j].x[r] / step[at + r], has_zero ? zero[at + r] : 0, is_float, has_zero, grid);
                    float q = v * step[at + r];
                    value[at + r] = v;
                    error[at + r] = by->x[r] = w[at + r] - q;
                    t[j].x[r] -= q;
                }
                spread(t, reach + j * columns, columns, by, 1, j + 1, end);
            }
            spread(t, reach + leaf * columns, columns, moved, end - leaf, end, width);
        }
        store(target + tile.at, t, rows, width, tile.count);
    }
}

/* GPTQ over the columns start … start + width, at most COLUMNS of them: values and errors w - q; t - q stays. */
void walk_block(float *target, const float *w, const float *step, const float *zero, const float *feedback,
                float *value, float *error, int64_t columns, int64_t rows, int64_t start, int64_t width, int64_t first,
                int64_t last, const Grid *grid) {
    BY_KIND(walk, target, w, step, zero, feedback, value, error, columns, rows, start, width, first, last, *grid)
}

EACH_KIND descend(float *restrict gradient, float *restrict q, const float *restrict step, const float *restrict zero,
                  const float *restrict h, float *restrict value, float *restrict moved, int64_t columns, int64_t rows,
                  int64_t start, int64_t width, int64_t first, int64_t last, Grid grid, int is_float, int has_zero) {
    for (int64_t index = first; index < last; index++) {
        Tile tile = tile_of(index, columns, rows, start, width);
        const float *reach = h + tile.reach;
        Line t[COLUMNS], by_leaf[LEAF] = {0};
        load(t, gradient + tile.in_block, rows, width, tile.count);
        for (int64_t leaf = 0; leaf < width; leaf += LEAF) {
            int64_t end = leaf + LEAF < width ? leaf + LEAF : width;
            int64_t next = end + LEAF < width ? end + LEAF : width;
            const float *soon[] = {q + tile.at, step + tile.at, value + tile.at, moved + tile.in_block};
            for (int i = 0; i < 4; i++) fetch(soon[i], rows, end, next, tile.count);
            for (int64_t j = leaf; j < end; j++) {
                int64_t at = tile.at + j * rows, in_block = tile.in_block + j * rows;
                float inverse = 1 / reach[j * columns + j];
                Line *by = by_leaf + j - leaf;
                for (int64_t r = 0; r < tile.count; r++) {
                    float old = q[at + r], best = old + t[j].x[r] * inverse;
                    float v = grid_value(best / step[at + r], has_zero ? zero[at + r] : 0, is_float, has_zero, grid);
                    float new = v * step[at + r];
                    value[at + r] = v;
                    q[at + r] = new;
                    moved[in_block + r] = by->x[r] = old - new;
                }
                spread(t, reach + j * columns, columns, by, 1, j + 1, end);
            }
            spread(t, reach + leaf * columns, columns, by_leaf, end - leaf, end, width);
        }
        store(gradient + tile.in_block, t, rows, width, tile.count);
    }
}

/* Coordinate descent over the same columns; gradient and moved are [E, width, O]. */
void descend_block(float *gradient, float *q, const float *step, const float *zero, const float *h, float *value,
                   float *moved, int64_t columns, int64_t rows, int64_t start, int64_t width, int64_t first,
                   int64_t last, const Grid *grid) {
    BY_KIND(descend, gradient, q, step, zero, h, value, moved, columns, rows, start, width, first, last, *grid)
}

EACH_KIND measure(const float *restrict w, const float *restrict step, const float *restrict zero,
                  const float *restrict importance, float *restrict error, int64_t groups_a_row, int64_t size,
                  int64_t first, int64_t last, Grid grid, int is_float, int has_zero) {
    for (int64_t group = first; group < last; group++) {
        const float *part = w + group * size, *cost = importance ? importance + group % groups_a_row * size : 0;
        float by = step[group], z = has_zero ? zero[group] : 0, sums[LANES] = {0}, total = 0;
        for (int64_t i = 0; i < size; i += LANES) {
            int64_t count = size - i < LANES ? size - i : LANES;
            float squares[LANES] = {0};
            for (int64_t k = 0; k < count; k++) {
                float e = grid_value(part[i + k] / by, z, is_float, has_zero, grid) * by - part[i + k];
                squares[k] = e * e;
            }
            for (int64_t k = 0; k < count; k++) sums[k] += cost ? squares[k] * cost[i + k] : squares[k];
        }
        for (int k = 0; k < LANES; k++) total += sums[k];
        error[group] = total;
    }
}

/* Σ importance * (rounded - w)² of groups first … last of `size` weights; importance is that of a row's groups. */
void rounding_errors(const float *w, const float *step, const float *zero, const float *importance, float *error,
                     int64_t groups_a_row, int64_t size, int64_t first, int64_t last, const Grid *grid) {
    BY_KIND(measure, w, step, zero, importance, error, groups_a_row, size, first, last, *grid)
}
