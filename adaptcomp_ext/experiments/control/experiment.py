"""The experiment: its options and cells, and its report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ..runs import Cell, FirstSeed, Later, Listed, Quick, Results, Seeds, Setup, Steps, Task, experiment, grid
from ..runs.report import Block, Column, Picture, Table, Verdicts, column, tabulate
from ..runs.statistics import estimate, form, interval, points, said
from ..style import ORANGE, OTHERS, OURS, WIDTH, WRONG, band, curve, legend
from .measure import FRAMES_NAME, measure
from .training import preset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGENTS = {
    "always": "plans everywhere",
    "value": "plans where it pays",
    "never": "never plans",
    "random": "plans as often at random",
}
"""The agents: their gates, and what they do in the words of the report."""
COLORS = {"always": OTHERS, "value": OURS, "never": WRONG, "random": ORANGE}
GATES = ("value", "kl", "entropy", "random", "always", "never")
"""How the value gate's agent is made to plan, once trained."""
SPREAD = "in units of the value estimates' range from their 5th to their 95th percentile"


@experiment(
    Later("adaptcomp_ext.experiments.environments.control", measure), out="adaptcomp-out/control-{task}"
)
def control(
    task: Task = "pendulum-swingup",
    *,
    steps: Steps = None,
    agents: Annotated[
        Sequence[str], Listed(str), typer.Option(help="Agents to train, with commas between them.")
    ] = tuple(AGENTS),
    price: Annotated[
        float | None,
        typer.Option(min=0.0, help=f"Price of one plan, {SPREAD}. Default: what suits the task."),
    ] = None,
    test_price: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Price of one plan in tests. Default: what suits the task; --price where that is given.",
        ),
    ] = None,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    quick: Quick = False,
) -> Setup:
    """Learn to control, planning everywhere, where it pays, at random or never. Half an hour per seed."""
    settings = preset(task, steps=steps, quick=quick)
    if price is not None:
        settings = replace(settings, price=price, test_price=None)
    if test_price is not None:
        settings = replace(settings, test_price=test_price)
    unknown = [name for name in agents if name not in AGENTS]
    if unknown or not agents:
        raise ValueError(f"agents: expected some of {', '.join(AGENTS)}, got {', '.join(unknown) or 'none'}")
    if "random" in agents and "value" not in agents:
        raise ValueError("agents: expected value with random, which plans as often, got random without it")
    every = list(range(first_seed, first_seed + seeds))
    measured: dict[str, Any] = {
        "episodes": 2 if quick else 20,
        "checks": 1 if quick else 3,
        "check_episodes": 2 if quick else 5,
        "length": 30 if quick else None,
    }

    def matched(results: Results) -> list[Cell]:
        """Lay out the random gate's cells: it plans as often in each round as the seed's value gate did."""
        rates = {s: [r["rate"] for r in results.found[f"value-seed-{s}"]["history"]] for s in every}
        random = asdict(replace(settings, gate="random"))
        return [
            Cell(f"random-seed-{seed}", {"settings": {**random, "rates": rates[seed]}, **measured}, seed)
            for seed in every
        ]

    first = {name: {"settings": asdict(replace(settings, gate=name))} for name in AGENTS if name in agents}
    first.pop("random", None)
    config = {"settings": asdict(settings), "agents": list(agents), "seeds": every, "quick": quick}
    return Setup(
        {**config, **measured}, grid(first, every, measured), then=matched if "random" in agents else None
    )


class _Found:
    """The results under the names of the report; empty what belongs to a value gate that there is not."""

    def __init__(self, results: Results) -> None:
        names = [name for name in AGENTS if name in results.config["agents"]]
        self.agents = {name: results.where(settings__gate=name) for name in names}
        self.checks = {name: _by(row, "checks", "round") for name, row in self.agents.items()}
        self.value, self.way = self.agents.get("value"), self.checks.get("value", {})
        self.prices = _by(self.value, "prices", "price") if self.value else {}
        rivals = ("always", "random") if self.value else ()
        self.rivals = {name: self.agents[name] for name in rivals if name in names}


