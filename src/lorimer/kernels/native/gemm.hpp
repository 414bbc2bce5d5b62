// The heart of every matrix product: panels of B packed for the cache, and a block of rows of A
// against one panel with all sums in registers.
//
// Both element types come in units of four bytes: one float, or a pair of bf16 that follow each
// other along K. A panel holds PANEL columns of B as [units][PANEL] units, so one step of the inner
// loop loads a few vectors of B, and for each row of A repeats one unit in all lanes. B is packed as
// it is used, from the weight as it lies: that costs about one part in a hundred at 500 rows, and no
// second copy of a weight is ever kept.
//
// Where pairs are multiplied natively, by vectors or by tiles, the processor takes denormals (below
// 2^-126) for zero, as operands and as sums.
#pragma once

#include "parallel.hpp"
#include "vector.hpp"

#if defined(__AMX_BF16__) || defined(LORIMER_TILES_EMULATED)
#include "tiles.hpp"
#define LORIMER_TILES 1
#endif

namespace {

#if defined(LORIMER_PAIRS)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

// Columns of a panel, and most rows of a block: as many sums as there are registers.
constexpr int PANEL = 2 * WIDTH;
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 14;
#else
constexpr int MOST_ROWS = 6;
#endif

// --- the product of a block -----------------------------------------------------------------------

template <bool PAIRED>
inline Vector multiply_add(Vector a, Vector b, Vector onto) {
#if defined(LORIMER_PAIRS)
  if (PAIRED) return _mm512_dpbf16_ps(onto, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
  return fma(a, b, onto);
}

// A stretch of K: rows of A (stride in bytes), and the panel that goes with it.
struct Stretch {
  const char* a;
  int64_t stride;
  const float* panel;
  int64_t units;
};

// sums[i][j] += rows of A times the panel, over one stretch.
template <bool PAIRED, int ROWS>
inline __attribute__((always_inline)) void accumulate(Vector (&sums)[ROWS][2], const Stretch& part) {
  constexpr int BASES = (ROWS + 2) / 3;  // rows in threes: base, base + stride, base + 2 * stride
  const char* base[BASES];
#pragma GCC unroll 5
  for (int i = 0; i < BASES; ++i) base[i] = part.a + 3 * i * part.stride;
  const float* panel = part.panel;
  const int64_t stride = part.stride;
#pragma GCC unroll 2
  for (int64_t unit = 0; unit < part.units; ++unit) {
    Vector left = load(panel), right = load(panel + WIDTH);
    panel += PANEL;
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; ++i) {
      float value;
      std::memcpy(&value, base[i / 3] + (i % 3) * stride, 4);
      Vector row = set(value);
      sums[i][0] = multiply_add<PAIRED>(row, left, sums[i][0]);
      sums[i][1] = multiply_add<PAIRED>(row, right, sums[i][1]);
    }
#pragma GCC unroll 5
    for (int i = 0; i < BASES; ++i) base[i] += 4;
  }
}

// A block's sums put into memory, [ROWS][stride] floats, or added to what is there. They begin at zero
// either way: a sum of sums loses less than one long sum.
template <bool PAIRED, int ROWS>
void block_to_floats(const Stretch& part, float* out, int64_t stride, bool onto) {
  Vector sums[ROWS][2];
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) sums[i][0] = sums[i][1] = zero();
  accumulate<PAIRED, ROWS>(sums, part);
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) {
    float* left = out + i * stride;
    float* right = left + WIDTH;
    store(left, onto ? add(sums[i][0], load(left)) : sums[i][0]);
    store(right, onto ? add(sums[i][1], load(right)) : sums[i][1]);
  }
}

using BlockToFloats = void (*)(const Stretch&, float*, int64_t, bool);

template <bool PAIRED>
inline BlockToFloats block_to_floats_of(int rows) {
#define LORIMER_ROWS(n) block_to_floats<PAIRED, n>
  static const BlockToFloats table[] = {
      LORIMER_ROWS(1), LORIMER_ROWS(2), LORIMER_ROWS(3), LORIMER_ROWS(4), LORIMER_ROWS(5), LORIMER_ROWS(6),
#if defined(__AVX512F__)
      LORIMER_ROWS(7), LORIMER_ROWS(8), LORIMER_ROWS(9), LORIMER_ROWS(10), LORIMER_ROWS(11), LORIMER_ROWS(12),
      LORIMER_ROWS(13), LORIMER_ROWS(14),
#endif
  };
#undef LORIMER_ROWS
  return table[rows - 1];
}

// --- what multiplies blocks ------------------------------------------------------------------------

