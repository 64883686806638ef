"""Training samples of the model that scores: RULER's own, with their answers, one a document."""

import json
import re

from experiments.scored_model import config as scored_config
from experiments.scored_model import samples
from lucid_jax.config import Config
from lucid_jax.data import check_data, load_tokenizer
from lucid_jax.data.tokenizer import ByteTokenizer, encode_document
from lucid_jax.evaluate.tasks import get_task


def test_every_third_document_is_a_prompt_with_answers_that_fits_its_length():
    for turn, (name, length) in enumerate(samples.SETTINGS):
        text = samples.document(3 * turn + 2)
        task = get_task(name)
        sample = task.sample(ByteTokenizer(), length, samples._SEED, turn)
        assert text.startswith(sample.prompt)
        assert task.score(text[len(sample.prompt) :], sample)[task.metric] == 1
        assert len(encode_document(ByteTokenizer(), text)) <= length


def test_other_needles_are_asked_with_their_numbers():
    text = samples.document(4)
    told = dict(re.findall(r"for ([\w-]+) is: (\d+)\.", text))
    asked = re.findall(r"for ([\w-]+) mentioned in the provided text is (\d+)\.", text)
    assert len(asked) > len(told) / 2
    assert all(told[key] == number for key, number in asked)
    assert len(encode_document(ByteTokenizer(), text)) <= samples.LENGTH


def test_repeated_texts_are_full_rows_of_several_periods():
    texts = [samples.document(3 * i) for i in range(40)]
    assert {len(encode_document(ByteTokenizer(), text)) for text in texts} == {samples.LENGTH}
    periods = {next(p for p in range(1, 99) if text[p:] == text[:-p]) for text in texts}
    assert min(periods) >= 8
    assert len(periods) > 20


def test_a_file_of_them_is_what_the_configuration_reads(tmp_path):
    path = tmp_path / "new" / "train.jsonl"
    samples.main([f"--output={path}", "--count=40"])
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == [samples.document(i) for i in range(40)]
    values = scored_config.get_config()
    values.data.update(train=str(path), eval=str(path), holdout=0.25)
    config = Config.from_dict(values.to_dict())
    check_data(config, load_tokenizer(config.data.tokenizer))
