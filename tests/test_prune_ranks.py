"""Several processes with data of their own: the same masks on all, those of all the data."""

import copy
from functools import partial

import pytest
import torch
from methods_common import BATCHES, X, Y, mlp, weights
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sparsekern as sk
from sparsekern.prune import Pruner, prune, schedules
from sparsekern.prune.methods import METHODS, make_method

HALVES = [(X[:6], Y[:6]), (X[6:], Y[6:])]
# What a method measures in order, or with random numbers, is not the mean of two measurements.
ORDERED = {"skeletonization", "obd"}


def on_two_ranks(folder, *checks):
    """Run every `check(rank)` in two processes that can talk to each other."""
    options = {"nprocs": 2, "start_method": "fork"}
    torch.multiprocessing.start_processes(_run, (str(folder / "store"), checks), **options)


def _run(rank, path, checks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    for check in checks:
        check(rank)
    dist.destroy_process_group()


def same_on_both(tensors):
    """Whether both ranks hold the same, bit by bit."""
    mine = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    return torch.equal(*both)


def network(method):
    if method != "slimming":
        return mlp(nn.ReLU)
    model = mlp(nn.ReLU)
    norm = nn.BatchNorm1d(12).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 13) / 12)
    return nn.Sequential(model[0], norm, *list(model)[1:])


def options_of(method, pattern):
    options = {"scope": "uniform"}
    if method == "synflow":
        return {**options, "iterations": 5}
    if method == "slimming":
        return {**options, "ignore": ["3", "5"]}
    return {**options, "ignore": "4"} if (method, pattern) == ("apoz", "filter") else options


CASES = [
    (name, pattern)
    for name, method in METHODS.items()
    if method.one_shot
    for pattern in ("unstructured", "block:4x4", "2:4", "filter")
    if make_method(name, {}).misfit(sk.patterns.parse(pattern)) is None
]


def check_one_shot(rank):
    for method, pattern in CASES:
        model, whole = network(method), network(method)
        options = {**options_of(method, pattern), "loss_fn": F.cross_entropy, "progress": False}
        prune(model, method, 0.5, pattern, data=[HALVES[rank]], distributed=True, **options)
        assert same_on_both(weights(model)), (method, pattern)
        prune(whole, method, 0.5, pattern, data=HALVES, **options)
        if method not in ORDERED:
            for mine, wanted in zip(weights(model), weights(whole)):
                assert torch.equal(mine != 0, wanted != 0), (method, pattern)
                torch.testing.assert_close(mine, wanted)


def check_wrapped(rank):
    whole, model = mlp(), DistributedDataParallel(mlp())
    options = {"loss_fn": F.cross_entropy, "iterations": 3}
    report = prune(model, "snip", 0.8, data=[HALVES[rank]], **options)
    prune(whole, "snip", 0.8, data=HALVES, **options)
    assert [layer.name for layer in report.layers] == ["0", "2", "4"]
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(whole)))
    model(X).sum().backward()  # the wrapper goes on
    alone = mlp()
    prune(alone, "snip", 0.8, data=[HALVES[rank]], distributed=False, **options)
    assert not same_on_both(weights(alone))  # nothing was exchanged


def check_random(rank):
    generator = torch.Generator().manual_seed(rank)  # others on each rank: those of rank 0 count
    for method in ("random", "set"):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = weights(copy.deepcopy(model))
        draws = {"generator": generator, "schedule": schedules.Constant(0.5, 1)}
        pruner = Pruner(model, optimizer, method, **draws)
        masks = pruner.masks.values()
        assert same_on_both(masks)
        # Weights that the own draw would have dropped are there, too.
        assert all(torch.equal(w, b * m) for w, b, m in zip(weights(model), before, masks))


def test_one_shot_methods_average_over_ranks(tmp_path):
    on_two_ranks(tmp_path, check_one_shot, check_wrapped, check_random)


