// The update rules. A rule is its coefficients, folded once per step in double precision, and what
// happens to one element; one with sums adds to them, in double, what the element has for them.
// Included by kernels.cpp inside the namespace of one ISA.
//
// Every update but the average's begins with the decayed gradient, grad_scale * g + weight_decay *
// p: the sign of `maximize`, the loss scale and the clip factor are one number. No decay adds
// nothing, also to the gradient of an infinite parameter: masks of -inf stay.

struct Names {
  const char* rule;
  const char* state;
  const char* coefficients;
  const char* sums = "";
};

template <class... F>
struct List {};

template <class T>
T decayed(T g, T weight_decay, T p) {
  const T sum = g + weight_decay * p;
  return weight_decay == 0 ? g : sum;
}

template <class T>
struct Sgd {
  static constexpr Names names{"sgd", "", "grad_scale weight_decay lr"};
  T grad_scale, weight_decay, lr;

  void operator()(T g, T& p) const {
    g = decayed(grad_scale * g, weight_decay, p);
    p -= lr * g;
  }
};

// Polyak (1964); Nesterov as in Sutskever et al. (2013): the step uses the velocity after this
// gradient. The first gradient enters with one_minus_dampening = 1.
template <class T, bool nesterov>
struct SgdMomentum {
  static constexpr Names names{nesterov ? "sgd_nesterov" : "sgd_momentum", "momentum_buffer",
                               "grad_scale weight_decay lr momentum one_minus_dampening"};
  T grad_scale, weight_decay, lr, momentum, one_minus_dampening;

  void operator()(T g, T& p, T& v) const {
    g = decayed(grad_scale * g, weight_decay, p);
    v = momentum * v + one_minus_dampening * g;
    p -= lr * (nesterov ? g + momentum * v : v);
  }
};

// Duchi, Hazan, Singer (2011). mean_factor is 1, or 1/t for the root of the mean square.
template <class T>
struct Adagrad {
  static constexpr Names names{"adagrad", "sum", "grad_scale weight_decay lr mean_factor eps"};
  T grad_scale, weight_decay, lr, mean_factor, eps;

  void operator()(T g, T& p, T& sum) const {
    g = decayed(grad_scale * g, weight_decay, p);
    sum += g * g;
    p -= lr * g / (sqrt(sum * mean_factor) + eps);
  }
};

// Tieleman, Hinton (2012); centered: Graves (2013). States: square_avg, grad_avg if centered,
// momentum_buffer if momentum. Rounding can make the variance negative: then it is zero.
template <class T, bool centered, bool with_momentum>
struct Rmsprop {
  static constexpr Names names{
      centered ? (with_momentum ? "rmsprop_centered_momentum" : "rmsprop_centered")
               : (with_momentum ? "rmsprop_momentum" : "rmsprop"),
      centered ? (with_momentum ? "square_avg grad_avg momentum_buffer" : "square_avg grad_avg")
               : (with_momentum ? "square_avg momentum_buffer" : "square_avg"),
      "grad_scale weight_decay lr alpha one_minus_alpha eps momentum"};
  T grad_scale, weight_decay, lr, alpha, one_minus_alpha, eps, momentum;

  template <class... More>
  void operator()(T g, T& p, T& v, More&... more) const {
    T* const state[] = {&v, &more...};
    g = decayed(grad_scale * g, weight_decay, p);
    v = alpha * v + one_minus_alpha * g * g;
    T variance = v;
    if constexpr (centered) {
      T& mean = *state[1];
      mean = alpha * mean + one_minus_alpha * g;
      variance = maximum(v - mean * mean, T(0));
    }
    T step = g / (sqrt(variance) + eps);
    if constexpr (with_momentum) {
      T& buffer = *state[centered ? 2 : 1];
      step = buffer = momentum * buffer + step;
    }
    p -= lr * step;
  }
};

// Zeiler (2012).
template <class T>
struct Adadelta {
  static constexpr Names names{"adadelta", "square_avg acc_delta",
                               "grad_scale weight_decay lr rho one_minus_rho eps"};
  T grad_scale, weight_decay, lr, rho, one_minus_rho, eps;

