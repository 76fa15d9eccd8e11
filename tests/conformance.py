"""The conformance sweep: every causal LM class of transformers, tiny, patched, against its stock self.

`python tests/conformance.py --write` runs it over all of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and
writes the verdicts to patches/conformance.json; `python tests/conformance.py NAME ...` prints those
of some classes. tests/test_conformance.py runs a share of it and holds the file to what it finds.

A class is built small by rules on the names of its config's fields (`SIZES`), with every transform
of the logits forced on and felt. Where the rules do not fit a class, `SETTINGS` says what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from oracle import assert_close_as_torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report

RESULT = Path(__file__).parent.parent / "patches" / "conformance.json"
VOCAB_SIZE = 101  # prime: no multiple of any tile
SAMPLES = 4

# Fields of configs that make a model small, by name; applied to nested configs as well.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCAB_SIZE),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), 16
    ),
    "hidden_size_global": 16,
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "embedding_dim"), 16),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2
    ),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 2
    ),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "swa_num_attention_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 1),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "dim_head", "d_head"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "dff", "dim_ff", "n_inner"), 24),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "mlp_dim"), 24),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "feed_forward_size"), 24),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 12),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 12),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "moe_top_k"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "model_max_length"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "index_head_dim"), 4),
    "qk_head_dim": 12,
    **dict.fromkeys(("index_n_heads", "index_topk"), 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "linear_num_heads": 2,
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "keep_window_size"), 8),
    "mamba_num_heads": 2,
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    "router_hidden_size": 8,
    "query_pre_attn_scalar": 8,
    "hidden_size_per_layer_input": 4,
    "num_kv_shared_layers": 0,
    "num_nextn_predict_layers": 0,
    "mask_time_prob": 0.0,
}
# Whatever transforms the logits or adds to the loss, at values that move the loss by more than
# rounding ever could.
TRANSFORMS: dict[str, Any] = {
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
    "logit_scale": 0.4,
    "logits_scaling": 3.0,
    "lm_head_multiplier": 0.4,
    "logits_mup_width_multiplier": 1.5,
    "router_aux_loss_coef": 0.1,
    "aux_loss_coef": 0.1,
}
SCALES = {"initializer_range": 0.2, "init_std": 0.2, "embed_init_std": 0.2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# The grouped products of the other implementations take no float64, which the oracle needs.
EAGER = {"experts_implementation": "eager"}

SETTINGS: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "BltForCausalLM": {
        # With a cache, stock looks for a number of layers that its config does not have.
        "use_cache": False,
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [2, 3],
        "patcher_config.num_key_value_heads": 2,
    },
    "CodeGenForCausalLM": {"n_head": 4, "n_embd": 32},
    "CohereCompassForCausalLM": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            }
        },
    },
    "DbrxForCausalLM": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "DiffLlamaForCausalLM": {"num_key_value_heads": 2},
    "Dots1ForCausalLM": {"n_shared_experts": 1},
    "FalconH1ForCausalLM": {"mamba_d_ssm": None},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma4AssistantForCausalLM": {"text_config": lambda: _assisting("Gemma4TextConfig")},
    "Gemma4UnifiedAssistantForCausalLM": {
        "text_config": lambda: _assisting("Gemma4UnifiedTextConfig")
    },
    "GitForCausalLM": {"vision_config.image_size": 16, "vision_config.patch_size": 8},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"head_dim": 16, "n_groups": 1},
    "NemotronHForCausalLM": {"n_groups": 1, "moe_shared_expert_intermediate_size": 12},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "local_attn_chunk_length": 11,
        "lsh_attn_chunk_length": 11,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "RoCBertForCausalLM": {"pronunciation_vocab_size": 32, "shape_vocab_size": 32},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "n_mamba_heads": 2,
    },
    "Zamba2ForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_key_value_heads": 2,
        "n_mamba_heads": 2,
    },
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    # Stock rounds the sizes of its states up to multiples of 64.
    "xLSTMForCausalLM": {
        "hidden_size": 128,
        "embedding_dim": 128,
        "mode": "train",
        "chunk_size": 11,
        "use_cache": False,
    },
}
"""Fields of a class's config over those of the rules; a dotted name is a field of a nested one."""



