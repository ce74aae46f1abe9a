// The one translation unit that is compiled once per instruction set, with FASTOPT_ISA as its name.
// No standard header and no external symbol but the table: whatever the linker could merge with
// another object's copy could carry this object's instructions to a processor without them.
#include "table.h"

namespace fastopt::FASTOPT_ISA {
namespace {

#include "simd.h"
#include "tile.h"

struct Names {
  const char* rule;
  const char* state;
  const char* coefficients;
};

template <class... F>
struct List {};

constexpr int count_words(const char* text) {
  int words = 0;
  for (; *text; ++text) words += *text != ' ' && (text[1] == ' ' || text[1] == 0);
  return words;
}

#include "norm.h"
#include "rules.h"

// The only loop over the elements of a step.
template <class F, class T, class... S>
void each(F f, index_t begin, index_t end, const T* __restrict g, T* __restrict p,
          S* __restrict... s) {
#pragma omp simd
  for (index_t i = begin; i < end; ++i) f(g[i], p[i], s[i]...);
}

// First up to a cache line's begin: large arrays of one shape usually lie alike in their lines, and
// stores that straddle two lines halve the speed. Prefetching ahead was measured on Zen 4: no
// faster in DRAM and slower in L3, so the hardware's own must do.
template <class F, class T, class... S>
void stream(F f, index_t n, const T* g, T* p, S*... s) {
  constexpr index_t line = line_bytes / index_t(sizeof(T));
  const auto past_line = index_t(reinterpret_cast<__UINTPTR_TYPE__>(p) % line_bytes / sizeof(T));
  const index_t head = past_line == 0 ? 0 : line - past_line;
  const index_t first = head < n ? head : n;
  each(f, 0, first, g, p, s...);
  each(f, first, n, g, p, s...);
}

template <class F, class T, int... coefficient, int... state>
void run(const double* coefficients, void* const* streams, index_t begin, index_t n,
         Indices<coefficient...>, Indices<state...>) {
  const F f{T(coefficients[coefficient])...};
  stream(f, n, static_cast<const T*>(streams[0]) + begin, static_cast<T*>(streams[1]) + begin,
         (static_cast<T*>(streams[2 + state]) + begin)...);
}

template <class F, class T>
void run(const double* coefficients, void* const* streams, index_t begin, index_t n) {
  constexpr int count = count_words(F::names.coefficients);
  static_assert(sizeof(F) == count * sizeof(T), "every coefficient has a name");
  run<F, T>(coefficients, streams, begin, n, CountTo<count>{},
            CountTo<count_words(F::names.state)>{});
}

// Sums of squares in double, since a float32 square overflows from 2e19 on. 128 bytes of sums:
// lane k of a block adds the elements k, k + 16, ... on every ISA.
using Doubles = Vector<double>;
constexpr index_t width = vector_bytes / index_t(sizeof(double));
constexpr index_t lanes = accumulator_bytes / index_t(sizeof(double));

template <class T>
void sum_squares(double scale, const void* data, index_t n, double (*sums)[2]) {
  const T* x = static_cast<const T*>(data);
  for (; n > 0; n -= block, x += block, ++sums) {
    const index_t count = n < block ? n : block;
    Doubles squares[lanes / width] = {}, zeros[lanes / width] = {};
    const auto add = [&](const T* values) {
      for (index_t r = 0; r < lanes / width; ++r) {
        Doubles value;
        for (index_t k = 0; k < width; ++k) value[k] = double(values[r * width + k]);
        zeros[r] += value * 0.0;  // NaN for infinity and NaN
        value *= scale;
        squares[r] += value * value;
      }
    };
    index_t i = 0;
    for (; i + lanes <= count; i += lanes) add(x + i);
    if (i < count) {
      T rest[lanes] = {};
      for (index_t k = 0; i + k < count; ++k) rest[k] = x[i + k];
      add(rest);
    }
    double square = 0, zero = 0;
    for (index_t k = 0; k < lanes; ++k) {
      square += squares[k / width][k % width];
      zero += zeros[k / width][k % width];
    }
    (*sums)[0] = square;
    (*sums)[1] = zero;
  }
}

#include "softmax.h"

template <class T>
constexpr Softmax softmax_of{elementwise<T, exp<T>>, elementwise<T, log<T>>, softmax<T, false>,
                             softmax<T, true>,       cross_entropy<T>,       residual<T>};

template <class T>
constexpr Dtype dtype_of = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;

template <class T, class F>
constexpr Update update_of{F::names.rule, F::names.state, F::names.coefficients, dtype_of<T>,
                           run<F, T>};

template <class... F, class... D>
constexpr auto rows(List<F...>, List<D...>) {
  struct Rows {
    Update row[sizeof...(F) + sizeof...(D)];
  };
  return Rows{{update_of<float, F>..., update_of<double, D>...}};
}

constexpr auto updates = rows(Rules<float>{}, Rules<double>{});

#define FASTOPT_TEXT_(x) #x
#define FASTOPT_TEXT(x) FASTOPT_TEXT_(x)

}  // namespace

extern const Table table;
constinit const Table table{
    FASTOPT_TEXT(FASTOPT_ISA),
    vector_bytes,
    updates.row,
    sizeof updates.row / sizeof updates.row[0],
    {{sum_squares<float>}, {sum_squares<double>}},
    {softmax_of<float>, softmax_of<double>},
    {norm_of<float>, norm_of<double>},
};

}  // namespace fastopt::FASTOPT_ISA
