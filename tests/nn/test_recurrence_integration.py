"""A recurrence in one kernel call inside the rest of torch: compiled, wrapped, parametrised, in threads."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

from tests.nn.test_integration import process_group  # noqa: F401  (a fixture)
from tests.nn.test_recurrence import arguments, by_kernel, make, same_results

ROWS = 9


class Around(nn.Module):
    """A model with layers before and after the run."""

    def __init__(self, halt):
        super().__init__()
        self.inside, self.halt, self.outside = nn.Linear(5, 5), halt, nn.Linear(5, 2)

    def forward(self, h, x):
        result = self.halt(self.inside(h), x)
        return self.outside(result.output), result.cost


def loss(model, *arguments):
    output, cost = model(*arguments)
    return output.square().sum() + cost.sum()


def gradients(model, *arguments):
    return torch.autograd.grad(loss(model, *arguments), list(model.parameters()))


def ways(halt, *arguments):
    return halt.plan(*arguments).way


@pytest.fixture
def model():
    return Around(make("gru", "act"))


@pytest.fixture
def given(model):
    return arguments(model.halt, ROWS)


@pytest.mark.promise("compile")
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model(model, given, training):
    compiled = torch.compile(model, backend="eager")
    with torch.set_grad_enabled(training):
        for scale in (1.0, 2.0):
            h, x = scale * given[0], given[1]
            torch.testing.assert_close(compiled(h, x), model(h, x), rtol=0, atol=0)
            if training:
                assert all(map(torch.equal, gradients(compiled, h, x), gradients(model, h, x)))


@pytest.mark.promise("distributed")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_distributed_data_parallel(model, given, process_group):  # noqa: F811
    twin = copy.deepcopy(model)
    loss(nn.parallel.DistributedDataParallel(twin), *given).backward()
    wanted = gradients(model, *given)
    assert all(torch.equal(p.grad, g) for p, g in zip(twin.parameters(), wanted, strict=True))


def test_functional_call_takes_the_parameters_that_it_is_given(model, given):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    named = dict(other.named_parameters())
    model(*given)  # a run that is known with its own parameters
    for _ in range(2):
        got = torch.func.functional_call(model, named, tuple(given))
        torch.testing.assert_close(got, other(*given), rtol=0, atol=0)
        assert got[0].requires_grad
    grads = torch.autograd.grad(got[0].sum(), list(named.values()), allow_unused=True)
    assert sum(g is not None for g in grads) >= 4


@pytest.mark.parametrize("name", ["vmap", "grad", "jacrev"])
def test_transforms_are_refused_with_the_way_out(model, given, name):
    h, x = given
    model(h, x)
    calls = {
        "vmap": lambda: torch.vmap(lambda h: model(h, x)[0])(h.expand(2, *h.shape)),
        "grad": lambda: torch.func.grad(lambda h: model(h, x)[0].sum())(h),
        "jacrev": lambda: torch.func.jacrev(lambda h: model(h, x)[0].sum())(h),
    }
    with pytest.raises(RuntimeError, match="AdaptiveHalt"):
        calls[name]()


def test_jacobians_of_autograd(given):
    halt = make("gru", "act", dtype=torch.float64)
    h, x = (t.double() for t in given)
    rows = torch.autograd.functional.jacobian(lambda h: halt(h, x).output.sum(dim=1), h)
    one = torch.autograd.functional.jacobian(lambda h: halt(h, x[:1]).output.sum(dim=1), h[:1])
    assert torch.equal(rows[0, 0], one[0, 0])
    assert not rows[0, 1:].any()


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm"])
def test_a_parametrised_weight_goes_through_the_loop(given, how):
    halt = make("gru", "act")
    by_kernel(halt, *given)
    getattr(nn.utils.parametrizations, how)(halt.step, "weight_hh")
    halt.eval()  # a spectral norm iterates in training
    with torch.no_grad():
        assert ways(halt, *given) == "loop"
        plain = make("gru", "act")
        plain.step.weight_hh.copy_(halt.step.weight_hh)
        same_results(halt(*given), by_kernel(plain, *given), 1e-5, 1e-6)
    halt.train()
    assert all(g is not None for g in torch.autograd.grad(halt(*given).output.sum(), halt.step.parameters()))


def test_hooks_are_called(model, given):
    calls = []
    model(*given)
    model.halt.step.register_forward_hook(lambda *_: calls.append("step"))
    model.halt.policy.head.register_forward_pre_hook(lambda *_: calls.append("head"))
    model(*given)
    assert {"step", "head"} == set(calls)


def test_full_backward_hooks_of_a_model_around_it(model, given):
    seen = []
    model.register_full_backward_hook(lambda *_: seen.append(True))
    given[0].requires_grad_()
    loss(model, *given).backward()
    assert seen == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_what_it_is_for_the_loop(model, given, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast("cpu", dtype=dtype):
            assert ways(model.halt, *given) == "loop"
            output = model(*given)[0]
    torch.testing.assert_close(output.float(), model(*given)[0], rtol=0.1, atol=0.1)


@pytest.mark.promise("processes")
def test_python_threads_do_not_disturb_each_other(model, given):
    expected = gradients(model, *given)
    wrong = []

    def work():
        for _ in range(20):
            if not all(map(torch.equal, gradients(model, *given), expected)):
                wrong.append(True)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_an_optimiser_with_shared_parameters(given):
    """One cell in two places of a model: its gradients add up."""
    halt = make("gru", "act")
    h, x = given

    def twice(h):
        return halt(halt(h, x).output, x).output.sum()

    ours = torch.autograd.grad(twice(h), list(halt.step.parameters()))
    handle = halt.step.register_forward_hook(lambda *_: None)
    loops = torch.autograd.grad(twice(h), list(halt.step.parameters()))
    handle.remove()
    torch.testing.assert_close(ours, loops, rtol=1e-4, atol=1e-5)


def test_a_result_that_is_detached_halfway(given):
    halt = make("gru", "act")
    h, x = given
    first = halt(h, x)
    second = halt(first.state.detach(), x)
    alone = torch.autograd.grad(second.output.sum(), list(halt.step.parameters()))
    again = torch.autograd.grad(halt(first.state.detach(), x).output.sum(), list(halt.step.parameters()))
    assert all(map(torch.equal, alone, again))
