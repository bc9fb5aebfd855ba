// The block of a continuous batcher on the CPU: a slot holds a row until it has halted, and then the next
// sample.
//
// The rows are dense: they are the first ones of the block's tensors. A row that halts leaves a hole, which
// the next sample takes; `settle` moves rows from the end into the holes that are left. A tensor is written
// to only if no other object can see its memory, and copied otherwise. All work for a sample is a few copies
// of memory, because the interpreter's operations on single tensors would take longer than a small step.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "bindings/readings.h"
#include "bindings/state_like.h"
#include "bindings/torch.h"
#include "compaction/compaction.h"
#include "halting/halting.h"

namespace adaptcomp {

class SlotBlock {
 public:
  // `blocks`: tensors [slots, ...], the leaves of the state and then those of the inputs. `trees`: what a
  // sample is a tuple of: -1 for a tensor, k for a tuple of k tensors, less for anything else. `leaves`: the
  // number of the state's.
  static constexpr std::initializer_list<const char*> kNames{"blocks", "trees", "leaves", "slots"};
  static constexpr int64_t kTensor = -1;
  explicit SlotBlock(const py::list& arguments) {
    Arguments in(arguments);
    const auto blocks = in.object().cast<py::list>();
    for (const py::handle tree : in.object().cast<py::list>()) trees_.push_back(integer_of(tree.ptr()));
    n_leaves_ = static_cast<size_t>(in.integer());
    slots_ = in.integer();
    in.done();
    if (n_leaves_ > blocks.size() || n_leaves_ > static_cast<size_t>(kMaxLeaves))
      throw std::runtime_error("adaptcomp_ext._C: too many tensors in the state");
    for (const py::handle block : blocks) {
      likes_.emplace_back(block.ptr());
      columns_.push_back({py::reinterpret_borrow<py::object>(block), data_of(block.ptr(), "a block"),
                          likes_.back().row_bytes(), true});
    }
    found_.resize(columns_.size());
    key_.resize(static_cast<size_t>(slots_));
    clear();
  }

  // Names the tensors that tell of the rows: `row` (the slot) and `row_step` have an entry for each row of
  // the block, all others one for each slot. Without this call the block is only a buffer.
  void configure(const py::list& arguments) {
    Arguments in(arguments);
    a_.row = in.held<int64_t>(torch->int64, slots_, "row");
    row_step_ = in.held<int64_t>(torch->int64, slots_, "row_step");
    a_.row_step = row_step_;
    sample_ = in.held<int64_t>(torch->int64, slots_, "sample_ids");
    a_.sample = sample_;
    steps_ = in.object();
    a_.steps = static_cast<int64_t*>(data_of(steps_.ptr(), "steps"));
    status_ = in.object();
    a_.status = static_cast<int8_t*>(data_of(status_.ptr(), "status"));
    results_ = in.object().cast<py::list>();
    a_.wide = in.integer() != 0;
    a_.min_steps = in.integer();
    a_.max_steps = in.integer();
    a_.policy = static_cast<Policy>(in.integer());
    has_head_ = in.integer() != 0;
    reads_logits_ = in.integer() != 0;
    a_.threshold = in.number();
    a_.parameter = in.integer();
    const bool carried = in.integer() != 0;
    in.done();
    scalar_bytes_ = static_cast<int64_t>(a_.wide ? sizeof(double) : sizeof(float));
    if (carried) {
      carry_.resize(static_cast<size_t>(slots_ * scalar_bytes_));
      a_.carry = carry_.data();
    }
    flag_.resize(static_cast<size_t>(slots_));
    a_.flag = flag_.data();
    a_.n_leaves = static_cast<int64_t>(n_leaves_);
    for (size_t l = 0; l < n_leaves_; ++l)
      a_.leaves[l] = likes_[l].leaf(py::object(results_[l]).ptr(), "the result's state");
  }

  // Sets cost and log-probability of each slot; None: the policy has none.
  void use_totals(const py::object& cost, const py::object& log_prob) {
    cost_ = cost;
    log_prob_ = log_prob;
    a_.n_sums = 0;
    for (const py::object* total : {&cost_, &log_prob_}) {
      if (!total->is_none()) a_.sums[a_.n_sums++] = {nullptr, data_of(total->ptr(), "a total")};
    }
  }

