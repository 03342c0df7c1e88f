"""What is computed once for many runs: cached targets, selections, and what they cost a budget."""
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_reliability import OFTEN, QUIET, Killed, final, interrupted

import offline
import prepare
import train
from conftest import log_of, text
from data import SPECIAL, Blocks, TokenDirectory, hashed
from kd_losses import sampled_cross_entropy, soft_cross_entropy
from model import BertConfig
from plumbing import artefact, checkpoint, sources
from plumbing.cli import UserError
from plumbing.diagnose import token_losses
from step import flops_per_block

SILENT = lambda line: None  # noqa: E731


# ------------------------------------------------------------------------------------------------------ masks

def made_up(**other):
    ids = (np.arange(4000, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(295) + 5).astype(np.uint16)
    directory = SimpleNamespace(path="made up", vocab=range(300), split=lambda name: ids,
                                special=dict(zip(SPECIAL, range(5), strict=True)))
    return Blocks(directory, "train", 32, **dict(seed=3) | other)


def test_without_the_new_arguments_batches_are_bitwise_what_they_were():
    for other, expected in (({}, "16d445fd500bd465"), (dict(static_masks=True), "5dc38378ce22eeb5")):
        found = hashlib.sha256()
        for i in range(40):
            for array in made_up(**other).batch(i, 8):
                found.update(array.tobytes())
        assert found.hexdigest()[:16] == expected


def by_block(blocks, epoch):
    """{block: (corrupted ids, masked)} of one epoch."""
    batch = blocks.batch(epoch, blocks.count)
    return {int(b): (ids.tobytes(), masked.tobytes())
            for b, ids, masked in zip(blocks.order(epoch), batch.ids, batch.masked, strict=True)}


def test_seeds_share_masks_but_not_their_order_and_masks_come_again_after_so_many_epochs():
    one, two = (made_up(seed=seed, mask_seed=7, mask_variants=2) for seed in (3, 4))
    assert [by_block(one, e) for e in range(3)] == [by_block(two, e) for e in range(3)]
    assert list(one.order(0)) != list(two.order(0))
    assert by_block(one, 0) == by_block(one, 2) != by_block(one, 1) and by_block(one, 1) == by_block(one, 3)
    assert by_block(made_up(mask_seed=3), 5) == by_block(made_up(), 5)
    assert by_block(made_up(mask_variants=1), 5) == by_block(made_up(static_masks=True), 5)


def test_selected_blocks_are_permuted_among_themselves_under_the_masks_of_their_own():
    keep = np.array([4, 9, 17, 60])
    some, every = made_up(keep=keep), made_up()
    assert some.count == 4 and some.there == every.count and some.epochs(3, 4) == 3
    for epoch in range(3):
        batch, block = some.batch(epoch, 4), keep[some.order(epoch)]
        assert sorted(block) == list(keep)
        expected = every.mask(every.read(block), hashed(3, epoch, block))
        assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))


# -------------------------------------------------------------------------------------- draws and their loss

V, M, N = 40, 4000, 12


