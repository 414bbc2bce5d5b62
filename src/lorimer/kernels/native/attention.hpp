// What the attention kernels share: who sees whom, blocks of queries and keys as operands, the softmax.
//
// Scores are kept turned, [keys][queries]: a panel's columns are queries, so the softmax runs down the
// columns with whole vectors, keys and values are read as they lie, and neither needs padding.
// A column is one query head of one token; the heads of a group stand side by side, since they share
// their keys and values.
#pragma once

#include "gemm.hpp"

namespace {

template <class T>
constexpr bool PAIRED = PAIRS && sizeof(T) == 2;
template <class T>
constexpr int64_t PER = PAIRED<T> ? 2 : 1;  // elements of a unit

template <bool PAIRED>
struct OperandOf {
  using Type = float;
};
template <>
struct OperandOf<true> {
  using Type = bf16;
};
// What the products multiply: bf16 in pairs, else floats.
template <class T>
using Operand = typename OperandOf<PAIRED<T>>::Type;

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr float LOWEST = -1e30f;
constexpr int64_t ALL = INT64_MAX / 4;  // a window that hides nothing

inline int64_t round_up(int64_t count, int64_t step) { return ceil_div(count, step) * step; }

// What multiplies.
template <class T>
using Blocks = Unit<PAIRED<T>>;

// --- memory ---------------------------------------------------------------------------------------

enum Slot { TABLES, TASK, SUMS };

// Hands out parts of one piece of memory, or with none only counts.
struct Arena {
  char* base;
  int64_t used;
  template <class E>
  E* take(int64_t count) {
    E* part = base ? reinterpret_cast<E*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
    return part;
  }
};

// A struct of buffers, made by Room(arena, arguments...), in the calling thread's scratch memory.
template <class Room, class... Arguments>
inline Room room_in(int slot, const Arguments&... arguments) {
  Arena arena{nullptr, 0};
  Room counted(arena, arguments...);
  arena = Arena{scratch<char>(slot, arena.used), 0};
  return Room(arena, arguments...);
}

// --- who sees whom --------------------------------------------------------------------------------

// The prefix counts as row -1: tokens 0 to prefix, which see no other row.
struct Pack {
  const int64_t* offsets;
  int64_t rows, prefix, heads, kv_heads, size, window;
  float scale, cap;
  int threads;

  int64_t group() const { return heads / kv_heads; }
  int64_t begin(int64_t row) const { return row < 0 ? 0 : offsets[row]; }
  int64_t end(int64_t row) const { return row < 0 ? prefix : offsets[row + 1]; }
  int64_t position(int64_t row, int64_t token) const { return row < 0 ? token : prefix + token - offsets[row]; }
};

// Neighbouring tokens of one row. `before` counts something of the blocks before it.
struct Block {
  int64_t row, begin, count, before;
};

// How long a row's parts are: at most `most`, about as long as each other, a multiple of `step`, which
// divides `most`.
inline int64_t part_length(int64_t length, int64_t most, int64_t step) {
  return round_up(ceil_div(length, larger<int64_t>(1, ceil_div(length, most))), step);
}

// Cuts the prefix and every row in parts. `before` counts columns, padded to whole panels. Without
// `blocks` it only counts; returns how many.
inline int64_t cut(const Pack& pack, int64_t most, int64_t step, Block* blocks) {
  int64_t number = 0, column = 0;
  for (int64_t row = -1; row < pack.rows; ++row) {
    const int64_t end = pack.end(row), length = part_length(end - pack.begin(row), most, step);
    for (int64_t begin = pack.begin(row); begin < end; begin += length, ++number) {
      const int64_t count = smaller(length, end - begin);
      if (blocks) blocks[number] = Block{row, begin, count, column};
      column += round_up(count * pack.group(), PANEL);
    }
  }
  return number;
}

// The positions of a panel's columns.
struct Sight {
  int64_t first, last;
};

inline Sight sight_of(const Pack& pack, const Block& block, int64_t panel) {
  const int64_t columns = block.count * pack.group(), start = pack.position(block.row, block.begin);
  const int64_t last = smaller(columns, (panel + 1) * PANEL) - 1;
  return Sight{start + panel * PANEL / pack.group(), start + last / pack.group()};
}

// Of `count` keys from this position on: first to last that some column sees.
struct Range {
  int64_t first, last;
};

inline Range seen(const Pack& pack, const Sight& sight, int64_t position, int64_t count) {
  const int64_t first = larger<int64_t>(0, sight.first - pack.window + 1 - position);
  const int64_t last = smaller(count, sight.last + 1 - position);
  return first < last ? Range{first, last} : Range{0, 0};
}

inline void fill_positions(const Pack& pack, const Block& block, int64_t columns, float* positions) {
  const int64_t start = pack.position(block.row, block.begin);
  for (int64_t i = 0; i < columns; ++i) positions[i] = static_cast<float>(start + i / pack.group());
}

// -infinity in place of the scores of keys after the query or outside its window.
inline Vector hide(Vector score, Vector position, int64_t key, int64_t window) {
  const Vector age = sub(position, set(static_cast<float>(key))), half = set(0.5f), endless = set(__builtin_inff());
  const Vector since = mul(add(age, half), endless);
  const Vector until = mul(sub(set(static_cast<float>(window)), add(age, half)), endless);
  return min(min(since, until), score);
}

// --- the softmax ----------------------------------------------------------------------------------

// p * 2^n, where `shifted` is n + 1.5 * 2^23 and 2^n is a normal float.
inline Vector times_two_to(Vector p, Vector n, Vector shifted) {
#if defined(__AVX512F__)
  (void)shifted;
  return _mm512_scalef_ps(p, n);
#elif defined(__AVX2__)
  (void)n;
  __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127)), 23);
  return mul(p, _mm256_castsi256_ps(power));
