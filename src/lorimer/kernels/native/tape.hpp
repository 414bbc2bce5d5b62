// Calls that are written down once and run again without Python in between; see kernels/tape.py.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

// One argument from its 64 bits: pointers and whole numbers as they are, a float from the lower half.
template <class T>
inline T from_slot(int64_t slot) {
  if constexpr (std::is_pointer<T>::value) {
    return reinterpret_cast<T>(slot);
  } else if constexpr (std::is_same<T, float>::value) {
    const int32_t bits = static_cast<int32_t>(slot);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  } else {
    return static_cast<T>(slot);
  }
}

template <class... Arguments, std::size_t... I>
inline void call_from_slots(void (*kernel)(Arguments...), const int64_t* slots, std::index_sequence<I...>) {
  kernel(from_slot<Arguments>(slots[I])...);
}

template <class... Arguments>
inline void call_from_slots(void (*kernel)(Arguments...), const int64_t* slots) {
  call_from_slots(kernel, slots, std::index_sequence_for<Arguments...>());
}

}  // namespace
