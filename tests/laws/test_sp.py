"""--sp: parts of a micro-batch, all families on four ranks, what it costs in collectives and memory, and what is refused.

That a run with --sp has the losses and weights of one rank is in test_fsdp.py, test_weights.py and test_lora.py, whose
LAYOUTS have it.
"""

import functools
import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import varlen_helpers
from helpers import EXAMPLES, TINY, chat, first, launch_all, model_directory, run_all, small_model, write
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from unit.test_families import FAMILY_CASES, SIZES

import data
import fsdp
import sft
from disk import files
from families.config import FAMILIES, ModelConfig
from ops import attention
from ops.attention import Documents
from ranks import processes, sp
from settings.errors import UserError
from text.template import ChatTokenizer

CONFIGS = {name: {**SIZES, **case} for name, case in FAMILY_CASES.items()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of conversations of 10 to 45 tokens, some with weights; neither 2 nor 4 divides the tokens of five."""
    words = "one two three four five six seven eight nine ten red green blue".split()
    conversations = [chat(" ".join(words[: 1 + i]), " ".join(words[i:] * (1 + i % 3))) for i in range(7)]
    for i in 1, 4:
        conversations[i][1]["weight"] = 0.5 * i
    return write(tmp_path_factory.mktemp("rows") / "rows.json", [{"messages": messages} for messages in conversations])


@pytest.fixture(scope="module")
def dataset(rows):
    return data.load(rows, ChatTokenizer(TINY), 64)


# ---- parts of a micro-batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sp_size", [2, 3, 4, 16])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [5], [2, 6], []], ids=str)
def test_parts_together_are_the_micro_batch(dataset, ids, sp_size):
    """Each rank has as many tokens; positions, targets and weights are those of the whole, padded at its end by less
    than a token a rank."""
    ids = np.array(ids, dtype=int)
    whole = data.collate(dataset, ids)
    parts = [data.collate(dataset, ids, sp_rank=rank, sp_size=sp_size) for rank in range(sp_size)]
    n = len(parts[0].tokens)
    n_tokens = len(whole.tokens) if len(ids) else 0
    assert n_tokens <= n * sp_size < max(n_tokens, 1) + sp_size
    assert torch.equal(torch.cat([part.tokens for part in parts])[:n_tokens], whole.tokens[:n_tokens])
    for name in "targets", "conversation_of_target", "weights":
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    places = torch.cat([part.target_positions + i * n for i, part in enumerate(parts)])
    assert torch.equal(places, whole.target_positions)
    expected = Documents.of(parts[0].lengths)  # with the padding
    assert parts[0].lengths[: len(ids)] == whole.lengths[: len(ids)] and len(parts[0].lengths) <= len(ids) + 1
    for limit in 0, 20, 30:
        longer = [part.documents.in_longer_than(limit) for part in parts]
        assert torch.equal(torch.cat(longer), expected.in_longer_than(limit))
    assert torch.equal(torch.cat([part.documents.positions for part in parts]), expected.positions)
    for i, part in enumerate(parts):
        assert len(part.tokens) == n and part.documents.is_part and part.documents.first == i * n
        assert part.lengths == parts[0].lengths and torch.equal(part.documents.offsets, expected.offsets)
        copy = part.to("meta")
        assert copy.tokens.shape == (n,) and copy.documents.first == i * n and copy.documents.is_part


def test_the_ranks_of_a_step_have_its_targets_once(dataset):
    """dp 2 × sp 2: as many micro-batches on each rank, all targets of the step on one of them."""
    ranks = [list(data.micro_batches(dataset, range(7), 64, dp_rank=dp, dp_size=2, sp_rank=rank, sp_size=2))
             for dp in (0, 1) for rank in (0, 1)]
    assert len({len(batches) for batches in ranks}) == 1
    targets = Counter(target for batches in ranks for batch in batches for target in batch.targets.tolist())
    assert targets == Counter(dataset.tokens[dataset.loss_mask].tolist())


# ---- four ranks -----------------------------------------------------------------------------------------------------

ALIKE = ("qwen3", "llama", "mistral", "ministral", "smollm3", "granite", "granite4", "seed_oss", "internlm3",
         "iquestcoder", "olmo2", "phi3", "gemma3", "gemma4-unified")  # with --full only


@pytest.mark.parametrize("mode", first(1, ["eager", "compiled"]))
def test_each_family_computes_what_one_rank_does(mode, rows, tmp_path, pytestconfig):
    """Loss, correct targets and gradients in fp64, of sp 2 and 4; also of a micro-batch without a conversation. With
    windows, caps, LongRoPE, scaled queries, and with fewer key/value heads than ranks. Generation, too. No two ranks
    have the same tokens, and so the same dropout."""
    names = [name for name in CONFIGS if not FAMILIES[CONFIGS[name]["model_type"]].no_sp]
    if not pytestconfig.getoption("--full"):
        names = [name for name in names if name not in ALIKE]
    cases = write(tmp_path / "cases.json", {name: CONFIGS[name] for name in names})
    printed = run_all([(4, ("sequence_parallel", cases, rows, mode))], tmp_path)
    results = json.loads(re.search(r"RESULT (.*)", printed)[1])
    assert results.keys() == {"2", "4"} and len(names) >= 6
    for sp_size, found in results.items():
        assert found.pop("places") == [[rank, rank % int(sp_size), rank] for rank in range(4)]
        assert found.keys() == set(names)
        for name, (loss, correct, gradients, is_same_text) in found.items():
            assert loss < 1e-12 and correct == 0 and gradients < 1e-10 and is_same_text, (sp_size, name, found[name])


@pytest.mark.full
def test_a_bad_weight_is_found_in_its_conversation(tmp_path):
    """The embedding of a token is NaN that one conversation has: on dp 2 × sp 2 the error names this conversation."""
    rows = [{"prompt": f"question {i}", "response": "answer " * (3 + i)} for i in range(8)]
    rows[5]["prompt"] = "zebra"
    path = write(tmp_path / "rows.json", rows)
    loaded = data.load(path, ChatTokenizer(TINY), 64)
    tokens = [set(loaded.tokens[loaded.starts[i] : loaded.starts[i + 1]].tolist()) for i in range(8)]
    rare = min(tokens[5] - set.union(*tokens[:5], *tokens[6:]))

    def spoil(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.embed_tokens.weight"][rare] = torch.nan

    model = model_directory(tmp_path / "model", {"tie_word_embeddings": False}, spoil)
    flags = ("--model", model, "--train_data", path, "--batch_size", 8, "--max_length", 64, "--sp", 2)
    result = launch_all([(4, (*flags, "--output_dir", tmp_path / "out"))], tmp_path)
    assert result.returncode and f"conversations: {path}[5]" in result.stderr


def test_dropout_follows_the_rank_of_the_tokens(train, monkeypatch):
    """Masks depend on seed, step and the rank that has the tokens, which differs within an sp group (the test of each
    family above) and not within a tp group."""
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    monkeypatch.setattr(processes.Ranks, "tokens_rank", 5)
    train("--max_steps", 2, "--batch_size", 1, "--max_length", 64, "--use_lora", "--lora_dropout", 0.1)
    assert {hash((42, step, 5)) for step in (1, 2)} <= set(seeds)


# ---- what it costs --------------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func._opname:
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ranks():
    """A function from a size to the Ranks of one of four processes. The others don't exist: nothing is exchanged, but
    shapes and calls are those of real ones."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)

    def of(sp_size):
        groups = init_device_mesh("cpu", (4 // sp_size, sp_size), mesh_dim_names=("dp", "sp"))
        mesh = init_device_mesh("cpu", (1, 4, 1), mesh_dim_names=("replicas", "shards", "tp"))
        return SimpleNamespace(mesh=mesh, sp_size=sp_size, sp_rank=1, sp_group=groups["sp"].get_group(),
                               world_size=4, device=torch.device("cpu"))

    yield of
    dist.destroy_process_group()


def part(lengths, ranks):
    """(tokens, Documents) of a rank's part of a micro-batch."""
    whole, n = Documents.of(lengths), sum(lengths) // ranks.sp_size
    first = ranks.sp_rank * n
    return torch.arange(n) % 512, Documents(
        lengths, whole.positions[first : first + n], whole.offsets, first=first, is_part=ranks.sp_size > 1)


def loss_of(net, tokens, documents):
    return net(tokens, documents, torch.arange(len(tokens)), tokens).total


@pytest.mark.parametrize("checkpointed", [0, 1])
def test_four_exchanges_a_layer_and_direction(checkpointed, ranks):
    """Of two layers, sharded by FSDP2 over four ranks: eight all-to-all in forward and in backward, four more for a
    block that backward computes again. All else is as without --sp."""
    ranks, counts = ranks(2), {}
    for uses_sp in (False, True):
        net = small_model(checkpointed_blocks=checkpointed)
        if uses_sp:
            sp.split(net, ranks)
        fsdp.shard(net, ranks, bf16=False, param_offload=False)
        tokens, documents = part((30, 40), ranks)
        if not uses_sp:
            documents = Documents.of((len(tokens),))
        loss_of(net, tokens, documents).backward()  # FSDP2's first call has extra collectives
        with Collectives() as forward:
            loss = loss_of(net, tokens, documents)
        with Collectives() as backward:
            loss.backward()
        counts[uses_sp] = forward.counts, backward.counts
    exchanges = [found.pop("all_to_all_single") for found in counts[True]]
    assert exchanges == [4 * 2, 4 * (2 + checkpointed)]
    assert counts[True] == counts[False] and counts[False][1]["_reduce_scatter_base_"] == 3


@pytest.mark.parametrize("options, backend", [
    pytest.param(dict(use_lora=True, checkpointed_blocks=1), "aot_eager", marks=pytest.mark.full),
    *(pytest.param(options, backend, marks=pytest.mark.full) for backend in ("aot_eager", "aot_eager_decomp_partition")
      for options in ({}, dict(num_attention_heads=8, num_key_value_heads=1), dict(use_lora=True)))], ids=str)
def test_compiled_blocks_stay_one_graph(options, backend, ranks, monkeypatch, request):
    """With exchanges, for all packings: no graph break, no compilation after the first; and backward exchanges no more
    than it does without the compiler. aot_eager_decomp_partition chooses what to keep as inductor does."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    varlen_helpers.use(monkeypatch, varlen_helpers.varlen_attn_2_13)
    request.addfinalizer(attention.varlen_attention.cache_clear)
    torch._dynamo.reset()
    counters.clear()
    ranks, graphs = ranks(2), []
    net = small_model(compiled=True, **options)
    sp.split(net, ranks)
    for lengths in ((30, 40), (20, 33, 50, 7), (9,) * 12):
        loss_of(net, *part(lengths, ranks)).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss_of(net, *part((100, 60, 4), ranks)).backward()
    assert [*graphs, counters["stats"]["unique_graphs"]] == [1] * 4 and not counters["graph_break"]
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["_c10d_functional::all_to_all_single"] == 8 * 2 + 4 * options.get("checkpointed_blocks", 0)


def test_a_step_with_exchanges_waits_for_nothing(ranks):
    """Law 11: on meta, which has no values, as on CUDA: varlen_attn with the offsets of all documents."""
    ranks = ranks(2)
    with torch.device("meta"):
        net = small_model(checkpointed_blocks=1).to(torch.bfloat16)
    sp.split(net, ranks)
    whole = Documents.of((30, 40), "meta")
    documents = Documents((30, 40), whole.positions[35:], whole.offsets, first=35, is_part=True)
    tokens = torch.empty(35, dtype=torch.int64, device="meta")
    net(tokens, documents, tokens, tokens).total.backward()
    assert all(p.grad.is_meta for p in net.parameters())
    assert documents.in_longer_than(33).shape == tokens.shape


@pytest.mark.parametrize("kv_heads, sp_size", [(2, 2), (2, 4), (4, 4), (1, 4)])
def test_a_rank_keeps_its_share(kv_heads, sp_size, ranks):
    """Bytes that autograd keeps in the blocks, exactly: 1 / sp of the whole, the output of attention once more, and
    keys and values as often as there are ranks for each of their heads."""
    N, heads, width, layers = 64, 8, 16, 2
    kept = {}
    for size in (1, sp_size):
        net = small_model(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width)
        here = ranks(size) if size > 1 else SimpleNamespace(sp_rank=0, sp_size=1)
        if size > 1:
            sp.split(net, here)
        ignored, storages = {p.untyped_storage()._cdata for p in net.parameters()}, {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in ignored:
                storages[storage._cdata] = storage
            return tensor

        tokens, documents = part((N,), here)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net.model(tokens, documents)
        kept[size] = sum(storage.nbytes() for storage in storages.values())
    token = 4 * layers * N // sp_size  # bytes of a number for each of a rank's tokens in each layer
    repeats = sp_size // np.gcd(kv_heads, sp_size)
    more = token * width * heads + token * width * 2 * kv_heads * (repeats - 1)
    assert kept[sp_size] == kept[1] / sp_size + more


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, n_ranks, tp, message", [
    (3, 6, 1, "--sp 3 must divide the 4 query heads; with this model and this number of ranks, use --sp 1 or 2"),
    (8, 8, 1, "--sp 8 must divide the 4 query heads; with this model and this number of ranks, use --sp 1 or 2 or 4"),
    (4, 8, 2, "must divide the 2 query heads that --tp 2 leaves; with this model and this number of ranks, use --sp 1 or 2"),
])
def test_a_size_that_does_not_divide_the_heads_names_those_that_do(size, n_ranks, tp, message):
    """models/tiny has four query heads, and two for keys and values, which are no limit."""
    config = ModelConfig.from_dict(files.read_json(f"{TINY}/config.json"))
    with pytest.raises(UserError, match=re.escape(message)):
        config.check_sp(size, n_ranks, tp)
    for fitting in (1, 2, 4):
        config.check_sp(fitting, 8)


def test_which_families_refuse_sp():
    """A gated delta net carries a state over all tokens."""
    refused = {name for name, config in CONFIGS.items() if FAMILIES[config["model_type"]].no_sp}
    assert refused == {"qwen3.5"}
    with pytest.raises(UserError, match="can't split a model of type qwen3_5_text: its gated delta nets carry a state"):
        ModelConfig.from_dict(CONFIGS["qwen3.5"]).check_sp(2, 2)


def test_a_run_is_refused_before_its_processes_meet(monkeypatch, tmp_path):
    """By inputs.check, as the model is a directory."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    cfg = sft.Config(model=TINY, train_data=EXAMPLES, sp=3, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=re.escape(f"--model {TINY}: --sp 3 must divide the 4 query heads")):
        sft.inputs.check(cfg)
