import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import socket
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")     # before tokenizers is imported anywhere
os.environ.setdefault("OMP_NUM_THREADS", "1")               # tiny models: a second thread costs more than it brings

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import kd_losses
import model
import prepare
import train
from plumbing import rundir


def text(documents, seed=0):
    """Documents of made-up sentences whose words depend on each other, so that there is something to learn."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(200)]
    follow = {w: rng.sample(words, 4) for w in words}

    def line():
        at, out = rng.choice(words), []
        for _ in range(rng.randint(5, 20)):
            out.append(at)
            at = rng.choice(follow[at])
        return " ".join(out) + "."
    return ["\n".join(line() for _ in range(rng.randint(1, 5))) for _ in range(documents)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A token directory: 600 documents, a vocabulary of 300."""
    out = tmp_path_factory.mktemp("corpus") / "tokens"
    prepare.prepare(prepare.Config(["made up"], str(out), None, 300, 0.1), text(600))
    return out


TINY = dict(size="2L32", heads=2, seq_len=32, batch_size=8, micro_batch=8, dropout=0.0, val_blocks=8, val_times=1,
            device="cpu", bf16=False, peak_lr=3e-3)


@pytest.fixture(autouse=True, scope="session")
def every_step_is_logged():
    rundir.LOG_EVERY = 1


@pytest.fixture
def often(monkeypatch):
    """A checkpoint after every step."""
    monkeypatch.setattr(rundir, "CHECKPOINT_MINUTES", 1e-9)


@pytest.fixture(scope="session")
def make_teacher(corpus, tmp_path_factory):
    def make(size, steps):
        out = tmp_path_factory.mktemp("teacher")
        train.train(train.Config(strategy="no_kd", data=str(corpus), budget_steps=steps, out=str(out / "run"),
                                 **(TINY | dict(size=size))), say=lambda line: None)
        return out / "run/model"
    return make


@pytest.fixture(scope="session")
def teacher(make_teacher):
    """A model directory with an LM head: 3L48 with 2 heads, other depth and width than the student."""
    return make_teacher("3L48", 60)


@pytest.fixture(scope="session")
def narrow_teacher(make_teacher):
    """As wide as the student and twice as deep, for what needs equal widths."""
    return make_teacher("4L32", 20)


@pytest.fixture
def tiny(corpus, teacher, narrow_teacher, tmp_path):
    """Makes train.Config's for a tiny run; keyword arguments override."""
    def make(**other):
        needs_equal_width = (other.get("strategy") in ("distilbert", "mobilebert", "sentence")
                             or other.get("init") == "teacher")
        return train.Config(**(TINY | dict(
            data=str(corpus), teacher=str(narrow_teacher if needs_equal_width else teacher), budget_steps=20,
            out=str(tmp_path / "run")) | other))
    return make


# ------------------------------------------------------------------------------- a real run, seen from outside

LOSSES = ("masked_lm_loss", "soft_cross_entropy", "soft_kl", "soft_cross_entropy_over_v", "hidden_mse",
          "embedding_mse", "cosine_loss", "attention_mse", "attention_kl", "value_relation_kl", "relation_kl",
          "sentence_mse")


