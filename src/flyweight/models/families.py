"""The one table of families. A new architecture is a row here, not a class.

Paths were read off the modeling files of transformers 5.23; `tests/models/test_families.py` resolves every one of them.
"""

from __future__ import annotations

from typing import Any

from flyweight.errors import ModelError, nearest
from flyweight.models.family import Attention, Family, Mlp, SharedBias, Stack

__all__ = ["FAMILIES", "family_of"]


def _bert_like(model_type: str, **other: Any) -> Family:
    """BERT and those that copied its code (Devlin et al. 2019): norms after the residual sum."""
    attention = Attention(
        module="attention.self",
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        o="attention.output.dense",
        head_dim="attention_head_size",
        counts=("num_attention_heads",),
        widths=("all_head_size",),
    )
    stack = Stack(
        name="encoder",
        blocks="encoder.layer",
        attention=(attention,),
        mlp=Mlp(up=(("intermediate.dense",),), down="output.dense"),
        norms={
            "attention.output.LayerNorm": ("intermediate.dense",),
            "output.LayerNorm": (f"next:{attention.q}", f"next:{attention.k}", f"next:{attention.v}"),
        },
        layers_key="num_hidden_layers",
        heads_key="num_attention_heads",
        neurons_key="intermediate_size",
    )
    row: dict[str, Any] = {
        "model_type": model_type,
        "base": model_type,
        "stacks": (stack,),
        "embeddings": {"word": "embeddings.word_embeddings", "position": "embeddings.position_embeddings"},
        "heads": {"text-classification": ("classifier",), "embedding": ()},
    }
    return Family(**{**row, **other})


_DISTILBERT_ATTENTION = Attention(
    module="attention",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    head_dim="attention_head_size",
    counts=("n_heads",),
)

_MPNET_ATTENTION = Attention(
    module="attention.attn",
    q="attention.attn.q",
    k="attention.attn.k",
    v="attention.attn.v",
    o="attention.attn.o",
    head_dim="attention_head_size",
    counts=("num_attention_heads",),
    widths=("all_head_size",),
)

_LLAMA_ATTENTION = Attention(  # grouped-query attention: k and v have fewer heads than q
    module="self_attn",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    head_dim="head_dim",
)

_GPT2_ATTENTION = Attention(  # one Conv1D [in, 3 x heads x head size] makes queries, keys and values
    module="attn",
    q="attn.c_attn",
    k="attn.c_attn",
    v="attn.c_attn",
    o="attn.c_proj",
    head_dim="head_dim",
    counts=("num_heads",),
    widths=("split_size",),
)


def _t5_attention(path: str, zero_bias: str | None = None) -> Attention:
    return Attention(
        module=path,
        q=f"{path}.q",
        k=f"{path}.k",
        v=f"{path}.v",
        o=f"{path}.o",
        head_dim="key_value_proj_dim",
        counts=("n_heads",),
        widths=("inner_dim",),
        zero_bias=zero_bias,
    )


_T5_SELF = _t5_attention("layer.0.SelfAttention")
_T5_CROSS = _t5_attention("layer.1.EncDecAttention", zero_bias="position_bias")


def _t5_stack(name: str, mlp: str, attention: tuple[Attention, ...], layers_key: str) -> Stack:
    ups = ((f"{mlp}.DenseReluDense.wi",), (f"{mlp}.DenseReluDense.wi_0", f"{mlp}.DenseReluDense.wi_1"))
    cross = {"layer.1.layer_norm": (_T5_CROSS.q,)} if len(attention) > 1 else {}
    return Stack(
        name=name,
        blocks=f"{name}.block",
        attention=attention,
        mlp=Mlp(up=ups, down=f"{mlp}.DenseReluDense.wo"),
        norms={
            "layer.0.layer_norm": (_T5_SELF.q, _T5_SELF.k, _T5_SELF.v),
            **cross,
            f"{mlp}.layer_norm": (*ups[0], *ups[1]),
        },
        layers_key=layers_key,
        heads_key="num_heads",
        neurons_key="d_ff",
        head_dim_key="d_kv",
        bias=SharedBias("layer.0.SelfAttention.relative_attention_bias", "position_bias", in_block=True, returned=1),
    )


def _marian_attention(path: str) -> Attention:
    return Attention(
        module=path,
        q=f"{path}.q_proj",
        k=f"{path}.k_proj",
        v=f"{path}.v_proj",
        o=f"{path}.out_proj",
        head_dim="head_dim",
        counts=("num_heads",),
    )


def _marian_stack(name: str, attention: tuple[Attention, ...]) -> Stack:
    first = attention[0]
    if len(attention) > 1:
        norms = {
            "self_attn_layer_norm": (attention[1].q,),
            "encoder_attn_layer_norm": ("fc1",),
            "final_layer_norm": (f"next:{first.q}", f"next:{first.k}", f"next:{first.v}"),
        }
    else:
        norms = {
            "self_attn_layer_norm": ("fc1",),
            "final_layer_norm": (f"next:{first.q}", f"next:{first.k}", f"next:{first.v}"),
        }
    return Stack(
        name=name,
        blocks=f"{name}.layers",
        attention=attention,
        mlp=Mlp(up=(("fc1",),), down="fc2"),
        norms=norms,
        layers_key=f"{name}_layers",
        heads_key=f"{name}_attention_heads",
        neurons_key=f"{name}_ffn_dim",
    )


