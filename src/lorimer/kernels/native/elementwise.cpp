// What is done element by element: rotation, units, sums, AdamW, copies.
//
// Arithmetic and sums are in fp32 whatever the type of the states, and each result is rounded once.
// A result does not depend on the number of threads: where sums cross rows or blocks, the blocks are
// the same for any number and are added in order.
//
// Types, strides and tokens are as in rows.hpp.
#include "rows.hpp"

namespace {

// --- rotation (arXiv 2104.09864) ---------------------------------------------------------------------

struct Turn {
  int64_t tokens, heads, size, half;
  float sign;
};

template <class T, class C>
void rotate(const T* x, int64_t x_stride, const C* cos, const C* sin, T* out, int64_t out_stride, const Turn& turn,
            int threads) {
  const int64_t half = turn.half, rest = turn.size - 2 * half;
  const Vector plus = set(turn.sign), minus = set(-turn.sign);
  const int64_t elements = turn.tokens * turn.heads * turn.size;
  parallel_range(threads_for(threads, elements), turn.tokens, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const T* from = x + t * x_stride;
      T* to = out + t * out_stride;
      each(half, [&](int64_t i, auto part) __attribute__((always_inline)) {
        const Vector c = part.take(cos + t * half + i), s = part.take(sin + t * half + i);
        const Vector forth = mul(s, plus), back = mul(s, minus);
        for (int64_t left = i; left < turn.heads * turn.size; left += turn.size) {
          const Vector a = part.take(from + left), b = part.take(from + left + half);
          part.give(to + left, fma(a, c, mul(b, back)));
          part.give(to + left + half, fma(b, c, mul(a, forth)));
        }
      });
      if (rest == 0 || to == from) continue;
      for (int64_t head = 0; head < turn.heads; ++head) {
        const int64_t at = head * turn.size + 2 * half;
        std::memcpy(to + at, from + at, static_cast<size_t>(rest) * sizeof(T));
      }
    }
  });
}

// --- units, gated (arXiv 2002.05202) and plain ------------------------------------------------------

// Each gives the activation of x and its slope there.
struct Silu {
  static Vector value(Vector x, Vector* slope) {
    const Vector s = sigmoid(x), result = mul(x, s);
    *slope = fma(result, sub(set(1.0f), s), s);
    return result;
  }
};

// x/2 (1 + tanh(k (x + 0.044715 x^3))) with k = sqrt(2/pi) (arXiv 1606.08415), as x sigmoid(2k ...):
// the same, but with small results whose digits are right.
struct GeluTanh {
  static Vector value(Vector x, Vector* slope) {
    constexpr float TWICE_K = 1.5957691216f, CUBIC = TWICE_K * 0.044715f;
    // Beyond 16 nothing changes but that x^2 could overflow, and infinity times 0 is NaN.
    const Vector near = min(set(16.0f), max(set(-16.0f), x)), square = mul(near, near);
    const Vector s = sigmoid(mul(near, fma(square, set(CUBIC), set(TWICE_K))));
    const Vector steep = fma(square, set(3 * CUBIC), set(TWICE_K));
    *slope = fma(mul(mul(near, s), sub(set(1.0f), s)), steep, s);
    return mul(x, s);
  }
};

// x Phi(x) with the normal distribution's Phi(x) = (1 + erf(x / sqrt(2))) / 2.
//
// Phi(-a) = exp(-a^2/2) t P(q) for a >= 0, with t = 1/(a + 3) and q = 1 - 6t: the form of Abramowitz
// and Stegun 26.2.17 in the variable of Shepherd and Laframboise (Math. Comp. 36 (1981) 249-253). P is
// the polynomial of degree 9 with the smallest relative error on 0 <= a <= 15, 2.1e-8, found by Remez'
// algorithm. So small values keep their digits, which 1 + erf loses for x < 0.
struct Gelu {
  static Vector value(Vector x, Vector* slope) {
    // Beyond 15 the exponential is 0.
    const Vector near = min(set(15.0f), max(set(-15.0f), x)), a = max(sub(zero(), near), near);
    const Vector half = mul(a, set(0.5f)), h = mul(half, a);
    // What the rounding of h left out, which e^-h would turn into a relative error h times as large.
    const Vector left = fma(half, a, sub(zero(), h));
    Vector e = exp(sub(zero(), h));
    e = fma(sub(zero(), left), e, e);
    const Vector t = div(set(1.0f), add(a, set(3.0f))), q = fma(t, set(-6.0f), set(1.0f));
    Vector p = set(5.451318793e-05f);
    p = fma(p, q, set(-1.993906044e-04f));
    p = fma(p, q, set(-9.472225793e-04f));
    p = fma(p, q, set(1.013509347e-03f));
    p = fma(p, q, set(6.936855149e-03f));
    p = fma(p, q, set(-1.046151854e-02f));
    p = fma(p, q, set(-4.725801945e-02f));
    p = fma(p, q, set(2.300176322e-01f));
    p = fma(p, q, set(-5.093321800e-01f));
    p = fma(p, q, set(7.290837169e-01f));
    const Vector below = mul(e, mul(t, p));
    // 1 for x > 0, else 0; in between only where `below` is one half and it does not matter.
    const Vector positive = min(set(1.0f), max(zero(), mul(x, set(1e30f))));
    const Vector phi = fma(positive, fma(below, set(-2.0f), set(1.0f)), below);
    *slope = fma(near, mul(e, set(0.3989422804f)), phi);
    return mul(x, phi);
  }
};

