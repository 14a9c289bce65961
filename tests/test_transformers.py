"""Attention layers of Hugging Face's models through the product, layer by layer: as their own eager attention."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cqsa_stream as cqsa

transformers = pytest.importorskip("transformers")
integration = cqsa.integrations.transformers

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


Masks = list[tuple[str, int]]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Masks]:
    """Register ours; yield what each layer was found to see."""
    found: Masks = []
    real = integration.attention

    def watched(*arrays: Tensor, **words: Any) -> Tensor:
        found.append((str(words.get("mask")), words.get("q_start", 0)))
        out: Tensor = real(*arrays, **words)
        return out

    monkeypatch.setattr(integration, "attention", watched)
    integration.register("cqsa_test")
    yield found
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        interface._global_mapping.pop("cqsa_test", None)


WINDOW, CAUSAL = "window of 9", "causal"
SEEN = {
    "mistral": {WINDOW}, "gemma2": {WINDOW, CAUSAL}, "gemma3": {WINDOW, CAUSAL}, "gpt_oss": {WINDOW, CAUSAL},
    "llama4": {"chunks of 16 and causal", CAUSAL},
}  # fmt: skip


def both(name: str, *arrays: Tensor, **words: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the hidden states and logits of the model's own eager attention, and by ours."""
    layers = []
    for implementation in ("eager", "cqsa_test"):
        model = made(name, implementation)
        with torch.no_grad():
            found = model(*arrays, output_hidden_states=True, **{"use_cache": False, **words})
        layers.append([*found.hidden_states, found.logits])
    return layers[0], layers[1]


def assert_same(layers: tuple[list[Tensor], list[Tensor]]) -> None:
    for n, (eager, ours) in enumerate(zip(*layers, strict=True)):
        torch.testing.assert_close(ours, eager, rtol=2e-4, atol=2e-4, msg=f"after layer {n}")


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.filterwarnings("default")  # those of another library
def test_a_model_computes_the_same(name: str, registered: Masks) -> None:
    tokens = torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    assert_same(both(name, tokens, attention_mask=torch.ones_like(tokens)))
    assert len(registered) == 2, "a call for each layer"
    assert {mask for mask, _ in registered} == SEEN[name]


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.filterwarnings("default")
def test_a_model_writes_the_same_text(name: str, registered: Masks) -> None:
    """Token by token, with a cache: queries that begin in the middle."""
    tokens = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    texts = []
    for implementation in ("eager", "cqsa_test"):
        model = made(name, implementation)
        with torch.no_grad():
            texts.append(model.generate(tokens, max_new_tokens=6, do_sample=False))
    assert torch.equal(*texts)
    assert {start for _, start in registered} > {0}, "a query at a later position"


@pytest.mark.filterwarnings("default")
def test_a_bidirectional_model() -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    tokens = torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    found = []
    for implementation in ("eager", "cqsa_test"):
        torch.manual_seed(3)
        model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            found.append(model(tokens).last_hidden_state)
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=2e-4)


def padded() -> dict[str, Tensor]:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :5] = 0
    return {"attention_mask": mask}


def packed() -> dict[str, Tensor]:
    """Two sequences one after the other, the second of them short."""
    return {"position_ids": torch.cat([torch.arange(TOKENS - 3), torch.arange(3)])[None].expand(2, -1)}


@pytest.mark.parametrize(
    ("words", "said"),
    [(padded(), "padding is not supported"), (packed(), "packed sequences, for example")],
    ids=["padded", "packed"],
)
@pytest.mark.filterwarnings("default")
def test_what_would_be_hidden_in_silence_is_refused(words: dict[str, Tensor], said: str) -> None:
    tokens = torch.randint(3, 64, (2, TOKENS))
    model = made("mistral", "cqsa_test")
    with torch.no_grad(), pytest.raises(cqsa.InputError, match=said):
        model(tokens, use_cache=False, **words)


@pytest.mark.filterwarnings("default")
def test_gradients_and_dropout_are_refused() -> None:
    tokens = torch.randint(3, 64, (1, TOKENS))
    with torch.enable_grad(), pytest.raises(cqsa.InputError, match="requires grad"):
        made("mistral", "cqsa_test")(tokens)
    model = made("mistral", "cqsa_test").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with torch.no_grad(), pytest.raises(cqsa.InputError, match="dropout"):
        model(tokens)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_model_with_a_static_cache_writes_the_same_text(name: str) -> None:
    tokens = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    texts = []
    for implementation in ("eager", "cqsa_test"):
        with torch.no_grad():
            words = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
            texts.append(made(name, implementation).generate(tokens, **words))
    assert torch.equal(*texts)


def seen(hidden: list[int], told: int, *, queries: int, keys: int, q_offset: int = 0, kv_offset: int = 0) -> Any:
    """Return what is found of a causal mask, with a mask of tokens of which some are hidden."""
    tokens = torch.ones(2, told, dtype=torch.bool)
    tokens[0, hidden] = False
    return integration._seen(
        2, queries, keys, q_offset, kv_offset, lambda b, h, q, k: (k <= q) | (b < 0), tokens, transformers.LlamaConfig()
    )


def test_padding_is_looked_for_where_the_keys_are() -> None:
    refused = pytest.raises(cqsa.InputError, match="padding is not supported")
    for hidden, told in (([0], 20), ([19], 20), ([5], 28)):
        with refused:
            seen(hidden, told, queries=20, keys=20)
    assert seen([25], 28, queries=20, keys=20).q_start == 0, "hidden behind the last key"
    assert seen([0], 28, queries=8, keys=20, q_offset=20, kv_offset=8).q_start == 12, "hidden before the first key"
    with refused:
        seen([8], 28, queries=8, keys=20, q_offset=20, kv_offset=8)
    assert str(seen([], 20, queries=20, keys=64).rule) == "causal", "a static cache: what is not told is not seen"
    with refused:
        seen([], 20, queries=20, keys=64, q_offset=10)


def test_what_a_model_says_besides_is_refused() -> None:
    """Models that choose keys hand their choice on, or attend to other keys than their mask is for."""
    attend = transformers.AttentionInterface._global_mapping["cqsa_test"]
    q = torch.randn(1, 2, 10, 8)
    mask = integration.Seen(None, 0, (1, 1, 10, 10))
    module = torch.nn.Module()
    assert attend(module, q, q, q, mask, scaling=0.3, position_ids=torch.arange(10), output_attentions=False)[
        0
    ].shape == (1, 10, 2, 8)
    for name in ("block_indices", "indices", "sinks", "position_bias", "cu_seq_lens_q"):
        with pytest.raises(cqsa.InputError, match=f"{name}: this model passes it"):
            attend(module, q, q, q, mask, scaling=0.3, **{name: torch.zeros(1)})
    longer = torch.randn(1, 2, 14, 8)
    with pytest.raises(cqsa.InputError, match="attends 10 queries to 14 keys"):
        attend(module, q, longer, longer, mask)
    for words in ({"sliding_window": 8}, {"is_causal": True}):
        with pytest.raises(cqsa.InputError, match="their positions are not known"):
            attend(module, q, longer, longer, None, **words)
    with pytest.raises(cqsa.InputError, match="leave it out"):
        integration.register("other", layout="bthd")
