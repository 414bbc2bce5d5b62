// Numbers into four or eight bits, to the bit as PyTorch's words of it in quant/nf4.py and quant/int8.py.
//
// A stretch of a weight is read once, in the type that it lies in: fp32 (0), bf16 (1) or fp16 (2). NaN and
// infinity give codes of no meaning, and are seen in the scales.
#include "parallel.hpp"
#include "quantiser.hpp"

namespace {

constexpr int64_t FEW = 100000;  // numbers for which waking other threads costs more than it brings
constexpr float SMALLEST = 1e-38f;  // a block of zeros is divided by this instead
constexpr int64_t NESTED_BLOCK = 256;
constexpr int GROUP = 32 / WIDTH;  // vectors of 32 numbers

// body(pointer of the type)
template <class Body>
inline void typed(const void* numbers, int type, const Body& body) {
  if (type == 0) body(static_cast<const float*>(numbers));
  else if (type == 1) body(static_cast<const bf16*>(numbers));
  else body(static_cast<const Half*>(numbers));
}

// Numbers times `factor`, or over it, as codes: (count + 1) / 2 bytes. After an odd last one comes zero's code.
template <bool OVER, class T>
inline void four_bits(const T* at, int64_t count, float factor, const Borders& borders, uint8_t* out) {
  const Vector by = set(factor);
  const auto place = [&](Vector x) { return borders.below(OVER ? div(x, by) : mul(x, by)); };
  Bits places[GROUP];
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    for (int j = 0; j < GROUP; ++j) places[j] = place(load(at + i + j * WIDTH));
    borders.pack(places, out + i / 2);
  }
  if (i == count) return;
  uint8_t last[16];
  for (int j = 0; j < GROUP; ++j) {
    const int64_t left = count - i - j * WIDTH;
    places[j] = place(left > 0 ? load_upto(at + i + j * WIDTH, left) : zero());
  }
  borders.pack(places, last);
  std::memcpy(out + i / 2, last, static_cast<size_t>(count - i + 1) / 2);
}

// 1 / x, or 0 where that is no number: what has such a scale is stored as zeros.
inline float inverse_of(float x) {
  const float inverse = 1.0f / x;
  return x > 0 && inverse < __builtin_inff() ? inverse : 0.0f;
}

// One block of scales less their mean, in 8 bits; returns its scale.
inline float nested_block(const float* scales, int64_t count, float offset, const uint8_t* nearest, uint8_t* codes) {
  float numbers[NESTED_BLOCK], places[NESTED_BLOCK];
  for (int64_t i = 0; i < count; i += WIDTH)
    store_upto(numbers + i, sub(load_upto(scales + i, count - i), set(offset)), count - i);
  const float most = as_float(largest_magnitude(numbers, count));
  if (most == 0) {
    std::memset(codes, 0, static_cast<size_t>(count));
    return most;
  }
  const Vector inverse = set(inverse_of(most));
  for (int64_t i = 0; i < count; i += WIDTH) {
    const Vector shifted = add(mul(load_upto(numbers + i, count - i), inverse), set(1.0f));
    const Vector place = add(mul(shifted, set(32767.5f)), set(0.5f));
    // Within bounds also where a scale is not finite: the order of operands makes NaN 0.
    store_upto(places + i, min(max(place, zero()), set(65535.0f)), count - i);
  }
  for (int64_t i = 0; i < count; ++i) codes[i] = nearest[static_cast<int32_t>(places[i])];
  return most;
}

// A row of floats in place of which only `codes` stays; returns its scale.
inline float eight_bits(const float* row, int64_t count, int8_t* codes) {
  const float scale = as_float(largest_magnitude(row, count)) / 127.0f;
  const Vector inverse = set(inverse_of(scale)), most = set(127.0f), least = set(-127.0f);
  for (int64_t i = 0; i < count; i += WIDTH) {
    const int64_t left = count - i;
    const Vector whole = min(max(round_nearest(mul(load_upto(row + i, left), inverse)), least), most);
    if (left >= WIDTH) {
      store_bytes(codes + i, whole);
      continue;
    }
    int8_t last[WIDTH];
    store_bytes(last, whole);
    std::memcpy(codes + i, last, static_cast<size_t>(left));
  }
  return scale;
}

}  // namespace

