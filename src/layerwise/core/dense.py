"""Adapters, GGUF files and quantized checkpoints, made into folders of dense safetensors."""

import copy
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from layerwise.core.checkpoint import read_header
from layerwise.core.compact import RECORDS, make_dense
from layerwise.core.companions import ADAPTER, copy_companions, files_in
from layerwise.core.config import model_class, read_config
from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.hollow import build_meta
from layerwise.core.index import PICKLES, read_json
from layerwise.core.llama import Llama
from layerwise.core.quality import divergence
from layerwise.core.trust import trusted

#: the file in a folder of target gguf
GGUF = "model.gguf"
#: nats per token between a decoded file and llama.cpp, which rounds inputs to 8 bits
_MOST_KL = 1e-2
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PACKED = "compressed-tensors"


class Recipe(NamedTuple):
    """How a folder is made dense: in words, from which files, by what, and the work itself."""

    what: str
    inputs: tuple[Path, ...]
    by: tuple[str, ...]
    write: Callable[[Path], None]


def recipe_for(folder: Path, find_base: Callable[[str], Path]) -> Recipe | None:
    """How a folder is made dense, or nothing where its weights are ordinary ones.

    Raises:
        LayerwiseError: it holds an adapter or quantized weights that cannot be made dense.
    """
    if folder.is_file():
        return _gguf(folder)
    if (folder / GGUF).is_file() and not (folder / "config.json").is_file():
        return _gguf(folder / GGUF)
    if (folder / ADAPTER).is_file():
        return _adapter(folder, find_base)
    if (folder / RECORDS).is_file():
        what = f"{folder} holds weights that are sparse, of low rank or packed"
        return Recipe(what, tuple(files_in(folder)), ("compact",), partial(make_dense, folder))
    config = folder / "config.json"
    if config.is_file() and trusted("pickles") and _only_pickles(folder):
        by = ("pickles", transformers.__version__)
        return Recipe(
            f"{folder} holds pickled weights, rewritten as safetensors",
            tuple(files_in(folder)),
            by,
            lambda out: _rewrite(folder, out),
        )
    if config.is_file() and read_json(config).get("quantization_config") is not None:
        return _quantized(folder)
    return None


def _adapter(folder: Path, find_base: Callable[[str], Path]) -> Recipe:
    """A PEFT adapter, merged by peft into the model that it names."""
    path = folder / ADAPTER
    fields = read_json(path)
    name, kind = fields.get("base_model_name_or_path"), fields.get("peft_type")
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise LayerwiseError(
            str(folder),
            allowed=f"{_ADAPTER_WEIGHTS} beside {ADAPTER}",
            found="none",
            fix="save the adapter again with `save_pretrained`, which writes safetensors",
        )
    read_header(folder / _ADAPTER_WEIGHTS)
    try:
        base = find_base(str(name or ""))
    except LayerwiseError as error:
        raise LayerwiseError(
            f"{path}, base_model_name_or_path",
            allowed="the folder or hub id of the model that the adapter was trained on",
            found=f"{name!r}: {error.found}",
            fix="write where that model is",
        ) from error
    with refusing("PEFT adapters", allowed="peft being installed", fix="pip install peft"):
        by = ("adapter", version("peft"), transformers.__version__)
    what = f"{folder} is a {kind} adapter of {name}, merged into it by peft"
    return Recipe(
        what, (*files_in(base), *files_in(folder)), by, lambda out: _merge(base, folder, out)
    )


def _merge(base: Path, adapter: Path, out: Path) -> None:
    with refusing(
        f"adapter {adapter}",
        allowed="one that peft can merge into its model",
        fix="merge it with peft's `merge_and_unload` and open the result",
    ):
        from peft import PeftModel

        found = _load(model_class(read_config(base)), base)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            model: Any = PeftModel.from_pretrained(found, adapter)
        _save(model.merge_and_unload(), out, base, adapter)


def _only_pickles(folder: Path) -> bool:
    kinds = {path.suffix for path in files_in(folder)}
    return ".safetensors" not in kinds and bool(kinds & PICKLES)


def _rewrite(folder: Path, out: Path) -> None:
    with refusing(
        f"pickled weights of {folder}",
        allowed="ones that transformers can load",
        fix="start from another copy of the checkpoint",
    ):
        _save(_load(model_class(read_config(folder)), folder), out, folder)


