"""Batches and masks: a pure function of (seed, step), with the statistics that BERT prescribes."""
import hashlib
import itertools
import json
import shutil
import threading

import numpy as np
import pytest
import torch

import data
from data import Blocks
from plumbing.cli import UserError
from plumbing.tokens import TokenDirectory


@pytest.fixture
def blocks(corpus):
    return Blocks(TokenDirectory(corpus), "train", 32, seed=3)


def test_a_batch_depends_on_seed_and_step_alone(corpus, blocks):
    again = Blocks(TokenDirectory(corpus), "train", 32, seed=3)
    later = again.batch(5, 8)                                           # in another order, after other batches
    again.batch(0, 8)
    for a, b in zip(blocks.batch(5, 8), later, strict=True):
        assert np.array_equal(a, b)
    other = Blocks(TokenDirectory(corpus), "train", 32, seed=4).batch(5, 8)
    assert not np.array_equal(other.ids, later.ids)


def test_blocks_are_full_and_every_epoch_holds_each_once_under_fresh_masks(blocks):
    size = blocks.count
    seen = []
    for epoch in range(2):
        ids, masked, labels = blocks.batch(epoch, size)
        assert (ids[:, 0] == blocks.special["[CLS]"]).all() and (ids[:, -1] == blocks.special["[SEP]"]).all()
        original = ids.copy()
        np.put_along_axis(original, masked, labels, 1)
        assert np.array_equal(np.sort(original[:, 1:-1].ravel()), np.sort(blocks.tokens[:size * 30]))
        seen.append({row.tobytes(): tuple(m) for row, m in zip(original, masked, strict=True)})
    common = seen[0].keys() & seen[1].keys()
    assert len(common) == size
    assert np.mean([seen[0][key] == seen[1][key] for key in common]) < 0.05


def test_a_batch_larger_than_the_corpus_spans_epochs(blocks):
    assert blocks.batch(0, 3 * blocks.count + 1).ids.shape[0] == 3 * blocks.count + 1


def test_masking_statistics(corpus, blocks):
    """k per block exactly; 80/10/10 of a million positions within 4 standard errors; special tokens never."""
    rng = np.random.default_rng(0)
    V, S = 1000, 128
    blocks.vocab_size, blocks.k = V, round(0.15 * S)
    special = sorted(blocks.special.values())
    counts, n, positions = np.zeros(3), 0, np.zeros(S)
    while n < 10 ** 6:
        ids = rng.integers(5, V, (4096, S))
        ids[:, 0], ids[:, -1] = blocks.special["[CLS]"], blocks.special["[SEP]"]
        ids[rng.random(ids.shape) < 0.05] = blocks.special["[SEP]"]
        original = ids.copy()
        new, masked, labels = blocks.mask(ids, rng.integers(0, 2 ** 63, 4096))
        assert masked.shape == (4096, 19) and (np.diff(masked, axis=1) > 0).all()
        assert np.array_equal(labels, np.take_along_axis(original, masked, 1)) and not np.isin(labels, special).any()
        untouched = np.ones_like(ids, bool)
        np.put_along_axis(untouched, masked, False, 1)
        assert np.array_equal(new[untouched], original[untouched])
        at = np.take_along_axis(new, masked, 1)
        is_mask, same = at == blocks.special["[MASK]"], at == labels
        assert not np.isin(at[~is_mask], special).any() and at.max() < V
        counts += [is_mask.sum(), (~is_mask & ~same).sum(), same.sum()]
        np.add.at(positions, masked.ravel(), 1)
        n += masked.size
    # a random token is the true one in 1 of V - 5 draws
    p = np.array([0.8, 0.1 * (1 - 1 / (V - 5)), 0.1 + 0.1 / (V - 5)])
    assert (np.abs(counts - n * p) < 4 * np.sqrt(n * p * (1 - p))).all()
    inner, mean = positions[1:-1], positions[1:-1].mean()
    assert positions[0] == positions[-1] == 0 and (np.abs(inner - mean) < 5 * np.sqrt(mean)).all()


def test_a_block_of_unknown_words_still_has_k_positions(blocks):
    ids = np.full((1, 32), blocks.special["[UNK]"])
    ids[:, 0], ids[:, -1] = blocks.special["[CLS]"], blocks.special["[SEP]"]
    _, masked, labels = blocks.mask(ids, np.array([1]))
    assert masked.shape == (1, 5) and (labels == blocks.special["[UNK]"]).all()


