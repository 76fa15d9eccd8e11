"""`hf-fused-head` as people call it: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from command_line import keys, run

from hf_fused_head.benchmark import contenders, self_check, suite
from hf_fused_head.planning.problem import DEFAULT_MEMORY_BUDGET_MIB

SMOKE_LOGITS = 192 * 1031


def test_help_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\n"
        "from hf_fused_head.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as stop:\n"
        "    print(stop.code, sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 []"
    for command in ("doctor", "models", "plan", "bench"):
        assert command in done.stdout


def test_bench_checks_measures_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "smoke.json"
    names = "floor,ours,ours@1,stock,torch"
    arguments = ("bench", "smoke", "-c", names, "--check", "--repeats", 2, "--json", file)
    assert run(*arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == "", "a pipe gets no progress bar"
    content = json.loads(file.read_text())
    rows = {row["contender"]: row for row in content["results"]}
    assert list(rows) == names.split(",")
    for row in rows.values():
        assert row["contender"] in shown.out
        assert row["status"] == "ok" or row["contender"] == "torch"
    assert rows["ours"]["check"] == "passed"
    assert rows["ours"]["dweight_error"] < 1
    assert rows["ours@1"]["memory_budget_bytes"] == 2**20
    assert rows["stock"]["peak_bytes"] >= 2 * 4 * SMOKE_LOGITS
    assert {"date", "commit", "device", "cpu", "cpu_threads", "versions", "protocol"} == set(
        content["header"]
    )
    for key, kind in keys(content):
        if key.endswith("_bytes"):
            assert kind in (int, type(None)), key
        if key.endswith("_ms") and key != "samples_ms":
            assert kind in (float, type(None)), key


def test_bench_shows_a_saved_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "smoke.json"
    assert run("bench", "smoke", "-c", "ours,liger", "--repeats", 1, "--json", file) == 0
    capsys.readouterr()
    for form in ("markdown", "matrix"):
        assert run("bench", "--from-json", file, "--format", form) == 0
        assert "smoke 192x64x1031" in capsys.readouterr().out


def test_bench_names_a_missing_contender(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no word of a cell on a line of its own
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    assert run("bench", "smoke", "-c", "quack,trl", "--repeats", 1) == 0
    assert capsys.readouterr().out.count("not installed") >= 2


def test_bench_exits_with_1_when_the_check_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = contenders.linear_cross_entropy
    monkeypatch.setattr(
        contenders, "linear_cross_entropy", lambda *args, **kwargs: right(*args, **kwargs) * 1.001
    )
    file = tmp_path / "wrong.json"
    assert run("bench", "smoke", "-c", "ours", "--check", "--json", file) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "loss error" in error and "dweight error" in error
    assert not file.exists()


@pytest.mark.parametrize("frozen", [False, True])
def test_plan_has_one_record_a_schedule(
    frozen: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    extra = ("--frozen-head",) if frozen else ()
    assert run("plan", "llama3-8b", "--tokens", 8192, *extra, "--json", file) == 0
    content = json.loads(file.read_text())
    assert content["stock_logits_bytes"] == 8192 * 128256 * 2
    assert content["stock"]["passes"] == (2 if frozen else 3)
    gradients = 8192 * 4096 * 2 + (0 if frozen else 128256 * 4096 * 2)
    names = [option["schedule"] for option in content["schedules"]]
    assert names and [option["chosen"] for option in content["schedules"]].count(True) == 1
    for option in (content["stock"], *content["schedules"]):
        assert type(option["workspace_bytes"]) is int
        assert option["gradient_bytes"] == gradients
        assert option["passes"] >= content["stock"]["passes"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in ["stock", *names])


@pytest.mark.parametrize(
    ("card", "impl"), [("NVIDIA A100", "triton:tile"), ("h200", "triton:epilogue")]
)
def test_plan_for_a_card_that_is_not_here(card: str, impl: str, tmp_path: Path) -> None:
    """With the memory for the library's products in the workspace, where it makes them."""
    files = [tmp_path / "named.json", tmp_path / "cuda.json"]
    options = ("llama3-8b", "--tokens", 8192, "--impl", "triton", "--budget-mib", 4096, "--json")
    assert run("plan", *options, files[0], "--card", card) == 0
    assert run("plan", *options, files[1], "--device", "cuda") == 0
    named, unknown = (json.loads(file.read_text()) for file in files)
    assert named["impl"] == impl and unknown["impl"] == "triton:tile"
    assert card.lower() in named["impl_reason"].lower()
    sizes = [content["schedules"][0]["workspace_bytes"] for content in (named, unknown)]
    assert (sizes[0] < sizes[1]) == (impl == "triton:epilogue")