TRAINED = {
    "magnitude": schedules.Cubic(0, 0.6, 1, 7, 2),
    "snip": schedules.Iterative(0.6, 2, 3),
    "taylor": schedules.OneShot(0.6, at=2),
    "wanda": schedules.Cubic(0, 0.6, 1, 7, 2),
    "refit": schedules.OneShot(0.6, at=3),
    "rigl": schedules.Constant(0.6, 2),
    "set": schedules.Constant(0.6, 2),
    "movement": schedules.Cubic(0, 0.6, 2, 8, 2),
    "soft_movement": schedules.Cubic(0, 0.6, 2, 8, 2),
    "srste": schedules.Constant(0.6, 1, 6),
}


def run_training(model, method, pattern, data, part):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    options = {"data": data, "loss_fn": F.cross_entropy} if METHODS[method].needs else {}
    schedule = TRAINED[method]
    pruner = Pruner(model, optimizer, method, pattern=pattern, schedule=schedule, **options)
    for _ in range(9):
        optimizer.zero_grad()
        F.cross_entropy(model(X[part]), Y[part]).backward()
        optimizer.step()
        pruner.step()
    return pruner


def check_training(rank, pattern):
    part = slice(6 * rank, 6 * rank + 6)
    for method in TRAINED:
        model, whole = DistributedDataParallel(mlp()), mlp()
        pruner = run_training(model, method, pattern, [HALVES[rank]], part)
        wanted = run_training(whole, method, pattern, HALVES, slice(None))
        assert same_on_both(pruner.masks.values()) and same_on_both(weights(model)), method
        assert list(pruner.masks) == ["0", "2", "4"]
        for name, mask in pruner.masks.items():
            assert torch.equal(mask, wanted.masks[name]), (method, name)
        for mine, other in zip(weights(model), weights(whole)):
            torch.testing.assert_close(mine, other)


def check_resume(rank):
    """Saved on one rank of a wrapped model, taken up by a plain one, and the other way round."""
    part = slice(6 * rank, 6 * rank + 6)
    pruner = run_training(DistributedDataParallel(mlp()), "movement", "unstructured", None, part)
    other = mlp()
    optimizer = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    again = Pruner(other, optimizer, "movement", schedule=TRAINED["movement"])
    other.load_state_dict(pruner.model.state_dict())
    again.load_state_dict(pruner.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.masks.values(), pruner.masks.values()))


def test_training_on_shards_is_training_on_all_of_the_data(tmp_path):
    patterns = ("unstructured", "block:2x2")
    on_two_ranks(tmp_path, *(partial(check_training, pattern=p) for p in patterns), check_resume)


def check_sharded(rank):
    def refused(model, got):
        for use in (prune, lambda m: Pruner(m, torch.optim.SGD(m.parameters(), 0.1))):
            with pytest.raises(
                ValueError, match=f"expected whole weights on every rank, got {got}"
            ):
                use(model)

    for original in (False, True):
        cpu = {"device_id": torch.device("cpu"), "use_orig_params": original}
        model = FullyShardedDataParallel(mlp(), **cpu)
        refused(model, r"'\(model\)': FullyShardedDataParallel")
        refused(nn.Sequential(model, nn.Linear(4, 4)), "'0': FullyShardedDataParallel")
        own = "0.weight" if original else "_flat_param"
        refused(model.module, f"'{own}': a part of FullyShardedDataParallel's flat parameter")
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    refused(model, "'0.weight': a DTensor, as fully_shard makes .FSDP is not supported")


@pytest.mark.filterwarnings("ignore")
def test_shards_are_refused_by_name(tmp_path):
    on_two_ranks(tmp_path, check_sharded)


def test_one_process_needs_no_group():
    model, other = mlp(), mlp()
    prune(model, "snip", 0.5, data=BATCHES, loss_fn=F.cross_entropy, distributed=True)
    prune(other, "snip", 0.5, data=BATCHES, loss_fn=F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))
