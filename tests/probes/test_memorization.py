"""Memorization against reference values, real greedy decoding, and runs whose rows and canaries are known."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, expected, value

from picolm.data.canaries import random_rows
from picolm.errors import PicoError
from picolm.observe.subject import Subject
from picolm.observe.training import SeenRows, rows_of_tokens
from picolm.probes.memorization import _edges, _exposure, _when, memorization
from picolm.store import Run
from picolm.train.sample import load_model

Train = Callable[..., Run]
PROBE = {"probe_name": "memorization"}
GROUPS = json.loads((REFERENCE / "seen_at.json").read_text())["canary_group"]
SHORT = {**PROBE, "prompt": 4, "continuation": 8}
CANARIES = (
    "data.canaries=[{name: often, rows: random, count: 2, seed: 5, alphabet: 32, start: 2, every: 1},"
    " {name: once, rows: random, count: 1, seed: 5, alphabet: 32, steps: [3]}]"
)


def by_row(found: pd.DataFrame, metric: str, step: int | None = None) -> np.ndarray:
    """Return the values of a metric by the number that is their bin."""
    chosen = found[(found["metric"] == f"memorization.{metric}") & ((found["step"] == step) | (step is None))]
    return chosen.assign(number=chosen["bin"].astype(int)).sort_values("number")["value"].to_numpy(float)


@pytest.mark.parametrize(("series", "step"), [("llama_s0", 300), ("neox_s0", 500)])
def test_memorization_is_that_of_independent_code(
    measure: Measure, rows: dict[str, str], series: str, step: int
) -> None:
    entry = {**PROBE, "rows": rows["canary"], "max_rows": 80, "greedy": True}
    found = measure(entry, runs=(series,), steps=[step])
    known = expected(series, step)
    of = {name: by_row(found, f"row_{name}") for name in ("loss", "extractable", "token_accuracy", "score")}
    for group, values in known["memorization"].items():
        here = np.array(GROUPS) == group
        assert of["loss"][here].mean() == pytest.approx(values["loss"], abs=1e-5)
        assert of["extractable"][here].sum() == values["extractable_16_16"]
        assert of["score"][here].mean() == pytest.approx(values["score_greedy"], abs=1e-12)
        assert of["token_accuracy"][here].mean() == pytest.approx(values["score_teacher_forced"], abs=1e-12)
    assert (of["score"] * 16).tolist() == known["canary_greedy_matches"]
    assert by_row(found, "row_matched_prefix").tolist() == known["canary_first_mismatch"]
    for name, numbers in of.items():
        assert value(found, f"memorization.{name}") == pytest.approx(numbers.mean(), abs=1e-7)
    losses = REFERENCE / f"{series}-step_{step}.token_loss.npz"
    if losses.exists():
        assert of["loss"] == pytest.approx(np.load(losses)["canary"].mean(1), abs=5e-5)


def test_the_loss_of_training_rows_is_that_of_independent_code(measure: Measure, rows: dict[str, str]) -> None:
    found = measure({**PROBE, "rows": rows["train"], "per_row": False}, steps=[0, 300])
    assert not found["metric"].str.contains("row_").any()
    for step in (0, 300):
        known = expected("llama_s0", step)["train_rows_loss"]
        assert value(found, "memorization.loss", step) == pytest.approx(known, abs=1e-5)


def test_extraction_is_real_greedy_generation(measure: Measure, rows: dict[str, str], tmp_path: Path) -> None:
    """Rows that begin with what the model generates are extractable; one wrong token, and they match up to it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(REFERENCE / "checkpoints/llama_s0/step_300")
    prompts = torch.as_tensor(np.load(rows["canary"])[:12, :16])
    whole = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=16, max_new_tokens=16,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    for row in range(1, 12):
        whole[row, 16 + row] = (whole[row, 16 + row] + 1) % 512
    np.save(tmp_path / "whole.npy", whole.numpy())
    found = measure({**PROBE, "rows": str(tmp_path / "whole.npy"), "greedy": True}, steps=[300])
    assert by_row(found, "row_extractable").tolist() == [1.0] + [0.0] * 11
    assert by_row(found, "row_matched_prefix").tolist() == [16, *range(1, 12)]
    assert by_row(found, "row_score").tolist() == [1.0] + [15 / 16] * 11
    assert value(found, "memorization.extractable") == pytest.approx(1 / 12)