  void operator()(T g, T& p, T& v, T& u) const {
    g = decayed(grad_scale * g, weight_decay, p);
    v = rho * v + one_minus_rho * g * g;
    const T delta = sqrt(u + eps) / sqrt(v + eps) * g;
    u = rho * u + one_minus_rho * delta * delta;
    p -= lr * delta;
  }
};

// Kingma, Ba (2015); decoupled weight decay: Loshchilov, Hutter (2019), decay = 1 - lr *
// weight_decay; amsgrad: Reddi, Kale, Kumar (2018). The bias corrections sit in step_size and
// root_correction.
template <class T, bool amsgrad>
struct Adam {
  static constexpr Names names{
      amsgrad ? "adam_amsgrad" : "adam",
      amsgrad ? "exp_avg exp_avg_sq max_exp_avg_sq" : "exp_avg exp_avg_sq",
      "grad_scale weight_decay decay beta1 one_minus_beta1 beta2 one_minus_beta2 "
      "step_size root_correction eps"};
  T grad_scale, weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T step_size, root_correction, eps;

  template <class... Maximum>
  void operator()(T g, T& p, T& m, T& v, Maximum&... v_max) const {
    g = decayed(grad_scale * g, weight_decay, p);
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    T second_moment = v;
    ((second_moment = v_max = maximum(v, v_max)), ...);
    p = decay * p - step_size * m / (sqrt(second_moment) * root_correction + eps);
  }
};

// Dozat (2016) as Choi et al. (2019) write it: the step is along the average after this gradient
// has come in once more.
template <class T>
struct Nadamw {
  static constexpr Names names{"nadamw", "exp_avg exp_avg_sq",
                               "grad_scale decay beta1 one_minus_beta1 beta2 one_minus_beta2 "
                               "step_size root_correction eps"};
  T grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T step_size, root_correction, eps;

  void operator()(T g, T& p, T& m, T& v) const {
    g = grad_scale * g;
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    const T ahead = beta1 * m + one_minus_beta1 * g;
    p = decay * p - step_size * ahead / (sqrt(v) * root_correction + eps);
  }
};

// Liu et al. (2020): rectified is 0 as long as the second moment is of too few gradients to divide
// by. The rectification and the bias corrections sit in step_size.
template <class T>
struct Radam {
  static constexpr Names names{"radam", "exp_avg exp_avg_sq",
                               "grad_scale weight_decay decay beta1 one_minus_beta1 beta2 "
                               "one_minus_beta2 step_size rectified eps"};
  T grad_scale, weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T step_size, rectified, eps;

  void operator()(T g, T& p, T& m, T& v) const {
    g = decayed(grad_scale * g, weight_decay, p);
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    const T root = sqrt(v) + eps;
    p = decay * p - step_size * m / (rectified == 0 ? 1 : root);
  }
};

// Zhuang et al. (2020): the second moment is that of the gradient's difference from its average.
template <class T>
struct AdaBelief {
  static constexpr Names names{"adabelief", "exp_avg exp_avg_var",
                               "grad_scale decay beta1 one_minus_beta1 beta2 one_minus_beta2 "
                               "step_size root_correction eps"};
  T grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T step_size, root_correction, eps;

  void operator()(T g, T& p, T& m, T& v) const {
    g = grad_scale * g;
    m = beta1 * m + one_minus_beta1 * g;
    const T surprise = g - m;
    v = beta2 * v + one_minus_beta2 * surprise * surprise + eps;
    p = decay * p - step_size * m / (sqrt(v) * root_correction + eps);
  }
};

// Zaheer et al. (2018): the second moment moves by a share of the square, not of the difference.
template <class T>
struct Yogi {
  static constexpr Names names{"yogi", "exp_avg exp_avg_sq",
                               "grad_scale decay beta1 one_minus_beta1 one_minus_beta2 "
                               "step_size root_correction eps"};
  T grad_scale, decay, beta1, one_minus_beta1, one_minus_beta2;
  T step_size, root_correction, eps;

