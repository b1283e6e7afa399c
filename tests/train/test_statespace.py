"""The theorems of training hold for the state space model: repeatable bytes, gradients that are those of the update, capture
that changes nothing, and what is observed is what was captured.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from picolm.address import Address
from picolm.observe.command import observe_steps
from picolm.observe.config import Observe
from picolm.store import Run
from picolm.train import run_training
from picolm.train.job import Due
from picolm.train.optim import Named, decay_groups
from picolm.train.replay import replay

from .test_loop import digests, kill_at

Train = Callable[..., Run]


@pytest.fixture
def make_config(toy_data: Path, tmp_path: Path) -> Callable[..., Any]:
    """As that of the decoder, with another model."""
    from picolm.schema import load
    from picolm.train.config import schema_for

    file = tmp_path / "toy.yaml"
    file.write_text(f"""
data: {{dataset: {{name: {toy_data}}}, dataloader: {{batch_size: 8}}, tokenizer: {{vocab_size: 64}}}}
model: {{model_type: pico_statespace, d_model: 24, n_layers: 2, state_size: 6, head_dim: 8, n_groups: 2, vocab_size: 64,
  max_seq_len: 16}}
training:
  max_steps: 6
  fabric: {{accelerator: cpu, precision: 32-true}}
  optimization: {{lr: 0.01, lr_warmup_steps: 2, gradient_accumulation_steps: 2}}
checkpointing: {{run_name: toy, runs_dir: {tmp_path}/runs, save_every_n_steps: 2}}
monitoring: {{logging: {{log_every_n_steps: 2}}}}
""")
    return lambda *overrides: load(file, schema_for, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_same_bytes_and_can_be_made_again(
    train: Train, make_config: Any, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    options = (
        "training.max_steps=10",
        "checkpointing.save_every_n_steps=5",
        f"training.optimization.optimizer={optimizer}",
    )
    whole = train(*options, "checkpointing.run_name=whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        assert run_training(make_config(*options)) == 128 + signal.SIGTERM
    continued = train(*options)
    assert digests(continued, 10) == digests(whole, 10)
    verdict = replay(whole, [8], kinds=Due(weights=True, optimizer=True, dynamics=True), verify=True)
    assert verdict.identical
    assert [found.step for found in verdict.compared] == [5, 6, 8]
    moments = {address.kind for address in whole[10]} & {"exp_avg", "momentum_buffer"}
    assert moments == ({"exp_avg"} if optimizer == "adamw" else {"exp_avg", "momentum_buffer"})
    orthogonalized = {address.suffix for address in whole[10].select(kind="momentum_buffer")}
    assert orthogonalized <= {f"ssm.{part}_proj" for part in ("z", "x", "b", "c", "dt", "o")}


@pytest.mark.slow
def test_the_stored_gradient_is_the_one_that_trained_the_model(train: Train) -> None:
    run = train(
        "checkpointing.learning_dynamics.what=[gradients]", "training.optimization.optimizer=sgd",
        "training.optimization.grad_clip_norm=null", "training.optimization.weight_decay=0", "training.optimization.lr=1.0",
        "checkpointing.save_every_n_steps=1",
        "checkpointing.learning_dynamics.layer_suffixes=[ssm, z_proj, x_proj, b_proj, c_proj, dt_proj, o_proj,"
        " x_conv, b_conv, c_conv, norm, ssm_norm, output_norm, embedding_proj, de_embedding_proj]",
    )  # fmt: skip
    assert len(run[0].select(kind="gradients", split="train")) == len(run[0].select(kind="weights")) == 2 * 17 + 3
    for step in range(6):
        before, after = run[step], run[step + 1]
        for address in before.select(kind="gradients", split="train"):
            weights = Address("weights", "", address.module)
            implied = (before[weights].double() - after[weights].double()) / before.meta["learning_rate"]
            rounding = 2**-23 * before[weights].abs().max().double() / before.meta["learning_rate"]
            assert (implied - before[address].double()).abs().max() <= rounding, address
            assert before[address].abs().max() > 0


@pytest.mark.slow
def test_capture_changes_no_byte_and_observing_gives_the_same_bytes(train: Train) -> None:
    watched = train("checkpointing.run_name=watched", "checkpointing.learning_dynamics.positions=all")
    blind = train(
        "checkpointing.run_name=blind",
        "checkpointing.learning_dynamics.what=[]",
        "checkpointing.learning_dynamics.eval_data=null",
    )
    assert digests(watched, 6) == digests(blind, 6)
    assert {address.suffix for address in watched[6].select(kind="activations")} == {"ssm.x_proj", "ssm.o_proj"}
    asked = Observe(rows="val", positions="all", what=("activations", "gradients"))
    list(observe_steps(watched, [4, 6], asked, watched.path / ".." / "seen"))
    seen = Run.open(watched.path / ".." / "seen")
    for step in (4, 6):
        stored = watched[step].select(split="val")
        assert {address.kind for address in stored} == {"activations", "gradients"}
        assert set(seen[step]) == {address._replace(split="val") for address in stored}
        assert all(torch.equal(watched[step][address], seen[step][address]) for address in stored)


def test_what_sets_the_decay_of_states_is_never_decayed(make_config: Any) -> None:
    roles = ("matrix", "embedding", "norm", "dynamics")
    named = [Named(role, torch.nn.Parameter(torch.ones(1)), role) for role in roles]
    for everything, expected in ((False, {"matrix"}), (True, {"matrix", "embedding", "norm"})):
        config = make_config(f"training.optimization.decay_norms_and_embeddings={str(everything).lower()}")
        groups = decay_groups(named, config.training.optimization)
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        assert {each.role for each in named if id(each.parameter) in decayed} == expected
