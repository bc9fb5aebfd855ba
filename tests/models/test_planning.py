from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import adaptcomp_ext as ac
from adaptcomp_ext.models.agents import (
    DepthGate,
    DepthPlanner,
    PlanGate,
    Planner,
    PlanningAgent,
    WorldModel,
    divergence,
)
from adaptcomp_ext.models.agents.mppi import Plan

SMALL = {"samples": 64, "elites": 12, "habits": 4}


class Known(WorldModel):
    """A world with a known best action: the reward is largest where action and first latent unit agree."""

    def step(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return latent, 1 - (action[..., 0] - (2 * latent[..., 0] - 1)).square()

    def value(self, latent: Tensor, action: Tensor, slow: bool = False) -> Tensor:
        return latent.new_zeros(2, len(latent))


def world(kind: type[WorldModel] = WorldModel, actions: int = 1) -> WorldModel:
    torch.manual_seed(0)
    return kind(5, actions, latent=16, hidden=32).eval()


def states(model: WorldModel, count: int, seed: int = 1) -> Tensor:
    with torch.no_grad():
        return model.encode(torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) * 3)


@torch.no_grad()
def whole(planner: Planner, z: Tensor, plan: Plan) -> Tensor:
    """Return the value that the model expects of the complete plan."""
    return planner.score(z, plan.mean[:, None])[:, 0]


def test_latents_are_softmaxes_of_groups() -> None:
    z = states(world(), 10)
    torch.testing.assert_close(z.view(10, 2, 8).sum(2), torch.ones(10, 2))
    assert float(z.min()) >= 0


def test_planning_finds_the_best_action() -> None:
    model = world(Known)
    z = torch.zeros(20, 16)
    z[:, 0] = torch.linspace(0, 1, 20)
    torch.manual_seed(0)
    planner = Planner(model, iterations=6, tol=0.0, **SMALL)
    found = planner.plan(z)
    assert float((found.mean[:, 0, 0] - (2 * z[:, 0] - 1)).abs().mean()) < 0.05
    assert bool((whole(planner, z, found) >= found.habit - 1e-6).all()) and bool(
        (found.iterations == 6).all()
    )


@pytest.mark.parametrize(
    ("given", "horizon", "steps"), [(1, 0, 1), (3, 0, 3), (5, 0, 5), (1, 3, 3), (2, 3, 3), (5, 3, 5)]
)
def test_scores_are_the_discounted_mean_of_what_the_model_says(given: int, horizon: int, steps: int) -> None:
    model = world()
    planner = Planner(model, horizon=3, discount=0.9, **SMALL)
    z, actions = states(model, 4), torch.rand(4, 7, given, 1) * 2 - 1
    with torch.no_grad():
        model.dynamics[-1].bias[-1] = 0.5  # below the largest reward and value
        model.q.biases[-1].fill_(0.5)
        found = planner.score(z, actions, horizon)
        for i in range(4):
            for c in range(7):
                at, total = z[i : i + 1], torch.zeros(1)
                for t in range(steps):
                    at, reward = model.step(at, actions[i, c, t][None] if t < given else model.habit.best(at))
                    total = total + 0.1 * 0.9**t * reward
                total = total + 0.9**steps * model.value(at, model.habit.best(at)).mean(0)
                torch.testing.assert_close(found[i, c], total[0], rtol=1e-4, atol=1e-5)


def test_a_plan_cannot_promise_more_than_there_is() -> None:
    model = world()
    with torch.no_grad():
        model.dynamics[-1].bias[-1] = 3.0
        model.q.biases[-1].fill_(2.0)
    planner, z = Planner(model, discount=0.9, **SMALL), states(model, 5)
    found = planner.plan(z)
    torch.testing.assert_close(whole(planner, z, found), torch.ones(5))
    torch.testing.assert_close(found.first, torch.ones(5))
    torch.testing.assert_close(found.habit, torch.ones(5))


