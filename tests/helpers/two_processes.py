"""The program of `tests/nn/test_processes.py`: it runs in each of two processes, and prints what it finds."""

import contextlib
import copy
import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import adaptcomp_ext as ac
from tests.helpers.steps import Step

D, M, ROWS = 6, 5, 4


class Net(nn.Module):
    def __init__(self, policy, step, **options):
        super().__init__()
        self.encode = nn.Linear(D, D)
        self.halt = ac.AdaptiveHalt(step, policy, max_steps=M, **options)

    def forward(self, x):
        result = self.halt(self.encode(x), x)
        return (result.output.square().sum(-1) + 0.1 * result.cost).mean()


def made(name, rank):
    """Return a network whose rows halt after another number of steps in each process."""
    torch.manual_seed(3)
    head = nn.Linear(D, 1)
    policy = {
        "fixed": lambda: ac.FixedSteps(1 if rank == 0 else 4),
        "act": lambda: ac.ACT(head),
        "pondernet": lambda: ac.PonderNet(head, epsilon=0.05),
        "confidence": lambda: ac.Confidence(0.3),
        "stages": lambda: ac.FixedSteps(1 if rank == 0 else 3),
        "cell": lambda: ac.ACT(head),
    }[name]()
    if name == "act":
        head.bias.data.fill_(2.0 if rank == 0 else -2.0)  # broadcast below, by DDP or by hand
    step = {
        "stages": lambda: nn.ModuleList([Step() for _ in range(3)]),
        "cell": lambda: ac.cells.GRU(D, D),
    }.get(name, Step)()
    net = Net(policy, step)
    for p in net.parameters():
        dist.broadcast(p.data, 0)
    return net


def averaged(net, batches, world):
    """Return each gradient as one process has it: summed over the batches, averaged over the ranks."""
    for x in batches:
        net(x).backward()
    found = {}
    for name, p in net.named_parameters():
        g = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(g)
        found[name] = g / world
    return found


def agrees(gradients, wanted):
    return all(
        torch.allclose(torch.zeros_like(w) if gradients[n] is None else gradients[n], w, atol=1e-6)
        for n, w in wanted.items()
    )


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = torch.randn(2, world * ROWS, D, generator=torch.Generator().manual_seed(1))
    first, second = data[:, rank * ROWS : (rank + 1) * ROWS]
    found = {}

    for name, options in {
        "fixed": {},
        "act": {},
        "pondernet": {},
        "confidence": {},
        "cell": {},
        "stages": {"find_unused_parameters": True},
        "fixed, static graph": {"static_graph": True},
    }.items():
        net = made(name.partition(",")[0], rank)
        wanted = averaged(copy.deepcopy(net), [first, second], world)
        ddp = DistributedDataParallel(net, **options)
        for i, x in enumerate((first, second)):
            quiet = i == 0 and "static_graph" not in options and "find_unused_parameters" not in options
            with ddp.no_sync() if quiet else contextlib.nullcontext():
                ddp(x).backward()
        found[f"DDP, {name}"] = agrees({n: p.grad for n, p in net.named_parameters()}, wanted)

    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for name in ("fixed", "act", "pondernet", "confidence"):
        net = made(name, rank)
        twin = copy.deepcopy(net)
        wanted = averaged(copy.deepcopy(net), [first, second], world)
        net.halt.process_group = dist.group.WORLD
        fully_shard(net.halt.step, mesh=mesh)
        if name in ("act", "pondernet"):
            fully_shard(net.halt.policy.head, mesh=mesh)
        fully_shard(net, mesh=mesh)
        rows = []
        net.halt.step.register_forward_hook(lambda _m, _i, out, rows=rows: rows.append(len(out)))
        for x in (first, second):
            net(x).backward()
        gradients = {n: p.grad.full_tensor() for n, p in net.named_parameters() if p.grad is not None}
        found[f"FSDP, {name}"] = agrees(gradients, {n: w for n, w in wanted.items() if n in gradients})
        calls = torch.tensor([len(rows)])
        dist.all_reduce(calls, dist.ReduceOp.MAX)
        found[f"FSDP, {name}, equal calls"] = len(rows) == int(calls)
        if name == "fixed":
            found["FSDP, a process ends with empty blocks"] = rank != 0 or rows == 2 * [ROWS, 0, 0, 0]
        with torch.no_grad():
            found[f"FSDP, {name}, inference"] = torch.allclose(net(first), twin(first), atol=1e-6)
    if rank == 0:
        plain = ac.AdaptiveHalt(Step(), ac.FixedSteps(2), process_group=dist.group.WORLD)
        found["a copy has the group"] = copy.deepcopy(plain).process_group is dist.group.WORLD
    print("FOUND " + json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
