// Numbers of a weight that is kept in 4 to 8 bits, as floats or bf16: a stretch of one row at a time.
//
// A stretch is what a product packs next, so that each number is decoded into the cache just before it
// is used and a dense weight never exists. Arithmetic is in float32, in the same order as in PyTorch's
// words of it, then rounded once.
#pragma once

#include "vector.hpp"

namespace {

enum Kind { FOUR_BITS, INT8, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

// Rows of a weight in one storage: fifteen words of eight bytes, as Python lays them out.
struct Part {
  int64_t kind, rows, columns;
  const uint8_t* data;
  int64_t block_size;         // of FOUR_BITS: numbers for each scale, over the flattened rows
  const void* absmax;         // floats, or bytes where nested_table is given
  const float* nested_table;  // scale = table[absmax] * nested_scale[block / 256] + offset
  const float* nested_scale;
  int64_t offset_bits;  // a float in the lower half
  const float* row_scale;
  const int64_t* outlier_columns;  // ascending
  int64_t outlier_count;
  const void* outliers;  // [rows, outlier_count]
  int64_t outliers_narrow;  // they are bf16
  const float* codes;       // of FOUR_BITS: what each of the 16 codes stands for
};

// A weight: parts stacked by rows.
struct Parts {
  const Part* at;
  int64_t count;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A float16 from memory, exactly.
inline float half_at(const uint8_t* at) {
  const uint32_t bits = at[0] | static_cast<uint32_t>(at[1]) << 8;
#if defined(__AVX512F__)
  return _mm_cvtss_f32(_mm_maskz_cvtph_ps(1, _mm_cvtsi32_si128(static_cast<int>(bits))));
#else
  const uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  if ((bits & 0x7c00u) == 0x7c00u) return float_of(sign | 0x7f800000u | rest);
  return float_of(sign | 0x77800000u) * float_of(rest);
#endif
}

// --- four bits ------------------------------------------------------------------------------------

// What the sixteen codes stand for under one scale, rounded to T: looked up for 32 numbers at a time, of
// which the even ones lie in the high halves of bytes.
template <class T>
struct Values {
  T each[16];
  Values(const float* codes, float scale) {
    for (int i = 0; i < 16; i += WIDTH) store(each + i, mul(load(codes + i), set(scale)));
  }
  void look_up(const uint8_t* bytes, T* out) const {
    for (int i = 0; i < 16; ++i) {
      out[2 * i] = each[bytes[i] >> 4];
      out[2 * i + 1] = each[bytes[i] & 15];
    }
  }
};

#if defined(__AVX512F__)
template <>
struct Values<float> {
  __m512 each;
  Values(const float* codes, float scale) : each(mul(load(codes), set(scale))) {}
  void look_up(const uint8_t* bytes, float* out) const {
    const __m512i word = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(word, 4), each);
    const __m512 odd = _mm512_permutexvar_ps(word, each);  // by the lowest four bits
    const __m512 low = _mm512_unpacklo_ps(even, odd), high = _mm512_unpackhi_ps(even, odd);
    const __m512i order = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i later = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d left = _mm512_castps_pd(low), right = _mm512_castps_pd(high);
    _mm512_storeu_ps(out, _mm512_castpd_ps(_mm512_permutex2var_pd(left, order, right)));
    _mm512_storeu_ps(out + 16, _mm512_castpd_ps(_mm512_permutex2var_pd(left, later, right)));
  }
};

template <>
struct Values<bf16> {
  __m512i each;  // twice, so that the fifth bit of a code does not matter
  Values(const float* codes, float scale)
      : each(_mm512_broadcast_i64x4(narrow_vector(mul(load(codes), set(scale))))) {}
  void look_up(const uint8_t* bytes, bf16* out) const {
    const __m512i word = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(word, 4), _mm512_slli_epi32(word, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(pair, each));
  }
};
#elif defined(__AVX2__)
// The codes of 16 bytes in order.
inline void unpack_codes(const uint8_t* bytes, __m128i* first_codes, __m128i* last_codes) {
  const __m128i whole = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), low_half = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(whole, 4), low_half), odd = _mm_and_si128(whole, low_half);
  *first_codes = _mm_unpacklo_epi8(even, odd);
  *last_codes = _mm_unpackhi_epi8(even, odd);
}

