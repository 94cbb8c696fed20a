"""llama.cpp through its C functions: the logits and tokens of a GGUF file."""

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.ggml import library

#: 32-bit words that hold any parameters of llama.cpp; it reads as many as it knows
_WORDS = 256
#: what llama.cpp says while it loads, of which the last lines tell what went wrong
_SAID: list[str] = []


class _Parameters(ctypes.Structure):
    """Parameters as llama.cpp fills them in; those of a context begin with three sizes."""

    _fields_ = [("words", ctypes.c_uint32 * _WORDS)]


class _Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("count", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _listen(level: int, text: bytes, data: Any) -> None:
    if level >= 3:
        _SAID.append(text.decode(errors="replace").strip())
        del _SAID[:-4]


@cache
def _llama() -> Any:
    """The library, with the signatures of what is called."""
    found = library()
    where, whole = ctypes.c_void_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "llama_model_default_params": (_Parameters, ()),
        "llama_context_default_params": (_Parameters, ()),
        "llama_model_load_from_file": (where, (ctypes.c_char_p, _Parameters)),
        "llama_init_from_model": (where, (where, _Parameters)),
        "llama_model_get_vocab": (where, (where,)),
        "llama_model_n_ctx_train": (whole, (where,)),
        "llama_vocab_n_tokens": (whole, (where,)),
        "llama_get_memory": (where, (where,)),
        "llama_memory_clear": (None, (where, ctypes.c_bool)),
        "llama_set_n_threads": (None, (where, whole, whole)),
        "llama_batch_init": (_Batch, (whole, whole, whole)),
        "llama_batch_free": (None, (_Batch,)),
        "llama_decode": (whole, (where, _Batch)),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (where,)),
        "llama_free": (None, (where,)),
        "llama_model_free": (None, (where,)),
        "llama_tokenize": (
            whole,
            (where, ctypes.c_char_p, whole, where, whole, ctypes.c_bool, ctypes.c_bool),
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = found[name]
        function.restype, function.argtypes = result, list(arguments)
        setattr(found, name, function)
    found.llama_backend_init()
    found.llama_log_set(_listen, None)
    return found


class Llama(AbstractContextManager["Llama"]):
    """A GGUF file, loaded by llama.cpp; to be used in a `with` block.

    Args:
        path: of the file.
        length: tokens of the longest input.

    Raises:
        LayerwiseError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, length: int = 512) -> None:
        self.library = _llama()
        self.length, self.path = length, path
        self.context = None
        self.model = self.library.llama_model_load_from_file(
            bytes(path), self.library.llama_model_default_params()
        )
        settings = self.library.llama_context_default_params()
        settings.words[0] = settings.words[1] = settings.words[2] = length
        if self.model:
            self.context = self.library.llama_init_from_model(self.model, settings)
        if not self.context:
            raise LayerwiseError(
                f"{path} in llama.cpp",
                allowed="a file that it loads",
                found="; ".join(_SAID) or "an error without a word",
                fix="take another copy of the file, or another version of xllamacpp",
            )
        threads = torch.get_num_threads()
        self.library.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = self.library.llama_model_get_vocab(self.model)
        self.batch = self.library.llama_batch_init(length, 0, 1)

    def __exit__(self, *error: object) -> None:
        self.library.llama_batch_free(self.batch)
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    @property
    def trained_length(self) -> int:
        """Positions that the model knows."""
        return int(self.library.llama_model_n_ctx_train(self.model))

    def logits(self, tokens: Sequence[int]) -> Float[Tensor, "seq vocabulary"]:
        """Logits after every token of one sequence, computed in one batch without a past."""
        if len(tokens) > self.length:
            raise LayerwiseError(
                f"{self.path} in llama.cpp",
                allowed=f"at most {self.length} tokens",
                found=len(tokens),
                fix="ask for a longer context",
            )
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.batch.count = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = int(token), i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            self.batch.logits[i] = 1
        if self.library.llama_decode(self.context, self.batch):
            raise LayerwiseError(
                f"{self.path} in llama.cpp",
                allowed="a model that runs",
                found="; ".join(_SAID) or "an error without a word",
                fix="take another version of xllamacpp",
            )
        size = len(tokens), self.library.llama_vocab_n_tokens(self.vocabulary)
        found = self.library.llama_get_logits(self.context)
        floats = ctypes.cast(found, ctypes.POINTER(ctypes.c_float * (size[0] * size[1]))).contents
        return torch.frombuffer(floats, dtype=torch.float32).reshape(size).clone()

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text by llama.cpp's own tokenizer, with those that mark its ends."""
        given = text.encode()
        room = (ctypes.c_int32 * (len(given) + 8))()
        size = len(given), room, len(room)
        count = self.library.llama_tokenize(self.vocabulary, given, *size, True, False)
        return list(room[: max(count, 0)])
