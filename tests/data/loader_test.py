"""Loaders resume exactly, and their sequences depend on shards, not on processes."""

import json
import pathlib

import jax
import numpy as np
import pytest

from lucid_jax.config import ConfigError
from lucid_jax.data import BatchLoader, check_data, load_tokenizer
from lucid_jax.data import loader as loader_module
from lucid_jax.data.packing import FIELDS
from lucid_jax.parallel.stripes import Stripes


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def _assert_equal(actual, expected):
    assert actual.keys() == expected.keys() == FIELDS.keys()
    for name in FIELDS:
        np.testing.assert_array_equal(actual[name], expected[name], name)


@pytest.fixture
def mixed_config(corpus, write_jsonl, make_config):
    """Makes a run with two sources, the second of fewer documents than shards."""
    # A high weight for the first, because grain takes 8 ms to shuffle an index of three.
    short = write_jsonl("short.jsonl", ["one", "two of two", "three"])

    def make(**data):
        return make_config(train=f"{corpus}@9, {short}", eval=f"{corpus}, {short}", **data)

    return make


def test_batches_are_global_arrays_with_the_given_sharding(mixed_config, make_loader, sharding):
    batch = next(make_loader(mixed_config()))
    assert batch.keys() == FIELDS.keys()
    for name, dtype in FIELDS.items():
        assert batch[name].shape == (8, 64)
        assert batch[name].dtype == dtype
        assert batch[name].sharding == sharding


def test_stripes_only_reorder_and_pad_the_tokens(mixed_config, make_loader, sharding):
    config, stripes = mixed_config(), Stripes(64, shards=4, width=5)
    expected = next(make_loader(config))
    tokenizer = load_tokenizer(config.data.tokenizer)
    actual = next(BatchLoader(config, tokenizer, sharding, split="train", stripes=stripes))
    assert {x.shape for x in actual.values()} == {(8, 80)}
    _assert_equal({name: stripes.restore(np.asarray(x)) for name, x in actual.items()}, expected)
    assert actual["weights"].sum() == expected["weights"].sum()


def test_the_order_depends_on_the_seed_and_not_on_threads(mixed_config, make_loader, take):
    first = take(make_loader(mixed_config(seed=1)), 3)
    _assert_equal(take(make_loader(mixed_config(seed=1, read_threads=4)), 3), first)
    assert (take(make_loader(mixed_config(seed=2)), 3)["tokens"] != first["tokens"]).any()


@pytest.mark.parametrize(
    ("split", "packing", "batches", "threads", "shards"),
    [
        ("train", "pack", 7, 3, 4),
        ("eval", "pack", 7, 3, 4),
        *(_slow(split, "document", 7, 3, 4) for split in ("train", "eval")),
        *(_slow(split, p, 0, 1, 0) for split in ("train", "eval") for p in ("pack", "document")),
    ],
)
def test_resumption_is_exact(
    mixed_config, make_loader, take, split, packing, batches, threads, shards
):
    config = mixed_config(packing=packing, read_threads=threads, shards=shards)
    loader = make_loader(config, split)
    if batches:
        take(loader, batches)
    state = loader.get_state()
    expected = take(loader, 20)

    fresh = make_loader(config, split)
    fresh.set_state(state)
    _assert_equal(take(fresh, 20), expected)

    # The same loader, which has read on, restores the state from JSON.
    fresh.set_state(json.loads(json.dumps(state)))
    assert fresh.get_state().keys() == state.keys()
    # A resumed run is resumed again before its next batch.
    again = make_loader(config, split)
    again.set_state(json.loads(json.dumps(fresh.get_state())))
    for loader in (fresh, again):
        _assert_equal(take(loader, 20), expected)


def test_an_evaluation_can_be_reset(mixed_config, make_loader, take):
    loader = make_loader(mixed_config(), "eval")
    first = take(loader, 30)
    assert first["weights"][0].any()
    assert not first["weights"][-1].any()
    loader.reset()
    _assert_equal(take(loader, 30), first)


_GOOD = [json.dumps({"text": f"line {i}"}) for i in range(30)]


@pytest.fixture
def bad_corpus(tmp_path):
    """Thirty lines, of which two are not JSON, and a folder of texts of which one is in Latin-1."""
    lines = ['{"text": ' if i in (7, 20) else line for i, line in enumerate(_GOOD)]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    (tmp_path / "texts").mkdir()
    for i in range(150):
        (tmp_path / f"texts/{i:03d}.txt").write_bytes(b"\xe9" if i == 148 else b"text")
    return f"{tmp_path}/bad.jsonl, {tmp_path}/texts/"