// Infinity times 1e60 is no NaN, and the smallest float times that is more than 1; NaN stays NaN.
struct Relu {
  static Vector value(Vector x, Vector* slope) {
    *slope = min(set(1.0f), max(zero(), mul(mul(x, set(1e30f)), set(1e30f))));
    return max(zero(), x);
  }
};

template <class Unit, class T>
void gated(const T* gate_up, T* out, int64_t tokens, int64_t size, int threads) {
  parallel_range(threads_for(threads, tokens * size), tokens, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const T* gate = gate_up + 2 * t * size;
      each(size, [&](int64_t i, auto part) __attribute__((always_inline)) {
        Vector slope;
        const Vector value = Unit::value(part.take(gate + i), &slope);
        part.give(out + t * size + i, mul(value, part.take(gate + size + i)));
      });
    }
  });
}

template <class Unit, class T>
void gated_backward(const T* grad, const T* gate_up, T* grad_gate_up, T* again, int64_t tokens, int64_t size,
                    int threads) {
  parallel_range(threads_for(threads, tokens * size), tokens, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const T* gate = gate_up + 2 * t * size;
      T* to = grad_gate_up + 2 * t * size;
      each(size, [&](int64_t i, auto part) __attribute__((always_inline)) {
        Vector slope;
        const Vector value = Unit::value(part.take(gate + i), &slope);
        const Vector up = part.take(gate + size + i), g = part.take(grad + t * size + i);
        part.give(to + i, mul(mul(g, up), slope));
        part.give(to + size + i, mul(g, value));
        if (again) part.give(again + t * size + i, mul(value, up));
      });
    }
  });
}

// Elements that a thread takes at a time.
constexpr int64_t STRETCH = 4096;

template <class Unit, class T>
void activate(const T* x, T* out, int64_t count, int threads) {
  parallel_range(threads_for(threads, count), count, STRETCH, [&](int64_t first, int64_t last) {
    each(last - first, [&](int64_t offset, auto part) __attribute__((always_inline)) {
      Vector slope;
      part.give(out + first + offset, Unit::value(part.take(x + first + offset), &slope));
    });
  });
}

template <class Unit, class T>
void activate_backward(const T* grad, const T* x, T* out, T* again, int64_t count, int threads) {
  parallel_range(threads_for(threads, count), count, STRETCH, [&](int64_t first, int64_t last) {
    each(last - first, [&](int64_t offset, auto part) __attribute__((always_inline)) {
      const int64_t i = first + offset;
      Vector slope;
      const Vector value = Unit::value(part.take(x + i), &slope);
      part.give(out + i, mul(part.take(grad + i), slope));
      if (again) part.give(again + i, value);
    });
  });
}

template <class T>
void add_scaled(const T* residual, const T* states, T* out, float scale, int64_t count, int threads) {
  const Vector by = set(scale);
  parallel_range(threads_for(threads, count), count, STRETCH, [&](int64_t first, int64_t last) {
    each(last - first, [&](int64_t offset, auto part) __attribute__((always_inline)) {
      const int64_t i = first + offset;
      const Vector value = part.take(states + i);
      part.give(out + i, residual ? fma(value, by, part.take(residual + i)) : mul(value, by));
    });
  });
}

// --- the optimizer -----------------------------------------------------------------------------------

// Decoupled weight decay (arXiv 1711.05101), with the operations of torch.optim.AdamW(fused=True) in
// its order. What is computed once a step comes rounded once from double: 1 - beta2 of a rounded
// beta2 would be wrong in its fifth digit.
struct AdamW {
  float *param, *grad, *m, *v;
  float keep, new1, beta2, new2, rate, root, eps, grad_scale;
};

