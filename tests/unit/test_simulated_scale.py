"""1,024 ranks without the ranks: their groups, shards and files, a step's packing, the requests to the store."""

import datetime
import itertools
import json
import time
from collections import Counter
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import EXAMPLES, TINY, first, run_all, small_model
from torch.distributed.tensor import Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

import fsdp
from disk import ownership, pretrained
from disk.ownership import Layout
from families.config import ModelConfig
from ops.packing import micro_batches_needed, split_over_ranks
from ranks import failures, gate, processes, tp
from settings.parser import parse
from tools import bench_scale, plan
from tools.bench_scale import CountedStore

WORLD = 1024
SAMPLE = 0, 1, 9, 517, 1023  # ranks
LAYOUTS = [Layout(shards=1024), Layout(replicas=2, shards=64, tp=8), Layout(replicas=128, shards=8),
           Layout(shards=256, tp=4), Layout(replicas=4, shards=128, tp=2)]

# ---- groups -------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(monkeypatch):
    """A function: rank, sizes -> the Ranks of processes.start() on 1,024 ranks, in torch's fake process group."""
    watchdog = MagicMock(**{"__bool__.return_value": False})
    monkeypatch.setattr(processes, "Watchdog", lambda *_: watchdog)
    monkeypatch.setattr(processes, "connect", lambda *_: dist.HashStore())
    monkeypatch.setattr(processes, "join", lambda store, *_: store)

    def run(rank, tp_size=1, **sizes):
        for name, value in dict(RANK=rank, WORLD_SIZE=WORLD, LOCAL_RANK=rank % 8, LOCAL_WORLD_SIZE=WORLD,
                                MASTER_ADDR="127.0.0.1", MASTER_PORT=1).items():
            monkeypatch.setenv(name, str(value))
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
        return processes.start(tp_size, 60, **sizes)

    yield run
    dist.destroy_process_group()


def members(group):
    return dist.get_process_group_ranks(group)


@pytest.mark.parametrize("replicas, tp_size, sp", [(1, 1, 1), (2, 8, 1), (4, 2, 8), (1, 8, 4), (128, 1, 8)])
def test_the_groups_of_1024_ranks(replicas, tp_size, sp, start):
    """Of a few ranks. Neighbours are of one tp group, then of one sp group, then of one replica."""
    shards = WORLD // (replicas * tp_size)
    grid = np.arange(WORLD).reshape(replicas, shards, tp_size)
    layout = Layout(replicas, shards, tp_size)
    for rank in SAMPLE:
        ranks = start(rank, tp_size, replicas=replicas, sp=sp)
        ((r, s, t),) = np.argwhere(grid == rank).tolist()
        expected = {"replicas": grid[:, s, t], "shards": grid[r, :, t], "tp": grid[r, s, :]}
        for axis, others in expected.items():
            assert members(ranks.mesh[axis].get_group()) == others.tolist()
            place = {"replicas": r, "shards": s, "tp": t}[axis]
            assert layout.place(axis, rank) == ranks.mesh.get_local_rank(axis) == place
        readers = np.arange(WORLD).reshape(-1, sp, tp_size)  # [i]: the ranks that read the i-th conversations
        assert rank in readers[ranks.dp_rank] and ranks.dp_size == len(readers)
        assert readers[ranks.dp_rank, ranks.sp_rank, t] == rank
        if sp > 1:
            assert members(ranks.sp_group) == readers[ranks.dp_rank, :, t].tolist()
            assert set(members(ranks.sp_group)) <= set(expected["shards"].tolist())


