"""lm-evaluation-harness adapter: run its tasks on a model in memory. Only this file imports `lm_eval`.

`Adapter` implements the three request types of the harness. Text is encoded as in training. Rows are cut only where the
harness prescribes it (from the left, to the context length), and padding changes no result.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from picolm.errors import PicoError
from picolm.models import Piece
from picolm.registry import did_you_mean, require_trust
from picolm.train.evaluate import Evaluation, Language, score

NEW_TOKENS = 256  # to generate if a task does not set a number


class Adapter(TemplateLM):
    """A Pico model with the interface of lm_eval. All processes send the same requests; each computes its share of the
    log-likelihoods, and every process gets all results.
    """

    def __init__(self, evaluation: Evaluation):
        super().__init__()
        self.evaluation, self.language = evaluation, Language.of(evaluation, "lm_eval")
        self.context = evaluation.model.config.max_seq_len
        self.most_scored = evaluation.model.row_length(self.context) - 1  # in one row; its first token is only read

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which precedes every text, as in training."""
        return self.language.end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        return self.language.tokens(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        """Return, for each request, ln p of the second token list given the first, and whether it is the greedy answer."""
        pieces = [self._piece(before, after) for _, before, after in requests]
        scores = score(pieces, self.evaluation).finite()
        return [(-nats, likeliest or not piece.scored) for nats, likeliest, piece in
                zip(scores.nats.tolist(), scores.likeliest.tolist(), pieces)]  # fmt: skip

    def _piece(self, before: list[int], after: list[int]) -> Piece:
        if len(after) > self.most_scored:
            raise PicoError(f"lm_eval: an answer of {len(after)} tokens; the context of this model is {self.context}")
        return Piece(torch.tensor([*before, *after][-(self.most_scored + 1) :]), len(after))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return ln p of each complete text. A long text is cut into rows that overlap by one token, as in training.

        The tokens of the last row are scored with a full context before them, as the harness prescribes.
        """
        windows = [list(self._windows(request.args[0])) for request in requests]
        nats_W = score([piece for pieces in windows for piece in pieces], self.evaluation).finite().nats
        return [-part.sum().item() for part in nats_W.split([len(pieces) for pieces in windows])]

    def _windows(self, text: str) -> list[Piece]:
        windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.most_scored, context_len=1)
        return [
            Piece(torch.tensor([*before, *after]), len(after)) for before, after in map(make_disjoint_window, windows)
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the greedily generated text for each request, up to the first of its stop texts.

        Raises PicoError if a task wants random sampling.
        """
        return [self._answer(*request.args) for request in requests]

    def _answer(self, prompt: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise PicoError("lm_eval: a task asks for random answers (do_sample); only greedy ones are given here")
        new = min(int(options.get("max_gen_toks", NEW_TOKENS)), self.context - 1)
        tokens = (self.tok_encode(prompt) or [self.eot_token_id])[-(self.context - new) :]
        prompt_1T = torch.tensor([tokens], device=self.evaluation.device)
        written = self.evaluation.model.generate(prompt_1T, new, eos=self.language.end)
        answer = self.language.tokenizer.decode(written[0, len(tokens) :].tolist())  # without the end-of-text token
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            answer = answer.partition(stop)[0] if stop else answer
        return answer


def run_tasks(evaluation: Evaluation) -> dict[str, float]:
    """Run the configured tasks. Returns all results as `lm_eval/TASK/METRIC`. Raises PicoError for an unknown task."""
    settings = evaluation.settings.lm_eval
    if settings.include_path is not None:
        require_trust(settings.include_path)  # `!function` in a task file runs code from the same folder
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs a warning for every default
    with contextlib.redirect_stderr(io.StringIO()):  # and shows a progress bar for every task
        found = simple_evaluate(
            Adapter(evaluation._replace(batch_size=settings.batch_size)),
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            task_manager=tasks_in(settings.include_path, tuple(settings.tasks)),
            bootstrap_iters=0,
            log_samples=False,
            random_seed=None,  # do not set the global seeds
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    assert found is not None
    return dict(sorted(_numbers(found, "lm_eval")))


def _numbers(found: dict[str, Any], family: str) -> Any:
    """Yield (name, value) for every number of every task and group; `acc,none` becomes `acc`, `acc,X` becomes `acc@X`."""
    for part in ("results", "groups"):
        for task, results in found.get(part, {}).items():
            for key, value in results.items():
                metric, _, filtered = key.partition(",")
                if isinstance(value, int | float) and filtered:
                    name = metric if filtered == "none" else f"{metric}@{filtered}"
                    yield f"{family}/{task}/{name}", float(value)


@lru_cache(maxsize=4)
def tasks_in(include_path: str | None, wanted: tuple[str, ...]) -> TaskManager:
    """Return a TaskManager that knows the tasks in `wanted`: from `include_path` alone if it has them all, which saves
    the seconds that indexing the tasks of the harness takes. Raises PicoError for an unknown task.
    """
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(wanted) <= set(own.all_tasks):
            return own
    known = TaskManager(include_path=include_path)
    unknown = [name for name in wanted if name not in known.all_tasks]
    if unknown:
        where = f", and no file in {include_path} describes it" if include_path is not None else ""
        near = did_you_mean(unknown[0], known.all_tasks)
        raise PicoError(f"evaluation.lm_eval.tasks: lm-evaluation-harness has no task {unknown[0]!r}{where}{near}")
    return known
