// Steps of quantising in vectors: magnitudes, the place of a number among fifteen borders, packed codes.
//
//   Bits       WIDTH whole numbers of 32 bits, of a Vector's width
#pragma once

#include "vector.hpp"

namespace {

struct Half { uint16_t bits; };  // a float16 in memory

inline float widen(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = (value.bits & 0x7fffu) << 13;
  const bool special = (value.bits & 0x7c00u) == 0x7c00u;  // infinity or NaN
  const uint32_t wide = sign | rest | (special ? 0x7f800000u : 0u);
  float number;
  std::memcpy(&number, &wide, 4);
  // The same digits with an exponent that is too small by 112.
  return special ? number : number * 0x1p112f;
}

// --- AVX-512 ------------------------------------------------------------------------------------
#if defined(__AVX512F__)

using Bits = __m512i;

inline Vector load(const Half* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
inline Bits no_bits() { return _mm512_setzero_si512(); }
// Without their signs, magnitudes are ordered as whole numbers, and NaN is the largest.
inline Bits magnitude(Vector a) {
  return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
}
inline Bits larger_of(Bits a, Bits b) { return _mm512_max_epi32(a, b); }
inline int32_t largest_of(Bits a) { return _mm512_reduce_max_epi32(a); }
inline Vector as_floats(Bits a) { return _mm512_castsi512_ps(a); }

// How many of fifteen ascending borders are below a number: a search in four steps.
struct Borders {
  Vector middle, eighths, quarters, halves;
  __m256i order;
  Borders(const float* at, const uint8_t* codes)
      : middle(set(at[7])),
        eighths(sparse(at, 3, 8)),
        quarters(sparse(at, 1, 4)),
        halves(sparse(at, 0, 2)),
        order(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)))) {}
  static Vector sparse(const float* at, int from, int step) {
    float each[16] = {};
    for (int i = 0; i < 16; i += step) each[i] = at[from + i];
    return load(each);
  }
  Bits below(Vector x) const {
    Bits place = _mm512_maskz_mov_epi32(under(middle, x), _mm512_set1_epi32(8));
    place = step(place, eighths, 4, x);
    place = step(place, quarters, 2, x);
    return step(place, halves, 1, x);
  }
  static __mmask16 under(Vector border, Vector x) { return _mm512_cmp_ps_mask(border, x, _CMP_LT_OQ); }
  static Bits step(Bits place, Vector borders, int more, Vector x) {
    const __mmask16 above = under(_mm512_permutexvar_ps(place, borders), x);
    return _mm512_mask_add_epi32(place, above, place, _mm512_set1_epi32(more));
  }
  // The codes of 32 places as 16 bytes, the even ones in the high halves.
  void pack(const Bits (&places)[2], uint8_t* out) const {
    __m256i codes = _mm256_set_m128i(_mm512_cvtepi32_epi8(places[1]), _mm512_cvtepi32_epi8(places[0]));
    codes = _mm256_shuffle_epi8(order, codes);
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtepi16_epi8(pairs));
  }
};

// Whole numbers of at most 127 as bytes.
inline void store_bytes(int8_t* at, Vector a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}

// --- AVX2 ---------------------------------------------------------------------------------------
#elif defined(__AVX2__)

using Bits = __m256i;

inline Vector load(const Half* at) {
  const __m256i word = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(word, _mm256_set1_epi32(0x8000)), 16);
  const __m256i rest = _mm256_slli_epi32(_mm256_and_si256(word, _mm256_set1_epi32(0x7fff)), 13);
  const __m256i special = _mm256_cmpgt_epi32(rest, _mm256_set1_epi32(0x0f7fffff));
  const __m256i ordinary = _mm256_castps_si256(mul(_mm256_castsi256_ps(rest), set(0x1p112f)));
  const __m256i wide = _mm256_or_si256(rest, _mm256_set1_epi32(0x7f800000));
  return _mm256_castsi256_ps(_mm256_or_si256(sign, _mm256_blendv_epi8(ordinary, wide, special)));
}
inline Bits no_bits() { return _mm256_setzero_si256(); }
inline Bits magnitude(Vector a) {
  return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff));
}
inline Bits larger_of(Bits a, Bits b) { return _mm256_max_epi32(a, b); }
inline int32_t largest_of(Bits a) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
inline Vector as_floats(Bits a) { return _mm256_castsi256_ps(a); }

