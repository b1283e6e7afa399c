"""Texts as several models read them: the same texts, at the places where the tokens of all end at the same characters."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.readers.conftest import make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from picolm.errors import PicoError
from picolm.observe.config import Observe
from picolm.observe.rows import _aligned, rows_of
from picolm.store import Run

TEXT = "The people of the state of the union speak of peace, of war, and of the people's money. " * 40


def tokenizer(size: int, text: str = TEXT) -> Tokenizer:
    """A byte-level BPE of `size` tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return made


COARSE, FINE = tokenizer(290), tokenizer(258)


def series(save: Callable[..., Path], folder: str, made: Tokenizer) -> Run:
    place = save(make("llama", vocab_size=300), f"{folder}/step7")
    made.save(str(place / folder / "step7" / "tokenizer.json"))
    return Run.open(place / folder)


@given(
    st.lists(st.text("the polf ü你,'", min_size=1, max_size=30), min_size=1, max_size=4),
    st.sampled_from(["all", "last"]),
)
def test_aligned_positions_end_the_same_characters(prompts: list[str], positions: str) -> None:
    asked = Observe(rows=tuple(prompts), positions=positions)  # type: ignore[arg-type]
    found = _aligned(asked, {"coarse": COARSE, "fine": FINE}, {"coarse": 16, "fine": 16}, {"coarse": 1, "fine": 1})
    assert found["coarse"].identity == found["fine"].identity
    for row, prompt in enumerate(prompts):
        read = [
            [made.decode(rows.tokens[row][: place + 1].tolist()) for place in rows.positions[row]]
            for made, rows in ((COARSE, found["coarse"]), (FINE, found["fine"]))
        ]
        assert read[0] == read[1]
        assert all(prompt.startswith(text) and text for text in read[0])
        assert positions == "all" or len(read[0]) == 1


@pytest.mark.slow
def test_two_tokenizers_read_the_same_texts(save: Callable[..., Path], tmp_path: Path) -> None:
    runs = {"a": series(save, "a", COARSE), "b": series(save, "b", FINE)}
    (tmp_path / "text.txt").write_text(TEXT)
    asked = Observe(rows=str(tmp_path / "text.txt"), positions="all", length=20, max_rows=5)
    found = rows_of(asked, runs, {"a": 32, "b": 32})
    assert found["a"].identity == found["b"].identity
    assert [len(row) for row in found["a"].tokens] != [len(row) for row in found["b"].tokens]
    texts = {
        name: [made.decode(row.tolist()) for row in found[name].tokens] for name, made in (("a", COARSE), ("b", FINE))
    }
    assert all(one.startswith(other) or other.startswith(one) for one, other in zip(texts["a"], texts["b"]))
    assert sum(map(len, found["a"].positions)) == sum(map(len, found["b"].positions)) > 20
    with pytest.raises(PicoError, match=r"the tokenizers of the runs differ.*positions: all or last"):
        rows_of(asked.model_copy(update={"positions": (3,)}), runs, {"a": 32, "b": 32})


@pytest.mark.slow
def test_one_tokenizer_reads_a_text_in_rows_a_table_by_row_and_prompts_as_they_are(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    run = series(save, "a", COARSE)
    (tmp_path / "text.txt").write_text(TEXT)
    asked = Observe(rows=str(tmp_path / "text.txt"), length=20, max_rows=5)
    rows = rows_of(asked, {"a": run}, {"a": 32})["a"]
    assert [len(row) for row in rows.tokens] == [21] * 5
    assert (
        COARSE.decode([token for row in rows.tokens for token in row.tolist()])
        == TEXT[: sum(len(COARSE.decode(r.tolist())) for r in rows.tokens)]
    )
    assert rows.has_targets
    assert rows.positions == [[19]] * 5
    pq.write_table(
        pa.table({"story": ["The people speak", "of peace"], "ids": [[1, 2, 3], [4, 5, 6]]}), tmp_path / "t.parquet"
    )
    stories = rows_of(Observe(rows=f"{tmp_path}/t.parquet:story"), {"a": run}, {"a": 32})["a"]
    assert [COARSE.decode(row.tolist()) for row in stories.tokens] == ["The people speak", "of peace"]
    ids = rows_of(Observe(rows=f"{tmp_path}/t.parquet:ids", positions="all"), {"a": run}, {"a": 32})["a"]
    assert [row.tolist() for row in ids.tokens] == [[1, 2, 3], [4, 5, 6]]
    assert ids.positions == [[0, 1], [0, 1]]
    with pytest.raises(PicoError, match=r"t\.parquet: has no column text \(it has: story, ids\)"):
        rows_of(Observe(rows=f"{tmp_path}/t.parquet"), {"a": run}, {"a": 32})
    prompts = rows_of(Observe(rows=("The people", "of")), {"a": run}, {"a": 32})["a"]
    assert not prompts.has_targets
    assert prompts.positions == [[len(row) - 1] for row in prompts.tokens]
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("The people", "of war"))
    )
    lines = rows_of(Observe(rows=f"{tmp_path}/lines.jsonl"), {"a": run}, {"a": 32})["a"]
    assert [COARSE.decode(row.tolist()) for row in lines.tokens] == ["The people", "of war"]


@pytest.mark.slow
def test_a_model_without_a_tokenizer_says_what_it_can_read(save: Callable[..., Path]) -> None:
    run = Run.open(save(make("llama"), "step7"))
    with pytest.raises(PicoError, match=r"none of its steps has a tokenizer\.json.*rows: FILE\.npy"):
        rows_of(Observe(rows=("The people",)), {"a": run}, {"a": 32})
    with pytest.raises(PicoError, match="a series of checkpoints has no held-out rows of its own"):
        rows_of(Observe(), {"a": run}, {"a": 32})
