// Causal attention of packed rows behind a prefix that they share: forward, backward, and one new token
// against a cache. Only blocks of scores that some query sees are computed, and none is kept.
//
// Letters: T tokens, N query heads, K key/value heads, D head size.
#include "attention.hpp"

#include <math.h>
#include <sched.h>

namespace {

enum Slot { TABLES, TASK, SUMS };

// A probability may be up to 2^SLACK too large against its column's reference before all is rescaled.
constexpr float SLACK = 8.0f;

// --- forward --------------------------------------------------------------------------------------

// Columns of a task, and keys of a step: scores of a panel against a step's keys stay in the L1 cache,
// the step's keys and values in the L2 cache.
constexpr int64_t FORWARD_COLUMNS = 384, FORWARD_KEYS = 168;

inline int64_t block_tokens(const Pack& pack, int64_t columns) { return larger<int64_t>(1, columns / pack.group()); }

template <class T>
struct ForwardRoom {
  static constexpr int64_t V_STRIDE = (FORWARD_KEYS / PER<T> + 15) / 16 * 16;
  T *gathered, *keys, *values;
  float *queries, *wide_keys, *panel, *turned_values, *scores, *probs;
  float *positions, *tops, *totals, *sums, *turned;

  ForwardRoom(Arena& arena, const Pack& pack) {
    const int64_t size = pack.size;
    const int64_t columns = round_up(block_tokens(pack, FORWARD_COLUMNS) * pack.group(), PANEL);
    gathered = arena.take<T>(columns * size);
    keys = arena.take<T>(FORWARD_KEYS * size);
    values = arena.take<T>(FORWARD_KEYS * size);
    queries = arena.take<float>(columns * units_of<T>(size));
    wide_keys = arena.take<float>(sizeof(Operand<T>) == sizeof(T) ? 0 : FORWARD_KEYS * size);
    panel = arena.take<float>(V_STRIDE * PANEL);
    turned_values = arena.take<float>(round_up(size, PANEL) * V_STRIDE);
    scores = arena.take<float>(FORWARD_KEYS * PANEL);
    probs = arena.take<float>(FORWARD_KEYS * PANEL);
    positions = arena.take<float>(columns);
    tops = arena.take<float>(columns);    // the reference of each column's exponents
    totals = arena.take<float>(columns);  // sums of probabilities
    sums = arena.take<float>(columns * size);  // [panels][D][PANEL], not yet divided by the totals
    turned = arena.take<float>(PANEL * size);
  }
};

template <class T>
struct Forward {
  Pack pack;
  const T *q, *k, *v;
  int64_t q_stride, kv_stride;
  T* out;
  float* lse;

  void task(const Block& block, int64_t kv_head) const {
    const int64_t size = pack.size, padded = round_up(block.count * pack.group(), PANEL);
    ForwardRoom<T> room = room_in<ForwardRoom<T>>(TASK, pack);
    gather(pack, block, q + kv_head * pack.group() * size, q_stride, padded, room.gathered);
    pack_queries(room.gathered, size, padded, room.queries);
    fill_positions(pack, block, padded, room.positions);
    for (int64_t i = 0; i < padded; i += WIDTH) {
      store(room.tops + i, set(LOWEST));
      store(room.totals + i, zero());
    }
    std::memset(room.sums, 0, static_cast<size_t>(padded * size) * 4);
    const int64_t start = pack.position(block.row, block.begin), last = start + block.count;
    const int64_t panels = ceil_div(block.count * pack.group(), PANEL);
    const T *keys = k + kv_head * size, *values = v + kv_head * size;
    for (int64_t at = larger<int64_t>(0, start - pack.window + 1); at < last; at += FORWARD_KEYS) {
      const int64_t count = smaller(FORWARD_KEYS, last - at);
      gather_keys(pack, block.row, keys, kv_stride, at, at + count, room.keys);
      gather_keys(pack, block.row, values, kv_stride, at, at + count, room.values);
      const Rows key = operand_rows(room.keys, count, size, room.wide_keys);
      const Rows value =
          turned_rows(room.values, count, size, room.panel, room.turned_values, ForwardRoom<T>::V_STRIDE);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const Sight sight = sight_of(pack, block, panel);
        Range range = seen(pack, sight, at, count);
        range.first = range.first / 2 * 2;
        if (range.first < range.last) step(room, sight, panel, key, value, range, at);
      }
    }
    for (int64_t column = 0; column < padded; column += PANEL) finish(room, block, kv_head, column);
  }

