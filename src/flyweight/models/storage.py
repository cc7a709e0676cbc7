"""A bundle to disk and back.

model.safetensors holds every weight once, under the model's own name (tied ones under the first of their names):

- untouched: `NAME`, as it is
- pruned:    `NAME.bitmask` (1 bit a weight, row by row) and `NAME.values` (what is not zero, in that order)
- quantized: `NAME.codes` (k bits each, row by row of [out, in]), `NAME.scale` float32 and, for asymmetric grids,
             `NAME.zero_point` uint8; where flyweight.json says so `NAME.smooth`, `NAME.outliers` and
             `NAME.outlier_values`, `NAME.input_scale`, `NAME.input_zero_point` and `NAME.input_shift`
             (`models.bundle.Codes`)
- both:      `NAME.bitmask` over [out, in], and `NAME.codes` of the kept weights only

Where all quantized weights fit (`models.pack_quantized`), they are stored as compressed-tensors has them instead, so that
transformers loads the folder by itself; flyweight.json says which (`layout`).

Bit order is that of `models.packing`; flyweight.json says which weight is what. 90 % zeros take 1/32 + 1/10 = 13.2 % of
the float32 bytes, one-bit weights 1/32 and a scale a row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flyweight import artifact, errors
from flyweight.artifact import Manifest, QuantizedTensor
from flyweight.models import pack_quantized, surgery
from flyweight.models.build import empty_model, open_config, open_tokenizer, quiet
from flyweight.models.bundle import OPTIONAL, Bundle, Codes
from flyweight.models.codes import parameter_value, zero_codes
from flyweight.models.families import family_of
from flyweight.models.packing import pack_bits, pack_mask, unpack_bits, unpack_mask
from flyweight.tasks import task_named
from flyweight.tokenization import Encoder

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["WEIGHTS", "restore", "save"]

WEIGHTS = "model.safetensors"


def save(bundle: Bundle, folder: Path) -> Manifest:
    """Write config, tokenizer and weights into `folder`; returns the manifest that describes them, without `files`.

    The caller adds engines and measurements and writes it (`artifact.write_manifest`), inside `artifact.write_folder`.
    Raises OSError when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = bundle.model
    same_shape = surgery.sync_config(model, bundle.family)
    config = model.config
    config.architectures = [type(model).__name__]
    if bundle.labels is not None:
        config.id2label = dict(enumerate(bundle.labels))
        config.label2id = {name: number for number, name in enumerate(bundle.labels)}
    standard = same_shape and pack_quantized.misfit(bundle) is None
    _write_config(bundle, folder, standard)
    bundle.tokenizer.backend_tokenizer.no_truncation()
    bundle.tokenizer.backend_tokenizer.no_padding()
    tokenizer = bundle.tokenizer
    with quiet(), _as_os_errors(folder):
        tokenizer.save_pretrained(folder)
        # again without indentation: two thirds of the bytes
        (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(pretty=False), encoding="utf-8")
        save_file(
            _packed(bundle, standard), folder / WEIGHTS, metadata={"format": "pt"}
        )  # transformers asks for this entry
    return Manifest(
        flyweight=metadata.version("flyweight"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=bundle.task,
        labels=bundle.labels,
        family=bundle.family.model_type,
        inputs=bundle.family.inputs,
        pad_token_id=bundle.encoder.pad,
        max_length=bundle.encoder.max_length,
        blocks=surgery.shapes(model, bundle.family),
        plain=standard or (same_shape and not bundle.quantized and not bundle.sparse),
        layout="pack-quantized" if standard else "flyweight",
        origin=bundle.origin,
        steps=bundle.steps,
        versions={name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
        quantized={name: codes.info for name, codes in bundle.quantized.items()},
        activations=bundle.activations,
        sparse=dict(bundle.sparse),
    )


def restore(folder: Path) -> Bundle:
    """The bundle that `save` wrote, bit for bit, on the CPU. Does not verify hashes: `artifact.verify` does.

    Raises ArtifactError where weights are missing, damaged or do not fit the manifest.
    """
    folder = Path(folder)
    manifest = artifact.read_manifest(folder)
    config = open_config(folder, packed=manifest.layout == "pack-quantized")
    family = family_of(config)
    model = empty_model(config, task_named(manifest.task).auto)
    surgery.reshape(model, family, manifest.blocks)
    tokenizer = open_tokenizer(folder)
    return Bundle(
        model=model,
        tokenizer=tokenizer,
        family=family,
        task=manifest.task,
        encoder=Encoder(tokenizer.backend_tokenizer, manifest.pad_token_id, manifest.max_length),
        labels=manifest.labels,
        quantized=_fill(model, _read(folder / WEIGHTS), manifest, folder),
        activations=manifest.activations,
        sparse=dict(manifest.sparse),
        origin=manifest.origin,
        steps=manifest.steps,
    )


def _write_config(bundle: Bundle, folder: Path, standard: bool) -> None:
    config = bundle.model.config
    if standard:
        config.quantization_config = pack_quantized.quantization_config(bundle)
    try:
        config.to_json_file(folder / "config.json")
    finally:
        if standard:
            del config.quantization_config


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; a tied one only under its first name."""
    found: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        found.setdefault(id(tensor), name)
    return {name: state[name] for name in found.values()}


def _packed(bundle: Bundle, standard: bool) -> dict[str, Tensor]:
    tensors = own_tensors(bundle.model)
    unknown = (bundle.quantized.keys() | bundle.sparse.keys()) - tensors.keys()
    if unknown:
        raise errors.ArtifactError("packed weights that the model has", f"'{min(unknown)}'", "this is a fault of ours")
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in bundle.quantized:
            pack = pack_quantized.pack if standard else _pack_codes
            parts = pack(bundle.quantized[name])
        elif name in bundle.sparse:
            parts = {".bitmask": _mask_bytes(tensor != 0), ".values": tensor[tensor != 0]}
        else:
            parts = {"": tensor}
        packed |= {name + suffix: part.detach().cpu().contiguous() for suffix, part in parts.items()}
    return packed


def _pack_codes(codes: Codes) -> dict[str, Tensor]:
    kept = codes.codes if codes.mask is None else codes.codes[codes.mask]
    parts = {
        ".codes": torch.from_numpy(pack_bits(kept.reshape(-1).cpu().numpy(), codes.info.bits)),
        ".scale": codes.scale,
    }
    for part in OPTIONAL:
        if (tensor := getattr(codes, part)) is not None:
            parts[f".{part}"] = tensor.clone()  # q, k and v may share it, which safetensors refuses
    if codes.mask is not None:
        parts[".bitmask"] = _mask_bytes(codes.mask)
    return parts


def _mask_bytes(mask: Tensor) -> Tensor:
    return torch.from_numpy(pack_mask(mask.detach().cpu().numpy()))


@contextmanager
def _as_os_errors(folder: Path) -> Iterator[None]:
    """safetensors and tokenizers hide a full disk in errors of their own; `artifact.write_folder` looks for OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        if os.name == "nt":  # there it is the system's own number, which OSError translates from its fourth argument
            raise OSError(0, str(error), str(folder), code) from None
        raise OSError(code, os.strerror(code), str(folder)) from None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise errors.ArtifactError(f"a readable {path}", f"'{error}'", "fetch or make the artifact again") from None


def _fill(model: nn.Module, tensors: dict[str, Tensor], manifest: Manifest, folder: Path) -> dict[str, Codes]:
    """Copy every weight of the file into the model; returns the codes of the quantized ones."""
    quantized: dict[str, Codes] = {}

    def take(name: str) -> Tensor:
        if name not in tensors:
            raise _bad(folder, f"the weight '{name}'", "none")
        return tensors.pop(name)

    for name, target in own_tensors(model).items():
        try:
            if name in manifest.quantized:
                info = manifest.quantized[name]
                if manifest.layout == "pack-quantized":
                    codes = pack_quantized.unpack(info, lambda suffix, name=name: take(name + suffix))  # type: ignore[misc]
                else:
                    codes = _unpack_codes(name, info, take, f"{name}.bitmask" in tensors)
                quantized[name] = codes
                value = parameter_value(codes)
            elif name in manifest.sparse:
                value = _unpack_sparse(take(f"{name}.bitmask"), take(f"{name}.values"), target)
            else:
                value = take(name)
        except (ValueError, RuntimeError) as error:
            raise _bad(folder, f"a weight '{name}' that unpacks", f"'{error}'") from None
        if value.shape != target.shape or value.dtype != target.dtype:
            raise _bad(
                folder,
                f"{target.dtype} {tuple(target.shape)} as '{name}'",
                f"{value.dtype} {tuple(value.shape)}",
            )
        with torch.no_grad():
            target.copy_(value)
    if tensors:
        raise _bad(folder, "only weights that the model has", f"'{min(tensors)}' beside them")
    return quantized


def _unpack_codes(name: str, info: QuantizedTensor, take: Any, sparse: bool) -> Codes:
    rows, columns = info.shape
    present = {
        "zero_point": info.scheme == "asymmetric",
        "smooth": info.smooth,
        "outliers": bool(info.outliers),
        "outlier_values": bool(info.outliers),
        "input_scale": info.static,
        "input_zero_point": info.static,
        "input_shift": info.shifted,
    }
    parts = {part: take(f"{name}.{part}") for part, there in present.items() if there}
    codes = Codes(info, torch.empty(0), take(f"{name}.scale"), parts.pop("zero_point", None), **parts)
    packed = take(f"{name}.codes").numpy()
    if not sparse:
        values = torch.from_numpy(unpack_bits(packed, info.bits, rows * columns)).reshape(rows, columns)
        return replace(codes, codes=values)
    bits = take(f"{name}.bitmask").numpy()
    mask = torch.from_numpy(unpack_mask(bits, rows * columns)).reshape(rows, columns)
    values = torch.as_tensor(zero_codes(codes)).to(torch.uint8).expand(rows, columns).clone()
    values[mask] = torch.from_numpy(unpack_bits(packed, info.bits, int(mask.sum())))
    return replace(codes, codes=values, mask=mask)


def _unpack_sparse(bitmask: Tensor, values: Tensor, like: Tensor) -> Tensor:
    mask = torch.from_numpy(unpack_mask(bitmask.numpy(), like.numel())).reshape(like.shape)
    if len(values) != int(mask.sum()):
        raise ValueError(f"{int(mask.sum())} values expected, {len(values)} found")
    dense = torch.zeros(like.shape, dtype=values.dtype)
    dense[mask] = values
    return dense


def _bad(folder: Path, expected: str, got: str) -> errors.ArtifactError:
    return errors.ArtifactError(f"{expected} in {folder / WEIGHTS}", got, "fetch or make the artifact again")
