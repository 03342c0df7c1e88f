"""The comparison is fair: what each promise says is asked of a real run, seen from outside (conftest.Seen).

The setting hides as little as it can: two micro-batches a step, three of validation, validations in the middle,
dropout, a teacher that is deeper and wider than the student, as many steps as make several epochs where that matters,
and the strategies' own peak learning rates.  docs/tests.md lists the promises."""
import json
import math
import os
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import compare
import finetune_glue
import prepare
import train
from comparison import judge
from conftest import TINY, text, watching
from model import BertConfig, BertForMaskedLM
from plumbing import checkpoint, glue, settle
from plumbing.cli import UserError
from plumbing.device import fitting_micro_batch
from plumbing.student import start_from
from plumbing.tokens import TokenDirectory
from strategies import AS_RELEASED, STRATEGIES

FAIR = TINY | dict(micro_batch=4, dropout=0.1, val_blocks=12, val_times=3, warmup=0.25, weight_decay=0.05,
                   peak_lr=None, budget_steps=8)
# `sentence` has blocks of its own, and neither masks nor dropout: test_sentence.py
EVERY = [*(name for name, s in STRATEGIES.items() if not s.seq_len), *(f"{name} as released" for name in AS_RELEASED)]
BODY = TINY["seq_len"] - 2


@pytest.fixture(scope="module")
def deep_teacher(make_teacher):
    """5L64: other depth and width than the student, four relation heads where it has two heads, dropout 0.1."""
    model = make_teacher("5L64", 1)
    config = json.loads((model / "config.json").read_text())
    config |= dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture(scope="module")
def fair(corpus, deep_teacher, narrow_teacher, tmp_path_factory):
    """Makes the train.Config of a run; keyword arguments override."""
    def make(name="no_kd", **other):
        strategy, _, released = name.partition(" ")
        teacher = narrow_teacher if strategy == "distilbert" else deep_teacher
        return train.Config(**FAIR | dict(
            strategy=strategy, as_released=bool(released), data=str(corpus), teacher=str(teacher),
            out=str(tmp_path_factory.mktemp("fair") / "run")) | other)
    return make


@pytest.fixture(scope="module")
def run(fair, watched):
    """run(name, **changes): that run, made once for all tests that ask for it."""
    runs = {}

    def get(name="no_kd", **other):
        key = name, *sorted(other.items())
        if key not in runs:
            runs[key] = watched(fair(name, **other))
        return runs[key]
    return get


@pytest.fixture(scope="module")
def blocks_of(corpus):
    """blocks_of(split, ids, masked): the number of the block in split.bin that each row shows where it is not masked;
    None where it shows none."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    blocks = {}
    for split in ("train", "val"):
        ids = np.fromfile(corpus / f"{split}.bin", manifest["dtype"]).astype(np.int64)
        blocks[split] = torch.from_numpy(ids[:len(ids) // BODY * BODY].reshape(-1, BODY))

    def find(split, ids, masked):
        found = []
        for row, at in zip(ids, masked, strict=True):
            shown = torch.ones(BODY + 2, dtype=torch.bool).index_fill(0, at, False)[1:-1]
            same = (blocks[split][:, shown] == row[1:-1][shown]).all(1).nonzero().flatten().tolist()
            found.append(same[0] if len(same) == 1 else None)
        return found
    return find


def fed(forwards):
    """What went in, in order."""
    return [(f.ids.tolist(), f.masked.tolist()) for f in forwards]


def grouped(forwards):
    """{step: its forwards}"""
    found = {}
    for f in forwards:
        found.setdefault(f.step, []).append(f)
    return found


# ---------------------------------------------------------------------------------------- schedule and optimizer

def schedule(progress, peak, warmup):
    return peak * min(progress / warmup, (1 - progress) / (1 - warmup))


@pytest.mark.parametrize("name", EVERY)
def test_the_optimizer_uses_the_learning_rate_of_the_schedule(run, name):
    """At each step, in both parameter groups, the learning rate is linear up to the strategy's own peak over the
    warm-up's share of the budget and linear to zero at the budget's end, and the log says the same."""
    seen = run(name)
    expected = [schedule(i / 8, 1e-3 if name == "no_kd" else 5e-4, 0.25) for i in range(8)]
    assert [[g["lr"] for g in u.groups] for u in seen.updates] == [[pytest.approx(lr)] * 2 for lr in expected]
    assert [line["lr"] for line in seen.log if "val" not in line] == pytest.approx(expected)


def test_the_defaults_are_the_papers_recipe():
    """What no flag says is what the paper says (arXiv 2404.19319, appendix), in pretraining and in fine-tuning."""
    ours = train.Config()
    assert (ours.size, ours.seq_len, ours.batch_size) == (None, 128, None)      # of a budget that is large enough:
    assert (settle.SIZES[0], settle.PAPERS_BATCH) == ("6L768", 1024)
    assert fitting_micro_batch(torch.device("cpu"), settle.PAPERS_BATCH) == 256
    assert (ours.warmup, ours.weight_decay, ours.dropout, ours.peak_lr) == (0.06, 0.01, 0.1, None)
    assert [ours.of_recipe(name) for name in ("optimizer", "clip", "init_std")] == ["adamw", 0, 0.02]
    assert (ours.seed, ours.init, ours.tau, ours.static_masks, ours.as_released) == (0, None, None, False, False)
    tuning = finetune_glue.Config("model")
    assert finetune_glue.grid(tuning, 768) == [(b, lr) for b in (16, 32) for lr in (1e-5, 3e-5, 5e-5, 8e-5)]
    assert tuning.epochs == 5 and (tuning.max_len, tuning.dropout, tuning.seeds) == (128, 0.1, 3)


@pytest.mark.parametrize("name", EVERY)
def test_only_matrices_decay_and_all_that_is_trained_is_in_the_optimizer(run, name):
    """Weight decay is --weight-decay on matrices, projections among them, and zero on biases and LayerNorms; each
    trained parameter is in the optimizer once, with the paper's betas and epsilon."""
    seen = run(name)
    names, decay = seen.names(), {}
    for group in seen.updates[0].groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.98), 1e-6)
        for p in group["params"]:
            assert p not in decay
            decay[p] = group["weight_decay"]
    spared = {p for p in decay if re.search(r"bias$|LayerNorm", names[p])}
    assert all(decay[p] == (0.0 if p in spared else 0.05) for p in decay) and 0 < len(spared) < len(decay)
    assert set(decay) >= {p for p in seen.student.parameters() if p.requires_grad}