@pytest.fixture(scope="module")
def trained(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two runs of 14 steps on the same rows, of which one has canaries; and the step before it is shown the last of them."""
    from picolm.schema import load
    from picolm.train import run_training
    from picolm.train.config import schema_for

    folder, found = tmp_path_factory.mktemp("memorized"), {}
    (folder / "c.yaml").write_text(f"""
data: {{dataset: {{name: {toy_data}}}, dataloader: {{batch_size: 8}}, tokenizer: {{vocab_size: 64}}}}
model: {{d_model: 48, n_layers: 2, attention_n_heads: 4, attention_n_kv_heads: 2, activation_hidden_dim: 96,
  vocab_size: 64, max_seq_len: 16}}
training: {{max_steps: 80, fabric: {{accelerator: cpu, precision: 32-true}},
  optimization: {{lr: 0.01, lr_warmup_steps: 2, lr_scheduler: constant, gradient_accumulation_steps: 1}}}}
checkpointing: {{runs_dir: {folder}, save_every_n_steps: 40, save_schedule: log, save_learning_dynamics: last}}
evaluation: {{metrics: null}}
monitoring: {{logging: {{log_level: ERROR}}}}
""")
    for name, more in (("planted", [CANARIES]), ("plain", [])):
        run_training(load(folder / "c.yaml", schema_for, [f"checkpointing.run_name={name}", *more]))
        found[name] = Run.open(folder / name)
    return found


@pytest.mark.slow
def test_a_canary_is_seen_by_the_checkpoints_after_its_step_and_by_none_before(
    measure: Measure, trained: dict[str, Run], tmp_path: Path
) -> None:
    run, places = trained["planted"], {name: str(run.path) for name, run in trained.items()}
    tokens = torch.stack([canary.tokens for canary in SeenRows(run).canaries])
    np.save(tmp_path / "canaries.npy", tokens.numpy())
    found = measure({**SHORT, "greedy": True}, runs=(places["planted"],), steps=[1, 2, 4, 8, 80])
    without = measure({**SHORT, "rows": f"{tmp_path}/canaries.npy"}, runs=(places["plain"],), steps=[2, 4])
    notes = found[found["metric"] == "memorization.canary_loss"].set_index(["step", "bin"])["note"]
    assert notes[2, "0"] == "often: in batches 2, 3, 4, 5, 6, 7, 8, 9, … 79; seen 0 of 78 times before this step"
    assert notes[4, "0"].endswith("seen 2 of 78 times before this step")
    assert notes[2, "2"] == "once: in batch 3; seen 0 of 1 times before this step"
    assert notes[4, "2"] == "once: in batch 3; seen 1 of 1 times before this step"
    # Up to step 2 both runs are the same; from then on the planted rows make the difference.
    assert by_row(found, "canary_loss", 2).tolist() == by_row(without, "row_loss", 2).tolist()
    assert (by_row(found, "canary_loss", 4) < by_row(without, "row_loss", 4) - 0.01).all()
    assert (by_row(found, "canary_extractable", 80)[:2] == 1).all()  # shown at each step, they are memorized
    assert (by_row(found, "canary_score", 80)[:2] == 1).all()
    assert (by_row(found, "canary_matched_prefix", 80)[:2] == 8).all()
    assert by_row(found, "canary_extractable", 1).sum() == 0
    assert by_row(found, "exposure", 80)[:2].tolist() == [8, 8]
    exposure = found[found["metric"] == "memorization.exposure"]
    assert set(exposure["note"]) == {"at most 8 bits with 255 references"}
    # The chance level of a canary is the mean loss of the rows that its exposure is counted among, asked about by themselves.
    np.save(tmp_path / "like.npy", random_rows(255, 17, np.arange(32), 0, "memorization references", 1))
    like = measure({**SHORT, "rows": f"{tmp_path}/like.npy", "max_rows": 255}, runs=(places["planted"],), steps=[80])
    canary = found[(found["metric"] == "memorization.canary_loss") & (found["step"] == 80)].set_index("bin")
    assert canary["chance"]["2"] == pytest.approx(value(like, "memorization.loss"), rel=1e-6)
    assert canary["value"]["0"] < 0.1 < canary["chance"]["0"]
    assert set(exposure["units"]) == {"bits"}
    plain_notes = without[without["metric"] == "memorization.row_loss"]["note"]
    assert set(plain_notes) == {"never seen in this run"}


@pytest.mark.slow
def test_a_row_of_the_data_is_found_in_the_batch_that_reads_it(
    measure: Measure, trained: dict[str, Run], toy_data: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    data = np.array(pq.read_table(toy_data / "train-00000-of-00001.parquet")["input_ids"].to_pylist())
    run = trained["plain"]
    np.save(tmp_path / "rows.npy", np.stack([data[29], data[0], (data[5] + 1) % 64]))
    found = measure({**SHORT, "rows": f"{tmp_path}/rows.npy"}, runs=(str(run.path),), steps=[2, 4])
    notes = found[found["metric"] == "memorization.row_loss"].set_index(["step", "bin"])["note"]
    later = [batch for batch in range(80) if 29 in SeenRows(run).of_step(batch)]
    assert later[0] == 29 // 8
    assert notes[2, "0"] == f"in batches {', '.join(map(str, later))}; seen 0 of {len(later)} times before this step"
    assert notes[4, "0"].endswith(f"seen 1 of {len(later)} times before this step")
    assert "in batches 0, " in notes[2, "1"]
    assert notes[4, "2"] == "never seen in this run"


@pytest.mark.slow
def test_bands_hold_rows_first_seen_in_their_batches(measure: Measure, trained: dict[str, Run]) -> None:
    run = trained["planted"]
    entry = {**SHORT, "per_row": True, "rows_per_band": 20, "bands": 5}
    found = measure(entry, runs=(str(run.path),), steps=[0, 4, 80])
    seen, metrics = SeenRows(run), found.assign(metric=found["metric"].str.removeprefix("memorization."))
    first = {int(number): step for step in reversed(range(80)) for number in seen.of_step(step)}
    notes = metrics[metrics["metric"] == "band_loss"].set_index(["step", "bin"])["note"]
    assert sorted({label for _, label in notes.index}) == ["0", "1-2", "27-79", "3-8", "9-26"]
    assert [notes[0, "0"][:6], notes[4, "0"][:6], notes[4, "1-2"][:8]] == ["0 of 8", "8 of 8", "14 of 14"]
    for label, batches in (("0", [0]), ("1-2", [1, 2])):  # few enough for all of their rows to be drawn
        numbers = sorted(number for number, step in first.items() if step in batches)
        tokens_RS = seen.tokens(numbers)
        with torch.no_grad():
            logits_RTV = load_model(run, 4)(tokens_RS[:, :-1])
        expected_loss = torch.nn.functional.cross_entropy(logits_RTV.flatten(0, 1), tokens_RS[:, 1:].flatten())
        assert value(metrics, "band_loss", 4, bin=label) == pytest.approx(float(expected_loss), abs=1e-6)
    rows = metrics[(metrics["metric"] == "row_loss") & (metrics["step"] == 4)].set_index("bin")
    known = rows[[first.get(int(row), 99) < 4 for row in rows.index]]
    for row, note in known["note"].items():
        assert note.split()[2].strip(",;") == str(first[int(row)])
    loss, unseen = value(metrics, "loss", 4), value(metrics, "unseen_loss", 4)
    assert loss == pytest.approx(known["value"].mean(), abs=1e-12)
    assert value(metrics, "counterfactual", 4) == pytest.approx(unseen - loss, abs=1e-12)
    assert value(metrics, "counterfactual", 80) > 0.3  # five passes over 120 rows
    none = metrics[(metrics["metric"] == "loss") & (metrics["step"] == 0)]
    assert none["value"].isna().all()
    assert none["reason"].iloc[0] == "this checkpoint has seen none of these rows"


@pytest.mark.parametrize(
    ("step", "rows_per_band", "why"),
    [(4, 16, "training rows of later batches"), (80, 16, "held-out rows"), (80, 100, "held-out rows")],
)
def test_rows_that_were_not_seen_are_named(
    measure: Measure, trained: dict[str, Run], step: int, rows_per_band: int, why: str
) -> None:
    found = measure({**SHORT, "rows_per_band": rows_per_band}, runs=(str(trained["plain"].path),), steps=[step])
    assert found[found["metric"] == "memorization.unseen_loss"]["note"].iloc[0].startswith(why)
    late = found[(found["metric"] == "memorization.band_loss") & (found["bin"] == "23-42")]  # the second pass
    assert late["reason"].iloc[0] == "no row is seen for the first time in these batches"


@pytest.mark.parametrize("references", [1, 7, 255])
def test_exposure_by_its_closed_form(references: int) -> None:
    losses_R = torch.arange(references).double()
    best, worst = _exposure(-1.0, losses_R, "0"), _exposure(float(references), losses_R, "0")
    assert best.value == pytest.approx(math.log2(references + 1))
    assert worst.value == pytest.approx(0)
    assert _exposure(0.5, losses_R, "0").value == pytest.approx(math.log2((references + 1) / 2))
    each = [_exposure(rank - 0.5, losses_R, "0").value for rank in range(references + 1)]
    assert best.chance == pytest.approx(np.mean(np.array(each, dtype=float)))
    same = _exposure(3.0, torch.full((references,), 3.0).double(), "0").value
    assert same == pytest.approx(math.log2((references + 1) / (1 + references / 2)))  # the middle, not the best


def test_exposure_is_none_without_numbers_or_without_a_choice() -> None:
    assert "one token" in _exposure(1.0, None, "0").reason
    assert "not a number" in _exposure(math.nan, torch.ones(3), "0").reason
    assert "not a number" in _exposure(1.0, torch.tensor([1.0, math.nan]), "0").reason


@pytest.mark.parametrize(
    ("end", "bands", "edges"),
    [(1000, 8, [0, 1, 3, 7, 19, 52, 139, 373, 1000]), (6, 8, [0, 1, 2, 3, 4, 5, 6]), (80, 1, [0, 80]), (0, 8, [0]),
     (1, 3, [0, 1]), (100, 2, [0, 1, 100])],
)  # fmt: skip
def test_bands_are_log_spaced(end: int, bands: int, edges: list[int]) -> None:
    assert _edges(end, bands) == edges


def test_a_row_seen_at_a_step_is_not_yet_known_to_the_checkpoint_of_that_step() -> None:
    assert _when([7], 7) == "in batch 7; seen 0 of 1 times before this step"
    assert _when([7], 8) == "in batch 7; seen 1 of 1 times before this step"
    assert _when([], 8) == "never seen in this run"


def test_rows_that_are_too_short_have_a_loss_and_no_extraction(measure: Measure, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths = [40, 31, 32, 2]
    rows = [list(range(1, length + 1)) for length in lengths]
    pq.write_table(pa.table({"ids": rows}), tmp_path / "rows.parquet")
    found = measure({**PROBE, "rows": f"{tmp_path}/rows.parquet:ids", "greedy": True}, steps=[300])
    assert not np.isnan(by_row(found, "row_loss")).any()
    assert np.isnan(by_row(found, "row_extractable")).tolist() == [False, True, False, True]
    assert np.isnan(by_row(found, "row_score")).tolist() == [False, True, False, True]
    reasons = found[(found["metric"] == "memorization.row_extractable") & (found["bin"] == "1")]["reason"]
    assert reasons.iloc[0] == "a row has to have 32 tokens, for prompt and continuation"
    note = found[found["metric"] == "memorization.extractable"]["note"].iloc[0]
    assert note.startswith("2 rows left out of extraction")
    losses = by_row(found, "row_loss")
    weights = np.array(lengths) - 1
    assert value(found, "memorization.loss") == pytest.approx((losses * weights).sum() / weights.sum(), abs=1e-12)


def test_one_row_has_no_standard_error(measure: Measure, rows: dict[str, str]) -> None:
    found = measure({**PROBE, "rows": rows["canary"], "max_rows": 1}, steps=[300])
    assert found[found["metric"] == "memorization.loss"]["standard_error"].isna().all()


def test_what_cannot_be_asked_is_told_and_the_rest_goes_on(measure: Measure, rows: dict[str, str]) -> None:
    found = measure(PROBE, {**PROBE, "rows": "none.npy"}, {**PROBE, "rows": rows["canary"], "max_rows": 2}, steps=[0])
    reasons = found[found["value"].isna()]["reason"].tolist()
    assert any("trained by other code than Pico's; state the rows" in reason for reason in reasons)
    assert any("none.npy: cannot be read" in reason for reason in reasons)
    assert value(found, "memorization.loss") == pytest.approx(math.log(512), abs=0.2)


@pytest.mark.slow
def test_prompts_have_no_continuation(trained: dict[str, Run]) -> None:
    prompts = rows_of_tokens(torch.zeros(1, 5, dtype=torch.long), has_targets=False)
    with pytest.raises(PicoError, match="prompts have no continuation"):
        list(memorization.function(Subject(trained["plain"]), prompts))


def test_a_model_without_numbers_has_no_values(measure: Measure, trained: dict[str, Run], tmp_path: Path) -> None:
    from picolm.address import Address
    from picolm.train.state import weight_address

    run = trained["planted"]
    model = load_model(run, 4)
    weights = {weight_address(name): tensor.clone() for name, tensor in model.state_dict().items()}
    weights[Address("weights", "", next(iter(weights)).module)].fill_(float("nan"))
    broken = Run.create(tmp_path / "broken", dict(run.config), dict(run.environment))
    broken.commit(4, weights, meta={"step": 4}, weight_prefix=type(model).state_prefix)
    found = measure({**SHORT, "greedy": True, "references": 3}, runs=(str(broken.path),), steps=[4])
    assert len(found) > 40
    assert found["value"].isna().all()
    assert (found["reason"] != "").all()
