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

// The backward pass over a few neighbouring rows, whose dgamma and dbeta are added to sums in x's
// dtype. Each thread has one.
class RowsBackward {
 public:
  RowsBackward(const Norm& kernels, const LayerNorm& n, const void* dy, void* dx, index_t most_rows)
      : kernels_(kernels),
        n_(n),
        dy_(dy),
        dx_(dx),
        coefficients_(6, most_rows),
        totals_(2, most_rows) {}

  void operator()(index_t row, index_t rows, RowGradients sums) const {
    const index_t item = item_size(n_.dtype), columns = n_.columns, first = row * columns;
    const index_t offset = row % n_.groups * columns;
    const RowParameters parameters{at(n_.gamma, offset, item), at(n_.beta, offset, item),
                                   n_.groups > 1 ? columns : 0};
    const Statistics statistics = from(n_.statistics, row);
    const ForwardCoefficients xhat = forward_in(coefficients_);
    const Backward b{
        at(dy_, first, item), at(n_.x, first, item),      xhat.center,
        at(dx_, first, item), backward_in(coefficients_), streams(n_.rows * columns * item)};
    kernels_.forward_coefficients(rows, statistics, nullptr, nullptr, xhat);
    kernels_.row_gradient_sums(b, parameters, rows, columns, {totals_[0], totals_[1]});
    if (!n_.centered) std::fill_n(totals_[0], rows, 0.0);
    kernels_.backward_coefficients(rows, statistics, double(columns), nullptr,
                                   {totals_[0], totals_[1]}, xhat.center, b.by);
    kernels_.row_gradient_apply(b, xhat, parameters, {rows, columns, columns}, sums);
  }

 private:
  const Norm& kernels_;
  const LayerNorm& n_;
  const void* const dy_;
  void* const dx_;
  const Scratch coefficients_, totals_;
};

// The same of few long rows, whose elements the threads share: the sums of all rows, then dx, and
// dgamma and dbeta of the columns that a thread has.
void long_row_gradients(const Settings& settings, const LayerNorm& n, const void* dy,
                        const Gradients& gradients) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = item_size(n.dtype), bytes = n.rows * n.columns * item;
  const Chunks pieces(n.columns, long_row_piece, 64);
  const Chunks slices(n.columns, long_row_slice, 64, n.columns);
  const Scratch coefficients(6, n.rows);
  const Scratch sums(pieces.count, n.rows), products(pieces.count, n.rows);
  const ForwardCoefficients xhat = forward_in(coefficients);
  const auto backward_from = [&](index_t element, index_t row) {
    return Backward{at(dy, element, item),      at(n.x, element, item),
                    at(xhat.center, row, item), at(gradients.dx, element, item),
                    backward_in(coefficients),  streams(bytes)};
  };
  const auto parameters_from = [&](index_t column) {
    return RowParameters{at(n.gamma, column, item), at(n.beta, column, item), 0};
  };
  // For its floating-point environment.
  parallel_for(settings, 0, [&](int, int) {
    kernels.forward_coefficients(n.rows, n.statistics, nullptr, nullptr, xhat);
  });
  parallel_for(settings, 2 * bytes, [&](int part, int parts) {
    const Range mine = share(n.rows * pieces.count, part, parts);
    for (index_t i = mine.begin; i < mine.end; ++i) {
      const index_t row = i / pieces.count, k = i % pieces.count;
      const Range piece = pieces(k, n.columns);
      kernels.row_gradient_sums(backward_from(row * n.columns + piece.begin, row),
                                parameters_from(piece.begin), 1, piece.end - piece.begin,
                                {sums[k] + row, products[k] + row});
    }
  });
  parallel_for(settings, 0, [&](int, int) {
    for (index_t k = 1; k < pieces.count; ++k) {
      kernels.add_sums(n.rows, sums[k], sums[0]);
      kernels.add_sums(n.rows, products[k], products[0]);
    }
    if (!n.centered) std::fill_n(sums[0], n.rows, 0.0);
    kernels.backward_coefficients(n.rows, n.statistics, double(n.columns), nullptr,
                                  {sums[0], products[0]}, xhat.center, backward_in(coefficients));
  });
  parallel_for(settings, 3 * bytes, [&](int part, int parts) {
    const Range mine = share(slices.count, part, parts);
    for (index_t i = mine.begin; i < mine.end; ++i) {
      const auto [c, end] = slices(i, n.columns);
      const RowGradients of_slice{at(gradients.dgamma, c, item), at(gradients.dbeta, c, item)};
      for (void* gradient : {of_slice.dgamma, of_slice.dbeta}) {
        std::fill_n(static_cast<char*>(gradient), (end - c) * item, char(0));
      }
      kernels.row_gradient_apply(backward_from(c, 0), xhat, parameters_from(c),
                                 {n.rows, n.columns, end - c}, of_slice);
    }
  });
}

