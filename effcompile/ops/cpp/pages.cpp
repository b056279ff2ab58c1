// Pages of keys for one query on CPU: their scores in one pass over the keys, and attention over the pages that were chosen.
// effcompile/ops/native.py compiles this once and calls it. A step of decode is bound by what it reads: no key is copied, pages that
// nobody may read are not touched. No result depends on the number of threads.

namespace {

struct Pages {
  int64_t batch, heads, kv_heads, columns, depth, width, page;
  int64_t q_stride[2], k_stride[3], v_stride[3];  // batch, head, position; the last dimension is contiguous
  int64_t map_batch, map_heads, pad_batch, limit_batch, budget, local, threads;
  int64_t pages;
  const uint8_t* asked;  // [map_batch, map_heads, pages]: pages to attend to
  const uint8_t* pad;    // [pad_batch, columns]: keys that count, or null
  const int32_t* first;  // [limit_batch]: least kept key, or null
  const int32_t* last;   // [limit_batch]: largest kept key, or null
  float scale;
};

inline Vec load_wide(const float* p) { return Vec::loadu(p); }
inline Vec load_wide(const at::BFloat16* p) {
  Vec out;
  at::vec::load_fp32_from_bf16(p, out);
  return out;
}
inline Vec load_wide(const at::Half* p) {
  Vec out;
  at::vec::load_fp32_from_fp16(p, out);
  return out;
}

// `count` values as floats, with zeros to a whole number of vectors.
template <typename S>
inline void widen(const S* from, int64_t count, float* to) {
  int64_t d = 0;
  for (; d + W <= count; d += W) load_wide(from + d).store(to + d);
  if (d < count) {
    std::fill(to + d, to + d + W, 0.f);
    for (; d < count; ++d) to[d] = static_cast<float>(from[d]);
  }
}

inline float dot(const float* x, const float* y, int64_t wide) {
  Vec sum(0.f);
  for (int64_t d = 0; d < wide; d += W) sum = at::vec::fmadd(Vec::loadu(x + d), Vec::loadu(y + d), sum);
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
}

// --- the choice of pages --------------------------------------------------------------------------------------------------------

// What a query of sequence b may read: pages that may hold a key of it, and those of them that stay whatever they score.
struct Allowed {
  std::vector<uint8_t> some, forced;
  int64_t free = 0, left = 0;  // pages to choose from, and how many of them the budget leaves room for
};

Allowed allowed_of(const Pages& p, int64_t b) {
  Allowed found;
  found.some.assign(p.pages, 0);
  found.forced.assign(p.pages, 0);
  const int64_t low = p.first ? p.first[b % p.limit_batch] : 0, high = p.last ? p.last[b % p.limit_batch] : p.columns;
  const uint8_t* pad = p.pad ? p.pad + (b % p.pad_batch) * p.columns : nullptr;
  int64_t first = -1, last = -1;
  for (int64_t n = 0; n < p.pages; ++n) {
    const int64_t begin = n * p.page, end = std::min(p.columns, begin + p.page);
    if (begin > high || end - 1 < low || (pad && !std::any_of(pad + begin, pad + end, [](uint8_t x) { return x != 0; }))) continue;
    found.some[n] = 1;
    first = first < 0 ? n : first;
    last = n;
    if (p.last && end - 1 > high) found.forced[n] = 1;
  }
  if (first < 0) return found;
  found.forced[first] = 1;
  for (int64_t n = std::max<int64_t>(0, last - p.local + 1); n <= last; ++n) found.forced[n] = found.some[n];
  int64_t kept = 0;
  for (int64_t n = 0; n < p.pages; ++n) {
    kept += found.forced[n];
    found.free += found.some[n] && !found.forced[n];
  }
  found.left = std::max<int64_t>(0, p.budget - kept);
  return found;
}

// The mean query of a group times the mean key of a page; or, of each query, a bound from the least and the largest key.
template <typename S>
void score_page(const Pages& p, const S* keys, const uint8_t* pad, int64_t page, const float* queries, bool bound, float* low,
                float* high, float* key, float* out) {
  const int64_t wide = up(p.depth, W), group = p.heads / p.kv_heads;
  const int64_t begin = page * p.page, end = std::min(p.columns, begin + p.page);
  int64_t count = 0;
  std::fill(low, low + wide, bound ? -NEG : 0.f);
  std::fill(high, high + wide, NEG);
  for (int64_t j = begin; j < end; ++j) {
    if (pad && !pad[j]) continue;
    ++count;
    widen(keys + j * p.k_stride[2], p.depth, key);
    for (int64_t d = 0; d < wide; d += W) {
      const Vec x = Vec::loadu(key + d), least = Vec::loadu(low + d);
      if (bound) {
        at::vec::minimum(least, x).store(low + d);
        at::vec::maximum(Vec::loadu(high + d), x).store(high + d);
      } else {
        (least + x).store(low + d);
      }
    }
  }
  if (!bound) {
    std::fill(out, out + group, dot(queries, low, wide) / static_cast<float>(count));
    return;
  }
  const Vec zero(0.f);
  for (int64_t i = 0; i < group; ++i) {
    Vec sum(0.f);
    for (int64_t d = 0; d < wide; d += W) {
      const Vec x = Vec::loadu(queries + i * wide + d);
      sum = at::vec::fmadd(at::vec::maximum(x, zero), Vec::loadu(high + d), sum);
      sum = at::vec::fmadd(at::vec::minimum(x, zero), Vec::loadu(low + d), sum);
    }
    out[i] = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum);
  }
}

