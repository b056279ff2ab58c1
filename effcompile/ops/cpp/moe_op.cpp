// The way from torch's dispatcher to the kernel of moe.cpp, without Python: a step of a few tokens takes as long as a cold interpreter
// needs for the checks. effcompile/ops/native_moe.py compiles this with torch's headers and hands over the kernel's address.
//
// Operands that the kernel reads as they are go to it. All others, wrong ones above all, go to the body in Python, by way of the op
// eff::moe_blocks_v1, which means the same.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string_view>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Body = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Tensor&, const Maybe&, std::string_view,
                    std::string_view, bool, std::string_view, double, double, double);
using Kernel = void(int64_t, const int64_t*, const void* const*, float, float, float);

Kernel* kernel = nullptr;

// Numbered as in moe.cpp; -1 for what it does not know.
template <size_t N>
int64_t number(std::string_view word, const std::array<const char*, N>& words) {
  for (size_t i = 0; i < N; ++i)
    if (word == words[i]) return static_cast<int64_t>(i);
  return -1;
}

const std::array<const char*, 6> ACTS{"silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"};
const std::array<const char*, 3> LAYOUTS{"none", "concat", "interleaved"};
const std::array<const char*, 2> SIDES{"out", "in"};

int64_t dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return 0;
    case at::kBFloat16: return 1;
    case at::kHalf: return 2;
    default: return -1;
  }
}

bool weight(const Tensor& w, const Tensor& x, int64_t experts, int64_t outputs, int64_t inputs, bool transposed) {
  return w.dim() == 3 && w.device().is_cpu() && w.scalar_type() == x.scalar_type() && w.size(0) == experts &&
         w.size(transposed ? 2 : 1) == outputs && w.size(transposed ? 1 : 2) == inputs && w.stride(2) == 1;
}

bool bias(const Maybe& b, const Tensor& x, int64_t experts, int64_t outputs) {
  return !b || (b->dim() == 2 && b->device().is_cpu() && b->scalar_type() == x.scalar_type() && b->size(0) == experts &&
                b->size(1) == outputs && b->is_contiguous());
}

Tensor experts_of(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1, const Maybe& b1, const Tensor& w2,
                  const Maybe& b2, std::string_view act, std::string_view layout, bool transposed, std::string_view side, double alpha,
                  double beta, double limit) {
  const int64_t dtype = dtype_of(x), gate = number(act, ACTS), halves = number(layout, LAYOUTS), input = number(side, SIDES);
  bool fits = dtype >= 0 && gate >= 0 && halves >= 0 && input >= 0 && x.dim() == 2 && ids.dim() == 2 && w2.dim() == 3;
  if (fits) {
    const int64_t tokens = x.size(0), hidden = x.size(1), top_k = ids.size(1), experts = w2.size(0), inner = w2.size(transposed ? 1 : 2);
    const int64_t wide = halves ? 2 * inner : inner;
    fits = x.is_contiguous() && ids.device().is_cpu() && ids.scalar_type() == at::kLong && ids.is_contiguous() && ids.size(0) == tokens &&
           top_k <= experts && weights.device().is_cpu() && weights.sizes() == ids.sizes() && weights.is_floating_point() &&
           weight(w1, x, experts, wide, hidden, transposed) && weight(w2, x, experts, hidden, inner, transposed) &&
           bias(b1, x, experts, wide) && bias(b2, x, experts, hidden);
    if (fits) {
      Tensor out = at::empty_like(x);
      if (out.numel() == 0) return out;
      const Tensor share = weights.to(at::kFloat).contiguous();
      const std::array<int64_t, 16> sizes{tokens, top_k, experts, hidden, inner, gate, halves, input, transposed, transposed,
                                          at::get_num_threads(), w1.stride(0), w1.stride(1), w2.stride(0), w2.stride(1), 0};
      const std::array<const void*, 9> pointers{x.const_data_ptr(), ids.const_data_ptr(), share.const_data_ptr(), w1.const_data_ptr(),
                                                b1 ? b1->const_data_ptr() : nullptr, w2.const_data_ptr(),
                                                b2 ? b2->const_data_ptr() : nullptr, out.mutable_data_ptr(), nullptr};
      kernel(dtype, sizes.data(), pointers.data(), static_cast<float>(alpha), static_cast<float>(beta), static_cast<float>(limit));
      return out;
    }
  }
  static const auto body = c10::Dispatcher::singleton().findSchemaOrThrow("eff::moe_blocks_v1", "").typed<Body>();
  return body.call(x, ids, weights, w1, b1, w2, b2, act, layout, transposed, side, alpha, beta, limit);
}

}  // namespace

// Make the kernel at an address the implementation of eff::moe_v1 on CPU, for as long as the process runs.
extern "C" void eff_moe_join(void* address) {
  kernel = reinterpret_cast<Kernel*>(address);
  static torch::Library* joined = [] {
    auto* made = new torch::Library(torch::Library::IMPL, "eff", c10::DispatchKey::CPU, __FILE__, __LINE__);
    made->impl("moe_v1", experts_of);
    return made;
  }();
  (void)joined;
}
