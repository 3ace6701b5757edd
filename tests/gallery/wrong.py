"""Wrong tables and models. Each function makes one; the decorator says with which code, and which words, it is
refused."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

import shardspec as ss
from models.llama.rules import RULES, WITHOUT_SP
from tests import fused, reader
from tests.gallery import parts
from tests.gallery.case import Case, llama, make_batch, with_parts

BLOCKS = r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?"
INPUTS = r"layers\.\d+\.(attention|feed_forward):in|output:in"
WHOLE = "B@(dp,fsdp) S@cp D"
SPLIT = "B@(dp,fsdp) S@(cp,tp) D"
HEADS = r"layers\.\d+\.attention"


@attrs.frozen
class Fault:
    """A case that is refused: with one of these codes, in a message that holds these words."""

    make: Callable[[], Case]
    codes: tuple[str, ...]
    says: str

    def __str__(self) -> str:
        return self.make.__name__


FAULTS: list[Fault] = []


def wrong(codes: str, says: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """List the decorated function as a fault."""

    def add(make: Callable[[], Case]) -> Callable[[], Case]:
        FAULTS.append(Fault(make, tuple(codes.split()), says))
        return make

    return add


# Patterns and names


@wrong("SS202", "no rule claims parameter layers.*.attention_norm.weight")
def norms_without_a_rule():
    return Case(rules=RULES.override(drop=[r"(layers\.\d+\.\w+_norm|norm)\.weight"]))


@wrong("SS202", "rope_cos")
def a_buffer_without_a_rule():
    return Case(rules=RULES.override(drop=[r"rope_(cos|sin)"]))


@wrong("SS202", "no rule claims batch entry labels")
def a_batch_entry_without_a_rule():
    rules = RULES.override(drop=[r"tokens|labels"], activations={r"tokens": "B@(dp,fsdp) S@cp"})
    return Case(rules=rules)


@wrong("SS203", r'fix: r"layers\.\d+\.attention\.wo\.weight": "D@fsdp (H@tp hd)"')
def a_typo_in_a_pattern():
    rules = RULES.override(
        drop=[r"layers\.\d+\.attention\.wo\.weight"],
        params={r"layers\.\d+\.attenton\.wo\.weight": "D@fsdp (H@tp hd)"},
    )
    return Case(rules=rules)


@wrong("SS203", r'r"layers\.d+\.attention\.wo\.weight"')
def a_digit_class_without_its_backslash():
    rules = RULES.override(
        drop=[r"layers\.\d+\.attention\.wo\.weight"],
        params={r"layers\.d+\.attention\.wo\.weight": "D@fsdp (H@tp hd)"},
    )
    return Case(rules=rules)


@wrong("SS203", "the rule matches nothing")
def a_regex_escaped_twice():
    rules = RULES.override(
        drop=[r"layers\.\d+\.attention\.wo\.weight"],
        params={r"layers\\.\\d+\\.attention\\.wo\\.weight": "D@fsdp (H@tp hd)"},
    )
    return Case(rules=rules)


@wrong("SS203", r'r"output"')
def a_pattern_meant_as_a_prefix():
    return Case(rules=RULES.override(drop=[r"output\.weight"], params={r"output": "V@(tp,fsdp) D"}))


@wrong("SS203", "bias")
def a_rule_for_biases_that_the_model_does_not_have():
    return Case(rules=RULES.override(params={r"layers\.\d+\.attention\.w[qkv]\.bias": "(H@tp hd)@fsdp"}))


@wrong("SS203", r"layers\.\d+\.attn")
def an_activation_that_no_module_makes():
    return Case(rules=RULES.override(activations={r"layers\.\d+\.attn": SPLIT}))


@wrong("SS204", r'fix: drop r"layers\.\d+\.attention\.w.\.weight"')
def a_rule_shadowed_by_a_broader_one():
    return Case(rules=RULES.override(params={r"layers\.\d+\.attention\.w.\.weight": "(H@tp hd)@fsdp D"}))


@wrong("SS204", "2 rules claim activation layers.0.attention")
def an_activation_claimed_twice():
    return Case(rules=RULES.override(activations={r"layers\.0\.attention": WHOLE}))


@wrong("SS201", "did you mean")
def a_drop_of_a_pattern_that_is_not_there():
    return Case(rules=RULES.override(drop=[r"layers\.\d+\.attention\.wo"]))


@wrong("SS103", "pattern cannot be read")
def a_pattern_with_an_open_bracket():
    return Case(rules=RULES.override(params={r"layers\.(\d+\.attention\.wo\.bias": "D"}))


@wrong("SS103", "did you mean tp?")
def an_axis_that_does_not_exist():
    return Case(rules=RULES.override(params={r"output\.weight": "V@tpp D"}))


@wrong("SS103", "spec cannot be read")
def a_spec_with_an_open_bracket():
    return Case(rules=RULES.override(params={r"output\.weight": "V@(tp,fsdp D"}))


@wrong("SS211", "matches no module")
def a_unit_that_no_module_matches():
    return Case(rules=RULES.override(units=[r"layers\.\d+\.attn"]))


@wrong("SS204", "two units claim the module layers.0")
def a_module_in_two_units():
    return Case(rules=RULES.override(units=[r"layers\.\d+", r"layers\.0"]))


@wrong("SS211", "matches no module")
def an_attribute_of_no_module():
    return Case(rules=RULES.override(attributes={r"layers\.\d+\.attn": {"n_heads": "H@tp"}}))


@wrong("SS211", "has no attribute heads")
def an_attribute_that_the_module_does_not_have():
    model = with_parts(attention=parts.HeadCountInAttribute)
    return Case(model=model, rules=RULES.override(attributes={HEADS: {"heads": "H@tp"}}))


# Shapes, names and sizes


@wrong("SS205", "the spec has 1 dims, layers.0.attention.wo.weight has 2")
def a_spec_of_the_wrong_rank():
    return Case(rules=RULES.override(params={r"layers\.\d+\.attention\.wo\.weight": "D@fsdp"}))


@wrong("SS205", "'...' in a parameter's spec")
def dots_in_a_parameters_spec():
    return Case(rules=RULES.override(params={r"output\.weight": "V@(tp,fsdp) ..."}))


@wrong("SS205", "dims, tokens has 2")
def an_entry_of_the_wrong_rank():
    return Case(rules=RULES.override(activations={r"tokens|labels": "B@(dp,fsdp) S@cp D"}))


@wrong("SS206", "has two sizes")
def one_name_with_two_sizes():
    return Case(rules=RULES.override(params={r"layers\.\d+\.feed_forward\.w[13]\.weight": "D@(tp,fsdp) D"}))


@wrong("SS206", "has two sizes")
def dims_written_in_the_wrong_order():
    return Case(rules=RULES.override(params={r"layers\.\d+\.feed_forward\.w2\.weight": "F@tp D@fsdp"}))


@wrong("SS206", "has two sizes")
def batch_and_sequence_exchanged():
    return Case(rules=RULES.override(activations={BLOCKS: "S@(cp,tp) B@(dp,fsdp) D"}))


@wrong("SS206", "do not make up")
def factors_that_do_not_make_up_a_dim():
    return Case(rules=RULES.override(sizes={"H": 8, "hd": 32}))


@wrong("SS215", "nothing tells the size of")
def a_factor_of_unknown_size():
    rules = RULES.override(
        drop=[r"rope_(cos|sin)", r"layers\.\d+\.feed_forward\.w[13]\.weight"],
        params={r"rope_(cos|sin)": "T R", r"layers\.\d+\.feed_forward\.w13\.weight": "(two G@tp)@fsdp D"},
    )
    return Case(model=with_parts(feed_forward=parts.HalvesOfOneProduct), rules=rules)


@wrong("SS301", "tp in {1, 2, 4}")
def fewer_key_heads_than_tp():
    return Case(mesh="tp=8")


@wrong("SS301", "tp in {1, 2}")
def heads_that_three_does_not_divide():
    return Case(mesh="tp=3", inputs=make_batch(8, 126))


@wrong("SS301", "dp in {1, 2, 4, 8}")
def rows_that_the_data_ranks_do_not_divide():
    return Case(mesh="dp=3,tp=2")


@wrong("SS301", "tp in {1}")
def a_sequence_that_tp_does_not_divide():
    return Case(inputs=make_batch(8, 129))


@wrong("SS301", "n_kv_heads=4")
def an_attribute_that_tp_does_not_divide():
    model = with_parts(attention=parts.HeadCountInAttribute)
    rules = RULES.override(attributes={HEADS: {"n_heads": "H@tp", "n_kv_heads": "K@tp"}})
    return Case(model=model, rules=rules, mesh="tp=8")


# Axes where they cannot stand


@wrong("SS207", "tp stands twice")
def one_axis_on_both_dims():
    return Case(rules=RULES.override(params={r"layers\.\d+\.attention\.wo\.weight": "D@tp (H@tp hd)"}))


@wrong("SS208", "dp on a parameter")
def replicas_that_split_a_parameter():
    return Case(rules=RULES.override(params={r"output\.weight": "V@(tp,dp) D"}), mesh="dp=2,tp=2")


@wrong("SS208", "pp is never written")
def stages_written_into_a_spec():
    return Case(rules=RULES.override(activations={r"layers\.\d+": "B@pp S D"}))


@wrong("SS208", "fsdp only stores")
def a_pending_storage_axis():
    return Case(rules=RULES.override(params={r"output\.weight": "V D +fsdp"}))


@wrong("SS209", "write @(tp,fsdp)")
def embedding_rows_split_over_storage_first():
    return Case(rules=RULES.override(params={r"tok_embeddings\.weight": "V@(fsdp,tp) D"}))


@wrong("SS209", "inside a group")
def storage_inside_a_group():
    return Case(rules=RULES.override(params={r"layers\.\d+\.attention\.wq\.weight": "(H@(tp,fsdp) hd) D"}))


@wrong("SS209", "two dims")
def storage_on_two_dims():
    return Case(rules=RULES.override(params={r"output\.weight": "V@(tp,fsdp) D@cp"}), mesh="fsdp=2,cp=2,tp=2")


@wrong("SS209", "the buffer rope_cos is stored over fsdp")
def a_stored_buffer():
    return Case(rules=RULES.override(params={r"rope_(cos|sin)": "T@fsdp hd"}))


@wrong("SS210", "no rule uses the mesh axis ep=2")
def an_axis_that_no_rule_uses():
    return Case(mesh="ep=2,tp=2")


@wrong("SS213", "fsdp=2 divides no batch entry")
def a_batch_that_every_data_rank_reads():
    return Case(
        rules=RULES.override(
            activations={
                r"tokens|labels": "B@dp S@cp",
                BLOCKS: "B@dp S@(cp,tp) D",
                INPUTS: "B@dp S@cp D",
                r"output": "B@dp S@cp V@tp",
            }
        )
    )


@wrong("SS217", "4 layers do not fill 8 stages")
def more_stages_than_layers():
    return Case(mesh="pp=8,tp=2")


@wrong("SS212", "are one tensor and have two layouts")
def tied_weights_laid_out_differently():
    return Case(model=llama(tied=True), rules=RULES.override(params={r"output\.weight": "V D@fsdp"}))


# Collectives forgotten or misplaced


@wrong("SS303", r"layers\.\d+\.attention\.wo\.weight")
def the_sum_after_wo_is_forgotten():
    rules = WITHOUT_SP.override(drop=[BLOCKS], activations={r"tok_embeddings|layers\.\d+(\.feed_forward)?": WHOLE})
    return Case(rules=rules)


@wrong("SS303", r"layers\.\d+\.feed_forward\.w2\.weight")
def the_sum_after_w2_is_forgotten():
    rules = WITHOUT_SP.override(drop=[BLOCKS], activations={r"tok_embeddings|layers\.\d+\.attention": WHOLE})
    return Case(rules=rules, mesh="tp=4")


@wrong("SS303", r"tok_embeddings\.weight")
def the_sum_after_a_split_vocabulary_is_forgotten():
    rules = WITHOUT_SP.override(drop=[BLOCKS], activations={r"layers\.\d+(\.attention|\.feed_forward)?": WHOLE})
    return Case(rules=rules)


@wrong("SS302", r"layers\.\d+\.attention\.wq\.weight")
def the_gather_before_attention_is_forgotten():
    rules = RULES.override(drop=[INPUTS], activations={r"layers\.\d+\.feed_forward:in|output:in": WHOLE})
    return Case(rules=rules)


@wrong("SS302", r"layers\.\d+\.feed_forward\.w[13]\.weight")
def the_gather_before_the_feed_forward_is_forgotten():
    rules = RULES.override(drop=[INPUTS], activations={r"layers\.\d+\.attention:in|output:in": WHOLE})
    return Case(rules=rules)


@wrong("SS302", r"output\.weight")
def the_gather_before_the_output_is_forgotten():
    rules = RULES.override(drop=[INPUTS], activations={r"layers\.\d+\.(attention|feed_forward):in": WHOLE})
    return Case(rules=rules)


@wrong("SS307", "layers")
def a_column_parallel_input_without_a_point_beside_a_residual():
    return Case(rules=WITHOUT_SP.override(drop=[INPUTS], activations={r"output:in": WHOLE}))


@wrong("SS307", "fix: add to activations")
def queries_complete_and_keys_split():
    rules = RULES.override(
        params={r"layers\.\d+\.attention\.wq\.weight": "(H hd)@fsdp D"},
        activations={r"layers\.\d+\.attention\.q": "B@(dp,fsdp) S@cp H@tp hd"},
    )
    return Case(model=with_parts(attention=parts.NamedHeads), rules=rules)


@wrong("SS304 SS302", r"tok_embeddings|layers")
def a_norm_over_a_split_width():
    rules = WITHOUT_SP.override(activations={BLOCKS: "B@(dp,fsdp) S@cp D@tp"})
    return Case(rules=rules)


@wrong("SS302 SS304", r"w[13]\.weight")
def columns_and_rows_exchanged_in_the_feed_forward():
    rules = WITHOUT_SP.override(
        params={
            r"layers\.\d+\.feed_forward\.w[13]\.weight": "F@fsdp D@tp",
            r"layers\.\d+\.feed_forward\.w2\.weight": "D@(tp,fsdp) F",
        }
    )
    return Case(rules=rules)


@wrong("SS302", r"wq\.weight")
def rows_where_columns_belong_in_wq():
    return Case(rules=WITHOUT_SP.override(params={r"layers\.\d+\.attention\.wq\.weight": "(H hd)@fsdp D@tp"}))


@wrong("SS302", r"wo\.weight")
def columns_where_rows_belong_in_wo():
    return Case(rules=WITHOUT_SP.override(params={r"layers\.\d+\.attention\.wo\.weight": "D@(tp,fsdp) (H hd)"}))


@wrong("SS302", r"w2\.weight")
def only_half_of_a_feed_forward_is_split():
    return Case(rules=WITHOUT_SP.override(params={r"layers\.\d+\.feed_forward\.w2\.weight": "D@fsdp F"}))


@wrong("SS302", r"w3\.weight")
def gate_split_and_up_not():
    rules = WITHOUT_SP.override(
        drop=[r"layers\.\d+\.feed_forward\.w[13]\.weight"],
        params={
            r"layers\.\d+\.feed_forward\.w1\.weight": "F@(tp,fsdp) D",
            r"layers\.\d+\.feed_forward\.w3\.weight": "F@fsdp D",
        },
    )
    return Case(rules=rules)


@wrong("SS302", "attention meets query and key heads")
def keys_that_are_not_split():
    return Case(rules=WITHOUT_SP.override(params={r"layers\.\d+\.attention\.w[kv]\.weight": "(K hd)@fsdp D"}))


@wrong("SS302", "attention meets query and key heads")
def queries_that_are_not_split():
    return Case(rules=WITHOUT_SP.override(params={r"layers\.\d+\.attention\.wq\.weight": "(H hd)@fsdp D"}))


@wrong("SS302 SS304", r"wq\.weight")
def heads_minor_to_their_width():
    rules = WITHOUT_SP.override(params={r"layers\.\d+\.attention\.wq\.weight": "(hd H@tp) D@fsdp"})
    return Case(rules=rules)


@wrong("SS302 SS304", r"wo\.weight")
def heads_minor_to_their_width_in_wo():
    rules = WITHOUT_SP.override(params={r"layers\.\d+\.attention\.wo\.weight": "D@fsdp (hd H@tp)"})
    return Case(rules=rules)


@wrong("SS302 SS304", r"wq\.weight")
def the_width_of_a_head_is_split():
    rules = WITHOUT_SP.override(
        params={
            r"layers\.\d+\.attention\.wq\.weight": "(H hd@tp) D@fsdp",
            r"layers\.\d+\.attention\.w[kv]\.weight": "(K hd@tp) D@fsdp",
            r"layers\.\d+\.attention\.wo\.weight": "D@fsdp (H hd@tp)",
        }
    )
    return Case(rules=rules)


@wrong("SS304", r"norm)\.weight")
def a_norms_weight_that_is_split():
    return Case(rules=WITHOUT_SP.override(params={r"(layers\.\d+\.\w+_norm|norm)\.weight": "D@tp"}))


@wrong("SS303", r"norm)\.weight")
def a_norms_weight_read_as_a_share():
    return Case(rules=RULES.override(params={r"(layers\.\d+\.\w+_norm|norm)\.weight": "D +tp"}))


@wrong("SS303", "silu reads layers.0.feed_forward.w1, which is still to be summed over tp")
def a_weight_read_as_a_share_before_a_nonlinear_function():
    rules = WITHOUT_SP.override(
        drop=[r"layers\.\d+\.feed_forward\.w[13]\.weight"],
        params={
            r"layers\.\d+\.feed_forward\.w1\.weight": "F D +tp",
            r"layers\.\d+\.feed_forward\.w3\.weight": "F D",
        },
    )
    return Case(rules=rules)


@wrong("SS303", "both factors are pending")
def a_product_whose_factors_are_both_shares():
    rules = WITHOUT_SP.override(
        activations={r"layers\.\d+\.attention\.wo": WHOLE + " +tp"},
        params={r"layers\.\d+\.attention\.gain": "D +tp"},
    )
    return Case(model=with_parts(attention=parts.GainAfterTheHeads), rules=rules)


@wrong("SS306", "cannot become")
def a_complete_value_declared_pending():
    return Case(rules=WITHOUT_SP.override(activations={r"layers\.\d+\.attention_norm": "B@(dp,fsdp) S@cp D +tp"}))


@wrong("SS306", "cannot become")
def a_split_value_declared_pending():
    return Case(rules=RULES.override(activations={r"layers\.\d+\.attention_norm": "B@(dp,fsdp) S@cp D +tp"}))


@wrong("SS302", "")
def labels_that_are_not_split_as_the_logits_are():
    rules = RULES.override(
        drop=[r"tokens|labels", r"output"],
        activations={
            r"tokens": "B@(dp,fsdp) S@cp",
            r"labels": "B@(dp,fsdp) S@tp",
            r"output": "B@(dp,fsdp) S@cp V@tp",
        },
    )
    return Case(rules=rules)


@wrong("SS307", "tok_embeddings.weight")
def a_tied_weight_used_inside_and_outside_sequence_parallelism():
    rules = RULES.override(
        drop=[BLOCKS, INPUTS, r"output"],
        params={r"tok_embeddings\.weight": "V@fsdp D", r"output\.weight": "V@fsdp D"},
        activations={
            r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?": SPLIT,
            r"layers\.\d+\.(attention|feed_forward):in": WHOLE,
            r"output": "B@(dp,fsdp) S@(cp,tp) V",
        },
    )
    return Case(model=llama(tied=True), rules=rules, loss=None)


@wrong("SS308", "its gradient is complete over cp")
def storage_over_an_axis_that_owes_nothing():
    rules = RULES.override(
        drop=[r"positions"],
        params={r"output\.weight": "V@(tp,cp) D"},
        activations={
            r"tokens|labels": "B@(dp,fsdp) S",
            BLOCKS: "B@(dp,fsdp) S@tp D",
            INPUTS: "B@(dp,fsdp) S D",
            r"output": "B@(dp,fsdp) S V@tp",
        },
    )
    return Case(rules=rules, mesh="cp=2,tp=2")


@wrong("SS308", "its gradient is complete over dp")
def replicas_that_read_the_same_rows_between_two_points():
    rules = RULES.override(activations={BLOCKS: "B@fsdp S@(cp,tp) D"})
    return Case(rules=rules, mesh="dp=2,fsdp=2")


# Context parallelism


@wrong("SS340", r"rope_(cos|sin)")
def rotary_angles_of_the_whole_sequence_for_a_part_of_it():
    return Case(mesh="cp=2")


@wrong("SS302", r"positions")
def position_ids_that_every_rank_holds_whole():
    return Case(mesh="cp=2", rules=RULES.override(activations={r"positions": "S"}), inputs=make_batch(positions=True))


@wrong("SS304", "attention")
def attention_over_a_part_of_the_sequence():
    """Split over tp, which no strategy reads."""
    heads = {rf"layers\.\d+\.attention\.w{name}\.weight": "X D" for name in "qkv"}
    rules = reader.RULES.override(
        params={**heads, r"layers\.\d+\.attention\.wo\.weight": "D X", r"slope": "H"},
        activations={r"head": "B@(dp,fsdp) S@(cp,tp) V", r"labels": "B@(dp,fsdp) S@(cp,tp)"},
    )
    rules = rules.override(drop=[r"tokens|labels|doc_ids"], activations={r"tokens": "B@(dp,fsdp) S@cp"})
    inputs = reader.make_batch(documents=False)
    return Case(mesh="tp=2", model=lambda: reader.build(reader.Shape()), rules=rules, inputs=inputs)


@wrong("SS342", "key-value heads")
def fewer_key_value_heads_than_ranks_that_exchange_them():
    return Case(mesh="cp=4,tp=2", inputs=make_batch(positions=True), policy=ss.Policy(attention="ulysses"))


@wrong("SS343", "head and tail")
def a_sequence_of_odd_parts_head_and_tail():
    policy = ss.Policy(attention="ring", balance=True)
    return Case(mesh="cp=4", inputs=make_batch(length=124, positions=True), policy=policy)


@wrong("SS341", "mask")
def a_mask_in_a_ring():
    model = lambda: reader.build(reader.Shape(kind="documents"))  # noqa: E731
    rules = reader.table("documents", "ring")
    return Case(mesh="cp=2", model=model, rules=rules, inputs=reader.make_batch(), policy=ss.Policy(attention="ring"))


@wrong("SS302", "rows of a mask")
def a_mask_of_all_rows_beside_a_part_of_the_queries():
    rules = reader.table("documents", "allgather").override(activations={r"rows": "B@(dp,fsdp) S", r"row_places": "S"})
    model = lambda: reader.build(reader.Shape(kind="documents"))  # noqa: E731
    return Case(mesh="cp=2", model=model, rules=rules, inputs=reader.make_batch())


@wrong("SS304 SS302", "cumsum")
def a_running_sum_over_a_split_sequence():
    return Case(model=with_parts(block=parts.CumulativeSum))


@wrong("SS304 SS302", "roll")
def tokens_shifted_along_a_split_sequence():
    return Case(model=with_parts(block=parts.ShiftedTokens))


@wrong("SS303", "")
def a_mean_over_a_split_sequence_taken_off():
    return Case(model=with_parts(block=parts.MeanOfTheSequenceTakenOff))


@wrong("SS309", "parts.py")
def a_division_by_a_split_sequence():
    return Case(model=with_parts(block=parts.DividedByTheSequence))


@wrong("SS304", "")
def the_last_token_of_a_split_sequence():
    return Case(model=with_parts(block=parts.LastTokenOnly))


@wrong("SS302 SS309", "parts.py")
def positions_counted_from_a_local_length():
    rules = RULES.override(
        drop=[BLOCKS, INPUTS],
        activations={BLOCKS: SPLIT, r"layers\.\d+\.feed_forward:in|output:in": WHOLE},
    )
    return Case(model=with_parts(attention=parts.OwnPositions), rules=rules)


@wrong("SS340", "arange")
def position_ids_counted_from_the_tokens_at_hand():
    return Case(model=with_parts(model=parts.CountsPositions), mesh="cp=2")


@wrong("SS302 SS309", "parts.py")
def rows_numbered_on_each_rank():
    return Case(model=with_parts(model=parts.RowsAsConstants))


@wrong("SS303", "")
def a_mean_over_the_batch_taken_off():
    return Case(model=with_parts(block=parts.MeanOfTheBatchTakenOff))


@wrong("SS309", "parts.py")
def a_division_by_the_batch():
    return Case(model=with_parts(block=parts.DividedByTheBatch))


# Models that only work whole


@wrong("SS309", "view(B, S, 8, -1)")
def a_head_count_in_a_view():
    return Case(model=with_parts(attention=parts.HeadCountInView))


@wrong("SS309", "self.n_heads")
def a_head_count_in_an_attribute():
    return Case(model=with_parts(attention=parts.HeadCountInAttribute))


@wrong("SS309", "o_BSHd.reshape(B, S, 128)")
def a_width_in_a_reshape():
    return Case(model=with_parts(attention=parts.WidthWrittenIn))


@wrong("SS304", "rms_norm needs the whole")
def a_norm_over_all_heads():
    model = with_parts(attention=parts.NormOverAllHeads)
    return Case(model=model, rules=RULES.override(params={r"layers\.\d+\.attention\.q_norm\.weight": "(H@tp hd)"}))


@wrong("SS304", "rms_norm needs the whole of dim 2 of layers.0.attention.wq")
def a_norm_over_all_heads_with_a_whole_weight():
    model = with_parts(attention=parts.NormOverAllHeads)
    return Case(model=model, rules=RULES.override(params={r"layers\.\d+\.attention\.q_norm\.weight": "(H hd)"}))


@wrong("SS302", r"attention\.scale")
def a_scale_a_head_that_is_not_split():
    model = with_parts(attention=parts.ScaleOfEachHead)
    return Case(model=model, rules=RULES.override(params={r"layers\.\d+\.attention\.scale": "H"}))


@wrong("SS303", "o_BSHd.mean(2, keepdim=True)")
def a_mean_over_split_heads():
    return Case(model=with_parts(attention=parts.MeanOverHeads))


@wrong("SS304", "softmax")
def a_softmax_over_split_heads():
    return Case(model=with_parts(attention=parts.SoftmaxOverHeads))


@wrong("SS304", "o_BSHd[:, :, :1]")
def one_head_of_split_heads():
    return Case(model=with_parts(attention=parts.FirstHeadOnly))


@wrong("SS314", "q[..., :2].mul_(0.5)")
def a_write_through_a_view():
    return Case(model=with_parts(attention=parts.WritesThroughAView))


@wrong("SS314", "x_BSD.mul_(0.5)")
def a_write_to_a_blocks_input():
    return Case(model=with_parts(block=parts.WritesToItsInput))


@wrong("SS314", "clamp_")
def a_write_to_a_parameter():
    return Case(model=with_parts(feed_forward=parts.ClampsItsWeight))


@wrong("SS314", "clamp_")
def a_write_to_the_data_of_a_parameter():
    return Case(model=with_parts(feed_forward=parts.ClampsTheDataOfItsWeight), mesh="fsdp=2")


@wrong("SS303", r"attention\.bias")
def a_bias_counted_once_a_rank():
    model = with_parts(attention=parts.BiasAfterTheHeads)
    return Case(model=model, rules=RULES.override(params={r"layers\.\d+\.attention\.bias": "D@fsdp"}))


@wrong("SS302 SS303", r"attention\.bias")
def a_bias_split_over_the_summed_axis():
    model = with_parts(attention=parts.BiasAfterTheHeads)
    return Case(model=model, rules=RULES.override(params={r"layers\.\d+\.attention\.bias": "D@tp"}))


@wrong("SS303 SS312", "parts.py")
def dropout_of_a_share():
    return Case(model=with_parts(attention=parts.DropoutAfterTheHeads))


@wrong("SS303", "torch.int8")
def a_share_rounded_to_integers():
    return Case(model=with_parts(attention=parts.CastOfAShare))


@wrong("SS309", "h_BSF.shape[-1]")
def a_division_by_a_split_width():
    return Case(model=with_parts(feed_forward=parts.DividedByItsWidth))


@wrong("SS309", "parts.py")
def a_branch_on_a_split_width():
    return Case(model=with_parts(feed_forward=parts.BranchOnWidth))


@wrong("SS309", "parts.py")
def a_loop_over_a_split_width():
    return Case(model=with_parts(feed_forward=parts.LoopOverWidth))


@wrong("SS304", "softmax needs the whole")
def a_softmax_over_a_split_width():
    return Case(model=with_parts(feed_forward=parts.SoftmaxOverWidth))


@wrong("SS303", "rsqrt")
def a_norm_by_hand_over_a_split_width():
    return Case(model=with_parts(feed_forward=parts.HandWrittenNormOverWidth))


@wrong("SS303", "both factors are pending")
def a_product_of_shares():
    return Case(model=with_parts(feed_forward=parts.ProductOfShares))


@wrong("SS303", "amax")
def the_largest_of_shares():
    return Case(model=with_parts(feed_forward=parts.LargestOfShares))


@wrong("SS303", "gelu")
def a_nonlinear_function_of_shares():
    return Case(model=with_parts(feed_forward=parts.ActivationAfterShares))


@wrong("SS303", "+ 1.0")
def a_constant_added_to_shares():
    return Case(model=with_parts(feed_forward=parts.ConstantAddedToShares))


@wrong("SS304", "topk")
def the_largest_of_a_split_width():
    return Case(model=with_parts(feed_forward=parts.LargestEntries))


@wrong("SS302", "mix")
def a_whole_matrix_for_a_split_width():
    model = with_parts(feed_forward=parts.MixedByADense)
    return Case(model=model, rules=RULES.override(params={r"layers\.\d+\.feed_forward\.mix\.weight": "F E"}))


@wrong("SS304", "chunk")
def halves_of_a_product_split_as_one():
    rules = WITHOUT_SP.override(
        drop=[r"layers\.\d+\.feed_forward\.w[13]\.weight"],
        params={r"layers\.\d+\.feed_forward\.w13\.weight": "G@(tp,fsdp) D"},
    )
    return Case(model=with_parts(feed_forward=parts.HalvesOfOneProduct), rules=rules)


@wrong("SS313", "parts.py")
def a_length_read_from_the_batch():
    return Case(model=with_parts(model=parts.ReadsALength))


@wrong("SS313", "parts.py")
def a_branch_on_a_token():
    return Case(model=with_parts(model=parts.BranchesOnAToken))


@wrong("SS305 SS313 SS402", "parts.py")
def rows_picked_by_a_mask():
    return Case(model=with_parts(model=parts.DropsPadding))


@wrong("SS304", "argmax")
def the_likeliest_token_of_a_split_vocabulary():
    return Case(model=with_parts(model=parts.PicksTheLikeliest))


@wrong("SS303", "mean")
def logits_centered_over_a_split_vocabulary():
    return Case(model=with_parts(model=parts.CentersItsLogits))


@wrong("SS309", "a constant is 224.0 on a rank and 448.0 on the whole")
def a_constant_made_from_a_split_width():
    return Case(model=with_parts(feed_forward=parts.DividedByAConstant))


@wrong("SS309", "fill_value=224.0")
def a_filling_made_from_a_split_width():
    return Case(model=with_parts(feed_forward=parts.DividedByAFilling))


@wrong("SS309", "another value than on the whole")
def one_of_two_values_by_a_split_width():
    return Case(model=with_parts(feed_forward=parts.OneOfTwo))


@wrong("SS309", "layers.1")
def a_local_length_passed_to_the_second_block():
    return Case(model=with_parts(model=parts.PassesALength, block=parts.TakesALength))


@wrong("SS309", "layers.1.attention fails on a rank's local shapes")
def an_attribute_that_is_local_in_the_first_block_only():
    rules = RULES.override(attributes={r"layers\.0\.attention": {"n_heads": "H@tp", "n_kv_heads": "K@tp"}})
    return Case(model=with_parts(attention=parts.HeadCountInAttribute), rules=rules)


@wrong("SS315", "custom autograd function")
def a_backward_of_ones_own():
    return Case(model=with_parts(block=parts.OwnBackward))


@wrong("SS316", "the max over tp")
def a_gradient_through_a_maximum_over_a_split_vocabulary():
    rules = RULES.override(activations={r"top": "B@(dp,fsdp) S@cp 1"})
    return Case(model=with_parts(model=parts.ScaledByItsMaximum), rules=rules)


@wrong("SS317", "layers.*.attention_norm is passed more than once")
def a_norm_whose_uses_owe_differently():
    rules = WITHOUT_SP.override(
        drop=[INPUTS], activations={r"layers\.\d+\.attention_norm|layers\.\d+\.feed_forward:in|output:in": WHOLE}
    )
    return Case(model=with_parts(block=parts.NormUsedTwice), rules=rules)


@wrong("SS305", "scale_grad_by_freq=True")
def gradients_scaled_by_counts_in_the_batch():
    def change(model: torch.nn.Module) -> None:
        model.tok_embeddings.scale_grad_by_freq = True

    return Case(model=llama(change))


@wrong("SS314", "writes in place to layers.0.attention:in, and what it was made from is read again")
def a_write_to_a_gathered_copy():
    return Case(model=with_parts(block=parts.UsesItsNormAgain, attention=parts.WritesToItsNorm))


@wrong("SS216", "layers.0.attention_norm.weight is read in layers.0, outside its unit")
def a_parameter_read_outside_its_unit():
    rules = RULES.override(units=[r"layers\.\d+\.attention_norm"])
    return Case(model=with_parts(block=parts.HandWrittenNorm), rules=rules)


@wrong("SS103", "ss.P('tp', None)")
def a_tuple_for_a_spec():
    return Case(rules=RULES.override(params={r"output\.weight": ("tp", None)}))


@wrong("SS302", "labels")
def labels_whose_rows_lie_in_another_order():
    rules = RULES.override(
        drop=[r"tokens|labels"], activations={r"tokens": "B@(dp,fsdp) S@cp", r"labels": "B@(fsdp,dp) S@cp"}
    )
    return Case(rules=rules, mesh="dp=2,fsdp=2")


@wrong("SS301", "128")
def uneven_storage_along_the_second_dim():
    rules = RULES.override(params={r"output\.weight": "V@tp D@fsdp"})
    return Case(rules=rules, mesh="fsdp=3", inputs=make_batch(6))


# Losses


@wrong("SS304", "cross_entropy")
def torchs_loss_over_a_split_vocabulary():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"].flatten()
        return F.cross_entropy(output.flatten(0, 1), labels, reduction="sum"), (labels != -100).sum()

    return Case(loss=loss)


@wrong("SS311", "a mean over tokens")
def a_mean_over_tokens():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(output.flatten(0, 1), batch["labels"].flatten()), 1

    return Case(loss=loss, rules=WHOLE_VOCABULARY)


@wrong("SS310", "")
def a_loss_without_a_weight():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return ss.cross_entropy(output, batch["labels"])[0]

    return Case(loss=loss)


@wrong("SS310", "pending avg")
def a_mean_by_hand():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        picked = output.log_softmax(-1).gather(-1, batch["labels"][..., None])
        return -picked.mean(), torch.ones(())

    return Case(loss=loss, rules=WHOLE_VOCABULARY)


@wrong("SS310", "shape")
def a_loss_for_each_token():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        picked = output.log_softmax(-1).gather(-1, batch["labels"][..., None])
        return -picked, torch.ones(())

    return Case(loss=loss, rules=WHOLE_VOCABULARY)


@wrong("SS309 SS310", "")
def a_weight_counted_from_local_rows():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return ss.cross_entropy(output, batch["labels"])[0], batch["labels"].numel()

    return Case(loss=loss)


@wrong("SS303", "")
def a_ratio_of_sums():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, weight = ss.cross_entropy(output, batch["labels"])
        return total / weight, weight

    return Case(loss=loss)


@wrong("SS304 SS303", "logsumexp")
def a_penalty_on_the_normaliser_of_a_split_vocabulary():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, weight = ss.cross_entropy(output, batch["labels"])
        return total + 1e-4 * output.logsumexp(-1).square().sum(), weight

    return Case(loss=loss)


@wrong("SS304 SS302", "gather")
def a_logit_picked_from_a_split_vocabulary():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        picked = output.gather(-1, batch["labels"][..., None])
        return -picked.sum(), torch.ones(())

    return Case(loss=loss)


@wrong("SS304", "slice")
def labels_shifted_in_the_loss_over_a_split_sequence():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ss.cross_entropy(output[:, :-1], batch["labels"][:, 1:])

    return Case(loss=loss, rules=SPLIT_LABELS)


@wrong("SS402", "labels")
def labels_of_another_shape_than_the_logits():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ss.cross_entropy(output[:, :-1], batch["labels"])

    return Case(loss=loss)


@wrong("SS402", "target")
def a_batch_without_what_the_loss_reads():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ss.cross_entropy(output, batch["target"])

    return Case(loss=loss)


@wrong("SS401", "the batch has no entry tokens")
def a_batch_without_what_forward_needs():
    return Case(inputs={"labels": torch.zeros(8, 128, dtype=torch.long)}, loss=None)


# Packed projections


def packed(kind: type[fused.FusedAttention] = fused.FusedAttention, weight: str = "", bias: str = "", **change: Any):
    """The fused Llama under its table with other rules for the packed product of queries, keys and values."""
    names = {r"layers\.\d+\.attention\.wqkv\.weight": weight, r"layers\.\d+\.attention\.wqkv\.bias": bias}
    rules = fused.RULES.override(params={name: spec for name, spec in names.items() if spec}, **change)
    return Case(model=lambda: fused.build(kind), rules=rules, inputs=make_batch(8, 16))


@wrong("SS304", "(H@tp hd + N_@tp hd + N_@tp hd)@fsdp")
def a_packed_projection_split_as_one_run():
    return packed(weight="N@(tp,fsdp) D", bias="N@(tp,fsdp)")


@wrong("SS304", "each rank holds (4@tp + 12@tp + 4@tp)")
def parts_of_a_packed_projection_in_another_order():
    return packed(weight="(K@tp hd + H@tp hd + K@tp hd)@fsdp D", bias="(K@tp hd + H@tp hd + K@tp hd)@fsdp")


@wrong("SS304", "slice takes 24 of 40")
def a_packed_projection_split_as_one_run_and_cut_by_slices():
    return packed(fused.SlicedAttention, weight="N@(tp,fsdp) D", bias="N@(tp,fsdp)")


@wrong("SS302", '"(H@tp hd + K@tp hd + K@tp hd)@fsdp" (was "N@tp")')
def the_bias_of_a_packed_projection_split_as_one_run():
    return packed(bias="N@tp")


@wrong("SS206", "48 and a multiple of 4 do not make up the 40")
def a_direct_sum_that_is_longer_than_its_dim():
    return packed(weight="(H@tp hd + H@tp hd + K@tp hd)@fsdp D")


@wrong("SS103", "'H@tp hd' over tp, 'K hd' at column 12 over nothing")
def a_direct_sum_of_which_one_part_is_split():
    return packed(weight="(H@tp hd + K hd + K hd)@fsdp D")


@wrong("SS207", "cp splits a direct sum whose parts are split over tp")
def a_direct_sum_that_is_split_as_a_whole_too():
    return packed(activations={r"layers\.\d+\.attention\.wqkv": "B@(dp,fsdp) S (H@tp hd + K@tp hd + K@tp hd)@cp"})


@wrong("SS215", 'give sizes={"H": ...}')
def a_direct_sum_of_which_nothing_tells_a_size():
    unnamed = {r"layers\.\d+\.attention\.wo\.weight": "D@fsdp O@tp"}
    case = packed(attributes={r"layers\.\d+\.attention": {"head_dim": "hd"}})
    return attrs.evolve(case, rules=case.rules.override(params=unnamed))


@wrong("SS301", "cannot be split over tp=4")
def a_part_of_a_direct_sum_that_does_not_divide():
    case = packed(attributes={r"layers\.\d+\.attention": {"head_dim": "hd"}}, sizes={"H": 6, "K": 2})
    return attrs.evolve(case, mesh="tp=4")


@wrong("SS309", r'{"n_heads": "H@tp", "n_kv_heads": "K@tp"}')
def head_counts_of_a_packed_projection_that_stay_whole():
    return packed(attributes={r"layers\.\d+\.attention": {"head_dim": "hd"}})


@wrong("SS309", "split_sizes=[24, 8, 8]")
def parts_of_a_packed_projection_written_down():
    return packed(fused.WrittenAttention)


@wrong("SS301", "cuts through a direct sum over tp=2")
def a_direct_sum_flattened_behind_the_sequence():
    return packed(fused.FlattenedAttention)


WHOLE_VOCABULARY = RULES.override(
    params={r"output\.weight": "V@fsdp D"},
    activations={r"output": WHOLE.replace("D", "V"), INPUTS: WHOLE},
)

SPLIT_LABELS = WHOLE_VOCABULARY.override(
    drop=[r"tokens|labels", INPUTS],
    activations={
        r"tokens": "B@(dp,fsdp) S@cp",
        r"labels": "B@(dp,fsdp) S@(cp,tp)",
        r"layers\.\d+\.(attention|feed_forward):in": WHOLE,
        r"output": "B@(dp,fsdp) S@(cp,tp) V",
    },
)
