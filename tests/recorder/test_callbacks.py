"""The callbacks for the Trainer of transformers and for Lightning: the same weights, exact gradients, the same steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.recorder.loops import LENGTH, VOCABULARY, gpt
from torch import Tensor, nn

from picolm.address import Address
from picolm.errors import PicoError
from picolm.store import Run

RATE = 0.05
ROWS = torch.randint(VOCABULARY, (24, LENGTH + 1), generator=torch.Generator().manual_seed(2))


def exact(run: Run, steps: range, rate: float) -> None:
    """W_n - W_(n+1) = lr g_n, for all gradients of the steps."""
    for step in steps:
        gradients = run[step].select(kind="gradients")
        assert gradients
        for address in gradients:
            weight = Address("weights", "", address.module)
            before, after, gradient = (
                x.double() for x in (run[step][weight], run[step + 1][weight], run[step][address])
            )
            assert (before - after - rate * gradient).abs().max() <= 2**-23 * before.abs().max(), (step, address)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager", bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def trained(folder: Path, callbacks: list[Any], model: Any = None, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    model = model or llama()
    data = [{"input_ids": row, "labels": row} for row in ROWS[:, :LENGTH]]
    options = {
        "max_grad_norm": 0.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "sgd", "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **options | arguments),
        train_dataset=data,
        callbacks=callbacks,
    ).train()
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "arguments",
    [{}, {"max_grad_norm": 0.01}, {"optim": "adamw_torch"}, {"gradient_checkpointing": True}, {"bf16": True}],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_the_trainer_does_not_notice_that_it_is_recorded(arguments: dict[str, Any], tmp_path: Path) -> None:
    from picolm.recorder.trainer import RecorderCallback

    plain = trained(tmp_path / "plain", [], **arguments).state_dict()
    callback = RecorderCallback(tmp_path / "run", save_every_n_steps=1)
    recorded = trained(tmp_path / "recorded", [callback], **arguments).state_dict()
    assert all(torch.equal(plain[key], recorded[key]) for key in plain)
    run = Run.open(tmp_path / "run")
    assert run.steps == [0, 1, 2, 3, 4, 5]
    if "optim" not in arguments:
        exact(run, range(5), RATE)
    assert ("gradients" in run[0].about) == ("max_grad_norm" in arguments)
    losses = {entry["step"]: entry["train/loss"] for entry in run.read_metrics(("train/loss",))}
    assert set(losses) == set(range(5))


@pytest.mark.slow
def test_a_step_of_the_trainer_is_a_checkpoint_of_transformers(tmp_path: Path) -> None:
    """Weights, rows, activations, gradients and the loss agree with each other when the step is loaded by transformers."""
    from transformers import AutoModelForCausalLM

    from picolm.recorder.trainer import RecorderCallback

    trained(tmp_path / "out", [RecorderCallback(tmp_path / "run", save_every_n_steps=2)])
    run = Run.open(tmp_path / "run")
    step = run[2]
    model = AutoModelForCausalLM.from_pretrained(step.path, attn_implementation="eager")
    rows_BT = torch.tensor(step.rows("train")["input_ids"].to_pylist())
    assert len(rows_BT) == 4
    kept: list[Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, given, out: kept.append(out.detach()[:, -1])
    )
    loss = model(input_ids=rows_BT, labels=rows_BT).loss
    loss.backward()
    module = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(step[Address("activations", "train", module)], kept[0], rtol=1e-5, atol=1e-7)
    gradient = model.model.layers[1].mlp.down_proj.weight.grad
    torch.testing.assert_close(step[Address("gradients", "train", module)], gradient, rtol=1e-4, atol=1e-7)
    logged = {entry["step"]: entry["train/loss"] for entry in run.read_metrics(("train/loss",))}
    assert logged[2] == pytest.approx(loss.item(), abs=1e-4)  # the Trainer rounds it


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_recorded_of_a_trainer_can_be_asked(family: str, tmp_path: Path) -> None:
    """Held-out rows on a recorded run: the same tensors as plain transformers, and damage is not computed with."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from picolm.observe.subject import Subject
    from picolm.recorder.trainer import RecorderCallback

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    model = llama() if family == "llama" else AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, **sizes)
    )  # fmt: skip
    trained(tmp_path / "out", [RecorderCallback(tmp_path / "run", save_every_n_steps=2)], model=model)
    run = Run.open(tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(run[4].path, attn_implementation="eager")
    logits = Subject(run).at(run[4]).model(ROWS[:3, :LENGTH])
    assert torch.equal(logits, plain(ROWS[:3, :LENGTH]).logits)
    bare = {address: run[4][address] for address in run[4].select(kind="weights")}
    other = Run.create(tmp_path / "other", {}, {}).commit(6, bare, meta={"step": 6, "recorded": True})
    with pytest.raises(PicoError, match=r"step_6: holds no config.json"):
        _ = Subject(run, run[4]).at(other).model
    weights = run[2].path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PicoError, match=r"not the bytes that were written"):
        _ = Subject(run).at(run[2]).model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_no_number_is_cut_from_a_matrix_that_holds_more_than_one_thing(family: str, tmp_path: Path) -> None:
    """Queries, keys and values in one matrix are no parts with heads, and Conv1D is not cut as if it were outputs x inputs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from picolm.recorder import subject

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=VOCABULARY, **sizes))
    anatomy = subject.anatomy(model)
    assert (anatomy.layers, anatomy.heads) == (2, 4)
    assert "attention.query" not in anatomy.parts
    names = dict(model.named_modules())
    for role, part in anatomy.parts.items():
        inside = role not in ("embedding", "final_norm", "unembedding")
        assert (f"{anatomy.block.format(1)}.{part.module}" if inside else part.module) in names
    assert anatomy.parts["attention.output"].cut == (None if family == "gpt2" else "heads")
    assert len(subject.modules_to_capture(model, None, "all")) == 4  # attention.output and mlp.output of two blocks


def test_a_trainer_that_compiles_its_model_is_told_what_to_do(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from picolm.recorder.trainer import RecorderCallback

    arguments = TrainingArguments(output_dir=str(tmp_path), torch_compile=True, use_cpu=True, report_to=[])
    with pytest.raises(PicoError, match=r"learning_dynamics=\{'what': \['gradients'\]\}"):
        RecorderCallback(tmp_path / "run").on_train_begin(arguments, TrainerState(), TrainerControl())


def lightning(folder: Path, callbacks: list[Any], optimizer: Callable[..., Any], **options: Any) -> nn.Module:
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.gpt = gpt()

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            (rows,) = batch
            logits, _ = self.gpt(rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters(), lr=RATE)

    torch.manual_seed(6)
    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ROWS), batch_size=2)
    lightning.Trainer(
        default_root_dir=str(folder), callbacks=callbacks, accelerator="cpu", devices=1, logger=False, max_steps=5,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        accumulate_grad_batches=2, **options,
    ).fit(module, data)  # fmt: skip
    return module.gpt


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning warns of few workers and of a small data set
@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.01}, {"precision": "bf16-mixed"}], ids=["plain", "clip", "bf16"]
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_lightning_does_not_notice_that_it_is_recorded(optimizer: Any, options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    from picolm.recorder.lightning import RecorderCallback

    plain = lightning(tmp_path / "plain", [], optimizer, **options).state_dict()
    callback = RecorderCallback(tmp_path / "run", model="gpt", save_every_n_steps=1)
    recorded = lightning(tmp_path / "recorded", [callback], optimizer, **options).state_dict()
    assert all(torch.equal(plain[key], recorded[key]) for key in plain)
    run = Run.open(tmp_path / "run")
    assert run.steps == [0, 1, 2, 3, 4, 5]
    if optimizer is torch.optim.SGD and "gradient_clip_val" not in options:
        exact(run, range(5), RATE)
    rows_RS = torch.tensor(run[1].rows("train")["input_ids"].to_pylist())
    assert torch.equal(rows_RS, ROWS[4:8])
    losses = {entry["step"]: entry["train/loss"] for entry in run.read_metrics(("train/loss",))}
    assert set(losses) == set(range(5))
    model = gpt()
    model.load_state_dict({n: run[1][Address("weights", "", n.removesuffix(".weight"))] for n in model.state_dict()})
    _, second = model(rows_RS[2:, :-1], rows_RS[2:, 1:])
    assert second is not None
    assert losses[1] == pytest.approx(second.item(), rel=1e-2 if "precision" in options else 1e-5)