// The unit that multiplies elements of this kind: how many rows it takes at a time, and the product
// of such a block with a panel, added to floats in memory or put there. `Use` must be alive in the
// thread meanwhile.
template <bool PAIRED>
struct Unit {
  static constexpr int64_t ROWS = MOST_ROWS;
  struct Use {
    Use() {}
  };
  // Blocks of about one size: a last one of a few rows would leave registers empty.
  static int64_t next(int64_t left) { return ceil_div(left, ceil_div(left, ROWS)); }
  static void run(int64_t rows, const Stretch& part, float* out, int64_t stride, bool onto) {
    block_to_floats_of<PAIRED>(static_cast<int>(rows))(part, out, stride, onto);
  }
};

#if defined(LORIMER_TILES)
// A tile from memory. Where it does not lie there whole, through a copy that has zeros for the rest:
// what follows a row may be NaN, and what follows the last row may be no memory.
template <int TILE>
inline void load_tile(const char* from, int64_t stride, int64_t rows, int64_t units, float* copy) {
  if (rows >= TILE_ROWS && units >= TILE_UNITS) return tile_load<TILE>(from, stride);
  for (int64_t i = 0; i < TILE_ROWS; ++i)
    store(copy + i * TILE_UNITS,
          i < rows ? load_upto(reinterpret_cast<const float*>(from + i * stride), units) : zero());
  tile_load<TILE>(copy, TILE_BYTES);
}

template <int TILE>
inline void load_sums(const float* from, int64_t stride, int64_t rows, bool onto, float* copy) {
  if (onto) load_tile<TILE>(reinterpret_cast<const char*>(from), stride * 4, rows, TILE_UNITS, copy);
  else tile_zero<TILE>();
}

template <int TILE>
inline void store_sums(float* to, int64_t stride, int64_t rows, float* copy) {
  if (rows >= TILE_ROWS) return tile_store<TILE>(to, stride * 4);
  tile_store<TILE>(copy, TILE_BYTES);
  for (int64_t i = 0; i < rows; ++i) store(to + i * stride, load(copy + i * TILE_UNITS));
}

// As block_to_floats, with the sums in two tiles side by side, or in four.
template <bool TALL>
void tiles_to_floats(int64_t rows, const Stretch& part, float* out, int64_t stride, bool onto) {
  constexpr int UPPER = 4, LOWER = 5, LEFT = 6, RIGHT = 7;
  alignas(64) float copy[TILE_ROWS * TILE_UNITS];
  const int64_t below = rows - TILE_ROWS;
  float* lower_out = out + TILE_ROWS * stride;
  load_sums<0>(out, stride, rows, onto, copy);
  load_sums<1>(out + TILE_UNITS, stride, rows, onto, copy);
  if (TALL) {
    load_sums<2>(lower_out, stride, below, onto, copy);
    load_sums<3>(lower_out + TILE_UNITS, stride, below, onto, copy);
  }
  for (int64_t unit = 0; unit < part.units; unit += TILE_UNITS) {
    const int64_t units = part.units - unit;
    const char* a = part.a + unit * 4;
    const char* b = reinterpret_cast<const char*>(part.panel + unit * PANEL);
    load_tile<UPPER>(a, part.stride, rows, units, copy);
    load_tile<LEFT>(b, PANEL * 4, units, TILE_UNITS, copy);
    tile_multiply<0, UPPER, LEFT>();
    load_tile<RIGHT>(b + TILE_BYTES, PANEL * 4, units, TILE_UNITS, copy);
    tile_multiply<1, UPPER, RIGHT>();
    if (TALL) {
      load_tile<LOWER>(a + TILE_ROWS * part.stride, part.stride, below, units, copy);
      tile_multiply<2, LOWER, LEFT>();
      tile_multiply<3, LOWER, RIGHT>();
    }
  }
  store_sums<0>(out, stride, rows, copy);
  store_sums<1>(out + TILE_UNITS, stride, rows, copy);
  if (TALL) {
    store_sums<2>(lower_out, stride, below, copy);
    store_sums<3>(lower_out + TILE_UNITS, stride, below, copy);
  }
}

template <>
struct Unit<true> {
  static constexpr int64_t ROWS = 2 * TILE_ROWS;
  // An open tile unit makes every change of threads dearer, and its shapes are not the next user's.
  struct Use {
    Use() { tile_configure(whole_tiles()); }
    ~Use() { tile_release(); }
  };
  static int64_t next(int64_t left) { return smaller(left, ROWS); }
  static void run(int64_t rows, const Stretch& part, float* out, int64_t stride, bool onto) {
    if (rows > TILE_ROWS) tiles_to_floats<true>(rows, part, out, stride, onto);
    else tiles_to_floats<false>(rows, part, out, stride, onto);
  }
};
#endif

// --- packing --------------------------------------------------------------------------------------

// How many units `count` elements along K take.
template <class T>
inline int64_t units_of(int64_t count) { return PAIRS && sizeof(T) == 2 ? (count + 1) / 2 : count; }

