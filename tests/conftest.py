import os
import random
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")     # before tokenizers is imported anywhere
os.environ.setdefault("OMP_NUM_THREADS", "1")               # tiny models: a second thread costs more than it brings

import pytest

import prepare
import train


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
            log_every=1, device="cpu", bf16=False, peak_lr=3e-3)


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
        needs_equal_width = other.get("strategy") == "distilbert" or other.get("init") == "teacher"
        return train.Config(**(TINY | dict(
            data=str(corpus), teacher=str(narrow_teacher if needs_equal_width else teacher), budget_steps=20,
            out=str(tmp_path / "run")) | other))
    return make


@pytest.fixture
def real_data():
    """The folder of real text and GLUE tasks that NANOKD_TEST_DATA names."""
    if "NANOKD_TEST_DATA" not in os.environ:
        pytest.skip("NANOKD_TEST_DATA is not set")
    return Path(os.environ["NANOKD_TEST_DATA"])