class Seen:
    """What passed through the models, the losses and the optimizer, in the order in which it came.

    `forwards`: one record per forward pass of a whole model (warm-up on zeros and FLOP counting are left out): ids,
    masked, training, grad, step (updates before it), drops [(shape, p, share of zeros, hash of the mask)], outputs
    {module: what it gave}.  `losses`: per loss in training (name, arguments, the last two forwards).  `updates`: one
    per optimizer step: groups as the optimizer holds them, grads by parameter.  `first`, `last`: the weights before
    the first and after the last update."""

    def __init__(self, on):
        self.forwards, self.losses, self.updates, self.first, self.last, self.on = [], [], [], None, None, on
        self.current, self.student, self.within_loss = None, None, False

    def before_module(self, module, args):
        name = type(module).__name__
        if name not in ("BertForMaskedLM", "BertForSequenceClassification"):
            return
        ids, self.current = args[0], None
        if ids.device.type == "meta":
            return
        if torch.is_grad_enabled():
            self.student = module
        if ids.any():
            self.current = SimpleNamespace(
                model=module, training=module.training, grad=torch.is_grad_enabled(), step=len(self.updates),
                ids=ids.clone(), masked=args[1].clone() if name == "BertForMaskedLM" else None, drops=[], outputs={})
            self.forwards.append(self.current)
            self.on("student" if self.current.grad else
                    "teacher" if module is not self.student and self.student.training else "validation")

    def after_module(self, module, args, output):
        if self.current is None:
            return
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            self.current.outputs[module] = output.detach()
        if isinstance(module, torch.nn.Dropout):                        # before the classifier
            self.dropped(args[0], module.p if module.training else 0.0, output)

    def dropped(self, x, p, out):
        if self.current is not None:
            bits = (out != 0).numpy().tobytes()
            self.current.drops.append((tuple(x.shape), p, (out == 0).double().mean().item(),
                                       hashlib.sha256(bits).hexdigest()))
        return out

    def before_update(self, optimizer, args, kwargs):
        groups = [g | dict(params=list(g["params"])) for g in optimizer.param_groups]
        params = [p for g in groups for p in g["params"]]
        if self.first is None:
            self.first = {p: p.detach().clone() for p in params}
        self.updates.append(SimpleNamespace(groups=groups, grads={p: p.grad.clone() for p in params}))
        self.on("update")

    def after_update(self, optimizer, args, kwargs):
        self.last = {p: p.detach().clone() for g in optimizer.param_groups for p in g["params"]}

    def spy(self, name, loss):
        def spied(*args, **named):
            outer, self.within_loss = self.within_loss, True
            try:
                if self.current is not None and torch.is_grad_enabled() and not outer:      # not a loss in a loss
                    self.losses.append((name, args, self.forwards[-2:]))
                return loss(*args, **named)
            finally:
                self.within_loss = outer
        return spied

    @property
    def micro_batches(self):
        """The forward passes that were trained on."""
        return [f for f in self.forwards if f.grad]

    @property
    def validations(self):
        """The student's forward passes that were not."""
        return [f for f in self.forwards if f.model is self.student and not f.grad]

    @property
    def teachers(self):
        """The teacher's forward passes: (those of training, those of validation)."""
        pairs = list(zip(self.forwards, [*self.forwards[1:], None], strict=True))
        of = [(f, after) for f, after in pairs if f.model is not self.student]
        return [f for f, after in of if after.grad], [f for f, after in of if not after.grad]

    def names(self):
        """{parameter: its name}, projections as they come: proj 0, proj 1."""
        named = {p: name for name, p in self.student.named_parameters()}
        others = [p for p in self.first if p not in named]
        return named | {p: f"proj {i}" for i, p in enumerate(others)}


@contextlib.contextmanager
def watching(on=lambda kind: None):
    """Yields a Seen of all that runs inside; `on` is called at each student, teacher, validation and update."""
    seen, dropout = Seen(on), model.dropout
    handles = [register_module_forward_pre_hook(seen.before_module), register_module_forward_hook(seen.after_module),
               register_optimizer_step_pre_hook(seen.before_update),
               register_optimizer_step_post_hook(seen.after_update)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(rundir, "d_order", lambda *_: 0.0)                      # its passes are over blocks in another order
        m.setattr(rundir, "lost_and_won", lambda _: {})                   # so are its
        m.setattr(model, "dropout", lambda x, p: seen.dropped(x, p, dropout(x, p)))
        for name in LOSSES:
            spy = seen.spy(name, getattr(kd_losses, name))
            m.setattr(kd_losses, name, spy)
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def watched():
    """watched(config) runs train.train under watch: a Seen with the summary and the lines of log.jsonl."""
    def run(config, on=lambda kind: None, **other):
        with watching(on) as seen:
            seen.summary = train.train(config, say=lambda line: None, **other)
        seen.log = log_of(config.out)
        return seen
    return run


@pytest.fixture(scope="session")
def watched_ranks():
    """As `watched`, in two processes as torchrun starts them: per rank its micro-batches (ids, masked, drops, step)
    and the gradients of each update.  Forked, so that nothing is imported again."""
    def rank_of(config, rank, port):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="localhost",
                          MASTER_PORT=str(port))

        def keep(kind):                 # as it comes: what happens to the process at its end does not matter here
            if kind == "update":
                kept = [dict(ids=f.ids, masked=f.masked, drops=f.drops, step=f.step) for f in seen.micro_batches]
                torch.save((kept, [list(u.grads.values()) for u in seen.updates]), f"{config.out}.{rank}")
        with watching(keep) as seen:
            train.train(config, say=lambda line: None)
        os._exit(0)

    def run(config):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=rank_of, args=(config, rank, port)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
            if process.is_alive():
                process.kill()
        return [torch.load(f"{config.out}.{rank}") for rank in range(2)]
    return run


@pytest.fixture
def real_data():
    """The folder of real text and GLUE tasks that NANOKD_TEST_DATA names."""
    if "NANOKD_TEST_DATA" not in os.environ:
        pytest.skip("NANOKD_TEST_DATA is not set")
    return Path(os.environ["NANOKD_TEST_DATA"])


