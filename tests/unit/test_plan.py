"""tools/step_time.py and tools/best.py: which bytes cross nodes, the time of a step, the search against all candidates.

test_forecast.py compares the calls and bytes of collectives with those of four ranks.
"""

import dataclasses
import itertools
import json
import re
import sys

import pytest
import torch
from helpers import TINY, attempt, small_model

from ops import forecast
from tools import best, plan
from tools.step_time import Cluster, collectives, sent, share_between_nodes, step_time

GB = 2**30


@pytest.fixture(scope="module")
def run():
    """Three blocks, on 32 GPUs."""
    with torch.device("meta"):
        model = small_model(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=512,
                            intermediate_size=2048, tie_word_embeddings=False)
    parameters = tuple((n, tuple(p.shape), 4, True) for n, p in model.named_parameters())
    return forecast.PlannedRun(model.config, parameters, 2**15, batch_size=32, world_size=32, bf16=True, cuda=True,
                               checkpointed_blocks=2)


def of(run, **changes):
    return dataclasses.replace(run, **changes)


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride, size, ring, all_to_all", [
    (1, 8, 0, 0), (1, 1, 0, 0), (4, 2, 0, 0),  # in a node of 8
    (1, 32, 4 / 32, 24 / 31),  # four nodes: four of 32 edges cross, 24 of 31 others are elsewhere
    (2, 16, 4 / 16, 12 / 15), (8, 4, 1, 1), (16, 2, 1, 1),
    (1, 16, 2 / 16, 8 / 15)])
def test_what_leaves_a_node(stride, size, ring, all_to_all):
    assert share_between_nodes(stride, size, 32, 8) == pytest.approx(ring)
    assert share_between_nodes(stride, size, 32, 8, is_ring=False) == pytest.approx(all_to_all)


def test_a_group_that_does_not_fit_the_nodes_crosses_one():
    """Groups of four in nodes of six: the second one has two ranks in each of two nodes."""
    assert share_between_nodes(1, 4, 12, 6) == pytest.approx(2 / 4)
    assert share_between_nodes(1, 4, 12, 6, is_ring=False) == pytest.approx(2 / 3)


def test_each_byte_goes_over_one_link(run):
    for layout in ({}, dict(tp=2, sp=2), dict(replicas=4), dict(sp=4, replicas=2)):
        planned = of(run, **layout)
        for name, links in sent(planned, Cluster()).items():
            assert sum(links) == pytest.approx(collectives(planned)[name][2])
            assert sent(planned, Cluster(gpus_per_node=32))[name][1] == 0


def test_with_a_replica_per_node_only_gradients_leave_it(run):
    """tp, sp and shards are inside; with half as many replicas the shards are in two nodes."""
    for layout in (dict(replicas=4), dict(replicas=4, tp=2, sp=4)):
        links = sent(of(run, **layout), Cluster())
        assert {name for name, (_, between) in links.items() if between} == {"replicas all-reduce"}
    assert sent(of(run, replicas=2), Cluster())["shards all-gather, forward"][1] > 0


def test_a_collective_takes_as_long_as_its_slower_link(run):
    """All gathers are in a ring over four nodes: 28 of 32 edges are inside."""
    node, network = (sum(sizes) / 1e9 for sizes in zip(*sent(run, Cluster()).values()))
    assert node == pytest.approx(7 * network)
    for speeds in ((300, 50), (300, 10), (300, 1000)):
        seconds = max(node / speeds[0], network / speeds[1])
        assert step_time(run, Cluster(8, 400, *speeds)).shards == pytest.approx(seconds)


# ---- collectives -----------------------------------------------------------------------------------------------------


def test_four_all_to_alls_a_block_and_direction_and_four_when_recomputed(run):
    """Of q, k, v and the output. Two key/value heads are four on four ranks. A token is on one rank."""
    planned = of(run, sp=4, batch_size=16)
    n = planned.micro_batches
    assert n == 2
    found = {name: value for name, value in collectives(planned).items() if name.startswith("sp")}
    size = 2**15 // 4 * 16 * 2 * (8 + 4 + 4 + 8)  # bytes of a block
    for name, blocks in (("forward", 3), ("backward", 3), ("recomputed", 2)):
        calls, total, leaving = found[f"sp all-to-all, {name}"]
        assert (calls, total, leaving) == (4 * n * blocks, n * blocks * size, n * blocks * size * 3 / 4)
    assert "sp all-to-all, recomputed" not in collectives(of(planned, checkpointed_blocks=0))


def test_when_gradients_are_reduced(run):
    """Over replicas once a step, whatever the number of micro-batches; over shards once, or with each."""
    def of_names(**changes):
        found = collectives(of(run, replicas=2, **changes))
        return [found[name] for name in ("shards reduce-scatter", "replicas all-reduce")]

    once, often = of_names(batch_size=32), of_names(batch_size=128)
    assert once == often
    each = of_names(batch_size=128, gradient_reduction="micro_batch")
    assert each == [tuple(4 * x for x in once[0]), once[1]]
    n_groups = 5  # blocks, embedding, and norm with head
    assert once[1][0] == n_groups and once[1][1] == once[0][1] // 16


