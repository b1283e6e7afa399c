"""Compare the model of a checkpoint with the Llama export of the same step, through every door of transformers.

A script: `python -I beside_llama.py CHECKPOINT EXPORT`, for an environment where picolm cannot be imported. It prints a JSON
object of the largest difference of each comparison, and fails where one is larger than rounding.
"""

import contextlib
import copy
import importlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset

ROUNDING = 2e-4  # of float32, in logits of size 30
CHECKS: list[Callable[["Two"], Iterator[tuple[Any, Any]]]] = []
Check = Callable[["Two"], Iterator[tuple[Any, Any]]]


class Two:
    """Both models, what they are asked, and the name of the argument that holds a cache in this version of transformers."""

    def __init__(self, checkpoint: str, export: str):
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.checkpoint = checkpoint
        self.ours = load(checkpoint, trust_remote_code=True).eval()
        self.llama = load(export, attn_implementation="eager").eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
        self.tokens = torch.tensor([self.tokenizer("The lazy fox doesn't jump over the dog again")["input_ids"]])
        self.rows = torch.cat([self.tokens, self.tokens.flip(1), self.tokens.roll(3, 1)])
        fields = transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__
        self.cache_name = "cache" if "cache" in fields else "past_key_values"

    def each(self, call: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Return what `call` returns of ours and of the Llama, from equal random numbers."""
        return tuple(call(model) for model in self._seeded())  # type: ignore[return-value]

    def fresh(self) -> tuple[Any, Any]:
        """Return copies that can be trained."""
        return copy.deepcopy(self.ours).train(), copy.deepcopy(self.llama).train()

    def _seeded(self) -> Iterator[Any]:
        for model in (self.ours, self.llama):
            torch.manual_seed(5)
            yield model


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def continued(two: Two, prompt: Tensor, **options: Any) -> tuple[Any, Any]:
    """Return both continuations, which must hold more than a repeated token."""
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1} | options
    ours, llama = two.each(lambda model: model.generate(prompt, **options))
    assert len(llama[0, prompt.shape[1] :].unique()) > 4, "a continuation without variety proves little"
    return ours, llama


@check
def logits(two: Two) -> Iterator[tuple[Any, Any]]:
    yield two.each(lambda model: model(two.rows).logits)
    yield two.each(lambda model: model(two.rows, logits_to_keep=2).logits)
    yield two.each(lambda model: model(two.rows, logits_to_keep=torch.tensor([1, 4])).logits)


@check
def greedy(two: Two) -> Iterator[tuple[Any, Any]]:
    yield continued(two, two.rows)
    yield continued(two, two.rows, use_cache=False)


@check
def sampled(two: Two) -> Iterator[tuple[Any, Any]]:
    yield continued(two, two.rows, do_sample=True, temperature=0.9, top_k=20, top_p=0.95)


@check
def beam(two: Two) -> Iterator[tuple[Any, Any]]:
    yield continued(two, two.rows, num_beams=4, num_return_sequences=2)


@check
def assisted(two: Two) -> Iterator[tuple[Any, Any]]:
    assistant = copy.deepcopy(two.ours)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    yield continued(two, two.tokens, assistant_model=assistant)
    yield continued(two, two.tokens, prompt_lookup_num_tokens=3)


@check
def padded_left(two: Two) -> Iterator[tuple[Any, Any]]:
    prompt, mask = two.rows.clone(), torch.ones_like(two.rows)
    prompt[1, :4], mask[1, :4] = 0, 0
    prompt[2, :1], mask[2, :1] = 0, 0
    yield continued(two, prompt, attention_mask=mask)
    yield continued(two, prompt, attention_mask=mask, use_cache=False)
    alone = two.ours.generate(two.rows[1:2, 4:], max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=-1)
    yield continued(two, prompt, attention_mask=mask)[0][1, 4:], alone[0]


@check
def masks(two: Two) -> Iterator[tuple[Any, Any]]:
    """Two and four dimensions, boolean and added, on either side."""
    length = two.rows.shape[1]
    right = torch.ones_like(two.rows)
    right[1, 6:] = 0
    yield two.each(lambda model: model(two.rows, attention_mask=right).logits[:, :6])
    left = right.flip(1)
    yield two.each(lambda model: model(two.rows, attention_mask=left.bool()).logits[:, length - 6 :])
    window = (torch.ones(length, length).tril() - torch.ones(length, length).tril(-4))[None, None].expand(3, 1, -1, -1)
    added = torch.zeros_like(window).masked_fill(window == 0, torch.finfo(torch.float32).min)
    yield two.each(lambda model: model(two.rows, attention_mask=added).logits)
    yield two.ours(two.rows, attention_mask=window.bool()).logits, two.llama(two.rows, attention_mask=added).logits


@check
def position_ids(two: Two) -> Iterator[tuple[Any, Any]]:
    places = torch.arange(two.rows.shape[1])[None]
    for positions in (places + 7, places.flip(1), 2 * places, (places + torch.tensor([[0], [3], [9]]))):
        for use_cache in (True, False):
            asked = {"position_ids": positions, "use_cache": use_cache}
            yield two.each(lambda model, asked=asked: model(two.rows, **asked).logits)


@check
def packed(two: Two) -> Iterator[tuple[Any, Any]]:
    """Documents in one row see nothing of each other."""
    parts = [two.tokens[:, :5], two.tokens[:, 2:10], two.tokens[:, 1:4]]
    row = torch.cat(parts, 1)
    places = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    yield two.each(lambda model: model(row, position_ids=places, use_cache=False).logits)
    yield two.each(lambda model: model(row, position_ids=places).logits)
    alone = torch.cat([two.ours(part).logits for part in parts], 1)
    yield two.ours(row, position_ids=places, use_cache=False).logits, alone
    several = row.expand(2, -1)
    yield two.each(lambda model: model(several, position_ids=places, use_cache=False).logits)


@check
def hidden_states(two: Two) -> Iterator[tuple[Any, Any]]:
    ours, llama = two.each(lambda model: model(two.rows, output_hidden_states=True).hidden_states)
    assert len(ours) == len(llama) == two.ours.config.num_hidden_layers + 1
    yield from zip(ours, llama)


@check
def attentions(two: Two) -> Iterator[tuple[Any, Any]]:
    ours, llama = two.each(lambda model: model(two.rows, output_attentions=True).attentions)
    assert len(ours) == len(llama) == two.ours.config.num_hidden_layers
    yield from zip(ours, llama)
    mask = torch.ones_like(two.rows)
    mask[:, :3] = 0
    ours, llama = two.each(lambda model: model(two.rows, attention_mask=mask, output_attentions=True).attentions)
    yield ours[-1][:, :, 3:], llama[-1][:, :, 3:]


@check
def both_in_generate(two: Two) -> Iterator[tuple[Any, Any]]:
    options = {"output_hidden_states": True, "output_attentions": True, "output_logits": True, "max_new_tokens": 4}
    ours, llama = two.each(
        lambda model: model.generate(
            two.rows, do_sample=False, pad_token_id=0, eos_token_id=-1, return_dict_in_generate=True, **options
        )
    )
    for name in ("attentions", "hidden_states"):
        for of_step, of_llama in zip(getattr(ours, name), getattr(llama, name)):
            yield from zip(of_step, of_llama)
    yield from zip(ours.logits, llama.logits)


@check
def tuples(two: Two) -> Iterator[tuple[Any, Any]]:
    ours, llama = two.each(
        lambda model: model(two.rows, labels=two.rows, use_cache=False, output_hidden_states=True, return_dict=False)
    )
    assert isinstance(ours, tuple)
    assert len(ours) == len(llama) == 3
    yield ours[0], llama[0]
    yield ours[1], llama[1]


@check
def dynamic_cache(two: Two) -> Iterator[tuple[Any, Any]]:
    """In pieces, under the name of this version, the older name, and without one."""
    for name in (two.cache_name, "past_key_values"):
        cache = transformers.DynamicCache()
        pieces = [
            two.ours(piece, **{name: cache}).logits for piece in two.rows.split([4, 1, 3, two.rows.shape[1] - 8], 1)
        ]
        yield torch.cat(pieces, 1), two.llama(two.rows).logits
    first = two.ours(two.rows[:, :5])
    yield two.ours(two.rows[:, 5:], past_key_values=first[two.cache_name]).logits, two.llama(two.rows).logits[:, 5:]


@check
def static_cache(two: Two) -> Iterator[tuple[Any, Any]]:
    yield continued(two, two.rows, cache_implementation="static", disable_compile=True)
    prompt, mask = two.rows.clone(), torch.ones_like(two.rows)
    prompt[1, :4], mask[1, :4] = 0, 0
    yield continued(two, prompt, attention_mask=mask, cache_implementation="static", disable_compile=True)

    def in_pieces(model: Any) -> Any:
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        pieces = two.rows.split([4, 1, two.rows.shape[1] - 5], 1)
        outputs = []
        seen = 0
        for piece in pieces:
            places = torch.arange(seen, seen + piece.shape[1])
            older = {"cache_position": places} if two.cache_name == "past_key_values" else {}
            outputs.append(model(piece, **{two.cache_name: cache}, output_attentions=True, **older))
            seen += piece.shape[1]
        return torch.cat([output.logits for output in outputs], 1), outputs[-1].attentions[-1]

    ours, llama = two.each(in_pieces)
    yield from zip(ours, llama)


@check
def inputs_embeds(two: Two) -> Iterator[tuple[Any, Any]]:
    embeds = two.ours.get_input_embeddings()(two.rows).detach()
    yield two.each(lambda model: model(inputs_embeds=embeds).logits)
    yield two.each(
        lambda model: model.generate(
            inputs_embeds=embeds, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
    )


@check
def losses(two: Two) -> Iterator[tuple[Any, Any]]:
    labels = two.rows.clone()
    labels[:, 2:4] = -100
    yield two.each(lambda model: model(two.rows, labels=labels).loss)
    yield two.each(lambda model: model(two.rows, labels=labels, num_items_in_batch=17).loss)
    yield two.each(lambda model: model(two.rows, labels=labels, num_items_in_batch=torch.tensor(17)).loss)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    yield two.each(lambda model: model(two.rows, labels=labels, shift_labels=shifted.roll(1, 1)).loss)


@check
def gradient_checkpointing(two: Two) -> Iterator[tuple[Any, Any]]:
    for reentrant in (False, True):
        ours, llama = two.fresh()
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert ours.is_gradient_checkpointing
        if reentrant:
            ours.enable_input_require_grads()
        entered: list[Any] = []
        ours.pico_decoder.layers[0].swiglu.register_forward_pre_hook(
            lambda module, inputs, seen=entered: seen.append(0)
        )
        for model in (ours, llama):
            model(two.rows, labels=two.rows).loss.backward()
        assert len(entered) == 2, "the backward pass computes each block again"
        yield ours.get_input_embeddings().weight.grad, llama.get_input_embeddings().weight.grad
        yield (
            ours.get_output_embeddings().weight.grad,
            llama.get_output_embeddings().weight.grad,
        )


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of two lengths of labels, so that micro-batches hold different numbers of predictions."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens.roll(index)
        labels = tokens.clone()
        labels[: index % 5] = -100
        return {"input_ids": tokens, "labels": labels}


@check
def trainer(two: Two) -> Iterator[tuple[Any, Any]]:
    """The same updates with 1 and 4 micro-batches, and with gradient checkpointing."""
    trained = {}
    for accumulation, checkpointing in ((1, False), (4, False), (4, True)):
        for name, model in zip(("ours", "llama"), two.fresh()):
            with tempfile.TemporaryDirectory() as folder:
                arguments = transformers.TrainingArguments(
                    folder, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
                    max_steps=2, learning_rate=0.01, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
                    logging_strategy="no", save_strategy="no", report_to=[], seed=1, use_cpu=True, disable_tqdm=True,
                    gradient_checkpointing=checkpointing,
                )  # fmt: skip
                work = transformers.Trainer(model, arguments, train_dataset=Rows(two.tokens[0]))
                loss = work.train().training_loss
                evaluated = work.evaluate(Rows(two.tokens[0]))["eval_loss"]
            trained[name, accumulation, checkpointing] = (
                torch.tensor([loss, evaluated]),
                model.get_output_embeddings().weight.detach(),
            )
        ours, llama = (trained[name, accumulation, checkpointing] for name in ("ours", "llama"))
        yield from zip(ours, llama)
        yield ours[1], trained["ours", 1, False][1]
    start = two.ours.get_output_embeddings().weight
    assert (trained["ours", 1, False][1] - start).abs().max() > 10 * ROUNDING, "training has moved the weights"


@check
def pipeline(two: Two) -> Iterator[tuple[Any, Any]]:
    def written(model: Any) -> list[str]:
        write = transformers.pipeline("text-generation", model=model, tokenizer=two.tokenizer, device="cpu")
        texts = write(["The lazy fox", "The dog doesn't jump over"], max_new_tokens=12, do_sample=False, batch_size=2)
        return [found[0]["generated_text"] for found in texts]

    yield two.each(written)


@check
def refused(two: Two) -> Iterator[tuple[Any, Any]]:
    """What is not understood raises; None and False are no request."""
    yield two.ours(two.rows, output_router_logits=False, cu_seq_lens_q=None).logits, two.ours(two.rows).logits
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (TypeError, {"cu_seq_lens_q": torch.tensor([0, 3])}), (TypeError, {"is_causal": 0}), (TypeError, {"a_word": "x"}),
        (TypeError, {"past_key_values": ((two.rows, two.rows),)}),
        (TypeError, {"attention_mask": {"full_attention": None}}),
        (TypeError, {"attention_mask": torch.ones(3, 1, two.rows.shape[1], two.rows.shape[1], dtype=torch.long)}),
        (ValueError, {"attention_mask": torch.ones(3, 4)}), (ValueError, {"position_ids": torch.arange(3)[None]}),
        (ValueError, {"position_ids": torch.full_like(two.rows, 10**6)}),
        (ValueError, {"labels": two.rows, "logits_to_keep": 3}), (ValueError, {"inputs_embeds": torch.zeros(1, 3, 64)}),
    ]  # fmt: skip
    for kind, arguments in wrong:
        try:
            two.ours(two.rows, **arguments)
        except kind:
            continue
        raise AssertionError(f"{sorted(arguments)}: no {kind.__name__}")


def difference(ours: Any, llama: Any) -> float:
    """Return the largest difference; infinite where shapes, tokens or texts differ, or where it is not finite."""
    if not isinstance(ours, Tensor):
        return 0.0 if ours == llama else float("inf")
    if ours.shape != llama.shape:
        return float("inf")
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, llama) else float("inf")
    found = (ours.detach() - llama.detach()).abs().max().item()
    return found if found == found else float("inf")


def main(checkpoint: str, export: str) -> int:
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("picolm")
        raise RuntimeError("picolm can be imported here; the comparison is of what a checkpoint brings by itself")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # small products: more threads only wait for each other
    transformers.logging.set_verbosity_error()
    two, found, failures = Two(checkpoint, export), {}, []
    for one in CHECKS:
        try:
            found[one.__name__] = max(difference(*pair) for pair in one(two))
        except Exception as error:
            found[one.__name__] = float("inf")
            failures.append(f"{one.__name__}: {type(error).__name__}: {error}")
        if found[one.__name__] > ROUNDING:
            failures.append(f"{one.__name__}: differs by {found[one.__name__]}")
    print()  # Trainer has printed
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__, "differences": found}))
    print("\n".join(failures), file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(*map(str, map(Path, sys.argv[1:]))))
