"""The node tests of ONNX's Attention operator: every case that can be said passes, the rest is refused in a line.

What has no words here: masks that are added to scores, and outputs of scores. Of these last, the attention is checked.
"""

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import cqsa_stream as cqsa

with warnings.catch_warnings():  # cases of other operators are made, too
    warnings.simplefilter("ignore")
    onnx = pytest.importorskip("onnx")
    from onnx.backend.test.loader import load_model_tests

    CASES = [
        c for c in load_model_tests(kind="node") if c.name.startswith("test_attention_") and "expanded" not in c.name
    ]


def said(case: Any) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return a case's attributes, inputs and outputs, by name."""
    [node] = case.model.graph.node
    [(inputs, outputs)] = case.data_sets
    given = {name: value for name, value in zip((n for n in node.input if n), inputs, strict=True)}
    named = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
    values = {role: given[name] for role, name in zip(named, node.input, strict=False) if name}
    found = {name: value for name, value in zip((n for n in node.output if n), outputs, strict=True)}
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}, values, found


def attended(about: dict[str, Any], given: dict[str, np.ndarray]) -> torch.Tensor:
    """Say a case in our words; what differs between batches, in a call for each."""
    q, k, v = (tensor(given[name]) for name in ("Q", "K", "V"))
    options: dict[str, Any] = {"enable_gqa": True, "device": "cpu", "scale": about.get("scale")}
    if q.dim() == 3:
        heads = [int(about[name]) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
        q, k, v = (
            x.view(*x.shape[:2], n, -1).transpose(1, 2).contiguous() for x, n in zip((q, k, v), heads, strict=True)
        )
    starts = [0] * len(q)
    if "past_key" in given:
        starts = [given["past_key"].shape[2]] * len(q)
        k, v = (torch.cat([tensor(given[name]), x], 2) for name, x in (("past_key", k), ("past_value", v)))
    lengths = [k.shape[2]] * len(q)
    if "nonpad_kv_seqlen" in given:
        lengths = given["nonpad_kv_seqlen"].tolist()
        starts = [length - q.shape[2] for length in lengths]
    left, right = (about.get(name, -1) for name in ("left_window_size", "right_window_size"))
    options["mask"] = cqsa.masks.Window(None if left < 0 else left, None if right < 0 else right)
    options["is_causal"] = bool(about.get("is_causal"))
    if about.get("softcap"):
        options["soft_cap"] = about["softcap"]
    found = []
    for n, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        seen = torch.arange(k.shape[2]) < length
        if "attn_mask" in given:
            said = tensor(given["attn_mask"])
            of_batch = said[n : n + 1] if said.dim() == 4 and len(said) > 1 else said
            seen = of_batch & seen if said.dtype == torch.bool else of_batch
        query, key, value = (x[n : n + 1] for x in (q, k, v))
        found.append(cqsa.attention(query, key, value, attn_mask=seen, q_start=start, **options))
    out = torch.cat(found)
    return out if given["Q"].ndim == 4 else out.transpose(1, 2).flatten(2)


def tensor(values: np.ndarray) -> torch.Tensor:
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values)


def test_there_are_as_many_cases_as_we_know() -> None:
    assert len(CASES) == 93


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_case(case: Any) -> None:
    about, given, found = said(case)
    seen = given.get("attn_mask", np.ones(1, bool))
    if seen.dtype != bool or not (seen.ndim < 3 or (seen[..., :1, :, :] == seen).all()):
        with pytest.raises(cqsa.InputError, match=r"attn_mask: .*expected") as refused:
            attended(about, given)
        assert "\n" not in str(refused.value)
        return
    out, expected = attended(about, given), tensor(found["Y"])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[out.dtype]
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=tolerance)
