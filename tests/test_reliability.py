"""What a night brings: kills, signals, damaged files, full disks, NaNs, clocks that jump, other processes."""
import errno
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import step as step_module
import train
from data import Blocks
from plumbing import checkpoint, rundir
from plumbing.cli import UserError
from strategies import STRATEGIES

ROOT = Path(train.__file__).parent
QUIET = dict(say=lambda line: None)
pytestmark = pytest.mark.usefixtures("often")


def final(out):
    """Everything that must be bitwise equal: weights, projections, optimizer, counters."""
    state = checkpoint.load_run(Path(out))
    tensors = [*state["student"].values(), *state["proj"].values()]
    for slot in state["optimizer"]["state"].values():
        tensors += slot.values()
    return [state["steps"], *(hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tensors)]


def steps_logged(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "val" not in line]


class Killed(BaseException):
    """Stands in for SIGKILL within a process: nothing of ours catches it."""


def interrupted(monkeypatch, config, at):
    """Runs `config` until it fetches the batch of step `at`, where it dies."""
    whole, rows = Blocks.batch, config.phases[-1].blocks(config.batch_size)

    def batch(self, i, size):
        if i == at and size % rows == 0 and self.seed == config.seed and self.count > 200:
            raise Killed
        return whole(self, i, size)
    with monkeypatch.context() as m:
        m.setattr(Blocks, "batch", batch)
        with pytest.raises(Killed):
            train.train(config, **QUIET)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_that_died_ends_bitwise_like_one_that_did_not(tiny, tmp_path, monkeypatch, strategy):
    """F1, with dropout: batches, masks and dropout follow from (seed, step) alone."""
    common = dict(strategy=strategy, budget_steps=12, dropout=0.1, micro_batch=4, val_times=3, seed=5)
    whole = train.train(tiny(**common, out=str(tmp_path / "whole")), **QUIET)
    config = tiny(**common, out=str(tmp_path / "died"))
    for at in (3, 8):
        interrupted(monkeypatch, config, at)
    died = train.train(config, **QUIET)
    assert final(tmp_path / "died") == final(tmp_path / "whole") and died["val"] == whole["val"]
    assert steps_logged(tmp_path / "died") == steps_logged(tmp_path / "whole") == list(range(1, 13))
    for name in ("whole", "died"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "val" in line] == [4, 8, 12]


