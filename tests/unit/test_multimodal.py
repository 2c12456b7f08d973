"""The text model of a multimodal directory is trained; all else in it is in each checkpoint as it was."""

import pytest
import torch
from helpers import run_all
from multimodal_helpers import READ, SPELLINGS, check_kept, loading_info, multimodal, raw_tensors

SHORT = ("--batch_size", "2", "--max_length", "64", "--max_steps", "2", "--cache_dir", "none")


@pytest.mark.parametrize("kind", READ)
def test_a_checkpoint_has_all_tensors_and_files(train, tmp_path, kind):
    """The trained ones changed, the others to the byte; transformers loads it as it loads the original."""
    directory = multimodal(tmp_path / "m", kind)
    train(*SHORT, "--lr", "1e-2", model=directory)
    step = tmp_path / "out" / "checkpoints" / "step_2"
    check_kept(directory, step)
    model, info = loading_info(step)
    assert info == loading_info(directory)[1] and not info["missing_keys"]
    with torch.no_grad():
        assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_and_layout_round_trips_to_the_byte(train, tmp_path, spelling):
    directory = multimodal(tmp_path / "m", READ[0], spelling, files=3)
    train(*SHORT, "--lr", "0", "--max_steps", "1", model=directory)
    step = tmp_path / "out" / "checkpoints" / "step_1"
    assert raw_tensors(step) == raw_tensors(directory)
    for path in directory.glob("model-*.safetensors"):
        assert path.read_bytes() == (step / path.name).read_bytes()