template <typename S>
void choose(const Pages& p, const void* q_, const void* k_, bool bound, uint8_t* out) {
  const S *q = static_cast<const S*>(q_), *k = static_cast<const S*>(k_);
  const int64_t wide = up(p.depth, W), group = p.heads / p.kv_heads, leads = p.batch * p.kv_heads;
  constexpr int64_t each = 16;  // pages at a time
  const int64_t tasks = (p.pages + each - 1) / each;
  std::vector<Allowed> allowed;
  for (int64_t b = 0; b < p.batch; ++b) allowed.push_back(allowed_of(p, b));
  std::vector<float> scores(leads * p.pages * group, NEG);  // a page's scores for a group of heads lie side by side
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<float> queries(group * wide), low(wide), high(wide), key(wide);
#pragma omp for schedule(static) collapse(2)
    for (int64_t lead = 0; lead < leads; ++lead) {
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t b = lead / p.kv_heads, g = lead % p.kv_heads;
        const Allowed& mine = allowed[b];
        if (mine.free <= mine.left || mine.left == 0) continue;  // all of them, or none: no key has to be read
        for (int64_t i = 0; i < group; ++i)
          widen(q + b * p.q_stride[0] + (g * group + i) * p.q_stride[1], p.depth, queries.data() + i * wide);
        if (!bound) {
          for (int64_t i = 1; i < group; ++i)
            for (int64_t d = 0; d < wide; ++d) queries[d] += queries[i * wide + d];
          for (int64_t d = 0; d < wide; ++d) queries[d] /= static_cast<float>(group);
        }
        const uint8_t* pad = p.pad ? p.pad + (b % p.pad_batch) * p.columns : nullptr;
        const S* keys = k + b * p.k_stride[0] + g * p.k_stride[1];
        for (int64_t n = task * each; n < std::min(p.pages, (task + 1) * each); ++n) {
          if (!mine.some[n] || mine.forced[n]) continue;
          float* row = scores.data() + (lead * p.pages + n) * group;
          score_page(p, keys, pad, n, queries.data(), bound, low.data(), high.data(), key.data(), row);
          for (int64_t i = 0; i < group; ++i) row[i] = std::isnan(row[i]) ? NEG : row[i];  // NaN has no place in an order
        }
      }
    }
    std::vector<int32_t> order;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < p.batch * p.heads; ++at) {
      const int64_t b = at / p.heads, h = at % p.heads;
      const Allowed& mine = allowed[b];
      uint8_t* map = out + at * p.pages;
      std::copy(mine.forced.begin(), mine.forced.end(), map);
      const float* row = scores.data() + (b * p.kv_heads + h / group) * p.pages * group + h % group;
      order.clear();
      for (int64_t n = 0; n < p.pages; ++n)
        if (mine.some[n] && !mine.forced[n]) order.push_back(static_cast<int32_t>(n));
      const int64_t left = std::min<int64_t>(mine.left, order.size());
      if (left < static_cast<int64_t>(order.size()))
        std::nth_element(order.begin(), order.begin() + left, order.end(), [&](int32_t x, int32_t y) {
          const float a = row[x * group], b = row[y * group];
          return a > b || (a == b && x < y);  // ties go to the earlier page
        });
      for (int64_t n = 0; n < left; ++n) map[order[n]] = 1;
    }
  }
}

