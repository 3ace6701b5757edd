"""`python -m models.train --out --save-every --resume`: the same losses as a run that was not interrupted."""

import json
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import torch

from models import gpt2, train

SHORT = ["--preset", "debug", "--steps", "6", "--batch", "4", "--seq", "16", "--warmup", "2", "--log-every", "2"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither a validation of eight batches nor a sample; and dropout."""
    monkeypatch.setattr(train, "VALIDATION_BATCHES", 1)
    monkeypatch.setattr(train, "SAMPLE_LIMIT", 0)
    monkeypatch.setitem(gpt2.PRESETS, "debug", attrs.evolve(gpt2.PRESETS["debug"], n_layers=1, dropout=0.1))
    was, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(was)
    torch.set_num_threads(threads)


def run(metrics: Path, *arguments: str) -> dict[int, dict[str, float]]:
    """The metrics of each step."""
    assert train.main([*SHORT, "--family", "gpt2", "--metrics", str(metrics), *arguments]) == 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def test_a_run_that_is_resumed_has_bitwise_the_losses_of_one_that_was_not_interrupted(tmp_path: Path):
    out = tmp_path / "out"
    whole = run(tmp_path / "whole.jsonl", "--out", str(out), "--save-every", "2", "--seed", "3")
    assert sorted(path.name for path in out.iterdir()) == ["run.json", *(f"step-0000000{n}" for n in (2, 4, 6))]
    resumed = run(tmp_path / "part.jsonl", "--resume", str(out / "step-00000002"), "--seed", "3")
    assert resumed == {step: line for step, line in whole.items() if step > 2}
    assert len({line["loss"] for line in whole.values()}) == 6
    again = run(tmp_path / "whole.jsonl", "--resume", str(out / "step-00000004"), "--seed", "3")
    assert again == whole


def test_the_latest_checkpoint_of_a_run_is_taken_and_what_cannot_go_on_is_told(tmp_path: Path, capfd):
    out = str(tmp_path / "out")
    run(tmp_path / "first.jsonl", "--out", out, "--steps", "3")
    (tmp_path / "out" / ".step-00000009.writing").mkdir()
    (tmp_path / "out" / "step-00000003").rename(tmp_path / "out" / ".step-00000003.previous")
    assert list(run(tmp_path / "then.jsonl", "--resume", out, "--steps", "5")) == [4, 5]
    (tmp_path / "out" / ".step-00000003.previous").rename(tmp_path / "out" / "step-00000003")
    capfd.readouterr()
    common = [*SHORT, "--family", "gpt2", "--metrics", str(tmp_path / "m.jsonl")]
    for arguments, message in (
        (["--resume", out, "--steps", "3"], "is of step 3 already"),
        (["--resume", out, "--seed", "1"], "--seed 1: the run that was saved had 0"),
        (["--save-every", "2"], "--save-every needs --out"),
        (["--out", str(tmp_path / "first.jsonl")], "File exists"),
    ):
        assert train.main([*common, *arguments]) == 2
        assert message in capfd.readouterr().err
    assert train.main([*common, "--resume", str(tmp_path / "none")]) == 1
    assert "SS409" in capfd.readouterr().err
