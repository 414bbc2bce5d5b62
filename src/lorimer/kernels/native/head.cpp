// The loss head: cross entropy over the vocabulary and its gradient by the hidden states, in one sweep.
//
// As in attention, with the hidden states as queries and the head's rows as keys and values: logits
// exist for one tile of the vocabulary at a time, are turned into exp(z - m), summed, and multiplied
// with the same tile again. Nothing is stored for a backward and nothing is computed twice. That is
// possible because the head is frozen.
//
// Letters: M trained positions, H hidden size, V vocabulary.
#include "gemm.hpp"
#include "quantised.hpp"

namespace {

enum Slot { SLOPES, NARROW_SLOPES, FORWARD = 5, BACKWARD, LOGITS, NARROW, STATE, SUMS, COPY_HEAD, STRIP_HEAD = 13, CHOSEN };

// Positions that share one sweep: their sums, [positions, H] floats, stay in the second cache.
constexpr int64_t MOST_POSITIONS = 192;
// Sums are scaled anew only when a logit exceeds the reference by so much: exp(30) is far from a
// float's end, and a tile seldom brings a new maximum at all.
constexpr float SLACK = 30.0f;
// Tiles whose sums are taken together before they join the others: a small term that is added to a
// large sum straight away vanishes, and a vocabulary brings a thousand of them.
constexpr int64_t TOGETHER = 24;

struct Head {
  const void* hidden;
  const void* head;
  const int64_t* labels;
  float* losses;
  void* grad;
  int64_t m, h, v, stride;
  float weight, smoothing;
  float cap;    // logits become cap * tanh(logits / cap), unless it is 0
  Parts parts;  // the head where it is quantised, else none
};

// What one thread has summed up over its part of the vocabulary, for each position.
struct Share {
  double *total, *logits;      // [positions]
  float *reference, *label;    // [positions]
  float *sums, *recent;        // [positions, width]: of earlier tiles, and of the last few
  float* head_sum;             // [width]
  float* slope_sum;            // [positions, width]: its rows times the slopes of capped logits
};

template <class T>
struct Sizes {
  static constexpr bool PAIRED = PAIRS && sizeof(T) == 2;
  static constexpr int64_t TILE = PAIRED || 4 * PANEL < 64 ? 4 * PANEL : 64;
};

// Caps a row of a tile; `slopes` are those of the capped logits by what they were, unless null.
inline void cap_row(float* z, int64_t columns, int64_t tile, float cap, float* slopes) {
  const Vector per_cap = set(1.0f / cap), high = set(cap);
  for (int64_t j = 0; j < tile; j += WIDTH) {
    const Vector bent = tanh(mul(load(z + j), per_cap));
    store(z + j, mul(high, bent));
    if (slopes) store(slopes + j, fma(sub(zero(), bent), bent, set(1.0f)));
  }
  for (int64_t j = columns; slopes && j < tile; ++j) slopes[j] = 0.0f;
}

// One row of a tile: logits become exp(z - reference), summed; the reference moves if it must.
inline void weigh_row(float* z, int64_t columns, int64_t tile, int64_t i, bool first_tile, int64_t width, bool gradient,
                      const Share& share) {
  // What is missing in the vocabulary's last tile repeats a logit that is there: it changes no maximum.
  for (int64_t j = columns; j < tile; ++j) z[j] = z[0];
  Vector high = load(z);
  for (int64_t j = WIDTH; j < tile; j += WIDTH) high = max(high, load(z + j));
  const float top = largest(high);
  if (first_tile) share.reference[i] = top;
  if (top > share.reference[i] + SLACK) {
    const Vector factor = exp(set(share.reference[i] - top));
    float* const both[] = {share.sums, share.recent};
    for (float* sums : both)
      for (int64_t j = i * width; gradient && j < (i + 1) * width; j += WIDTH)
        store(sums + j, mul(load(sums + j), factor));
    share.total[i] *= static_cast<double>(sum(factor) / WIDTH);
    share.reference[i] = top;
  }
  const Vector reference = set(share.reference[i]);
  for (int64_t j = 0; j < tile; j += WIDTH) store(z + j, exp(sub(load(z + j), reference)));
  for (int64_t j = columns; j < tile; ++j) z[j] = 0.0f;
  Vector total = zero();
  for (int64_t j = 0; j < tile; j += WIDTH) total = add(total, load(z + j));
  share.total[i] += static_cast<double>(sum(total));
}

template <class T>
void sweep(const Head& job, int64_t start, int64_t count, int64_t first_row, int64_t last_row, int64_t width,
           const Share& share) {
  constexpr bool PAIRED = Sizes<T>::PAIRED;
  constexpr int64_t TILE = Sizes<T>::TILE;
  using Blocks = Unit<PAIRED>;
  const typename Blocks::Use use;
  T* strip = job.parts.count ? scratch<T>(STRIP_HEAD, TILE * job.h) : nullptr;
  const T* hidden = static_cast<const T*>(job.hidden) + start * job.stride;
  const int64_t units = units_of<T>(job.h), back_units = units_of<T>(TILE);
  const bool gradient = job.grad != nullptr, smoothing = job.smoothing != 0.0f, capped = job.cap > 0.0f;
  const bool bent = gradient && smoothing && capped;  // every token's even share has a slope of its own
  float* slopes = gradient && capped ? scratch<float>(SLOPES, count * TILE) : nullptr;
  bf16* narrow_slopes = bent && PAIRED ? scratch<bf16>(NARROW_SLOPES, count * TILE) : nullptr;
  float* forward = scratch<float>(FORWARD, TILE * units);
  float* backward = gradient ? scratch<float>(BACKWARD, back_units * width) : nullptr;
  float* logits = scratch<float>(LOGITS, count * TILE);
  bf16* narrow_p = PAIRED ? scratch<bf16>(NARROW, count * TILE) : nullptr;
  const char* rows = reinterpret_cast<const char*>(hidden);
  int64_t row_bytes = job.stride * static_cast<int64_t>(sizeof(T));
  if (sizeof(T) == 2 && (!PAIRS || job.h % 2)) {
    float* copy = scratch<float>(COPY_HEAD, count * units);
    copy_rows(hidden, job.stride, false, 0, count, job.h, copy);
    rows = reinterpret_cast<const char*>(copy);
    row_bytes = units * 4;
  }
  for (int64_t i = 0; i < count; ++i) {
    share.total[i] = share.logits[i] = 0.0;
    share.label[i] = share.reference[i] = 0.0f;
  }
  for (int64_t i = 0; gradient && i < count * width; ++i) share.sums[i] = share.recent[i] = 0.0f;
  for (int64_t i = 0; smoothing && i < width; ++i) share.head_sum[i] = 0.0f;
  for (int64_t i = 0; bent && i < count * width; ++i) share.slope_sum[i] = 0.0f;
  int64_t since = 0;
  for (int64_t tile = first_row; tile < last_row; tile += TILE) {
    const int64_t columns = smaller(TILE, last_row - tile);
    for (int64_t i = 0; strip && i < columns; ++i) read_row(job.parts, tile + i, 0, job.h, strip + i * job.h);
    const T* head = strip ? strip : static_cast<const T*>(job.head) + tile * job.h;
    for (int64_t j = 0; j < TILE; j += PANEL)
      if (j < columns)
        pack_columns(head + j * job.h, job.h, job.h, smaller<int64_t>(PANEL, columns - j), forward + j * units);
    for (int64_t at = 0, block; at < count; at += block) {
      block = Blocks::next(count - at);
      for (int64_t j = 0; j < columns; j += PANEL)
        Blocks::run(block, {rows + at * row_bytes, row_bytes, forward + j * units, units}, logits + at * TILE + j, TILE,
                    false);
    }
    for (int64_t i = 0; i < count; ++i) {
      float* z = logits + i * TILE;
      float* slope = slopes ? slopes + i * TILE : nullptr;
      if (capped) cap_row(z, columns, TILE, job.cap, slope);
      const int64_t label = job.labels[start + i] - tile;
      if (label >= 0 && label < columns) share.label[i] = z[label];
      for (int64_t j = 0; smoothing && j < columns; ++j) share.logits[i] += static_cast<double>(z[j]);
      weigh_row(z, columns, TILE, i, tile == first_row, width, gradient, share);
      for (int64_t j = 0; slope && j < TILE; j += WIDTH) store(z + j, mul(load(z + j), load(slope + j)));
      for (int64_t j = 0; PAIRED && j < TILE; j += WIDTH) store(narrow_p + i * TILE + j, load(z + j));
      for (int64_t j = 0; narrow_slopes && j < TILE; j += WIDTH)
        store(narrow_slopes + i * TILE + j, load(slope + j));
    }
    if (!gradient) continue;
    const int64_t here = units_of<T>(columns);
    for (int64_t j = 0; j < job.h; j += PANEL)
      pack_rows(head + j, job.h, columns, smaller<int64_t>(PANEL, job.h - j), backward + j * back_units);
    if (smoothing && !capped)
      for (int64_t k = 0; k < columns; ++k)
        for (int64_t j = 0; j < job.h; ++j) share.head_sum[j] += widen(head[k * job.h + j]);
    const char* p = PAIRED ? reinterpret_cast<const char*>(narrow_p) : reinterpret_cast<const char*>(logits);
    const int64_t p_bytes = TILE * (PAIRED ? 2 : 4);
    const char* s = PAIRED ? reinterpret_cast<const char*>(narrow_slopes) : reinterpret_cast<const char*>(slopes);
    for (int64_t at = 0, block; at < count; at += block) {
      block = Blocks::next(count - at);
      for (int64_t j = 0; j < job.h; j += PANEL) {
        const float* panel = backward + j * back_units;
        Blocks::run(block, {p + at * p_bytes, p_bytes, panel, here}, share.recent + at * width + j, width, true);
        if (bent)
          Blocks::run(block, {s + at * p_bytes, p_bytes, panel, here}, share.slope_sum + at * width + j, width, true);
      }
    }
    if (++since < TOGETHER && tile + TILE < last_row) continue;
    since = 0;
    for (int64_t i = 0; i < count * width; i += WIDTH) {
      store(share.sums + i, add(load(share.sums + i), load(share.recent + i)));
      store(share.recent + i, zero());
    }
  }
}

// The threads' shares of one position become its loss and its gradient.
template <class T>
void combine(const Head& job, const Share* shares, int parts, int64_t position, int64_t i, int64_t width) {
  const float smoothing = job.smoothing;
  float top = shares[0].reference[i];
  for (int t = 1; t < parts; ++t) top = shares[t].reference[i] > top ? shares[t].reference[i] : top;
  float factors[256], label = 0.0f;
  double total = 0.0, logits = 0.0;
  for (int t = 0; t < parts; ++t) {
    factors[t] = sum(exp(set(shares[t].reference[i] - top))) / WIDTH;
    total += shares[t].total[i] * static_cast<double>(factors[t]);
    label += shares[t].label[i];
    logits += shares[t].logits[i];
  }
  const double log_total = static_cast<double>(top) + __builtin_log(total), soft = static_cast<double>(smoothing);
  const double loss = log_total - (1.0 - soft) * static_cast<double>(label) - soft * (logits / static_cast<double>(job.v));
  job.losses[position] = static_cast<float>(loss);
  if (!job.grad) return;
  T* decoded = job.parts.count ? scratch<T>(CHOSEN, job.h) : nullptr;
  if (decoded) read_row(job.parts, job.labels[position], 0, job.h, decoded);
  const T* chosen = decoded ? decoded : static_cast<const T*>(job.head) + job.labels[position] * job.h;
  T* grad = static_cast<T*>(job.grad) + position * job.h;
  const float level = job.cap > 0.0f ? label / job.cap : 0.0f;
  const Vector hit = set((smoothing - 1.0f) * (1.0f - level * level)), even = set(-smoothing / static_cast<float>(job.v));
  for (int64_t j = 0; j < job.h; j += WIDTH) {
    Vector value = zero();
    for (int t = 0; t < parts; ++t) value = fma(load(shares[t].sums + i * width + j), set(static_cast<float>(static_cast<double>(factors[t]) / total)), value);
    value = fma(load_upto(chosen + j, job.h - j), hit, value);
    for (int t = 0; smoothing != 0.0f && t < parts; ++t)
      value = fma(load(job.cap > 0.0f ? shares[t].slope_sum + i * width + j : shares[t].head_sum + j), even, value);
    store_upto(grad + j, mul(value, set(job.weight)), job.h - j);
  }
}

template <class T>
void head_loss(const Head& job, int threads) {
  constexpr int64_t TILE = Sizes<T>::TILE;
  const int64_t width = ceil_div(job.h, PANEL) * PANEL, tiles = ceil_div(job.v, TILE);
  const int parts = static_cast<int>(smaller<int64_t>(smaller<int64_t>(threads, 256), tiles));
  const int64_t rounds = ceil_div(job.m, MOST_POSITIONS), most = ceil_div(job.m, rounds);
  const int64_t block = most * width, slopes = job.grad && job.smoothing != 0.0f && job.cap > 0.0f ? block : 0;
  const int64_t each = 2 * block + width + slopes;
  double* totals = scratch<double>(STATE, parts * 3 * most);
  float* sums = scratch<float>(SUMS, parts * each);
  Share shares[256];
  for (int t = 0; t < parts; ++t) {
    double* mine = totals + t * 3 * most;
    float* floats = reinterpret_cast<float*>(mine + 2 * most);
    float* my_sums = sums + t * each;
    shares[t] = {mine, mine + most, floats, floats + most, my_sums, my_sums + block, my_sums + 2 * block,
                 my_sums + 2 * block + width};
  }
  for (int64_t start = 0; start < job.m; start += most) {
    const int64_t count = smaller(most, job.m - start);
    parallel(parts, [&](int t, int) {
      const int64_t first_row = tiles * t / parts * TILE, last_row = smaller(tiles * (t + 1) / parts * TILE, job.v);
      sweep<T>(job, start, count, first_row, last_row, width, shares[t]);
    });
    parallel_range(threads, count, 16, [&](int64_t first_position, int64_t last) {
      for (int64_t i = first_position; i < last; ++i) combine<T>(job, shares, parts, start + i, i, width);
    });
  }
}

}  // namespace