inline void adamw_range(const AdamW& a, float keep, int64_t first, int64_t last) {
  // As torch's lerp: the form that is exact at the nearer end.
  const bool mostly_new = a.new1 >= 0.5f;
  const Vector to_m = set(mostly_new ? a.new1 - 1.0f : a.new1);
  const Vector decay = set(keep), beta2 = set(a.beta2), new2 = set(a.new2), rate = set(-a.rate);
  const Vector root = set(a.root), eps = set(a.eps), scale = set(a.grad_scale);
  each(last - first, [&](int64_t offset, auto part) __attribute__((always_inline)) {
    const int64_t i = first + offset;
    const Vector g = mul(part.take(a.grad + i), scale), before = part.take(a.m + i);
    const Vector m = fma(to_m, sub(g, before), mostly_new ? g : before);
    const Vector v = fma(mul(new2, g), g, mul(part.take(a.v + i), beta2));
    const Vector size = add(div(sqrt(v), root), eps);
    const Vector step = div(mul(rate, m), size);
    // Times 1, so that the compiler does not make one operation of decay and step, which torch rounds apart.
    part.give(a.param + i, fma(step, set(1.0f), mul(part.take(a.param + i), decay)));
    part.give(a.m + i, m);
    part.give(a.v + i, v);
    part.give(a.grad + i, zero());
  });
}

// Blocks of a sum of squares, the same for any number of threads.
constexpr int64_t BLOCK = 65536;
constexpr int LANES = 16;

// The vectors are of floats; the compiler makes vectors of doubles of these lanes.
inline double squares(const float* at, int64_t count) {
  double lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int j = 0; j < LANES; ++j) lanes[j] += static_cast<double>(at[i + j]) * static_cast<double>(at[i + j]);
  for (int j = 0; i + j < count; ++j) lanes[j] += static_cast<double>(at[i + j]) * static_cast<double>(at[i + j]);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

// --- copies and sums ---------------------------------------------------------------------------------

// A matrix in fp32 whose rows follow one another, and where its scaled copy goes.
struct Copy {
  int64_t source, target, rows, columns, target_stride;  // the first two are addresses
};

template <class T>
inline void copy_scaled(const Copy& copy, float scale) {
  const float* source = reinterpret_cast<const float*>(static_cast<intptr_t>(copy.source));
  T* target = reinterpret_cast<T*>(static_cast<intptr_t>(copy.target));
  const Vector by = set(scale);
  const bool together = copy.target_stride == copy.columns;
  const int64_t rows = together ? 1 : copy.rows, columns = together ? copy.rows * copy.columns : copy.columns;
  for (int64_t r = 0; r < rows; ++r) {
    each(columns, [&](int64_t i, auto part) __attribute__((always_inline)) {
      part.give(target + r * copy.target_stride + i, mul(part.take(source + r * columns + i), by));
    });
  }
}

template <class T>
void column_sums(const T* grad, int64_t stride, float* out, int64_t rows, int64_t columns, int threads) {
  // Sums of this many rows are added to one another: a long sum in fp32 loses digits.
  constexpr int64_t ROWS = 128;
  parallel_range(threads_for(threads, rows * columns), columns, 64, [&](int64_t first, int64_t last) {
    each(last - first, [&](int64_t offset, auto part) __attribute__((always_inline)) {
      Vector all = zero();
      for (int64_t start = 0; start < rows; start += ROWS) {
        const int64_t stop = smaller(rows, start + ROWS);
        const T* column = grad + first + offset;
        Vector some = zero(), others = zero();
        int64_t r = start;
        for (; r + 2 <= stop; r += 2) {
          some = add(some, part.take(column + r * stride));
          others = add(others, part.take(column + (r + 1) * stride));
        }
        if (r < stop) some = add(some, part.take(column + r * stride));
        all = add(all, add(some, others));
      }
      part.give(out + first + offset, all);
    });
  });
}

// body(unit) for 0 SiLU, 1 GELU with tanh, 2 GELU, 3 ReLU.
template <class Body>
inline void with_unit(int kind, const Body& body) {
  if (kind == 0) body(Silu{});
  else if (kind == 1) body(GeluTanh{});
  else if (kind == 2) body(Gelu{});
  else body(Relu{});
}

}  // namespace

// Turns the first 2 * half features of each head, feature i with i + half; sign -1 turns back. cos and
// sin are [tokens, half], fp32 if table_floats, else of x's type. out may be x.
LORIMER_EXPORT(rotate)
(const void* x, int64_t x_stride, const void* cos, const void* sin, int table_floats, void* out, int64_t out_stride,
 int64_t tokens, int64_t heads, int64_t size, int64_t half, float sign, int dtype, int threads) {
  const Turn turn = {tokens, heads, size, half, sign};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (table_floats)
      rotate(as<T>(x), x_stride, as<float>(cos), as<float>(sin), as<T>(out), out_stride, turn, threads);
    else
      rotate(as<T>(x), x_stride, as<T>(cos), as<T>(sin), as<T>(out), out_stride, turn, threads);
  });
}

