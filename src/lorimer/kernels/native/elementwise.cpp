// What is done element by element or row by row: norms, rotation, gated units, AdamW, copies.
//
// Arithmetic and sums are in fp32 whatever the type of the states, and each result is rounded once.
// A result does not depend on the number of threads: where sums cross rows or blocks, the blocks are
// the same for any number and are added in order.
//
// Everywhere: dtype 0 is fp32, 1 is bf16; strides are in elements; T tokens, of which each has
// `inner` rows of `size` features (heads, or one row for hidden states) that lie one after the other.
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
};

// The last elements, fewer than a vector holds; zeros after them.
struct Rest {
  int64_t count;
  template <class T>
  Vector take(const T* at) const { return load_some(at, count); }
  template <class T>
  void give(T* at, Vector value) const { store_some(at, value, count); }
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

// --- RMSNorm (arXiv 1910.07467) ---------------------------------------------------------------------

struct Shape {
  int64_t tokens, inner, size;
  int64_t elements() const { return tokens * inner * size; }
};

enum Slot { SUMS, FACTORS };

// What a normed feature is multiplied by: weight + offset, 1 for bases that keep their weights around 0.
inline const float* factors_of(const float* weight, float offset, int64_t size) {
  if (offset == 0.0f) return weight;
  float* factors = scratch<float>(FACTORS, size);
  each(size, [&](int64_t i, auto part) { part.give(factors + i, add(part.take(weight + i), set(offset))); });
  return factors;
}

template <class T>
inline void scale_row(const T* x, float rstd, const float* factors, T* out, int64_t size) {
  const Vector rate = set(rstd);
  each(size, [&](int64_t i, auto part) __attribute__((always_inline)) {
    part.give(out + i, mul(mul(part.take(x + i), rate), part.take(factors + i)));
  });
}

template <class T>
inline float rstd_of(const T* x, int64_t size, float eps) {
  const float squares = total(size, [&](int64_t i, auto part, Vector so_far) __attribute__((always_inline)) {
    const Vector value = part.take(x + i);
    return fma(value, value, so_far);
  });
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(size) + eps);
}

// `again` takes the factors of each row from rstd, else they are computed and put there.
template <class T>
void norm(const T* x, int64_t x_stride, const float* factors, T* out, int64_t out_stride, float* rstd, bool again,
          float eps, const Shape& shape, int threads) {
  parallel_range(threads_for(threads, shape.elements()), shape.tokens, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      for (int64_t i = 0; i < shape.inner; ++i) {
        const T* row = x + t * x_stride + i * shape.size;
        const float rate = again ? rstd[t * shape.inner + i] : rstd_of(row, shape.size, eps);
        if (rstd && !again) rstd[t * shape.inner + i] = rate;
        scale_row(row, rate, factors, out + t * out_stride + i * shape.size, shape.size);
      }
    }
  });
}

// One row: with n = x * rstd and w the factors, rstd * (g w - n mean(g w n)), onto what is there.
template <class G, class T>
inline void norm_backward_row(const G* grad, const T* x, float rstd, const float* factors, const T* onto, T* out,
                              float* grad_weight, int64_t size) {
  const float dot = total(size, [&](int64_t i, auto part, Vector so_far) __attribute__((always_inline)) {
    return fma(mul(part.take(grad + i), part.take(factors + i)), part.take(x + i), so_far);
  });
  const Vector rate = set(rstd), back = set(-(dot * rstd / static_cast<float>(size)) * rstd);
  each(size, [&](int64_t i, auto part) __attribute__((always_inline)) {
    const Vector g = part.take(grad + i), value = part.take(x + i);
    const Vector inner = fma(value, back, mul(g, part.take(factors + i)));
    if (grad_weight) part.give(grad_weight + i, fma(g, mul(value, rate), part.take(grad_weight + i)));
    part.give(out + i, fma(rate, inner, onto ? part.take(onto + i) : zero()));
  });
}

// Blocks of tokens that each have a sum of their own for the weight's gradient.
constexpr int64_t MOST_BLOCKS = 64;

