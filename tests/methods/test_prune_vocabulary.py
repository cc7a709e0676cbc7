"""Pruning the vocabulary: what is counted, what stays, what is told, and runs in which all that follows reads the new tokens."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flyweight import api, artifact
from flyweight.cache import Cache
from flyweight.context import Context
from flyweight.data import Columns, pack
from flyweight.errors import DataError, SettingsError, StepError
from flyweight.job import prepare
from flyweight.methods.prune.vocabulary import kept_tokens, prune_vocabulary, used_tokens
from flyweight.models.vocabulary import always
from flyweight.plan import make_plan
from flyweight.recipe import Recipe, StepSpec, read_recipe
from flyweight.run import reopen
from flyweight.runtime import open_model
from flyweight.settings import PruneSettings
from flyweight.steps import STEPS
from flyweight.tasks import task_named
from flyweight.training import predict
from flyweight.training.distillation import Distillation
from flyweight.training.pair import same_tokens
from tiny import SENTENCES
from training_cases import open_bundle

LABELS = ("negative", "positive")
USED = SENTENCES[:6]


def settings(**values):
    return PruneSettings(target="vocabulary", **values)


def context_of(bundle, tmp_path, train=USED, validation=SENTENCES, **more):
    """The examples in the bundle's own tokens, and how another model reads the same texts."""

    def of(one):
        read = {"train": train, "validation": validation}
        found = {name: one.encoder.examples(texts) if texts else None for name, texts in read.items()}
        return {**found, "calibration": None, "unlabelled": None}

    def none(*_):
        raise AssertionError

    task = task_named("text-classification")
    parts = {**of(bundle), "reread": of, **more}
    return Context(task=task, seed=3, work=tmp_path / "work", reference=none, load=none, device="cpu", **parts)


@pytest.fixture
def bundle(tiny):
    return open_bundle(tiny("bert", labels=LABELS))


def write(path, texts, **more):
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("model_type", ["bert", "roberta", "mpnet", "t5"])
def test_what_the_corpus_does_not_use_goes_and_the_rest_answers_as_before(tiny, tmp_path, model_type):
    bundle = open_bundle(tiny(model_type, labels=LABELS))
    context = context_of(bundle, tmp_path)
    before, kept = predict(bundle, context.validation), predict(bundle, context.train)
    used = set(context.train.ids.tolist())
    fixed = always(bundle)
    tokens, size = len(bundle.tokenizer), sum(p.numel() for p in bundle.model.parameters())
    made, notes = prune_vocabulary(bundle, settings(), context)
    after = context.seen_by(made)
    answers = predict(made, after.validation)
    assert np.array_equal(predict(made, after.train), kept)
    names = made.tokenizer.get_vocab()
    if model_type != "roberta":  # BPE also needs what words are merged from
        assert len(names) == len(used | fixed) + (model_type == "t5")  # its comma stands inside "▁," alone
    width = made.model.get_input_embeddings().weight.shape[1]
    assert notes["tokens_before"] == tokens
    assert notes["tokens_after"] == len(names) < tokens
    assert notes["parameters_before"] == size
    gone = size - sum(p.numel() for p in made.model.parameters())
    assert notes["bytes_saved"] == 4 * gone == 4 * width * (tokens - len(names))
    assert notes["corpus"]["kept_share"] == 1
    assert notes["corpus"]["tokens_per_text_before"] == notes["corpus"]["tokens_per_text_after"]
    told = notes["validation"]
    whole = [i for i, text in enumerate(SENTENCES) if set(bundle.encoder.tokenizer.encode(text).ids) <= used | fixed]
    assert told["texts"] == 15
    assert told["unchanged_share"] == pytest.approx(len(whole) / 15, abs=1e-6)
    assert told["tokens_per_text_after"] == pytest.approx(after.validation.lengths.mean(), abs=1e-3)
    assert told["tokens_per_text_before"] < told["tokens_per_text_after"]
    others = [i for i in range(15) if i not in whole]
    one, other = before[others].astype(float), answers[others].astype(float)
    assert told["changed"]["texts"] == len(others)
    error = np.sqrt(np.square(one - other).sum() / np.square(one).sum())
    assert told["changed"]["relative_error"] == pytest.approx(error, abs=1e-4)
    cosine = np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(one, other, strict=True)])
    assert told["changed"]["cosine"] == pytest.approx(cosine, abs=1e-4)


