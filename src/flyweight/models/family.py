"""What Flyweight knows of an architecture: one frozen row that says where things are. Rows live in `families.py`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Attention", "Family", "Mlp", "SharedBias", "Stack"]


@dataclass(frozen=True)
class Attention:
    """One attention of a block; paths are relative to the block.

    module:       the module that computes it; its attributes named in `counts` and `widths` follow the heads kept
    q, k, v:      linears that make queries, keys, values; all the same path where one linear makes all three (GPT-2)
    o:            linear that takes the heads' output
    counts:       attributes of `module` that hold the number of query heads
    widths:       attributes of `module` that hold heads x head size
    head_dim:     attribute of `module` with the size of one head
    zero_bias:    argument that hands zeros shaped by one block's heads to the next block (T5's cross-attention)
    """

    module: str
    q: str
    k: str
    v: str
    o: str
    head_dim: str
    counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    zero_bias: str | None = None

    @property
    def fused(self) -> bool:
        return self.q == self.k == self.v


@dataclass(frozen=True)
class Mlp:
    """The feed-forward part of a block: `down(act(up(x)))`, or with a gate `down(act(gate(x)) * up(x))`.

    up: every linear whose outputs are the neurons (one, or gate and up); down: the linear that reads them.
    Where the path differs between configurations of a family, alternatives are tried in order (T5: wi, or wi_0 and wi_1).
    """

    up: tuple[tuple[str, ...], ...]
    down: str


@dataclass(frozen=True)
class SharedBias:
    """A position bias [buckets, heads] that the first attention of all blocks of a stack adds to its scores.

    table:    path of the embedding below the base model, or below the first block where `in_block`
    argument: name of the attention module's argument that carries the bias [batch, heads, query, key]
    returned: index of the bias in what the attention module returns, or None (T5 hands it from block to block)
    """

    table: str
    argument: str
    in_block: bool = False
    returned: int | None = None


@dataclass(frozen=True)
class Stack:
    """A list of like blocks.

    name:      "encoder" or "decoder"
    blocks:    path of the ModuleList below the base model
    attention: the attentions of one block, in order (self, cross)
    mlp:       its feed-forward part
    norms:     {norm: linears it feeds}, paths relative to the block; "next:..." = in the following block;
               linears of another variant of the family (T5: wi, or wi_0 and wi_1) are to be passed over
    layers_key, heads_key, kv_heads_key, head_dim_key, neurons_key: the config's names for these numbers; None where
               the config has no such field of its own
    bias:      a position bias that the blocks share
    """

    name: str
    blocks: str
    attention: tuple[Attention, ...]
    mlp: Mlp
    norms: dict[str, tuple[str, ...]]
    layers_key: str
    heads_key: str
    neurons_key: str
    kv_heads_key: str | None = None
    head_dim_key: str | None = None
    bias: SharedBias | None = None


@dataclass(frozen=True)
class Family:
    """One architecture.

    model_type:  as in config.json
    base:        attribute of a model with a head that holds the model without it (`base_model_prefix`)
    stacks:      its stacks of blocks
    embeddings:  {"word": path, "position": path or None} below the base
    heads:       {task name: paths (below the model with a head) of what belongs to the head}
    inputs:      arrays the model takes, in order
    position_offset: position ids begin at this (roberta and mpnet: pad id + 1), which shortens the longest input
    embedding_projection: path below the base of a linear after the embeddings, or None (electra)
    """

    model_type: str
    base: str
    stacks: tuple[Stack, ...]
    embeddings: dict[str, str | None]
    heads: dict[str, tuple[str, ...]]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    position_offset: int = 0
    embedding_projection: str | None = None
