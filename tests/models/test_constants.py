"""Models that are made on meta, emptied, loaded or moved keep the buffers that no state_dict holds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from adaptcomp_ext import models
from adaptcomp_ext.models.agents import SWEEPS, MazeAgent, WorldModel

MAKE = {"maze": lambda: MazeAgent(reach=1, hidden=8), "world": lambda: WorldModel(5, 2, latent=16, hidden=8)}


def answer(model: nn.Module) -> torch.Tensor:
    if isinstance(model, MazeAgent):
        assert model.numbers.tolist() == list(SWEEPS)
        walls = torch.zeros(2, 5, 5)
        position, goal = torch.tensor([[0, 0], [3, 2]]), torch.tensor([[4, 4], [1, 2]])
        logits, gate = model.react(model.features(walls, position, goal))
        return torch.cat([logits, gate, model.prior.expand(2, -1)], 1)
    model.habit.eval()
    torch.manual_seed(3)
    return model.habit.best(model.encode(torch.randn(2, 5)))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("how", ["empty", "meta, empty", "meta, assign"])
def test_loaded_models_answer_alike(name: str, how: str) -> None:
    torch.manual_seed(0)
    model = MAKE[name]()
    torch.manual_seed(1)
    with torch.device("meta" if "meta" in how else "cpu"):
        other = MAKE[name]()
    if "empty" in how:
        torch.use_deterministic_algorithms(True)  # fills what is empty with NaN, or the largest integer
        try:
            other.to_empty(device="cpu")
        finally:
            torch.use_deterministic_algorithms(False)
    other.load_state_dict(model.state_dict(), assign="assign" in how)
    torch.testing.assert_close(answer(other), answer(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKE)
def test_constants_are_not_saved_and_follow_the_dtype(name: str) -> None:
    model = MAKE[name]()
    names = [n for n, _ in model.named_buffers() if n.rpartition(".")[2] in ("numbers", "blocks")]
    assert names and not set(names) & set(model.state_dict())
    expected = answer(model)
    torch.testing.assert_close(answer(model.double().float()), expected, rtol=0, atol=0)
    if name == "world":
        assert model.half().get_buffer(names[0]).dtype == torch.float16


def test_every_buffer_that_is_not_saved_survives() -> None:
    """All of the package's modules that have such buffers register them as constants."""
    found = []
    for path in Path(models.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "persistent":
                found.append(path.name)
    assert found == ["_constants.py"]


def test_a_maze_agent_of_an_older_version_loads() -> None:
    saved = MAKE["maze"]().state_dict()
    del saved["prior"]
    agent = MAKE["maze"]()
    prior = agent.prior.clone()
    agent.load_state_dict(saved)
    assert torch.equal(agent.prior, prior)
    agent.prior.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"Missing key.*prior"):
        agent.load_state_dict(saved)