def test_the_rarest_go_until_the_share_is_gone(bundle, tmp_path):
    """Counts are known: word i of a list stands i times in the corpus."""
    vocab = bundle.tokenizer.get_vocab()
    fixed = always(bundle)
    words = sorted((word for word in vocab if vocab[word] not in fixed), key=vocab.get)
    context = context_of(bundle, tmp_path, train=[" ".join([word] * i) for i, word in enumerate(words[:20], 1)])
    n = len(vocab)
    stay = 12  # of the words: those that stand 9 to 20 times
    made, notes = prune_vocabulary(bundle, settings(amount=(n - len(fixed) - stay) / n), context)
    left = {word for word in words if word in made.tokenizer.get_vocab()}
    assert left == set(words[8:20])
    assert notes["removed"] == n - len(fixed) - stay
    total = sum(range(1, 21))
    assert notes["corpus"]["kept_share"] == pytest.approx(sum(range(9, 21)) / total, abs=1e-6)


def test_an_amount_may_leave_unused_tokens_those_of_low_ids(bundle, tmp_path):
    vocab = bundle.tokenizer.get_vocab()
    n, fixed = len(vocab), always(bundle)
    context = context_of(bundle, tmp_path, train=["wonderful"])
    made, _ = prune_vocabulary(bundle, settings(amount=10 / n), context)
    gone = {vocab[word] for word in vocab.keys() - made.tokenizer.get_vocab().keys()}
    candidates = sorted(set(vocab.values()) - fixed - {vocab["wonderful"]})
    assert gone == set(candidates[-10:])


def test_what_a_token_is_made_of_counts_as_it_does():
    """abc (5 times) is merged from ab (never seen by itself): ab stays before d (4 times), and never without room."""
    ids = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "d": 5, "e": 6}
    parts = {4: [3, 4], 3: [3]}

    def needed(number):
        return parts.get(number, [])

    counts = Counter({4: 5, 5: 4, 6: 1})
    stays = [kept_tokens(counts, list(ids.values()), {0, 1, 2}, needed, gone / 7) - {0, 1, 2} for gone in (1, 2, 3, 4)]
    assert stays == [{3, 4, 5}, {3, 4}, {3}, set()]
    assert kept_tokens(Counter({4: 1}), list(ids.values()), {0, 1, 2}, needed, None) == {0, 1, 2, 3, 4}


def test_a_corpus_is_streamed_by_the_users_columns_and_has_no_longest_text(bundle, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"review": "wonderful song " * 200}) + "\n" + json.dumps({"review": "sea"}) + "\n")
    context = context_of(bundle, tmp_path, train=None, columns=Columns("review", None, None))
    corpus = used_tokens(bundle, settings(corpus=path), context)
    vocab = bundle.tokenizer.get_vocab()
    assert corpus.counts == {vocab["wonderful"]: 200, vocab["song"]: 200, vocab["sea"]: 1}
    assert (corpus.name, corpus.texts, corpus.tokens) == ("corpus.jsonl", 2, 405)
    made, notes = prune_vocabulary(bundle, settings(corpus=path), replace(context, validation=None))
    assert len(made.tokenizer) == len(always(bundle)) + 3
    assert notes["corpus"]["tokens_per_text_after"] == 405 / 2 == notes["corpus"]["tokens_per_text_before"]
    assert "validation" not in notes


def test_training_and_calibration_texts_are_the_corpus_where_none_is_named(bundle, tmp_path):
    context = context_of(bundle, tmp_path, train=["a film"])
    context.calibration = bundle.encoder.examples(["a song"])
    vocab = bundle.tokenizer.get_vocab()
    found = used_tokens(bundle, settings(), context)
    assert found.counts == {vocab["a"]: 2, vocab["film"]: 1, vocab["song"]: 1}


