// int8 values with a float32 scale per row, spread to float32.
namespace sparsekern {
namespace {

SK_INLINE void spread(const int8_t* values, float scale, int64_t n, float* out) {
  const Vec s = Vec::set(scale);
  int64_t i = 0;
  for (; i + Vec::N <= n; i += Vec::N) (s * Vec::load_int8(values + i, Vec::N)).store(out + i);
  if (i < n) (s * Vec::load_int8(values + i, n - i)).store(out + i, n - i);
}

void pack_int8(const PlanView& plan, const int8_t* values, const float* scales, float* out,
               int64_t group_begin, int64_t group_end) {
  float* p = out + plan.value_start[group_begin];
  const Run* end = plan.runs + plan.run_start[group_end];
  for (const Run* run = plan.runs + plan.run_start[group_begin]; run < end; ++run) {
    __builtin_prefetch(values + run[kPackAhead].start);
    spread(values + run->start, scales[run->row], run->count, p);
    p += run->count;
  }
}

void spread_int8(const int32_t* crow, const int8_t* values, const float* scales, float* out,
                 int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    spread(values + crow[r], scales[r], crow[r + 1] - crow[r], out + crow[r]);
}

}  // namespace
}  // namespace sparsekern