#else
  (void)n;
  uint32_t bits[WIDTH];
  std::memcpy(bits, &shifted, sizeof bits);
  for (int i = 0; i < WIDTH; ++i) bits[i] = (bits[i] + 127u) << 23;
  std::memcpy(&shifted, bits, sizeof bits);
  return mul(p, shifted);
#endif
}

// 2^x for x up to 127; exactly 0 from -125 down, so that what is hidden counts nothing and no
// subnormal number slows the products; NaN stays NaN. To within 1e-7, or, where the result is
// rounded to bf16 anyway (NARROW), to within 3e-6 with two steps fewer.
template <bool NARROW>
inline Vector power_of_two(Vector x) {
  x = max(set(-125.0f), x);
  const Vector magic = set(12582912.0f);
  const Vector shifted = add(x, magic), n = sub(shifted, magic), r = sub(x, n);
  Vector p;
  if (NARROW) {
    p = set(0.00958285f);
    p = fma(p, r, set(0.05590642f));
    p = fma(p, r, set(0.24024099f));
    p = fma(p, r, set(0.69312419f));
  } else {
    p = set(1.535336188e-4f);
    p = fma(p, r, set(1.339887440e-3f));
    p = fma(p, r, set(9.618437357e-3f));
    p = fma(p, r, set(5.550332471e-2f));
    p = fma(p, r, set(2.402264791e-1f));
    p = fma(p, r, set(6.931472029e-1f));
  }
  p = fma(p, r, set(1.0f));
  return sub(times_two_to(p, n, shifted), set(0x1p-125f));
}

inline int64_t block_tokens(const Pack& pack, int64_t columns) { return larger<int64_t>(1, columns / pack.group()); }

// What a score is multiplied by to be an exponent of two.
inline float exponent_scale(const Pack& pack) { return pack.cap > 0 ? LOG2E : pack.scale * LOG2E; }

// Caps the scores [keys][PANEL] of keys from `position` on, and hides what a column does not see.
inline void cap_and_hide(const Pack& pack, const Sight& sight, const float* positions, int64_t position, int64_t keys,
                         float* scores) {
  for (int64_t i = 0; pack.cap > 0 && i < keys * PANEL; i += WIDTH)
    store(scores + i, mul(set(pack.cap), tanh(mul(load(scores + i), set(pack.scale / pack.cap)))));
  // Keys up to the first column's position are hidden from none, unless by the window.
  const bool windowed = position < sight.last - pack.window + 1;
  for (int64_t key = windowed ? 0 : larger<int64_t>(0, sight.first + 1 - position); key < keys; ++key)
    for (int64_t i = 0; i < PANEL; i += WIDTH) {
      float* at = scores + key * PANEL + i;
      store(at, hide(load(at), load(positions + i), position + key, pack.window));
    }
}

// --- operands -------------------------------------------------------------------------------------

