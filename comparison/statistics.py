"""How far two arms are apart, how sure that is, and the word for it.  docs/judged.md says how often the intervals
hold and how often a word is wrong.

The unit is the pretrained model of one seed; its score y is the mean of its fine-tunings that did not collapse.
An arm's mean varies with its seeds (its own spread, and the table's as a prior), a difference also with the examples
that the dev set happens to hold.  All arms are compared with one base, so what is called outside the noise is outside
Dunnett's interval (1955), which holds for all of them at once; an interval alone is Student's t.

Scores are in percent.  v: variance of y; q: of an arm's mean; d, f: degrees of freedom of v and of q; D: of all v.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PRIOR = 4                       # degrees of freedom that the table's spread is worth; docs/records: 5.6 [3.6, 47]


class Arm(NamedTuple):
    """What one row of a table scored.  Of a model that is given (the teacher, untrained layers) each fine-tuning is
    a seed.  Of a mean over tasks, those fine-tunings are kept that collapsed on none of them."""
    name: str                           # each arm has its own
    scores: list                        # [[score of each fine-tuning kept] of each seed]; [] where all collapsed
    collapsed: int = 0                  # fine-tunings that predicted one class,
    trials: int = 0                     # of so many
    predictions: list | None = None     # of each task a (seeds, examples) array: example_scores, mean over those kept
    fixed: bool = False                 # no seed changes the score: one is enough, and it has no spread of its own

    @property
    def means(self):
        """[y] of the seeds that have one."""
        return [sum(of) / len(of) for of in self.scores if of]

    @property
    def failed(self):
        """Seeds of whose fine-tunings most collapsed."""
        return sum(2 * len(of) * len(self.scores) < self.trials for of in self.scores)

    @property
    def d(self):
        return 0 if self.fixed else max(0, len(self.means) - 1)


@dataclass
class Difference:
    """An arm less its base.  `half`, `wide` and `less` are infinite where there is no interval."""
    name: str
    base: str
    d: float                            # NaN where one of them has no seed left
    n: float                            # seeds of the one that has fewer; infinite where both are fixed
    se: float = math.inf
    df: float = 0.0
    half: float = math.inf              # half width of the 95% interval
    wide: float = math.inf              # of the one for all comparisons of the table at once
    less: float = math.inf              # they differ by less than this, with 95%
    word: str = "no interval"
    scope: str = ""                     # "on this dev set only" where the examples' scores are not known
    collapsed: str = ""                 # "3 of 12 collapsed (most of 1 of 6 models), of no_kd 0 of 12 (0 of 6; p = 1)"
    left: str = ""                      # "3 of 5 models of tinybert": what its scores are of, where some have none
    p: float = 1.0                      # that so many models fail of one and not of the other, by Fisher's exact test

    @property
    def says(self):
        """The word, and what it is limited to."""
        trains = "when it trains" + f" ({self.left})" * bool(self.left)
        limits = (self.scope, trains * bool(self.collapsed)) if math.isfinite(self.half) else ()
        return ", ".join(filter(None, (self.word, *limits)))


def summary(arm):
    """(mean, standard deviation over seeds, seeds); NaN where there are too few."""
    y, n = arm.means, len(arm.means)
    return float(np.mean(y)) if n else math.nan, float(np.std(y, ddof=1)) if n > 1 else math.nan, n


def compare(arms, base):
    """[Difference] of each arm but the one called `base`, corrected for all of them."""
    base, = (arm for arm in arms if arm.name == base)
    return judged(arms, [arm for arm in arms if arm is not base], base)


def half_width(arms, name):
    """Half of the 95% interval of one arm's mean; infinite where no spread is known."""
    q, f = variances(arms)[name]
    return float(critical(f)) * math.sqrt(q) if q else math.inf


def pair(arms, one, other):
    """The Difference of two arms alone, of a table whose spread they share.  Best and runner-up need no correction:
    their lead is the smallest that the best has."""
    one, other = (next(arm for arm in arms if arm.name == name) for name in (one, other))
    return judged(arms, [one], other)[0]


