"""Validation: named sets, a share split off, the losses before training, forgetting, and tools/evaluate.py."""

import gzip
import hashlib
import json
import math
import os
import random
import re
import signal
import sys

import pytest
from data_helpers import tiny
from helpers import EXAMPLES, FAST, TINY, VALIDATION, metrics, target_texts, write

import data
import sft
from disk import inputs
from screen import validation
from settings import parser
from settings.errors import UserError
from settings.parser import parse
from text import conversations, sources
from tools import evaluate

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(200)]
SHORT = (*FAST, "--max_length", 64, "--batch_size", 4, "--no-gradient_checkpointing")


def answers(dataset):
    return [target_texts(dataset, i)[0] for i in range(len(dataset))]


# ---- sources and sets ---------------------------------------------------------------------------------------------


def test_a_source_is_a_name_or_a_column_or_a_file(tmp_path):
    """NAME= comes first, then the row's column `source`, then the file as the ledger prints it."""
    a = write(tmp_path / "a.json", [{**ROWS[0], "source": "web"}, ROWS[1], {**ROWS[2], "source": 7}])
    b = write(tmp_path / "b.json", [{**ROWS[3], "source": "web"}, ROWS[4]])
    dataset = data.load(f"{a},wiki={b}", tiny, 64)
    assert dataset.source_names == ["wiki", "web", a, "7"]
    assert [dataset.source_names[i] for i in dataset.source_of] == ["web", a, "7", "wiki", "wiki"]
    assert {name: ids.tolist() for name, ids in dataset.by_source().items()} == {
        "wiki": [3, 4], "web": [0], a: [1], "7": [2]}


def test_very_many_sources_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "MOST_SOURCES", 3)
    path = write(tmp_path / "a.json", [{**row, "source": f"s{i}"} for i, row in enumerate(ROWS[:6])])
    assert data.load(path, tiny, 64).source_names == ["s0", "s1", "s2", "other"]


def test_rows_that_are_trained_and_validated_are_counted(tmp_path, train, capsys):
    """By their tokens, not by their place: the answer alone, the first word or the length may be equal in others. In
    each set, and with --val_split."""
    words = "a b c d".split()
    rows = [{"prompt": f"{p} {q}", "response": r} for p in words for q in words for r in words]
    random.Random(0).shuffle(rows)
    trained, both, new = rows[:30], rows[20:30], rows[30:50]
    a, b, c = (write(tmp_path / f"{i}.json", part) for i, part in enumerate((trained, both + new, new)))
    of_a, of_b, of_c = (data.load(path, tiny, 64) for path in (a, b, c))
    assert [validation.n_trained_too(x, range(len(x)), y) for x, y in (
        (of_b, of_a), (of_a, of_b), (of_c, of_a), (of_a, of_a))] == [10, 10, 0, 30]
    assert validation.n_trained_too(of_b, [0, 9, 10], of_a) == 2
    flags = (*SHORT, "--max_steps", 1, "--train_data", a)
    train(*flags, "--val_data", f"x={b},y={c}")
    line = "overlap  10 of 30 validation conversations of x are in the training data too: their loss is lower than on new data"
    assert f"\n{line}\nsets     x 30" in capsys.readouterr().out
    train(*flags, "--val_data", c, out="other")
    assert "overlap" not in capsys.readouterr().out
    long = write(tmp_path / "long.json", [{"prompt": "a", "response": f"{'b ' * 70}{i}"} for i in range(20)])
    train(*flags, "--train_data", f"{long},{a}", "--val_split", 0.5, out="cut")  # they differ behind --max_length only
    assert re.search(r"\noverlap  \d+ of \d+ validation conversations are in .*\nsplit ", capsys.readouterr().out)


def test_names_make_sets(tmp_path):
    """The same name twice is one set; without names all sources are one."""
    a, b, c = (write(tmp_path / f"{i}.json", ROWS[i : i + 1]) for i in range(3))
    in_yaml = json.dumps({"x": a, "y": b})  # val_data: {x: a.json, y: b.json}
    for spec, expected in [(f"x={a},y={b},x={c}", {"x": [0, 2], "y": [1]}), (in_yaml, {"x": [0], "y": [1]}), (f"{a},{b}", {None: [0, 1]}),
                           (f"x={a}", {"x": [0]})]:
        sets = validation.sets_of(data.load(spec, tiny, 64), spec)
        assert {name: part.ids.tolist() for name, part in sets.items()} == expected
    joined = validation.sets_of(data.load(f"x={a},x={b}", tiny, 64), f"x={a},x={b}")["x"]
    alone = validation.sets_of(data.load(f"{a},{b}", tiny, 64), f"{a},{b}")[None]
    assert joined.digest == alone.digest != sets["x"].digest and joined.tokens == alone.tokens