// hidden [M, H] with `stride` elements a row and head [V, H], both of dtype (0 fp32, 1 bf16); labels
// int64 [M] in 0..V-1; losses fp32 [M]; grad [M, H] of weight * sum(losses), in dtype, or null. cap 0 is none.
LORIMER_EXPORT(head_loss)
(const void* hidden, int64_t stride, const void* head, const int64_t* labels, float* losses, void* grad, int64_t m,
 int64_t h, int64_t v, float weight, float smoothing, float cap, int dtype, int threads) {
  if (m <= 0 || v <= 0) return;
  Head job{hidden, head, labels, losses, grad, m, h, v, stride, weight, smoothing, cap, {}};
  if (dtype == 0) head_loss<float>(job, threads);
  else head_loss<bf16>(job, threads);
}

// As head_loss, with a quantised head.
LORIMER_EXPORT(quantised_head_loss)
(const void* hidden, int64_t stride, const Part* parts, int64_t part_count, const int64_t* labels, float* losses,
 void* grad, int64_t m, int64_t h, int64_t v, float weight, float smoothing, float cap, int dtype, int threads) {
  if (m <= 0 || v <= 0) return;
  Head job{hidden, nullptr, labels, losses, grad, m, h, v, stride, weight, smoothing, cap, {parts, part_count}};
  if (dtype == 0) head_loss<float>(job, threads);
  else head_loss<bf16>(job, threads);
}