def test_projections_are_trained_and_are_what_the_loss_projects_with(run):
    """TinyBERT's two projections change with the updates, and the optimizer holds the very ones that the loss uses."""
    seen = run("tinybert")
    projections = {p for p, name in seen.names().items() if name.startswith("proj")}
    assert [tuple(p.shape) for p in projections] == [(64, 32)] * 2
    assert all(not torch.equal(seen.first[p], seen.last[p]) for p in projections)
    used = {args[2].weight for name, args, _ in seen.losses if name in ("embedding_mse", "hidden_mse")}
    assert used == projections
    released = run("tinybert as released")          # its embedding loss is none, so it has one projection
    assert sum(name.startswith("proj") for name in released.names().values()) == 1


def test_clip_scales_a_longer_gradient_down_to_its_length_and_leaves_a_shorter_one(run):
    """--clip N: what the optimizer receives has the direction of the gradient and at most the norm N; 0 is off."""
    free = run(dropout=0.0, budget_steps=2)
    norm = free.log[0]["gradient_norm"]
    lengths = {}
    for clip in (0.25 * norm, 4 * norm):
        seen = run(dropout=0.0, budget_steps=2, clip=clip)
        scale = min(1, clip / norm)
        whole = [g for u in free.updates[:1] for g in u.grads.values()]
        got = [g for u in seen.updates[:1] for g in u.grads.values()]
        assert all(torch.allclose(a * scale, b, atol=1e-7) for a, b in zip(whole, got, strict=True))
        lengths[clip] = math.sqrt(sum(g.square().sum().item() for g in got))
    assert list(lengths.values()) == pytest.approx([0.25 * norm, norm], rel=1e-4)


