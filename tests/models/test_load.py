"""What can be opened is opened right; what cannot is refused in one line that says what to do."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flyweight import artifact
from flyweight.errors import ArtifactError, DataError, ModelError
from flyweight.models.load import load, origin_hash, resolve
from flyweight.models.storage import save
from flyweight.tasks import task_named
from tiny import CLASSIFIERS, ENCODERS, SENTENCES

TASK = task_named("text-classification")
LABELS = ("negative", "positive")
Tiny = Callable[..., Path]


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """A tiny folder that a test may spoil."""

    def make(model_type: str = "bert", labels: tuple[str, ...] | None = LABELS, **changes: Any) -> Path:
        return Path(shutil.copytree(tiny(model_type, labels, **changes), tmp_path / "model"))

    return make


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refusal(source: str | Path, **arguments: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(source, TASK, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_equals_transformers(tiny: Tiny, model_type: str) -> None:
    folder = tiny(model_type, LABELS)
    bundle = load(folder, TASK)
    arrays = bundle.encoder.examples(SENTENCES).batch(range(len(SENTENCES)), bundle.encoder.pad)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, return_tensors="pt", padding=True)
    used = {name: torch.from_numpy(array) for name, array in arrays.items() if name in bundle.family.inputs}
    assert torch.equal(used["input_ids"], tokens["input_ids"])
    with torch.no_grad():
        assert torch.equal(bundle.model(**used).logits, reference(**tokens).logits)
    assert bundle.labels == LABELS
    assert not bundle.model.training


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_headless_model_gets_a_head_under_the_seed(tiny: Tiny, model_type: str) -> None:
    folder = tiny(model_type)
    state = torch.random.get_rng_state()
    first, same, other = (load(folder, TASK, labels=("a", "b", "c"), seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    base = dict(transformers.AutoModel.from_pretrained(folder).named_parameters())
    heads = 0
    for (name, left), (_, right), (_, third) in zip(
        first.named_parameters(), same.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(left, right), name
        inner = name.removeprefix(f"{first.base_model_prefix}.")
        if inner in base and inner != name:
            assert torch.equal(left, base[inner]), name
        elif left.ndim == 2:
            assert not torch.equal(left, third), name
            heads += 1
    assert heads >= 1
    assert first.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert first.config.label2id == {"a": 0, "b": 1, "c": 2}


def test_a_headless_model_without_labels(tiny: Tiny) -> None:
    assert "expected a model with a head" in refusal(tiny("bert"))
    assert load(tiny("bert"), task_named("embedding")).labels is None


def test_the_models_order_of_labels_wins(tiny: Tiny) -> None:
    folder = tiny("bert", ("positive", "negative"))
    assert load(folder, TASK, labels=("negative", "positive")).labels == ("positive", "negative")
    assert load(folder, TASK, labels=("positive",)).labels == ("positive", "negative")  # data may lack a class
    text = refusal(folder, labels=("bad", "good"))
    assert text.startswith("expected the labels 'positive', 'negative' of the model")
    assert "got 'bad', 'good'" in text


def test_numbers_name_the_classes_of_a_head_without_names(tiny: Tiny) -> None:
    folder = tiny("bert", ("LABEL_0", "LABEL_1", "LABEL_2"))
    bundle = load(folder, TASK, labels=("0", "1", "2"))
    assert bundle.labels == ("0", "1", "2")
    assert bundle.model.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert load(folder, TASK).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert "got '0', '3'" in refusal(folder, labels=("0", "3"))
    assert "got 'bad', 'good'" in refusal(folder, labels=("bad", "good"))
    assert "got '0', '1'" in refusal(tiny("bert", LABELS), labels=("0", "1"))


def test_limits(tiny: Tiny, minilm: Path) -> None:
    assert load(tiny("bert", LABELS), TASK).encoder.max_length == 64
    assert load(tiny("roberta", LABELS), TASK).encoder.max_length == 64  # 66 positions, the first two are padding's
    assert load(tiny("bert", LABELS), TASK, max_length=10).encoder.max_length == 10
    assert load(tiny("bert", LABELS), TASK, max_length=1000).encoder.max_length == 64
    long = [("text 1", "a " * 70, None)]
    with pytest.raises(DataError, match="expected at most 64 tokens at text 1, got 72"):
        load(tiny("bert", LABELS), TASK).encoder.encode(long)
    cut = load(tiny("bert", LABELS), TASK, truncate=True)
    assert len(cut.encoder.encode(long)[0][0]) == 64
    arrays = cut.encoder.examples(["a " * 70]).batch([0], cut.encoder.pad)
    cut.model(**{name: torch.from_numpy(arrays[name]) for name in cut.family.inputs})  # the longest input really runs
    real = load(minilm, task_named("embedding")).encoder  # its tokenizer.json carries a truncation of 128
    assert real.tokenizer.truncation is None
    assert real.tokenizer.padding is None
    assert real.max_length == 512
    assert len(real.encode([("", "word " * 200, None)])[0][0]) == 202


@pytest.mark.parametrize("model_type", ENCODERS)
def test_the_longest_input_runs(tiny: Tiny, model_type: str) -> None:
    bundle = load(tiny(model_type, LABELS), TASK, truncate=True)
    arrays = bundle.encoder.examples(["a " * 100]).batch([0], bundle.encoder.pad)
    assert arrays["input_ids"].shape == (1, 64)
    bundle.model(**{name: torch.from_numpy(arrays[name]) for name in bundle.family.inputs})


def test_half_precision_and_shards_are_read(copy: Callable[..., Path]) -> None:
    folder = copy()
    whole = load(folder, TASK).model.state_dict()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float16)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    for name, tensor in load(folder, TASK).model.state_dict().items():
        assert tensor.dtype == whole[name].dtype
        assert torch.equal(tensor, whole[name].to(torch.float16).to(tensor.dtype)), name
    (folder / shards[1]).unlink()
    assert f"got no {shards[1]}; fetch the model again" in refusal(folder)


def test_not_a_model_folder(tmp_path: Path) -> None:
    assert "got no config.json there" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "expected a readable" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "expected a 'model_type'" in refusal(tmp_path)
    assert "got no such folder: ./nowhere" in refusal("./nowhere")
    assert "got a file" in refusal(tmp_path / "config.json")


def test_unknown_families_list_the_known_and_no_code_runs(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    remote = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "modeling.Model")
    edit(folder, auto_map=remote)
    bundle = load(folder, TASK)  # a known family: transformers' own code is used
    assert type(bundle.model).__module__.startswith("transformers.")
    save(bundle, tmp_path / "out")
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    edit(folder, model_type="strange")
    text = refusal(folder)
    assert "families bert, " in text
    assert "got 'strange' (its own code is never run)" in text
    assert not (tmp_path / "ran").exists()


def test_pickles_are_refused_and_the_command_given_converts_them(copy: Callable[..., Path]) -> None:
    folder = copy()
    before = load(folder, TASK).model.state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    text = refusal(folder)
    assert "got pytorch_model.bin, a pickle that can run code" in text
    command = shlex.split(text.split("you trust it: ")[1])
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], check=True)
    for name, tensor in load(folder, TASK).model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_damaged_and_missing_weights(copy: Callable[..., Path]) -> None:
    folder = copy()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"expected a whole safetensors file at {path}" in refusal(folder)
    path.write_bytes(b"\xff" * 100)
    assert "expected a whole safetensors file" in refusal(folder)
    path.write_bytes(content)
    tensors = load_file(path)
    lost = "bert.encoder.layer.1.output.dense.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, {"format": "pt"})
    assert f"1 missing, such as '{lost}'" in refusal(folder)
    save_file({**tensors, lost: torch.zeros(3, 3)}, path, {"format": "pt"})
    assert "that fit its config.json" in refusal(folder)
    path.unlink()
    assert "got no weights" in refusal(folder)


def test_other_things_that_are_refused(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "got weights packed by gptq" in refusal(folder)
    edit(folder, quantization_config=None, problem_type="multi_label_classification")
    assert "got a multi-label head" in refusal(folder)
    edit(folder, problem_type=None, vocab_size=20)
    assert "expected a tokenizer of at most 20 tokens" in refusal(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "expected a tokenizer in" in refusal(folder)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert "GGUF is not supported yet" in refusal(gguf)
    (tmp_path / "folder").mkdir()
    gguf.rename(tmp_path / "folder" / gguf.name)
    assert "GGUF is not supported yet" in refusal(tmp_path / "folder")


def test_the_head_of_another_task_is_not_taken_for_ours(tiny: Tiny, tmp_path: Path) -> None:
    model = transformers.AutoModelForTokenClassification.from_pretrained(tiny("bert"), num_labels=2)
    shutil.copytree(tiny("bert"), tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert "got the head of another task" in refusal(tmp_path / "model", labels=LABELS)


def test_a_family_without_such_a_head(tiny: Tiny) -> None:
    assert "got 'marian'" in refusal(tiny("marian"), labels=LABELS)


def test_artifacts_are_verified(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("bert", LABELS)
    bundle = load(source, TASK, seed=5)
    artifact.write_manifest(tmp_path / "a", save(bundle, tmp_path / "a"))
    again = load(tmp_path / "a", TASK, labels=("positive",), max_length=20, truncate=True)
    assert (again.labels, again.origin, again.encoder.max_length) == (LABELS, origin_hash(source), 20)
    assert again.encoder.truncate
    assert "got 'bad'" in refusal(tmp_path / "a", labels=("bad",))
    with pytest.raises(ModelError, match="expected an artifact for embedding, got one for text-classification"):
        load(tmp_path / "a", task_named("embedding"))
    path = tmp_path / "a" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        load(tmp_path / "a", TASK)


def test_origin_hash_follows_weights_config_and_tokenizer_only(copy: Callable[..., Path]) -> None:
    folder = copy()
    before = origin_hash(folder)
    (folder / "README.md").write_text("words")
    assert origin_hash(folder) == before
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert origin_hash(folder) != before
        (folder / name).write_bytes(content)
    assert origin_hash(folder) == before


@pytest.fixture
def hub_cache(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub's cache as a download leaves it: branch `main` and an older commit; nothing can be fetched."""
    import huggingface_hub

    repo = tmp_path / "hub" / "models--someone--tiny-bert"
    for commit, labels in (("a" * 40, LABELS), ("b" * 40, ("no", "yes"))):
        shutil.copytree(tiny("bert", labels), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "refs" / "old").write_text("b" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def no_route(*arguments: Any, **more: Any) -> None:
    raise OSError("no route to host")


@pytest.mark.parametrize("offline", [True, False])
def test_hub_ids_from_the_cache(hub_cache: Path, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    if not offline:  # there is a network, and it is broken
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", no_route)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", no_route)
    assert load("someone/tiny-bert", TASK).labels == LABELS
    assert load("someone/tiny-bert", TASK, revision="old").labels == ("no", "yes")
    assert load("someone/tiny-bert", TASK, revision="b" * 40).labels == ("no", "yes")
    assert "hub id at revision 'other'" in refusal("someone/tiny-bert", revision="other")
    assert "no folder 'someone/else', and as a hub id" in refusal("someone/else")
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY


def test_a_folder_comes_before_a_hub_id(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny("bert"), tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    assert resolve("bert") == Path("bert")
    with pytest.raises(ModelError, match="leave out the revision"):
        resolve("bert", "main")
