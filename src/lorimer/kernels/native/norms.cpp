// Norms row by row: RMSNorm, LayerNorm, and those of query and key where they lie stacked.
//
// Arithmetic and sums are in fp32 whatever the type of the states, and each result is rounded once.
// A result does not depend on the number of threads: where sums cross rows, the blocks are the same for
// any number and are added in order. Types, strides and tokens are as in rows.hpp.
#include "rows.hpp"

namespace {

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
inline void scale_row(const T* x, float rstd, const float* factors, const T* onto, T* out, int64_t size) {
  const Vector rate = set(rstd);
  each(size, [&](int64_t i, auto part) __attribute__((always_inline)) {
    const Vector normed = mul(part.take(x + i), rate), factor = part.take(factors + i);
    part.give(out + i, onto ? fma(normed, factor, part.take(onto + i)) : mul(normed, factor));
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

// Onto what is there, if `onto` is not null. `again` takes the factors of each row from rstd, else they are
// computed and put there.
template <class T>
void norm(const T* x, int64_t x_stride, const float* factors, const T* onto, int64_t onto_stride, T* out,
          int64_t out_stride, float* rstd, bool again, float eps, const Shape& shape, int threads) {
  parallel_range(threads_for(threads, shape.elements()), shape.tokens, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      for (int64_t i = 0; i < shape.inner; ++i) {
        const T* row = x + t * x_stride + i * shape.size;
        const float rate = again ? rstd[t * shape.inner + i] : rstd_of(row, shape.size, eps);
        if (!again) rstd[t * shape.inner + i] = rate;
        scale_row(row, rate, factors, onto ? onto + t * onto_stride + i * shape.size : nullptr,
                  out + t * out_stride + i * shape.size, shape.size);
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

// Blocks of tokens that each have a sum of their own for what the weight gets.
constexpr int64_t MOST_BLOCKS = 64;

// row(token, sums) for each token; what it adds to the `width` sums comes to `all`, or sums is null as `all` is.
template <class Row>
void each_token(const Shape& shape, int64_t width, float* all, int threads, const Row& row) {
  const int64_t block = larger<int64_t>(1, ceil_div(shape.tokens, MOST_BLOCKS)), blocks = ceil_div(shape.tokens, block);
  float* sums = all ? scratch<float>(SUMS, blocks * width) : nullptr;
  if (sums) std::memset(sums, 0, static_cast<size_t>(blocks * width) * sizeof(float));
  parallel_range(threads_for(threads, shape.elements()), shape.tokens, block, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) row(t, sums ? sums + t / block * width : nullptr);
  });
  if (!all) return;
  each(width, [&](int64_t i, auto part) __attribute__((always_inline)) {
    Vector total = zero();
    for (int64_t b = 0; b < blocks; ++b) total = add(total, part.take(sums + b * width + i));
    part.give(all + i, total);
  });
}

template <class G, class T>
void norm_backward(const G* grad, int64_t grad_stride, const T* x, int64_t x_stride, const float* rstd,
                   const float* factors, const T* onto, int64_t onto_stride, T* out, int64_t out_stride,
                   float* grad_weight, const Shape& shape, int threads) {
  each_token(shape, shape.size, grad_weight, threads, [&](int64_t t, float* sums) {
    for (int64_t i = 0; i < shape.inner; ++i) {
      const int64_t at = i * shape.size;
      norm_backward_row(grad + t * grad_stride + at, x + t * x_stride + at, rstd[t * shape.inner + i], factors,
                        onto ? onto + t * onto_stride + at : nullptr, out + t * out_stride + at, sums, shape.size);
    }
  });
}

// --- norms of query and key within their stacked buffer -----------------------------------------------

// Each token has rows of query, rows of key, and `rest` features that stay as they are.
struct Stack {
  Shape query, key;
  int64_t rest;
  int64_t keys() const { return query.inner * query.size; }
  int64_t others() const { return keys() + key.inner * key.size; }
};

template <class T>
void copy_others(const T* x, int64_t x_stride, T* out, int64_t out_stride, const Stack& stack, int threads) {
  if (out == x || stack.rest == 0) return;
  const int64_t tokens = stack.query.tokens, at = stack.others();
  parallel_range(threads_for(threads, tokens * stack.rest), tokens, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      std::memcpy(out + t * out_stride + at, x + t * x_stride + at, static_cast<size_t>(stack.rest) * sizeof(T));
  });
}

// --- LayerNorm (arXiv 1607.06450) ---------------------------------------------------------------------

// Of a row; in memory for each row one after the other.
struct Facts {
  float mean, rstd;
};

template <class T>
inline Facts facts_of(const T* x, int64_t size, float eps) {
  const float count = static_cast<float>(size);
  const float mean = total(size, [&](int64_t i, auto part, Vector so_far) __attribute__((always_inline)) {
    return add(part.take(x + i), so_far);
  }) / count;
  // The squares of what is left, and not those of x less that of the mean, which can cancel to nothing.
  const Vector middle = set(mean);
  const float squares = total(size, [&](int64_t i, auto part, Vector so_far) __attribute__((always_inline)) {
    const Vector away = part.only(sub(part.take(x + i), middle));
    return fma(away, away, so_far);
  });
  return {mean, 1.0f / __builtin_sqrtf(squares / count + eps)};
}

// `again` takes the facts of each row, else they are computed and put there.
template <class T>
void layer_norm(const T* x, int64_t x_stride, const float* weight, const float* bias, T* out, int64_t out_stride,
                Facts* facts, bool again, float eps, const Shape& shape, int threads) {
  each_token(shape, 0, nullptr, threads, [&](int64_t t, float*) {
    for (int64_t i = 0; i < shape.inner; ++i) {
      const T* row = x + t * x_stride + i * shape.size;
      T* to = out + t * out_stride + i * shape.size;
      Facts& known = facts[t * shape.inner + i];
      if (!again) known = facts_of(row, shape.size, eps);
      const Vector middle = set(known.mean), rate = set(known.rstd);
      each(shape.size, [&](int64_t j, auto part) __attribute__((always_inline)) {
        const Vector normed = mul(sub(part.take(row + j), middle), rate), factor = part.take(weight + j);
        part.give(to + j, bias ? fma(normed, factor, part.take(bias + j)) : mul(normed, factor));
      });
    }
  });
}

// One row: with n the normed x and w the weight, rstd * (g w - mean(g w) - n mean(g w n)). `sums` are those
// of the weight, then those of the bias.
template <class T>
inline void layer_norm_backward_row(const T* grad, const T* x, const Facts& facts, const float* weight, T* out,
                                    float* sums, int64_t size) {
  const float count = static_cast<float>(size);
  const Vector middle = set(facts.mean), rate = set(facts.rstd);
  const float level = total(size, [&](int64_t i, auto part, Vector so_far) __attribute__((always_inline)) {
    return fma(part.take(grad + i), part.take(weight + i), so_far);
  }) / count;
  const float dot = total(size, [&](int64_t i, auto part, Vector so_far) __attribute__((always_inline)) {
    return fma(mul(part.take(grad + i), part.take(weight + i)), sub(part.take(x + i), middle), so_far);
  }) / count;
  const Vector even = set(level), back = set(-(dot * facts.rstd) * facts.rstd);
  each(size, [&](int64_t i, auto part) __attribute__((always_inline)) {
    const Vector g = part.take(grad + i), away = sub(part.take(x + i), middle);
    if (sums) {
      part.give(sums + i, fma(g, mul(away, rate), part.take(sums + i)));
      part.give(sums + size + i, add(g, part.take(sums + size + i)));
    }
    part.give(out + i, mul(rate, fma(away, back, fma(g, part.take(weight + i), sub(zero(), even)))));
  });
}

}  // namespace

// out = onto + x / sqrt(mean(x^2) + eps) * (weight + offset) for each row; `onto` may be null, `rstd` is
// [tokens, inner]. out may be x or onto.
LORIMER_EXPORT(rms_norm)
(const void* x, int64_t x_stride, const float* weight, const void* onto, int64_t onto_stride, void* out,
 int64_t out_stride, float* rstd, int64_t tokens, int64_t inner, int64_t size, float eps, float offset, int dtype,
 int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    norm(as<T>(x), x_stride, factors_of(weight, offset, size), as<T>(onto), onto_stride, as<T>(out), out_stride, rstd,
         false, eps, {tokens, inner, size}, threads);
  });
}

// The same, onto nothing, again from the saved rstd.
LORIMER_EXPORT(rms_norm_apply)
(const void* x, int64_t x_stride, float* rstd, const float* weight, void* out, int64_t out_stride, int64_t tokens,
 int64_t inner, int64_t size, float offset, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    norm<T>(as<T>(x), x_stride, factors_of(weight, offset, size), nullptr, 0, as<T>(out), out_stride, rstd, true, 0.0f,
            {tokens, inner, size}, threads);
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

// RMSNorm of query rows and of key rows; `rest` features after them are copied, or stay where they are if out is
// x. rstd is [tokens, query_rows] and then [tokens, key_rows].
LORIMER_EXPORT(query_key_norm)
(const void* x, int64_t x_stride, const float* query_weight, const float* key_weight, void* out, int64_t out_stride,
 float* rstd, int64_t tokens, int64_t query_rows, int64_t query_size, int64_t key_rows, int64_t key_size, int64_t rest,
 float eps, float offset, int dtype, int threads) {
  const Stack stack = {{tokens, query_rows, query_size}, {tokens, key_rows, key_size}, rest};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = as<T>(x);
    T* to = as<T>(out);
    norm<T>(from, x_stride, factors_of(query_weight, offset, query_size), nullptr, 0, to, out_stride, rstd, false, eps,
            stack.query, threads);
    norm<T>(from + stack.keys(), x_stride, factors_of(key_weight, offset, key_size), nullptr, 0, to + stack.keys(),
            out_stride, rstd + tokens * query_rows, false, eps, stack.key, threads);
    copy_others(from, x_stride, to, out_stride, stack, threads);
  });
}

