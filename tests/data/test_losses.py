"""What a tokenizer cannot represent, and tokenizer files that somebody else wrote: counted, told, refused; never a traceback."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from picolm.data.prepare import prepare
from picolm.data.tokenizer import Losses, _cut_runs, encode, load_vocabulary, train_tokenizer
from picolm.errors import DataError, PicoError

KNOWN = "the quick brown fox jumps over the lazy dog and runs away . " * 4
STRANGE = "Größe 你好"


def made(kind: str) -> Tokenizer:
    """A tokenizer trained on plain English letters."""
    special = ["</s>"] if kind.endswith("without unk") else ["</s>", "<unk>"]
    unknown = {} if kind.endswith("without unk") else {"unk_token": "<unk>"}
    if kind.startswith("WordLevel"):
        tokenizer, trainer = Tokenizer(models.WordLevel(**unknown)), trainers.WordLevelTrainer(special_tokens=special)
    elif kind.startswith("BPE"):
        tokenizer, trainer = (
            Tokenizer(models.BPE(**unknown)),
            trainers.BpeTrainer(vocab_size=60, special_tokens=special),
        )
    elif kind.startswith("WordPiece"):
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special)
        tokenizer.decoder = decoders.WordPiece()
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([KNOWN], trainer)
    return tokenizer


def lost(tokenizer: Tokenizer, text: str) -> dict[str, int]:
    losses = Losses(tokenizer)
    losses.add([text], [tokenizer.encode(text, add_special_tokens=False).ids])
    return dict(losses.lost)


@pytest.mark.parametrize("kind", ["BPE", "BPE without unk", "Unigram"])
def test_each_character_without_a_token_is_counted(kind: str) -> None:
    assert lost(made(kind), KNOWN) == {}
    assert lost(made(kind), f"the dog {STRANGE} runs".replace("G", "")) == {"ö": 1, "ß": 1, "你": 1, "好": 1}


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece"])
def test_words_that_become_the_unknown_token_are_counted(kind: str) -> None:
    assert lost(made(kind), KNOWN) == {}
    assert sum(lost(made(kind), f"the dog {STRANGE} runs").values()) == len("Größe你好")


def test_what_a_normalizer_drops_is_counted_and_what_it_changes_is_not() -> None:
    tokenizer = made("BPE without unk")
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace("q", ""),
    ])  # fmt: skip
    assert lost(tokenizer, "The Quick bröwn fox, ﬁne") == {"q": 1, ",": 1}


@settings(deadline=None)
@given(st.text())
def test_a_byte_level_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = train_tokenizer([KNOWN], 270).tokenizer
    losses = Losses(tokenizer)
    assert not losses._measured
    losses._measured = True
    losses.add([text], [tokenizer.encode(text, add_special_tokens=False).ids])
    assert losses.lost.total() == 0


def test_lost_characters_are_told_in_the_manifest(write_texts: Any, tmp_path: Path) -> None:
    made("BPE without unk").save(str(tmp_path / "tokenizer.json"))
    texts = write_texts({f"{number}.txt": KNOWN + STRANGE for number in range(20)})
    manifest = prepare([texts], tmp_path / "rows", tokenizer=tmp_path / "tokenizer.json", seq_len=16)
    assert manifest is not None
    assert manifest.lost_characters == 5 * 20  # "G" too
    assert manifest.most_lost == dict.fromkeys("Göß你好", 20)


def test_a_tokenizer_that_loses_most_of_the_text_is_refused(write_texts: Any, tmp_path: Path) -> None:
    made("BPE without unk").save(str(tmp_path / "tokenizer.json"))
    texts = write_texts({"a.txt": "你好世界再见" * 400 + " the end of it " * 40})
    with pytest.raises(
        DataError, match=r"the tokenizer has no token for 2,400 of 2,\d\d\d characters of the text, such as '你'"
    ):
        prepare([texts], tmp_path / "rows", tokenizer=tmp_path / "tokenizer.json", seq_len=16)
    assert not (tmp_path / "rows").exists()


def test_a_word_that_has_no_token_and_no_unknown_one_is_a_message(write_texts: Any, tmp_path: Path) -> None:
    made("WordLevel without unk").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"tokenizer.json: cannot encode the text; is its unknown token missing\? \(.*UNK"
    ):
        encode(load_vocabulary(tmp_path), ["the zebra"])
    with pytest.raises(DataError, match=r"cannot encode the text"):
        prepare([write_texts({"a.txt": "the zebra"})], tmp_path / "rows", tokenizer=tmp_path)


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example(part="eos_token", value=["</s>"])
@example(part="eos_token", value=3)
@example(part="eos_token", value="a")
@given(
    part=st.sampled_from(["eos_token", "whole"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["content", "x"]), inner, max_size=2)
        ),
    ),
)
def test_no_tokenizer_configuration_makes_a_traceback(tmp_path: Path, part: str, value: Any) -> None:
    if not (tmp_path / "tokenizer.json").exists():
        made("BPE").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(value if part == "whole" else {part: value}))
    said = f"{tmp_path}/tokenizer_config.json: "
    try:
        vocabulary = load_vocabulary(tmp_path)
        named = value if part == "eos_token" else value.get("eos_token") if isinstance(value, dict) else None
        chosen = named.get("content") if isinstance(named, dict) else named
        assert vocabulary.eos_token in ("</s>", chosen)
        assert vocabulary.tokenizer.token_to_id(vocabulary.eos_token) == vocabulary.eos_id
    except DataError as error:
        said = str(error)
    assert said.startswith(f"{tmp_path}/tokenizer_config.json: ")


@pytest.mark.parametrize("content", [b'{"eos_token": "</s>",}', b"\xff", b"[" * 9999, b"", b"[]"])
def test_a_tokenizer_configuration_that_is_no_object_is_named(tmp_path: Path, content: bytes) -> None:
    made("BPE").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer_config.json: "):
        load_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token": {"content": "<unk>"}}')
    assert load_vocabulary(tmp_path).eos_token == "<unk>"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_no_value_of_a_tokenizer_makes_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    tree = json.loads(made("BPE").to_str())
    node = data.draw(st.sampled_from([tree, tree["model"], tree["pre_tokenizer"], tree["added_tokens"][0]]))
    node[data.draw(st.sampled_from(sorted(node)))] = data.draw(
        st.sampled_from([None, True, -1, 1e9, "x", [], {}, [1], {"type": "Split"}, {"type": "ByteLevel"}, [["a", "b"]]])
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    said = "tokenizer.json"
    try:
        vocabulary = load_vocabulary(tmp_path)
        encode(vocabulary, [KNOWN + STRANGE])
    except PicoError as error:
        said = str(error)
    assert "tokenizer.json" in said


def test_a_pointer_of_git_lfs_and_a_dangling_link_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=r"tokenizer.json: is a pointer of Git LFS"):
        load_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"tokenizer.json: is a link"):
        load_vocabulary(tmp_path)


@given(
    st.lists(
        st.sampled_from(["A" * 5000, "你" * 4096, "7" * 9000, "_" * 4100, "ab ", "x1" * 4000, "\n", "-"]), max_size=6
    )
)
def test_cutting_long_runs_loses_nothing_and_leaves_other_texts_alone(parts: list[str]) -> None:
    text = "".join(parts)
    pieces = list(_cut_runs([text]))
    assert "".join(pieces) == text
    if not any(len(part) > 4000 and len(set(part)) == 1 for part in parts):
        assert pieces == [text]


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["ACGT", "天地玄黄宇宙洪荒日月盈昃", "0123456789abcdef"])
def test_training_on_one_long_run_takes_seconds(letters: str) -> None:
    text = "".join(random.Random(0).choices(letters, k=300_000))
    start = time.monotonic()
    train_tokenizer([text], 1024)
    assert time.monotonic() - start < 60  # 150 s and more before, growing with the square


@pytest.mark.slow
def test_training_answers_ctrl_c(tmp_path: Path) -> None:
    code = (
        "import random; from picolm.data import tokenizer as t; t._LONG_RUN = 10**9\n"
        "print('begun', flush=True); t.train_tokenizer([''.join(random.choices('ACGT', k=1000000))], 4096)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors
