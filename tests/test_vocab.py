"""Vocabulary-parallel pieces against torch's own on the whole vocabulary, ranks forked over gloo."""

import datetime as dt
import multiprocessing
import os
import traceback

import pytest
import torch
import torch._dynamo  # before the fork, so that no child pays for the import
import torch.distributed as dist
import torch.nn.functional as F

from shardspec.functional import cross_entropy
from shardspec.runtime import vocab

V, D = 24, 5
LABELS = torch.tensor([[3, -100, 23], [0, 12, -100], [5, 6, 11], [18, 17, 23]])


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def fork_ranks(world, check, directory):
    """Run check(rank, world) on forked gloo ranks; raise the first rank's traceback that there is."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    path = os.path.join(directory, "store")
    ranks = [context.Process(target=_rank_main, args=(r, world, check, path, queue)) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
    hung = [rank for rank in ranks if rank.is_alive()]
    for rank in hung:
        rank.kill()
    while not queue.empty():
        if error := queue.get():
            pytest.fail(error)
    assert not hung
    assert [rank.exitcode for rank in ranks] == [0] * world


def _rank_main(rank, world, check, path, queue):
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(path, world)
        timeout = dt.timedelta(seconds=30)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        check(rank, world)
        dist.destroy_process_group()
    except BaseException:
        queue.put(f"rank {rank}: {traceback.format_exc()}")


def shard(tensor, rank, world):
    return tensor.chunk(world, dim=-1)[rank].clone().requires_grad_()


def reference(logits, labels, ignore_index=-100):
    whole = logits.clone().requires_grad_()
    total = F.cross_entropy(whole.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=ignore_index)
    (grad,) = torch.autograd.grad(2.5 * total, whole)
    return total.detach(), grad


def sharded(logits, labels, rank, world, ignore_index=-100):
    local = shard(logits, rank, world)
    group = dist.group.WORLD if world > 1 else None
    first = rank * V // world
    total, weight = vocab.cross_entropy_sharded(local, labels, first, V, group, ignore_index)
    assert not weight.requires_grad
    (grad,) = torch.autograd.grad(2.5 * total, local)
    assert grad.dtype == logits.dtype
    return total.detach(), weight, grad


def check_cross_entropy(rank, world):
    logits = 10 * draw(4, 3, V)
    for labels, ignore_index in (
        (LABELS, -100),
        (LABELS.clamp(min=0), 0),
        (torch.full_like(LABELS, -100), -100),
    ):
        expected, expected_grad = reference(logits, labels, ignore_index)
        total, weight, grad = sharded(logits, labels, rank, world, ignore_index)
        torch.testing.assert_close(total, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(grad, expected_grad.chunk(world, -1)[rank], rtol=0, atol=1e-14)
        assert weight == (labels != ignore_index).sum()
        assert weight.dtype == total.dtype == torch.float64


def check_cross_entropy_bf16(rank, world):
    logits = draw(4, 3, V, dtype=torch.bfloat16)
    expected, expected_grad = reference(logits.float(), LABELS)
    total, weight, grad = sharded(logits, LABELS, rank, world)
    assert total.dtype == weight.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad.chunk(world, -1)[rank].bfloat16(), rtol=8e-3, atol=1e-6)


def check_embedding(rank, world):
    ids = LABELS.clamp(min=0)
    for padding_idx in (None, 12, -1):
        table, upstream = draw(V, D).requires_grad_(), draw(4, 3, D)
        expected = F.embedding(ids, table, padding_idx=padding_idx)
        (expected_grad,) = torch.autograd.grad(expected, table, upstream)
        first, local = rank * V // world, draw(V, D).chunk(world)[rank].clone().requires_grad_()
        out = vocab.embedding_sharded(local, ids, first, V, padding_idx)
        (grad,) = torch.autograd.grad(out, local, upstream)
        total = out.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        assert torch.equal(total, expected)
        assert torch.equal(grad, expected_grad.chunk(world)[rank])
        assert grad.is_contiguous()


CHECKS = [check_cross_entropy, check_cross_entropy_bf16, check_embedding]


@pytest.mark.parametrize("check", CHECKS)
def test_one_rank_without_a_group_agrees_with_torch(check):
    check(0, 1)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world", [2, 4])
def test_vocabulary_shards_agree_with_torch_on_the_whole(check, world, tmp_path):
    fork_ranks(world, check, tmp_path)


def check_collectives(rank, world):
    """One max and one sum forward, none backward."""
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, op=dist.ReduceOp.SUM, group=None: (
        calls.append((str(op), tensor.numel())),
        all_reduce(tensor, op, group),
    )
    sharded(draw(4, 3, V), LABELS, rank, world)
    assert [numel for _, numel in calls] == [12, 24]
    assert "MAX" in calls[0][0]
    assert "SUM" in calls[1][0]


def test_two_collectives_forward_and_none_backward(tmp_path):
    fork_ranks(2, check_collectives, tmp_path)


def test_chunks_of_rows_change_nothing(monkeypatch):
    whole = sharded(draw(4, 3, V), LABELS, 0, 1)
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", 2 * V + 1)
    for once, chunked in zip(whole, sharded(draw(4, 3, V), LABELS, 0, 1), strict=True):
        assert torch.equal(once, chunked)


def test_only_the_logits_are_saved_at_their_size():
    saved = []
    logits = draw(4, 3, V).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        vocab.cross_entropy_sharded(logits, LABELS, 0, V, None)
    large = [t for t in saved if t.numel() >= logits.numel()]
    assert [t.data_ptr() for t in large] == [logits.data_ptr()]


@pytest.mark.parametrize(("dtype", "of_pair"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_the_plain_form_returns_sum_and_weight(dtype, of_pair):
    logits = draw(4, 3, V, dtype=dtype)
    total, weight = cross_entropy(logits, LABELS)
    expected = F.cross_entropy(logits.to(of_pair).flatten(0, 1), LABELS.flatten(), reduction="sum")
    assert torch.equal(total, expected)
    assert weight == 10
    assert total.dtype == weight.dtype == of_pair


def test_the_plain_form_runs_on_meta():
    total, weight = cross_entropy(draw(4, 3, V).to("meta"), LABELS.to("meta"))
    assert total.is_meta
    assert weight.shape == ()


@pytest.mark.parametrize("value", [V, -1])
def test_labels_and_ids_out_of_range_are_refused_with_their_place(value):
    labels = LABELS.clone()
    labels[1, 2] = labels[2, 0] = value
    outside = rf"{value} at \[1, 2\] is outside \[0, 24\)"
    message = rf"label {outside} and is not ignore_index=-100 \(2 such labels\)"
    with pytest.raises(ValueError, match=message):
        cross_entropy(draw(4, 3, V), labels)
    with pytest.raises(ValueError, match=message):
        vocab.cross_entropy_sharded(draw(4, 3, V), labels, 0, V, None)
    with pytest.raises(ValueError, match=rf"id {outside} \(2 such ids\)"):
        vocab.embedding_sharded(draw(V, D), labels.where(labels != -100, 0), 0, V)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels \[3, 4\] do not match logits \[4, 3, 24\]"):
        cross_entropy(draw(4, 3, V), LABELS.reshape(3, 4))
