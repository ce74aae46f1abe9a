#include <numeric>
#include <optional>

#include "norm_parts.h"

namespace fastopt {
namespace {

constexpr index_t few_long_rows = 64, long_row = 8192;  // so few need no sums in double
constexpr index_t long_row_piece = 1 << 15, long_row_slice = 1 << 11;  // of which threads take some

// Rows that stay in the second cache; at most 64, of which it is a divisor.
index_t hot_rows(index_t row_bytes) {
  index_t rows = 64;
  while (rows > 1 && rows * row_bytes > hot_bytes) rows /= 2;
  return rows;
}

// The same of few long rows, whose elements the threads share: the sums of all rows, then dx, and
// dgamma and dbeta of the columns that a thread has.
void long_row_gradients(const Settings& settings, const LayerNorm& n, const void* dy, void* dx,
                        void* dgamma, void* dbeta) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = item_size(n.dtype), bytes = n.rows * n.columns * item;
  const Chunks pieces(n.columns, long_row_piece, 64);
  const Chunks slices(n.columns, long_row_slice, 64, n.columns);
  const Scratch coefficients(6, n.rows);
  const Scratch sums(pieces.count, n.rows), products(pieces.count, n.rows);
  const auto from = [&](index_t element) {
    return backward_of(at(dy, element, item), at(n.x, element, item), at(dx, element, item),
                       coefficients, streams(bytes));
  };
  // For its floating-point environment.
  parallel_for(settings, 0, [&](int, int) {
    kernels.forward_coefficients(n.rows, n.statistics, nullptr, nullptr, coefficients[0],
                                 coefficients[1], coefficients[2]);
  });
  parallel_for(settings, 2 * bytes, [&](int part, int parts) {
    const Range mine = share(n.rows * pieces.count, part, parts);
    for (index_t i = mine.begin; i < mine.end; ++i) {
      const index_t row = i / pieces.count, k = i % pieces.count;
      const Range piece = pieces(k, n.columns);
      Backward b = from(row * n.columns + piece.begin);
      b.center = at(b.center, row, item);
      kernels.row_gradient_sums(b, at(n.gamma, piece.begin, item), 0, 1, piece.end - piece.begin,
                                sums[k] + row, products[k] + row);
    }
  });
  parallel_for(settings, 0, [&](int, int) {
    for (index_t k = 1; k < pieces.count; ++k) {
      kernels.add_sums(n.rows, sums[k], sums[0]);
      kernels.add_sums(n.rows, products[k], products[0]);
    }
    if (!n.centered) std::fill_n(sums[0], n.rows, 0.0);
    kernels.backward_coefficients(n.rows, n.statistics, double(n.columns), nullptr, sums[0],
                                  products[0], coefficients[0], coefficients[3], coefficients[4],
                                  coefficients[5]);
  });
  parallel_for(settings, 3 * bytes, [&](int part, int parts) {
    const Range mine = share(slices.count, part, parts);
    for (index_t i = mine.begin; i < mine.end; ++i) {
      const Range slice = slices(i, n.columns);
      const index_t c = slice.begin, width = slice.end - c;
      for (void* gradient : {dgamma, dbeta}) {
        std::fill_n(static_cast<char*>(at(gradient, c, item)), width * item, char(0));
      }
      kernels.row_gradient_apply(from(c), at(n.gamma, c, item), 0, n.rows, n.columns, width,
                                 at(dgamma, c, item), at(dbeta, c, item));
    }
  });
}

}  // namespace

