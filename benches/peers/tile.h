/* Included before every file of llama.cpp. GCC's own definition of _tile_loadconfig (seen in GCC 12) tells the
 * compiler that only the first eight bytes of a tile configuration are read, so it drops the stores to
 * the others, and the processor refuses what is left. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) \
    __extension__({ __asm__ volatile("" : : "r"(config) : "memory"); _tile_loadconfig(config); })
#endif