@pytest.mark.parametrize("rows", [ROWS[:2], [{"prompt": "a", "response": "b", "weight": 0.5}] + ROWS[:1]])
def test_a_digest_is_of_tokens_targets_and_weights(rows, tmp_path):
    """And not of what else is in the data."""
    others = [rows[::-1], [{**rows[0], "weight": 2.0}, rows[1]], rows[:1], [rows[0], {**rows[1], "response": "c"}]]
    digests = set()
    for i, some in enumerate([rows, *others]):
        dataset = data.load(write(tmp_path / f"{i}.json", some), tiny, 64)
        digests.add(validation.digest_of(dataset, range(len(dataset))))
        more = data.load(write(tmp_path / f"m{i}.json", [{**ROWS[9], "weight": 3.0}, *some, ROWS[8]]), tiny, 64)
        assert validation.digest_of(more, range(1, len(dataset) + 1)) in digests
    assert len(digests) == 5


def test_wrong_names_are_one_clear_error(tmp_path):
    a, b = (write(tmp_path / f"{name}.json", ROWS[:1]) for name in "ab")
    with pytest.raises(UserError, match=f"only some of the sources have a name, x; write NAME= before {b} too"):
        sources.set_names(f"x={a},{b}")
    for spec, text in [(f"x={a},y={b}", "the sets are x, y$"), (a, "its one set has no name")]:
        with pytest.raises(UserError, match=f"--keep_best z: no validation set of --val_data is called so; .*{text}"):
            inputs.check_sets(sft.Config(val_data=spec, keep_best="z"))
    with pytest.raises(UserError, match="--keep_best z: --val_split makes one set, without a name"):
        inputs.check(sft.Config(model=TINY, train_data=EXAMPLES, val_split=0.5, keep_best="z"))
    empty = write(tmp_path / "c.json", [{**ROWS[0], "weight": 0}])
    spec = f"x={a},y={empty}"
    with pytest.raises(UserError, match="y has no rows, or all are dropped"):
        validation.sets_of(data.load(spec, tiny, 64), spec)


def test_a_name_can_be_shown(tmp_path):
    """Blanks around it do not count, in any form; no character moves the cursor or is part of the grammar."""
    a = write(tmp_path / "a.json", ROWS[:1])
    mapping = json.dumps([{"path": a, "name": " my set "}])
    assert all(sources.set_names(spec) == ["my set"] for spec in (f" my set ={a}", "my set =org/name", mapping))
    for spec in f"x\x1b[2J={a}", f"x\ny={a}", json.dumps([{"path": a, "name": "x\x1by"}]):
        with pytest.raises(UserError, match="can't"):
            sources.set_names(spec)
    for name in "gsm8k/test", "a:b", "a@b", "a=b/c":
        with pytest.raises(UserError, match=re.escape(f"the name {name} can't have any of : @ [ ] /")):
            sources.set_names(f"{name}={a}")


@pytest.mark.parametrize("flags, value", [
    (["--keep_best"], True), (["--keep_best", "math"], "math"), (["--keep_best", "--lr", "1"], True),
    (["--keep_best", "lr=1"], True), (["keep_best=math"], "math"), (["--keep_best", "false"], False),
    (["--no-keep_best"], False), (["--keep_best=yes"], True)])
def test_keep_best_is_a_switch_or_a_name(flags, value):
    assert parse(sft.Config, [*flags, "--val_data", "v"])[0].keep_best == value


# ---- a share split off --------------------------------------------------------------------------------------------


def sides(spec, share=0.3, **options):
    """The answers on the side of training, and on that of validation."""
    return tuple(answers(data.load(spec, tiny, 64, val_split=share, is_validation=side, **options)) for side in (False, True))


