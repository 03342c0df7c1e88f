"""What the plateau of masked LM is attacked with: causal LM first, the start, the optimizer."""
import contextlib

import pytest
import torch
from test_reliability import final, interrupted

import train
from data import Blocks
from model import BertConfig, BertForMaskedLM
from plumbing.budget import flops_per_block
from plumbing.checkpoint import load_run
from plumbing.cli import UserError
from plumbing.student import initial_student
from plumbing.tokens import TokenDirectory
from step import make_arm

pytestmark = pytest.mark.usefixtures("often")
QUIET = dict(say=lambda line: None)


@pytest.mark.parametrize("changes, message", [
    (dict(seq_len="16:0.5,32"), "--seq-len 16:0.5,32: must be a whole number, at least 4 and at most 8192"),
    (dict(init_std=0), "--init-std 0: must be a number, at least 1e-9"), (dict(optimizer="muon"), None),
    (dict(optimizer="sgd"), "--optimizer sgd: must be one of adamw, muon")])
def test_what_the_switches_allow(tiny, changes, message):
    with pytest.raises(UserError) if message else contextlib.nullcontext() as e:
        tiny(**changes).check()
    assert not message or message in str(e.value) and "\n" not in str(e.value)


SWITCHED = {
    "clm": dict(strategy="clm:0.3/no_kd"),
    "muon": dict(optimizer="muon"),
    "tinybert": dict(strategy="tinybert:0.3/no_kd"),
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