def test_plan_names_the_cards_that_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "smoke", "--tokens", 4, "--card", "Voodoo") == 2
    assert "`--card` must be one of NVIDIA T4, " in capsys.readouterr().err
    assert run("plan", "smoke", "--tokens", 4, "--card", "a100", "--device", "cpu") == 2
    assert "`--device` must be cuda or left out with --card" in capsys.readouterr().err


def test_plan_knows_what_a_card_is_too_old_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    for dtype, impl in (("bfloat16", "torch"), ("float16", "triton:tile")):
        options = ("--tokens", 64, "--card", "T4", "--dtype", dtype, "--json", file, "--force")
        assert run("plan", "smoke", *options) == 0
        assert json.loads(file.read_text())["impl"] == impl
    options = ("--tokens", 64, "--card", "T4", "--dtype", "bfloat16", "--impl", "triton")
    assert run("plan", "smoke", *options) == 2
    error = capsys.readouterr().err
    assert "compute capability 8.0 or newer, NVIDIA T4 has 7.5" in error
    assert "`--impl` must support the card" in error and "use `--impl auto`" in error


def test_plan_of_one_rank_of_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    options = ("--tokens", 8192, "--tp", 2, "--fsdp", 4, "--sp", 2, "--json", file)
    assert run("plan", "llama3-8b", *options) == 0
    content = json.loads(file.read_text())
    assert (content["vocab_size"], content["num_tokens"]) == (128256 // 2, 8192 // 2)
    assert content["rank"]["ranks"] == 16
    assert content["rank"]["held_weight_bytes"] == 128256 * 4096 * 2 // 16
    assert content["stock_logits_bytes"] == 8192 * 128256 * 2 // 4
    assert "one of 16 ranks: 64128 rows, 4096 tokens" in capsys.readouterr().out
    assert run("plan", "smoke", "--tokens", 4, "--sp", 5) == 2
    assert "`--sp` must be at most 4" in capsys.readouterr().err
    assert run("plan", "llama3-8b", "--tokens", 4, "--tp", 300000) == 2
    assert "`--tp` must be at most 128256, the rows of the head" in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "budget"), [(192, None), (10**11, None), (192, 1), (192, 3)])
def test_plan_holds_stock_to_the_budget_too(
    tokens: int, budget: int | None, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    extra = () if budget is None else ("--budget-mib", budget)
    assert run("plan", "smoke", "--tokens", tokens, *extra, "--json", file) == 0
    content = json.loads(file.read_text())
    for option in (content["stock"], *content["schedules"]):
        fits = option["workspace_bytes"] <= (budget or DEFAULT_MEMORY_BUDGET_MIB) * 2**20
        assert option["fits"] == fits == ("within the budget" in option["reason"]), option


def test_plan_reads_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain.json"
    plain.write_text('{"hidden_size": 8, "vocab_size": 12, "torch_dtype": "float32"}')
    # Names of its own for the sizes, as only the model's config class knows.
    (tmp_path / "gpt2").mkdir()
    renamed = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "vocab_size": 60000}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(renamed))
    file = tmp_path / "plan.json"
    for source, expected in (
        (plain, (8, 12, "float32", 10 * 12 * 4)),
        (tmp_path / "gpt2", (8, 60000, "bfloat16", 10 * 60000 * 2)),
    ):
        assert run("plan", source, "--tokens", 10, "--json", file, "--force") == 0
        content = json.loads(file.read_text())
        names = ("hidden_size", "vocab_size", "dtype", "stock_logits_bytes")
        assert tuple(content[name] for name in names) == expected
    capsys.readouterr()