  // Sets the first readout and the output of each slot: see HaltRun::use_first. `weighted`: the output is a
  // sum, which starts at zero.
  void use_first(const py::list& leaves, const py::object& readout, const py::object& output, bool weighted) {
    if (output.is_none() && !reads_logits_) return;
    apart_ = !readout.is_none();
    const py::object to = output.is_none() ? py::object(results_[0]) : output;
    readout_.emplace(apart_ ? readout.ptr() : PyList_GET_ITEM(leaves.ptr(), 0));
    a_.readout = readout_->leaf(to.ptr(), "output");
    if (output.is_none()) return;
    output_ = to;
    if (weighted) zeroed_ = row_extent(to.ptr()).bytes;
  }

  // Copies a sample to the row after the last one; returns false, and has done nothing, if it is not a tuple
  // of plain contiguous tensors in the form of the others. There has to be a free slot.
  bool put(const py::object& sample, int64_t key, int64_t id) {
    if (!PyTuple_CheckExact(sample.ptr()) ||
        static_cast<size_t>(PyTuple_GET_SIZE(sample.ptr())) != trees_.size())
      return false;
    size_t at = 0;
    for (size_t t = 0; t < trees_.size(); ++t) {
      PyObject* tree = PyTuple_GET_ITEM(sample.ptr(), static_cast<Py_ssize_t>(t));
      if (trees_[t] == kTensor) {
        if (!find(tree, at++)) return false;
        continue;
      }
      if (!PyTuple_CheckExact(tree) || PyTuple_GET_SIZE(tree) != trees_[t]) return false;
      for (Py_ssize_t i = 0; i < trees_[t]; ++i) {
        if (!find(PyTuple_GET_ITEM(tree, i), at++)) return false;
      }
    }
    if (at != columns_.size()) return false;
    take(key, id);
    return true;
  }
  // The same for the tensors of a sample of another form, which the caller has made plain.
  bool put_leaves(const py::list& leaves, int64_t key, int64_t id) {
    if (leaves.size() != columns_.size()) return false;
    for (size_t l = 0; l < leaves.size(); ++l) {
      if (!find(PyList_GET_ITEM(leaves.ptr(), static_cast<Py_ssize_t>(l)), l)) return false;
    }
    take(key, id);
    return true;
  }

  // Fills the holes that are left with rows from the end, and returns the number of rows.
  int64_t settle() {
    std::sort(holes_.begin(), holes_.end());
    while (!holes_.empty()) {
      --used_;
      if (holes_.back() == used_) {
        holes_.pop_back();
        continue;
      }
      const int64_t hole = holes_.front();
      holes_.erase(holes_.begin());
      for (const Column& column : columns_) column.move(hole, used_);
      for (const Column& column : carried_) column.move(hole, used_);
      if (!carry_.empty())
        std::memcpy(carry_.data() + hole * scalar_bytes_, carry_.data() + used_ * scalar_bytes_,
                    static_cast<size_t>(scalar_bytes_));
      a_.row[hole] = a_.row[used_];
      row_step_[hole] = row_step_[used_];
    }
    return used_;
  }

  // The tensors of the block, of which the first rows are in use.
  py::list blocks() const { return tensors_of(columns_); }
  py::list carried() const { return tensors_of(carried_); }

  // Forgets all rows.
  void clear() {
    used_ = 0;
    holes_.clear();
    carried_.clear();
    free_.clear();
    for (int64_t slot = 0; slot < slots_; ++slot) free_.push_back(slot);
  }

  // The number of samples that may be put.
  int64_t room() const { return static_cast<int64_t>(free_.size()); }