// Gradients of its input, and of both weights unless null. out may be grad.
LORIMER_EXPORT(query_key_norm_backward)
(const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, const float* rstd, const float* query_weight,
 const float* key_weight, void* out, int64_t out_stride, float* grad_query_weight, float* grad_key_weight,
 int64_t tokens, int64_t query_rows, int64_t query_size, int64_t key_rows, int64_t key_size, int64_t rest,
 float offset, int dtype, int threads) {
  const Stack stack = {{tokens, query_rows, query_size}, {tokens, key_rows, key_size}, rest};
  const int64_t keys = stack.keys();
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T *above = as<T>(grad), *from = as<T>(x);
    T* to = as<T>(out);
    norm_backward<T, T>(above, grad_stride, from, x_stride, rstd, factors_of(query_weight, offset, query_size), nullptr,
                        0, to, out_stride, grad_query_weight, stack.query, threads);
    norm_backward<T, T>(above + keys, grad_stride, from + keys, x_stride, rstd + tokens * query_rows,
                        factors_of(key_weight, offset, key_size), nullptr, 0, to + keys, out_stride, grad_key_weight,
                        stack.key, threads);
    copy_others(above, grad_stride, to, out_stride, stack, threads);
  });
}

// out = (x - mean) / sqrt(variance + eps) * weight + bias for each row; `bias` may be null. Mean and factor
// come to `facts` [tokens, inner, 2]. out may be x.
LORIMER_EXPORT(layer_norm)
(const void* x, int64_t x_stride, const float* weight, const float* bias, void* out, int64_t out_stride, float* facts,
 int64_t tokens, int64_t inner, int64_t size, float eps, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    layer_norm(as<T>(x), x_stride, weight, bias, as<T>(out), out_stride, reinterpret_cast<Facts*>(facts), false, eps,
               {tokens, inner, size}, threads);
  });
}

