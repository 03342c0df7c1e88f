"""Second session: what a comparison costs, and what it proves.  The questions are in docs/exercises.md;
`python -m pytest exercises` checks."""

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}        # Student's t, two-sided, for n - 1 degrees of freedom


def relative_cost(strategy):
    """1. The matmul FLOPs of one training step of vanilla_kd, tinybert or minilm over those of no_kd.

    Student 6L768, teacher 12L768, S = 128, V = 30,522, 19 masked positions.  Backwards costs twice as much as
    forwards; a product of (a, b) with (b, c) is 2abc FLOPs.  Strategy.needs says where each side stops."""
    raise NotImplementedError


def interval(ours, theirs):
    """2. (mean, half width) of the 95% interval of the difference ours - theirs; score i is from seed i."""
    raise NotImplementedError


def patient_kd():
    """3. Patient-KD (Sun 2019, arXiv 1908.09355) as a strategies.Strategy with three terms:

        mlm + soft_ce + 10 patient,
        patient = sum over inner layers, mean over B, of || h_s / ||h_s|| - h_t / ||h_t|| ||^2

    h (D,) is the hidden state of [CLS].
 Inner layers: strategies.uniform's pairs without the last.  It needs
    equal widths."""
    raise NotImplementedError
