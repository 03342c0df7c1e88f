"""Every strategy: one entry of STRATEGIES, made of losses.  Read it after kd_losses.py.

A Strategy is a dict of Terms.  A Term is a loss of kd_losses.py with what the two forward passes must leave
behind for it, and at which layers; model.py computes that and stops.  Strategies one after another are
phases: an expression such as tinybert:0.3/no_kd, or a function in PHASED.

To add a strategy: one entry here, of losses that are there or of a new function in kd_losses.py.  The mean squared
error of the values of the last layer, beside masked LM, is

    VALUE_MSE = Term(lambda s, t, c: kd.hidden_mse(s["qkv"][2], t["qkv"][2]), ("qkv",), ("qkv",),
                     "values, last layer; mean over heads, positions and H")
    STRATEGIES["value_mse"] = Strategy({"mlm": MLM, "value": VALUE_MSE}, same_heads=True, same_width=True)
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import kd_losses as kd
from plumbing.cli import UserError, read

LAST, FIRST = ((-1, -1),), ((0, 0),)                # pairs of layers: (the student's, the teacher's)
LOGITS, OF_A_LAYER = {"logits", "all_logits"}, {"hidden", "qkv"}


def uniform(depth_s, depth_t):
    """TinyBERT's and MobileBERT's map: every layer l of the student with layer l * L_t / L_s of the teacher,
    counted from 1 and rounded up, so that the last meets the last."""
    return tuple((i, math.ceil((i + 1) * depth_t / depth_s) - 1) for i in range(depth_s))


class Term(NamedTuple):
    """One term of a strategy's loss: the sum of `loss(s, t, c)` over the pairs of layers.  `s` and `t` hold what the
    two forward passes left behind at one pair, under the names of `student` and `teacher`; `c` is a Context."""
    loss: Callable
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
    real: torch.Tensor | None = None    # (B, S) what is not padding; None where blocks are full
    pooling: str = "mean"       # of a sentence's embedding: over real positions, or "cls"


class Strategy(NamedTuple):
    terms: dict                 # name -> Term
    peak_lr: float = 5e-4       # the paper's: 1e-3 for No-KD, 5e-4 for KD (arXiv 2404.19319, appendix)
    short_lr: float = 4e-3      # of --recipe short; a 2L128 of a minute takes 2 to 4 times that (docs/records/rates.md)
    tau: float = 1.0            # temperature
    init: str = "random"        # or "teacher": some of its layers; or "embeddings": of the teacher
    same_heads: bool = False    # compares attention head by head
    same_width: bool = False    # compares hidden states without a projection
    train_layers: tuple = ()    # of the student, from 0: they train and nothing else does; () for everything
    dropout: bool = True        # whether the student's is on
    clip: float | None = None   # its own, whatever the recipe says
    seq_len: int | None = None  # S of its own: its blocks are whole sentences (data.Sentences)
    causal: bool = False        # each position sees those before it alone, and predicts the next one
    ramp: tuple | None = None   # (part over which the learning rate rises, part of the peak left at the end)
    as_released: bool = False   # what the paper's released code computes, not what its text says

    def needs(self, side):
        """What the forward pass of "student" or "teacher" must leave behind.  The released code computes
        everything, for every method."""
        if self.as_released:
            return ("embedding", "hidden", "logits", "qkv")
        return tuple(sorted({need for term in self.terms.values() for need in getattr(term, side)}))

    def for_depths(self, depth_s, depth_t):
        """The strategy for a student and a teacher of so many layers: all pairs of layers are numbers."""
        def fix(term):
            if not callable(term.layers):
                return term
            pairs = term.layers(depth_s, depth_t)
            where = " ".join(f"{l_s % depth_s + 1}-{l_t % depth_t + 1}" for l_s, l_t in pairs)
            return term._replace(layers=pairs, about=f"{term.about}; layers {where}")
        return self._replace(terms={name: fix(term) for name, term in self.terms.items()})

    def want(self, side):
        """model.py's `want` of "student" or "teacher", for two depths: see `for_depths`."""
        asked = [(need, pair[side == "teacher"]) for term in self.terms.values() for pair in term.layers
                 for need in getattr(term, side)]
        asked += [(need, -1) for need in self.needs(side)] if self.as_released else []
        return tuple(dict.fromkeys(each if each[0] in OF_A_LAYER else each[0] for each in asked))

    @property
    def needs_teachers_head(self):
        return not LOGITS.isdisjoint(self.needs("teacher"))

    @property
    def trains_lm_head(self):
        return any(not LOGITS.isdisjoint(term.student) for term in self.terms.values())


def attention_scores_term(where, layers):
    """TinyBERT's L_attn, of queries and keys, at pairs of layers."""
    return Term(lambda s, t, c: kd.attention_mse(*s["qkv"][:2], *t["qkv"][:2]), ("qkv",), ("qkv",),
                f"attention scores, {where}; mean over heads and (query, key) pairs", layers=layers)


def for_minilmv2(depth_s, depth_t):
    """The last layer of both, the 21st of a teacher of 24 (arXiv 2012.15828, section 4)."""
    return ((-1, 20 if depth_t == 24 else -1),)


def relation_term(which, name):
    """MiniLMv2's relation of queries (0), keys (1) or values (2)."""
    def of(s, t, c):
        x_s, x_t = (side["qkv"][which].transpose(1, 2).flatten(2) for side in (s, t))           # (B, S, D)
        return kd.relation_kl(x_s, x_t, c.relation_heads)
    return Term(of, ("qkv",), ("qkv",), f"{name} relation, student's last layer; sum over keys, mean over "
                "relation heads and rows", layers=for_minilmv2)


MLM = Term(lambda s, t, c: kd.masked_lm_loss(s["logits"], c.labels), ("logits",), (),
           "cross-entropy with the true ids; mean over masked positions")
