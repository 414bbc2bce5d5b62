// C = alpha * (A B + A2 B2) + bias + onto, in bf16 or fp32, with sums in fp32 rounded once.
//
// The second product is LoRA's: forward, A is the input and A2 the input times the down factor;
// backward, A is the output's gradient and A2 that times the up factor. Each thread takes a part of
// the columns, packs them group by group and runs all rows past each group.
#include "gemm.hpp"
#include "quantised.hpp"

namespace {

// A packed group and the rows that run past it should both stay in a core's second cache.
constexpr int64_t GROUP_BYTES = 384 << 10;
constexpr int64_t MOST_GROUP = 64;
// Longer sums are cut, and carried on from memory: a panel should not fill the second cache alone.
constexpr int64_t MOST_UNITS = 1024;
// Rows that lie a multiple of this apart fall into the same few sets of the first cache.
constexpr int64_t ALIASED = 4096;
// Rows of A that are copied at a time, where it cannot be read as it lies.
constexpr int64_t COPIED_ROWS = 256;
// Up to so many rows, dot products with the weight as it lies beat packing it.
constexpr int64_t FEW_ROWS = 32;
constexpr int64_t FEW_COLUMNS = 64;  // whose results are kept back until their rows can be written whole
// Of a quantised weight, so much is decoded at a time, to be packed from the first cache: a few rows
// of many numbers where a panel's columns are rows, else many rows that span whole blocks.
constexpr int64_t STRIP_LONG = 512;
constexpr int64_t STRIP_WIDE = 256;
constexpr int64_t STRIP_ROWS = 64;

enum Slot { PANELS, COPY, COPY2, PARTIAL, BLOCK, STRIP = 12 };

struct Operand {
  const void* at;
  int64_t stride;  // elements
  bool turned;     // A as [K, M]; B as [N, K]
  int64_t first = 0;  // the row of B that lies at `at`
};

// Columns that meet only some of K: LoRA's stacked up factor is zero elsewhere.
struct Span {
  int64_t column, columns, k, length;
};

struct Product {
  Operand a, b, a2, b2;
  int64_t m, n, k, k2;
  const void* bias;
  const void* onto;
  int64_t onto_stride;
  void* c;
  int64_t c_stride;
  float alpha;
  bool c_floats;  // C and onto are fp32, whatever A and B are
  bool c_turned;  // C is [N, M], fp32, and added to
  const Span* spans;  // of the second product if there is one, else of the first
  int64_t span_count;
  Parts parts;  // B where it is quantised, else none
};

// The part of K that columns first..last meet, widened to whole pairs.
inline void meets(const Product& p, bool second, int64_t first, int64_t last, int64_t* from, int64_t* to) {
  const int64_t k = second ? p.k2 : p.k;
  *from = 0;
  *to = k;
  if (!p.span_count || second != (p.k2 > 0)) return;
  int64_t low = k, high = 0;
  for (int64_t i = 0; i < p.span_count; ++i) {
    const Span& span = p.spans[i];
    if (span.column >= last || span.column + span.columns <= first) continue;
    low = smaller(low, span.k);
    high = larger(high, span.k + span.length);
  }
  *from = low < high ? low / 2 * 2 : 0;
  *to = low < high ? high : 0;
}

template <class C>
inline void finish_row(const Product& p, const float* sums, int64_t row, int64_t column, int64_t columns, const void* bias,
                       bool bias_floats) {
  C* c = static_cast<C*>(p.c) + row * p.c_stride + column;
  const C* onto = p.onto ? static_cast<const C*>(p.onto) + row * p.onto_stride + column : nullptr;
  const Vector alpha = set(p.alpha);
  for (int64_t i = 0; i < columns; i += WIDTH) {
    Vector value = mul(load(sums + i), alpha);
    if (bias) {
      value = add(value, bias_floats ? load_upto(static_cast<const float*>(bias) + column + i, columns - i)
                                     : load_upto(static_cast<const bf16*>(bias) + column + i, columns - i));
    }
    if (onto) value = add(value, load_upto(onto + i, columns - i));
    store_upto(c + i, value, columns - i);
  }
}

// One block's sums, [rows][PANEL] floats, to where the product goes.
template <class T>
inline void finish(const Product& p, const float* sums, int64_t stride, int64_t row, int64_t rows, int64_t column,
                   int64_t columns) {
  if (p.c_turned) {
    float* c = static_cast<float*>(p.c);
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i) c[(column + j) * p.c_stride + row + i] += p.alpha * sums[i * stride + j];
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (p.c_floats) finish_row<float>(p, sums + i * stride, row + i, column, columns, p.bias, sizeof(T) == 4);
    else finish_row<T>(p, sums + i * stride, row + i, column, columns, p.bias, sizeof(T) == 4);
  }
}

