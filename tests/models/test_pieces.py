"""Tokens out of a tokenizer: on texts all of whose tokens stay nothing changes, and nothing becomes unknown that was not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from flyweight.errors import StepError
from flyweight.models.pieces import pieces_of, rewrite
from tiny import SENTENCES

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = "aaaabbbccdeä"


def texts(count, seed, letters=LETTERS + "    ", longest=40):
    """Random ones of few letters: words overlap in every way, and ties are many."""
    chance = np.random.default_rng(seed)
    return ["".join(chance.choice(list(letters), chance.integers(1, longest))) for _ in range(count)]


def trained(made, trainer):
    made.train_from_iterator(texts(400, 1) + SENTENCES * 3, trainer)
    return made


def wordpiece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made = trained(made, trainers.WordPieceTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made = trained(made, trainer)
    made.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2), add_prefix_space=False)
    return made


def whole_words_first():
    """Llama 3's way: a word that is a token is taken at once."""
    content = json.loads(byte_level().to_str())
    content["model"]["ignore_merges"] = True
    size = len(content["model"]["vocab"])
    content["model"]["vocab"] |= {"Ġcabbage": size, "deed": size + 1}  # no merges make these
    return Tokenizer.from_str(json.dumps(content))


def affixes():
    """The original BPE's mark for the end of a word, and WordPiece's for its later parts."""
    made = Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=220,
        special_tokens=SPECIAL,
        continuing_subword_prefix="##",
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    return trained(made, trainer)


def many_merges():
    """As converted from SentencePiece (Llama 2): a merge for every way to put a token together, bytes for the unknown."""
    content = json.loads(affixless().to_str())
    vocab = content["model"]["vocab"]
    names = sorted((name for name in vocab if name not in SPECIAL), key=lambda name: vocab[name])
    ways = [[name[:i], name[i:]] for name in names for i in range(1, len(name)) if {name[:i], name[i:]} <= vocab.keys()]
    content["model"] |= {"merges": ways, "byte_fallback": True, "fuse_unk": True}
    content["model"]["vocab"] |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    return Tokenizer.from_str(json.dumps(content))


def affixless():
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return trained(made, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False))


def unigram():
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False, n_sub_iterations=4
    )
    made = trained(made, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def unigram_bytes():
    content = json.loads(unigram().to_str())
    content["model"]["vocab"] += [[f"<0x{byte:02X}>", -30.0] for byte in range(256)]
    content["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(content))


KINDS = {
    one.__name__: one
    for one in (wordpiece, byte_level, whole_words_first, affixes, affixless, many_merges, unigram, unigram_bytes)
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    made = KINDS[request.param]()
    made.add_tokens(["qq", AddedToken("<mine>", normalized=False)])
    made.add_special_tokens(["<extra>"])
    return made


def cut(tokenizer, keep):
    content, rows = rewrite(json.loads(tokenizer.to_str()), keep)
    return Tokenizer.from_str(json.dumps(content)), rows


def unknown(tokenizer, encoding):
    """(unknown tokens, characters in them)"""
    spans = [span for token, span in zip(encoding.tokens, encoding.offsets, strict=True) if token == "[UNK]"]
    return len(spans), sum(b - a for a, b in spans)


def test_texts_whose_tokens_stay_are_split_as_before(tokenizer):
    """Any set of tokens may be asked for; what they need comes with them."""
    some = texts(60, 2) + texts(20, 3, LETTERS + " xyß日☃qq", 30) + SENTENCES + ["cabbage deed", "a <mine> qq <extra>b"]
    chance = np.random.default_rng(4)
    seen = changed = 0
    for _ in range(12):
        used = [set(tokenizer.encode(some[i]).ids) for i in chance.choice(len(some), 12, replace=False)]
        keep = set().union(*used) | set(chance.integers(0, tokenizer.get_vocab_size(), 20).tolist())
        smaller, rows = cut(tokenizer, keep)
        assert len(rows) == len(set(rows)) == smaller.get_vocab_size() < tokenizer.get_vocab_size()
        assert keep <= set(rows)
        names = {number: token for token, number in tokenizer.get_vocab().items()}
        assert smaller.get_vocab() == {names[old]: new for new, old in enumerate(rows)}
        for text in some:
            before, after = tokenizer.encode(text), smaller.encode(text)
            if set(before.ids) <= set(rows):
                seen += 1
                assert after.tokens == before.tokens
                assert after.offsets == before.offsets
                assert [rows[number] for number in after.ids] == before.ids
                assert after.special_tokens_mask == before.special_tokens_mask
            else:
                changed += 1
                assert after.tokens != before.tokens
            assert all(a <= b for a, b in zip(unknown(smaller, after), unknown(tokenizer, before), strict=True))
    assert seen > 150
    assert changed > 150


def test_as_few_tokens_as_can_be_make_nothing_unknown(tokenizer):
    smaller, rows = cut(tokenizer, ())
    assert len(rows) < tokenizer.get_vocab_size() - 50
    for text in texts(200, 5, LETTERS + " xyß日☃qq#", 30):
        before, after = unknown(tokenizer, tokenizer.encode(text)), unknown(smaller, smaller.encode(text))
        assert all(a <= b for a, b in zip(after, before, strict=True))


def test_special_tokens_keep_their_meaning(tokenizer):
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=12)
    smaller, _ = cut(tokenizer, tokenizer.encode("a", "b <extra>").ids)
    before, after = tokenizer.encode("a", "b <extra>"), smaller.encode("a", "b <extra>")
    tokenizer.no_padding()
    assert after.tokens == before.tokens
    assert after.type_ids == before.type_ids
    assert [smaller.id_to_token(number) for number in after.ids] == after.tokens
    for token in (*SPECIAL, "qq", "<mine>", "<extra>"):
        assert smaller.token_to_id(token) is not None
    assert smaller.encode("<mine>qq<extra>", add_special_tokens=False).tokens[:4] == [
        "<mine>",
        "qq",
        "<extra>",
        "[PAD]",
    ]


def test_what_a_merged_token_needs_by_hand():
    """abcd is merged as ab, cd, abcd; abc and bcd are other ways that never come to it. xyz cannot be reached at all."""
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "d", "x", "ab", "cd", "abc", "bcd", "abcd", "xyz"])}
    merges = [("a", "b"), ("c", "d"), ("ab", "c"), ("b", "cd"), ("ab", "cd"), ("abc", "d"), ("a", "bcd")]
    made = Tokenizer(models.BPE(vocab, merges))
    pieces = pieces_of(json.loads(made.to_str()))
    assert pieces.always == {0, 1, 2, 3, 4}
    assert pieces.needs(vocab["abcd"]) == [vocab["ab"], vocab["cd"], vocab["abcd"]]
    assert pieces.needs(vocab["abc"]) == [vocab["ab"], vocab["abc"]]
    assert pieces.needs(vocab["xyz"]) == []
    content, rows = rewrite(json.loads(made.to_str()), [vocab["abcd"]])
    assert rows == [0, 1, 2, 3, 4, 5, 6, 9]
    assert content["model"]["merges"] == [["a", "b"], ["c", "d"], ["ab", "cd"]]