def _image(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Pixels of the size that the vision model takes."""
    size = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(1)
    rows = inputs["input_ids"].shape[0]
    dtype = model.get_output_embeddings().weight.dtype
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=generator).to(dtype)}


def _codebooks(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Every codebook gets the same tokens."""
    count = model.config.num_codebooks
    labels = inputs["labels"][..., None].expand(-1, -1, count)
    return {"input_ids": inputs["input_ids"].repeat_interleave(count, 0), "labels": labels}


INPUTS: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "GitForCausalLM": _image,
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
}
"""What the forward of a class needs beside token ids and labels."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "BambaForCausalLM": {"z_loss_coefficient": {"z_loss_coefficient": 0.1}},
    "InklingForCausalLM": {"unpadded_vocab_size": {"unpadded_vocab_size": VOCAB_SIZE - 4}},
}
"""Other settings of a class that change what it does to its logits, by the name of the variant."""


def class_names() -> list[str]:
    """Every causal LM class of this transformers, in the order of its mapping."""
    names = []
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names += [value] if isinstance(value, str) else list(value)
    return list(dict.fromkeys(names))


def build(name: str, seed: int = 0, **settings: Any) -> Any:
    """A tiny random model of the class, the same one for the same seed."""
    cls = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with _text_alone():
            model = cls(tiny_config(cls.config_class, SETTINGS.get(name, {}) | settings))
        _make_head_felt(model)
    return model.train()


@contextlib.contextmanager
def _text_alone() -> Iterator[None]:
    """Towers for images and sound that need a library which is not here are left empty."""
    stock = transformers.AutoModel.from_config

    def from_config(*args: Any, **kwargs: Any) -> Any:
        try:
            return stock(*args, **kwargs)
        except ImportError:
            return nn.Identity()

    transformers.AutoModel.from_config = from_config
    try:
        yield
    finally:
        del transformers.AutoModel.from_config


def _assisting(name: str) -> Any:
    settings = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2}
    return tiny_config(getattr(transformers, name), settings)


def tiny_config(config_class: type, settings: dict[str, Any]) -> Any:
    """The config with the smallest sizes that the rules know of."""
    return config_class(**_tiny_fields(config_class(), settings))


def _tiny_fields(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        prefix = f"{name}."
        nested = {k[len(prefix) :]: v for k, v in settings.items() if k.startswith(prefix)}
        if isinstance(value, PreTrainedConfig):
            fields[name] = {**_tiny_fields(value, nested), "model_type": value.model_type}
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            fields[name] = 0.0
    rules = {**SIZES, **TRANSFORMS, **SCALES, **TOKENS}
    if hasattr(config, "kv_lora_rank"):
        rules["num_key_value_heads"] = rules["num_attention_heads"]
        rules["head_dim"] = rules["qk_rope_head_dim"]
    rules |= _one_layer_of_each_kind(config)
    known = set(vars(config)) | set(type(config).attribute_map)
    fields |= {name: value for name, value in rules.items() if name in vars(config)}
    if any("expert" in name for name in known):
        fields |= EAGER
    if hasattr(config, "is_decoder"):
        fields["is_decoder"] = True
    own = {name: value for name, value in settings.items() if "." not in name}
    return fields | {name: value() if callable(value) else value for name, value in own.items()}


def _one_layer_of_each_kind(config: Any) -> dict[str, Any]:
    """As few layers as show every kind that the default has, two at least."""
    fields = {}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        value = vars(config).get(name)
        if isinstance(value, list):
            fields[name] = list(dict.fromkeys(value))
    if not fields:
        return {}
    count = max(2, *map(len, fields.values()))
    every = {name: [*kinds, *[kinds[-1]] * count][:count] for name, kinds in fields.items()}
    return {**every, "num_hidden_layers": count}


def _make_head_felt(model: Any) -> None:
    """Logits that spread over several units, and a bias that is not the zero it starts as."""
    head = model.get_output_embeddings()
    for name, parameter in () if head is None else head.named_parameters():
        nn.init.normal_(parameter, std=0.5 if name.endswith("bias") else 0.3)


def batch(model: Any, rows: int = 2, length: int = 11, seed: int = 0) -> dict[str, Any]:
    """Token ids and labels, [rows, length]; some labels are ignored, other ones in every row."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE - 5, (rows, length), generator=generator)
    labels = input_ids.clone()
    for row in range(rows):
        labels[row, : row + 1] = -100
    labels[:, length // 2] = -100
    inputs = {"input_ids": input_ids, "labels": labels}
    extra = INPUTS.get(type(model).__name__)
    return inputs if extra is None else inputs | extra(model, inputs)


class Scenario(NamedTuple):
    """One way to call the forward; `truth` names the one whose float64 result judges it."""

    name: str
    inputs: Callable[[Any], dict[str, Any]]
    truth: str
    config: dict[str, Any] = {}  # noqa: RUF012
    autocast: bool = False
    evaluation: bool = False


def _shifted(model: Any) -> dict[str, Any]:
    inputs = batch(model)
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[..., 1:]
    # Other values than the labels' own shift, so that ignoring them is seen.
    shifted = torch.where(shifted >= 0, (shifted + 1) % 7, shifted)
    return inputs | {"shift_labels": shifted.contiguous()}


SCENARIOS = (
    Scenario("plain", batch, "plain"),
    Scenario("num_items int", lambda m: batch(m) | {"num_items_in_batch": 37}, "num_items int"),
    Scenario(
        "num_items tensor",
        lambda m: batch(m) | {"num_items_in_batch": torch.tensor(37)},
        "num_items int",
    ),
    Scenario("shift_labels", _shifted, "shift_labels"),
    Scenario(
        "router loss by keyword", lambda m: batch(m) | {"output_router_logits": True}, "router"
    ),
    Scenario("router loss by config", batch, "router", {"output_router_logits": True}),
    Scenario("autocast", batch, "plain", autocast=True),
    Scenario("return_dict=False", lambda m: batch(m) | {"return_dict": False}, "plain"),
    Scenario("evaluation", batch, "evaluation", evaluation=True),
)


class InDouble(TorchFunctionMode):
    """Runs code in float64 that casts to float32 on its way."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """New tensors and casts are float64."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(former)


class Result(NamedTuple):
    """What a forward and its backward gave."""

    loss: Tensor
    values: dict[str, Tensor | None]
    layout: tuple[str, ...]


def run(model: Any, scenario: Scenario) -> Result:
    """Loss and gradients, or loss and logits in evaluation."""
    inputs = scenario.inputs(model)
    for name, value in scenario.config.items():
        setattr(model.config.get_text_config(), name, value)
    model.zero_grad(set_to_none=True)
    model.train(not scenario.evaluation)
    torch.manual_seed(0)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=scenario.autocast)
    try:
        with torch.set_grad_enabled(not scenario.evaluation), autocast:
            output = model(**inputs)
    finally:
        for name in scenario.config:
            setattr(model.config.get_text_config(), name, False)
    loss = output[0]
    layout = tuple(output) if isinstance(output, dict) else (str(len(output)),)
    if scenario.evaluation:
        return Result(loss, {"logits": output.logits * 1}, layout)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Result(loss.detach(), gradients, layout)


