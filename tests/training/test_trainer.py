"""`FusedHeadTrainer` gives what `transformers.Trainer` gives, and makes no logits for it."""

from __future__ import annotations

import copy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from allocation_spy import AllocationSpy
from causal_loss import in_float64
from oracle import assert_close_as_torch, assert_means_close, products_dtype
from tiny_trainer import (
    HIDDEN,
    arguments,
    assert_metrics,
    assert_same_training,
    build,
    history,
    odd_model,
    rows,
    trained,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer
from two_processes import run_in_two

from hf_fused_head import FusedHeadTrainer, UnsupportedModelError, last_stats, patch_report

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_plain_training(tied: bool, tmp_path: Path) -> None:
    """A few steps end where stock's end."""
    assert_same_training(build(tied), rows(), tmp_path)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulation_of_unequal_counts(smoothing: float, tmp_path: Path) -> None:
    """Micro-batches weigh by their tokens, also one that has none."""
    assert_same_training(
        build(),
        rows(masked=(4, 5)),
        tmp_path,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=1,
        label_smoothing_factor=smoothing,
    )


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_label_smoothing(smoothing: float, lora: bool, tmp_path: Path) -> None:
    """The smoothed loss of the head is that of the stock Trainer, in training and evaluation."""
    assert_same_training(build(lora=lora), rows(), tmp_path, label_smoothing_factor=smoothing)


def test_smoothing_without_token_count(tmp_path: Path) -> None:
    """A model that takes no token count is smoothed per micro-batch, as stock does."""
    model = build()
    model.accepts_loss_kwargs = False
    assert_same_training(
        model, rows(), tmp_path, label_smoothing_factor=0.2, gradient_accumulation_steps=2
    )


def test_lora(tmp_path: Path) -> None:
    """Adapters, on the head too, train as they do under the stock Trainer."""
    assert_same_training(build(lora=True), rows(), tmp_path)


def test_a_wrong_smoothing_is_seen(tmp_path: Path) -> None:
    """The comparison above can fail: another smoothing does not pass it."""
    data, model = rows(), build()
    stock, truth = copy.deepcopy(model), in_float64(model)
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    expected = trained(Trainer, stock, data, args=args)
    exact = trained(Trainer, truth, data, args=args)
    wrong = arguments(tmp_path, label_smoothing_factor=0.11)
    ours = trained(FusedHeadTrainer, model, data, args=wrong)
    losses = [history(trainer, "loss") for trainer in (ours, expected, exact)]
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_close_as_torch("loss", losses[0].float(), losses[1].float(), losses[2])


def test_model_init(tmp_path: Path) -> None:
    """What `model_init` makes is fused, at every call, and trains as stock's does."""
    data, args = rows(), arguments(tmp_path, label_smoothing_factor=0.1)
    runs = []
    for trainer_class, init in (
        (FusedHeadTrainer, lambda: build()),
        (Trainer, lambda: build()),
        (Trainer, lambda: in_float64(build())),
    ):
        runs.append(trainer_class(args=args, train_dataset=data, model_init=init))
        runs[-1].train()
    assert patch_report(runs[0].model).fused
    losses = [history(trainer, "loss") for trainer in runs]
    assert_close_as_torch("loss", losses[0].float(), losses[1].float(), losses[2])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_metrics_in_the_logs(smoothing: float, tmp_path: Path) -> None:
    """Accuracy, entropy and perplexity of a window are means over its tokens and no others."""
    data, other = rows(12, masked=(3,)), rows(20)[12:]
    args = arguments(
        tmp_path,
        max_steps=6,
        learning_rate=0.0,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        gradient_accumulation_steps=2,
        label_smoothing_factor=smoothing,
    )
    model = build()
    trainer = FusedHeadTrainer(model, args, train_dataset=data, eval_dataset=other)
    trainer.train()
    entries = trainer.state.log_history
    windows = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    assert len(windows) == 2 and len(evaluations) == 3
    stock = build()
    for entry in windows:  # A window is an epoch here, so the order of the data does not matter.
        assert_metrics(entry, "", stock, data)
    for entry in evaluations:
        assert_metrics(entry, "eval_", stock, other)


def test_no_wait_for_the_device_between_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are read when they are logged and not at every step."""
    from hf_fused_head.trainer import TokenSums

    reads = []
    means = TokenSums.means
    monkeypatch.setattr(TokenSums, "means", lambda *args: reads.append(1) or means(*args))
    args = arguments(tmp_path, max_steps=6, logging_steps=3)
    FusedHeadTrainer(build(), args, train_dataset=rows()).train()
    assert len(reads) == 2


def test_statistics_can_be_left_out(tmp_path: Path) -> None:
    """Only what `stats` names is logged, beside the perplexity that costs nothing."""
    trainer = FusedHeadTrainer(
        build(),
        arguments(tmp_path, max_steps=1),
        train_dataset=rows(),
        head_options={"stats": ("accuracy",)},
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert "mean_token_accuracy" in entry and "entropy" not in entry


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_logits(smoothing: float, tmp_path: Path) -> None:
    """Training and loss-only evaluation make nothing of the size of a quarter of the logits."""
    vocab_size, seq_len, batch_size = 4099, 64, 8
    ids = torch.randint(vocab_size, (3 * batch_size, seq_len)).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = arguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        label_smoothing_factor=smoothing,
    )
    model = build(vocab_size=vocab_size)
    limit_bytes = seq_len * batch_size * vocab_size  # A quarter of them, four bytes each.
    assert limit_bytes > vocab_size * HIDDEN * 4
    trainer = FusedHeadTrainer(model, args, train_dataset=data, eval_dataset=data)
    with AllocationSpy() as spy:
        trainer.train()
        trainer.evaluate()
    assert spy.largest()[2] < limit_bytes
    with AllocationSpy() as spy:
        Trainer(build(vocab_size=vocab_size), args, train_dataset=data).train()
    assert spy.largest()[2] >= limit_bytes


def accuracy(prediction) -> dict[str, float]:
    """A metric that needs the logits."""
    guesses = prediction.predictions[:, :-1].argmax(-1)
    labels = prediction.label_ids[:, 1:]
    return {"accuracy": float((guesses == labels)[labels != -100].mean())}


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the trainer's module warns of, each text once as transformers' logger does."""
    from hf_fused_head import trainer

    seen: list[str] = []
    monkeypatch.setattr(
        trainer.logger, "warning_once", lambda text: text in seen or seen.append(text)
    )
    return seen


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_predictions_are_those_of_stock(
    smoothing: float, tmp_path: Path, warned: list[str]
) -> None:
    """With `compute_metrics` and in `predict` logits are the stock ones, array for array."""
    args = arguments(tmp_path, label_smoothing_factor=smoothing)
    results = []
    for trainer_class in (Trainer, FusedHeadTrainer):
        trainer = trainer_class(build(), args, eval_dataset=rows(), compute_metrics=accuracy)
        results.append((trainer.predict(rows()), trainer.evaluate()))
    (expected, expected_metrics), (found, found_metrics) = results
    assert type(found.predictions) is type(expected.predictions)
    assert found.predictions.dtype == expected.predictions.dtype
    assert np.array_equal(found.predictions, expected.predictions)
    assert np.array_equal(found.label_ids, expected.label_ids)
    assert found_metrics["eval_accuracy"] == expected_metrics["eval_accuracy"]
    truth = Trainer(in_float64(build()), args, eval_dataset=rows()).evaluate()["eval_loss"]
    losses = (found_metrics["eval_loss"], expected_metrics["eval_loss"])
    assert_close_as_torch("eval_loss", *map(torch.tensor, losses), torch.tensor(truth).double())
    assert len(warned) == 1 and "prediction_loss_only" in warned[0]


def test_metrics_beside_predictions(tmp_path: Path) -> None:
    """`predict` has the metrics under its own prefix, labels or not."""
    trainer = FusedHeadTrainer(build(), arguments(tmp_path))
    assert_metrics(trainer.predict(rows()).metrics, "test_", build(), rows())
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows()]
    stock = Trainer(build(), arguments(tmp_path)).predict(unlabelled)
    ours = trainer.predict(unlabelled)
    assert np.array_equal(ours.predictions, stock.predictions)
    assert not [name for name in ours.metrics if name.endswith("entropy")]


