"""Tokens out of whole models: table, tokenizer, config and special ids of every family; what is written loads anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers

from flyweight import artifact
from flyweight.artifact import QuantizedTensor
from flyweight.errors import StepError
from flyweight.models.build import open_tokenizer
from flyweight.models.bundle import Codes
from flyweight.models.load import load
from flyweight.models.storage import save
from flyweight.models.vocabulary import always, keep_rows, keep_tokens, needs, table_name
from flyweight.tasks import task_named
from flyweight.training import predict
from tiny import CLASSIFIERS, SENTENCES, config, tokenizer
from training_cases import open_bundle

LABELS = ("negative", "positive")
STAYS = SENTENCES[:4]


def ids_of(bundle, texts=STAYS):
    return {number for encoding in bundle.encoder.tokenizer.encode_batch(texts) for number in encoding.ids}


def ids_in(value):
    return [number for one in value for number in ids_in(one)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_texts_whose_tokens_stay_get_the_same_answers(tiny, model_type):
    bundle = open_bundle(tiny(model_type, labels=LABELS))
    old = bundle.encoder.examples(STAYS)
    others = bundle.encoder.examples(SENTENCES[4:])
    before, table = predict(bundle, old), bundle.model.get_parameter(table_name(bundle)).detach().clone()
    tokens = [encoding.tokens for encoding in bundle.encoder.tokenizer.encode_batch(STAYS)]
    positions = {name: p for name, p in bundle.model.named_parameters() if "position" in name or "wpe" in name}
    smaller, rows = keep_tokens(bundle, ids_of(bundle))
    new = smaller.encoder.examples(STAYS)
    assert len(rows) < len(table) - 20
    assert [encoding.tokens for encoding in smaller.encoder.tokenizer.encode_batch(STAYS)] == tokens
    assert np.array_equal(np.asarray(rows)[new.ids], old.ids)
    assert torch.equal(smaller.model.get_parameter(table_name(smaller)), table[rows])
    assert np.array_equal(predict(smaller, new), before)
    assert len(smaller.encoder.examples(SENTENCES[4:]).ids) > len(others.ids)
    assert np.isfinite(predict(smaller, smaller.encoder.examples(SENTENCES[4:]))).all()
    for name, parameter in positions.items():
        assert smaller.model.get_parameter(name) is parameter
    assert len(smaller.tokenizer) == len(rows) == smaller.model.config.vocab_size
    assert smaller.model.get_input_embeddings().num_embeddings == len(rows)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_special_ids_follow_in_config_table_and_encoder(tiny, model_type):
    """Whatever named a token before names it still: through the tokenizer, the config and its parts, the padding row."""
    bundle = open_bundle(tiny(model_type, labels=LABELS))

    def meanings(one):
        names = {number: token for token, number in one.encoder.tokenizer.get_vocab().items()}
        configs = {id(m.config): m.config for m in one.model.modules() if hasattr(m, "config")}
        found = [
            (key, names.get(number, number))
            for each in configs.values()
            for key, value in each.to_dict().items()
            if key.endswith("_token_id") and value is not None
            for number in ids_in(value)
        ]
        paddings = [m.padding_idx for m in one.model.modules() if isinstance(m, torch.nn.Embedding) and m.padding_idx]
        own = {role: getattr(one.tokenizer, f"{role}_token_id") for role in ("pad", "unk", "cls", "sep", "mask", "eos")}
        tokens = {role: names[number] for role, number in own.items() if number is not None}
        return found, tokens, names[one.encoder.pad], [names[number] for number in paddings]

    before = meanings(bundle)
    smaller, _ = keep_tokens(bundle, ids_of(bundle))
    assert meanings(smaller) == before
    assert before[0]


def test_ids_that_move_are_followed(tiny, tmp_path):
    """A BERT whose padding is not the first token, whose config names tokens, with a row for no token."""
    folder = tiny("bert", labels=LABELS)
    words = sorted(open_bundle(folder).tokenizer.get_vocab().items(), key=lambda item: item[1])
    order = [token for token, _ in words if not token.startswith("[")]
    special = [token for token, _ in words if token.startswith("[")]
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = {token: number for number, token in enumerate([*order, *special])}
    content["model"]["vocab"] = ids
    content["added_tokens"] = [{**token, "id": ids[token["content"]]} for token in content["added_tokens"]]
    for name, one in content["post_processor"]["special_tokens"].items():
        one["ids"] = [ids[name]]
    made = tmp_path / "model"
    made.mkdir()
    for name in ("tokenizer_config.json",):
        (made / name).write_text((folder / name).read_text())
    (made / "tokenizer.json").write_text(json.dumps(content))
    size = len(ids) + 3
    named = {"pad_token_id": ids["[PAD]"], "bos_token_id": ids["the"], "eos_token_id": size - 2}
    labels = {"num_labels": 2, "id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    model = transformers.AutoModelForSequenceClassification.from_config(config("bert", size, **{**labels, **named}))
    model.save_pretrained(made)
    bundle = load(made, task_named("text-classification"))
    assert bundle.encoder.pad == ids["[PAD]"] > 100
    assert ids["the"] in always(bundle)
    old = bundle.encoder.examples(STAYS)
    before, tail = predict(bundle, old), bundle.model.get_input_embeddings().weight[size - 2].detach().clone()
    smaller, rows = keep_tokens(bundle, ids_of(bundle))
    tokenizer = smaller.encoder.tokenizer
    assert len(rows) == tokenizer.get_vocab_size() + 1  # the row that the config names as the end
    assert smaller.model.config.eos_token_id == len(rows) - 1
    assert torch.equal(smaller.model.get_input_embeddings().weight[-1], tail)
    assert smaller.model.config.bos_token_id == tokenizer.token_to_id("the")
    assert smaller.encoder.pad == smaller.model.config.pad_token_id == tokenizer.token_to_id("[PAD]") < 100
    assert smaller.model.get_input_embeddings().padding_idx == smaller.encoder.pad
    assert np.array_equal(predict(smaller, smaller.encoder.examples(STAYS)), before)


def test_where_positions_are_counted_from_the_padding_id_it_stays(tiny):
    for model_type in ("roberta", "mpnet"):
        bundle = open_bundle(tiny(model_type, labels=LABELS))
        content = always(bundle)
        smaller, rows = keep_tokens(bundle, ())
        assert rows[:2] == [0, 1]
        assert {0, 1} <= content
        assert smaller.encoder.pad == 1 == smaller.model.config.pad_token_id


@pytest.mark.parametrize("model_type", ["t5", "marian", "bert", "gpt2"])
def test_tables_stay_tied_and_output_layers_lose_the_same_rows(model_type):
    auto = {
        "t5": transformers.T5ForConditionalGeneration,
        "marian": transformers.MarianMTModel,
        "bert": transformers.BertForMaskedLM,
        "gpt2": transformers.GPT2LMHeadModel,
    }[model_type]
    torch.manual_seed(0)
    model = auto(config(model_type, 90)).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bias" in name and tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))
    rows = [*range(5), *range(50, 85), 7]
    ids = torch.tensor([[5, 9, 20, 1], [30, 39, 0, 1]])

    def logits(tokens):
        more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            return model(input_ids=tokens, **more).logits

    before = logits(torch.tensor(rows)[ids])
    tables = sum(p.numel() for p in model.parameters())
    keep_rows(model, rows)
    assert torch.equal(logits(ids), before[..., rows])
    width = model.get_input_embeddings().weight.shape[1]
    gone = (90 - len(rows)) * (width + (model_type == "bert"))  # BERT's output layer has a bias
    assert tables - sum(p.numel() for p in model.parameters()) == gone
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.tie_weights()  # as from_pretrained does
    assert torch.equal(logits(ids), before[..., rows])
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    assert {one.vocab_size for one in configs.values()} == {len(rows)}


def test_an_output_layer_of_its_own_is_cut_too():
    model = transformers.GPT2LMHeadModel(config("gpt2", 60, tie_word_embeddings=False)).eval()
    before = model.lm_head.weight.detach().clone()
    keep_rows(model, [0, 1, 40])
    assert torch.equal(model.lm_head.weight, before[[0, 1, 40]])
    assert model.lm_head.out_features == 3
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_artifacts_load_in_a_fresh_process_with_and_without_flyweight(tiny, tmp_path):
    wanted = {}
    for model_type in ("bert", "roberta", "mpnet", "t5", "llama"):
        bundle = open_bundle(tiny(model_type, labels=LABELS))
        smaller, _ = keep_tokens(bundle, ids_of(bundle))
        examples = smaller.encoder.examples(SENTENCES)
        with artifact.write_folder(tmp_path / model_type) as place:
            manifest = save(smaller, place)
            artifact.write_manifest(place, manifest)
        assert manifest.plain
        assert "/tmp" not in (tmp_path / model_type / "tokenizer_config.json").read_text()
        wanted[model_type] = examples.ids.tolist(), predict(smaller, examples)
    source = """
        import json, pathlib, sys, torch, transformers
        from flyweight.models.storage import restore
        from flyweight.training import predict
        folder, texts, found = sys.argv[1], json.load(sys.stdin), {}
        for path in pathlib.Path(folder).iterdir():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
            ours = restore(path)
            examples = ours.encoder.examples(texts)
            with torch.no_grad():
                plain = [model(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in texts]
            ids = [number for text in texts for number in tokenizer(text).input_ids]
            found[path.name] = ids, plain, examples.ids.tolist(), predict(ours, examples).tolist()
        print(json.dumps(found))
    """
    command = [sys.executable, "-c", textwrap.dedent(source), str(tmp_path)]
    ran = subprocess.run(command, input=json.dumps(SENTENCES), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found.keys() == wanted.keys()
    for model_type, (ids, answers) in wanted.items():
        plain_ids, plain, our_ids, ours = found[model_type]
        assert plain_ids == our_ids == ids
        assert np.array_equal(np.float32(ours), answers)
        np.testing.assert_allclose(plain, answers, atol=1e-5)


def built(name):
    """A tokenizer of a class of transformers that makes its parts anew wherever it is opened."""
    source = json.loads(
        tokenizer(
            {"RobertaTokenizer": "roberta", "LlamaTokenizer": "llama"}.get(name, "bert")
        ).backend_tokenizer.to_str()
    )
    vocab = source["model"]["vocab"]
    if "merges" in source["model"]:
        parts = {"vocab": vocab, "merges": [tuple(pair) for pair in source["model"]["merges"]]}
    elif name in ("T5Tokenizer", "XLMRobertaTokenizer"):
        special = ["<pad>", "</s>", "<unk>"] if name == "T5Tokenizer" else ["<s>", "<pad>", "</s>", "<unk>"]
        words = [f"▁{word}" for word in vocab if not word.startswith(("[", "##")) and len(word) > 1]
        scored = [(token, -float(place)) for place, token in enumerate([*words, *"▁abcdefghijklmnopqrstuvwxyz,"], 1)]
        parts = {"vocab": [*((token, 0.0) for token in special), *scored]}
    elif name == "MPNetTokenizer":
        special = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
        rest = [token for token in vocab if not token.startswith("[")]
        parts = {"vocab": {token: i for i, token in enumerate([*special, *rest])}}
    else:
        parts = {"vocab": vocab}
    made = getattr(transformers, name)(**parts, model_max_length=64)
    if made.pad_token is None:
        made.pad_token = "<pad>"
    return made


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("BertTokenizer", "bert"),
        ("MPNetTokenizer", "mpnet"),
        ("RobertaTokenizer", "roberta"),
        ("LlamaTokenizer", "llama"),
        ("T5Tokenizer", "t5"),  # with its hundred <extra_id_0>, ...
        ("XLMRobertaTokenizer", "roberta"),
    ],
)
def test_classes_of_transformers_take_the_new_vocabulary(tmp_path, name, model_type):
    made = built(name)
    model = transformers.AutoModelForSequenceClassification.from_config(
        config(model_type, len(made), num_labels=2, pad_token_id=made.pad_token_id)
    )
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    bundle = load(tmp_path, task_named("text-classification"))
    assert type(bundle.tokenizer).__name__ == name
    old = bundle.encoder.examples(STAYS)
    before = predict(bundle, old)
    smaller, rows = keep_tokens(bundle, set(old.ids.tolist()))
    new = smaller.encoder.examples(STAYS)
    assert type(smaller.tokenizer).__name__ == name
    assert len(rows) == len(smaller.tokenizer) < len(bundle.tokenizer)
    assert np.array_equal(np.asarray(rows)[new.ids], old.ids)
    assert np.array_equal(predict(smaller, new), before)
    assert smaller.tokenizer.special_tokens_map == bundle.tokenizer.special_tokens_map


def test_a_class_that_adds_tokens_of_its_own_is_refused(tiny, monkeypatch):
    bundle = open_bundle(tiny("bert", labels=LABELS))
    before = bundle.model.state_dict()["bert.embeddings.word_embeddings.weight"].clone()

    def opened(folder):
        made = open_tokenizer(folder)
        made.add_tokens(["mine"])
        return made

    monkeypatch.setattr("flyweight.models.vocabulary.open_tokenizer", opened)
    with pytest.raises(StepError, match="expected a tokenizer that takes a vocabulary of 58 tokens, got .* makes 59"):
        keep_tokens(bundle, ())
    assert torch.equal(bundle.model.state_dict()["bert.embeddings.word_embeddings.weight"], before)


def test_needs_and_always_of_a_bundle(tiny):
    """BPE: all bytes and special tokens, and what a word is merged from; WordPiece needs nothing."""
    bundle = open_bundle(tiny("roberta", labels=LABELS))
    vocab = bundle.tokenizer.get_vocab()
    assert {number for token, number in vocab.items() if len(token) == 1} < always(bundle)
    word = next(token for token in sorted(vocab, key=lambda token: -len(token)) if token.startswith("Ġ"))
    steps = [token for token, number in vocab.items() if number in needs(bundle)(vocab[word])]
    assert len(steps) > 1
    assert all(token in word for token in steps)
    bert = open_bundle(tiny("bert", labels=LABELS))
    assert not needs(bert)(bert.tokenizer.get_vocab()["wonderful"])


def test_a_quantized_table_is_refused(tiny):
    bundle = open_bundle(tiny("bert", labels=LABELS))
    info = QuantizedTensor(shape=(2, 2), bits=8, scheme="symmetric", granularity="channel", group_size=None)
    bundle.quantized[table_name(bundle)] = Codes(info, torch.zeros(2, 2, dtype=torch.uint8), torch.ones(2, 1), None)
    with pytest.raises(StepError, match="put prune before quantize"):
        keep_tokens(bundle, ())


def test_a_tokenizer_of_another_kind_is_refused_and_nothing_changes(tiny):
    from tokenizers import Tokenizer, models

    bundle = open_bundle(tiny("bert", labels=LABELS))
    vocab = bundle.tokenizer.get_vocab()
    bundle.tokenizer._tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    with pytest.raises(StepError, match="got WordLevel"):
        keep_tokens(bundle, ())
    assert bundle.model.config.vocab_size == len(vocab)


def test_real_minilm(minilm):
    """A third of the table goes with what a few sentences do not use; their vectors stay bit for bit."""
    bundle = load(minilm, task_named("embedding"))
    old = bundle.encoder.examples(SENTENCES)
    before = predict(bundle, old)
    strange = ["Ünïcödé ☃ 日本語 naïve", "unbelievable antidisestablishmentarianism", "x" * 150, "12345 #hash ##ing"]
    unknown = [encoding.tokens.count("[UNK]") for encoding in bundle.encoder.tokenizer.encode_batch(strange)]
    keep = set(range(0, 30522, 2)) | set(old.ids.tolist())
    smaller, rows = keep_tokens(bundle, keep)
    assert 15000 < len(rows) < 17500
    assert (smaller.encoder.pad, smaller.tokenizer.unk_token_id, smaller.tokenizer.cls_token_id) == (
        0,
        rows.index(100),
        rows.index(101),
    )
    new = smaller.encoder.examples(SENTENCES)
    assert np.array_equal(np.asarray(rows)[new.ids], old.ids)
    assert np.array_equal(predict(smaller, new), before)
    assert [encoding.tokens.count("[UNK]") for encoding in smaller.encoder.tokenizer.encode_batch(strange)] == unknown
    assert sum(unknown) > 0