def command(config, **env):
    argv = [sys.executable, "-c", "import runpy, sys; from plumbing import rundir; rundir.LOG_EVERY = 1; "
            f"rundir.CHECKPOINT_MINUTES = {rundir.CHECKPOINT_MINUTES}; sys.argv[0] = 'train.py'; "
            "runpy.run_path('train.py', run_name='__main__')"]
    for name, value in asdict(config).items():
        flag = name.replace("_", "-")
        if value is not None and value != "":
            argv += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return dict(args=argv, env=os.environ | env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_and_wait_for(config, step):
    """The run as a process of its own, when its log has reached `step`."""
    process = subprocess.Popen(**command(config))
    log = Path(config.out) / "log.jsonl"
    while process.poll() is None and (not log.exists() or f'"step": {step},' not in log.read_text()):
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kill_9_at_random_steps(tiny, tmp_path, strategy):
    """F1 with the real signal."""
    common = dict(strategy=strategy, budget_steps=60, dropout=0.1)
    train.train(tiny(**common, out=str(tmp_path / "whole")), **QUIET)
    config, rng = tiny(**common, out=str(tmp_path / "died")), random.Random(strategy)
    for step in sorted(rng.sample(range(2, 55), 3)):
        process = start_and_wait_for(config, step)
        process.kill()
        process.wait()
    subprocess.run(**command(config), check=True)
    assert final(tmp_path / "died") == final(tmp_path / "whole")
    assert steps_logged(tmp_path / "died") == list(range(1, 61))


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_bitwise_like_none(tiny, tmp_path):
    """F1 at any moment: of start-up, of a step, of a checkpoint, of the model at a fraction and at the end."""
    common = dict(strategy="tinybert", budget_steps=400, dropout=0.1, fractions="0.25,0.5,0.75", micro_batch=4)
    train.train(tiny(**common, out=str(tmp_path / "whole")), **QUIET)
    config, rng, killed, began = tiny(**common, out=str(tmp_path / "died")), random.Random(0), [], 0
    log = Path(config.out) / "log.jsonl"
    while not (Path(config.out) / "summary.json").exists():
        process = subprocess.Popen(**command(config))
        lines = log.read_text().count("\n") if log.exists() else 0
        while process.poll() is None and began and (log.read_text().count("\n") if log.exists() else 0) <= lines:
            time.sleep(0.002)                           # but for the first one, each comes at least one step further
        began += 1
        if len(killed) < 20:
            time.sleep(rng.uniform(0, 0.25) if killed else 3 * rng.random())
            process.kill()
            killed.append(steps_logged(config.out)[-1:] if log.exists() else [])
        process.communicate()
    assert len(killed) == 20 and final(tmp_path / "died") == final(tmp_path / "whole")
    assert steps_logged(tmp_path / "died") == list(range(1, 401))
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.old"))
    for name in ("model", "model-0.25", "model-0.5", "model-0.75"):
        one, other = (checkpoint.read_weights(tmp_path / run / name) for run in ("whole", "died"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_write_that_is_cut_anywhere_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    """F2: dies before, between and after each file operation of a save."""
    state = dict(student=dict(w=torch.arange(1000.0)), steps=0)
    operations = dict(replace=os.replace, fsync=os.fsync)
    for cut in range(6):
        for old in (0, 1, 2):
            out = tmp_path / f"{cut}_{old}"
            out.mkdir()
            for step in range(old):
                checkpoint.save_run(out, state | dict(steps=step))
            calls = []
            with monkeypatch.context() as m:
                for name, whole in operations.items():
                    def dying(*args, whole=whole, calls=calls, cut=cut):
                        calls.append(1)
                        if len(calls) > cut:
                            raise Killed
                        return whole(*args)
                    m.setattr(os, name, dying)
                try:
                    checkpoint.save_run(out, state | dict(steps=old))
                except Killed:
                    pass
            found = checkpoint.load_run(out)
            assert (found is None and old == 0) or found["steps"] in (old - 1, old)
            checkpoint.save_run(out, state | dict(steps=99))            # leftovers do not disturb the next save
            assert checkpoint.load_run(out)["steps"] == 99


@pytest.mark.slow
def test_kill_9_during_writes_twenty_times(tmp_path):
    """F2 with the real signal."""
    code = ("import sys, torch; from pathlib import Path; from plumbing import checkpoint\n"
            "state = dict(student=dict(w=torch.zeros(2_000_000)))\n"
            "for i in range(10**6):\n"
            "    checkpoint.save_run(Path(sys.argv[1]), state | dict(steps=i))\n"
            "    print(i, flush=True)")
    rng = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.2))
        process.kill()
        process.wait()
        assert checkpoint.load_run(tmp_path)["steps"] >= 0


@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 143), *(pytest.param(number, 128 + number, marks=pytest.mark.slow)
                             for number in (signal.SIGINT, signal.SIGHUP))])
def test_a_signal_in_training_ends_with_a_checkpoint_of_the_last_finished_step(
        tiny, tmp_path, monkeypatch, number, status):
    """F3; and the same command goes on to the end that an undisturbed run has."""
    monkeypatch.setattr(rundir, "CHECKPOINT_MINUTES", 1000.0)
    config = tiny(budget_steps=10_000)
    process = start_and_wait_for(config, 20)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    state = checkpoint.load_run(Path(config.out))
    assert state["steps"] >= 20 and steps_logged(config.out) == list(range(1, state["steps"] + 1))
    assert "the same command goes on" in process.stdout.read()


def test_a_signal_in_validation_leaves_the_last_finished_step(tiny, tmp_path, monkeypatch):
    whole, calls = rundir.validate, []

    def validate(arm, blocks, signals=(), model=None):
        calls.append(1)
        if len(calls) == 2:                                             # the first after the start's
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(arm, blocks, signals, model)
    config = tiny(budget_steps=10, val_times=2)
    with monkeypatch.context() as m:
        m.setattr(rundir, "validate", validate)
        with pytest.raises(SystemExit) as e:
            train.train(config, **QUIET)
    assert e.value.code == 143
    assert checkpoint.load_run(Path(config.out))["steps"] == 5
    train.train(config, **QUIET)
    train.train(tiny(budget_steps=10, val_times=2, out=str(tmp_path / "whole")), **QUIET)
    assert final(config.out) == final(tmp_path / "whole")


