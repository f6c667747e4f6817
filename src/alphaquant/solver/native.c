/* The solver's inner loops on a CPU; see native.py. Compiled without contraction: no product is fused with a sum.

   Arrays are fp32 and contiguous, columns first: [E, I, O], the rows of a matrix lie side by side. A call does the
   tiles `first` to `last` of E times ceil(O / ROWS); tiles do not touch each other, so threads share a call by them. */

#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>

#include "../parts.h"
#include "../tiles.h"

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

static inline float total_of(const float *lanes) {
    float total = 0;
    for (int k = 0; k < LANES; k++) total += lanes[k];
    return total;
}

/* 1.5 * 2^23: a float below 2^22 that is added to it is rounded to a whole number, half to even */
#define WHOLE 12582912.0f

/* The power of two that a float's steps go by: the least one for all below it. */
static inline float binade_of(float x, Grid grid) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= 0x7F800000;
    float binade;
    memcpy(&binade, &bits, sizeof bits);
    return binade < grid.least_binade ? grid.least_binade : binade;
}

/* The nearest grid value, as formats.quantize_values rounds. */
static inline float grid_value(float x, float zero, int is_float, int has_zero, Grid grid) {
    if (is_float) {
        x = clamp(x, grid.low, grid.high);
        float shift = binade_of(x, grid) * grid.steps;
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

/* One column: its values, how far what they stand for is off the weights, and t - q in place. */
EACH_KIND walk_column(Line *restrict t, Line *restrict error, const float *restrict w, const float *restrict step,
                      const float *restrict zero, float *restrict value, int64_t count, Grid grid, int is_float,
                      int has_zero) {
    for (int64_t r = 0; r < count; r++) {
        float v = grid_value(t->x[r] / step[r], has_zero ? zero[r] : 0, is_float, has_zero, grid);
        float q = v * step[r];
        value[r] = v;
        error->x[r] = w[r] - q;
        t->x[r] -= q;
    }
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
                walk_column(t + j, by, w + at, step + at, has_zero ? zero + at : 0, value + at, tile.count, grid, is_float,
                            has_zero);
                memcpy(error + at, by->x, tile.count * sizeof(float));
                spread(t, reach + j * columns, columns, by, 1, j + 1, end);
            }
            spread(t, reach + leaf * columns, columns, moved, end - leaf, end, width);
        }
        store(target + tile.at, t, rows, width, tile.count);
    }
}

/* GPTQ over the columns start … start + width, at most COLUMNS of them: values and errors w - q; t - q stays. */
void walk_block(const Given *given, int64_t first, int64_t last) {
    float *target = POINTER;
    const float *w = POINTER, *step = POINTER, *zero = POINTER, *feedback = POINTER;
    float *value = POINTER, *error = POINTER;
    int64_t columns = INTEGER, rows = INTEGER, start = INTEGER, width = INTEGER;
    const Grid *grid = POINTER;
    BY_KIND(walk, target, w, step, zero, feedback, value, error, columns, rows, start, width, first, last, *grid)
}

/* One column: the best values given all others, from the weights that they stand for, and how far these move. */
EACH_KIND descend_column(const Line *restrict t, Line *restrict moved, float *restrict q, float inverse,
                         const float *restrict step, const float *restrict zero, float *restrict value, int64_t count,
                         Grid grid, int is_float, int has_zero) {
    for (int64_t r = 0; r < count; r++) {
        float old = q[r], best = old + t->x[r] * inverse;
        float v = grid_value(best / step[r], has_zero ? zero[r] : 0, is_float, has_zero, grid);
        float new = v * step[r];
        value[r] = v;
        q[r] = new;
        moved->x[r] = old - new;
    }
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
                Line *by = by_leaf + j - leaf;
                descend_column(t + j, by, q + at, 1 / reach[j * columns + j], step + at, has_zero ? zero + at : 0,
                               value + at, tile.count, grid, is_float, has_zero);
                memcpy(moved + in_block, by->x, tile.count * sizeof(float));
                spread(t, reach + j * columns, columns, by, 1, j + 1, end);
            }
            spread(t, reach + leaf * columns, columns, by_leaf, end - leaf, end, width);
        }
        store(gradient + tile.in_block, t, rows, width, tile.count);
    }
}

/* Coordinate descent over the same columns; gradient and moved are [E, width, O]. */
void descend_block(const Given *given, int64_t first, int64_t last) {
    float *gradient = POINTER, *q = POINTER;
    const float *step = POINTER, *zero = POINTER, *h = POINTER;
    float *value = POINTER, *moved = POINTER;
    int64_t columns = INTEGER, rows = INTEGER, start = INTEGER, width = INTEGER;
    const Grid *grid = POINTER;
    BY_KIND(descend, gradient, q, step, zero, h, value, moved, columns, rows, start, width, first, last, *grid)
}

