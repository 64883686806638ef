"""Learning rates for a variant of the stage, on 100 steps of it.

    python run.py --config=experiments/real_model/config.py:lucid --mode=sweep \\
        --sweep=experiments/real_model/sweep.py --workdir=runs/stage/sweep_lucid
"""


def get_trials():
    """Returns the changes of each trial."""
    return [
        {"optim.learning_rate": rate, "steps": 100, "eval_every": 100, "checkpoint.every": 100}
        for rate in (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
    ]
