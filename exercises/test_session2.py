import functools

import pytest
import stubs
import torch
from torch.utils.flop_counter import FlopCounterMode

import kd_losses as kd
import strategies
from model import BertConfig, BertForMaskedLM


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@functools.cache
def flops(name):
    """What torch counts in one training step on one block, on tensors without memory."""
    strategy = strategies.STRATEGIES[name].for_depths(6, 12)
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        student, teacher = (BertForMaskedLM(BertConfig.of_size(size)) for size in ("6L768", "12L768"))
        ids, masked, labels = (torch.zeros(shape, dtype=torch.long) for shape in ((1, 128), (1, 19), 19))
        s, t = student(ids, masked, want=strategy.want("student")), {}
        if want := strategy.want("teacher"):
            with torch.no_grad():
                t = teacher(ids, masked, want=want)
        strategies.loss_terms(strategy, s, t, strategies.Context(labels, 1.0, 48, torch.nn.ModuleDict()))[0].backward()
    return counted.get_total_flops()


@pytest.mark.parametrize("strategy, documented", [("vanilla_kd", 1.64), ("tinybert", 1.54), ("minilm", 1.39)])
def test_1_relative_cost(strategy, documented):
    predicted = stubs.relative_cost(strategy)
    counted = flops(strategy) / flops("no_kd")
    assert counted == pytest.approx(documented, abs=0.005) and predicted == pytest.approx(counted, abs=0.005)


def test_2_interval():
    assert stubs.interval([70, 72, 74], [69, 70, 71]) == pytest.approx((2, 4.155), abs=0.001)
    assert stubs.interval([1, 5, 9], [0, 4, 8]) == pytest.approx((1, 9.068), abs=0.001)     # agreeing pairs are no help
    assert stubs.interval([1, 2, 3], [4, 5, 6, 9]) == pytest.approx((-4, 3.277), abs=0.001)


def test_3_patient_kd():
    torch.manual_seed(0)
    strategy = stubs.patient_kd()
    assert strategy.same_width and strategy.needs_teachers_head and strategy.trains_lm_head
    strategy = strategy.for_depths(3, 6)
    student, teacher = (BertForMaskedLM(BertConfig.of_size(size, vocab_size=50)).double().eval()
                        for size in ("3L64", "6L64"))
    ids, masked, labels = torch.randint(50, (4, 16)), torch.arange(3).expand(4, 3), torch.randint(50, (12,))
    s = student(ids, masked, want=strategy.want("student"))
    t = teacher(ids, masked, want=strategy.want("teacher"))
    total, terms = strategies.loss_terms(strategy, s, t, strategies.Context(labels, 1.0, 1, torch.nn.ModuleDict()))
    patient = 0
    for l_s, l_t in ((0, 1), (1, 3)):           # TinyBERT's map, without the last pair
        h_s, h_t = (m(ids, want=[("hidden", i)])["hidden", i] for m, i in ((student, l_s), (teacher, l_t)))
        for a, b in zip(h_s[:, 0], h_t[:, 0], strict=True):
            patient += (a / a.norm() - b / b.norm()).square().sum() / 4
    z_s, z_t = (m(ids, masked)["logits"] for m in (student, teacher))
    mlm, soft_ce = kd.masked_lm_loss(z_s, labels), kd.soft_cross_entropy(z_s, z_t)
    assert {n: v.item() for n, v in terms.items()} == pytest.approx(
        dict(mlm=mlm.item(), soft_ce=soft_ce.item(), patient=patient.item()))
    assert total.item() == pytest.approx((mlm + soft_ce + 10 * patient).item())


def test_4a():
    z = rand(2, 6, 50)
    assert stubs.loss_a(*z, 2.0).item() == pytest.approx(kd.soft_kl(*z, 2.0).item())


def test_4b():
    z = rand(2, 6, 50)
    assert stubs.loss_b(*z, 3.0).item() == pytest.approx(kd.soft_cross_entropy(*z, 3.0).item())


def test_4c():
    qk = rand(4, 2, 3, 5, 8)
    assert stubs.loss_c(*qk).item() == pytest.approx(kd.attention_kl(*qk).item())


def test_4d():
    x = rand(2, 2, 5, 12)
    assert stubs.loss_d(*x, 3).item() == pytest.approx(kd.relation_kl(*x, 3).item())


def test_4e():
    h, real = rand(2, 2, 5, 12), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert stubs.loss_e(*h, real).item() == pytest.approx(kd.hidden_mse(*h, None, real).item())
