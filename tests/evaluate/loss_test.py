"""The loss of an evaluation counts the right targets."""

import json

import pytest
import toy

from lucid_jax.data import BatchLoader, load_tokenizer
from lucid_jax.evaluate.loss import LossEvaluator


@pytest.mark.slow
def test_only_completions_count_even_behind_batches_of_prompts(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [{"prompt": "x" * 2000, "completion": answer} for answer in ("yes", "no")]
    file.write_text("\n".join(map(json.dumps, lines)))
    config = toy.toy_config(str(file), eval_batches=20, data={"shards": 1})
    model = toy.model_of(config)
    sharding = model.layout.sharding("batch", "sequence")
    loader = BatchLoader(config, load_tokenizer("bytes"), sharding, split="eval")
    report = LossEvaluator(config, model, loader)(model.init(seed=0))
    assert report.tokens == len("yes") + len("no") + 2
    assert report.loss > 0