def judged(arms, rivals, base):
    found, known, spread, D = [apart(arm, base) for arm in rivals], [], variances(arms), sum(arm.d for arm in arms)
    for arm, of in zip(rivals, found, strict=True):
        (q_i, f_i), (q_b, f_b) = spread[arm.name], spread[base.name]
        S, dev = q_i + q_b, 0.0 if of.scope or of.n < 2 else dev_variance(arm, base)
        if of.n < 2 or S + dev < 1e-12 or S < 1e-12 and not (arm.fixed and base.fixed):
            continue                    # one seed; or scores without any spread, which is no proof that there is none
        of.df, of.se = math.inf, math.sqrt(S + dev)
        if S:                           # Satterthwaite
            of.df = min(D, S ** 2 / (q_i ** 2 / f_i + q_b ** 2 / f_b)) * ((S + dev) / S) ** 2
        known.append((of, math.sqrt((q_b + dev / 2) / (S + dev))))
    if not known:
        return found
    df = np.array([of.df for of, _ in known])
    t, inner = critical(np.tile(df, (2, 1)), [[0.95], [0.90]])
    c = critical(min(df), within=family([loading for _, loading in known])) if len(known) > 1 else 0.0
    for (of, _), t_i, inner_i in zip(known, t, inner, strict=True):
        of.half, of.wide = float(t_i) * of.se, float(max(c, t_i)) * of.se
        of.less = abs(of.d) + float(inner_i) * of.se
        of.word = word(of)
    return found


def apart(arm, base):
    """The Difference, without an interval."""
    n = min(math.inf if a.fixed else len(a.means) for a in (arm, base))
    of = Difference(arm.name, base.name, summary(arm)[0] - summary(base)[0], n)
    of.scope = "on this dev set only" * (arm.predictions is None or base.predictions is None)
    if arm.collapsed or base.collapsed:
        n_arm, n_base = len(arm.scores), len(base.scores)
        of.p = fisher(arm.failed, n_arm, base.failed, n_base)
        of.left = ", ".join(f"{len(a.means)} of {len(a.scores)} models of {a.name}" for a in (arm, base)
                            if len(a.means) < len(a.scores))
        of.collapsed = (f"{arm.collapsed} of {arm.trials} collapsed (most of {arm.failed} of {n_arm} models), of "
                        f"{base.name} {base.collapsed} of {base.trials} ({base.failed} of {n_base}; p = {of.p:.2g})")
    return of


def word(of):
    """The verdict on a Difference that has an interval; two seeds give a hint at most."""
    if abs(of.d) > of.wide and of.n > 2:
        return "ahead, outside the noise" if of.d > 0 else "behind, outside the noise"
    if abs(of.d) > of.half:
        return "a hint"
    if of.less < 1 and of.n > 2:
        return "level within 1 point"
    return f"not told apart; differs by less than {math.ceil(10 * of.less) / 10:.1f}"


def variances(arms):
    """{name: (q, f)} of the arms.  The prior is what an arm's fine-tunings alone would give (w) and the spread
    between seeds beyond it, pooled over the arms (tau2); an arm's own v is never made smaller by it."""
    within = [sum((x - sum(of) / len(of)) ** 2 for of in a.scores for x in of) for a in arms]
    freedom = [sum(len(of) - 1 for of in a.scores if of) for a in arms]
    D, pooled = sum(a.d for a in arms), sum(within) / max(1, sum(freedom))      # 0 of single fine-tunings:
    v = [summary(a)[1] ** 2 if a.d else 0.0 for a in arms]                      # then tau2 is the pooled v
    w = [(total / df if df else pooled) * np.mean([1 / len(of) for of in a.scores if of]) if a.d else 0.0
         for a, total, df in zip(arms, within, freedom, strict=True)]
    tau2 = max(0.0, sum(a.d * (v_a - w_a) for a, v_a, w_a in zip(arms, v, w, strict=True)) / max(1, D))
    found = {}
    for a, v_a, w_a in zip(arms, v, w, strict=True):
        shrunk = (PRIOR * (tau2 + w_a) + a.d * v_a) / (PRIOR + a.d)
        found[a.name] = max(v_a, shrunk) / (a.d + 1) if a.d else 0.0, max(1, min(PRIOR + a.d, D))
    return found


