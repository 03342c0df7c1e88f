"""Counting baselines against a transcription with dictionaries; D_order and the induction split on built models."""
import json
import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from data import Batch, Blocks
from plumbing import checkpoint, diagnose
from plumbing.cli import UserError
from plumbing.diagnose import Config, counting, order_gain, permuted, repeated, token_losses, validation
from plumbing.tokens import TokenDirectory


@pytest.fixture(scope="module")
def directory(corpus):
    return TokenDirectory(corpus)


@pytest.fixture(scope="module")
def batch(directory):
    return validation(Blocks(directory, "val", 32, seed=0), 16)


def transcribed(directory, batch):
    """{name: losses}, word by word."""
    ids, V, special = directory.split("train").tolist(), len(directory.vocab), directory.special
    after = defaultdict(Counter)
    for a, word in zip(ids, ids[1:], strict=False):
        if word != special["[SEP]"]:
            after[a][word] += 1
    seen = Counter(ids)
    seen[special["[SEP]"]] = 0
    unigram = [(seen[w] + 1) / (sum(seen.values()) + V) for w in range(V)]
    losses = defaultdict(list)
    for row, masked, labels in zip(*(x.tolist() for x in batch), strict=True):
        row = [None if w == special["[MASK]"] or i in (0, len(row) - 1) else w for i, w in enumerate(row)]
        for at, label in zip(masked, labels, strict=True):
            left, stands = row[at - 1:at + 1]
            total, types = sum(after[left].values()), len(after[left])          # no word stands after None
            bigram = [(after[left][w] + types * unigram[w]) / (total + types) for w in range(V)] if types else unigram
            for name, q in (("unigram", unigram), ("bigram", bigram)):
                assert math.isclose(sum(q), 1)
                if stands is not None:
                    posterior = [x * ((w == stands) + 1 / (V - 5)) for w, x in enumerate(q)]
                    q = [x / sum(posterior) for x in posterior]
                losses[name].append(-math.log(q[label]))
    return losses


def test_counting_against_a_transcription(directory, batch):
    losses, expected = counting(directory, batch), transcribed(directory, batch)
    assert list(losses) == ["unigram", "bigram"]
    for name, values in losses.items():
        assert values.shape == batch.masked.shape
        np.testing.assert_allclose(values.ravel(), expected[name], rtol=1e-9, atol=1e-12)
    assert losses["unigram"].mean() > losses["bigram"].mean() + 1


def test_counting_in_pieces_counts_the_same(directory, batch, monkeypatch):
    whole = counting(directory, batch)
    monkeypatch.setattr(diagnose, "SCAN", 777)
    again = counting(directory, batch)
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_a_masked_neighbour_and_the_blocks_beginning_tell_nothing(directory, batch):
    losses = counting(directory, batch._replace(ids=np.full_like(batch.ids, directory.special["[MASK]"])))
    np.testing.assert_allclose(losses["bigram"], losses["unigram"])
    ends = batch._replace(masked=np.tile([1, batch.ids.shape[1] - 2], (len(batch.ids), 1)), labels=batch.labels[:, :2])
    losses = counting(directory, ends)
    assert np.array_equal(losses["bigram"][:, 0], losses["unigram"][:, 0])
    assert not np.array_equal(losses["bigram"][:, 1], losses["unigram"][:, 1])


def test_permuted_moves_what_is_unmasked_and_nothing_else(directory, batch):
    special, ids = directory.special, permuted(batch, directory.special).ids
    stays = np.isin(batch.ids, [special["[CLS]"], special["[SEP]"]])
    assert stays[:, 1:-1].any()                                         # a document ends inside a block
    np.put_along_axis(stays, batch.masked, True, 1)
    assert np.array_equal(ids[stays], batch.ids[stays]) and np.array_equal(np.sort(ids), np.sort(batch.ids))
    assert (ids != batch.ids)[~stays].mean() > 0.8
    one = permuted(Batch(*(a[3:4] for a in batch)), special)
    assert np.array_equal(one.ids[0], ids[3])                           # whatever else is in the batch
    same = np.arange(batch.ids.shape[1])[None].repeat(2, 0) + 100       # two blocks that differ in one token
    same[1, 5] = 99
    two = permuted(Batch(same, batch.masked[[0, 0]], batch.labels[:2]), special).ids
    assert (two[0] != two[1]).mean() > 0.5


def test_d_order_is_zero_for_a_bag_of_words_and_positive_for_order(directory, batch):
    V = len(directory.vocab)
    E = torch.randn(V, 16, generator=torch.Generator().manual_seed(0))

    def bag_of_words(ids, masked):
        return (E[ids].mean(1) @ E.T).repeat_interleave(masked.shape[1], 0)

    def copies_left(ids, masked):
        return 5.0 * torch.nn.functional.one_hot(ids.gather(1, masked - 1).flatten(), V)
    assert token_losses(bag_of_words, batch).std() > 0.1
    assert order_gain(bag_of_words, batch, directory.special) == pytest.approx(0, abs=1e-5)
    twice = batch._replace(labels=np.take_along_axis(batch.ids, batch.masked - 1, 1))   # each says what is left of it
    d = order_gain(copies_left, twice, directory.special)
    assert d > 3
    assert d == order_gain(copies_left, twice, directory.special, token_losses(copies_left, twice).mean())


def test_repeated_looks_at_unmasked_positions_only(batch):
    expected = [[label in [w for i, w in enumerate(row) if i not in masked] for label in labels]
                for row, masked, labels in zip(*(x.tolist() for x in batch), strict=True)]
    assert np.array_equal(repeated(batch), expected) and 0 < np.mean(expected) < 1
    kept = np.array([[1, 7, 8, 9, 2]]), np.array([[1, 2]]), np.array([[7, 9]])          # 7 stands where it is masked
    assert repeated(Batch(*kept)).tolist() == [[False, True]]


def test_script_prints_the_loss_that_training_validated_with(corpus, directory, teacher, tmp_path, capsys):
    model, tokenizer = checkpoint.load_mlm(teacher).model, directory.read_tokenizer()
    model.config.hidden_dropout_prob = 0.5                              # no dropout where a loss is measured
    checkpoint.save_model(tmp_path / "model", model, tokenizer)
    checkpoint.save_model(tmp_path / "headless", model, tokenizer, head=False)
    config = Config([str(corpus)], str(tmp_path / "model"), seq_len=32, val_blocks=8)
    diagnose.main(config)
    lines = capsys.readouterr().out.splitlines()
    value = json.loads((teacher.parent / "summary.json").read_text())["val"]["mlm"]
    assert [line.split()[0] for line in lines[2:5]] == ["unigram", "bigram", "model"]
    assert float(lines[4].split()[1]) == pytest.approx(value, abs=6e-4)
    assert "D_order" in lines[5] and "no attention structure" in lines[5]
    beaten = [line.split()[0] for line in lines[2:4] if float(line.split()[1]) > value]
    assert (f"better than {' and '.join(beaten)}, " if beaten else "worse than counting, ") in lines[5]
    with pytest.raises(UserError, match="--seq-len 600"):
        diagnose.main(replace(config, seq_len=600))
    with pytest.raises(UserError, match="no LM head"):
        diagnose.main(replace(config, model=str(tmp_path / "headless")))