void row_gradients(const Settings& settings, const LayerNorm& n, index_t run, const void* dy,
                   void* dx, void* dgamma, void* dbeta) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = item_size(n.dtype), columns = n.columns, parameters = n.groups * columns;
  const index_t samples = n.rows / n.groups, bytes = n.rows * columns * item;
  // Rows at a time: samples, where they are one row, else of a sample.
  const index_t most = hot_rows(2 * columns * item), apart = n.groups > 1 ? columns : 0;
  const index_t most_samples = n.groups > 1 ? 1 : most;
  // The groups whose sums in T stay in the cache while the samples pass by.
  const index_t most_groups = std::max<index_t>(1, slice_bytes / (3 * columns * item));
  // Chunks of few samples have more sums than are worth their memory.
  const Chunks chunks(samples, std::clamp<index_t>(samples / 8, 16, 64), 16,
                      std::max<index_t>(1, most_chunks / n.groups));
  const Scratch gammas(chunks.count, parameters), betas(chunks.count, parameters);
  parallel_for(settings, 3 * bytes, [&](int part, int parts) {
    const Range mine = share(chunks.count * n.groups, part, parts);
    const index_t widest = std::min(most_groups, n.groups) * columns;
    const Scratch floats(2, widest), coefficients(6, most), totals(2, most);
    std::fill_n(floats[0], 2 * widest, 0.0);
    for (index_t i = mine.begin, next; i < mine.end; i = next) {
      const index_t k = i / n.groups, group = i % n.groups;
      const index_t last = std::min({group + most_groups, n.groups, group + mine.end - i});
      next = i + last - group;
      const index_t width = (last - group) * columns, offset = group * columns;
      std::fill_n(gammas[k] + offset, width, 0.0);
      std::fill_n(betas[k] + offset, width, 0.0);
      const Range chunk = chunks(k, samples);
      for (index_t s = chunk.begin, end; s < chunk.end; s = end) {
        end = std::min(s + most_samples, chunk.end);
        for (index_t g = group, g_end; g < last; g = g_end) {
          g_end = std::min(g + (n.groups > 1 ? most : 1), last);
          const index_t r = s * n.groups + g, rows = (end - s) * (g_end - g), first = r * columns;
          const void* const gamma = at(n.gamma, g * columns, item);
          kernels.forward_coefficients(rows, from(n.statistics, r), nullptr, nullptr,
                                       coefficients[0], coefficients[1], coefficients[2]);
          const Backward b = backward_of(at(dy, first, item), at(n.x, first, item),
                                         at(dx, first, item), coefficients, streams(bytes));
          kernels.row_gradient_sums(b, gamma, apart, rows, columns, totals[0], totals[1]);
          if (!n.centered) std::fill_n(totals[0], rows, 0.0);
          kernels.backward_coefficients(rows, from(n.statistics, r), double(columns), nullptr,
                                        totals[0], totals[1], coefficients[0], coefficients[3],
                                        coefficients[4], coefficients[5]);
          const index_t in_sums = (g - group) * columns;
          kernels.row_gradient_apply(b, gamma, apart, rows, columns, columns,
                                     at(floats[0], in_sums, item), at(floats[1], in_sums, item));
        }
        if ((end - chunk.begin) % 64 == 0 || end == chunk.end) {
          kernels.flush_sums(floats[0], width, gammas[k] + offset);
          kernels.flush_sums(floats[1], width, betas[k] + offset);
        }
      }
    }
  });
  parallel_for(settings, 16 * chunks.count * parameters, [&](int part, int parts) {
    const Range mine = share(parameters / run, part, parts);
    const index_t count = mine.end - mine.begin, first = mine.begin * run;
    const Scratch joined(1, count);
    const auto finish = [&](const Scratch& sums, void* gradient) {
      for (index_t k = 1; k < chunks.count; ++k) {
        kernels.add_sums(count * run, sums[k] + first, sums[0] + first);
      }
      for (index_t i = 0; i < count; ++i) {
        const double* const from = sums[0] + first + i * run;
        joined[0][i] = std::accumulate(from, from + run, 0.0);
      }
      kernels.round_sums(count, joined[0], at(gradient, mine.begin, item));
    };
    finish(gammas, dgamma);
    finish(betas, dbeta);
  });
}

void layer_norm(const Settings& settings, const LayerNorm& n, void* y) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = item_size(n.dtype), bytes = n.rows * n.columns * item;
  const index_t columns = n.columns, most = hot_rows(columns * item);
  const index_t apart = n.groups > 1 ? columns : 0;
  parallel_for(settings, 2 * bytes, [&](int part, int parts) {
    const Range mine = share(n.rows, part, parts);
    double center[64], scale[64], shift[64];
    for (index_t r = mine.begin, end; r < mine.end; r = end) {
      const index_t group = r % n.groups, offset = group * columns;
      end = std::min(r + most, mine.end);
      if (n.groups > 1) end = std::min(end, r - group + n.groups);
      const index_t rows = end - r;
      const Statistics statistics = from(n.statistics, r);
      const Runs runs{1, columns, columns};
      const void* x = at(n.x, r * columns, item);
      kernels.moments(x, runs, rows, columns, n.centered, statistics.mean, statistics.variance);
      for (index_t i = 0; i < rows; ++i) statistics.variance[i] /= double(columns);
      kernels.choose_units(x, runs, rows, columns, n.centered, statistics);
      std::optional<Scratch> copy;
      if (has_units(statistics, rows)) {
        copy.emplace(rows, columns);
        multiply_by_units(kernels, statistics.unit, x, rows, columns, (*copy)[0]);
        x = (*copy)[0];
      }
      kernels.forward_coefficients(rows, statistics, nullptr, nullptr, center, scale, shift);
      kernels.row_apply(
          {x, nullptr, at(y, r * columns, item), center, scale, shift, false, streams(bytes)},
          at(n.gamma, offset, item), at(n.beta, offset, item), apart, rows, columns);
    }
  });
}

void layer_norm_backward(const Settings& settings, const LayerNorm& norm, const void* dy, void* dx,
                         void* dgamma, void* dbeta) {
  in_units(settings, norm, norm.rows, norm.rows, norm.columns, dx, [&](const LayerNorm& n) {
    if (n.rows < few_long_rows && n.columns >= long_row) {
      long_row_gradients(settings, n, dy, dx, dgamma, dbeta);
    } else {
      row_gradients(settings, n, 1, dy, dx, dgamma, dbeta);
    }
  });
}

}  // namespace fastopt
