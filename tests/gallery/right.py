"""Right tables and models, none of which may be refused."""

import functools
from collections.abc import Callable

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

WHOLE_VOCABULARY = WITHOUT_SP.override(
    params={r"output\.weight": "V@fsdp D"},
    activations={r"output": "B@(dp,fsdp) S@cp V"},
)


@attrs.frozen
class Variant:
    """A case that passes."""

    make: Callable[[], Case]

    def __str__(self) -> str:
        return self.make.__name__


VARIANTS: list[Variant] = []


def right(make: Callable[[], Case]) -> Callable[[], Case]:
    """List the decorated function as a variant."""
    VARIANTS.append(Variant(make))
    return make


# Meshes


@right
def sequence_parallel():
    return Case()


@right
def without_sequence_parallelism():
    return Case(rules=WITHOUT_SP)


@right
def tensor_parallel_alone():
    return Case(mesh="tp=4")


@right
def replicas_of_shards():
    return Case(mesh="dp=2,fsdp=2,tp=2")


@right
def data_parallel_alone():
    return Case(mesh="dp=4")


@right
def one_rank():
    return Case(mesh="")


@right
def storage_that_does_not_divide():
    return Case(mesh="fsdp=3", inputs=make_batch(6))


# The same table written otherwise


@right
def entries_in_another_order():
    rules = ss.Rules(
        params={rule.pattern: rule.value for rule in reversed(RULES.params)},
        activations={rule.pattern: rule.value for rule in reversed(RULES.activations)},
        units=tuple(reversed(RULES.units)),
    )
    return Case(rules=rules)


@right
def factors_of_other_names():
    def renamed(spec: str) -> str:
        for old, new in (("V", "vocab"), ("D", "width"), ("F", "hidden"), ("H", "heads"), ("K", "groups")):
            spec = " ".join(part.replace(old, new) for part in spec.split(" "))
        return spec

    rules = ss.Rules(
        params={rule.pattern: renamed(rule.value) for rule in RULES.params},
        activations={rule.pattern: renamed(rule.value) for rule in RULES.activations},
    )
    return Case(rules=rules)


@right
def specs_without_names():
    rules = WITHOUT_SP.override(
        params={
            r"tok_embeddings\.weight": ss.P(("tp", "fsdp"), None),
            r"output\.weight": ss.P(("tp", "fsdp")),
            r"layers\.\d+\.feed_forward\.w2\.weight": ss.P("fsdp", "tp"),
            r"rope_(cos|sin)": ss.P(),
        },
        activations={
            BLOCKS: ss.P(("dp", "fsdp"), "cp"),
            r"tokens|labels": ss.P(("dp", "fsdp"), "cp"),
            INPUTS: ss.P(("dp", "fsdp")),
        },
    )
    return Case(rules=rules)


@right
def a_rule_for_each_matrix():
    rules = RULES.override(
        drop=[r"layers\.\d+\.attention\.w[kv]\.weight", r"layers\.\d+\.feed_forward\.w[13]\.weight"],
        params={
            r"layers\.\d+\.attention\.wk\.weight": "(K@tp hd)@fsdp D",
            r"layers\.\d+\.attention\.wv\.weight": "(K@tp hd)@fsdp D",
            r"layers\.\d+\.feed_forward\.w1\.weight": "F@(tp,fsdp) D",
            r"layers\.\d+\.feed_forward\.w3\.weight": "F@(tp,fsdp) D",
        },
    )
    return Case(rules=rules)


@right
def dots_for_the_dims_between():
    return Case(rules=RULES.override(activations={r"output": "B@(dp,fsdp) ... V@tp"}), mesh="fsdp=2,tp=4")


@right
def sizes_that_are_given():
    return Case(rules=RULES.override(sizes={"hd": 16, "H": 8}))


@right
def storage_on_the_other_dim():
    rules = RULES.override(
        params={
            r"layers\.\d+\.attention\.wq\.weight": "(H@tp hd) D@fsdp",
            r"layers\.\d+\.feed_forward\.w[13]\.weight": "F@tp D@fsdp",
            r"layers\.\d+\.feed_forward\.w2\.weight": "D F@(tp,fsdp)",
        }
    )
    return Case(rules=rules)


# Units


@right
def everything_in_the_root_unit():
    return Case(rules=RULES.override(units=[]))


@right
def a_unit_for_each_half_of_a_block():
    return Case(rules=RULES.override(units=[r"layers\.\d+\.(attention|feed_forward)", ("norm", "output")]))


@right
def every_layer_in_one_unit():
    return Case(rules=RULES.override(units=[(r"layers\.\d+",), "output"]))


# Points elsewhere