def dev_variance(arm, base):
    """The variance of the difference from the draw of dev examples: that of the examples' differences less what the
    seeds add to it; of a mean over tasks each has its own."""
    total = 0.0
    for tasks in zip(arm.predictions, base.predictions, strict=True):
        x, y = (of[[bool(kept) for kept in a.scores]] for a, of in zip((arm, base), tasks, strict=True))
        seeds = sum(np.var(of, 0, ddof=1).mean() / len(of) for of in (x, y) if len(of) > 1)
        total += max(0.0, np.var(x.mean(0) - y.mean(0), ddof=1) - seeds) / x.shape[1]
    return float(total) / len(arm.predictions) ** 2


def example_scores(metric, p, y):
    """Each example's part of metric(p, y), in percent, (examples,), as a jackknife pseudo-value: N metric(all)
    - (N - 1) metric(all but this one).  Accuracy's are 0 and 100.  Equal pairs of p and y are counted once."""
    _, first, which = np.unique(p + 1j * y, return_index=True, return_inverse=True)
    without = np.array([metric(np.delete(p, e), np.delete(y, e)) for e in first])[which]
    return 100 * (len(y) * metric(p, y) - (len(y) - 1) * without)


GRID = np.linspace(-9, 9, 18_001)
NORMAL = np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in GRID])


def phi(x):
    """The normal distribution function, within 3e-8."""
    return np.interp(x, GRID, NORMAL)


def alone(x):
    """P(|z| < x) of one normal z."""
    return 2 * phi(x) - 1


def family(loadings):
    """x -> P(every |z_i| < x) of normal z_i, the correlation of two the product of their loadings: what they share
    is integrated over, on one side of 0 for both."""
    loadings = np.minimum(loadings, 0.985)              # nearer to 1 asks for a finer grid; c rises a little
    own = np.sqrt(1 - loadings ** 2)
    x, z = np.linspace(0, 8, 161)[:, None], np.arange(0, 6.5, min(0.5, min(own)))
    weight, inside = np.exp(-z ** 2 / 2) * np.where(z, 2, 1), 1.0
    for part, rest in zip(loadings, own, strict=True):
        inside = inside * (phi((x + part * z) / rest) - phi((part * z - x) / rest))
    outside = np.log(np.maximum(1 - inside @ weight / weight.sum(), 1e-12))     # close to a line between points
    return lambda at: 1 - np.exp(np.interp(at, x[:, 0], outside))


def critical(df, level=0.95, within=alone):
    """c with P(every |z_i| / s < c) = level, where s^2 is chi^2 / df, for each df, within 1e-4: on a grid of log s,
    by bisection.  `alone`: Student's t, both sides."""
    df = np.minimum(np.asarray(df, float), 1e6)[..., None]
    low, high = -16 / df - 5 / np.sqrt(2 * df), 5 / np.sqrt(df)
    u = low + (high - low) * np.linspace(0, 1, 65)
    s, weight = np.exp(u), np.exp(df * (u - np.exp(2 * u) / 2 + 0.5))
    low, high = np.zeros(df.shape[:-1]), np.full(df.shape[:-1], 100.0)
    while np.max(high - low) > 1e-5:
        c = (low + high) / 2
        below = (weight * within(c[..., None] * s)).sum(-1) < level * weight.sum(-1)
        low, high = np.where(below, c, low), np.where(below, high, c)
    return high


def fisher(a, n, b, m):
    """Two-sided p of Fisher's exact test of a of n against b of m."""
    ways = [math.comb(n, i) * math.comb(m, a + b - i) for i in range(a + b + 1)]
    return sum(w for w in ways if w <= ways[a]) / sum(ways)
