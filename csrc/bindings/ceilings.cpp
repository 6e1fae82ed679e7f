#include "params/ceilings.h"

#include "bindings/device.h"

namespace ft::bindings {
namespace {

double measure(Ceiling what, int64_t bytes, double seconds) {
  double rate = 0;
  CeilingParams p;
  p.what = what;
  p.bytes = bytes;
  p.seconds = seconds;
  p.rate = &rate;
  ceilings(p);
  return rate / 1e9;
}

double measure_fma(double seconds) { return measure(Ceiling::fma, 0, seconds); }
double measure_dot(double seconds) { return measure(Ceiling::dot, 0, seconds); }
double measure_read(int64_t bytes, double seconds) {
  return measure(Ceiling::read, bytes, seconds);
}
double measure_copy(int64_t bytes, double seconds) {
  return measure(Ceiling::copy, bytes, seconds);
}

}  // namespace
}  // namespace ft::bindings

// No tensor says which device is meant, so these are not bound to the CPU's dispatch key.
STABLE_TORCH_LIBRARY_IMPL(fasttransformer, CompositeExplicitAutograd, m) {
  m.impl("measure_fma", TORCH_BOX(&ft::bindings::measure_fma));
  m.impl("measure_dot", TORCH_BOX(&ft::bindings::measure_dot));
  m.impl("measure_read", TORCH_BOX(&ft::bindings::measure_read));
  m.impl("measure_copy", TORCH_BOX(&ft::bindings::measure_copy));
}
