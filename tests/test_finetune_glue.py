"""Reading, batching and scoring a labelled task."""
import numpy as np
import pytest
import torch

import checkpoint
import finetune_glue as ft
from cli import UserError


def write(path, *rows):
    path.write_text("sentence\tlabel\n" + "".join(f"{row}\n" for row in rows), encoding="utf-8")


def test_a_tsv_is_split_at_tabs_and_newlines_alone(tmp_path):
    (tmp_path / "t.tsv").write_bytes(
        '\ufeffsentence\tlabel\r\nan "unbalanced quote\t1\r\nline\u2028separator\t0\n'.encode())
    sentences, labels = ft.read_tsv(tmp_path / "t.tsv")
    assert sentences == ['an "unbalanced quote', "line\u2028separator"] and labels.tolist() == [1, 0]


@pytest.mark.parametrize("row", ["no label", "a\tb\t1", "a\tx", "a\t-1"])
def test_a_bad_row_is_named(tmp_path, row):
    write(tmp_path / "t.tsv", "fine\t0", row)
    with pytest.raises(UserError, match="line 3"):
        ft.read_tsv(tmp_path / "t.tsv")


def test_a_missing_or_empty_file_is_named(tmp_path):
    write(tmp_path / "t.tsv")
    for name, message in (("t.tsv", "no examples"), ("u.tsv", "no such file")):
        with pytest.raises(UserError, match=message):
            ft.read_tsv(tmp_path / name)


def test_a_score_does_not_depend_on_the_evaluation_batch(teacher):
    model = checkpoint.load_classifier(teacher, 3, seed=0)
    rng = np.random.default_rng(0)
    examples = [rng.integers(5, 300, n) for n in rng.integers(3, 40, 50)]
    one, many = ft.predict(model, examples, 0, batch_size=1), ft.predict(model, examples, 0, batch_size=17)
    assert np.abs(one - many).max() < 1e-5


def test_every_example_is_used_once_an_epoch(teacher, monkeypatch):
    seen = []
    whole = ft.pad
    monkeypatch.setattr(ft, "pad", lambda examples, pad_id: seen.append(examples) or whole(examples, pad_id))
    examples = [np.full(3 + i % 7, 5 + i) for i in range(53)]
    ft.finetune(checkpoint.load_classifier(teacher, 2, 0), examples, np.arange(53) % 2, 8, 2, 1e-3, 0, 0)
    first, second = seen[:7], seen[7:]
    for epoch in (first, second):
        assert sorted(int(e[0]) for batch in epoch for e in batch) == list(range(5, 58))
    assert [e[0] for b in first for e in b] != [e[0] for b in second for e in b]


def test_a_task_that_can_be_learned_is_learned_and_seeds_repeat(teacher, tmp_path):
    tokenizer = checkpoint.read_tokenizer(teacher)
    tokens = [t for t in tokenizer.get_vocab() if t.isalpha() and len(t) > 2][:20]
    rng = np.random.default_rng(0)

    def rows(n):
        for _ in range(n):
            label = rng.integers(2)
            yield " ".join([*rng.choice(tokens[2:], 4), tokens[label]]) + f"\t{label}"
    write(tmp_path / "train.tsv", *rows(200))
    write(tmp_path / "dev.tsv", *rows(100))
    config = ft.Config(str(teacher), str(tmp_path), seeds=2, peak_lr=2e-3, batch_size=8, epochs=6, device="cpu",
                       save=str(tmp_path / "classifier"))
    result = ft.score(config, say=lambda line: None)
    assert result["mean"] > 90 > 70 > result["majority"] and result["n"] == 100 and len(result["scores"]) == 2
    assert ft.score(config, say=lambda line: None) == result
    saved = checkpoint.load_classifier(tmp_path / "classifier", 2, seed=7)              # its head is kept, not drawn
    examples = ft.encode(tokenizer, ft.read_tsv(tmp_path / "dev.tsv")[0], 128)
    found = 100 * (ft.predict(saved, examples, 0).argmax(-1) == ft.read_tsv(tmp_path / "dev.tsv")[1]).mean()
    assert found == pytest.approx(result["scores"][-1])


def test_the_head_follows_the_seed_and_the_encoder_does_not(teacher):
    a, b = (checkpoint.load_classifier(teacher, 2, seed) for seed in (0, 1))
    assert not torch.equal(a.classifier.weight, b.classifier.weight)
    assert torch.equal(a.bert.embeddings.word_embeddings.weight, b.bert.embeddings.word_embeddings.weight)