EACH_KIND measure(const float *restrict w, const float *restrict step, const float *restrict zero,
                  const float *restrict importance, float *restrict error, int32_t *restrict best, int64_t groups,
                  int64_t groups_a_row, int64_t size, int64_t candidates, int64_t first, int64_t last, Grid grid,
                  int is_float, int has_zero) {
    for (int64_t group = first; group < last; group++) {
        const float *part = w + group * size, *cost = importance ? importance + group % groups_a_row * size : 0;
        float least = 0;
        for (int64_t candidate = 0; candidate < candidates; candidate++) {
            int64_t at = candidate * groups + group;
            float by = step[at], z = has_zero ? zero[at] : 0, sums[LANES] = {0};
            for (int64_t i = 0; i < size; i += LANES) {
                int64_t count = size - i < LANES ? size - i : LANES;
                float squares[LANES] = {0};
                for (int64_t k = 0; k < count; k++) {
                    float e = grid_value(part[i + k] / by, z, is_float, has_zero, grid) * by - part[i + k];
                    squares[k] = e * e;
                }
                for (int64_t k = 0; k < count; k++) sums[k] += cost ? squares[k] * cost[i + k] : squares[k];
            }
            float total = total_of(sums);
            if (!best) error[at] = total;
            else if (!candidate || total < least) {
                least = error[group] = total;
                best[group] = (int32_t)candidate;
            }
        }
    }
}

/* Σ importance * (rounded - w)² of groups of `size` weights, by each candidate's step; importance is that of a row's.
   Where it is asked which is the best, the first of equal ones, its error alone. */
void rounding_errors(const Given *given, int64_t first, int64_t last) {
    const float *w = POINTER, *step = POINTER, *zero = POINTER, *importance = POINTER;
    float *error = POINTER;
    int32_t *best = POINTER;
    int64_t groups = INTEGER, groups_a_row = INTEGER, size = INTEGER, candidates = INTEGER;
    const Grid *grid = POINTER;
    BY_KIND(measure, w, step, zero, importance, error, best, groups, groups_a_row, size, candidates, first, last, *grid)
}

/* Places between grid values (places.py): matrices [E, O, I], their rows one after the other, scales [E, O, G]. A part
   is so many rows of one matrix. */
#define BAND 64

typedef struct {
    int64_t expert, begin, end; /* rows of all matrices */
} Band;

static inline Band band_of(int64_t index, int64_t rows) {
    int64_t bands = (rows + BAND - 1) / BAND, expert = index / bands, begin = index % bands * BAND;
    return (Band){expert, expert * rows + begin, expert * rows + (rows - begin < BAND ? rows : begin + BAND)};
}

/* One over the distance from a grid value to the next one away from zero: a power of two. */
static inline float steps_a_unit(float value, int is_float, Grid grid) {
    return is_float ? WHOLE / (binade_of(value, grid) * grid.steps) : 1;
}

EACH_KIND weigh(const float *restrict place, const float *restrict scale, const float *restrict zero,
                const float *restrict gradient, const float *restrict row_inverse, const float *restrict column_inverse,
                float *restrict row_squares, float *restrict column_squares, float *restrict slope, int64_t rows,
                int64_t columns, int64_t groups, int64_t first, int64_t last, Grid grid, int is_float, int has_zero) {
    int64_t size = columns / groups;
    for (int64_t index = first; index < last; index++) {
        Band band = band_of(index, rows);
        memset(column_squares + index * columns, 0, columns * sizeof(float));
        for (int64_t row = band.begin; row < band.end; row++) {
            float of_row[LANES] = {0};
            for (int64_t g = 0; g < groups; g++) {
                int64_t group = row * groups + g, at = group * size;
                float z = has_zero ? zero[group] : 0, reach = row_inverse[row] / scale[group], along[LANES] = {0};
                const float *by = column_inverse + band.expert * columns + g * size;
                float *squares = column_squares + index * columns + g * size;
                for (int64_t i = 0; i < size; i += LANES) {
                    int64_t count = size - i < LANES ? size - i : LANES;
                    for (int64_t k = 0; k < count; k++) {
                        float v = grid_value(place[at + i + k], z, is_float, has_zero, grid), by_code = gradient[at + i + k];
                        float off = by_code * reach * by[i + k] * steps_a_unit(v, is_float, grid);
                        along[k] += by_code * v;
                        of_row[k] += off * off;
                        squares[i + k] += off * off;
                    }
                }
                slope[group] = total_of(along) * scale[group];
            }
            row_squares[row] = total_of(of_row);
        }
    }
}

