import pytest
import stubs
import torch
import torch.nn.functional as F

from kd_losses import attention_kl, attention_mse, masked_lm_loss, soft_cross_entropy, soft_kl
from model import BertConfig, BertForMaskedLM
from strategies import STRATEGIES, Context, loss_terms, projections


def rand(*shape):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("vocab_size", [300, 4096, 30522])
def test_1_initial_loss(vocab_size):
    torch.manual_seed(0)
    student = BertForMaskedLM(BertConfig.of_size("2L64", vocab_size=vocab_size)).eval()
    labels = torch.randint(vocab_size, (8 * 32,))
    logits = student(torch.randint(vocab_size, (8, 32)))["logits"].flatten(0, 1)
    assert stubs.initial_loss(vocab_size) == pytest.approx(masked_lm_loss(logits, labels).item(), rel=0.02)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_2_floor(tau):
    z_s, z_t = rand(2, 6, 50)
    found = float(stubs.floor(z_t, tau))
    assert soft_cross_entropy(z_s, z_t, tau) - soft_kl(z_s, z_t, tau) == pytest.approx(found)
    assert soft_cross_entropy(z_t, z_t, tau) == pytest.approx(found)


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_3_times_smaller(reduction):
    z_s, z_t = rand(2, 6, 50)
    theirs = F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction=reduction)
    assert stubs.times_smaller(reduction, 6, 50) == pytest.approx((soft_kl(z_s, z_t) / theirs).item())


def test_4_other_scores():
    scores = rand(2, 3, 5, 5)
    other = stubs.other_scores(scores, 4.0)
    k = 5 ** 0.5 * torch.eye(5, dtype=torch.float64)            # q k^T / sqrt(5) = q
    assert attention_kl(other, k, scores, k).item() == pytest.approx(0, abs=1e-9)
    assert attention_mse(other, k, scores, k).item() == pytest.approx(4)


def gradients(name):
    """{parameter: largest gradient, or None}"""
    torch.manual_seed(0)
    strategy = STRATEGIES[name].for_depths(2, 3)
    student, teacher = (BertForMaskedLM(BertConfig.of_size(size, heads=2, vocab_size=50)).double().eval()
                        for size in ("2L32", "3L64"))
    ids, masked, labels = torch.randint(50, (4, 16)), torch.arange(3).expand(4, 3), torch.randint(50, (12,))
    for p in (*student.parameters(), *teacher.parameters()):
        p.data.normal_(std=0.3)                 # as if they had been trained
    with torch.no_grad():
        t = teacher(ids, masked, want=strategy.want("teacher"))
    context = Context(labels, strategy.tau, 4, projections(strategy, 32, 64).double())
    loss_terms(strategy, student(ids, masked, want=strategy.want("student")), t, context)[0].backward()
    return {n: None if p.grad is None else p.grad.abs().max().item() for n, p in student.named_parameters()}


@pytest.mark.parametrize("strategy", ["no_kd", "tinybert", "minilm", "minilmv2"])
def test_5_without_gradient(strategy):
    found = gradients(strategy)
    assert set(stubs.without_gradient(strategy, list(found))) == {n for n, g in found.items() if g is None}


@pytest.mark.parametrize("strategy", ["no_kd", "tinybert", "minilm", "minilmv2"])
def test_6_gradient_of_zero(strategy):
    found = gradients(strategy)
    zero = {n for n, g in found.items() if g is not None and g < 1e-12}
    assert set(stubs.gradient_of_zero(strategy, list(found))) == zero
