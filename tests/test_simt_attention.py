"""attention's CUDA forward in simt: what depends on its tiles, blocks and splits.

Options, types and shapes that every backend shares stand in test_attention*.py, which run in simt
as well.
"""

import pytest
import simt
import torch
from attention_cases import compare, inputs

import fasttransformer as ft
from contract import running_on

if simt.missing():
    pytest.skip(f"simt can't be built: {simt.missing()}", allow_module_level=True)

ONE = dict(multiprocessors=1)  # no more blocks than tiles: no splits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_len", [15, 16, 17, 47, 48, 49, 63, 64, 65, 96, 129])
def test_edges_of_key_tiles(dtype, kv_len):
    with simt.limits(**ONE):
        compare("simt", inputs(1, 2, 1, 20, kv_len, 72, dtype=dtype), grads=False)
        compare("simt", inputs(1, 2, 1, 20, kv_len, 16, dtype=dtype), grads=False,
                is_causal=True, causal_alignment="bottom_right")  # fmt: skip


@pytest.mark.parametrize("q_len", [63, 64, 65, 127, 128, 129])
def test_edges_of_query_tiles(q_len):
    """The last warp, and the last tile, have rows that are not there."""
    with simt.limits(**ONE):
        compare("simt", inputs(1, 1, 1, q_len, 70, 32, dtype=torch.bfloat16), grads=False,
                is_causal=True)  # fmt: skip
        compare("simt", inputs(1, 1, 1, q_len, 70, 32), grads=False, window=(20, 3))


SPLIT = {
    "plain": {},
    "causal": dict(is_causal=True, causal_alignment="bottom_right"),
    "window": dict(window=(90, 0), causal_alignment="bottom_right"),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "softcap, alibi": dict(softcap=2.0, alibi_slopes=torch.tensor([0.1, 0.2, 0.05, 0.0])),
    "key_lengths": dict(key_lengths=torch.tensor([300, 0])),
    "mask without a key": dict(mask=torch.arange(300) % 7 == torch.arange(3)[:, None] * 4),
    "bias of finfo.min": dict(bias=torch.full((3, 300), torch.finfo(torch.float32).min)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", SPLIT)
def test_splits_of_the_keys_are_merged(options, dtype):
    tensors, given = inputs(2, 4, 2, 3, 300, 24, dtype=dtype), SPLIT[options]
    with simt.limits(multiprocessors=40):
        if options == "bias of finfo.min":  # lse's own gradient is beyond float64
            with running_on("simt"):
                out = ft.attention(*tensors, **given)
            mean = tensors[2].float().mean(2, keepdim=True).repeat_interleave(2, 1)
            return torch.testing.assert_close(
                out.float(), mean.expand(out.shape), atol=4e-3, rtol=0
            )
        compare("simt", tensors, grads=False, **given)


def test_splits_do_not_change_a_row_of_nan():
    query, key, value = inputs(1, 2, 2, 3, 300, 16)
    query[0, 1, 1] = torch.nan
    with simt.limits(multiprocessors=40), running_on("simt"):
        out, lse = ft.attention(query, key, value, return_lse=True)
    assert out[0, 1, 1].isnan().all() and lse[0, 1, 1].isnan()
    assert out.isnan().sum() == 16


@pytest.mark.parametrize("q_len, heads", [(1, (8, 1)), (1, (32, 8)), (3, (6, 2)), (40, (6, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_a_group_share_a_tile(q_len, heads, dtype):
    tensors = inputs(2, *heads, q_len, 130, 40, dtype=dtype)
    per_head = dict(alibi_slopes=torch.rand(2, heads[0]), bias=torch.randn(heads[0], 1, 130))
    for limits in (ONE, dict(multiprocessors=40)):
        with simt.limits(**limits):
            compare("simt", tensors, grads=False, is_causal=True, causal_alignment="bottom_right")
            compare("simt", tensors, grads=False, **per_head)


@pytest.mark.parametrize("dim", [64, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_head_size_has_its_kernel(dim, dtype):
    with simt.limits(**ONE):
        for value_dim in (dim, 17):
            compare("simt", inputs(1, 1, 1, 33, 70, dim, value_dim, dtype=dtype), grads=False)


@pytest.mark.parametrize("offset", [1, 4])
def test_rows_that_begin_anywhere(offset):
    """Not on 16 bytes: loads go element by element."""
    wide = torch.randn(3, 1, 2, 50, 64).to(torch.bfloat16)
    query, key, value = wide[..., offset : offset + 32].unbind()
    with simt.limits(**ONE):
        compare("simt", [query, key, value], grads=False)
        compare("simt", [query[..., :31], key[..., :31], value], grads=False, is_causal=True)


def test_a_grid_cut_short():
    for limits in (dict(grid=1), dict(grid=3, multiprocessors=40)):
        with simt.limits(**limits):
            compare("simt", inputs(2, 2, 1, 70, 90, 16, dtype=torch.float16), grads=False,
                    is_causal=True)  # fmt: skip


def test_splits_are_the_same_from_run_to_run():
    tensors = inputs(1, 4, 1, 2, 500, 32, dtype=torch.bfloat16)
    with simt.limits(multiprocessors=40), running_on("simt"):
        runs = [ft.attention(*tensors) for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
