"""Solutions: the five losses, repaired."""
import torch.nn.functional as F


def loss_a(z_s, z_t, tau=1.0):
    """reduction="mean" divided by V, too."""
    return tau ** 2 * F.kl_div((z_s / tau).log_softmax(-1), (z_t / tau).softmax(-1), reduction="batchmean")


def loss_b(z_s, z_t, tau=1.0):
    """tau^2 was missing."""
    return -tau ** 2 * ((z_t / tau).softmax(-1) * (z_s / tau).log_softmax(-1)).sum(-1).mean()


def loss_c(q_s, k_s, q_t, k_t):
    """F.kl_div(log q, p) is KL(p || q): the student's logarithm comes first."""
    a_s, a_t = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) for q, k in ((q_s, k_s), (q_t, k_t)))
    return F.kl_div(a_s.log(), a_t, reduction="none").sum(-1).mean()


def loss_d(x_s, x_t, relation_heads):
    """A view of (B, S, D) as (B, N, S, H) mixes positions: split D first, then swap the axes."""
    def relation(x):
        B, S, D = x.shape
        x = x.view(B, S, relation_heads, D // relation_heads).transpose(1, 2)
        return (x @ x.mT / x.shape[-1] ** 0.5).log_softmax(-1)
    return F.kl_div(relation(x_s), relation(x_t), log_target=True, reduction="none").sum(-1).mean()


def loss_e(h_s, h_t, real):
    """Padding was left out of the sum, but not of what it is divided by."""
    return (h_s - h_t).square().mean(-1)[real.bool()].mean()
