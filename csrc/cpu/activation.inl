// Activations of a vector, applied before a result is stored.
namespace sparsekern {
namespace {

// exp(x) for x <= 0 to about 1 ulp: 2^n * p(r), r = x - n ln 2, with ln 2 in two parts (Cody and
// Waite 1980) and the Taylor polynomial of degree 7 on |r| <= ln(2) / 2. Below -87 the result is
// under the smallest normal number and is clamped to it.
SK_INLINE Vec exp_negative(Vec x) {
  x = max(Vec::set(-87.f), x);
  const Vec n = round(x * Vec::set(1.44269504f));
  Vec r = fma(n, Vec::set(-0.693359375f), x);
  r = fma(n, Vec::set(2.12194440e-4f), r);
  Vec p = Vec::set(1.f / 5040);
  const float taylor[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
  for (float c : taylor) p = fma(p, r, Vec::set(c));
  return p * exp2i(n);
}

// x Phi(x) = max(x, 0) - a Phi(-a) with a = |x|: what is taken away is small, so its error does not
// grow with x. Phi(-a) as a polynomial of degree 15 in u, that maps [0, 5.4] to [-1, 1]; its
// coefficients minimise the largest a |error| (Lawson's weighted least squares) and make it zero
// at the end. Error below 5e-7, and 5e-7 of the result from -1 on. No exponential, no division.
SK_INLINE Vec gelu(Vec x) {
  const Vec a = min(Vec::set(5.40000057f), abs(x));
  const Vec u = fma(a, Vec::set(0.370370328f), Vec::set(-1.f));
  const float coefficients[] = {0.00639204914f, 0.0267560594f,  -0.0437610894f, -0.0369153433f,
                                0.122022696f,   -0.0476773307f, -0.136276469f,  0.211503714f,
                                -0.0716541857f, -0.154926822f,  0.267251283f,   -0.215004414f,
                                0.102558725f,   -0.0281369947f, 0.00346696749f};
  Vec p = Vec::set(-0.00559884915f);
#pragma GCC unroll 15
  for (float c : coefficients) p = fma(p, u, Vec::set(c));
  return fma(Vec::set(0.f) - a, p, max(Vec::set(0.f), x));
}

SK_INLINE Vec gelu_tanh(Vec x) {
  const Vec u = Vec::set(0.79788456f) * x * fma(Vec::set(0.044715f) * x, x, Vec::set(1.f));
  const Vec e = exp_negative(Vec::set(-2.f) * abs(u));
  const Vec tanh_u = (Vec::set(1.f) - e) / (Vec::set(1.f) + e);
  return Vec::set(0.5f) * x * (Vec::set(1.f) + copy_sign(tanh_u, u));
}

SK_INLINE Vec activate(Vec x, Activation a) {
  switch (a) {
    case kRelu: return max(Vec::set(0.f), x);
    case kRelu6: return min(Vec::set(6.f), max(Vec::set(0.f), x));
    case kGelu: return gelu(x);
    case kGeluTanh: return gelu_tanh(x);
    default: return x;
  }
}

}  // namespace
}  // namespace sparsekern
