"""What a run takes where nobody says it: text, teacher, size, heads, batch size."""
import dataclasses
import json

import pytest

import train
from plumbing import settle
from plumbing.cli import UserError
from plumbing.files import read_json


@pytest.fixture
def bare(corpus, teacher, tmp_path, monkeypatch):
    """A configuration in an empty folder, whose docstrings are the corpus and whose box's teacher is ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settle, "BOX", teacher)
    monkeypatch.setattr(settle, "docstrings", lambda model: str(corpus))

    def config(**given):
        return train.Config(**dict(strategy="tinybert", budget_tokens=10 ** 7, seq_len=32) | given)
    return config


def taken(config):
    said = []
    return settle.settled(config, said.append, train.gradients), said


def test_nothing_given_takes_docstrings_the_boxs_teacher_and_half_of_it(bare, corpus, teacher):
    config, said = taken(bare())
    shape = json.loads((teacher / "config.json").read_text())
    assert (config.data, config.teacher) == (str(corpus), str(teacher))
    assert config.size == f"{-(-shape['num_hidden_layers'] // 2)}L{shape['hidden_size']}"
    assert config.heads == shape["num_attention_heads"]
    assert len(said) == 3 and "--data" in said[0] and "--teacher" in said[1]


def test_no_kd_has_the_boxs_size_and_names_no_teacher(bare):
    config, said = taken(bare(strategy="no_kd"))
    assert config.size == taken(bare())[0].size and not any("--teacher" in line for line in said)


def test_data_of_another_vocabulary_mean_bert_base(bare, teacher, corpus, monkeypatch):
    monkeypatch.setattr(settle, "vocabulary_of", lambda model: "another")
    config, _ = taken(bare(strategy="no_kd", data=str(corpus)))
    assert (config.teacher, config.size, config.heads) == ("bert-base-uncased", "6L768", None)


def test_what_is_given_stays(bare, corpus, teacher):
    given = bare(data=str(corpus), teacher=str(teacher), size="1L48", heads=2, batch_size=4)
    assert taken(given) == (given, [])


@pytest.mark.parametrize("tokens, size", [(2000 * 32 * 1024, 1024), (10 ** 9, 1024), (2000 * 32 * 100, 64),
                                          (2000 * 32 * 16, 16), (300 * 32 * 16, 16)])
def test_the_batch_is_the_largest_power_of_two_that_buys_2000_steps(bare, tokens, size):
    assert taken(bare(budget_tokens=tokens, size="1L48"))[0].batch_size == size


def test_flops_buy_what_their_price_says(bare):
    config, said = taken(bare(budget_tokens=None, budget_flops=1e11, size="1L48"))
    steps = int(said[-1].split(" buys ")[1].split()[0].replace(",", ""))
    from plumbing.checkpoint import read_config
    from plumbing.student import student_shape
    from plumbing.tokens import TokenDirectory
    shapes = student_shape(config, TokenDirectory(config.data)), read_config(settle.Path(config.teacher))
    flops = settle.flops_of_block(config, shapes) * config.batch_size
    assert steps == pytest.approx(1e11 / flops, rel=0.01) and (steps >= 2000 or config.batch_size == 16)


def test_hours_are_bought_at_the_speed_that_is_measured(bare, monkeypatch):
    monkeypatch.setattr(settle, "blocks_per_second", lambda config, gradients: 100.0)
    assert taken(bare(budget_tokens=None, budget_hours=1.0, size="1L48"))[0].batch_size == 128    # 360,000 blocks


def test_the_speed_is_measured(bare, monkeypatch):
    monkeypatch.setattr(settle, "SECONDS", 0.1)
    config = dataclasses.replace(taken(bare(size="1L48"))[0], micro_batch=16, batch_size=16)
    assert settle.blocks_per_second(config, train.gradients) > 16


def test_steps_and_a_given_micro_batch_are_kept(bare):
    config, _ = taken(bare(budget_tokens=None, budget_steps=3))
    assert config.batch_size == 1024
    config, _ = taken(bare(micro_batch=24, budget_tokens=2000 * 32 * 64))
    assert config.batch_size % 24 == 0


def test_a_budget_too_small_for_random_weights_is_refused_with_a_size_that_fits(bare):
    tiny = bare(strategy="no_kd", budget_tokens=None, budget_flops=3e13, size="6L768")
    with pytest.raises(UserError, match=r"too little.*--size 4L256.*--batch-size 16"):
        taken(tiny)
    assert taken(dataclasses.replace(tiny, batch_size=16))[1]           # goes on anyway
    with pytest.raises(UserError, match=r"give a larger budget"):
        taken(dataclasses.replace(tiny, budget_flops=1e6))


def test_a_wrong_wish_is_refused_before_any_text_is_read(bare, monkeypatch):
    monkeypatch.setattr(settle, "docstrings", lambda model: pytest.fail("read"))
    for wish in (dict(strategy="tinybrt"), dict(budget_steps=4), dict(init_layers="0,1")):
        with pytest.raises(UserError):
            taken(bare(**wish))


def test_a_run_that_has_begun_goes_on_with_what_it_took(bare, tmp_path):
    small = bare(budget_tokens=None, budget_flops=1e9, batch_size=8, val_blocks=2, val_times=1, size="1L48",
                 out=str(tmp_path / "run"))
    train.main(small, say=lambda line: None)
    before = read_json(tmp_path / "run/config.json")
    config, said = taken(dataclasses.replace(small, batch_size=None, data=None, size=None))
    assert (config.batch_size, config.data, config.size, said) == (8, before["data"], "1L48", [])


def test_a_run_that_learned_nothing_says_so(bare, tmp_path):
    said = []
    config = bare(budget_tokens=None, budget_steps=2, batch_size=2, val_blocks=2, val_times=1, out=str(tmp_path / "r"))
    train.main(config, say=said.append)
    assert any(line.startswith("warning: 2 steps") for line in said)
    said.clear()
    config = dataclasses.replace(config, out=str(tmp_path / "s"), init="teacher")
    train.main(config, say=said.append)
    assert not any("too little" in line for line in said)


def test_docstrings_are_made_once(tmp_path, monkeypatch, teacher):
    import prepare

    monkeypatch.chdir(tmp_path)
    made = []

    def fake(config):
        made.append(config.out)
        (tmp_path / config.out).mkdir(parents=True)
        (tmp_path / config.out / "manifest.json").write_text("{}")
    monkeypatch.setattr(prepare, "prepare", fake)
    first, second = settle.docstrings(teacher), settle.docstrings(teacher)
    assert first == second == f"data/docstrings-{settle.vocabulary_of(teacher)}" and made == [first]


def test_validations_take_a_twentieth_of_an_hour_budget_at_most(bare, tmp_path, monkeypatch):
    from plumbing import rundir

    config = bare(budget_tokens=None, budget_hours=1 / 3600, batch_size=2, val_blocks=2, val_times=50,
                  out=str(tmp_path / "r"))
    real = rundir.validate

    def slow(*args, **named):
        import time
        time.sleep(0.02)
        return real(*args, **named)
    monkeypatch.setattr(rundir, "validate", slow)
    train.main(config, say=lambda line: None)
    lines = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    assert 1 <= sum("val" in line for line in lines) <= 3               # 0.05 s of 1 s