// From the means of some rows, and their sums of squared deviations, to the coefficients of the
// forward pass. Returns these rows of x, or a copy of them in their units.
const void* set_coefficients(const Norm& kernels, const LayerNorm& n, index_t row, index_t rows,
                             const double* m2, std::optional<Scratch>& copy,
                             const ForwardCoefficients& by) {
  const index_t columns = n.columns;
  const Statistics statistics = from(n.statistics, row);
  const void* const x = at(n.x, row * columns, item_size(n.dtype));
  for (index_t i = 0; i < rows; ++i) statistics.variance[i] = m2[i] / double(columns);
  kernels.choose_units(x, {1, columns, columns}, rows, columns, n.centered, statistics);
  if (has_units(statistics, rows)) {
    copy.emplace(rows, columns);
    multiply_by_units(kernels, statistics.unit, x, rows, columns, (*copy)[0]);
  }
  kernels.forward_coefficients(rows, statistics, nullptr, nullptr, by);
  return copy ? (*copy)[0] : x;
}

// The forward pass of few long rows, whose elements the threads share; so many rows at a time.
void long_rows(const Settings& settings, const LayerNorm& n, Range range, index_t most, void* y) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = item_size(n.dtype), columns = n.columns;
  const bool stream = streams(n.rows * columns * item);
  const Chunks pieces(columns, long_row_piece, 64), slices(columns, long_row_slice, 64, columns);
  const Scratch means(pieces.count, most), m2(pieces.count, most), coefficients(3, most);
  const ForwardCoefficients by = forward_in(coefficients);
  for (index_t r = range.begin; r < range.end; r += most) {
    const index_t rows = std::min(most, range.end - r), bytes = rows * columns * item;
    const void* x = at(n.x, r * columns, item);
    parallel_for(settings, bytes, [&](int part, int parts) {
      const Range mine = share(rows * pieces.count, part, parts);
      for (index_t i = mine.begin; i < mine.end; ++i) {
        const index_t row = i / pieces.count, k = i % pieces.count;
        const auto [c, end] = pieces(k, columns);
        kernels.row_moments(at(x, row * columns + c, item), 1, end - c, n.centered,
                            {means[k] + row, m2[k] + row});
      }
    });
    std::optional<Scratch> copy;
    parallel_for(settings, 0, [&](int, int) {
      for (index_t k = 1; k < pieces.count; ++k) {
        const auto [c, end] = pieces(k, columns);
        kernels.merge(double(c), {means[0], m2[0]}, double(end - c), {means[k], m2[k]}, rows);
      }
      std::copy_n(means[0], rows, n.statistics.mean + r);
      x = set_coefficients(kernels, n, r, rows, m2[0], copy, by);
    });
    parallel_for(settings, 2 * bytes, [&](int part, int parts) {
      const Range mine = share(rows * slices.count, part, parts);
      for (index_t i = mine.begin; i < mine.end; ++i) {
        const index_t row = i / slices.count;
        const auto [c, end] = slices(i % slices.count, columns);
        kernels.row_apply(
            {at(x, row * columns + c, item),
             at(y, (r + row) * columns + c, item),
             {at(by.center, row, item), at(by.scale, row, item), at(by.shift, row, item)},
             stream},
            {at(n.gamma, c, item), at(n.beta, c, item), 0}, 1, end - c);
      }
    });
  }
}

// What chunks of rows have summed: of `mine`, each of `run` neighbours, in x's dtype.
void finish_sums(const Norm& kernels, const Scratch& sums, index_t chunks, Range mine, index_t run,
                 void* gradient) {
  const index_t count = mine.end - mine.begin, first = mine.begin * run;
  for (index_t k = 1; k < chunks; ++k) {
    kernels.add_sums(count * run, sums[k] + first, sums[0] + first);
  }
  const Scratch joined(1, count);
  for (index_t i = 0; i < count; ++i) {
    const double* const from = sums[0] + first + i * run;
    joined[0][i] = std::accumulate(from, from + run, 0.0);
  }
  kernels.round_sums(count, joined[0], gradient);
}

}  // namespace

