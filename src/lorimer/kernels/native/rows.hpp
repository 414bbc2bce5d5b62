// Loops over rows of any length, for what is done element by element or row by row.
//
// Everywhere: dtype 0 is fp32, 1 is bf16; strides are in elements; T tokens, of which each has
// `inner` rows of `size` features (heads, or one row for hidden states) that lie one after the other.
#pragma once

#include "parallel.hpp"
#include "vector.hpp"

namespace {

// Starting the threads costs as much as this many elements.
constexpr int64_t WORTH_A_THREAD = 20000;

inline int threads_for(int threads, int64_t elements) {
  return static_cast<int>(larger<int64_t>(1, smaller<int64_t>(threads, elements / WORTH_A_THREAD)));
}

// --- one loop over a row, whatever its length ------------------------------------------------------

struct Full {
  template <class T>
  Vector take(const T* at) const { return load(at); }
  template <class T>
  void give(T* at, Vector value) const { store(at, value); }
  Vector only(Vector value) const { return value; }
};

// The last elements, fewer than a vector holds; zeros after them.
struct Rest {
  int64_t count;
  template <class T>
  Vector take(const T* at) const { return load_some(at, count); }
  template <class T>
  void give(T* at, Vector value) const { store_some(at, value, count); }
  // Without what came of the zeros after them.
  Vector only(Vector value) const {
    float all[WIDTH];
    store(all, value);
    return load_some(all, count);
  }
};

template <class Body>
inline void each(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) body(i, Full{});
  if (i < count) body(i, Rest{count - i});
}

// The sum of what `term` adds to a vector; four at a time, since one addition waits for the one before.
template <class Term>
inline float total(int64_t count, const Term& term) {
  Vector sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * WIDTH <= count; i += 4 * WIDTH) {
    sums[0] = term(i, Full{}, sums[0]);
    sums[1] = term(i + WIDTH, Full{}, sums[1]);
    sums[2] = term(i + 2 * WIDTH, Full{}, sums[2]);
    sums[3] = term(i + 3 * WIDTH, Full{}, sums[3]);
  }
  for (; i + WIDTH <= count; i += WIDTH) sums[0] = term(i, Full{}, sums[0]);
  if (i < count) sums[1] = term(i, Rest{count - i}, sums[1]);
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// body(type) with a value of the type of the states.
template <class Body>
inline void with_type(int dtype, const Body& body) {
  if (dtype == 0) body(float{});
  else body(bf16{});
}

template <class T>
inline const T* as(const void* at) { return static_cast<const T*>(at); }
template <class T>
inline T* as(void* at) { return static_cast<T*>(at); }

}  // namespace