def test_a_damaged_checkpoint_is_never_a_restart(tiny, monkeypatch):
    """F6."""
    config = tiny()
    interrupted(monkeypatch, config, 9)
    file = Path(config.out) / "checkpoint.pt"
    whole = file.read_bytes()
    for damage in (b"", whole[:-1], whole[:999], bytes(5000)):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=r"checkpoint.pt is damaged .*: remove it to start anew"):
            train.train(config, **QUIET)
    file.write_bytes(whole)
    for changes in (dict(strategy="tinybert"), dict(size="1L32")):
        with pytest.raises(UserError, match=f"another configuration: .*{next(iter(changes))} "):
            train.train(tiny(**changes), **QUIET)


def test_a_run_from_other_contents_under_the_same_paths_is_refused(tiny, corpus, teacher, tmp_path, monkeypatch):
    """Stopped or finished; where only --out lies elsewhere, the run is the same."""
    data, other = tmp_path / "data", tmp_path / "teacher"
    shutil.copytree(corpus, data)
    shutil.copytree(teacher, other)
    config = tiny(strategy="minilm", data=str(data), teacher=str(other), budget_steps=6)
    interrupted(monkeypatch, config, 4)
    weights = next(other.glob("*model*"))
    whole = weights.read_bytes()
    model = checkpoint.load_mlm(other).model
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias += 1
    for finished in (False, True):
        checkpoint.save_model(other, model, checkpoint.read_tokenizer(Path(teacher)))
        with pytest.raises(UserError, match="holds a run of another configuration: contents of teacher: "):
            train.train(config, **QUIET)
        shutil.rmtree(other)
        shutil.copytree(teacher, other)
        manifest = json.loads((data / "manifest.json").read_text())
        manifest["sha256"]["train.bin"] = "0" * 64
        (data / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="holds a run of another configuration: contents of data: "):
            train.train(config, **QUIET)
        shutil.copy(corpus / "manifest.json", data)
        summary = train.train(config, **QUIET)
        assert finished or summary["steps"] == 6 and weights.read_bytes() == whole
    shutil.rmtree(other)                                # no_kd reads no teacher
    train.train(tiny(data=str(data), teacher=str(other), budget_steps=2, out=str(tmp_path / "no_kd")), **QUIET)


@pytest.mark.parametrize("damage", ["", "{", "null", "\udcff", None])
def test_a_damaged_configuration_or_summary_is_one_line(tiny, damage):
    config = tiny(budget_steps=3)
    train.train(config, **QUIET)
    for name in ("summary.json", "config.json"):
        file = Path(config.out) / name
        file.unlink()
        if damage is not None:
            file.write_text(damage, errors="surrogateescape")
        elif name == "summary.json":
            continue                                    # without one, the run is not finished
        with pytest.raises(UserError, match=f"{name} is damaged or not ours.*give another --out") as e:
            train.train(config, **QUIET)
        assert "\n" not in str(e.value)


def test_the_configuration_is_written_whole(tiny, monkeypatch):
    """A kill in the middle of writing it again leaves the old one."""
    config = tiny()
    interrupted(monkeypatch, config, 3)
    before = (Path(config.out) / "config.json").read_text()

    def killed(fd):
        raise Killed
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", killed)
        with pytest.raises(Killed):
            train.train(config, **QUIET)
    assert (Path(config.out) / "config.json").read_text() == before
    assert train.train(config, **QUIET)["steps"] == 20


def test_a_forged_checkpoint_executes_nothing(tiny, monkeypatch, tmp_path):
    """F7: with a right checksum, too."""
    config = tiny()
    interrupted(monkeypatch, config, 3)

    class Malice:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")
    torch.save(dict(steps=Malice()), tmp_path / "forged")
    data = (tmp_path / "forged").read_bytes()
    (Path(config.out) / "checkpoint.pt").write_bytes(data + hashlib.sha256(data).digest())
    with pytest.raises(UserError, match="checkpoint.pt is damaged or not ours .*: remove it"):
        train.train(config, **QUIET)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_what_is_missing(tiny, monkeypatch):
    """F8: known beforehand, or met while writing."""
    config = tiny()
    interrupted(monkeypatch, config, 5)
    before = final(config.out)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")
    usage = shutil.disk_usage(".")._replace(free=1234)
    for where, name, stand_in in ((shutil, "disk_usage", lambda path: usage), (os, "fsync", full)):
        with monkeypatch.context() as m:
            m.setattr(where, name, stand_in)
            with pytest.raises(UserError, match=r"[\d,]+ bytes needed, [\d,]+ free; what was there before is intact"):
                train.train(config, **QUIET)
        assert final(config.out) == before and not list(Path(config.out).glob("*.part"))
    train.train(config, **QUIET)


