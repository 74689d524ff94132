"""Recordings in the same few languages, which nobody has named: how often each is heard tells something of all.

Letters: P pieces, N languages.
"""

import numpy as np

# Of new voices a model is surer than it is right: its posteriors are softened, p^(1/this). Of the languages of
# volunteers (535 clips that recipes/whisper_mole does not score; an earlier model of its `prompts5`) 78 % were right
# without a prior, 83.7 with one and softness 1, 86.5 with 2, 85.6 with 3; WER 43.8, 43.0, 41.7, 41.8 %.
_SOFTNESS = 2.0
_ITERATIONS = 30


def expect_few_languages(posterior_PN: np.ndarray) -> np.ndarray:
    """Posteriors under a prior that is learnt from all pieces together.

    p(n | piece) is taken for a likelihood; how often each language occurs is what maximises that of all pieces, with
    one imaginary piece of each language (expectation maximisation; Saerens et al., "Adjusting the Outputs of a
    Classifier to New a Priori Probabilities", 2002). Where there is one piece alone, its likeliest language stays so;
    where one differs from many others, even if it is sure of that, it may not.

    Args:
        posterior_PN: of each piece for itself.

    Returns:
        [P, N], rows that add up to 1.
    """
    pieces, languages = posterior_PN.shape
    likelihood_PN = posterior_PN ** (1 / _SOFTNESS)
    prior_N = np.full(languages, 1 / languages)
    for _ in range(_ITERATIONS):
        after_PN = likelihood_PN * prior_N
        after_PN /= after_PN.sum(1, keepdims=True)
        prior_N = (after_PN.sum(0) + 1) / (pieces + languages)
    return after_PN