@pytest.mark.parametrize("name", ["vanilla_kd", "tinybert", "minilm"])
def test_micro_batches_add_up_to_the_batch(run, name):
    """The gradient that the optimizer receives, and the losses that are logged, are the mean over the whole batch,
    however many micro-batches it is cut into."""
    whole, parts = (run(name, micro_batch=micro, dropout=0.0, budget_steps=1) for micro in (8, 2))
    assert (len(whole.micro_batches), len(parts.micro_batches)) == (1, 4)
    for a, b in zip(whole.updates[0].grads.values(), parts.updates[0].grads.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    logged = {k: pytest.approx(v, rel=1e-4) for k, v in whole.log[0].items()
              if k in STRATEGIES[name].terms or k in ("loss", "gradient_norm")}
    assert len(logged) >= 4 and logged.items() <= parts.log[0].items()


# ------------------------------------------------------------------------------------------------------- dropout

@pytest.mark.parametrize("name", EVERY)
def test_every_forward_pass_of_training_drops_embeddings_attention_and_branches_under_a_mask_of_its_own(run, name):
    """In training the embeddings, each layer's attention probabilities and both of its residual branches are dropped
    at --dropout's rate, under another mask at each place, in each micro-batch and in each step."""
    seen = run(name)
    states, scores = (4, 32, 32), (4, 2, 32, 32)
    layers = 1 if name in ("minilm", "minilmv2") else 2                 # their last layer ends at its q, k, v
    for f in seen.micro_batches:
        assert [(shape, p) for shape, p, _, _ in f.drops] == [(states, 0.1)] + [
            (scores, 0.1), (states, 0.1), (states, 0.1)] * layers
        assert all(0.07 < zeros < 0.13 for _, _, zeros, _ in f.drops)
    masks = [mask for f in seen.micro_batches for *_, mask in f.drops]
    assert len(seen.micro_batches) == 16 and len(set(masks)) == len(masks)


def test_dropout_masks_follow_the_seed(run):
    """Another seed draws other dropout masks, the same seed the same ones for every strategy."""
    zero, one, other_strategy = ([mask for f in run(*a, **k).micro_batches for *_, mask in f.drops] for a, k in (
        ((), {}), ((), dict(seed=1)), (("vanilla_kd",), {})))
    assert not set(zero) & set(one) and zero == other_strategy


@pytest.mark.parametrize("name", EVERY)
def test_dropout_is_off_in_validation_and_on_again_after_it(run, name):
    """Student and teacher validate without dropout, also in the middle of a run; the student trains with it from the
    first step to the last, the teacher's is always off, but for the released code, which leaves it on."""
    seen = run(name)
    assert sorted(grouped(seen.validations)) == [0, 3, 6, 8]            # before, at a third, at two thirds, at the end
    assert not any(f.training or any(p or zeros for _, p, zeros, _ in f.drops) for f in seen.validations)
    assert all(f.training for f in seen.micro_batches)
    training, validation = seen.teachers
    assert len(training) == 16 * (name != "no_kd")
    assert not any(f.training or any(p for _, p, _, _ in f.drops) for f in validation)
    for f in training:
        assert f.training == ("released" in name) and all(p == 0.1 * f.training for _, p, _, _ in f.drops) and f.drops


# ---------------------------------------------------------------------------------------------------------- data

@pytest.mark.parametrize("name", EVERY)
def test_every_strategy_sees_the_same_blocks_in_the_same_order_under_the_same_masks(run, name):
    """All arms of a seed are fed the very same corrupted ids and masked positions, micro-batch by micro-batch, and
    validate on the same ones; the teacher reads what its student reads."""
    seen, base = run(name), run("no_kd")
    assert fed(seen.micro_batches) == fed(base.micro_batches) and len(seen.micro_batches) == 16
    assert fed(seen.validations) == fed(base.validations)
    training, _ = seen.teachers
    assert fed(training) == (fed(seen.micro_batches) if name != "no_kd" else [])


@pytest.mark.parametrize("name", EVERY)
def test_every_strategy_starts_from_the_same_weights(run, name):
    """All arms of a seed that start at random start from the same weights; another seed has others."""
    def start(seen):
        return {n: seen.first[p] for p, n in seen.names().items() if p in seen.first and not n.startswith("proj")}
    seen = run(name, init="random", budget_steps=1) if name == "distilbert" else run(name)
    ours, base, other = start(seen), start(run("no_kd")), start(run("no_kd", seed=1))
    assert len(ours) > 20 and all(torch.equal(w, base[n]) for n, w in ours.items())
    assert not any(torch.equal(w, other[n]) for n, w in ours.items() if w.ndim > 1)


LIMITED = dict(unique_tokens=16 * BODY + 7)        # 16 blocks: 8 steps of 8 are four epochs


def epochs(seen, blocks_of):
    """[{block: its masked positions}] in the order of reading, an item per epoch."""
    read = [pair for f in seen.micro_batches
            for pair in zip(blocks_of("train", f.ids, f.masked), map(tuple, f.masked.tolist()), strict=True)]
    return [dict(read[at:at + 16]) for at in range(0, len(read), 16)]


def test_unique_tokens_static_masks_and_the_seed_reach_the_loop(run, blocks_of):
    """--unique-tokens trains on the first so many ids alone, each epoch on all of them in another order under fresh
    masks, or with --static-masks under the first epoch's; order and masks follow the seed."""
    fresh, static, other = (epochs(run(**LIMITED, **changes), blocks_of) for changes in (
        {}, dict(static_masks=True), dict(seed=1)))
    for found in (fresh, static, other):
        assert len(found) == 4 and all(set(epoch) == set(range(16)) for epoch in found)
        assert len({tuple(epoch) for epoch in found}) == 4
    assert [list(epoch) for epoch in fresh] == [list(epoch) for epoch in static] != [list(epoch) for epoch in other]
    assert all(epoch == static[0] for epoch in static) and static[0] == fresh[0]
    for a, b in ((fresh[0], fresh[1]), (fresh[2], fresh[3]), (fresh[0], other[0])):
        assert sum(a[block] == b[block] for block in range(16)) <= 1


def test_training_reads_training_blocks_and_never_one_twice_in_an_epoch(run, blocks_of):
    """Training is fed blocks of train.bin, none twice in an epoch and none of val.bin."""
    seen = run()
    read = [block for f in seen.micro_batches for block in blocks_of("train", f.ids, f.masked)]
    assert len(set(read)) == 64 and None not in read
    assert not any(set(blocks_of("val", f.ids, f.masked)) - {None} for f in seen.micro_batches)


def test_validation_reads_all_of_the_validation_blocks_asked_for_and_the_same_for_every_seed(run, blocks_of):
    """Each validation is fed --val-blocks blocks of val.bin, each once, the same under the same masks for every
    seed."""
    seen, other = run(), run(seed=1)
    assert fed(seen.validations) == fed(other.validations)
    for forwards in grouped(seen.validations).values():
        read = [block for f in forwards for block in blocks_of("val", f.ids, f.masked)]
        assert len(read) == len(set(read)) == 12 and None not in read
        assert not any(set(blocks_of("train", f.ids, f.masked)) - {None} for f in forwards)


def test_validation_blocks_do_not_depend_on_the_micro_batch(run, blocks_of):
    """Where the micro-batch does not divide --val-blocks, the rest is validated too, and weighs what it should."""
    parts, whole = run(val_blocks=10, budget_steps=1), run(val_blocks=10, budget_steps=1, micro_batch=2)
    for seen in (parts, whole):
        for forwards in grouped(seen.validations).values():
            assert len({block for f in forwards for block in blocks_of("val", f.ids, f.masked)}) == 10
    assert parts.summary["val"]["mlm"] == pytest.approx(whole.summary["val"]["mlm"], rel=1e-3)


def test_two_ranks_share_each_batch_and_drop_under_masks_of_their_own(run, fair, watched_ranks):
    """Two processes read disjoint halves of the batches that one process reads, under dropout masks of which no two
    are the same, and update with one gradient."""
    ranks = watched_ranks(fair("tinybert", batch_size=16, budget_steps=2))
    one = run("tinybert", batch_size=16, budget_steps=2)
    for step in range(2):
        alone = [row for f in one.micro_batches if f.step == step for row in f.ids.tolist()]
        both = [[row for f in forwards if f["step"] == step for row in f["ids"].tolist()] for forwards, _ in ranks]
        assert [len(rows) for rows in both] == [8, 8] and sorted(both[0] + both[1]) == sorted(alone)
    masks = [mask for forwards, _ in ranks for f in forwards for *_, mask in f["drops"]]
    assert len(set(masks)) == len(masks) and all(p == 0.1 for forwards, _ in ranks for f in forwards
                                                 for _, p, _, _ in f["drops"])
    for a, b in zip(*(gradients for _, gradients in ranks), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_two_ranks_update_as_one_does(run, fair, watched_ranks):
    """Without dropout, the gradient of two processes is that of one with the same batch."""
    (_, ours), _ = watched_ranks(fair("tinybert", batch_size=16, budget_steps=2, dropout=0.0))
    alone = run("tinybert", batch_size=16, budget_steps=2, dropout=0.0)
    for update, gradients in zip(alone.updates, ours, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(update.grads.values(), gradients, strict=True))


@pytest.mark.parametrize("split", ["train", "val"])
def test_train_verifies_the_checksums_itself(fair, watched, corpus, tmp_path, split):
    """One flipped bit in the data, and train.py refuses before it has trained or written anything."""
    copy = shutil.copytree(corpus, tmp_path / "copy")
    raw = bytearray((copy / f"{split}.bin").read_bytes())
    raw[-2] ^= 1
    (copy / f"{split}.bin").write_bytes(raw)
    config = fair(data=str(copy))
    with watching() as seen, pytest.raises(UserError, match=f"{split}.bin: sha256"):
        train.train(config, say=lambda line: None)
    assert not seen.updates and not Path(config.out).exists()


def split_of(corpus, documents, out, val_fraction):
    """{split: its documents as tuples of ids} of a token directory made from `documents`."""
    manifest = prepare.prepare(prepare.Config(["made up"], str(out), str(corpus / "tokenizer.json"),
                                              val_fraction=val_fraction), documents)
    found = {}
    for name in ("train", "val"):
        ids = np.fromfile(out / f"{name}.bin", manifest["dtype"])
        sep = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]["[SEP]"]
        found[name] = [tuple(d) for d in np.split(ids, np.flatnonzero(ids == sep) + 1) if len(d)]
    return found


def test_the_val_fraction_holds_and_the_split_does_not_depend_on_order(corpus, tmp_path):
    """--val-fraction of the documents are kept for validation, chosen by their text: shuffled, they are the same."""
    documents = text(1000, seed=3)
    shuffled = random.Random(0).sample(documents, len(documents))
    for fraction in (0.05, 0.3):
        found = split_of(corpus, documents, tmp_path / f"{fraction}", fraction)
        n = len(found["val"])
        assert abs(n - 1000 * fraction) < 4 * math.sqrt(1000 * fraction * (1 - fraction))
        assert n + len(found["train"]) == 1000 and not set(found["val"]) & set(found["train"])
        again = split_of(corpus, shuffled, tmp_path / f"{fraction} shuffled", fraction)
        assert {name: Counter(d) for name, d in again.items()} == {name: Counter(d) for name, d in found.items()}


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_few_documents_are_on_one_side_each_chunk(corpus, tmp_path, fraction):
    """Of few documents, validation is about --val-fraction of the ids; no piece of it is in training, none is lost."""
    lines = "\n".join(text(500, seed=4)).split("\n")
    documents = ["\n".join(lines[i::4]) for i in range(4)]
    found = {name: [i for d in parts for i in d] for name, parts in split_of(
        corpus, documents, tmp_path / "few", fraction).items()}
    size = {name: len(ids) for name, ids in found.items()}
    assert abs(size["val"] / sum(size.values()) - fraction) < 0.05
    windows = {name: {tuple(ids[at:at + 48]) for at in range(len(ids) - 48)} for name, ids in found.items()}
    assert not windows["train"] & windows["val"]
    tokenizer = TokenDirectory(corpus).read_tokenizer()
    whole = [i for line in "\n".join(documents).split("\n")
             for i in tokenizer.encode(line, add_special_tokens=False).ids]
    sep = tokenizer.token_to_id("[SEP]")
    assert Counter(i for i in found["train"] + found["val"] if i != sep) == Counter(whole)


# -------------------------------------------------------------------------------------------- teacher, strategies

def source(x, forward):
    """Which module's output a loss was given: '1.query', 'layer 4', 'embedding', 'logits'; or the argument itself."""
    if isinstance(x, torch.nn.Module):
        return "projection"
    if not isinstance(x, torch.Tensor):
        return x
    if x.dtype == torch.long:
        return "labels"
    if x.shape[-1] == forward.model.config.vocab_size:
        return "logits"
    flat = x.transpose(1, 2).flatten(2) if x.ndim == 4 else x           # (B, S, D)
    found = [name for name, module in forward.model.named_modules() if module in forward.outputs
             and forward.outputs[module].shape == flat.shape and torch.equal(forward.outputs[module], flat.detach())]
    assert len(found) == 1, found
    name = found[0].removeprefix("bert.").removeprefix("encoder.layer.")
    name = re.sub(r"^(\d+)\.attention\.self\.", r"\1.", name)
    return re.sub(r"^(\d+)\.output\.LayerNorm$", r"layer \1", name).replace("embeddings.LayerNorm", "embedding")


def compared(seen):
    """The losses of a step's first micro-batch with where their arguments come from, the student's first."""
    (_, _, pair), found = seen.losses[0], []
    student = next(f for f in pair if f.grad)
    for name, args, forwards in seen.losses:
        if forwards[-1] is pair[-1]:
            n = 4 if name in ("attention_mse", "attention_kl") else 2
            sides = [student] * (n // 2) + [next((f for f in pair if not f.grad), student)] * (n // 2) + [student] * 9
            found.append((name, *(source(x, f) for x, f in zip(args, sides, strict=False))))
    return found


def relations(heads, student, teacher):
    return [("relation_kl", f"{student}.{x}", f"{teacher}.{x}", heads) for x in ("query", "key", "value")]


MLM, EMBEDDING = ("masked_lm_loss", "logits", "labels"), ("embedding_mse", "embedding", "embedding", "projection")
LAST = ("attention_mse", "1.query", "1.key", "4.query", "4.key")
HIDDEN = ("hidden_mse", "layer 1", "layer 4", "projection")


@pytest.mark.parametrize("name, changes, expected", [
    ("no_kd", {}, [MLM]),
    ("vanilla_kd", {}, [MLM, ("soft_cross_entropy", "logits", "logits", 1.0)]),
    ("vanilla_kd", dict(tau=3.0), [MLM, ("soft_cross_entropy", "logits", "logits", 3.0)]),
    ("distilbert", {}, [("soft_kl", "logits", "logits", 2.0), MLM, ("cosine_loss", "layer 1", "layer 3")]),
    ("tinybert", {}, [EMBEDDING, LAST, HIDDEN]),
    ("minilm", {}, [("attention_kl", *LAST[1:]), ("value_relation_kl", "1.value", "4.value")]),
    ("minilmv2", {}, relations(4, 1, 4)),
    ("vanilla_kd as released", {}, [MLM, ("soft_cross_entropy_over_v", "logits", "logits", 1.0, 300)]),
    ("tinybert as released", {}, [("attention_mse", "0.query", "0.key", "0.query", "0.key"), LAST, HIDDEN]),
    ("minilm as released", {}, relations(2, 1, 4)),
    ("minilmv2 as released", {}, relations(2, 1, 4))])
def test_each_strategy_compares_the_layers_that_it_says(run, name, changes, expected):
    """Each loss is given the outputs of the right layer on each side, with the right temperature and the right number
    of relation heads: the last layers, or what the released code takes."""
    assert compared(run(name, **changes, **dict(budget_steps=1) if changes else {})) == expected


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_a_student_from_the_teacher_starts_with_its_first_and_last_layer(run, make_teacher, fair, watched, depth):
    """--init teacher copies the teacher's first layer, its last and evenly between, the embeddings and the LM head."""
    if not hasattr(make_teacher, "five"):
        make_teacher.five = make_teacher("5L32", 1)
    seen = watched(fair(init="teacher", teacher=str(make_teacher.five), size=f"{depth}L32", budget_steps=1))
    teacher = checkpoint.load_mlm(make_teacher.five).model.state_dict()
    layers = {1: [0], 2: [0, 4], 3: [0, 2, 4], 4: [0, 1, 3, 4], 5: [0, 1, 2, 3, 4]}[depth]
    for p, name in seen.names().items():
        theirs = re.sub(r"layer\.(\d+)\.", lambda m: f"layer.{layers[int(m[1])]}.", name)
        assert torch.equal(seen.first[p], teacher[theirs]), name


@pytest.mark.parametrize("teacher, student, expected", [
    (12, 6, [0, 2, 4, 7, 9, 11]), (12, 4, [0, 4, 7, 11]), (12, 5, [0, 3, 6, 8, 11]), (6, 3, [0, 3, 5]), (4, 2, [0, 3]),
    (24, 12, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]), (24, 7, [0, 4, 8, 12, 15, 19, 23]), (4, 1, [0])])
def test_the_layers_that_deeper_teachers_give(teacher, student, expected):
    """The same for the depths that people have."""
    of = {layers: BertForMaskedLM(BertConfig.of_size(f"{layers}L8", 1, vocab_size=8, max_position_embeddings=8))
          for layers in (teacher, student)}
    with torch.no_grad():
        for i, layer in enumerate(of[teacher].bert.encoder["layer"]):
            layer.output.dense.bias.fill_(i)
        start_from(of[student], of[teacher])
    assert [layer.output.dense.bias[0].item() for layer in of[student].bert.encoder["layer"]] == expected


def test_bf16_is_what_student_and_teacher_compute_in_where_it_is_said(run):
    """--bf16: the student's and the teacher's layers give bf16, the weights that are updated stay fp32; --no-bf16: all
    is fp32."""
    for bf16 in (False, True):
        seen = run("vanilla_kd", **dict(bf16=True, budget_steps=1) if bf16 else {})
        training, _ = seen.teachers
        for f in (seen.micro_batches[0], training[0]):
            linear = {out.dtype for m, out in f.outputs.items() if isinstance(m, torch.nn.Linear)}
            assert linear == {torch.bfloat16 if bf16 else torch.float32}
        assert {p.dtype for p in seen.first} == {torch.float32} and seen.summary["bf16"] == bf16


def test_compile_compiles_student_teacher_and_losses_and_nothing_where_it_is_off(fair, monkeypatch):
    """--compile hands the student, the teacher and the losses to torch.compile; --no-compile and the CPU nothing."""
    for flag, expected in ((True, 3), (False, 0), (None, 0)):
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda f, compiled=compiled, **options: compiled.append(f) or f)
        train.train(fair("vanilla_kd", compile=flag, budget_steps=1), say=lambda line: None)
        assert len(compiled) == expected
        assert [type(f).__name__ for f in compiled[:2]] == ["BertForMaskedLM"] * min(2, expected)