// Two rows of a panel's half, as they are multiplied: side by side in pairs, else one after the other.
template <bool PAIRED>
inline void put_rows(float* panel, int64_t row, Vector even, Vector odd) {
#if defined(LORIMER_PAIRS)
  if (PAIRED) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i narrow = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    _mm512_store_si512(panel + row / 2 * PANEL, _mm512_permutexvar_epi16(_mm512_load_si512(order), narrow));
    return;
  }
#endif
  store(panel + row * PANEL, even);
  store(panel + (row + 1) * PANEL, odd);
}

// Rows that a product reads.
struct Rows {
  const char* at;
  int64_t stride;  // bytes
  Rows from(int64_t row) const { return Rows{at + row * stride, stride}; }
};

// [rows][size] as the products read them: where they lie, or widened into `room`.
template <class T>
inline Rows operand_rows(const T* from, int64_t rows, int64_t size, float* room) {
  if (sizeof(Operand<T>) == sizeof(T)) return Rows{reinterpret_cast<const char*>(from), size * int64_t(sizeof(T))};
  for (int64_t i = 0; i < rows * size; i += WIDTH) store(room + i, load(from + i));
  return Rows{reinterpret_cast<const char*>(room), size * 4};
}

// Turns a panel around: [count][PANEL] -> the first `columns` columns as rows, [columns][stride].
// Reads and writes `count` rounded up to 16.
inline void turn_panel(const float* panel, int64_t count, int64_t columns, float* out, int64_t stride) {
#if defined(__AVX512F__)
  for (int64_t unit = 0; unit < count; unit += 16)
    for (int64_t half = 0; half < columns; half += WIDTH) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(panel + (unit + i) * PANEL + half);
      turn(rows);
      const int64_t here = smaller<int64_t>(WIDTH, columns - half);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < here) _mm512_storeu_si512(out + (half + i) * stride + unit, rows[i]);
    }
#else
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t unit = 0; unit < count; ++unit) out[column * stride + unit] = panel[unit * PANEL + column];
#endif
}

// Rows from [count][size] with the sum over `count`: [size][stride] units.
template <class T>
inline Rows turned_rows(const T* from, int64_t count, int64_t size, float* panel, float* out, int64_t stride) {
  for (int64_t i = 0; i < size; i += PANEL) {
    const int64_t columns = smaller<int64_t>(PANEL, size - i);
    pack_rows(from + i, size, count, columns, panel);
    turn_panel(panel, units_of<T>(count), columns, out + i * stride, stride);
  }
  return Rows{reinterpret_cast<const char*>(out), stride * 4};
}

// out [rows][out_stride] = or += the rows times a panel.
template <bool PAIRED>
inline void product(const Rows& a, int64_t rows, const float* panel, int64_t units, float* out, int64_t out_stride,
                    bool onto) {
  for (int64_t row = 0, count; row < rows; row += count) {
    count = Unit<PAIRED>::next(rows - row);
    const Rows from = a.from(row);
    Unit<PAIRED>::run(count, Stretch{from.at, from.stride, panel, units}, out + row * out_stride, out_stride, onto);
  }
}

// A block's columns, [columns][size], from [tokens][heads of the group][size]; zeros after them.
template <class T>
inline void gather(const Pack& pack, const Block& block, const T* from, int64_t stride, int64_t padded, T* out) {
  const int64_t each = pack.group() * pack.size;
  for (int64_t token = 0; token < block.count; ++token)
    std::memcpy(out + token * each, from + (block.begin + token) * stride, static_cast<size_t>(each) * sizeof(T));
  std::memset(out + block.count * each, 0, static_cast<size_t>(padded * pack.size - block.count * each) * sizeof(T));
}

// The keys or values of one head at positions `first` to `last` of a row, [keys][size].
template <class T>
inline void gather_keys(const Pack& pack, int64_t row, const T* from, int64_t stride, int64_t first, int64_t last,
                        T* out) {
  const int64_t prefix = row < 0 ? 0 : pack.prefix, own = pack.begin(row) - prefix;
  for (int64_t at = first; at < last; ++at)
    for (const T* key = from + (at < prefix ? at : own + at) * stride, *end = key + pack.size; key < end; key += 16) {
      std::memcpy(out, key, 16 * sizeof(T));
      out += 16;
    }
}

// Panels of these columns with the sum over the head's features.
template <class T>
inline void pack_queries(const T* gathered, int64_t size, int64_t padded, float* panels) {
  for (int64_t column = 0; column < padded; column += PANEL)
    pack_columns(gathered + column * size, size, size, PANEL, panels + column * units_of<T>(size));
}

}  // namespace