// Rows of one operand as the inner loop reads them.
struct Rows {
  const char* at;
  int64_t stride;  // bytes
};

template <class T>
inline bool must_copy(const Operand& a, int64_t k) {
  return a.turned || (sizeof(T) == 2 && (!PAIRS || k % 2));
}

template <class T>
inline Rows rows_of(const Operand& a, int64_t row, int64_t rows, int64_t k, int slot) {
  if (!k) return {"", 0};  // nothing is read, and there may be no memory to point to
  const T* at = static_cast<const T*>(a.at);
  if (!must_copy<T>(a, k))
    return {reinterpret_cast<const char*>(at + row * a.stride), a.stride * static_cast<int64_t>(sizeof(T))};
  const int64_t units = units_of<T>(k);
  float* copy = scratch<float>(slot, rows * units);
  copy_rows(at, a.stride, a.turned, row, rows, k, copy);
  return {reinterpret_cast<const char*>(copy), units * 4};
}

// Panels start..start+count of a quantised B, numbers from..to along K.
template <class T>
void pack_parts(const Product& p, int64_t start, int64_t count, int64_t from, int64_t to, float* panels,
                int64_t panel_floats) {
  constexpr int64_t PER = PAIRS && sizeof(T) == 2 ? 2 : 1;
  constexpr int64_t LONG = STRIP_LONG + 16;  // rows a power of two apart share sets of the cache
  const bool turned = p.b.turned;
  const int64_t together = turned ? 1 : STRIP_WIDE / PANEL, step = turned ? STRIP_LONG : STRIP_ROWS;
  T* strip = scratch<T>(STRIP, turned ? PANEL * LONG : STRIP_ROWS * STRIP_WIDE);
  for (int64_t j = 0; j < count; j += together) {
    const int64_t column = (start + j) * PANEL, here = smaller(together, count - j);
    const int64_t columns = smaller(here * PANEL, p.n - column);
    for (int64_t k = from; k < to; k += step) {
      const int64_t length = smaller(step, to - k);
      float* panel = panels + j * panel_floats + (k - from) / PER * PANEL;
      if (turned) {
        for (int64_t i = 0; i < columns; ++i) read_row(p.parts, column + i, k, length, strip + i * LONG);
        pack_columns(strip, LONG, length, columns, panel);
        continue;
      }
      for (int64_t i = 0; i < length; ++i) read_row(p.parts, k + i, column, columns, strip + i * STRIP_WIDE);
      for (int64_t i = 0; i < here; ++i)
        pack_rows(strip + i * PANEL, STRIP_WIDE, length, smaller<int64_t>(PANEL, columns - i * PANEL),
                  panel + i * panel_floats);
    }
  }
}