def test_loss_only_evaluation_says_nothing(tmp_path: Path, warned: list[str]) -> None:
    """No warning where there is nothing to warn of."""
    trained(FusedHeadTrainer, build(), rows(), args=arguments(tmp_path))
    assert warned == []


def test_compute_loss_func_is_honoured(tmp_path: Path, warned: list[str]) -> None:
    """A user's loss gets logits and labels, and the user learns what that costs."""

    def loss_func(outputs, labels, num_items_in_batch=None) -> Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten()
        losses = nn.functional.cross_entropy(logits, targets, reduction="sum")
        return 2 * losses / num_items_in_batch

    args = arguments(tmp_path)
    runs = []
    for trainer_class in (Trainer, FusedHeadTrainer):
        trainer = trainer_class(build(), args, train_dataset=rows(), compute_loss_func=loss_func)
        trainer.train()
        runs.append(trainer)
    assert torch.equal(history(runs[0], "loss"), history(runs[1], "loss"))
    assert len(warned) == 1 and "compute_loss_func" in warned[0]


def test_columns_are_kept(tmp_path: Path) -> None:
    """The columns that the model takes survive, others go, as with stock."""
    data = datasets.Dataset.from_list([{**row, "note": "x"} for row in rows()])
    kept = []
    for trainer_class in (Trainer, FusedHeadTrainer):
        trainer = trainer_class(build(), arguments(tmp_path), train_dataset=data)
        batch = next(iter(trainer.get_train_dataloader()))
        kept.append((sorted(batch), trainer.label_names, trainer.model_accepts_loss_kwargs))
    assert kept[0] == kept[1]
    assert kept[0][0] == ["input_ids", "labels"]