/* Sums of squares of how far weights should be off their codes, [E, O] and [parts, I], and slopes of scales. */
void weigh_places(const Given *given, int64_t first, int64_t last) {
    const float *place = POINTER, *scale = POINTER, *zero = POINTER, *gradient = POINTER, *row_inverse = POINTER;
    const float *column_inverse = POINTER;
    float *row_squares = POINTER, *column_squares = POINTER, *slope = POINTER;
    int64_t rows = INTEGER, columns = INTEGER, groups = INTEGER;
    const Grid *grid = POINTER;
    BY_KIND(weigh, place, scale, zero, gradient, row_inverse, column_inverse, row_squares, column_squares, slope, rows,
            columns, groups, first, last, *grid)
}

EACH_KIND draw(float *restrict place, const float *restrict scale, const float *restrict zero,
               const float *restrict gradient, const float *restrict row_inverse, const float *restrict column_inverse,
               const float *restrict row_noise, const float *restrict column_noise, int64_t rows, int64_t columns,
               int64_t groups, float rate, float most, int64_t first, int64_t last, Grid grid, int is_float,
               int has_zero) {
    int64_t size = columns / groups;
    for (int64_t index = first; index < last; index++) {
        Band band = band_of(index, rows);
        for (int64_t row = band.begin; row < band.end; row++)
            for (int64_t g = 0; g < groups; g++) {
                int64_t group = row * groups + g, at = group * size, column = band.expert * columns + g * size;
                float z = has_zero ? zero[group] : 0, reach = row_inverse[row] / scale[group], noise = row_noise[row];
                for (int64_t i = 0; i < size; i++) {
                    float p = place[at + i], v = grid_value(p, z, is_float, has_zero, grid);
                    float limit = most / steps_a_unit(v, is_float, grid);
                    float away = gradient[at + i] * reach * column_inverse[column + i];
                    float way = (v - away - p) * (1 / (1 + noise * column_noise[column + i]) * rate);
                    place[at + i] = p + clamp(way, -limit, limit);
                }
            }
    }
}

/* Moves places toward where their weights should be, the less the noisier, by `most` steps of the grid at most. */
void draw_places(const Given *given, int64_t first, int64_t last) {
    float *place = POINTER;
    const float *scale = POINTER, *zero = POINTER, *gradient = POINTER, *row_inverse = POINTER;
    const float *column_inverse = POINTER, *row_noise = POINTER, *column_noise = POINTER;
    int64_t rows = INTEGER, columns = INTEGER, groups = INTEGER;
    const Grid *grid = POINTER;
    float rate = REAL, most = REAL;
    BY_KIND(draw, place, scale, zero, gradient, row_inverse, column_inverse, row_noise, column_noise, rows, columns,
            groups, rate, most, first, last, *grid)
}

EACH_KIND stand_for(const float *restrict place, const float *restrict scale, const float *restrict zero,
                    float *restrict w, int64_t rows, int64_t columns, int64_t groups, int64_t first, int64_t last,
                    Grid grid, int is_float, int has_zero) {
    int64_t size = columns / groups;
    for (int64_t index = first; index < last; index++) {
        Band band = band_of(index, rows);
        for (int64_t group = band.begin * groups; group < band.end * groups; group++)
            for (int64_t i = group * size; i < (group + 1) * size; i++)
                w[i] = grid_value(place[i], has_zero ? zero[group] : 0, is_float, has_zero, grid) * scale[group];
    }
}

/* The weights that places stand for. */
void weights_of_places(const Given *given, int64_t first, int64_t last) {
    const float *place = POINTER, *scale = POINTER, *zero = POINTER;
    float *w = POINTER;
    int64_t rows = INTEGER, columns = INTEGER, groups = INTEGER;
    const Grid *grid = POINTER;
    BY_KIND(stand_for, place, scale, zero, w, rows, columns, groups, first, last, *grid)
}

#define EDGE 64 /* of a block that is turned at a time */

static inline __attribute__((always_inline)) void turn_items(const char *restrict x, char *restrict out, int64_t rows,
                                                             int64_t columns, int64_t first, int64_t last, size_t item) {
    for (int64_t part = first; part < last; part++) {
        int64_t bands = (columns + EDGE - 1) / EDGE, begin = part % bands * EDGE, matrix = part / bands * rows * columns;
        int64_t end = columns - begin < EDGE ? columns : begin + EDGE;
        for (int64_t row = 0; row < rows; row += EDGE) {
            int64_t stop = rows - row < EDGE ? rows : row + EDGE;
            for (int64_t j = begin; j < end; j++)
                for (int64_t i = row; i < stop; i++)
                    memcpy(out + (matrix + j * rows + i) * item, x + (matrix + i * columns + j) * item, item);
        }
    }
}

/* The transposes [E, C, R] of matrices [E, R, C] of 4-byte numbers or of bytes; a part is EDGE columns of one. */
void turn(const Given *given, int64_t first, int64_t last) {
    const char *x = POINTER;
    char *out = POINTER;
    int64_t rows = INTEGER, columns = INTEGER, item = INTEGER;
    if (item == 4) turn_items(x, out, rows, columns, first, last, 4);
    else turn_items(x, out, rows, columns, first, last, 1);
}