@right
def points_behind_the_row_parallel_products():
    rules = WITHOUT_SP.override(
        drop=[BLOCKS], activations={r"tok_embeddings|layers\.\d+\.(attention\.wo|feed_forward\.w2)": WHOLE}
    )
    return Case(rules=rules)


@right
def points_behind_the_norms():
    rules = RULES.override(drop=[INPUTS], activations={r"layers\.\d+\.(attention|ffn)_norm|norm": WHOLE})
    return Case(rules=rules)


@right
def points_in_front_of_the_norms():
    rules = RULES.override(drop=[INPUTS], activations={r"layers\.\d+\.(attention|ffn)_norm:in|norm:in": WHOLE})
    return Case(rules=rules)


@right
def one_sum_for_attention_and_feed_forward():
    rules = WITHOUT_SP.override(
        drop=[BLOCKS, INPUTS],
        activations={r"tok_embeddings|layers\.\d+\.both|layers\.\d+\.attention_norm|output:in": WHOLE},
    )
    return Case(model=with_parts(block=parts.ParallelBlock), rules=rules)


@right
def the_last_gradient_completed_where_the_norm_begins():
    """No rule at `output:in`: what the split vocabulary owes passes the norm and is summed at the last block."""
    rules = WITHOUT_SP.override(drop=[INPUTS], activations={r"layers\.\d+\.(attention|feed_forward):in": WHOLE})
    return Case(rules=rules)


@right
def a_point_at_the_queries():
    rules = RULES.override(activations={r"layers\.\d+\.attention\.q": "B@(dp,fsdp) S@cp H@tp hd"})
    return Case(model=with_parts(attention=parts.NamedHeads), rules=rules)


@right
def queries_that_are_gathered_and_split_again():
    rules = RULES.override(
        params={r"layers\.\d+\.attention\.wq\.weight": "(H hd)@fsdp D"},
        activations={
            r"layers\.\d+\.attention\.q": "B@(dp,fsdp) S@cp H@tp hd",
            r"layers\.\d+\.attention\.w[kv]:in": WHOLE,
        },
    )
    return Case(model=with_parts(attention=parts.NamedHeads), rules=rules)


@right
def only_layers_declared():
    """Replicated over tp but for the feed-forward's hidden dim, whose sum is taken where a layer ends."""
    rules = ss.Rules(
        params={
            r"(tok_embeddings|output)\.weight": "V@fsdp D",
            r"layers\.\d+\.attention\.wq\.weight": "(H hd)@fsdp D",
            r"layers\.\d+\.attention\.w[kv]\.weight": "(K hd)@fsdp D",
            r"layers\.\d+\.attention\.wo\.weight": "D@fsdp (H hd)",
            r"layers\.\d+\.feed_forward\.w[13]\.weight": "F@fsdp D",
            r"layers\.\d+\.feed_forward\.w2\.weight": "D@fsdp F",
            r"(layers\.\d+\.\w+_norm|norm)\.weight": "D@fsdp",
            r"rope_(cos|sin)": "T hd",
        },
        activations={r"tokens|labels": "B@(dp,fsdp) S", r"layers\.\d+": "B@(dp,fsdp) S D"},
    )
    return Case(rules=rules, mesh="dp=2,fsdp=2")


# Other choices of what is split


@right
def a_whole_vocabulary():
    return Case(rules=WHOLE_VOCABULARY)


@right
def an_embedding_split_along_its_width():
    return Case(rules=RULES.override(params={r"tok_embeddings\.weight": "V@fsdp D@tp"}))


@right
def tp_on_the_feed_forward_only():
    rules = WHOLE_VOCABULARY.override(
        drop=[INPUTS],
        params={
            r"tok_embeddings\.weight": "V@fsdp D",
            r"layers\.\d+\.attention\.wq\.weight": "(H hd)@fsdp D",
            r"layers\.\d+\.attention\.w[kv]\.weight": "(K hd)@fsdp D",
            r"layers\.\d+\.attention\.wo\.weight": "D@fsdp (H hd)",
        },
        activations={r"layers\.\d+\.feed_forward:in": WHOLE},
    )
    return Case(rules=rules, mesh="tp=4")


@right
def tp_on_attention_only():
    rules = RULES.override(
        params={
            r"layers\.\d+\.feed_forward\.w[13]\.weight": "F@fsdp D",
            r"layers\.\d+\.feed_forward\.w2\.weight": "D@fsdp F",
        }
    )
    return Case(rules=rules)


