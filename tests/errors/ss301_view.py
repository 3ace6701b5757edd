"""A view that cuts inside a rank's part."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(
        params={
            r"layers\.\d+\.attention\.w[kv]\.weight": "KV@(tp,fsdp) D",
            r"layers\.\d+\.attention\.wq\.weight": "Q@(tp,fsdp) D",
            r"layers\.\d+\.attention\.wo\.weight": "D@fsdp Q@tp",
        }
    )
    Case(mesh="tp=8", rules=rules).compile()
