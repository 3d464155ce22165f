// Weight gradient on the pattern (sampled dense-dense matrix product). A row of the gradient stays
// in R registers while the columns of its run stream from the L1 cache. The dot products of N
// values wait until they can be summed across lanes at once, whichever runs they belong to: results
// lie in the order of the runs, so those N are neighbours.
namespace sparsekern {
namespace {

constexpr int kSddmmVectors = 8;

struct PendingDots {
  Vec dot[Vec::N];
  int64_t count = 0;
  float* out;  // of the first of them
};

template <bool kFirst>
SK_INLINE void flush(PendingDots& p) {
  for (int64_t l = p.count; l < Vec::N; ++l) p.dot[l] = Vec::set(0.f);
  const Vec sum = sum_each(p.dot);
  (kFirst ? sum : sum + Vec::load(p.out, p.count)).store(p.out, p.count);
}

template <bool kFirst>
SK_INLINE void sddmm_run(int32_t count, const uint16_t* offsets, const float* grad_row,
                         const float* panel, PendingDots& pending) {
  constexpr int R = kSddmmVectors;
  constexpr int64_t P = R * Vec::N;
  Vec g[R];
  for (int j = 0; j < R; ++j) g[j] = Vec::load(grad_row + j * Vec::N);
  for (int32_t i = 0; i < count; ++i) {
    const float* x = panel + offsets[i] * P;
    asm("" : "+r"(x));
    Vec s0 = g[0] * Vec::load(x), s1 = g[1] * Vec::load(x + Vec::N);
    for (int j = 2; j < R; j += 2) {
      s0 = fma(g[j], Vec::load(x + j * Vec::N), s0);
      s1 = fma(g[j + 1], Vec::load(x + (j + 1) * Vec::N), s1);
    }
    pending.dot[pending.count] = s0 + s1;
    if (++pending.count == Vec::N) {
      const Vec sum = sum_each(pending.dot);
      (kFirst ? sum : sum + Vec::load(pending.out)).store(pending.out);
      pending.out += Vec::N;
      pending.count = 0;
    }
  }
}

template <bool kFirst>
void sddmm_group(const SddmmArgs& a, int64_t group, const float* grad) {
  const PlanView& plan = a.plan;
  const int32_t first = plan.value_start[group];
  const uint16_t* offsets = plan.offsets + first;
  PendingDots pending;
  pending.out = a.out + first;
  const Run* end = plan.runs + plan.run_start[group + 1];
  for (const Run* r = plan.runs + plan.run_start[group]; r < end; ++r) {
    const float* next = grad + r[1].row * kSddmmVectors * Vec::N;
    for (int j = 0; j < kSddmmVectors; ++j) __builtin_prefetch(next + j * Vec::N);
    sddmm_run<kFirst>(r->count, offsets, grad + r->row * kSddmmVectors * Vec::N, a.scratch,
                      pending);
    offsets += r->count;
  }
  flush<kFirst>(pending);
}

// Panels of tokens outside: the rows of the gradient of one row block then stay in the L2 cache for
// all blocks of columns.
void sddmm(const SddmmArgs& a) {
  constexpr int64_t P = kSddmmVectors * Vec::N;
  const PlanView& plan = a.plan;
  for (int64_t t = 0, p = 0; t < a.tokens; t += P, ++p) {
    const int64_t t1 = t + P < a.tokens ? t + P : a.tokens;
    const float* grad = a.grad_panels + p * a.grad_panel_stride;
    for (int64_t k = a.col_block_begin; k < a.col_block_end; ++k) {
      const int64_t c0 = k * plan.col_block;
      const int64_t c1 = c0 + plan.col_block < plan.cols ? c0 + plan.col_block : plan.cols;
      fill_panel(a.source, a.scratch, kSddmmVectors, t, t1, c0, c1);
      const int64_t group = a.row_block * plan.n_col_blocks + k;
      (t == 0 ? sddmm_group<true> : sddmm_group<false>)(a, group, grad);
    }
  }
}

}  // namespace
}  // namespace sparsekern
