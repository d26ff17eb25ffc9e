from __future__ import annotations

import io
import random

import numpy as np
import torch

from kl3m_nb.training.resume import random_state, set_random_state


def _draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        *torch.randn(3).tolist(),
    ]


def test_all_generators_go_on_where_the_state_was_taken():
    """Taken between the two halves of a pair of normal numbers, stored as a
    checkpoint stores it.
    """
    random.gauss(0, 1), np.random.randn(), torch.randn(1)
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = _draw()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert _draw() == expected
