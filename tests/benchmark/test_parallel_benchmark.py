"""The benchmark of many ranks on two CPU processes and in a group of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import keys, run
from places import EVERYWHERE
from two_processes import run_in_two

from hf_fused_head.benchmark import parallel
from hf_fused_head.benchmark.ranks import joined
from hf_fused_head.benchmark.wire import Message
from hf_fused_head.benchmark.workloads import WORKLOADS

SMOKE = WORKLOADS["smoke"]
MODULE = ("-m", "hf_fused_head.benchmark.parallel")
STEPS = ("-c", "stock,ours,liger", "--steps", "20", "--sequences", "2", "--warmup", "1")


def alone(file: Path, *arguments: str) -> tuple[dict, dict]:
    """Header and rows by name of a run in a group of one."""
    assert parallel.main([*arguments, "--device", "cpu", "--json", str(file)]) == 0
    return read(file)


def in_two(file: Path, *arguments: str, place: str = "cpu") -> tuple[dict, dict]:
    """Header and rows by name of a run on two processes, whose output warns of its times."""
    done = run_in_two(*MODULE, *arguments, "--json", str(file), place=place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 ranks over") == 1, "one rank prints"
    assert ("times are NOT meaningful" in done.stdout) == (place != "cuda")
    return read(file)


def read(file: Path) -> tuple[dict, dict]:
    content = json.loads(file.read_text())
    for key, kind in keys(content):
        if key.endswith("_bytes"):
            assert kind in (int, type(None)), key
    return content["header"], {row["contender"]: row for row in content["results"]}


@pytest.mark.parametrize("place", EVERYWHERE)
def test_a_head_on_two_ranks(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It equals the whole head, its bytes are counted, and times on one device give no verdict."""
    file, shared = tmp_path / "head.json", place != "cuda"
    header, rows = in_two(file, "head", "smoke", "--repeats", "2", "--warmup", "0", place=place)
    assert header["kind"] == "sharded head"
    assert {"date", "commit", "device", "versions", "protocol"} < set(header)
    assert len(header["ranks"].pop("devices")) == 2
    backend = "gloo" if shared else "nccl"
    assert header["ranks"] == {"world_size": 2, "backend": backend, "shared_device": shared}
    assert list(rows) == ["alone", "sharded"]
    sharded = rows["sharded"]
    assert sharded["ranks"] == 2 and sharded["rows"] == rows["alone"]["rows"] == 516
    assert sharded["check"] == "passed" and sharded["truth_dtype"] == "float64"
    assert 0 < sharded["dweight_error"] < 1
    # The logit of the label and a sum for each token; what all agree on is sent once.
    once = sharded["forward_sent_bytes"] - 8 * SMOKE.num_tokens
    assert 0 < once < 100
    assert sharded["backward_sent_bytes"] == 4 * SMOKE.num_tokens * SMOKE.hidden_size
    assert all(row["time_ms"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    assert (sharded["efficiency"] is None) == shared
    for form in ("table", "markdown", "matrix"):
        assert run("bench", "--from-json", file, "--format", form) == 0
        assert "sharded" in capsys.readouterr().out


def test_a_head_in_a_group_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is sent, and the two ways are compared."""
    header, rows = alone(tmp_path / "one.json", "head", "smoke", "--repeats", "2")
    assert "NOT meaningful" not in capsys.readouterr().out
    assert header["ranks"]["world_size"] == 1
    sharded = rows["sharded"]
    assert sharded["rows"] == SMOKE.vocab_size and sharded["forward_sent_bytes"] == 0
    ratio = rows["alone"]["time_ms"] / sharded["time_ms"]
    assert sharded["efficiency"] == pytest.approx(ratio, abs=1e-4)


def test_training_on_two_ranks_and_on_one(tmp_path: Path) -> None:
    """20 losses of both heads, on one rank and on two, are the same; peers say what they miss."""
    two, rows = in_two(tmp_path / "two.json", "step", "smoke", *STEPS)
    _, rows_of_one = alone(tmp_path / "one.json", "step", "smoke", *STEPS)
    assert (two["kind"], two["ranks"]["world_size"]) == ("training step", 2)
    assert list(rows) == ["stock", "ours", "liger"]
    assert rows["liger"]["status"] in ("not installed", "unavailable")
    for name in ("stock", "ours"):
        row = rows[name]
        assert len(row["losses"]) == len(row["samples_ms"]) == 20
        assert row["losses"][-1] < row["losses"][0]
        assert row["tokens_per_second"] == pytest.approx(48e3 / row["time_ms"], abs=0.1)
        # Each rank holds half of what one rank does.
        assert row["held_bytes"] < 0.6 * rows_of_one[name]["held_bytes"] < row["peak_bytes"]
        for losses in (row["losses"], rows_of_one[name]["losses"]):
            torch.testing.assert_close(
                torch.tensor(losses), torch.tensor(rows_of_one["stock"]["losses"])
            )
    assert rows["ours"]["loss_distance"] == max(
        abs(a - b) for a, b in zip(rows["ours"]["losses"], rows["stock"]["losses"], strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", "smoke", "-c", "nope"), "`--contender` must be one of stock, ours"),
        (("step", "smoke", "--warmup", "20"), "`--warmup` must be less than `--steps`, 20"),
        (("head", "smoke", "--device", "tpu"), "`--device` must be cpu or cuda, got 'tpu'"),
        (("head", "smoke", "--json", "no/such/folder/x.json"), "does not exist"),
    ],
)
def test_mistakes_cost_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parallel.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert message in shown.err


def test_rounds_are_counted_from_zero(capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer warm-up rounds than none would take timed ones away."""
    with pytest.raises(SystemExit):
        parallel.main(["head", "smoke", "--warmup", "-1"])
    assert "--warmup: must be a whole number from 0, got '-1'" in capsys.readouterr().err


def test_sequences_are_shared_out_evenly() -> None:
    done = run_in_two(*MODULE, "step", "smoke", "--sequences", "3")
    assert "`--sequences` must be a multiple of the 2 ranks, got 3" in done.stderr


def test_bytes_around_a_ring() -> None:
    assert Message("all_reduce", 100, 4).ring_bytes == 2 * 100 * 3 // 4
    assert Message("all_gather", 100, 4).ring_bytes == 300
    assert Message("reduce_scatter", 100, 4).ring_bytes == 75


def test_ranks_share_the_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer GPUs than processes gloo is taken, and the processes take turns on the GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with joined() as ranks:
        assert (ranks.backend, str(ranks.device), ranks.shared) == ("gloo", "cuda:0", True)
    with joined("cpu") as ranks:
        assert (ranks.backend, ranks.device.type, ranks.shared) == ("gloo", "cpu", True)
