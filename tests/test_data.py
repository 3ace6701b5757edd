"""The corpus, its split, the sampler and the unigram entropy."""

import math

import numpy as np
import pytest
import torch

from models import data


@pytest.fixture(scope="module")
def corpus():
    return data.load_corpus()


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


def test_two_reads_of_the_library_give_the_same_bytes(corpus):
    again = data.load_corpus()
    assert np.array_equal(corpus.train, again.train)
    assert np.array_equal(corpus.validation, again.validation)


def test_the_library_gives_megabytes_and_about_a_tenth_is_held_out(corpus):
    total = len(corpus.train) + len(corpus.validation)
    assert 2e6 < total <= data.LIMIT
    assert 0.04 < len(corpus.validation) / total < 0.2


def test_every_file_is_on_one_side_of_the_split_and_none_is_lost(tmp_path):
    files = {f"pkg{i}/module.py": b"<%03d>" % i for i in range(200)}
    corpus = data.load_corpus(tree(tmp_path, files))
    sides = [part.tobytes().decode() for part in (corpus.train, corpus.validation)]
    found = [set(side.strip("<>").split("><")) for side in sides]
    assert not found[0] & found[1]
    assert found[0] | found[1] == {f"{i:03d}" for i in range(200)}


def test_tests_and_installed_packages_are_left_out(tmp_path):
    names = ["a.py", "pkg/b.py", "site-packages/c.py", "test/d.py", "pkg/tests/e.py", "_sysconfigdata_x.py"]
    assert data.source_names(tree(tmp_path, dict.fromkeys(names, b"x"))) == ["a.py", "pkg/b.py"]


def test_a_folder_without_source_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        data.load_corpus(tmp_path)


def test_a_batch_depends_on_seed_and_step_alone(corpus):
    def draw(seed, step):
        return data.train_batch(corpus.train, seed=seed, step=step, batch=4, seq=16)["tokens"]

    assert torch.equal(draw(0, 7), draw(0, 7))
    assert not torch.equal(draw(0, 7), draw(0, 8))
    assert not torch.equal(draw(0, 7), draw(1, 7))


def test_labels_are_the_next_bytes():
    text = np.arange(100, dtype=np.uint8)
    batch = data.train_batch(text, seed=0, step=0, batch=8, seq=5)
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
    assert batch["tokens"].shape == batch["labels"].shape == (8, 5)
    assert torch.equal(batch["labels"], batch["tokens"] + 1)


def test_a_window_may_start_at_the_first_and_end_at_the_last_byte():
    text = np.arange(6, dtype=np.uint8)
    batch = data.train_batch(text, seed=0, step=0, batch=64, seq=4)
    assert set(batch["tokens"][:, 0].tolist()) == {0, 1}
    first, last = data.validation_batches(text, count=2, batch=1, seq=4)
    assert (first["tokens"][0, 0], last["labels"][0, -1]) == (0, 5)


def test_entropy_of_two_equal_symbols_is_the_log_of_two():
    train = np.tile(np.array([65, 66], dtype=np.uint8), 10**6)
    assert data.entropy_unigram(train, train[:1000]) == pytest.approx(math.log(2), abs=1e-3)


def test_an_unseen_byte_costs_the_log_of_the_smoothed_total():
    train = np.zeros(44, dtype=np.uint8)
    assert data.entropy_unigram(train, np.array([1], dtype=np.uint8)) == pytest.approx(math.log(44 + 256))