@right
def everything_replicated():
    rules = ss.Rules(
        params={
            r"(tok_embeddings|output)\.weight": "V D",
            r"layers\.\d+\.attention\.w[qo]\.weight": "D D",
            r"layers\.\d+\.attention\.w[kv]\.weight": "K D",
            r"layers\.\d+\.feed_forward\.w[13]\.weight": "F D",
            r"layers\.\d+\.feed_forward\.w2\.weight": "D F",
            r"(layers\.\d+\.\w+_norm|norm)\.weight": "D",
            r"rope_(cos|sin)": "T hd",
        },
        activations={r"tokens|labels": "B@(dp,fsdp) S"},
    )
    return Case(rules=rules, mesh="dp=2,fsdp=2")


@right
def tied_weights():
    return Case(model=llama(tied=True))


@right
def as_many_key_heads_as_query_heads():
    return Case(model=llama(n_kv_heads=8), mesh="tp=8")


@right
def sequences_gathered_over_cp_for_attention():
    rules = WITHOUT_SP.override(
        drop=[INPUTS],
        activations={
            r"positions": "S",
            r"layers\.\d+\.attention:in": "B@(dp,fsdp) S D",
            r"layers\.\d+\.feed_forward:in|output:in": WHOLE,
        },
    )
    return Case(rules=rules, mesh="cp=2,tp=2", inputs=make_batch(positions=True))


@right
def storage_over_cp_too():
    rules = WITHOUT_SP.override(
        drop=[INPUTS],
        params={r"layers\.\d+\.feed_forward\.w2\.weight": "D@(fsdp,cp) F@tp"},
        activations={
            r"positions": "S",
            r"layers\.\d+\.attention:in": "B@(dp,fsdp) S D",
            r"layers\.\d+\.feed_forward:in|output:in": WHOLE,
        },
    )
    return Case(rules=rules, mesh="cp=2,tp=2", inputs=make_batch(positions=True))


# Other models


@right
def head_counts_named_as_attributes():
    rules = RULES.override(attributes={HEADS: {"n_heads": "H@tp", "n_kv_heads": "K@tp"}})
    return Case(model=with_parts(attention=parts.HeadCountInAttribute), rules=rules)


@right
def a_head_count_in_a_view_without_tp():
    return Case(model=with_parts(attention=parts.HeadCountInView), mesh="dp=2,fsdp=2")


@right
def gate_and_up_in_one_matrix():
    rules = RULES.override(
        drop=[r"layers\.\d+\.feed_forward\.w[13]\.weight"],
        params={r"layers\.\d+\.feed_forward\.w13\.weight": "(2 F@tp) D@fsdp"},
    )
    return Case(model=with_parts(feed_forward=parts.HalvesOfOneProduct), rules=rules)


@right
def gate_and_up_in_one_matrix_stored_in_slices():
    rules = RULES.override(
        drop=[r"layers\.\d+\.feed_forward\.w[13]\.weight"],
        params={r"layers\.\d+\.feed_forward\.w13\.weight": "(F@tp + F@tp)@fsdp D"},
    )
    return Case(model=with_parts(feed_forward=parts.HalvesOfOneProduct), rules=rules)


@right
def queries_keys_and_values_in_one_matrix():
    return Case(model=fused.build, rules=fused.RULES, inputs=make_batch(8, 16))


@right
def queries_keys_and_values_in_one_matrix_cut_by_slices():
    model = functools.partial(fused.build, fused.SlicedAttention)
    return Case(model=model, rules=fused.WITHOUT_SP, inputs=make_batch(8, 16))


@right
def queries_keys_and_values_in_one_matrix_cut_into_heads_first():
    model = functools.partial(fused.build, fused.HeadsAttention)
    return Case(model=model, rules=fused.RULES, inputs=make_batch(8, 16), mesh="dp=2,tp=2")


@right
def head_counts_of_a_packed_product_told_by_sizes():
    attributes = {r"layers\.\d+\.attention": {"n_heads": "x@tp", "n_kv_heads": "y@tp"}}
    rules = fused.RULES.override(attributes=attributes, sizes={"H": 6, "K": 2})
    return Case(model=fused.build, rules=rules, inputs=make_batch(8, 16))


@right
def lengths_of_the_parts_of_a_packed_product_named_as_attributes():
    named = {"wide": "(H@tp hd)", "narrow": "(K@tp hd)", "length": "(H@tp hd + K@tp hd + K@tp hd)"}
    rules = fused.RULES.override(attributes={r"layers\.\d+\.attention": named}, sizes={"K": 2})
    return Case(model=functools.partial(fused.build, fused.SizedAttention), rules=rules, inputs=make_batch(8, 16))


@right
def a_packed_product_gathered_and_cut_again():
    product = "B@(dp,fsdp) S@cp ({0} hd + {1} hd + {1} hd)"
    rules = fused.RULES.override(
        activations={
            r"layers\.\d+\.attention\.qkv": product.format("H", "K"),
            r"layers\.\d+\.attention\.again": product.format("H@tp", "K@tp"),
        }
    )
    model = functools.partial(fused.build, fused.NamedAttention)
    return Case(model=model, rules=rules, inputs=make_batch(8, 16))