def _by(row: Results, path: str, key: str) -> dict[Any, Results]:
    """The entries of a list in the results, by one of their quantities."""
    return {entry[key]: row.at(f"{path}/{i}") for i, entry in enumerate(row.first(path))}


_return, _share, _signed = form(0, 1.0), form(), partial(points, digits=0, scale=1.0)
RETURN_AND_RATE = (Column("return", "return", _return), Column("planned, %", "rate", _share))


def _seconds(row: Results) -> Any:
    return row["training/act"] + row["training/simulate"] + row["training/learn"]


def _saved(value: Results, rival: Results) -> Any:
    return 1 - _seconds(value) / _seconds(rival)


def _over_rounds(row: Results, key: str, since: int = 0) -> Any:
    """Mean over the rounds of the training from `since` on."""
    rounds = row.each("history", key)[since:]
    return sum(rounds) / len(rounds)


def _training_rate(row: Results) -> Any:
    return _over_rounds(row, "rate", row.first("warm"))


def _learned(value: Results, rival: Results) -> Any:
    """Mean return over the whole training less the rival's: which of the two learned faster."""
    return _over_rounds(value, "return") - _over_rounds(rival, "return")


def _less(rival: Results, path: str, row: Results) -> Any:
    return row["return"] - rival[f"{path or row.path}/return"]


def _contrast(where: Results, by: str) -> Any:
    """Share of the states that the gate calls in the highest third of a quantity less that in the lowest."""
    return where[f"rate by {by}/2"] - where[f"rate by {by}/0"]


@control.reports
def report(results: Results) -> list[Block]:
    """What planning costs and is worth, and where the gate plans."""
    found, config = _Found(results), results.config
    settings, value = config["settings"], found.value
    price, in_tests = settings["price"], settings["test_price"]
    tested = "" if in_tests is None else f" while it learns, {in_tests:g} in evaluations"
    sentences = [*_sentences(found), *(_gate_sentences(found, value, (price, in_tests)) if value else [])]
    panels = (_learning, _rate, _cost) if value else (_learning, _cost)
    return [
        f"# Planning on demand: {settings['task']}",
        f"{settings['envs']} environments, action repeat 2, {settings['rounds']} rounds of "
        f"{settings['episode']} decisions in each; a plan costs {price:g} of the spread of values{tested}; "
        f"{results.opening} Evaluations are {config['episodes']} episodes of the suite's own length (a "
        "return of at most 1,000), without exploration.",
        column("control.png", "Learning and planning", found, *panels),
        Verdicts([*sentences, _broken(found)]),
        *([_strip(value)] if value else []),
        "## Agents",
        tabulate(
            "agent",
            {AGENTS[name]: row for name, row in found.agents.items()},
            Column("return", "own/return", _return),
            Column("training, s", _seconds, _return),
            Column("of it acting, %", lambda row: row["training/act"] / _seconds(row), _share),
            Column("planned in training, %", _training_rate, _share),
            Column("at the end, %", "own/rate", _share),
            Column("iterations of a plan", "own/iterations", form(2, 1.0)),
        ),
        *(_gated(found, value) if value else []),
        "## Evaluations on the way",
        tabulate(
            ("agent", "round"),
            {
                (AGENTS[name], str(number)): check
                for name, checks in found.checks.items()
                for number, check in checks.items()
            },
            *RETURN_AND_RATE,
        ),
    ]