#ifdef HAS_TILES

/* Products of fp32 matrices in tiles of bf16: each number as the sum of two, high·high + high·low + low·high summed in
   fp32. What is left out is 2^-18 of a term.

   A packed matrix is [panels of 16, steps of 32, halves (high, low), 16] lines of 16 pairs. Pairs of a left matrix are
   neighbours in a row of it, those of a right one are neighbours in a column. */

#define PANELS 8 /* of rows that a call works on together */
#define SUBTILES (PANELS * SIDE / ROWS)

/* The nearest bf16, half to even, in the upper 16 bits. */
static inline Pairs to_bf16(Vector x) {
    Pairs bits = (Pairs)x;
    return (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
}

/* Numbers of two lines side by side, as pairs of their high halves and of their low ones. */
static inline void split(Vector x, Vector y, Pairs *high, Pairs *low) {
    Pairs high_x = to_bf16(x), high_y = to_bf16(y);
    *high = high_x >> 16 | high_y;
    *low = to_bf16(x - (Vector)high_x) >> 16 | to_bf16(y - (Vector)high_y);
}

/* The transposes of E matrices [I, I], packed as left ones: panels first … last of E * I / 16. Of an upper triangle,
   only what lies above the diagonal's steps. */
void pack_transposed(const Given *given, int64_t first, int64_t last) {
    const float *x = POINTER;
    Pairs *packed = POINTER;
    int64_t columns = INTEGER, is_upper = INTEGER;
    int64_t panels = columns / SIDE, steps = columns / STEP;
    for (int64_t panel = first; panel < last; panel++) {
        const float *from = x + panel / panels * columns * columns + panel % panels * SIDE;
        int64_t end = is_upper ? panel % panels * SIDE / STEP : steps;
        for (int64_t step = 0; step < end; step++) {
            Pairs line[2 * SIDE];
            for (int64_t i = 0; i < SIDE; i++) {
                Vector pair[2];
                for (int k = 0; k < 2; k++) memcpy(pair + k, from + (step * STEP + 2 * i + k) * columns, sizeof(Vector));
                split(pair[0], pair[1], line + i, line + SIDE + i);
            }
            Pairs *to = packed + (panel * steps + step) * STEP;
            for (int half = 0; half < 2; half++) transpose(line + half * SIDE, to + half * SIDE);
        }
    }
}

/* t[i] += Σ left[i, j] * right[j] over so many steps of j, for two panels of either: 32 lines of t, of 32 numbers. */
static inline void add_product(float *t, const Pairs *left, int64_t left_panel, const Pairs *right, int64_t right_panel,
                               int64_t steps) {
    const int64_t line = sizeof(Pairs);
    load_sums(t, ROWS);
    for (int64_t step = 0; step < steps; step++, left += STEP, right += STEP) {
        _tile_loadd(6, right, line);
        _tile_loadd(7, right + right_panel, line);
        _tile_loadd(4, left + SIDE, line);
        _tile_loadd(5, left + left_panel + SIDE, line);
        ALL_FOUR
        _tile_loadd(4, left, line);
        _tile_loadd(5, left + left_panel, line);
        ALL_FOUR
        _tile_loadd(6, right + SIDE, line);
        _tile_loadd(7, right + right_panel + SIDE, line);
        ALL_FOUR
    }
    store_sums(t, ROWS);
}

typedef Line Lines[SUBTILES][COLUMNS];

/* The same for `width` lines of all subtiles, a multiple of 32; j from `begin` on. */
static inline void add_products(Lines t, const Pairs *left, int64_t left_panel, const Pairs *right, int64_t right_panel,
                                int64_t width, int64_t begin, int64_t end) {
    BARRIER;
    for (int64_t k = 0; k < PANELS * SIDE; k += STEP)
        for (int64_t i = 0; i < width; i += STEP)
            add_product(t[k / ROWS][i].x + k % ROWS, left + i / SIDE * left_panel + begin, left_panel,
                        right + k / SIDE * right_panel + begin, right_panel, (end - begin) / STEP);
    BARRIER;
}

/* Four lines, from column `at` on, as part of a right matrix. */
static inline void pack_leaf(Pairs *packed, int64_t panel, int64_t at, const Line *leaf) {
    for (int i = 0; i < VECTORS; i++) {
        Pairs *to = packed + i * panel + at / STEP * STEP + at % STEP / 2;
        for (int k = 0; k < LEAF / 2; k++) split(leaf[2 * k].v[i], leaf[2 * k + 1].v[i], to + k, to + SIDE + k);
    }
}

/* Rows that a subtile has of the `count` of its tile. */
static inline int64_t rows_of(int64_t sub, int64_t count) {
    int64_t left = count - sub * ROWS;
    return left < 0 ? 0 : left > ROWS ? ROWS : left;
}

/* Of tile `index` of E times ceil(O / 128): where its rows lie. */
typedef struct {
    int64_t count, square, weights, scales, loss;
} Place;

static inline Place place_of(int64_t index, int64_t columns, int64_t rows, int64_t groups) {
    int64_t height = PANELS * SIDE, tiles = (rows + height - 1) / height;
    int64_t expert = index / tiles, row = index % tiles * height, count = rows - row;
    return (Place){count < height ? count : height, expert * columns * columns, expert * columns * rows + row,
                   expert * groups * rows + row, expert * rows + row};
}

EACH_KIND walk_tile(const float *restrict w, const float *restrict step, const float *restrict zero,
                    const float *restrict feedback, const Pairs *restrict packed, const float *restrict curvature,
                    const int32_t *restrict order, float *restrict value, float *restrict loss, Pairs *restrict errors,
                    int64_t columns, int64_t rows, int64_t group, int64_t count, Grid grid, int is_float,
                    int has_zero) {
    Lines t;
    Line total[SUBTILES] = {0};
    for (int64_t start = 0; start < columns; start += COLUMNS) {
        int64_t width = columns - start < COLUMNS ? columns - start : COLUMNS;
        for (int64_t sub = 0; sub < SUBTILES; sub++)
            for (int64_t j = 0; j < width; j++)
                load(t[sub] + j, w + order[start + j] * rows + sub * ROWS, 0, 1, rows_of(sub, count));
        add_products(t, packed + start / SIDE * columns, columns, errors, columns, width, 0, start);
        for (int64_t sub = 0; sub < SUBTILES; sub++) {
            int64_t here = rows_of(sub, count), from = sub * ROWS;
            Line moved[LEAF] = {0}, sum = {0};
            for (int64_t leaf = 0; leaf < width; leaf += LEAF) {
                int64_t end = leaf + LEAF, next = end < width ? end + LEAF : width;
                for (int64_t j = end; j < next; j++) {
                    fetch(value + order[start + j] * rows + from, 0, 0, 1, here);
                    fetch(step + order[start + j] / group * rows + from, 0, 0, 1, here);
                }
                for (int64_t j = leaf; j < end; j++) {
                    int64_t column = order[start + j], at = column * rows + from, scale = column / group * rows + from;
                    walk_column(t[sub] + j, moved + j - leaf, w + at, step + scale, has_zero ? zero + scale : 0,
                                value + at, here, grid, is_float, has_zero);
                    spread(t[sub], feedback + (start + j) * columns + start, 0, moved + j - leaf, 1, j + 1, end);
                }
                spread(t[sub], feedback + (start + leaf) * columns + start, columns, moved, LEAF, end, width);
                pack_leaf(errors + sub * VECTORS * columns, columns, start + leaf, moved);
            }
            for (int64_t j = 0; j < width; j++)
                for (int i = 0; i < VECTORS; i++) sum.v[i] += t[sub][j].v[i] * t[sub][j].v[i] * curvature[start + j];
            for (int i = 0; i < VECTORS; i++) total[sub].v[i] += sum.v[i];
        }
    }
    for (int64_t sub = 0; sub < SUBTILES; sub++)
        memcpy(loss + sub * ROWS, total[sub].x, rows_of(sub, count) * sizeof(float));
}

/* The whole walk: values [E, I, O] in natural order and losses [E, O]. Weights [E, I, O] and scales [E, G, O] lie in
   natural order, the feedback, once more packed, in that of the walk. `errors` has room for those of all tiles; each
   call uses its first's for all of its own, which stays in the cache. */
void walk_all(const Given *given, int64_t first, int64_t last) {
    const float *w = POINTER, *step = POINTER, *zero = POINTER, *feedback = POINTER;
    const Pairs *packed = POINTER;
    const float *curvature = POINTER;
    const int32_t *order = POINTER;
    float *value = POINTER, *loss = POINTER;
    Pairs *errors = POINTER;
    int64_t columns = INTEGER, rows = INTEGER, groups = INTEGER;
    const Grid *grid = POINTER;
    configure_tiles();
    errors += first * PANELS * columns;
    for (int64_t index = first; index < last; index++) {
        Place at = place_of(index, columns, rows, groups);
        int64_t expert = at.square / columns / columns;
        BY_KIND(walk_tile, w + at.weights, step + at.scales, zero ? zero + at.scales : 0, feedback + at.square,
                packed + at.square / SIDE, curvature + expert * columns, order + expert * columns, value + at.weights,
                loss + at.loss, errors, columns, rows, columns / groups, at.count, *grid)
    }
    _tile_release();
}

/* What is left of weights, w - v * step, as a right matrix: columns start … start + width. */
static inline void pack_rest(const float *restrict w, const float *restrict step, const float *restrict value,
                             Pairs *restrict rest, int64_t columns, int64_t rows, int64_t group, int64_t start,
                             int64_t width, int64_t count) {
    for (int64_t sub = 0; sub < SUBTILES; sub++) {
        int64_t here = rows_of(sub, count);
        Line e[LEAF] = {0};
        for (int64_t leaf = start; leaf < start + width; leaf += LEAF) {
            for (int64_t j = leaf; j < leaf + LEAF; j++) {
                int64_t from = j * rows + sub * ROWS, scale = j / group * rows + sub * ROWS;
                for (int64_t r = 0; r < here; r++) e[j - leaf].x[r] = w[from + r] - value[from + r] * step[scale + r];
            }
            pack_leaf(rest + sub * VECTORS * columns, columns, leaf, e);
        }
    }
}

/* sum[r] += Σ_j (w - v * step) * t, or Σ_j v * t without w. */
static inline void add_weighted(float *restrict sum, Lines t, const float *restrict w, const float *restrict step,
                                const float *restrict value, int64_t rows, int64_t group, int64_t start, int64_t width,
                                int64_t count) {
    for (int64_t sub = 0; sub < SUBTILES; sub++) {
        int64_t here = rows_of(sub, count);
        Line total = {0};
        for (int64_t j = 0; j < width; j++) {
            int64_t at = (start + j) * rows + sub * ROWS, scale = (start + j) / group * rows + sub * ROWS;
            for (int64_t r = 0; r < here; r++) {
                float x = w ? w[at + r] - value[at + r] * step[scale + r] : value[at + r];
                total.x[r] += x * t[sub][j].x[r];
            }
        }
        for (int64_t r = 0; r < here; r++) sum[sub * ROWS + r] += total.x[r];
    }
}

/* How scales are stored: so many bits of a float's mantissa are dropped (bf16 16, fp16 13), between two bounds; and
   whether all rows of a tile share them. */
typedef struct {
    int32_t dropped, is_shared;
    float low, high;
} Storage;

static inline float stored(float x, Storage as) {
    uint32_t bits, last = 1u << as.dropped;
    x = clamp(x, as.low, as.high);
    if (as.dropped == 13 && x < 0x1p-14f) return (x + 0.75f) - 0.75f; /* below fp16's normal numbers */
    if (!as.dropped) return x;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + (last / 2 - 1) + (bits >> as.dropped & 1)) & ~(last - 1);
    memcpy(&x, &bits, sizeof bits);
    return x;
}

