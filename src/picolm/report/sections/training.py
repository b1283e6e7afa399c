"""Section: loss by source, and the state of training."""

from contextlib import suppress

from picolm.errors import PicoError
from picolm.report import plot
from picolm.report.material import Material
from picolm.report.section import SECTIONS, Drawing, Section

CALL = "log = plot.log_table({'NAME': Run.open('RUN').metrics()}); plot."


@SECTIONS.add("training")
def training(material: Material) -> Section | None:
    """Return curves of what was logged; None for runs without a log."""
    log, drawings = material.log, []
    captions = (
        "Held-out loss is the mean over all predicted tokens of each source. Perplexity is the exponential of the loss in nats; "
        "bits per byte compare across tokenizers.",
        "The gradient norm is that before clipping; a factor of 1 on the gradient means that nothing was clipped.",
        "Minimal pairs: the share of pairs whose acceptable sentence is the likelier one (0.5 by chance). Other panels: tasks of "
        "lm-evaluation-harness in the units of their metrics.",
    )
    for name, caption in zip(("loss", "training", "tasks"), captions, strict=True):
        with suppress(PicoError):  # none of its quantities was logged
            made = getattr(plot, name)(log, groups=material.groups)
            drawings.append(Drawing(made, f"{CALL}{name}(log)", caption))
    return Section("Training", drawings, "Loss and the state of the optimizer over steps.") if drawings else None
