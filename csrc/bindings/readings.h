// What a halting step reads of the results of readout and head, for runs and for slots.
#pragma once

#include <algorithm>

#include "bindings/torch.h"
#include "halting/halting.h"

namespace adaptcomp {

// The index of the leaf that is the readout, or -1. A separate readout is a leaf if it has the leaf's memory.
inline int64_t leaf_of_readout(const HaltStep& a, bool apart, bool reads_logits) {
  if (!apart) return reads_logits ? 0 : -1;
  const auto same = [&](const Leaf& leaf) {
    return leaf.block == a.readout.block && leaf.row_elements == a.readout.row_elements &&
           leaf.dtype == a.readout.dtype;
  };
  const int64_t l = std::find_if(a.leaves, a.leaves + a.n_leaves, same) - a.leaves;
  return l < a.n_leaves ? l : -1;
}

// Lets the step read a head's logits, [rows] or [rows, 1], for q_halt also [rows, 2]; false if they are
// something else. `beside`: a leaf of the state, on whose device they have to be.
inline bool take_logits(HaltStep& a, const Like& beside, PyObject* logits, int64_t rows) {
  Facts facts;
  if (!is_plain(logits) || !facts.read(logits)) return false;
  if (facts.dims() != 1 && facts.dims() != 2) return false;
  const int64_t columns = facts.dims() == 1 ? 1 : facts.size(1);
  if (columns != 1 && !(columns == 2 && a.policy == Policy::q_halt)) return false;
  if (facts.size(0) != rows || facts.dtype() == DType::opaque || !beside.is_beside(facts)) return false;
  if (!facts.is_contiguous() || !facts.has_memory()) return false;
  a.signal_columns = columns;
  a.signal_dtype = facts.dtype();
  a.signal = facts.data();
  return !is_lazy(logits);
}

}  // namespace adaptcomp