struct Borders {
  Vector middle, eighths, quarters, halves;
  __m256i order;
  Borders(const float* at, const uint8_t* codes)
      : middle(set(at[7])),
        eighths(every(at, 3, 8)),
        quarters(every(at, 1, 4)),
        halves(every(at, 0, 2)),
        order(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)))) {}
  static Vector every(const float* at, int from, int step) {
    float each[8] = {};
    for (int i = 0; i < 16 / step; ++i) each[i] = at[from + i * step];
    return load(each);
  }
  Bits below(Vector x) const {
    Bits place = _mm256_srli_epi32(under(middle, x), 31);
    place = step(place, eighths, x);
    place = step(place, quarters, x);
    return step(place, halves, x);
  }
  static Bits under(Vector border, Vector x) {
    return _mm256_castps_si256(_mm256_cmp_ps(border, x, _CMP_LT_OQ));
  }
  static Bits step(Bits place, Vector borders, Vector x) {
    const Bits above = under(_mm256_permutevar8x32_ps(borders, place), x);  // -1 where it is
    return _mm256_sub_epi32(_mm256_add_epi32(place, place), above);
  }
  void pack(const Bits (&places)[4], uint8_t* out) const {
    const __m256i left = _mm256_packs_epi32(places[0], places[1]), right = _mm256_packs_epi32(places[2], places[3]);
    // Packing is done within each half of a register: fours lie in the order 0 2 4 6 1 3 5 7.
    __m256i codes = _mm256_packus_epi16(left, right);
    codes = _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    codes = _mm256_shuffle_epi8(order, codes);
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
  }
};

inline void store_bytes(int8_t* at, Vector a) {
  const __m256i whole = _mm256_cvtps_epi32(a), two = _mm256_packs_epi32(whole, whole);
  const __m256i bytes = _mm256_packs_epi16(two, two);
  const int32_t parts[2] = {_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4)};
  std::memcpy(at, parts, 8);
}

// --- any processor ------------------------------------------------------------------------------
#else

using Bits = Whole;

inline Vector load(const Half* at) { return Vector{widen(at[0]), widen(at[1]), widen(at[2]), widen(at[3])}; }
inline Bits no_bits() { return Bits{0, 0, 0, 0}; }
inline Bits magnitude(Vector a) { return reinterpret_cast<Bits>(a) & 0x7fffffff; }
inline Bits larger_of(Bits a, Bits b) { return a > b ? a : b; }
inline int32_t largest_of(Bits a) { return larger(larger(a[0], a[1]), larger(a[2], a[3])); }
inline Vector as_floats(Bits a) { return reinterpret_cast<Vector>(a); }

struct Borders {
  const float* at;
  const uint8_t* order;
  Borders(const float* borders, const uint8_t* codes) : at(borders), order(codes) {}
  Bits below(Vector x) const {
    Bits place = no_bits();
    for (int i = 0; i < 15; ++i) place -= set(at[i]) < x;  // -1 where it is
    return place;
  }
  void pack(const Bits (&places)[8], uint8_t* out) const {
    for (int i = 0; i < 16; ++i) {
      const Bits four = places[i / 2];
      out[i] = static_cast<uint8_t>(order[four[i % 2 * 2]] << 4 | order[four[i % 2 * 2 + 1]]);
    }
  }
};

inline void store_bytes(int8_t* at, Vector a) {
  for (int i = 0; i < WIDTH; ++i) at[i] = static_cast<int8_t>(a[i]);
}

#endif

// --- from the above -----------------------------------------------------------------------------

inline float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline Vector load_some(const Half* at, int64_t count) {
  Half copy[WIDTH] = {};
  std::memcpy(copy, at, static_cast<size_t>(count) * sizeof(Half));
  return load(copy);
}

// The bits of the largest magnitude: those of infinity or above if a number is infinite or NaN.
template <class T>
inline int32_t largest_magnitude(const T* at, int64_t count) {
  Bits most = no_bits();
  for (int64_t i = 0; i < count; i += WIDTH) most = larger_of(most, magnitude(load_upto(at + i, count - i)));
  return largest_of(most);
}

}  // namespace