  void step(const ForwardRoom<T>& room, const Sight& sight, int64_t panel, const Rows& key, const Rows& value,
            const Range& range, int64_t position) const {
    const int64_t size = pack.size, rows = range.last - range.first;
    const int64_t column = panel * PANEL, units = units_of<T>(size);
    product<PAIRED<T>>(key.from(range.first), rows, room.queries + column * units, units,
                       room.scores, PANEL, false);
    cap_and_hide(pack, sight, room.positions + column, position + range.first, rows, room.scores);
    float* sums = room.sums + column * size;
    raise(room, column, rows, sums);
    exponentials(room, column, rows);
    const Rows values{value.at + range.first / PER<T> * 4, value.stride};
    product<PAIRED<T>>(values, size, room.probs, units_of<T>(rows), sums, PANEL, true);
  }

  // Lifts the columns' references where scores have outgrown them, and scales what was summed.
  void raise(const ForwardRoom<T>& room, int64_t column, int64_t rows, float* sums) const {
    Vector top[2] = {set(LOWEST), set(LOWEST)}, old[2], factor[2];
    for (int64_t row = 0; row < rows; ++row)
      for (int half = 0; half < 2; ++half) top[half] = max(load(room.scores + row * PANEL + half * WIDTH), top[half]);
    for (int half = 0; half < 2; ++half) {
      old[half] = load(room.tops + column + half * WIDTH);
      top[half] = max(mul(top[half], set(exponent_scale(pack))), old[half]);
    }
    if (!(largest(max(sub(top[0], old[0]), sub(top[1], old[1]))) > SLACK)) return;
    for (int half = 0; half < 2; ++half) {
      factor[half] = power_of_two<false>(sub(old[half], top[half]));
      float* total = room.totals + column + half * WIDTH;
      store(total, mul(load(total), factor[half]));
      store(room.tops + column + half * WIDTH, top[half]);
    }
    for (int64_t i = 0; i < pack.size * PANEL; i += PANEL) {
      store(sums + i, mul(load(sums + i), factor[0]));
      store(sums + i + WIDTH, mul(load(sums + i + WIDTH), factor[1]));
    }
  }

  void exponentials(const ForwardRoom<T>& room, int64_t column, int64_t rows) const {
    const Vector scale = set(exponent_scale(pack));
    for (int64_t half = 0; half < PANEL; half += WIDTH) {
      const Vector top = sub(zero(), load(room.tops + column + half));
      Vector even_total = load(room.totals + column + half), odd_total = zero();
      const float* scores = room.scores + half;
      int64_t row = 0;
      for (; row + 2 <= rows; row += 2) {
        const Vector even = power_of_two<PAIRED<T>>(fma(load(scores + row * PANEL), scale, top));
        const Vector odd = power_of_two<PAIRED<T>>(fma(load(scores + (row + 1) * PANEL), scale, top));
        even_total = add(even_total, even);
        odd_total = add(odd_total, odd);
        put_rows<PAIRED<T>>(room.probs + half, row, even, odd);
      }
      if (row < rows) {
        const Vector even = power_of_two<PAIRED<T>>(fma(load(scores + row * PANEL), scale, top));
        even_total = add(even_total, even);
        put_rows<PAIRED<T>>(room.probs + half, row, even, zero());
      }
      store(room.totals + column + half, add(even_total, odd_total));
    }
  }

  void finish(const ForwardRoom<T>& room, const Block& block, int64_t kv_head, int64_t column) const {
    const int64_t size = pack.size, group = pack.group();
    const int64_t columns = smaller<int64_t>(PANEL, block.count * group - column);
    turn_panel(room.sums + column * size, size, columns, room.turned, size);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t token = block.begin + (column + i) / group, head = kv_head * group + (column + i) % group;
      const float total = room.totals[column + i];
      const Vector factor = set(1.0f / total);
      T* to = out + (token * pack.heads + head) * size;
      for (int64_t d = 0; d < size; d += WIDTH) store(to + d, mul(load(room.turned + i * size + d), factor));
      lse[token * pack.heads + head] = (room.tops[column + i] + log2f(total)) * LN2;
    }
  }

  void run() const {
    const int64_t most = block_tokens(pack, FORWARD_COLUMNS), count = cut(pack, most, nullptr);
    Block* blocks = scratch<Block>(TABLES, count);
    cut(pack, most, blocks);
    // One head after another, whose keys then stay in the cache. Late blocks have the most keys: they go
    // first, so that no thread is left with one at the end.
    parallel_tasks(pack.threads, count * pack.kv_heads,
                   [&](int64_t number) { task(blocks[count - 1 - number % count], number / count); });
  }
};

// --- backward -------------------------------------------------------------------------------------