  // Ends the rows that halt after the step that has led to `leaves`, a list that is emptied. `decision`:
  // halt, weight, logits, cost and log-probability, where a policy decided in Python, else None; `carry`: the
  // tensors that it carries. Returns None if no row ended; otherwise the keys of the rows that have, and a
  // list of the output (None where it is the first leaf), the leaves, steps, status, cost and
  // log-probability (None where there is none) of these rows. Returns -1, and has done nothing, if readout
  // or logits do not have the expected form.
  py::object advance(const py::list& leaves, const py::object& readout, const py::object& logits,
                     const py::object& decision, const py::list& carry, bool inference_mode) {
    const int64_t rows = used_;
    Contiguous data;
    if (apart_ && !readout_->fits(readout.ptr(), rows, a_.readout.block)) return py::int_(-1);
    if (has_head_ && !take_logits(a_, likes_[0], logits.ptr(), rows)) return py::int_(-1);
    std::vector<Block> memory;  // holds the storages
    for (size_t l = 0; l < n_leaves_; ++l) {
      memory.push_back(
          likes_[l].require_block(PyList_GET_ITEM(leaves.ptr(), static_cast<Py_ssize_t>(l)), rows, "step"));
      a_.leaves[l].block = memory.back().data;
    }
    if (readout_) {
      if (!apart_) a_.readout.block = a_.leaves[0].block;
      a_.read_leaf = leaf_of_readout(a_, apart_, reads_logits_);
    }
    a_.rows = rows;
    if (!decision.is_none()) take_decision(data, decision.cast<py::tuple>());
    {
      py::gil_scoped_release unlocked;
      halt_step_cpu(a_);
    }
    // The leaves are the next block.
    inference_mode_ = inference_mode;
    for (size_t l = 0; l < n_leaves_; ++l) {
      columns_[l] = {leaves[l], memory[l].data, likes_[l].row_bytes(), false};
      leaves[l] = py::none();
    }
    memory.clear();
    for (size_t c = n_leaves_; c < columns_.size(); ++c) columns_[c].writable = false;
    carried_.clear();
    for (const py::handle tensor : carry)
      carried_.push_back({py::reinterpret_borrow<py::object>(tensor), data(tensor, "Decision.carry"),
                          row_extent(tensor.ptr()).bytes, false});
    has_room_ = false;
    return ended(rows);
  }

 private:
  struct Column {  // a tensor of the block
    py::object tensor;
    void* data;
    int64_t bytes;  // of a row
    bool writable;

    char* at(int64_t row) const { return static_cast<char*>(data) + row * bytes; }
    void move(int64_t to, int64_t from) const { std::memcpy(at(to), at(from), static_cast<size_t>(bytes)); }
  };

  // Finds the memory of a sample's tensor.
  bool find(PyObject* leaf, size_t at) {
    Facts facts;
    if (at >= found_.size() || !is_plain(leaf) || !facts.read(leaf) || !likes_[at].is_row(facts) ||
        is_lazy(leaf))
      return false;
    found_[at] = facts.data();
    return true;
  }
  // Copies the sample that was found.
  void take(int64_t key, int64_t id) {
    if (free_.empty()) throw std::runtime_error("adaptcomp_ext._C: no slot is free");
    make_room();
    const int64_t slot = free_.back();
    free_.pop_back();
    int64_t place = used_;
    if (holes_.empty()) {
      ++used_;
    } else {
      place = holes_.back();
      holes_.pop_back();
    }
    for (size_t c = 0; c < columns_.size(); ++c)
      std::memcpy(columns_[c].at(place), found_[c], static_cast<size_t>(columns_[c].bytes));
    for (const Column& column : carried_) std::memset(column.at(place), 0, static_cast<size_t>(column.bytes));
    key_[static_cast<size_t>(slot)] = key;
    if (!a_.row) return;  // the block is only a buffer
    a_.row[place] = slot;
    row_step_[place] = 1;
    sample_[slot] = id;
    if (!carry_.empty()) set_zero(carry_.data(), place, scalar_bytes_);
    for (int64_t s = 0; s < a_.n_sums; ++s) set_zero(a_.sums[s].total, slot, scalar_bytes_);
    if (zeroed_) set_zero(a_.readout.result, slot, zeroed_);
  }

  static void set_zero(void* base, int64_t row, int64_t bytes) {
    std::memset(static_cast<char*>(base) + row * bytes, 0, static_cast<size_t>(bytes));
  }
  static py::list tensors_of(const std::vector<Column>& columns) {
    py::list tensors(columns.size());
    for (size_t c = 0; c < columns.size(); ++c) tensors[c] = columns[c].tensor;
    return tensors;
  }