@pytest.mark.parametrize("term", ["embd", "attn", "hidn"])
def test_a_term_that_is_not_finite_stops_before_the_update_and_is_named(tiny, tmp_path, monkeypatch, term):
    """F9."""
    config, whole, calls = tiny(strategy="tinybert"), step_module.loss_terms, []

    def spoilt(*args):
        total, terms = whole(*args)
        calls.append(1)
        bad = terms[term] * (math.inf if len(calls) == 8 else 1.0)
        return total - terms[term] + bad, terms | {term: bad}
    monkeypatch.setattr(step_module, "loss_terms", spoilt)
    with pytest.raises(UserError, match=rf"step \d: .*{term}.* not finite: stopped before the "
                                        "update; the last checkpoint is good; try a smaller"):
        train.train(config, **QUIET)
    state = checkpoint.load_run(Path(config.out))
    assert all(t.isfinite().all() for t in state["student"].values())
    assert state["steps"] == steps_logged(config.out)[-1]
    del calls[:]
    monkeypatch.setattr(rundir, "CHECKPOINT_MINUTES", 1000.0)
    with pytest.raises(UserError, match="update; there is no checkpoint yet; try a smaller"):
        train.train(tiny(strategy="tinybert", out=str(tmp_path / "none")), **QUIET)


class Clock:
    """A fake monotonic clock: every reading is `tick` seconds after the one before."""
    def __init__(self, tick=0.5):
        self.at, self.tick = 0.0, tick

    def __call__(self):
        self.at += self.tick
        return self.at


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_time_budget_is_charged_once_however_often_the_run_dies(tiny, monkeypatch, strategy):
    """F10, F12: the charged time is the budget and at most one step more; the learning rate goes on where it was."""
    config = tiny(strategy=strategy, budget_steps=None, budget_hours=60 / 3600)
    for at in (6, 12):
        whole = Blocks.batch

        def batch(self, i, size, at=at, whole=whole):
            if i == at and self.count > 200:
                raise Killed
            return whole(self, i, size)
        with monkeypatch.context() as m:
            m.setattr(Blocks, "batch", batch)
            with pytest.raises(Killed):
                train.train(config, now=Clock(), **QUIET)
    summary = train.train(config, now=Clock(), **QUIET)
    lines = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "val" not in line]
    step = max(b["seconds"] - a["seconds"] for a, b in zip(lines, lines[1:], strict=False))
    assert 60 <= summary["charged_seconds"] <= 60 + step + 1
    assert [line["step"] for line in lines] == list(range(1, summary["steps"] + 1))
    jumps = [abs(b["lr"] - a["lr"]) for a, b in zip(lines, lines[1:], strict=False)]
    assert max(jumps[4:]) < 1.5 * sorted(jumps)[len(jumps) // 2]


def test_a_wall_clock_that_jumps_changes_nothing(tiny, monkeypatch):
    """F10: only the monotonic clock is read."""
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the wall clock was read"))
    train.train(tiny(budget_steps=3), **QUIET)


def test_fractions_save_model_directories_on_the_way(tiny):
    config = tiny(fractions="0.25,0.5")
    train.train(config, **QUIET)
    models = [checkpoint.load_mlm(Path(config.out) / name).model for name in ("model-0.25", "model-0.5", "model")]
    weights = [m.bert.embeddings.word_embeddings.weight for m in models]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    for wrong in ("0.5,2", "half"):
        with pytest.raises(UserError, match="--fractions"):
            train.train(tiny(fractions=wrong), **QUIET)


# ------------------------------------------------------------------------------------------------- many processes

def torchrun(config, ranks=2, **env):
    arguments = command(config, **env)
    arguments["args"] = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone",
                         *arguments["args"][1:]]
    return arguments