// A task owns a chunk of keys and adds up the gradients of its keys and values over all blocks of
// queries that see it. A block's query gradient gets a part from each chunk; chunks add theirs in
// their order, which tasks keep by waiting for their turn. Every sum thus has one order, whatever the
// number of threads. Nobody waits for a task that has not begun: tasks begin in order.
constexpr int64_t BACKWARD_COLUMNS = 128, CHUNK = 252;

template <class T>
struct BackwardRoom {
  static constexpr int64_t K_STRIDE = (CHUNK / PER<T> + 15) / 16 * 16;
  T *gathered_q, *gathered_grad, *keys, *values;
  float *q_columns, *grad_columns, *q_rows, *grad_rows;
  float *wide_keys, *wide_values, *panel, *turned_keys;
  float *scores, *inner, *positions;
  Operand<T>*probs, *grad_scores;
  float *grad_panels, *sum_k, *sum_v;
  int64_t *first_strip, *last_strip;
  int64_t width;  // columns of the matrices of probabilities

  BackwardRoom(Arena& arena, const Pack& pack) {
    const int64_t size = pack.size, padded_size = round_up(size, PANEL);
    const bool widened = sizeof(Operand<T>) != sizeof(T);
    width = round_up(block_tokens(pack, BACKWARD_COLUMNS) * pack.group(), PANEL);
    gathered_q = arena.take<T>(width * size);
    gathered_grad = arena.take<T>(width * size);
    keys = arena.take<T>(CHUNK * size);
    values = arena.take<T>(CHUNK * size);
    q_columns = arena.take<float>(width * units_of<T>(size));
    grad_columns = arena.take<float>(width * units_of<T>(size));
    q_rows = arena.take<float>(units_of<T>(width) * padded_size);
    grad_rows = arena.take<float>(units_of<T>(width) * padded_size);
    wide_keys = arena.take<float>(widened ? CHUNK * size : 0);
    wide_values = arena.take<float>(widened ? CHUNK * size : 0);
    panel = arena.take<float>(K_STRIDE * PANEL);
    turned_keys = arena.take<float>(padded_size * K_STRIDE);
    scores = arena.take<float>(MOST_ROWS * PANEL);
    inner = arena.take<float>(MOST_ROWS * PANEL);
    positions = arena.take<float>(width);
    probs = arena.take<Operand<T>>(CHUNK * width);
    grad_scores = arena.take<Operand<T>>(CHUNK * width);
    grad_panels = arena.take<float>(CHUNK / PER<T> * width);
    sum_k = arena.take<float>(CHUNK * padded_size);
    sum_v = arena.take<float>(CHUNK * padded_size);
    first_strip = arena.take<int64_t>(width / PANEL);
    last_strip = arena.take<int64_t>(width / PANEL);
  }
};

// What the tasks share.
struct BackwardTables {
  Block *blocks, *chunks;
  float *lse, *delta;  // [K][columns]: the exponent of two that divides, and sum(dO * O)
  float* sums;         // [K][columns / PANEL][D][PANEL]: the queries' gradients, turned
  int* turns;          // [blocks][K]: how many chunks have added theirs
  int64_t columns;

  BackwardTables(Arena& arena, const Pack& pack, int64_t block_count, int64_t chunk_count, int64_t all_columns)
      : columns(all_columns) {
    blocks = arena.take<Block>(block_count);
    chunks = arena.take<Block>(chunk_count);
    lse = arena.take<float>(columns * pack.kv_heads);
    delta = arena.take<float>(columns * pack.kv_heads);
    sums = arena.take<float>(columns * pack.kv_heads * pack.size);
    turns = arena.take<int>(block_count * pack.kv_heads);
  }
};

// Everything about one block against one chunk of `count` keys from `position` on.
struct Meeting {
  const Block& block;
  int64_t kv_head, position, count, strip;  // keys of a strip
  const float *lse, *delta;
  float* sums;
  bool onto;
};

template <class T>
struct Backward {
  using E = Operand<T>;
  Pack pack;
  const T *grad, *q, *k, *v, *out;
  const float* lse;
  T *grad_q, *grad_k, *grad_v;
  int64_t q_stride, kv_stride, grad_stride;

  // The columns' constants of one block.
  void prepare(const BackwardTables& tables, const Block& block, int64_t kv_head) const {
    const int64_t size = pack.size, group = pack.group(), padded = round_up(block.count * group, PANEL);
    float* exponent = tables.lse + kv_head * tables.columns + block.before;
    float* delta = tables.delta + kv_head * tables.columns + block.before;
    for (int64_t column = 0; column < padded; ++column) {
      exponent[column] = __builtin_inff();  // no probability in the padding
      delta[column] = 0.0f;
      if (column >= block.count * group) continue;
      const int64_t row = (block.begin + column / group) * pack.heads + kv_head * group + column % group;
      Vector dot = zero();
      for (int64_t d = 0; d < size; d += WIDTH) dot = fma(load(grad + row * size + d), load(out + row * size + d), dot);
      exponent[column] = lse[row] * LOG2E;
      delta[column] = sum(dot);
    }
  }

