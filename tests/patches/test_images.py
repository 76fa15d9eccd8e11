"""Models that see: real image processors, generated pixels, and a loss that is stock's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import conformance
import numpy as np
import pytest
import tiny_classes
import torch
import transformers

IMAGE_TOKEN = 99
TOKENS_PER_IMAGE = 4


def pictures(size: int) -> list[np.ndarray]:
    """Two images of random pixels, one of them not square."""
    generator = np.random.default_rng(0)
    shapes = ((size, size, 3), (size + 5, size, 3))
    return [generator.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def with_images(model: Any, **extra: torch.Tensor) -> dict[str, Any]:
    """A batch whose rows hold the tokens of one image each; they carry no label."""
    inputs = tiny_classes.batch(model)
    for name in ("input_ids", "labels"):
        value = IMAGE_TOKEN if name == "input_ids" else -100
        inputs[name][:, 2 : 2 + TOKENS_PER_IMAGE] = value
    dtype = model.get_output_embeddings().weight.dtype
    extra["pixel_values"] = extra["pixel_values"].to(dtype)
    return inputs | extra


def llava(model: Any) -> dict[str, Any]:
    size = {"height": 16, "width": 16}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    return with_images(model, **processor(pictures(16), return_tensors="pt"))


def gemma3(model: Any) -> dict[str, Any]:
    processor = transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    pixels = processor(pictures(16), return_tensors="pt")["pixel_values"]
    inputs = with_images(model, pixel_values=pixels)
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    return inputs | {"token_type_ids": is_image.long()}


def qwen_vl(model: Any) -> dict[str, Any]:
    # Patches of 14 pixels, merged two by two: 56 x 56 pixels are four tokens.
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    processor = transformers.Qwen2VLImageProcessor(size=size)
    images = [picture[:56] for picture in pictures(56)]
    inputs = with_images(model, **processor(images, return_tensors="pt"))
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    return inputs | {"mm_token_type_ids": is_image.int()}


SMALL_VISION = {"vision_config.image_size": 16, "vision_config.patch_size": 8}
SMALL_QWEN_VISION = {
    "vision_config.depth": 2,
    "vision_config.hidden_size": 16,
    "vision_config.embed_dim": 16,
    "vision_config.num_heads": 2,
    "vision_config.intermediate_size": 24,
    "vision_config.fullatt_block_indexes": [1],
    "text_config.rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
    },
    "image_token_id": IMAGE_TOKEN,
}
MODELS: dict[str, tuple[Callable[[Any], dict[str, Any]], dict[str, Any]]] = {
    "LlavaForConditionalGeneration": (llava, {**SMALL_VISION, "image_token_index": IMAGE_TOKEN}),
    "Gemma3ForConditionalGeneration": (
        gemma3,
        {**SMALL_VISION, "image_token_index": IMAGE_TOKEN, "mm_tokens_per_image": TOKENS_PER_IMAGE},
    ),
    "Qwen2VLForConditionalGeneration": (
        qwen_vl,
        SMALL_QWEN_VISION,
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        qwen_vl,
        {**SMALL_QWEN_VISION, "vision_config.out_hidden_size": 16},
    ),
}


@pytest.mark.newest
@pytest.mark.parametrize("name", MODELS)
def test_images_reach_a_loss_and_gradients_that_are_stock(name: str) -> None:
    inputs, settings = MODELS[name]
    stock = tiny_classes.build(name, **settings)
    judge = conformance.Judge(stock)
    for scenario in ("plain", "num_items tensor", "autocast"):
        with_image = conformance.SCENARIO[scenario]
        extra = with_image.inputs(stock)
        extra = {key: value for key, value in extra.items() if key not in ("input_ids", "labels")}
        outcome = judge.outcome(with_image._replace(inputs=lambda m, e=extra: inputs(m) | e))
        assert outcome.status == "equal", outcome.why
    assert judge.truth_dtype == "float64"


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_depends_on_the_images(name: str) -> None:
    inputs, settings = MODELS[name]
    model = tiny_classes.build(name, **settings)
    batch = inputs(model)
    with torch.no_grad():
        loss = model(**batch).loss
        other = model(**batch | {"pixel_values": batch["pixel_values"].flip(-1) * 3}).loss
    assert not torch.equal(loss, other)