// --- attention over pages -------------------------------------------------------------------------------------------------------

const uint8_t* asked_of(const Pages& p, int64_t b, int64_t h) {
  return p.asked + ((b % p.map_batch) * p.map_heads + h * p.map_heads / p.heads) * p.pages;
}

bool wanted(const Pages& p, int64_t b, int64_t g, int64_t page) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t h = g * group; h < (g + 1) * group; ++h)
    if (asked_of(p, b, h)[page]) return true;
  return false;
}

// Parts of some pages each are computed alone, with their maximum and sum, and put together in order.
template <typename S>
void attend(const Pages& p, const void* q_, const void* k_, const void* v_, void* out_, float* lse) {
  const S *q = static_cast<const S*>(q_), *k = static_cast<const S*>(k_), *v = static_cast<const S*>(v_);
  S* out = static_cast<S*>(out_);
  const int64_t deep = up(p.depth, W), wide = up(p.width, W), group = p.heads / p.kv_heads, leads = p.batch * p.kv_heads;
  const int64_t each = std::max<int64_t>(1, 512 / p.page);  // pages of a part: what does not depend on the threads
  // The pages that some head of a group reads, in order.
  std::vector<std::vector<int32_t>> lists(leads);
  int64_t parts = 1;
  for (int64_t lead = 0; lead < leads; ++lead) {
    for (int64_t page = 0; page < p.pages; ++page)
      if (wanted(p, lead / p.kv_heads, lead % p.kv_heads, page)) lists[lead].push_back(static_cast<int32_t>(page));
    parts = std::max<int64_t>(parts, (static_cast<int64_t>(lists[lead].size()) + each - 1) / each);
  }
  std::vector<float> sums(leads * parts * group * wide, 0.f), tops(leads * parts * group, NEG), totals(leads * parts * group, 0.f);
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<float> queries(group * deep), key(deep), value(wide), scores(group * each * p.page);
#pragma omp for schedule(static) collapse(2)
    for (int64_t lead = 0; lead < leads; ++lead) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t b = lead / p.kv_heads, g = lead % p.kv_heads;
        const auto& list = lists[lead];
        const int64_t begin = part * each, end = std::min<int64_t>(list.size(), begin + each);
        if (begin >= end) continue;
        const uint8_t* pad = p.pad ? p.pad + (b % p.pad_batch) * p.columns : nullptr;
        const int64_t low = p.first ? p.first[b % p.limit_batch] : 0;
        const int64_t high = p.last ? std::min<int64_t>(p.columns - 1, p.last[b % p.limit_batch]) : p.columns - 1;
        for (int64_t i = 0; i < group; ++i)
          widen(q + b * p.q_stride[0] + (g * group + i) * p.q_stride[1], p.depth, queries.data() + i * deep);
        const int64_t slots = (end - begin) * p.page;
        std::fill(scores.begin(), scores.end(), NEG);
        float* top = tops.data() + (lead * parts + part) * group;
        for (int64_t n = begin; n < end; ++n) {
          const int64_t from = list[n] * p.page;
          for (int64_t j = from; j < std::min(p.columns, from + p.page); ++j) {
            if (j < low || j > high || (pad && !pad[j])) continue;
            widen(k + b * p.k_stride[0] + g * p.k_stride[1] + j * p.k_stride[2], p.depth, key.data());
            for (int64_t i = 0; i < group; ++i) {
              if (!asked_of(p, b, g * group + i)[list[n]]) continue;
              const float s = dot(queries.data() + i * deep, key.data(), deep) * p.scale;
              scores[i * slots + (n - begin) * p.page + j - from] = s;
              top[i] = std::max(top[i], s);
            }
          }
        }
        for (int64_t i = 0; i < group; ++i) {
          float* row = scores.data() + i * slots;
          float total = 0.f;
          const Vec shift(top[i] == NEG ? 0.f : top[i]);
          int64_t j = 0;
          for (; j + W <= slots; j += W) (Vec::loadu(row + j) - shift).exp().store(row + j);
          for (; j < slots; ++j) row[j] = std::exp(row[j] - (top[i] == NEG ? 0.f : top[i]));
          for (j = 0; j < slots; ++j) total += row[j];
          totals[(lead * parts + part) * group + i] = total;
        }
        float* sum = sums.data() + (lead * parts + part) * group * wide;
        for (int64_t n = begin; n < end; ++n) {
          const int64_t from = list[n] * p.page;
          for (int64_t j = from; j < std::min(p.columns, from + p.page); ++j) {
            if (j < low || j > high || (pad && !pad[j])) continue;
            widen(v + b * p.v_stride[0] + g * p.v_stride[1] + j * p.v_stride[2], p.width, value.data());
            for (int64_t i = 0; i < group; ++i) {
              const Vec x(scores[i * slots + (n - begin) * p.page + j - from]);
              for (int64_t d = 0; d < wide; d += W)
                at::vec::fmadd(x, Vec::loadu(value.data() + d), Vec::loadu(sum + i * wide + d)).store(sum + i * wide + d);
            }
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < leads * group; ++n) {
      const int64_t lead = n / group, i = n % group;
      float top = NEG, total = 0.f;
      for (int64_t part = 0; part < parts; ++part) top = std::max(top, tops[(lead * parts + part) * group + i]);
      std::fill(value.begin(), value.end(), 0.f);
      for (int64_t part = 0; part < parts && top != NEG; ++part) {
        const int64_t at = (lead * parts + part) * group + i;
        if (tops[at] == NEG) continue;
        const float by = std::exp(tops[at] - top);
        total += by * totals[at];
        for (int64_t d = 0; d < p.width; ++d) value[d] += by * sums[at * wide + d];
      }
      for (int64_t d = 0; d < p.width; ++d) out[n * p.width + d] = static_cast<S>(total > 0.f ? value[d] / total : 0.f);
      lse[n] = total > 0.f ? top + std::log(total) : NEG;
    }
  }
}