def test_scores_stay_and_so_does_the_lowest():
    """The penalty of unknown characters is counted from it."""
    pieces = [("[UNK]", 0.0), ("a", -3.25), ("b", -4.0), ("ab", -5.5), ("ba", -9.0), ("aba", -2.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    content, rows = rewrite(json.loads(made.to_str()), [5])
    assert rows == [0, 1, 2, 4, 5]
    assert content["model"]["vocab"] == [["[UNK]", 0.0], ["a", -3.25], ["b", -4.0], ["ba", -9.0], ["aba", -2.0]]


def test_characters_that_only_longer_pieces_have_become_pieces():
    """Keeping the pieces with such a character is not enough: without abc, "abcdef" is split ab + ##cd and meets ##ef in its
    middle."""
    vocab = ["[UNK]", "a", "##b", "##c", "##d", "##e", "ab", "abc", "##cd", "##def"]
    made = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    assert made.encode("abcdef").tokens == ["abc", "##def"]
    smaller, rows = cut(made, [6, 8, 9])
    assert rows == [0, 1, 2, 3, 4, 5, 6, 8, 9, 9]  # ##f begins as ##def, the shortest with an f
    assert smaller.encode("abcdef").tokens == ["ab", "##cd", "##e", "##f"]
    made.add_tokens(["##f"])  # one that is an added token already is not added again
    assert cut(made, [6, 8, 9])[1] == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]


def test_unigram_does_not_prefer_the_unknown():
    """Where a, b, c, d score badly, abcde and an unknown f would beat four characters and ef."""
    pieces = [("[UNK]", 0.0), *((one, -20.0) for one in "abcde"), ("abcd", -1.0), ("abcde", -5.0), ("ef", -1.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    assert made.encode("abcdef").tokens == ["abcd", "ef"]
    smaller, rows = cut(made, [7, 8])
    assert rows == [0, 1, 2, 3, 4, 5, 7, 8, 8]
    assert smaller.encode("abcdef").tokens == ["abcde", "f"]
    assert smaller.encode("abcdef").ids == [6, 8]


def test_ids_of_every_post_processor_follow():
    made = wordpiece()
    template = processors.TemplateProcessing(single="$A [SEP] [SEP]", special_tokens=[("[SEP]", 3)])
    for processor in (template, processors.Sequence([processors.ByteLevel(), template])):
        content = json.loads(made.to_str())
        content["post_processor"] = json.loads(processor.__getstate__())
        content["added_tokens"] = []  # special tokens are ordinary ones here: what is written stays all the same
        written, rows = rewrite(content, ())
        assert rows[:2] == [1, 3]
        assert Tokenizer.from_str(json.dumps(written)).encode("").ids == [1, 1]


def test_other_kinds_are_refused():
    made = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(StepError, match="WordPiece, BPE, Unigram .* got WordLevel"):
        rewrite(json.loads(made.to_str()), [0])
