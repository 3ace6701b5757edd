"""A table with just a row for each position, which lies whole."""

from torch import Tensor

from models.llama.model import Llama
from tests.gallery.case import Case, llama


class WithTheWholeTable(Llama):
    def forward(self, tokens: Tensor) -> Tensor:
        h_BSD = self.tok_embeddings(tokens)
        cos_S1d, sin_S1d = self.rope_cos.unsqueeze(1), self.rope_sin.unsqueeze(1)
        for layer in self.layers:
            h_BSD = layer(h_BSD, cos_S1d, sin_S1d)
        return self.output(self.norm(h_BSD))


def trigger():
    def change(model):
        model.__class__ = WithTheWholeTable

    rules = Case().rules.override(drop=["positions"])
    Case(model=llama(change, max_seq_len=128), rules=rules, mesh="cp=2").compile()