def test_what_is_no_token_directory_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="prepare.py"):
        TokenDirectory(tmp_path)
    shutil.copytree(corpus, tmp_path / "cut")
    with open(tmp_path / "cut/train.bin", "rb+") as f:
        f.truncate(100)
    with pytest.raises(UserError, match=r"train.bin: 100 bytes where manifest.json says \d+"):
        TokenDirectory(tmp_path / "cut")
    shutil.copytree(corpus, tmp_path / "flipped")
    raw = bytearray((tmp_path / "flipped/val.bin").read_bytes())
    raw[7] ^= 1
    (tmp_path / "flipped/val.bin").write_bytes(raw)
    with pytest.raises(UserError, match="val.bin: sha256"):
        TokenDirectory(tmp_path / "flipped").verify()


@pytest.mark.parametrize("changes, expected", [
    (dict(seq_len=1), "--seq-len 1: must be a whole number, at least 4"),
    (dict(seq_len=2), "--seq-len 2: must be a whole number, at least 4"),
    (dict(seq_len=3), "--seq-len 3: must be a whole number, at least 4"),
    (dict(seq_len=-5), "--seq-len -5: must be a whole number, at least 4"),
    (dict(seq_len=65536), "--seq-len 65536: must be a whole number, at least 4 and at most 8192"),
    (dict(seed=-1), "--seed -1: must be a whole number, at least 0"), (dict(seed=10 ** 30), "--seed 1000000"),
    (dict(show=-1), "--show -1: must be a whole number, at least 0"),
    (dict(directory=["/none"]), "/none is not a token directory (no manifest.json): make one with  python prepare.py"),
])
def test_wrong_arguments_are_refused_in_one_line(corpus, changes, expected):
    with pytest.raises(UserError) as e:
        data.main(data.Config(**dict(directory=[str(corpus)], show=1) | changes))
    assert expected.format(**TokenDirectory(corpus).manifest) in str(e.value) and "\n" not in str(e.value)


def test_the_shortest_blocks_and_a_validation_set_without_one(corpus):
    directory = TokenDirectory(corpus)
    ids, masked, _ = Blocks(directory, "train", 4, 0).batch(0, 8)
    assert ids.shape == (8, 4) and masked.shape == (8, 1)
    for split, more in (("val", "a larger --val-fraction"), ("train", "more text")):
        ids = directory.manifest[f"{split}_tokens"]
        with pytest.raises(UserError, match=f"/{split}.bin: {ids} ids do not make one block of length 1000000: run "
                                            f"prepare.py again with {more}, or give a smaller --seq-len"):
            Blocks(directory, split, 10 ** 6, 0)


@pytest.mark.parametrize("edit", [
    lambda m: m.clear(), lambda m: m.pop("dtype"), lambda m: m.update(dtype="float64"), lambda m: m.update(dtype=[]),
    lambda m: m.update(bytes=3), lambda m: m["bytes"].pop("val.bin"), lambda m: m.pop("sha256"),
    lambda m: m["sha256"].pop("val.bin"), lambda m: m.update(vocab_size="300"), lambda m: m.pop("unknown"),
    lambda m: m.update(unknown=-1), lambda m: m.update(train_tokens=True), lambda m: m.update(val_tokens=0),
    lambda m: (m.update(val_tokens=0), m["bytes"].update({"val.bin": 0})),
    lambda m: m["bytes"].update({"val.bin": float("nan")}), lambda m: m.update(dtype="uint32")])
def test_a_manifest_that_is_none_is_damaged(copy, edit):
    change(copy, edit, {})
    with pytest.raises(UserError, match=r"manifest.json is damaged or not ours \(.*\): run prepare.py again"):
        TokenDirectory(copy)


@pytest.mark.parametrize("name", ["manifest.json", "train.bin", "tokenizer.json"])
def test_a_file_that_cannot_be_read_is_said_with_the_reason(copy, name):
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} cannot be read \(Is a directory\): mend that, or run prepare.py"):
        TokenDirectory(copy)


@pytest.fixture
def copy(corpus, tmp_path):
    return shutil.copytree(corpus, tmp_path / "copy")