// Rows row..row+rows of C, columns of panels first..last.
template <class T>
void multiply_part(const Product& p, int64_t row, int64_t rows, int64_t first_panel, int64_t last_panel) {
  constexpr bool PAIRED = PAIRS && sizeof(T) == 2;
  constexpr int64_t PER = PAIRED ? 2 : 1;
  using Blocks = Unit<PAIRED>;
  const int64_t units = units_of<T>(p.k), units2 = units_of<T>(p.k2);
  const int64_t cut = larger<int64_t>(1, ceil_div(units, larger<int64_t>(1, ceil_div(units, MOST_UNITS))));
  const int64_t panel_floats = (cut + units2) * PANEL;
  const int64_t fits = larger<int64_t>(1, smaller(MOST_GROUP, GROUP_BYTES / (panel_floats * 4)));
  const int64_t group = smaller(fits, last_panel - first_panel);
  const Rows a = rows_of<T>(p.a, row, rows, p.k, COPY);
  const Rows a2 = p.k2 ? rows_of<T>(p.a2, row, rows, p.k2, COPY2) : Rows{nullptr, 0};
  float* panels = scratch<float>(PANELS, group * panel_floats);
  const bool carried = cut < units;
  const bool aliased = a.stride % ALIASED == 0 && rows > 1;
  const int64_t tidy = cut + 16;
  float* tidied = aliased ? scratch<float>(BLOCK, Blocks::ROWS * tidy) : nullptr;
  float* partial = scratch<float>(PARTIAL, carried ? rows * group * PANEL : Blocks::ROWS * PANEL);
  for (int64_t start = first_panel; start < last_panel; start += group) {
    const int64_t count = smaller(group, last_panel - start);
    // Once where K is empty, too: the sum is zero then, and the rest of the product is not.
    for (int64_t unit = 0; unit == 0 || unit < units; unit += cut) {
      const bool last = unit + cut >= units;
      Stretch parts[2];
      struct Extent { int64_t unit, units, unit2, units2; };
      Extent extents[MOST_GROUP];
      if (p.parts.count)
        pack_parts<T>(p, start, count, unit * PER, smaller(p.k, (unit + cut) * PER), panels, panel_floats);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t column = (start + j) * PANEL, columns = smaller<int64_t>(PANEL, p.n - column);
        int64_t from, to;
        meets(p, false, column, column + columns, &from, &to);
        from = larger(from, unit * PER);
        to = smaller(to, (unit + cut) * PER);
        Extent& extent = extents[j];
        extent.unit = larger(from / PER, unit);
        extent.units = to > from ? units_of<T>(to - from) : 0;
        float* panel = panels + j * panel_floats;
        if (extent.units && !p.parts.count)
          pack(static_cast<const T*>(p.b.at), p.b.stride, p.b.turned, from, to - from, column, columns, panel);
        extent.units2 = extent.unit2 = 0;
        if (p.k2 && last) {
          meets(p, true, column, column + columns, &from, &to);
          extent.unit2 = from / PER;
          extent.units2 = to > from ? units_of<T>(to - from) : 0;
          if (extent.units2)
            pack(static_cast<const T*>(p.b2.at), p.b2.stride, p.b2.turned, from, to - from, column, columns,
                 panel + cut * PANEL);
        }
      }
      for (int64_t block_row = 0, block; block_row < rows; block_row += block) {
        block = Blocks::next(rows - block_row);
        Rows here = {a.at + block_row * a.stride + unit * 4, a.stride};
        if (aliased) {
          for (int64_t i = 0; i < block; ++i)
            std::memcpy(tidied + i * tidy, here.at + i * a.stride, static_cast<size_t>(smaller(cut, units - unit)) * 4);
          here = {reinterpret_cast<const char*>(tidied), tidy * 4};
        }
        for (int64_t j = 0; j < count; ++j) {
          const Extent& extent = extents[j];
          const float* panel = panels + j * panel_floats;
          float* sums = carried ? partial + block_row * group * PANEL + j * PANEL : partial;
          const int64_t stride = carried ? group * PANEL : PANEL;
          parts[0] = {here.at + (extent.unit - unit) * 4, here.stride, panel, extent.units};
          Blocks::run(block, parts[0], sums, stride, unit > 0);
          if (extent.units2) {
            parts[1] = {a2.at + block_row * a2.stride + extent.unit2 * 4, a2.stride, panel + cut * PANEL,
                        extent.units2};
            Blocks::run(block, parts[1], sums, stride, true);
          }
          const int64_t column = (start + j) * PANEL;
          if (last)
            finish<T>(p, sums, stride, row + block_row, block, column, smaller<int64_t>(PANEL, p.n - column));
        }
      }
    }
  }
}

