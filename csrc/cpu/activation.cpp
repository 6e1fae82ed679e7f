// The element-wise middle of a feed-forward block, forward and backward.
//   out = act(x), or gated out = act(gate) · up of the halves of a row
//   d_x = grad · act′(x);  d_gate = grad · up · act′(gate),  d_up = grad · act(gate)
// and dropout of `out`, in backward of `grad`, run by run while it is in L1; with no activation
// that is all there is to do. One thread owns a run of whole rows; contiguous rows without halves
// are one row, of which each thread has a run of columns. Backward makes act and act′ from the same
// exponential. Bound by memory; by arithmetic in cache. Sources: GELU: Hendrycks and Gimpel, 2016
// (arXiv:1606.08415); gates: Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202).
#include "params/activation.h"

#include "cpu/columns.h"
#include "cpu/dropout.h"
#include "cpu/linear_epilogue.h"
#include "cpu/parallel.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it gives

constexpr float kInverseSqrtTwoPi = 0.3989422804014327f;
constexpr float kTwiceSqrtTwoOverPi = 1.5957691216057308f;
constexpr float kGeluCubic = 0.044715f;
constexpr float kFlatSquare = 400.f;  // of x, where gelu_tanh is 0 or x long since

struct ValueAndSlope {
  vf value, slope;
};

// act(x) and act′(x), also where x² is infinite; an infinite x gives a slope of NaN, as in torch.
template <Activation kActivation, class T>
FT_INLINE ValueAndSlope value_and_slope(vf x) {
  const vf one = splat(1.f);
  if constexpr (kActivation == Activation::silu) {
    const vf s = sigmoid(x), value = x * s;
    return {value, fma(value, one - s, s)};
  } else if constexpr (kActivation == Activation::gelu) {
    const vf tail = normal_tail<T>(x), phi = select(x < zero(), tail, one - tail);
    const vf density = exp2_for<T>(x * x * splat(-0.5f * kLog2E)) * splat(kInverseSqrtTwoPi);
    return {gelu_of_tail(x, tail), fma(x, density, phi)};
  } else if constexpr (kActivation == Activation::gelu_tanh) {  // x · sigmoid(2u)
    const vf square = x * x;
    // Of sigmoid(z) and 1 − sigmoid(z) the smaller one by the exponential: a difference from 1
    // would lose it, and the slope multiplies it by up to x³.
    const vf z = fma(square, splat(kGeluCubic), one) * x * splat(kTwiceSqrtTwoOverPi);
    const vf e = exp(min(z, zero() - z)), larger = one / (one + e), smaller = e * larger;
    const vf s = select(z < zero(), smaller, larger), rest = select(z < zero(), larger, smaller);
    const vf bounded = min(splat(kFlatSquare), square);
    const vf inner = fma(bounded, splat(3.f * kGeluCubic), one) * splat(kTwiceSqrtTwoOverPi);
    const vf value = x * s;
    return {value, fma(value * rest, inner, s)};
  } else {
    return {relu(x), select(x <= zero(), zero(), one)};
  }
}

// f of each vector, or of each of a pair's.
template <class F>
FT_INLINE vf each(const F& f, vf a, vf b, vf c) {
  return f(a, b, c);
}
template <class F>
FT_INLINE vf2 each(const F& f, vf2 a, vf2 b, vf2 c) {
  return {f(a.even, b.even, c.even), f(a.odd, b.odd, c.odd)};
}

template <Activation kActivation, bool Gated, class T>
void row(const T* x, const T* up, int64_t n, T* out) {
  over_columns<2, T>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    const auto xj = load(x + j, part);
    if constexpr (Gated) {
      const auto f = [](vf a, vf b, vf)
                         __attribute__((always_inline)) { return activate<T>(kActivation, a) * b; };
      store(out + j, each(f, xj, load(up + j, part), xj), part);
    } else {
      const auto f = [](vf a, vf, vf)
                         __attribute__((always_inline)) { return activate<T>(kActivation, a); };
      store(out + j, each(f, xj, xj, xj), part);
    }
  });
}

