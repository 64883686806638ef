"""A training step is the same on any mesh and in micro-batches; non-finite steps do nothing."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import toy

from lucid_jax.config import MESH_AXES, Config, ConfigError
from lucid_jax.data import BatchLoader, load_tokenizer
from lucid_jax.data.packing import FIELDS
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.training.hlo import Traffic, collectives
from lucid_jax.training.loop import train
from lucid_jax.training.step import Trainer

pytestmark = pytest.mark.usefixtures("compilation_cache")


def mesh_config(corpus: str, shape: tuple[int, ...], model=None, **overrides) -> Config:
    """Returns a configuration that every mesh of eight devices divides.

    Without clipping and with b1 = 0, the optimiser's first moments are the gradients.
    """
    return toy.toy_config(
        corpus,
        # Sequences of 64 in stripes of 5 tokens need padding on every context-parallel mesh.
        mesh={**dict(zip(MESH_AXES, shape)), "stripe": 5},
        model={
            "vocab_size": 264, "num_kv_heads": 4, "attention_bias": True, "qk_norm": "rms",
            **(model or {}),
        },
        optim={"b1": 0.0, "clip_norm": 0.0, "z_loss": 0.1},
        telemetry=False,
        **overrides,
    )  # fmt: skip


@dataclasses.dataclass
class OneStep:
    """Runs the first training step of a configuration and returns metrics and gradients."""

    config: Config
    devices: int = 1

    def __post_init__(self):
        model = toy.model_of(self.config, self.devices)
        self.layout, self.trainer = model.layout, Trainer.build(self.config, model)
        self.step = self.trainer.make_step()

    def state(self):
        return self.trainer.init_state()

    def put(self, batch):
        batch = self.layout.stripes(batch["tokens"].shape[1]).apply(batch)
        return jax.device_put(batch, self.layout.sharding("batch", "sequence"))

    def __call__(self, batch):
        state, metrics = self.step(self.state(), self.put(batch))
        gradients = {k: v for k, v in toy.named(state.opt_state).items() if ".mu" in k}
        assert len(gradients) == len(jax.tree.leaves(state.params))
        return toy.named(metrics), gradients


@pytest.fixture(scope="module")
def batch(corpus):
    """Sequences of several documents, with unequal numbers of weighted tokens, one with none."""
    config = toy.toy_config(corpus)
    loader = BatchLoader(
        config,
        load_tokenizer("bytes"),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        split="train",
    )
    batch = {name: np.array(x) for name, x in next(loader).items()}
    assert (batch["segment_ids"].max(axis=1) >= 2).sum() >= 4
    for weights, kept in zip(batch["weights"], [64, 0, 50, 3, 64, 20, 1, 40], strict=True):
        weights[kept:] = 0
    return batch


# Sizes of data, fsdp, tensor and context. If context divides the 4 / tensor KV heads, it shards
# heads by an all-to-all, otherwise stripes of the sequence.
MESHES = [(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 4, 2), (1, 1, 1, 8), (1, 2, 1, 3)]


@pytest.fixture(scope="module")
def on_one_device(corpus, batch):
    """Metrics and gradients of an attention pattern on one device."""
    results = {}

    def run(attention):
        if attention not in results:
            config = mesh_config(corpus, (1, 1, 1), model=fields(attention))
            results[attention] = OneStep(config)(batch)
        return results[attention]

    return run


VARIANTS = {
    "path": {"attention": "softmax,lucid", "positions": "path"},
    "beta": {"attention": "lucid", "lucid_beta": True},
}


def fields(attention: str) -> dict:
    """Returns the fields of a variant, or of a pattern of attention."""
    return VARIANTS.get(attention, {"attention": attention})


def each_mesh():
    both = [(shape, "softmax,lucid") for shape in MESHES]
    # Alone, each compiles to a loop over layers without a branch.
    alone = [((1, 2, 2, 2), attention) for attention in ("lucid", "softmax")]
    for shape, attention in (*both, *alone):
        yield pytest.param(
            shape,
            attention,
            id=f"{'/'.join(map(str, shape))}-{attention}",
            marks=() if (shape, attention) == ((1, 2, 1, 3), "softmax,lucid") else pytest.mark.slow,
        )
    # The four KV heads are two pairs of differential attention.
    for shape in ((1, 2, 2, 2), (1, 1, 1, 3)):
        for attention in ("differential,lucid", "beta"):
            yield pytest.param(shape, attention, marks=pytest.mark.slow)
    # With context parallelism by heads: the devices divide the heads that `tensor` leaves.
    for shape in ((1, 2, 2, 2), (1, 1, 1, 4)):
        yield pytest.param(shape, "path", marks=pytest.mark.slow)


@pytest.mark.parametrize(("shape", "attention"), list(each_mesh()))
def test_a_mesh_changes_no_gradient(corpus, batch, on_one_device, shape, attention):
    config = mesh_config(corpus, shape, model=fields(attention))
    metrics, gradients = OneStep(config, devices=math.prod(shape))(batch)
    expected_metrics, expected_gradients = on_one_device(attention)
    toy.assert_close(metrics, expected_metrics)
    toy.assert_close(gradients, expected_gradients)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["lucid", "softmax"])
def test_context_parallelism_gathers_only_keys_and_values(corpus, attention):
    """Beyond the traffic of `context_attention`, a step only sums gradients."""
    model = {"attention": attention, "remat": "none"}
    one_step = OneStep(mesh_config(corpus, (1, 1, 1, 3), model=model), devices=3)
    stripes = one_step.layout.stripes(64)
    sharding = one_step.layout.sharding("batch", "sequence")
    batch = {
        name: jax.ShapeDtypeStruct((8, stripes.size), dtype, sharding=sharding)
        for name, dtype in FIELDS.items()
    }
    state = one_step.trainer.abstract_state
    found = collectives(one_step.step.lower(state, batch).compile().as_text())
    layers, keys = 2, 4 * 8 * stripes.size * 4 * 8
    # Keys and values; or keys, residuals, and in both passes a byte for each bad token.
    gathers, sent = 2, 2 * keys
    if attention == "lucid":
        gathers, sent = 1 + 2 * stripes.count + 2, 3 * keys + 2 * 8 * stripes.size * 4
    ids = 4 * 8 * stripes.size
    assert found.pop("all-gather") == Traffic(1 + layers * gathers, ids + layers * sent)
    assert found.pop("reduce-scatter") == Traffic(2 * layers, 2 * layers * keys // 3)
    assert found.keys() == {"all-reduce"}


def test_micro_batches_have_the_gradients_of_the_whole_batch(corpus, batch, on_one_device):
    config = mesh_config(corpus, (1, 1, 1), accumulation=4, model={"attention": "softmax,lucid"})
    accumulated, accumulated_gradients = OneStep(config)(batch)
    metrics, gradients = on_one_device("softmax,lucid")
    toy.assert_close(accumulated, metrics, tolerance=1e-6)
    toy.assert_close(accumulated_gradients, gradients)
    ids = batch["segment_ids"]
    assert metrics["['tokens']"] == (ids != 0).sum()
    sees = np.tril((ids[:, :, None] == ids[:, None]) & (ids[:, None] != 0))
    assert metrics["['pairs']"] == sees.sum()


def test_a_mesh_that_splits_kv_heads_is_refused(corpus, tmp_path):
    config = mesh_config(corpus, (1, 1, 8))
    with pytest.raises(ConfigError, match=r"mesh.tensor = 8 does not divide model.num_kv_heads"):
        train(config, tmp_path)
    assert not list(tmp_path.iterdir())
    paired = mesh_config(corpus, (2, 1, 4), model={"attention": "differential"})
    with pytest.raises(ConfigError, match=r"mesh.tensor = 4 does not divide pairs of KV heads = 2"):
        make_layout(paired)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"implementation": "reference"}, "'reference' needs mesh.context = 8 to divide .* = 4"),
        ({"implementation": "mosaic_gpu"}, "'mosaic_gpu' needs mesh.context = 8 to divide .* = 4"),
        (VARIANTS["path"], "'path' needs mesh.context = 8 to divide .* mesh.tensor = 4"),
        ({"implementation": "triton"}, "'triton' needs a mesh.stripe that 128 divides; got 5"),
    ],
)
def test_a_model_that_has_no_stripes_is_refused(corpus, model, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_layout(mesh_config(corpus, (1, 1, 1, 8), model=model))
    assert "\n" not in str(error.value)
    # With an all-to-all, every device has whole sequences of a head, which any backend takes.
    make_layout(mesh_config(corpus, (1, 1, 1, 4), model=model), jax.devices()[:4])


def test_a_mesh_that_pads_much_logs_a_warning(corpus, caplog):
    for stripe, warned in ((16, False), (40, True)):
        caplog.clear()
        make_layout(toy.toy_config(corpus, mesh={"context": 4, "fsdp": 2, "stripe": stripe}))
        assert ("of 64 tokens are padded to 160" in caplog.text) == warned
        assert ("padded" in caplog.text) == warned


def test_a_non_finite_step_changes_nothing(corpus, batch):
    config = mesh_config(corpus, (1, 1, 1), model={"attention": "softmax,lucid"})
    one_step = OneStep(config)
    state, metrics = one_step.step(one_step.state(), one_step.put(batch))
    assert metrics["finite"]
    before = toy.named(state)
    assert before[".step"] == 1

    poisoned = {**batch, "weights": np.where(batch["weights"] > 0, np.float32(np.inf), 0)}
    state, metrics = one_step.step(state, one_step.put(poisoned))
    assert not metrics["finite"]
    assert not np.isfinite(metrics["loss"])
    toy.assert_same_bits(toy.named(state), before)

    state, metrics = one_step.step(state, one_step.put(batch))
    assert metrics["finite"]
    after = toy.named(state)
    assert after[".step"] == 2
    moved = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert moved == list(before)