template <>
struct Values<float> {
  __m256 lower, upper;
  Values(const float* codes, float scale)
      : lower(mul(load(codes), set(scale))), upper(mul(load(codes + 8), set(scale))) {}
  void eight(__m128i codes, float* out) const {
    const __m256i words = _mm256_cvtepu8_epi32(codes);
    store(out, _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, words), _mm256_permutevar8x32_ps(upper, words),
                                _mm256_castsi256_ps(_mm256_slli_epi32(words, 28))));
  }
  void look_up(const uint8_t* bytes, float* out) const {
    __m128i codes[2];
    unpack_codes(bytes, codes, codes + 1);
    for (int i = 0; i < 2; ++i) {
      eight(codes[i], out + 16 * i);
      eight(_mm_srli_si128(codes[i], 8), out + 16 * i + 8);
    }
  }
};

template <>
struct Values<bf16> {
  __m128i lower, upper;  // the bytes of each
  Values(const float* codes, float scale) {
    const __m128i low = narrow_vector(mul(load(codes), set(scale)));
    const __m128i high = narrow_vector(mul(load(codes + 8), set(scale)));
    const __m128i byte = _mm_set1_epi16(255);
    lower = _mm_packus_epi16(_mm_and_si128(low, byte), _mm_and_si128(high, byte));
    upper = _mm_packus_epi16(_mm_srli_epi16(low, 8), _mm_srli_epi16(high, 8));
  }
  void look_up(const uint8_t* bytes, bf16* out) const {
    __m128i codes[2];
    unpack_codes(bytes, codes, codes + 1);
    for (int i = 0; i < 2; ++i) {
      const __m128i low = _mm_shuffle_epi8(lower, codes[i]), high = _mm_shuffle_epi8(upper, codes[i]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), _mm_unpacklo_epi8(low, high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i + 8), _mm_unpackhi_epi8(low, high));
    }
  }
};
#endif

inline float scale_of(const Part& part, int64_t block) {
  if (!part.nested_table) return static_cast<const float*>(part.absmax)[block];
  const uint8_t code = static_cast<const uint8_t*>(part.absmax)[block];
  return part.nested_table[code] * part.nested_scale[block / 256] + float_of(static_cast<uint32_t>(part.offset_bits));
}

// Fewer than 32 numbers, of which the first may lie in a byte's low half.
template <class T>
inline void look_up_some(const Values<T>& values, const uint8_t* bytes, int64_t skipped, int64_t count, T* out) {
  uint8_t some[16] = {};
  T whole[32];
  std::memcpy(some, bytes, static_cast<size_t>(skipped + count + 1) / 2);
  values.look_up(some, whole);
  std::memcpy(out, whole + skipped, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
inline void decode_four_bits(const Part& part, int64_t row, int64_t from, int64_t count, T* out) {
  const int64_t size = part.block_size, start = row * part.columns + from, end = start + count;
  const uint8_t* data = part.data;
  for (int64_t at = start, block = start / size; at < end; ++block) {
    const Values<T> values(part.codes, scale_of(part, block));
    int64_t here = smaller(end, (block + 1) * size) - at;
    const uint8_t* bytes = data + at / 2;
    at += here;
    if ((at - here) % 2) {
      look_up_some(values, bytes++, 1, 1, out++);
      --here;
    }
    for (; here >= 32; here -= 32, bytes += 16, out += 32) values.look_up(bytes, out);
    if (here) look_up_some(values, bytes, 0, here, out);
    out += here;
  }
}

// --- eight bits -----------------------------------------------------------------------------------

// WIDTH signed bytes.
inline Vector load_bytes(const int8_t* at) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
#else
  return Vector{static_cast<float>(at[0]), static_cast<float>(at[1]), static_cast<float>(at[2]), static_cast<float>(at[3])};
#endif
}

// Twice WIDTH numbers.
template <class T>
inline void store_two(T* out, Vector a, Vector b) {
#if defined(LORIMER_PAIRS)
  if (sizeof(T) == 2) return _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
#endif
  store(out, a);
  store(out + WIDTH, b);
}

template <class T>
inline void decode_int8(const Part& part, int64_t row, int64_t from, int64_t count, T* out) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(part.data) + row * part.columns + from;
  const Vector scale = set(part.row_scale[row]);
  int64_t i = 0;
  for (; i + 2 * WIDTH <= count; i += 2 * WIDTH)
    store_two(out + i, mul(load_bytes(codes + i), scale), mul(load_bytes(codes + i + WIDTH), scale));
  for (; i < count; i += WIDTH) {
    int8_t some[WIDTH] = {};
    std::memcpy(some, codes + i, static_cast<size_t>(smaller<int64_t>(WIDTH, count - i)));
    store_upto(out + i, mul(load_bytes(some), scale), count - i);
  }
  int64_t low = 0, high = part.outlier_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (part.outlier_columns[middle] < from) low = middle + 1;
    else high = middle;
  }
  for (; low < part.outlier_count && part.outlier_columns[low] < from + count; ++low) {
    const int64_t at = row * part.outlier_count + low;
    put(out + part.outlier_columns[low] - from, part.outliers_narrow ? widen(static_cast<const bf16*>(part.outliers)[at])
                                                                     : static_cast<const float*>(part.outliers)[at]);
  }
}

