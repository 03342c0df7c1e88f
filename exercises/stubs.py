"""The exercises of docs/exercises.md, to be filled in; `python -m pytest exercises` checks.  First session: what the
losses say."""
import torch.nn.functional as F


def initial_loss(vocab_size):
    """1. The masked-LM loss of a student that has seen nothing: a number, before you run anything."""
    raise NotImplementedError


def floor(z_t, tau):
    """2. The smallest value that soft_cross_entropy(z_s, z_t, tau) can have, whatever z_s is; z_t (M, V)."""
    raise NotImplementedError


def times_smaller(reduction, M, V):
    """3. How many times smaller than kd_losses.soft_kl is F.kl_div(log p_s, p_t, reduction=reduction)?  Both
    functions see (M, V); the reduction is "batchmean", "mean" or "sum"."""
    raise NotImplementedError


def other_scores(scores, mse):
    """4. Other attention scores than `scores` (B, N, S, S): the same probabilities after the softmax, so a KL
    of 0, but a mean squared error of `mse`."""
    raise NotImplementedError


def without_gradient(strategy, names):
    """5. Which of these parameters of a BertForMaskedLM of 2 layers does the strategy's loss not reach?  A
    set of names.  The strategy is "no_kd", "tinybert", "minilm" or "minilmv2"."""
    raise NotImplementedError


def gradient_of_zero(strategy, names):
    """6. Which of them does autograd reach, but with a gradient of zero (to rounding), whatever the data?"""
    raise NotImplementedError


# ------------------------------------------- second session: what a comparison costs, and what it proves

def relative_cost(strategy):
    """1. The matmul FLOPs of one training step of vanilla_kd, tinybert or minilm over those of no_kd.

    Student 6L768, teacher 12L768, S = 128, V = 30,522, 19 masked positions.  Backwards costs twice as much as
    forwards; a product of (a, b) with (b, c) is 2abc FLOPs.  Strategy.needs says where each side stops."""
    raise NotImplementedError


def interval(ours, theirs):
    """2. (mean, half width) of Welch's 95% interval of the difference ours - theirs: two lists of scores, unpaired.
    comparison.statistics.critical(f) is Student's t, two-sided, for f degrees of freedom."""
    raise NotImplementedError


def patient_kd():
    """3. Patient-KD (Sun 2019, arXiv 1908.09355) as a strategies.Strategy with three terms:

        mlm + soft_ce + 10 patient,
        patient = sum over inner layers, mean over B, of || h_s / ||h_s|| - h_t / ||h_t|| ||^2

    h (D,) is the hidden state of [CLS].  Inner layers: strategies.uniform's pairs without the
    last.  It needs equal widths."""
    raise NotImplementedError


# ------------------------------------------------ its part 4: five losses, each with one fault to repair

def loss_a(z_s, z_t, tau=1.0):
    """Soft targets: tau^2 * KL(p_t || p_s), mean over the M positions; z (M, V)."""
    return tau ** 2 * F.kl_div((z_s / tau).log_softmax(-1), (z_t / tau).softmax(-1), reduction="mean")


def loss_b(z_s, z_t, tau=1.0):
    """Soft cross-entropy whose gradient keeps its size when the temperature rises; z (M, V)."""
    return -((z_t / tau).softmax(-1) * (z_s / tau).log_softmax(-1)).sum(-1).mean()


def loss_c(q_s, k_s, q_t, k_t):
    """MiniLM's attention loss: KL(A_t || A_s), mean over heads and queries; q, k (B, N, S, H)."""
    a_s, a_t = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) for q, k in ((q_s, k_s), (q_t, k_t)))
    return F.kl_div(a_t.log(), a_s, reduction="none").sum(-1).mean()


def loss_d(x_s, x_t, relation_heads):
    """One relation of MiniLMv2: the widths (B, S, D) are split into relation heads (B, N_r, S, H_r)."""
    def relation(x):
        B, S, D = x.shape
        x = x.view(B, relation_heads, S, D // relation_heads)
        return (x @ x.mT / x.shape[-1] ** 0.5).log_softmax(-1)
    return F.kl_div(relation(x_s), relation(x_t), log_target=True, reduction="none").sum(-1).mean()


def loss_e(h_s, h_t, real):
    """TinyBERT's hidden-state loss: mean over real positions and D; h (B, S, D), real (B, S)."""
    return ((h_s - h_t) * real[..., None]).square().mean()
