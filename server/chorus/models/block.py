"""A decoder layer in few operators: what Llama, Qwen, Mistral, Gemma and Phi 3 compute between their linears.

    x ── norm ── q, k, v ── rotate ── store ── attend ── o + x ── norm ── gate, up ── act * ── down + x

Gemma 2 and 3 norm what o and down give before it is added; Qwen 3 and Gemma 3 norm q and k before they are rotated.

transformers' own layer makes 38 kernels of it. This one reads the same modules, at the same paths, and computes the
same: its linears are grouped where they read the same tensor, q and k are rotated together, sums ride on the linears
before them. Which families have layers of this form says `families.Family.plain_block`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chorus.kernels import paged_attention, store_kv
from chorus.models.attention import StepAttention
from chorus.models.group import LinearGroup
from chorus.models.linear import AdaptedLinear

Norm = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """In the place of a transformers decoder layer, over its modules."""

    self_attn: Any
    mlp: Any

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, part in layer.named_children():
            setattr(self, name, part)
        attention, mlp = layer.self_attn, layer.mlp
        norms_outputs = hasattr(layer, "pre_feedforward_layernorm")
        self._attention_norm = norm_of(layer.input_layernorm)
        self._mlp_norm = norm_of(layer.pre_feedforward_layernorm if norms_outputs else layer.post_attention_layernorm)
        self._o_norm = norm_of(layer.post_attention_layernorm) if norms_outputs else None
        self._down_norm = norm_of(layer.post_feedforward_layernorm) if norms_outputs else None
        self._query_norm, self._key_norm = (
            norm_of(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
        )
        self._qkv = _one_or_group(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        self._gate_up = _one_or_group(mlp, "gate_up_proj", ("gate_proj", "up_proj"))
        self._act: Callable[[Tensor], Tensor] = getattr(mlp, "act_fn", None) or mlp.activation_fn
        self._layer = int(attention.layer_idx)
        self._head_dim = int(attention.head_dim)
        self._heads = int(attention.o_proj.in_features) // self._head_dim
        self._rotated = self._heads + self._heads // int(attention.num_key_value_groups)
        self._scale = float(attention.scaling)
        self._soft_cap: float | None = getattr(attention, "attn_logit_softcapping", None)
        self._window: int | None = getattr(
            attention, "sliding_window", getattr(attention.config, "sliding_window", None)
        )

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
        qkv = self._qkv(self._attention_norm(x)).view(len(x), -1, self._head_dim)  # [T, H + 2 H_kv, D]
        attended = self._attend(qkv, *position_embeddings, chorus_step)
        x = _add(x, attended, self.self_attn.o_proj, self._o_norm)
        gate, up = self._gate_up(self._mlp_norm(x)).chunk(2, dim=-1)
        return _add(x, self._act(gate).mul_(up), self.mlp.down_proj, self._down_norm)[None]

    def _attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: StepAttention) -> Tensor:
        """[T, H D]."""
        query_key, value = qkv[:, : self._rotated], qkv[:, self._rotated :]
        if self._query_norm and self._key_norm:
            query, key = query_key[:, : self._heads], query_key[:, self._heads :]
            query_key = torch.cat((self._query_norm(query), self._key_norm(key)), dim=1)
        query_key = rotate(query_key, cos[0], sin[0])
        query, key = query_key[:, : self._heads], query_key[:, self._heads :]
        k_cache, v_cache = step.k_cache[self._layer], step.v_cache[self._layer]
        store_kv(key, value, k_cache, v_cache, step.plan.slots)
        return paged_attention(
            query.contiguous(), k_cache, v_cache, step.plan,
            scale=self._scale, window=self._window, soft_cap=self._soft_cap,
        ).flatten(1)  # fmt: skip


def norm_of(module: Any) -> Norm:
    """An RMS norm over the last axis that computes what the module does."""
    weight: Tensor = module.weight
    if hasattr(module, "variance_epsilon"):
        return partial(rms_norm, weight=weight, epsilon=module.variance_epsilon)
    return partial(gemma_norm, weight=1 + weight.detach().float(), epsilon=module.eps)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / RMS(x), rounded, times the weight; as transformers' Llama does it."""
    return torch.mul(x, _inverse_rms(x, epsilon), out=torch.empty_like(x)).mul_(weight)


def gemma_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / RMS(x) times the float32 weight, rounded once; as transformers' Gemma does it, whose weight is 1 + w."""
    return torch.mul(x * _inverse_rms(x, epsilon), weight, out=torch.empty_like(x))


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


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


def _add(residual: Tensor, x: Tensor, linear: Any, norm: Norm | None) -> Tensor:
    """residual + norm(linear(x))."""
    if norm is None:
        out: Tensor = linear.add_to(residual, x)
        return out
    normed = norm(linear(x))
    return normed.add_(residual)


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
