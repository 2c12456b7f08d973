"""A step directory at scale: each byte is written once, by all ranks at the same time, and read about once."""

import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import run_all, two_layers
from safetensors.torch import load_file, save_file

from disk import checkpoint, ownership, pretrained, saving
from disk.ownership import Layout
from settings.errors import UserError

RANKS = 8
SHAPE_OF_7B = dict(num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
EIGHT = [Layout(1, 8, 1), Layout(1, 4, 2), Layout(2, 4, 1), Layout(2, 2, 2), Layout(8, 1, 1), Layout(4, 1, 2)]


def qwen(layers, hidden, intermediate, kv, vocab=152064):
    """{name: (shape, split, bytes of an element)} of a Qwen2.5 with an untied head, in bf16, on any layout with tp."""
    block = {"mlp.down_proj.weight": ((hidden, intermediate), 1), "mlp.gate_proj.weight": ((intermediate, hidden), 0),
             "mlp.up_proj.weight": ((intermediate, hidden), 0), "self_attn.o_proj.weight": ((hidden, hidden), 1)}
    for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
        block[f"self_attn.{name}_proj.weight"] = (rows, hidden), 0
        block[f"self_attn.{name}_proj.bias"] = (rows,), 0
    block |= {"input_layernorm.weight": ((hidden,), None), "post_attention_layernorm.weight": ((hidden,), None)}
    named = {f"model.layers.{i}.{name}": item for i in range(layers) for name, item in block.items()}
    named |= {"lm_head.weight": ((vocab, hidden), 0), "model.embed_tokens.weight": ((vocab, hidden), 0),
              "model.norm.weight": ((hidden,), None)}
    return {name: (shape, {"shards": 0} if dim is None else {"shards": 0, "tp": dim}, 2)
            for name, (shape, dim) in named.items()}


QWEN_7B, QWEN_72B = qwen(28, 3584, 18944, 512), qwen(80, 8192, 29568, 1024)


def published_files(tensors, n_files):
    """{file: names}, as they are published."""
    return ownership.with_file_names(ownership.divide({name: math.prod(shape) * 2 for name, (shape, *_) in
                                                       tensors.items()}, n_files), "model")


# the plan, without ranks


@pytest.mark.parametrize("layout", EIGHT)
def test_the_plan_writes_each_element_once(layout):
    """Of shapes that the layout does not divide too; the slices of a rank are in its shard."""
    for shape in ((13, 8), (5, 24), (3, 2), (11,), (1,), (64, 4, 3)):
        for split in ({"shards": 0}, {"shards": 0, "tp": 0}, {"shards": 0, "tp": min(1, len(shape) - 1)}, {}):
            count = np.zeros(shape, dtype=int)
            for rank in range(RANKS):
                spans = ownership.written_spans(shape, split, layout, rank)
                held = ownership.shard_spans(shape, split, layout, rank)
                count[tuple(slice(*span) for span in spans)] += 1
                assert all(a >= c and b <= d for (a, b), (c, d) in zip(spans, held))
            assert (count == 1).all(), (shape, split)
            everyone = ownership.count_elements(ownership.written_spans(shape, split, layout, np.arange(RANKS)))
            assert everyone.sum() == count.size


@pytest.mark.parametrize("tensors, n_files, layout", [
    *[(QWEN_7B, 4, layout) for layout in EIGHT], (QWEN_7B, 9, EIGHT[0]), (QWEN_72B, 37, Layout(1, 64, 1)),
    (QWEN_72B, 37, Layout(8, 8, 8))])
def test_the_work_is_balanced(tensors, n_files, layout):
    """No rank writes more than 1.2 times the mean. Of 72B on 512 ranks only the training state: the head is larger than
    the mean, and it is in one file."""
    weights, state = ownership.bytes_by_rank(layout, tensors, published_files(tensors, n_files), 12)
    n_elements = sum(math.prod(shape) for shape, *_ in tensors.values())
    assert weights.sum() == 2 * n_elements and state.sum() == 12 * n_elements
    largest_tensor = max(2 * math.prod(shape) for shape, *_ in tensors.values())
    assert weights.max() <= max(1.2 * weights.mean(), largest_tensor)
    assert state.max() <= 1.2 * state.mean()


def test_files_of_a_model_are_kept_where_they_are_balanced():
    sizes = {name: math.prod(shape) * 2 for name, (shape, *_) in QWEN_72B.items()}
    files = published_files(QWEN_72B, 37)
    assert ownership.assign(sizes, files, 8)[0] == ownership.assign(sizes, files, 1)[0] == files
    divided, owners = ownership.assign(sizes, published_files(QWEN_72B, 9), 8)
    assert len(divided) == 16 and sorted(name for names in divided.values() for name in names) == sorted(sizes)
    assert sorted(owners.values()) == sorted([*range(8)] * 2)


@pytest.mark.parametrize("most", [1, 5000, 2**27, 2**40])
def test_turns_have_all_bytes_of_a_file_in_their_order(most):
    """Pieces are in the order of the file, and each turn has at most `most` bytes, or one row."""
    names = list(QWEN_7B)[:14] if most < 2**20 else list(QWEN_7B)
    divisor = 32 if most < 2**20 else 1
    shapes = {name: tuple(-(-n // divisor) for n in QWEN_7B[name][0]) for name in names}
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    files, owners = ownership.assign(sizes, {"model.safetensors": names}, RANKS)
    found = {file: [] for file in files}
    for turn in ownership.turns(files, owners, sizes, shapes, most):
        for rank, pieces in turn.items():
            n_bytes = [2 * ownership.count_elements(piece.spans(shapes[piece.name])) for piece in pieces]
            row = max(2 * math.prod(shapes[piece.name][1:]) for piece in pieces)
            assert sum(n_bytes) <= max(most, row) + row
            for piece in pieces:
                assert owners[piece.file] == rank
                found[piece.file].append((piece.name, *piece.spans(shapes[piece.name])[0]))
    for file, names in files.items():
        expected, pieces = [(name, row) for name in names for row in (0, shapes[name][0])], found[file]
        assert [end for name, start, stop in pieces for end in ((name, start), (name, stop))
                if end in expected] == expected
        for (name, _, stop), (following, start, _) in zip(pieces, pieces[1:]):
            assert (following, start) == (name, stop) or start == 0


# slices.json


@pytest.fixture
def state(tmp_path):
    """The training state of two tensors, as two shards write it."""
    whole = {"master.a": torch.arange(12.0).view(6, 2), "master.b": torch.arange(5.0)}
    for rank, file in enumerate(saving.slice_files(2)):
        slices, metadata = {}, {"format": "pt"}
        for name, tensor in whole.items():
            spans = ownership.as_integers(ownership.written_spans(tensor.shape, {"shards": 0}, Layout(1, 2, 1), rank))
            slices[name] = tensor[slice(*spans[0])].clone()
            metadata[name] = ", ".join(f"{start}:{stop} of {size}" for (start, stop), size in zip(spans, tensor.shape))
        save_file(slices, tmp_path / file, metadata)
    plan = {"replicas": 1, "shards": 2, "tp": 1,
            "tensors": {name: [list(tensor.shape), {"shards": 0}] for name, tensor in whole.items()}}
    (tmp_path / saving.SLICES).write_text(json.dumps(plan))
    return tmp_path, whole, plan


def test_slices_are_found_with_the_plan_and_without(state):
    directory, whole, _ = state
    for _ in range(2):
        slices = saving.read_slices(str(directory), whole)
        for name, expected in whole.items():
            saving.read_sliced(slices[name], found := torch.empty_like(expected))
            assert torch.equal(found, expected)
        (directory / saving.SLICES).unlink(missing_ok=True)  # as in an older checkpoint


B = {"master.b": [[5], {"shards": 0}]}


@pytest.mark.parametrize("change, message", [
    ({"shards": 3}, "does not fit the 2 files"), ({"shards": 0}, "does not fit"), ({"shards": True}, "does not fit"),
    ({"more": 1}, "does not fit"), ({"tensors": []}, "does not fit"),
    ({"tensors": {"master.a": [[6, -2], {}], **B}}, "does not fit"),
    ({"tensors": {"master.a": [[6, 2], {"shards": 2}], **B}}, "does not fit"),
    ({"tensors": {"master.a": [[6, 2], {"shards": 1}], **B}}, "slices of master.a in its files do not make up one"),
    ({"tensors": B}, r"does not belong .*\['master.a'\] differ"),
    ({"tensors": {"master.a": [[7, 2], {"shards": 0}], **B}}, r"does not belong .*\['master.a'\] differ")])
def test_a_plan_of_other_files_or_tensors_is_an_error(state, change, message):
    directory, whole, plan = state
    (directory / saving.SLICES).write_text(json.dumps({**plan, **change}))
    with pytest.raises(UserError, match=message):
        saving.read_slices(str(directory), whole)


# eight ranks


GRID = ["replicas=2,tp=2>one", "one>replicas=2,tp=2", "tp=2>one", "tp=2>tp=2", "replicas=2>tp=4", "sp=2>replicas=4",
        "optimizer_offload=true,replicas=2>param_offload=true", "use_lora=true,replicas=2>tp=2,use_lora=true",
        "use_lora=true,tp=2>use_lora=true"]


@pytest.mark.full
@pytest.mark.parametrize("pairs", [GRID[:1], GRID[1:]])
def test_eight_ranks_write_each_byte_once_and_read_it_about_once(pairs, tmp_path):
    """Bytes are counted where they are written and read; the program asserts that all values are right."""
    two_layers(tmp_path / "model", hidden_size=56, intermediate_size=296, head_dim=2, vocab_size=2376, **SHAPE_OF_7B)
    path = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    printed = run_all([(RANKS, ("step_directory", tmp_path / "model", tmp_path, *pairs))], tmp_path)
    runs = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [f"{run['saved']}>{run['read']}" for run in runs] == pairs
    for i, run in enumerate(runs):
        directory = tmp_path / str(i) / "step_1"
        weights = pretrained.stored_entries(str(directory))
        state = saving.read_slices(str(directory / checkpoint.STATE_DIRECTORY))  # raises unless they are whole
        bytes_of = {"weights": sum(entry.n_bytes for entry in weights.values()),
                    "state": sum(part.entry.n_bytes for parts in state.values() for part in parts)}
        trained = {name.partition(".")[2]: parts[0].shape for name, parts in state.items()}
        n_elements = sum(map(math.prod, trained.values()))
        is_lora = "use_lora" in run["saved"]
        print(f"saved by {run['saved']}, read by {run['read']}; files opened: {max(run['opened'])} of {RANKS}")
        assert bytes_of == {"weights": (4 if is_lora else 2) * n_elements, "state": (8 if is_lora else 12) * n_elements}
        assert max(run["opened"]) < RANKS
        for key, pattern in (("weights", "*.safetensors"), ("state", "training_state/*.safetensors")):
            assert sum(run[key]) == sum(path.stat().st_size for path in directory.glob(pattern))
            assert len(run[key]) == RANKS and (max(run[key]) <= 1.2 * sum(run[key]) / RANKS
                                               or is_lora and key == "weights")  # PEFT has one file
            replicas = int(dict(re.findall(r"(replicas)=(\d)", run["read"])).get("replicas", 1))
            # each rank of a tp group reads an adapter's matrices that tp does not split
            limit = 2 if is_lora and "tp" in run["read"] else 1.1
            n_read = sum(run[f"read_{key}"]) / replicas
            print(f"  {key:8}{bytes_of[key]:>12,} bytes of tensors, {sum(run[key]):>12,} written, largest / mean "
                  f"{max(run[key]) / sum(run[key]) * RANKS:.2f}; read {n_read / bytes_of[key]:.2f} times a replica")
            assert bytes_of[key] <= n_read <= limit * bytes_of[key], (key, run)