# --------------------------------------------------------------------------------------------------------- clock

def test_the_clock_counts_student_and_teacher_and_nothing_beside_them(fair, watched, monkeypatch, often):
    """Of a time budget, training forward passes of student and teacher are charged; validation, checkpoints and log
    lines are not, in the middle of the run as at its ends; the learning rate follows what is charged, and the stages'
    seconds add up to it."""
    at, cost = [0.0], dict(student=1.0, teacher=0.5, validation=100.0, update=0.25)
    dumps, fsync = json.dumps, os.fsync

    def passes(seconds, call):
        def slow(*args, **named):
            at[0] += seconds
            return call(*args, **named)
        return slow

    def on(kind):
        at[0] += cost[kind]
    monkeypatch.setattr(time, "perf_counter", lambda: at[0])
    monkeypatch.setattr(json, "dumps", passes(10_000.0, dumps))         # what a line of the log is made with
    monkeypatch.setattr(os, "fsync", passes(1000.0, fsync))  # what a checkpoint waits for
    seen = watched(fair("vanilla_kd", budget_steps=None, budget_hours=60 / 3600, warmup=0.06, fractions="0.5"),
                   on, now=lambda: at[0])
    step = 2 * 1.5                                                      # two micro-batches, then the update
    charged = [step + i * (step + 0.25) for i in range(19)]             # the first reading at or above 60 ends it
    assert charged[-2] < 60 <= charged[-1] and len(seen.updates) == 19
    assert [u.groups[0]["lr"] for u in seen.updates] == pytest.approx(
        [schedule(min(1, s / 60), 5e-4, 0.06) for s in charged])
    assert seen.updates[-1].groups[1]["lr"] == 0
    assert seen.summary["charged_seconds"] == pytest.approx(charged[-1] + 0.25)
    assert seen.summary["overshoot"] == pytest.approx((charged[-1] + 0.25) / 60 - 1)
    assert seen.summary["charged"] == dict(data=0, teacher=19 * 1.0, student=19 * 2.0, optimizer=19 * 0.25)
    assert sum(seen.summary["charged"].values()) == seen.summary["charged_seconds"]
    assert sorted(grouped(seen.validations)) == [0, 7, 13, 19]
    assert seen.summary["uncharged"]["validation"] == 100 * (len(seen.validations) * 2 + 3)
    assert seen.summary["uncharged"]["checkpoints"] > 19 * 11_000      # a line and a checkpoint after each step