  // How many chunks before this one add to a block's query gradient.
  int64_t turn_of(const Block& chunk, const Block& block) const {
    const int64_t first = larger<int64_t>(0, pack.position(block.row, block.begin) - pack.window + 1);
    const int64_t number = chunk_of(chunk.row, chunk.begin - pack.begin(chunk.row));
    if (chunk.row < 0) return number - chunk_of(-1, first);
    const int64_t shared = first < pack.prefix ? chunks_of(-1) - chunk_of(-1, first) : 0;
    return shared + number - chunk_of(chunk.row, larger<int64_t>(0, first - pack.prefix));
  }
  int64_t chunks_of(int64_t row) const { return ceil_div(pack.end(row) - pack.begin(row), CHUNK); }
  // As `cut` cuts: the part whose first token is the last not after this one.
  int64_t chunk_of(int64_t row, int64_t token) const {
    const int64_t length = pack.end(row) - pack.begin(row), parts = chunks_of(row);
    int64_t part = token * parts / length;
    while (part + 1 < parts && length * (part + 1) / parts <= token) ++part;
    return part;
  }

  void task(const BackwardTables& tables, int64_t block_count, const Block& chunk, int64_t kv_head) const {
    const int64_t size = pack.size, padded_size = round_up(size, PANEL);
    BackwardRoom<T> room = room_in<BackwardRoom<T>>(TASK, pack);
    const int64_t position = pack.position(chunk.row, chunk.begin), last = position + chunk.count;
    gather_keys(pack, chunk.row, k + kv_head * size, kv_stride, position, last, room.keys);
    gather_keys(pack, chunk.row, v + kv_head * size, kv_stride, position, last, room.values);
    const Rows keys = operand_rows(room.keys, chunk.count, size, room.wide_keys);
    const Rows values = operand_rows(room.values, chunk.count, size, room.wide_values);
    const Rows turned =
        turned_rows(room.keys, chunk.count, size, room.panel, room.turned_keys, BackwardRoom<T>::K_STRIDE);
    std::memset(room.sum_k, 0, static_cast<size_t>(chunk.count * padded_size) * 4);
    std::memset(room.sum_v, 0, static_cast<size_t>(chunk.count * padded_size) * 4);
    // Strips of equal, even length.
    const int64_t strip = round_up(ceil_div(chunk.count, ceil_div(chunk.count, MOST_ROWS)), 2);
    for (int64_t number = chunk.before; number < block_count; ++number) {
      const Block& block = tables.blocks[number];
      if (chunk.row >= 0 && block.row != chunk.row) break;
      const int64_t start = pack.position(block.row, block.begin);
      const Range range = seen(pack, Sight{start, start + block.count - 1}, position, chunk.count);
      if (range.first == range.last) continue;
      const int64_t at = kv_head * tables.columns + block.before;
      const int64_t turn = turn_of(chunk, block);
      const Meeting meeting{block, kv_head, position, chunk.count, strip, tables.lse + at, tables.delta + at,
                            tables.sums + at * size, turn > 0};
      load_queries(room, meeting);
      probabilities(room, meeting, keys, values);
      int* done = tables.turns + number * pack.kv_heads + kv_head;
      while (__atomic_load_n(done, __ATOMIC_ACQUIRE) != turn) sched_yield();
      add_to_queries(room, meeting, turned);
      __atomic_store_n(done, static_cast<int>(turn) + 1, __ATOMIC_RELEASE);
      add_to_keys(room, meeting, room.probs, room.grad_rows, room.sum_v);
      add_to_keys(room, meeting, room.grad_scores, room.q_rows, room.sum_k);
    }
    const Vector scale = set(pack.scale);
    for (int64_t row = 0; row < chunk.count; ++row) {
      const int64_t to = (chunk.begin + row) * grad_stride + kv_head * size, from = row * padded_size;
      for (int64_t d = 0; d < size; d += WIDTH) {
        store(grad_k + to + d, mul(load(room.sum_k + from + d), scale));
        store(grad_v + to + d, load(room.sum_v + from + d));
      }
    }
  }