@pytest.mark.parametrize("split", ["train", "eval"])
def test_bad_documents_are_skipped_and_counted(
    bad_corpus, make_config, make_loader, take, split, caplog
):
    data = {"train": bad_corpus, "eval": bad_corpus, "packing": "document", "shards": 2}
    config = make_config(**data)
    check_data(config, load_tokenizer("bytes"))
    loader = make_loader(config, split)
    first = take(loader, 60)
    read = {
        bytes(x[1:].astype(np.uint8)[: x.argmin() - 2]) for x in first["tokens"].reshape(-1, 64)
    }
    assert {f"line {i}".encode() for i in range(30) if i not in (7, 20)} <= read
    loader.log_skipped()
    assert "bad.jsonl, line 8: not a line of JSON" in caplog.text
    assert f"data.{split} skipped 3 documents, the first: " in caplog.text
    # A run resumes behind the bad lines.
    state, expected = loader.get_state(), take(loader, 5)
    fresh = make_loader(config, split)
    fresh.set_state(json.loads(json.dumps(state)))
    _assert_equal(take(fresh, 5), expected)

    with pytest.raises(ConfigError, match=r"bad.jsonl, line \d+: not a line of JSON|000148"):
        take(make_loader(make_config(**data, on_bad_line="fail"), split), 60)


def test_one_document_feeds_every_shard(write_jsonl, make_config, make_loader, take):
    path = write_jsonl("a.jsonl", ["alone"])
    fields = take(make_loader(make_config(train=path, batch_size=16)), 3)
    assert fields["segment_ids"].all(axis=-1).all()


@pytest.mark.parametrize("packing", ["pack", "document"])
def test_a_shard_that_has_ended_gives_empty_sequences(
    write_jsonl, make_config, make_loader, take, packing
):
    # Three documents for four shards of two sequences: the last shard has no document.
    path = write_jsonl("a.jsonl", ["long " * 100, "b", "c"])
    config = make_config(train=path, eval=path, shards=4, packing=packing)
    fields = take(make_loader(config, "eval"), 10)
    has_tokens = fields["segment_ids"].any(axis=-1).reshape(10, 4, 2)
    sequences = has_tokens.sum(axis=(0, 2)).tolist()
    assert sequences == [8 if packing == "pack" else 1, 1, 1, 0]
    assert has_tokens[0, :3, 0].all()
    assert not has_tokens[-1].any()


@pytest.mark.parametrize(
    "axes", [("y", "x"), _slow(()), _slow(("x",)), _slow((None, "x")), _slow((("x", "y"),))]
)
def test_sequences_do_not_depend_on_the_sharding(mixed_config, make_loader, take, axes):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    spec = jax.sharding.PartitionSpec(*axes)
    config = mixed_config(shards=4)
    expected = take(make_loader(config), 5)
    loader = make_loader(config, sharding=jax.sharding.NamedSharding(mesh, spec))
    _assert_equal(take(loader, 5), expected)


class _ProcessSharding:
    """A sharding as one of several processes sees it, with its own devices only."""

    def __init__(self, blocks):
        self._blocks = blocks

    def addressable_devices_indices_map(self, shape):
        return {f"device {i}": block for i, block in enumerate(self._blocks)}


@pytest.fixture
def local_arrays(monkeypatch):
    """Makes loaders return the sequences of a `_ProcessSharding` as numpy arrays."""

    def make(shape, sharding, callback):
        blocks = sharding.addressable_devices_indices_map(shape).values()
        return np.concatenate([callback(block) for block in blocks])

    monkeypatch.setattr(loader_module.jax, "make_array_from_callback", make)


