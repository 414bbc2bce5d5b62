// The tile unit of processors with AMX-BF16, in six words: configure, release, zero, load, store,
// multiply.
//
// There are eight tiles of 16 rows of 64 bytes, for each thread its own. With LORIMER_TILES_EMULATED
// the same words are plain C++ that does what the processor's manual says, so that what is built on
// them can be tested on any processor with AVX-512-BF16. On real tiles nothing here has been run yet:
// this was written and checked in emulation only. LORIMER_ISA=avx512_bf16 is the way round.
//
// Tiles hold 16 four-byte units a row: floats, or pairs of bf16.
#pragma once

#include "vector.hpp"

#if defined(LORIMER_TILES_EMULATED)
#include <cstdio>
#include <cstdlib>
#endif

namespace {

constexpr int TILE_ROWS = 16, TILE_UNITS = 16, TILE_BYTES = 64, TILES = 8;

// What ldtilecfg reads (Intel's manual, volume 1, chapter 18): palette 1 has eight tiles.
struct alignas(64) TileShapes {
  uint8_t palette, start_row, unused[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64, "the processor reads 64 bytes");

inline TileShapes whole_tiles() {
  TileShapes shapes{};
  shapes.palette = 1;
  for (int i = 0; i < TILES; ++i) shapes.row_bytes[i] = TILE_BYTES, shapes.rows[i] = TILE_ROWS;
  return shapes;
}

#if defined(LORIMER_TILES_EMULATED)

struct TileUnit {
  TileShapes shapes;
  alignas(64) unsigned char tiles[TILES][TILE_ROWS][TILE_BYTES];
};
thread_local TileUnit tile_unit{};

// Where the processor would raise an exception.
inline void tile_must(bool condition) {
  if (condition) return;
  std::fputs("the tile unit would have refused this\n", stderr);
  std::abort();
}

inline void tile_configure(const TileShapes& shapes) {
  tile_must(shapes.palette == 1 && shapes.start_row == 0);
  for (int i = 0; i < 16; ++i)
    tile_must(shapes.rows[i] <= (i < TILES ? TILE_ROWS : 0) && shapes.row_bytes[i] <= (i < TILES ? TILE_BYTES : 0));
  tile_unit = TileUnit{};
  tile_unit.shapes = shapes;
}
inline void tile_release() { tile_unit = TileUnit{}; }

inline bool tile_ready(int tile) {
  return tile_unit.shapes.palette == 1 && tile_unit.shapes.rows[tile] && tile_unit.shapes.row_bytes[tile];
}
template <int TILE>
inline void tile_zero() {
  tile_must(tile_ready(TILE));
  std::memset(tile_unit.tiles[TILE], 0, sizeof tile_unit.tiles[TILE]);
}
template <int TILE>
inline void tile_load(const void* from, int64_t stride) {
  tile_zero<TILE>();
  for (int i = 0; i < tile_unit.shapes.rows[TILE]; ++i)
    std::memcpy(tile_unit.tiles[TILE][i], static_cast<const char*>(from) + i * stride, tile_unit.shapes.row_bytes[TILE]);
}
template <int TILE>
inline void tile_store(void* to, int64_t stride) {
  tile_must(tile_ready(TILE));
  for (int i = 0; i < tile_unit.shapes.rows[TILE]; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, tile_unit.tiles[TILE][i], tile_unit.shapes.row_bytes[TILE]);
}

// Denormals count as zero, coming and going.
inline float tile_flushed(float value) { return __builtin_fabsf(value) < 1.17549435e-38f ? value * 0.0f : value; }
inline float tile_half(const unsigned char* row, int i) {
  bf16 value;
  std::memcpy(&value, row + 2 * i, 2);
  return tile_flushed(widen(value));
}

// sums += left times right, as TDPBF16PS does it: the even and the odd elements of the pairs are
// added up apart, each with one rounding a term, then with each other, then to the tile.
template <int SUMS, int LEFT, int RIGHT>
inline void tile_multiply() {
  const TileShapes& shapes = tile_unit.shapes;
  tile_must(tile_ready(SUMS) && tile_ready(LEFT) && tile_ready(RIGHT) && shapes.rows[SUMS] == shapes.rows[LEFT] &&
            shapes.row_bytes[SUMS] == shapes.row_bytes[RIGHT] && shapes.row_bytes[LEFT] == 4 * shapes.rows[RIGHT]);
  const int columns = shapes.row_bytes[SUMS] / 4, pairs = shapes.row_bytes[LEFT] / 4;
  for (int m = 0; m < shapes.rows[SUMS]; ++m) {
    float sums[2 * TILE_UNITS] = {};
    for (int k = 0; k < pairs; ++k) {
      const float even = tile_half(tile_unit.tiles[LEFT][m], 2 * k), odd = tile_half(tile_unit.tiles[LEFT][m], 2 * k + 1);
      for (int i = 0; i < 2 * columns; ++i)
        sums[i] = tile_flushed(__builtin_fmaf(i % 2 ? odd : even, tile_half(tile_unit.tiles[RIGHT][k], i), sums[i]));
    }
    for (int n = 0; n < columns; ++n) {
      float value;
      std::memcpy(&value, tile_unit.tiles[SUMS][m] + 4 * n, 4);
      value = tile_flushed(tile_flushed(value) + tile_flushed(sums[2 * n] + sums[2 * n + 1]));
      std::memcpy(tile_unit.tiles[SUMS][m] + 4 * n, &value, 4);
    }
  }
}

#else

// In assembly: GCC's own words for these do not say that they read and write memory.
inline void tile_configure(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }
inline void tile_release() { __asm__ volatile("tilerelease" : : : "memory"); }
template <int TILE>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <int TILE>
inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <int SUMS, int LEFT, int RIGHT>
inline void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

#endif

}  // namespace