#if defined(__AVX512F__)
// Turns 16 rows of 16 four-byte units around.
inline void turn(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

// One unit of row-major elements at `from`, of which `count` along K are there.
inline float unit_at(const float* from, int64_t) { return *from; }
inline float unit_at(const bf16* from, int64_t count) {
  if (!PAIRS) return widen(*from);
  uint32_t pair = from[0] | (count > 1 ? static_cast<uint32_t>(from[1]) << 16 : 0u);
  float unit;
  std::memcpy(&unit, &pair, 4);
  return unit;
}

// Packs `columns` <= PANEL columns whose elements along K lie next to each other: B is [N, K], and
// `from` is the first column's first element. Missing columns and the odd element become zeros.
template <class T>
inline void pack_columns(const T* from, int64_t stride, int64_t count, int64_t columns, float* panel) {
  const int64_t units = units_of<T>(count), per = PAIRS && sizeof(T) == 2 ? 2 : 1;
  for (int64_t half = 0; half < PANEL; half += WIDTH) {
    int64_t unit = 0;
#if defined(__AVX512F__)
    const int64_t here = smaller<int64_t>(WIDTH, columns - half);
    if (here > 0 && (sizeof(T) == 4 || PAIRS)) {
      for (; (unit + 16) * per <= count; unit += 16) {
        __m512i rows[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          rows[i] = i < here ? _mm512_loadu_si512(from + (half + i) * stride + unit * per) : _mm512_setzero_si512();
        turn(rows);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(panel + (unit + i) * PANEL + half, rows[i]);
      }
    }
#endif
    for (; unit < units; ++unit)
      for (int64_t i = 0; i < WIDTH; ++i)
        panel[unit * PANEL + half + i] =
            half + i < columns ? unit_at(from + (half + i) * stride + unit * per, count - unit * per) : 0.0f;
  }
}

// Packs `columns` <= PANEL columns that lie next to each other in each row: B is [K, N].
inline void pack_rows(const float* from, int64_t stride, int64_t count, int64_t columns, float* panel) {
  for (int64_t k = 0; k < count; ++k)
    for (int64_t half = 0; half < PANEL; half += WIDTH) {
      int64_t here = columns - half;
      store(panel + k * PANEL + half, here > 0 ? load_upto(from + k * stride + half, here) : zero());
    }
}

inline void pack_rows(const bf16* from, int64_t stride, int64_t count, int64_t columns, float* panel) {
#if defined(LORIMER_PAIRS)
  // Word 2i of a pair's vector is row k's column i, word 2i + 1 is row k + 1's.
  alignas(64) static const uint16_t order[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __mmask32 there = columns >= 32 ? 0xffffffffu : (1u << columns) - 1u;
  for (int64_t k = 0; k < count; k += 2) {
    __m512i first_row = _mm512_maskz_loadu_epi16(there, from + k * stride);
    __m512i next = k + 1 < count ? _mm512_maskz_loadu_epi16(there, from + (k + 1) * stride) : _mm512_setzero_si512();
    float* at = panel + k / 2 * PANEL;
    _mm512_store_si512(at, _mm512_permutex2var_epi16(first_row, low, next));
    _mm512_store_si512(at + WIDTH, _mm512_permutex2var_epi16(first_row, high, next));
  }
#else
  for (int64_t k = 0; k < count; ++k)
    for (int64_t half = 0; half < PANEL; half += WIDTH) {
      int64_t here = columns - half;
      store(panel + k * PANEL + half, here > 0 ? load_upto(from + k * stride + half, here) : zero());
    }
#endif
}

// A weight or activation that is packed column by column: `turned` if it lies as [N, K].
template <class T>
inline void pack(const T* b, int64_t stride, bool turned, int64_t k, int64_t count, int64_t column, int64_t columns,
                 float* panel) {
  if (turned) pack_columns(b + column * stride + k, stride, count, columns, panel);
  else pack_rows(b + k * stride + column, stride, count, columns, panel);
}

// Rows of A in units: [rows][units], from [rows, K] or, if `turned`, from [K, rows].
template <class T>
inline void copy_rows(const T* a, int64_t stride, bool turned, int64_t row, int64_t rows, int64_t count, float* out) {
  const int64_t units = units_of<T>(count), per = PAIRS && sizeof(T) == 2 ? 2 : 1;
  for (int64_t unit = 0; unit < units; ++unit)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t k = unit * per;
      if (!turned) {
        out[i * units + unit] = unit_at(a + (row + i) * stride + k, count - k);
        continue;
      }
      T two[2] = {a[k * stride + row + i], per == 2 && k + 1 < count ? a[(k + 1) * stride + row + i] : T(0)};
      out[i * units + unit] = unit_at(two, 2);
    }
}

}  // namespace