// --- blocks of GGUF files -------------------------------------------------------------------------

struct BlockSize {
  int64_t bytes, numbers;
};

constexpr BlockSize SIZES[] = {{18, 32}, {20, 32}, {22, 32}, {24, 32}, {34, 32}, {144, 256}, {176, 256}, {210, 256}};

// Sixteen bytes at once, on any processor.
typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Bytes bytes_at(const uint8_t* at) {
  Bytes bytes;
  std::memcpy(&bytes, at, 16);
  return bytes;
}

// 16 where all bits of `bit` are set.
inline Bytes sixteen_where(Bytes bytes, Bytes bit) { return reinterpret_cast<Bytes>((bytes & bit) == bit) & 16; }

// 16 at place j where bit j of two bytes is set.
inline Bytes fifth_bits(const uint8_t* two) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bytes>(_mm_maskz_set1_epi8(static_cast<__mmask16>(two[0] | two[1] << 8), 16));
#else
  typedef uint64_t Words __attribute__((vector_size(16)));
  const uint64_t each = 0x0101010101010101u;
  return sixteen_where(reinterpret_cast<Bytes>(Words{two[0] * each, two[1] * each}),
                       Bytes{1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128});
#endif
}

// x = q d, or q d + m rounded twice, for sixteen q that are signed bytes and sixteen more.
template <bool SHIFTED, class T>
inline void scaled(Bytes q, Bytes more, float d, float more_d, float m, T* out) {
  int8_t low[16], high[16];
  std::memcpy(low, &q, 16);
  std::memcpy(high, &more, 16);
  auto numbers = [&](int i) __attribute__((always_inline)) {
    const Vector x = i < 16 ? mul(load_bytes(low + i), set(d)) : mul(load_bytes(high + i - 16), set(more_d));
    return SHIFTED ? add(x, set(m)) : x;
  };
#pragma GCC unroll 4
  for (int i = 0; i < 32; i += 2 * WIDTH) store_two(out + i, numbers(i), numbers(i + WIDTH));
}

// What all numbers of a block share.
struct Scales {
  float d, m;
};

template <int64_t KIND>
inline Scales scales_of(const uint8_t* block) {
  constexpr bool SHIFTED = KIND == Q4_1 || KIND == Q5_1 || KIND == Q4_K || KIND == Q5_K;
  return {half_at(block + (KIND == Q6_K ? 208 : 0)), SHIFTED ? half_at(block + 2) : 0.0f};
}

// Group g of eight of Q4_K and Q5_K; `fifth` has 32 bytes, bit g for group g, or is null.
template <class T>
inline void decode_k(const uint8_t* packed, const uint8_t* fifth, const uint8_t* bytes, Scales both, int g, T* out) {
  const int i = g % 4;
  const int s = g < 4 ? packed[i] & 63 : (packed[8 + i] & 15) | (packed[i] >> 6) << 4;
  const int m = g < 4 ? packed[4 + i] & 63 : packed[8 + i] >> 4 | (packed[4 + i] >> 6) << 4;
  const float scale = both.d * static_cast<float>(s), minimum = both.m * static_cast<float>(m);
  Bytes bit, q[2];
  std::memset(&bit, 1 << g, 16);
  for (int j = 0; j < 2; ++j) {
    const Bytes two = bytes_at(bytes + g / 2 * 32 + 16 * j);
    q[j] = g % 2 ? two >> 4 : two & 15;
    if (fifth) q[j] |= sixteen_where(bytes_at(fifth + 16 * j), bit);
  }
  scaled<true>(q[0], q[1], scale, scale, -minimum, out);
}

