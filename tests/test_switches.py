"""What the plateau of masked LM is attacked with: block lengths in turn, mask rates, the start, the optimizer."""
import contextlib

import pytest
import torch
from test_reliability import final, interrupted

import train
from data import Blocks
from model import BertConfig, BertForMaskedLM
from plumbing.checkpoint import load_run
from plumbing.cli import UserError
from plumbing.price import flops_per_block
from plumbing.student import initial_student
from plumbing.tokens import TokenDirectory
from step import make_arm

pytestmark = pytest.mark.usefixtures("often")
QUIET = dict(say=lambda line: None)


@pytest.mark.parametrize("changes, message", [
    (dict(seq_len="16:0.5,32"), None), (dict(seq_len="16:.25,16:.5,32"), None),
    *((dict(seq_len=text), f"--seq-len {text}: must be a whole number, at least 4 and at most 8192, or several in "
       "turn") for text in ("16:0.5", "16,32", "16:0.5:1,32", "16:1,32", "16:0,32", "16:nan,32", "16:.5,8:.4,32",
                            "2:.5,32", "x:.5,32", "16:.5,", "")),
    (dict(seq_len="24:0.5,32"), "--seq-len 24:0.5,32: each must divide the last one"),
    (dict(init_std=0), "--init-std 0: must be a number, at least 1e-9"), (dict(optimizer="muon"), None),
    (dict(optimizer="sgd"), "--optimizer sgd: must be one of adamw, muon")])
def test_what_the_switches_allow(tiny, changes, message):
    with pytest.raises(UserError) if message else contextlib.nullcontext() as e:
        tiny(**changes).check()
    assert not message or message in str(e.value) and "\n" not in str(e.value)


def test_the_budget_is_cut_where_strategy_or_length_change(tiny):
    parts = tiny(strategy="tinybert:0.3/no_kd", seq_len="8:.2,16:0.5,32").phases
    cuts = [0.2, 0.3, 0.5, 1]
    assert [p.end for p in parts] == cuts and [p.begin for p in parts] == [0, *cuts[:-1]]
    for part in parts:
        middle = (part.begin + part.end) / 2
        assert part.seq_len == (8 if middle < 0.2 else 16 if middle < 0.5 else 32) and part.seq_len * part.times == 32
        assert part.span == ((0, 0.3) if middle < 0.3 else (0.3, 1)) and part.name.split()[0] in ("tinybert", "no_kd")
    assert len({p.name for p in parts}) == len(parts)
    whole, = tiny().phases
    assert whole.name == "no_kd" and whole.progress(0.3) == 0.3 and whole.seq_len == 32


