"""Every loss: one function = one equation; and every strategy: one entry of STRATEGIES.  Read it second.

Pure functions of tensors: student first, teacher second, a scalar out.  tests/test_kd_losses.py holds each of
them against the slowest possible transcription of its formula.

    B batch, S sequence, M masked positions, V vocabulary, N heads, H head size, D hidden size; _s student,
    _t teacher; tau temperature; `real` (B, S): what is not padding, or None where blocks are full.

Two rules hold everywhere.  A *distribution* is summed (over V, or over the keys) and then averaged over
positions and heads; a *mean squared error* is averaged over every real element.  (`reduction="mean"` on a
distribution divides by V as well: a factor of 30,522 that several public distillation codes carry.)  And a
loss is computed in at least fp32 with autocast off: under autocast even the matmul of two fp32 tensors runs
in bf16.

To add a strategy: write its loss as a function, put it into a Term, which says what the two forward passes
must leave behind and at which layers, and add a Strategy of such terms to STRATEGIES.  Nothing else has to
change.  Strategies one after another are phases: an expression such as tinybert:0.3/no_kd, or a function in
PHASED.
"""
import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from plumbing.cli import UserError


def at_least_fp32(loss):
    """Decorator: autocast off, and 16-bit tensors promoted to fp32 (fp64 stays, so that gradcheck works)."""
    @functools.wraps(loss)
    def promoted(x, *args, **named):
        off = (contextlib.nullcontext() if x.device.type == "meta"         # FLOPs are counted there
               else torch.autocast(x.device.type, enabled=False))
        with off:
            return loss(promote(x), *map(promote, args), **{name: promote(a) for name, a in named.items()})
    return promoted


def promote(x):
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


# --------------------------------------------------------------------------------------- losses on the logits

@at_least_fp32
def masked_lm_loss(z_s, labels):
    """Masked language modelling (Devlin 2018, arXiv 1810.04805, section 3.1).

        mean over M of  -log softmax(z_s)[label]

    z_s (M, V), labels (M,).  Summed over V (one-hot), averaged over the masked positions."""
    return F.cross_entropy(z_s, labels)


@at_least_fp32
def soft_cross_entropy(z_s, z_t, tau=1.0):
    """Soft targets (Hinton 2015, arXiv 1503.02531, section 2): cross-entropy with the teacher's distribution.

        tau^2 * mean over M of  sum over V of  -softmax(z_t / tau) * log_softmax(z_s / tau)

    z_s, z_t (M, V).  Summed over V, averaged over the masked positions; tau^2 keeps the gradient's size."""
    p_t = (z_t / tau).softmax(-1)                                                           # (M, V)
    return -tau ** 2 * (p_t * (z_s / tau).log_softmax(-1)).sum(-1).mean()


@at_least_fp32
def soft_kl(z_s, z_t, tau=1.0):
    """DistilBERT's soft targets (Sanh 2019, arXiv 1910.01108, section 3): KL in place of the cross-entropy.

        tau^2 * mean over M of  sum over V of  p_t * (log p_t - log p_s),   p = softmax(z / tau)

    z_s, z_t (M, V).  Its gradient is soft_cross_entropy's; it is 0 where the student equals the teacher.
    Departure: the original takes all tokens, ours the masked positions."""
    log_s, log_t = (z_s / tau).log_softmax(-1), (z_t / tau).log_softmax(-1)                 # (M, V)
    return tau ** 2 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()


@at_least_fp32
def soft_cross_entropy_over_v(z_s, z_t, tau=1.0, vocab_size=None):
    """As released (code of arXiv 2404.19319): soft_cross_entropy, but a mean over V too: V times smaller.

    V is `vocab_size` where the logits are wider, with columns of probability 0."""
    surplus = z_s.shape[-1] / (vocab_size or z_s.shape[-1])
    return -tau ** 2 * ((z_t / tau).softmax(-1) * (z_s / tau).log_softmax(-1)).mean() * surplus


