"""The schedules of the learning rate, at the steps where they turn."""

import math

import numpy as np
import pytest

from lucid_jax.config import OptimConfig
from lucid_jax.training.optimizer import learning_rate


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {5: 0.5, 10: 1, 55: 0.55, 100: 0.1}),
        ({"warmup": 0.0}, {0: 1, 50: 0.55, 100: 0.1}),
        ({"warmup": 1.0}, {50: 0.5, 100: 1}),
        ({"schedule": "constant"}, {0: 0, 5: 0.5, 10: 1, 55: 1, 100: 1, 1000: 1}),
        ({"schedule": "wsd"}, {5: 0.5, 10: 1, 60: 1, 80: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "warmup": 0.6}, {60: 1, 80: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "decay": 0.0}, {10: 1, 99: 1, 100: 0.1}),
    ],
)
def test_learning_rates(settings, expected):
    config = OptimConfig(**{"learning_rate": 2.0, "warmup": 0.1, "decay": 0.4, **settings})
    schedule = learning_rate(config, steps=100)
    found = {step: float(schedule(step)) / 2 for step in expected}
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-6)
    assert all(math.isfinite(schedule(step)) for step in range(101))


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_a_run_of_one_step_has_a_rate(schedule):
    assert float(learning_rate(OptimConfig(schedule=schedule), steps=1)(1)) > 0