Pages problem(const int64_t* sizes, const void* const* pointers) {
  Pages p{};
  int64_t at = 0;
  for (int64_t* field : {&p.batch, &p.heads, &p.kv_heads, &p.columns, &p.depth, &p.width, &p.page}) *field = sizes[at++];
  for (int i = 0; i < 2; ++i) p.q_stride[i] = sizes[at++];
  for (int64_t* stride : {p.k_stride, p.v_stride})
    for (int i = 0; i < 3; ++i) stride[i] = sizes[at++];
  for (int64_t* field : {&p.map_batch, &p.map_heads, &p.pad_batch, &p.limit_batch, &p.budget, &p.local, &p.threads}) *field = sizes[at++];
  p.pages = (p.columns + p.page - 1) / p.page;
  p.asked = static_cast<const uint8_t*>(pointers[3]);
  p.pad = static_cast<const uint8_t*>(pointers[4]);
  p.first = static_cast<const int32_t*>(pointers[5]);
  p.last = static_cast<const int32_t*>(pointers[6]);
  return p;
}

}  // namespace

// dtype: 0 float, 1 bfloat16, 2 half; `bound` 0 scores pages by their mean. pointers: q, k, null, null, pad, first, last, and the map
// [batch, heads, pages] that is written.
extern "C" void eff_choose_pages(int64_t dtype, const int64_t* sizes, const void* const* pointers, float bound) {
  const Pages p = problem(sizes, pointers);
  uint8_t* out = static_cast<uint8_t*>(const_cast<void*>(pointers[7]));
  auto run = dtype == 0 ? choose<float> : dtype == 1 ? choose<at::BFloat16> : choose<at::Half>;
  run(p, pointers[0], pointers[1], bound != 0.f, out);
}

// pointers: q, k, v, asked, pad, first, last, out [batch, heads, width], lse float [batch, heads].
extern "C" void eff_page_attention(int64_t dtype, const int64_t* sizes, const void* const* pointers, float scale) {
  Pages p = problem(sizes, pointers);
  p.scale = scale;
  auto run = dtype == 0 ? attend<float> : dtype == 1 ? attend<at::BFloat16> : attend<at::Half>;
  run(p, pointers[0], pointers[1], pointers[2], const_cast<void*>(pointers[7]), static_cast<float*>(const_cast<void*>(pointers[8])));
}
