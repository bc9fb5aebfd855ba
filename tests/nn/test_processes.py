"""Two processes train one model: rows halt at different steps, and the gradients are those of one."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac

PROGRAM = Path(__file__).parents[1] / "helpers" / "two_processes.py"


def has_fully_shard():
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def found():
    """What both processes have found; a dead lock ends as a time-out."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(PROGRAM),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [
        line for line in done.stdout.replace("FOUND", "\nFOUND").splitlines() if line.startswith("FOUND")
    ]
    assert len(lines) == 2, done.stdout
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


@pytest.mark.promise("distributed")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.skipif(not has_fully_shard(), reason="this torch has no fully_shard")
def test_the_gradients_of_two_processes_are_those_of_one(found):
    wrong = [(rank, name) for rank, each in enumerate(found) for name, right in each.items() if not right]
    assert not wrong
    names = set().union(*found)
    assert {"DDP, stages", "DDP, fixed, static graph", "FSDP, act", "FSDP, pondernet, inference"} <= names


@pytest.mark.parametrize("value", [1, "gloo", object()])
def test_a_process_group_is_one_of_torch(value):
    with pytest.raises(
        TypeError, match=r"process_group: expected a torch\.distributed\.ProcessGroup or None"
    ):
        ac.AdaptiveHalt(nn.Linear(3, 3), ac.FixedSteps(1), process_group=value)


def test_without_a_group_there_is_none():
    halt = ac.AdaptiveHalt(nn.Linear(3, 3), ac.FixedSteps(1))
    assert halt.process_group is None and pickle.loads(pickle.dumps(halt)).process_group is None
