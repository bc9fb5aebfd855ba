"""The halting loop: run a step on each row until a policy halts the row.

====================  ======================================================================================
``adaptive_halt``     the module `AdaptiveHalt`, its settings, and the checks of a call
``block``             one checked call, and the checks of what the user's functions return
``policy``            the base class `Policy`, what it sees and what it decides
``policies``          the policies, one to a module
``fusing``            whether the kernel may take a policy's decision
``fused``             the loop with one kernel call for each step: inference, and training of small blocks
``loop``              the loop for training, for policies in Python, and for the reference
``equilibrium``       the gradient of fixed points without the graph of the iterations that found them
``series``            its backward pass, with a length of its own for each row
``packing``           how that loop compacts a block, and how the gradient comes to the rows
``cost_model``        when compaction pays
``batch_statistics``  layers whose result for a row depends on the rows beside it
``rows_apart``        the check that no row's result depends on other rows
``first_step``        the search of the first step's graph for parameters that the module does not hold
``known``             what a run needs to know of its functions, found out once
====================  ======================================================================================

Imports go down the layers: ``adaptive_halt`` → ``fused``, ``loop`` → ``packing``, ``fusing``,
``first_step`` → ``block`` → ``policy``. The loops know no policy: one that the kernel decides brings a
`Fused`, which says what the kernel reads, what it carries from step to step, and which node its gradient has.
"""

from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt

__all__ = ["AdaptiveHalt"]