  void operator()(T g, T& p, T& m, T& v) const {
    g = grad_scale * g;
    m = beta1 * m + one_minus_beta1 * g;
    const T square = g * g;
    v -= one_minus_beta2 * sign(v - square) * square;
    p = decay * p - step_size * m / (sqrt(v) * root_correction + eps);
  }
};

// The largest gradient takes the place of the second moment: Kingma, Ba (2015), section 7.1.
template <class T>
struct Adamax {
  static constexpr Names names{"adamax", "exp_avg exp_inf",
                               "grad_scale weight_decay beta1 one_minus_beta1 beta2 step_size eps"};
  T grad_scale, weight_decay, beta1, one_minus_beta1, beta2, step_size, eps;

  void operator()(T g, T& p, T& m, T& largest) const {
    g = decayed(grad_scale * g, weight_decay, p);
    m = beta1 * m + one_minus_beta1 * g;
    largest = maximum(beta2 * largest, absolute(g) + eps);
    p -= step_size * m / largest;
  }
};

// Chen et al. (2023): the step's average is not the one that is kept.
template <class T>
struct Lion {
  static constexpr Names names{"lion", "exp_avg",
                               "grad_scale decay lr beta1 one_minus_beta1 beta2 one_minus_beta2"};
  T grad_scale, decay, lr, beta1, one_minus_beta1, beta2, one_minus_beta2;

  void operator()(T g, T& p, T& m) const {
    g = grad_scale * g;
    p = decay * p - lr * sign(beta1 * m + one_minus_beta1 * g);
    m = beta2 * m + one_minus_beta2 * g;
  }
};

// Bernstein et al. (2018): signSGD, and Signum with momentum.
template <class T>
struct SignSgd {
  static constexpr Names names{"sign_sgd", "", "grad_scale decay lr"};
  T grad_scale, decay, lr;

  void operator()(T g, T& p) const { p = decay * p - lr * sign(grad_scale * g); }
};

template <class T>
struct SignSgdMomentum {
  static constexpr Names names{"sign_sgd_momentum", "momentum_buffer",
                               "grad_scale decay lr momentum one_minus_momentum"};
  T grad_scale, decay, lr, momentum, one_minus_momentum;

  void operator()(T g, T& p, T& m) const {
    m = momentum * m + one_minus_momentum * (grad_scale * g);
    p = decay * p - lr * sign(m);
  }
};

// The exponentially weighted average p of what g brings: it goes its share of the way to g, from
// the end that is nearer, so that a p that is there stays, and a share of 1 is g itself. An
// infinity stays, too: the way from one to itself is NaN.
template <class T>
struct Ema {
  static constexpr Names names{"ema", "", "share rest"};
  T share, rest;

  void operator()(T g, T& p) const {
    const bool near = share < rest;
    const T from = near ? p : g, to = near ? g : p, part = near ? share : rest;
    p = p * T(0) == g * T(0) ? from + (part * to - part * from) : p + g;
  }
};

// What the global norm of the gradients is made of. In double, since a float32 square overflows
// from 2e19 on; `nonfinite` becomes NaN where an element is infinite or NaN, and is zero else.
template <class T>
struct GradientNorm {
  static constexpr Names names{"gradient_norm", "", "scale", "square nonfinite"};
  double scale;

  void operator()(T g, const T&, double& square, double& nonfinite) const {
    const double scaled = scale * double(g);
    square += scaled * scaled;
    nonfinite += double(g) * 0.0;
  }
};

// All updates, for one T.
template <class T>
using Rules =
    List<Sgd<T>, SgdMomentum<T, false>, SgdMomentum<T, true>, Adagrad<T>, Rmsprop<T, false, false>,
         Rmsprop<T, false, true>, Rmsprop<T, true, false>, Rmsprop<T, true, true>, Adadelta<T>,
         Adam<T, false>, Adam<T, true>, Nadamw<T>, Radam<T>, AdaBelief<T>, Yogi<T>, Adamax<T>,
         Lion<T>, SignSgd<T>, SignSgdMomentum<T>, Ema<T>>;