def _gguf(file: Path) -> Recipe:
    """A GGUF file, decoded by transformers, with its tokenizer."""
    with refusing(
        "GGUF files",
        allowed="the package gguf being installed",
        fix='pip install "layerwise[gguf]"',
    ):
        by = ("gguf", version("gguf"), transformers.__version__)
    what = f"{file} is a GGUF file, decoded by transformers"
    return Recipe(what, (file,), by, lambda out: _decode(file, out))


def _decode(file: Path, out: Path) -> None:
    with refusing(
        f"{file}",
        allowed="a GGUF file of an architecture that transformers reads, with its tokenizer",
        fix="start from the original checkpoint",
    ):
        from gguf import GGUFReader

        assert GGUFReader(file).tensors  # offsets are checked here, before C code reads the file
        where = {"gguf_file": file.name}
        with Llama(file, length=32) as engine:
            config = AutoConfig.from_pretrained(file.parent, **where)
            config.max_position_embeddings = engine.trained_length()
            found = AutoModelForCausalLM.from_pretrained(
                file.parent, **where, config=config, dtype=torch.float32
            )
            _same(found, engine)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        _plain(type(found), found.config, found).save_pretrained(out)
        tokenizer.save_pretrained(out)


def _same(model: PreTrainedModel, engine: Llama) -> None:
    """Refuse a decoded model that does not compute what llama.cpp computes with the file."""
    tokens = [i * 7919 % model.config.vocab_size for i in range(engine.length)]
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    theirs = engine.logits(tokens).double().log_softmax(-1)
    kl = divergence(ours, theirs).mean().item()
    if not kl < _MOST_KL:
        raise ValueError(f"decoded, it is another model: KL {kl:.2g} to llama.cpp with the file")


def _quantized(folder: Path) -> Recipe:
    """Quantized weights, made dense by transformers where it can undo the method."""
    path = folder / "config.json"
    fields = read_json(path)["quantization_config"]
    method = str(fields.get("quant_method")) if isinstance(fields, dict) else repr(fields)
    kinds = AUTO_QUANTIZATION_CONFIG_MAPPING.items()
    able = [n for n, kind in kinds if "dequantize" in inspect.signature(kind).parameters]
    if method not in able:
        raise LayerwiseError(
            f"{path}, quantization_config",
            allowed=f"dense weights, or quantized ones that can be undone: {', '.join(able)}",
            found=f"weights quantized with {method}",
            fix="start from the original checkpoint",
        )
    what = f"{folder} is quantized with {method}, dequantized by transformers"
    by = ("quantized", transformers.__version__)
    return Recipe(what, tuple(files_in(folder)), by, lambda out: _dequantize(folder, method, out))


def _dequantize(folder: Path, method: str, out: Path) -> None:
    with refusing(
        f"weights of {folder}, quantized with {method}",
        allowed="ones that transformers can dequantize on this machine",
        fix="start from the original checkpoint",
    ):
        config = read_config(folder)
        kind = model_class(config)
        quantized = _load_packed if method == _PACKED else _load_dense
        found = quantized(kind, folder, AUTO_QUANTIZATION_CONFIG_MAPPING[method])
        _save(_plain(kind, config, found), out, folder)


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    """A stock model, with every weight from its files."""
    loaded: Any = kind.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    found, info = loaded
    lost = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if lost:
        raise ValueError(f"no {sorted(lost)[0]} of its shape in {folder}")
    return found


def _load_dense(kind: type[PreTrainedModel], folder: Path, method: Any) -> PreTrainedModel:
    return _load(kind, folder, quantization_config=method(dequantize=True))


def _load_packed(kind: type[PreTrainedModel], folder: Path, method: Any) -> PreTrainedModel:
    # dequantize=True in transformers 5.23 reads every group with the bits of the first one
    return unpacked(_load(kind, folder))


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose compressed-tensors weights are dense now, not in its first forward."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(quantizer, "compressor"):
        quantizer.compressor.decompress_model(model)
    return model


def _plain(
    kind: type[PreTrainedModel], config: PretrainedConfig, found: PreTrainedModel
) -> PreTrainedModel:
    """The same model as if it had never been quantized."""
    config = copy.deepcopy(config)
    del vars(config)["quantization_config"]
    model = build_meta(kind, config, found.dtype)
    state = found.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()}, assign=True)
    model.tie_weights()
    return model


def _save(model: PreTrainedModel, out: Path, *sources: Path) -> None:
    """Weights and configuration, and what else the sources hold; the last source wins."""
    model.save_pretrained(out)
    for source in sources:
        copy_companions(source, out)