template <class T>
inline void decode_q6_k(const uint8_t* block, float d, int g, T* out) {
  const int half = g / 4, quarter = g % 4;
  Bytes q[2];
  float scale[2];
  for (int j = 0; j < 2; ++j) {
    const Bytes low = bytes_at(block + half * 64 + quarter % 2 * 32 + 16 * j);
    const Bytes high = bytes_at(block + 128 + half * 32 + 16 * j);
    const Bytes four = quarter < 2 ? low & 15 : low >> 4;
    const Bytes two = quarter == 0 ? high << 4 : quarter == 1 ? high << 2 : quarter == 2 ? high : high >> 2;
    q[j] = (four | (two & 48)) - 32;
    scale[j] = static_cast<float>(static_cast<int8_t>(block[192 + g * 2 + j])) * d;
  }
  scaled<false>(q[0], q[1], scale[0], scale[1], 0.0f, out);
}

// Numbers 32 g .. 32 g + 31 of a block.
template <int64_t KIND, class T>
inline __attribute__((always_inline)) void decode_group(const uint8_t* block, Scales scales, int g, T* out) {
  if (KIND == Q4_K) return decode_k(block + 4, nullptr, block + 16, scales, g, out);
  if (KIND == Q5_K) return decode_k(block + 4, block + 16, block + 48, scales, g, out);
  if (KIND == Q6_K) return decode_q6_k(block, scales.d, g, out);
  if (KIND == Q8_0)
    return scaled<false>(bytes_at(block + 2), bytes_at(block + 18), scales.d, scales.d, 0.0f, out);
  constexpr bool FIVE = KIND == Q5_0 || KIND == Q5_1, SHIFTED = KIND == Q4_1 || KIND == Q5_1;
  const uint8_t* fifth = block + (SHIFTED ? 4 : 2);
  const Bytes both = bytes_at(fifth + (FIVE ? 4 : 0));
  Bytes low = both & 15, high = both >> 4;
  if (FIVE) low |= fifth_bits(fifth), high |= fifth_bits(fifth + 2);
  constexpr uint8_t MIDDLE = KIND == Q5_0 ? 16 : SHIFTED ? 0 : 8;
  scaled<SHIFTED>(low - MIDDLE, high - MIDDLE, scales.d, scales.d, scales.m, out);
}

template <int64_t KIND, class T>
inline void decode_blocks(const Part& part, int64_t row, int64_t from, int64_t count, T* out) {
  constexpr int64_t BYTES = SIZES[KIND - Q4_0].bytes, NUMBERS = SIZES[KIND - Q4_0].numbers;
  const uint8_t* block = part.data + (row * (part.columns / NUMBERS) + from / NUMBERS) * BYTES;
  int64_t at = from % NUMBERS;
  for (; count > 0; block += BYTES, at = 0) {
    const Scales scales = scales_of<KIND>(block);
    if (at == 0 && count >= NUMBERS) {
#pragma GCC unroll 8
      for (int g = 0; g < NUMBERS / 32; ++g) decode_group<KIND>(block, scales, g, out + 32 * g);
      count -= NUMBERS;
      out += NUMBERS;
      continue;
    }
    for (int64_t here; at < NUMBERS && count > 0; at += here, count -= here, out += here) {
      const int64_t skipped = at % 32;
      here = smaller<int64_t>(32 - skipped, count);
      T whole[32];
      T* to = here == 32 ? out : whole;
      decode_group<KIND>(block, scales, static_cast<int>(at / 32), to);
      if (to != out) std::memcpy(out, whole + skipped, static_cast<size_t>(here) * sizeof(T));
    }
  }
}

// --- any kind -------------------------------------------------------------------------------------

template <class T>
inline void decode(const Part& part, int64_t row, int64_t from, int64_t count, T* out) {
  switch (part.kind) {
    case FOUR_BITS: return decode_four_bits(part, row, from, count, out);
    case INT8: return decode_int8(part, row, from, count, out);
    case Q4_0: return decode_blocks<Q4_0>(part, row, from, count, out);
    case Q4_1: return decode_blocks<Q4_1>(part, row, from, count, out);
    case Q5_0: return decode_blocks<Q5_0>(part, row, from, count, out);
    case Q5_1: return decode_blocks<Q5_1>(part, row, from, count, out);
    case Q8_0: return decode_blocks<Q8_0>(part, row, from, count, out);
    case Q4_K: return decode_blocks<Q4_K>(part, row, from, count, out);
    case Q5_K: return decode_blocks<Q5_K>(part, row, from, count, out);
    default: return decode_blocks<Q6_K>(part, row, from, count, out);
  }
}

// Numbers from..from + count of one row of the stacked weight.
template <class T>
inline void read_row(const Parts& parts, int64_t row, int64_t from, int64_t count, T* out) {
  const Part* part = parts.at;
  while (row >= part->rows) row -= (part++)->rows;
  decode(*part, row, from, count, out);
}

}  // namespace