static inline void share(float *x, int64_t count) {
    float total = 0;
    for (int64_t r = 0; r < count; r++) total += x[r];
    for (int64_t r = 0; r < count; r++) x[r] = total;
}

/* The best scales of a group given its sums (see refine._fitted), by how much they are less, and what that changes. */
static inline void fit(float *restrict step, float *restrict less, float *restrict loss, const float *restrict slope,
                       const float *restrict curve, int64_t count, Storage as) {
    float new[PANELS * SIDE], change[PANELS * SIDE], slopes[PANELS * SIDE], curves[PANELS * SIDE];
    memcpy(slopes, slope, sizeof slopes);
    memcpy(curves, curve, sizeof curves);
    if (as.is_shared) share(slopes, count), share(curves, count);
    for (int64_t r = 0; r < count; r++) {
        float wanted = step[r] + (curves[r] > 0 ? slopes[r] / curves[r] : 0), off = wanted / step[r] - 1;
        new[r] = stored(off < 0.5f && off > -0.5f ? wanted : step[r], as);
        less[r] = step[r] - new[r];
        change[r] = less[r] * (2 * slope[r] + less[r] * curve[r]);
    }
    float own[PANELS * SIDE];
    memcpy(own, change, sizeof own);
    if (as.is_shared) share(change, count);
    for (int64_t r = 0; r < count; r++) {
        int is_better = change[r] < 0;
        step[r] = is_better ? new[r] : step[r];
        less[r] = is_better ? less[r] : 0;
        loss[r] += is_better ? own[r] : 0;
    }
}