@right
def norms_in_each_head():
    rules = RULES.override(params={r"layers\.\d+\.attention\.[qk]_norm\.weight": "hd"})
    return Case(model=with_parts(attention=parts.NormInEachHead), rules=rules)


@right
def a_scale_for_each_head():
    rules = RULES.override(params={r"layers\.\d+\.attention\.scale": "H@tp"})
    return Case(model=with_parts(attention=parts.ScaleOfEachHead), rules=rules)


@right
def a_bias_read_as_a_share():
    rules = RULES.override(params={r"layers\.\d+\.attention\.bias": "D +tp"})
    return Case(model=with_parts(attention=parts.BiasAfterTheHeads), rules=rules)


@right
def a_gain_on_what_is_still_to_be_summed():
    rules = RULES.override(params={r"layers\.\d+\.attention\.gain": "D"})
    return Case(model=with_parts(attention=parts.GainAfterTheHeads), rules=rules)


@right
def keys_repeated_by_hand():
    return Case(model=with_parts(attention=parts.RepeatedKeys))


@right
def attention_written_out():
    return Case(model=with_parts(attention=parts.Unscaled))


@right
def the_last_token_of_a_whole_sequence():
    return Case(model=with_parts(block=parts.LastTokenOnly), rules=WITHOUT_SP)


@right
def a_norm_written_out():
    return Case(model=with_parts(block=parts.HandWrittenNorm))


@right
def capped_logits():
    return Case(model=with_parts(model=parts.CapsItsLogits))


@right
def the_mean_of_a_split_sequence_at_a_point():
    rules = RULES.override(activations={r"layers\.\d+\.mean": "B@(dp,fsdp) 1 D"})
    return Case(model=with_parts(block=parts.NamedMean), rules=rules)


@right
def the_maximum_of_split_logits_without_a_gradient():
    rules = RULES.override(activations={r"top": "B@(dp,fsdp) S@cp 1"})
    return Case(model=with_parts(model=parts.ScaledByItsDetachedMaximum), rules=rules)


@right
def a_bias_expanded_over_the_batch():
    rules = RULES.override(params={r"layers\.\d+\.bias": "D@fsdp"})
    return Case(model=with_parts(block=parts.ExpandedBias), rules=rules)


@right
def a_norm_that_is_used_twice():
    return Case(model=with_parts(block=parts.NormUsedTwice))


@right
def a_model_that_reads_itself_without_a_gradient():
    return Case(model=with_parts(model=parts.ReadsItselfWithoutAGradient))


@right
def layers_that_run_twice():
    return Case(model=with_parts(model=parts.EveryLayerTwice))


@right
def a_first_layer_that_is_frozen():
    def freeze(model: torch.nn.Module) -> None:
        model.layers[0].requires_grad_(False)

    return Case(model=llama(freeze))


# Losses


@right
def a_sum_by_torchs_own_loss():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"].flatten()
        return F.cross_entropy(output.flatten(0, 1), labels, reduction="sum"), (labels != -100).sum()

    return Case(loss=loss, rules=WHOLE_VOCABULARY)


@right
def a_penalty_on_the_normaliser():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, weight = ss.cross_entropy(output, batch["labels"])
        return total + 1e-4 * output.logsumexp(-1).square().sum(), weight

    return Case(loss=loss, rules=WHOLE_VOCABULARY)


@right
def picked_logits_by_hand():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        counted = batch["labels"] != -100
        picked = output.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
        return -(picked * counted).sum(), counted.sum()

    return Case(loss=loss, rules=WHOLE_VOCABULARY)


@right
def a_constant_weight():
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return ss.cross_entropy(output, batch["labels"])[0], 1024

    return Case(loss=loss)


@right
def no_loss():
    return Case(loss=None)


@right
def gathered_keys_over_a_split_sequence():
    return Case(mesh="fsdp=2,cp=2,tp=2", inputs=make_batch(positions=True))


@right
def a_ring_over_a_split_sequence_of_odd_parts():
    return Case(mesh="cp=4", inputs=make_batch(length=124, positions=True), policy=ss.Policy(attention="ring"))


@right
def heads_exchanged_for_the_sequence():
    return Case(mesh="cp=2,tp=2", inputs=make_batch(positions=True), policy=ss.Policy(attention="ulysses"))


@right
def documents_over_a_split_sequence():
    model = lambda: reader.build(reader.Shape(kind="documents"))  # noqa: E731
    rules = reader.table("documents", "allgather")
    return Case(mesh="cp=2,tp=2", model=model, rules=rules, inputs=reader.make_batch())
