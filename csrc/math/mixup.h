// mixup of one element. A is the accumulation type or a vector of it, W a weight.
#pragma once

#include "hd.h"

namespace fusedtricks {

template <class A, class W>
FT_HD A mixed(A own, A partner, W of_own, W of_partner) {
  return own * of_own + partner * of_partner;
}

}  // namespace fusedtricks
