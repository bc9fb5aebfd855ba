// A whole adaptive run of a recurrent cell in one call: every row takes its steps until its policy halts it.
//
// The cells are those of adaptcomp_ext.cells, with the input constant over the steps of a row:
//
//   GRU   r, z = sigmoid(gi + gh);  n = tanh(gi_n + r gh_n);  h' = n + z (h - n)
//   LSTM  i, f, o = sigmoid(gi + gh);  g = tanh(gi_g + gh_g);  c' = f c + i g;  h' = o tanh(c')
//   MLP   s' = [s +] W_2 act(gi + W_s s) + b_2
//
// with gi = W_ih x + b_ih, computed once for each row, and gh = W_hh h + b_hh. The policies are those of the
// halting step, whose row arithmetic decides here, too. `given` stands for convergence: a row halts when its
// readout r has changed by |r_n - r_{n-1}| <= threshold, or threshold |r_n|, in `parameter` consecutive
// steps.
#pragma once

#include <cstdint>

#include "common/interrupt.h"
#include "common/scratch.h"
#include "halting/halting.h"
#include "mlp_energy/rows.h"
#include "recurrence/tape.h"

namespace adaptcomp {

enum class CellKind : int64_t { gru = 0, lstm = 1, mlp = 2 };

// All numbers are double if halt.wide, else float. Matrices are [to, from], contiguous.
struct Recurrence {
  int64_t rows, input, dim, hidden;  // widths of input and state; of the MLP's hidden layer
  CellKind cell;
  Activation activation;     // of the MLP
  bool residual;             // of the MLP
  const void* x;             // [rows, input]; null: no input
  const void* state[2];      // [rows, dim] each; the LSTM has h and c
  const void* weight_ih;     // [gates, input]; gates: 3 dim (r, z, n), 4 dim (i, f, g, o) or hidden
  const void* weight_hh;     // [gates, dim]
  const void* bias_ih;       // [gates], or null: zero
  const void* bias_hh;       // [gates], or null: zero
  const void* weight2;       // [dim, hidden], of the MLP
  const void* bias2;         // [dim], of the MLP
  const void* head;          // [dim]: the halting logit's weights; null: the policy has no head
  const void* head_bias;     // [1], or null: zero
  const void* readout;       // [width, dim]; null: the readout is the first tensor of the state
  const void* readout_bias;  // [width], or null: zero
  int64_t width;             // of the readout
  void* output;              // [rows, width] out: zero before where the policy weights; null: not wanted
  void* result[2];           // [rows, dim] out: each row's last state
  void* cost;                // [rows] out, zero before: the policy's cost; null: it has none
  // policy, threshold, parameter, min_steps, max_steps, wide; signal and sample as in a halting step of the
  // whole batch; steps and status: out
  HaltStep halt;
  // PonderNet in training: all steps, by their distribution. log_epsilon is the halt's threshold; the prior's
  // logarithm is (n - min_steps) log_decay - log_total at step n.
  bool expects;
  double log_decay, log_total;
  bool relative;         // of convergence: the threshold is one of |r_n|
  Tape* tape;            // filled for the backward pass; null: there is none
  Interrupt* interrupt;  // null: runs to the end
};

void recurrence_cpu(const Recurrence& recurrence);
// PonderNet in training and the tape are the CPU's alone.
void recurrence_cuda(const Recurrence& recurrence, const DeviceScratch& scratch, int64_t device,
                     void* stream);
// Bytes of scratch of a call; -1 if a row does not fit on the device. No pointer is followed: of matrices it
// counts whether they are there.
int64_t recurrence_scratch_cuda(const Recurrence& recurrence, int64_t device);

// All steps of a run that has ended, ordered by step and then by row; `steps` and `count` are those of the
// run.
struct RecurrenceTrace {
  const Tape* tape;
  const int64_t* steps;  // [rows]
  int64_t rows, dim;
  bool wide;
  void* states;         // [sum of steps, dim] out: the first tensor of the state
  void* weights;        // [sum of steps] out
  int64_t *row, *step;  // [sum of steps] out
};

void recurrence_trace_cpu(const RecurrenceTrace& trace);

// The gradients of a run, with the number of steps of each row held constant. A row that ended NONFINITE
// passes none back. A gradient that is null is zero on the way in and not wanted on the way out; those in
// parameters are sums over rows, in an order that depends on the number of threads alone.
//
// With ACT, output = sum_n w_n readout(h_n), w_n = p_n for n < N and 1 - sum p_n for N, so that
//
//   d logit_n = (g . (readout(h_n) - readout(h_N)) - g_cost) p_n (1 - p_n)  for n < N, and 0 for N
//
// With PonderNet the adjoint of a step is that of its family (pondernet/rows.h).
struct RecurrenceBackward {
  Recurrence run;           // as in the forward pass; output, result, cost, steps and status are not used
  const void* g_output;     // [rows, width]
  const void* g_result[2];  // [rows, dim] each
  const void* g_cost;       // [rows]
  const void* g_trace;      // [sum of steps, dim]: in the states of the trace
  const void* g_weight;     // [sum of steps]
  void* g_x;                // [rows, input] out
  void* g_state[2];         // [rows, dim] each, out
  void *g_weight_ih, *g_weight_hh, *g_bias_ih, *g_bias_hh, *g_weight2, *g_bias2;  // out, as in Recurrence
  void *g_head, *g_head_bias, *g_readout, *g_readout_bias;
};

void recurrence_backward_cpu(const RecurrenceBackward& backward);
// Every row is run forward once more, from its initial state, for the number of steps that it took.
void recurrence_backward_cuda(const RecurrenceBackward& backward, const DeviceScratch& scratch,
                              int64_t device, void* stream);
int64_t recurrence_backward_scratch_cuda(const RecurrenceBackward& backward, int64_t device);

}  // namespace adaptcomp
