"""Agents that act from habit and plan where planning is worth its price."""

from adaptcomp_ext.models.agents.gate import GATES, PlanGate
from adaptcomp_ext.models.agents.horizon import DeepPlan, DepthGate, DepthPlanner
from adaptcomp_ext.models.agents.maze import SWEEPS, Deliberation, MazeAgent, Seen
from adaptcomp_ext.models.agents.mppi import Plan, Planner
from adaptcomp_ext.models.agents.planning import Act, PlanningAgent, divergence
from adaptcomp_ext.models.agents.sweeps import UNKNOWN, sweep_plan, value_sweep
from adaptcomp_ext.models.agents.world import Habit, Move, WorldModel

__all__ = [
    "GATES",
    "SWEEPS",
    "UNKNOWN",
    "Act",
    "DeepPlan",
    "Deliberation",
    "DepthGate",
    "DepthPlanner",
    "Habit",
    "MazeAgent",
    "Move",
    "Plan",
    "PlanGate",
    "Planner",
    "PlanningAgent",
    "Seen",
    "WorldModel",
    "divergence",
    "sweep_plan",
    "value_sweep",
]