SOFT_CE = Term(lambda s, t, c: kd.soft_cross_entropy(s["logits"], t["logits"], c.tau), ("logits",), ("logits",),
               "cross-entropy with the teacher's distribution; sum over V, mean over masked positions")
SOFT_KL = Term(lambda s, t, c: kd.soft_kl(s["logits"], t["logits"], c.tau), ("logits",), ("logits",),
               "divergence from the teacher's distribution; sum over V, mean over masked positions", 5.0)
COSINE = Term(lambda s, t, c: kd.cosine_loss(s["hidden"], t["hidden"]), ("hidden",), ("hidden",),
              "last hidden state; mean over positions")
EMBD = Term(lambda s, t, c: kd.embedding_mse(s["embedding"], t["embedding"], getattr(c.proj, "embedding", None)),
            ("embedding",), ("embedding",), "embedding block; mean over positions and D",
            projects="embedding")
HIDN = Term(lambda s, t, c: kd.hidden_mse(s["hidden"], t["hidden"], getattr(c.proj, "hidden", None)),
            ("hidden",), ("hidden",), "last hidden state; mean over positions and D", projects="hidden")
ATTN_KL = Term(lambda s, t, c: kd.attention_kl(*s["qkv"][:2], *t["qkv"][:2]), ("qkv",), ("qkv",),
               "attention probabilities, last layer; sum over keys, mean over heads and queries")
VALUE_KL = Term(lambda s, t, c: kd.value_relation_kl(s["qkv"][2], t["qkv"][2]), ("qkv",), ("qkv",),
                "value relation, last layer; sum over keys, mean over heads and queries")
SENTENCE = Term(lambda s, t, c: kd.sentence_mse(s["hidden"], t["hidden"], c.real, c.pooling), ("hidden",), ("hidden",),
                "normalised embeddings of whole sentences; sum over D, mean over sentences")
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
    "sentence": Strategy({"sentence": SENTENCE}, peak_lr=4e-4, short_lr=4e-4, init="teacher", same_width=True,
                         dropout=False, clip=1.0, seq_len=64),
}


def mobilebert_stage(layer):
    """MobileBERT's transfer to one layer of the student, from 0, which alone trains, without dropout: 100 FMT
    + 1 AT (arXiv 2004.02984, "Training Strategies"; its code has 100 / L and 1 / L).  AT is MiniLM's L_AT."""
    def pair(depth_s, depth_t):
        return (uniform(depth_s, depth_t)[layer],)
    proj = f"hidden{layer}"
    fmt = Term(lambda s, t, c: kd.feature_map_transfer(s["hidden"], t["hidden"], getattr(c.proj, proj, None)),
               ("hidden",), ("hidden",), "normalised hidden states; mean over positions and D", 100.0, proj, pair)
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


# What all arms share beside the paper's own.  short: Muon, and sqrt(2 / (5 D)) as the initial std (None here)
RECIPES = {"paper": dict(optimizer="adamw", clip=0.0, init_std=0.02),
           "short": dict(optimizer="muon", clip=1.0, init_std=None)}

# Next-token prediction by the same encoder: a start for MLM, clm:0.3/no_kd (arXiv 2507.00994).  Predicted are
# the ids that MLM would mask, not all of a block, so that the LM head costs what it costs there
CLM = Strategy({"clm": MLM._replace(about="cross-entropy with the next id, causal; mean over k positions")},
               peak_lr=1e-3, causal=True)
# name -> function of the student's depth: [(end, title, Strategy)]
PHASED = {"mobilebert": mobilebert, "clm": lambda depth: [(1.0, "", CLM)]}


class Phase(NamedTuple):
    """A part of the budget and the Strategy that spends it."""
    name: str
    begin: float                # as shares of the budget
    end: float
    strategy: Strategy
    seq_len: int = 128          # S, the run's or the strategy's own
    times: float = 1            # so many blocks have as many tokens as one of the run's S

    def progress(self, of_run):
        """Of the phase, from the run's."""
        return min(1.0, (of_run - self.begin) / (self.end - self.begin))

    def blocks(self, count):
        """So many have as many tokens as `count` of the run's S."""
        return round(count * self.times)


def phases_of(text, depth, as_released=False):
    """[Phase] of NAME or NAME:END/.../NAME, END a share of the budget, for a student of `depth` layers."""
    known, parts, phases, begin = {**STRATEGIES, **PHASED}, text.split("/"), [], 0.0
    known |= AS_RELEASED if as_released else {}
    if len(parts) > 1 and (alone := [name for name in (p.partition(":")[0] for p in parts)
                                     if name in STRATEGIES and STRATEGIES[name].seq_len]):
        raise UserError(f"--strategy {text}: {alone[0]} is no part of several phases: its blocks are whole sentences; "
                        f"give --strategy {alone[0]}")
    for i, part in enumerate(parts):
        name, colon, share = part.partition(":")
        if name not in known:
            raise UserError(f"--strategy {text}: must be one of {', '.join(known)}"
                            + (f", not {name!r}" if name != text else "")
                            + ", or several in turn, such as tinybert:0.3/no_kd")
        last = i == len(parts) - 1
        try:
            end = 1.0 if last else read(share, float)
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
SOFT_CE_OVER_V = Term(lambda s, t, c: kd.soft_cross_entropy_over_v(
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
        return {need: out[(need, layer) if need in OF_A_LAYER else need] for need in needs}
    terms = {name: sum(term.loss(at(s, term.student, l_s), at(t, term.teacher, l_t), c)
                       for l_s, l_t in term.layers)
             for name, term in strategy.terms.items()}
    return sum(term.weight * terms[name] for name, term in strategy.terms.items()), terms
