"""The right tables that are edited: Llama and GPT-2, small, with sequence parallelism and without."""

from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor, nn

import shardspec as ss
from models import gpt2, llama
from models.gpt2.model import GPT2Config
from models.gpt2.rules import WITHOUT_SP as GPT2_WITHOUT_SP
from models.llama.model import LlamaConfig
from models.llama.rules import WITHOUT_SP as LLAMA_WITHOUT_SP

ROWS, SEQ, VOCABULARY = 8, 8, 40
MESHES = ("tp=2", "fsdp=2", "fsdp=2,tp=2", "dp=2,tp=2", "tp=4", "dp=2,fsdp=2")

# Square where Llama's own sizes are (32 = 8 heads of 4 = D): a swap of dims is not given away by a shape.
LLAMA = LlamaConfig(
    dim=32, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=4, ffn_dim=24, vocab_size=VOCABULARY, max_seq_len=16
)
GPT2 = GPT2Config(
    dim=32, n_layers=2, n_heads=8, head_dim=4, ffn_dim=48, vocab_size=VOCABULARY, max_seq_len=12, dropout=0.0
)

Override = Mapping[str, object]
"""The arguments of `Rules.override`."""


@attrs.frozen(eq=False, kw_only=True)
class Subject:
    """A model and a table that is right for it, with what is known to be right besides."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    rules: ss.Rules
    sp: bool
    tied: bool = False

    def make(self) -> nn.Module:
        """The model, with weights that carry gradients far above the tolerance, no two norms' entries alike."""
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(10)
                else:
                    parameter.uniform_(0.5, 1.5)
        return model

    def __str__(self) -> str:
        return self.name


def _subject(family: str, *, sp: bool, tied: bool = False) -> Subject:
    name = f"{family}, {'SP' if sp else 'no SP'}" + (", tied" if tied and family == "llama" else "")
    if family == "llama":
        rules = llama.RULES if sp else LLAMA_WITHOUT_SP
        return Subject(
            name=name,
            family=family,
            build=lambda: llama.build(attrs.evolve(LLAMA, tied=tied)),
            rules=rules,
            sp=sp,
            tied=tied,
        )
    rules = gpt2.RULES if sp else GPT2_WITHOUT_SP
    return Subject(name=name, family=family, build=lambda: gpt2.build(GPT2), rules=rules, sp=sp, tied=True)


SUBJECTS = (
    _subject("llama", sp=True),
    _subject("llama", sp=False),
    _subject("llama", sp=True, tied=True),
    _subject("gpt2", sp=True),
    _subject("gpt2", sp=False),
)


def make_batch(step: int) -> dict[str, Tensor]:
    """A global batch [8, 8] whose masked labels differ from row to row; the last row counts nothing."""
    generator = torch.Generator().manual_seed(500 + step)
    tokens, labels = (torch.randint(0, VOCABULARY, (ROWS, SEQ), generator=generator) for _ in range(2))
    masked = torch.rand(ROWS, SEQ, generator=generator) < torch.linspace(0, 1, ROWS)[:, None]
    return {"tokens": tokens, "labels": labels.masked_fill(masked, -100)}


BLOCKS = r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?"
INPUTS = r"layers\.\d+\.(attention|feed_forward):in|output:in"
WHOLE = "B@(dp,fsdp) S@cp D"
BETWEEN = {True: "B@(dp,fsdp) S@(cp,tp) D", False: WHOLE}
"""With sequence parallelism or not: what lies between blocks."""


def points(subject: Subject) -> list[str]:
    """Patterns of activations that the table may declare, right or wrong."""
    model = subject.build()
    first = {name for name, _ in model.named_modules() if name and ".1" not in name}
    escaped = [name.replace(".0", r".\d+").replace(".", r"\.").replace(r"\\.", r"\.") for name in sorted(first)]
    return [name + tail for name in escaped if name not in ("layers", "h") for tail in ("", ":in")]