# ---- the search ------------------------------------------------------------------------------------------------------


CLUSTER = Cluster(8, 400, 300, 5)


@pytest.fixture(scope="module")
def candidates(run):
    """[(its best.sizes_of, layout, seconds, bytes of the device), ...] of every run, one after the other."""
    found = []
    for tp, sp, replicas in itertools.product((1, 2), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)):
        if 32 % (tp * sp * replicas) or 8 // tp % sp:
            continue
        layout = of(run, tp=tp, sp=sp, replicas=replicas)
        sizes = [n for n in (1, 2, 4, 8, 16) if n <= max(1, 32 // layout.dp)]
        for size, k, offload, reduction in itertools.product(
                sizes, range(4), best.OFFLOADS, ("step", "micro_batch")):
            planned = of(layout, micro_batch_size=size, checkpointed_blocks=k, gradient_reduction=reduction,
                         **best.OFFLOADS[offload])
            if reduction == "step" or planned.micro_batches > 1:
                seconds = best.middle(step_time(planned, CLUSTER))
                found.append((best.sizes_of(planned, offload, k), (tp, sp, replicas), seconds,
                              forecast.memory(planned)["device"]))
    return found


@pytest.mark.parametrize("limit", [4, 0.6, 0.25, 0.12])
def test_the_three_best_of_all_candidates(run, candidates, limit):
    """From memory for all activations to memory that needs sp."""
    found = best.Search(run, CLUSTER, limit * GB).candidates()
    expected = {}
    for _, layout, seconds, device in candidates:
        if device <= limit * GB:
            expected[layout] = min(seconds, expected.get(layout, seconds))
    assert [candidate.seconds for candidate in found] == pytest.approx(sorted(expected.values())[:3])
    for candidate in found:
        assert forecast.memory(candidate.run)["device"] == candidate.device <= limit * GB


def test_a_run_that_is_larger_needs_no_less_memory(candidates):
    """What the search skips because a smaller run did not fit."""
    n_larger = 0
    for (sizes, *_, device), (other_sizes, *_, other) in itertools.permutations(candidates[::5], 2):
        if best.is_larger(sizes, other_sizes):
            n_larger += 1
            assert device >= other, (sizes, other_sizes)
    assert n_larger > 100


def printed(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--model", TINY, *map(str, flags)])
    plan.main()
    return capsys.readouterr().out


def test_best_prints_runs_that_plan_prints_too(monkeypatch, capsys):
    """Memory and times of each are those of a plan with its flags; the others say what they lose."""
    cluster = ("--ranks", 32, "--max_length", 32768, "--batch_size", 16, "--memory_gb", 0.5)
    out = printed(monkeypatch, capsys, *cluster, "--best")
    assert "32 GPUs in 4 nodes of 8, 0.5 GiB each, of which 85% may be used" in out
    pattern = r"^\d +(.*)\n +([\d.]+) GiB; ([\d.]+) s if .*, ([\d.]+) s if not.*\n +(.*)\n( +.* the first.*)?"
    entries = re.findall(pattern, out, re.M)
    assert len(entries) == 3 and [bool(reason) for *_, reason in entries] == [False, True, True]
    for flags, *figures, parts, _ in entries:
        flags = flags.replace("the defaults", "").split()
        shown = printed(monkeypatch, capsys, *cluster, *flags)
        peak, = re.findall(r"^peak +([\d.]+)", shown, re.M)
        times, = re.findall(r"^ +([\d.]+) s if FSDP2's .*, ([\d.]+) s if not", shown, re.M)
        assert [f"{float(peak):.1f}", *times] == figures
        assert parts in shown


GEMMA = dict(model_type="gemma3_text", hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=512,
             num_attention_heads=4, num_key_value_heads=4, head_dim=16, sliding_window=64, query_pre_attn_scalar=16,
             hidden_activation="gelu_pytorch_tanh", rope_local_base_freq=1e4, rope_theta=1e6)


@pytest.mark.parametrize("config, ranks", [(None, 1), (None, 4), (GEMMA, 4)])
def test_candidates_are_what_their_flags_mean(config, ranks, tmp_path, monkeypatch):
    """Compilation, what the blocks keep and how weights are stored too, of every layout and offload."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    runs, flags = [], ["--model", tmp_path if config else TINY, "--ranks", ranks, "--batch_size", 2 * ranks]
    monkeypatch.setattr(best.Search, "candidates", lambda search: runs.append(search) or [])
    monkeypatch.setattr(plan, "lines", lambda run, **_: runs.append(run) or [])

    def planned(*more):
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, [*flags, *more])])
        attempt(plan.main)
        return runs.pop()

    search = planned("--best")
    for layout, offload in itertools.product(search.layouts, best.OFFLOADS if config is None else [""]):
        if layout.replicas == 1:
            search.queue.clear()
            search.push(of(layout, gradient_reduction="step"), offload)
            (_, _, candidate, _), = search.queue
            given = best.Candidate(candidate, offload, None, 0).flags.replace("the defaults", "").split()
            assert planned(*given) == candidate, given


@pytest.mark.parametrize("flags, absent, present", [
    (("--ranks", 8, "--use_lora", "--quantize", "nf4"), "--tp ", "excluded --quantize nf4 does not work with --tp"),
    (("--ranks", 1), "--gradient_reduction", "1        --no-gradient_checkpointing")])
def test_best_prints_no_flag_that_is_refused(monkeypatch, capsys, flags, absent, present):
    out = printed(monkeypatch, capsys, "--best", *flags)
    assert present in out and not any(absent in line for line in out.splitlines() if line[:1] in "123")


def test_best_leaves_out_what_a_setting_excludes(monkeypatch, capsys):
    """A run that must be compiled has no tp."""
    out = printed(monkeypatch, capsys, "--ranks", 2, "--best", "--compile", "true")
    assert "--tp" not in re.sub("^excluded.*", "", out, flags=re.M)
    assert "\nexcluded --compile does not work with --tp\n" in out


def test_why_a_candidate_loses(run):
    first = best.Candidate(run, "", step_time(of(run, checkpointed_blocks=0), Cluster(1, 0.01)), 3 * GB)
    second = best.Candidate(run, "", step_time(of(run, checkpointed_blocks=3), Cluster(1, 0.01)), 2 * GB)
    recomputed = second.time.recomputation
    assert f"+{recomputed:.2f} s recomputation" in best.loses(second, first)
    assert best.loses(dataclasses.replace(first, device=2 * GB), first) == "as fast as the first, with -1.0 GiB"


def test_what_is_impossible_is_named(run):
    """A long conversation without sp; checkpointing is not needed with much memory."""
    lines = "\n".join(best.lines(run, Cluster(), 0.3 * GB))
    smallest = min(forecast.memory(of(run, tp=tp, checkpointed_blocks=3, **offload))["device"]
                   for tp in (1, 2) for offload in best.OFFLOADS.values())
    needed, = re.findall(r"without --sp, one conversation of 32,768 tokens needs ([\d.]+) GiB", lines)
    assert float(needed) == pytest.approx(smallest / GB, abs=0.06)
    assert smallest > 0.3 * 0.85 * GB
    assert "excluded" not in "\n".join(best.lines(run, Cluster(), 80 * GB))
    _, error = attempt(list, best.lines(run, Cluster(), 0.01 * GB))
    assert "nothing fits: one conversation of 32,768 tokens" in error and "use more ranks" in error


def test_ranks_without_a_conversation_are_named(run):
    lines = list(best.lines(of(run, batch_size=2), Cluster(), 80 * GB))
    assert any(line.startswith("idle") and "raise --batch_size" in line for line in lines)


@pytest.mark.parametrize("flags, message", [
    (("--best",), "--best has no effect without --n_gpus or --ranks"),
    (("--best", "--n_gpus", 8, "--sp", 2), "--best does not work with --sp; remove one of them"),
    (("--best", "--n_gpus", 8, "--gradient_reduction", "step"), "--best does not work with --gradient_reduction"),
    (("--ranks", 12), "--ranks 12 is not a multiple of the 8 GPUs of a node; set --n_gpus to one of 1, 2, 3, 4, 6, 12"),
    (("--ranks", 4, "--n_gpus", 8), "--ranks 4 is not a multiple of the 8 GPUs"),
    (("--ranks", 8, "--sp", 3), "--sp 3 needs a multiple of 3 processes, and this run has 8"),
])
def test_what_does_not_go_together(flags, message, monkeypatch, capsys):
    with pytest.raises(ValueError, match=re.escape(message)):
        printed(monkeypatch, capsys, *flags)


def test_gpus_of_a_node_and_of_all_nodes(monkeypatch, capsys):
    """--n_gpus alone is one node; --ranks has nodes of 8, or of --n_gpus."""
    def between(*flags):
        out = printed(monkeypatch, capsys, "--batch_size", 32, *flags)
        return re.findall(r"plan +(\d+)", out)[0], float(re.search(r"([\d.]+) s between", out)[1])

    slow = ("--network_gb_per_second", 0.01)
    assert between("--n_gpus", 16) == ("16", 0)
    assert between("--ranks", 8, *slow) == ("8", 0)
    few = between("--ranks", 16, *slow)
    many = between("--ranks", 16, "--n_gpus", 4, *slow)
    assert few[1] > 0 and many[1] == pytest.approx(2 * few[1], rel=0.1)