  // The block's queries and output gradients as panels, for sums over features and over columns.
  void load_queries(const BackwardRoom<T>& room, const Meeting& at) const {
    const int64_t size = pack.size, each = pack.group() * size, padded = round_up(at.block.count * pack.group(), PANEL);
    gather(pack, at.block, q + at.kv_head * each, q_stride, padded, room.gathered_q);
    gather(pack, at.block, grad + at.kv_head * each, pack.heads * size, padded, room.gathered_grad);
    pack_queries(room.gathered_q, size, padded, room.q_columns);
    pack_queries(room.gathered_grad, size, padded, room.grad_columns);
    for (int64_t d = 0; d < size; d += PANEL) {
      const int64_t columns = smaller<int64_t>(PANEL, size - d), to = d * units_of<T>(room.width);
      pack_rows(room.gathered_q + d, size, padded, columns, room.q_rows + to);
      pack_rows(room.gathered_grad + d, size, padded, columns, room.grad_rows + to);
    }
    fill_positions(pack, at.block, padded, room.positions);
  }

  void probabilities(const BackwardRoom<T>& room, const Meeting& at, const Rows& keys, const Rows& values) const {
    const int64_t panels = ceil_div(at.block.count * pack.group(), PANEL), units = units_of<T>(pack.size);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Sight sight = sight_of(pack, at.block, panel);
      const Range range = seen(pack, sight, at.position, at.count);
      room.first_strip[panel] = range.first / at.strip;
      room.last_strip[panel] = ceil_div(range.last, at.strip);
      for (int64_t number = room.first_strip[panel]; number < room.last_strip[panel]; ++number) {
        const int64_t key = number * at.strip, rows = smaller(at.strip, at.count - key), column = panel * PANEL;
        product<PAIRED<T>>(keys.from(key), rows, room.q_columns + column * units, units,
                           room.scores, PANEL, false);
        product<PAIRED<T>>(values.from(key), rows, room.grad_columns + column * units, units, room.inner, PANEL, false);
        cap_and_hide(pack, sight, room.positions + column, at.position + key, rows, room.scores);
        if (pack.cap > 0) strip_of<true>(room, at, key, rows, column);
        else strip_of<false>(room, at, key, rows, column);
      }
    }
  }

  // Probabilities and the scores' gradients of one strip of keys and one panel.
  template <bool CAPPED>
  void strip_of(const BackwardRoom<T>& room, const Meeting& at, int64_t key, int64_t rows, int64_t column) const {
    const Vector scale = set(exponent_scale(pack)), per_cap = set(CAPPED ? 1.0f / pack.cap : 0.0f);
    for (int64_t half = 0; half < PANEL; half += WIDTH) {
      const Vector exponent = sub(zero(), load(at.lse + column + half)), delta = load(at.delta + column + half);
      E* probs = room.probs + key * room.width + column + half;
      E* grads = room.grad_scores + key * room.width + column + half;
      float* panel = room.grad_panels + column * (CHUNK / PER<T>) + half;
      for (int64_t row = 0; row < rows; row += 2) {
        Vector two[2] = {zero(), zero()};
        const int64_t here = smaller<int64_t>(2, rows - row);
        for (int64_t i = 0; i < here; ++i) {
          const Vector score = load(room.scores + (row + i) * PANEL + half);
          const Vector p = power_of_two<PAIRED<T>>(fma(score, scale, exponent));
          two[i] = mul(p, sub(load(room.inner + (row + i) * PANEL + half), delta));
          if (CAPPED) {
            // A hidden score is -infinity; its gradient is 0 whatever its slope.
            const Vector level = mul(max(set(-pack.cap), score), per_cap);
            two[i] = mul(two[i], sub(set(1.0f), mul(level, level)));
          }
          store(probs + (row + i) * room.width, p);
          store(grads + (row + i) * room.width, two[i]);
        }
        put_rows<PAIRED<T>>(panel, key + row, two[0], two[1]);
      }
    }
  }

  // dQ^T += K^T dS^T
  void add_to_queries(const BackwardRoom<T>& room, const Meeting& at, const Rows& turned) const {
    const int64_t size = pack.size, panels = ceil_div(at.block.count * pack.group(), PANEL);
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* sums = at.sums + panel * PANEL * size;
      const int64_t first = room.first_strip[panel] * at.strip, last = room.last_strip[panel] * at.strip;
      const int64_t count = smaller(last, at.count) - first;
      if (count <= 0 && !at.onto) std::memset(sums, 0, static_cast<size_t>(size * PANEL) * 4);
      if (count <= 0) continue;
      const float* grads = room.grad_panels + (panel * (CHUNK / PER<T>) + first / PER<T>)*PANEL;
      product<PAIRED<T>>(Rows{turned.at + first / PER<T> * 4, turned.stride}, size, grads, units_of<T>(count), sums,
                         PANEL, at.onto);
    }
  }

  // sums [keys][D] += turned [keys][columns] times rows [columns][D]
  void add_to_keys(const BackwardRoom<T>& room, const Meeting& at, const E* turned, const float* rows,
                   float* sums) const {
    const int64_t size = pack.size, padded_size = round_up(size, PANEL), width = room.width;
    const int64_t panels = ceil_div(at.block.count * pack.group(), PANEL), strips = ceil_div(at.count, at.strip);
    for (int64_t number = 0; number < strips; ++number) {
      int64_t first = 0, last = panels;
      auto sees = [&](int64_t panel) { return room.first_strip[panel] <= number && number < room.last_strip[panel]; };
      while (first < last && !sees(first)) ++first;
      while (first < last && !sees(last - 1)) --last;
      if (first == last) continue;
      const int64_t key = number * at.strip, count = smaller(at.strip, at.count - key);
      const Rows a{reinterpret_cast<const char*>(turned + key * width + first * PANEL), width * int64_t(sizeof(E))};
      for (int64_t d = 0; d < size; d += PANEL)
        product<PAIRED<T>>(a, count, rows + d * units_of<T>(width) + first * PANEL / PER<T> * PANEL,
                           (last - first) * PANEL / PER<T>, sums + key * padded_size + d, padded_size, true);
    }
  }

  void write_queries(const BackwardTables& tables, const Block& block, int64_t kv_head) const {
    const int64_t size = pack.size, group = pack.group(), columns = block.count * group;
    float* turned = scratch<float>(TASK, PANEL * size);
    const Vector scale = set(pack.scale);
    for (int64_t column = 0; column < columns; column += PANEL) {
      const int64_t here = smaller<int64_t>(PANEL, columns - column);
      turn_panel(tables.sums + (kv_head * tables.columns + block.before + column) * size, size, here, turned, size);
      for (int64_t i = 0; i < here; ++i) {
        const int64_t token = block.begin + (column + i) / group, head = kv_head * group + (column + i) % group;
        T* to = grad_q + token * grad_stride + head * size;
        for (int64_t d = 0; d < size; d += WIDTH) store(to + d, mul(load(turned + i * size + d), scale));
      }
    }
  }

  void run() const {
    const int64_t most = block_tokens(pack, BACKWARD_COLUMNS);
    const int64_t blocks = cut(pack, most, nullptr), chunks = cut(pack, CHUNK, nullptr), heads = pack.kv_heads;
    if (!blocks) return;
    Block* last = scratch<Block>(TASK, blocks);
    cut(pack, most, last);
    const int64_t columns = last[blocks - 1].before + round_up(last[blocks - 1].count * pack.group(), PANEL);
    const BackwardTables tables = room_in<BackwardTables>(SUMS, pack, blocks, chunks, columns);
    cut(pack, most, tables.blocks);
    cut(pack, CHUNK, tables.chunks);
    std::memset(tables.turns, 0, static_cast<size_t>(blocks * heads) * sizeof(int));
    // A chunk's `before` is now the first block of its row.
    for (int64_t chunk = 0, block = 0; chunk < chunks; ++chunk) {
      while (tables.blocks[block].row != tables.chunks[chunk].row) ++block;
      tables.chunks[chunk].before = block;
    }
    parallel_tasks(pack.threads, blocks * heads, [&](int64_t task_number) {
      prepare(tables, tables.blocks[task_number / heads], task_number % heads);
    });
    parallel_tasks(pack.threads, chunks * heads, [&](int64_t task_number) {
      task(tables, blocks, tables.chunks[task_number / heads], task_number % heads);
    });
    parallel_tasks(pack.threads, blocks * heads, [&](int64_t task_number) {
      write_queries(tables, tables.blocks[task_number / heads], task_number % heads);
    });
  }
};