def test_checkpoints_resume(tmp_path: Path) -> None:
    """A checkpoint loads into a stock model and resumes to the weights of the whole run."""
    args = arguments(tmp_path / "a", save_strategy="steps", save_steps=2)
    whole = FusedHeadTrainer(build(), args, train_dataset=rows())
    whole.train()
    resumed = FusedHeadTrainer(build(), args, train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert stock.config.architectures == ["LlamaForCausalLM"]
    for ours, theirs in zip(stock.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_unknown_head_option(tmp_path: Path) -> None:
    """A misspelled option is named, and the model stays stock."""
    model = build()
    with pytest.raises(TypeError, match=r"`head_options` must hold .* got 'budget'.*choose from"):
        FusedHeadTrainer(model, arguments(tmp_path), head_options={"budget": 1})
    assert not patch_report(model).fused


def test_head_options_reach_the_head(tmp_path: Path) -> None:
    """An option of `apply_patch` has its effect: the z-loss is in the logged loss."""
    losses = {}
    for z_loss in (0.0, 0.1):
        trainer = FusedHeadTrainer(
            build(),
            arguments(tmp_path, max_steps=1, learning_rate=0.0),
            train_dataset=rows(),
            head_options={"z_loss": z_loss},
        )
        trainer.train()
        losses[z_loss] = history(trainer, "loss").item()
    stats = last_stats(trainer.model)
    extra = 0.1 * (stats.lse**2).sum() / stats.num_valid
    truth = torch.tensor(losses[0.1]).double()
    assert_close_as_torch("z", losses[0.0] + extra, truth.float(), truth)


def test_smoothing_is_named_in_one_place(tmp_path: Path) -> None:
    """Two different smoothings are a contradiction; the same one twice is not."""
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1, got 0\.2"):
        FusedHeadTrainer(build(), args, head_options={"label_smoothing": 0.2})
    FusedHeadTrainer(build(), args, head_options={"label_smoothing": 0.1})


def test_liger_is_refused(tmp_path: Path) -> None:
    """Two replacements of the same loss are one too many."""
    args = arguments(tmp_path)
    args.use_liger_kernel = True
    with pytest.raises(ValueError, match=r"`use_liger_kernel` must be False .* use transformers"):
        FusedHeadTrainer(build(), args)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_model_that_cannot_be_fused(smoothing: float, tmp_path: Path) -> None:
    """Refused at the first step; with strict=False it trains as under stock, smoothing too."""
    args = arguments(tmp_path, label_smoothing_factor=smoothing)
    strict = FusedHeadTrainer(odd_model(), args, train_dataset=rows())
    with pytest.raises(UnsupportedModelError):
        strict.train()
    mild = FusedHeadTrainer(odd_model(), args, train_dataset=rows(), head_options={"strict": False})
    with pytest.warns(UserWarning, match="stays stock"):
        mild.train()
    stock = Trainer(odd_model(), args, train_dataset=rows())
    stock.train()
    assert torch.equal(history(mild, "loss"), history(stock, "loss"))
    for ours, theirs in zip(mild.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_that_is_refused_at_once(tmp_path: Path) -> None:
    """What can be known without a forward is said when the trainer is made."""
    model = build()
    model.loss_function = lambda *args, **kwargs: None
    with pytest.raises(UnsupportedModelError, match="loss function"):
        FusedHeadTrainer(model, arguments(tmp_path))
    with pytest.warns(UserWarning, match="stays stock"):
        FusedHeadTrainer(model, arguments(tmp_path), head_options={"strict": False})


@pytest.mark.parametrize(
    "regional", ["0", pytest.param("1", marks=pytest.mark.slow)], ids=["whole", "regional"]
)
def test_compiled(
    regional: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_compiler: None,
    device: str,
) -> None:
    """With torch_compile the loss stays fused, metrics are logged and predictions are made."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", regional)
    data = rows()
    plain = {"max_steps": 2, "use_cpu": device == "cpu"}
    args = arguments(tmp_path, torch_compile=True, **plain)
    ours, expected = (
        trained(trainer_class, build(), data, args=args)
        for trainer_class in (FusedHeadTrainer, Trainer)
    )
    exact = trained(Trainer, in_float64(build()), data, args=arguments(tmp_path, **plain))
    # On a GPU the compiler's flag turns TF32 on.
    products, tokens = products_dtype(torch.float32), sum(len(row["labels"]) for row in data)
    for key in ("loss", "eval_loss"):
        losses = (history(ours, key).float(), history(expected, key), history(exact, key))
        assert_means_close(key, *losses, tokens, products)
    assert len(history(ours, "entropy")) == 2
    arrays = [trainer.predict(data).predictions for trainer in (ours, expected, exact)]
    found, wanted, truth = (torch.from_numpy(array) for array in arrays)
    assert_close_as_torch("predictions", found, wanted, truth)


DISTRIBUTED = """
import sys
from pathlib import Path
from causal_loss import in_float64
from oracle import assert_close_as_torch
from tiny_trainer import arguments, assert_metrics, build, history, rows, trained
from transformers import Trainer

from hf_fused_head import FusedHeadTrainer


def run(trainer_class, model, smoothing):
    args = arguments(Path(sys.argv[1]), ddp_backend="gloo", label_smoothing_factor=smoothing,
                     gradient_accumulation_steps=2, average_tokens_across_devices=True)
    return trained(trainer_class, model, rows(19, masked=(2, 3)), args=args)

for smoothing in (0.0, 0.1):
    stock, exact, ours = (
        run(trainer_class, model, smoothing)
        for trainer_class, model in (
            (Trainer, build()), (Trainer, in_float64(build())), (FusedHeadTrainer, build())
        )
    )
    for key in ("loss", "eval_loss"):
        found, wanted = history(ours, key).float(), history(stock, key).float()
        assert_close_as_torch(key, found, wanted, history(exact, key))
    for (name, found), wanted, truth in zip(
        ours.model.named_parameters(), stock.model.parameters(), exact.model.parameters()
    ):
        assert_close_as_torch(name, found, wanted, truth)
    # 19 rows on two processes: the sampler repeats some, the metrics do not.
    weights = build()
    weights.load_state_dict(ours.model.state_dict())
    entry = [entry for entry in ours.state.log_history if "eval_loss" in entry][-1]
    assert_metrics(entry, "eval_", weights, rows(19, masked=(2, 3)))
print("equal")
"""


def test_two_processes(tmp_path: Path) -> None:
    """Unequal token counts on two processes: losses, weights and metrics as one would expect."""
    script = tmp_path / "two.py"
    script.write_text(DISTRIBUTED)
    done = run_in_two(str(script), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 2
