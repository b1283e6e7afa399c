"""The logit lens against reference values, transformers' own hidden states, and a model whose blocks add nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, expected, value
from tests.readers.conftest import make, save

from picolm.observe.passes import Pass
from picolm.probes.logit_lens import _read

__all__ = ["save"]
LENS = ({"probe_name": "logit_lens"},)
KEYS = {"kl": "kl_final_to_lens", "agreement": "top1_agreement", "loss": "loss", "entropy": "entropy"}


def of_places(found: pd.DataFrame, name: str, step: int) -> list[float]:
    """The values of a quantity before the first block and after each block."""
    after = found[(found["metric"] == f"logit_lens.{name}") & (found["step"] == step)].sort_values("layer")
    assert after["layer"].tolist() == list(range(len(after)))
    return [value(found, f"logit_lens.embedding_{name}", step), *after["value"]]


def depths(found: pd.DataFrame) -> list[float]:
    return found[found["metric"] == "logit_lens.depth_positions"].sort_values("bin")["value"].tolist()


@pytest.mark.parametrize(
    ("series", "step"), [("llama_s0", 0), ("llama_s0", 300), ("llama_s0", 500), ("neox_s0", 0), ("neox_s0", 500)]
)
def test_the_logit_lens_is_that_of_independent_code(
    measure: Measure, rows: dict[str, str], series: str, step: int
) -> None:
    found, known = measure(*LENS, runs=(series,), steps=[step], observe={"rows": rows["val"]}), expected(series, step)
    for name, key in KEYS.items():
        bound = 1 / 4032 if name == "agreement" else 1e-5
        assert of_places(found, name, step) == pytest.approx([each[key] for each in known["logit_lens"]], abs=bound)
    assert np.abs(np.subtract(depths(found), known["prediction_depth_histogram"])).max() <= 1
    assert value(found, "logit_lens.prediction_depth", step) == pytest.approx(
        known["prediction_depth_mean"], abs=2 / 4032
    )


def test_the_last_block_is_the_model_itself(measure: Measure, rows: dict[str, str]) -> None:
    found = measure(*LENS, {"probe_name": "calibration"}, steps=[300], observe={"rows": rows["val"]})
    last = {name: of_places(found, name, 300)[-1] for name in KEYS}
    assert (last["kl"], last["agreement"]) == (0.0, 1.0)
    assert last["entropy"] == pytest.approx(value(found, "calibration.entropy"), abs=1e-6)
    assert sum(depths(found)) == 64 * 63
    mean = sum(k * count for k, count in enumerate(depths(found))) / (64 * 63)
    assert value(found, "logit_lens.prediction_depth") == pytest.approx(mean, abs=1e-12)


class Stated:
    """A subject whose readout takes the residual stream for logits."""

    def readout(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return hidden_BTH


@pytest.mark.parametrize(
    ("likeliest", "depth"),
    [([0, 1, 2, 2], 2), ([2, 1, 2, 2], 2), ([2, 2, 2, 2], 0), ([2, 2, 0, 2], 3), ([1, 1, 1, 2], 3)],
)
def test_the_depth_is_the_first_block_of_those_that_agree_to_the_end(likeliest: list[int], depth: int) -> None:
    hidden = [torch.nn.functional.one_hot(torch.tensor([[token]]), 3).double() for token in likeliest]
    read: Any = _read(Stated(), Pass(torch.tensor([[0, 1]]), hidden[-1], hidden))  # type: ignore[arg-type]
    assert read["depth"].tolist() == [[depth]]
    assert read["agreement"][0, :, 0].tolist() == [float(token == 2) for token in likeliest]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma"])
def test_a_model_whose_blocks_add_nothing_predicts_the_same_everywhere(
    measure: Measure, tmp_path: Path, save: Callable[..., Path], family: str
) -> None:
    model = make(family)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("o_proj", "down_proj", ".dense.", "4h_to_h", "c_proj")):
            torch.nn.init.zeros_(parameter)
    place = save(model, "step7")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 7)))
    found = measure(*LENS, runs=(str(place),), observe={"rows": "rows.npy"})
    for name in KEYS:
        assert len(set(np.round(of_places(found, name, 7), 6))) == 1, name
    assert value(found, "logit_lens.embedding_agreement") == 1
    assert value(found, "logit_lens.prediction_depth") == 0


def test_it_is_what_transformers_hidden_states_give(measure: Measure, rows: dict[str, str]) -> None:
    """hidden_states of transformers are the residual stream before each block, and, normed, the last one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(REFERENCE / "checkpoints" / "llama_s0" / "step_500")
    tokens = torch.as_tensor(np.load(rows["val"]))
    with torch.no_grad():
        answer = model(tokens[:, :-1], output_hidden_states=True)
        first = model.lm_head(model.model.norm(answer.hidden_states[1])).double().log_softmax(-1)
    final = answer.logits.double().log_softmax(-1)
    kl = float(torch.nn.functional.kl_div(first, final, reduction="sum", log_target=True)) / (64 * 63)
    found = measure(*LENS, steps=[500], observe={"rows": rows["val"]})
    assert value(found, "logit_lens.kl", layer=0) == pytest.approx(kl, abs=1e-6)


def test_logits_that_are_capped_have_no_lens(
    measure: Measure, tmp_path: Path, save: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model = make("gemma2")
    model.config.final_logit_softcapping = 1.0
    place = save(model, "step7")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 7)))
    found = measure(*LENS, {"probe_name": "calibration"}, runs=(str(place),), observe={"rows": "rows.npy"})
    (reason,) = found[found["metric"] == "logit_lens"]["reason"]
    assert "not its unembedding of its final norm" in reason
    assert value(found, "calibration.ece") >= 0


@pytest.mark.parametrize(
    "rows",
    [[[5, 6, 7, 8]], [[5, 6], [1, 2, 3, 4, 5], [9, 8, 7]], [[3, 4]]],
    ids=["one row", "several lengths", "one position"],
)
def test_few_rows_of_any_length(rows: list[list[int]], measure: Measure, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"ids": rows}), tmp_path / "rows.parquet")
    found = measure(*LENS, steps=[300], observe={"rows": "rows.parquet:ids"})
    assert sum(depths(found)) == sum(len(row) - 1 for row in rows)
    errors = found[found["metric"] == "logit_lens.kl"]["standard_error"]
    assert errors.isna().all() == (len(rows) == 1)


def test_of_weights_that_are_no_numbers_nothing_is_said(
    measure: Measure, tmp_path: Path, save: Callable[..., Path]
) -> None:
    model = make("llama")
    torch.nn.init.constant_(model.model.layers[0].self_attn.o_proj.weight, torch.nan)
    place = save(model, "step7")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 7)))
    found = measure(*LENS, runs=(str(place),), observe={"rows": "rows.npy"})
    of_model = found[~found["metric"].isin(["logit_lens.embedding_loss", "logit_lens.embedding_entropy"])]
    assert of_model["value"].isna().all()
    assert (of_model["reason"] == "it is not a number here").all()
    assert value(found, "logit_lens.embedding_loss") > 0