def test_each_state_stops_when_its_own_plan_has_settled() -> None:
    model = world(Known)
    z = torch.zeros(30, 16)
    z[:, 0] = torch.linspace(0, 1, 30)
    torch.manual_seed(0)
    found = Planner(model, iterations=12, tol=0.03, **SMALL).plan(z)
    assert int(found.iterations.min()) >= 2 and found.iterations.unique().numel() > 1
    assert float(found.iterations.double().mean()) < 12


def test_a_state_is_planned_alike_whatever_is_planned_beside_it() -> None:
    model = world(Known)
    z = torch.zeros(12, 16)
    z[:, 0] = torch.linspace(0, 1, 12)
    planner = Planner(model, iterations=5, tol=0.03, **SMALL)
    torch.manual_seed(7)
    together = planner.plan(z)
    for i in (0, 5, 11):
        torch.manual_seed(7)
        alone = planner.plan(z[i : i + 1])
        # The habit is a network: its product may round another way for one row.
        torch.testing.assert_close(alone.mean[0], together.mean[i], rtol=1e-4, atol=1e-5)
        assert int(alone.iterations[0]) == int(together.iterations[i])


def test_a_plan_goes_on_from_the_one_before() -> None:
    model = world(Known)
    z = states(model, 6)
    before = torch.full((6, 3, 1), 0.5)
    before[3] = torch.nan
    seen: list[Tensor] = []

    class Watch(ac.FixedSteps):
        def decide(self, view: ac.nn.View) -> ac.Decision:
            if view.step == 1:
                seen.append(view.previous[0].clone())
            return super().decide(view)

        def fuse(self) -> None:
            return None

    planner = Planner(model, **SMALL)
    torch.manual_seed(0)
    planner.plan(z, before, Watch(1))
    torch.manual_seed(0)
    habit = planner.habit_plans(z)[:, 0]
    start = seen[0]
    assert bool((start[[0, 1, 2, 4, 5]] == 0.5).all()) and torch.equal(start[3], habit[3])


