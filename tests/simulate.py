"""How often comparison/statistics.py is right, on made-up comparisons whose answer is known.

    python -m tests.simulate                            # the table, in two minutes of one core
    python -m tests.simulate --tables 4000              # its percentages within 0.7 points, in a quarter of an hour

All arms of a made-up table are equal, the base among them, so every claim in it is false; the intervals' width does
not depend on the leads, so how often one of 1, 2 or 4 points is told is read off the same tables.  The standard
deviations are those of docs/records: between pretraining seeds 0.75 points, of one fine-tuning 1.2, of its draw of
500 labels 1.0; two fine-tunings of each model.
"""
import time
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from comparison.statistics import Arm, compare, example_scores
from plumbing.cli import Checked, Seed, run
from plumbing.glue import METRICS

PRETRAINING, FINE_TUNING, M = 0.75, (1.2 ** 2 + 1.0 ** 2) ** 0.5, 2
COLLAPSES = 1 / 3               # the chance of a fine-tuning of the collapsed arm


@dataclass
class Config(Checked):
    tables: Annotated[int, "[1, 1e6]"] = 500   # made-up tables of each row
    tails: bool = False         # Student's t with 3 degrees of freedom in place of the normal distribution
    seed: Seed = 0              # of the random numbers


def equal(rng, k):
    """(of pretraining, of fine-tuning): what the k arms' standard deviations are multiplied by."""
    return np.ones(k), np.ones(k)


def records(rng, k):
    """As unequal as in docs/records: 5.6 degrees of freedom, 1 on average."""
    factor = 0.859 * (5.6 / rng.chisquare(5.6, k)) ** 0.5
    return factor, factor


def quiet_base(rng, k):
    """The base arm varies four times less."""
    factor = np.r_[0.25, np.ones(k - 1)]
    return factor, factor


def noisy_base(rng, k):
    """Its pretraining alone varies four times more, of which few seeds know nothing: the weak spot."""
    return np.r_[4.0, np.ones(k - 1)], np.ones(k)


def made_up(rng, spread, k, n, tails=False, collapsing=False):
    """k equal arms of n seeds, the base first; `collapsing`: some fine-tunings of the last one are left out."""
    def noise(*shape):
        return rng.standard_t(3, shape) / 3 ** 0.5 if tails else rng.normal(size=shape)
    pretraining, tuning = spread(rng, k)
    scores = (70 + noise(k, n, 1) * PRETRAINING * pretraining[:, None, None]
              + noise(k, n, M) * FINE_TUNING * tuning[:, None, None]).tolist()
    arms = [Arm(str(i), of) for i, of in enumerate(scores)]
    if collapsing:
        kept = [[x for x in of if rng.random() > COLLAPSES] for of in scores[-1]]
        arms[-1] = Arm(arms[-1].name, kept, n * M - sum(map(len, kept)), n * M)
    return arms


def with_examples(rng, k, n, size=400, metric="accuracy", known=True):
    """The same with a dev set of its own: an example's difficulty is in part every model's, in part the arm's, the
    seed's and the fine-tuning's; three of four answers are right.  The true scores, over all examples, are equal."""
    def noise(share, *shape):
        return rng.normal(0, share ** 0.5, shape)
    labels = rng.random(size) < 0.4
    hard = (noise(0.45, size) + noise(0.15, k, 1, 1, size) + noise(0.2, k, n, 1, size) + noise(0.2, k, n, M, size)
            + noise(0.0005, k, n, 1, 1))
    answers = labels ^ (hard > 0.675)
    metric, arms = METRICS[metric], []
    for i, of in enumerate(answers):
        parts = [np.mean([example_scores(metric, p, labels) for p in seed], 0) for seed in of] if known else None
        arms.append(Arm(str(i), [[100 * metric(p, labels) for p in seed] for seed in of],
                        predictions=[np.array(parts)] if known else None))
    return arms


def measured(make, tables):
    """What `tables` comparisons of make() gave: coverage of the intervals and of the worst arm's, tables with a false
    claim, in percent; mean half width; power at 1, 2 and 4 points in percent, tables and arms alike."""
    found = [[(of.d, of.half, of.wide) for of in compare(make(), "0")] for _ in range(tables)]
    d, half, wide = np.array(found).transpose(2, 0, 1)
    known = np.isfinite(half)
    covered = [100 * np.mean(abs(d[of, i]) <= half[of, i]) for i, of in enumerate(known.T)]
    return dict(coverage=np.mean(covered), worst=min(covered), false=100 * np.mean((abs(d) > wide).any(1)),
                half=np.mean(half[known]), power=[100 * np.mean((d + lead > wide)[known]) for lead in (1, 2, 4)])


def main(config):
    began, rng = time.monotonic(), np.random.default_rng(config.seed)
    print("| spreads | n | arms | coverage, % | of the worst arm | false claims per table, % | half-width "
          "| power at 1, 2, 4 points, % |\n|---|---|---|---|---|---|---|---|")

    def row(name, n, k, make):
        m = measured(make, config.tables)
        print(f"| {name} | {n} | {k} | {m['coverage']:.1f} | {m['worst']:.1f} | {m['false']:.1f} | {m['half']:.2f} | "
              f"{', '.join(f'{p:.0f}' for p in m['power'])} |")

    cells = [("equal", equal, n, k) for k in (3, 5, 8) for n in (3, 5, 10)]
    cells += [("base four times quieter", quiet_base, n, k) for k in (3, 5, 8) for n in (3, 5, 10)]
    cells += [("as in docs/records", records, n, 5) for n in (3, 5, 10)]
    cells += [("pretraining of the base four times noisier", noisy_base, 3, 8)]
    for name, spread, n, k in cells:
        row(name, n, k, lambda spread=spread, n=n, k=k: made_up(rng, spread, k, n, config.tails))
    for n in (3, 5, 10):
        row("equal, one arm collapses", n, 5, lambda n=n: made_up(rng, equal, 5, n, config.tails, True))
    for n in (3, 5, 10):
        for known in (True, False):
            row(f"400 new dev examples, their scores {'' if known else 'not '}known", n, 3,
                lambda n=n, known=known: with_examples(rng, 3, n, known=known))
    print(f"\n{config.tables:,} tables a row, {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    run(main, Config, __doc__)
