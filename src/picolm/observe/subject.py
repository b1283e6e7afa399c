"""A subject: the model of one checkpoint, ready to be asked on given rows.

Everything is computed on the CPU in float32 (float64 where the weights are stored so), with the number of threads that the run
was trained with, so that the same question has the same answer to the last bit.

Legend: B rows of a forward pass, T positions, R rows, P positions that are read, N positions of all rows, H width of a module's
output, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from picolm.address import Address
from picolm.capture.taps import Taps, gradients
from picolm.errors import PicoError
from picolm.models import Anatomy, Likelihood, Piece
from picolm.observe import passes
from picolm.observe.architecture import Architecture, architecture_of
from picolm.observe.optimizer import has_moments
from picolm.observe.passes import Ask, Pass, inputs_of, residual_stream
from picolm.observe.rows import Rows
from picolm.readers.series import Series
from picolm.store import Checkpoint, Run
from picolm.train import noise
from picolm.train.evaluate import scored

BOUND_DRAWS = 8  # of a bound, for each row
_THREADS = torch.get_num_threads()  # before an analysis takes one for each of its layers
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


class OfRun(Protocol):
    """What computes for a run."""

    run: Run


Asked = TypeVar("Asked", bound=OfRun)


def with_threads(question: Callable[Concatenate[Asked, Given], Answer]) -> Callable[Concatenate[Asked, Given], Answer]:
    """Ask with the number of threads of the run."""

    @wraps(question)
    def ask(self: Asked, *args: Given.args, **options: Given.kwargs) -> Answer:
        before = torch.get_num_threads()
        torch.set_num_threads(threads_of(self.run))
        try:
            return question(self, *args, **options)
        finally:
            torch.set_num_threads(before)

    return ask


class Subject:
    """The model of a run with the weights of one step at a time; `at` changes the step."""

    def __init__(self, run: Run, checkpoint: Checkpoint | None = None):
        """Find the architecture of a run. No weight is read before the first question.

        checkpoint: its newest one with weights by default. Raises PicoError for a model that cannot be run, and for weights that
        are not those that the configuration describes.
        """
        self.run, self.checkpoint = run, checkpoint if checkpoint is not None else _newest(run)
        self.architecture: Architecture = architecture_of(run, self.checkpoint)
        self._model: Any = None
        self._filled: int | None = None

    def at(self, checkpoint: Checkpoint) -> "Subject":
        """Return this subject with the weights of another step of its run."""
        self.checkpoint = checkpoint
        return self

    @property
    def anatomy(self) -> Anatomy:
        """What the parts of the model are called."""
        return self.architecture.anatomy

    @property
    def likelihood(self) -> Likelihood:
        """Whether the likelihood of a text is exact, a bound, or cannot be computed (none)."""
        found: Likelihood = self.architecture.outline.likelihood
        return found

    @property
    def model(self) -> Any:
        """The model with the weights of the step, in evaluation mode."""
        if self._model is None:
            self._model = self.architecture.build()
        if self._filled != self.checkpoint.step:
            self._filled = None
            self.architecture.fill(self._model, self.checkpoint)
            self._filled = self.checkpoint.step
        return self._model

    def fresh(self) -> Any:
        """Return a model of its own with the weights of the step, which the caller may change."""
        model = self.architecture.build()
        self.architecture.fill(model, self.checkpoint)
        return model

    def require(self, *needs: str) -> None:
        """Raise PicoError unless the model gives all of these: `logits` (of the next token at each position), `patterns` (the
        weights of its attention), `mixing` (how the heads of a state space model mix values), `hidden` (its residual stream),
        `mlp` (the hidden activations of its MLPs), `readout` (how logits are read from its residual stream), `optimizer` (the
        second moments of Adam, stored with the step).
        """
        lacking = {
            "logits": self.likelihood != "exact" or self.architecture.outline.row_length(0) != 1,
            "patterns": not hasattr(self.architecture.outline, "with_patterns"),
            "mixing": not hasattr(self.architecture.outline, "with_mixing"),
            "hidden": not self._blocks(self.architecture.outline),
            "mlp": not self._mlp_outputs(self.architecture.outline),
            "readout": not {"final_norm", "unembedding"} <= set(self.anatomy.parts),
            "optimizer": "optimizer" in needs and not has_moments(self.checkpoint),
        }
        for need in needs:
            if lacking[need]:
                why = ": it predicts hidden tokens from both sides" if self.likelihood == "bound" else ""
                raise PicoError(f"the model of {self.run.name} {_LACKING[need]}{why * (need == 'logits')}")

    @with_threads
    def forward(self, rows: Rows, batch: Sequence[int], needs: Collection[str] = ()) -> Pass:
        """Run the model on some rows of one length; see `Pass`. No gradients are computed."""
        self.require("logits", *(need for need in needs))
        device = next(self.model.parameters(), torch.empty(0)).device
        tokens_BS, patterns, mixing = self._tokens(rows, batch).to(device), list[Tensor](), list[Any]()
        tokens_BT = tokens_BS[:, : rows.inputs(batch[0])]
        blocks = self._blocks(self.model) if "hidden" in needs else []
        outputs = self._mlp_outputs(self.model) if "mlp" in needs else []
        with torch.no_grad(), residual_stream(blocks) as hidden, inputs_of(outputs) as mlp:
            if "patterns" in needs:
                logits_BTV, patterns = self.model.with_patterns(tokens_BT)
            elif "mixing" in needs:
                logits_BTV, mixing = self.model.with_mixing(tokens_BT)
            else:
                logits_BTV = self.model(tokens_BT)
        return Pass(tokens_BS, logits_BTV, hidden, patterns, mlp, mixing)

    @with_threads
    @torch.no_grad()
    def answer(self, asks: Sequence[Ask], batch_size: int = 8) -> list[passes.Answer]:
        """Return what is read of each row, for each ask; asks of the same rows share their forward passes."""
        return passes.answer(self, asks, batch_size)

    def readout(self, hidden_BTH: Tensor) -> Tensor:
        """Return the logits that the model would read from a residual stream: its unembedding of its final norm, [B, T, V].

        No gradients are computed.
        """
        self.require("readout")
        body = self.architecture.body(self.model)
        return self.architecture.unembedding(self.model)(
            body.get_submodule(self.anatomy.module("final_norm"))(hidden_BTH)
        )

    def _blocks(self, model: Any) -> list[nn.Module]:
        """Return the blocks of a model in order, none where their names are not known."""
        return self._of_each_block(model, "")

    def _mlp_outputs(self, model: Any) -> list[nn.Module]:
        """Return the module of each block that reads the hidden activations of its MLP, none where its name is not known."""
        part = self.anatomy.parts.get("mlp.output")
        return [] if part is None else self._of_each_block(model, f".{part.module}")

    def _of_each_block(self, model: Any, suffix: str) -> list[nn.Module]:
        """Return the module of each block with a name that ends so, none unless all blocks have it."""
        modules, layers = dict(self.architecture.body(model).named_modules()), self.anatomy.layers or 0
        names = [self.anatomy.block.format(layer) + suffix for layer in range(layers)]
        return [modules[name] for name in names] if all(name in modules for name in names) else []

    @with_threads
    def tensors(self, rows: Rows, wanted: Sequence[Address], batch_size: int = 8) -> dict[Address, Tensor]:
        """Return activations and gradients by address, on the CPU, from one pass over the rows.

        activations: [R, H] for one position of each row, [R, P, H] for several, [N, H] over all rows where their numbers differ.
        gradients: of the mean loss of all rows, shaped as the weights are. Activations of a model that hides tokens are of a pass
        in which it does not. Raises PicoError for gradients of prompts, which predict nothing, and for a module that did not run
        once or returns no tensor.
        """
        of = {address.module: self.architecture.holder(address.module) for address in wanted}
        captured = [address.module for address in wanted if address.kind == "activations"]
        backward = any(address.kind == "gradients" for address in wanted)
        if backward and not rows.has_targets:
            raise PicoError("prompts have no tokens to predict, so there are no gradients; give a file of texts")
        body = dict(self.architecture.body(self.model).named_modules())
        kept: dict[str, list[Tensor]] = {module: [] for module in captured}
        total, predicted = sum(map(rows.inputs, range(len(rows.tokens)))), 0
        self.model.zero_grad()
        with (
            torch.set_grad_enabled(backward),
            _outputs({name: body[name] for name in {of[m][0] for m in captured}}) as outputs,
        ):
            for batch in rows.batches(batch_size):
                outputs.clear()
                if backward or not hasattr(self.model, "without_noise"):
                    loss = self._forward(rows, batch)
                if backward:
                    (loss.nats * (1.0 / total)).backward()
                    predicted += loss.tokens
                if hasattr(self.model, "without_noise"):
                    outputs.clear()
                    with torch.no_grad():
                        self._read(rows, batch)
                for module in captured:
                    output_BTH = self.architecture.part(module, _one(outputs, of[module][0], len(batch)))
                    kept[module] += [output_BTH[place, rows.positions[row]] for place, row in enumerate(batch)]
        found = {a: _stacked(kept[a.module]) for a in wanted if a.kind == "activations"}
        if backward:
            if predicted not in (total, 0):
                torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], total / predicted)
            found |= self._gradients(body, rows.split, [a.module for a in wanted if a.kind == "gradients"])
        return found

    def _forward(self, rows: Rows, batch: Sequence[int]) -> Any:
        """Run the model on some rows, as training does. Returns their loss; of rows that predict nothing, their logits."""
        tokens_BS = self._tokens(rows, batch)
        if not rows.has_targets:
            return self.model(tokens_BS)
        drawn = noise.of_split(self.architecture.noise_seed, rows.split, batch)
        torch.manual_seed(drawn.seeds[0])  # for models that use the global generator
        return self.model.loss(tokens_BS, drawn)

    def _read(self, rows: Rows, batch: Sequence[int]) -> None:
        """Run a model that hides tokens on some rows, in which as many are hidden as the rows say (none by default)."""
        tokens_BS = self._tokens(rows, batch)
        if rows.hidden:
            self.model(self._hide(tokens_BS[:, : rows.inputs(batch[0])], rows, batch))
        else:
            (self.model.without_noise if rows.has_targets else self.model)(tokens_BS)

    def _hide(self, tokens_BT: Tensor, rows: Rows, batch: Sequence[int]) -> Tensor:
        """Return what the model reads of some rows. The hidden tokens depend on the row alone, not on the run or the step."""
        if not rows.hidden:
            return tokens_BT
        hidden_BT: Tensor = self.model.hide(tokens_BT, rows.hidden / 100, noise.of_split(0, "hidden", batch))
        return hidden_BT

    def _gradients(self, body: Mapping[str, nn.Module], split: str, names: Sequence[str]) -> dict[Address, Tensor]:
        """Return the gradients of parameters. names: of their modules, or those with the parameter's own name."""
        found = {}
        for name in names:
            module, parameter = self.architecture.parameter(name)
            holder = self.architecture.holder(module)[0]
            whole = gradients(Taps(modules={holder: body[holder]}), split)
            address = Address("gradients", split, holder if parameter == "weight" else f"{holder}.{parameter}")
            found[Address("gradients", split, name)] = self.architecture.gradient_part(module, whole[address])
        self.model.zero_grad()
        return found

    @with_threads
    def patterns(self, rows: Rows, layers: Sequence[int] | None = None, batch_size: int = 8) -> dict[Address, Tensor]:
        """Return the attention patterns of some layers (default: all), [R, heads, P, T]: what share each of these
        positions takes from each position. Raises PicoError for rows of several lengths, and for a model that does not give them.
        """
        self.require("patterns")
        if len({len(tokens) for tokens in rows.tokens}) > 1:
            raise PicoError("patterns of rows of several lengths are no tensor; give rows of one length")
        found: dict[int, list[Tensor]] = {}
        for batch, tokens_BT in self._inputs(rows, batch_size):
            for layer, pattern_BNTT in enumerate(self.model.with_patterns(tokens_BT)[1]):
                if layers is None or layer in layers:
                    chosen = [pattern_BNTT[place][:, rows.positions[row]] for place, row in enumerate(batch)]
                    found.setdefault(layer, []).extend(chosen)
        block, attention = self.anatomy.block, self.anatomy.module("attention.output").rpartition(".")[0]
        return {
            Address("patterns", rows.split, f"{block.format(layer)}.{attention}"): torch.stack(of_rows)
            for layer, of_rows in found.items()
        }

    @with_threads
    def logits(self, rows: Rows, batch_size: int = 8) -> Tensor:
        """Return the logits at the positions of each row, [R, V], [R, P, V] or [N, V], see `tensors`.

        Raises PicoError for a model that predicts hidden tokens, and rows in which none is hidden.
        """
        if hasattr(self.architecture.outline, "hide") and not rows.hidden:
            raise PicoError(
                f"the model of {self.run.name} predicts hidden tokens at their own positions, and none is hidden: its logits "
                "mean nothing there; say with `hidden` what percentage to hide"
            )
        found: list[Tensor] = []
        for batch, tokens_BT in self._inputs(rows, batch_size):
            logits_BTV = self.model(tokens_BT)
            found += [logits_BTV[place, rows.positions[row]] for place, row in enumerate(batch)]
        return _stacked(found)

    @with_threads
    def scores(self, rows: Rows, batch_size: int = 8, draws: int = BOUND_DRAWS) -> list[Tensor]:
        """Return the nats of each predicted token of each row.

        draws: for a model whose likelihood is a bound, the number of draws of it, whose terms are returned; 0: exact nats, along
        an order of the model's choice, which takes a forward pass for each token.

        Raises PicoError for prompts, which predict nothing, and for a model without a likelihood, or without an exact one.
        """
        if not rows.has_targets or self.likelihood == "none":
            why = "prompts have no tokens to predict" if self.likelihood != "none" else "the model has no likelihood"
            raise PicoError(f"{why}, so there are no scores")
        read, found = self.model.row_length(0), list[Tensor]()
        for batch in rows.batches(batch_size):
            pieces = [Piece(tokens, len(tokens) - read) for tokens in self._tokens(rows, batch)]
            found += scored(self.model, pieces, draws, noise.of_scores(batch)).nats
        return found

    def _inputs(self, rows: Rows, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the rows of each forward pass and what the model reads of them. No gradients are computed meanwhile."""
        with torch.no_grad():
            for batch in rows.batches(batch_size):
                tokens_BT = self._tokens(rows, batch)[:, : rows.inputs(batch[0])]
                yield batch, self._hide(tokens_BT, rows, batch)

    def _tokens(self, rows: Rows, batch: Sequence[int]) -> Tensor:
        tokens_BS = torch.stack([rows.tokens[row] for row in batch])
        self.check_vocabulary(tokens_BS)
        return tokens_BS

    def check_vocabulary(self, tokens: Tensor) -> None:
        """Raise PicoError for a token id that the model does not know."""
        size = self.architecture.outline.config.vocab_size
        wrong = tokens[(tokens >= size) | (tokens < 0)]
        if len(wrong):
            raise PicoError(f"a row holds token id {int(wrong[0])}; the vocabulary of {self.run.name} has {size}")


_LACKING = {
    "logits": "gives no probabilities of the next token at each position",
    "patterns": "does not give the weights of an attention",
    "mixing": "has no states that decay: it is no state space model",
    "hidden": "has no blocks whose names are known, so its residual stream cannot be read",
    "mlp": "has no MLPs whose parts are known, so their hidden activations cannot be read",
    "readout": "has no final norm and unembedding whose names are known, so no logits can be read from its residual stream",
    "optimizer": "was saved without the second moments of Adam at this step",
}


def threads_of(run: Run) -> int:
    """Return the number of threads to compute with: as many as the run was trained with, since sums are split by threads."""
    stated = None if isinstance(run, Series) else (run.environment.get("hardware") or {}).get("threads")
    return stated if isinstance(stated, int) and stated > 0 else _THREADS


def _newest(run: Run) -> Checkpoint:
    for step in reversed(run.steps):
        if (checkpoint := run[step]).select(kind="weights"):
            return checkpoint
    raise PicoError(f"{run.path}: no step has weights, so there is no model to run")


@contextmanager
def _outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """Yield a dict to which each forward pass inside of the block adds what the modules return."""
    found: dict[str, list[Any]] = {}

    def hook_of(name: str) -> Any:
        return lambda module, arguments, output: found.setdefault(name, []).append(output)

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _one(outputs: Mapping[str, list[Any]], name: str, rows: int) -> Tensor:
    """Return the tensor that a module returned: of several, as attention returns them, the first. What it returns once for all
    rows, as embeddings of positions do, is that of each row.
    """
    ran = outputs.get(name, [])
    if len(ran) != 1:
        raise PicoError(
            f"{name} ran {len(ran)} times in one pass, so its activations cannot be observed (a loss may read the weight of the "
            "last layer directly: ask for logits)"
        )
    output = ran[0][0] if isinstance(ran[0], tuple) and ran[0] else ran[0]
    if not isinstance(output, Tensor) or output.ndim < 3 or len(output) not in (1, rows):
        raise PicoError(f"{name} returns no tensor [rows, positions, width]: it cannot be observed")
    return output.detach().expand(rows, *output.shape[1:])


def _stacked(of_rows: Sequence[Tensor]) -> Tensor:
    """Return [R, H] of R tensors [1, H], [R, P, H] of R tensors [P, H], [N, H] of tensors of several lengths."""
    if len({len(of_row) for of_row in of_rows}) > 1:
        return torch.cat(list(of_rows))
    return torch.cat(list(of_rows)) if len(of_rows[0]) == 1 else torch.stack(list(of_rows))
