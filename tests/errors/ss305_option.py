"""An option of an embedding that no rule knows."""

from tests.gallery.case import Case, llama


def change(model):
    model.tok_embeddings.scale_grad_by_freq = True


def trigger():
    Case(model=llama(change)).compile()