def flops(shape, k, S=32):
    """Of the matmuls of one block's forward pass with the LM head at k positions, by hand."""
    D, V = shape.hidden_size, shape.vocab_size
    return shape.num_hidden_layers * S * (24 * D ** 2 + 4 * S * D) + k * (2 * D ** 2 + 2 * D * V)


@pytest.mark.parametrize("name", ["no_kd", "vanilla_kd"])
def test_a_flop_budget_charges_the_teacher(fair, watched, deep_teacher, name):
    """Under a FLOP budget a step costs the student's forward pass three times and the teacher's once; the learning
    rate follows what is spent."""
    teacher = checkpoint.read_config(deep_teacher)
    student = BertConfig.of_size("2L32", 2, vocab_size=teacher.vocab_size)
    price = 8 * (3 * flops(student, 5) + (flops(teacher, 5) if name != "no_kd" else 0))
    seen = watched(fair(name, budget_steps=None, budget_flops=5.5 * price))
    assert seen.summary["steps"] == 6 and seen.summary["overshoot"] == pytest.approx(6 / 5.5 - 1, abs=0.15)
    assert seen.summary["student_flops"] + seen.summary["teacher_flops"] == pytest.approx(6 * price, rel=0.1)
    peak = 1e-3 if name == "no_kd" else 5e-4
    assert [u.groups[0]["lr"] for u in seen.updates] == pytest.approx(
        [schedule(i / 5.5, peak, 0.25) for i in range(6)], rel=0.15)
    assert (seen.summary["teacher_flops"] > seen.summary["student_flops"] / 3) == (name != "no_kd")


