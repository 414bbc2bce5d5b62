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

// A float16 from memory. The product is exact: it only moves the exponent.
inline float half_at(const uint8_t* at) {
  const uint32_t bits = at[0] | static_cast<uint32_t>(at[1]) << 8;
  const uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  if ((bits & 0x7c00u) == 0x7c00u) return float_of(sign | 0x7f800000u | rest);
  return float_of(sign | 0x77800000u) * float_of(rest);
}

// --- four bits ------------------------------------------------------------------------------------

inline float scale_of(const Part& part, int64_t block) {
  if (!part.nested_table) return static_cast<const float*>(part.absmax)[block];
  const uint8_t code = static_cast<const uint8_t*>(part.absmax)[block];
  return part.nested_table[code] * part.nested_scale[block / 256] + float_of(static_cast<uint32_t>(part.offset_bits));
}

// `count` codes from number `at` on, of which the even ones lie in the high halves of bytes.
inline void decode_codes(const Part& part, int64_t at, int64_t count, float scale, float* out) {
  const float* codes = part.codes;
  int64_t i = 0;
  if (at % 2 && count) out[i++] = codes[part.data[at / 2] & 15] * scale;
  const uint8_t* bytes = part.data + (at + i) / 2;
#if defined(__AVX512F__)
  const __m512 table = _mm512_loadu_ps(codes), factor = _mm512_set1_ps(scale);
  const __m128i low_half = _mm_set1_epi8(15);
  for (; i + 16 <= count; i += 16, bytes += 8) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(eight, 4), low_half);
    const __m128i both = _mm_unpacklo_epi8(high, _mm_and_si128(eight, low_half));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(both), table), factor));
  }
#elif defined(__AVX2__)
  const __m256 lower = _mm256_loadu_ps(codes), upper = _mm256_loadu_ps(codes + 8), factor = _mm256_set1_ps(scale);
  const __m128i low_half = _mm_set1_epi8(15);
  for (; i + 8 <= count; i += 8, bytes += 4) {
    int32_t word;
    std::memcpy(&word, bytes, 4);
    const __m128i four = _mm_cvtsi32_si128(word);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(four, 4), low_half);
    const __m256i both = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(high, _mm_and_si128(four, low_half)));
    const __m256 chosen =
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, both), _mm256_permutevar8x32_ps(upper, both),
                         _mm256_castsi256_ps(_mm256_slli_epi32(both, 28)));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(chosen, factor));
  }
#endif
  for (; i + 2 <= count; i += 2, ++bytes) {
    out[i] = codes[*bytes >> 4] * scale;
    out[i + 1] = codes[*bytes & 15] * scale;
  }
  if (i < count) out[i] = codes[*bytes >> 4] * scale;
}

inline void decode_four_bits(const Part& part, int64_t row, int64_t from, int64_t count, float* out) {
  for (int64_t at = row * part.columns + from, end = at + count; at < end;) {
    const int64_t block = at / part.block_size;
    const int64_t here = smaller(end, (block + 1) * part.block_size) - at;
    decode_codes(part, at, here, scale_of(part, block), out);
    at += here;
    out += here;
  }
}

// --- eight bits -----------------------------------------------------------------------------------

inline void decode_int8(const Part& part, int64_t row, int64_t from, int64_t count, float* out) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(part.data) + row * part.columns + from;
  const float scale = part.row_scale[row];
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(codes[i]) * scale;
  int64_t low = 0, high = part.outlier_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (part.outlier_columns[middle] < from) low = middle + 1;
    else high = middle;
  }
  for (; low < part.outlier_count && part.outlier_columns[low] < from + count; ++low) {
    const int64_t at = row * part.outlier_count + low;
    out[part.outlier_columns[low] - from] = part.outliers_narrow ? widen(static_cast<const bf16*>(part.outliers)[at])
                                                                 : static_cast<const float*>(part.outliers)[at];
  }
}

// --- blocks of GGUF files -------------------------------------------------------------------------

struct BlockSize {
  int64_t bytes, numbers;
};

inline BlockSize block_of(int64_t kind) {
  static const BlockSize sizes[] = {{18, 32}, {20, 32}, {22, 32}, {24, 32}, {34, 32}, {144, 256}, {176, 256}, {210, 256}};
  return sizes[kind - Q4_0];
}

// x = d (q - middle) + m for 32 numbers, with a fifth bit each where `fifth` is not zero.
inline void decode_32(const uint8_t* bytes, uint32_t fifth, float middle, float d, bool with_m, float m, float* out) {
  for (int j = 0; j < 16; ++j) {
    const uint32_t low = (bytes[j] & 15u) | ((fifth >> j) & 1u) << 4;
    const uint32_t high = (bytes[j] >> 4) | ((fifth >> (16 + j)) & 1u) << 4;
    out[j] = (static_cast<float>(static_cast<int32_t>(low)) - middle) * d;
    out[16 + j] = (static_cast<float>(static_cast<int32_t>(high)) - middle) * d;
  }
  for (int j = 0; with_m && j < 32; ++j) out[j] += m;
}

