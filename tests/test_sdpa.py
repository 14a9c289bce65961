"""Attention that calls torch's own function, computed here instead."""

import inspect
from typing import Any

import pytest
import torch
from torch.nn import functional

import cqsa_stream as cqsa

SHAPES: list[tuple[int, ...]] = [(2, 4, 70, 16), (4, 70, 16), (70, 16), (2, 3, 4, 70, 16)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("words", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_the_same_as_torch(shape: tuple[int, ...], words: dict[str, Any]) -> None:
    q, k, v = normal(*shape), normal(*shape) + 1, normal(*shape[:-1], 8)
    expected = functional.scaled_dot_product_attention(q, k, v, **words)
    with cqsa.patch_sdpa():
        found = functional.scaled_dot_product_attention(q, k, v, **words)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", [(70, 70), (1, 1, 70, 70), (4, 1, 70)], ids=str)
def test_a_mask_that_all_heads_share(mask: tuple[int, ...]) -> None:
    q = normal(2, 4, 70, 16)
    seen = (torch.rand(mask, generator=torch.Generator().manual_seed(0)) > 0.3)[:1].expand(mask)
    expected = functional.scaled_dot_product_attention(q, q, q, attn_mask=seen)
    with cqsa.patch_sdpa(host_memory="1GiB"):
        found = functional.scaled_dot_product_attention(q, q, q, attn_mask=seen)
    torch.testing.assert_close(found, expected)


def test_a_layer_of_torch() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0).eval()
    x = normal(2, 50, 32)
    calls: list[object] = []
    with torch.no_grad():
        expected = layer(x)
        with cqsa.patch_sdpa(observers=[calls.append]):
            found = layer(x)
    torch.testing.assert_close(found, expected)
    assert calls, "it was ours, and not torch's fast path"
    assert torch.backends.mha.get_fastpath_enabled()


def test_torchs_function_is_back_whatever_happened() -> None:
    before = functional.scaled_dot_product_attention
    q = normal(1, 1, 10, 16).requires_grad_()
    refused: list[tuple[dict[str, Any], str]] = [({}, "requires grad"), ({"dropout_p": 0.1}, "requires grad|dropout")]
    for words, said in refused:
        with torch.enable_grad(), cqsa.patch_sdpa(), pytest.raises(cqsa.InputError, match=said):
            functional.scaled_dot_product_attention(q, q, q, **words)
        assert functional.scaled_dot_product_attention is before
    with pytest.raises(cqsa.InputError, match="leave it out"), cqsa.patch_sdpa(out="x"):
        pass
    x = normal(1, 1, 10, 16)
    with cqsa.patch_sdpa(), pytest.raises(cqsa.InputError, match="expected booleans"):
        functional.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(10, 10))


def test_its_words_are_those_of_torch() -> None:
    words = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    with cqsa.patch_sdpa():
        assert list(inspect.signature(functional.scaled_dot_product_attention).parameters) == words


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 2, 4, 10, 8), (2, 1, 4, 10, 8)),
        ((2, 3, 4, 10, 8), (3, 2, 4, 10, 8)),
        ((4, 10, 8), (1, 4, 10, 8)),
        ((8,), (8,)),
    ],
    ids=str,
)
def test_what_would_be_broadcast_is_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    q, k = normal(*shapes[0]), normal(*shapes[1])
    with cqsa.patch_sdpa(), pytest.raises(cqsa.InputError, match=r"expected the same: expand them"):
        functional.scaled_dot_product_attention(q, k, k)


@pytest.mark.parametrize("name", ["layout", "return_lse", "queries", "out"])
def test_options_that_would_change_the_result(name: str) -> None:
    with pytest.raises(cqsa.InputError, match=f"{name}: .*leave it out"), cqsa.patch_sdpa(**{name: "bthd"}):
        pass