// --- few rows: dot products with the weight as it lies ---------------------------------------------

#if defined(LORIMER_PAIRS)
struct PairLoader {
  static constexpr int64_t STEP = 32;
  static Vector whole(const bf16* at) { return reinterpret_cast<Vector>(_mm512_loadu_si512(at)); }
  static Vector some(const bf16* at, int64_t count) {
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi16((1u << count) - 1u, at));
  }
};
#endif
template <class T>
struct PlainLoader {
  static constexpr int64_t STEP = WIDTH;
  static Vector whole(const T* at) { return load(at); }
  static Vector some(const T* at, int64_t count) { return load_some(at, count); }
};

// Cache lines that each step of a loop asks for before they are needed: from memory a weight comes at
// half the pace if nobody does.
constexpr int64_t LINE = 64;
struct Ahead {
  const char* at;
  int lines;
};

template <class T, class Loader, bool PAIRED, int ROWS, int COLUMNS>
inline __attribute__((always_inline)) void dots(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t k,
                                                Ahead ahead, Vector (&sums)[ROWS][COLUMNS]) {
  int64_t i = 0;
  for (; i + Loader::STEP <= k; i += Loader::STEP) {
    for (int line = 0; line < ahead.lines; ++line) __builtin_prefetch(ahead.at + line * LINE);
    ahead.at += ahead.lines * LINE;
    Vector column[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) column[c] = Loader::whole(b + c * b_stride + i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      Vector row = Loader::whole(a + r * a_stride + i);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] = multiply_add<PAIRED>(row, column[c], sums[r][c]);
    }
  }
  if (i == k) return;
#pragma GCC unroll 4
  for (int c = 0; c < COLUMNS; ++c) {
    Vector column = Loader::some(b + c * b_stride + i, k - i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
      sums[r][c] = multiply_add<PAIRED>(Loader::some(a + r * a_stride + i, k - i), column, sums[r][c]);
  }
}

// The sums of ROWS rows and COLUMNS columns, to a buffer with FEW_COLUMNS columns.
template <class T, class Loader, bool PAIRED, int ROWS, int COLUMNS>
void few_block(const Product& p, int64_t row, int64_t column, Ahead ahead, float* out) {
  Vector sums[ROWS][COLUMNS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) sums[r][c] = zero();
  auto run = [&](const Operand& a, const Operand& b, int64_t k, Ahead next) __attribute__((always_inline)) {
    dots<T, Loader, PAIRED, ROWS, COLUMNS>(static_cast<const T*>(a.at) + row * a.stride, a.stride,
                                           static_cast<const T*>(b.at) + (column - b.first) * b.stride, b.stride,
                                           k, next, sums);
  };
  run(p.a, p.b, p.k, ahead);
  if (p.k2) run(p.a2, p.b2, p.k2, {nullptr, 0});
  if constexpr (ROWS == 4 && COLUMNS == 4) {
    const Vector by_column[16] = {sums[0][0], sums[1][0], sums[2][0], sums[3][0], sums[0][1], sums[1][1],
                                  sums[2][1], sums[3][1], sums[0][2], sums[1][2], sums[2][2], sums[3][2],
                                  sums[0][3], sums[1][3], sums[2][3], sums[3][3]};
    float values[16];
    sixteen_sums(by_column, values);
    for (int r = 0; r < 4; ++r) std::memcpy(out + r * FEW_COLUMNS, values + 4 * r, 16);
  } else {
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) out[r * FEW_COLUMNS + c] = sum(sums[r][c]);
  }
}

