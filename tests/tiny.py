"""Tiny random Hugging Face folders of every family, tokenizer included: nothing is fetched, a folder takes milliseconds.

Weights are wide enough for outputs to differ, and biases and norms are random too, so that a bias forgotten in surgery shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

FAMILIES = ("bert", "distilbert", "roberta", "electra", "mpnet", "llama", "gpt2", "t5", "marian")
CLASSIFIERS = ("bert", "distilbert", "roberta", "electra", "mpnet", "llama", "gpt2", "t5")  # marian has no such head
ENCODERS = ("bert", "distilbert", "roberta", "electra", "mpnet")

SENTENCES = """a quiet film that grows on you
the plot is thin but the actors are wonderful
i was bored from the first minute to the last
one of the best comedies of the year
it never finds its rhythm and the jokes fall flat
a warm , funny and moving story about growing up
the camera work is dull and the script is worse
go and see it with somebody you love
nobody in this picture seems to care what happens next
what begins as a thriller ends as a love letter to the sea
there is not a single honest moment in two long hours
bright , clever and a little sad , like a good song
the second half is better than the first but it comes too late
an old tale told with new courage
loud , long and empty""".splitlines()

# Special tokens by the kind of tokenizer; the order gives the ids. pad is 1 in roberta and mpnet, as in the real ones.
_SPECIAL = {
    "wordpiece": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "mpnet": {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "[UNK]", "mask": "<mask>"},
    "roberta": {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"},
    "gpt": {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "unigram": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
}
_KIND = {"roberta": "roberta", "mpnet": "mpnet", "llama": "gpt", "gpt2": "gpt", "t5": "unigram", "marian": "unigram"}


def tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """WordPiece, byte-level BPE or Unigram as the family has it, made from the sentences above."""
    kind = _KIND.get(model_type, "wordpiece")
    special = _SPECIAL[kind]
    names = list(special.values())
    ids = {role: (token, number) for number, (role, token) in enumerate(special.items())}
    trainer: Any = None
    if kind in ("wordpiece", "mpnet"):
        made = Tokenizer(models.WordPiece(_pieces(names), unk_token=special["unk"]))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
    elif kind in ("roberta", "gpt"):
        made = Tokenizer(models.BPE(unk_token=special["unk"]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=340, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        )
    else:
        words = [(f"▁{word}", -5.0) for word in sorted(set(" ".join(SENTENCES).split()))]
        letters = [(letter, -12.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
        made = Tokenizer(models.Unigram([(name, 0.0) for name in names] + words + letters, unk_id=ids["unk"][1]))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
    if trainer:
        made.train_from_iterator(SENTENCES * 4, trainer)
    if kind in ("wordpiece", "mpnet"):
        cls, sep = ids["cls"], ids["sep"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{cls[0]} $A {sep[0]}",
            pair=f"{cls[0]} $A {sep[0]} $B:1 {sep[0]}:1",
            special_tokens=[cls, sep],
        )
    elif kind == "roberta":
        made.post_processor = processors.RobertaProcessing(ids["sep"], ids["cls"], add_prefix_space=False)
    elif kind == "unigram":
        eos = ids["eos"]
        made.post_processor = processors.TemplateProcessing(
            single=f"$A {eos[0]}", pair=f"$A {eos[0]} $B {eos[0]}", special_tokens=[eos]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=64,
        model_input_names=[
            "input_ids",
            "attention_mask",
            *(["token_type_ids"] if model_type in ("bert", "electra") else []),
        ],
        **{f"{role}_token": token for role, token in special.items()},
    )


def _pieces(special: list[str]) -> dict[str, int]:
    """Special tokens, the words of the sentences, single letters: written out, as the trainer breaks ties at random."""
    words = sorted(set(" ".join(SENTENCES).split()))
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*special, *words, *letters, *(f"##{letter}" for letter in letters)]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def config(model_type: str, vocabulary: int, **changes: Any) -> Any:
    """4 blocks (T5 and Marian: 3 and 3), 4 heads of size 8 (Llama: over 2 key-value heads), 64 neurons, hidden size 32."""
    common = {"vocab_size": vocabulary}
    bert = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    by_type: dict[str, dict[str, Any]] = {
        "bert": dict(bert, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3),
        "electra": dict(bert, embedding_size=16, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3),
        "roberta": dict(
            bert,
            max_position_embeddings=66,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            type_vocab_size=1,
            initializer_range=0.3,
        ),
        "mpnet": dict(
            bert, max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2, initializer_range=0.3
        ),
        "distilbert": {
            "dim": 32,
            "n_layers": 4,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
        },
        "llama": dict(
            bert,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        ),
        "gpt2": {
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_inner": 64,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.3,
        },
        "t5": {
            "d_model": 32,
            "d_kv": 8,
            "num_heads": 4,
            "d_ff": 64,
            "num_layers": 3,
            "num_decoder_layers": 3,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
        },
        "marian": {
            "d_model": 32,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "forced_eos_token_id": 1,
            "init_std": 0.3,
        },
    }
    return transformers.AutoConfig.for_model(model_type, **common, **{**by_type[model_type], **changes})


def write(folder: Path, model_type: str, labels: tuple[str, ...] | None = None, seed: int = 0, **changes: Any) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files. With `labels`: a classification head."""
    tokens = tokenizer(model_type)
    if labels is not None:
        changes |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        changes |= {"label2id": {name: number for number, name in enumerate(labels)}}
    torch.manual_seed(seed)
    auto = transformers.AutoModel if labels is None else transformers.AutoModelForSequenceClassification
    model = auto.from_config(config(model_type, len(tokens), **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "relative_attention_bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