/* Coordinate descent over the columns start … start + width, from their gradient; what it changes is added to the loss. */
EACH_KIND descend_tile(Lines t, const float *restrict w, const float *restrict step, const float *restrict zero,
                       float *restrict value, const float *restrict h, Pairs *restrict rest, float *restrict loss,
                       int64_t columns, int64_t rows, int64_t group, int64_t start, int64_t width, int64_t count,
                       Grid grid, int is_float, int has_zero) {
    const float *reach = h + start * columns + start;
    for (int64_t sub = 0; sub < SUBTILES; sub++) {
        int64_t here = rows_of(sub, count), from = sub * ROWS;
        Line moved[LEAF] = {0}, e[LEAF] = {0}, change = {0};
        for (int64_t leaf = 0; leaf < width; leaf += LEAF) {
            int64_t end = leaf + LEAF, next = end < width ? end + LEAF : width;
            fetch(w + start * rows + from, rows, end, next, here);
            fetch(value + start * rows + from, rows, end, next, here);
            for (int64_t j = leaf; j < end; j++) {
                int64_t at = (start + j) * rows + from, scale = (start + j) / group * rows + from;
                float h_jj = reach[j * columns + j];
                Line q, *by = moved + j - leaf;
                for (int64_t r = 0; r < here; r++) q.x[r] = value[at + r] * step[scale + r];
                descend_column(t[sub] + j, by, q.x, 1 / h_jj, step + scale, has_zero ? zero + scale : 0, value + at, here,
                               grid, is_float, has_zero);
                for (int64_t r = 0; r < here; r++) e[j - leaf].x[r] = w[at + r] - q.x[r];
                for (int i = 0; i < VECTORS; i++) change.v[i] += by->v[i] * (2 * t[sub][j].v[i] + by->v[i] * h_jj);
                spread(t[sub], reach + j * columns, 0, by, 1, j + 1, end);
            }
            spread(t[sub], reach + leaf * columns, columns, moved, LEAF, end, width);
            pack_leaf(rest + sub * VECTORS * columns, columns, start + leaf, e);
        }
        for (int64_t r = 0; r < here; r++) loss[from + r] += change.x[r];
    }
}

