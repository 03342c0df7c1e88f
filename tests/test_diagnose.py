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
from plumbing.diagnose import Config, counting, d_order, permuted, repeated, token_losses, validation, where_it_stands
from plumbing.tokens import TokenDirectory


@pytest.fixture(scope="module")
def directory(corpus):
    return TokenDirectory(corpus)


@pytest.fixture(scope="module")
def batch(directory):
    return validation(Blocks(directory, "val", 32, seed=0), 16)


def transcribed(directory, batch):
    """{name: losses} with and without the token that stands there, word by word."""
    ids, V, special = directory.split("train").tolist(), len(directory.vocab), directory.special
    left, right, both = defaultdict(Counter), defaultdict(Counter), defaultdict(Counter)
    for a, word, b in zip(ids, ids[1:], ids[2:], strict=False):
        if word != special["[SEP]"]:
            left[a][word] += 1
            right[b][word] += 1
            both[a, b][word] += 1
    seen = Counter(ids)
    seen[special["[SEP]"]] = 0
    unigram = [(seen[w] + 1) / (sum(seen.values()) + V) for w in range(V)]

    def witten_bell(counts, lower):
        total, types = sum(counts.values()), len(counts)
        return [(counts[w] + types * lower[w]) / (total + types) for w in range(V)] if counts else lower

    own, context = defaultdict(list), defaultdict(list)
    for row, masked, labels in zip(*(x.tolist() for x in batch), strict=True):
        row = [None if w == special["[MASK]"] or i in (0, len(row) - 1) else w for i, w in enumerate(row)]
        for at, label in zip(masked, labels, strict=True):
            a, stands, b = row[at - 1:at + 2]
            p = dict(unigram=unigram, bigram=witten_bell(left[a], unigram))
            joint = [x * y / z for x, y, z in zip(p["bigram"], witten_bell(right[b], unigram), unigram, strict=True)]
            if a is not None and b is not None:
                joint = [x ** diagnose.EXPONENT for x in joint]
            p["neighbours"] = witten_bell(both[a, b], [x / sum(joint) for x in joint])
            for name, q in p.items():
                assert math.isclose(sum(q), 1)
                context[name].append(-math.log(q[label]))
                if stands is not None:
                    posterior = [x * ((w == stands) + 1 / (V - 5)) for w, x in enumerate(q)]
                    q = [x / sum(posterior) for x in posterior]
                own[name].append(-math.log(q[label]))
    return own, context


def test_counting_against_a_transcription(directory, batch):
    for losses, expected in zip(counting(directory, batch), transcribed(directory, batch), strict=True):
        assert list(losses) == ["unigram", "bigram", "neighbours"]
        for name, values in losses.items():
            assert values.shape == batch.masked.shape
            np.testing.assert_allclose(values.ravel(), expected[name], rtol=1e-9, atol=1e-12)
    means = [values.mean() for values in losses.values()]
    assert means[0] > means[1] + 1 and means[1] > means[2] + 0.2


def test_counting_in_pieces_counts_the_same(directory, batch, monkeypatch):
    whole = counting(directory, batch)
    monkeypatch.setattr(diagnose, "SCAN", 777)
    monkeypatch.setattr(diagnose, "CELLS", 5 * len(directory.vocab))
    for a, b in zip(whole, counting(directory, batch), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_masked_neighbour_and_the_blocks_ends_tell_nothing(directory, batch):
    alone = batch._replace(ids=np.full_like(batch.ids, directory.special["[MASK]"]))
    losses, context = counting(directory, alone)
    for name in ("bigram", "neighbours"):
        np.testing.assert_allclose(losses[name], losses["unigram"])
        np.testing.assert_allclose(losses[name], context[name])
    ends = batch._replace(masked=np.tile([1, batch.ids.shape[1] - 2], (len(batch.ids), 1)), labels=batch.labels[:, :2])
    context = counting(directory, ends)[1]
    assert np.array_equal(context["bigram"][:, 0], context["unigram"][:, 0])
    assert not np.array_equal(context["bigram"][:, 1], context["unigram"][:, 1])
    assert not np.array_equal(context["neighbours"][:, 0], context["unigram"][:, 0])


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
    assert d_order(bag_of_words, batch, directory.special) == pytest.approx(0, abs=1e-5)
    twice = batch._replace(labels=np.take_along_axis(batch.ids, batch.masked - 1, 1))   # each says what is left of it
    d = d_order(copies_left, twice, directory.special)
    assert d > 3
    assert d == d_order(copies_left, twice, directory.special, token_losses(copies_left, twice).mean())


def test_repeated_looks_at_unmasked_positions_only(batch):
    expected = [[label in [w for i, w in enumerate(row) if i not in masked] for label in labels]
                for row, masked, labels in zip(*(x.tolist() for x in batch), strict=True)]
    assert np.array_equal(repeated(batch), expected) and 0 < np.mean(expected) < 1
    kept = np.array([[1, 7, 8, 9, 2]]), np.array([[1, 2]]), np.array([[7, 9]])          # 7 stands where it is masked
    assert repeated(Batch(*kept)).tolist() == [[False, True]]


def test_where_it_stands():
    baselines = dict(unigram=6.4, bigram=5.0, neighbours=3.6)
    for loss, words in ((7, "worse than unigram"), (6.4, "worse than unigram"), (6, "between unigram and bigram"),
                        (4, "between bigram and neighbours"), (3, "better than neighbours")):
        assert where_it_stands(loss, baselines) == words
    assert where_it_stands(5.5, dict(baselines, bigram=6.8)) == "between unigram and neighbours"


def test_script_prints_the_loss_that_training_validated_with(corpus, directory, teacher, tmp_path, capsys):
    model, tokenizer = checkpoint.load_mlm(teacher).model, directory.read_tokenizer()
    model.config.hidden_dropout_prob = 0.5                              # no dropout where a loss is measured
    checkpoint.save_model(tmp_path / "model", model, tokenizer)
    checkpoint.save_model(tmp_path / "headless", model, tokenizer, head=False)
    config = Config([str(corpus)], str(tmp_path / "model"), seq_len=32, val_blocks=8)
    diagnose.main(config)
    lines = capsys.readouterr().out.splitlines()
    value = json.loads((teacher.parent / "summary.json").read_text())["val"]["mlm"]
    assert [line.split()[0] for line in lines[2:6]] == ["unigram", "bigram", "neighbours", "model"]
    assert float(lines[5].split()[1]) == pytest.approx(value, abs=6e-4)
    assert "D_order" in lines[6] and "no attention structure" in lines[6]
    with pytest.raises(UserError, match="--seq-len 600"):
        diagnose.main(replace(config, seq_len=600))
    with pytest.raises(UserError, match="no LM head"):
        diagnose.main(replace(config, model=str(tmp_path / "headless")))