def inert_points(subject: Subject) -> dict[str, str]:
    """Points that say what is there already."""
    between = BETWEEN[subject.sp]
    if subject.family == "llama":
        return {
            r"layers\.\d+\.attention_norm": between,
            r"layers\.\d+\.ffn_norm": between,
            r"layers\.\d+\.(attention|ffn)_norm:in": between,
            r"layers\.\d+:in": between,
            r"norm": between,
            r"norm:in": between,
            r"tok_embeddings:in": "B@(dp,fsdp) S@cp",
            r"layers\.\d+\.attention\.wq": "B@(dp,fsdp) S@cp (H@tp hd)",
            r"layers\.\d+\.attention\.w[kv]": "B@(dp,fsdp) S@cp (K@tp hd)",
            r"layers\.\d+\.attention\.wo:in": "B@(dp,fsdp) S@cp (H@tp hd)",
            r"layers\.\d+\.attention\.w[qkv]:in": WHOLE,
            r"layers\.\d+\.feed_forward\.w[13]": "B@(dp,fsdp) S@cp F@tp",
            r"layers\.\d+\.feed_forward\.w2:in": "B@(dp,fsdp) S@cp F@tp",
            r"layers\.\d+\.feed_forward\.w[13]:in": WHOLE,
            r"layers\.\d+\.attention\.wo": f"{WHOLE} +tp",
            r"layers\.\d+\.feed_forward\.w2": f"{WHOLE} +tp",
            r"layers\.\d+\.attention:in\.(cos|sin)_S1d": "S@cp 1 hd",
        }
    sequence = "S@(cp,tp)" if subject.sp else "S@cp"
    return {
        r"wte": between,
        r"wpe": f"{sequence} D",
        r"drop": between,
        r"drop:in": between,
        r"h\.\d+\.ln_[12]": between,
        r"h\.\d+\.ln_[12]:in": between,
        r"h\.\d+:in": between,
        r"ln_f": between,
        r"lm_head:in": between,
        r"h\.\d+\.attn\.c_attn": "B@(dp,fsdp) S@cp (3 H@tp hd)",
        r"h\.\d+\.attn\.c_proj:in": "B@(dp,fsdp) S@cp (H@tp hd)",
        r"h\.\d+\.mlp\.c_fc": "B@(dp,fsdp) S@cp F@tp",
        r"h\.\d+\.mlp\.c_proj:in": "B@(dp,fsdp) S@cp F@tp",
        r"h\.\d+\.attn\.resid_dropout": between,
        r"h\.\d+\.(attn|mlp)": between,
    }


def moves(subject: Subject) -> dict[str, Override]:
    """Layouts moved together with all their partners: other right tables for the same model.

    A head that scores its own part of the sequence owes a sum over tp; where its weight is tied, the embedding must
    owe the same, so it looks up its own part too: with the whole of the tokens the table is rightly refused.
    """
    return _llama_moves(subject) if subject.family == "llama" else _gpt2_moves(subject)


def _llama_moves(subject: Subject) -> dict[str, Override]:
    between = BETWEEN[subject.sp]
    norms = r"layers\.\d+\.(attention|ffn)_norm"
    halves = r"layers\.\d+\.(attention|feed_forward):in"
    embedding, head = r"tok_embeddings\.weight", r"output\.weight"
    found: dict[str, Override] = {
        "attention whole": {
            "params": {
                r"layers\.\d+\.attention\.wq\.weight": "(H hd)@fsdp D",
                r"layers\.\d+\.attention\.w[kv]\.weight": "(K hd)@fsdp D",
                r"layers\.\d+\.attention\.wo\.weight": "D@fsdp (H hd)",
            }
        },
        "feed-forward whole": {
            "params": {
                r"layers\.\d+\.feed_forward\.w[13]\.weight": "F@fsdp D",
                r"layers\.\d+\.feed_forward\.w2\.weight": "D@fsdp F",
            }
        },
        "vocabulary whole": {
            "params": {embedding: "V@fsdp D", head: "V@fsdp D"},
            "activations": {"output": "B@(dp,fsdp) S@cp V"},
        },
        "points behind the row-parallel products": {
            "drop": [BLOCKS],
            "activations": {r"tok_embeddings|layers\.\d+(\.attention\.wo|\.feed_forward\.w2)?": between},
        },
        "no point at a block's end": {
            "drop": [BLOCKS],
            "activations": {r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)": between},
        },
        "points behind the norms": {"drop": [INPUTS], "activations": {norms + "|norm": WHOLE}},
        "points in front of the norms": {"drop": [INPUTS], "activations": {norms + ":in|norm:in": WHOLE}},
        "columns of the embedding and the head": {
            "drop": [INPUTS],
            "params": {embedding: "V@fsdp D@tp", head: "V@fsdp D@tp"},
            "activations": {halves: WHOLE, "output:in": "B@(dp,fsdp) S@cp D@tp", "output": "B@(dp,fsdp) S@cp V"},
        },
    }
    if not subject.tied:
        found |= {
            "embedding whole": {"params": {embedding: "V@fsdp D"}},
            "columns of the embedding": {"params": {embedding: "V@fsdp D@tp"}},
            "head whole": {"params": {head: "V@fsdp D"}, "activations": {"output": "B@(dp,fsdp) S@cp V"}},
        }
    if subject.sp:
        found["the head on its part of the sequence"] = {
            "drop": [r"tokens|labels", INPUTS],
            "params": {embedding: "V@fsdp D", head: "V@fsdp D"},
            "activations": {
                "tokens": "B@(dp,fsdp) S@cp",
                "labels": "B@(dp,fsdp) S@(cp,tp)",
                halves: WHOLE,
                "output": "B@(dp,fsdp) S@(cp,tp) V",
                **({"tok_embeddings:in": "B@(dp,fsdp) S@(cp,tp)"} if subject.tied else {}),
            },
        }
    else:
        inside = r"layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13]):in|output:in"
        found["points at the projections"] = {"drop": [INPUTS], "activations": {inside: WHOLE}}
        found["no point before the head"] = {"drop": [INPUTS], "activations": {halves: WHOLE}}
    return found


