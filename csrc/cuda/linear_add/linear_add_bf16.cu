#include "cuda/linear_add/product.h"

namespace ft::cuda {

template void launch_product<bf16>(const char*, Form, const ProductPlan&, const MatmulArgs&, void*);

}  // namespace ft::cuda