// --- one new token against a cache ----------------------------------------------------------------

constexpr int64_t DECODE_KEYS = 512;  // of a task

template <class T>
struct DecodeRoom {
  float *wide_queries, *panel, *scores;
  Operand<T>* probs;

  DecodeRoom(Arena& arena, const Pack& pack) {
    wide_queries = arena.take<float>(pack.group() * pack.size);
    panel = arena.take<float>(larger(pack.size, DECODE_KEYS) * PANEL);
    scores = arena.take<float>(pack.group() * DECODE_KEYS);
    probs = arena.take<Operand<T>>(pack.group() * DECODE_KEYS);
  }
};

template <class T>
struct Decode {
  Pack pack;
  const T *q, *keys, *values;
  T* out;
  const int64_t* lengths;
  int64_t batch, capacity;
  // Of each part of the keys: sums [D], padded to whole panels, then the largest exponent and the total.
  float* parts;

  int64_t padded_size() const { return round_up(pack.size, PANEL); }
  int64_t part_stride() const { return padded_size() + WIDTH; }
  int64_t splits() const { return ceil_div(capacity, DECODE_KEYS); }
  int64_t first_key(int64_t row) const { return larger<int64_t>(0, lengths[row] - pack.window); }
  float* part(int64_t row, int64_t head, int64_t split) const {
    return parts + ((row * pack.heads + head) * splits() + split) * part_stride();
  }