def test_the_gain_is_that_of_the_first_action() -> None:
    # All rewards lie on the second step: a plan's later actions promise a lot, its first one nothing.
    class Later(Known):
        def step(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
            after, reward = super().step(latent, action)
            return after - 1, torch.where(
                latent[..., 0] > 0, torch.zeros_like(reward), -action[..., 0].square()
            )

    model = world(Later)
    with torch.no_grad():
        model.habit.out.bias[0] = 1.0  # away from the best action, 0
    agent = PlanningAgent(model, PlanGate(16, 1), iterations=6, tol=0.0, **SMALL).eval()
    agent.gate.kind = "always"
    z = torch.full((20, 16), 0.5)
    torch.manual_seed(0)
    found = agent.planner.plan(z)
    assert float((whole(agent.planner, z, found) - found.habit).min()) > 1e-3
    torch.testing.assert_close(found.first, found.habit, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.first, agent.planner.score(z, found.mean[:, None, :1], 3)[:, 0])
    observation = torch.randn(20, 5)
    torch.manual_seed(0)
    act = agent.act(observation)
    torch.manual_seed(0)
    with torch.no_grad():
        found = agent.planner.plan(model.encode(observation))
    assert torch.equal(act.gain, found.first - found.habit)


def test_nothing_is_gained_where_all_but_enough_is_won() -> None:
    # Values that differ by what they have not learned: 0.96 to 1, where everything is won.
    class Won(Known):
        def step(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
            after, reward = super().step(latent, action)
            return after, 0.96 + 0.04 * reward

    model = world(Won)
    with torch.no_grad():
        model.habit.out.bias[0] = 1.0  # away from the best action, 0
    z = torch.full((20, 16), 0.5)
    torch.manual_seed(0)
    little, much = (Planner(model, discount=0.0, enough=enough, **SMALL) for enough in (0.9, 1.0))
    plan = much.plan(z)
    assert (
        float(plan.habit.min()) > 0.9
        and float(little.glance(z).abs().max()) == 0
        and float(much.glance(z).min()) > 0
    )
    assert torch.equal(little.gain(plan.first, plan.habit), torch.zeros(20))
    worth, habit = torch.tensor([0.95, 0.5, 0.2]), torch.tensor([0.8, 0.3, 0.3])
    torch.testing.assert_close(little.gain(worth, habit), torch.tensor([0.1, 0.2, -0.1]))


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_only_what_the_gate_calls_is_planned(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = world()
    gate = PlanGate(16, 1)
    agent = PlanningAgent(model, gate, **SMALL).eval()
    observation = torch.randn(40, 5)
    with torch.no_grad():
        z = model.encode(observation)
        torch.manual_seed(1)
        glance = agent.planner.glance(z) / model.spread
        scores = gate.score(z, model.habit.parameters_of(z)[1], glance, "value")
    gate.calibrate("value", scores, rate)
    planned: list[int] = []
    real = agent.planner.plan
    monkeypatch.setattr(agent.planner, "plan", lambda z, before: planned.append(len(z)) or real(z, before))
    torch.manual_seed(1)  # the same glance
    act = agent.act(observation)
    called = int(act.called.sum())
    assert abs(called - 40 * rate) <= 1 and planned == ([called] if called else [])
    assert bool((act.iterations[act.called] > 0).all()) and bool((act.iterations[~act.called] == 0).all())
    assert torch.equal(act.glance, glance)
    for part in (act.gain, act.divergence, act.distance, act.mean[:, 0], act.following[:, 0, 0]):
        assert torch.equal(part.isnan(), ~act.called)
    with torch.no_grad():
        torch.testing.assert_close(act.action[~act.called], model.habit.best(z)[~act.called])
    assert torch.isfinite(act.action).all()


def test_the_divergence_is_that_of_two_normals_before_the_tanh() -> None:
    mean, std = 1.8 * torch.rand(8, 3) - 0.9, torch.rand(8, 3) + 0.1
    raw, log_std = 6 * torch.rand(8, 3) - 3, torch.rand(8, 3) - 0.5
    # d atanh(a) / da, by automatic differentiation
    at = mean.clone().requires_grad_()
    (slope,) = torch.autograd.grad(at.atanh().sum(), at)
    expected = kl_divergence(Normal(mean.atanh(), std * slope), Normal(raw, log_std.exp())).sum(1)
    torch.testing.assert_close(divergence(mean, std, raw, log_std), expected)


def test_a_habit_at_the_end_of_its_range_is_pulled_back() -> None:
    # Where the tanh is flat, a divergence taken after it has no gradient left: the habit would stay wrong for
    # good.
    raw = torch.full((1, 2), 9.0, requires_grad=True)
    divergence(torch.zeros(1, 2), torch.full((1, 2), 0.3), raw, torch.zeros(1, 2)).sum().backward()
    assert raw.grad is not None and bool((raw.grad > 1).all())
    assert torch.isfinite(
        divergence(torch.ones(1, 2), torch.ones(1, 2), raw.detach(), torch.zeros(1, 2))
    ).all()


@pytest.mark.parametrize("width", [1.0, 0.03])
def test_the_gate_learns_which_states_gain(width: float) -> None:
    # Units of a latent state lie close together: what the gate tells apart must not depend on how close.
    torch.manual_seed(0)
    unit, log_std = torch.rand(2000, 16), torch.zeros(2000, 1)
    z = 0.1 + width * unit
    worth = (unit[:, 0] > 0.7).float()
    gain = 0.005 * worth + 0.002 * torch.randn(2000)  # a few units of what a decision gains
    apart = 2 * (1 - worth) + torch.rand(2000)
    glance = torch.rand(2000)
    gate = PlanGate(16, 1, price=0.002)
    optimizer = torch.optim.Adam(gate.parameters(), 3e-3)
    for _ in range(800):
        rows = torch.randint(2000, (256,))
        loss = gate.loss(z[rows], log_std[rows], glance[rows], gain[rows], apart[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    called = gate(z, log_std, glance).float()
    assert float((called == worth).float().mean()) > 0.93
    scores = gate.score(z, log_std, glance, "kl").detach()
    assert float(scores[worth == 0].mean()) > 2 * float(scores[worth == 1].mean())


def test_the_gate_goes_by_the_glance() -> None:
    # The states tell nothing: only the glance does, and over three powers of ten.
    torch.manual_seed(0)
    z, log_std = torch.rand(2000, 16), torch.rand(2000, 1)
    gain = 10 ** (3 * torch.rand(2000) - 4)
    glance = 0.5 * gain * (0.2 * torch.randn(2000)).exp()
    gate = PlanGate(16, 1)
    optimizer = torch.optim.Adam(gate.parameters(), 3e-3)
    for _ in range(800):
        rows = torch.randint(2000, (256,))
        loss = gate.loss(z[rows], log_std[rows], glance[rows], gain[rows], torch.ones(256))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        ranks = [values.argsort().argsort().float() for values in (gate.score(z, log_std, glance), gain)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.9


def test_a_glance_promises_what_its_best_first_action_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    model = world()
    planner = Planner(model, **SMALL)
    z = states(model, 7)
    seen: list[Tensor] = []
    real = planner.score
    monkeypatch.setattr(
        planner, "score", lambda z, actions, horizon: seen.append(actions) or real(z, actions, horizon)
    )
    glance = planner.glance(z)
    (tried,) = seen
    worth = real(z, tried, planner.horizon)
    assert glance.shape == (7,) and bool((glance >= 0).all()) and tried.shape == (7, 9, 1, 1)
    torch.testing.assert_close(tried[:, 0], planner.habit_plans(z, count=1)[:, 0, :1])
    torch.testing.assert_close(glance, worth.max(1).values - worth[:, 0])
    assert bool((tried.abs() <= 1).all())
    torch.testing.assert_close(planner.glance(z[:0]), torch.empty(0))


def test_a_new_gate_plans_everywhere() -> None:
    torch.manual_seed(0)
    model = world()
    z = states(model, 50)
    with torch.no_grad():
        log_std = model.habit.parameters_of(z)[1]
    assert bool(PlanGate(16, 1)(z, log_std, torch.zeros(50)).all())


def test_gates_at_their_ends() -> None:
    z, log_std, glance = torch.rand(50, 16), torch.rand(50, 1), torch.rand(50)
    gate = PlanGate(16, 1, explore=0.5)
    for kind, rate in (("always", 1.0), ("never", 0.0)):
        gate.kind = kind
        assert float(gate(z, log_std, glance).float().mean()) == rate
    gate.kind = "random"
    for rate in (0.0, 1.0):
        gate.calibrate("random", torch.empty(0), rate)
        assert float(gate(z, log_std, glance).float().mean()) == rate
    gate.kind = "value"
    gate.thresholds[0] = 1e9
    assert (
        not bool(gate(z, log_std, glance).any())
        and 0 < float(gate(z, log_std, glance, explore=True).float().mean()) < 1
    )
    broken = z.clone()
    broken[3] = torch.nan
    assert gate(broken, log_std, glance).nonzero()[:, 0].tolist() == [3]
    with pytest.raises(ValueError, match="kind: expected one of"):
        gate.score(z, log_std, glance, "sometimes")


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_depth_is_how_far_a_plan_looks(depth: int) -> None:
    model = world(Known)
    planner = DepthPlanner(Planner(model, **SMALL), levels=(1, 2, 5))
    z = states(model, 9)
    torch.manual_seed(0)
    found = planner.plan(z, torch.full((9,), depth))
    assert found.horizon.tolist() == [(0, 1, 2, 5)[depth]] * 9
    torch.manual_seed(0)
    mixed = planner.plan(z, torch.arange(9) % 4)
    rows = torch.arange(9) % 4 == depth
    torch.testing.assert_close(mixed.action[rows], found.action[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed.worth[rows], found.worth[rows], rtol=1e-4, atol=1e-5)
    if depth == 0:
        with torch.no_grad():
            torch.testing.assert_close(found.action, model.habit.best(z))


def test_a_level_gains_what_its_first_action_is_worth_when_all_that_follows_is_planned() -> None:
    model = world(Known)
    planner = DepthPlanner(Planner(model, **SMALL), levels=(1, 2, 5))
    z = states(model, 9)
    torch.manual_seed(0)
    gains = planner.gains(z)
    worths = []
    for depth in range(4):
        torch.manual_seed(0)  # one noise for all depths
        action = planner.plan(z, torch.full((9,), depth)).action
        with torch.no_grad():
            after, reward = model.step(z, action)
        discount = planner.planner.discount
        worths.append(
            (1 - discount) * reward.clamp(max=1.0) + discount * planner.plan(after, torch.full((9,), 3)).worth
        )
    torch.testing.assert_close(gains, torch.stack(worths, 1).diff(dim=1), rtol=1e-3, atol=1e-5)
    assert float(gains.abs().max()) > 1e-3


def test_the_depth_gate_learns_gains_of_either_sign() -> None:
    torch.manual_seed(0)
    latent, log_std = torch.rand(1500, 16) / 8, torch.randn(1500, 1)
    # Small against the features and against 1, as gains of a single decision are.
    truth = torch.stack([1e-3 * log_std[:, 0], -2e-3 * latent[:, 0]], 1)
    gate = DepthGate(16, 1, levels=(1, 4))
    assert bool((gate.gains(latent, log_std) == 0).all())
    history = gate.fit(
        latent[:1200], log_std[:1200], truth[:1200] + 0.3 * truth.std(0) * torch.randn(1200, 2)
    )
    assert history[-1] < 0.4 * history[0]
    with torch.no_grad():
        error = gate.gains(latent[1200:], log_std[1200:]) - truth[1200:]
    assert bool((error.square().mean(0) < 0.2 * truth.var(0)).all())
    with pytest.raises(ValueError, match="at least two rows"):
        gate.fit(latent[:1], log_std[:1], truth[:1])


def test_the_depth_is_the_best_by_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = DepthGate(16, 1, levels=(1, 2, 4), price=0.01)
    gains = torch.tensor([[0.0, 0.0, 0.0], [0.05, 0.0, 0.0], [0.0, 0.0, 0.09], [0.02, 0.03, 0.05]])
    monkeypatch.setattr(gate, "gains", lambda z, log_std: gains)
    # Costs 0.01, 0.02, 0.04: the third row goes through two levels that do not pay for themselves, for one
    # that pays for all.
    assert gate(torch.zeros(4, 16), torch.zeros(4, 1)).tolist() == [0, 1, 3, 3]


def test_the_slow_values_follow() -> None:
    model = world()
    with torch.no_grad():
        for p in model.q.parameters():
            p.add_(1.0)
    before = copy.deepcopy(model.slow_q)
    model.follow(0.25)
    for slow, old, fast in zip(
        model.slow_q.parameters(), before.parameters(), model.q.parameters(), strict=True
    ):
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: Planner(m, horizon=0), "horizon: expected"),
        (lambda m: Planner(m, samples=16), "samples: expected"),
        (lambda m: Planner(m, samples=64, elites=65), "elites: expected at most samples = 64, got 65"),
        (lambda m: Planner(m, tol=-1.0), "tol: "),
        (lambda m: DepthPlanner(Planner(m), levels=(2, 1)), "levels: expected increasing"),
        (lambda m: WorldModel(5, 1, latent=12), "latent: expected a multiple of 8, got 12"),
        (
            lambda m: DepthPlanner(Planner(m)).plan(torch.zeros(2, 16), torch.tensor([0, 9])),
            "depth: expected 0 to 4",
        ),
    ],
)
def test_bad_options_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(world())