def test_without_files_to_read_again_there_is_less_to_tell(bundle, tmp_path):
    _, notes = prune_vocabulary(bundle, settings(), context_of(bundle, tmp_path, reread=None))
    assert "validation" not in notes
    assert "tokens_per_text_after" not in notes["corpus"]


# bad input


def refusal(bundle, context, **values):
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    with pytest.raises((StepError, DataError)) as error:
        prune_vocabulary(bundle, settings(**values), context)
    assert before.keys() == bundle.model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())
    return str(error.value)


def test_a_corpus_that_keeps_nothing_is_refused(bundle, tmp_path):
    context = context_of(bundle, tmp_path)
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    assert "got an empty file" in refusal(bundle, context, corpus=path)
    strange = write(tmp_path / "strange.jsonl", ["日本語", "мир ☃", "[SEP]"])
    told = "expected a corpus with tokens of the vocabulary, got only special tokens and unknown words in strange.jsonl"
    assert told in refusal(bundle, context, corpus=strange)
    bare = context_of(bundle, tmp_path, train=None, validation=None)
    assert "expected texts whose tokens stay, got none; give --corpus" in refusal(bundle, bare)
    assert "no such file" in refusal(bundle, context, corpus=tmp_path / "none.jsonl")
    other = write(tmp_path / "other.jsonl", ["x"])
    assert "a column 'review'" in refusal(bundle, replace(context, columns=Columns("review", None, None)), corpus=other)


def test_an_amount_out_of_reach_is_refused_with_what_can_go(bundle, tmp_path):
    n, fixed = len(bundle.tokenizer), len(always(bundle))
    context = context_of(bundle, tmp_path)
    told = refusal(bundle, context, amount=0.9)
    most = float(told.partition("lower it to ")[2].partition(" or less")[0])
    assert f"at most {n - fixed} tokens can go" in told
    assert "at least one token" in refusal(bundle, context, amount=0.4 / n)
    made, _ = prune_vocabulary(bundle, settings(amount=most), context)
    assert fixed <= len(made.tokenizer) <= fixed + 1


def test_a_corpus_that_uses_every_token_is_refused(bundle, tmp_path):
    everything = [word for word in bundle.tokenizer.get_vocab() if not word.startswith(("[", "##"))]
    told = refusal(bundle, context_of(bundle, tmp_path, train=everything))
    assert "that the corpus does not use, got none; set amount" in told


def test_a_text_that_becomes_too_long_is_refused(bundle, tmp_path):
    """Words that fall apart into letters no longer fit."""
    long = " ".join(["wonderful"] * 40)

    def of(one):
        return {"validation": one.encoder.examples([long])}

    context = context_of(bundle, tmp_path, validation=[long], reread=of)
    with pytest.raises(StepError, match="short enough without the tokens that went: at most 64 tokens .* got 362"):
        prune_vocabulary(bundle, settings(corpus=write(tmp_path / "c.jsonl", ["a film"])), context)


def test_in_a_pruned_pair_the_examples_are_where_they_were(bundle, tmp_path):
    """Types of a text and its partner stay what they were."""
    before = pack(bundle.encoder.encode([("x", USED[0], USED[1])]), None)
    made, _ = prune_vocabulary(bundle, settings(), context_of(bundle, tmp_path))
    after = pack(made.encoder.encode([("x", USED[0], USED[1])]), None)
    assert after.types.tolist() == before.types.tolist()
    assert len(after.ids) == len(before.ids)


# whole runs