typedef struct {
    int32_t width, sweeps, fits, descends; /* columns that are changed together, a group where scales are fitted */
} Sweeps;

EACH_KIND refine_tile(const float *restrict w, float *restrict step, const float *restrict zero, float *restrict value,
                      const float *restrict h, const Pairs *restrict packed, Pairs *restrict rest,
                      float *restrict loss, int64_t columns, int64_t rows, int64_t group, int64_t count, Sweeps how,
                      Storage as, Grid grid, int is_float, int has_zero) {
    float total[PANELS * SIDE] = {0};
    pack_rest(w, step, value, rest, columns, rows, group, 0, columns, count);
    for (int64_t sweep = 0; sweep < how.sweeps; sweep++)
        for (int64_t start = 0; start < columns; start += how.width) {
            int64_t width = columns - start < how.width ? columns - start : how.width;
            const Pairs *left = packed + start / SIDE * columns;
            Lines t = {0}; /* the gradient H (w - v * step) of these columns */
            if (sweep) add_products(t, left, columns, rest, columns, width, 0, columns);
            else { /* all columns from here on are as they were: their share of the loss there was */
                int64_t ends[] = {columns, start + width, start, 0};
                for (int i = 0; i < 3; i++) {
                    add_products(t, left, columns, rest, columns, width, ends[i + 1], ends[i]);
                    if (i < 2) add_weighted(total, t, w, step, value, rows, group, start, width, count);
                }
            }
            if (how.fits) {
                Lines curved = {0}; /* H v of these columns among themselves */
                Pairs own[PANELS * COLUMNS];
                float less[PANELS * SIDE] = {0}, slope[PANELS * SIDE] = {0}, curve[PANELS * SIDE] = {0};
                for (int64_t sub = 0; sub < SUBTILES; sub++)
                    for (int64_t j = 0; j < width; j += LEAF) {
                        Line v[LEAF];
                        load(v, value + (start + j) * rows + sub * ROWS, rows, LEAF, rows_of(sub, count));
                        pack_leaf(own + sub * VECTORS * width, width, j, v);
                    }
                add_products(curved, left + start, columns, own, width, width, 0, width);
                add_weighted(slope, t, 0, step, value, rows, group, start, width, count);
                add_weighted(curve, curved, 0, step, value, rows, group, start, width, count);
                fit(step + start / group * rows, less, total, slope, curve, count, as);
                for (int64_t sub = 0; sub < SUBTILES; sub++)
                    for (int64_t j = 0; j < width; j++)
                        for (int64_t r = 0; r < ROWS; r++) t[sub][j].x[r] += curved[sub][j].x[r] * less[sub * ROWS + r];
            }
            if (how.descends)
                descend_tile(t, w, step, zero, value, h, rest, total, columns, rows, group, start, width, count, grid,
                             is_float, has_zero);
            else pack_rest(w, step, value, rest, columns, rows, group, start, width, count);
        }
    memcpy(loss, total, count * sizeof(float));
}

/* Refinement of values [E, I, O] and scales [E, G, O]: so many sweeps over all columns, of which some at a time have
   their scale fitted and their values descend, where that is asked for. Losses are [E, O]; `rest` is as in walk_all. */
