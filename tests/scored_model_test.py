"""Training samples of the model that scores: RULER's own, with their answers, one a document."""

import json

from experiments.scored_model import config as scored_config
from experiments.scored_model import samples
from lucid_jax.config import Config
from lucid_jax.data import check_data, load_tokenizer
from lucid_jax.data.tokenizer import ByteTokenizer, encode_document
from lucid_jax.evaluate.tasks import get_task


def test_documents_are_prompts_with_answers_and_fit_their_length():
    for index, (name, length) in enumerate(samples.SETTINGS):
        text = samples.document(index)
        task = get_task(name)
        sample = task.sample(ByteTokenizer(), length, samples._SEED, index)
        assert text.startswith(sample.prompt)
        assert task.score(text[len(sample.prompt) :], sample)[task.metric] == 1
        assert len(encode_document(ByteTokenizer(), text)) <= length


def test_a_file_of_them_is_what_the_configuration_reads(tmp_path):
    path = tmp_path / "new" / "train.jsonl"
    samples.main([f"--output={path}", "--count=40"])
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == [samples.document(i) for i in range(40)]
    values = scored_config.get_config()
    values.data.update(train=str(path), eval=str(path), holdout=0.25)
    config = Config.from_dict(values.to_dict())
    check_data(config, load_tokenizer(config.data.tokenizer))
