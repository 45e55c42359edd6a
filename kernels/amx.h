/* The tile registers of AMX, 8 of 16 rows of 64 bytes: asked for, shaped, given back. One instruction multiplies tiles
 * of 16 x 64 and 64 x 16 bytes, in an eighth of the cycles that `vpdpbusd` takes for it.
 * Neighbours: avx512.h (inference) and gpt/tile.h (training), which multiply. */
#pragma once
#include "isa.h"

#if ISA_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the system lends them to this process, which has to ask. */
static inline bool ask_for_tiles(void) {
    return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */);
}

typedef struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles;

static inline tiles begin_tiles(void) {
    tiles mine = {.palette = 1}, before;
    for (int i = 0; i < 8; i++) mine.bytes[i] = 64, mine.rows[i] = 16;
    _tile_storeconfig(&before);
    _tile_loadconfig(&mine);
    return before;
}

static inline void end_tiles(tiles before) { /* others in this thread, as torch, may count on theirs */
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
}
#else
static inline bool ask_for_tiles(void) { return false; }
typedef int tiles;
static inline tiles begin_tiles(void) { return 0; }
static inline void end_tiles(tiles before) { (void)before; }
#endif