template <class T, class Loader, bool PAIRED, int COLUMNS>
inline void few_columns(const Product& p, int64_t column, float* out) {
  // The blocks of rows share out the lines of the columns that come next but one.
  const int64_t shares = p.parts.count ? 0 : p.m >= 16 ? 4 : p.m >= 8 ? 2 : 1;
  const int64_t width = COLUMNS * p.b.stride * int64_t(sizeof(T));
  const char* next = static_cast<const char*>(p.b.at) + (column + 2 * COLUMNS) * p.b.stride * int64_t(sizeof(T));
  int64_t row = 0, share = 0;
  auto ahead = [&]() -> Ahead {
    if (share >= shares) return {next, 0};
    return {next + width * share++ / shares, COLUMNS < shares ? 1 : static_cast<int>(COLUMNS / shares)};
  };
  for (; row + 4 <= p.m; row += 4)
    few_block<T, Loader, PAIRED, 4, COLUMNS>(p, row, column, ahead(), out + row * FEW_COLUMNS);
  if (row + 2 <= p.m) {
    few_block<T, Loader, PAIRED, 2, COLUMNS>(p, row, column, ahead(), out + row * FEW_COLUMNS);
    row += 2;
  }
  if (row < p.m) few_block<T, Loader, PAIRED, 1, COLUMNS>(p, row, column, ahead(), out + row * FEW_COLUMNS);
}

template <class T, class Loader, bool PAIRED>
void multiply_few(const Product& p, int threads) {
  parallel_range(threads, p.n, 16, [&](int64_t first_column, int64_t last) {
    float sums[FEW_ROWS * FEW_COLUMNS];
    Product strip = p;
    T* rows = p.parts.count ? scratch<T>(STRIP, 4 * p.k) : nullptr;
    // Columns first..first+4 of a quantised weight, decoded once for all rows of A.
    auto decoded = [&](int64_t first, int64_t count) -> const Product& {
      if (!rows) return p;
      for (int64_t i = 0; i < count; ++i) read_row(p.parts, first + i, 0, p.k, rows + i * p.k);
      strip.b = {rows, p.k, true, first};
      return strip;
    };
    for (int64_t column = first_column; column < last; column += FEW_COLUMNS) {
      const int64_t columns = smaller(FEW_COLUMNS, last - column);
      int64_t c = 0;
      for (; c + 4 <= columns; c += 4)
        few_columns<T, Loader, PAIRED, 4>(decoded(column + c, 4), column + c, sums + c);
      for (; c < columns; ++c) few_columns<T, Loader, PAIRED, 1>(decoded(column + c, 1), column + c, sums + c);
      finish<T>(p, sums, FEW_COLUMNS, 0, p.m, column, columns);
    }
  });
}

// --- the whole --------------------------------------------------------------------------------------

template <class T>
void multiply(const Product& p, int threads) {
  if (static_cast<double>(p.m) * p.n * (p.k + p.k2) < 2e5) threads = 1;
  const bool in_place = !p.a.turned && p.b.turned && (!p.k2 || (!p.a2.turned && p.b2.turned));
  if (in_place && p.k && p.m <= FEW_ROWS && !p.c_turned) {
#if defined(LORIMER_PAIRS)
    if (sizeof(T) == 2) {
      multiply_few<bf16, PairLoader, true>(p, threads);
      return;
    }
#endif
    multiply_few<T, PlainLoader<T>, false>(p, threads);
    return;
  }
  using Blocks = Unit<PAIRS && sizeof(T) == 2>;
  const int64_t panels = ceil_div(p.n, PANEL);
  const bool by_rows = panels < 4 * threads && p.m >= 2 * Blocks::ROWS * threads;
  const bool copies = must_copy<T>(p.a, p.k) || (p.k2 && must_copy<T>(p.a2, p.k2));
  const int64_t columns_parts = by_rows ? 1 : smaller<int64_t>(threads, panels);
  const int64_t row_parts = by_rows ? threads : 1;
  parallel(static_cast<int>(columns_parts * row_parts), [&](int thread, int) {
    const int64_t cp = by_rows ? 0 : thread, rp = by_rows ? thread : 0;
    const int64_t first_row = p.m * rp / row_parts, last_row = p.m * (rp + 1) / row_parts;
    const int64_t first_panel = panels * cp / columns_parts, last_panel = panels * (cp + 1) / columns_parts;
    const int64_t step = copies ? COPIED_ROWS : larger<int64_t>(1, last_row - first_row);
    const typename Blocks::Use use;
    for (int64_t row = first_row; row < last_row; row += step)
      multiply_part<T>(p, row, smaller(step, last_row - row), first_panel, last_panel);
  });
}

}  // namespace

