"""Earlier comparisons in one: compare.py --merge.  Read it with comparison/report.py."""
import dataclasses
from pathlib import Path

import numpy as np

import train
from comparison import judge
from plumbing.cli import UserError, flag_of
from plumbing.files import json_object
from strategies import RECIPES

OF_THE_MACHINE = {"micro_batch", "val_times", "device", "compile", "bf16", "recipe"}


def what_is_shared(config, Config):
    """{field: value} of what earlier comparisons must share to be merged: the student, the recipe and fine-tuning's,
    and fields that this version no longer knows, as text."""
    named = {f.name: f.default for f in dataclasses.fields(Config)}
    same = {f.name for f in dataclasses.fields(train.Recipe)} - OF_THE_MACHINE
    same |= {name for name in named if name.startswith("finetune_")} | {"quick", "max_len"}
    found = {name: config.get(name, named[name]) for name in same}
    found |= {n: v for n, v in RECIPES[config.get("recipe", "paper")].items() if found[n] is None}
    found |= {n: v for n, v in config.items() if n not in {*named, "strategies"}}
    return {name: str(v) for name, v in found.items()}


def merged(config):
    """(config, results, yardsticks, {task: labels} of kept predictions, FLOPs of the teacher) of earlier comparisons
    of one student, recipe, teacher and tasks.  Of the last two the yardsticks tell: the untrained student of a seed
    and the teacher score the same."""
    Config, records, files = type(config), {}, {}
    for path in config.merge.split(","):
        files[path] = file = Path(path, "results.json") if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(f"--merge: {file} is not there: give directories that compare.py has finished, "
                            f"or their results.json")
        records[path] = json_object(file)
        if not {"config", "results", "yardsticks"} <= records[path].keys():
            raise UserError(f"--merge: {file} is no results.json that compare.py has written")
    if Path(config.out, "runs").exists() or {Path(config.out)} & set(map(Path, records)):
        raise UserError(f"--out {config.out} holds a comparison of its own: give --merge another --out")
    first, results, yardsticks, labels = next(iter(records)), {}, {}, {}
    for path, record in records.items():
        one, other = (what_is_shared(r["config"], Config) for r in (records[first], record))
        differ = [flag_of(key) for key in one if other.get(key, one[key]) != one[key]]
        if "data" in record and "data" in records[first] and record["data"] != records[first]["data"]:
            differ.append("--data")
        if differ:
            raise UserError(f"--merge: {path} was made with another {', '.join(differ)} than {first}")
        npz = files[path].with_suffix(".npz")
        labels |= judge.attach(record["results"], record["yardsticks"], dict(np.load(npz)) if npz.is_file() else {})
        for y in record["yardsticks"]:
            y["name"] = judge.OLD_NAMES.get(y["name"], y["name"])
            if "runs" not in y:                         # the constant answer of older records
                y["runs"] = judge.constant_answer(record["results"])["runs"]
            both = yardsticks.get(y["name"], y), y
            n = min(len(of["runs"]) for of in both)
            one, other = ([r["scores"] for r in of["runs"][:n]] for of in both)
            if one != other:
                raise UserError(f"--merge: {y['name']} has other scores in {path} than in {first}: another "
                                f"teacher, other tasks, or another machine")
            yardsticks[y["name"]] = max(both, key=lambda of: len(of["runs"]))
        for r in record["results"]:
            key = tuple(r[k] for k in ("strategy", "budget", "unit", "unique_tokens", "static_masks", "seed"))
            before = results.setdefault(key, r)
            if (before["scores"], before["peak_lr"]) != (r["scores"], r["peak_lr"]):
                raise UserError(f"--merge: {r['strategy']} at {judge.amount(r['budget'], r['unit'])}, seed "
                                f"{r['seed']}, has other scores or another peak LR in {path}")
    if len({r["unit"] for r in results.values()}) > 1:
        raise UserError(f"--merge: {config.merge}: budgets in different units have no common table")
    bases = {judge.base_of(arms) for arms in judge.groups(results.values()).values()}
    if len(bases) > 1:
        raise UserError(f"--merge: {config.merge}: differences to {' and '.join(sorted(bases))} have no common "
                        f"column: no_kd is not in all of them")
    names = {f.name for f in dataclasses.fields(Config)}
    recipe = {k: v for k, v in records[first]["config"].items() if k in names}
    if "seq_len" in recipe:             # older ones had several in turn, the last one of validation
        recipe["seq_len"] = str(recipe["seq_len"]).split(",")[-1]
    recipe |= dict(out=config.out, probe=all(r["config"].get("probe") for r in records.values()))
    prices = {record.get("teacher_flops") for record in records.values()} - {None}
    price = config.teacher_flops or (prices.pop() if len(prices) == 1 else None)
    return Config(**recipe), list(results.values()), list(yardsticks.values()), labels, price