void row_gradients(const Settings& settings, const LayerNorm& n, index_t run, const void* dy,
                   const Gradients& gradients) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = item_size(n.dtype), columns = n.columns, parameters = n.groups * columns;
  const index_t samples = n.rows / n.groups, bytes = n.rows * columns * item;
  // Rows at a time: samples, where they are one row, else of a sample.
  const index_t most = hot_rows(2 * columns * item), most_samples = n.groups > 1 ? 1 : most;
  // The groups whose sums in T stay in the cache while the samples pass by.
  const index_t most_groups = std::max<index_t>(1, slice_bytes / (3 * columns * item));
  // Chunks of few samples have more sums than are worth their memory.
  const Chunks chunks(samples, std::clamp<index_t>(samples / 8, 16, 64), 16,
                      std::max<index_t>(1, most_chunks / n.groups));
  const Scratch gammas(chunks.count, parameters), betas(chunks.count, parameters);
  parallel_for(settings, 3 * bytes, [&](int part, int parts) {
    const Range mine = share(chunks.count * n.groups, part, parts);
    const index_t widest = std::min(most_groups, n.groups) * columns;
    const Scratch floats(2, widest);
    const RowsBackward backward(kernels, n, dy, gradients.dx, most);
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
          const index_t in_sums = (g - group) * columns;
          backward(s * n.groups + g, (end - s) * (g_end - g),
                   {at(floats[0], in_sums, item), at(floats[1], in_sums, item)});
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
    const auto from = [&](void* gradient) { return at(gradient, mine.begin, item); };
    finish_sums(kernels, gammas, chunks.count, mine, run, from(gradients.dgamma));
    finish_sums(kernels, betas, chunks.count, mine, run, from(gradients.dbeta));
  });
}

void layer_norm(const Settings& settings, const LayerNorm& n, void* y) {
  const index_t item = item_size(n.dtype), bytes = n.rows * n.columns * item;
  if (n.rows < few_long_rows && n.columns >= long_row && n.groups == 1) {
    if (n.rows < settings.threads) return long_rows(settings, n, {0, n.rows}, n.rows, y);
    Settings alone = settings;
    alone.threads = 1;
    return parallel_for(settings, 2 * bytes, [&](int part, int parts) {
      long_rows(alone, n, share(n.rows, part, parts), 1, y);
    });
  }
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t columns = n.columns, most = hot_rows(columns * item);
  const index_t apart = n.groups > 1 ? columns : 0;
  parallel_for(settings, 2 * bytes, [&](int part, int parts) {
    const Range mine = share(n.rows, part, parts);
    double m2[64], center[64], scale[64], shift[64];
    for (index_t r = mine.begin, end; r < mine.end; r = end) {
      const index_t group = r % n.groups, offset = group * columns;
      end = std::min(r + most, mine.end);
      if (n.groups > 1) end = std::min(end, r - group + n.groups);
      const index_t rows = end - r;
      std::optional<Scratch> copy;
      kernels.row_moments(at(n.x, r * columns, item), rows, columns, n.centered,
                          {n.statistics.mean + r, m2});
      const ForwardCoefficients by{center, scale, shift};
      const void* const x = set_coefficients(kernels, n, r, rows, m2, copy, by);
      kernels.row_apply({x, at(y, r * columns, item), by, streams(bytes)},
                        {at(n.gamma, offset, item), at(n.beta, offset, item), apart}, rows,
                        columns);
    }
  });
}

void layer_norm_backward(const Settings& settings, const LayerNorm& norm, const void* dy,
                         const Gradients& gradients) {
  in_units(settings, norm, norm.rows, norm.rows, norm.columns, gradients.dx,
           [&](const LayerNorm& n) {
             if (n.rows < few_long_rows && n.columns >= long_row) {
               long_row_gradients(settings, n, dy, gradients);
             } else {
               row_gradients(settings, n, 1, dy, gradients);
             }
           });
}

}  // namespace fastopt