def _gpt2_moves(subject: Subject) -> dict[str, Override]:
    between = BETWEEN[subject.sp]
    sequence = "S@(cp,tp)" if subject.sp else "S@cp"
    biases, sums = r"h\.\d+\.(attn|mlp)\.c_proj\.bias", r"h\.\d+(\.(attn|mlp)\.c_proj)?"
    inputs, tables = r"h\.\d+\.(attn|mlp):in", r"wte\.weight|lm_head\.weight"
    attention, feed_forward = r"h\.\d+\.attn\.c_proj\.bias", r"h\.\d+\.mlp\.c_proj\.bias"
    return {
        "attention whole": {
            "drop": [biases],
            "params": {
                r"h\.\d+\.attn\.c_attn\.weight": "(3 H hd) D@fsdp",
                r"h\.\d+\.attn\.c_attn\.bias": "(3 H hd)",
                r"h\.\d+\.attn\.c_proj\.weight": "D@fsdp (H hd)",
                attention: "D@fsdp",
                feed_forward: "D@fsdp +tp",
            },
        },
        "feed-forward whole": {
            "drop": [biases],
            "params": {
                r"h\.\d+\.mlp\.c_fc\.weight": "F@fsdp D",
                r"h\.\d+\.mlp\.c_fc\.bias": "F@fsdp",
                r"h\.\d+\.mlp\.c_proj\.weight": "D@fsdp F",
                attention: "D@fsdp +tp",
                feed_forward: "D@fsdp",
            },
        },
        "points behind attention and mlp's products alone": {
            "drop": [sums],
            "activations": {r"h\.\d+\.(attn|mlp)\.c_proj": between},
        },
        "points behind the norms": {"drop": [inputs], "activations": {r"h\.\d+\.ln_[12]": WHOLE}},
        "points in front of the norms": {"drop": [inputs], "activations": {r"h\.\d+\.ln_[12]:in": WHOLE}},
        "vocabulary split": {
            "drop": ["tokens", r"labels|wte:in"],
            "params": {tables: "V@(tp,fsdp) D"},
            "activations": {
                "tokens|labels": "B@(dp,fsdp) S@cp",
                "wte": between,
                "lm_head:in": WHOLE,
                "lm_head": "B@(dp,fsdp) S@cp V@tp",
            },
        },
        "columns of the embedding and the head": {
            "drop": [r"labels|wte:in"],
            "params": {tables: "V@fsdp D@tp"},
            "activations": {
                "labels": f"B@(dp,fsdp) {sequence}",
                "wte": between,
                "lm_head:in": "B@(dp,fsdp) S@cp D@tp",
                "lm_head": f"B@(dp,fsdp) {sequence} V",
            },
        },
        "positions declared behind their lookup": {"drop": ["wpe:in"], "activations": {"wpe": f"{sequence} D"}},
        "attention and feed-forward whole, vocabulary split": {
            "drop": [biases, "tokens", r"labels|wte:in"],
            "params": {
                r"h\.\d+\.attn\.c_attn\.weight": "(3 H hd) D@fsdp",
                r"h\.\d+\.attn\.c_attn\.bias": "(3 H hd)",
                r"h\.\d+\.attn\.c_proj\.weight": "D@fsdp (H hd)",
                r"h\.\d+\.mlp\.c_fc\.weight": "F@fsdp D",
                r"h\.\d+\.mlp\.c_fc\.bias": "F@fsdp",
                r"h\.\d+\.mlp\.c_proj\.weight": "D@fsdp F",
                r"h\.\d+\.(attn|mlp)\.c_proj\.bias": "D@fsdp",
                tables: "V@(tp,fsdp) D",
            },
            "activations": {
                "tokens|labels": "B@(dp,fsdp) S@cp",
                "wte": between,
                "lm_head:in": WHOLE,
                "lm_head": "B@(dp,fsdp) S@cp V@tp",
            },
        },
    }
