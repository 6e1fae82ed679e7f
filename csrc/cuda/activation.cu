// The element-wise middle of a feed-forward block, forward and backward.
//   out = act(x), or gated out = act(gate) · up with [gate, up] the halves of a row
// and dropout of `out`, in backward of the gradient.
// A thread owns kBatch 16-byte chunks of the output, loads all of them and then works on them.
// Which activation it is is a run-time value, asked once per chunk. Limited by memory (a gelu of 16
// bits comes close to the issue rate): forward reads the input and writes the output, 2 or gated 3
// numbers an element; backward 3 or gated 5. Sources: GELU: Hendrycks and Gimpel, 2016
// (arXiv:1606.08415); gates: Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202).
#include "cuda/device/activation.h"
#include "cuda/device/dropout.h"
#include "cuda/device/index.h"
#include "cuda/device/launch.h"
#include "params/activation.h"

namespace ft::cuda {
namespace {

// Not measured: no GPU was at hand.
constexpr int kBlock = 256;
constexpr int kBatch = 2;  // chunks of the output per thread: 32 to 96 bytes of loads in flight

struct Args {
  ActivationBackwardParams p;  // of a forward pass: `forward` alone
  int64_t chunks;              // of a row
};

// Calls f with the activation as a constant, so that the loop over a chunk asks nothing.
template <class F>
FT_DEVICE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return f.template operator()<Activation::gelu_tanh>();
    case Activation::silu: return f.template operator()<Activation::silu>();
    default: return f.template operator()<Activation::none>();
  }
}

// Where a chunk of the output is, and its input row.
template <class T>
struct Place {
  int64_t row, column;
  const T* input;
  bool aligned, other_aligned;  // the halves of the input row
};

template <class T>
FT_DEVICE Place<T> locate(const Args& a, int64_t chunk) {
  const ActivationParams& p = a.p.forward;
  Place<T> at;
  at.row = chunk;
  at.column = divide(at.row, a.chunks) * kLanes<T>;
  at.input = static_cast<const T*>(p.input) + at.row * p.row_stride;
  at.aligned = is_aligned(at.input);
  at.other_aligned = is_aligned(at.input + p.features);
  return at;
}

template <class T, bool kGated>
FT_GLOBAL void __launch_bounds__(kBlock, 3) activation_forward(const Args a) {
  const ActivationParams& p = a.p.forward;
  const int64_t items = p.rows * a.chunks;
  const uint64_t seed = seed_of(p.dropout);
  for (int64_t first = blockIdx.x * int64_t{kBlock * kBatch} + threadIdx.x; first < items;
       first += gridDim.x * int64_t{kBlock * kBatch}) {
    Chunk x[kBatch], up[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * kBlock >= items) continue;
      const Place<T> at = locate<T>(a, first + k * kBlock);
      x[k] = load_chunk(at.input, at.column, p.features, at.aligned);
      if (kGated)
        up[k] = load_chunk(at.input + p.features, at.column, p.features, at.other_aligned);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * kBlock >= items) continue;
      float v[kLanes<T>], u[kLanes<T>];
      unpack<T>(x[k], v);
      if (kGated) unpack<T>(up[k], u);
      with_activation(p.activation, [&]<Activation kActivation>() {
#pragma unroll
        for (int i = 0; i < kLanes<T>; ++i) {
          v[i] = activate(kActivation, v[i]);
          if (kGated) v[i] *= u[i];
        }
      });
      const Place<T> at = locate<T>(a, first + k * kBlock);
      drop(p.dropout, seed, at.row * p.features + at.column, v);
      T* out = static_cast<T*>(p.output) + at.row * p.features;
      store_chunk(out, at.column, p.features, is_aligned(out), pack<T>(v));
    }
  }
}

template <class T, bool kGated>
FT_GLOBAL void __launch_bounds__(kBlock, 3) activation_gradients(const Args a) {
  const ActivationParams& p = a.p.forward;
  const int64_t items = p.rows * a.chunks;
  const uint64_t seed = seed_of(p.dropout);
  for (int64_t first = blockIdx.x * int64_t{kBlock * kBatch} + threadIdx.x; first < items;
       first += gridDim.x * int64_t{kBlock * kBatch}) {
    Chunk x[kBatch], up[kBatch], g[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * kBlock >= items) continue;
      const Place<T> at = locate<T>(a, first + k * kBlock);
      const T* grad = static_cast<const T*>(a.p.grad) + at.row * a.p.grad_stride;
      g[k] = load_chunk(grad, at.column, p.features, is_aligned(grad));
      x[k] = load_chunk(at.input, at.column, p.features, at.aligned);
      if (kGated)
        up[k] = load_chunk(at.input + p.features, at.column, p.features, at.other_aligned);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * kBlock >= items) continue;
      float v[kLanes<T>], u[kLanes<T>], d[kLanes<T>];
      unpack<T>(x[k], v);
      unpack<T>(g[k], d);
      if (kGated) unpack<T>(up[k], u);
      const Place<T> at = locate<T>(a, first + k * kBlock);
      drop(p.dropout, seed, at.row * p.features + at.column, d);
      with_activation(p.activation, [&]<Activation kActivation>() {
#pragma unroll
        for (int i = 0; i < kLanes<T>; ++i) {
          const float slope = d[i] * activation_derivative(kActivation, v[i]);
          if (kGated) {
            d[i] *= activate(kActivation, v[i]);
            v[i] = slope * u[i];
          } else {
            v[i] = slope;
          }
        }
      });
      T* out = static_cast<T*>(a.p.d_input) + at.row * p.features * (kGated ? 2 : 1);
      store_chunk(out, at.column, p.features, is_aligned(out), pack<T>(v));
      if (!kGated) continue;
      store_chunk(out + p.features, at.column, p.features, is_aligned(out + p.features),
                  pack<T>(d));
    }
  }
}

// Contiguous rows without halves are one row.
void join_rows(ActivationBackwardParams& p, bool grad_contiguous) {
  ActivationParams& f = p.forward;
  if (f.gated || f.row_stride != f.features || !grad_contiguous) return;
  f.features *= f.rows;
  f.rows = 1;
  f.row_stride = p.grad_stride = f.features;
}

template <class T>
int64_t prepare(Args& a) {
  a.chunks = (a.p.forward.features + kLanes<T> - 1) / kLanes<T>;
  return grid_for(a.p.forward.rows * a.chunks, kBlock * kBatch);
}

}  // namespace

void activation(const ActivationParams& params, void* stream) {
  if (params.rows * params.features == 0) return;
  with_type(params.dtype, [&]<class T>() {
    Args a = {};
    a.p.forward = params;
    join_rows(a.p, true);
    const int64_t grid = prepare<T>(a);
    launch("activation", params.gated ? activation_forward<T, true> : activation_forward<T, false>,
           grid, kBlock, 0, stream, a);
  });
}

void activation_backward(const ActivationBackwardParams& params, void* stream) {
  const ActivationParams& p = params.forward;
  if (p.rows * p.features == 0) return;
  with_type(p.dtype, [&]<class T>() {
    Args a = {params, 0};
    join_rows(a.p, params.grad_stride == p.features);
    const int64_t grid = prepare<T>(a);
    launch("activation_backward",
           p.gated ? activation_gradients<T, true> : activation_gradients<T, false>, grid, kBlock,
           0, stream, a);
  });
}

}  // namespace ft::cuda