// Blocks of `block_size` numbers, an even number, of which the last may be short. `borders` are the 15
// midpoints between values, ascending, and `order` the codes of the 16 intervals between them. Whole blocks
// are multiplied by their scale's inverse, a short one is divided by its scale, which is never 0.
LORIMER_EXPORT(quantise_blocks)
(const void* numbers, int type, int64_t count, int64_t block_size, const float* borders, const uint8_t* order,
 uint8_t* codes, float* absmax, int threads) {
  const Borders search(borders, order);
  if (count < FEW) threads = 1;
  typed(numbers, type, [&](const auto* at) {
    parallel_range(threads, ceil_div(count, block_size), 1, [&](int64_t from, int64_t to) {
      for (int64_t block = from; block < to; ++block) {
        const int64_t start = block * block_size, here = smaller(block_size, count - start);
        const float most = as_float(largest_magnitude(at + start, here));
        const float safe = most < SMALLEST ? SMALLEST : most;  // NaN stays
        if (here == block_size) four_bits<false>(at + start, here, 1.0f / safe, search, codes + start / 2);
        else four_bits<true>(at + start, here, safe, search, codes + start / 2);
        absmax[block] = here == block_size ? most : safe;
      }
    });
  });
}

// Finite scales, less `offset`, in 8 bits and blocks of 256. `nearest` has a code for each of 65,536 places.
LORIMER_EXPORT(quantise_scales)
(const float* scales, int64_t count, float offset, const uint8_t* nearest, uint8_t* codes, float* largest,
 int threads) {
  if (count < FEW) threads = 1;
  parallel_range(threads, ceil_div(count, NESTED_BLOCK), 1, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      const int64_t start = block * NESTED_BLOCK, here = smaller(NESTED_BLOCK, count - start);
      largest[block] = nested_block(scales + start, here, offset, nearest, codes + start);
    }
  });
}

// Raises largest[column] to the largest magnitude among these rows.
LORIMER_EXPORT(column_maxima)
(const void* numbers, int type, int64_t rows, int64_t columns, float* largest, int threads) {
  if (rows * columns < FEW) threads = 1;
  typed(numbers, type, [&](const auto* at) {
    parallel_range(threads, columns, 16, [&](int64_t from, int64_t to) {
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = from; i < to; i += WIDTH) {
          const int64_t left = to - i;
          const Bits here = magnitude(load_upto(at + row * columns + i, left));
          const Bits most = larger_of(here, magnitude(load_upto(largest + i, left)));
          store_upto(largest + i, as_floats(most), left);
        }
    });
  });
}

// Rows as signed codes with a scale each. The columns `wild` go to `outliers` [rows, wild_count] in bf16, and
// count as zeros.
LORIMER_EXPORT(quantise_int8)
(const void* numbers, int type, int64_t rows, int64_t columns, const int64_t* wild, int64_t wild_count,
 bf16* outliers, float* scales, int8_t* codes, int threads) {
  if (rows * columns < FEW) threads = 1;
  typed(numbers, type, [&](const auto* at) {
    parallel_range(threads, rows, 1, [&](int64_t from, int64_t to) {
      float* wide = scratch<float>(0, columns);
      for (int64_t row = from; row < to; ++row) {
        for (int64_t i = 0; i < columns; i += WIDTH)
          store_upto(wide + i, load_upto(at + row * columns + i, columns - i), columns - i);
        for (int64_t i = 0; i < wild_count; ++i) {
          outliers[row * wild_count + i] = narrow(wide[wild[i]]);
          wide[wild[i]] = 0;
        }
        scales[row] = eight_bits(wide, columns, codes + row * columns);
      }
    });
  });
}
