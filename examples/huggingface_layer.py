"""A layer of a Hugging Face model over a sequence that need not fit in memory: norm, project and rotate piece by piece,
attend from disk, project piece by piece. The result is that of the model's own layer.

    python examples/huggingface_layer.py [--tokens 131072]
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb

import cqsa_stream as cqsa

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
    max_position_embeddings=1 << 20, attn_implementation="sdpa",
)  # fmt: skip
PIECE = 4_096


def pieces(tokens: int) -> Iterator[range]:
    for start in range(0, tokens, PIECE):
        yield range(start, min(start + PIECE, tokens))


@torch.no_grad()
def out_of_core(layer: LlamaDecoderLayer, embed: torch.nn.Embedding, ids: Tensor, folder: Path) -> Iterator[Tensor]:
    """Yield the layer's output, piece by piece: of Q, K and V one piece at a time is in memory."""
    attention, rotary, tokens = layer.self_attn, LlamaRotaryEmbedding(CONFIG), len(ids)
    heads, kv_heads, dim = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
    with cqsa.create_inputs(folder, (1, heads, tokens, dim), "float32", kv_heads=kv_heads) as writer:
        for span in pieces(tokens):
            hidden = embed(ids[None, span.start : span.stop])
            normed = layer.input_layernorm(hidden)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (project(normed).unflatten(2, (-1, dim)).transpose(1, 2) for project in projections)
            cos, sin = rotary(hidden, torch.arange(span.start, span.stop)[None])
            writer.append(*apply_rotary_pos_emb(q, k, cos, sin), v)

    cqsa.attention(
        *writer.paths, is_causal=True, enable_gqa=True, scale=attention.scaling, out=folder / "out.zarr", device="cpu",
        host_memory="128MiB",
    )  # fmt: skip
    result = cqsa.open_result(folder / "out.zarr")
    for span in pieces(tokens):
        attended = result.torch(queries=(span.start, span.stop)).transpose(1, 2).flatten(2)
        hidden = embed(ids[None, span.start : span.stop]) + attention.o_proj(attended)
        yield hidden + layer.mlp(layer.post_attention_layernorm(hidden))


@torch.no_grad()
def in_core(layer: LlamaDecoderLayer, embed: torch.nn.Embedding, ids: Tensor) -> Tensor:
    hidden = embed(ids[None])
    position = LlamaRotaryEmbedding(CONFIG)(hidden, torch.arange(len(ids))[None])
    found: Tensor = layer(hidden, position_embeddings=position)
    return found


def main(tokens: int) -> None:
    torch.manual_seed(0)
    layer, embed = LlamaDecoderLayer(CONFIG, layer_idx=0).eval(), torch.nn.Embedding(256, CONFIG.hidden_size)
    ids = torch.randint(0, 256, (tokens,))
    with tempfile.TemporaryDirectory() as folder:
        found = torch.cat(list(out_of_core(layer, embed, ids, Path(folder))), dim=1)
    expected = in_core(layer, embed, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    print(f"{tokens} tokens: the layer from disk is the layer in memory, within {(found - expected).abs().max():.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=131_072)
    main(parser.parse_args().tokens)
