"""Section: all values as tables."""

from picolm.report.material import Material
from picolm.report.section import SECTIONS, Section, Sheet


@SECTIONS.add("values")
def values(material: Material) -> Section | None:
    """Return the long table of each analysis, and the log of the runs."""
    sheets = [
        Sheet(f"analysis {analysis.name}", analysis.table) for analysis in material.analyses if len(analysis.table)
    ]
    if len(material.log):
        sheets.append(Sheet("training log", material.log))
    return Section("All values", sheets, "Every number behind the figures.") if sheets else None