def weights(out):
    return checkpoint.load_run(Path(out))["student"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_are_one(tiny, tmp_path, strategy):
    """Two ranks x micro-batch 4 against one x 8: the same batches, the same updates."""
    common = dict(strategy=strategy, budget_steps=50)
    train.train(tiny(**common, micro_batch=8, out=str(tmp_path / "one")), **QUIET)
    config = tiny(**common, micro_batch=4, out=str(tmp_path / "two"))
    subprocess.run(**torchrun(config), check=True)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max() for k in one) < 1e-5
    names = checkpoint.read_weights(tmp_path / "two/model")
    assert not any("module." in name or "_orig_mod" in name for name in names)


@pytest.mark.slow
def test_two_ranks_that_have_finished_exit_with_0(tiny, tmp_path):
    """Ten times: torch's gloo aborts some processes in their last moments."""
    for i in range(10):
        config = tiny(strategy="minilm", budget_steps=4, micro_batch=4, out=str(tmp_path / f"{i}"))
        done = subprocess.run(**torchrun(config))
        assert done.returncode == 0 and "val_attn" in done.stdout, done.stderr


@pytest.mark.slow
def test_two_ranks_stop_together(tiny, tmp_path):
    """F20: SIGTERM to one rank, then kill -9 of one: no hang, exit status not 0, a good checkpoint to go on from."""
    config = tiny(strategy="minilm", budget_steps=3000, micro_batch=4)
    for number in (signal.SIGTERM, signal.SIGKILL):
        log = Path(config.out) / "log.jsonl"
        wanted = f'"step": {len(log.read_text().splitlines()) + 30 if log.exists() else 30},'
        process = subprocess.Popen(**torchrun(config))
        while process.poll() is None and not (log.exists() and wanted in log.read_text()):
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), number)
        assert process.wait(timeout=60) != 0
        state = checkpoint.load_run(Path(config.out))
        assert state["steps"] == len(steps_logged(config.out)) >= 30


@pytest.mark.slow
def test_memory_stays_flat(tiny):
    """A soak: 20,000 steps of a tiny model."""
    config = tiny(budget_steps=20_000, size="1L16", heads=1)
    process, rss = subprocess.Popen(**command(config)), []
    while process.poll() is None:
        time.sleep(0.5)
        try:
            rss.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096)
        except (OSError, IndexError):
            break
    assert process.wait() == 0 and rss[len(rss) * 9 // 10] < 1.02 * rss[len(rss) // 5]     # writing the model is later


RANK_1_IS_DIFFERENT = """
import math, os, sys, time
import step, train; from plumbing import cli
skew = 1e6 if os.environ["RANK"] == "1" else 0.0
whole, calls = step.loss_terms, []

def spoilt(*args):
    total, terms = whole(*args)
    calls.append(1)
    bad = os.environ["RANK"] == "1" and len(calls) > int(os.environ["SPOIL_AFTER"])
    return total * (math.nan if bad else 1.0), {k: v * (math.nan if bad else 1.0) for k, v in terms.items()}
step.loss_terms = spoilt
cli.run(lambda config: train.main(config, now=lambda: time.monotonic() * (3 if skew else 1) + skew), train.Config, "")
"""


@pytest.mark.slow
@pytest.mark.parametrize("spoil_after", [40, 10 ** 9])
def test_ranks_whose_clocks_or_losses_differ_take_the_same_decisions(tiny, tmp_path, spoil_after):
    """F9, F20: a NaN on one rank stops both before the update; a clock that runs three times as fast, neither."""
    (tmp_path / "different.py").write_text(RANK_1_IS_DIFFERENT)
    config = tiny(strategy="vanilla_kd", budget_steps=None, budget_hours=3 / 3600, micro_batch=4)
    arguments = torchrun(config, PYTHONPATH=str(ROOT), SPOIL_AFTER=str(spoil_after))
    arguments["args"][arguments["args"].index(str(ROOT / "train.py"))] = str(tmp_path / "different.py")
    done = subprocess.run(**arguments, timeout=120)
    if spoil_after < 10 ** 9:
        assert done.returncode != 0 and done.stderr.count("mlm and soft_ce") == 2           # said by both ranks
        assert all(t.isfinite().all() for t in weights(config.out).values())
    else:
        assert done.returncode == 0, done.stderr
        summary = json.loads((Path(config.out) / "summary.json").read_text())
        assert 3 <= summary["charged_seconds"] < 4 and summary["ranks"] == 2
