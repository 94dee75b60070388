"""Embeddings of tokens and of positions, which add the batch's low-rank deltas like the linears do."""

from torch import Tensor, nn

from chorus.kernels import LowRankPlan, RankPool, low_rank
from chorus.models.sites import Site


class AdaptedEmbedding(nn.Module):
    """An embedding of ids or positions [1, T], whatever its class does with what it finds (Gemma scales), and deltas.

    `pool` holds the site's adapter weights once there are any; `plan` is set before each step by the runner.
    """

    def __init__(self, base: nn.Embedding, site: Site) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.pool: RankPool | None = None
        self.plan: LowRankPlan | None = None

    @property
    def weight(self) -> Tensor:
        """[in, out]; that of tokens a tied head shares."""
        return self.base.weight

    def base_weight(self) -> Tensor:
        """The weight as the base holds it."""
        return self.base.weight.detach()

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        if self.plan is not None and self.pool is not None:
            low_rank(y.view(-1, y.shape[-1]), ids.reshape(-1), self.pool, self.plan)
        return y


def embedding_site(name: str, embedding: nn.Embedding) -> Site:
    """The site of a model's embedding of tokens or positions."""
    scale = getattr(embedding, "embed_scale", None)
    rounded = float(scale.to(embedding.weight.dtype)) if isinstance(scale, Tensor) else float(scale or 1.0)
    return Site(
        name=name,
        in_features=embedding.num_embeddings,
        out_features=embedding.embedding_dim,
        is_embedding=True,
        scale=rounded,
    )