def test_a_missing_file_a_damaged_manifest_and_another_tokenizer_are_refused(copy, tmp_path):
    for name in ("val.bin", "tokenizer.json"):
        (copy / name).rename(tmp_path / "away")
        with pytest.raises(UserError, match=f"{name} is missing"):
            TokenDirectory(copy)
        (tmp_path / "away").rename(copy / name)
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest[:-5])
    with pytest.raises(UserError, match="manifest.json is damaged"):
        TokenDirectory(copy)
    (copy / "manifest.json").write_text(manifest)
    tokenizer = (copy / "tokenizer.json").read_bytes()
    one_letter = tokenizer.replace(b'"[PAD]"', b'"[PAT]"')              # as long as the true one
    (copy / "tokenizer.json").write_bytes(one_letter)
    with pytest.raises(UserError, match="tokenizer.json"):
        TokenDirectory(copy).verify()
    (copy / "tokenizer.json").write_bytes(tokenizer[:100] + b"x" + tokenizer[101:])
    with pytest.raises(UserError, match="tokenizer.json"):
        TokenDirectory(copy).verify()
    change(copy, lambda m: m.update(vocab_size=299), {"tokenizer.json": tokenizer})
    with pytest.raises(UserError, match="300 tokens where manifest.json says 299"):
        TokenDirectory(copy)


def change(directory, edit, contents):
    """Replaces files with the right checksums, as another program might."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for name, content in contents.items():
        (directory / name).write_bytes(content)
        manifest["bytes"][name] = len(content)
        manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    edit(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_an_id_beyond_the_vocabulary_is_refused(copy):
    ids = TokenDirectory(copy).split("val").copy()
    ids[-1] = 300
    change(copy, lambda m: None, {"val.bin": ids.tobytes()})
    with pytest.raises(UserError, match=r"val.bin: id 300 in it, the vocabulary ends at 299"):
        TokenDirectory(copy).verify()


def test_unique_tokens_are_the_first_ones_again_and_again(corpus):
    directory = TokenDirectory(corpus)
    blocks = Blocks(directory, "train", 32, seed=3, unique_tokens=10 * 30 + 7)
    assert blocks.count == 10
    ids, masked, labels = blocks.batch(0, 30)
    np.put_along_axis(ids, masked, labels, 1)
    expected = np.repeat(np.sort(directory.split("train")[:300]), 3)
    assert np.array_equal(np.sort(ids[:, 1:-1].ravel()), expected)
    for n in (31, 10 ** 9):
        with pytest.raises(UserError, match="--unique-tokens"):
            Blocks(directory, "train", 32, seed=3, unique_tokens=n)


def test_static_masks_are_those_of_the_first_epoch(corpus, blocks):
    static = Blocks(TokenDirectory(corpus), "train", 32, seed=3, static_masks=True)
    n = blocks.count
    for a, b in zip(static.batch(0, n), blocks.batch(0, n), strict=True):
        assert np.array_equal(a, b)

    def rows(batch):
        return sorted(map(bytes, np.concatenate(batch, axis=1)))
    assert rows(static.batch(1, n)) == rows(static.batch(0, n)) != rows(blocks.batch(1, n))
    assert not np.array_equal(static.batch(1, n).ids, static.batch(0, n).ids)               # in another order


def test_the_same_files_serve_other_sequence_lengths(corpus):
    for S in (8, 128, 512):
        blocks = Blocks(TokenDirectory(corpus), "train", S, seed=0)
        ids, masked, _ = blocks.batch(0, 4)
        assert ids.shape == (4, S) and masked.shape == (4, round(0.15 * S))


@pytest.mark.parametrize("device, of_its_own", [("cuda", True), ("cpu", False)])
def test_beside_a_gpu_the_same_batches_come_from_another_thread_which_ends(blocks, monkeypatch, device, of_its_own):
    threads, expected, whole = set(), [blocks.batch(i, 8) for i in range(3, 7)], Blocks.batch

    def batch(*args):
        threads.add(threading.current_thread())
        return whole(*args)
    monkeypatch.setattr(Blocks, "batch", batch)
    batches = data.batches_of(blocks, 3, 8, torch.device(device))
    for found, right in zip(itertools.islice(batches, 4), expected, strict=True):
        assert all(map(np.array_equal, found, right))
    batches.close()
    assert len(threads) == 1 and (threading.current_thread() not in threads) == of_its_own
    assert not of_its_own or not threads.pop().is_alive()


def test_the_script_shows_what_was_masked(corpus, capsys):
    data.main(data.Config([str(corpus)], show=2, seq_len=32))
    out = capsys.readouterr().out
    assert "verified: train.bin, val.bin, tokenizer.json" in out and out.count(" <- ") == 2 * 5
    assert json.loads((corpus / "manifest.json").read_text())["fingerprint"] in out
    assert all(f"\n{key}: " in out for key in (
        "documents", "unknown_rate"))