@pytest.fixture(scope="module")
def drawn():
    """(p (V,), the shares (M, V) of M positions with the same distribution)."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 2
    ids = offline.draw(logits.expand(M, V), hashed(5, np.arange(M)), N)
    shares = np.zeros((M, V))
    np.add.at(shares, (np.arange(M)[:, None], ids), 1 / N)
    return logits.softmax(-1).double().numpy(), shares


def test_draws_are_an_unbiased_sample_with_the_known_spread(drawn):
    p, shares = drawn
    for found, expected in ((((shares - p) ** 2).sum(1), (1 - (p ** 2).sum()) / N),
                            ((shares > 0).sum(1), (1 - (1 - p) ** N).sum())):
        assert abs(found.mean() - expected) < 4 * found.std() / M ** 0.5
    z = (shares.mean(0) - p) / np.sqrt(p * (1 - p) / (N * M))
    assert abs(z.mean()) < 0.5 and 0.6 < z.std() < 1.4


def test_the_gradient_is_unbiased_and_that_of_the_top_k_is_not(drawn):
    p, shares = drawn
    z_s = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tau, ids = 2.0, torch.arange(V).expand(M, V)
    rows = z_s.expand(M, V).clone().requires_grad_()
    sampled_cross_entropy(rows, ids, torch.from_numpy(shares), tau).backward()
    exact = (tau * ((z_s / tau).softmax(-1) - torch.from_numpy(p))).numpy()             # of one position
    of_rows = rows.grad.numpy() * M
    np.testing.assert_allclose(of_rows, tau * ((z_s / tau).softmax(-1).numpy() - shares), atol=1e-9)
    z = (of_rows.mean(0) - exact) / (of_rows.std(0) / M ** 0.5)
    assert abs(z.mean()) < 0.5 and 0.6 < z.std() < 1.4

    top = np.where(p >= np.sort(p)[-N], p, 0)
    biased = tau * ((z_s / tau).softmax(-1).numpy() - top / top.sum())
    assert np.abs((biased - exact) / (of_rows.std(0) / M ** 0.5)).max() > 10


def test_sampled_cross_entropy_by_hand_and_with_exact_shares():
    g = torch.Generator().manual_seed(3)
    z_s, z_t = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g)
    ids, shares = torch.tensor([[1, 4], [0, 2], [3, 0]]), torch.tensor([[.25, .75], [.5, .5], [1., 0.]])
    expected = 0.0
    for row in range(3):
        whole = sum(np.exp(float(z) / 2) for z in z_s[row])
        for i, share in zip(ids[row].tolist(), shares[row].tolist(), strict=True):
            expected -= 4 * share * np.log(np.exp(float(z_s[row, i]) / 2) / whole) / 3
    assert sampled_cross_entropy(z_s, ids, shares, 2.0).item() == pytest.approx(expected, rel=1e-5)
    every = torch.arange(5).expand(3, 5)
    assert sampled_cross_entropy(z_s, every, (z_t / 2).softmax(-1), 2.0).item() == pytest.approx(
        soft_cross_entropy(z_s, z_t, 2.0).item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ cache

LIMIT = 12_000          # of the corpus's ids: 400 blocks


@pytest.fixture(scope="module")
def cached(corpus, teacher, tmp_path_factory):
    """(its configuration, what it said, its directory)."""
    config, said = cache_config(corpus, teacher, tmp_path_factory.mktemp("cache") / "cache"), []
    offline.cache(config, said.append)
    return config, said, Path(config.out)


def cache_config(corpus, teacher, out, **other):
    return offline.Cache(**dict(
        teacher=str(teacher), data=str(corpus), out=str(out), variants=2, samples=60, mask_seed=4, seq_len=32,
        unique_tokens=LIMIT, device="cpu", bf16=False) | other)


@pytest.fixture
def copied(cached, tmp_path):
    return shutil.copytree(cached[2], tmp_path / "copied", ignore=shutil.ignore_patterns("runs"))


@pytest.fixture
def from_cache(tiny, cached):
    """Makes the train.Config of a run from the cache."""
    def make(**other):
        return tiny(**dict(strategy="vanilla_kd", teacher_cache=str(cached[2]), unique_tokens=LIMIT) | other)
    return make


def test_a_cache_holds_draws_from_the_teacher_for_every_variant_of_every_block(cached, corpus):
    config, said, out = cached
    directory, m = TokenDirectory(corpus), json.loads((out / "manifest.json").read_text())
    blocks = Blocks(directory, "train", 32, 11, LIMIT, mask_seed=4, mask_variants=2)
    artefact.TeacherCache(out).attach(blocks, tau=1.0)
    forward, flops = offline.masked_lm(config.teacher, directory, config)
    for i in (0, 60, 120):                                      # of both variants, and of the first again
        batch = blocks.batch(i, 32)
        p = forward(torch.from_numpy(batch.ids), torch.from_numpy(batch.masked)).softmax(-1).numpy()
        shares, drawn = (a.reshape(len(p), -1) for a in (batch.shares, batch.drawn))
        assert shares.sum(1) == pytest.approx(1) and shares.dtype == np.float32
        assert all(len(set(row[share > 0])) == (share > 0).sum()
                   for row, share in zip(drawn, shares, strict=True))
        dense = np.zeros_like(p)
        np.add.at(dense, (np.arange(len(p))[:, None], drawn), shares)
        z = (dense - p).sum(0) / np.sqrt((p * (1 - p) / 60).sum(0))     # of each id, over the positions
        assert abs(z.mean()) < 0.3 and 0.8 < z.std() < 1.2
        assert (dense * np.log(p)).sum() > (np.roll(dense, 1, 0) * np.log(p)).sum()     # and of each position
    rows = np.memmap(out / "positions", artefact.POSITION, "r").reshape(2, blocks.there, blocks.k)
    batch = blocks.masked(np.arange(8), np.full(8, 1))
    logits = forward(torch.from_numpy(batch.ids), torch.from_numpy(batch.masked)).log_softmax(-1)
    labels = torch.from_numpy(batch.labels).reshape(-1, 1)
    assert rows[1, :8]["log_p"].ravel() == pytest.approx(logits.gather(1, labels).flatten().numpy(), rel=2e-3)
    assert m["flops"] == flops * 2 * blocks.there and "MB more on a disk with" in said[1]
    assert m["teacher_mlm"] == pytest.approx(-rows["log_p"].mean(dtype=np.float64))
    config = train.Config("vanilla_kd", budget_steps=1, seq_len=32, batch_size=1, micro_batch=1)
    shapes = BertConfig.of_size("2L32", 2, vocab_size=300), BertConfig.of_size("3L48", 2, vocab_size=300)
    assert flops == flops_per_block(config, *shapes)[1]                 # what an online arm is charged


def test_a_killed_cache_goes_on_and_ends_bitwise_like_one_that_was_not(cached, corpus, teacher, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setattr(offline, "CHUNK", 192)
    config = cache_config(corpus, teacher, tmp_path / "cache")
    write, notes = offline.write_json, []

    def killed_before_the_second_note(file, value):
        notes.append(file)
        if len(notes) == 2:
            raise Killed
        write(file, value)
    with monkeypatch.context() as m:
        m.setattr(offline, "write_json", killed_before_the_second_note)
        with pytest.raises(Killed):
            offline.cache(config, SILENT)
    with (tmp_path / "cache/pairs").open("ab") as f:
        f.write(b"and half a row")
    with pytest.raises(UserError, match="holds the beginning of another one .samples differ.: give another"):
        offline.cache(dataclasses.replace(config, samples=7), SILENT)
    with pytest.raises(UserError, match="nothing finished is there"):
        artefact.TeacherCache(tmp_path / "cache")
    offline.cache(config, SILENT)
    for name in ("blocks", "positions", "pairs"):
        assert (tmp_path / "cache" / name).read_bytes() == (cached[2] / name).read_bytes()
    said = []
    offline.cache(config, said.append)
    assert said == [f"{config.out} is finished: nothing to do"]
    with pytest.raises(UserError, match="made with another tau: give another --out"):
        offline.cache(dataclasses.replace(config, tau=2.0), SILENT)


def test_a_disk_that_is_too_small_is_told_before_the_start(corpus, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e5))
    with pytest.raises(UserError, match=r"MB needed, 0 MB free: give another --out, or fewer of --samples"):
        offline.cache(cache_config(corpus, teacher, tmp_path / "cache"), SILENT)
    assert not (tmp_path / "cache/pairs").exists()


def test_a_run_from_the_cache_reads_no_teacher_and_ends_as_the_same_run_online(from_cache, tiny, tmp_path,
                                                                              monkeypatch):
    online = train.train(tiny(strategy="vanilla_kd", unique_tokens=LIMIT, mask_seed=4, mask_variants=2,
                              budget_steps=60, out=str(tmp_path / "online")), **QUIET)
    monkeypatch.setattr(checkpoint, "load_mlm", None)
    said = []
    summary = train.train(from_cache(budget_steps=60), say=said.append)
    assert summary["val"]["mlm"] == pytest.approx(online["val"]["mlm"], abs=0.02)
    assert summary["teacher_flops"] == 0 and set(summary["val"]) == {"mlm"} and summary["teacher_mlm"] is None
    assert any(line.startswith("  1 x soft_ce     cached at step 0") for line in said)
    assert "offline: 0 of 60 steps are spent before the first step" in "\n".join(said)
    losses = [[line["soft_ce"] for line in log_of(out) if "soft_ce" in line]
              for out in (tmp_path / "online", tmp_path / "run")]
    assert losses[1][0] == pytest.approx(losses[0][0], abs=0.1) and len(losses[1]) == 60
    assert np.mean(losses[1]) == pytest.approx(np.mean(losses[0]), abs=0.01)


@pytest.mark.parametrize("strategy", ["vanilla_kd", "vanilla_kd:0.2/no_kd"])
def test_a_run_from_the_cache_that_died_ends_bitwise_like_one_that_did_not(from_cache, tmp_path, monkeypatch,
                                                                           strategy):
    common = dict(strategy=strategy, dropout=0.1, micro_batch=4, kd_every=2)
    train.train(from_cache(**common, out=str(tmp_path / "whole")), **QUIET)
    config = from_cache(**common, **OFTEN, out=str(tmp_path / "died"))
    for at in (3, 8):
        interrupted(monkeypatch, config, at)
    train.train(config, **QUIET)
    assert final(tmp_path / "died") == final(tmp_path / "whole")


@pytest.mark.parametrize("other, message", [
    (dict(seq_len=16), r"another seq_len .32 there, 16 here., masked .5 there, 2 here."),
    (dict(tau=2.0), r"another tau .1.0 there, 2.0 here."),
    (dict(mask_seed=5), r"another mask_seed .4 there, 5 here."),
    (dict(mask_variants=3), r"holds 2 mask variant.s. of 400 blocks, the run asks for 3 of 400"),
    (dict(unique_tokens=None), r"of 400 blocks, the run asks for 2 of [\d,]+: give --mask-variants or"),
    (dict(strategy="distilbert"), "holds soft targets only; distilbert needs the teacher's hidden"),
    (dict(strategy="no_kd"), "--teacher-cache: no_kd needs no teacher: leave it out"),
    (dict(static_masks=True, mask_variants=2), "--static-masks is --mask-variants 1"),
    (dict(teacher_cache=None, ledger="amortised"), "--ledger amortised belongs to --teacher-cache or --keep"),
    (dict(teacher_cache="nowhere"), "nothing finished is there .* offline.py cache"),
    (dict(budget_steps=None, budget_flops=1e6), r"cost 4.\d+e\+09 of it .FULL., which leaves the student no"),
])
def test_what_a_cache_cannot_be_used_for_is_one_line(from_cache, cached, other, message):
    before = list(cached[2].glob("runs/*"))
    with pytest.raises(UserError, match=message):
        train.train(from_cache(**other), **QUIET)
    assert list(cached[2].glob("runs/*")) == before             # what is refused takes no share of the cost


def test_another_teacher_or_corpus_and_damaged_files_are_refused(from_cache, narrow_teacher, copied, corpus,
                                                                 tmp_path):
    with pytest.raises(UserError, match="was made with another teacher: make one"):
        train.train(from_cache(teacher=str(narrow_teacher)), **QUIET)
    other = tmp_path / "other"
    prepare.prepare(prepare.Config(["made up"], str(other), str(corpus), None, 0.1), text(100, 1))
    with pytest.raises(UserError, match="was made with another corpus"):
        train.train(from_cache(data=str(other)), **QUIET)
    whole = (copied / "pairs").read_bytes()
    for damaged, message in ((whole[:-3], r"pairs is damaged .*bytes.: remove"),
                             (whole[:50] + b"?" + whole[51:], r"pairs is damaged .its sha256")):
        (copied / "pairs").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            train.train(from_cache(teacher_cache=str(copied)), **QUIET)


def test_one_flipped_id_is_seen_at_the_read_though_every_checksum_was_made_anew(from_cache, copied, corpus,
                                                                               tmp_path):
    data = shutil.copytree(corpus, tmp_path / "data")
    ids = np.memmap(data / "train.bin", np.uint16, "r+")
    ids[3000] = 7 if ids[3000] != 7 else 8
    ids.flush()
    for folder, key in ((data, "sha256"), (copied, "corpus")):
        m = json.loads((folder / "manifest.json").read_text())
        m[key]["train.bin"] = hashlib.sha256((data / "train.bin").read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(m))
    with pytest.raises(UserError, match="block 100 has other ids or masks than those that the teacher saw"):
        train.train(from_cache(data=str(data), teacher_cache=str(copied), budget_steps=60), **QUIET)


# ---------------------------------------------------------------------------------------------------- ledgers

def test_the_budget_shrinks_by_the_charge_and_the_learning_rate_does_all_of_its_way(from_cache, tiny, copied,
                                                                                   watched):
    cost = json.loads((copied / "manifest.json").read_text())["flops"]
    step = 8 * sum(flops_per_block(tiny(strategy="no_kd"), BertConfig.of_size("2L32", 2, vocab_size=300)))
    config = from_cache(budget_steps=None, budget_flops=float(cost + 50 * step), teacher_cache=str(copied),
                        warmup=0.1)
    seen = watched(config)
    lrs = [u.groups[0]["lr"] for u in seen.updates]
    assert lrs == pytest.approx([train.learning_rate(i / 50, 3e-3, 0.1) for i in range(50)]) and lrs[0] == 0
    assert seen.summary["budget"] == {"flops": pytest.approx(50 * step)} and seen.summary["overshoot"] < 0.02
    assert seen.summary["offline"]["charge"] == cost and seen.summary["offline"]["ledger"] == "full"


def test_amortised_is_a_share_of_the_distinct_runs_that_are_registered(from_cache, copied, tmp_path,
                                                                      monkeypatch):
    cost = json.loads((copied / "manifest.json").read_text())["flops"]

    def run(name, **other):
        return from_cache(**dict(budget_steps=None, budget_flops=cost * 1.02, teacher_cache=str(copied),
                                 out=str(tmp_path / name)) | other)
    train.train(run("full"), **QUIET)
    again = train.train(run("other out, other ledger", ledger="amortised", budget_flops=cost * 1.02), **QUIET)
    assert again["offline"]["charge"] == cost and again["offline"]["sharing"] == [1]        # the same run
    second = run("second", ledger="amortised", budget_flops=cost * 0.52, seed=1, **OFTEN)
    interrupted(monkeypatch, second, 1)
    train.train(run("third", seed=2), **QUIET)
    assert len(list(copied.glob("runs/*.json"))) == 3
    summary = train.train(second, **QUIET)                              # goes on with what it was charged
    assert summary["offline"]["sharing"] == [2] and summary["offline"]["charge"] == cost / 2
    assert train.train(second, **QUIET) == summary


def test_hours_of_other_hardware_are_no_charge(from_cache, copied):
    m = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(m | dict(hardware="a GPU")))
    with pytest.raises(UserError, match="was made on a GPU, this is CPU .*make it here, or give --budget-fl"):
        train.train(from_cache(budget_steps=None, budget_hours=1.0, teacher_cache=str(copied)), **QUIET)
    (copied / "manifest.json").write_text(json.dumps(m | dict(seconds=3599.0)))
    summary = train.train(from_cache(budget_steps=None, budget_hours=1.0, teacher_cache=str(copied)), **QUIET)
    assert summary["offline"]["charge"] == 3599 / 3600 and 0.5 < summary["charged_seconds"] < 3


# ---------------------------------------------------------------------------------------------------- MiniPLM

def test_units_are_kept_by_each_rule_in_the_order_of_the_corpus_and_ties_by_id():
    units = np.array([9, 2, 5, 3])                                      # s_t - s_ref: 1, 2, 2, 0
    scores = np.array([[-2., -3.], [-1., -3.], [-4., -6.], [-3., -3.]])
    kept = {name: mine.tolist() for name, mine in offline.selections(units, scores, 0.5).items()}
    assert len(kept.pop("random")) == 2
    assert kept == dict(difference=[2, 5], teacher=[2, 9], reference=[2, 5], flipped=[3, 9])
    assert offline.selections(units, scores, 0.25)["difference"].tolist() == [2]
    assert offline.blocks_of(np.array([2, 5])).tolist() == [*range(16, 24), *range(40, 48)]


def test_the_gate_asks_for_scores_that_are_reliable_and_for_a_better_teacher():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(500, 8, 2, 2))
    signal = rng.normal(size=(500, 1, 1)) * 2 + 1
    good = noise.copy()
    good[..., 0] += signal
    reliability, gap = offline.gate(good)
    assert reliability > 0.9 and gap == pytest.approx(float((good[..., 0] - good[..., 1]).mean()))
    with pytest.raises(UserError, match=r"no selection: .* 500 units, the split-half rank correlation is"):
        offline.gate(noise + [1.0, 0.0])                                # a gap alone
    with pytest.raises(UserError, match=r"the mean -\d.\d\d nat .more than 0.1 needed"):
        offline.gate(good - [2.0, 0.0])                         # reliable, but the teacher is the worse


class Counting:
    """A masked LM that counts: p(w | left) p(w | right) / p(w), where a masked neighbour tells nothing."""

    def __init__(self, ids, V, mask, order=1.0, smoothing=0.01):
        self.unigram = np.log(np.bincount(ids, minlength=V) + smoothing)
        pairs = np.full((V, V), smoothing)
        np.add.at(pairs, (ids[:-1], ids[1:]), 1)
        base = np.exp(self.unigram) / np.exp(self.unigram).sum()
        self.right, self.left = ((c + 5 * base) / (c + 5 * base).sum(1, keepdims=True)
                                 for c in (pairs, pairs.T))
        for table in (self.right, self.left):
            table[mask] = base
        self.base, self.order = np.log(base), order

    def __call__(self, ids, masked):
        ids, masked = ids.numpy(), masked.numpy()
        a, b = (np.take_along_axis(ids, masked + step, 1).ravel() for step in (-1, 1))
        evidence = np.log(self.right[a]) + np.log(self.left[b]) - 2 * self.base
        p = torch.from_numpy(self.base + self.order * evidence).softmax(-1)
        return (0.8 * p + 0.2 * torch.from_numpy(self.base).softmax(-1)).log()


def signed(data, ids):
    """Writes other training ids into a token directory, checksums and all."""
    ids.tofile(data / "train.bin")
    m = json.loads((data / "manifest.json").read_text())
    m["train_tokens"], m["bytes"]["train.bin"] = len(ids), ids.nbytes
    m["sha256"]["train.bin"] = hashlib.sha256(ids.tobytes()).hexdigest()
    (data / "manifest.json").write_text(json.dumps(m))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """(directory, kind of each unit): half clean text, a quarter one paragraph repeated, a quarter clean text
    in random order; and ids of other clean text for a teacher."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pool")
    clean = [" ".join(d.split()) for d in text(900, 0)]
    prepare.prepare(prepare.Config(["made up"], str(folder / "vocab"), None, 300, 0.1), clean)
    tokenizer = TokenDirectory(folder / "vocab").read_tokenizer()
    ids = np.concatenate([tokenizer.encode(d, add_special_tokens=False).ids for d in clean]).astype(np.uint16)
    n = len(ids) // 4
    teacher, mine, shuffled = ids[:2 * n], ids[2 * n:], rng.permutation(ids[2 * n:3 * n])
    paragraph = np.tile(ids[:37], n // 37 + 1)[:n]
    data = shutil.copytree(folder / "vocab", folder / "pool")
    signed(data, np.concatenate([mine, paragraph, shuffled]))
    ends = np.cumsum([len(mine), len(paragraph), len(shuffled)])

    def kind(unit):                     # by the middle of the unit
        return np.searchsorted(ends, (np.asarray(unit) * 8 + 4) * 30)
    return data, kind, np.concatenate([teacher, np.tile(ids[:37], 40)])


def scored(pool, tmp_path, monkeypatch, change=lambda scores: scores, **other):
    """{selection: kinds of its units}, with a teacher that has counted other text and a reference that has
    counted the held-out units: what it sees often it knows, of the rest the frequencies."""
    data, kind, known = pool
    directory, models = TokenDirectory(data), {}
    V, mask = len(directory.vocab), directory.special["[MASK]"]

    def trained(config, say, keep):
        blocks = Blocks(directory, "train", 32, 0)
        held = hashed(np.arange(blocks.count // 8)) % np.uint64(20) == 0
        assert set(keep // 8) == set(np.flatnonzero(held))
        assert config.budget_tokens == len(keep) * 32
        models["reference"] = Counting(blocks.read(keep)[:, 1:-1].ravel(), V, mask, 0.35)
        return dict(student_flops=7, charged_seconds=1.0)

    def masked_lm(path, *_):
        return Counting(known, V, mask) if path == "teacher" else models["reference"], 100
    monkeypatch.setattr(offline.train, "train", trained)
    monkeypatch.setattr(offline, "masked_lm", masked_lm)
    monkeypatch.setattr(offline, "contents", lambda *_: {"contents of data": {}, "contents of teacher": []})
    selections = offline.selections
    monkeypatch.setattr(offline, "selections", lambda units, s, alpha: selections(units, change(s), alpha))
    said, config = [], offline.Score(**dict(teacher="teacher", data=str(data), out=str(tmp_path / "scores"),
                                            seq_len=32, device="cpu", draws=2) | other)
    manifest = offline.score(config, said.append)
    found = {name: kind(np.unique(np.load(tmp_path / f"scores/{name}.npy") // 8))
             for name in ("difference", "teacher", "reference", "random", "flipped", "all")}
    return found, manifest, "\n".join(said)


def clean(kinds):
    return np.mean(kinds == 0)


def test_difference_keeps_clean_text_and_its_controls_do_not(pool, tmp_path, monkeypatch):
    found, m, said = scored(pool, tmp_path, monkeypatch)
    every = found["all"]
    assert [np.mean(every == i) for i in range(3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
    assert clean(found["difference"]) >= 0.9
    assert np.mean(found["teacher"] == 1) > 0.45 > np.mean(every == 1)          # all of the boilerplate
    assert np.mean(found["reference"] == 2) > 0.4 > np.mean(every == 2)         # all of the shuffled text
    assert clean(found["flipped"]) < 0.1 and 0.3 < clean(found["random"]) < 0.7
    assert m["reliability"] > 0.6 and "split-half rank correlation 0." in said
    assert "Jaccard with difference 1.00; of each tenth of the corpus 100%" in said
    whole, kept = (np.load(tmp_path / f"scores/{name}.npy") for name in ("scores", "difference"))
    blocks = Blocks(TokenDirectory(pool[0]), "train", 32, 0).count
    assert whole.shape == (blocks, 2, 2) and whole.dtype == np.float32 and not np.isnan(whole[kept]).any()
    held = np.isnan(whole).all((1, 2))
    assert 0.02 < held[:len(whole) // 8 * 8].mean() < 0.09 and list(kept) == sorted(kept)
    assert m["flops"] == 200 * (~held).sum() * 2 + 7


@pytest.mark.parametrize("change", [lambda s: s[:, ::-1],
                                    lambda s: np.stack([s[:, 0], np.roll(s[:, 1], 7)], 1)],
                         ids=["a flipped sign", "scores of other units"])
def test_a_flipped_sign_or_other_units_keep_less_clean_text(pool, tmp_path, monkeypatch, change):
    found, _, _ = scored(pool, tmp_path, monkeypatch, change)
    assert clean(found["difference"]) < 0.85


def test_both_models_are_scored_on_the_same_corrupted_blocks(pool, tmp_path, monkeypatch):
    seen, losses = [], token_losses

    def spy(forward, batch, size):
        seen.append((forward.order, hashlib.sha256(b"".join(a.tobytes() for a in batch)).hexdigest()))
        return losses(forward, batch, size)
    monkeypatch.setattr(offline, "token_losses", spy)
    scored(pool, tmp_path, monkeypatch, draws=1)
    of_teacher, of_reference = ([h for order, h in seen if (order == 1.0) == teacher]
                                for teacher in (True, False))
    assert of_teacher == of_reference and len(of_teacher) > 1
    data, _, known = pool
    directory = TokenDirectory(data)
    model = Counting(known, len(directory.vocab), directory.special["[MASK]"])
    whole = np.load(tmp_path / "scores/scores.npy")
    block = np.flatnonzero(~np.isnan(whole[:, 0, 0]))[11]
    batch = Blocks(directory, "train", 32, 0).masked(np.array([block]), np.array([0]))
    log_p = model(*map(torch.from_numpy, batch[:2])).log_softmax(-1)
    expected = np.mean([float(row[label]) for row, label in zip(log_p, batch.labels[0], strict=True)])
    assert whole[block, 0, 0] == pytest.approx(expected, rel=1e-5)


def test_a_meaningless_selection_is_refused_and_nothing_is_written(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "token_losses", lambda forward, batch, size: np.random.default_rng(
        int(batch.ids.sum()) + int(forward.order * 10)).exponential(1.0, batch.masked.shape))
    with pytest.raises(UserError, match="no selection: .*split-half rank correlation is"):
        scored(pool, tmp_path, monkeypatch)
    assert not list((tmp_path / "scores").glob("*.npy")) and not (tmp_path / "scores/manifest.json").exists()


@pytest.fixture
def lenient(monkeypatch):
    """Models of a few steps pass the gate."""
    monkeypatch.setattr(offline, "RELIABLE", -2.0)
    monkeypatch.setattr(offline, "GAP", -99.0)


def test_a_selection_trains_on_its_blocks_alone_and_belongs_to_its_corpus(corpus, teacher, tiny, tmp_path,
                                                                         lenient, watched):
    config = offline.Score(str(teacher), str(corpus), str(tmp_path / "scores"), reference_size="1L64",
                           seq_len=32, mask_seed=2, batch_size=8, device="cpu", bf16=False)
    offline.score(config, SILENT)
    kept = str(tmp_path / "scores/difference.npy")
    keep = np.load(kept)
    seen = watched(tiny(keep=kept, budget_steps=12, mask_seed=5))
    blocks = Blocks(TokenDirectory(corpus), "train", 32, 0, mask_seed=5)
    ids = {row.tobytes() for row in blocks.masked(keep, np.zeros(len(keep), int)).ids}
    assert all(row.numpy().tobytes() in ids for f in seen.micro_batches for row in f.ids)
    assert seen.summary["epochs"] == 96 / len(keep) and seen.summary["offline"]["charge"] == 0
    for other, message in ((dict(seq_len=16), "made with another seq_len"),
                           (dict(keep=kept.replace("difference", "best")), "no such selection; there are diff"),
                           (dict(batch_size=4096, micro_batch=8), "blocks, fewer than a batch of 4096"),
                           (dict(unique_tokens=900), "but with --unique-tokens 900 there are 30")):
        with pytest.raises(UserError, match=message):
            train.train(tiny(**dict(keep=kept, out=str(tmp_path / "other")) | other), **QUIET)


PARAGRAPH = ("Returns a new tensor with the same shape as the input tensor, whose elements are the sum of "
             "the elements of the input. Args: input (Tensor): the input tensor. dim (int): the dimension along "
             "which to operate. Returns: Tensor: the output tensor. Example: ")


@pytest.mark.slow
def test_with_the_demonstrations_teacher_and_a_trained_reference(tmp_path):
    """Docstrings, one paragraph repeated, docstrings whose tokens are shuffled: what does each rule keep?"""
    root = Path(__file__).parents[1]
    documents = [d for _, d in sources.docstrings()][::8]
    data, n = tmp_path / "data", 200_000
    prepare.prepare(prepare.Config(["docstrings"], str(data), str(root / "teacher"), None, 0.1), documents)
    directory = TokenDirectory(data)
    ids = np.fromfile(data / "train.bin", np.uint16)
    paragraph = directory.read_tokenizer().encode(PARAGRAPH, add_special_tokens=False).ids
    parts = [ids[:2 * n], np.resize(paragraph, n), np.random.default_rng(0).permutation(ids[2 * n:3 * n])]
    assert len(ids) > 3 * n
    signed(data, np.concatenate(parts).astype(np.uint16))
    said = []
    manifest = offline.score(offline.Score(
        str(root / "teacher"), str(data), str(tmp_path / "scores"), seq_len=64, reference_size="2L64",
        reference_epochs=10, device="cpu"), said.append)
    print("\n".join(said))
    kinds = {name: np.digitize(np.load(tmp_path / f"scores/{name}.npy") * 62, [2 * n, 3 * n])
             for name in ("difference", "teacher", "reference", "flipped")}
    assert clean(kinds["difference"]) >= 0.9 and manifest["reliability"] > 0.6
    assert np.mean(kinds["teacher"] == 1) > 0.4 and np.mean(kinds["reference"] == 2) > 0.4
    assert clean(kinds["flipped"]) < 0.1


@pytest.mark.slow
def test_kill_9_of_a_cache(cached, corpus, teacher, tmp_path):
    config = cache_config(corpus, teacher, tmp_path / "cache")
    argv = [sys.executable, "-c", "import offline, sys; offline.CHUNK = 64; "
            "offline.cache(offline.Cache(**eval(sys.argv[1])))", repr(dataclasses.asdict(config))]
    for rows in (64, 256, 512):
        process = subprocess.Popen(argv, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE)
        note = tmp_path / "cache/progress.json"
        while process.poll() is None and (not note.exists() or json.loads(note.read_text())["rows"] < rows):
            time.sleep(0.005)
        process.kill()
        process.communicate()
    offline.cache(config, SILENT)
    for name in ("blocks", "positions", "pairs"):
        assert (tmp_path / "cache" / name).read_bytes() == (cached[2] / name).read_bytes()
