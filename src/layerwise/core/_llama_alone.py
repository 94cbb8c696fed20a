"""llama.cpp in a process of its own, which it ends where it meets what it did not expect.

`python _llama_alone.py LIBRARY` reads requests, a line of JSON each, and answers each with a line
of JSON and as many bytes behind it as that says. It imports nothing but the standard library.
"""

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

#: 32-bit words that hold any parameters of llama.cpp; it reads as many as it knows
_WORDS = 256
#: a parameter that is left to llama.cpp
_UNTOLD = 2**32 - 1
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
def _llama(path: str) -> Any:
    """The library, with the signatures of what is called."""
    found = ctypes.CDLL(path)
    where, whole, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t
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
        "llama_decode": (whole, (where, _Batch)),
        "llama_encode": (whole, (where, _Batch)),
        "llama_model_meta_val_str": (whole, (where, ctypes.c_char_p, ctypes.c_char_p, size)),
        "llama_model_n_embd": (whole, (where,)),
        "llama_set_embeddings": (None, (where, ctypes.c_bool)),
        "llama_get_embeddings": (ctypes.POINTER(ctypes.c_float), (where,)),
        "llama_get_embeddings_seq": (ctypes.POINTER(ctypes.c_float), (where, whole)),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (where,)),
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


def _exactly(settings: Any, pooled: bool, embeds: bool) -> None:
    """Unless `pooled`, ask for the state of every token, not for one of all of them; and, of an
    encoder, for attention in float32.

    Of the parameters that llama.cpp chooses itself unless told, -1, the second is the pooling and
    the fourth flash attention, which would round keys and values to half precision.
    """
    open_ = [i for i, word in enumerate(settings.words) if word == _UNTOLD]
    if not pooled:
        settings.words[open_[1]] = 0
    if embeds:
        settings.words[open_[3]] = 0


class _Loaded:
    """A GGUF file, loaded; `ValueError` where llama.cpp refuses it."""

    def __init__(
        self, library: Any, path: str, length: int, threads: int, pooled: bool = False
    ) -> None:
        self.library, context = library, None
        model = library.llama_model_load_from_file(
            path.encode(), library.llama_model_default_params()
        )
        settings = library.llama_context_default_params()
        settings.words[0] = settings.words[1] = settings.words[2] = length
        self.model = model
        if model:
            _exactly(settings, pooled, self.embeds())
            context = library.llama_init_from_model(model, settings)
        if not context:
            raise ValueError("; ".join(_SAID) or "an error without a word")
        self.context = context
        library.llama_set_n_threads(context, threads, threads)
        self.vocabulary = library.llama_model_get_vocab(model)
        self.batch = library.llama_batch_init(length, 0, 1)

    def trained_length(self) -> int:
        return int(self.library.llama_model_n_ctx_train(self.model))

    def logits(self, tokens: Sequence[int]) -> bytes:
        """float32 `[seq, vocabulary]` after every token, computed in one batch without a past."""
        self._run(tokens)
        size = 4 * len(tokens) * self.library.llama_vocab_n_tokens(self.vocabulary)
        return ctypes.string_at(self.library.llama_get_logits(self.context), size)

    def answers(self, source: Sequence[int], target: Sequence[int]) -> bytes:
        """float32 `[seq, vocabulary]` after every token of the target of an encoder's source."""
        self._run(source, self.library.llama_encode)
        return self.logits(target)

    def states(self, tokens: Sequence[int]) -> bytes:
        """float32 `[seq, hidden]`: what comes out of the last layer and norm for every token."""
        self.library.llama_set_embeddings(self.context, True)
        self._run(tokens)
        size = 4 * len(tokens) * self.library.llama_model_n_embd(self.model)
        return ctypes.string_at(self.library.llama_get_embeddings(self.context), size)

    def embedding(self, tokens: Sequence[int]) -> bytes:
        """float32 `[width]`: the one state of a whole sequence."""
        self.library.llama_set_embeddings(self.context, True)
        self._run(tokens)
        size = 4 * self.library.llama_model_n_embd(self.model)
        return ctypes.string_at(self.library.llama_get_embeddings_seq(self.context, 0), size)

    def embeds(self) -> bool:
        """Whether the file says that every token sees all others: it gives states, no logits."""
        kind = self.value_of("general.architecture")
        return self.value_of(f"{kind}.attention.causal") == "false"

    def value_of(self, key: str) -> str:
        """What the file says under a key, in words; nothing where it does not."""
        room = ctypes.create_string_buffer(128)
        self.library.llama_model_meta_val_str(self.model, key.encode(), room, len(room))
        return room.value.decode()

    def _run(self, tokens: Sequence[int], compute: Any = None) -> None:
        """Compute one batch without a past, by `llama_decode` unless told."""
        memory = self.library.llama_get_memory(self.context)
        if memory:
            self.library.llama_memory_clear(memory, True)
        self.batch.count = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            self.batch.logits[i] = 1
        if (compute or self.library.llama_decode)(self.context, self.batch):
            raise ValueError("; ".join(_SAID) or "an error without a word")

    def tokenize(self, text: str) -> list[int]:
        given = text.encode()
        room = (ctypes.c_int32 * (len(given) + 8))()
        size = len(given), room, len(room)
        count = self.library.llama_tokenize(self.vocabulary, given, *size, True, False)
        return list(room[: max(count, 0)])


def main(path: str) -> None:
    """Answer until there is nothing more to read; the first request says what to load."""
    loaded, answers = None, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else writes to the standard output
    for line in sys.stdin.buffer:
        name, arguments = json.loads(line)
        answer: dict[str, Any] = {"found": None}
        tail = b""
        try:
            if loaded is None:
                loaded = _Loaded(_llama(path), *arguments)
            else:
                found = getattr(loaded, name)(*arguments)
                tail = found if isinstance(found, bytes) else b""
                answer["found"] = None if tail else found
        except ValueError as error:
            answer = {"refused": str(error)}
        answers.write(json.dumps(answer | {"bytes": len(tail)}).encode() + b"\n" + tail)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
