"""Tests of CPU behaviour that are skipped where the CUDA kernels run on the host: file, name and reason."""

UNCHECKED = "on CUDA the values of an index are not read, because the host would have to wait"
BUCKETS = "on CUDA blocks have the sizes of buckets, and are compacted when the count has arrived"
IN_PLACE = "only the CPU's kernels compact in place"
COPIES = "on CUDA the step gets a copy of its result, which it may overwrite, if a row may have ended"

KNOWN = "a run that is known has its tensors on the CPU"
TAPE = "on CUDA a run keeps no states: its backward pass repeats the steps"

HOST_ONLY: dict[str, str] = {
    "ops/test_boundary.py::test_a_bad_argument_is_named_with_what_was_expected_and_what_came": UNCHECKED,
    "ops/test_route.py::test_bad_input_is_refused_by_name": UNCHECKED,
    "nn/test_adaptive_halt.py::test_only_active_rows_are_stepped_when_compact": BUCKETS,
    "nn/test_adaptive_halt.py::test_row_evaluations_are_the_sum_of_the_steps": BUCKETS,
    "nn/test_adaptive_halt.py::test_auto_packs_at_once_with_gradients": BUCKETS,
    "nn/test_adaptive_halt.py::test_without_compaction_the_block_keeps_its_size": BUCKETS,
    "nn/test_adaptive_halt.py::test_nothing_runs_after_the_last_row_has_halted": BUCKETS,
    "nn/test_training.py::test_a_halted_row_costs_nothing_forward_and_backward": BUCKETS,
    "nn/test_training.py::test_longer_max_steps_cost_nothing_once_all_rows_have_halted": BUCKETS,
    "nn/test_training.py::"
    "test_memory_grows_with_the_sum_of_the_steps_and_not_with_batch_times_max_steps": BUCKETS,
    "nn/test_cost_model.py::"
    "test_auto_leaves_packing_out_where_it_does_not_pay_and_takes_it_where_it_does": BUCKETS,
    "nn/test_energy_descent.py::test_only_rows_that_go_on_are_evaluated": BUCKETS,
    "nn/test_energy_descent_errors.py::test_an_energy_that_goes_wrong_later": BUCKETS,
    "nn/test_inplace_safety.py::"
    "test_what_the_users_functions_resize_is_refused_before_its_rows_are_moved": IN_PLACE,
    "nn/test_inplace_safety.py::test_a_step_in_place_is_named_in_training": COPIES,
    "nn/test_inplace_safety.py::test_memory_that_nobody_else_sees_is_used_again": IN_PLACE,
    "nn/test_recurrence.py::test_a_run_that_is_known_is_forgotten_when_something_changes": KNOWN,
    "nn/test_recurrence.py::test_a_module_that_leads_back_to_its_halt_is_collected": KNOWN,
    "nn/test_recurrence_training.py::test_what_is_kept_grows_with_the_steps_that_were_taken": TAPE,
}