class Outcome(NamedTuple):
    """How a scenario went: equal, refused, mismatch, crash, or stock fails; and why."""

    status: str
    why: str = ""


class Judge:
    """One class under every scenario: the stock model, its float64 copy, and the fused one.

    Each forward gets a fresh copy: some models keep states from one forward to the next.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.truths: dict[str, Result] = {}
        self.truth_dtype = "float64"

    def outcome(self, scenario: Scenario) -> Outcome:
        """How the fused model does against the stock one."""
        if not applies(scenario, self.stock):
            return Outcome("not applicable")
        fused = copy.deepcopy(self.stock)
        try:
            apply_patch(fused)
        except UnsupportedModelError as error:
            return Outcome("refused", _one_line(error))
        try:
            expected = run(copy.deepcopy(self.stock), scenario)
        except Exception as error:
            return Outcome("stock fails", _one_line(error))
        try:
            got = run(fused, scenario)
        except UnsupportedModelError as error:
            if type(fused) is not type(self.stock) or patch_report(fused).fused:
                return Outcome("mismatch", "refused, but not stock again")
            return Outcome("refused", _one_line(error))
        except Exception as error:
            return Outcome("crash", _one_line(error) + _where(error))
        report = patch_report(fused)
        if not (report.fused and report.schedule):
            return Outcome("mismatch", f"not fused, silently: {report.reason}")
        return self.compared(scenario, got, expected)

    def compared(self, scenario: Scenario, got: Result, expected: Result) -> Outcome:
        """The float64 judgement; stock's rounding is sampled more often where one sample fails."""
        truth = self.truth(scenario, expected)
        try:
            compare(got, [expected], truth, scenario.autocast)
        except AssertionError:
            samples = [expected, *(self.sample(scenario, seed) for seed in range(SAMPLES))]
            try:
                compare(got, samples, truth, scenario.autocast)
            except AssertionError as error:
                return Outcome("mismatch", _one_line(error))
        return Outcome("equal")

    def sample(self, scenario: Scenario, seed: int) -> Result:
        """Stock on weights that were changed within their rounding: as right, rounded otherwise."""
        model = copy.deepcopy(self.stock)
        generator = torch.Generator().manual_seed(seed)
        unit = torch.finfo(torch.bfloat16 if scenario.autocast else torch.float32).eps
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.mul_(1 + unit * noise)
        return run(model, scenario)

    def truth(self, scenario: Scenario, expected: Result) -> Result:
        """The float64 result, made once for the scenarios that share it."""
        if scenario.truth not in self.truths:
            try:
                model = copy.deepcopy(self.stock).double()
                with in_double():
                    self.truths[scenario.truth] = run(model, scenario._replace(autocast=False))
            except Exception as error:
                self.truth_dtype = f"float32 ({_one_line(error)})"
                self.truths[scenario.truth] = expected
        return self.truths[scenario.truth]


