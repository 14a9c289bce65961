"""Attention layers of Hugging Face's models through the product, layer by layer: as their own eager attention."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cqsa_stream as cqsa

transformers = pytest.importorskip("transformers")

TOKENS = 70
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"num_hidden_layers": 2, "sliding_window": 9}),
    "gemma2": (
        "Gemma2",
        {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "sliding_window": 9, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3", {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "sliding_window": 9}),
    "llama4": (
        "Llama4",
        {"num_hidden_layers": 2, "layer_types": [CHUNKED, FULL], "attention_chunk_size": 16, "num_local_experts": 2,
         "intermediate_size_mlp": 48, "no_rope_layers": [1, 0]},
    ),
    "gpt_oss": (
        "GptOss",
        {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "sliding_window": 9, "num_local_experts": 2,
         "num_experts_per_tok": 1},
    ),
}  # fmt: skip


def made(name: str, implementation: str) -> Any:
    """Return a tiny random model of text."""
    family, more = MODELS[name]
    suffix = "TextConfig" if family in ("Gemma3", "Llama4") else "Config"
    config = getattr(transformers, family + suffix)(**{**SIZES, **more})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at birth, so that attention is far from uniform
            parameter.copy_(torch.randn(parameter.shape) * (0.4 if parameter.dim() > 1 else 1.0))
    return model.eval()


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **words: Any) -> tuple[Tensor, None]:
    """Call the product as a layer of its type is defined."""
    assert mask is None, "nothing but what we name hides a key"
    config, options = module.config, {}
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else SLIDING
    if kind == SLIDING:
        options["window"] = config.sliding_window  # with the key at the row's own position
    elif kind == CHUNKED:
        options["mask"] = cqsa.masks.Chunked(config.attention_chunk_size)
    calls.append((kind, tuple(sorted(name for name in ("softcap", "s_aux") if words.get(name) is not None))))
    out = cqsa.attention(
        query, key, value, is_causal=True, enable_gqa=True, scale=words["scaling"], device="cpu",
        soft_cap=words.get("softcap"), sinks=words.get("s_aux"), **options,
    )  # fmt: skip
    return out.transpose(1, 2), None


calls: list[tuple[str, tuple[str, ...]]] = []


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    transformers.AttentionInterface.register("cqsa_test", attention)
    yield
    transformers.AttentionInterface._global_mapping.pop("cqsa_test", None)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.filterwarnings("default")  # those of another library
def test_a_model_computes_the_same(name: str) -> None:
    tokens = torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    layers: dict[str, list[Tensor]] = {}
    for implementation in ("eager", "cqsa_test"):
        calls.clear()
        model = made(name, implementation)
        with torch.no_grad():
            found = model(tokens, output_hidden_states=True, use_cache=False)
        layers[implementation] = [*found.hidden_states, found.logits]
    assert len(calls) == 2, "a call for each layer"
    assert {"gemma2": "softcap", "gpt_oss": "s_aux"}.get(name) in (None, *calls[0][1])
    for n, (ours, eager) in enumerate(zip(layers["cqsa_test"], layers["eager"], strict=True)):
        torch.testing.assert_close(ours, eager, rtol=2e-4, atol=2e-4, msg=f"after layer {n} of {name}")
