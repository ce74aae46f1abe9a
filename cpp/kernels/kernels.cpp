// The one translation unit that is compiled once per instruction set, with FASTOPT_ISA as its name.
// No standard header and no external symbol but the table: whatever the linker could merge with
// another object's copy could carry this object's instructions to a processor without them.
#include "table.h"

namespace fastopt::FASTOPT_ISA {
namespace {

#include "simd.h"
#include "tile.h"

#include "lanes.h"
#include "moments.h"
#include "rows.h"

#include "coefficients.h"
#include "columns.h"

#include "rules.h"
#include "update.h"

#include "codecs.h"

#include "math.h"
#include "softmax.h"

template <class T>
constexpr Norm norm_of{
    moments<T>,
    row_moments<T>,
    column_moments<T>,
    merge,
    choose_units<T>,
    apply<T>,
    column_apply<T>,
    row_apply<T>,
    gradient_sums<T>,
    column_gradient_sums<T>,
    row_gradient_sums<T>,
    gradient_apply<T>,
    column_gradient_apply<T>,
    row_gradient_apply<T>,
    flush_sums<T>,
    add_sums,
    round_sums<T>,
    move_average<T>,
    forward_coefficients<T>,
    backward_coefficients<T>,
    group_coefficients<T>,
};

template <class T>
constexpr Softmax softmax_of{elementwise<T, exp<T>>,
                             elementwise<T, log<T>>,
                             softmax<T, false>,
                             softmax<T, true>,
                             cross_entropy<T>,
                             bad_row<T>,
                             residual<T>};

template <class T>
constexpr Dtype dtype_of = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;

template <class T, class F>
constexpr Rule rule_of() {
  Rule rule{F::names.rule,
            F::names.state,
            F::names.coefficients,
            dtype_of<T>,
            count_words(F::names.sums),
            nullptr,
            F::names.over_all,
            nullptr,
            nullptr,
            update<F, T>,
            nullptr,
            nullptr};
  if constexpr (*F::names.sums) {
    rule.reduce = reduce<F, T>;
    rule.combine = combine<F>;
  }
  if constexpr (*F::names.prepared) rule.prepare = prepare<F, T>;
  if constexpr (F::names.factored) {
    rule.add_squares = add_squares<F, T>;
    rule.factor = factor<F, T>;
  }
  return rule;
}

template <class... F, class... D>
constexpr auto rows(List<F...>, List<D...>) {
  struct Rows {
    Rule row[sizeof...(F) + sizeof...(D)];
  };
  return Rows{{rule_of<float, F>()..., rule_of<double, D>()...}};
}

constexpr auto rules = rows(Rules<float>{}, Rules<double>{});

#define FASTOPT_TEXT_(x) #x
#define FASTOPT_TEXT(x) FASTOPT_TEXT_(x)

}  // namespace

extern const Table table;
constinit const Table table{
    FASTOPT_TEXT(FASTOPT_ISA),
    vector_bytes,
    rules.row,
    sizeof rules.row / sizeof rules.row[0],
    {reduce<GradientNorm<float>, float>, reduce<GradientNorm<double>, double>},
    {{},
     {},
     {load_bfloat16, store_bfloat16, store_bfloat16_at_random},
     {load_float16, store_float16, nullptr},
     {EightBits<true>::load, EightBits<true>::store, nullptr},
     {EightBits<false>::load, EightBits<false>::store, nullptr}},
    {softmax_of<float>, softmax_of<double>},
    {norm_of<float>, norm_of<double>},
};

}  // namespace fastopt::FASTOPT_ISA
