"""First session: what the losses say.  The questions are in docs/exercises.md; `python -m pytest exercises`
checks."""


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
    """6. Which of them does it reach, but with a gradient of zero (to rounding), whatever the data?"""
    raise NotImplementedError
