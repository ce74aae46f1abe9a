// exp and log. Included by kernels.cpp inside the namespace of one ISA.

template <class T>
struct Real;

// The polynomials interpolate at Chebyshev nodes: (exp(r) - 1 - r) / r^2 over |r| <= ln(2) / 2, and
// (2 artanh(s) - 2 s) / s^3 in s^2 over |s| <= 3 - sqrt(8). ln2_high times any exponent is exact.
template <>
struct Real<float> {
  using Bits = unsigned;
  static constexpr int fraction_bits = 23;
  static constexpr Bits exponent_bias = 127, sqrt_half = 0x3f3504f3;
  static constexpr float infinity = __builtin_inff();
  static constexpr float smallest_normal = 0x1p-126f, subnormal_scale = 0x1p25f;
  static constexpr float round = 0x1.8p23f;  // adding it leaves an integer in the low bits
  static constexpr float lowest_exp = -0x1.5d589ep+6f, highest_exp = 0x1.62e42ep+6f;
  static constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.1219444e-4f;
  static constexpr float exp[] = {5.e-01f, 1.6666576e-01f, 4.1666556e-02f, 8.363203e-03f,
                                  1.3926213e-03f};
  static constexpr float log[] = {6.6666687e-01f, 3.998876e-01f, 2.9580986e-01f};
};

template <>
struct Real<double> {
  using Bits = unsigned long long;
  static constexpr int fraction_bits = 52;
  static constexpr Bits exponent_bias = 1023, sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double infinity = __builtin_inf();
  static constexpr double smallest_normal = 0x1p-1022, subnormal_scale = 0x1p54;
  static constexpr double round = 0x1.8p52;
  static constexpr double lowest_exp = -0x1.6232bdd7abcd2p+9, highest_exp = 0x1.62e42fefa39efp+9;
  static constexpr double log2_e = 1.4426950408889634, ln2_high = 0x1.62e42feep-1,
                          ln2_low = 1.9082149292705877e-10;
  static constexpr double exp[] = {
      0.5000000000000001,     0.16666666666666669,    0.04166666666662399,   0.008333333333330051,
      0.0013888888917281794,  0.00019841269863105968, 2.480152119021773e-05, 2.7557268378684192e-06,
      2.7620138719733994e-07, 2.5100424157005067e-08};
  static constexpr double log[] = {0.666666666666667,   0.3999999999989889, 0.28571428626253836,
                                   0.22222211089379496, 0.1818289243253687, 0.15331611722055008,
                                   0.14617807153417325};
};

template <class T>
using Bits = Vector<typename Real<T>::Bits>;

template <class T>
Vector<T> all(T x) {
  return Vector<T>{} + x;
}

// Horner's rule: c[0] + x c[1] + ...
template <class T, int n>
Vector<T> polynomial(Vector<T> x, const T (&c)[n]) {
  Vector<T> sum = all(c[n - 1]);
  for (int i = n - 1; i-- > 0;) sum = sum * x + c[i];
  return sum;
}

// exp(x) = 2^n exp(r), x = n ln(2) + r. A result too small for a normal number is zero.
template <class T>
Vector<T> exp(Vector<T> x) {
  using R = Real<T>;
  const Vector<T> shifted = x * R::log2_e + R::round, n = shifted - R::round;
  const Vector<T> r = x - n * R::ln2_high - n * R::ln2_low;
  Vector<T> y = r * r * polynomial<T>(r, R::exp) + r + T(1);
  y = (Vector<T>)((Bits<T>)y + ((Bits<T>)shifted << R::fraction_bits));
  y = x < R::lowest_exp ? Vector<T>{} : y;
  return x <= R::highest_exp ? y : x + R::infinity;
}

// log(x) = n ln(2) + log(1 + f), 1 + f from sqrt(1/2) to sqrt(2); log(1 + f) = 2 artanh(s) for
// s = f / (2 + f), which is f - s (f - s^2 p(s^2)).
template <class T>
Vector<T> log(Vector<T> x) {
  using R = Real<T>;
  const auto tiny = x < R::smallest_normal;
  const Vector<T> normal = tiny ? x * R::subnormal_scale : x;
  constexpr typename R::Bits one = R::exponent_bias << R::fraction_bits,
                             fraction = (typename R::Bits(1) << R::fraction_bits) - 1;
  const Bits<T> bits = (Bits<T>)normal + (one - R::sqrt_half);
  const Vector<T> f = (Vector<T>)((bits & fraction) + R::sqrt_half) - T(1);
  const T round = R::round;
  typename R::Bits round_bits;
  __builtin_memcpy(&round_bits, &round, sizeof round);
  const Vector<T> exponent = (Vector<T>)((bits >> R::fraction_bits) + round_bits) - R::round;
  const Vector<T> n = exponent - (tiny ? all(T(R::exponent_bias) + (R::fraction_bits + 2))
                                       : all(T(R::exponent_bias)));
  const Vector<T> s = f / (f + T(2)), square = s * s;
  const Vector<T> half = f * f * T(0.5);
  const Vector<T> low = s * (half + square * polynomial<T>(square, R::log)) + n * R::ln2_low;
  Vector<T> y = n * R::ln2_high - ((half - low) - f);
  y = x == T(0) ? all(-R::infinity) : y;
  y = x == R::infinity ? x : y;
  return x < T(0) ? all(R::infinity - R::infinity) : (x != x ? x : y);
}