// [tokens, 2 size] -> [tokens, size]: activation(gate) * up.
LORIMER_EXPORT(gated)
(const void* gate_up, void* out, int64_t tokens, int64_t size, int kind, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_unit(kind, [&](auto unit) {
      gated<decltype(unit)>(as<T>(gate_up), as<T>(out), tokens, size, threads);
    });
  });
}

// Gradients of gate and up, and the forward's result again unless `again` is null. grad_gate_up may be gate_up.
LORIMER_EXPORT(gated_backward)
(const void* grad, const void* gate_up, void* grad_gate_up, void* again, int64_t tokens, int64_t size, int kind,
 int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_unit(kind, [&](auto unit) {
      gated_backward<decltype(unit)>(as<T>(grad), as<T>(gate_up), as<T>(grad_gate_up), as<T>(again), tokens, size,
                                     threads);
    });
  });
}

// out = activation(x) for `count` elements.
LORIMER_EXPORT(activate)(const void* x, void* out, int64_t count, int kind, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_unit(kind, [&](auto unit) { activate<decltype(unit)>(as<T>(x), as<T>(out), count, threads); });
  });
}

// out = gradient of x, and the activation again unless `again` is null. out may be grad or x.
LORIMER_EXPORT(activate_backward)
(const void* grad, const void* x, void* out, void* again, int64_t count, int kind, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_unit(kind, [&](auto unit) {
      activate_backward<decltype(unit)>(as<T>(grad), as<T>(x), as<T>(out), as<T>(again), count, threads);
    });
  });
}

// out = residual + scale * states for `count` elements; residual may be null. out may be either.
LORIMER_EXPORT(add_scaled)
(const void* residual, const void* states, void* out, float scale, int64_t count, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    add_scaled(as<T>(residual), as<T>(states), as<T>(out), scale, count, threads);
  });
}

// One step over flat buffers; the first decay_until parameters are multiplied by `keep`. The gradient is
// multiplied by grad_scale before use and zero afterwards. keep = 1 - lr * weight_decay, new1 = 1 - beta1,
// new2 = 1 - beta2, rate = lr / (1 - beta1^step), root = sqrt(1 - beta2^step).
LORIMER_EXPORT(adamw)
(float* param, float* grad, float* m, float* v, int64_t n, int64_t decay_until, float keep, float new1, float beta2,
 float new2, float rate, float root, float eps, float grad_scale, int threads) {
  const AdamW all = {param, grad, m, v, keep, new1, beta2, new2, rate, root, eps, grad_scale};
  parallel_range(threads_for(threads, n), n, 4096, [&](int64_t first, int64_t last) {
    const int64_t middle = smaller(last, larger(first, decay_until));
    adamw_range(all, all.keep, first, middle);
    adamw_range(all, 1.0f, middle, last);
  });
}

// The sum of squares, in double.
LORIMER_EXPORT(squared_norm)(const float* values, int64_t n, double* result, int threads) {
  const int64_t blocks = ceil_div(n, BLOCK);
  double* sums = scratch<double>(0, blocks);
  parallel_range(threads_for(threads, n), blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) sums[b] = squares(values + b * BLOCK, smaller(BLOCK, n - b * BLOCK));
  });
  double all = 0.0;
  for (int64_t b = 0; b < blocks; ++b) all += sums[b];
  *result = all;
}

// target = source * scale for `count` matrices; a row of `copies` is five int64, see Copy.
LORIMER_EXPORT(scaled_copies)(const int64_t* copies, const float* scales, int64_t count, int dtype, int threads) {
  const Copy* all = reinterpret_cast<const Copy*>(copies);
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) elements += all[i].rows * all[i].columns;
  with_type(dtype, [&](auto type) {
    parallel_tasks(threads_for(threads, elements), count,
                   [&](int64_t i) { copy_scaled<decltype(type)>(all[i], scales[i]); });
  });
}

// out[c] = sum over rows, in fp32.
LORIMER_EXPORT(column_sums)
(const void* grad, int64_t stride, float* out, int64_t rows, int64_t columns, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    column_sums(as<decltype(type)>(grad), stride, out, rows, columns, threads);
  });
}

LORIMER_ON_TAPE(rotate)
LORIMER_ON_TAPE(gated)
LORIMER_ON_TAPE(activate)
LORIMER_ON_TAPE(add_scaled)
