"""A decoder layer in as few operators as there are: what Llama, Qwen, Mistral and Phi 3 compute between their linears.

    x ── norm ── q, k, v ── rotate ── store ── attend ── o + x ── norm ── gate, up ── act * ── down + x

transformers' own layer makes 38 kernels of it. This one reads the same modules, at the same paths, and computes the
same: its linears are grouped where they read the same tensor, q and k are rotated together, sums ride on the linears
before them. Which families have layers of this form says `families.Family.plain_block`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chorus.kernels import paged_attention, store_kv
from chorus.models.attention import StepAttention
from chorus.models.group import LinearGroup
from chorus.models.linear import AdaptedLinear


class Block(nn.Module):
    """In the place of a transformers decoder layer, over its modules."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        attention, mlp = layer.self_attn, layer.mlp
        self._qkv = _one_or_group(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        self._gate_up = _one_or_group(mlp, "gate_up_proj", ("gate_proj", "up_proj"))
        self._act: Callable[[Tensor], Tensor] = getattr(mlp, "act_fn", None) or mlp.activation_fn
        self._layer = int(attention.layer_idx)
        self._head_dim = int(attention.head_dim)
        self._heads = int(attention.o_proj.in_features) // self._head_dim
        self._rotated = self._heads + self._heads // int(attention.num_key_value_groups)
        self._scale = float(attention.scaling)
        self._window: int | None = getattr(
            attention, "sliding_window", getattr(attention.config, "sliding_window", None)
        )
        self._norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return tuple(part for part in (self._qkv, self._gate_up) if isinstance(part, LinearGroup))

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        chorus_step: StepAttention,
        **_: Any,
    ) -> Tensor:
        """hidden_states [1, T, hidden]; cos and sin [1, T, D]."""
        x = hidden_states[0]
        qkv = self._qkv(rms_norm(x, self.input_layernorm)).view(len(x), -1, self._head_dim)  # [T, H + 2 H_kv, D]
        attended = self._attend(qkv, *position_embeddings, chorus_step)
        x = self.self_attn.o_proj.add_to(x, attended)
        gate, up = self._gate_up(rms_norm(x, self.post_attention_layernorm)).chunk(2, dim=-1)
        out: Tensor = self.mlp.down_proj.add_to(x, self._act(gate).mul_(up))
        return out[None]

    def _attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: StepAttention) -> Tensor:
        """[T, H D]."""
        query_key, value = qkv[:, : self._rotated], qkv[:, self._rotated :]
        if self._norms is not None:
            query_key = self._normed(query_key)
        query_key = rotate(query_key, cos[0], sin[0])
        query, key = query_key[:, : self._heads], query_key[:, self._heads :]
        k_cache, v_cache = step.k_cache[self._layer], step.v_cache[self._layer]
        store_kv(key, value, k_cache, v_cache, step.plan.slots)
        attended = paged_attention(
            query.contiguous(), k_cache, v_cache, step.plan, scale=self._scale, window=self._window
        )
        return attended.flatten(1)

    def _normed(self, query_key: Tensor) -> Tensor:
        assert self._norms is not None
        query_norm, key_norm = self._norms
        query, key = query_key[:, : self._heads], query_key[:, self._heads :]
        return torch.cat((rms_norm(query, query_norm), rms_norm(key, key_norm)), dim=1)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """x / RMS(x) over the last axis, rounded, times the weight; as transformers' Llama does it."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = length.square_().div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return torch.mul(x, inverse, out=torch.empty_like(x)).mul_(norm.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [T, H, D] by cos and sin [T, R], R <= D: pairs are (i, i + R / 2); the rest stays."""
    width = cos.shape[-1]
    half = width // 2
    turned = x[..., :width]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(turned, cos[:, None], out=out[..., :width])
    out[..., :half].addcmul_(turned[..., half:], sin[:, None, :half], value=-1)
    out[..., half:width].addcmul_(turned[..., :half], sin[:, None, half:])
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    return out


def use_blocks(module: Any) -> None:
    """Puts blocks in the place of a model's decoder layers."""
    layers = module.model.layers
    for i, layer in enumerate(layers):
        layers[i] = Block(layer)


def _one_or_group(parent: Any, fused: str, names: tuple[str, ...]) -> AdaptedLinear | LinearGroup:
    if hasattr(parent, fused):
        one: AdaptedLinear = getattr(parent, fused)
        return one
    return LinearGroup([getattr(parent, name) for name in names])