@pytest.mark.parametrize(
    ("processes", "shards"),
    [(2, 4)] + [_slow(p, s) for p in (1, 2, 4) for s in (1, 2, 4, 8) if (p, s) != (2, 4)],
)
def test_each_process_has_its_part_of_the_batch(
    mixed_config, make_loader, take, local_arrays, processes, shards
):
    config = mixed_config(shards=shards)
    everything = (slice(None), slice(None))
    expected = take(make_loader(config, sharding=_ProcessSharding([everything])), 10)
    size = 8 // processes
    state = {}
    for process in range(processes):
        start, stop = process * size, (process + 1) * size
        middle = start + size // 2
        blocks = [(slice(start, middle), slice(None)), (slice(middle, stop), slice(None))]
        loader = make_loader(config, sharding=_ProcessSharding(blocks))
        own = {name: x[:5, start:stop] for name, x in expected.items()}
        _assert_equal(take(loader, 5), own)
        # It opens the shards of its sequences and no others.
        assert len(loader.get_state()) == max(1, shards // processes)
        state |= loader.get_state()

    # One process resumes from the states of all of them together.
    resumed = make_loader(config, sharding=_ProcessSharding([everything]))
    resumed.set_state(state)
    _assert_equal(take(resumed, 5), {name: x[5:] for name, x in expected.items()})


def test_default_number_of_shards(mixed_config, make_loader):
    for batch_size, shards in ((8, 8), (16, 16), (24, 12), (40, 10), (256, 16)):
        loader = make_loader(mixed_config(batch_size=batch_size))
        assert len(loader.get_state()) == shards


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("batch_size", {"batch_size": 16}),
        ("seed", {"seed": 1}),
        ("data.train", {"train": "{}/b.jsonl"}),
        ("data.sequence_length", {"sequence_length": 32}),
        ("data.packing", {"packing": "document"}),
        ("data.shards", {"shards": 8}),
        ("data.holdout", {"holdout": 0.5}),
        ("data.text_field", {"text_field": "id"}),
    ],
    ids=str,
)
def test_a_state_of_other_data_is_refused(tmp_path, make_config, make_loader, field, changes):
    lines = "".join(json.dumps({"text": f"{i}", "id": f"{i}"}) + "\n" for i in range(9))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(lines)
    data = {"train": f"{tmp_path}/a.jsonl", "shards": 4}
    state = make_loader(make_config(**data)).get_state()
    if "train" in changes:
        changes = {"train": changes["train"].format(tmp_path)}
    with pytest.raises(ConfigError, match=rf"^{field} was .*, is now .*checkpoint\.init_from"):
        make_loader(make_config(**data | changes)).set_state(state)


def test_changed_files_behind_the_same_name_are_refused(
    tmp_path, make_config, make_loader, write_words
):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("a")
    config = make_config(train=f"text:{corpus}", tokenizer=write_words({"a": 0, "b": 1}))
    state = make_loader(config).get_state()
    write_words({"a": 1, "b": 0})
    with pytest.raises(ConfigError, match=r"^data.tokenizer was '\w+', is now '\w+'"):
        make_loader(config).set_state(state)
    write_words({"a": 0, "b": 1})
    make_loader(config).set_state(state)
    (corpus / "b.txt").write_text("b")
    message = r"^data.train was 'text:corpus@1 \(1 documents\)', .*\(2 documents\)'"
    with pytest.raises(ConfigError, match=message):
        make_loader(config).set_state(state)
    (corpus / "b.txt").unlink()
    (corpus / "a.txt").write_text("b")
    with pytest.raises(ConfigError, match=r"^content of data.train was \['\w{16}'\], is now "):
        make_loader(config).set_state(state)


def test_data_may_move_with_or_without_a_record_of_its_content(
    tmp_path, make_config, make_loader, write_jsonl, take
):
    folder = tmp_path / "two words"
    folder.mkdir()
    (folder / "x.txt").write_text("text of a folder")
    path = write_jsonl("short.jsonl", ["one", "two of two"])
    old = make_loader(make_config(train=f"{path}@9, text:{folder}, python-stdlib@2"))
    state = old.get_state()
    expected = take(old, 2)
    (tmp_path / "new" / "home").mkdir(parents=True)
    moved = [x.rename(tmp_path / "new/home" / x.name) for x in (pathlib.Path(path), folder)]
    config = make_config(train=f"{moved[0]}@9, text:{moved[1]}/, python-stdlib@2")
    earlier = {
        shard: {name: x for name, x in values.items() if name != "content of data.train"}
        | {
            "data.train": f"jsonl:{path}@9 (2 documents), text:{folder}@1 (1 documents), "
            + values["data.train"].rpartition(", ")[2]
        }
        for shard, values in state.items()
    }
    for saved in (state, earlier):
        loader = make_loader(config)
        loader.set_state(saved)
        _assert_equal(take(loader, 2), expected)
    moved[0].write_text(moved[0].read_text().replace("one", "two"))
    make_loader(config).set_state(earlier)
    with pytest.raises(ConfigError, match=r"^content of data\.train was"):
        make_loader(config).set_state(state)


def test_other_spellings_of_the_same_data_are_accepted(
    tmp_path, make_config, make_loader, corpus, monkeypatch
):
    state = make_loader(make_config(train=corpus, shards=0)).get_state()
    monkeypatch.chdir(tmp_path)
    again = make_config(train=" jsonl:./corpus.jsonl@1.0", shards=8, eval=corpus)
    make_loader(again).set_state(state)
    # Earlier versions wrote only these fields.
    kept = ("data.shards", "data.packing", "stream")
    make_loader(again).set_state({i: {k: x[k] for k in kept} for i, x in state.items()})


def test_a_state_that_lacks_a_shard_is_refused(mixed_config, make_loader):
    state = make_loader(mixed_config(shards=4)).get_state()
    del state["2"]
    with pytest.raises(ConfigError, match="lacks shard 2 of 4"):
        make_loader(mixed_config(shards=4)).set_state(state)