_WITH_TYPES = ("input_ids", "attention_mask", "token_type_ids")
_POOLED_HEAD = {"text-classification": ("classifier",), "embedding": ()}
_CAUSAL_HEAD = {"text-classification": ("score",), "embedding": ()}

_ROWS = (
    _bert_like("bert", inputs=_WITH_TYPES),
    _bert_like("roberta", position_offset=2),
    _bert_like("electra", inputs=_WITH_TYPES, embedding_projection="embeddings_project"),
    Family(
        model_type="distilbert",
        base="distilbert",
        stacks=(
            Stack(
                name="encoder",
                blocks="transformer.layer",
                attention=(_DISTILBERT_ATTENTION,),
                mlp=Mlp(up=(("ffn.lin1",),), down="ffn.lin2"),
                norms={
                    "sa_layer_norm": ("ffn.lin1",),
                    "output_layer_norm": ("next:attention.q_lin", "next:attention.k_lin", "next:attention.v_lin"),
                },
                layers_key="n_layers",
                heads_key="n_heads",
                neurons_key="hidden_dim",
            ),
        ),
        embeddings={"word": "embeddings.word_embeddings", "position": "embeddings.position_embeddings"},
        heads={"text-classification": ("pre_classifier", "classifier"), "embedding": ()},
    ),
    Family(
        model_type="mpnet",
        base="mpnet",
        stacks=(
            Stack(
                name="encoder",
                blocks="encoder.layer",
                attention=(_MPNET_ATTENTION,),
                mlp=Mlp(up=(("intermediate.dense",),), down="output.dense"),
                norms={
                    "attention.LayerNorm": ("intermediate.dense",),
                    "output.LayerNorm": ("next:attention.attn.q", "next:attention.attn.k", "next:attention.attn.v"),
                },
                layers_key="num_hidden_layers",
                heads_key="num_attention_heads",
                neurons_key="intermediate_size",
                bias=SharedBias("encoder.relative_attention_bias", "position_bias"),
            ),
        ),
        embeddings={"word": "embeddings.word_embeddings", "position": "embeddings.position_embeddings"},
        heads=_POOLED_HEAD,
        position_offset=2,
    ),
    Family(
        model_type="llama",
        base="model",
        stacks=(
            Stack(
                name="decoder",
                blocks="layers",
                attention=(_LLAMA_ATTENTION,),
                mlp=Mlp(up=(("mlp.gate_proj", "mlp.up_proj"),), down="mlp.down_proj"),
                norms={
                    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
                },
                layers_key="num_hidden_layers",
                heads_key="num_attention_heads",
                neurons_key="intermediate_size",
                kv_heads_key="num_key_value_heads",
                head_dim_key="head_dim",
            ),
        ),
        embeddings={"word": "embed_tokens", "position": None},
        heads=_CAUSAL_HEAD,
    ),
    Family(
        model_type="gpt2",
        base="transformer",
        stacks=(
            Stack(
                name="decoder",
                blocks="h",
                attention=(_GPT2_ATTENTION,),
                mlp=Mlp(up=(("mlp.c_fc",),), down="mlp.c_proj"),
                norms={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
                layers_key="n_layer",
                heads_key="n_head",
                neurons_key="n_inner",
            ),
        ),
        embeddings={"word": "wte", "position": "wpe"},
        heads=_CAUSAL_HEAD,
    ),
    Family(
        model_type="t5",
        base="transformer",
        stacks=(
            _t5_stack("encoder", "layer.1", (_T5_SELF,), "num_layers"),
            _t5_stack("decoder", "layer.2", (_T5_SELF, _T5_CROSS), "num_decoder_layers"),
        ),
        embeddings={"word": "shared", "position": None},
        heads={"text-classification": ("classification_head",)},
    ),
    Family(
        model_type="marian",
        base="model",
        stacks=(
            _marian_stack("encoder", (_marian_attention("self_attn"),)),
            _marian_stack("decoder", (_marian_attention("self_attn"), _marian_attention("encoder_attn"))),
        ),
        embeddings={"word": "shared", "position": None},  # positions are sinusoids, nothing to store
        heads={},
        inputs=("input_ids", "attention_mask", "decoder_input_ids"),
    ),
)

FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}


def family_of(config: Any) -> Family:
    """The row for a transformers config. Raises ModelError listing the known families."""
    model_type = str(getattr(config, "model_type", ""))
    if model_type not in FAMILIES:
        raise ModelError(
            "a model of a known family",
            f"'{model_type}'{nearest(model_type, FAMILIES)}",
            f"known: {', '.join(FAMILIES)}",
        )
    return FAMILIES[model_type]
