"""Every loss: one function = one equation; and every strategy: one entry of STRATEGIES.  Read it second.

Pure functions of tensors: student first, teacher second, a scalar out.  tests/test_kd_losses.py holds each of them
against the slowest possible transcription of its formula.

    B batch, S sequence, M masked positions, V vocabulary, N heads, H head size, D hidden size; _s student,
    _t teacher; tau temperature; `real` (B, S): what is not padding, or None where blocks are full.

Two rules hold everywhere.  A *distribution* is summed (over V, or over the keys) and then averaged over positions
and heads; a *mean squared error* is averaged over every real element.  (`reduction="mean"` on a distribution divides
by V as well: a factor of 30,522 that several public distillation codes carry.)  And a loss is computed in at least
fp32 with autocast off: under autocast even the matmul of two fp32 tensors runs in bf16.

To add a strategy: write its loss as a function, and add a Strategy to STRATEGIES.  Nothing else has to change.
"""
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def at_least_fp32(loss):
    """Decorator: autocast off, and 16-bit tensors promoted to fp32 (fp64 stays, so that gradcheck works)."""
    @functools.wraps(loss)
    def promoted(x, *args, **named):
        with torch.autocast(x.device.type, enabled=False):
            return loss(promote(x), *map(promote, args), **{name: promote(a) for name, a in named.items()})
    return promoted


def promote(x):
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


# ---------------------------------------------------------------------------------------- losses on the logits

@at_least_fp32
def masked_lm_loss(z_s, labels):
    """Masked language modelling (Devlin 2018, arXiv 1810.04805, section 3.1): mean over M of -log softmax(z_s)[label].

    z_s (M, V), labels (M,).  Summed over V (one-hot), averaged over the masked positions."""
    return F.cross_entropy(z_s, labels)


@at_least_fp32
def soft_cross_entropy(z_s, z_t, tau=1.0):
    """Soft targets (Hinton 2015, arXiv 1503.02531, section 2): cross-entropy with the teacher's distribution.

        tau^2 * mean over M of  sum over V of  -softmax(z_t / tau) * log_softmax(z_s / tau)

    z_s, z_t (M, V).  Summed over V, averaged over the masked positions; tau^2 keeps the gradient's size."""
    p_t = (z_t / tau).softmax(-1)                                                           # (M, V)
    return -tau ** 2 * (p_t * (z_s / tau).log_softmax(-1)).sum(-1).mean()


# ------------------------------------------------------------------------- losses on states: TinyBERT's two MSEs

@at_least_fp32
def hidden_mse(h_s, h_t, proj=None, real=None):
    """TinyBERT's L_hidn = MSE(H_s W_h, H_t) (Jiao 2020, arXiv 1909.10351, eq. 8); W_h = `proj`, None for equal widths.

    h_s (B, S, D_s), h_t (B, S, D_t).  Averaged over the real positions and D_t."""
    error = ((h_s if proj is None else proj(h_s)) - h_t).square().mean(-1)                  # (B, S)
    return error.mean() if real is None else error.masked_select(real.bool()).mean()


def embedding_mse(e_s, e_t, proj=None, real=None):
    """TinyBERT's L_embd = MSE(E_s W_e, E_t) (arXiv 1909.10351, eq. 9).  Shapes and averages as hidden_mse.

    Departure: the text says the embedding matrices; its code, like ours, matches the embedding block's output."""
    return hidden_mse(e_s, e_t, proj, real)


# --------------------------------------------------------------------- losses on attention: TinyBERT's and MiniLM's

def scores(q, k):
    """Attention scores before the softmax, q k^T / sqrt(H): (B, N, S, H) twice -> (B, N, S, S)."""
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


@at_least_fp32
def attention_mse(q_s, k_s, q_t, k_t, real=None):
    """TinyBERT's L_attn = 1/N * sum over heads of MSE(A_s, A_t), A before the softmax (arXiv 1909.10351, eq. 7).

    All (B, N, S, H), N equal on both sides.  Averaged over heads and over the pairs of a real query and a real key."""
    error = (scores(q_s, k_s) - scores(q_t, k_t)).square().mean(1)                          # (B, S, S)
    if real is None:
        return error.mean()
    real = real.bool()
    return error.masked_select(real[:, :, None] & real[:, None, :]).mean()


@at_least_fp32
def attention_kl(q_s, k_s, q_t, k_t, real=None):
    """MiniLM's L_AT (Wang 2020, arXiv 2002.10957, eq. 5): the divergence of the attention distributions,

        1/(N * rows) * sum over heads, queries of  KL(A_t || A_s),   A = softmax(q k^T / sqrt(H))

    All (B, N, S, H), N equal on both sides (H may differ).  Summed over the real keys, averaged over heads and real
    queries (rows)."""
    a_s, a_t = scores(q_s, k_s), scores(q_t, k_t)                                           # (B, N, S, S)
    if real is not None:                        # padding keys: a finite minimum, so that no inf - inf can arise
        padding = ~real.bool()[:, None, None, :]
        a_s, a_t = (a.masked_fill(padding, torch.finfo(a.dtype).min) for a in (a_s, a_t))
    log_s, log_t = a_s.log_softmax(-1), a_t.log_softmax(-1)
    kl = log_t.exp() * (log_t - log_s)
    if real is None:
        return kl.sum(-1).mean()
    rows = kl.masked_fill(padding, 0).sum(-1).mean(1)                                       # (B, S)
    return rows.masked_select(real.bool()).mean()


