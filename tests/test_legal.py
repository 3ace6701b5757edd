"""Legal meshes by symbol are those that pass the check."""

import attrs
import pytest
import torch

import shardspec as ss
from tests.legal import FAMILIES, Family, agreement, all_meshes, loss_fn

LLAMA, *_ = FAMILIES


def passes(family: Family, mesh: ss.Mesh, batch: dict[str, torch.Tensor] | None = None) -> bool:
    """Whether `ss.compile` accepts a mesh."""
    try:
        ss.compile(family.model, family.rules, mesh, family.batch if batch is None else batch, loss_fn)
    except ss.ShardingError:
        return False
    return True


def test_there_are_110_meshes_of_up_to_16_ranks():
    assert len(all_meshes(range(1, 17))) == 110


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_legal_meshes_by_symbol_are_those_that_pass_the_check(family: Family):
    found = agreement(family, range(1, 17))
    assert found.disagreements == ()
    assert found.meshes == 110
    assert 10 < found.legal < 110, "a set of meshes that are all alike tests nothing"


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_plans_own_list_is_what_compile_accepts(family: Family):
    plan = ss.compile(family.model, family.rules, ss.Mesh(tp=2), family.batch, loss_fn)
    listed = {mesh for mesh in plan.legal_meshes(6) if mesh["pp"] == 1}
    assert listed == {mesh for mesh in all_meshes([6]) if passes(family, mesh)}


def test_meshes_with_pp_are_listed_where_the_table_lays_layers_over_it():
    """Llama debug on 12 ranks: 4 layers, 4 key-value heads, 12 rows, as many microbatches as stages. Over pp=2 fsdp
    divides 6, over pp=3 it divides 4."""
    family = attrs.evolve(LLAMA, rows=12)
    plan = ss.compile(family.model, family.rules, ss.Mesh(tp=2), family.batch, loss_fn)
    expected = {
        ss.Mesh(pp=pp, dp=mesh["dp"], fsdp=mesh["fsdp"], tp=mesh["tp"])
        for pp in (1, 2, 3, 4)
        for mesh in all_meshes([12 // pp])
        if 4 % mesh["tp"] == 0 and 12 // pp % (mesh["dp"] * mesh["fsdp"]) == 0
    }
    assert {ss.Mesh(pp=2, fsdp=6), ss.Mesh(pp=3, fsdp=4)} < expected
    assert set(plan.legal_meshes(12)) == expected


def test_what_is_legal_by_hand():
    """Llama debug: 8 heads, 4 key-value heads, 448 hidden, 256 rows of vocabulary, 64 positions; 48 rows of batch."""
    plan = ss.compile(LLAMA.model, LLAMA.rules, ss.Mesh(), LLAMA.batch, loss_fn)
    for world in (8, 12):
        expected = {
            mesh for mesh in all_meshes([world]) if 4 % mesh["tp"] == 0 and 48 % (mesh["dp"] * mesh["fsdp"]) == 0
        }
        assert {mesh for mesh in plan.legal_meshes(world) if mesh["pp"] == 1} == expected


@pytest.mark.parametrize("rows", [6, 10])
def test_the_rows_of_the_batch_decide_too(rows: int):
    found = agreement(attrs.evolve(LLAMA, rows=rows), range(1, 13))
    assert found.disagreements == ()


@pytest.mark.parametrize("length", [6, 20])
def test_the_length_of_the_sequence_decides_under_sequence_parallelism(length: int):
    found = agreement(attrs.evolve(LLAMA, length=length), (2, 3, 4, 6, 8, 10))
    assert found.disagreements == ()


def test_storage_that_does_not_divide_is_legal_on_dim_0_and_not_elsewhere():
    """128 columns or rows over fsdp=3: rows are padded, columns are not."""
    mesh = ss.Mesh(fsdp=3)
    assert passes(LLAMA, mesh)
    rules = LLAMA.rules.override(params={r"output\.weight": "V@tp D@fsdp"})
    columns = attrs.evolve(LLAMA, rules=rules)
    assert not passes(columns, mesh)
    assert passes(columns, ss.Mesh(fsdp=4))
    assert agreement(columns, range(1, 13)).disagreements == ()


def test_a_sequence_is_split_where_positions_come_with_the_batch_and_nowhere_else():
    batch = LLAMA.batch | {"positions": torch.arange(LLAMA.length)}
    plan = ss.compile(LLAMA.model, LLAMA.rules, ss.Mesh(), batch, loss_fn)
    for world in (2, 4):
        assert any(mesh["cp"] == world for mesh in plan.legal_meshes(world))
    alone = ss.compile(LLAMA.model, LLAMA.rules, ss.Mesh(), LLAMA.batch, loss_fn)
    assert all(mesh["cp"] == 1 for world in (2, 4) for mesh in alone.legal_meshes(world))
    assert passes(LLAMA, ss.Mesh(cp=2, tp=2), batch)
    assert not passes(LLAMA, ss.Mesh(cp=2))