def compare(got: Result, samples: list[Result], truth: Result, autocast: bool) -> None:
    """Raises AssertionError where `got` is not as near to the truth as stock, or laid out unlike."""
    expected = samples[0]
    if got.layout != expected.layout:
        raise AssertionError(f"output holds {got.layout}, stock {expected.layout}")
    if (got.loss.dtype, got.loss.shape) != (expected.loss.dtype, expected.loss.shape):
        raise AssertionError(f"loss is {got.loss.dtype} {tuple(got.loss.shape)}")
    present = {name for name, value in expected.values.items() if value is not None}
    ours = {name for name, value in got.values.items() if value is not None}
    if ours != present:
        raise AssertionError(f"gradients differ in presence: {sorted(ours ^ present)[:4]}")
    # Under autocast float32 results carry the rounding of bfloat16 products.
    dtype = torch.bfloat16 if autocast else None
    losses = [sample.loss for sample in samples]
    assert_close_as_torch("loss", got.loss, _farthest(losses, truth.loss), truth.loss, dtype)
    for name in sorted(present):
        exact = truth.values[name]
        torch_result = _farthest([sample.values[name] for sample in samples], exact)
        assert_close_as_torch(name, got.values[name], torch_result, exact, dtype)


def _farthest(samples: list[Tensor], truth: Tensor) -> Tensor:
    """The sample with the largest error."""
    if not truth.numel():
        return samples[0]
    return max(samples, key=lambda sample: (sample - truth).abs().nan_to_num().amax())


def applies(scenario: Scenario, model: Any) -> bool:
    """Whether the class knows of what the scenario is about."""
    if "router" not in scenario.truth:
        return True
    return hasattr(model.config.get_text_config(), "output_router_logits")


def judge(name: str) -> dict[str, Any]:
    """The verdict on a class, as the result file holds it."""
    try:
        stock = build(name)
        batch(stock)
    except Exception as error:
        return {"verdict": "not built", "reason": _one_line(error) + _where(error)}
    judge = Judge(stock)
    outcomes = {scenario.name: judge.outcome(scenario) for scenario in SCENARIOS}
    for variant, settings in VARIANTS.get(name, {}).items():
        other = Judge(build(name, **settings))
        outcomes[variant] = other.outcome(SCENARIOS[0])
    return verdict(outcomes) | {"truth": judge.truth_dtype}


def verdict(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Fused or refused by the plain forward; one wrong scenario makes the class wrong."""
    by_status: dict[str, dict[str, str]] = {}
    for name, outcome in outcomes.items():
        by_status.setdefault(outcome.status, {})[name] = outcome.why
    for wrong in ("crash", "mismatch"):
        if wrong in by_status:
            name, why = next(iter(by_status[wrong].items()))
            record = {"verdict": wrong, "reason": f"{name}: {why}"}
            break
    else:
        plain = outcomes["plain"]
        names = {"equal": "fused", "refused": "refused", "stock fails": "not built"}
        record = {"verdict": names[plain.status], "reason": plain.why}
    record["equal"] = list(by_status.get("equal", {}))
    for status in ("refused", "stock fails", "mismatch", "crash"):
        if status in by_status and not (status == "refused" == record["verdict"]):
            record[status.replace(" ", "_")] = by_status[status]
    return record


def share_of(names: list[str], share: int, shares: int) -> list[str]:
    """Every `shares`-th class from the one that the share starts at."""
    import zlib

    return [name for name in names if zlib.crc32(name.encode()) % shares == share % shares]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    known = (UnsupportedModelError, AssertionError)
    return text if isinstance(error, known) else f"{type(error).__name__}: {text[:300]}"


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(frame.filename).name}:{frame.lineno})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="classes; all of them without")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    records = {}
    for name in options.names or class_names():
        start = time.perf_counter()
        records[name] = judge(name)
        record = records[name]
        seconds = time.perf_counter() - start
        print(f"{record['verdict']:10} {seconds:5.1f} s  {name}  {record['reason']}", flush=True)
        if options.names:
            print(json.dumps(record, indent=2))
    if options.write:
        result = {"transformers": transformers.__version__, "classes": records}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