def test_the_split_depends_on_what_rows_say_alone(tmp_path):
    """Not on order, file, container, names of columns, ids or nulls; equal rows are on one side. No row is lost."""
    train, val = sides(write(tmp_path / "a.json", ROWS))
    assert sorted(train + val) == sorted(answers(data.load(str(tmp_path / "a.json"), tiny, 64)))
    assert 0.2 < len(val) / 200 < 0.4
    shuffled = random.Random(1).sample(ROWS, 200)
    other = [{"id": i, "instruction": row["prompt"], "input": None, "output": row["response"]}
             for i, row in enumerate(shuffled + ROWS[:50])]
    path = tmp_path / "b.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, other)).encode()))
    other_train, other_val = sides(str(path))
    assert (set(other_train), set(other_val)) == (set(train), set(val)) and len(other_train + other_val) == 250
    assert set(val) < set(sides(str(path), 0.6)[1])
    # as docs/data.md defines it: another hash would give every user another split
    contents = [json.dumps([[{"content": row["prompt"], "role": "user"}, {"content": row["response"], "role": "assistant"}],
                            None, None, None]) for row in ROWS]
    assert len(sides(EXAMPLES, 0.1)[1]) == 7  # as the page says
    numbers = [int(hashlib.blake2b(content.encode(), digest_size=8).hexdigest(), 16) for content in contents]
    assert [text.split("<")[0] for text in val] == [row["response"] for row, n in zip(ROWS, numbers) if n < 0.3 * 2**64]


def test_rows_that_cannot_be_used_are_counted_once(tmp_path):
    """On the side of training; with --split_turns all turns of a row are on one side; texts and tokens are split too."""
    chats = [{"messages": [{"role": role, "content": f"{role} {i} {turn}"} for turn in range(2)
                           for role in ("user", "assistant")]} for i in range(30)]
    rows = [*chats, {"nonsense": 1}, *({"text": f"text {i}"} for i in range(20)),
            *({"input_ids": [1, 2, i], "labels": [-100, 2, i]} for i in range(3, 23))]
    path = write(tmp_path / "rows.json", rows)
    train, val = (data.load(path, tiny, 64, val_split=0.4, is_validation=side, bad_rows="drop", split_turns=True).ledger
                  for side in (False, True))
    assert train.of_rows + val.of_rows == len(rows) and (train.dropped, val.dropped) == ({"bad": 1}, {})
    assert all(0 < val.kinds[kind] < train.kinds[kind] + val.kinds[kind] for kind in ("chat", "text", "tokens"))
    assert train.kinds["chat"] % 2 == val.kinds["chat"] % 2 == 0


def test_an_empty_side_is_an_error(tmp_path):
    path = write(tmp_path / "rows.json", ROWS[:3])
    with pytest.raises(UserError, match="--val_split 1e-06: no row is for validation.*raise it"):
        data.load(path, tiny, 64, val_split=1e-6, is_validation=True)
    with pytest.raises(UserError, match="--val_split 0.999999: no row is for training.*lower it"):
        data.load(path, tiny, 64, val_split=0.999999)


def test_a_run_with_a_split(train, tmp_path, capsys):
    """Weights of the training data are allowed. The ledger has both sides; a resume with another share is refused."""
    a, b = write(tmp_path / "a.json", ROWS[:40]), write(tmp_path / "b.json", ROWS[40:80])
    flags = (*SHORT, "--train_data", f"{a}:0.7,{b}:0.3", "--max_steps", 1)
    lines = train(*flags, "--val_split", 0.3)
    _, val = sides(f"{a},{b}")
    out = capsys.readouterr().out
    assert f"rows     {80 - len(val)} in = " in out and f"rows     {len(val)} in = {len(val)} trained + 0 dropped (validation)" in out
    assert f"split    {len(val)} of 80 rows are for validation, by a hash of each one (--val_split 0.3)" in out
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 1]
    for share in "0.2", "none", "0.300001":  # the last one makes the same sides
        with pytest.raises(UserError, match=f"val_split 0.3 then, {share} now.*type --val_split 0.3"):
            train(*flags, "--resume_from", "auto", "--val_split", share)
    assert len(train(*flags, "--resume_from", "auto", "--max_steps", 2)) == 5


# ---- before training and after it ---------------------------------------------------------------------------------


def val_lines(lines):
    return [line for line in lines if "val_loss" in line]


