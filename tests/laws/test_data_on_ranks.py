"""Tokenising on several ranks: one of them may have cached tokens, or be in another day."""

import json
import re

import pytest
from helpers import EXAMPLES, TINY, chatml, launch_all, make_directory, metrics, model_directory, run_all

RUN = ("--model", TINY, "--train_data", EXAMPLES, "--max_length", 128, "--batch_size", 8, "--max_steps", 1,
       "--no-gradient_checkpointing")


@pytest.mark.full
def test_a_rank_with_cached_tokens_waits_for_one_without(tmp_path):
    """Longer than --timeout, if that one makes progress."""
    result = launch_all([
        (1, ("one_cold_cache", "nothing", *RUN, "--output_dir", "one")),
        (2, ("one_cold_cache", "slow", *RUN, "--timeout", 3, "--output_dir", "two"))], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout.count("TOKENISES 0") == result.stdout.count("TOKENISES 1") == 1
    assert len(metrics(tmp_path / "two")) == 1


@pytest.mark.full
def test_a_rank_that_is_stuck_in_tokenising_ends_the_run(tmp_path):
    """The other one has its tokens in the cache, waits no longer than --timeout, and says which rank it was."""
    result = launch_all([
        (1, ("one_cold_cache", "nothing", *RUN, "--output_dir", "one")),
        (2, ("one_cold_cache", "stuck", *RUN, "--timeout", 3, "--output_dir", "three"))], tmp_path)
    assert result.returncode != 0 and result.stdout.count("TOKENISES 1") == 1
    assert re.search(r"rank 1 \(node 0, \S+\) did not respond in tokenise: it has not moved for 3 s, and rank 0 waits "
                     "for it in tokenise", result.stderr), result.stderr[-3000:]
    assert not (tmp_path / "three" / "metrics.jsonl").exists()


@pytest.mark.full
def test_all_ranks_print_the_date_of_rank_0_and_a_resumed_run_prints_it_again(tmp_path):
    """Two ranks whose dates differ, and a template with the date; then a resume on a day that is another on both."""
    directory = model_directory(tmp_path / "model")
    make_directory(directory, "{{- 'On ' + strftime_now('%Y-%m-%d') + '\n' }}" + chatml("m.content"))
    program = "time_zones", "Etc/GMT+12,Etc/GMT-14"
    flags = (*RUN[2:], "--model", directory, "--cache_dir", "none", "--output_dir", "out")

    def dates(screen):
        """[(rank, its date)], and the dates that are printed in its prompts."""
        found = re.findall(r"RANK (\d), (\S+) here: .On ([\d-]+)\\n", screen)
        return sorted((int(rank), here) for rank, here, _ in found), {printed for _, _, printed in found}

    (here, printed) = dates(run_all([(2, (*program, *flags))], tmp_path))
    assert [rank for rank, _ in here] == [0, 1] and here[0][1] != here[1][1]
    assert printed == {here[0][1]}
    state = next((tmp_path / "out" / "checkpoints" / "latest").rglob("state.json"))
    assert json.loads(state.read_text())["date"] == here[0][1]

    program = "time_zones", "Etc/GMT-14,Etc/GMT-14"
    (again, printed) = dates(run_all([
        (2, (*program, *flags, "--max_steps", 2, "--resume_from", "auto"))], tmp_path))
    assert {day for _, day in again}.isdisjoint(printed) and printed == {here[0][1]}
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2]