def save_config(folder: Path, name: str, **settings: Any) -> Path:
    config = getattr(transformers, name)(**settings)
    config.save_pretrained(folder / name)
    return folder / name


ENCODERS = [
    ("BertConfig", {}, "'bert' with is_decoder=False, an encoder for masked tokens"),
    ("BertConfig", {"architectures": ["BertForMaskedLM"]}, "'bert' with is_decoder=False"),
    ("RobertaConfig", {}, "'roberta' with is_decoder=False"),
    ("ModernBertConfig", {}, "'modernbert', which has none"),
    ("DistilBertConfig", {}, "'distilbert', which has none"),
    ("T5Config", {}, "'t5', which has none"),
]
DECODERS = [
    ("BertConfig", {"is_decoder": True}),
    ("BertConfig", {"architectures": ["BertLMHeadModel"]}),
    ("BertGenerationConfig", {}),
    ("ModernBertDecoderConfig", {}),
    ("BartConfig", {}),
    ("XLMConfig", {}),
    ("LlamaConfig", {"architectures": ["LlamaForSequenceClassification"]}),
    ("GPT2Config", {}),
    ("Gemma3Config", {}),
    ("Qwen3VLTextConfig", {}),
]


@pytest.mark.parametrize(("name", "settings", "message"), ENCODERS)
def test_plan_refuses_a_model_without_a_causal_head(
    name: str, settings: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_config(tmp_path, name, **settings)
    sources = (folder, folder / "config.json")
    for source, option in itertools.product(sources, (("--tokens", 10), ("--memory", "1GiB"))):
        assert run("plan", source, *option) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "`MODEL_OR_CONFIG` must describe a causal language model" in error
        assert message in error


@pytest.mark.parametrize(("name", "settings"), DECODERS)
def test_plan_takes_every_kind_of_causal_model(
    name: str, settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_config(tmp_path, name, **settings)
    assert run("plan", folder, "--tokens", 10) == 0
    assert str(folder) in capsys.readouterr().out.replace("\n", "")


def test_models_prints_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_fused_head import supported_models

    monkeypatch.setenv("COLUMNS", "200")  # no word of a cell on a line of its own
    file = tmp_path / "models.json"
    assert run("models", "--json", file) == 0
    shown = capsys.readouterr().out
    written = json.loads(file.read_text())["models"]
    assert [row["family"] for row in written] == [row.family for row in supported_models()]
    assert all(row["family"] in shown for row in written)


def test_doctor_passes_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    # Without the interpreter, which would take minutes over the Triton kernels.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hf_fused_head.cli", "doctor", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--json", str(file)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "self-check against float64" in done.stdout
    content = json.loads(file.read_text())
    status = {(check["impl"], check["dtype"]): check["status"] for check in content["checks"]}
    for dtype in ("float32", "bfloat16", "float16"):
        assert status["torch", dtype] == status["reference", dtype] == "passed"
        assert status["triton:tile", dtype] == status["triton:epilogue", dtype] == "unavailable"
    assert {choice["impl"] for choice in content["auto"]} == {"torch"}
    assert all(choice["reason"] for choice in content["auto"])
    assert content["versions"]["torch"]


def test_doctor_exits_with_1_when_a_check_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = contenders.linear_cross_entropy
    monkeypatch.setattr(
        contenders, "linear_cross_entropy", lambda *args, **kwargs: right(*args, **kwargs) * 1.001
    )
    monkeypatch.setattr(self_check, "IMPLS", ("torch",))
    assert run("doctor", "--device", "cpu") == 1
    shown = capsys.readouterr()
    assert "failed" in shown.out
    assert shown.err == "hf-fused-head: a self-check failed\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "nope"), "`WORKLOAD` must be one of"),
        (("bench", "smoke", "-c", "nope"), "`--contender` must be one of"),
        (("bench", "smoke", "-c", "ours@much"), "whole MiB"),
        (("bench", "smoke", "--mode", "bwd"), "`--mode` must be one of"),
        (("bench", "smoke", "--dtype", "int8"), "`--dtype` must be one of"),
        (("bench", "smoke", "--ignored", "2"), "--ignored"),
        (("bench", "smoke", "--device", "tpu"), "`--device` must be one of"),
        (("bench", "smoke", "--plot", "x.gif"), "`--plot` must end in"),
        (("bench", "--from-json", "no-such-file"), "`--from-json` must be a file"),
        (("bench", "smoke", "--json", "no/such/folder/x.json"), "does not exist"),
        (("plan", "llama3-8b"), "one of `--tokens` and `--memory` must be given, got none"),
        (("plan", "smoke", "--tokens", "1", "--memory", "1GiB"), "must be given, got both"),
        (("plan", "smoke", "--memory", "much"), "`--memory` must be a size above 0 with its unit"),
        (("plan", "smoke", "--memory", "1GiB", "--tp", "2"), "`--tp` must be left out with"),
        (("plan", "smoke", "--tokens", "1", "--load-in-4bit"), "`--load-in-4bit` must be left out"),
        (("plan", "smoke", "--memory", "1GiB", "--load-in-4bit", "--training", "full"), "LoRA"),
        (("plan", "./no-such-model", "--memory", "1GiB"), "there is no file"),
        (("plan", "nobody/no-such-model", "--memory", "1GiB"), "no config of a known model"),
        (("plan", "llama3-8b", "--tokens", "0"), "--tokens"),
        (("plan", "./no-such-model", "--tokens", "1"), "there is no file"),
        (("plan", "nobody/no-such-model", "--tokens", "1"), "no config of a known model"),
        (("plan", "llama3-8b", "--tokens", "1", "--impl", "cuda"), "--impl"),
        (("plan", "llama3-8b", "--tokens", "1", "--device", "tpu"), "`--device` must be"),
        (("models", "--no-such-option",), "No such option"),
        (("no-such-command",), "No such command"),
    ],
)  # fmt: skip
def test_a_user_error_is_one_line_and_exit_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("hf-fused-head: ")
    assert message in lines[0]
    assert shown.out == ""


