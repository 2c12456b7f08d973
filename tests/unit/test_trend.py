"""The line about a loss that does not fall: each cause is planted, in losses and in runs."""

import json
import random

import pytest
from helpers import TINY, first, write

from screen.trend import ENOUGH, Trend


def trend(losses, per_epoch=None, val_losses=()):
    """The Trend of these losses, in epochs of `per_epoch` steps."""
    made = Trend()
    for step, loss in enumerate(losses, 1):
        made.add(step, loss=loss, epoch=step / (per_epoch or len(losses)))
    for step, loss in val_losses:
        made.add(step, val_loss=loss)
    return made


def noisy(start, end, n=100, noise=0.2, seed=0):
    """n losses on a line from start to end, each with its own noise."""
    random.seed(seed)
    return [start + (end - start) * i / (n - 1) + random.gauss(0, noise) for i in range(n)]


FALLS = [5 * 0.9**i + 1 for i in range(60)]


@pytest.mark.parametrize("losses, per_epoch, says", [
    (FALLS, None, None), (FALLS, 10, None),
    (FALLS[::-1], None, "rose"), (FALLS[::-1], 10, "rose"),
    ([7.0] + [40.0] * 20 + [11.0] * 39, 10, "rose from 7 to 11"),  # it fell again, but not to where it began
    ([7.0] + [40.0] * 20 + [6.0] * 39, 10, None),
    ([3.0] * 60, None, "did not fall"), ([3.0] * 60, 10, "did not fall"),
    ([2.0, 3.0, 4.0] * 20, 3, "did not fall"),  # the same three batches in each epoch
    ([2.0, 3.0, 4.0] * 10 + [1.5, 2.5, 3.5] * 10, 3, None),
    ([3.0 - 1e-5 * i for i in range(60)], 10, "did not fall"),
    ([3.0 - 1e-2 * i for i in range(60)], None, None),
    ([9.0, 5.0] + [1.0] * 58, 10, None),  # it falls in two steps
    ([7.0, 22.0, 40.0, 47.0], None, "rose from 7 to 43.5"), ([7.0, 40.0], None, "rose"), ([7.0, 40.0, 9.0], None, None),
    ([7.0, 20.0], None, None), ([7.0], None, None), ([], None, None),
    (FALLS[: ENOUGH - 1], None, None), ([3.0] * (ENOUGH - 1), None, None), ([3.0] * ENOUGH, None, "did not fall"),
    ([0.0] * 60, 10, "did not fall")], ids=str)
def test_the_line_about_these_losses(losses, per_epoch, says):
    line = trend(losses, per_epoch).diagnosis()
    assert (line is None) if says is None else says in line, line


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_trend(seed):
    """A fall of a third of the noise of a step is seen in 100 steps; the loss is never said to rise by noise."""
    assert trend(noisy(3, 2.5, seed=seed)).diagnosis() is None
    assert "rose" in trend(noisy(2.5, 3, seed=seed)).diagnosis()
    assert "rose" not in str(trend(noisy(3, 3, seed=seed)).diagnosis())


@pytest.mark.parametrize("val_losses, says", [
    ([(10, 3.0), (20, 2.0), (30, 2.5)], "rose from 2 at step 20 to 2.5 at step 30 while the loss fell"),
    ([(10, 3.0), (20, 2.0), (30, 2.005)], None), ([(10, 3.0), (20, 2.5)], None), ([(10, 3.0)], None), ([], None)],
    ids=str)
def test_a_val_loss_that_rises_while_the_loss_falls(val_losses, says):
    line = trend(FALLS, 10, val_losses).diagnosis()
    assert (line is None) if says is None else says in line, line


def test_val_losses_of_other_data_are_not_compared():
    """A resume may bring other --val_data, whose loss is higher from the start."""
    made = trend(FALLS, 10)
    for step, val_loss, val_tokens in (10, 2.0, 5), (20, 3.0, 9), (30, 2.9, 9):
        made.add(step, val_loss=val_loss, val_tokens=val_tokens)
    assert made.diagnosis() is None
    made.add(40, val_loss=3.1, val_tokens=9)
    assert "rose from 2.9 at step 30" in made.diagnosis()


@pytest.mark.parametrize("first", [31, 35, 41, 51])
def test_a_run_that_was_resumed_into_another_directory(first):
    """metrics.jsonl begins at a later step: the first and the last of the epochs that it has whole are compared."""
    losses = {step: 4.0 - 0.05 * step + step % 10 for step in range(first, 61)}
    made = Trend()
    for step, loss in losses.items():
        made.add(step, loss=loss, epoch=step / 10)
    begin = {31: 31, 35: 41, 41: 41}.get(first)  # of the first whole epoch, if it is not the last one too
    if begin:
        means = (sum(losses[step] for step in range(start, start + 10)) / 10 for start in (begin, 51))
        assert made.means() == (*map(pytest.approx, means), 0.0)
        assert made.diagnosis() is None


def test_a_resumed_run_remembers_the_losses_before(tmp_path):
    """They are read from metrics.jsonl, in which other lines may stand."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [
        {"step": 1, "loss": 3.0, "epoch": 0.5, "lr": 1}, {"step": 1, "val_loss": 2.0, "val_tokens": 3},
        {"step": 2, "loss": 2.0, "epoch": 1.0, "skipped": True},
        {"step": 2, "loss": "x", "epoch": 1.0}, {"step": 2, "loss": 1.0, "epoch": None}, {"step": 2, "val_loss": []}]))
    read = Trend(path)
    assert (read.losses, read.epochs, read.val_losses) == ([3.0, 2.0], [0.5, 1.0], [(1, 2.0)])


WORDS = "river hill sun rain salt iron bread stone".split()


def pairs(answer, n=8):
    return [{"prompt": f"word {i}", "response": answer(i)} for i in range(n)]


RUN = "--model", TINY, "--batch_size", 4, "--max_length", 64


@pytest.mark.parametrize("flags, says", first(2, [
    (("--lr", 1, "--epochs", 10), "the loss rose"),
    (("--lr", 1e-9, "--epochs", 10), "the loss did not fall"),
    (("--lr", 4e-3, "--epochs", 10), None),
    (("--lr", 1e-9, "--epochs", 8, "--use_lora"), None),  # 16 steps are too few
]), ids=str)
def test_a_run_ends_with_the_line(flags, says, train, tmp_path, capsys):
    """A planted learning rate: too high, too low, right."""
    path = write(tmp_path / "rows.json", pairs(lambda i: WORDS[i]))
    train(*RUN, "--train_data", path, *flags)
    out, _ = capsys.readouterr()
    assert out.count("warning: the loss") == bool(says) and (says or "") in out


@pytest.mark.full
def test_overfitting_is_said_at_an_evaluation_and_at_the_end(train, tmp_path, capsys):
    """The validation set has other answers to the same prompts."""
    train_path = write(tmp_path / "train.json", pairs(lambda i: WORDS[i]))
    val_path = write(tmp_path / "val.json", pairs(lambda i: WORDS[-1 - i]))
    train(*RUN, "--train_data", train_path, "--val_data", val_path, "--lr", 4e-3, "--epochs", 30, "--eval_steps", 10)
    out, _ = capsys.readouterr()
    assert out.count("warning: val_loss rose from") == 2