@at_least_fp32
def sampled_cross_entropy(z_s, drawn, shares, tau=1.0):
    """soft_cross_entropy with N draws from the teacher's distribution (arXiv 2503.16870): unbiased.

        tau^2 * mean over M of  sum over the drawn ids of  -share * log_softmax(z_s / tau)[id]

    z_s (M, V); drawn, shares (M, n): n different ids and the share of the N draws that fell on each."""
    log_s = (z_s if tau == 1 else z_s / tau).log_softmax(-1)                                # (M, V)
    return -tau ** 2 * (shares * log_s.gather(-1, drawn)).sum(-1).mean()


# --------------------------------------------------------------------------- losses on states: (B, S, D) each

@at_least_fp32
def hidden_mse(h_s, h_t, proj=None, real=None):
    """TinyBERT's L_hidn = MSE(H_s W_h, H_t) (Jiao 2020, arXiv 1909.10351, section 3).

    h_s (B, S, D_s), h_t (B, S, D_t); W_h = `proj`, None for equal widths.  Mean over real positions and
    D_t."""
    error = ((h_s if proj is None else proj(h_s)) - h_t).square().mean(-1)                  # (B, S)
    return error.mean() if real is None else error.masked_select(real.bool()).mean()


def embedding_mse(e_s, e_t, proj=None, real=None):
    """TinyBERT's L_embd = MSE(E_s W_e, E_t) (arXiv 1909.10351, section 3), else as hidden_mse.

    Departure: the text says the embedding matrices; its code, like ours, the embedding block's output."""
    return hidden_mse(e_s, e_t, proj, real)


@at_least_fp32
def feature_map_transfer(h_s, h_t, proj=None, real=None):
    """MobileBERT's feature map transfer (Sun 2020, arXiv 2004.02984, "Training Objectives").

        MSE(LN0(h_s W), LN0(h_t)),   LN0 = LayerNorm without gain and bias

    h_s (B, S, D_s), h_t (B, S, D_t); W = `proj`, None for equal widths.  Mean over real positions and D_t."""
    normal = (F.layer_norm(h, h.shape[-1:], eps=1e-12) for h in (h_s if proj is None else proj(h_s), h_t))
    return hidden_mse(*normal, real=real)


@at_least_fp32
def cosine_loss(h_s, h_t, real=None):
    """DistilBERT's L_cos (arXiv 1910.01108, section 3): mean over real positions of 1 - cos(h_s, h_t).

    h_s, h_t (B, S, D), equal widths."""
    loss = 1 - F.cosine_similarity(h_s, h_t, dim=-1)                                        # (B, S)
    return loss.mean() if real is None else loss.masked_select(real.bool()).mean()


# --------------------------------------------------------------- losses on attention: TinyBERT's and MiniLM's

def scores(q, k):
    """Attention scores before the softmax, q k^T / sqrt(H): (B, N, S, H) twice -> (B, N, S, S)."""
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


@at_least_fp32
def attention_mse(q_s, k_s, q_t, k_t, real=None):
    """TinyBERT's L_attn (arXiv 1909.10351, section 3).

        1/N * sum over heads of MSE(A_s, A_t),   A = q k^T / sqrt(H), before the softmax

    All (B, N, S, H), N equal on both sides.  Mean over heads and pairs of real query and real key."""
    error = (scores(q_s, k_s) - scores(q_t, k_t)).square().mean(1)                          # (B, S, S)
    if real is None:
        return error.mean()
    real = real.bool()
    return error.masked_select(real[:, :, None] & real[:, None, :]).mean()


