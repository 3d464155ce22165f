// Batch normalisation of one channel and the activation behind it (Ioffe and Szegedy 2015,
// algorithm 1). A channel of a usual batch fits the L2 cache: the second pass over it reads no
// memory. Limit: x is read and the result written once; the gradient reads one tensor more.
namespace sparsekern {
namespace {

// Floats summed in float32 before a double takes over: images are put together up to the first
// number, and larger ones than the second are split.
constexpr int64_t kNormChunk = 2048, kNormMost = 1024 * Vec::N;

// A vector of a channel: a whole one, or the first n lanes at the end of an image.
struct WholeVec {
  static SK_INLINE Vec load(const float* p) { return Vec::load(p); }
  static SK_INLINE void store(Vec v, float* p) { v.store(p); }
  static SK_INLINE Vec keep(Vec v) { return v; }
};
struct PartVec {
  int64_t n;
  SK_INLINE Vec load(const float* p) const { return Vec::load(p, n); }
  SK_INLINE void store(Vec v, float* p) const { v.store(p, n); }
  SK_INLINE Vec keep(Vec v) const {  // zeros in the other lanes
    float lanes[Vec::N];
    v.store(lanes);
    return Vec::load(lanes, n);
  }
};

// f(offset, vector, i) for all vectors; i alternates, for two independent sums.
template <class F>
SK_INLINE void each_vector(const NormArgs& a, F f) {
  for (int64_t image = 0; image < a.images; ++image) {
    int64_t at = image * a.stride, left = a.pixels;
    for (; left >= 2 * Vec::N; left -= 2 * Vec::N, at += 2 * Vec::N) {
      f(at, WholeVec{}, 0);
      f(at + Vec::N, WholeVec{}, 1);
    }
    if (left >= Vec::N) {
      f(at, WholeVec{}, 0);
      left -= Vec::N, at += Vec::N;
    }
    if (left > 0) f(at, PartVec{left}, 1);
  }
}

// f(arguments of a chunk) for all chunks of a channel; of the pointers only x and grad are its own.
template <class F>
SK_INLINE void each_chunk(const NormArgs& a, F f) {
  const int64_t images = a.pixels < kNormChunk ? kNormChunk / a.pixels : 1;
  NormArgs chunk = a;
  for (int64_t i = 0; i < a.images; i += images)
    for (int64_t p = 0; p < a.pixels; p += kNormMost) {
      const int64_t at = i * a.stride + p;
      chunk.x = a.x + at, chunk.grad = a.grad ? a.grad + at : nullptr;
      chunk.images = images < a.images - i ? images : a.images - i;
      chunk.pixels = kNormMost < a.pixels - p ? kNormMost : a.pixels - p;
      f(chunk);
    }
}

// Mean and squares around it chunk by chunk, joined by the formula of Chan, Golub and LeVeque
// (1979): nothing is lost where the mean is large against the deviation.
void norm_moments(const NormArgs& a, double* out) {
  double mean = 0, squares = 0, count = 0;
  each_chunk(a, [&](const NormArgs& c) {
    const double n = static_cast<double>(c.images * c.pixels);
    Vec sum[2] = {Vec::set(0.f), Vec::set(0.f)};
    each_vector(c, [&](int64_t at, auto v, int j) { sum[j] = sum[j] + v.load(c.x + at); });
    const double chunk_mean = (sum[0] + sum[1]).sum() / n;
    const Vec m = Vec::set(static_cast<float>(chunk_mean));
    Vec square[2] = {Vec::set(0.f), Vec::set(0.f)};
    each_vector(c, [&](int64_t at, auto v, int j) {
      const Vec d = v.keep(v.load(c.x + at) - m);
      square[j] = fma(d, d, square[j]);
    });
    const double total = count + n, delta = chunk_mean - mean;
    mean += delta * n / total;
    squares += (square[0] + square[1]).sum() + delta * delta * count * n / total;
    count = total;
  });
  out[0] = mean, out[1] = squares / count;
}

template <Activation A>
SK_INLINE Vec norm_activate(Vec y) {
  if (A != kNone) y = max(Vec::set(0.f), y);
  return A == kRelu6 ? min(Vec::set(6.f), y) : y;
}

// The gradient before the activation, whose output before it is y.
template <Activation A>
SK_INLINE Vec norm_gate(Vec y, Vec grad) {
  if (A == kNone) return grad;
  return where_open(A == kRelu6 ? min(y, Vec::set(6.f) - y) : y, grad);
}

template <Activation A>
void norm_apply_act(const NormArgs& a) {
  const Vec mean = Vec::set(a.mean), scale = Vec::set(a.scale), shift = Vec::set(a.shift);
  each_vector(a, [&](int64_t at, auto v, int) {
    v.store(norm_activate<A>(fma(v.load(a.x + at) - mean, scale, shift)), a.out + at);
  });
}

template <Activation A>
void norm_grad_act(const NormArgs& a, double rstd, double* sums) {
  const Vec mean = Vec::set(a.mean), scale = Vec::set(a.scale), shift = Vec::set(a.shift);
  sums[0] = sums[1] = 0;
  each_chunk(a, [&](const NormArgs& c) {
    Vec sum[2] = {Vec::set(0.f), Vec::set(0.f)}, dot[2] = {Vec::set(0.f), Vec::set(0.f)};
    each_vector(c, [&](int64_t at, auto v, int j) {
      const Vec x = v.load(c.x + at) - mean;
      const Vec g = norm_gate<A>(fma(x, scale, shift), v.load(c.grad + at));
      sum[j] = sum[j] + g;
      dot[j] = fma(g, x, dot[j]);
    });
    sums[0] += (sum[0] + sum[1]).sum();
    sums[1] += (dot[0] + dot[1]).sum();
  });
  const double n = static_cast<double>(a.images * a.pixels);
  const Vec c0 = Vec::set(static_cast<float>(-a.scale * sums[0] / n));
  const Vec c1 = Vec::set(static_cast<float>(-a.scale * rstd * rstd * sums[1] / n));
  each_vector(a, [&](int64_t at, auto v, int) {
    const Vec x = v.load(a.x + at) - mean;
    const Vec g = norm_gate<A>(fma(x, scale, shift), v.load(a.grad + at));
    v.store(fma(g, scale, fma(x, c1, c0)), a.out + at);
  });
}

void norm_apply(const NormArgs& a) {
  switch (a.activation) {
    case kRelu: return norm_apply_act<kRelu>(a);
    case kRelu6: return norm_apply_act<kRelu6>(a);
    default: return norm_apply_act<kNone>(a);
  }
}

void norm_grad(const NormArgs& a, double rstd, double* sums) {
  switch (a.activation) {
    case kRelu: return norm_grad_act<kRelu>(a, rstd, sums);
    case kRelu6: return norm_grad_act<kRelu6>(a, rstd, sums);
    default: return norm_grad_act<kNone>(a, rstd, sums);
  }
}

}  // namespace
}  // namespace sparsekern