def _gated(found: _Found, value: Results) -> list[Block]:
    """The tables of the agent with the value gate."""

    def less(path: str = "") -> list[Column]:
        """Columns of the return less that of the rivals: theirs at `path`, or where the row has its own."""
        return [
            Column(f"− one that {AGENTS[name]}", partial(_less, rival, path), _signed)
            for name, rival in found.rivals.items()
        ]

    everywhere, chosen = value["gates/always/return"], value["gates/value/return"]
    where = {f"round {number}": check.at("where") for number, check in found.way.items()}
    where["at the end"] = value.at("where")
    thirds = [
        [
            when,
            by,
            *(_share(row[f"rate by {by}/{third}"]) for third in range(3)),
            points(_contrast(row, by)),
            interval(row[f"rank correlation with {by}"], 2, 1.0),
        ]
        for when, row in where.items()
        for by in ("distance", "divergence", "gain")
    ]
    against: list[Block] = [
        "## The gated agent against others",
        tabulate(
            "less the agent that",
            {AGENTS[name]: rival for name, rival in found.rivals.items()},
            Column("return at the end", lambda rival: value["own/return"] - rival["own/return"], _signed),
            Column("return over the whole training", partial(_learned, value), _signed),
            Column("training time saved, %", partial(_saved, value), _share),
        ),
    ]
    return [
        *(against if found.rivals else []),
        "## The gated agent, made to plan by other gates",
        tabulate(
            "gate",
            {kind: value.at(f"gates/{kind}") for kind in GATES},
            *RETURN_AND_RATE,
            Column("value gate −", lambda row: chosen - row["return"], _signed),
        ),
        "## The gated agent, tested at other prices than it was trained at",
        tabulate(
            "price",
            {f"{price:g}": row for price, row in found.prices.items()},
            *RETURN_AND_RATE,
            Column("− itself, planning everywhere", lambda row: row["return"] - everywhere, _signed),
            *less("own"),
        ),
        "## Where the gated agent plans",
        "The table shows what the gate calls of each third of the states. They are ordered by how far the "
        "first actions of habit and plan are apart (distance of their means; KL divergence), or by what the "
        "plan's first action gains; every state is planned to measure that. The last column is the rank "
        "correlation of the gate's score with it.",
        Table(["when", "ordered by", "least, %", "between, %", "most, %", "most − least", "score"], thirds),
        "## The gated agent while it learns",
        tabulate(
            "round",
            {str(number): check for number, check in found.way.items()},
            *RETURN_AND_RATE,
            Column("− as many at random", lambda row: row["return"] - row["at random"], _signed),
            *less(),
        ),
    ]


def _differs(value: Any, more: str = "more", less: str = "less") -> str:
    return f"{_signed(value)} ({said(value, more, less)})"


def _sentences(found: _Found) -> list[str]:
    """Say what each agent returns and costs, and how the gated one compares."""
    sentences = [
        f"The agent that {AGENTS[name]} returns {_return(row['own/return'])} after {row.first('steps'):,} "
        f"steps and {_return(_seconds(row))} s of training. It planned {_share(_training_rate(row))} % of "
        f"the states while it learned and {_share(row['own/rate'])} % at the end."
        for name, row in found.agents.items()
    ]
    for name, rival in found.rivals.items():
        value = found.agents["value"]
        way = (
            f"{_differs(check['return'] - rival[f'{check.path}/return'])} after {number} rounds"
            for number, check in found.way.items()
        )
        sentences.append(
            f"Against the agent that {AGENTS[name]}, the gated agent's return differs by "
            f"{_differs(value['own/return'] - rival['own/return'])} at the end and by "
            f"{_differs(_learned(value, rival))} over the whole training; on the way it differs by "
            f"{'; '.join(way)}. Its training takes {_share(_saved(value, rival))} % less time."
        )
    return sentences


