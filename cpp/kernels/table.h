// The kernel table: what the per-ISA objects offer to the rest of the library.
// Plain data and no includes: nothing here may become code that two ISAs share.
#pragma once

namespace fastopt {

using index_t = __PTRDIFF_TYPE__;

enum class Dtype { float32, float64 };

// A step, and a sum along a row, is cut into blocks of this many elements, counted from the first
// one: threads and tiles take whole blocks, so results do not depend on who does what.
constexpr index_t block = 1024;

// Norms work on rows of so few columns with a vector across the rows instead of one along them.
constexpr index_t few_columns = 32;

// What happens to the elements of one array: an optimizer's update, or sums over them.
struct Rule {
  const char* name;
  const char* state;         // names, separated by blanks
  const char* coefficients;  // names, separated by blanks; the order of `run`'s numbers
  int sum_count;             // how many numbers it adds up over a block
  Dtype dtype;
  // The streams are gradient, parameter, state..., from the element of this index on; the sums
  // are those of one block after the other.
  void (*run)(const double* coefficients, void* const* streams, index_t element, index_t n,
              double* sums);
};

// Rows of `columns` numbers that lie one after the other, each with its target: q = class_weight at
// the label plus base, or class_weight * probabilities + base. A row's loss is
// sum_c q_c (log(sum(exp(logits))) - logits_c), and its gradient is multiplied by `scale`.
struct CrossEntropyRows {
  index_t columns;
  const void* logits;
  const long long* labels;    // 0 to columns - 1, or `ignored`
  const void* probabilities;  // nullptr for labels
  const void* class_weight;   // of every column
  const void* base;           // of every column; nullptr for labels if it is zero
  double base_sum;
  long long ignored;
  double scale;
  void* losses;    // of every row
  void* gradient;  // may be the logits
};

struct Softmax {
  void (*exp)(const void* x, void* y, index_t n);
  void (*log)(const void* x, void* y, index_t n);
  void (*softmax)(const void* x, void* y, index_t rows, index_t columns);
  void (*log_softmax)(const void* x, void* y, index_t rows, index_t columns);
  void (*cross_entropy)(const CrossEntropyRows& task, index_t begin_row, index_t end_row);
  // The first row that is no distribution: negative somewhere, or the sum off 1 by more than 1e-3.
  index_t (*bad_row)(const void* x, index_t rows, index_t columns);
  // y = factor * (x - target), where no target is zero; with the sums of (x - target)^2 by block.
  void (*residual)(double factor, const void* x, const void* target, void* y, index_t n,
                   double* sums);
};

// Where the elements of one statistic lie: `count` runs of `inner` neighbours, `stride` apart.
struct Runs {
  index_t count, stride, inner;
};

// y = (x - center) scale + shift, + residual, rectified. The coefficients are arrays of x's dtype.
struct Forward {
  const void* x;
  const void* residual;  // or nullptr
  void* y;
  const void *center, *scale, *shift;
  bool relu;
  bool stream;  // stores pass by the caches
};

// dx = on_dy dy + on_x (x - center) + constant, where dy has come through the activation, whose
// sign is that of y, or without y of Forward's formula.
struct Backward {
  const void *dy, *x, *y;
  void *dx, *dresidual;
  const void *center, *scale, *shift;
  const void *on_dy, *on_x, *constant;
  bool relu;
  bool stream;
};

// Means and biased variances of x times its statistic's unit, a power of two. It is 1, unless
// sqrt(variance + eps) is so large or so small that its inverse has no room in x's dtype: then all
// that is done with x, to the coefficients and back to dx, is done in this unit.
struct Statistics {
  double *mean, *variance, *unit;
  double eps;  // of x itself
};

// Normalization in one dtype; rows.h, columns.h, moments.h and coefficients.h say what each one
// does.
struct Norm {
  void (*moments)(const void* x, Runs runs, index_t statistics, index_t apart, bool centered,
                  double* mean, double* m2);
  void (*apply)(const Forward& f, Runs runs, index_t coefficient_stride);
  void (*gradient_sums)(const Backward& b, Runs runs, index_t statistics, index_t apart,
                        double* sums, double* products);
  void (*gradient_apply)(const Backward& b, Runs runs, index_t coefficient_stride);
  void (*column_moments)(const void* x, index_t rows, index_t stride, index_t columns, double* mean,
                         double* m2, void* scratch);
  void (*column_apply)(const Forward& f, index_t rows, index_t stride, index_t columns);
  void (*column_gradient_sums)(const Backward& b, index_t rows, index_t stride, index_t columns,
                               double* sums, double* products, void* scratch);
  void (*column_gradient_apply)(const Backward& b, index_t rows, index_t stride, index_t columns);
  void (*row_apply)(const Forward& f, const void* gamma, const void* beta, index_t apart,
                    index_t rows, index_t n);
  void (*row_gradient_sums)(const Backward& b, const void* gamma, index_t apart, index_t rows,
                            index_t n, double* sums, double* products);
  void (*row_gradient_apply)(const Backward& b, const void* gamma, index_t apart, index_t rows,
                             index_t stride, index_t n, void* dgamma, void* dbeta);
  void (*flush_sums)(void* values, index_t n, double* sums);
  void (*add_sums)(index_t n, const double* from, double* to);
  void (*round_sums)(index_t n, const double* from, void* to);
  void (*merge)(double count_a, double* mean_a, double* m2_a, double count_b, const double* mean_b,
                const double* m2_b, index_t n);
  void (*move_average)(index_t n, double momentum, double factor, const double* value,
                       void* running);
  void (*choose_units)(const void* x, Runs runs, index_t statistics, index_t apart, bool centered,
                       const Statistics& s);
  void (*forward_coefficients)(index_t n, const Statistics& s, const void* gamma, const void* beta,
                               void* center, void* scale, void* shift);
  void (*backward_coefficients)(index_t n, const Statistics& s, double count, const void* gamma,
                                const double* sums, double* products, const void* center,
                                void* on_dy, void* on_x, void* constant);
  void (*group_coefficients)(index_t groups, index_t n, const Statistics& s, double count,
                             const void* gamma, const double* sums, double* products,
                             const void* center, void* on_dy, void* on_x, void* constant);
};

struct Table {
  const char* isa;
  index_t vector_bytes;  // as the compiler was told
  const Rule* rules;
  int rule_count;
  Rule gradient_norm[2];  // by Dtype
  Softmax softmax[2];     // by Dtype
  Norm norm[2];           // by Dtype
};

}  // namespace fastopt