QUICK = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}
MEASURE = {"batches": [1], "lengths": [8], "rounds": 3, "leave_out": ["memory", "energy"]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Words of evaluation texts that training has not."""
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    chance = np.random.default_rng(0)

    def rows(words, count):
        return [
            {"text": " ".join(chance.choice(words, 6)), "label": ["no", "yes"][i % 2], "other": "letter"}
            for i in range(count)
        ]

    train = ["film", "plot", "actors", "year", "story", "song", "half"]
    for name, words, count in (("train", train, 60), ("eval", [*train, "rhythm", "comedies"], 24)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(words, count)))
    return SimpleNamespace(train=tmp_path / "train.jsonl", eval=tmp_path / "eval.jsonl", folder=tmp_path)


def recipe(model, files, *steps, **given):
    made = tuple(StepSpec(name, STEPS[name].settings.read(values, name)) for name, values in steps)
    measure = Recipe().measure.read(MEASURE, "measure")
    given = {"task": "text-classification", "train": files.train, "eval": files.eval, **given}
    return api.make_recipe(Recipe(model=str(model), steps=made), measure=measure, **given)


def test_all_that_follows_reads_the_new_tokens(tiny, files):
    """finetune, prune, finetune, quantize with a gate: every answer in the record is one to the texts, not to old numbers."""
    steps = (
        ("finetune", QUICK),
        ("prune", {"target": "vocabulary"}),
        ("finetune", QUICK),
        ("quantize", {"bits": 8, "gate": "auto"}),
    )
    whole = recipe(tiny("bert"), files, *steps, max_drop=0.9)
    manifest = api.run_recipe(whole, files.folder / "out")
    assert artifact.verify(files.folder / "out") == manifest
    notes = manifest.steps[1].notes
    assert notes["validation"]["unchanged_share"] == 1
    assert notes["after"]["quality"] == manifest.steps[0].notes["after"]["quality"]
    assert manifest.steps[3].notes["gate"]["held"]
    job = prepare(whole)
    first, last = reopen(job, 1), reopen(job, 4)
    assert len(last.tokenizer) == notes["tokens_after"] < len(first.tokenizer)
    old, new = (job.read_by(one)[0] for one in (first, last))
    assert old is job.splits
    assert len(new.eval.ids) > len(old.eval.ids)  # words that training has not fell apart
    for name in ("train", "validation", "eval"):
        assert np.array_equal(getattr(new, name).labels, getattr(old, name).labels)
    figures = manifest.measurements
    for name, bundle, splits in (("reference_torch", first, old), ("result", reopen(job, 3), new)):
        quality = task_named("text-classification").metrics(predict(bundle, splits.eval), splits.eval)["accuracy"]
        assert figures[name]["quality.accuracy"].value == pytest.approx(quality, abs=1 / 24 * (name == "result"))
    with open_model(files.folder / "out") as model:
        assert model.encoder.tokenizer.get_vocab_size() == notes["tokens_after"]


def test_vectors_are_held_against_the_reference_in_its_own_tokens(tiny, files):
    """Without labels the reference's answers stand in for them: read with old numbers they would be those of other texts."""
    steps = (("prune", {"target": "vocabulary", "corpus": str(files.train)}),)
    manifest = api.run_recipe(recipe(tiny("bert"), files, *steps, task="embedding"), files.folder / "out")
    figures = manifest.measurements
    assert figures["reference_torch"]["quality.cosine"].value == pytest.approx(1, abs=1e-5)
    assert figures["result"]["quality.cosine"].value < 0.9999
    same = recipe(tiny("bert"), files, *steps, task="embedding", eval=files.train)
    figures = api.run_recipe(same, files.folder / "same").measurements
    assert figures["result"]["quality.cosine"].value == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("task", ["text-classification", "embedding"])
def test_the_reference_teaches_a_model_of_fewer_tokens(tiny, files, monkeypatch, task):
    """Asked in its own tokens: the answers learned from are those that it gives to the texts as it reads them."""
    asked = []

    class Watched(Distillation):
        def __init__(self, student, settings, targets, *rest, **more):
            super().__init__(student, settings, targets, *rest, **more)
            asked.append((student, targets))

    monkeypatch.setattr("flyweight.methods.distill.Distillation", Watched)
    steps = ("prune", {"target": "vocabulary", "amount": 0.5}), ("distill", {"max_steps": 1, "learning_rate": 1e-9})
    first = (("finetune", QUICK),) if task == "text-classification" else ()
    whole = recipe(tiny("bert"), files, *first, *steps, task=task)
    manifest = api.run_recipe(whole, files.folder / "out")
    job = prepare(whole)
    reference = reopen(job, job.leading)
    ((student, targets),) = asked
    assert len(student.tokenizer) < len(reference.tokenizer)
    assert np.allclose(targets[0], predict(reference, job.read_by(reference)[0].train), atol=1e-5)
    held = job.read_by(reference)[0].validation
    if task == "text-classification":
        metric = task_named(task).metrics(predict(reference, held), held)["accuracy"]
        assert manifest.steps[-1].notes["teacher_metric"] == pytest.approx(metric)


def test_a_student_and_a_teacher_of_other_vocabularies(tiny, files):
    """The teacher's answers go to the texts, whoever reads them; what is made reads as the student did."""
    mpnet, bert = tiny("mpnet", seed=1), tiny("bert", seed=2)
    school = files.folder / "school"
    api.run_recipe(recipe(mpnet, files, ("finetune", QUICK)), school)
    notes = {}
    for name, model, step in (
        ("student", mpnet, {"student": str(bert)}),
        ("teacher", bert, {"teacher": str(school)}),
    ):
        whole = recipe(model, files, ("finetune", QUICK), ("distill", {**QUICK, **step}))
        notes[name] = api.run_recipe(whole, files.folder / name).steps[-1].notes
        job = prepare(whole)
        made = reopen(job, 2)
        assert made.family.model_type == "bert"
        assert same_tokens(made, open_bundle(bert, "embedding"))
        assert not same_tokens(made, open_bundle(mpnet, "embedding"))
        with open_model(files.folder / name) as model:
            answers = model.predict(SENTENCES[:3])
        assert len(answers) == 3
    assert notes["student"]["teacher_metric"] == notes["teacher"]["teacher_metric"]
    for step in ({"student": str(bert), "hidden_weight": 1.0}, {"student": str(bert), "augment": 0.1}):
        (name,) = set(step) - {"student"}
        with pytest.raises(StepError, match=f"same tokens as the teacher for {name}"):
            prepare(recipe(mpnet, files, ("finetune", QUICK), ("distill", {**QUICK, **step})))


def test_what_the_corpus_says_is_part_of_the_cached_prefix(tiny, files):
    one, other = (write(files.folder / f"{name}.jsonl", [name]) for name in ("film", "plot"))
    keys = [
        prepare(
            recipe(tiny("bert"), files, ("finetune", QUICK), ("prune", {"target": "vocabulary", "corpus": str(path)}))
        )
        for path in (one, one, other)
    ]
    assert keys[0].keys == keys[1].keys
    assert keys[0].keys[:2] == keys[2].keys[:2]
    write(one, ["plot"])
    again = prepare(keys[0].recipe)
    assert again.keys[2] != keys[0].keys[2]


def test_a_plan_takes_the_blocks_for_whole(tiny, files):
    rows = [
        make_plan(prepare(recipe(tiny("bert"), files, ("finetune", QUICK), *more))).rows
        for more in ((), (("prune", {"target": "vocabulary", "amount": 0.3}),))
    ]
    assert rows[1][1].what == "30% of vocabulary by magnitude"
    assert rows[1][1].disk_bytes == rows[0][0].disk_bytes


def test_recipes_with_a_vocabulary_step_are_refused_before_anything_runs(tiny, files):
    step = ("prune", {"target": "vocabulary"})
    inside = ("distill", {**QUICK, "hidden_weight": 1.0})
    with pytest.raises(StepError, match=r"steps\[1\] distill with hidden_weight before the vocabulary is pruned"):
        prepare(recipe(tiny("bert", labels=("no", "yes")), files, step, inside))
    with pytest.raises(SettingsError, match=r"texts whose tokens stay .* --corpus"):
        prepare(recipe(tiny("bert"), files, step, task="embedding", train=None))
    missing = ("prune", {"target": "vocabulary", "corpus": str(files.folder / "none.jsonl")})
    with pytest.raises(DataError, match="no such file"):
        prepare(recipe(tiny("bert"), files, missing, task="embedding"))
    assert not list(Cache().entries())


def test_the_corpus_of_a_recipe_file_lies_beside_it(files):
    path = files.folder / "r.yaml"
    path.write_text("flyweight: 1\nsteps:\n- prune: {target: vocabulary, corpus: train.jsonl}\n")
    made = read_recipe(path)
    assert made.steps[0].settings.corpus == files.train
    assert "corpus: train.jsonl" in made.to_yaml(private=True)