  void task(int64_t row, int64_t kv_head, int64_t split) const {
    const int64_t size = pack.size, group = pack.group();
    const int64_t begin = larger(first_key(row), split * DECODE_KEYS);
    const int64_t count = smaller(lengths[row], (split + 1) * DECODE_KEYS) - begin;
    if (count <= 0) return;
    DecodeRoom<T> room = room_in<DecodeRoom<T>>(TASK, pack);
    const int64_t at = ((row * pack.kv_heads + kv_head) * capacity + begin) * size;
    const Rows queries = operand_rows(q + (row * pack.heads + kv_head * group) * size, group, size, room.wide_queries);
    const int64_t padded = round_up(count, PANEL);
    for (int64_t key = 0; key < count; key += PANEL) {
      pack_columns(keys + at + key * size, size, size, smaller<int64_t>(PANEL, count - key), room.panel);
      product<PAIRED<T>>(queries, group, room.panel, units_of<T>(size), room.scores + key, DECODE_KEYS, false);
    }
    for (int64_t head = 0; head < group; ++head) {
      float* own = part(row, kv_head * group + head, split);
      softmax(room.scores + head * DECODE_KEYS, room.probs + head * DECODE_KEYS, count, padded, own + padded_size());
    }
    const Rows probs{reinterpret_cast<const char*>(room.probs), DECODE_KEYS * int64_t(sizeof(Operand<T>))};
    for (int64_t d = 0; d < size; d += PANEL) {
      pack_rows(values + at + d, size, count, smaller<int64_t>(PANEL, size - d), room.panel);
      product<PAIRED<T>>(probs, group, room.panel, units_of<T>(count), part(row, kv_head * group, split) + d,
                         splits() * part_stride(), false);
    }
  }

  // state: the largest exponent, then the sum of the powers.
  void softmax(float* scores, Operand<T>* probs, int64_t count, int64_t padded, float* state) const {
    for (int64_t i = count; i < padded; ++i) scores[i] = -__builtin_inff();
    const Vector scale = set(exponent_scale(pack));
    Vector top = set(LOWEST), total = zero();
    for (int64_t i = 0; i < padded; i += WIDTH) {
      if (pack.cap > 0) {
        const Vector raw = load(scores + i), capped = mul(set(pack.cap), tanh(mul(raw, set(pack.scale / pack.cap))));
        store_upto(scores + i, capped, larger<int64_t>(0, count - i));
      }
      top = max(load(scores + i), top);
    }
    state[0] = largest(top) * exponent_scale(pack);
    const Vector reference = set(-state[0]);
    for (int64_t i = 0; i < padded; i += WIDTH) {
      const Vector p = power_of_two<PAIRED<T>>(fma(load(scores + i), scale, reference));
      total = add(total, p);
      store(probs + i, p);
    }
    state[1] = sum(total);
  }

  // Puts the parts of one head together.
  void merge(int64_t row, int64_t head) const {
    const int64_t first = first_key(row) / DECODE_KEYS, last = ceil_div(lengths[row], DECODE_KEYS);
    const int64_t width = padded_size();
    float top = LOWEST, total = 0.0f;
    for (int64_t split = first; split < last; ++split) top = larger(top, part(row, head, split)[width]);
    for (int64_t split = first; split < last; ++split) {
      float* own = part(row, head, split);
      own[width] = exp2f(own[width] - top);
      total += own[width] * own[width + 1];
    }
    T* to = out + (row * pack.heads + head) * pack.size;
    for (int64_t d = 0; d < pack.size; d += WIDTH) {
      Vector value = zero();
      for (int64_t split = first; split < last; ++split) {
        const float* own = part(row, head, split);
        value = fma(set(own[width]), load(own + d), value);
      }
      store(to + d, mul(value, set(1.0f / total)));
    }
  }