@at_least_fp32
def attention_kl(q_s, k_s, q_t, k_t, real=None):
    """MiniLM's L_AT (Wang 2020, arXiv 2002.10957, section 3.1): divergence of attention distributions.

        1/(N * rows) * sum over heads, queries of  KL(A_t || A_s),   A = softmax(q k^T / sqrt(H))

    All (B, N, S, H), N equal on both sides (H may differ).  Summed over the real keys, averaged over heads
    and real queries (rows)."""
    if (real is None and q_s.device.type == "cpu" and not torch.compiler.is_compiling()
            and q_s[..., 0].numel() * q_s.shape[-2] >= AttentionKL.at_once):
        return AttentionKL.apply(q_s, k_s, q_t, k_t)
    a_s, a_t = scores(q_s, k_s), scores(q_t, k_t)                                           # (B, N, S, S)
    if real is not None:            # padding keys: a finite minimum, so that no inf - inf can arise
        padding = ~real.bool()[:, None, None, :]
        a_s, a_t = (a.masked_fill(padding, torch.finfo(a.dtype).min) for a in (a_s, a_t))
    log_s, log_t = a_s.log_softmax(-1), a_t.log_softmax(-1)
    kl = log_t.exp() * (log_t - log_s)
    if real is None:
        return kl.sum(-1).mean()
    rows = kl.masked_fill(padding, 0).sum(-1).mean(1)                                       # (B, S)
    return rows.masked_select(real.bool()).mean()


def value_relation_kl(v_s, v_t, real=None):
    """MiniLM's L_VR (arXiv 2002.10957, section 3.2): the same divergence of softmax(v v^T / sqrt(H)).

    v_s, v_t (B, N, S, H).  Sums and averages as attention_kl."""
    return attention_kl(v_s, v_s, v_t, v_t, real)


@at_least_fp32
def relation_kl(x_s, x_t, relation_heads, real=None):
    """One of MiniLMv2's three relations (Wang 2021, arXiv 2012.15828, section 3): queries, keys or values x.

        1/(N_r * rows) * sum over relation heads, rows of  KL(R_t || R_s),   R = softmax(x x^T / sqrt(H_r))

    x_s (B, S, D_s), x_t (B, S, D_t): the heads concatenated; both are split again into N_r = `relation_heads`
    heads of H_r = D / N_r, so widths and head counts may differ.  Sums and averages as attention_kl."""
    x_s, x_t = (x.unflatten(-1, (relation_heads, -1)).transpose(1, 2) for x in (x_s, x_t))  # (B, N_r, S, H_r)
    return attention_kl(x_s, x_s, x_t, x_t, real)