# --------------------------------------------------------------------------------------------------------- judge

@pytest.fixture
def task(teacher, tmp_path):
    """A task that a tiny model learns: the last word decides."""
    tokens = [t for t in checkpoint.read_tokenizer(teacher).get_vocab() if t.isalpha() and len(t) > 2][:20]
    rng = np.random.default_rng(0)
    (tmp_path / "task").mkdir()
    for name, n in (("train", 160), ("dev", 100)):
        rows = [(label, " ".join([*rng.choice(tokens[2:], rng.integers(3, 6)), tokens[label]]))
                for label in rng.integers(2, size=n)]
        (tmp_path / f"task/{name}.tsv").write_text("sentence\tlabel\n" + "".join(f"{t}\t{y}\n" for y, t in rows))
    return tmp_path / "task"


def fine_tuned(teacher, task, **other):
    """(scores, Seen) of finetune_glue on the task."""
    config = finetune_glue.Config(**dict(
        model=str(teacher), tasks=f"own={task}", batch_sizes="8", peak_lrs="3e-3", seeds=1, epochs=1, max_len=16,
        out=str(task.parent / "out"), device="cpu") | other)
    with watching() as seen:
        return finetune_glue.score_model(config, say=lambda line: None)["tasks"]["own"], seen


def test_fine_tuning_trains_with_the_dropout_of_its_flag_and_predicts_without(teacher, task):
    """Fine-tuning drops at --dropout's rate in the encoder and before the classifier, under another mask in each
    step, and predicts without."""
    _, seen = fine_tuned(teacher, task, dropout=0.3)
    steps, dev = seen.micro_batches[:20], seen.validations              # repeated where it predicts one class
    assert len(steps) == 20 and dev and all(f.training for f in steps) and not any(f.training for f in dev)
    for f in steps:
        shapes = Counter(len(shape) for shape, *_ in f.drops)
        assert shapes == {3: 1 + 2 * 3, 4: 3, 2: 1}                     # states, attention, classifier
        assert all(p == 0.3 and zeros > 0.1 for _, p, zeros, _ in f.drops)
    assert np.mean([zeros for f in steps for _, _, zeros, _ in f.drops]) == pytest.approx(0.3, abs=0.02)
    masks = [mask for f in steps for *_, mask in f.drops]
    assert len(set(masks)) == len(masks) and not any(p for f in dev for _, p, _, _ in f.drops)


