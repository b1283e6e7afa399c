"""Convert tokens to text for captured rows, and count bytes of text for bits per byte."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from picolm import trusted
from picolm.data.manifest import file_of
from picolm.data.tokenizer import load_vocabulary, token_bytes
from picolm.models import Anatomy, anatomy_of


class Text:
    """The tokenizer of a run. Without one (`file` is None) there is no text and there are no bits per byte."""

    def __init__(self, file: Path | None, vocab_size: int):
        self.file = file
        vocabulary = load_vocabulary(file) if file is not None else None
        self.tokenizer = vocabulary.tokenizer if vocabulary is not None else None
        self.eos = vocabulary.eos_id if vocabulary is not None else None
        table = token_bytes(file) if file is not None else None
        unused = max(0, vocab_size - len(table)) if table is not None else 0  # rows of the model without a token
        self.token_bytes_V = torch.as_tensor(np.pad(table, (0, unused))) if table is not None else None

    def decode(self, tokens_RS: Tensor) -> list[str] | None:
        """Return the text of each row, with special tokens; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode_batch(tokens_RS.tolist(), skip_special_tokens=False)

    def tokens(self, numbers: Sequence[int]) -> list[str]:
        """Return the text of each token by itself: parts of characters as replacement marks, `<id>` without a
        tokenizer.
        """
        if self.tokenizer is None:
            return [f"<{number}>" for number in numbers]
        return self.tokenizer.decode_batch([[number] for number in numbers], skip_special_tokens=False)

    def target_bytes(self, micro_batches: Sequence[Tensor], read: int) -> int | None:
        """Return the number of bytes of text of all tokens except the first `read` of each row.

        Negative if the text of some tokens is unknown; None without a tokenizer.
        """
        if self.token_bytes_V is None:
            return None
        return sum(int(self.token_bytes_V[tokens_BS[:, read:]].sum()) for tokens_BS in micro_batches)

    def files(self) -> dict[str, bytes]:
        """Return tokenizer.json and the files next to it that transformers reads, by name; empty without a tokenizer."""
        if self.file is None:
            return {}
        folder, names = self.file.parent, ("tokenizer_config.json", "special_tokens_map.json")
        beside = {name: trusted.read_bytes(file_of(folder, name)) for name in names if os.path.lexists(folder / name)}
        return {"tokenizer.json": trusted.read_bytes(self.file.resolve())} | beside


def checkpoint_files(model: Any, text: Text) -> dict[str, str | bytes]:
    """Return the files, by name, that transformers needs to load a checkpoint: configuration, model code, tokenizer."""
    files: dict[str, str | bytes] = {"config.json": json.dumps(model.hf_config(), indent=2) + "\n"}
    if text.eos is not None:
        ends = {"eos_token_id": text.eos, "pad_token_id": text.eos}
        files["generation_config.json"] = json.dumps(ends, indent=2) + "\n"
    if (anatomy := anatomy_of(model)) != Anatomy():
        files["anatomy.json"] = anatomy.to_json()
    return files | model.modelling_files() | text.files()