class AttentionKL(torch.autograd.Function):
    """attention_kl of full blocks on a CPU: loss and gradient in one pass over some heads at a time, whose scores
    A_s and A_t stay in the cache.  With respect to A_s the gradient is

        (softmax(A_s) - softmax(A_t)) / (N * rows)

    q_s, k_s, q_t, k_t (B, N, S, H).  No gradient to the teacher, no second derivative."""
    at_once = 2 ** 18           # scores for each thread, a MB; it pays from one such block on

    @staticmethod
    def forward(ctx, *qk):
        (*_, S, H), rows = qk[0].shape, qk[0][..., 0].numel()
        heads = max(1, AttentionKL.at_once * torch.get_num_threads() // S ** 2)
        loss, grads = 0.0, []
        for q_s, k_s, q_t, k_t in zip(*(x.flatten(0, 1).split(heads) for x in qk), strict=True):
            a_s, a_t = (q / math.sqrt(q.shape[-1]) @ k.mT for q, k in ((q_s, k_s), (q_t, k_t)))  # (heads, S, S)
            e_s, e_t = (a.sub_(a.amax(-1, keepdim=True)).exp() for a in (a_s, a_t))
            z_s, z_t = e_s.sum(-1, keepdim=True), e_t.sum(-1, keepdim=True)
            p_t = e_t.div_(z_t)
            loss += p_t.flatten().dot(a_t.sub_(a_s).flatten()) + (z_s / z_t).log().sum()
            if any(ctx.needs_input_grad):
                g = e_s.div_(z_s).sub_(p_t)
                grads.append((g @ k_s, g.mT @ q_s))
        ctx.save_for_backward(*(torch.cat(g).view_as(qk[0]) / (rows * math.sqrt(H)) for g in zip(*grads, strict=True)))
        return loss / rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(grad * g for g in ctx.saved_tensors), None, None


# ------------------------------------------------------------------------------------------------- strategies

LAST, FIRST = ((-1, -1),), ((0, 0),)                # pairs of layers: (the student's, the teacher's)
LOGITS = {"logits", "all_logits"}


def uniform(depth_s, depth_t):
    """TinyBERT's and MobileBERT's map: every layer l of the student with layer l * L_t / L_s of the teacher,
    counted from 1 and rounded up, so that the last meets the last."""
    return tuple((i, math.ceil((i + 1) * depth_t / depth_s) - 1) for i in range(depth_s))


class Term(NamedTuple):
    """One term of a strategy's loss: the sum of `of(s, t, c)` over the pairs of layers.  `s` and `t` hold
    what the two forward passes left behind at one pair, under the names of `student` and `teacher`; `c` is a
    Context."""
    of: Callable
    student: tuple              # what the student's forward pass must leave behind, by the names in model.py
    teacher: tuple              # the same for the teacher; () for none
    about: str                  # where it looks and what is averaged: printed at the start of a run
    weight: float = 1.0
    projects: str = ""          # the output that needs a projection where the widths differ
    layers: tuple | Callable = LAST     # the pairs, from 0 or -1, or a function of the two depths


class Context(NamedTuple):
    labels: torch.Tensor        # (M,) the ids at the masked positions
    tau: float                  # temperature of the soft targets
    relation_heads: int         # N_r of relation_kl
    proj: nn.Module             # a ModuleDict of projections: empty where the widths are equal
    vocab_size: int | None = None       # V where the logits may be wider, with columns of probability 0


class Strategy(NamedTuple):
    terms: dict                 # name -> Term
    peak_lr: float = 5e-4       # the paper's: 1e-3 for No-KD, 5e-4 for KD (arXiv 2404.19319, appendix)
    tau: float = 1.0            # temperature
    init: str = "random"        # or "teacher": some of its layers; or "embeddings": of the teacher
    same_heads: bool = False    # compares attention head by head
    same_width: bool = False    # compares hidden states without a projection
    train_layers: tuple = ()    # of the student, from 0: they train and nothing else does; () for everything
    dropout: bool = True        # whether the student's is on
    causal: bool = False        # each position sees those before it alone, and predicts the next one
    ramp: tuple | None = None   # (part over which the learning rate rises, part of the peak left at the end)
    as_released: bool = False   # what the paper's released code computes, not what its text says

    def needs(self, side):
        """What the forward pass of "student" or "teacher" must leave behind.  The released code computes
        everything, for every method."""
        if self.as_released:
            return ("embedding", "hidden", "logits", "qkv")
        return tuple(sorted({need for term in self.terms.values() for need in getattr(term, side)}))

    def between(self, depth_s, depth_t, teacher_layer=None):
        """The strategy for these two depths: all pairs of layers are numbers.  `teacher_layer` is whose q, k,
        v the student's last layer is compared with."""
        def fix(term):
            pairs, about = term.layers(depth_s, depth_t) if callable(term.layers) else term.layers, term.about
            if teacher_layer is not None and "qkv" in term.teacher:
                pairs = ((l_s, teacher_layer if l_s == -1 else l_t) for l_s, l_t in pairs)
            pairs = tuple(pairs)
            if callable(term.layers):
                about += "; layers " + " ".join(f"{l_s % depth_s + 1}-{l_t % depth_t + 1}"
                                                for l_s, l_t in pairs)
            return term._replace(layers=pairs, about=about)
        return self._replace(terms={name: fix(term) for name, term in self.terms.items()})

    def want(self, side):
        """model.py's `want` of "student" or "teacher", for two depths: see `between`."""
        asked = [(need, pair[side == "teacher"]) for term in self.terms.values() for pair in term.layers
                 for need in getattr(term, side)]
        asked += [(need, -1) for need in self.needs(side)] if self.as_released else []
        return tuple(dict.fromkeys(at_layer(*each) for each in asked))

    @property
    def without_teacher(self):
        """The strategy of its terms that need no teacher: what a step without distillation computes."""
        return self._replace(as_released=False, terms={
            name: term for name, term in self.terms.items() if not term.teacher})

    @property
    def needs_teachers_head(self):
        return not LOGITS.isdisjoint(self.needs("teacher"))

    @property
    def trains_lm_head(self):
        return any(not LOGITS.isdisjoint(term.student) for term in self.terms.values())


def at_layer(need, layer):
    return (need, layer) if need in ("hidden", "qkv") else need


def proj_of(c, name):
    return c.proj[name] if name in c.proj else None


def attention_scores_term(where, layers):
    """TinyBERT's L_attn at pairs of layers."""
    def of(s, t, c):
        (q_s, k_s, _), (q_t, k_t, _) = s["qkv"], t["qkv"]
        return attention_mse(q_s, k_s, q_t, k_t)
    return Term(of, ("qkv",), ("qkv",), f"attention scores, {where}; mean over heads and (query, key) pairs",
                layers=layers)


def attention_kl_of(s, t, c):
    (q_s, k_s, _), (q_t, k_t, _) = s["qkv"], t["qkv"]
    return attention_kl(q_s, k_s, q_t, k_t)


def for_minilmv2(depth_s, depth_t):
    """The last layer of both, the 21st of a teacher of 24 (arXiv 2012.15828, section 4)."""
    return ((-1, 20 if depth_t == 24 else -1),)


def relation_term(which, name):
    """MiniLMv2's relation of queries (0), keys (1) or values (2)."""
    def of(s, t, c):
        x_s, x_t = (side["qkv"][which].transpose(1, 2).flatten(2) for side in (s, t))           # (B, S, D)
        return relation_kl(x_s, x_t, c.relation_heads)
    return Term(of, ("qkv",), ("qkv",), f"{name} relation, student's last layer; sum over keys, mean over "
                "relation heads and rows", layers=for_minilmv2)


MLM = Term(lambda s, t, c: masked_lm_loss(s["logits"], c.labels), ("logits",), (),
           "cross-entropy with the true ids; mean over masked positions")
SOFT_CE = Term(lambda s, t, c: soft_cross_entropy(s["logits"], t["logits"], c.tau), ("logits",), ("logits",),
               "cross-entropy with the teacher's distribution; sum over V, mean over masked positions")
SAMPLED_CE = Term(lambda s, t, c: sampled_cross_entropy(s["logits"], *t["samples"], c.tau), ("logits",),
                  ("samples",), "cross-entropy with draws from the teacher's distribution; mean over masked "
                  "positions")
SOFT_KL = Term(lambda s, t, c: soft_kl(s["logits"], t["logits"], c.tau), ("logits",), ("logits",),
               "divergence from the teacher's distribution; sum over V, mean over masked positions", 5.0)
COSINE = Term(lambda s, t, c: cosine_loss(s["hidden"], t["hidden"]), ("hidden",), ("hidden",),
              "last hidden state; mean over positions")
EMBD = Term(lambda s, t, c: embedding_mse(s["embedding"], t["embedding"], proj_of(c, "embedding")),
            ("embedding",), ("embedding",), "embedding block; mean over positions and D",
            projects="embedding")
HIDN = Term(lambda s, t, c: hidden_mse(s["hidden"], t["hidden"], proj_of(c, "hidden")),
            ("hidden",), ("hidden",), "last hidden state; mean over positions and D", projects="hidden")
ATTN_KL = Term(attention_kl_of, ("qkv",), ("qkv",),
               "attention probabilities, last layer; sum over keys, mean over heads and queries")
VALUE_KL = Term(lambda s, t, c: value_relation_kl(s["qkv"][2], t["qkv"][2]), ("qkv",), ("qkv",),
                "value relation, last layer; sum over keys, mean over heads and queries")
RELATIONS = {"qq": relation_term(0, "query"), "kk": relation_term(1, "key"), "vv": relation_term(2, "value")}

STRATEGIES = {
    "no_kd": Strategy({"mlm": MLM}, peak_lr=1e-3),
    "vanilla_kd": Strategy({"mlm": MLM, "soft_ce": SOFT_CE}),
    "distilbert": Strategy({"soft_kl": SOFT_KL, "mlm": MLM._replace(weight=2.0), "cosine": COSINE}, tau=2.0,
                           init="teacher", same_width=True),
    "tinybert": Strategy({"embd": EMBD, "attn": attention_scores_term("last layer", LAST), "hidn": HIDN},
                         same_heads=True),
    "minilm": Strategy({"attn": ATTN_KL, "value": VALUE_KL}, same_heads=True),
    "minilmv2": Strategy(RELATIONS),
    # TinyBERT's own (arXiv 1909.10351, eq. 6 to 11, one W_h), of which 2404.19319 takes the last layer alone
    "tinybert_layers": Strategy({
        "embd": EMBD, "attn": attention_scores_term("sum over layers", uniform),
        "hidn": HIDN._replace(about="hidden states, sum over layers; mean over positions and D",
                              layers=uniform)}, same_heads=True),
    "minilmv2_mlm": Strategy({"mlm": MLM, **RELATIONS}),
}


def mobilebert_stage(layer):
    """MobileBERT's transfer to one layer of the student, from 0, which alone trains, without dropout: 100 FMT
    + 1 AT (arXiv 2004.02984, "Training Strategies"; its code has 100 / L and 1 / L).  AT is MiniLM's L_AT."""
    def pair(depth_s, depth_t):
        return (uniform(depth_s, depth_t)[layer],)
    fmt = Term(lambda s, t, c: feature_map_transfer(s["hidden"], t["hidden"], proj_of(c, f"hidden{layer}")),
               ("hidden",), ("hidden",), "normalised hidden states; mean over positions and D", 100.0,
               f"hidden{layer}", pair)
    attn = ATTN_KL._replace(layers=pair,
                            about="attention probabilities; sum over keys, mean over heads and queries")
    return Strategy({"fmt": fmt, "attn": attn}, same_heads=True, train_layers=(layer,), dropout=False,
                    ramp=(0.1, 0.9))


def mobilebert(depth):
    """MobileBERT's transfer on a plain BERT of `depth` layers: stage by stage over the first 32% of the
    budget (240k of 740k steps), then MLM and soft targets.  Departures: in a stage the lower layers rest
    (there: a tenth of the learning rate); no bottlenecks, stacked feed-forwards or NoNorm."""
    stages = [(0.32 * (i + 1) / depth, f"layer {i + 1}", mobilebert_stage(i)._replace(init="embeddings"))
              for i in range(depth)]
    tail = Strategy({"mlm": MLM._replace(weight=0.5), "soft_ce": SOFT_CE._replace(weight=0.5)})
    return [*stages, (1.0, "tail", tail)]


# Next-token prediction by the same encoder: a start for MLM, clm:0.3/no_kd (arXiv 2507.00994).  Predicted are
# the ids that MLM would mask, not all of a block, so that the LM head costs what it costs there
CLM = Strategy({"clm": MLM._replace(about="cross-entropy with the next id, causal; mean over k positions")},
               peak_lr=1e-3, causal=True)
# name -> function of the student's depth: [(end, title, Strategy)]
PHASED = {"mobilebert": mobilebert, "clm": lambda depth: [(1.0, "", CLM)]}


class Phase(NamedTuple):
    """A part of the budget and the Strategy that spends it, at one block length and mask rate."""
    name: str
    begin: float                # as shares of the budget
    end: float
    strategy: Strategy
    span: tuple = None          # (begin, end) of the optimizer and the learning rate, if not these
    seq_len: int = 128          # S
    mask_rate: float = 0.15     # k / S
    times: int = 1              # so many blocks stand in for one of the run's last length

    def progress(self, of_run):
        """Of the span, from the run's."""
        begin, end = self.span or (self.begin, self.end)
        return min(1.0, (of_run - begin) / (end - begin))


def parts(phases, lengths, rates):
    """[Phase]: the phases, cut where the block length or the mask rate changes; both [(end, value)].

    Every step has the same number of tokens: S blocks of the last length, or more of a shorter one."""
    def at(end, turns):
        return next(value for until, value in turns if until >= end)
    ends, found = sorted({*(p.end for p in phases), *(end for end, _ in (*lengths, *rates))}), []
    for begin, end in zip([0.0, *ends], ends, strict=False):
        phase, S, rate = at(end, [(p.end, p) for p in phases]), at(end, lengths), at(end, rates)
        name = phase.name + f" S {S}" * (len(lengths) > 1) + f" {rate:.0%} masked" * (len(rates) > 1)
        found.append(Phase(name, begin, end, phase.strategy, (phase.begin, phase.end), S, rate,
                           lengths[-1][1] // S))
    return found


def phases_of(text, depth, as_released=False):
    """[Phase] of NAME or NAME:END/.../NAME, END a share of the budget, for a student of `depth` layers."""
    known, parts, phases, begin = {**STRATEGIES, **PHASED}, text.split("/"), [], 0.0
    known |= AS_RELEASED if as_released else {}
    for i, part in enumerate(parts):
        name, colon, share = part.partition(":")
        if name not in known:
            raise UserError(f"--strategy {text}: must be one of {', '.join(known)}"
                            + (f", not {name!r}" if name != text else "")
                            + ", or several in turn, such as tinybert:0.3/no_kd")
        last = i == len(parts) - 1
        try:
            end = 1.0 if last else float(share)
        except ValueError:
            end = math.nan
        if colon if last else not begin < end < 1:
            raise UserError(f"--strategy {text}: phase {part}: every phase but the last is NAME:END, END "
                            f"a share of the budget between 0 and 1 that rises from phase to phase, the last "
                            f"one NAME alone: such as tinybert:0.3/no_kd")
        inner = PHASED[name](depth) if name in PHASED else [(1.0, "", known[name])]
        for stop, title, strategy in inner:
            at = phases[-1].end if phases else 0.0
            until = end if stop == 1 else begin + stop * (end - begin)
            phases.append(Phase(f"{name} {title}".strip(), at, until, strategy))
        begin = end
    return phases


# For science only: what the paper's released code computes, where that is not what its text says
SOFT_CE_OVER_V = Term(lambda s, t, c: soft_cross_entropy_over_v(
                          s["logits"], t["logits"], c.tau, c.vocab_size), ("logits",), ("logits",),
                      "cross-entropy with the teacher's distribution; mean over masked positions AND V")
AS_RELEASED = {name: STRATEGIES[name]._replace(as_released=True, **changes) for name, changes in {
    "vanilla_kd": dict(terms={"mlm": MLM, "soft_ce": SOFT_CE_OVER_V}),
    "tinybert": dict(terms={"attn0": attention_scores_term("FIRST layer", FIRST),
                            "attn": attention_scores_term("last layer", LAST), "hidn": HIDN}),
    # version 2, with as many relation heads as attention heads
    "minilm": dict(terms={name: term._replace(layers=LAST) for name, term in RELATIONS.items()}),
    "minilmv2": dict(terms=RELATIONS, same_heads=True),
}.items()}


def relation_head_count(width_s, width_t):
    """N_r: relation heads of size 16 in the teacher, as the paper has (48 for a base teacher, 64 for a large
    one); for other widths the largest count that divides both and keeps them no smaller than that."""
    common = math.gcd(width_s, width_t)
    return max(n for n in range(1, max(1, width_t // 16) + 1) if common % n == 0)


def projections(strategy, width_s, width_t):
    """The strategy's projections W: one (width_s -> width_t) per projected output where widths differ."""
    names = [term.projects for term in strategy.terms.values() if term.projects and width_s != width_t]
    return nn.ModuleDict({name: nn.Linear(width_s, width_t, bias=False) for name in names})


def loss_terms(strategy, s, t, c):
    """(total, {name: value}): the weighted sum that is minimised, and its terms, unweighted.

    s, t: what the two forward passes left behind, under the names of `want`."""
    def at(out, needs, layer):
        return {need: out[at_layer(need, layer)] for need in needs}
    terms = {name: sum(term.of(at(s, term.student, l_s), at(t, term.teacher, l_t), c)
                       for l_s, l_t in term.layers)
             for name, term in strategy.terms.items()}
    return sum(term.weight * terms[name] for name, term in strategy.terms.items()), terms