  void run() {
    parts = scratch<float>(SUMS, batch * pack.heads * splits() * part_stride());
    const int64_t heads = pack.kv_heads;
    parallel_tasks(pack.threads, splits() * batch * heads, [&](int64_t task_number) {
      task(task_number / heads % batch, task_number % heads, task_number / heads / batch);
    });
    for (int64_t row = 0; row < batch; ++row)
      for (int64_t head = 0; head < pack.heads; ++head) merge(row, head);
  }
};

inline Pack pack_of(const int64_t* offsets, int64_t rows, int64_t prefix, int64_t heads, int64_t kv_heads, int64_t size,
                    float scale, int64_t window, float cap, int threads) {
  return Pack{offsets, rows, prefix, heads, kv_heads, size, window < 0 ? ALL : window, scale, cap, threads};
}

template <class T>
void forward(const Pack& pack, const void* q, const void* k, const void* v, void* out, float* lse, int64_t q_stride,
             int64_t kv_stride) {
  Forward<T>{pack,     static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
             q_stride, kv_stride,                static_cast<T*>(out),     lse}
      .run();
}

template <class T>
void backward(const Pack& pack, const void* grad, const void* q, const void* k, const void* v, const void* out,
              const float* lse, void* grad_q, void* grad_k, void* grad_v, int64_t q_stride, int64_t kv_stride,
              int64_t grad_stride) {
  Backward<T>{pack,
              static_cast<const T*>(grad),
              static_cast<const T*>(q),
              static_cast<const T*>(k),
              static_cast<const T*>(v),
              static_cast<const T*>(out),
              lse,
              static_cast<T*>(grad_q),
              static_cast<T*>(grad_k),
              static_cast<T*>(grad_v),
              q_stride,
              kv_stride,
              grad_stride}
      .run();
}

template <class T>
void decode(const Pack& pack, const void* q, const void* keys, const void* values, void* out, const int64_t* lengths,
            int64_t batch, int64_t capacity) {
  Decode<T>{pack,    static_cast<const T*>(q), static_cast<const T*>(keys), static_cast<const T*>(values),
            static_cast<T*>(out), lengths, batch, capacity, nullptr}
      .run();
}

}  // namespace

// q, k and v are [T, heads, D] with a token's stride in elements; out is [T, N, D], lse [T, N] natural
// logarithms. Row r owns tokens offsets[r] to offsets[r + 1]; offsets[0] is the prefix's length. dtype 0
// is fp32, 1 bf16. No window: -1; no cap: 0.
LORIMER_EXPORT(attention_forward)
(const void* q, const void* k, const void* v, void* out, float* lse, const int64_t* offsets, int64_t rows,
 int64_t prefix, int64_t heads, int64_t kv_heads, int64_t size, int64_t q_stride, int64_t kv_stride, float scale,
 int64_t window, float cap, int dtype, int threads) {
  const Pack pack = pack_of(offsets, rows, prefix, heads, kv_heads, size, scale, window, cap, threads);
  if (dtype) forward<bf16>(pack, q, k, v, out, lse, q_stride, kv_stride);
  else forward<float>(pack, q, k, v, out, lse, q_stride, kv_stride);
}

// grad and out are [T, N, D]; the gradients are laid out as q, k and v, with a stride of their own.
LORIMER_EXPORT(attention_backward)
(const void* grad, const void* q, const void* k, const void* v, const void* out, const float* lse, void* grad_q,
 void* grad_k, void* grad_v, const int64_t* offsets, int64_t rows, int64_t prefix, int64_t heads, int64_t kv_heads,
 int64_t size, int64_t q_stride, int64_t kv_stride, int64_t grad_stride, float scale, int64_t window, float cap,
 int dtype, int threads) {
  const Pack pack = pack_of(offsets, rows, prefix, heads, kv_heads, size, scale, window, cap, threads);
  if (dtype) backward<bf16>(pack, grad, q, k, v, out, lse, grad_q, grad_k, grad_v, q_stride, kv_stride, grad_stride);
  else backward<float>(pack, grad, q, k, v, out, lse, grad_q, grad_k, grad_v, q_stride, kv_stride, grad_stride);
}

// q and out are [B, N, D], keys and values [B, K, capacity, D]; row b sees its first lengths[b] keys.
LORIMER_EXPORT(attention_decode)
(const void* q, const void* keys, const void* values, void* out, const int64_t* lengths, int64_t batch,
 int64_t capacity, int64_t heads, int64_t kv_heads, int64_t size, float scale, int64_t window, float cap, int dtype,
 int threads) {
  const Pack pack = pack_of(nullptr, 0, 0, heads, kv_heads, size, scale, window, cap, threads);
  if (dtype) decode<bf16>(pack, q, keys, values, out, lengths, batch, capacity);
  else decode<float>(pack, q, keys, values, out, lengths, batch, capacity);
}
