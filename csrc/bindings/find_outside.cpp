#include "params/find_outside.h"

#include "bindings/device.h"

namespace ft::bindings {

int64_t find_outside(const Tensor& ids, int64_t size, std::optional<int64_t> ignore) {
  int64_t found = -1;
  FindOutsideParams p;
  p.ids = ids_arg(ids);
  p.count = ids.numel();
  p.size = size;
  p.ignore = ignore.value_or(0);
  p.found = &found;
  FT_LAUNCH(find_outside, p, ids);
  return found;
}

}  // namespace ft::bindings

FT_REGISTER_IMPL(m) { m.impl("find_outside", TORCH_BOX(&ft::bindings::find_outside)); }