def _gate_sentences(found: _Found, value: Results, prices: tuple[float, float | None]) -> list[str]:
    """Say what the gate's choices are worth at its `prices`, and where it plans."""
    dealt, where = value.at("gates/random"), value.at("where")
    sentences = [
        f"When the trained agent is made to plan at random in {_share(dealt['rate'])} % of the states, the "
        f"gate's own choice is worth {_differs(value['gates/value/return'] - dealt['return'])}."
    ]
    sentences += [
        f"Tested at a price of {price:g} it plans {_share(row['rate'])} % of the states, and its return "
        f"differs by {_differs(row['return'] - value['gates/always/return'])} from its own when it plans "
        "everywhere."
        for price, row in found.prices.items()
        if price in prices
    ]
    early = next(iter(found.way))
    for when, row in ((f"After {early} rounds", found.way[early].at("where")), ("At the end", where)):
        apart = said(_contrast(row, "distance"), "more where they disagree", "less there")
        sentences.append(
            f"{when} the gate calls {_share(row['rate by distance/0'])} % of the third of the states in "
            f"which habit and plan would do much the same, and {_share(row['rate by distance/2'])} % of the "
            f"third in which their actions are furthest apart ({apart}). The rank correlation of its score "
            f"with the gain is {interval(row['rank correlation with gain'], 2, 1.0)}."
        )
    sentences.append(
        f"At the end the gate calls {_share(where['rate by gain/0'])} % of the third of the states in which "
        f"the plan's first action gains least, and {_share(where['rate by gain/2'])} % of the third in which "
        f"it gains most: {points(_contrast(where, 'gain'))} points "
        f"({said(_contrast(where, 'gain'), 'more', 'less')})."
    )
    sentences += [
        f"After {number} rounds, planning {_share(check['rate'])} % of the states, the gate's choice is "
        f"worth {_differs(check['return'] - check['at random'])} against as many states at random."
        for number, check in found.way.items()
    ]
    acted = [mean for rate in value.each("history", "rate") if (mean := estimate(rate).mean) > 0]
    if acted:
        part = max(1, len(acted) // 4)
        first, last = (100 * sum(rates) / part for rates in (acted[:part], acted[-part:]))
        sentences.append(
            f"While the habit learns, the mean planning rate is {first:.0f} % in the first quarter and "
            f"{last:.0f} % in the last."
        )
    return sentences


def _broken(found: _Found) -> str:
    rows = found.agents.values()
    broken = sum((row["own/broken"] + sum(row.each("history", "broken"))).sum() for row in rows)
    return f"Episodes that the simulator ended because a number was not finite: {broken:.0f}."


def _bands(axes: Axes, found: _Found, key: str, names: Iterable[str], scale: float = 1.0) -> None:
    """A quantity of the training's history, for each of the agents that were trained."""
    for name in names:
        if name in found.agents:
            row = found.agents[name]
            values, steps = row.each("history", key), row.first("steps")
            thousands = [steps / len(values) * (i + 1) / 1e3 for i in range(len(values))]
            band(axes, thousands, values, AGENTS[name], scale=scale, color=COLORS[name])
    axes.set(xlabel="steps, thousands", xlim=(0, None))
    legend(axes)


def _learning(axes: Axes, found: _Found) -> None:
    axes.set_title("Learning (exploring, short episodes)")
    axes.set_ylabel("return, per 1,000 steps")
    _bands(axes, found, "return", AGENTS)


def _rate(axes: Axes, found: _Found) -> None:
    axes.set_title("How often it plans")
    axes.set(ylabel="states planned, %", ylim=(0, 100))
    _bands(axes, found, "rate", ("value", "random"), 100)


def _cost(axes: Axes, found: _Found) -> None:
    for name, row in found.agents.items():
        curve(axes, [_seconds(row)], [row["own/return"]], AGENTS[name], x_bars=True, color=COLORS[name])
    axes.set(xlabel="training, s", ylabel="return at the end")
    axes.set_title("What it took")
    axes.set_xlim(left=0)
    # From 0, as returns are: the axis would else be cut to the little by which single dots differ.
    axes.set_ylim(0, 1.15 * max(1.0, axes.get_ylim()[1]))
    legend(axes)


def _strip(value: Results) -> Picture:
    path = value.files / FRAMES_NAME
    frames = list(np.load(path)) if path.is_file() else []
    draw = partial(_episode, strip=value.first("strip"), frames=frames)
    size = (WIDTH, 6.5 if frames else 5.5)
    return Picture("control_episode.png", "The episode that was planned most", draw, size)


def _episode(figure: Figure, strip: dict[str, Any], frames: Sequence[Any]) -> None:
    """Draw an episode: pictures if there are any, rewards, and the planner's iterations in each state."""
    if frames:
        pictures, reward, iterations = figure.subplots(3, 1, height_ratios=(1, 2, 2))
        pictures.imshow(np.concatenate(list(frames), axis=1))
        pictures.set_axis_off()
    else:
        reward, iterations = figure.subplots(2, 1)
    reward.plot(strip["reward"], color=ORANGE, lw=1.6)
    reward.set(ylabel="reward", ylim=(0, 1.1 * max(1e-9, *strip["reward"])))
    reward.set_title("The episode that was planned most")
    iterations.bar(range(len(strip["iterations"])), strip["iterations"], 1.0, color=OURS)
    iterations.set(xlabel="decision", ylabel="iterations")
    iterations.sharex(reward)