void refine_all(const Given *given, int64_t first, int64_t last) {
    const float *w = POINTER;
    float *step = POINTER;
    const float *zero = POINTER;
    float *value = POINTER;
    const float *h = POINTER;
    const Pairs *packed = POINTER;
    float *loss = POINTER;
    Pairs *rest = POINTER;
    int64_t columns = INTEGER, rows = INTEGER, groups = INTEGER;
    const Sweeps *how = POINTER;
    const Storage *as = POINTER;
    const Grid *grid = POINTER;
    configure_tiles();
    rest += first * PANELS * columns;
    for (int64_t index = first; index < last; index++) {
        Place at = place_of(index, columns, rows, groups);
        BY_KIND(refine_tile, w + at.weights, step + at.scales, zero ? zero + at.scales : 0, value + at.weights,
                h + at.square, packed + at.square / SIDE, rest, loss + at.loss, columns, rows, columns / groups,
                at.count, *how, *as, *grid)
    }
    _tile_release();
}

/* 32 rows of 16 columns from `begin`, those behind `end` being zeros, each times a root and rounded again. */
static inline void pack_step(const uint16_t *x, const float *root, int64_t begin, int64_t end, int64_t columns,
                             Pairs *line) {
    for (int64_t i = 0; i < SIDE; i++) {
        Pairs half[2] = {0};
        for (int64_t k = 0, row = begin + 2 * i; k < 2 && row < end; k++, row++) {
            for (int c = 0; c < SIDE; c++) half[k][c] = (uint32_t)x[row * columns + c] << 16;
            if (root) half[k] = to_bf16((Vector)half[k] * root[row]);
        }
        line[i] = half[0] >> 16 | half[1];
    }
}

/* Rows of bf16 [R, I] as the right matrix of a product and, line by line the transpose of it, as the left one, or the
   rows of `other` as that: [panels of I, steps, (right, left), 16] lines. A part is a step: rows begin … end, 32 at
   most, of one expert. */
void pack_rows(const Given *given, int64_t first, int64_t last) {
    const uint16_t *x = POINTER, *other = POINTER;
    const float *root = POINTER;
    const int64_t *begin = POINTER, *end = POINTER;
    Pairs *packed = POINTER;
    int64_t columns = INTEGER, steps = INTEGER;
    for (int64_t step = first; step < last; step++)
        for (int64_t panel = 0; panel < columns / SIDE; panel++) {
            Pairs line[SIDE], *to = packed + (panel * steps + step) * STEP;
            pack_step(x + panel * SIDE, root, begin[step], end[step], columns, line);
            memcpy(to, line, sizeof line);
            if (other) pack_step(other + panel * SIDE, root, begin[step], end[step], columns, line);
            transpose(line, to + SIDE);
        }
}

/* Adds the products of packed rows to the sums [E, I, I]: of each band of columns what lies right of its first.
   Steps of expert e are starts[e] … starts[e + 1]. A part is 32 lines of an expert from `expert` on; long and short
   ones take turns, for threads. */
void add_grams(const Given *given, int64_t first, int64_t last) {
    const Pairs *packed = POINTER;
    const int64_t *starts = POINTER;
    float *sums = POINTER;
    int64_t columns = INTEGER, steps = INTEGER, band = INTEGER, expert = INTEGER;
    enum { NEAR = 8 }; /* blocks of columns whose rows stay in the cache while all lines go by */
    const int64_t blocks = columns / STEP, panel = steps * STEP, line = sizeof(Pairs);
    configure_tiles();
    for (int64_t own = first; own < last; own = (own / blocks + 1) * blocks)
        for (int64_t from = 0; from < blocks; from += NEAR)
            for (int64_t part = own; part < last && part / blocks == own / blocks; part++) {
                int64_t e = expert + part / blocks, i = part % blocks;
                i = i % 2 ? blocks - 1 - i / 2 : i / 2;
                int64_t j = i * STEP / band * band / STEP, to = from + NEAR < blocks ? from + NEAR : blocks;
                for (j = j > from ? j : from; j < to; j++) {
                    float *t = sums + e * columns * columns + i * STEP * columns + j * STEP;
                    const Pairs *left = packed + 2 * i * panel + starts[e] * STEP + SIDE;
                    const Pairs *right = packed + 2 * j * panel + starts[e] * STEP;
                    BARRIER;
                    load_sums(t, columns);
                    for (int64_t step = starts[e]; step < starts[e + 1]; step++, left += STEP, right += STEP) {
                        _tile_loadd(6, right, line);
                        _tile_loadd(7, right + panel, line);
                        _tile_loadd(4, left, line);
                        _tile_loadd(5, left + panel, line);
                        ALL_FOUR
                    }
                    store_sums(t, columns);
                    BARRIER;
                }
            }
    _tile_release();
}

#endif