  // Collects the rows that have ended, and makes holes of their places.
  py::object ended(int64_t rows) {
    index_.clear();
    for (int64_t i = 0; i < rows; ++i) {
      if (flag_[static_cast<size_t>(i)] == kRunning) {
        ++row_step_[i];
      } else {
        index_.push_back(a_.row[i]);
        holes_.push_back(i);
      }
    }
    if (index_.empty()) return py::none();
    const auto count = static_cast<int64_t>(index_.size());
    py::list keys(index_.size());
    for (size_t k = 0; k < index_.size(); ++k) {
      keys[k] = py::int_(key_[static_cast<size_t>(index_[k])]);
      free_.push_back(index_[k]);
    }
    py::list found;
    std::vector<Move> moves;
    const auto take = [&](const py::object& from) {
      if (!from || from.is_none()) {
        found.append(py::none());
        return;
      }
      const py::object to = new_rows(from.ptr(), count);
      moves.push_back(
          {data_of(from.ptr(), "a result"), data_of(to.ptr(), "a result"), row_extent(to.ptr()).bytes});
      found.append(to);
    };
    take(output_);
    for (size_t l = 0; l < n_leaves_; ++l) take(results_[l]);
    for (const py::object* each : {&steps_, &status_, &cost_, &log_prob_}) take(*each);
    gather_rows_cpu(moves.data(), static_cast<int64_t>(moves.size()), index_.data(), count);
    make_room();
    return py::make_tuple(keys, found);
  }

  // Makes all tensors of the block writable, with room for a row in each slot.
  void make_room() {
    if (has_room_) return;
    has_room_ = true;
    for (size_t c = 0; c < columns_.size(); ++c)
      own(columns_[c], likes_[c].is_full(columns_[c].tensor.ptr(), slots_));
    for (Column& column : carried_) own(column, false);
  }
  void own(Column& column, bool is_full) {
    if (column.writable) return;
    column.writable = true;
    if (is_full && sole_owner(column.tensor.ptr(), storage_of(column.tensor.ptr()), 1, inference_mode_))
      return;
    py::object fresh = new_rows(column.tensor.ptr(), slots_);
    void* to = data_of(fresh.ptr(), "a block");
    std::memcpy(to, column.data, static_cast<size_t>(column.bytes * used_));
    column.tensor = std::move(fresh);
    column.data = to;
  }

  // `decision` has been checked in Python; its scalars are of the scalar dtype.
  void take_decision(Contiguous& data, const py::tuple& decision) {
    const py::object halt = decision[0], weight = decision[1], logits = decision[2];
    a_.signal = data.typed<const void>(halt, torch->boolean, a_.rows, "Decision.halt");
    a_.weight = data.real(weight, "Decision.weight");
    a_.tested = data.real(logits, "Decision.logits");
    if (a_.tested) a_.tested_dtype = dtype_of(logits.ptr());
    int64_t s = 0;
    for (size_t i = 3; i < 5; ++i) {
      const py::object increment = decision[i];
      if (!increment.is_none()) a_.sums[s++].increment = data.real(increment, "Decision.cost or log_prob");
    }
  }

  HaltStep a_{};
  std::vector<int64_t> trees_;
  size_t n_leaves_ = 0;
  int64_t slots_ = 0, used_ = 0, scalar_bytes_ = 0, zeroed_ = 0;
  bool has_head_ = false, reads_logits_ = false, apart_ = false, has_room_ = true, inference_mode_ = false;
  std::vector<Like> likes_;
  std::vector<Column> columns_, carried_;
  std::vector<const void*> found_;
  std::vector<int64_t> key_, free_, holes_, index_;
  std::vector<int8_t> flag_;
  std::vector<char> carry_;
  int64_t *row_step_ = nullptr, *sample_ = nullptr;
  std::optional<Like> readout_;
  py::object steps_, status_, output_, cost_ = py::none(), log_prob_ = py::none();
  py::list results_;
};

}  // namespace adaptcomp
