"""llama.cpp in a process of its own: the logits and tokens of a GGUF file."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core import _llama_alone
from layerwise.core.errors import LayerwiseError
from layerwise.core.ggml import library_file


class Llama(AbstractContextManager["Llama"]):
    """A GGUF file, loaded by llama.cpp; to be used in a `with` block.

    llama.cpp ends its process where a file is not what it expects; that is an error here.

    Args:
        path: of the file.
        length: tokens of the longest input.
        pooled: load it for one state of a whole sequence, by the pooling that the file names.

    Raises:
        LayerwiseError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, length: int = 512, pooled: bool = False) -> None:
        self.length, self.path = length, path
        self.said = TemporaryFile()  # noqa: SIM115, closed on leaving
        self.process = subprocess.Popen(
            [sys.executable, "-I", _llama_alone.__file__, library_file()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        try:
            self._ask("load", str(path), length, torch.get_num_threads(), pooled)
        except LayerwiseError:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()

    def trained_length(self) -> int:
        """Positions that the model knows."""
        return self._ask("trained_length")

    def logits(self, tokens: Sequence[int]) -> Float[Tensor, "seq vocabulary"]:
        """Logits after every token of one sequence, computed in one batch without a past."""
        return self._rows("logits", tokens)

    def answers(
        self, source: Sequence[int], target: Sequence[int]
    ) -> Float[Tensor, "seq vocabulary"]:
        """Logits after every token of a target, of a file that encodes a source for its decoder."""
        return self._rows("answers", source, target)

    def states(self, tokens: Sequence[int]) -> Float[Tensor, "seq hidden"]:
        """The last hidden state of every token of one sequence."""
        return self._rows("states", tokens)

    def embedding(self, tokens: Sequence[int]) -> Float[Tensor, " hidden"]:
        """The one state of a whole sequence, of a file that was loaded `pooled`."""
        found = self._ask("embedding", list(map(int, tokens)))
        return torch.frombuffer(found, dtype=torch.float32)

    def value_of(self, key: str) -> str:
        """What the file says under a key, in words; nothing where it does not."""
        return self._ask("value_of", key)

    def embeds(self) -> bool:
        """Whether the file is an encoder's, which gives hidden states in place of logits."""
        return self._ask("embeds")

    def _rows(self, name: str, *sequences: Sequence[int]) -> Float[Tensor, "seq width"]:
        """What a request gives for every token of the last sequence."""
        longest = max(map(len, sequences))
        if longest > self.length:
            raise LayerwiseError(
                f"{self.path} in llama.cpp",
                allowed=f"at most {self.length} tokens",
                found=longest,
                fix="ask for a longer context",
            )
        asked = [list(map(int, tokens)) for tokens in sequences]
        found = torch.frombuffer(self._ask(name, *asked), dtype=torch.float32)
        return found.reshape(len(asked[-1]), -1)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text by llama.cpp's own tokenizer, with those that mark its ends."""
        return self._ask("tokenize", text)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """What the process answers to a request.

        Raises:
            LayerwiseError: it refuses, or ends.
        """
        given, taken = self.process.stdin, self.process.stdout
        assert given is not None and taken is not None
        try:
            given.write(json.dumps([name, arguments]).encode() + b"\n")
            given.flush()
            line = taken.readline()
        except BrokenPipeError:
            line = b""
        answer: dict[str, Any] = json.loads(line) if line else {"refused": self._last_words()}
        if "refused" in answer:
            raise LayerwiseError(
                f"{self.path} in llama.cpp",
                allowed="a file that it loads and runs",
                found=answer["refused"],
                fix="take another copy of the file, or another version of xllamacpp",
            )
        return bytearray(taken.read(answer["bytes"])) if answer["bytes"] else answer["found"]

    def _last_words(self) -> str:
        """What it said before it ended, as far as that tells why."""
        code = self.process.wait()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").splitlines()
        why = [line for line in lines if "GGML_ASSERT" in line or "error" in line.lower()]
        return f"its end, code {code}: {why[0].strip() if why else 'without a word'}"
