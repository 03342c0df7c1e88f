"""The pictures of docs/, drawn from docs/records.

    python -m comparison.figures                                  # needs matplotlib
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import compare
from comparison import report, statistics
from comparison.merge import merged
from plumbing.cli import Checked, UserError, run, writable
from plumbing.diagnose import D_ORDER_TURN
from plumbing.files import claim_file, read_json
from plumbing.student import evenly

DOCS = Path(__file__).parents[1] / "docs"


@dataclass
class Config(Checked):
    out: str = str(DOCS)            # folder for the pictures


def record(name):
    return read_json(DOCS / f"records/{name}.json")


def arms_of(record):
    """The arms of its second largest budget (few ran under the largest), or of its only one."""
    return [*report.groups(record["results"]).values()][-2:][0]


def of_record(name, path):
    """compare.py's figure of one record."""
    _, results, yardsticks, *_ = merged(compare.Config(merge=str(DOCS / f"records/{name}.json"), out=str(path)))
    arms = arms_of(record(name))
    report.figure([r for r in results if r["strategy"] in arms], yardsticks, path)


def of_switches(plt, path):
    """Validation MLM loss and D_order against tokens: above of every switch alone, below of all but one."""
    of = record("plateau")
    fig, axes = plt.subplots(2, 2, layout="constrained", figsize=(12, 7.2), sharex=True)
    for (mlm, d_order), runs in zip(axes, (of["runs"], of["without"]), strict=True):
        for i, each in enumerate(runs):
            look = report.curve_look(i)
            for axis, key in ((mlm, "mlm"), (d_order, "d_order")):
                axis.plot([p["tokens"] / 1e6 for p in each["curve"]], [p[key] for p in each["curve"]],
                          label=each["name"], color=look["colour"], marker=look["marker"], markersize=3,
                          linestyle=(0, look["dash"]) if look["dash"] else "-")
        for name, value in of["baselines"].items():
            mlm.axhline(value, color="0.4", linewidth=0.8, zorder=0)
            mlm.annotate(name, (0.01, value), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
        d_order.axhline(D_ORDER_TURN, color="0.4", linewidth=0.8, zorder=0)
        mlm.set(ylabel="validation MLM loss, nats")
        d_order.set(ylabel="D_order, nats")
        d_order.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in axes[1]:
        axis.set(xlabel="million tokens")
    report.saved(fig, axes.flat, path)


def of_teachers(plt, path):
    """Each arm's lead over no_kd, with its 95% interval, against the validation loss of its teacher."""
    of, arms = record("teachers"), arms_of(record("budgets"))
    fig, axis = plt.subplots(layout="constrained", figsize=(6.5, 3.8))
    for i, arm in enumerate(dict.fromkeys(row["arm"] for row in of["rows"])):
        rows, look = [row for row in of["rows"] if row["arm"] == arm], report.curve_look([*arms].index(arm))
        means, counts = [np.mean(row["leads"]) for row in rows], [len(row["leads"]) for row in rows]
        halves = [statistics.critical(n - 1) * np.std(row["leads"], ddof=1) / np.sqrt(n)
                  for row, n in zip(rows, counts, strict=True)]
        beside = 0.03 * i                                               # so that no bar hides another
        axis.errorbar([row["teacher_mlm"] - beside for row in rows], means, yerr=halves, label=arm, capsize=3,
                      color=look["colour"], marker=look["marker"],
                      linestyle=(0, look["dash"]) if look["dash"] else "-")
    axis.axhline(0, color="0.4", linewidth=0.8, zorder=0)
    axis.invert_xaxis()
    axis.set(xlabel="validation MLM loss of the teacher, nats: the better ones on the right",
             ylabel="points above no_kd, 95% interval")
    axis.legend(fontsize=8)
    report.saved(fig, [axis], path)


def of_layers(plt, path):
    """What a published encoder keeps of its similarity when some of its layers are left, by which they are."""
    of = record("layers")
    fig, axis = plt.subplots(layout="constrained", figsize=(6.5, 3.8))
    last, depths = of["layers"] - 1, sorted({len(row["layers"]) for row in of["rows"]})
    kinds = {"the first and the last are kept": lambda kept: {0, last} <= {*kept},
             "the last is kept, the first is not": lambda kept: last in kept and 0 not in kept,
             "the last is deleted": lambda kept: last not in kept}
    for i, (kind, fits) in enumerate(kinds.items()):
        rows, look = [row for row in of["rows"] if fits(row["layers"])], report.curve_look(i)
        axis.plot([row["dev"] for row in rows], [len(row["layers"]) + 0.12 * (1 - i) for row in rows], linestyle="",
                  color=look["colour"], marker=look["marker"], label=kind)
    for kept in (evenly(of["layers"], depth) for depth in depths):
        value, = (row["dev"] for row in of["rows"] if row["layers"] == kept)
        axis.annotate(", ".join(map(str, kept)), (value, len(kept) + 0.12), xytext=(0, 6), ha="center", fontsize=8,
                      textcoords="offset points")
    axis.axvline(of["similarity"], color="0.4", linewidth=0.8, zorder=0)
    axis.annotate("all of its layers", (of["similarity"], 0.02), xycoords=("data", "axes fraction"), rotation=90,
                  fontsize=8, color="0.3", ha="right", va="bottom")
    axis.set_yticks(depths, [f"{depth} layers" for depth in depths])
    axis.set(xlabel="zero-shot STS-B dev, Spearman x 100; nothing is trained", ylim=(depths[0] - 0.4, depths[-1] + 0.5))
    axis.legend(fontsize=8, loc="upper left")
    report.saved(fig, [axis], path)


def main(config):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("the figures need matplotlib: pip install matplotlib") from None
    out = writable(config.out)
    for picture in ("arms", "budgets", "switches", "teachers", "layers"):
        claim_file(out / f"{picture}.png")
    for name, picture in (("fourteen_arms", "arms"), ("budgets", "budgets")):
        of_record(name, out / f"{picture}.png")
    of_switches(plt, out / "switches.png")
    of_teachers(plt, out / "teachers.png")
    of_layers(plt, out / "layers.png")


if __name__ == "__main__":
    run(main, Config, __doc__)
