// Rows of a quantised weight as numbers: all of a stretch, or those that are asked for.
#include "parallel.hpp"
#include "quantised.hpp"

// out [count, columns], fp32 or bf16: the rows at `ids`, or if that is null from row `first` on.
LORIMER_EXPORT(quantised_rows)
(const Part* parts, int64_t part_count, const int64_t* ids, int64_t first, int64_t count, int64_t columns, void* out,
 int dtype, int threads) {
  const Parts weight = {parts, part_count};
  if (count * columns < 100000) threads = 1;
  parallel_range(threads, count, 4, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t row = ids ? ids[i] : first + i;
      if (dtype == 0) read_row(weight, row, 0, columns, static_cast<float*>(out) + i * columns);
      else read_row(weight, row, 0, columns, static_cast<bf16*>(out) + i * columns);
    }
  });
}
LORIMER_ON_TAPE(quantised_rows)
