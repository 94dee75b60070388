"""A decoder layer in few operators: what Llama, Qwen, Mistral, Gemma and Phi 3 compute between their linears.

    x ── norm ── q, k, v ── rotate ── store ── attend ── o + x ── norm ── gate, up ── act * ── down + x

Gemma 2 and 3 norm what o and down give before it is added; Qwen 3 and Gemma 3 norm q and k before they are rotated.

transformers' own layer makes 38 kernels of it. This one reads the same modules, at the same paths, and computes the
same: its linears are grouped where they read the same tensor, q and k are rotated together, sums ride on the linears
before them. Which families have layers of this form says `families.Family.plain_block`.

Nobody reads the last layer but the head, so past its attention it computes only the rows whose logits are wanted: of a
prompt the last one. That is 7 % of the arithmetic of a prompt's 12 layers in a 144M Llama, 3 % of 8B's 32.
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from chorus.kernels import GatedActivation, Norm, gated_mul, paged_attention, qk_norm_rope_store, residual_norm
from chorus.models.attention import StepAttention
from chorus.models.group import LinearGroup
from chorus.models.linear import AdaptedLinear


class Block(nn.Module):
    """In the place of a transformers decoder layer, over its modules."""

    self_attn: Any
    mlp: Any

    def __init__(self, layer: Any, *, is_last: bool) -> None:
        super().__init__()
        self._is_last = is_last
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
        self._activation = getattr(mlp, "act_fn", None) or mlp.activation_fn
        self._gated = gated_of(self._activation)
        self._layer = int(attention.layer_idx)
        self._head_dim = int(attention.head_dim)
        self._heads = int(attention.o_proj.in_features) // self._head_dim
        self._scale = float(attention.scaling)
        self._soft_cap: float | None = getattr(attention, "attn_logit_softcapping", None)
        self._window: int | None = getattr(
            attention, "sliding_window", getattr(attention.config, "sliding_window", None)
        )

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return tuple(part for part in (self._qkv, self._gate_up) if isinstance(part, LinearGroup))

    @property
    def past_attention(self) -> tuple[AdaptedLinear, ...]:
        """The linears that see attended rows."""
        gate_up = self._gate_up.members if isinstance(self._gate_up, LinearGroup) else (self._gate_up,)
        return (self.self_attn.o_proj, *gate_up, self.mlp.down_proj)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        chorus_step: StepAttention,
        **_: Any,
    ) -> Tensor:
        """hidden_states [1, T, hidden]; cos and sin [1, T, D]. Of the last layer only the step's wanted rows return."""
        x = hidden_states[0]
        qkv = self._qkv(residual_norm(x, None, self._attention_norm)).view(x.shape[0], -1, self._head_dim)
        attended = self._attend(qkv, position_embeddings, chorus_step)
        if self._is_last and (wanted := chorus_step.wanted) is not None:
            x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
            if not len(x):  # a piece of a prompt from which nothing is told: all of it is in the cache
                return x[None]
        x = _add(x, attended, self.self_attn.o_proj, self._o_norm)
        gated = self._feed(residual_norm(x, None, self._mlp_norm))
        return _add(x, gated, self.mlp.down_proj, self._down_norm)[None]

    def _feed(self, x: Tensor) -> Tensor:
        """act(gate) * up: in one launch where there is a kernel for it, on a CPU in one with the linear."""
        if self._gated is None:
            gate, up = self._gate_up(x).chunk(2, dim=-1)
            product: Tensor = self._activation(gate) * up
            return product
        if self._gate_up.packed is not None and not self._gate_up.has_deltas:
            return self._gate_up.packed.gated(x, self._gate_up.bias, self._gated)
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return gated_mul(gate, up, self._gated)

    def _attend(self, qkv: Tensor, positions: tuple[Tensor, Tensor], step: StepAttention) -> Tensor:
        """qkv [T, H + 2 H_kv, D] to [T, H D]."""
        k_cache, v_cache = step.k_cache[self._layer], step.v_cache[self._layer]
        query = qk_norm_rope_store(
            qkv, k_cache, v_cache, step.rope(*positions), q_norm=self._query_norm, k_norm=self._key_norm
        )
        return paged_attention(
            query, k_cache, v_cache, step.plan, scale=self._scale, window=self._window, soft_cap=self._soft_cap
        ).flatten(1)


class LastNorm(nn.Module):
    """In the place of the norm after all layers, over its weight: one launch instead of eight."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.weight = module.weight
        self._norm = norm_of(module)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[1, T, hidden]."""
        return residual_norm(hidden_states[0], None, self._norm)[None]


def norm_of(module: Any) -> Norm:
    """What a transformers RMSNorm computes: Llama's, or Gemma's, whose weight is 1 + w."""
    if hasattr(module, "variance_epsilon"):
        return Norm("rms", module.weight.detach(), module.variance_epsilon)
    return Norm("rms_plus_one", module.weight.detach(), module.eps)


def gated_of(activation: Any) -> GatedActivation | None:
    """Its name where there is a kernel for activation(gate) * up."""
    if isinstance(activation, SiLUActivation | nn.SiLU):
        return "silu"
    return "gelu_tanh" if isinstance(activation, GELUTanh) else None


def _add(residual: Tensor, x: Tensor, linear: Any, norm: Norm | None) -> Tensor:
    """residual + norm(linear(x))."""
    if norm is None:
        out: Tensor = linear.add_to(residual, x)
        return out
    return residual_norm(linear(x), None, norm).add_(residual)


def use_blocks(module: Any) -> Block:
    """Puts blocks in the place of a model's decoder layers, and our norm in that of the one after them.

    Returns the last.
    """
    model = module.model
    blocks = [Block(layer, is_last=layer is model.layers[-1]) for layer in model.layers]
    for i, block in enumerate(blocks):
        model.layers[i] = block
    model.norm = LastNorm(model.norm)
    return blocks[-1]


def _one_or_group(parent: Any, fused: str, names: tuple[str, ...]) -> AdaptedLinear | LinearGroup:
    if hasattr(parent, fused):
        one: AdaptedLinear = getattr(parent, fused)
        return one
    return LinearGroup([getattr(parent, name) for name in names])