def test_the_order_of_the_examples_follows_the_seed(teacher, task):
    """Fine-tuning reads each example once an epoch, in an order that its seed alone decides."""
    orders = {}
    for seed, out in ((1, "a"), (2, "b"), (1, "c")):
        _, seen = fine_tuned(teacher, task, first_seed=seed, out=str(task.parent / out))
        orders[out] = [row for f in seen.micro_batches[:20] for row in f.ids.tolist()]
        assert len(orders[out]) == 160
    whole = {out: Counter(tuple(i for i in row if i) for row in rows) for out, rows in orders.items()}
    assert orders["a"] == orders["c"] != orders["b"] and whole["a"] == whole["b"]


def test_the_grid_takes_the_best_point_and_reports_fresh_seeds(teacher, task):
    """Of a learning rate that learns and two that do not, the grid takes the one that does, wherever it stands; the
    score is the mean of other seeds than the grid's."""
    result, _ = fine_tuned(teacher, task, peak_lrs="1e-9,3e-3,2e-9", epochs=4, dropout=0.0)
    trials = {f.stem: json.loads(f.read_text()) for f in (task.parent / "out/trials").glob("*.json")}
    grid = [trials[f"own-b8-lr{lr}-seed0"]["scores"]["accuracy"] for lr in ("1e-09", "0.003", "2e-09")]
    assert grid[1] > 80 > max(grid[0], grid[2]) and result["peak_lr"] == 3e-3 and result["trials"] == len(trials) == 4
    assert result["scores"] == [trials["own-b8-lr0.003-seed1"]["scores"]["accuracy"]]


def test_trials_of_another_model_are_not_reused(teacher, task, tmp_path):
    """A finished trial counts for the weights that it was run with: other weights under the same path are refused."""
    model = shutil.copytree(teacher, tmp_path / "model")
    fine_tuned(model, task)
    loaded = checkpoint.load_mlm(model).model
    with torch.no_grad():
        loaded.bert.encoder["layer"][0].output.dense.bias += 0.1
    checkpoint.save_model(model, loaded, checkpoint.read_tokenizer(model))
    with pytest.raises(UserError, match="was run with another model"):
        fine_tuned(model, task)


