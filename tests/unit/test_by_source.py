"""screen/by_source.py: which sources a line names, and what metrics.jsonl and the loggers get."""

import numpy as np
import torch
from helpers import EXAMPLES, FAST, write

from ops.overlap import Figures
from screen.by_source import MOST, OTHER, Sources
from screen.log import Logger


class Data:
    """What Sources reads of a data.Dataset; each target has the weight 0.5."""

    def __init__(self, names, source_of, n_targets):
        self.source_names, self.source_of, self.n_targets = names, np.array(source_of), np.array(n_targets)

    def count(self, ids):
        return {"target_weight": 0.5 * self.n_targets[ids].sum()}


def test_one_source_is_none():
    """Even if a second one has a name, but no conversation."""
    assert Sources(Data(["a"], [0, 0], [5, 6])).names == []
    assert Sources(Data(["a", "b"], [0, 0], [5, 6])).names == []


def test_a_step_has_the_sources_of_its_conversations():
    sources = Sources(Data(["a", "b", "c"], [2, 0, 2, 1], [1, 2, 3, 4]))
    assert sources.names == ["a", "b", "c"] and sources.index.tolist() == [2, 0, 2, 1]
    assert sources.values(np.array([0, 1, 2]), [3.0, 0.0, 4.0]) == {
        "a": {"loss": 3.0, "target_weight": 1.0}, "c": {"loss": 2.0, "target_weight": 2.0}}


def test_the_largest_keep_their_names():
    """Of 25, the 20 with the most targets, and "other". A source that is called so gets those of the rest too."""
    n_targets = [100 - i for i in range(25)]
    n_targets[3] = 1
    names = [f"s{i}" for i in range(25)]
    expected = names[:3] + names[4:MOST + 1]
    sources = Sources(Data(names, range(25), n_targets))
    assert sources.names == [*expected, OTHER] and (sources.index == MOST).sum() == 5
    assert sources.index[[3, 21, 24]].tolist() == [MOST] * 3
    names[0] = OTHER
    sources = Sources(Data(names, range(25), n_targets))
    assert len(sources.names) == MOST and sources.names[0] == OTHER and (sources.index == 0).sum() == 6


def test_figures_have_numbers_and_lists():
    figures = Figures(torch.device("cpu"))
    figures.queue(a=torch.tensor(2.0), b=torch.tensor([1.0, 3.0]), c=torch.zeros(0), d=None, e=torch.tensor(4))
    assert figures.read()[0] == {"a": 2.0, "b": [1.0, 3.0], "e": 4.0}


def test_loggers_get_each_source_by_name(train, tmp_path, monkeypatch):
    """As loss/NAME, and the accuracy; a run with one source has no `sources`."""
    sent = []
    monkeypatch.setattr(Logger, "__init__", lambda self, *_: None)
    monkeypatch.setattr(Logger, "put", lambda self, item: sent.append(item))
    monkeypatch.setattr(Logger, "close", lambda self: None)
    rows = [{"prompt": "a", "response": "b c", "source": f"s{i % 2}"} for i in range(4)]
    data = write(tmp_path / "rows.json", rows)
    flags = (*FAST, "--logger", "tensorboard", "--batch_size", 4, "--max_steps", 1, "--cache_dir", "none")
    (line,) = train(*flags, "--train_data", data)
    assert set(line["sources"]) == {"s0", "s1"}
    ((values, step),) = sent
    assert step == 1 and values["train/accuracy"] == line["accuracy"] and "train/sources" not in values
    for name, part in line["sources"].items():
        assert values[f"train/loss/{name}"] == part["loss"]
    (line,) = train(*flags, "--train_data", EXAMPLES, out="one")
    assert "sources" not in line and "accuracy" in line and not any("/loss/" in name for name in sent[-1][0])
