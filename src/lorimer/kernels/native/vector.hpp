// Vectors of floats, the same words for each instruction set, chosen by the compiler's flags.
//
// A kernel file is compiled once for each instruction set, with LORIMER_ISA as its suffix. Everything
// lies in an unnamed namespace, and the standard library's templates are not used in kernel files:
// a template that two files share is kept once by the linker, perhaps in the version for a processor
// that this machine is not.
//
//   Vector     WIDTH floats            Pairs      WIDTH pairs of bf16, for dot products of pairs
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tape.hpp"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef LORIMER_ISA
#define LORIMER_ISA portable
#endif
#define LORIMER_JOIN2(name, isa) lorimer_##name##_##isa
#define LORIMER_JOIN(name, isa) LORIMER_JOIN2(name, isa)
// A function that Python finds by its name and the instruction set: lorimer_<name>_<isa>.
#define LORIMER_EXPORT(name) extern "C" __attribute__((visibility("default"))) void LORIMER_JOIN(name, LORIMER_ISA)
// Lets a tape call a kernel: lorimer_<name>_on_tape_<isa> takes its arguments as slots.
#define LORIMER_ON_TAPE(name) \
  LORIMER_EXPORT(name##_on_tape)(const int64_t* slots) { call_from_slots(LORIMER_JOIN(name, LORIMER_ISA), slots); }

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define LORIMER_PAIRS 1  // multiplies pairs of bf16 natively
#endif

namespace {

using bf16 = uint16_t;  // the upper half of a float

template <class T>
inline T smaller(T a, T b) { return a < b ? a : b; }
template <class T>
inline T larger(T a, T b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float widen(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float widen(float value) { return value; }

// Rounds to the nearest, ties to even, as torch does; NaN stays NaN.
inline bf16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void put(float* at, float value) { *at = value; }
inline void put(bf16* at, float value) { *at = narrow(value); }

// --- AVX-512 ------------------------------------------------------------------------------------
#if defined(__AVX512F__)

constexpr int WIDTH = 16;
using Vector = __m512;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector set(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float* at) { return _mm512_loadu_ps(at); }
inline Vector load(const bf16* at) {
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
// The first `count` < WIDTH elements; zeros after them.
inline Vector load_some(const float* at, int64_t count) { return _mm512_maskz_loadu_ps(first(count), at); }
inline Vector load_some(const bf16* at, int64_t count) {
  __m256i half = _mm256_maskz_loadu_epi16(first(count), at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
// The instruction takes a denormal float for zero, as all bf16 instructions do.
inline __m256i narrow_vector(Vector value) {
#if defined(LORIMER_PAIRS)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
inline void store(float* at, Vector value) { _mm512_storeu_ps(at, value); }
inline void store(bf16* at, Vector value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), narrow_vector(value));
}
inline void store_some(float* at, Vector value, int64_t count) { _mm512_mask_storeu_ps(at, first(count), value); }
inline void store_some(bf16* at, Vector value, int64_t count) {
  _mm256_mask_storeu_epi16(at, first(count), narrow_vector(value));
}
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
inline Vector sqrt(Vector a) { return _mm512_sqrt_ps(a); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
// As the x86 instruction: the second operand if either is NaN.
inline Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
inline Vector round_nearest(Vector a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n for whole n, without overflow on the way.
inline Vector scale_by_power(Vector a, Vector n) { return _mm512_scalef_ps(a, n); }
inline float sum(Vector a) { return _mm512_reduce_add_ps(a); }
inline float largest(Vector a) { return _mm512_reduce_max_ps(a); }
// The sums of sixteen vectors at once, each added up in the very order of `sum`: out[4 * j + i] is that
// of v[4 * i + j].
inline void sixteen_sums(const Vector (&v)[16], float* out) {
  Vector halves[8], quarters[4], eighths[2];
  for (int i = 0; i < 8; ++i)
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                              _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
  for (int i = 0; i < 4; ++i)
    quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(halves[2 * i], halves[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(halves[2 * i], halves[2 * i + 1], 0xdd));
  for (int i = 0; i < 2; ++i) {
    const __m512d left = _mm512_castps_pd(quarters[2 * i]), right = _mm512_castps_pd(quarters[2 * i + 1]);
    eighths[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
  }
  store(out, _mm512_add_ps(_mm512_shuffle_ps(eighths[0], eighths[1], 0x88),
                           _mm512_shuffle_ps(eighths[0], eighths[1], 0xdd)));
}

// --- AVX2 ---------------------------------------------------------------------------------------
#elif defined(__AVX2__)

constexpr int WIDTH = 8;
using Vector = __m256;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector set(float value) { return _mm256_set1_ps(value); }
inline Vector load(const float* at) { return _mm256_loadu_ps(at); }
inline Vector load(const bf16* at) {
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline __m256i first(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector load_some(const float* at, int64_t count) { return _mm256_maskload_ps(at, first(count)); }
inline Vector load_some(const bf16* at, int64_t count) {
  bf16 copy[8] = {};
  std::memcpy(copy, at, static_cast<size_t>(count) * 2);
  return load(copy);
}
inline __m128i narrow_vector(Vector value) {
  __m256i bits = _mm256_castps_si256(value);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  __m256i packed = _mm256_packus_epi32(rounded, rounded);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline void store(float* at, Vector value) { _mm256_storeu_ps(at, value); }
inline void store(bf16* at, Vector value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), narrow_vector(value)); }
inline void store_some(float* at, Vector value, int64_t count) { _mm256_maskstore_ps(at, first(count), value); }
inline void store_some(bf16* at, Vector value, int64_t count) {
  bf16 copy[8];
  store(copy, value);
  std::memcpy(at, copy, static_cast<size_t>(count) * 2);
}
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector div(Vector a, Vector b) { return _mm256_div_ps(a, b); }
inline Vector sqrt(Vector a) { return _mm256_sqrt_ps(a); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector min(Vector a, Vector b) { return _mm256_min_ps(a, b); }
inline Vector round_nearest(Vector a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline Vector scale_by_power(Vector a, Vector n) {
  // In two halves: 2^n alone may be too large or too small for a float when a * 2^n is not.
  __m256i whole = _mm256_cvtps_epi32(min(max(n, set(-252.0f)), set(252.0f)));
  __m256i half = _mm256_srai_epi32(whole, 1);
  return mul(mul(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}
inline float sum(Vector a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline float largest(Vector a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// --- any processor ------------------------------------------------------------------------------
#else

constexpr int WIDTH = 4;
typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Whole __attribute__((vector_size(16)));

inline Vector zero() { return Vector{0, 0, 0, 0}; }
inline Vector set(float value) { return Vector{value, value, value, value}; }
inline Vector load(const float* at) {
  Vector value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
inline Vector load(const bf16* at) { return Vector{widen(at[0]), widen(at[1]), widen(at[2]), widen(at[3])}; }
template <class T>
inline Vector load_some(const T* at, int64_t count) {
  Vector value = zero();
  for (int64_t i = 0; i < count; ++i) value[i] = widen(at[i]);
  return value;
}
inline void store(float* at, Vector value) { std::memcpy(at, &value, sizeof value); }
inline void store(bf16* at, Vector value) {
  for (int i = 0; i < WIDTH; ++i) at[i] = narrow(value[i]);
}
template <class T>
inline void store_some(T* at, Vector value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) put(at + i, value[i]);
}
inline Vector add(Vector a, Vector b) { return a + b; }
inline Vector sub(Vector a, Vector b) { return a - b; }
inline Vector mul(Vector a, Vector b) { return a * b; }
inline Vector div(Vector a, Vector b) { return a / b; }
inline Vector sqrt(Vector a) {
  for (int i = 0; i < WIDTH; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
inline Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector max(Vector a, Vector b) { return a > b ? a : b; }
inline Vector min(Vector a, Vector b) { return a < b ? a : b; }
inline Vector round_nearest(Vector a) {
  for (int i = 0; i < WIDTH; ++i) a[i] = __builtin_nearbyintf(a[i]);
  return a;
}
inline Vector scale_by_power(Vector a, Vector n) {
  for (int i = 0; i < WIDTH; ++i) {
    int whole = n[i] > 252 ? 252 : n[i] > -252 ? static_cast<int>(n[i]) : -252;
    a[i] = __builtin_ldexpf(a[i], whole);
  }
  return a;
}
inline float sum(Vector a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float largest(Vector a) {
  float two = a[0] > a[2] ? a[0] : a[2], other = a[1] > a[3] ? a[1] : a[3];
  return two > other ? two : other;
}

#endif

// --- from the above -----------------------------------------------------------------------------

// `count` may be WIDTH or more here.
template <class T>
inline Vector load_upto(const T* at, int64_t count) { return count >= WIDTH ? load(at) : load_some(at, count); }
#if !defined(__AVX512F__)
inline void sixteen_sums(const Vector (&v)[16], float* out) {
  for (int i = 0; i < 16; ++i) out[i % 4 * 4 + i / 4] = sum(v[i]);
}
#endif
template <class T>
inline void store_upto(T* at, Vector value, int64_t count) {
  if (count >= WIDTH) store(at, value);
  else store_some(at, value, count);
}

// e^x to within 2 units in the last place; denormals below -87.3, 0 from -104 on, infinity above 88.7;
// NaN stays NaN.
// Cody and Waite's reduction by ln 2 in two parts, then a polynomial on [-ln2/2, ln2/2].
inline Vector exp(Vector x) {
  // The order of operands keeps NaN: max and min give their second one.
  Vector bounded = min(set(89.0f), max(set(-104.0f), x));
  Vector n = round_nearest(mul(bounded, set(1.44269504f)));
  Vector r = fma(n, set(-0.693359375f), bounded);
  r = fma(n, set(2.12194440e-4f), r);
  Vector p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set(1.0f)));
  return scale_by_power(p, n);
}

inline Vector sigmoid(Vector x) { return div(set(1.0f), add(set(1.0f), exp(sub(zero(), x)))); }

// tanh to within 3 units in the last place: an odd over an even polynomial, as in Eigen.
inline Vector tanh(Vector x) {
  x = min(set(7.90531111f), max(set(-7.90531111f), x));
  const Vector square = mul(x, x);
  Vector above = set(-2.76076847742355e-16f), below = set(1.19825839466702e-06f);
  above = fma(above, square, set(2.00018790482477e-13f));
  above = fma(above, square, set(-8.60467152213735e-11f));
  above = fma(above, square, set(5.12229709037114e-08f));
  above = fma(above, square, set(1.48572235717979e-05f));
  above = fma(above, square, set(6.37261928875436e-04f));
  above = fma(above, square, set(4.89352455891786e-03f));
  below = fma(below, square, set(1.18534705686654e-04f));
  below = fma(below, square, set(2.26843463243900e-03f));
  below = fma(below, square, set(4.89352518554385e-03f));
  return div(mul(x, above), below);
}

}  // namespace