// The same again from the saved facts.
LORIMER_EXPORT(layer_norm_apply)
(const void* x, int64_t x_stride, float* facts, const float* weight, const float* bias, void* out, int64_t out_stride,
 int64_t tokens, int64_t inner, int64_t size, int dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    layer_norm(as<T>(x), x_stride, weight, bias, as<T>(out), out_stride, reinterpret_cast<Facts*>(facts), true, 0.0f,
               {tokens, inner, size}, threads);
  });
}

// out = gradient of x; those of weight and bias come to grad_both [2, size] unless it is null. out may be grad.
LORIMER_EXPORT(layer_norm_backward)
(const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, const float* facts, const float* weight,
 void* out, int64_t out_stride, float* grad_both, int64_t tokens, int64_t inner, int64_t size, int dtype, int threads) {
  const Shape shape = {tokens, inner, size};
  const Facts* known = reinterpret_cast<const Facts*>(facts);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    each_token(shape, 2 * size, grad_both, threads, [&](int64_t t, float* sums) {
      for (int64_t i = 0; i < inner; ++i) {
        const int64_t at = i * size;
        layer_norm_backward_row(as<T>(grad) + t * grad_stride + at, as<T>(x) + t * x_stride + at, known[t * inner + i],
                                weight, as<T>(out) + t * out_stride + at, sums, size);
      }
    });
  });
}

LORIMER_ON_TAPE(rms_norm)
LORIMER_ON_TAPE(query_key_norm)
LORIMER_ON_TAPE(layer_norm)
