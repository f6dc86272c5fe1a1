"""Pages from templates: one HTML file that needs no network, in two languages, light and dark."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bert_glue.errors import CheckpointError
from bert_glue.report.charts import COLOURS, number
from bert_glue.report.words import WORDS, both, metric_name, starts_chinese
from bert_glue.storage.files import write_whole

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: object) -> str:
    """A whole document. It opens in Chinese if this process's locale is Chinese.

    Every value that a template shows is escaped, except our own style and script.

    Args:
        template: a file of `templates/`.
        values: of the template.
    """
    script = (TEMPLATES / "search.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = _environment().get_template(template).render(
        values, script=script, script_hash=digest, colours=COLOURS, starts_chinese=starts_chinese()
    )  # fmt: skip
    # JSON can contain a lone surrogate, which has no UTF-8 form.
    return text.encode("utf-8", "replace").decode("utf-8")


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"t": both, "words": WORDS, "metric_name": metric_name}
    found.filters |= {"points": points, "rate": rate, "duration": duration, "tick": number}
    return found


def points(value: float | None, digits: int = 2) -> str:
    """A fraction as points, x100; "-" for None."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def rate(value: float | None) -> str:
    """Samples per second; "-" for None."""
    return f"{value:,.1f}" if value else "-"


def duration(seconds: float | None) -> str:
    """A time such as 41 s, 12 min 5 s or 3 h 20 min; "-" for None."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shortened(text: str, length: int) -> str:
    """The text, shortened to at most `length` characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"


def write_page(path: Path, text: str) -> None:
    """Write a page. An earlier page stays until the new one is complete.

    Raises:
        CheckpointError: the page cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