# ---- shards and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, layout", first(3, list(zip((1023, 517, 9, 1, 700), LAYOUTS))))
def test_a_model_is_sharded_over_1024_ranks(rank, layout, start):
    """FSDP2, HSDP and tp, on meta. The plan's shards are those of torch, also where a rank has no row of a matrix.

    One rank of each mesh, and another tp in each: torch 2.14 keeps results with the meshes that it knows to be equal.
    """
    ranks = start(rank, layout.tp, replicas=layout.replicas)
    with torch.device("meta"):
        model = small_model(num_attention_heads=8, num_key_value_heads=8, vocab_size=4096)
    if layout.tp > 1:
        tp.split(model, ranks.mesh["tp"])
    fsdp.shard(model, ranks, bf16=True, param_offload=False)
    sizes = []
    for name, p in model.named_parameters():
        axes = dict(zip(p.device_mesh.mesh_dim_names, p.placements))
        assert ("replicas" in axes) == (layout.replicas > 1) and axes.get("replicas", Replicate()).is_replicate()
        spans = ownership.as_integers(
            ownership.shard_spans(p.shape, bench_scale.split_of(name), layout, rank))
        assert spans == pretrained.local_shard(p)[1], name
        assert ownership.count_elements(spans) == p.to_local().numel(), name
        sizes.append(p.to_local().numel())
    assert max(sizes) > 0


def boxes_are_a_partition(spans, shape):
    """Whether slices, [(starts, stops) in each dimension] as arrays, contain each element of a tensor exactly once."""
    spans = [np.stack(np.broadcast_arrays(*span, np.zeros(WORLD, np.int64))[:2]) for span in spans]
    is_empty = np.any([start >= stop for start, stop in spans], axis=0)
    spans = [span[:, ~is_empty] for span in spans]
    assert all((start >= 0).all() and (stop <= size).all() for (start, stop), size in zip(spans, shape))
    common = np.all([np.maximum.outer(start, start) < np.minimum.outer(stop, stop) for start, stop in spans], axis=0)
    volumes = np.prod([stop - start for start, stop in spans], axis=0)
    return common.sum() == len(volumes) and volumes.sum() == np.prod(shape, dtype=np.int64)


@pytest.fixture(scope="module", params=bench_scale.SHAPES)
def planned(request):
    """(Layout, {name: (shape, split, bytes of an element)}, what plan_of returns) of a model on 1,024 ranks."""
    layout, sizes = bench_scale.SHAPES[request.param]
    tensors = bench_scale.tensors_of(ModelConfig.from_dict(dict(
        model_type="qwen2", vocab_size=152064, rope_theta=1e6, tie_word_embeddings=False, **sizes)))
    return layout, tensors, bench_scale.plan_of(tensors, layout)


def test_each_element_of_the_training_state_has_one_owner(planned):
    """The slices that 1,024 ranks write. No rank writes more than a fifth above the mean, and all write at once."""
    layout, tensors, ((_, state), *_) = planned
    assert layout.world_size == WORLD == len(state)
    for shape, split in {(shape, *split.items()): (shape, split) for shape, split, _ in tensors.values()}.values():
        assert boxes_are_a_partition(ownership.written_spans(shape, split, layout, np.arange(WORLD)), shape), shape
    assert state.sum() == sum(np.prod(shape, dtype=np.int64) for shape, *_ in tensors.values()) * 12
    assert state.max() < 1.2 * state.mean() and state.min() > 0


def test_each_byte_of_the_weights_has_one_owner(planned):
    """Each tensor is in one file, each file is of one rank, and is received in pieces once. A rank writes at most the
    largest tensor, or twice the mean."""
    _, tensors, ((weights, _), (files, owners), turns) = planned
    assert sorted(itertools.chain(*files.values())) == sorted(tensors)
    assert files.keys() == owners.keys() and all(0 <= rank < WORLD for rank in owners.values())
    sizes = {name: int(np.prod(shape, dtype=np.int64)) * size for name, (shape, _, size) in tensors.items()}
    assert weights.sum() == sum(sizes.values())
    assert weights.max() <= max(*sizes.values(), 2 * weights.mean())
    received = {}
    for rank, piece in ((rank, piece) for turn in turns for rank, pieces in turn.items() for piece in pieces):
        assert owners[piece.file] == rank and piece.name in files[piece.file]
        received.setdefault(piece.name, []).append(piece.spans(tensors[piece.name][0])[0])
    for name, (shape, *_) in tensors.items():
        starts, stops = zip(*sorted(received[name]))
        assert (*starts, shape[0]) == (0, *stops)


# ---- a step -------------------------------------------------------------------------------------------------------