def test_every_step_has_as_many_tokens_in_blocks_of_its_length_under_one_learning_rate(tiny, watched, corpus):
    seen = watched(tiny(seq_len="8:0.25,16:0.5,32", seed=3, micro_batch=4))
    directory = TokenDirectory(corpus)
    assert [u.groups[0]["lr"] for u in seen.updates] == pytest.approx(
        [train.learning_rate(i / 20, 3e-3) for i in range(20)])
    for i in range(20):
        S = 8 if i < 5 else 16 if i < 10 else 32
        ids, masked = (torch.cat([getattr(f, name) for f in seen.micro_batches if f.step == i])
                       for name in ("ids", "masked"))
        assert ids.shape == (8 * 32 // S, S) and masked.shape == (len(ids), round(0.15 * S))
        expected = Blocks(directory, "train", S, seed=3).batch(i, len(ids))
        assert torch.equal(ids, torch.from_numpy(expected.ids))
        assert torch.equal(masked, torch.from_numpy(expected.masked))
    assert all(f.ids.shape[1] == 32 and f.masked.shape[1] == 5 for f in seen.validations)
    assert seen.summary["tokens"] == 20 * 8 * 32 and set(seen.first) == set(seen.last)


SWITCHED = {
    "lengths": dict(seq_len="8:0.2,16:0.5,32"),
    "clm": dict(strategy="clm:0.3/no_kd"),
    "muon": dict(optimizer="muon"),
    "both": dict(strategy="tinybert:0.3/no_kd", seq_len="16:0.4,32"),
}


@pytest.mark.parametrize("switch", SWITCHED)
def test_a_run_that_died_on_either_side_of_a_change_ends_bitwise_like_one_that_did_not(
        tiny, tmp_path, monkeypatch, switch):
    common = dict(dropout=0.1, micro_batch=4, val_times=3, **SWITCHED[switch])
    whole = train.train(tiny(**common, out=str(tmp_path / "whole")), **QUIET)
    config = tiny(**common, out=str(tmp_path / "died"))
    ends = [round(20 * phase.end) for phase in config.phases[:-1]] or [7]
    for at in sorted({ends[0] - 1, ends[0], ends[0] + 1, ends[-1]}):
        interrupted(monkeypatch, config, at)
    died = train.train(config, **QUIET)
    assert final(tmp_path / "died") == final(tmp_path / "whole")
    momenta = [[slot["momentum_buffer"].tolist() for slot in state["muon"]["state"].values()] if state["muon"] else None
               for state in (load_run(tmp_path / name) for name in ("died", "whole"))]
    assert momenta[0] == momenta[1] and (momenta[0] is None) == (switch != "muon")
    assert died["phases"] == whole["phases"] and died["val"] == whole["val"]


def test_two_ranks_change_length_as_one_does(tiny, watched, watched_ranks, tmp_path):
    config = dict(seq_len="16:0.5,32", batch_size=16, budget_steps=6)
    (_, ours), (_, theirs) = watched_ranks(tiny(**config, out=str(tmp_path / "two")))
    alone = watched(tiny(**config, out=str(tmp_path / "one")))
    assert len(alone.updates) == len(ours) == 6
    for update, a, b in zip(alone.updates, ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(update.grads.values(), a, strict=True))


def test_each_part_is_charged_what_its_blocks_cost(tiny):
    sizes = [BertConfig.of_size(size, vocab_size=300) for size in ("2L32", "3L48")]
    config = tiny(strategy="tinybert", seq_len="8:0.5,32")
    for i in (0, len(config.phases) - 1):
        part = config.phases[i]
        alone = tiny(strategy="tinybert", seq_len=part.seq_len)
        assert flops_per_block(config, *sizes, i) == tuple(part.times * n for n in flops_per_block(alone, *sizes))
    summary = train.train(tiny(seq_len="8:0.5,32", budget_steps=None, budget_flops=4e8), **QUIET)
    (first, second), prices = summary["phases"], [flops_per_block(tiny(seq_len=s), *sizes)[0] for s in (8, 32)]
    assert first["student_flops"] == first["steps"] * 32 * prices[0] and first["teacher_flops"] == 0
    assert second["student_flops"] == second["steps"] * 8 * prices[1] and prices[1] != 4 * prices[0]
    assert 0 <= first["student_flops"] - 2e8 < 32 * prices[0] and 0 <= summary["student_flops"] - 4e8 < 8 * prices[1]


# ------------------------------------------------------------------------------------------------------------ clm

def test_a_causal_position_sees_no_later_id():
    torch.manual_seed(0)
    model, ids = BertForMaskedLM(BertConfig.of_size("2L32", 2, vocab_size=50)).eval(), torch.randint(5, 50, (3, 12))
    for real in (None, torch.ones(3, 12, dtype=torch.bool)):
        before = model(ids, real=real, want=("all_logits",), causal=True)["all_logits"]
        for at in range(12):
            changed = ids.clone()
            changed[:, at] = (ids[:, at] + 7) % 50
            after = model(changed, real=real, want=("all_logits",), causal=True)["all_logits"]
            assert torch.equal(after[:, :at], before[:, :at])
            assert all((after[:, i] != before[:, i]).any() for i in range(at, 12))


def test_what_causal_blocks_ask_for_is_the_next_id_where_mlm_would_mask(corpus):
    directory = TokenDirectory(corpus)
    mlm, clm = (Blocks(directory, "train", 32, seed=3, causal=causal).batch(2, 16) for causal in (False, True))
    clean = Blocks(directory, "train", 32, seed=3)
    clean = clean.read(clean.order(0)[32:48])
    assert (clm.ids == clean).all() and (mlm.ids != clean).any() and (mlm.labels == clm.labels).all()
    for row, at, labels, masked in zip(clean, clm.masked, clm.labels, mlm.masked, strict=True):
        assert [row[i + 1] for i in at] == list(labels) and [i + 1 for i in at] == list(masked)


def test_clm_is_the_mean_of_minus_log_p_of_the_next_id_and_mlm_follows(tiny, watched, corpus):
    """Against a transcription: one position at a time, from the ids before it alone, through one unmasked layer."""
    seen = watched(tiny(strategy="clm:0.5/no_kd", size="1L32", budget_steps=2, batch_size=2, micro_batch=2))
    clm, mlm = seen.micro_batches
    assert clm.ids.tolist() == Blocks(TokenDirectory(corpus), "train", 32, 0, causal=True).batch(0, 2).ids.tolist()
    student, losses = BertForMaskedLM(seen.student.config).eval(), []
    names = seen.names()
    student.load_state_dict({names[p]: value for p, value in seen.first.items()}
                            | {k: v for k, v in seen.student.state_dict().items() if k not in names.values()})
    for row, masked in zip(clm.ids, clm.masked, strict=True):
        for at in masked.tolist():
            logits = student(row[None, :at + 1])["logits"][0, -1].double()
            losses.append(-logits.log_softmax(-1)[row[at + 1]].item())
    lines = [line for line in seen.log if "val" not in line]
    assert lines[0]["clm"] == lines[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert "mlm" in lines[1] and (mlm.ids == TokenDirectory(corpus).special["[MASK]"]).any()
    first, second = seen.summary["phases"]
    assert set(first["val"]) == {"clm"} and set(seen.summary["val"]) == {"mlm"}
    assert first["student_flops"] == second["student_flops"] and first["teacher_flops"] == 0


# ------------------------------------------------------------------------------------------- start and optimizer

def test_the_random_start_has_the_standard_deviation_asked_for(tiny, corpus):
    directory = TokenDirectory(corpus)
    one, two = (initial_student(tiny(init_std=std), directory).state_dict() for std in (0.02, 0.06))
    assert all(torch.allclose(3 * one[name], two[name]) for name in one if one[name].ndim > 1)
    assert two["bert.encoder.layer.0.attention.self.query.weight"].std().item() == pytest.approx(0.06, rel=0.1)


def orthogonalised(g):
    """Newton and Schulz's five steps with Muon's coefficients, in fp32 (its own are bf16)."""
    x = g.T if len(g) > g.shape[1] else g
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(g) > g.shape[1] else x


def test_muon_updates_hidden_matrices_at_adamws_scale_and_adamw_the_rest(tiny, corpus):
    arm = make_arm(tiny(strategy="tinybert", optimizer="muon", weight_decay=0.1), TokenDirectory(corpus))
    named = {name: p for name, p in arm.student.named_parameters() if p.requires_grad}
    hidden = {p for name, p in named.items() if p.ndim == 2 and "embeddings" not in name}
    adamw, muon = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in arm.optimizers)
    assert set(muon) == hidden and len(muon) == 2 * 6
    assert set(adamw) == {*named.values(), *arm.proj.parameters()} - hidden
    assert len(adamw) + len(muon) == len(arm.trained)
    torch.manual_seed(0)
    for p in arm.trained:
        p.grad = torch.randn_like(p)
    before, grads = ({p: x.detach().clone() for p, x in pairs} for pairs in (
        [(p, p) for p in muon], [(p, p.grad) for p in muon]))
    arm.update(0.01, 1.0)
    for p in muon:                          # the first step: momentum 0.95, Nesterov, of 0.05 times the gradient
        expected = before[p] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(p.shape) ** 0.5 * orthogonalised(grads[p])
        assert torch.allclose(p, expected, atol=0.06 * (p - before[p]).abs().max().item())
        assert (p - before[p]).square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.3)
    assert all(group["lr"] == 0.01 for optimizer in arm.optimizers for group in optimizer.param_groups)
    assert all(p.grad is None for p in arm.trained)


def test_muons_own_products_are_charged(tiny):
    sizes = [BertConfig.of_size(size, vocab_size=300) for size in ("2L32", "3L48")]
    plain, muon = (flops_per_block(tiny(optimizer=name), *sizes)[0] for name in ("adamw", "muon"))
    shapes = 2 * (4 * [(32, 32)] + 2 * [(32, 128)]) + [(32, 32)]        # short side, long side
    by_hand = sum(5 * (2 * m * m * n + 2 * m ** 3 + 2 * m * m * n) for m, n in shapes)
    assert muon - plain == pytest.approx(by_hand / 8)