inline uint32_t word_at(const uint8_t* at) {
  return at[0] | static_cast<uint32_t>(at[1]) << 8 | static_cast<uint32_t>(at[2]) << 16 | static_cast<uint32_t>(at[3]) << 24;
}

// Group g of eight of Q4_K and Q5_K; `fifth` has 32 bytes, bit g for group g, or is null.
inline void decode_group(const uint8_t* block, const uint8_t* fifth, const uint8_t* bytes, int g, float* out) {
  const uint8_t* packed = block + 4;
  const int i = g % 4;
  const int s = g < 4 ? packed[i] & 63 : (packed[8 + i] & 15) | (packed[i] >> 6) << 4;
  const int m = g < 4 ? packed[4 + i] & 63 : packed[8 + i] >> 4 | (packed[4 + i] >> 6) << 4;
  const float scale = half_at(block) * static_cast<float>(s), minimum = half_at(block + 2) * static_cast<float>(m);
  const uint8_t* here = bytes + g / 2 * 32;
  const int shift = g % 2 * 4;
  for (int j = 0; j < 32; ++j) {
    int32_t q = (here[j] >> shift) & 15;
    if (fifth) q |= ((fifth[j] >> g) & 1) << 4;
    out[j] = static_cast<float>(q) * scale - minimum;
  }
}

inline void decode_q6_k(const uint8_t* block, int g, float* out) {
  const int half = g / 4, quarter = g % 4;
  const uint8_t* low = block + half * 64 + quarter % 2 * 32;
  const uint8_t* high = block + 128 + half * 32;
  for (int side = 0; side < 2; ++side) {
    const float scale = static_cast<float>(static_cast<int8_t>(block[192 + g * 2 + side])) * half_at(block + 208);
    for (int j = side * 16; j < side * 16 + 16; ++j) {
      const int32_t q = ((low[j] >> (quarter / 2 * 4)) & 15) | ((high[j] >> (quarter * 2)) & 3) << 4;
      out[j] = static_cast<float>(q - 32) * scale;
    }
  }
}

// Numbers 32 g .. 32 g + 31 of a block.
inline void decode_block(int64_t kind, const uint8_t* block, int g, float* out) {
  switch (kind) {
    case Q4_0: return decode_32(block + 2, 0, 8.0f, half_at(block), false, 0.0f, out);
    case Q4_1: return decode_32(block + 4, 0, 0.0f, half_at(block), true, half_at(block + 2), out);
    case Q5_0: return decode_32(block + 6, word_at(block + 2), 16.0f, half_at(block), false, 0.0f, out);
    case Q5_1: return decode_32(block + 8, word_at(block + 4), 0.0f, half_at(block), true, half_at(block + 2), out);
    case Q4_K: return decode_group(block, nullptr, block + 16, g, out);
    case Q5_K: return decode_group(block, block + 16, block + 48, g, out);
    case Q6_K: return decode_q6_k(block, g, out);
    default: break;
  }
  const float d = half_at(block);
  for (int j = 0; j < 32; ++j) out[j] = static_cast<float>(static_cast<int8_t>(block[2 + j])) * d;
}

inline void decode_blocks(const Part& part, int64_t row, int64_t from, int64_t count, float* out) {
  const BlockSize size = block_of(part.kind);
  const uint8_t* blocks = part.data + row * (part.columns / size.numbers) * size.bytes;
  float whole[32];
  for (int64_t at = from, end = from + count; at < end;) {
    const int64_t block = at / size.numbers, group = at % size.numbers / 32, skipped = at % 32;
    const int64_t here = smaller<int64_t>(32 - skipped, end - at);
    float* to = here == 32 ? out : whole;
    decode_block(part.kind, blocks + block * size.bytes, static_cast<int>(group), to);
    if (to != out) std::memcpy(out, whole + skipped, static_cast<size_t>(here) * 4);
    at += here;
    out += here;
  }
}

// --- any kind -------------------------------------------------------------------------------------

inline void decode(const Part& part, int64_t row, int64_t from, int64_t count, float* out) {
  if (part.kind == FOUR_BITS) decode_four_bits(part, row, from, count, out);
  else if (part.kind == INT8) decode_int8(part, row, from, count, out);
  else decode_blocks(part, row, from, count, out);
}

inline void decode(const Part& part, int64_t row, int64_t from, int64_t count, bf16* out) {
  constexpr int64_t STEP = 1024;  // whole blocks of all kinds, if `from` begins one
  float floats[STEP];
  for (int64_t done = 0; done < count; done += STEP) {
    const int64_t here = smaller(STEP, count - done);
    decode(part, row, from + done, here, floats);
    for (int64_t i = 0; i < here; i += WIDTH) store_upto(out + done + i, load_upto(floats + i, here - i), here - i);
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
