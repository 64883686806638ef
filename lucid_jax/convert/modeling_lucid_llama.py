"""Llama models with LUCID attention (arXiv 2602.10410), for transformers.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

A LUCID layer is an ordinary attention layer whose values `v` are replaced by preconditioned ones,
`y = A⁻¹ v`, with `A_ij = exp(k̂_i·k̂_j/√D − √D)` below the diagonal, 1 on it, and `k̂ = k·√D/‖k‖`.
Cached `y` never change, so the cache keeps the keys and `y` in place of the values. Tokens that
an attention mask hides, such as padding on either side, have no entry in `A`.

The layers are those of Qwen3, without what the model lacks. `config.lucid_jax` holds the fields
that transformers has no key for.
"""

import inspect
import math

import torch
from transformers import DynamicCache
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM

# Rows of `A` that exist at one time.
BLOCK = 128
# The argument's name depends on the version of transformers.
_CACHE = next(
    name
    for name in ("cache", "past_key_values", "past_key_value")
    if name in inspect.signature(Qwen3Attention.forward).parameters
)


def precondition(
    k: torch.Tensor,
    v: torch.Tensor,
    solved: tuple[torch.Tensor, torch.Tensor],
    visible: torch.Tensor | None,
) -> torch.Tensor:
    """Solves `A y = v` for T new tokens, block by block, in float32 or wider.

    Args:
      k: Keys `[B,K,T,D]`, after RoPE.
      v: Values `[B,K,T,D]`.
      solved: Keys and `y`, `[B,K,P,D]` each, of the P tokens before.
      visible: bool `[B,1,T,P+T]`, the tokens that each new token sees; None if it sees all before.

    Returns:
      `y [B,K,T,D]`, dtype of `v`.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    keys = torch.cat([solved[0], k], 2).to(wide)
    # No square of a key near 1 overflows; a zero key stays zero.
    keys = keys / keys.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    root = math.sqrt(k.shape[-1])
    # Their products are k̂_i·k̂_j/√D.
    keys = torch.nn.functional.normalize(keys, dim=-1) * math.sqrt(root)
    y, past = solved[1].to(wide), solved[1].shape[2]
    for start in range(past, keys.shape[2], BLOCK):
        columns = keys[:, :, : start + BLOCK]
        a = torch.exp(columns[:, :, start:] @ columns.mT - root)
        rows = slice(start - past, start - past + a.shape[2])
        if visible is not None:
            a = a * visible[:, :, rows, : a.shape[3]]
        rest = v[:, :, rows] - a[..., :start] @ y
        # Reads what is below the diagonal of the block.
        block = torch.linalg.solve_triangular(a[..., start:], rest, upper=False, unitriangular=True)
        y = torch.cat([y, block], 2)
    return y[:, :, past:].to(v.dtype)


class LucidLlamaConfig(Qwen3Config):
    """The configuration of `LucidLlamaForCausalLM`."""

    model_type = "lucid_llama"


class RotaryEmbedding(torch.nn.Module):
    """RoPE whose angles are exact at any position.

    The float32 product of position 131072 and a frequency is off by up to 0.008 radians. Counted
    in turns, as fractions of 2³², the product is one of integers, and wraps.
    """

    def __init__(self, config: LucidLlamaConfig):
        super().__init__()
        # transformers 4 stores the base outside rope_scaling.
        rope = getattr(config, "rope_parameters", None) or {
            "rope_theta": config.rope_theta,
            **(config.rope_scaling or {}),
        }
        kind = rope.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"rope_type must be default, linear or llama3; got {kind!r}")

        def frequency(i: int) -> float:
            """Radians a position of pair `i`."""
            x = rope["rope_theta"] ** (-2 * i / config.head_dim)
            if kind == "linear":
                return x / rope["factor"]
            if kind == "llama3":
                turns = rope["original_max_position_embeddings"] * x / (2 * math.pi)
                low, high = rope["low_freq_factor"], rope["high_freq_factor"]
                keep = min(max((turns - low) / (high - low), 0), 1)
                return x * (keep + (1 - keep) / rope["factor"])
            return x

        # Without positions nothing turns.
        pairs, turns = config.head_dim // 2, config.lucid_jax["positions"] == "rope"
        self.turns = [round(turns * frequency(i) / (2 * math.pi) * 2**32) for i in range(pairs)]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor):
        """Returns cosine and sine `[B,T,D]` in the dtype of `x`."""
        phase = position_ids[..., None] * torch.tensor(self.turns, device=x.device)
        phase = (phase + 2**31) % 2**32 - 2**31
        angle = phase.float() * (2 * math.pi / 2**32)
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class _Preconditioner:
    """Takes the place of a cache: takes the keys and values of new tokens, returns keys and `y`."""

    def __init__(self, cache: DynamicCache | None, mask: torch.Tensor | None):
        if cache is not None and (not isinstance(cache, DynamicCache) or cache.offloading):
            kind = "an offloaded cache" if isinstance(cache, DynamicCache) else type(cache).__name__
            raise ValueError(f"LUCID attention needs a plain DynamicCache; got {kind}")
        self.cache, self.mask = cache, mask

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int, *args, **kwargs):
        """Returns the keys and `y` of all tokens of a layer, and adds the new ones to the cache."""
        solved = k[:, :, :0], v[:, :, :0]
        if self.cache is not None and self.cache.get_seq_length(layer):
            solved = self.cache.layers[layer].keys, self.cache.layers[layer].values
        visible = self.mask
        if visible is not None and visible.dtype != torch.bool:
            # Eager attention adds its mask to the logits.
            visible = visible == 0
        with torch.autocast(k.device.type, enabled=False):
            y = precondition(k, v, solved, visible)
        return (k, y) if self.cache is None else self.cache.update(k, y, layer, *args, **kwargs)


class UnscaledNorm(torch.nn.Module):
    """RMSNorm without a learnt scale, in float32."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor):
        """Maps `[...,D]` to the same shape and dtype."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LucidAttention(Qwen3Attention):
    """The attention of a layer, LUCID or softmax."""

    def __init__(self, config: LucidLlamaConfig, layer: int):
        super().__init__(config, layer)
        fields = config.lucid_jax
        pattern = fields["attention"].split(",")
        self.is_lucid = pattern[layer % len(pattern)] == "lucid"
        if not self.is_lucid:
            self.scaling /= fields["temperature"]
        if fields["qk_norm"] == "none":
            self.q_norm = self.k_norm = torch.nn.Identity()
        elif fields["qk_norm"] == "paper":
            self.q_norm = self.k_norm = UnscaledNorm(config.rms_norm_eps)
        if fields["attention_bias"]:
            for linear in (self.q_proj, self.k_proj, self.v_proj):
                linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, *args, attention_mask: torch.Tensor | None = None, **kwargs):
        """Takes and returns what transformers' attention layers do."""
        if self.is_lucid:
            kwargs[_CACHE] = _Preconditioner(kwargs.get(_CACHE), attention_mask)
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


class LucidLlamaForCausalLM(Qwen3ForCausalLM):
    """A Llama model, each of whose layers has LUCID or softmax attention."""

    config_class = LucidLlamaConfig
    # Their masks do not say which entries of `A` exist.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False

    def __init__(self, config: LucidLlamaConfig):
        super().__init__(config)
        self.model.rotary_emb = RotaryEmbedding(config)
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = LucidAttention(config, i)
        self.post_init()
