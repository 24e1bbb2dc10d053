"""Print the rows of a small task, one JSON object a line: dates as people write them, and the same by ISO 8601.

The tutorial trains on them. Rows of your own take their place: any file of lines with a prompt and a response.

    python examples/date_rows.py > dates.jsonl
"""

from __future__ import annotations

import json
import random
from datetime import date, timedelta

FORMS = ("{day} {month} {year}", "{month} {day}, {year}", "{weekday}, {day} {month} {year}", "{day} {short} '{yy}")


def rows(number: int = 240) -> list[dict[str, str]]:
    """Return different dates in random forms, always the same ones."""
    draw = random.Random(0)  # noqa: S311 - nothing here is secret
    found = {}
    while len(found) < number:
        when = date(1990, 1, 1) + timedelta(days=draw.randrange(365 * 40))
        words = {"day": when.day, "month": f"{when:%B}", "short": f"{when:%b}", "weekday": f"{when:%A}"}
        text = draw.choice(FORMS).format(**words, year=when.year, yy=f"{when:%y}")
        found[text] = {"prompt": f"Write as YYYY-MM-DD: {text}", "response": when.isoformat()}
    return [*found.values()]


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))  # noqa: T201 - what it is for
