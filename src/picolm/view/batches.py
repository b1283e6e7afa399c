"""The batch that a step was trained on, as text, with the loss of its rows before and after."""

import json
from typing import Any

from picolm.view.session import Session, to_json
from picolm.view.viewed import Viewed

MOST_ROWS, MOST_OF_BOUNDS = 16, 2  # the exact nats of a diffusion model take a pass for each token


def batch(session: Session, viewed: Viewed, step: int, rows: int) -> bytes:
    """Return the first rows of batch `step`, their sources, tokens, and nats under the weights of that step, and of the next one
    with weights. A step without weights has no nats. Raises PicoError for a run whose batches are not known.
    """
    from picolm.train.history import own_run  # imports Lightning, for which the page would wait two seconds more
    from picolm.train.inspection import batch_at

    rows = min(rows, MOST_ROWS if viewed.subject.likelihood == "exact" else MOST_OF_BOUNDS)
    seen, steps = batch_at(own_run(str(viewed.run.path)), step, rows=rows).rows, viewed.steps()
    ids, after = seen.tokens_RS.tolist(), next((each for each in steps if each > step), None)
    nats = {
        name: json.loads(session.answer("rows", viewed, each, ids)) if each in steps else None
        for name, each in (("before", step), ("after", after))
        if each is not None
    }
    made = list[dict[str, Any]]()
    for place, tokens in enumerate(ids):
        of_row = {"row": int(seen.numbers[place]), "source": seen.labels[place] if seen.labels else ""}
        of_row |= {"tokens": viewed.words(tokens)}
        for name in ("before", "after"):
            found = nats.get(name)
            of_row |= {name: found and found[place]["mean"], f"nats_{name}": found and found[place]["nats"]}
        made.append(of_row)
    return to_json({"rows": made, "after_step": after})