def test_losses_before_training_and_what_is_forgotten(train, tmp_path, capsys, monkeypatch):
    """Of each set and of all together; a resume neither repeats step 0 nor loses it. `best` goes by the named set."""
    general, math_rows = write(tmp_path / "general.json", ROWS[:9]), write(tmp_path / "math.json", ROWS[9:12])
    flags = (*SHORT, "--val_data", f"general={general},math={math_rows}", "--eval_steps", 1, "--keep_best", "math")
    straight = train(*flags, "--max_steps", 3, "--save_steps", 2)
    lines = val_lines(train(*flags, "--resume_from", "out/checkpoints/step_2", "--max_steps", 3))
    assert lines == val_lines(straight) and [line["step"] for line in lines] == [0, 1, 2, 3]
    first = lines[0]
    assert first["forgetting"] == 0 and abs(first["val_loss"] - 7.65) < 0.3
    for line in lines:
        sets = line["val_sets"]
        assert list(sets) == ["general", "math"] and sum(s["tokens"] for s in sets.values()) == line["val_tokens"]
        for key, whole in ("loss", "val_loss"), ("accuracy", "val_accuracy"), ("forgetting", "forgetting"):
            together = sum(s[key] * s["tokens"] for s in sets.values()) / line["val_tokens"]
            assert math.isclose(line[whole], together, rel_tol=1e-12, abs_tol=1e-12)
        assert math.isclose(line["forgetting"], line["val_loss"] - first["val_loss"], abs_tol=1e-12)
        for name, values in sets.items():
            assert values["forgetting"] == values["loss"] - first["val_sets"][name]["loss"]
    state = json.loads((tmp_path / "out/checkpoints/latest/training_state/state.json").read_text())
    assert state["best"]["val_loss"] == min(line["val_sets"]["math"]["loss"] for line in lines[1:])
    out = capsys.readouterr().out
    assert f"step 3: val_loss {lines[3]['val_loss']:.4f}, accuracy " in out and "forgetting is not known" not in out
    assert f"step 3:   math: {lines[3]['val_sets']['math']['loss']:.4f}, accuracy " in out
    assert f"forgetting {lines[3]['forgetting']:+.4f}, {lines[3]['val_tokens']} tokens" in out
    assert "sets     general 9 conversations" in out

    # another set to judge by has a lowest loss already; a set that is new has none, nor a loss from before training
    changed = (*flags[:-1], "general", "--resume_from", "auto", "--max_steps", 4, "--lr", 0)
    train(*changed, "--val_data", f"general={general},new={write(tmp_path / 'new.json', ROWS[12:14])}")
    out = capsys.readouterr().out
    lowest = min(line["val_sets"]["general"]["loss"] for line in lines[1:])
    assert f"another validation set now: its lowest val_loss is {lowest:.4f}, of step 3" in out
    assert "forgetting is not known of new" in out
    last = val_lines(metrics(tmp_path / "out"))[-1]
    assert "forgetting" not in last and "forgetting" not in last["val_sets"]["new"] and last["val_sets"]["general"]["forgetting"] < 0
    state = json.loads((tmp_path / "out/checkpoints/latest/training_state/state.json").read_text())
    assert state["best"]["val_loss"] == lowest and os.readlink(tmp_path / "out/checkpoints/best") in ("step_3", "step_4")
    train(*changed, "--max_steps", 5, "--val_data", f"new={tmp_path / 'new.json'},general={general}", "--keep_best", "new")
    assert "another validation set now" in capsys.readouterr().out
    train(*changed, "--max_steps", 6, "--val_data", f"other={write(tmp_path / 'other.json', ROWS[14:15])}",
          "--keep_best", "other")
    assert "is of other validation data" in capsys.readouterr().out


def test_a_checkpoint_of_an_older_version_has_no_loss_from_before(train, tmp_path, capsys, monkeypatch):
    flags = (*SHORT, "--val_data", VALIDATION, "--eval_steps", 1)
    save = sft.RunState.save

    def save_without(self, *args):
        self.baseline = {}
        save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(sft.RunState, "save", save_without)
        train(*flags, "--max_steps", 1)
    capsys.readouterr()
    lines = val_lines(train(*flags, "--max_steps", 2, "--resume_from", "auto"))
    assert "forgetting is not known: the checkpoint has no loss from before training" in capsys.readouterr().out
    assert [(line["step"], "forgetting" in line) for line in lines] == [(0, True), (1, True), (2, False)]


def test_a_new_run_over_one_that_never_saved_has_step_0_once(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 0, "val_loss": 1.0}\n')
    parser.write_yaml(sft.Config(model=TINY, output_dir="out"), tmp_path / "out" / "config.yaml")
    lines = train(*SHORT, "--max_steps", 1, "--val_data", VALIDATION)
    assert [line["step"] for line in lines] == [0, 1, 1] and lines[0]["val_loss"] > 2


