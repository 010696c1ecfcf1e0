"""Answers of an evaluation that is not finished, so that the same command goes on after an interruption.

One file beside `output.path`, a line for each answer as soon as it is there; removed when the evaluation is complete.
What an answer is made from is its name: configuration, parameters and tokens. Of requests that are equal in these the
random numbers follow from how many came before, so their answers are taken all together or not at all.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from xxhash import xxh3_64_hexdigest, xxh3_128

from batchllm.dataset.keys import sampling_identity
from batchllm.durable import make_folder, writing
from batchllm.scoring import Item, TokenSpan


class KeptAnswers:
    """Of one configuration: all that decides an answer beside the request."""

    def __init__(self, folder: Path, configuration: bytes) -> None:
        self.taken = 0  # answers that an earlier process computed
        self._path = folder / f".unfinished-eval-{xxh3_64_hexdigest(configuration)}.jsonl"
        self._configuration = configuration
        self._file: IO[str] | None = None

    def take(self, requests: Sequence[Sequence[Item]]) -> tuple[list[str], list[Any]]:
        """(the name of each request, its answer or None). A request is what all its items say."""
        contents = [self._content(items) for items in requests]
        seen: Counter[str] = Counter()
        names = []
        for content in contents:
            names.append(f"{content}-{seen[content]}")
            seen[content] += 1
        known = self._read()
        missing = {content for content, name in zip(contents, names) if name not in known}
        answers = [None if content in missing else known[name] for content, name in zip(contents, names)]
        self.taken += sum(answer is not None for answer in answers)
        return names, answers

    def add(self, name: str, answer: Any) -> None:
        """Afterwards the answer survives kill -9."""
        with writing(self._path):
            if self._file is None:
                make_folder(self._path.parent)
                self._file = self._path.open("a", buffering=1, encoding="utf-8")
                self._file.write("\n")  # behind the line that a killed process did not finish
            self._file.write(json.dumps([name, answer]) + "\n")

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is not on the disk is computed again
                self._file.close()
            self._file = None

    def remove(self) -> None:
        """The evaluation is complete."""
        self.close()
        with writing(self._path):
            self._path.unlink(missing_ok=True)

    def _content(self, items: Sequence[Item]) -> str:
        digest = xxh3_128(self._configuration)
        for item in items:
            tokens: Sequence[int] = ()
            if isinstance(item, str):
                about = item.encode()
            elif isinstance(item, TokenSpan):
                tokens, about = item.tokens, f"scored from {item.first}".encode()
            else:
                tokens, about = item[0], sampling_identity(item[1])
            raw = np.asarray(tokens, dtype=np.int32).tobytes()
            digest.update(f"{len(about)} {len(raw)} ".encode() + about + raw)
        return str(digest.hexdigest())

    def _read(self) -> dict[str, Any]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        known = {}
        for line in text.splitlines():
            try:
                name, answer = json.loads(line)
            except ValueError:  # not finished, or nothing
                continue
            known[name] = answer
        return known
