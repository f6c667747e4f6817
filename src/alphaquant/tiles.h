/* Products in tiles of bf16 with sums in fp32 (Intel AMX), where a compiler and a CPU know them: HAS_TILES.

   A tile has 16 lines of 16 pairs of numbers. Pairs of a left matrix are neighbours in a row of it, those of a right one
   neighbours in a column: c += Σ left[i, j] * right[j]. */

#ifndef ALPHAQUANT_TILES
#define ALPHAQUANT_TILES

#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES

#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16         /* lines of a tile, and pairs in a line */
#define STEP (2 * SIDE) /* numbers that a product of tiles sums over */

typedef uint32_t Pairs __attribute__((vector_size(SIDE * sizeof(uint32_t)), may_alias));

/* Asks the kernel for the tiles, for all threads: 0 if it grants them. */
int request_tiles(void) { return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }

static void configure_tiles(void) {
    struct __attribute__((packed)) {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t lines[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = SIDE * sizeof(uint32_t);
        config.lines[i] = SIDE;
    }
    /* not _tile_loadconfig: GCC believes that it reads eight bytes, and leaves out what sets the others */
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

/* The 16 lines of a tile as its 16 columns of pairs. */
static inline void transpose(const Pairs *lines, Pairs *out) {
    const uint32_t *from = (const uint32_t *)lines;
    uint32_t *to = (uint32_t *)out;
    for (int i = 0; i < SIDE; i++)
        for (int k = 0; k < SIDE; k++) to[i * SIDE + k] = from[k * SIDE + i];
}

#define BARRIER __asm__ volatile("" ::: "memory") /* compilers do not see what tiles read */
/* Tiles 0 to 3 are sums, of which 1 lies right of 0 and 2 below it; 4 and 5 are left ones, 6 and 7 right ones. */
#define ALL_FOUR                                                                                                       \
    _tile_dpbf16ps(0, 4, 6);                                                                                           \
    _tile_dpbf16ps(1, 4, 7);                                                                                           \
    _tile_dpbf16ps(2, 5, 6);                                                                                           \
    _tile_dpbf16ps(3, 5, 7);

static inline void load_sums(const float *sums, int64_t stride) {
    _tile_loadd(0, sums, stride * (int64_t)sizeof(float));
    _tile_loadd(1, sums + SIDE, stride * (int64_t)sizeof(float));
    _tile_loadd(2, sums + SIDE * stride, stride * (int64_t)sizeof(float));
    _tile_loadd(3, sums + SIDE * stride + SIDE, stride * (int64_t)sizeof(float));
}

static inline void store_sums(float *sums, int64_t stride) {
    _tile_stored(0, sums, stride * (int64_t)sizeof(float));
    _tile_stored(1, sums + SIDE, stride * (int64_t)sizeof(float));
    _tile_stored(2, sums + SIDE * stride, stride * (int64_t)sizeof(float));
    _tile_stored(3, sums + SIDE * stride + SIDE, stride * (int64_t)sizeof(float));
}

#endif
#endif