def value_relation_kl(v_s, v_t, real=None):
    """MiniLM's L_VR (arXiv 2002.10957, eqs. 6 and 7): the same divergence of softmax(v v^T / sqrt(H)).

    v_s, v_t (B, N, S, H).  Sums and averages as attention_kl."""
    return attention_kl(v_s, v_s, v_t, v_t, real)


# ---------------------------------------------------------------------------------------------------- strategies

class Term(NamedTuple):
    """One term of a strategy's loss: `of(s, t, b)` is its value, from what the two forward passes left behind
    (`s`, `t`: the dicts of model.py) and from `b`, a Context."""
    of: Callable
    student: tuple              # what the student's forward pass must leave behind: model.py's `want`
    teacher: tuple              # the same for the teacher; () for none
    about: str                  # where it looks and what is averaged: printed at the start of a run
    weight: float = 1.0
    projects: str = ""          # the output that needs a projection where the widths differ


class Context(NamedTuple):
    labels: torch.Tensor        # (M,) the ids at the masked positions
    tau: float                  # temperature of the soft targets
    proj: nn.Module             # a ModuleDict of projections: empty where the widths are equal


class Strategy(NamedTuple):
    terms: dict                 # name -> Term
    peak_lr: float              # the paper's: 1e-3 for No-KD, 5e-4 for KD (arXiv 2404.19319, appendix)
    same_heads: bool = False    # compares attention head by head

    @property
    def student_needs(self):
        return tuple(sorted({need for term in self.terms.values() for need in term.student}))

    @property
    def teacher_needs(self):
        return tuple(sorted({need for term in self.terms.values() for need in term.teacher}))


MLM = Term(lambda s, t, b: masked_lm_loss(s["logits"], b.labels), ("logits",), (),
           "cross-entropy with the true ids; mean over masked positions")
SOFT_CE = Term(lambda s, t, b: soft_cross_entropy(s["logits"], t["logits"], b.tau), ("logits",), ("logits",),
               "cross-entropy with the teacher's distribution; sum over V, mean over masked positions")
EMBD = Term(lambda s, t, b: embedding_mse(s["embedding"], t["embedding"], proj_of(b, "embedding")),
            ("embedding",), ("embedding",), "embedding block; mean over positions and D", projects="embedding")
ATTN_MSE = Term(lambda s, t, b: attention_mse(s["q"], s["k"], t["q"], t["k"]), ("qkv",), ("qkv",),
                "attention scores of the last layer; mean over heads and (query, key) pairs")
HIDN = Term(lambda s, t, b: hidden_mse(s["hidden"], t["hidden"], proj_of(b, "hidden")), ("hidden",), ("hidden",),
            "last hidden state; mean over positions and D", projects="hidden")
ATTN_KL = Term(lambda s, t, b: attention_kl(s["q"], s["k"], t["q"], t["k"]), ("qkv",), ("qkv",),
               "attention probabilities of the last layer; sum over keys, mean over heads and queries")
VALUE_KL = Term(lambda s, t, b: value_relation_kl(s["v"], t["v"]), ("qkv",), ("qkv",),
                "value relation of the last layer; sum over keys, mean over heads and queries")

STRATEGIES = {
    "no_kd": Strategy({"mlm": MLM}, peak_lr=1e-3),
    "vanilla_kd": Strategy({"mlm": MLM, "soft_ce": SOFT_CE}, peak_lr=5e-4),
    "tinybert": Strategy({"embd": EMBD, "attn": ATTN_MSE, "hidn": HIDN}, peak_lr=5e-4, same_heads=True),
    "minilm": Strategy({"attn": ATTN_KL, "value": VALUE_KL}, peak_lr=5e-4, same_heads=True),
}


def proj_of(b, name):
    return b.proj[name] if name in b.proj else None


def projections(strategy, width_s, width_t):
    """The strategy's projections W: one (width_s -> width_t) matrix per projected output where the widths differ."""
    names = [term.projects for term in strategy.terms.values() if term.projects and width_s != width_t]
    return nn.ModuleDict({name: nn.Linear(width_s, width_t, bias=False) for name in names})


def loss_terms(strategy, s, t, b):
    """(total, {name: value}): the weighted sum that is minimised and its terms as they are logged, unweighted."""
    terms = {name: term.of(s, t, b) for name, term in strategy.terms.items()}
    return sum(term.weight * terms[name] for name, term in strategy.terms.items()), terms