def test_the_tool_measures_a_step_of_one_rank(tmp_path):
    """bench --part scale, of fewer conversations. What it packs is what the step has."""
    dataset = bench_scale.dataset_of(bench_scale.lengths_of(20_000), tmp_path / "tokens")
    figures = bench_scale.steps(dataset, 2)
    assert set(figures) == {"epoch_starts_ms", "sample_ms", "pack_ms", "collate_ms", "count_ms", "step_ms"}
    assert figures["step_ms"] >= figures["pack_ms"] > 0
    assert dataset.count(np.arange(9))["target_tokens"] == dataset.n_targets[:9].sum()


@pytest.mark.parametrize("dp_size", [1, 7, 90, WORLD])
def test_micro_batches_are_those_that_the_neediest_rank_needs(dp_size):
    """Counted rank by rank, conversation by conversation, for 3,000 conversations."""
    lengths = -np.sort(-bench_scale.lengths_of(3000).astype(np.int64))
    ranks = split_over_ranks(lengths, dp_size)
    needed = []
    for rank in range(dp_size):
        before = 0
        for i, length in enumerate(lengths[ranks == rank].tolist()):
            needed.append(1 + min(before // (bench_scale.LENGTH - length + 1), i))
            before += length
    assert micro_batches_needed(lengths, ranks, bench_scale.LENGTH, dp_size) == max(needed)


def test_a_plan_for_1024_ranks_takes_no_longer_than_one_for_8(tmp_path, capsys):
    """tools/plan.py of a 7B model, in seconds of this process."""
    sizes = dict(model_type="qwen2", vocab_size=152064, rope_theta=1e6, tie_word_embeddings=False,
                 **bench_scale.SHAPES["7B"][1])
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    seconds = []
    for n in (8, WORLD):
        flags = f"--model {tmp_path} --n_gpus {n} --strategy megatron --tp 4 --batch_size {4 * n} --memory_gb 79"
        cfg, _ = parse(plan.Config, flags.split())
        started = time.process_time()
        plan.plan(cfg)
        seconds.append(time.process_time() - started)
    assert f"{WORLD} × GPU" in capsys.readouterr().out
    assert seconds[1] < 2 * seconds[0] + 0.2


# ---- the store ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moving", "waiting", "failed"])
def test_a_watchdog_makes_as_many_requests_on_1024_ranks_as_on_8(name):
    """In each tick, also if its rank waits or hears of a failure; only the states of all are one request of many keys,
    which it makes so seldom that a tick has at most 128 of them."""
    each, once = {"moving": (["set state #", "check failed"], []),
                  "waiting": (["set state #", "check failed"], ["multi_get state #"]),
                  "failed": (["set state #", "add readers"], ["check failed", "get failed"])}[name]
    for world_size in (8, WORLD):
        requests, stride = bench_scale.ticks(world_size)[name], 1 + world_size // 128
        n_keys = {"multi_get state #": world_size}
        assert requests == {**{(what, 1): stride for what in each}, **{(what, n_keys.get(what, 1)): 1 for what in once}}
        assert sum(n * count for (_, n), count in requests.items()) <= (128 + 2) * stride


@pytest.mark.parametrize("silent", [False, True])
def test_all_ranks_know_when_all_have_read_a_failure(silent):
    """1,024 watchdogs, whose threads are not started. Nobody waits for a rank that does not respond."""
    store = dist.HashStore()
    failures.prepare(store, WORLD)
    watchdogs = [failures.Watchdog(store, rank, WORLD, 600) for rank in range(WORLD)]
    failure = replace(watchdogs[9].store_failure("planned"), is_silent=silent)
    watchdogs[0].proposal = failure
    alive = [watchdog for watchdog in watchdogs if not (silent and watchdog.rank == 9)]
    for watchdog in alive[:-1]:
        watchdog.exchange()
        watchdog.exchange()  # a rank that reads twice counts once
    assert {watchdog.failure for watchdog in alive[:-1]} == {failure}
    assert [watchdog.unread for watchdog in alive[:-1]] == list(range(len(alive) - 1, 0, -1))
    alive[-1].exchange()
    alive[0].exchange()
    assert alive[0].unread == alive[-1].unread == 0
    watchdogs[9].exchange()  # it may come back
    assert watchdogs[9].unread == 0


def recorded():
    """(a store, the Counter of its requests by (what, number of keys))"""
    requests, store = Counter(), dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=2))  # no request may wait for a rank that is not there
    return CountedStore(store, lambda what, n: requests.update({(what, n): 1})), requests


