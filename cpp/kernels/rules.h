// The update rules. A rule is its coefficients, folded once per step in double precision, and what
// happens to one element. One with sums first passes over the array with `sum`, which adds what the
// element has for them, in double; then `combine` changes the coefficients that depend on them.
// One that prepares something does so in a first pass with `prepare`. One that is factored says
// with `moved` how its means move, and has their roots for states. Included by kernels.cpp inside
// the namespace of one ISA.
//
// Every update but the average's begins with grad_scale * g: the sign of `maximize`, the loss scale
// and the clip factor are one number. Decoupled weight decay is a factor of the parameter; L2's
// adds weight_decay * p, and where there is none, nothing, also to the gradient of an infinite
// parameter: masks of -inf stay.

struct Names {
  const char* rule;
  const char* state;  // with a + those that are never negative, with a ! those that are not coded
  const char* coefficients;
  const char* sums = "";      // of a first pass over the array
  const char* prepared = "";  // what such a pass writes, and Python changes before the update
  bool factored = false;      // the states are means of rows and columns
  bool over_all = false;      // the sums are over all arrays, and `combine` says whether to step
};

template <class... F>
struct List {};

template <class T>
T decayed(T g, T weight_decay, T p) {
  const T sum = g + weight_decay * p;
  return weight_decay == 0 ? g : sum;
}

// Liang et al., Cautious optimizers (2024): no step where it is against the gradient, and the
// others so much longer.
inline double caution(double aligned, double n) {
  return maximum(aligned / n, 1e-3);
}

#include "adam_rules.h"
#include "sgd_rules.h"

// What the global norm of the gradients is made of. In double, since a float32 square overflows
// from 2e19 on; `nonfinite` becomes NaN where an element is infinite or NaN, and is zero else.
template <class T>
struct GradientNorm {
  static constexpr Names names{"gradient_norm", "", "scale", "square nonfinite"};
  double scale;

  void sum(double& square, double& nonfinite, T g, const T&) const {
    const double scaled = scale * double(g);
    square += scaled * scaled;
    nonfinite += double(g) * 0.0;
  }
};

// All updates, for one T.
template <class T>
using Rules =
    List<Sgd<T, false, false>, Sgd<T, true, false>, Sgd<T, true, true>, Adagrad<T>,
         Rmsprop<T, false, false>, Rmsprop<T, false, true>, Rmsprop<T, true, false>,
         Rmsprop<T, true, true>, Adadelta<T>, Adam<T, false>, Adam<T, true>, CautiousAdam<T, false>,
         CautiousAdam<T, true>, StableAdam<T>, Adafactor<T>, FactoredAdafactor<T>, Nadamw<T>,
         CautiousNadamw<T>, Radam<T>, AdaBelief<T>, Yogi<T>, Adamax<T>, AdEMAMix<T>, Adopt<T>,
         Adan<T>, Rprop<T>, Lamb<T>, CautiousLamb<T>, Lars<T, false, false>, Lars<T, true, false>,
         Lars<T, true, true>, Lion<T>, CautiousLion<T>, SignSgd<T>, SignSgdMomentum<T>, Muon<T>,
         Nadam<T>, Asgd<T>, ScheduleFreeSgd<T>, ScheduleFreeAdamW<T>, Prodigy<T>, Ema<T>>;