template <class G, class T>
void norm_backward(const G* grad, int64_t grad_stride, const T* x, int64_t x_stride, const float* rstd,
                   const float* factors, const T* onto, int64_t onto_stride, T* out, int64_t out_stride,
                   float* grad_weight, const Shape& shape, int threads) {
  const int64_t size = shape.size, block = larger<int64_t>(1, ceil_div(shape.tokens, MOST_BLOCKS));
  const int64_t blocks = ceil_div(shape.tokens, block);
  float* sums = grad_weight ? scratch<float>(SUMS, blocks * size) : nullptr;
  if (sums) std::memset(sums, 0, static_cast<size_t>(blocks * size) * sizeof(float));
  parallel_range(threads_for(threads, shape.elements()), shape.tokens, block, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      float* mine = sums ? sums + t / block * size : nullptr;
      for (int64_t i = 0; i < shape.inner; ++i) {
        const int64_t at = i * size;
        norm_backward_row(grad + t * grad_stride + at, x + t * x_stride + at, rstd[t * shape.inner + i], factors,
                          onto ? onto + t * onto_stride + at : nullptr, out + t * out_stride + at, mine, size);
      }
    }
  });
  if (!grad_weight) return;
  each(size, [&](int64_t i, auto part) __attribute__((always_inline)) {
    Vector all = zero();
    for (int64_t b = 0; b < blocks; ++b) all = add(all, part.take(sums + b * size + i));
    part.give(grad_weight + i, all);
  });
}

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

// --- gated units (arXiv 2002.05202) ------------------------------------------------------------------

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

// body(type) with a value of the type of the states.
template <class Body>
inline void with_type(int dtype, const Body& body) {
  if (dtype == 0) body(float{});
  else body(bf16{});
}

// body(unit) for 0 SwiGLU, 1 GeGLU with tanh, 2 GeGLU.
template <class Body>
inline void with_unit(int kind, const Body& body) {
  if (kind == 0) body(Silu{});
  else if (kind == 1) body(GeluTanh{});
  else body(Gelu{});
}

template <class T>
inline const T* as(const void* at) { return static_cast<const T*>(at); }
template <class T>
inline T* as(void* at) { return static_cast<T*>(at); }

}  // namespace

// out = x / sqrt(mean(x^2) + eps) * (weight + offset) for each row; `rstd` [tokens, inner] may be null.
LORIMER_EXPORT(rms_norm)
(const void* x, int64_t x_stride, const float* weight, void* out, int64_t out_stride, float* rstd, int64_t tokens,
 int64_t inner, int64_t size, float eps, float offset, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    norm(as<T>(x), x_stride, factors_of(weight, offset, size), as<T>(out), out_stride, rstd, false, eps, {tokens, inner, size},
         threads);
  });
}

// The same again from the saved rstd.
LORIMER_EXPORT(rms_norm_apply)
(const void* x, int64_t x_stride, float* rstd, const float* weight, void* out, int64_t out_stride, int64_t tokens,
 int64_t inner, int64_t size, float offset, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    norm(as<T>(x), x_stride, factors_of(weight, offset, size), as<T>(out), out_stride, rstd, true, 0.0f, {tokens, inner, size},
         threads);
  });
}

// out = onto + gradient of x; `onto` and grad_weight [size] may be null; out may be onto, or grad if that
// is of x's type. The gradient is fp32 if grad_floats, else of x's type.
LORIMER_EXPORT(rms_norm_backward)
(const void* grad, int64_t grad_stride, int grad_floats, const void* x, int64_t x_stride, const float* rstd,
 const float* weight, const void* onto, int64_t onto_stride, void* out, int64_t out_stride, float* grad_weight,
 int64_t tokens, int64_t inner, int64_t size, float offset, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const float* factors = factors_of(weight, offset, size);
    const Shape shape = {tokens, inner, size};
    if (grad_floats) {
      norm_backward(as<float>(grad), grad_stride, as<T>(x), x_stride, rstd, factors, as<T>(onto), onto_stride,
                    as<T>(out), out_stride, grad_weight, shape, threads);
    } else {
      norm_backward(as<T>(grad), grad_stride, as<T>(x), x_stride, rstd, factors, as<T>(onto), onto_stride,
                    as<T>(out), out_stride, grad_weight, shape, threads);
    }
  });
}

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
  double* sums = scratch<double>(SUMS, blocks);
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

LORIMER_ON_TAPE(rms_norm)
LORIMER_ON_TAPE(rotate)
LORIMER_ON_TAPE(gated)
