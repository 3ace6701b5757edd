"""Layers that add the embedding again, wherever they lie."""

from models.llama.model import Llama
from tests.gallery.case import Case, with_parts


class AddsTheEmbedding(Llama):
    """Every second layer reads what the first stage made."""

    def forward(self, tokens, positions=None):
        e_BSD = h_BSD = self.tok_embeddings(tokens)
        cos, sin = (table[: tokens.shape[1]].unsqueeze(1) for table in (self.rope_cos, self.rope_sin))
        for index, layer in enumerate(self.layers):
            h_BSD = layer(h_BSD, cos, sin)
            if index % 2:
                h_BSD = h_BSD + e_BSD
        return self.output(self.norm(h_BSD))


def trigger():
    Case(mesh="pp=4", model=with_parts(model=AddsTheEmbedding)).compile()