// Of a relu the gradient passes as it is, where a product with 0 would make NaN of an infinite one.
template <Activation kActivation, bool Gated, class T>
void grad_row(const T* x, const T* up, const T* g, int64_t n, T* dx, T* d_up) {
  over_columns<2, T>(n, [&](int64_t j, int, auto part) __attribute__((always_inline)) {
    const auto xj = load(x + j, part), gj = load(g + j, part);
    if constexpr (Gated) {
      const auto upj = load(up + j, part);
      const auto by_gate = [](vf a, vf b, vf c) __attribute__((always_inline)) {
        return c * b * value_and_slope<kActivation, T>(a).slope;
      };
      const auto by_up = [](vf a, vf, vf c) __attribute__((always_inline)) {
        return c * value_and_slope<kActivation, T>(a).value;
      };
      store(dx + j, each(by_gate, xj, upj, gj), part);
      store(d_up + j, each(by_up, xj, upj, gj), part);
    } else {
      const auto f = [](vf a, vf, vf c) __attribute__((always_inline)) {
        if constexpr (kActivation == Activation::relu) return select(a <= zero(), zero(), c);
        return c * value_and_slope<kActivation, T>(a).slope;
      };
      store(dx + j, each(f, xj, xj, gj), part);
    }
  });
}

// Calls f.template operator()<T, activation>().
template <class F>
void with_kind(const ActivationParams& p, const F& f) {
  with_type(p.dtype, [&]<class T>() {
    with_activation(p.activation,
                    [&]<Activation activation>() { f.template operator()<T, activation>(); });
  });
}

// Calls f(row, first, last) for runs of columns [first, last) of rows, each run on one thread.
template <class F>
void over_rows(const ActivationParams& p, bool contiguous, const F& f) {
  const auto columns = [&](int64_t r, int64_t first, int64_t last) {
    if (!p.dropout.on()) return f(r, first, last);
    for (int64_t j = first; j < last; j += kDropoutRun) {
      f(r, j, j + kDropoutRun < last ? j + kDropoutRun : last);
    }
  };
  if (contiguous && !p.gated && p.row_stride == p.features) {
    parallel_for(p.rows * p.features, kGrain,
                 [&](int64_t begin, int64_t end) { columns(0, begin, end); });
    return;
  }
  parallel_for(p.rows, kGrain / (p.features + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) columns(r, 0, p.features);
  });
}

}  // namespace

void activation(const ActivationParams& p) {
  with_kind(p, [&]<class T, Activation kActivation>() {
    over_rows(p, true, [&](int64_t r, int64_t first, int64_t last) {
      const T* x = static_cast<const T*>(p.input) + r * p.row_stride + first;
      T* out = static_cast<T*>(p.output) + r * p.features + first;
      if (p.gated) {
        row<kActivation, true>(x, x + p.features, last - first, out);
      } else if (kActivation != Activation::none || !p.dropout.on()) {
        row<kActivation, false>(x, x, last - first, out);
      }
      if (!p.dropout.on()) return;
      const uint64_t position = static_cast<uint64_t>(r * p.features + first);
      drop(kActivation == Activation::none ? x : out, last - first, position, p.dropout, out);
    });
  });
}

void activation_backward(const ActivationBackwardParams& params) {
  const ActivationParams& p = params.forward;
  with_kind(p, [&]<class T, Activation kActivation>() {
    over_rows(p, params.grad_stride == p.features, [&](int64_t r, int64_t first, int64_t last) {
      const T* x = static_cast<const T*>(p.input) + r * p.row_stride + first;
      const T* g = static_cast<const T*>(params.grad) + r * params.grad_stride + first;
      T* dx = static_cast<T*>(params.d_input) + r * p.features * (p.gated ? 2 : 1) + first;
      T dropped_grad[kDropoutRun];
      if (p.dropout.on()) {
        T* to = kActivation == Activation::none ? dx : dropped_grad;
        drop(g, last - first, static_cast<uint64_t>(r * p.features + first), p.dropout, to);
        g = to;
      }
      if (p.gated) {
        grad_row<kActivation, true>(x, x + p.features, g, last - first, dx, dx + p.features);
      } else if (kActivation != Activation::none) {
        grad_row<kActivation, false>(x, x, g, last - first, dx, dx);
      } else if (!p.dropout.on()) {
        std::memcpy(dx, g, sizeof(T) * static_cast<size_t>(last - first));
      }
    });
  });
}

}  // namespace ft::FT_ISA