def test_a_signal_before_the_first_step_ends_the_run_at_once(train, tmp_path, monkeypatch, capfd):
    """In the evaluation, which may take long; nothing is saved, and the next run begins with step 0."""
    whole = sft.evaluate

    def evaluate_and_signal(*args):
        whole(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    flags = (*SHORT, "--max_steps", 1, "--val_data", VALIDATION)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "evaluate", evaluate_and_signal)
        with pytest.raises(SystemExit) as info:
            train(*flags)
    assert info.value.code == 143
    assert "SIGTERM: stopped before training began; nothing new to save" in capfd.readouterr().err
    assert metrics(tmp_path / "out") == [] and os.listdir(tmp_path / "out" / "checkpoints") == []
    assert [line["step"] for line in train(*flags, "--resume_from", "auto")] == [0, 1, 1]


# ---- tools/evaluate.py --------------------------------------------------------------------------------------------


def evaluated(capsys, monkeypatch, *arguments):
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()
    return capsys.readouterr().out


def assert_like_the_run(result, line):
    """Loss and accuracy of each set and together; the count and the perplexity follow."""
    for name, values in {**line["val_sets"], None: {"loss": line["val_loss"], "accuracy": line["val_accuracy"],
                                                    "tokens": line["val_tokens"]}}.items():
        found = result if name is None else result["sets"][name]
        for key in "loss", "accuracy", "tokens":
            assert found[key] == values[key], (name, key)
        assert found["perplexity"] == math.exp(found["loss"])


@pytest.mark.parametrize("lora", [False, True])
def test_evaluate_has_the_numbers_of_the_run(lora, train, tmp_path, capsys, monkeypatch):
    """Bit by bit, with the run's own settings; tests/laws/test_weights.py has two ranks. It writes nothing."""
    rows = write(tmp_path / "rows.json", ROWS[:5])
    adapter = ("--use_lora", "--lr", 1e-2) if lora else ()
    line = train(*FAST, "--max_length", 80, "--train_on", "last", "--max_steps", 2, *adapter,
                 "--val_data", f"a={VALIDATION},b={rows}")[-1]
    sets, there = (f"a={VALIDATION}", f"b={rows}"), sorted(tmp_path.rglob("*"))
    result = json.loads(evaluated(capsys, monkeypatch, "out/checkpoints/latest", *sets, "--json"))
    assert_like_the_run(result, line)
    table = evaluated(capsys, monkeypatch, "out/checkpoints/step_2", rows, VALIDATION, "--cache_dir", "none")
    b = line["val_sets"]["b"]
    assert f"{b['loss']:10.4f} {math.exp(b['loss']):12.4f} {100 * b['accuracy']:8.2f} %" in table
    assert [row.split()[0] for row in table.splitlines()[-4:]] == ["set", rows, VALIDATION, "together"]
    assert sorted(tmp_path.rglob("*")) == there


def test_evaluate_takes_sets_in_any_form():
    """Arguments with names are one set each; one without is called as it is written."""
    values = evaluate.values_of(1, validation.Result(1.0, 0.5, 2, 2.0))
    assert evaluate.arguments_of(["m", "a=x", "y", "--tp", "2"]) == ["--model=m", '--data=["a=x", "y"]', "--tp", "2"]
    assert evaluate.arguments_of(["--model", "m", "--data", "a=x,b=y"]) == ["--model", "m", "--data", "a=x,b=y"]
    with pytest.raises(UserError, match=r"m: no FILE follows; write python tools/evaluate.py MODEL FILE \[FILE"):
        evaluate.arguments_of(["m", "--json", "a=x"])
    rows = evaluate.table([("together", values), ("together", values)])  # a set may be called so
    assert [row.split()[0] for row in rows] == ["set", "together", "together"]
    assert evaluate.specs_of(json.dumps([EXAMPLES])) == [(EXAMPLES, EXAMPLES)]
    named = f"a={EXAMPLES}", f"b={VALIDATION},a={VALIDATION}"
    assert evaluate.specs_of(json.dumps([named[0], EXAMPLES, named[1]])) == [(None, ",".join(named)), (EXAMPLES, EXAMPLES)]
    assert evaluate.specs_of(",".join(named)) == [(None, ",".join(named))]