def test_existing_files_are_kept_without_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text("precious")
    for command in (("models",), ("doctor",), ("plan", "smoke", "--tokens", 4), ("bench", "smoke")):
        assert run(*command, "--json", file) == 2
        assert "--force" in capsys.readouterr().err
    assert file.read_text() == "precious"
    assert run("plan", "smoke", "--tokens", 4, "--json", file, "--force") == 0
    assert json.loads(file.read_text())["num_tokens"] == 4


def test_bench_keeps_what_it_measured_when_a_workload_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = suite.make_batch

    def make_batch(workload, *arguments):
        if workload.name != "smoke":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried a lot")
        return right(workload, *arguments)

    monkeypatch.setattr(suite, "make_batch", make_batch)
    file = tmp_path / "part.json"
    assert run("bench", "smoke", "mistral-7b", "-c", "ours", "--repeats", 1, "--json", file) == 2
    assert "mistral-7b" in capsys.readouterr().err
    assert [row["workload"] for row in json.loads(file.read_text())["results"]] == ["smoke"]


def test_bench_keeps_what_it_measured_when_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = suite.run_case

    def run_case(case, *arguments):
        if case.ignored:
            raise SystemExit(137)
        return right(case, *arguments)

    monkeypatch.setattr(suite, "run_case", run_case)
    file = tmp_path / "part.json"
    ignored = ("--ignored", 0, "--ignored", 0.5)
    options = ("-c", "ours", "--repeats", 1, "--commit", "abc", "--json", file)
    assert run("bench", "smoke", *ignored, *options) == 137
    document = json.loads(file.read_text())
    assert [row["ignored"] for row in document["results"]] == [0.0]
    assert document["header"]["commit"] == "abc"