// dtype of A, B, A2, B2 and the bias: 0 fp32, 1 bf16. C and onto are fp32 if c_floats, else as A.
// spans: span_count times four int64 (first column, columns, first k, length).
LORIMER_EXPORT(matmul)
(const void* a, int64_t a_stride, int a_turned, const void* b, int64_t b_stride, int b_turned, int64_t k,
 const void* a2, int64_t a2_stride, const void* b2, int64_t b2_stride, int b2_turned, int64_t k2, const void* bias,
 const void* onto, int64_t onto_stride, void* c, int64_t c_stride, int c_floats, int c_turned, const int64_t* spans,
 int64_t span_count, int64_t m, int64_t n, float alpha, int dtype, int threads) {
  if (m <= 0 || n <= 0) return;
  Product p{};
  p.a = {a, a_stride, a_turned != 0};
  p.b = {b, b_stride, b_turned != 0};
  p.a2 = {a2, a2_stride, false};
  p.b2 = {b2, b2_stride, b2_turned != 0};
  p.m = m, p.n = n, p.k = k, p.k2 = a2 ? k2 : 0;
  p.bias = bias, p.onto = onto, p.onto_stride = onto_stride;
  p.c = c, p.c_stride = c_stride, p.alpha = alpha;
  p.c_floats = c_floats || dtype == 0;
  p.c_turned = c_turned != 0;
  p.spans = reinterpret_cast<const Span*>(spans);
  p.span_count = span_count;
  if (dtype == 0) multiply<float>(p, threads);
  else multiply<bf16>(p, threads);
}
LORIMER_ON_TAPE(matmul)

// As matmul, with B quantised: [N, K] if `turned`, else [K, N]. Spans belong to the second product.
LORIMER_EXPORT(quantised_matmul)
(const void* a, int64_t a_stride, const Part* parts, int64_t part_count, int turned, int64_t k, const void* a2,
 int64_t a2_stride, const void* b2, int64_t b2_stride, int b2_turned, int64_t k2, const void* bias, const void* onto,
 int64_t onto_stride, void* c, int64_t c_stride, int c_floats, const int64_t* spans, int64_t span_count, int64_t m,
 int64_t n, float alpha, int dtype, int threads) {
  if (m <= 0 || n <= 0) return;
  Product p{};
  p.a = {a, a_stride, false};
  p.b = {nullptr, 0, turned != 0};
  p.parts = {parts, part_count};
  p.a2 = {a2, a2_stride, false};
  p.b2 = {b2, b2_stride, b2_turned != 0};
  p.m = m, p.n = n, p.k = k, p.k2 = a2 ? k2 : 0;
  p.bias = bias, p.onto = onto, p.onto_stride = onto_stride;
  p.c = c, p.c_stride = c_stride, p.alpha = alpha;
  p.c_floats = c_floats || dtype == 0;
  p.spans = reinterpret_cast<const Span*>(spans);
  p.span_count = p.k2 ? span_count : 0;
  if (dtype == 0) multiply<float>(p, threads);
  else multiply<bf16>(p, threads);
}
LORIMER_ON_TAPE(quantised_matmul)