@pytest.mark.parametrize("rank", [0, 5])
def test_the_end_of_a_run_takes_as_many_requests_on_1024_ranks(rank, monkeypatch):
    """The last rank that is done or has left lets all others go: one key, not one for each rank."""
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    found = []
    for world_size in (8, WORLD):
        store, requests = recorded()
        for what in ("done", "left"):
            store.store.add(f"number {what}", world_size - 1)
        ranks = processes.single_process(torch.device("cpu"))
        replace(ranks, rank=rank, world_size=world_size, store=store).wait_for_all()
        found.append(dict(requests))
    assert found[0] == found[1] and all(n == 1 for _, n in found[0])
    assert ("wait all left", 1) in found[0] or rank


@pytest.mark.parametrize("rank", [0, 5])
def test_only_rank_0_reads_the_answers_of_all_ranks_at_the_gate(rank):
    store, requests = recorded()
    store.store.set("gate x", "")  # the others do not wait for rank 0
    for other in range(1, WORLD):
        gate.compare(store.store, other, WORLD, "x", {"lr": "1"})
    gate.compare(store, rank, WORLD, "x", {"lr": "1"})
    own = {("set gate x of #", 1): 1, ("get gate x", 1): 1}
    assert requests == (own if rank else {**own, ("set gate x", 1): 1, ("get gate x of #", 1): WORLD})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pytestconfig, half):
    """{number of ranks: [what count_store.py wrote, of each rank]} of a run of sft.py, with --full of two."""
    sizes = (2, 4) if pytestconfig.getoption("--full") else (2,)
    directory = tmp_path_factory.mktemp("requests")
    flags = ("--model", half, "--train_data", EXAMPLES, "--batch_size", 8, "--max_steps", 4, "--max_length", 256)
    run_all([(n, ("count_store", *flags, "--output_dir", f"out{n}")) for n in sizes], directory)
    return {n: [json.loads((directory / f"requests {rank} of {n}.json").read_text()) for rank in range(n)]
            for n in sizes}


def test_a_step_takes_one_request_of_each_rank(runs):
    """In a run of two ranks, with --full of four too: where it is. Rank 0 also looks for warnings, once a step."""
    for ranks in runs.values():
        for rank, counts in enumerate(ranks):
            steps = [counts[f"step {step}"] for step in range(1, 5)]
            assert [step.pop("set state #") for step in steps] == [1] * 4
            looks = [step.pop("check warnings", 0) for step in steps]
            assert sum(looks) <= 4 + 1 and (rank == 0 or not any(looks))
            assert not any(steps), steps


def test_a_watchdog_of_a_run_makes_two_requests_a_tick(runs):
    """It reads the states of its own node once."""
    for counts in itertools.chain(*runs.values()):
        counts = Counter(counts["watchdog"])
        ticks = counts.pop("ticks")
        assert counts.pop("multi_get state #") <= 1 + ticks // 4  # a slow machine may look at all
        assert counts["set state #"] == ticks and abs(counts["check failed"] - ticks) <= 1 and len(counts) == 2


@pytest.mark.full
def test_start_and_end_take_as_many_requests_of_our_own_on_more_ranks(runs):
    """gloo asks for the address of each rank, and waits ask again and again: these are not compared. Rank 0 of n also
    reads n answers at each gate."""
    def own(counts):
        return {what: n for what, n in counts["else"].items() if "//" not in what and not what.startswith("add")
                and what not in ("set all done", "set all left", "check warnings")}

    few, many = runs[2], runs[4]
    assert all(own(counts) == own(few[1]) for counts in many[1:])
    gates = {what for what in own(few[0]) if what.startswith("get gate") and what.endswith("of #")}
    assert len(gates) == 3
    assert own(many[0]) == {what: 2 * n if what in gates else n for what, n in own(few[0]).items()}


@pytest.mark.full
def test_the_load_on_the_node_of_the_store_is_measured():
    """bench --part scale: a share of a core, more while ranks wait."""
    shares = bench_scale.load_of(256, seconds=(3000, 300))
    assert 0 < shares["moving"] < shares["waiting"]
