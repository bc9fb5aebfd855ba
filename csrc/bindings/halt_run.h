// The halting loop in compiled code: in place in inference, and with an autograd node for each step in
// training.
//
// It is little work, but the interpreter does it with cold caches: a step of a network evicts its code and
// data, and forty small operations on tensors then take as long as a small step. So HaltRun::go_on is the
// loop, and only the user's functions run in Python. Where the state or the inputs have another form, and on
// CUDA, the loop in Python calls StateLike::take before readout and head and HaltRun::advance after them.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "bindings/halt_node.h"
#include "bindings/readings.h"
#include "bindings/state_like.h"
#include "bindings/torch.h"
#include "compaction/compaction.h"
#include "halting/halting.h"
#include "halting/rows.h"
#include "halting/schedule.h"

namespace adaptcomp {

class HaltRun {
 public:
  // `results`: where each row's last state goes. `inputs`: the step's, contiguous; packed along, and replaced
  // in the list where that takes a new tensor. `row`, `flag` and `running` are for CUDA, where the host does
  // not see them. `signal`: the policy's, one number for each row of the batch.
  static constexpr std::initializer_list<const char*> kNames{
      "state",        "schedule",       "results", "inputs",    "rows",       "row",    "flag",
      "steps",        "status",         "wide",    "min_steps", "max_steps",  "policy", "has_head",
      "reads_logits", "threshold",      "signal",  "parameter", "sample_ids", "carry",  "cost",
      "running",      "inference_mode", "apply",   "device"};
  explicit HaltRun(const py::list& arguments)
      : state_(arguments[0].cast<std::shared_ptr<StateLike>>()), leaves_(&state_->leaves()) {
    Arguments in(arguments);
    in.object();
    schedule_ = in.object().cast<std::shared_ptr<Schedule>>();
    results_ = in.object().cast<py::list>();
    inputs_ = in.object().cast<py::list>();
    const int64_t rows = in.integer();
    a_.row = in.pointer<int64_t>();
    a_.flag = in.pointer<int8_t>();
    a_.steps = in.pointer<int64_t>();
    a_.status = in.pointer<int8_t>();
    a_.wide = in.integer() != 0;
    a_.min_steps = in.integer();
    a_.max_steps = in.integer();
    a_.policy = static_cast<Policy>(in.integer());
    has_head_ = in.integer() != 0;
    reads_logits_ = in.integer() != 0;
    a_.threshold = in.number();
    const auto* n = in.held<int64_t>(torch->int64, rows, "n");
    a_.parameter = in.integer();
    const auto* sample = in.held<int64_t>(torch->int64, rows, "sample_ids");
    carry_ = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(arguments.ptr(), 19));
    a_.carry = in.held<void>(torch->dtypes[a_.wide ? 1 : 0], rows, "carry");
    cost_ = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(arguments.ptr(), 20));
    auto* cost = in.pointer<void>();
    running_on_device_ = in.pointer<int64_t>();
    inference_mode_ = in.integer() != 0;
    apply_ = in.object();
    a_.retire = apply_.is_none();
    device_ = in.integer();
    in.done();
    a_.signal = n;
    a_.sample = sample;
    if (device_ == kCpu) {
      // They are the user's, who may resize them while the run goes on.
      a_.signal = copied(n, n_, rows);
      a_.sample = copied(sample, sample_, rows);
      row_.resize(static_cast<size_t>(rows));
      std::iota(row_.begin(), row_.end(), int64_t{0});
      flag_.resize(row_.size());
      a_.row = row_.data();
      a_.flag = flag_.data();
    }
    a_.n_sums = cost ? 1 : 0;
    a_.sums[0] = {nullptr, cost};
    a_.n_leaves = static_cast<int64_t>(leaves_->size());
    set_results();
    for (const py::handle input : inputs_) like_inputs_.emplace_back(input.ptr());
  }

  // Sets the first readout, which fixes the form of all readouts, and the output; without this call the
  // kernel reads no readout. `readout`: None where it is the first of `leaves`. `output`: None where it is
  // the result of that.
  void use_first(const py::list& leaves, const py::object& readout, const py::object& output) {
    const bool remembering = remembers(a_.policy);
    if (output.is_none() && !reads_logits_ && !remembering) return;
    apart_ = !readout.is_none();
    const py::object to = output.is_none() ? py::object(results_[0]) : output;
    readout_.emplace(apart_ ? readout.ptr() : PyList_GET_ITEM(leaves.ptr(), 0));
    a_.readout = readout_->leaf(to.ptr(), "output");
    if (apart_ || !carry_.is_none()) output_ = to;
    if (remembering) make_memory(apart_ ? readout.ptr() : PyList_GET_ITEM(leaves.ptr(), 0));
  }

  // The state has another form from this step on, whose results go to other tensors.
  void change_shapes(std::shared_ptr<StateLike> state, py::list results) {
    state_ = std::move(state);
    leaves_ = &state_->leaves();
    results_ = std::move(results);
    set_results();
  }

  // Sets `row` and carry of the next block after a compaction on CUDA; the caller holds both.
  void set_rows(const py::object& row, const py::object& carry) {
    a_.row = static_cast<int64_t*>(data_of(row.ptr(), "row"));
    a_.carry = carry.is_none() ? nullptr : data_of(carry.ptr(), "carry");
  }

  // Ends the rows that halt after `step`, and compacts the others if the schedule says so. `leaves`, from
  // `take`, must have no other reference. They are compacted in place if no other object can see their
  // memory, and replaced in the list otherwise. Returns the number of rows of the next block, 0 if no row is
  // active; on CUDA, where it does not compact, that of this block. Returns kUnusual, and has done nothing,
  // if readout or logits do not have the expected form.
  int64_t advance(int64_t rows, int64_t step, const py::list& leaves, const py::object& readout,
                  const py::object& logits, int64_t stream) {
    if (apart_ && !readout_->fits(readout.ptr(), rows, a_.readout.block)) return kUnusual;
    if (has_head_ && !take_logits(a_, (*leaves_)[0], logits.ptr(), rows)) return kUnusual;
    for (size_t l = 0; l < leaves_->size(); ++l) {
      PyObject* leaf = PyList_GET_ITEM(leaves.ptr(), static_cast<Py_ssize_t>(l));
      // Readout and head had it since `take`.
      if (!(*leaves_)[l].find(leaf, rows, a_.leaves[l].block))
        throw py::value_error(
            "step: expected the state that it returned, got one that readout or head resized or replaced");
    }
    if (readout_) {
      if (!apart_) a_.readout.block = a_.leaves[0].block;
      a_.read_leaf = leaf_of_readout(a_, apart_, reads_logits_);
    }
    a_.rows = rows;
    a_.step = step;
    if (!apply_.is_none()) return advance_out_of_place(leaves, readout, logits);
    const Place where(device_, reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
    AC_RUN(where, running = halt_step_cpu(a_),
           halt_step_cuda(a_, running_on_device_, where.device, where.stream));
    if (!where.on_cpu()) return rows;
    if (running == 0 || running == rows) return running;
    if (rows - running < schedule_->least(rows)) {
      schedule_->kept(rows - running);
      return rows;
    }
    pack(leaves, rows);
    schedule_->packed();
    return running;
  }
  static constexpr int64_t kUnusual = -1;

  // The first readout will be like `readout`; without this, `go_on` asks in Python what follows from it.
  void expect_readout(const Like& readout, bool apart, bool weighted) {
    expected_ = &readout;
    expects_apart_ = apart;
    expects_weighted_ = weighted;
  }

  // Runs all steps, until no row is active, where inputs are bare tensors and the state is one or a plain
  // tuple. What is not ordinary goes to the methods _first, _take, _mend, _tree and _explain of `python`.
  void go_on(const py::object& steps, int64_t rows, py::object previous, py::tuple arguments,
             const py::object& read, const py::object& head, const py::object& python) {
    py::object now;
    int64_t n = 0;
    while (true) {
      const auto step = py::reinterpret_steal<py::object>(PyIter_Next(steps.ptr()));
      if (!step || PyErr_CheckSignals() != 0) {
        if (PyErr_Occurred()) throw py::error_already_set();
        return;
      }
      ++n;
      py::object current = call_step(step, previous, arguments);
      py::object next = state_->take(current, rows);
      const bool unusual = next.is_none();
      if (unusual) {
        const py::tuple taken = python.attr("_take")(current, rows, n);
        next = taken[0];
        current = taken[1];
        if (const py::object room = taken[2]; !room.is_none()) {
          const py::tuple form = room;
          change_shapes(form[0].cast<std::shared_ptr<StateLike>>(), form[1]);
        }
      }
      now = std::move(next);
      py::object readout = call("readout", read, current, python),
                 logits = call("head", head, current, python);
      current = py::object();
      auto list = py::reinterpret_borrow<py::list>(now);
      if (n == 1 && !take_first(list, readout, rows)) {
        const py::tuple first = python.attr("_first")(readout, logits, list);
        readout = first[0];
        use_first(list, readout, first[1]);
      }
      int64_t size = advance(rows, n, list, readout, logits, 0);
      if (size == kUnusual) {
        const py::tuple mended = python.attr("_mend")(readout, logits, rows);
        readout = mended[0];
        logits = mended[1];
        size = advance(rows, n, list, readout, logits, 0);
      }
      if (size <= 0) return;
      if (size != rows && inputs_replaced) arguments = py::tuple(inputs_);
      rows = size;
      previous = unusual ? py::object(python.attr("_tree")(list)) : state_->tree(list);
    }
  }

  // The output; null or None where it is the first leaf's result.
  const py::object& output() const { return output_; }

  int64_t running = 0;           // number of active rows after the last `advance`; on the CPU
  bool inputs_replaced = false;  // the last compaction has replaced an input in its list
  bool has_broken = false;       // a row has ended NONFINITE, in training

 private:
  void set_results() {
    for (size_t l = 0; l < leaves_->size(); ++l)
      a_.leaves[l] = (*leaves_)[l].leaf(PyList_GET_ITEM(results_.ptr(), static_cast<Py_ssize_t>(l)),
                                        "the result's state");
  }

  // Allocates what the first readout decides, if the readout is as expected.
  bool take_first(const py::list& leaves, const py::object& readout, int64_t rows) {
    if (!expected_) return false;
    const py::object first = expects_apart_ ? readout : py::object(leaves[0]);
    const void* data = nullptr;
    if (!expected_->fits(first.ptr(), rows, data)) return false;
    py::object output = py::none();
    if (expects_apart_ || expects_weighted_) output = new_rows(first.ptr(), rows);
    if (expects_weighted_) zero(output.ptr(), expected_->row_bytes() * rows);
    use_first(leaves, expects_apart_ ? readout : py::none(), output);
    return true;
  }

  static py::object call_step(const py::object& step, const py::object& previous,
                              const py::tuple& arguments) {
    PyObject* stack[8];
    const auto count = static_cast<size_t>(PyTuple_GET_SIZE(arguments.ptr()));
    if (count + 2 > std::size(stack)) return step(previous, *arguments);
    stack[1] = previous.ptr();
    for (size_t i = 0; i < count; ++i)
      stack[i + 2] = PyTuple_GET_ITEM(arguments.ptr(), static_cast<Py_ssize_t>(i));
    return owned(
        PyObject_Vectorcall(step.ptr(), stack + 1, (count + 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  }
  // Calls a readout or head, if there is one; `python` explains an error that comes of the state's form.
  static py::object call(const char* role, const py::object& function, const py::object& state,
                         const py::object& python) {
    if (function.is_none()) return py::none();
    PyObject* stack[] = {nullptr, state.ptr()};
    try {
      return owned(
          PyObject_Vectorcall(function.ptr(), stack + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    } catch (py::error_already_set& error) {
      if (error.matches(PyExc_TypeError) || error.matches(PyExc_AttributeError))
        python.attr("_explain")(role, function, state, error.value());
      throw;
    }
  }

  // In training: decides, compacts into new tensors, and makes the autograd node of a step in which a row has
  // ended or the policy has a gradient.
  int64_t advance_out_of_place(const py::list& leaves, const py::object& readout, const py::object& logits) {
    const bool act = !carry_.is_none();  // an empty batch has no address
    const int64_t rows = a_.rows;
    auto held = std::make_unique<HaltNode>();
    HaltNode& node = *held;
    const py::object before = carry_;
    py::object after;
    if (act) {
      after = new_rows(before.ptr(), rows);
      a_.spent = data_of(before.ptr(), "carry");
      a_.carry = data_of(after.ptr(), "carry");
      node.weight.resize(static_cast<size_t>(rows) * (a_.wide ? sizeof(double) : sizeof(float)));
      a_.weight_out = node.weight.data();
    }
    {
      py::gil_scoped_release unlocked;
      running = halt_step_cpu(a_);
    }
    const bool ended = running < rows || rows == 0, moves = ended && running > 0;
    inputs_replaced = moves;
    if (!ended && !act) return running;
    node.rows = rows;
    node.row.assign(row_.begin(), row_.begin() + rows);
    node.flag.assign(flag_.begin(), flag_.begin() + rows);
    has_broken = has_broken || std::find(node.flag.begin(), node.flag.end(), kNonFinite) != node.flag.end();

    const size_t n_leaves = leaves_->size(), n_inputs = like_inputs_.size();
    std::vector<py::object> from, to;  // the leaves, then the inputs; of the next block
    for (size_t l = 0; l < n_leaves; ++l) from.push_back(leaves[l]);
    for (size_t i = 0; moves && i < n_inputs; ++i) from.push_back(inputs_[i]);
    if (moves) after = pack_out_of_place(node, from, to, after);
    attach(node, std::move(held), leaves, readout, logits, before, after, from, to, ended);
    return running;
  }

  // Copies the active rows of `from` and of the accumulated probability `after` to new tensors.
  py::object pack_out_of_place(HaltNode& node, const std::vector<py::object>& from,
                               std::vector<py::object>& to, const py::object& after) {
    const int64_t rows = a_.rows;
    // One entry more than needed, because the branch-free loop also writes the entry after the last one.
    index_.resize(static_cast<size_t>(running) + 1);
    next_.resize(index_.size());
    node.place.resize(static_cast<size_t>(rows));
    plan_packing_cpu(a_.flag, a_.row, rows, index_.data(), node.place.data(), next_.data());
    std::copy_n(next_.begin(), running, row_.begin());
    std::vector<Block> blocks;  // they hold the storages
    for (size_t t = 0; t < from.size(); ++t) {
      const bool leaf = t < leaves_->size();
      const Like& like = leaf ? (*leaves_)[t] : like_inputs_[t - leaves_->size()];
      blocks.push_back(
          like.require_block(from[t].ptr(), rows, leaf ? "step" : "inputs", leaf && !apart_ && !has_head_));
      to.push_back(new_rows(from[t].ptr(), running));
      moves_.push_back({blocks.back().data, data_of(to.back().ptr(), "the packed rows"), like.row_bytes()});
    }
    py::object packed;
    if (a_.carry) {
      packed = new_rows(after.ptr(), running);
      moves_.push_back({a_.carry, data_of(packed.ptr(), "carry"),
                        static_cast<int64_t>(a_.wide ? sizeof(double) : sizeof(float))});
    }
    {
      py::gil_scoped_release unlocked;
      gather_rows_cpu(moves_.data(), static_cast<int64_t>(moves_.size()), index_.data(), running);
    }
    moves_.clear();
    return packed;
  }

  // Replaces leaves, inputs and carry by those of the next block, with their gradient.
  void attach(HaltNode& node, std::unique_ptr<HaltNode> held, const py::list& leaves,
              const py::object& readout, const py::object& logits, const py::object& before, py::object after,
              const std::vector<py::object>& from, const std::vector<py::object>& to, bool ended) {
    const size_t n_leaves = leaves_->size();
    const auto needs = [](const py::object& tensor) { return is_true(tensor.ptr(), torch->requires_grad); };
    const bool act = !carry_.is_none(), goes_on = running > 0;
    node.has_readout = static_cast<bool>(output_);
    node.shared = node.has_readout && (!apart_ || readout.is(from[0]));
    bool any =
        (act && (needs(logits) || needs(before))) || (node.has_readout && !node.shared && needs(readout));
    std::vector<bool> needed;
    for (const py::object& tensor : from) {
      needed.push_back(needs(tensor));
      any = any || needed.back();
    }
    const auto replace = [&](size_t t, py::object tensor) {
      if (t < n_leaves) {
        leaves[t] = std::move(tensor);
      } else {
        inputs_[t - n_leaves] = std::move(tensor);
      }
    };
    for (size_t t = 0; t < to.size(); ++t) replace(t, to[t]);
    if (act) carry_ = after;
    if (!any) return;

    std::vector<py::object> tensors{py::none()}, written, fixed, next;
    std::vector<size_t> taken;  // which of `from` the node has
    if (act) {
      tensors.push_back(logits);
      tensors.push_back(before);
    }
    if (node.has_readout) {
      if (!node.shared) tensors.push_back(readout);
      tensors.push_back(output_);
      written.push_back(output_);
      node.readout_dtype = attribute(node.shared ? from[0].ptr() : readout.ptr(), torch->dtype);
    }
    if (act) {
      tensors.push_back(cost_);
      written.push_back(cost_);
      node.totals = 1;
    }
    for (size_t t = 0; t < from.size(); ++t) {
      const bool leaf = t < n_leaves;
      const bool first = t == 0 && node.shared;
      const bool read = first || (leaf && ended && needs(results_[t]));
      if (needed[t] ? leaf && !ended && !first : !read) continue;
      taken.push_back(t);
      ++(leaf ? node.leaves : node.inputs);
    }
    const auto end_of_leaves = taken.begin() + static_cast<std::ptrdiff_t>(node.leaves);
    for (auto t = taken.begin(); t != end_of_leaves; ++t) tensors.push_back(from[*t]);
    node.has_results = ended;
    if (ended) {
      for (auto t = taken.begin(); t != end_of_leaves; ++t) {
        tensors.push_back(results_[*t]);
        written.push_back(results_[*t]);
      }
    }
    for (auto t = end_of_leaves; t != taken.end(); ++t) tensors.push_back(from[*t]);
    node.has_next = goes_on;
    if (goes_on) {
      for (const size_t t : taken) {
        next.push_back(to.empty() ? from[t] : to[t]);
        if (!needed[t]) fixed.push_back(next.back());
      }
      if (act) next.push_back(after);
    }
    node.act = act;
    node.wide = a_.wide;
    node.params = {a_.step, a_.min_steps, a_.max_steps, a_.threshold};
    if (act) node.saved = as_tuple({logits, before, node.shared ? from[0] : readout});
    if (!fixed.empty()) node.fixed = as_tuple(fixed);
    const size_t n_written = written.size();
    node.written = as_tuple(written);
    written.insert(written.end(), next.begin(), next.end());
    node.outputs = as_tuple(written);

    tensors[0] = py::cast(std::move(held));
    const py::object out = owned(PyObject_CallObject(apply_.ptr(), as_tuple(tensors).ptr()));
    if (!goes_on) return;
    // The tensors that were written are the same objects.
    size_t at = n_written;
    for (const size_t t : taken) replace(t, out[py::int_(at++)]);
    if (act) carry_ = out[py::int_(at)];
  }

  static py::object as_tuple(const std::vector<py::object>& objects) {
    py::object tuple = owned(PyTuple_New(static_cast<Py_ssize_t>(objects.size())));
    for (size_t i = 0; i < objects.size(); ++i)
      PyTuple_SET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i), py::object(objects[i]).release().ptr());
    return tuple;
  }

  // Makes room for what a policy remembers of each row's last readout.
  void make_memory(PyObject* readout) {
    Facts facts;
    facts.require(readout);
    const int64_t rows = facts.size(0);
    a_.classes = facts.dims() > 1 ? std::max(facts.size(facts.dims() - 1), int64_t{1}) : 1;
    a_.memory_row =
        memory_bytes(criterion_of(a_.policy), a_.readout.row_elements, a_.classes, a_.readout.dtype);
    memory_ = new_numbers(readout, rows * a_.memory_row, torch->uint8);
    still_ = new_numbers(readout, rows, torch->int64);
    a_.memory = data_of(memory_.ptr(), "a new tensor");
    a_.still = static_cast<int64_t*>(data_of(still_.ptr(), "a new tensor"));
    if (device_ == kCpu) {
      std::fill_n(a_.still, rows, int64_t{-1});
    } else {
      still_.attr("fill_")(-1);
    }
  }

  static const int64_t* copied(const int64_t* from, std::vector<int64_t>& to, int64_t rows) {
    if (!from) return nullptr;
    to.assign(from, from + rows);
    return to.data();
  }

  void pack(const py::list& leaves, int64_t rows) {
    std::vector<Block> blocks;
    for (size_t i = 0; i < like_inputs_.size(); ++i)
      blocks.push_back(like_inputs_[i].require_block(
          PyList_GET_ITEM(inputs_.ptr(), static_cast<Py_ssize_t>(i)), rows, "inputs"));
    for (size_t l = 0; l < leaves_->size(); ++l) {
      PyObject* leaf = PyList_GET_ITEM(leaves.ptr(), static_cast<Py_ssize_t>(l));
      const Block block = (*leaves_)[l].require_block(leaf, rows, "step", !apart_ && !has_head_);
      add_move(leaves, l, (*leaves_)[l], block, rows, sole_owner(leaf, block.storage, 1, inference_mode_));
    }
    const size_t replaced = replaced_.size();
    for (size_t i = 0; i < like_inputs_.size(); ++i) {
      // Before the first packing it is the user's; then the list and the step's arguments hold it.
      PyObject* input = PyList_GET_ITEM(inputs_.ptr(), static_cast<Py_ssize_t>(i));
      add_move(inputs_, i, like_inputs_[i], blocks[i], rows,
               inputs_are_ours_ && sole_owner(input, blocks[i].storage, 2, inference_mode_));
    }
    inputs_are_ours_ = true;
    inputs_replaced = replaced_.size() > replaced;
    if (a_.carry)
      moves_.push_back({a_.carry, a_.carry, static_cast<int64_t>(a_.wide ? sizeof(double) : sizeof(float))});
    {
      py::gil_scoped_release unlocked;
      fill_holes_cpu(a_.flag, running, a_.row, moves_.data(), static_cast<int64_t>(moves_.size()));
    }
    for (size_t l = 0; l < leaves_->size(); ++l)
      (*leaves_)[l].shrink(PyList_GET_ITEM(leaves.ptr(), static_cast<Py_ssize_t>(l)), running);
    for (size_t i = 0; i < like_inputs_.size(); ++i)
      like_inputs_[i].shrink(PyList_GET_ITEM(inputs_.ptr(), static_cast<Py_ssize_t>(i)), running);
    moves_.clear();
    replaced_.clear();
  }

  // Adds the move of the active rows of list[i]: in place if it is `own`, else to a new tensor that replaces
  // it.
  void add_move(const py::list& list, size_t i, const Like& like, const Block& block, int64_t rows,
                bool own) {
    if (own) {
      moves_.push_back({block.data, block.data, like.row_bytes()});
      return;
    }
    PyObject* source = PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
    replaced_.push_back(py::reinterpret_borrow<py::object>(source));
    py::object fresh = new_rows(source, rows);
    moves_.push_back({block.data, data_of(fresh.ptr(), "the packed rows"), like.row_bytes()});
    list[i] = std::move(fresh);
  }

  HaltStep a_{};
  int64_t* running_on_device_;
  int64_t device_;
  bool has_head_, reads_logits_, inference_mode_, apart_ = false, inputs_are_ours_ = false;
  std::shared_ptr<StateLike> state_;
  std::vector<Like>* leaves_;  // of `state_`
  std::shared_ptr<Schedule> schedule_;
  py::object apply_;  // makes the autograd node of a step in training, or None: the loop then works in place
  py::list inputs_, results_;
  py::object output_, carry_, cost_;  // null or None where there is none
  py::object memory_, still_;         // the tensors that hold a policy's memory
  std::vector<int64_t> index_, next_;
  std::vector<Like> like_inputs_;
  std::optional<Like> readout_;
  const Like* expected_ = nullptr;
  bool expects_apart_ = false, expects_weighted_ = false;
  std::vector<int64_t> row_, n_, sample_;  // on the CPU
  std::vector<int8_t> flag_;
  std::vector<Move> moves_;
  std::vector<py::object> replaced_;  // held until their rows have been moved
};

}  // namespace adaptcomp
