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

SK_INLINE Vec gelu(Vec x) {
  // erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
  const Vec z = abs(x) * Vec::set(0.70710678f);
  const Vec t = Vec::set(1.f) / fma(z, Vec::set(0.3275911f), Vec::set(1.f));
  Vec p = Vec::set(1.061405429f);
  p = fma(p, t, Vec::set(-1.453152027f));
  p = fma(p, t, Vec::set(1.421413741f));
  p = fma(p, t, Vec::set(-0.284496736f));
  p = fma(p, t, Vec::set(0.254829592f));
  const Vec erf_z = Vec::set(1.f) - p * t * exp_negative(Vec::set(0.f) - z * z);
  return Vec::set(0.5f) * x * (Vec::set(1.f) + copy_sign(erf_z, x));
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
