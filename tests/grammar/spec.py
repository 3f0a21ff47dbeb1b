"""What a decoder is made of."""

import dataclasses

from grammar.expressions import Expression


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Spec:
    """What a decoder is made of; expressions are those of `grammar.expressions`.

    stacks: layers of each `mk.layers`. unrolled: layers before them, each with leaves and a cache of its own. rope, append, attend: positions.
    before: of the embedding. into: of what q, k and v are projected from. query, keys: of heads [heads, head_dim]; values: of the flat
    projection. attended: of attention's result. out: of its projection. inner: of the MLP's. after: of the logits. scale: what a layer's halves
    are multiplied with. turned: what is rotated. fused: how q, k, v, gate and up are told apart where they are rows of one weight. extra: results besides
    the logits and the cache. forbidden: something refused, and before which layer or at the end.
    """

    hidden: int = 128
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    width: int = 128  # of the MLP
    vocab: int = 64
    context: int = 128
    stacks: tuple[int, ...] = (2,)
    unrolled: int = 0
    norm: str = "rms"
    residual: str = "pre"
    mlp: str = "plain"
    bias: str = "none"
    head_norm: str = "none"
    rope: Expression = "pos"
    append: Expression = "pos"
    attend: Expression = "pos"
    window: int | None = None
    softcap: float | None = None
    attention_scale: float | None = None
    tied: bool = True
    before: Expression = "x"
    into: Expression = "x"
    query: Expression = "x"
    keys: Expression = "x"
    values: Expression = "x"
    attended: Expression = "x"
    out: Expression = "x"
    inner: Expression = "x"
    after: Expression = "x"
    scale: Expression = 1.0
    turned: str = "heads"
    again: str = "none"
    gated: bool = False
    fused: str = "none"
    lean: int = 0
    fold: str = "none"
    fold_at: str = "head"
    extra: tuple[str, ...] = ()
    forbidden: tuple[str, str] | None = None

    def __repr__(self) -> str:
        """Without what is as it is by default."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return f"Spec({', '.join(f'{name}={value!r}' for name, value in fields.items())})"
