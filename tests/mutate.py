"""How many small wrong changes does the suite notice?  cosmic-ray makes them, one at a time, in a copy of the tree.

    python tests/mutate.py --sample 90          # minutes to hours; not part of the test run
    python tests/mutate.py --modules comparison/report.py  # every mutant of one file

A mutant is killed when one of the fast tests that belong to its file fails, or uses up its CPU time.  Each runs in a
fork of this process, in which torch is imported already.  Read docs/tests.md for what to make of the survivors.
"""
import argparse
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import cosmic_ray.plugins
import pytest
import torch.optim  # noqa: F401 - for the forks
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code

# file -> (the test files that it has to answer to, the likeliest first; of them (-k) those that can notice; functions
# that are left out, after a minus, or the only ones)
SCOPE = {
    "kd_losses.py": ("test_kd_losses test_promises", "test_kd_losses or compares or learning_rate or projection", None),
    "data.py": ("test_data test_promises", "test_data or reach_the_loop or reads or same_blocks", "-describe|main"),
    "step.py": ("test_promises test_train test_switches test_phases test_bench", "test", None),
    "train.py": ("test_promises test_train test_switches test_reliability", "test", None),
    "comparison/report.py": ("test_report test_promises", "test_report or by_seed", "-figure|"),    # nor constants
    "plumbing/glue.py": ("test_finetune_glue", "metrics or constant or collapsed",
                         "accuracy|f1|matthews|pearson|spearman|ranks|evaluate"),
}
# One replacement per operator: a swap that makes no sense dies by itself and only flatters the score
OPERATORS = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul|BitAnd_BitOr|"
    r"BitOr_BitAnd|BitXor_BitAnd|RShift_LShift)|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|"
    r"GtE_Gt|Is_IsNot|IsNot_Is)|ReplaceUnaryOperator_Delete_\w+|AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|"
    r"ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceBreakWithContinue|ReplaceContinueWithBreak|NumberReplacer|"
    r"RemoveDecorator|ZeroIterationForLoop)")
CPU_SECONDS, WALL_SECONDS = 240, 1200


def mutants(file, functions):
    """(line, operator, its how-manieth place in the file) of every mutant."""
    tree = get_ast_from_path(file)
    for name in filter(OPERATORS.fullmatch, cosmic_ray.plugins.operator_names()):
        operator, n = cosmic_ray.plugins.get_operator(name)(), -1
        for node in ast_nodes(tree):
            for (line, _), _ in operator.mutation_positions(node):
                n += 1
                within = ASTQuery(node).get_definition_name() or ""
                if functions and bool(re.fullmatch(functions.lstrip("-"), within)) == functions.startswith("-"):
                    continue
                yield line, name, n


def tested(tree, arguments):
    """pytest's exit status in a fork that works in `tree`; 1 too where its time is up."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        status = pytest.main(["-x", "--tb=no", "-n", "0", "-p", "no:cacheprovider", *arguments])
        os._exit(int(status))
    end = time.monotonic() + WALL_SECONDS
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(found[1]) if os.WIFEXITED(found[1]) else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="+", default=list(SCOPE), choices=list(SCOPE))
    parser.add_argument("--tree", default=Path(__file__).parents[1], type=Path, help="the tree to test")
    config = parser.parse_args()
    found = [(name, *mutant) for name in config.modules for mutant in mutants(config.tree / name, SCOPE[name][2])]
    drawn = random.Random(config.seed).sample(found, min(config.sample or len(found), len(found)))
    print(f"{len(drawn)} of {len(found)} mutants")
    survived, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as copy:
        tree = shutil.copytree(config.tree, Path(copy) / "tree", ignore=shutil.ignore_patterns(".git", "runs", "data"))
        arguments = {}
        for name in sorted({name for name, *_ in drawn}):
            files = [f"tests/{test}.py" for test in SCOPE[name][0].split() if (tree / f"tests/{test}.py").exists()]
            arguments[name] = ["-k", SCOPE[name][1], *files]
            if tested(tree, arguments[name]):
                sys.exit(f"{' '.join(arguments[name])}: fails without any mutant, so a score would mean nothing")
        for at, (name, line, operator, place) in enumerate(drawn, 1):
            source = (tree / name).read_text()
            mutated = mutate_code(source, cosmic_ray.plugins.get_operator(operator)(), place)
            (tree / name).write_text(mutated)
            alive = tested(tree, arguments[name]) == 0
            (tree / name).write_text(source)
            old, new = next((a, b) for a, b in zip(source.split("\n"), mutated.split("\n"), strict=False) if a != b)
            survived += [name] * alive
            print(f"{at:4} {'SURVIVED' if alive else 'killed'} {name}:{line} {operator.removeprefix('core/')}"
                  + f"\n       {old.strip()}\n       {new.strip()}" * alive, flush=True)
    killed = len(drawn) - len(survived)
    print(f"{killed} of {len(drawn)} killed ({killed / len(drawn):.0%}) in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
