"""Tokenising on several ranks: one of them may have cached tokens, and another must make them first."""

from helpers import EXAMPLES, TINY, launch_all, metrics

RUN = ("--model", TINY, "--train_data", EXAMPLES, "--max_length", 64, "--batch_size", 8, "--max_steps", 1,
       "--no-gradient_checkpointing")


def test_a_rank_with_cached_tokens_waits_for_one_without(tmp_path):
    """Longer than --timeout, if that one makes progress. If it is stuck, the run ends, and says which rank it was."""
    result = launch_all([
        (1, ("one_cold_cache", "nothing", *RUN, "--output_dir", "one")),
        (2, ("one_cold_cache", "slow", *RUN, "--timeout", 3, "--output_dir", "two"))], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout.count("TOKENISES 0") == result.stdout.count("TOKENISES 1") == 1
    assert len(metrics(tmp_path / "two")) == 1
    (tmp_path / "home_1").rename(tmp_path / "unused")
    result = launch_all([
        (2, ("one_cold_cache", "stuck", *RUN, "--timeout", 3, "--output_dir", "three"))], tmp_path)
    assert result.returncode != 0 and result.stdout.count("TOKENISES 1") == 1
    assert "rank 1 did not respond in tokenise" in result.stderr, result.stderr[-3000:]
    assert "rank 0 waited for it in end of tokenise: timed out: no rank made progress for 5 s" in result.stderr
    assert not (tmp_path / "three" / "metrics.jsonl").exists()