def test_the_score_of_a_task_is_the_first_of_its_official_metrics():
    """What picks the grid's point and stands for a task: the paper's metric for each."""
    assert {name: task.metrics[0] for name, task in glue.TASKS.items()} == dict(
        cola="matthews", sst2="accuracy", mrpc="f1", stsb="pearson", qqp="accuracy", mnli="accuracy", qnli="accuracy",
        rte="accuracy", wnli="accuracy")


# -------------------------------------------------------------------------------------------------------- report

def score_of(embedding):
    """A made-up judge's score: a number that tells weights apart."""
    return 50 + 10 * math.sin(1e3 * embedding.double().sum().item())


@pytest.fixture
def judged(corpus, deep_teacher, task, tmp_path, monkeypatch):
    """Runs compare.py with a judge that looks at the weights alone; `tasks` {name: score - its score}."""
    def main(tasks, **other):
        def score(config, say=print):
            weights = checkpoint.read_weights(checkpoint.find_model(config.model))
            mean = score_of(weights["bert.embeddings.word_embeddings.weight"])
            Path(config.out).mkdir(parents=True, exist_ok=True)
            return dict(tasks={name: dict(metric="accuracy", mean=mean + more, std=0.0, scores=[mean + more], n=100,
                                          collapsed=0, majority=50.0, others={}) for name, more in tasks.items()})
        def ngrams(*_):
            return dict(scores=dict.fromkeys(tasks, 1.0), tasks={name: dict(
                metric="accuracy", n=100, scores=[1.0], collapsed=0, majority=50.0) for name in tasks})
        monkeypatch.setattr(finetune_glue, "score_model", score)
        monkeypatch.setattr(finetune_glue, "kept_predictions", lambda *_: None)
        monkeypatch.setattr(compare, "score_ngrams", ngrams)
        monkeypatch.setattr(compare, "in_hand", lambda *_: "")
        monkeypatch.setattr(judge, "keep_examples", lambda *_: None)
        monkeypatch.setattr(judge, "arrays_of", lambda *_: {})
        recipe = {k: v for k, v in FAIR.items() if k in compare.Config.__dataclass_fields__ and "budget" not in k}
        out = tmp_path / "out"
        compare.main(compare.Config(**recipe | dict(
            data=str(corpus), teacher=str(deep_teacher), tasks=f"mine={task}", out=str(out), budget_steps="2",
            finetune_batch_sizes="32", finetune_lrs="5e-5", finetune_epochs=1, finetune_seeds=1, max_len=16) | other))
        return json.loads((out / "results.json").read_text()), (out / "table.md").read_text()
    return main


def test_rows_of_the_untrained_students_and_of_the_teacher_are_theirs(judged, run, deep_teacher, capsys):
    """Each row shows the score of the weights that it names: every run's own, the untrained student of each seed, the
    teacher."""
    kept, table = judged(dict(mine=0.0), seeds=2, arms="no_kd,tinybert")
    word = "bert.embeddings.word_embeddings.weight"
    for r in kept["results"]:
        assert r["average"] == pytest.approx(score_of(checkpoint.read_weights(Path(r["model"]))[word]))
        assert f"{r['strategy']}-" in r["model"] and r["model"].endswith(f"seed{r['seed']}/model")
    untrained = [next(w for p, w in seen.first.items() if seen.names()[p] == word) for seen in (run(), run(seed=1))]
    random_init, of_teacher = ([r["average"] for r in y["runs"]] for y in kept["yardsticks"][2:])
    assert random_init == pytest.approx([score_of(w) for w in untrained])
    assert of_teacher == pytest.approx([score_of(checkpoint.read_weights(deep_teacher)[word])])
    for name, mean in (("teacher", of_teacher[0]), ("random init", np.mean(random_init))):
        row, = (line for line in table.splitlines() if f"| {name} |" in line)
        assert f" {mean:.1f} " in row
    by_seed = {(r["strategy"], r["seed"]): r["average"] for r in kept["results"]}
    lead = np.mean([by_seed["tinybert", seed] - by_seed["no_kd", seed] for seed in (0, 1)])
    row, = (line for line in table.splitlines() if "| tinybert |" in line)
    assert f" {lead:+.1f} [" in row


@pytest.mark.parametrize("tasks, added", [
    (dict(qnli=1, sst2=2, mnli=3, mrpc=4, qqp=5, rte=6, cola=7, stsb=30, wnli=40), 4.0),
    (dict(qnli=1, sst2=2, mnli=3, mrpc=4, qqp=5, rte=6, stsb=14), 5.0)])
def test_the_average_is_over_the_papers_seven_where_all_are_there(judged, tasks, added, capsys):
    """The average is over QNLI, SST-2, MNLI, MRPC, QQP, RTE and CoLA where all are there, else over all there are."""
    kept, _ = judged({name: float(more) for name, more in tasks.items()}, arms="no_kd")
    for each in kept["results"]:
        assert each["average"] == pytest.approx(each["scores"]["qnli"] - 1 + added)
    first, = kept["yardsticks"][2]["runs"][:1]
    assert first["average"] == pytest.approx(first["scores"]["qnli"] - 1 + added)
